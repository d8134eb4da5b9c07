"""A million pairs, read and trained on for 200 steps: minutes, so `python -m pytest -m slow -s`."""

import json
import random
import subprocess
import sys

import pytest
from conftest import ROOT, read_rows

import train

WORDS = "the a model answer question why because it that good slow river stone tree cloud".split()


@pytest.mark.slow
def test_a_million_pairs_cost_six_bytes_a_token(files, tmp_path):
    """Beside what the same run takes for 2,000 pairs. It prints the time of a step, which should
    not grow, in tenths of the run; a clock decides nothing here."""
    rng, peak, sft = random.Random(0), {}, str(tmp_path / "sft")
    shape = "--n_layer 2 --n_head 2 --n_embd 64 --block_size 256 --max_iters 1".split()
    assert train.main(["sft", "--data", files["pairs"], "--out", sft, *shape]) == 0

    def text(n: int) -> str:
        return " ".join(rng.choices(WORDS, k=n))

    n_bytes = 0
    for n in (2_000, 1_000_000):
        path = tmp_path / f"{n}.jsonl"
        with open(path, "w") as file:
            for _ in range(n):
                row = {"prompt": text(12), "chosen": f" {text(8)}", "rejected": f" {text(8)}"}
                n_bytes += sum(map(len, row.values())) * (n == 1_000_000)  # a token each
                file.write(json.dumps(row) + "\n")
        out = tmp_path / f"dpo-{n}"
        argv = ["dpo", "--data", str(path), "--init", sft, "--out", str(out), "--kl_samples", "0"]
        argv += ["--max_iters", "200"]
        subprocess.run([sys.executable, "train.py", *argv], cwd=ROOT, check=True)
        trained = [r for r in read_rows(out / "metrics.jsonl") if r["kind"] == "train"]
        peak[n] = trained[-1]["peak_gb"] * 2**30
        print(n, [f"{8e3 / r['groups_per_s']:.1f} ms" for r in trained[1::2]])
    per_token = (peak[1_000_000] - peak[2_000]) / n_bytes
    print(f"{per_token:.2f} bytes a token, of {n_bytes}")
    assert per_token <= 6
