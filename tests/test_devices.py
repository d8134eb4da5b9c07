"""What a CPU can prove about a GPU: no mixed devices, no waiting in a step, few graphs, and digits
where GPT-2's logits lie.

A build of torch without CUDA cannot index, nor differentiate, what is on `cuda`, even where nothing
is computed. So steps are tried on `meta`, torch's other device without numbers, with lengths
rounded as on a GPU; on `cuda` itself where there is one.
"""

import contextlib
import functools

import numpy as np
import pytest
import torch
from conftest import STAGES
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import (
    DynamicOutputShapeException,
    FakeTensorDeviceMismatchError,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model
import train
from data import Builder, Report, collate
from infra import parallel
from model import GPT, GPTConfig, Scorer

GPT2_WORDS = 50257
aten = torch.ops.aten

# ------------------------------------------------------------------------------
# A device of which only shapes are known


class Device(TorchDispatchMode):
    """Tensors on this kind of device have no numbers, and meet no tensor of the host. Whatever the
    host asks for is 0, and counted: there a GPU would be waited for. (What has a shape that depends
    on numbers, like nonzero, raises an error of torch's.)"""

    def __init__(self, kind: str):
        super().__init__()
        self.device, self.fake = torch.device(kind), FakeTensorMode(allow_non_fake_inputs=True)
        self.waits = []

    def __enter__(self):
        self.fake.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.fake.__exit__(*error)

    def has(self, x) -> bool:
        device = x.device if isinstance(x, torch.Tensor) else x
        return isinstance(device, torch.device) and device.type == self.device.type

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not any(map(self.has, tree_leaves((args, kwargs)))):
            with unset_fake_temporarily():
                return function(*args, **kwargs)
        there = kwargs.get("device") or self.device
        copied = function is aten._to_copy.default and not self.has(there)
        copied |= function is aten.copy_.default and not self.has(args[0])
        if copied or function is aten._local_scalar_dense.default:
            self.waits.append("copy" if copied else "item")
            with unset_fake_temporarily():
                zeros = torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
                return zeros if copied else zeros.item()
        return function(*args, **kwargs)

    def move(self, module: torch.nn.Module) -> None:
        """In place, so that everyone who holds the module sees it."""
        for part in module.modules():
            for name, p in part._parameters.items():
                moved = torch.nn.Parameter(p.detach().to(self.device), p.requires_grad)
                part._parameters[name] = moved


WITHOUT = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch cannot index it: no CUDA")
CUDA = pytest.param("cuda:0", marks=[pytest.mark.gpu, WITHOUT])


@pytest.fixture(params=["meta", CUDA])
def device(request, monkeypatch) -> Device:
    if request.param == "meta":  # has no autocast
        monkeypatch.setattr(model, "compute_dtype", lambda weight: weight.dtype)
        monkeypatch.setattr(parallel, "autocast", lambda *_: contextlib.nullcontext())
        monkeypatch.setattr(parallel, "rounding", lambda _: 64)
    return Device(request.param)


def test_the_device_itself_refuses_mixtures_and_counts_waits():
    with Device("meta") as device:
        x = torch.ones(3).to("meta")
        for wait in (x.any().__bool__, x.sum().item, x.cpu, x.tolist):
            wait()
        torch.ones(3).copy_(x)
        assert device.waits == ["item", "item", "copy", *["item"] * 3, "copy"]  # a list: one by one
        with pytest.raises(FakeTensorDeviceMismatchError):
            x + torch.ones(3)
        for shape in (x.nonzero, lambda: x[x > 0], lambda: x.masked_select(x > 0)):
            with pytest.raises(DynamicOutputShapeException):
                shape()


# ------------------------------------------------------------------------------
# Stages and sampling


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_stays_on_its_device_and_waits_once(stage, device, world):
    """To see whether the gradient is finite. Groups are ragged; completions are drawn already, on
    the CPU. AdamW is torch's plain one: none is fused on meta."""
    s, stage = world.task(stage, "--data", world.rewards, "--batch_size", 5)
    ids = stage.ids(0)
    with device:
        device.move(stage.policy.scorer)
        stage.policy.device = device.device
        if hasattr(stage, "stored"):  # of PPO's round
            stage.stored = {k: v.to(device.device) for k, v in stage.stored.items()}
        optimizer = torch.optim.AdamW(stage.policy.scorer.parameters())
        figures, _ = train.update(s, stage, optimizer, ids, 1e-3)
    assert device.waits == ["item"]
    assert all(map(device.has, figures.values()))


@pytest.mark.parametrize("how", [{}, {"temperature": 0.7, "top_k": 5}, {"temperature": 0}], ids=str)
def test_sampling_stays_on_its_device_and_waits_once_in_16_tokens(how, device):
    """Beside that, once before the first, whether prompts are of unlike lengths (and once more
    where a row has ended, how many have not)."""
    gpt = GPT(GPTConfig(block_size=64, vocab_size=300, n_layer=1, n_head=2, n_embd=8))
    with device:
        device.move(gpt)
        texts = gpt.generate([[1, 2, 3], [4]], max_new_tokens=32, n=2, eot=299, **how)
    assert texts == [[0] * 32] * 4
    assert device.waits == ["item"] * (1 + 32 // 16 + 4 * 32)  # the text is read one by one


def test_logits_of_bfloat16_are_float32_on_cuda():
    with Device("cuda:0") as device, torch.no_grad():
        x, weight = (torch.ones(n, 8).to(device.device, torch.bfloat16) for n in (3, 5))
        logits = model.wide_logits(x, weight)
    assert device.has(logits)
    assert logits.dtype == torch.float32


# ------------------------------------------------------------------------------
# Graphs


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
    assert not counters["graph_break"] | counters["unimplemented"] | counters["resumes"]
    assert gpt.wte.weight.grad.isfinite().all()


def ragged(seed: int):
    """Batches of 2 or 3 pairs, for ever."""
    rng = np.random.default_rng(seed)
    while True:
        n, longest = rng.integers(2, 4), rng.integers(5, 190)
        builder = Builder(512, GPT2_WORDS - 1, Report())
        for _ in range(n):
            lengths = rng.integers(1, (190, longest, longest))
            prompt, *pair = (rng.integers(0, GPT2_WORDS - 1, size) for size in lengths)
            builder.add(prompt, pair)
        yield collate(builder.groups(), np.arange(n), round_to=64)


# ------------------------------------------------------------------------------
# Digits


@pytest.mark.parametrize("shift", [-40.0, -80.0])
def test_bfloat16_costs_no_digits_where_gpt2s_logits_lie(shift):
    """Against float64 on the same rounded factors: 1e-3 nats a token (measured: 5e-5). Gradients
    are products of bfloat16: 1 % for the head's weight, 10 % for the features, where what softmax
    minus one-hot lacks to a sum of 0 is multiplied by the shift (measured at -80: 0.1 and 6 %)."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 64, generator=generator) for n in (48, GPT2_WORDS))
    weight *= 0.3
    x[:, 0], weight[:, 0] = 1.0, shift
    factors = x.bfloat16(), weight.bfloat16()
    targets = torch.randint(GPT2_WORDS, (48,), generator=generator)
    exact = [f.double().requires_grad_() for f in factors]
    rounded = [f.float().requires_grad_() for f in factors]
    expected = (exact[0] @ exact[1].T).log_softmax(-1)[torch.arange(48), targets]
    with torch.autocast("cpu", torch.bfloat16):
        logps = model.token_logps(*rounded, targets)
    assert (logps - expected).abs().max() < 1e-3
    got, want = (torch.autograd.grad(y.sum(), f) for y, f in ((logps, rounded), (expected, exact)))
    assert (got[0] - want[0]).norm() < 0.1 * want[0].norm()
    assert (got[1] - want[1]).norm() < 0.01 * want[1].norm()
