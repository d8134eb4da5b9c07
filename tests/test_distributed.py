"""Several processes do what one does: the same weights, metrics and files, in DDP and in shards.

Starting Python and torch takes longer than these runs. So two processes stay, as torchrun would
have started them, and each run joins and leaves a group of its own; torchrun itself starts two
runs: one that is told to stop, and one in which a process fails.
"""

import contextlib
import functools
import io
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, ROOT, assert_same_run, read_rows, records, write_rows
from torch.utils._pytree import tree_leaves

import train
from data import collate
from infra import parallel
from infra.checkpoint import load_checkpoint, load_gpt
from model import GPT

STEPS = 20


@pytest.fixture(scope="module")
def few(files, tmp_path_factory) -> dict:
    """11 rows of each kind: with batches of 5 on 2 processes, each batch is shared unequally, and
    the last one of an epoch holds a single group. And an sft of two blocks."""
    folder = tmp_path_factory.mktemp("few")
    kinds = ("pairs", "rewards")
    few = {k: write_rows(folder / f"{k}.jsonl", read_rows(files[k])[:11]) for k in kinds}
    few["sft"] = str(folder / "sft")
    shape = "--n_layer 2 --n_head 2 --n_embd 16 --block_size 96 --max_iters 2".split()
    assert train.main(["sft", "--data", few["pairs"], "--out", few["sft"], *shape]) == 0
    return few


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
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL}
    return subprocess.Popen([*start, "train.py", *argv], cwd=ROOT, text=True, **pipes)


def argv(stage: str, few: dict, out: Path, dtype: str, *more: str) -> list[str]:
    data = few["pairs" if stage in ("sft", "reward") else "rewards"]
    return [
        *(stage, "--data", data, "--eval_data", few["rewards" if stage == "exo" else "pairs"]),
        *("--init", few["sft"], "--out", str(out), "--dtype", dtype, "--max_iters", str(STEPS)),
        *"--batch_size 5 --micro_batch_size 2 --learning_rate 1e-3 --log_interval 1".split(),
        *"--eval_interval 10 --max_new_tokens 8".split(),
        *more,
    ]


ONLINE = tuple("--reward tests.rewards:spread --K 3 --round_iters 2".split())


@pytest.fixture(scope="module")
def run_one(few, tmp_path_factory):
    """The folder of a run in one process, made once for each command."""

    @functools.cache
    def run(stage: str, dtype: str, *more: str) -> Path:
        out = tmp_path_factory.mktemp("one") / "run"
        assert train.main(argv(stage, few, out, dtype, *more)) == 0
        return out

    return run


# ------------------------------------------------------------------------------
# Two processes


CASES = [("sft", "float64", ()), ("exo", "float64", ()), ("exo", "float32", ())]
CASES += [("exo", "float64", ("--fsdp",)), ("dpo", "float64", ("--gradient_checkpointing",))]
CASES += [("reward", "float64", ()), ("reward", "float64", ("--fsdp",))]
CASES += [("exo", "float64", (*ONLINE, "--online")), ("ppo", "float64", ONLINE)]


@pytest.mark.parametrize(("stage", "dtype", "more"), CASES)
def test_two_processes_equal_one(stage, dtype, more, few, run_one, pipes, tmp_path):
    """20 steps: 1e-10 in float64, 1e-5 in float32 (relative to weights of size 1)."""
    one, two = run_one(stage, dtype, *(m for m in more if m != "--fsdp")), tmp_path / "two"
    printed = run_two(pipes, argv(stage, few, two, dtype, *more))
    assert_same_run(one, two, {"float64": 1e-10, "float32": 1e-5}[dtype])
    assert printed.count("rows usable") == 2  # training and held-out rows: one process prints
    assert "whole tensors" not in printed
    gpt, _ = load_gpt(two, policy=stage != "reward")  # what it saved is whole
    assert isinstance(gpt, GPT)


def test_a_sharded_run_resumes_in_one_process(few, run_one, tmp_path):
    """The checkpoint knows nothing of processes: begun on two, sharded, stopped, ended on one."""
    out = tmp_path / "parts"
    first = start_torchrun([*argv("exo", few, out, "float64"), "--fsdp"])
    wait_for(lambda: (out / "ckpt.pt").exists() and len(records(out)) > 1)
    first.send_signal(signal.SIGTERM)  # torchrun hands it to both; they agree on the step
    said = first.communicate(timeout=120)[1]
    assert "Warning" not in said
    assert 0 < load_checkpoint(out)["step"] < STEPS
    assert train.main([*argv("exo", few, out, "float64"), "--resume"]) == 0
    assert_same_run(run_one("exo", "float64"), out, 1e-10)


def test_a_process_that_is_killed_ends_the_other_and_loses_nothing(few, run_one, tmp_path):
    """torchrun stops the others; the lock of the first is free, and one process goes on."""
    out = tmp_path / "killed"
    first = start_torchrun([*argv("exo", few, out, "float64"), "--kl_samples", "400"])
    wait_for(lambda: (out / "ckpt.pt").exists() and len(records(out)) > 1)
    both = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
    (second,) = {*map(int, both)} - {int((out / "run.lock").read_text())}
    os.kill(second, signal.SIGKILL)
    first.communicate(timeout=120)
    assert first.returncode != 0
    assert load_checkpoint(out)["step"] < STEPS
    again = [*argv("exo", few, out, "float64"), "--kl_samples", "400", "--resume"]
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
def test_nothing_is_differentiated_past_the_wrapper(stage, few, tmp_path, monkeypatch):
    """A method called past DDP skips its hooks, and gradients would silently stay local."""
    s = train.parse(argv(stage, few, tmp_path / "run", "float32"))
    task = train.make_stage(s, CPU)
    task.policy.module = Guard(task.policy.module)
    hidden = GPT.hidden

    def guarded(self, *args):
        assert Guard.inside or not torch.is_grad_enabled()
        return hidden(self, *args)

    monkeypatch.setattr(GPT, "hidden", guarded)
    train.update(s, task, train.adamw(task.policy.scorer, s, 0.0), np.arange(5), 0.0)
    with pytest.raises(AssertionError):  # the guard itself works
        task.policy.scorer(collate(task.groups, [0]))


def test_the_error_of_one_process_ends_all_with_its_sentence(few, tmp_path):
    began = time.time()
    argv = ["sft", "--data", few["pairs"], "--out", str(tmp_path / "run"), "--max_iters", "2"]
    failing = start_torchrun([*argv, "--encoding", "tests.rewards:lonely"])
    said = failing.communicate(timeout=120)[1]
    assert failing.returncode != 0
    assert "train.py: only the second process knows this" in said
    assert time.time() - began < 60
