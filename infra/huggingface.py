"""
Hugging Face GPT-2 folders, in and out: config.json and weights, as `transformers` writes and reads
them. Their tensor names are ours, save that some files put "transformer." in front; their block
matrices are stored input-first (Conv1D), ours output-first.

    gpt = from_pretrained("gpt2")        save_pretrained(gpt, "out/hf")

What config.json asks for and model.py does not compute is refused by name. So is, on its way out, a
model with other tensors than GPT-2's; a model.py that computes something else with the same tensors
cannot be told from GPT-2 here. Weights go out as safetensors, and come in as safetensors or, where
there are none, as .bin; shards are all files of that name, their index is not read.
"""

import importlib
import json
from pathlib import Path

import torch
from torch import Tensor

from infra.rows import (
    InputError,
    make_folder,
    one_sentence,
    read_json,
    refuse_endless,
    replacing,
    write_json,
)
from infra.untrusted import check_weights, fitting, inside, load_file
from model import GPT, GPTConfig

CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
UNUSED = (".attn.bias", ".attn.masked_bias", "lm_head.weight")  # causal masks, and wte once more
SIZES = {"block_size": "n_positions"}  # ours: theirs
SIZES |= {name: name for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
COMPUTED = {  # what this GPT computes, the default first; a folder that says otherwise is refused
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
# Shapes of a block's weights, in units of n_embd; beside each stands a bias as long as its rows.
BLOCK = {"ln_1": (1,), "attn.c_attn": (3, 1), "attn.c_proj": (1, 1)}
BLOCK |= {"ln_2": (1,), "mlp.c_fc": (4, 1), "mlp.c_proj": (1, 4)}


def pretrained_config(folder: Path) -> dict:
    """config.json of a Hugging Face folder, with GPT-2's sizes where it names none. Raises
    InputError unless this GPT computes that model; dropout rates and reorder_and_upcast_attn do not
    change what is computed."""
    given = read_json(inside(folder, "config.json"))
    kind = json.dumps(given.get("model_type"))
    if kind != '"gpt2"':
        raise InputError(f"{folder} is not GPT-2: config.json has model_type {kind}")
    config = {theirs: getattr(GPTConfig, ours) for ours, theirs in SIZES.items()} | given
    for name in SIZES.values():
        if type(config[name]) is not int:
            raise InputError(f"{folder}: {name} must be an integer, got {config[name]!r}")
    computed = COMPUTED | {"n_inner": (None, 4 * config["n_embd"])}
    for name, values in computed.items():
        if config.get(name, values[0]) not in values:
            ours = " or ".join(map(json.dumps, values))
            raise InputError(f"{folder}: {name} is {json.dumps(config[name])}, this GPT has {ours}")
    return config


def from_pretrained(folder: str | Path, vocab_size: int | None = None) -> GPT:
    """A Hugging Face GPT-2 folder -> model in float32; no network, no `transformers`.

    vocab_size keeps the first so many words of a padded vocabulary (None: all). Raises InputError
    with one sentence for a folder that is not GPT-2, computes something else, or lacks tensors.
    """
    folder = Path(folder)
    config, (tensors, size) = pretrained_config(folder), read_weights(folder)
    with one_sentence(f"{folder} does not hold the GPT-2 asked for"):
        if (vocab_size or 0) > config["vocab_size"]:
            raise ValueError(f"it has a vocabulary of {config['vocab_size']}, not of {vocab_size}")
        state = {
            name.removeprefix("transformer."): x.t() if name.endswith(CONV1D) else x
            for name, x in tensors.items()
            if not name.endswith(UNUSED)
        }
        check_weights(state, size)
        state["wte.weight"] = state["wte.weight"][:vocab_size]
        sizes = {ours: config[theirs] for ours, theirs in SIZES.items()}
        sizes["vocab_size"] = vocab_size or config["vocab_size"]
        gpt = fitting(GPTConfig(**sizes), state)
    for p in gpt.parameters():
        p.data = torch.empty(p.shape).copy_(p.data)  # off the disk, in rows, in float32
    return gpt


def read_weights(folder: Path) -> tuple[dict[str, Tensor], int]:
    """All tensors of a Hugging Face folder, by their names there, and the bytes of their files."""
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise InputError(f"{folder} has no weights: no model.safetensors, no pytorch_model.bin")
    tensors = {}
    for file in files:
        file = inside(folder, file.name)
        with one_sentence(f"cannot read {file}"):
            refuse_endless(file)
            tensors |= load_file(file) if file.suffix == ".bin" else safetensors().load_file(file)
    return tensors, sum(file.stat().st_size for file in files)


def safetensors():
    with one_sentence("safetensors needs a package: pip install safetensors", ImportError):
        return importlib.import_module("safetensors.torch")


def save_pretrained(gpt: GPT, folder: str | Path, eot: int | None = None, **extra) -> None:
    """Write config.json and the weights as `transformers` reads them.

    eot: id of end-of-text. extra: more entries of config.json, which `transformers` keeps and does
    not use. config.json comes last: without it the folder is nothing. Raises InputError for a model
    with other tensors than GPT-2's, without the package safetensors, or where it cannot write.
    """
    shapes = {name: tuple(x.shape) for name, x in gpt.state_dict().items()}
    if other := dict(shapes.items() ^ gpt2_shapes(gpt.config).items()):
        named = ", ".join(sorted(other)[:3])
        raise InputError(f"{folder}: this model is not GPT-2 any more, it has another {named}")
    folder, write = Path(folder), safetensors().save
    make_folder(folder)
    state = {
        f"transformer.{name}": (x.T if name.endswith(CONV1D) else x).detach().cpu().contiguous()
        for name, x in gpt.state_dict().items()
    }
    with replacing(folder / "model.safetensors") as temporary:
        temporary.write_bytes(write(state, {"format": "pt"}))
    config = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        **{theirs: getattr(gpt.config, ours) for ours, theirs in SIZES.items()},
        **{name: values[0] for name, values in COMPUTED.items()},
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
        **dict.fromkeys(("bos_token_id", "eos_token_id"), eot),
        "torch_dtype": str(gpt.wte.weight.dtype).removeprefix("torch."),
    }
    write_json(folder / "config.json", config | extra)


def gpt2_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of GPT-2's tensors, as nn.Linear holds them: what model.py has, unless
    somebody changed it."""
    C = config.n_embd
    layers = {f"h.{i}.{name}": BLOCK[name] for i in range(config.n_layer) for name in BLOCK}
    shapes = {"wte.weight": (config.vocab_size, C), "wpe.weight": (config.block_size, C)}
    for name, units in (layers | {"ln_f": (1,)}).items():
        shapes[f"{name}.weight"] = tuple(n * C for n in units)
        shapes[f"{name}.bias"] = (units[0] * C,)
    return shapes


TOKENIZER = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json")
TOKENIZER += ("special_tokens_map.json",)


def tokenizer_files(checkpoint: Path) -> list[Path]:
    """Those of the Hugging Face folder that training began from, run after run."""
    seen = set()
    while True:
        folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
        if not (folder / "settings.json").is_file():
            return [inside(folder, name) for name in TOKENIZER if (folder / name).is_file()]
        init = read_json(folder / "settings.json").get("init")
        if not isinstance(init, str) or not init or folder in seen:
            return []
        seen.add(folder)
        checkpoint = Path(init)
