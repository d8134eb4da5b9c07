"""
exo.py against numbers known by hand, a plain Python loop, and torch.distributions. What any loss
must hold is asked of every one in exo.LOSSES and of two as a fork would write them; what only the
paper's two hold, of these.
"""

import itertools
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
PAPERS = {name: exo.LOSSES[name] for name in ("exo", "dpo")}
both_losses = pytest.mark.parametrize("loss", PAPERS.values(), ids=PAPERS)
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


def with_empty(policy, ref, rewards, mask, holes=0.0):
    """A group more, which holds nothing."""
    more = [torch.cat([x, torch.full((1, 4), holes).to(x)]) for x in (policy, ref, rewards)]
    return *more, torch.cat([mask, torch.zeros(1, 4, dtype=torch.bool)])


def value_and_grad(loss, policy, *args, **kwargs):
    policy = policy.detach().clone().requires_grad_()
    value = loss(policy, *args, **kwargs)
    return value.detach(), torch.autograd.grad(value, policy)[0]


# ------------------------------------------------------------------------------
# What every preference loss must hold


def ipo_loss(policy_logps, ref_logps, log_target, beta_pi=1.0, mask=None):
    """Azar et al. 2023, arXiv:2310.12036, Eq. 17: pairs, chosen first."""
    ratio = policy_logps - ref_logps
    gap = ratio[:, 0] - ratio[:, 1] - 1 / (2 * beta_pi)
    return exo.group_mean(gap.square(), mask)


def simpo_loss(policy_logps, ref_logps, log_target, beta_pi=1.0, mask=None, *, lengths):
    """Meng et al. 2024, arXiv:2405.14734, Eq. 6 with gamma 0: no reference, a mean over tokens."""
    mean = policy_logps / lengths
    return exo.group_mean(F.softplus(-beta_pi * (mean[:, 0] - mean[:, 1])), mask)


@pytest.fixture(params=[*exo.LOSSES, "ipo", "simpo"])
def name(request, monkeypatch):
    """Of every loss; the forks' two are registered as a fork would do it."""
    for name, loss, more in (
        ("ipo", ipo_loss, exo.Needs(pairs=True)),
        ("simpo", simpo_loss, exo.Needs(pairs=True, reference=False, lengths=True)),
    ):
        monkeypatch.setitem(exo.LOSSES, name, loss)
        monkeypatch.setitem(exo.NEEDS, loss, more)
    return request.param


def batch_for(name, holes=0.0):
    """(policy, ref, log_target, mask) that fit this loss: ragged, and the last group is empty."""
    policy, ref, rewards, mask = with_empty(*ragged(holes), holes)
    if exo.needs(name).pairs:  # whole pairs, or none
        policy, ref, rewards, mask = (x[[0, 0, 0, 3], :2] for x in (policy, ref, rewards, mask))
        policy = policy + torch.arange(4.0)[:, None] * torch.tensor([1.0, -1.0])
    return policy, ref, exo.reward_target(rewards, 0.5, mask), mask


def ask(name, policy, ref, log_target, mask):
    lengths = torch.full(policy.shape, 3, device=policy.device)
    more = {"lengths": lengths} if exo.needs(name).lengths else {}
    return exo.LOSSES[name](policy, ref, log_target, 0.7, mask, **more)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_loss_is_a_finite_scalar_and_the_mean_over_groups_that_hold_something(name, dtype):
    policy, *more = inputs = [x if x.dtype == torch.bool else x.to(dtype) for x in batch_for(name)]
    before = [x.clone() for x in inputs]
    value, grad = value_and_grad(lambda x: ask(name, x, *more), policy)
    assert value.shape == ()
    assert value.isfinite()
    assert grad.isfinite().all()
    assert value.dtype == grad.dtype == dtype
    each = [ask(name, *(x[b : b + 1] for x in before)) for b in range(3)]
    torch.testing.assert_close(value, torch.stack(each).mean())
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, before, strict=True))


@pytest.mark.parametrize("holes", [NAN, INF, -INF, 1e30])
def test_every_loss_drops_what_is_absent(name, holes):
    """Neither in its value nor in its gradient, whatever an absent entry or an empty group holds;
    the paper's two need no finite padding for a gradient of 0 there."""
    (policy, *more), (dirty, *others) = batch_for(name), batch_for(name, holes)
    mask = more[-1]
    clean = value_and_grad(lambda x: ask(name, x, *more), policy)
    value, grad = value_and_grad(lambda x: ask(name, x, *others), dirty)
    torch.testing.assert_close((value, grad[mask]), (clean[0], clean[1][mask]))
    assert not clean[1][~mask].any()
    if name in PAPERS:
        assert not grad[~mask].any()
        rewards = with_empty(*ragged(holes), holes)[2] / 0.5
        raw = value_and_grad(lambda x: ask(name, x, others[0], rewards, mask), dirty)
        torch.testing.assert_close(raw, (value, grad))


def test_every_loss_asks_no_device_for_numbers(name):
    """Tensors without numbers: whoever looked at one would fail, as a GPU would have to wait."""
    policy, *more = (x.to("meta") for x in batch_for(name))
    assert ask(name, policy.requires_grad_(), *more).shape == ()


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


LOGPS, REWARDS = st.floats(-60, 0), st.floats(-40, 40)


@st.composite
def groups(draw, logp=LOGPS, reward=REWARDS):
    """policy, ref, log_target (lists, B by K), mask and beta_pi, of any shape up to (4, 5)."""
    B, K = draw(st.integers(1, 4)), draw(st.integers(1, 5))

    def table(entry):
        row = st.lists(entry, min_size=K, max_size=K)
        return draw(st.lists(row, min_size=B, max_size=B))

    return (
        table(logp),
        table(logp),
        table(reward),
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


def test_at_the_start_dpo_is_log_2_and_exo_2_7612():
    """Policy equal to reference: every pair is a coin toss, whatever the label smoothing; and KL of
    a coin toss to (0.999, 0.001) is -log 2 - (log 0.999 + log 0.001) / 2."""
    logps = f64([[-12.0, -30.0], [-7.0, -7.5]])
    for eps in (0.0, 1e-3, 0.3):
        start = exo.dpo_loss(logps, logps, exo.preference_target(eps), beta_pi=0.1)
        assert start.item() == pytest.approx(LOG2)
    start = exo.exo_loss(logps, logps, exo.preference_target(1e-3), beta_pi=0.1)
    assert start.item() == pytest.approx(2.7612, abs=5e-5)


def test_reward_target_is_a_softmax_with_temperature_over_what_is_present():
    """Odds 1 : 3 at beta_r = 1 become 1 : 9 at beta_r = 1/2: a small beta_r trusts the reward. Only
    differences within a prompt matter. Of four places two are empty: one half each."""
    rewards = f64([[0.0, math.log(3)]])
    torch.testing.assert_close(exo.reward_target(rewards).exp(), f64([[0.25, 0.75]]))
    torch.testing.assert_close(exo.reward_target(rewards, 0.5).exp(), f64([[0.1, 0.9]]))
    shifted = exo.reward_target(rand(3, 4) + f64([[5.0], [-80.0], [1e3]]), 0.7)
    torch.testing.assert_close(shifted, exo.reward_target(rand(3, 4), 0.7), rtol=1e-10, atol=1e-10)
    mask = torch.tensor([[True, False, True, False]])
    log_p = exo.reward_target(f64([[1.0, 99.0, 1.0, NAN]]), 0.1, mask)
    torch.testing.assert_close(log_p, f64([[-LOG2, 0.0, -LOG2, 0.0]]))


@pytest.mark.parametrize("eps", [1e-9, 1e-3, 0.119, 0.4999])
def test_preference_target_puts_1_minus_eps_on_the_chosen(eps):
    """Column 0 is the chosen completion everywhere in this project. Without smoothing, DPO as
    published, the rejected one is impossible."""
    target = exo.preference_target(eps)
    assert target.shape == (1, 2)
    assert target.dtype == torch.float64
    torch.testing.assert_close(target.exp(), f64([[1 - eps, eps]]), rtol=1e-12, atol=0)
    assert exo.preference_target(0.0).tolist() == [[0.0, -INF]]


@pytest.mark.parametrize("beta_pi", [0.1, 1.0, 2.5])
@pytest.mark.parametrize("eps", [0.0, 0.2])
def test_dpo_is_minus_logsigmoid_of_the_margin(beta_pi, eps):
    """Rafailov et al. 2023, Eq. 7; with smoothing the conservative DPO of other libraries, entropy
    of the label included."""
    policy, ref = 10 * rand(6, 2, seed=1), 10 * rand(6, 2, seed=2)
    z = beta_pi * ((policy - ref)[:, 0] - (policy - ref)[:, 1])
    expected = -(1 - eps) * F.logsigmoid(z) - eps * F.logsigmoid(-z)
    loss = exo.dpo_loss(policy, ref, exo.preference_target(eps), beta_pi)
    torch.testing.assert_close(loss, expected.mean())


@pytest.mark.parametrize("beta_pi", [0.3, 1.0, 2.0])
def test_gradients_are_the_ones_in_the_docstrings(beta_pi):
    """EXO: beta_pi q (log q - log p - KL). DPO: beta_pi (q - p). A group of two each, so halved."""
    policy, ref, log_p = rand(2, 5, seed=1), rand(2, 5, seed=2), exo.reward_target(rand(2, 5), 0.6)
    log_q = F.log_softmax(beta_pi * (policy - ref), dim=-1)
    q, p = log_q.exp(), log_p.exp()
    reverse = (q * (log_q - log_p)).sum(-1, keepdim=True)
    expected = {"exo": beta_pi * q * (log_q - log_p - reverse) / 2, "dpo": beta_pi * (q - p) / 2}
    for name, loss in PAPERS.items():
        _, grad = value_and_grad(loss, policy, ref, log_p, beta_pi)
        torch.testing.assert_close(grad, expected[name], rtol=1e-9, atol=1e-12)


@both_losses
def test_a_target_is_normalised_over_the_group_and_one_label_serves_every_pair(loss):
    """Any log-weights will do as a target: the losses normalise them."""
    policy, ref, weights = rand(2, 3, seed=1), rand(2, 3, seed=2), rand(2, 3)
    normalised = loss(policy, ref, weights.log_softmax(-1), 0.4)
    torch.testing.assert_close(loss(policy, ref, weights + 7, 0.4), normalised)
    policy, ref, target = rand(5, 2, seed=1), rand(5, 2, seed=2), exo.preference_target(0.1)
    assert torch.equal(loss(policy, ref, target), loss(policy, ref, target.repeat(5, 1)))


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
def test_lone_completions_and_a_batch_of_empty_groups_teach_nothing(loss):
    """K = 1 has no comparison: q = p = 1. Nothing to learn from is not an error: one rank of many
    may draw such a batch. No NaN arises on the way either, which anomaly detection would report."""
    hole, nothing = torch.full((2, 3), NAN, dtype=torch.float64), torch.zeros(2, 3).bool()
    target = exo.reward_target(hole, 1.0, nothing)
    lone = rand(3, 1, seed=1), rand(3, 1, seed=2), rand(3, 1)
    for args in (lone, (hole, hole, target, 1.0, nothing)):
        with torch.autograd.set_detect_anomaly(True):
            value, grad = value_and_grad(loss, *args)
        assert value == 0
        assert not grad.any()


def test_impossible_is_not_absent():
    """Probability 0 keeps its place in q's softmax; an absent completion does not."""
    zeros, possible = f64([[0.0, 0.0, 0.0]]), torch.tensor([[True, True, False]])
    impossible = exo.dpo_loss(zeros, zeros, f64([[0.0, 0.0, -INF]]))
    absent = exo.dpo_loss(zeros, zeros, f64([[0.0, 0.0, -INF]]), mask=possible)
    assert impossible.item() == pytest.approx(math.log(3))
    assert absent.item() == pytest.approx(math.log(2))


def test_dpo_takes_probability_0_with_a_finite_gradient():
    """0 log q is 0, and the gradient is still beta_pi (q - p); -inf spoils no derivatives."""
    target = f64([[0.0, -INF, 0.0]])
    value, grad = value_and_grad(exo.dpo_loss, f64([[0.0] * 3]), f64([[0.0] * 3]), target, 2.0)
    assert value.item() == pytest.approx(math.log(3))
    torch.testing.assert_close(grad, 2 * f64([[1 / 3 - 1 / 2, 1 / 3, 1 / 3 - 1 / 2]]))
    args = rand(3, 2, seed=2), exo.preference_target(0.0), 0.7
    gradchecks(exo.dpo_loss, rand(3, 2, seed=1), *args)


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
def test_log_ratios_and_rewards_of_ten_thousand_give_finite_loss_and_gradient(loss, dtype, size):
    """A policy that has run away is still a number, for pairs and for groups; p = e^-20000
    underflows, its logarithm does not."""
    group = torch.tensor([[size, 0.0, -size, size, 1.0]])
    for logps, target in (
        (group[:, :2], exo.preference_target(1e-3)),
        (group, exo.reward_target(torch.tensor([[1.0, -1.0, 30.0, 0.0, -30.0]]))),
        (torch.zeros(1, 3), exo.reward_target(torch.tensor([[size, 0.0, -size]]))),
    ):
        logps = logps.to(dtype)
        value, grad = value_and_grad(loss, logps, torch.zeros_like(logps), target, 1.0)
        assert value.isfinite()
        assert grad.isfinite().all()
        assert value.dtype == grad.dtype == dtype


@both_losses
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_loss_has_the_dtype_of_policy_logps(loss, dtype):
    """The stored reference and the target follow the policy, not the other way round."""
    value = loss(rand(3, 2).to(dtype), rand(3, 2, seed=1).float(), exo.preference_target(0.1))
    assert value.dtype == dtype
    assert value.shape == ()


def gradchecks(loss, policy, *args):
    """First and second derivatives equal finite differences."""
    policy = policy.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, *args), policy)
    assert torch.autograd.gradgradcheck(lambda x: loss(x, *args), policy)


@both_losses
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(loss, masked):
    policy, ref, rewards, mask = ragged()
    mask = mask if masked else None
    gradchecks(loss, policy, ref, exo.reward_target(rewards, 0.5, mask), 0.7, mask)


def test_inputs_come_back_unchanged():
    """Nothing writes into its arguments (the official code does), NaN padding included."""
    policy, ref, rewards, mask = ragged(NAN)
    target = exo.reward_target(rewards, 0.5, mask)
    inputs = policy, ref, rewards, mask, target
    before = [x.clone() for x in inputs]
    for loss in PAPERS.values():
        loss(policy, ref, target, 0.5, mask)
        loss(policy[:1], ref[:1], rewards[:1], 0.5)
    exo.on_policy_ref(ref, policy, 0.5)
    exo.on_policy_target(rewards, ref, policy, 0.5, mask)
    exo.kl(policy, exo.masked_log_softmax(ref))
    exo.entropy(policy)
    exo.kl_estimates(policy, ref)
    exo.reward_model_loss(rewards[:, :2])
    exo.accuracy(policy, target, mask)
    for x, copy in zip(inputs, before, strict=True):
        torch.testing.assert_close(x, copy, rtol=0, atol=0, equal_nan=True)


# ------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize("beta", [0.0, -0.1, NAN, INF])
def test_betas_that_are_not_above_0_are_refused_by_name_and_value(beta):
    """A beta of 0 would divide by it, a negative one would train the wrong way."""
    zeros = f64([[0.0, 0.0]])
    with pytest.raises(ValueError, match=rf"beta_r must be .* above 0, got {beta}"):
        exo.reward_target(zeros, beta)
    for loss in PAPERS.values():
        with pytest.raises(ValueError, match=rf"beta_pi must be .* above 0, got {beta}"):
            loss(zeros, zeros, exo.preference_target(0.1), beta)


@pytest.mark.parametrize("eps", [-0.1, 0.5, 1.0, NAN])
def test_label_smoothing_outside_its_range_is_refused_with_its_value(eps):
    """At 1/2 the label says nothing, above it the opposite."""
    with pytest.raises(ValueError, match=rf"label_smoothing must be in \[0, 0\.5\), got {eps}"):
        exo.preference_target(eps)


def test_exo_refuses_probability_0_in_any_group_and_place_and_names_the_remedy():
    """KL(q || p) is infinite where p is 0, so EXO has no unsmoothed labels. One impossible
    completion among many is enough; where it is absent, it is padding."""
    said = r"reverse KL is infinite.*label_smoothing > 0"
    with pytest.raises(ValueError, match=said):
        exo.exo_loss(rand(3, 2), rand(3, 2), exo.preference_target(0.0))
    target = rand(3, 4)
    target[2, 1] = -INF
    mask = torch.ones(3, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=said):
        exo.exo_loss(rand(3, 4), rand(3, 4), target, mask=mask)
    mask[2, 1] = False
    assert exo.exo_loss(rand(3, 4), rand(3, 4), target, mask=mask).isfinite()


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


def test_kl_and_entropy_by_hand():
    """KL((1/2, 1/2) || (1/4, 3/4)) = log 2 - log 3 / 2, and the other order is another number. 0
    log 0 is 0; mass where the other has none costs infinity. Entropy is log N when uniform, 0 when
    certain."""
    a, b = f64([0.5, 0.5]).log(), f64([0.25, 0.75]).log()
    assert exo.kl(a, b).item() == pytest.approx(LOG2 - math.log(3) / 2)
    assert exo.kl(b, a).item() == pytest.approx(0.75 * math.log(3) - LOG2)
    sure = f64([0.0, -INF])
    assert exo.kl(sure, a).item() == pytest.approx(LOG2)
    assert exo.kl(sure, sure).item() == 0
    assert exo.kl(a, sure).item() == INF
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


def loop_accuracy(scores, target, mask):
    """Twin of accuracy: each pair of each group by hand."""
    shares = []
    for row, p, here in zip(scores, target, mask, strict=True):
        marks = []
        for i, j in itertools.permutations([k for k in range(len(here)) if here[k]], 2):
            if p[i] > p[j]:
                tie = abs(row[i] - row[j]) <= 1e-4
                marks.append(0.5 if tie else float(row[i] > row[j]))
        shares.append(sum(marks) / len(marks) if marks else 0.5)
    return sum(shares) / len(shares)


@any_machine
@given(groups(st.sampled_from([-INF, -2.0, -1.00005, -1.0]), st.integers(0, 2)))
def test_accuracy_is_the_mean_over_groups_of_the_share_of_pairs_in_order(case):
    """A tie is a half, and so is a gap that may be rounding, and a group without a comparable
    pair."""
    scores, _, target, mask, _ = case
    found = exo.accuracy(f64(scores), f64(target), torch.tensor(mask))
    assert found.item() == pytest.approx(loop_accuracy(scores, target, mask), abs=1e-12)


def test_kl_estimates_by_hand():
    """One draw to which pi gives twice the reference's probability."""
    estimates = exo.kl_estimates(f64([[math.log(0.5)]]), f64([[math.log(0.25)]]))
    expected = {"k1": LOG2, "k2": LOG2**2 / 2, "k3": LOG2 - 0.5}
    assert {name: x.item() for name, x in estimates.items()} == pytest.approx(expected)


def test_kl_estimates_k1_and_k3_are_unbiased_and_k2_is_not():
    """Averaged over every outcome instead of draws, k1 and k3 are the KL itself. k3 is about k1^2 /
    2 for a small k1, down to where 1 + x loses its digits, and never negative."""
    log_pi, log_ref = rand(7, seed=1).log_softmax(0), rand(7, seed=2).log_softmax(0)
    exact = exo.kl(log_pi, log_ref)
    means = {k: (log_pi.exp() * x).sum() for k, x in exo.kl_estimates(log_pi, log_ref).items()}
    torch.testing.assert_close(means["k1"], exact)
    torch.testing.assert_close(means["k3"], exact)
    assert (means["k2"] - exact).abs() > 0.01
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
