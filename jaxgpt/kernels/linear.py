"""Linear maps, written as einsums whose second operand is the weight: "BTD,DNH->BTNH".

The output has the remaining axes of x and then those of the weight.
R rows, S summed size, P parts.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxgpt.kernels.platform import accum_dtype, is_partitioned

GEMV_MIN_BYTES = 1 << 20  # a smaller weight may stay in a core's cache between its uses
PARTS_MIN_SIZE = 1 << 24  # elements of x; more kernels cost more than a smaller map gains
LINEAR_OUTPUT = "linear"  # the name of a linear map's output, which remat="dots" keeps
PACKED_MIN_BYTES = 1 << 17  # reading a smaller weight takes less time than starting both cores


def linear_reference(equation: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """Compute the einsum of `equation` in x's dtype."""
    return jnp.einsum(equation, x, weight.astype(x.dtype))


# ---- every platform: sum over axes in memory order -------------------------------------------


def linear_in_order(equation: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """Compute `linear_reference` and its gradient without einsum's sorting of the summed axes.

    Raises `ValueError` if the summed axes are neither the first nor the last ones of an operand,
    or if an axis is in both operands and in the output
    (docs/performance.md, "Sums in memory order").
    """
    return _contract(_product, equation, x, weight.astype(x.dtype))


def _product(x: jax.Array, y: jax.Array, sums: tuple[list[int], list[int]]) -> jax.Array:
    return jax.lax.dot_general(x, y, (sums, ((), ())))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _contract(product: Any, equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    x_axes, y_axes, summed = _axes(equation)
    sums = [x_axes.index(axis) for axis in summed], [y_axes.index(axis) for axis in summed]
    return product(x, y, sums)


def _contract_fwd(product: Any, equation: str, x: jax.Array, y: jax.Array):
    return _contract(product, equation, x, y), (x, y)


def _contract_bwd(product: Any, equation: str, saved: tuple, dz: jax.Array):
    x, y = saved
    x_axes, y_axes, z_axes = equation.replace("->", ",").split(",")
    dx = _contract(product, f"{z_axes},{y_axes}->{x_axes}", dz, y)
    # a product has its first operand's axes first, and dy needs the weight's first axis there
    if y_axes[0] in x_axes:
        dy = _contract(product, f"{x_axes},{z_axes}->{y_axes}", x, dz)
    else:
        dy = _contract(product, f"{z_axes},{x_axes}->{y_axes}", dz, x)
    return dx, dy


_contract.defvjp(_contract_fwd, _contract_bwd)


def _axes(equation: str) -> tuple[str, str, str]:
    """Return the axes of both operands and the axes that are summed over."""
    x_axes, y_axes, out = equation.replace("->", ",").split(",")
    if shared := set(x_axes) & set(y_axes) & set(out):
        problem = f"{', '.join(sorted(shared))} is in both operands and in the output"
        raise ValueError(f"{equation!r}: {problem}; expected jnp.einsum for a batch of maps")
    summed = "".join(axis for axis in x_axes if axis not in out)
    for axes in (x_axes, y_axes):
        if not axes.startswith(summed) and not axes.endswith(summed):
            raise ValueError(f"{equation!r}: {summed!r} must lead or end both operands")
    return x_axes, y_axes, summed


@jax.custom_vjp
def add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    """Add a bias to the last axes of y, in y's dtype; its gradient is summed in float32 at least.

    Otherwise XLA would sum the gradients of thousands of tokens in bfloat16.
    """
    return y + bias.astype(y.dtype)


def _add_bias_fwd(y: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array]:
    return add_bias(y, bias), bias


def _add_bias_bwd(bias: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    token_axes = range(dy.ndim - bias.ndim)
    return dy, dy.astype(accum_dtype(dy)).sum(token_axes).astype(bias.dtype)


add_bias.defvjp(_add_bias_fwd, _add_bias_bwd)


def linear_parts_reference(
    equation: str, x: jax.Array, weight: jax.Array, bias: jax.Array | None,
    product: Callable = linear_in_order,
) -> list[jax.Array]:  # fmt: skip
    """Compute a fused map, "BTD,DCNH->BTCNH" with a bias [C, N, H], and return its C parts."""
    y = checkpoint_name(product(equation, x, weight), LINEAR_OUTPUT)
    return list(jnp.unstack(y if bias is None else add_bias(y, bias), axis=2))


def linear_parts_gpu(
    equation: str, x: jax.Array, weight: jax.Array, bias: jax.Array | None
) -> list[jax.Array]:
    """On one GPU, compute each part of a large map by a product of its own.

    Each product takes a slice of the weight. Otherwise the GPU splits the output of one product,
    and concatenates the gradients of the parts, which are much larger than the weight. Several
    GPUs would have to sum the gradient of each slice (docs/performance.md, "A product per part").
    """
    if x.size < PARTS_MIN_SIZE or is_partitioned():
        return linear_parts_reference(equation, x, weight, bias)
    products: Any = _separate_products(equation.replace("C", ""), x, weight.astype(x.dtype))
    parts = []
    for i, y in enumerate(products):
        y = checkpoint_name(y, LINEAR_OUTPUT)
        parts.append(y if bias is None else add_bias(y, bias[i]))
    return parts


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _separate_products(equation: str, x: jax.Array, weight: jax.Array) -> list[jax.Array]:
    """Return the product of x with each part of the weight, "BTD,DNH->BTNH"."""
    return [linear_in_order(equation, x, weight[:, i]) for i in range(weight.shape[1])]


def _separate_fwd(equation: str, x: jax.Array, weight: jax.Array):
    return _separate_products(equation, x, weight), (x, weight)


def _separate_bwd(equation: str, saved: tuple, dys: list[jax.Array]):
    x, weight = saved
    dx: Any = None
    d_weight = []
    for i, dy in enumerate(dys):
        summand: Any
        summand, d_part = _contract_bwd(_product, equation, (x, weight[:, i]), dy)
        # in this order, cuBLAS adds the sum so far as it writes the next summand
        dx = summand if dx is None else summand + dx
        d_weight.append(d_part)
    return dx, jnp.stack(d_weight, axis=1)


_separate_products.defvjp(_separate_fwd, _separate_bwd)


# ---- CPU: products of two matrices -----------------------------------------------------------


def linear_cpu(equation: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """Compute `linear_in_order` by products of two matrices; `weight` may be packed.

    For arrays of higher rank, XLA:CPU copies both operands element by element
    (docs/performance.md, "Two-matrix linear maps").
    """
    if weight.dtype == jnp.uint32:
        summed = _axes(equation)[2]
        return _packed_gemv(x, weight).reshape(*x.shape[: -len(summed)], *weight.shape[1:])
    product = _product if is_partitioned() else _matmul_2d
    return _contract(product, equation, x, weight.astype(x.dtype))


linear_parts_cpu = partial(linear_parts_reference, product=linear_cpu)


def _matmul_2d(x: jax.Array, y: jax.Array, sums: tuple[list[int], list[int]]) -> jax.Array:
    """Compute `_product` with x and y reshaped to matrices."""
    shape = jax.eval_shape(partial(_product, sums=sums), x, y).shape
    S = math.prod(x.shape[i] for i in sums[0])
    x_RS = x.reshape(-1, S) if sums[0][-1] == x.ndim - 1 else x.reshape(S, -1).T
    is_last = sums[1][-1] == y.ndim - 1
    y = y.reshape((-1, S) if is_last else (S, -1))
    if len(x_RS) == 1 and y.nbytes > GEMV_MIN_BYTES:
        return _gemv(x_RS, y, is_last).reshape(shape)
    return (x_RS @ (y.T if is_last else y)).reshape(shape)


def _gemv(x_1S: jax.Array, y: jax.Array, is_last: bool) -> jax.Array:
    """Multiply one row by a large matrix, [R, S] if S `is_last` and else [S, R], in eight parts.

    XLA:CPU reads the parts with both cores (docs/performance.md, "Row product in eight parts").
    Of the axes of a part, R or S is an eighth of its size.
    """
    S = x_1S.size
    if is_last:
        parts = math.gcd(len(y), 8)
        x_PS = jnp.broadcast_to(x_1S, (parts, S))
        return jnp.einsum("PS,PRS->PR", x_PS, y.reshape(parts, -1, S))
    parts = math.gcd(S, 8)
    x_PS, y_PSR = x_1S.reshape(parts, -1), y.reshape(parts, S // parts, -1)
    summands_PR = jnp.einsum("PS,PSR->PR", x_PS, y_PSR)
    return sum(summands_PR[1:], summands_PR[0])


# ---- CPU: one row by a packed bfloat16 weight ------------------------------------------------


def pack_bf16(equation: str, weight: jax.Array) -> jax.Array:
    """Pack a float32 weight whose values are bfloat16, two per uint32 word: [S / 2, ...].

    The summed axes come first. Word i holds value i in its lower bits, and value S / 2 + i in its
    upper bits. A small weight, or one whose S is not a multiple of 16, is returned unchanged
    (docs/performance.md, "Packed bfloat16 weights").
    """
    _, axes, summed = _axes(equation)
    kept = "".join(axis for axis in axes if axis not in summed)
    summed_first = jnp.einsum(f"{axes}->{summed}{kept}", weight)
    summed_first = summed_first.reshape(-1, *summed_first.shape[len(summed) :])
    if weight.nbytes <= PACKED_MIN_BYTES or len(summed_first) % 16:
        return weight
    lower, upper = jnp.split(jax.lax.bitcast_convert_type(summed_first, jnp.uint32), 2)
    return lower >> 16 | upper


def unpack_bf16(words: jax.Array) -> list[jax.Array]:
    """Return the values in the lower and in the upper bits of uint32 words, as float32."""
    bits = words << 16, words & jnp.uint32(0xFFFF0000)
    return [jax.lax.bitcast_convert_type(half, jnp.float32) for half in bits]


def _packed_gemv(x: jax.Array, words: jax.Array) -> jax.Array:
    """Multiply one row by a packed weight, and convert words to float32 as they are read.

    XLA:CPU compiles a sum that is written term by term to one loop on all cores. For a matrix
    product, or a sum over an axis, it would first convert the whole weight in memory. The barriers
    keep XLA from fusing this loop with the loops around it.
    """
    half = len(words)  # of the summed size
    terms = math.gcd(half, min(16, half // 8))
    x, words = jax.lax.optimization_barrier((x, words))
    x = x.reshape(2, half // terms, terms, 1)
    words = words.reshape(half // terms, terms, -1)
    summands = []
    for i in range(terms):
        lower, upper = unpack_bf16(words[:, i])
        summands += [x[0, :, i] * lower, x[1, :, i] * upper]
    sums = jax.lax.optimization_barrier(sum(summands[1:], summands[0]))
    return jnp.ones(len(sums), sums.dtype) @ sums
