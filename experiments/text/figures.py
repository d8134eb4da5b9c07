"""
The text world's figures: from what results.json holds to PNGs.

Red is EXO, blue DPO, green PPO, ochre best-of-n, black the optimum; a marker says what a method
learned from. Bars are standard errors over seeds.
"""

from collections import Counter
from pathlib import Path

import numpy as np

from experiments.common import INK, distinct, finish, mean_se, only, pyplot
from experiments.text.constants import CALIBRATION, DENSITY, Matrix
from experiments.text.report import frontier, mean_curve, start

COLORS = {"exo": "#d1495b", "dpo": "#2e6f9e", "ppo": "#3f8f5b", "best": "#c28a1c"}
MARKERS = {"pref": "^", "rw": "o", "oracle": "s", "online": "D", "n": "x", "ppo": "P"}
FARTHEST = 8.0  # KL that figures show
TICKS = (0, 0.1, 0.5, 1, 2, 4, 8)
PANELS = {  # of the frontier, by what methods learn from
    "labelled pairs": ("exo-pref", "dpo-pref"),
    "the reward model": ("exo-rw", "dpo-rw", "best-of-n"),
    "the reward model, on their own draws": ("exo-online", "dpo-online", "ppo"),
    "the oracle": ("exo-rw-oracle", "dpo-rw-oracle", "best-of-n-oracle"),
}


def style(method: str) -> dict:
    line = "--" if "online" in method else "-"
    marker = MARKERS[method.split("-")[-1]]
    return {"color": COLORS[method.split("-")[0]], "marker": marker, "ls": line, "ms": 5, "lw": 1.6}


def draw_curves(axis, done: dict, methods: tuple[str, ...], **where) -> float:
    """Mean frontiers beginning at sft, the optimum's behind them. Returns the largest KL; the
    legend says how far a curve goes on beyond the figure."""
    farthest = 0.0
    for method in ("optimum", *methods):
        rows = frontier(done, method, **where)
        points = mean_curve(rows)
        if rows and not method.startswith("best-of-n"):  # which begins with n = 1
            points = mean_curve(start(done, method, **where)) + points
        x, y, dx, dy = ([p[k] for p in points] for k in ("kl", "oracle", "kl_se", "oracle_se"))
        if method == "optimum":
            axis.plot(x, y, color=INK, lw=2.2, label="the optimum π*", zorder=1)
        elif points:
            far = f" (on to KL {x[-1]:.0f})" if x[-1] > FARTHEST * 1.05 else ""
            bars = {"xerr": dx, "yerr": dy, "capsize": 2, "elinewidth": 1}
            axis.errorbar(x, y, label=method + far, **bars, **style(method))
            farthest = max(farthest, x[-1])
    axis.legend(fontsize=9.5)
    return farthest


def kl_axes(axes, farthest: float) -> None:
    """KL on a square-root scale, in which an optimal frontier begins as a straight line, up to
    FARTHEST; y to fit what is seen."""
    right, seen = min(farthest, FARTHEST) * 1.05, []
    for axis in axes:
        axis.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
        axis.set_xlim(0, right)
        ticks = [kl for kl in TICKS if kl <= right]
        axis.set_xticks(ticks, [f"{kl:g}" for kl in ticks])
        axis.set_xlabel("KL(π‖sft), nats")
        for line in axis.lines:
            x, y = (np.asarray(v, dtype=float) for v in line.get_data())
            seen += list(y[(x <= right) & np.isfinite(y)]) if len(y) > 1 else []
    margin = 0.05 * (max(seen) - min(seen)) or 1.0
    for axis in axes:
        axis.set_ylim(min(seen) - margin, max(seen) + margin)


def draw_frontier(plt, done: dict, matrix: Matrix, reward: str):
    """Mean frontier of each method over beta, a panel per source of learning."""
    figure, axes = plt.subplots(2, 2, figsize=(11.5, 8.6), sharex=True, sharey=True)
    where, farthest = {"reward": reward, "n_embd": matrix.n_embd}, [0.5]
    for axis, (name, methods) in zip(axes.flat, PANELS.items(), strict=True):
        axis.set_title(f"learns from {name}", fontsize=11.5)
        farthest.append(draw_curves(axis, done, methods, **where))
    kl_axes(list(axes.flat), max(farthest))
    for axis in axes[:, 0]:
        axis.set_ylabel(f"oracle reward: {reward}")
    axes[1, 1].set_xlabel("KL(π‖sft), nats; of best-of-n: log n − (n−1)/n")
    return figure


def draw_density(plt, done: dict, matrix: Matrix, reward: str):
    """log π/sft against log π*/sft of completions of one prompt, each a dot; medians in bins."""
    rows = only(done["density"], reward=reward, n_embd=matrix.n_embd)
    rows.sort(key=lambda row: DENSITY.index(row["method"]))
    size = {"figsize": (3.6 * len(rows), 4.2), "squeeze": False}
    figure, axes = plt.subplots(1, len(rows), sharex=True, sharey=True, **size)
    for axis, row in zip(axes[0], rows, strict=True):
        x, y = np.array(row["log_ratio_optimum"]), np.array(row["log_ratio"])
        color = style(row["method"])["color"]
        axis.plot(x, y, ".", color=color, alpha=0.3, ms=4)
        axis.plot([x.min(), x.max()], [x.min(), x.max()], color=INK, lw=1)
        edges = np.quantile(x, np.linspace(0, 1, 9))
        place = np.clip(np.searchsorted(edges, x, "right") - 1, 0, 7)
        middle = [(np.median(x[place == b]), np.median(y[place == b])) for b in set(place)]
        axis.plot(*zip(*sorted(middle), strict=True), "o-", color=color, mec="white", ms=7)
        axis.set_title(f"{row['method']}\nKL(π‖sft) = {row['kl']:.2f}", fontsize=11)
        axis.set_xlabel("log π*/sft")
    axes[0, 0].set_ylabel(f"log π/sft     ({reward}, β = {rows[0]['beta']:g})")
    return figure


def draw_calibration(plt, done: dict, matrix: Matrix):
    """Per reward a row: a panel per width with the optimum's frontier of that width's own sft, and
    one with the share of its gain over the width."""
    widths = sorted({*matrix.widths, matrix.n_embd})
    shape = (len(matrix.betas), len(widths) + 1)
    size = {"figsize": (3.6 * shape[1], 3.7 * shape[0]), "squeeze": False}
    figure, axes = plt.subplots(*shape, **size)
    for line, (reward, _) in zip(axes, matrix.betas, strict=True):
        for axis, width in zip(line, widths, strict=False):
            far = draw_curves(axis, done, CALIBRATION, reward=reward, n_embd=width)
            kl_axes([axis], max(0.25, far))
            axis.set_title(f"n_embd {width}", fontsize=11.5)
        line[0].set_ylabel(f"oracle reward: {reward}")
        rows = only(done["calibration"], reward=reward)
        if rows:
            draw_shares(line[-1], rows)
    return figure


def draw_shares(axis, rows: list[dict]) -> None:
    """Over the width: each method's share of the optimum's gain, mean and standard error, at the
    smallest and the largest of the KLs that most runs reach."""
    count = Counter(row["kl"] for row in rows)
    reached = sorted(kl for kl in count if count[kl] == max(count.values()))
    for kl, line in {reached[0]: "-", reached[-1]: "--"}.items():
        for method in CALIBRATION:
            widths = sorted(distinct(only(rows, kl=kl), "n_embd"))
            own = [only(rows, kl=kl, n_embd=width) for width in widths]
            stats = [mean_se([row[method] / row["optimum"] for row in some]) for some in own]
            look = style(method) | {"ls": line} | ({"mfc": "white"} if line == "--" else {})
            y, dy = zip(*stats, strict=True)
            axis.errorbar(widths, y, dy, capsize=2, label=f"{method}, KL {kl:g}", **look)
    axis.axhline(1, color=INK, lw=2)
    axis.set_xscale("log", base=2)
    axis.set_xticks(widths, [str(width) for width in widths])
    axis.set_xlabel("n_embd of sft and policy")
    axis.set_ylabel("share of the optimum's gain over sft")
    axis.legend(fontsize=8.5)


def draw_all(done: dict, matrix: Matrix, out: Path) -> None:
    plt = pyplot()
    if not plt:
        return
    for reward, _ in matrix.betas:
        finish(plt, draw_frontier(plt, done, matrix, reward), out / f"frontier-{reward}.png")
        if only(done.get("density", []), reward=reward, n_embd=matrix.n_embd):
            finish(plt, draw_density(plt, done, matrix, reward), out / f"density-{reward}.png")
    if matrix.widths:
        finish(plt, draw_calibration(plt, done, matrix), out / "calibration.png")
