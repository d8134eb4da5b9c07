"""experiments/frontier*.py: estimates against enumeration, pieces that survive a stop, and a tiny
run of everything."""

import errno
import itertools
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import exo
from data import Builder, InputError, Report
from experiments import frontier, frontier_figures
from experiments import frontier_measure as measure
from experiments import frontier_report as report
from model import GPT, GPTConfig

ROOT = Path(__file__).parents[1]
TINY = replace(
    frontier.QUICK,
    betas=(("sentiment", (2.0, 0.5)),),
    widths=(4,),
    pairs=(8,),
    efficiency=("dpo-pref", "exo-rw"),
    n_embd=8,
    n_layer=1,
    n_head=2,
    sft_rows=64,
    sft_iters=4,
    prompts=8,
    K=4,
    groups=2,
    steps=2,
    evals=2,
    rm_iters=2,
    judged=(4, 4),
    pool=16,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One tiny run of all methods: (folder, results)."""
    out = tmp_path_factory.mktemp("frontier") / "deep" / "out"
    return out, frontier.run(out, TINY, jobs=1)


def tiny_gpt(seed: int, vocab: int = 3) -> GPT:
    config = GPTConfig(block_size=8, vocab_size=vocab, n_layer=1, n_head=1, n_embd=4)
    gpt = GPT(config, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for p in gpt.parameters():
            p.mul_(8.0)
    return gpt.eval()


def enumerate_texts(gpt: GPT, prompt: list[int], new: int, eot: int) -> dict[tuple, float]:
    """{completion, its last token eot unless it was cut: log-prob}, every one, one token a time."""
    texts, ahead = {}, {(): 0.0}
    for _ in range(new):
        following = {}
        for y, logp in ahead.items():
            step = gpt(torch.tensor([[*prompt, *y]]))[0, -1].double().log_softmax(-1).tolist()
            for token, value in enumerate(step):
                (texts if token == eot else following)[(*y, token)] = logp + value
        ahead = following
    return texts | ahead


# --------------------------------------------------------------------------------------------------
# Estimates


def test_token_kl_is_unbiased_and_steadier_than_k1():
    """Weighted by pi over all texts, cut ones too, its mean is KL(pi || sft) and so is k1's."""
    pi, sft, prompt, eot = tiny_gpt(0), tiny_gpt(1), [1, 0], 2
    a, b = (enumerate_texts(gpt, prompt, 3, eot) for gpt in (pi, sft))
    assert math.fsum(map(math.exp, a.values())) == pytest.approx(1, abs=1e-6)
    exact = sum(math.exp(a[y]) * (a[y] - b[y]) for y in a)
    entropy = -sum(math.exp(x) * x for x in a.values())
    builder = Builder(8, eot, Report())
    ended = [y[-1] == eot for y in a]
    own = [list(y[:-1] if whole else y) for y, whole in zip(a, ended, strict=True)]
    builder.put(prompt, own, ended)
    groups, w = builder.groups(), np.exp(list(a.values()))
    got = {name: x[0] for name, x in measure.token_kl(pi, sft, groups).items()}
    assert got["kl"] @ w == pytest.approx(exact, abs=1e-5)
    assert got["k1"] @ w == pytest.approx(exact, abs=1e-5)
    assert got["entropy"] @ w == pytest.approx(entropy, abs=1e-5)
    assert got["k1"] == pytest.approx([a[y] - b[y] for y in a], abs=1e-5)
    assert got["tokens"].tolist() == [len(y) for y in a]
    assert measure.sequence_logps(pi, groups)[0] == pytest.approx(list(a.values()), abs=1e-5)
    spread = {k: (got[k] - exact) ** 2 @ w for k in ("kl", "k1")}
    assert spread["kl"] < 0.5 * spread["k1"]
    assert exact > 0.1


def test_optimum_by_importance_sampling_is_the_enumerated_one():
    """Two prompts of 50 texts: a pool drawn from sft gives reward and KL of the exact pi*."""
    rng = np.random.default_rng(0)
    log_sft = np.log(rng.dirichlet(np.ones(50), 2))
    reward, beta = rng.normal(size=(2, 50)), 0.7
    log_star = log_sft + reward / beta
    log_star -= np.logaddexp.reduce(log_star, axis=1, keepdims=True)
    star = np.exp(log_star)
    exact = {"v": (star * reward).sum(1).mean(), "kl": (star * (log_star - log_sft)).sum(1).mean()}
    drawn = np.stack([rng.choice(50, 400_000, p=np.exp(x)) for x in log_sft])
    r = np.take_along_axis(reward, drawn, 1)
    got = measure.optimum(r, beta, {"v": r})
    assert got["v"] == pytest.approx(exact["v"], abs=0.01)
    assert got["kl"] == pytest.approx(exact["kl"], abs=0.01)
    assert measure.optimum(r, 1e9, {"v": r})["ess"] == pytest.approx(400_000)
    lone = np.array([[0.0, 0.0, 50.0]])
    assert measure.optimum(lone, 1.0, {"v": lone})["ess"] == pytest.approx(1)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_is_the_mean_over_all_subsets(n):
    """Against a plain loop over n-subsets, with ties and a value other than the score."""
    score = np.array([[0.0, 2.0, 1.0, 2.0, -1.0], [3.0, 3.0, 3.0, 3.0, 3.0]])
    value = np.array([[1.0, 5.0, 2.0, 7.0, 0.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    wanted = []
    for s, v in zip(score, value, strict=True):
        for subset in itertools.combinations(range(5), n):
            top = max(s[i] for i in subset)
            tied = [v[i] for i in subset if s[i] == top]
            wanted.append(sum(tied) / len(tied))
    got = measure.best_of_n(score, n, {"v": value})
    assert got["v"] == pytest.approx(np.mean(wanted))
    assert got["kl"] == pytest.approx(math.log(n) - (n - 1) / n)


def test_best_of_n_has_its_kl_and_wins_n_of_n_plus_one():
    """Of a continuous reward: KL = log n - (n - 1) / n, and n/(n+1) against one draw."""
    n, u = 4, (np.arange(100_000) + 0.5) / 100_000  # rank of a completion under sft
    density = n * u ** (n - 1)  # of the best of n, relative to sft
    assert (density * np.log(density)).mean() == pytest.approx(math.log(n) - (n - 1) / n, abs=1e-4)
    score = np.random.default_rng(0).normal(size=(1, 2000))
    wins = measure.best_of_n(score, n, {"w": measure.win_values(score, score)})["w"]
    assert wins == pytest.approx(n / (n + 1), abs=2e-3)


def test_win_values_count_ties_half():
    won = measure.win_values(np.array([[0.0, 1.0, 3.0]]), np.array([[2.0, 1.0, 0.0, 1.0]]))
    assert won.tolist() == [[0.125, 0.5, 1.0]]


def test_draws_repeat_and_carry_their_end():
    """The same seed gives the same texts in order; `rate` sees whether a text ended."""
    gpt = tiny_gpt(0, vocab=257)
    prompts = ["a", "bcd", "e"]
    one, two = (measure.draw(gpt, "bytes", prompts, 2, 4, 5, rows=rows) for rows in (2, 6))
    assert [len(t) for t in one.texts] == [2, 2, 2]
    assert one.flat()[0] == ["a", "a", "bcd", "bcd", "e", "e"]
    seen = []
    one.rate(lambda ps, ys, ended: seen.extend(ended) or torch.zeros(len(ps)))
    assert len(seen) == 6
    again = measure.draw(gpt, "bytes", prompts, 2, 4, 5, rows=2)
    assert again.texts == one.texts
    assert two.prompts == prompts


def test_at_kl_is_linear_in_the_root_and_never_extrapolates():
    """From sft, reward 1 at KL 0, to 3 at KL 4: 2 at KL 1."""
    assert measure.at_kl([(4.0, 3.0), (0.0, 1.0)], 1.0) == pytest.approx(2.0)
    assert math.isnan(measure.at_kl([(4.0, 3.0), (0.0, 1.0)], 4.1))


def test_calibration_compares_gains_at_equal_kl(tmp_path):
    """Frontiers that are straight in the root of KL: slopes 4 (optimum), 3 and 2 from sft at -1, so
    that the gains at KL 0.25 are 2, 1.5 and 1. A width whose DPO never gets there is left out."""
    done = {"optimum": [], "best_of_n": [], "rows": [], "start": []}
    done["settings"] = {"least_ess": 20}
    for seed, width in itertools.product((0, 1), (4, 8)):
        who = {"reward": "sentiment", "seed": seed, "n_embd": width}
        done["optimum"].append({**who, "beta": 2.0, "kl": 4.0, "oracle": 7.0, "ess": 99})
        for name in ("best-of-n", "best-of-n-oracle"):
            sft = {**who, "kl": 0.0, "oracle": -1.0}
            done["best_of_n"].append({**sft, "method": name, "n": 1})
        done["start"].append({**sft, "oracle": -1.5})  # what it is with the policies' numbers
        for method, kl, oracle in (("exo", 1.0, 1.5), ("dpo", 0.25 if width == 8 else 0.01, -0.5)):
            end = {"method": f"{method}-rw-oracle", "beta": 2.0, "n_pairs": None, "last": True}
            done["rows"].append({**who, **end, "kl": kl, "oracle": oracle})
    matrix = replace(TINY, seeds=2)
    done["calibration"] = report.calibration_rows(done, matrix)
    assert {row["n_embd"] for row in done["calibration"]} == {8}
    for row in report.only(done["calibration"], kl=0.25):
        gains = [row[m] for m in ("optimum", *frontier.CALIBRATION)]
        assert gains == pytest.approx([2.0, 1.5, 1.0])
    assert len(report.only(done["calibration"], kl=0.25)) == 2
    plt = frontier_figures.pyplot()
    if plt:
        frontier_figures.draw_calibration(plt, done, matrix, tmp_path / "figure.png")
        assert (tmp_path / "figure.png").stat().st_size


# --------------------------------------------------------------------------------------------------
# The run


def test_every_method_is_in_rows_frontier_and_table(finished):
    """Trained ones at each beta and step, best-of-n and the optimum beside them."""
    out, done = finished
    read = json.loads((out / "results.json").read_text())
    assert read["rows"] == done["rows"]
    main = report.only(done["rows"], n_embd=8, n_pairs=None)
    for method, beta, step in itertools.product(frontier.METHODS, (2.0, 0.5), (1, 2)):
        step *= frontier.PPO_EPOCHS if method == "ppo" else 1
        (row,) = report.only(main, method=method, beta=beta, step=step)
        for name in ("oracle", "rm", "kl", "win_oracle_sft", "win_rm_sft"):
            assert math.isfinite(row[name])
            assert row[f"{name}_stderr"] >= 0
        assert row["kl"] >= 0
    assert {row["method"] for row in done["best_of_n"]} == {"best-of-n", "best-of-n-oracle"}
    assert {row["n_embd"] for row in done["optimum"]} == {4, 8}
    few = report.only(done["rows"], n_pairs=8)
    assert {row["method"] for row in few} == set(TINY.efficiency)
    assert {"best", "middle", "worst", "first"} == {s["which"] for s in done["samples"]}
    table = (out / "table.md").read_text()
    for method in (*frontier.METHODS, "best-of-n", "optimum"):
        assert f"{method}" in table
    assert done["density"]


def test_a_stopped_run_goes_on(finished, capsys):
    """Finished pieces are not touched, a missing one is made again, and gives the same numbers."""
    out, done = finished
    files = sorted((out / "pieces").iterdir())
    before = {path: path.stat().st_mtime_ns for path in files}
    lost = next(p for p in files if "exo-rw-oracle" in p.name and "w8" in p.name)
    content = json.loads(lost.read_text())
    lost.unlink()
    again = frontier.run(out, TINY, jobs=1)
    assert json.loads(lost.read_text())["result"] == content["result"]
    del before[lost]
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    assert again["rows"] == done["rows"]


def test_other_settings_make_pieces_anew():
    """A piece's key holds its own settings and those of all it is made from, and no others."""
    a = frontier.keys(frontier.plan(TINY))
    b = frontier.keys(frontier.plan(replace(TINY, steps=3, seeds=2)))
    assert a == frontier.keys(frontier.plan(TINY))
    assert set(a) < set(b)
    assert not set(a.values()) & set(b.values())
    more = frontier.keys(frontier.plan(replace(TINY, seeds=2)))
    assert {name: more[name] for name in a} == a


def test_a_checkpoint_of_other_settings_is_not_resumed(tmp_path, monkeypatch):
    """The piece's folder is kept for the same key, and emptied for another."""
    from experiments import frontier_stages

    kept = tmp_path / "runs" / "x" / "ckpt.pt"
    seen = []
    make = {"sft": lambda out, name, spec: seen.append(kept.exists()) or {}}
    monkeypatch.setattr(frontier_stages, "MAKERS", make)
    piece = frontier.Piece("x", "sft", {})
    for key in ("a", "a", "b"):
        frontier.work(tmp_path, piece, key)
        kept.write_text("")
    assert seen == [False, True, False]


def test_pieces_come_after_what_they_need():
    seen = set()
    for name, piece in frontier.plan(frontier.FULL).items():
        assert seen.issuperset(piece.needs)
        seen.add(name)


def test_two_jobs_give_what_one_gives(finished, tmp_path):
    """Pieces read files only: the number of processes changes nothing."""
    out, _ = finished
    few = replace(TINY, widths=(), pairs=(), methods=("dpo-pref", "exo-online"))
    frontier.run_pieces(tmp_path, frontier.plan(few), jobs=2)
    for path in (tmp_path / "pieces").iterdir():
        alone = json.loads((out / "pieces" / path.name).read_text())
        assert json.loads(path.read_text())["result"] == alone["result"]


def test_labels_are_bradley_terry_and_the_first_pairs_come_first():
    """P(first wins) = sigmoid(r1 - r2); equal texts are no pair; prompt by prompt, then again."""
    from experiments.frontier_stages import bradley_terry

    rows = [{"prompt": str(i), "completions": ["a", "b", "c", "c"]} for i in range(4000)]
    rewards = np.tile([0.0, 1.0, 0.0, 0.0], (4000, 1))
    pairs = bradley_terry(rows, rewards, seed=0)
    assert [pair["prompt"] for pair in pairs] == [row["prompt"] for row in rows]
    share = sum(pair["chosen"] == "b" for pair in pairs) / len(pairs)
    assert share == pytest.approx(1 / (1 + math.exp(-1)), abs=0.03)


def test_exo_pref_asks_for_bradley_terrys_log_ratio():
    """Over Bradley-Terry labels of two completions whose rewards differ by d, the expected EXO loss
    is least at a log-ratio of (2 sigmoid(d) - 1) log((1 - e) / e) / beta_pi: d / beta for small d,
    never above 2 / beta."""
    from experiments.frontier_stages import policy_argv

    beta, e = 0.7, frontier.SMOOTHING
    spec = {"method": "exo-pref", "beta": beta, "labels": "", "sft": "", "n_pairs": None}
    spec |= {"steps": 2, "evals": 1, "rate": 1e-3, "seed": 0, "groups": 2, "K": 4}
    argv = policy_argv(Path(), spec)
    beta_pi = argv[argv.index("--beta_pi") + 1]
    assert argv[argv.index("--label_smoothing") + 1] == e
    for d in (0.01, 0.5, 3.0):
        win = 1 / (1 + math.exp(-d))
        best = (2 * win - 1) * math.log((1 - e) / e) / beta_pi
        ratio = torch.tensor([[best, 0.0]], dtype=torch.float64, requires_grad=True)
        loss = sum(
            p * exo.exo_loss(x, torch.zeros_like(x), exo.preference_target(e).double(), beta_pi)
            for p, x in ((win, ratio), (1 - win, ratio.flip(1)))
        )
        loss.backward()
        assert ratio.grad.abs().max() < 1e-6
        assert best <= 2 / beta
        assert d > 0.1 or best == pytest.approx(d / beta, rel=1e-3)


def test_tuning_takes_the_rate_with_the_largest_share_of_the_optimums_gain(tmp_path):
    """(J - J of sft) / (J of pi* - J of sft), J = oracle - beta KL, of pieces written by hand."""
    betas = (("sentiment", (2.0,)), ("conviction", (1.0,)))
    few = {"betas": betas, "methods": ("dpo-pref",), "widths": (), "pairs": ()}
    matrix = replace(TINY, **few, rates=(("dpo-pref", (0.1, 0.2)),), first_seed=7)
    pieces = frontier.plan(matrix)
    key = frontier.keys(pieces)
    (tmp_path / "pieces").mkdir()
    ends = {("sentiment", 0.1): (4.0, 1.0), ("sentiment", 0.2): (6.0, 1.5)}  # oracle, KL
    ends |= {("conviction", 0.1): (3.0, 1.0), ("conviction", 0.2): (2.0, 1.0)}
    for name, piece in pieces.items():
        if piece.make == "limits":
            beta = dict(betas)[piece.spec["reward"]][0]
            best = {"optimum": [{"beta": beta, "oracle": 9.0, "kl": 2.0}]}
            held = {**best, "best_of_n": [{"n": 1, "oracle": 1.0}]}
        elif piece.make == "policy":
            oracle, kl = ends[piece.spec["reward"], piece.spec["rate"]]
            held = {"path": [{"oracle": 0.0, "kl": 0.0}, {"oracle": oracle, "kl": kl}]}
        else:
            continue
        whole = {"key": key[name], "result": held}
        (tmp_path / "pieces" / f"{name}.json").write_text(json.dumps(whole))
    done = report.tuning(tmp_path, matrix, pieces)
    score = {(row["reward"], row["rate"]): row["score"] for row in done["rows"]}
    assert score["sentiment", 0.1] == pytest.approx((4 - 2 - 1) / (9 - 4 - 1))
    assert score["sentiment", 0.2] == pytest.approx((6 - 3 - 1) / (9 - 4 - 1))
    assert score["conviction", 0.1] == pytest.approx((3 - 1 - 1) / (9 - 2 - 1))
    assert score["conviction", 0.2] == pytest.approx((2 - 1 - 1) / (9 - 2 - 1))
    assert done["chosen"] == {"pref": 0.2}
    assert json.loads((tmp_path / "tuning.json").read_text())["chosen"] == done["chosen"]


def test_tuning_goes_on_until_the_best_rate_is_between_two_others(tmp_path, monkeypatch):
    """Down to the first rung, beside a score that is best at the second; and up to the last."""
    from experiments import frontier_report

    few = {"methods": ("dpo-pref", "ppo"), "widths": (), "pairs": ()}
    start = tuple((method, frontier.RATES) for method in few["methods"])
    tried = []

    def tuning(out, matrix, pieces):
        rates = dict(matrix.rates)
        tried.append(rates)
        near = min(rates["dpo-pref"], key=lambda rate: abs(math.log(rate / 2e-5)))
        return {"chosen": {"pref": near, "ppo": max(rates["ppo"])}}

    monkeypatch.setattr(frontier, "run_pieces", lambda *args: None)
    monkeypatch.setattr(frontier_report, "tuning", tuning)
    frontier.run(tmp_path, replace(TINY, **few, rates=start), jobs=1)
    assert tried[-1]["dpo-pref"] == (frontier.LADDER[0], *frontier.RATES)
    assert tried[-1]["ppo"] == frontier.LADDER[1:]


def test_a_full_disk_ends_with_one_sentence_and_2(tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(frontier, "run", full)
    assert frontier.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_workers_end_with_their_parent():
    """Also when it is killed and can tell nobody: the pipe closes when the last of them is gone."""
    code = (
        "import os, time; from experiments.common import start_worker\n"
        "parent = os.getpid()\n"
        "if os.fork(): time.sleep(100)\n"
        "start_worker(parent); print('up', flush=True); time.sleep(100)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT)
    assert parent.stdout.readline() == b"up\n"
    start = time.time()
    parent.kill()
    parent.wait()
    parent.stdout.read()
    assert time.time() - start < 50


def test_a_failed_stage_says_why(tmp_path):
    from experiments.frontier_stages import stage

    with pytest.raises(InputError, match=r"sft.*no-such-file"):
        stage(tmp_path / "run", ["sft", "--data", tmp_path / "no-such-file.jsonl"])


@pytest.mark.parametrize(
    "argv",
    [
        ["--tune", "--quick"],
        ["--seeds", "0"],
        ["--jobs", "none"],
        ["--rewards", "joy"],
        ["--nonsense"],
    ],
)
def test_wrong_flags_end_with_one_sentence_and_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        frontier.main(argv)
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_committed_results_are_of_the_matrix_in_the_code():
    done = json.loads((ROOT / "assets" / "frontier" / "results.json").read_text())["settings"]
    assert done["matrix"] == json.loads(json.dumps(asdict(frontier.FULL)))
    assert done["learning_rate"] == frontier.LEARNING_RATE


def test_learning_rates_are_those_of_the_committed_tuning():
    """Chosen by --tune, on a seed that no figure uses, and each with a worse one on either side."""
    path = ROOT / "assets" / "frontier" / "tuning.json"
    done = json.loads(path.read_text())
    assert done["chosen"] | {"rm": 1e-3} == frontier.LEARNING_RATE
    want = json.loads(json.dumps(asdict(frontier.TUNE)))
    for name in want.keys() - {"rates", "evals"}:  # looks on the way move no weight
        assert done["settings"][name] == want[name], name
    assert frontier.TUNING_SEED >= frontier.FULL.seeds
    for name, best in done["chosen"].items():
        scores = {}
        for row in done["rows"]:
            if frontier.family(row["method"]) == name:
                scores.setdefault(row["rate"], []).append(row["score"])
        means = {rate: sum(x) / len(x) for rate, x in scores.items()}
        assert means[best] == max(means.values())
        assert min(means) < best < max(means)
