"""
The frontier's figures, one function each: from what results.json holds to a PNG.

Red is EXO, blue DPO, green PPO, ochre best-of-n, black the optimum; a marker says what a method
learned from. Bars are standard errors over seeds.
"""

import itertools
from pathlib import Path

import numpy as np

from experiments.toy import mean_se
from experiments.toy_figures import GREY, INK, finish, pyplot

COLORS = {"exo": "#d1495b", "dpo": "#2e6f9e", "ppo": "#3f8f5b", "best": "#c28a1c", "optimum": INK}
SOURCES = {"pref": "^", "0.12": "v", "rw": "o", "oracle": "s", "online": "D", "n": "x", "ppo": "P"}
DENSITY = ("exo-rw-oracle", "dpo-rw-oracle", "exo-pref", "dpo-pref")
PANELS = {  # of the frontier, by what methods learn from
    "labelled pairs": ("exo-pref", "exo-pref-0.12", "dpo-pref"),
    "the reward model": ("exo-rw", "dpo-rw", "best-of-n"),
    "the reward model, on their own draws": ("exo-online", "dpo-online", "ppo"),
    "the oracle": ("exo-rw-oracle", "dpo-rw-oracle", "exo-online-oracle", "best-of-n-oracle"),
}


def color(method: str) -> str:
    return COLORS.get(method.split("-")[0], GREY)


def style(method: str) -> dict:
    name = method.removesuffix("-oracle") if "online" in method else method
    marker = SOURCES[name.split("-")[-1]]
    line = "--" if method.endswith("0.12") or "online" in method else "-"
    return {"color": color(method), "marker": marker, "ls": line, "ms": 5, "lw": 1.6}


def only(rows: list[dict], **where) -> list[dict]:
    return [row for row in rows if all(row[k] == v for k, v in where.items())]


def mean_curve(rows: list[dict], key: str, quantity: str = "oracle") -> np.ndarray:
    """(points, 4): mean KL, mean quantity and their standard errors over seeds, for each value of
    `key` that all seeds have, by KL."""
    seeds, out = {row["seed"] for row in rows}, []
    for value in sorted({row[key] for row in rows}):
        at = only(rows, **{key: value})
        if {row["seed"] for row in at} == seeds:
            (x, dx), (y, dy) = (mean_se([row[k] for row in at]) for k in ("kl", quantity))
            out.append([x, y, dx, dy])
    return np.array(sorted(out)).reshape(-1, 4)


def sft_point(done: dict, quantity: str = "oracle", **where) -> np.ndarray:
    return mean_curve(only(done["best_of_n"], n=1, **where)[:], "n", quantity)[:1]


def method_curve(done: dict, method: str, **where) -> np.ndarray:
    """A method's mean frontier, beginning at sft."""
    if method == "optimum":
        least = done["settings"]["least_ess"]
        rows = only(done["optimum"], **where)
        low = {row["beta"] for row in rows if row["ess"] < least}
        points = mean_curve([row for row in rows if row["beta"] not in low], "beta")
    elif method.startswith("best-of-n"):
        return mean_curve(only(done["best_of_n"], method=method, **where), "n")
    else:
        rows = only(done["rows"], method=method, last=True, n_pairs=None, **where)
        points = mean_curve(rows, "beta")
    return np.concatenate([sft_point(done, **where), points]) if len(points) else points


def plot(axis, points: np.ndarray, label: str, **style) -> None:
    if not len(points):
        return
    x, y, dx, dy = points.T
    axis.errorbar(x, y, yerr=dy, xerr=dx, label=label, capsize=2, elinewidth=1, **style)


def plot_optimum(axis, done: dict, **where) -> None:
    points = method_curve(done, "optimum", **where)
    if len(points):
        axis.plot(points[:, 0], points[:, 1], color=INK, lw=2.2, label="the optimum π*", zorder=1)


def draw_frontier(plt, done: dict, matrix, reward: str, path: Path) -> None:
    """One panel per source of learning, one scale for all; what is beyond it is said."""
    where = {"reward": reward, "n_embd": matrix.n_embd}
    shown = {
        title: [m for m in methods if m in matrix.methods or m.startswith("best")]
        for title, methods in PANELS.items()
    }
    figure, axes = plt.subplots(2, 2, figsize=(11.5, 8.6), sharex=True, sharey=True)
    for axis, (title, methods) in zip(axes.flat, shown.items(), strict=True):
        plot_optimum(axis, done, **where)
        for method in methods:
            plot(axis, method_curve(done, method, **where), method, **style(method))
        axis.set_title("learns from " + title, fontsize=11.5)
        axis.legend(fontsize=9.5, loc="lower right")
    right = max(
        [*method_curve(done, "optimum", **where)[:, 0], 3.5]
        + [p[0] for ms in shown.values() for m in ms for p in method_curve(done, m, **where)]
    )
    axes[0, 0].set_xlim(0, right * 1.03)
    for axis in axes[1]:
        axis.set_xlabel("KL(π‖sft), nats; of best-of-n: log n − (n−1)/n")
    for axis in axes[:, 0]:
        axis.set_ylabel(f"oracle reward: {reward}")
    finish(plt, figure, path)


def draw_steps(plt, done: dict, matrix, reward: str, path: Path) -> None:
    """Mean paths over training, a line per method and beta, from sft to the last step."""
    where = {"reward": reward, "n_embd": matrix.n_embd}
    figure, axes = plt.subplots(2, 2, figsize=(11.5, 8.6), sharex=True, sharey=True)
    for axis, (title, methods) in zip(axes.flat, PANELS.items(), strict=True):
        plot_optimum(axis, done, **where)
        for method in methods:
            rows = only(done["rows"], method=method, n_pairs=None, **where)
            for i, beta in enumerate(sorted({row["beta"] for row in rows})):
                steps = sorted([[r["step"], r["kl"], r["oracle"]] for r in only(rows, beta=beta)])
                by_step = itertools.groupby(steps, lambda s: s[0])
                path_ = np.array([np.mean(list(at), axis=0)[1:] for _, at in by_step])
                points = np.concatenate([sft_point(done, **where)[:, :2], path_])
                look = style(method) | {"ms": 3.5, "lw": 1.2}
                axis.plot(*points.T, label=method if i == 0 else None, **look)
        axis.set_title("learns from " + title, fontsize=11.5)
        axis.legend(fontsize=9.5, loc="lower right")
    axes[0, 0].set_xlim(left=0)
    for axis in axes[1]:
        axis.set_xlabel("KL(π‖sft), nats")
    for axis in axes[:, 0]:
        axis.set_ylabel(f"oracle reward: {reward}")
    finish(plt, figure, path)


def draw_density(plt, done: dict, matrix, reward: str, path: Path) -> None:
    """log π/sft against log π*/sft of completions of one prompt, each a dot; medians in bins."""
    rows = only(done["density"], reward=reward, n_embd=matrix.n_embd)
    betas = sorted({row["beta"] for row in rows})
    beta = betas[len(betas) // 2]
    rows = {row["method"]: row for row in only(rows, beta=beta)}
    methods = [m for m in DENSITY if m in rows]
    width = 3.6 * len(methods)
    figure, axes = plt.subplots(1, len(methods), figsize=(width, 4.2), sharey=True, squeeze=False)
    for axis, method in zip(axes[0], methods, strict=True):
        x, y = (np.array(rows[method][k]) for k in ("log_ratio_optimum", "log_ratio"))
        axis.plot(x, y, ".", color=color(method), alpha=0.3, ms=4)
        ends = [min(x.min(), y.min()), max(x.max(), y.max())]
        axis.plot(ends, ends, color=INK, lw=1)
        edges = np.quantile(x, np.linspace(0, 1, 9))
        place = np.clip(np.searchsorted(edges, x, "right") - 1, 0, 7)
        middle = [(np.median(x[place == b]), np.median(y[place == b])) for b in set(place)]
        axis.plot(*zip(*sorted(middle), strict=True), "o-", color=color(method), mec="white", ms=7)
        axis.set_title(f"{method}\nKL(π‖sft) = {rows[method]['kl']:.2f}", fontsize=11)
        axis.set_xlabel("log π*/sft")
    axes[0, 0].set_ylabel(f"log π/sft     ({reward}, β = {beta:g})")
    finish(plt, figure, path)


def draw_efficiency(plt, done: dict, matrix, path: Path) -> None:
    """Oracle reward at a KL that all methods reach with most counts, over labelled pairs."""
    rewards = [r for r, _ in matrix.betas if r in matrix.efficiency_rewards]
    figure, axes = plt.subplots(1, len(rewards), figsize=(5.6 * len(rewards), 4.4), squeeze=False)
    for axis, reward in zip(axes[0], rewards, strict=True):
        rows = only(done["efficiency"], reward=reward)
        if not rows:
            continue
        reached = {kl: len(only(rows, kl=kl)) for kl in {row["kl"] for row in rows}}
        kl = max(k for k in reached if reached[k] >= 0.9 * max(reached.values()))
        for method in matrix.efficiency:
            own = only(rows, method=method, kl=kl)
            means = []
            for n in sorted({row["pairs"] for row in own}):
                means.append((n, *mean_se([row["oracle"] for row in only(own, pairs=n)])))
            if means:
                n, y, dy = zip(*means, strict=True)
                axis.errorbar(n, y, yerr=dy, label=method, capsize=2, **style(method))
        best = only(done["matched"], reward=reward, kl=kl, method="optimum")
        start = sft_point(done, reward=reward, n_embd=matrix.n_embd)[0, 1]
        if best:
            axis.axhline(best[0]["oracle"], color=INK, lw=2, label="the optimum π*")
        axis.axhline(start, color=GREY, lw=1, ls=":", label="sft")
        axis.set_xscale("log", base=2)
        axis.set_xlabel("labelled pairs")
        axis.set_ylabel(f"oracle reward: {reward}, at KL {kl:g}")
        axis.legend(fontsize=9.5)
    finish(plt, figure, path)


def draw_calibration(plt, done: dict, matrix, path: Path) -> None:
    """Per reward a row: a panel per width with the optimum's frontier of that width's own sft."""
    rewards = [reward for reward, _ in matrix.betas]
    widths = sorted({*matrix.widths, matrix.n_embd})
    shape = {"nrows": len(rewards), "ncols": len(widths), "squeeze": False}
    size = (4.2 * len(widths), 3.7 * len(rewards))
    figure, axes = plt.subplots(**shape, figsize=size, sharex="row")
    for line, reward in zip(axes, rewards, strict=True):
        for axis, width in zip(line, widths, strict=True):
            where = {"reward": reward, "n_embd": width}
            plot_optimum(axis, done, **where)
            for method in ("exo-rw-oracle", "dpo-rw-oracle"):
                plot(axis, method_curve(done, method, **where), method, **style(method))
            axis.set_title(f"n_embd {width}", fontsize=11.5)
            axis.set_xlim(left=0)
            axis.set_xlabel("KL(π‖sft), nats")
        line[0].set_ylabel(f"oracle reward: {reward}")
        line[0].legend(fontsize=9.5)
    finish(plt, figure, path)


def draw_all(done: dict, matrix, out: Path) -> None:
    plt = pyplot()
    if plt is None:
        return
    for reward, _ in matrix.betas:
        draw_frontier(plt, done, matrix, reward, out / f"frontier-{reward}.png")
        draw_steps(plt, done, matrix, reward, out / f"steps-{reward}.png")
        if only(done["density"], reward=reward):
            draw_density(plt, done, matrix, reward, out / f"density-{reward}.png")
    if done["efficiency"]:
        draw_efficiency(plt, done, matrix, out / "efficiency.png")
    if matrix.widths:
        draw_calibration(plt, done, matrix, out / "calibration.png")
