"""Test import and export of GPT-2 weights: names, shapes, logits, runs and rejections."""

import json
import os
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import jax
import numpy as np
import pytest
import safetensors
from flax import nnx
from helpers import (
    ROOT,
    assert_trees_close,
    exit_code,
    log_of,
    make_data,
    params_of,
    random_params,
    refusal,
    write_run,
)
from reference import numpy_gpt as ref
from reference.gpt2 import Golden
from safetensors.numpy import load_file, save_file

from jaxgpt import model
from jaxgpt.cli import commands as cli
from jaxgpt.config import Config, ModelConfig
from jaxgpt.data import tokenizer as tokenizers
from jaxgpt.interop.export import export, to_fields, to_tensors
from jaxgpt.interop.huggingface import REQUIRED_KEYS, open_weights, param_rows
from jaxgpt.runtime import run_dir
from jaxgpt.runtime.config_file import load_config_file
from jaxgpt.runtime.mesh import local_mesh, make_mesh
from jaxgpt.runtime.metrics import read_metrics
from jaxgpt.tools.evaluation import evaluate
from jaxgpt.train import train

GOLDEN, DATA = ROOT / "tests" / "golden", ROOT / "data"
with np.load(GOLDEN / "gpt2_shapes.npz") as archive:
    SHAPES = dict(archive)
CASES = sorted({key.split("/")[0] for key in SHAPES})
TINY = {"vocab_size": 11, "block_size": 6, "n_layer": 2, "n_head": 2, "n_embd": 8}
EXACT = {"dtype": "float32", "attention": "reference"}


def write_folder(folder: Path, fields: dict, tensors: dict[str, np.ndarray]) -> Path:
    """Write a GPT-2 to disk as transformers would; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def golden_case(case: str) -> tuple[dict, dict[str, np.ndarray]]:
    """Return the fields of config.json and the state dict in float16."""
    prefix = f"{case}/tensor/"
    tensors = {k.removeprefix(prefix): v for k, v in SHAPES.items() if k.startswith(prefix)}
    return json.loads(SHAPES[f"{case}/config"].item()), tensors


@pytest.fixture
def write_case(tmp_path):
    folder = lambda case: tmp_path / case.replace(" ", "_")
    return lambda case="small": write_folder(folder(case), *golden_case(case))


def load(folder: Path, **keys) -> tuple[Config, dict]:
    config = Config(**open_weights(str(folder)).keys | EXACT | keys)
    mesh = make_mesh(config) if config.mesh else local_mesh()
    return config, open_weights(str(folder)).load(config, mesh)


def logits_of(config: Config, params: dict, tokens) -> np.ndarray:
    graphdef, _, _ = model.abstract_model(config)
    logits = jax.jit(lambda params, ids: nnx.merge(graphdef, params)(ids))(params, tokens)
    return np.asarray(logits)[..., : config.vocab_size]


# ---- the table of weights --------------------------------------------------------------------
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"n_layer": 0}, {"n_head": 1}], ids=str)
def test_weight_table_names_every_parameter_exactly_once(options):
    config = Config(**TINY | options)
    _, shapes, _ = model.abstract_model(config)
    table = param_rows(config)
    assert sorted(ref.flatten(shapes)) == sorted(table)
    assert len({name for name, _ in table.values()}) == len(table)


def test_fused_qkv_columns_are_query_key_and_value_by_head(write_case):
    config, params = load(write_case("padded vocabulary"))
    D, H, N = config.n_embd, config.head_dim, config.n_head
    _, tensors = golden_case("padded vocabulary")
    for layer in range(config.n_layer):
        attn = params["blocks"][layer]["attn"]
        c_attn = tensors[f"transformer.h.{layer}.attn.c_attn.weight"]
        c_proj = tensors[f"transformer.h.{layer}.attn.c_proj.weight"]
        for head in range(N):
            for part in range(3):
                first = part * D + head * H
                mine = attn["qkv"]["kernel"][:, part, head]
                np.testing.assert_array_equal(mine, c_attn[:, first : first + H])
            mine, rows = attn["out"]["kernel"][head], c_proj[head * H : (head + 1) * H]
            np.testing.assert_array_equal(mine, rows)


# ---- equal logits ----------------------------------------------------------------------------
LOADED = [(case, {"scan_layers": case == "exact gelu"}) for case in CASES]
LOADED += [("exact gelu", {"mesh": "fsdp:2,tensor:2", "batch_size": 2})]
LOADED += [("exact gelu", {"block_size": 5})]  # cuts off later positions


@pytest.mark.slow
@pytest.mark.parametrize(("case", "keys"), LOADED, ids=str)
def test_loaded_logits_match_transformers(write_case, case, keys):
    config, params = load(write_case(case), **keys)
    T = config.block_size
    assert params["pos_embed"]["kernel"].shape == (T, config.n_embd)
    if config.mesh:
        assert len(params["blocks"][0]["mlp"]["up"]["kernel"].addressable_shards) == 4
    logits = logits_of(config, params, SHAPES[f"{case}/tokens"][:, :T])
    np.testing.assert_allclose(logits, SHAPES[f"{case}/logits"][:, :T], rtol=0, atol=1e-4)


def test_weights_in_hub_layout_give_the_logits_of_golden_gpt2(tmp_path):
    golden = Golden(GOLDEN / "gpt2_tiny.npz")
    config = {k: v.item() for k, v in golden.arrays.items() if k.startswith("config/")}
    fields = {k.removeprefix("config/"): v for k, v in config.items()} | {"model_type": "gpt2"}
    tensors = {  # as on the hub: without the prefix, with masks, with the output map
        key.removeprefix("param/transformer."): value.astype(np.float32)
        for key, value in golden.arrays.items()
        if key.startswith("param/")
    }
    tensors |= {"lm_head.weight": tensors["wte.weight"]}
    tensors |= {f"h.{i}.attn.bias": np.ones((1, 1, 16, 16), np.float32) for i in range(2)}
    config, params = load(write_folder(tmp_path / "tiny", fields, tensors))
    logits = logits_of(config, params, golden.arrays["tokens"][0])
    np.testing.assert_allclose(logits, golden.arrays["logits"], rtol=0, atol=1e-4)


# ---- import and export -----------------------------------------------------------------------
@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_import_then_export_returns_identical_tensors(write_case, case, scan_layers):
    config, params = load(write_case(case), scan_layers=scan_layers)
    fields, tensors = golden_case(case)
    again = to_tensors(config, params)
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(again[name], tensor.astype(np.float32), strict=True)
    written = to_fields(config)
    names = written.keys() & fields.keys() - {"activation_function", "n_inner", "dtype"}
    names -= {"embd_pdrop", "attn_pdrop", "resid_pdrop"}
    assert {k: written[k] for k in names} == {k: fields[k] for k in names}
    assert (written["n_inner"] or 4 * config.n_embd) == config.mlp_hidden_dim


def test_vocabulary_padding_rows_are_zero(write_case):
    _, params = load(write_case("padded vocabulary"))
    embed_VD = np.asarray(params["embed"]["kernel"])
    assert embed_VD.shape[0] == 256
    assert embed_VD[:130].all(axis=1).all()
    assert not embed_VD[130:].any()


def noisy_run(folder: Path, tokenizer: tokenizers.Tokenizer | None = None, **options) -> Config:
    """Write a run directory with a checkpoint of random weights at step 7; return the config."""
    config = Config(**TINY | EXACT | {"out_dir": str(folder)} | options)
    params = model.init_params(config, jax.random.key(3))
    noise = lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape)
    return write_run(config, {7: jax.tree.map(noise, params)}, tokenizer, best=7)


EXPORTED = [
    {},
    {"mlp": "gelu", "bias": False, "mlp_dim": 12},
    {"mlp": "relu", "n_kv_head": 2, "vocab_size": 128},
    {"mlp": "relu2", "scan_layers": True, "dropout": 0.2},
    {"n_layer": 0},
]


@pytest.mark.slow
@pytest.mark.parametrize("options", EXPORTED, ids=str)
def test_exported_run_gives_the_same_logits_and_weights(tmp_path, options):
    config = noisy_run(tmp_path / "run", **options)
    assert export(config.out_dir, "best", str(tmp_path / "out")) == 7
    params, _ = run_dir.load_params(config, "best", local_mesh())
    again_config, again = load(tmp_path / "out")
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 6))
    before = logits_of(config.replace(dropout=0.0), params, ids)
    np.testing.assert_allclose(logits_of(again_config, again, ids), before, rtol=0, atol=1e-6)
    params = model.unstack_layers(params) if config.scan_layers else params
    flat, flat_again = (ref.flatten(jax.device_get(tree)) for tree in (params, again))
    for path, value in flat.items():
        rows = config.vocab_size if path == "embed.kernel" else None
        np.testing.assert_array_equal(flat_again[path][:rows], value[:rows], strict=True)
    assert all(not flat_again[path].any() for path in flat_again.keys() - flat.keys())


# ---- tokenizers ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "tokenizer", [tokenizers.CharTokenizer("\n abcdef"), tokenizers.ByteTokenizer()]
)
def test_char_and_byte_tokenizers_are_exported_as_jaxgpt_tokenizer_json(tmp_path, tokenizer):
    size = tokenizer.vocab_size
    config = noisy_run(tmp_path / "run", tokenizer, vocab_size=size)
    export(config.out_dir, "best", str(tmp_path / "out"))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors", "jaxgpt_tokenizer.json"}
    fields = json.loads((tmp_path / "out/config.json").read_text())
    assert "jaxgpt_tokenizer.json" in fields["jaxgpt_tokenizer"]
    again = open_weights(str(tmp_path / "out")).tokenizer("nowhere")
    assert type(again) is type(tokenizer)
    assert again.encode("a b").tolist() == tokenizer.encode("a b").tolist()


@pytest.fixture(scope="session")
def gpt2():
    files = [DATA / "gpt2" / Path(download.url).name for download in tokenizers.GPT2_FILES]
    if not all(file.exists() for file in files):
        pytest.skip("needs GPT-2's files in data/gpt2")
    return tokenizers.gpt2(DATA)


def test_gpt2_tokenizer_is_exported_for_transformers_and_loaded_again(tmp_path, gpt2):
    config = noisy_run(tmp_path / "run", gpt2, vocab_size=50257)
    export(config.out_dir, "best", str(tmp_path / "out"))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names > {"vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"}
    vocab = json.loads((DATA / "gpt2" / "encoder.json").read_text())
    assert json.loads((tmp_path / "out/vocab.json").read_text()) == vocab
    merges = (DATA / "gpt2" / "vocab.bpe").read_text().split("\n", 1)[1].strip()
    assert (tmp_path / "out/merges.txt").read_text().split("\n", 1)[1].strip() == merges
    fields = json.loads((tmp_path / "out/config.json").read_text())
    assert fields["eos_token_id"] == 50256
    text = "Hello, it's  me.\n\n\nROMEO"
    for name in "tokenizer.json", "vocab.json":  # without the first it is GPT-2's by its size
        again = open_weights(str(tmp_path / "out")).tokenizer(str(DATA))
        assert again.encode(text).tolist() == gpt2.encode(text).tolist()
        (tmp_path / "out" / name).unlink()


def test_weights_with_gpt2s_vocabulary_are_exported_with_its_tokenizer(
    tmp_path, fake_torch, gpt2, monkeypatch
):
    monkeypatch.chdir(DATA.parent)
    file = write_checkpoint(tmp_path, fake_torch, vocab_size=50304)
    export("out", "best", str(tmp_path / "out"), init_from=str(file))
    again = open_weights(str(tmp_path / "out"))
    assert again.tokenizer("nowhere").encode("ROMEO:").tolist() == gpt2.encode("ROMEO:").tolist()


def test_missing_or_mismatched_tokenizer_is_rejected(write_case):
    folder = write_case("small")
    weights = open_weights(str(folder))
    message = refusal(weights.tokenizer, "data")
    assert message == f"{folder}: no tokenizer; expected {folder / 'tokenizer.json'}"
    (folder / "tokenizer.json").write_text(tokenizers.CharTokenizer("abcdefghijkl").to_json())
    message = refusal(weights.tokenizer, "data")
    said = f"{folder}: its tokenizer has 12 ids; expected at most the 11 of the weights; "
    assert message == f"{said}try another {folder / 'tokenizer.json'}"


# ---- rejected imports ------------------------------------------------------------------------
QKV = "transformer.h.0.attn.c_attn.weight"
BAD = [  # (changes of tensors, fields of config.json, words of the message)
    ({QKV: lambda qkv: qkv.T.copy()}, {}, "tensor h.0.attn.c_attn.weight has shape (24, 8); "
                                          "expected (8, 24)"),
    ({QKV: None}, {}, "no tensor h.0.attn.c_attn.weight"),
    ({"transformer.h.0.moe.weight": lambda _: np.zeros(3, np.float16)}, {},
     "unknown tensor h.0.moe.weight; expected the tensors of a GPT-2 with"),
    ({}, {"n_embd": 16}, "tensor wte.weight has shape (11, 8); expected (11, 16)"),
    ({}, {"n_layer": 2}, "no tensor h.1.ln_1.weight"),
    ({}, {"model_type": "llama"}, "config.json: has model_type='llama'; expected 'gpt2'"),
    ({}, {"layer_norm_epsilon": 1e-6}, ": has layer_norm_epsilon=1e-06; expected 1e-05"),
    ({}, {"tie_word_embeddings": False}, ": has tie_word_embeddings=False; expected True"),
    ({}, {"activation_function": "silu"}, ": has activation_function='silu'; expected one of "
                                          "gelu_new, gelu, relu, relu2, gelu_pytorch_tanh"),
    ({}, {"n_layer": "two"}, "config.json: n_layer='two': invalid value; expected a whole"),
    ({}, {"n_embd": None}, "config.json: n_embd=None: invalid value; expected a whole"),
    ({}, {"max_iters": 5}, "belongs to a jaxgpt run; try --out_dir="),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "others", "message"), BAD)
def test_weights_that_are_not_gpt2_are_rejected_with_the_reason(tmp_path, changes, others, message):
    fields, tensors = golden_case("small")
    for name, change in changes.items():
        tensor = tensors.pop(name, None)
        tensors |= {name: change(tensor)} if change else {}
    folder = write_folder(tmp_path / "bad", fields | others, tensors)
    said = refusal(open_weights, str(folder))
    assert said.startswith(str(folder))
    assert message in said


def test_missing_or_truncated_weight_files_are_rejected(write_case):
    folder = write_case("small")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert refusal(open_weights, str(folder)).startswith(f"{file}: not a safetensors file")
    file.unlink()
    assert (
        refusal(open_weights, str(folder))
        == f"{folder}: no weights in it; expected model.safetensors"
    )
    (folder / "config.json").write_text("3")
    assert "config.json: not the config of a GPT-2" in refusal(open_weights, str(folder))
    (folder / "config.json").unlink()
    assert "config.json: not the config of a GPT-2" in refusal(open_weights, str(folder))


def test_weights_in_several_files_load_as_one_model(write_case):
    folder = write_case("small")
    tensors = load_file(folder / "model.safetensors")
    _, whole = load(folder)
    (folder / "model.safetensors").unlink()
    for number, part in enumerate((sorted(tensors)[:5], sorted(tensors)[5:]), 1):
        file = folder / f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, file)
    _, parts = load(folder)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_array_equal(a, b)


# ---- the hub ---------------------------------------------------------------------------------
WANTED = {"config.json", "model.safetensors", "tokenizer.json", "jaxgpt_tokenizer.json"}


@pytest.mark.parametrize("name", ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "me/my-gpt2"])
def test_hub_weights_are_downloaded_without_pickle_files(write_case, monkeypatch, name):
    folder, asked = write_case("small"), []

    def snapshot_download(repo: str, allow_patterns: list[str]) -> str:
        if asked:
            raise OSError("offline\nand so on")
        asked.append((repo, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert open_weights(name).keys["n_embd"] == 8
    ((repo, patterns),) = asked
    assert repo == name
    assert all(pattern.endswith((".json", ".safetensors")) for pattern in patterns)
    assert {name for name in WANTED for pattern in patterns if fnmatch(name, pattern)} == WANTED
    said = refusal(open_weights, name)
    assert said.startswith(
        f"init_from={name!r}: no such folder, and the download failed (OSError); "
    )


@pytest.mark.parametrize("name", ["resum", "gpt3", "./nowhere", "/no/where", "a/b/c"])
def test_invalid_weight_names_are_rejected_without_asking_the_hub(monkeypatch, name):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    said = refusal(open_weights, name)
    assert said.startswith(f"init_from={name!r}: no such weights; expected resume")
    assert "gpt2-xl" in said


def test_backup_beside_the_weights_is_not_read(write_case):
    folder = write_case("small")
    want = load(folder)[1]
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: 0 * array for name, array in tensors.items()}, folder / "model_old.safetensors"
    )
    assert_trees_close(load(folder)[1], want, 0)


def test_weights_that_cannot_be_written_are_reported_in_one_line(tmp_path, monkeypatch):
    def save_file(*args, **options):
        raise safetensors.SafetensorError("I/O error: no space left")

    monkeypatch.setattr(safetensors.numpy, "save_file", save_file)
    config = noisy_run(tmp_path / "run")
    said = refusal(export, config.out_dir, "best", str(tmp_path / "out"))
    assert said.startswith(f"to='{tmp_path}/out': cannot be written (I/O error: no space left); ")


def test_missing_hf_packages_error_names_the_pip_extra(write_case, monkeypatch):
    folder = write_case("small")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert "; try pip install 'jaxgpt[hf]'" in refusal(open_weights, str(folder))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "; try pip install 'jaxgpt[hf]'" in refusal(open_weights, "gpt2")


# ---- nanoGPT's ckpt.pt -----------------------------------------------------------------------
class FakeTensor:
    """A stand-in for torch.Tensor with the methods that the import needs."""

    def __init__(self, array: np.ndarray):
        self.array, self.ndim, self.shape = array, array.ndim, array.shape

    def t(self):
        return FakeTensor(self.array.T)

    def float(self):
        return FakeTensor(self.array.astype(np.float32))

    def numpy(self):
        return self.array


@pytest.fixture
def fake_torch(monkeypatch):
    """Replace torch with a stub; return the dict that the stub's torch.load returns."""
    held: dict = {}

    def load(file, map_location, weights_only):
        assert Path(file).is_file()
        assert weights_only is True
        if not held:
            raise RuntimeError("a pickle\nthat wants to run")
        return held

    torch = SimpleNamespace(load=load, device=type(None))  # tyro looks for torch.device
    monkeypatch.setitem(sys.modules, "torch", torch)
    return held


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_checkpoint_gives_the_logits_of_the_huggingface_weights(tmp_path, fake_torch, bias):
    fields, tensors = golden_case("exact gelu")
    fields["n_inner"] = 64  # nanoGPT's is always 4 n_embd
    rng = np.random.default_rng(0)
    for name, tensor in tensors.items():
        if "c_fc" in name or name.endswith("mlp.c_proj.weight"):
            shape = [64 if n == 24 else n for n in tensor.shape]
            tensors[name] = rng.normal(0, 0.3, shape).astype(np.float16)
        if name.endswith(".bias") and not bias:
            tensors[name] = np.zeros_like(tensors[name])
    theirs = {
        f"_orig_mod.{name}": FakeTensor(t.T if ".h." in name and t.ndim == 2 else t)
        for name, t in tensors.items()
        if bias or not name.endswith(".bias")
    }
    theirs["_orig_mod.lm_head.weight"] = theirs["_orig_mod.transformer.wte.weight"]
    args = {"n_layer": 3, "n_head": 2, "n_embd": 16, "block_size": 12, "vocab_size": 128}
    fake_torch |= {"model": theirs, "model_args": args | {"bias": bias, "dropout": 0.1}}
    (tmp_path / "ckpt.pt").write_bytes(b"")
    hf_config, hf = load(write_folder(tmp_path / "hf", fields, tensors))
    tokens = SHAPES["exact gelu/tokens"]
    for name in str(tmp_path), str(tmp_path / "ckpt.pt"):
        config, params = load(Path(name))
        assert (config.bias, config.mlp) == (bias, "gelu")
        logits = logits_of(config, params, tokens)
        np.testing.assert_allclose(logits, logits_of(hf_config, hf, tokens), rtol=0, atol=1e-5)


def test_parameters_that_gpt2_lacks_are_not_dropped():
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "mlp_dim": 64}
    config = Config(**sizes, block_size=12, vocab_size=128)
    params = random_params(config)
    params["blocks"][0]["mlp"]["router"] = {"kernel": np.ones((16, 4))}
    message = refusal(to_tensors, config, params)
    assert message.startswith("blocks.0.mlp.router.kernel: not in GPT-2's format; expected")


def write_checkpoint(folder: Path, fake_torch: dict, vocab_size: int = 128) -> Path:
    """Write a ckpt.pt of random weights with GPT-2's initialisation; return the file."""
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 12, "vocab_size": vocab_size}
    config = Config(**sizes, mlp="gelu", mlp_dim=64, dtype="float32", attention="reference")
    tensors = to_tensors(config, random_params(config))
    theirs = {
        name: FakeTensor(t.T if ".h." in name and t.ndim == 2 else t) for name, t in tensors.items()
    }
    fake_torch |= {"model": theirs, "model_args": sizes | {"bias": True}}
    file = folder / "ckpt.pt"
    file.write_bytes(b"")
    return file


def test_export_and_eval_commands_take_a_nanogpt_checkpoint_directly(tmp_path, fake_torch, capsys):
    file = write_checkpoint(tmp_path, fake_torch)
    characters = tokenizers.CharTokenizer("".join(map(chr, range(10, 127))))
    (tmp_path / "tokenizer.json").write_text(characters.to_json())
    to = tmp_path / "folder"
    assert exit_code(cli.run, cli.export, [f"--init_from={file}", f"--to={to}"]) is None
    assert capsys.readouterr().out == f"wrote {file} to {to}\n"
    (config, ours), (_, theirs) = load(file), load(to)
    tokens = np.arange(12)[None]
    np.testing.assert_array_equal(
        logits_of(config, ours, tokens), logits_of(config, theirs, tokens)
    )
    assert (to / "jaxgpt_tokenizer.json").is_file()
    make_data(tmp_path, tokenizer=str(tmp_path / "tokenizer.json"))
    losses = []
    for source in file, to:
        argv = [f"--init_from={source}", "--dataset=tale", f"--data_dir={tmp_path}", "--device=cpu"]
        assert exit_code(cli.run, cli.evaluate, argv) is None
        lines = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
        assert lines["weights"] == str(source)
        losses.append(float(lines["val_loss"]))
    assert losses[0] == losses[1]


def test_invalid_nanogpt_checkpoint_or_missing_pytorch_is_rejected(
    tmp_path, fake_torch, monkeypatch
):
    file = tmp_path / "ckpt.pt"
    file.write_bytes(b"")
    said = f"{file}: not a checkpoint of nanoGPT (RuntimeError); expected "
    assert refusal(open_weights, str(file)).startswith(said)
    fake_torch["model"] = {}
    assert "(KeyError)" in refusal(open_weights, str(tmp_path))
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "needs PyTorch; try pip" in refusal(open_weights, str(file))


# ---- rejected exports ------------------------------------------------------------------------
INEXPRESSIBLE = {
    "norm": "rmsnorm", "norm_position": "post", "position": "rope", "tie_embeddings": False,
    "qk_norm": True, "logit_softcap": 30.0, "sliding_window": 4, "causal": False,
    "value_residual": True, "n_kv_head": 1, "mlp": "swiglu", "norm_gain": False,
}  # fmt: skip


def test_inexpressible_cases_cover_every_required_key():
    assert INEXPRESSIBLE.keys() == REQUIRED_KEYS.keys() | {"n_kv_head", "mlp"}


@pytest.mark.parametrize("key", INEXPRESSIBLE)
def test_export_rejects_models_that_gpt2_format_cannot_express(tmp_path, capsys, key):
    write_run(Config(**TINY | {key: INEXPRESSIBLE[key], "out_dir": str(tmp_path)}), {})
    argv = [f"--out_dir={tmp_path}", f"--to={tmp_path / 'out'}"]
    assert exit_code(cli.run, cli.export, argv) == 2
    assert (
        f"error: {key}={INEXPRESSIBLE[key]!r}: not in GPT-2's format; " in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()


def test_export_rejects_user_defined_models(tmp_path, monkeypatch):
    class Mine(Config):
        def make_model(self, rngs):
            raise AssertionError

    monkeypatch.setattr(run_dir, "load_config", lambda out_dir, *file: Mine(**TINY))
    said = refusal(export, str(tmp_path), "best", str(tmp_path / "out"))
    assert said == "Mine: not a GPT-2; expected a config without a make_model"


def test_rejected_export_writes_nothing(tmp_path):
    config = noisy_run(tmp_path / "run")
    for to in tmp_path / "run", tmp_path / "run" / "config.json":
        assert refusal(export, config.out_dir, "best", str(to)).startswith(f"to={str(to)!r}: ")
    assert run_dir.load_config(config.out_dir) == config
    assert "9" in refusal(export, config.out_dir, "9", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# ---- complete runs ---------------------------------------------------------------------------
@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    text = "abcdefghijk" * 60 + "kjihgfedcba" * 60
    return make_data(tmp_path_factory.mktemp("data"), text)


@pytest.fixture
def make_config(data_dir, tmp_path):
    keys = {
        "out_dir": str(tmp_path / "run"), "data_dir": str(data_dir), "dataset": "tale",
        "batch_size": 4, "gradient_accumulation_steps": 1, "learning_rate": 1e-2,
        "decay_lr": False, "max_iters": 4, "eval_interval": 4, "eval_iters": 0, "mesh": "data:2",
    }  # fmt: skip
    return lambda **options: Config(**keys | options)


@pytest.mark.slow
def test_val_loss_is_preserved_by_loading_exporting_and_reloading(
    write_case, make_config, tmp_path
):
    folder = write_case("small")
    config = make_config(init_from=str(folder), scan_layers=True, dropout=0.1)
    assert train(config) == 0
    begun = json.loads((tmp_path / "run/config.json").read_text())
    sizes = {"n_layer": 1, "n_embd": 8, "block_size": 6, "vocab_size": 11, "dropout": 0.1}
    assert {key: begun[key] for key in sizes} == sizes
    assert f"weights of {folder}: n_layer=1, n_head=1, n_embd=8, vocab_size=11" in log_of(config)
    options = {"data_dir": config.data_dir, "dataset": "tale"}
    loss_of = lambda folder: evaluate("", "best", init_from=str(folder), **options)["val_loss"]
    first, *_, last = read_metrics(tmp_path / "run/metrics.jsonl")
    before = loss_of(folder)
    assert first["val_loss"] == pytest.approx(before, abs=1e-5)

    export(config.out_dir, "latest", str(tmp_path / "out"))
    after = loss_of(tmp_path / "out")
    assert after == pytest.approx(evaluate(config.out_dir, "latest")["val_loss"], abs=1e-5)
    assert after == pytest.approx(last["val_loss"], abs=1e-5)
    assert after < before - 0.01
    again = make_config(init_from=str(tmp_path / "out"), out_dir=str(tmp_path / "again"))
    assert train(again.replace(eval_only=True)) == 0
    (row,) = read_metrics(tmp_path / "again/metrics.jsonl")
    assert row["val_loss"] == pytest.approx(after, abs=1e-5)


@pytest.mark.slow
def test_run_started_from_weights_resumes_bit_exact(write_case, make_config):
    config = make_config(init_from=str(write_case("small")))
    whole = config.replace(out_dir=f"{config.out_dir}-whole", max_iters=6)
    train(config.replace(max_iters=2))
    train(config.replace(init_from="resume", max_iters=6))
    train(whole)
    at_once = params_of(whole)
    for path, array in params_of(config).items():
        np.testing.assert_array_equal(array, at_once[path])
    assert "holds a run of 6 steps" in refusal(train, config)


def test_model_keys_that_conflict_with_the_weights_are_rejected(write_case, make_config):
    folder = write_case("small")
    for key, value, there in [
        ("n_layer", 3, 1), ("n_embd", 16, 8), ("bias", False, True), ("mlp", "gelu", "gelu_tanh"),
        ("block_size", 7, 6), ("vocab_size", 12, 11), ("norm", "rmsnorm", "layernorm"),
    ]:  # fmt: skip
        config = make_config(init_from=str(folder), n_head=1).replace(**{key: value})
        for given in frozenset([key]), frozenset():  # by a flag, or by the file
            said = refusal(train, config, given)
            expected = f"expected {there!r}; try --{key}={there}"
            assert said == f"{key}={value!r}: differs from {folder}; {expected}"
    # a flag with the key's default counts too
    said = refusal(train, make_config(init_from=str(folder)), frozenset(["n_layer"]))
    assert said == f"n_layer=12: differs from {folder}; expected 1; try --n_layer=1"


def test_greedy_sampling_from_weights_follows_the_largest_logits(write_case, capsys, monkeypatch):
    folder = write_case("small")
    (folder / "tokenizer.json").write_text(tokenizers.CharTokenizer("abcdefghijk").to_json())
    argv = [f"--init_from={folder}", "--device=cpu", "--start=ab", "--temperature=0"]
    argv += ["--num_samples=1", "--max_new_tokens=3"]
    assert not exit_code(cli.run, cli.sample, argv)
    out, err = capsys.readouterr()
    config, params = load(folder)
    text = [0, 1]
    for _ in range(3):
        text.append(int(logits_of(config, params, np.array([text]))[0, -1].argmax()))
    assert out.splitlines()[0] == "".join("abcdefghijk"[token] for token in text)
    assert err.startswith(f"{folder}, float32")


# ---- comparison with transformers ------------------------------------------------------------
def torch_python() -> str | None:
    """Return the path of a Python with torch and transformers, or None."""
    python = os.environ.get("JAXGPT_TORCH_PYTHON", sys.executable)
    find = "from importlib.util import find_spec as f; assert f('torch') and f('transformers')"
    works = shutil.which(python) and subprocess.run([python, "-c", find], capture_output=True)
    return python if works and not works.returncode else None


@pytest.mark.slow
def test_logits_match_transformers_for_import_and_export(tmp_path, request):
    """Logits agree within 1e-4 for weights that transformers wrote and weights that we wrote."""
    python = torch_python()
    if not python:
        pytest.skip("needs torch and transformers, here or in the Python of JAXGPT_TORCH_PYTHON")
    theirs = {
        "wide": {"n_layer": 2, "n_embd": 48, "n_head": 3, "vocab_size": 300, "n_positions": 32},
        "deep": {"n_layer": 5, "n_embd": 16, "n_head": 4, "vocab_size": 130, "n_positions": 20},
        "erf": {"n_layer": 1, "n_embd": 20, "n_head": 1, "vocab_size": 99, "n_positions": 9},
    }
    jobs = []
    for name, sizes in theirs.items():
        sizes["activation_function"] = "gelu" if name == "erf" else "gelu_new"
        jobs.append({"folder": str(tmp_path / name), "config": sizes})
    has_gpt2 = (DATA / "gpt2").exists()
    gpt2 = request.getfixturevalue("gpt2") if has_gpt2 else None
    for name, tokenizer, options in [
        ("exported", None, {"mlp": "gelu", "bias": False, "vocab_size": 200, "mlp_dim": 12}),
        ("bpe", gpt2, {"vocab_size": 50257}),
    ]:
        config = noisy_run(tmp_path / f"run_{name}", tokenizer, **options)
        export(config.out_dir, "best", str(tmp_path / name))
        jobs.append({"folder": str(tmp_path / name)})
    if gpt2:
        text = "Hello, it's  me.\n\n\nROMEO: ok<|endoftext|>"
        jobs[-1] |= {"text": text, "tokens": str(tmp_path / "tokens.json")}
    rng = np.random.default_rng(0)
    for job in jobs:
        sizes = job.get("config") or json.loads(Path(job["folder"], "config.json").read_text())
        job |= {"ids": job["folder"] + "_ids.npy", "logits": job["folder"] + "_logits.npy"}
        np.save(job["ids"], rng.integers(0, sizes["vocab_size"], (2, sizes["n_positions"])))
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    script = ROOT / "tests/reference/transformers_gpt2.py"
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    subprocess.run([python, script, tmp_path / "jobs.json"], check=True, env=offline)
    for job in jobs:
        config, params = load(Path(job["folder"]))
        logits = logits_of(config, params, np.load(job["ids"]))
        np.testing.assert_allclose(logits, np.load(job["logits"]), rtol=0, atol=1e-4)
        if "text" in job:
            ids = open_weights(job["folder"]).tokenizer("nowhere").encode(job["text"])
            assert json.loads(Path(job["tokens"]).read_text()) == ids.tolist()


# ---- nanoGPT's configs -----------------------------------------------------------------------
EVALUATION = {"batch_size": 8, "eval_iters": 500, "eval_only": True, "wandb_log": False}
CONFIGS = {  # the values in nanoGPT's files of these names
    name.replace("gpt2", "eval_gpt2").replace("-", "_"): EVALUATION | {"init_from": name}
    for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
} | {
    "finetune_shakespeare": {
        "out_dir": "out-shakespeare", "eval_interval": 5, "eval_iters": 40, "wandb_log": False,
        "wandb_project": "shakespeare", "dataset": "shakespeare", "init_from": "gpt2-xl",
        "always_save_checkpoint": False, "batch_size": 1, "gradient_accumulation_steps": 32,
        "max_iters": 20, "learning_rate": 3e-5, "decay_lr": False,
    }
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_nanogpt_config_files_keep_the_original_values(name):
    variants = load_config_file(str(ROOT / "configs" / f"{name}.py"))
    assert variants.keys() == {"config"}
    keys = variants["config"].to_dict()
    assert {key: keys[key] for key in CONFIGS[name]} == CONFIGS[name]
    defaults = Config().to_dict()  # model keys stay at the defaults, because the weights set them
    assert all(keys[key] == defaults[key] for key in vars(ModelConfig()))
