"""AdamW with its decay mask, and the learning rate's schedule: all optax."""

import jax
import jax.numpy as jnp
import optax

from jaxgpt.config import Config


def schedule(config: Config) -> optax.Schedule:
    """Learning rate by step, from 0: linear warm-up, cosine to `min_lr`, then flat; nanoGPT's.

    The warm-up's first step is already above zero: learning_rate / (warmup_iters + 1).
    """
    c = config
    if not c.decay_lr:
        return optax.constant_schedule(c.learning_rate)
    end = c.lr_decay_iters or c.max_iters

    def learning_rate(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step)
        warm = c.learning_rate * (step + 1) / (c.warmup_iters + 1)
        progress = jnp.clip((step - c.warmup_iters) / max(1, end - c.warmup_iters), 0, 1)
        cosine = c.min_lr + 0.5 * (1 + jnp.cos(jnp.pi * progress)) * (c.learning_rate - c.min_lr)
        return jnp.where(step < c.warmup_iters, warm, cosine)

    return learning_rate


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW (Loshchilov & Hutter 2019), decaying matrices or all."""
    c = config
    mask = None if c.decay_all else kernels
    return optax.chain(
        optax.clip_by_global_norm(c.grad_clip) if c.grad_clip else optax.identity(),
        optax.adamw(schedule(c), c.beta1, c.beta2, weight_decay=c.weight_decay, mask=mask),
    )


def kernels(params: dict) -> dict:
    """Which parameters are matrices or embeddings, and not biases or gains: a tree of bools."""
    return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)
