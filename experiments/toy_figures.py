"""
The toy's figures, one function each: from what results.json and sweep.json hold to a PNG.

They know rows and curves, never how these were fitted; which K, beta or n_embd there is to draw is
read from the data. matplotlib is optional: `pyplot` returns None without it. Colours tell the
direction of the KL everywhere: red is EXO (exact reverse KL: pale), blue DPO (forward: pale).
"""

import math
from pathlib import Path

import numpy as np

from experiments.toy import by_method, column, mean_se

INK, GREY = "#222222", "#8a8a8a"
COLORS = {"exo": "#d1495b", "dpo": "#2e6f9e", "reverse": "#e8a5ae", "forward": "#9cc3de"}
PANELS = {  # of the picture, in this order
    "sft": "sft",
    "pi-star": "π*, the optimum",
    "reverse-kl": "exact reverse KL",
    "forward-kl": "exact forward KL",
    "exo-rw": "EXO",
    "dpo-rw": "DPO",
}


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
        axis.set_title(PANELS[name] + K, fontsize=15, pad=8, color=color(name) if K else INK)
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
# Of the sweep


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
    sizes = sorted({row["K"] for row in rows if row["K"]})
    figure, axis = plt.subplots(figsize=(7.5, 4.6))
    for method, style in (("exo-rw", "o-"), ("dpo-rw", "o-"), ("exo-online", "s--")):
        stats = [mean_se(column(rows, method, K, "reverse_kl")) for K in sizes]
        mean, se = zip(*stats, strict=True)
        axis.errorbar(sizes, mean, yerr=se, fmt=style, color=color(method), label=method, capsize=2)
    for method in ("reverse-kl", "forward-kl"):
        mean, _ = mean_se(column(rows, method, None, "reverse_kl"))
        axis.axhline(mean, color=color(method), ls=":", lw=2, label=f"exact {method}")
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [str(K) for K in sizes])
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
        for beta in sorted({row["beta"] for row in own}):
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
    widths = sorted({gap["n_embd"] for gap in done["gaps"]})
    (K,) = {row["K"] for row in done["width"] if row["method"] == "exo-rw"}
    figure, axis = plt.subplots(figsize=(7.5, 4.2))
    for method, label in (
        ("reverse-kl", "exact reverse - exact forward"),
        ("exo-rw", f"EXO - DPO, K = {K}"),
    ):
        stats = []
        for n_embd in widths:
            gaps = [
                g["gap"] for g in done["gaps"] if (g["method"], g["n_embd"]) == (method, n_embd)
            ]
            stats.append(mean_se([g for g in gaps if g is not None] or [math.nan]))
        mean, se = zip(*stats, strict=True)
        axis.errorbar(widths, mean, yerr=se, fmt="o-", color=color(method), label=label, capsize=2)
    axis.axhline(0, color=GREY, lw=1)
    axis.set_xscale("log", base=2)
    axis.set_xticks(widths, [str(n) for n in widths])
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
