"""
The two worlds of the toy, and all their completions at once.

A world is a reward over all V^T completions of one prompt, token 0, and the data sft is fitted to.

*The numbers*: 8 tokens, length 4, 12 random codewords; sft fitted to a noisy channel (each token
corrupted with probability 0.4), the reward minus the Hamming distance to the nearest codeword.

*The picture*: 2 tokens of 32, so a policy is a 32 x 32 image; sft fitted to six wide Gaussians, the
reward likes six narrow ones. n_embd is 3, the smallest that shows the point honestly. Over two
features the final LayerNorm emits only two points, so the second token knows one bit of the first,
and as head and embedding are one and the same at all positions, the first token's marginal must
*be* one of the two conditionals: sft is then often a symmetric product, and all methods stay caught
near it (EXO's one spot may lie where pi* has nothing). Over three features LayerNorm emits an
ellipse: a one-parameter family of conditionals, too few for pi*, enough to try. With 4 everyone all
but reaches pi*, and there is nothing to see.

The strings are enumerated by the prefix mechanism with branching factor V (585 positions for 8^4),
so a log-prob is a sum along the tree, of every model of a stack at once, by vmap.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model import GPT, GPTConfig, Tree

CODEWORDS, CORRUPTION = 12, 0.4  # of the numbers world
BUMPS = 6  # of the picture world


@dataclass(frozen=True)
class Config:
    vocab_size: int = 8  # V
    length: int = 4  # T; V^T completions are enumerated
    n_embd: int = 4  # of sft and policies: one layer, one head
    beta: float = 0.4  # of J = E[r] - beta KL(pi || sft)
    steps: int = 500  # of Adam with betas (0.9, 0.99)
    learning_rate: float = 2e-2  # falls to 0 along a cosine
    warmup: int = 20
    draws: int = 4096  # completions a step, whatever K
    starts: int = 2  # of the exact fits: sft's weights, then copies with noise
    noise: float = 0.1  # its standard deviation; 0.3 and fresh weights end far worse


NUMBERS = Config()
PICTURE = Config(
    vocab_size=32, length=2, n_embd=3, beta=0.5, steps=500, learning_rate=1e-2, draws=1024, starts=2
)


# --------------------------------------------------------------------------------------------------
# All completions of one prompt at once, for many models at once


class Space(nn.Module):
    """A tiny GPT and the tree of all V^T strings after token 0. Called: logits (L, V), inner nodes.

    Level t = 0..T-1: the V^t prefixes of length t, last token fastest; each sees its ancestors.
    """

    def __init__(self, config: Config):
        super().__init__()
        V, T = config.vocab_size, config.length
        self.gpt = GPT(GPTConfig(T, V, n_layer=1, n_head=1, n_embd=config.n_embd))
        self.sizes = [V**t for t in range(T)]
        root = torch.zeros(1, dtype=torch.long)
        self.idx = torch.cat([root, *(torch.arange(V).repeat(n) for n in self.sizes[:-1])])
        self.pos = torch.arange(T).repeat_interleave(torch.tensor(self.sizes))
        self.tree = Tree(n_head=1, shapes=[(n, 1) for n in self.sizes])

    def forward(self) -> Tensor:
        return self.gpt.head(self.gpt.hidden(self.idx, self.pos, self.tree))

    def weights(self, generators: list[torch.Generator]) -> dict[str, Tensor]:
        """Fresh weights of M models, stacked along axis 0: {name: (M, ...)}."""
        models = [GPT(self.gpt.config, generator) for generator in generators]
        stacked, _ = torch.func.stack_module_state(models)
        return {f"gpt.{name}": p.detach() for name, p in stacked.items()}

    def logps(self, weights: dict[str, Tensor]) -> Tensor:
        """log pi of every completion, (M, V^T), last token fastest."""
        logits = torch.vmap(lambda w: torch.func.functional_call(self, w, ()))(weights)  # (M, L, V)
        # with V = 8 numbers a row, a softmax along the last axis would be 8 times slower
        levels = F.log_softmax(logits.transpose(1, 2).contiguous(), dim=1).transpose(1, 2)
        logps = logits.new_zeros(len(logits), 1)
        for level in levels.split(self.sizes, dim=1):  # (M, V^t, V)
            logps = (logps[:, :, None] + level).flatten(1)
        return logps

    @torch.no_grad()
    def exact(self, weights: dict[str, Tensor]) -> Tensor:
        """logps in float64."""
        return self.logps({name: w.double() for name, w in weights.items()})


def draw(logps: Tensor, uniform: Tensor) -> Tensor:
    """Completions by inverse CDF: log-probs (S, N), uniforms (S, n) in [0, 1) -> indices (S, n)."""
    cdf = logps.exp().cumsum(dim=-1)
    y = torch.searchsorted(cdf, uniform.to(cdf) * cdf[:, -1:], right=True)
    return y.clamp(max=logps.size(-1) - 1)


# --------------------------------------------------------------------------------------------------
# The worlds. A seed fixes the world, the weights and the draws, each from a generator of its own


def generator(seed: int, purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(
        seed + 1_000_003 * ("world", "weights", "noise", "draws").index(purpose)
    )


class World(NamedTuple):
    """Over all N completions, float64; several worlds are stacked along a leading axis S."""

    reward: Tensor  # (N,)
    log_data: Tensor  # (N,) what sft is fitted to
    distance: Tensor  # (N,) tokens to the nearest codeword; zeros in the picture
    centres: Tensor  # (12, T) codewords, or (6, 2) bump centres


def code_world(seed: int, config: Config) -> World:
    V, T = config.vocab_size, config.length
    shape = (V,) * T
    every = torch.stack(torch.unravel_index(torch.arange(V**T), shape), dim=-1)  # (N, T)
    codewords = every[torch.randperm(V**T, generator=generator(seed, "world"))[:CODEWORDS]]
    wrong = (every[:, None] != codewords).sum(dim=-1).double()  # (N, 12) corrupted tokens
    log_channel = (T - wrong) * math.log(1 - CORRUPTION) + wrong * math.log(CORRUPTION / (V - 1))
    log_data = log_channel.logsumexp(dim=-1) - math.log(len(codewords))
    distance = wrong.amin(dim=-1)
    return World(-distance, log_data, distance, codewords)


def picture_world(seed: int, config: Config) -> World:
    V = config.vocab_size
    uniform = torch.rand(BUMPS, 2, generator=generator(seed, "world"), dtype=torch.float64)
    centres = 3 + uniform * (V - 1 - 6)  # at least 3 from the border
    pixel = torch.cartesian_prod(torch.arange(V), torch.arange(V)).double()  # (N, 2) row, column
    square = (pixel[:, None] - centres).square().sum(dim=-1)
    log_data = (-square / (2 * 4.0**2)).logsumexp(dim=-1).log_softmax(dim=-1)
    reward = (-square / (2 * 1.5**2)).logsumexp(dim=-1).clamp(min=-6)
    return World(reward, log_data, torch.zeros(V * V), centres)


def optimum(log_sft: Tensor, reward: Tensor, beta: float) -> Tensor:
    """log pi* = log sft + r / beta - log Z over the last axis."""
    return (log_sft + reward / beta).log_softmax(dim=-1)
