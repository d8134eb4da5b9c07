"""
Rewards: a model of ours, trained on preferences (the stage `reward`), or a function of the user's.

    --reward out/rm             a run folder or .pt file of the stage reward
    --reward module:function    f(prompt, completion), or f(prompts, completions) for many at once

`load_reward` makes one function of either: (prompts, completions, ended) -> (N,) float64. Whatever
a user's function does wrong is said in one sentence.
"""

import dataclasses
import inspect
import math
from collections.abc import Iterable
from numbers import Real
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import exo
from data import (
    Builder,
    Epochs,
    Groups,
    Report,
    encode,
    evenly_spaced,
    get_encoding,
    load_function,
    set_targets,
)
from infra.checkpoint import checkpoint_gpt, load_checkpoint
from infra.parallel import (
    by_size,
    in_first,
    load_weights,
    merge,
    passes,
    say,
    score,
    whole_weights,
)
from infra.rows import InputError, one_sentence
from model import GPT, ScalarHead, scored_hidden, to_grid

# ------------------------------------------------------------------------------
# The model


class RewardModel(torch.nn.Module):
    """The trunk, and a scalar head read at the last token of each completion (InstructGPT,
    arXiv:2203.02155). Needs no LM head.

    What the model must see has to be in the batch's completions: to_rate ends them in an
    end-of-text that is read, where a policy's is only predicted. The preference loss knows
    differences alone, so the bias is not trained but set (RewardStage.center).
    """

    def __init__(self, gpt: GPT):
        super().__init__()
        self.gpt, self.head = gpt, ScalarHead(gpt.config.n_embd)
        self.head.bias.requires_grad_(False)

    def forward(self, batch) -> Tensor:
        """-> (B, K), exactly 0 where no completion is."""
        rewards = to_grid(self.head(scored_hidden(self.gpt, batch)), batch)
        last = (batch.lengths()[..., None] - 1).clamp(min=0)
        return rewards.gather(-1, last).sum(-1)  # of one; a view would make FSDP2 warn


def to_rate(groups: Groups) -> Groups:
    """The same groups for a model that reads whole completions to rate them: where one ended, the
    end of text is its last token, and the last token is read, too (as if one more followed)."""
    return dataclasses.replace(
        groups,
        tokens=np.insert(groups.tokens, groups.offsets[1:][groups.ended], groups.eot),
        offsets=groups.offsets + np.concatenate([[0], np.cumsum(groups.ended)]),
        ended=groups.is_completion(),
    )


class RewardStage:
    """A Bradley-Terry reward model: the better of two completions should get the higher number. Of
    K rated completions every pair with unlike rewards is compared.

    Only differences are learned, so the scale is the data's (log-odds of being preferred) and the
    zero is set: mean 0 over the completions of up to 64 evenly spaced rows of the training data.
    """

    spare = 1  # tokens less than block_size that a text may have: the end of text is read, too
    figures: dict = {}  # noqa: RUF012 - nothing beside what the loss gives

    def __init__(self, s, policy, groups: Groups, held_out: Groups | None = None):
        self.s, self.policy = s, policy.wrap(RewardModel(policy.gpt), s)
        self.groups, self.held_out = (part and to_rate(part) for part in (groups, held_out))
        for part in filter(None, (self.groups, self.held_out)):
            set_targets(part)  # only their order counts
        epochs = Epochs(self.groups, s.batch_size, s.seed)
        self.ids, self.steps = epochs.batch, s.steps(epochs.n_batches)
        self.heads = {"head": self.policy.scorer.head}

    def loss(self, batch) -> tuple[Tensor, dict]:
        rewards = self.policy.module(batch)  # (B, K)
        better = exo.preferred(batch.log_target, batch.mask)
        loss, seen = (
            exo.reward_model_loss(rewards, self.s.label_smoothing, better),
            rewards.detach(),
        )
        return loss, {
            "accuracy": exo.accuracy(seen, batch.log_target, batch.mask),
            "reward": (seen.sum(-1) / batch.mask.sum(-1)).mean(),
        }

    def weigh(self, batch) -> int:
        return len(batch.mask)

    def evaluate(self, step: int) -> dict:
        if step > 0:  # before, all rewards are 0
            self.center()
        return {}

    def center(self) -> None:
        """Set the bias; it has no part in the loss."""
        some = evenly_spaced(len(self.groups), 64)
        segment, mask = self.groups.grid(some)
        s, policy, head = self.s, self.policy, self.policy.scorer.head
        batches = by_size(self.groups, some, s.at_once)
        rewards = score(policy.module, self.groups, s.at_once, policy.device, s.dtype, batches)
        rewards = rewards[segment[mask]]
        state = whole_weights(head)
        load_weights(head, state | {"bias": state["bias"] - rewards.mean().item()})

    def state(self) -> dict:
        return {}

    def load_state(self, state: dict) -> None:
        """The head is among the weights."""


# ------------------------------------------------------------------------------
# What --reward names


def load_reward(spec: str, device, encoding: str | None = None):
    """What --reward names, as a function of (prompts, completions, ended=None), lists of equal
    length, that gives the rewards, (N,) float64 on the CPU. ended: whether the end of text followed
    (None: always); a function of the user's is not told. encoding: as the user said; a model's own
    that is a module:function must be said."""
    if ":" in spec and not Path(spec).exists():
        return function_reward(spec)
    ckpt = load_checkpoint(spec)
    if "head" not in ckpt:
        stage = ckpt.get("stage", "unknown")
        raise InputError(f"--reward {spec} is no reward model: its stage is {stage}")
    return model_reward(ckpt, torch.device(device), spec, encoding)


def model_reward(ckpt: dict, device, spec: str, said: str | None = None):
    """The reward model of a checkpoint. It has an encoding of its own, which need not be the
    policy's, and computes in float32. Texts that it cannot hold are cut, and counted once."""
    gpt, encoding = checkpoint_gpt(ckpt, spec, said), get_encoding(ckpt["encoding"])
    model = RewardModel(gpt)
    with one_sentence(f"{spec} does not fit this model.py"):
        model.head.load_state_dict(ckpt["head"])
    model.to(device).eval()
    said = []

    def reward(prompts: list[str], completions: list[str], ended=None) -> Tensor:
        report = Report()
        builder = Builder(gpt.config.block_size - 1, encoding.eot_token, report)
        ended = ended or [True] * len(prompts)
        for prompt, completion, whole in zip(prompts, completions, ended, strict=True):
            ids = [encode(encoding, text) for text in (prompt, completion)]
            builder.add(ids[0], ids[1:], ended=whole)
        if (report.cut_prompts or report.cut_completions) and not said:
            said.append(True)
            say(f"--reward {spec} cuts texts to its block_size of {gpt.config.block_size}: here "
                f"{report.cut_prompts} prompts, {report.cut_completions} completions "
                f"of {len(prompts)}")  # fmt: skip
        groups, out = to_rate(builder.groups()), torch.zeros(2 * len(prompts), dtype=torch.float64)
        for batch, rewards in passes(model, groups, 64, device, "float32"):
            out[batch.segment] = rewards.cpu().double()
        return merge(out)[1::2]  # every group is a prompt and a completion

    return reward


def function_reward(spec: str):
    """A function of the user's, whatever it does wrong said in one sentence."""
    function = load_function(spec, "--reward")
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # some functions written in C do not say
        names = []
    at_once = names[1:2] == ["completions"]

    def call(*args):
        try:
            return function(*args)
        except (Exception, SystemExit, KeyboardInterrupt) as error:  # whatever it raises
            about = f"{len(args[1])} completions" if at_once else f"the completion {short(args[1])}"
            why = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
            raise InputError(f"--reward {spec}: {why}, for {about}") from error

    def reward(prompts: list[str], completions: list[str], ended=None) -> Tensor:
        n = len(completions)
        values = call(prompts, completions) if at_once else map(call, prompts, completions)
        values = values.tolist() if hasattr(values, "tolist") else values  # an array or a tensor
        if isinstance(values, str) or not isinstance(values, Iterable):
            must = "must return a number for each completion (its second parameter is completions)"
            raise InputError(f"--reward {spec} {must}, got {short(values)}")
        values = [x.item() if hasattr(x, "item") else x for x in values]
        if len(values) != n:
            raise InputError(f"--reward {spec} returned {len(values)} rewards for {n} completions")
        for x, y in zip(values, completions, strict=True):
            if not isinstance(x, Real) or not math.isfinite(x):
                said = f"returned {short(x)}, no finite number, for the completion {short(y)}"
                raise InputError(f"--reward {spec} {said}")
        return torch.tensor(values, dtype=torch.float64)

    return lambda *args: in_first(reward, *args)  # it may be slow, and need not repeat itself


def short(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."
