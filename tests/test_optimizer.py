"""The schedule and AdamW against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import numpy_gpt as ref

from jaxgpt.config import Config
from jaxgpt.optimizer import kernels, make_optimizer, schedule

PARAMS = {
    "embed": {"kernel": np.ones((5, 3))},
    "blocks": {0: {"attn": {"qkv": {"kernel": np.ones((3, 3, 2, 2)), "bias": np.ones((3, 2, 2))}}}},
    "ln_f": {"scale": np.ones(3), "bias": np.ones(3)},
}


@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_the_schedule_is_nanogpts(warmup):
    keys = {"learning_rate": 1e-2, "min_lr": 1e-3, "warmup_iters": warmup, "lr_decay_iters": 30}
    ours = jax.vmap(schedule(Config(**keys)))(jnp.arange(40))
    theirs = [ref.cosine_lr(it, **keys) for it in range(40)]
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_without_an_end_of_its_own_the_decay_ends_with_the_run():
    config = Config(learning_rate=1.0, min_lr=0.1, warmup_iters=0, max_iters=50)
    rates = jax.vmap(schedule(config))(jnp.arange(51))
    assert float(rates[50]) == pytest.approx(0.1)
    assert np.all(np.diff(rates) < 0)


def test_without_decay_the_rate_is_constant():
    config = Config(learning_rate=0.25, decay_lr=False, max_iters=10)
    assert {float(schedule(config)(step)) for step in range(20)} == {0.25}


def test_only_kernels_decay():
    """With no gradient at all, decay is the only thing that moves a parameter."""
    config = Config(learning_rate=0.1, decay_lr=False, weight_decay=0.5)
    optimizer = make_optimizer(config)
    params = jax.tree.map(np.float32, PARAMS)
    nothing = jax.tree.map(np.zeros_like, params)
    updates, _ = optimizer.update(nothing, optimizer.init(params), params)
    moved = ref.flatten(optax.apply_updates(params, updates))
    for path, value in moved.items():
        np.testing.assert_allclose(value, 0.95 if path.endswith("kernel") else 1, err_msg=path)
    assert {p for p, is_kernel in ref.flatten(kernels(PARAMS)).items() if is_kernel} == {
        path for path in moved if path.endswith("kernel")
    }


@pytest.mark.parametrize(
    ("clip", "decay_all"), [(0.0, False), (0.5, False), (100.0, False), (0.0, True)]
)
def test_ten_steps_are_the_references(clip, decay_all):
    keys = {"learning_rate": 1e-2, "min_lr": 1e-3, "warmup_iters": 3, "lr_decay_iters": 10}
    config = Config(**keys, beta1=0.8, beta2=0.9, weight_decay=0.2, grad_clip=clip)
    config = config.replace(decay_all=decay_all)
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        optimizer = make_optimizer(config)
        ours, theirs = PARAMS, PARAMS
        opt_state, state = optimizer.init(ours), ref.adamw_init(theirs)
        for it in range(10):
            grads = jax.tree.map(lambda p: rng.standard_normal(p.shape), PARAMS)
            updates, opt_state = optimizer.update(grads, opt_state, ours)
            ours = optax.apply_updates(ours, updates)
            theirs, state, _ = ref.adamw_step(
                theirs,
                grads,
                state,
                lr=ref.cosine_lr(it, **keys),
                betas=(0.8, 0.9),
                weight_decay=0.2,
                grad_clip=clip,
                clip_eps=0,
                decay_all=decay_all,
            )
    for path, value in ref.flatten(ours).items():
        np.testing.assert_allclose(value, ref.flatten(theirs)[path], rtol=1e-6, err_msg=path)
