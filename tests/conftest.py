"""What tests share: one small world (files of rows, a tiny sft run, a reward model), command lines
over it, how to read what a run leaves, two losses as a fork would write them, small models and
groups of float64, and slow twins of what is done in batches."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, settings

import data
import exo
import train
from infra.checkpoint import load_checkpoint
from model import GPT, GPTConfig

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start

often = settings(  # the same examples each run, however slow or busy the machine
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
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
    return str(save(path.parent, lines(*rows), path.name))


def read_rows(path: str | Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def records(out: str | Path, kind: str = "") -> list[dict]:
    """A run's records, of one kind or all, without what depends on the machine."""
    machine = dict.fromkeys(("tokens_per_s", "groups_per_s", "peak_gb"), 0)
    found = [r | machine if r["kind"] == "train" else r for r in read_rows(f"{out}/metrics.jsonl")]
    return [r for r in found if kind in ("", r["kind"])]


def assert_same_run(a: Path, b: Path, tolerance: float = 0.0) -> None:
    """Bit for bit, or nearly: records, weights, optimizer and what the stage keeps."""
    for x, y in zip(records(a), records(b), strict=True):
        assert x.pop("kind") == y.pop("kind")
        assert y == pytest.approx(x, rel=1e3 * tolerance, abs=1e3 * tolerance)
    x, y = map(load_checkpoint, (a, b))
    near = {"rtol": tolerance, "atol": tolerance, "equal_nan": True}
    for name in x.keys() & {"step", "best", "model", "head", "task"}:
        torch.testing.assert_close(x[name], y[name], **near)
    torch.testing.assert_close(x["optimizer"]["state"], y["optimizer"]["state"], **near)


# ------------------------------------------------------------------------------
# Two losses as a fork would write them


def ipo_loss(policy_logps, ref_logps, log_target, beta_pi=1.0, mask=None):
    """Azar et al. 2023, arXiv:2310.12036, Eq. 17: pairs, chosen first."""
    ratio = policy_logps - ref_logps
    gap = ratio[:, 0] - ratio[:, 1] - 1 / (2 * beta_pi)
    return exo.group_mean(gap.square(), mask)


def simpo_loss(policy_logps, ref_logps, log_target, beta_pi=1.0, mask=None, *, lengths):
    """Meng et al. 2024, arXiv:2405.14734, Eq. 6 with gamma 0: no reference, a mean over tokens."""
    mean = policy_logps / lengths
    return exo.group_mean(F.softplus(-beta_pi * (mean[:, 0] - mean[:, 1])), mask)


@pytest.fixture
def forks(monkeypatch):
    """`ipo` and `simpo` are stages: a function and an entry each, and beside it what it needs."""
    for name, loss, needs in (
        ("ipo", ipo_loss, exo.Needs(pairs=True)),
        ("simpo", simpo_loss, exo.Needs(pairs=True, reference=False, lengths=True)),
    ):
        monkeypatch.setitem(exo.LOSSES, name, loss)
        monkeypatch.setitem(exo.NEEDS, loss, needs)


# ------------------------------------------------------------------------------
# Models and groups by hand, in float64, of V words

V, EOT = 11, 10


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def tiny_gpt(seed=0, dtype=torch.float64, scale=0.4, **sizes) -> GPT:
    """Every parameter, biases and LayerNorms too, is of ordinary size: a fresh GPT is nearly linear
    and nearly uniform, which would hide most mistakes."""
    sizes = {"block_size": 24, "vocab_size": V, "n_layer": 2, "n_head": 2, "n_embd": 8} | sizes
    gpt, generator = GPT(GPTConfig(**sizes)).double(), seeded(seed)
    for name, p in gpt.named_parameters():
        one = 1.0 if name.endswith("weight") and "ln_" in name else 0.0
        p.data = one + scale * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return gpt.to(dtype)


def perturb(module: torch.nn.Module) -> None:
    """Away from where training starts: the reference, or rewards of 0."""
    with torch.no_grad():
        for p in module.parameters():
            p += 0.1 * rand(*p.shape, seed=p.numel()).to(p)


def pack(rows: list, eot: int = EOT) -> data.Groups:
    """[(prompt, completions), ...] -> Groups. A completion is its ids, or (ids, ended)."""
    builder = data.Builder(10**6, eot, data.Report())
    for prompt, completions in rows:
        pairs = [y if isinstance(y, tuple) else (y, True) for y in completions]
        builder.put(prompt, [ids for ids, _ in pairs], [end for _, end in pairs])
    return builder.groups()


def one_batch(groups: data.Groups, round_to: int = 1) -> data.Batch:
    return data.collate(groups, np.arange(len(groups)), round_to)


RAGGED = [
    ([1, 2, 3, 4], [[5, 6, 7], [8], []]),
    ([9], [([1, 1], False)]),
    ([2, 2], [([3, 4, 5, 6, 7], False), [0]]),
]


def merging_encoding() -> tiktoken.Encoding:
    """Bytes, and "ab" as one token: what a completion begins with could join its prompt."""
    return tiktoken.Encoding(
        "merging",
        pat_str=r"(?s:.+)",
        mergeable_ranks={bytes([b]): b for b in range(256)} | {b"ab": 256},
        special_tokens={"<|endoftext|>": 257},
    )


def some_groups() -> data.Groups:
    """Two groups, of 3 and 2 completions; one completion is cut, one empty, two are equal."""
    rows = [([1, 2, 3], [[4, 5], ([6], False), [4, 5]]), ([7], [[], [8, 9, 1, 2]])]
    return pack(rows)


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
    logits = gpt(torch.tensor([(prompt + y)[:-1] or [0]]))[0, len(prompt) - 1 :].double()
    y = torch.tensor(y, dtype=torch.long)[:, None]
    return (logits / temperature).log_softmax(-1).gather(1, y)[:, 0]


def one_by_one(gpt: GPT, groups: data.Groups) -> torch.Tensor:
    """log pi of all completions, group after group; each text alone: no batch, no padding."""
    sizes = np.diff(groups.first) - 1
    texts = [(g, k) for g, size in enumerate(sizes) for k in range(size)]
    return torch.stack([slow_logps(gpt, groups, g, k).sum() for g, k in texts])
