"""
From rows to batches: rows become groups, cutting by property, collate against a loop over tokens.
What files and rows may be is tested in test_rows.py.
"""

import itertools
import math
import tracemalloc

import numpy as np
import pytest
import tiktoken
import torch
from conftest import lines, often, one_batch, pack, save
from hypothesis import example, given
from hypothesis import strategies as st

import data
from data import Builder, Epochs, InputError, Report, collate, epoch_batches, read_groups

ENC = data.byte_encoding()
EOT = 256


def ids(text: str) -> list[int]:
    """The byte encoding, by hand."""
    return list(text.encode())


def texts(groups) -> list:
    """Groups -> [(prompt, [completion, ...]), ...] as text."""
    decode = ENC.decode
    return [
        (decode(groups.prompt(g)), [decode(c) for c in groups.completions(g)])
        for g in range(len(groups))
    ]


def read(path, use="preference", block_size=4096):
    return read_groups([path], ENC, block_size, use)


# ------------------------------------------------------------------------------
# Tokenizers


@given(st.text())
@example("a" * 100_000)
@example("\r\n\x00\u2028\u0085 \t" * 50)
@example("👩‍👩‍👧é\u0301" * 40)
@example("<|endoftext|>")
@often
def test_byte_encoding_round_trips_any_text_as_its_bytes(text):
    """Guards a pattern that skips characters (a newline, say) or merges that are not bytes."""
    text = text.encode("utf-8", "replace").decode()
    assert ENC.encode_ordinary(text) == ids(text)
    assert ENC.decode(ids(text)) == text


def test_an_encoding_is_named_bytes_or_module_and_function():
    """Of bytes end-of-text is the 257th."""
    assert (ENC.n_vocab, ENC.eot_token, ENC.name) == (257, EOT, "bytes")
    assert data.get_encoding("bytes").decode([65, EOT]) == "A<|endoftext|>"
    own = data.get_encoding("conftest:merging_encoding")
    assert own.encode_ordinary("xab") == [120, 256]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpt7", "unknown encoding 'gpt7': choose one of bytes, .*gpt2"),
        ("no_such_module:make", "--encoding no_such_module:make: "),
        ("math:no_such_function", "--encoding math:no_such_function: "),
        ("math:pi", "--encoding math:pi is no function, but of type float"),
        ("math:", "--encoding math:: "),
        (":make", "--encoding :make: "),
    ],
)
def test_an_encoding_that_is_not_there_is_an_input_error(name, message):
    with pytest.raises(InputError, match=message):
        data.get_encoding(name)


@pytest.mark.parametrize(
    "error", [ConnectionError("page\nafter page"), ValueError("Hash mismatch")]
)
def test_a_vocabulary_that_cannot_be_downloaded_names_both_remedies(error, monkeypatch):
    """Offline, tiktoken shows a page of urllib3; a damaged cache shows a hash mismatch."""

    def fail(name):
        raise error

    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    with pytest.raises(InputError) as caught:
        data.get_encoding("gpt2")
    message = str(caught.value)
    for part in ("'gpt2'", "TIKTOKEN_CACHE_DIR", "--encoding bytes", type(error).__name__):
        assert part in message
    assert "\n" not in message


# ------------------------------------------------------------------------------
# Rows become groups


def test_rewards_stay_beside_their_completions_and_k_may_differ(tmp_path):
    """Equal texts may repeat while two differ; ints and exponents are numbers; chosen first."""
    rows = (
        {"prompt": "p", "completions": ["a", "b", "a"], "rewards": [1, -2.5, 1e3]},
        {"prompt": "q", "chosen": "x", "rejected": "yy"},
        {"prompt": "", "completions": ["c", "d"], "rewards": [0, 0.25]},
    )
    groups, report = read(save(tmp_path, lines(*rows)))
    expected = [("p", ["a", "b", "a"]), ("q", ["x", "yy"]), ("<|endoftext|>", ["c", "d"])]
    assert texts(groups) == expected
    assert groups.is_pair().tolist() == [False, True, False]
    assert groups.is_pair().dtype == bool
    nan = math.nan
    rewards = [nan, 1, -2.5, 1000, nan, nan, nan, nan, 0, 0.25]
    np.testing.assert_array_equal(groups.rewards, rewards)
    assert groups.ended.tolist() == [False, *[True] * 3, False, True, True, False, True, True]
    assert groups.sizes().tolist() == [1 + 3 * 1, 1 + 2 * 2, 1 + 2 * 1]  # prompts count once
    assert len(groups) == 3
    assert str(report) == "3 of 3 rows usable"


ONE, PAIR = {"prompt": "p", "completion": "c"}, {"prompt": "q", "chosen": "x", "rejected": "y"}
REWARDED = {"prompt": "r", "completions": ["a", "b", "c"], "rewards": [-1, 2, 0]}


@pytest.mark.parametrize(
    ("use", "rows", "expected"),
    [
        ("sft", [ONE, PAIR, REWARDED], [("p", ["c"]), ("q", ["x"]), ("r", ["b"])]),
        ("prompt", [ONE, PAIR, REWARDED], [("p", []), ("q", []), ("r", [])]),
        ("prompt", [{"prompt": "p"}, {"prompt": ""}], [("p", []), ("<|endoftext|>", [])]),
        # JSON may hold half a surrogate pair, which is no UTF-8: one odd row must not stop a file
        ("preference", [PAIR | {"chosen": "a\ud83d"}], [("q", ["a\ufffd", "y"])]),
        ("prompt", [{"prompt": "\ud800"}], [("\ufffd", [])]),
    ],
)
def test_what_each_use_reads_of_each_kind_of_row(use, rows, expected, tmp_path):
    """To imitate: completions, the chosen, the best rewarded."""
    groups, report = read(save(tmp_path, lines(*rows)), use)
    assert texts(groups) == expected
    assert groups.ended.tolist() == [e for _, ys in expected for e in (False, *[True] * len(ys))]
    assert report.rows == len(rows)
    batch = one_batch(groups)
    assert batch.mask.sum() == sum(len(ys) for _, ys in expected)
    assert (len(batch.scored) == 0) == (use == "prompt")


def test_running_text_is_ended_and_special_tokens_in_it_are_text(tmp_path):
    """A .txt file is one text. Whoever writes a data file must not be able to end a text."""
    poem, evil = "Two\nlines é\n", "a<|endoftext|>b"
    paths = [save(tmp_path, poem, "poem.txt"), save(tmp_path, lines({"text": evil}))]
    groups, report = read_groups(paths, ENC, 4096, "sft")
    assert groups.tokens.tolist() == [EOT, *ids(poem), EOT, *ids(evil), EOT]
    assert groups.ended.tolist() == [False, False]
    assert str(report) == "2 of 2 rows usable"


SAME = lines({"prompt": "p", "chosen": "a", "rejected": "a"})
EMPTY = lines({"prompt": "p", "completion": ""})


@pytest.mark.parametrize(
    ("name", "content", "use", "why"),
    [
        ("a.jsonl", SAME, "preference", "fewer than two distinct completions"),
        ("a.txt", "", "sft", "an empty completion"),
        ("a.txt", " \n", "sft", "an empty completion"),
        ("a.jsonl", EMPTY, "sft", "an empty completion"),
    ],
)
def test_nothing_usable_is_an_error_with_the_reasons(name, content, use, why, tmp_path):
    path = save(tmp_path, content, name)
    with pytest.raises(InputError) as error:
        read(path, use)
    assert str(error.value) == f"{path}: nothing usable (0 of 1 rows usable; not: 1 {why})"


# ------------------------------------------------------------------------------
# Cutting

token = st.integers(0, EOT - 1)


@given(
    st.integers(2, 12),
    st.lists(token, max_size=20),
    st.lists(st.lists(token, min_size=1, max_size=20), min_size=1, max_size=4),
)
@often
def test_cutting_keeps_all_that_fits_and_never_exceeds_block_size(block_size, prompt, completions):
    """Prompts lose their beginning, completions their end and with it the end-of-text; nothing is
    cut while there is room; the prompt keeps at least half, completions the other half."""
    report = Report()
    builder = Builder(block_size, EOT, report)
    if not builder.add(prompt, completions):
        assert len(completions) > 1
        assert len({tuple(c[: block_size - block_size // 2]) for c in completions}) == 1
        assert len(builder.groups()) == 0
        assert report.unusable == {"identical within block_size": 1}
        assert report.cut_prompts == report.cut_completions == 0
        return
    groups = builder.groups()
    prompt, kept, cut = prompt or [EOT], groups.prompt(0), groups.completions(0)
    assert len(cut) == 1 or len({*map(tuple, cut)}) > 1
    assert len(kept) >= 1
    assert kept == prompt[len(prompt) - len(kept) :]
    assert len(kept) >= min(len(prompt), block_size // 2)
    longest = max(map(len, completions))
    if len(kept) < len(prompt):
        assert len(kept) + min(longest, block_size - block_size // 2) == block_size
    for a, b, ended in zip(cut, completions, groups.ended[1:], strict=True):
        assert a == b[: len(a)]
        assert len(kept) + len(a) <= block_size
        assert len(a) == len(b) or len(kept) + len(a) == block_size
        assert len(a) >= min(len(b), block_size - block_size // 2)
        assert ended == (len(a) == len(b))
    if len(prompt) + longest <= block_size:
        assert (kept, cut) == (prompt, completions)
    assert report.cut_prompts == (kept != prompt)
    assert report.cut_completions == sum(a != b for a, b in zip(cut, completions, strict=True))


@pytest.mark.parametrize("use", ["preference", "sft"])
def test_block_size_1_leaves_no_room_for_prompt_and_completion(use, tmp_path):
    """A prompt of one token and a completion of one are two: at block_size 1 a slice of [-0:] would
    keep the whole prompt, and running text would be cut into blocks of 0."""
    row = {"text": "abc"} if use == "sft" else {"prompt": "pqr", "chosen": "a", "rejected": "b"}
    path = save(tmp_path, lines(row))
    with pytest.raises(InputError, match="block_size"):
        read(path, use, block_size=1)


def test_a_prompt_alone_may_fill_block_size(tmp_path):
    path = save(tmp_path, lines({"prompt": "12345678"}, {"prompt": "0123456789"}))
    groups, report = read(path, "prompt", block_size=8)
    assert texts(groups) == [("12345678", []), ("23456789", [])]
    assert report.cut_prompts == 1


@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=4), st.integers(2, 9))
@often
def test_running_text_predicts_each_token_once_after_its_true_predecessor(tmp_path, docs, size):
    """Guards blocks that drop their first token, overlap, or continue after the wrong one."""
    docs = [doc.encode("utf-8", "replace").decode() for doc in docs]
    groups, report = read(save(tmp_path, lines(*({"text": d} for d in docs))), "sft", size)
    stream = [EOT, *itertools.chain.from_iterable([*ids(doc), EOT] for doc in docs)]
    predicted = []
    for g in range(len(groups)):
        (block,) = groups.completions(g)
        assert groups.prompt(g) == [stream[len(predicted)]]
        assert len(block) == size - 1 or g == len(groups) - 1
        predicted += block
    assert predicted == stream[1:]
    assert not groups.ended.any()
    assert report.cut_prompts == report.cut_completions == 0


# ------------------------------------------------------------------------------
# Batches


def check_collate(raw: list, chosen: list[int], round_to: int) -> None:
    """Against what a batch holds, one token at a time."""
    groups = pack(raw, EOT)
    number = np.arange(len(groups.ended))
    groups.log_target, groups.ref_logps = number + 0.5, number + 0.25
    batch = collate(groups, np.array(chosen), round_to)

    def rounded(n):
        return math.ceil(n / round_to) * round_to

    picked = [raw[g] for g in chosen]
    K = max(1, *(len(c) for _, c in picked))
    P = rounded(max(len(p) - 1 for p, _ in picked))
    T = rounded(max(1, *(len(c) + e for _, cs in picked for c, e in [*cs, ([], False)])))
    starts = np.cumsum([0] + [1 + len(c) for _, c in raw])
    prefix, idx, targets, segment = [], [], [], []
    for g, (prompt, completions) in zip(chosen, picked, strict=True):
        prefix += prompt[:-1] + [0] * (P - len(prompt) + 1)
        for k in range(K):
            text, ended = completions[k] if k < len(completions) else ([], False)
            predicted = text + [EOT] * ended
            idx += ([prompt[-1], *text] + [0] * T)[:T]
            targets += predicted + [-1] * (T - len(predicted))
            segment.append(int(starts[g]) + 1 + k if k < len(completions) else 0)
    scored = [i for i, target in enumerate(targets) if target >= 0]
    assert (batch.prefix.shape, batch.mask.shape) == ((len(picked), P), (len(picked), K))
    assert batch.idx.shape == batch.targets.shape == (len(picked), K, T)
    for found, expected in (
        (batch.prefix, prefix),
        (batch.prefix_len, [len(p) - 1 for p, _ in picked]),
        (batch.idx, idx),
        (batch.targets, targets),
        (batch.scored[: len(scored)], scored),
        (batch.mask, [s > 0 for s in segment]),
        (batch.segment, segment),
        (batch.log_target, [s + 0.5 if s else 0 for s in segment]),
        (batch.ref_logps, [s + 0.25 if s else 0 for s in segment]),
        (batch.lengths(), [T - targets[i : i + T].count(-1) for i in range(0, len(targets), T)]),
    ):
        assert found.flatten().tolist() == expected
    assert len(batch.scored) == rounded(len(scored))
    assert all(targets[i] == -1 for i in batch.scored[len(scored) :])  # nobody's log-probs
    assert batch.n_tokens() == sum(len(p) - 1 for p, _ in picked) + len(scored)
    assert {x.dtype for x in batch} == {torch.int64, torch.bool, torch.float64}
    assert all(x.is_contiguous() for x in batch)


completion = st.tuples(st.lists(token, max_size=5), st.booleans())
group = st.tuples(st.lists(token, min_size=1, max_size=6), st.lists(completion, max_size=4))


@given(st.data(), st.lists(group, min_size=1, max_size=5), st.sampled_from([1, 4, 8]))
@often
def test_collate_equals_a_loop_over_tokens(draw, raw, round_to):
    """Any groups of a file, in any order, with any K (0 too), cut or whole."""
    chosen = draw.draw(st.permutations(range(len(raw))))
    chosen = chosen[: draw.draw(st.integers(1, len(raw)))]
    check_collate(raw, chosen, round_to)


@pytest.mark.parametrize("round_to", [1, 8])
def test_collate_at_sizes_that_are_multiples_already(round_to):
    """A longest completion of exactly 8 scored tokens needs no ninth place, and a batch whose every
    place is scored no spare one."""
    for length in (6, 7, 8):
        raw = [([1] * 9, [([2] * length, True), ([3], False)]), ([4], [([5] * length, False)])]
        check_collate(raw, [1, 0], round_to)
    check_collate([([1] * 9, [([2] * 7, True), ([3] * 8, False)])], [0], round_to)


def test_collate_leaves_groups_alone_and_a_batch_moves_whole():
    """Numbers take the dtype that is asked for (a device may know no float64), ids keep theirs."""
    groups = pack([([1, 2], [[3], ([4, 5], False)])])
    arrays = groups.tokens, groups.offsets, groups.first, groups.ended
    before = [np.copy(a) for a in arrays]
    batch = one_batch(groups, 8)
    for x in batch:
        x.zero_()
    assert all(np.array_equal(a, b) for a, b in zip(before, arrays, strict=True))
    for moved, number in (
        (batch.to("meta"), torch.float64),
        (batch.to("meta", torch.half), torch.half),
    ):
        assert {x.device.type for x in moved} == {"meta"}
        assert moved.log_target.dtype == moved.ref_logps.dtype == number
        assert [x.dtype for x in moved[:-2]] == [x.dtype for x in batch[:-2]]


def test_targets_are_the_labels_for_pairs_and_the_rewards_for_the_others(tmp_path):
    """A reward of 0 is a reward; prompts keep 0."""
    groups, _ = read(save(tmp_path, lines(PAIR, REWARDED, PAIR)))
    data.set_targets(groups, 2.0, 0.1)
    total = sum(math.exp(r / 2) for r in REWARDED["rewards"])
    label = [0, math.log(0.9), math.log(0.1)]
    expected = [*label, 0, *(r / 2 - math.log(total) for r in REWARDED["rewards"]), *label]
    np.testing.assert_allclose(groups.log_target, expected, rtol=1e-12)


def of_sizes(sizes) -> data.Groups:
    return pack([([1] * (int(n) - 1), [[2]]) for n in sizes])


@pytest.mark.parametrize(("n", "batch_size"), [(1, 4), (4, 4), (10, 3), (1000, 4), (513, 2)])
def test_an_epoch_has_every_group_exactly_once(n, batch_size):
    groups = of_sizes(np.random.default_rng(0).integers(2, 50, n))
    for epoch in range(3):
        batches = epoch_batches(groups, batch_size, 1, epoch)
        assert sorted(np.concatenate(batches).tolist()) == list(range(n))
        assert len(batches) == math.ceil(n / batch_size)
        assert max(map(len, batches)) <= batch_size


def test_an_epochs_order_depends_on_seed_and_epoch_alone():
    """A resumed run rebuilds the order from these two numbers."""
    groups = of_sizes(np.random.default_rng(0).integers(2, 50, 300))

    def order(seed, epoch):
        return [batch.tolist() for batch in epoch_batches(groups, 4, seed, epoch)]

    first = order(1, 0)
    np.random.seed(5)
    torch.manual_seed(5)
    assert order(1, 0) == first
    others = [order(1, 1), order(2, 0), order(0, 1), order(0, 2)]
    assert all(sorted(map(sorted, o)) != sorted(map(sorted, first)) for o in others)  # other mates
    assert others[0] != others[2]  # (1, 1) against (0, 1): seed and epoch are not just added
    assert others[1] != others[0]  # (2, 0) against (1, 1)


def test_batches_hold_groups_of_similar_size_and_come_in_no_order_of_size():
    """Padding is what this saves; batches sorted by size would teach the model short texts
    first."""
    sizes = np.random.default_rng(0).integers(2, 200, 2000)
    batches = epoch_batches(of_sizes(sizes), 8, 3, 0)
    spread = np.mean([np.ptp(sizes[b]) for b in batches])
    shuffled = np.random.default_rng(1).permutation(2000).reshape(-1, 8)
    assert spread < 0.05 * np.mean([np.ptp(sizes[b]) for b in shuffled])
    means = np.array([sizes[b].mean() for b in batches])
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.25
    assert 0.3 < np.mean(np.diff(means) > 0) < 0.7


def test_batches_are_asked_for_by_number_in_any_order():
    """As a resumed run does; an epoch's last batch may be short."""
    groups = of_sizes(np.random.default_rng(0).integers(2, 50, 10))
    flat = [b.tolist() for epoch in range(3) for b in epoch_batches(groups, 4, 7, epoch)]
    epochs = data.Epochs(groups, 4, 7)
    assert epochs.n_batches == 3
    for i in (7, 0, 8, 3, 2):
        assert epochs.batch(i).tolist() == flat[i]
    for n, held in ((2, flat[:2]), (99, flat[:3])):
        assert [b.tolist() for b in epochs.first(n)] == held


def test_reading_and_batching_hold_six_bytes_a_token(tmp_path):
    """4 for its id; the rest is what a pair of 150 tokens costs beside them, copies included."""
    text = "a stone in the river "
    pair = {"prompt": text * 4, "chosen": text * 2}
    path = save(tmp_path, lines(*(pair | {"rejected": f"{i}{text}"} for i in range(20_000))))
    tracemalloc.start()
    groups, _ = read_groups([path], ENC, 256)
    data.set_targets(groups)
    groups.ref_logps = np.zeros(len(groups.ended))
    Epochs(groups, 8, seed=0).batch(0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= 6 * len(groups.tokens)


def test_a_batch_costs_what_it_reads_however_many_groups_there_are():
    """Guards sizes computed of all segments for each batch: a quarter more time a step for a
    million pairs."""
    n = 10**6
    groups = data.Groups(
        tokens=np.ones(3 * n, np.int32),
        offsets=np.arange(3 * n + 1),
        first=np.arange(0, 3 * n + 1, 3),
        ended=np.ones(3 * n, np.bool_),
        rewards=np.full(3 * n, math.nan),
        eot=EOT,
    )
    tracemalloc.start()
    batch = collate(groups, np.array([5, 999_999]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert batch.mask.all()
    assert peak < 100_000
