"""Run folders: what was saved comes back, and a file or folder that cannot go on says why in one
sentence, before anything of it is touched."""

import dataclasses
import json
import pickle
from pathlib import Path

import pytest
import torch

from infra.checkpoint import (
    FREE,
    check_free,
    load_checkpoint,
    load_gpt,
    load_run,
    open_run,
    plain,
    save_run,
)
from infra.rows import InputError
from model import GPT, GPTConfig

CONFIG = GPTConfig(block_size=8, vocab_size=257, n_layer=1, n_head=1, n_embd=8)
SETTINGS = {"beta_pi": 0.1, "data": ["a.jsonl"], "resume": False, "overwrite": False}
SETTINGS |= {"max_iters": 3}


def weights(seed: int, stage: str = "exo") -> dict:
    gpt = GPT(CONFIG, torch.Generator().manual_seed(seed))
    about = {"config": vars(CONFIG), "encoding": "bytes", "temperature": 0.5, "stage": stage}
    return {"model": gpt.state_dict()} | about


def state(step: int) -> dict:
    counts = {"step": step, "evaluated": step, "best": 0.0, "sft": 0.0}
    return counts | {"optimizer": {}, "task": {}}


@pytest.fixture
def out(tmp_path) -> Path:
    """A run whose second checkpoint is better than its first, and than its third."""
    out = tmp_path / "run"
    open_run(out, SETTINGS)
    for step, better in enumerate((True, True, False)):
        save_run(out, weights(step), state(step), better)
    return out


def refusal(action, *args) -> str:
    """The one sentence a mistake gets."""
    with pytest.raises(InputError, match=r"^[^\n]+$") as error:
        action(*args)
    return str(error.value)


# ------------------------------------------------------------------------------
# Reading


@pytest.mark.parametrize(("which", "step"), [("last", 2), ("best", 1)])
def test_what_was_saved_comes_back(which, step, out):
    """The last weights or the best, in eval mode, and all that says how to use them."""
    gpt, rest = load_gpt(out, which=which)
    assert not gpt.training
    expected = weights(step)["model"]
    assert all(x.equal(expected[name]) for name, x in gpt.state_dict().items())
    assert {name: rest[name] for name in ("encoding", "temperature", "stage", "step")} == {
        "encoding": "bytes",
        "temperature": 0.5,
        "stage": "exo",
        "step": step,
    }
    assert {p.name for p in out.iterdir()} == {"settings.json", "config.json", "ckpt.pt", "best.pt"}
    assert json.loads((out / "config.json").read_text()) == vars(CONFIG) | {"encoding": "bytes"}
    assert load_gpt(out / "best.pt")[1]["step"] == 1


def test_a_reward_model_is_no_policy(out):
    save_run(out, weights(0, "reward"), state(3), False)
    assert "is a reward model: it rates text and writes none" in refusal(load_gpt, out)
    assert load_gpt(out, policy=False)[1]["stage"] == "reward"


class Code:
    """A pickle that would run something."""

    def __reduce__(self):
        return print, ("a checkpoint ran its code",)


def write(out: Path, kind: str) -> None:
    whole, ckpt = (out / "ckpt.pt").read_bytes(), weights(0)
    contents = {
        "text": b"no checkpoint",
        "empty": b"",
        "cut": whole[: len(whole) // 2],
        "pickle": pickle.dumps(ckpt["config"]),
    }
    values = {
        "tensor": torch.zeros(2),
        "nanoGPT's": {"model": ckpt["model"], "optimizer": {}, "model_args": ckpt["config"]},
        "code": ckpt | {"step": Code()},
    }
    if kind in contents:
        (out / "ckpt.pt").write_bytes(contents[kind])
    else:
        torch.save(values[kind], out / "ckpt.pt")


@pytest.mark.parametrize("kind", ["text", "empty", "cut", "pickle", "tensor", "nanoGPT's", "code"])
def test_a_damaged_or_foreign_file_is_named(kind, out, capsys):
    """And its code, if it has any, is not run."""
    write(out, kind)
    said = f"{out / 'ckpt.pt'} is damaged, or no file of torch.save by this project: "
    assert refusal(load_checkpoint, out).startswith(said)
    assert not capsys.readouterr().out


def test_no_checkpoint_is_a_sentence(tmp_path):
    assert refusal(load_gpt, tmp_path) == f"no checkpoint at {tmp_path / 'ckpt.pt'}"
    assert refusal(load_gpt, tmp_path / "a.pt") == f"no checkpoint at {tmp_path / 'a.pt'}"


@pytest.mark.parametrize(
    "change", [{"config": vars(CONFIG) | {"rotary": 1}}, {"config": vars(CONFIG) | {"n_embd": 4}}]
)
def test_a_checkpoint_that_model_py_has_grown_away_from_is_a_sentence(change, out):
    save_run(out, weights(0) | change, state(3), False)
    assert refusal(load_gpt, out).startswith(f"{out} does not fit this model.py: ")


# ------------------------------------------------------------------------------
# Going on


def test_a_run_goes_on_with_the_same_settings_and_those_that_may_change(out):
    """After an out-of-memory, say: what does not change the mathematics may change."""
    again = SETTINGS | {"max_iters": 9, "resume": True} | dict.fromkeys(FREE, "other")
    assert load_run(out, again)["step"] == 2
    open_run(out, again)
    assert load_run(out, again)["step"] == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda out: edit(out, cache=""), "was made by other code, which knew --cache"),
        (lambda out: edit(out, beta_pi=0.2, data=["b"]), "has another --beta_pi, --data"),
        (lambda out: (out / "settings.json").write_text('{"beta'), "cannot read {out}/settings"),
        (lambda out: (out / "settings.json").write_text("[1]"), "cannot read {out}/settings.json"),
        (lambda out: (out / "settings.json").unlink(), "holds no run with a checkpoint"),
        (lambda out: (out / "ckpt.pt").unlink(), "holds no run with a checkpoint"),
        (
            lambda out: (out / "best.pt").replace(out / "ckpt.pt"),
            "{out}/ckpt.pt lacks evaluated, best, optimizer, task, sft",
        ),
    ],
)
def test_a_run_that_cannot_go_on_says_why(change, said, out):
    """Flags that are gone are not the user's mistake; weights alone are no run."""
    change(out)
    message = refusal(load_run, out, SETTINGS | {"resume": True})
    assert message.startswith("--resume: ")
    assert said.format(out=out) in message


def edit(out: Path, **entries) -> None:
    (out / "settings.json").write_text(json.dumps(SETTINGS | entries))


def test_settings_are_compared_as_json_holds_them():
    @dataclasses.dataclass
    class Settings:
        data: tuple = ("a", "b")

    assert plain(Settings()) == {"data": ["a", "b"]}


def test_a_run_is_not_overwritten_by_accident(out):
    """--overwrite takes away all that a new run would not write at once, and what a killed process
    left half written; --resume leaves the rest alone."""
    said = f"{out} holds a run: give --resume, --overwrite or another --out"
    assert refusal(check_free, out, False, False) == refusal(open_run, out, SETTINGS) == said
    (out / "metrics.jsonl").touch()
    (out / ".ckpt.pt.123").touch()
    check_free(out, True, False)
    open_run(out, SETTINGS | {"resume": True})
    names = {"settings.json", "config.json", "metrics.jsonl", "ckpt.pt", "best.pt"}
    assert {p.name for p in out.iterdir()} == names
    open_run(out, SETTINGS | {"overwrite": True})
    assert {p.name for p in out.iterdir()} == {"settings.json", "config.json"}
    check_free(out, False, False)


def test_a_full_disk_keeps_the_last_checkpoint(out, monkeypatch):
    """torch says RuntimeError where the system says OSError."""
    for error in (RuntimeError("file write failed\nat 3"), OSError(28, "No space left on device")):

        def full_disk(value, path, error=error):
            path.write_bytes(b"half")
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(torch, "save", full_disk)
            message = refusal(save_run, out, weights(3), state(3), True)
        assert message.startswith(f"cannot write {out / 'best.pt'}")
        assert load_checkpoint(out)["step"] == 2
        assert load_checkpoint(out, "best")["step"] == 1
        assert not list(out.glob(".*"))
