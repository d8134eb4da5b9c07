"""
How each piece is made: files for a stage of train.py, the stage, the judgement.

    sft      data -> train.py sft -> completions of the training prompts and of the held-out ones
    labels   the oracle's rewards of all completions, Bradley-Terry labels for pairs of them, and
             train.py reward on the pairs -> its rewards of all completions. The optimum's frontier
             and best-of-n, from a large pool of sft's completions; sft judged as the policies are
    policy   train.py exo, dpo or ppo -> draws on the held-out prompts, by oracle and model

A maker takes (the folder of all run folders, the piece's name, its settings), works in the run
folder of that name, and returns rows for the lists of results.json. Text drawn from sft lies in its
folder, in the files DRAWN; a reward model lies among the labels that it learned from.
"""

import math
import random
from pathlib import Path

import numpy as np

from experiments.text import constants, measures, reviews, stages
from infra.rows import replacing

SFT_SEED, POOL_SEED, LABEL_SEED = 11, 33, 44  # which draws these are
DRAWN = ("train", "judge", "pool")
HELD_OUT = 500  # rows beside the training rows

# --------------------------------------------------------------------------------------------------
# sft and what it writes


def make_sft(runs: Path, name: str, spec: dict) -> dict:
    """Seeds read different reviews, and widths the same."""
    folder, seed, (n_judged, n) = runs / name, spec["seed"], spec["judged"]
    rows = reviews.rows(spec["sft_rows"] + HELD_OUT, seed)
    train, held = rows[:-HELD_OUT], rows[-HELD_OUT:]
    stages.write_rows(folder / "sft.jsonl", train)
    stages.write_rows(folder / "held_out.jsonl", held)
    stages.run(folder, sft_argv(folder, spec))
    some = random.Random(seed).sample(train, spec["prompts"])
    draws = {
        "train": (some, spec["K"], SFT_SEED),
        "judge": (held[:n_judged], n, measures.JUDGE_SEED + 1),  # not the policies' numbers
        "pool": (held[:n_judged], spec["pool"], POOL_SEED),
    }
    gpt = stages.policy(folder)
    for what, (own, n, which) in draws.items():
        prompts = [row["prompt"] for row in own]
        drawn = measures.draw(gpt, prompts, n, spec["new"], 1000 * seed + which)
        stages.write_rows(folder / f"{what}.jsonl", drawn.rows)
    return {}


def sft_argv(folder: Path, spec: dict) -> list:
    iters, width = spec["sft_iters"], spec["n_embd"]
    argv = ["sft", "--data", folder / "sft.jsonl", "--eval_data", folder / "held_out.jsonl"]
    argv += ["--init_std", width**-0.5, "--seed", spec["seed"]]
    for size in ("n_layer", "n_head", "n_embd", "block_size"):
        argv += [f"--{size}", spec[size]]
    argv += ["--batch_size", spec["sft_batch"], "--learning_rate", spec["sft_rate"] * 48 / width]
    return [*argv, "--max_iters", iters, "--eval_interval", max(1, iters // 4)]


# --------------------------------------------------------------------------------------------------
# Labels, a reward model, and the limits that policies are compared with


def make_labels(runs: Path, name: str, spec: dict) -> dict:
    folder, reward = runs / name, stages.judge(constants.ORACLE.format(spec["reward"]))
    drawn = {what: stages.read_rows(runs / spec["sft"] / f"{what}.jsonl") for what in DRAWN}
    rated = {what: measures.rate(reward, rows) for what, rows in drawn.items()}
    train, judge = (
        bradley_terry(drawn[what], rated[what], LABEL_SEED + spec["seed"]) for what in DRAWN[:2]
    )
    stages.write_rows(folder / "train-pairs.jsonl", train)
    stages.write_rows(folder / "judge-pairs.jsonl", judge)
    stages.write_rows(folder / "prompts.jsonl", [{"prompt": x["prompt"]} for x in drawn["train"]])
    keep_rates(folder / "oracle", reward, drawn, rated, judge)
    if spec["rm"]:
        stages.run(folder, reward_argv(runs, folder, len(train), spec))
        reward = stages.judge(folder)
        rated = {what: measures.rate(reward, rows) for what, rows in drawn.items()}
        keep_rates(folder / "rm", reward, drawn, rated, judge)
    return limits(runs, folder, spec)


def bradley_terry(rows: list[dict], rewards: np.ndarray, seed: int) -> list[dict]:
    """Neighbours of each row as labelled pairs. The first pair of every prompt, then the second of
    every prompt: the first n pairs are what n labels would have bought."""
    rng, pairs = random.Random(seed), []
    for j in range(0, rewards.shape[1] - 1, 2):
        for row, r in zip(rows, rewards, strict=True):
            a, b = row["completions"][j : j + 2]
            first_wins = rng.random() < 1 / (1 + np.exp(r[j + 1] - r[j]))
            if a != b:
                chosen, rejected = (a, b) if first_wins else (b, a)
                pairs.append({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected})
    return pairs


def keep_rates(path: Path, reward, drawn: dict, rated: dict, pairs: list[dict]) -> None:
    """A judge's rewards of what sft drew: as rows to learn from, and as arrays to compare with,
    beside those of the chosen texts of held-out pairs."""
    chosen = reward([pair["prompt"] for pair in pairs], [pair["chosen"] for pair in pairs])
    with replacing(path.with_suffix(".npz")) as temporary, open(temporary, "wb") as file:
        np.savez(file, **rated, chosen=chosen.numpy())
    rows = [
        {"prompt": row["prompt"], "completions": row["completions"], "rewards": r.tolist()}
        for row, r in zip(drawn["train"], rated["train"], strict=True)
    ]
    stages.write_rows(path.with_suffix(".jsonl"), rows)


def reward_argv(runs: Path, folder: Path, n_pairs: int, spec: dict) -> list:
    size = 4 * spec["groups"]
    iters = max(1, min(spec["rm_iters"], 8 * n_pairs // size))
    argv = ["reward", "--data", folder / "train-pairs.jsonl", "--init", runs / spec["sft"]]
    argv += ["--eval_data", folder / "judge-pairs.jsonl", "--eval_interval", iters]
    argv += ["--batch_size", size, "--learning_rate", constants.RM_RATE]
    return [*argv, "--max_iters", iters, "--seed", spec["seed"]]


def limits(runs: Path, folder: Path, spec: dict) -> dict:
    """The optimum's frontier, best-of-n by each judge, and sft itself."""
    judges, sft = measures.Judges(runs, spec), stages.policy(runs / spec["sft"])
    pools = {judge: held["pool"] for judge, held in judges.held.items()}
    values = {k: v for k, v in judges.values(pools).items() if not np.isnan(v).any()}
    best = [
        {"method": method, "n": n, **measures.best_of_n(pools[judge], n, values)}
        for judge, method in (("rm", "best-of-n"), ("oracle", "best-of-n-oracle"))
        for n in constants.BEST_OF
        if judge in pools and n <= spec["pool"]
    ]
    optimum = [
        {"beta": beta, **measures.optimum(pools["oracle"], beta, values)}
        for beta in constants.OPTIMUM_BETAS
    ]
    start = judges.judge(sft, sft, folder / "drawn.jsonl")
    return {"start": [start], "optimum": optimum, "best_of_n": best}


# --------------------------------------------------------------------------------------------------
# Policies


def make_policy(runs: Path, name: str, spec: dict) -> dict:
    sft, folder = stages.policy(runs / spec["sft"]), runs / name
    stages.run(folder, policy_argv(runs, spec))
    gpt = stages.policy(folder)
    row = measures.Judges(runs, spec).judge(gpt, sft, folder / "drawn.jsonl")
    row |= {"n_pairs": None, "last": True}  # older rows: of fewer pairs, or on the way
    if not spec["density"]:
        return {"rows": [row]}
    return {"rows": [row], "density": [{"kl": row["kl"], **measures.density(runs, spec, gpt, sft)}]}


def policy_argv(runs: Path, spec: dict) -> list:
    """The command line of a method at one beta."""
    loss, source, _ = constants.METHODS[spec["method"]]
    labels, beta = runs / spec["labels"], spec["beta"]
    steps = spec["steps"] * (constants.PPO_EPOCHS if loss == "ppo" else 1)
    argv = [loss, "--init", runs / spec["sft"], "--max_iters", steps, "--eval_interval", steps]
    argv += ["--learning_rate", spec["rate"], "--kl_samples", 0, "--seed", spec["seed"]]
    if source == "pairs":
        if loss == "exo":
            beta *= math.log((1 - constants.SMOOTHING) / constants.SMOOTHING) / 2
            argv += ["--label_smoothing", constants.SMOOTHING]
        argv += ["--data", labels / "train-pairs.jsonl", "--beta_pi", beta]
        return [*argv, "--batch_size", spec["groups"] * spec["K"] // 2]  # as many completions
    argv += ["--batch_size", spec["groups"]]
    if source in ("model", "oracle"):
        data = labels / {"model": "rm.jsonl", "oracle": "oracle.jsonl"}[source]
        return [*argv, "--data", data, "--beta_pi", 1.0, "--beta_r", beta]
    argv += ["--data", labels / "prompts.jsonl", "--reward", labels]
    argv += ["--K", spec["K"], "--max_new_tokens", spec["new"]]
    if loss == "ppo":
        return [*argv, "--kl_coef", beta, "--ppo_epochs", constants.PPO_EPOCHS]
    return [*argv, "--online", "--beta_pi", 1.0, "--beta_r", beta]


MAKERS = {"sft": make_sft, "labels": make_labels, "policy": make_policy}
