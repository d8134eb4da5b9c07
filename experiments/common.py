"""
What both worlds use: means over seeds, files, workers, and how figures look.
"""

import json
import math
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import active_children, get_context
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from infra.rows import replacing

# --------------------------------------------------------------------------------------------------
# Rows: one dict per policy


def only(rows: list[dict], **where) -> list[dict]:
    return [row for row in rows if all(row[key] == value for key, value in where.items())]


def distinct(rows: list[dict], *keys: str) -> list:
    """The values of a key (tuples, for several) in the order in which they first appear."""
    found = dict.fromkeys(tuple(row[key] for key in keys) for row in rows)
    return [value if len(keys) > 1 else value[0] for value in found]


def mean_se(values) -> tuple[float, float]:
    """Mean and its standard error; 0, a bar without width, where one value leaves it unknown."""
    x = np.asarray(values, dtype=np.float64)
    return x.mean(), x.std(ddof=1) / math.sqrt(len(x)) if len(x) > 1 else 0.0


def stat(rows: list[dict], name: str, **where) -> tuple[float, float]:
    """mean_se of one column over the rows that are so."""
    return mean_se([row[name] for row in only(rows, **where)])


def write_json(path: Path, content: dict) -> None:
    """Compact, and whole or not at all. Raises InputError where the disk says no."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, allow_nan=False), encoding="utf-8")


# --------------------------------------------------------------------------------------------------
# Workers


def in_parallel(job: Callable, jobs: list[tuple], workers: int | None = None) -> list:
    """[job(*args) for args in jobs], in processes of one torch thread each: tensors as small as the
    toy's gain nothing from two. A process for each job, or so many workers that take the next one.
    A single process is this one."""
    workers = min(workers or len(jobs), len(jobs))
    if workers <= 1:
        return [job(*args) for args in jobs]
    start = {"initializer": start_worker, "initargs": (os.getpid(),)}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), **start) as pool:
        try:
            futures = [pool.submit(job, *args) for args in jobs]
            for future in as_completed(futures):
                future.result()  # the first failure is raised at once
            return [future.result() for future in futures]
        except BaseException:  # the exit of a pool waits for jobs that run, so they are ended
            for worker in active_children():
                worker.terminate()
            raise


def start_worker(parent: int) -> None:
    """One torch thread; and a watch that ends this worker with its parent, however that went."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore that a worker ended early leaves

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# --------------------------------------------------------------------------------------------------
# Figures

INK, GREY = "#222222", "#8a8a8a"
THEMES = {"": ("#1f2328", "#ffffff"), "-dark": ("#e6edf3", "#0d1117")}  # ink and paper of GitHub


def pyplot():
    """matplotlib.pyplot with our taste, or None and one line of advice."""
    try:
        import matplotlib
    except ImportError:
        print("No figures: `pip install matplotlib` and run again. The numbers are complete.")
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 11, "legend.frameon": False, "savefig.dpi": 160})
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    plt.rcParams.update(inks(INK, "white"))
    return plt


def inks(ink: str, paper: str) -> dict:
    written = ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    faces = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")
    return dict.fromkeys(written, ink) | dict.fromkeys(faces, paper) | {"axes.edgecolor": GREY}


def save(plt, draw: Callable, data: dict, path: Path) -> None:
    """draw(plt, data) -> figure, for a light page and a dark one (NAME-dark.png)."""
    for suffix, theme in THEMES.items():
        with plt.rc_context(inks(*theme)):
            figure = draw(plt, data)
            figure.savefig(path.with_name(f"{path.stem}{suffix}.png"))
            plt.close(figure)


def tidy(figure):
    for axis in figure.axes:
        axis.grid(alpha=0.25, axis="x" if axis.yaxis_inverted() else "both")
    figure.tight_layout()
    return figure


def finish(plt, figure, path: Path) -> None:
    tidy(figure).savefig(path)
    plt.close(figure)
