"""experiments/memory.py beside what autograd saves and what a process uses; all on the CPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import model
import train
from data import Builder, Groups, Report, collate
from experiments import memory
from experiments.contestants import Step
from model import GPT, GPTConfig

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def groups_of(config: GPTConfig, prompt: int, completion: int, K: int, n: int) -> Groups:
    """n groups, all of the same lengths; the end of text is one of the completion's tokens."""
    rng = np.random.default_rng(0)

    def ids(length: int) -> list[int]:
        return rng.integers(1, config.vocab_size, length).tolist()

    builder = Builder(prompt + completion, 0, Report())
    for _ in range(n):
        completions = [ids(completion - 1) for _ in range(K)]
        builder.add(ids(prompt), completions, None if K == 2 else [float(k) for k in range(K)])
    return builder.groups()


def make_step(
    config: GPTConfig, lengths, K: int, micro: int, dtype: str, checkpointing=False, device=CPU
) -> tuple[train.Settings, Step]:
    """An EXO run of two micro-batches a step, without its files."""
    s = train.Settings(
        "exo", data=["-"], init="-", dtype=dtype, batch_size=2 * micro, micro_batch_size=micro
    )
    gpt = GPT(config, torch.Generator().manual_seed(0)).to(device)
    gpt.gradient_checkpointing = checkpointing
    return s, Step(gpt, groups_of(config, *lengths, K, 2 * micro), s, device)


def saved_bytes(s: train.Settings, task: Step, micro: int) -> int:
    """Bytes of all storages that the backward pass will need, weights aside."""
    own = {p.untyped_storage().data_ptr() for p in task.gpt.parameters()}
    kept, sizes = [], {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept.append(x)  # alive, so that no address is given twice
        if x.untyped_storage().data_ptr() not in own:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    batch = collate(task.groups, np.arange(micro))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), train.autocast(s, CPU):
        task.loss(batch)
    return sum(sizes.values())


SHAPES = [  # config, (prompt, completion), K, groups
    (GPTConfig(256, 2000, 3, 4, 64), (100, 40), 2, 3),
    (GPTConfig(256, 2000, 2, 2, 96), (30, 50), 8, 2),
    (GPTConfig(256, 500, 2, 8, 64), (150, 20), 4, 4),
    (GPTConfig(64, 300, 4, 1, 32), (1, 63), 2, 5),  # no prefix
]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("config", "lengths", "K", "micro"), SHAPES)
def test_activations_are_what_autograd_saves(
    config, lengths, K, micro, dtype, checkpointing, monkeypatch
):
    """Measured: within 1 %, through the chunked head and the plain one."""
    for chunk in (2**14, 2**24):
        monkeypatch.setitem(model.CHUNK, "cpu", chunk)
        found = memory.memory(config, *lengths, K, micro, dtype, checkpointing, device="cpu")
        measured = saved_bytes(*make_step(config, lengths, K, micro, dtype, checkpointing), micro)
        assert found["activations"] + found["casts"] == pytest.approx(measured / 2**30, rel=0.03)


def test_weights_gradients_and_optimizer_are_exact():
    config = SHAPES[0][0]
    found = memory.memory(config, 10, 10, 2, 2, "float32", device="cpu")
    s, task = make_step(config, (10, 10), 2, 2, "float32")
    optimizer = train.adamw(task.gpt, s, 0.0)
    sizes = {"weights": 0, "gradients": 0, "optimizer": 0}

    def measure(*_):
        sizes["weights"] = sum(p.nbytes for p in task.gpt.parameters())
        sizes["gradients"] = sum(p.grad.nbytes for p in task.gpt.parameters())

    optimizer.register_step_pre_hook(measure)
    train.update(s, task, optimizer, np.arange(4), 0.0)
    state = optimizer.state_dict()["state"].values()
    sizes["optimizer"] = sum(x.nbytes for entry in state for x in entry.values())
    for name, size in sizes.items():
        assert found[name] == size / 2**30
    for name, words in (("gpt2", 124439808), ("gpt2-xl", 1557611200)):
        assert memory.parameters(memory.SIZES[name]) == words  # Radford et al. and Hugging Face


PEAKS = {  # where most of it is: in activations, at the head, in one block's second forward pass
    "deep": (GPTConfig(512, 1000, 6, 8, 256), (128, 64), 4, 4, False),
    "wide": (GPTConfig(512, 50257, 2, 6, 384), (64, 64), 2, 4, False),
    "checkpointing": (GPTConfig(512, 8000, 8, 8, 256), (128, 64), 8, 2, True),
}
MEASURE = """
import sys, numpy as np
from tests import test_memory as t

def kb(name):  # of this process alone: ru_maxrss would count the parent's
    return int(next(x for x in open("/proc/self/status") if x.startswith(name)).split()[1])

t.torch.set_num_threads(1)
tiny = t.GPTConfig(64, 100, 1, 1, 16)
s, task = t.make_step(tiny, (8, 8), 2, 1, sys.argv[2])  # loads libraries
t.train.update(s, task, t.train.adamw(task.gpt, s, 0.0), np.arange(2), 0.0)
before = kb("VmRSS")
config, lengths, K, micro, checkpointing = t.PEAKS[sys.argv[1]]
s, task = t.make_step(config, lengths, K, micro, sys.argv[2], checkpointing)
optimizer = t.train.adamw(task.gpt, s, 0.0)
for _ in range(2):
    t.train.update(s, task, optimizer, np.arange(2 * micro), 0.0)
print((kb("VmHWM") - before) / 2**20)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("name", PEAKS)
def test_total_is_the_peak_of_a_process(name):
    """Two steps of two micro-batches, in float32: bfloat16 on a CPU adds scratch space that a GPU
    does not. glibc returns large blocks at once, or the peak would be of its reserves."""
    config, lengths, K, micro, checkpointing = PEAKS[name]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEASURE, name, "float32"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = memory.memory(config, *lengths, K, micro, "float32", checkpointing, device="cpu")
    assert float(done.stdout) == pytest.approx(found["total"], rel=0.15)


def test_shards_share_weights_gradients_and_optimizer():
    one, four = (memory.memory(memory.SIZES["gpt2-xl"], 256, 256, 2, 4, shards=n) for n in (1, 4))
    for name in ("weights", "gradients", "optimizer"):
        assert four[name] == one[name] / 4
    assert four["activations"] == one["activations"]
    assert one["total"] - four["total"] > 15


def test_committed_results_are_the_functions():
    """`python -m experiments.memory --out assets/memory` brings them up to date."""
    committed = json.loads((ROOT / "assets/memory/results.json").read_text())
    assert committed["rows"] == memory.table()
    assert all(re.match("gpt2", row["size"]) for row in committed["rows"])
