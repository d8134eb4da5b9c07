"""
The text world's figures: from what results.json holds to PNGs, for a light page and a dark one.

    python -m experiments.text.figures     draws those of assets/text again

Red is EXO, blue DPO, green PPO, π* has the colour of the text; a marker says what a method learned
from. A small point is one seed's policy, a line joins the medians of a target.
"""

import functools
import json
from pathlib import Path

import numpy as np

from experiments.common import distinct, only, pyplot, save, tidy
from experiments.text.constants import KLS, LABELS, METHODS, TARGETS, starts

COLORS = {"exo": "#d1495b", "dpo": "#2e6f9e", "ppo": "#3f8f5b"}
MARKERS = {"pref": "^", "fast": "v", "rw": "o", "online": "D", "ppo": "P"}
SHADES = {"praise": "#3f8f5b", "mixed": "#c9c9c9", "pan": "#d1495b", "broken": "#777777"}
NAMES = {
    "oracle": "oracle reward, nats",
    "well_formed": "share of well-formed text",
    "win_rm": "wins against sft by the reward model",
    "win_oracle": "wins against sft by the oracle",
}
RATED = [method for method in METHODS if not method.endswith("pref")]
PANELS = {  # of figures along KL: (title, quantity, methods) of each panel
    "methods": (
        ("labelled pairs", "oracle", ("exo-pref", "dpo-pref", "exo-fast-pref")),
        ("sft's draws, rated", "oracle", ("exo-rw", "dpo-rw")),
        ("own draws, rated", "oracle", ("exo-online", "dpo-online")),
    ),
    "draws": (("", "oracle", RATED), ("", "well_formed", RATED)),
    "wins": (("", "win_rm", METHODS), ("", "win_oracle", METHODS)),
}


def style(method: str) -> dict:
    first, kind = (*method.split("-"), method)[:2]
    return {"color": COLORS[first], "marker": MARKERS[kind], "ms": 6, "lw": 1.6, "label": method}


def columns(rows: list[dict], *names: str) -> tuple[list, ...]:
    return tuple([row[name] for row in rows] for name in names)


def along_kl(plt, done: dict, name: str):
    """Quantities over the judged KL, on sentiment."""
    panels, cells = PANELS[name], only(done["cells"], reward="sentiment", labels=0, K=8)
    figure, axes = plt.subplots(1, len(panels), figsize=(12, 4.3), sharey=name != "draws")
    best = only(done["optimum"], reward="sentiment", labels=0)
    for axis, (title, quantity, methods) in zip(axes, panels, strict=True):
        means = [np.mean(columns(only(best, target=t), quantity)) for t in KLS]
        look = {"color": plt.rcParams["text.color"], "lw": 2, "label": "the optimum π*"}
        axis.plot(KLS, means, zorder=1, **look)
        for method in methods:
            own = [only(cells, method=method, target=t) for t in KLS]
            points, look = [columns(rows, "kl", quantity) for rows in own if rows], style(method)
            for x, y in points:
                axis.scatter(x, y, s=12, color=look["color"], alpha=0.35, lw=0)
            if points:
                axis.plot(*zip(*[np.median(x, axis=1) for x in points], strict=True), **look)
        axis.set_title(title, fontsize=11.5)
        axis.set_xscale("log")
        axis.set_xticks(KLS, [f"{kl:g}" for kl in KLS])
        axis.minorticks_off()
        axis.set(xlabel="KL(π‖sft), nats", ylabel=NAMES[quantity])
        axis.legend(fontsize=9)
    return tidy(figure)


def overoptimisation(plt, done: dict, name: str):
    """Both rewards along KL as the pull grows, medians over seeds at each beta, because one broken
    run carries a mean; a panel for the reward model's labels."""
    figure, axes = plt.subplots(1, len(LABELS), figsize=(13, 4.4), sharey=True, sharex=True)
    fits = only(done["fits"], grid=True)
    for axis, labels in zip(axes, LABELS, strict=True):
        for method in distinct(fits, "method"):
            rows, look = only(fits, method=method, labels=labels), style(method)
            axis.scatter(*columns(rows, "kl", "oracle"), s=10, color=look["color"], alpha=0.3, lw=0)
            own = [only(rows, beta=beta) for beta in sorted(distinct(rows, "beta"), reverse=True)]
            kls = [np.median(columns(some, "kl")) for some in own]
            for quantity, line in (("oracle", "-"), ("rm", ":")):
                y = [np.median(columns(some, quantity)) for some in own]
                axis.plot(kls, y, **look | {"ls": line, "label": f"{method}: {quantity}"})
        axis.set_title(f"reward model of {labels or 'all'} labels", fontsize=11.5)
        axis.set_xscale("symlog", linthresh=1)
        ticks = (0, 0.5, 1, 2, 5, 10, 50)
        axis.set(xlabel="KL(π‖sft), nats", xticks=ticks, xticklabels=ticks)
    axes[0].set_ylabel("reward, nats")
    axes[0].legend(fontsize=8.5)
    return tidy(figure)


def modes(plt, done: dict, name: str):
    """Which reviews a policy writes on conviction, beside what π* writes."""
    figure, axis = plt.subplots(figsize=(7.5, 4.4))
    where = {"reward": "conviction", "target": TARGETS["conviction"][0]}
    bars = {"π*": only(done["optimum"], **where)}
    asked = [method for method in METHODS if starts(method, where["reward"])]
    bars |= {method: only(done["cells"], method=method, **where) for method in asked}
    for y, rows in enumerate(bars.values()):
        left = 0.0
        for kind, color in SHADES.items() if rows else ():
            share = np.mean([row.get(kind, 1 - row["well_formed"]) for row in rows])
            axis.barh(y, share, left=left, color=color, label=kind if not y else None)
            left += share
    axis.set_yticks(range(len(bars)), bars)
    axis.invert_yaxis()
    axis.set_xlabel("share of texts, conviction at KL {target:g}".format(**where))
    axis.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    return tidy(figure)


FIGURES = dict.fromkeys(PANELS, along_kl)
FIGURES |= {"overoptimisation": overoptimisation, "modes": modes}


def draw_all(done: dict, out: Path) -> None:
    """A figure for each question that was asked, but for K, which a table tells."""
    plt, asked = pyplot(), done["settings"]["matrix"]["questions"]
    for name in FIGURES if plt else ():
        if name in asked:
            save(plt, functools.partial(FIGURES[name], name=name), done, out / f"{name}.png")


if __name__ == "__main__":
    assets = Path(__file__).resolve().parents[2] / "assets" / "text"
    draw_all(json.loads((assets / "results.json").read_bytes()), assets)
