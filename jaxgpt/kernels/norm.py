"""LayerNorm and RMSNorm over the last axis, without bias, with float32 statistics.

D is the width of the last axis.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxgpt.kernels.platform import accum_dtype, over_batch

NORM_EPSILON = 1e-5


def norm_reference(x: jax.Array, scale_D: jax.Array, *, centered: bool) -> jax.Array:
    """Compute LayerNorm (Ba et al. 2016), or RMSNorm (Zhang & Sennrich 2019) if not `centered`.

    The statistics and the result are float32 at least.
    """
    x = x.astype(accum_dtype(x))
    if centered:
        x = x - x.mean(-1, keepdims=True)
    variance = jnp.square(x).mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(variance + NORM_EPSILON) * scale_D


def residual_and_norm_reference(x: jax.Array, norm: Any) -> tuple[jax.Array, jax.Array]:
    """Return x, for the residual stream, and `norm(x)` of a `model.Norm`, for a branch."""
    return x, norm(x)


def folds_gains_reference(config: Any) -> bool:
    """Tell whether the training step multiplies the gains of norms into the maps after them."""
    return False


# ---- a gradient written by hand, with a choice of how rows are summed ------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _normalize(row_mean: Callable, keeps_statistics: bool, centered: bool, x, scale_D):
    return _normalize_fwd(row_mean, keeps_statistics, centered, x, scale_D)[0]


def _normalize_fwd(row_mean: Callable, keeps_statistics: bool, centered: bool, x, scale_D):
    x_f32 = x.astype(accum_dtype(x))
    mean = row_mean(x_f32) if centered else jnp.zeros((), x_f32.dtype)
    inverse_std = jax.lax.rsqrt(row_mean(jnp.square(x_f32 - mean)) + NORM_EPSILON)
    return (x_f32 - mean) * inverse_std * scale_D, (x, mean, inverse_std, scale_D)


def _normalize_bwd(row_mean: Callable, keeps_statistics: bool, centered: bool, saved: tuple, dy):
    x, mean, inverse_std, scale_D = saved
    if keeps_statistics:
        mean, inverse_std = jax.lax.optimization_barrier((mean, inverse_std))
    normalized = (x.astype(dy.dtype) - mean) * inverse_std
    product = dy * normalized
    removed = normalized * row_mean(product, scale_D)
    if centered:
        removed = removed + row_mean(dy, scale_D)
    dx = inverse_std * (dy * scale_D - removed)
    return dx.astype(x.dtype), product.sum(range(x.ndim - 1))


_normalize.defvjp(_normalize_fwd, _normalize_bwd)


def _mean_by_matmul(x: jax.Array, scale_D: jax.Array | float = 1.0) -> jax.Array:
    """Return the mean of x * scale over the last axis, computed as a product with a vector.

    The barrier keeps XLA from turning the product into a sum, which is slower on a CPU.
    """
    share_D = jnp.broadcast_to(scale_D / x.shape[-1], x.shape[-1:]).astype(x.dtype)
    return (x @ jax.lax.optimization_barrier(share_D))[..., None]


def _mean_by_sum(x: jax.Array, scale_D: jax.Array | float = 1.0) -> jax.Array:
    share_D = jnp.broadcast_to(scale_D / x.shape[-1], x.shape[-1:]).astype(x.dtype)
    return (x * share_D).sum(-1, keepdims=True)


def _mean_divided_last(x: jax.Array, scale_D: jax.Array | float = 1.0) -> jax.Array:
    return (x * scale_D).mean(-1, keepdims=True)


def norm_cpu(x: jax.Array, scale_D: jax.Array, *, centered: bool) -> jax.Array:
    """Compute `norm_reference` with row sums as matrix products.

    XLA:CPU sums a row element by element (docs/performance.md, "Norm sums as matrix products").
    """
    return _normalize(_mean_by_matmul, False, centered, x, scale_D)


def norm_gpu(x: jax.Array, scale_D: jax.Array, *, centered: bool) -> jax.Array:
    """Compute `norm_reference` and keep the statistics in memory for the gradient.

    Otherwise each kernel of the gradient computes the statistics again, from float32 arrays
    (docs/performance.md, "Norm statistics in memory").
    """
    return _normalize(_mean_by_sum, True, centered, x, scale_D)


def norm_tpu(x: jax.Array, scale_D: jax.Array, *, centered: bool) -> jax.Array:
    """Compute `norm_reference` with means that are divided after the sum.

    This takes less memory if XLA splits rows over TPUs
    (docs/performance.md, "Row means divided last").
    """
    return _normalize(_mean_divided_last, False, centered, x, scale_D)


# ---- GPU: norms without gains ----------------------------------------------------------------

# The parts of `Attention` and `MLP` in model.py: maps of the norm's result, and all others.
AFTER_NORM = "qkv", "q", "kv", "up"
INSIDE_BRANCH = "out", "down", "q_norm", "k_norm", "value_mix"


def folds_gains_gpu(config: Any) -> bool:
    """Tell whether every norm has a gain, no bias, and a map after it that is trained.

    After `fold_gains`, the norm's result is the input of that map itself, so one kernel per
    direction suffices. A bias would have to become a bias of the map, and a frozen map cannot hold
    a gain that is trained (docs/performance.md, "Gains folded into linear maps").
    """
    is_plain = config.norm_gain and not config.bias and not config.freeze
    return is_plain and config.norm_position == "pre" and config.n_layer > 0


def fold_gains(params: dict) -> dict:
    """Multiply the gain of each norm of a GPT into the kernel of the map after it.

    Return the parameters of the same GPT with norm_gain=False. The GPT must have an untied head.
    """
    blocks = params["blocks"]
    is_stacked = "attn" in blocks
    blocks = _fold_block(blocks) if is_stacked else {i: _fold_block(b) for i, b in blocks.items()}
    head = {"kernel": params["ln_f"]["scale"] * params["lm_head"]["kernel"]}
    return {k: p for k, p in params.items() if k != "ln_f"} | {"blocks": blocks, "lm_head": head}


def _fold_block(block: dict) -> dict:
    """Fold both gains of one block, or of the stacked blocks."""

    def scaled(branch: dict, gain: jax.Array) -> dict:
        folded = dict(branch)
        for name, params in branch.items():
            if name in AFTER_NORM:
                kernel = params["kernel"]
                over_inputs = gain.reshape(gain.shape + (1,) * (kernel.ndim - gain.ndim))
                folded[name] = params | {"kernel": over_inputs * kernel}
            elif name not in INSIDE_BRANCH:
                problem = "is not known to be after a norm or inside a branch"
                raise ValueError(f"{name!r}: {problem}; expected it in AFTER_NORM or INSIDE_BRANCH")
        return folded

    attn = scaled(block["attn"], block["ln_1"]["scale"])
    return {"attn": attn, "mlp": scaled(block["mlp"], block["ln_2"]["scale"])}


def residual_and_norm_gpu(x: jax.Array, norm: Any) -> tuple[jax.Array, jax.Array]:
    """Return x, and its norm by one kernel; another kernel computes the gradient of both.

    The gradient comes from the result, so x is not kept. A norm with a gain is computed as on any
    platform (docs/performance.md, "One kernel per norm and direction").
    """
    if norm.scale is not None:
        return residual_and_norm_reference(x, norm)
    with jax.named_scope(getattr(norm, "scope", "norm")):
        return _residual_and_norm(x, norm.centered)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _residual_and_norm(x: jax.Array, centered: bool) -> tuple[jax.Array, jax.Array]:
    ones_D = jnp.ones(x.shape[-1], x.dtype)
    return x, norm_reference(x, ones_D, centered=centered).astype(x.dtype)


def _residual_and_norm_fwd(x: jax.Array, centered: bool) -> tuple[tuple, tuple]:
    from jaxgpt.kernels import triton

    def run(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y_RD, inverse_std_R1 = triton.normalize(x.reshape(-1, x.shape[-1]), centered, NORM_EPSILON)
        return y_RD.reshape(x.shape), inverse_std_R1.reshape(*x.shape[:-1], 1)

    y, inverse_std = over_batch(run)(x)
    return (x, y), (y, inverse_std)


def _residual_and_norm_bwd(centered: bool, saved: tuple, gradients: tuple) -> tuple[jax.Array]:
    from jaxgpt.kernels import triton

    def run(*arrays: jax.Array) -> jax.Array:
        dy_RD, y_RD, inverse_std_R1, dx_RD = (x.reshape(-1, x.shape[-1]) for x in arrays)
        dx_RD = triton.normalize_gradient(dy_RD, y_RD, inverse_std_R1, dx_RD, centered)
        return dx_RD.reshape(arrays[0].shape)

    dx, dy = gradients
    return (over_batch(run)(dy, *saved, dx),)


_residual_and_norm.defvjp(_residual_and_norm_fwd, _residual_and_norm_bwd)
