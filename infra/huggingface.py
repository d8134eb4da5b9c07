"""
Hugging Face GPT-2 folders, in and out: config.json and weights, as `transformers` writes and reads
them. Their tensor names are ours, save that some files put "transformer." in front; their block
matrices are stored input-first (Conv1D), ours output-first.

    gpt = from_pretrained("gpt2")        save_pretrained(gpt, "out/hf")

What the folder's config.json asks for and model.py does not compute is refused by name. Weights go
out as safetensors alone, and come in as safetensors or, where that package is missing, as .bin.
"""

import importlib.util
import json
from pathlib import Path

import torch
from torch import Tensor

from infra.rows import InputError, make_folder, replacing, write_json
from model import GPT, GPTConfig

WEIGHT_FILES = (  # in order of preference; an index names the shards
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
UNUSED = (".attn.bias", ".attn.masked_bias", "lm_head.weight")  # causal masks, and wte once more
SIZES = {  # ours: theirs
    "block_size": "n_positions",
    **{name: name for name in ("vocab_size", "n_layer", "n_head", "n_embd")},
}
COMPUTED = {  # what this GPT computes, the default first; a folder that says otherwise is refused
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}


def read_object(path: Path) -> dict:
    """A JSON object from a file. Raises InputError with one sentence."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object, got a {type(value).__name__}")
    return value


def pretrained_config(folder: Path) -> dict:
    """config.json of a Hugging Face folder, refused (InputError) unless this file computes that
    model. Dropout rates and reorder_and_upcast_attn do not change what is computed."""
    config = read_object(folder / "config.json")
    kind = config.get("model_type")
    if kind != "gpt2":
        raise InputError(f"{folder} is not GPT-2: config.json has model_type {json.dumps(kind)}")
    for name, values in COMPUTED.items():
        value = config.get(name, values[0])
        if value not in values:
            raise InputError(
                f"{folder}: {name} is {json.dumps(value)}, "
                f"this GPT has {' or '.join(map(json.dumps, values))}"
            )
    for name in SIZES.values():
        if type(config.get(name, 1)) is not int:
            raise InputError(f"{folder}: {name} must be an integer, got {config[name]!r}")
    width = config.get("n_embd", GPTConfig.n_embd)
    if config.get("n_inner") not in (None, 4 * width):
        raise InputError(
            f"{folder}: n_inner is {config['n_inner']}, this GPT has 4 n_embd = {4 * width}"
        )
    return config


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a Hugging Face folder by their names there. Raises InputError with one
    sentence."""
    there = [name for name in WEIGHT_FILES if (folder / name).is_file()]
    if not there:
        raise InputError(f"{folder} has no weights: none of {', '.join(WEIGHT_FILES)}")
    if importlib.util.find_spec("safetensors") is None:
        bins = [name for name in there if name.startswith("pytorch_model.bin")]
        if not bins:
            raise InputError(f"{folder / there[0]} needs a package: pip install safetensors")
        there = bins
    if not there[0].endswith(".index.json"):
        return read_tensors(folder / there[0])
    shards = read_object(folder / there[0]).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(v, str) for v in shards.values()):
        raise InputError(f"{folder / there[0]} has no weight_map from tensors to files")
    tensors = {}
    for name in sorted(set(shards.values())):
        if Path(name).name != name or not (folder / name).is_file():
            raise InputError(f"{folder / there[0]} names the file {name!r}, which is not there")
        tensors |= read_tensors(folder / name)
    return tensors


def read_tensors(path: Path) -> dict[str, Tensor]:
    """One .safetensors or .bin file. Raises InputError with one sentence."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        if not all(isinstance(x, Tensor) for x in tensors.values()):
            raise TypeError("it must hold tensors by name")
        return tensors
    except Exception as error:  # whatever a damaged or foreign file makes the readers raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"cannot read {path}: {reason}") from error


def from_pretrained(folder: str | Path, vocab_size: int | None = None) -> GPT:
    """A Hugging Face GPT-2 folder -> model in float32; no network, no `transformers`.

    vocab_size keeps the first so many words of a padded vocabulary (None: all). Raises InputError
    with one sentence for a folder that is not GPT-2, computes something else, or lacks tensors.
    """
    folder = Path(folder)
    theirs = pretrained_config(folder)
    try:
        config = GPTConfig(**{ours: theirs[t] for ours, t in SIZES.items() if t in theirs})
    except ValueError as error:
        raise InputError(f"{folder}: {error}") from error
    words = config.vocab_size if vocab_size is None else vocab_size
    if words > config.vocab_size:
        raise InputError(f"{folder} has a vocabulary of {config.vocab_size}, not of {words}")
    tensors = {
        name.removeprefix("transformer."): x
        for name, x in read_weights(folder).items()
        if not name.endswith(UNUSED)
    }
    with torch.device("meta"):  # shapes only: nothing is drawn to be overwritten
        gpt = GPT(config)
    state = fitted(tensors, gpt.state_dict(), folder)
    state["wte.weight"] = state["wte.weight"][:words].contiguous()
    if words != config.vocab_size:
        config = GPTConfig(**vars(config) | {"vocab_size": words})
        with torch.device("meta"):
            gpt = GPT(config)
    gpt.load_state_dict(state, assign=True)
    return gpt


def fitted(tensors: dict[str, Tensor], wanted: dict[str, Tensor], folder: Path) -> dict:
    """The tensors as our state dict, in float32. Raises InputError unless all are there, no others,
    and all of the right shape."""
    for name in sorted(wanted.keys() - tensors.keys()):
        raise InputError(f"{folder} lacks the tensor {name}")
    for name in sorted(tensors.keys() - wanted.keys()):
        raise InputError(f"{folder} has a tensor {name}, which GPT-2 of its config.json has not")
    state = {}
    for name, like in wanted.items():
        x = tensors.pop(name)
        x = x.T if name.endswith(CONV1D) and x.dim() == 2 else x
        if x.shape != like.shape or not x.is_floating_point():
            raise InputError(
                f"{folder}: {name} is {list(x.shape)} of {x.dtype}, expected {list(like.shape)} "
                "of floats (as the model holds it)"
            )
        state[name] = x.float().contiguous()
    return state


def save_pretrained(gpt: GPT, folder: str | Path, eot: int | None = None, **extra) -> None:
    """Write config.json and the weights as `transformers` reads them.

    eot: id of end-of-text. extra: more entries of config.json, which `transformers` keeps and does
    not use. config.json comes last: without it the folder is nothing. Raises InputError without
    the package safetensors, or where the folder cannot be written.
    """
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise InputError(f"writing {folder} needs a package: pip install safetensors") from error
    folder = Path(folder)
    make_folder(folder)
    state = {
        f"transformer.{name}": (x.T if name.endswith(CONV1D) else x).detach().cpu().contiguous()
        for name, x in gpt.state_dict().items()
    }
    with replacing(folder / WEIGHT_FILES[0]) as temporary:
        save_file(state, temporary, {"format": "pt"})
    for other in WEIGHT_FILES[1:]:  # nobody should go on reading an older one
        (folder / other).unlink(missing_ok=True)
    write_json(folder / "config.json", written_config(gpt, eot) | extra)


def written_config(gpt: GPT, eot: int | None) -> dict:
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        **{theirs: getattr(gpt.config, ours) for ours, theirs in SIZES.items()},
        **{name: values[0] for name, values in COMPUTED.items()},
        "n_ctx": gpt.config.block_size,
        "n_inner": None,
        "reorder_and_upcast_attn": False,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
        **dict.fromkeys(("bos_token_id", "eos_token_id"), eot),
        "torch_dtype": str(gpt.wte.weight.dtype).removeprefix("torch."),
    }


TOKENIZER = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json")
TOKENIZER += ("special_tokens_map.json",)


def tokenizer_files(checkpoint: Path) -> list[Path]:
    """Those of the Hugging Face folder that training began from, run after run."""
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    while (folder / "settings.json").is_file():
        init = json.loads((folder / "settings.json").read_text(encoding="utf-8"))["init"]
        if not init:
            return []
        folder = Path(init) if Path(init).is_dir() else Path(init).parent
    return [folder / name for name in TOKENIZER if (folder / name).is_file()]
