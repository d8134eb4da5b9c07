"""
The text world: oracle reward against KL(pi || sft) of every method, by the stages a user runs.

    python -m experiments.frontier --quick      one seed, three betas: the smallest that shows it
    python -m experiments.frontier              the matrix below (FULL)
    python -m experiments.frontier --tune       where LEARNING_RATE is from

Each writes results.json, table.md, samples.md and figures.

    reviews.py -> sft -> K = 8 completions a prompt -> oracle rewards and Bradley-Terry labels
      -> reward model on the pairs -> a policy per method, beta and seed -> judged by the oracle

A method is a line of METHODS. What they learn from:

    *-pref          pairs with hard labels, P(first wins) = sigmoid(r1 - r2)
    *-rw            the same completions, all K of a prompt, rated by the reward model
    ppo, *-online   completions of their own, rated by the reward model
    best-of-n       no training: the best of n of sft's by the reward model
    *-oracle        the same with the oracle in the reward model's place

The work is cut into pieces: an sft, a reward model, a policy. A piece is finished when its file in
OUT/pieces is there, so a stopped run goes on where it was, and --jobs changes speed alone. The file
keeps a hash of all settings that lead to it; where they have changed, the piece is made anew.

Choices and simplifications:
- One beta means one optimum: exo-rw, dpo-rw and online have beta_pi = 1 and beta_r = beta, dpo-pref
  beta_pi = beta, ppo kl_coef = beta. exo-pref's pull is set by beta_pi and by label smoothing, e,
  alike: where a pair's rewards differ by d, its labels ask for a log-ratio of (2 sigmoid(d) - 1)
  log((1 - e) / e) / beta_pi. With the paper's e = 1e-3 and beta_pi = beta log((1 - e) / e) / 2 that
  is Bradley-Terry's d / beta for close pairs, and at most 2 / beta for others. Nobody is compared
  at equal beta, but at equal KL.
- All read the same number of completions per step, and as many in all; ppo, which passes over its
  own PPO_EPOCHS times, takes PPO_EPOCHS times the steps. A reward model's rewards spread less than
  the oracle's, so that with it the same beta means less pull.
- EXO and DPO have the same learning rate where they learn from the same, the one that --tune found
  best for the two together, on a seed of its own (data, sft, labels, judged prompts) at two betas:
  the highest share of what the optimum gains in oracle reward - beta KL, mean over betas and
  rewards. It tries RATES, and LADDER beyond them while the best is the first or the last. One seed:
  differences of a few hundredths there are noise. A narrower model's rate is larger by as much as
  it is narrower. QUICK takes the same.
- Each seed has its own data, sft, labels and reward models. Standard errors are over seeds.
- All policies are judged on the first clauses of the same held-out reviews, with the same uniform
  numbers. Some of these clauses occur in other reviews too.
"""

import argparse
import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

from experiments.common import start_worker

# --------------------------------------------------------------------------------------------------
# The matrix


@dataclass(frozen=True)
class Matrix:
    """Sizes of a run; every number is in results.json."""

    # what is run: methods x betas x seeds, with these
    betas: tuple = ()  # ((reward, (beta, ...)), ...)
    methods: tuple = ()
    seeds: int = 3
    first_seed: int = 0
    rates: tuple = ()  # ((method, (learning rate, ...)), ...) to try; none: LEARNING_RATE
    widths: tuple = (8, 16)  # of calibration, beside n_embd: exo-rw-oracle and dpo-rw-oracle alone
    pairs: tuple = (128, 1024)  # of sample efficiency, beside all of them
    efficiency: tuple = ("exo-pref", "dpo-pref")
    efficiency_rewards: tuple = ("sentiment",)
    # how
    encoding: str = "experiments.reviews:encoding"
    n_embd: int = 48
    n_layer: int = 2
    n_head: int = 4
    block_size: int = 96
    new: int = 44  # longest completion drawn; the grammar's longest is 41
    sft_rows: int = 100_000
    sft_iters: int = 6000
    sft_batch: int = 32
    sft_rate: float = 2e-3  # at n_embd 48; a width's is 48 / width times as large
    prompts: int = 1920  # training prompts
    K: int = 8  # completions of each
    groups: int = 8  # groups per step: 8 of 8 completions, or 32 pairs
    steps: int = 240  # for ppo times its passes
    evals: int = 2  # evaluations along the way, the last one included
    rm_iters: int = 500  # and at most eight times through the pairs
    judged: tuple = (64, 16)  # held-out prompts, and completions of each, that judge a policy
    pool: int = 1024  # completions of each of them from sft, for the optimum and best-of-n


REWARDS = {
    "sentiment": "experiments.reviews:sentiment",
    "conviction": "experiments.reviews:conviction",
}
METHODS = {  # name: (stage, what it learns from)
    "exo-pref": ("exo", "pairs"),
    "dpo-pref": ("dpo", "pairs"),
    "exo-rw": ("exo", "model"),
    "dpo-rw": ("dpo", "model"),
    "exo-rw-oracle": ("exo", "oracle"),
    "dpo-rw-oracle": ("dpo", "oracle"),
    "exo-online": ("exo", "own"),
    "dpo-online": ("dpo", "own"),
    "ppo": ("ppo", "own"),
}
SMOOTHING = 1e-3  # exo-pref's; see the top
PPO_EPOCHS = 2
CALIBRATION = ("exo-rw-oracle", "dpo-rw-oracle")
LEARNING_RATE = {  # of families, by --tune; the reward model's was not swept
    "pref": 3e-4,
    "rw": 1e-4,
    "rw-oracle": 1e-4,
    "online": 1e-3,
    "ppo": 3e-4,
    "rm": 1e-3,
}
LADDER = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
RATES = LADDER[1:4]
TUNING_SEED = 1000
BEST_OF = (1, 2, 4, 8, 16, 32, 64)
OPTIMUM_BETAS = tuple(2 ** (k / 2) for k in range(8, -7, -1))  # 16 ... 0.125
LEAST_ESS = 20  # the optimum's curve ends where fewer completions of the pool carry it
SMALL_KL = 0.05  # where calibration is read, beside BUDGETS
BUDGETS = (0.1, 0.25, 0.5, 1.0, 2.0, 3.0)  # KLs at which methods are compared

FULL = Matrix(
    betas=(("sentiment", (8.0, 2.0, 0.5)), ("conviction", (4.0, 1.0, 0.25))),
    methods=tuple(METHODS),
)
TUNE = replace(
    FULL,
    betas=(("sentiment", (4.0, 2.0)), ("conviction", (2.0, 1.0))),
    rates=tuple((method, RATES) for method in METHODS),
    seeds=1,
    first_seed=TUNING_SEED,
    widths=(),
    pairs=(),
)
QUICK = replace(
    FULL,
    seeds=1,
    widths=(),
    pairs=(),
    sft_rows=50_000,
    sft_iters=2000,
    prompts=512,
    steps=64,
    rm_iters=200,
    judged=(32, 12),
    pool=512,
)

# --------------------------------------------------------------------------------------------------
# Pieces


@dataclass(frozen=True)
class Piece:
    """One unit of work: `make` a result of `spec`, when the pieces in `needs` are there."""

    name: str
    make: str  # a name in MAKERS
    spec: dict
    needs: tuple[str, ...] = ()


VERSION = 2  # of what makers do and return: pieces of another are made anew

# fields that say which pieces there are; the others say how each is made
WHICH = ("betas", "methods", "seeds", "first_seed", "rates", "widths")
WHICH += ("pairs", "efficiency", "efficiency_rewards")


def family(method: str) -> str:
    """What EXO and DPO share where they learn from the same: "exo-rw" and "dpo-rw" are "rw"."""
    return method.removeprefix("exo-").removeprefix("dpo-")


def plan(matrix: Matrix) -> dict[str, Piece]:
    """All pieces by name, in an order in which they can be made."""
    how = asdict(matrix)
    for name in WHICH:
        del how[name]
    how["made_with"] = [VERSION, SMOOTHING, PPO_EPOCHS, BEST_OF, OPTIMUM_BETAS]
    pieces: dict[str, Piece] = {}

    def add(name: str, make: str, needs: tuple = (), **spec) -> str:
        pieces[name] = Piece(name, make, {**how, **spec}, tuple(needs))
        return name

    def policy(labels: str, rm: str | None, method: str, beta: float, **spec) -> None:
        label = f"{method}-b{beta:g}"
        judge = f"rm-{spec['reward']}-s{spec['seed']}"  # of all pairs, also where `rm` saw fewer
        needs = dict.fromkeys((labels, judge, rm)) if rm else (labels,)
        suffix = f"-n{spec['n_pairs']}" if spec["n_pairs"] else ""
        name = labels.replace("labels", "policy") + f"-{label}{suffix}"
        spec |= {"method": method, "beta": beta, "labels": labels, "rm": rm}
        scaled = LEARNING_RATE[family(method)] * (matrix.n_embd / spec["n_embd"])
        for rate in dict(matrix.rates).get(method, (scaled,)):
            own = f"{name}-r{rate:g}" if matrix.rates else name
            add(own, "policy", needs, rate=rate, **spec)

    for seed in range(matrix.first_seed, matrix.first_seed + matrix.seeds):
        for width in (matrix.n_embd, *matrix.widths):
            size = {"seed": seed, "n_embd": width}
            sft = add(f"sft-s{seed}-w{width}", "sft", **size)
            for reward, betas in matrix.betas:
                base = {**size, "reward": reward, "sft": sft}
                name = f"labels-{reward}-s{seed}-w{width}"
                labels = add(name, "labels", (sft,), **base)
                if width != matrix.n_embd:
                    add(f"limits-{reward}-s{seed}-w{width}", "limits", (labels,), **base, rm=None)
                    for method in CALIBRATION:
                        for beta in betas:
                            policy(labels, None, method, beta, **base, n_pairs=None)
                    continue
                rm = f"rm-{reward}-s{seed}"
                judge = {**base, "n_pairs": None}
                add(rm, "rm", (labels,), **judge, rate=LEARNING_RATE["rm"])
                limits = f"limits-{reward}-s{seed}-w{width}"
                add(limits, "limits", (labels, rm), **base, rm=rm)
                for method in matrix.methods:
                    for beta in betas:
                        policy(labels, rm, method, beta, **base, n_pairs=None)
                for n in matrix.pairs if reward in matrix.efficiency_rewards else ():
                    some = {**base, "n_pairs": n, "rate": LEARNING_RATE["rm"]}
                    few = add(f"rm-{reward}-s{seed}-n{n}", "rm", (labels,), **some)
                    for method in matrix.efficiency:
                        for beta in betas:
                            policy(labels, few, method, beta, **base, n_pairs=n)
    return pieces


def keys(pieces: dict[str, Piece]) -> dict[str, str]:
    """A hash of each piece's settings and of all that it is made from."""
    out: dict[str, str] = {}
    for name, piece in pieces.items():
        said = json.dumps([piece.make, piece.spec, [out[need] for need in piece.needs]])
        out[name] = hashlib.sha256(said.encode()).hexdigest()[:16]
    return out


def load_piece(out: Path, name: str, key: str | None = None) -> dict | None:
    """The result of a finished piece, None if it is not there or (key given) of other settings."""
    path = out / "pieces" / f"{name}.json"
    if not path.exists():
        return None
    held = json.loads(path.read_text(encoding="utf-8"))
    return held["result"] if key in (None, held["key"]) else None


def work(out: Path, piece: Piece, key: str) -> str:
    """Make one piece and write its file, whole or not at all. What stages print goes to a log."""
    import torch

    from experiments.frontier_stages import MAKERS
    from infra.rows import make_folder, write_json

    start = time.perf_counter()
    torch.set_num_threads(1)  # the sums, and so the last bits, would depend on it
    for folder in ("pieces", "logs", "runs"):
        make_folder(out / folder)
    folder, log = out / "runs" / piece.name, out / "logs" / f"{piece.name}.txt"
    mark = folder / "key"  # a stopped stage goes on only from what was made with these settings
    if folder.exists() and (not mark.exists() or mark.read_text(encoding="utf-8") != key):
        shutil.rmtree(folder)
    folder.mkdir(exist_ok=True)
    mark.write_text(key, encoding="utf-8")
    with (
        open(log, "w", encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        result = MAKERS[piece.make](out, piece.name, piece.spec)
    write_json(
        out / "pieces" / f"{piece.name}.json",
        {"key": key, "seconds": round(time.perf_counter() - start, 1), "result": result},
    )
    log.unlink()
    return piece.name


def run_pieces(out: Path, pieces: dict[str, Piece], jobs: int) -> None:
    """Make what is missing, `jobs` pieces at a time, each as soon as what it needs is there."""
    from tqdm import tqdm

    key = keys(pieces)
    done = {name for name in pieces if load_piece(out, name, key[name]) is not None}
    todo = [piece for name, piece in pieces.items() if name not in done]
    bar = tqdm(total=len(pieces), initial=len(done), desc="frontier", unit="piece")
    with bar:
        if jobs == 1:
            for piece in todo:
                bar.set_postfix_str(piece.name)
                work(out, piece, key[piece.name])
                bar.update()
            return
        watch = {"initializer": start_worker, "initargs": (os.getpid(),)}
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), **watch) as pool:
            running = {}
            try:
                while todo or running:
                    ready = [p for p in todo if done.issuperset(p.needs)][: jobs - len(running)]
                    for piece in ready:
                        todo.remove(piece)
                        running[pool.submit(work, out, piece, key[piece.name])] = piece.name
                    bar.set_postfix_str(", ".join(running.values()))
                    finished, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in finished:
                        del running[future]
                        done.add(future.result())
                        bar.update()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


# --------------------------------------------------------------------------------------------------
# The command


def run(out: Path, matrix: Matrix, jobs: int, only_report: bool = False) -> dict:
    """Make the pieces and tell; where there are rates to try, climb until no best is at an edge."""
    from experiments import frontier_report

    if only_report and matrix.rates:  # as far as it had climbed
        matrix = replace(matrix, rates=tuple((method, LADDER) for method in matrix.methods))
    pieces = plan(matrix)
    if not only_report:
        run_pieces(out, pieces, jobs)
    if not matrix.rates:
        return frontier_report.report(out, matrix, pieces)
    done, rates = frontier_report.tuning(out, matrix, pieces), dict(matrix.rates)
    if only_report:
        return done
    for method in matrix.methods:
        best = done["chosen"][family(method)]
        for edge, step in ((min, -1), (max, 1)):
            there = LADDER.index(best) + step
            if best == edge(rates[method]) and 0 <= there < len(LADDER):
                rates[method] = tuple(sorted((*rates[method], LADDER[there])))
    if rates == dict(matrix.rates):
        return done
    return run(out, replace(matrix, rates=tuple(rates.items())), jobs)


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes take one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        "python -m experiments.frontier",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--quick", action="store_true", help="one seed, three betas, minutes")
    parser.add_argument("--tune", action="store_true", help="each method at each of RATES")
    parser.add_argument("--out", type=Path, help="folder (out/frontier; -quick, -tune)")
    parser.add_argument("--seeds", type=int, help="number of seeds (3; --quick: 1)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--rewards", nargs="+", metavar="NAME", help="sentiment, conviction")
    parser.add_argument("--report", action="store_true", help="of the pieces there are; no work")
    args = parser.parse_args(argv)
    for name in ("seeds", "jobs"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    if args.tune and args.quick:
        parser.error("--tune does not go with --quick")
    for name in args.rewards or []:
        if name not in REWARDS:
            parser.error(f"unknown reward {name!r}: choose from {', '.join(REWARDS)}")
    return args


def settings(args: argparse.Namespace) -> tuple[Path, Matrix]:
    """The folder and the matrix that the flags ask for."""
    matrix, name = TUNE if args.tune else QUICK if args.quick else FULL, "frontier"
    matrix = replace(matrix, seeds=args.seeds or matrix.seeds)
    if args.rewards:
        chosen = tuple((name, betas) for name, betas in matrix.betas if name in args.rewards)
        matrix = replace(matrix, betas=chosen)
    return args.out or Path("out") / (name + "-tune" * args.tune + "-quick" * args.quick), matrix


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from data import InputError

    try:
        run(*settings(args), args.jobs, args.report)
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it was", file=sys.stderr)
        return 130
    except InputError as error:
        print(f"frontier: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"frontier: {error.strerror}; the same command goes on where it was", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
