"""sample.py from the outside: drawn texts, scores, and a file that grows by whole rows however it
is stopped."""

import pkgutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LETTERS, TINY, read_rows, records, slow_logps, write_rows

import data
import exo
import sample
import train
from infra.checkpoint import load_gpt
from infra.rows import InputError


def sample_argv(world, out: Path, *more) -> list[str]:
    """Two completions of each prompt, unless `more` says otherwise."""
    argv = [world.sft, "--prompts", world.pairs, "-n", "2", "--max_new_tokens", "6"]
    return [*argv, *map(str, more), "--out", str(out)]


def drawn(world, out: Path, *more) -> list[dict]:
    assert sample.main(sample_argv(world, out, *more)) == 0
    return read_rows(out)


def scored(model, rows: str, out: Path, *more) -> list[dict]:
    assert sample.main([str(model), "--score", rows, "--out", str(out), *more]) == 0
    return read_rows(out)


# ------------------------------------------------------------------------------
# Texts


@pytest.mark.parametrize("more", [[], ["--max_new_tokens", "5"]])
def test_a_prompt_at_a_small_block_size(more, world, capsys):
    """Without --max_new_tokens, too: half of block_size is left for what is drawn."""
    assert sample.main([world.sft, "--prompt", "the cat", *more]) == 0
    assert capsys.readouterr().out.startswith("the cat")


def test_samples_do_not_depend_on_batch_size(world, tmp_path):
    one, seven = (drawn(world, tmp_path / f"{n}.jsonl", "--batch_size", n) for n in (1, 7))
    assert one == seven
    assert [row["prompt"] for row in one] == [row["prompt"] for row in read_rows(world.pairs)]
    assert all(len(row["completions"]) == 2 for row in one)


def test_best_of_keeps_the_best(world, tmp_path):
    """The best 2 of 4 + 4 are those of the 8 drawn without it."""
    every = drawn(world, tmp_path / "all.jsonl", "--reward", LETTERS, "-n", 8)
    best = drawn(world, tmp_path / "best.jsonl", "--reward", LETTERS, "--best_of", 4)
    for row, top in zip(every, best, strict=True):
        r = row["rewards"]
        assert top["rewards"] == [max(r[:4]), max(r[4:])]
        places = [r.index(x, i) for x, i in zip(top["rewards"], (0, 4), strict=True)]
        assert top["completions"] == [row["completions"][i] for i in places]


def test_what_is_written_is_training_data(world, tmp_path):
    """Sample, score, train is three commands; the best of n is sft data."""
    samples, best = tmp_path / "samples.jsonl", tmp_path / "best.jsonl"
    drawn(world, samples, "-n", 3)
    rows = scored(world.sft, str(samples), tmp_path / "scored.jsonl", "--reward", LETTERS)
    for row in rows:
        assert row["rewards"] == [y.count("a") for y in row["completions"]]
        assert len(row["logps"]) == 3
    world.run("exo", "--data", tmp_path / "scored.jsonl", "--max_iters", 1, out="exo")
    drawn(world, best, "-n", 1, "--best_of", 2, "--reward", LETTERS)
    world.run("sft", "--data", best, "--max_iters", 1, out="best")


def test_a_users_module_is_found_in_the_working_directory(world, tmp_path, monkeypatch):
    (tmp_path / "rewards_beside_me.py").write_text("def f(prompt, completion):\n    return 1.0\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    rows = drawn(world, tmp_path / "rows.jsonl", "--reward", "rewards_beside_me:f")
    assert all(row["rewards"] == [1.0, 1.0] for row in rows)


# ------------------------------------------------------------------------------
# Scores


@pytest.mark.parametrize("kind", ["pairs", "rewards"])
def test_scores_are_the_log_probs_of_a_plain_forward_pass(kind, world, tmp_path):
    """End of text included, prompts not; pairs stay pairs, rewards stay if none are asked for."""
    argv = ["--batch_size", "5", "--temperature", "0.7"]
    rows = scored(world.sft, getattr(world, kind), tmp_path / "scored.jsonl", *argv)
    gpt, _ = load_gpt(world.sft)
    groups, _ = data.read_groups([getattr(world, kind)], data.byte_encoding(), 64)
    for g, (row, given) in enumerate(zip(rows, read_rows(getattr(world, kind)), strict=True)):
        with torch.no_grad():
            n = len(groups.completions(g))
            slow = [slow_logps(gpt, groups, g, k, 0.7).sum().item() for k in range(n)]
        assert row.pop("logps") == pytest.approx(slow, rel=1e-4)
        assert row == given


def test_pairs_and_rewards_train_together_and_each_row_shows_its_target(world, tmp_path):
    """K differs by row and by kind; both kinds of target stand in one batch."""
    both = ["--data", world.pairs, world.rewards, "--eval_data", world.rewards]
    out = world.run("exo", *both)
    given, ref = read_rows(world.rewards), ("--ref", world.sft)
    rows = scored(out, world.rewards, tmp_path / "scored.jsonl", *ref)
    assert [row["row"] for row in rows] == list(range(1, 21))
    for row, original in zip(rows, given, strict=True):
        p = np.exp(original["rewards"])
        np.testing.assert_allclose(row["target"], p / p.sum(), atol=1e-12)
        assert len(row["logps"]) == len(row["ref_logps"]) == len(p)


@pytest.mark.parametrize("stage", exo.LOSSES)
def test_scored_rows_give_the_reported_loss(stage, world, tmp_path):
    """Each alone, where held-out groups of a run share batches: the last bits differ."""
    out, eps = world.run(stage), exo.needs(stage).label_smoothing
    argv = ["--ref", world.sft, "--label_smoothing", str(eps)]
    rows = scored(out, world.pairs, tmp_path / "scored.jsonl", *argv)
    policy, ref, target = (
        torch.tensor([r[k] for r in rows], dtype=torch.float64)
        for k in ("logps", "ref_logps", "target")
    )
    loss = exo.LOSSES[stage](policy, ref, target.log(), 0.1).item()
    assert loss == pytest.approx(records(out, "eval")[-1]["loss"], rel=1e-5)


def test_what_is_cut_is_counted_and_said(world, tmp_path, capsys):
    """By --score, and by a reward model with less room than the policy."""
    row = {"prompt": "p" * 50, "chosen": "c" * 60, "rejected": "no"}
    file = write_rows(tmp_path / "long.jsonl", [row])
    assert sample.main([world.sft, "--score", file]) == 0
    said = capsys.readouterr().err
    assert "cut to block_size: 1 prompts from the left, 1 completions from the right" in said
    rm = ["reward", "--data", world.pairs, "--out", str(tmp_path / "rm"), *TINY]
    assert train.main([*rm, "--block_size", "16", "--max_iters", "1"]) == 0
    assert sample.main([world.sft, "--score", file, "--reward", str(tmp_path / "rm")]) == 0
    assert "cuts texts to its block_size of 16: here 2 prompts" in capsys.readouterr().out


# ------------------------------------------------------------------------------
# --out, stopped and given again


@pytest.mark.parametrize("scoring", [False, True])
def test_a_stopped_sampling_goes_on(scoring, world, tmp_path):
    """Cut anywhere, also within a line, and even with prompts that occur twice."""
    rows = read_rows(world.pairs)[:6]
    source = write_rows(tmp_path / "rows.jsonl", [*rows, *rows])
    argv = [world.sft, "--batch_size", "2", "--max_new_tokens", "6", "-n", "2"]
    argv += ["--score" if scoring else "--prompts", source, "--out"]
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    assert sample.main([*argv, str(whole)]) == 0
    content = whole.read_bytes()
    for size in (0, 40, len(content) // 2, len(content) - 1, len(content)):
        part.write_bytes(content[:size])
        assert sample.main([*argv, str(part)]) == 0
        for a, b in zip(read_rows(part), read_rows(whole), strict=True):
            if scoring:  # batch mates shift sums in the last bits
                assert a.pop("logps") == pytest.approx(b.pop("logps"), rel=1e-5)
            assert a == b
        assert scoring or part.read_bytes() == content


@pytest.mark.parametrize(
    ("where", "call", "error", "status", "said", "rows"),
    [
        (
            "infra.outputs.append",
            2,
            KeyboardInterrupt(),
            130,
            "keeps its rows, the same command goes on",
            4,
        ),
        ("infra.outputs.append", 2, InputError("cannot write"), 2, "cannot write", 4),
        ("tests.rewards.letters", 17, ValueError("no"), 2, "letters: ValueError: no", 8),
    ],
)
def test_rows_that_were_finished_stay(
    where, call, error, status, said, rows, world, tmp_path, monkeypatch, capsys
):
    """After Ctrl-C, on a full disk, where the reward breaks in the third batch of 4 x 2; and the
    same command goes on to the same file."""
    part, calls, works = tmp_path / "part.jsonl", [], pkgutil.resolve_name(where)

    def breaks(*args):
        calls.append(args)
        if len(calls) == call:
            raise error
        return works(*args)

    more = ["--batch_size", 4, "--reward", LETTERS]
    with monkeypatch.context() as patch:
        patch.setattr(where, breaks)
        argv = sample_argv(world, part, *more)
        assert sample.main(argv) == status
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert len(read_rows(part)) == rows
    assert drawn(world, part, *more) == drawn(world, tmp_path / "whole.jsonl", *more)


def test_out_is_touched_only_when_all_input_has_been_read(world, tmp_path, refusal):
    """A mistake elsewhere on the command line costs no results."""
    out = tmp_path / "rows.jsonl"
    before = '{"prompt": "a", "completions": ["b"]}\n{"prompt": "c", "completions": ["d"]}'
    out.write_text(before)
    (tmp_path / "folder.jsonl").mkdir()
    common = [world.sft, "--prompts", world.pairs, "--max_new_tokens", "6", "--out"]
    argv = [*common, str(out), "--overwrite"]
    refusal(sample.main, *argv, "--reward", "nowhere:f")
    refusal(sample.main, "nowhere", *argv[1:])
    assert out.read_text() == before
    refusal(sample.main, *common, str(tmp_path / "folder.jsonl"))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("nowhere", "no checkpoint at nowhere"),
        ("RM --prompt a", "is a reward model: it rates text and writes none"),
        ("SFT --max_new_tokens 64", "leaves no room for a prompt"),
        ("SFT --temperature -1", "--temperature must be 0 or from 1e-6 to 1e6, got -1.0"),
        ("SFT --best_of 2", "--best_of needs --reward"),
        ("SFT --ref out/sft", "--ref is for --score"),
        ("SFT --score x.jsonl --beta_r 0", "--beta_r must be from 1e-6 to 1e6, got 0.0"),
        ("SFT --score x.jsonl --label_smoothing 0.5", "--label_smoothing must be in [0, 0.5)"),
        ("SFT --score x.jsonl --prompt a", "--prompt: not allowed with argument --score"),
        ("SFT --score x.jsonl --prompts a", "--prompts: not allowed with argument --score"),
        ("SFT --export x --score x.jsonl", "--score: not allowed with argument --export"),
        ("SFT --export x --out x.jsonl", "--export writes no rows: leave out --out"),
        ("SFT --score x.jsonl --best_of 2 --reward m:f", "--score draws nothing"),
        ("SFT --score x.jsonl --temperature 0", "--score needs a temperature above 0"),
        ("SFT --out x.txt", "must end in .jsonl"),
        ("SFT --score nowhere.jsonl", "cannot read nowhere.jsonl"),
        ("SFT --score a.jsonl --out ./a.jsonl", "--out ./a.jsonl is the file that is read"),
        ("SFT --prompts a.jsonl --out ./a.jsonl", "--out ./a.jsonl is the file that is read"),
        ("SFT --prompt a --top_k 0", "top_k must be at least 1"),
        ("SFT --prompt a --seed -1", "--seed must not be negative"),
        ("SFT --prompt a --reward nowhere:f --max_new_tokens 4", "nowhere"),
    ],
)
def test_each_mistake_gets_one_sentence(argv, said, world, reward_model, refusal):
    names = {"SFT": world.sft, "RM": reward_model}
    argv = [names.get(word, word) for word in argv.split()]
    assert said in refusal(sample.main, *argv)[-1]


def test_many_processes_are_refused_before_they_write_over_each_other(
    world, refusal, monkeypatch, tmp_path
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    out = tmp_path / "rows.jsonl"
    argv = [world.sft, "--prompts", world.pairs, "--out", str(out)]
    assert "sample.py runs in one process" in refusal(sample.main, *argv)[-1]
    assert not out.exists()
