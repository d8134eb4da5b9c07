"""
One process or many: torchrun starts one for each GPU. Each reads all rows, takes every world()-th
group of a batch, and holds the whole model (DDP) or a shard of it (FSDP2). Alone, all of this does
nothing, and what is left is the choice of a device and of a dtype.

What the host must know of the others (weights of means, a signal) goes through gloo, so that no GPU
waits for it. An error in one process ends all: torchrun stops the others when one is gone.
"""

import argparse
import contextlib
import math
import os
import resource
import signal
import sys
import threading
import time
import traceback

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

from data import Groups, collate
from infra.rows import InputError, one_sentence
from model import Block

# ------------------------------------------------------------------------------
# Device and dtype


def pick_device(name: str | None) -> torch.device:
    """The named device, or the first there is of cuda, mps and cpu."""
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    have = [kind for kind, there in have.items() if there] + ["cpu"]
    name = name or have[0]
    if name.partition(":")[0] not in have:
        raise InputError(f"--device {name} is not there; this machine has {', '.join(have)}")
    with one_sentence(f"--device {name}", RuntimeError):
        device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: this machine has {torch.cuda.device_count()}")
    return device


def autocast(dtype: str | None, device: torch.device):
    """bfloat16 where the device computes it fast and nobody said otherwise. Sums stay in
    float32."""
    bf16 = (dtype or ("bfloat16" if device.type == "cuda" else "float32")) == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def set_precision(dtype: str | None, device: torch.device) -> None:
    """TF32 on a GPU, which keeps 10 of 23 bits of a product's factors: for what autocast leaves in
    float32, but not where --dtype float32 was asked for."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if dtype in (None, "bfloat16") else "highest")


def peak_gb(device: torch.device) -> float:
    """Largest memory so far: on a GPU of its tensors, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def rounding(device: torch.device) -> int:
    """Lengths become multiples of this: a GPU likes few shapes, a CPU would only compute the
    padding."""
    return 64 if device.type == "cuda" else 1


# ------------------------------------------------------------------------------
# Processes


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def say(text: str, file=None) -> None:
    """print, in the first process only."""
    if rank() == 0:
        print(text, file=file or sys.stdout)


def all_sum(*values: float) -> list[float]:
    """Each value summed over the processes."""
    if world() == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(sums)
    return sums.tolist()


def merge(x: Tensor) -> Tensor:
    """x on the CPU, filled in parts by the processes (0 elsewhere), in place: now whole in each."""
    if world() > 1:
        dist.all_reduce(x)
    return x


def gather(value: object) -> list:
    """[the first process' value, the second's, ...], in every process."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values


def in_first(action, *args):
    """The first process does it while the others wait; its result, or its error as a sentence, is
    everyone's."""
    result, said = None, None
    if rank() == 0:
        try:
            result = action(*args)
        except (InputError, OSError) as error:
            said = str(error)
    result, said = gather((result, said))[0]
    if said is not None:
        raise InputError(said)
    return result


@contextlib.contextmanager
def processes(device: str | None):
    """Joins torchrun's processes, if it started us; gives this process' device."""
    device, many = pick_device(device), "RANK" in os.environ
    if device.type == "cuda":
        index = int(os.environ["LOCAL_RANK"]) if many else device.index or 0
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    if many:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    yield device
    if many:  # not after an error: the others may never come
        dist.destroy_process_group()


class Parser(argparse.ArgumentParser):
    """argparse whose help begins with the program's own text, and whose mistakes take one line."""

    def __init__(self, program: str, text: str):
        style = argparse.RawDescriptionHelpFormatter
        super().__init__(program, description=text, formatter_class=style, allow_abbrev=False)

    def error(self, message: str):
        message = " ".join(message.split())  # a name may hold anything
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n")


def complain(program: str, error: Exception) -> None:
    """Say the sentence of a user's mistake. Most mistakes are found by every process: the first one
    speaks, and another only if it is still alive a while later, so that it was alone."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(5)
    print(f"{program}:", *str(error).split(), file=sys.stderr, flush=True)


def run_program(main) -> None:
    """Exit with main's status. One of many processes ends at once: gloo's threads outlive the group
    where a sharded module still refers to it, and one that drops a tensor while Python takes itself
    down aborts the process, with all its work done."""
    sys.unraisablehook = press_again
    sys.stdout.reconfigure(errors="backslashreplace")  # half a surrogate pair, in an ASCII terminal
    if "RANK" not in os.environ:
        sys.exit(main())
    try:
        status = main()
    except Exception:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def press_again(unraisable) -> None:
    """Python drops a Ctrl-C that falls into a destructor or into an import's clean-up, with a
    traceback: press it once more, a little later."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        main = threading.main_thread().ident  # a signal to it also ends what it waits for
        threading.Timer(0.01, signal.pthread_kill, (main, signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(unraisable)


# ------------------------------------------------------------------------------
# A module in DDP or in shards


def wrap(
    module: torch.nn.Module, device: torch.device, fsdp: bool = False, compile: bool = False
) -> torch.nn.Module:
    """The module in DDP, sharded in place (FSDP2), compiled; its forward is the only way in."""
    if fsdp:
        mesh = dist.init_device_mesh(device.type, (world(),))
        for block in [m for m in module.modules() if isinstance(m, Block)]:
            fully_shard(block, mesh=mesh)
        fully_shard(module, mesh=mesh)
    if compile:
        module = torch.compile(module, dynamic=True)  # batches are ragged: one graph for all shapes
    if world() > 1 and not fsdp:
        devices = [device] if device.type == "cuda" else None
        module = DDP(module, devices, gradient_as_bucket_view=True)
    return module


@contextlib.contextmanager
def accumulating(module: torch.nn.Module, last: bool):
    """Gradients meet only in the last of several backward passes."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
    with contextlib.nullcontext() if last or not isinstance(module, DDP) else module.no_sync():
        yield


WHOLE = StateDictOptions(full_state_dict=True)
TO_SAVE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # in the first process alone


def weights_to_save(module: torch.nn.Module) -> dict:
    return get_model_state_dict(module, options=TO_SAVE)


def whole_weights(module: torch.nn.Module) -> dict:
    """In every process, where the module is."""
    return get_model_state_dict(module, options=WHOLE)


def load_weights(module: torch.nn.Module, state: dict) -> None:
    """Whole weights into a module that may be sharded."""
    set_model_state_dict(module, dict(state), options=WHOLE)


def optimizer_to_save(module: torch.nn.Module, optimizer) -> dict:
    """{} before the first step: torch would take one to have something to give."""
    return get_optimizer_state_dict(module, optimizer, options=TO_SAVE) if optimizer.state else {}


def load_optimizer(module: torch.nn.Module, optimizer, state: dict) -> None:
    if not state:
        return
    own = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    set_optimizer_state_dict(module, optimizer, state, options=WHOLE)
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)  # a run goes on with the flags that it has
    for p, kept in optimizer.state.items():  # the fused kernel believes what it is given
        for name, x in kept.items():
            shape = () if name == "step" else p.shape
            if x.shape != shape or not x.is_contiguous() or not x.is_floating_point():
                raise ValueError(f"the optimizer's {name} has another shape")


# ------------------------------------------------------------------------------
# Many groups, of which each process takes its share


def shares(ids: np.ndarray, size: int | None = None) -> list[np.ndarray]:
    """This process' groups of a batch, every world()-th, in micro-batches of `size` (None: all at
    once). Each process has as many, so that the last one may be empty."""
    mine, share = ids[rank() :: world()], math.ceil(len(ids) / world())
    return [mine[i : i + (size or share)] for i in range(0, share, size or share)]


@torch.no_grad()
def passes(module, groups: Groups, size: int, device, dtype=None, batches=None, note="", call=None):
    """Yields (batch on the CPU, what `call`, by default the module, makes of it) over this process'
    share of all groups, `size` groups of similar size at once. batches: lists of groups, as
    `shares` gives them, to read these instead. dtype: as --dtype says. `note` names a progress
    bar."""
    if batches is None:
        batches = by_size(groups, np.arange(len(groups)), size)
    weights = next(module.parameters()).dtype
    for mine in tqdm(batches, note, disable=not note or rank() > 0, leave=False):
        spare = len(mine) == 0  # a sharded module needs all processes in each of its calls
        batch = collate(groups, np.zeros(1, int) if spare else mine, rounding(device))
        with autocast(dtype, device):
            result = (call or module)(batch.to(device, weights))
        if not spare:
            yield batch, result
    for part in module.modules():  # the root keeps its weights whole after a forward pass
        if isinstance(part, FSDPModule):
            part.reshard()


def by_size(groups: Groups, ids: np.ndarray, size: int) -> list[np.ndarray]:
    """This process' share of these groups, in batches of `size` of similar size."""
    ids = ids[np.argsort(groups.sizes()[ids], kind="stable")]
    whole = size * world()
    return [b for start in range(0, len(ids), whole) for b in shares(ids[start : start + whole])]


def score(module, groups: Groups, size: int, device, dtype=None, batches=None, note="") -> Tensor:
    """log pi (of a reward model: the reward) of the completions of all groups, or of those in the
    batches: (M,) float64 on the CPU, 0 elsewhere. Processes share the work, and each has all
    results."""
    out = torch.zeros(len(groups.ended), dtype=torch.float64)
    for batch, result in passes(module, groups, size, device, dtype, batches, note):
        logps = result[0] if isinstance(result, tuple) else result  # not PPO's values
        logps = logps.sum(-1) if logps.dim() == 3 else logps  # (B, K)
        out[batch.segment[batch.mask]] = logps.cpu()[batch.mask].double()
    return merge(out)
