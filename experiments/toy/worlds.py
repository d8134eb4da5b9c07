"""
The plaid: a world small enough to list every completion, and hard enough that a small policy must
choose.

A completion is two tokens of 32, so a policy is a 32 x 32 image (row: first token, column: second).
sft is fitted to one wide Gaussian. The reward likes six narrow bumps, each with rows and columns of
its own, like rooks none of which attacks another; the optimum pi* = sft exp(r / beta) / Z is those
six spots. A policy that cannot tell the second token which bump the first one chose can mix all
their rows with all their columns, a plaid of 36 spots of which 30 are worthless, or give bumps up.
The direction of the KL decides.

n_embd is how much it can tell. Over two features the last LayerNorm emits only two points, so the
second token knows one bit of the first; over three an ellipse, a one-parameter family of
conditionals, with which pi* is hard to come near; from five on pi* is within reach. Token embedding
and head are one matrix at both positions: at n_embd 2 what starts from sft stays in some seeds near
a *symmetric* product, one distribution for both tokens. They are shown, not left out.

All 1,024 completions are enumerated by the prefix mechanism, of every model of a stack at once, by
vmap: every KL, reward and mass is a sum over them in float64, not an estimate.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import GPT, GPTConfig, Tree

BUMPS, BUMP_WIDTH, FLOOR = 6, 1.5, -6.0  # of the reward; a bump's standard deviation, in tokens
SFT_WIDTH, JITTER = 9.0, 0.15  # of what sft is fitted to; of a bump's centre, in strips
CONSTANTS = {"bump_width": BUMP_WIDTH, "floor": FLOOR, "sft_width": SFT_WIDTH, "jitter": JITTER}


@dataclass(frozen=True)
class Config:
    vocab_size: int = 32  # V; a completion is two tokens
    n_embd: int = 3  # of sft and policies: one layer, one head
    beta: float = 0.5  # of J = E[r] - beta KL(pi || sft)
    steps: int = 600  # of Adam with betas (0.9, 0.99)
    learning_rate: float = 2e-2  # falls to 0 along a cosine
    warmup: int = 20
    draws: int = 1024  # completions a step, whatever K


class Space(nn.Module):
    """A tiny GPT and the tree of both tokens after token 0. Called: logits (1 + V, V)."""

    def __init__(self, config: Config):
        super().__init__()
        V = config.vocab_size
        self.gpt = GPT(GPTConfig(2, V, n_layer=1, n_head=1, n_embd=config.n_embd))
        self.idx = torch.cat([torch.zeros(1, dtype=torch.long), torch.arange(V)])  # root, branches
        self.pos = (torch.arange(1 + V) > 0).long()
        self.tree = Tree(n_head=1, shapes=[(1, 1), (V, 1)])

    def forward(self) -> Tensor:
        return self.gpt.head(self.gpt.hidden(self.idx, self.pos, self.tree))

    def weights(self, generators: list[torch.Generator]) -> dict[str, Tensor]:
        """Fresh weights of M models, stacked along axis 0: {name: (M, ...)}."""
        models = [GPT(self.gpt.config, generator) for generator in generators]
        stacked, _ = torch.func.stack_module_state(models)
        return {f"gpt.{name}": p.detach() for name, p in stacked.items()}

    def logps(self, weights: dict[str, Tensor]) -> Tensor:
        """log pi of every completion, (M, V * V), second token fastest."""
        with sdpa_kernel(SDPBackend.MATH):  # the backend that vmap can batch
            logits = torch.vmap(lambda w: torch.func.functional_call(self, w, ()))(weights)
        first, second = F.log_softmax(logits, dim=-1).split([1, logits.size(1) - 1], dim=1)
        return (first.transpose(1, 2) + second).flatten(1)

    @torch.no_grad()
    def exact(self, weights: dict[str, Tensor]) -> Tensor:
        """logps in float64."""
        return self.logps({name: w.double() for name, w in weights.items()})


def draw(logps: Tensor, uniform: Tensor) -> Tensor:
    """Completions by inverse CDF: log-probs (M, N), uniforms (M, n) in [0, 1) -> indices (M, n)."""
    cdf = logps.exp().cumsum(dim=-1)
    y = torch.searchsorted(cdf, uniform.to(cdf) * cdf[:, -1:], right=True)
    return y.clamp(max=logps.size(-1) - 1)


def generators(seeds: list[int], purpose: str) -> list[torch.Generator]:
    """A seed fixes a world, the weights and the draws, each by a generator of its own."""
    offset = 1_000_003 * ("world", "weights", "draws").index(purpose)
    return [torch.Generator().manual_seed(seed + offset) for seed in seeds]


def square_distance(centres: Tensor, vocab_size: int) -> Tensor:
    """Of every completion, as a pixel, to every centre: (..., C, 2) -> (..., N, C)."""
    side = torch.arange(vocab_size, dtype=torch.float64)
    pixel = torch.cartesian_prod(side, side)  # (N, 2) row, column
    return (pixel[:, None] - centres[..., None, :, :]).square().sum(dim=-1)


def plaid(seeds: list[int], config: Config) -> tuple[Tensor, Tensor, Tensor]:
    """The worlds of S seeds, in float64: rewards (S, N), log-probs of what sft is fitted to (N,),
    and the bumps' centres (S, 6, 2), row and column in tokens."""
    V, centres = config.vocab_size, []
    for g in generators(seeds, "world"):
        strips = torch.stack([torch.arange(BUMPS), torch.randperm(BUMPS, generator=g)], dim=-1)
        jitter = JITTER * torch.randn(BUMPS, 2, generator=g, dtype=torch.float64)
        centres.append((strips + 0.5 + jitter) * V / BUMPS - 0.5)
    centres = torch.stack(centres)
    near = -square_distance(centres, V) / (2 * BUMP_WIDTH**2)
    middle = torch.full((1, 2), (V - 1) / 2, dtype=torch.float64)
    wide = -square_distance(middle, V)[:, 0] / (2 * SFT_WIDTH**2)
    return near.logsumexp(dim=-1).clamp(min=FLOOR), wide.log_softmax(dim=-1), centres


def optimum(log_sft: Tensor, reward: Tensor, beta: float | Tensor) -> Tensor:
    """log pi* = log sft + r / beta - log Z over the last axis."""
    return (log_sft + reward / beta).log_softmax(dim=-1)
