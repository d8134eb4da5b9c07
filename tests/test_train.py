"""train.py and sample.py from the outside: runs leave the right files, mistakes one sentence."""

import json
import math
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

import data
import exo
import sample
import train
from infra.checkpoint import load_checkpoint, load_gpt
from infra.parallel import set_precision
from model import GPT, GPTConfig

ROOT = Path(__file__).parent.parent
TINY = "--n_layer 1 --n_head 1 --n_embd 16 --block_size 64 --max_iters 6 --eval_interval 3".split()
RATES = dict.fromkeys(("tokens_per_s", "groups_per_s", "peak_gb"), 0)  # the machine's
SHORT = "--max_iters 6 --eval_interval 3 --log_interval 1 --learning_rate 1e-3".split()
SHORT += "--kl_samples 4 --max_new_tokens 8".split()


def write_rows(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict:
    """A pair file, a reward file, and a tiny sft run on the pairs."""
    folder, rng = tmp_path_factory.mktemp("files"), random.Random(0)

    def words(n):
        return " ".join(rng.choice("the a cat dog sat ran big red".split()) for _ in range(n))

    pairs = [
        {"prompt": words(3), "chosen": f" {words(2)} yes", "rejected": f" {words(3)} no"}
        for _ in range(24)
    ]
    rewards = []
    for _ in range(20):
        completions = [f" {words(2)} {i}" for i in range(rng.randint(2, 4))]
        scores = [float(y.count("a")) for y in completions]
        rewards.append({"prompt": words(3), "completions": completions, "rewards": scores})
    out = {
        "pairs": write_rows(folder / "pairs.jsonl", pairs),
        "rewards": write_rows(folder / "rewards.jsonl", rewards),
        "sft": str(folder / "sft"),
    }
    argv = ["sft", "--data", out["pairs"], "--eval_data", out["pairs"], "--out", out["sft"], *TINY]
    assert train.main(argv) == 0
    return out


def records(out: Path, kind: str) -> list[dict]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


def preference(stage: str, files: dict, out: Path, *more: str, data_="pairs") -> int:
    argv = [stage, "--data", files[data_], "--eval_data", files["pairs"], "--init", files["sft"]]
    return train.main([*argv, "--out", str(out), *SHORT, *more])


# ------------------------------------------------------------------------------
# Runs


def test_sft_learns_and_leaves_a_whole_run_folder(files):
    out = Path(files["sft"])
    names = {"settings.json", "config.json", "ckpt.pt", "best.pt", "metrics.jsonl"}
    assert {p.name for p in out.iterdir()} == names
    losses = [r["loss"] for r in records(out, "eval")]
    assert losses[0] == pytest.approx(np.log(257), abs=0.05)  # knows nothing
    assert losses[-1] < losses[0] - 0.02
    assert json.loads((out / "config.json").read_text())["n_embd"] == 16


@pytest.mark.parametrize(("stage", "start"), [("exo", 2.7612), ("dpo", np.log(2))])
def test_preference_starts_where_policy_equals_reference(stage, start, files, tmp_path):
    """The first evaluation is known by hand: uniform q, a coin toss, no distance from sft."""
    assert preference(stage, files, tmp_path / "run") == 0
    first, *_, last = records(tmp_path / "run", "eval")
    assert first["loss"] == pytest.approx(start, abs=1e-3)
    assert first["accuracy"] == 0.5
    assert first["margin"] == first["chosen_logratio"] == first["kl"] == 0
    assert last["loss"] < first["loss"]
    assert last["accuracy"] > 0.5
    assert last["chosen_length"] < last["rejected_length"]


def test_pairs_and_rewards_train_together(files, tmp_path):
    """K differs by row and by kind; both kinds of target stand in one batch."""
    argv = ["exo", "--data", files["pairs"], files["rewards"], "--eval_data", files["rewards"]]
    argv += ["--init", files["sft"], "--out", str(tmp_path / "run"), *SHORT]
    assert train.main(argv) == 0
    rows = scored(files, tmp_path, "rewards")
    assert [row["row"] for row in rows] == list(range(1, 21))
    source = [json.loads(line) for line in Path(files["rewards"]).read_text().splitlines()]
    for row, original in zip(rows, source, strict=True):
        p = np.exp(original["rewards"])
        np.testing.assert_allclose(row["target"], p / p.sum(), atol=1e-12)
        assert len(row["logps"]) == len(row["ref_logps"]) == len(p)


def scored(files: dict, folder: Path, kind: str, *more: str) -> list[dict]:
    """What `sample.py RUN --score ROWS --ref SFT` writes of the run in folder."""
    out = folder / "scored.jsonl"
    argv = [str(folder / "run"), "--score", files[kind], "--ref", files["sft"], "--out", str(out)]
    assert sample.main([*argv, *more]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_scored_rows_give_the_reported_loss(files, tmp_path):
    """Each alone, where held-out groups of a run share batches: the last bits differ."""
    assert preference("exo", files, tmp_path / "run") == 0
    rows = scored(files, tmp_path, "pairs", "--label_smoothing", "1e-3")
    policy, ref, target = (
        torch.tensor([r[k] for r in rows], dtype=torch.float64)
        for k in ("logps", "ref_logps", "target")
    )
    loss = exo.exo_loss(policy, ref, target.log(), 0.1).item()
    assert loss == pytest.approx(records(tmp_path / "run", "eval")[-1]["loss"], rel=1e-5)


def test_the_same_seed_gives_the_same_numbers(files, tmp_path):
    for name in ("a", "b"):
        assert preference("dpo", files, tmp_path / name) == 0
    for kind in ("eval", "train"):
        a, b = (records(tmp_path / name, kind) for name in ("a", "b"))
        assert [{**r, **RATES} for r in a] == [{**r, **RATES} for r in b]
    a, b = (load_checkpoint(tmp_path / name)["model"] for name in ("a", "b"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_micro_batches_give_the_gradient_of_the_large_batch(files, tmp_path):
    """Unequal micro-batches, too: 8 groups as 3 + 3 + 2, each weighted by what it holds."""
    for stage in ("exo", "sft"):
        gradients = []
        for micro in (None, 3):
            s = train.Settings(
                stage,
                data=[files["pairs"]],
                init=files["sft"],
                micro_batch_size=micro,
                grad_clip=0,
                dtype="float64",
            )
            task = train.make_stage(s, torch.device("cpu"))
            seen = []
            optimizer = train.adamw(task.policy.gpt, s, 0.0)
            optimizer.register_step_pre_hook(
                lambda o, *_, seen=seen: seen.extend(
                    p.grad.clone() for g in o.param_groups for p in g["params"]
                )
            )
            train.update(s, task, optimizer, np.arange(8), 0.0)
            gradients.append(seen)
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_a_resumed_run_does_not_ask_the_reference_again(files, tmp_path, monkeypatch):
    """Its log-probs are in the checkpoint: the run goes on as if it had not been stopped, without
    --init where no KL is estimated."""
    argv = ["--kl_samples", "0"]
    assert preference("exo", files, tmp_path / "whole", *argv) == 0
    update, steps = train.update, []

    def killed(*args):
        steps.append(1)
        if len(steps) == 5:
            raise ZeroDivisionError
        return update(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "update", killed)
        with pytest.raises(ZeroDivisionError):
            preference("exo", files, tmp_path / "cut", *argv)
    asked, score = [], train.score

    def counting(*args):
        asked.append(args[-1] == "reference")
        return score(*args)

    monkeypatch.setattr(train, "score", counting)
    assert preference("exo", files, tmp_path / "cut", *argv, "--resume") == 0
    assert asked
    assert not any(asked)
    a, b = (load_checkpoint(tmp_path / name) for name in ("whole", "cut"))
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    assert all(torch.equal(a["task"][k], b["task"][k]) for k in a["task"])


def test_reference_log_probs_are_computed_only_for_rows_that_will_be_read(files, tmp_path):
    """And for more of them when the run is made longer."""
    argv = ["exo", "--data", files["pairs"], "--init", files["sft"], "--batch_size", "2"]
    one, two = (
        train.make_stage(train.parse([*argv, "--max_iters", n]), torch.device("cpu")) for n in "12"
    )
    for stage, steps in ((one, 1), (two, 2)):
        known = np.flatnonzero(np.isfinite(stage.groups.ref_logps)).tolist()
        read = sorted(g for i in range(steps) for g in stage.ids(i))
        assert known == [int(stage.groups.first[g]) + k for g in read for k in (1, 2)]
    two.load_state(one.state())
    known = np.isfinite(two.groups.ref_logps)
    assert known.sum() == 2 * 4


def test_a_forks_loss_is_one_function_and_one_entry(files, tmp_path, monkeypatch):
    def ipo_loss(policy_logps, ref_logps, log_target, beta_pi=1.0, mask=None):
        ratio = policy_logps - ref_logps.to(policy_logps)
        return (ratio[:, 0] - ratio[:, 1] - 1 / (2 * beta_pi)).square().mean()

    monkeypatch.setitem(exo.LOSSES, "ipo", ipo_loss)
    assert preference("ipo", files, tmp_path / "run") == 0
    assert records(tmp_path / "run", "eval")[0]["loss"] == pytest.approx(25.0)


def test_warns_when_the_chosen_fall(files, tmp_path, capsys):
    """DPO's well-known side effect: the margin grows while both log-probs fall."""
    s = train.Settings("dpo", data=[files["pairs"]], eval_data=[files["pairs"]], init=files["sft"])
    s.kl_samples = 0
    task = train.make_stage(s, torch.device("cpu"))
    task.held_out.ref_logps += 1.0
    task.evaluate(7)
    task.evaluate(8)
    printed = capsys.readouterr().out
    assert printed.count("warning: at step 7 the chosen completions are less likely") == 1
    assert "step 8" not in printed


def test_what_may_be_rounding_is_a_tie():
    """Before the first step policy and reference are equal but for the batches they were computed
    in: half, not whatever the last bits say. A real lead counts in full."""
    target = torch.tensor([[0.9, 0.1]]).log()
    mask = torch.ones(1, 2, dtype=torch.bool)
    for lead, accuracy in ((0.0, 0.5), (2e-5, 0.5), (-2e-5, 0.5), (1e-3, 1.0), (-1e-3, 0.0)):
        figures = train.preference_figures(torch.tensor([[lead, 0.0]]), target, mask)
        assert figures["accuracy"].item() == accuracy


def test_accuracy_counts_pairs_with_unlike_targets():
    """Three completions, rewards 0, 1, 1: two comparable pairs; one ordered alike, one tied."""
    target = torch.tensor([[0.0, 1.0, 1.0]])
    ratio = torch.tensor([[0.0, 2.0, 0.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert exo.accuracy(ratio, target, mask) == 0.75
    assert exo.accuracy(ratio, target, torch.tensor([[True, True, False]])) == 1.0


def test_temperature_is_stored_and_scales_logits(files, tmp_path):
    out = tmp_path / "warm"
    argv = ["sft", "--data", files["pairs"], "--eval_data", files["pairs"], "--out", str(out)]
    assert train.main([*argv, *TINY, "--temperature", "2.0"]) == 0
    gpt, ckpt = load_gpt(out)
    assert ckpt["temperature"] == 2.0
    groups, _ = data.read_groups([files["pairs"]], data.byte_encoding(), 64, "sft")
    total, count = 0.0, 0
    for g in range(len(groups)):
        x = groups.prompt(g) + groups.completions(g)[0]
        targets = torch.tensor([*groups.completions(g)[0], groups.eot])
        logits = gpt(torch.tensor([x]))[0, -len(targets) :] / 2.0
        total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        count += len(targets)
    assert records(out, "eval")[-1]["loss"] == pytest.approx(total / count, rel=1e-5)


def test_learning_rate_warms_up_and_decays():
    s = train.Settings("sft", data=["x"], warmup_iters=10)
    rates = [train.schedule(s, step, 100) for step in range(100)]
    assert rates[0] < rates[5] < rates[9] < 1
    assert max(rates) == rates[10] == 1.0
    assert rates[-1] == pytest.approx(0.1, abs=0.01)


# ------------------------------------------------------------------------------
# A fork's losses, as a fork would write them


def ipo_loss(policy_logps, ref_logps, log_target, beta_pi=1.0, mask=None):
    """Azar et al. 2023, arXiv:2310.12036, Eq. 17: pairs, chosen first."""
    ratio = policy_logps - ref_logps
    return (ratio[:, 0] - ratio[:, 1] - 1 / (2 * beta_pi)).square().mean()


def simpo_loss(policy_logps, ref_logps, log_target, beta_pi=1.0, mask=None, *, lengths):
    """Meng et al. 2024, arXiv:2405.14734, Eq. 6 with gamma 0: no reference, a mean over tokens."""
    assert not ref_logps.any()
    mean = policy_logps / lengths
    return torch.nn.functional.softplus(-beta_pi * (mean[:, 0] - mean[:, 1])).mean()


def test_a_loss_for_pairs_refuses_rows_with_rewards(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(exo.LOSSES, "ipo", ipo_loss)
    monkeypatch.setitem(exo.NEEDS, ipo_loss, exo.Needs(pairs=True))
    assert preference("ipo", files, tmp_path / "run") == 0
    assert preference("ipo", files, tmp_path / "rewards", data_="rewards") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"{files['rewards']}:1: ipo wants preference pairs, not rewards" in said
    argv = ["ipo", "--data", files["pairs"], "--init", files["sft"], "--online", "--reward", REWARD]
    assert "ipo wants pairs, chosen first" in mistake([*argv, "--out", str(tmp_path / "x")], capsys)


def test_a_loss_without_a_reference_and_with_lengths(files, tmp_path, monkeypatch):
    """Nothing is asked of a reference, and the loss is what its formula says."""
    monkeypatch.setitem(exo.LOSSES, "simpo", simpo_loss)
    needs = exo.Needs(pairs=True, reference=False, lengths=True)
    monkeypatch.setitem(exo.NEEDS, simpo_loss, needs)
    assert preference("simpo", files, tmp_path / "run", "--beta_pi", "2") == 0
    rows = scored(files, tmp_path, "pairs")
    mean = [
        [x / (len(row[k].encode()) + 1) for x, k in zip(row["logps"], names, strict=True)]
        for names in [("chosen", "rejected")]
        for row in rows
    ]
    gap = torch.tensor([a - b for a, b in mean])
    loss = torch.nn.functional.softplus(-2 * gap).mean().item()
    assert loss == pytest.approx(records(tmp_path / "run", "eval")[-1]["loss"], rel=1e-4)


@pytest.mark.parametrize("online", [False, True])
def test_exo_under_another_name_is_exo(online, files, tmp_path, monkeypatch):
    """Its default smoothing and its on-policy correction belong to the function."""
    monkeypatch.setitem(exo.LOSSES, "mine", exo.exo_loss)
    more = ["--online", "--reward", REWARD, "--K", "3", "--round_iters", "2"] if online else []
    for name in ("exo", "mine"):
        assert preference(name, files, tmp_path / name, *more) == 0
    a, b = (without_rates(tmp_path / name / "metrics.jsonl") for name in ("exo", "mine"))
    assert a == b


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


@pytest.mark.parametrize(
    "argv",
    [
        ["sft"],
        ["reward"],
        ["exo", "--reward", "MODEL"],
        ["dpo"],
        ["exo", "--online", "--reward", "MODEL"],
        ["dpo", "--online", "--reward", "MODEL"],
        ["ppo", "--reward", "MODEL"],
    ],
)
def test_no_float64_goes_to_a_device(argv, files, tmp_path):
    """It crashed every stage with a reference, and the reward model, on a Mac."""
    train_rm = ["reward", "--data", files["pairs"], "--out", str(tmp_path / "rm"), *TINY]
    assert "MODEL" not in argv or train.main(train_rm) == 0
    argv = [str(tmp_path / "rm") if a == "MODEL" else a for a in argv]
    argv += ["--data", files["pairs"], "--eval_data", files["pairs"], "--init", files["sft"]]
    argv += ["--out", str(tmp_path / "run"), *SHORT, "--device", "cpu:0"]
    with RefusesFloat64():
        assert train.main(argv) == 0


def test_a_loss_that_is_no_number_stops_the_run_before_the_step(
    files, tmp_path, monkeypatch, capsys
):
    """The checkpoint stays good, metrics stay JSON, and the sentence names step and rows."""
    calls = []

    def breaks(policy_logps, *args):
        calls.append(policy_logps.requires_grad)
        return exo.dpo_loss(policy_logps, *args) * (math.nan if sum(calls) == 5 else 1.0)

    monkeypatch.setitem(exo.LOSSES, "breaks", breaks)
    assert preference("breaks", files, tmp_path / "run", "--kl_samples", "0") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("train.py: step 4: the gradient is no number for the rows ")
    assert f"{files['pairs']}:" in said
    assert said.endswith("keeps the checkpoint of step 3")
    ckpt = load_checkpoint(tmp_path / "run")
    assert ckpt["step"] == 3
    assert all(x.isfinite().all() for x in ckpt["model"].values())
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


# ------------------------------------------------------------------------------
# Stopping and going on


def without_rates(path: Path) -> list[dict]:
    return [{**json.loads(r), **RATES} for r in path.read_text().splitlines()]


def command(files: dict, out: Path, *more: str) -> list[str]:
    argv = [sys.executable, "train.py", "exo", "--data", files["pairs"], "--init", files["sft"]]
    argv += ["--eval_data", files["pairs"], "--out", str(out), "--max_iters", "40"]
    return [*argv, *"--eval_interval 5 --log_interval 1 --kl_samples 2 --threads 1".split(), *more]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_resumes_to_the_same_result(how, files, tmp_path):
    """Weights and metrics equal those of the run that nobody stopped, bit for bit."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": ROOT}
    subprocess.run(command(files, whole), check=True, **quiet)
    process = subprocess.Popen(command(files, stopped), **quiet)
    metrics = stopped / "metrics.jsonl"
    deadline = time.time() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 9) and time.time() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, how)
    status = process.wait()
    assert status in ((-9,) if how == signal.SIGKILL else (128 + how,))
    subprocess.run(command(files, stopped, "--resume"), check=True, **quiet)
    assert without_rates(metrics) == without_rates(whole / "metrics.jsonl")
    a, b = (load_checkpoint(out) for out in (whole, stopped))
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    assert a["step"] == b["step"] == 40


def test_a_finished_run_resumes_to_itself_without_held_out_data(files, tmp_path):
    """Settings are compared as settings.json holds them, where an empty tuple is a list."""
    argv = ["dpo", "--data", files["pairs"], "--init", files["sft"], "--out", str(tmp_path / "run")]
    assert train.main([*argv, *SHORT]) == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert train.main([*argv, *SHORT, "--resume"]) == 0
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_what_does_not_change_the_mathematics_may_change_on_resume(files, tmp_path):
    """After an out-of-memory: fewer groups at once, checkpointing; and a run made longer."""
    assert preference("dpo", files, tmp_path / "run", "--batch_size", "4") == 0
    argv = ["dpo", "--data", files["pairs"], "--eval_data", files["pairs"], "--init", files["sft"]]
    argv += ["--out", str(tmp_path / "run"), *SHORT[2:], "--batch_size", "4", "--resume"]
    more = ["--micro_batch_size", "2", "--gradient_checkpointing", "--max_iters", "12"]
    assert train.main([*argv, *more]) == 0
    assert [r["step"] for r in records(tmp_path / "run", "train")] == list(range(1, 13))


def test_the_reference_is_that_of_the_beginning(files, tmp_path, monkeypatch, capsys):
    """--init is read once; where it was trained meanwhile, the run does not go on with another."""
    sft, read, load = tmp_path / "sft", [], train.load_gpt
    argv = ["sft", "--data", files["pairs"], "--out", str(sft), "--init", files["sft"]]
    assert train.main([*argv, "--max_iters", "1"]) == 0
    monkeypatch.setattr(train, "load_gpt", lambda *a, **k: read.append(a) or load(*a, **k))
    own = {**files, "sft": str(sft)}
    assert preference("dpo", own, tmp_path / "run") == 0
    assert len(read) == 1
    assert train.main([*argv, "--max_iters", "3", "--overwrite"]) == 0
    assert preference("dpo", own, tmp_path / "run", "--resume") == 2
    assert "is another model than when the run began" in capsys.readouterr().err


def test_the_best_weights_can_be_chosen(files, tmp_path):
    """--which best, as --init and in sample.py."""
    argv = ["sft", "--data", files["pairs"], "--eval_data", files["pairs"], "--init", files["sft"]]
    rates = ["--learning_rate", "3", "--max_iters", "3", "--eval_interval", "1"]
    assert train.main([*argv, "--out", str(tmp_path / "run"), *rates]) == 0
    last, best = (load_gpt(tmp_path / "run", which=which)[0] for which in ("last", "best"))
    assert best.wte.weight.equal(load_gpt(files["sft"])[0].wte.weight)
    assert not best.wte.weight.equal(last.wte.weight)
    s = train.parse(["sft", "--data", "x", "--init", str(tmp_path / "run"), "--which", "best"])
    assert train.build(s)[0].wte.weight.equal(best.wte.weight)
    texts = []
    for which in ("last", "best"):
        out = tmp_path / f"{which}.jsonl"
        argv = [str(tmp_path / "run"), "--which", which, "--prompt", "the", "--out", str(out)]
        assert sample.main(argv) == 0
        texts.append(out.read_text())
    assert texts[0] != texts[1]


def test_an_interrupt_where_nothing_can_be_saved_is_one_line(files, tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "make_stage", interrupted)
    assert preference("dpo", files, tmp_path / "run") == 130
    assert capsys.readouterr().err == "train.py: stopped before it could save\n"


def test_a_run_is_not_overwritten_by_accident(files, tmp_path, capsys):
    assert preference("dpo", files, tmp_path / "run") == 0
    before = (tmp_path / "run" / "ckpt.pt").read_bytes()
    assert preference("dpo", files, tmp_path / "run") == 2
    assert "--resume, --overwrite or another --out" in capsys.readouterr().err
    assert preference("dpo", files, tmp_path / "run", "--resume", "--beta_pi", "0.2") == 2
    assert "another --beta_pi" in capsys.readouterr().err
    assert (tmp_path / "run" / "ckpt.pt").read_bytes() == before
    assert preference("dpo", files, tmp_path / "run", "--overwrite") == 0
    with pytest.raises(SystemExit):  # would delete what it starts from
        preference("dpo", files, Path(files["sft"]), "--overwrite")
    assert (Path(files["sft"]) / "ckpt.pt").exists()


# ------------------------------------------------------------------------------
# Mistakes: one sentence, exit status 2, no folder left


def mistake(argv: list[str], capsys) -> str:
    """Run train.main on a wrong command line; the one line it says."""
    try:
        status = train.main(argv)
    except SystemExit as exit:
        status = exit.code
    said = capsys.readouterr().err.strip()
    assert status == 2
    assert "\n" not in said
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (None, "cannot read"),
        ("", "the file is empty"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": \n', ":2: broken JSON"),
        ('{"question": "a"}', ":1: fields ['question'] fit none of the formats"),
        (
            '{"prompt": "a", "completions": ["b", "c"], "rewards": [1]}',
            "rewards must be 2 finite numbers, got [1]",
        ),
        (
            '{"prompt": "a", "completions": ["b", "c"], "rewards": [1, NaN]}',
            "rewards must be 2 finite numbers, got [1, NaN]",
        ),
        ('{"prompt": "a", "chosen": "b", "rejected": "b"}', "nothing usable (0 of 1 rows usable"),
        ('{"prompt": "a"}', "expected preference pairs or completions with rewards"),
    ],
)
def test_wrong_data_is_named_with_file_and_line(rows, said, files, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    if rows is not None:
        file.write_text(rows)
    out = tmp_path / "run"
    argv = ["exo", "--data", str(file), "--init", files["sft"], "--out", str(out)]
    message = mistake(argv, capsys)
    assert said in message
    assert str(file) in message
    assert not out.exists()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["exa"], "invalid choice: 'exa'"),
        (["--data", "PAIRS"], "toy reads no files: name a stage first"),
        (["sft", "--lr", "1"], "unrecognized arguments: --lr 1"),
        (["sft"], "sft needs --data"),
        (["exo", "--data", "PAIRS"], "exo needs --init"),
        (["exo", "--data", "PAIRS", "--init", "nowhere"], "no checkpoint at nowhere"),
        (["exo", "--data", "PAIRS", "--init", "PAIRS"], "no file of torch.save"),
        (["exo", "--data", "PAIRS", "--init", "SFT", "--label_smoothing", "0"], "infinite"),
        (["dpo", "--data", "PAIRS", "--init", "SFT", "--label_smoothing", "0.5"], "eps < 0.5"),
        (["kto", "--data", "PAIRS", "--init", "SFT"], "invalid choice: 'kto'"),
        (["dpo", "--data", "PAIRS", "--init", "SFT", "--beta_pi", "0"], "above 0, got 0.0"),
        (["dpo", "--data", "PAIRS", "--init", "SFT", "--beta_pi", "nan"], "finite number"),
        (["dpo", "--data", "PAIRS", "--init", "SFT", "--n_embd", "32"], "disagrees with --init"),
        (["sft", "--data", "PAIRS", "--init_std", "0"], "must be a finite number above 0"),
        (["dpo", "--data", "PAIRS", "--init", "SFT", "--encoding", "gpt2"], "disagrees with"),
        (["dpo", "--data", "PAIRS", "--init", "SFT", "--device", "tpu"], "is not there"),
        (["sft", "--data", "PAIRS", "--n_embd", "10", "--n_head", "3"], "must be divisible by"),
        (["sft", "--data", "PAIRS", "--encoding", "klingon"], "unknown encoding 'klingon'"),
        (["sft", "--data", "PAIRS", "--epochs", "1", "--max_iters", "2"], "not both"),
        (["sft", "--data", "PAIRS", "--batch_size", "0"], "--batch_size must be at least 1"),
        (["sft", "--data", "PAIRS", "--resume"], "holds no run with a checkpoint"),
    ],
)
def test_each_wrong_setting_gets_one_sentence(argv, said, files, tmp_path, capsys):
    out = tmp_path / "run"
    names = {"PAIRS": files["pairs"], "SFT": files["sft"]}
    assert said in mistake([names.get(a, a) for a in argv] + ["--out", str(out)], capsys)
    assert not out.exists()


def test_a_checkpoint_from_another_vocabulary_is_refused(files, tmp_path, capsys):
    """Ids of one tokenizer mean nothing to a model of another."""
    ckpt = dict(load_checkpoint(files["sft"]))
    ckpt["config"] = ckpt["config"] | {"vocab_size": 300}
    ckpt["model"] = GPT(GPTConfig(**ckpt["config"])).state_dict()
    torch.save(ckpt, tmp_path / "other.pt")
    argv = ["exo", "--data", files["pairs"], "--init", str(tmp_path / "other.pt")]
    said = mistake([*argv, "--out", str(tmp_path / "run")], capsys)
    assert "vocabulary of 300" in said
    assert not (tmp_path / "run").exists()


def test_every_setting_is_read_somewhere():
    """A dead option is worse than none."""
    files = [ROOT / "train.py", *(ROOT / "methods").glob("*.py"), ROOT / "infra/checkpoint.py"]
    whole = "".join(file.read_text(encoding="utf-8") for file in files)
    source = whole.split("class Parser")[1]
    for name in train.Settings.__dataclass_fields__:
        read = f"s.{name}" in source or f'"{name}"' in source or f"self.{name} =" in whole
        assert read, name


# ------------------------------------------------------------------------------
# sample.py


def test_samples_do_not_depend_on_batch_size(files, tmp_path):
    texts = []
    for size in ("1", "7"):
        out = tmp_path / f"{size}.jsonl"
        argv = [files["sft"], "--prompts", files["pairs"], "-n", "2", "--max_new_tokens", "6"]
        assert sample.main([*argv, "--batch_size", size, "--out", str(out)]) == 0
        texts.append(out.read_text())
    assert texts[0] == texts[1]
    rows = [json.loads(line) for line in texts[0].splitlines()]
    assert len(rows) == 24
    assert all(len(row["completions"]) == 2 for row in rows)


def test_sample_prints_text_and_says_what_is_wrong(files, capsys):
    argv = [files["sft"], "--prompt", "the cat", "--max_new_tokens", "5"]
    assert sample.main(argv) == 0
    assert capsys.readouterr().out.startswith("the cat")
    with pytest.raises(SystemExit, match="2"):
        sample.main([*argv, "--temperature", "-1"])
    assert "temperature must be 0 or more" in capsys.readouterr().err
    assert sample.main([files["sft"], "--max_new_tokens", "64"]) == 2
    assert "leaves no room for a prompt" in capsys.readouterr().err
    assert sample.main(["nowhere"]) == 2
    assert "no checkpoint at nowhere" in capsys.readouterr().err


def shortest(prompt: str, completion: str) -> float:
    return -float(len(completion))


REWARD = "tests.test_train:shortest"


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_sample_score_train_is_three_commands(files, tmp_path):
    samples, scored = str(tmp_path / "samples.jsonl"), str(tmp_path / "scored.jsonl")
    draw = [files["sft"], "--prompts", files["pairs"], "-n", "3", "--max_new_tokens", "6"]
    assert sample.main([*draw, "--out", samples]) == 0
    assert sample.main([files["sft"], "--score", samples, "--reward", REWARD, "--out", scored]) == 0
    for row in rows_of(Path(scored)):
        assert row["rewards"] == [-len(y) for y in row["completions"]]
        assert len(row["logps"]) == 3
    argv = ["exo", "--data", scored, "--init", files["sft"], "--out", str(tmp_path / "run"), *SHORT]
    assert train.main(argv) == 0


def test_scores_are_the_log_probs_of_a_plain_forward_pass(files, tmp_path):
    """End of text included, prompts not; pairs stay pairs, rewards stay if none are asked for."""
    out = tmp_path / "scored.jsonl"
    for kind in ("pairs", "rewards"):
        argv = [files["sft"], "--score", files[kind], "--out", str(out), "--overwrite"]
        assert sample.main([*argv, "--batch_size", "5", "--temperature", "0.7"]) == 0
        gpt, ckpt = load_gpt(files["sft"])
        encoding = data.get_encoding(ckpt["encoding"])
        given = rows_of(Path(files[kind]))
        for before, row in zip(given, rows_of(out), strict=True):
            texts = row.get("completions") or [row["chosen"], row["rejected"]]
            for text, logp in zip(texts, row["logps"], strict=True):
                x = encoding.encode_ordinary(row["prompt"])
                y = [*encoding.encode_ordinary(text), encoding.eot_token]
                with torch.no_grad():
                    each = (gpt(torch.tensor([x + y])) / 0.7).log_softmax(-1)[0]
                slow = each[len(x) - 1 : -1].gather(-1, torch.tensor(y)[:, None]).sum().item()
                assert logp == pytest.approx(slow, rel=1e-4)
            assert {k: v for k, v in row.items() if k != "logps"} == before


def test_what_is_cut_is_counted_and_said(files, tmp_path, capsys):
    """By --score, and by a reward model with less room than the policy."""
    row = {"prompt": "p" * 50, "chosen": "c" * 60, "rejected": "no"}
    file = write_rows(tmp_path / "long.jsonl", [row])
    assert sample.main([files["sft"], "--score", file]) == 0
    said = capsys.readouterr().err
    assert "cut to block_size: 1 prompts from the left, 1 completions from the right" in said
    rm = ["reward", "--data", files["pairs"], "--out", str(tmp_path / "rm"), *TINY]
    assert train.main([*rm, "--block_size", "16"]) == 0
    assert sample.main([files["sft"], "--score", file, "--reward", str(tmp_path / "rm")]) == 0
    assert "cuts texts to its block_size of 16: here 2 prompts" in capsys.readouterr().out


def test_prompts_need_no_max_new_tokens_at_a_small_block_size(files, capsys):
    assert sample.main([files["sft"], "--prompt", "the cat"]) == 0
    assert capsys.readouterr().out.startswith("the cat")


def test_a_users_module_is_found_in_the_working_directory(files, tmp_path):
    (tmp_path / "rewards_beside_me.py").write_text("def f(prompt, completion):\n    return 1.0\n")
    command = [sys.executable, str(ROOT / "sample.py"), files["sft"], "--prompt", "a"]
    command += ["--max_new_tokens", "4", "--reward", "rewards_beside_me:f"]
    subprocess.run(command, check=True, cwd=tmp_path, stdout=subprocess.DEVNULL)


def test_best_of_keeps_the_best(files, tmp_path):
    """The best 2 of 4 + 4 are those of the 8 drawn without it."""
    common = [files["sft"], "--prompts", files["pairs"], "--max_new_tokens", "9"]
    common += ["--reward", REWARD, "--out"]
    assert sample.main([*common, str(tmp_path / "all.jsonl"), "-n", "8"]) == 0
    assert sample.main([*common, str(tmp_path / "best.jsonl"), "-n", "2", "--best_of", "4"]) == 0
    rows = zip(rows_of(tmp_path / "all.jsonl"), rows_of(tmp_path / "best.jsonl"), strict=True)
    for every, top in rows:
        r = every["rewards"]
        assert top["rewards"] == [max(r[:4]), max(r[4:])]
        assert top["completions"] == [every["completions"][r.index(x, i)] for x, i in
                                      zip(top["rewards"], (0, 4), strict=True)]  # fmt: skip


@pytest.mark.parametrize("scoring", [False, True])
def test_a_stopped_sampling_goes_on(scoring, files, tmp_path):
    """Cut anywhere, also within a line, and even with prompts that occur twice."""
    rows = rows_of(Path(files["pairs"]))[:6]
    source = write_rows(tmp_path / "rows.jsonl", [*rows, *rows])
    argv = [files["sft"], "--batch_size", "2", "--max_new_tokens", "6", "-n", "2"]
    argv += ["--score" if scoring else "--prompts", source, "--out"]
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    assert sample.main([*argv, str(whole)]) == 0
    content = whole.read_bytes()
    for size in (0, 40, len(content) // 2, len(content) - 1, len(content)):
        part.write_bytes(content[:size])
        assert sample.main([*argv, str(part)]) == 0
        if scoring:  # batch mates shift sums in the last bits
            for a, b in zip(rows_of(part), rows_of(whole), strict=True):
                assert b["logps"] == pytest.approx(a.pop("logps"), rel=1e-5)
                assert a == {k: v for k, v in b.items() if k != "logps"}
        else:
            assert part.read_bytes() == content


def test_rows_arrive_as_they_are_finished(files, tmp_path):
    """A reward that breaks at the third batch leaves the rows of the first two."""
    module = tmp_path / "broken_reward.py"
    module.write_text(
        "calls = []\ndef reward(prompts, completions):\n    calls.append(1)\n"
        "    return [0.0] * (len(completions) - (len(calls) == 3))\n"
    )
    sys.path.insert(0, str(tmp_path))
    out = tmp_path / "out.jsonl"
    argv = [files["sft"], "--prompts", files["pairs"], "--batch_size", "4", "--out", str(out)]
    argv += ["--max_new_tokens", "4"]
    assert sample.main([*argv, "--reward", "broken_reward:reward"]) == 2
    assert len(rows_of(out)) == 8
    assert sample.main([*argv, "--reward", "broken_reward:reward"]) == 0
    assert len(rows_of(out)) == 24


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--best_of", "2"], "--best_of needs --reward"),
        (["--ref", "out/sft"], "--ref is for --score"),
        (["--score", "x.jsonl", "--beta_r", "0"], "beta_r must be above 0, got 0.0"),
        (["--score", "x.jsonl", "--label_smoothing", "0.5"], "label_smoothing must be in [0, 0.5)"),
        (["--score", "x.jsonl", "--prompt", "a"], "--score brings its own prompts"),
        (["--score", "x.jsonl", "--best_of", "2", "--reward", REWARD], "--score draws nothing"),
        (["--score", "x.jsonl", "--temperature", "0"], "--score needs a temperature above 0"),
        (["--out", "x.txt"], "must end in .jsonl"),
        (["--score", "nowhere.jsonl"], "cannot read nowhere.jsonl"),
        (["--score", "a.jsonl", "--out", "./a.jsonl"], "--out is the file that --score reads"),
        (["--prompt", "a", "--top_k", "0"], "top_k must be at least 1"),
        (["--prompt", "a", "--seed", "-1"], "seed must not be negative"),
        (["--prompt", "a", "--reward", "nowhere:f", "--max_new_tokens", "4"], "nowhere"),
    ],
)
def test_sample_says_what_is_wrong(argv, said, files, capsys):
    try:
        status = sample.main([files["sft"], *argv])
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2
    assert said in error.splitlines()[-1]


def test_out_is_touched_only_when_all_input_has_been_read(files, tmp_path):
    """A mistake elsewhere on the command line costs no results."""
    out = tmp_path / "rows.jsonl"
    before = '{"prompt": "a", "completions": ["b"]}\n{"prompt": "c", "completions": ["d"]}'
    out.write_text(before)
    common = [files["sft"], "--prompts", files["pairs"], "--max_new_tokens", "6", "--out"]
    argv = [*common, str(out), "--overwrite"]
    assert sample.main([*argv, "--reward", "nowhere:f"]) == 2
    assert sample.main(["nowhere", *argv[1:]]) == 2
    assert out.read_text() == before
    (tmp_path / "folder.jsonl").mkdir()
    assert sample.main([*common, str(tmp_path / "folder.jsonl")]) == 2


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "keeps its rows, the same command goes on"),
        (OSError(28, "No space left on device"), 2, "cannot write"),
    ],
)
def test_sampling_stopped_by_ctrl_c_or_a_full_disk(
    error, status, said, files, tmp_path, monkeypatch, capsys
):
    """The rows that were finished stay, and the same command goes on to the same file."""
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    argv = [files["sft"], "--prompts", files["pairs"], "--batch_size", "4"]
    argv += ["--max_new_tokens", "4", "--out"]
    assert sample.main([*argv, str(whole)]) == 0
    dumps, rows = json.dumps, []

    def breaks(row, *args, **kwargs):
        if isinstance(row, dict):
            rows.append(row)
            if len(rows) == 6:
                raise error
        return dumps(row, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(sample.json, "dumps", breaks)
        assert sample.main([*argv, str(part)]) == status
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert len(rows_of(part)) == 5
    assert sample.main([*argv, str(part)]) == 0
    assert part.read_bytes() == whole.read_bytes()


def test_a_full_disk_while_training_is_a_sentence(files, tmp_path, monkeypatch, capsys):
    """torch says RuntimeError where a checkpoint does not fit; the last one stays, and the run goes
    on from it."""
    out, save = tmp_path / "run", torch.save
    assert preference("dpo", files, tmp_path / "whole") == 0

    def full_disk(value, path):
        if value["step"] > 0:
            raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")
        save(value, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        assert preference("dpo", files, out) == 2
    assert "cannot write" in capsys.readouterr().err.splitlines()[-1]
    assert load_checkpoint(out)["step"] == 0
    assert not list(out.glob(".*"))
    assert preference("dpo", files, out, "--resume") == 0
    a, b = (load_checkpoint(x)["model"] for x in (tmp_path / "whole", out))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_tf32_only_on_a_gpu_and_not_where_float32_was_asked_for(files, tmp_path):
    before = torch.get_float32_matmul_precision()
    found = []
    try:
        for dtype in (None, "bfloat16", "float32"):
            s = train.Settings("sft", data=["-"], dtype=dtype)
            torch.set_float32_matmul_precision("highest")
            set_precision(s.dtype, torch.device("cpu"))
            assert torch.get_float32_matmul_precision() == "highest"
            set_precision(s.dtype, torch.device("cuda"))
            found.append(torch.get_float32_matmul_precision())
    finally:
        torch.set_float32_matmul_precision(before)
    assert found == ["high", "high", "highest"]


def test_the_best_of_n_is_sft_data(files, tmp_path):
    best = tmp_path / "best.jsonl"
    argv = [files["sft"], "--prompts", files["pairs"], "--best_of", "2", "--reward", REWARD]
    assert sample.main([*argv, "--max_new_tokens", "6", "--out", str(best)]) == 0
    out = str(tmp_path / "run")
    argv = ["sft", "--data", str(best), "--init", files["sft"], "--max_iters", "1", "--out", out]
    assert train.main(argv) == 0
