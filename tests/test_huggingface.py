"""Hugging Face GPT-2 folders: what goes out comes back, `transformers` agrees, and what this GPT
does not compute is refused by name."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import tiktoken
import torch
from safetensors.torch import load_file

import sample
import train
from infra import checkpoint
from infra.checkpoint import load_gpt
from infra.huggingface import from_pretrained, save_pretrained
from model import GPT, GPTConfig

CONFIG = GPTConfig(block_size=32, vocab_size=61, n_layer=2, n_head=2, n_embd=16)


def random_gpt(config: GPTConfig = CONFIG, seed: int = 0) -> GPT:
    """Every tensor random, biases and LayerNorms too, or a wrong mapping could go unseen."""
    generator = torch.Generator().manual_seed(seed)
    gpt = GPT(config, generator)
    for p in gpt.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return gpt.eval()


def random_idx(gpt: GPT) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(gpt.config.vocab_size, (3, gpt.config.block_size), generator=generator)


def same(a: GPT, b: GPT) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return a.config == b.config and x.keys() == y.keys() and all(x[k].equal(y[k]) for k in x)


def without_safetensors(monkeypatch) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "safetensors"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "safetensors", None)


@pytest.fixture
def bin_folder(tmp_path) -> Path:
    """A folder with pytorch_model.bin, as older ones are."""
    save_pretrained(random_gpt(), tmp_path / "hf")
    weights = tmp_path / "hf" / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "hf" / "pytorch_model.bin")
    weights.unlink()
    return tmp_path / "hf"


def edit_config(folder: Path, **entries) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def edit_weights(folder: Path, change) -> None:
    path = folder / "pytorch_model.bin"
    tensors = torch.load(path, weights_only=True)
    torch.save(change(tensors) or tensors, path)


# ------------------------------------------------------------------------------
# There and back


def test_round_trip_is_bit_equal(tmp_path):
    """Nothing but the files named is left behind."""
    gpt = random_gpt()
    save_pretrained(gpt, tmp_path / "hf", eot=60)
    names = {"config.json", "model.safetensors"}
    assert {p.name for p in (tmp_path / "hf").iterdir()} == names
    assert len({p.stat().st_mode for p in (tmp_path / "hf").iterdir()}) == 1  # all may read both
    back = from_pretrained(tmp_path / "hf")
    assert same(gpt, back)
    assert all(p.requires_grad and p.is_contiguous() for p in back.parameters())
    assert back(random_idx(gpt)).equal(gpt(random_idx(gpt)))


def test_matrices_go_out_input_first(bin_folder):
    """Conv1D: (in, out); the names are those of GPT2LMHeadModel."""
    tensors = torch.load(bin_folder / "pytorch_model.bin", weights_only=True)
    assert tensors["transformer.h.0.attn.c_attn.weight"].shape == (16, 48)
    assert tensors["transformer.h.1.mlp.c_proj.weight"].shape == (64, 16)
    assert tensors["transformer.wte.weight"].shape == (61, 16)


def test_no_prefix_buffers_and_head_do_not_matter(bin_folder):
    """As the hub's own gpt2 is stored: no prefix, causal masks beside the weights."""

    def change(tensors):
        out = {k.removeprefix("transformer."): x for k, x in tensors.items()}
        out["h.0.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
        out["h.0.attn.masked_bias"] = torch.tensor(-1e4)
        return out | {"lm_head.weight": out["wte.weight"]}

    edit_weights(bin_folder, change)
    assert same(from_pretrained(bin_folder), random_gpt())


def test_half_precision_files_become_float32(bin_folder):
    edit_weights(bin_folder, lambda tensors: {k: x.bfloat16() for k, x in tensors.items()})
    gpt = from_pretrained(bin_folder)
    assert {p.dtype for p in gpt.parameters()} == {torch.float32}
    assert gpt.wte.weight.equal(random_gpt().wte.weight.bfloat16().float())


@pytest.mark.parametrize("kind", ["pytorch_model.bin", "model.safetensors"])
def test_sharded_index(kind, bin_folder):
    tensors = torch.load(bin_folder / "pytorch_model.bin", weights_only=True)
    (bin_folder / "pytorch_model.bin").unlink()
    names, weight_map, suffix = sorted(tensors), {}, kind.rpartition(".")[2]
    for i in range(3):
        shard, part = f"shard-{i}.{suffix}", {n: tensors[n] for n in names[i::3]}
        if suffix == "bin":
            torch.save(part, bin_folder / shard)
        else:
            pytest.importorskip("safetensors.torch").save_file(part, bin_folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    (bin_folder / f"{kind}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert same(from_pretrained(bin_folder), random_gpt())
    (bin_folder / f"shard-1.{suffix}").unlink()
    with pytest.raises(ValueError, match=r"names the file 'shard-1.*not there"):
        from_pretrained(bin_folder)


def test_index_cannot_leave_its_folder(bin_folder):
    index = {"weight_map": {"wte.weight": "../hf/pytorch_model.bin"}}
    (bin_folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (bin_folder / "pytorch_model.bin").rename(bin_folder.parent / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"names the file '\.\./hf"):
        from_pretrained(bin_folder)


def test_saving_again_leaves_no_stale_weights(bin_folder):
    """Else somebody would go on reading an older file."""
    for name in ("model.safetensors", "model.safetensors.index.json"):
        (bin_folder / name).write_text("{}")
    save_pretrained(random_gpt(seed=5), bin_folder)
    assert {p.name for p in bin_folder.iterdir()} == {"config.json", "model.safetensors"}
    assert same(from_pretrained(bin_folder), random_gpt(seed=5))


def test_writing_needs_safetensors(tmp_path, monkeypatch):
    without_safetensors(monkeypatch)
    with pytest.raises(ValueError, match="needs a package: pip install safetensors"):
        save_pretrained(random_gpt(), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_padded_vocabulary_is_cut_on_request(bin_folder):
    """The words kept have the same logits as before."""
    cut, whole = from_pretrained(bin_folder, 50), random_gpt()
    idx = random_idx(cut)
    torch.testing.assert_close(cut(idx), whole(idx)[..., :50], atol=1e-5, rtol=1e-5)
    assert cut.config.vocab_size == len(cut.wte.weight) == 50
    with pytest.raises(ValueError, match="has a vocabulary of 61, not of 62"):
        from_pretrained(bin_folder, 62)


# ------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"model_type": "llama"}, 'is not GPT-2: config.json has model_type "llama"'),
        ({"model_type": None}, "is not GPT-2: config.json has model_type null"),
        ({"activation_function": "relu"}, 'activation_function is "relu", this GPT has "gelu_new"'),
        ({"activation_function": "gelu"}, 'activation_function is "gelu"'),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is true"),
        ({"scale_attn_weights": False}, "scale_attn_weights is false"),
        ({"add_cross_attention": True}, "add_cross_attention is true"),
        ({"n_inner": 32}, "n_inner is 32, this GPT has 4 n_embd = 64"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is false"),
        ({"n_head": 3}, r"n_embd \(16\) must be divisible by n_head \(3\)"),
        ({"n_layer": "two"}, "n_layer must be an integer, got 'two'"),
        ({"n_layer": 3}, "lacks the tensor h.2.attn.c_attn.bias"),
        ({"n_layer": 1}, "has a tensor h.1.attn.c_attn.bias, which"),
        ({"n_positions": 64}, r"wpe.weight is \[32, 16\] of torch.float32, expected \[64, 16\]"),
        ({"vocab_size": 60}, r"wte.weight is \[61, 16\]"),
    ],
)
def test_refused_by_config(entries, message, bin_folder):
    edit_config(bin_folder, **entries)
    with pytest.raises(ValueError, match=message) as error:
        from_pretrained(bin_folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "entries",
    [
        {"reorder_and_upcast_attn": True, "resid_pdrop": 0.1},
        {"activation_function": "gelu_pytorch_tanh", "n_inner": 64},
    ],
)
def test_harmless_variants_load(entries, bin_folder):
    edit_config(bin_folder, **entries)
    assert same(from_pretrained(bin_folder), random_gpt())


def test_refused_by_tensors(bin_folder):
    wrong = {"transformer.ln_f.bias": torch.zeros(16, dtype=torch.long)}
    edit_weights(bin_folder, lambda tensors: tensors | wrong)
    with pytest.raises(ValueError, match=r"ln_f.bias is \[16\] of torch.int64, expected \[16\]"):
        from_pretrained(bin_folder)
    edit_weights(bin_folder, lambda tensors: {"model": tensors})
    with pytest.raises(ValueError, match="it must hold tensors by name"):
        from_pretrained(bin_folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "config.json"])
def test_damaged_files_take_one_sentence(name, bin_folder):
    if name == "model.safetensors":
        pytest.importorskip("safetensors")
    (bin_folder / name).write_bytes(b"\x00not a model\xff")
    with pytest.raises(ValueError, match=f"cannot read .*{name}") as error:
        from_pretrained(bin_folder)
    assert "\n" not in str(error.value)


def test_missing_files_and_package(bin_folder, monkeypatch):
    with pytest.raises(ValueError, match=r"cannot read .*config.json"):
        from_pretrained(bin_folder / "nowhere")
    (bin_folder / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"has no weights: none of model\.safetensors"):
        from_pretrained(bin_folder)
    (bin_folder / "model.safetensors").write_bytes(b"")
    without_safetensors(monkeypatch)
    with pytest.raises(ValueError, match="needs a package: pip install safetensors"):
        from_pretrained(bin_folder)


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


def test_trunk_alone_is_read(tmp_path):
    """GPT2Model's names have no prefix."""
    theirs = transformers_gpt2()
    theirs.transformer.save_pretrained(tmp_path)
    assert gap(from_pretrained(tmp_path), theirs) <= 1e-4


def test_we_write_transformers_reads(tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = random_gpt()
    save_pretrained(ours, tmp_path, eot=60)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(theirs).__name__ == "GPT2LMHeadModel"
    assert theirs.config.eos_token_id == 60
    assert gap(ours, theirs.eval()) <= 1e-4


def test_transformers_llama_is_refused(tmp_path):
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=61, num_hidden_layers=1, **size)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r'is not GPT-2: config\.json has model_type "llama"'):
        from_pretrained(tmp_path)


# ------------------------------------------------------------------------------
# The tokenizer


def tiny_encoding() -> tiktoken.Encoding:
    """A BPE of 256 bytes and a few merges that calls itself gpt2."""
    merges = [b"th", b"he", b"the", b" t", b" the", b"ll", b"ell", b"hell", b"\xc3\xa9", b"  "]
    tokens = [bytes([b]) for b in range(256)] + merges
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2's
    ranks = {token: i for i, token in enumerate(tokens)}
    special = {"<|endoftext|>": len(tokens)}
    return tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


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
    The policy starts at the reference, so the first evaluation is of distance 0."""
    before, run, hf = byte_folder(tmp_path / "init", 320), tmp_path / "run", tmp_path / "hf"
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
        from transformers import AutoModelForCausalLM

        theirs = AutoModelForCausalLM.from_pretrained(hf)
        assert gap(trained, theirs.eval()) <= 1e-4
        assert theirs.generation_config.eos_token_id == 256


def test_transformers_weights_take_an_exo_step_and_go_back(pairs, tmp_path):
    """Weights that transformers wrote -> one EXO step -> export -> transformers computes the logits
    of the trained model, which are no longer those it wrote."""
    transformers = pytest.importorskip("transformers")
    before = transformers_gpt2(257)
    before.save_pretrained(tmp_path / "init")
    assert exo_step(pairs, tmp_path / "init", tmp_path / "run", "--encoding", "bytes") == 0
    assert sample.main([str(tmp_path / "run"), "--export", str(tmp_path / "hf")]) == 0
    trained = load_gpt(tmp_path / "run")[0]
    after = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert gap(trained, after.eval()) <= 1e-4
    assert gap(trained, before.eval()) > 1e-3


def test_export_keeps_encoding_and_temperature(pairs, tmp_path):
    byte_folder(tmp_path / "init")
    argv = ("--encoding", "bytes", "--temperature", "0.5")
    assert exo_step(pairs, tmp_path / "init", tmp_path / "run", *argv) == 0
    assert sample.main([str(tmp_path / "run" / "ckpt.pt"), "--export", str(tmp_path / "hf")]) == 0
    said = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert (said["temperature"], said["do_sample"]) == (0.5, True)
    _, ckpt = load_gpt(tmp_path / "hf")
    assert (ckpt["temperature"], ckpt["encoding"]) == (0.5, "bytes")


def test_gpt2_is_the_encoding_of_a_folder_that_does_not_say(pairs, tmp_path, monkeypatch):
    encoding = tiny_encoding()
    for module in (checkpoint, train, sample):
        monkeypatch.setattr(module, "get_encoding", {"gpt2": encoding}.__getitem__)
    byte_folder(tmp_path / "init", encoding.n_vocab)
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
    byte_folder(init, exo={"encoding": "os:getcwd"})

    def says(*more: str) -> str:
        assert exo_step(pairs, init, out, *more) == 2
        return capsys.readouterr().err

    assert "say --encoding os:getcwd to run it" in says()
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


def test_export_overwrites_nothing(pairs, tmp_path, capsys):
    """A run folder has a config.json of its own."""
    byte_folder(tmp_path / "init")
    assert exo_step(pairs, tmp_path / "init", tmp_path / "run", "--encoding", "bytes") == 0
    assert sample.main([str(tmp_path / "run"), "--export", str(tmp_path / "run")]) == 2
    assert "is not an empty folder" in capsys.readouterr().err
