"""
What fits where: the GPU memory of one EXO training step (train.update), computed, not measured.

    python -m experiments.memory [--out assets/memory]      a table, and results.json under --out

L tokens go through the trunk, in `cells` padded cells of attention; rows = groups * K completions,
each a row of T cells that sees P cells of its prompt; S tokens are scored. a is the bytes of a
number that autocast computes (bfloat16 2), the residual stream and LayerNorms have 4. Autograd
keeps, in each block:

    LayerNorm inputs 4 C, means and deviations 8, both times    (8 C + 16) L
    outputs of both LayerNorms, of attention; GELU's in and out (3 + 8) a C L
    q, k, v in cells; attention's output and logsumexp          (4 a C + 4 heads) cells
    each completion's copy of its prompt's k and v, with its own        2 a C rows (P + T)

and besides: the mask, a rows T (P + T); ln_f's input and output, indices, each row's logsumexp,
autocast's copies of weights (`casts`; a tied head's too). With gradient checkpointing a block keeps
its input, 4 C L, and the mask is not saved but held.

`buffers` is what the worst moment holds beyond that: parts of the logits and W's gradient, or the
gradients inside a block and the head's share of W's gradient, which waits for the embedding's; with
checkpointing also one block's activations. `total` assumes micro-batches: gradients of earlier ones
are there all the time. A step of a single micro-batch needs up to `gradients` less.

tests/test_memory.py compares with the bytes that autograd saves and with a process's peak, on a
CPU; tests/test_gpu.py with a GPU. Not modelled: the CUDA context and fragmentation (`fits` leaves a
tenth of the card), DDP's buckets, --compile, a temperature other than 1, attention without a fused
kernel, padding of unlike lengths, PPO and --online, and evaluation: its reference model (as large
as `weights`) and KV cache come when no activations or gradients are held. For shards (--fsdp) the
figures are derived and have not been measured: wte, wpe and two blocks are whole while they
compute, and so are autocast's copies.
"""

import argparse
import json
import math
from pathlib import Path

import torch

from model import GPTConfig, chunk_size
from train import rounding

GB = 2**30
SIZES = {
    "gpt2": GPTConfig(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
}
CARDS = (16, 24, 40, 80)  # GB
GROUPS, PROMPT, COMPLETION = 4, 256, 256  # of a micro-batch; tokens


def parameters(config: GPTConfig) -> int:
    C, rows = config.n_embd, config.vocab_size + config.block_size
    return rows * C + config.n_layer * (12 * C * C + 13 * C) + 2 * C


def memory(
    config: GPTConfig,
    prompt: int,
    completion: int,
    K: int,
    groups: int,
    dtype: str = "bfloat16",
    checkpointing: bool = False,
    shards: int = 1,
    device: str = "cuda",
) -> dict[str, float]:
    """GB of one step on micro-batches of `groups` groups: prompts of `prompt` tokens, completions
    of `completion` (end of text included), autocast to dtype (bfloat16, or float32: none)."""
    C, V, n_layer = config.n_embd, config.vocab_size, config.n_layer
    a = {"bfloat16": 2, "float32": 4}[dtype]
    cast = a if a < 4 else 0  # bytes of a copied weight
    step, chunk = rounding(torch.device(device)), chunk_size(torch.device(device))

    def rounded(n: int) -> int:
        return math.ceil(n / step) * step

    # sizes of the batch, as data.collate makes it
    rows, n_prefix = groups * K, groups * (prompt - 1)
    P, T = rounded(prompt - 1), rounded(completion + 1)
    L = rounded(n_prefix + rows * completion + 1)
    S, cells, pairs = L - n_prefix, groups * P + rows * T, rows * T * (P + T)

    # what autograd keeps
    block = (8 * C + 11 * a * C + 16) * L + (4 * a * C + 4 * config.n_head) * cells
    block += 2 * a * C * rows * (P + T) if P else 0
    matrices = 12 * C * C  # of a block
    head_input = a * C * (S if cast else L)  # a copy, or a part of ln_f's output
    rest = (4 * C + 8) * L + head_input + 4 * S + 8 * (3 * L + cells + 2 * S)
    mask = a * pairs if P else 0
    rest += 0 if checkpointing else mask
    plain = S * V <= chunk  # small heads keep their logits
    activations = rest + (4 * C * L if checkpointing else block) * n_layer + 4 * S * V * plain
    casts = cast * (V * C + (0 if checkpointing else matrices * n_layer))

    # what comes and goes
    words = V if plain else max(1, chunk // S)
    logits = S * words
    wide = 4 if cast else 0  # bf16 logits are copied to float32, and the last part's copy lingers
    several = words < V
    head_forward = logits * (a + wide * (1 + several))
    head_backward = logits * (a + wide * (1 + several) + cast) + a * V * C + (4 + 2 * a) * C * S
    head_backward = 12 * S * V if plain else head_backward
    inside = 4 * V * C + (4 + 5 * a) * C * L + 4 * C * C * (4 + cast)
    if checkpointing:
        head_forward += cast * matrices * n_layer  # autocast's cache, until it is left
        inside += block + cast * matrices
    moments = [head_forward, head_backward, inside, 8 * V * C + 4 * C * L - activations - casts]

    count = parameters(config)
    whole = 4 * C * (V + config.block_size) + 2 * 4 * matrices if shards > 1 else 0
    terms = {
        "weights": 4 * count / shards,
        "gradients": 4 * count / shards,
        "optimizer": (8 * count + 4 * (12 * n_layer + 4)) / shards,  # a step counter per tensor
        "activations": activations,
        "casts": casts,
        "buffers": max(moments) + whole + (mask if checkpointing else 0),
    }
    return {k: v / GB for k, v in (terms | {"total": sum(terms.values())}).items()}


def smallest_card(total: float) -> int | None:
    """GB of the smallest card that holds it and keeps a tenth free."""
    return next((card for card in CARDS if total <= 0.9 * card), None)


def table() -> list[dict]:
    """A row for every size, K, and gradient checkpointing off and on."""
    rows = []
    for name, config in SIZES.items():
        for K in (2, 8):
            for checkpointing in (False, True):
                found = memory(config, PROMPT, COMPLETION, K, GROUPS, checkpointing=checkpointing)
                row = {"size": name, "parameters": parameters(config), "K": K}
                row |= {"checkpointing": checkpointing, "fits": smallest_card(found["total"])}
                rows.append(row | {k: round(v, 3) for k, v in found.items()})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/memory"), help="folder")
    out, rows = parser.parse_args().out, table()
    for row in rows:
        print("  ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{v}" for k, v in row.items()))
    out.mkdir(parents=True, exist_ok=True)
    setting = {"groups": GROUPS, "prompt": PROMPT, "completion": COMPLETION, "dtype": "bfloat16"}
    text = json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n"
    (out / "results.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
