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

--score with --ref writes what an analysis of a run needs: the number of each row, log-probs of both
models and the target that they are compared with.

--out grows by whole lines. The same command, given again, goes on: it skips as many rows as the
file has lines. `torchrun` shares the prompts of a batch over its processes.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import exo
from data import Builder, decode, get_encoding
from infra.huggingface import save_pretrained
from infra.rows import InputError, Report, Row, make_folder, read_files, write_json
from model import Scorer
from train import (
    autocast,
    gather,
    leave,
    load_gpt,
    load_reward,
    only_first,
    processes,
    rank,
    say,
    score,
    world,
)


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
    add("--ref", metavar="PATH", help="with --score: another model's log-probs, and the target")
    add("--beta_r", type=float, default=1.0, help="with --ref: temperature of rewards")
    add("--label_smoothing", type=float, default=0.0, help="with --ref: of pairs")
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
    yield not args.ref or args.score, "--ref is for --score"
    yield args.beta_r > 0, f"beta_r must be above 0, got {args.beta_r}"
    ok = 0 <= args.label_smoothing < 0.5
    yield ok, f"label_smoothing must be in [0, 0.5), got {args.label_smoothing}"
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


class Sampler:
    """A checkpoint and a reward, and what they make of prompts: rows as dicts. (Some encodings have
    ids without a word, which a model may draw: they are left out of the text.)"""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.args, self.device, args.micro_batch_size = args, device, None  # as train.score asks
        self.gpt, ckpt = load_gpt(args.checkpoint, device, args.encoding)
        self.encoding = get_encoding(ckpt["encoding"])
        self.temperature = ckpt["temperature"] if args.temperature is None else args.temperature
        self.reward = load_reward(args.reward, device) if args.reward else None
        self.ref = self.load_ref() if args.ref else None

    def load_ref(self) -> Scorer:
        """The policy's temperature is the reference's, as in training."""
        ref, ckpt = load_gpt(self.args.ref, self.device, self.args.encoding)
        if get_encoding(ckpt["encoding"]).n_vocab != self.encoding.n_vocab:
            raise InputError(f"--ref {self.args.ref} has another encoding, {ckpt['encoding']}")
        return Scorer(ref, self.temperature)

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

    def score(self, rows: list[tuple[int, Row]]) -> list[dict]:
        """The (number, row) with `logps`, log pi of each completion (end of text included), and
        their rewards: those of --reward, or those they have. Long rows are cut as in training."""
        builder = Builder(self.gpt.config.block_size, self.encoding.eot_token, Report())
        for _, row in rows:
            prompt = self.encoding.encode_ordinary(row.prompt or "")
            for y in row.completions:
                builder.add(prompt, [self.encoding.encode_ordinary(y)])
        models, groups = {"logps": Scorer(self.gpt, self.temperature)}, builder.groups()
        models |= {"ref_logps": self.ref} if self.ref else {}
        found = {
            name: iter(score(scorer, groups, self.args, self.device)[1::2].tolist())
            for name, scorer in models.items()
        }
        out = []
        for number, row in rows:
            ys = list(row.completions)
            own = {name: [next(logps) for _ in ys] for name, logps in found.items()}
            out.append({"row": number} if self.ref else {})
            out[-1] |= {"prompt": row.prompt or "", "completions": ys, **own}
            if row.rewards and not self.reward:
                out[-1]["rewards"] = list(row.rewards)
            elif row.kind == "pair" and not self.reward:  # stays a pair
                chosen, rejected = out[-1].pop("completions")
                out[-1] |= {"chosen": chosen, "rejected": rejected}
        out = self.rate(out) if self.reward else out
        return [row | self.target(row) for row in out] if self.ref else out

    def target(self, row: dict) -> dict:
        """{target: p over the completions}, where the row has an order or rewards."""
        if "chosen" in row:
            return {"target": exo.preference_target(self.args.label_smoothing).exp()[0].tolist()}
        if "rewards" in row:
            rewards = torch.tensor(row["rewards"], dtype=torch.float64)
            return {"target": exo.reward_target(rewards, self.args.beta_r).exp().tolist()}
        return {}


def best(row: dict, of: int) -> dict:
    """Of every `of` completions of a row the one with the highest reward; of equals, the first."""
    rewards = row["rewards"]
    top = [max(range(i, i + of), key=rewards.__getitem__) for i in range(0, len(rewards), of)]
    return row | {name: [row[name][k] for k in top] for name in ("completions", "rewards")}


TOKENIZER = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json")
TOKENIZER += ("special_tokens_map.json",)  # files of a Hugging Face folder


# ------------------------------------------------------------------------------
# Rows in, rows out


def read_prompts(args: argparse.Namespace) -> list[str]:
    if args.prompts is None:
        return [args.prompt or ""]
    report = Report()
    prompts = [row.prompt for _, row in read_files([args.prompts], "prompt", report)]
    say(f"{args.prompts}: {report}", sys.stderr)
    return prompts


def read_scored(args: argparse.Namespace) -> list[tuple[int, Row]]:
    """(its number in the file, from 1, and the row) of every usable row."""
    report = Report()
    rows = [(report.rows, row) for _, row in read_files([args.score], "score", report)]
    say(f"{args.score}: {report}", sys.stderr)
    return rows


def texts_of(row: dict) -> list[str]:
    return row["completions"] if "completions" in row else [row["chosen"], row["rejected"]]


def read_work(args: argparse.Namespace, sampler: Sampler) -> tuple[list, Callable]:
    """(what to do, what does a batch of it)."""
    if args.score:
        return read_scored(args), sampler.score
    prompts = read_prompts(args)
    lengths = [len(sampler.encoding.encode_ordinary(prompt)) for prompt in prompts]
    cut = sum(n > sampler.room() for n in lengths)
    if cut:
        say(f"{cut} prompts cut from the left to {sampler.room()} tokens", sys.stderr)
    return list(enumerate(prompts)), sampler.sample


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
    todo, work = read_work(args, Sampler(args, device))
    done = only_first(whole_lines, args)
    for row in finished(args, todo[done:], work):
        only_first(append, Path(args.out), row)


def whole_lines(args: argparse.Namespace) -> int:
    """How many lines --out has; a last one that was cut off is removed."""
    path, found = Path(args.out), 0
    make_folder(path.parent)
    try:
        with open(path, "wb+" if args.overwrite else "ab+") as file:
            file.seek(0)
            content = file.read()
            start = content.rfind(b"\n") + 1
            if is_json(content[start:]):  # only its end is missing
                content += file.write(b"\n") * b"\n"
            else:
                file.truncate(start)
            found = content.count(b"\n")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    if found:
        say(f"{path}: {found} rows are there already", sys.stderr)
    return found


def is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def append(path: Path, row: dict) -> None:
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:  # a full disk
        raise InputError(f"cannot write {path}: {error.strerror}") from error


def show(args: argparse.Namespace, device: torch.device) -> None:
    bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
    todo, work = read_work(args, Sampler(args, device))
    for row in finished(args, todo, work):
        for k, text in enumerate(texts_of(row)):
            about = [
                f"{name[:-1]} {row[name][k]:.4g}" for name in ("logps", "rewards") if name in row
            ]
            say(f"{row['prompt']}{bold}{text}{plain}")
            say("-" * 80 + " ".join(["", *about]))


def export(args: argparse.Namespace) -> None:
    """The checkpoint as a Hugging Face folder, with the tokenizer of the one that it began from.

    config.json keeps our encoding and temperature for a later --init; generation_config.json makes
    transformers' `generate` draw from the distribution that was trained.
    """
    gpt, ckpt = load_gpt(args.checkpoint, encoding=args.encoding)
    name, temperature, out = ckpt["encoding"], ckpt["temperature"], Path(args.export)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--export {out} is not an empty folder: give another")
    encoding = get_encoding(name)
    eot, files = encoding.eot_token, tokenizer_files(Path(args.checkpoint))
    generation = {"do_sample": True, "temperature": temperature, "top_k": 0}
    make_folder(out)
    try:
        for file in files:
            shutil.copyfile(file, out / file.name)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}") from error
    generation |= {"bos_token_id": eot, "eos_token_id": eot}
    write_json(out / "generation_config.json", generation)
    save_pretrained(gpt, out, eot, exo={"encoding": name, "temperature": temperature})
    print(f"{out}: GPT-2 of {sum(p.numel() for p in gpt.parameters()):,} parameters")
    if not files:
        print(f"no tokenizer is written: training did not begin from a folder with one for {name}")


def tokenizer_files(checkpoint: Path) -> list[Path]:
    """Those of the Hugging Face folder that training began from, run after run."""
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    while (folder / "settings.json").is_file():
        init = json.loads((folder / "settings.json").read_text(encoding="utf-8"))["init"]
        if not init:
            return []
        folder = Path(init) if Path(init).is_dir() else Path(init).parent
    return [folder / name for name in TOKENIZER if (folder / name).is_file()]


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
