"""
tests/golden.json: inputs, losses and gradients of the paper's four methods, for whoever writes them
anew in another project.

    python -m tests.test_golden     writes it

The numbers come from the loop below: one float at a time, the gradient by its formula, without
exo.py and torch, which must give the same.
"""

import json
import math
import random
from pathlib import Path

import pytest
import torch

import exo

FILE = Path(__file__).with_name("golden.json")
ABOUT = [
    "Losses of EXO and DPO (Ji et al. 2024, arXiv:2402.00856) and their gradients, in float64.",
    "inputs, by K: log-probs of 4 prompts x K completions, summed over tokens, under the policy "
    "and the reference; a reward for each; mask, 1 where a completion exists.",
    "q = softmax(beta_pi * (policy_logps - ref_logps)) over the completions that exist.",
    "p = softmax(rewards / beta_r) over the same (rw), or (1 - eps, eps), chosen first (pref).",
    "exo: KL(q || p). dpo: -sum p log q. loss: the mean over prompts that have completions.",
    "gradient: of the loss in policy_logps.",
]
EPS = {"exo-pref": (0.001, 0.1, 0.4), "dpo-pref": (0.0, 0.1, 0.4)}
BETAS = ((0.1, 1.0), (0.5, 0.2), (1.0, 3.0))  # beta_pi, beta_r


# ------------------------------------------------------------------------------
# The loop


def make_inputs(K: int) -> dict:
    """Prompts with all K completions, with two of them, with all but the last (of K = 2: none), and
    with log-ratios in the hundreds."""
    rng = random.Random(K)
    names = ("policy_logps", "ref_logps", "rewards", "mask")
    inputs: dict = {name: [] for name in names}
    for n, spread in ((K, 1.0), (2, 3.0), (K - 1 if K > 2 else 0, 3.0), (K, 300.0)):
        ref = [round(rng.uniform(-900, -600), 3) for _ in range(K)]
        inputs["ref_logps"].append(ref)
        inputs["policy_logps"].append([round(x + rng.gauss(0, spread), 3) for x in ref])
        inputs["rewards"].append([round(rng.gauss(0, 2), 3) for _ in range(K)])
        inputs["mask"].append([1] * n + [0] * (K - n))
    return inputs


def log_softmax(xs: list[float]) -> list[float]:
    top = max(xs)
    log_z = top + math.log(sum(math.exp(x - top) for x in xs))
    return [x - log_z for x in xs]


def one_prompt(loss: str, log_ratios, log_p, beta_pi: float) -> tuple[float, list[float]]:
    """(loss, gradient in the policy's log-probs) of a prompt's completions."""
    log_q = log_softmax([beta_pi * x for x in log_ratios])
    q, p = [math.exp(x) for x in log_q], [math.exp(x) for x in log_p]
    if loss == "dpo":
        value = -sum(pi * lq for pi, lq in zip(p, log_q, strict=True))
        return value, [beta_pi * (qi - pi) for qi, pi in zip(q, p, strict=True)]
    gaps = [lq - lp for lq, lp in zip(log_q, log_p, strict=True)]
    value = sum(qi * gap for qi, gap in zip(q, gaps, strict=True))
    return value, [beta_pi * qi * (gap - value) for qi, gap in zip(q, gaps, strict=True)]


def whole(method: str, inputs: dict, beta_pi: float, beta_r=None, eps=None) -> dict:
    loss, target = method.split("-")
    values, gradient = [], []
    for policy, ref, rewards, mask in zip(*inputs.values(), strict=True):
        there, row = range(sum(mask)), []  # those that exist come first
        if there:
            if target == "rw":
                log_p = log_softmax([rewards[k] / beta_r for k in there])
            else:
                log_p = [math.log(1 - eps), math.log(eps) if eps else -math.inf]
            ratios = [policy[k] - ref[k] for k in there]
            value, row = one_prompt(loss, ratios, log_p, beta_pi)
            values.append(value)
        gradient.append(row + [0.0] * (len(mask) - len(row)))
    n = len(values)
    return {"loss": sum(values) / n, "gradient": [[x / n for x in row] for row in gradient]}


def settings():
    """Every (method, K, beta_pi, beta_r or eps)."""
    for beta_pi, beta_r in BETAS:
        for method in ("exo-rw", "dpo-rw"):
            for K in (2, 4, 8):
                yield {"method": method, "K": K, "beta_pi": beta_pi, "beta_r": beta_r}
        for method, each in EPS.items():
            for eps in each:
                yield {"method": method, "K": 2, "beta_pi": beta_pi, "eps": eps}


def make() -> dict:
    inputs, cases = {K: make_inputs(K) for K in (2, 4, 8)}, []
    for case in settings():
        rest = {k: v for k, v in case.items() if k not in ("method", "K")}
        cases.append(case | whole(case["method"], inputs[case["K"]], **rest))
    return {"about": ABOUT, "inputs": {str(K): x for K, x in inputs.items()}, "cases": cases}


# ------------------------------------------------------------------------------
# exo.py beside it


def test_the_file_is_what_the_loop_gives():
    assert near(json.loads(FILE.read_text()), make())


def near(a, b) -> bool:
    """Equal, but for the last digits of numbers: another machine may round otherwise."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(near(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(near, a, b))
    return a == b or (isinstance(a, float) and math.isclose(a, b, rel_tol=1e-12, abs_tol=1e-300))


def test_losses_and_gradients_are_the_golden_ones():
    golden = json.loads(FILE.read_text())
    for case in golden["cases"]:
        inputs = golden["inputs"][str(case["K"])]
        policy, ref, rewards, mask = (torch.tensor(x, dtype=torch.float64) for x in inputs.values())
        mask, (loss, target) = mask.bool(), case["method"].split("-")
        if target == "rw":
            log_p = exo.reward_target(rewards, case["beta_r"], mask)
        else:
            log_p = exo.preference_target(case["eps"])
        value = exo.LOSSES[loss](policy.requires_grad_(), ref, log_p, case["beta_pi"], mask)
        (gradient,) = torch.autograd.grad(value, policy)
        assert value.item() == pytest.approx(case["loss"], rel=1e-12)
        want = torch.tensor(case["gradient"], dtype=torch.float64)
        torch.testing.assert_close(gradient, want, rtol=1e-10, atol=1e-13)


if __name__ == "__main__":
    text = json.dumps(make())
    FILE.write_text(text.replace('{"method"', '\n{"method"').replace("]], ", "]],\n") + "\n")
