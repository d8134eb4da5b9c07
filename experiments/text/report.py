"""
From the pieces to results.json:

    fits       every policy that was trained, as it was judged; `grid`: at a beta of PULLS
    cells      the policy that stands for a method, seed and target
    missed     the seeds and targets where none arrived, and the nearest KL there was
    start      sft, judged as the policies are, and how often the reward model orders as the oracle
    optimum    pi* of the oracle's reward at each target
    compared   the comparisons of constants.QUESTIONS: mean of the paired differences over seeds,
               half of their 95 % interval, p, and p by Holm's correction within its question;
               `kl_gap`, how far the two sides lie apart in KL, as a share of the target
"""

import math
import platform
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from experiments.common import only, write_json
from experiments.text import constants
from experiments.text.constants import Matrix
from experiments.text.pieces import curves, load, rm, walk
from experiments.text.search import off


def report(out: Path, matrix: Matrix) -> dict:
    """Write results.json from finished pieces; returns its content."""
    plan = {name.lower(): getattr(constants, name) for name in constants.PLAN}
    settings = {"matrix": asdict(matrix), **plan}
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    done = {"settings": settings, "versions": versions, **collect(out, matrix)}
    done["compared"] = compared(done["cells"], matrix)
    write_json(out / "results.json", done)
    return done


def collect(out: Path, matrix: Matrix) -> dict[str, list[dict]]:
    """Rows of what was made; every row says whose it is."""
    found = {name: [] for name in ("fits", "cells", "missed", "start", "optimum")}
    models = {}
    for curve, seed in curves(matrix):
        model = {"reward": curve.reward, "labels": curve.labels, "seed": seed}
        models[rm(matrix, curve, seed).name] = model
        arrived, results = walk(matrix, curve, seed, lambda piece: load(out, piece))
        who = model | {"method": curve.method, "K": curve.K}
        fits = {
            beta: {**who, "beta": beta, "grid": beta in curve.betas, **row}
            for beta, row in results.items()
        }
        found["fits"] += fits.values()
        for target, beta in arrived.items():
            if beta in fits:
                found["cells"].append({"target": target, **fits[beta]})
            else:
                near = min((row["kl"] for row in fits.values()), key=lambda kl: off(kl, target))
                found["missed"].append({**who, "target": target, "nearest_kl": near})
        if len(models) > len(found["start"]):
            result = load(out, rm(matrix, curve, seed))
            found["start"].append(model | result["start"])
            found["optimum"] += [model | row for row in result["optimum"]]
    return found


def chance(t: float, df: int) -> float:
    """P(|T| >= |t|) of Student's t, by its density in the angle atan(t / sqrt(df))."""
    angle, n = math.atan(abs(t) / math.sqrt(df)), 2000
    inside = np.cos(angle * (np.arange(n) + 0.5) / n) ** (df - 1)  # midpoints
    scale = math.gamma((df + 1) / 2) / (math.sqrt(math.pi) * math.gamma(df / 2))
    return max(0.0, 1 - 2 * scale * angle * float(inside.mean()))


def student(df: int) -> float:
    """The t that |T| exceeds with a chance of 5 %."""
    low, high = 0.0, 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if chance(middle, df) > 0.05 else (low, middle)
    return low


def interval(differences: list[float]) -> dict[str, float]:
    """Mean of two or more differences, half of its 95 % interval, and p."""
    x, df = np.array(differences), len(differences) - 1
    error = x.std(ddof=1) / math.sqrt(len(x))
    p = chance(x.mean() / error, df) if error else float(x.mean() == 0)
    return {"mean": float(x.mean()), "half": student(df) * float(error), "p": p}


def holm(ps: list[float]) -> list[float]:
    """Adjusted p: the k-th smallest of m times m - k + 1, and never below a smaller one's."""
    adjusted, worst = [0.0] * len(ps), 0.0
    for k, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        worst = max(worst, min(1.0, (len(ps) - k) * ps[i]))
        adjusted[i] = worst
    return adjusted


def compared(cells: list[dict], matrix: Matrix) -> list[dict]:
    """Every comparison of which two seeds have both sides."""
    out = []
    for question in matrix.questions:
        family, rows = constants.QUESTIONS[question][1], []
        for quantity, pair, target in family.comparisons():
            where = {"reward": family.reward, "labels": 0, "target": target}
            ours, theirs = (
                {c["seed"]: c for c in only(cells, method=method, K=K, **where)}
                for method, K in pair
            )
            both = sorted(ours.keys() & theirs.keys())
            if len(both) > 1:
                row = {"question": question, "quantity": quantity, "target": target}
                row |= dict(zip(("ours", "K", "theirs", "K_theirs"), sum(pair, ()), strict=True))
                gap = np.mean([ours[seed]["kl"] - theirs[seed]["kl"] for seed in both]) / target
                row |= {"seeds": len(both), "kl_gap": float(gap)}
                differences = [ours[seed][quantity] - theirs[seed][quantity] for seed in both]
                rows.append(row | interval(differences))
        adjusted = holm([row["p"] for row in rows])
        out += [row | {"holm": p} for row, p in zip(rows, adjusted, strict=True)]
    return out
