"""What a GPU must do as a CPU does: the same log-probs, gradients, text and runs. Marked `gpu`, and
skipped without CUDA; what is quick runs on the CPU, too."""

import numpy as np
import pytest
import torch
from conftest import World, records, seeded

from data import Builder, collate
from infra.parallel import rounding
from infra.rows import Report
from model import GPT, GPTConfig, Scorer

CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    ],
)
CONFIG = GPTConfig(block_size=128, vocab_size=300, n_layer=2, n_head=2, n_embd=64)


@pytest.fixture(autouse=True)
def whole_float32():
    """No TF32, whatever ran before."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def sharp_gpt(device: str = "cpu") -> GPT:
    """Random weights larger than a fresh model's, whose log-probs are all near -log 300."""
    gpt = GPT(CONFIG, generator := seeded(0))
    for p in gpt.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return gpt.to(device)


def a_batch(device: str):
    """4 groups of 3 completions, all of the same lengths."""
    rng, builder = np.random.default_rng(0), Builder(CONFIG.block_size, 0, Report())
    for _ in range(4):
        builder.add(rng.integers(1, 300, 40), [rng.integers(1, 300, 29) for _ in range(3)])
    return collate(builder.groups(), np.arange(4), rounding(torch.device(device))).to(device)


def gradient(scorer, logps: torch.Tensor) -> torch.Tensor:
    gradients = torch.autograd.grad(logps.square().mean(), list(scorer.parameters()))
    assert {g.dtype for g in gradients} == {torch.float32}
    return torch.cat([g.flatten() for g in gradients])


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_bf16_log_probs_are_near_float32(device):
    """Measured on a CPU, in nats a token: 0.017 at most, 0.004 on average. Allowed: three times
    that; and gradients, which are float32, within a tenth of their size."""
    scorer, batch = Scorer(sharp_gpt(device)), a_batch(device)
    exact = scorer(batch)
    with torch.autocast(device, torch.bfloat16):
        logps = scorer(batch)
    gap = (logps - exact)[batch.targets >= 0].abs()
    assert logps.dtype == torch.float32
    assert 0 < gap.max() < 0.05
    assert gap.mean() < 0.012
    x, y = gradient(scorer, exact), gradient(scorer, logps)
    assert (y - x).norm() < 0.1 * x.norm()


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_compiled_equals_eager(device):
    """Log-probs within 1e-4 and gradients within 1e-3 of their size, in float32. On a CPU the step
    is captured and differentiated as for a GPU, but no code is generated: that takes a minute."""
    gpt, batch = sharp_gpt(device), a_batch(device)
    backend = "inductor" if device == "cuda" else "aot_eager"
    scorers = Scorer(gpt), torch.compile(Scorer(gpt), backend=backend)
    a, b = (scorer(batch) for scorer in scorers)
    torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)
    x, y = gradient(gpt, a), gradient(gpt, b)
    assert (y - x).norm() < 1e-3 * x.norm()


def test_cuda_log_probs_are_the_cpus():
    """float32: within 1e-3 nats a token, also where a GPU's batch is padded to multiples of 64."""
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    a, b = a_batch("cpu"), a_batch("cuda")
    with torch.no_grad():
        x, y = Scorer(sharp_gpt())(a), Scorer(sharp_gpt("cuda"))(b).cpu()
    x, y = x[a.targets >= 0], y[b.targets.cpu() >= 0]
    torch.testing.assert_close(y, x, rtol=0, atol=1e-3)


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_cuda_draws_the_cpus_text(temperature, device):
    """The same uniforms give the same tokens; a near tie would show as one unlike row."""
    prompts, new = [[1, 2, 3], [4], [5, 6, 7, 8, 9]], 40
    uniform = torch.rand(2 * len(prompts), new, generator=seeded(1))
    texts = [
        sharp_gpt(d).generate(prompts, new, 2, temperature, eot=0, uniform=uniform)
        for d in ("cpu", device)
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("device", [CUDA])
def test_a_cuda_run_is_near_the_cpus(device, world: World):
    """sft and exo through train.main in float32: held-out losses within 1e-3; and in bfloat16, the
    choice on cuda, the run ends and learns."""

    def losses(stage: str, *more: str) -> list[float]:
        out = world.run(stage, *more, out="-".join([stage, *more]).replace("--", ""))
        return [r["loss"] for r in records(out, "eval")]

    for stage in ("sft", "exo"):
        on_cpu, there = (
            losses(stage, "--dtype", "float32", "--device", d) for d in ("cpu", device)
        )
        assert there == pytest.approx(on_cpu, abs=1e-3)
    first, *_, last = losses("exo", "--device", device)
    assert last < first
