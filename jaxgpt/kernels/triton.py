"""Kernels for NVIDIA GPUs, written in Pallas and compiled by Triton.

Each computes one operation of this package with less memory traffic than XLA's kernels; the
operation's own file has its equations. R rows, D or V columns.
On a CPU the kernels run in Pallas' interpreter, which is how the tests run them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jaxgpt.kernels.platform import accum_dtype

TILE = 4096  # elements of a tile, at least one row of a norm
ELEMENTS = 2048  # of a tile of each input of an elementwise function
WARPS = 4  # of a program


def call_kernel(
    kernel: Callable, name: str, grid: tuple, results: Any, stages: int = 1, **options: Any
) -> Callable:
    """Return the call of a kernel; `stages` loads of a loop are in flight at a time."""
    parameters = triton.CompilerParams(num_warps=WARPS, num_stages=stages)
    keys = {"name": name, "grid": grid, "out_shape": results, "compiler_params": parameters}
    compiled = pl.pallas_call(kernel, **keys, **options)
    interpreted = pl.pallas_call(kernel, **keys, **options, interpret=True)
    return partial(jax.lax.platform_dependent, cpu=interpreted, default=compiled)


def _float32(x: jax.Array) -> jax.Array:
    return x.astype(accum_dtype(x))


# ---- norms -----------------------------------------------------------------------------------


def normalize(x_RD: jax.Array, centered: bool, epsilon: float) -> tuple[jax.Array, jax.Array]:
    """Return the normalised rows, and the inverse deviation of each row [R, 1]."""
    R, D = x_RD.shape
    statistic = jax.ShapeDtypeStruct((R, 1), accum_dtype(x_RD))
    kernel = partial(_normalize, centered, epsilon)
    return call_kernel(kernel, "norm", _row_grid(R, D), [x_RD, statistic])(x_RD)


def _normalize(centered: bool, epsilon: float, x_ref, y_ref, inverse_std_ref) -> None:
    D = x_ref.shape[1]
    tile, column, inside, inside_column = _row_tile(x_ref)
    x = _float32(triton.load(x_ref.at[tile], mask=inside, other=0))
    if centered:
        x = jnp.where(inside, x - x.sum(1, keepdims=True) / D, 0)
    inverse_std = jax.lax.rsqrt((x * x).sum(1, keepdims=True) / D + epsilon)
    triton.store(y_ref.at[tile], (x * inverse_std).astype(y_ref.dtype), mask=inside)
    triton.store(inverse_std_ref.at[column], inverse_std, mask=inside_column)


def normalize_gradient(
    dy_RD: jax.Array, y_RD: jax.Array, inverse_std_R1: jax.Array, dx_RD: jax.Array, centered: bool
) -> jax.Array:
    """Return `dx` plus the gradient of `normalize`'s input, from its output y and y's gradient."""
    R, D = y_RD.shape
    call = call_kernel(partial(_gradient, centered), "norm_gradient", _row_grid(R, D), dx_RD)
    return call(dy_RD, y_RD, inverse_std_R1, dx_RD)


def _gradient(centered: bool, dy_ref, y_ref, inverse_std_ref, dx_ref, out_ref) -> None:
    D = y_ref.shape[1]
    tile, column, inside, inside_column = _row_tile(y_ref)
    dy, y, dx = (
        _float32(triton.load(ref.at[tile], mask=inside, other=0)) for ref in (dy_ref, y_ref, dx_ref)
    )
    inverse_std = triton.load(inverse_std_ref.at[column], mask=inside_column, other=0)
    d = dy - y * (dy * y).sum(1, keepdims=True) / D
    if centered:  # the mean of y is 0
        d = d - dy.sum(1, keepdims=True) / D
    triton.store(out_ref.at[tile], (dx + d * inverse_std).astype(out_ref.dtype), mask=inside)


def _row_grid(R: int, D: int) -> tuple[int]:
    return (pl.cdiv(R, _rows_per_program(D)),)


def _rows_per_program(D: int) -> int:
    return max(1, TILE // pl.next_power_of_2(D))


def _row_tile(ref) -> tuple[tuple, tuple, jax.Array, jax.Array]:
    """Return the indices of this program's rows and of their first column, with masks."""
    R, D = ref.shape
    rows = _rows_per_program(D)
    row = (pl.program_id(0) * rows + jnp.arange(rows))[:, None]
    column = jnp.arange(pl.next_power_of_2(D))[None]
    return (row, column), (row, jnp.zeros_like(row)), (row < R) & (column < D), row < R


# ---- gradients of elementwise functions ------------------------------------------------------


def scaled(function: Callable, x: jax.Array, y: jax.Array) -> jax.Array:
    """Return y times an elementwise function of x, for arrays of any shape."""
    grid = (pl.cdiv(x.size, ELEMENTS),)
    call = call_kernel(partial(_scaled, function), "scaled", grid, x.ravel())
    return call(x.ravel(), y.ravel()).reshape(x.shape)


def _scaled(function: Callable, x_ref, y_ref, out_ref) -> None:
    tile = pl.program_id(0) * ELEMENTS + jnp.arange(ELEMENTS)
    inside = tile < x_ref.shape[0]
    x, y = (_float32(triton.load(ref.at[tile], mask=inside, other=0)) for ref in (x_ref, y_ref))
    triton.store(out_ref.at[tile], (y * function(x)).astype(out_ref.dtype), mask=inside)


# ---- cross-entropy ---------------------------------------------------------------------------


def cross_entropy(logits_RV: jax.Array, targets_R: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the loss of each row [R], and the gradient of their sum, which replaces the logits.

    A row with a negative target has no loss and no gradient.
    """
    R, _ = logits_RV.shape
    loss = jax.ShapeDtypeStruct((R,), accum_dtype(logits_RV))
    results, aliases = [loss, logits_RV], {0: 1}
    call = call_kernel(_cross_entropy, "cross_entropy", (R,), results, input_output_aliases=aliases)
    return call(logits_RV, targets_R)


def _cross_entropy(logits_ref, targets_ref, loss_ref, gradient_ref) -> None:
    """Sum a row's exponentials; read the row again, from the GPU's cache, for its gradient."""
    V, dtype = logits_ref.shape[1], loss_ref.dtype
    row = pl.program_id(0)
    target = targets_ref[row]
    # loaded before the sums, whose barriers keep other warps from overwriting it with the gradient
    target_logit = triton.load(logits_ref.at[row, jnp.maximum(target, 0)]).astype(dtype)
    width = TILE // 4

    def sum_tile(i: jax.Array, carry: tuple) -> tuple:
        maximum, total = carry  # of each of `width` interleaved columns
        column = i * TILE + jnp.arange(4)[:, None] * width + jnp.arange(width)
        x = triton.load(logits_ref.at[row, column], mask=column < V, other=-jnp.inf).astype(dtype)
        new = jnp.maximum(maximum, x.max(0))
        return new, total * jnp.exp(maximum - new) + jnp.exp(x - new).sum(0)

    start = jnp.full(width, -1e30, dtype), jnp.zeros(width, dtype)
    maximum, total = jax.lax.fori_loop(0, pl.cdiv(V, TILE), sum_tile, start)
    largest = maximum.max()
    lse = largest + jnp.log((total * jnp.exp(maximum - largest)).sum())
    is_target_row = target >= 0
    loss_ref[row] = jnp.where(is_target_row, lse - target_logit, 0)

    def write_tile(i: jax.Array, carry: None) -> None:
        column = i * TILE + jnp.arange(TILE)
        tile = row, column
        x = triton.load(logits_ref.at[tile], mask=column < V, other=-jnp.inf).astype(dtype)
        gradient = jnp.exp(x - lse) - (column == target).astype(dtype)
        gradient = jnp.where(is_target_row, gradient, 0).astype(gradient_ref.dtype)
        triton.store(gradient_ref.at[tile], gradient, mask=column < V)

    jax.lax.fori_loop(0, pl.cdiv(V, TILE), write_tile, None)
