"""Reward models against slow loops, the stage that trains them, and what a user's may be."""

import math

import numpy as np
import pytest
import torch
from conftest import (
    CPU,
    LETTERS,
    TINY,
    read_rows,
    records,
    slow_hidden,
    some_groups,
    tiny_gpt,
    write_rows,
)

import data
import exo
import tests.rewards
import train
from infra.checkpoint import load_checkpoint
from infra.parallel import score
from infra.rows import InputError
from methods.reward import RewardModel, load_reward, to_rate


def test_reward_model_loss_of_k_completions_is_the_mean_over_ordered_pairs():
    rewards = torch.tensor([[0.3, -1.0, 2.0], [1.0, 1.5, 7.0], [0.0, 5.0, 9.0]], dtype=torch.double)
    target = torch.tensor([[1.0, 0.0, 0.0], [2.0, 3.0, 9.0], [0.0, 0.0, 0.0]])
    mask = torch.tensor([[True] * 3, [True, True, False], [True] * 3])
    loss = exo.reward_model_loss(rewards, 0.1, exo.preferred(target, mask))

    def nll(gap):
        p = 1 / (1 + np.exp(-gap))
        return -0.9 * np.log(p) - 0.1 * np.log(1 - p)

    expected = ((nll(1.3) + nll(-1.7)) / 2 + nll(0.5) + 0) / 3  # the third has no order
    assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_reward_model_reads_the_last_token_of_the_whole_text():
    """And of a text that ended, the end of text. One sequence at a time gives the same numbers."""
    groups, model = some_groups(), RewardModel(tiny_gpt())
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(1))
    model.head.double().bias += 0.5
    batch = data.collate(to_rate(groups), np.arange(2))
    rewards = model(batch)
    assert batch.mask.tolist() == [[True] * 3, [True, True, False]]
    for g in range(2):
        for k, y in enumerate(groups.completions(g)):
            ended = [groups.eot] if groups.ended[groups.first[g] + 1 + k] else []
            last = slow_hidden(model.gpt, groups.prompt(g) + y + ended)[-1]
            expected = last @ model.head.weight + 0.5
            torch.testing.assert_close(rewards[g, k], expected, rtol=1e-10, atol=1e-10)
    assert rewards[0, 0] == rewards[0, 2]
    assert rewards[1, 2] == 0


# ------------------------------------------------------------------------------
# The stage


def test_texts_for_a_reward_model_fit_its_block(tmp_path):
    """One position is kept for the end of text, also where texts are as long as they may be."""
    row = {"prompt": "p" * 56, "chosen": "c" * 60, "rejected": "r" * 31}
    file = write_rows(tmp_path / "long.jsonl", [row])
    task = train.make_stage(train.parse(["reward", "--data", file, *TINY]), CPU)
    (chosen, rejected), prompt = task.groups.completions(0), task.groups.prompt(0)
    assert len(prompt) + max(len(chosen), len(rejected)) <= 64
    assert rejected[-1] == task.groups.eot
    assert chosen[-1] == ord("c")
    assert task.policy.module(data.collate(task.groups, np.arange(1))).shape == (1, 2)


def test_the_stage_learns_a_trivial_preference(world, reward_model):
    first, *_, last = records(reward_model, "eval")
    assert first["loss"] == pytest.approx(np.log(2))
    assert first["accuracy"] == 0.5
    assert last["accuracy"] > 0.9
    assert abs(last["reward"]) < 1e-5  # the zero is set
    names = {"step", "kind", "loss", "accuracy", "reward"}
    assert last.keys() == names < records(reward_model, "train")[0].keys()
    rows = read_rows(world.pairs)
    for name in (reward_model, f"{reward_model}/best.pt"):
        rate = load_reward(name, CPU)
        rewards = {k: rate([r["prompt"] for r in rows], [r[k] for r in rows]) for k in rows[0]}
        assert (rewards["chosen"] > rewards["rejected"]).double().mean() > 0.9
        assert rewards["chosen"].dtype == torch.float64
        mean = (rewards["chosen"].mean() + rewards["rejected"].mean()) / 2
        assert abs(mean.item()) < 1e-5


def test_a_loaded_reward_model_rates_as_the_stage_did(world, reward_model):
    """Text by text, and aware of whether the text ended."""
    rate = load_reward(reward_model, CPU)
    s, task = world.task("reward", "--init", reward_model)
    task.policy.scorer.head.load_state_dict(load_checkpoint(reward_model)["head"])
    scores = score(task.policy.module, task.groups, s.at_once, CPU)
    rows = read_rows(world.pairs)
    chosen = rate([r["prompt"] for r in rows], [r["chosen"] for r in rows])
    torch.testing.assert_close(scores[task.groups.first[:-1] + 1], chosen, rtol=1e-5, atol=1e-5)
    whole, cut = (rate(["a"], [" cat"], [ended]).item() for ended in (True, False))
    assert whole != cut


def test_rewards_of_k_completions_train_a_reward_model_too(world, tmp_path):
    """Only their order counts; where there is none, half is right."""
    rows = [{"prompt": "a", "completions": ["b", "cc", "d"], "rewards": [1, 2, 2]}] * 8
    rows += [{"prompt": "a", "completions": ["b", "cc"], "rewards": [1, 1]}]
    file = write_rows(tmp_path / "rewards.jsonl", rows)
    more = ["--data", file, "--eval_data", file, "--max_iters", 20, "--learning_rate", 3e-3]
    out = world.run("reward", *more)
    assert records(out, "eval")[-1]["accuracy"] == pytest.approx((8 * 1 + 1 * 0.5) / 9)


# ------------------------------------------------------------------------------
# Reward functions, good and broken


def batch(prompts, completions):
    return np.array([y.count("a") for y in completions], np.float32)


def tensor(prompts, completions):
    completions.reverse()  # ours to spoil
    return torch.tensor([float(y.count("a")) for y in completions[::-1]])


@pytest.mark.parametrize("function", [tests.rewards.letters, batch, tensor])
def test_scalar_and_batch_functions_rate_alike(function, monkeypatch):
    monkeypatch.setattr(tests.rewards, "letters", function)
    rewards = load_reward(LETTERS, CPU)(["p", "q", "r"], ["aa", "b", "a b"])
    assert rewards.dtype == torch.float64
    assert rewards.tolist() == [2.0, 0.0, 1.0]


def raises(prompt, completion):
    raise RuntimeError("no such\nword")


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (raises, "RuntimeError: no such, for the completion 'aa'"),
        (lambda x, y: math.nan, "returned nan, no finite number, for the completion 'aa'"),
        (lambda x, y: "3.0", "returned '3.0', no finite number, for the completion 'aa'"),
        (lambda x, y: None, "returned None, no finite number, for the completion 'aa'"),
        (lambda x, completions: [0.0], "returned 1 rewards for 2 completions"),
        (lambda x, completions: 1.0, "must return a number for each completion (its second param"),
        (lambda x, completions: [0.0, math.inf], "returned inf, no finite number, for the comple"),
        (lambda: 0.0, "TypeError: "),
        (3, "is no function, but of type int"),
    ],
)
def test_a_broken_function_is_named_in_one_sentence(function, said, monkeypatch):
    monkeypatch.setattr(tests.rewards, "letters", function)
    with pytest.raises(InputError, match=rf"^--reward {LETTERS}[^\n]+$") as error:
        load_reward(LETTERS, CPU)(["p", "q"], ["aa", "b"])
    assert said in str(error.value)


def test_a_function_that_breaks_at_once_leaves_no_checkpoint(world, monkeypatch, refusal):
    monkeypatch.setattr(tests.rewards, "letters", raises)
    *bars, message = refusal(train.main, *world.argv("ppo"))
    assert all("it/s" in bar for bar in bars)
    assert message.startswith(f"train.py: --reward {LETTERS}: RuntimeError: no such, for the compl")
    assert not (world.folder / "run" / "ckpt.pt").exists()
