"""
Training: settings, one loop, checkpoints, and a task per stage.

    python train.py                      the exact world, about a minute
    python train.py sft --data pairs.jsonl --out out/sft
    python train.py exo --data pairs.jsonl --init out/sft --out out/exo      (or dpo)
    python train.py reward --data pairs.jsonl --init out/sft --out out/rm
    python train.py ppo --data prompts.jsonl --init out/sft --reward out/rm  (or exo --online)
    torchrun --nproc_per_node=8 train.py exo ...                             (any stage but toy)

A task knows its batches, its loss and its evaluation; the loop knows steps, schedule, logging and
saving, and nothing of methods. All randomness is a function of (seed, step), so a resumed run needs
no generator states. Reference log-probs never change: they are computed once, before the first
step, for the rows that will be read, and no second model is in memory while training. Stages that
draw their own completions (ppo, --online) keep the reference in memory.

A run folder holds settings.json, config.json (the model's shape), ckpt.pt (the last state, to
resume), best.pt (the weights with the lowest held-out loss) and metrics.jsonl (one record a line).
Where completions are drawn the held-out "loss" is minus J = reward - beta KL(pi || sft).

The file in order: Settings and the command line; processes; files of a run; model and optimizer;
rewards; tasks (SFT, Reward, Preference, Online, PPO); the loop, which is `fit` and `update`.
"""

import argparse
import contextlib
import dataclasses
import inspect
import json
import math
import os
import resource
import signal
import sys
import time
from dataclasses import dataclass, field
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
    Report,
    collate,
    decode,
    epoch_batches,
    get_encoding,
    load_function,
    read_groups,
)
from infra.huggingface import from_pretrained, pretrained_config
from infra.rows import InputError, make_folder, replacing, write_json
from model import (
    GPT,
    ActorCritic,
    Block,
    GPTConfig,
    RewardModel,
    Scorer,
)

STAGES = ("toy", "sft", "reward", "exo", "dpo", "ppo")


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
    init_std: float | None = flag(
        None, "spread of fresh blocks' weights (0.02; narrow models want about 1/sqrt(n_embd))"
    )
    temperature: float | None = flag(
        None, "divides logits, in training and sampling (--init's, or 1)"
    )
    # method
    loss: str | None = flag(None, "exo or dpo, or a fork's entry in exo.LOSSES (the stage's name)")
    beta_pi: float = flag(0.1, "larger stays closer to the reference; 0.1 to 0.5 is usual")
    beta_r: float = flag(1.0, "temperature of rewards: small trusts them, large flattens them")
    label_smoothing: float | None = flag(
        None, "probability that a label is wrong (exo 1e-3, dpo and reward 0)"
    )
    # rewards, and learning from completions of one's own
    reward: str = flag(
        "",
        "run folder or .pt of the stage reward, or module:function of (prompt, completion) or, if "
        "its second parameter is called `completions`, of two lists; exo, dpo: evaluation only, "
        "unless --online",
    )
    online: bool = flag(False, "exo, dpo: train on completions drawn from the policy, --reward's")
    K: int = flag(8, "ppo, --online: completions drawn of each prompt")
    round_iters: int | None = flag(
        None, "ppo, --online: batches of prompts drawn from one snapshot (ppo 4, --online 1: fresh)"
    )
    ppo_epochs: int = flag(4, "ppo: passes over the completions of a round")
    kl_coef: float = flag(0.1, "ppo: beta of J = reward - beta KL(pi || sft), paid token by token")
    clip: float = flag(0.2, "ppo: how far a ratio of probabilities may move in a round")
    value_clip: float = flag(0.2, "ppo: how far a value may move in a round")
    value_coef: float = flag(0.5, "ppo: weight of the value loss")
    gamma: float = flag(1.0, "ppo: discount per token")
    lam: float = flag(0.95, "ppo: lambda of the generalised advantage estimates")
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
    kl_samples: int = flag(
        32, "completions drawn to estimate the KL from sft, and --reward's mean; 0: none"
    )
    max_new_tokens: int = flag(
        64, "longest drawn completion, half of block_size at most; the KL is that of texts cut here"
    )
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
        self.draws = self.online or self.stage == "ppo"  # learns from completions of its own
        if self.draws and self.round_iters is None:
            self.round_iters = 1 if self.online else 4
        for ok, sentence in self.rules():
            if not ok:
                raise ValueError(sentence)

    def rules(self):
        """(holds, what to say if not), one for each way in which settings can contradict."""
        s = self
        need_init, preference = s.stage in ("exo", "dpo", "ppo"), s.stage in ("exo", "dpo")
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
        yield not inside, f"--out {s.out} would overwrite --init {s.init}"
        yield not s.online or preference, "--online is for exo and dpo"
        if s.draws:
            name = f"{s.stage} --online" if s.online else s.stage
            yield s.reward, f"{name} needs --reward, a reward model or module:function"
            least = 2 if s.online else 1
            yield s.K >= least, f"--K must be at least {least} for {name}, got {s.K}"
        elif s.reward:
            yield s.kl_samples, "--reward rates drawn completions: --kl_samples must not be 0"
        if need_init:
            yield s.init, f"{s.stage} needs --init, a run made by `python train.py sft` or GPT-2"
        if preference or s.stage == "reward":
            low = "0 <" if s.loss == "exo" else "0 <="
            ok = 0 < s.label_smoothing < 0.5 or (s.loss != "exo" and s.label_smoothing == 0)
            why = " (at 0 the reverse KL is infinite)" if s.loss == "exo" else ""
            yield ok, f"--label_smoothing must be {low} eps < 0.5{why}, got {s.label_smoothing}"
        yield not (s.epochs and s.max_iters), "give --epochs or --max_iters, not both"
        yield s.lr_decay in ("cosine", "linear", "constant"), f"unknown --lr_decay {s.lr_decay!r}"
        ok = s.dtype in (None, "float32", "bfloat16", "float64")
        yield ok, "--dtype must be float32, bfloat16 or float64"
        yield (
            not s.fsdp or not s.draws,
            "--fsdp is for stages that draw nothing to learn from",
        )
        yield not (s.resume and s.overwrite), "give --resume or --overwrite, not both"
        positive = ("beta_pi", "beta_r", "temperature", "learning_rate", "epochs", "init_std")
        for name in (*positive, "clip", "value_clip"):
            value = getattr(s, name)
            ok = value is None or (value > 0 and math.isfinite(value))
            yield ok, f"--{name} must be a finite number above 0, got {value}"
        steps = ("batch_size", "micro_batch_size", "max_iters", "eval_interval", "log_interval")
        steps += ("round_iters", "ppo_epochs")
        sizes = ("block_size", "n_layer", "n_head", "n_embd", "max_new_tokens", "seeds", "threads")
        for name in (*steps, *sizes):
            value = getattr(s, name)
            least = 2 if name == "block_size" else 1
            yield value is None or value >= least, f"--{name} must be at least {least}, got {value}"
        least_0 = ("kl_samples", "weight_decay", "grad_clip", "warmup_iters", "seed")
        for name in (*least_0, "kl_coef", "value_coef"):
            value = getattr(s, name)
            yield value is None or value >= 0, f"--{name} must not be negative, got {value}"
        for name in ("gamma", "lam"):
            value = getattr(s, name)
            yield 0 <= value <= 1, f"--{name} must be in [0, 1], got {value}"
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


def shared(x: Tensor) -> Tensor:
    """x on the CPU, filled in parts by the processes (0 elsewhere), in place: now whole in each."""
    if world() > 1:
        dist.all_reduce(x)
    return x


def gather(value: object) -> list:
    """[the first process' value, the second's, ...], in every process."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values


def only_first(action, *args):
    """The first process does it while the others wait; its result, or its error as a
    sentence, is everyone's."""
    result, said = None, None
    if rank() == 0:
        try:
            result = action(*args)
        except (InputError, OSError) as error:
            said = str(error)
    result, said = gather((result, said))[0]
    if said is not None:
        raise InputError(said)
    return result


@contextlib.contextmanager
def processes(device: str | None):
    """Joins torchrun's processes, if it started us; gives this process' device."""
    device = pick_device(device)
    if "RANK" not in os.environ:
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def leave(status: int) -> None:
    """End the program. One of many processes ends at once: gloo's threads outlive the group where a
    sharded module still refers to it, and one that drops a tensor while Python takes itself down
    aborts the process, with all its work done."""
    if "RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


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


def load_whole(module: torch.nn.Module, state: dict) -> None:
    """Weights of a checkpoint into a module that may be sharded."""
    own = module.state_dict()
    module.load_state_dict({k: shard(v, own[k]) for k, v in state.items()})


def load_whole_optimizer(optimizer, optimizer_state: dict) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        i: {k: shard(v, parameters[i]) for k, v in entry.items()}
        for i, entry in optimizer_state["state"].items()
    }
    optimizer.load_state_dict(optimizer_state | {"state": state})


# ------------------------------------------------------------------------------
# Files of a run


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


def load_gpt(
    path: str | Path, device="cpu", encoding: str | None = None, policy: bool = True
) -> tuple[GPT, dict]:
    """The model of a run folder, a .pt file or a Hugging Face GPT-2 folder, in eval mode, and the
    checkpoint's other entries. encoding: of a Hugging Face folder that does not say (None: gpt2).
    policy: refuse a reward model, whose trunk no longer says what comes next.
    """
    folder = Path(path)
    ours = any((folder / name).exists() for name in ("ckpt.pt", "settings.json"))
    if folder.is_dir() and not ours and (folder / "config.json").exists():
        return load_hugging_face(folder, device, encoding)
    ckpt = load_checkpoint(path)
    if policy and ckpt.get("stage") == "reward":
        raise InputError(f"{path} is a reward model: it rates text and writes none")
    gpt = GPT(GPTConfig(**ckpt["config"]))
    gpt.load_state_dict(ckpt.pop("model"))
    return gpt.to(device).eval(), ckpt


def load_hugging_face(folder: Path, device, encoding: str | None) -> tuple[GPT, dict]:
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
    ckpt = {"config": dataclasses.asdict(gpt.config), "encoding": name}
    ckpt |= {"temperature": temperature, "left_out": config.get("vocab_size", n_vocab) - n_vocab}
    return gpt.to(device).eval(), ckpt


def plain(s: Settings) -> dict:
    """As JSON gives it back: tuples are lists."""
    return json.loads(json.dumps(dataclasses.asdict(s)))


def check_run(s: Settings) -> None:
    """The run to resume is there, and its settings are these."""
    out, settings = Path(s.out), plain(s)
    if not (out / "settings.json").is_file() or not (out / "ckpt.pt").is_file():
        raise InputError(f"--resume: {out} holds no run with a checkpoint")
    before = json.loads((out / "settings.json").read_text())
    free = {"out", "resume", "overwrite", "device", "compile", "fsdp"}
    changed = [k for k, v in before.items() if k not in free and settings.get(k) != v]
    if changed:
        raise InputError(f"--resume: the run in {out} has another --{', --'.join(changed)}")


def open_run(s: Settings) -> None:
    """Makes the run folder of --out, only when all input has been read."""
    out = Path(s.out)
    for half_written in out.glob(".*.pt.*"):  # by a process that was killed while it saved
        half_written.unlink()
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
        gpt, ckpt = load_gpt(s.init, encoding=s.encoding, policy=s.stage != "reward")
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
    gpt = GPT(config, torch.Generator().manual_seed(s.seed), s.init_std or 0.02)
    return gpt, name, s.temperature or 1.0


def autocast(s: Settings, device: torch.device):
    """bfloat16 where the device computes it fast and nobody said otherwise. Sums stay in
    float32."""
    bf16 = compute_dtype(s, device) == torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def compute_dtype(s: Settings, device: torch.device) -> torch.dtype:
    return getattr(torch, s.dtype or ("bfloat16" if device.type == "cuda" else "float32"))


def set_precision(s: Settings, device: torch.device) -> None:
    """TF32 on a GPU, which keeps 10 of 23 bits of a product's factors: for what autocast leaves in
    float32, but not where --dtype float32 was asked for."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if s.dtype in (None, "bfloat16") else "highest")


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
# Rewards: a reward model of ours, or a function of the user's


def load_reward(spec: str, device):
    """What --reward names: a run folder or .pt file of the stage reward, or module:function. It is
    called with (prompts, completions, ended=None), lists of equal length, and gives the rewards,
    (N,) float64 on the CPU. ended: whether the end of text followed (None: always); a function of
    the user's is not told."""
    if ":" in spec and not Path(spec).exists():
        return function_reward(spec)
    ckpt = load_checkpoint(spec)
    if "head" not in ckpt:
        stage = ckpt.get("stage", "unknown")
        raise InputError(f"--reward {spec} is no reward model: its stage is {stage}")
    return model_reward(ckpt, torch.device(device))


def model_reward(ckpt: dict, device):
    """The reward model of a checkpoint. It has an encoding of its own, which need not be the
    policy's, and computes in float32."""
    gpt, encoding = GPT(GPTConfig(**ckpt["config"])), get_encoding(ckpt["encoding"])
    gpt.load_state_dict(ckpt["model"])
    model = RewardModel(gpt)
    model.head.load_state_dict(ckpt["head"])
    model.to(device).eval()

    def reward(prompts: list[str], completions: list[str], ended=None) -> Tensor:
        builder = Builder(gpt.config.block_size - 1, encoding.eot_token, Report())
        ended = ended or [True] * len(prompts)
        for prompt, completion, whole in zip(prompts, completions, ended, strict=True):
            ids = map(encoding.encode_ordinary, (prompt, completion))
            builder.add(next(ids), [next(ids)], ended=whole)
        groups, out = to_rate(builder.groups()), torch.zeros(2 * len(prompts), dtype=torch.float64)
        for batch, rewards in passes(model, groups, 64, device):
            out[batch.segment] = rewards.cpu().double()
        return shared(out)[1::2]  # every group is a prompt and a completion

    return reward


def function_reward(spec: str):
    """A function of the user's, whatever it does wrong said in one sentence."""
    function = user_function(spec)
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # some functions written in C do not say
        names = []

    def call(*args, about: str):
        try:
            return function(*args)
        except Exception as error:  # whatever a user's function raises
            raise InputError(f"--reward {spec}: {describe_error(error)}, for {about}") from error

    def one_by_one(prompts: list[str], completions: list[str], ended=None) -> Tensor:
        rows = zip(prompts, completions, strict=True)
        values = [call(prompt, y, about=f"the completion {shorten(y)}") for prompt, y in rows]
        return checked_rewards(spec, values, completions)

    def all_at_once(prompts: list[str], completions: list[str], ended=None) -> Tensor:
        n = len(completions)
        values = call(list(prompts), list(completions), about=f"{n} completions")
        values = values.tolist() if hasattr(values, "tolist") else values  # an array or a tensor
        if isinstance(values, str) or not hasattr(values, "__len__"):
            raise InputError(
                f"--reward {spec} must return a number for each completion (its second parameter "
                f"is called completions), got {shorten(values)}"
            )
        if len(values) != n:
            raise InputError(f"--reward {spec} returned {len(values)} rewards for {n} completions")
        return checked_rewards(spec, list(values), completions)

    reward = all_at_once if names[1:2] == ["completions"] else one_by_one
    return lambda *args: only_first(reward, *args)  # it may be slow, and need not repeat itself


def user_function(spec: str):
    try:
        function = load_function(spec, "--reward")
    except InputError:
        raise
    except Exception as error:  # whatever importing a user's module raises
        raise InputError(f"--reward {spec}: {describe_error(error)}") from error
    if not callable(function):
        raise InputError(f"--reward {spec} is no function, but of type {type(function).__name__}")
    return function


def checked_rewards(spec: str, values: list, completions: list[str]) -> Tensor:
    """(N,) float64."""
    rewards = list(map(as_number, values))
    for value, reward, y in zip(values, rewards, completions, strict=True):
        if not math.isfinite(reward):
            raise InputError(
                f"--reward {spec} returned {shorten(value)}, no finite number, "
                f"for the completion {shorten(y)}"
            )
    return torch.tensor(rewards, dtype=torch.float64)


def as_number(value) -> float:
    """Python's, numpy's and torch's numbers as float; NaN for anything else."""
    if isinstance(value, str | bytes):
        return math.nan
    try:
        return float(value)
    except Exception:  # whatever a foreign object says to float()
        return math.nan


def describe_error(error: Exception) -> str:
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])


def shorten(value: object, limit: int = 80) -> str:
    text = repr(value)
    text = text if len(text) <= limit else text[: limit - 3] + "..."
    return " ".join(text.split())


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
        dtype = torch.float64 if s.dtype == "float64" else torch.float32
        self.gpt.to(device, dtype)
        self.gpt.gradient_checkpointing = s.gradient_checkpointing
        self.scorer = self.make_module().to(device, dtype)
        self.module = wrap(self.scorer, s, device)
        use = "prompt" if s.draws else "sft" if s.stage == "sft" else "preference"
        self.rows = self.groups = self.read(s.data, use)  # what epochs walk through, what is read
        self.eval_groups = self.read(s.eval_data, use) if s.eval_data else None
        self.epoch = (-1, [])  # its number, and its batches of rows

    def make_module(self) -> torch.nn.Module:
        """The module before DDP, fully_shard or compile wrap it."""
        return Scorer(self.gpt, self.temperature)

    def read(self, paths: list[str], use: str, spare: int = 0) -> Groups:
        """The files' groups, cut to `spare` tokens less than block_size."""
        block = self.gpt.config.block_size - spare
        groups, report = read_groups(paths, self.encoding, block, use)
        say(f"{', '.join(map(str, paths))}: {report}")
        return groups

    def n_batches(self) -> int:
        return math.ceil(len(self.rows) / self.s.batch_size)

    def batch_ids(self, i: int) -> np.ndarray:
        """The rows of the i-th batch, epoch after epoch."""
        epoch, place = divmod(i, self.n_batches())
        if self.epoch[0] != epoch:
            self.epoch = epoch, epoch_batches(self.rows, self.s.batch_size, self.s.seed, epoch)
        return self.epoch[1][place]

    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.s.max_iters or math.ceil(self.s.epochs * self.n_batches())

    def ids(self, step: int) -> np.ndarray:
        """The groups that optimizer step `step` reads."""
        return self.batch_ids(step)

    def needed(self) -> np.ndarray:
        """The groups that some step will read."""
        steps = min(self.steps(), self.n_batches())
        return np.unique(np.concatenate([self.ids(i) for i in range(steps)]))

    def prepare(self, ids: np.ndarray) -> None:
        """Whatever must be known of these groups of the training data before the first step."""

    def begin(self, step: int) -> None:
        """Before each optimizer step: stages that draw their own completions do it here."""

    def report(self) -> dict[str, float]:
        """More figures for the training record of the last step."""
        return {}

    def evaluate(self, step: int) -> dict:
        return {}

    def heads(self) -> dict:
        """What a model of this stage has beside the GPT, saved with its weights."""
        return {}

    def state(self) -> dict:
        """What a resumed run needs beside the GPT, the optimizer and the step."""
        return self.heads()

    def load_state(self, state: dict) -> None:
        """Take back what `state` gave."""

    def plain_gpt(self) -> GPT:
        """The model in one piece and without wrappers, to draw from."""
        if not self.s.fsdp:
            return self.gpt
        gpt = GPT(self.gpt.config)
        gpt.load_state_dict(full(self.gpt.state_dict()))
        return gpt.to(self.device).eval()


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


class Reward(Task):
    """A Bradley-Terry reward model: the better of two completions should get the higher number. Of
    K rated completions every pair with unlike rewards is compared.

    Only differences are learned, so the scale is the data's (log-odds of being preferred) and the
    zero is set: mean 0 over the completions of up to 64 evenly spaced rows of the training data.
    """

    def make_module(self) -> torch.nn.Module:
        return RewardModel(self.gpt)

    def read(self, paths: list[str], use: str, spare: int = 1) -> Groups:
        return to_rate(super().read(paths, use, spare))  # it reads the end of text, too

    def prepare(self, ids: np.ndarray) -> None:
        self.log_target = log_targets(self.groups, 1.0, 0.0).to(self.device)
        if self.eval_groups is not None:
            self.eval_target = log_targets(self.eval_groups, 1.0, 0.0)

    def weigh(self, batch) -> int:
        return len(batch.mask)

    def loss(self, batch) -> Tensor:
        better = preferred(self.log_target[batch.segment], batch.mask)
        return exo.reward_model_loss(self.module(batch), self.s.label_smoothing, better)

    def evaluate(self, step: int) -> dict:
        if step > 0:  # before, all rewards are 0
            self.center()
        if self.eval_groups is None:
            return {}
        segment, mask = map(
            torch.from_numpy, self.eval_groups.grid(np.arange(len(self.eval_groups)))
        )
        rewards = score(self.module, self.eval_groups, self.s, self.device)[segment]
        target = self.eval_target[segment]
        loss = exo.reward_model_loss(rewards, self.s.label_smoothing, preferred(target, mask))
        present = rewards[mask]
        return {
            "loss": loss.item(),
            "accuracy": accuracy(rewards, target, mask),
            "reward": present.mean().item(),
            "reward_std": present.std().item(),
        }

    def center(self) -> None:
        """Set the bias; it has no part in the loss."""
        some = evenly_spaced(len(self.rows), 64)
        segment, mask = self.rows.grid(some)
        rewards = score(self.module, self.rows, self.s, self.device, some)[segment[mask]]
        state = full(self.scorer.head.state_dict())
        bias = state["bias"] - rewards.mean().item()
        load_whole(self.scorer.head, state | {"bias": bias})  # not in place: it may be sharded

    def heads(self) -> dict:
        return {"head": self.scorer.head.state_dict()}

    def load_state(self, state: dict) -> None:
        load_whole(self.scorer.head, state["head"])


def to_rate(groups: Groups) -> Groups:
    """The same groups for a model that reads whole completions to rate them: where one ended, the
    end of text is its last token, and the last token is read, too (as if one more followed)."""
    return dataclasses.replace(
        groups,
        tokens=np.insert(groups.tokens, groups.offsets[1:][groups.ended], groups.eot),
        offsets=groups.offsets + np.concatenate([[0], np.cumsum(groups.ended)]),
        ended=is_completion(groups),
    )


def is_completion(groups: Groups) -> np.ndarray:
    """(M,) bool: False for prompts."""
    out = np.ones(len(groups.ended), bool)
    out[groups.first[:-1]] = False
    return out


def preferred(target: Tensor, mask: Tensor) -> Tensor:
    """(B, K, K) bool: True where both completions are there and the first has the higher target."""
    both = mask[:, :, None] & mask[:, None, :]
    return (target[:, :, None] > target[:, None, :]) & both


class Alignment(Task):
    """A stage that moves away from a reference, --init: it can draw completions, rate them, and say
    how far it is and how good."""

    def __init__(self, s: Settings, device: torch.device):
        super().__init__(s, device)
        self.reward = load_reward(s.reward, device) if s.reward else None

    def reference(self) -> Scorer:
        gpt, _ = load_gpt(self.s.init, self.device, self.s.encoding)
        gpt.to(self.gpt.wte.weight.dtype)
        return Scorer(gpt, self.temperature).requires_grad_(False)

    def draw(self, prompts: list[list[int]], n: int, generator: torch.Generator) -> Groups:
        """n completions of each prompt from the policy as it is, equal ones kept. Processes share
        the prompts; a draw depends on the generator and on its place among all, not on the prompts
        that it is computed with."""
        s, block, eot = self.s, self.gpt.config.block_size, self.encoding.eot_token
        new = min(s.max_new_tokens, block // 2)
        prompts = [p[-(block - new) :] for p in prompts]
        uniform = torch.rand(len(prompts), n, new, generator=generator)
        size = 4 * (s.micro_batch_size or s.batch_size)  # sampling keeps no activations
        drawn, gpt, mine = {}, self.plain_gpt(), range(rank(), len(prompts), world())
        for start in range(0, len(mine), size):
            chunk = mine[start : start + size]
            with autocast(s, self.device):
                ys = gpt.generate(
                    *([prompts[i] for i in chunk], new, n, self.temperature),
                    eot=eot,
                    uniform=uniform[list(chunk)].flatten(0, 1),
                )
            drawn |= {i: ys[k * n : (k + 1) * n] for k, i in enumerate(chunk)}
        drawn = dict(item for part in gather(drawn) for item in part.items())
        builder = Builder(block, eot, Report())
        for i, prompt in enumerate(prompts):
            ended = [y[-1] == eot for y in drawn[i]]
            ys = [y[: len(y) - e] for y, e in zip(drawn[i], ended, strict=True)]
            builder.put(prompt, ys, ended)
        return builder.groups()

    def rate(self, groups: Groups) -> None:
        """Fill groups.rewards. A prompt is rated as the policy read it, cut to fit if it was."""
        prompts, completions, segments = [], [], np.flatnonzero(is_completion(groups))
        for g in range(len(groups)):
            ids = groups.prompt(g)
            text = "" if ids == [groups.eot] else decode(self.encoding, ids)
            ys = groups.completions(g)
            prompts += [text] * len(ys)
            completions += [decode(self.encoding, y) for y in ys]
        ended = groups.ended[segments].tolist()
        groups.rewards[segments] = self.reward(prompts, completions, ended).numpy()

    def drawn(self, step: int) -> dict:
        """KL(pi || sft), with --reward the mean reward, and their standard errors, from one
        completion of each of kl_samples prompts."""
        rows = self.rows if self.eval_groups is None else self.eval_groups
        prompts = [rows.prompt(g) for g in evenly_spaced(len(rows), self.s.kl_samples)]
        generator = torch.Generator().manual_seed(self.s.seed * 1_000_003 + step)
        drawn = self.draw(prompts, 1, generator)
        logps, ref_logps = (
            score(m, drawn, self.s, self.device) for m in (self.module, self.reference())
        )
        segment = drawn.first[:-1] + 1
        result = mean_and_error("kl", exo.kl_estimates(logps, ref_logps)["k1"][segment])
        if self.reward:
            self.rate(drawn)
            result |= mean_and_error("reward", torch.from_numpy(drawn.rewards)[segment])
        length = (np.diff(drawn.offsets) + drawn.ended)[segment].mean().item()
        return result | {"sampled_length": float(length)}


def mean_and_error(name: str, x: Tensor) -> dict[str, float]:
    """The mean of x (N,) and its standard error."""
    spread = x.std().item() / math.sqrt(len(x)) if len(x) > 1 else 0.0
    return {name: x.mean().item(), f"{name}_stderr": spread}


def evenly_spaced(n: int, at_most: int) -> np.ndarray:
    """Up to `at_most` of the numbers below n, the first and the last among them."""
    return np.unique(np.linspace(0, n - 1, at_most).round().astype(int))


class Preference(Alignment):
    """EXO, DPO, or a fork's loss: groups with a target, and the reference's log-probs stored beside
    them."""

    def __init__(self, s: Settings, device: torch.device):
        super().__init__(s, device)
        self.loss_fn = named_loss(s.loss)
        self.log_target = log_targets(self.groups, s.beta_r, s.label_smoothing).to(device)
        if self.eval_groups is not None:
            self.eval_target = log_targets(self.eval_groups, s.beta_r, s.label_smoothing)
        self.ref_logps, self.eval_ref = None, None
        self.warned = False

    def prepare(self, ids: np.ndarray) -> None:
        if self.ref_logps is not None:  # of the checkpoint of a run that goes on
            return
        s, scorer = self.s, self.reference()
        self.ref_logps = score(scorer, self.groups, s, self.device, ids, "reference")
        self.ref_logps = self.ref_logps.to(self.device)
        if self.eval_groups is not None:
            self.eval_ref = score(scorer, self.eval_groups, s, self.device, None, "reference")

    def state(self) -> dict:
        return {"ref_logps": self.ref_logps, "eval_ref": self.eval_ref}

    def load_state(self, state: dict) -> None:
        self.ref_logps, self.eval_ref = state["ref_logps"].to(self.device), state["eval_ref"]

    def weigh(self, batch) -> int:
        return len(batch.mask)

    def loss(self, batch) -> Tensor:
        logps = self.module(batch).sum(-1)  # (B, K)
        ref, target = self.ref_logps[batch.segment], self.log_target[batch.segment]
        return self.loss_fn(logps, ref, target, self.s.beta_pi, batch.mask)

    def evaluate(self, step: int) -> dict:
        result = self.held_out() if self.eval_groups is not None else {}
        if self.s.kl_samples:
            result |= self.drawn(step)
        if result.get("chosen_logratio", 0) < -0.1 and not self.warned:
            self.warned = True
            say(
                f"warning: at step {step} the chosen completions are less likely than under the "
                f"reference (mean log-ratio {result['chosen_logratio']:.2f}): the margin grows "
                "because the rejected fall faster; a larger --beta_pi or fewer steps keep them"
            )
        return result

    def held_out(self) -> dict:
        """Metrics over the held-out groups."""
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
        return result


class Rounds(Alignment):
    """Stages that learn from completions of their own, in rounds: the policy as it is draws K
    completions of each of round_iters batches of prompts, they are rated, and optimizer steps of
    batch_size prompts make `passes` passes over them. Everything drawn depends on (seed, round).

    `stored` holds what the loss needs beside the tokens: tensors with a row for each segment of
    the round's groups, on the device; `figures` the round's mean reward and KL.
    """

    passes = 1
    beta: float  # of J = E[r] - beta KL(pi || sft)

    def __init__(self, s: Settings, device: torch.device):
        super().__init__(s, device)
        self.ref = super().reference()
        self.round, self.stored, self.figures = -1, {}, {}

    def reference(self) -> Scorer:
        return self.ref

    def steps(self) -> int:
        return self.s.max_iters or math.ceil(self.s.epochs * self.n_batches()) * self.passes

    def needed(self) -> np.ndarray:
        return np.arange(0)  # nothing is known before it is drawn

    def place(self, step: int) -> tuple[int, int, int, int]:
        """(round, its first batch of prompts, how many it has, step within the round)."""
        round_, within = divmod(step, self.s.round_iters * self.passes)
        first = round_ * self.s.round_iters
        n = min(self.s.round_iters, math.ceil(self.steps() / self.passes) - first)
        return round_, first, n, within

    def ids(self, step: int) -> np.ndarray:
        round_, _, n, within = self.place(step)
        rng = np.random.default_rng([self.s.seed, round_, within // n])
        return np.array_split(rng.permutation(len(self.groups)), n)[within % n]

    def begin(self, step: int) -> None:
        round_, first, n, _ = self.place(step)
        if round_ == self.round:
            return
        rows = np.concatenate([self.batch_ids(i) for i in range(first, first + n)])
        seed = np.random.SeedSequence([self.s.seed, round_]).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(seed))
        groups = self.draw([self.rows.prompt(g) for g in rows], self.s.K, generator)
        self.rate(groups)  # may end the run: nothing has changed so far
        self.groups, self.round = groups, round_
        self.store(torch.from_numpy(is_completion(groups)))

    def store(self, real: Tensor) -> None:
        """Fill `stored` and `figures` for the round's groups. real: (M,) True for completions."""
        raise NotImplementedError

    def round_figures(self, log_ratio: Tensor) -> dict[str, float]:
        """log_ratio: (N,) log pi - log sft of the completions of the round."""
        return {"reward": float(np.nanmean(self.groups.rewards)), "kl": log_ratio.mean().item()}

    def report(self) -> dict[str, float]:
        return self.figures

    def evaluate(self, step: int) -> dict:
        if not self.s.kl_samples:
            return {}
        result = self.drawn(step)
        return {"loss": self.beta * result["kl"] - result["reward"], **result}

    def state(self) -> dict:
        if self.round < 0:
            return {"round": -1}
        arrays = {k: v for k, v in vars(self.groups).items() if isinstance(v, np.ndarray)}
        return {
            "round": self.round,
            "groups": {k: torch.from_numpy(v) for k, v in arrays.items()},
            "stored": self.stored,
            "figures": self.figures,
        }

    def load_state(self, state: dict) -> None:
        self.round = state["round"]
        if self.round < 0:
            return
        arrays = {k: v.numpy() for k, v in state["groups"].items()}
        self.groups = Groups(**arrays, eot=self.encoding.eot_token)
        self.stored = {k: v.to(self.device) for k, v in state["stored"].items()}
        self.figures = state["figures"]


class Online(Rounds):
    """EXO and DPO on completions drawn from a snapshot rho of the policy; sft is still --init.

    EXO weighs them by rho (exo.on_policy_ref, exo.on_policy_target). DPO is its loss as it is, on
    other completions: q = softmax(beta_pi (log pi - log sft)), p = softmax(r / beta_r).
    """

    def __init__(self, s: Settings, device: torch.device):
        super().__init__(s, device)
        self.loss_fn = named_loss(s.loss)
        self.beta = s.beta_r * s.beta_pi

    def store(self, real: Tensor) -> None:
        s, M = self.s, len(real)
        ref, rho = (
            score(m, self.groups, s, self.device)[real].view(-1, s.K)
            for m in (self.ref, self.module)
        )
        rewards = torch.from_numpy(self.groups.rewards)[real].view(-1, s.K)
        self.figures = self.round_figures(rho - ref)
        target = exo.reward_target(rewards, s.beta_r)
        if s.loss == "exo":
            target = exo.on_policy_target(rewards, ref, rho, s.beta_r)
            ref = exo.on_policy_ref(ref, rho, s.beta_pi)
        for name, value in (("ref", ref), ("target", target)):
            rows = torch.zeros(M, dtype=torch.float64)
            rows[real] = value.flatten()
            self.stored[name] = rows.to(self.device)

    def weigh(self, batch) -> int:
        return len(batch.mask)

    def loss(self, batch) -> Tensor:
        logps = self.module(batch).sum(-1)  # (B, K)
        ref, target = (self.stored[k][batch.segment] for k in ("ref", "target"))
        return self.loss_fn(logps, ref, target, self.s.beta_pi, batch.mask)


class PPO(Rounds):
    """The RL baseline, as in the InstructGPT line of work (Ziegler et al. 2019, arXiv:1909.08593;
    Ouyang et al. 2022, arXiv:2203.02155). Every detail that matters:

    - One decision per token, the end of text among them. The reward comes at the last token of a
      completion; every token pays kl_coef (log pi_old - log sft). Summed, that is J's integrand.
    - A completion cut at max_new_tokens counts as ended: nothing is bootstrapped from its last
      value. Rewards are not normalised, scaled or clipped.
    - A round: round_iters batches of prompts, K completions each, from one snapshot; then
      ppo_epochs passes over them in minibatches of batch_size prompts, shuffled in every pass.
    - Generalised advantage estimates, whitened over the tokens of the whole round; the returns for
      the value network come from the advantages before they are whitened.
    - Clipped surrogate and clipped value loss (half a squared error), both averaged over tokens.
    - The value network is a trunk of its own, a copy of sft's (InstructGPT's starts from the reward
      model), and a linear head that starts at 0. One AdamW with one learning rate and one gradient
      norm for both networks.
    - kl_coef is constant; there is no entropy bonus, no early stop and no pretraining loss.
    """

    def __init__(self, s: Settings, device: torch.device):
        self.passes, self.beta = s.ppo_epochs, s.kl_coef
        super().__init__(s, device)

    def make_module(self) -> torch.nn.Module:
        return ActorCritic(self.gpt, self.temperature)

    def begin(self, step: int) -> None:
        super().begin(step)
        self.seen = []  # figures of each micro-batch of this step

    def store(self, real: Tensor) -> None:
        s, groups = self.s, self.groups
        logps, values, ref_logps = self.per_token()  # (M, T), 0 where nothing is scored
        length = torch.from_numpy(np.diff(groups.offsets) + groups.ended) * real
        scored = torch.arange(logps.size(1)) < length[:, None]
        self.figures = self.round_figures((logps - ref_logps).sum(-1)[real])
        rewards = -s.kl_coef * (logps - ref_logps)
        rewards[real, length[real] - 1] += torch.from_numpy(groups.rewards)[real].to(rewards)
        advantages, returns = exo.gae(rewards, values, scored, s.gamma, s.lam)
        stored = {"old_logps": logps, "old_values": values, "returns": returns}
        stored |= {"advantages": exo.whiten(advantages, scored)}
        self.stored = {k: v.to(self.device) for k, v in stored.items()}

    def per_token(self) -> tuple[Tensor, Tensor, Tensor]:
        """(log pi, value, log sft) of every completion token of the round, (M, T) on the CPU."""
        s, groups = self.s, self.groups
        longest = int((np.diff(groups.offsets) + groups.ended).max()) + 1
        T = -(-longest // rounding(self.device)) * rounding(self.device)  # as wide as any batch
        dtype = self.gpt.wte.weight.dtype
        out = [torch.zeros(len(groups.ended), T, dtype=dtype) for _ in range(3)]
        size = s.micro_batch_size or s.batch_size
        with autocast(s, self.device):
            for batch, result in passes(self.module, groups, size, self.device):
                for store, x in zip(out, result, strict=False):
                    store[batch.segment, : x.size(-1)] = x.to(store)
            for batch, x in passes(self.ref, groups, size, self.device):
                out[2][batch.segment, : x.size(-1)] = x.to(out[2])
        return tuple(map(shared, out))

    def weigh(self, batch) -> int:
        return int(batch.scored.sum())

    def loss(self, batch) -> Tensor:
        s, T = self.s, batch.scored.size(-1)
        stored = {k: v[batch.segment][..., :T] for k, v in self.stored.items()}
        loss, figures = exo.ppo_loss(
            *self.module(batch), **stored, scored=batch.scored, clip=s.clip,
            value_clip=s.value_clip, value_coef=s.value_coef,
        )  # fmt: skip
        self.seen.append(figures)
        return loss

    def report(self) -> dict[str, float]:
        names = self.seen[0]
        sums = [
            sum(n * f[k].item() for n, f in zip(self.weights, self.seen, strict=True))
            for k in names
        ]
        whole, *sums = total(sum(self.weights), *sums)
        return {k: x / whole for k, x in zip(names, sums, strict=True)} | self.figures

    def state(self) -> dict:
        critic = {k: getattr(self.scorer, k).state_dict() for k in ("critic", "value")}
        return super().state() | critic

    def load_state(self, state: dict) -> None:
        for name in ("critic", "value"):
            load_whole(getattr(self.scorer, name), state[name])
        super().load_state(state)


def named_loss(name: str):
    if name not in exo.LOSSES:
        raise InputError(f"unknown --loss {name!r}: choose from {', '.join(exo.LOSSES)}")
    return exo.LOSSES[name]


def log_targets(groups: Groups, beta_r: float, label_smoothing: float) -> Tensor:
    """log p of every completion, (M,) float64: the label's for pairs, the rewards' for the
    others."""
    ids = np.arange(len(groups))
    segment, mask = map(torch.from_numpy, groups.grid(ids))
    pair = torch.from_numpy(groups.is_pair())
    target = exo.reward_target(torch.from_numpy(groups.rewards[segment.numpy()]), beta_r, mask)
    target[pair, :2] = exo.preference_target(label_smoothing)
    out = torch.zeros(len(groups.rewards), dtype=torch.float64)
    out[segment[mask]] = target[mask]
    return out


def accuracy(ratio: Tensor, target: Tensor, mask: Tensor) -> float:
    """Of all pairs in a group with unlike targets, the share that log-ratios order alike; a tie is
    half."""
    gap = (ratio[:, :, None] - ratio[:, None, :])[preferred(target, mask)]
    return ((gap > 0).double() + (gap == 0).double() / 2).mean().item()


def score(module, groups: Groups, s: Settings, device, ids=None, note: str = "") -> Tensor:
    """log pi (of a reward model: the reward) of the completions of these groups (all by default):
    (M,) on the CPU, 0 elsewhere. Processes share the work, and each has all results. `note` names a
    progress bar."""
    out = torch.zeros(len(groups.ended), dtype=torch.float64)
    size = s.micro_batch_size or s.batch_size
    with autocast(s, device):
        for batch, result in passes(module, groups, size, device, ids, note):
            logps = result[0] if isinstance(result, tuple) else result  # not PPO's values
            logps = logps.sum(-1) if logps.dim() == 3 else logps  # (B, K)
            out[batch.segment[batch.mask]] = logps[batch.mask.to(device)].cpu().double()
    return shared(out)


@torch.no_grad()
def passes(module, groups: Groups, size: int, device, ids=None, note: str = ""):
    """Yields (batch on the CPU, module's result) over this process' share of these groups, all by
    default, `size` groups of similar length at once."""
    ids = np.arange(len(groups)) if ids is None else ids
    ids = ids[np.argsort(groups.sizes()[ids], kind="stable")]
    starts = range(0, len(ids), size * world())
    for start in tqdm(starts, note, disable=not note or rank() > 0, leave=False):
        mine = ids[start + rank() * size :][:size]
        spare = len(mine) == 0  # a sharded module needs all processes in each of its calls
        batch = collate(groups, ids[:1] if spare else mine, rounding(device))
        result = module(batch.to(device))
        if not spare:
            yield batch, result


def rounding(device: torch.device) -> int:
    """Lengths become multiples of this: a GPU likes few shapes, a CPU would only compute the
    padding."""
    return 64 if device.type == "cuda" else 1


# ------------------------------------------------------------------------------
# The loop


SHOWN = {  # what the bar shows of a record, where it is there
    "train": {k: k for k in ("loss", "reward", "kl")},
    "eval": {k: f"eval_{k}" for k in ("loss", "accuracy", "reward", "kl")},
}


class Log:
    """metrics.jsonl, one record a line, and the progress bar. On resume, records after the
    checkpoint's step are dropped. Rates are means since the last record of training:
    drawing counts, evaluation does not."""

    def __init__(self, s: Settings, device: torch.device, step: int, steps: int):
        self.bar = tqdm(total=steps, initial=step, desc=s.stage, disable=rank() > 0)
        self.device, self.shown, self.file = device, {}, None
        only_first(self.open, Path(s.out) / "metrics.jsonl", step)
        self.start_clock()

    def open(self, path: Path, step: int) -> None:
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [x for x in lines if x.endswith("}") and json.loads(x)["step"] <= step]
        with replacing(path) as temporary:
            temporary.write_text("".join(line + "\n" for line in kept))
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - as long as the run

    def append(self, record: dict) -> None:
        try:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
        except OSError as error:  # a full disk
            raise InputError(f"cannot write {self.file.name}: {error.strerror}") from error

    def start_clock(self) -> None:
        self.start, self.work = time.perf_counter(), np.zeros(2)  # groups, tokens

    def rates(self) -> dict[str, float]:
        seconds = time.perf_counter() - self.start
        groups, tokens = (x / seconds for x in total(*self.work))
        self.start_clock()
        rates = {"tokens_per_s": tokens, "groups_per_s": groups}
        return rates | {"peak_gb": peak_gb(self.device)}

    def write(self, kind: str, step: int, figures: dict) -> None:
        names = SHOWN[kind]
        self.shown |= {names[k]: v for k, v in figures.items() if k in names}
        only_first(self.append, {"step": step, "kind": kind, **figures})

    def advance(self) -> None:
        self.bar.update()
        self.bar.set_postfix({k: f"{v:.3f}" for k, v in self.shown.items()}, refresh=False)


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
    steps, out = task.steps(), Path(s.out)
    peak = s.learning_rate or (5e-5 if s.init else 1e-3)
    optimizer = adamw(task.scorer, s, peak)
    state = resume(s, task, optimizer) if s.resume else dict(NEW)
    task.prepare(task.needed())
    only_first(open_run, s)
    log = Log(s, task.device, state["step"], steps)
    with Stop() as stop, rescue(out, task, optimizer, state), log.bar:
        while True:
            step = state["step"]
            due = step % s.eval_interval == 0 or step == steps
            if due and step > state["evaluated"]:
                metrics = task.evaluate(step)
                log.write("eval", step, metrics)
                loss = metrics.get("loss", math.inf)
                better = loss < state["best"]
                state |= {"evaluated": step, "best": min(state["best"], loss)}
                save(out, task, optimizer, state, better)
                log.start_clock()
            if step == steps or any(gather(stop.signal)):
                break
            task.begin(step)
            rate = peak * schedule(s, step, steps)
            loss, norm, work = update(s, task, optimizer, task.ids(step), rate)
            log.work += work
            state["step"] = step = step + 1
            if step % s.log_interval == 0 or step == steps:
                (loss,) = total(loss.item())
                record = {"loss": loss, "lr": rate, "grad_norm": full(norm).item()}
                log.write("train", step, record | log.rates() | task.report())
            log.advance()
    if number := next(filter(None, gather(stop.signal)), None):
        save(out, task, optimizer, state, False)
        said = f"stopped at step {state['step']} of {steps}; the same command with --resume goes on"
        say(said, sys.stderr)
        return 128 + number
    say(f"{out}: {steps} steps; last evaluation {json.dumps(log.shown)}")
    return 0


NEW = {"step": 0, "evaluated": -1, "best": math.inf}  # of a run, beside weights and optimizer


def resume(s: Settings, task: Task, optimizer) -> dict:
    """Loads the run in --out; returns its state, as NEW has it."""
    check_run(s)
    ckpt = load_checkpoint(s.out)
    load_whole(task.gpt, ckpt["model"])
    load_whole_optimizer(optimizer, ckpt["optimizer"])
    task.load_state(ckpt.get("task", {}))
    return {k: ckpt[k] for k in NEW}


@contextlib.contextmanager
def rescue(out: Path, task: Task, optimizer, state: dict):
    """A user's reward function may break a run at any round: what was learned is saved first."""
    try:
        yield
    except InputError as error:
        if not state["step"]:
            raise
        save(out, task, optimizer, state, False)
        raise InputError(
            f"{error}; stopped at step {state['step']}, the same command with --resume goes on"
        ) from error


def update(s: Settings, task: Task, optimizer, ids: np.ndarray, rate: float):
    """One optimizer step on the groups `ids`: (loss, gradient norm, what was done: groups,
    tokens); with several processes loss and work are this one's share.

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
    task.weights = weights
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
    return loss, norm, (len(mine), sum(len(b.idx) for b in micro))


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
        **full(task.heads()),
    }
    rest = state | {"optimizer": full(optimizer.state_dict()), "task": full(task.state())}
    only_first(write_checkpoint, out, weights, rest, better)


def write_checkpoint(out: Path, weights: dict, rest: dict, better: bool) -> None:
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


TASKS = {"sft": SFT, "reward": Reward, "exo": Preference, "dpo": Preference, "ppo": PPO}


def main(argv: list[str] | None = None) -> int:
    s = parse(sys.argv[1:] if argv is None else argv)
    if s.threads:
        torch.set_num_threads(s.threads)
    try:
        if s.stage == "toy":
            from experiments import toy

            if os.environ.get("WORLD_SIZE", "1") != "1":
                raise InputError("toy runs in one process: start it without torchrun")
            make_folder(Path(s.out))
            toy.run(s.out, s.seeds, s.sweep)
            return 0
        out = Path(s.out)
        if (out / "ckpt.pt").exists() and not (s.resume or s.overwrite):
            raise InputError(f"{out} holds a run: give --resume, --overwrite or another --out")
        if s.fsdp and "RANK" not in os.environ:
            raise InputError("--fsdp needs several processes: torchrun --nproc_per_node=N train.py")
        with processes(s.device) as device:
            set_precision(s, device)
            task = Online if s.online else TASKS[s.stage]
            return fit(s, task(s, device))
    except InputError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"train.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    leave(main())
