"""Learning from completions of one's own: what is drawn, what a round holds, and online EXO and DPO
by hand. Rounds are PPO's, too; its arithmetic is in test_ppo.py."""

import numpy as np
import pytest
import torch
from conftest import LETTERS, ONLINE, ROUNDS, records, slow_logps, write_rows

import data
import exo
import tests.rewards
import train
from infra.checkpoint import load_checkpoint
from methods import online
from model import GPT


def some_draws(prompts: list[list[int]], *completions: str) -> data.Groups:
    builder = data.Builder(64, 256, data.Report())
    for prompt in prompts:
        builder.put(prompt, [list(y.encode()) for y in completions], [True] * len(completions))
    return builder.groups()


# ------------------------------------------------------------------------------
# Draws and rewards


def test_draws_do_not_depend_on_batch_mates(world):
    """Groups of a round are equal whether few or many prompts are computed together, and equal
    draws are kept: they are draws."""
    rounds = []
    for micro in (1, 8):
        more = ["--K", 8, "--micro_batch_size", micro, "--max_new_tokens", 2]
        _, task = world.task(ONLINE[0], *more)
        task.ids(0)
        rounds.append(task.groups)
        assert np.array_equal(np.diff(task.groups.first), [9] * 8)
        assert any(len(set(map(tuple, task.groups.completions(g)))) < 8 for g in range(8))
    assert np.array_equal(rounds[0].tokens, rounds[1].tokens)
    assert np.array_equal(rounds[0].ended, rounds[1].ended)
    task.ids(1)
    assert not np.array_equal(task.groups.tokens, rounds[0].tokens)


def test_a_function_gets_the_texts_as_they_were(world, tmp_path, monkeypatch):
    """No end-of-text, no prompt joined in, and an empty prompt is empty."""
    file = write_rows(tmp_path / "p.jsonl", [{"prompt": "a cat"}, {"prompt": ""}])
    monkeypatch.setattr(tests.rewards, "letters", lambda x, y: x in ("a cat", "") and y == "!")
    _, task = world.task(ONLINE[0], "--data", file)
    groups = some_draws([task.prompts.prompt(g) for g in range(2)], "!", "")
    online.rate(task.policy, groups, task.reward)
    assert np.isnan(groups.rewards[[0, 3]]).all()
    assert groups.rewards[[1, 2, 4, 5]].tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize("stage", exo.LOSSES)
def test_offline_stages_report_the_reward_of_what_they_draw(stage, world):
    more = ["--reward", LETTERS, "--kl_samples", 64, "--max_iters", 1]
    record = records(world.run(stage, *more), "eval")[0]
    assert record["reward"] > 0
    assert record["reward_stderr"] > 0
    assert record["kl"] == 0


# ------------------------------------------------------------------------------
# Rounds


def test_every_prompt_is_drawn_once_an_epoch_and_every_draw_read_once_a_pass(world, monkeypatch):
    """40 prompts, batches of 6, rounds of 4: 7 batches, so a round of 4 and one of 3."""
    asked = []

    def draw(policy, s, prompts, n, generator):
        asked.append(len(prompts))
        return some_draws(prompts, *"a" * n)

    monkeypatch.setattr(online, "draw", draw)
    _, task = world.task("ppo", "--batch_size", 6, "--ppo_epochs", 2, "--epochs", 1)
    assert task.steps == 14
    read = [task.ids(step) for step in range(14)]
    first, second = asked  # the short batch may be in either
    assert first + second == 40
    parts = ((read[:4], first), (read[4:8], first), (read[8:11], second), (read[11:], second))
    for part, n in parts:
        assert sorted(np.concatenate(part)) == list(range(n))
    assert read[0].tolist() != read[4].tolist()


@pytest.mark.parametrize("stage", ROUNDS)
def test_a_run_made_longer_draws_its_last_round_anew(stage, world):
    """8 steps end within the second round, which holds less than one of a run of 12 does."""
    more = ["--batch_size", 4, "--ppo_epochs", 2, "--round_iters", 3 if stage == "ppo" else 6]
    (_, short), (_, long) = (world.task(stage, *more, "--max_iters", n) for n in (8, 12))
    short.ids(7)
    long.load_state(short.state())
    read = np.concatenate([long.ids(step) for step in range(8, 12)])
    assert len(read) == 4 * 4
    assert len(set(read)) == (12 if stage == "ppo" else 16)  # ppo: the end of a pass, then another


@pytest.mark.parametrize("stage", ROUNDS)
def test_the_reward_rises(stage, world):
    """And the loss of an evaluation is -J, with the beta that the settings amount to."""
    more = "--max_iters 60 --eval_interval 30 --learning_rate 3e-3 --K 8 --kl_samples 64".split()
    beta = ["--kl_coef", "0.1"] if stage == "ppo" else ["--beta_pi", "0.2", "--beta_r", "0.5"]
    out = world.run(stage, *more, *beta)
    first, *_, last = records(out, "eval")
    assert first["kl"] == 0
    assert last["reward"] > first["reward"] + 3 * first["reward_stderr"]
    assert last["kl"] > 0.1
    assert last["loss"] == pytest.approx(0.1 * last["kl"] - last["reward"])
    steps = records(out, "train")
    assert {"reward", "kl"} <= steps[0].keys()
    assert np.mean([r["reward"] for r in steps[-8:]]) > steps[0]["reward"]
    if stage == "ppo":
        assert {"policy_loss", "value_loss", "clip_fraction", "approx_kl"} <= steps[0].keys()
        assert steps[0]["approx_kl"] == pytest.approx(0, abs=1e-6)  # nothing has moved yet
        assert steps[0]["policy_loss"] == pytest.approx(0, abs=0.2)  # advantages are whitened
        assert steps[4]["kl"] == steps[0]["kl"]  # one round: 4 minibatches, 4 passes
        assert steps[16]["kl"] != steps[0]["kl"]


@pytest.mark.parametrize("stage", ROUNDS)
def test_a_function_that_breaks_later_loses_nothing(stage, world, monkeypatch, refusal):
    """The run is saved where it stands, and goes on when the function is mended."""
    calls = []

    def later(prompts, completions):
        calls.append(1)
        return None if len(calls) == 4 else [float(y.count("a")) for y in completions]

    monkeypatch.setattr(tests.rewards, "letters", later)
    more = "--round_iters 1 --ppo_epochs 2 --eval_interval 100 --max_iters 8".split()
    argv, out = world.argv(stage, *more), world.folder / "run"
    last = refusal(train.main, *argv)[-1]
    step = 4 if stage == "ppo" else 2  # one evaluation, two rounds, and the third breaks
    assert last.startswith(f"train.py: --reward {LETTERS} must return a number for each completion")
    said = f"stopped at step {step}, the same command with --resume goes on from step {step}"
    assert last.endswith(said)
    assert load_checkpoint(out)["step"] == step
    assert train.main([*argv, "--resume"]) == 0
    assert load_checkpoint(out)["step"] == 8
    assert [r["step"] for r in records(out, "train")] == list(range(1, 9))


@pytest.mark.parametrize("name", ["exo", "dpo"])
def test_online_exo_sees_its_draws_through_the_snapshot(name, world):
    """The loss of a second step on one round, from log-probs of the plain forward, one sequence at
    a time: q and p as exo.py's header writes them. DPO's round keeps sft as its reference."""
    more = ["--round_iters", 2, "--batch_size", 3, "--beta_pi", "0.4", "--beta_r", "0.7"]
    _, task = world.task(f"{name} --online", *more)
    policy, snapshot = task.policy.gpt, GPT(task.policy.gpt.config)
    with torch.no_grad():
        policy.wte.weight.mul_(1.3)  # the snapshot is no longer sft
    snapshot.load_state_dict(policy.state_dict())
    task.ids(0)
    drawn = task.groups
    with torch.no_grad():
        policy.wte.weight.mul_(1.2)  # nor is the policy the snapshot
    ids, total = task.ids(1), 0.0
    assert task.groups is drawn
    assert len(drawn) == 6
    assert len(ids) == 3
    for g in ids:
        pi, sft, rho = (
            torch.stack([slow_logps(gpt, drawn, g, k).sum() for k in range(3)])
            for gpt in (policy, task.ref.gpt, snapshot)
        )
        text = [task.policy.encoding.decode(y) for y in drawn.completions(g)]
        r = torch.tensor([float(y.count("a")) for y in text])
        if name == "exo":
            log_q = (0.4 * pi + 0.6 * sft - rho).log_softmax(-1)
            log_p = (r / 0.7 + sft - rho).log_softmax(-1)
            total += exo.kl(log_q, log_p).item()
        else:
            total -= ((r / 0.7).softmax(-1) * (0.4 * (pi - sft)).log_softmax(-1)).sum().item()
    loss, _ = task.loss(data.collate(drawn, ids))
    assert loss.item() == pytest.approx(total / 3, abs=2e-5)
