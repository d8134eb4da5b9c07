"""
What bench.py measures: our code and its naive twin, for training, sampling and loading, and the
limit that the machine sets them. The other libraries are in peers.py.

    python -m experiments.contestants '{"who": "naive", "what": "train", ...}'    one JSON line

A naive twin is the same work on the same model as one writes it first. It must give the same losses
and the same greedy text (tests/test_bench.py), or beating it would mean nothing.

Simplifications: weights and tokens are random; FLOPs of lookups and elementwise work do not count.
"""

import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import exo
import train
from data import (
    Builder,
    Groups,
    Report,
    collate,
    epoch_batches,
    get_encoding,
    read_groups,
    set_targets,
)
from experiments import peers
from experiments.peers import NEW_TOKENS
from infra.parallel import autocast, pick_device
from model import GPT, GPTConfig, Tree


@dataclass(frozen=True)
class Cell:
    """One line of the table: a workload and a machine setting."""

    what: str
    size: str
    prompt: int | None = 64
    K: int | None = 2
    threads: int = min(2, os.cpu_count() or 1)
    dtype: str = "float32"
    batch: int = 8  # groups a step; prompts of a sample; rows to load
    shortest: int = 16  # completion tokens
    longest: int = 64
    vocab_size: int | None = None  # instead of the size's own
    laps: int = 10
    seconds: float = 40.0
    compile: bool = False


# ------------------------------------------------------------------------------
# Training


def make_stage(gpt: GPT, groups: Groups, s: train.Settings, device: torch.device):
    """train.Preference without its files."""
    policy = train.Policy(gpt, "bytes", get_encoding("bytes"), 1.0, device)
    return train.Preference(s, policy, groups, None)


def train_setup(c: Cell) -> tuple[GPT, Groups, train.Settings, torch.device]:
    s = train.Settings(
        "exo", data=["-"], init="-", beta_pi=peers.BETA, label_smoothing=peers.EPS,
        batch_size=c.batch, dtype=c.dtype, compile=c.compile,
    )  # fmt: skip
    device = pick_device(None)
    builder = Builder(c.prompt + c.longest, 0, Report())
    for prompt, completions, rewards in peers.make_rows(c):
        builder.add(prompt, completions, rewards, ended=False)
    return make_gpt(c, c.prompt + c.longest, device), builder.groups(), s, device


def make_gpt(c: Cell, block_size: int, device) -> GPT:
    config = GPTConfig(block_size=block_size, **peers.shape(c))
    return GPT(config, torch.Generator().manual_seed(0)).to(device)


def train_ours(c: Cell) -> dict:
    gpt, groups, s, device = train_setup(c)
    stage, optimizer = make_stage(gpt, groups, s, device), train.adamw(gpt, s, peers.RATE)
    batches = epoch_batches(groups, c.batch, 0, 0)

    def step(i: int):
        return train.update(s, stage, optimizer, batches[i], peers.RATE)[0]

    loss = step(0).item()
    for i in range(1, len(batches) if c.compile else 0):
        step(i)  # every shape compiles once
    result = timed(c, step, c.batch, device) | {"first_loss": loss}
    flops = [train_flops(gpt.config, collate(groups, ids)) for ids in batches]
    return result | limit(result["lap_s"], flops, c, device)


def train_naive(c: Cell) -> dict:
    gpt, groups, s, device = train_setup(c)
    ref = make_gpt(c, c.prompt + c.longest, device).requires_grad_(False)
    optimizer = train.adamw(gpt, s, peers.RATE)
    set_targets(groups, s.beta_r, s.label_smoothing)
    log_target = torch.from_numpy(groups.log_target).to(device)

    def step(i: int):
        loss = naive_loss(gpt, ref, groups, range(i * c.batch, (i + 1) * c.batch), log_target, s)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), s.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    loss = step(0).item()
    return timed(c, step, c.batch, device) | {"first_loss": loss}


def naive_loss(gpt: GPT, ref: GPT, groups: Groups, ids, log_target, s):
    """EXO as one writes it first: a padded row per completion, logits everywhere, two models."""
    device = log_target.device
    rows = [(groups.prompt(g), y) for g in ids for y in groups.completions(g)]
    idx = torch.zeros(len(rows), max(len(x) + len(y) for x, y in rows), dtype=torch.long)
    scored = torch.zeros(idx.shape, dtype=torch.bool)
    for i, (x, y) in enumerate(rows):
        idx[i, : len(x) + len(y)] = torch.tensor(x + y)
        scored[i, len(x) : len(x) + len(y)] = True
    idx, scored = idx.to(device), scored.to(device)

    def logps(model: GPT):
        with autocast(s.dtype, device):
            log_probs = F.log_softmax(model(idx)[:, :-1].float(), dim=-1)
        each = log_probs.gather(-1, idx[:, 1:, None])[..., 0] * scored[:, 1:]
        return each.sum(-1).view(len(ids), -1)

    with torch.no_grad():
        ref_logps = logps(ref)
    segment = groups.grid(np.array(ids))[0]
    return exo.LOSSES[s.stage](logps(gpt), ref_logps, log_target[segment], s.beta_pi)


# ------------------------------------------------------------------------------
# Sampling


def sample_setup(c: Cell):
    device = pick_device(None)
    gpt = make_gpt(c, c.prompt + NEW_TOKENS, device).eval()
    prompts = np.random.default_rng(1).integers(2, gpt.config.vocab_size, (c.batch, c.prompt))
    return gpt, prompts.tolist(), device


def sample_ours(c: Cell) -> dict:
    gpt, prompts, device = sample_setup(c)

    def sample(new: int) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=c.dtype == "bfloat16"):
            gpt.generate(prompts, new)

    sample(8)
    result = timed(c, lambda i: sample(NEW_TOKENS), c.batch * NEW_TOKENS, device)
    flops = sample_flops(gpt.config, c.batch, c.prompt)
    return result | limit(result["lap_s"], [flops] * c.laps, c, device)


def sample_naive(c: Cell) -> dict:
    gpt, prompts, device = sample_setup(c)
    idx = torch.tensor(prompts, device=device)

    def sample(new: int) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=c.dtype == "bfloat16"):
            naive_generate(gpt, idx, new)

    sample(8)
    return timed(c, lambda i: sample(NEW_TOKENS), c.batch * NEW_TOKENS, device)


@torch.no_grad()
def naive_generate(gpt: GPT, idx, new: int, temperature: float = 1.0):
    """idx (B, T) -> (B, T + new): each token from a forward pass over the whole text."""
    for _ in range(new):
        (B, T), last = idx.shape, slice(idx.size(1) - 1, None, idx.size(1))
        pos = torch.arange(T, device=idx.device).repeat(B)
        x = gpt.hidden(idx.flatten(), pos, Tree(gpt.config.n_head, [(B, T)]))
        logits = gpt.head(x[last])
        if temperature == 0:
            token = logits.argmax(-1, keepdim=True)
        else:
            token = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1)
        idx = torch.cat([idx, token], dim=1)
    return idx


# ------------------------------------------------------------------------------
# Loading

WORDS = """the of and to a in that is was he for it with as his on be at by I this had not are but
from or have an they which one you were her all she there would their we him been has when who will
more no if out so said what up its about into than them can only other new some could time these two
may then do first any my now such like our over man me even most made after also did many before
must through back years where much your way well down should because each just those people how too
little state good very make world still own see men work long get here between both life being under
never day same another know while last might us great old year off come since against go came right
used take three however, question. answer? actually, understanding information. state""".split()


def load_setup(c: Cell, folder: str):
    """A file of c.batch pairs as long as a dialogue's turns, of frequent words; the encoding."""
    words = " ".join(np.random.default_rng(1).choice(WORDS, 200_000).tolist())
    cuts = np.random.default_rng(2).integers(0, len(words) - 400, (c.batch, 3)).tolist()
    path = Path(folder) / "pairs.jsonl"
    with open(path, "w") as file:
        for i, (x, y, z) in enumerate(cuts):
            row = {"prompt": f"{i} " + words[x : x + 300], "chosen": words[y : y + 200]}
            file.write(json.dumps(row | {"rejected": words[z : z + 250]}) + "\n")
    return path, get_encoding(c.size)


def load_ours(c: Cell) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        path, encoding = load_setup(c, folder)
        return timed(c, lambda i: read_groups([path], encoding, 1024), c.batch, None)


def load_naive(c: Cell) -> dict:
    def read(path: Path, encoding) -> list:
        with open(path) as file:
            rows = [json.loads(line) for line in file]
        names = ("prompt", "chosen", "rejected")
        return [[torch.tensor(encoding.encode_ordinary(r[k])) for k in names] for r in rows]

    with tempfile.TemporaryDirectory() as folder:
        path, encoding = load_setup(c, folder)
        return timed(c, lambda i: read(path, encoding), c.batch, None)


# ------------------------------------------------------------------------------
# The limit


def forward_flops(config: GPTConfig, tokens: int, seen: int, scored: int) -> int:
    """Matmul FLOPs of a forward pass: `tokens` through the trunk, `seen` (query, key) pairs,
    `scored` tokens through the head."""
    trunk = 24 * config.n_layer * config.n_embd**2  # qkv 6, projection 2, MLP 16
    pair = 4 * config.n_layer * config.n_embd  # its score, and its value's share
    return trunk * tokens + pair * seen + 2 * config.n_embd * config.vocab_size * scored


def train_flops(config: GPTConfig, batch) -> int:
    """Of a step on this batch: the backward pass is twice the forward."""
    P, n = batch.prefix_len, batch.lengths()
    seen = (P * (P + 1) // 2).sum() + (n * P[:, None] + n * (n + 1) // 2).sum()
    tokens = (P.sum() + n.sum()).item()
    return 3 * forward_flops(config, tokens, seen.item(), n.sum().item())


def sample_flops(config: GPTConfig, batch: int, prompt: int, new: int = NEW_TOKENS) -> int:
    n = prompt + new - 1  # the last token drawn is not read
    return batch * forward_flops(config, n, n * (n + 1) // 2, new)


def limit(lap_s: list, flops: list, c: Cell, device: torch.device) -> dict:
    """The rate of a large square matmul, here and now, and the share of it that laps of so many
    FLOPs reach (the median lap)."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=getattr(torch, c.dtype))
    clock = peers.time_laps(lambda i: a @ a, max(c.laps, 3), c.seconds, waiter(device))
    rate = peers.summary(clock, 2 * n**3)["figure"]
    reached = np.median([f / t for f, t in zip(flops, lap_s, strict=False)])
    return {"limit_share": reached / rate, "matmul_gflops": rate / 1e9}


def waiter(device):
    cuda = device is not None and device.type == "cuda"
    return torch.cuda.synchronize if cuda else lambda: None


def timed(c: Cell, step, amount: float, device) -> dict:
    clock = peers.time_laps(step, c.laps, c.seconds, waiter(device))
    return peers.summary(clock, amount, peers.gpu_peak() if device is not None else None)


CONTESTANTS = {
    "train": {"ours": train_ours, "naive": train_naive},
    "sample": {"ours": sample_ours, "naive": sample_naive},
    "load": {"ours": load_ours, "naive": load_naive},
}


def main(job: str) -> None:
    fields = json.loads(job)
    who, c = fields.pop("who"), Cell(**fields)
    torch.set_num_threads(c.threads)
    print(json.dumps(CONTESTANTS[c.what][who](c)))


if __name__ == "__main__":
    main(sys.argv[1])
