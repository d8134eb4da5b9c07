"""experiments/text: the oracle against enumeration, Monte Carlo and numbers known by hand; what is
measured against enumeration; pieces that survive a stop, and a tiny run of everything."""

import errno
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import exo
from data import InputError
from experiments.common import in_parallel, only
from experiments.text import constants, figures, main, makers, measures, pieces, report, reviews
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
    return [(h, t, reviews.sentiment("", t)) for h, t in zip(labels, texts, strict=True)]


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


def test_no_mass_is_lost_in_the_whole_grammar():
    """Its 10^14 texts cannot be listed, but the mass that reaches the end can be added up."""
    for k in (1, 2):
        ahead = [Counter() for _ in range(len(reviews.REVIEW) + 1)]
        ahead[0][reviews.State()] = 1.0
        for i, slot in enumerate(reviews.REVIEW):
            for state, p in ahead[i].items():
                for arc in reviews.arcs(slot, state):
                    ahead[i + arc[0].jump][arc[0].state] += p * arc[k]
        assert sum(ahead[-1].values()) == pytest.approx(1, abs=1e-12)


def test_log_odds_known_by_hand():
    """Praise or blame leans by 0.4, and the only word for either adds nothing: log-odds ±0.4. A
    word for both, with nothing else to say, adds exactly 0."""
    only = (reviews.impression(0.4), reviews.opinion({"good": 1.0, "bad": -2.0}))
    for text, odds in ((" good", 0.4), (" bad", -0.4)):
        happy, unhappy = reviews.likelihood(text, only)
        assert math.log(happy / unhappy) == pytest.approx(odds)
    both = (reviews.impression(0.4), reviews.opinion({"good": 1.0, "odd": 0.0, "bad": -1.0}))
    happy, unhappy = reviews.likelihood(" odd", both)
    assert happy == pytest.approx(unhappy)


def test_frequencies_of_the_small_grammar():
    """What `sample` writes is what `likelihood` says, text by text, within 4.5 standard errors."""
    rng, n = random.Random(1), 10_000
    for k, happy in enumerate((True, False)):
        counts = Counter("".join(reviews.sample(rng, happy, SMALL)) for _ in range(n))
        assert set(counts) <= set(total(SMALL, happy))
        for text in total(SMALL, happy):
            p = reviews.likelihood(text, SMALL)[k]
            assert abs(counts[text] - n * p) < 4.5 * math.sqrt(n * p * (1 - p)) + 1


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


EVENTS = ("superb", "rather superb", "(it was|they were) filling", "always smile", "So I")


@pytest.mark.parametrize("event", [*EVENTS, "them again"])
def test_calibration_on_events(drawn, event):
    """The mean posterior over the reviews that say something is the share of happy ones there."""
    hits = [(h, 1 / (1 + math.exp(-odds))) for h, text, odds in drawn if re.search(event, text)]
    assert len(hits) > 200
    spread = math.sqrt(sum(p * (1 - p) for _, p in hits))
    assert abs(sum(h - p for h, p in hits)) < 4 * spread


def test_rewards_have_the_documented_scale(drawn):
    """Sentiment has sd 5.6 around 0 within ±12, and one review in fifteen is lukewarm."""
    odds = [o for *_, o in drawn]
    assert abs(sum(odds) / len(odds)) < 0.12
    assert math.sqrt(sum(o * o for o in odds) / len(odds)) == pytest.approx(5.57, abs=0.1)
    assert all(abs(o) < 12 for o in odds)
    assert sum(abs(o) < 1 for o in odds) / len(odds) == pytest.approx(0.065, abs=0.01)


def test_a_prompt_leaves_both_modes_open():
    """The log-odds of every prompt is within ±0.5."""
    happy, unhappy = total(reviews.FIRST, True), total(reviews.FIRST, False)
    assert all(abs(math.log(happy[text] / unhappy[text])) < 0.5 for text in happy)


# --------------------------------------------------------------------------------------------------
# What cannot be produced


def unproducible(text):
    return (reviews.sentiment("", text), reviews.conviction("", text)) == (-13.0, -1.0)


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


def test_the_example_is_a_review():
    odds = reviews.sentiment(PROMPT, REST)
    assert not unproducible(PROMPT + REST)
    assert reviews.conviction(PROMPT, REST) == abs(odds) > 0
    assert reviews.sentiment("", PROMPT + REST) == odds, "only the whole text counts"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("noodles were", "noodles was"),  # number, within the clause
        ("they were", "it was"),  # number, from the first clause
        ("she always", "they always"),  # number, of another subject
        ("shouts", "shout"),
        ("them again", "it again"),  # number, from the first clause to the last
        (". Hmm, they", ", but they"),
        ("Also, the", "Also the"),
        ("In the end I", "In the end, I"),
        (", and she", ", and it"),
        ("again.", "again"),  # cut
        ("again.", "again. "),
        ("again.", "again. Also, it was perfect."),  # does not know when to stop
        ("slow, and", "slow, and the room is neat, and"),  # a clause out of order
        ("rather tasty", "rather rather tasty"),
        ("On", "on"),
    ],
)
def test_agreement_is_needed(old, new):
    """One wrong word, near or far from what it must agree with, and nobody can have written it."""
    assert (PROMPT + REST).count(old) == 1
    assert unproducible((PROMPT + REST).replace(old, new))


def test_a_word_left_out_costs_the_reward():
    """Only the word of degree ("rather") may go."""
    words = (PROMPT + REST).split(" ")
    left = [
        w for i, w in enumerate(words) if not unproducible(" ".join(words[:i] + words[i + 1 :]))
    ]
    assert left == ["rather"]


@given(st.text() | st.lists(st.sampled_from(reviews.lexicon()), max_size=40).map("".join))
@settings(deadline=None, max_examples=100)
def test_any_text_has_a_finite_reward(text):
    """Heaps of strong words are no review, and get less than the worst one."""
    assert unproducible(text)
    assert reviews.sentiment(PROMPT, text) == -13


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


def test_rows_depend_on_the_seed_only():
    assert reviews.rows(50, seed=1) == reviews.rows(100, seed=1)[:50]
    assert reviews.rows(50, seed=1) != reviews.rows(50, seed=2)
    assert set(reviews.rows(1, seed=0)[0]) == {"prompt", "completion"}


# --------------------------------------------------------------------------------------------------
# The tokenizer


def test_each_word_is_one_token():
    enc, words = reviews.encoding(), reviews.lexicon()
    assert [enc.encode_ordinary(word) for word in words] == [[256 + i] for i in range(len(words))]
    assert enc.name == "reviews"
    assert enc.eot_token == enc.n_vocab - 1 == 256 + len(words)
    assert enc.encode_ordinary("<|endoftext|>") != [enc.eot_token], "text is never a control token"


def test_reviews_need_no_bytes_but_signs():
    """A review is its words, "," and ".", and cutting it at the prompt does not change its ids."""
    enc = reviews.encoding()
    for row in reviews.rows(200, seed=0):
        prompt, rest = (enc.encode_ordinary(row[k]) for k in ("prompt", "completion"))
        assert enc.encode_ordinary(row["prompt"] + row["completion"]) == prompt + rest
        assert {i for i in prompt + rest if i < 256} <= {ord(","), ord(".")}
        assert len(prompt + rest) < 48


@given(st.text() | st.lists(st.sampled_from([*reviews.lexicon(), "é", "\n", " "])).map("".join))
@settings(deadline=None, max_examples=300)
def test_any_text_survives_the_round_trip(text):
    enc = reviews.encoding()
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


def test_token_kl_is_unbiased_and_steadier_than_k1():
    """Weighted by pi over all texts, cut ones too, its mean is KL(pi || sft) and so is k1's. The
    same beside a prompt of another length."""
    pi, sft, prompt, eot = tiny_gpt(0), tiny_gpt(1), [1, 0], 2
    a, b = (enumerate_texts(gpt, prompt, 3, eot) for gpt in (pi, sft))
    assert math.fsum(map(math.exp, a.values())) == pytest.approx(1, abs=1e-6)
    exact = sum(math.exp(a[y]) * (a[y] - b[y]) for y in a)
    texts, w = list(map(list, a)), np.exp(list(a.values()))
    both = measures.token_kl(pi, sft, [[0, 1, 1, 0], prompt], [texts, texts])
    got = {name: x[1] for name, x in both.items()}
    assert got["kl"] @ w == pytest.approx(exact, abs=1e-5)
    assert got["k1"] @ w == pytest.approx(exact, abs=1e-5)
    assert got["k1"] == pytest.approx([a[y] - b[y] for y in a], abs=1e-5)
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
    got = measures.optimum(r, beta, {"v": r})
    assert got["v"] == pytest.approx(exact["v"], abs=0.01)
    assert got["kl"] == pytest.approx(exact["kl"], abs=0.01)
    assert measures.optimum(r, 1e9, {"v": r})["ess"] == pytest.approx(400_000)
    lone = np.array([[0.0, 0.0, 50.0]])
    assert measures.optimum(lone, 1.0, {"v": lone})["ess"] == pytest.approx(1)


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
    got = measures.best_of_n(score, n, {"v": value})
    assert got["v"] == pytest.approx(np.mean(wanted))
    assert got["kl"] == pytest.approx(math.log(n) - (n - 1) / n)


def test_best_of_n_has_its_kl_and_wins_n_of_n_plus_one():
    """Of a continuous reward: KL = log n - (n - 1) / n, and n/(n+1) against one draw."""
    n, u = 4, (np.arange(100_000) + 0.5) / 100_000  # rank of a completion under sft
    density = n * u ** (n - 1)  # of the best of n, relative to sft
    assert (density * np.log(density)).mean() == pytest.approx(math.log(n) - (n - 1) / n, abs=1e-4)
    score = np.random.default_rng(0).normal(size=(1, 2000))
    wins = measures.best_of_n(score, n, {"w": measures.win_values(score, score)})["w"]
    assert wins == pytest.approx(n / (n + 1), abs=2e-3)


def test_win_values_count_ties_half():
    won = measures.win_values(np.array([[0.0, 1.0, 3.0]]), np.array([[2.0, 1.0, 0.0, 1.0]]))
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


def test_at_kl_is_linear_in_the_root_and_never_extrapolates():
    """From sft, reward 1 at KL 0, to 3 at KL 4: 2 at KL 1."""
    assert report.at_kl([(4.0, 3.0), (0.0, 1.0)], 1.0) == pytest.approx(2.0)
    assert math.isnan(report.at_kl([(4.0, 3.0), (0.0, 1.0)], 4.1))


def test_calibration_compares_gains_at_equal_kl(tmp_path):
    """Frontiers that are straight in the root of KL: slopes 4 (optimum), 3 and 2 from sft at -1, so
    that the gains at KL 0.25 are 2, 1.5 and 1. A width whose DPO never gets there is left out."""
    done = {"optimum": [], "best_of_n": [], "rows": [], "start": []}
    for seed, width in itertools.product((0, 1), (4, 8)):
        who = {"reward": "sentiment", "seed": seed, "n_embd": width}
        done["optimum"].append({**who, "beta": 2.0, "kl": 4.0, "oracle": 7.0, "ess": 99})
        sft = {**who, "kl": 0.0, "oracle": -1.0}
        done["best_of_n"].append({**sft, "method": "best-of-n-oracle", "n": 1})
        done["start"].append({**sft, "oracle": -1.5})  # what it is with the policies' numbers
        for method, kl, oracle in (("exo", 1.0, 1.5), ("dpo", 0.25 if width == 8 else 0.01, -0.5)):
            end = {"method": f"{method}-rw-oracle", "beta": 2.0, "n_pairs": None, "last": True}
            done["rows"].append({**who, **end, "kl": kl, "oracle": oracle})
    matrix = replace(TINY, betas=(("sentiment", (2.0,)),), seeds=2)
    done["calibration"] = report.calibration_rows(done, matrix)
    assert {row["n_embd"] for row in done["calibration"]} == {8}
    rows = only(done["calibration"], kl=0.25)
    for row in rows:
        gains = [row[m] for m in ("optimum", *constants.CALIBRATION)]
        assert gains == pytest.approx([2.0, 1.5, 1.0])
    assert [row["seed"] for row in rows] == [0, 1]
    plt = figures.pyplot()
    if plt:
        figures.finish(plt, figures.draw_calibration(plt, done, matrix), tmp_path / "figure.png")
        assert (tmp_path / "figure.png").stat().st_size


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
    spec = {"method": "exo-pref", "beta": beta, "labels": "", "sft": ""}
    spec |= {"steps": 2, "rate": 1e-3, "seed": 0, "groups": 2, "K": 4}
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


# --------------------------------------------------------------------------------------------------
# The run

TINY = replace(
    constants.QUICK,
    betas=(("sentiment", (2.0, 0.5)),),
    widths=(4,),
    n_embd=8,
    n_layer=1,
    n_head=2,
    sft_rows=64,
    sft_iters=4,
    prompts=8,
    K=4,
    groups=2,
    steps=2,
    rm_iters=2,
    judged=(4, 4),
    pool=16,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One tiny run of all methods: (folder, results)."""
    out = tmp_path_factory.mktemp("text") / "deep" / "out"
    return out, main.run(out, TINY, jobs=1)


def test_every_method_is_in_rows_frontier_and_table(finished):
    """Trained ones at each beta, best-of-n and the optimum beside them."""
    out, done = finished
    assert json.loads((out / "results.json").read_text())["rows"] == done["rows"]
    for method, beta in itertools.product(constants.METHODS, (2.0, 0.5)):
        (row,) = only(done["rows"], n_embd=8, method=method, beta=beta)
        for name in ("oracle", "rm", "kl", "win_oracle_sft", "win_rm_sft"):
            assert math.isfinite(row[name])
            assert row[f"{name}_stderr"] >= 0
        assert row["kl"] >= 0
    assert {row["method"] for row in done["best_of_n"]} == {"best-of-n", "best-of-n-oracle"}
    assert {row["n_embd"] for row in done["optimum"]} == {4, 8}
    table = report.table(done, TINY)
    for method in (*constants.METHODS, "best-of-n", "optimum"):
        assert method in table
    assert done["density"]


def test_a_stopped_run_goes_on(finished):
    """Finished pieces are not touched, a missing one is made again, and gives the same numbers."""
    out, done = finished
    files = sorted(out.glob("runs/*/result.json"))
    before = {path: path.stat().st_mtime_ns for path in files}
    lost = next(p for p in files if "w8-exo-rw-oracle" in p.parent.name)
    content = lost.read_text()
    lost.unlink()
    again = main.run(out, TINY, jobs=1)
    assert lost.read_text() == content
    del before[lost]
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    assert again["rows"] == done["rows"]


def test_other_settings_make_pieces_anew():
    """A piece's key holds its own settings and those of all it is made from, and no others."""

    def keys(**changed) -> dict[str, str]:
        return {piece.name: piece.key for piece in pieces.plan(replace(TINY, **changed))}

    a, b, more = keys(), keys(steps=3, seeds=2), keys(seeds=2)
    assert a == keys()
    assert set(a) < set(b)
    assert not set(a.values()) & set(b.values())
    assert {name: more[name] for name in a} == a


def test_a_checkpoint_of_other_settings_is_not_resumed(tmp_path, monkeypatch):
    """The piece's folder is kept for the same key, and emptied for another."""
    kept, seen = tmp_path / "runs" / "x" / "ckpt.pt", []
    make = {"sft": lambda runs, name, spec: seen.append(kept.exists()) or {}}
    monkeypatch.setattr(pieces, "MAKERS", make)
    for setting in ("a", "a", "b"):
        pieces.work(tmp_path, [pieces.Piece("x", "sft", {"setting": setting})])
        kept.write_text("")
    assert seen == [False, True, False]


def test_pieces_come_after_what_they_need():
    """Makers are called kind by kind, and name what they read."""
    kinds, seen = list(makers.MAKERS), set()
    plan = pieces.plan(constants.FULL)
    for piece in sorted(plan, key=lambda piece: kinds.index(piece.make)):
        needs = {piece.spec[k] for k in ("sft", "labels") if k in piece.spec} - {piece.name}
        assert needs <= seen
        seen.add(piece.name)
    assert len(seen) == len(plan)


def test_two_jobs_give_what_one_gives(finished, tmp_path):
    """Pieces read files only: the number of processes changes nothing."""
    out, _ = finished
    few = replace(TINY, widths=(), methods=("dpo-pref", "exo-online"))
    pieces.make_all(tmp_path, pieces.plan(few), jobs=2)
    made = list(tmp_path.glob("runs/*/result.json"))
    assert len(made) == 1 + 1 + 4
    for path in made:
        assert path.read_text() == (out / path.relative_to(tmp_path)).read_text()


def test_a_full_disk_ends_with_one_sentence_and_2(tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(main, "run", full)
    assert main.main(["--out", str(tmp_path)]) == 2
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


def test_a_failure_does_not_wait_for_the_workers_before_it():
    """Nor for pieces that another process has yet to make."""
    start = time.time()
    with pytest.raises(TypeError):
        in_parallel(time.sleep, [(100,), ("no number",)])
    assert time.time() - start < 50


def test_a_failed_stage_says_why(tmp_path):
    with pytest.raises(InputError, match=r"sft.*no-such-file"):
        run_stage(tmp_path / "run", ["sft", "--data", tmp_path / "no-such-file.jsonl"])


@pytest.mark.parametrize("argv", [["--seeds", "0"], ["--jobs", "none"], ["--nonsense"]])
def test_wrong_flags_end_with_one_sentence_and_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main.main(argv)
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


# --------------------------------------------------------------------------------------------------
# What is committed


def committed(name: str) -> dict:
    return json.loads((ROOT / "assets" / "text" / name).read_text(encoding="utf-8"))


def plain(matrix: constants.Matrix) -> dict:
    """As JSON gives it back: tuples are lists."""
    return json.loads(json.dumps(asdict(matrix)))


def family(method: str) -> str:
    """What EXO and DPO share where they learn from the same: "exo-rw" and "dpo-rw" are "rw"."""
    return method.removeprefix("exo-").removeprefix("dpo-")


RATES = {family(method): rate for method, (*_, rate) in constants.METHODS.items()}


THEN = {  # of the runs that are committed, and no field of Matrix any more
    "encoding": "experiments.reviews:encoding",  # where constants.ENCODING was
    "efficiency": ["exo-pref", "dpo-pref"],  # which the full run also trained with fewer pairs
    "efficiency_rewards": ["sentiment"],
}


def test_committed_results_are_of_the_matrix_in_the_code():
    done = committed("results.json")["settings"]
    then = THEN | {"first_seed": 0, "rates": [], "evals": 2, "pairs": [128, 1024]}
    assert done["matrix"] == plain(constants.FULL) | then
    assert done["learning_rate"] == {**RATES, "rm": constants.RM_RATE}
    assert done["least_ess"] == constants.LEAST_ESS


def test_committed_numbers_follow_from_the_committed_rows():
    """matched, reach and calibration, read off its frontiers once more."""
    done = committed("results.json")
    for name in ("matched", "reach", "calibration"):
        again = getattr(report, f"{name}_rows")(done, constants.FULL)
        assert len(again) == len(done[name])
        for row, then in zip(again, done[name], strict=True):
            assert then == {k: pytest.approx(row[k], abs=1e-9) for k in then}


def test_learning_rates_are_those_of_the_committed_tuning():
    """Chosen on a seed that no figure uses, each with a worse one on either side, EXO and DPO the
    same where they learn from the same."""
    done = committed("tuning.json")
    assert all(rate == RATES[family(name)] for name, (*_, rate) in constants.METHODS.items())
    assert done["chosen"] == RATES
    betas = [["sentiment", [4.0, 2.0]], ["conviction", [2.0, 1.0]]]
    then = THEN | {"betas": betas, "seeds": 1, "first_seed": 1000, "widths": [], "pairs": []}
    for name, value in (plain(constants.FULL) | then).items():
        assert done["settings"][name] == value, name
    assert constants.FULL.seeds <= 1000
    for name, best in done["chosen"].items():
        scores = {}
        for row in done["rows"]:
            if family(row["method"]) == name:
                scores.setdefault(row["rate"], []).append(row["score"])
        means = {rate: sum(x) / len(x) for rate, x in scores.items()}
        assert means[best] == max(means.values())
        assert min(means) < best < max(means)
