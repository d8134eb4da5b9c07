"""
What is measured of a policy, exactly, and the default run: one row per policy.

    reverse_kl, forward_kl   KL(pi || pi*) and KL(pi* || pi), nats
    J, reward, kl_sft        E[r] - beta KL(pi || sft), and its two parts
    entropy                  nats
    on, modes                mass within 3 tokens of a bump's centre; bumps with more than 2 % of it
    between                  mass within 3 tokens of a crossing of one bump's row and another's
                             column, and on no bump: the plaid, where pi* has next to nothing
    asymmetry                mass to be moved to swap the two tokens: 0 for a symmetric product
"""

from dataclasses import asdict, replace

import torch
from torch import Tensor

from exo import entropy, kl
from experiments.common import distinct, stat
from experiments.toy.fit import DESCENTS, Arm, Setup, exact_fits, prepare, train
from experiments.toy.worlds import BUMPS, Config, square_distance

NEAR, HELD = 3.0, 0.02  # tokens; share of the mass
COLUMNS = ("reverse_kl", "forward_kl", "reward", "kl_sft", "J", "on", "between", "modes", "entropy")
GROUPS = (2, 8, 64)
SPEC = [(m, K) for m in ("exo-rw", "dpo-rw") for K in GROUPS]
SPEC += [(m, 2) for m in ("exo-pref", "exo-pref-1e-3", "dpo-pref")]
SPEC += [(m, K) for m in ("exo-online", "dpo-online", "rloo") for K in GROUPS]
SPEC += [(m, 2) for m in ("exo-online-pref", "dpo-online-pref")]
SPEC += [(m, None) for m in DESCENTS]
FILMED = [("exo-rw", 64), ("dpo-rw", 64)]


def places(centres: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """centres (M, 6, 2) -> whose bump a completion is on (M, N, 6), and whether it is on a crossing
    and no bump (M, N), both bool."""
    distance = square_distance(centres, vocab_size)
    nearest = distance == distance.amin(dim=-1, keepdim=True)
    bump = nearest & (distance <= NEAR**2)
    row, column = centres[:, :, None, 0], centres[:, None, :, 1]
    grid = torch.stack(torch.broadcast_tensors(row, column), dim=-1)  # (M, 6, 6, 2)
    crossings = grid[:, ~torch.eye(BUMPS, dtype=torch.bool)]  # (M, 30, 2)
    near = (square_distance(crossings, vocab_size) <= NEAR**2).any(dim=-1)
    return bump, near & ~bump.any(dim=-1)


def measure(setup: Setup, arms: list[Arm], log_pi: Tensor) -> list[dict]:
    """One row per policy (M, N), one an arm: what it is, and the columns above."""
    world, beta, reward, log_sft, log_star = setup.of(arms)
    V = setup.config.vocab_size
    bump, crossing = places(setup.centres[world], V)
    pi, kl_sft = log_pi.exp(), kl(log_pi, log_sft)
    held = (pi[..., None] * bump).sum(dim=1)  # (M, 6)
    values = {
        "reverse_kl": kl(log_pi, log_star),
        "forward_kl": kl(log_star, log_pi),
        "J": (pi * reward).sum(dim=-1) - beta[:, 0] * kl_sft,
        "reward": (pi * reward).sum(dim=-1),
        "kl_sft": kl_sft,
        "entropy": entropy(log_pi),
        "on": held.sum(dim=-1),
        "between": (pi * crossing).sum(dim=-1),
        "modes": (held > HELD).sum(dim=-1),
        "asymmetry": (pi.view(-1, V, V) - pi.view(-1, V, V).mT).abs().sum(dim=(1, 2)) / 2,
    }
    columns = zip(*(x.tolist() for x in values.values()), strict=True)
    measured = [dict(zip(values, row, strict=True)) for row in columns]
    each = zip(arms, measured, strict=True)
    return [asdict(arm) | {"n_embd": setup.config.n_embd} | row for arm, row in each]


def fit_worlds(config: Config, seeds: list[int], spec: list[tuple]) -> dict:
    """Methods (name, K), sft, pi* and the exact fits on some seeds: {"worlds", "rows"}, and of seed
    0 {"pictures": {"method K": log pi}, "film"}."""
    setup, film = prepare(config, seeds), []
    arms = [Arm(method, K, config.beta, seed) for method, K in spec for seed in seeds]
    filmed = [i for i, arm in enumerate(arms) if (arm.method, arm.K) in FILMED and arm.seed == 0]
    actors = [arms[i] for i in filmed]

    def shoot(step: int, logps: Tensor) -> None:
        on = [row["on"] for row in measure(setup, actors, logps.double())]
        film.append({"step": step, "logps": logps.tolist(), "on": on})

    def watch(step: int, weights: dict, logps: Tensor) -> None:
        if actors and step % max(1, config.steps // 40) == 0:
            shoot(step, logps[filmed])

    ended = train(setup, arms, f"n_embd {config.n_embd}, all methods", watch=watch)
    log_ended = setup.space.exact(ended)
    if actors:
        shoot(config.steps, log_ended[filmed])
    exact, log_exact = exact_fits(setup, ended, arms)
    stars = [Arm("pi-star", None, config.beta, seed) for seed in seeds]
    log_pi = torch.cat([setup.log_sft, setup.of(stars)[-1], log_ended, log_exact])
    arms = [replace(star, method="sft") for star in stars] + stars + arms + exact
    pictures = {
        f"{arm.method} {arm.K or ''}".strip(): [round(x, 3) for x in logps.tolist()]
        for arm, logps in zip(arms, log_pi, strict=True)
        if arm.seed == 0
    }
    each = zip(seeds, setup.centres.tolist(), setup.log_sft.tolist(), strict=True)
    worlds = [{"seed": seed, "centres": centres, "log_sft": x} for seed, centres, x in each]
    rows = measure(setup, arms, log_pi)
    return {"worlds": worlds, "rows": rows, "pictures": pictures, "film": film}


def table(rows: list[dict]) -> str:
    """Mean ± standard error over seeds."""
    lines = ["".join(f"{head:>14}" for head in ("", *COLUMNS))]
    for method, K in distinct(rows, "method", "K"):
        stats = (stat(rows, name, method=method, K=K) for name in COLUMNS)
        cells = "".join(f"{mean:>8.2f} ±{se:4.2f}" for mean, se in stats)
        lines.append(f"{method:<20}{K or '':>3}{cells}")
    return "\n".join(lines)
