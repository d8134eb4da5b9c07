"""Several processes do what one does: the same weights, metrics and files, in DDP and in shards."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from data import byte_encoding, collate
from infra.checkpoint import load_checkpoint, load_gpt
from infra.rows import InputError
from model import GPT

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


def run(argv: list[str], processes: int, script="train.py") -> subprocess.CompletedProcess:
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*start, script, *argv], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


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


ONLINE = tuple("--reward tests.test_distributed:reward --K 3 --round_iters 2".split())


def reward(prompt: str, completion: str) -> float:
    return completion.count("a") - 0.1 * len(completion)


CASES = [("sft", "float64", ()), ("exo", "float64", ()), ("exo", "float32", ())]
CASES += [("exo", "float64", ("--fsdp",)), ("dpo", "float64", ("--gradient_checkpointing",))]
CASES += [("reward", "float64", ()), ("reward", "float64", ("--fsdp",))]
CASES += [("exo", "float64", (*ONLINE, "--online")), ("ppo", "float64", ONLINE)]


@pytest.mark.parametrize(("stage", "dtype", "more"), CASES)
def test_two_processes_equal_one(stage, dtype, more, files, tmp_path):
    """20 steps: 1e-10 in float64, 1e-5 in float32 (relative to weights of size 1)."""
    one, two = tmp_path / "one", tmp_path / "two"
    plain = [m for m in more if m != "--fsdp"]
    run(argv(stage, files, one, dtype, *plain), 1)
    done = run(argv(stage, files, two, dtype, *more), 2)
    assert_same_run(one, two, {"float64": 1e-10, "float32": 1e-5}[dtype])
    assert done.stdout.count("rows usable") == 2  # training and held-out rows: one process prints
    gpt, _ = load_gpt(two, policy=stage != "reward")  # what it saved is whole
    assert isinstance(gpt, GPT)


def test_a_sharded_run_resumes_in_one_process(files, tmp_path):
    """The checkpoint knows nothing of processes: begun on two, sharded, stopped, ended on one."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(argv("exo", files, whole, "float64"), 1)
    command = argv("exo", files, parts, "float64")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    first = subprocess.Popen(
        [*start, "train.py", *command, "--fsdp"], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    wait_for(lambda: (parts / "ckpt.pt").exists() and len(records(parts)) > 3)
    first.send_signal(signal.SIGTERM)  # torchrun hands it to both; they agree on the step
    first.wait()
    assert load_checkpoint(parts)["step"] < STEPS
    run([*command, "--resume"], 1)
    assert_same_run(whole, parts, 1e-10)


def test_two_processes_sample_what_one_samples(files, tmp_path):
    """11 prompts do not divide by batches of 2 on 2 processes."""
    argv = [files["sft"], "--prompts", files["pairs"], "-n", "2", "--max_new_tokens", "6"]
    argv += ["--batch_size", "2", "--reward", "tests.test_distributed:reward", "--out"]
    for processes in (1, 2):
        run([*argv, str(tmp_path / f"{processes}.jsonl")], processes, "sample.py")
    one, two = ((tmp_path / f"{n}.jsonl").read_text() for n in (1, 2))
    assert one == two
    assert one.count("\n") == 11


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
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*start, "train.py", "sft", "--data", files["pairs"], "--out", str(tmp_path / "run")]
    command += ["--encoding", "tests.test_distributed:lonely", "--max_iters", "2"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    began = time.time()
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode != 0
    assert "train.py: only the second process knows this" in done.stderr
    assert time.time() - began < 60


def test_shards_need_processes(files, tmp_path, capsys):
    assert train.main(argv("exo", files, tmp_path / "run", "float32", "--fsdp")) == 2
    assert "torchrun" in capsys.readouterr().err
