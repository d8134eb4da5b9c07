"""train.py from the outside: what a run leaves, where it starts, what a stopped one does, and one
sentence for every mistake. What is asked of all stages is asked of every entry of exo.LOSSES."""

import dataclasses
import functools
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    CPU,
    LETTERS,
    ROOT,
    STAGES,
    World,
    assert_same_run,
    one_batch,
    perturb,
    read_rows,
    records,
    slow_logps,
)

import data
import exo
import methods.ppo  # noqa: F401 - now, and not while what it imports is patched
import sample
import train
from infra import parallel
from infra.checkpoint import load_checkpoint, load_gpt
from model import GPT, GPTConfig

FIGURES = {"loss", "accuracy", "margin"}
FIGURES |= {f"{who}_{x}" for who in ("chosen", "rejected") for x in ("logps", "logratio", "length")}
STEP = {"step", "kind", "lr", "grad_norm", "tokens_per_s", "groups_per_s", "peak_gb"}


# ------------------------------------------------------------------------------
# Runs and their figures


def test_sft_learns_and_leaves_a_whole_run_folder(world):
    names = {"settings.json", "config.json", "ckpt.pt", "best.pt", "metrics.jsonl", "run.lock"}
    assert {p.name for p in Path(world.sft).iterdir()} == names
    first, *_, last = records(world.sft, "eval")
    assert first["loss"] == pytest.approx(np.log(257), abs=0.05)  # knows nothing
    assert last["loss"] < first["loss"] - 1
    assert first.keys() == {"step", "kind", "loss"}
    assert records(world.sft, "train")[0].keys() == STEP | {"loss"}


@pytest.mark.parametrize("stage", exo.LOSSES)
def test_preference_starts_where_policy_equals_reference(stage, world):
    """The first evaluation is known by hand: uniform q, a coin toss, no distance from sft."""
    out = world.run(stage)
    first, *_, last = records(out, "eval")
    start = {"exo": 2.7612, "dpo": np.log(2)}.get(stage, first["loss"])
    assert first["loss"] == pytest.approx(start, abs=1e-3)
    assert first["accuracy"] == 0.5
    assert first["margin"] == first["chosen_logratio"] == first["rejected_logratio"] == 0
    assert first["kl"] == 0
    assert last["loss"] < first["loss"]
    assert last["accuracy"] > 0.5
    assert last["chosen_length"] < last["rejected_length"]
    assert first.keys() == {"step", "kind", "kl", "kl_stderr", "sampled_length"} | FIGURES
    assert all(r.keys() == STEP | FIGURES for r in records(out, "train"))


@pytest.mark.parametrize("stage", ["sft", "reward", *exo.LOSSES])
def test_an_evaluation_is_the_training_loss_over_all_held_out_groups(stage, world):
    """In passes of 3, each with its weight, as in one batch of them all."""
    s, task = world.task(stage, "--micro_batch_size", 3, "--dtype", "float64")
    perturb(task.policy.scorer)
    with torch.no_grad():
        loss, figures = task.loss(one_batch(task.held_out))
    expected = {"loss": loss.item(), **{k: x.item() for k, x in figures.items()}}
    assert train.held_out_figures(s, task) == pytest.approx(expected)


def test_figures_of_a_batch_by_hand():
    """Chosen is the completion with the highest target, whatever stands where none is."""
    ratio = torch.tensor([[2.0, -1.0, 9.0], [0.5, 3.0, 1.0]])
    ref = torch.full_like(ratio, -7.0)
    batch = data.Batch(*[None] * len(data.Batch._fields))._replace(
        targets=torch.tensor([[[1, 1], [1, -1], [-1, -1]], [[1, -1], [-1, -1], [1, 1]]]),
        mask=torch.tensor([[True, True, False], [True, True, True]]),
        log_target=torch.tensor([[-0.1, -2.0, 0.0], [-3.0, -0.2, -1.0]]),
        ref_logps=ref,
    )
    figures = train.preference_figures(ratio + ref, batch, 0.1)
    expected = {"accuracy": 1.0, "margin": 0.1 * (3 + 2.5) / 2}
    expected |= {"chosen_logratio": 2.5, "chosen_logps": -4.5, "chosen_length": 1.0}
    expected |= {"rejected_logratio": -0.25, "rejected_logps": -7.25, "rejected_length": 1.0}
    assert {k: x.item() for k, x in figures.items()} == pytest.approx(expected)


def test_reference_log_probs_are_computed_only_for_rows_that_will_be_read(world):
    """And for more of them when the run is made longer."""
    (_, one), (_, two) = (world.task("exo", "--batch_size", 2, "--max_iters", n) for n in (1, 2))
    for task, steps in ((one, 1), (two, 2)):
        known = np.flatnonzero(np.isfinite(task.groups.ref_logps)).tolist()
        read = sorted(g for i in range(steps) for g in task.ids(i))
        assert known == [int(task.groups.first[g]) + k for g in read for k in (1, 2)]
    two.load_state(one.state())
    assert np.isfinite(two.groups.ref_logps).sum() == 2 * 4


def test_temperature_is_stored_and_scales_logits(world):
    out = world.run("sft", "--temperature", 2)
    gpt, ckpt = load_gpt(out)
    assert ckpt["temperature"] == 2.0
    groups, _ = data.read_groups([world.pairs], data.byte_encoding(), 64, "sft")
    logps = torch.cat([slow_logps(gpt, groups, g, 0, 2.0) for g in range(len(groups))])
    assert records(out, "eval")[-1]["loss"] == pytest.approx(-logps.mean().item(), rel=1e-5)


def test_learning_rate_warms_up_and_decays():
    s = train.Settings("sft", data=["x"], warmup_iters=10)
    rates = [train.schedule(s, step, 100) for step in range(100)]
    assert rates[0] < rates[5] < rates[9] < 1
    assert max(rates) == rates[10] == 1.0
    assert rates[-1] == pytest.approx(0.1, abs=0.01)


# ------------------------------------------------------------------------------
# A fork's losses (conftest's)


def test_a_forks_loss_is_one_function_and_one_entry(world, forks, refusal):
    """One for pairs says so beside it, and then refuses all that is none."""
    assert records(world.run("ipo"), "eval")[0]["loss"] == pytest.approx(25.0)
    said = refusal(train.main, *world.argv("ipo", "--data", world.rewards, out="other"))[-1]
    assert f"{world.rewards}:1: ipo wants preference pairs, not rewards" in said
    said = refusal(train.main, *world.argv("ipo", "--online", "--reward", LETTERS))[-1]
    assert "ipo wants pairs, chosen first" in said


def test_a_loss_without_a_reference_and_with_lengths(world, tmp_path, forks):
    """Nothing is asked of a reference, and the loss is what its formula says."""
    assert not world.task("simpo")[1].groups.ref_logps.any()
    out, scored = world.run("simpo", "--beta_pi", 2), tmp_path / "scored.jsonl"
    kept = {f"{who}_{what}" for who in ("chosen", "rejected") for what in ("logps", "length")}
    for record in records(out, "eval") + records(out, "train"):
        assert record.keys() & FIGURES == kept | {"loss"}  # no log-ratios without a reference
    assert sample.main([str(out), "--score", world.pairs, "--out", str(scored)]) == 0
    gaps = []
    for row in read_rows(scored):
        lengths = [len(row[k].encode()) + 1 for k in ("chosen", "rejected")]
        gaps.append(row["logps"][0] / lengths[0] - row["logps"][1] / lengths[1])
    loss = np.log1p(np.exp(-2 * np.array(gaps))).mean()
    assert loss == pytest.approx(records(out, "eval")[-1]["loss"], rel=1e-4)


@pytest.mark.parametrize("how", ["", " --online"])
def test_exo_under_another_name_is_exo(how, world, monkeypatch):
    """Its default smoothing and its on-policy correction belong to the function."""
    monkeypatch.setitem(exo.LOSSES, "mine", exo.exo_loss)
    more = ["--reward", LETTERS, "--K", "3", "--round_iters", "2"] if how else []
    exos = [records(world.run(name + how, *more, out=name)) for name in ("exo", "mine")]
    assert exos[0] == exos[1]


# ------------------------------------------------------------------------------
# Machines


class RefusesFloat64(torch.overrides.TorchFunctionMode):
    """As mps does: nothing in float64 arrives on a device. cpu:0 stands for one."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = [x for x in (*args, *(kwargs or {}).values()) if isinstance(x, torch.device)]
        if torch.device("cpu", 0) in given:
            assert not isinstance(out, torch.Tensor) or out.dtype != torch.float64, function
        return out


@pytest.mark.parametrize("stage", STAGES)
def test_no_float64_goes_to_a_device(stage, world, reward_model):
    """It crashed every stage with a reference, and the reward model, on a Mac."""
    more = [] if stage in ("sft", "reward") else ["--reward", reward_model]
    with RefusesFloat64():
        world.run(stage, *more, "--device", "cpu:0", "--max_iters", 3)


def test_the_named_gpu_is_the_one_that_is_used(tmp_path, monkeypatch):
    """--device cuda:1 becomes the current device, and records hold the peak of its memory."""
    current, gpu = [], torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", {gpu: 3 * 2**30}.__getitem__)
    s = train.parse(f"sft --data x --device cuda:1 --out {tmp_path}".split())
    with parallel.processes(s.device) as device:
        assert current == [device] == [gpu]
        log = train.Log(s, device, train.NEW, 1)
        assert log.rates()["peak_gb"] == 3
        log.bar.close()


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float32"])
def test_tf32_only_on_a_gpu_and_not_where_float32_was_asked_for(dtype, monkeypatch):
    said = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", said.append)
    parallel.set_precision(dtype, CPU)
    assert not said
    parallel.set_precision(dtype, torch.device("cuda"))
    assert said == ["highest" if dtype == "float32" else "high"]


# ------------------------------------------------------------------------------
# Stopping and going on


def in_rounds(stage: str) -> list:
    """Rounds of 6 steps, where there are rounds: a run stopped in step 5 stops within one."""
    passes = ["--round_iters", 3, "--ppo_epochs", 2] if stage == "ppo" else ["--round_iters", 6]
    return [*passes, *"--max_iters 8 --eval_interval 4 --batch_size 4 --kl_samples 2".split()]


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """whole(stage): its run that nobody stopped."""
    world = World(files, tmp_path_factory.mktemp("whole"))
    return functools.cache(lambda stage: world.run(stage, *in_rounds(stage), out=stage))


@pytest.mark.parametrize("how", ["signal", "kill", "full disk"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_stopped_run_resumes_bit_for_bit(stage, how, world, whole, monkeypatch, refusal, capsys):
    """A signal saves after step 5 and says so; a kill in step 6 goes back to step 4, within a
    round, too; where a checkpoint does not fit, the one before stays. The reference is not asked
    again: its log-probs are in the checkpoint."""
    steps, asked, update, score, save = [], [], train.update, parallel.score, torch.save
    number = signal.SIGINT if stage == "exo" else signal.SIGTERM  # Ctrl-C; what clusters send

    def interrupted(*args):
        steps.append(1)
        if len(steps) == 5 and how == "signal":
            os.kill(os.getpid(), number)
        if len(steps) == 6 and how == "kill":
            raise ZeroDivisionError
        return update(*args)

    def full_disk(value, path):
        if value["step"] > 0 and how == "full disk":
            raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")
        save(value, path)

    def counting(*args):
        asked.append(args[-1] == "reference")
        return score(*args)

    monkeypatch.setattr(parallel, "score", counting)
    argv, out = world.argv(stage, *in_rounds(stage)), world.folder / "run"
    with monkeypatch.context() as patch:
        patch.setattr(train, "update", interrupted)
        patch.setattr(torch, "save", full_disk)
        if how == "signal":
            assert train.main(argv) == 128 + number
            said = "stopped at step 5 of 8; the same command with --resume goes on"
            assert capsys.readouterr().err.splitlines()[-1] == said
        elif how == "kill":
            with pytest.raises(ZeroDivisionError):
                train.main(argv)
        else:
            assert "cannot write" in refusal(train.main, *argv)[-1]
    assert load_checkpoint(out)["step"] == {"signal": 5, "kill": 4, "full disk": 0}[how]
    assert not list(out.glob(".*"))
    assert any(asked) == (stage in exo.LOSSES)
    asked.clear()
    assert train.main([*argv, "--resume"]) == 0
    assert not any(asked)
    assert_same_run(whole(stage), out)


@pytest.mark.parametrize(
    ("training", "call", "said", "kept"),
    [
        (True, 5, "step 4: the gradient is no number for the rows {pairs}:", 3),
        (False, 6, "step 3: the held-out loss is no number; ", 0),  # 5 calls an evaluation
    ],
)
def test_a_loss_that_is_no_number_stops_the_run_before_the_step(
    training, call, said, kept, world, monkeypatch, refusal
):
    """The checkpoint stays good, metrics stay JSON, and the sentence names step and rows."""
    calls, out = [], world.folder / "run"

    def breaks(policy_logps, *args):
        calls.append(policy_logps.requires_grad)
        broken = calls[-1] == training and calls.count(training) == call
        return exo.dpo_loss(policy_logps, *args) * (math.nan if broken else 1.0)

    monkeypatch.setitem(exo.LOSSES, "breaks", breaks)
    message = refusal(train.main, *world.argv("breaks", "--kl_samples", 0))[-1]
    assert message.startswith(f"train.py: {said.format(pairs=world.pairs)}")
    assert message.endswith(f"; {out} keeps the checkpoint of step {kept}")
    ckpt = load_checkpoint(out)
    assert ckpt["step"] == kept
    assert all(x.isfinite().all() for x in ckpt["model"].values())
    assert "NaN" not in (out / "metrics.jsonl").read_text()


def test_a_finished_run_resumes_to_itself_without_held_out_data(world):
    argv = ["dpo", "--data", world.pairs, "--init", world.sft, "--out", f"{world.folder}/run"]
    argv += ["--max_iters", "3", "--kl_samples", "0"]
    before = [train.main(argv), records(world.folder / "run")]
    assert [train.main([*argv, "--resume"]), records(world.folder / "run")] == before


def test_what_does_not_change_the_mathematics_may_change_on_resume(world, refusal):
    """After an out-of-memory: fewer groups at once, checkpointing; and a run made longer."""
    out = world.run("dpo")
    more = ["--micro_batch_size", 2, "--gradient_checkpointing", "--max_iters", 12]
    world.run("dpo", "--resume", *more)
    assert [r["step"] for r in records(out, "train")] == list(range(1, 13))
    said = refusal(train.main, *world.argv("dpo", "--resume", "--beta_pi", "0.2"))[-1]
    assert "another --beta_pi" in said
    said = refusal(train.main, *world.argv("dpo", "--resume", "--max_iters", 8))[-1]
    assert said.endswith("is at step 12, beyond the 8 asked for")  # it would never end
    assert load_checkpoint(out)["step"] == 12


def test_the_reference_is_that_of_the_beginning(world, monkeypatch, refusal):
    """--init is read once; where it was trained meanwhile, the run does not go on with another."""
    sft, read, load = world.run("sft", "--max_iters", 1, out="sft"), [], train.load_gpt
    monkeypatch.setattr(train, "load_gpt", lambda *a, **k: read.append(a) or load(*a, **k))
    world.run("dpo", "--init", sft)
    assert len(read) == 1
    world.run("sft", "--max_iters", 3, "--overwrite", out="sft")
    said = refusal(train.main, *world.argv("dpo", "--init", sft, "--resume"))[-1]
    assert "is another model than when the run began" in said


def test_the_best_weights_can_be_chosen(world, tmp_path):
    """--which best, as --init and in sample.py."""
    out = str(world.run("sft", *"--learning_rate 3 --max_iters 3 --eval_interval 1".split()))
    last, best = (load_gpt(out, which=which)[0].wte.weight for which in ("last", "best"))
    assert best.equal(load_gpt(world.sft)[0].wte.weight)
    assert not best.equal(last)
    s = train.parse(["sft", "--data", "x", "--init", out, "--which", "best"])
    assert train.load_init(s)[0].wte.weight.equal(best)
    texts = []
    for which in ("last", "best"):
        drawn = tmp_path / f"{which}.jsonl"
        assert sample.main([out, "--which", which, "--prompt", "the", "--out", str(drawn)]) == 0
        texts.append(drawn.read_text())
    assert texts[0] != texts[1]


def test_an_interrupt_where_nothing_can_be_saved_is_one_line(world, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "make_stage", interrupted)
    assert train.main(world.argv("dpo")) == 130
    assert capsys.readouterr().err == "train.py: stopped before it could save\n"


def test_a_run_is_not_overwritten_by_accident(world, refusal):
    """Nor by --overwrite the model that the new run would start from."""
    out = world.run("dpo", "--max_iters", 1)
    before = (out / "ckpt.pt").read_bytes()
    for more, part in (
        ([], "--resume, --overwrite or another --out"),
        (["--init", out, "--overwrite"], "would overwrite --init"),
    ):
        (said,) = refusal(train.main, *world.argv("dpo", *more))
        assert part in said
        assert (out / "ckpt.pt").read_bytes() == before
    world.run("dpo", "--max_iters", 2, "--overwrite")
    assert load_checkpoint(out)["step"] == 2


# ------------------------------------------------------------------------------
# Mistakes: one sentence, exit status 2, no folder left. Those in rows are in test_rows.py.


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("exa", "invalid choice: 'exa'"),
        ("--data PAIRS", "toy reads no files: name a stage first"),
        ("sft --lr 1", "unrecognized arguments: --lr 1"),
        ("sft", "sft needs --data"),
        ("exo --data PAIRS", "exo needs --init"),
        ("exo --data nowhere.jsonl --init SFT", "cannot read nowhere.jsonl"),
        ("exo --data PAIRS --init nowhere", "no checkpoint at nowhere"),
        ("exo --data PAIRS --init PAIRS", "no file of torch.save"),
        ("exo --data PAIRS --init SFT --label_smoothing 0", "infinite"),
        ("dpo --data PAIRS --init SFT --label_smoothing 0.5", "must be 0 <= eps < 0.5, got 0.5"),
        ("dpo --data PAIRS --init SFT --n_embd 32", "--n_embd 32 disagrees with --init"),
        ("dpo --data PAIRS --init SFT --encoding gpt2", "disagrees with --init"),
        ("dpo --data PAIRS --init SFT --device tpu", "--device tpu is not there"),
        ("sft --data PAIRS --n_embd 10 --n_head 3", "must be divisible by"),
        ("sft --data PAIRS --epochs 1 --max_iters 2", "not both"),
        ("exo --data PAIRS --init SFT --fsdp", "--fsdp needs several processes: torchrun"),
        ("ppo --data F --init F", "ppo needs --reward"),
        ("ppo --data F --reward m:f", "ppo needs --init"),
        ("exo --data F --init F --online", "exo --online needs --reward"),
        ("dpo --data F --init F --online --reward m:f --K 1", "--K must be at least 2 to compare"),
        ("sft --data F --online", "--online is for exo and dpo"),
        ("exo --data F --init F --reward m:f --kl_samples 0", "--kl_samples must not be 0"),
        ("ppo --data PAIRS --init SFT --reward SFT", "is no reward model: its stage is sft"),
        ("ppo --data PAIRS --init SFT --reward no_module:f", "--reward no_module:f: No module"),
        *((f"{name} --data PAIRS --init RM", "is a reward model: it rates") for name in exo.LOSSES),
        ("sft --data PAIRS --init RM", "is a reward model: it rates text and writes none"),
    ],
)
def test_each_wrong_setting_gets_one_sentence(argv, said, world, reward_model, tmp_path, refusal):
    names = {"PAIRS": world.pairs, "SFT": world.sft, "RM": reward_model}
    argv = [names.get(word, word) for word in argv.split()]
    (message,) = refusal(train.main, *argv, "--out", str(tmp_path / "run"))
    assert said in message
    assert not (tmp_path / "run").exists()


KINDS = {f.name: f.metadata["kind"] for f in dataclasses.fields(train.Settings)}


@pytest.mark.parametrize("name", [n for n, kind in KINDS.items() if isinstance(kind, train.Number)])
def test_each_number_says_its_range(name, refusal):
    """What is just outside, and what is no finite number."""
    kind = KINDS[name]
    least = {train.COUNT: "0", train.FEW: "1001", train.INDEX: "-1", train.AMOUNT: "-1.0"}
    least |= {train.POSITIVE: "0.0", train.BETA: "1e-07", train.SEED: str(2**63)}
    for value in [least.get(kind, "1.0"), *(["nan", "inf"] if kind.type is float else [])]:
        (said,) = refusal(train.main, "sft", "--data", "F", f"--{name}", value)
        assert f"--{name} must be {kind.range}, got {value}" in said


def test_a_checkpoint_from_another_vocabulary_is_refused(world, tmp_path, refusal):
    """Ids of one tokenizer mean nothing to a model of another."""
    ckpt = load_checkpoint(world.sft)
    ckpt["config"] = ckpt["config"] | {"vocab_size": 300}
    ckpt["model"] = GPT(GPTConfig(**ckpt["config"])).state_dict()
    torch.save(ckpt, tmp_path / "other.pt")
    (said,) = refusal(train.main, *world.argv("exo", "--init", tmp_path / "other.pt"))
    assert "has 300 words, its encoding bytes has 257" in said
    assert not (tmp_path / "run").exists()


def test_every_setting_is_read_somewhere():
    """A dead option is worse than none."""
    files = [ROOT / "train.py", *(ROOT / "methods").glob("*.py"), ROOT / "infra/checkpoint.py"]
    whole = "".join(file.read_text(encoding="utf-8") for file in files)
    source = whole.split("def contradictions")[1]
    for name in train.Settings.__dataclass_fields__:
        read = f"s.{name}" in source or f'"{name}"' in source or f"self.{name} =" in whole
        assert read, name
