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
file has lines. Beside it stands what decides its rows, in FILE.settings.json: with another seed,
model or prompts, or where that file is not there, --out is refused. One process: to use many GPUs,
give each a share of the prompts.
"""

import argparse
import contextlib
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import exo
from data import Builder, decode, encode, get_encoding
from infra.checkpoint import FILES, export, fingerprint, load_gpt
from infra.outputs import OutFile, checksum
from infra.parallel import Parser, autocast, complain, pick_device, run_program, say, score
from infra.rows import InputError, Report, Row, one_sentence, read_files
from model import Scorer


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("sample.py", __doc__)
    add = parser.add_argument
    add("checkpoint", help="run folder, .pt file or Hugging Face GPT-2 folder")
    add("--which", choices=FILES, default="last", help="of a run folder: last weights, or best")
    add("--encoding", help="of a GPT-2 folder that does not say (gpt2), or module:function to run")
    work = parser.add_mutually_exclusive_group()
    work.add_argument("--prompt", default="", help="one prompt")
    work.add_argument("--prompts", metavar="FILE", help="a file of rows with prompts")
    work.add_argument("--score", metavar="FILE", help="rate the completions of these rows")
    work.add_argument("--export", metavar="FOLDER", help="write a Hugging Face folder")
    add("--ref", metavar="PATH", help="with --score: another model's log-probs, and the target")
    add("--beta_r", type=float, default=1.0, help="with --ref: temperature of rewards")
    add("--label_smoothing", type=float, default=0.0, help="with --ref: of pairs")
    add("--reward", metavar="SPEC", help="reward model's run folder, or module:function to run")
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
    for wrong, sentence in contradictions(args):
        if wrong:
            parser.error(sentence)
    return args


def contradictions(args: argparse.Namespace):
    """(it is so, what to say then), one for each way in which arguments contradict."""
    yield args.export and args.out, "--export writes no rows: leave out --out"
    yield args.ref and not args.score, "--ref is for --score"
    yield args.score and args.best_of, "--score draws nothing: leave out --best_of"
    yield args.score and args.temperature == 0, "--score needs a temperature above 0"
    yield args.best_of and not args.reward, "--best_of needs --reward to know the best"
    yield args.out and not args.out.endswith(".jsonl"), f"--out {args.out}: must end in .jsonl"
    given = args.prompts or args.score
    same = given and args.out and Path(given).resolve() == Path(args.out).resolve()
    yield same, f"--out {args.out} is the file that is read: give another"
    t, eps = args.temperature, args.label_smoothing
    known = t is None or t == 0 or 1e-6 <= t <= 1e6
    yield not known, f"--temperature must be 0 or from 1e-6 to 1e6, got {t}"
    yield not 0 <= eps < 0.5, f"--label_smoothing must be in [0, 0.5), got {eps}"
    yield not 1e-6 <= args.beta_r <= 1e6, f"--beta_r must be from 1e-6 to 1e6, got {args.beta_r}"
    yield args.seed < 0, f"--seed must not be negative, got {args.seed}"
    for name in ("n", "max_new_tokens", "batch_size", "best_of", "top_k"):
        value = getattr(args, name)
        yield value is not None and value < 1, f"{name} must be at least 1, got {value}"
    drawn = args.n * (args.best_of or 1)
    yield drawn > 10**6, f"at most 1,000,000 draws of a prompt are made at once, not {drawn:,}"


class Sampler:
    """A checkpoint and a reward, and what they make of prompts: rows as dicts. (Some encodings have
    ids without a word, which a model may draw: they are left out of the text.)"""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.args, self.device, self.report = args, device, Report()
        self.gpt, ckpt = load_gpt(args.checkpoint, device, args.encoding, which=args.which)
        self.encoding = get_encoding(ckpt["encoding"])
        self.temperature = ckpt["temperature"] if args.temperature is None else args.temperature
        block = self.gpt.config.block_size
        self.new = args.max_new_tokens or min(128, block // 2)
        if self.new >= block:
            said = f"--max_new_tokens {self.new} leaves no room for a prompt"
            raise InputError(f"{said}: block_size is {block}")
        self.models = {"logps": Scorer(self.gpt, self.temperature)}
        if args.ref:
            ref, ckpt = load_gpt(args.ref, device, args.encoding)
            if get_encoding(ckpt["encoding"]).n_vocab != self.encoding.n_vocab:
                raise InputError(f"--ref {args.ref} has another encoding, {ckpt['encoding']}")
            self.models["ref_logps"] = Scorer(ref, self.temperature)  # as in training
        self.reward = None
        if args.reward:
            from methods.reward import load_reward

            self.reward = load_reward(args.reward, device, args.encoding)

    def tokens(self, place: int, prompt: str) -> list[int]:
        """The end of a prompt that leaves room for what is drawn."""
        with one_sentence(f"prompt {place + 1}", InputError):
            ids = encode(self.encoding, prompt).tolist() or [self.encoding.eot_token]
        room = self.gpt.config.block_size - self.new
        self.report.cut_prompts += len(ids) > room
        return ids[-room:]

    def sample(self, prompts: list[tuple[int, str]]) -> list[dict]:
        """A row {prompt, completions, rewards (with --reward)} for each (place, prompt)."""
        each, eot = self.args.best_of or 1, self.encoding.eot_token
        n = self.args.n * each
        ids = [self.tokens(*prompt) for prompt in prompts]
        with autocast(self.args.dtype, self.device):
            drawn = self.gpt.generate(
                ids,
                max_new_tokens=self.new,
                n=n,
                temperature=self.temperature,
                top_k=self.args.top_k,
                eot=eot,
                uniform=torch.cat([self.uniform(place, n) for place, _ in prompts]),
            )
        ended = [y[-1] == eot for y in drawn]
        texts = [decode(self.encoding, y[: len(y) - e]) for y, e in zip(drawn, ended, strict=True)]
        rows = [
            {"prompt": prompt, "completions": texts[i * n : (i + 1) * n]}
            for i, (_, prompt) in enumerate(prompts)
        ]
        return [best(row, each) for row in self.rate(rows, ended)] if self.reward else rows

    def uniform(self, place: int, n: int) -> Tensor:
        seed = np.random.SeedSequence([self.args.seed, place]).generate_state(1)[0]
        return torch.rand(n, self.new, generator=torch.Generator().manual_seed(int(seed)))

    def rate(self, rows: list[dict], ended=None) -> list[dict]:
        """The rows with `rewards`."""
        flat = [(row["prompt"], y) for row in rows for y in row["completions"]]
        prompts, completions = map(list, zip(*flat, strict=True))
        rewards = iter(self.reward(prompts, completions, ended).tolist())
        return [row | {"rewards": [next(rewards) for _ in row["completions"]]} for row in rows]

    def score(self, rows: list[tuple[int, Row]]) -> list[dict]:
        """The (number, row) with `logps`, log pi of each completion (end of text included), and
        their rewards: those of --reward, or those they have. Long rows are cut as in training."""
        builder = Builder(self.gpt.config.block_size, self.encoding.eot_token, self.report)
        for number, row in rows:
            with one_sentence(f"row {number}", InputError):
                prompt = encode(self.encoding, row.prompt or "")
                for y in row.completions:
                    builder.add(prompt, [encode(self.encoding, y)])
        groups, args, found = builder.groups(), self.args, {}
        for name, scorer in self.models.items():
            logps = score(scorer, groups, args.batch_size, self.device, args.dtype)
            found[name] = iter(logps[1::2].tolist())  # every group is a prompt and a completion
        scored = []
        for _, row in rows:
            own = {name: [next(logps) for _ in row.completions] for name, logps in found.items()}
            texts = {"completions": list(row.completions)}
            if row.kind == "pair" and not self.reward:  # stays a pair
                texts = dict(zip(("chosen", "rejected"), row.completions, strict=True))
            rated = {"rewards": row.rewards} if row.rewards and not self.reward else {}
            scored.append({"prompt": row.prompt or "", **texts, **own, **rated})
        scored = self.rate(scored) if self.reward else scored
        if not args.ref:
            return scored
        places = [{"row": number} for number, _ in rows]
        return [row | at | self.target(row) for row, at in zip(scored, places, strict=True)]

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


def run(args: argparse.Namespace) -> None:
    """Every row to --out, or to the screen, as soon as it is there. All input is read before --out
    is touched."""
    sampler, todo = Sampler(args, pick_device(args.device)), [(0, args.prompt)]
    if path := args.score or args.prompts:
        report = Report()
        rows = [
            (report.rows, row)
            for _, row in read_files([path], "score" if args.score else "prompt", report)
        ]
        say(f"{path}: {report}", sys.stderr)
        todo = rows if args.score else [(i, row.prompt) for i, (_, row) in enumerate(rows)]
    with contextlib.ExitStack() as held:
        file = OutFile(Path(args.out), settings_of(sampler, todo), held) if args.out else None
        done = file.whole_lines(args.overwrite) if file else 0
        work, starts = sampler.score if args.score else sampler.sample, range(done, len(todo))
        starts = starts[:: args.batch_size]
        for start in tqdm(starts, "rows", disable=len(starts) < 2):
            rows = work(todo[start : start + args.batch_size])
            if file:
                file.write(rows, first=start == 0)
                continue
            for row in rows:
                show(row)
    if sampler.report.cut_prompts or sampler.report.cut_completions:
        say(f"cut to block_size: {sampler.report.cut()}", sys.stderr)


FREE = ("out", "overwrite", "device", "batch_size")  # flags that may change when --out goes on
FREE += ("checkpoint", "which", "ref", "prompt", "prompts", "score")  # what they name is compared


def settings_of(sampler: Sampler, todo: list) -> dict:
    """All that decides the rows."""
    flags = {name: value for name, value in vars(sampler.args).items() if name not in FREE}
    flags |= {"temperature": sampler.temperature, "max_new_tokens": sampler.new}
    models = {name: fingerprint(scorer) for name, scorer in sampler.models.items()}
    return flags | {"models": models, "rows": checksum(repr(row).encode() for row in todo)}


def show(row: dict) -> None:
    bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
    texts = row["completions"] if "completions" in row else [row["chosen"], row["rejected"]]
    for k, text in enumerate(texts):
        names = [name for name in ("logps", "ref_logps", "rewards") if name in row]
        about = [f"{name[:-1]} {row[name][k]:.4g}" for name in names]
        say(f"{row['prompt']}{bold}{text}{plain}")
        say("-" * 80 + " ".join(["", *about]))


def main(argv: list[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    try:
        if os.environ.get("WORLD_SIZE", "1") != "1":  # each would write all rows to --out
            raise InputError("sample.py runs in one process: start it without torchrun")
        if args.export:
            export(args.checkpoint, Path(args.export), args.encoding, args.which)
        else:
            run(args)
    except KeyboardInterrupt:
        kept = f"; {args.out} keeps its rows, the same command goes on" if args.out else ""
        print(f"sample.py: stopped{kept}", file=sys.stderr)
        return 130
    except (InputError, OSError) as error:  # a name too long, a folder without permission
        complain("sample.py", error)
        return 2
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it as it ends any program
    run_program(main)
