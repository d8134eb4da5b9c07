"""
The plan of the text world: what is run, how large, and which comparisons are tested. It was written
down before the run, and results.json has every number of it.

Choices and simplifications:
- Nobody is compared at equal beta, but at equal measured KL(pi || sft): for each method, reward,
  seed and target beta is searched (search.py).
- One beta means one optimum: exo-rw, dpo-rw and online have beta_pi = 1 and beta_r = beta, dpo-pref
  beta_pi = beta, ppo kl_coef = beta. exo-pref's pull is set by beta_pi and by label smoothing, e,
  alike: where a pair's rewards differ by d, its labels ask for a log-ratio of (2 sigmoid(d) - 1)
  log((1 - e) / e) / beta_pi. With the paper's e = 1e-3 and beta_pi = beta log((1 - e) / e) / 2 that
  is Bradley-Terry's d / beta for close pairs, and at most 2 / beta for others.
- All methods have as many completions rated, and read as many in a step, whatever K: with a smaller
  K there are more groups. ppo passes PPO_EPOCHS times over its own, in PPO_EPOCHS times the steps.
- EXO and DPO have the same learning rate where they learn from the same, and at every K: the one of
  1e-4, 3e-4, ... with which the two together had the highest mean of oracle reward - beta KL on
  sentiment at beta 0.8, on seed 1000 of a kindred world (assets/text/tuning.json; see the page).
  On pairs alone EXO's own best was another: exo-fast-pref has it.
- Each seed has its own data, sft, labels and reward models. Differences are paired by seed, every
  interval is 95 % by Student's t, Holm's correction is over the comparisons of one question.
- All policies are judged on the first clauses of the same held-out reviews, with the same uniform
  numbers. Some of these clauses occur in other reviews too.
"""

import itertools
from dataclasses import dataclass, replace
from typing import NamedTuple

ENCODING = "experiments.text.reviews:encoding"


class Method(NamedTuple):
    stage: str  # of train.py
    source: str  # what it learns from: pairs, sft's draws rated by the model, draws of its own
    rate: float  # learning rate
    sentiment: tuple  # betas to begin with at KLS: medians of earlier runs; None: not asked for
    conviction: tuple


METHODS = {
    "exo-pref": Method("exo", "pairs", 3e-4, (90, 2.4, 0.67, 0.24), (0.87,)),
    "dpo-pref": Method("dpo", "pairs", 3e-4, (5.4, 2.8, 1.28, 0.71), (1.3,)),
    "exo-rw": Method("exo", "model", 3e-4, (4.1, 2.75, 1.68, 0.87), (1.67,)),
    "dpo-rw": Method("dpo", "model", 3e-4, (4.2, 2.7, 1.59, 0.79), (1.59,)),
    "exo-online": Method("exo", "own", 1e-3, (4.4, 2.8, 1.45, 0.54), (1.5,)),
    "dpo-online": Method("dpo", "own", 1e-3, (4.6, 3.0, 1.1, 0.16), (1.09,)),
    "ppo": Method("ppo", "own", 1e-3, (4.1, 2.6, 1.22, 0.43), (1.16,)),
    "exo-fast-pref": Method("exo", "pairs", 1e-3, (None, None, 1.5, 0.6), (None,)),  # guesses
}
RM_RATE = 1e-3  # the reward model's learning rate, which was not swept
SMOOTHING = 1e-3  # exo-pref's; see the top
PPO_EPOCHS = 2
BORDER = 3.0  # nats: praise has log-odds above it (20 to 1 for a happy reviewer), a pan below minus
MADE_WITH = (RM_RATE, SMOOTHING, PPO_EPOCHS, BORDER)  # what no field of Matrix says

# --------------------------------------------------------------------------------------------------
# Equal KL

KLS = (0.25, 0.5, 1.0, 2.0)  # nats
MIDDLE = (1.0,)  # for K
TARGETS = {"sentiment": KLS, "conviction": (0.5,)}  # of each reward
TOLERANCE = 0.1  # of a target: where the search ends; nobody farther away is compared there
BETAS = (1 / 64, 256.0)  # no beta beyond these
PLAN = ("METHODS", "RM_RATE", "BORDER", "TARGETS", "TOLERANCE")  # in results.json, too


def starts(method: str, reward: str) -> dict[float, float]:
    """{target: the beta to begin with}."""
    about = zip(TARGETS[reward], getattr(METHODS[method], reward), strict=True)
    return {target: beta for target, beta in about if beta}


# --------------------------------------------------------------------------------------------------
# Questions: what each needs to have run, and the comparisons that it will be answered by


@dataclass(frozen=True)
class Curve:
    """Policies of one method along KL: those the search finds, and those of a grid of betas."""

    reward: str
    method: str
    K: int = 8  # completions compared at once
    labels: int = 0  # pairs that the reward model has learned from; 0: all
    targets: tuple = ()
    betas: tuple = ()
    seeds: int = 100  # the first of the run's, at most


@dataclass(frozen=True)
class Family:
    """Comparisons that Holm's correction takes together: for each quantity, pair and target, the
    pair's first (method, K) minus its second."""

    reward: str
    quantities: tuple = ()
    pairs: tuple = ()
    targets: tuple = ()

    def comparisons(self) -> list[tuple]:
        return [*itertools.product(self.quantities, self.pairs, self.targets)]


def pairs(methods: str, K: int = 8) -> tuple:
    """Of "a:b c:d" it makes (((a, K), (b, K)), ((c, K), (d, K)))."""
    return tuple(tuple((side, K) for side in pair.split(":")) for pair in methods.split())


LABELS = (128, 512, 0)  # of the reward models that are leaned on too hard
LEANING = ("exo-rw", "dpo-rw", "exo-online")  # the methods that lean
PULLS = (2.0, 0.7, 0.25, 0.08)  # betas, down to where a policy trusts its reward model most
KS = (2, 4, 8, 16)

EXO_DPO = pairs("exo-pref:dpo-pref exo-rw:dpo-rw exo-online:dpo-online exo-fast-pref:dpo-pref")
OWN = pairs("exo-online:exo-rw dpo-online:dpo-rw exo-online:ppo")
BY_K = tuple(pair for K in KS for pair in pairs("exo-rw:dpo-rw", K))
BY_K += tuple(((method, 16), (method, 2)) for method in ("exo-rw", "dpo-rw"))

ALONG = tuple(Curve("sentiment", m, targets=tuple(starts(m, "sentiment"))) for m in METHODS)
EACH_K = tuple(Curve("sentiment", m, K, targets=MIDDLE) for m in ("exo-rw", "dpo-rw") for K in KS)
MODAL = tuple(
    Curve("conviction", m, targets=TARGETS["conviction"])
    for m in METHODS
    if starts(m, "conviction")
)
GRID = tuple(
    Curve("sentiment", method, labels=n, betas=PULLS, seeds=3) for method in LEANING for n in LABELS
)
QUESTIONS = {  # name: (curves, the comparisons it will be answered by)
    "methods": (ALONG, Family("sentiment", ("oracle",), EXO_DPO, KLS)),
    "draws": (ALONG, Family("sentiment", ("oracle",), OWN, KLS)),
    "wins": (ALONG, Family("sentiment", ("win_rm", "win_oracle"), EXO_DPO[:2], KLS)),
    "K": (EACH_K, Family("sentiment", ("oracle",), BY_K, MIDDLE)),
    "modes": (MODAL, Family("conviction", ("opposed",), EXO_DPO[:3], TARGETS["conviction"])),
    "overoptimisation": (GRID, Family("sentiment")),  # nothing is tested
}


@dataclass(frozen=True)
class Matrix:
    """What is run, and how large."""

    questions: tuple = tuple(QUESTIONS)
    first_seed: int = 0
    seeds: int = 5
    fits: int = 4  # at most, for a target
    # how
    n_embd: int = 48
    n_layer: int = 2
    n_head: int = 4
    block_size: int = 96
    new: int = 44  # longest completion drawn; the grammar's longest is 41
    sft_rows: int = 100_000
    sft_iters: int = 4000
    sft_batch: int = 32
    sft_rate: float = 2e-3
    prompts: int = 400  # training prompts, with 16 completions of sft's each
    rated: int = 64  # completions in a step: rated / K groups, or half as many pairs
    steps: int = 100  # for ppo times its passes
    rm_iters: int = 400  # and at most eight times through the pairs
    judged: tuple = (64, 16)  # held-out prompts, and completions of each, that judge a policy
    pool: int = 256  # completions of each of them from sft, for the optimum

    def every_seed(self) -> range:
        return range(self.first_seed, self.first_seed + self.seeds)


FULL = Matrix()
QUICK = replace(FULL, questions=("modes",), seeds=1, fits=2)
QUICK = replace(QUICK, sft_rows=30_000, sft_iters=1500, rm_iters=200, judged=(32, 16), pool=64)
