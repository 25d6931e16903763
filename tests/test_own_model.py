"""Test a user-defined model: a Config subclass that makes another module."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import TINY, assert_trees_close, make_windows, take_steps
from reference import numpy_gpt as ref

from jaxgpt import model, resolve
from jaxgpt.config import Config
from jaxgpt.kernels.dropout import Dropout, DropoutSite
from jaxgpt.runtime.mesh import make_mesh
from jaxgpt.train_step import abstract_params, init_state, make_eval_step


class Bigram(nnx.Module):
    """A model whose logits are a table row times a scale; parameters have no axis letters."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        width = config.vocab_size
        self.table = nnx.Param(0.1 * jax.random.normal(rngs.params(), (width, width)))
        self.scale = nnx.Param(jnp.ones(width))

    def __call__(self, tokens_BT: jax.Array, dropout: Dropout = Dropout()) -> jax.Array:
        rows_BTV = self.table[...][tokens_BT] * self.scale[...]
        return dropout(rows_BTV, 0, DropoutSite.EMBEDDING)


class BigramConfig(Config):
    """A config whose model is a Bigram; all of its parameters decay."""

    def make_model(self, rngs: nnx.Rngs) -> nnx.Module:
        return Bigram(self, rngs)

    def weight_decay_mask(self, params: dict) -> dict:
        return jax.tree.map(lambda _: True, params)


def bigram(**keys) -> BigramConfig:
    return BigramConfig(**TINY | keys)


def test_parameters_without_axis_letters_are_replicated():
    config = bigram(mesh="data:2,fsdp:2")
    _, shapes, letters = model.abstract_model(config)
    assert letters == {"table": "  ", "scale": " "}
    assert shapes["table"].shape == (31, 31)
    assert resolve.count_params(config) == 31 * 31 + 31
    for param in abstract_params(config, make_mesh(config)).values():
        assert param.sharding.is_fully_replicated


@pytest.mark.parametrize("options", [{"dropout": 0.3}, {"optimizer": "muon"}], ids=str)
def test_user_model_learns_and_trains_equally_on_two_devices(options):
    batches = [make_windows(bigram())] * 6
    state, rows = take_steps(bigram(**options), batches)
    other, other_rows = take_steps(bigram(**options, mesh="data:2"), batches)
    losses = [row["loss"] for row in rows]
    assert [row["loss"] for row in other_rows] == pytest.approx(losses, rel=1e-5)
    assert_trees_close(other.params, state.params, atol=1e-5)
    assert losses[-1] < losses[0]


def test_dropout_is_applied_in_training_and_not_in_evaluation():
    batch = make_windows(bigram(), micro=1)
    losses = [take_steps(bigram(dropout=rate), [batch])[1][0]["loss"] for rate in (0.0, 0.5)]
    assert abs(losses[0] - losses[1]) > 1e-3
    config = bigram(dropout=0.5)
    mesh = make_mesh(config)
    params = init_state(config, mesh).params
    total, count = make_eval_step(config, mesh)(params, batch, jnp.int32(1))
    assert float(total) / int(count) == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_user_model_parameters_follow_adamw_with_the_config_decay_mask(optimizer):
    """Muon updates only matrices of a GPT's blocks, so AdamW updates all parameters here."""
    config = bigram(optimizer=optimizer, weight_decay=0.5, decay_lr=False, grad_clip=0.0)
    start = jax.device_get(init_state(config, make_mesh(config)).params)
    batch = make_windows(config, micro=1)
    state, _ = take_steps(config, [batch])

    def loss(params):
        logits = params["table"][batch[0, 0, :, :-1]] * params["scale"]
        targets = jax.nn.one_hot(batch[0, 0, :, 1:], 31)
        return -(jax.nn.log_softmax(logits) * targets).sum(-1).mean()

    grads = jax.device_get(jax.grad(loss)(start))
    want, _, _ = ref.adamw_step(
        start, grads, ref.adamw_init(start), lr=1e-2, weight_decay=0.5, grad_clip=0, decay_all=True
    )
    is_clear = jax.tree.map(lambda grad: np.abs(grad) > 1e-5, grads)  # the rest is rounding
    for name in want:
        ours, theirs = (np.where(is_clear[name], p[name], 0) for p in (state.params, want))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5, err_msg=name)
