"""
The text world: oracle reward against KL(pi || sft) of every method, by the stages a user runs.

    python -m experiments.text.main --quick     one seed, one width, short runs: minutes
    python -m experiments.text.main             all of constants.FULL: about an hour on two cores

    reviews.py -> sft -> K = 8 completions a prompt -> oracle rewards and Bradley-Terry labels
      -> reward model on the pairs -> a policy per method, beta and seed -> judged by the oracle

A method is a line of METHODS in constants.py. What they learn from:

    *-pref          pairs with hard labels, P(first wins) = sigmoid(r1 - r2)
    *-rw            the same completions, all K of a prompt, rated by the reward model
    ppo, *-online   completions of their own, rated by the reward model
    best-of-n       no training: the best of n of sft's by the reward model
    *-oracle        the same with the oracle in the reward model's place

A stopped run goes on where it was. It leaves results.json, figures, and in runs/ every model and
what it wrote.
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from experiments.text import constants, figures
from experiments.text.pieces import make_all, plan
from experiments.text.report import report, table
from infra.rows import InputError


def run(out: Path, matrix: constants.Matrix, jobs: int) -> dict:
    """The experiment into the folder `out` -> the content of results.json."""
    pieces = plan(matrix)
    make_all(out, pieces, jobs)
    done = report(out, matrix, pieces)
    print(table(done, matrix))
    figures.draw_all(done, matrix, out)
    print(f"\nWritten to {out}")
    return done


def at_least_1(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="text",
        usage=argparse.SUPPRESS,  # so that a mistake takes one line
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="constants.QUICK instead of FULL")
    parser.add_argument("--out", type=Path, help="folder (out/text; --quick: out/text-quick)")
    parser.add_argument("--seeds", type=at_least_1, help="number of seeds (3; --quick: 1)")
    parser.add_argument("--jobs", type=at_least_1, default=os.cpu_count() or 1, help="processes")
    args = parser.parse_args(argv)
    matrix = constants.QUICK if args.quick else constants.FULL
    matrix = replace(matrix, seeds=args.seeds or matrix.seeds)
    try:
        run(args.out or Path("out/text" + "-quick" * args.quick), matrix, args.jobs)
    except KeyboardInterrupt:
        print("text: stopped; the same command goes on where it was", file=sys.stderr)
        return 130
    except (InputError, OSError) as error:  # a full disk
        print(f"text: {error}; the same command goes on where it was", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
