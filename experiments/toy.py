"""
Two worlds small enough to list every completion, so that "EXO seeks modes, DPO covers the mean" is
a number.

    python -m experiments.toy            both worlds in a minute: table, results.json, figures
    python -m experiments.toy --sweep    and curves: over K, the frontier over beta, over n_embd

A world is a reward over all V^T completions of one prompt, token 0. The optimum
pi* = sft exp(r / beta) / Z is known, and so are KL(pi || pi*), KL(pi* || pi), J and E[r] of every
policy: sums in float64, not estimates. The strings are enumerated by the prefix mechanism with
branching factor V (585 positions for 8^4). All fits, methods x seeds, train at once on an ensemble
axis, by vmap over stacked weights.

*The numbers*: 8 tokens, length 4, 12 random codewords; sft fitted to a noisy channel (each token
corrupted with probability 0.4), the reward minus the Hamming distance to the nearest codeword.

*The picture*: 2 tokens of 32, so a policy is a 32 x 32 image; sft fitted to six wide Gaussians, the
reward likes six narrow ones. n_embd is 3, the smallest that shows the point honestly. Over two
features the final LayerNorm emits only two points, so the second token knows one bit of the first,
and as head and embedding are one and the same at all positions, the first token's marginal must
*be* one of the two conditionals: sft is then often a symmetric product, and all methods stay caught
near it (EXO's one spot may lie where pi* has nothing). Over three features LayerNorm emits an
ellipse: a one-parameter family of conditionals, too few for pi*, enough to try. With 4 everyone all
but reaches pi*, and there is nothing to see.

What the words mean, and what is simplified:
- `reverse-kl` and `forward-kl` descend the *exact* KL, with the optimizer and as many steps as all
  others, from sft's weights and from a copy with noise; the better counts, by its own objective.
  They are no global optima: nothing has converged after 500 steps (after 2,000 the reverse KL is
  about 0.13 nats lower). The picture's exact fits start again from where all others ended.
- Temperatures are matched: all methods share one unrestricted optimum. exo-rw, dpo-rw, exo-online:
  beta_pi = 1, beta_r = beta. Pairs carry labels drawn from Bradley-Terry with the true reward,
  P = sigmoid(r1 - r2), where dpo-pref's optimum at label_smoothing 0 is sft exp(r / beta_pi), so
  beta_pi = beta. For exo-pref label_smoothing sets the temperature; sigmoid(-2) = 0.119 matches
  Bradley-Terry near P = 1/2, though in general no policy attains its target.
- A step shows every method the same draws from sft (exo-online: its own, by the same uniforms):
  4,096 / K groups, for the pref methods 2,048 pairs. Equal draws, not equal labels.
"""

import argparse
import itertools
import json
import math
import platform
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from exo import (
    dpo_loss,
    entropy,
    exo_loss,
    kl,
    on_policy_ref,
    on_policy_target,
    preference_target,
    reward_target,
)
from model import GPT, GPTConfig, Tree

CODEWORDS, CORRUPTION = 12, 0.4  # of the numbers world
BUMPS = 6  # of the picture world
LABEL_SMOOTHING = {"exo-pref": 1 / (1 + math.exp(2)), "dpo-pref": 0.0}  # see the top of the file


@dataclass(frozen=True)
class Config:
    vocab_size: int = 8  # V
    length: int = 4  # T; V^T completions are enumerated
    n_embd: int = 4  # of sft and policies: one layer, one head
    beta: float = 0.4  # of J = E[r] - beta KL(pi || sft)
    steps: int = 500  # of Adam with betas (0.9, 0.99)
    learning_rate: float = 2e-2  # falls to 0 along a cosine
    warmup: int = 20
    draws: int = 4096  # completions a step, whatever K
    starts: int = 2  # of the exact fits: sft's weights, then copies with noise
    noise: float = 0.1  # its standard deviation; 0.3 and fresh weights end far worse


NUMBERS = Config()
PICTURE = Config(
    vocab_size=32, length=2, n_embd=3, beta=0.5, steps=500, learning_rate=1e-2, draws=1024, starts=2
)


@dataclass(frozen=True)
class Arm:
    """One way to train a policy. K None: the exact KL. start: which of the starting weights."""

    method: str
    K: int | None = None
    beta: float = NUMBERS.beta
    start: int = 0


# --------------------------------------------------------------------------------------------------
# All completions of one prompt at once, for many models at once


class Space(nn.Module):
    """A tiny GPT and the tree of all V^T strings after token 0. Called: logits (L, V), inner nodes.

    Level t = 0..T-1: the V^t prefixes of length t, last token fastest; each sees its ancestors.
    """

    def __init__(self, config: Config):
        super().__init__()
        V, T = config.vocab_size, config.length
        self.gpt = GPT(GPTConfig(T, V, n_layer=1, n_head=1, n_embd=config.n_embd))
        self.sizes = [V**t for t in range(T)]
        root = torch.zeros(1, dtype=torch.long)
        self.idx = torch.cat([root, *(torch.arange(V).repeat(n) for n in self.sizes[:-1])])
        self.pos = torch.arange(T).repeat_interleave(torch.tensor(self.sizes))
        self.tree = Tree(n_head=1, shapes=[(n, 1) for n in self.sizes])

    def forward(self) -> Tensor:
        return self.gpt.head(self.gpt.hidden(self.idx, self.pos, self.tree))

    def weights(self, generators: list[torch.Generator]) -> dict[str, Tensor]:
        """Fresh weights of M models, stacked along axis 0: {name: (M, ...)}."""
        models = [GPT(self.gpt.config, generator) for generator in generators]
        stacked, _ = torch.func.stack_module_state(models)
        return {f"gpt.{name}": p.detach() for name, p in stacked.items()}

    def logps(self, weights: dict[str, Tensor]) -> Tensor:
        """log pi of every completion, (M, V^T), last token fastest."""
        logits = torch.vmap(lambda w: torch.func.functional_call(self, w, ()))(weights)  # (M, L, V)
        # with V = 8 numbers a row, a softmax along the last axis would be 8 times slower
        levels = F.log_softmax(logits.transpose(1, 2).contiguous(), dim=1).transpose(1, 2)
        logps = logits.new_zeros(len(logits), 1)
        for level in levels.split(self.sizes, dim=1):  # (M, V^t, V)
            logps = (logps[:, :, None] + level).flatten(1)
        return logps

    @torch.no_grad()
    def exact(self, weights: dict[str, Tensor]) -> Tensor:
        """logps in float64."""
        return self.logps({name: w.double() for name, w in weights.items()})


def draw(logps: Tensor, uniform: Tensor) -> Tensor:
    """Completions by inverse CDF: log-probs (S, N), uniforms (S, n) in [0, 1) -> indices (S, n)."""
    cdf = logps.exp().cumsum(dim=-1)
    y = torch.searchsorted(cdf, uniform.to(cdf) * cdf[:, -1:], right=True)
    return y.clamp(max=logps.size(-1) - 1)


# --------------------------------------------------------------------------------------------------
# The worlds. A seed fixes the world, the weights and the draws, each from a generator of its own


def generator(seed: int, purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(
        seed + 1_000_003 * ("world", "weights", "noise", "draws").index(purpose)
    )


class World(NamedTuple):
    """Over all N completions, float64; several worlds are stacked along a leading axis S."""

    reward: Tensor  # (N,)
    log_data: Tensor  # (N,) what sft is fitted to
    distance: Tensor  # (N,) tokens to the nearest codeword; zeros in the picture
    centres: Tensor  # (12, T) codewords, or (6, 2) bump centres


def code_world(seed: int, config: Config) -> World:
    V, T = config.vocab_size, config.length
    shape = (V,) * T
    every = torch.stack(torch.unravel_index(torch.arange(V**T), shape), dim=-1)  # (N, T)
    codewords = every[torch.randperm(V**T, generator=generator(seed, "world"))[:CODEWORDS]]
    wrong = (every[:, None] != codewords).sum(dim=-1).double()  # (N, 12) corrupted tokens
    log_channel = (T - wrong) * math.log(1 - CORRUPTION) + wrong * math.log(CORRUPTION / (V - 1))
    log_data = log_channel.logsumexp(dim=-1) - math.log(len(codewords))
    distance = wrong.amin(dim=-1)
    return World(-distance, log_data, distance, codewords)


def picture_world(seed: int, config: Config) -> World:
    V = config.vocab_size
    uniform = torch.rand(BUMPS, 2, generator=generator(seed, "world"), dtype=torch.float64)
    centres = 3 + uniform * (V - 1 - 6)  # at least 3 from the border
    pixel = torch.cartesian_prod(torch.arange(V), torch.arange(V)).double()  # (N, 2) row, column
    square = (pixel[:, None] - centres).square().sum(dim=-1)
    log_data = (-square / (2 * 4.0**2)).logsumexp(dim=-1).log_softmax(dim=-1)
    reward = (-square / (2 * 1.5**2)).logsumexp(dim=-1).clamp(min=-6)
    return World(reward, log_data, torch.zeros(V * V), centres)


def optimum(log_sft: Tensor, reward: Tensor, beta: float) -> Tensor:
    """log pi* = log sft + r / beta - log Z over the last axis."""
    return (log_sft + reward / beta).log_softmax(dim=-1)


# --------------------------------------------------------------------------------------------------
# Fitting


def fit(space: Space, weights: dict, loss_of, config: Config, label: str) -> dict[str, Tensor]:
    """Train M models together. loss_of: log-probs (M, N) -> the *sum* of the models' losses, which
    leaves each model its own gradient; Adam works number by number, so one optimizer serves all."""
    weights = {name: w.clone().requires_grad_() for name, w in weights.items()}
    models = len(next(iter(weights.values())))
    optimizer = torch.optim.Adam(weights.values(), betas=(0.9, 0.99), fused=True)
    bar = tqdm(range(config.steps), desc=label, mininterval=1, leave=False)
    for step in bar:
        done = max(0, step - config.warmup) / max(1, config.steps - config.warmup)
        warm = min(1, (step + 1) / config.warmup)
        optimizer.param_groups[0]["lr"] = (
            config.learning_rate * warm * (1 + math.cos(math.pi * done)) / 2
        )
        loss = loss_of(space.logps(weights))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            bar.set_postfix_str(f"mean loss {loss.item() / models:.3f}", refresh=False)
    return {name: w.detach() for name, w in weights.items()}


def fit_sft(space: Space, world: World, seeds: list[int], config: Config) -> dict[str, Tensor]:
    """The exact cross-entropy fit to the data, from one set of weights per seed."""
    log_data = world.log_data.float()
    weights = space.weights([generator(seed, "weights") for seed in seeds])
    return fit(space, weights, lambda logps: kl(log_data, logps).sum(), config, "sft")


def noisy_starts(sft: dict, seeds: list[int], config: Config) -> list[dict[str, Tensor]]:
    """sft's weights, then config.starts - 1 copies with Gaussian noise."""
    generators = [generator(seed, "noise") for seed in seeds]

    def noise(w: Tensor) -> Tensor:
        rows = [torch.randn(w.shape[1:], generator=g) for g in generators]
        return config.noise * torch.stack(rows)

    return [
        {name: w + noise(w) if start else w for name, w in sft.items()}
        for start in range(config.starts)
    ]


class Draws(NamedTuple):
    """What one step shows to all methods, S seeds at once."""

    y: Tensor  # (S, draws) completions from sft
    ranked: Tensor  # (S, draws) the same, neighbours ordered (chosen, rejected) by a drawn label
    uniform: Tensor  # (S, draws) for those who draw for themselves


def draw_step(world: World, log_sft: Tensor, generators: list, draws: int) -> Draws:
    numbers = torch.stack([torch.rand(draws + draws // 2, generator=g) for g in generators])
    uniform, coin = numbers.split([draws, draws // 2], dim=1)
    y = draw(log_sft, uniform)
    pairs = y.view(len(y), -1, 2)
    r = world.reward.gather(1, y).view_as(pairs)
    first_wins = coin < torch.sigmoid(r[..., 0] - r[..., 1])  # Bradley-Terry
    ranked = torch.where(first_wins[..., None], pairs, pairs.flip(-1))
    return Draws(y, ranked.flatten(1), uniform)


def arm_loss(
    arm: Arm, logps: Tensor, log_sft: Tensor, reward: Tensor, draws: Draws | None
) -> Tensor:
    """The summed loss of one arm on S seeds; logps, log_sft, reward (S, N) in one dtype."""
    if arm.K is None:
        log_star = optimum(log_sft, reward, arm.beta)
        reverse = arm.method == "reverse-kl"
        return (kl(logps, log_star) if reverse else kl(log_star, logps)).sum()

    if arm.method == "exo-online":
        y = draw(logps.detach(), draws.uniform)
    else:
        y = draws.ranked if arm.method.endswith("pref") else draws.y
    policy, ref, r = (x.gather(1, y).view(-1, arm.K) for x in (logps, log_sft, reward))  # (B, K)
    loss = exo_loss if arm.method.startswith("exo") else dpo_loss
    if arm.method == "exo-online":
        rho = policy.detach()
        mean = loss(policy, on_policy_ref(ref, rho), on_policy_target(r, ref, rho, arm.beta))
    elif arm.method.endswith("pref"):
        target = preference_target(LABEL_SMOOTHING[arm.method])
        mean = loss(policy, ref, target, beta_pi=arm.beta)
    else:
        mean = loss(policy, ref, reward_target(r, arm.beta))
    return mean * len(logps)  # the seeds are folded into the mean over groups: back to their sum


def fit_arms(
    space: Space,
    world: World,
    log_sft: Tensor,
    arms: list,
    starts: list,
    seeds: list,
    config,
    label,
) -> dict[str, Tensor]:
    """All arms on all seeds at once -> their weights, (A * S, ...), seeds fastest."""
    A, S = len(arms), len(seeds)
    weights = {name: torch.cat([starts[arm.start][name] for arm in arms]) for name in starts[0]}
    generators = [generator(seed, "draws") for seed in seeds]
    ref, reward = log_sft.float(), world.reward.float()
    sampled = any(arm.K for arm in arms)

    def loss_of(logps: Tensor) -> Tensor:
        draws = draw_step(world, log_sft, generators, config.draws) if sampled else None
        per_arm = zip(arms, logps.view(A, S, -1), strict=True)
        return sum(arm_loss(arm, x, ref, reward, draws) for arm, x in per_arm)

    return fit(space, weights, loss_of, config, label)


def exact_arms(starts: int, beta: float) -> list[Arm]:
    return [
        Arm(method, None, beta, start)
        for method in ("reverse-kl", "forward-kl")
        for start in range(starts)
    ]


def best_starts(arms: list[Arm], log_pi: Tensor, log_star: dict[float, Tensor]) -> list[tuple]:
    """(A, S, N) log-probs -> one (arm, (S, N)) per method, K and beta: of several starts the one
    whose own objective ended lowest, seed by seed."""
    groups: dict[Arm, list[Tensor]] = {}
    for arm, logps in zip(arms, log_pi, strict=True):
        groups.setdefault(replace(arm, start=0), []).append(logps)
    best = []
    for arm, candidates in groups.items():
        stack, star = torch.stack(candidates), log_star[arm.beta]
        objective = kl(star, stack) if arm.method == "forward-kl" else kl(stack, star)
        seeds = torch.arange(stack.size(1))
        best.append((arm, stack[objective.argmin(dim=0), seeds]))
    return best


# --------------------------------------------------------------------------------------------------
# World 2: the numbers


def metrics(log_pi: Tensor, log_sft: Tensor, log_star: Tensor, world: World, beta: float) -> dict:
    """The columns for policies (S, N): {name: (S,)}, and `mass` (S, 3) at distance 0, 1, 2+."""
    pi = log_pi.exp()
    reward, kl_sft = (pi * world.reward).sum(dim=-1), kl(log_pi, log_sft)
    distance = world.distance.clamp(max=2)
    return {
        "reverse_kl": kl(log_pi, log_star),
        "forward_kl": kl(log_star, log_pi),
        "J": reward - beta * kl_sft,
        "reward": reward,
        "kl_sft": kl_sft,
        "entropy": entropy(log_pi),
        "mass": torch.stack([(pi * (distance == d)).sum(dim=-1) for d in range(3)], dim=-1),
    }


def numbers_arms(config: Config) -> list[Arm]:
    b = config.beta
    sampled = [Arm(m, K, b) for m in ("exo-rw", "dpo-rw") for K in (2, 8, 64)]
    pairs = [Arm(m, 2, b) for m in ("exo-pref", "dpo-pref", "exo-online")]
    return exact_arms(config.starts, b) + sampled + pairs


def fit_numbers(config: Config, arms: list[Arm], seeds: list[int]) -> tuple[list, list]:
    """-> worlds and rows as in results.json; rows hold `beta` too, and begin with sft and pi*."""
    space = Space(config)
    world = World(*map(torch.stack, zip(*(code_world(s, config) for s in seeds), strict=True)))
    sft = fit_sft(space, world, seeds, config)
    log_sft = space.exact(sft)
    starts = noisy_starts(sft, seeds, config)
    weights = fit_arms(space, world, log_sft, arms, starts, seeds, config, f"seeds {seeds}")
    log_pi = space.exact(weights).view(len(arms), len(seeds), -1)

    stars = {b: optimum(log_sft, world.reward, b) for b in {config.beta, *(a.beta for a in arms)}}
    fixed = [(Arm("sft", None, config.beta), log_sft)]
    fixed += [(Arm("pi-star", None, b), star) for b, star in sorted(stars.items())]
    rows = []
    for arm, logps in fixed + best_starts(arms, log_pi, stars):
        columns = metrics(logps, log_sft, stars[arm.beta], world, arm.beta)
        for i, seed in enumerate(seeds):
            values = {name: x[i].tolist() for name, x in columns.items()}
            rows.append(
                {"method": arm.method, "K": arm.K, "beta": arm.beta, "seed": seed, **values}
            )
    worlds = [
        {"seed": s, "codewords": c.tolist(), "log_sft": x.tolist()}
        for s, c, x in zip(seeds, world.centres, log_sft, strict=True)
    ]
    return worlds, rows


def in_parallel(jobs: list) -> list:
    """Run functions side by side, one torch thread each: torch lets go of the interpreter while it
    computes, and tensors this small gain more from two ensembles than from two threads per
    operation."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # the backend that vmap can batch; a global setting, so it is made outside of the threads
        with sdpa_kernel(SDPBackend.MATH), ThreadPoolExecutor(len(jobs)) as pool:
            return [future.result() for future in [pool.submit(job) for job in jobs]]
    finally:
        torch.set_num_threads(threads)


def halves(config: Config, arms: list[Arm], seeds: int) -> list:
    """The jobs that fit all seeds, in two halves (one, for one seed)."""
    parts = [list(range(seeds))[i::2] for i in range(min(2, seeds))]
    return [lambda part=part: fit_numbers(config, arms, part) for part in parts]


def merge(parts: list[tuple[list, list]]) -> tuple[list, list]:
    worlds = sorted((w for part, _ in parts for w in part), key=lambda w: w["seed"])
    order: dict[tuple, int] = {}
    rows = [row for _, part in parts for row in part]
    for row in rows:
        order.setdefault((row["method"], row["K"], row["beta"]), len(order))
    rows.sort(key=lambda r: (order[r["method"], r["K"], r["beta"]], r["seed"]))
    return worlds, rows


# --------------------------------------------------------------------------------------------------
# World 1: the picture

PANELS = ["sft", "pi-star", "reverse-kl", "forward-kl", "exo-rw", "dpo-rw"]


def fit_picture(config: Config, seed: int = 0) -> dict:
    """-> {"seed", "centres", "beta", "panels": {method: {"K", both KLs, "logps": [V * V]}}}."""
    space, seeds, b = Space(config), [seed], config.beta
    world = World(*(x[None] for x in picture_world(seed, config)))
    sft = fit_sft(space, world, seeds, config)
    log_sft = space.exact(sft)
    starts = noisy_starts(sft, seeds, config)
    arms = [*exact_arms(config.starts, b), Arm("exo-rw", 8, b), Arm("dpo-rw", 8, b)]
    ends = fit_arms(space, world, log_sft, arms, starts, seeds, config, "picture")
    # what an exact fit finds depends on where it starts, so these start again from every end
    restarts = [{name: w[i : i + 1] for name, w in ends.items()} for i in range(len(arms))]
    exact = exact_arms(len(arms), b)
    again = fit_arms(space, world, log_sft, exact, restarts, seeds, config, "picture, again")
    log_pi = torch.cat([space.exact(ends), space.exact(again)])[:, None]

    star = optimum(log_sft, world.reward, b)
    policies = [(Arm("sft"), log_sft), (Arm("pi-star"), star)]
    policies += best_starts(arms + exact, log_pi, {b: star})
    panels = {
        arm.method: {
            "K": arm.K,
            "reverse_kl": kl(logps, star).item(),
            "forward_kl": kl(star, logps).item(),
            "logps": logps[0].tolist(),
        }
        for arm, logps in policies
    }
    return {"seed": seed, "centres": world.centres[0].tolist(), "beta": b, "panels": panels}


# --------------------------------------------------------------------------------------------------
# Telling: a table, JSON, figures

COLUMNS = {
    "reverse_kl": "KL(pi||pi*)",
    "forward_kl": "KL(pi*||pi)",
    "J": "J",
    "reward": "E[r]",
    "kl_sft": "KL(pi||sft)",
    "entropy": "entropy",
}


def mean_se(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error; 0, a bar without width, where one value leaves it unknown."""
    x = np.asarray(values, dtype=np.float64)
    return x.mean(), x.std(ddof=1) / math.sqrt(len(x)) if len(x) > 1 else 0.0


def spell(values: list[float], sign: str = "") -> str:
    mean, se = mean_se(values)
    return f"{mean:{sign}.3f}" + (f" ±{se:.3f}" if len(values) > 1 else "")


def column(rows: list[dict], method: str, K: int | None, name: str) -> list[float]:
    """One value per seed."""
    return [row[name] for row in rows if (row["method"], row["K"]) == (method, K)]


def by_method(rows: list[dict]) -> list[tuple[str, int | None]]:
    return list(dict.fromkeys((row["method"], row["K"]) for row in rows))


def table(rows: list[dict]) -> str:
    heads = [*COLUMNS.values(), "mass at 0", "at 1", "at >= 2"]
    lines = [f"{'method':<11}{'K':>4}" + "".join(f"{head:>15}" for head in heads)]
    for method, K in by_method(rows):
        columns = [column(rows, method, K, name) for name in COLUMNS]
        columns += zip(*column(rows, method, K, "mass"), strict=True)
        cells = (spell(values) for values in columns)
        lines.append(f"{method:<11}{K or '':>4}" + "".join(f"{cell:>15}" for cell in cells))
    return "\n".join(lines)


def comparisons(rows: list[dict]) -> str:
    """The paired differences the table cannot show: seeds differ more than methods do."""
    pairs = [(("dpo-rw", K), ("exo-rw", K), "reverse_kl") for K in (2, 8, 64)]
    pairs += [
        ((m, K), ("reverse-kl", None), "reverse_kl") for m, K in (("exo-rw", 64), ("exo-online", 2))
    ]
    pairs += [(("dpo-rw", 64), ("forward-kl", None), "forward_kl")]
    lines = ["Paired over seeds, at equal beta (part of a gap is distance moved: see --sweep)"]
    for a, b, name in pairs:
        difference = np.subtract(column(rows, *a, name), column(rows, *b, name))
        label = " minus ".join(f"{m} K={K}" if K else m for m, K in (a, b))
        lines.append(f"  {COLUMNS[name]:<12} {label:<31} {spell(difference, '+')}")
    return "\n".join(lines)


def write_json(path: Path, content: dict) -> None:
    """Whole or not at all: a run that is stopped leaves no half file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, allow_nan=False))
    temporary.replace(path)


INK, GREY = "#222222", "#8a8a8a"
COLORS = {"exo": "#d1495b", "dpo": "#2e6f9e", "reverse": "#e8a5ae", "forward": "#9cc3de"}


def color(method: str) -> str:
    return COLORS.get(method.split("-")[0], GREY)


def pyplot():
    """matplotlib.pyplot with our taste, or None and one line of advice."""
    try:
        import matplotlib
    except ImportError:
        print("No figures: `pip install matplotlib` and run again. The numbers are complete.")
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 11,
            "text.color": INK,
            "axes.labelcolor": INK,
            "axes.edgecolor": GREY,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "xtick.color": INK,
            "ytick.color": INK,
            "legend.frameon": False,
            "savefig.dpi": 160,
        }
    )
    return plt


def draw_picture(plt, picture: dict, path: Path) -> None:
    names = {
        "sft": "sft",
        "pi-star": "π*, the optimum",
        "reverse-kl": "exact reverse KL",
        "forward-kl": "exact forward KL",
        "exo-rw": "EXO",
        "dpo-rw": "DPO",
    }
    figure, axes = plt.subplots(1, 6, figsize=(15, 3.75))
    figure.subplots_adjust(left=0.008, right=0.992, top=0.87, bottom=0.24, wspace=0.05)
    top = math.exp(max(picture["panels"]["pi-star"]["logps"]) / 2)
    for axis, name in zip(axes, PANELS, strict=True):
        panel = picture["panels"][name]
        root = np.exp(np.array(panel["logps"]) / 2)  # square root of pi: faint mass shows
        side = math.isqrt(len(root))
        limit = root.max() if name == "sft" else top
        axis.imshow(root.reshape(side, side), cmap="magma", vmin=0, vmax=limit)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
        K = f", K = {panel['K']}" if panel["K"] else ""
        axis.set_title(names[name] + K, fontsize=15, pad=8, color=color(name) if K else INK)
        text = f"KL(π‖π*)  {panel['reverse_kl']:.2f}\nKL(π*‖π)  {panel['forward_kl']:.2f}"
        if name != "pi-star":
            axis.set_xlabel(text, fontsize=12.5, labelpad=7, linespacing=1.35)
    caption = (
        "Every completion of two tokens from 32 is a pixel (row: first token, column: second). "
        "Brightness: √π, on one scale but for sft. π* is out of this policy's reach."
    )
    figure.text(0.5, 0.035, caption, ha="center", fontsize=11, color="#666666")
    figure.savefig(path)
    plt.close(figure)


def finish(plt, figure, path: Path) -> None:
    for axis in figure.axes:
        axis.grid(alpha=0.25, axis="x" if axis.yaxis_inverted() else "both")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def draw_numbers(plt, rows: list[dict], path: Path) -> None:
    """Reverse and forward KL of every method, mean and standard error; small dots are seeds."""
    methods = [m for m in by_method(rows) if m[0] not in ("sft", "pi-star")]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True)
    for axis, name in zip(axes, ("reverse_kl", "forward_kl"), strict=True):
        for y, (method, K) in enumerate(methods):
            values = column(rows, method, K, name)
            mean, se = mean_se(values)
            axis.plot(values, [y] * len(values), ".", color=color(method), alpha=0.35, ms=5)
            axis.errorbar(mean, y, xerr=se, fmt="o", color=color(method), ms=7, capsize=3)
        axis.set_xlim(left=0)
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
    axes[0].set_yticks(
        range(len(methods)), [f"{m}, K = {K}" if K else f"exact {m}" for m, K in methods]
    )
    axes[0].invert_yaxis()
    axes[0].set_xlabel("reverse KL(π‖π*), nats")
    axes[1].set_xlabel("forward KL(π*‖π), nats")
    finish(plt, figure, path)


# --------------------------------------------------------------------------------------------------
# The sweep: curves behind the table. Each piece is saved as it comes


SWEEP_K = (2, 4, 8, 16, 32, 64, 128, 256)
SWEEP_BETA = (0.1, 0.15, 0.25, 0.32, 0.4, 0.5, 0.65, 1.0)
SWEEP_WIDTH = (4, 8, 16, 32)
MATCH_BETA = (0.4, 0.32, 0.25, 0.2, 0.15)  # where DPO looks for EXO's distance from sft
MATCH_K = 64  # at K = 8 no beta_r takes DPO as far as EXO goes
FRONTIER = [("exo-rw", 8), ("dpo-rw", 8), ("exo-rw", 64), ("dpo-rw", 64)]
FRONTIER += [("exo-pref", 2), ("dpo-pref", 2), ("exo-online", 2)]


def sweep_rows(config: Config, arms: list[Arm], seeds: int) -> list[dict]:
    return merge(in_parallel(halves(config, arms, seeds)))[1]


def sweep_group_size(config: Config, seeds: int) -> list[dict]:
    methods = ("exo-rw", "dpo-rw", "exo-online")
    sampled = [Arm(m, K, config.beta) for m in methods for K in SWEEP_K]
    return sweep_rows(config, exact_arms(config.starts, config.beta) + sampled, seeds)


def sweep_frontier(config: Config, seeds: int) -> list[dict]:
    rows = []
    for beta in SWEEP_BETA:
        arms = exact_arms(config.starts, beta) + [Arm(m, K, beta) for m, K in FRONTIER]
        rows += sweep_rows(config, arms, seeds)
    return rows


def sweep_width(config: Config, seeds: int) -> list[dict]:
    """EXO at config.beta, DPO at several, exact and sampled; sft and policy of each width."""
    rows = []
    for n_embd in SWEEP_WIDTH:
        arms = [Arm("reverse-kl", None, config.beta), Arm("exo-rw", MATCH_K, config.beta)]
        for method, K in (("forward-kl", None), ("dpo-rw", MATCH_K)):
            arms += [Arm(method, K, beta) for beta in MATCH_BETA]
        fitted = sweep_rows(replace(config, n_embd=n_embd), arms, seeds)
        rows += [{"n_embd": n_embd, **row} for row in fitted]
    return rows


def reward_at(rows: list[dict], kl_sft: float) -> float:
    """E[r] where one seed's frontier over beta crosses a distance from sft; NaN if it does not."""
    points = sorted((row["kl_sft"], row["reward"]) for row in rows)
    x, y = zip(*points, strict=True)
    return float(np.interp(kl_sft, x, y, left=math.nan, right=math.nan))


def matched(rows: list[dict], method: str, K: int | None, kl_sft: float) -> dict[int, float]:
    """{seed: E[r] at this distance}, only seeds whose frontier reaches it."""
    own = [row for row in rows if (row["method"], row["K"]) == (method, K)]
    seeds = sorted({row["seed"] for row in own})
    values = {s: reward_at([row for row in own if row["seed"] == s], kl_sft) for s in seeds}
    return {s: v for s, v in values.items() if not math.isnan(v)}


def rival(method: str) -> str:
    """Who has the KL the other way round, at the same K."""
    return method.replace("exo", "dpo").replace("reverse", "forward")


def matched_table(frontier: list[dict]) -> list[dict]:
    """E[r] at equal KL(pi || sft) per method, over the seeds whose frontier gets there; for EXO
    also its lead over DPO, paired over the seeds where both do."""
    out = []
    for kl_sft, (method, K) in itertools.product((0.5, 1.0, 1.5), by_method(frontier)):
        if not (own := matched(frontier, method, K, kl_sft)):
            continue
        mean, se = mean_se(list(own.values()))
        entry = {"kl_sft": kl_sft, "method": method, "K": K, "reward": mean, "se": se}
        entry["seeds"] = len(own)
        theirs = {} if rival(method) == method else matched(frontier, rival(method), K, kl_sft)
        if leads := [own[s] - theirs[s] for s in sorted(own.keys() & theirs.keys())]:
            entry["lead"], entry["lead_se"] = mean_se(leads)
        out.append(entry)
        lead = f", leads by {spell(leads, '+')}" if leads else ""
        where = f"  KL(pi||sft) = {kl_sft}   {method:<11}{K or '':>3}"
        print(f"{where}   E[r] {spell(list(own.values()))} ({len(own)} seeds){lead}")
    return out


def width_gaps(rows: list[dict]) -> list[dict]:
    """E[r] of EXO minus E[r] of DPO at EXO's own KL(pi || sft), per seed and width."""
    gaps = []
    for row in rows:
        if row["method"] in ("reverse-kl", "exo-rw"):
            same = [r for r in rows if (r["n_embd"], r["seed"]) == (row["n_embd"], row["seed"])]
            theirs = matched(same, rival(row["method"]), row["K"], row["kl_sft"])
            gap = row["reward"] - theirs[row["seed"]] if theirs else None
            keys = ("n_embd", "seed", "method", "kl_sft")
            gaps.append({**{key: row[key] for key in keys}, "gap": gap})
    return gaps


def loss_curves() -> dict:
    """Each loss of a pair and its gradient, against beta_pi * (log-ratio chosen - rejected)."""
    margin = torch.arange(-200, 201, dtype=torch.float64) / 20
    curves = {"margin": margin.tolist()}
    for name, loss, smoothing in (("EXO", exo_loss, 1e-3), ("DPO", dpo_loss, 0.0)):
        x = margin.clone().requires_grad_()
        pair = torch.stack([x, torch.zeros_like(x)], dim=-1)
        target = preference_target(smoothing)
        values = torch.stack([loss(p[None], torch.zeros_like(p)[None], target) for p in pair])
        (gradient,) = torch.autograd.grad(values.sum(), x)
        curves[name] = {"loss": values.tolist(), "gradient": gradient.tolist(), "eps": smoothing}
    return curves


def sweep_all(out: Path, seeds: int, config: Config) -> dict:
    pieces = {
        "losses": loss_curves,
        "group_size": lambda: sweep_group_size(config, seeds),
        "frontier": lambda: sweep_frontier(config, seeds),
        "width": lambda: sweep_width(config, min(seeds, 4)),
    }
    plt, done = pyplot(), {"config": asdict(config)}
    for name, piece in pieces.items():
        done[name] = piece()
        if name == "frontier":
            done["matched"] = matched_table(done[name])
        if name == "width":
            done["gaps"] = width_gaps(done[name])
        write_json(out / "sweep.json", done)
        if plt:
            DRAW[name](plt, done, out / f"{name}.png")
    return done


def draw_losses(plt, done: dict, path: Path) -> None:
    curves = done["losses"]
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8))
    for name in ("EXO", "DPO"):
        label = f"{name}, label smoothing {curves[name]['eps']:g}"
        for axis, what in zip(axes, ("loss", "gradient"), strict=True):
            axis.plot(
                curves["margin"], curves[name][what], color=color(name.lower()), label=label, lw=2
            )
            axis.set_xlabel("margin of chosen over rejected, nats")
            axis.set_ylabel(what)
    axes[0].legend()
    axes[1].annotate(
        "confidently wrong:\nEXO's gradient\nvanishes, DPO's\nstays near -1",
        (-9.7, -0.5),
        va="center",
        fontsize=10,
        color="#666666",
    )
    finish(plt, figure, path)


def draw_group_size(plt, done: dict, path: Path) -> None:
    rows = done["group_size"]
    figure, axis = plt.subplots(figsize=(7.5, 4.6))
    for method, style in (("exo-rw", "o-"), ("dpo-rw", "o-"), ("exo-online", "s--")):
        stats = [mean_se(column(rows, method, K, "reverse_kl")) for K in SWEEP_K]
        mean, se = zip(*stats, strict=True)
        axis.errorbar(
            SWEEP_K, mean, yerr=se, fmt=style, color=color(method), label=method, capsize=2
        )
    for method in ("reverse-kl", "forward-kl"):
        mean, _ = mean_se(column(rows, method, None, "reverse_kl"))
        axis.axhline(mean, color=color(method), ls=":", lw=2, label=f"exact {method}")
    axis.set_xscale("log", base=2)
    axis.set_xticks(SWEEP_K, [str(K) for K in SWEEP_K])
    axis.set_ylim(bottom=0)
    axis.set_xlabel("K, completions per group (4,096 draws a step)")
    axis.set_ylabel("reverse KL(π‖π*), nats")
    axis.legend(ncols=2, fontsize=10)
    finish(plt, figure, path)


def draw_frontier(plt, done: dict, path: Path) -> None:
    """Mean E[r] against mean KL over seeds, a point per beta."""
    rows = done["frontier"]
    figure, axis = plt.subplots(figsize=(8.5, 5.4))
    styles = {8: "o-", 64: "s-", 2: "^--", None: ":"}
    for method, K in by_method(rows):
        if method == "sft":
            continue
        own = [row for row in rows if (row["method"], row["K"]) == (method, K)]
        points = []
        for beta in SWEEP_BETA:
            at = [row for row in own if row["beta"] == beta]
            points.append([np.mean([row[x] for row in at]) for x in ("kl_sft", "reward")])
        x, y = zip(*points, strict=True)
        label = method if K is None else f"{method}, K = {K}"
        tone = INK if method == "pi-star" else color(method)
        line = ":" if method in ("reverse-kl", "forward-kl") else styles[K].replace(":", "-")
        fade = 0.6 if "pref" in method else 1.0
        axis.plot(x, y, line, color=tone, label=label, ms=5, lw=1.6, alpha=fade)
    axis.set_xlim(0, 2.6)
    axis.set_xlabel("KL(π‖sft), nats")
    axis.set_ylabel("E[r], minus the distance to the nearest codeword")
    axis.legend(fontsize=9.5, ncols=2)
    finish(plt, figure, path)


def draw_width(plt, done: dict, path: Path) -> None:
    figure, axis = plt.subplots(figsize=(7.5, 4.2))
    for method, label in (
        ("reverse-kl", "exact reverse - exact forward"),
        ("exo-rw", f"EXO - DPO, K = {MATCH_K}"),
    ):
        stats = []
        for n_embd in SWEEP_WIDTH:
            gaps = [
                g["gap"] for g in done["gaps"] if (g["method"], g["n_embd"]) == (method, n_embd)
            ]
            stats.append(mean_se([g for g in gaps if g is not None] or [math.nan]))
        mean, se = zip(*stats, strict=True)
        axis.errorbar(
            SWEEP_WIDTH, mean, yerr=se, fmt="o-", color=color(method), label=label, capsize=2
        )
    axis.axhline(0, color=GREY, lw=1)
    axis.set_xscale("log", base=2)
    axis.set_xticks(SWEEP_WIDTH, [str(n) for n in SWEEP_WIDTH])
    axis.set_xlabel("n_embd of sft and policy")
    axis.set_ylabel("gap in E[r] at EXO's KL(π‖sft)")
    axis.legend()
    finish(plt, figure, path)


DRAW = {
    "losses": draw_losses,
    "group_size": draw_group_size,
    "frontier": draw_frontier,
    "width": draw_width,
}


# --------------------------------------------------------------------------------------------------
# The command


def run(
    out: str | Path,
    seeds: int = 8,
    sweep: bool = False,
    numbers: Config = NUMBERS,
    picture: Config = PICTURE,
) -> dict:
    """Both worlds into the folder `out` -> the content of results.json."""
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    jobs = halves(numbers, numbers_arms(numbers), seeds)
    *parts, image = in_parallel([*jobs, lambda: fit_picture(picture)])
    worlds, rows = merge(parts)
    for row in rows:
        del row["beta"]  # one for all
    results = {
        "config": {"numbers": asdict(numbers), "picture": asdict(picture), "seeds": seeds},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "worlds": worlds,
        "picture": image,
        "rows": rows,
    }
    write_json(out / "results.json", results)
    print(table(rows), comparisons(rows), sep="\n\n")
    if plt := pyplot():
        draw_picture(plt, image, out / "picture.png")
        draw_numbers(plt, rows, out / "numbers.png")
    if sweep:
        sweep_all(out, seeds, numbers)
    print(f"\nWritten to {out}")
    return results


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="EXO and DPO where the optimal policy is known")
    parser.add_argument("--out", type=Path, default=Path("out/toy"), help="folder for results")
    parser.add_argument("--seeds", type=int, default=8, help="seeds of the numbers world")
    parser.add_argument("--sweep", action="store_true", help="also the curves (minutes)")
    args = parser.parse_args(argv)
    if args.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {args.seeds}")
    run(args.out, args.seeds, args.sweep)


if __name__ == "__main__":
    main()
