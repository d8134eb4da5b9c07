"""
The exact world's figures, from what results.json and sweep.json hold, for light and dark pages.

    python -m experiments.toy.figures       draws those of assets/toy again (not the animation)

They are about 10 inches wide, so that a page of 880 pixels shows 10 points as 12 pixels.

One colour says the direction of the KL: red is EXO's (the exact reverse KL: pale), blue DPO's
(forward: pale), violet RLOO. Where lines could be confused, solid is rewards of sft's draws, dashed
the policy's own draws, dotted pairs.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch

from exo import dpo_loss, exo_loss, preference_target
from experiments.common import GREY, THEMES, distinct, inks, only, pyplot, save, stat, tidy

COLORS = {"exo": "#d1495b", "dpo": "#3b82b8", "reverse": "#e39aa5", "forward": "#8fbfe0"}
COLORS["rloo"] = "#8e6bbf"


def color(method: str) -> str:
    return COLORS[method.split("-")[0]]


def show(axis, logps: list[float], limit: float | None = None) -> None:
    """A policy as an image: brightness is the square root of pi, so that faint mass shows."""
    root = np.exp(np.array(logps) / 2)
    side = math.isqrt(len(root))
    axis.imshow(root.reshape(side, side), cmap="magma", vmin=0, vmax=limit or root.max())
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def over_seeds(axis, rows: list[dict], x: str, y: str, **style) -> None:
    """Mean and standard error of column y at each value of column x."""
    places = sorted(distinct(rows, x))
    stats = [stat(rows, y, **{x: place}) for place in places]
    axis.errorbar(places, [mean for mean, _ in stats], [error for _, error in stats], **style)


# --------------------------------------------------------------------------------------------------
# Of results.json

HERO = {  # EXO's panel and DPO's below each head
    "2 draws of sft": ("exo-rw 2", "dpo-rw 2"),
    "64 draws of sft": ("exo-rw 64", "dpo-rw 64"),
    "2 own draws": ("exo-online 2", "dpo-online 2"),
    "64 own draws": ("exo-online 64", "dpo-online 64"),
    "exact gradient": ("reverse-kl-descent", "forward-kl-descent"),
    "best fit known": ("reverse-kl", "forward-kl"),
}


def draw_hero(plt, results: dict):
    pictures, rows = results["pictures"], only(results["rows"], seed=0)
    limit = math.exp(max(pictures["pi-star"]) / 2)
    ratios = {"width_ratios": [1, 0.16, *[1] * len(HERO)]}  # the narrow column names the rows
    figure, axes = plt.subplots(2, 2 + len(HERO), figsize=(10.4, 4.25), gridspec_kw=ratios)
    figure.subplots_adjust(left=0.004, right=0.996, top=0.94, bottom=0.1, wspace=0.07, hspace=0.47)
    for axis, name, text in (
        (axes[0, 1], "exo", "EXO, reverse"),
        (axes[1, 1], "dpo", "DPO, forward"),
    ):
        axis.set_axis_off()
        style = {"fontsize": 12, "color": COLORS[name], "va": "center", "ha": "center"}
        axis.text(0.5, 0.5, f"{text} KL", rotation=90, **style)
    columns = {"sft, the start": ("sft", "pi-star"), **HERO}
    for pair, (head, names) in zip(axes.T[[0, *range(2, 8)]], columns.items(), strict=True):
        for axis, name in zip(pair, names, strict=True):
            show(axis, pictures[name], None if name == "sft" else limit)
            method, K = [*name.split(), None][:2]
            (row,) = only(rows, method=method, K=K and int(K))
            axis.set_xlabel(f"{100 * row['on']:.0f} % on bumps\nreward {row['reward']:.2f}")
        pair[0].set_title(head, fontsize=11)
    axes[1, 0].set_title("π*, the optimum", fontsize=11)
    return figure


def draw_losses(plt, _):
    """Each loss of a pair and its gradient, against the margin; nothing is fitted."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    for name, loss, eps in (("EXO", exo_loss, 1e-3), ("DPO", dpo_loss, 0.0)):
        margin = torch.linspace(-10, 10, 401, dtype=torch.float64, requires_grad=True)
        pairs = torch.stack([margin, torch.zeros_like(margin)], dim=-1)[:, None]
        zeros = torch.zeros(1, 2, dtype=torch.float64)
        values = torch.stack([loss(pair, zeros, preference_target(eps)) for pair in pairs])
        (slope,) = torch.autograd.grad(values.sum(), margin)
        for axis, y in zip(axes, (values, slope), strict=True):
            label = f"{name}, ε = {eps:g} (default)"
            line = {"color": COLORS[name.lower()], "lw": 2, "label": label}
            axis.plot(margin.detach(), y.detach(), **line)
    for axis, what in zip(axes, ("loss", "gradient in the margin"), strict=True):
        axis.set(xlabel="margin: β_π × (log-ratio of chosen − of rejected)", ylabel=what)
    axes[0].legend()
    note = "confidently wrong:\nEXO's vanishes,\nDPO's stays near −1"
    axes[1].text(-9.9, -1.4, note, va="center", fontsize=10)
    return tidy(figure)


def animate(plt, star: list[float], film: list[dict], path: Path) -> None:
    """EXO and DPO at K = 64 while they learn, beside the optimum; dark, for both kinds of page."""
    from PIL import Image  # comes with matplotlib

    with plt.rc_context(inks(*THEMES["-dark"])):
        figure, axes = plt.subplots(1, 3, figsize=(8.4, 3.2), dpi=90)
        figure.subplots_adjust(left=0.01, right=0.99, top=0.88, bottom=0.1, wspace=0.05)
        heads = {
            "π*, the optimum": GREY,
            "EXO, K = 64": COLORS["exo"],
            "DPO, K = 64": COLORS["dpo"],
        }
        for axis, (head, tone) in zip(axes, heads.items(), strict=True):
            show(axis, star)
            axis.set_title(head, color=tone, fontsize=13)
        frames = []
        for shot in film:
            axes[0].set_xlabel(f"step {shot['step']}")
            for axis, logps, on in zip(axes[1:], shot["logps"], shot["on"], strict=True):
                side = math.isqrt(len(logps))
                axis.images[0].set_data(np.exp(np.array(logps) / 2).reshape(side, side))
                axis.set_xlabel(f"{on:.0%} on a bump")
            figure.canvas.draw()
            pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]
            frames.append(Image.fromarray(pixels).quantize(128))
        plt.close(figure)
    temporary, times = path.with_suffix(".tmp.gif"), [120] * (len(frames) - 1) + [3000]  # ms
    frames[0].save(temporary, save_all=True, append_images=frames[1:], duration=times, loop=0)
    temporary.replace(path)


def draw_results(plt, results: dict, film: list[dict], out: Path) -> None:
    save(plt, draw_hero, results, out / "picture.png")
    save(plt, draw_losses, results, out / "losses.png")
    animate(plt, results["pictures"]["pi-star"], film, out / "training.gif")


# --------------------------------------------------------------------------------------------------
# Of sweep.json


def draw_directions(plt, done: dict):
    """Thin lines are seeds."""
    rows, places = done["directions"], distinct(done["directions"], "place")
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.6))
    axes = axes.flatten()
    panels = [*((place, "to_J") for place in places), (places[1], "distance")]
    for axis, (place, y) in zip(axes, panels, strict=True):
        here = only(rows, place=place)
        for method in ("exo-rw", "dpo-rw"):
            for seed in distinct(rows, "seed"):
                own = only(here, method=method, seed=seed)
                x, values = [row["K"] for row in own], [row[y] for row in own]
                axis.plot(x, values, color=color(method), lw=0.8, alpha=0.4)
            style = {"color": color(method), "fmt": "o-", "ms": 4, "label": method[:3].upper()}
            over_seeds(axis, only(here, method=method), "K", y, **style)
        axis.set_xscale("log", base=2)
        axis.set_xticks((2, 8, 32, 128), ("2", "8", "32", "128"))
        axis.set_title(f"{place}, KL(π‖π*) {stat(here, 'reverse_kl')[0]:.1f}", fontsize=12)
        axis.set_xlabel("K")
        if y == "to_J":
            forward = stat(here, "forward_to_J")[0]
            axis.axhline(forward, color=COLORS["forward"], ls="--", label="exact forward KL")
            axis.axhline(0, color=GREY, lw=0.8)
            axis.set_ylim(-1.05, 1.05)
    axes[3].set_yscale("log")
    sizes = distinct(rows, "K")
    axes[3].plot(sizes, [2 / K for K in sizes], color=GREY, ls=":", label="slope of 1 / K")
    axes[3].set_title(f"{places[1]}: distance to each one's limit", fontsize=12)
    axes[3].legend(fontsize=10, loc="lower left")
    for axis in axes[:3]:
        axis.set_ylabel("cosine with the gradient of J")
    note = "bars: standard error; thin: each seed"
    axes[0].legend(fontsize=10, loc="lower left", title=note, title_fontsize=10)
    return tidy(figure)


FRONTIERS = {
    "rewards, sft's draws": [("exo-rw", 64), ("dpo-rw", 64), ("exo-rw", 2), ("dpo-rw", 2)],
    "rewards, own draws": [(f"{name}-online", K) for K in (64, 2) for name in ("exo", "dpo")],
    "pairs; ε = 0.119 (EXO), 0 (DPO)": [
        (f"{name}-{kind}", 2) for kind in ("pref", "online-pref") for name in ("exo", "dpo")
    ],
}


def draw_frontier(plt, done: dict):
    """Every dot is a measured policy; large ones are means over the seeds that reached this KL."""
    figure, axes = plt.subplots(1, 3, figsize=(10.4, 4.6), sharey=True)
    best = only(done["frontier"], method="pi-star")
    betas = distinct(best, "beta")
    star = [[stat(best, y, beta=b)[0] for b in betas] for y in ("kl_sft", "reward")]
    frame = {"frameon": True, "framealpha": 0.9, "edgecolor": "none", "borderpad": 0.2}
    frame |= {"fontsize": 10, "title": "large: means over seeds", "title_fontsize": 10}
    for axis, (head, methods) in zip(axes, FRONTIERS.items(), strict=True):
        axis.plot(*star, color=plt.rcParams["text.color"], lw=1.6, label="π*")
        for i, (method, K) in enumerate(methods):
            tone = color(method)
            style = {"markerfacecolor": tone if i < 2 else "none", "markeredgecolor": tone}
            own = only(done["frontier"], method=method, K=K)
            x, y = ([row[name] for row in own] for name in ("kl_sft", "reward"))
            axis.plot(x, y, "os"[i // 2], ms=3, alpha=0.35, **style)
            style |= {"fmt": "os"[i // 2], "ms": 8, "color": tone, "label": f"{method}, K = {K}"}
            over_seeds(axis, only(done["matched"], method=method, K=K), "target", "reward", **style)
        axis.set(title=head, xlim=(0, 4), ylim=(-5, 0), xlabel="KL(π‖sft), nats")
        axis.legend(loc="lower right", handletextpad=0.2, **frame)
    axes[0].set_ylabel("E[r]")
    return tidy(figure)


def draw_capacity(plt, done: dict):
    """Above: seed 0 at each width. Below: all seeds (dots) and their means."""
    rows, widths = done["capacity"], distinct(done["capacity"], "n_embd")
    figure = plt.figure(figsize=(10.4, 6.2))
    top, below = figure.subfigures(2, 1, height_ratios=(3.9, 3.3))
    axes = top.subplots(2, len(widths), squeeze=False)
    top.subplots_adjust(left=0.04, right=0.995, top=0.92, bottom=0.02, wspace=0.06, hspace=0.06)
    for line, method in zip(axes, ("exo-rw", "dpo-rw"), strict=True):
        for axis, width in zip(line, widths, strict=True):
            (row,) = only(rows, method=method, K=64, n_embd=width, seed=0)
            show(axis, row["logps"], limit=0.2)
        line[0].set_ylabel(f"{method[:3].upper()}, K = 64", color=color(method), fontsize=12)
    for axis, width in zip(axes[0], widths, strict=True):
        axis.set_title(f"n_embd {width}", fontsize=12)
    plots = below.subplots(1, 3)
    below.subplots_adjust(left=0.06, right=0.99, top=0.97, bottom=0.17, wspace=0.25)
    labels = {"reverse_kl": "KL(π‖π*), nats", "on": "mass on a bump", "modes": "bumps held, of 6"}
    for axis, (name, label) in zip(plots, labels.items(), strict=True):
        for method in ("exo-rw", "dpo-rw", "reverse-kl", "forward-kl"):
            K = 64 if method.endswith("rw") else None
            own = only(rows, method=method, K=K)
            x, y = ([row[column] for row in own] for column in ("n_embd", name))
            axis.plot(x, y, ".", color=color(method), alpha=0.35, ms=4)
            text = f"{method}, K = 64" if K else f"{method}, best fit"
            style = {"fmt": "-" if K else "--", "color": color(method), "label": text}
            over_seeds(axis, own, "n_embd", name, **style)
        axis.set(xlabel="n_embd", ylabel=label)
        axis.grid(alpha=0.25)
    plots[0].legend(fontsize=10)
    plots[1].text(4.2, 0.4, "dots: each seed\nbars: standard error", fontsize=10)
    return figure


def draw_efficiency(plt, done: dict):
    """The legend has the K that a method was given, at each budget where they differ."""
    figure, axis = plt.subplots(figsize=(10, 4.6))
    for method in distinct(done["efficiency"], "method"):
        own = only(done["efficiency"], method=method)
        line = ":" if "pref" in method else "-" if method.endswith("rw") else "--"
        given = [only(own, completions=n)[0]["K"] for n in distinct(own, "completions")]
        label = f"{method}, K = {', '.join(map(str, given if len({*given}) > 1 else given[:1]))}"
        style = {"fmt": f"o{line}", "color": color(method), "label": label, "ms": 4}
        over_seeds(axis, own, "completions", "regret", **style)
    axis.set(xscale="log", yscale="log", xlabel="completions read and rated")
    axis.set_ylabel("regret J(π*) − J(π)")
    ticks = (0.3, 0.5, 1, 2)
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.yaxis.set_minor_formatter("")
    budgets = distinct(done["efficiency"], "completions")
    axis.set_xticks(budgets, [f"{budget:,}" for budget in budgets])
    axis.xaxis.set_minor_locator(plt.NullLocator())
    note = "bars: standard error;\nK: at each budget"
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), title=note)
    return tidy(figure)


SWEPT = {
    "directions": draw_directions,
    "frontier": draw_frontier,
    "capacity": draw_capacity,
    "efficiency": draw_efficiency,
}


if __name__ == "__main__":
    folder, plt = Path("assets/toy"), pyplot()
    results, swept = (json.loads((folder / f"{x}.json").read_bytes()) for x in ("results", "sweep"))
    for name, draw in {"picture": draw_hero, "losses": draw_losses}.items():
        save(plt, draw, results, folder / f"{name}.png")
    for name, draw in SWEPT.items():
        save(plt, draw, swept, folder / f"{name}.png")
