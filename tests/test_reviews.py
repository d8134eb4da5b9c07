"""experiments/reviews.py: the oracle against enumeration, Monte Carlo and numbers known by hand."""

import math
import random
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import reviews

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


# ------------------------------------------------------------------------------
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


@pytest.mark.parametrize(
    "event",
    [
        r"superb",
        r"rather superb",
        r"(it was|they were) filling",
        r"always smile",
        r"So I",
        r"them again",
    ],
)
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


# ------------------------------------------------------------------------------
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


# ------------------------------------------------------------------------------
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


# ------------------------------------------------------------------------------
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
