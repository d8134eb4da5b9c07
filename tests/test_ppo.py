"""PPO's arithmetic against loops over tokens, its two networks, and what it keeps of a round. Its
runs are tested with the other stages, in test_train.py and test_online.py."""

import numpy as np
import pytest
import torch
from conftest import slow_hidden, slow_logps, some_groups, tiny_gpt

import data
from methods.ppo import ActorCritic, gae, ppo_loss, whiten
from model import Scorer


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


# ------------------------------------------------------------------------------
# The two networks


def test_actor_critic_gives_log_probs_and_values_of_the_text_before_each_token():
    """From two networks that share no weights."""
    groups, gpt = some_groups(), tiny_gpt()
    module = ActorCritic(gpt, 0.7)
    torch.nn.init.normal_(module.value.double().weight, generator=torch.Generator().manual_seed(1))
    batch = data.collate(groups, np.arange(2))
    logps, values = module(batch)
    assert torch.equal(logps, Scorer(gpt, 0.7)(batch))
    assert logps.shape == values.shape == batch.targets.shape
    for g in range(2):
        prompt = groups.prompt(g)
        for k, y in enumerate(groups.completions(g)):
            n = len(y) + int(groups.ended[groups.first[g] + 1 + k])
            x = slow_hidden(gpt, prompt + y)[len(prompt) - 1 :][:n]  # before each of n tokens
            torch.testing.assert_close(values[g, k, :n], x @ module.value.weight)
            assert not values[g, k, n:].any()
    values.sum().backward()
    assert all(p.grad is None for p in module.policy.parameters())
    module.zero_grad()
    logps.sum().backward()
    assert all(p.grad is None for p in module.critic.parameters())


# ------------------------------------------------------------------------------
# What is kept of a round


def test_ppo_pays_for_kl_token_by_token_and_rewards_the_last(world):
    """While all values are 0, the return at a token is the sum of what follows, each 0.95 times as
    much as the one before: -kl_coef log(pi / sft) of every token, and r at the last."""
    _, task = world.task("ppo", "--kl_coef", "0.3", "--K", 2)
    with torch.no_grad():
        task.policy.gpt.wte.weight.mul_(1.3)
    task.ids(0)
    drawn, stored, kls, advantages = task.groups, task.stored, [], []
    for g in range(len(drawn)):
        for k in range(2):
            row = drawn.first[g] + 1 + k
            pi, sft = (slow_logps(m, drawn, g, k) for m in (task.policy.gpt, task.ref.gpt))
            paid = (-0.3 * (pi - sft)).tolist()
            paid[-1] += drawn.rewards[row]
            n = len(paid)
            returns = [sum(0.95 ** (u - t) * paid[u] for u in range(t, n)) for t in range(n)]
            assert stored["old_logps"][row, :n].tolist() == pytest.approx(pi.tolist(), abs=1e-4)
            assert stored["returns"][row, :n].tolist() == pytest.approx(returns, abs=1e-4)
            assert not any(stored[name][row, n:].any() for name in stored)
            kls.append((pi - sft).sum().item())
            advantages += stored["advantages"][row, :n].tolist()
    real = torch.from_numpy(drawn.is_completion())
    assert stored.keys() == {"old_logps", "old_values", "advantages", "returns"}
    assert not any(stored[name][~real].any() for name in stored)
    assert np.mean(advantages) == pytest.approx(0, abs=1e-5)
    assert np.std(advantages) == pytest.approx(1, abs=1e-5)
    assert task.figures["kl"] == pytest.approx(np.mean(kls), abs=1e-4)
    assert task.figures["reward"] == pytest.approx(drawn.rewards[real.numpy()].mean())
