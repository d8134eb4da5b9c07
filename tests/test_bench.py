"""The benchmark's own arithmetic: a wrong FLOP count, or a naive twin that does other work, would
make every figure of it worthless. Nothing here measures speed."""

import json

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data import Builder, Report, collate
from experiments import bench, contestants, peers
from experiments.contestants import Cell
from model import GPT, GPTConfig

TINY = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 50}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(peers.SIZES, "tiny", TINY)
    monkeypatch.setattr(contestants, "pick_device", lambda name: torch.device("cpu"))


def tiny_cell(**changes) -> Cell:
    return Cell(**({"what": "train", "size": "tiny", "prompt": 6, "laps": 2} | changes))


def test_train_flops_by_hand():
    """Prompt of 4 (a prefix of 3), completions of 2 and 3 tokens; 1 layer, width 4, 10 words."""
    builder = Builder(16, 0, Report())
    builder.add([1, 2, 3, 4], [[5, 6], [7, 8, 9]], ended=False)
    config = GPTConfig(block_size=16, vocab_size=10, n_layer=1, n_head=1, n_embd=4)
    tokens = 3 + 2 + 3
    seen = (1 + 2 + 3) + (4 + 5) + (4 + 5 + 6)  # the prefix, then keys 0..2 and oneself
    forward = 24 * 16 * tokens + 4 * 4 * seen + 2 * 4 * 10 * (2 + 3)
    batch = collate(builder.groups(), np.array([0]))
    assert contestants.train_flops(config, batch) == 3 * forward


def test_sample_flops_by_hand():
    """Prompt of 2 and 2 new tokens: 3 tokens are read, 2 go through the head."""
    config = GPTConfig(block_size=16, vocab_size=10, n_layer=1, n_head=1, n_embd=4)
    each = 24 * 16 * 3 + 4 * 4 * (1 + 2 + 3) + 2 * 4 * 10 * 2
    assert contestants.sample_flops(config, batch=5, prompt=2, new=2) == 5 * each


def test_forward_flops_match_torch():
    """torch counts the matmuls of a plain forward pass; it knows no causal mask, so every key is
    seen."""
    config = GPTConfig(block_size=8, **TINY)
    plain = sdpa_kernel(SDPBackend.MATH)  # the only one it counts on a CPU
    with plain, FlopCounterMode(display=False) as counter, torch.no_grad():
        GPT(config)(torch.zeros(3, 8, dtype=torch.long))
    ours = contestants.forward_flops(config, tokens=24, seen=3 * 8 * 8, scored=24)
    assert counter.get_total_flops() == ours


@pytest.mark.parametrize("K", [2, 4])
def test_naive_twin_has_our_loss(K):
    """The same groups, once shared and packed, once concatenated and padded: one loss, also where
    the policy has left the reference."""
    cell = tiny_cell(K=K, batch=5, shortest=1, longest=7)
    gpt, groups, s, device = contestants.train_setup(cell)
    ref, stage = (
        contestants.make_gpt(cell, 13, device),
        contestants.make_stage(gpt, groups, s, device),
    )
    with torch.no_grad():
        for p in gpt.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    ids = [7, 2, 5]
    ours, _ = stage.loss(collate(groups, np.array(ids)))
    naive = contestants.naive_loss(gpt, ref, groups, ids, torch.from_numpy(groups.log_target), s)
    torch.testing.assert_close(ours, naive, rtol=1e-5, atol=1e-6, check_dtype=False)


def test_naive_generate_has_our_greedy_text():
    gpt = GPT(GPTConfig(block_size=24, **TINY), torch.Generator().manual_seed(0))
    with torch.no_grad():
        gpt.wte.weight.mul_(20)  # far from a tie
    prompts = torch.randint(50, (3, 4), generator=torch.Generator().manual_seed(1))
    naive = contestants.naive_generate(gpt, prompts, 20, temperature=0)
    assert naive[:, 4:].tolist() == gpt.generate(prompts.tolist(), 20, temperature=0)


@pytest.mark.parametrize("what", ["train", "sample", "load"])
def test_rows_have_their_fields(what, monkeypatch):
    """In this process, with a tiny model; the peer is one that fails."""

    def here(c, who, python=None):
        return {"failed": "x"} if python else contestants.CONTESTANTS[c.what][who](c)

    monkeypatch.setattr(bench, "run", here)
    monkeypatch.setattr(contestants, "NEW_TOKENS", 10)
    size = "bytes" if what == "load" else "tiny"
    row = bench.measure(tiny_cell(what=what, size=size, batch=3), "/peers/python")
    wanted = "what size prompt K threads dtype ours naive peers limit_share peak_gb laps unit"
    assert set(wanted.split()) <= set(row)
    assert row["ours"] > 0
    assert row["naive"] > 0
    assert row["laps"] == 2
    assert row["peak_gb"] > 0
    assert (row["limit_share"] is None) == (what == "load")
    names = {"train": {"trl", "trl_precomputed"}, "sample": {"hf"}, "load": set()}
    assert row["peers"] == dict.fromkeys(names[what])
    assert "naive" in bench.line(row)
    assert json.loads(json.dumps(row)) == row
    if what == "train":  # KL of a coin toss to (1 - eps, eps): everyone starts at the reference
        losses = [row["contestants"][who]["first_loss"] for who in ("ours", "naive")]
        assert losses == pytest.approx([2.7612, 2.7612], abs=1e-4)


def test_time_box_keeps_three_laps():
    calls = []
    assert len(peers.time_laps(calls.append, laps=10, seconds=0)) == 4  # the start, and 3 ends
    assert calls == [0, 1, 2]
    assert len(peers.time_laps(calls.append, laps=5, seconds=100)) == 6


def cells(*flags) -> list[Cell]:
    return bench.cells(bench.parse(["--only", "train", "sample", *flags]))


def test_flags_narrow_and_copy(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    every = cells("--threads", "2")
    assert len(every) == 8
    assert all(c.batch * c.K == (32 if c.what == "sample" else 16) for c in every)
    small = cells("--size", "small", "--K", "8")
    assert [(c.what, c.prompt, c.K) for c in small] == [("train", 256, 8), ("sample", 16, 1)]
    assert [c.dtype for c in cells("--size", "gpt2", "--prompt", "256")] == ["float32", "bfloat16"]
    assert [c.size for c in cells("--only", "sample", "--size", "gpt2")] == ["gpt2"]
    assert len(cells("--threads", "1", "2")) == 2 * len(every)
    assert len(cells("--full")) == 3 * 2 * 2 * (4 + 1)


@pytest.mark.parametrize(
    "flags", [["--K", "1"], ["--laps", "0"], ["--size", "huge"], ["--lap", "3"]]
)
def test_bad_flags_are_one_line(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.parse(flags)
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_wrong_peers_python_is_one_line(tmp_path, capsys):
    assert bench.main(["--peers", "/no/python", "--out", str(tmp_path)]) == 2
    assert "/no/python" in capsys.readouterr().err


def test_one_command_writes_results(tmp_path):
    """The real command, in processes of their own, in its smallest form."""
    flags = ["--only", "train", "--size", "small", "--K", "2", "--threads", "1", "--batch", "1"]
    assert bench.main([*flags, "--laps", "1", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert [r["size"] for r in results["rows"]] == ["small"]
    assert results["rows"][0]["ours"] > 0
    assert results["versions"]["torch"] == torch.__version__
    assert results["config"]["laps"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
