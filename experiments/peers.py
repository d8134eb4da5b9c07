"""
The workload and the clock of bench.py, and what a user would pick instead of this project: TRL's
DPOTrainer and transformers' `generate`. Those run in the Python of --peers, whose libraries want an
environment of their own: so this file imports nothing of ours. Simplification: models are fresh,
texts are frequent words at random, and each byte is a token.
"""

import functools
import itertools
import random
import resource
import time
from statistics import median
from typing import NamedTuple

import torch

SIZES = {
    "small": {"n_layer": 4, "n_head": 4, "n_embd": 128, "vocab_size": 512},
    "head": {"n_layer": 6, "n_head": 6, "n_embd": 384, "vocab_size": 50257},
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50257},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024, "vocab_size": 50257},
}
WORDS = "the of and to a in that is was he for it with his actually, understanding state".split()
NEW_TOKENS = 112  # of a sample
EPS, BETA, RATE = 1e-3, 0.1, 1e-6  # label smoothing; beta and learning rate of TRL


class Cell(NamedTuple):
    """A row of the table: a workload, and how and how long it is done."""

    what: str  # train, sample or load
    size: str  # of the model; of a load, the encoding
    prompt: int  # tokens; of a load, bytes
    K: int  # completions of a prompt
    batch: int = 0  # prompts in a lap
    dtype: str = "float32"
    threads: int = 2
    compile: bool = False  # our training step
    device: str = "cpu"
    laps: int = 10
    seconds: float = 40.0  # no further lap after so many, but for the first three

    def groups(self, n: int):
        """Yields n times [prompt, K completions of 16 to 64 bytes, the best one first]."""
        rng = random.Random(1)
        lengths = ([self.prompt] + [rng.randint(16, 64) for _ in range(self.K)] for _ in range(n))
        return ([" ".join(rng.choices(WORDS, k=m))[:m] for m in group] for group in lengths)

    def pairs(self, n: int):  # without the last byte: an end of text comes instead
        return ({"prompt": x, "chosen": y[:-1], "rejected": z[:-1]} for x, y, z in self.groups(n))

    def tick(self, clock: list[float]) -> bool:
        """Note the time, at the start and after each lap. Returns whether there is another lap."""
        if self.device == "cuda":
            torch.cuda.synchronize()  # it runs behind
        clock.append(time.time())  # the same in all processes
        laps = len(clock) - 1
        return laps < self.laps and (laps < 3 or clock[-1] - clock[0] < self.seconds)

    def measure(self, step) -> dict:
        """Laps of step(0), step(1), ... after a first step(0), or all where shapes compile."""
        for i in range(self.laps if self.compile else 1):
            step(i)
        clock = []
        while self.tick(clock):
            step(len(clock) - 1)
        return self.summary(clock)

    def summary(self, clock: list[float]) -> dict:
        """figure: groups, or tokens of a sample, per second in the median lap."""
        lap_s = [b - a for a, b in itertools.pairwise(clock)]
        amount = self.batch * (self.K * NEW_TOKENS if self.what == "sample" else 1)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # as Linux counts
        peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else peak
        result = {"figure": amount / median(lap_s), "laps": len(lap_s), "lap_s": lap_s}
        return result | {"start": clock[0], "peak_gb": peak / 1e9}

    def hf_model(self):
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(**SIZES[self.size], bos_token_id=None, eos_token_id=None))


def hf_sample(c: Cell) -> dict:
    model = c.hf_model().eval().to(c.device, getattr(torch, c.dtype))
    prompts = torch.randint(2, 256, (c.batch, c.prompt), device=c.device)
    how = {"num_return_sequences": c.K, "max_new_tokens": NEW_TOKENS, "do_sample": True, "top_k": 0}
    return c.measure(lambda i: model.generate(prompts, **how))


def trl_train(c: Cell, stored: bool = False) -> dict:
    """From the end of a step to the end of the next: batch, both passes, clipping, AdamW."""
    from datasets import Dataset
    from transformers import ByT5Tokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    clock = []

    class Laps(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = not c.tick(clock)

    config = DPOConfig(
        loss_type="exo_pair",
        label_smoothing=EPS,
        precompute_ref_log_probs=stored,
        per_device_train_batch_size=c.batch,
        max_steps=c.laps + 1,
        use_cpu=c.device == "cpu",
        bf16=c.dtype == "bfloat16",
        gradient_checkpointing=False,
        save_strategy="no",
    )
    DPOTrainer(
        c.hf_model(),
        None if stored else c.hf_model(),
        config,
        train_dataset=Dataset.from_list([*c.pairs((c.laps + 1) * c.batch)]),
        processing_class=ByT5Tokenizer(),
        callbacks=[Laps()],
    ).train()
    return c.summary(clock)


trl_precomputed_train = functools.partial(trl_train, stored=True)
