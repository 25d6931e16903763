"""The optimizer: AdamW or Muon, gradient clipping, learning-rate schedules, frozen parameters."""

import math
import re
from collections.abc import Hashable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from jaxgpt import kernels, model
from jaxgpt.config import Config

MUON_RMS = 0.2  # of an update's elements, about AdamW's (Liu et al. 2025, "Muon is Scalable")


def schedule(config: Config) -> optax.Schedule:
    """Return the learning rate of each step: linear warm-up, decay to `min_lr`, then constant.

    Steps count from 0, and step 0 has the rate learning_rate / (warmup_iters + 1). The cosine decay
    is nanoGPT's. `wsd` (warm-up, stable, decay; Hu et al. 2024, "MiniCPM") stays at
    `learning_rate` and decays linearly in the last `decay_fraction` of the steps.
    """
    c = config
    if not c.decay_lr:
        return optax.constant_schedule(c.learning_rate)
    end = c.lr_decay_iters or c.max_iters
    after_warmup = max(1, end - c.warmup_iters)

    def learning_rate(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step)
        warmup = c.learning_rate * (step + 1) / (c.warmup_iters + 1)
        if c.lr_schedule == "wsd":
            length = max(1, min(c.decay_fraction * end, after_warmup))
            decay = jnp.clip((end - step) / length, 0, 1)
        else:
            progress = jnp.clip((step - c.warmup_iters) / after_warmup, 0, 1)
            decay = 0.5 * (1 + jnp.cos(jnp.pi * progress))
        decayed = c.min_lr + decay * (c.learning_rate - c.min_lr)
        return jnp.where(step < c.warmup_iters, warmup, decayed)

    return learning_rate


def make_optimizer(config: Config) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer: clipping by global norm, then AdamW (Loshchilov & Hutter 2019).

    With `optimizer="muon"` the blocks' matrices use Muon (Jordan et al. 2024) instead, with the
    same weight decay. Frozen parameters have no moments. `update` takes the argument `is_finite`;
    if it is False, the moments do not change.
    """
    c = config
    direction = scale_by_adam(c.beta1, c.beta2)
    if c.optimizer == "muon" or c.freeze:
        direction = partition_by_kind(c, direction)
    return optax.chain(
        optax.clip_by_global_norm(c.grad_clip) if c.grad_clip else optax.identity(),
        optax.chain(
            direction,
            optax.add_decayed_weights(c.weight_decay, c.weight_decay_mask),
            optax.scale_by_learning_rate(schedule(c)),
        ),
    )


def scale_by_adam(b1: float, b2: float) -> optax.GradientTransformationExtraArgs:
    """Scale gradients to Adam's update direction (Kingma & Ba 2015)."""
    adam = skip_if_nonfinite(optax.scale_by_adam(b1, b2, eps=kernels.ADAM_EPSILON))

    def update(updates, state, params=None, **extra):
        updates, state = adam.update(updates, state, params, **extra)
        return kernels.adam_direction(updates, state, b1, b2)

    return optax.GradientTransformationExtraArgs(adam.init, update)


def skip_if_nonfinite(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Wrap `inner` so that its moments change only if `is_finite`; step counts always advance."""

    def update(updates, state, params=None, *, is_finite: jax.typing.ArrayLike = True, **_):
        updates, new = inner.update(updates, state, params)
        return updates, jax.tree.map(partial(where_finite, is_finite), new, state)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def where_finite(is_finite: jax.typing.ArrayLike, new: jax.Array, old: jax.Array) -> jax.Array:
    """Return `new` if `is_finite`, else `old`; an array of integers is always `new`."""
    return jnp.where(is_finite, new, old) if jnp.issubdtype(new.dtype, jnp.floating) else new


def partition_by_kind(config: Config, adam: optax.GradientTransformation):
    """Apply Muon to the blocks' matrices if it is chosen, and no update to frozen parameters."""
    _, shapes, letters = model.abstract_model(config)
    is_frozen = frozen_mask(config, shapes)
    axes = muon_dimension_numbers(config, letters, is_frozen)
    kinds: dict[Hashable, optax.GradientTransformation] = {"adamw": adam}
    if config.optimizer == "muon":
        muon = skip_if_nonfinite(scale_by_muon(weight_dimension_numbers=axes))
        kinds["muon"] = optax.chain(muon, consistent_rms(axes))
    if config.freeze:
        kinds["frozen"] = optax.set_to_zero()

    def label(frozen: bool, axes: MuonDimensionNumbers | optax.MaskedNode) -> str:
        if frozen:
            return "frozen"
        return "muon" if isinstance(axes, MuonDimensionNumbers) else "adamw"

    return optax.partition(kinds, jax.tree.map(label, is_frozen, axes))


def frozen_mask(config: Config, params: dict) -> dict:
    """Return a tree of bools like `params`: whether `freeze` matches a parameter's path."""

    def is_frozen(keys: tuple, _) -> bool:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        return bool(config.freeze) and re.search(config.freeze, path) is not None

    return jax.tree.map_with_path(is_frozen, params)


def muon_dimension_numbers(config: Config, letters: dict, is_frozen: dict) -> dict:
    """Return the input and output axes of every kernel that Muon updates; a blank for others.

    D is one side of the matrix; heads or hidden units are the other side. Each layer (L) and each
    part of a fused map (C: query, key, value) is a matrix of its own, as it is when not fused.
    """

    def numbers(path: tuple, letters: str, frozen: bool) -> MuonDimensionNumbers | optax.MaskedNode:
        in_blocks = path[0].key == "blocks" and path[-1].key == "kernel" and "D" in letters
        if config.optimizer != "muon" or frozen or not in_blocks:
            return optax.MaskedNode()
        width = (letters.index("D"),)
        other = tuple(i for i, letter in enumerate(letters) if letter not in "LCD")
        return MuonDimensionNumbers(*sorted((width, other)))

    return jax.tree.map_with_path(numbers, letters, is_frozen)


def consistent_rms(axes: dict) -> optax.GradientTransformation:
    """Scale orthogonal updates to the RMS of AdamW's, so that both share a learning rate."""

    def scale(update: jax.Array, sides: tuple[tuple[int, ...], ...]) -> jax.Array:
        longer = max(math.prod(update.shape[i] for i in side) for side in sides)
        return MUON_RMS * math.sqrt(longer) * update

    return optax.stateless(lambda updates, _: jax.tree.map(scale, updates, axes))
