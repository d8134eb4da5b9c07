"""
What `python train.py` runs: EXO and DPO where the optimal policy is known.

    python train.py            under a minute: a table, results.json, picture, animation, losses
    python train.py --sweep    minutes more: the curves of sweep.py, in sweep.json and figures

worlds.py says what the world is, fit.py how policies are trained, measures.py what is measured,
figures.py draws. Eight seeds, each with a world, weights and draws of its own, none chosen and none
left out; the pictures are of seed 0.
"""

import platform
from dataclasses import asdict
from pathlib import Path

import torch

from experiments.common import distinct, in_parallel, pyplot, write_json
from experiments.toy import figures, sweep
from experiments.toy.measures import SPEC, fit_worlds, table
from experiments.toy.worlds import CONSTANTS, Config


def run(out: str | Path, seeds: int = 8, sweeping: bool = False, config: Config | None = None):
    """The experiment into the folder `out` -> the content of results.json. Raises ValueError for
    less than one seed."""
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    out, config, every = Path(out), config or Config(), list(range(seeds))
    out.mkdir(parents=True, exist_ok=True)
    parts = in_parallel(fit_worlds, [(config, half, SPEC) for half in sweep.halves(every)])
    rows = [row for part in parts for row in part["rows"]]
    order = distinct(rows, "method", "K")
    rows.sort(key=lambda row: (order.index((row["method"], row["K"])), row["seed"]))
    results = {
        "config": asdict(config) | {"seeds": seeds} | CONSTANTS,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "worlds": sorted((w for part in parts for w in part["worlds"]), key=lambda w: w["seed"]),
        "rows": rows,
        "pictures": parts[0]["pictures"],
    }
    write_json(out / "results.json", results)
    print(table(rows))
    if plt := pyplot():
        figures.draw_results(plt, results, parts[0]["film"], out)
    if sweeping:
        sweep.sweep_all(out, every, config)
    print(f"\nWritten to {out}")
    return results
