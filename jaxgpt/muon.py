"""Muon (Jordan et al. 2024) and NorMuon (Li et al. 2025) as optax transformations.

A parameter holds one or more matrices. S is the number of matrices of one shape, I their shorter
side and J their longer side.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec
from optax.contrib import MuonState

from jaxgpt import kernels
from jaxgpt.kernels.newton_schulz import EPSILON, Polynomial
from jaxgpt.kernels.platform import is_split

MOMENTUM = 0.95
FIRST_MOMENTUM = 0.85  # where a warm-up of the momentum begins
MUON_RMS = 0.2  # of an update's elements, about AdamW's (Liu et al. 2025, "Muon is Scalable")


class MatrixAxes(NamedTuple):
    """The axes of a parameter that are the inputs and the outputs of its matrices."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def matrix_axes(letters: dict, kinds: dict, *, per_head: bool) -> dict:
    """Return the `MatrixAxes` of each parameter of kind "muon"; `optax.MaskedNode` for others.

    One side of a matrix is D, and the other side is heads or hidden units. Layers (L) and the parts
    of a fused map (C: query, key and value) are separate matrices. With `per_head`, heads (N, K)
    are separate too. Any other letter joins the other side.
    """
    apart = "LCNK" if per_head else "LC"

    def sides_of(letters: str, kind: str) -> MatrixAxes | optax.MaskedNode:
        if kind != "muon":
            return optax.MaskedNode()
        width = letters.index("D")  # the first, if both sides are D
        other = tuple(i for i, letter in enumerate(letters) if i != width and letter not in apart)
        inputs, outputs = sorted([(width,), other])  # a kernel's input axes come first
        return MatrixAxes(inputs, outputs)

    return jax.tree.map(sides_of, letters, kinds)


def to_matrices(x: jax.Array, sides: MatrixAxes) -> jax.Array:
    """Return the matrices of a parameter, [S, I, J], with the shorter side first."""
    order, sizes = layout(x.shape, sides)
    return x.transpose(order).reshape(-1, *sizes)


def from_matrices(x_SIJ: jax.Array, shape: tuple[int, ...], sides: MatrixAxes) -> jax.Array:
    """Return the parameter of this shape whose `to_matrices` are given."""
    order, _ = layout(shape, sides)
    inverse = np.argsort(order).tolist()
    return x_SIJ.reshape([shape[i] for i in order]).transpose(inverse)


def layout(shape: tuple[int, ...], sides: MatrixAxes) -> tuple[tuple[int, ...], tuple[int, int]]:
    """Return the order of axes that puts the shorter side before the longer, and both sizes."""
    size = lambda side: math.prod(shape[i] for i in side)
    shorter, longer = sorted(sides, key=size)
    batch = tuple(i for i in range(len(shape)) if i not in (*shorter, *longer))
    return (*batch, *shorter, *longer), (size(shorter), size(longer))


# ---- the update ------------------------------------------------------------------------------


def scale_by_muon(
    all_sides: dict, polynomial: Polynomial, momentum_warmup: int
) -> optax.GradientTransformation:
    """Return the orthogonalised Nesterov momentum of each matrix.

    The momentum rises from 0.85 to 0.95 over `momentum_warmup` steps.
    """

    def init(params: Any) -> MuonState:
        # optax's Muon, which wrote older checkpoints, has coefficients in its state
        coefficients = jnp.array(polynomial.coefficients[0])
        zeros = jax.tree.map(jnp.zeros_like, params)
        return MuonState(jnp.zeros((), jnp.int32), zeros, coefficients)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, MuonState]:
        progress = jnp.minimum(1, (state.count + 1) / max(1, momentum_warmup))
        beta = FIRST_MOMENTUM + progress * (MOMENTUM - FIRST_MOMENTUM)
        mix = lambda mu, g: beta * mu + (1 - beta) * g
        mu = jax.tree.map(mix, state.mu, updates)
        ahead = jax.tree.map(mix, mu, updates)  # Nesterov momentum
        updates = orthogonalize_matrices(ahead, all_sides, polynomial)
        return updates, MuonState(state.count + 1, mu, state.ns_coeffs)

    return optax.GradientTransformation(init, update)


def orthogonalize_matrices(updates: Any, all_sides: Any, polynomial: Polynomial) -> Any:
    """Orthogonalise each matrix of a tree; those of one shape are stacked and computed at once."""
    leaves, structure = jax.tree.flatten(updates)
    all_sides = structure.flatten_up_to(all_sides)
    matrices = list(map(to_matrices, leaves, all_sides))
    same_shape = defaultdict(list)
    for i, x_SIJ in enumerate(matrices):
        same_shape[x_SIJ.shape[1:]].append(i)
    orthogonalize = over_data(partial(kernels.orthogonalize, polynomial=polynomial))
    for members in same_shape.values():
        ends = np.cumsum([len(matrices[i]) for i in members])
        stacked_SIJ = orthogonalize(jnp.concatenate([matrices[i] for i in members]))
        for i, x_SIJ in zip(members, jnp.split(stacked_SIJ, ends[:-1]), strict=True):
            matrices[i] = x_SIJ
    shapes = [x.shape for x in leaves]
    return structure.unflatten(map(from_matrices, matrices, shapes, all_sides))


def over_data(function: Callable) -> Callable:
    """Return `function` so that each device on `data` computes an equal share of the S matrices."""
    if not is_split("data"):
        return function
    # a matrix is whole on every device, or as the axes fsdp and tensor split it
    side = PartitionSpec.UNCONSTRAINED if is_split("fsdp") or is_split("tensor") else None
    share, whole = PartitionSpec("data"), PartitionSpec(None, side, side)

    def shared(x_SIJ: jax.Array) -> jax.Array:
        count, devices = len(x_SIJ), jax.sharding.get_abstract_mesh().shape["data"]
        x_SIJ = jnp.pad(x_SIJ, ((0, -count % devices), (0, 0), (0, 0)))
        # otherwise XLA would split the momentum over `data` too, and exchange pieces of matrices
        x_SIJ = jax.lax.with_sharding_constraint(x_SIJ, whole)
        mapped = jax.shard_map(
            function, in_specs=share, out_specs=share, axis_names={"data"}, check_vma=False
        )
        y_SIJ = mapped(x_SIJ)
        return jax.lax.with_sharding_constraint(y_SIJ, whole)[:count]

    return shared


def consistent_rms(all_sides: dict) -> optax.GradientTransformation:
    """Scale orthogonal updates to the RMS of AdamW's, so that both share a learning rate."""

    def scale(update: jax.Array, sides: MatrixAxes) -> jax.Array:
        _, (_, longer) = layout(update.shape, sides)
        return MUON_RMS * math.sqrt(longer) * update  # orthogonal: its RMS is 1 / sqrt(longer)

    return optax.stateless(lambda updates, _: jax.tree.map(scale, updates, all_sides))


class NeuronState(NamedTuple):
    """NorMuon's second moment: the mean square of an update's elements, per output neuron."""

    nu: Any


def normalize_neurons(all_sides: dict, b2: float) -> optax.GradientTransformation:
    """Divide each output neuron's update by its running RMS, and scale the whole to MUON_RMS.

    Li et al. 2025, "NorMuon". A bias correction would cancel, because the whole is scaled.
    """

    def mean_square(update: jax.Array, sides: MatrixAxes) -> jax.Array:
        return jnp.mean(update * update, axis=sides.inputs, keepdims=True)

    def init(params: Any) -> NeuronState:
        zeros = lambda param, sides: jnp.zeros_like(mean_square(param, sides))
        return NeuronState(jax.tree.map(zeros, params, all_sides))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, NeuronState]:
        moment = lambda nu, u, sides: b2 * nu + (1 - b2) * mean_square(u, sides)
        nu = jax.tree.map(moment, state.nu, updates, all_sides)

        def scale(update: jax.Array, nu: jax.Array, sides: MatrixAxes) -> jax.Array:
            update = update / (jnp.sqrt(nu) + EPSILON)
            both = sides.inputs + sides.outputs
            rms = jnp.sqrt(jnp.mean(update * update, axis=both, keepdims=True))
            return MUON_RMS * update / (rms + EPSILON)

        return jax.tree.map(scale, updates, nu, all_sides), NeuronState(nu)

    return optax.GradientTransformation(init, update)
