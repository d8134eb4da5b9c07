"""
Files: rows read and checked, with what is wrong said in one sentence, and files written whole.

    .jsonl  .jsonl.gz  .json  .txt  ->  read_rows (place, JSON value)  ->  parse_row  ->  Row

A row that cannot be read says why, with file and line, and stops; one that is merely unusable (two
equal completions, nothing left to score) is counted by its reason and reported. Files are read row
by row, and no row may be longer than LONGEST, however small the .gz file that it comes out of; but
a .txt file is one row, and a .json file is parsed whole: they take memory as the file is long.
"""

import contextlib
import gzip
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

LONGEST = 2**24  # bytes of a line


class InputError(ValueError):
    """A user's mistake, said in one sentence. Commands print it and exit with 2."""


class one_sentence:
    """Whatever a damaged or foreign file makes its reader raise becomes an InputError of one line:
    what it is about, and the reason. (A class: contextlib's way costs a row 3 microseconds.)"""

    def __init__(self, about: str, errors=Exception):
        self.about, self.errors = about, errors

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if kind is not None and issubclass(kind, self.errors):
            why = getattr(error, "strerror", None) or str(error) or kind.__name__
            raise InputError(f"{self.about}: {' '.join(why.split())[:400]}") from error


class Row(NamedTuple):
    """A checked row. kind: `pair` (completions = chosen, rejected), `rewards`, `samples` (none
    yet), `sft`, `text` (running text, no prompt) or `prompt`."""

    kind: str
    prompt: str | None
    completions: list[str]
    rewards: list[float] | None = None


def parse_row(row: object) -> Row:
    """One JSON value -> Row. Raises InputError, which does not know file and line."""
    match row:
        case {"prompt": prompt, "chosen": chosen, "rejected": rejected}:
            replies = [text_of("chosen", chosen), text_of("rejected", rejected)]
            return Row("pair", text_of("prompt", prompt), replies)
        case {"instruction": _, "chosen": _, "rejected": _}:
            return parse_row(row | {"prompt": alpaca_prompt(row)})
        case {"chosen": _, "rejected": _}:
            return split_dialogues(row)
        case {"prompt": prompt, "completions": [*completions]}:
            texts = [text_of("completions", y) for y in completions]
            if "rewards" not in row:  # as sample.py writes them
                return Row("samples", text_of("prompt", prompt), texts)
            rewards = row["rewards"]
            fits = isinstance(rewards, list) and len(rewards) == len(texts)
            if not fits or not all(type(r) in (int, float) and abs(r) < 1e30 for r in rewards):
                got = json.dumps(rewards)[:50]
                raise InputError(f"rewards must be {len(texts)} finite numbers, got {got}")
            return Row("rewards", text_of("prompt", prompt), texts, list(map(float, rewards)))
        case {"prompt": prompt, "completion": completion}:
            return Row("sft", text_of("prompt", prompt), [text_of("completion", completion)])
        case {"text": text}:
            return Row("text", None, [text_of("text", text, whole=True)])
        case {"prompt": prompt} if not row.keys() & {"completions", "rewards"}:
            return Row("prompt", text_of("prompt", prompt), [])
    formats = (
        "{prompt, chosen, rejected}, {chosen, rejected}, {instruction, input, chosen, rejected}, "
        "{prompt, completions: [...], rewards: [...]}, {prompt, completion}, {text} or {prompt}"
    )
    got = f"fields {sorted(row)}" if isinstance(row, dict) else json.dumps(row)[:50]
    raise InputError(f"{got} fit none of the formats {formats}")


ASSISTANT = "\n\nAssistant:"
TURNS = {"user": "\n\nHuman:", "assistant": ASSISTANT, "system": "\n\nSystem:"}


def text_of(field: str, value: object, whole: bool = False) -> str:
    """Text as it is; messages {role, content} become turns as HH-RLHF writes dialogues: those of a
    prompt open the assistant's turn; others go on in it, unless they are a whole dialogue."""
    if isinstance(value, str):
        return value
    fits = f"a string, or messages with a role ({', '.join(TURNS)}) and a content"
    with one_sentence(f"field {field!r} must be {fits}", (KeyError, TypeError)):
        turns = "".join(TURNS[m["role"]] + " " + m["content"] for m in value)
    if whole or field == "prompt":
        return turns if whole else turns + ASSISTANT
    if not turns.startswith(ASSISTANT):
        raise InputError(f"field {field!r} must begin with an assistant message")
    return turns.removeprefix(ASSISTANT)


def split_dialogues(row: dict) -> Row:
    """HH-RLHF: two whole dialogues, which share everything up to the last reply; else the pair has
    no prompt."""
    texts = [text_of(name, row[name], whole=True) for name in ("chosen", "rejected")]
    heads, turns, replies = zip(*(text.rpartition(ASSISTANT) for text in texts), strict=True)
    if not all(turns):
        raise InputError(f"chosen and rejected need a turn {ASSISTANT!r}, or a prompt beside them")
    return Row("pair", heads[0] + ASSISTANT if heads[0] == heads[1] else None, list(replies))


def alpaca_prompt(row: dict) -> str:
    task = text_of("instruction", row["instruction"])
    given = text_of("input", row.get("input") or "")
    paired = ", paired with an input that provides further context" if given else ""
    given = f"### Input:\n{given}\n\n" if given else ""
    return (
        f"Below is an instruction that describes a task{paired}. Write a response that "
        "appropriately completes the request.\n\n"
        f"### Instruction:\n{task}\n\n{given}### Response:\n"
    )


WANTED = {  # kinds of rows that each use of a file accepts, and how the error names them
    "preference": ("pair rewards", "preference pairs or completions with rewards"),
    "sft": ("pair rewards sft text", "text, or prompts with a completion, a pair or rewards"),
    "score": ("pair rewards sft text samples", "text, or prompts with completions"),
    "prompt": ("pair rewards sft samples prompt", "prompts"),
}


@dataclass
class Report:
    """What reading did: rows seen, rows unusable by reason, groups shortened to fit block_size."""

    rows: int = 0
    unusable: Counter = field(default_factory=Counter)
    cut_prompts: int = 0
    cut_completions: int = 0

    def __str__(self) -> str:
        text = f"{self.rows - self.unusable.total()} of {self.rows} rows usable"
        if self.unusable:
            text += "; not: " + ", ".join(f"{n} {why}" for why, n in self.unusable.most_common())
        if self.cut_prompts or self.cut_completions:
            text += f"; cut to block_size: {self.cut()}"
        return text

    def cut(self) -> str:
        completions = f"{self.cut_completions} completions from the right"
        return f"{self.cut_prompts} prompts from the left, {completions}"


def read_files(paths: list, use: str, report: Report) -> Iterator[tuple[str, Row]]:
    """(place, Row) of every usable row of every file, for one `use` of WANTED; the report counts
    the rest."""
    kinds, wanted = WANTED[use]
    for path in paths:
        before = report.rows
        for place, value in read_rows(Path(path)):
            report.rows += 1
            with one_sentence(place, InputError):
                row = parse_row(value)
                if row.kind not in kinds.split():
                    raise InputError(f"expected {wanted}, got fields {sorted(value)}")
            if why := unusable(row, use):
                report.unusable[why] += 1
            else:
                yield place, row
        if report.rows == before:
            raise InputError(f"{path}: the file is empty")


def unusable(row: Row, use: str) -> str | None:
    """Why `use` finds nothing to learn from, or to score. A completion may be empty where it is one
    of several draws: the end of text is scored."""
    if row.kind == "pair" and row.prompt is None:
        return "dialogues differ before the last Assistant turn"
    if use == "prompt":
        return None
    if (row.kind == "pair" or use == "preference") and len(set(row.completions)) < 2:
        return "fewer than two distinct completions"
    if not row.completions:
        return "no completions"
    texts = row.completions if row.kind == "pair" else [row.completions[best_of(row)]]
    empty = not all(map(str.strip, texts)) and (use == "sft" or row.kind in ("pair", "sft", "text"))
    return "an empty completion" if empty else None


def best_of(row: Row) -> int:
    """The completion that sft imitates."""
    return row.rewards.index(max(row.rewards)) if row.rewards else 0


def read_rows(path: Path) -> Iterator[tuple[str, object]]:
    """(place, JSON value) for each row; place is file:line. Blank lines are skipped; a .json file
    is a list, its rows counted from 1; a .txt file is one {"text"}."""
    errors = (OSError, EOFError, zlib.error, UnicodeDecodeError, MemoryError)
    with one_sentence(f"cannot read {path}", errors):
        refuse_endless(path)
        if path.name.endswith((".jsonl", ".jsonl.gz")):
            with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
                for number, line in enumerate(iter(lambda: file.readline(LONGEST + 1), b""), 1):
                    if len(line) > LONGEST:
                        longest = f"{LONGEST >> 20} MiB"
                        raise InputError(f"{path}:{number}: the line is longer than {longest}")
                    if line := line.strip():
                        with one_sentence(f"{path}:{number}: broken JSON"):
                            row = json.loads(line)
                        yield f"{path}:{number}", row
        elif path.suffix == ".json":
            with one_sentence(f"{path}: broken JSON"):
                rows = list(json.loads(path.read_bytes()))
            yield from ((f"{path}: row {i}", row) for i, row in enumerate(rows, 1))
        elif path.suffix == ".txt":
            yield str(path), {"text": path.read_text(encoding="utf-8-sig")}
        else:
            raise InputError(f"{path}: a data file ends in .jsonl, .jsonl.gz, .json or .txt")


def refuse_endless(path: Path) -> None:
    """A FIFO waits for its writer, and a device never ends."""
    if path.exists() and not path.is_file():
        raise OSError("it is no regular file")


@contextlib.contextmanager
def replacing(path: Path):
    """A temporary path to write to, which takes the place of `path` only if the block succeeds: no
    file is ever half written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with one_sentence(f"cannot write {path}", OSError):
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def read_json(path: Path) -> dict:
    with one_sentence(f"cannot read {path}"):
        refuse_endless(path)
        return dict(json.loads(path.read_text(encoding="utf-8")))


def write_json(path: Path, value: object) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def make_folder(path: Path) -> None:
    with one_sentence(f"cannot make the folder {path}", OSError):
        path.mkdir(parents=True, exist_ok=True)
