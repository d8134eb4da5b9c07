"""
Training: settings, one loop, checkpoints, and a task per stage.

    python train.py                      the exact world, about a minute
    python train.py sft --data pairs.jsonl --out out/sft
    python train.py exo --data pairs.jsonl --init out/sft --out out/exo      (or dpo)

A task knows its batches, its loss and its evaluation; the loop knows steps, schedule, logging and
saving, and nothing of methods. All randomness is a function of (seed, step), so a resumed run needs
no generator states. Reference log-probs never change: they are computed once, before the first
step, for the rows that will be read, and no second model is in memory while training.

A run folder holds settings.json, config.json (the model's shape), ckpt.pt (the last state, to
resume), best.pt (the weights with the lowest held-out loss) and metrics.jsonl (one record a line).
"""

import argparse
import dataclasses
import json
import math
import os.path
import sys
from dataclasses import dataclass, field

STAGES = ("toy", "sft", "exo", "dpo")
OFFLINE = ("sft", "exo", "dpo")


def flag(default, text: str):
    """A setting: its default and the reason or range that --help prints."""
    return field(default=default, metadata={"help": text})


@dataclass
class Settings:
    """Every setting of every stage; the command line and --help are made from it. None: decided by
    the stage or by --init, as the text says."""

    stage: str = flag("toy", "what to train; toy is the exact world")
    out: str = flag("", "run folder, by default out/STAGE")
    # data
    data: list[str] = flag((), "training files: .jsonl, .jsonl.gz, .json, .txt")
    eval_data: list[str] = flag((), "held-out files")
    encoding: str | None = flag(
        None, "bytes, a tiktoken name or module:function (--init's, or bytes; Hugging Face: gpt2)"
    )
    # model
    init: str = flag(
        "",
        "start from this run folder, .pt file or Hugging Face GPT-2 folder; exo and dpo stay near",
    )
    block_size: int | None = flag(None, "longest text in tokens (--init's, or 256)")
    n_layer: int | None = flag(None, "blocks (--init's, or 4)")
    n_head: int | None = flag(None, "attention heads (--init's, or 4)")
    n_embd: int | None = flag(None, "width (--init's, or 128)")
    temperature: float | None = flag(
        None, "divides logits, in training and sampling (--init's, or 1)"
    )
    # method
    loss: str | None = flag(None, "exo or dpo, or a fork's entry in exo.LOSSES (the stage's name)")
    beta_pi: float = flag(0.1, "larger stays closer to the reference; 0.1 to 0.5 is usual")
    beta_r: float = flag(1.0, "temperature of rewards: small trusts them, large flattens them")
    label_smoothing: float | None = flag(
        None, "probability that a label is wrong (exo 1e-3, dpo 0)"
    )
    # optimisation
    batch_size: int = flag(8, "groups per optimizer step")
    micro_batch_size: int | None = flag(
        None, "groups in memory at once; does not change the result"
    )
    epochs: float | None = flag(None, "passes over the data (1, unless --max_iters is given)")
    max_iters: int | None = flag(None, "optimizer steps, instead of --epochs")
    learning_rate: float | None = flag(None, "peak (sft 1e-3 from scratch, else 5e-5)")
    lr_decay: str = flag("cosine", "cosine, linear or constant; down to a tenth of the peak")
    warmup_iters: int | None = flag(None, "steps of linear warm-up (a twentieth of all)")
    weight_decay: float = flag(0.0, "AdamW's, on matrices")
    beta2: float = flag(0.99, "AdamW's second moment; few tokens a step want a long memory")
    grad_clip: float = flag(1.0, "largest gradient norm; 0 turns clipping off")
    # evaluation
    eval_interval: int = flag(100, "steps between evaluations, each followed by a checkpoint")
    log_interval: int = flag(10, "steps between training records")
    kl_samples: int = flag(32, "completions drawn to estimate the KL from sft; 0: none")
    max_new_tokens: int = flag(64, "longest drawn completion; the KL is that of texts cut here")
    dump_eval: str = flag("", "write a JSON line per held-out group here after the last step")
    # machine
    seed: int = flag(0, "the same seed gives the same numbers")
    device: str | None = flag(None, "cuda, mps or cpu (the first there is)")
    dtype: str | None = flag(
        None, "float32, bfloat16 (autocast; the choice on cuda) or float64 (weights too)"
    )
    threads: int | None = flag(None, "CPU threads; the sums, and so the last bits, depend on it")
    compile: bool = flag(False, "torch.compile: pays off on a GPU, slow to start on a CPU")
    gradient_checkpointing: bool = flag(
        False, "keep only each block's input and compute the rest again: less memory, 1/3 slower"
    )
    fsdp: bool = flag(False, "shard weights, gradients and optimizer over torchrun's processes")
    resume: bool = flag(False, "go on from --out's ckpt.pt")
    overwrite: bool = flag(False, "replace the run in --out")
    # toy
    seeds: int = flag(8, "toy: number of seeds")
    sweep: bool = flag(False, "toy: also the sweeps over K, beta and n_embd (9 minutes)")

    def __post_init__(self):
        self.out = self.out or f"out/{self.stage}"
        self.loss = self.loss or (self.stage if self.stage in ("exo", "dpo") else None)
        if self.label_smoothing is None:
            self.label_smoothing = 1e-3 if self.loss == "exo" else 0.0
        if self.epochs is None and self.max_iters is None:
            self.epochs = 1.0
        for ok, sentence in self.rules():
            if not ok:
                raise ValueError(sentence)

    def rules(self):
        """(holds, what to say if not), one for each way in which settings can contradict."""
        s = self
        need_init, preference = s.stage in ("exo", "dpo"), s.stage in ("exo", "dpo")
        yield s.stage in STAGES, f"unknown stage {s.stage!r}: choose from {', '.join(STAGES)}"
        if s.stage != "toy":
            yield s.data, f"{s.stage} needs --data FILE"
        else:
            given = s.data or s.eval_data or s.init
            yield (
                not given,
                "toy reads no files: name a stage first, as in train.py exo --data F",
            )
        init, out = os.path.realpath(s.init), os.path.realpath(s.out)
        inside = s.init and out in (init, os.path.dirname(init))
        yield not (inside and s.overwrite), f"--overwrite would delete --init {s.init}"
        yield not s.dump_eval or preference, "--dump_eval is for exo and dpo"
        if need_init:
            yield s.init, f"{s.stage} needs --init, a run made by `python train.py sft` or GPT-2"
        if preference:
            low = "0 <" if s.loss == "exo" else "0 <="
            ok = 0 < s.label_smoothing < 0.5 or (s.loss != "exo" and s.label_smoothing == 0)
            why = " (at 0 the reverse KL is infinite)" if s.loss == "exo" else ""
            yield ok, f"--label_smoothing must be {low} eps < 0.5{why}, got {s.label_smoothing}"
        yield not (s.epochs and s.max_iters), "give --epochs or --max_iters, not both"
        yield s.lr_decay in ("cosine", "linear", "constant"), f"unknown --lr_decay {s.lr_decay!r}"
        ok = s.dtype in (None, "float32", "bfloat16", "float64")
        yield ok, "--dtype must be float32, bfloat16 or float64"
        yield not s.fsdp or s.stage in OFFLINE, f"--fsdp is for {', '.join(OFFLINE)}"
        yield not (s.resume and s.overwrite), "give --resume or --overwrite, not both"
        yield not s.dump_eval or s.eval_data, "--dump_eval needs --eval_data"
        for name in ("beta_pi", "beta_r", "temperature", "learning_rate", "epochs"):
            value = getattr(s, name)
            ok = value is None or (value > 0 and math.isfinite(value))
            yield ok, f"--{name} must be a finite number above 0, got {value}"
        steps = ("batch_size", "micro_batch_size", "max_iters", "eval_interval", "log_interval")
        sizes = ("block_size", "n_layer", "n_head", "n_embd", "max_new_tokens", "seeds", "threads")
        for name in (*steps, *sizes):
            value = getattr(s, name)
            least = 2 if name == "block_size" else 1
            yield value is None or value >= least, f"--{name} must be at least {least}, got {value}"
        for name in ("kl_samples", "weight_decay", "grad_clip", "warmup_iters", "seed"):
            value = getattr(s, name)
            yield value is None or value >= 0, f"--{name} must not be negative, got {value}"
        yield 0 <= s.beta2 < 1, f"--beta2 must be in [0, 1), got {s.beta2}"


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes take one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n")


def parse(argv: list[str]) -> Settings:
    """Command line -> Settings; exits with 2 and one sentence if they contradict."""
    parser = Parser(
        "train.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("stage", nargs="?", default="toy", choices=STAGES)
    for f in dataclasses.fields(Settings)[1:]:
        kind, text = str(f.type), f.metadata["help"]
        if kind == str(bool):
            parser.add_argument(f"--{f.name}", action="store_true", help=text)
            continue
        shown = "" if f.default in (None, "", ()) else f" (default {f.default})"
        types = {"int": int, "float": float}
        base = kind.replace("<class '", "").replace("'>", "").split(" | ")[0]
        nargs = {"nargs": "+"} if base.startswith("list") else {}
        parser.add_argument(
            f"--{f.name}",
            type=types.get(base, str),
            default=f.default,
            help=text + shown,
            metavar=base.upper() if base in types else "NAME" if not nargs else "FILE",
            **nargs,
        )
    try:
        return Settings(**vars(parser.parse_args(argv)))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    parse(sys.argv[1:])  # --help and mistakes are answered before the slow imports

# ruff: noqa: E402
import contextlib
import os
import resource
import signal
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

import exo
from data import (
    Builder,
    Groups,
    InputError,
    Report,
    collate,
    epoch_batches,
    get_encoding,
    read_groups,
)
from model import GPT, Block, GPTConfig, Scorer, forward_flops, pretrained_config

# ------------------------------------------------------------------------------
# Processes: torchrun starts one for each GPU. Each reads all rows, takes every world()-th group of
# a batch, and holds the whole model (DDP) or a shard of it (--fsdp). Alone, this section does
# nothing. What the host must know of the others (weights of means, a signal) goes through gloo, so
# that no GPU waits for it.


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def say(text: str, file=None) -> None:
    """print, in the first process only."""
    if rank() == 0:
        print(text, file=file or sys.stdout)


def total(*values: float) -> list[float]:
    """Each value summed over the processes."""
    if world() == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(sums)
    return sums.tolist()


def gather(value: object) -> list:
    """[the first process' value, the second's, ...], in every process."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values


def only_first(action, *args) -> None:
    """The first process does it while the others wait; its InputError is everyone's."""
    said = None
    if rank() == 0:
        try:
            action(*args)
        except InputError as error:
            said = str(error)
    said = gather(said)[0]
    if said is not None:
        raise InputError(said)


@contextlib.contextmanager
def processes(s: Settings):
    """Joins torchrun's processes, if it started us; gives this process' device."""
    device = pick_device(s.device)
    if "RANK" not in os.environ:
        if s.fsdp:
            raise InputError("--fsdp needs several processes: torchrun --nproc_per_node=N train.py")
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def wrap(module: torch.nn.Module, s: Settings, device: torch.device) -> torch.nn.Module:
    """The module in DDP, sharded in place (FSDP2), compiled; its forward is the only way in."""
    if s.fsdp:
        mesh = dist.init_device_mesh(device.type, (world(),))
        for block in [m for m in module.modules() if isinstance(m, Block)]:
            fully_shard(block, mesh=mesh)
        fully_shard(module, mesh=mesh)
    if s.compile:
        module = torch.compile(module)
    if world() > 1 and not s.fsdp:
        ids = [device] if device.type == "cuda" else None
        module = DDP(module, ids, broadcast_buffers=False, gradient_as_bucket_view=True)
    return module


@contextlib.contextmanager
def accumulating(module: torch.nn.Module, last: bool):
    """Gradients meet only in the last of several backward passes."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
    with contextlib.nullcontext() if last or not isinstance(module, DDP) else module.no_sync():
        yield


def full(state):
    """A state dict (or a part of one) with whole tensors in place of shards; every process must
    take part."""
    if isinstance(state, dict):
        return {k: full(v) for k, v in state.items()}
    if isinstance(state, list):
        return [full(v) for v in state]
    return state.full_tensor() if isinstance(state, DTensor) else state


def shard(value, like: Tensor):
    """A whole tensor, cut as `like` is; a number stays what it is."""
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def load_whole(module: torch.nn.Module, optimizer, model: dict, optimizer_state: dict) -> None:
    """Weights and optimizer state of a checkpoint into a module that may be sharded."""
    own = module.state_dict()
    module.load_state_dict({k: shard(v, own[k]) for k, v in model.items()})
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        i: {k: shard(v, parameters[i]) for k, v in entry.items()}
        for i, entry in optimizer_state["state"].items()
    }
    optimizer.load_state_dict(optimizer_state | {"state": state})


# ------------------------------------------------------------------------------
# Files of a run: written beside their place and moved there, so that none is ever half written


@contextlib.contextmanager
def replacing(path: Path):
    """A temporary path to write to; it takes the place of `path` only if the block succeeds."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def load_checkpoint(path: str | Path) -> dict:
    """A run folder's ckpt.pt, or a .pt file: {model, config, encoding, temperature, stage, ...}, on
    the CPU."""
    path = Path(path)
    file = path / "ckpt.pt" if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"no checkpoint at {file}")
    try:
        ckpt = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        if not {"model", "config", "encoding", "temperature"} <= set(ckpt):
            raise KeyError("not a checkpoint of this project")
    except Exception as error:  # whatever a damaged or foreign file makes torch raise
        raise InputError(
            f"cannot read the checkpoint {file}: {str(error).splitlines()[0]}"
        ) from error
    return ckpt


def load_gpt(path: str | Path, device="cpu", encoding: str | None = None) -> tuple[GPT, dict]:
    """The model of a run folder, a .pt file or a Hugging Face GPT-2 folder, in eval mode, and the
    checkpoint's other entries. encoding: of a Hugging Face folder that does not say (None: gpt2).
    """
    folder = Path(path)
    ours = any((folder / name).exists() for name in ("ckpt.pt", "settings.json"))
    if folder.is_dir() and not ours and (folder / "config.json").exists():
        return load_hugging_face(folder, device, encoding)
    ckpt = load_checkpoint(path)
    gpt = GPT(GPTConfig(**ckpt["config"]))
    gpt.load_state_dict(ckpt.pop("model"))
    return gpt.to(device).eval(), ckpt


def load_hugging_face(folder: Path, device, encoding: str | None) -> tuple[GPT, dict]:
    """load_gpt of a Hugging Face folder. Words beyond the encoding's, which pad the vocabulary or
    were added to it, are left out: no text contains them, and none may be sampled."""
    try:
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
        gpt = GPT.from_pretrained(folder, n_vocab)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from error
    ckpt = {"config": dataclasses.asdict(gpt.config), "encoding": name}
    ckpt |= {"temperature": temperature, "left_out": config.get("vocab_size", n_vocab) - n_vocab}
    return gpt.to(device).eval(), ckpt


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {path}: {error.strerror}") from error


def plain(s: Settings) -> dict:
    """As JSON gives it back: tuples are lists."""
    return json.loads(json.dumps(dataclasses.asdict(s)))


def check_run(s: Settings) -> None:
    """The run to resume is there, and its settings are these."""
    out, settings = Path(s.out), plain(s)
    if not (out / "settings.json").is_file() or not (out / "ckpt.pt").is_file():
        raise InputError(f"--resume: {out} holds no run with a checkpoint")
    before = json.loads((out / "settings.json").read_text())
    free = {"out", "resume", "overwrite", "device", "compile", "dump_eval", "fsdp"}
    changed = [k for k, v in before.items() if k not in free and settings.get(k) != v]
    if changed:
        raise InputError(f"--resume: the run in {out} has another --{', --'.join(changed)}")


def open_run(s: Settings) -> None:
    """Makes the run folder of --out, only when all input has been read."""
    out = Path(s.out)
    if s.resume:
        return
    if (out / "ckpt.pt").exists() and not s.overwrite:
        raise InputError(f"{out} holds a run: give --resume, --overwrite or another --out")
    make_folder(out)
    for old in ("ckpt.pt", "best.pt", "metrics.jsonl"):
        (out / old).unlink(missing_ok=True)
    write_json(out / "settings.json", plain(s))


# ------------------------------------------------------------------------------
# Setting up


def pick_device(name: str | None) -> torch.device:
    have = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    name = name or next(kind for kind, there in have.items() if there)
    if not have.get(name.partition(":")[0]):
        raise InputError(
            f"--device {name} is not there; this machine has {[k for k in have if have[k]]}"
        )
    return torch.device(name)


def build(s: Settings) -> tuple[GPT, str, float]:
    """(model, encoding's name, temperature) from --init, or from scratch; flags beside --init must
    agree."""
    sizes = {k: getattr(s, k) for k in ("block_size", "n_layer", "n_head", "n_embd")}
    if s.init:
        gpt, ckpt = load_gpt(s.init, encoding=s.encoding)
        if ckpt.get("left_out"):
            say(f"{s.init}: {ckpt['left_out']} words beyond {ckpt['encoding']}'s left out")
        given = {**sizes, "encoding": s.encoding}
        for name, value in given.items():
            has = ckpt["encoding"] if name == "encoding" else getattr(gpt.config, name)
            if value is not None and value != has:
                raise InputError(
                    f"--{name} {value} disagrees with --init {s.init}, which has {has}"
                )
        encoding = get_encoding(ckpt["encoding"])
        if encoding.n_vocab != gpt.config.vocab_size:
            raise InputError(
                f"--init {s.init} has a vocabulary of {gpt.config.vocab_size}, "
                f"its encoding {ckpt['encoding']} has {encoding.n_vocab}"
            )
        return gpt, ckpt["encoding"], s.temperature or ckpt["temperature"]
    name = s.encoding or "bytes"
    encoding = get_encoding(name)
    default = {"block_size": 256, "n_layer": 4, "n_head": 4, "n_embd": 128}
    try:
        config = GPTConfig(
            vocab_size=encoding.n_vocab, **{k: v or default[k] for k, v in sizes.items()}
        )
    except ValueError as error:
        raise InputError(str(error)) from error
    return GPT(config, torch.Generator().manual_seed(s.seed)), name, s.temperature or 1.0


def autocast(s: Settings, device: torch.device):
    """bfloat16 where the device computes it fast and nobody said otherwise. Sums stay in
    float32."""
    bf16 = compute_dtype(s, device) == torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def compute_dtype(s: Settings, device: torch.device) -> torch.dtype:
    return getattr(torch, s.dtype or ("bfloat16" if device.type == "cuda" else "float32"))


def set_precision(s: Settings) -> None:
    """TF32, which keeps 10 of 23 bits of a product's factors: for what autocast leaves in float32,
    but not where --dtype float32 was asked for."""
    torch.set_float32_matmul_precision("high" if s.dtype in (None, "bfloat16") else "highest")


def matmul_rate(s: Settings, device: torch.device) -> float:
    """FLOPs per second of a large matmul here and now: what the metric `mfu` is a share of."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.ones(n, n, dtype=compute_dtype(s, device), device=device)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / sorted(seconds)[2]


def peak_gb(device: torch.device) -> float:
    """Largest memory so far: on a GPU of its tensors, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def adamw(module: torch.nn.Module, s: Settings, learning_rate: float) -> torch.optim.AdamW:
    """AdamW, fused; weight decay on matrices only."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": s.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, s.beta2), fused=True)


def schedule(s: Settings, step: int, steps: int) -> float:
    """Factor on the peak learning rate at `step` of `steps`: linear warm-up, then decay to a
    tenth."""
    warmup = max(steps // 20, 1) if s.warmup_iters is None else s.warmup_iters
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(steps - warmup, 1)
    if s.lr_decay == "constant":
        return 1.0
    return 0.1 + 0.9 * (1 - done if s.lr_decay == "linear" else (1 + math.cos(math.pi * done)) / 2)


# ------------------------------------------------------------------------------
# Tasks: what each stage trains


class Task:
    """Groups, the one module whose forward is the whole differentiable computation, and a loss.

    `weigh(batch)` says how much a batch counts in the mean that `loss(batch)` takes, so that
    micro-batches add up to exactly the large batch.
    """

    def __init__(self, s: Settings, device: torch.device):
        self.s, self.device = s, device
        self.gpt, self.encoding_name, self.temperature = build(s)
        self.encoding = get_encoding(self.encoding_name)
        self.gpt.to(device, torch.float64 if s.dtype == "float64" else torch.float32)
        self.gpt.gradient_checkpointing = s.gradient_checkpointing
        self.scorer = Scorer(self.gpt, self.temperature)
        self.module = wrap(self.scorer, s, device)
        use = "sft" if s.stage == "sft" else "preference"
        self.groups = self.read(s.data, use)
        self.eval_groups = self.read(s.eval_data, use) if s.eval_data else None

    def read(self, paths: list[str], use: str) -> Groups:
        groups, report = read_groups(paths, self.encoding, self.gpt.config.block_size, use)
        say(f"{', '.join(map(str, paths))}: {report}")
        return groups

    def flops(self, batch) -> int:
        """Matmul FLOPs that a step on this batch needs: the backward pass is twice the forward."""
        P, n = batch.prefix_len, batch.scored.sum(-1)  # (B,), (B, K) tokens read = scored
        seen = (P * (P + 1) // 2).sum() + (n * P[:, None] + n * (n + 1) // 2).sum()
        tokens, scored = (P.sum() + n.sum()).item(), n.sum().item()
        return 3 * forward_flops(self.gpt.config, tokens, seen.item(), scored)

    def prepare(self, ids: np.ndarray) -> None:
        """Whatever must be known of these groups of the training data before the first step."""

    def evaluate(self, step: int) -> dict:
        return {}

    def finish(self) -> None:
        """After the last step."""

    def plain_gpt(self) -> GPT:
        """The model in one piece and without wrappers, to draw from."""
        if not self.s.fsdp:
            return self.gpt
        gpt = GPT(self.gpt.config)
        gpt.load_state_dict(full(self.gpt.state_dict()))
        return gpt.to(self.device).eval()

    def sample(self, prompts: list[list[int]], new: int, n: int, seed: int) -> list[list[int]]:
        """GPT.generate, n completions of each prompt. Processes share the prompts; the draws do not
        depend on how many there are."""
        generator = torch.Generator().manual_seed(seed)
        uniform = torch.rand(len(prompts), n, new, generator=generator)
        mine = slice(rank(), None, world())
        drawn, gpt = [], self.plain_gpt()
        if prompts[mine]:
            with autocast(self.s, self.device):
                drawn = gpt.generate(
                    *(prompts[mine], new, n, self.temperature),
                    eot=self.encoding.eot_token,
                    uniform=uniform[mine].flatten(0, 1),
                )
        out = [[] for _ in range(len(prompts) * n)]
        for first, part in enumerate(gather(drawn)):
            for k in range(n):
                out[first * n + k :: world() * n] = part[k::n]
        return out


class SFT(Task):
    """Cross-entropy of the completion's tokens, averaged over tokens."""

    def weigh(self, batch) -> int:
        return int(batch.scored.sum())

    def loss(self, batch) -> Tensor:
        return -self.module(batch).sum() / batch.scored.sum()

    def evaluate(self, step: int) -> dict:
        if self.eval_groups is None:
            return {}
        logps = score(self.module, self.eval_groups, self.s, self.device)
        tokens = np.diff(self.eval_groups.offsets) + self.eval_groups.ended
        n_tokens = (
            tokens.sum() - tokens[self.eval_groups.first[:-1]].sum()
        )  # prompts are not scored
        loss = -logps.sum().item() / int(n_tokens)
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


class Preference(Task):
    """EXO, DPO, or a fork's loss: groups with a target, and the reference's log-probs stored beside
    them."""

    def __init__(self, s: Settings, device: torch.device):
        super().__init__(s, device)
        if s.loss not in exo.LOSSES:
            raise InputError(f"unknown --loss {s.loss!r}: choose from {', '.join(exo.LOSSES)}")
        parent = Path(s.dump_eval).parent
        if s.dump_eval and parent != Path(s.out) and not parent.is_dir():
            raise InputError(f"--dump_eval {s.dump_eval}: there is no folder {parent}")
        self.loss_fn = exo.LOSSES[s.loss]
        self.log_target = log_targets(self.groups, s.beta_r, s.label_smoothing).to(device)
        if self.eval_groups is not None:
            self.eval_target = log_targets(self.eval_groups, s.beta_r, s.label_smoothing)
        self.warned = False

    def prepare(self, ids: np.ndarray) -> None:
        ref, _ = load_gpt(
            self.s.init, self.device, self.s.encoding
        )  # the policy may be further already, if resumed
        scorer = Scorer(ref, self.temperature)
        self.ref_logps = score(scorer, self.groups, self.s, self.device, ids, "reference").to(
            self.device
        )
        if self.eval_groups is not None:
            self.eval_ref = score(scorer, self.eval_groups, self.s, self.device, None, "reference")

    def weigh(self, batch) -> int:
        return len(batch.mask)

    def loss(self, batch) -> Tensor:
        logps = self.module(batch).sum(-1)  # (B, K)
        ref, target = self.ref_logps[batch.segment], self.log_target[batch.segment]
        return self.loss_fn(logps, ref, target, self.s.beta_pi, batch.mask)

    def evaluate(self, step: int) -> dict:
        result = self.held_out()[0] if self.eval_groups is not None else {}
        if self.s.kl_samples:
            result |= self.drawn_kl(step)
        if result.get("chosen_logratio", 0) < -0.1 and not self.warned:
            self.warned = True
            tqdm.write(
                f"warning: at step {step} the chosen completions are less likely than under the "
                f"reference (mean log-ratio {result['chosen_logratio']:.2f}): the margin grows "
                "because the rejected fall faster; a larger --beta_pi or fewer steps keep them"
            )
        return result

    def held_out(self) -> tuple[dict, tuple]:
        """Metrics over the held-out groups, and the (G, K) tensors they come from."""
        groups = self.eval_groups
        segment, mask = map(torch.from_numpy, groups.grid(np.arange(len(groups))))
        logps = score(self.module, groups, self.s, self.device)[segment]
        ref, target = self.eval_ref[segment], self.eval_target[segment]
        loss = self.loss_fn(logps, ref, target, self.s.beta_pi, mask)
        ratio = logps - ref
        length = torch.from_numpy(np.diff(groups.offsets) + groups.ended)[segment]
        best = target.masked_fill(~mask, -torch.inf).argmax(-1, keepdim=True)
        worst = target.masked_fill(~mask, torch.inf).argmin(-1, keepdim=True)
        result = {
            "loss": loss.item(),
            "accuracy": accuracy(ratio, target, mask),
            "margin": self.s.beta_pi
            * (ratio.gather(1, best) - ratio.gather(1, worst)).mean().item(),
        }
        for name, k in (("chosen", best), ("rejected", worst)):
            result[f"{name}_logps"] = logps.gather(1, k).mean().item()
            result[f"{name}_logratio"] = ratio.gather(1, k).mean().item()
            result[f"{name}_length"] = length.gather(1, k).double().mean().item()
        return result, (logps, ref, target, mask)

    def drawn_kl(self, step: int) -> dict:
        """KL(pi || sft) and its standard error, from one completion of each of kl_samples
        prompts."""
        groups = self.groups if self.eval_groups is None else self.eval_groups
        block = self.gpt.config.block_size
        new = min(self.s.max_new_tokens, block // 2)
        some = np.unique(np.linspace(0, len(groups) - 1, self.s.kl_samples).round().astype(int))
        prompts = [groups.prompt(g)[-(block - new) :] for g in some]
        drawn = self.sample(prompts, new, 1, self.s.seed * 1_000_003 + step)
        builder = Builder(block, groups.eot, Report())
        for prompt, y in zip(prompts, drawn, strict=True):
            ended = y[-1] == groups.eot
            builder.add(prompt, [y[:-1] if ended else y], ended=ended)
        drawn = builder.groups()
        ref = Scorer(load_gpt(self.s.init, self.device, self.s.encoding)[0], self.temperature)
        logps, ref_logps = (score(m, drawn, self.s, self.device) for m in (self.scorer, ref))
        segment = drawn.first[:-1] + 1
        k1 = exo.kl_estimates(logps, ref_logps)["k1"][segment]
        spread = k1.std().item() / math.sqrt(len(k1)) if len(k1) > 1 else 0.0
        length = (np.diff(drawn.offsets) + drawn.ended)[segment].mean().item()
        return {"kl": k1.mean().item(), "kl_stderr": spread, "sampled_length": float(length)}

    def finish(self) -> None:
        if self.s.dump_eval:
            only_first(self.dump, self.held_out()[1])

    def dump(self, held_out: tuple) -> None:
        rows = [x.exp().tolist() if i == 2 else x.tolist() for i, x in enumerate(held_out)]
        with replacing(Path(self.s.dump_eval)) as temporary, open(temporary, "w") as file:
            for g, (logps, ref, target, mask) in enumerate(zip(*rows, strict=True)):
                k = sum(mask)
                record = {
                    "group": g,
                    "policy_logps": logps[:k],
                    "ref_logps": ref[:k],
                    "target": target[:k],
                }
                file.write(json.dumps(record) + "\n")


def log_targets(groups: Groups, beta_r: float, label_smoothing: float) -> Tensor:
    """log p of every completion, (M,) float64: the label's for pairs, the rewards' for the
    others."""
    ids = np.arange(len(groups))
    segment, mask = map(torch.from_numpy, groups.grid(ids))
    pair = torch.from_numpy(groups.is_pair())
    target = exo.reward_target(torch.from_numpy(groups.rewards)[segment], beta_r, mask)
    target[pair, :2] = exo.preference_target(label_smoothing)
    out = torch.zeros(len(groups.rewards), dtype=torch.float64)
    out[segment[mask]] = target[mask]
    return out


def accuracy(ratio: Tensor, target: Tensor, mask: Tensor) -> float:
    """Of all pairs in a group with unlike targets, the share that log-ratios order alike; a tie is
    half."""
    both = mask[:, :, None] & mask[:, None, :]
    wanted = (target[:, :, None] > target[:, None, :]) & both
    gap = (ratio[:, :, None] - ratio[:, None, :])[wanted]
    return ((gap > 0).double() + (gap == 0).double() / 2).mean().item()


@torch.no_grad()
def score(module, groups: Groups, s: Settings, device, ids=None, note: str = "") -> Tensor:
    """log pi of the completions of these groups (all by default): (M,) on the CPU, 0 elsewhere.

    Batches hold groups of similar size, and processes take turns at them; each has all results.
    `note` names a progress bar.
    """
    out = torch.zeros(len(groups.ended), dtype=torch.float64)
    ids = np.arange(len(groups)) if ids is None else ids
    ids = ids[np.argsort(groups.sizes()[ids], kind="stable")]
    size = s.micro_batch_size or s.batch_size
    starts = range(0, len(ids), size * world())
    for start in tqdm(starts, note, disable=not note or rank() > 0, leave=False):
        mine = ids[start + rank() * size :][:size]
        spare = len(mine) == 0  # a sharded module needs all processes in each of its calls
        batch = collate(groups, ids[:1] if spare else mine, rounding(device))
        with autocast(s, device):
            logps = module(batch.to(device)).sum(-1)
        if not spare:
            out[batch.segment[batch.mask]] = logps[batch.mask.to(device)].double().cpu()
    if world() > 1:
        dist.all_reduce(out)
    return out


def rounding(device: torch.device) -> int:
    """Lengths become multiples of this: a GPU likes few shapes, a CPU would only compute the
    padding."""
    return 64 if device.type == "cuda" else 1


# ------------------------------------------------------------------------------
# The loop


class Log:
    """metrics.jsonl, one record a line; on resume, records after the checkpoint's step are
    dropped."""

    def __init__(self, path: Path, step: int):
        self.file = None
        if rank() > 0:
            return
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        with replacing(path) as temporary:
            temporary.write_text("".join(line + "\n" for line in kept))
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the run

    def write(self, record: dict) -> None:
        if self.file is not None:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()


class Stop:
    """SIGINT and SIGTERM ask the loop to save and leave after the step; a second one does not
    wait."""

    def __enter__(self):
        self.signal = None
        self.before = {n: signal.signal(n, self.ask) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, number, frame):
        self.signal = number
        self.__exit__()

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def fit(s: Settings, task: Task) -> int:
    """Train `task`: the one loop of every stage. Returns the exit status."""
    n_batches = math.ceil(len(task.groups) / s.batch_size)
    steps = s.max_iters or math.ceil(s.epochs * n_batches)
    peak = s.learning_rate or (5e-5 if s.init else 1e-3)
    optimizer = adamw(task.gpt, s, peak)
    state = {"step": 0, "evaluated": -1, "best": math.inf}
    if s.resume:
        check_run(s)
        ckpt = load_checkpoint(s.out)
        load_whole(task.gpt, optimizer, ckpt["model"], ckpt["optimizer"])
        state = {k: ckpt[k] for k in state}
    batches = {e: epoch_batches(task.groups, s.batch_size, s.seed, e) for e in range(1)}

    def ids_of(step: int) -> np.ndarray:
        epoch = step // n_batches
        if epoch not in batches:
            batches.clear()
            batches[epoch] = epoch_batches(task.groups, s.batch_size, s.seed, epoch)
        return batches[epoch][step % n_batches]

    task.prepare(np.unique(np.concatenate([ids_of(i) for i in range(min(steps, n_batches))])))
    only_first(open_run, s)
    out = Path(s.out)
    log = Log(out / "metrics.jsonl", state["step"])
    bar = tqdm(total=steps, initial=state["step"], desc=s.stage, disable=rank() > 0)
    shown, limit = {}, matmul_rate(s, task.device)
    with Stop() as stop:
        while True:
            step = state["step"]
            due = step % s.eval_interval == 0 or step == steps
            if due and step > state["evaluated"]:
                metrics = task.evaluate(step)
                state["evaluated"] = step
                log.write({"step": step, "kind": "eval", **metrics})
                better = metrics.get("loss", math.inf) < state["best"]
                state["best"] = min(state["best"], metrics.get("loss", math.inf))
                save(out, task, optimizer, state, better)
                shown |= {
                    f"eval_{k}": metrics[k] for k in ("loss", "accuracy", "kl") if k in metrics
                }
            if step == steps or any(gather(stop.signal)):
                break
            rate = peak * schedule(s, step, steps)
            start, ids = time.perf_counter(), ids_of(step)
            loss, norm, work = update(s, task, optimizer, ids, rate)
            state["step"] += 1
            if state["step"] % s.log_interval == 0 or state["step"] == steps:
                loss, tokens, flops = total(loss.item(), *work)
                seconds = time.perf_counter() - start
                record = {"step": state["step"], "kind": "train", "loss": loss, "lr": rate}
                record |= {"grad_norm": full(norm).item(), "tokens_per_s": tokens / seconds}
                record |= {"groups_per_s": len(ids) / seconds, "peak_gb": peak_gb(task.device)}
                log.write(record | {"mfu": flops / seconds / (limit * world())})
                shown |= {"loss": loss}
            bar.update()
            bar.set_postfix({k: f"{v:.3f}" for k, v in shown.items()}, refresh=False)
    bar.close()
    if number := next(filter(None, gather(stop.signal)), None):
        save(out, task, optimizer, state, False)
        say(
            f"stopped at step {state['step']} of {steps}; the same command with --resume goes on",
            sys.stderr,
        )
        return 128 + number
    task.finish()
    say(f"{out}: {steps} steps; last evaluation {json.dumps(shown)}")
    return 0


def update(s: Settings, task: Task, optimizer, ids: np.ndarray, rate: float):
    """One optimizer step on the groups `ids`: (loss, gradient norm, (tokens read, matmul FLOPs));
    with several processes loss and work are this one's share.

    Each process takes every world()-th group. Wrappers average gradients over processes, and want
    as many passes in each; so losses are scaled to give a mean over all that `ids` hold, and a
    process whose groups are used up takes part with weight 0.
    """
    mine, share = ids[rank() :: world()], math.ceil(len(ids) / world())
    size = s.micro_batch_size or share
    micro = [mine[i : i + size] for i in range(0, share, size)]
    micro = [collate(task.groups, m if len(m) else ids[:1], rounding(task.device)) for m in micro]
    weights = [task.weigh(batch) for batch in micro]
    if share > len(mine) and (share - 1) % size == 0:
        weights[-1] = 0
    (whole,) = total(sum(weights))
    loss = 0.0
    for i, (batch, weight) in enumerate(zip(micro, weights, strict=True)):
        with accumulating(task.module, last=i == len(micro) - 1):
            with autocast(s, task.device):
                part = task.loss(move(batch, task.device)) * (weight / whole)
            (part * world()).backward()
        loss = loss + part.detach()
    norm = torch.nn.utils.clip_grad_norm_(task.scorer.parameters(), s.grad_clip or math.inf)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    work = sum(len(b.idx) for b in micro), sum(map(task.flops, micro))
    return loss, norm, work


def move(batch, device: torch.device):
    """To the device; to a GPU from pinned memory, so that the copy waits for no kernel."""
    if device.type != "cuda":
        return batch.to(device)
    return type(batch)(*(x.pin_memory() for x in batch)).to(device, non_blocking=True)


def save(out: Path, task: Task, optimizer, state: dict, better: bool) -> None:
    """ckpt.pt with everything a resumed run needs, and best.pt with the weights alone."""
    weights = {
        "model": full(task.gpt.state_dict()),
        "config": dataclasses.asdict(task.gpt.config),
        "encoding": task.encoding_name,
        "temperature": task.temperature,
        "stage": task.s.stage,
    }
    rest = state | {"optimizer": full(optimizer.state_dict())}
    only_first(write_checkpoint, out, weights, rest, better)


def write_checkpoint(out: Path, weights: dict, rest: dict, better: bool) -> None:
    write_json(out / "config.json", weights["config"] | {"encoding": weights["encoding"]})
    if better:
        with replacing(out / "best.pt") as temporary:
            torch.save(weights | {"step": rest["step"]}, temporary)
    with replacing(out / "ckpt.pt") as temporary:
        torch.save(weights | rest, temporary)


TASKS = {"sft": SFT, "exo": Preference, "dpo": Preference}


def main(argv: list[str] | None = None) -> int:
    s = parse(sys.argv[1:] if argv is None else argv)
    if s.threads:
        torch.set_num_threads(s.threads)
    set_precision(s)
    try:
        if s.stage == "toy":
            from experiments import toy

            make_folder(Path(s.out))
            toy.run(s.out, s.seeds, s.sweep)
            return 0
        out = Path(s.out)
        if (out / "ckpt.pt").exists() and not (s.resume or s.overwrite):
            raise InputError(f"{out} holds a run: give --resume, --overwrite or another --out")
        with processes(s) as device:
            return fit(s, TASKS[s.stage](s, device))
    except InputError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"train.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
