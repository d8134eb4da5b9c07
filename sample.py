"""
Text from a checkpoint: prompts in, n completions of each out.

    python sample.py out/exo --prompt "How do I boil an egg?" -n 3
    python sample.py out/sft --prompts rows.jsonl -n 8 --out samples.jsonl
    python sample.py out/sft --score samples.jsonl --reward out/reward --out scored.jsonl
    python train.py exo --data scored.jsonl --init out/sft
    python sample.py out/sft --prompts rows.jsonl --best_of 16 --reward out/reward --out best.jsonl
    python sample.py out/exo --score rows.jsonl --ref out/sft --out analysis.jsonl
    python sample.py out/exo --export out/exo_hf          (a folder that `transformers` loads)

--prompts takes every row format of infra/rows.py and reads only the prompts. Without a prompt the
text starts at [end of text]. A draw depends on --seed and on its prompt's place among the prompts,
never on its batch mates: --batch_size changes speed and nothing else.

--score with --ref writes what an analysis of a run needs: the number of each row, log-probs of both
models and the target that they are compared with.

--out grows by whole lines. The same command, given again, goes on: it skips as many rows as the
file has lines. `torchrun` shares the prompts of a batch over its processes.
"""

import argparse
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import exo
from data import Builder, decode, get_encoding
from infra.checkpoint import FILES, load_gpt
from infra.huggingface import save_pretrained, tokenizer_files
from infra.parallel import (
    autocast,
    complain,
    gather,
    in_first,
    processes,
    rank,
    run_program,
    say,
    score,
    world,
)
from infra.rows import InputError, Report, Row, make_folder, read_files, write_json
from model import Scorer


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("checkpoint", help="run folder, .pt file or Hugging Face GPT-2 folder")
    add("--which", choices=FILES, default="last", help="of a run folder: last weights, or best")
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
    add("--max_new_tokens", type=int, help="longest completion (128, or half of block_size)")
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
    yield t is None or 0 <= t < math.inf, f"temperature must be 0 or more, got {t}"
    yield args.seed >= 0, f"seed must not be negative, got {args.seed}"
    for name in ("n", "max_new_tokens", "batch_size", "best_of", "top_k"):
        value = getattr(args, name)
        yield value is None or value >= 1, f"{name} must be at least 1"


class Sampler:
    """A checkpoint and a reward, and what they make of prompts: rows as dicts. (Some encodings have
    ids without a word, which a model may draw: they are left out of the text.)"""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.args, self.device, self.report = args, device, Report()
        self.gpt, ckpt = load_gpt(args.checkpoint, device, args.encoding, which=args.which)
        self.encoding = get_encoding(ckpt["encoding"])
        self.temperature = ckpt["temperature"] if args.temperature is None else args.temperature
        self.new = args.max_new_tokens or min(128, self.gpt.config.block_size // 2)
        self.models = {"logps": Scorer(self.gpt, self.temperature)}
        if args.ref:
            ref, ckpt = load_gpt(args.ref, device, args.encoding)
            if get_encoding(ckpt["encoding"]).n_vocab != self.encoding.n_vocab:
                raise InputError(f"--ref {args.ref} has another encoding, {ckpt['encoding']}")
            self.models["ref_logps"] = Scorer(ref, self.temperature)  # as in training
        self.reward = None
        if args.reward:
            from methods.reward import load_reward

            self.reward = load_reward(args.reward, device)

    # sampling

    def room(self) -> int:
        """How long a prompt may be."""
        block = self.gpt.config.block_size
        if self.new >= block:
            raise InputError(
                f"--max_new_tokens {self.new} leaves no room for a prompt: block_size is {block}"
            )
        return block - self.new

    def tokens(self, prompt: str) -> list[int]:
        return self.encoding.encode_ordinary(prompt) or [self.encoding.eot_token]

    def draw(self, prompts: list[tuple[int, str]], n: int) -> list[list[list[int]]]:
        """n completions of each (place, prompt), as token ids; processes share the prompts."""
        mine, out = prompts[rank() :: world()], {}
        if mine:
            with autocast(self.args.dtype, self.device):
                ys = self.gpt.generate(
                    [self.tokens(prompt)[-self.room() :] for _, prompt in mine],
                    max_new_tokens=self.new,
                    n=n,
                    temperature=self.temperature,
                    top_k=self.args.top_k,
                    eot=self.encoding.eot_token,
                    uniform=torch.cat([self.uniform(place, n) for place, _ in mine]),
                )
            out = {place: ys[i * n : (i + 1) * n] for i, (place, _) in enumerate(mine)}
        drawn = dict(item for part in gather(out) for item in part.items())
        return [drawn[place] for place, _ in prompts]

    def uniform(self, place: int, n: int) -> torch.Tensor:
        seed = np.random.SeedSequence([self.args.seed, place]).generate_state(1)[0]
        return torch.rand(n, self.new, generator=torch.Generator().manual_seed(int(seed)))

    def sample(self, prompts: list[tuple[int, str]]) -> list[dict]:
        """A row {prompt, completions, rewards (with --reward)} for each (place, prompt)."""
        each, eot = self.args.best_of or 1, self.encoding.eot_token
        rows, ended = [], []
        for (_, prompt), ys in zip(prompts, self.draw(prompts, self.args.n * each), strict=True):
            whole = [y[-1] == eot for y in ys]
            texts = [decode(self.encoding, y[: len(y) - e]) for y, e in zip(ys, whole, strict=True)]
            rows.append({"prompt": prompt, "completions": texts})
            ended += whole
        return [best(row, each) for row in self.rate(rows, ended)] if self.reward else rows

    def rate(self, rows: list[dict], ended=None) -> list[dict]:
        """The rows with `rewards`."""
        flat = [(row["prompt"], y) for row in rows for y in row["completions"]]
        prompts, completions = map(list, zip(*flat, strict=True))
        rewards = iter(self.reward(prompts, completions, ended).tolist())
        return [row | {"rewards": [next(rewards) for _ in row["completions"]]} for row in rows]

    # scoring

    def score(self, rows: list[tuple[int, Row]]) -> list[dict]:
        """The (number, row) with `logps`, log pi of each completion (end of text included), and
        their rewards: those of --reward, or those they have. Long rows are cut as in training."""
        builder = Builder(self.gpt.config.block_size, self.encoding.eot_token, self.report)
        for _, row in rows:
            prompt = self.encoding.encode_ordinary(row.prompt or "")
            for y in row.completions:
                builder.add(prompt, [self.encoding.encode_ordinary(y)])
        groups, args, found = builder.groups(), self.args, {}
        for name, scorer in self.models.items():
            logps = score(scorer, groups, args.batch_size, self.device, args.dtype)
            found[name] = iter(logps[1::2].tolist())  # every group is a prompt and a completion
        out = []
        for number, row in rows:
            own = {name: [next(logps) for _ in row.completions] for name, logps in found.items()}
            texts = {"completions": list(row.completions)}
            if row.kind == "pair" and not self.reward:  # stays a pair
                texts = dict(zip(("chosen", "rejected"), row.completions, strict=True))
            rated = {"rewards": list(row.rewards)} if row.rewards and not self.reward else {}
            out.append({"prompt": row.prompt or "", **texts, **own, **rated})
            out[-1] |= {"row": number} if args.ref else {}
        out = self.rate(out) if self.reward else out
        return [row | self.target(row) for row in out] if args.ref else out

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


# ------------------------------------------------------------------------------
# Rows in, rows out


def read_work(args: argparse.Namespace, sampler: Sampler) -> list:
    """(number, row) to score, or (place, prompt) to sample from."""
    if args.prompts is None and not args.score:
        prompts = [args.prompt or ""]
    else:
        report, use = Report(), "score" if args.score else "prompt"
        path = args.score or args.prompts
        rows = [(report.rows, row) for _, row in read_files([path], use, report)]
        say(f"{path}: {report}", sys.stderr)
        if args.score:
            return rows
        prompts = [row.prompt for _, row in rows]
    cut = sum(len(sampler.tokens(prompt)) > sampler.room() for prompt in prompts)
    if cut:
        say(f"{cut} prompts cut from the left to {sampler.room()} tokens", sys.stderr)
    return list(enumerate(prompts))


def run(args: argparse.Namespace, device: torch.device) -> None:
    """Every row to --out, or to the screen, as soon as it is there. All input is read before --out
    is touched."""
    if args.out and not args.out.endswith(".jsonl"):
        raise InputError(f"--out {args.out}: must end in .jsonl")
    sampler = Sampler(args, device)
    todo = read_work(args, sampler)
    done = in_first(whole_lines, Path(args.out), args.overwrite) if args.out else 0
    work = sampler.score if args.score else sampler.sample
    size = args.batch_size * world()
    starts = range(done, len(todo), size)
    for start in tqdm(starts, "rows", disable=len(starts) < 2 or rank() > 0):
        for row in work(todo[start : start + size]):
            if args.out:
                in_first(append, Path(args.out), row)
            else:
                show(row)
    if sampler.report.cut_prompts or sampler.report.cut_completions:
        say(f"cut to block_size: {sampler.report.cut()}", sys.stderr)


def whole_lines(path: Path, overwrite: bool) -> int:
    """How many lines --out has; a last one that was cut off is removed."""
    make_folder(path.parent)
    try:
        with open(path, "wb+" if overwrite else "ab+") as file:
            file.seek(0)
            content = file.read()
            start = content.rfind(b"\n") + 1
            if is_json(content[start:]):  # only its end is missing
                content += file.write(b"\n") * b"\n"
            else:
                file.truncate(start)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    found = content.count(b"\n")
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


def show(row: dict) -> None:
    bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
    texts = row["completions"] if "completions" in row else [row["chosen"], row["rejected"]]
    for k, text in enumerate(texts):
        names = [name for name in ("logps", "ref_logps", "rewards") if name in row]
        about = [f"{name[:-1]} {row[name][k]:.4g}" for name in names]
        say(f"{row['prompt']}{bold}{text}{plain}")
        say("-" * 80 + " ".join(["", *about]))


def export(args: argparse.Namespace) -> None:
    """The checkpoint as a Hugging Face folder, with the tokenizer of the one that it began from.

    config.json keeps our encoding and temperature for a later --init; generation_config.json makes
    transformers' `generate` draw from the distribution that was trained.
    """
    gpt, ckpt = load_gpt(args.checkpoint, encoding=args.encoding, which=args.which)
    name, temperature, out = ckpt["encoding"], ckpt["temperature"], Path(args.export)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--export {out} is not an empty folder: give another")
    eot, files = get_encoding(name).eot_token, tokenizer_files(Path(args.checkpoint))
    make_folder(out)
    try:
        for file in files:
            shutil.copyfile(file, out / file.name)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}") from error
    generation = {"do_sample": True, "temperature": temperature, "top_k": 0}
    generation |= {"bos_token_id": eot, "eos_token_id": eot}
    write_json(out / "generation_config.json", generation)
    save_pretrained(gpt, out, eot, exo={"encoding": name, "temperature": temperature})
    print(f"{out}: GPT-2 of {sum(p.numel() for p in gpt.parameters()):,} parameters")
    if not files:
        print(f"no tokenizer is written: training did not begin from a folder with one for {name}")


def main(argv: list[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    try:
        with processes(args.device) as device:
            export(args) if args.export else run(args, device)
    except KeyboardInterrupt:
        kept = f"; {args.out} keeps its rows, the same command goes on" if args.out else ""
        print(f"sample.py: stopped{kept}", file=sys.stderr)
        return 130
    except InputError as error:
        complain("sample.py", error)
        return 2
    return 0


if __name__ == "__main__":
    run_program(main)
