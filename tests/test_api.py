"""Test the Python API: training, loading, sampling, and what a model computes for a text.

L layers, N heads, T tokens, V vocabulary.
"""

import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import (
    CHILD_ENV,
    ROOT,
    all_rows,
    log_of,
    make_data,
    params_of,
    random_params,
    reference_config,
    refusal,
    rows_of,
    stacked,
    state_of,
    stop_at,
    tiny_run,
    write_run,
)
from reference import numpy_gpt as ref
from reference.options import MODEL_CASES

import jaxgpt
from examples.lecture.config import LectureConfig
from examples.speedrun.model import SpeedrunConfig
from jaxgpt.api import Run
from jaxgpt.cli import commands
from jaxgpt.data.tokenizer import CharTokenizer
from jaxgpt.interop.trained import Trained

LETTERS = CharTokenizer("abcdefghijk")
TEXT = "badge"
TOKENS_1T = LETTERS.encode(TEXT)[None]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> jaxgpt.Run:
    """Return a run that the API has trained on two devices."""
    return jaxgpt.train(tiny_run(tmp_path_factory.mktemp("api") / "run", data))


def make_run(config: jaxgpt.Config, params: dict) -> jaxgpt.Run:
    """Return the run of a model with these parameters."""
    params = jax.tree.map(jax.numpy.asarray, params)
    trained = Trained(config, lambda mesh: (params, 1), lambda: LETTERS, Path())
    return Run(trained, "nowhere", "cpu", "float32")


# ---- importing -------------------------------------------------------------------------------
IMPORT = """
import sys
import jaxgpt
assert set(dir(jaxgpt)) >= set(jaxgpt.__all__)
assert issubclass(jaxgpt.UserError, ValueError) and jaxgpt.Config().n_layer == 12
assert not {"jax", "numpy", "typing_extensions"} & set(sys.modules), "imported"
train = jaxgpt.train
import jaxgpt.train
from jaxgpt.train import next_pause_after
assert jaxgpt.train is train and train.__module__ == "jaxgpt.api"
import jax
assert not jax._src.xla_bridge._backends, "started"
"""


def test_import_neither_imports_nor_starts_jax_and_train_stays_the_function():
    subprocess.run([sys.executable, "-c", IMPORT], env=CHILD_ENV, check=True)


def test_unknown_names_of_the_package_and_of_a_config_are_rejected():
    with pytest.raises(AttributeError, match="no attribute 'tain'"):
        _ = jaxgpt.tain
    assert refusal(jaxgpt.Config, n_heads=3) == "n_heads: unknown key; try n_head"


# ---- training --------------------------------------------------------------------------------


@pytest.mark.slow
def test_api_and_command_make_the_same_files_and_digits(run, data, tmp_path):
    ours, theirs = run.config, run.config.replace(out_dir=str(tmp_path / "run"))
    keys = theirs.replace(vocab_size=0, steps_per_call=0).to_dict()
    (tmp_path / "c.py").write_text(f"import jaxgpt\nconfig = jaxgpt.Config(**{keys})\n")
    assert commands.train([str(tmp_path / "c.py")]) == 0
    assert rows_of(ours) == rows_of(theirs)
    assert state_of(ours, 24) == state_of(theirs, 24)
    places = [Path(config.out_dir) for config in (ours, theirs)]
    files = [{str(p.relative_to(place)) for p in place.rglob("*")} for place in places]
    array_files = {name for name in files[0] ^ files[1] if "/state/" in name}  # random names
    assert files[0] ^ files[1] == array_files
    assert run.metrics == all_rows(ours)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data:1", "data:2,fsdp:2"])
def test_run_on_one_or_four_devices_differs_only_by_rounding(run, tmp_path, mesh):
    other = jaxgpt.train(run.config.replace(out_dir=str(tmp_path), mesh=mesh))
    losses = [[row["loss"] for row in r.metrics if "loss" in row] for r in (run, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(losses[0]) == 24
    np.testing.assert_allclose(other.logits("It is"), run.logits("It is"), rtol=0, atol=1e-3)
    prompts = ["It is"] * 4
    texts = other.generate(prompts, max_new_tokens=20, temperature=0)
    assert texts == run.generate(prompts, max_new_tokens=20, temperature=0)


@pytest.mark.slow
def test_interrupt_saves_and_returns_the_run_which_resumes_bit_exact(data, tmp_path, monkeypatch):
    config = tiny_run(tmp_path / "run", data, steps_per_call=1)
    whole = jaxgpt.train(config.replace(out_dir=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        stop_at(patch, 5, number=signal.SIGINT)
        stopped = jaxgpt.train(config)
    assert 5 <= stopped.step < 8  # the interrupt waits for the end of a call
    assert stopped.generate("It", max_new_tokens=4).startswith("It")
    resumed = jaxgpt.train(config.replace(init_from="resume"))
    assert rows_of(resumed.config) == rows_of(whole.config)


def test_second_interrupt_raises_keyboard_interrupt_and_frees_the_run(data, tmp_path, monkeypatch):
    config = tiny_run(tmp_path / "run", data)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        for _ in range(2):
            stop_at(patch, 3, number=signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            jaxgpt.train(config)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert jaxgpt.train(config.replace(overwrite=True, max_iters=2)).step == 2


def test_sigterm_saves_and_then_reaches_the_handler_of_before(data, tmp_path, monkeypatch):
    config, received = tiny_run(tmp_path / "run", data), []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(log_of(config)))
    try:
        stop_at(monkeypatch, 5)
        jaxgpt.train(config)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(received) == 1
    assert "holds the run up to step" in received[0]


def test_training_works_outside_the_main_thread(data, tmp_path):
    runs = []
    config = tiny_run(tmp_path / "run", data, max_iters=2)
    thread = threading.Thread(target=lambda: runs.append(jaxgpt.train(config)))
    thread.start()
    thread.join()
    assert runs[0].step == 2


def test_mistakes_raise_user_errors_and_change_nothing(run, tmp_path):
    said = refusal(jaxgpt.train, run.config)
    assert said.startswith(f"out_dir={run.source!r}: holds a run of 24 steps; ")
    assert "of type dict; expected jaxgpt.Config" in refusal(jaxgpt.train, run.config.to_dict())
    config = run.config.replace(out_dir=str(tmp_path / "new"), mesh="data:9")
    assert refusal(jaxgpt.train, config).startswith("mesh='data:9': needs 9 devices; ")
    said = refusal(jaxgpt.train, config.replace(device="gpu"))
    assert said.startswith("device='gpu': JAX has started on a cpu in this process; ")
    assert not (tmp_path / "new" / "config.json").exists()


# ---- loading ---------------------------------------------------------------------------------


def test_loaded_run_has_the_weights_config_and_rows_of_the_directory(run):
    for checkpoint, step in ("best", run.step), ("latest", 24), (16, 16):
        loaded = jaxgpt.load(Path(run.source), checkpoint=checkpoint)
        assert loaded.step == step
        params = ref.flatten(jax.device_get(loaded.params))
        expected = params_of(run.config, str(checkpoint))
        assert {k: v.tobytes() for k, v in params.items()} == {
            k: v.tobytes() for k, v in expected.items()
        }
        assert loaded.config == run.config
        assert loaded.metrics == run.metrics
        assert loaded.tokenizer.decode(loaded.tokenizer.encode("fury")) == "fury"


def test_run_is_shown_as_its_loss_picture(run, tmp_path):
    assert run._repr_png_() == Path(run.source, "loss.png").read_bytes()
    assert make_run(reference_config(n_layer=0), {})._repr_png_() is None


@pytest.mark.parametrize("keys", [{"checkpoint": 100}, {"config": LectureConfig}], ids=str)
def test_checkpoint_and_config_of_weights_are_rejected(keys):
    assert "gpt2: is no run, and only a run has" in refusal(jaxgpt.load, "gpt2", **keys)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "nowhere: no such run or weights; expected a run directory, "),
        ("./gpt2", "./gpt2: no such run or weights; "),
        ("{folder}/nowhere", "no such run or weights; "),
        ("{folder}", "not the config of a GPT-2 "),
    ],
)
def test_source_that_is_neither_run_nor_weights_is_rejected(tmp_path, source, message):
    assert message in refusal(jaxgpt.load, source.format(folder=tmp_path))


def test_run_without_a_checkpoint_and_unknown_checkpoints_are_rejected(run, tmp_path):
    config = write_run(run.config.replace(out_dir=str(tmp_path / "empty")), {}, LETTERS)
    assert "no checkpoint in it yet" in refusal(jaxgpt.load, config.out_dir)
    for checkpoint in (17, "newest"):
        said = refusal(jaxgpt.load, run.source, checkpoint=checkpoint)
        assert said.startswith(f"checkpoint='{checkpoint}': ")


# ---- sampling --------------------------------------------------------------------------------
OPTIONS = {"max_new_tokens": 20, "temperature": 1.3, "top_k": 9, "top_p": 0.9, "seed": 5}


def test_generated_text_is_that_of_the_sample_command(run, capsys):
    flags = [f"--{key}={value}" for key, value in OPTIONS.items()]
    commands.sample([f"--out_dir={run.source}", "--start=It is", "--num_samples=1", *flags])
    assert capsys.readouterr().out == run.generate("It is", **OPTIONS) + f"\n{commands.SEPARATOR}\n"


def test_list_of_prompts_gives_a_list_and_a_stream_gives_the_same_text_in_pieces(run):
    prompts = ["It", "a tale"]
    texts = run.generate(prompts, **OPTIONS)
    assert [text[: len(prompt)] for text, prompt in zip(texts, prompts, strict=True)] == prompts
    assert [len(text) for text in texts] == [len(prompt) + 20 for prompt in prompts]
    pieces = list(run.generate(prompts, stream=True, **OPTIONS))
    assert len(pieces) > 2
    assert ["".join(parts) for parts in zip(*pieces, strict=True)] == texts
    pieces = list(run.generate("It", stream=True, **OPTIONS))
    assert "".join(pieces) == run.generate("It", **OPTIONS)
    assert pieces[0] == "It"


@pytest.mark.parametrize(
    ("prompt", "options", "subject"),
    [
        ("a", {"temperature": -1.0}, "temperature=-1.0"),
        ("a", {"top_p": 1.5}, "top_p=1.5"),
        ("a", {"top_k": -1}, "top_k=-1"),
        ("a", {"max_new_tokens": 0}, "max_new_tokens=0"),
        ("a", {"seed": -1}, "seed=-1"),
        ("aZ", {}, "text: no token for 'Z'"),
        ("", {}, "prompt=''"),
        ([], {}, "prompt=[]"),
        (["a", 1], {}, "prompt=['a', 1]"),
        (7, {}, "prompt=7"),
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True])
def test_invalid_prompts_and_options_are_rejected_at_the_call(
    run, prompt, options, subject, stream
):
    assert refusal(run.generate, prompt, stream=stream, **options).startswith(subject)


# ---- logits, losses and attention of a text --------------------------------------------------
CASES = [
    *MODEL_CASES,
    {"scan_layers": True, "value_residual": True},
    {"scan_layers": True, "remat": "full"},
]
CASES += [{"remat": "dots"}, {"dropout": 0.5}, {"attention": "xla"}]


def attention_of(params: dict, config: jaxgpt.Config) -> np.ndarray:
    """Compute the attention weights of TEXT with the NumPy GPT, [L, N, T, T]."""
    _, _, cache = ref.forward(params, TOKENS_1T, config)
    T = TOKENS_1T.size
    visible = ref.visible_keys(T, T, config.causal, config.sliding_window, None)
    layers = []
    for block in cache.blocks:
        attn = block.attn[1]
        q_BTKGH = attn.q.reshape(1, T, config.kv_heads, -1, config.head_dim)
        weights = ref.attention_weights(q_BTKGH, attn.k, visible, config.head_dim**-0.5)
        layers.append(weights.reshape(config.n_head, T, T))
    return np.array(layers).reshape(config.n_layer, config.n_head, T, T)


@pytest.mark.parametrize("options", CASES, ids=str)
def test_logits_losses_and_attention_equal_those_of_the_numpy_gpt(options):
    config = reference_config(**options)
    params = random_params(config)
    run = make_run(config, stacked(params) if config.scan_layers else params)
    logits_1TV, _, _ = ref.forward(params, TOKENS_1T, config)
    logits_TV = logits_1TV[0, :, : config.vocab_size]
    close = {"rtol": 0, "atol": 2e-5}
    np.testing.assert_allclose(run.logits(TEXT), logits_TV, **close)
    log_p_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
    losses = [-log_p_TV[t - 1, TOKENS_1T[0, t]] for t in range(1, len(TEXT))]
    np.testing.assert_allclose(run.loss(TEXT), [np.nan, *losses], **close)
    np.testing.assert_allclose(run.attention(TEXT), attention_of(params, config), **close)


def test_run_keeps_the_keys_and_the_layout_of_its_parameters():
    config = reference_config(scan_layers=True, dropout=0.5)
    params = stacked(random_params(config))
    run = make_run(config, params)
    run.attention(TEXT)
    assert run.config == config
    assert jax.tree.structure(run.params) == jax.tree.structure(params)


IDS = [[0, -1], [0, 10**5], [0.5, 1.0], [[0, 1]]]


@pytest.mark.parametrize("text", ["", "a" * 8, "aé", 7, *map(np.array, IDS)], ids=repr)
@pytest.mark.parametrize("name", ["logits", "loss", "attention"])
def test_invalid_text_or_ids_are_rejected(name, text):
    config = reference_config(n_layer=0)
    run = make_run(config, random_params(config))
    assert refusal(getattr(run, name), text).startswith("text")
    assert len(getattr(run, name)("a" * 7)) in (7, 0)


# ---- models of one's own ---------------------------------------------------------------------
OWN = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 11, "block_size": 8}


@pytest.mark.parametrize("config_class", [SpeedrunConfig, LectureConfig])
def test_attention_of_example_models_is_recorded(config_class):
    config = config_class(**OWN)
    params = jax.tree.map(np.asarray, jaxgpt_params(config))
    weights = make_run(config, params).attention(TEXT)
    assert weights.shape == (2, 2, 5, 5)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    np.testing.assert_array_equal(np.triu(weights, 1), 0)


def jaxgpt_params(config: jaxgpt.Config) -> dict:
    from jaxgpt.model import init_params

    return init_params(config, jax.random.key(0))


class Silent(jaxgpt.Config):
    """A config whose model has layers, but no attention."""

    def make_model(self, rngs):
        from jaxgpt.model import GPT

        return GPT(jaxgpt.Config(**self.replace(n_layer=0).to_dict()), rngs=rngs)


def test_model_without_attention_is_sampled_but_has_no_weights(tmp_path):
    config = Silent(**OWN, out_dir=str(tmp_path / "run"))
    write_run(config, {3: jaxgpt_params(config)}, LETTERS)
    run = jaxgpt.load(config.out_dir, config=Silent)
    assert run.logits(TEXT).shape == (5, 11)
    assert len(run.generate("a", max_new_tokens=12)) == 13
    said = refusal(run.attention, TEXT)
    assert said.startswith("Silent: its model has no 2 calls of attention in jaxgpt.kernels; ")


# ---- the README ------------------------------------------------------------------------------


# What the test replaces in the README's script, so that it is quick.
SMALLER = {
    "n_layer=4, n_head=4, n_embd=128": 'n_layer=1, n_head=2, n_embd=16, mesh="data:1"',
    "block_size=64": "block_size=20",
    "max_iters=200": "max_iters=2",
    "eval_iters=20": "eval_iters=1",
    "max_new_tokens=100": "max_new_tokens=8",
}


def test_readme_script_trains_samples_and_reads_attention(tmp_path, monkeypatch, capsys):
    """The script is that of the README, with a smaller model, on a text with its prompts."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (script,) = [block for block in blocks if "import jaxgpt" in block]
    for setting, smaller in SMALLER.items():
        assert script.count(setting) == 1
        script = script.replace(setting, smaller)
    (tmp_path / "data").mkdir()
    make_data(tmp_path / "data", "ROMEO: To be, or not to be\n" * 99, "shakespeare_char")
    monkeypatch.chdir(tmp_path)
    exec(script, {})
    said = capsys.readouterr().out
    assert "out/notebook holds the run up to step 2\nROMEO:" in said
    assert said.endswith("(1, 2, 19, 19)\n")
