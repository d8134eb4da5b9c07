"""Reward models, online EXO and DPO, PPO: their arithmetic against slow loops, their runs from the
outside, and what a broken reward function may do."""

import json
import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import mistake, records, write_rows

import data
import exo
import sample
import train
from infra.checkpoint import load_checkpoint
from infra.parallel import score
from methods import online
from methods.ppo import ActorCritic, gae, ppo_loss, whiten
from methods.reward import RewardModel, load_reward, to_rate
from model import GPT, GPTConfig, Scorer

torch.set_num_threads(1)
CPU = torch.device("cpu")
TINY = "--n_layer 1 --n_head 1 --n_embd 16 --block_size 48".split()
FAST = (
    "--learning_rate 3e-3 --max_new_tokens 8 --kl_samples 64 --log_interval 1 --threads 1".split()
)
REWARDS = '''
"""Reward functions as a user would write them, good and broken."""
import math
import numpy
import torch

calls = 0
not_a_function = 3

def letters(prompt, completion):
    return float(completion.count("a"))

def batch(prompts, completions):
    return numpy.array([y.count("a") for y in completions], numpy.float32)

def tensor(prompts, completions):
    completions.reverse()  # ours to spoil
    return torch.tensor([float(y.count("a")) for y in completions[::-1]])

def whole(prompt, completion):
    return prompt in ("a cat", "") and completion == "!"

def raises(prompt, completion):
    raise RuntimeError("no such\\nword")

def nan(prompt, completion):
    return math.nan

def text(prompt, completion):
    return "3.0"

def nothing(prompt, completion):
    pass

def short(prompts, completions):
    return [0.0] * (len(completions) - 1)

def one(prompts, completions):
    return 1.0

def infinite(prompts, completions):
    return [0.0] * (len(completions) - 1) + [math.inf]

def later(prompts, completions):
    """Breaks in the fourth call."""
    global calls
    calls += 1
    return letters if calls == 4 else [float(y.count("a")) for y in completions]

def none():
    return 0.0
'''


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict:
    """Pairs in which the chosen says yes, prompts alone, a tiny sft run, and reward functions."""
    folder, rng = tmp_path_factory.mktemp("stages"), random.Random(0)

    def words(n):
        return " ".join(rng.choice("a cat dog sat".split()) for _ in range(n))

    pairs = [
        {"prompt": words(2), "chosen": f" {words(1)} yes", "rejected": f" {words(1)} no"}
        for _ in range(40)
    ]
    out = {
        "pairs": write_rows(folder / "pairs.jsonl", pairs),
        "prompts": write_rows(folder / "prompts.jsonl", [{"prompt": words(2)} for _ in range(40)]),
        "sft": str(folder / "sft"),
    }
    argv = ["sft", "--data", out["pairs"], "--out", out["sft"], *TINY, "--learning_rate", "1e-2"]
    assert train.main([*argv, "--max_iters", "60"]) == 0
    (folder / "house_rewards.py").write_text(REWARDS)
    sys.path.insert(0, str(folder))
    yield out
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def reward_model(files, tmp_path_factory) -> str:
    out = str(tmp_path_factory.mktemp("rm") / "rm")
    argv = ["reward", "--data", files["pairs"], "--eval_data", files["pairs"], "--out", out]
    argv += ["--init", files["sft"], "--max_iters", "40", "--learning_rate", "3e-3"]
    assert train.main(argv) == 0
    return out


def stage(name: str, files: dict, out: Path, *more: str) -> list[str]:
    """A command line for ppo, or for exo or dpo --online."""
    argv = [name, *([] if name == "ppo" else ["--online"]), "--data", files["prompts"]]
    argv += ["--init", files["sft"], "--out", str(out), *FAST]
    if "--reward" not in more:
        argv += ["--reward", "house_rewards:letters"]
    return [*argv, *more]


def settings(argv: list[str]) -> train.Settings:
    return train.parse(argv)


# ------------------------------------------------------------------------------
# The arithmetic


def random_tokens(seed: int):
    """Per-token tensors of 3 prompts, 2 completions each, up to 5 tokens, one of them empty."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([[5, 1], [3, 2], [4, 0]])
    scored = torch.arange(5) < lengths[..., None]

    def draw(scale=1.0):
        return scale * torch.randn(3, 2, 5, dtype=torch.float64, generator=generator)

    return scored, draw


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.7, 0.0)])
def test_gae_is_the_sum_of_discounted_errors(gamma, lam):
    """The definition, Eq. 16 of arXiv:1506.02438, completion by completion."""
    scored, draw = random_tokens(1)
    rewards, values = draw(), draw()
    advantages, returns = gae(rewards, values, scored, gamma, lam)
    for b in range(3):
        for k in range(2):
            n = int(scored[b, k].sum())
            v = [*values[b, k, :n].tolist(), 0.0]
            error = [rewards[b, k, t].item() + gamma * v[t + 1] - v[t] for t in range(n)]
            for t in range(5):
                a = sum((gamma * lam) ** (u - t) * error[u] for u in range(t, n))
                assert advantages[b, k, t].item() == pytest.approx(a, abs=1e-10)
                assert returns[b, k, t].item() == pytest.approx(a + v[t] if t < n else 0, abs=1e-10)


def test_gae_at_lambda_1_is_reward_to_go_less_the_value():
    scored, draw = random_tokens(2)
    rewards, values = draw() * scored, draw()
    advantages, returns = gae(rewards, values, scored, 1.0, 1.0)
    to_go = rewards.flip(-1).cumsum(-1).flip(-1)
    torch.testing.assert_close(returns, to_go * scored)
    torch.testing.assert_close(advantages, (to_go - values) * scored)


def test_ppo_loss_equals_a_loop_over_tokens():
    scored, draw = random_tokens(3)
    old, old_values, advantages, returns = draw(), draw(), draw(), draw()
    logps, values = old + draw(0.3), old_values + draw(0.3)
    loss, figures = ppo_loss(
        logps, values, old, old_values, advantages, returns, scored, 0.1, 0.2, 0.7
    )
    policy = value = clipped = kl = 0.0
    where = scored.nonzero().tolist()
    for i in map(tuple, where):
        ratio = torch.exp(logps[i] - old[i]).item()
        a = advantages[i].item()
        policy += -min(ratio * a, min(max(ratio, 0.9), 1.1) * a)
        v, v0, r = values[i].item(), old_values[i].item(), returns[i].item()
        near = v0 + min(max(v - v0, -0.2), 0.2)
        value += max((v - r) ** 2, (near - r) ** 2) / 2
        clipped += abs(ratio - 1) > 0.1
        kl += ratio - 1 - np.log(ratio)
    n = len(where)
    expected = {"policy_loss": policy, "value_loss": value}
    expected |= {"clip_fraction": clipped, "approx_kl": kl}
    assert 0 < clipped < n
    assert loss.item() == pytest.approx((policy + 0.7 * value) / n, abs=1e-10)
    for name, total in expected.items():
        assert figures[name].item() == pytest.approx(total / n, abs=1e-10)


def test_ppo_gradient_where_nothing_has_moved_is_that_of_reinforce():
    """At ratio 1: -advantage * grad log pi, and the plain squared error for the value; whatever
    stands in unscored places has no part in it."""
    scored, draw = random_tokens(4)
    logps, values = draw().requires_grad_(), draw().requires_grad_()
    advantages, returns = draw(), draw()
    junk = torch.where(scored, 0.0, torch.inf)
    loss, _ = ppo_loss(
        logps, values, logps.detach() + junk, values.detach() + junk, advantages, returns, scored
    )
    loss.backward()
    n = scored.sum()
    torch.testing.assert_close(logps.grad, torch.where(scored, -advantages / n, 0.0))
    torch.testing.assert_close(
        values.grad, torch.where(scored, 0.5 * (values - returns).detach() / n, 0.0)
    )


def test_whitened_advantages_have_mean_0_and_variance_1_over_scored_tokens():
    scored, draw = random_tokens(5)
    x = whiten(3 + draw(7.0), scored)
    assert x[scored].mean().abs() < 1e-12
    assert x[scored].var(correction=0).item() == pytest.approx(1, abs=1e-8)
    assert not x[~scored].any()


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


# ------------------------------------------------------------------------------
# The modules


def tiny_gpt(seed: int = 0) -> GPT:
    generator = torch.Generator().manual_seed(seed)
    gpt = GPT(GPTConfig(16, 11, 2, 2, 8), generator).double()
    with torch.no_grad():  # large enough to matter
        for p in gpt.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return gpt


def some_groups() -> data.Groups:
    """Two groups, of 3 and 2 completions; one completion is cut, one empty, two are equal."""
    builder = data.Builder(16, 10, data.Report())
    builder.put([1, 2, 3], [[4, 5], [6], [4, 5]], [True, False, True])
    builder.put([7], [[], [8, 9, 1, 2]], [True, True])
    return builder.groups()


def slow_hidden(gpt: GPT, idx: list[int]) -> torch.Tensor:
    """Features (T, C) of one sequence, from the plain forward of the whole text."""
    seen = []
    hook = gpt.ln_f.register_forward_hook(lambda m, args, out: seen.append(out))
    gpt(torch.tensor([idx]))
    hook.remove()
    return seen[0]


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


def test_texts_for_a_reward_model_fit_its_block(files, tmp_path):
    """One position is kept for the end of text, also where texts are as long as they may be."""
    row = {"prompt": "p" * 40, "chosen": "c" * 60, "rejected": "r" * 23}
    file = write_rows(tmp_path / "long.jsonl", [row])
    s = settings(["reward", "--data", file, *TINY])
    task = train.make_stage(s, CPU)
    (chosen, rejected), prompt = task.groups.completions(0), task.groups.prompt(0)
    assert len(prompt) + max(len(chosen), len(rejected)) <= 48
    assert rejected[-1] == task.groups.eot
    assert chosen[-1] == ord("c")
    assert task.policy.module(data.collate(task.groups, np.arange(1))).shape == (1, 2)


def test_actor_critic_gives_log_probs_and_values_of_the_text_before_each_token():
    groups, gpt = some_groups(), tiny_gpt()
    module = ActorCritic(gpt, 0.7)
    torch.nn.init.normal_(module.value.double().weight, generator=torch.Generator().manual_seed(1))
    batch = data.collate(groups, np.arange(2))
    logps, values = module(batch)
    assert torch.equal(logps, Scorer(gpt, 0.7)(batch))
    assert logps.shape == values.shape == batch.scored.shape
    for g in range(2):
        prompt = groups.prompt(g)
        for k, y in enumerate(groups.completions(g)):
            n = len(y) + int(groups.ended[groups.first[g] + 1 + k])
            x = slow_hidden(gpt, prompt + y)[len(prompt) - 1 :][:n]  # before each of n tokens
            torch.testing.assert_close(values[g, k, :n], x @ module.value.weight)
            assert not values[g, k, n:].any()


def test_the_value_network_and_the_policy_share_no_weights():
    module = ActorCritic(tiny_gpt())
    batch = data.collate(some_groups(), np.arange(2))
    torch.nn.init.ones_(module.value.double().weight)
    module(batch)[1].sum().backward()
    assert all(p.grad is None for p in module.policy.parameters())
    module.zero_grad()
    module(batch)[0].sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in module.critic.parameters())


# ------------------------------------------------------------------------------
# The reward stage


def test_reward_stage_learns_a_trivial_preference(files, reward_model):
    first, *_, last = records(Path(reward_model), "eval")
    assert first["loss"] == pytest.approx(np.log(2))
    assert first["accuracy"] == 0.5
    assert last["accuracy"] > 0.9
    for name in (reward_model, f"{reward_model}/best.pt"):
        rate = load_reward(name, "cpu")
        rows = [json.loads(line) for line in Path(files["pairs"]).read_text().splitlines()]
        rewards = {k: rate([r["prompt"] for r in rows], [r[k] for r in rows]) for k in rows[0]}
        assert (rewards["chosen"] > rewards["rejected"]).double().mean() > 0.9
        assert rewards["chosen"].dtype == torch.float64
        mean = (rewards["chosen"].mean() + rewards["rejected"].mean()) / 2
        assert abs(mean.item()) < 1e-5  # the zero is set


def test_a_loaded_reward_model_rates_as_the_stage_did(files, reward_model):
    """Text by text, and aware of whether the text ended."""
    rate = load_reward(reward_model, "cpu")
    s = settings(["reward", "--data", files["pairs"], "--init", reward_model])
    task = train.make_stage(s, CPU)
    task.policy.scorer.head.load_state_dict(load_checkpoint(reward_model)["head"])
    scores = score(task.policy.module, task.groups, s.at_once, CPU)
    rows = [json.loads(line) for line in Path(files["pairs"]).read_text().splitlines()]
    chosen = rate([r["prompt"] for r in rows], [r["chosen"] for r in rows])
    torch.testing.assert_close(scores[task.groups.first[:-1] + 1], chosen, rtol=1e-5, atol=1e-5)
    whole, cut = (rate(["a"], [" cat"], [ended]).item() for ended in (True, False))
    assert whole != cut


def test_rewards_of_k_completions_train_a_reward_model_too(files, tmp_path):
    rows = [{"prompt": "a", "completions": ["b", "cc", "d"], "rewards": [1, 2, 2]}] * 8
    rows += [{"prompt": "a", "completions": ["b", "cc"], "rewards": [1, 1]}]  # no order
    file = write_rows(tmp_path / "rewards.jsonl", rows)
    argv = ["reward", "--data", file, "--eval_data", file, *TINY, "--max_iters", "20"]
    assert train.main([*argv, "--out", str(tmp_path / "rm")]) == 0
    assert records(tmp_path / "rm", "eval")[-1]["accuracy"] == 1


def test_a_reward_model_is_no_policy(files, reward_model, tmp_path, capsys):
    for name in ("sft", "exo", "dpo"):
        argv = [
            name,
            "--data",
            files["pairs"],
            "--init",
            reward_model,
            "--out",
            str(tmp_path / "x"),
        ]
        assert "is a reward model: it rates text and writes none" in mistake(argv, capsys)
    assert sample.main([reward_model, "--prompt", "a"]) == 2
    assert "is a reward model" in capsys.readouterr().err


def test_a_policy_is_no_reward_model(files, tmp_path, capsys):
    argv = stage("ppo", files, tmp_path / "x", "--reward", files["sft"])
    assert "is no reward model: its stage is sft" in mistake(argv, capsys)


# ------------------------------------------------------------------------------
# Learning from one's own completions


@pytest.mark.parametrize("name", ["exo", "dpo", "ppo"])
def test_the_reward_rises(name, files, tmp_path):
    more = "--max_iters 60 --eval_interval 30".split()
    beta = ["--kl_coef", "0.1"] if name == "ppo" else ["--beta_pi", "0.2", "--beta_r", "0.5"]
    assert train.main(stage(name, files, tmp_path / "run", *more, *beta)) == 0
    first, *_, last = records(tmp_path / "run", "eval")
    assert first["kl"] == 0
    assert last["reward"] > first["reward"] + 3 * first["reward_stderr"]
    assert last["kl"] > 0.1
    assert last["loss"] == pytest.approx(0.1 * last["kl"] - last["reward"])
    steps = records(tmp_path / "run", "train")
    assert {"reward", "kl"} <= set(steps[0])
    assert np.mean([r["reward"] for r in steps[-8:]]) > steps[0]["reward"]
    if name == "ppo":
        assert {"policy_loss", "value_loss", "clip_fraction", "approx_kl"} <= set(steps[0])
        assert steps[0]["approx_kl"] == pytest.approx(0, abs=1e-6)  # nothing has moved yet
        assert steps[0]["policy_loss"] == pytest.approx(0, abs=0.2)  # advantages are whitened
        assert steps[4]["kl"] == steps[0]["kl"]  # one round: 4 minibatches, 4 passes
        assert steps[16]["kl"] != steps[0]["kl"]


def test_online_exo_sees_its_draws_through_the_snapshot(files, tmp_path):
    """The loss of a second step on one round, from log-probs of the plain forward, one sequence at
    a time: q and p as DESIGN writes them. DPO's round keeps sft as its reference."""
    for name in ("exo", "dpo"):
        argv = stage(name, files, tmp_path, "--K", "3", "--round_iters", "2", "--max_iters", "9")
        s = settings([*argv, "--beta_pi", "0.4", "--beta_r", "0.7", "--batch_size", "3"])
        task = train.make_stage(s, CPU)
        with torch.no_grad():
            task.policy.gpt.wte.weight.mul_(1.3)  # the snapshot is no longer sft
        rho = [p.clone() for p in task.policy.gpt.parameters()]
        task.ids(0)
        drawn = task.groups
        with torch.no_grad():
            task.policy.gpt.wte.weight.mul_(1.2)  # nor is the policy the snapshot
        task.ids(1)
        assert task.groups is drawn
        assert len(drawn) == 6
        snapshot = GPT(task.policy.gpt.config)
        with torch.no_grad():
            for p, q in zip(snapshot.parameters(), rho, strict=True):
                p.copy_(q)

        def logp(gpt, g, k, drawn=drawn):
            prompt, y = drawn.prompt(g), drawn.completions(g)[k]
            y = y + [drawn.eot] * bool(drawn.ended[drawn.first[g] + 1 + k])
            logits = gpt(torch.tensor([prompt + y]))[0, len(prompt) - 1 : -1]
            return logits.double().log_softmax(-1).gather(1, torch.tensor(y)[:, None]).sum()

        total, ids = 0.0, task.ids(1)
        for g in ids:
            pi, sft, rho_ = (
                torch.stack([logp(m, g, k) for k in range(3)])
                for m in (task.policy.gpt, task.ref.gpt, snapshot)
            )
            text = [task.policy.encoding.decode(y) for y in drawn.completions(g)]
            r = torch.tensor([float(y.count("a")) for y in text])
            if name == "exo":
                log_q = (0.4 * pi + 0.6 * sft - rho_).log_softmax(-1)
                log_p = (r / 0.7 + sft - rho_).log_softmax(-1)
                total += exo.kl(log_q, log_p).item()
            else:
                total -= ((r / 0.7).softmax(-1) * (0.4 * (pi - sft)).log_softmax(-1)).sum().item()
        assert len(ids) == 3
        loss, _ = task.loss(data.collate(drawn, ids))
        assert loss.item() == pytest.approx(total / 3, abs=2e-5)


def test_ppo_pays_for_kl_token_by_token_and_rewards_the_last(files, tmp_path):
    """With values 0 and lambda 1 the return at the first token is r - kl_coef log(pi / sft)."""
    s = settings(stage("ppo", files, tmp_path, "--kl_coef", "0.3", "--lam", "1", "--K", "2"))
    task = train.make_stage(s, CPU)
    with torch.no_grad():
        task.policy.gpt.wte.weight.mul_(1.3)
    task.ids(0)
    drawn = task.groups
    logps, ref = (score(m, drawn, s.at_once, CPU) for m in (task.policy.module, task.ref))
    real = torch.from_numpy(~np.isnan(drawn.rewards))
    expected = torch.from_numpy(drawn.rewards) - 0.3 * (logps - ref)
    torch.testing.assert_close(
        task.stored["returns"][real, 0].double(), expected[real], atol=1e-4, rtol=0
    )
    assert not task.stored["returns"][~real].any()
    n = torch.from_numpy(np.diff(drawn.offsets) + drawn.ended)[:, None]
    after = torch.arange(task.stored["returns"].size(1)) >= n
    for name in ("old_logps", "old_values", "advantages", "returns"):
        assert not task.stored[name][after].any()
    figures = task.figures
    assert figures["kl"] == pytest.approx((logps - ref)[real].mean().item(), abs=1e-5)
    assert figures["reward"] == pytest.approx(drawn.rewards[real.numpy()].mean())


def test_draws_do_not_depend_on_batch_mates(files, tmp_path):
    """Groups of a round are equal whether few or many prompts are computed together, and equal
    draws are kept: they are draws."""
    rounds = []
    for micro in ("1", "8"):
        argv = stage("exo", files, tmp_path, "--micro_batch_size", micro, "--max_new_tokens", "2")
        task = train.make_stage(settings(argv), CPU)
        task.ids(0)
        rounds.append(task.groups)
        assert np.array_equal(np.diff(task.groups.first), [9] * 8)
        assert any(len(set(map(tuple, task.groups.completions(g)))) < 8 for g in range(8))
    assert np.array_equal(rounds[0].tokens, rounds[1].tokens)
    assert np.array_equal(rounds[0].ended, rounds[1].ended)
    task.ids(1)
    assert not np.array_equal(task.groups.tokens, rounds[0].tokens)


def test_every_prompt_is_drawn_once_an_epoch_and_every_draw_read_once_a_pass(
    files, tmp_path, monkeypatch
):
    """40 prompts, batches of 6, rounds of 4: 7 batches, so a round of 4 and one of 3."""
    s = settings(stage("ppo", files, tmp_path, "--batch_size", "6", "--ppo_epochs", "2"))
    task = train.make_stage(s, CPU)

    def draw(policy, s, prompts, n, generator):
        asked.append(len(prompts))
        builder = data.Builder(48, 256, data.Report())
        for prompt in prompts:
            builder.put(prompt, [[1]] * 8, [True] * 8)
        return builder.groups()

    monkeypatch.setattr(online, "draw", draw)
    asked, read = [], []
    assert task.steps == 14
    for step in range(14):
        read.append(task.ids(step))
    first, second = asked  # the short batch may be in either
    assert first + second == 40
    parts = ((read[:4], first), (read[4:8], first), (read[8:11], second), (read[11:], second))
    for part, n in parts:
        assert sorted(np.concatenate(part)) == list(range(n))
    assert read[0].tolist() != read[4].tolist()


def test_micro_batches_give_the_gradient_of_the_large_batch(files, tmp_path):
    for name in ("exo", "ppo", "reward"):
        gradients = []
        for micro in ((), ("--micro_batch_size", "3")):
            more = ["--grad_clip", "0", "--dtype", "float64", *micro]
            argv = stage(name, files, tmp_path, *more)
            if name == "reward":
                argv = ["reward", "--data", files["pairs"], "--init", files["sft"], *more]
            s = settings(argv)
            task, seen = train.make_stage(s, CPU), []
            optimizer = train.adamw(task.policy.scorer, s, 0.0)
            optimizer.register_step_pre_hook(
                lambda o, *_, seen=seen: seen.extend(
                    p.grad.clone() for g in o.param_groups for p in g["params"]
                )
            )
            train.update(s, task, optimizer, task.ids(0), 0.0)
            gradients.append(seen)
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_plain_exo_reports_the_reward_of_what_it_draws(files, tmp_path):
    argv = ["exo", "--data", files["pairs"], "--init", files["sft"], "--max_iters", "2", *FAST]
    argv += ["--reward", "house_rewards:batch", "--out", str(tmp_path / "run")]
    assert train.main(argv) == 0
    record = records(tmp_path / "run", "eval")[0]
    assert record["reward"] > 0
    assert record["reward_stderr"] > 0
    assert record["kl"] == 0


# ------------------------------------------------------------------------------
# Stopping and going on


def without_times(out: Path) -> list[dict]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    machine = dict.fromkeys(("tokens_per_s", "groups_per_s", "peak_gb"), 0)
    return [json.loads(line) | machine for line in lines]


@pytest.mark.parametrize("name", ["exo", "ppo"])
@pytest.mark.parametrize("how", ["signal", "kill"])
def test_a_run_stopped_within_a_round_resumes_bit_for_bit(name, how, files, tmp_path, monkeypatch):
    """Rounds of 6 steps. A signal saves in step 5; a kill goes back to step 4, mid-round too."""
    more = "--max_iters 14 --eval_interval 4 --kl_samples 4 --batch_size 4 --K 3".split()
    more += ["--round_iters", "3", "--ppo_epochs", "2"] if name == "ppo" else ["--round_iters", "6"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert train.main(stage(name, files, whole, *more)) == 0

    count, update = [0], train.update

    def interrupted(*args):
        count[0] += 1
        if count[0] == 5 and how == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        if count[0] == 6 and how == "kill":
            raise ZeroDivisionError
        return update(*args)

    with monkeypatch.context() as m:
        m.setattr(train, "update", interrupted)
        if how == "kill":
            with pytest.raises(ZeroDivisionError):
                train.main(stage(name, files, stopped, *more))
        else:
            assert train.main(stage(name, files, stopped, *more)) == 128 + signal.SIGTERM
    assert load_checkpoint(stopped)["step"] == (5 if how == "signal" else 4)
    assert train.main(stage(name, files, stopped, *more, "--resume")) == 0
    assert without_times(stopped) == without_times(whole)
    a, b = (load_checkpoint(out) for out in (whole, stopped))
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    for part in ("critic", "value", "stored", "groups") if name == "ppo" else ("groups",):
        x, y = a["task"][part], b["task"][part]
        assert all(torch.equal(x[k].nan_to_num(), y[k].nan_to_num()) for k in x)


def test_a_reward_model_resumes_to_itself(files, reward_model, tmp_path, monkeypatch):
    argv = ["reward", "--data", files["pairs"], "--init", files["sft"], "--max_iters", "8"]
    argv += ["--eval_interval", "3", "--log_interval", "1", "--out"]
    assert train.main([*argv, str(tmp_path / "whole")]) == 0
    update, count = train.update, [0]

    def killed(*args):
        count[0] += 1
        if count[0] == 5:
            raise ZeroDivisionError
        return update(*args)

    with monkeypatch.context() as m:
        m.setattr(train, "update", killed)
        with pytest.raises(ZeroDivisionError):
            train.main([*argv, str(tmp_path / "cut")])
    assert train.main([*argv, str(tmp_path / "cut"), "--resume"]) == 0
    a, b = (load_checkpoint(tmp_path / name) for name in ("whole", "cut"))
    assert all(torch.equal(a["head"][k], b["head"][k]) for k in a["head"])
    assert a["head"]["weight"].any()


# ------------------------------------------------------------------------------
# Reward functions, good and broken


@pytest.mark.parametrize("name", ["letters", "batch", "tensor"])
def test_scalar_and_batch_functions_rate_alike(name, files):
    rate = load_reward(f"house_rewards:{name}", CPU)
    rewards = rate(["p", "q", "r"], ["aa", "b", "a b"])
    assert rewards.dtype == torch.float64
    assert rewards.tolist() == [2.0, 0.0, 1.0]


def test_a_function_gets_the_texts_as_they_were(files, tmp_path):
    """No end-of-text, no prompt joined in, and an empty prompt is empty."""
    rows = [{"prompt": "a cat"}, {"prompt": ""}]
    file = write_rows(tmp_path / "p.jsonl", rows)
    argv = ["exo", "--online", "--data", file, "--init", files["sft"]]
    task = train.make_stage(settings([*argv, "--reward", "house_rewards:whole"]), CPU)
    builder = data.Builder(48, 256, data.Report())
    for g in range(2):
        builder.put(task.rounds.prompts.prompt(g), [[ord("!")], []], [True, True])
    groups = builder.groups()
    online.rate(task.policy, groups, task.rounds.reward)
    assert np.isnan(groups.rewards[[0, 3]]).all()
    assert groups.rewards[[1, 2, 4, 5]].tolist() == [1, 0, 1, 0]


def test_the_oracle_is_a_reward_function():
    rate = load_reward("experiments.text.reviews:sentiment", CPU)
    assert rate(["x"], [" y"]).tolist() == [-13.0]  # the grammar cannot produce it


BROKEN = [
    ("raises", "RuntimeError: no such, for the completion '"),
    ("nan", "returned nan, no finite number, for the completion '"),
    ("text", "returned '3.0', no finite number, for the completion '"),
    ("nothing", "returned None, no finite number"),
    ("short", "returned 7 rewards for 8 completions"),
    ("one", "must return a number for each completion (its second parameter is called"),
    ("infinite", "returned inf, no finite number"),
    ("none", "TypeError: none() takes 0 positional arguments"),
    ("absent", "has no attribute 'absent'"),
    ("not_a_function", "is no function, but of type int"),
]


@pytest.mark.parametrize(("name", "said"), BROKEN)
def test_a_broken_reward_function_is_named_in_one_sentence(name, said, files, tmp_path, capsys):
    more = ["--reward", f"house_rewards:{name}", "--kl_samples", "8"]
    assert train.main(stage("exo", files, tmp_path / "run", *more)) == 2
    *bars, message = capsys.readouterr().err.strip().splitlines()
    assert all("it/s" in bar for bar in bars)
    assert said in message
    assert f"--reward house_rewards:{name}" in message
    assert not (tmp_path / "run" / "ckpt.pt").exists()


@pytest.mark.parametrize("name", ["exo", "ppo"])
def test_a_function_that_breaks_later_loses_nothing(name, files, tmp_path, capsys):
    """The run is saved where it stands, and goes on when the function is mended."""
    import house_rewards

    house_rewards.calls = 0
    more = "--max_iters 8 --eval_interval 100 --kl_samples 4 --K 2 --round_iters 1".split()
    more += ["--reward", "house_rewards:later", *(["--ppo_epochs", "2"] if name == "ppo" else [])]
    assert train.main(stage(name, files, tmp_path / "run", *more)) == 2
    step = 2 if name == "exo" else 4  # one evaluation, two rounds, and the third breaks
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("train.py: --reward house_rewards:later must return a number for each")
    assert last.endswith(f"stopped at step {step}, the same command with --resume goes on")
    assert load_checkpoint(tmp_path / "run")["step"] == step
    assert train.main(stage(name, files, tmp_path / "run", *more, "--resume")) == 0
    assert load_checkpoint(tmp_path / "run")["step"] == 8
    assert [r["step"] for r in records(tmp_path / "run", "train")] == list(range(1, 9))


# ------------------------------------------------------------------------------
# Settings


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("ppo --data F", "ppo needs --reward"),
        ("ppo --data F --reward m:f", "ppo needs --init"),
        ("exo --data F --init F --online", "exo --online needs --reward"),
        ("dpo --data F --init F --online --reward m:f --K 1", "--K must be at least 2 for dpo"),
        ("ppo --data F --init F --reward m:f --K 0", "--K must be at least 1 for ppo"),
        ("sft --data F --online", "--online is for exo and dpo"),
        ("ppo --data F --init F --reward m:f --online", "--online is for exo and dpo"),
        ("exo --data F --init F --reward m:f --kl_samples 0", "--kl_samples must not be 0"),
        ("ppo --data F --init F --reward m:f --clip 0", "--clip must be a finite number above 0"),
        ("ppo --data F --init F --reward m:f --lam 1.1", "--lam must be in [0, 1], got 1.1"),
        ("ppo --data F --init F --reward m:f --kl_coef -1", "--kl_coef must not be negative"),
        ("ppo --data F --init F --reward m:f --ppo_epochs 0", "--ppo_epochs must be at least 1"),
        ("reward --data F --label_smoothing 0.5", "--label_smoothing must be 0 <= eps < 0.5"),
        ("ppo --data PROMPTS --init SFT --reward nowhere", "no checkpoint at nowhere"),
        ("ppo --data PROMPTS --init SFT --reward no_module:f", "--reward no_module:f: No module"),
        ("kto --data PROMPTS --init SFT --online --reward math:sqrt", "invalid choice: 'kto'"),
    ],
)
def test_each_wrong_setting_gets_one_sentence(argv, said, files, tmp_path, capsys):
    names = {"PROMPTS": files["prompts"], "SFT": files["sft"]}
    argv = [names.get(a, a) for a in argv.split()]
    assert said in mistake([*argv, "--out", str(tmp_path / "run")], capsys)
    assert not (tmp_path / "run").exists()
