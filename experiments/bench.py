"""
How fast this project is: beside what a user would pick instead, and beside the machine's limit.

    python -m experiments.bench [--peers PYTHON]      a table, and results.json under --out

    train   groups/s of one optimizer step on groups of one prompt and K completions of 16 to 64
            tokens. ours: train.update, reference log-probs stored. naive: K concatenated rows
            padded to the longest, logits everywhere, a reference forward pass in each step. trl:
            TRL's DPOTrainer with loss_type="exo_pair" (K = 2); trl_precomputed: with stored
            reference log-probs. Everyone: EXO, AdamW, gradient clipping, no dropout.
    sample  tokens/s of 112 new tokens for each of 32 prompts of 16, temperature 1, no top-k. ours:
            GPT.generate. naive: recomputes the text for each token, as nanoGPT does. hf:
            transformers' generate with its KV cache.
    load    groups/s of reading, checking and encoding 100,000 preference pairs (JSONL). ours:
            data.read_groups. naive: a loop that encodes one text after the other. `size` is the
            encoding: gpt2, or bytes where gpt2's vocabulary cannot be had.

Read a row as: our figure; `limit`, the share of the rate of a large matmul, measured in the same
process, that our necessary matmul FLOPs reach (each prompt once per group, only scored tokens
through the head, no padding; in training 3 times the forward pass); then how many times as fast we
are as each other contestant. GB is a process's peak (Python and torch alone take 0.25). `busy`:
other processes kept the cores busy meanwhile, do not trust it. Two threads that share a core wait
for each other in every operation.

Each contestant of each cell has a process of its own. Figures are medians over laps, results.json
has them all. A contestant stops after --seconds, but not before 3 laps. The cells, with 2 threads:

    train     small and head: prompt 64, K 2, and prompt 256, K 8; gpt2: prompt 64, K 2, float32
              and bfloat16        (GPU: gpt2 and gpt2-xl, bfloat16, eight times the batch)
    sample    small and head      (GPU: gpt2 and gpt2-xl, bfloat16, batch 256)
    load      one
    scaling   seconds per group against K and against length, peak memory against the vocabulary

in about a quarter of an hour on 2 cores. --only keeps some of these kinds. --size, --prompt, --K,
--threads and --dtype keep the train and sample cells with these values, and copy the cells to a
value that none has: `--threads 1 2` measures every cell twice. --full starts from all combinations.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

import train
from experiments.contestants import CONTESTANTS, Cell
from experiments.peers import SIZES
from infra.rows import InputError, write_json

ROOT = Path(__file__).resolve().parents[1]
AXES = ("size", "prompt", "K", "threads", "dtype")

# ------------------------------------------------------------------------------
# Which cells


def cells(args: argparse.Namespace) -> list[Cell]:
    """The cells that the flags ask for, `scaling` aside."""
    cuda = torch.cuda.is_available()
    sizes, dtype = (("gpt2", "gpt2-xl"), "bfloat16") if cuda else (("small", "head"), "float32")
    workloads, more = [(64, 2), (256, 8)], 8 if cuda else 1
    found = [Cell("train", z, p, K, dtype=dtype) for z in sizes for p, K in workloads]
    found += [] if cuda else [Cell("train", "gpt2", dtype=d) for d in ("float32", "bfloat16")]
    found += [Cell("sample", z, 16, 1, dtype=dtype) for z in sizes]
    if args.full:
        sizes, dtypes = (sizes, [dtype]) if cuda else ((*sizes, "gpt2"), ["float32", "bfloat16"])
        grid = list(itertools.product(sizes, [2] if cuda else [1, 2], dtypes))
        work = itertools.product(grid, (64, 256), (2, 8))
        found = [Cell("train", z, p, K, t, d) for (z, t, d), p, K in work]
        found += [Cell("sample", z, 16, 1, t, d) for z, t, d in grid]
    found = narrowed([c for c in found if wanted(c.what, args)], args)
    sizes = {c: args.batch or more * (16 // c.K if c.what == "train" else 32) for c in found}
    found = [dataclasses.replace(c, batch=max(n, 1)) for c, n in sizes.items()]
    if wanted("load", args):
        found.append(Cell("load", encoding(), None, None, os.cpu_count() or 1, batch=100_000))
    box = {"laps": args.laps, "seconds": args.seconds, "compile": args.compile}
    return [dataclasses.replace(c, **box) for c in found]


def wanted(what: str, args) -> bool:
    """--only says so; without it, flags that fit only train and sample leave the others out."""
    fits = what in ("train", "sample") or not any(getattr(args, axis) for axis in AXES)
    return what in args.only if args.only else fits


def narrowed(found: list[Cell], args) -> list[Cell]:
    """Cells with a wanted value on each axis, and copies for the values that none has. Samples have
    one prompt length and no K."""
    for axis in AXES:
        values = getattr(args, axis) or []
        fixed = [c for c in found if not values or (c.what, axis) in FIXED]
        free = [c for c in found if c not in fixed]
        missing = [v for v in values if v not in {getattr(c, axis) for c in free}]
        kept = [c for c in free if getattr(c, axis) in values]
        copies = [dataclasses.replace(c, **{axis: v}) for v in missing for c in free]
        found = list(dict.fromkeys(kept + copies + fixed))
    return found


FIXED = {("sample", "prompt"), ("sample", "K")}


def scaling_cells(args) -> dict[str, list[Cell]]:
    """One thing grows, all else stays: `small`, 4 groups a step."""
    base = Cell("train", "small", batch=4, laps=args.laps, seconds=args.seconds)
    base = dataclasses.replace(base, threads=(args.threads or [base.threads])[0])
    lengths = [{"shortest": n, "longest": n} for n in (32, 64, 128, 256, 512)]
    return {
        "K": [dataclasses.replace(base, K=K) for K in (2, 4, 8, 16)],
        "longest": [dataclasses.replace(base, **both) for both in lengths],
        "vocab_size": [dataclasses.replace(base, vocab_size=V) for V in (512, 8192, 50257)],
    }


def encoding() -> str:
    """gpt2 if it loads, else bytes. Tried in another process, so that this one stays small."""
    code = "import data; data.get_encoding('gpt2')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    return "bytes" if done.returncode else "gpt2"


# ------------------------------------------------------------------------------
# Rows


def run(c: Cell, who: str, python: str = sys.executable) -> dict:
    """A contestant in a process of its own -> what it measured, or {"failed": why}.

    The peak memory of a process is never below its parent's, so this one loads nothing large.
    """
    ours = ["-m", "experiments.contestants"]
    command = ours if who in CONTESTANTS[c.what] else ["-B", str(ROOT / "experiments/peers.py")]
    done = subprocess.run(
        [python, *command, json.dumps(dataclasses.asdict(c) | {"who": who})],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": str(c.threads)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return {
            "failed": (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        }
    return json.loads(done.stdout.splitlines()[-1])


def measure(c: Cell, peers_python: str | None) -> dict:
    """A row of results.json."""
    trl = ["trl", "trl_precomputed"] if c.K == 2 else []
    found = {who: run(c, who) for who in CONTESTANTS[c.what]}
    if peers_python:
        for who in {"train": trl, "sample": ["hf"], "load": []}[c.what]:
            found[who] = run(c, who, peers_python)
    figure = {who: r.get("figure") for who, r in found.items()}
    row = {name: getattr(c, name) for name in ("what", *AXES, "batch")}
    row["unit"] = "tokens/s" if c.what == "sample" else "groups/s"
    row |= {"ours": figure.pop("ours"), "naive": figure.pop("naive"), "peers": figure}
    for name in ("limit_share", "peak_gb", "laps", "matmul_gflops"):
        row[name] = found["ours"].get(name)
    return row | {"contestants": found}


HEAD = "what    size    prompt  K thr  dtype    | ours | so many times as fast as the others"


def line(row: dict) -> str:
    """A row of the table."""
    place = [str(row[axis] or "-") for axis in AXES]
    parts = ["{:6}  {:7} {:>6} {:>2} {:>3}  {:8}".format(row["what"], *place)]
    spare = (os.cpu_count() or 1) - row["threads"]
    for who, r in row["contestants"].items():
        if "failed" in r:
            parts.append(f"{who} failed: {r['failed']}")
            continue
        part = f"{r['figure']:.4g} {row['unit']}"
        if who != "ours":
            part = f"{row['ours'] / r['figure']:.2f}x {who}" if row["ours"] else f"{part} {who}"
        if "limit_share" in r:
            part += f", limit {r['limit_share']:.0%}"
        part += f", {r['peak_gb']:.2f} GB, {r['laps']} laps"
        parts.append(part + ", busy" * (r["others"] > spare + 0.25))
    return " | ".join(parts)


def scaling(args) -> dict:
    """{axis: [{value, seconds per group, peaks}]}, printed as it comes."""
    table = {}
    for axis, row in scaling_cells(args).items():
        table[axis] = []
        for c in row:
            ours = run(c, "ours")
            naive = run(c, "naive") if axis == "vocab_size" else {}
            each = {axis: getattr(c, axis)}
            if "failed" not in ours:
                each |= {"seconds_per_group": 1 / ours["figure"], "peak_gb": ours["peak_gb"]}
            each |= {"naive_peak_gb": naive["peak_gb"]} if "peak_gb" in naive else {}
            shown = ", ".join(f"{name} {value:.4g}" for name, value in each.items())
            print(f"scaling {shown or ours['failed']}", flush=True)
            table[axis].append(each | {"ours": ours})
    return table


# ------------------------------------------------------------------------------
# The command


def parse(argv: list[str]) -> argparse.Namespace:
    parser = train.Parser(
        "experiments.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=[*CONTESTANTS, "scaling"])
    add("--size", nargs="+", choices=SIZES)
    for name in ("prompt", "K", "threads"):
        add(f"--{name}", nargs="+", type=int, metavar="N")
    add("--dtype", nargs="+", choices=["float32", "bfloat16"])
    add("--full", action="store_true", help="all combinations: hours")
    add("--batch", type=int, help="groups a step or prompts (16 / K and 32; on a GPU 8 times that)")
    add("--laps", type=int, default=Cell.laps)
    add("--seconds", type=float, default=Cell.seconds, help="time box of a contestant's laps")
    add("--compile", action="store_true", help="torch.compile our training step")
    add("--out", default="out/bench", help="folder of results.json")
    add("--peers", metavar="PYTHON", help="a Python that has trl and transformers")
    args = parser.parse_args(argv)
    for name, least in {"K": 2, "prompt": 2, "threads": 1, "laps": 1, "batch": 1}.items():
        given = getattr(args, name)
        values = given if isinstance(given, list) else [] if given is None else [given]
        if min(values, default=least) < least:
            parser.error(f"--{name} must be at least {least}, got {min(values)}")
    return args


def find_peers(given: str | None) -> str | None:
    """A Python with trl and transformers: the given one, or this one. None, and a line, if none."""
    test = "from importlib.util import find_spec as f; exit(not (f('trl') and f('transformers')))"
    with contextlib.suppress(OSError):
        if subprocess.run([given or sys.executable, "-c", test], check=False).returncode == 0:
            return given or sys.executable
    if given:
        raise InputError(f"--peers {given}: not a Python that has trl and transformers")
    print(
        "no peers: `pip install trl transformers` into another environment, give its --peers PYTHON"
    )
    return None


def report(args, rows: list[dict], grown: dict) -> dict:
    """results.json: with versions (the peers' too) and the machine."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for r in (r for row in rows for r in row["contestants"].values()):
        versions |= {f"peers' {k}": v for k, v in r.get("versions", {}).items()}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "gpu": gpu}
    config = {k: v for k, v in vars(args).items() if k not in ("peers", "out")} | machine
    return {
        "rows": rows,
        "scaling": grown,
        "versions": versions,
        "config": config | {"sizes": SIZES},
    }


def main(argv: list[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    path, rows = Path(args.out) / "results.json", []
    try:
        python = find_peers(args.peers)
        path.parent.mkdir(parents=True, exist_ok=True)
        print(HEAD)
        for c in cells(args):
            rows.append(measure(c, python))
            print(line(rows[-1]), flush=True)
            write_json(path, report(args, rows, {}))  # a stopped run keeps what it has
        grown = scaling(args) if wanted("scaling", args) else {}
        write_json(path, report(args, rows, grown))
    except (InputError, OSError) as error:
        print(f"experiments.bench: {error}", file=sys.stderr)
        return 2
    print(f"{path}: {len(rows)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
