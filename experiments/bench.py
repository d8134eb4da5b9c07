"""
How fast this project is: beside what a user would pick instead, and beside the machine's limits.

    python -m experiments.bench [--peers PYTHON]      a table, and a file of results under --out

    train   groups/s of an optimizer step of EXO. compiled: ours with --compile. naive: a padded row
            per completion, logits everywhere, a reference forward pass in each step. trl: TRL's
            DPOTrainer, exo_pair (K = 2); trl_precomputed: with stored reference log-probs.
    sample  tokens/s of 112 tokens a prompt, temperature 1, no top-k. hf: transformers, in dtype.
    load    groups/s of reading, checking and encoding 100,000 pairs.

Each contestant has a process of its own; figures are medians over laps. limit_share: our necessary
matmul FLOPs (each prompt once per group, only scored tokens through the head, training 3 times the
forward pass) beside the rate of a large matmul. copy_share: a sample's weights, once a token,
or AdamW's 28 bytes a weight, beside that of a large copy. start_s: until the first lap. peak_gb: of
a process, or of a GPU's tensors. busy: others used the cores, do not trust it. Wants Linux.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

import train
from data import Builder, Report, epoch_batches, get_encoding, read_groups
from exo import exo_loss, preference_target, reward_target
from experiments.peers import BETA, EPS, NEW_TOKENS, RATE, SIZES, Cell
from infra.parallel import Parser, autocast, set_precision
from infra.rows import write_json
from model import GPT, GPTConfig

ROOT = Path(__file__).resolve().parents[1]
PEERS = {"train": ("trl", "trl_precomputed"), "sample": ("hf",), "load": ()}
DTYPES = ("float32", "bfloat16")


def cells(args) -> list[Cell]:
    """What is measured, in this order."""
    work, sizes = 16, ("small", "head")  # completions in a training step
    found = [Cell("train", size, *text) for size in sizes for text in ((64, 2), (256, 8))]
    found += [Cell("train", "gpt2", 64, 2, dtype=dtype) for dtype in DTYPES]
    found += [Cell("sample", size, 16, 1, 32) for size in sizes]
    if args.device == "cuda":
        work, sizes = 64, [(size, d) for size in ("gpt2", "gpt2-medium") for d in DTYPES]
        texts = [(prompt, K) for prompt in (64, 256, 512) for K in (2, 8)]
        found = [Cell("train", size, *text, dtype=d) for size, d in sizes for text in texts]
        found += [Cell("sample", size, 16, 1, n, d) for size, d in sizes for n in (1, 32, 256)]
    for axis in ("size", "prompt", "K", "threads", "dtype"):
        if values := getattr(args, axis):
            found = [c._replace(**{axis: value}) for c in found for value in values]
    found = [c if c.batch else c._replace(batch=max(work // c.K, 1)) for c in found]
    found = [*dict.fromkeys(found), Cell("load", "gpt2", 256, 2, 100_000)]
    box = {"device": args.device, "laps": args.laps, "seconds": args.seconds}
    return [c._replace(**box) for c in found if c.what in (args.only or PEERS)]


def make_gpt(c: Cell) -> GPT:
    set_precision(c.dtype, torch.device(c.device))
    return GPT(GPTConfig(**SIZES[c.size]), torch.Generator().manual_seed(0)).to(c.device)


def ours_train(c: Cell) -> dict:
    gpt, texts, encoding = make_gpt(c), [*c.groups(c.laps * c.batch)], get_encoding("bytes")
    builder = Builder(gpt.config.block_size, encoding.eot_token, Report())
    for group in texts:
        prompt, *completions = ([*text.encode()] for text in group)
        builder.add(prompt, completions, None if c.K == 2 else [-k for k in range(c.K)], False)
    s = train.Settings("exo", data=["-"], init="-", beta_pi=BETA, dtype=c.dtype, compile=c.compile)
    policy = train.Policy(gpt, "bytes", encoding, 1.0, torch.device(c.device))
    stage = train.Preference(s, policy, builder.groups(), None)
    optimizer = train.adamw(gpt, s, RATE)
    batches = epoch_batches(stage.groups, c.batch, 0, 0)
    flops = [3 * sum(forward_flops(c.size, *map(len, texts[g])) for g in ids) for ids in batches]
    result = c.measure(lambda i: train.update(s, stage, optimizer, batches[i], RATE)[0]["loss"])
    return beside_limits(c, result, flops, 28 * sum(p.numel() for p in gpt.parameters()))


def naive_train(c: Cell) -> dict:
    """EXO as one writes it first: a padded row per completion, logits everywhere, two models."""
    gpt, ref = make_gpt(c), make_gpt(c).requires_grad_(False)
    groups = [*c.groups(c.laps * c.batch)]
    optimizer = torch.optim.AdamW(gpt.parameters(), RATE, (0.9, 0.99), weight_decay=0, fused=True)
    target = preference_target(EPS) if c.K == 2 else reward_target(-torch.arange(0.0, c.K)[None])

    def logps(model: GPT, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with autocast(c.dtype, idx.device):
            logits = model(idx.clamp(min=0))[:, :-1].flatten(0, 1).float()
        nll = F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="none")
        return -nll.view(c.batch, c.K, -1).sum(-1)

    def step(i: int) -> torch.Tensor:
        batch = groups[i * c.batch : (i + 1) * c.batch]
        texts = [torch.tensor([*(x + y).encode()]) for x, *ys in batch for y in ys]
        idx = torch.nn.utils.rnn.pad_sequence(texts, True, padding_value=-1).to(c.device)
        targets = idx[:, 1:].clone()
        targets[:, : c.prompt - 1] = -1  # only completions are scored
        with torch.no_grad():
            ref_logps = logps(ref, idx, targets)
        loss = exo_loss(logps(gpt, idx, targets), ref_logps, target, BETA)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return c.measure(step)


def ours_sample(c: Cell) -> dict:
    gpt, prompts = make_gpt(c).eval(), torch.randint(2, 256, (c.batch, c.prompt)).tolist()
    cast = autocast(c.dtype, torch.device(c.device))
    flops = c.batch * forward_flops(c.size, c.prompt, *[NEW_TOKENS] * c.K)
    weights = getattr(torch, c.dtype).itemsize * sum(p.numel() for p in gpt.parameters())
    result = c.measure(cast(lambda i: gpt.generate(prompts, NEW_TOKENS, c.K)))
    return beside_limits(c, result, [flops] * c.laps, weights * NEW_TOKENS)


def ours_load(c: Cell) -> dict:
    with open("pairs.jsonl", "w") as file:
        file.writelines(json.dumps(pair) + "\n" for pair in c.pairs(c.batch))
    return c.measure(lambda i: read_groups(["pairs.jsonl"], get_encoding(c.size), 1024))


def forward_flops(size: str, prompt: int, *completions: int) -> int:
    """Necessary matmul FLOPs of a group's forward pass, from the tokens of each of its texts."""
    L, C, V = (SIZES[size][name] for name in ("n_layer", "n_embd", "vocab_size"))
    P, scored = prompt - 1, sum(completions)  # a completion reads the prompt's last token
    seen = P * (P + 1) // 2 + sum(n * P + n * (n + 1) // 2 for n in completions)  # (query, key)
    token, pair = 24 * L * C**2, 4 * L * C  # qkv 6, projection 2, MLP 16; score and value's share
    return token * (P + scored) + pair * seen + 2 * C * V * scored


def beside_limits(c: Cell, result: dict, flops: list[int], moved: int) -> dict:
    """result, and what the median lap, FLOPs and moved bytes, reaches of the machine's rates."""
    n = 8192 if c.device == "cuda" else 2048
    a = torch.randn(n, n, device=c.device, dtype=getattr(torch, c.dtype))
    b = torch.zeros(2**28, device=c.device, dtype=torch.uint8)  # larger than any cache
    quick = c._replace(laps=10, seconds=5.0, compile=False)
    matmul = 2 * n**3 / median(quick.measure(lambda i: a @ a)["lap_s"])
    copy = b.nbytes / median(quick.measure(lambda i: b[: 2**27].copy_(b[2**27 :]))["lap_s"])
    reached = median(f / s for f, s in zip(flops, result["lap_s"], strict=False))
    result |= {"limit_share": reached / matmul, "matmul_gflops": matmul / 1e9}
    return result | {"copy_share": moved / median(result["lap_s"]) / copy, "copy_gb_s": copy / 1e9}


def others() -> float:
    """Core-seconds that other processes have used so far."""
    ticks = [int(x) for x in Path("/proc/stat").read_text().split()[1:9]]
    busy = sum(ticks) - ticks[3] - ticks[4]  # all but idle and iowait
    return busy / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


def run(c: Cell, who: str, python: str = sys.executable) -> dict:
    """What a contestant measured in a process and a folder of its own, or {"failed": why}."""
    file = "peers" if who in PEERS[c.what] else "bench"
    code = f"import json; from experiments.{file} import *; print(json.dumps({who}_{c.what}({c})))"
    env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(c.threads), "HF_HUB_OFFLINE": "1"}
    start, before = time.time(), others()
    with tempfile.TemporaryDirectory() as folder:
        command = {"args": [python, "-c", code], "cwd": folder, "env": os.environ | env}
        done = subprocess.run(**command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": (done.stderr.strip() or str(done.returncode)).splitlines()[-1]}
    result = json.loads(done.stdout.splitlines()[-1])
    busy = (others() - before) / (time.time() - start) > (os.cpu_count() or 1) - c.threads + 0.25
    return result | {"start_s": result.pop("start") - start, "busy": busy}


def measure_cell(c: Cell, args) -> dict:
    """A row of the results, printed as it comes."""
    found = {"ours": run(c, "ours")}
    if c.what == "train":
        found["naive"] = run(c, "naive")
        found |= {"compiled": run(c._replace(compile=True), "ours")} if args.compile else {}
    if args.peers and (c.K == 2 or c.what == "sample"):
        found |= {who: run(c, who, args.peers) for who in PEERS[c.what]}
    row = c._asdict() | {"limit_share": None, "naive": None, "peers": {}} | found["ours"]
    row["unit"] = "tokens/s" if c.what == "sample" else "groups/s"
    for who, result in found.items():
        figures = (f"{k} {v:.3g}" for k, v in result.items() if isinstance(v, float))
        print(*c[:7], who, *figures, result.get("failed") or "busy" * result["busy"], flush=True)
        (row["peers"] if who in PEERS[c.what] else row)[who] = result.get("figure")
    return row | {"contestants": found}


def main(argv: list[str] | None = None) -> None:
    parser = Parser("experiments.bench", __doc__)
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    add = parser.add_argument
    for name, choices in {"only": PEERS, "size": SIZES, "dtype": DTYPES}.items():
        add(f"--{name}", nargs="+", choices=choices, help="instead of the cells' own")
    for name in ("prompt", "K", "threads"):
        add(f"--{name}", nargs="+", type=int, metavar="N", help="instead of the cells' own")
    add("--device", choices=devices, default=devices[0])
    add("--compile", action="store_true", default="cuda" in devices)
    add("--laps", type=int, default=10)
    add("--seconds", type=float, default=40.0, help="no further lap after so many")
    add("--out", default="out/bench", help="folder of the results")
    add("--peers", metavar="PYTHON", help="a Python that has trl and transformers")
    args = parser.parse_args(argv)
    numbers = [args.laps, *(args.prompt or []), *(args.K or []), *(args.threads or [])]
    if min(numbers) < 1:
        parser.error(f"--prompt, --K, --threads and --laps start at 1, got {min(numbers)}")
    card = torch.cuda.get_device_name() if args.device == "cuda" else "results"
    path, rows = Path(args.out) / f"{card.replace(' ', '-')}.json", []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for c in cells(args):
            rows.append(measure_cell(c, args))
            write_json(path, {"rows": rows, "config": vars(args), "torch": torch.__version__})
    except OSError as error:  # no such --peers, no room on the disk
        parser.error(str(error))


if __name__ == "__main__":
    main()
