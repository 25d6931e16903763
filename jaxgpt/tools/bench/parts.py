"""Time parts of training alone: batches, and attention.

B batch, T length, S key length, N heads, K KV heads, H head width; M micro-batches of a step.
"""

from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

import jax
import jax.numpy as jnp

from jaxgpt import sharding
from jaxgpt.config import Config, UserError
from jaxgpt.data.batches import Batches, make_resident
from jaxgpt.kernels import dot_product_attention
from jaxgpt.runtime import device
from jaxgpt.tools.bench.report import Bench, Report, call_ms, quartiles
from jaxgpt.train import TRAIN


def bench_data(b: Bench) -> Report:
    """Time batches: drawn, placed on the device, gathered."""
    c, mesh, tokens = b.config, sharding.make_mesh(b.config), b.dataset.train
    M = sharding.num_microbatches(c, mesh)
    shape_KMB = 1, M, sharding.global_batch_size(c) // M
    rows, results = [], {}
    for name, resident in ("resident", make_resident(tokens, mesh)), ("read from disk", None):
        keys = {"block_size": c.block_size, "seed": c.seed, "stream": TRAIN, "ahead": 2}
        batches = Batches(tokens, mesh, shape_KMB, resident=resident, **keys)
        steps = count()
        ms = call_ms(lambda batches=batches, steps=steps: batches.get(next(steps)))
        windows_per_s = 1000 * sharding.global_batch_size(c) / quartiles(ms)["median"]
        tokens_per_s = windows_per_s * c.block_size
        rates = {"windows_per_s": windows_per_s, "tokens_per_s": tokens_per_s}
        results[name] = {"samples_ms": ms, **rates}
        rows.append([name, f"{windows_per_s:,.0f}", f"{tokens_per_s:,.0f}"])
    headline = f"{rows[0][2]} tokens/s resident, {rows[1][2]} from disk"
    return Report(headline, ["tokens", "windows/s", "tokens/s"], rows, [], results)


def bench_attention(b: Bench) -> Report:
    """Time every back end this device can run, forward and backward, at the same tokens a batch."""
    tokens, rows, notes, results = b.config.batch_size * b.config.block_size, [], [], {}
    for backend in ("reference", "cpu", "xla", "cudnn", "splash"):
        for T in (n * b.config.block_size for n in (1, 2, 4)):
            c = b.config.replace(attention=backend, block_size=T, dropout=0.0, batch_tokens=0)
            B = max(1, tokens // T)
            b.say(f"{backend}, length {T}")
            try:
                device.choose_attention(c)
                ms = call_ms(attention_call(c, B))
            except UserError as error:
                notes.append(str(error))
                break
            except jax.errors.JaxRuntimeError as error:
                notes.append(f"{backend}, length {T}: {str(error).splitlines()[0]}")
                continue
            results[f"{backend}_{T}"] = {"batch": B, "samples_ms": ms}
            rows.append([backend, str(T), str(B), f"{quartiles(ms)['median']:.3g}"])
    at_shape = [row for row in rows if row[1] == str(b.config.block_size)]
    best = min(at_shape, key=lambda row: float(row[3]))
    headline = f"{best[0]} is fastest at the config's shape: {best[3]} ms"
    columns = ["back end", "length", "batch", "ms, forward and backward"]
    return Report(headline, columns, rows, notes, results)


def attention_call(c: Config, B: int) -> Callable[[], Any]:
    """Make a call of attention, forward and backward, on random arrays."""
    shapes = [(B, c.block_size, n, c.head_dim) for n in (c.n_head, c.kv_heads, c.kv_heads)]
    *keys, weight_key = jax.random.split(jax.random.key(0), 4)
    q_BTNH, k_BSKH, v_BSKH = map(partial(jax.random.normal, dtype=c.dtype), keys, shapes)
    weight_BTNH = jax.random.normal(weight_key, shapes[0], c.dtype)

    def loss(q, k, v) -> jax.Array:
        keys = {"causal": c.causal, "window": c.sliding_window, "backend": c.attention}
        out = dot_product_attention(q, k, v, **keys)
        return (out * weight_BTNH).astype(jnp.float32).sum()

    return partial(jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))), q_BTNH, k_BSKH, v_BSKH)
