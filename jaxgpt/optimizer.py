"""The optimizer: AdamW or Muon, gradient clipping, learning-rate schedules, frozen parameters."""

import re
from collections.abc import Hashable
from functools import partial

import jax
import jax.numpy as jnp
import optax

from jaxgpt import kernels, model, muon
from jaxgpt.config import Config
from jaxgpt.kernels.newton_schulz import POLYNOMIALS


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

    With `optimizer="muon"` or "normuon" the blocks' matrices use jaxgpt/muon.py instead, with the
    same weight decay. Frozen parameters have no moments. `update` takes the argument `is_accepted`;
    if it is False, the moments do not change.
    """
    c = config
    # wrap every transformation that has moments in `skip_if_rejected`, or they keep a NaN
    direction = scale_by_adam(c.beta1, c.beta2)
    if c.uses_muon or c.freeze:
        direction = partition_by_kind(c, direction)
    clip = optax.clip_by_global_norm(c.grad_clip) if c.grad_clip else optax.identity()
    transforms = [direction, decay_weights(c), optax.scale_by_learning_rate(schedule(c))]
    scale = c.learning_rate_scale(model.abstract_model(c).shapes)
    if scale is not None:
        multiply = lambda updates, _: jax.tree.map(jnp.multiply, updates, scale)
        transforms.append(optax.stateless(multiply))
    # checkpoints name the moments by this nesting, as in 1.0.mu
    return optax.chain(clip, optax.chain(*transforms))


def decay_weights(config: Config) -> optax.GradientTransformation:
    """Add weight decay; `cautious_weight_decay` skips weights that the update lets grow.

    Chen et al. 2025, "Cautious Weight Decay".
    """
    c = config
    if not c.cautious_weight_decay:
        return optax.add_decayed_weights(c.weight_decay, c.weight_decay_mask)

    def decay(update: jax.Array, param: jax.Array) -> jax.Array:
        # the update is subtracted, so it shrinks the weights that have its sign
        return update + c.weight_decay * jnp.where(update * param > 0, param, 0)

    decay_all = optax.stateless(lambda updates, params: jax.tree.map(decay, updates, params))
    return optax.masked(decay_all, c.weight_decay_mask)


def scale_by_adam(b1: float, b2: float) -> optax.GradientTransformationExtraArgs:
    """Scale gradients to Adam's update direction (Kingma & Ba 2015)."""
    adam = skip_if_rejected(optax.scale_by_adam(b1, b2, eps=kernels.ADAM_EPSILON))

    def update(updates, state, params=None, **extra):
        _, state = adam.update(updates, state, params, **extra)  # only optax's moments are used
        return kernels.adam_direction(state, b1, b2)

    return optax.GradientTransformationExtraArgs(adam.init, update)


def skip_if_rejected(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Wrap `inner` so that its state, moments and step counts, changes only if `is_accepted`."""

    def update(updates, state, params=None, *, is_accepted: jax.typing.ArrayLike = True, **_):
        updates, new = inner.update(updates, state, params)
        return updates, jax.tree.map(partial(jnp.where, is_accepted), new, state)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def partition_by_kind(
    config: Config, adam: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Apply Muon to the blocks' matrices if it is chosen; keep no moments for frozen parameters."""
    kinds = update_kinds(config)
    transforms: dict[Hashable, optax.GradientTransformation] = {"adamw": adam}
    if config.uses_muon:
        letters = model.abstract_model(config).axes
        all_sides = muon.matrix_axes(letters, kinds, per_head=config.muon_per_head)
        transforms["muon"] = muon_direction(config, all_sides)
    if config.freeze:
        transforms["frozen"] = optax.set_to_zero()
    return optax.partition(transforms, kinds)


def update_kinds(config: Config) -> dict:
    """Return the kind of each parameter's update: "muon", "adamw" or "frozen"."""
    _, shapes, axes = model.abstract_model(config)

    def kind(path: tuple, letters: str, is_frozen: bool) -> str:
        if is_frozen:
            return "frozen"
        # `muon.matrix_axes` needs an axis of the model's width, D
        is_matrix = path[0].key == "blocks" and path[-1].key == "kernel" and "D" in letters
        return "muon" if config.uses_muon and is_matrix else "adamw"

    return jax.tree.map_with_path(kind, axes, frozen_mask(config, shapes))


def muon_direction(config: Config, all_sides: dict) -> optax.GradientTransformation:
    """Return Muon's update directions, with an RMS of about AdamW's."""
    polynomial = POLYNOMIALS[config.muon_polynomial].first(config.muon_iterations)
    direction = muon.scale_by_muon(all_sides, polynomial, config.momentum_warmup_iters)
    if config.optimizer == "normuon":
        scale = skip_if_rejected(muon.normalize_neurons(all_sides, config.beta2))
    else:
        scale = muon.consistent_rms(all_sides)
    return optax.chain(skip_if_rejected(direction), scale)


def frozen_mask(config: Config, params: dict) -> dict:
    """Return a tree of bools like `params`: whether `freeze` matches a parameter's path."""

    def is_frozen(keys: tuple, _) -> bool:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        return bool(config.freeze) and re.search(config.freeze, path) is not None

    return jax.tree.map_with_path(is_frozen, params)
