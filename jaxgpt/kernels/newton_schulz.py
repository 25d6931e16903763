"""The orthogonal matrices nearest to given ones, for Muon (Jordan et al. 2024).

S matrices of one shape, I the shorter side, J the longer side.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

EPSILON = 1e-8


class Polynomial(NamedTuple):
    """Odd polynomials, applied one after another, which bring singular values from (0, 1] near 1.

    One of them maps X to a X + b (X X^T) X + c (X X^T)² X.
    """

    coefficients: tuple[tuple[float, float, float], ...]  # a, b, c of each iteration
    safety_factor: float = 1.0  # a matrix is divided by its Frobenius norm and by this

    def first(self, iterations: int) -> "Polynomial":
        """Return only the first iterations."""
        return self._replace(coefficients=self.coefficients[:iterations])


POLYNOMIALS = {
    "jordan": Polynomial(((3.4445, -4.7750, 2.0315),) * 5),
    # Amsel et al. 2025, "The Polar Express", for five iterations and a safety factor of 2%
    "polar_express": Polynomial(
        (
            (8.156554524902461, -22.48329292557795, 15.878769915207462),
            (4.042929935166739, -2.808917465908714, 0.5000178451051316),
            (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
            (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
            (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
        ),
        safety_factor=1.02,
    ),
}


def orthogonalize_reference(x_SIJ: jax.Array, polynomial: Polynomial) -> jax.Array:
    """Approximate the orthogonal matrix nearest to each matrix, by Newton-Schulz iterations."""
    return iterate(unit_norm(x_SIJ, polynomial), polynomial)


def iterate(x_SIJ: jax.Array, polynomial: Polynomial) -> jax.Array:
    """Apply the polynomials to matrices of at most unit norm."""
    for a, b, c in polynomial.coefficients:
        gram_SII = jnp.einsum("SIJ,SKJ->SIK", x_SIJ, x_SIJ)
        square_SII = gram_SII @ gram_SII
        x_SIJ = a * x_SIJ + (b * gram_SII + c * square_SII) @ x_SIJ
    return x_SIJ


def unit_norm(x_SIJ: jax.Array, polynomial: Polynomial) -> jax.Array:
    """Divide each matrix by its Frobenius norm, which is at least its largest singular value."""
    norm_S11 = jnp.sqrt(jnp.sum(x_SIJ * x_SIJ, axis=(1, 2), keepdims=True))
    return x_SIJ / (polynomial.safety_factor * norm_S11 + EPSILON)


def orthogonalize_bfloat16(x_SIJ: jax.Array, polynomial: Polynomial) -> jax.Array:
    """Compute `orthogonalize_reference` in bfloat16, but the norm in float32.

    The polynomials only need to bring singular values near 1 (Jordan et al. 2024).
    """
    unit_SIJ = unit_norm(x_SIJ, polynomial).astype(jnp.bfloat16)
    return iterate(unit_SIJ, polynomial).astype(x_SIJ.dtype)


def orthogonalize_cpu(x_SIJ: jax.Array, polynomial: Polynomial) -> jax.Array:
    """Compute `orthogonalize_reference` one matrix at a time, and iterate on I x I matrices.

    The Gram matrix X X^T and all polynomials of it commute. So the iterations multiply only such
    matrices, and the last product applies them to X (docs/performance.md, "Muon on Gram matrices").
    """
    _, I, J = x_SIJ.shape
    if I == J:  # Gram matrices save nothing
        return jax.lax.map(lambda x_IJ: orthogonalize_reference(x_IJ[None], polynomial)[0], x_SIJ)

    def one(x_IJ: jax.Array) -> jax.Array:
        gram_II = x_IJ @ x_IJ.T
        total_II = identity_II = jnp.eye(I, dtype=x_IJ.dtype)
        for i, (a, b, c) in enumerate(polynomial.coefficients):
            factor_II = a * identity_II + b * gram_II + c * gram_II @ gram_II
            total_II = factor_II @ total_II if i else factor_II
            gram_II = factor_II @ (factor_II @ gram_II)  # of the next X
        return total_II @ x_IJ

    return jax.lax.map(one, unit_norm(x_SIJ, polynomial))
