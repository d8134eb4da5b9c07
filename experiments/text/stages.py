"""
The one door from the text world to the code that users run: a stage is run by its command line, in
a run folder, and what it leaves is read back. Rows lie beside it.
"""

import contextlib
import io
import json
from pathlib import Path

import train
from experiments.text.constants import ENCODING
from infra.checkpoint import load_gpt
from infra.rows import InputError, make_folder, replacing
from methods.reward import load_reward
from model import GPT


def run(folder: Path, argv: list) -> None:
    """Run a stage of train.py into `folder`, or go on where it was stopped there. Raises InputError
    with the stage's own sentence where it fails."""
    argv = [*map(str, argv), "--encoding", ENCODING, "--out", str(folder), "--device", "cpu"]
    argv.append("--resume")  # without a checkpoint it starts
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = train.main(argv)
    if status > 128:  # stopped by a signal
        raise KeyboardInterrupt
    if status:
        why = said.getvalue().strip().splitlines()[-1:] or [f"status {status}"]
        raise InputError(f"the stage {argv[0]} in {folder} failed: {why[0]}")
    (folder / "best.pt").unlink(missing_ok=True)


def policy(folder: Path) -> GPT:
    """The last weights of a run, in eval mode."""
    return load_gpt(folder, encoding=ENCODING)[0]


def judge(spec: str | Path):
    """A reward model's run folder, or module:function, as a function of (prompts, completions,
    whether each ended) that gives the rewards, (N,) float64."""
    return load_reward(str(spec), "cpu", ENCODING)


def write_rows(path: Path, rows: list[dict]) -> None:
    make_folder(path.parent)
    with replacing(path) as temporary:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        temporary.write_text(text, encoding="utf-8")


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
