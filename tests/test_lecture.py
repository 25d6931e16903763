"""The lecture's stages, and its full script against PyTorch's own run of it."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import numpy_gpt as ref

from jaxgpt import model, sharding
from jaxgpt.cli.command_line import load
from jaxgpt.config import Config
from jaxgpt.layers import ATTENTION, EMBEDDING, MLP, WEIGHTS, Dropout
from jaxgpt.loss import cross_entropy
from jaxgpt.train_step import init_state, make_train_step

HERE = Path(__file__).parent
LECTURE = HERE.parent / "configs" / "lecture"
FULL = load(str(LECTURE / "full_script.py"))["config"]
EXACT = {"dtype": "float64", "attention": "reference", "mesh": "data:1"}
with np.load(HERE / "golden" / "full_script.npz") as archive:
    GOLDEN = dict(archive)


# ---- the full script -------------------------------------------------------------------------


def full_script_params(kind: str, c: Config) -> dict:
    """Parameters or gradients by PyTorch's names, as our tree; rows of padding are zero."""
    g = {k.removeprefix(f"{kind}/"): v.astype(float) for k, v in GOLDEN.items() if kind in k}
    unread = set(g)

    def take(name: str, pad: bool = False) -> np.ndarray:
        unread.remove(name)
        rows = c.padded_vocab_size - c.vocab_size if pad else 0
        return np.pad(g[name], [(0, rows)] + [(0, 0)] * (g[name].ndim - 1))

    norm = lambda name: {"scale": take(f"{name}.weight"), "bias": take(f"{name}.bias")}
    linear = lambda name: {"kernel": take(f"{name}.weight").T, "bias": take(f"{name}.bias")}

    def block(name: str) -> dict:
        heads = [f"{name}.heads.{n}" for n in range(c.n_head)]
        parts = "query", "key", "value"
        qkv = [[take(f"{head}.{part}.weight").T for head in heads] for part in parts]
        return {
            "ln_1": norm(f"{name}.ln1"),
            "attn": {"qkv": {"kernel": np.array(qkv).transpose(2, 0, 1, 3)}},
            "ln_2": norm(f"{name}.ln2"),
            "mlp": {"up": linear(f"{name}.ffwd.0"), "down": linear(f"{name}.ffwd.2")},
        }

    tree = {
        "embed": {"kernel": take("tokens.weight", pad=True)},
        "pos_embed": {"kernel": take("positions.weight")},
        "blocks": {i: block(f"blocks.{i}") for i in range(c.n_layer)},
        "ln_f": norm("ln_f"),
        "lm_head": {"kernel": take("lm_head.weight", pad=True)},
        "head_bias": take("lm_head.bias", pad=True),
    }
    assert not unread
    return tree


def small_full_script() -> Config:
    """The script's config, key for key, but in the golden file's sizes."""
    sizes = {"vocab_size": 11, "block_size": 8, "n_embd": 16, "batch_size": 4}
    return FULL.replace(**sizes, **EXACT, dropout=0.0, max_iters=20)


def assert_trees_close(ours: dict, theirs: dict, atol: float) -> None:
    theirs = ref.flatten(theirs)
    for path, value in ref.flatten(ours).items():
        np.testing.assert_allclose(value, theirs.pop(path), rtol=0, atol=atol, err_msg=path)
    assert not theirs


def test_gradients_of_the_full_script_are_pytorchs():
    config, tokens = small_full_script(), GOLDEN["tokens"][0]
    with jax.enable_x64(True):
        graphdef, _, _ = model.split(config)

        def loss(params):
            total, count = cross_entropy(nnx.merge(graphdef, params)(tokens[:, :-1]), tokens[:, 1:])
            return total / count

        params = jax.tree.map(jnp.asarray, full_script_params("param", config))
        value, grads = jax.jit(jax.value_and_grad(loss))(params)
    assert float(value) == pytest.approx(GOLDEN["loss"][0], rel=1e-12)
    assert_trees_close(grads, full_script_params("grad", config), atol=1e-7)


def test_twenty_steps_of_the_full_script_are_pytorchs():
    """Losses, gradient norms, and in the end every weight, biases and norms decayed too."""
    config = small_full_script()
    with jax.enable_x64(True):
        mesh = sharding.make_mesh(config)
        state, step = init_state(config, mesh), make_train_step(config, mesh)
        state["params"] = jax.tree.map(jnp.asarray, full_script_params("param", config))
        for it, windows in enumerate(GOLDEN["tokens"]):
            batch = jnp.asarray(windows[None, None], jnp.int32)
            state, metrics = step(state, batch, jnp.int32(1))
            assert float(metrics["loss"][0]) == pytest.approx(GOLDEN["loss"][it], rel=1e-9)
            assert float(metrics["grad_norm"][0]) == pytest.approx(GOLDEN["norm"][it], rel=1e-8)
    assert_trees_close(state["params"], full_script_params("final", config), atol=2e-7)


class Sites(Dropout):
    """Dropout that drops nothing, and notes where it was asked to."""

    def __init__(self):
        super().__init__(0.5)
        object.__setattr__(self, "seen", set())

    def layer(self, layer) -> "Sites":
        return self

    def __call__(self, x: jax.Array, site: int) -> jax.Array:
        self.seen.add(site)
        return x


jax.tree_util.register_pytree_node(Sites, lambda drop: ((), drop), lambda drop, _: drop)


@pytest.mark.parametrize(
    ("config", "sites"),
    [
        (FULL, {WEIGHTS, MLP}),
        (FULL.replace(out_projection=True), {WEIGHTS, ATTENTION, MLP}),
        (FULL.replace(embed_dropout=True), {WEIGHTS, EMBEDDING, MLP}),
        (FULL.replace(attention_dropout=False), {MLP}),
    ],
    ids=["full_script", "with a projection", "with GPT-2's", "flash kernels'"],
)
def test_dropout_acts_where_the_script_has_it(config, sites):
    config = config.replace(n_embd=16, block_size=8, vocab_size=11, dtype="float32")
    drop = Sites()
    model.GPT(config, rngs=nnx.Rngs(0)).features(jnp.zeros((1, 8), jnp.int32), drop)
    assert drop.seen == sites


# ---- the stages ------------------------------------------------------------------------------

STAGES = sorted(path for path in LECTURE.glob("[0-9]*.py"))


def test_the_stages_are_the_lectures():
    numbers = [path.name[0] for path in STAGES]
    assert numbers == ["1", "2", "3", "4", "5", "6", "7", "7", "8"]
    assert {load(str(path))["config"].out_dir for path in STAGES} == {
        f"out/lecture/{path.stem}" for path in STAGES
    }


# without positions: a map of 32 x 65 and its bias after 65 vectors, and what each stage adds
BLOCK = 3 * 32 * 32 + (32 + 1) * 32 + (32 + 1) * 128 + (128 + 1) * 32
PARAMS = {
    "1_bigram": 65 * 32 + 33 * 65,
    "2_positions": 65 * 32 + 33 * 65,
    "3_one_head": 65 * 32 + 33 * 65 + 3 * 32 * 32,
    "4_heads": 65 * 32 + 33 * 65 + 3 * 32 * 32,
    "5_feed_forward": 65 * 32 + 33 * 65 + 3 * 32 * 32 + 2 * 33 * 32,
    "6_residuals": 65 * 32 + 33 * 65 + 3 * BLOCK,
    "7_layer_norm": 65 * 32 + 33 * 65 + 3 * (BLOCK + 4 * 32) + 2 * 32,
    "7_layer_norm_post": 65 * 32 + 33 * 65 + 3 * (BLOCK + 4 * 32),
    "8_dropout_and_scale": 10_788_929 - 256 * 384,  # what the lecture's own script prints
}


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)
def test_a_stage_has_the_parameters_that_its_equations_have(path):
    config = load(str(path))["config"].replace(vocab_size=65)
    assert model.count_params(config) == PARAMS[path.stem]


# ---- how PyTorch's modules start -------------------------------------------------------------


@pytest.mark.parametrize("scan", [False, True])
def test_weights_start_as_pytorchs_modules_do(scan):
    """Linear: kernel and bias uniform up to 1/sqrt(fan in). Embedding: a standard normal."""
    config = FULL.replace(vocab_size=512, n_embd=64, n_layer=6, block_size=64, scan_layers=scan)
    config = config.replace(out_projection=True, qkv_bias=True)
    params = jax.jit(model.init, static_argnums=0)(config, jax.random.key(0))
    params = model.unstack(params) if scan else params
    for path, value in ref.flatten(params).items():
        value = np.asarray(value)[: config.vocab_size]
        if path.startswith(("embed", "pos_embed")):
            assert value.std() == pytest.approx(1, abs=0.03), path
            assert np.abs(value).max() > 3, path
        elif "ln_" in path:
            assert np.all(value == path.endswith("scale")), path
        else:
            bound = (4 * 64 if "mlp.down" in path else 64) ** -0.5
            assert 0.9 * bound < np.abs(value).max() <= bound, path
            assert value.std() == pytest.approx(bound / 3**0.5, rel=0.15), path
