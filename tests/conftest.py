"""What tests of train.py, sample.py and methods/ share: one small world (files of rows, a tiny sft
run, a reward model), command lines over it, how to read what a run leaves, and twins by hand."""

import json
import os
import random
from pathlib import Path

import pytest
import torch

import data
import exo
import train
from infra.checkpoint import load_checkpoint
from model import GPT, GPTConfig

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
ONLINE = [f"{name} --online" for name in exo.LOSSES if not exo.needs(name).pairs]
ROUNDS = [*ONLINE, "ppo"]
STAGES = ["sft", "reward", *exo.LOSSES, *ROUNDS]
LETTERS = "tests.rewards:letters"
TINY = "--n_layer 1 --n_head 1 --n_embd 16 --block_size 64".split()
SHORT = "--eval_interval 3 --log_interval 1 --learning_rate 1e-3 --kl_samples 4".split()
SHORT += ["--max_new_tokens", "8"]


def lines(*rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def save(folder, content: str | bytes, name: str = "rows.jsonl"):
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


class World:
    """train.py over these files, with runs in a folder of the test's own."""

    def __init__(self, files: dict[str, str], folder: Path):
        self.files, self.folder = files, folder
        self.pairs, self.rewards, self.sft = files["pairs"], files["rewards"], files["sft"]

    def argv(self, stage: str, *more, out="run") -> list[str]:
        """A command line of one of STAGES, or a fork's; what `more` says wins."""
        argv = [*stage.split(), "--data", self.pairs, "--eval_data", self.pairs]
        argv += ["--init", self.sft, "--out", str(self.folder / out), *SHORT]
        argv += [] if "--epochs" in more else ["--max_iters", "6"]
        argv += ["--reward", LETTERS, "--K", "3"] if stage in ROUNDS else []
        return [*argv, *map(str, more)]

    def run(self, stage: str, *more, out="run") -> Path:
        assert train.main(self.argv(stage, *more, out=out)) == 0
        return self.folder / out

    def task(self, stage: str, *more):
        """(settings, the stage) before the first step."""
        s = train.parse(self.argv(stage, *more))
        return s, train.make_stage(s, CPU)


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> dict[str, str]:
    """40 pairs whose chosen says yes and is the shorter, 20 rows with rewards, and an sft run."""
    folder, rng = tmp_path_factory.mktemp("files"), random.Random(0)

    def words(n):
        return " ".join(rng.choice("the a cat dog sat ran big red".split()) for _ in range(n))

    pairs = [
        {"prompt": words(3), "chosen": f" {words(2)} yes", "rejected": f" {words(3)} no"}
        for _ in range(40)
    ]
    rewards = []
    for _ in range(20):
        completions = [f" {words(2)} {i}" for i in range(rng.randint(2, 4))]
        scores = [float(y.count("a")) for y in completions]
        rewards.append({"prompt": words(3), "completions": completions, "rewards": scores})
    pairs = write_rows(folder / "pairs.jsonl", pairs)
    rewards = write_rows(folder / "rewards.jsonl", rewards)
    argv = ["sft", "--data", pairs, "--eval_data", pairs, "--out", str(folder / "sft"), *TINY]
    argv += "--max_iters 60 --eval_interval 30 --learning_rate 1e-2".split()
    assert train.main(argv) == 0
    return {"pairs": pairs, "rewards": rewards, "sft": str(folder / "sft")}


@pytest.fixture
def world(files, tmp_path) -> World:
    return World(files, tmp_path)


@pytest.fixture(scope="session")
def reward_model(files, tmp_path_factory) -> str:
    more = "--max_iters 40 --eval_interval 40 --learning_rate 3e-3".split()
    return str(World(files, tmp_path_factory.mktemp("reward")).run("reward", *more))


@pytest.fixture
def refusal(capsys):
    """refusal(main, *argv): the lines that it says of a mistake, whose exit status is 2."""

    def lines(main, *argv) -> list[str]:
        capsys.readouterr()
        try:
            status = main(list(argv))
        except SystemExit as stop:
            status = stop.code
        assert status == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert not any("Traceback" in line for line in said)
        return said

    return lines


def write_rows(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_rows(path: str | Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def records(out: str | Path, kind: str = "") -> list[dict]:
    """A run's records, of one kind or all, without what depends on the machine."""
    machine = dict.fromkeys(("tokens_per_s", "groups_per_s", "peak_gb"), 0)
    found = [r | machine if r["kind"] == "train" else r for r in read_rows(f"{out}/metrics.jsonl")]
    return [r for r in found if kind in ("", r["kind"])]


def assert_same_run(a: Path, b: Path) -> None:
    """Bit for bit: records, weights, optimizer and what the stage keeps."""
    assert records(a) == records(b)
    x, y = map(load_checkpoint, (a, b))
    for name in x.keys() & {"step", "best", "model", "head", "task"}:
        torch.testing.assert_close(x[name], y[name], rtol=0, atol=0, equal_nan=True)
    x, y = (ckpt["optimizer"]["state"] for ckpt in (x, y))
    torch.testing.assert_close(x, y, rtol=0, atol=0)


# ------------------------------------------------------------------------------
# Modules by hand, in float64


def tiny_gpt() -> GPT:
    """Weights large enough to matter."""
    generator = torch.Generator().manual_seed(0)
    gpt = GPT(GPTConfig(16, 11, 2, 2, 8), generator).double()
    with torch.no_grad():
        for p in gpt.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return gpt


def some_groups() -> data.Groups:
    """Two groups, of 3 and 2 completions; one completion is cut, one empty, two are equal."""
    builder = data.Builder(16, 10, data.Report())
    builder.put([1, 2, 3], [[4, 5], [6], [4, 5]], [True, False, True])
    builder.put([7], [[], [8, 9, 1, 2]], [True, True])
    return builder.groups()


def slow_hidden(gpt: GPT, idx: list[int]) -> torch.Tensor:
    """Features (T, C) of one sequence, from the plain forward of the whole text."""
    seen = []
    hook = gpt.ln_f.register_forward_hook(lambda m, args, out: seen.append(out))
    gpt(torch.tensor([idx]))
    hook.remove()
    return seen[0]


def slow_logps(gpt: GPT, groups: data.Groups, g: int, k: int, temperature=1.0) -> torch.Tensor:
    """log pi of each token of completion k of group g, (n,) float64, from the plain forward of the
    one text; its end of text, if it has one, is the last."""
    prompt, y = groups.prompt(g), groups.completions(g)[k]
    y = y + [groups.eot] * bool(groups.ended[groups.first[g] + 1 + k])
    logits = gpt(torch.tensor([prompt + y]))[0, len(prompt) - 1 : -1].double() / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(y)[:, None])[:, 0]
