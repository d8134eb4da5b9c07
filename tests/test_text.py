"""experiments/text: the oracle against enumeration, Monte Carlo and numbers known by hand; what is
measured against enumeration; pieces that survive a stop, and a tiny run of everything."""

import json
import math
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import exo
from data import InputError
from experiments.common import only
from experiments.text import (
    constants,
    figures,
    main,
    makers,
    measures,
    pieces,
    report,
    reviews,
    search,
)
from experiments.text.stages import run as run_stage
from model import GPT, GPTConfig

ROOT = Path(__file__).parents[1]
# The example of the file's docstring, as one text.
PROMPT = "On Friday the noodles were rather tasty"
REST = (
    ". Hmm, they were greasy. Also, the cook was slow, and she always shouts. "
    "In the end I would hardly order them again."
)
SMALL = (  # a grammar of 40-odd texts that uses every kind of slot
    reviews.subject({"soup": "it", "fries": "they"}),
    *(reviews.was, reviews.impression(0.4), reviews.degree({"": (2, 1.0), " not": (1, -0.5)})),
    reviews.opinion({"good": 1.0, "odd": 0.0, "bad": -2.0}),
    *reviews.maybe(0.3, (reviews.one_of(" and", " but"), reviews.pronoun)),
)


@pytest.fixture(scope="module")
def drawn():
    """25,000 reviews: (happy or not, text, log-odds). Drawn once, for all tests that count."""
    rng = random.Random(0)
    labels = [rng.random() < 0.5 for _ in range(25_000)]
    texts = ["".join(reviews.sample(rng, happy)) for happy in labels]
    return [(h, t, reviews.log_odds(t)) for h, t in zip(labels, texts, strict=True)]


def walk(slots, happy, state=None, i=0):
    """Every (text, probability) of a grammar, by plain recursion: the definition once more."""
    if i == len(slots):
        yield "", 1.0
        return
    choices = slots[i](state or reviews.State())
    scores = [c.weight * math.exp((c.lean if happy else -c.lean) / 2) for c in choices]
    for choice, score in zip(choices, scores, strict=True):
        for rest, p in walk(slots, happy, choice.state, i + choice.jump):
            yield choice.text + rest, p * score / sum(scores)


def total(slots, happy):
    """{text: probability}, summed over the walks that spell it."""
    probs = Counter()
    for text, p in walk(slots, happy):
        probs[text] += p
    return probs


# --------------------------------------------------------------------------------------------------
# The oracle


@pytest.mark.parametrize("slots", [SMALL, reviews.FIRST], ids=["small", "first clause"])
def test_likelihood_is_the_enumeration_and_sums_to_one(slots):
    """All texts, all walks. "odd" is spelled by two walks, one that praises and one that blames."""
    for k, probs in enumerate((total(slots, True), total(slots, False))):
        assert sum(probs.values()) == pytest.approx(1, abs=1e-12)
        for text, p in probs.items():
            assert reviews.likelihood(text, slots)[k] == pytest.approx(p, rel=1e-9)


def test_calibration_in_buckets_of_the_log_odds(drawn):
    """Among reviews with log-odds near L a share sigmoid(L) is by happy reviewers: 14 buckets of
    half a nat, each within 4 binomial standard errors."""
    buckets = {}
    for happy, _, odds in drawn:
        buckets.setdefault(math.floor(odds * 2), []).append((happy, 1 / (1 + math.exp(-odds))))
    filled = [b for b in buckets.values() if len(b) > 300]
    assert len(filled) >= 14
    for bucket in filled:
        error = sum(happy - p for happy, p in bucket)
        assert abs(error) < 4 * math.sqrt(sum(p * (1 - p) for _, p in bucket))


def test_rewards_have_the_documented_scale(drawn):
    """Sentiment has sd 5.6 around 0 within ±12, and one review in fifteen is lukewarm."""
    odds = [o for *_, o in drawn]
    assert abs(sum(odds) / len(odds)) < 0.12
    assert math.sqrt(sum(o * o for o in odds) / len(odds)) == pytest.approx(5.57, abs=0.1)
    assert all(abs(o) < 12 for o in odds)
    assert sum(abs(o) < 1 for o in odds) / len(odds) == pytest.approx(0.065, abs=0.01)


# --------------------------------------------------------------------------------------------------
# What cannot be produced


def unproducible(text):
    odds = np.array([reviews.log_odds(text)], dtype=float)
    return [reviews.reward(name, odds) for name in ("sentiment", "conviction")] == [-13.0, -1.0]


def test_unproducible_is_below_every_review():
    """The most extreme walk bounds every log-odds (a sum of walks is no more extreme than the most
    extreme of them), and with it the least sentiment; the least conviction is 0."""
    worst = [{} for _ in range(len(reviews.REVIEW) + 1)]
    worst[0][reviews.State()] = 0.0
    for i, slot in enumerate(reviews.REVIEW):
        for state, odds in worst[i].items():
            for choice, happy, unhappy in reviews.arcs(slot, state):
                there, new = worst[i + choice.jump], odds + math.log(happy / unhappy)
                there[choice.state] = min(new, there.get(choice.state, new))
    assert -12 < min(worst[-1].values()) < -11
    assert reviews.UNPRODUCIBLE["sentiment"] <= -13
    assert reviews.UNPRODUCIBLE["conviction"] <= -1


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("noodles were", "noodles was"),  # number, within the clause
        ("they were", "it was"),  # number, from the first clause
        ("she always", "they always"),  # number, of another subject
        ("them again", "it again"),  # number, from the first clause to the last
        (". Hmm, they", ", but they"),
        (", and she", ", and it"),
        ("again.", "again"),  # cut
        ("again.", "again. Also, it was perfect."),  # does not know when to stop
        ("slow, and", "slow, and the room is neat, and"),  # a clause out of order
        ("rather tasty", "rather rather tasty"),
    ],
)
def test_agreement_is_needed(old, new):
    """One wrong word, near or far from what it must agree with, and nobody can have written it."""
    assert not unproducible(PROMPT + REST)
    assert (PROMPT + REST).count(old) == 1
    assert unproducible((PROMPT + REST).replace(old, new))


@given(st.text() | st.lists(st.sampled_from(reviews.lexicon()), max_size=40).map("".join))
@settings(deadline=None, max_examples=100)
def test_any_text_has_a_finite_reward(text):
    """Heaps of strong words are no review, and get less than the worst one."""
    assert unproducible(text)
    assert unproducible(PROMPT + text)


# --------------------------------------------------------------------------------------------------
# The generator and its rows


def test_rows_are_distinct_and_producible():
    """Ten thousand rows, no two alike, and `rows` had no duplicate to drop."""
    rows = reviews.rows(10_000, seed=3)
    texts = {row["prompt"] + row["completion"] for row in rows}
    assert len(rows) == len(texts) == 10_000
    rng = random.Random(3)
    assert texts == {"".join(reviews.sample(rng, rng.random() < 0.5)) for _ in range(10_000)}
    assert all(reviews.likelihood(text)[0] > 1e-20 for text in texts)
    assert len({row["prompt"] for row in rows}) > 3_000
    assert all(20 <= len(text.split()) <= 40 for text in texts)
    assert rows[:50] == reviews.rows(50, seed=3) != reviews.rows(50, seed=2)


# --------------------------------------------------------------------------------------------------
# The tokenizer


@given(st.text() | st.lists(st.sampled_from([*reviews.lexicon(), "é", "\n", " "])).map("".join))
@settings(deadline=None, max_examples=300)
def test_any_text_survives_the_round_trip(text):
    """Each word of the grammar is one token."""
    enc, words = reviews.encoding(), reviews.lexicon()
    assert [enc.encode_ordinary(word) for word in words] == [[256 + i] for i in range(len(words))]
    assert enc.decode(enc.encode_ordinary(text)) == text


# --------------------------------------------------------------------------------------------------
# Estimates


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


def test_token_kl_is_unbiased_and_steadier_than_the_log_ratio():
    """Weighted by pi over all texts, cut ones too, its mean is KL(pi || sft), as that of log pi -
    log sft is. The same beside a prompt of another length."""
    pi, sft, prompt, eot = tiny_gpt(0), tiny_gpt(1), [1, 0], 2
    a, b = (enumerate_texts(gpt, prompt, 3, eot) for gpt in (pi, sft))
    assert math.fsum(map(math.exp, a.values())) == pytest.approx(1, abs=1e-6)
    ratio, w = np.array([a[y] - b[y] for y in a]), np.exp(list(a.values()))
    texts, exact = list(map(list, a)), ratio @ w
    kl = measures.token_kl(pi, sft, [[0, 1, 1, 0], prompt], [texts, texts])[1]
    assert kl @ w == pytest.approx(exact, abs=1e-5)
    assert (kl - exact) ** 2 @ w < 0.5 * ((ratio - exact) ** 2 @ w)
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
    got = measures.optimum(r, beta, {"v": r})
    assert got["v"] == pytest.approx(exact["v"], abs=0.01)
    assert got["kl"] == pytest.approx(exact["kl"], abs=0.01)
    assert measures.optimum(r, 1e9, {"v": r})["ess"] == pytest.approx(400_000)
    lone = np.array([[0.0, 0.0, 50.0]])
    assert measures.optimum(lone, 1.0, {"v": lone})["ess"] == pytest.approx(1)


def test_wins_count_ties_half():
    won = measures.wins(np.array([[0.0, 1.0, 3.0]]), np.array([[2.0, 1.0, 0.0, 1.0]]))
    assert won.tolist() == [[0.125, 0.5, 1.0]]


def test_draws_repeat_and_carry_their_end():
    """The same seed gives the same texts in order; `rate` sees whether a text ended."""
    gpt, prompts, seen = tiny_gpt(0, vocab=257), ["a", "bcd", "e"], []
    one, again = (measures.draw(gpt, prompts, 2, 4, 5, encoding="bytes") for _ in range(2))
    assert one == again
    assert [row["prompt"] for row in one.rows] == prompts
    assert [len(row["completions"]) for row in one.rows] == [2, 2, 2]
    assert measures.flat(one.rows)[0] == ["a", "a", "bcd", "bcd", "e", "e"]
    measures.rate(lambda ps, ys, ended: seen.extend(ended) or torch.zeros(len(ps)), one.rows)
    assert seen == [y[-1] == 256 for ys in one.completions for y in ys]


def test_labels_are_bradley_terry_and_the_first_pairs_come_first():
    """P(first wins) = sigmoid(r1 - r2); equal texts are no pair; prompt by prompt, then again."""
    rows = [{"prompt": str(i), "completions": ["a", "b", "c", "c"]} for i in range(4000)]
    rewards = np.tile([0.0, 1.0, 0.0, 0.0], (4000, 1))
    pairs = makers.bradley_terry(rows, rewards, seed=0)
    assert [pair["prompt"] for pair in pairs] == [row["prompt"] for row in rows]
    share = sum(pair["chosen"] == "b" for pair in pairs) / len(pairs)
    assert share == pytest.approx(1 / (1 + math.exp(-1)), abs=0.03)


def test_exo_pref_asks_for_bradley_terrys_log_ratio():
    """Over Bradley-Terry labels of two completions whose rewards differ by d, the expected EXO loss
    is least at a log-ratio of (2 sigmoid(d) - 1) log((1 - e) / e) / beta_pi: d / beta for small d,
    never above 2 / beta."""
    beta, e = 0.7, constants.SMOOTHING
    curve = constants.Curve("sentiment", "exo-pref")
    spec = pieces.fit(constants.FULL, curve, seed=0, beta=beta).spec
    argv = makers.policy_argv(Path(), spec)
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


def test_opposed_is_the_share_of_pairs_that_disagree():
    """Praise, praise, pan on one prompt: two pairs of three. The optimum's: 2 P(praise) P(pan)."""
    values = measures.kinds(np.array([[9.0, 4.0, -4.0, 0.0, np.nan]]))
    assert {name: x.sum() for name, x in values.items()} == {
        "well_formed": 4,
        "praise": 2,
        "pan": 1,
        "mixed": 1,
    }
    assert measures.opposed(values["praise"][:, :3], values["pan"][:, :3]) == pytest.approx(2 / 3)
    even = measures.optimum(np.zeros((1, 2)), 1.0, measures.kinds(np.array([[9.0, -9.0]])))
    assert even["opposed"] == pytest.approx(0.5)


def test_the_optimum_is_found_at_its_kl():
    r = np.random.default_rng(0).normal(size=(4, 500))
    found = measures.optimum_at(r, 0.7, {"r": r})
    assert found["kl"] == pytest.approx(0.7, rel=1e-6)
    assert found == measures.optimum_at(2 * r, 0.7, {"r": r}) | {"beta": found["beta"]}


def test_groups_hold_the_same_texts_for_every_K():
    """Each completion keeps its reward."""
    rows = [{"prompt": f"p{i}", "completions": [f"{i} {j}" for j in range(16)]} for i in (0, 1)]
    for K in constants.KS:
        found = makers.groups(rows, np.arange(32.0).reshape(2, 16), K)
        assert {len(row["completions"]) for row in found} == {K}
        pairs = [x for row in found for x in zip(row["completions"], row["rewards"], strict=True)]
        assert pairs == [(f"{i // 16} {i % 16}", i) for i in range(32)]


# --------------------------------------------------------------------------------------------------
# The search and the statistics


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_the_search_arrives_in_few_fits(shift):
    """Of a curve like sentiment's, whose seed has other rewards than the table's."""
    asked = []

    def fit(beta):
        asked.append(beta)
        return 2.6 / (1 + (beta * shift) ** 1.3)

    found = search.arrive(dict.fromkeys(constants.KLS, 1.5), fit, fits=4)
    for target, beta in found.items():
        assert search.off(fit(beta), target) <= constants.TOLERANCE
    assert len(set(asked)) <= 10


def test_what_cannot_be_reached_is_not_there():
    """A method that ends at KL 0.7, and one that jumps over the target: fits end, and None."""
    for curve in (lambda beta: 0.7 / (1 + beta), lambda beta: 0.4 if beta > 1 else 4.0):
        fit = Mock(side_effect=curve)
        found = search.arrive({0.4: 0.5, 1.0: 0.5}, fit, fits=4)
        assert found[1.0] is None
        assert found[0.4] is not None
        assert fit.call_count <= 8


def test_every_policy_of_a_curve_counts_for_every_target():
    """What is right for the first target is right for the second: nothing more is fitted."""
    fit = Mock(return_value=0.51)
    starts = {0.5: 9.0, 0.52: 1.0}
    assert search.arrive(starts, fit, fits=4) == {0.5: 1.0, 0.52: 1.0}
    assert fit.call_count == 1


def test_student_and_holm_are_those_of_the_tables():
    """t of 95 % for 1, 4 and 9 degrees of freedom; p of t = 2.776 at 4; Holm by hand."""
    for df, t in ((1, 12.706), (4, 2.776), (9, 2.262)):
        assert report.student(df) == pytest.approx(t, abs=1e-3)
    assert report.chance(2.776, 4) == pytest.approx(0.05, abs=1e-4)
    assert report.chance(1.0, 1) == pytest.approx(0.5, abs=1e-6)
    assert report.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    found = report.interval([1.0, 2.0, 3.0])
    assert found["mean"] == 2.0
    assert found["half"] == pytest.approx(4.303 / math.sqrt(3), abs=1e-3)


# --------------------------------------------------------------------------------------------------
# The run

TINY = replace(
    constants.FULL,
    seeds=1,
    fits=1,
    n_embd=8,
    n_layer=1,
    n_head=2,
    sft_rows=64,
    sft_iters=4,
    prompts=4,
    rated=32,
    steps=2,
    rm_iters=2,
    judged=(4, 4),
    pool=16,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A tiny run of every question, in which whatever was fitted counts: (folder, results)."""
    out = tmp_path_factory.mktemp("text") / "deep" / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "TOLERANCE", math.inf)
        return out, main.run(out, TINY, jobs=1)


def test_every_question_has_its_policies_and_figure(finished):
    out, done = finished
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(done))
    for question, (curves, _) in constants.QUESTIONS.items():
        for curve in curves:
            where = {"reward": curve.reward, "method": curve.method, "K": curve.K}
            where["labels"] = curve.labels
            assert set(curve.betas) <= {row["beta"] for row in only(done["fits"], **where)}
            for target in curve.targets:
                (cell,) = only(done["cells"], target=target, **where)
                assert {k: cell[k] for k in cell if k != "target"} in done["fits"]
        if figures.pyplot() and question in figures.FIGURES:
            assert (out / f"{question}-dark.png").stat().st_size
    assert done["missed"] == []


def test_comparisons_are_paired_by_seed():
    """Seeds differ by 10, sides by 1 and in one seed by 1.2; a seed that only one has is left out;
    and another question's comparison does not weigh."""
    cells = [
        {"reward": "sentiment", "method": method, "K": 8, "labels": 0, "target": 1.0, "seed": seed}
        | {"oracle": 10 * seed + lead + 0.2 * lead * (seed == 2), "kl": 1 + 0.1 * lead}
        for method, lead in (("exo-rw", 1), ("dpo-rw", 0))
        for seed in range(3 + lead)
    ]
    (row,) = report.compared(cells, replace(constants.FULL, questions=("methods",)))
    assert (row["ours"], row["theirs"], row["seeds"]) == ("exo-rw", "dpo-rw", 3)
    assert row["mean"] == pytest.approx(3.2 / 3)
    assert row["kl_gap"] == pytest.approx(0.1)
    assert row["holm"] == row["p"] < 0.01


def test_a_stopped_run_goes_on(finished, monkeypatch):
    """Finished pieces are not touched, a missing one is made again, and gives the same numbers."""
    out, done = finished
    files = sorted(out.glob("runs/*/result.json"))
    before = {path: path.stat().st_mtime_ns for path in files}
    lost = next(path for path in files if path.parent.name.startswith("ppo-sentiment"))
    content = lost.read_text()
    lost.unlink()
    monkeypatch.setattr(search, "TOLERANCE", math.inf)
    again = main.run(out, TINY, jobs=1)
    assert lost.read_text() == content
    del before[lost]
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    assert again["fits"] == done["fits"]


def test_other_settings_make_pieces_anew():
    """A piece's key holds its own settings and those of all it is made from, and no others: other
    seeds, questions and more fits find what there is."""
    curve = constants.Curve("sentiment", "exo-rw")

    def keys(**changed) -> list[str]:
        matrix = replace(TINY, **changed)
        made = (pieces.sft(matrix, 3), pieces.rm(matrix, curve, 3), pieces.fit(matrix, curve, 3, 2))
        return [piece.key for piece in made]

    assert keys() == keys(seeds=7, first_seed=3, fits=2, questions=("K",))
    assert not set(keys()) & set(keys(steps=3))
    assert pieces.fit(TINY, replace(curve, targets=(1.0,), betas=(2.0,)), 3, 2).key == keys()[2]


def test_a_checkpoint_of_other_settings_is_not_resumed(tmp_path, monkeypatch):
    """The piece's folder is kept for the same key, and emptied for another."""
    kept, seen = tmp_path / "runs" / "x" / "ckpt.pt", []
    make = {"sft": lambda runs, name, spec: seen.append(kept.exists()) or {}}
    monkeypatch.setattr(pieces, "MAKERS", make)
    for setting in ("a", "a", "b"):
        pieces.make(tmp_path, pieces.Piece("x", "sft", {"setting": setting}))
        (kept.parent / "result.json").unlink()
        kept.write_text("")
    assert seen == [False, True, False]


def test_a_curve_is_walked_once_for_all_questions():
    """Two workers never make the same policy: no two curves differ in targets and betas alone."""
    work = [(replace(c, targets=(), betas=()), s) for c, s in pieces.curves(constants.FULL)]
    assert len(set(work)) == len(work)
    assert {seed for _, seed in work} == set(range(5))


def test_two_jobs_give_what_one_gives(finished, tmp_path):
    """Pieces read files only: the number of processes changes nothing."""
    out, _ = finished
    pieces.make_all(tmp_path, replace(TINY, questions=("modes",)), jobs=2)
    made = list(tmp_path.glob("runs/*/result.json"))
    assert len(made) == 1 + 1 + len(constants.MODAL)
    for path in made:
        assert path.read_text() == (out / path.relative_to(tmp_path)).read_text()


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
    with pytest.raises(InputError, match=r"sft.*no-such-file"):
        run_stage(tmp_path / "run", ["sft", "--data", tmp_path / "no-such-file.jsonl"])


@pytest.mark.parametrize("argv", [["--seeds", "0"], ["--jobs", "no"], ["--questions", "why"]])
def test_wrong_flags_end_with_one_sentence_and_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main.main(argv)
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


# --------------------------------------------------------------------------------------------------
# What is committed


def committed(name: str) -> dict:
    return json.loads((ROOT / "assets" / "text" / name).read_text(encoding="utf-8"))


def test_committed_results_are_of_the_plan_in_the_code():
    done = committed("results.json")["settings"]
    assert done["matrix"] == json.loads(json.dumps(asdict(constants.FULL)))
    assert done["methods"] == json.loads(json.dumps(constants.METHODS))
    assert done["tolerance"] == constants.TOLERANCE


def test_every_cell_is_a_policy_whose_measured_kl_is_within_10_percent_of_its_column():
    """Those of the page's tables and of its figures; no table and no figure has other numbers."""
    done = committed("results.json")
    assert len(done["cells"]) > 150
    for cell in done["cells"]:
        assert abs(cell["kl"] / cell["target"] - 1) <= 0.1
        assert {k: cell[k] for k in cell if k != "target"} in done["fits"]
    assert all(abs(x["nearest_kl"] / x["target"] - 1) > 0.1 for x in done["missed"])


def test_committed_comparisons_follow_from_the_committed_cells():
    done = committed("results.json")
    again = report.compared(done["cells"], constants.FULL)
    for row, then in zip(again, done["compared"], strict=True):
        assert then == {k: pytest.approx(row[k], abs=1e-9) for k in then}


def test_learning_rates_are_those_of_the_committed_tuning():
    """Chosen on a seed that no figure uses, each with a worse one on either side, EXO and DPO the
    same where they learn from the same."""
    done, rates = committed("tuning.json"), {}
    assert done["settings"]["first_seed"] == 1000
    assert done["settings"]["steps"] == constants.FULL.steps
    fast = [row for row in done["rows"] if row["method"] == "exo-pref"]
    assert (
        constants.METHODS["exo-fast-pref"].rate == max(fast, key=lambda row: row["score"])["rate"]
    )
    for name, method in constants.METHODS.items():
        if name != "exo-fast-pref":
            rates.setdefault(name.split("-")[-1], set()).add(method.rate)
    for name, (rate,) in rates.items():
        scores = {}
        for row in done["rows"]:
            if row["method"].split("-")[-1] == name:
                scores.setdefault(row["rate"], []).append(row["score"])
        means = {rate: sum(x) / len(x) for rate, x in scores.items()}
        assert means[rate] == max(means.values())
        assert min(means) < rate < max(means)
