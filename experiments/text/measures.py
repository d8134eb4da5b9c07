"""
What is measured of policies, apart from how they are trained: draws on held-out prompts and their
exact per-token KL, rewards by the oracle and the reward model, wins against sft's draws and the
chosen texts, and two limits: the optimum by importance sampling, and best-of-n.

The limits come from one pool of N completions of sft per prompt, drawn once:

    optimum      pi* = sft exp(r / beta) / Z by self-normalised importance sampling, prompt by
                 prompt: w = softmax(r / beta), E[r] = sum w r, KL = E[r] / beta - log mean
                 exp(r / beta). Its effective sample size, 1 / mean of sum w^2, says how
                 far to trust it.
    best-of-n    the mean over all n-subsets of the pool: the j-th lowest of N is the best of
                 C(j-1, n-1) of C(N, n) subsets. Unbiased for any n <= N. Its KL is at most
                 log n - (n - 1) / n, with equality where no two completions tie.

Both use the prompts that policies are judged on, so that no difference between prompts enters.

KL(pi || sft) of a policy: along y ~ pi, the sum over tokens of the exact KL between the two
next-token distributions. Its mean is that of log pi(y) - log sft(y), its spread much smaller.
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from data import get_encoding
from experiments.common import mean_se
from experiments.text import reviews, stages
from experiments.text.constants import ENCODING, ORACLE
from model import GPT

JUDGE_SEED = 22  # of the draws that are judged
DENSITY_TEXTS = 512  # completions of one prompt whose density ratio is told

# --------------------------------------------------------------------------------------------------
# Draws


class Draws(NamedTuple):
    """n completions of each of P prompts."""

    rows: list[dict]  # (P,) {"prompt", "completions", "ended"}: texts, and whether each ended
    prompts: list[list[int]]  # (P,) the same as token ids, none empty
    completions: list[list[list[int]]]  # (P, n) the last token is end-of-text where it ended


def draw(
    gpt: GPT, prompts: list[str], n: int, new: int, seed: int, encoding: str = ENCODING
) -> Draws:
    """n completions of each prompt, of at most `new` tokens. The same seed gives every policy the
    same uniform numbers, token by token."""
    spell, generator = get_encoding(encoding), torch.Generator().manual_seed(seed)
    eot, size = spell.eot_token, max(1, 1024 // n)  # prompts at once
    ids = [i or [eot] for i in spell.encode_ordinary_batch(prompts)]
    drawn = []
    for start in range(0, len(ids), size):
        drawn += gpt.generate(ids[start : start + size], new, n, eot=eot, generator=generator)
    completions = [drawn[i : i + n] for i in range(0, len(drawn), n)]
    rows = []
    for prompt, ys in zip(prompts, completions, strict=True):
        ended = [y[-1] == eot for y in ys]
        texts = [spell.decode(y[:-1] if e else y) for y, e in zip(ys, ended, strict=True)]
        rows.append({"prompt": prompt, "completions": texts, "ended": ended})
    return Draws(rows, ids, completions)


def flat(rows: list[dict]) -> tuple[list[str], list[str], list[bool]]:
    """(prompts, completions, whether each ended) of rows as Draws has them, each P * n long."""
    prompts = [row["prompt"] for row in rows for _ in row["completions"]]
    texts = [text for row in rows for text in row["completions"]]
    return prompts, texts, [ended for row in rows for ended in row["ended"]]


def rate(reward, rows: list[dict]) -> np.ndarray:
    """(P, n) by a function as stages.judge gives it."""
    return reward(*flat(rows)).numpy().reshape(len(rows), -1)


@torch.no_grad()
def token_kl(
    policy: GPT, sft: GPT, prompts: list[list[int]], completions: list, at_once: int = 128
) -> dict[str, np.ndarray]:
    """Per completion (P, n), token ids as in Draws: `kl`, summed over its tokens' exact
    distributions, and `k1`, its log pi - log sft."""
    texts = [(p, y) for p, ys in zip(prompts, completions, strict=True) for y in ys]
    parts = []
    for start in range(0, len(texts), at_once):
        some = texts[start : start + at_once]
        tokens = pad_sequence([torch.tensor(p + y) for p, y in some], batch_first=True)
        scores = [torch.arange(len(p) + len(y) - 1) >= len(p) - 1 for p, y in some]
        scored = pad_sequence(scores, batch_first=True)  # (B, T) False where padded, too
        idx, targets = tokens[:, :-1], tokens[:, 1:]  # (B, T)
        log_pi, log_sft = (F.log_softmax(gpt(idx).double(), -1) for gpt in (policy, sft))
        ratio = log_pi - log_sft  # (B, T, V)
        values = {
            "kl": (log_pi.exp() * ratio).sum(-1),
            "k1": ratio.gather(-1, targets[..., None])[..., 0],
        }
        parts.append({name: (x * scored).sum(-1) for name, x in values.items()})
    shape = (len(prompts), -1)
    return {k: torch.cat([part[k] for part in parts]).view(shape).numpy() for k in parts[0]}


# --------------------------------------------------------------------------------------------------
# Limits, from a pool (P, N) of values


def optimum(reward: np.ndarray, beta: float, values: dict[str, np.ndarray]) -> dict[str, float]:
    """The mean over prompts of E_pi*[v] for each v in values, and `kl` and `ess` of pi*."""
    scaled, N = reward / beta, reward.shape[1]
    log_z = np.logaddexp.reduce(scaled, 1) - math.log(N)  # (P,)
    w = np.exp(scaled - log_z[:, None]) / N
    out = {name: (w * v).sum(1).mean() for name, v in values.items()}
    kl = (w * scaled).sum(1) - log_z
    return out | {"kl": kl.mean(), "ess": 1 / (w**2).sum(1).mean()}


def best_of_n(score: np.ndarray, n: int, values: dict[str, np.ndarray]) -> dict[str, float]:
    """The mean over prompts of each value at the best of n by `score` (P, N), and its `kl` bound.

    Ties are broken evenly: tied completions share their ranks' weights.
    """
    N = score.shape[1]
    j = np.arange(N + 1)
    among = np.prod([(j - i) / (N - i) for i in range(n)], axis=0)  # C(j, n) / C(N, n)
    ranks = np.diff(among)  # (N,) how likely the j-th lowest is the best of n: it is <= j, not < j
    out = dict.fromkeys(values, 0.0)
    for p, s in enumerate(score):
        order = np.argsort(s, kind="stable")
        _, tie = np.unique(s[order], return_inverse=True)
        share = (np.bincount(tie, ranks) / np.bincount(tie))[tie]
        for name, v in values.items():
            out[name] += share @ v[p][order] / len(score)
    return out | {"kl": math.log(n) - (n - 1) / n}


def win_values(values: np.ndarray, against: np.ndarray) -> np.ndarray:
    """(P, N): the share of `against` (P, M) that each of values (P, N) beats; a tie is half."""
    out = np.empty(values.shape)
    for p, (v, a) in enumerate(zip(values, np.sort(against, 1), strict=True)):
        lower, upper = (np.searchsorted(a, v, side) for side in ("left", "right"))
        out[p] = (lower + upper) / 2 / len(a)
    return out


# --------------------------------------------------------------------------------------------------
# Judging a policy


class Judges:
    """The oracle and, where there is one, the reward model; and what each gives sft's draws and the
    chosen texts of held-out prompts."""

    def __init__(self, runs: Path, spec: dict):
        self.spec, folder = spec, runs / spec["labels"]
        self.rewards = {"oracle": stages.judge(ORACLE.format(spec["reward"]))}
        if spec["rm"]:
            self.rewards["rm"] = stages.judge(folder)
        self.held = {judge: dict(np.load(folder / f"{judge}.npz")) for judge in self.rewards}
        pairs = stages.read_rows(folder / "judge-pairs.jsonl")
        self.prompts = [x["prompt"] for x in stages.read_rows(runs / spec["sft"] / "judge.jsonl")]
        self.pairs = [
            [i for i, pair in enumerate(pairs) if pair["prompt"] == prompt]
            for prompt in self.prompts
        ]

    def values(self, rated: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All that is averaged over completions, (P, n) each: the rewards by each judge, and the
        share of sft's draws and of chosen texts that they beat; NaN where a prompt has no pair."""
        out = dict(rated)
        for judge, values in rated.items():
            held, chosen = self.held[judge], np.full(values.shape, np.nan)
            for p, pairs in enumerate(self.pairs):
                if pairs:
                    chosen[p] = win_values(values[[p]], held["chosen"][None, pairs])[0]
            out[f"win_{judge}_sft"] = win_values(values, held["judge"])
            out[f"win_{judge}_chosen"] = chosen
        return out

    def judge(self, gpt: GPT, sft: GPT, texts: Path) -> dict[str, float]:
        """Means over draws of this policy, which are kept in the file, and their standard errors,
        with prompts as the unit: they hold the spread between prompts, which all methods share."""
        n, seed = self.spec["judged"][1], 1000 * self.spec["seed"] + JUDGE_SEED
        draws = draw(gpt, self.prompts, n, self.spec["new"], seed)
        stages.write_rows(texts, draws.rows)
        rated = {name: rate(reward, draws.rows) for name, reward in self.rewards.items()}
        values = self.values(rated) | token_kl(gpt, sft, draws.prompts, draws.completions)
        row = {}
        for name, x in values.items():
            row[name], row[f"{name}_stderr"] = mean_se(x[~np.isnan(x).any(1)].mean(1))
        return row | forms(draws.rows)


def forms(rows: list[dict]) -> dict[str, float]:
    """Shares of well-formed texts, and of praise among these."""
    prompts, texts, _ = flat(rows)
    odds = [reviews.log_odds(p + y) for p, y in zip(prompts, texts, strict=True)]
    whole = [x for x in odds if x is not None]
    return {
        "producible": len(whole) / len(odds),
        "praise": sum(x > 0 for x in whole) / max(1, len(whole)),
    }


def density(runs: Path, spec: dict, gpt: GPT, sft: GPT) -> dict[str, list[float]]:
    """On one held-out prompt: log pi/sft of sft's pool, beside log pi*/sft = r / beta - log Z."""
    row, spell = stages.read_rows(runs / spec["sft"] / "pool.jsonl")[0], get_encoding(ENCODING)
    prompt = spell.encode_ordinary(row["prompt"])
    room = spec["block_size"] - len(prompt)  # broken bytes are spelled longer when read again
    completions = [
        spell.encode_ordinary(text)[:room] + [spell.eot_token] * ended
        for text, ended in zip(row["completions"], row["ended"], strict=True)
    ]
    ratio = token_kl(gpt, sft, [prompt], [completions[:DENSITY_TEXTS]])["k1"][0]
    scaled = np.load(runs / spec["labels"] / "oracle.npz")["pool"][0] / spec["beta"]
    best = scaled - (np.logaddexp.reduce(scaled) - np.log(len(scaled)))
    best = best[: len(ratio)]
    return {"log_ratio": ratio.round(4).tolist(), "log_ratio_optimum": best.round(4).tolist()}
