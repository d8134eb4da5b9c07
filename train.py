"""
Training: settings, two stages, one loop.

    python train.py                      the exact world, about a minute
    python train.py sft --data pairs.jsonl --out out/sft
    python train.py exo --data pairs.jsonl --init out/sft --out out/exo      (or dpo)
    python train.py reward --data pairs.jsonl --init out/sft --out out/rm
    python train.py ppo --data prompts.jsonl --init out/sft --reward out/rm  (or exo --online)
    torchrun --nproc_per_node=8 train.py exo ...                             (any stage but toy)

Every entry of exo.LOSSES is a stage. A stage knows its groups, its loss and what to measure; the
loop knows steps, schedule, logging and saving, and nothing of methods. What a stage has:

    policy, groups, steps     what is trained, what batches are cut from, how many there will be
    ids(step)                 the groups that this step reads
    loss(batch), weigh(batch) (a mean, more figures), and how much the batch counts in that mean
    held_out                  groups to measure the loss on, or None; the lowest decides best.pt
    evaluate(step)            more figures of an evaluation; figures: more of the training records
    heads                     modules beside the GPT that are saved with it
    data                      a checksum of the rows of each --data and --eval_data
    state(), load_state(it)   what a resumed run needs beside weights, optimizer and step

All randomness is a function of (seed, step), so a resumed run needs no generator states. The
reference's log-probs never change: they are computed once, before the first step, by the module
that is trained, for the rows that will be read, and kept in the checkpoint.

The file in order: settings and the command line; setting up; SFT; Preference, which is EXO and DPO;
the loop; saving. The other stages are in methods/, many processes and run folders in infra/.
"""

import contextlib
import copy
import dataclasses
import functools
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch
from torch import Tensor
from tqdm import tqdm

import exo
from data import Batch, Epochs, Groups, collate, get_encoding, read_groups, set_targets
from infra import parallel
from infra.checkpoint import (
    FILES,
    check_free,
    enter_run,
    fingerprint,
    load_gpt,
    load_run,
    plain,
    save_run,
)
from infra.outputs import append, checksum, read_records
from infra.parallel import all_sum, gather, in_first, rank, say, shares, world
from infra.rows import InputError, one_sentence, replacing, write_json
from model import GPT, GPTConfig, Scorer

# ------------------------------------------------------------------------------
# Settings and the command line


class Number(NamedTuple):
    """What a flag may be."""

    type: type
    holds: Callable[[float], bool]
    range: str


COUNT = Number(int, lambda n: 1 <= n <= 10**9, "from 1 to 1e9")
FEW = Number(int, lambda n: 1 <= n <= 1000, "from 1 to 1000")
INDEX = Number(int, lambda n: n >= 0, "at least 0")
BETA = Number(float, lambda x: 1e-6 <= x <= 1e6, "from 1e-6 to 1e6")
POSITIVE = Number(float, lambda x: 0 < x < math.inf, "a finite number above 0")
AMOUNT = Number(float, lambda x: 0 <= x < math.inf, "a finite number, at least 0")
SHARE = Number(float, lambda x: 0 <= x < 1, "in [0, 1)")
SEED = Number(int, lambda n: 0 <= n < 2**63, "at least 0 and below 2**63")
DTYPES = ("float32", "bfloat16", "float64")


def flag(default, kind, text: str):
    """A setting: its default, what it may be (str, bool, a list, a Number, or one of several
    words), and the reason that --help prints. None: decided by the stage or --init."""
    return field(default=default, metadata={"kind": kind, "help": text})


def stages() -> tuple[str, ...]:
    return ("toy", "sft", "reward", *exo.LOSSES, "ppo")


@dataclass
class Settings:
    """Every setting of every stage; the command line and --help are made from it."""

    stage: str = flag("toy", str, "what to train; toy is the exact world")
    out: str = flag("", str, "run folder (out/STAGE)")
    # data
    data: list[str] = flag((), list, "training files: .jsonl, .jsonl.gz, .json, .txt")
    eval_data: list[str] = flag((), list, "held-out files")
    encoding: str | None = flag(None, str, "bytes, tiktoken's, module:function to run (--init's)")
    # model
    init: str = flag("", str, "begin with this run, .pt file or GPT-2 folder; exo, dpo: the sft")
    which: str = flag("last", tuple(FILES), "weights of a run --init")
    block_size: int | None = flag(None, COUNT, "longest text in tokens (--init's, or 256)")
    n_layer: int | None = flag(None, FEW, "blocks (--init's, or 4)")
    n_head: int | None = flag(None, COUNT, "attention heads (--init's, or 4)")
    n_embd: int | None = flag(None, COUNT, "width (--init's, or 128)")
    init_std: float = flag(0.02, POSITIVE, "of fresh blocks; narrow ones want about 1/sqrt(n_embd)")
    temperature: float | None = flag(None, BETA, "divides logits, always (--init's, or 1)")
    # method
    beta_pi: float = flag(0.1, BETA, "larger stays closer to the reference; 0.1 to 0.5 usual")
    beta_r: float = flag(1.0, BETA, "temperature of rewards: small trusts, large flattens them")
    label_smoothing: float | None = flag(None, AMOUNT, "softness of labels (exo 1e-3, else 0)")
    # rewards, and learning from completions of one's own
    reward: str = flag("", str, "a reward run, or module:function(prompt, completion) to run")
    online: bool = flag(False, bool, "exo, dpo: learn from own draws that --reward rates")
    K: int = flag(8, FEW, "ppo, --online: completions drawn of each prompt")
    round_iters: int | None = flag(None, COUNT, "batches of prompts in a round (ppo 4, --online 1)")
    ppo_epochs: int = flag(4, COUNT, "ppo: passes over the completions of a round")
    kl_coef: float = flag(0.1, AMOUNT, "ppo: price of KL(pi || sft), paid token by token")
    clip: float = flag(0.2, BETA, "ppo: how far a ratio of probabilities moves in a round")
    # optimisation
    batch_size: int = flag(8, COUNT, "groups per optimizer step")
    micro_batch_size: int | None = flag(None, COUNT, "groups in memory at once; same result")
    epochs: float | None = flag(None, POSITIVE, "passes over the data (1, without --max_iters)")
    max_iters: int | None = flag(None, COUNT, "optimizer steps, instead of --epochs")
    learning_rate: float | None = flag(None, POSITIVE, "peak (sft 1e-3 from scratch, else 5e-5)")
    lr_decay: str = flag("cosine", ("cosine", "linear", "constant"), "down to a tenth of the peak")
    warmup_iters: int | None = flag(None, INDEX, "linear warm-up (a twentieth of all steps)")
    weight_decay: float = flag(0.0, AMOUNT, "AdamW's, on matrices")
    beta1: float = flag(0.9, SHARE, "AdamW's momentum")
    beta2: float = flag(0.99, SHARE, "AdamW's second moment; few tokens a step want a long memory")
    grad_clip: float = flag(1.0, AMOUNT, "largest gradient norm; 0 turns clipping off")
    # evaluation
    eval_interval: int = flag(100, COUNT, "steps between evaluations, each with a checkpoint")
    log_interval: int = flag(10, COUNT, "steps between training records")
    kl_samples: int = flag(32, INDEX, "texts drawn to estimate KL(pi || sft), reward; 0: none")
    max_new_tokens: int = flag(64, COUNT, "longest draw, half of block_size at most")
    # machine
    seed: int = flag(0, SEED, "the same seed gives the same numbers")
    device: str | None = flag(None, str, "cuda, mps or cpu (the first there is)")
    dtype: str | None = flag(None, DTYPES, "bfloat16: autocast (on cuda, if not said)")
    compile: bool = flag(False, bool, "torch.compile: pays off on a GPU, slow to start on a CPU")
    gradient_checkpointing: bool = flag(False, bool, "compute twice: less memory, 1/3 slower")
    fsdp: bool = flag(False, bool, "shard weights, gradients, optimizer over torchrun's processes")
    resume: bool = flag(False, bool, "go on from --out's ckpt.pt")
    overwrite: bool = flag(False, bool, "replace the run in --out")
    # toy
    seeds: int = flag(8, COUNT, "toy: number of seeds")
    sweep: bool = flag(False, bool, "toy: also the curves over beta, n_embd and K (minutes)")

    def __post_init__(self):
        if self.stage not in stages():
            raise ValueError(f"unknown stage {self.stage!r}: choose from {', '.join(stages())}")
        for f in dataclasses.fields(self):
            kind, value = f.metadata["kind"], getattr(self, f.name)
            if isinstance(kind, Number) and value is not None and not kind.holds(value):
                raise ValueError(f"--{f.name} must be {kind.range}, got {value}")
        self.out = self.out or f"out/{self.stage}"
        self.preference = self.stage in exo.LOSSES
        self.needs = exo.needs(self.stage) if self.preference else exo.Needs()
        if self.label_smoothing is None:
            self.label_smoothing = self.needs.label_smoothing
        if self.max_iters is None and self.epochs is None:
            self.epochs = 1.0
        self.draws = self.online or self.stage == "ppo"  # learns from completions of its own
        self.round_iters = self.round_iters or (1 if self.online else 4)
        self.at_once = self.micro_batch_size or self.batch_size  # groups, where nothing is learned
        for wrong, sentence in self.contradictions():
            if wrong:
                raise ValueError(sentence)

    def contradictions(self):
        """(it is so, what to say then), one for each way in which settings contradict."""
        s, eps = self, self.label_smoothing
        if s.stage == "toy":
            said = "toy reads no files: name a stage first, as in train.py exo --data F"
            yield s.data or s.eval_data or s.init, said
            return
        yield not s.data, f"{s.stage} needs --data FILE"
        for name, value in (("init", s.init), ("reward", s.reward)):
            path, out = os.path.realpath(value), os.path.realpath(s.out)
            inside = os.path.exists(value) and out in (path, os.path.dirname(path))
            yield inside, f"--out {s.out} would overwrite --{name} {value}"
        yield s.online and not s.preference, f"--online is for {' and '.join(exo.LOSSES)}"
        said = f"{s.stage} wants pairs, chosen first: it cannot learn --online"
        yield s.online and s.needs.pairs, said
        yield s.online and s.K < 2, f"--K must be at least 2 to compare completions, got {s.K}"
        name = f"{s.stage} --online" if s.online else s.stage
        said = f"{name} needs --reward, a reward model or module:function"
        yield s.draws and not s.reward, said
        said = "--reward rates drawn completions: --kl_samples must not be 0"
        yield s.reward and not s.draws and not s.kl_samples, said
        said = f"{s.stage} needs --init, a run made by `python train.py sft` or GPT-2"
        yield (s.preference or s.stage == "ppo") and not s.init, said
        strict = s.needs.smooth_labels
        why = " (at 0 the reverse KL is infinite)" if strict else ""
        said = f"--label_smoothing must be {'0 <' if strict else '0 <='} eps < 0.5{why}, got {eps}"
        yield eps >= 0.5 or (eps == 0 and strict), said
        yield s.epochs and s.max_iters, "give --epochs or --max_iters, not both"
        yield s.fsdp and s.draws, "--fsdp is for stages that draw nothing to learn from"
        yield s.resume and s.overwrite, "give --resume or --overwrite, not both"

    def steps(self, n_batches: int) -> int:
        """Optimizer steps of the whole run, where an epoch has so many batches."""
        return self.max_iters or math.ceil(self.epochs * n_batches)


def parse(argv: list[str]) -> Settings:
    """Command line -> Settings; exits with 2 and one sentence if they contradict."""
    parser = parallel.Parser("train.py", __doc__.partition("Every entry")[0])
    parser.add_argument("stage", nargs="?", default="toy", choices=stages())
    for f in dataclasses.fields(Settings)[1:]:
        kind, text = f.metadata["kind"], f.metadata["help"]
        if f.default not in (None, "", (), False):
            text += f" (default {f.default})"
        how = {"help": text, "default": f.default}
        if kind is bool:
            how |= {"action": "store_true"}
        elif kind is list:
            how |= {"nargs": "+", "metavar": "FILE"}
        elif isinstance(kind, Number):
            how |= {"type": kind.type, "metavar": kind.type.__name__.upper()}
        else:
            how |= {"metavar": "NAME"} if kind is str else {"choices": kind}
        parser.add_argument(f"--{f.name}", **how)
    try:
        return Settings(**vars(parser.parse_args(argv)))
    except ValueError as error:
        parser.error(str(error))


# ------------------------------------------------------------------------------
# Setting up


@dataclass
class Policy:
    """What is trained, and what it must stay near."""

    gpt: GPT
    encoding_name: str
    encoding: tiktoken.Encoding
    temperature: float
    device: torch.device
    sft: GPT | None = None  # --init as it was before the first step, on the CPU
    scorer: torch.nn.Module | None = None  # holds all that is trained
    module: torch.nn.Module | None = None  # scorer in DDP, shards or compiled: the only way in

    def wrap(self, scorer: torch.nn.Module, s: Settings) -> "Policy":
        """A stage's whole differentiable computation is the one forward of this module."""
        self.scorer = scorer.to(self.device, self.gpt.wte.weight.dtype)
        self.module = parallel.wrap(self.scorer, self.device, s.fsdp, s.compile)
        return self

    def scoring(self, s: Settings) -> "Policy":
        return self.wrap(Scorer(self.gpt, self.temperature), s)

    def reference(self) -> Scorer:
        """sft on the device, for as long as somebody holds it."""
        on_cpu = self.device.type == "cpu"
        sft = self.sft if on_cpu else copy.deepcopy(self.sft).to(self.device)
        return Scorer(sft, self.temperature).requires_grad_(False)

    @functools.cached_property
    def fingerprint(self) -> int:
        """Of sft, to see on resume that it is still the same."""
        return fingerprint(self.sft) if self.sft else 0


def make_policy(s: Settings, device: torch.device) -> Policy:
    gpt, name, temperature = load_init(s) if s.init else fresh_gpt(s)
    gpt.to(torch.float64 if s.dtype == "float64" else torch.float32)
    sft = copy.deepcopy(gpt).eval() if s.preference or s.stage == "ppo" else None
    gpt.gradient_checkpointing = s.gradient_checkpointing
    return Policy(gpt.to(device), name, get_encoding(name), temperature, device, sft)


SIZES = {"block_size": 256, "n_layer": 4, "n_head": 4, "n_embd": 128}  # without --init


def fresh_gpt(s: Settings) -> tuple[GPT, str, float]:
    """(model, encoding's name, temperature)."""
    name = s.encoding or "bytes"
    sizes = {k: getattr(s, k) or default for k, default in SIZES.items()}
    sizes["vocab_size"] = get_encoding(name).n_vocab  # its error is about the encoding
    with one_sentence("the model's flags do not fit", (ValueError, RuntimeError)):  # too large
        gpt = GPT(GPTConfig(**sizes), torch.Generator().manual_seed(s.seed), s.init_std)
    return gpt, name, s.temperature or 1.0


def load_init(s: Settings) -> tuple[GPT, str, float]:
    """The same from --init; flags beside it must agree."""
    gpt, ckpt = load_gpt(s.init, "cpu", s.encoding, policy=s.stage != "reward", which=s.which)
    name = ckpt["encoding"]
    if ckpt.get("left_out"):
        say(f"{s.init}: {ckpt['left_out']} words beyond {name}'s left out")
    has = {k: getattr(gpt.config, k) for k in SIZES} | {"encoding": name}
    for flag_name, value in has.items():
        if getattr(s, flag_name) not in (None, value):
            given = f"--{flag_name} {getattr(s, flag_name)}"
            raise InputError(f"{given} disagrees with --init {s.init}, which has {value}")
    return gpt, name, s.temperature or ckpt["temperature"]


def make_stage(s: Settings, device: torch.device):
    """The stage, its files read. What only some stages need is imported only there."""
    stage = SFT if s.stage == "sft" else Preference
    if s.stage == "reward":
        from methods.reward import RewardStage as stage
    elif s.stage == "ppo":
        from methods.ppo import PPOStage as stage
    elif s.online:
        from methods.online import OnlineStage as stage
    policy = make_policy(s, device)
    use = "prompt" if s.draws else "sft" if s.stage == "sft" else "preference"
    block_size, read = policy.gpt.config.block_size - getattr(stage, "spare", 0), []
    for paths in filter(None, (s.data, s.eval_data)):
        groups, report = read_groups(paths, policy.encoding, block_size, use)
        say(f"{', '.join(paths)}: {report}")
        read.append(groups)
    data = [checksum([g.tokens, g.offsets, g.first, g.ended, g.rewards]) for g in read]
    made = stage(s, policy, *read)
    made.data = data
    return made


def adamw(module: torch.nn.Module, s: Settings, learning_rate: float) -> torch.optim.AdamW:
    """AdamW, fused; weight decay on matrices only."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": s.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(s.beta1, s.beta2), fused=True)


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
# Supervised fine-tuning


class SFT:
    """Cross-entropy of the completion's tokens, averaged over tokens."""

    def __init__(self, s: Settings, policy: Policy, groups: Groups, held_out: Groups | None = None):
        self.policy, self.groups, self.held_out = policy.scoring(s), groups, held_out
        epochs = Epochs(groups, s.batch_size, s.seed)
        self.ids, self.steps = epochs.batch, s.steps(epochs.n_batches)
        self.figures, self.heads = {}, {}

    def loss(self, batch: Batch) -> tuple[Tensor, dict]:
        logps = self.policy.module(batch)  # (B, 1, T)
        return -logps.sum() / batch.lengths().sum(), {}

    def weigh(self, batch: Batch) -> int:
        return int(batch.lengths().sum())

    def evaluate(self, step: int) -> dict:
        return {}

    def state(self) -> dict:
        return {}

    def load_state(self, state: dict) -> None:
        """Nothing beside weights, optimizer and step."""


# ------------------------------------------------------------------------------
# EXO, DPO, and any other entry of exo.LOSSES


class Preference:
    """Groups with a target, the reference's log-probs beside them, and a loss."""

    def __init__(self, s: Settings, policy: Policy, groups: Groups, held_out: Groups | None = None):
        self.s, self.policy = s, policy.scoring(s)
        self.groups, self.held_out = groups, held_out
        self.loss_fn, self.figures, self.heads = exo.LOSSES[s.stage], {}, {}
        self.epochs = Epochs(groups, s.batch_size, s.seed)
        self.ids, self.steps = self.epochs.batch, s.steps(self.epochs.n_batches)
        self.reward = None
        if s.reward:
            from methods.reward import load_reward

            self.reward = load_reward(s.reward, policy.device, s.encoding)
        for part in filter(None, (groups, held_out)):
            if s.needs.pairs and not part.is_pair().all():
                where = part.place(int(part.is_pair().argmin()))
                raise InputError(f"{where}: {s.stage} wants preference pairs, not rewards")
            set_targets(part, s.beta_r, s.label_smoothing)
            unknown = math.inf if s.needs.reference else 0.0
            part.ref_logps = np.full(len(part.ended), unknown)
        if not s.resume:
            self.ask_reference(policy.module)

    def ask_reference(self, scorer: torch.nn.Module) -> None:
        """Fill ref_logps of all groups that some step, or an evaluation, will read: in the batches
        that read them first, because the last bits of a log-prob depend on what is computed beside
        it, and log-ratios begin at exactly 0."""
        s, asked = self.s, [(self.groups, self.epochs.first(self.steps))]
        if self.held_out:
            asked.append((self.held_out, [np.arange(len(self.held_out))]))
        for part, whole in asked:
            whole = [ids for ids in whole if np.isposinf(part.ref_logps[part.first[ids] + 1]).any()]
            if not whole:
                continue
            batches = None  # an evaluation's
            if part is self.groups:
                batches = [m for ids in whole for m in shares(ids, s.micro_batch_size)]
            logps = parallel.score(
                scorer, part, s.at_once, self.policy.device, s.dtype, batches, "reference"
            )
            segment, mask = part.grid(np.concatenate(whole))
            part.ref_logps[segment[mask]] = logps.numpy()[segment[mask]]

    def loss(self, batch: Batch) -> tuple[Tensor, dict]:
        logps = self.policy.module(batch).sum(-1)  # (B, K)
        more = {"lengths": batch.lengths()} if self.s.needs.lengths else {}
        loss = self.loss_fn(
            logps, batch.ref_logps, batch.log_target, self.s.beta_pi, batch.mask, **more
        )
        figures = preference_figures(logps.detach(), batch, self.s.beta_pi)
        if not self.s.needs.reference:  # nothing to be nearer to, or farther from
            figures = {k: x for k, x in figures.items() if k.endswith(("logps", "length"))}
        return loss, figures

    def weigh(self, batch: Batch) -> int:
        return len(batch.mask)

    def evaluate(self, step: int) -> dict:
        if not self.s.kl_samples:
            return {}
        from methods.online import drawn_figures

        prompts, ref = self.held_out or self.groups, self.policy.reference()
        return drawn_figures(self.policy, self.s, ref, prompts, self.reward, step)

    def state(self) -> dict:
        parts = {"ref_logps": self.groups, "held_out_ref_logps": self.held_out}
        return {k: torch.from_numpy(part.ref_logps) for k, part in parts.items() if part}

    def load_state(self, state: dict) -> None:
        if {k: x.shape for k, x in state.items()} != {k: x.shape for k, x in self.state().items()}:
            raise ValueError("its reference is that of other rows")
        self.groups.ref_logps = state["ref_logps"].numpy().copy()
        if self.held_out:
            self.held_out.ref_logps = state["held_out_ref_logps"].numpy().copy()
        self.ask_reference(self.policy.reference())  # of rows that a longer run will read


def preference_figures(logps: Tensor, batch: Batch, beta_pi: float) -> dict[str, Tensor]:
    """Means over groups, so that micro-batches add up: of the completion with the highest target,
    called chosen, and of the one with the lowest. logps: (B, K)."""
    ratio = logps - batch.ref_logps
    best = batch.log_target.masked_fill(~batch.mask, -torch.inf).argmax(-1, keepdim=True)
    worst = batch.log_target.masked_fill(~batch.mask, torch.inf).argmin(-1, keepdim=True)
    figures = {
        "accuracy": exo.accuracy(ratio, batch.log_target, batch.mask),
        "margin": beta_pi * (ratio.gather(1, best) - ratio.gather(1, worst)).mean(),
    }
    lengths = batch.lengths().to(logps)
    for name, k in (("chosen", best), ("rejected", worst)):
        for what, x in (("logps", logps), ("logratio", ratio), ("length", lengths)):
            figures[f"{name}_{what}"] = x.gather(1, k).mean()
    return figures


# ------------------------------------------------------------------------------
# The loop


def fit(s: Settings, stage, held: contextlib.ExitStack) -> int:
    """Train: the one loop of every stage, in a run folder that is this process' own until `held`
    closes. Returns the exit status."""
    steps, out = stage.steps, Path(s.out)
    in_first(enter_run, out, s.resume or s.overwrite, held)
    peak = s.learning_rate or (5e-5 if s.init else 1e-3)
    optimizer = adamw(stage.policy.scorer, s, peak)
    state = resume(s, stage, optimizer) if s.resume else dict(NEW)
    log = Log(s, stage.policy.device, state, steps)
    with Stop() as stop, rescue(s, stage, optimizer, state, log), log.bar:
        while True:
            step = state["step"]
            due = step % s.eval_interval == 0 or step == steps
            if due and step > state["evaluated"]:
                evaluate(s, stage, optimizer, state, log)
            if step == steps or any(gather(stop.signal)):
                break
            rate = peak * schedule(s, step, steps)
            figures, work = update(s, stage, optimizer, stage.ids(step), rate)
            state["step"] = step = step + 1
            log.work += work
            if step % s.log_interval == 0 or step == steps:
                sums = all_sum(*(x.item() for x in figures.values()))
                figures = dict(zip(figures, sums, strict=True)) | {"lr": rate, **log.rates()}
                log.record("train", step, figures | stage.figures)
                log.write()
            log.advance()
    if number := next(filter(None, gather(stop.signal)), None):
        save(s, stage, optimizer, state, False, log)
        said = f"stopped at step {state['step']} of {steps}; the same command with --resume goes on"
        say(said, sys.stderr)
        return 128 + number
    say(f"{out}: {steps} steps; last figures {json.dumps(log.shown)}")
    return 0


def update(s: Settings, stage, optimizer, ids: np.ndarray, rate: float) -> tuple[dict, np.ndarray]:
    """One optimizer step on the groups `ids`: (this process' share of each figure, and what it did,
    in groups and tokens).

    Each process takes every world()-th group. Wrappers average gradients over processes, and want
    as many passes in each; so losses are scaled to give a mean over all that `ids` hold, and a
    process whose groups are used up takes part with weight 0.
    """
    policy = stage.policy
    mine = shares(ids, s.micro_batch_size)
    round_to = parallel.rounding(policy.device)
    micro = [collate(stage.groups, m if len(m) else ids[:1], round_to) for m in mine]
    weights = [stage.weigh(b) if len(m) else 0 for m, b in zip(mine, micro, strict=True)]
    (whole,) = all_sum(sum(weights))
    sums = {}
    for i, (batch, weight) in enumerate(zip(micro, weights, strict=True)):
        with parallel.accumulating(policy.module, last=i == len(micro) - 1):
            with parallel.autocast(s.dtype, policy.device):
                loss, figures = stage.loss(move(batch, policy))
            (loss * (weight / whole * world())).backward()
        for name, x in {"loss": loss.detach(), **figures}.items():
            sums[name] = sums.get(name, 0.0) + x * (weight / whole)
    norm = torch.nn.utils.clip_grad_norm_(policy.scorer.parameters(), s.grad_clip or math.inf)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    if not math.isfinite(norm):  # the one place in a step where a GPU is waited for
        raise Diverged(f"the gradient is no number for the rows {rows_of(stage.groups, ids)}")
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    sums["grad_norm"] = norm / world()  # equal in all processes
    return sums, np.array([sum(map(len, mine)), sum(batch.n_tokens() for batch in micro)])


def move(batch: Batch, policy: Policy) -> Batch:
    """To the device; to a GPU from pinned memory, so that the copy waits for no kernel."""
    dtype = policy.gpt.wte.weight.dtype
    if policy.device.type != "cuda":
        return batch.to(policy.device, dtype)
    return Batch(*(x.pin_memory() for x in batch)).to(policy.device, dtype, non_blocking=True)


class Diverged(InputError):
    """A loss or gradient that is no number: what stands in the checkpoint is better."""


def rows_of(groups: Groups, ids: np.ndarray, at_most: int = 8) -> str:
    """Where these groups come from."""
    shown = dict.fromkeys(groups.place(g) for g in ids[:at_most])
    return ", ".join(shown) + (f" and {len(ids) - at_most} more" if len(ids) > at_most else "")


def evaluate(s: Settings, stage, optimizer, state: dict, log: "Log") -> None:
    """Measure, write it down with the checkpoint, and only then know of it: where one of the files
    could not be written, a resumed run measures again."""
    more = stage.evaluate(state["step"])
    figures = (held_out_figures(s, stage) if stage.held_out else {}) | more
    loss = figures.get("loss", math.inf)
    if "loss" in figures and not math.isfinite(loss):
        raise Diverged("the held-out loss is no number")
    log.record("eval", state["step"], figures)
    now = state | {"evaluated": state["step"], "best": min(state["best"], loss)}
    save(s, stage, optimizer, now, loss < state["best"], log, first=state["evaluated"] < 0)
    state |= now
    log.start_clock()


@torch.no_grad()
def held_out_figures(s: Settings, stage) -> dict[str, float]:
    """The loss and its figures over all held-out groups, weighed as in training."""
    policy, sums, whole = stage.policy, {}, 0
    for batch, (loss, figures) in parallel.passes(
        policy.module, stage.held_out, s.at_once, policy.device, s.dtype, call=stage.loss
    ):
        weight = stage.weigh(batch)
        whole += weight
        for name, x in {"loss": loss, **figures}.items():
            sums[name] = sums.get(name, 0.0) + x * weight
    parts = gather((whole, {name: x.item() for name, x in sums.items()}))
    whole, names = sum(n for n, _ in parts), max((part for _, part in parts), key=len)
    return {name: sum(part.get(name, 0.0) for _, part in parts) / whole for name in names}


class Log:
    """metrics.jsonl, one record a line, and the progress bar. On resume, records after the
    checkpoint are dropped. Rates are means since the last record of training: drawing counts,
    evaluation does not."""

    def __init__(self, s: Settings, device: torch.device, state: dict, steps: int):
        self.device, self.shown, self.path = device, {}, Path(s.out) / "metrics.jsonl"
        self.waiting = []  # records that are not in the file yet
        self.saved = state["step"] if s.resume else None  # step of the last checkpoint
        if s.resume:
            in_first(self.keep_until, state)
        self.bar = tqdm(total=steps, initial=state["step"], desc=s.stage, disable=rank() > 0)
        self.start_clock()

    def keep_until(self, state: dict) -> None:
        last = {"train": state["step"], "eval": state["evaluated"]}
        with one_sentence(f"cannot read {self.path}"):
            kept = [r for r in read_records(self.path) if r["step"] <= last[r["kind"]]]
        with replacing(self.path) as temporary:
            append(temporary, kept)

    def record(self, kind: str, step: int, figures: dict) -> None:
        where = "eval_" if kind == "eval" else ""
        shown = [name for name in ("loss", "accuracy", "reward", "kl") if name in figures]
        self.shown |= {where + name: figures[name] for name in shown}
        known = {name: x if math.isfinite(x) else None for name, x in figures.items()}
        self.waiting.append({"step": step, "kind": kind, **known})

    def write(self) -> None:
        in_first(append, self.path, self.waiting)
        self.waiting.clear()

    def start_clock(self) -> None:
        self.start, self.work = time.perf_counter(), np.zeros(2)  # groups, tokens

    def rates(self) -> dict[str, float]:
        seconds = time.perf_counter() - self.start
        groups, tokens = (x / seconds for x in all_sum(*self.work))
        self.start_clock()
        rates = {"tokens_per_s": tokens, "groups_per_s": groups}
        return rates | {"peak_gb": parallel.peak_gb(self.device)}

    def advance(self) -> None:
        self.bar.update()
        self.bar.set_postfix({k: f"{v:.3f}" for k, v in self.shown.items()}, refresh=False)


# ------------------------------------------------------------------------------
# Saving, stopping and going on

NEW = {"step": 0, "evaluated": -1, "best": math.inf}  # of a run, beside weights and optimizer


def save(
    s: Settings, stage, optimizer, state: dict, better: bool, log: Log, first: bool = False
) -> None:
    policy = stage.policy
    weights = {
        "model": parallel.weights_to_save(policy.gpt),
        "config": dataclasses.asdict(policy.gpt.config),
        "encoding": policy.encoding_name,
        "temperature": policy.temperature,
        "stage": s.stage,
        **{name: parallel.weights_to_save(head) for name, head in stage.heads.items()},
    }
    rest = state | {
        "optimizer": parallel.optimizer_to_save(policy.scorer, optimizer),
        "task": stage.state(),
        "sft": policy.fingerprint,
        "data": stage.data,
    }
    settings = plain(s) if first else None
    in_first(save_run, Path(s.out), weights, rest, better, log.waiting, settings)
    log.waiting.clear()
    log.saved = state["step"]


def resume(s: Settings, stage, optimizer) -> dict:
    """Loads the run in --out; returns its state, as NEW has it."""
    ckpt, policy = load_run(Path(s.out), plain(s)), stage.policy
    if ckpt["sft"] != policy.fingerprint:
        raise InputError(f"--resume: --init {s.init} is another model than when the run began")
    if ckpt["data"] != stage.data:
        files = ", ".join([*s.data, *s.eval_data])
        raise InputError(f"--resume: the rows of {files} are not those with which the run began")
    if ckpt["step"] > stage.steps:
        said = f"the run in {s.out} is at step {ckpt['step']}, beyond the {stage.steps} asked for"
        raise InputError(f"--resume: {said}")
    with one_sentence(f"--resume: {s.out} does not fit this run"):
        parallel.load_weights(policy.gpt, ckpt["model"])
        for name, head in stage.heads.items():
            parallel.load_weights(head, ckpt[name])
        parallel.load_optimizer(policy.scorer, optimizer, ckpt["optimizer"])
        stage.load_state(ckpt["task"])
    in_first(write_json, Path(s.out) / "settings.json", plain(s))
    return {k: ckpt[k] for k in NEW}


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


@contextlib.contextmanager
def rescue(s: Settings, stage, optimizer, state: dict, log: Log):
    """A user's reward function may break a run at any round: what was learned is saved first. Where
    the run itself broke, or nothing can be saved, the last checkpoint is kept."""
    try:
        yield
    except Diverged as error:
        kept = "" if log.saved is None else f"; {s.out} keeps the checkpoint of step {log.saved}"
        raise InputError(f"step {state['step']}: {error}{kept}") from error
    except InputError as error:
        if log.saved is None:
            raise
        with contextlib.suppress(InputError):
            save(s, stage, optimizer, state, False, log)
        said = f"stopped at step {state['step']}, the same command with --resume goes on"
        raise InputError(f"{error}; {said} from step {log.saved}") from error


def main(argv: list[str] | None = None) -> int:
    s = parse(sys.argv[1:] if argv is None else argv)
    try:
        if s.stage == "toy":
            from experiments.toy.main import run

            if os.environ.get("WORLD_SIZE", "1") != "1":
                raise InputError("toy runs in one process: start it without torchrun")
            check_free(Path(s.out), False, True)
            with contextlib.ExitStack() as held:
                enter_run(Path(s.out), True, held)
                run(s.out, s.seeds, s.sweep)
            return 0
        s.resume = check_free(Path(s.out), s.resume, s.overwrite)
        if s.fsdp and "RANK" not in os.environ:
            raise InputError("--fsdp needs several processes: torchrun --nproc_per_node=N train.py")
        with parallel.processes(s.device) as device, contextlib.ExitStack() as held:
            parallel.set_precision(s.dtype, device)
            return fit(s, make_stage(s, device), held)  # a stage kept here would outlive the group
    except KeyboardInterrupt:  # the toy, before the first step, or a second Ctrl-C
        say("train.py: stopped before it could save", sys.stderr)
        return 130
    except (MemoryError, torch.OutOfMemoryError):
        less = f"--micro_batch_size below {s.at_once} or --gradient_checkpointing need less memory"
        kept = f"checkpoints in {s.out} are whole, the same command with --resume goes on"
        parallel.complain("train.py", InputError(f"out of memory; {less}; {kept}"))
        return 2
    except (InputError, OSError) as error:  # a name too long, a folder without permission
        parallel.complain("train.py", error)
        return 2


if __name__ == "__main__":
    parallel.run_program(main)
