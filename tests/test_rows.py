"""
Files of rows: every format against the text it must become, every mistake against the sentence it
must print, every row that nobody can use against the reason it is counted under; files that are
written whole or not at all.
"""

import gzip
import json
import re

import pytest
from conftest import lines, save

import infra.rows as files
from infra.rows import InputError, Report, Row, best_of, read_files


def read(path, use="preference") -> tuple[list[Row], Report]:
    report = Report()
    return [row for _, row in read_files([path], use, report)], report


def refusal(path, use="preference") -> str:
    """The one sentence a bad file gets."""
    with pytest.raises(InputError) as error:
        read(path, use)
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    return message


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


def answers(content):
    return [says("assistant", content)]


TALK = [says("system", "Be"), says("user", "Hi"), says("assistant", "Yo"), says("user", "?")]
TALK_TEXT = "\n\nSystem: Be\n\nHuman: Hi\n\nAssistant: Yo\n\nHuman: ?\n\nAssistant:"
ADD = {"instruction": "Add", "chosen": "3", "rejected": "4"}
PAIRS = {
    "plain": ({"prompt": "Q:", "chosen": " a", "rejected": " b"}, "Q:", [" a", " b"]),
    "empty prompt": ({"prompt": "", "chosen": "a", "rejected": "b"}, "", ["a", "b"]),
    "hh": ({"chosen": HH + " Good", "rejected": HH + " Bad"}, HH, [" Good", " Bad"]),
    "hh messages": (
        {"chosen": TALK + answers("1"), "rejected": TALK + answers("2")},
        TALK_TEXT,
        [" 1", " 2"],
    ),
    "messages": (
        {
            "prompt": TALK,
            "chosen": [*answers("1"), says("user", "u"), *answers("3")],
            "rejected": answers("2"),
        },
        TALK_TEXT,
        [" 1\n\nHuman: u\n\nAssistant: 3", " 2"],
    ),
    "messages and strings": (
        {"prompt": TALK, "chosen": " 1", "rejected": answers("2")},
        TALK_TEXT,
        [" 1", " 2"],
    ),
    "instruction with input": (ADD | {"input": "1 2"}, ALPACA_INPUT, ["3", "4"]),
    "instruction, empty input": (ADD | {"input": ""}, ALPACA_PLAIN, ["3", "4"]),
    "instruction, null input": (ADD | {"input": None}, ALPACA_PLAIN, ["3", "4"]),
    "instruction without input": (ADD, ALPACA_PLAIN, ["3", "4"]),
    "instruction, messages": (ADD | {"chosen": answers("3")}, ALPACA_PLAIN, [" 3", "4"]),
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
    rows, report = read(save(tmp_path, lines(row)))
    assert rows == [Row("pair", prompt, replies)]
    assert str(report) == "1 of 1 rows usable"


RATED = {"prompt": "p", "completions": ["a", "b", "a"], "rewards": [1, -2.5, 1e3]}
DRAWN = {"prompt": TALK, "completions": ["c", ""]}
OTHERS = {
    "rewards": (RATED, Row("rewards", "p", ["a", "b", "a"], [1.0, -2.5, 1000.0])),
    "samples": (DRAWN, Row("samples", TALK_TEXT, ["c", ""])),
    "sft": ({"prompt": TALK, "completion": answers("m")}, Row("sft", TALK_TEXT, [" m"])),
    "text": ({"text": "t"}, Row("text", None, ["t"])),
    "prompt": ({"prompt": TALK}, Row("prompt", TALK_TEXT, [])),
    "empty prompt": ({"prompt": ""}, Row("prompt", "", [])),
    "pair": (PAIRS["hh"][0], Row("pair", *PAIRS["hh"][1:])),
}


@pytest.mark.parametrize(
    ("use", "names"),
    [
        ("preference", ["pair", "rewards"]),
        ("sft", ["pair", "rewards", "sft", "text"]),
        ("score", ["pair", "rewards", "sft", "text", "samples"]),
        ("prompt", ["pair", "rewards", "sft", "samples", "prompt", "empty prompt"]),
    ],
)
def test_each_use_takes_its_formats_and_refuses_the_others(use, names, tmp_path):
    """Rewards: equal texts may repeat while two differ; ints and exponents are numbers."""
    path = save(tmp_path, lines(*(OTHERS[name][0] for name in names)))
    assert read(path, use)[0] == [OTHERS[name][1] for name in names]
    for name in OTHERS.keys() - names:
        fields = sorted(OTHERS[name][0])
        message = refusal(save(tmp_path, lines(OTHERS[name][0])), use)
        assert re.match(rf"{path}:1: expected .*, got fields {re.escape(str(fields))}$", message)


def test_sft_imitates_the_chosen_and_the_best_rewarded():
    assert best_of(OTHERS["rewards"][1]) == 2
    assert best_of(OTHERS["pair"][1]) == best_of(OTHERS["text"][1]) == 0


# ------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".json"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_each_kind_of_file_holds_the_same_rows(ending, mark, tmp_path):
    """Blank lines, Windows line ends, Windows' byte order mark and a last line without an end are
    no rows of their own."""
    rows = [row for row, _, _ in PAIRS.values()]
    content = "\n  \r\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    if ending == ".json":
        content = json.dumps(rows, indent=1).encode()
    content = mark + content
    if ending.endswith("gz"):
        content = gzip.compress(content)
    rows, report = read(save(tmp_path, content, "rows" + ending))
    assert rows == [Row("pair", prompt, replies) for _, prompt, replies in PAIRS.values()]
    assert report.rows == len(rows)


def test_several_files_are_read_in_order_and_each_row_knows_its_place(tmp_path):
    a = save(tmp_path, "\n" + lines({"prompt": "1", "completion": "x"}), "a.jsonl")
    b = save(tmp_path, json.dumps([{"prompt": "2", "completion": "y"}]), "b.json")
    c = save(tmp_path, "\ufeffTwo\r\nlines é\n", "c.txt")
    report = Report()
    assert list(read_files([b, str(a), c], "sft", report)) == [
        (f"{b}: row 1", Row("sft", "2", ["y"])),
        (f"{a}:2", Row("sft", "1", ["x"])),
        (str(c), Row("text", None, ["Two\nlines é\n"])),
    ]
    assert str(report) == "3 of 3 rows usable"


# ------------------------------------------------------------------------------
# Mistakes: one sentence, with the place

OK_ROW = lines({"prompt": "p", "chosen": "a", "rejected": "b"})
EXPECTED = "expected preference pairs or completions with rewards, got fields "
NO_TURN = r"chosen and rejected need a turn '\n\nAssistant:', or a prompt beside them"
MESSAGE = "must be a string, or messages with a role (user, assistant, system) and a content"
BAD_ROWS = {
    "3": "3 fit none of the formats {prompt, chosen, rejected}",
    "null": "null fit none of the formats",
    '["prompt"]': '["prompt"] fit none of the formats',
    "{}": "fields [] fit none of the formats {prompt, chosen, rejected}",
    '{"question": "q", "answer": "a"}': "fields ['answer', 'question'] fit none of the formats",
    '{"prompt": "p", "chosen": "c"}': EXPECTED + "['chosen', 'prompt']",
    '{"prompt": "p", "rejected": "c"}': EXPECTED + "['prompt', 'rejected']",
    '{"prompt": 5, "chosen": "c", "rejected": "d"}': f"field 'prompt' {MESSAGE}: 'int' object",
    '{"prompt": null, "chosen": "c", "rejected": "d"}': f"'prompt' {MESSAGE}: 'NoneType' object",
    '{"prompt": "p", "chosen": null, "rejected": "d"}': f"'chosen' {MESSAGE}: 'NoneType' object",
    '{"chosen": "no turns", "rejected": "\\n\\nAssistant: x"}': NO_TURN,
    '{"chosen": "\\n\\nAssistant: x"}': "fields ['chosen'] fit none of the formats",
    '{"instruction": "i", "input": 4, "chosen": "c", "rejected": "d"}': f"field 'input' {MESSAGE}",
    '{"instruction": ["i"], "chosen": "c", "rejected": "d"}': f"field 'instruction' {MESSAGE}",
    '{"prompt": [{"role": "robot", "content": "x"}], "chosen": "c", "rejected": "d"}': (
        f"field 'prompt' {MESSAGE}: 'robot'"
    ),
    '{"prompt": ["hi"], "chosen": "c", "rejected": "d"}': f"field 'prompt' {MESSAGE}",
    '{"prompt": [{"role": "user"}], "chosen": "c", "rejected": "d"}': f"{MESSAGE}: 'content'",
    '{"prompt": "p", "chosen": [{"role": "user", "content": "x"}], "rejected": "d"}': (
        "field 'chosen' must begin with an assistant message"
    ),
    '{"prompt": "p", "completions": ["a", "b"]}': EXPECTED + "['completions', 'prompt']",
    '{"prompt": "p", "rewards": [1, 2]}': "fields ['prompt', 'rewards'] fit none of the formats",
    '{"prompt": "p", "completions": "ab", "rewards": [1, 2]}': (
        "fit none of the formats {prompt, chosen, rejected}"
    ),
    '{"prompt": "p", "completions": ["a", "b"], "rewards": [1]}': (
        "rewards must be 2 finite numbers, got [1]"
    ),
    '{"prompt": "p", "completions": ["a", "b"], "rewards": [1, 2, 3]}': (
        "rewards must be 2 finite numbers, got [1, 2, 3]"
    ),
    '{"prompt": "p", "completions": ["a", "b"], "rewards": 2}': (
        "rewards must be 2 finite numbers, got 2"
    ),
    '{"prompt": "p", "completions": ["a", 1], "rewards": [1, 2]}': f"'completions' {MESSAGE}",
    '{"completions": ["a", "b"], "rewards": [1, 2]}': (
        "fields ['completions', 'rewards'] fit none of the formats"
    ),
    '{"completion": "c"}': "fields ['completion'] fit none of the formats",
    '{"prompt": "p"}': EXPECTED + "['prompt']",
    '{"text": "t"}': EXPECTED + "['text']",
}
for _bad in ("NaN", "Infinity", "-Infinity", "1e999", "true", '"1"', "null", "[1]"):
    _shown = {"1e999": "Infinity"}.get(_bad, _bad)
    BAD_ROWS[f'{{"prompt": "p", "completions": ["a", "b"], "rewards": [1, {_bad}]}}'] = (
        f"rewards must be 2 finite numbers, got [1, {_shown}]"
    )


@pytest.mark.parametrize("row", BAD_ROWS)
def test_a_malformed_row_says_why_with_file_and_line(row, tmp_path):
    """On the third line, after a blank one: line numbers count every line of the file."""
    path = save(tmp_path, OK_ROW + "\n" + row + "\n" + OK_ROW)
    message = refusal(path)
    assert message.startswith(f"{path}:3: ")
    assert BAD_ROWS[row] in message


@pytest.mark.parametrize(
    "row", [{"prompt": "p", "completions": ["a"], "rewards": ["x" * 1000]}, "x" * 1000]
)
def test_a_long_value_is_shortened_in_its_message(row, tmp_path):
    message = refusal(save(tmp_path, lines(row)), "prompt")
    assert "x" * 30 in message
    assert len(message) < 400


def broken(error: str, name: str = "rows.jsonl", line: str = ":3") -> tuple[str, str]:
    return name, rf"{name}{line}: broken JSON: {error}"


@pytest.mark.parametrize(
    ("content", "name", "said"),
    [
        ('{"prompt" "p"}\n', *broken(r"Expecting ':' delimiter: line 1 column 11")),
        ("[" * 100_000, *broken("maximum recursion depth exceeded")),
        ("1" * 5000, *broken(r"Exceeds the limit \(4300 digits\)")),
        ('{"text": "é"}\n'.encode("latin-1"), *broken("'utf-8' codec can't decode byte 0xe9")),
        ('[\n{"a": "p"},\n{"a" "q"}]', *broken(".*: line 3 column 6", "rows.json", "")),
        ("", *broken("Expecting value", "rows.json", "")),
        ("5", *broken("'int' object is not iterable", "rows.json", "")),
        ('{"prompt": "p"}', "rows.json", "rows.json: row 1: "),
        (json.dumps([json.loads(OK_ROW), 3]), "rows.json", "rows.json: row 2: 3 fit none of the"),
        ("é".encode("latin-1"), "rows.txt", "cannot read .*rows.txt: 'utf-8' codec"),
        ("é".encode("latin-1"), "rows.json", "rows.json: .*'utf-8' codec can't decode"),
        (b"plain text", "rows.jsonl.gz", "cannot read .*rows.jsonl.gz: Not a gzipped file"),
        (None, "none.jsonl", "cannot read .*none.jsonl: No such file or directory$"),
    ],
)
def test_a_damaged_or_foreign_file_is_named_with_its_line(content, name, said, tmp_path):
    """In a .jsonl on the third line: after a good one and a blank one."""
    if content is not None:
        content = content.encode() if isinstance(content, str) else content
        content = OK_ROW.encode() + b"\n" + content if name == "rows.jsonl" else content
        save(tmp_path, content, name)
    assert re.search(said, refusal(tmp_path / name))


def test_a_gzip_file_may_be_damaged_in_many_ways(tmp_path):
    """Each raises another exception: cut short, a wrong checksum, and bytes inside the compressed
    stream overwritten (zlib.error, which is no OSError)."""
    rows = [{"prompt": f"p{i * i}", "chosen": f"a{i}", "rejected": "b"} for i in range(300)]
    good = gzip.compress(lines(*rows).encode())
    cases = {
        "ended before": good[: len(good) // 2],
        "CRC check failed": good[:-8] + b"\0\0\0\0" + good[-4:],
        "decompressing": good[:100] + b"\xff" * 50 + good[150:],
    }
    for said, content in cases.items():
        path = save(tmp_path, content, "rows.jsonl.gz")
        message = refusal(path)
        assert message.startswith(f"cannot read {path}: ")
        assert said in message


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
        list(read_files([save(tmp_path, OK_ROW, "full.jsonl"), path], "preference", Report()))


@pytest.mark.parametrize("name", ["rows.csv", "rows", "rows.gz", "rows.jsonl.bz2"])
def test_an_unknown_extension_names_the_known_ones(name, tmp_path):
    path = save(tmp_path, OK_ROW, name)
    assert refusal(path) == f"{path}: a data file ends in .jsonl, .jsonl.gz, .json or .txt"


# ------------------------------------------------------------------------------
# Rows that are well-formed and useless

SAME = {"prompt": "p", "chosen": "a", "rejected": "a"}
APART = {"chosen": HH + "1", "rejected": "x" + HH + "2"}
BLANK = {"prompt": "p", "chosen": "a", "rejected": " \n"}


def rated(*completions, prompt="p") -> dict:
    rewards = list(range(len(completions)))
    return {"prompt": prompt, "completions": completions, "rewards": rewards}


@pytest.mark.parametrize(
    ("use", "rows", "reasons"),
    [
        (
            "preference",
            [OK_ROW, SAME, SAME, APART, BLANK, rated("a"), rated(), rated("", "a")],
            {
                "fewer than two distinct completions": 4,
                "dialogues differ before the last Assistant turn": 1,
                "an empty completion": 1,
            },
        ),
        (
            "sft",
            [OK_ROW, rated("", "a"), rated("a", " "), rated(), {"text": "\n"}, SAME, BLANK],
            {
                "an empty completion": 3,
                "no completions": 1,
                "fewer than two distinct completions": 1,
            },
        ),
        (
            "score",
            [OK_ROW, DRAWN, rated("", ""), rated(), {"prompt": "p", "completion": ""}],
            {"no completions": 1, "an empty completion": 1},
        ),
        (
            "prompt",
            [OK_ROW, SAME, BLANK, rated(), APART],
            {"dialogues differ before the last Assistant turn": 1},
        ),
    ],
)
def test_unusable_rows_are_counted_by_reason_and_the_rest_is_kept(use, rows, reasons, tmp_path):
    """Never silently dropped: the report's numbers add up to the rows of the file. A completion may
    be empty where it is one of several draws."""
    rows = [json.loads(OK_ROW) if row is OK_ROW else row for row in rows]
    kept, report = read(save(tmp_path, lines(*rows)), use)
    assert report.rows == len(rows) == len(kept) + sum(reasons.values())
    assert report.unusable == reasons
    counted = ", ".join(f"{n} {reason}" for reason, n in reasons.items())
    assert str(report) == f"{len(kept)} of {len(rows)} rows usable; not: {counted}"


def test_the_report_counts_what_was_cut():
    report = Report(rows=2, cut_prompts=2, cut_completions=4)
    cut = "2 prompts from the left, 4 completions from the right"
    assert report.cut() == cut
    assert str(report) == f"2 of 2 rows usable; cut to block_size: {cut}"


# ------------------------------------------------------------------------------
# Writing


def half_written(path):
    with files.replacing(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(ZeroDivisionError):
        half_written(path)
    assert files.read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_what_cannot_be_read_or_written_is_a_sentence(tmp_path):
    path = save(tmp_path, "[1]", "a.json")
    with pytest.raises(InputError, match=f"cannot read {path}: "):
        files.read_json(path)
    with pytest.raises(InputError, match=r"cannot write .*none/b: No such file or directory"):
        files.write_json(tmp_path / "none" / "b", 1)
    with pytest.raises(InputError, match=f"cannot make the folder {path}: File exists"):
        files.make_folder(path)
