"""
What the frontier measures, apart from how policies are trained: draws and their exact per-token
KL, the optimum by importance sampling, best-of-n, win rates, and reading a frontier at a given KL.

Two limits come from one pool of N completions of sft per prompt, drawn once:

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
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from data import Builder, Groups, Report, collate, get_encoding
from model import GPT, packed_hidden, to_cells

# --------------------------------------------------------------------------------------------------
# Draws


class Draws(NamedTuple):
    """n completions of each of P prompts."""

    prompts: list[str]  # (P,)
    texts: list[list[str]]  # (P, n)
    groups: Groups  # (P,) the same as token ids, K = n

    def flat(self) -> tuple[list[str], list[str]]:
        """(prompts, completions), each P * n long."""
        pairs = [(p, y) for p, ys in zip(self.prompts, self.texts, strict=True) for y in ys]
        return [p for p, _ in pairs], [y for _, y in pairs]

    def rate(self, reward) -> np.ndarray:
        """(P, n) by a function as load_reward gives it."""
        ended = self.groups.ended[self.groups.grid(np.arange(len(self.prompts)))[0]]
        values = reward(*self.flat(), ended.flatten().tolist())
        return values.numpy().reshape(len(self.prompts), -1)


def draw(
    gpt: GPT, encoding: str, prompts: list[str], n: int, new: int, seed: int, rows: int = 1024
) -> Draws:
    """n completions of each prompt, of at most `new` tokens. The same seed gives every policy the
    same uniform numbers, token by token."""
    spell, generator = get_encoding(encoding), torch.Generator().manual_seed(seed)
    eot = spell.eot_token
    builder, texts = Builder(gpt.config.block_size, eot, Report()), []
    ids = [i or [eot] for i in spell.encode_ordinary_batch(prompts)]
    size = max(1, rows // n)
    for start in range(0, len(ids), size):
        chunk = ids[start : start + size]
        drawn = gpt.generate(chunk, new, n, eot=eot, generator=generator)
        for i, prompt in enumerate(chunk):
            own = drawn[i * n : (i + 1) * n]
            ended = [y[-1] == eot for y in own]
            own = [y[:-1] if whole else y for y, whole in zip(own, ended, strict=True)]
            builder.put(prompt, own, ended)
            texts.append([spell.decode(y) for y in own])
    return Draws(prompts, texts, builder.groups())


def chunks(groups: Groups, rows: int = 128):
    """Batches of about so many completions, in order."""
    size = max(1, rows // max(1, len(groups.completions(0))))
    for start in range(0, len(groups), size):
        yield collate(groups, np.arange(start, min(start + size, len(groups))))


@torch.no_grad()
def token_kl(policy: GPT, sft: GPT, groups: Groups) -> dict[str, np.ndarray]:
    """Per completion (P, n): `kl`, `entropy` summed over its tokens' exact distributions; `k1`, its
    log pi - log sft; `tokens`, how many were scored."""
    parts = []
    for batch in chunks(groups):
        log_pi, log_sft = (
            F.log_softmax(gpt.head(packed_hidden(gpt, batch)).double(), -1) for gpt in (policy, sft)
        )
        pi, own = log_pi.exp(), batch.targets[:, None]
        values = {
            "kl": (pi * (log_pi - log_sft)).sum(-1),
            "entropy": -(pi * log_pi).sum(-1),
            "k1": (log_pi - log_sft).gather(1, own)[:, 0],
            "tokens": torch.ones(len(own), dtype=torch.float64),
        }
        parts.append({name: to_cells(x, batch).sum(-1) for name, x in values.items()})
    return {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}


@torch.no_grad()
def sequence_logps(gpt: GPT, groups: Groups) -> np.ndarray:
    """(P, n) log pi of whole completions."""
    parts = []
    for batch in chunks(groups):
        logs = F.log_softmax(gpt.head(packed_hidden(gpt, batch)).double(), -1)
        parts.append(to_cells(logs.gather(1, batch.targets[:, None])[:, 0], batch).sum(-1))
    return torch.cat(parts).numpy()


# --------------------------------------------------------------------------------------------------
# Limits, from a pool (P, N) of values


def optimum(reward: np.ndarray, beta: float, values: dict[str, np.ndarray]) -> dict[str, float]:
    """The mean over prompts of E_pi*[v] for each v in values, and `kl` and `ess` of pi*."""
    logits = torch.from_numpy(np.ascontiguousarray(reward, dtype=np.float64)) / beta
    log_z = torch.logsumexp(logits, 1) - math.log(reward.shape[1])
    w = torch.softmax(logits, 1).numpy()
    kl = (w * reward).sum(1) / beta - log_z.numpy()
    out = {name: float((w * v).sum(1).mean()) for name, v in values.items()}
    return out | {"kl": float(kl.mean()), "ess": float(1 / (w**2).sum(1).mean())}


def best_weights(N: int, n: int) -> np.ndarray:
    """(N,) how likely the j-th lowest of N is the best of n of them, drawn without replacement."""
    j = np.arange(1, N + 1)
    log_choose = [math.lgamma(a + 1) - math.lgamma(a - n + 1) if a >= n else -math.inf for a in j]
    w = np.exp(np.array(log_choose) - log_choose[-1])  # C(j, n) / C(N, n): the best is <= j
    return np.diff(w, prepend=0.0)


def best_of_n(score: np.ndarray, n: int, values: dict[str, np.ndarray]) -> dict[str, float]:
    """The mean over prompts of each value at the best of n by `score` (P, N), and its `kl` bound.

    Ties are broken evenly: tied completions share their ranks' weights.
    """
    ranks = best_weights(score.shape[1], n)
    out = dict.fromkeys(values, 0.0)
    for p, s in enumerate(score):
        order = np.argsort(s, kind="stable")
        _, tie = np.unique(s[order], return_inverse=True)
        share = (np.bincount(tie, ranks) / np.bincount(tie))[tie]
        for name, v in values.items():
            out[name] += float(share @ v[p][order]) / len(score)
    return out | {"kl": math.log(n) - (n - 1) / n}


def win_values(values: np.ndarray, against: np.ndarray) -> np.ndarray:
    """(P, N): the share of `against` (P, M) that each of values (P, N) beats; a tie is half."""
    out = np.empty(values.shape)
    for p, (v, a) in enumerate(zip(values, np.sort(against, 1), strict=True)):
        lower, upper = (np.searchsorted(a, v, side) for side in ("left", "right"))
        out[p] = (lower + upper) / 2 / len(a)
    return out


def mean_stderr(x: np.ndarray) -> tuple[float, float]:
    """Mean of (P, n), and its standard error with prompts as the unit: it holds the spread between
    prompts too, which all methods share."""
    own = x.mean(1)
    return float(own.mean()), float(own.std(ddof=1) / math.sqrt(len(own))) if len(own) > 1 else 0.0


# --------------------------------------------------------------------------------------------------
# Reading a frontier


def at_kl(points: list[tuple[float, float]], kl: float) -> float:
    """A quantity where a frontier, (KL, quantity) points, crosses this KL; NaN beyond its ends.

    Interpolated linearly in sqrt(KL): near sft the reward of an optimal policy grows like it, so
    that a curve which starts at (0, sft) is not cut short by its chord.
    """
    if not points:
        return math.nan
    x, y = zip(*sorted(points), strict=True)
    root = np.sqrt(np.maximum(x, 0.0))
    return float(np.interp(math.sqrt(kl), root, y, left=math.nan, right=math.nan))
