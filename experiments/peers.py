"""
The workload of bench.py, and what a user would pick instead of this project: TRL's DPOTrainer and
the `generate` of transformers.

    PYTHON experiments/peers.py '{"who": "trl", "size": "small", ...}'     prints one JSON line

bench.py starts it so, with a Python that has those libraries, which this project does not need.
Therefore this file imports nothing of ours; contestants.py imports the workload, the lap timing and
the summary from here, so that every contestant gets the same groups and the same clock.

Everyone scores the same tokens: completions have a given length and no end-of-text. TRL gets them
as text of one word per token, through its public interface alone; it insists on an end-of-text, so
that replaces the last token.
"""

import itertools
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from types import SimpleNamespace

import numpy as np

SIZES = {
    "small": {"n_layer": 4, "n_head": 4, "n_embd": 128, "vocab_size": 512},
    "head": {"n_layer": 6, "n_head": 6, "n_embd": 384, "vocab_size": 50257},
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50257},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600, "vocab_size": 50257},
}
NEW_TOKENS = 112  # of a sample
EPS, BETA, RATE = 1e-3, 0.1, 1e-5  # label smoothing, beta, learning rate


def shape(c) -> dict:
    """The model of a cell; `vocab_size` may replace its vocabulary."""
    return SIZES[c.size] | ({"vocab_size": c.vocab_size} if c.vocab_size else {})


def make_rows(c) -> list[tuple]:
    """(prompt ids, K lists of completion ids, K rewards or None) for each group of all laps.

    Lengths of completions are uniform in [shortest, longest]. A pair (K = 2) has no rewards, only
    an order. Ids 0 and 1 are left to padding and end-of-text.
    """
    rng, vocab = np.random.default_rng(1), shape(c)["vocab_size"]
    lengths = rng.integers(c.shortest, c.longest + 1, (c.laps * c.batch, c.K))
    return [
        (
            rng.integers(2, vocab, c.prompt).tolist(),
            [rng.integers(2, vocab, n).tolist() for n in row],
            rng.normal(size=c.K).tolist() if c.K > 2 else None,
        )
        for row in lengths
    ]


# ------------------------------------------------------------------------------
# Timing


def now() -> tuple[float, float]:
    """(seconds, core-seconds that other processes have used; 0 where there is no /proc)."""
    try:
        with open("/proc/stat") as file:
            ticks = [int(x) for x in file.readline().split()[1:9]]
    except OSError:
        return time.perf_counter(), 0.0
    busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # all but idle and iowait
    return time.perf_counter(), busy - sum(os.times()[:2])


def time_laps(step, laps: int, seconds: float, wait=lambda: None) -> list:
    """step(0), step(1), ...: the clock at the start and after each lap. `laps` of them, or at least
    3 and no more once `seconds` are over. `wait` is called after each step (a GPU runs behind)."""
    clock = [now()]
    while len(clock) <= min(laps, 3) or (
        len(clock) <= laps and clock[-1][0] - clock[0][0] < seconds
    ):
        step(len(clock) - 1)
        wait()
        clock.append(now())
    return clock


def summary(clock: list, amount: float, peak: int | None = None) -> dict:
    """Median of `amount` per second over the laps, each lap's seconds, how many cores others used
    meanwhile, and the most memory so far (this process's, or `peak` bytes of a GPU)."""
    laps = [b - a for (a, _), (b, _) in itertools.pairwise(clock)]
    if peak is None:  # Linux counts in KiB, macOS in bytes
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak *= 1 if sys.platform == "darwin" else 1024
    return {
        "figure": amount / statistics.median(laps),
        "laps": len(laps),
        "lap_s": [round(t, 6) for t in laps],
        "others": round(max((clock[-1][1] - clock[0][1]) / sum(laps), 0.0), 2),
        "peak_gb": round(peak / 1e9, 3),
    }


# ------------------------------------------------------------------------------
# The libraries


def offline(folder: str) -> None:
    """Hugging Face libraries stay off the network and out of ~/.cache. Before they are imported."""
    os.environ |= {
        "HF_HOME": folder,
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def hf_model(c, positions: int):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    none = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    ends = {"bos_token_id": 1, "eos_token_id": 1}
    return GPT2LMHeadModel(GPT2Config(**shape(c), **none, **ends, n_positions=positions))


def word_tokenizer(vocab_size: int):
    """Token i is the word "i"; 0 pads and 1 ends."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1} | {str(i): i for i in range(2, vocab_size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    ends = {"pad_token": "<pad>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends)


def pair_texts(c) -> list[dict]:
    """The pairs as TRL's {prompt, chosen, rejected}, and one step of them more, to warm up on."""

    def text(ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def ended(ids: list[int]) -> str:
        return f" {text(ids[:-1])} <eos>"

    rows = make_rows(c)
    return [
        {"prompt": text(prompt), "chosen": ended(chosen), "rejected": ended(rejected)}
        for prompt, (chosen, rejected), _ in rows[: c.batch] + rows
    ]


def trl_config(c, folder: str):
    import torch
    from trl import DPOConfig

    return DPOConfig(
        folder,
        loss_type="exo_pair",
        label_smoothing=EPS,
        beta=BETA,
        learning_rate=RATE,
        max_grad_norm=1.0,
        precompute_ref_log_probs=c.who == "trl_precomputed",
        per_device_train_batch_size=c.batch,
        max_steps=c.laps + 1,
        train_sampling_strategy="sequential",
        use_cpu=not torch.cuda.is_available(),
        bf16=c.dtype == "bfloat16",
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        logging_steps=c.laps + 1,
        logging_first_step=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def trl(c) -> dict:
    """TRL's training step, from the end of one to the end of the next: batch, forward pass,
    backward pass, clipping, AdamW. who = trl_precomputed: with stored reference log-probs."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from transformers.utils import logging
    from trl import DPOTrainer

    logging.set_verbosity_error()
    clock, losses = [], []

    class Laps(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            clock.append(now())
            over = clock[-1][0] - clock[0][0] > c.seconds
            control.should_training_stop |= len(clock) > 3 and over

        def on_log(self, args, state, control, logs=None, **kwargs):
            losses.extend([logs["loss"]] if "loss" in logs else [])

    stored = c.who == "trl_precomputed"
    model = hf_model(c, c.prompt + c.longest)
    with tempfile.TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            model,
            ref_model=None if stored else hf_model(c, c.prompt + c.longest),
            args=trl_config(c, folder),
            train_dataset=Dataset.from_list(pair_texts(c)),
            processing_class=word_tokenizer(shape(c)["vocab_size"]),
            callbacks=[Laps()],
        )
        trainer.train()
    return summary(clock, c.batch, gpu_peak()) | {"first_loss": losses[0]}


def hf(c) -> dict:
    """transformers' generate with its KV cache."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = hf_model(c, c.prompt + NEW_TOKENS).eval().to(device)
    prompt = torch.randint(2, shape(c)["vocab_size"], (c.batch, c.prompt), device=device)

    def sample(new: int) -> None:
        with torch.autocast(device, torch.bfloat16, enabled=c.dtype == "bfloat16"):
            out = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                top_k=0,
                min_new_tokens=new,  # also bars end-of-text
                max_new_tokens=new,
                pad_token_id=0,
            )
        assert out.shape == (c.batch, c.prompt + new)

    sample(8)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    clock = time_laps(lambda i: sample(NEW_TOKENS), c.laps, c.seconds, wait)
    return summary(clock, c.batch * NEW_TOKENS, gpu_peak())


def gpu_peak() -> int | None:
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


PEERS = {"trl": trl, "trl_precomputed": trl, "hf": hf}


def main(job: str) -> None:
    c = SimpleNamespace(**json.loads(job))
    with tempfile.TemporaryDirectory() as folder:
        offline(folder)
        import torch
        import transformers

        torch.set_num_threads(c.threads)
        result = PEERS[c.who](c)
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        if "trl" in sys.modules:
            versions["trl"] = sys.modules["trl"].__version__
    print(json.dumps(result | {"versions": versions}))


if __name__ == "__main__":
    main(sys.argv[1])
