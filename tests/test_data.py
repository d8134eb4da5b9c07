"""
From files to batches: every row format against the text it must become, every error against the
sentence it must print, cutting and packing by property, collate against a loop over tokens.
"""

import gzip
import itertools
import json
import math

import numpy as np
import pytest
import tiktoken
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data
from data import Builder, InputError, Report, collate, epoch_batches, read_groups

ENC = data.byte_encoding()
EOT = 256
often = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def ids(text: str) -> list[int]:
    """The byte encoding, by hand."""
    return list(text.encode())


def lines(*rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def save(folder, content: str | bytes, name: str = "rows.jsonl"):
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def texts(groups) -> list:
    """Groups -> [(prompt, [completion, ...]), ...] as text."""
    decode = ENC.decode
    return [
        (decode(groups.prompt(g)), [decode(c) for c in groups.completions(g)])
        for g in range(len(groups))
    ]


def read(path, use="preference", block_size=4096):
    return read_groups([path], ENC, block_size, use)


def refusal(path, use="preference") -> str:
    """The one sentence a bad file gets."""
    with pytest.raises(InputError) as error:
        read(path, use)
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    return message


# ------------------------------------------------------------------------------
# Tokenizers


@given(st.text())
@often
def test_byte_encoding_round_trips_any_text_as_its_bytes(text):
    """Guards a pattern that skips characters (a newline, say) or merges that are not bytes."""
    text = text.encode("utf-8", "replace").decode()
    assert ENC.encode_ordinary(text) == ids(text)
    assert ENC.decode(ENC.encode_ordinary(text)) == text


def test_byte_encoding_round_trips_long_and_awkward_texts():
    for text in (
        "a" * 100_000,
        "\r\n\x00\u2028\u0085 \t" * 50,
        "👩‍👩‍👧é\u0301" * 40,
        "<|endoftext|>",
    ):
        assert ENC.encode_ordinary(text) == ids(text)
        assert ENC.decode(ids(text)) == text


def test_byte_encoding_has_257_tokens_and_the_last_is_end_of_text():
    assert (ENC.n_vocab, ENC.eot_token, ENC.name) == (257, EOT, "bytes")
    assert data.get_encoding("bytes").decode([65, EOT]) == "A<|endoftext|>"


def test_an_encoding_of_ones_own_is_named_module_and_function(tmp_path, monkeypatch):
    """Joined as ids, never as text: with the merge "ab", the prompt "xa" and the completion "b"
    stay three tokens."""
    save(
        tmp_path,
        "import tiktoken\n"
        "def make():\n"
        "    ranks = {bytes([b]): b for b in range(256)} | {b'ab': 256}\n"
        "    special = {'<|endoftext|>': 257}\n"
        "    return tiktoken.Encoding('own', pat_str=r'(?s:.+)', mergeable_ranks=ranks,\n"
        "                             special_tokens=special)\n",
        "own_encoding_for_test.py",
    )
    monkeypatch.syspath_prepend(tmp_path)
    own = data.get_encoding("own_encoding_for_test:make")
    assert own.encode_ordinary("xab") == [120, 256]
    path = save(tmp_path, lines({"prompt": "xa", "chosen": "b", "rejected": "ab"}))
    groups, _ = read_groups([path], own, 64)
    assert groups.prompt(0) == [120, 97]
    assert groups.completions(0) == [[98], [256]]
    assert groups.eot == 257


def test_unknown_encoding_lists_the_known_ones():
    with pytest.raises(InputError, match=r"unknown encoding 'gpt7': choose one of bytes, .*gpt2"):
        data.get_encoding("gpt7")


@pytest.mark.parametrize("name", ["no_such_module:make", "math:no_such_function", "math:", ":make"])
def test_an_encoding_function_that_cannot_be_found_is_an_input_error(name):
    with pytest.raises(InputError, match=f"--encoding {name}: "):
        data.get_encoding(name)


def test_a_vocabulary_that_cannot_be_downloaded_names_both_remedies(monkeypatch):
    """Offline, tiktoken shows a page of urllib3; a damaged cache shows a hash mismatch."""
    requests = pytest.importorskip("requests")
    errors = [
        requests.exceptions.ConnectionError("page\nafter page"),
        OSError("no space left"),
        ValueError("Hash mismatch"),
    ]
    for error in errors:

        def fail(name, error=error):
            raise error

        monkeypatch.setattr(tiktoken, "get_encoding", fail)
        with pytest.raises(InputError) as caught:
            data.get_encoding("gpt2")
        message = str(caught.value)
        for part in ("'gpt2'", "TIKTOKEN_CACHE_DIR", "--encoding bytes", type(error).__name__):
            assert part in message
        assert "\n" not in message


# ------------------------------------------------------------------------------
# Row formats

HH = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye\n\nAssistant:"
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\n"
)
ALPACA_PLAIN = (
    "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\nAdd\n\n### Response:\n"
)


def says(role, content):
    return {"role": role, "content": content}


TALK = [says("system", "Be"), says("user", "Hi"), says("assistant", "Yo"), says("user", "?")]
TALK_TEXT = "\n\nSystem: Be\n\nHuman: Hi\n\nAssistant: Yo\n\nHuman: ?\n\nAssistant:"
PAIRS = {
    "plain": ({"prompt": "Q:", "chosen": " a", "rejected": " b"}, "Q:", [" a", " b"]),
    "empty prompt": ({"prompt": "", "chosen": "a", "rejected": "b"}, "<|endoftext|>", ["a", "b"]),
    "hh": ({"chosen": HH + " Good", "rejected": HH + " Bad"}, HH, [" Good", " Bad"]),
    "hh messages": (
        {"chosen": [*TALK, says("assistant", "1")], "rejected": [*TALK, says("assistant", "2")]},
        TALK_TEXT,
        [" 1", " 2"],
    ),
    "messages": (
        {
            "prompt": TALK,
            "chosen": [says("assistant", "1"), says("user", "u"), says("assistant", "3")],
            "rejected": [says("assistant", "2")],
        },
        TALK_TEXT,
        [" 1\n\nHuman: u\n\nAssistant: 3", " 2"],
    ),
    "messages and strings": (
        {"prompt": TALK, "chosen": " 1", "rejected": [says("assistant", "2")]},
        TALK_TEXT,
        [" 1", " 2"],
    ),
    "instruction with input": (
        {"instruction": "Add", "input": "1 2", "chosen": "3", "rejected": "4"},
        ALPACA_INPUT,
        ["3", "4"],
    ),
    "instruction, empty input": (
        {"instruction": "Add", "input": "", "chosen": "3", "rejected": "4"},
        ALPACA_PLAIN,
        ["3", "4"],
    ),
    "instruction, null input": (
        {"instruction": "Add", "input": None, "chosen": "3", "rejected": "4"},
        ALPACA_PLAIN,
        ["3", "4"],
    ),
    "instruction without input": (
        {"instruction": "Add", "chosen": "3", "rejected": "4"},
        ALPACA_PLAIN,
        ["3", "4"],
    ),
    "unicode, braces, other fields": (
        {"prompt": "{é}\n", "chosen": "{0} 👍", "rejected": "%s", "score": 1},
        "{é}\n",
        ["{0} 👍", "%s"],
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_each_spelling_of_a_pair_becomes_prompt_chosen_rejected(name, tmp_path):
    """Chosen first, in every spelling. Guards swapped labels and lost or doubled separators."""
    row, prompt, replies = PAIRS[name]
    groups, report = read(save(tmp_path, lines(row)))
    assert texts(groups) == [(prompt, replies)]
    assert groups.is_pair().tolist() == [True]
    assert groups.ended.tolist() == [False, True, True]
    assert str(report) == "1 of 1 rows usable"


def test_rewards_stay_beside_their_completions_and_k_may_differ(tmp_path):
    """Equal texts may repeat while two differ; ints and exponents are numbers."""
    path = save(
        tmp_path,
        lines(
            {"prompt": "p", "completions": ["a", "b", "a"], "rewards": [1, -2.5, 1e3]},
            {"prompt": "q", "chosen": "x", "rejected": "y"},
            {"prompt": TALK, "completions": ["c", "d"], "rewards": [0, 0.25]},
        ),
    )
    groups, _ = read(path)
    assert texts(groups) == [("p", ["a", "b", "a"]), ("q", ["x", "y"]), (TALK_TEXT, ["c", "d"])]
    assert groups.is_pair().tolist() == [False, True, False]
    nan = math.nan
    expected = [nan, 1, -2.5, 1000, nan, nan, nan, nan, 0, 0.25]
    np.testing.assert_array_equal(groups.rewards, expected)
    assert groups.sizes().tolist() == [4, 3, len(TALK_TEXT) + 2]
    assert len(groups) == 3


def test_sft_reads_completions_the_chosen_and_the_best_rewarded(tmp_path):
    path = save(
        tmp_path,
        lines(
            {"prompt": "p", "completion": "c"},
            {"prompt": TALK, "completion": [says("assistant", "m")]},
            {"prompt": "q", "chosen": "good", "rejected": "bad"},
            {"prompt": "r", "completions": ["a", "b", "c"], "rewards": [-1, 2, 0]},
        ),
    )
    groups, _ = read(path, "sft")
    expected = [("p", ["c"]), (TALK_TEXT, [" m"]), ("q", ["good"]), ("r", ["b"])]
    assert texts(groups) == expected
    assert groups.ended.tolist() == [False, True] * 4


def test_prompts_are_read_from_every_row_that_has_one(tmp_path):
    path = save(
        tmp_path,
        lines(
            {"prompt": "p"},
            {"prompt": ""},
            {"prompt": TALK},
            {"prompt": "q", "completion": "c"},
            {"chosen": HH + "1", "rejected": HH + "2"},
            {"prompt": "r", "completions": ["a", "b"], "rewards": [0, 1]},
        ),
    )
    groups, _ = read(path, "prompt")
    prompts = ["p", "<|endoftext|>", TALK_TEXT, "q", HH, "r"]
    assert texts(groups) == [(p, []) for p in prompts]
    batch = collate(groups, np.arange(len(groups)))
    assert not batch.mask.any()
    assert not batch.scored.any()


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".json"])
def test_each_kind_of_file_holds_the_same_rows(ending, tmp_path):
    """Blank lines, Windows line ends and a last line without one are no rows of their own."""
    rows = [row for row, _, _ in PAIRS.values()]
    content = "\n  \r\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    if ending == ".json":
        content = json.dumps(rows, indent=1).encode()
    if ending.endswith("gz"):
        content = gzip.compress(content)
    groups, report = read(save(tmp_path, content, "rows" + ending))
    assert texts(groups) == [(prompt, replies) for _, prompt, replies in PAIRS.values()]
    assert report.rows == len(rows)


def test_several_files_are_read_in_order(tmp_path):
    a = save(tmp_path, lines({"prompt": "1", "completion": "x"}), "a.jsonl")
    b = save(tmp_path, json.dumps([{"prompt": "2", "completion": "y"}]), "b.json")
    groups, report = read_groups([b, str(a)], ENC, 64, "sft")
    assert texts(groups) == [("2", ["y"]), ("1", ["x"])]
    assert report.rows == 2


def test_more_rows_than_one_batch_of_the_arrays_keep_their_order(tmp_path):
    """Whatever their number, they are joined in order."""
    n = 5000
    rows = ({"prompt": f"p{i}", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(n))
    groups, _ = read(save(tmp_path, lines(*rows)))
    assert texts(groups) == [(f"p{i}", [f"c{i}", f"r{i}"]) for i in range(n)]


def test_a_txt_file_is_one_text_and_end_of_text_follows_it(tmp_path):
    groups, report = read(save(tmp_path, "Two\nlines é\n", "poem.txt"), "sft")
    assert groups.prompt(0) == [EOT]
    assert groups.completions(0) == [[*ids("Two\nlines é\n"), EOT]]
    assert groups.ended.tolist() == [False, False]
    assert str(report) == "1 of 1 rows usable"


def test_special_tokens_written_in_data_stay_plain_text(tmp_path):
    """Whoever writes a data file must not be able to end a text, or to crash tiktoken."""
    evil = "a<|endoftext|>b"
    rows = {"prompt": evil, "chosen": evil + "1", "rejected": evil + "2"}
    groups, _ = read(save(tmp_path, lines(rows)))
    assert EOT not in groups.tokens
    assert groups.prompt(0) == ids(evil)
    groups, _ = read(save(tmp_path, lines({"text": evil})), "sft")
    assert groups.tokens.tolist() == [EOT, *ids(evil), EOT]


def test_half_a_surrogate_pair_becomes_a_replacement_character(tmp_path):
    """JSON may hold "\\ud800", which is no UTF-8: one odd row must not stop a file."""
    row = '{"prompt": "\\ud800", "chosen": "a\\ud83d", "rejected": "b"}'
    groups, _ = read(save(tmp_path, row))
    assert texts(groups) == [("\ufffd", ["a\ufffd", "b"])]


# ------------------------------------------------------------------------------
# Errors: one sentence, with the place

OK_ROW = lines({"prompt": "p", "chosen": "a", "rejected": "b"})
BAD_ROWS = {
    "3": "a row must be a JSON object, got int",
    "null": "a row must be a JSON object, got NoneType",
    '["prompt"]': "a row must be a JSON object, got list",
    "{}": "fields [] fit none of the formats {prompt, chosen, rejected}",
    '{"question": "q", "answer": "a"}': "fields ['answer', 'question'] fit none of the formats",
    '{"prompt": "p", "chosen": "c"}': (
        "field 'rejected' is missing; the row has ['chosen', 'prompt']"
    ),
    '{"prompt": "p", "rejected": "c"}': "field 'chosen' is missing",
    '{"prompt": 5, "chosen": "c", "rejected": "d"}': "field 'prompt' must be a string, got 5",
    '{"prompt": null, "chosen": "c", "rejected": "d"}': "'prompt' must be a string, got null",
    '{"prompt": "p", "chosen": null, "rejected": "d"}': "'chosen' must be a string, got null",
    '{"chosen": "no turns", "rejected": "\\n\\nAssistant: x"}': (
        'field \'chosen\' has no "\\n\\nAssistant:" turn, and there is no field "prompt"'
    ),
    '{"chosen": "\\n\\nAssistant: x"}': "field 'rejected' is missing",
    '{"instruction": "i", "input": 4, "chosen": "c", "rejected": "d"}': (
        "field 'input' must be a string, got 4"
    ),
    '{"instruction": ["i"], "chosen": "c", "rejected": "d"}': (
        "field 'instruction' must be a string, got [\"i\"]"
    ),
    '{"prompt": [{"role": "robot", "content": "x"}], "chosen": "c", "rejected": "d"}': (
        "field 'prompt': a message needs a role (user, assistant, system) and a content, both "
        'strings, got {"role": "robot", "content": "x"}'
    ),
    '{"prompt": ["hi"], "chosen": "c", "rejected": "d"}': "a message needs a role",
    '{"prompt": [{"role": "user"}], "chosen": "c", "rejected": "d"}': "a message needs a role",
    '{"prompt": "p", "chosen": [{"role": "user", "content": "x"}], "rejected": "d"}': (
        "field 'chosen' must begin with an assistant message"
    ),
    '{"prompt": "p", "completions": ["a", "b"]}': (
        "expected preference pairs or completions with rewards"
    ),
    '{"prompt": "p", "rewards": [1, 2]}': "field 'completions' must be a list, got null",
    '{"prompt": "p", "completions": "ab", "rewards": [1, 2]}': (
        "field 'completions' must be a list, got \"ab\""
    ),
    '{"prompt": "p", "completions": ["a", "b"], "rewards": [1]}': "2 completions but 1 rewards",
    '{"prompt": "p", "completions": ["a", "b"], "rewards": [1, 2, 3]}': (
        "2 completions but 3 rewards"
    ),
    '{"prompt": "p", "completions": ["a", 1], "rewards": [1, 2]}': (
        "a completion must be a string, got 1"
    ),
    '{"completions": ["a", "b"], "rewards": [1, 2]}': "field 'prompt' is missing",
    '{"completion": "c"}': "field 'prompt' is missing",
    '{"prompt": "p"}': "expected preference pairs or completions with rewards, got fields",
    '{"text": "t"}': "expected preference pairs or completions with rewards, got fields ['text']",
}
for _bad in ("NaN", "Infinity", "-Infinity", "1e999", "true", '"1"', "null", "[1]"):
    _shown = {"1e999": "Infinity"}.get(_bad, _bad)
    BAD_ROWS[f'{{"prompt": "p", "completions": ["a", "b"], "rewards": [1, {_bad}]}}'] = (
        f"a reward must be a finite number, got {_shown}"
    )


@pytest.mark.parametrize("row", BAD_ROWS)
def test_a_malformed_row_says_why_with_file_and_line(row, tmp_path):
    """On the third line, after a blank one: line numbers count every line of the file."""
    path = save(tmp_path, OK_ROW + "\n" + row + "\n" + OK_ROW)
    message = refusal(path)
    assert message.startswith(f"{path}:3: ")
    assert BAD_ROWS[row] in message


def test_a_malformed_row_of_a_json_list_is_named_by_its_number(tmp_path):
    path = save(tmp_path, json.dumps([json.loads(OK_ROW), 3]), "rows.json")
    assert refusal(path) == f"{path}: row 2: a row must be a JSON object, got int"


def test_a_long_value_is_shortened_in_its_message(tmp_path):
    message = refusal(save(tmp_path, lines({"prompt": ["x" * 1000]})), "prompt")
    assert "x" * 30 in message
    assert len(message) < 300


def test_rows_of_another_use_are_refused_not_skipped(tmp_path):
    path = save(tmp_path, lines({"prompt": "p"}))
    assert refusal(path, "sft") == (
        f"{path}:1: expected text, or prompts with completions, got fields ['prompt']"
    )
    path = save(tmp_path, lines({"text": "t"}))
    assert refusal(path, "prompt") == f"{path}:1: expected prompts, got fields ['text']"


def test_a_missing_file_and_a_folder_cannot_be_read(tmp_path):
    path = tmp_path / "none.jsonl"
    assert refusal(path) == f"cannot read {path}: No such file or directory"
    (tmp_path / "folder.json").mkdir()
    assert refusal(tmp_path / "folder.json").startswith(f"cannot read {tmp_path}")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b""),
        ("a.jsonl", b"\n \n"),
        ("a.json", b"[]"),
        ("a.jsonl.gz", b""),
        ("a.jsonl.gz", gzip.compress(b"\n")),
    ],
)
def test_an_empty_file_is_an_error_even_beside_a_full_one(name, content, tmp_path):
    path = save(tmp_path, content, name)
    assert refusal(path) == f"{path}: the file is empty"
    with pytest.raises(InputError, match="the file is empty"):
        read_groups([save(tmp_path, OK_ROW, "full.jsonl"), path], ENC, 64)


def test_broken_json_names_file_line_and_column(tmp_path):
    path = save(tmp_path, OK_ROW + "\n" + '{"prompt" "p"}\n')
    assert refusal(path) == f"{path}:3: broken JSON, Expecting ':' delimiter (column 11)"
    path = save(tmp_path, '[\n{"prompt": "p"},\n{"prompt" "q"}]', "rows.json")
    assert refusal(path) == f"{path}:3: broken JSON, Expecting ':' delimiter (column 11)"
    path = save(tmp_path, "", "rows.json")
    assert refusal(path).startswith(f"{path}:1: broken JSON, ")


@pytest.mark.parametrize("line", ["[" * 100_000, "1" * 5000])
def test_json_that_python_refuses_to_parse_names_file_and_line(line, tmp_path):
    """Nested too deeply, or a number of too many digits: neither is a JSONDecodeError."""
    path = save(tmp_path, OK_ROW + line + "\n")
    assert refusal(path).startswith(f"{path}:2: ")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.jsonl.gz"])
def test_text_that_is_not_utf8_is_an_error(name, tmp_path):
    content = '{"text": "é"}\n'.encode("latin-1")
    path = save(tmp_path, gzip.compress(content) if name.endswith("gz") else content, name)
    assert refusal(path, "sft") == f"{path}: line 1 or later is not UTF-8 text"


def test_a_damaged_gzip_file_is_an_error_however_it_is_damaged(tmp_path):
    """Each raises another exception: no gzip at all, cut short, a wrong checksum, and bytes inside
    the compressed stream overwritten (zlib.error, which is no OSError)."""
    rows = [{"prompt": f"p{i * i}", "chosen": f"a{i}", "rejected": "b"} for i in range(300)]
    good = gzip.compress(lines(*rows).encode())
    cases = {
        "no gzip": b"plain text",
        "cut": good[: len(good) // 2],
        "checksum": good[:-8] + b"\0\0\0\0" + good[-4:],
        "overwritten": good[:100] + b"\xff" * 50 + good[150:],
    }
    for name, content in cases.items():
        path = save(tmp_path, content, "rows.jsonl.gz")
        assert refusal(path).startswith(f"{path}: damaged gzip file ("), name


def test_a_json_file_that_is_not_a_list_is_an_error(tmp_path):
    path = save(tmp_path, OK_ROW, "rows.json")
    assert refusal(path) == f"{path}: a .json file must hold a list of rows"


@pytest.mark.parametrize("name", ["rows.csv", "rows", "rows.gz", "rows.jsonl.bz2"])
def test_an_unknown_extension_names_the_known_ones(name, tmp_path):
    path = save(tmp_path, OK_ROW, name)
    known = ".jsonl, .jsonl.gz, .json, .txt"
    assert refusal(path) == f"{path}: a data file must end in one of {known}"


def test_unusable_rows_are_counted_by_reason_and_the_rest_is_kept(tmp_path):
    """Never silently dropped: the report's numbers add up to the rows of the file."""
    same = {"prompt": "p", "chosen": "a", "rejected": "a"}
    path = save(
        tmp_path,
        OK_ROW
        + lines(
            same,
            same,
            {"chosen": HH + "1", "rejected": "x" + HH + "2"},
            {"prompt": "p", "chosen": "a", "rejected": " \n"},
            {"prompt": "p", "completions": ["a"], "rewards": [1]},
            {"prompt": "p", "completions": [], "rewards": []},
            {"prompt": "p", "chosen": "x" * 40 + "1", "rejected": "x" * 40 + "2"},
        ),
    )
    groups, report = read(path, block_size=32)
    assert texts(groups) == [("p", ["a", "b"])]
    assert report.rows == 8
    assert report.unusable == {
        "fewer than two distinct completions": 4,
        "dialogues differ before the last Assistant turn": 1,
        "an empty completion": 1,
        "identical within block_size": 1,
    }
    assert str(report) == (
        "1 of 8 rows usable; not: 4 fewer than two distinct completions, "
        "1 dialogues differ before the last Assistant turn, 1 an empty completion, "
        "1 identical within block_size"
    )
    assert (report.cut_prompts, report.cut_completions) == (0, 0)


@pytest.mark.parametrize(
    ("name", "content", "use", "why"),
    [
        (
            "a.jsonl",
            lines({"prompt": "p", "chosen": "a", "rejected": "a"}),
            "preference",
            "0 of 1 rows usable; not: 1 fewer than two distinct completions",
        ),
        ("a.txt", "", "sft", "0 of 1 rows usable; not: 1 an empty completion"),
        ("a.txt", " \n", "sft", "0 of 1 rows usable; not: 1 an empty completion"),
        (
            "a.jsonl",
            lines({"prompt": "p", "completion": ""}),
            "sft",
            "0 of 1 rows usable; not: 1 an empty completion",
        ),
    ],
)
def test_nothing_usable_is_an_error_with_the_reasons(name, content, use, why, tmp_path):
    path = save(tmp_path, content, name)
    assert refusal(path, use) == f"{path}: nothing usable ({why})"


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


@pytest.mark.parametrize(
    ("prompt", "completions", "kept", "cut", "ended"),
    [
        ("abcd", ["wxyz", "w"], "abcd", ["wxyz", "w"], [1, 1]),  # 4 + 4 = 8: fits exactly
        ("abcde", ["wxyz", "w"], "bcde", ["wxyz", "w"], [1, 1]),  # one too long: the prompt gives
        ("abcd", ["vwxyz", "w"], "abcd", ["vwxy", "w"], [0, 1]),  # half is the prompt's to keep
        ("abc", ["vwxyz", "w"], "abc", ["vwxyz", "w"], [1, 1]),
        ("abc", ["uvwxyz", "w"], "abc", ["uvwxy", "w"], [0, 1]),
        ("abcdefghij", ["yz", "z"], "efghij", ["yz", "z"], [1, 1]),  # room that nobody needs
        ("abcdefghij", ["uvwxyz", "z"], "ghij", ["uvwx", "z"], [0, 1]),
    ],
)
def test_cutting_at_the_exact_boundaries_of_block_size_8(
    prompt, completions, kept, cut, ended, tmp_path
):
    row = {"prompt": prompt, "chosen": completions[0], "rejected": completions[1]}
    groups, report = read(save(tmp_path, lines(row)), block_size=8)
    assert texts(groups) == [(kept, cut)]
    assert groups.ended.tolist() == [False, *map(bool, ended)]
    assert report.cut_prompts == (kept != prompt)
    assert report.cut_completions == ended.count(0)


def test_the_report_counts_what_was_cut(tmp_path):
    row = {"prompt": "abcdefghij", "chosen": "uvwxyz", "rejected": "vwxyz1"}
    _, report = read(save(tmp_path, lines(row, row)), block_size=8)
    assert str(report) == (
        "2 of 2 rows usable; cut to block_size: 2 prompts from the left, "
        "4 completions from the right"
    )


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


def pack(raw: list) -> data.Groups:
    """[(prompt, [(completion, ended), ...]), ...] -> Groups, by a plain loop."""
    tokens, offsets, first, ended = [], [0], [0], []
    for prompt, completions in raw:
        for text, end in [(prompt, False), *completions]:
            tokens += text
            offsets.append(len(tokens))
            ended.append(end)
        first.append(len(ended))
    rewards = np.full(len(ended), np.nan)
    arrays = np.array(tokens, np.int32), np.array(offsets), np.array(first), np.array(ended)
    return data.Groups(*arrays, rewards, EOT)


def check_collate(raw: list, chosen: list[int], round_to: int) -> None:
    """Twin of collate: one token at a time, into nested lists."""
    batch = collate(pack(raw), np.array(chosen), round_to)

    def rounded(n):
        return math.ceil(n / round_to) * round_to

    picked = [raw[g] for g in chosen]
    B, K = len(picked), max(1, *(len(c) for _, c in picked))
    P = rounded(max(len(p) - 1 for p, _ in picked))
    T = rounded(1 + max([len(c) + e for _, cs in picked for c, e in cs], default=0))
    idx, pos, targets, cell_of, scored = [], [], [], [], set()
    for b, (prompt, _) in enumerate(picked):
        for t, token in enumerate(prompt[:-1]):
            idx.append(token)
            pos.append(t)
            cell_of.append(b * P + t)
    n_prefix = len(idx)
    for b, (prompt, completions) in enumerate(picked):
        for k, (text, ended) in enumerate(completions):
            after = text + [EOT] * ended
            for t, (token, target) in enumerate(zip([prompt[-1], *text], after, strict=False)):
                idx.append(token)
                pos.append(len(prompt) - 1 + t)
                targets.append(target)
                cell_of.append(B * P + (b * K + k) * T + t)
                scored.add((b, k, t))
    n, L = len(idx), rounded(len(idx) + 1)

    assert (batch.prefix_cells.shape, batch.cells.shape) == ((B, P), (B, K, T))
    assert batch.idx.shape == batch.pos.shape == batch.home.shape == (L,)
    assert batch.targets.shape == (L - n_prefix,)
    assert batch.idx[:n].tolist() == idx
    assert batch.pos[:n].tolist() == pos
    assert batch.targets[: n - n_prefix].tolist() == targets
    assert batch.prefix_len.tolist() == [len(p) - 1 for p, _ in picked]
    assert {tuple(i) for i in batch.scored.nonzero().tolist()} == scored
    assert batch.mask.tolist() == [[k < len(c) for k in range(K)] for _, c in picked]

    # the contract of padding: cells and home undo each other, pads show the spare token, spare
    # tokens live in the last cell, and the last cell is padding
    everything = B * P + B * K * T
    cells = torch.cat([batch.prefix_cells.flatten(), batch.cells.flatten()]).tolist()
    expected = [L - 1] * everything
    for i, cell in enumerate(cell_of):
        expected[cell] = i
    assert cells == expected
    assert batch.home[:n].tolist() == cell_of
    assert batch.home[n:].tolist() == [everything - 1] * (L - n)
    assert everything - 1 not in cell_of
    spare = torch.cat([batch.idx[n:], batch.targets[n - n_prefix :], batch.pos[n:]])
    assert ((spare >= 0) & (spare <= EOT)).all()
    assert not batch.pos[n:].any()  # a position that exists in every model

    starts = np.cumsum([0] + [1 + len(c) for _, c in raw])
    rows = [[int(starts[g]) + 1 + k if k < len(raw[g][1]) else 0 for k in range(K)] for g in chosen]
    assert batch.segment.tolist() == rows
    kinds = (torch.int64, torch.bool, torch.float64)
    assert all(x.dtype in kinds and x.is_contiguous() for x in batch)


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
    """A longest completion of exactly 8 - 1 scored tokens leaves just the one padded cell that the
    contract needs; 8 need another 8 cells."""
    for length in (6, 7, 8):
        raw = [([1] * 9, [([2] * length, True), ([3], False)]), ([4], [([5] * length, False)])]
        check_collate(raw, [1, 0], round_to)


def test_collate_stores_a_shared_prompt_once():
    raw = [(list(range(50)), [([1], True)] * 8)]
    batch = collate(pack(raw), np.arange(1))
    assert len(batch.idx) == 49 + 8 * 2 + 1


def test_collate_leaves_groups_alone_and_a_batch_moves_whole():
    groups = pack([([1, 2], [([3], True), ([4, 5], False)])])
    before = [np.copy(a) for a in (groups.tokens, groups.offsets, groups.first, groups.ended)]
    batch = collate(groups, np.arange(1), 8)
    for x in batch:
        x.zero_()
    after = (groups.tokens, groups.offsets, groups.first, groups.ended)
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    assert {x.device.type for x in batch.to("meta")} == {"meta"}


@given(st.lists(st.integers(0, 4), max_size=8))
@often
def test_ragged_arange_counts_up_in_every_run(lengths):
    expected = [i for n in lengths for i in range(n)]
    assert data.ragged_arange(np.array(lengths, np.int64)).tolist() == expected


def of_sizes(sizes) -> data.Groups:
    return pack([([1] * (int(n) - 1), [([2], True)]) for n in sizes])


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


def test_sizes_and_is_pair_of_a_mixed_file(tmp_path):
    """Prompt tokens are counted once; a reward of 0 is a reward."""
    path = save(
        tmp_path,
        lines(
            {"prompt": "abc", "completions": ["x", "yy", "zzz"], "rewards": [0, 0, 0]},
            {"prompt": "", "chosen": "ab", "rejected": "c"},
        ),
    )
    groups, _ = read(path)
    assert groups.sizes().tolist() == [9, 4]
    assert groups.is_pair().tolist() == [False, True]
    assert groups.is_pair().dtype == bool
