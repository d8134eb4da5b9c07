"""
The theorems behind EXO and DPO, proved on small worlds in float64 with nothing drawn at random.

A world has N completions, so a policy is N log-probabilities, and an expectation over K draws is a
sum over the multisets of K completions, each weighted by its multinomial probability: exact, and
2,145 terms instead of 3^64 for K = 64 draws of 3 completions. `theta` are the parameters;
`log_pi(theta)` the policy's log-probabilities. Unrestricted policies are log_softmax(theta).
"""

import itertools
import math

import numpy as np
import pytest
import torch

import exo

LOG_SFT = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
REWARD = torch.tensor([0.0, 1.0, -0.7], dtype=torch.float64)
THETA = torch.tensor([0.0, -0.9, -0.6], dtype=torch.float64)  # a policy far from every optimum


def log_softmax(x):
    return torch.log_softmax(x, dim=-1)


def optimum(beta, log_sft=LOG_SFT, reward=REWARD):
    """log pi* of E[r] - beta KL(pi || sft)."""
    return log_softmax(log_sft + reward / beta)


def tempered(log_pi, beta_pi, log_sft=LOG_SFT):
    """log pi^{beta_pi}, the normalised sft (pi / sft)^{beta_pi}."""
    return log_softmax(log_sft + beta_pi * (log_pi - log_sft))


def gradient(function, theta):
    theta = theta.detach().clone().requires_grad_()
    return torch.autograd.grad(function(theta), theta)[0]


# ------------------------------------------------------------------------------
# Exact expectations over K draws


def multisets(log_rho, K):
    """Every multiset of K completions as ids (M, K), and its probability (M,) under K draws."""
    N = len(log_rho)
    ids = torch.tensor(list(itertools.combinations_with_replacement(range(N), K)))
    counts = (ids.unsqueeze(-1) == torch.arange(N)).sum(1).double()
    log_orders = math.lgamma(K + 1) - torch.lgamma(counts + 1).sum(-1)
    return ids, (log_orders + counts @ log_rho).exp()


def labelled_pairs(log_sft, reward):
    """Every (chosen, rejected) and its probability: two draws, then a Bradley-Terry label."""
    ids = torch.tensor(list(itertools.product(range(len(reward)), repeat=2)))
    chosen, rejected = ids.unbind(-1)
    weights = 2 * (log_sft[chosen] + log_sft[rejected]).exp()
    return ids, weights * torch.sigmoid(reward[chosen] - reward[rejected])


def row_gradients(loss, theta, ids, beta_pi, ref, target, policy=log_softmax):
    """Each group's own loss differentiated in its log-probs (M, K), and those log-probs."""
    logps = policy(theta)[ids]
    mean = loss(logps, ref[ids], target, beta_pi)
    return torch.autograd.grad(mean, logps, create_graph=True)[0] * len(ids), logps


def expected_gradient(theta, loss, ids, weights, beta_pi, ref, target, policy=log_softmax):
    """sum_m weight_m grad loss(group m), itself differentiable in theta."""
    if not theta.requires_grad:
        theta = theta.detach().clone().requires_grad_()
    rows, logps = row_gradients(loss, theta, ids, beta_pi, ref, target, policy)
    return torch.autograd.grad(logps, theta, weights.unsqueeze(-1) * rows, create_graph=True)[0]


def offline_gradient(theta, loss, K, beta_pi, beta_r):
    """E[grad] of exo-rw or dpo-rw with y_1..y_K ~ sft."""
    ids, weights = multisets(LOG_SFT, K)
    target = exo.reward_target(REWARD[ids], beta_r)
    return expected_gradient(theta, loss, ids, weights, beta_pi, LOG_SFT, target).detach()


def on_policy_args(ids, rho, beta_pi, beta_r):
    """(reference, target) of on-policy EXO for these groups."""
    ref = exo.on_policy_ref(LOG_SFT, rho, beta_pi)
    return ref, exo.on_policy_target(REWARD[ids], LOG_SFT[ids], rho[ids], beta_r)


def on_policy_gradient(theta, rho, K, beta_pi, beta_r, loss=exo.exo_loss):
    """E[grad loss] with y_1..y_K ~ rho."""
    ids, weights = multisets(rho, K)
    args = on_policy_args(ids, rho, beta_pi, beta_r)
    return expected_gradient(theta, loss, ids, weights, beta_pi, *args).detach()


def on_policy_rows(theta, ids, rho, beta_pi, beta_r, loss=exo.exo_loss):
    """The gradient of each group's own loss in its log-probs (M, K), drawn from rho."""
    args = on_policy_args(ids, rho, beta_pi, beta_r)
    theta = theta.detach().clone().requires_grad_()
    return row_gradients(loss, theta, ids, beta_pi, *args)[0].detach()


def descend(grad, theta, steps=400, lr=0.1):
    """Adam with a cosine schedule down an exact gradient: where training would end."""
    theta = theta.detach().clone().requires_grad_()
    adam = torch.optim.Adam([theta], lr=lr)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for _ in range(steps):
        theta.grad = grad(theta).detach()
        adam.step()
        cosine.step()
    return theta.detach()


def slope(Ks, errors):
    """Least-squares slope of log error against log K: -1 for an error of order 1/K."""
    return np.polyfit(np.log(Ks), torch.stack(list(errors)).log().numpy(), 1)[0]


def test_the_multisets_are_a_distribution_with_the_right_mean():
    """The tool of this file: probabilities that sum to 1, and N draws' worth of each completion."""
    ids, weights = multisets(LOG_SFT, 8)
    counts = (ids.unsqueeze(-1) == torch.arange(3)).sum(1).double()
    torch.testing.assert_close(weights.sum().item(), 1.0)
    torch.testing.assert_close(weights @ counts, 8 * LOG_SFT.exp())
    torch.testing.assert_close(labelled_pairs(LOG_SFT, REWARD)[1].sum().item(), 1.0)


# ------------------------------------------------------------------------------
# The objective is a reverse KL


def two_token_policy(theta):
    """log pi of the 9 completions of two tokens out of 3: first token, then second given first."""
    first, second = theta[:3].log_softmax(0), theta[3:].view(3, 3).log_softmax(-1)
    return (first.unsqueeze(-1) + second).flatten()


@pytest.mark.parametrize("beta", [0.1, 0.4, 2.0])
def test_alignment_is_reverse_kl_in_value_and_gradient(beta):
    """grad J = -beta grad KL(pi || pi*) and J(pi*) - J(pi) = beta KL(pi || pi*): to raise the
    objective is to lower the reverse KL, for token-by-token policies as for any other."""
    theta, reward = torch.linspace(-2, 2, 12).double().sin(), torch.arange(9).double().cos()
    log_sft = log_softmax(torch.arange(9).double().sin())
    log_star = optimum(beta, log_sft, reward)

    def objective(log_pi):
        return (log_pi.exp() * (reward - beta * (log_pi - log_sft))).sum()

    grad_j = gradient(lambda t: objective(two_token_policy(t)), theta)
    grad_kl = gradient(lambda t: exo.kl(two_token_policy(t), log_star), theta)
    torch.testing.assert_close(grad_j, -beta * grad_kl)
    log_pi = two_token_policy(theta)
    regret = objective(log_star) - objective(log_pi)
    torch.testing.assert_close(regret, beta * exo.kl(log_pi, log_star))


# ------------------------------------------------------------------------------
# Many completions: EXO becomes the reverse KL, DPO the forward KL

TEMPERATURES = [(1.0, 1.0), (1.0, 0.6), (0.5, 1.0), (1.5, 0.8)]  # (beta_pi, beta_r)
KS = [8, 16, 32, 64]


def assert_limit(divergence, loss, beta_pi, beta_r):
    """E[grad loss] tends to the gradient of this divergence: twice the completions, half the error.
    As it stands, with no factor of beta_pi, which is inside pi^{beta_pi}."""
    limit = gradient(lambda t: divergence(tempered(log_softmax(t), beta_pi)), THETA)
    errors = [(offline_gradient(THETA, loss, K, beta_pi, beta_r) - limit).norm() for K in KS]
    assert -1.15 < slope(KS, errors) < -0.85
    assert errors[-1] < 0.1 * limit.norm()


@pytest.mark.parametrize(("beta_pi", "beta_r"), TEMPERATURES)
def test_exo_tends_to_reverse_kl_with_an_error_of_order_1_over_K(beta_pi, beta_r):
    """E[grad exo-rw] -> grad KL(pi^{beta_pi} || pi*_{beta_r})."""
    assert_limit(lambda log_pi: exo.kl(log_pi, optimum(beta_r)), exo.exo_loss, beta_pi, beta_r)


@pytest.mark.parametrize(("beta_pi", "beta_r"), TEMPERATURES)
def test_dpo_tends_to_forward_kl_with_an_error_of_order_1_over_K(beta_pi, beta_r):
    """E[grad dpo-rw] -> grad KL(pi*_{beta_r} || pi^{beta_pi}): the other order."""
    assert_limit(lambda log_pi: exo.kl(optimum(beta_r), log_pi), exo.dpo_loss, beta_pi, beta_r)


# ------------------------------------------------------------------------------
# Unrestricted policies: the same minimiser, at every K


def hessian(grad, theta):
    """The symmetric matrix of second derivatives at theta, from an exact gradient."""
    theta = theta.detach().clone().requires_grad_()
    rows = [torch.autograd.grad(g, theta, retain_graph=True)[0] for g in grad(theta)]
    return torch.stack(rows)


def assert_minimum_reached_from_elsewhere(grad, log_star):
    """Stationary at log_star, curved upwards in every direction but a shift of all logits, and
    where descent from two other policies ends."""
    assert grad(log_star).norm() < 1e-10
    curvature = torch.linalg.eigvalsh(hessian(grad, log_star))
    assert curvature[0].abs() < 1e-10  # the shift, which changes no policy
    assert curvature[1] > 1e-3
    for start in (THETA, -2 * THETA):
        end = log_softmax(descend(grad, start))
        torch.testing.assert_close(end.exp(), log_star.exp(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("K", [2, 5])
@pytest.mark.parametrize(("beta_pi", "beta_r"), [(1.0, 1.0), (0.5, 0.8), (2.0, 0.6)])
@pytest.mark.parametrize("loss", [exo.exo_loss, exo.dpo_loss], ids=["exo-rw", "dpo-rw"])
def test_exo_rw_and_dpo_rw_share_their_minimiser_at_every_K(loss, K, beta_pi, beta_r):
    """A policy that can represent sft exp(r / (beta_r beta_pi)) ends there whichever way round the
    KL is written and however few the completions: the order matters only when it cannot."""
    ids, weights = multisets(LOG_SFT, K)
    args = loss, ids, weights, beta_pi, LOG_SFT, exo.reward_target(REWARD[ids], beta_r)
    assert_minimum_reached_from_elsewhere(
        lambda t: expected_gradient(t, *args), optimum(beta_r * beta_pi)
    )


def pairs_gradient(loss, eps, beta_pi=1.0):
    """theta -> E[grad] of exo-pref or dpo-pref on Bradley-Terry labels."""
    args = loss, *labelled_pairs(LOG_SFT, REWARD), beta_pi, LOG_SFT, exo.preference_target(eps)
    return lambda theta: expected_gradient(theta, *args)


@pytest.mark.parametrize("beta_pi", [1.0, 0.5])
def test_dpo_pref_without_smoothing_shares_it_when_labels_are_bradley_terry(beta_pi):
    """DPO on labels of probability sigmoid(r1 - r2) ends at sft exp(r / beta_pi): the labels' own
    noise is the target, and smoothing would only blur it."""
    grad = pairs_gradient(exo.dpo_loss, 0.0, beta_pi)
    assert_minimum_reached_from_elsewhere(grad, optimum(beta_pi))
    assert pairs_gradient(exo.dpo_loss, 0.1, beta_pi)(optimum(beta_pi)).norm() > 1e-2


@pytest.mark.parametrize("eps", [1e-3, 0.01, 0.3])
def test_exo_pref_does_not_share_it(eps):
    """The same labels, the other KL: exo-pref ends at a policy whose sharpness eps has set, more
    than the reward."""
    grad = pairs_gradient(exo.exo_loss, eps)
    assert grad(optimum(1.0)).norm() > 1e-2
    end = log_softmax(descend(grad, optimum(1.0)))
    assert grad(end).norm() < 1e-3
    assert exo.kl(end, optimum(1.0)) > 1e-2


# ------------------------------------------------------------------------------
# A policy class that cannot represent the optimum: the methods part ways

LINE = torch.arange(6).double()
BROAD_SFT = torch.full((6,), 1 / 6, dtype=torch.float64).log()
TWO_MODES = torch.tensor([3.0, 1.0, -2.0, -2.0, 0.5, 2.0], dtype=torch.float64)


def bump(theta):
    """A discretised Gaussian of standard deviation 1 on a line of 6 completions: one mode."""
    return log_softmax(-((LINE - theta) ** 2) / 2)


def best_bump(loss, K=4):
    """The minimiser of the exact expected loss over bumps, the best of three starts."""
    ids, weights = multisets(BROAD_SFT, K)
    ref, target = BROAD_SFT[ids], exo.reward_target(TWO_MODES[ids])

    def value(theta):
        each = zip(bump(theta)[ids].split(1), ref.split(1), target.split(1), strict=True)
        return torch.stack([loss(*group) for group in each]) @ weights

    def grad(theta):
        return expected_gradient(theta, loss, ids, weights, 1.0, BROAD_SFT, target, bump)

    starts = torch.tensor([[0.5], [2.5], [4.5]], dtype=torch.float64)
    return bump(min((descend(grad, start, 100) for start in starts), key=value))


def test_out_of_reach_exo_is_nearer_in_reverse_kl_and_dpo_in_forward_kl():
    """One bump for two modes: EXO sits on the better mode, DPO between the two, on completions that
    are worse than either."""
    log_star = optimum(1.0, BROAD_SFT, TWO_MODES)
    by_exo, by_dpo = best_bump(exo.exo_loss), best_bump(exo.dpo_loss)
    assert exo.kl(by_exo, log_star) < exo.kl(by_dpo, log_star) - 1
    assert exo.kl(log_star, by_dpo) < exo.kl(log_star, by_exo) - 1
    assert by_exo[:2].exp().sum() > 0.9  # the better mode
    assert by_dpo[2:4].exp().sum() > 0.5 > 50 * log_star[2:4].exp().sum()  # the valley


# ------------------------------------------------------------------------------
# Noisy labels


def average_loss(loss, margin, P, eps, beta_pi=1.0):
    """The first of a pair is labelled better with probability P; margin is its log-ratio lead."""
    first, zeros = torch.stack([margin, torch.zeros_like(margin)]).unsqueeze(0), torch.zeros(1, 2)
    label = exo.preference_target(eps)
    return P * loss(first, zeros, label, beta_pi) + (1 - P) * loss(
        first.flip(-1), zeros, label, beta_pi
    )


def coin(log_odds):
    """log-probabilities of a coin with these log-odds."""
    return log_softmax(torch.stack([log_odds, torch.zeros_like(log_odds)]))


MARGINS = torch.linspace(-6, 6, 13, dtype=torch.float64)


def assert_same_up_to_a_constant(a, b):
    """Two functions of the margin, in value; their gradients are then the same."""
    rest = torch.stack([a(m) - b(m) for m in MARGINS])
    torch.testing.assert_close(rest, rest[:1].expand_as(rest), rtol=0, atol=1e-10)


@pytest.mark.parametrize("beta_pi", [1.0, 0.3])
@pytest.mark.parametrize("eps", [1e-3, 0.119, 0.4])
@pytest.mark.parametrize("P", [0.05, 0.5, 0.7])
def test_noisy_labels_give_exo_pref_the_log_odds_2P_minus_1_times_those_of_eps(P, eps, beta_pi):
    """exo-pref averages the *log-odds* of the label: the mean loss is, up to a constant, the
    reverse KL to a coin of log-odds (2P - 1) log((1 - eps) / eps). dpo-pref averages the
    *probability*: the forward KL to a coin of P (1 - eps) + (1 - P) eps, also at eps = 0."""
    odds = coin(torch.tensor((2 * P - 1) * math.log((1 - eps) / eps), dtype=torch.float64))
    assert_same_up_to_a_constant(
        lambda m: average_loss(exo.exo_loss, m, P, eps, beta_pi),
        lambda m: exo.kl(coin(beta_pi * m), odds),
    )
    for e in (0.0, eps):
        p = P * (1 - e) + (1 - P) * e
        label = torch.tensor([p, 1 - p], dtype=torch.float64).log()
        assert_same_up_to_a_constant(
            lambda m, e=e: average_loss(exo.dpo_loss, m, P, e, beta_pi),
            lambda m, label=label: exo.kl(label, coin(beta_pi * m)),
        )


def best_margin(loss, P, eps):
    """The margin at which the average loss is least, by bisection on its gradient."""
    low, high = torch.tensor(-30.0).double(), torch.tensor(30.0).double()
    for _ in range(60):
        middle = (low + high) / 2
        rising = gradient(lambda m: average_loss(loss, m, P, eps), middle) > 0
        low, high = (low, middle) if rising else (middle, high)
    return middle.item()


def test_no_policy_attains_the_margins_that_exo_pref_asks_for():
    """Around three completions a policy's margins sum to 0, and so do DPO's under Bradley-Terry
    labels; exo-pref's do not, so its pairs pull against one another."""
    labels = torch.sigmoid(REWARD - REWARD.roll(-1))  # of (y1, y2), (y2, y3), (y3, y1)

    def cycle(loss, eps):
        return sum(best_margin(loss, P.item(), eps) for P in labels)

    assert abs(cycle(exo.dpo_loss, 0.0)) < 1e-9
    for eps in (1e-3, 0.1, 0.119):
        asked = ((2 * labels - 1) * math.log((1 - eps) / eps)).sum().item()
        assert cycle(exo.exo_loss, eps) == pytest.approx(asked, abs=1e-9)
        assert abs(asked) > 0.05


def test_near_even_odds_eps_of_sigmoid_minus_2_makes_exo_pref_bradley_terry():
    """2P - 1 is about x / 2 for P = sigmoid(x), so at log-odds of 2, eps = 0.119, exo-pref asks for
    x itself, with an error of order x^3; any other eps scales it."""
    eps = 1 / (1 + math.exp(2))
    gaps = [best_margin(exo.exo_loss, 1 / (1 + math.exp(-x)), eps) / x - 1 for x in (0.2, 0.1)]
    assert abs(gaps[1]) < 1e-3
    assert gaps[0] / gaps[1] == pytest.approx(4, rel=0.02)
    P = 1 / (1 + math.exp(-0.1))
    assert best_margin(exo.exo_loss, P, 1e-3) / 0.1 == pytest.approx(math.log(999) / 2, rel=1e-3)


# ------------------------------------------------------------------------------
# On-policy EXO


def reverse_kl_gradient(theta, beta):
    return gradient(lambda t: exo.kl(log_softmax(t), optimum(beta)), theta)


@pytest.mark.parametrize("K", [2, 3, 5, 12])
@pytest.mark.parametrize("beta", [0.4, 1.0])
def test_fresh_draws_give_the_reverse_kl_gradient_times_K_minus_1_over_K(K, beta):
    """With y_1..y_K from the policy itself there is no bias at any K, only a known factor: the
    price of the group's mean as a baseline that contains the draw itself."""
    grad = on_policy_gradient(THETA, log_softmax(THETA), K, 1.0, beta)
    torch.testing.assert_close(grad, (K - 1) / K * reverse_kl_gradient(THETA, beta))


def test_each_fresh_group_has_K_minus_1_over_K_of_rloo():
    """In log pi(y_i) the gradient is (l_i - mean l) / K, l_i = log pi(y_i) - log pi*(y_i) the cost:
    the baseline is the group's mean. REINFORCE that compares each draw with the mean of the
    *others* (RLOO), on the gains r / beta - log pi / sft, is the same without the factor (K - 1)/K:
    not on average but group by group. On the reward with the KL in it, beta times the gain, the
    factor is (K - 1) / (K beta)."""
    K, beta, log_pi = 4, 0.5, log_softmax(THETA)
    ids = multisets(LOG_SFT, K)[0]
    rows = on_policy_rows(THETA, ids, log_pi, 1.0, beta)
    cost = (log_pi - optimum(beta))[ids]
    torch.testing.assert_close(rows, (cost - cost.mean(-1, keepdim=True)) / K)
    gain = (REWARD / beta + LOG_SFT - log_pi)[ids]  # (r - beta log pi / sft) / beta
    others = (gain.sum(-1, keepdim=True) - gain) / (K - 1)
    torch.testing.assert_close(rows, (K - 1) / K * -(gain - others) / K)
    paid = (REWARD - beta * (log_pi - LOG_SFT))[ids]
    rloo = -(paid - (paid.sum(-1, keepdim=True) - paid) / (K - 1)) / K
    torch.testing.assert_close(rows, (K - 1) / (K * beta) * rloo)


def test_at_K_2_fresh_dpo_is_exo_times_a_factor_of_the_gain_and_at_large_K_it_is_not():
    """With fresh draws q is uniform. Of two, DPO pulls by tanh(D / 2) / 2 where EXO pulls by D / 4:
    D is their difference in gain, so the same way, less for large D. That is why DPO seeks modes
    there, too. Of many draws its mean gradient is the forward KL's, another direction."""
    log_pi, beta, ids = log_softmax(THETA), 0.5, torch.tensor([[0, 1], [1, 2], [2, 0]])
    gain = REWARD / beta + LOG_SFT - log_pi
    D = (gain[ids[:, 0]] - gain[ids[:, 1]])[:, None]
    by_exo = on_policy_rows(THETA, ids, log_pi, 1.0, beta)
    by_dpo = on_policy_rows(THETA, ids, log_pi, 1.0, beta, exo.dpo_loss)
    torch.testing.assert_close(by_exo, D / 4 * torch.tensor([[-1.0, 1.0]]))
    torch.testing.assert_close(by_dpo, by_exo * (D / 2).tanh() / (D / 2))

    grad = on_policy_gradient(THETA, log_pi, 64, 1.0, beta, exo.dpo_loss)
    forward = gradient(lambda t: exo.kl(optimum(beta), log_softmax(t)), THETA)
    reverse = reverse_kl_gradient(THETA, beta)
    cosine = torch.nn.CosineSimilarity(dim=0)
    assert cosine(grad, forward) > 0.999 > 0.99 > cosine(grad, reverse)


@pytest.mark.parametrize("eps", [0.119, 1e-3])
def test_two_completions_are_pulled_the_same_way_by_both_losses(eps):
    """A pair has one margin, and both losses are least at the same one: they differ in how hard
    they pull, not in which direction. Only over more completions, or on average, do they part."""
    margins = torch.linspace(-6, 6, 25, dtype=torch.float64)
    pulls = []
    for loss in (exo.exo_loss, exo.dpo_loss):
        x = margins.clone().requires_grad_()
        pairs = torch.stack([x, torch.zeros_like(x)], dim=-1)
        total = len(x) * loss(pairs, torch.zeros_like(pairs), exo.preference_target(eps))
        pulls += torch.autograd.grad(total, x)
    assert (pulls[0].sign() == pulls[1].sign()).all()
    assert (pulls[0] - pulls[1]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("beta_pi", "beta_r", "stale"), [(0.5, 0.8, [0.0, 0.0, 0.0]), (1.0, 0.5, [0.5, 0.0, -0.4])]
)
def test_the_factor_is_exact_only_for_fresh_draws_at_beta_pi_1(beta_pi, beta_r, stale):
    """With beta_pi != 1 fresh draws need importance weights (pi / sft)^(beta_pi - 1), and draws
    from an older policy are reweighted within the group, too: a ratio of averages is biased. Beyond
    the (K - 1)/K the limit is grad KL(pi^{beta_pi} || pi*_{beta_r}), with an error of order 1/K."""
    rho = log_softmax(THETA + torch.tensor(stale, dtype=torch.float64))
    limit = gradient(
        lambda t: exo.kl(tempered(log_softmax(t), beta_pi), optimum(beta_r)),
        THETA,
    )
    grads = [on_policy_gradient(THETA, rho, K, beta_pi, beta_r) for K in KS]
    errors = [(K / (K - 1) * grad - limit).norm() for K, grad in zip(KS, grads, strict=True)]
    assert -1.15 < slope(KS, errors) < -0.85
    assert errors[0] > 1e-3 * limit.norm()


@pytest.mark.parametrize(("beta_pi", "beta_r"), [(1.0, 0.5), (0.5, 1.0), (2.0, 0.25)])
def test_at_the_optimum_every_single_on_policy_group_has_gradient_0(beta_pi, beta_r):
    """Not the mean alone: each group is silent at pi* = sft exp(r / (beta_r beta_pi)), however
    stale the snapshot, so the noise dies out as the policy arrives."""
    log_star = optimum(beta_r * beta_pi)
    for rho in (log_star, log_softmax(THETA)):
        ids, _ = multisets(rho, 3)
        assert on_policy_rows(log_star, ids, rho, beta_pi, beta_r).abs().max() < 1e-12


def on_policy_variance(theta, K=2, beta=0.5):
    """Trace of the covariance of the gradient of one fresh group."""
    rho = log_softmax(theta)
    ids, weights = multisets(rho, K)
    rows = on_policy_rows(theta, ids, rho, 1.0, beta)
    scores = torch.eye(3, dtype=torch.float64) - rho.exp()  # d log pi(y) / d theta, by row
    grads = (rows.unsqueeze(-1) * scores[ids]).sum(1)
    return weights @ (grads - weights @ grads).square().sum(-1)


def test_the_variance_of_on_policy_exo_falls_with_the_square_of_the_distance():
    """Half as far from pi*, a quarter of the noise."""
    near, half = (on_policy_variance(optimum(0.5) + h * THETA) for h in (0.02, 0.01))
    assert near > 0
    assert (near / half).item() == pytest.approx(4, rel=0.05)


def test_a_snapshot_of_sft_is_the_offline_loss():
    """rho = sft makes on-policy EXO exo-rw again: the offline method is its first step."""
    ids, weights = multisets(LOG_SFT, 3)
    target = exo.reward_target(REWARD[ids], 0.6)
    offline = expected_gradient(THETA, exo.exo_loss, ids, weights, 0.7, LOG_SFT, target)
    torch.testing.assert_close(on_policy_gradient(THETA, LOG_SFT, 3, 0.7, 0.6), offline.detach())


# ------------------------------------------------------------------------------
# Confidently wrong


def margin_gradient(loss, margin, beta_pi, eps):
    """Gradient in (log pi(chosen), log pi(rejected)) of one pair at this margin."""
    logps, zeros = torch.tensor([[margin, 0.0]], dtype=torch.float64), torch.zeros(1, 2)
    return gradient(lambda x: loss(x, zeros, exo.preference_target(eps), beta_pi), logps)[0]


@pytest.mark.parametrize("beta_pi", [0.1, 1.0, 2.0])
@pytest.mark.parametrize("margin", [-1e3, -1e4])
def test_confidently_wrong_dpo_pushes_with_beta_pi_and_exo_not_at_all(margin, beta_pi):
    """DPO still moves chosen up and rejected down by (1 - eps) beta_pi; EXO's q (1 - q) is 0, so a
    policy that never writes the chosen completion never hears of it."""
    wrong = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    dpo = margin_gradient(exo.dpo_loss, margin, beta_pi, 1e-3)
    torch.testing.assert_close(dpo, 0.999 * beta_pi * wrong)
    assert margin_gradient(exo.exo_loss, margin, beta_pi, 1e-3).abs().max() < 1e-12


def test_exo_learns_most_from_pairs_it_is_unsure_of():
    """EXO's gradient is beta_pi q (1 - q) (z - log((1 - eps) / eps)): large near margin 0, and
    e^-20 of that at margin -20, where DPO's, q - (1 - eps), is largest."""
    for z in (-20.0, -3.0, 0.0, 3.0):
        q = 1 / (1 + math.exp(-z))
        by_exo, by_dpo = q * (1 - q) * (z - math.log(999)), q - 0.999
        for loss, expected in ((exo.exo_loss, by_exo), (exo.dpo_loss, by_dpo)):
            chosen = margin_gradient(loss, z, 1.0, 1e-3)[0].item()
            assert chosen == pytest.approx(expected, rel=1e-6)
