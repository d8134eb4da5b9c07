"""
From the pieces to results.json: a frontier per method, read at equal KL.

A frontier is read at a given KL seed by seed, beginning at sft, KL 0, which every method reaches
with a large enough beta; never beyond its last point. A seed whose frontier does not get there is
left out, and a row says of how many seeds it is the mean. The optimum and best-of-n begin at the
mean of sft's pool, trained methods at sft's draws with the same random numbers as theirs.
"""

import itertools
import math
import platform
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from experiments.common import mean_se, only, write_json
from experiments.text import constants
from experiments.text.constants import BUDGETS, CALIBRATION, Matrix
from experiments.text.pieces import Piece, load_piece

QUANTITIES = ("oracle", "win_oracle_sft", "win_rm_sft", "win_oracle_chosen", "win_rm_chosen")


def report(out: Path, matrix: Matrix, pieces: list[Piece]) -> dict:
    """Write results.json from finished pieces; returns its content."""
    rates = {name: rate for name, (*_, rate) in constants.METHODS.items()}
    settings = {"matrix": asdict(matrix), "learning_rate": rates, "rm_rate": constants.RM_RATE}
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    done = {"settings": settings, "versions": versions, **collect(out, pieces)}
    done["matched"] = matched_rows(done, matrix)
    done["reach"] = reach_rows(done, matrix)
    done["calibration"] = calibration_rows(done, matrix)
    write_json(out / "results.json", done)
    return done


def collect(out: Path, pieces: list[Piece]) -> dict[str, list[dict]]:
    """What the makers returned, lists of the same name joined, and every row says whose it is."""
    found, columns = {}, ("reward", "seed", "n_embd", "method", "beta")
    for piece in pieces:
        who = {name: piece.spec[name] for name in columns if name in piece.spec}
        for what, rows in load_piece(out, piece).items():
            found.setdefault(what, []).extend(who | row for row in rows)
    return found


# --------------------------------------------------------------------------------------------------
# Frontiers


def frontier(done: dict, method: str, **where) -> list[dict]:
    """The rows of a method, which differ in beta (of best-of-n: in n) and seed."""
    if method == "optimum":
        return [row for row in only(done["optimum"], **where) if row["ess"] >= constants.LEAST_ESS]
    if method.startswith("best-of-n"):
        return only(done["best_of_n"], method=method, **where)
    return only(done["rows"], method=method, n_pairs=None, last=True, **where)


def start(done: dict, method: str, **where) -> list[dict]:
    """sft's rows, where the frontier of a method begins."""
    if method in constants.METHODS:
        return only(done["start"], **where)
    return only(done["best_of_n"], method="best-of-n-oracle", n=1, **where)


def at_kl(points: list[tuple[float, float]], kl: float) -> float:
    """A quantity where a frontier, (KL, quantity) points, crosses this KL; NaN beyond its ends.

    Interpolated linearly in sqrt(KL): near sft the reward of an optimal policy grows like it, so
    that a curve which starts at (0, sft) is not cut short by its chord.
    """
    if not points:
        return math.nan
    x, y = zip(*sorted(points), strict=True)
    root = np.sqrt(np.maximum(x, 0.0))
    return float(np.interp(math.sqrt(kl), root, y, left=math.nan, right=math.nan))


def matched(done: dict, method: str, quantity: str, kl: float, **where) -> dict[int, float]:
    """{seed: the quantity where this seed's frontier crosses this KL}, of those that reach it."""
    found = {}
    for row in start(done, method, **where):
        own = [row, *frontier(done, method, **where, seed=row["seed"])]
        value = at_kl([(r["kl"], r[quantity]) for r in own if quantity in r], kl)
        if not math.isnan(value):
            found[row["seed"]] = value
    return found


def compared(matrix: Matrix) -> tuple[str, ...]:
    return ("optimum", "best-of-n-oracle", "best-of-n", *matrix.methods)


def matched_rows(done: dict, matrix: Matrix) -> list[dict]:
    """Every method's quantities at each budget; for EXO also its lead over its DPO, by seeds."""
    out = []
    for (reward, _), kl, method in itertools.product(matrix.betas, BUDGETS, compared(matrix)):
        where, entry = {"reward": reward, "n_embd": matrix.n_embd}, {}
        for quantity in QUANTITIES:
            values = matched(done, method, quantity, kl, **where)
            if values:
                entry[quantity], entry[f"{quantity}_se"] = mean_se(list(values.values()))
                entry.setdefault("seeds", len(values))  # the oracle's, which comes first
        if entry and method.startswith("exo"):
            rival = method.replace("exo", "dpo")
            ours, theirs = (matched(done, m, "oracle", kl, **where) for m in (method, rival))
            leads = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
            if leads:
                entry["lead"], entry["lead_se"] = mean_se(leads)
                entry["lead_seeds"] = len(leads)
        if entry:
            out.append({"reward": reward, "kl": kl, "method": method, **entry})
    return out


def mean_curve(rows: list[dict]) -> list[dict]:
    """Means of a frontier over seeds, and their standard errors, at each beta (of best-of-n: n)
    that all of its seeds have, by KL."""
    key = "n" if rows and "n" in rows[0] else "beta"
    seeds, out = {row["seed"] for row in rows}, []
    for value in sorted({row.get(key) for row in rows}):
        at = [row for row in rows if row.get(key) == value]
        if {row["seed"] for row in at} == seeds:
            (x, dx), (y, dy) = (mean_se([row[k] for row in at]) for k in ("kl", "oracle"))
            out.append({"kl": x, "kl_se": dx, "oracle": y, "oracle_se": dy})
    return sorted(out, key=lambda point: point["kl"])


def reach_rows(done: dict, matrix: Matrix) -> list[dict]:
    """The highest mean oracle reward of each method over its betas (or n), and its KL."""
    out = []
    for (reward, _), method in itertools.product(matrix.betas, compared(matrix)[1:]):
        points = mean_curve(frontier(done, method, reward=reward, n_embd=matrix.n_embd))
        top = max(points, key=lambda point: point["oracle"])
        out.append({"reward": reward, "method": method, **top})
    return out


def calibration_rows(done: dict, matrix: Matrix) -> list[dict]:
    """What the optimum, EXO and DPO gain over sft in oracle reward at equal KL, the two with the
    oracle in their loss, for each width and seed in which all get there."""
    out, kls, widths = [], (constants.SMALL_KL, *BUDGETS), (*matrix.widths, matrix.n_embd)
    for (reward, _), width, kl in itertools.product(matrix.betas, widths, kls):
        where, gains = {"reward": reward, "n_embd": width}, {}
        for method in ("optimum", *CALIBRATION):
            first = {row["seed"]: row["oracle"] for row in start(done, method, **where)}
            ends = matched(done, method, "oracle", kl, **where)
            gains[method] = {seed: value - first[seed] for seed, value in ends.items()}
        for seed in sorted(set.intersection(*map(set, gains.values()))):
            gain = {method: values[seed] for method, values in gains.items()}
            out.append({**where, "seed": seed, "kl": kl, **gain})
    return out


def table(done: dict, matrix: Matrix) -> str:
    """Oracle reward at each KL: mean ± standard error over seeds, and of how many."""
    lines = [f"{'at KL':28}" + "".join(f"{kl:18g}" for kl in BUDGETS)]
    for (reward, _), method in itertools.product(matrix.betas, compared(matrix)):
        cells = dict.fromkeys(BUDGETS, "–")
        for row in only(done["matched"], reward=reward, method=method):
            error = " ± {oracle_se:.2f}" if row["seeds"] > 1 else ""
            cells[row["kl"]] = ("{oracle:.2f}" + error + " ({seeds})").format(**row)
        line = "".join(f"{cell:>18}" for cell in cells.values())
        lines.append(f"{reward + ' ' + method:28}" + line)
    return "\n".join(lines)
