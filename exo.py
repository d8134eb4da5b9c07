"""
EXO and DPO as the two directions of one KL divergence (Ji et al., ICML 2024, arXiv:2402.00856).

For one prompt x there are K completions y_1..y_K. Over these K items we compare two distributions:

    q_i = softmax_i( beta_pi * (log pi(y_i|x) - log sft(y_i|x)) )   the policy's, p_f in the paper
    p_i = softmax_i( r(x, y_i) / beta_r )                           the reward's, p_r in the paper
          or (1 - eps, eps) for a pair labelled by a person         the label's, p_rh in the paper

    EXO minimises KL(q || p): put mass only where the target has some. It seeks modes.
    DPO minimises KL(p || q): put mass wherever the target has some.   It covers the mass.

Two losses times two targets are the paper's four methods: exo-rw, exo-pref, dpo-rw, dpo-pref.

Why the order matters: alignment maximises J(pi) = E_pi[r] - beta KL(pi || sft). Its optimum is pi*
= sft * exp(r / beta) / Z, and J(pi*) - J(pi) = beta KL(pi || pi*), so the *reverse* KL is the
objective itself. With rewards as the target and many completions EXO's gradient tends to that of
KL(pi || pi*) and DPO's to that of KL(pi* || pi) (at beta_pi = 1; else pi^{beta_pi} stands for pi),
with an error of order 1/K that tests/test_theory.py measures. Where the policy class contains pi*,
both expected losses are least there, at every K >= 2 and beta = beta_r * beta_pi. For J itself at a
given beta set beta_pi = 1, beta_r = beta. Where the class does not contain pi*, they part ways.

With pairs whose labels follow Bradley-Terry, P(i beats j) = sigmoid(r_i - r_j), dpo-pref at eps = 0
has this minimiser, too, at beta = beta_pi; in exo-pref eps sets the temperature.

Every tensor is (B, K): B prompts, K completions each. `logps` are log pi(y|x) summed over the
tokens of y. A group with fewer than K completions is padded, and `mask` (B, K), bool, is True where
a completion exists. *Absent* (mask False) is not *impossible* (log p = -inf): an absent completion
is in neither softmax; an impossible one is in both, and the target gives it probability 0.

Ours: p is always normalised over the present completions, groups are a tensor axis and not a loop,
the loss is a mean over the groups that hold something. Nothing is random or written in place.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# ------------------------------------------------------------------------------
# The two distributions over the K completions


def masked_log_softmax(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """log softmax over the present entries of the last axis; 0 where absent, whatever x holds
    there: not -inf, so that sums and products over K skip them, in the backward pass too."""
    if mask is None:
        return F.log_softmax(x, dim=-1)
    x = x.masked_fill(~mask, -torch.inf)
    x = x.masked_fill(~mask.any(dim=-1, keepdim=True), 0.0)  # nothing present: no 0 / 0, ever
    return F.log_softmax(x, dim=-1).masked_fill(~mask, 0.0)


def reward_target(rewards: Tensor, beta_r: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """log p of p = softmax(rewards / beta_r): the paper's p_r, the target of exo-rw and dpo-rw.

    rewards: (B, K), any real number (absent entries may hold anything). beta_r > 0, in units of
    reward: small trusts the reward, large flattens it. Returns log p (B, K), 0 where absent. Raises
    ValueError for beta_r <= 0.
    """
    _check_positive("beta_r", beta_r)
    return masked_log_softmax(rewards / beta_r, mask)


def preference_target(label_smoothing: float) -> Tensor:
    """log p of (chosen, rejected) = (1 - eps, eps): the paper's p_rh, the target of exo-pref and
    dpo-pref.

    label_smoothing: eps in [0, 0.5), the softness of a label. It is no estimate of how many are
    wrong: exo-pref is asked by each for log-odds of log((1 - eps) / eps), and with a share of eps
    flipped for (1 - 2 eps) of that. At 0 (DPO as published) the rejected completion is impossible,
    log p = -inf, which only dpo_loss accepts. Returns float64 of shape (1, 2), to broadcast over B
    pairs; the losses cast it. Raises ValueError outside the range.
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    eps = label_smoothing
    log_eps = math.log(eps) if eps > 0 else -math.inf
    return torch.tensor([[math.log1p(-eps), log_eps]], dtype=torch.float64)


def policy_and_target(
    policy_logps: Tensor, ref_logps: Tensor, log_target: Tensor, beta_pi: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(log q, log p), both (B, K), normalised over the same present completions, 0 where absent.

    q is a softmax of log-ratios, so the intractable Z of pi* cancels, and a policy equal to the
    reference gives the uniform q. beta_pi > 0: large keeps the policy near the reference. The two
    temperatures act as one: unrestricted, q = p where pi = sft * exp(r / (beta_r * beta_pi)) / Z.
    """
    _check_positive("beta_pi", beta_pi)
    shape = tuple(policy_logps.shape)
    if len(shape) != 2:
        raise ValueError(f"log-probs must be (B, K): prompts x completions, got {shape}")
    if ref_logps.requires_grad:
        raise ValueError("ref_logps want no gradient: compute them under torch.no_grad()")
    if mask is not None and mask.shape != policy_logps.shape:
        raise ValueError(f"mask is {tuple(mask.shape)}, log-probs are {shape}")
    log_q = masked_log_softmax(beta_pi * (policy_logps - ref_logps.to(policy_logps)), mask)
    log_p = masked_log_softmax(log_target.to(policy_logps).expand_as(policy_logps), mask)
    return log_q, log_p


# ------------------------------------------------------------------------------
# The two losses


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) = sum_i a_i (log a_i - log b_i) over the last axis, exactly; 0 log 0 is 0.

    Inputs are log-probabilities (..., N); +inf where b is 0 and a is not. The experiments use it
    over all completions, the losses over the K of a group.
    """
    a = log_a.exp()
    return (a * torch.where(a == 0, 0.0, log_a - log_b)).sum(dim=-1)


def entropy(log_a: Tensor) -> Tensor:
    """H(a) = -sum_i a_i log a_i over the last axis, in nats; 0 log 0 is 0."""
    return -kl(log_a, torch.zeros_like(log_a))


def exo_loss(
    policy_logps: Tensor,
    ref_logps: Tensor,
    log_target: Tensor,
    beta_pi: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """EXO: the mean over groups of KL(q || p). The policy comes *first*: the reverse KL.

    With reward_target it is the paper's exo-rw; with preference_target (K = 2) exo-pref, its Eq.
    16. policy_logps, ref_logps: (B, K) log pi(y|x) and log sft(y|x). log_target: (B, K) or (1, K).
    mask: (B, K) bool, True where a completion exists. Returns a scalar in policy_logps' dtype.
    Raises ValueError, on the CPU (a GPU would have to wait), if the target gives a present
    completion probability 0: the KL would be infinite. The gradient in log pi is beta_pi * q *
    (log q - log p - KL): it vanishes where q is already certain, also where it is certain and
    wrong, in contrast to DPO's beta_pi * (q - p).
    """
    log_q, log_p = policy_and_target(policy_logps, ref_logps, log_target, beta_pi, mask)
    if log_p.device.type == "cpu" and not torch.isfinite(log_p).all():
        raise ValueError(
            "EXO needs a target above 0 for every completion: at 0 the reverse KL is infinite "
            "(for pairs, use label_smoothing > 0, for instance 1e-3)"
        )
    return group_mean(kl(log_q, log_p), mask)


def dpo_loss(
    policy_logps: Tensor,
    ref_logps: Tensor,
    log_target: Tensor,
    beta_pi: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """DPO: the mean over groups of -sum_i p_i log q_i = KL(p || q) + H(p). The policy comes *last*.

    With reward_target it is the paper's dpo-rw; with preference_target(0) and K = 2 it is
    -logsigmoid(beta_pi * margin), Rafailov et al. 2023 (arXiv:2305.18290) Eq. 7. H(p) does not
    depend on the policy; it is there so that the number is the one other libraries print. Arguments
    as in exo_loss.
    """
    log_q, log_p = policy_and_target(policy_logps, ref_logps, log_target, beta_pi, mask)
    return group_mean(kl(log_p, log_q) + entropy(log_p), mask)


@dataclass(frozen=True)
class Needs:
    """What a loss wants of training beyond the five arguments that both losses above take."""

    label_smoothing: float = 0.0  # where --label_smoothing is not given
    smooth_labels: bool = False  # refuses label_smoothing = 0
    on_policy: bool = False  # with --online, weigh completions by who drew them, rho below
    pairs: bool = False  # refuses rows with rewards
    reference: bool = True  # False: ref_logps are 0, and nothing is computed for them
    lengths: bool = False  # wants lengths=(B, K), the tokens of each completion, end of text too


# The preference stages: `python train.py NAME` minimises LOSSES[NAME]. A new loss is a function and
# an entry; one that needs more than the five arguments also says so in NEEDS.
LOSSES = {"exo": exo_loss, "dpo": dpo_loss}
NEEDS = {exo_loss: Needs(label_smoothing=1e-3, smooth_labels=True, on_policy=True)}


def needs(name: str) -> Needs:
    return NEEDS.get(LOSSES[name], Needs())


def group_mean(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of values (B,) over the groups with at least one completion in mask (B, K); 0 if there
    is none."""
    if mask is None:
        return values.mean()
    present = mask.any(dim=-1)
    return values.masked_fill(~present, 0.0).sum() / present.sum().clamp(min=1)


# ------------------------------------------------------------------------------
# On-policy EXO: the K completions come from a snapshot rho of the policy itself (ours, beyond the
# paper)


def on_policy_ref(ref_logps: Tensor, snapshot_logps: Tensor, beta_pi: float = 1.0) -> Tensor:
    """The reference to hand to exo_loss when y_1..y_K ~ rho: q = softmax(log pi^{beta_pi} - log
    rho).

    pi^{beta_pi} is sft * (pi / sft)^{beta_pi}, so the log-weights are
    beta_pi log pi + (1 - beta_pi) log sft - log rho = beta_pi (log pi - what is returned here).
    """
    return (snapshot_logps.detach() - (1 - beta_pi) * ref_logps) / beta_pi


def on_policy_target(
    rewards: Tensor,
    ref_logps: Tensor,
    snapshot_logps: Tensor,
    beta_r: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """log p of p = softmax(r / beta_r + log sft - log rho): pi* seen through draws from the
    snapshot rho.

    With rho = pi (fresh draws) and beta_pi = 1 the expected gradient of exo_loss is exactly (K -
    1)/K times that of KL(pi || pi*) at beta = beta_r, for every K >= 2: REINFORCE with the group's
    mean as its baseline. Group by group it is (K - 1)/K times the gradient of RLOO, whose baseline
    is the mean of the others (Kool et al. 2019; Ahmadian et al. 2024, arXiv:2402.14740), on the
    gains r / beta - log(pi / sft), so (K - 1)/(K beta) times RLOO's on r - beta log(pi / sft). A
    stale rho brings back a bias of order 1/K. With beta_pi = 1 set beta_r to the offline beta_r *
    beta_pi for the same optimum.
    """
    return reward_target(rewards + beta_r * (ref_logps - snapshot_logps.detach()), beta_r, mask)


# ------------------------------------------------------------------------------
# Around the two losses: the reward model, and how far the policy has moved


def reward_model_loss(
    rewards: Tensor, label_smoothing: float = 0.0, better: Tensor | None = None
) -> Tensor:
    """Bradley-Terry: the mean of -log sigmoid(r_i - r_j) over the pairs in which i is preferred
    to j, and then over groups (InstructGPT, arXiv:2203.02155, Eq. 1).

    rewards: (B, K). better: (B, K, K) bool, True where i is preferred to j; None is K = 2, chosen
    first. A group without any pair adds 0. At K = 2 it is dpo_loss with the reward where the
    log-ratio was: that DPO's policy is "secretly a reward model" is this function.
    """
    if better is None:
        better = torch.tensor([[False, True], [False, False]], device=rewards.device)
    better = better.expand(len(rewards), *better.shape[-2:])
    gap = rewards[:, :, None] - rewards[:, None, :]  # (B, K, K)
    wrong = F.softplus(-gap)  # -log sigmoid(gap)
    nll = torch.lerp(wrong, wrong + gap, label_smoothing)  # -log sigmoid(-gap) = wrong + gap
    count = better.sum(dim=(1, 2)).clamp(min=1)
    return (nll.masked_fill(~better, 0.0).sum(dim=(1, 2)) / count).mean()


def preferred(log_target: Tensor, mask: Tensor) -> Tensor:
    """(B, K, K) bool: True where both completions are there and the first has the higher target."""
    both = mask[:, :, None] & mask[:, None, :]
    return (log_target[:, :, None] > log_target[:, None, :]) & both


def accuracy(scores: Tensor, log_target: Tensor, mask: Tensor) -> Tensor:
    """Of the pairs in a group with unlike targets, the share that scores (B, K) order alike, and of
    that the mean over groups. A tie is half, and so is a group without such a pair, and a gap that
    may be rounding: before the first step all log-ratios tie, whatever batch they are in."""
    better = preferred(log_target, mask)
    gap = scores[:, :, None] - scores[:, None, :]
    half = torch.where(gap.abs() > 1e-4, gap.sign() / 2, 0.0)  # right or wrong, from a tie
    count = better.sum(dim=(1, 2)).clamp(min=1)
    return 0.5 + ((half * better).sum(dim=(1, 2)) / count).mean()


def kl_estimates(policy_logps: Tensor, ref_logps: Tensor) -> dict[str, Tensor]:
    """Per-draw estimates of KL(pi || ref) in nats from y ~ pi, each shaped like policy_logps.

    `k1`: log pi - log ref, unbiased. `k2`: k1^2 / 2, biased, low variance. `k3`: k1 + exp(-k1) - 1,
    unbiased, never negative, low variance while pi is near ref (Schulman 2020, "Approximating KL
    divergence"). Average over draws; the spread of k1 gives the standard error.
    """
    k1 = policy_logps - ref_logps
    return {"k1": k1, "k2": k1.square() / 2, "k3": k1 + torch.expm1(-k1)}


def _check_positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be a finite number above 0, got {value}")
