"""
Text from a checkpoint: prompts in, n completions of each out.

    python sample.py out/exo --prompt "How do I boil an egg?" -n 3
    python sample.py out/sft --prompts rows.jsonl -n 8 --out samples.jsonl
    python sample.py out/sft --score samples.jsonl --reward out/reward --out scored.jsonl
    python train.py exo --data scored.jsonl --init out/sft
    python sample.py out/sft --prompts rows.jsonl --best_of 16 --reward out/reward --out best.jsonl
    python sample.py out/exo --export out/exo_hf          (a folder that `transformers` loads)

--prompts takes every row format of data.py and reads only the prompts. Without a prompt the text
starts at [end of text]. A draw depends on --seed and on its prompt's place among the prompts, never
on its batch mates: --batch_size changes speed and nothing else.

--out is written row by row. A stopped command, given again, goes on: it skips the rows whose prompt
(and, with --score, completions) the file has already. `torchrun` shares the prompts of a batch over
its processes.
"""

import argparse
import json
import sys
from pathlib import Path


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("checkpoint", help="run folder, .pt file or Hugging Face GPT-2 folder")
    add("--encoding", help="of a Hugging Face folder that does not say (gpt2)")
    add("--export", metavar="FOLDER", help="write a Hugging Face folder instead of sampling")
    add("--prompt", help="one prompt")
    add("--prompts", metavar="FILE", help="a file of rows with prompts")
    add("--score", metavar="FILE", help="rate the completions of these rows instead of sampling")
    add("--reward", metavar="SPEC", help="reward model's run folder, or module:function")
    add("-n", type=int, default=1, help="completions of each prompt")
    add("--best_of", type=int, metavar="N", help="each completion is the best of N by --reward")
    add("--out", metavar="FILE", help="write rows {prompt, completions, ...} as JSONL here")
    add("--overwrite", action="store_true", help="replace --out instead of going on with it")
    add("--max_new_tokens", type=int, default=128, help="longest completion")
    add("--temperature", type=float, help="0: likeliest token (the checkpoint's)")
    add("--top_k", type=int, help="draw from the k likeliest tokens only")
    add("--batch_size", type=int, default=32, help="prompts at once")
    add("--seed", type=int, default=0)
    add("--device", help="cuda, mps or cpu (the first there is)")
    add("--dtype", choices=["float32", "bfloat16"], help="bfloat16 on cuda, else float32")
    args = parser.parse_args(argv)
    for ok, sentence in rules(args):
        if not ok:
            parser.error(sentence)
    return args


def rules(args: argparse.Namespace):
    """(holds, what to say if not), one for each way in which arguments can contradict."""
    asked = args.prompt is not None or args.prompts
    yield not (args.prompt is not None and args.prompts), "give --prompt or --prompts, not both"
    sampling = asked or args.out or args.score
    ok = not (args.export and sampling)
    yield ok, "--export samples nothing: leave out --prompt, --prompts, --score and --out"
    yield not (args.score and asked), "--score brings its own prompts: leave out --prompt(s)"
    yield not (args.score and args.best_of), "--score draws nothing: leave out --best_of"
    yield not (args.score and args.temperature == 0), "--score needs a temperature above 0"
    yield not args.best_of or args.reward, "--best_of needs --reward to know the best"
    for name in ("prompts", "score"):
        given = getattr(args, name)
        same = given and args.out and Path(given).resolve() == Path(args.out).resolve()
        yield not same, f"--out is the file that --{name} reads: give another"
    t = args.temperature
    yield t is None or 0 <= t < float("inf"), f"temperature must be 0 or more, got {t}"
    yield args.seed >= 0, f"seed must not be negative, got {args.seed}"
    for name in ("n", "max_new_tokens", "batch_size", "best_of", "top_k"):
        value = getattr(args, name)
        yield value is None or value >= 1, f"{name} must be at least 1"


if __name__ == "__main__":
    parse(sys.argv[1:])  # --help and mistakes are answered before the slow imports

# ruff: noqa: E402
import os
from collections import Counter
from collections.abc import Callable

import numpy as np
import torch
from tqdm import tqdm

from data import (
    Builder,
    InputError,
    Report,
    Row,
    decode,
    get_encoding,
    hugging_face_tokenizer,
    read_files,
)
from model import Scorer
from train import (
    autocast,
    gather,
    leave,
    load_gpt,
    load_reward,
    make_folder,
    only_first,
    processes,
    rank,
    replacing,
    say,
    score,
    world,
    write_json,
)


class Sampler:
    """A checkpoint and a reward, and what they make of prompts: rows as dicts. (Some encodings have
    ids without a word, which a model may draw: they are left out of the text.)"""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.args, self.device, args.micro_batch_size = args, device, None  # as train.score asks
        self.gpt, ckpt = load_gpt(args.checkpoint, device, args.encoding)
        self.encoding = get_encoding(ckpt["encoding"])
        self.temperature = ckpt["temperature"] if args.temperature is None else args.temperature
        self.reward = load_reward(args.reward, device) if args.reward else None

    # sampling

    def room(self) -> int:
        """How long a prompt may be."""
        new, block = self.args.max_new_tokens, self.gpt.config.block_size
        if new >= block:
            raise InputError(
                f"--max_new_tokens {new} leaves no room for a prompt: block_size is {block}"
            )
        return block - new

    def tokens(self, prompt: str) -> list[int]:
        ids = self.encoding.encode_ordinary(prompt) or [self.encoding.eot_token]
        return ids[-self.room() :]

    def draw(self, prompts: list[tuple[int, str]], n: int) -> list[list[list[int]]]:
        """n completions of each (place, prompt), as token ids; processes share the prompts."""
        args, out = self.args, {}
        mine = prompts[rank() :: world()]
        if mine:
            try:
                with autocast(args, self.device):
                    ys = self.gpt.generate(
                        *([self.tokens(x) for _, x in mine], args.max_new_tokens, n),
                        *(self.temperature, args.top_k, self.encoding.eot_token),
                        uniform=torch.cat([self.uniform(place, n) for place, _ in mine]),
                    )
            except ValueError as error:  # a bad temperature or top_k
                raise InputError(str(error)) from error
            out = {place: ys[i * n : (i + 1) * n] for i, (place, _) in enumerate(mine)}
        drawn = dict(item for part in gather(out) for item in part.items())
        return [drawn[place] for place, _ in prompts]

    def uniform(self, place: int, n: int) -> torch.Tensor:
        seed = np.random.SeedSequence([self.args.seed, place]).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(seed))
        return torch.rand(n, self.args.max_new_tokens, generator=generator)

    def sample(self, prompts: list[tuple[int, str]]) -> list[dict]:
        """A row {prompt, completions, rewards (with --reward)} for each (place, prompt)."""
        each = self.args.best_of or 1
        drawn = self.draw(prompts, self.args.n * each)
        eot = self.encoding.eot_token
        ended = [[y[-1] == eot for y in ys] for ys in drawn]
        texts = [
            [decode(self.encoding, y[: len(y) - e]) for y, e in zip(ys, es, strict=True)]
            for ys, es in zip(drawn, ended, strict=True)
        ]
        rows = [{"prompt": x, "completions": ys} for (_, x), ys in zip(prompts, texts, strict=True)]
        return [best(row, each) for row in self.rate(rows, ended)] if self.reward else rows

    def rate(self, rows: list[dict], ended=None) -> list[dict]:
        """The rows with `rewards`."""
        flat = [(row["prompt"], y) for row in rows for y in row["completions"]]
        prompts, completions = map(list, zip(*flat, strict=True))
        ended = None if ended is None else [e for es in ended for e in es]
        rewards = iter(self.reward(prompts, completions, ended).tolist())
        return [row | {"rewards": [next(rewards) for _ in row["completions"]]} for row in rows]

    # scoring

    def score(self, rows: list[Row]) -> list[dict]:
        """The rows with `logps`, log pi of each completion (end of text included), and their
        rewards: those of --reward, or those they have. Long rows are cut as in training."""
        builder = Builder(self.gpt.config.block_size, self.encoding.eot_token, Report())
        for row in rows:
            prompt = self.encoding.encode_ordinary(row.prompt or "")
            for y in row.completions:
                builder.add(prompt, [self.encoding.encode_ordinary(y)])
        scorer, groups = Scorer(self.gpt, self.temperature), builder.groups()
        logps = iter(score(scorer, groups, self.args, self.device)[1::2].tolist())
        out = []
        for row in rows:
            ys = list(row.completions)
            own = [next(logps) for _ in ys]
            out.append({"prompt": row.prompt or "", "completions": ys, "logps": own})
            if row.rewards and not self.reward:
                out[-1]["rewards"] = list(row.rewards)
            elif row.kind == "pair" and not self.reward:  # stays a pair
                chosen, rejected = out[-1].pop("completions")
                out[-1] |= {"chosen": chosen, "rejected": rejected}
        return self.rate(out) if self.reward else out


def best(row: dict, of: int) -> dict:
    """Of every `of` completions of a row the one with the highest reward; of equals, the first."""
    rewards = row["rewards"]
    top = [max(range(i, i + of), key=rewards.__getitem__) for i in range(0, len(rewards), of)]
    return row | {name: [row[name][k] for k in top] for name in ("completions", "rewards")}


# ------------------------------------------------------------------------------
# Rows in, rows out


def read_prompts(args: argparse.Namespace) -> list[str]:
    if args.prompts is None:
        return [args.prompt or ""]
    report = Report()
    prompts = [row.prompt for _, row in read_files([args.prompts], "prompt", report)]
    say(f"{args.prompts}: {report}", sys.stderr)
    return prompts


def read_scored(args: argparse.Namespace) -> list[Row]:
    report = Report()
    rows = [row for _, row in read_files([args.score], "score", report)]
    say(f"{args.score}: {report}", sys.stderr)
    return rows


def key(prompt: str | None, completions: list) -> str:
    """What tells a row of --out from another one."""
    return json.dumps([prompt or "", *completions])


def texts_of(row: dict) -> list:
    return row["completions"] if "completions" in row else [row.get("chosen"), row.get("rejected")]


def already(args: argparse.Namespace) -> Counter:
    """How often --out has each prompt (row, for --score). A line that was cut off is removed, once
    all others have turned out to be rows of this command."""
    path, found = Path(args.out), Counter()
    content = b""
    if path.exists() and not args.overwrite:
        content = path.read_bytes()
        tail = content[content.rfind(b"\n") + 1 :]
        if tail:  # no line, unless only its end is missing
            content = content + b"\n" if is_json(tail) else content[: len(content) - len(tail)]
    for number, line in enumerate(content.splitlines(), 1):
        row = json.loads(line) if is_json(line) else None
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise InputError(f"{path}:{number}: --out holds other rows: --overwrite replaces them")
        texts = texts_of(row)
        if not isinstance(texts, list) or (not args.score and len(texts) != args.n):
            raise InputError(f"{path}:{number} has not {args.n} completions: --overwrite?")
        found[key(row["prompt"], texts if args.score else [])] += 1
    make_folder(path.parent)
    with replacing(path) as temporary:
        temporary.write_bytes(content)
    if found:
        say(f"{path}: {found.total()} rows are there already", sys.stderr)
    return found


def is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def read_work(args: argparse.Namespace, sampler: Sampler) -> tuple[list, list, Callable]:
    """(what to do, its keys, what does a batch of it)."""
    if args.score:
        rows = read_scored(args)
        return rows, [key(row.prompt, row.completions) for row in rows], sampler.score
    prompts = read_prompts(args)
    lengths = [len(sampler.encoding.encode_ordinary(prompt)) for prompt in prompts]
    cut = sum(n > sampler.room() for n in lengths)
    if cut:
        say(f"{cut} prompts cut from the left to {sampler.room()} tokens", sys.stderr)
    return list(enumerate(prompts)), [key(prompt, []) for prompt in prompts], sampler.sample


def finished(args: argparse.Namespace, todo: list, work: Callable):
    """Yields rows, batch by batch."""
    size = args.batch_size * world()
    starts = range(0, len(todo), size)
    for start in tqdm(starts, "rows", disable=len(starts) < 2 or rank() > 0):
        yield from work(todo[start : start + size])


def write(args: argparse.Namespace, device: torch.device) -> None:
    """Every row to --out as soon as it is there. All input is read before --out is touched."""
    if not args.out.endswith(".jsonl"):
        raise InputError(f"--out {args.out}: must end in .jsonl")
    todo, keys, work = read_work(args, Sampler(args, device))
    done, left = only_first(already, args), []
    for name, item in zip(keys, todo, strict=True):
        if done[name] > 0:
            done[name] -= 1
        else:
            left.append(item)
    for row in finished(args, left, work):
        only_first(append, Path(args.out), row)


def append(path: Path, row: dict) -> None:
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:  # a full disk
        raise InputError(f"cannot write {path}: {error.strerror}") from error


def show(args: argparse.Namespace, device: torch.device) -> None:
    bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
    todo, _, work = read_work(args, Sampler(args, device))
    for row in finished(args, todo, work):
        for k, text in enumerate(texts_of(row)):
            about = [
                f"{name[:-1]} {row[name][k]:.4g}" for name in ("logps", "rewards") if name in row
            ]
            say(f"{row['prompt']}{bold}{text}{plain}")
            say("-" * 80 + " ".join(["", *about]))


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
        with processes(args.device) as device:
            if args.export:
                export(args)
            elif args.out:
                write(args, device)
            else:
                show(args, device)
    except KeyboardInterrupt:
        kept = f"; {args.out} keeps its rows, the same command goes on" if args.out else ""
        print(f"sample.py: stopped{kept}", file=sys.stderr)
        return 130
    except InputError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"sample.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    leave(main())
