"""
The curves behind the table (`python train.py --sweep`): each a piece of sweep.json and a figure.

    directions   The paper's theorem as a picture. Policies on the way of the exact reverse descent:
                 the cosine of each loss's expected gradient, over K draws of sft, with the gradient
                 of J, and its distance to its limit (EXO's: J's; DPO's: the forward KL's), in
                 float64, from 2^20 draws in 16 batches (error: jackknife over these).
    frontier     E[r] against KL(pi || sft), every method and seed at 16 betas from 0.02 to 8, and
                 by bisection at each target KL: `matched` has the fits within 0.05 of it. All are
                 measured, nothing is interpolated; who does not arrive is missing.
    capacity     the table's columns at each n_embd, of sft and policy, and the exact fits there.
    efficiency   regret J(pi*) - J(pi) against completions read and rated: of each method and budget
                 the K and learning rate with the lowest mean regret on seeds 100 to 103.

sweep.json is written anew after each piece, so a run that is stopped keeps the pieces it has.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from exo import dpo_loss, exo_loss, kl, reward_target
from experiments.common import distinct, in_parallel, only, pyplot, save, stat, write_json
from experiments.toy.figures import SWEPT
from experiments.toy.fit import DESCENTS, Arm, Setup, Weights, prepare, take, train
from experiments.toy.measures import SPEC, fit_worlds, measure
from experiments.toy.worlds import Config, draw, generators, optimum

# --------------------------------------------------------------------------------------------------
# Directions

SHARES = {
    "at sft": 0.0,
    "half-way": 0.5,
    "near its end": 0.9,
}  # of the descent's fall in reverse KL
DIRECTION_K = (2, 4, 8, 16, 32, 64, 128, 256)
BATCHES, BATCH = 16, 2**16


def way_down(setup: Setup, log_star: Tensor) -> dict[str, Weights]:
    """Policies on the way of the exact reverse descent, every seed at its own pace."""
    path, distance = [], []

    def watch(step: int, weights: Weights, logps: Tensor) -> None:
        path.append({name: w.detach().clone() for name, w in weights.items()})
        distance.append(kl(logps.double(), log_star))

    arms = [Arm(DESCENTS[0], None, setup.config.beta, seed) for seed in setup.seeds]
    train(setup, arms, "the way down", watch=watch)
    every = {name: torch.stack([step[name] for step in path]) for name in path[0]}
    fall = torch.stack(distance)  # (steps, S)
    fall = (fall[0] - fall) / (fall[0] - fall[-1])
    first = {place: (fall >= share).int().argmax(dim=0) for place, share in SHARES.items()}
    return {place: take(every, (step, torch.arange(len(step)))) for place, step in first.items()}


def expected_weights(loss: Callable, K: int, logps: Tensor, setup: Setup, random) -> Tensor:
    """One batch's estimate of the w (S, N) in grad loss = sum_y w(y) grad log pi(y)."""
    y = draw(setup.log_sft, torch.stack([torch.rand(BATCH, generator=g) for g in random]))
    policy, ref, r = (x.gather(1, y) for x in (logps, setup.log_sft, setup.reward))
    policy = policy.detach().requires_grad_()
    target = reward_target(r.view(-1, K), setup.config.beta)
    mean = loss(policy.view(-1, K), ref.view(-1, K), target)
    (slope,) = torch.autograd.grad(len(logps) * mean, policy)
    return torch.zeros_like(logps).scatter_add(1, y, slope)


def directions(config: Config, seeds: list[int]) -> list[dict]:
    setup, rows = prepare(config, seeds), []
    log_star = optimum(setup.log_sft, setup.reward, config.beta)
    cosine = torch.nn.CosineSimilarity(dim=-1)
    for place, weights in way_down(setup, log_star).items():
        weights = {name: w.double().requires_grad_() for name, w in weights.items()}
        logps = setup.space.logps(weights)

        def gradient(w: Tensor, logps=logps, weights=weights) -> Tensor:  # (S, parameters)
            grads = torch.autograd.grad((w * logps).sum(), weights.values(), retain_graph=True)
            return torch.cat([g.flatten(1) for g in grads], dim=1)

        reverse = gradient((logps.exp() * (logps - log_star)).detach())  # that of -J / beta
        forward = gradient(-log_star.exp())
        limits = {"exo-rw": (exo_loss, reverse), "dpo-rw": (dpo_loss, forward)}
        for (method, (loss, limit)), K in ((x, K) for x in limits.items() for K in DIRECTION_K):
            random = generators(seeds, "draws")
            batches = (expected_weights(loss, K, logps, setup, random) for _ in range(BATCHES))
            g = torch.stack([gradient(w) for w in batches])  # (batches, S, parameters)
            mean, noise = g.mean(dim=0), g.var(dim=0).sum(dim=-1) / BATCHES
            others = cosine((g.sum(dim=0) - g) / (BATCHES - 1), reverse)  # without one batch each
            away = (mean - limit).square().sum(dim=-1) - noise  # unbiased
            values = {
                "to_J": cosine(mean, reverse),
                "to_J_error": ((BATCHES - 1) * others.var(dim=0, correction=0)).sqrt(),
                "forward_to_J": cosine(forward, reverse),
                "distance": (away / limit.square().sum(dim=-1)).clamp(min=0).sqrt(),
                "reverse_kl": kl(logps, log_star).detach(),
            }
            for i, seed in enumerate(seeds):
                row = {"place": place, "method": method, "K": K, "seed": seed}
                rows.append(row | {name: x[i].item() for name, x in values.items()})
    return rows


# --------------------------------------------------------------------------------------------------
# The frontier, and policies at equal distance from sft

BETAS = [0.02 * 400 ** (i / 15) for i in range(16)]  # 0.02 to 8
TARGETS, WITHIN, BISECTIONS = (0.5, 1.0, 1.5, 2.0, 2.5), 0.05, 5


def runs(rows: list[dict]) -> list[list[dict]]:
    """The rows of each method, K and seed, by falling beta: on their way from sft."""
    found: dict[tuple, list[dict]] = {}
    for row in sorted(rows, key=lambda row: -row["beta"]):
        found.setdefault((row["method"], row["K"], row["seed"]), []).append(row)
    return list(found.values())


def arrival(own: list[dict], target: float) -> dict | None:
    """The first policy on the way that is near enough."""
    return next((row for row in own if abs(row["kl_sft"] - target) <= WITHIN), None)


def missing(own: list[dict]) -> set[float]:
    """Betas between the first two neighbours that straddle a target nobody is near."""
    betas = set()
    for target in TARGETS:
        for a, b in itertools.pairwise(own if not arrival(own, target) else []):
            if (a["kl_sft"] - target) * (b["kl_sft"] - target) < 0:
                betas.add(math.sqrt(a["beta"] * b["beta"]))
                break
    return betas


def frontier(config: Config, seeds: list[int]) -> list[dict]:
    """Every method on the grid of betas, then where bisection leads; and pi*."""
    setup, rows = prepare(config, seeds), []
    spec = [(m, K) for m, K in SPEC if m != "rloo"]  # as exo-online
    arms = [Arm(m, K, beta, seed) for m, K in spec for beta in BETAS for seed in seeds]
    for number in range(BISECTIONS + 1):
        for part in range(0, len(arms), 640):  # all at once would need gigabytes
            some = arms[part : part + 640]
            ended = train(setup, some, f"frontier, bisection {number}")
            rows += measure(setup, some, setup.space.exact(ended))
        arms = [
            Arm(own[0]["method"], own[0]["K"], beta, own[0]["seed"])
            for own in runs(rows)
            for beta in sorted(missing(own))
        ]
        arms.sort(key=lambda arm: spec.index((arm.method, arm.K)))
    stars = [Arm("pi-star", None, beta, seed) for beta in BETAS for seed in seeds]
    return rows + measure(setup, stars, setup.of(stars)[-1])


def matched(rows: list[dict]) -> list[dict]:
    """For each method, K, seed and target the policy that arrives, if one does."""
    tries = ((t, arrival(own, t)) for own in runs(rows) for t in TARGETS)
    return [{"target": t} | row for t, row in tries if row and row["method"] != "pi-star"]


# --------------------------------------------------------------------------------------------------
# Capacity and sample efficiency

WIDTHS = (2, 3, 4, 5, 6, 7, 8)
WIDE = [(m, 64) for m in ("exo-rw", "dpo-rw", "exo-online", "dpo-online")]
WIDE += [(m, None) for m in DESCENTS]
DRAWS, RATES = (64, 256, 1024, 4096), (1 / 2, 1, 2)  # a step; of config.learning_rate
TUNING = [100, 101, 102, 103]
LEARNERS = ("exo-rw", "dpo-rw", "exo-pref", "dpo-pref", "exo-online", "dpo-online", "rloo")


def capacity(config: Config, seeds: list[int]) -> list[dict]:
    """Rows of every width; those of seed 0 hold the policy's log-probs, too."""
    rows = []
    for n_embd in WIDTHS:
        found = fit_worlds(replace(config, n_embd=n_embd), seeds, WIDE)
        for row in found["rows"]:
            if row["seed"] == 0 and row["K"]:
                row["logps"] = found["pictures"][f"{row['method']} {row['K']}"]
        rows += found["rows"]
    return rows


def efficiency(config: Config, seeds: list[int]) -> list[dict]:
    """Every method at every budget, K and learning rate."""
    setup, rows = prepare(config, seeds), []
    choices = [(m, K) for m, K in SPEC if m in LEARNERS]
    arms = [Arm(m, K, config.beta, seed) for m, K in choices for seed in seeds]
    for draws, rate in ((draws, rate) for draws in DRAWS for rate in RATES):
        schedule = replace(config, draws=draws, learning_rate=rate * config.learning_rate)
        ended = train(setup, arms, f"efficiency, {draws} draws a step", config=schedule)
        for row in measure(setup, arms, setup.space.exact(ended)):
            more = {"completions": draws * config.steps, "rate": rate}
            rows.append(row | more | {"regret": config.beta * row["reverse_kl"]})
    return rows


def tuned(rows: list[dict]) -> list[dict]:
    """For each method and budget the rows with the K and rate that are best on the seeds for it."""
    trial, best = [row for row in rows if row["seed"] in TUNING], []
    for method, budget in distinct(trial, "method", "completions"):
        own = only(trial, method=method, completions=budget)
        choices = distinct(own, "K", "rate")
        K, rate = min(choices, key=lambda c: stat(own, "regret", K=c[0], rate=c[1])[0])
        best += only(rows, method=method, completions=budget, K=K, rate=rate)
    return [row for row in best if row["seed"] not in TUNING]


# --------------------------------------------------------------------------------------------------


def halves(seeds: list[int]) -> list[list[int]]:
    return [half for half in (seeds[::2], seeds[1::2]) if half]


def rounded(row: dict) -> dict:
    return {key: round(x, 5) if isinstance(x, float) else x for key, x in row.items()}


def sweep_all(out: Path, seeds: list[int], config: Config) -> dict:
    plt, done = pyplot(), {"config": asdict(config) | {"seeds": len(seeds)}}
    for piece in (directions, frontier, capacity, efficiency):
        own = [*seeds, *TUNING] if piece is efficiency else seeds
        parts = in_parallel(piece, [(config, half) for half in halves(own)])
        rows = [row for part in parts for row in part]
        name = piece.__name__
        done[name] = [rounded(row) for row in (tuned(rows) if piece is efficiency else rows)]
        if piece is frontier:
            done["matched"] = matched(done[name])
        write_json(out / "sweep.json", done)
        if plt:
            save(plt, SWEPT[name], done, out / f"{name}.png")
    return done
