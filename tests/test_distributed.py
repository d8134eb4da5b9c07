"""Several processes do what one does: the same weights, metrics and files, in DDP and in shards.

Starting Python and torch takes longer than these runs. So two processes stay, as torchrun would
have started them, and each run joins and leaves a group of its own; torchrun itself starts two
runs: one that is told to stop, and one in which a process fails.
"""

import contextlib
import io
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves

import train
from data import byte_encoding, collate
from infra import parallel
from infra.checkpoint import load_checkpoint, load_gpt
from infra.rows import InputError
from model import GPT

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent
STEPS = 20


def rows(path: Path, n: int, kind: str) -> str:
    """n rows of unlike lengths; with batches of 5 on 2 processes, each batch is shared unequally,
    and the last one of an epoch holds a single group."""
    rng = random.Random(kind)

    def words(most: int) -> str:
        return " ".join(rng.choice("a bb ccc dd".split()) for _ in range(rng.randint(1, most)))

    def row(i: int) -> dict:
        if kind == "pairs":
            return {"prompt": words(8), "chosen": f"{words(4)} {i}", "rejected": f"{words(9)} no"}
        completions = [f"{words(5)} {j}" for j in range(rng.randint(2, 4))]
        return {
            "prompt": words(8),
            "completions": completions,
            "rewards": [rng.gauss(0, 1) for _ in completions],
        }

    path.write_text("".join(json.dumps(row(i)) + "\n" for i in range(n)))
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("files")
    out = {kind: rows(folder / f"{kind}.jsonl", 11, kind) for kind in ("pairs", "rewards")}
    out["sft"] = str(folder / "sft")
    shape = "--n_layer 2 --n_head 2 --n_embd 16 --block_size 96 --max_iters 2".split()
    assert train.main(["sft", "--data", out["pairs"], "--out", out["sft"], *shape]) == 0
    return out


# ------------------------------------------------------------------------------
# One process, two that stay, and torchrun


def serve(rank: int, pipe) -> None:
    """One of the two: runs every command that comes, and answers (status, what it printed)."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ["MASTER_ADDR"] = "localhost"
    for name in ("weights_to_save", "optimizer_to_save"):
        setattr(parallel, name, telling(getattr(parallel, name)))
    while True:
        os.environ["MASTER_PORT"], argv = pipe.recv()
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            status = train.main(argv)
        pipe.send((status, printed.getvalue()))


def telling(to_save):
    """to_save, saying so where a process that does not write gets tensors."""

    def told(*args):
        state = to_save(*args)
        if parallel.rank() > 0 and any(isinstance(x, torch.Tensor) for x in tree_leaves(state)):
            print("a process that does not write holds whole tensors")
        return state

    return told


@pytest.fixture(scope="module")
def pipes():
    """To each of the two processes. They are killed in the end, as a failed one may leave the other
    waiting."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])  # torch is imported once for both
    ours, theirs = zip(*(context.Pipe() for _ in range(2)), strict=True)
    started = [context.Process(target=serve, args=(i, pipe)) for i, pipe in enumerate(theirs)]
    for process, pipe in zip(started, theirs, strict=True):
        process.start()
        pipe.close()  # here: when the process ends, reading ends
    yield ours
    for process in started:
        process.kill()
        process.join()


def run_two(pipes, argv: list[str]) -> str:
    """What both printed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    for pipe in pipes:
        pipe.send((port, argv))
    assert all(pipe.poll(120) for pipe in pipes), "a process waits for the other"
    statuses, printed = zip(*(pipe.recv() for pipe in pipes), strict=True)
    assert statuses == (0, 0)
    return "".join(printed)


def start_torchrun(argv: list[str]) -> subprocess.Popen:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.Popen(
        [*start, "train.py", *argv],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


def argv(stage: str, files: dict, out: Path, dtype: str, *more: str) -> list[str]:
    data = files["pairs" if stage in ("sft", "reward") else "rewards"]
    return [
        *(stage, "--data", data, "--eval_data", files["rewards" if stage == "exo" else "pairs"]),
        *("--init", files["sft"], "--out", str(out), "--dtype", dtype, "--max_iters", str(STEPS)),
        *"--batch_size 5 --micro_batch_size 2 --learning_rate 1e-3 --log_interval 1".split(),
        *"--eval_interval 10 --max_new_tokens 8".split(),
        *more,
    ]


def records(out: Path) -> list[dict]:
    machine = dict.fromkeys(("tokens_per_s", "groups_per_s", "peak_gb"), 0)
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) | machine for line in lines]


def assert_same_run(a: Path, b: Path, tolerance: float) -> None:
    first, second = (load_checkpoint(out) for out in (a, b))
    assert first["step"] == second["step"]
    close = {"rtol": tolerance, "atol": tolerance}
    for name, value in first["model"].items():
        torch.testing.assert_close(second["model"][name], value, **close, msg=name)
    for name, value in first.get("head", {}).items():
        torch.testing.assert_close(second["head"][name], value, **close, msg=name)
    for i, entry in first["optimizer"]["state"].items():
        for name, value in entry.items():
            torch.testing.assert_close(second["optimizer"]["state"][i][name], value, **close)
    for x, y in zip(records(a), records(b), strict=True):
        assert x.pop("kind") == y.pop("kind")
        assert y == pytest.approx(x, rel=1e3 * tolerance, abs=1e3 * tolerance)


ONLINE = tuple("--reward test_distributed:reward --K 3 --round_iters 2".split())


def reward(prompt: str, completion: str) -> float:
    return completion.count("a") - 0.1 * len(completion)


@pytest.fixture(scope="module")
def run_one(files, tmp_path_factory):
    """The folder of a run in one process, made once for each command."""
    made = {}

    def run(stage: str, dtype: str, *more: str) -> Path:
        key = stage, dtype, more
        if key not in made:
            out = tmp_path_factory.mktemp("one") / "run"
            assert train.main(argv(stage, files, out, dtype, *more)) == 0
            made[key] = out
        return made[key]

    return run


# ------------------------------------------------------------------------------
# Two processes


CASES = [("sft", "float64", ()), ("exo", "float64", ()), ("exo", "float32", ())]
CASES += [("exo", "float64", ("--fsdp",)), ("dpo", "float64", ("--gradient_checkpointing",))]
CASES += [("reward", "float64", ()), ("reward", "float64", ("--fsdp",))]
CASES += [("exo", "float64", (*ONLINE, "--online")), ("ppo", "float64", ONLINE)]


@pytest.mark.parametrize(("stage", "dtype", "more"), CASES)
def test_two_processes_equal_one(stage, dtype, more, files, run_one, pipes, tmp_path):
    """20 steps: 1e-10 in float64, 1e-5 in float32 (relative to weights of size 1)."""
    one, two = run_one(stage, dtype, *(m for m in more if m != "--fsdp")), tmp_path / "two"
    printed = run_two(pipes, argv(stage, files, two, dtype, *more))
    assert_same_run(one, two, {"float64": 1e-10, "float32": 1e-5}[dtype])
    assert printed.count("rows usable") == 2  # training and held-out rows: one process prints
    assert "whole tensors" not in printed
    gpt, _ = load_gpt(two, policy=stage != "reward")  # what it saved is whole
    assert isinstance(gpt, GPT)


def test_a_sharded_run_resumes_in_one_process(files, run_one, tmp_path):
    """The checkpoint knows nothing of processes: begun on two, sharded, stopped, ended on one."""
    out = tmp_path / "parts"
    first = start_torchrun([*argv("exo", files, out, "float64"), "--fsdp"])
    wait_for(lambda: (out / "ckpt.pt").exists() and len(records(out)) > 1)
    first.send_signal(signal.SIGTERM)  # torchrun hands it to both; they agree on the step
    said = first.communicate(timeout=120)[1]
    assert "Warning" not in said
    assert 0 < load_checkpoint(out)["step"] < STEPS
    assert train.main([*argv("exo", files, out, "float64"), "--resume"]) == 0
    assert_same_run(run_one("exo", "float64"), out, 1e-10)


def test_a_process_that_is_killed_ends_the_other_and_loses_nothing(files, run_one, tmp_path):
    """torchrun stops the others; the lock of the first is free, and one process goes on."""
    out = tmp_path / "killed"
    first = start_torchrun([*argv("exo", files, out, "float64"), "--kl_samples", "400"])
    wait_for(lambda: (out / "ckpt.pt").exists() and len(records(out)) > 1)
    both = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
    (second,) = {*map(int, both)} - {int((out / "run.lock").read_text())}
    os.kill(second, signal.SIGKILL)
    first.communicate(timeout=120)
    assert first.returncode != 0
    assert load_checkpoint(out)["step"] < STEPS
    again = [*argv("exo", files, out, "float64"), "--kl_samples", "400", "--resume"]
    assert train.main(again) == 0
    assert_same_run(run_one("exo", "float64", "--kl_samples", "400"), out, 1e-10)


def wait_for(condition) -> None:
    deadline = time.time() + 120
    while not condition() and time.time() < deadline:
        time.sleep(0.01)


class Guard(torch.nn.Module):
    """Stands where DDP stands: knows whether its forward is running."""

    inside = False

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args):
        Guard.inside = True
        try:
            return self.module(*args)
        finally:
            Guard.inside = False


@pytest.mark.parametrize("stage", ["sft", "exo", "dpo"])
def test_nothing_is_differentiated_past_the_wrapper(stage, files, tmp_path, monkeypatch):
    """A method called past DDP skips its hooks, and gradients would silently stay local."""
    s = train.parse(argv(stage, files, tmp_path / "run", "float32"))
    task = train.make_stage(s, torch.device("cpu"))
    task.policy.module = Guard(task.policy.module)
    hidden = GPT.hidden

    def guarded(self, *args):
        assert Guard.inside or not torch.is_grad_enabled()
        return hidden(self, *args)

    monkeypatch.setattr(GPT, "hidden", guarded)
    train.update(s, task, train.adamw(task.policy.scorer, s, 0.0), np.arange(5), 0.0)
    with pytest.raises(AssertionError):  # the guard itself works
        task.policy.scorer(collate(task.groups, [0]))


def lonely():
    """An encoding that one process of two cannot make."""
    if os.environ["RANK"] == "1":
        raise InputError("only the second process knows this")
    return byte_encoding()


def test_the_error_of_one_process_ends_all_with_its_sentence(files, tmp_path):
    began = time.time()
    argv = ["sft", "--data", files["pairs"], "--out", str(tmp_path / "run"), "--max_iters", "2"]
    failing = start_torchrun([*argv, "--encoding", "tests.test_distributed:lonely"])
    said = failing.communicate(timeout=120)[1]
    assert failing.returncode != 0
    assert "train.py: only the second process knows this" in said
    assert time.time() - began < 60


def test_shards_need_processes(files, tmp_path, capsys):
    assert train.main(argv("exo", files, tmp_path / "run", "float32", "--fsdp")) == 2
    assert "torchrun" in capsys.readouterr().err
