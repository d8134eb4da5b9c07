"""
Files from elsewhere are data: nothing in a checkpoint or a Hugging Face folder is run, no link
leads out of it, and what it says of its size is not believed.
"""

import ast
import contextlib
import json
import pickle
import resource
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import sample
import train
from infra.checkpoint import load_gpt
from infra.huggingface import from_pretrained, save_pretrained
from infra.rows import InputError
from model import GPT, GPTConfig

CONFIG = GPTConfig(block_size=32, vocab_size=257, n_layer=1, n_head=1, n_embd=8)


class Code:
    """A pickle that would write the file at `path`."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "run")


def weights(**changed) -> dict:
    gpt = GPT(CONFIG, torch.Generator().manual_seed(0))
    about = {"config": vars(CONFIG), "encoding": "bytes", "temperature": 1.0, "stage": "sft"}
    return {"model": gpt.state_dict()} | about | changed


def reward_weights(**changed) -> dict:
    head = {"weight": torch.zeros(CONFIG.n_embd), "bias": torch.zeros(1)}
    return weights(stage="reward", head=head, **changed)


@pytest.fixture
def hf(tmp_path) -> Path:
    save_pretrained(GPT(CONFIG), tmp_path / "hf", exo={"encoding": "bytes"})
    return tmp_path / "hf"


def as_bin(folder: Path, state: object) -> None:
    (folder / "model.safetensors").unlink(missing_ok=True)
    torch.save(state, folder / "pytorch_model.bin")


@contextlib.contextmanager
def little_memory(more: int = 2**30):
    """A process that may not grow by more than this many bytes."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("the size of the process is read from Linux")
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def refused(action, *args, **more) -> str:
    with pytest.raises(InputError, match=r"^[^\n]+$") as error, little_memory():
        action(*args, **more)
    return str(error.value)


# ------------------------------------------------------------------------------
# Code


def readers(world, path: Path) -> dict[str, tuple]:
    """Every command that reads the run folder or file at `path`."""
    score = [world.sft, "--score", world.pairs]
    return {
        "sample": (sample.main, [path, "--prompt", "a"]),
        "best": (sample.main, [path, "--prompt", "a", "--which", "best"]),
        "export": (sample.main, [path, "--export", world.folder / "export"]),
        "ref": (sample.main, [*score, "--ref", path]),
        "rate": (sample.main, [*score, "--reward", path]),
        "init": (train.main, world.argv("exo", "--init", path)),
        "reward": (train.main, world.argv("exo --online", "--reward", path, "--K", 2)),
        "resume": (train.main, world.argv("exo", "--resume", out=path.name)),
    }


READERS = "sample best export ref rate init reward resume".split()


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("form", ["zip", "pickle"])
def test_code_in_a_checkpoint_is_not_run(reader, form, world, refusal):
    """In every place that reads one; and nobody is told to trust the file."""
    folder, written = world.run("sft", "--max_iters", 1, out="evil"), world.folder / "written"
    for name in ("ckpt.pt", "best.pt"):
        value = weights(step=Code(written))
        if form == "zip":
            torch.save(value, folder / name)
        else:
            (folder / name).write_bytes(pickle.dumps(value))
    main, argv = readers(world, folder)[reader]
    said = refusal(main, *map(str, argv))[-1]
    assert "it holds more than tensors, numbers and texts" in said
    assert "weights_only" not in said
    assert not written.exists()


@pytest.mark.parametrize("form", ["zip", "pickle"])
def test_code_in_a_hugging_face_folder_is_not_run(form, hf, tmp_path):
    state = {"wte.weight": Code(tmp_path / "written")}
    as_bin(hf, state)
    if form == "pickle":
        (hf / "pytorch_model.bin").write_bytes(pickle.dumps(state))
    assert "it holds more than tensors" in refused(from_pretrained, hf)
    assert not (tmp_path / "written").exists()


EVIL = "open('written', 'w').close()\nfrom data import byte_encoding as enc\n"


@pytest.mark.parametrize(
    ("reader", "made"),
    [
        *((reader, weights) for reader in ("sample", "export", "ref", "init")),
        *((reader, reward_weights) for reader in ("rate", "reward")),
        *((reader, None) for reader in ("sample", "export", "ref", "init")),
    ],
)
def test_no_file_names_code_by_itself(reader, made, world, hf, refusal, monkeypatch):
    """An encoding module:function is imported only where the user named it, too. made: a .pt file,
    or None for a Hugging Face folder."""
    folder = world.folder / "model.pt" if made else hf
    if made:
        torch.save(made(encoding="evilmod:enc"), folder)
    else:
        save_pretrained(GPT(CONFIG), hf, exo={"encoding": "evilmod:enc"})
    (world.folder / "evilmod.py").write_text(EVIL)
    monkeypatch.chdir(world.folder)
    monkeypatch.setattr(sys, "path", [*sys.path, str(world.folder)])
    monkeypatch.delitem(sys.modules, "evilmod", raising=False)
    main, argv = readers(world, folder)[reader]
    said = refusal(main, *map(str, argv))[-1]
    assert f"{folder} has the encoding evilmod:enc: say --encoding evilmod:enc to run it" in said
    assert "evilmod" not in sys.modules
    assert not Path("written").exists()
    if reader != "reward":  # beside an --init of another encoding it is a contradiction
        assert main([*map(str, argv), "--encoding", "evilmod:enc"]) == 0
        assert Path("written").exists()
    sys.modules.pop("evilmod", None)


@pytest.mark.parametrize("main", [train.main, sample.main])
def test_help_says_which_flags_run_a_users_code(main, capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert text.count("module:function to run") + text.count(", completion) to run") == 2


def test_no_line_of_this_project_runs_what_it_reads():
    """torch.load takes weights only; there is no eval, exec, pickle.load or bare except."""
    found = []
    for path in ROOT.rglob("*.py"):
        if "venv" in path.parts or path.is_relative_to(ROOT / "out"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            keywords = {k.arg: ast.unparse(k.value) for k in getattr(node, "keywords", [])}
            bad = name in ("eval", "exec", "pickle.load", "pickle.loads", "torch.jit.load")
            bad |= name == "torch.load" and keywords.get("weights_only") != "True"
            bad |= isinstance(node, ast.ExceptHandler) and node.type is None
            if bad:
                found.append(f"{path}:{node.lineno}")
    assert not found


# ------------------------------------------------------------------------------
# Links


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("kind", ["relative", "absolute"])
def test_links_do_not_lead_out_of_a_folder(name, kind, hf, tmp_path, refusal):
    """Nor does a tokenizer's, which --export would copy. Only a cache's snapshots have blobs."""
    secret = tmp_path / "blobs" / "secret"
    secret.parent.mkdir()
    (hf / "tokenizer.json").write_text("{}")
    (hf / name).rename(secret)
    (hf / name).symlink_to(secret if kind == "absolute" else "../blobs/secret")
    said = refusal(sample.main, str(hf), "--export", str(tmp_path / "out"))[-1]
    assert f"{hf / name} is a link that leads out of its folder" in said
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    if name != "tokenizer.json":
        (hf / name).unlink()
        (hf / name).symlink_to(name)
        assert f"cannot read {hf / name}: " in refused(from_pretrained, hf)


def test_the_cache_of_hugging_face_is_a_folder_of_links(hf, tmp_path):
    """snapshots/REVISION/FILE -> ../../blobs/HASH; and a link to a folder is a folder."""
    snapshot, blobs = tmp_path / "gpt2" / "snapshots" / "1a", tmp_path / "gpt2" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(list(hf.iterdir())):
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
        file.rename(blobs / str(i))
    (tmp_path / "mine").symlink_to(snapshot)
    assert load_gpt(snapshot)[0].config == load_gpt(tmp_path / "mine")[0].config == CONFIG


def test_an_index_of_shards_names_no_file(hf, tmp_path):
    """It is not read: the shards are the folder's own files."""
    (hf / "model.safetensors").rename(tmp_path / "model.safetensors")
    index = {"weight_map": {"transformer.wte.weight": "../model.safetensors"}}
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        (hf / name).write_text(json.dumps(index))
    assert "has no weights" in refused(from_pretrained, hf)


def test_settings_that_begin_with_themselves_end(world, tmp_path):
    """--export looks for a tokenizer where training began."""
    run = world.run("sft", "--max_iters", 1)
    for i, init in enumerate((str(run), 5, None, "nowhere")):
        settings = json.loads((run / "settings.json").read_text()) | {"init": init}
        (run / "settings.json").write_text(json.dumps(settings))
        assert sample.main([str(run), "--export", str(tmp_path / f"hf{i}")]) == 0


# ------------------------------------------------------------------------------
# Sizes

BIG = torch.zeros(1, 1).expand(10**9, 8)
ABSURD = {  # what a file may say: (entries of config, tensors), and what the sentence then holds
    "layers": ({"n_layer": 10**9}, {}, "1000000000 layers and 16 tensors"),
    "words": ({"vocab_size": 10**12}, {}, "size mismatch for wte.weight"),
    "width": ({"n_embd": 10**12}, {}, "verflow"),
    "no number": ({"vocab_size": 10**400}, {}, "verflow"),
    "a view": ({"block_size": 10**9}, {"wpe.weight": BIG}, "larger than the file"),
    "more tensors": ({}, {"x": torch.zeros(100, 100)}, 'Unexpected key(s) in state_dict: "x"'),
    "not finite": ({}, {"ln_f.bias": torch.full((8,), torch.nan)}, '"ln_f.bias" holds numbers'),
    "meta": ({}, {"ln_f.bias": torch.zeros(8, device="meta")}, '"ln_f.bias" holds numbers'),
    "sparse": ({}, {"ln_f.bias": torch.zeros(8).to_sparse()}, '"ln_f.bias" is no tensor of'),
    "text": ({}, {"ln_f.bias": "8 zeros"}, '"ln_f.bias" is no tensor of'),
}


@pytest.mark.parametrize("name", ABSURD)
def test_a_checkpoint_of_absurd_size_takes_no_memory(name, tmp_path):
    config, tensors, said = ABSURD[name]
    ckpt = weights()
    ckpt |= {"config": ckpt["config"] | config, "model": ckpt["model"] | tensors}
    torch.save(ckpt, tmp_path / "a.pt")
    assert said in refused(load_gpt, tmp_path / "a.pt")


@pytest.mark.parametrize("name", ABSURD)
def test_a_hugging_face_folder_of_absurd_size_takes_no_memory(name, hf):
    config, tensors, said = ABSURD[name]
    names = {"block_size": "n_positions"}
    given = json.loads((hf / "config.json").read_text())
    given |= {names.get(k, k): x for k, x in config.items()}
    (hf / "config.json").write_text(json.dumps(given))
    state = GPT(CONFIG).state_dict()
    state = {k: x.T.clone() if k.startswith("h.") and x.dim() == 2 else x for k, x in state.items()}
    as_bin(hf, state | tensors)
    assert said in refused(from_pretrained, hf)


def test_a_compressed_checkpoint_is_refused(tmp_path):
    """A megabyte of zip file would unpack to a gigabyte of pickle."""
    torch.save(weights(), tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as old:
        parts = {part: old.read(part) for part in old.namelist()}
    with zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for part, content in parts.items():
            new.writestr(part, content)
    assert "it is compressed" in refused(load_gpt, tmp_path / "b.pt")


@pytest.mark.parametrize("change", [lambda x: x[:1], lambda x: x[:1].expand(x.shape), str])
def test_an_optimizer_of_another_shape_is_refused(change, world, refusal):
    """The fused kernel would read and write beside it."""
    out = world.run("exo")
    ckpt = torch.load(out / "ckpt.pt", weights_only=True)
    state = ckpt["optimizer"]["state"]["gpt.wte.weight"]
    state["exp_avg"] = change(state["exp_avg"])
    torch.save(ckpt, out / "ckpt.pt")
    said = refusal(train.main, *world.argv("exo", "--resume", "--max_iters", 9))[-1]
    assert "--resume: " in said
