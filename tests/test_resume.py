"""kill -9 at any moment loses nothing: a run that is killed again and again, and resumed each time,
ends where the run ends that nobody touched.

Each start is a fork of a process that has imported torch already: what dies there loses nothing.
"""

import json
import multiprocessing
import random
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from infra.checkpoint import load_checkpoint

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent
STEPS = 150


def argv(folder: Path, out: Path, *more: str) -> list[str]:
    data = str(folder / "pairs.jsonl")
    flags = f"--max_iters {STEPS} --eval_interval 10 --log_interval 1 --learning_rate 1e-3"
    return [
        *("exo", "--data", data, "--eval_data", data, "--init", str(folder / "sft")),
        *("--out", str(out), *flags.split(), *"--kl_samples 2 --max_new_tokens 8".split()),
        *more,
    ]


@pytest.fixture
def folder(tmp_path) -> Path:
    rng = random.Random(0)

    def words(n: int) -> str:
        return " ".join(rng.choice("the a cat dog sat ran big red".split()) for _ in range(n))

    rows = [{"prompt": words(3), "chosen": words(2), "rejected": words(3)} for _ in range(24)]
    lines = [json.dumps(row) + "\n" for row in rows if row["chosen"] != row["rejected"]]
    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    shape = "--n_layer 2 --n_head 2 --n_embd 32 --block_size 64 --max_iters 2".split()
    data = str(tmp_path / "pairs.jsonl")
    assert train.main(["sft", "--data", data, "--out", str(tmp_path / "sft"), *shape]) == 0
    return tmp_path


def run(command: list[str]) -> None:
    torch.set_num_threads(1)
    sys.exit(train.main(command))


def kill_when(command: list[str], condition, delay: float) -> int:
    """Start a run and kill -9 it `delay` seconds after the condition holds; its exit status (0: it
    had finished)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])
    process = context.Process(target=run, args=(command,))
    process.start()
    deadline = time.time() + 120
    while not condition() and process.is_alive() and time.time() < deadline:
        time.sleep(0.001)
    time.sleep(delay)
    process.kill()
    process.join()
    assert process.exitcode in (0, -9)
    return process.exitcode


def moments(rng: random.Random, out: Path) -> list:
    """Ten (name, condition, seconds later): while the program starts, while it trains or evaluates,
    and while a file is half written."""

    def lines() -> int:
        path = out / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def at_line(n: int):
        return lambda: lines() >= n

    def writing(name: str, n: int):
        return lambda: lines() >= n and any(out.glob(f".{name}.*"))

    last = STEPS * 9 // 10
    found = [("starting", lambda: True, rng.uniform(0, 0.5)) for _ in range(3)]
    found += [("training", at_line(rng.randrange(1, last)), rng.uniform(0, 0.1)) for _ in range(4)]
    files = ("ckpt.pt", "best.pt", "ckpt.pt")
    found += [("writing", writing(name, rng.randrange(1, last)), 0.0) for name in files]
    rng.shuffle(found)
    return found


def without_rates(out: Path) -> list[dict]:
    rates = dict.fromkeys(("tokens_per_s", "groups_per_s", "peak_gb"), 0)
    return [json.loads(line) | rates for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_equal(a, b, where: str = "") -> None:
    """Nested dicts, lists, tensors and numbers, bit for bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}.{i}")
    else:
        assert a == b, where


def test_a_run_killed_ten_times_ends_where_an_untouched_one_ends(folder, monkeypatch):
    monkeypatch.chdir(ROOT)  # where the process that forks finds train.py
    whole, killed = folder / "whole", folder / "killed"
    assert train.main(argv(folder, whole)) == 0
    statuses = []
    for _, condition, delay in moments(random.Random(1), killed):
        go_on = "--resume" if (killed / "ckpt.pt").exists() else "--overwrite"
        statuses.append(kill_when(argv(folder, killed, go_on), condition, delay))
    assert statuses.count(-9) >= 8  # a fast machine may finish a run that is killed by the clock
    assert train.main(argv(folder, killed, "--resume")) == 0
    assert without_rates(killed) == without_rates(whole)
    for name in ("ckpt.pt", "best.pt"):
        a, b = (load_checkpoint(out / name) for out in (whole, killed))
        assert_equal(a, b, name)
    assert load_checkpoint(killed)["step"] == STEPS
