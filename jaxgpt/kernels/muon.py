"""The matrices that Muon orthogonalises, and the scale of its updates (Jordan et al. 2024)."""

import math

import jax
import optax
from optax.contrib import MuonDimensionNumbers

MUON_RMS = 0.2  # of an update's elements, about AdamW's (Liu et al. 2025, "Muon is Scalable")


def matrix_axes(letters: dict, kinds: dict) -> dict:
    """Return the input and output axes of each parameter of kind "muon"; a blank for others.

    D is one side of the matrix; heads or hidden units are the other side. Each layer (L) and each
    part of a fused map (C: query, key, value) is a matrix of its own, as it is when not fused.
    """

    def axes(letters: str, kind: str) -> MuonDimensionNumbers | optax.MaskedNode:
        if kind != "muon":
            return optax.MaskedNode()
        width = (letters.index("D"),)
        other = tuple(i for i, letter in enumerate(letters) if letter not in "LCD")
        reduction, output = sorted((width, other))  # a kernel's input axes come first
        return MuonDimensionNumbers(reduction, output)

    return jax.tree.map(axes, letters, kinds)


def consistent_rms(axes: dict) -> optax.GradientTransformation:
    """Scale orthogonal updates to the RMS of AdamW's, so that both share a learning rate."""

    def scale(update: jax.Array, sides: tuple[tuple[int, ...], ...]) -> jax.Array:
        longer = max(math.prod(update.shape[i] for i in side) for side in sides)
        return MUON_RMS * math.sqrt(longer) * update

    return optax.stateless(lambda updates, _: jax.tree.map(scale, updates, axes))
