"""exo.py against numbers known by hand, a plain Python loop, and torch.distributions."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence

import exo

INF, NAN = math.inf, math.nan
LOG2 = math.log(2)
both_losses = pytest.mark.parametrize("loss", [exo.exo_loss, exo.dpo_loss], ids=["exo", "dpo"])
any_machine = settings(  # the same examples each run, however slow or busy the machine
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def rand(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def ragged(holes=0.0):
    """Three groups of 4, 2 and 1 completions in a (3, 4) batch; `holes` fills what is absent."""
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 1, 0, 0]], dtype=torch.bool)
    policy, ref, rewards = (rand(3, 4, seed=s).masked_fill(~mask, holes) for s in (1, 2, 3))
    return policy, ref, rewards, mask


def value_and_grad(loss, policy, *args, **kwargs):
    policy = policy.detach().clone().requires_grad_()
    value = loss(policy, *args, **kwargs)
    return value.detach(), torch.autograd.grad(value, policy)[0]


# ------------------------------------------------------------------------------
# Oracles: the definitions again, one float at a time


def loop_softmax(xs):
    top = max(xs)
    weights = [math.exp(x - top) for x in xs]
    return [w / sum(weights) for w in weights]


def loop_group(policy, ref, target, beta_pi, reverse):
    """One group without padding: sum q log(q / p) for EXO, -sum p log q for DPO."""
    x = [beta_pi * (a - b) for a, b in zip(policy, ref, strict=True)]
    log_z = max(x) + math.log(sum(math.exp(v - max(x)) for v in x))
    log_q = [v - log_z for v in x]
    total = 0.0
    for lq, p in zip(log_q, loop_softmax(target), strict=True):
        if reverse:
            total += math.exp(lq) * (lq - math.log(p)) if lq > -700 else 0.0
        else:
            total -= p * lq if p > 0 else 0.0
    return total


def loop_loss(policy, ref, target, beta_pi, mask, reverse):
    """The mean over groups that hold something; absent completions are cut out, not masked."""
    values = []
    for b in range(len(mask)):
        keep = [k for k in range(len(mask[b])) if mask[b][k]]
        if keep:
            rows = ([table[b][k] for k in keep] for table in (policy, ref, target))
            values.append(loop_group(*rows, beta_pi, reverse))
    return sum(values) / max(len(values), 1)


@st.composite
def groups(draw):
    """policy, ref, log_target (lists, B by K), mask and beta_pi, of any shape up to (4, 5)."""
    B, K = draw(st.integers(1, 4)), draw(st.integers(1, 5))

    def table(entry):
        row = st.lists(entry, min_size=K, max_size=K)
        return draw(st.lists(row, min_size=B, max_size=B))

    logp = st.floats(-60, 0)
    return (
        table(logp),
        table(logp),
        table(st.floats(-40, 40)),
        table(st.booleans()),
        draw(st.floats(0.01, 3)),
    )


@any_machine
@given(groups())
def test_losses_equal_a_plain_loop_for_any_shape_value_and_mask(case):
    """The tensors compute what two nested loops over prompts and completions would."""
    policy, ref, target, mask, beta_pi = case
    args = f64(policy), f64(ref), f64(target), beta_pi, torch.tensor(mask)
    for loss, reverse in ((exo.exo_loss, True), (exo.dpo_loss, False)):
        expected = loop_loss(policy, ref, target, beta_pi, mask, reverse)
        assert loss(*args).item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@any_machine
@given(groups())
def test_losses_are_the_two_directions_of_torch_kl_divergence(case):
    """KL(q || p) and KL(p || q) + H(p): the order of two arguments is all that differs."""
    policy, ref, target, _, beta_pi = case
    policy, ref, target = f64(policy), f64(ref), f64(target)
    q, p = Categorical(logits=beta_pi * (policy - ref)), Categorical(logits=target)
    reverse, forward = kl_divergence(q, p), kl_divergence(p, q) + p.entropy()
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(exo.exo_loss(policy, ref, target, beta_pi), reverse.mean(), **close)
    torch.testing.assert_close(exo.dpo_loss(policy, ref, target, beta_pi), forward.mean(), **close)


@any_machine
@given(groups())
def test_neither_kl_is_ever_negative_nor_its_gradient_undefined(case):
    """EXO is at least 0 and DPO at least H(p), whatever the shape, values and mask."""
    policy, ref, target, mask, beta_pi = case
    mask, target = torch.tensor(mask), f64(target)
    log_p = exo.reward_target(target, 1.0, mask)
    floor = exo.group_mean(exo.entropy(log_p), mask)
    for loss, least in ((exo.exo_loss, 0.0), (exo.dpo_loss, floor)):
        value, grad = value_and_grad(loss, f64(policy), f64(ref), target, beta_pi, mask)
        assert value >= least - 1e-9
        assert grad.isfinite().all()
        assert not grad[~mask].any()
        torch.testing.assert_close(grad.sum(-1), f64([0.0]).expand(len(grad)), rtol=0, atol=1e-9)


# ------------------------------------------------------------------------------
# Values known by hand


def test_dpo_starts_at_log_2():
    """Policy equal to reference: every pair is a coin toss, whatever the label smoothing."""
    logps = f64([[-12.0, -30.0], [-7.0, -7.5]])
    for eps in (0.0, 1e-3, 0.3):
        start = exo.dpo_loss(logps, logps, exo.preference_target(eps), beta_pi=0.1)
        assert start.item() == pytest.approx(LOG2)


def test_exo_starts_at_2_7612():
    """KL of a coin toss to (0.999, 0.001): -log 2 - (log 0.999 + log 0.001) / 2."""
    logps = f64([[-12.0, -30.0], [-7.0, -7.5]])
    start = exo.exo_loss(logps, logps, exo.preference_target(1e-3), beta_pi=0.1)
    assert start.item() == pytest.approx(2.7612, abs=5e-5)


def test_reward_target_is_a_softmax_with_temperature():
    """Odds 1 : 3 at beta_r = 1 become 1 : 9 at beta_r = 1/2: a small beta_r trusts the reward."""
    rewards = f64([[0.0, math.log(3)]])
    torch.testing.assert_close(exo.reward_target(rewards).exp(), f64([[0.25, 0.75]]))
    torch.testing.assert_close(exo.reward_target(rewards, 0.5).exp(), f64([[0.1, 0.9]]))


def test_reward_target_ignores_a_shift_of_all_rewards():
    """Only differences of reward within a prompt matter."""
    rewards = rand(3, 4)
    shifted = exo.reward_target(rewards + f64([[5.0], [-80.0], [1e3]]), 0.7)
    torch.testing.assert_close(shifted, exo.reward_target(rewards, 0.7), rtol=1e-10, atol=1e-10)


def test_reward_target_spreads_over_the_present_completions_only():
    """Two equal rewards among four places, two of them empty, get one half each."""
    mask = torch.tensor([[True, False, True, False]])
    log_p = exo.reward_target(f64([[1.0, 99.0, 1.0, NAN]]), 0.1, mask)
    torch.testing.assert_close(log_p, f64([[-LOG2, 0.0, -LOG2, 0.0]]))


@pytest.mark.parametrize("eps", [1e-9, 1e-3, 0.119, 0.4999])
def test_preference_target_puts_1_minus_eps_on_the_chosen(eps):
    """Column 0 is the chosen completion everywhere in this project."""
    target = exo.preference_target(eps)
    assert target.shape == (1, 2)
    assert target.dtype == torch.float64
    torch.testing.assert_close(target.exp(), f64([[1 - eps, eps]]), rtol=1e-12, atol=0)


def test_preference_target_without_smoothing_makes_the_rejected_impossible():
    """log p = (0, -inf): DPO as published."""
    assert exo.preference_target(0.0).tolist() == [[0.0, -INF]]


@pytest.mark.parametrize("beta_pi", [0.1, 1.0, 2.5])
def test_dpo_without_smoothing_is_minus_logsigmoid_of_the_margin(beta_pi):
    """Rafailov et al. 2023, Eq. 7."""
    policy, ref = 10 * rand(6, 2, seed=1), 10 * rand(6, 2, seed=2)
    margin = (policy - ref)[:, 0] - (policy - ref)[:, 1]
    loss = exo.dpo_loss(policy, ref, exo.preference_target(0.0), beta_pi)
    torch.testing.assert_close(loss, -F.logsigmoid(beta_pi * margin).mean())


def test_dpo_with_smoothing_is_the_conservative_dpo_of_other_libraries():
    """-(1 - eps) logsigmoid(z) - eps logsigmoid(-z), entropy of the label included."""
    policy, ref, eps = rand(6, 2, seed=1), rand(6, 2, seed=2), 0.2
    z = 0.5 * ((policy - ref)[:, 0] - (policy - ref)[:, 1])
    expected = -(1 - eps) * F.logsigmoid(z) - eps * F.logsigmoid(-z)
    loss = exo.dpo_loss(policy, ref, exo.preference_target(eps), 0.5)
    torch.testing.assert_close(loss, expected.mean())


@pytest.mark.parametrize("eps", [1e-3, 0.119, 0.4])
@pytest.mark.parametrize("beta_pi", [0.1, 1.0, 2.5])
def test_exo_pref_is_the_bregman_divergence_of_softplus(beta_pi, eps):
    """Between coins of log-odds z and L, KL = softplus(L) - softplus(z) - (L - z) sigmoid(z)."""
    policy, ref = 10 * rand(6, 2, seed=1), 10 * rand(6, 2, seed=2)
    z = beta_pi * ((policy - ref)[:, 0] - (policy - ref)[:, 1])
    label = f64(math.log((1 - eps) / eps))
    expected = F.softplus(label) - F.softplus(z) - (label - z) * torch.sigmoid(z)
    loss = exo.exo_loss(policy, ref, exo.preference_target(eps), beta_pi)
    torch.testing.assert_close(loss, expected.mean(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("beta_pi", [0.3, 1.0, 2.0])
def test_gradients_are_the_ones_in_the_docstrings(beta_pi):
    """EXO: beta_pi q (log q - log p - KL). DPO: beta_pi (q - p). A group of two each, so halved."""
    policy, ref, log_p = rand(2, 5, seed=1), rand(2, 5, seed=2), exo.reward_target(rand(2, 5), 0.6)
    log_q = F.log_softmax(beta_pi * (policy - ref), dim=-1)
    q, p = log_q.exp(), log_p.exp()
    reverse = (q * (log_q - log_p)).sum(-1, keepdim=True)
    expected = {"exo": beta_pi * q * (log_q - log_p - reverse) / 2, "dpo": beta_pi * (q - p) / 2}
    for name, loss in exo.LOSSES.items():
        _, grad = value_and_grad(loss, policy, ref, log_p, beta_pi)
        torch.testing.assert_close(grad, expected[name], rtol=1e-9, atol=1e-12)


@both_losses
def test_the_mean_is_over_groups(loss):
    """Two copies of a batch have the same loss: it does not grow with B."""
    policy, ref, log_p = rand(3, 4, seed=1), rand(3, 4, seed=2), exo.reward_target(rand(3, 4))
    each = [loss(*(x[b : b + 1] for x in (policy, ref, log_p))) for b in range(3)]
    torch.testing.assert_close(loss(policy, ref, log_p), torch.stack(each).mean())


@both_losses
def test_a_lone_completion_teaches_nothing(loss):
    """K = 1 has no comparison: q = p = 1, loss and gradient 0."""
    value, grad = value_and_grad(loss, rand(3, 1, seed=1), rand(3, 1, seed=2), rand(3, 1))
    assert value == 0
    assert not grad.any()


@both_losses
def test_the_one_by_two_target_broadcasts_over_pairs(loss):
    """One label serves every pair of the batch."""
    policy, ref, target = rand(5, 2, seed=1), rand(5, 2, seed=2), exo.preference_target(0.1)
    assert target.shape == (1, 2)
    torch.testing.assert_close(
        loss(policy, ref, target), loss(policy, ref, target.repeat(5, 1)), rtol=0, atol=0
    )


@both_losses
def test_the_target_is_normalised_over_the_group(loss):
    """Any log-weights will do as a target: the losses normalise them."""
    policy, ref, weights = rand(2, 3, seed=1), rand(2, 3, seed=2), rand(2, 3)
    normalised = loss(policy, ref, weights.log_softmax(-1), 0.4)
    torch.testing.assert_close(loss(policy, ref, weights + 7, 0.4), normalised)


def test_losses_by_name():
    """A fork's loss is one function and one entry here."""
    assert exo.LOSSES["exo"] is exo.exo_loss
    assert exo.LOSSES["dpo"] is exo.dpo_loss


# ------------------------------------------------------------------------------
# Ragged groups: absent is not impossible


@both_losses
def test_padded_groups_equal_unpadded_ones(loss):
    """A group of two in a batch of width four is the pair it would be alone, gradient too."""
    policy, ref, rewards, mask = ragged()
    log_p = exo.reward_target(rewards, 0.5, mask)
    value, grad = value_and_grad(loss, policy, ref, log_p, 0.7, mask)
    alone = []
    for b in range(3):
        keep = mask[b]
        args = policy[b : b + 1, keep], ref[b : b + 1, keep]
        target = exo.reward_target(rewards[b : b + 1, keep], 0.5)
        one, one_grad = value_and_grad(loss, *args, target, 0.7)
        alone.append(one)
        torch.testing.assert_close(grad[b : b + 1, keep], one_grad / 3)
    torch.testing.assert_close(value, torch.stack(alone).mean())


@both_losses
def test_a_full_mask_is_no_mask(loss):
    """Everything present: the mask changes nothing."""
    policy, ref, log_p = rand(3, 4, seed=1), rand(3, 4, seed=2), exo.reward_target(rand(3, 4))
    full = torch.ones(3, 4, dtype=torch.bool)
    torch.testing.assert_close(loss(policy, ref, log_p, 0.5, full), loss(policy, ref, log_p, 0.5))


@both_losses
@pytest.mark.parametrize("holes", [NAN, INF, -INF, 1e30])
def test_what_an_absent_entry_holds_never_leaks(loss, holes):
    """NaN or infinity in padding reaches neither the value nor the gradient."""
    policy, ref, rewards, mask = ragged()
    clean = value_and_grad(loss, policy, ref, exo.reward_target(rewards, 1.0, mask), 0.7, mask)
    policy, ref, rewards, mask = ragged(holes)
    for target in (exo.reward_target(rewards, 1.0, mask), rewards):
        value, grad = value_and_grad(loss, policy, ref, target, 0.7, mask)
        torch.testing.assert_close(value, clean[0])
        torch.testing.assert_close(grad, clean[1])
        assert not grad[~mask].any()


@both_losses
@pytest.mark.parametrize("holes", [0.0, NAN])
def test_empty_groups_add_0_and_are_not_counted(loss, holes):
    """A group with nothing present leaves the mean of the others as it was."""
    policy, ref, rewards, mask = ragged()
    expected, grad = value_and_grad(loss, policy, ref, rewards, 0.7, mask)
    empty = torch.full((2, 4), holes, dtype=torch.float64)
    policy, ref, rewards = (torch.cat([x, empty]) for x in (policy, ref, rewards))
    mask = torch.cat([mask, torch.zeros(2, 4, dtype=torch.bool)])
    value, with_empty = value_and_grad(loss, policy, ref, rewards, 0.7, mask)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(with_empty[:3], grad)
    assert not with_empty[3:].any()


@both_losses
def test_a_batch_of_empty_groups_is_0_with_gradient_0(loss):
    """Nothing to learn from is not an error: one rank of many may draw such a batch. No NaN arises
    on the way either, which anomaly detection would report."""
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    hole = torch.full((2, 3), NAN, dtype=torch.float64)
    target = exo.reward_target(hole, 1.0, nothing)
    with torch.autograd.set_detect_anomaly(True):
        value, grad = value_and_grad(loss, hole, hole, target, 1.0, nothing)
    assert value == 0
    assert not grad.any()


def test_impossible_is_not_absent():
    """Probability 0 keeps its place in q's softmax; an absent completion does not."""
    zeros, possible = f64([[0.0, 0.0, 0.0]]), torch.tensor([[True, True, False]])
    impossible = exo.dpo_loss(zeros, zeros, f64([[0.0, 0.0, -INF]]))
    absent = exo.dpo_loss(zeros, zeros, f64([[0.0, 0.0, -INF]]), mask=possible)
    assert impossible.item() == pytest.approx(math.log(3))
    assert absent.item() == pytest.approx(math.log(2))


def test_exo_accepts_an_impossible_completion_that_is_absent():
    """-inf under padding is padding."""
    mask = torch.tensor([[True, True, False]])
    loss = exo.exo_loss(f64([[0.0, 0, 0]]), f64([[0.0, 0, 0]]), f64([[0.0, 0, -INF]]), mask=mask)
    assert loss.item() == pytest.approx(0)


def test_dpo_takes_probability_0_with_a_finite_gradient():
    """0 log q is 0, and the gradient is still beta_pi (q - p)."""
    target = f64([[0.0, -INF, 0.0]])
    value, grad = value_and_grad(exo.dpo_loss, f64([[0.0] * 3]), f64([[0.0] * 3]), target, 2.0)
    assert value.item() == pytest.approx(math.log(3))
    torch.testing.assert_close(grad, 2 * f64([[1 / 3 - 1 / 2, 1 / 3, 1 / 3 - 1 / 2]]))


def test_group_mean_counts_groups_that_hold_something():
    """(1 + 3) / 2: the NaN of the empty group is neither added nor counted."""
    mask = torch.tensor([[True, False], [False, False], [True, True]])
    assert exo.group_mean(f64([1.0, NAN, 3.0]), mask).item() == 2
    assert exo.group_mean(f64([1.0, 5.0, 3.0])).item() == 3


# ------------------------------------------------------------------------------
# Numbers at the edge, dtypes, gradients, purity


@both_losses
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_log_ratios_of_ten_thousand_give_finite_loss_and_gradient(loss, dtype, size):
    """A policy that has run away is still a number, for pairs and for groups."""
    pair, group = torch.tensor([[size, 0.0]]), torch.tensor([[size, 0.0, -size, size, 1.0]])
    rewards = torch.tensor([[1.0, -1.0, 30.0, 0.0, -30.0]])
    for logps, target in ((pair, exo.preference_target(1e-3)), (group, exo.reward_target(rewards))):
        logps = logps.to(dtype)
        value, grad = value_and_grad(loss, logps, torch.zeros_like(logps), target, 1.0)
        assert value.isfinite()
        assert grad.isfinite().all()
        assert value.dtype == grad.dtype == dtype


@both_losses
def test_rewards_of_ten_thousand_give_finite_loss_and_gradient(loss):
    """p = e^-20000 underflows, its logarithm does not."""
    target = exo.reward_target(torch.tensor([[1e4, 0.0, -1e4]]))
    value, grad = value_and_grad(loss, torch.zeros(1, 3), torch.zeros(1, 3), target)
    assert value.isfinite()
    assert grad.isfinite().all()


@both_losses
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_loss_has_the_dtype_of_policy_logps(loss, dtype):
    """The stored reference and the target follow the policy, not the other way round."""
    value = loss(rand(3, 2).to(dtype), rand(3, 2, seed=1).float(), exo.preference_target(0.1))
    assert value.dtype == dtype
    assert value.shape == ()


def test_float64_is_not_rounded_to_float32_on_the_way():
    """A margin of 1e-9 is seen: exact enumeration needs the digits."""
    policy, ref = f64([[1e-9, 0.0]]), f64([[0.0, 0.0]])
    assert exo.reward_target(policy).dtype == torch.float64
    loss = exo.dpo_loss(policy, ref, exo.preference_target(0.0))
    assert LOG2 - loss.item() == pytest.approx(5e-10, rel=1e-5)


@both_losses
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(loss, masked):
    """First and second derivatives equal finite differences, ragged or not."""
    policy, ref, rewards, mask = ragged()
    mask = mask if masked else None
    log_p = exo.reward_target(rewards, 0.5, mask)
    policy.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, ref, log_p, 0.7, mask), policy)
    assert torch.autograd.gradgradcheck(lambda x: loss(x, ref, log_p, 0.7, mask), policy)


def test_gradcheck_of_dpo_with_an_impossible_completion():
    """-inf in the target does not spoil derivatives."""
    policy, ref = rand(3, 2, seed=1).requires_grad_(), rand(3, 2, seed=2)
    target = exo.preference_target(0.0)
    assert torch.autograd.gradcheck(lambda x: exo.dpo_loss(x, ref, target, 0.7), policy)
    assert torch.autograd.gradgradcheck(lambda x: exo.dpo_loss(x, ref, target, 0.7), policy)


def test_inputs_come_back_unchanged():
    """Nothing writes into its arguments (the official code does), NaN padding included."""
    policy, ref, rewards, mask = ragged(NAN)
    target = exo.reward_target(rewards, 0.5, mask)
    inputs = policy, ref, rewards, mask, target
    before = [x.clone() for x in inputs]
    exo.reward_target(rewards, 0.5, mask)
    exo.exo_loss(policy, ref, target, 0.5, mask)
    exo.dpo_loss(policy, ref, target, 0.5, mask)
    exo.exo_loss(policy[:1], ref[:1], rewards[:1], 0.5)
    exo.dpo_loss(policy[:1], ref[:1], rewards[:1], 0.5)
    exo.on_policy_ref(ref, policy, 0.5)
    exo.on_policy_target(rewards, ref, policy, 0.5, mask)
    exo.kl(policy, ref)
    exo.entropy(policy)
    exo.group_mean(policy[:, 1], mask)
    exo.kl_estimates(policy, ref)
    exo.reward_model_loss(rewards[:, :2])
    for x, copy in zip(inputs, before, strict=True):
        torch.testing.assert_close(x, copy, rtol=0, atol=0, equal_nan=True)


# ------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize("eps", [-0.1, 0.5, 1.0, NAN])
def test_label_smoothing_outside_its_range_is_refused_with_its_value(eps):
    """At 1/2 the label says nothing, above it the opposite."""
    with pytest.raises(ValueError, match=rf"label_smoothing must be in \[0, 0\.5\), got {eps}"):
        exo.preference_target(eps)


@pytest.mark.parametrize("beta", [0.0, -0.1, NAN, INF])
def test_betas_that_are_not_above_0_are_refused_by_name_and_value(beta):
    """A beta of 0 would divide by it, a negative one would train the wrong way."""
    zeros = f64([[0.0, 0.0]])
    with pytest.raises(ValueError, match=rf"beta_r must be .* above 0, got {beta}"):
        exo.reward_target(zeros, beta)
    for loss in exo.LOSSES.values():
        with pytest.raises(ValueError, match=rf"beta_pi must be .* above 0, got {beta}"):
            loss(zeros, zeros, exo.preference_target(0.1), beta)


def test_exo_refuses_probability_0_and_names_the_remedy():
    """KL(q || p) is infinite where p is 0, so EXO has no unsmoothed labels."""
    zeros = f64([[0.0, 0.0]])
    with pytest.raises(ValueError, match=r"reverse KL is infinite.*label_smoothing > 0"):
        exo.exo_loss(zeros, zeros, exo.preference_target(0.0))


def test_exo_refuses_probability_0_in_any_group_and_place():
    """One impossible completion among many is enough."""
    target = rand(3, 4)
    target[2, 1] = -INF
    mask = torch.ones(3, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="reverse KL is infinite"):
        exo.exo_loss(rand(3, 4), rand(3, 4), target, mask=mask)
    mask[2, 1] = False
    assert exo.exo_loss(rand(3, 4), rand(3, 4), target, mask=mask).isfinite()


def test_a_loss_asks_no_device_for_numbers():
    """Tensors without numbers: whoever looked at one would fail, as a GPU would have to wait."""
    for name, loss in exo.LOSSES.items():
        logps, ref, target = (torch.zeros(3, 4, device="meta") for _ in range(3))
        mask = torch.ones(3, 4, dtype=torch.bool, device="meta")
        assert loss(logps.requires_grad_(), ref, target, 0.5, mask).shape == (), name


@both_losses
def test_what_is_surely_wrong_is_refused_in_a_sentence(loss):
    x, target = rand(3, 2), exo.preference_target(0.1)
    with pytest.raises(ValueError, match=r"must be \(B, K\): .*, got \(2,\)"):
        loss(x[0], x[0], target[0])
    with pytest.raises(ValueError, match=r"mask is \(3, 1\), log-probs are \(3, 2\)"):
        loss(x, x, target, mask=torch.ones(3, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"ref_logps want no gradient"):
        loss(x, x.clone().requires_grad_(), target)


# ------------------------------------------------------------------------------
# kl, entropy, and what stands around the losses


def test_kl_by_hand():
    """KL((1/2, 1/2) || (1/4, 3/4)) = log 2 - log 3 / 2, and the other order is another number."""
    a, b = f64([0.5, 0.5]).log(), f64([0.25, 0.75]).log()
    assert exo.kl(a, b).item() == pytest.approx(LOG2 - math.log(3) / 2)
    assert exo.kl(b, a).item() == pytest.approx(0.75 * math.log(3) - LOG2)


def test_kl_where_a_probability_is_0():
    """0 log 0 is 0; mass where the other has none costs infinity."""
    sure, fair = f64([0.0, -INF]), f64([-LOG2, -LOG2])
    assert exo.kl(sure, fair).item() == pytest.approx(LOG2)
    assert exo.kl(sure, sure).item() == 0
    assert exo.kl(fair, sure).item() == INF


def test_entropy_by_hand():
    """log N when uniform, 0 when certain; shaped like the leading axes."""
    rows = f64([[0.25] * 4, [0.5, 0.5, 0, 0], [1, 0, 0, 0]]).log()
    torch.testing.assert_close(exo.entropy(rows), f64([2 * LOG2, LOG2, 0.0]))


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_reward_model_loss_is_minus_logsigmoid_of_the_reward_gap(eps):
    """Bradley-Terry: chosen first, the mean over pairs, and log 2 for a model that cannot tell."""
    rewards = 3 * rand(5, 2)
    gap = rewards[:, 0] - rewards[:, 1]
    expected = -(1 - eps) * F.logsigmoid(gap) - eps * F.logsigmoid(-gap)
    torch.testing.assert_close(exo.reward_model_loss(rewards, eps), expected.mean())
    assert exo.reward_model_loss(f64([[4.0, 4.0]]), eps).item() == pytest.approx(LOG2)


def test_kl_estimates_by_hand():
    """One draw to which pi gives twice the reference's probability."""
    estimates = exo.kl_estimates(f64([[math.log(0.5)]]), f64([[math.log(0.25)]]))
    expected = {"k1": LOG2, "k2": LOG2**2 / 2, "k3": LOG2 - 0.5}
    assert {name: x.item() for name, x in estimates.items()} == pytest.approx(expected)


def test_kl_estimates_k1_and_k3_are_unbiased_and_k2_is_not():
    """Averaged over every outcome instead of draws, k1 and k3 are the KL itself."""
    log_pi, log_ref = rand(7, seed=1).log_softmax(0), rand(7, seed=2).log_softmax(0)
    exact = exo.kl(log_pi, log_ref)
    means = {k: (log_pi.exp() * x).sum() for k, x in exo.kl_estimates(log_pi, log_ref).items()}
    torch.testing.assert_close(means["k1"], exact)
    torch.testing.assert_close(means["k3"], exact)
    assert (means["k2"] - exact).abs() > 0.01


def test_k3_is_never_negative_and_keeps_its_digits_near_0():
    """k3 is about k1^2 / 2 for a small k1, down to where 1 + x loses its digits."""
    k1 = f64([-30.0, -1.0, -1e-8, 0.0, 1e-8, 1.0, 30.0])
    k3 = exo.kl_estimates(k1, torch.zeros_like(k1))["k3"]
    assert (k3 >= 0).all()
    assert k3[4].item() == pytest.approx(5e-17, rel=1e-3)


def test_on_policy_arguments_by_hand():
    """Importance weights: q ~ sft (pi / sft)^beta_pi / rho and p ~ sft exp(r / beta_r) / rho."""
    pi, sft, rho, rewards = (rand(2, 3, seed=s) for s in range(4))
    log_q = F.log_softmax(0.3 * pi + 0.7 * sft - rho, dim=-1)
    log_p = F.log_softmax(rewards / 0.4 + sft - rho, dim=-1)
    ref = exo.on_policy_ref(sft, rho, 0.3)
    target = exo.on_policy_target(rewards, sft, rho, 0.4)
    torch.testing.assert_close(F.log_softmax(0.3 * (pi - ref), dim=-1), log_q)
    torch.testing.assert_close(target, log_p)
    loss = exo.exo_loss(pi, ref, target, 0.3)
    torch.testing.assert_close(loss, (log_q.exp() * (log_q - log_p)).sum(-1).mean())


def test_on_policy_target_leaves_absent_completions_out():
    """The mask reaches the softmax of the target; NaN padding stays where it is."""
    _, sft, rewards, mask = ragged(NAN)
    target = exo.on_policy_target(rewards, sft, sft, 0.4, mask)
    torch.testing.assert_close(target, exo.reward_target(rewards, 0.4, mask))
    assert not target[~mask].any()
