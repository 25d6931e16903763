"""The parts that all of the network shares: dropout, linear maps, tables, norms.

B batch; other letters are the axes of what a part is made for. A parameter carries the letters
of its axes as `axes`: `sharding.py` maps them to the mesh.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, PartitionSpec

from jaxgpt.config import ModelConfig

INIT_STD = 0.02  # of every matrix and embedding; Radford et al. 2019
NORM_EPSILON = 1e-5
CACHED = 1 << 20  # bytes: a smaller kernel may still be in a core's cache at its next use
PACKED = 1 << 17  # bytes: a smaller kernel is read before a loop over it has begun on both cores

LINEAR = "linear"  # what a linear map gives, for `remat` to know it by

EMBEDDING, WEIGHTS, ATTENTION, MLP = range(4)  # where dropout acts


@partial(jax.tree_util.register_dataclass, data_fields=["keys_B"], meta_fields=["rate"])
@dataclass(frozen=True)
class Dropout:
    """Zeroes a share `rate` of its input and scales up the rest (Srivastava et al. 2014).

    Every sequence has a key of its own, so its mask does not depend on how a step's sequences
    are split into micro-batches or over devices.
    """

    rate: float = 0.0
    keys_B: Any = None

    def layer(self, layer: int | jax.Array) -> "Dropout":
        return Dropout(self.rate, _fold(self.keys_B, layer)) if self.rate else self

    def __call__(self, x: jax.Array, site: int) -> jax.Array:
        if not self.rate:
            return x
        bits = jax.vmap(partial(_random_bits, shape=x.shape[1:]))(_fold(self.keys_B, site))
        return jnp.where(bits >= jnp.uint32(self.rate * 2**32), x / (1 - self.rate), 0)


def _random_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """uint32 of this shape: a hash of the place and the key, at a tenth of Threefry's work.

    Nobody guesses dropout masks, so they need not withstand it.
    """
    first, second = jax.random.key_data(key)
    places = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    return _mix(_mix(places + first) ^ second)


def _mix(x: jax.Array) -> jax.Array:
    """A good hash of 32 bits: lowbias32 of C. Wellons, "Prospecting for hash functions", 2018."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _fold(keys_B: jax.Array, number: int | jax.Array) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (0, None))(keys_B, number)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def contract(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """`jnp.einsum` where the result's axes are what is left of x's and then of y's.

    It sums over axes in the alphabet's order; this sums over them in the order they lie in, and
    on a CPU by a product of two matrices, in the gradient too. `y` may be what `pack` made of it.
    Raises `ValueError` if what is summed over neither leads nor ends an operand.
    """
    x_axes, y_axes, summed = _axes(equation)
    if y.dtype == jnp.uint32:
        return _contract_packed(x, y).reshape(*x.shape[: -len(summed)], *y.shape[1:])
    sums = [x_axes.index(axis) for axis in summed], [y_axes.index(axis) for axis in summed]
    product = lambda x, y: jax.lax.dot_general(x, y, (sums, ((), ())))
    if _is_split():
        return product(x, y)
    matrices = partial(_multiply, sums=sums, shape=jax.eval_shape(product, x, y).shape)
    return jax.lax.platform_dependent(x, y, cpu=matrices, default=product)


def _contract_fwd(equation: str, x: jax.Array, y: jax.Array):
    return contract(equation, x, y), (x, y)


def _contract_bwd(equation: str, saved: tuple, dz: jax.Array) -> tuple[Any, Any]:
    x, y = saved
    x_axes, y_axes, z_axes = equation.replace("->", ",").split(",")
    dx = contract(f"{z_axes},{y_axes}->{x_axes}", dz, y)
    if y_axes[0] in x_axes:
        return dx, contract(f"{x_axes},{z_axes}->{y_axes}", x, dz)
    return dx, contract(f"{z_axes},{x_axes}->{y_axes}", dz, x)


contract.defvjp(_contract_fwd, _contract_bwd)


def _axes(equation: str) -> tuple[str, str, str]:
    """Axes of the operands, and those summed over."""
    x_axes, y_axes, out = equation.replace("->", ",").split(",")
    summed = "".join(axis for axis in x_axes if axis not in out)
    if not all(axes.startswith(summed) or axes.endswith(summed) for axes in (x_axes, y_axes)):
        raise ValueError(f"{equation!r}: {summed!r} must lead or end both operands")
    return x_axes, y_axes, summed


def _multiply(x: jax.Array, y: jax.Array, sums: tuple, shape: tuple) -> jax.Array:
    """Both as matrices, which XLA:CPU takes as they lie; the result has this shape.

    Of more axes it lays operands out anew, element by element, with all that led up to them.
    """
    S = math.prod(x.shape[i] for i in sums[0])
    x_RS = x.reshape(-1, S) if sums[0][-1] == x.ndim - 1 else x.reshape(S, -1).T
    is_last = sums[1][-1] == y.ndim - 1
    y = y.reshape((-1, S) if is_last else (S, -1))
    if len(x_RS) == 1 and y.nbytes > CACHED:
        return _multiply_row(x_RS, y, is_last).reshape(shape)
    return (x_RS @ (y.T if is_last else y)).reshape(shape)


def _multiply_row(x_1S: jax.Array, y: jax.Array, is_last: bool) -> jax.Array:
    """One row, by eight parts of y, [R, S] or [S, R].

    XLA:CPU reads a large y faster than as a whole: 25 GB/s for 20, on two cores.
    S what is summed over, P parts, R the result, of which a part holds a share or a summand.
    """
    S = x_1S.size
    if is_last:
        P = math.gcd(len(y), 8)
        x_PS = jnp.broadcast_to(x_1S, (P, S))
        return jnp.einsum("PS,PRS->PR", x_PS, y.reshape(P, -1, S))
    P = math.gcd(S, 8)
    summands_PR = jnp.einsum("PS,PSR->PR", x_1S.reshape(P, -1), y.reshape(P, S // P, -1))
    return sum(summands_PR[1:], summands_PR[0])


def pack(equation: str, kernel: jax.Array) -> jax.Array:
    """A kernel of float32 numbers that bfloat16 has too, two a word; as it is if it is small.

    `contract` takes uint32 [S, ...] for one row on a CPU: what is summed over comes first, and its
    second half lies in the upper bits.
    """
    _, axes, summed = _axes(equation)
    kept = "".join(axis for axis in axes if axis not in summed)
    turned = jnp.einsum(f"{axes}->{summed}{kept}", kernel)
    turned = turned.reshape(-1, *turned.shape[len(summed) :])
    if kernel.nbytes <= PACKED or len(turned) % 16:
        return kernel
    lower, upper = jnp.split(jax.lax.bitcast_convert_type(turned, jnp.uint32), 2)
    return lower >> 16 | upper


def unpack(words: jax.Array) -> list[jax.Array]:
    """The numbers in the lower and in the upper bits, float32."""
    bits = words << 16, words & jnp.uint32(0xFFFF0000)
    return [jax.lax.bitcast_convert_type(half, jnp.float32) for half in bits]


def _contract_packed(x: jax.Array, y: jax.Array) -> jax.Array:
    """One row, by a kernel that `pack` made: XLA:CPU widens words as it reads them, on all cores.

    It makes one loop of a sum that is written out; in a product, or a sum over an axis, it would
    widen the kernel first, and without the barrier before the loop that this may be part of.
    S words summed over, U of them written out, R the result.
    """
    S = len(y)
    U = math.gcd(S, min(16, S // 8))
    x, y = jax.lax.optimization_barrier((x, y))
    x, y = x.reshape(2, S // U, U, 1), y.reshape(S // U, U, -1)
    summands = []
    for u in range(U):
        summands += [a * b for a, b in zip(x[:, :, u], unpack(y[:, u]), strict=True)]
    sums = jax.lax.optimization_barrier(sum(summands[1:], summands[0]))
    return jnp.ones(len(sums), sums.dtype) @ sums


class Linear(nnx.Module):
    """An affine map written as an einsum: `BTD,DNH->BTNH` maps the embedding to heads."""

    def __init__(
        self,
        equation: str,
        *shape: int,
        bias: bool,
        rngs: nnx.Rngs,
        std: float = INIT_STD,
        init: str = "gpt2",
    ):
        self.equation = equation
        axes, out_axes = equation.split(",")[1].split("->")
        kept = [(n, a) for n, a in zip(shape, axes, strict=True) if a in out_axes]
        bias_shape, bias_axes = [n for n, _ in kept], "".join(a for _, a in kept)
        if init == "torch":
            uniform = partial(torch_uniform, math.prod(shape) // math.prod(bias_shape), rngs)
            kernel = uniform(shape)
            start = uniform(bias_shape) if bias else None
        else:
            kernel = std * jax.random.normal(rngs.params(), shape)
            start = jnp.zeros(bias_shape) if bias else None
        self.kernel = nnx.Param(kernel, axes=axes)
        self.bias = None if start is None else nnx.Param(start, axes=bias_axes)

    def __call__(self, x: jax.Array) -> jax.Array:
        y: Any = contract(self.equation, x, in_type(self.kernel[...], x.dtype))
        y = checkpoint_name(y, LINEAR)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


def in_type(kernel: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The kernel to compute with; one that is packed stays so."""
    return kernel if kernel.dtype == jnp.uint32 else kernel.astype(dtype)


def torch_uniform(fan_in: int, rngs: nnx.Rngs, shape: Sequence[int]) -> jax.Array:
    """What PyTorch's Linear starts with, kernel and bias: uniform up to 1/sqrt(fan_in)."""
    bound = fan_in**-0.5
    return jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)


class Table(nnx.Module):
    """One row of width D for each token or position; with `fan_in` it starts as a Linear does."""

    def __init__(
        self, axes: str, *shape: int, rngs: nnx.Rngs, std: float = INIT_STD, fan_in: int = 0
    ):
        normal = lambda: std * jax.random.normal(rngs.params(), shape)
        kernel = torch_uniform(fan_in, rngs, shape) if fan_in else normal()
        self.kernel = nnx.Param(kernel, axes=axes)


class Norm(nnx.Module):
    """LayerNorm (Ba et al. 2016), RMSNorm (Zhang & Sennrich 2019) of the last axis, or nothing.

    Statistics are float32 at least, whatever the type of the input.
    """

    def __init__(self, c: ModelConfig, width: int, axes: str = "D", *, kind: str = ""):
        self.kind = kind or c.norm
        has_bias = c.bias and self.kind == "layernorm"
        if self.kind == "none":
            return
        self.scale = nnx.Param(jnp.ones(width), axes=axes)
        self.bias = nnx.Param(jnp.zeros(width), axes=axes) if has_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.kind == "none":
            return x
        y: Any = normalize(self.kind == "layernorm", x, self.scale[...])
        return (y if self.bias is None else y + self.bias[...]).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def normalize(is_centered: bool, x: jax.Array, scale_D: jax.Array) -> jax.Array:
    """LayerNorm, or RMSNorm where not centered, of the last axis; float32 at least.

    The gradient is by hand for the sake of `_mean`: a CPU takes a third of the time then.
    """
    return _normalize_fwd(is_centered, x, scale_D)[0]


def _normalize_fwd(is_centered: bool, x: jax.Array, scale_D: jax.Array):
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = _mean(wide) if is_centered else jnp.zeros((), wide.dtype)
    over_std = jax.lax.rsqrt(_mean(jnp.square(wide - mean)) + NORM_EPSILON)
    return (wide - mean) * over_std * scale_D, (x, mean, over_std, scale_D)


def _normalize_bwd(is_centered: bool, saved: tuple, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, mean, over_std, scale_D = saved
    # else a GPU computes them again in each kernel, and holds arrays of float32 in between
    mean, over_std = in_memory("cuda", (mean, over_std))
    normal = (x.astype(dy.dtype) - mean) * over_std
    product = dy * normal
    removed = normal * _mean(product, scale_D) + (_mean(dy, scale_D) if is_centered else 0)
    dx = over_std * (dy * scale_D - removed)
    return dx.astype(x.dtype), product.sum(range(x.ndim - 1))


normalize.defvjp(_normalize_fwd, _normalize_bwd)


def _mean(x: jax.Array, scale_D: jax.Array | float = 1.0) -> jax.Array:
    """The mean of x * scale over the last axis, which stays.

    XLA:CPU adds up a row number by number, but has fast products, which the barrier keeps it from
    turning into such sums. Where it splits rows over TPUs, a sum that is divided takes less memory;
    a GPU that decodes has fewer kernels without the division.
    """
    share_D = jnp.broadcast_to(scale_D / x.shape[-1], x.shape[-1:]).astype(x.dtype)
    return jax.lax.platform_dependent(
        x,
        share_D,
        cpu=lambda x, share_D: (x @ jax.lax.optimization_barrier(share_D))[..., None],
        tpu=lambda x, _: (x * scale_D).mean(-1, keepdims=True),
        default=lambda x, share_D: (x * share_D).sum(-1, keepdims=True),
    )


def in_memory(platform: str, x: Any) -> Any:
    """`x`, which on this platform XLA computes once, and not again in every use of it."""
    held = {platform: jax.lax.optimization_barrier}
    return jax.lax.platform_dependent(x, default=lambda x: x, **held)


def residual_std(c: ModelConfig) -> float:
    """Scaled so that the sum of all 2L branches starts with the deviation of one; GPT-2's.

    Or zero: Zhang et al. 2019, "Fixup", for residual branches in general.
    """
    return 0.0 if c.zero_init_projections else INIT_STD / math.sqrt(2 * c.n_layer)


def look_up(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """Rows of the table, [B, T, D], split as it is: over D under `fsdp`, and the batch over `data`.

    From there to `split_batch`, and back in the gradient, devices of an `fsdp` group exchange
    parts. Left to itself, XLA gathers the gradient of the whole batch on every device.
    """
    if table_VD.dtype == jnp.uint32:  # a tied one is packed as the output map, [S, V]
        return jnp.moveaxis(jnp.concatenate(unpack(table_VD[:, tokens_BT])), 0, -1)
    return _laid_out(table_VD[tokens_BT], PartitionSpec("data", None, "fsdp"))


def add_positions(x_BTD: jax.Array, table_TD: jax.Array) -> jax.Array:
    """The stream with a row of the table added at each position, in every sequence.

    For a GPU XLA lays out what is summed over 32 numbers or more so that they are neighbours. In
    the table's gradient these would be the sequences: the whole stream would have B innermost,
    and the norms' sums over D would stride. So it is summed in groups of fewer, G of them.
    """
    B, mesh = len(x_BTD), jax.sharding.get_abstract_mesh()
    shards = mesh.shape["data"] * mesh.shape["fsdp"] if _is_split() else 1

    def by_groups(x_BTD: jax.Array, table_TD: jax.Array) -> jax.Array:
        G = B // math.gcd(16, B // shards)
        rows_GTD = jax.lax.optimization_barrier(jnp.broadcast_to(table_TD, (G, *table_TD.shape)))
        return (x_BTD.reshape(G, -1, *table_TD.shape) + rows_GTD[:, None]).reshape(x_BTD.shape)

    return jax.lax.platform_dependent(x_BTD, table_TD, cuda=by_groups, default=jnp.add)


def split_batch(x_BTD: jax.Array) -> jax.Array:
    """The residual stream, split over the batch alone on the mesh that a step is traced for.

    Left to itself, XLA may split it as weights are split under `fsdp`, over D, and then every
    device computes, and sums with the others, the whole batch.
    """
    return _laid_out(x_BTD, PartitionSpec(("data", "fsdp")))


def _laid_out(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, spec) if _is_split() else x


def _is_split() -> bool:
    """Whether XLA splits arrays over the mesh that this is traced for."""
    mesh = jax.sharding.get_abstract_mesh()
    return not (mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types)
