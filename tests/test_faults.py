"""What happens to long runs, done for real: processes are killed at random moments, disks are full,
files are damaged, two runs want one folder. After each the last good state is there, a sentence
says what happened and what to do, and the run that goes on ends where an untouched one ends.

Each start is a fork of a process that has imported torch already: what dies there loses nothing.
`pytest -m slow` kills a hundred times.
"""

import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import LETTERS, ROOT, assert_same_run, records

import experiments.toy.main as toy
import sample
import tests.rewards
import train
from experiments.toy.worlds import Config
from infra import parallel
from infra.checkpoint import load_checkpoint

TINY = Config(vocab_size=12, n_embd=3, steps=4, draws=128, warmup=2)
LONG = "--max_iters 24 --eval_interval 3 --batch_size 4 --kl_samples 2 --log_interval 1".split()


def child(argv: list[str], log: str, limit: int) -> None:
    """One start of train.py or sample.py. limit: bytes that a file may have, as on a full disk."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    said = os.open(log, os.O_WRONLY)
    os.dup2(said, 1)
    os.dup2(said, 2)
    print("began", flush=True)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    toy.Config, toy.pyplot = lambda: TINY, lambda: None
    program = {"train": train, "sample": sample}[argv[0]]
    parallel.run_program(lambda: program.main(argv[1:]))


class Starter:
    """Starts commands as processes, each with a file for what it says."""

    def __init__(self, logs: Path):
        self.logs, self.n, self.context = logs, 0, multiprocessing.get_context("forkserver")
        more = ["numpy.random", "torch._dynamo"]  # which a first step would import
        self.context.set_forkserver_preload(["train", "sample", "experiments.toy.main", *more])

    def start(self, argv: list, limit: int = 0):
        """The process, once it is where its program begins."""
        self.n += 1
        log = self.logs / f"{self.n}.txt"
        log.touch()
        process = self.context.Process(target=child, args=(list(map(str, argv)), str(log), limit))
        process.start()
        process.log = log
        wait_for(log.read_text, process)
        return process

    def end(self, process) -> tuple[int, str]:
        """(exit status, the last line it said)."""
        process.join()
        return process.exitcode, process.log.read_text().splitlines()[-1]

    def run(self, argv: list, limit: int = 0) -> tuple[int, str]:
        return self.end(self.start(argv, limit))

    def succeed(self, argv: list) -> None:
        assert self.run(argv)[0] == 0


@pytest.fixture
def starter(tmp_path, monkeypatch) -> Iterator[Starter]:
    monkeypatch.chdir(ROOT)  # where the process that forks finds train.py
    (tmp_path / "logs").mkdir()
    yield Starter(tmp_path / "logs")
    for left in multiprocessing.active_children():  # of a test that failed: pytest would wait
        left.kill()


def wait_for(condition, process=None) -> None:
    deadline = time.time() + 120
    while not condition() and (process is None or process.is_alive()) and time.time() < deadline:
        time.sleep(0.001)


def command(world, stage: str, out: Path) -> list:
    if stage == "toy":
        return ["train", "toy", "--seeds", 1, "--out", out]
    if stage == "sample":
        argv = ["sample", world.sft, "--prompts", world.pairs, "-n", 2, "--max_new_tokens", 8]
        return [*argv, "--batch_size", 2, "--out", out / "rows.jsonl"]
    return ["train", *world.argv(stage, *LONG, out=out.name)]


def n_lines(out: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in out.glob("*.jsonl"))


# ------------------------------------------------------------------------------
# kill -9


def moment(rng: random.Random, out: Path, most: int, seconds: float):
    """(condition, seconds later): by the clock, after a line of the log, or while a file is half
    written."""
    n = rng.randrange(most + 1)
    return rng.choice(
        [
            (lambda: True, rng.uniform(0, seconds)),
            (lambda: n_lines(out) >= n, rng.uniform(0, 0.03)),
            (lambda: n_lines(out) >= n and any(out.glob(".*.[0-9]*")), 0.0),
        ]
    )


def assert_good(stage: str, out: Path, whole: Path, step: int) -> int:
    """What a killed process leaves can be used, and nothing that was there is gone. Returns the
    step of its checkpoint."""
    if stage == "sample":
        rows = out / "rows.jsonl"
        kept = rows.read_bytes() if rows.exists() else b""
        assert (whole / "rows.jsonl").read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
        return kept.count(b"\n")
    if stage == "toy":
        assert not (out / "results.json").exists() or json.loads((out / "results.json").read_text())
        return 0
    after = load_checkpoint(out)["step"] if (out / "ckpt.pt").exists() else -1
    assert after >= step
    return after


def assert_same(stage: str, a: Path, b: Path) -> None:
    """Bit for bit, and not a file more."""
    assert {p.name for p in a.iterdir()} == {p.name for p in b.iterdir()}
    if stage in ("sample", "toy"):
        name = "rows.jsonl" if stage == "sample" else "results.json"
        assert (a / name).read_bytes() == (b / name).read_bytes()
        return
    assert_same_run(a, b)
    if (a / "best.pt").exists():
        x, y = (load_checkpoint(out, "best") for out in (a, b))
        assert x["step"] == y["step"]
        torch.testing.assert_close(x["model"], y["model"], rtol=0, atol=0)


EVERY = ("sft", "reward", "exo", "dpo", "ppo", "exo --online", "sample", "toy")
TEN = [(stage, 2 if stage in ("exo", "ppo") else 1) for stage in EVERY]
HUNDRED = [
    pytest.param(stage, 13 - i // 4, marks=pytest.mark.slow) for i, stage in enumerate(EVERY)
]


@pytest.mark.parametrize(("stage", "kills"), [*TEN, *HUNDRED])
def test_a_run_killed_at_any_moment_ends_where_an_untouched_one_ends(stage, kills, world, starter):
    """Killed and begun again, with --resume or anew, until it was killed so often; then it ends."""
    rng, whole, out = random.Random(stage), world.folder / "whole", world.folder / "killed"
    began = time.time()
    starter.succeed(command(world, stage, whole))
    most, seconds = n_lines(whole), time.time() - began
    again = {"sample": [], "toy": []}.get(stage, ["--resume"])
    step, killed = -1, 0
    while killed < kills:
        anew = step >= 0 and stage != "toy" and rng.random() < 0.3
        condition, delay = moment(rng, out, most, seconds)
        process = starter.start(command(world, stage, out) + (["--overwrite"] if anew else again))
        wait_for(condition, process)
        process.join(delay)
        process.kill()
        status, said = starter.end(process)
        assert status in (0, -9), said
        killed += status == -9
        step = assert_good(stage, out, whole, -1 if anew else step)
        if status == 0:  # a fast machine: it had ended
            shutil.rmtree(out)
            step = -1
    starter.succeed(command(world, stage, out) + again)
    assert_same(stage, whole, out)


# ------------------------------------------------------------------------------
# Full disks


def test_a_full_disk_keeps_what_was_there(world, starter):
    """The first checkpoint of a new run does not fit: the old run stays as it is, every byte."""
    out = world.run("exo")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    argv = ["train", *world.argv("exo", "--overwrite", "--beta_pi", 0.2)]
    status, said = starter.run(argv, limit=20_000)
    assert status == 2
    assert f"cannot write to {out}, is the disk full?" in said
    after = {p.name: p.read_bytes() for p in out.iterdir()}
    assert before | {"run.lock": after["run.lock"]} == after


def test_metrics_that_do_not_fit_stop_the_run_at_its_last_checkpoint(world, starter):
    """metrics.jsonl is made as long as a disk allows; when there is room again, no record lacks."""
    whole, out = world.folder / "whole", world.folder / "run"
    starter.succeed(command(world, "exo", whole))
    process = starter.start(command(world, "exo", out))
    wait_for(lambda: n_lines(out) > 8)
    process.terminate()
    status, said = starter.end(process)
    assert status == 128 + signal.SIGTERM
    step = load_checkpoint(out)["step"]
    assert said.startswith(f"stopped at step {step} of 24; the same command with --resu")
    limit, metrics = 2 * (out / "ckpt.pt").stat().st_size, out / "metrics.jsonl"
    long = '{"step": 1, "kind": "train", "x": "' + "x" * limit + '"}\n'
    metrics.write_text(long + metrics.read_text())
    resumed = [*command(world, "exo", out), "--resume"]
    status, said = starter.run(resumed, limit=metrics.stat().st_size + 900)
    assert status == 2
    assert said.startswith(f"train.py: cannot write {metrics}: ")
    step = load_checkpoint(out)["step"]
    assert said.endswith(f"the same command with --resume goes on from step {step}")
    assert metrics.read_text().startswith(long)
    assert all(line.endswith("}") for line in metrics.read_text().splitlines())
    metrics.write_text(metrics.read_text().removeprefix(long))
    starter.succeed(resumed)
    assert_same("exo", whole, out)


def test_samples_that_do_not_fit_are_whole_rows(world, starter):
    whole, out = world.folder / "whole", world.folder / "run"
    starter.succeed(command(world, "sample", whole))
    size = (whole / "rows.jsonl").stat().st_size
    for limit in (size // 3, size // 2, size - 1):
        status, said = starter.run(command(world, "sample", out), limit)
        assert status == 2
        assert said.startswith(f"sample.py: cannot write {out / 'rows.jsonl'}: ")
        kept = (out / "rows.jsonl").read_text() if (out / "rows.jsonl").exists() else ""
        assert (whole / "rows.jsonl").read_text().startswith(kept)
        assert kept == "" or kept.endswith("\n")
    starter.succeed(command(world, "sample", out))
    assert_same("sample", whole, out)


# ------------------------------------------------------------------------------
# One run, one folder


@pytest.mark.parametrize(
    ("stage", "again"),
    [("exo", ["--resume"]), ("exo", ["--overwrite"]), ("sample", ["--overwrite"]), ("toy", [])],
)
def test_a_second_process_is_refused_with_the_number_of_the_first(stage, again, world, starter):
    """And the lock does not outlive its process, which was killed."""
    out = world.folder / "run"
    argv = command(world, stage, out)
    while True:  # a tiny toy may be done before it is stopped
        first = starter.start(argv)
        wait_for(lambda: (stage == "toy" and (out / "run.lock").exists()) or n_lines(out), first)
        os.kill(first.pid, signal.SIGSTOP)  # it lives, and does not end meanwhile
        if not (out / "results.json").exists():
            break
        first.kill()
        first.join()
        shutil.rmtree(out)
    status, said = starter.run([*argv, *again])
    assert status == 2
    assert f"the process {first.pid} writes to " in said
    assert first.is_alive()
    first.kill()
    first.join()
    starter.succeed([*argv, *([] if stage == "toy" else ["--overwrite"])])


# ------------------------------------------------------------------------------
# Files of others, and old runs


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "run.lock"}


@pytest.mark.parametrize("more", [[], ["--overwrite"], ["--resume"]])
@pytest.mark.parametrize("name", ["config.json", "settings.json", "metrics.jsonl", "best.pt"])
def test_what_train_did_not_write_it_does_not_replace(name, more, world, refusal):
    """A Hugging Face folder, an editor's settings, another project's log or weights."""
    folder = world.folder / "run"
    folder.mkdir()
    (folder / name).write_text('{"model_type": "gpt2"}')
    said = f"train.py: {folder} has a {name} that train.py did not write: give another --out"
    assert refusal(train.main, *world.argv("sft", *more))[-1] == said
    assert content(folder) == {name: b'{"model_type": "gpt2"}'}


def test_the_toy_does_not_replace_the_pictures_of_others(tmp_path, refusal):
    (tmp_path / "picture.png").write_text("mine")
    said = "has a picture.png that train.py did not write: give another --out"
    assert said in refusal(train.main, "--out", str(tmp_path))[-1]
    assert content(tmp_path) == {"picture.png": b"mine"}


def test_only_what_a_killed_process_left_is_swept_away(world):
    """Its temporary files end with its number; an editor's, say, do not."""
    out = world.run("sft", "--max_iters", 1)
    kept = {".ckpt.pt.swp", ".notes.pt.txt", ".notes.12"}
    for name in (*kept, ".ckpt.pt.123", ".metrics.jsonl.7"):
        (out / name).touch()
    world.run("sft", "--max_iters", 1, "--resume")
    assert {p.name for p in out.glob(".*")} == kept


def test_an_old_run_stays_until_the_first_checkpoint_of_a_new_one(world, monkeypatch, refusal):
    """Data, reference and reward come first: what breaks there costs nothing. Nor does a run go
    that has lost its checkpoint, or is the reward of the new one."""
    out = world.run("ppo")
    before = content(out)
    with monkeypatch.context() as patch:
        patch.setattr(tests.rewards, "letters", lambda prompt, completion: None)
        refusal(train.main, *world.argv("ppo", "--overwrite", "--beta_pi", 0.2))
    assert content(out) == before
    said = refusal(train.main, *world.argv("ppo", "--reward", out, "--overwrite"))[-1]
    assert f"--out {out} would overwrite --reward {out}" in said
    (out / "ckpt.pt").unlink()
    before.pop("ckpt.pt")
    assert "holds a run: give --resume, --overwrite" in refusal(train.main, *world.argv("ppo"))[-1]
    said = refusal(train.main, *world.argv("ppo", "--resume"))[-1]
    assert said == f"train.py: --resume: {out} has lost its ckpt.pt; --overwrite begins anew"
    assert content(out) == before


def test_resume_without_a_checkpoint_starts(world):
    """Nothing there, what a process leaves that was killed in the midst of replacing an old run, or
    before its first checkpoint."""
    whole, out = world.run("exo", out="whole"), world.run("exo", "--resume")
    (out / "ckpt.pt").replace(out / ".ckpt.pt.123")
    world.run("exo", "--resume")
    assert_same("exo", whole, out)
    for name in ("ckpt.pt", "best.pt"):
        (out / name).unlink()
    (out / "metrics.jsonl").write_text(json.dumps(records(out)[0]) + "\n" + '{"step": 0, "ki')
    world.run("exo", "--resume")
    assert_same("exo", whole, out)


def sample_argv(world, *more) -> list[str]:
    argv = [world.sft, "--prompts", world.pairs, "--max_new_tokens", 4]
    return list(map(str, [*argv, "--out", world.folder / "rows.jsonl", *more]))


@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_what_sample_did_not_write_it_does_not_replace(more, world, refusal):
    """A line without its end, and the input under a second name."""
    notes, again = world.folder / "rows.jsonl", world.folder / "again.jsonl"
    notes.write_text("buy milk")
    said = f"sample.py: {notes} was not written by sample.py: give another --out"
    assert refusal(sample.main, *sample_argv(world, *more))[-1] == said
    assert notes.read_text() == "buy milk"
    again.hardlink_to(world.pairs)
    said = refusal(sample.main, *sample_argv(world, "--out", again, *more))[-1]
    assert "not written by sample.py" in said


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (["--seed", 1], "seed"),
        (["-n", 2, "--top_k", 3], "n, top_k"),
        (["--temperature", 2], "temperature"),
        (["--prompt", "a"], "rows"),
        (["--score", "PAIRS"], "rows"),
        (["--which", "best"], "models"),
    ],
)
def test_rows_of_two_settings_do_not_get_into_one_file(change, what, world, refusal):
    """Told apart by what the flags name, not by the names: models and prompts may have moved."""
    run = world.run("sft", "--max_iters", 4, "--learning_rate", 3)  # the best is where it began
    out = world.folder / "rows.jsonl"
    argv = sample_argv(world)
    argv[0] = str(run)
    assert sample.main(argv) == 0
    before, change = out.read_bytes(), [str(x).replace("PAIRS", world.pairs) for x in change]
    other = argv[:1] + argv[3:] if change[0] in ("--prompt", "--score") else argv
    said = refusal(sample.main, *other, *change)[-1]
    assert f"{out} was begun with other {what}: give another --out, or --overwrite" in said
    assert out.read_bytes() == before
    run.rename(world.folder / "moved")
    assert sample.main([str(world.folder / "moved"), *argv[1:], "--batch_size", "3"]) == 0
    assert out.read_bytes() == before


# ------------------------------------------------------------------------------
# Wrong results


@pytest.mark.parametrize("name", ["data", "eval_data"])
def test_rows_that_were_replaced_are_refused_on_resume(name, world, refusal):
    """One letter, between SIGTERM and --resume."""
    file = world.folder / "rows.jsonl"
    file.write_text(Path(world.pairs).read_text())
    out = world.run("exo", f"--{name}", file)
    file.write_text(file.read_text().replace("yes", "yea", 1))
    said = refusal(train.main, *world.argv("exo", f"--{name}", file, "--resume"))[-1]
    assert said.endswith(" are not those with which the run began")
    file.write_text(Path(world.pairs).read_text())
    world.run("exo", f"--{name}", file, "--resume")
    assert load_checkpoint(out)["step"] == 6


@pytest.mark.parametrize("name", ["ckpt.pt", "best.pt"])
@pytest.mark.parametrize("step", [3, 6])
def test_the_better_weights_are_written_where_their_write_failed_once(
    step, name, world, monkeypatch, refusal
):
    """The evaluation is made again, and its record stands there once."""
    whole, write, failed = world.run("sft", out="whole"), torch.save, []

    def fails(value, path):
        if name in path.name and value["step"] == step and not failed:
            failed.append(path)
            raise RuntimeError("file write failed")
        write(value, path)

    monkeypatch.setattr(torch, "save", fails)
    said = refusal(train.main, *world.argv("sft"))[-1]
    assert said.endswith(f"the same command with --resume goes on from step {step}")
    assert load_checkpoint(whole, "best")["step"] == 6
    world.run("sft", "--resume")
    assert_same("sft", whole, world.folder / "run")


def test_a_learning_rate_beyond_reason_stops_the_run(world, refusal):
    out = world.folder / "run"
    said = refusal(train.main, *world.argv("sft", "--learning_rate", 1e6, "--max_iters", 40))[-1]
    assert "is no number" in said
    assert f"{out} keeps the checkpoint of step" in said
    assert all(x.isfinite().all() for x in load_checkpoint(out)["model"].values())
    for record in records(out):
        assert all(math.isfinite(x) for x in record.values() if isinstance(x, float))


# ------------------------------------------------------------------------------
# Lost work


@pytest.mark.parametrize("error", [SystemExit(0), KeyboardInterrupt()])
def test_a_reward_function_that_leaves_loses_nothing(error, world, monkeypatch, refusal):
    calls, letters = [], tests.rewards.letters

    def leaves(prompt, completion):
        calls.append(1)
        if len(calls) == 150:
            raise error
        return letters(prompt, completion)

    whole = world.run("exo --online", out="whole")
    monkeypatch.setattr(tests.rewards, "letters", leaves)
    said = refusal(train.main, *world.argv("exo --online"))[-1]
    assert said.startswith(f"train.py: --reward {LETTERS}: {type(error).__name__}")
    step = load_checkpoint(world.folder / "run")["step"]
    assert step > 3
    assert said.endswith(f"the same command with --resume goes on from step {step}")
    world.run("exo --online", "--resume")
    assert_same("exo", whole, world.folder / "run")


def test_out_of_memory_says_what_needs_less(world, monkeypatch, refusal):
    whole, update = world.run("exo", out="whole"), train.update

    def needs(s, stage, optimizer, *rest):
        if any(state["step"] == 4 for state in optimizer.state.values()):
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")
        return update(s, stage, optimizer, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(train, "update", needs)
        said = refusal(train.main, *world.argv("exo"))[-1]
    assert said.startswith(
        "train.py: out of memory; --micro_batch_size below 8 or --gradient_check"
    )
    assert load_checkpoint(world.folder / "run")["step"] == 3
    world.run("exo", "--resume")
    assert_same("exo", whole, world.folder / "run")


def test_an_interrupt_while_reading_or_scoring_is_one_line(world, starter):
    """SIGINT at random moments before the first step, or while rows are drawn."""
    rng = random.Random(0)
    for stage, said in (("exo", "stopped"), ("sample", "keeps its rows, the same command goes on")):
        for _ in range(3):
            process = starter.start(command(world, stage, world.folder / "run"))
            time.sleep(rng.uniform(0, 0.2))
            os.kill(process.pid, signal.SIGINT)
            status, last = starter.end(process)
            assert status in (0, 130)
            assert "Traceback" not in process.log.read_text()
            assert status == 0 or said in last
            shutil.rmtree(world.folder / "run", ignore_errors=True)


def test_an_interrupt_that_python_drops_comes_again(monkeypatch):
    """One that falls into a destructor is printed and forgotten by Python alone."""

    class Fragile:
        def __del__(self):
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "unraisablehook", parallel.press_again)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background
    try:  # ignores it
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012 the second falls into the sleep
            Fragile()
            time.sleep(10)
    finally:
        signal.signal(signal.SIGINT, before)


# ------------------------------------------------------------------------------
# Crashes


@pytest.mark.parametrize("seed", [20261124165000, 2**63 - 1])
def test_a_seed_may_be_a_date(seed, world):
    world.run("exo", "--seed", seed, "--max_iters", 1)
    assert sample.main(sample_argv(world, "--seed", seed)) == 0


@pytest.mark.parametrize("content", ["{", "[1]"])
@pytest.mark.parametrize("more", [["--resume"], ["--init", "RUN", "--out", "OTHER"]])
def test_settings_that_are_no_settings_are_a_sentence(content, more, world, refusal):
    out = world.run("sft", "--max_iters", 1)
    (out / "settings.json").write_text(content)
    names = {"RUN": out, "OTHER": world.folder / "other"}
    argv = world.argv("sft", "--max_iters", 1, *(names.get(x, x) for x in more))
    if more == ["--resume"]:
        assert f"cannot read {out / 'settings.json'}: " in refusal(train.main, *argv)[-1]
    else:
        assert train.main(argv) == 0
    world.run("sft", "--max_iters", 1, "--overwrite")
