"""
Real text for the frontier: sentences of a corpus, a vocabulary of its words, a lexicon's reward.

    python -m experiments.frontier --corpus reviews.jsonl.gz --lexicon vader_lexicon.txt

A row is a sentence: the prompt its first words, the completion the rest. The vocabulary is the
corpus's 5,000 commonest words, and only sentences of these are read, since a small model would
spell the others byte by byte into words that do not exist. The reward counts words: with s the sum
of their valences in the lexicon, 4 s / sqrt(s^2 + 15), which is four times the VADER score without
its rules of grammar: within ±4, and no word pays much after the fifth.

A reward is named module:function, which leaves no room for a file: the two files are found in the
environment, under CORPUS and LEXICON.
"""

import functools
import hashlib
import html
import math
import os
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import tiktoken

from data import InputError, read_rows
from experiments.reviews import PATTERN

CORPUS, LEXICON = "FRONTIER_CORPUS", "FRONTIER_LEXICON"
WORDS = 5000  # in the vocabulary, beside the 256 bytes
PROMPT, LONGEST = 4, 24  # words
SHOWN = (  # prompts of one's own for samples, so that no row of the corpus is in the results
    "this movie was a",
    "the acting in this",
    "i watched it with",
    "in the end the",
)
BETAS = (("lexicon", (2.0, 1.0, 0.5)),)
SIZE = {  # of a few thousand sentences; --quick changes the number of seeds alone
    "sft_rows": 50_000,
    "sft_iters": 1000,
    "prompts": 800,
    "steps": 100,
    "rm_iters": 250,
    "judged": (32, 16),
    "pool": 128,
    "new": 48,
}


def matrix(size):
    """The same matrix for real text: one reward, no sweep of widths or labels, one small SIZE."""
    own = {"encoding": "experiments.frontier_corpus:encoding", **SIZE}
    digest = hashlib.sha256(repr((WORDS, PROMPT, LONGEST, SHOWN)).encode())
    for name in (CORPUS, LEXICON):
        digest.update(Path(file(name)).read_bytes())
    own |= {
        "source": digest.hexdigest()[:16],
        "betas": BETAS,
        "widths": (),
        "pairs": (),
    }
    return replace(size, **own)


def file(name: str) -> str:
    if name not in os.environ:
        raise InputError("real text needs --corpus FILE and --lexicon FILE")
    return os.environ[name]


@functools.cache
def sentences(path: str) -> list[tuple[str, str]]:
    """All (prompt, completion) of a corpus with "text" in its rows, in file order."""
    out = []
    for where, row in read_rows(path):
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise InputError(f'{where}: a corpus needs rows with "text"')
        text = re.sub(r"<[^>]*>|\s+", " ", html.unescape(row["text"]).lower())
        for sentence in re.split(r"(?<=[.!?])\s+", text):
            words = sentence.strip().split()
            if PROMPT < len(words) <= LONGEST:
                out.append((" ".join(words[:PROMPT]), " " + " ".join(words[PROMPT:])))
    if not out:
        raise InputError(f"{path}: no sentences of {PROMPT + 1} to {LONGEST} words")
    return out


def corpus_rows(n: int, seed: int) -> list[dict[str, str]]:
    """n different sentences in the vocabulary's words (all, where there are fewer) as {"prompt",
    "completion"}, shuffled."""
    words = set(vocabulary())
    rows = sorted(
        (prompt, completion)
        for prompt, completion in set(sentences(file(CORPUS)))
        if all(len(w.encode()) == 1 or w in words for w in re.findall(PATTERN, prompt + completion))
    )
    random.Random(seed).shuffle(rows)
    return [{"prompt": prompt, "completion": completion} for prompt, completion in rows[:n]]


def vocabulary() -> list[str]:
    """The commonest words of the corpus, each with the space before it, sorted."""
    counts = Counter()
    for prompt, completion in sentences(file(CORPUS)):
        counts.update(re.findall(PATTERN, prompt + completion))
    return sorted([w for w, _ in counts.most_common() if len(w.encode()) > 1][:WORDS])


@functools.cache
def encoding() -> tiktoken.Encoding:
    """The words of the vocabulary as one token each, any other text as its UTF-8 bytes."""
    pieces = [bytes([i]) for i in range(256)] + [word.encode() for word in vocabulary()]
    ranks = {piece: rank for rank, piece in enumerate(pieces)}
    special = {"<|endoftext|>": len(ranks)}
    return tiktoken.Encoding(
        "corpus", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special
    )


@functools.cache
def valences(path: str) -> dict[str, float]:
    """{word: valence} of lines that begin with word TAB valence."""
    out = {}
    for i, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        word, *rest = line.split("\t")
        try:
            out[word.lower()] = float(rest[0])
        except (IndexError, ValueError) as error:
            raise InputError(f"{path}:{i}: a lexicon needs lines of word TAB valence") from error
    return out


def lexicon(prompt: str, completion: str) -> float:
    """The squashed sum of the valences of the completion's words, within ±4."""
    table = valences(file(LEXICON))
    s = sum(table.get(word, 0.0) for word in re.findall(r"[a-z'-]+", completion.lower()))
    return 4 * s / math.sqrt(s * s + 15)
