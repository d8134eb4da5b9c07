"""The exact worlds: what is enumerated, summed and compared is what the plain loops say."""

import itertools
import json
import math
import sys
from dataclasses import replace

import pytest
import torch

from experiments import toy, toy_figures, toy_sweep, toy_worlds
from model import GPT

TINY = toy_worlds.Config(vocab_size=3, length=3, n_embd=2, steps=3, draws=512, starts=2, warmup=2)
TINY_PICTURE = replace(TINY, vocab_size=8, length=2)


def tiny_run(out, **kwargs):
    return toy.run(out, numbers=TINY, picture=TINY_PICTURE, **kwargs)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One tiny run of everything, without figures' help: (folder, results)."""
    out = tmp_path_factory.mktemp("toy") / "deep" / "out"
    return out, tiny_run(out, seeds=2, sweep=True)


def random_logps(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).mul(2).log_softmax(dim=-1)


def test_enumeration_equals_reading_every_string():
    """Each string's log-prob, model by model, is what the GPT says that reads this string alone."""
    space = toy_worlds.Space(TINY)
    weights = space.weights([torch.Generator().manual_seed(seed) for seed in (0, 1)])
    weights = {name: 20 * w + 0.1 for name, w in weights.items()}  # far from uniform
    with toy.sdpa_kernel(toy.SDPBackend.MATH):
        logps = space.exact(weights)
    assert torch.allclose(logps.exp().sum(dim=-1), torch.ones(2, dtype=torch.float64))
    for model in range(2):
        gpt = GPT(space.gpt.config).double()
        gpt.load_state_dict({name[4:]: w[model].double() for name, w in weights.items()})
        strings = itertools.product(range(TINY.vocab_size), repeat=TINY.length)
        for string, logp in zip(strings, logps[model], strict=True):  # last token fastest
            rows = gpt(torch.tensor([[0, *string[:-1]]]))[0].log_softmax(dim=-1)
            alone = sum(rows[t, token] for t, token in enumerate(string))
            assert math.isclose(alone.item(), logp.item(), abs_tol=1e-10)
    assert (logps[0] - logps[1]).abs().max() > 0.1
    assert logps.std() > 0.1


def test_code_world_is_the_noisy_channel():
    """Data and reward by a plain loop; probabilities add up to 1; the codewords are distinct."""
    config = replace(TINY, vocab_size=4)
    world = toy_worlds.code_world(5, config)
    codewords = [tuple(c) for c in world.centres.tolist()]
    assert len(set(codewords)) == toy_worlds.CODEWORDS
    for i, string in enumerate(itertools.product(range(4), repeat=3)):
        chance = []
        for word in codewords:
            factors = [0.6 if a == b else 0.4 / 3 for a, b in zip(string, word, strict=True)]
            chance.append(math.prod(factors) / len(codewords))
        assert math.isclose(sum(chance), world.log_data[i].exp().item(), rel_tol=1e-9)
        wrong = [sum(a != b for a, b in zip(string, w, strict=True)) for w in codewords]
        assert min(wrong) == world.distance[i] == -world.reward[i]
    assert math.isclose(world.log_data.exp().sum().item(), 1.0, rel_tol=1e-9)
    assert not torch.equal(world.centres, toy_worlds.code_world(6, config).centres)


def test_picture_world_has_its_bumps_where_it_says():
    """The reward is largest next to a centre, and never below -6; the row is the first token."""
    world = toy_worlds.picture_world(0, toy_worlds.PICTURE)
    assert world.centres.shape == (6, 2)
    assert 3 <= world.centres.min() <= world.centres.max() <= 28
    assert world.reward.min() == -6
    assert math.isclose(world.log_data.exp().sum().item(), 1.0)
    best = torch.tensor(divmod(world.reward.argmax().item(), 32)).double()
    assert (world.centres - best).norm(dim=-1).min() < 2
    row, col = 7, 20
    r = sum(math.exp(-((row - a) ** 2 + (col - b) ** 2) / 4.5) for a, b in world.centres.tolist())
    assert math.isclose(world.reward[row * 32 + col].item(), max(-6, math.log(r)), rel_tol=1e-9)


def test_columns_equal_plain_sums():
    """Every column of the table is the sum its name says."""
    log_pi, log_sft, log_star = (random_logps(1, 30, seed=s) for s in range(3))
    distance = torch.arange(30).remainder(4)[None].double()
    world = toy_worlds.World(-distance, log_pi, distance, torch.zeros(0))
    got = {k: v[0].tolist() for k, v in toy.metrics(log_pi, log_sft, log_star, world, 0.4).items()}
    a, s, b = (x[0].tolist() for x in (log_pi, log_sft, log_star))
    mass = [0.0, 0.0, 0.0]
    for x, d in zip(a, distance[0].tolist(), strict=True):
        mass[min(int(d), 2)] += math.exp(x)
    want = {
        "reverse_kl": sum(math.exp(x) * (x - y) for x, y in zip(a, b, strict=True)),
        "forward_kl": sum(math.exp(y) * (y - x) for x, y in zip(a, b, strict=True)),
        "kl_sft": sum(math.exp(x) * (x - y) for x, y in zip(a, s, strict=True)),
        "entropy": -sum(math.exp(x) * x for x in a),
        "reward": -sum(math.exp(x) * d for x, d in zip(a, distance[0].tolist(), strict=True)),
        "mass": mass,
    }
    want["J"] = want["reward"] - 0.4 * want["kl_sft"]
    assert got.keys() == want.keys()
    for name in want:
        assert got[name] == pytest.approx(want[name], rel=1e-9), name


def test_draws_follow_the_distribution():
    """Frequencies are within five standard deviations, and impossible completions never come."""
    logps = torch.tensor([[0.5, 0.0, 0.3, 0.2, 0.0], [0.0, 0.1, 0.0, 0.0, 0.9]]).log()
    uniform = torch.rand(2, 20_000, generator=torch.Generator().manual_seed(0))
    uniform[:, 0], uniform[:, 1] = 0.0, 1 - 2**-24  # the ends of the interval
    y = toy_worlds.draw(logps, uniform)
    for row, p in zip(y, logps.exp(), strict=True):
        share = torch.bincount(row, minlength=5) / len(row)
        assert (share[p == 0] == 0).all()
        assert ((share - p).abs() <= 5 * (p * (1 - p) / len(row)).sqrt() + 1e-9).all()


def test_labels_are_bradley_terry():
    """The better of a pair is chosen with probability sigmoid(r1 - r2), and pairs stay pairs."""
    reward = torch.tensor([[0.0, -1.5]], dtype=torch.float64)
    world = toy_worlds.World(reward, reward, reward, reward)
    log_sft = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    draws = toy.draw_step(world, log_sft, [torch.Generator().manual_seed(0)], 40_000)
    pairs, ranked = draws.y.view(-1, 2), draws.ranked.view(-1, 2)
    assert torch.equal(pairs.sort(dim=-1).values, ranked.sort(dim=-1).values)
    chosen = ranked[pairs[:, 0] != pairs[:, 1], 0]
    assert abs((chosen == 0).double().mean().item() - 1 / (1 + math.exp(-1.5))) < 0.015


@pytest.mark.parametrize("arm", toy.numbers_arms(TINY), ids=lambda a: f"{a.method}-{a.K}-{a.start}")
def test_an_ensemble_gives_each_model_its_own_gradient(arm):
    """Two seeds together have the gradients of each alone: no mean over models, no crosstalk."""
    world = toy_worlds.World(
        *map(torch.stack, zip(*(toy_worlds.code_world(s, TINY) for s in (0, 1)), strict=True))
    )
    log_sft, log_pi = random_logps(2, 27, seed=1), random_logps(2, 27, seed=2)
    generators = [torch.Generator().manual_seed(s) for s in (0, 1)]
    draws = toy.draw_step(world, log_sft, generators, 512)

    def gradient(rows: slice) -> torch.Tensor:
        x = log_pi[rows].clone().requires_grad_()
        own = toy.Draws(*(d[rows] for d in draws))
        toy.arm_loss(arm, x, log_sft[rows], world.reward[rows], own).backward()
        return x.grad

    both, alone = gradient(slice(2)), torch.cat([gradient(slice(0, 1)), gradient(slice(1, 2))])
    assert torch.allclose(both, alone, atol=1e-12)
    assert alone.abs().amax(dim=-1).min() > 1e-4


def test_the_best_start_counts_by_its_own_objective():
    """Seed by seed: reverse-kl keeps the lower reverse KL, forward-kl the lower forward KL."""
    star, log_pi = random_logps(2, 9, seed=3), random_logps(3, 2, 9, seed=4)
    for method in ("reverse-kl", "forward-kl"):
        arms = [toy.Arm(method, None, 0.4, start) for start in range(3)]
        ((arm, best),) = toy.best_starts(arms, log_pi, {0.4: star})
        pairs = (best, star) if method == "reverse-kl" else (star, best)
        every = (log_pi, star) if method == "reverse-kl" else (star, log_pi)
        assert arm == replace(arms[0], start=0)
        assert torch.equal(toy.kl(*pairs), toy.kl(*every).min(dim=0).values)


def test_fitting_learns():
    """A few dozen steps bring every method but none of the fixed rows nearer to pi*."""
    config = replace(TINY, n_embd=4, steps=60)
    with toy.sdpa_kernel(toy.SDPBackend.MATH):
        _, rows = toy.fit_numbers(config, toy.numbers_arms(config), [0])
    reverse = {(row["method"], row["K"]): row["reverse_kl"] for row in rows}
    assert reverse.pop(("pi-star", None)) == pytest.approx(0, abs=1e-12)
    start = reverse.pop(("sft", None))
    assert max(reverse.values()) < 0.8 * start
    assert len(reverse) == 11


def test_results_have_the_promised_form(finished):
    """Every field another program reads, from the file itself."""
    out, results = finished
    read = json.loads((out / "results.json").read_text())
    assert read == results
    assert not list(out.glob("*.tmp"))
    assert set(read) == {"config", "versions", "worlds", "picture", "rows"}
    assert [world["seed"] for world in read["worlds"]] == [0, 1]
    for world in read["worlds"]:
        assert len(world["codewords"]) == 12
        assert len(world["log_sft"]) == 27
        assert sum(map(math.exp, world["log_sft"])) == pytest.approx(1, abs=1e-12)
    exact = [(m, None) for m in ("sft", "pi-star", "reverse-kl", "forward-kl")]
    sampled = [(m, K) for m in ("exo-rw", "dpo-rw") for K in (2, 8, 64)]
    sampled += [(m, 2) for m in ("exo-pref", "dpo-pref", "exo-online")]
    keys = [(row["method"], row["K"], row["seed"]) for row in read["rows"]]
    assert keys == [(m, K, seed) for m, K in exact + sampled for seed in (0, 1)]
    for row in read["rows"]:
        assert set(row) == {"method", "K", "seed", "mass", *toy.COLUMNS}
        assert sum(row["mass"]) == pytest.approx(1)
        assert min(row["mass"]) >= 0
    assert set(read["picture"]["panels"]) == set(toy_figures.PANELS)


def test_J_falls_short_of_its_optimum_by_beta_reverse_kl(finished):
    """J(pi*) - J(pi) = beta KL(pi || pi*), on every row of the file."""
    rows = finished[1]["rows"]
    best = {row["seed"]: row["J"] for row in rows if row["method"] == "pi-star"}
    for row in rows:
        gap = best[row["seed"]] - row["J"]
        assert gap == pytest.approx(TINY.beta * row["reverse_kl"], abs=1e-10)


def test_same_command_same_file(tmp_path):
    """A seed fixes the run to the last digit, whatever torch's global generator holds."""
    for name in ("a", "b"):
        torch.manual_seed(len(list(tmp_path.iterdir())))
        tiny_run(tmp_path / name, seeds=1)
    a, b = ((tmp_path / name / "results.json").read_bytes() for name in ("a", "b"))
    assert a == b


def test_the_table_and_the_sweep_are_written(finished):
    """Every piece of the sweep has its data, and its picture where matplotlib is installed."""
    out, results = finished
    sweep = json.loads((out / "sweep.json").read_text())
    assert {*toy_figures.DRAW, "matched", "gaps"} <= set(sweep)
    assert {r["K"] for r in sweep["group_size"] if r["method"] == "dpo-rw"} == set(
        toy_sweep.SWEEP_K
    )
    assert {r["beta"] for r in sweep["frontier"]} >= set(toy_sweep.SWEEP_BETA)
    assert {r["n_embd"] for r in sweep["width"]} == set(toy_sweep.SWEEP_WIDTH)
    assert len(toy.table(results["rows"]).splitlines()) == 1 + 13
    pytest.importorskip("matplotlib")
    for name in (*toy_figures.DRAW, "picture", "numbers"):
        assert (out / f"{name}.png").stat().st_size > 1000


def test_matched_kl_interpolates_and_never_extrapolates():
    """A frontier through (1, -2) and (3, -1) is -1.5 at KL 2, and nothing at KL 4."""
    points = [(3.0, -1.0), (1.0, -2.0)]
    rows = [{"method": "m", "K": 2, "seed": 7, "kl_sft": x, "reward": y} for x, y in points]
    assert toy_sweep.matched(rows, "m", 2, 2.0) == {7: -1.5}
    assert toy_sweep.matched(rows, "m", 2, 4.0) == {}


def test_loss_curves():
    """log 2 and 2.7612 where nothing is known; confidently wrong, DPO pulls and EXO does not."""
    curves = toy_sweep.loss_curves()
    middle = curves["margin"].index(0.0)
    assert curves["DPO"]["loss"][middle] == pytest.approx(math.log(2))
    assert curves["EXO"]["loss"][middle] == pytest.approx(2.7612, abs=1e-4)
    assert curves["DPO"]["gradient"][0] < -0.999
    assert abs(curves["EXO"]["gradient"][0]) < 1e-3


def test_without_matplotlib_one_line_and_all_numbers(tmp_path, monkeypatch, capsys):
    """No figures is no failure: the run says how to get them, and writes the rest."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    tiny_run(tmp_path, seeds=1)
    said = [line for line in capsys.readouterr().out.splitlines() if "No figures" in line]
    assert len(said) == 1
    assert "pip install matplotlib" in said[0]
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize("argv", [["--seeds", "0"], ["--seed", "many"], ["--nonsense"]])
def test_wrong_flags_end_with_status_2(argv, tmp_path):
    """And leave no output folder behind."""
    with pytest.raises(SystemExit) as stop:
        toy.main([*argv, "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert not (tmp_path / "out").exists()


def test_matched_table_pairs_seeds(capsys):
    """EXO's lead at equal KL is averaged over the seeds where both frontiers get there."""
    rows = []
    for method, seed, top in (("exo-rw", 0, 0.0), ("dpo-rw", 0, -0.5), ("exo-rw", 1, -0.1)):
        for x, y in ((0.0, -2.0), (1.0, top)):
            rows.append({"method": method, "K": 8, "seed": seed, "kl_sft": x, "reward": y})
    exo, dpo = (e for e in toy_sweep.matched_table(rows) if e["kl_sft"] == 0.5)
    assert (exo["seeds"], dpo["seeds"]) == (2, 1)
    assert exo["lead"] == pytest.approx(-1.0 - -1.25)
    assert "lead" not in dpo
    assert "+0.250" in capsys.readouterr().out
