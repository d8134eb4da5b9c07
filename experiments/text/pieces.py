"""
The work cut into pieces: an sft, the labels of a reward and all that is made of them, a policy.

A piece has a folder in OUT/runs, and is finished when its result.json is there, so a stopped run
goes on where it was, and the number of processes changes speed alone. The folder keeps a hash of
all settings that lead to it; where they have changed, the piece is made anew.
"""

import hashlib
import itertools
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from experiments.common import in_parallel, write_json
from experiments.text import constants
from experiments.text.makers import MAKERS
from infra.rows import make_folder

VERSION = 3  # of what makers do and return: pieces of another are made anew


@dataclass(frozen=True)
class Piece:
    """One unit of work: `make`, a name in MAKERS, with the settings `spec`."""

    name: str
    make: str
    spec: dict

    @property
    def key(self) -> str:
        """A hash of all settings that lead to it."""
        return hashlib.sha256(json.dumps([self.make, self.spec]).encode()).hexdigest()[:16]


def plan(matrix: constants.Matrix) -> list[Piece]:
    """All pieces. A narrow sft is for calibration: it gets no reward model."""
    how = asdict(replace(matrix, betas=(), methods=(), seeds=0, widths=()))  # without what is run
    how["made_with"], pieces = [VERSION, constants.MADE_WITH], []
    for seed, width in itertools.product(range(matrix.seeds), (matrix.n_embd, *matrix.widths)):
        spec = {**how, "seed": seed, "n_embd": width, "sft": f"sft-s{seed}-w{width}"}
        pieces.append(Piece(spec["sft"], "sft", spec))
        for reward, betas in matrix.betas:
            wide, labels = width == matrix.n_embd, f"labels-{reward}-s{seed}-w{width}"
            own = {**spec, "reward": reward, "labels": labels, "rm": wide}
            pieces.append(Piece(labels, "labels", own))
            pieces += policies(own, matrix.methods if wide else constants.CALIBRATION, betas)
    return pieces


def policies(spec: dict, methods: tuple, betas: tuple) -> Iterator[Piece]:
    """One per method and beta, after the labels in `spec`."""
    for method, beta in itertools.product(methods, betas):
        rate = constants.METHODS[method][2] * (48 / spec["n_embd"])
        told = spec["seed"] == 0 and method in constants.DENSITY and beta == betas[len(betas) // 2]
        own = {"method": method, "beta": beta, "rate": rate, "density": told}
        name = f"{spec['labels'].replace('labels', 'policy')}-{method}-b{beta:g}"
        yield Piece(name, "policy", spec | own)


def load_piece(out: Path, piece: Piece) -> dict | None:
    """The result of a finished piece, None if it is not there or of other settings."""
    folder = out / "runs" / piece.name
    if not (folder / "result.json").exists() or (folder / "key").read_text() != piece.key:
        return None
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def work(out: Path, pieces: list[Piece]) -> None:
    """Make these pieces, one after the other. A stopped stage goes on only from what was made with
    the same settings."""
    torch.set_num_threads(1)  # the sums, and so the last bits, would depend on it
    for piece in pieces:
        folder, start = out / "runs" / piece.name, time.perf_counter()
        if not (folder / "key").exists() or (folder / "key").read_text() != piece.key:
            shutil.rmtree(folder, ignore_errors=True)
        make_folder(folder)
        (folder / "key").write_text(piece.key)
        result = MAKERS[piece.make](out / "runs", piece.name, piece.spec)
        write_json(folder / "result.json", result)
        print(f"{piece.name}: {time.perf_counter() - start:.0f} s", flush=True)


def make_all(out: Path, pieces: list[Piece], jobs: int) -> None:
    """Make what is missing, in `jobs` processes: first every sft, then what needs it."""
    for kind in MAKERS:
        todo = [p for p in pieces if p.make == kind and load_piece(out, p) is None]
        if todo:
            in_parallel(work, [(out, todo[i::jobs]) for i in range(min(jobs, len(todo)))])
