"""
Run folders: what a run leaves, how it is read again, and how it goes on.

    settings.json   the flags           ckpt.pt         the last state, to resume
    config.json     the model's shape   best.pt         the weights with the lowest held-out loss
    metrics.jsonl   a record a line

A checkpoint is a dict of tensors, numbers and strings: {model, config, encoding, temperature,
stage, head (of a reward model)}; ckpt.pt has {step, evaluated, best, optimizer, task, sft}
beside these. It knows nothing of processes: what many sharded processes saved one process loads.
"""

import json
import math
import zipfile
from dataclasses import asdict
from pathlib import Path

import torch

from data import get_encoding
from infra.huggingface import from_pretrained, pretrained_config
from infra.rows import InputError, make_folder, replacing, write_json
from model import GPT, GPTConfig

FILES = {"last": "ckpt.pt", "best": "best.pt"}  # what --which chooses from
HINT = "give --resume, --overwrite or another --out"
GO_ON = ("step", "evaluated", "best", "optimizer", "task", "sft")  # beside weights, to resume
FREE = {  # flags that may change when a run goes on: the mathematics stays
    *("out", "resume", "overwrite", "device", "compile", "fsdp", "threads"),
    *("micro_batch_size", "gradient_checkpointing", "max_iters", "epochs", "log_interval"),
}

# ------------------------------------------------------------------------------
# Reading


def load_checkpoint(path: str | Path, which: str = "last") -> dict:
    """A run folder's last or best checkpoint, or a .pt file, on the CPU."""
    path = Path(path)
    file = path / FILES[which] if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"no checkpoint at {file}")
    try:
        with open(file, "rb") as content:
            if not zipfile.is_zipfile(content):
                raise ValueError("no file of torch.save, or a damaged one")
        ckpt = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        if not {"model", "config", "encoding", "temperature"} <= set(ckpt):
            raise KeyError("not a checkpoint of this project")
    except Exception as error:  # whatever a damaged or foreign file makes torch raise
        raise InputError(
            f"cannot read the checkpoint {file}: {str(error).splitlines()[0]}"
        ) from error
    return ckpt


def checkpoint_gpt(ckpt: dict, path: str | Path) -> GPT:
    """The model of a checkpoint. Raises InputError where model.py has changed since."""
    try:
        gpt = GPT(GPTConfig(**ckpt["config"]))
        gpt.load_state_dict(ckpt["model"])
    except (TypeError, ValueError, RuntimeError) as error:
        why = " ".join(str(error).split())
        raise InputError(f"{path} does not fit this model.py: {why[:200]}") from error
    return gpt


def load_gpt(
    path: str | Path,
    device="cpu",
    encoding: str | None = None,
    policy: bool = True,
    which: str = "last",
) -> tuple[GPT, dict]:
    """The model of a run folder, a .pt file or a Hugging Face GPT-2 folder, in eval mode, and the
    checkpoint's other entries. encoding: of a Hugging Face folder that does not say (None: gpt2).
    policy: refuse a reward model, whose trunk no longer says what comes next.
    """
    folder = Path(path)
    ours = any((folder / name).exists() for name in ("ckpt.pt", "settings.json"))
    if folder.is_dir() and not ours and (folder / "config.json").exists():
        gpt, ckpt = load_hugging_face(folder, encoding)
        return gpt.to(device).eval(), ckpt
    ckpt = load_checkpoint(path, which)
    if policy and ckpt.get("stage") == "reward":
        raise InputError(f"{path} is a reward model: it rates text and writes none")
    gpt = checkpoint_gpt(ckpt, path)
    del ckpt["model"]
    return gpt.to(device).eval(), ckpt


def load_hugging_face(folder: Path, encoding: str | None) -> tuple[GPT, dict]:
    """load_gpt of a Hugging Face folder. Words beyond the encoding's, which pad the vocabulary or
    were added to it, are left out: no text contains them, and none may be sampled."""
    config = pretrained_config(folder)
    said = config.get("exo")  # written by `sample.py --export`
    said = said if isinstance(said, dict) else {}
    name, temperature = said.get("encoding"), said.get("temperature", 1.0)
    if name is not None and ":" in str(name) and name != encoding:  # would run code
        raise InputError(f"{folder} has the encoding {name}: say --encoding {name} to run it")
    if not isinstance(temperature, int | float) or not 0 < temperature < math.inf:
        raise InputError(f"{folder}: temperature must be above 0, got {temperature!r}")
    name = str(name or encoding or "gpt2")
    n_vocab = get_encoding(name).n_vocab
    gpt = from_pretrained(folder, n_vocab)
    ckpt = {"config": asdict(gpt.config), "encoding": name, "temperature": temperature}
    return gpt, ckpt | {"left_out": config.get("vocab_size", n_vocab) - n_vocab}


# ------------------------------------------------------------------------------
# Opening, saving, going on


def plain(settings) -> dict:
    """A dataclass of settings as JSON gives it back: tuples are lists."""
    return json.loads(json.dumps(asdict(settings)))


def check_free(out: Path, resume: bool, overwrite: bool) -> None:
    if (out / "ckpt.pt").exists() and not (resume or overwrite):
        raise InputError(f"{out} holds a run: {HINT}")


def load_run(out: Path, settings: dict) -> dict:
    """The checkpoint of the run to resume, whose settings must be these."""
    if not (out / "settings.json").is_file() or not (out / "ckpt.pt").is_file():
        raise InputError(f"--resume: {out} holds no run with a checkpoint")
    try:
        before = dict(json.loads((out / "settings.json").read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise InputError(f"--resume: cannot read {out / 'settings.json'}: {error}") from error
    if gone := [k for k in before if k not in settings]:
        raise InputError(
            f"--resume: the run in {out} was made by other code, which knew --{', --'.join(gone)}: "
            "only that code can go on with it; as --init it may still do"
        )
    changed = [k for k, v in before.items() if k not in FREE and settings[k] != v]
    if changed:
        raise InputError(f"--resume: the run in {out} has another --{', --'.join(changed)}")
    ckpt = load_checkpoint(out)
    if lacks := [k for k in GO_ON if k not in ckpt]:
        said = f"--resume: {out / 'ckpt.pt'} lacks {', '.join(lacks)}: only --init can use it"
        raise InputError(said)
    return ckpt


def open_run(out: Path, settings: dict) -> None:
    """Makes the run folder, only when all input has been read."""
    for half_written in out.glob(".*.pt.*"):  # by a process that was killed while it saved
        half_written.unlink()
    if not settings["resume"]:
        check_free(out, False, settings["overwrite"])
        make_folder(out)
        for old in ("ckpt.pt", "best.pt", "metrics.jsonl"):
            (out / old).unlink(missing_ok=True)
    write_json(out / "settings.json", settings)


def save_run(out: Path, weights: dict, rest: dict, better: bool) -> None:
    """ckpt.pt with everything a resumed run needs, and best.pt with the weights alone."""
    write_json(out / "config.json", weights["config"] | {"encoding": weights["encoding"]})
    if better:
        write_tensors(out / "best.pt", weights | {"step": rest["step"]})
    write_tensors(out / "ckpt.pt", weights | rest)


def write_tensors(path: Path, value: dict) -> None:
    with replacing(path) as temporary:
        try:
            torch.save(value, temporary)
        except RuntimeError as error:  # what torch makes of a full disk
            why = str(error).splitlines()[0]
            raise InputError(f"cannot write {path}: is the disk full? ({why})") from error
