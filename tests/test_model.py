"""
The GPT against twins that share no code with it: a forward pass with attention as Python loops, one
sequence at a time instead of padded groups, no cache instead of the cache. Everything that can be
exact is float64, and every parameter of ordinary size (conftest.tiny_gpt).
"""

import itertools
import math

import pytest
import torch
from conftest import EOT, RAGGED, V, often, one_batch, pack, rand, seeded, slow_logps
from conftest import tiny_gpt as tiny
from hypothesis import given
from hypothesis import strategies as st

import model
from model import GPT, GPTConfig, Scorer, Tree, draw, token_logps


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative to the largest number (or to 1)."""
    assert a.shape == b.shape
    if not a.numel():
        return 0.0
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1))


def gradients(module, value: torch.Tensor) -> list:
    return list(torch.autograd.grad(value, list(module.parameters()), materialize_grads=True))


def all_near(ours, theirs, tolerance: float) -> None:
    """Two lists of gradients, each relative to its own largest number (or to 1)."""
    assert max(far(a, b) for a, b in zip(ours, theirs, strict=True)) < tolerance


def all_equal(ours, theirs) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# ------------------------------------------------------------------------------
# The forward pass


def plain_forward(gpt: GPT, ids: list[int]) -> torch.Tensor:
    """GPT-2 from its parameters alone: attention query by query and head by head -> (T, V)."""
    p, config = dict(gpt.named_parameters()), gpt.config
    C, H = config.n_embd, config.n_head
    D = C // H

    def norm(x, name):
        mean = x.mean(-1, keepdim=True)
        var = ((x - mean) ** 2).mean(-1, keepdim=True)
        return (x - mean) / (var + 1e-5).sqrt() * p[name + ".weight"] + p[name + ".bias"]

    def linear(x, name):
        return x @ p[name + ".weight"].T + p[name + ".bias"]

    x = torch.stack([p["wte.weight"][i] + p["wpe.weight"][t] for t, i in enumerate(ids)])
    for n in range(config.n_layer):
        at = f"h.{n}."
        qkv = linear(norm(x, at + "ln_1"), at + "attn.c_attn")
        rows = []
        for t in range(len(ids)):
            heads = []
            for h in range(H):
                here = slice(h * D, (h + 1) * D)
                q, k, v = qkv[t, :C][here], qkv[:, C : 2 * C][:, here], qkv[:, 2 * C :][:, here]
                weight = torch.stack([q @ k[s] / math.sqrt(D) for s in range(t + 1)]).exp()
                heads.append(sum(w * v[s] for s, w in enumerate(weight / weight.sum())))
            rows.append(torch.cat(heads))
        x = x + linear(torch.stack(rows), at + "attn.c_proj")
        m = linear(norm(x, at + "ln_2"), at + "mlp.c_fc")
        m = 0.5 * m * (1 + torch.tanh(math.sqrt(2 / math.pi) * (m + 0.044715 * m**3)))
        x = x + linear(m, at + "mlp.c_proj")
    return norm(x, "ln_f") @ p["wte.weight"].T


@pytest.mark.parametrize("sizes", [{}, {"n_head": 4, "n_layer": 3}, {"n_embd": 1, "n_head": 1}])
def test_forward_equals_gpt2_written_with_loops(sizes):
    """Guards the architecture: pre-norm, tanh GELU, scale 1/sqrt(head size), causality, tied
    head, the order q, k, v, that heads are slices of C, and GPT-2's names of weights."""
    gpt = tiny(1, **sizes)
    idx = torch.randint(V, (3, 9), generator=seeded(2))
    twin = torch.stack([plain_forward(gpt, row) for row in idx.tolist()])
    logits = gpt(idx)
    assert logits.shape == (3, 9, V)
    assert far(logits, twin) < 1e-10
    weight, parameters = rand(*twin.shape, seed=3), dict(gpt.named_parameters())
    expected = torch.autograd.grad((twin * weight).sum(), parameters.values())  # it reads them all
    all_near(gradients(gpt, (logits * weight).sum()), expected, 1e-9)
    assert parameters["h.0.mlp.c_fc.weight"].shape == (4 * gpt.config.n_embd, gpt.config.n_embd)
    assert set(gpt.state_dict()) == set(parameters)


def test_a_fresh_gpt_has_gpt2s_initial_scales_and_depends_on_its_generator_alone():
    """Guards: a biased start, unscaled residual projections, weights from the global generator."""
    config = GPTConfig(block_size=64, vocab_size=300, n_layer=8, n_head=2, n_embd=64)
    torch.manual_seed(1)
    gpt, wide = GPT(config, seeded(7)), dict(GPT(config, init_std=0.5).named_parameters())
    torch.manual_seed(2)
    same, other = GPT(config, seeded(7)), GPT(config)
    assert all_equal(gpt.parameters(), same.parameters())
    assert not torch.equal(gpt.wte.weight, other.wte.weight)
    for name, p in gpt.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif "ln_" in name:
            assert torch.equal(p, torch.ones_like(p)), name
        else:
            std = 0.02 / math.sqrt(2 * 8) if "c_proj" in name else 0.02
            assert abs(p.std().item() / std - 1) < 0.06, name
            std *= 1 if name.startswith("w") else 25
            assert abs(wide[name].std().item() / std - 1) < 0.06, name


def test_forward_reads_block_size_tokens_and_not_one_more():
    gpt = tiny(block_size=6)
    assert gpt(torch.zeros(2, 6, dtype=torch.long)).shape == (2, 6, V)
    with pytest.raises(ValueError, match="7 tokens are longer than block_size = 6"):
        gpt(torch.zeros(2, 7, dtype=torch.long))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        *(({name: 0}, f"^{name} must be at least 1, got 0$") for name in vars(GPTConfig())),
        ({"n_embd": 10, "n_head": 4}, r"^n_embd \(10\) must be divisible by n_head \(4\)$"),
    ],
)
def test_config_refuses_sizes_that_make_no_model(sizes, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**sizes)


def test_gradient_checkpointing_changes_memory_and_nothing_else():
    """The same logits and gradients, bit for bit; less is kept for the backward pass."""
    gpt = GPT(GPTConfig(32, 50, 3, 2, 16))
    idx = torch.randint(0, 50, (4, 20), generator=seeded(0))
    found = []
    for gpt.gradient_checkpointing in (False, True):
        kept = []
        pack = lambda x, kept=kept: kept.append(x.numel()) or x  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = gpt(idx).square().mean()
        found.append((loss, gradients(gpt, loss), sum(kept)))
    (a, grads, much), (b, same, little) = found
    assert torch.equal(a, b)
    assert all_equal(grads, same)
    assert little < much / 2


# ------------------------------------------------------------------------------
# Padded groups against one sequence at a time

token = st.integers(0, V - 1)
completion = st.tuples(st.lists(token, max_size=5), st.booleans())
group = st.tuples(
    st.lists(token, min_size=1, max_size=6), st.lists(completion, min_size=1, max_size=4)
)
NO_PREFIX = [([3], [[1, 2], [4]]), ([7], [([5, 6, 1], False)])]
# a text of exactly block_size = 6 (its end of text is never read), and a prompt of nearly all of it
FULL = [([1, 2, 3], [[4, 5, 6], [4]]), ([1, 2, 3, 4, 5], [[6]])]


def check_scorer(raw, round_to, temperature, dtype, tolerance, seed=0, block_size=24):
    gpt, groups = tiny(seed, dtype, block_size=block_size), pack(raw)
    batch = one_batch(groups, round_to)
    logps = Scorer(gpt, temperature)(batch)
    assert logps.dtype == dtype
    assert logps.shape == batch.targets.shape
    assert not logps[batch.targets < 0].any()
    texts = [(g, k) for g, (_, ys) in enumerate(raw) for k in range(len(ys))]
    twin = torch.cat([slow_logps(gpt, groups, g, k, temperature) for g, k in texts]).to(dtype)
    logps = logps[batch.targets >= 0]
    assert far(logps, twin) < tolerance
    weight = rand(*logps.shape, seed=seed).to(dtype)
    ours = gradients(gpt, (logps * weight).sum())
    # in float32 the sums over tokens run in another order: the yardstick is all gradients together
    theirs = gradients(gpt, (twin * weight).sum() + 0 * gpt.wte.weight.sum())
    size = max(1.0, *(float(g.abs().max()) for g in theirs))
    for a, b in zip(ours, theirs, strict=True):
        assert float((a - b).abs().max()) < tolerance * size


@given(
    st.lists(group, min_size=1, max_size=4),
    st.sampled_from([1, 8]),
    st.sampled_from([1.0, 0.7]),
    st.sampled_from([3, 4096]),
    st.integers(0, 99),
)
@often
def test_scorer_equals_a_loop_over_sequences(monkeypatch, raw, round_to, temperature, chunk, seed):
    """Values and gradients. Guards: a completion that reads another's tokens or the padding of a
    short prompt, positions that start at the longest prompt, gradients lost on the way from the
    completions to the shared prompt, a cut completion scored on end-of-text."""
    monkeypatch.setattr(model, "CHUNK", chunk)
    check_scorer(raw, round_to, temperature, torch.float64, 1e-10, seed)


@pytest.mark.parametrize(
    ("raw", "block_size"),
    [(NO_PREFIX, 24), (RAGGED, 24), (RAGGED[:1], 24), (NO_PREFIX + RAGGED, 24), (FULL, 6)],
)
@pytest.mark.parametrize("round_to", [1, 8])
def test_scorer_equals_a_loop_at_its_edges_and_in_float32(raw, block_size, round_to):
    """P = 0 takes another branch (no prefix level at all); rounded lengths may exceed block_size;
    float32 is what training uses."""
    check_scorer(raw, round_to, 1.3, torch.float64, 1e-10, block_size=block_size)
    check_scorer(raw, round_to, 1.3, torch.float32, 1e-5, block_size=block_size)


# ------------------------------------------------------------------------------
# The head in chunks


def head_case(dtype=torch.float64, S=17, C=6):
    x, weight, grad = rand(S, C, seed=8), rand(V, C, seed=9), rand(S, seed=10)
    targets = torch.randint(V, (S,), generator=seeded(11))
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets, grad.to(dtype)


def plain_logps(x, weight, targets, temperature=1.0):
    """Twin of token_logps: all logits, and autograd."""
    return (x @ weight.T / temperature).log_softmax(-1)[torch.arange(len(x)), targets]


@pytest.fixture
def products(monkeypatch) -> list:
    """(a, b, numbers in the result) of every torch.mm."""
    seen, mm = [], torch.mm
    monkeypatch.setattr(
        torch, "mm", lambda a, b, out: seen.append((a, b, out.numel())) or mm(a, b, out=out)
    )
    return seen


@pytest.mark.parametrize("chunk", [1, 4, V - 1, V, 4096])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_chunked_logps_equal_plain_autograd(chunk, temperature, products, monkeypatch):
    """Chunks of one word up to all of them, last chunks that are not full. Guards the hand-written
    gradient: sign, temperature, target, chunk offsets. In both passes the logits held at once are
    those of one chunk."""
    x, weight, targets, grad = head_case()
    plain = plain_logps(x, weight, targets, temperature)
    expected = torch.autograd.grad(plain, (x, weight), grad)
    monkeypatch.setattr(model, "CHUNK", chunk)
    logps = token_logps(x, weight, targets, temperature)
    assert far(logps, plain) < 1e-12
    all_near(torch.autograd.grad(logps, (x, weight), grad), expected, 1e-12)
    sizes = [len(x) * min(chunk, V - start) for start in range(0, V, chunk)]
    assert [n for a, _, n in products if a.shape == x.shape] == 2 * sizes


@pytest.mark.parametrize("chunk", [4, 4096])
def test_head_under_bf16_autocast_multiplies_in_bf16_and_returns_float32(
    chunk, products, monkeypatch
):
    """bf16 keeps 8 bits: logits of size 7 are off by 7 * 2^-8 = 0.03, so log-probs agree to 0.1
    and gradients to 0.05 of their size. Guards a backward pass that, run outside autocast,
    computes other logits than the forward pass did, and gradients left in bf16. On a CPU factors
    are rounded to bf16, and multiplied in float32."""
    monkeypatch.setattr(model, "CHUNK", chunk)
    x, weight, targets, grad = head_case(torch.float32)
    plain = plain_logps(x, weight, targets, 0.8)
    expected = torch.autograd.grad(plain, (x, weight), grad)
    with torch.autocast("cpu", torch.bfloat16):
        logps = token_logps(x, weight, targets, 0.8)
    got = torch.autograd.grad(logps, (x, weight), grad)
    factors = [x for a, b, _ in products for x in (a, b)]
    assert factors
    assert all(torch.equal(x, x.bfloat16().to(x.dtype)) for x in factors)
    assert logps.dtype == got[0].dtype == got[1].dtype == torch.float32
    assert 0 < far(logps, plain) < 0.1
    all_near(got, expected, 0.05)


# ------------------------------------------------------------------------------
# Trees of more than two levels


def test_tree_enumerates_all_strings_and_their_probabilities():
    """The exact world rests on this: level t holds all V^t strings, each continuing its parent.
    Guards rows that attend to a cousin's keys; the probabilities must sum to 1 as well."""
    size, T = 3, 4
    gpt = tiny(11, vocab_size=size, block_size=T)
    rows = [size**t for t in range(T)]
    idx = torch.cat([torch.arange(n) % size for n in rows])
    pos = torch.cat([torch.full((n,), t) for t, n in enumerate(rows)])
    x = gpt.hidden(idx, pos, Tree(gpt.config.n_head, [(n, 1) for n in rows]))
    total = torch.zeros(1, dtype=torch.float64)
    for level in gpt.head(x).log_softmax(-1).split(rows):
        total = (total[:, None] + level).flatten()  # last token fastest
    strings = list(itertools.product(range(size), repeat=T))
    table = gpt(torch.tensor([[0, *s[:-1]] for s in strings])).log_softmax(-1)
    brute = table.gather(-1, torch.tensor(strings)[:, :, None])[:, :, 0].sum(-1)
    assert far(total, brute) < 1e-12
    assert abs(total.exp().sum().item() - 1) < 1e-12
    weight = rand(len(strings), seed=1)
    all_near(gradients(gpt, weight @ total), gradients(gpt, weight @ brute), 1e-10)


@pytest.mark.parametrize("shapes", [[(2, 3), (4, 2), (12, 3)], [(1, 1), (3, 4)], [(3, 2), (3, 1)]])
def test_tree_levels_of_several_tokens_equal_a_plain_forward(shapes):
    """Guards the causal mask below the root: a row sees all its ancestors, and of itself only the
    past."""
    gpt, gen = tiny(12), seeded(13)
    levels = [torch.randint(V, shape, generator=gen) for shape in shapes]
    pos, depth = [], 0
    for rows, time in shapes:
        pos.append(torch.arange(depth, depth + time).repeat(rows))
        depth += time
    idx = torch.cat([level.flatten() for level in levels])
    x = gpt.hidden(idx, torch.cat(pos), Tree(gpt.config.n_head, shapes))
    ours = gpt.head(x).split([rows * time for rows, time in shapes])
    for i, (rows, time) in enumerate(shapes):
        path = [above.repeat_interleave(rows // len(above), 0) for above in levels[: i + 1]]
        assert far(ours[i].view(rows, time, V), gpt(torch.cat(path, 1))[:, -time:]) < 1e-12


# ------------------------------------------------------------------------------
# Generation


def inverse_cdf(logits: list[float], u: float, temperature: float, top_k: int | None) -> int:
    """Twin of draw for one row: a Python loop over the tokens."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    if temperature == 0:
        return order[0]
    kept = sorted(order[:top_k])
    weight = [math.exp((logits[i] - logits[order[0]]) / temperature) for i in kept]
    sums = list(itertools.accumulate(weight))
    return next(i for i, total in zip(kept, sums, strict=True) if total > u * sums[-1])


PROMPTS = [
    [[1, 2, 3, 4, 5], [6], [7, 8, 9]],  # gaps in the cache, and a prompt with no prefix
    [[3, 1, 4], [1, 5, 9]],  # equal lengths: no mask
    [[2], [7]],  # nothing to prefill
]


@pytest.mark.parametrize("prompts", PROMPTS)
@pytest.mark.parametrize("eot", [None, 0, 4, EOT])
@pytest.mark.parametrize("how", [(0.0, None), (1.0, None), (0.8, 5), (2.0, 1)])
def test_every_generated_token_is_the_draw_from_a_plain_forward(prompts, eot, how):
    """n = 3, unequal prompts, rows that stop early. Guards wrong positions or gaps in the cache,
    rows mixed up when some leave, tokens after end-of-text, uniforms of another row or step: a
    row's text depends on its own prompt and draws alone."""
    temperature, top_k = how
    for seed in (0, 1, 25):
        gpt, gen = tiny(seed, scale=0.5, block_size=45), seeded(seed)
        texts = gpt.generate(prompts, 40, 3, temperature, top_k, eot, gen)
        uniform = torch.rand(len(texts), 40, generator=gen.manual_seed(seed)).tolist()
        assert len(texts) == 3 * len(prompts)
        for i, (text, row) in enumerate(zip(texts, uniform, strict=True)):
            prompt = prompts[i // 3]
            with torch.no_grad():
                logits = gpt(torch.tensor([prompt + text]))[0, len(prompt) - 1 : -1].tolist()
            drawn = [inverse_cdf(x, row[t], temperature, top_k) for t, x in enumerate(logits)]
            assert text == drawn
            assert eot not in text[:-1]
            assert len(text) == 40 or text[-1] == eot


def test_finished_rows_leave_the_batch_and_the_loop_ends_early(monkeypatch):
    """Without this the test above might never see a row leave. Row by row the answer is the same;
    here the work must shrink too."""
    sizes, calls, select, hidden = [], [], model.Cache.select, GPT.hidden
    monkeypatch.setattr(
        model.Cache, "select", lambda self, rows: sizes.append(len(rows)) or select(self, rows)
    )
    monkeypatch.setattr(GPT, "hidden", lambda self, *a: calls.append(1) or hidden(self, *a))
    gpt = tiny(0, scale=0.5, block_size=100)
    texts = gpt.generate([[1, 2], [3]], 96, 8, 1.0, None, 9, seeded(0))
    assert sizes[0] == 16
    assert sizes == sorted(sizes, reverse=True)
    assert 0 < sizes[-1] < 16
    longest = max(map(len, texts))
    assert 16 < longest < 80  # some row lived on after others had left, none until the end
    assert len(calls) == 1 + 16 * math.ceil(longest / 16)


def test_generate_stops_at_max_new_tokens_with_the_last_token_eot():
    """A completion of exactly max_new_tokens whose last one is end-of-text keeps it."""
    gpt = tiny(17, scale=0.5)
    whole = gpt.generate([[1, 2, 3]], 12, temperature=0)[0]
    assert len(whole) == 12
    for length, eot in enumerate(whole, 1):
        text = gpt.generate([[1, 2, 3]], length, temperature=0, eot=eot)[0]
        assert text == whole[: whole.index(eot) + 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "empty"),
        ({"prompts": [[]]}, "a prompt needs a token; for an empty one use"),
        ({"prompts": [[1], []]}, "a prompt needs a token; for an empty one use"),
        ({"temperature": -0.1}, "temperature must be 0 or more, got -0.1"),
        ({"temperature": math.nan}, "temperature must be 0 or more, got nan"),
        ({"temperature": math.inf}, "temperature must be 0 or more, got inf"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"max_new_tokens": 4}, "need 9 positions together, block_size is 8"),
    ],
)
def test_generate_refuses_what_makes_no_sense(change, message):
    """One token more than fills block_size, too."""
    gpt, fits = tiny(18, block_size=8), {"prompts": [[1] * 5, [2]], "max_new_tokens": 3}
    assert [len(text) for text in gpt.generate(**fits)] == [3, 3]
    with pytest.raises(ValueError, match=message):
        gpt.generate(**(fits | change))


def test_generate_leaves_inputs_weights_and_gradients_alone():
    """Guards prompts padded in place, and a graph kept alive by sampling."""
    gpt, prompts = tiny(19).train(), [[1, 2, 3], [4]]
    weights = [p.detach().clone() for p in gpt.parameters()]
    assert all(type(i) is int for text in gpt.generate(prompts, 5, n=2) for i in text)
    assert prompts == [[1, 2, 3], [4]]
    assert all(p.grad is None and p.requires_grad for p in gpt.parameters())
    assert all_equal(gpt.parameters(), weights)
    assert torch.is_grad_enabled()
    assert gpt.training


def test_sampling_under_bf16_autocast_caches_bf16_and_draws_from_float32_logits(monkeypatch):
    """On a GPU keys and values are bf16: a float32 buffer would double the memory. Tokens are
    compared with the float32 ones only where the likeliest leads by far (one step). With logits
    near -80 the likeliest token by little is drawn, not the first of a tie."""
    dtypes, init = [], model.Cache.__init__
    monkeypatch.setattr(
        model.Cache, "__init__", lambda self, *a: init(self, *a) or dtypes.append(self.kv.dtype)
    )
    gpt, prompts = tiny(20, torch.float32), [[1, 2, 3], [4], [5, 6]]
    plain = gpt.generate(prompts, 1, temperature=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert [text[:1] for text in gpt.generate(prompts, 8, temperature=0)] == plain
        assert dtypes == [torch.float32, torch.bfloat16]
        with torch.no_grad():
            gpt.ln_f.weight.zero_()
            gpt.ln_f.bias.copy_(torch.eye(8)[0])
            gpt.wte.weight[:, 0] = -80.0
            gpt.wte.weight[3, 0] = -79.9
        assert gpt.generate([[1]], 3, temperature=0) == [[3, 3, 3]]


# ------------------------------------------------------------------------------
# draw

TOP = 1 - 2**-24  # the largest float32 below 1, and the largest torch.rand returns
NINF = -math.inf


def test_draw_stays_in_range_when_the_sum_of_a_large_vocabulary_rounds():
    """50,257 float32 probabilities: uniform * total may come out as the total."""
    logits = torch.randn(64, 50257, generator=seeded(5)) * 3
    logits[:, -100:] = NINF
    for u in (TOP, 1.0):  # 1.0 stands for whatever a cast rounds up
        idx = draw(logits, torch.full((64,), u))
        assert idx.max() < 50157
        assert torch.isfinite(logits.gather(1, idx[:, None])).all()


def test_draw_with_top_k_1_or_temperature_0_is_argmax_and_inputs_stay():
    gen = seeded(6)
    logits, u = torch.randn(50, V, generator=gen), torch.rand(50, generator=gen)
    before, best = (logits.clone(), u.clone()), logits.argmax(-1)
    for how in ({"top_k": 1}, {"temperature": 0}, {"temperature": 1e-5}):
        assert torch.equal(draw(logits, u, **how), best)
    assert not torch.equal(draw(logits, u), best)
    for top_k in (V, V + 5):
        assert torch.equal(draw(logits, u, top_k=top_k), draw(logits, u))
    draw(logits, u, 0.7, 3)
    assert all_equal((logits, u), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("logits", "u", "temperature", "expected"),
    [
        # probability 0 at the front, in the middle and at the end is never drawn; 1 - 2^-53 may
        # become 1 when it is cast to float32
        ([NINF, 0.0, NINF, 1.0, NINF], [0.0, TOP, 1 - 2**-53], 1.0, [1, 3, 3]),
        ([2.0, NINF, NINF, NINF, NINF], [0.0, TOP, 1 - 2**-53], 1.0, [0, 0, 0]),
        # logits / temperature may overflow: inf - inf is NaN, and NaN has no cumulative sum
        ([1.0, 3.0, 2.0], [0.0, 0.5, TOP], 1e-40, [1, 1, 1]),
        ([-5.0, -7.0, -6.0], [0.0, 0.5, TOP], 1e-40, [0, 0, 0]),
        ([1e37, 3e37, 2e37], [0.0, 0.5, TOP], 0.1, [1, 1, 1]),
        ([-5e37, -7e37, -6e37], [0.0, 0.5, TOP], 0.1, [0, 0, 0]),
        # a uniform that falls exactly on a step belongs to what comes after it
        ([0.0] * 4, [0.0, 0.25, 0.5, 0.75, TOP], 1.0, [0, 1, 2, 3, 3]),
    ],
)
def test_draw_at_its_edges(logits, u, temperature, expected, dtype):
    """Guards `>=` for `>` in the inverse CDF, an index past the end, and overflow."""
    rows = torch.tensor([logits] * len(u), dtype=dtype)
    uniform = torch.tensor(u, dtype=torch.float64)
    assert draw(rows, uniform, temperature).tolist() == expected
    assert draw(rows, uniform.float().clamp(max=TOP), temperature).tolist() == expected


def test_draw_is_exact_just_below_a_step():
    u = torch.tensor([0.25 - 1e-9, 0.75 - 1e-9], dtype=torch.float64)
    assert draw(torch.zeros(2, 4, dtype=torch.float64), u).tolist() == [0, 2]


@pytest.mark.parametrize(
    ("place", "top_k", "expected"),
    [(1, None, [2, 2]), (3, None, [2, 3]), (4, None, [2, 3]), (0, 1, [2, 2])],
)
def test_a_search_that_ends_on_a_masked_token_takes_the_likeliest(
    monkeypatch, place, top_k, expected
):
    """A GPU's cumulative sum is made in parallel and need not rise from token to token."""
    logits = torch.tensor([[0.0, NINF, 2.0, -300.0], [0.0, NINF, 2.0, 1.0]])
    monkeypatch.setattr(torch, "searchsorted", lambda *_, **__: torch.full((2, 1), place))
    assert draw(logits, torch.rand(2), top_k=top_k).tolist() == expected
