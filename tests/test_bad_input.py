"""
Bad input: whatever files and command lines hold, the answer is a valid result, or one sentence and
status 2; never another exception, never a row that is gone without a count, never more memory than
stated. Over a thousand inputs here, over ten thousand with `pytest -m slow`.
"""

import contextlib
import dataclasses
import gzip
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import tiktoken
import torch
from conftest import ROOT, lines, save
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data
import sample
import train
from infra import rows
from infra.checkpoint import GO_ON
from infra.huggingface import save_pretrained
from infra.parallel import pick_device
from infra.rows import InputError, Report, read_files
from model import GPT, GPTConfig

BYTES = data.byte_encoding()
SIZES = [pytest.param(1, id="few"), pytest.param(10, id="many", marks=pytest.mark.slow)]
TRIED = {"inputs": 0, "bytes": 0, "refused": 0}


@pytest.fixture(scope="module", autouse=True)
def figures():
    """What was tried, for whoever runs pytest -s."""
    yield
    print(*(f"{n:,} {what}" for what, n in TRIED.items()), sep=", ")


def attempt(action, size: int) -> None:
    """It works, or says one sentence."""
    TRIED["inputs"] += 1
    TRIED["bytes"] += size
    try:
        action()
    except InputError as error:
        said = str(error)
    else:
        return
    TRIED["refused"] += 1
    assert len(said.splitlines()) == 1


# ------------------------------------------------------------------------------
# Files of rows, byte by byte

FRAGMENTS = [*'{}[]:,"\\ \n\t\0', "null", "NaN", "-Infinity", "1e999", "9" * 1000, "9" * 5000]
FRAGMENTS += ["\ufeff", "\r\n", "<|endoftext|>", "\\ud800", '"rewards":[1,2]', "[" * 3000]
FRAGMENTS = [text.encode() for text in FRAGMENTS] + [b"\xff", b"\xc3", b"\xed\xa0\x80", b"\x1f\x8b"]
ROWS = [
    {"prompt": "é", "chosen": " 👍 yes", "rejected": " no"},
    {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
    {"prompt": [{"role": "user", "content": "q"}], "chosen": "a", "rejected": "b"},
    {"instruction": "i", "input": "", "chosen": "a", "rejected": "b"},
    {"prompt": "p", "completions": ["a", "b", ""], "rewards": [1, -2.5, 0]},
]


def spoiled(good: bytes, rng: random.Random) -> bytes:
    """Random bytes, or the good ones cut, with bits flipped, with something put in, left out or
    written twice."""
    a, b = sorted(rng.randrange(len(good) + 1) for _ in range(2))
    match rng.randrange(6):
        case 0:
            return rng.randbytes(rng.randrange(300))
        case 1:
            return good[:a]
        case 2:
            flipped = bytearray(good)
            for _ in range(rng.randint(1, 8)):
                flipped[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
            return bytes(flipped)
        case 3:
            return good[:a] + rng.choice(FRAGMENTS) + good[b if rng.random() < 0.5 else a :]
        case 4:
            return good[:a] + good[b:]
    return good[:b] + good[a:]


def read(path: Path, use: str) -> None:
    """Read it, and see that no row is gone."""
    if use == "score":
        report = Report()
        usable = len(list(read_files([path], use, report)))
    else:
        groups, report = data.read_groups([path], BYTES, 16, use)
        assert groups.tokens.max(initial=0) <= 256
        usable = len(groups)
    if use != "sft":  # whose texts are cut into blocks
        assert usable == report.rows - report.unusable.total()
    if path.suffix == ".jsonl":
        assert report.rows == sum(map(bool, map(bytes.strip, path.read_bytes().split(b"\n"))))


@pytest.mark.parametrize("times", SIZES)
@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".json", ".txt"])
def test_spoiled_rows_are_read_or_refused(ending, times, tmp_path):
    """Of the .gz files half are spoiled before they are packed, half after."""
    rng, path = random.Random(ending), tmp_path / f"rows{ending}"
    pack = (lambda x: gzip.compress(x, 1)) if ending == ".jsonl.gz" else bytes
    good = json.dumps(ROWS).encode() if ending == ".json" else lines(*ROWS).encode()
    for i in range(100 * times):
        content = pack(spoiled(good, rng)) if i % 2 else spoiled(pack(good), rng)
        path.write_bytes(content)
        for use in rows.WANTED:
            attempt(lambda use=use: read(path, use), len(content))


TEXTS = st.text(st.characters(), max_size=6) | st.sampled_from(["<|endoftext|>", "\ud800", " "])
NAMES = st.sampled_from(["role", "content", "x"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**40), 10**40) | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)
FIELDS = "prompt chosen rejected instruction input completion completions rewards text".split()
A_ROW = st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=5)


@pytest.mark.parametrize("times", SIZES)
def test_rows_of_any_json_are_read_or_refused(times, tmp_path):
    how = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}

    @settings(max_examples=150 * times, derandomize=True, **how)
    @given(st.lists(A_ROW, max_size=3), st.sampled_from([*rows.WANTED]))
    def search(values, use):
        path = save(tmp_path, lines(*values))
        attempt(lambda: read(path, use), path.stat().st_size)

    search()


PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
STRANGE_ROWS = {
    "10 MB": PAIR | {"chosen": "a" * 10**7},
    "1,000 completions": {"prompt": "", "completions": [*"ab"] * 500, "rewards": [1e29] * 1000},
    "special": PAIR | {"chosen": "\ud800 and <|endoftext|>"},
    "K = 1": {"prompt": "p", "completions": ["a"], "rewards": [1]},
    "17 MiB": PAIR | {"chosen": "a" * 17 * 2**20},
}
SAID = {"K = 1": "nothing usable", "17 MiB": ":1: the line is longer than 16 MiB"}


@pytest.mark.parametrize("name", STRANGE_ROWS)
def test_large_and_strange_rows(name, tmp_path):
    """What is wrong inside a row is in test_rows.py."""
    path = save(tmp_path, lines(STRANGE_ROWS[name]))
    if name in SAID:
        with pytest.raises(InputError, match=SAID[name]):
            data.read_groups([path], BYTES, 64)
    else:
        groups, report = data.read_groups([path], BYTES, 64)
        assert not report.unusable
        assert 256 not in groups.tokens[groups.offsets[1] :]  # text is no end of text


@pytest.mark.parametrize("byte", [b" ", b"a"])
def test_a_gzip_bomb_takes_no_memory(byte, tmp_path):
    """290 kB that become one line of 300 MB."""
    path = tmp_path / "bomb.jsonl.gz"
    with gzip.open(path, "wb", 1) as file:
        for _ in range(300):
            file.write(byte * 10**6)
    tracemalloc.start()
    with pytest.raises(InputError, match=r"bomb\.jsonl\.gz:1: the line is longer than 16 MiB"):
        list(rows.read_rows(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * rows.LONGEST


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.txt"])
def test_a_fifo_is_refused_at_once(name, tmp_path):
    """It would wait for whoever writes into it."""
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match=f"cannot read .*{name}: it is no regular file"):
        list(rows.read_rows(tmp_path / name))
    with pytest.raises(InputError, match="it is no regular file"):
        rows.read_json(tmp_path / name)


GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # how it cuts


@pytest.mark.parametrize("end", ["x", "\ud800"])
def test_a_text_that_tiktoken_gives_up_is_named_with_its_line(
    end, world, tmp_path, monkeypatch, refusal
):
    """A million spaces before a word."""
    ranks = {bytes([b]): b for b in range(256)}
    special = {"<|endoftext|>": 256}
    gpt2 = tiktoken.Encoding("gpt2", pat_str=GPT2, mergeable_ranks=ranks, special_tokens=special)
    path = save(tmp_path, "\n" + lines(PAIR | {"prompt": " " * 10**6 + end}))
    said = "the encoding gpt2 cannot take a text of 1,000,001 characters: Regex error"
    with pytest.raises(InputError, match=rf"^{path}:2: {said}"):
        data.read_groups([path], gpt2, 64)
    monkeypatch.setattr(sample, "get_encoding", lambda name: gpt2)
    for work, place in (("--score", "row 1"), ("--prompts", "prompt 1")):
        assert f"sample.py: {place}: {said}" in refusal(sample.main, world.sft, work, str(path))[-1]


# ------------------------------------------------------------------------------
# Weights, byte by byte

CONFIG = GPTConfig(block_size=16, vocab_size=257, n_layer=1, n_head=1, n_embd=8)


def quiet(main, argv: list[str]) -> tuple[int, list[str]]:
    """(status, lines of stderr) of a command, as a shell sees it."""
    out, said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
        try:
            status = main(argv)
        except SystemExit as stop:
            status = stop.code
    return status, said.getvalue().strip().splitlines()


def sample_from(path: Path) -> None:
    status, said = quiet(sample.main, [str(path), "--prompt", "a", "--max_new_tokens", "2"])
    if status:
        raise InputError("\n".join(said))


@pytest.mark.parametrize("times", SIZES)
@pytest.mark.parametrize(
    "name", ["ckpt.pt", "pytorch_model.bin", "model.safetensors", "config.json"]
)
def test_spoiled_weights_are_loaded_or_refused(name, times, tmp_path):
    rng, gpt = random.Random(name), GPT(CONFIG, torch.Generator().manual_seed(0))
    if name == "ckpt.pt":
        about = {"config": vars(CONFIG), "encoding": "bytes", "temperature": 1.0}
        torch.save({"model": gpt.state_dict()} | about, tmp_path / name)
    else:
        save_pretrained(gpt, tmp_path, exo={"encoding": "bytes", "temperature": 1.0})
    if name == "pytorch_model.bin":
        state = {k: x.t() if k.startswith("h.") else x for k, x in gpt.state_dict().items()}
        torch.save(state, tmp_path / name)
        (tmp_path / "model.safetensors").unlink()
    good = (tmp_path / name).read_bytes()
    for _ in range(40 * times):
        content = spoiled(good, rng)
        (tmp_path / name).unlink()  # the one before may still be mapped
        (tmp_path / name).write_bytes(content)
        attempt(lambda: sample_from(tmp_path), len(content))


STRANGE = [None, -1, float("nan"), "x", [1], {1: 2}]


@pytest.mark.parametrize("which", ["sft", "reward", "exo"])
def test_entries_of_another_type_are_refused(which, world, files, reward_model):
    """Each entry of a checkpoint, as every reader of it meets it."""
    out = {"sft": Path(files["sft"]), "reward": Path(reward_model)}.get(which) or world.run("exo")
    ckpt, folder = torch.load(out / "ckpt.pt", weights_only=True), world.folder / "strange"
    shutil.copytree(out, folder)
    row = str(save(world.folder, lines(PAIR)))
    score = [world.sft, "--score", row, "--reward" if which == "reward" else "--ref"]
    work, argv = sample.main, [*score, str(folder)]
    if which == "exo":
        work, argv = train.main, world.argv("exo", "--resume", "--max_iters", 7, out="strange")
    for name in GO_ON if which == "exo" else ckpt.keys() - GO_ON:
        for value in STRANGE:
            (folder / "ckpt.pt").unlink()
            torch.save(ckpt | {name: value}, folder / "ckpt.pt")
            TRIED["inputs"] += 1
            assert quiet(work, argv)[0] in (0, 2)


# ------------------------------------------------------------------------------
# Command lines

WORDS = ["", "-1", "0", "1", "2.5", "1e-300", "1e308", "nan", "inf", "-inf", "9" * 30, "x" * 5000]
WORDS += ["\udc80", "a\nb", "a b", "~", ".", "/dev/zero", "cpu:x", "cuda:99", ":", "a:b", "math:pi"]
WORDS += ["float32", "--", "-", "{}", "%s", "\u202e", "1_0", "0x10", "True", "none.jsonl"]
LEFT_OUT = {"stage", "max_iters", "epochs", "seeds", "sweep", "compile", "fsdp"}


def flags_of(stage: str) -> list[str]:
    if stage != "sample":
        return [f.name for f in dataclasses.fields(train.Settings) if f.name not in LEFT_OUT]
    found = (
        "which encoding prompt prompts score export ref beta_r label_smoothing reward best_of out"
    )
    return f"{found} overwrite max_new_tokens temperature top_k batch_size device dtype".split()


@pytest.mark.parametrize("times", SIZES)
@pytest.mark.parametrize("stage", ["sample", "sft", "exo", "exo --online", "ppo"])
def test_any_flag_with_any_word_is_taken_or_refused(stage, times, world, monkeypatch):
    rng = random.Random(stage)
    monkeypatch.chdir(world.folder)
    base = [world.sft, "--max_new_tokens", "4"]
    if stage != "sample":
        base = world.argv(stage, "--overwrite", "--kl_samples", 1)
    for _ in range((60 if stage == "sample" else 30) * times):
        some = rng.sample(flags_of(stage), rng.randint(1, 2))
        more = [word for name in some for word in (f"--{name}", rng.choice(WORDS))]
        argv = base + more + ([] if stage == "sample" else ["--max_iters", "1"])
        TRIED["inputs"] += 1
        status, said = quiet(sample.main if stage == "sample" else train.main, argv)
        assert status in (0, 2), argv
        if status == 2:
            TRIED["refused"] += 1
            assert said[-1].startswith(("train.py: ", "sample.py: ")), (argv, said)


@pytest.mark.parametrize(
    ("main", "argv", "said"),
    [
        (train.main, "sft --data D --device cpu:x", "--device cpu:x: Invalid device string"),
        (train.main, "sft --data D --n_layer 1000000000", "--n_layer must be from 1 to 1000"),
        (train.main, "sft --data D --n_embd 900000000", "the model's flags do not fit: "),
        (train.main, "exo --data D --init I --beta_r 1e-300", "--beta_r must be from 1e-6 to 1e6"),
        (train.main, f"sft --data D --init {'x' * 5000}", "File name too long"),
        (train.main, f"sft --data D --out {'x' * 5000}", "File name too long"),
        (train.main, f"exo --data D --init I --reward {'x' * 5000}", "File name too long"),
        (sample.main, f"I --export {'x' * 5000}", "File name too long"),
        (sample.main, "I -n 1000000000", "at most 1,000,000 draws of a prompt"),
        (sample.main, "I --temperature 1e-300", "--temperature must be 0 or from 1e-6 to 1e6"),
    ],
)
def test_what_was_a_traceback_is_a_sentence(main, argv, said, world, refusal, monkeypatch):
    monkeypatch.chdir(world.folder)
    names = {"D": world.pairs, "I": world.sft}
    assert said in refusal(main, *(names.get(word, word) for word in argv.split()))[-1]


def test_a_folder_without_permission_is_a_sentence(world, refusal, monkeypatch):
    """Whoever runs the tests as root may read all: the system's answer is made here."""

    def denied(self, *args, **more):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "exists", denied)
    for main, argv in ((train.main, world.argv("exo")), (sample.main, [world.sft])):
        (said,) = refusal(main, *argv)
        assert "Permission denied" in said


def test_a_gpu_that_is_not_there_is_a_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="--device cuda:1: this machine has 1"):
        pick_device("cuda:1")


def test_metrics_of_another_kind_are_refused(world, refusal):
    out = world.run("exo")
    (out / "metrics.jsonl").write_text('{"a": 1}\n')
    said = refusal(train.main, *world.argv("exo", "--resume", "--max_iters", 7))[-1]
    assert f"cannot read {out / 'metrics.jsonl'}: " in said


def test_the_screen_may_be_closed_and_may_not_know_a_sign(world, tmp_path):
    """`| head` ends the program as it ends any; what UTF-8 or the terminal cannot write is shown as
    its number. One process each: this is about the interpreter's own streams."""
    path = save(tmp_path, lines({"prompt": "\ud800 é", "completion": "a"}) * 1000)
    command = [sys.executable, "sample.py", world.sft, "--score", str(path)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"\\ud800 \\xe9a\n"
    process.stdout.close()
    said = process.stderr.read().decode()
    assert process.wait() in (-13, 141)
    assert "Traceback" not in said
