"""
Text from a checkpoint: prompts in, n completions of each out.

    python sample.py out/exo --prompt "How do I boil an egg?" -n 3
    python sample.py out/exo --prompts rows.jsonl -n 8 --out samples.jsonl

--prompts takes every row format of data.py and reads only the prompts. Without a prompt the text
starts at [end of text]. Draws depend on --seed and on a prompt's place among the prompts, never on
its batch mates: --batch_size changes speed and nothing else.
"""

import argparse
import json
import sys
from pathlib import Path


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="run folder or .pt file")
    parser.add_argument("--prompt", help="one prompt")
    parser.add_argument("--prompts", metavar="FILE", help="a file of rows with prompts")
    parser.add_argument("-n", type=int, default=1, help="completions of each prompt")
    parser.add_argument(
        "--out", metavar="FILE", help="write rows {prompt, completions} as JSONL here"
    )
    parser.add_argument("--max_new_tokens", type=int, default=128, help="longest completion")
    parser.add_argument("--temperature", type=float, help="0: likeliest token (the checkpoint's)")
    parser.add_argument("--top_k", type=int, help="draw from the k likeliest tokens only")
    parser.add_argument("--batch_size", type=int, default=32, help="prompts at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cuda, mps or cpu (the first there is)")
    args = parser.parse_args(argv)
    if args.prompt is not None and args.prompts:
        parser.error("give --prompt or --prompts, not both")
    for name in ("n", "max_new_tokens", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"{name} must be at least 1")
    return args


if __name__ == "__main__":
    parse(sys.argv[1:])  # --help and mistakes are answered before the slow imports

# ruff: noqa: E402
import torch
from tqdm import tqdm

from data import InputError, Report, get_encoding, read_files
from train import load_gpt, pick_device, replacing


def read_prompts(args: argparse.Namespace) -> list[str]:
    if args.prompts is None:
        return [args.prompt or ""]
    report = Report()
    prompts = [row.prompt for _, row in read_files([args.prompts], "prompt", report)]
    print(f"{args.prompts}: {report}", file=sys.stderr)
    return prompts


def sample(args: argparse.Namespace):
    """Yields (prompt, its n completions) as text, batch by batch."""
    gpt, ckpt = load_gpt(args.checkpoint, pick_device(args.device))
    encoding = get_encoding(ckpt["encoding"])
    room = gpt.config.block_size - args.max_new_tokens
    if room < 1:
        raise InputError(
            f"--max_new_tokens {args.max_new_tokens} leaves no room for a prompt: "
            f"block_size is {gpt.config.block_size}"
        )
    prompts = read_prompts(args)
    ids = [i or [encoding.eot_token] for i in encoding.encode_ordinary_batch(prompts)]
    cut = sum(len(i) > room for i in ids)
    if cut:
        print(f"{cut} prompts cut from the left to {room} tokens", file=sys.stderr)
    temperature = ckpt["temperature"] if args.temperature is None else args.temperature
    generator = torch.Generator().manual_seed(args.seed)
    starts = range(0, len(ids), args.batch_size)
    for start in tqdm(starts, "sampling", disable=len(starts) == 1):
        chunk = [i[-room:] for i in ids[start : start + args.batch_size]]
        try:
            drawn = gpt.generate(
                *(chunk, args.max_new_tokens, args.n, temperature, args.top_k),
                *(encoding.eot_token, generator),
            )
        except ValueError as error:  # a bad temperature or top_k
            raise InputError(str(error)) from error
        texts = [encoding.decode(y[:-1] if y[-1] == encoding.eot_token else y) for y in drawn]
        for i in range(len(chunk)):
            yield prompts[start + i], texts[i * args.n : (i + 1) * args.n]


def main(argv: list[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    try:
        if args.out is None:
            for prompt, completions in sample(args):
                for text in completions:
                    print(f"{prompt}\033[1m{text}\033[0m" if sys.stdout.isatty() else prompt + text)
                    print("-" * 80)
        else:
            with (
                replacing(Path(args.out)) as temporary,
                open(temporary, "w", encoding="utf-8") as f,
            ):
                for prompt, completions in sample(args):
                    f.write(json.dumps({"prompt": prompt, "completions": completions}) + "\n")
    except InputError as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
