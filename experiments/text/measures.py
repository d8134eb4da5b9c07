"""
What is measured of policies, apart from how they are trained: draws on held-out prompts, rewards by
the oracle and the reward model, wins against sft's draws, which kind of review they are, and KL(pi
|| sft): along y ~ pi, the sum over tokens of the exact KL between the two next-token distributions,
whose mean is that of log pi(y) - log sft(y), and whose spread is much smaller.

The same of the optimum, pi* = sft exp(r / beta) / Z, on the same prompts, by self-normalised
importance sampling from N of sft's completions of each: w = softmax(r / beta), E[v] = sum w v, KL =
E[r] / beta - log mean exp(r / beta). How far to trust it says `ess`, 1 / mean of sum w^2.
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
from experiments.text.constants import BORDER, ENCODING
from model import GPT

JUDGE_SEED = 22  # of the draws that are judged


class Draws(NamedTuple):
    rows: list[dict]  # (P,) {"prompt", "completions", "ended"}: texts, and whether each ended
    prompts: list[list[int]]  # (P,) the same as token ids, none empty
    completions: list[list[list[int]]]  # (P, n) the last token is end-of-text where it ended


def draw(gpt: GPT, prompts: list[str], n: int, new: int, seed: int, encoding=ENCODING) -> Draws:
    """Of at most `new` tokens. The same seed gives every policy the same uniform numbers, token by
    token."""
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
def token_kl(policy: GPT, sft: GPT, prompts: list, completions: list, at_once=128) -> np.ndarray:
    """Per completion (P, n), token ids as in Draws: the exact KL between the next-token
    distributions, summed over its tokens."""
    texts = [(p, y) for p, ys in zip(prompts, completions, strict=True) for y in ys]
    lengths = torch.tensor([len(p) + len(y) for p, y in texts])
    total = torch.zeros(len(texts), dtype=torch.float64)
    for some in lengths.argsort().split(at_once):  # of like length: less to pad
        own = [texts[i] for i in some]
        idx = pad_sequence([torch.tensor((p + y)[:-1]) for p, y in own], batch_first=True)
        scores = [torch.arange(len(p) + len(y) - 1) >= len(p) - 1 for p, y in own]
        scored = pad_sequence(scores, batch_first=True)  # (B, T) False where padded, too
        log_pi, log_sft = (F.log_softmax(gpt(idx)[scored].double(), -1) for gpt in (policy, sft))
        kl = (log_pi.exp() * (log_pi - log_sft)).sum(-1)  # (S,)
        total.index_add_(0, some.repeat_interleave(scored.sum(-1)), kl)
    return total.view(len(prompts), -1).numpy()


# --------------------------------------------------------------------------------------------------
# What a text is worth, (P, n) arrays


def odds(rows: list[dict]) -> np.ndarray:
    """Log-odds of a happy reviewer; NaN where nobody can write the text."""
    prompts, texts, _ = flat(rows)
    found = [reviews.log_odds(p + y) for p, y in zip(prompts, texts, strict=True)]
    return np.array(found, dtype=float).reshape(len(rows), -1)  # None is NaN


def kinds(log_odds: np.ndarray) -> dict[str, np.ndarray]:
    """1 where a text is well formed, and where it is praise, a pan, or neither and so mixed."""
    shares = {
        "well_formed": ~np.isnan(log_odds),
        "praise": log_odds > BORDER,
        "pan": log_odds < -BORDER,
        "mixed": np.abs(log_odds) <= BORDER,
    }
    return {name: x.astype(float) for name, x in shares.items()}


def wins(values: np.ndarray, against: np.ndarray) -> np.ndarray:
    """The share of `against` (P, M) that each of values (P, N) beats; a tie is half."""
    out = np.empty(values.shape)
    for p, (v, a) in enumerate(zip(values, np.sort(against, 1), strict=True)):
        lower, upper = (np.searchsorted(a, v, side) for side in ("left", "right"))
        out[p] = (lower + upper) / 2 / len(a)
    return out


def opposed(praise: np.ndarray, pan: np.ndarray) -> float:
    """The share of pairs of texts (P, n) on one prompt that are praise and a pan: half of many
    where a policy has both modes evenly, none where it has one, on every prompt by itself."""
    n = praise.shape[1]
    return float(2 * (praise.sum(1) * pan.sum(1)).mean() / (n * (n - 1)))


def worth(oracle: np.ndarray, rm: np.ndarray, log_odds: np.ndarray, held: dict) -> dict:
    """All that is averaged over texts. `held`: the two rewards of sft's own draws."""
    out = {"oracle": oracle, "rm": rm, **kinds(log_odds)}
    return out | {f"win_{judge}": wins(out[judge], held[judge]) for judge in ("oracle", "rm")}


# --------------------------------------------------------------------------------------------------
# The optimum


def optimum(reward: np.ndarray, beta: float, values: dict[str, np.ndarray]) -> dict[str, float]:
    """The mean over prompts of E_pi*[v] for each v in values (P, N), `kl` and `ess` of pi*, and
    where the kinds are told, the share of pairs of its texts that are `opposed`."""
    scaled, N = reward / beta, reward.shape[1]
    log_z = np.logaddexp.reduce(scaled, 1) - math.log(N)  # (P,)
    w = np.exp(scaled - log_z[:, None]) / N
    means = {name: (w * v).sum(1) for name, v in values.items()}
    means["kl"] = (w * scaled).sum(1) - log_z
    if "pan" in means:
        means["opposed"] = 2 * means["praise"] * means["pan"]
    out = {name: float(x.mean()) for name, x in means.items()}
    return out | {"ess": float(1 / (w**2).sum(1).mean())}


def optimum_at(reward: np.ndarray, kl: float, values: dict[str, np.ndarray]) -> dict[str, float]:
    """The same at the beta where the optimum has this KL, by bisection."""
    low, high = 1e-3, 1e4
    for _ in range(60):
        beta = math.sqrt(low * high)
        far = optimum(reward, beta, {})["kl"] > kl
        low, high = (beta, high) if far else (low, beta)
    return {"beta": beta, **optimum(reward, beta, values)}


def judge(runs: Path, spec: dict, gpt: GPT, texts: Path) -> dict[str, float]:
    """Means over draws of this policy on the held-out prompts, which are kept in the file."""
    rm, n = runs / spec["rm"], spec["judged"][1]
    prompts = [row["prompt"] for row in stages.read_rows(runs / spec["sft"] / "judge.jsonl")]
    draws = draw(gpt, prompts, n, spec["new"], 1000 * spec["seed"] + JUDGE_SEED)
    stages.write_rows(texts, draws.rows)
    log_odds, held = odds(draws.rows), dict(np.load(rm / "judge.npz"))
    rewards = reviews.reward(spec["reward"], log_odds), rate(stages.judge(rm), draws.rows)
    values = worth(*rewards, log_odds, held)
    row = {name: float(x.mean()) for name, x in values.items()}
    row["opposed"] = opposed(values["praise"], values["pan"])
    sft = stages.policy(runs / spec["sft"])
    kl = token_kl(gpt, sft, draws.prompts, draws.completions)
    row["kl"], row["kl_error"] = mean_se(kl.mean(1))  # prompts are the unit
    return row
