"""Run folders: what was saved comes back, and a file or folder that cannot go on says why in one
sentence, before anything of it is touched."""

import dataclasses
import json
import pickle
import random
from pathlib import Path

import pytest
import torch

from infra.checkpoint import (
    FREE,
    WRITTEN,
    load_checkpoint,
    load_gpt,
    load_run,
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
    counts = {"step": step, "evaluated": step, "best": 0.0, "sft": 0}
    return counts | {"optimizer": {}, "task": {}, "data": [0]}


@pytest.fixture
def out(tmp_path) -> Path:
    """A run whose second checkpoint is better than its first, and than its third."""
    out = tmp_path / "run"
    out.mkdir()
    for step, better in enumerate((True, True, False)):
        settings = None if step else SETTINGS
        save_run(out, weights(step), state(step), better, [{"step": step}], settings)
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
    assert {p.name for p in out.iterdir()} == {*WRITTEN}
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


@pytest.mark.parametrize("tries", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_bit_that_flipped_is_found(tries, out):
    """Records have checksums. What is read with a flipped bit, or of a file cut off, is what was
    written: the bit was in the padding, or in a date."""
    whole, expected, rng = (out / "ckpt.pt").read_bytes(), load_checkpoint(out), random.Random(0)
    read = 0
    for i in range(tries):
        content, file = bytearray(whole), out / f"{i % 2}.pt"
        content[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        file.unlink(missing_ok=True)  # the one before last, which nobody maps any more
        file.write_bytes(content[: rng.randrange(len(whole)) if i % 10 == 0 else None])
        try:
            found = load_checkpoint(file)
        except InputError:
            continue
        model = found["model"]
        assert all(x.equal(model[name]) for name, x in expected["model"].items())
        assert found | {"model": None} == expected | {"model": None}
        read += 1
    assert read < tries / 4


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
            "{out}/ckpt.pt lacks evaluated, best, optimizer, task, sft, data",
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
