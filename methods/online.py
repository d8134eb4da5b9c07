"""
Learning from completions of one's own: draw them from the policy as it is, rate them, and train on
them for a round.

    round:  K completions of each of round_iters batches of prompts  ->  rewards  ->  steps of
            batch_size prompts, in `passes` passes over the round

Online EXO and DPO are here; PPO (ppo.py) has the same rounds. Everything drawn depends on (seed,
round), so a resumed run draws what it would have drawn. `drawn_figures` measures any policy by
fresh draws: KL(pi || sft) and, with a reward, its mean.
"""

import math

import numpy as np
import torch
from torch import Tensor

import exo
from data import Builder, Epochs, Groups, Report, decode, evenly_spaced
from infra.parallel import autocast, gather, rank, score, whole_weights, world
from methods.reward import load_reward
from model import GPT

# ------------------------------------------------------------------------------
# Drawing and rating


def draw(policy, s, prompts: list[list[int]], n: int, generator: torch.Generator) -> Groups:
    """n completions of each prompt from the policy as it is, equal ones kept. Processes share the
    prompts; a draw depends on the generator and on its place among all, not on the prompts that it
    is computed with."""
    block, eot = policy.gpt.config.block_size, policy.encoding.eot_token
    new = min(s.max_new_tokens, block // 2)
    prompts = [p[-(block - new) :] for p in prompts]
    uniform = torch.rand(len(prompts), n, new, generator=generator)
    size = 4 * s.at_once  # sampling keeps no activations
    drawn, gpt, mine = {}, unsharded(policy, s), range(rank(), len(prompts), world())
    for start in range(0, len(mine), size):
        chunk = mine[start : start + size]
        with autocast(s.dtype, policy.device):
            ys = gpt.generate(
                [prompts[i] for i in chunk],
                max_new_tokens=new,
                n=n,
                temperature=policy.temperature,
                eot=eot,
                uniform=uniform[list(chunk)].flatten(0, 1),
            )
        drawn |= {i: ys[k * n : (k + 1) * n] for k, i in enumerate(chunk)}
    drawn = dict(item for part in gather(drawn) for item in part.items())
    builder = Builder(block, eot, Report())
    for i, prompt in enumerate(prompts):
        ended = [y[-1] == eot for y in drawn[i]]
        ys = [y[: len(y) - e] for y, e in zip(drawn[i], ended, strict=True)]
        builder.put(prompt, ys, ended)
    return builder.groups()


def unsharded(policy, s) -> GPT:
    """The model in one piece and without wrappers, to draw from."""
    if not s.fsdp:
        return policy.gpt
    gpt = GPT(policy.gpt.config)
    gpt.load_state_dict(whole_weights(policy.gpt))
    return gpt.to(policy.device).eval()


def rate(policy, groups: Groups, reward) -> None:
    """Fill groups.rewards. A prompt is rated as the policy read it, cut to fit if it was."""
    prompts, completions, segments = [], [], np.flatnonzero(groups.is_completion())
    for g in range(len(groups)):
        ids = groups.prompt(g)
        text = "" if ids == [groups.eot] else decode(policy.encoding, ids)
        ys = groups.completions(g)
        prompts += [text] * len(ys)
        completions += [decode(policy.encoding, y) for y in ys]
    ended = groups.ended[segments].tolist()
    groups.rewards[segments] = reward(prompts, completions, ended).numpy()


def drawn_figures(policy, s, ref, prompts: Groups, reward, step: int) -> dict:
    """KL(pi || sft), with a reward its mean, and their standard errors, from one completion of each
    of kl_samples prompts."""
    chosen = [prompts.prompt(g) for g in evenly_spaced(len(prompts), s.kl_samples)]
    generator = torch.Generator().manual_seed((s.seed * 1_000_003 + step) % 2**63)
    drawn = draw(policy, s, chosen, 1, generator)
    logps, ref_logps = (
        score(module, drawn, s.at_once, policy.device, s.dtype) for module in (policy.module, ref)
    )
    segment = drawn.first[:-1] + 1
    result = mean_and_error("kl", exo.kl_estimates(logps, ref_logps)["k1"][segment])
    if reward:
        rate(policy, drawn, reward)
        result |= mean_and_error("reward", torch.from_numpy(drawn.rewards)[segment])
    return result | {"sampled_length": float(drawn.lengths()[segment].mean())}


def mean_and_error(name: str, x: Tensor) -> dict[str, float]:
    """The mean of x (N,) and its standard error."""
    spread = x.std().item() / math.sqrt(len(x)) if len(x) > 1 else 0.0
    return {name: x.mean().item(), f"{name}_stderr": spread}


# ------------------------------------------------------------------------------
# Rounds


class Rounds:
    """A stage that learns in rounds: which prompts a round draws for, and which of its groups a
    step reads. `groups` are those of the round that is going on. OnlineStage and PPOStage add what
    they keep of a round (`store`, which gives the log-ratios of all draws) and their loss."""

    heads: dict = {}  # noqa: RUF012 - nothing beside the GPT is saved to sample from
    held_out = None  # the loss of a round's draws means nothing elsewhere; evaluate() measures J
    passes = 1  # over the groups of a round

    def begin(self, s, policy, prompts: Groups, held_out: Groups | None, beta: float) -> None:
        self.s, self.policy, self.prompts, self.beta = s, policy, prompts, beta
        self.eval_prompts = held_out or prompts
        self.reward, self.ref = load_reward(s.reward, policy.device, s.encoding), policy.reference()
        self.epochs = Epochs(prompts, s.batch_size, s.seed)
        self.steps = s.max_iters or math.ceil(s.epochs * self.epochs.n_batches) * self.passes
        self.round, self.groups, self.figures = None, prompts, {}

    def ids(self, step: int) -> np.ndarray:
        """The groups of the round that this step reads, drawn and rated if it begins the round."""
        round_, within = divmod(step, self.s.round_iters * self.passes)
        first = round_ * self.s.round_iters  # batch of prompts
        n = min(self.s.round_iters, math.ceil(self.steps / self.passes) - first)
        if self.round != (round_, n):  # the last one of a run that is made longer is drawn anew
            rows = np.concatenate([self.epochs.batch(i) for i in range(first, first + n)])
            seed = np.random.SeedSequence([self.s.seed, round_]).generate_state(1)[0]
            generator = torch.Generator().manual_seed(int(seed))
            prompts = [self.prompts.prompt(g) for g in rows]
            groups = draw(self.policy, self.s, prompts, self.s.K, generator)
            rate(self.policy, groups, self.reward)  # may end the run: nothing has changed so far
            self.groups, self.round = groups, (round_, n)
            kl = self.store().mean().item()
            rewards = groups.rewards[groups.is_completion()]
            self.figures = {"reward": float(rewards.mean()), "kl": kl}
        rng = np.random.default_rng([self.s.seed, round_, within // n])
        return np.array_split(rng.permutation(len(self.groups)), n)[within % n]

    def score(self, module) -> Tensor:
        """log pi of the round's draws, (G, K)."""
        s, device = self.s, self.policy.device
        logps = score(module, self.groups, s.at_once, device, s.dtype)
        return logps[self.groups.is_completion()].view(-1, s.K)

    def evaluate(self, step: int) -> dict:
        """Minus J = reward - beta KL, as the loss."""
        if not self.s.kl_samples:
            return {}
        result = drawn_figures(self.policy, self.s, self.ref, self.eval_prompts, self.reward, step)
        return {"loss": self.beta * result["kl"] - result["reward"], **result}

    def state(self) -> dict:
        arrays = {k: v for k, v in vars(self.groups).items() if isinstance(v, np.ndarray)}
        groups = {k: torch.from_numpy(v) for k, v in arrays.items()} if self.round else {}
        return {"round": self.round, "groups": groups, "figures": self.figures}

    def load_state(self, state: dict) -> None:
        self.round = state["round"]
        self.figures = {k: float(x) for k, x in state["figures"].items()}
        if self.round:
            arrays = {k: v.numpy() for k, v in state["groups"].items()}
            self.groups = Groups(**arrays, eot=self.policy.encoding.eot_token)


# ------------------------------------------------------------------------------
# EXO and DPO, online


class OnlineStage(Rounds):
    """A preference loss on completions drawn from a snapshot rho of the policy; sft is still
    --init.

    EXO weighs them by rho (exo.on_policy_ref, exo.on_policy_target). DPO is its loss as it is, on
    other completions: q = softmax(beta_pi (log pi - log sft)), p = softmax(r / beta_r).
    """

    def __init__(self, s, policy, prompts: Groups, held_out: Groups | None = None):
        self.begin(s, policy.scoring(s), prompts, held_out, beta=s.beta_r * s.beta_pi)

    def store(self) -> Tensor:
        """Reference log-probs and targets of the round's draws, beside them."""
        s, groups, real = self.s, self.groups, self.groups.is_completion()
        ref, rho = self.score(self.ref), self.score(self.policy.module)
        log_ratio, rewards = rho - ref, torch.from_numpy(groups.rewards[real]).view(-1, s.K)
        target = exo.reward_target(rewards, s.beta_r)
        if s.needs.on_policy:
            target = exo.on_policy_target(rewards, ref, rho, s.beta_r)
            ref = exo.on_policy_ref(ref, rho, s.beta_pi)
        groups.ref_logps, groups.log_target = np.zeros(len(real)), np.zeros(len(real))
        groups.ref_logps[real], groups.log_target[real] = ref.flatten(), target.flatten()
        return log_ratio

    def loss(self, batch) -> tuple[Tensor, dict]:
        s, logps = self.s, self.policy.module(batch).sum(-1)  # (B, K)
        more = {"lengths": batch.lengths()} if s.needs.lengths else {}
        targets = batch.ref_logps, batch.log_target
        return exo.LOSSES[s.stage](logps, *targets, s.beta_pi, batch.mask, **more), {}

    def weigh(self, batch) -> int:
        return len(batch.mask)
