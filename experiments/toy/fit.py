"""
Training on the plaid: all methods, seeds and temperatures at once, on an ensemble axis.

A method is a loss over K completions, who draws them, and what labels them:

    exo-rw, dpo-rw            K draws from sft, with their rewards: p = softmax(r / beta)
    exo-pref, dpo-pref        pairs from sft, with a label from Bradley-Terry, P = sigmoid(r1 - r2)
    exo-online, dpo-online    K draws from the policy itself, with rewards, weighted for pi*
    exo-online-pref, ...      pairs from the policy itself, labelled as above
    rloo                      REINFORCE on the policy's draws: each against the mean of the others
    reverse-kl-descent, ...   the exact KL's gradient, from sft, in as many steps: K without end
    reverse-kl, forward-kl    the lowest exact KL that any start has led to (exact_fits)

Temperatures are matched: all but exo-pref share one unrestricted optimum, pi*. With rewards
beta_pi = 1 and beta_r = beta; with pairs beta_pi = beta, so that dpo-pref's at label_smoothing 0 is
pi*. For exo-pref label_smoothing sets the temperature: sigmoid(-2) = 0.119 matches Bradley-Terry
near P = 1/2; exo-pref-1e-3 has the paper's. A step shows all methods the same draws from sft (own
draws: the same uniforms), whatever K. Equal draws, not equal labels: a pair has one for two draws.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import exo
from experiments.toy.worlds import Config, Space, draw, generators, optimum, plaid

Weights = dict[str, Tensor]  # of M models, stacked along axis 0


def rloo_loss(policy_logps: Tensor, ref_logps: Tensor, log_target: Tensor) -> Tensor:
    """REINFORCE, leave-one-out (Kool et al. 2019; Ahmadian et al. 2024, arXiv:2402.14740).

    All (B, K). With log_target = on_policy_target, whose differences within a group are those of
    r / beta - log(pi / sft), it ascends J / beta. exo_loss has (K - 1) / K of its gradient."""
    K = log_target.size(-1)
    others = (log_target.sum(dim=-1, keepdim=True) - log_target) / (K - 1)
    return -((log_target - others) * policy_logps).mean()


class Method(NamedTuple):
    loss: Callable  # of (policy_logps, ref_logps, log_target), all (B, K)
    on_policy: bool = False  # the policy's own draws, not sft's
    label_smoothing: float | None = None  # of pairs; None: rewards


MATCHED_EPS = 1 / (1 + math.exp(2))  # see the top of the file
METHODS = {
    "exo-rw": Method(exo.exo_loss),
    "dpo-rw": Method(exo.dpo_loss),
    "exo-pref": Method(exo.exo_loss, label_smoothing=MATCHED_EPS),
    "exo-pref-1e-3": Method(exo.exo_loss, label_smoothing=1e-3),
    "dpo-pref": Method(exo.dpo_loss, label_smoothing=0.0),
    "exo-online": Method(exo.exo_loss, on_policy=True),
    "dpo-online": Method(exo.dpo_loss, on_policy=True),
    "exo-online-pref": Method(exo.exo_loss, on_policy=True, label_smoothing=MATCHED_EPS),
    "dpo-online-pref": Method(exo.dpo_loss, on_policy=True, label_smoothing=0.0),
    "rloo": Method(rloo_loss, on_policy=True),
}
EXACT, DESCENTS = ("reverse-kl", "forward-kl"), ("reverse-kl-descent", "forward-kl-descent")


@dataclass(frozen=True)
class Arm:
    """One policy to train. K None: the exact KL."""

    method: str
    K: int | None
    beta: float
    seed: int


class Setup(NamedTuple):
    """S worlds, and the sft of each: where training starts."""

    config: Config
    seeds: list[int]
    space: Space
    sft: Weights
    log_sft: Tensor  # (S, N) float64
    reward: Tensor  # (S, N) float64
    centres: Tensor  # (S, 6, 2) of the bumps

    def of(self, arms: list[Arm]) -> tuple[list[int], Tensor, Tensor, Tensor, Tensor]:
        """Which world, beta (M, 1), reward, log sft and log pi* (M, N) of each arm, in float64."""
        world = [self.seeds.index(arm.seed) for arm in arms]
        beta = torch.tensor([[arm.beta] for arm in arms], dtype=torch.float64)
        reward, log_sft = self.reward[world], self.log_sft[world]
        return world, beta, reward, log_sft, optimum(log_sft, reward, beta)


def take(weights: Weights, index) -> Weights:
    return {name: w[index] for name, w in weights.items()}


# --------------------------------------------------------------------------------------------------
# One loop for all


def fit(space: Space, weights: Weights, loss_of, config: Config, label: str, watch=None) -> Weights:
    """Train M models together. loss_of: log-probs (M, N) -> the *sum* of the models' losses, which
    leaves each model its own gradient; Adam works number by number, so one optimizer serves all.
    watch(step, weights, logps) sees each step before it is taken. An empty label shows no bar."""
    weights = {name: w.clone().requires_grad_() for name, w in weights.items()}
    models = len(next(iter(weights.values())))
    optimizer = torch.optim.Adam(weights.values(), betas=(0.9, 0.99), fused=True)
    bar = tqdm(range(config.steps), desc=label, mininterval=1, leave=False, disable=not label)
    for step in bar:
        done = max(0, step - config.warmup) / max(1, config.steps - config.warmup)
        rate = min(1, (step + 1) / max(1, config.warmup)) * (1 + math.cos(math.pi * done)) / 2
        optimizer.param_groups[0]["lr"] = config.learning_rate * rate
        logps = space.logps(weights)
        if watch:
            watch(step, weights, logps.detach())
        loss = loss_of(logps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if label and step % 10 == 0:
            bar.set_postfix_str(f"mean loss {loss.item() / models:.3f}", refresh=False)
    return {name: w.detach() for name, w in weights.items()}


def prepare(config: Config, seeds: list[int]) -> Setup:
    """Worlds, and sft by the exact cross-entropy fit to their data, in half the steps."""
    space, (reward, log_data, centres) = Space(config), plaid(seeds, config)
    half = replace(config, steps=(config.steps + 1) // 2)
    fresh, log_data = space.weights(generators(seeds, "weights")), log_data.float()
    sft = fit(space, fresh, lambda logps: exo.kl(log_data, logps).sum(), half, "")
    return Setup(config, seeds, space, sft, space.exact(sft), reward, centres)


def ranked(y: Tensor, reward: Tensor, coin: Tensor) -> Tensor:
    """Neighbours in y (M, draws) as (chosen, rejected), labelled by Bradley-Terry with reward
    (M, N) and uniforms (M, draws / 2)."""
    first, second = reward.gather(1, y).view(len(y), -1, 2).unbind(-1)
    wins = coin < torch.sigmoid(first - second)
    pairs = y.view(len(y), -1, 2)
    return torch.where(wins[..., None], pairs, pairs.flip(-1)).flatten(1)


def exact_kl(method: str, logps: Tensor, log_star: Tensor) -> Tensor:
    return exo.kl(logps, log_star) if "reverse" in method else exo.kl(log_star, logps)


def sampled_loss(method: Method, K: int, logps, log_sft, reward, beta, y, uniform, coin) -> Tensor:
    """Summed loss of the m models of one method and K. logps, log_sft, reward (m, N), beta (m, 1);
    y, uniform (m, draws): completions from sft, numbers for own draws; coin (m, draws / 2)."""
    if method.on_policy:
        y = draw(logps.detach(), uniform)
    if method.label_smoothing is not None:
        y = ranked(y, reward, coin)
    policy, ref, r = (x.gather(1, y).view(-1, K) for x in (logps, log_sft, reward))  # (B, K)
    beta = beta.repeat_interleave(y.size(1) // K, dim=0)  # (B, 1)
    if method.label_smoothing is not None:  # beta_pi = beta
        target = exo.preference_target(method.label_smoothing)
        mean = method.loss(beta * policy, beta * ref, target)
    else:  # who drew: for sft's own draws this is the plain reward_target
        rho = policy.detach() if method.on_policy else ref
        mean = method.loss(policy, rho, exo.on_policy_target(r / beta, ref, rho))
    return mean * len(logps)  # the models are folded into the mean over groups: back to their sum


def train(setup, arms, label, start=None, config=None, watch=None) -> Weights:
    """Every arm's policy, from its world's sft or from `start` (stacked like arms) -> weights. Arms
    of one method and K must be neighbours. config: the setup's, with another schedule."""
    config = config or setup.config
    world, *exact = setup.of(arms)
    beta, reward, log_sft, log_star = (x.float() for x in exact)
    random, n = generators(setup.seeds, "draws"), config.draws
    groups = [
        (*key, len([*own])) for key, own in itertools.groupby(arms, lambda a: (a.method, a.K))
    ]
    sizes = [size for _, _, size in groups]
    sampled = any(arm.K for arm in arms)

    def loss_of(logps: Tensor) -> Tensor:
        if sampled:
            numbers = torch.stack([torch.rand(n + n // 2, generator=g) for g in random])
            uniform, coin = numbers.split([n, n // 2], dim=1)
            y = draw(setup.log_sft, uniform)
        total, end = 0, 0
        for (method, K, size), own in zip(groups, logps.split(sizes), strict=True):
            end += size
            at = slice(end - size, end)
            if K is None:
                total += exact_kl(method, own, log_star[at]).sum()
            else:
                theirs = (log_sft[at], reward[at], beta[at])
                seen = (x[world[at]] for x in (y, uniform, coin))
                total += sampled_loss(METHODS[method], K, own, *theirs, *seen)
        return total

    start = take(setup.sft, world) if start is None else start
    return fit(setup.space, start, loss_of, config, label if 0 in setup.seeds else "", watch)


# --------------------------------------------------------------------------------------------------
# The exact fits: from everywhere, until nothing moves

FINALISTS, MOVED, MOST_ROUNDS = 3, 0.02, 16


def fittest(arms: list[Arm], objective: list[float], count: int) -> list[int]:
    """The places of the `count` lowest objectives of each method and seed, one after the other."""
    kept: dict[tuple, list[int]] = {(arm.method, arm.seed): [] for arm in arms}
    for i in sorted(range(len(arms)), key=objective.__getitem__):
        own = kept[arms[i].method, arms[i].seed]
        if len(own) < count:
            own.append(i)
    return list(itertools.chain(*kept.values()))


def exact_fits(setup: Setup, starts: Weights, arms: list[Arm]) -> tuple[list[Arm], Tensor]:
    """The lowest reverse and forward KL that any start leads to: (arms, their log pi (2 S, N)).

    starts: where `arms` ended. All descend a third of the steps, again and again; each round drops
    the worse half of a seed's, down to three. Then the rate halves from round to round, until one
    at a lower rate gains no seed 0.02 nats (at most 16 rounds). The lowest ever seen counts: no
    proof that nothing lower exists."""
    count, rate = len(arms) // len(setup.seeds), setup.config.learning_rate
    arms = [replace(arm, method=name, K=None) for name in EXACT for arm in arms]
    weights, before = {name: torch.cat([w, w]) for name, w in starts.items()}, torch.inf
    for number in range(MOST_ROUNDS):
        steps = max(1, setup.config.steps // 3)
        schedule = replace(setup.config, steps=steps, learning_rate=rate)
        ended = train(setup, arms, f"exact fits, round {number + 1}", weights, schedule)
        arms, weights = [*arms, *arms], {n: torch.cat([w, ended[n]]) for n, w in weights.items()}
        each = zip(arms, setup.space.exact(weights), setup.of(arms)[-1], strict=True)
        objective = [exact_kl(arm.method, *x).item() for arm, *x in each]
        now = torch.tensor([objective[i] for i in fittest(arms, objective, 1)])
        if rate < setup.config.learning_rate and (before - now).max() < MOVED:
            break
        rate = rate / 2 if count <= FINALISTS else rate
        count, before = max(FINALISTS, count // 2), now
        index = fittest(arms, objective, count)
        arms, weights = [arms[i] for i in index], take(weights, index)
    index = fittest(arms, objective, 1)
    return [arms[i] for i in index], setup.space.exact(take(weights, index))
