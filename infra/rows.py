"""
Files: rows read and checked, with what is wrong said in one sentence, and files written whole.

    .jsonl  .jsonl.gz  .json  .txt  ->  read_rows (place, JSON value)  ->  parse_row  ->  Row

A row that cannot be read says why, with file and line, and stops; one that is merely unusable (two
equal completions, nothing left to score) is counted by its reason and reported. Files are read row
by row, except that a .txt file is one row, and a .json file is parsed whole.
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


class InputError(ValueError):
    """A mistake in what the user gave us, said in one sentence. Commands print it and exit with
    2."""


# ------------------------------------------------------------------------------
# Rows: what a line may be


class Row(NamedTuple):
    """A checked row. kind: `pair` (completions = chosen, rejected), `rewards`, `samples` (none
    yet), `sft` or `prompt`."""

    kind: str
    prompt: str | None  # None: running text, no prompt
    completions: list[str]
    rewards: list[float] | None = None


class Unusable(Exception):
    """A well-formed row that no training can use; the message is the reason it is counted under."""


ASSISTANT = "\n\nAssistant:"
TURNS = {"user": "\n\nHuman:", "assistant": ASSISTANT, "system": "\n\nSystem:"}
ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
FORMATS = (
    "{prompt, chosen, rejected}, {chosen, rejected}, {instruction, input, chosen, rejected}, "
    "{prompt, completions, rewards}, {prompt, completion}, {text} or {prompt}"
)


def parse_row(row: object) -> Row:
    """One JSON value -> Row. Raises InputError (malformed, without file and line) or Unusable."""
    if not isinstance(row, dict):
        raise InputError(f"a row must be a JSON object, got {type(row).__name__}")
    if "chosen" in row or "rejected" in row:
        return parse_pair(row)
    if "completions" in row or "rewards" in row:
        return parse_rewards(row)
    if "completion" in row:
        prompt, completion = prompt_text(row), completion_text(row, "completion")
        return Row("sft", prompt, [completion])
    if "text" in row:
        return Row("sft", None, [string(row, "text")])
    if "prompt" in row:
        return Row("prompt", prompt_text(row), [])
    raise InputError(f"fields {sorted(row)} fit none of the formats {FORMATS}")


def parse_pair(row: dict) -> Row:
    """A preference pair in any of its three spellings."""
    if "prompt" in row:
        prompt = prompt_text(row)
        replies = [completion_text(row, name) for name in ("chosen", "rejected")]
    elif "instruction" in row:
        given = string(row, "input") if row.get("input") else ""
        prompt = ALPACA.format(
            paired=", paired with an input that provides further context" if given else "",
            instruction=string(row, "instruction"),
            input=f"### Input:\n{given}\n\n" if given else "",
        )
        replies = [completion_text(row, name) for name in ("chosen", "rejected")]
    else:  # HH-RLHF: two whole dialogues that share everything up to the last reply
        cuts = [split_dialogue(row, name) for name in ("chosen", "rejected")]
        if cuts[0][0] != cuts[1][0]:
            raise Unusable("dialogues differ before the last Assistant turn")
        prompt, replies = cuts[0][0], [reply for _, reply in cuts]
    return Row("pair", prompt, replies)


def parse_rewards(row: dict) -> Row:
    """K completions and their rewards, or none yet."""
    completions, rewards = row.get("completions"), row.get("rewards", [])
    for name, value in (("completions", completions), ("rewards", rewards)):
        if not isinstance(value, list):
            raise InputError(f"field {name!r} must be a list, got {describe(value)}")
    for text in completions:
        if not isinstance(text, str):
            raise InputError(f"a completion must be a string, got {describe(text)}")
    if "rewards" not in row:  # as sample.py writes them: an empty one is a draw, too
        return Row("samples", prompt_text(row), completions)
    if len(completions) != len(rewards):
        raise InputError(f"{len(completions)} completions but {len(rewards)} rewards")
    for r in rewards:
        if isinstance(r, bool) or not isinstance(r, int | float) or not abs(r) < 1e30:
            raise InputError(f"a reward must be a finite number, got {describe(r)}")
    return Row("rewards", prompt_text(row), completions, list(map(float, rewards)))


def check_usable(row: Row, use: str) -> None:
    """Raises Unusable where `use` finds nothing to learn from, or to score. A completion may be
    empty where it is one of several draws: the end of text is scored."""
    if use == "prompt":
        return
    choice = row.kind == "pair" or (row.kind == "rewards" and use == "preference")
    if choice and len(set(row.completions)) < 2:
        raise Unusable("fewer than two distinct completions")
    if not row.completions:
        raise Unusable("no completions")
    if row.kind in ("pair", "sft") or use == "sft":
        texts = row.completions if row.kind == "pair" else [row.completions[best_of(row)]]
        if any(not text or text.isspace() for text in texts):
            raise Unusable("an empty completion")


def best_of(row: Row) -> int:
    """The completion that sft imitates."""
    return row.rewards.index(max(row.rewards)) if row.rewards else 0


def string(row: dict, name: str) -> str:
    if name not in row:
        raise InputError(f"field {name!r} is missing; the row has {sorted(row)}")
    if not isinstance(row[name], str):
        raise InputError(f"field {name!r} must be a string, got {describe(row[name])}")
    return row[name]


def describe(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:37] + "..."


def render_turns(messages: list, name: str) -> str:
    """[{role, content}, ...] -> "\\n\\nHuman: ...\\n\\nAssistant: ...", as HH-RLHF writes
    dialogues."""
    parts = []
    for m in messages:
        names = ("role", "content")
        fits = isinstance(m, dict) and all(isinstance(m.get(name), str) for name in names)
        fits = fits and m["role"] in TURNS
        if not fits:
            raise InputError(
                f"field {name!r}: a message needs a role ({', '.join(TURNS)}) and a content, "
                f"both strings, got {describe(m)}"
            )
        parts.append(f"{TURNS[m['role']]} {m['content']}")
    return "".join(parts)


def prompt_text(row: dict) -> str:
    """The prompt; a list of messages ends with an open Assistant turn."""
    if not isinstance(row.get("prompt"), list):
        return string(row, "prompt")
    return render_turns(row["prompt"], "prompt") + ASSISTANT


def completion_text(row: dict, name: str) -> str:
    """A completion; a list of messages begins with the assistant's, whose turn the prompt
    opened."""
    if not isinstance(row.get(name), list):
        return string(row, name)
    text = render_turns(row[name], name)
    if not text.startswith(ASSISTANT):
        raise InputError(f"field {name!r} must begin with an assistant message")
    return text.removeprefix(ASSISTANT)


def split_dialogue(row: dict, name: str) -> tuple[str, str]:
    """A whole dialogue -> (text up to and with the last "\\n\\nAssistant:", the reply after it)."""
    value = row.get(name)
    text = render_turns(value, name) if isinstance(value, list) else string(row, name)
    cut = text.rfind(ASSISTANT)
    if cut < 0:
        raise InputError(
            f'field {name!r} has no "\\n\\nAssistant:" turn, and there is no field "prompt"'
        )
    cut += len(ASSISTANT)
    return text[:cut], text[cut:]


# ------------------------------------------------------------------------------
# Files


def file_kind(path: Path) -> str:
    """The ending that says how to read a file; InputError for any other."""
    kinds = (".jsonl", ".jsonl.gz", ".json", ".txt")
    kind = next((k for k in kinds if path.name.endswith(k)), None)
    if kind is None:
        raise InputError(f"{path}: a data file must end in one of {', '.join(kinds)}")
    return kind


def read_rows(path: str | Path) -> Iterator[tuple[str, object]]:
    """(place, JSON value) for each row of a .jsonl, .jsonl.gz, .json or .txt file; place is
    file:line.

    Blank lines are skipped; a .json file is a list, its rows counted from 1; a .txt file is one
    {"text"}.
    """
    path = Path(path)
    kind = file_kind(path)
    number = 1
    try:
        with (
            gzip.open(path, "rt", encoding="utf-8-sig")
            if kind.endswith("gz")
            else open(path, encoding="utf-8-sig") as file
        ):
            if kind == ".txt":
                yield str(path), {"text": file.read()}
            elif kind == ".json":
                rows = json.load(file)
                if not isinstance(rows, list):
                    raise InputError(f"{path}: a .json file must hold a list of rows")
                yield from ((f"{path}: row {i}", row) for i, row in enumerate(rows, 1))
            else:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield f"{path}:{number}", json.loads(line)
    except json.JSONDecodeError as error:
        line = error.lineno if kind == ".json" else number
        raise InputError(
            f"{path}:{line}: broken JSON, {error.msg} (column {error.colno})"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: line {number} or later is not UTF-8 text") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: damaged gzip file ({error})") from error
    except InputError:
        raise
    except (RecursionError, ValueError) as error:  # too deep, or a number of too many digits
        raise InputError(f"{path}:{number}: broken JSON, {error}") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error


@dataclass
class Report:
    """What reading did: rows seen, rows unusable by reason, groups shortened to fit block_size."""

    rows: int = 0
    unusable: Counter = field(default_factory=Counter)
    cut_prompts: int = 0
    cut_completions: int = 0

    def __str__(self) -> str:
        bad = sum(self.unusable.values())
        text = f"{self.rows - bad} of {self.rows} rows usable"
        if bad:
            text += "; not: " + ", ".join(f"{n} {why}" for why, n in self.unusable.most_common())
        if self.cut_prompts or self.cut_completions:
            text += f"; cut to block_size: {self.cut()}"
        return text

    def cut(self) -> str:
        return (
            f"{self.cut_prompts} prompts from the left, "
            f"{self.cut_completions} completions from the right"
        )


WANTED = {  # what each use of a file accepts, and how the error names it
    "preference": ({"pair", "rewards"}, "preference pairs or completions with rewards"),
    "sft": ({"pair", "rewards", "sft"}, "text, or prompts with completions"),
    "score": ({"pair", "rewards", "sft", "samples"}, "text, or prompts with completions"),
    "prompt": ({"pair", "rewards", "sft", "samples", "prompt"}, "prompts"),
}


def read_files(paths: list, use: str, report: Report) -> Iterator[tuple[str, Row]]:
    """(place, Row) of every usable row of every file, for one `use` of WANTED; the report counts
    the rest."""
    kinds, wanted = WANTED[use]
    for path in paths:
        before = report.rows
        for place, value in read_rows(path):
            report.rows += 1
            try:
                row = parse_row(value)
            except Unusable as error:
                report.unusable[str(error)] += 1
                continue
            except InputError as error:
                raise InputError(f"{place}: {error}") from None
            if row.kind not in kinds or (use == "prompt" and row.prompt is None):
                raise InputError(f"{place}: expected {wanted}, got fields {sorted(value)}")
            try:
                check_usable(row, use)
            except Unusable as error:
                report.unusable[str(error)] += 1
                continue
            yield place, row
        if report.rows == before:
            raise InputError(f"{path}: the file is empty")


# ------------------------------------------------------------------------------
# Written beside their place and moved there, so that no file is ever half written


@contextlib.contextmanager
def replacing(path: Path):
    """A temporary path to write to; it takes the place of `path` only if the block succeeds."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors leaves a file that its owner alone can read
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {path}: {error.strerror}") from error
