"""
GPT-2 by hand: pre-norm blocks, learned positions, GELU (tanh), tied head. No dropout: preference
optimization compares two models on the same tokens, and log-ratios must start at exactly 0.

The idea of this file is that **completions share prefixes**. All linear work (embedding,
projections, MLP, head) treats tokens one by one, so tokens come as one flat list; only attention
needs to know who reads whom. That knowledge is an object with one method, `attend(layer, qkv) ->
y`, and there are two of them:

    Tree    levels of rows, where each row of a level continues one row of the level above and
            attends to its keys and values, which stay differentiable. One level is a plain batch;
            two are prompts and their K completions, so a prompt is computed once per group; T
            levels with branching factor V enumerate all V^T strings.
    Cache   the same prefix, kept in one preallocated buffer, for sampling token by token.

Prefix contract: the prefix is prompt[:-1]; a completion reads [prompt[-1]] + completion and
predicts completion + [end of text]. Padding is on the right, positions are per row, and a query
always sees at least itself. Padding is computed by the trunk (batches hold groups of similar size),
never by the head.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class GPTConfig:
    block_size: int = 1024  # longest text, prompt and completion together
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768

    def __post_init__(self):
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be divisible by n_head ({self.n_head})")


# ------------------------------------------------------------------------------
# Who attends to whom


class Tree:
    """Attention over levels of rows. `shapes`: (rows, time) of each level, from the root down; the
    rows of a level split evenly over the rows above it and attend to them (and to all their
    ancestors).

    masks: for each level None (causal, sees all ancestors) or (rows, 1, time, ancestors + time),
    bool or added to the scores.
    """

    def __init__(self, n_head: int, shapes: list, masks: list | None = None):
        self.n_head, self.shapes = n_head, shapes
        self.masks = masks or [None] * len(shapes)

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        """qkv (L, 3C) of one layer, level after level -> y (L, C)."""
        out, past = [], None
        levels = qkv.split([rows * time for rows, time in self.shapes])
        for level, (rows, time), mask in zip(levels, self.shapes, self.masks, strict=True):
            level = level.view(rows, time, 3, self.n_head, -1)
            q, k, v = level.permute(2, 0, 3, 1, 4)  # (rows, n_head, time, head size) each
            if past is not None:
                k = torch.cat(
                    [repeat_rows(past[0], rows), k], dim=2
                )  # (..., ancestors + time, ...)
                v = torch.cat([repeat_rows(past[1], rows), v], dim=2)
                if mask is None and time > 1:
                    mask = causal_mask(time, k.size(2), q.device)
            causal = past is None and mask is None  # of one token, too: a length may be a symbol
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
            past = k, v
            out.append(y.transpose(1, 2).reshape(rows * time, -1))
        return torch.cat(out) if len(out) > 1 else out[0]


class Cache:
    """Keys and values of all layers in one buffer, written in place. Rows are prompts (and later
    their samples) that share a slot counter: slot P + t holds token t after the prefixes, whatever
    their lengths; `mask` hides the slots between the end of a short prefix and P."""

    def __init__(self, config: GPTConfig, prefix_len: Tensor, slots: int, dtype: torch.dtype):
        rows, self.n_head, self.used = len(prefix_len), config.n_head, 0
        shape = (config.n_layer, 2, rows, config.n_head, slots, config.n_embd // config.n_head)
        self.kv = torch.zeros(shape, dtype=dtype, device=prefix_len.device)
        slot, longest = torch.arange(slots, device=prefix_len.device), prefix_len.max()
        self.mask = None  # None while no row has a gap: the fast attention paths want no mask
        if (prefix_len < longest).any():
            self.mask = ((slot < prefix_len[:, None]) | (slot >= longest))[:, None, None]

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        """qkv (rows, T, 3C) -> y (rows, T, C). T > 1 only for the prefixes, into an empty cache."""
        rows, time, _ = qkv.shape
        q, k, v = qkv.view(rows, time, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        past_k, past_v = self.kv[layer]
        end = self.used + time
        past_k[:, :, self.used : end], past_v[:, :, self.used : end] = k, v
        if self.used == 0:  # right padding is never seen by a causal query to its left
            y = F.scaled_dot_product_attention(q, k, v, is_causal=time > 1)
        else:
            mask = None if self.mask is None else self.mask[..., :end]
            y = F.scaled_dot_product_attention(q, past_k[:, :, :end], past_v[:, :, :end], mask)
        if layer == len(self.kv) - 1:
            self.used = end
        return y.transpose(1, 2).reshape(rows, time, -1)

    def select(self, rows: Tensor) -> None:
        """Keep (or repeat) these rows."""
        self.kv = self.kv.index_select(2, rows)
        self.mask = None if self.mask is None else self.mask[rows]


def repeat_rows(x: Tensor, rows: int) -> Tensor:
    """Row i of x becomes rows / len(x) equal rows, neighbours of each other; differentiable."""
    times = rows // x.size(0)
    return x if times == 1 else x.unsqueeze(1).expand(-1, times, *x.shape[1:]).flatten(0, 1)


def compute_dtype(weight: Tensor) -> torch.dtype:
    """What a matmul with this weight computes in: autocast's dtype inside autocast, else its
    own."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where mask is True, -inf elsewhere: what attention would else make of it in each layer."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


def causal_mask(time: int, keys: int, device) -> Tensor:
    """(time, keys) bool: query t sees every key up to its own, which is key keys - time + t."""
    return torch.ones(time, keys, dtype=torch.bool, device=device).tril(keys - time)


# ------------------------------------------------------------------------------
# The network


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, layer: int, context: Tree | Cache) -> Tensor:
        return self.c_proj(context.attend(layer, self.c_attn(x)))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, layer: int, context: Tree | Cache) -> Tensor:
        x = x + self.attn(self.ln_1(x), layer, context)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """The trunk (`hidden`) and the language-model head, tied to the token embedding as in GPT-2.

    generator seeds the weights: normal with standard deviation 0.02, in blocks init_std, residual
    projections scaled by 1/sqrt(2 n_layer), biases 0 (Radford et al. 2019). GPT-2's 0.02 suits its
    width; a narrow model learns to look back much sooner from about 1/sqrt(n_embd).
    """

    def __init__(
        self,
        config: GPTConfig,
        generator: torch.Generator | None = None,
        init_std: float = 0.02,
    ):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # a block keeps its input and computes the rest again
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif ".ln_" not in f".{name}":
                std = 0.02 if name.startswith("w") else init_std
                std /= math.sqrt(2 * config.n_layer) if "c_proj" in name else 1.0
                nn.init.normal_(p, std=std, generator=generator)

    def hidden(self, idx: Tensor, pos: Tensor, context: Tree | Cache) -> Tensor:
        """Token ids and positions (..., ) -> features (..., C) after the last LayerNorm."""
        x = self.wte(idx) + self.wpe(pos)  # (..., C)
        for layer, block in enumerate(self.h):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, layer, context, use_reentrant=False)
            else:
                x = block(x, layer, context)
        return self.ln_f(x)

    def head(self, x: Tensor) -> Tensor:
        """Features (..., C) -> logits (..., V)."""
        return F.linear(x, self.wte.weight)

    def forward(self, idx: Tensor) -> Tensor:
        """idx (B, T), T <= block_size -> logits (B, T, V), always. The plain way; training uses
        Scorer."""
        B, T = idx.shape
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens are longer than block_size = {self.config.block_size}")
        pos = torch.arange(T, device=idx.device).repeat(B)
        x = self.hidden(idx.flatten(), pos, Tree(self.config.n_head, [(B, T)]))
        return self.head(x).view(B, T, -1)

    @torch.no_grad()
    def generate(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        n: int = 1,
        temperature: float = 1.0,
        top_k: int | None = None,
        eot: int | None = None,
        generator: torch.Generator | None = None,
        uniform: Tensor | None = None,
    ) -> list[list[int]]:
        """n completions of each prompt (token ids, none empty): len(prompts) * n lists, those of a
        prompt side by side.

        A completion stops after max_new_tokens or with `eot`, which is then its last token (None:
        never). temperature 0 takes the likeliest token. top_k keeps the k likeliest. Each row and
        step has a uniform draw of its own, so a row's text does not depend on its batch mates:
        `uniform` (rows, max_new_tokens) in [0, 1), by default made from `generator` in one go.
        Raises ValueError for an empty prompt or a text longer than block_size.
        """
        cache, idx, pos = self.read_prompts(prompts, n, max_new_tokens)
        rows, device = len(idx), idx.device
        if uniform is None:
            where = generator.device if generator is not None else "cpu"
            uniform = torch.rand((rows, max_new_tokens), generator=generator, device=where)
        uniform = uniform.T.to(device)
        weight = self.wte.weight  # of the head, in the dtype that is multiplied in: cast once
        weight = weight.to(compute_dtype(weight) if weight.is_cuda else weight.dtype)
        out = idx.new_zeros(max_new_tokens, rows)
        alive = torch.arange(rows, device=device)  # where in `out` each row of the cache belongs
        ended = torch.zeros(rows, dtype=torch.bool, device=device)
        for t in range(max_new_tokens):
            x = self.hidden(idx[:, None], pos + t, cache)[:, 0]  # (rows, C)
            idx = draw(wide_logits(x.to(weight), weight), uniform[t], temperature, top_k)
            out[t].index_copy_(0, alive, idx)
            ended |= idx == (-1 if eot is None else eot)
            if t % 16 == 15 and ended.any():  # they leave now and then: no sync per token
                keep = (~ended).nonzero()[:, 0]
                if not len(keep):
                    break
                cache.select(keep)
                idx, pos, alive, ended = idx[keep], pos[keep], alive[keep], ended[keep]
                uniform = uniform[:, keep]
        return [row[: row.index(eot) + 1] if eot in row else row for row in out.T.tolist()]

    def read_prompts(self, prompts: list[list[int]], n: int, new: int):
        """(cache with the prefix of each prompt, n rows each; last token (rows,); its position
        (rows, 1))."""
        longest, device = max(map(len, prompts)), self.wte.weight.device
        if not all(prompts):
            raise ValueError("a prompt needs a token; for an empty one use [end of text]")
        if longest + new > self.config.block_size:
            raise ValueError(
                f"prompt and max_new_tokens need {longest + new} positions together, "
                f"block_size is {self.config.block_size}"
            )
        prefix_len = torch.tensor([len(p) - 1 for p in prompts], device=device)
        cache = Cache(self.config, prefix_len, longest - 1 + new, compute_dtype(self.wte.weight))
        if longest > 1:
            padded = [p[:-1] + [0] * (longest - len(p)) for p in prompts]
            prefix = torch.tensor(padded, device=device)  # (B, P)
            self.hidden(prefix, torch.arange(longest - 1, device=device), cache)
        rows = torch.arange(len(prompts), device=device).repeat_interleave(n)
        cache.select(rows)
        last = torch.tensor([p[-1] for p in prompts], device=device)
        return cache, last[rows], prefix_len[rows, None]


def draw(
    logits: Tensor, uniform: Tensor, temperature: float = 1.0, top_k: int | None = None
) -> Tensor:
    """One token per row by inverse CDF: logits (N, V) and uniforms (N,) in [0, 1) -> ids (N,).

    The first token whose cumulative probability exceeds the uniform. torch.multinomial would draw V
    exponentials a row instead: for GPT-2's vocabulary that is slower than the network.
    """
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 or more, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    logits = logits.to(wide(logits.dtype))
    if top_k is not None and top_k < logits.size(-1):
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if temperature == 0:
        return logits.argmax(dim=-1)
    top = logits.amax(dim=-1, keepdim=True)
    cdf = (logits - top).div_(temperature).exp_().cumsum_(dim=-1)  # in place: one buffer a token
    idx = torch.searchsorted(cdf, uniform[:, None].to(cdf) * cdf[:, -1:], right=True)
    idx = idx.clamp(max=logits.size(-1) - 1)  # rounding may reach the total
    # A sum made in parallel need not rise from token to token, and a search in it may end anywhere.
    possible = ((logits.gather(1, idx) - top) / temperature).exp() > 0
    if logits.device.type == "cpu" and possible.all():  # argmax is slow there, asking is free
        return idx[:, 0]
    return torch.where(possible, idx, logits.argmax(dim=-1, keepdim=True))[:, 0]


# ------------------------------------------------------------------------------
# Log-probs of given tokens: the whole differentiable computation of a stage is one forward of one
# module


class Scorer(nn.Module):
    """Log-probs of the completions of a data.Batch. Wrappers (DDP, fully_shard, compile) wrap this.

    temperature divides the logits, as in sampling: pi is the distribution that samples are drawn
    from.
    """

    def __init__(self, gpt: GPT, temperature: float = 1.0):
        super().__init__()
        self.gpt, self.temperature = gpt, temperature

    def forward(self, batch) -> Tensor:
        """-> log pi of every completion token, (B, K, T), exactly 0 where nothing is scored. Sum
        over T for (B, K)."""
        x = scored_hidden(self.gpt, batch)  # (S, C)
        targets = batch.targets.flatten()[batch.scored].clamp(min=0)  # (S,)
        return to_grid(token_logps(x, self.gpt.wte.weight, targets, self.temperature), batch)


class ScalarHead(nn.Module):
    """Features (..., C) -> one number each (...). It starts at 0. A product and a sum, not a
    matmul: autocast would round the number to bfloat16's three digits."""

    def __init__(self, n_embd: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_embd))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).sum(dim=-1) + self.bias


def scored_hidden(gpt: GPT, batch) -> Tensor:
    """Features (S, C) of the completion tokens that are scored, each group's prompt computed
    once."""
    (B, P), (_, K, T) = batch.prefix.shape, batch.idx.shape
    device, n_head = batch.idx.device, gpt.config.n_head
    time = torch.arange(max(P, T), device=device)
    pos = (batch.prefix_len[:, None] + time[:T]).clamp(max=gpt.config.block_size - 1)  # (B, T)
    idx, pos = batch.idx.flatten(), repeat_rows(pos, B * K).flatten()  # (B*K*T,)
    if P == 0:
        return gpt.hidden(idx, pos, Tree(n_head, [(B * K, T)])).index_select(0, batch.scored)
    seen = (time[:P] < batch.prefix_len[:, None])[:, None].expand(-1, T, -1)  # (B, T, P)
    mask = torch.cat([seen, causal_mask(T, T, device).expand(B, -1, -1)], dim=-1)  # (B, T, P + T)
    mask = additive(repeat_rows(mask, B * K)[:, None], compute_dtype(gpt.wte.weight))
    tree = Tree(n_head, [(B, P), (B * K, T)], [None, mask])
    idx = torch.cat([batch.prefix.flatten(), idx])
    pos = torch.cat([time[:P].clamp(max=gpt.config.block_size - 1).repeat(B), pos])
    return gpt.hidden(idx, pos, tree)[B * P :].index_select(0, batch.scored)


def to_grid(x: Tensor, batch) -> Tensor:
    """A number per scored token (S,) -> (B, K, T), exactly 0 where nothing is scored."""
    grid = x.new_zeros(batch.targets.numel()).index_add(0, batch.scored, x)
    return grid.view(batch.targets.shape).masked_fill(batch.targets < 0, 0.0)


def token_logps(x: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(x W^T / temperature)[target]: features (S, C), W (V, C), targets (S,) -> (S,),
    float32 or float64. Never holds S * V logits."""
    dtype = compute_dtype(weight)
    x = x if temperature == 1 else x / temperature  # C numbers a row instead of V
    return ChunkedLogps.apply(x.to(dtype), weight.to(dtype), targets)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def wide_logits(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """x W^T (S, V) in float32 at least, whatever the factors are: GPT-2's logits lie near -80,
    where bfloat16 has steps of a half."""
    dtype = wide(x.dtype)
    if x.is_cuda and x.dtype != dtype:
        return torch.mm(x, weight.T, out_dtype=dtype)
    out = x.new_empty(len(x), len(weight), dtype=dtype) if out is None else out
    return torch.mm(x.to(dtype), weight.T.to(dtype), out=out)  # with `out` autocast leaves it alone


CHUNK = 4096  # words of the vocabulary whose logits are held at once


class ChunkedLogps(torch.autograd.Function):
    """token_logps by parts of the vocabulary, one after the other in the same small buffer: the
    forward pass keeps each row's logsumexp (updated part by part), the backward pass computes the
    logits again and writes each part of W's gradient once. Inputs come in autocast's dtype already,
    so both passes multiply in it; logits and sums are float32 at least.

    (Checkpointed chunks of rows, a tenth of the code, took 1.3 to 1.5 times as long for a step of
    the benchmark's `head`, and 1.4 times the memory.)
    """

    @staticmethod
    def parts(x: Tensor, weight: Tensor, targets: Tensor):
        """(first word, logits (S, words) in float32 at least, column of each row's target, whether
        the target is in this part)."""
        buffer = x.new_empty(len(x) * min(CHUNK, len(weight)), dtype=wide(x.dtype))
        for start in range(0, len(weight), CHUNK):
            part = weight[start : start + CHUNK]
            logits = wide_logits(x, part, buffer[: len(x) * len(part)].view(len(x), len(part)))
            column = targets - start
            inside = (column >= 0) & (column < len(part))
            yield start, logits, column.clamp(0, len(part) - 1)[:, None], inside[:, None]

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        top = x.new_full((len(x), 1), -torch.inf, dtype=wide(x.dtype))  # largest logit so far
        total, picked = torch.zeros_like(top), torch.zeros_like(top)  # sum of exp(logit - top)
        for _, logits, column, inside in ChunkedLogps.parts(x, weight, targets):
            picked = torch.where(inside, logits.gather(1, column), picked)
            before, top = top, torch.maximum(top, logits.amax(dim=1, keepdim=True))
            total = total * (before - top).exp() + logits.sub_(top).exp_().sum(1, keepdim=True)
        lse = top + total.log()
        ctx.save_for_backward(x, weight, targets, lse)
        return (picked - lse)[:, 0]

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, targets, lse = ctx.saved_tensors
        grad = grad[:, None]
        gx, dw = (grad * x).to(x.dtype), torch.empty_like(weight)
        dx = torch.zeros(x.shape, dtype=lse.dtype, device=x.device)
        for start, logits, column, inside in ChunkedLogps.parts(x, weight, targets):
            # d logp / d logits = onehot(target) - softmax
            d = logits.sub_(lse).exp_().scatter_add_(1, column, -inside.to(lse.dtype))
            d = d.to(x.dtype)
            dx -= d @ weight[start : start + CHUNK]
            torch.mm(d.T, gx, out=dw[start : start + CHUNK])
        return (dx * grad).to(x.dtype), dw.neg_(), None
