"""
The text world: every method of the paper by the stages a user runs, at equal KL(pi || sft).

    python -m experiments.text.main --quick     one seed and question, a short sft: minutes
    python -m experiments.text.main             all of constants.FULL: 80 minutes
    python -m experiments.text.main --first_seed 5 --questions methods --out out/text-again

    reviews.py -> sft -> 16 completions a prompt -> Bradley-Terry labels by the oracle -> reward
      model on the pairs -> policies of each method and seed, beta searched until the judged KL is
      where it shall be -> comparisons paired by seed

Methods, questions and sizes are in constants.py. A stopped run goes on where it was; a finished one
writes its results and figures again: results.json, PNGs, and in runs/ every model and its texts.
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from experiments.text import constants, figures
from experiments.text.pieces import make_all
from experiments.text.report import report
from infra.rows import InputError


def run(out: Path, matrix: constants.Matrix, jobs: int) -> dict:
    """The experiment into the folder `out` -> the content of results.json."""
    make_all(out, matrix, jobs)
    done = report(out, matrix)
    figures.draw_all(done, out)
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
    parser.add_argument("--first_seed", type=at_least_1, help="seeds from here on (0)")
    parser.add_argument("--seeds", type=at_least_1, help="number of seeds (5; --quick: 1)")
    parser.add_argument("--questions", nargs="+", choices=constants.QUESTIONS, help="only these")
    parser.add_argument("--jobs", type=at_least_1, default=os.cpu_count() or 1, help="processes")
    args = parser.parse_args(argv)
    matrix = constants.QUICK if args.quick else constants.FULL
    given = {name: getattr(args, name) for name in ("first_seed", "seeds", "questions")}
    matrix = replace(matrix, **{name: value for name, value in given.items() if value})
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
