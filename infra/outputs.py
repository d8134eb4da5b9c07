"""
Files that grow while a program runs: one process at a time writes them, whole lines and nothing
else, and what was made with other settings is not gone on with.

The lock is the kernel's (fcntl) and ends with its process. Windows has none, nor have some network
file systems: there a second process is not refused.
"""

import contextlib
import json
import os
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path

from infra.rows import InputError, make_folder, one_sentence, read_json, replacing

try:
    import fcntl
except ImportError:
    fcntl = None


def hold(lock: Path, files: list[Path], held: contextlib.ExitStack) -> None:
    """Nobody else may write these files until `held` closes or this process ends, however it dies.
    What a killed process left half written of them is removed. Raises InputError with the number of
    the process that has them."""
    with one_sentence(f"cannot write {lock}", OSError):
        note = held.enter_context(lock.open("a+"))
        try:
            if not fcntl:
                return
            fcntl.lockf(note, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which a fork does not inherit
        except BlockingIOError:
            note.seek(0)
            said = f"the process {note.read()} writes to {files[0]} now"
            raise InputError(f"{said}: wait for it, stop it, or give another --out") from None
        except OSError:  # a file system without locks
            return
        note.truncate(0)
        note.write(str(os.getpid()))
        note.flush()
        for file in files:
            for half in file.parent.glob(".*"):
                if half.stem == f".{file.name}" and half.suffix[1:].isdigit():  # by `replacing`
                    half.unlink()


def checksum(parts: Iterable) -> int:
    """CRC32 of bytes and arrays, to see later that they are still the same."""
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    return crc


def append(path: Path, rows: list[dict]) -> None:
    """All of these rows as JSON lines, or, where the disk is full, none."""
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    with one_sentence(f"cannot write {path}", OSError), open(path, "ab", buffering=0) as file:
        size = file.tell()
        if data and file.write(data) < len(data):
            file.truncate(size)
            raise OSError("the disk is full")


def read_records(path: Path) -> list[dict]:
    """The rows of such a file; a last line that was cut off is none."""
    with one_sentence(f"cannot read {path}"):
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]


class OutFile:
    """sample.py's --out, and beside it the settings that decide its rows."""

    def __init__(self, path: Path, settings: dict, held: contextlib.ExitStack):
        self.path, self.settings = path, settings
        self.beside = path.with_name(f"{path.name}.settings.json")
        make_folder(path.parent)
        hold(path.with_name(f".{path.name}.lock"), [path, self.beside], held)

    def whole_lines(self, overwrite: bool) -> int:
        """How many lines --out keeps; a last one that was cut off is removed. Raises InputError for
        a file that sample.py did not write, or wrote with other settings."""
        path, again = self.path, "give another --out, or --overwrite to make it anew"
        if not path.exists() or not path.stat().st_size:
            return 0
        if not self.beside.exists():
            raise InputError(f"{path} was not written by sample.py: give another --out")
        if overwrite:
            return 0
        before = read_json(self.beside)
        if changed := [k for k in self.settings if self.settings[k] != before.get(k)]:
            raise InputError(f"{path} was begun with other {', '.join(changed)}: {again}")
        with one_sentence(f"cannot write {path}", OSError), open(path, "rb+") as file:
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)
        if found := content.count(b"\n"):
            said = f"{path}: its {found} rows are kept; --overwrite makes them anew"
            print(said, file=sys.stderr)
        return found

    def write(self, rows: list[dict], first: bool) -> None:
        """Old rows stay until the first new ones are written; no moment has rows beside the
        settings of others."""
        if not first:
            append(self.path, rows)
            return
        with replacing(self.path) as new, replacing(self.beside) as beside:
            append(new, rows)
            beside.write_text(json.dumps(self.settings, indent=2) + "\n", encoding="utf-8")
            self.path.unlink(missing_ok=True)  # then the settings take their place, then the rows
