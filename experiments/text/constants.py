"""
The text world's experiment in numbers.

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
- EXO and DPO have the same learning rate where they learn from the same: on a seed of its own, 1000
  (data, sft, labels, judged prompts), at two betas, the one of 1e-5, 3e-5, 1e-4, ... with which the
  two together had the highest share of what the optimum gains in oracle reward - beta KL, mean over
  betas and rewards. assets/text/tuning.json has every score; the search itself is not kept. One
  seed: differences of a few hundredths there are noise. A narrower model's rate is larger by as
  much as it is narrower. QUICK takes the same.
- Each seed has its own data, sft, labels and reward models. Standard errors are over seeds.
- All policies are judged on the first clauses of the same held-out reviews, with the same uniform
  numbers. Some of these clauses occur in other reviews too.
"""

from dataclasses import dataclass, replace

ENCODING = "experiments.text.reviews:encoding"
ORACLE = "experiments.text.reviews:{}"  # of a reward
METHODS = {  # name: (stage, what it learns from, learning rate at n_embd 48)
    "exo-pref": ("exo", "pairs", 3e-4),
    "dpo-pref": ("dpo", "pairs", 3e-4),
    "exo-rw": ("exo", "model", 1e-4),
    "dpo-rw": ("dpo", "model", 1e-4),
    "exo-rw-oracle": ("exo", "oracle", 1e-4),
    "dpo-rw-oracle": ("dpo", "oracle", 1e-4),
    "exo-online": ("exo", "own", 1e-3),
    "dpo-online": ("dpo", "own", 1e-3),
    "ppo": ("ppo", "own", 3e-4),
}
RM_RATE = 1e-3  # the reward model's learning rate, which was not swept
CALIBRATION = ("exo-rw-oracle", "dpo-rw-oracle")  # run at every width
DENSITY = (*CALIBRATION, "exo-pref", "dpo-pref")  # whose densities are told: seed 0, middle beta
SMOOTHING = 1e-3  # exo-pref's; see the top
PPO_EPOCHS = 2
BEST_OF = (1, 2, 4, 8, 16, 32, 64)
OPTIMUM_BETAS = tuple(2 ** (k / 2) for k in range(8, -7, -1))  # 16 ... 0.125
LEAST_ESS = 20  # the optimum's curve ends where fewer completions of the pool carry it
MADE_WITH = (RM_RATE, SMOOTHING, PPO_EPOCHS, BEST_OF, OPTIMUM_BETAS)  # what no field of Matrix says
SMALL_KL = 0.05  # where calibration is read, beside BUDGETS
BUDGETS = (0.1, 0.25, 0.5, 1.0, 2.0, 3.0)  # KLs at which methods are compared


@dataclass(frozen=True)
class Matrix:
    """What is run, and how large; every number is in results.json."""

    # methods x betas x seeds, with these
    betas: tuple = (("sentiment", (8.0, 2.0, 0.5)), ("conviction", (4.0, 1.0, 0.25)))
    methods: tuple = tuple(METHODS)
    seeds: int = 3
    widths: tuple = (8, 16)  # beside n_embd, of CALIBRATION
    # how
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
    rm_iters: int = 500  # and at most eight times through the pairs
    judged: tuple = (64, 16)  # held-out prompts, and completions of each, that judge a policy
    pool: int = 1024  # completions of each of them from sft, for the optimum and best-of-n


FULL = Matrix()
QUICK = replace(
    FULL,
    seeds=1,
    widths=(),
    sft_rows=50_000,
    sft_iters=2000,
    prompts=512,
    steps=64,
    rm_iters=200,
    judged=(32, 12),
    pool=512,
)
