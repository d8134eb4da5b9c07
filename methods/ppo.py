"""
PPO, the RL baseline, as in the InstructGPT line of work (Ziegler et al. 2019, arXiv:1909.08593;
Ouyang et al. 2022, arXiv:2203.02155). Every detail that matters:

- One decision per token, the end of text among them. The reward comes at the last token of a
  completion; every token pays kl_coef (log pi_old - log sft). Summed, that is J's integrand.
- A completion cut at max_new_tokens counts as ended: nothing is bootstrapped from its last value.
  Rewards are not normalised, scaled or clipped.
- A round: round_iters batches of prompts, K completions each, from one snapshot; then ppo_epochs
  passes over them in minibatches of batch_size prompts, shuffled in every pass.
- Generalised advantage estimates, whitened over the tokens of the whole round; the returns for the
  value network come from the advantages before they are whitened.
- Clipped surrogate and clipped value loss (half a squared error), both averaged over tokens.
- The value network is a trunk of its own, a copy of sft's (InstructGPT's starts from the reward
  model), and a linear head that starts at 0. One AdamW with one learning rate and one gradient norm
  for both networks.
- kl_coef is constant; there is no entropy bonus, no early stop and no pretraining loss.
"""

import copy

import torch
from torch import Tensor

from data import Groups
from infra import parallel
from infra.parallel import load_weights, merge, passes, weights_to_save
from methods.online import Rounds
from model import GPT, ScalarHead, Scorer, scored_hidden, to_grid

# ------------------------------------------------------------------------------
# The loss: tensors (..., T); `scored` is True where a token is


def gae(
    rewards: Tensor, values: Tensor, scored: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates (Schulman et al. 2016, arXiv:1506.02438) and the returns that
    the values should predict; both (..., T), 0 where nothing is scored.

    values[t] is the value before token t is chosen; tokens are right padded, and the value after
    the last one is 0, also where a text was cut.
    """
    advantages = []
    following = running = torch.zeros_like(values[..., 0])  # value and advantage one token later
    for t in reversed(range(values.size(-1))):
        error = rewards[..., t] + gamma * following - values[..., t]
        running = torch.where(scored[..., t], error + gamma * lam * running, 0.0)
        following = torch.where(scored[..., t], values[..., t], 0.0)
        advantages.append(running)
    advantages = torch.stack(advantages[::-1], dim=-1)
    return advantages, torch.where(scored, advantages + values, 0.0)


def whiten(x: Tensor, scored: Tensor) -> Tensor:
    """x shifted and scaled to mean 0 and variance 1 over the scored tokens; 0 elsewhere."""
    mean, var = x[scored].mean(), x[scored].var(correction=0)
    return torch.where(scored, (x - mean) * (var + 1e-8).rsqrt(), 0.0)


def ppo_loss(
    logps: Tensor,
    values: Tensor,
    old_logps: Tensor,
    old_values: Tensor,
    advantages: Tensor,
    returns: Tensor,
    scored: Tensor,
    clip: float = 0.2,
    value_clip: float = 0.2,
    value_coef: float = 0.5,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's loss (Schulman et al. 2017, arXiv:1707.06347: Eq. 7, and of Eq. 9 the value term; that
    the value is clipped, too, is the authors' code's), a mean over scored tokens, and its figures,
    detached.

    logps, values: per token, with gradient; old_*: the same when the texts were drawn. The ratio of
    probabilities, and how far a value moves, stop paying off beyond 1 ± clip and ± value_clip.
    """
    n = scored.sum().clamp(min=1)

    def mean(x: Tensor) -> Tensor:
        return x.masked_fill(~scored, 0.0).sum() / n

    change = logps - old_logps
    ratio = change.exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    policy = mean(-torch.minimum(ratio * advantages, clipped * advantages))
    near = old_values + (values - old_values).clamp(-value_clip, value_clip)
    value = mean(torch.maximum((values - returns).square(), (near - returns).square())) / 2
    figures = {
        "policy_loss": policy,
        "value_loss": value,
        "clip_fraction": mean(((ratio - 1).abs() > clip).to(ratio)),
        "approx_kl": mean(torch.expm1(change) - change),  # KL(old || new), from draws of old
    }
    return policy + value_coef * value, {k: v.detach() for k, v in figures.items()}


# ------------------------------------------------------------------------------
# The two networks


class ActorCritic(torch.nn.Module):
    """PPO's two networks in one module. The value network has a trunk of its own, a copy of the
    policy's at the start, so that its large early errors do not pass through the policy."""

    def __init__(self, gpt: GPT, temperature: float = 1.0):
        super().__init__()
        self.policy, self.critic = Scorer(gpt, temperature), copy.deepcopy(gpt)
        self.value = ScalarHead(gpt.config.n_embd)

    def forward(self, batch) -> tuple[Tensor, Tensor]:
        """-> log pi of every completion token, and the value of the text before it; both (B, K, T),
        exactly 0 where nothing is scored."""
        values = to_grid(self.value(scored_hidden(self.critic, batch)), batch)
        return self.policy(batch), values


# ------------------------------------------------------------------------------
# The stage


class PPOStage(Rounds):
    """`stored` holds what the loss needs beside the tokens: (M, T) tensors on the device, a row for
    each segment of the round's groups."""

    def __init__(self, s, policy, prompts: Groups, held_out: Groups | None = None):
        module = ActorCritic(policy.gpt, policy.temperature)
        self.passes, self.stored = s.ppo_epochs, {}
        self.begin(s, policy.wrap(module, s), prompts, held_out, beta=s.kl_coef)

    def store(self) -> Tensor:
        s, groups = self.s, self.groups
        real = torch.from_numpy(groups.is_completion())
        logps, values, ref_logps = self.per_token()  # (M, T), 0 where nothing is scored
        length = torch.from_numpy(groups.lengths()) * real
        scored = torch.arange(logps.size(1)) < length[:, None]
        rewards = -s.kl_coef * (logps - ref_logps)
        rewards[real, length[real] - 1] += torch.from_numpy(groups.rewards)[real].to(rewards)
        advantages, returns = gae(rewards, values, scored)
        stored = {"old_logps": logps, "old_values": values, "returns": returns}
        stored |= {"advantages": whiten(advantages, scored)}
        self.stored = {k: v.to(self.policy.device) for k, v in stored.items()}
        return (logps - ref_logps).sum(-1)[real]

    def per_token(self) -> list[Tensor]:
        """[log pi, value, log sft] of every completion token of the round, (M, T) on the CPU."""
        s, groups, device = self.s, self.groups, self.policy.device
        step = parallel.rounding(device)
        T = -(-int(groups.lengths().max()) // step) * step  # as wide as any batch
        dtype = self.policy.gpt.wte.weight.dtype
        out = [torch.zeros(len(groups.ended), T, dtype=dtype) for _ in range(3)]
        for module, stores in ((self.policy.module, out[:2]), (self.ref, out[2:])):
            for batch, result in passes(module, groups, s.at_once, device, s.dtype):
                result = result if isinstance(result, tuple) else (result,)
                for store, x in zip(stores, result, strict=True):
                    store[batch.segment, : x.size(-1)] = x.to(store)
        return [merge(x) for x in out]

    def loss(self, batch) -> tuple[Tensor, dict]:
        logps, values = self.policy.module(batch)
        scored = batch.targets >= 0  # (B, K, T)
        stored = {k: v[batch.segment][..., : scored.size(-1)] for k, v in self.stored.items()}
        return ppo_loss(logps, values, **stored, scored=scored, clip=self.s.clip)

    def weigh(self, batch) -> int:
        return int(batch.lengths().sum())

    def state(self) -> dict:
        scorer = self.policy.scorer
        critic = {k: weights_to_save(getattr(scorer, k)) for k in ("critic", "value")}
        return super().state() | critic | {"stored": self.stored}

    def load_state(self, state: dict) -> None:
        super().load_state(state)
        for name in ("critic", "value"):
            load_weights(getattr(self.policy.scorer, name), state[name])
        self.stored = {k: v.to(self.policy.device) for k, v in state["stored"].items()}
