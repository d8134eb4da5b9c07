"""What a GPU must do as a CPU does: the same log-probs, gradients, text and runs. Marked `gpu`, and
skipped without CUDA; what is quick runs on the CPU, too."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import STAGES, records, seeded

import train
from data import Builder, Groups, byte_encoding, collate
from infra.parallel import rounding
from infra.rows import Report
from model import CHUNK, GPT, GPTConfig, Scorer

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


def groups_of(config: GPTConfig, prompt: int, completion: int, K: int, n: int) -> Groups:
    """n groups, all of the same lengths; the end of text is one of the completion's tokens."""
    rng, builder = np.random.default_rng(0), Builder(prompt + completion, 0, Report())
    words = config.vocab_size
    for _ in range(n):
        completions = [rng.integers(1, words, completion - 1) for _ in range(K)]
        builder.add(rng.integers(1, words, prompt), completions, [float(k) for k in range(K)])
    return builder.groups()


def a_batch(device: str):
    groups = groups_of(CONFIG, 40, 30, 3, 4)
    return collate(groups, np.arange(4), rounding(torch.device(device))).to(device)


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


def losses(out: Path, kind: str) -> list[float]:
    return [r["loss"] for r in records(out, kind)]


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("stage", STAGES)
def test_two_steps_of_every_stage_are_the_cpus(stage, device, world):
    """In float32, losses within 1e-3; and in bfloat16, the choice on cuda, the run ends."""
    steps = "--max_iters", 2, "--dtype", "float32", "--device"
    cpu, card = world.run(stage, *steps, "cpu"), world.run(stage, *steps, device, out="card")
    assert losses(card, "train") == pytest.approx(losses(cpu, "train"), abs=1e-3)
    world.run(stage, "--max_iters", 2, "--device", device, out="bf16")


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_resumes_on_the_card(stage, device, world):
    """Losses within 1e-3 of those of a run that was never stopped: a card adds in any order."""
    steps = "--lr_decay", "constant", "--warmup_iters", 0, "--round_iters", 1, "--ppo_epochs", 1
    steps += "--dtype", "float32", "--device", device
    whole = world.run(stage, *steps, out="whole")
    world.run(stage, *steps, "--max_iters", 3, out="parts")
    parts = world.run(stage, *steps, "--resume", out="parts")
    assert losses(parts, "train") == pytest.approx(losses(whole, "train"), abs=1e-3)


# ------------------------------------------------------------------------------
# Memory


def computed_bytes(config: GPTConfig, prompt: int, completion: int, K: int, B: int) -> int:
    """The peak of a float32 step beside weights and AdamW's 8 bytes a weight.

    Either all that the backward pass needs is there and its first part, the head's, is computed: of
    each token and layer 17 C numbers (both LayerNorms' inputs and outputs 4, qkv 3, attention's
    output 2, MLP 8), and of each completion the keys and values that it reads, its prompt's among
    them; or, at its end, all gradients are, the embedding's twice, since the head is the same
    matrix."""
    C, L, V = config.n_embd, config.n_layer, config.vocab_size
    tokens, scored = B * (prompt - 1 + K * completion), B * K * completion
    read = 2 * C * B * K * (prompt - 1 + completion)
    head = scored * min(CHUNK, V) + V * C
    weights = sum(p.numel() for p in GPT(config).parameters())
    return 4 * max(L * (17 * C * tokens + read) + 3 * C * tokens + head, weights + V * C)


def measured_bytes(step, device: str) -> int:
    """The largest sum of what `step` allocates and has not given back."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as seen:
        step()
    found = (e.nbytes() for e in seen.profiler.kineto_results.events() if e.name() == "[memory]")
    return max(itertools.accumulate(found))


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize(
    ("config", "text"),
    [
        (GPTConfig(256, 5000, 4, 4, 128), (64, 64, 2, 8)),
        (GPTConfig(512, 300, 6, 4, 128), (256, 64, 8, 2)),  # a long prompt, shared by 8
        (GPTConfig(128, 20000, 4, 4, 128), (8, 8, 2, 2)),  # more gradients than activations
    ],
    ids=["pairs", "shared", "weights"],
)
def test_memory_of_a_step_is_as_computed(config, text, device):
    """Within 15 % (measured on a CPU: 4 %): a prompt is held once a group, logits a part at a
    time."""
    groups, gpt = groups_of(config, *text), GPT(config).to(device)
    s = train.Settings("exo", data=["-"], init="-", dtype="float32")
    policy = train.Policy(gpt, "bytes", byte_encoding(), 1.0, torch.device(device))
    stage = train.Preference(s, policy, groups, None)
    optimizer = train.adamw(gpt, s, 1e-3)

    def step():
        train.update(s, stage, optimizer, np.arange(text[-1]), 1e-3)

    step()  # AdamW's memory
    assert measured_bytes(step, device) == pytest.approx(computed_bytes(config, *text), rel=0.15)
