"""
The frontier's figures, one function each: from what results.json holds to a PNG.

Red is EXO, blue DPO, green PPO, ochre best-of-n, black the optimum; a marker says what a method
learned from. Bars are standard errors over seeds.
"""

from pathlib import Path

import numpy as np

from experiments.common import GREY, INK, finish, mean_se, pyplot
from experiments.frontier import CALIBRATION

COLORS = {"exo": "#d1495b", "dpo": "#2e6f9e", "ppo": "#3f8f5b", "best": "#c28a1c", "optimum": INK}
SOURCES = {"pref": "^", "rw": "o", "oracle": "s", "online": "D", "n": "x", "ppo": "P"}
DENSITY = ("exo-rw-oracle", "dpo-rw-oracle", "exo-pref", "dpo-pref")
FARTHEST = 8.0  # KL that figures show
PANELS = {  # of the frontier, by what methods learn from
    "labelled pairs": ("exo-pref", "dpo-pref"),
    "the reward model": ("exo-rw", "dpo-rw", "best-of-n"),
    "the reward model, on their own draws": ("exo-online", "dpo-online", "ppo"),
    "the oracle": ("exo-rw-oracle", "dpo-rw-oracle", "best-of-n-oracle"),
}


def color(method: str) -> str:
    return COLORS.get(method.split("-")[0], GREY)


def style(method: str) -> dict:
    marker = SOURCES[method.split("-")[-1]]
    line = "--" if "online" in method else "-"
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
    return mean_curve(
        only(done["best_of_n"], method="best-of-n-oracle", n=1, **where), "n", quantity
    )[:1]


def judged_sft(done: dict, **where) -> np.ndarray:
    """sft's draws with the random numbers of the policies': where their frontiers begin."""
    return mean_curve(only(done["start"], **where), "n_embd")


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
        return np.concatenate([judged_sft(done, **where), points]) if len(points) else points
    return np.concatenate([sft_point(done, **where), points]) if len(points) else points


def plot(axis, points: np.ndarray, label: str, **style) -> None:
    if len(points):
        x, y, dx, dy = points.T
        axis.errorbar(x, y, yerr=dy, xerr=dx, label=label, capsize=2, elinewidth=1, **style)


def plot_optimum(axis, done: dict, **where) -> None:
    points = method_curve(done, "optimum", **where)
    if len(points):
        axis.plot(points[:, 0], points[:, 1], color=INK, lw=2.2, label="the optimum π*", zorder=1)


def kl_axis(axes, farthest: float) -> None:
    """KL on a square-root scale, in which an optimal frontier begins as a straight line, up to
    FARTHEST; y to fit what is seen, and the legend says of a curve that goes on how far."""
    right = min(farthest, FARTHEST)
    low, high = np.inf, -np.inf
    for axis in axes:
        axis.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
        axis.set_xlim(0, right * 1.05)
        ticks = [0]
        for t in (0.1, 0.25, 0.5, 1, 2, 3, 4, 6, 8):  # as many as there is room for
            if t <= right * 1.05 and np.sqrt(t) - np.sqrt(ticks[-1]) > 0.12 * np.sqrt(right):
                ticks.append(t)
        axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axis.set_xlabel("KL(π‖sft), nats")
        for line in axis.lines:
            x, y = (np.asarray(v, dtype=float) for v in line.get_data())
            y = y[(x <= right * 1.05) & np.isfinite(y)]
            if len(y) > 1:  # not a bar's cap
                low, high = min(low, y.min()), max(high, y.max())
    for axis in axes if low < high else ():
        axis.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))


def far(points: np.ndarray) -> str:
    """A note for the legend where a curve leaves the figure."""
    far = points[:, 0].max() if len(points) else 0.0
    return f" (on to KL {far:.0f})" if far > FARTHEST * 1.05 else ""


def panels(plt, done: dict, reward: str, title: str = "learns from "):
    """Four panels, one per source of learning: (figure, [(axis, its methods)])."""
    figure, axes = plt.subplots(2, 2, figsize=(11.5, 8.6), sharex=True, sharey=True)
    for axis, name in zip(axes.flat, PANELS, strict=True):
        axis.set_title(title + name, fontsize=11.5)
    for axis in axes[:, 0]:
        axis.set_ylabel(f"oracle reward: {reward}")
    return figure, list(zip(axes.flat, PANELS.values(), strict=True))


def draw_frontier(plt, done: dict, matrix, reward: str, path: Path) -> None:
    """Mean frontier of each method over beta, with standard errors, and the optimum's."""
    where = {"reward": reward, "n_embd": matrix.n_embd}
    figure, parts = panels(plt, done, reward)
    farthest = 0.5
    for axis, methods in parts:
        plot_optimum(axis, done, **where)
        for method in methods:
            points = method_curve(done, method, **where)
            plot(axis, points, method + far(points), **style(method))
            farthest = max([farthest, *points[:, 0]])
    kl_axis([axis for axis, _ in parts], farthest)
    for axis, _ in parts:
        axis.legend(fontsize=9.5)
    parts[3][0].set_xlabel("KL(π‖sft), nats; of best-of-n: log n − (n−1)/n")
    finish(plt, figure, path)


def draw_steps(plt, done: dict, matrix, reward: str, path: Path) -> None:
    """Mean paths over training, a line per method and beta, from sft to the last step."""
    where = {"reward": reward, "n_embd": matrix.n_embd}
    figure, parts = panels(plt, done, reward)
    farthest = 0.5
    for axis, methods in parts:
        plot_optimum(axis, done, **where)
        for method in methods:
            rows = only(done["rows"], method=method, n_pairs=None, **where)
            for i, beta in enumerate(sorted({row["beta"] for row in rows})):
                points = mean_path(done, only(rows, beta=beta), **where)
                look = style(method) | {"ms": 3.5, "lw": 1.2}
                axis.plot(*points.T, label=method if i == 0 else None, **look)
                farthest = max([farthest, *points[:, 0]])
        axis.legend(fontsize=9.5)
    kl_axis([axis for axis, _ in parts], farthest)
    finish(plt, figure, path)


def mean_path(done: dict, rows: list[dict], **where) -> np.ndarray:
    """(steps, 2): mean KL and oracle reward over seeds at each step, beginning at sft."""
    points = []
    for step in sorted({row["step"] for row in rows}):
        at = only(rows, step=step)
        points.append([np.mean([row[k] for row in at]) for k in ("kl", "oracle")])
    return np.concatenate([judged_sft(done, **where)[:, :2], np.array(points)])


def draw_density(plt, done: dict, matrix, reward: str, path: Path) -> None:
    """log π/sft against log π*/sft of completions of one prompt, each a dot; medians in bins."""
    rows = only(done["density"], reward=reward, n_embd=matrix.n_embd)
    beta = rows[0]["beta"]
    rows = {row["method"]: row for row in rows}
    methods = [m for m in DENSITY if m in rows]
    width = 3.6 * len(methods)
    figure, axes = plt.subplots(
        1, len(methods), figsize=(width, 4.2), sharex=True, sharey=True, squeeze=False
    )
    for axis, method in zip(axes[0], methods, strict=True):
        x, y = (np.array(rows[method][k]) for k in ("log_ratio_optimum", "log_ratio"))
        axis.plot(x, y, ".", color=color(method), alpha=0.3, ms=4)
        ends = [x.min(), x.max()]
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
    """Oracle reward at the largest KL that most runs reach, over labelled pairs."""
    rewards = [r for r, _ in matrix.betas if r in matrix.efficiency_rewards]
    figure, axes = plt.subplots(1, len(rewards), figsize=(5.6 * len(rewards), 4.4), squeeze=False)
    for axis, reward in zip(axes[0], rewards, strict=True):
        rows = only(done["efficiency"], reward=reward)
        if not rows:
            continue
        reached = {kl: len(only(rows, kl=kl)) for kl in {row["kl"] for row in rows}}
        kl = max(k for k in reached if reached[k] == max(reached.values()))
        for method in matrix.efficiency:
            own = only(rows, method=method, kl=kl)
            means = []
            for n in sorted({row["pairs"] for row in own}):
                means.append((n, *mean_se([row["oracle"] for row in only(own, pairs=n)])))
            if means:
                n, y, dy = zip(*means, strict=True)
                axis.errorbar(n, y, yerr=dy, label=method, capsize=2, **style(method))
        best = only(done["matched"], reward=reward, kl=kl, method="optimum")
        if best:
            axis.axhline(best[0]["oracle"], color=INK, lw=2, label="the optimum π*")
        for start in judged_sft(done, reward=reward, n_embd=matrix.n_embd)[:, 1]:
            axis.axhline(start, color=GREY, lw=1, ls=":", label="sft")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.set_xlabel("labelled pairs")
        axis.set_ylabel(f"oracle reward: {reward}, at KL {kl:g}")
        axis.legend(fontsize=9.5, loc="lower right", bbox_to_anchor=(1, 0.12))
    finish(plt, figure, path)


def draw_calibration(plt, done: dict, matrix, path: Path) -> None:
    """Per reward a row: a panel per width with the optimum's frontier of that width's own sft, one
    with the share of the optimum's gain over the width, and one with EXO's lead over DPO."""
    rewards = [reward for reward, _ in matrix.betas]
    widths = sorted({*matrix.widths, matrix.n_embd})
    shape = {"nrows": len(rewards), "ncols": len(widths) + 2, "squeeze": False}
    figure, axes = plt.subplots(**shape, figsize=(3.6 * len(widths) + 7.2, 3.7 * len(rewards)))
    for line, reward in zip(axes, rewards, strict=True):
        for axis, width in zip(line, widths, strict=False):
            where, farthest = {"reward": reward, "n_embd": width}, 0.25
            plot_optimum(axis, done, **where)
            for method in CALIBRATION:
                points = method_curve(done, method, **where)
                plot(axis, points, method + far(points), **style(method))
                farthest = max([farthest, *points[:, 0]])
            kl_axis([axis], farthest)
            axis.set_title(f"n_embd {width}", fontsize=11.5)
            axis.legend(fontsize=9)
        line[0].set_ylabel(f"oracle reward: {reward}")
        rows = only(done["calibration"], reward=reward)
        if rows:
            draw_shares(line[-2], rows, widths)
            draw_leads(line[-1], rows, widths)
    finish(plt, figure, path)


def draw_shares(axis, rows: list[dict], widths: list[int]) -> None:
    """Each method's share of the optimum's gain, at the smallest and the largest of the KLs that
    most runs reach."""
    reached = {kl: len(only(rows, kl=kl)) for kl in sorted({row["kl"] for row in rows})}
    all_there = [kl for kl in reached if reached[kl] == max(reached.values())]
    ends = dict.fromkeys((all_there[0], all_there[-1]))
    for kl, line in zip(ends, ("-", "--"), strict=False):
        for method in CALIBRATION:
            points = over_width(only(rows, kl=kl), widths, lambda r, m=method: r[m] / r["optimum"])
            look = style(method) | {"ls": line, "mfc": "white" if line == "--" else color(method)}
            errorbar(axis, points, label=f"{method}, KL {kl:g}", **look)
    axis.axhline(1, color=INK, lw=2)
    width_axis(axis, widths, "share of the optimum's gain over sft")


def draw_leads(axis, rows: list[dict], widths: list[int]) -> None:
    """EXO's lead over DPO at equal KL, over the width."""
    exo, dpo = CALIBRATION
    kls = sorted({row["kl"] for row in rows if row["kl"] <= 1})  # beyond, few arrive
    for kl, marker in zip(kls, "osD^v", strict=False):
        points = over_width(only(rows, kl=kl), widths, lambda r: r[exo] - r[dpo])
        errorbar(axis, points, fmt=marker + "-", ms=5, label=f"KL {kl:g}")
    axis.axhline(0, color=GREY, lw=1)
    width_axis(axis, widths, "EXO − DPO, in oracle reward")


def over_width(rows: list[dict], widths: list[int], value) -> list[tuple]:
    """[(width, mean, standard error)] over the rows of each width that has some."""
    own = {width: [value(row) for row in only(rows, n_embd=width)] for width in widths}
    return [(width, *mean_se(values)) for width, values in own.items() if values]


def errorbar(axis, points: list[tuple], **look) -> None:
    x, y, dy = zip(*points, strict=True)
    axis.errorbar(x, y, yerr=dy, capsize=2, **look)


def width_axis(axis, widths: list[int], name: str) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(widths, [str(width) for width in widths])
    axis.set_xlabel("n_embd of sft and policy")
    axis.set_ylabel(name)
    axis.legend(fontsize=8.5)


def draw_all(done: dict, matrix, out: Path) -> None:
    plt = pyplot()
    if plt is None:
        return
    for reward, _ in matrix.betas:
        draw_frontier(plt, done, matrix, reward, out / f"frontier-{reward}.png")
        draw_steps(plt, done, matrix, reward, out / f"steps-{reward}.png")
        if only(done["density"], reward=reward, n_embd=matrix.n_embd):
            draw_density(plt, done, matrix, reward, out / f"density-{reward}.png")
    if done["efficiency"]:
        draw_efficiency(plt, done, matrix, out / "efficiency.png")
    if matrix.widths and done["calibration"]:
        draw_calibration(plt, done, matrix, out / "calibration.png")
