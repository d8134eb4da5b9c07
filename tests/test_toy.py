"""The exact world: what is enumerated, summed, trained and compared is what plain loops say."""

import itertools
import json
import math
import multiprocessing
import sys
import time
from dataclasses import replace

import pytest
import torch
from conftest import rand, seeded

import exo
from experiments import common
from experiments.toy import fit, main, measures, sweep, worlds
from model import GPT

TINY = worlds.Config(vocab_size=12, n_embd=3, steps=4, draws=128, warmup=2)
SEEDS = [0, 1]


def in_turn(job, jobs):
    return [job(*args) for args in jobs]


@pytest.fixture(scope="module")
def setup():
    return fit.prepare(TINY, SEEDS)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One tiny run with two processes: (folder, results)."""
    out = tmp_path_factory.mktemp("toy") / "deep" / "out"
    return out, main.run(out, seeds=2, config=TINY)


def random_logps(*shape: int, seed: int = 0) -> torch.Tensor:
    return (2 * rand(*shape, seed=seed)).log_softmax(dim=-1)


# --------------------------------------------------------------------------------------------------
# The world


def test_enumeration_equals_reading_every_string():
    """Each string's log-prob, model by model, is what the GPT says that reads this string alone."""
    config = replace(TINY, vocab_size=4)
    space = worlds.Space(config)
    weights = space.weights(worlds.generators(SEEDS, "weights"))
    weights = {name: 20 * w + 0.1 for name, w in weights.items()}  # far from uniform
    logps = space.exact(weights)
    assert torch.allclose(logps.exp().sum(dim=-1), torch.ones(2, dtype=torch.float64))
    for model in SEEDS:
        gpt = GPT(space.gpt.config).double()
        gpt.load_state_dict({name[4:]: w[model].double() for name, w in weights.items()})
        for string, logp in zip(itertools.product(range(4), repeat=2), logps[model], strict=True):
            rows = gpt(torch.tensor([[0, string[0]]]))[0].log_softmax(dim=-1)
            alone = rows[0, string[0]] + rows[1, string[1]]
            assert math.isclose(alone.item(), logp.item(), abs_tol=1e-10)
    assert (logps[0] - logps[1]).abs().max() > 0.1


def test_every_bump_has_rows_and_columns_of_its_own():
    """One bump in each of six strips of rows and of columns; the reward by a plain loop."""
    config = worlds.Config()
    reward, log_data, centres = worlds.plaid([3, 4], config)
    strip = 32 / 6
    for axis in (0, 1):
        strips = ((centres[..., axis] + 0.5) / strip - 0.5).round().sort(dim=-1).values
        assert strips.tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    assert not torch.equal(centres[0], centres[1])
    assert reward.min() == -6
    assert reward.max() > -0.3
    assert math.isclose(log_data.exp().sum().item(), 1)
    for row, col in ((7, 20), (16, 15)):
        near = [(row - a) ** 2 + (col - b) ** 2 for a, b in centres[0].tolist()]
        r = math.log(sum(math.exp(-d / (2 * 1.5**2)) for d in near))
        assert math.isclose(reward[0, row * 32 + col].item(), max(-6, r), rel_tol=1e-9)
        wide = -((row - 15.5) ** 2 + (col - 15.5) ** 2) / (2 * 9**2)
        middle = -0.5 / (2 * 9**2)
        assert math.isclose(
            (log_data[row * 32 + col] - log_data[16 * 32 + 16]).item(), wide - middle
        )


def test_draws_follow_the_distribution():
    """Frequencies are within five standard deviations, and impossible completions never come."""
    logps = torch.tensor([[0.5, 0.0, 0.3, 0.2, 0.0], [0.0, 0.1, 0.0, 0.0, 0.9]]).log()
    uniform = torch.rand(2, 20_000, generator=seeded(0))
    uniform[:, 0], uniform[:, 1] = 0.0, 1 - 2**-24  # the ends of the interval
    y = worlds.draw(logps, uniform)
    for row, p in zip(y, logps.exp(), strict=True):
        share = torch.bincount(row, minlength=5) / len(row)
        assert (share[p == 0] == 0).all()
        assert ((share - p).abs() <= 5 * (p * (1 - p) / len(row)).sqrt() + 1e-9).all()


# --------------------------------------------------------------------------------------------------
# Training


def test_labels_are_bradley_terry():
    """The better of a pair is chosen with probability sigmoid(r1 - r2), and pairs stay pairs."""
    generator = seeded(0)
    y = torch.randint(2, (1, 40_000), generator=generator)
    coin = torch.rand(1, 20_000, generator=generator)
    ranked = fit.ranked(y, torch.tensor([[0.0, -1.5]]), coin).view(-1, 2)
    pairs = y.view(-1, 2)
    assert torch.equal(pairs.sort(dim=-1).values, ranked.sort(dim=-1).values)
    chosen = ranked[pairs[:, 0] != pairs[:, 1], 0]
    assert abs((chosen == 0).double().mean().item() - 1 / (1 + math.exp(-1.5))) < 0.015


def plain_loss(name: str, K: int, logp, ref, reward, beta, y, uniform, coin) -> torch.Tensor:
    """One model, group by group, every loss written out: the slow twin of sampled_loss."""
    method, total, groups = fit.METHODS[name], 0, len(y) // K
    if method.on_policy:
        y = worlds.draw(logp.detach()[None], uniform[None])[0]
    for ids, c in zip(y.view(groups, K).tolist(), coin.tolist(), strict=False):
        if method.label_smoothing is not None:
            if c >= torch.sigmoid(reward[ids[0]] - reward[ids[1]]):
                ids.reverse()
            ratio, eps = beta * (logp - ref)[ids], method.label_smoothing
            p = torch.tensor([1 - eps, eps], dtype=torch.float64)
        else:
            rho = logp.detach() if method.on_policy else ref
            ratio, score = (logp - rho)[ids], (reward / beta + ref - rho)[ids]
            p = score.softmax(dim=0)
        q = ratio.softmax(dim=0)
        if name == "rloo":
            for i in range(K):
                others = torch.cat([score[:i], score[i + 1 :]]).mean()
                total = total - (score[i] - others) * logp[ids[i]] / K
        elif "exo" in name:
            total = total + (q * (q / p).log()).sum()
        else:
            total = total - (p * q.log()).sum()
    return total / groups


@pytest.mark.parametrize(("name", "K"), [(m, K) for m, K in measures.SPEC if K and K < 64])
def test_the_ensemble_equals_plain_loops_model_by_model(name, K):
    """Value and gradient of every model at a beta of its own: no mean over models, no crosstalk."""
    log_pi, log_sft, reward = (random_logps(2, 9, seed=s) for s in (1, 2, 3))
    beta = torch.tensor([[0.4], [1.5]], dtype=torch.float64)
    generator = seeded(0)
    uniform, coin = (torch.rand(2, n, generator=generator) for n in (16, 8))
    y = worlds.draw(log_sft, torch.rand(2, 16, generator=generator))
    x = log_pi.clone().requires_grad_()
    method = fit.METHODS[name]
    total = fit.sampled_loss(method, K, x, log_sft, reward, beta, y, uniform, coin)
    total.backward()
    twins, values = log_pi.clone().requires_grad_(), []
    for i in range(2):
        rest = (log_sft[i], reward[i], beta[i], y[i], uniform[i], coin[i])
        values.append(plain_loss(name, K, twins[i], *rest))
    sum(values).sum().backward()
    assert torch.allclose(x.grad, twins.grad, atol=1e-10)
    assert twins.grad.abs().amax(dim=-1).min() > 1e-4
    if name != "rloo":  # whose value says nothing: only its gradient is meant
        constant = total.item() - sum(values).sum().item()
        assert abs(constant) < 1e-9


def test_training_lowers_what_it_descends(setup):
    """Both exact KLs fall, each by its own method; sampled methods approach pi*."""
    longer = replace(TINY, steps=60)
    arms = [fit.Arm(m, K, 0.5, seed) for m, K in measures.SPEC for seed in SEEDS]
    ended = fit.train(setup, arms, "", config=longer)
    rows = measures.measure(setup, arms, setup.space.exact(ended))
    star = setup.of(arms[:2])[-1]
    for arm, row in zip(arms, rows, strict=True):
        i = SEEDS.index(arm.seed)
        name = "forward_kl" if "forward" in arm.method else "reverse_kl"
        start = fit.exact_kl(name, setup.log_sft[i], star[i]).item()
        assert row[name] < 0.9 * start, arm


def test_exact_fits_are_never_worse_than_where_they_start(setup):
    """And keep one fit per direction and seed, in this order, each best by its own objective."""
    spec = [("exo-rw", 8), ("dpo-rw", 8), ("reverse-kl-descent", None)]
    arms = [fit.Arm(m, K, 0.5, seed) for m, K in spec for seed in SEEDS]
    starts = fit.train(setup, arms, "")
    found, log_pi = fit.exact_fits(setup, starts, arms)
    assert [(a.method, a.seed) for a in found] == [(m, s) for m in fit.EXACT for s in SEEDS]
    star, before = setup.of(arms[:2])[-1], setup.space.exact(starts).view(3, 2, -1)
    for arm, logps in zip(found, log_pi, strict=True):
        i = SEEDS.index(arm.seed)
        ended = fit.exact_kl(arm.method, logps, star[i])
        assert ended < min(fit.exact_kl(arm.method, x, star[i]) for x in before[:, i])


def test_the_fittest_are_found_seed_by_seed():
    """Objectives of one method and seed compete; those of others do not."""
    arms = [fit.Arm(m, None, 0.5, s) for m in ("a", "b") for _ in range(3) for s in (0, 1)]
    objective = [3, 30, 1, 10, 2, 20, 0.3, 0.03, 0.1, 0.01, 0.2, 0.02]
    assert fit.fittest(arms, objective, 2) == [2, 4, 3, 5, 8, 10, 9, 11]


# --------------------------------------------------------------------------------------------------
# Measures


def test_columns_equal_plain_sums(setup):
    """Every column of the table is the sum its name says."""
    (log_pi,) = random_logps(1, 144, seed=5)
    (row,) = measures.measure(setup, [fit.Arm("m", 2, 0.4, 1)], log_pi[None])
    sft, reward = setup.log_sft[1].tolist(), setup.reward[1].tolist()
    star = worlds.optimum(setup.log_sft[1], setup.reward[1], 0.4).tolist()
    pi, log_pi, centres = log_pi.exp().tolist(), log_pi.tolist(), setup.centres[1].tolist()
    held, crossing = [0.0] * 6, 0.0
    for i, x in enumerate(pi):
        away = [math.dist(divmod(i, 12), c) for c in centres]
        if min(away) <= 3:
            held[away.index(min(away))] += x
        else:
            grid = [(a[0], b[1]) for a, b in itertools.permutations(centres, 2)]
            crossing += x * (min(math.dist(divmod(i, 12), c) for c in grid) <= 3)

    def kl(a, b):
        return sum(math.exp(x) * (x - y) for x, y in zip(a, b, strict=True))

    want = {
        "reverse_kl": kl(log_pi, star),
        "forward_kl": kl(star, log_pi),
        "kl_sft": kl(log_pi, sft),
        "entropy": -kl(log_pi, [0.0] * 144),
        "reward": sum(x * r for x, r in zip(pi, reward, strict=True)),
        "on": sum(held),
        "between": crossing,
        "modes": sum(x > 0.02 for x in held),
        "asymmetry": sum(abs(x - pi[i % 12 * 12 + i // 12]) / 2 for i, x in enumerate(pi)),
    }
    want["J"] = want["reward"] - 0.4 * want["kl_sft"]
    assert set(want) == {*measures.COLUMNS, "asymmetry"}
    want |= {"K": 2, "beta": 0.4, "seed": 1, "n_embd": 3}
    assert row.pop("method") == "m"
    assert row == pytest.approx(want, rel=1e-9)
    assert crossing > 0


def test_results_have_the_promised_form(finished):
    """Every field another program reads, from the file itself."""
    out, results = finished
    read = json.loads((out / "results.json").read_text())
    assert read == results
    assert not list(out.glob("*.tmp*"))
    assert set(read) == {"config", "versions", "worlds", "rows", "pictures"}
    for seed, world in enumerate(read["worlds"]):
        assert world["seed"] == seed
        assert len(world["centres"]) == 6
        assert len(world["log_sft"]) == 144
        assert sum(map(math.exp, world["log_sft"])) == pytest.approx(1, abs=1e-12)
    spec = [("sft", None), ("pi-star", None), *measures.SPEC, *((m, None) for m in fit.EXACT)]
    keys = [(row["method"], row["K"], row["seed"]) for row in read["rows"]]
    assert keys == [(m, K, seed) for m, K in spec for seed in SEEDS]
    for row in read["rows"]:
        assert set(row) == {"method", "K", "beta", "n_embd", "seed", "asymmetry", *measures.COLUMNS}
        assert 0 <= row["on"] + row["between"] <= 1 + 1e-9
    best = {row["seed"]: row["J"] for row in read["rows"] if row["method"] == "pi-star"}
    for row in read["rows"]:  # J(pi*) - J(pi) = beta KL(pi || pi*)
        gap = best[row["seed"]] - row["J"]
        assert gap == pytest.approx(TINY.beta * row["reverse_kl"], abs=1e-10)
    assert len(read["pictures"]) == len(spec)
    assert len(measures.table(read["rows"]).splitlines()) == 1 + len(spec)


def test_same_command_same_file_and_no_figures_are_no_failure(
    finished, tmp_path, monkeypatch, capsys
):
    """A seed fixes the run to the last digit, whatever torch's global generator holds; without
    matplotlib one line says how to get figures, and the rest is written."""
    torch.manual_seed(1)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    main.run(tmp_path, seeds=2, config=TINY)
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "No figures" in line]
    assert "pip install matplotlib" in said
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    a, b = ((folder / "results.json").read_bytes() for folder in (finished[0], tmp_path))
    assert a == b


def test_a_seed_is_the_same_alone_and_in_company():
    """What a world is does not depend on which others are fitted beside it."""
    alone, beside = fit.prepare(TINY, [1]), fit.prepare(TINY, [0, 1])
    assert torch.equal(alone.reward[0], beside.reward[1])
    assert torch.allclose(alone.log_sft[0], beside.log_sft[1], atol=1e-4)


def test_pictures_and_animation_are_written(finished):
    """For light and dark pages; the animation stays small enough for a page."""
    pytest.importorskip("matplotlib")
    for name in ("picture", "picture-dark", "losses", "losses-dark"):
        assert (finished[0] / f"{name}.png").stat().st_size > 1000
    assert 1000 < (finished[0] / "training.gif").stat().st_size < 2e6


def test_a_jobs_failure_is_the_runs_and_does_not_wait_for_the_other_workers():
    """The error that a worker met is raised here, as it was: as Ctrl-C in `python train.py`, whose
    workers may have a minute to go. A single job needs no worker."""
    assert common.in_parallel(divmod, [(7, 2)]) == [(3, 1)]
    with pytest.raises(ZeroDivisionError):
        common.in_parallel(divmod, [(1, 0), (1, 1)])
    with pytest.raises(TypeError):
        common.in_parallel(time.sleep, [("no number",), (60,)])
    for worker in multiprocessing.active_children():
        worker.join(10)
    assert not multiprocessing.active_children()


# --------------------------------------------------------------------------------------------------
# The sweep


def test_expected_weights_are_those_of_all_pairs(setup):
    """At K = 2 the estimate is within its noise of the exact sum over every pair of completions."""
    log_pi = random_logps(2, 144, seed=7)

    def gaps(x):  # of every pair (a, b)
        return x[:, :, None] - x[:, None, :]

    chance = (setup.log_sft[:, :, None] + setup.log_sft[:, None, :]).exp()
    q, p = gaps(log_pi - setup.log_sft).sigmoid(), (gaps(setup.reward) / TINY.beta).sigmoid()
    pull = chance * (q - p)  # DPO's on a, and with the other sign on b
    want = pull.sum(2) - pull.sum(1)
    random = worlds.generators(SEEDS, "draws")
    got = [sweep.expected_weights(exo.dpo_loss, 2, log_pi, setup, random) for _ in range(24)]
    error = torch.stack(got).std(dim=0) / 24**0.5
    away = (torch.stack(got).mean(dim=0) - want).abs()
    assert (away < 5 * error + 1e-6).all()
    assert want.abs().max() > 50 * error.max()


def test_at_sft_exo_points_along_J(monkeypatch):
    """Its expected gradient there is (K - 1) / K of the limit, which is J's."""
    monkeypatch.setattr(sweep, "DIRECTION_K", (2, 16))
    monkeypatch.setattr(sweep, "BATCH", 2**12)
    rows = sweep.directions(replace(TINY, steps=30), SEEDS)
    for row in common.only(rows, place="at sft", method="exo-rw"):
        assert row["to_J"] > 1 - 5 * row["to_J_error"] - 1e-3
        assert row["distance"] == pytest.approx(1 / row["K"], abs=0.05)
    assert {row["place"] for row in rows} == set(sweep.SHARES)
    falling = [common.stat(rows, "reverse_kl", place=place)[0] for place in sweep.SHARES]
    assert falling == sorted(falling, reverse=True)


def test_matched_policies_are_measured_and_near_their_target():
    """On the way from sft, by falling beta, the first within 0.05 counts; pi* does not. Where none
    is, the next beta lies between the first two neighbours that straddle the target."""
    near = [(4.0, 0.3), (2.0, 0.46), (1.0, 0.52), (0.5, 1.2), (0.1, 0.8), (0.05, 1.6)]
    rows = [{"method": "m", "K": 2, "seed": 0, "beta": b, "kl_sft": x} for b, x in near]
    rows.append(rows[0] | {"method": "pi-star", "kl_sft": 0.5})
    shuffled = rows[::2] + rows[1::2]
    assert sweep.matched(shuffled) == [{"target": 0.5} | rows[1]]
    (own, _) = sorted(sweep.runs(shuffled), key=len, reverse=True)
    assert sweep.missing(own) == {math.sqrt(1.0 * 0.5), math.sqrt(0.1 * 0.05)}


def test_tuning_looks_at_its_own_seeds_only():
    """The K and rate with the lowest mean regret there; what is told is of the other seeds."""
    rows = []
    for K, rate, seed, regret in (
        (2, 1, 100, 0.2),
        (8, 1, 100, 0.1),
        (2, 1, 0, 0.01),
        (8, 1, 0, 1),
    ):
        known = {"method": "m", "completions": 64, "K": K, "rate": rate, "seed": seed}
        rows.append(known | {"regret": regret})
    assert sweep.tuned(rows) == [rows[3]]


def test_every_piece_of_the_sweep_is_written(tmp_path, monkeypatch):
    """Data and a figure each; the search ends at policies that are near enough, or nowhere."""
    monkeypatch.setattr(sweep, "in_parallel", in_turn)
    monkeypatch.setattr(sweep, "WIDTHS", (2, 8))
    monkeypatch.setattr(sweep, "BATCH", 512)
    spec = [("exo-rw", 2), ("dpo-rw", 64), ("exo-rw", 64), ("reverse-kl-descent", None)]
    monkeypatch.setattr(sweep, "SPEC", spec)
    monkeypatch.setattr(sweep, "LEARNERS", ("exo-rw", "dpo-rw"))
    done = sweep.sweep_all(tmp_path, [0], replace(TINY, steps=40))
    assert json.loads((tmp_path / "sweep.json").read_text()) == done
    assert set(done) == {*sweep.SWEPT, "config", "matched"}
    assert all(abs(row["kl_sft"] - row["target"]) <= 0.05 for row in done["matched"])
    assert {row["method"] for row in done["matched"]} >= {"exo-rw", "reverse-kl-descent"}
    assert {row["n_embd"] for row in done["capacity"]} == {2, 8}
    assert {row["seed"] for row in done["efficiency"]} == {0}
    pytest.importorskip("matplotlib")
    for name in sweep.SWEPT:
        assert (tmp_path / f"{name}-dark.png").stat().st_size > 1000
