"""The operations that the core calls, and the one table of their implementations per platform.

`kernels.NAME(...)` calls the row of `TABLE` for NAME and for `platform.current_platform`, while a
function is traced. To find the code of an operation, search its name in `TABLE`. A file begins
with a plain reference, or names it. The reference documents the operation, and the tests compare
the variants with it. Faster variants follow; each has a row in docs/performance.md.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import jax

from jaxgpt.kernels import (
    accumulate,
    activation,
    adamw,
    attention,
    cross_entropy,
    decode,
    embedding,
    linear,
    newton_schulz,
    norm,
)
from jaxgpt.kernels.adamw import ADAM_EPSILON as ADAM_EPSILON
from jaxgpt.kernels.platform import current_platform

ANY = "any platform without a row of its own"

TABLE: dict[tuple[str, str], Callable[..., Any]] = {
    ("sum_over_devices", ANY): accumulate.sum_over_devices_reference,
    ("sum_over_devices", "cpu"): accumulate.sum_over_devices_cpu,
    ("adam_direction", ANY): adamw.adam_direction_folded,
    ("adam_direction", "cpu"): adamw.adam_direction_cpu,
    ("add_positions", ANY): embedding.add_positions_reference,
    ("add_positions", "gpu"): embedding.add_positions_gpu,
    ("attention_cpu", ANY): attention.attention_cpu,
    ("attention_cudnn", ANY): attention.attention_cudnn,
    ("attention_flash", ANY): attention.attention_flash,
    ("attention_reference", ANY): attention.attention_reference,
    ("attention_reference", "gpu"): attention.attention_saved_weights,
    ("attention_splash", ANY): attention.attention_splash,
    ("attention_xla", ANY): attention.attention_xla,
    ("residual_and_norm", ANY): norm.residual_and_norm_reference,
    ("residual_and_norm", "gpu"): norm.residual_and_norm_gpu,
    ("compute_dtype", ANY): decode.compute_dtype_reference,
    ("compute_dtype", "cpu"): decode.compute_dtype_cpu,
    ("embed", ANY): embedding.embed_reference,
    ("embed", "cpu"): embedding.embed_cpu,
    ("folds_gains", ANY): norm.folds_gains_reference,
    ("folds_gains", "gpu"): norm.folds_gains_gpu,
    ("gelu_tanh", ANY): activation.gelu_tanh_reference,
    ("gelu_tanh", "gpu"): activation.gelu_tanh_gpu,
    ("linear_map", ANY): linear.linear_in_order,
    ("linear_map", "cpu"): linear.linear_cpu,
    ("linear_parts", ANY): linear.linear_parts_reference,
    ("linear_parts", "cpu"): linear.linear_parts_cpu,
    ("linear_parts", "gpu"): linear.linear_parts_gpu,
    ("max_replicas", ANY): decode.max_replicas_reference,
    ("max_replicas", "cpu"): decode.max_replicas_cpu,
    ("normalize", ANY): norm.norm_reference,
    ("normalize", "cpu"): norm.norm_cpu,
    ("normalize", "gpu"): norm.norm_gpu,
    ("normalize", "tpu"): norm.norm_tpu,
    ("orthogonalize", ANY): newton_schulz.orthogonalize_bfloat16,
    ("orthogonalize", "cpu"): newton_schulz.orthogonalize_cpu,
    ("token_losses", ANY): cross_entropy.token_losses_from_result,
    ("token_losses", "cpu"): cross_entropy.token_losses_reference,
    ("token_losses", "gpu"): cross_entropy.token_losses_gpu,
}


def __getattr__(operation: str) -> Callable[..., Any]:
    """Return an operation of the table for the current platform, as in `kernels.normalize`.

    Raises `AttributeError` for a name that is not in the table.
    """
    if (operation, ANY) not in TABLE:
        raise AttributeError(f"module {__name__!r} has no attribute {operation!r}")
    return TABLE.get((operation, current_platform()), TABLE[operation, ANY])


def without(operation: str, platform: str) -> AbstractContextManager[None]:
    """Let a platform use the row ANY of an operation, to measure what its own row gains."""
    return _replaced(operation, platform, TABLE[operation, ANY])


@contextmanager
def recorded_attention() -> Iterator[list[jax.Array]]:
    """Record the weights of reference attention, [B, N, T, S] float32 at least, call by call.

    Attention with `backend="reference"` is recorded while a function is traced. The arrays belong
    to that trace, so a function under `jax.jit` must return them.
    """
    weights: list[jax.Array] = []

    def attend(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, dropout, options) -> jax.Array:
        weights.append(attention.attention_weights(q_BTNH, k_BSKH, segment_ids_BT, options))
        inputs = q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, dropout
        return attention.attention_reference(*inputs, options)

    with _replaced("attention_reference", current_platform(), attend):
        yield weights


@contextmanager
def _replaced(operation: str, platform: str, function: Callable) -> Iterator[None]:
    """Put `function` into the table for a platform."""
    before = TABLE.get((operation, platform))
    TABLE[operation, platform] = function
    try:
        yield
    finally:
        if before is None:
            del TABLE[operation, platform]
        else:
            TABLE[operation, platform] = before


def dot_product_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    causal: bool,
    window: int = 0,
    segment_ids_BT: jax.Array | None = None,
    dropout: Callable | None = None,
    backend: str = "reference",
    scale: float | None = None,
) -> jax.Array:
    """Compute softmax attention with the implementation `backend` -> [B, T, N, H].

    q, k and v have one dtype and one head dim, and so has the result. N is a multiple of K.
    `causal` masks keys after the query; the first query and the first key both have position 0.
    `window`, which needs `causal`, is the number of keys that a query attends to, its own included;
    0 means all. `segment_ids_BT` masks keys of other segments, and needs T = S (not for cudnn).
    `dropout` acts on the attention weights; it must be a `BoundDropout`, or for some back ends any
    linear function that is a pytree. `backend` is cpu, cudnn, flash, reference, splash or xla.
    Scores are multiplied by `scale`, by default 1 / sqrt(H). Raises `ValueError` for a window that
    is not causal.
    """
    if window and not causal:
        expected = "expected causal=True, or window=0"
        raise ValueError(f"window={window}: attends to earlier keys only; {expected}")
    T, S, H = q_BTNH.shape[1], k_BSKH.shape[1], q_BTNH.shape[-1]
    options = attention.AttentionOptions(causal, window, H**-0.5 if scale is None else scale)
    attend = _select_attention(backend, T, S, dropout)
    return attend(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, dropout, options)


def _select_attention(backend: str, T: int, S: int, dropout: Callable | None) -> Callable:
    """Return the implementation `backend`, or the reference if the backend cannot be used.

    Most flash kernels have no dropout of the weights, and some implementations need certain
    lengths.
    """
    fits_lengths = {"cpu": T == S, "flash": T == S, "splash": T == S and T % 128 == 0}
    lacks_dropout = backend in ("xla", "cudnn", "splash")
    if not fits_lengths.get(backend, True) or (lacks_dropout and dropout is not None):
        backend = "reference"
    return __getattr__(f"attention_{backend}")
