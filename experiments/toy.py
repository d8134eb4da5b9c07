"""
Two worlds small enough to list every completion, so that "EXO seeks modes, DPO covers the mean" is
a number.

    python -m experiments.toy            both worlds in a minute: table, results.json, figures
    python -m experiments.toy --sweep    and curves: over K, the frontier over beta, over n_embd

A world (toy_worlds.py) is a reward over all V^T completions of one prompt: 8^4 strings of the
*numbers*, 32^2 pixels of the *picture*. The optimum pi* = sft exp(r / beta) / Z is known, and so
are KL(pi || pi*), KL(pi* || pi), J and E[r] of every policy: sums in float64, not estimates. All
fits, methods x seeds, train at once on an ensemble axis, by vmap over stacked weights. This file
fits and tells; toy_sweep.py fits for the curves, toy_figures.py draws what both have written.

What the words mean, and what is simplified:
- `reverse-kl` and `forward-kl` descend the *exact* KL, with the optimizer and as many steps as all
  others, from sft's weights and from a copy with noise; the better counts, by its own objective.
  They are no global optima: nothing has converged after 500 steps, and a longer fit
  goes lower. The picture's exact fits start again from where all others ended.
- Temperatures are matched: all methods share one unrestricted optimum. exo-rw, dpo-rw, exo-online:
  beta_pi = 1, beta_r = beta. Pairs carry labels drawn from Bradley-Terry with the true reward,
  P = sigmoid(r1 - r2), where dpo-pref's optimum at label_smoothing 0 is sft exp(r / beta_pi), so
  beta_pi = beta. For exo-pref label_smoothing sets the temperature; sigmoid(-2) = 0.119 matches
  Bradley-Terry near P = 1/2, though in general no policy attains its target.
- A step shows every method the same draws from sft (exo-online: its own, by the same uniforms):
  4,096 / K groups, for the pref methods 2,048 pairs. Equal draws, not equal labels.
"""

import argparse
import json
import math
import platform
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
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
from experiments.toy_worlds import (
    NUMBERS,
    PICTURE,
    Config,
    Space,
    World,
    code_world,
    draw,
    generator,
    optimum,
    picture_world,
)

LABEL_SMOOTHING = {"exo-pref": 1 / (1 + math.exp(2)), "dpo-pref": 0.0}  # see the top of the file


@dataclass(frozen=True)
class Arm:
    """One way to train a policy. K None: the exact KL. start: which of the starting weights."""

    method: str
    K: int | None = None
    beta: float = NUMBERS.beta
    start: int = 0


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
# Telling: a table and JSON

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
    # here, not at the top of the file: both are built on this one
    from experiments import toy_figures, toy_sweep

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
    if plt := toy_figures.pyplot():
        toy_figures.draw_picture(plt, image, out / "picture.png")
        toy_figures.draw_numbers(plt, rows, out / "numbers.png")
    if sweep:
        toy_sweep.sweep_all(out, seeds, numbers)
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
