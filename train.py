"""
Training: settings, two stages, one loop.

    python train.py                      the exact world, about a minute
    python train.py sft --data pairs.jsonl --out out/sft
    python train.py exo --data pairs.jsonl --init out/sft --out out/exo      (or dpo)
    python train.py reward --data pairs.jsonl --init out/sft --out out/rm
    python train.py ppo --data prompts.jsonl --init out/sft --reward out/rm  (or exo --online)
    torchrun --nproc_per_node=8 train.py exo ...                             (any stage but toy)

Every entry of exo.LOSSES is a stage. A stage knows its groups, its loss and its evaluation; the
loop knows steps, schedule, logging and saving, and nothing of methods. What a stage has, that `fit`
and `update` use:

    policy, groups, steps     what is trained, what batches are cut from, how many there will be
    ids(step)                 the groups that this step reads
    loss(batch), weigh(batch) (a mean, more figures), and how much the batch counts in that mean
    evaluate(step)            figures; "loss" decides which weights are the best
    figures, heads            of the last step; modules beside the GPT that are saved with it
    state(), load_state(it)   what a resumed run needs beside weights, optimizer and step

All randomness is a function of (seed, step), so a resumed run needs no generator states. The
reference's log-probs never change: they are computed once, before the first step, by the module
that is trained, for the rows that will be read, and kept in the checkpoint.

The file in order: settings and the command line; setting up; SFT; Preference, which is EXO and DPO;
the loop. The other stages are in methods/, many processes and run folders in infra/.
"""

import argparse
import contextlib
import copy
import dataclasses
import json
import math
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tiktoken
import torch
from torch import Tensor
from tqdm import tqdm

import exo
from data import Epochs, Groups, collate, get_encoding, read_groups, set_targets
from infra.checkpoint import FILES, check_free, load_gpt, load_run, open_run, plain, save_run
from infra.parallel import (
    accumulating,
    all_sum,
    autocast,
    complain,
    gather,
    in_first,
    load_optimizer,
    load_weights,
    optimizer_to_save,
    peak_gb,
    processes,
    rank,
    rounding,
    run_program,
    say,
    score,
    set_precision,
    weights_to_save,
    world,
    wrap,
)
from infra.rows import InputError, make_folder, replacing
from model import GPT, GPTConfig, Scorer

DTYPES = ("float32", "bfloat16", "float64")

# ------------------------------------------------------------------------------
# Settings and the command line


def stages() -> tuple[str, ...]:
    return ("toy", "sft", "reward", *exo.LOSSES, "ppo")


def flag(default, text: str, kind=None):
    """A setting: its default, the reason or range that --help prints, and its type (by default the
    default's, or text), or what it may be."""
    kind = kind or (str if default is None else type(default))
    return field(default=default, metadata={"help": text, "kind": kind})


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
    which: str = flag("last", "of a run folder --init: its last weights, or its best", tuple(FILES))
    block_size: int | None = flag(None, "longest text in tokens (--init's, or 256)", int)
    n_layer: int | None = flag(None, "blocks (--init's, or 4)", int)
    n_head: int | None = flag(None, "attention heads (--init's, or 4)", int)
    n_embd: int | None = flag(None, "width (--init's, or 128)", int)
    init_std: float | None = flag(
        None,
        "spread of fresh blocks' weights (0.02; narrow models want about 1/sqrt(n_embd))",
        float,
    )
    temperature: float | None = flag(
        None, "divides logits, in training and sampling (--init's, or 1)", float
    )
    # method
    beta_pi: float = flag(0.1, "larger stays closer to the reference; 0.1 to 0.5 is usual")
    beta_r: float = flag(1.0, "temperature of rewards: small trusts them, large flattens them")
    label_smoothing: float | None = flag(
        None, "probability that a label is wrong (exo 1e-3, dpo and reward 0)", float
    )
    # rewards, and learning from completions of one's own
    reward: str = flag(
        "",
        "run folder or .pt of the stage reward, or module:function of (prompt, completion) or, if "
        "its second parameter is called `completions`, of two lists; exo, dpo: evaluation only, "
        "unless --online",
    )
    online: bool = flag(
        False, "exo, dpo, ...: train on completions drawn from the policy, rated by --reward"
    )
    K: int = flag(8, "ppo, --online: completions drawn of each prompt")
    round_iters: int | None = flag(
        None,
        "ppo, --online: batches of prompts drawn from one snapshot (ppo 4, --online 1: fresh)",
        int,
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
        None, "groups in memory at once; does not change the result", int
    )
    epochs: float | None = flag(
        None, "passes over the data (1, unless --max_iters is given)", float
    )
    max_iters: int | None = flag(None, "optimizer steps, instead of --epochs", int)
    learning_rate: float | None = flag(None, "peak (sft 1e-3 from scratch, else 5e-5)", float)
    lr_decay: str = flag("cosine", "down to a tenth of the peak", ("cosine", "linear", "constant"))
    warmup_iters: int | None = flag(None, "steps of linear warm-up (a twentieth of all)", int)
    weight_decay: float = flag(0.0, "AdamW's, on matrices")
    beta1: float = flag(0.9, "AdamW's momentum")
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
        None, "bfloat16: autocast, the choice on cuda; float64: weights too", tuple(DTYPES)
    )
    threads: int | None = flag(
        None, "CPU threads; the sums, and so the last bits, depend on it", int
    )
    compile: bool = flag(False, "torch.compile: pays off on a GPU, slow to start on a CPU")
    gradient_checkpointing: bool = flag(
        False, "keep only each block's input and compute the rest again: less memory, 1/3 slower"
    )
    fsdp: bool = flag(False, "shard weights, gradients and optimizer over torchrun's processes")
    resume: bool = flag(False, "go on from --out's ckpt.pt")
    overwrite: bool = flag(False, "replace the run in --out")
    # toy
    seeds: int = flag(8, "toy: number of seeds")
    sweep: bool = flag(
        False, "toy: also the curves over beta, n_embd, completions and gradients (minutes)"
    )

    def __post_init__(self):
        self.out = self.out or f"out/{self.stage}"
        self.preference = self.stage in exo.LOSSES
        self.needs = exo.needs(self.stage) if self.preference else exo.Needs()
        if self.label_smoothing is None:
            self.label_smoothing = self.needs.label_smoothing
        if self.epochs is None and self.max_iters is None:
            self.epochs = 1.0
        self.draws = self.online or self.stage == "ppo"  # learns from completions of its own
        if self.draws and self.round_iters is None:
            self.round_iters = 1 if self.online else 4
        self.at_once = self.micro_batch_size or self.batch_size  # groups, where nothing is learned
        for ok, sentence in (*self.rules(), *self.ranges()):
            if not ok:
                raise ValueError(sentence)

    def steps(self, n_batches: int) -> int:
        """Optimizer steps of the whole run, where an epoch has so many batches."""
        return self.max_iters or math.ceil(self.epochs * n_batches)

    def rules(self):
        """(holds, what to say if not), one for each way in which settings can contradict."""
        s = self
        yield s.stage in stages(), f"unknown stage {s.stage!r}: choose from {', '.join(stages())}"
        if s.stage != "toy":
            yield s.data, f"{s.stage} needs --data FILE"
        else:
            given = s.data or s.eval_data or s.init
            said = "toy reads no files: name a stage first, as in train.py exo --data F"
            yield not given, said
        init, out = os.path.realpath(s.init), os.path.realpath(s.out)
        inside = s.init and out in (init, os.path.dirname(init))
        yield not inside, f"--out {s.out} would overwrite --init {s.init}"
        yield not s.online or s.preference, f"--online is for {' and '.join(exo.LOSSES)}"
        said = f"{s.stage} wants pairs, chosen first: it cannot learn --online"
        yield not s.online or not s.needs.pairs, said
        if s.draws:
            name = f"{s.stage} --online" if s.online else s.stage
            yield s.reward, f"{name} needs --reward, a reward model or module:function"
            least = 2 if s.online else 1
            yield s.K >= least, f"--K must be at least {least} for {name}, got {s.K}"
        elif s.reward:
            yield s.kl_samples, "--reward rates drawn completions: --kl_samples must not be 0"
        if s.preference or s.stage == "ppo":
            yield s.init, f"{s.stage} needs --init, a run made by `python train.py sft` or GPT-2"
        if s.preference or s.stage == "reward":
            strict, eps = s.needs.smooth_labels, s.label_smoothing
            ok = 0 < eps < 0.5 or (eps == 0 and not strict)
            low, why = ("0 <", " (at 0 the reverse KL is infinite)") if strict else ("0 <=", "")
            yield ok, f"--label_smoothing must be {low} eps < 0.5{why}, got {eps}"
        yield not (s.epochs and s.max_iters), "give --epochs or --max_iters, not both"
        yield not s.fsdp or not s.draws, "--fsdp is for stages that draw nothing to learn from"
        yield not (s.resume and s.overwrite), "give --resume or --overwrite, not both"

    def ranges(self):
        """The same, for numbers out of range."""
        above_0 = "beta_pi beta_r temperature learning_rate epochs init_std clip value_clip"
        at_least_1 = "batch_size micro_batch_size max_iters eval_interval log_interval round_iters"
        at_least_1 += " ppo_epochs n_layer n_head n_embd max_new_tokens seeds threads"
        at_least_0 = "kl_samples weight_decay grad_clip warmup_iters seed kl_coef value_coef"
        named = [(name, getattr(self, name)) for name in at_least_1.split()]
        for name, value in named:
            yield value is None or value >= 1, f"--{name} must be at least 1, got {value}"
        ok = self.block_size is None or self.block_size >= 2
        yield ok, f"--block_size must be at least 2, got {self.block_size}"
        for name, value in [(name, getattr(self, name)) for name in above_0.split()]:
            ok = value is None or (value > 0 and math.isfinite(value))
            yield ok, f"--{name} must be a finite number above 0, got {value}"
        for name, value in [(name, getattr(self, name)) for name in at_least_0.split()]:
            yield value is None or value >= 0, f"--{name} must not be negative, got {value}"
        for name in ("gamma", "lam"):
            value = getattr(self, name)
            yield 0 <= value <= 1, f"--{name} must be in [0, 1], got {value}"
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            yield 0 <= value < 1, f"--{name} must be in [0, 1), got {value}"


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
    parser.add_argument("stage", nargs="?", default="toy", choices=stages())
    for f in dataclasses.fields(Settings)[1:]:
        kind, text = f.metadata["kind"], f.metadata["help"]
        shown = "" if f.default in (None, "", (), False) else f" (default {f.default})"
        how = {"help": text + shown, "default": f.default}
        if kind is bool:
            how |= {"action": "store_true"}
        elif kind is tuple:
            how |= {"nargs": "+", "metavar": "FILE"}
        elif isinstance(kind, tuple):
            how |= {"choices": kind}
        else:
            how |= {"type": kind, "metavar": "NAME" if kind is str else kind.__name__.upper()}
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
        self.module = wrap(self.scorer, self.device, s.fsdp, s.compile)
        return self

    def scoring(self, s: Settings) -> "Policy":
        return self.wrap(Scorer(self.gpt, self.temperature), s)

    def reference(self) -> Scorer:
        """sft on the device, for as long as somebody holds it."""
        on_cpu = self.device.type == "cpu"
        sft = self.sft if on_cpu else copy.deepcopy(self.sft).to(self.device)
        return Scorer(sft, self.temperature).requires_grad_(False)

    def fingerprint(self) -> float:
        """Of sft, to see on resume that it is still the same."""
        return sum(p.double().abs().sum().item() for p in self.sft.parameters()) if self.sft else 0


def make_policy(s: Settings, device: torch.device) -> Policy:
    gpt, name, temperature = build(s)
    gpt.to(torch.float64 if s.dtype == "float64" else torch.float32)
    stays_near = s.preference or s.stage == "ppo"
    sft = copy.deepcopy(gpt).eval() if stays_near else None
    gpt.gradient_checkpointing = s.gradient_checkpointing
    return Policy(gpt.to(device), name, get_encoding(name), temperature, device, sft)


def build(s: Settings) -> tuple[GPT, str, float]:
    """(model, encoding's name, temperature) from --init, or from scratch; flags beside --init must
    agree."""
    sizes = {k: getattr(s, k) for k in ("block_size", "n_layer", "n_head", "n_embd")}
    if not s.init:
        name = s.encoding or "bytes"
        default = {"block_size": 256, "n_layer": 4, "n_head": 4, "n_embd": 128}
        sizes = {k: v or default[k] for k, v in sizes.items()}
        try:
            config = GPTConfig(vocab_size=get_encoding(name).n_vocab, **sizes)
        except ValueError as error:
            raise InputError(str(error)) from error
        gpt = GPT(config, torch.Generator().manual_seed(s.seed), s.init_std or 0.02)
        return gpt, name, s.temperature or 1.0
    gpt, ckpt = load_gpt(s.init, "cpu", s.encoding, policy=s.stage != "reward", which=s.which)
    if ckpt.get("left_out"):
        say(f"{s.init}: {ckpt['left_out']} words beyond {ckpt['encoding']}'s left out")
    for name, value in {**sizes, "encoding": s.encoding}.items():
        has = ckpt["encoding"] if name == "encoding" else getattr(gpt.config, name)
        if value is not None and value != has:
            raise InputError(f"--{name} {value} disagrees with --init {s.init}, which has {has}")
    encoding = get_encoding(ckpt["encoding"])
    if encoding.n_vocab != gpt.config.vocab_size:
        raise InputError(
            f"--init {s.init} has a vocabulary of {gpt.config.vocab_size}, "
            f"its encoding {ckpt['encoding']} has {encoding.n_vocab}"
        )
    return gpt, ckpt["encoding"], s.temperature or ckpt["temperature"]


def read(s: Settings, policy: Policy, paths: list[str], spare: int = 0) -> Groups | None:
    """The files' groups, cut to `spare` tokens less than block_size."""
    if not paths:
        return None
    use = "prompt" if s.draws else "sft" if s.stage == "sft" else "preference"
    block_size = policy.gpt.config.block_size - spare
    groups, report = read_groups(paths, policy.encoding, block_size, use)
    say(f"{', '.join(map(str, paths))}: {report}")
    return groups


def make_stage(s: Settings, device: torch.device):
    """The stage, its files read. What only some stages need is imported only there."""
    stage = SFT if s.stage == "sft" else Preference
    if s.stage == "reward":
        from methods.reward import RewardStage as stage
    elif s.stage == "ppo":
        from methods.ppo import PPOStage as stage
    elif s.online:
        from methods.online import OnlineStage as stage
    policy, spare = make_policy(s, device), getattr(stage, "spare", 0)
    groups, held_out = (read(s, policy, paths, spare) for paths in (s.data, s.eval_data))
    return stage(s, policy, groups, held_out)


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

    def __init__(self, s: Settings, policy: Policy, groups: Groups, held_out: Groups | None):
        self.s, self.policy = s, policy.scoring(s)
        self.groups, self.held_out = groups, held_out
        self.epochs = Epochs(groups, s.batch_size, s.seed)
        self.ids, self.steps = self.epochs.batch, s.steps(self.epochs.n_batches)
        self.figures, self.heads = {}, {}

    def weigh(self, batch) -> int:
        return int(batch.lengths().sum())

    def loss(self, batch) -> tuple[Tensor, dict]:
        return -self.policy.module(batch).sum() / batch.lengths().sum(), {}

    def evaluate(self, step: int) -> dict:
        if self.held_out is None:
            return {}
        s, policy = self.s, self.policy
        logps = score(policy.module, self.held_out, s.at_once, policy.device, s.dtype)
        n_tokens = self.held_out.lengths()[self.held_out.is_completion()].sum()
        loss = -logps.sum().item() / int(n_tokens)
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}

    def state(self) -> dict:
        return {}

    def load_state(self, state: dict) -> None:
        """Nothing beside weights, optimizer and step."""


# ------------------------------------------------------------------------------
# EXO, DPO, and any other entry of exo.LOSSES


class Preference:
    """Groups with a target, the reference's log-probs beside them, and a loss."""

    def __init__(self, s: Settings, policy: Policy, groups: Groups, held_out: Groups | None):
        self.s, self.policy = s, policy.scoring(s)
        self.groups, self.held_out = groups, held_out
        self.loss_fn, self.figures, self.heads = exo.LOSSES[s.stage], {}, {}
        self.epochs = Epochs(groups, s.batch_size, s.seed)
        self.ids, self.steps = self.epochs.batch, s.steps(self.epochs.n_batches)
        self.reward, self.warned = None, False
        if s.reward:
            from methods.reward import load_reward

            self.reward = load_reward(s.reward, policy.device)
        for part in filter(None, (groups, held_out)):
            if s.needs.pairs and not part.is_pair().all():
                where = part.places[int(part.is_pair().argmin())]
                raise InputError(f"{where}: {s.stage} wants preference pairs, not rewards")
            set_targets(part, s.beta_r, s.label_smoothing)
            unknown = math.inf if s.needs.reference else 0.0
            part.ref_logps = np.full(len(part.ended), unknown)
        if not s.resume:
            self.ask_reference(policy.module)

    def ask_reference(self, scorer: torch.nn.Module) -> None:
        """Fill ref_logps of all groups that some step, or an evaluation, will read."""
        s, device = self.s, self.policy.device
        for part in filter(None, (self.groups, self.held_out)):
            ids = np.arange(len(part)) if part is self.held_out else self.epochs.first(self.steps)
            ids = ids[np.isposinf(part.ref_logps[part.first[ids] + 1])]
            if len(ids):
                segment, mask = part.grid(ids)
                logps = score(scorer, part, s.at_once, device, s.dtype, ids, "reference")
                part.ref_logps[segment[mask]] = logps.numpy()[segment[mask]]

    def weigh(self, batch) -> int:
        return len(batch.mask)

    def loss(self, batch) -> tuple[Tensor, dict]:
        logps = self.policy.module(batch).sum(-1)  # (B, K)
        loss = self.compare(logps, batch.ref_logps, batch.log_target, batch.mask, batch.lengths())
        ratio = logps.detach() - batch.ref_logps
        return loss, preference_figures(ratio, batch.log_target, batch.mask)

    def compare(self, logps, ref_logps, log_target, mask, scored) -> Tensor:
        more = {"lengths": scored} if self.s.needs.lengths else {}
        return self.loss_fn(logps, ref_logps, log_target, self.s.beta_pi, mask, **more)

    def evaluate(self, step: int) -> dict:
        s, result = self.s, {} if self.held_out is None else self.measure(self.held_out)
        if s.kl_samples:
            from methods.online import drawn_figures

            rows = self.groups if self.held_out is None else self.held_out
            ref = self.policy.reference()
            result |= drawn_figures(self.policy, s, ref, rows, self.reward, step)
        if result.get("chosen_logratio", 0) < -0.1 and not self.warned:
            self.warned = True
            say(
                f"warning: at step {step} the chosen completions are less likely than under the "
                f"reference (mean log-ratio {result['chosen_logratio']:.2f}): the margin grows "
                "because the rejected fall faster; a larger --beta_pi or fewer steps keep them"
            )
        return result

    def measure(self, groups: Groups) -> dict:
        """The loss and what explains it, over held-out groups."""
        s, policy = self.s, self.policy
        segment, mask = map(torch.from_numpy, groups.grid(np.arange(len(groups))))
        logps = score(policy.module, groups, s.at_once, policy.device, s.dtype)[segment]
        ref, target = (torch.from_numpy(x)[segment] for x in (groups.ref_logps, groups.log_target))
        length = torch.from_numpy(groups.lengths())[segment] * mask
        loss = self.compare(logps, ref, target, mask, length)
        figures = preference_figures(logps - ref, target, mask)
        result = {"loss": loss, "accuracy": exo.accuracy(logps - ref, target, mask)}
        gap = figures["chosen_logratio"] - figures["rejected_logratio"]
        result["margin"] = s.beta_pi * gap
        for name, k in zip(("chosen", "rejected"), best_and_worst(target, mask), strict=True):
            result[f"{name}_logps"] = logps.gather(1, k).mean()
            result[f"{name}_logratio"] = figures[f"{name}_logratio"]
            result[f"{name}_length"] = length.gather(1, k).double().mean()
        return {name: x.item() for name, x in result.items()}

    def state(self) -> dict:
        parts = {"ref_logps": self.groups, "held_out_ref_logps": self.held_out}
        return {k: torch.from_numpy(part.ref_logps) for k, part in parts.items() if part}

    def load_state(self, state: dict) -> None:
        self.groups.ref_logps = state["ref_logps"].numpy().copy()
        if self.held_out:
            self.held_out.ref_logps = state["held_out_ref_logps"].numpy().copy()
        self.ask_reference(self.policy.reference())  # of rows that a longer run will read


def preference_figures(ratio: Tensor, log_target: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Means over groups, so that micro-batches add up. ratio: (B, K) log pi - log sft. Accuracy is
    of the best completion against the worst; a tie is half, and so is what may be rounding: before
    the first step all are ties, whichever batch they were computed in."""
    chosen, rejected = (ratio.gather(1, k)[:, 0] for k in best_and_worst(log_target, mask))
    gap = chosen - rejected
    right = (gap > 1e-4).to(ratio) + (gap.abs() <= 1e-4).to(ratio) / 2
    figures = {"accuracy": right, "chosen_logratio": chosen, "rejected_logratio": rejected}
    return {name: x.mean() for name, x in figures.items()}


def best_and_worst(log_target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 1) each: which of the present completions has the highest target, and which the
    lowest."""
    best = log_target.masked_fill(~mask, -torch.inf).argmax(-1, keepdim=True)
    return best, log_target.masked_fill(~mask, torch.inf).argmin(-1, keepdim=True)


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
        in_first(self.open, Path(s.out) / "metrics.jsonl", step)
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
        groups, tokens = (x / seconds for x in all_sum(*self.work))
        self.start_clock()
        rates = {"tokens_per_s": tokens, "groups_per_s": groups}
        return rates | {"peak_gb": peak_gb(self.device)}

    def write(self, kind: str, step: int, figures: dict) -> None:
        names = SHOWN[kind]
        self.shown |= {names[k]: v for k, v in figures.items() if k in names}
        in_first(self.append, {"step": step, "kind": kind, **figures})

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


class Diverged(InputError):
    """A loss or gradient that is no number: what stands in the checkpoint is better."""


def fit(s: Settings, stage) -> int:
    """Train: the one loop of every stage. Returns the exit status."""
    steps, out = stage.steps, Path(s.out)
    peak = s.learning_rate or (5e-5 if s.init else 1e-3)
    optimizer = adamw(stage.policy.scorer, s, peak)
    state = resume(s, stage, optimizer) if s.resume else dict(NEW)
    in_first(open_run, out, plain(s))
    log = Log(s, stage.policy.device, state["step"], steps)
    with Stop() as stop, rescue(s, stage, optimizer, state), log.bar:
        while True:
            step = state["step"]
            due = step % s.eval_interval == 0 or step == steps
            if due and step > state["evaluated"]:
                evaluate(s, stage, optimizer, state, log)
            if step == steps or any(gather(stop.signal)):
                break
            rate = peak * schedule(s, step, steps)
            loss, norm, work, figures = update(s, stage, optimizer, stage.ids(step), rate)
            log.work += work
            state["step"] = step = step + 1
            if step % s.log_interval == 0 or step == steps:
                loss, *sums = all_sum(loss.item(), *(x.item() for x in figures.values()))
                record = {"loss": loss, "lr": rate, "grad_norm": norm, **log.rates()}
                record |= dict(zip(figures, sums, strict=True)) | stage.figures
                log.write("train", step, record)
            log.advance()
    if number := next(filter(None, gather(stop.signal)), None):
        save(s, stage, optimizer, state, False)
        said = f"stopped at step {state['step']} of {steps}; the same command with --resume goes on"
        say(said, sys.stderr)
        return 128 + number
    say(f"{out}: {steps} steps; last evaluation {json.dumps(log.shown)}")
    return 0


NEW = {"step": 0, "evaluated": -1, "best": math.inf}  # of a run, beside weights and optimizer


def evaluate(s: Settings, stage, optimizer, state: dict, log: Log) -> None:
    """Measure, write it down and only then save: a run killed in between measures again."""
    metrics = stage.evaluate(state["step"])
    loss = metrics.get("loss", math.inf)
    if math.isnan(loss):
        raise Diverged("the held-out loss is no number")
    log.write("eval", state["step"], metrics)
    better = loss < state["best"]
    state |= {"evaluated": state["step"], "best": min(state["best"], loss)}
    save(s, stage, optimizer, state, better)
    log.start_clock()


def update(s: Settings, stage, optimizer, ids: np.ndarray, rate: float):
    """One optimizer step on the groups `ids`: (loss, gradient norm, what was done: groups and
    tokens, more figures); with several processes all but the norm are this one's share.

    Each process takes every world()-th group. Wrappers average gradients over processes, and want
    as many passes in each; so losses are scaled to give a mean over all that `ids` hold, and a
    process whose groups are used up takes part with weight 0.
    """
    policy = stage.policy
    mine, share = ids[rank() :: world()], math.ceil(len(ids) / world())
    size = s.micro_batch_size or share
    micro = [mine[i : i + size] for i in range(0, share, size)]
    round_to = rounding(policy.device)
    micro = [collate(stage.groups, m if len(m) else ids[:1], round_to) for m in micro]
    weights = [stage.weigh(batch) for batch in micro]
    if share > len(mine) and (share - 1) % size == 0:
        weights[-1] = 0
    (whole,) = all_sum(sum(weights))
    loss, sums = 0.0, {}
    for i, (batch, weight) in enumerate(zip(micro, weights, strict=True)):
        with accumulating(policy.module, last=i == len(micro) - 1):
            with autocast(s.dtype, policy.device):
                part, figures = stage.loss(move(batch, policy))
            part = part * (weight / whole)
            (part * world()).backward()
        loss = loss + part.detach()
        sums = {k: sums.get(k, 0.0) + x * (weight / whole) for k, x in figures.items()}
    norm = torch.nn.utils.clip_grad_norm_(policy.scorer.parameters(), s.grad_clip or math.inf)
    norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
    if not math.isfinite(norm):
        raise Diverged(f"the gradient is no number for the rows {rows_of(stage.groups, ids)}")
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, norm, (len(mine), sum(b.n_tokens() for b in micro)), sums


def move(batch, policy: Policy):
    """To the device; to a GPU from pinned memory, so that the copy waits for no kernel."""
    dtype = policy.gpt.wte.weight.dtype
    if policy.device.type != "cuda":
        return batch.to(policy.device, dtype)
    return type(batch)(*(x.pin_memory() for x in batch)).to(policy.device, dtype, non_blocking=True)


def rows_of(groups: Groups, ids: np.ndarray, at_most: int = 8) -> str:
    """Where these groups come from."""
    if not any(groups.places):
        return "drawn in this round"
    shown = [groups.places[g] for g in ids[:at_most]]
    return ", ".join(shown) + (f" and {len(ids) - at_most} more" if len(ids) > at_most else "")


# ------------------------------------------------------------------------------
# Saving and going on


def save(s: Settings, stage, optimizer, state: dict, better: bool) -> None:
    policy = stage.policy
    weights = {
        "model": weights_to_save(policy.gpt),
        "config": dataclasses.asdict(policy.gpt.config),
        "encoding": policy.encoding_name,
        "temperature": policy.temperature,
        "stage": s.stage,
        **{name: weights_to_save(head) for name, head in stage.heads.items()},
    }
    rest = state | {
        "optimizer": optimizer_to_save(policy.scorer, optimizer),
        "task": stage.state(),
        "sft": policy.fingerprint(),
    }
    in_first(save_run, Path(s.out), weights, rest, better)


def resume(s: Settings, stage, optimizer) -> dict:
    """Loads the run in --out; returns its state, as NEW has it."""
    ckpt, policy = load_run(Path(s.out), plain(s)), stage.policy
    if not math.isclose(ckpt["sft"], policy.fingerprint(), rel_tol=1e-9):
        raise InputError(f"--resume: --init {s.init} is another model than when the run began")
    load_weights(policy.gpt, ckpt["model"])
    for name, head in stage.heads.items():
        load_weights(head, ckpt[name])
    load_optimizer(policy.scorer, optimizer, ckpt["optimizer"])
    stage.load_state(ckpt["task"])
    return {k: ckpt[k] for k in NEW}


@contextlib.contextmanager
def rescue(s: Settings, stage, optimizer, state: dict):
    """A user's reward function may break a run at any round: what was learned is saved first. Where
    the run itself broke, the last checkpoint is kept."""
    try:
        yield
    except Diverged as error:
        kept = f"; {s.out} keeps the checkpoint of step {state['evaluated']}"
        raise InputError(f"step {state['step']}: {error}{kept}") from error
    except InputError as error:
        if not state["step"]:
            raise
        save(s, stage, optimizer, state, False)
        raise InputError(
            f"{error}; stopped at step {state['step']}, the same command with --resume goes on"
        ) from error


def main(argv: list[str] | None = None) -> int:
    s = parse(sys.argv[1:] if argv is None else argv)
    if s.threads:
        torch.set_num_threads(s.threads)
    try:
        if s.stage == "toy":
            from experiments.toy.main import run

            if os.environ.get("WORLD_SIZE", "1") != "1":
                raise InputError("toy runs in one process: start it without torchrun")
            make_folder(Path(s.out))
            run(s.out, s.seeds, s.sweep)
            return 0
        check_free(Path(s.out), s.resume, s.overwrite)
        if s.fsdp and "RANK" not in os.environ:
            raise InputError("--fsdp needs several processes: torchrun --nproc_per_node=N train.py")
        with processes(s.device) as device:
            set_precision(s.dtype, device)
            return fit(s, make_stage(s, device))
    except KeyboardInterrupt:  # the toy, before the first step, or a second Ctrl-C
        say("train.py: stopped before it could save", sys.stderr)
        return 130
    except InputError as error:
        complain("train.py", error)
        return 2


if __name__ == "__main__":
    run_program(main)
