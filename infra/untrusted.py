"""
Files from elsewhere: checkpoints and Hugging Face folders are data, whoever wrote them.

Nothing in them is run: torch.load takes tensors, numbers and texts, and an encoding that is code is
imported only where the user named it, too. Nothing takes more memory than the files are long: the
tensors are compared with the files, and the model that is asked for with the tensors, before it is
made. Links do not lead out of a folder.

Not guarded: the numbers and texts of a pickle beside its tensors, which torch.load unpacks as they
come, and what tiktoken downloads by itself, when a file names one of its encodings.
"""

import pickle
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from infra.rows import InputError, one_sentence
from model import GPT, GPTConfig


def load_file(file: Path) -> object:
    """What torch.save wrote. A zip file's tensors stay on the disk until they are read, and it must
    not be compressed: it would unpack to any size. All parts have checksums, which finds a bit that
    flipped (a second for 1.5 GB, where torch reads on demand)."""
    zipped = zipfile.is_zipfile(file)
    if zipped:
        with zipfile.ZipFile(file) as parts:
            if any(part.compress_type != zipfile.ZIP_STORED for part in parts.infolist()):
                raise ValueError("it is compressed, as torch.save writes no file")
            if part := parts.testzip():
                raise ValueError(f"{part} is not what was written: its checksum is another")
    with warnings.catch_warnings(action="ignore"):  # of torch's, about strange pickles
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
        except pickle.UnpicklingError:  # whose text advises to trust the file
            raise ValueError("it holds more than tensors, numbers and texts") from None


def check_weights(state: dict, size: int) -> None:
    """Raises ValueError unless these are finite numbers by name, no more of them than `size` bytes
    of files hold: a view may say that it is of any size. (Twice: two names may share a tensor.)"""
    for name, x in state.items():
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.layout != torch.strided:
            raise ValueError(f'"{name}" is no tensor of floating point numbers')
    if sum(x.nbytes for x in state.values()) > 2 * size:
        raise ValueError("its tensors say that they are larger than the file")
    for name, x in state.items():
        if x.is_meta or not x.isfinite().all():
            raise ValueError(f'"{name}" holds numbers that are not finite')


def fitting(config: GPTConfig, state: dict[str, Tensor]) -> GPT:
    """The model of this config that holds these very tensors: all of them, no others, each of its
    shape, or load_state_dict's error. It takes no memory."""
    if config.n_layer > len(state):
        raise ValueError(f"it has {config.n_layer} layers and {len(state)} tensors")
    with torch.device("meta"), Undrawn():
        gpt = GPT(config)
    gpt.load_state_dict(state, assign=True)
    return gpt


class Undrawn(TorchFunctionMode):
    """Modules made inside draw no weights, which others will replace."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (Tensor.normal_, Tensor.uniform_):
            return args[0]
        return function(*args, **(kwargs or {}))


def encoding_of(name: str, said: str | None, path: str | Path) -> str:
    """The name of an encoding that the file at `path` gives. said: the user's --encoding."""
    if ":" in name and name != said:
        raise InputError(f"{path} has the encoding {name}: say --encoding {name} to run it")
    return name


def inside(folder: Path, name: str) -> Path:
    """This file of the folder. A link may lead out of it only to the blobs of Hugging Face's cache,
    whose snapshots are folders of links."""
    path = folder / name
    with one_sentence(f"cannot read {path}", (OSError, RuntimeError)):
        home, file = folder.resolve(), path.resolve()
    doors = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(map(file.is_relative_to, doors)):
        raise InputError(f"{path} is a link that leads out of its folder")
    return path
