"""
Text from a checkpoint: prompts in, n completions of each out.

    python sample.py out/exo --prompt "How do I boil an egg?" -n 3
    python sample.py out/exo --prompts rows.jsonl -n 8 --out samples.jsonl
    python sample.py out/exo --export out/exo_hf          (a folder that `transformers` loads)

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
    parser.add_argument("checkpoint", help="run folder, .pt file or Hugging Face GPT-2 folder")
    parser.add_argument("--encoding", help="of a Hugging Face folder that does not say (gpt2)")
    parser.add_argument(
        "--export", metavar="FOLDER", help="write a Hugging Face folder instead of sampling"
    )
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
    if args.export and (args.prompt is not None or args.prompts or args.out):
        parser.error("--export samples nothing: leave out --prompt, --prompts and --out")
    for name in ("n", "max_new_tokens", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"{name} must be at least 1")
    return args


if __name__ == "__main__":
    parse(sys.argv[1:])  # --help and mistakes are answered before the slow imports

# ruff: noqa: E402
import torch
from tqdm import tqdm

from data import InputError, Report, get_encoding, hugging_face_tokenizer, read_files
from train import load_gpt, pick_device, replacing, write_json


def read_prompts(args: argparse.Namespace) -> list[str]:
    if args.prompts is None:
        return [args.prompt or ""]
    report = Report()
    prompts = [row.prompt for _, row in read_files([args.prompts], "prompt", report)]
    print(f"{args.prompts}: {report}", file=sys.stderr)
    return prompts


def sample(args: argparse.Namespace):
    """Yields (prompt, its n completions) as text, batch by batch."""
    gpt, ckpt = load_gpt(args.checkpoint, pick_device(args.device), args.encoding)
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


def export(args: argparse.Namespace) -> None:
    """The checkpoint as a Hugging Face folder, with a tokenizer where transformers has its like.

    config.json keeps our encoding and temperature for a later --init; generation_config.json makes
    transformers' `generate` draw from the distribution that was trained.
    """
    gpt, ckpt = load_gpt(args.checkpoint, encoding=args.encoding)
    name, temperature, out = ckpt["encoding"], ckpt["temperature"], Path(args.export)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--export {out} is not an empty folder: give another")
    encoding = get_encoding(name)
    eot, files = encoding.eot_token, hugging_face_tokenizer(encoding, gpt.config.block_size)
    generation = {"do_sample": True, "temperature": temperature, "top_k": 0}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for file, text in (files or {}).items():
            with replacing(out / file) as temporary:
                temporary.write_text(text, encoding="utf-8")
        generation |= {"bos_token_id": eot, "eos_token_id": eot}
        write_json(out / "generation_config.json", generation)
        gpt.save_pretrained(out, eot, exo={"encoding": name, "temperature": temperature})
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}") from error
    print(f"{out}: GPT-2 of {sum(p.numel() for p in gpt.parameters()):,} parameters")
    if files is None:
        print(f"no tokenizer is written: transformers has none for the encoding {name}")


def main(argv: list[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    try:
        if args.export:
            export(args)
        elif args.out is None:
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
