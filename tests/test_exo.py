"""
exo.py against numbers known by hand, a plain Python loop, and torch.distributions. What any loss
must hold is asked of every one in exo.LOSSES and of two as a fork would write them; what only the
paper's two hold, of these.
"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import often, rand
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence

import exo

INF, NAN = math.inf, math.nan
LOG2 = math.log(2)
PAPERS = {name: exo.LOSSES[name] for name in ("exo", "dpo")}
both_losses = pytest.mark.parametrize("loss", PAPERS.values(), ids=PAPERS)


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def ragged(holes=0.0):
    """Groups of 4, 2, 1 and no completions in a (4, 4) batch; `holes` fills what is absent."""
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]).bool()
    policy, ref, rewards = (rand(4, 4, seed=s).masked_fill(~mask, holes) for s in (1, 2, 3))
    return policy, ref, rewards, mask


def value_and_grad(loss, policy, *args, **kwargs):
    policy = policy.detach().clone().requires_grad_()
    value = loss(policy, *args, **kwargs)
    return value.detach(), torch.autograd.grad(value, policy)[0]


def assert_unchanged(inputs, before):
    for x, copy in zip(inputs, before, strict=True):
        torch.testing.assert_close(x, copy, rtol=0, atol=0, equal_nan=True)


# ------------------------------------------------------------------------------
# What every preference loss must hold


@pytest.fixture(params=[*exo.LOSSES, "ipo", "simpo"])
def name(request, forks):
    return request.param


def batch_for(name, holes=0.0):
    """(policy, ref, log_target, mask) that fit this loss: ragged, and the last group is empty."""
    policy, ref, rewards, mask = ragged(holes)
    if exo.needs(name).pairs:  # whole pairs, or none
        policy, ref, rewards, mask = (x[[0, 0, 0, 3], :2] for x in (policy, ref, rewards, mask))
        policy = policy + torch.arange(4.0)[:, None] * torch.tensor([1.0, -1.0])
    return policy, ref, exo.reward_target(rewards, 0.5, mask), mask


def ask(name, policy, ref, log_target, mask):
    lengths = torch.full(policy.shape, 3, device=policy.device)
    more = {"lengths": lengths} if exo.needs(name).lengths else {}
    return exo.LOSSES[name](policy, ref, log_target, 0.7, mask, **more)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_loss_is_a_finite_scalar_and_the_mean_over_groups_that_hold_something(name, dtype):
    """In the dtype of the policy's log-probs; with the paper's two the stored reference and the
    target follow the policy. Nothing is written in place."""
    policy, ref, *more = batch_for(name)
    ref = ref.float() if name in PAPERS else ref.to(dtype)
    inputs = policy, *more = policy.to(dtype), ref, *more
    before = [x.clone() for x in inputs]
    value, grad = value_and_grad(lambda x: ask(name, x, *more), policy)
    assert value.shape == ()
    assert value.isfinite()
    assert grad.isfinite().all()
    assert value.dtype == grad.dtype == dtype
    each = [ask(name, *(x[b : b + 1] for x in before)) for b in range(3)]
    torch.testing.assert_close(value, torch.stack(each).mean())
    assert_unchanged(inputs, before)


@pytest.mark.parametrize("holes", [NAN, INF, -INF, 1e30])
def test_every_loss_drops_what_is_absent(name, holes):
    """Neither in its value nor in its gradient, whatever an absent entry or an empty group holds;
    the paper's two need no finite padding for a gradient of 0 there."""
    (policy, *more), (dirty, *others) = batch_for(name), batch_for(name, holes)
    mask = more[-1]
    clean = value_and_grad(lambda x: ask(name, x, *more), policy)
    value, grad = value_and_grad(lambda x: ask(name, x, *others), dirty)
    torch.testing.assert_close((value, grad[mask]), (clean[0], clean[1][mask]))
    assert not clean[1][~mask].any()
    if name in PAPERS:
        assert not grad[~mask].any()
        rewards = ragged(holes)[2] / 0.5
        raw = value_and_grad(lambda x: ask(name, x, others[0], rewards, mask), dirty)
        torch.testing.assert_close(raw, (value, grad))


# ------------------------------------------------------------------------------
# An oracle: torch.distributions, group by group. test_golden.py has another, one float at a time


def oracle(policy, ref, target, beta_pi, mask, reverse):
    """The mean over groups that hold something; absent completions are cut out, not masked."""
    values = []
    for b in range(len(mask)):
        if (keep := mask[b]).any():
            q = Categorical(logits=beta_pi * (policy - ref)[b, keep])
            p = Categorical(logits=target[b, keep])
            values.append(kl_divergence(q, p) if reverse else kl_divergence(p, q) + p.entropy())
    return torch.stack(values).mean() if values else 0 * policy.sum()


LOGPS, REWARDS = st.floats(-60, 0), st.floats(-40, 40)


@st.composite
def groups(draw, logp=LOGPS, reward=REWARDS):
    """policy, ref, log_target (lists, B by K), mask and beta_pi, of any shape up to (4, 5)."""
    B, K = draw(st.integers(1, 4)), draw(st.integers(1, 5))

    def table(entry):
        row = st.lists(entry, min_size=K, max_size=K)
        return draw(st.lists(row, min_size=B, max_size=B))

    beta_pi = draw(st.floats(0.01, 3))
    return *(table(x) for x in (logp, logp, reward, st.booleans())), beta_pi


@often
@given(groups())
def test_losses_are_the_two_directions_of_torch_kl_divergence(case):
    """KL(q || p) and KL(p || q) + H(p), of any shape, value and mask: the order of two arguments is
    all that differs. So EXO is at least 0 and DPO at least H(p). Gradients are the oracle's: finite
    everywhere, 0 where nothing is, and of sum 0, as only differences within a group count."""
    policy, ref, target, mask, beta_pi = case
    policy, ref, target, mask = f64(policy), f64(ref), f64(target), torch.tensor(mask)
    close = {"rtol": 1e-9, "atol": 1e-9}
    floor = exo.group_mean(exo.entropy(exo.reward_target(target, 1.0, mask)), mask)
    for loss, least in ((exo.exo_loss, 0.0), (exo.dpo_loss, floor)):
        value, grad = value_and_grad(loss, policy, ref, target, beta_pi, mask)
        twin = value_and_grad(oracle, policy, ref, target, beta_pi, mask, loss is exo.exo_loss)
        torch.testing.assert_close((value, grad), twin, **close)
        assert value >= least - 1e-9
        assert not grad[~mask].any()
        torch.testing.assert_close(grad.sum(-1), torch.zeros_like(grad[:, 0]), **close)


# ------------------------------------------------------------------------------
# Values known by hand


def test_at_the_start_dpo_is_log_2_and_exo_2_7612():
    """Policy equal to reference: every pair is a coin toss, whatever the label smoothing; and KL of
    a coin toss to (0.999, 0.001) is -log 2 - (log 0.999 + log 0.001) / 2."""
    logps = f64([[-12.0, -30.0], [-7.0, -7.5]])
    for eps in (0.0, 1e-3, 0.3):
        start = exo.dpo_loss(logps, logps, exo.preference_target(eps), beta_pi=0.1)
        assert start.item() == pytest.approx(LOG2)
    start = exo.exo_loss(logps, logps, exo.preference_target(1e-3), beta_pi=0.1)
    assert start.item() == pytest.approx(2.7612, abs=5e-5)


def test_reward_target_is_a_softmax_with_temperature_over_what_is_present():
    """Odds 1 : 3 at beta_r = 1 become 1 : 9 at beta_r = 1/2: a small beta_r trusts the reward. Only
    differences within a prompt matter. Of four places two are empty: one half each."""
    rewards = f64([[0.0, math.log(3)]])
    torch.testing.assert_close(exo.reward_target(rewards).exp(), f64([[0.25, 0.75]]))
    torch.testing.assert_close(exo.reward_target(rewards, 0.5).exp(), f64([[0.1, 0.9]]))
    shifted = exo.reward_target(rand(3, 4) + f64([[5.0], [-80.0], [1e3]]), 0.7)
    torch.testing.assert_close(shifted, exo.reward_target(rand(3, 4), 0.7), rtol=1e-10, atol=1e-10)
    mask = torch.tensor([[True, False, True, False]])
    log_p = exo.reward_target(f64([[1.0, 99.0, 1.0, NAN]]), 0.1, mask)
    torch.testing.assert_close(log_p, f64([[-LOG2, 0.0, -LOG2, 0.0]]))


def test_preference_target_puts_1_minus_eps_on_the_chosen():
    """Column 0 is the chosen completion everywhere in this project. Without smoothing, DPO as
    published, the rejected one is impossible; at 1/2 the label says nothing, above the opposite."""
    for eps in (1e-9, 1e-3, 0.119, 0.4999):
        target = exo.preference_target(eps)
        assert target.shape == (1, 2)
        assert target.dtype == torch.float64
        torch.testing.assert_close(target.exp(), f64([[1 - eps, eps]]), rtol=1e-12, atol=0)
    assert exo.preference_target(0.0).tolist() == [[0.0, -INF]]
    for eps in (-0.1, 0.5, 1.0, NAN):
        with pytest.raises(ValueError, match=rf"label_smoothing must be in \[0, 0\.5\), got {eps}"):
            exo.preference_target(eps)


@pytest.mark.parametrize("beta_pi", [0.1, 1.0, 2.5])
@pytest.mark.parametrize("eps", [0.0, 0.2])
def test_dpo_is_minus_logsigmoid_of_the_margin(beta_pi, eps):
    """Rafailov et al. 2023, Eq. 7; with smoothing the conservative DPO of other libraries, entropy
    of the label included."""
    policy, ref = 10 * rand(6, 2, seed=1), 10 * rand(6, 2, seed=2)
    z = beta_pi * ((policy - ref)[:, 0] - (policy - ref)[:, 1])
    expected = -(1 - eps) * F.logsigmoid(z) - eps * F.logsigmoid(-z)
    loss = exo.dpo_loss(policy, ref, exo.preference_target(eps), beta_pi)
    torch.testing.assert_close(loss, expected.mean())


# ------------------------------------------------------------------------------
# Ragged groups: absent is not impossible


@both_losses
def test_a_batch_of_empty_groups_teaches_nothing(loss):
    """Nothing to learn from is not an error: one rank of many may draw such a batch. No NaN arises
    on the way either, which anomaly detection would report."""
    hole, nothing = torch.full((2, 3), NAN, dtype=torch.float64), torch.zeros(2, 3).bool()
    target = exo.reward_target(hole, 1.0, nothing)
    with torch.autograd.set_detect_anomaly(True):
        value, grad = value_and_grad(loss, hole, hole, target, 1.0, nothing)
    assert value == 0
    assert not grad.any()


def test_impossible_is_not_absent():
    """Probability 0 keeps its place in q's softmax; an absent completion does not. 0 log q is 0,
    and the gradient is still beta_pi (q - p); -inf spoils no derivatives."""
    zeros, target = f64([[0.0, 0.0, 0.0]]), f64([[0.0, -INF, 0.0]])
    value, grad = value_and_grad(exo.dpo_loss, zeros, zeros, target, 2.0)
    assert value.item() == pytest.approx(math.log(3))
    torch.testing.assert_close(grad, 2 * f64([[1 / 3 - 1 / 2, 1 / 3, 1 / 3 - 1 / 2]]))
    absent = exo.dpo_loss(zeros, zeros, target, mask=torch.tensor([[True, False, True]]))
    assert absent.item() == pytest.approx(math.log(2))
    gradchecks(exo.dpo_loss, rand(3, 2), rand(3, 2, seed=2), exo.preference_target(0.0), 0.7)


# ------------------------------------------------------------------------------
# Numbers at the edge, dtypes, gradients, purity


@both_losses
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_log_ratios_and_rewards_of_ten_thousand_give_finite_loss_and_gradient(loss, size):
    """A policy that has run away is still a number, for pairs and for groups, in float32; p =
    e^-20000 underflows, its logarithm does not."""
    group = torch.tensor([[size, 0.0, -size, size, 1.0]])
    for logps, target in (
        (group[:, :2], exo.preference_target(1e-3)),
        (group, exo.reward_target(torch.tensor([[1.0, -1.0, 30.0, 0.0, -30.0]]))),
        (torch.zeros(1, 3), exo.reward_target(torch.tensor([[size, 0.0, -size]]))),
    ):
        value, grad = value_and_grad(loss, logps, torch.zeros_like(logps), target, 1.0)
        assert value.isfinite()
        assert grad.isfinite().all()


def gradchecks(loss, policy, *args):
    """First and second derivatives equal finite differences."""
    policy = policy.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, *args), policy)
    assert torch.autograd.gradgradcheck(lambda x: loss(x, *args), policy)


@both_losses
def test_gradcheck(loss):
    policy, ref, rewards, mask = ragged()
    gradchecks(loss, policy, ref, exo.reward_target(rewards, 0.5, mask), 0.7, mask)


def test_inputs_come_back_unchanged():
    """Nothing beside the losses writes into its arguments either, NaN padding included."""
    policy, ref, rewards, mask = inputs = ragged(NAN)
    before = [x.clone() for x in inputs]
    target = exo.reward_target(rewards, 0.5, mask)
    exo.on_policy_ref(ref, policy, 0.5)
    exo.on_policy_target(rewards, ref, policy, 0.5, mask)
    exo.kl(policy, ref)
    exo.entropy(policy)
    exo.kl_estimates(policy, ref)
    exo.reward_model_loss(rewards[:, :2])
    exo.accuracy(policy, target, mask)
    assert_unchanged(inputs, before)


# ------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize("beta", [0.0, -0.1, NAN, INF])
def test_betas_that_are_not_above_0_are_refused_by_name_and_value(beta):
    """A beta of 0 would divide by it, a negative one would train the wrong way."""
    zeros = f64([[0.0, 0.0]])
    with pytest.raises(ValueError, match=rf"beta_r must be .* above 0, got {beta}"):
        exo.reward_target(zeros, beta)
    for loss in PAPERS.values():
        with pytest.raises(ValueError, match=rf"beta_pi must be .* above 0, got {beta}"):
            loss(zeros, zeros, exo.preference_target(0.1), beta)


def test_exo_refuses_probability_0_in_any_group_and_place_and_names_the_remedy():
    """KL(q || p) is infinite where p is 0, so EXO has no unsmoothed labels. One impossible
    completion among many is enough; where it is absent, it is padding."""
    said = r"reverse KL is infinite.*label_smoothing > 0"
    with pytest.raises(ValueError, match=said):
        exo.exo_loss(rand(3, 2), rand(3, 2), exo.preference_target(0.0))
    target = rand(3, 4)
    target[2, 1] = -INF
    mask = torch.ones(3, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=said):
        exo.exo_loss(rand(3, 4), rand(3, 4), target, mask=mask)
    mask[2, 1] = False
    assert exo.exo_loss(rand(3, 4), rand(3, 4), target, mask=mask).isfinite()


@both_losses
def test_what_is_surely_wrong_is_refused_in_a_sentence(loss):
    x, target = rand(3, 2), exo.preference_target(0.1)
    with pytest.raises(ValueError, match=r"must be \(B, K\): .*, got \(2,\)"):
        loss(x[0], x[0], target[0])
    with pytest.raises(ValueError, match=r"mask is \(3, 1\), log-probs are \(3, 2\)"):
        loss(x, x, target, mask=torch.ones(3, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"ref_logps want no gradient"):
        loss(x, x.clone().requires_grad_(), target)


# ------------------------------------------------------------------------------
# kl, entropy, and what stands around the losses


def test_kl_and_entropy_by_hand():
    """KL((1/2, 1/2) || (1/4, 3/4)) = log 2 - log 3 / 2, and the other order is another number. 0
    log 0 is 0; mass where the other has none costs infinity. Entropy is log N when uniform, 0 when
    certain."""
    a, b = f64([0.5, 0.5]).log(), f64([0.25, 0.75]).log()
    assert exo.kl(a, b).item() == pytest.approx(LOG2 - math.log(3) / 2)
    assert exo.kl(b, a).item() == pytest.approx(0.75 * math.log(3) - LOG2)
    sure = f64([0.0, -INF])
    assert exo.kl(sure, a).item() == pytest.approx(LOG2)
    assert exo.kl(sure, sure).item() == 0
    assert exo.kl(a, sure).item() == INF
    rows = f64([[0.25] * 4, [0.5, 0.5, 0, 0], [1, 0, 0, 0]]).log()
    torch.testing.assert_close(exo.entropy(rows), f64([2 * LOG2, LOG2, 0.0]))


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_reward_model_loss_is_minus_logsigmoid_of_the_reward_gap(eps):
    """Bradley-Terry: chosen first, the mean over pairs, and log 2 for a model that cannot tell."""
    rewards = 3 * rand(5, 2)
    gap = rewards[:, 0] - rewards[:, 1]
    expected = -(1 - eps) * F.logsigmoid(gap) - eps * F.logsigmoid(-gap)
    torch.testing.assert_close(exo.reward_model_loss(rewards, eps), expected.mean())
    assert exo.reward_model_loss(f64([[4.0, 4.0]]), eps).item() == pytest.approx(LOG2)


def loop_accuracy(scores, target, mask):
    """Twin of accuracy: each pair of each group by hand."""
    shares = []
    for row, p, here in zip(scores, target, mask, strict=True):
        marks = []
        for i, j in itertools.permutations([k for k in range(len(here)) if here[k]], 2):
            if p[i] > p[j]:
                tie = not abs(row[i] - row[j]) > 1e-4  # of two that are -inf, too
                marks.append(0.5 if tie else float(row[i] > row[j]))
        shares.append(sum(marks) / len(marks) if marks else 0.5)
    return sum(shares) / len(shares)


@often
@given(groups(st.sampled_from([-INF, -2.0, -1.00005, -1.0]), st.integers(0, 2)))
def test_accuracy_is_the_mean_over_groups_of_the_share_of_pairs_in_order(case):
    """A tie is a half, and so is a gap that may be rounding, and a group without a comparable
    pair."""
    scores, _, target, mask, _ = case
    found = exo.accuracy(f64(scores), f64(target), torch.tensor(mask))
    assert found.item() == pytest.approx(loop_accuracy(scores, target, mask), abs=1e-12)


def test_kl_estimates_k1_and_k3_are_unbiased_and_k2_is_not():
    """Averaged over every outcome instead of draws, k1 and k3 are the KL itself. k3 is about k1^2 /
    2, which is k2, for a small k1, down to where 1 + x loses its digits, and never negative. By
    hand: a draw to which pi gives twice the reference's probability."""
    estimates = exo.kl_estimates(f64([[math.log(0.5)]]), f64([[math.log(0.25)]]))
    expected = {"k1": LOG2, "k2": LOG2**2 / 2, "k3": LOG2 - 0.5}
    assert {name: x.item() for name, x in estimates.items()} == pytest.approx(expected)
    log_pi, log_ref = rand(7, seed=1).log_softmax(0), rand(7, seed=2).log_softmax(0)
    exact = exo.kl(log_pi, log_ref)
    means = {k: (log_pi.exp() * x).sum() for k, x in exo.kl_estimates(log_pi, log_ref).items()}
    torch.testing.assert_close(means["k1"], exact)
    torch.testing.assert_close(means["k3"], exact)
    assert (means["k2"] - exact).abs() > 0.01
    k1 = f64([-30.0, -1.0, -1e-8, 0.0, 1e-8, 1.0, 30.0])
    k3 = exo.kl_estimates(k1, torch.zeros_like(k1))["k3"]
    assert (k3 >= 0).all()
    assert k3[4].item() == pytest.approx(5e-17, rel=1e-3)


def test_on_policy_arguments_by_hand():
    """Importance weights: q ~ sft (pi / sft)^beta_pi / rho and p ~ sft exp(r / beta_r) / rho. NaN
    padding stays where it is."""
    pi, sft, rho, rewards = (rand(2, 3, seed=s) for s in range(4))
    log_q = F.log_softmax(0.3 * pi + 0.7 * sft - rho, dim=-1)
    log_p = F.log_softmax(rewards / 0.4 + sft - rho, dim=-1)
    ref = exo.on_policy_ref(sft, rho, 0.3)
    target = exo.on_policy_target(rewards, sft, rho, 0.4)
    torch.testing.assert_close(F.log_softmax(0.3 * (pi - ref), dim=-1), log_q)
    torch.testing.assert_close(target, log_p)
    _, sft, rewards, mask = ragged(NAN)
    target = exo.on_policy_target(rewards, sft, sft, 0.4, mask)
    torch.testing.assert_close(target, exo.reward_target(rewards, 0.4, mask))
    assert not target[~mask].any()
