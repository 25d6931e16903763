"""AdamW with its decay mask, Muon, and the learning rate's schedules, of optax. What is frozen.

A parameter's letters (see model.py) say which of its axes Muon takes for a matrix's input and
output.
"""

import math
import re
from collections.abc import Hashable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from jaxgpt import model
from jaxgpt.config import Config, UserError
from jaxgpt.layers import in_memory

ADAM_EPSILON = 1e-8
MUON_RMS = 0.2  # of an update's elements, about AdamW's; Liu et al. 2025, "Muon is Scalable"


def schedule(config: Config) -> optax.Schedule:
    """Learning rate by step, from 0: linear warm-up, decay to `min_lr`, then flat.

    The cosine is nanoGPT's. `wsd` (warm-up, stable, decay; Hu et al. 2024, "MiniCPM") holds
    `learning_rate` until the last `decay_fraction` of the steps, and decays there along a line.
    The warm-up's first step is already above zero: learning_rate / (warmup_iters + 1).
    """
    c = config
    if not c.decay_lr:
        return optax.constant_schedule(c.learning_rate)
    end = c.lr_decay_iters or c.max_iters
    after_warmup = max(1, end - c.warmup_iters)

    def learning_rate(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step)
        warm = c.learning_rate * (step + 1) / (c.warmup_iters + 1)
        if c.lr_schedule == "wsd":
            length = max(1, min(c.decay_fraction * end, after_warmup))
            left = jnp.clip((end - step) / length, 0, 1)
        else:
            progress = jnp.clip((step - c.warmup_iters) / after_warmup, 0, 1)
            left = 0.5 * (1 + jnp.cos(jnp.pi * progress))
        decayed = c.min_lr + left * (c.learning_rate - c.min_lr)
        return jnp.where(step < c.warmup_iters, warm, decayed)

    return learning_rate


def make_optimizer(config: Config) -> optax.GradientTransformationExtraArgs:
    """Clip by global norm, then AdamW (Loshchilov & Hutter 2019), decaying matrices or all.

    Or, for the blocks' matrices, Muon (Jordan et al. 2024), with the same decay. Frozen
    parameters have no moments. `update` takes `is_finite`, and if it is False leaves moments as
    they are; counts of steps, which are whole, go on.
    """
    c = config
    direction = _scale_by_adam(c.beta1, c.beta2)
    if c.optimizer == "muon" or c.freeze:
        _, shapes, letters = model.split(c)
        still = frozen(c, shapes)
        axes = matrix_axes(c, letters, still)
        muon = _held(scale_by_muon(weight_dimension_numbers=axes))
        muon = optax.chain(muon, _match_rms(axes))
        kinds: dict[Hashable, optax.GradientTransformation] = {"adamw": direction}
        kinds |= {"muon": muon} if c.optimizer == "muon" else {}
        kinds |= {"frozen": optax.set_to_zero()} if c.freeze else {}
        direction = optax.partition(kinds, jax.tree.map(_kind, still, axes))
    return optax.chain(
        optax.clip_by_global_norm(c.grad_clip) if c.grad_clip else optax.identity(),
        optax.chain(
            direction,
            optax.add_decayed_weights(c.weight_decay, None if c.decay_all else kernels),
            optax.scale_by_learning_rate(schedule(c)),
        ),
    )


def _scale_by_adam(b1: float, b2: float) -> optax.GradientTransformationExtraArgs:
    """optax's, of moments that are in memory: Kingma & Ba 2015, the end of section 2.

    XLA:CPU would compute the new ones for the parameters once more, from the old ones, and keep
    a copy of those until then.
    """
    adam = _held(optax.scale_by_adam(b1, b2))

    def update(updates, state, params=None, **extra):
        _, state = adam.update(updates, state, params, **extra)
        state = in_memory("cpu", state)
        root = jnp.sqrt(1 - b2**state.count)
        rate = root / (1 - b1**state.count)
        step = lambda m, v: rate * m / (jnp.sqrt(v) + ADAM_EPSILON * root)
        return jax.tree.map(step, state.mu, state.nu), state

    return optax.GradientTransformationExtraArgs(adam.init, update)


def _held(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Its state stays as it is unless `is_finite`; counts of steps, which are whole, go on."""

    def update(updates, state, params=None, *, is_finite: jax.typing.ArrayLike = True, **_):
        updates, new = inner.update(updates, state, params)
        return updates, jax.tree.map(partial(choose, is_finite), new, state)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def choose(is_finite: jax.typing.ArrayLike, new: jax.Array, old: jax.Array) -> jax.Array:
    """The new weights or moments if they can be had; XLA fuses the choice into the update."""
    return jnp.where(is_finite, new, old) if jnp.issubdtype(new.dtype, jnp.floating) else new


def frozen(config: Config, params: dict) -> dict:
    """Which parameters `freeze` names, by their paths: a tree of bools.

    Raises `UserError` unless it is a regular expression that names some and leaves some to train.
    """

    def path(keys: tuple) -> str:
        return jax.tree_util.keystr(keys, simple=True, separator="/")

    if not config.freeze:
        return jax.tree.map(lambda _: False, params)
    try:
        pattern = re.compile(config.freeze)
    except re.error as error:
        raise UserError(f"freeze={config.freeze!r}: not a regular expression ({error})") from error
    found = jax.tree.map_with_path(lambda keys, _: bool(pattern.search(path(keys))), params)
    if len(set(jax.tree.leaves(found))) == 1:
        paths = (path(keys) for keys, _ in jax.tree.leaves_with_path(params))
        kinds = dict.fromkeys(re.sub(r"/\d+/", "/0/", path) for path in paths)
        which = "all" if jax.tree.leaves(found)[0] else "none"
        raise UserError(
            f"freeze={config.freeze!r}: is found in {which} of the parameters' paths, which are "
            f"{', '.join(kinds)}"
        )
    return found


def kernels(params: dict) -> dict:
    """Which parameters are matrices or embeddings, and not biases or gains: a tree of bools."""
    return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)


def matrix_axes(config: Config, letters: dict, still: dict) -> dict:
    """For every kernel that Muon is to move its input and output axes; for others a blank.

    D is one side, and heads or hidden units the other. Layers (L) and the parts of a fused map
    (C: query, key, value) are matrices of their own, so fusing does not change what Muon does.
    """

    def of(path: tuple, letters: str, is_frozen: bool) -> MuonDimensionNumbers | optax.MaskedNode:
        in_blocks = path[0].key == "blocks" and path[-1].key == "kernel"
        if config.optimizer != "muon" or is_frozen or not in_blocks:
            return optax.MaskedNode()
        width = (letters.index("D"),)
        other = tuple(i for i, letter in enumerate(letters) if letter not in "LCD")
        return MuonDimensionNumbers(*sorted((width, other)))

    return jax.tree.map_with_path(of, letters, still)


def _kind(is_frozen: bool, axes: MuonDimensionNumbers | optax.MaskedNode) -> str:
    if is_frozen:
        return "frozen"
    return "muon" if isinstance(axes, MuonDimensionNumbers) else "adamw"


def _match_rms(axes: dict) -> optax.GradientTransformation:
    """Scales orthogonal updates to elements like AdamW's, so that one learning rate serves both."""

    def scale(update: jax.Array, sides: tuple[tuple[int, ...], ...]) -> jax.Array:
        longer = max(math.prod(update.shape[i] for i in side) for side in sides)
        return MUON_RMS * math.sqrt(longer) * update

    return optax.stateless(lambda updates, _: jax.tree.map(scale, updates, axes))
