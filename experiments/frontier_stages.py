"""
How each piece of the frontier is made: files for a stage of train.py, the stage, the judgement.

    sft      data -> train.py sft -> completions of the training prompts and of the held-out ones
    labels   the oracle's rewards of all completions, and Bradley-Terry labels for pairs of them
    rm       train.py reward on the pairs -> its rewards of all completions
    limits   the optimum's frontier and best-of-n, from a large pool of sft's completions; sft
             judged as the policies are
    policy   train.py exo, dpo or ppo -> draws on the held-out prompts, by oracle and model

A maker takes (OUT, the piece's name, its settings) and returns what its file will hold. Files live
in OUT/runs/NAME, arrays in .npz beside them. A stage that was stopped goes on from its checkpoint.
"""

import contextlib
import io
import json
import math
import random
import sys
from pathlib import Path

import numpy as np

import train
from experiments import frontier_measure as measure
from experiments import reviews
from experiments.frontier import (
    BEST_OF,
    METHODS,
    OPTIMUM_BETAS,
    PPO_EPOCHS,
    REWARDS,
    SMOOTHING,
)
from experiments.frontier_judge import CPU, JUDGE_SEED, Judges, density, read_rows
from infra.checkpoint import load_gpt
from infra.rows import InputError, replacing
from methods.reward import load_reward

SFT_SEED, POOL_SEED, LABEL_SEED = 11, 33, 44  # which draws these are
HELD_OUT = 500  # rows beside the training rows


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        temporary.write_text(text, encoding="utf-8")


def save_arrays(path: Path, **arrays) -> None:
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


class Tee(io.StringIO):
    """Keeps what is written, and passes it on."""

    def __init__(self, stream):
        super().__init__()
        self.stream = stream

    def write(self, text: str) -> int:
        self.stream.write(text)
        self.stream.flush()
        return super().write(text)


def stage(out: Path, argv: list) -> None:
    """Run a stage of train.py into `out`, or go on where it was stopped there."""
    argv = [*map(str, argv), "--out", str(out), "--device", "cpu"]
    said = Tee(sys.stderr)
    with contextlib.redirect_stderr(said):
        status = train.main(argv + ["--resume"] * (out / "ckpt.pt").exists())
    if status > 128:
        raise KeyboardInterrupt
    if status:
        why = said.getvalue().strip().splitlines()[-1:] or [f"status {status}"]
        raise InputError(f"the stage {argv[0]} in {out} failed: {why[0]}")
    (out / "best.pt").unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------
# From data to labels


def make_sft(out: Path, name: str, spec: dict) -> dict:
    folder, n, seed = out / "runs" / name, spec["sft_rows"], spec["seed"]
    # seeds read different reviews, and widths the same
    rows = reviews.rows(n + HELD_OUT, seed)
    held = rows[-HELD_OUT:]
    write_rows(folder / "sft.jsonl", rows[:-HELD_OUT])
    write_rows(folder / "held_out.jsonl", held)
    model = [x for k in ("n_layer", "n_head", "n_embd", "block_size") for x in (f"--{k}", spec[k])]
    iters, rate = spec["sft_iters"], spec["sft_rate"] * 48 / spec["n_embd"]
    argv = ["sft", "--data", folder / "sft.jsonl", "--eval_data", folder / "held_out.jsonl"]
    argv += ["--encoding", spec["encoding"], *model, "--max_iters", iters, "--seed", seed]
    argv += ["--batch_size", spec["sft_batch"], "--learning_rate", rate]
    argv += ["--init_std", spec["n_embd"] ** -0.5]
    stage(folder, [*argv, "--eval_interval", max(1, iters // 4)])

    gpt, ckpt = load_gpt(folder)
    rng = random.Random(seed)
    P, n_judged = spec["prompts"], spec["judged"][0]
    prompts = [row["prompt"] for row in rng.sample(rows[:-HELD_OUT], P)]
    judged = [row["prompt"] for row in held[:n_judged]]
    draws = {
        "train": (prompts, spec["K"], SFT_SEED),
        "judge": (judged, spec["judged"][1], JUDGE_SEED + 1),  # not the policies' numbers
        "pool": (judged, spec["pool"], POOL_SEED),
    }
    for what, (ps, k, s) in draws.items():
        drawn = measure.draw(gpt, ckpt["encoding"], ps, k, spec["new"], 1000 * seed + s)
        ended = drawn.groups.ended[drawn.groups.grid(np.arange(len(ps)))[0]].tolist()
        rows = zip(ps, drawn.texts, ended, strict=True)
        fields = ("prompt", "completions", "ended")
        write_rows(folder / f"{what}.jsonl", [dict(zip(fields, row, strict=True)) for row in rows])
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {"loss": [json.loads(x)["loss"] for x in lines if '"eval"' in x][-1]}


def rate(reward, rows: list[dict]) -> np.ndarray:
    """(P, n) rewards of rows as make_sft writes them."""
    prompts = [row["prompt"] for row in rows for _ in row["completions"]]
    texts = [y for row in rows for y in row["completions"]]
    ended = [e for row in rows for e in row["ended"]]
    return reward(prompts, texts, ended).numpy().reshape(len(rows), -1)


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


def make_labels(out: Path, name: str, spec: dict) -> dict:
    folder, oracle = out / "runs" / name, load_reward(REWARDS[spec["reward"]], CPU)
    arrays = {}
    for what in ("train", "judge", "pool"):
        rows = read_rows(out / "runs" / spec["sft"] / f"{what}.jsonl")
        arrays[what] = rate(oracle, rows)
        if what == "pool":
            break
        pairs = bradley_terry(rows, arrays[what], LABEL_SEED + spec["seed"])
        write_rows(folder / f"{what}-pairs.jsonl", pairs)
        if what == "train":
            write_rows(folder / "oracle.jsonl", with_rewards(rows, arrays[what]))
            write_rows(folder / "prompts.jsonl", [{"prompt": row["prompt"]} for row in rows])
            n_pairs = len(pairs)
        else:  # chosen texts of the held-out prompts, to win against
            arrays["chosen"] = oracle([p["prompt"] for p in pairs], [p["chosen"] for p in pairs])
    save_arrays(folder / "rewards.npz", **arrays)
    mean, stderr = measure.mean_stderr(arrays["judge"])
    spread = float(arrays["pool"].std(1).mean())
    return {"pairs": n_pairs, "oracle": mean, "oracle_stderr": stderr, "oracle_std": spread}


def with_rewards(rows: list[dict], rewards: np.ndarray) -> list[dict]:
    return [
        {"prompt": row["prompt"], "completions": row["completions"], "rewards": r.tolist()}
        for row, r in zip(rows, rewards, strict=True)
    ]


def make_rm(out: Path, name: str, spec: dict) -> dict:
    folder = out / "runs" / name
    labels = out / "runs" / f"labels-{spec['reward']}-s{spec['seed']}-w{spec['n_embd']}"
    pairs = read_rows(labels / "train-pairs.jsonl")[: spec["n_pairs"]]
    write_rows(folder / "pairs.jsonl", pairs)
    argv = ["reward", "--data", folder / "pairs.jsonl", "--init", out / "runs" / spec["sft"]]
    size = 4 * spec["groups"]
    iters = max(1, min(spec["rm_iters"], 8 * len(pairs) // size))
    argv += ["--eval_data", labels / "judge-pairs.jsonl", "--max_iters", iters]
    argv += ["--batch_size", size, "--learning_rate", spec["rate"]]
    stage(folder, [*argv, "--eval_interval", iters, "--seed", spec["seed"]])
    reward, arrays = load_reward(str(folder), CPU), {}
    held = np.load(labels / "rewards.npz")
    for what in ("train", "judge", "pool"):
        rows = read_rows(out / "runs" / spec["sft"] / f"{what}.jsonl")
        arrays[what] = rate(reward, rows)
        if what == "train":
            write_rows(folder / "model.jsonl", with_rewards(rows, arrays[what]))
    pairs = read_rows(labels / "judge-pairs.jsonl")
    arrays["chosen"] = reward([p["prompt"] for p in pairs], [p["chosen"] for p in pairs])
    save_arrays(folder / "rewards.npz", **arrays)
    within = [
        np.corrcoef(a, b)[0, 1]
        for a, b in zip(arrays["pool"], held["pool"], strict=True)
        if a.std() > 0 and b.std() > 0
    ]
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    last = json.loads([line for line in lines if '"eval"' in line][-1])
    mean, stderr = measure.mean_stderr(arrays["judge"])
    return {
        "accuracy": last["accuracy"],
        "correlation": float(np.mean(within)) if within else None,
        "rm": mean,
        "rm_stderr": stderr,
    }


# --------------------------------------------------------------------------------------------------
# What policies are compared with


def make_limits(out: Path, _: str, spec: dict) -> dict:
    judges = Judges(out, spec)
    values = judges.values({judge: held["pool"] for judge, held in judges.held.items()})
    keep = {k: v for k, v in values.items() if not np.isnan(v).any()}
    oracle = judges.held["oracle"]["pool"]
    result = {
        "optimum": [
            {"beta": beta, **measure.optimum(oracle, beta, keep)} for beta in OPTIMUM_BETAS
        ],
        "best_of_n": [],
    }
    sft, ckpt = load_gpt(out / "runs" / spec["sft"])
    draws = judges.draw(sft, ckpt["encoding"])
    result["sft"] = judges.judge(sft, sft, draws)
    result["samples"] = judges.samples(draws)
    for method, name in (("best-of-n", "rm"), ("best-of-n-oracle", "oracle")):
        if name in judges.held:
            score = judges.held[name]["pool"]
            for n in [n for n in BEST_OF if n <= score.shape[1]]:
                result["best_of_n"].append(
                    {"method": method, "n": n, **measure.best_of_n(score, n, keep)}
                )
    return result


# --------------------------------------------------------------------------------------------------
# Policies


def policy_steps(spec: dict) -> int:
    return spec["steps"] * (PPO_EPOCHS if spec["method"] == "ppo" else 1)


def policy_argv(out: Path, spec: dict) -> list:
    """The command line of a method at one beta."""
    loss, source = METHODS[spec["method"]]
    labels, sft, beta = out / "runs" / spec["labels"], out / "runs" / spec["sft"], spec["beta"]
    steps = policy_steps(spec)
    every = max(1, steps // spec["evals"])
    argv = [loss, "--init", sft, "--max_iters", steps, "--learning_rate", spec["rate"]]
    argv += ["--eval_interval", every, "--kl_samples", 0, "--seed", spec["seed"]]
    size = spec["groups"] * spec["K"]
    if source == "pairs":
        data = labels / "train-pairs.jsonl"
        if spec["n_pairs"]:
            data = out / "runs" / spec["rm"] / "pairs.jsonl"
        if loss == "exo":
            beta *= math.log((1 - SMOOTHING) / SMOOTHING) / 2
            argv += ["--label_smoothing", SMOOTHING]
        return [*argv, "--data", data, "--batch_size", size // 2, "--beta_pi", beta]
    argv += ["--batch_size", spec["groups"]]
    if source in ("model", "oracle"):
        data = labels / "oracle.jsonl" if source == "oracle" else out / "runs" / spec["rm"]
        data = data if source == "oracle" else data / "model.jsonl"
        return [*argv, "--data", data, "--beta_pi", 1.0, "--beta_r", beta]
    argv += ["--data", labels / "prompts.jsonl", "--reward", out / "runs" / spec["rm"]]
    argv += ["--K", spec["K"], "--max_new_tokens", spec["new"]]
    if loss == "ppo":
        return [*argv, "--kl_coef", beta, "--ppo_epochs", PPO_EPOCHS]
    return [*argv, "--online", "--beta_pi", 1.0, "--beta_r", beta]


@contextlib.contextmanager
def watched(look, steps):
    """The stage that runs meanwhile also writes what look(gpt, step) says at its evaluations."""
    make = train.make_stage

    def make_watched(*args):
        stage = make(*args)
        evaluate = stage.evaluate

        def evaluate_and_look(step: int) -> dict:
            found = {"judged": look(stage.policy.gpt, step)} if step in steps else {}
            return evaluate(step) | found

        stage.evaluate = evaluate_and_look
        return stage

    train.make_stage = make_watched
    try:
        yield
    finally:
        train.make_stage = make


def make_policy(out: Path, name: str, spec: dict) -> dict:
    folder, argv = out / "runs" / name, policy_argv(out, spec)
    judges = Judges(out, spec)
    sft, ckpt = load_gpt(out / "runs" / spec["sft"])

    def look(gpt, step: int) -> dict:
        """Between the first step and the last, half of the final judgement."""
        return judges.judge(gpt, sft, judges.draw(gpt, ckpt["encoding"], parts=2))

    with watched(look, range(1, policy_steps(spec))):
        stage(folder, argv)
    gpt, _ = load_gpt(folder)
    draws = judges.draw(gpt, ckpt["encoding"])
    result = {"samples": judges.samples(draws), "path": []}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "judged" in record:
            result["path"].append({"step": record["step"], **record["judged"]})
    result["path"].append({"step": policy_steps(spec), **judges.judge(gpt, sft, draws)})
    if spec["method"] in ("exo-rw-oracle", "dpo-rw-oracle", "exo-pref", "dpo-pref"):
        result["density"] = density(out, spec, gpt, sft, judges)
    return result


MAKERS = {
    "sft": make_sft,
    "labels": make_labels,
    "rm": make_rm,
    "limits": make_limits,
    "policy": make_policy,
}
