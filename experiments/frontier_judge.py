"""
How policies are judged: draws on the held-out prompts, rated by the oracle and the reward model,
their wins against sft's draws and the chosen texts, and what is shown of them.
"""

import json
from pathlib import Path

import numpy as np
import torch

from data import get_encoding
from experiments import frontier_measure as measure
from experiments import reviews
from experiments.frontier import REWARDS
from methods.reward import load_reward

CPU = torch.device("cpu")
JUDGE_SEED = 22  # of the draws that are judged
DENSITY = 512  # completions of one prompt whose density ratio is told


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Judges:
    """The oracle and, where there is one, the reward model; sft's draws and the chosen texts on the
    held-out prompts, rated by each."""

    def __init__(self, out: Path, spec: dict):
        self.spec = spec
        labels = f"labels-{spec['reward']}-s{spec['seed']}-w{spec['n_embd']}"
        self.rewards = {"oracle": load_reward(REWARDS[spec["reward"]], CPU)}
        self.held = {"oracle": dict(np.load(out / "runs" / labels / "rewards.npz"))}
        if spec["rm"]:
            # all policies by the model of all pairs, also those that learned from fewer
            whole = f"rm-{spec['reward']}-s{spec['seed']}"
            self.rewards["rm"] = load_reward(str(out / "runs" / whole), CPU)
            self.held["rm"] = dict(np.load(out / "runs" / whole / "rewards.npz"))
        pairs = read_rows(out / "runs" / labels / "judge-pairs.jsonl")
        self.prompts = [r["prompt"] for r in read_rows(out / "runs" / spec["sft"] / "judge.jsonl")]
        own: dict[str, list[int]] = {prompt: [] for prompt in self.prompts}
        for i, pair in enumerate(pairs):
            own[pair["prompt"]].append(i)
        self.chosen = [own[prompt] for prompt in self.prompts]  # pairs of each prompt

    def wins(self, judge: str, values: np.ndarray) -> dict[str, np.ndarray]:
        """{win_JUDGE_sft, win_JUDGE_chosen}, each (P, n): 1 for a win, a tie is half."""
        held = self.held[judge]
        chosen = [
            measure.win_values(v[None], held["chosen"][ids][None])[0]
            if ids
            else np.full(len(v), np.nan)
            for v, ids in zip(values, self.chosen, strict=True)
        ]
        won = {f"win_{judge}_sft": measure.win_values(values, held["judge"])}
        return won | {f"win_{judge}_chosen": np.array(chosen)}

    def values(self, rated: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All that is averaged over completions: rewards and wins."""
        out = dict(rated)
        for judge, values in rated.items():
            out |= self.wins(judge, values)
        return out

    def draw(self, gpt, encoding: str, parts: int = 1):
        """Completions of the held-out prompts, and what each judge gives them: (Draws, {judge:
        (P, n)}). parts: n is so many times smaller."""
        n = max(1, self.spec["judged"][1] // parts)
        seed = 1000 * self.spec["seed"] + JUDGE_SEED
        drawn = measure.draw(gpt, encoding, self.prompts, n, self.spec["new"], seed)
        return drawn, {name: drawn.rate(reward) for name, reward in self.rewards.items()}

    def judge(self, gpt, sft, draws) -> dict:
        """A row of results: means and standard errors of what `draw` gave."""
        drawn, rated = draws
        values = self.values(rated) | measure.token_kl(gpt, sft, drawn.groups)
        row = {}
        for name, x in values.items():
            whole = x[~np.isnan(x).any(1)]
            row[name], row[f"{name}_stderr"] = measure.mean_stderr(whole)
        texts = [y for ys in drawn.texts for y in ys]
        row["distinct"] = len(set(texts)) / len(texts)
        odds = [reviews.log_odds(p + y) for p, y in zip(*drawn.flat(), strict=True)]
        whole = [x for x in odds if x is not None]
        row["producible"] = len(whole) / len(odds)
        row["praise"] = sum(x > 0 for x in whole) / max(1, len(whole))
        return row

    def samples(self, draws) -> list[dict]:
        """The best, a middling and the worst completion by the oracle, and the first one drawn."""
        drawn, rated = draws
        prompts, texts = drawn.flat()
        order = np.argsort(rated["oracle"].flatten(), kind="stable")
        which = {"best": order[-1], "middle": order[len(order) // 2], "worst": order[0], "first": 0}
        return [
            {"which": k, "prompt": prompts[i], "completion": texts[i]}
            | {judge: float(x.flatten()[i]) for judge, x in rated.items()}
            for k, i in which.items()
        ]


def density(out: Path, spec: dict, gpt, sft, judges: Judges) -> dict | None:
    """On one held-out prompt: log pi/sft of sft's pool, beside log pi*/sft = r / beta - log Z."""
    if spec["seed"] != 0 or spec["n_pairs"]:
        return None
    row = read_rows(out / "runs" / spec["sft"] / "pool.jsonl")[0]
    spell = get_encoding(spec["encoding"])
    builder = measure.Builder(spec["block_size"], spell.eot_token, measure.Report())
    prompt = spell.encode_ordinary(row["prompt"])
    room = spec["block_size"] - len(prompt)  # broken bytes are spelled longer when read again
    ids = [spell.encode_ordinary(y)[:room] for y in row["completions"][:DENSITY]]
    builder.put(prompt, ids, row["ended"][:DENSITY])
    groups = builder.groups()
    ratio = measure.sequence_logps(gpt, groups) - measure.sequence_logps(sft, groups)
    oracle = judges.held["oracle"]["pool"][0]
    log_z = float(np.logaddexp.reduce(oracle / spec["beta"]) - np.log(len(oracle)))
    best = oracle[: len(ratio[0])] / spec["beta"] - log_z
    return {
        "log_ratio": ratio[0].round(4).tolist(),
        "log_ratio_optimum": best.round(4).tolist(),
    }
