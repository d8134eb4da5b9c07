"""What a CPU can prove about a GPU: no mixed devices, no waiting in a step, few graphs, and digits
where GPT-2's logits lie."""

import functools

import numpy as np
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from data import Builder, Report, collate
from infra import parallel
from model import GPT, GPTConfig, Scorer

torch.set_num_threads(1)
GPT2_WORDS = 50257


def test_ragged_batches_compile_to_at_most_3_graphs_without_a_break(monkeypatch):
    """20 batches with lengths rounded as on a GPU, at GPT-2's vocabulary. Captured and
    differentiated as there, but no code is generated: that would take minutes."""
    torch._dynamo.reset()
    counters.clear()
    counting = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counting))
    gpt = GPT(GPTConfig(block_size=512, vocab_size=GPT2_WORDS, n_layer=1, n_head=1, n_embd=8))
    module, rng = parallel.wrap(Scorer(gpt), torch.device("cpu"), compile=True), ragged(0)
    shapes = set()
    for batch in (next(rng) for _ in range(20)):
        shapes.add((*batch.prefix.shape, *batch.idx.shape, len(batch.scored)))
        module(batch).sum().backward()
    assert len(shapes) > 10
    assert counting.frame_count <= 3
    assert not counters["graph_break"]
    assert gpt.wte.weight.grad.isfinite().all()


def ragged(seed: int):
    """Batches of 2 or 3 pairs, for ever."""
    rng = np.random.default_rng(seed)
    while True:
        n, (prompt, completion) = rng.integers(2, 4), rng.integers(5, 200, 2)
        builder = Builder(512, GPT2_WORDS - 1, Report())
        for _ in range(n):
            ids, *pair = (
                rng.integers(0, GPT2_WORDS - 1, rng.integers(1, longest))
                for longest in (prompt, completion, completion)
            )
            builder.add(ids, pair)
        yield collate(builder.groups(), np.arange(n), round_to=64)
