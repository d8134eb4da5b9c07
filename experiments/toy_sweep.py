"""
The sweep: curves behind the toy's table, in minutes (python -m experiments.toy --sweep).

The table compares EXO and DPO at one beta, where part of a gap is only distance moved from sft. So:

    losses       each loss of one pair and its gradient, against the margin; nothing is fitted
    group_size   KL(pi || pi*) over K, at equal draws per step
    frontier     E[r] against KL(pi || sft), a point per beta; `matched` reads it at equal distance
    width        over n_embd, the gap in E[r] at EXO's own distance (`gaps`); at most 4 seeds

`matched` and `gaps` interpolate one seed's frontier linearly between its betas and never
extrapolate: a seed whose frontier does not get there is left out. sweep.json is written anew after
each piece, so a run that is stopped keeps the pieces it has.
"""

import itertools
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from exo import dpo_loss, exo_loss, preference_target
from experiments.toy import (
    Arm,
    by_method,
    exact_arms,
    halves,
    in_parallel,
    mean_se,
    merge,
    spell,
    write_json,
)
from experiments.toy_figures import DRAW, pyplot
from experiments.toy_worlds import Config

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
