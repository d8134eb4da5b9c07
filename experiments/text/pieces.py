"""
The work: an sft for each seed, reward models, and curves, whose search asks for policies.

What is made is a piece: it has a folder in OUT/runs, and is finished when its result.json is there,
so a stopped run goes on where it was. The folder keeps a hash of all settings that lead to it;
where they have changed, the piece is made anew. A curve keeps nothing: its search is walked again,
and policies that are there answer at once. The number of workers changes speed alone.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from experiments.common import in_parallel, write_json
from experiments.text import constants
from experiments.text.constants import Curve, Matrix
from experiments.text.makers import MAKERS
from experiments.text.search import arrive
from infra.rows import make_folder

VERSION = 5  # of what makers do and return: pieces of another are made anew


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


def curves(matrix: Matrix) -> list[tuple[Curve, int]]:
    """Every (curve, seed), with all that some question wants of it; the longest first, so that no
    worker is left alone with one."""
    merged: dict[tuple[Curve, int], Curve] = {}
    for curve in (c for name in matrix.questions for c in constants.QUESTIONS[name][0]):
        bare = replace(curve, targets=(), betas=(), seeds=0)
        for seed in matrix.every_seed()[: curve.seeds]:
            whole = merged.get((bare, seed), bare)
            targets = tuple(sorted({*whole.targets, *curve.targets}))
            betas = tuple(sorted({*whole.betas, *curve.betas}, reverse=True))
            merged[bare, seed] = replace(whole, targets=targets, betas=betas)
    work = [(curve, seed) for (_, seed), curve in merged.items()]
    return sorted(work, key=lambda pair: -len(pair[0].targets) - len(pair[0].betas))


def sft(matrix: Matrix, seed: int) -> Piece:
    how = replace(matrix, questions=(), first_seed=0, seeds=0, fits=0)  # without what is run
    spec = {**asdict(how), "made_with": [VERSION, constants.MADE_WITH], "seed": seed}
    return Piece(f"sft-s{seed}", "sft", spec | {"sft": f"sft-s{seed}"})


def rm(matrix: Matrix, curve: Curve, seed: int) -> Piece:
    """The reward model that the policies of a curve learn from, or are judged by."""
    name = f"rm-{curve.reward}-s{seed}-n{curve.labels or 'all'}"
    spec = {**sft(matrix, seed).spec, "reward": curve.reward, "labels": curve.labels, "rm": name}
    return Piece(name, "rm", spec)


def fit(matrix: Matrix, curve: Curve, seed: int, beta: float) -> Piece:
    how = {**constants.METHODS[curve.method]._asdict(), "sentiment": None, "conviction": None}
    spec = {**rm(matrix, curve, seed).spec, **how, "K": curve.K, "beta": beta}
    name = f"{curve.method}-{curve.reward}-s{seed}-n{curve.labels or 'all'}-K{curve.K}-b{beta:g}"
    return Piece(name, "fit", spec)


def load(out: Path, piece: Piece) -> dict | None:
    """The result of a finished piece, None if it is not there or of other settings."""
    folder = out / "runs" / piece.name
    if not (folder / "result.json").exists() or (folder / "key").read_text() != piece.key:
        return None
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def make(out: Path, piece: Piece) -> dict:
    """The result of a piece, which is made if it is not there. A stopped stage goes on only from
    what was made with the same settings."""
    torch.set_num_threads(1)  # the sums, and so the last bits, would depend on it
    done = load(out, piece)
    if done is not None:
        return done
    folder, start = out / "runs" / piece.name, time.process_time()  # not what others take
    if not (folder / "key").exists() or (folder / "key").read_text() != piece.key:
        shutil.rmtree(folder, ignore_errors=True)
    make_folder(folder)
    (folder / "key").write_text(piece.key)
    result = MAKERS[piece.make](out / "runs", piece.name, piece.spec)
    write_json(folder / "result.json", result)
    told = f", KL {result['kl']:.3f}" if "kl" in result else ""
    print(f"{piece.name}{told}: {time.process_time() - start:.0f} s", flush=True)
    return result


def walk(
    matrix: Matrix, curve: Curve, seed: int, fitted: Callable[[Piece], dict]
) -> tuple[dict[float, float | None], dict[float, dict]]:
    """A curve's search, then its grid, which does not change what the search finds: the beta that
    each target has, and the result that each beta has."""
    results: dict[float, dict] = {}

    def kl(beta: float) -> float:
        results[beta] = fitted(fit(matrix, curve, seed, beta))
        return results[beta]["kl"]

    starts = constants.starts(curve.method, curve.reward)
    found = arrive({target: starts[target] for target in curve.targets}, kl, matrix.fits)
    for beta in curve.betas:
        kl(beta)
    return found, results


def run_curve(out: Path, matrix: Matrix, curve: Curve, seed: int, place: str) -> None:
    found, results = walk(matrix, curve, seed, lambda piece: make(out, piece))
    told = f"[{place}] {curve.method} on {curve.reward}, seed {seed}: {len(results)} policies"
    for target, beta in found.items():
        told += f"; KL {target:g}: " + (f"{results[beta]['oracle']:.2f}" if beta else "–")
    print(told, flush=True)


def make_all(out: Path, matrix: Matrix, jobs: int) -> None:
    """Make what is missing, in `jobs` processes: every sft, every reward model, every curve, in
    this order, which no worker needs to wait for long."""
    work = curves(matrix)
    models = {model.name: model for model in (rm(matrix, *pair) for pair in work)}
    todo = [(None, make, out, sft(matrix, seed)) for seed in matrix.every_seed()]
    todo += [(sft(matrix, m.spec["seed"]), make, out, m) for m in models.values()]
    for i, pair in enumerate(work):
        place = f"{i + 1} of {len(work)}"
        todo.append((rm(matrix, *pair), run_curve, out, matrix, *pair, place))
    in_parallel(after, todo, jobs)


def after(needed: Piece | None, job: Callable, out: Path, *args) -> None:
    """Do the job once that piece is made, by another worker."""
    while needed and load(out, needed) is None:
        time.sleep(0.2)
    job(out, *args)
