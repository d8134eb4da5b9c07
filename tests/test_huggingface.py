"""
Hugging Face GPT-2 folders: what goes out comes back, `transformers` agrees, and what this GPT does
not compute is refused by name.

All tests of this file pin GPT-2. A fork whose model.py is another model has no use for the folders,
nor for these tests; save_pretrained refuses it.
"""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import data
import sample
import train
from infra import checkpoint, untrusted
from infra.checkpoint import load_gpt
from infra.huggingface import from_pretrained, save_pretrained
from model import GPT, GPTConfig

CONFIG = GPTConfig(block_size=32, vocab_size=61, n_layer=2, n_head=2, n_embd=16)


def random_gpt(config: GPTConfig = CONFIG, seed: int = 0, model=GPT) -> GPT:
    """Every tensor random, biases and LayerNorms too, or a wrong mapping could go unseen."""
    generator = torch.Generator().manual_seed(seed)
    gpt = model(config, generator)
    for p in gpt.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return gpt.eval()


def random_idx(gpt: GPT) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(gpt.config.vocab_size, (3, gpt.config.block_size), generator=generator)


def same(a: GPT, b: GPT) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return a.config == b.config and x.keys() == y.keys() and all(x[k].equal(y[k]) for k in x)


@pytest.fixture
def bin_folder(tmp_path) -> Path:
    """A folder with pytorch_model.bin, as older ones are."""
    save_pretrained(random_gpt(), tmp_path / "hf")
    weights = tmp_path / "hf" / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "hf" / "pytorch_model.bin")
    weights.unlink()
    return tmp_path / "hf"


@pytest.fixture
def no_safetensors(monkeypatch) -> None:
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)


def edit_config(folder: Path, **entries) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def edit_weights(folder: Path, change) -> None:
    path = folder / "pytorch_model.bin"
    torch.save(change(torch.load(path, weights_only=True)), path)


# ------------------------------------------------------------------------------
# There and back


def test_round_trip_is_bit_equal(tmp_path):
    """Nothing but the files named is left behind. Matrices go out input-first (Conv1D), under the
    names of GPT2LMHeadModel."""
    gpt = random_gpt()
    save_pretrained(gpt, tmp_path / "hf", eot=60)
    names = {"config.json", "model.safetensors"}
    assert {p.name for p in (tmp_path / "hf").iterdir()} == names
    assert len({p.stat().st_mode for p in (tmp_path / "hf").iterdir()}) == 1  # all may read both
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    assert tensors["transformer.h.0.attn.c_attn.weight"].shape == (16, 48)
    assert tensors["transformer.h.1.mlp.c_proj.weight"].shape == (64, 16)
    assert tensors["transformer.wte.weight"].shape == (61, 16)
    back = from_pretrained(tmp_path / "hf")
    assert same(gpt, back)
    assert all(p.requires_grad and p.is_contiguous() for p in back.parameters())
    assert back(random_idx(gpt)).equal(gpt(random_idx(gpt)))


def test_what_does_not_matter_is_passed_over(bin_folder):
    """As the hub's own gpt2 is stored: no prefix, causal masks and the head beside the weights;
    entries of config.json that change no logits."""

    def change(tensors):
        out = {k.removeprefix("transformer."): x for k, x in tensors.items()}
        out["h.0.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
        out["h.0.attn.masked_bias"] = torch.tensor(-1e4)
        return out | {"lm_head.weight": out["wte.weight"]}

    edit_weights(bin_folder, change)
    edit_config(bin_folder, reorder_and_upcast_attn=True, resid_pdrop=0.1, n_inner=64)
    edit_config(bin_folder, activation_function="gelu_pytorch_tanh")
    assert same(from_pretrained(bin_folder), random_gpt())


def test_half_precision_files_become_float32(bin_folder):
    edit_weights(bin_folder, lambda tensors: {k: x.bfloat16() for k, x in tensors.items()})
    gpt = from_pretrained(bin_folder)
    assert {p.dtype for p in gpt.parameters()} == {torch.float32}
    assert gpt.wte.weight.equal(random_gpt().wte.weight.bfloat16().float())


@pytest.mark.parametrize(
    ("name", "write"),
    [("pytorch_model-{}-of-3.bin", torch.save), ("model-{}-of-3.safetensors", save_file)],
)
def test_shards_are_read_together(name, write, bin_folder):
    """And safetensors before .bin."""
    tensors = torch.load(bin_folder / "pytorch_model.bin", weights_only=True)
    if name.endswith("bin"):
        (bin_folder / "pytorch_model.bin").unlink()
    else:
        edit_weights(bin_folder, lambda tensors: {k: 0 * x for k, x in tensors.items()})
    for i in range(3):
        write({n: tensors[n] for n in sorted(tensors)[i::3]}, bin_folder / name.format(i))
    assert same(from_pretrained(bin_folder), random_gpt())
    (bin_folder / name.format(1)).unlink()
    with pytest.raises(ValueError, match="Missing key"):
        from_pretrained(bin_folder)


def test_saving_again_takes_the_place_of_older_weights(bin_folder):
    """Also where those are an older kind of file."""
    for seed in (5, 6):
        save_pretrained(random_gpt(seed=seed), bin_folder)
        assert same(from_pretrained(bin_folder), random_gpt(seed=seed))


def test_padded_vocabulary_is_cut_on_request(bin_folder):
    """The words kept have the same logits as before."""
    cut, whole = from_pretrained(bin_folder, 50), random_gpt()
    idx = random_idx(cut)
    torch.testing.assert_close(cut(idx), whole(idx)[..., :50], atol=1e-5, rtol=1e-5)
    assert cut.config.vocab_size == len(cut.wte.weight) == 50
    with pytest.raises(ValueError, match="has a vocabulary of 61, not of 62"):
        from_pretrained(bin_folder, 62)


# ------------------------------------------------------------------------------
# What is refused, always in one sentence


def refusal(action, *args) -> str:
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        action(*args)
    return str(error.value)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"model_type": "llama"}, 'is not GPT-2: config.json has model_type "llama"'),
        ({"model_type": None}, "is not GPT-2: config.json has model_type null"),
        ({"activation_function": "relu"}, 'activation_function is "relu", this GPT has "gelu_new"'),
        ({"activation_function": "gelu"}, 'activation_function is "gelu"'),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is true"),
        ({"scale_attn_weights": False}, "scale_attn_weights is false"),
        ({"add_cross_attention": True}, "add_cross_attention is true"),
        ({"n_inner": 32}, "n_inner is 32, this GPT has null or 64"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is false"),
        ({"n_head": 3}, "n_embd (16) must be divisible by n_head (3)"),
        ({"n_layer": "two"}, "n_layer must be an integer, got 'two'"),
        ({"n_embd": None}, "n_embd must be an integer, got None"),
        ({"n_layer": 3}, 'Missing key(s) in state_dict: "h.2.ln_1.weight"'),
        ({"n_layer": 1}, 'Unexpected key(s) in state_dict: "h.1.'),
        ({"n_positions": 64}, "size mismatch for wpe.weight"),
        ({"vocab_size": 60}, "size mismatch for wte.weight"),
    ],
)
def test_refused_by_config(entries, said, bin_folder):
    edit_config(bin_folder, **entries)
    message = refusal(from_pretrained, bin_folder)
    assert message.startswith(str(bin_folder))
    assert said in message


def test_refused_by_tensors(bin_folder):
    """Whole numbers instead of weights; tensors that have no names."""
    wrong = {"transformer.ln_f.bias": torch.zeros(16, dtype=torch.long)}
    edit_weights(bin_folder, lambda tensors: tensors | wrong)
    message = refusal(from_pretrained, bin_folder)
    assert '"ln_f.bias"' in message
    assert "floating point" in message
    edit_weights(bin_folder, lambda tensors: {"model": tensors})
    assert str(bin_folder) in refusal(from_pretrained, bin_folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "config.json"])
def test_damaged_and_missing_files_are_named(name, bin_folder):
    (bin_folder / name).write_bytes(b"\x00not a model\xff")
    assert f"cannot read {bin_folder / name}: " in refusal(from_pretrained, bin_folder)
    (bin_folder / name).unlink()
    (bin_folder / "pytorch_model.bin").unlink(missing_ok=True)
    said = "cannot read .*config.json: No such" if "config" in name else "has no weights: no model"
    assert re.search(said, refusal(from_pretrained, bin_folder))


def test_safetensors_needs_its_package(bin_folder, no_safetensors):
    """Both ways; nothing is written."""
    needs = "needs a package: pip install safetensors"
    assert needs in refusal(save_pretrained, random_gpt(), bin_folder / "new")
    assert not (bin_folder / "new").exists()
    (bin_folder / "model.safetensors").write_bytes(b"")
    assert needs in refusal(from_pretrained, bin_folder)


FORKS = {
    "gate": lambda gpt: gpt.register_parameter("gate", torch.nn.Parameter(torch.ones(1))),
    "h.1.mlp.c_fc.weight": lambda gpt: setattr(gpt.h[1].mlp, "c_fc", torch.nn.Linear(16, 80)),
    "wpe.weight": lambda gpt: delattr(gpt, "wpe"),
}


@pytest.mark.parametrize("changed", FORKS)
def test_a_fork_that_is_not_gpt2_any_more_is_not_exported(changed, tmp_path, monkeypatch, capsys):
    """A tensor more, one of another shape, one less: under GPT-2's name its folder would be another
    model's, or nobody's."""

    class Fork(GPT):
        def __init__(self, *args):
            super().__init__(*args)
            FORKS[changed](self)

    config = GPTConfig(**vars(CONFIG) | {"vocab_size": 257})
    weights = {"model": Fork(config).state_dict(), "config": vars(config)}
    torch.save(weights | {"encoding": "bytes", "temperature": 1.0}, tmp_path / "run.pt")
    for module in (checkpoint, untrusted):
        monkeypatch.setattr(module, "GPT", Fork)
    assert sample.main([str(tmp_path / "run.pt"), "--export", str(tmp_path / "hf")]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "this model is not GPT-2 any more, it has another " in said
    assert changed in said
    assert not (tmp_path / "hf" / "config.json").exists()


# ------------------------------------------------------------------------------
# Against transformers


def transformers_gpt2(vocab_size: int = 61, **more):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = {"n_positions": 32, "n_layer": 2, "n_head": 2, "n_embd": 16, **more}
    config = transformers.GPT2Config(vocab_size=vocab_size, **size, initializer_range=0.3)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    for p in theirs.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return theirs


@torch.no_grad()
def gap(ours: GPT, theirs) -> float:
    idx = random_idx(ours)
    return (ours(idx) - theirs(idx).logits).abs().max().item()


@pytest.mark.parametrize("shard", ["5GB", "10KB"])
def test_transformers_writes_we_read(shard, tmp_path):
    theirs = transformers_gpt2()
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors").exists() == (shard == "5GB")
    assert gap(from_pretrained(tmp_path), theirs) <= 1e-4
    theirs.transformer.save_pretrained(tmp_path / "trunk")  # GPT2Model's names have no prefix
    assert gap(from_pretrained(tmp_path / "trunk"), theirs) <= 1e-4


def transformers_model(folder: Path):
    """What transformers reads from a folder, when it finds everything and nothing else there."""
    transformers = pytest.importorskip("transformers")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def test_we_write_transformers_reads(tmp_path):
    ours = random_gpt()
    save_pretrained(ours, tmp_path, eot=60)
    theirs = transformers_model(tmp_path)
    assert type(theirs).__name__ == "GPT2LMHeadModel"
    assert theirs.config.eos_token_id == 60
    assert gap(ours, theirs) <= 1e-4


# ------------------------------------------------------------------------------
# The commands


@pytest.fixture
def pairs(tmp_path) -> str:
    rows = [{"prompt": f"Q{i}", "chosen": " yes", "rejected": f" no {i}"} for i in range(4)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def exo_step(pairs: str, init: Path, out: Path, *more: str) -> int:
    argv = ["exo", "--data", pairs, "--eval_data", pairs, "--init", str(init), "--out", str(out)]
    few = "--max_iters 1 --log_interval 1 --learning_rate 1e-2 --kl_samples 2 --max_new_tokens 4"
    return train.main([*argv, *few.split(), "--device", "cpu", *more])


def byte_folder(folder: Path, vocab_size: int = 257, **extra) -> GPT:
    size = vars(CONFIG) | {"vocab_size": vocab_size}
    gpt = random_gpt(GPTConfig(**size))
    save_pretrained(gpt, folder, **extra)
    return gpt


def test_init_step_export_and_back(pairs, tmp_path, capsys):
    """A padded folder -> one EXO step -> export -> again an --init, which now knows its encoding.
    The policy starts at the reference, so the first evaluation is of distance 0. Where there is
    `transformers`, it has written the first folder and computes the same logits from the last."""
    before, run, hf = byte_folder(tmp_path / "init", 320), tmp_path / "run", tmp_path / "hf"
    if importlib.util.find_spec("transformers"):
        transformers_model(tmp_path / "init").save_pretrained(tmp_path / "init")
    assert exo_step(pairs, tmp_path / "init", run, "--encoding", "bytes") == 0
    assert "63 words beyond bytes's left out" in capsys.readouterr().out
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert first["kl"] == first["margin"] == 0
    assert sample.main([str(run), "--export", str(hf)]) == 0
    assert "no tokenizer is written" in capsys.readouterr().out
    trained, exported = load_gpt(run)[0], from_pretrained(hf)
    assert same(trained, exported)
    assert not trained.wte.weight.equal(before.wte.weight[:257])
    assert not (hf / "vocab.json").exists()
    assert exo_step(pairs, hf, tmp_path / "again") == 0
    assert sample.main([str(hf), "--prompt", "Q", "--max_new_tokens", "4"]) == 0
    if importlib.util.find_spec("transformers"):
        theirs = transformers_model(hf)
        assert gap(trained, theirs) <= 1e-4
        assert theirs.generation_config.eos_token_id == 256


def test_export_keeps_encoding_and_temperature_and_overwrites_nothing(pairs, tmp_path, capsys):
    """A run folder has a config.json of its own."""
    byte_folder(tmp_path / "init")
    argv = ("--encoding", "bytes", "--temperature", "0.5")
    assert exo_step(pairs, tmp_path / "init", tmp_path / "run", *argv) == 0
    assert sample.main([str(tmp_path / "run" / "ckpt.pt"), "--export", str(tmp_path / "hf")]) == 0
    said = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert (said["temperature"], said["do_sample"]) == (0.5, True)
    _, ckpt = load_gpt(tmp_path / "hf")
    assert (ckpt["temperature"], ckpt["encoding"]) == (0.5, "bytes")
    assert sample.main([str(tmp_path / "run"), "--export", str(tmp_path / "run")]) == 2
    assert "is not an empty folder" in capsys.readouterr().err


def test_gpt2_is_the_encoding_of_a_folder_that_does_not_say(pairs, tmp_path, monkeypatch):
    for module in (checkpoint, train, sample):
        monkeypatch.setattr(module, "get_encoding", {"gpt2": data.byte_encoding()}.__getitem__)
    byte_folder(tmp_path / "init")
    tokenizer = {"vocab.json": "{}", "merges.txt": "#version: 0.2", "tokenizer_config.json": "{}"}
    for name, text in tokenizer.items():
        (tmp_path / "init" / name).write_text(text)
    assert exo_step(pairs, tmp_path / "init", tmp_path / "run") == 0
    assert exo_step(pairs, tmp_path / "run", tmp_path / "again") == 0
    assert sample.main([str(tmp_path / "again"), "--export", str(tmp_path / "hf")]) == 0
    for name, text in tokenizer.items():  # copied from where training began, two runs ago
        assert (tmp_path / "hf" / name).read_text() == text
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["exo"]["encoding"] == "gpt2"


def test_mistakes_exit_with_2_and_one_sentence(pairs, tmp_path, capsys):
    init, out = tmp_path / "init", tmp_path / "run"

    def says(*more: str) -> str:
        assert exo_step(pairs, init, out, *more) == 2
        return capsys.readouterr().err

    byte_folder(init, exo={"encoding": "bytes"})
    assert "--encoding gpt2 disagrees with --init" in says("--encoding", "gpt2")
    assert "--n_embd 32 disagrees" in says("--n_embd", "32")
    byte_folder(init, 100)
    assert "has a vocabulary of 100, not of 257" in says("--encoding", "bytes")
    edit_config(init, model_type="llama")
    error = says("--encoding", "bytes")
    assert 'is not GPT-2: config.json has model_type "llama"' in error
    assert error.count("\n") == 1
    assert not out.exists()
