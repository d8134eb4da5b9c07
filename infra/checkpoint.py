"""
Run folders: what a run leaves, how it is read again, and how it goes on.

    settings.json   the flags           ckpt.pt         the last state, to resume
    config.json     the model's shape   best.pt         the weights with the lowest held-out loss
    metrics.jsonl   a record a line     run.lock        number of the process that writes here

A checkpoint is a dict of tensors, numbers and strings: {model, config, encoding, temperature,
stage, head (of a reward model)}; ckpt.pt has {step, evaluated, best, optimizer, task, sft, data}
beside these. It knows nothing of processes: what many sharded processes saved one process loads.

One process at a time writes to a folder; reading one asks nobody. What an old run left stays until
the first checkpoint of the new one is written whole. Nothing is synced to the disk: kill -9 loses
nothing, a power cut may.
"""

import contextlib
import json
import shutil
from dataclasses import asdict, fields
from pathlib import Path

import torch

from data import get_encoding
from infra.huggingface import from_pretrained, pretrained_config, save_pretrained, tokenizer_files
from infra.outputs import append, checksum, hold, read_records
from infra.rows import InputError, make_folder, one_sentence, read_json, replacing, write_json
from infra.untrusted import check_weights, encoding_of, fitting, load_file
from model import GPT, GPTConfig

FILES = {"last": "ckpt.pt", "best": "best.pt"}  # what --which chooses from
KINDS = {  # of a checkpoint's entries, as far as it has them
    **dict.fromkeys(("model", "config", "head", "optimizer", "task"), dict),
    **dict.fromkeys(("encoding", "stage"), str),
    **dict.fromkeys(("step", "evaluated"), int),
    **dict.fromkeys(("temperature", "best", "sft"), (int, float)),
    "data": list,
}
WRITTEN = ("settings.json", "config.json", "metrics.jsonl", *FILES.values())  # by a run
TOY = ("results.json", "sweep.json")  # by the toy, and pictures
OTHERWISE = "give --resume, --overwrite or another --out"
GO_ON = ("step", "evaluated", "best", "optimizer", "task", "sft", "data")  # to resume
FREE = {  # flags that may change when a run goes on: the mathematics stays
    *("out", "resume", "overwrite", "device", "compile", "fsdp"),
    *("micro_batch_size", "gradient_checkpointing", "max_iters", "epochs", "log_interval"),
}


def load_checkpoint(path: str | Path, which: str = "last") -> dict:
    """A run folder's last or best checkpoint, or a .pt file, on the CPU."""
    file = Path(path) / FILES[which] if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise InputError(f"no checkpoint at {file}")
    with one_sentence(f"{file} is damaged, or no file of torch.save by this project"):
        ckpt = load_file(file)
        if missing := {"model", "config", "encoding", "temperature"} - ckpt.keys():
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        check_kinds(ckpt)
        for name in ckpt.keys() & {"model", "head"}:
            check_weights(ckpt[name], file.stat().st_size)
    return ckpt


def check_kinds(ckpt: dict) -> None:
    for name in ckpt.keys() & KINDS.keys():
        if not isinstance(ckpt[name], KINDS[name]):
            raise ValueError(f"its {name} is of type {type(ckpt[name]).__name__}")
    if not 1e-6 <= ckpt["temperature"] <= 1e6:
        raise ValueError(f"its temperature is {ckpt['temperature']}")
    if ckpt.get("step", 0) < 0:
        raise ValueError(f"its step is {ckpt['step']}")


def checkpoint_gpt(ckpt: dict, path: str | Path, encoding: str | None = None) -> GPT:
    """The model of a checkpoint. encoding: as the user said. Raises InputError where model.py has
    changed since, or where the checkpoint names an encoding that is code and the user did not."""
    n_vocab = get_encoding(encoding_of(ckpt["encoding"], encoding, path)).n_vocab
    with one_sentence(f"{path} does not fit this model.py"):
        config = GPTConfig(**ckpt["config"])
        for f in fields(config):
            value = getattr(config, f.name)
            if not isinstance(value, f.type) or (f.type is int and value is True):
                raise ValueError(f"its {f.name} is {value!r}")
        fitting(config, ckpt["model"])
        gpt = GPT(config)
        gpt.load_state_dict(ckpt["model"])
    if gpt.config.vocab_size != n_vocab:
        words = f"{gpt.config.vocab_size} words, its encoding {ckpt['encoding']} has {n_vocab}"
        raise InputError(f"{path} has {words}")
    return gpt


def load_gpt(
    path: str | Path, device="cpu", encoding: str | None = None, policy=True, which="last"
) -> tuple[GPT, dict]:
    """The model of a run folder, a .pt file or a Hugging Face GPT-2 folder, in eval mode, and the
    checkpoint's other entries. encoding: of a Hugging Face folder that does not say (None: gpt2);
    a module:function must be said. policy: refuse a reward model, whose trunk no longer says what
    comes next.
    """
    folder = Path(path)
    ours = (folder / "ckpt.pt").exists() or (folder / "settings.json").exists()
    if not ours and (folder / "config.json").exists():
        gpt, ckpt = load_hugging_face(folder, encoding)
    else:
        ckpt = load_checkpoint(path, which)
        if policy and ckpt.get("stage") == "reward":
            raise InputError(f"{path} is a reward model: it rates text and writes none")
        gpt = checkpoint_gpt(ckpt, path, encoding)
        del ckpt["model"]
    return gpt.to(device).eval(), ckpt


def load_hugging_face(folder: Path, encoding: str | None) -> tuple[GPT, dict]:
    """load_gpt of a Hugging Face folder. Words beyond the encoding's, which pad the vocabulary or
    were added to it, are left out: no text contains them, and none may be sampled."""
    config = pretrained_config(folder)
    with one_sentence(f"{folder}/config.json: exo"):  # written by `sample.py --export`
        said = {"encoding": encoding or "gpt2", "temperature": 1.0} | config.get("exo", {})
        check_kinds(said)
    name = encoding_of(said["encoding"], encoding, folder)
    gpt = from_pretrained(folder, get_encoding(name).n_vocab)
    left_out = config["vocab_size"] - gpt.config.vocab_size
    return gpt, said | {"config": asdict(gpt.config), "left_out": left_out}


def export(path: str, out: Path, encoding: str | None = None, which: str = "last") -> None:
    """The model at path as a Hugging Face folder, with the tokenizer of the one that it began from.

    config.json keeps our encoding and temperature for a later --init; generation_config.json makes
    transformers' `generate` draw from the distribution that was trained.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--export {out} is not an empty folder: give another")
    gpt, ckpt = load_gpt(path, encoding=encoding, which=which)
    name, temperature = ckpt["encoding"], ckpt["temperature"]
    eot, files = get_encoding(name).eot_token, tokenizer_files(Path(path))
    save_pretrained(gpt, out, eot, exo={"encoding": name, "temperature": temperature})
    generation = {"do_sample": True, "temperature": temperature, "top_k": 0}
    write_json(
        out / "generation_config.json", generation | {"bos_token_id": eot, "eos_token_id": eot}
    )
    with one_sentence(f"cannot write {out}", OSError):
        for file in files:
            shutil.copyfile(file, out / file.name)
    print(f"{out}: GPT-2 of {sum(p.numel() for p in gpt.parameters()):,} parameters")
    if not files:
        print(f"no tokenizer is written: training did not begin from a folder with one for {name}")


def plain(settings) -> dict:
    """A dataclass of settings as JSON gives it back: tuples are lists."""
    return json.loads(json.dumps(asdict(settings)))


def fingerprint(module: torch.nn.Module) -> int:
    """checksum of the weights."""
    return checksum(p.detach().cpu().contiguous().numpy() for p in module.parameters())


def enter_run(out: Path, may_exist: bool, held: contextlib.ExitStack) -> None:
    """Makes the run folder, only when all input has been read, and keeps it until `held` closes."""
    make_folder(out)
    hold(out / "run.lock", [out / name for name in WRITTEN + TOY], held)
    if may_exist:
        return
    if (out / "ckpt.pt").exists():  # since check_free
        raise InputError(f"{out} holds a run: {OTHERWISE}")
    for name in ("best.pt", "metrics.jsonl"):  # of a process that was killed as it began
        (out / name).unlink(missing_ok=True)


def check_free(out: Path, resume: bool, overwrite: bool) -> bool:
    """Whether there is a checkpoint to go on from: a run that was killed before its first one
    simply starts. Raises InputError for a folder with files that train.py would replace and did not
    write, for a run that nobody said to replace, and for one that has lost its checkpoint."""
    found = {p.name for p in out.iterdir()} if out.is_dir() else set()
    marks = {"settings.json": "stage", "results.json": "worlds"}  # of a run, of the toy
    mine = "run.lock" in found or any(
        name in found and mark in read_json(out / name) for name, mark in marks.items()
    )
    pictures = {name for name in found if name.endswith((".png", ".gif"))}
    if not mine and (others := sorted(found & {*WRITTEN, *TOY} | pictures)):
        raise InputError(f"{out} has a {others[0]} that train.py did not write: give another --out")
    if found & {*FILES.values(), "metrics.jsonl"} and not (resume or overwrite):
        raise InputError(f"{out} holds a run: {OTHERWISE}")
    if resume and "ckpt.pt" not in found:
        replaced = any(name.startswith(".ckpt.pt.") for name in found)  # killed just then
        trained = any(record["step"] for record in read_records(out / "metrics.jsonl"))
        if trained and not replaced:
            raise InputError(f"--resume: {out} has lost its ckpt.pt; --overwrite begins anew")
        return False
    return resume


def load_run(out: Path, settings: dict) -> dict:
    """The checkpoint of the run to resume, whose settings must be these."""
    with one_sentence(f"--resume: {out} holds no run with a checkpoint", InputError):
        before, ckpt = read_json(out / "settings.json"), load_checkpoint(out)
    if gone := ", --".join(sorted(before.keys() - settings)):
        knew = f"the run in {out} was made by other code, which knew --{gone}"
        raise InputError(f"--resume: {knew}: only that code can go on with it, or --init use it")
    if changed := [k for k in before if k not in FREE and settings[k] != before[k]]:
        raise InputError(f"--resume: the run in {out} has another --{', --'.join(changed)}")
    if lacks := ", ".join(k for k in GO_ON if k not in ckpt):
        raise InputError(f"--resume: {out / 'ckpt.pt'} lacks {lacks}: only --init can use it")
    return ckpt


def save_run(
    out: Path, weights: dict, rest: dict, better: bool, records=(), settings: dict | None = None
) -> None:
    """ckpt.pt with everything a resumed run needs, best.pt with the weights alone, and the records
    up to here. The checkpoints are whole before anything else in the folder changes. settings: of a
    run whose first checkpoint this is; what an old run left goes now."""
    best = replacing(out / "best.pt") if better else contextlib.nullcontext()
    full = one_sentence(f"cannot write to {out}, is the disk full?", RuntimeError)
    with full, replacing(out / "ckpt.pt") as whole, best as weights_alone:
        torch.save(weights | rest, whole)
        if better:
            torch.save(weights | {"step": rest["step"]}, weights_alone)
        if settings:
            for old in ("ckpt.pt", "best.pt", "metrics.jsonl"):
                (out / old).unlink(missing_ok=True)
            write_json(out / "settings.json", settings)
            write_json(out / "config.json", weights["config"] | {"encoding": weights["encoding"]})
        append(out / "metrics.jsonl", records)
