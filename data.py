"""
From rows of text to batches of groups. One shape runs through everything, the **group**: one
prompt, K completions. A preference pair is a group with K = 2, chosen first; a row with rewards has
its own K; a text to imitate is a group with K = 1.

    JSONL line -> infra.rows (text, checked) -> Groups (token ids in flat arrays) -> collate

Texts are encoded apart and joined as token ids, never as text: what a completion's tokens are does
not depend on its prompt. Special tokens written inside texts stay plain text.

Simplifications: an epoch's order depends on (seed, epoch) alone; texts without a prompt are
concatenated with [end of text] between them and cut into blocks, so one text may see the end of
another. The tokens of all files are in memory at once, 4 bytes each.
"""

import importlib
import math
import os
import sys
from array import array
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import tiktoken
import torch

import exo
from infra.rows import InputError, Report, best_of, one_sentence, read_files

# ------------------------------------------------------------------------------
# Tokenizers: tiktoken only


def get_encoding(name: str) -> tiktoken.Encoding:
    """`bytes` (embedded: 256 bytes and end-of-text, no download), a tiktoken name (`gpt2`, ...), or
    `module:function` for an Encoding of your own. Raises InputError with the remedy."""
    if name == "bytes":
        return byte_encoding()
    if ":" in name:
        return load_function(name, "--encoding")()
    if name not in tiktoken.list_encoding_names():
        known = ", ".join(["bytes", *tiktoken.list_encoding_names()])
        raise InputError(f"unknown encoding {name!r}: choose one of {known}")
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # no network, or a damaged cache
        raise InputError(
            f"tiktoken cannot load the vocabulary {name!r} ({type(error).__name__}): "
            "set TIKTOKEN_CACHE_DIR to a folder that holds it, or use the embedded --encoding bytes"
        ) from error


def byte_encoding() -> tiktoken.Encoding:
    """Every byte is a token, end-of-text is the 257th: small, complete, and needs no download."""
    return tiktoken.Encoding(
        "bytes",
        pat_str=r"(?s:.{1,32})",  # any cut will do, there are no merges; short pieces are fast ones
        mergeable_ranks={bytes([b]): b for b in range(256)},
        special_tokens={"<|endoftext|>": 256},
    )


def decode(encoding: tiktoken.Encoding, ids: list[int]) -> str:
    """Text of token ids; those between the words and the special tokens, which some encodings leave
    empty, are skipped."""
    try:
        return encoding.decode(ids)
    except KeyError:
        known = {*encoding._mergeable_ranks.values(), *encoding._special_tokens.values()}
        return encoding.decode([i for i in ids if i in known])


def load_function(name: str, flag: str):
    """The function behind `module:function`, imported from the Python path or the current
    folder."""
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    with one_sentence(f"{flag} {name}"):  # whatever importing a user's module raises
        found = getattr(importlib.import_module(module), function)
    if not callable(found):
        raise InputError(f"{flag} {name} is no function, but of type {type(found).__name__}")
    return found


# ------------------------------------------------------------------------------
# Groups: token ids in flat arrays


@dataclass
class Groups:
    """G groups in flat arrays, so that a hundred thousand cost no Python objects and slices are
    views.

    Segment s is tokens[offsets[s]:offsets[s + 1]]. Group g owns the segments from first[g], its
    prompt (never empty), up to first[g + 1]; those after the prompt are its completions.
    """

    tokens: np.ndarray  # (n,)
    offsets: np.ndarray  # (M + 1,)
    first: np.ndarray  # (G + 1,)
    ended: np.ndarray  # (M,): the completion is followed by end-of-text (False: it was cut)
    rewards: np.ndarray  # (M,), NaN for prompts and where only an order is known
    eot: int
    places: bytes = b""  # a line for each group: file:line, for what is said of it
    log_target: np.ndarray | None = None  # (M,) log p of each completion, by set_targets
    ref_logps: np.ndarray | None = None  # (M,) log sft of each completion; inf: not asked yet

    def __len__(self) -> int:
        return len(self.first) - 1

    def place(self, g: int) -> str:
        return self.places.split(b"\n")[g].decode() if self.places else "drawn in this round"

    def segment(self, s: int) -> list[int]:
        return self.tokens[self.offsets[s] : self.offsets[s + 1]].tolist()

    def prompt(self, g: int) -> list[int]:
        return self.segment(self.first[g])

    def completions(self, g: int) -> list[list[int]]:
        return [self.segment(s) for s in range(self.first[g] + 1, self.first[g + 1])]

    def grid(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(segment, mask), both (B, K), of these groups' completions; absent: segment 0, mask
        False."""
        start = self.first[ids] + 1
        count = self.first[ids + 1] - start
        column = np.arange(max(int(count.max()), 1))
        mask = column < count[:, None]
        return np.where(mask, start[:, None] + column, 0), mask

    def sizes(self) -> np.ndarray:
        """(G,) cells that each group fills in a batch: its prompt once, and as many times as it has
        completions the longest of these."""
        size, count = np.diff(self.offsets), np.diff(self.first) - 1
        longest = np.maximum.reduceat(np.where(self.is_completion(), size, 0), self.first[:-1])
        return size[self.first[:-1]] + count * longest

    def lengths(self) -> np.ndarray:
        """(M,) scored tokens of each completion, its end of text among them."""
        return np.diff(self.offsets) + self.ended

    def is_completion(self) -> np.ndarray:
        """(M,) bool: False for prompts."""
        out = np.ones(len(self.ended), bool)
        out[self.first[:-1]] = False
        return out

    def is_pair(self) -> np.ndarray:
        """(G,) bool: True for a preference pair, which has an order and no rewards."""
        return np.isnan(self.rewards[self.first[:-1] + 1])


class Builder:
    """Collects groups, cut to block_size, in flat arrays that grow."""

    def __init__(self, block_size: int, eot: int, report: Report):
        self.block_size, self.eot, self.report = block_size, eot, report
        self.tokens, self.offsets, self.first = array("i"), array("q", [0]), array("q", [0])
        self.ended, self.rewards, self.places = bytearray(), array("d"), bytearray()  # as in Groups
        self.text = np.array([eot], np.int32)  # running text that fills no block yet

    def add(self, prompt, completions: list, rewards=None, ended=True, place: str = "") -> bool:
        """Add a group of token ids (lists or int32 arrays); False if cutting left fewer distinct
        completions than a choice needs.

        The prompt may always have half of block_size, completions what the prompt leaves. A prompt
        loses its beginning; a completion its end, and then no end-of-text follows it.
        """
        prompt = prompt if len(prompt) else [self.eot]
        lengths = [len(c) for c in completions]
        keep = max(self.block_size - max(lengths, default=0), self.block_size // 2)
        room = self.block_size - min(len(prompt), keep)
        cut = [np.asarray(c[:room], np.int32) for c in completions]
        if len(cut) > 1 and len({c.tobytes() for c in cut}) < 2:
            self.report.unusable["identical within block_size"] += 1
            return False
        whole = [n <= room for n in lengths]
        self.report.cut_prompts += len(prompt) > keep
        self.report.cut_completions += whole.count(False)
        self.put(prompt[-keep:], cut, [ended and w for w in whole], rewards, place)
        return True

    def put(self, prompt, completions: list, ended: list[bool], rewards=None, place="") -> None:
        """Add a group as it is: drawn completions fit already, and equal ones are two draws."""
        for ids in (prompt, *completions):
            self.tokens.frombytes(np.asarray(ids, np.int32).tobytes())
            self.offsets.append(len(self.tokens))
        self.first.append(len(self.offsets) - 1)
        self.places += place.encode() + b"\n" * bool(place)
        self.ended += bytes([False, *ended])
        self.rewards.extend([math.nan, *(rewards or [math.nan] * len(completions))])

    def add_text(self, text: np.ndarray, last: bool = False, place: str = "") -> None:
        """Add running text in blocks, in each of which every token is predicted once, after its
        predecessor. What fills no block waits for more text, unless this is the last."""
        text, step = np.concatenate([self.text, text]), self.block_size - 1
        stop = len(text) - 1 if last else (len(text) - 1) // step * step
        for start in range(0, stop, step):
            block = text[start : start + step + 1]
            self.add(block[:1], [block[1:]], ended=False, place=place)
        self.text = text[stop:].copy()  # a view would keep the whole text alive

    def groups(self) -> Groups:
        """Views of what was collected, no copies: nothing can be added any more."""
        return Groups(
            tokens=np.frombuffer(self.tokens, np.int32),
            offsets=np.frombuffer(self.offsets, np.int64),
            first=np.frombuffer(self.first, np.int64),
            ended=np.frombuffer(self.ended, np.bool_),
            rewards=np.frombuffer(self.rewards, np.float64),
            eot=self.eot,
            places=bytes(self.places),
        )


def encode(encoding: tiktoken.Encoding, text: str) -> np.ndarray:
    """encode_ordinary as an int32 array: a tenth of a list's memory. Raises InputError where
    tiktoken gives up, as over a million spaces before a word."""
    try:
        try:
            return encoding.encode_to_numpy(text, disallowed_special=()).view(np.int32)
        except UnicodeEncodeError:  # half a surrogate pair, replaced as encode_ordinary does
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            return encoding.encode_to_numpy(text, disallowed_special=()).view(np.int32)
    except ValueError as error:
        said = f"the encoding {encoding.name} cannot take a text of {len(text):,} characters"
        raise InputError(f"{said}: {error}") from error


def read_groups(
    paths: list, encoding: tiktoken.Encoding, block_size: int, use: str = "preference"
) -> tuple[Groups, Report]:
    """All usable rows of the files as groups, in file order, and what was left out.

    use: `preference` (pairs, or completions with rewards), `sft` (K = 1: the completion, the
    chosen, or the one with the highest reward; running text in blocks), `prompt` (K = 0). Raises
    InputError for a file or row that cannot be read, or if nothing is usable.
    """
    if block_size < 2:
        raise InputError(f"block_size must be at least 2, got {block_size}")
    report = Report()
    builder = Builder(block_size, encoding.eot_token, report)

    def ids(text: str) -> np.ndarray:  # in this thread: two pass the GIL around for nothing
        return encode(encoding, text)

    for place, row in read_files(paths, use, report):
        with one_sentence(place, InputError):
            best = [row.completions[best_of(row)]] if use == "sft" else row.completions
            ys = [] if use == "prompt" else [ids(text) for text in best]
            if row.prompt is None:
                builder.add_text(np.append(ys[0], np.int32(encoding.eot_token)), place=place)
            else:
                rewards = row.rewards if use == "preference" else None
                builder.add(ids(row.prompt), ys, rewards, place=place)
    builder.add_text(np.empty(0, np.int32), last=True, place="the end of all texts")
    if len(builder.first) == 1:
        names = ", ".join(map(str, paths))
        raise InputError(f"{names}: nothing usable ({report})")
    return builder.groups(), report


def set_targets(groups: Groups, beta_r: float = 1.0, label_smoothing: float = 0.0) -> None:
    """Fill groups.log_target: the label's for pairs, the rewards' for the others. Softmaxed here
    once, so that no loss has to look whether it is finite."""
    groups.log_target, pair = np.zeros(len(groups.rewards)), torch.from_numpy(groups.is_pair())
    for ids in np.array_split(np.arange(len(groups)), 1 + len(groups) // 8192):  # bounds memory
        segment, mask = groups.grid(ids)
        rewards = torch.from_numpy(groups.rewards[segment])
        target = exo.reward_target(rewards, beta_r, torch.from_numpy(mask))
        target[pair[ids], :2] = exo.preference_target(label_smoothing)
        groups.log_target[segment[mask]] = target.numpy()[mask]


# ------------------------------------------------------------------------------
# Batches


class Batch(NamedTuple):
    """B groups as model.Scorer reads them: prefixes (prompt[:-1]) and completions, both padded on
    the right."""

    prefix: torch.Tensor  # (B, P) token ids; P may be 0
    prefix_len: torch.Tensor  # (B,) how many of them are real
    idx: torch.Tensor  # (B, K, T) what completions read: [prompt[-1]] + completion
    targets: torch.Tensor  # (B, K, T) what they predict: completion + [end of text]; -1: not scored
    scored: torch.Tensor  # (S,) which of the B*K*T are scored; rounded up with one that is not
    mask: torch.Tensor  # (B, K) bool: True where a completion exists
    segment: torch.Tensor  # (B, K) its row in arrays kept beside the Groups (0 where absent)
    log_target: torch.Tensor  # (B, K) log p, 0 where absent or not set
    ref_logps: torch.Tensor  # (B, K) log sft, 0 where absent or not asked for

    def to(self, device, dtype=None, non_blocking: bool = False) -> "Batch":
        """dtype: of the numbers among them, which are float64 (None: stay it)."""
        kinds = (dtype if x.is_floating_point() else None for x in self)
        moved = zip(self, kinds, strict=True)
        return Batch(*(x.to(device, kind, non_blocking=non_blocking) for x, kind in moved))

    def lengths(self) -> torch.Tensor:
        """(B, K) scored tokens of each completion, its end of text among them."""
        return (self.targets >= 0).sum(dim=-1)

    def n_tokens(self) -> int:
        """Tokens that are read, padding aside."""
        return int(self.prefix_len.sum() + self.lengths().sum())


def collate(groups: Groups, ids: np.ndarray, round_to: int = 1) -> Batch:
    """The groups with these ids as one batch. round_to: P, T and S become multiples of it, so that
    a compiled step or a GPU's allocator meets few shapes."""

    def rounded(n: int) -> int:
        return -(-n // round_to) * round_to

    ids = np.asarray(ids)
    segment, mask = groups.grid(ids)
    prompt, end = groups.first[ids], groups.offsets[1:]  # views: a step costs what it reads
    length = np.where(mask, end[segment] - groups.offsets[segment], 0)  # (B, K)
    n_scored = np.where(mask, length + groups.ended[segment], 0)  # (B, K)
    prefix_len = end[prompt] - groups.offsets[prompt] - 1
    P, T = rounded(int(prefix_len.max())), rounded(max(int(n_scored.max()), 1))
    completion = padded(groups, segment, length, T)  # (B, K, T)
    last = np.broadcast_to(groups.tokens[end[prompt] - 1][:, None, None], (*mask.shape, 1))
    scored = np.arange(T) < n_scored[..., None]
    is_word = np.arange(T) < length[..., None]
    cells = np.flatnonzero(scored)
    spare = rounded(len(cells)) - len(cells)  # where all cells are scored, it is 0
    arrays = {
        "prefix": padded(groups, prompt, prefix_len, P),
        "prefix_len": prefix_len,
        "idx": np.concatenate([last, completion[..., :-1]], axis=-1),
        "targets": np.where(is_word, completion, np.where(scored, groups.eot, -1)),
        "scored": np.append(cells, np.full(spare, scored.argmin())),
        "mask": mask,
        "segment": segment,
        "log_target": beside(groups.log_target, segment, mask),
        "ref_logps": beside(groups.ref_logps, segment, mask),
    }
    return Batch(**{name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()})


def padded(groups: Groups, segment: np.ndarray, length: np.ndarray, width: int) -> np.ndarray:
    """The first `length` tokens of each segment (...), int64 (..., width), 0 where padding."""
    column = np.arange(width)
    where = np.minimum(groups.offsets[segment][..., None] + column, len(groups.tokens) - 1)
    return np.where(column < length[..., None], groups.tokens[where], 0).astype(np.int64)


def beside(values: np.ndarray | None, segment: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(B, K) of what is kept for each completion (M,); 0 where there is none."""
    return np.zeros(mask.shape) if values is None else np.where(mask, values[segment], 0.0)


def epoch_batches(groups: Groups, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The group ids of each batch of one epoch: shuffled, but with groups of similar size together.

    Within shuffled pools of 64 batches groups are sorted by size and cut into batches, and the
    batches are shuffled. It depends on (seed, epoch) alone, so a resumed run needs only its step
    number.
    """
    rng = np.random.default_rng([seed, epoch])
    order, sizes = rng.permutation(len(groups)), groups.sizes()
    batches = []
    for start in range(0, len(order), 64 * batch_size):
        pool = order[start : start + 64 * batch_size]
        pool = pool[np.argsort(sizes[pool], kind="stable")]
        batches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


class Epochs:
    """Batches of these groups, one epoch after the other: `batch(i)` are the groups of the i-th."""

    def __init__(self, groups: Groups, batch_size: int, seed: int):
        self.groups, self.batch_size, self.seed = groups, batch_size, seed
        self.n_batches = math.ceil(len(groups) / batch_size)
        self.epoch, self.batches = -1, []  # the one that was asked for last

    def batch(self, i: int) -> np.ndarray:
        epoch, place = divmod(i, self.n_batches)
        if self.epoch != epoch:
            self.epoch = epoch
            self.batches = epoch_batches(self.groups, self.batch_size, self.seed, epoch)
        return self.batches[place]

    def first(self, n: int) -> list[np.ndarray]:
        """The first n batches, or all of the first epoch."""
        return [self.batch(i) for i in range(min(n, self.n_batches))]


def evenly_spaced(n: int, at_most: int) -> np.ndarray:
    """Up to `at_most` of the numbers below n, the first and the last among them."""
    return np.unique(np.linspace(0, n - 1, min(n, at_most)).round().astype(int))
