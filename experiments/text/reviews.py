"""
The text world: restaurant reviews from a grammar so small that its posterior is exact.

A reviewer is happy or unhappy, with equal odds, and writes clause after clause:

    On Friday the noodles were rather tasty                        the prompt: a first impression
    . Hmm, they were greasy. Also, the cook was slow, and she      the completion must agree with
    always shouts. In the end I would hardly order them again.     it, and with itself, in number

The grammar is one list of slots, REVIEW. A slot looks at the state (what later words must agree
with) and offers choices; each choice has a weight and a lean, in nats, and its probability is

    P(choice | sentiment) ∝ weight · exp(± lean / 2)    + for a happy reviewer, - for an unhappy one

`sample` walks along the slots and draws, `likelihood` walks along them with a given text and sums
over all walks that spell it, so that generator and oracle cannot drift apart. There is something to
sum over: whether a clause praises or blames is a hidden choice, and a word with lean 0 ("filling")
does not tell.

    sentiment    log P(happy | text) - log P(unhappy | text): the log-odds, within ±12, sd 5.6
    conviction   its absolute value: a rave or a pan; one review in fifteen is lukewarm, below 1

The prompt says little (at most ±0.5), so from every prompt a rave and a pan are both in reach.

Text that the grammar cannot produce (a wrong agreement, a cut end, a word too many) gets
UNPRODUCIBLE, a constant below the worst reward that the grammar can earn: if broken text kept the
evidence of its other words, a policy would soon drop the grammar for more of them.

Simplifications: a reviewer remembers only the state, and so may call burnt fries superb; the order
of the clauses is fixed, and no review is longer than 40 words, or 48 tokens. "but" means no more
than "and", nothing is negated, and all pronouns follow from "was" or "were": a parity is what some
small models take thousands of steps to learn, and the world would measure who did.
"""

import functools
import math
import random
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tiktoken

UNPRODUCIBLE = {"sentiment": -13.0, "conviction": -1.0}  # at least a nat below any real review

# ------------------------------------------------------------------------------
# The lexicon: who is talked about (with its pronoun), and how (with its lean in nats)


def nouns(**by_pronoun: str) -> dict[str, str]:
    """{noun: its pronoun}."""
    return {noun: word for word, line in by_pronoun.items() for noun in line.split()}


def graded(line: str, leans=(1.6, 1.1, 0.7, 0.3, 0.0, -0.3, -0.7, -1.1, -1.6)) -> dict[str, float]:
    """{word: its lean}, from the best word to the worst."""
    return dict(zip(line.split(), leans, strict=True))


DISHES = nouns(
    it="soup curry salad pizza omelette", they="noodles dumplings pancakes mussels fries"
)
STAFF = nouns(she="cook waitress hostess", they="owners helpers waiters")
ROOM = nouns(it="room music garden", they="tables lights chairs")

TASTE = graded("superb delicious tasty decent spicy plain bland stale inedible")
PLATE = graded("perfect fresh generous warm filling lukewarm small greasy burnt")
MANNER = graded("wonderful kind polite calm chatty distant slow rude hostile")
LOOK = graded("gorgeous charming clean neat simple faded shabby dirty dreadful")
HABIT = graded("smile help joke sing yawn frown shout", (1.1, 0.7, 0.3, 0.0, -0.3, -0.7, -1.1))
MOOD = graded("Wow Nice Well Hmm Ugh", (2.0, 1.0, 0.0, -1.0, -2.0))
VERDICT = graded(
    "gladly surely perhaps reluctantly hardly never", (1.6, 1.1, 0.3, -0.3, -1.1, -1.6)
)

# How strongly the word that follows is meant: (weight, factor on its lean).
DEGREE = {"": (2, 1.0), " really": (1, 1.4), " rather": (1, 0.6)}
OFTEN = {" always": (1, 1.4), " often": (1, 1.0), " sometimes": (1, 0.6)}

JOIN = (", and", ", but", ". Also,", ". Still,")
CLOSE = (". So", ". Again,", ". In the end")

# ------------------------------------------------------------------------------
# The grammar: slots that offer choices


class State(NamedTuple):
    """What later words must agree with."""

    dish: str = ""  # the pronoun of the first subject: it, they
    subject: str = ""  # the pronoun of the latest subject: it, they, she
    polarity: int = 0  # of the clause: +1 praises, -1 blames (hidden, see above)
    factor: float = 1.0  # of the latest word of DEGREE or OFTEN


class Choice(NamedTuple):
    """One way to go on from a slot."""

    text: str  # what is written, "" included
    state: State  # what is known afterwards
    weight: float = 1.0  # relative frequency, when sentiment does not matter
    lean: float = 0.0  # nats towards happy
    jump: int = 1  # how many slots further


Slot = Callable[[State], list[Choice]]


def one_of(*texts: str) -> Slot:
    """Any of the texts: no evidence, nothing to agree with."""
    return lambda state: [Choice(text, state) for text in texts]


def subject(table: dict[str, str]) -> Slot:
    """A new subject; the first one of a review is the dish."""
    return lambda state: [
        Choice(f" the {noun}", state._replace(dish=state.dish or pronoun, subject=pronoun))
        for noun, pronoun in table.items()
    ]


def agree(form: Callable[[State], str]) -> Slot:
    """A word with no choice: its form follows from the state."""
    return lambda state: [Choice(form(state), state)]


def impression(lean: float) -> Slot:
    """Whether the clause praises or blames: hidden, it writes nothing."""
    return lambda state: [Choice("", state._replace(polarity=p), lean=p * lean) for p in (1, -1)]


def sigh(table: dict[str, float]) -> Slot:
    """A mood in a word: the strongest evidence of all, and the first that a completion gives."""
    return lambda state: [Choice(f". {w},", state, lean=lean) for w, lean in table.items()]


def degree(table: dict[str, tuple[float, float]]) -> Slot:
    """How strongly the next word is meant."""
    return lambda state: [
        Choice(text, state._replace(factor=factor), weight)
        for text, (weight, factor) in table.items()
    ]


def opinion(table: dict[str, float], scale: float = 1.0, verb: bool = False) -> Slot:
    """A word that, in its degree, has the clause's polarity or none; a verb agrees in number."""

    def slot(state: State) -> list[Choice]:
        ending = "s" if verb and state.subject != "they" else ""
        leans = {word: state.factor * value for word, value in table.items()}
        return [
            Choice(f" {word}{ending}", state._replace(factor=1.0), lean=scale * lean)
            for word, lean in leans.items()
            if lean * state.polarity >= 0
        ]

    return slot


def maybe(p: float, clause: tuple[Slot, ...]) -> tuple[Slot, ...]:
    """The clause with probability p, else nothing."""

    def enter(state: State) -> list[Choice]:
        return [Choice("", state, p), Choice("", state, 1 - p, jump=len(clause) + 1)]

    return (enter, *clause)


was = agree(lambda state: " were" if state.subject == "they" else " was")
are = agree(lambda state: " are" if state.subject == "they" else " is")
pronoun = agree(lambda state: f" {state.subject}")
them = agree(lambda state: " them" if state.dish == "they" else " it")
habit = opinion(HABIT, scale=0.4, verb=True)
days = one_of(*(f" {d}day" for d in ("Mon", "Tues", "Wednes", "Thurs", "Fri", "Satur", "Sun")))

# The mood tells most, then whether a clause praises or blames, then the word it does it with. A
# first impression has a tenth of the lean, so that the prompt decides little.
FIRST = (one_of("On", "Last", "One"), days, subject(DISHES), was)
FIRST += (impression(0.15), degree(DEGREE), opinion(TASTE, scale=0.2))
PLATED = (impression(1.6), degree(DEGREE), opinion(PLATE, scale=0.4))
SERVED = (impression(1.6), degree(DEGREE), opinion(MANNER, scale=0.4))
LOOKED = (impression(1.6), degree(DEGREE), opinion(LOOK, scale=0.4))
REVIEW: tuple[Slot, ...] = (
    *FIRST,
    *(sigh(MOOD), pronoun, was, *PLATED),
    *(one_of(*JOIN), subject(STAFF), was, *SERVED),
    *maybe(0.6, (one_of(*JOIN), pronoun, impression(1.2), degree(OFTEN), habit)),
    *maybe(0.6, (one_of(*JOIN), subject(ROOM), are, *LOOKED)),
    *(one_of(*CLOSE), one_of(" I would"), impression(1.6), opinion(VERDICT, scale=0.4)),
    *(one_of(" order", " try", " recommend", " choose"), them, one_of(" again.")),
)


# ------------------------------------------------------------------------------
# One grammar, two uses: draw a text, and weigh a text


@functools.cache
def arcs(slot: Slot, state: State) -> tuple[tuple[Choice, float, float], ...]:
    """The choices of a slot, each with P(choice | happy) and P(choice | unhappy)."""
    choices = slot(state)
    happy, unhappy = ([c.weight * math.exp(s * c.lean / 2) for c in choices] for s in (1, -1))
    z, w = sum(happy), sum(unhappy)
    return tuple((c, a / z, b / w) for c, a, b in zip(choices, happy, unhappy, strict=True))


def sample(rng: random.Random, happy: bool, review: tuple[Slot, ...] = REVIEW) -> tuple[str, str]:
    """(prompt, completion) of one review by a happy or an unhappy reviewer."""
    texts, i, state = ["", ""], 0, State()
    while i < len(review):
        options = arcs(review[i], state)
        weights = [option[1 if happy else 2] for option in options]
        choice = rng.choices(options, weights)[0][0]
        texts[i >= len(FIRST)] += choice.text
        i, state = i + choice.jump, choice.state
    return texts[0], texts[1]


def likelihood(text: str, review: tuple[Slot, ...] = REVIEW) -> tuple[float, float]:
    """(P(text | happy), P(text | unhappy)), exactly: the forward algorithm over slots.

    `ahead[i]` holds, for each (characters read, state) before slot i, the probability of all walks
    that lead there. A whole review has a probability above 1e-20, so float64 needs no logarithms.
    """
    ahead: list[dict] = [{} for _ in range(len(review) + 1)]
    ahead[0][0, State()] = (1.0, 1.0)
    for i, slot in enumerate(review):
        for (at, state), (happy, unhappy) in ahead[i].items():
            for choice, a, b in arcs(slot, state):
                if text.startswith(choice.text, at):
                    there, key = ahead[i + choice.jump], (at + len(choice.text), choice.state)
                    x, y = there.get(key, (0.0, 0.0))
                    there[key] = (x + happy * a, y + unhappy * b)
    ends = [p for (at, _), p in ahead[-1].items() if at == len(text)]
    return sum(p[0] for p in ends), sum(p[1] for p in ends)


# ------------------------------------------------------------------------------
# What others use: two rewards, a tokenizer, rows for files


def log_odds(text: str) -> float | None:
    """log P(happy | text) - log P(unhappy | text) in nats, None where nobody can write the text."""
    happy, unhappy = likelihood(text)
    return math.log(happy / unhappy) if happy > 0 else None


def reward(name: str, log_odds: np.ndarray) -> np.ndarray:
    """Of texts by their log-odds, NaN where nobody can write them."""
    values = np.abs(log_odds) if name == "conviction" else log_odds
    return np.where(np.isnan(log_odds), UNPRODUCIBLE[name], values)


def rows(n: int, seed: int) -> list[dict[str, str]]:
    """n different reviews as {"prompt", "completion"}, half of them by happy reviewers on average.

    The same seed gives the same rows, and its first rows do not depend on n.
    """
    rng, reviews = random.Random(seed), {}
    while len(reviews) < n:
        prompt, completion = sample(rng, happy=rng.random() < 0.5)
        reviews.setdefault(prompt + completion, {"prompt": prompt, "completion": completion})
    return list(reviews.values())


PATTERN = r" ?\w+|[^\w\s]|\s+(?!\S)|\s+"  # a word with the space before it, one sign, other space


def lexicon() -> list[str]:
    """Every word that the grammar can write, with the space before it, sorted."""
    ahead: list[set] = [set() for _ in range(len(REVIEW) + 1)]
    ahead[0].add(State())
    words = set()
    for i, slot in enumerate(REVIEW):
        for state in ahead[i]:
            for choice, *_ in arcs(slot, state):
                words.update(re.findall(PATTERN, choice.text))
                ahead[i + choice.jump].add(choice.state)
    return sorted(word for word in words if len(word) > 1)  # "," and "." are bytes


@functools.cache
def encoding() -> tiktoken.Encoding:
    """The words of the lexicon as one token each, any other text as its UTF-8 bytes.

    Ids: 256 bytes, the words, <|endoftext|>. tiktoken looks a piece of text up whole before it
    merges bytes, so words need no merges on the way to them.
    """
    pieces = [bytes([i]) for i in range(256)] + [word.encode() for word in lexicon()]
    ranks = {piece: rank for rank, piece in enumerate(pieces)}
    special = {"<|endoftext|>": len(ranks)}
    return tiktoken.Encoding(
        "reviews", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special
    )
