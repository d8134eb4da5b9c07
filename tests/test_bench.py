"""The benchmark's own arithmetic: a wrong FLOP count, or a naive twin that does other work, would
make every figure of it worthless. Nothing here measures speed."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from experiments import bench, peers
from experiments.peers import Cell
from model import GPT, GPTConfig

TINY = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 300}


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tmp_path):
    monkeypatch.setitem(peers.SIZES, "tiny", TINY)
    monkeypatch.setitem(peers.SIZES, "one", {"n_layer": 1, "n_embd": 4, "vocab_size": 10})
    monkeypatch.chdir(tmp_path)


def test_forward_flops_by_hand():
    """1 layer, width 4, 10 words. Prompt of 4 (a prefix of 3), completions of 2 and 3 tokens; then
    a sample of 2 tokens after 2: 3 tokens are read, 2 go through the head."""
    seen = (1 + 2 + 3) + (4 + 5) + (4 + 5 + 6)  # the prefix, then keys 0..2 and oneself
    by_hand = 24 * 16 * (3 + 2 + 3) + 4 * 4 * seen + 2 * 4 * 10 * (2 + 3)
    assert bench.forward_flops("one", 4, 2, 3) == by_hand
    assert bench.forward_flops("one", 2, 2) == 24 * 16 * 3 + 4 * 4 * (1 + 2 + 3) + 2 * 4 * 10 * 2


def test_forward_flops_match_torch():
    """torch counts the matmuls of a plain forward pass; it knows no causal mask, so it also counts
    the pairs of a query and a later key."""
    plain = sdpa_kernel(SDPBackend.MATH)  # the only one it counts on a CPU
    with plain, FlopCounterMode(display=False) as counter, torch.no_grad():
        GPT(GPTConfig(block_size=8, **TINY))(torch.zeros(3, 8, dtype=torch.long))
    later = 4 * TINY["n_layer"] * TINY["n_embd"] * 3 * (8 * 7 // 2)
    assert counter.get_total_flops() == 3 * bench.forward_flops("tiny", 1, 8) + later


@pytest.mark.parametrize("K", [2, 4])
def test_naive_twin_does_our_steps(K, monkeypatch):
    """The same groups, once shared and packed, once concatenated and padded: the same loss before
    and after steps so large that the policy leaves the reference. The FLOPs are those of the batch,
    which holds all groups, three times: the backward pass is twice the forward."""
    counted, cell = [], Cell("train", "tiny", 6, K, 5, laps=1)
    monkeypatch.setattr(bench, "RATE", 0.01)
    monkeypatch.setattr(Cell, "measure", lambda c, step: [float(step(0)) for _ in range(4)])
    monkeypatch.setattr(
        bench, "beside_limits", lambda c, losses, flops, moved: counted.extend(flops) or losses
    )
    ours, naive = bench.ours_train(cell), bench.naive_train(cell)
    assert abs(ours[3] - ours[0]) > 0.1
    assert ours == pytest.approx(naive, rel=1e-4)
    if K == 2:  # KL of a coin toss to (1 - eps, eps): everyone starts at the reference
        assert ours[0] == pytest.approx(2.7612, abs=1e-4)
    forward = sum(bench.forward_flops("tiny", *map(len, group)) for group in cell.groups(5))
    assert counted == [3 * forward]


@pytest.mark.parametrize("what", ["train", "sample", "load"])
def test_rows_have_their_fields(what, monkeypatch):
    """In this process, with a tiny model; the peer is one that fails."""

    def here(c, who, python=None):
        measured = {"failed": "x"} if python else getattr(bench, f"{who}_{c.what}")(c)
        return measured | {"busy": False}

    monkeypatch.setattr(bench, "run", here)
    cell = Cell(what, "bytes" if what == "load" else "tiny", 6, 2, 3, laps=2)
    row = bench.measure_cell(cell, Namespace(peers="python", compile=False))
    wanted = "what size prompt K threads dtype batch unit ours naive peers limit_share peak_gb laps"
    assert set(wanted.split()) <= set(row)
    assert row["ours"] > 0
    assert row["laps"] == 2
    assert row["peak_gb"] > 0
    assert (row["limit_share"] is None) == (what == "load")
    assert (row["naive"] is None) == (what != "train")
    assert row["peers"] == dict.fromkeys(bench.PEERS[what])
    assert json.loads(json.dumps(row)) == row


def test_time_box_keeps_three_laps():
    calls, cell = [], Cell("load", "bytes", 6, 2, 1, laps=10, seconds=0.0)
    assert cell.measure(calls.append)["laps"] == 3
    assert calls == [0, 0, 1, 2]
    assert cell._replace(laps=5, seconds=100.0).measure(calls.append)["laps"] == 5


def test_flags_replace_what_cells_have():
    def cells(device: str = "cpu", **flags) -> list[Cell]:
        args = dict.fromkeys(("only", "size", "prompt", "K", "threads", "dtype"))
        return bench.cells(Namespace(**args | {"device": device, "laps": 1, "seconds": 1} | flags))

    assert [c.what for c in cells()] == ["train"] * 6 + ["sample"] * 2 + ["load"]
    assert all(c.batch * c.K == 16 for c in cells(only=["train"]))
    small = cells(size=["small"], K=[8], dtype=["float32"], only=["train"])
    assert [(c.prompt, c.batch) for c in small] == [(64, 2), (256, 2)]
    assert len(cells(threads=[1, 2])) == 2 * 8 + 1
    assert len(cells("cuda")) == 2 * 3 * 2 * 2 + 2 * 2 * 3 + 1


def test_a_wrong_peers_python_is_named():
    with pytest.raises(OSError, match="/no/python"):
        bench.run(Cell("sample", "tiny", 6, 1, 1), "hf", "/no/python")


@pytest.mark.parametrize("flags", ["--K 0", "--laps 0", "--size huge", "--lap 3", "--out f/in"])
def test_a_mistake_is_one_line(flags, capsys):
    """An OSError, too, be it a full disk or --peers."""
    Path("f").touch()
    with pytest.raises(SystemExit) as stop:
        bench.main(flags.split())
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_one_command_writes_results():
    """The real command, in processes of their own, in its smallest form."""
    flags = "--only train --size small --K 2 --prompt 64 --dtype float32 --threads 1 --laps 1"
    bench.main([*flags.split(), "--device", "cpu", "--out", "here"])
    results = json.loads(Path("here/results.json").read_text())
    assert [r["size"] for r in results["rows"]] == ["small"]
    assert results["rows"][0]["ours"] > 0
    assert results["torch"] == torch.__version__
    assert results["config"]["laps"] == 1
    assert [p.name for p in Path("here").iterdir()] == ["results.json"]
