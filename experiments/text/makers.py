"""
How each piece is made: files for a stage of train.py, the stage, the judgement.

    sft     data -> train.py sft -> completions, their log-odds, pairs labelled by the oracle
    rm      train.py reward on the first pairs -> its rewards of completions; sft as judged; pi*
    fit     train.py exo, dpo or ppo at one beta -> draws on the held-out prompts, judged

A maker takes (the folder of all run folders, the piece's name, its settings), works in the run
folder of that name, and returns what its result.json will hold.
"""

import math
import random
from pathlib import Path

import numpy as np

from experiments.text import constants, measures, reviews, stages

SFT_SEED, POOL_SEED, LABEL_SEED = 11, 33, 44  # which draws these are
DRAWN = ("train", "judge", "pool")  # sft's, each in a file NAME.jsonl
EACH = max(constants.KS)  # completions of a training prompt
HELD_OUT = 500  # rows beside the training rows


def make_sft(runs: Path, name: str, spec: dict) -> dict:
    """Every seed reads other reviews."""
    folder, seed = runs / name, spec["seed"]
    rows = reviews.rows(spec["sft_rows"] + HELD_OUT, seed)
    train, held = rows[:-HELD_OUT], rows[-HELD_OUT:]
    stages.write_rows(folder / "sft.jsonl", train)
    stages.write_rows(folder / "held_out.jsonl", held)
    stages.run(folder, sft_argv(folder, spec))
    prompts = [row["prompt"] for row in random.Random(seed).sample(train, spec["prompts"])]
    judged = [row["prompt"] for row in held[: spec["judged"][0]]]
    draws = {
        "train": (prompts, EACH, SFT_SEED),
        "judge": (judged, spec["judged"][1], measures.JUDGE_SEED + 1),  # not the policies' numbers
        "pool": (judged, spec["pool"], POOL_SEED),
    }
    gpt = stages.policy(folder)
    drawn = {
        what: measures.draw(gpt, own, n, spec["new"], 1000 * seed + which).rows
        for what, (own, n, which) in draws.items()
    }
    for what, own in drawn.items():
        stages.write_rows(folder / f"{what}.jsonl", own)
    log_odds = {what: measures.odds(own) for what, own in drawn.items()}
    np.savez(folder / "odds.npz", **log_odds)
    for reward in reviews.UNPRODUCIBLE:
        rewards = reviews.reward(reward, log_odds["train"])
        pairs = bradley_terry(drawn["train"], rewards, LABEL_SEED + seed)
        stages.write_rows(folder / f"pairs-{reward}.jsonl", pairs)
    stages.write_rows(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    return {}


def sft_argv(folder: Path, spec: dict) -> list:
    iters = spec["sft_iters"]
    argv = ["sft", "--data", folder / "sft.jsonl", "--eval_data", folder / "held_out.jsonl"]
    argv += ["--init_std", spec["n_embd"] ** -0.5]
    for size in ("n_layer", "n_head", "n_embd", "block_size"):
        argv += [f"--{size}", spec[size]]
    argv += ["--batch_size", spec["sft_batch"], "--learning_rate", spec["sft_rate"]]
    argv += ["--max_iters", iters, "--eval_interval", max(1, iters // 4)]
    return [*argv, "--seed", spec["seed"]]


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


def make_rm(runs: Path, name: str, spec: dict) -> dict:
    folder, sft = runs / name, runs / spec["sft"]
    pairs = stages.read_rows(sft / f"pairs-{spec['reward']}.jsonl")
    pairs = pairs[: spec["labels"] or len(pairs)]
    stages.write_rows(folder / "pairs.jsonl", pairs)
    stages.run(folder, reward_argv(folder, sft, len(pairs), spec))
    reward = stages.judge(folder)
    drawn = {what: stages.read_rows(sft / f"{what}.jsonl") for what in DRAWN}
    rm = {what: measures.rate(reward, rows) for what, rows in drawn.items()}
    for K in constants.KS:
        stages.write_rows(folder / f"K{K}.jsonl", groups(drawn["train"], rm["train"], K))
    log_odds = dict(np.load(sft / "odds.npz"))
    oracle = {what: reviews.reward(spec["reward"], x) for what, x in log_odds.items()}
    held = {"oracle": oracle["judge"], "rm": rm["judge"]}
    np.savez(folder / "judge.npz", **held)
    values = measures.worth(oracle["pool"], rm["pool"], log_odds["pool"], held)
    optima = [
        {"target": kl, **measures.optimum_at(values["oracle"], kl, values)}
        for kl in constants.TARGETS[spec["reward"]]
    ]
    a, b = (np.sign(x["judge"][:, ::2] - x["judge"][:, 1::2]) for x in (rm, oracle))
    start = measures.judge(runs, spec, stages.policy(sft), folder / "drawn.jsonl")
    return {"start": start | {"rm_accuracy": float((0.5 + a * b / 2).mean())}, "optimum": optima}


def reward_argv(folder: Path, sft: Path, n_pairs: int, spec: dict) -> list:
    size = spec["rated"] // 2
    iters = max(1, min(spec["rm_iters"], 8 * n_pairs // size))
    argv = ["reward", "--data", folder / "pairs.jsonl", "--init", sft, "--eval_interval", iters]
    argv += ["--batch_size", size, "--learning_rate", constants.RM_RATE]
    return [*argv, "--max_iters", iters, "--seed", spec["seed"]]


def groups(rows: list[dict], rewards: np.ndarray, K: int) -> list[dict]:
    """Every prompt's rated completions, cut into groups of K: the same texts for every K."""
    return [
        {"prompt": row["prompt"], "completions": texts[i : i + K], "rewards": r[i : i + K].tolist()}
        for row, r in zip(rows, rewards, strict=True)
        for texts in (row["completions"],)
        for i in range(0, len(texts), K)
    ]


def make_fit(runs: Path, name: str, spec: dict) -> dict:
    folder = runs / name
    stages.run(folder, policy_argv(runs, spec))
    return measures.judge(runs, spec, stages.policy(folder), folder / "drawn.jsonl")


def policy_argv(runs: Path, spec: dict) -> list:
    """The command line of a method at one beta."""
    loss, source, rate = spec["stage"], spec["source"], spec["rate"]
    sft, rm, beta = runs / spec["sft"], runs / spec["rm"], spec["beta"]
    steps = spec["steps"] * (constants.PPO_EPOCHS if loss == "ppo" else 1)
    argv = [loss, "--init", sft, "--max_iters", steps, "--eval_interval", steps]
    argv += ["--learning_rate", rate, "--kl_samples", 0, "--seed", spec["seed"]]
    if source == "pairs":
        if loss == "exo":
            beta *= math.log((1 - constants.SMOOTHING) / constants.SMOOTHING) / 2
            argv += ["--label_smoothing", constants.SMOOTHING]
        argv += ["--data", sft / f"pairs-{spec['reward']}.jsonl", "--beta_pi", beta]
        return [*argv, "--batch_size", spec["rated"] // 2]
    argv += ["--batch_size", spec["rated"] // spec["K"]]
    if source == "model":
        return [*argv, "--data", rm / f"K{spec['K']}.jsonl", "--beta_pi", 1.0, "--beta_r", beta]
    argv += ["--data", sft / "prompts.jsonl", "--reward", rm]
    argv += ["--K", spec["K"], "--max_new_tokens", spec["new"]]
    if loss == "ppo":
        return [*argv, "--kl_coef", beta, "--ppo_epochs", constants.PPO_EPOCHS]
    return [*argv, "--online", "--beta_pi", 1.0, "--beta_r", beta]


MAKERS = {"sft": make_sft, "rm": make_rm, "fit": make_fit}
