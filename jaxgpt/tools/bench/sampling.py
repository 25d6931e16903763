"""Time sampling, alone or in alternation with nanoGPT; time batches and attention, alone.

B batch, T length, S key length, N heads, K key-value heads, H head dim, M micro-batches per step.
"""

import math
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxgpt import model
from jaxgpt.config import Config, UserError
from jaxgpt.data import batch_size
from jaxgpt.data.batches import Batches, make_resident
from jaxgpt.kernels import dot_product_attention
from jaxgpt.runtime import device
from jaxgpt.runtime.mesh import make_mesh
from jaxgpt.sample import CHUNK, Sampler, SamplingParams
from jaxgpt.tools.bench.nanogpt import NanoGPTError
from jaxgpt.tools.bench.report import Bench, Report, call_ms, format_ratios, interleaved, quartiles
from jaxgpt.train import TRAIN

NEW_TOKENS = 500
LONG_S = 5.0  # if a batch takes longer, larger batches are skipped
OPTIONS = {"temperature": 0.8, "top_k": 200}


def bench_sampling(b: Bench) -> Report:
    """Time sampling from untrained weights, with prompts of one token.

    On a CPU, one sequence is also sampled with weights in bfloat16 if they can be packed.
    """
    config, _ = device.resolve_auto(b.config.replace(attention="auto", dropout=0.0))
    samplers, bandwidth = make_samplers(config), read_bandwidth()
    notes = [
        f"{NEW_TOKENS} new tokens per sequence; the first {CHUNK} tokens arrive together",
        "of the bandwidth: bytes of weights and KV cache read per token, relative to the "
        f"{bandwidth / 1e9:.1f} GB/s of a large array in memory; caches can exceed 100%",
    ]
    rows, results = [], {"read_bytes_per_s": bandwidth, "new_tokens": NEW_TOKENS}
    for kind, sampler in samplers.items():
        for batch in (1,) if kind else (1, 8, 64):
            b.say(f"{batch} sequences {kind}")
            try:
                generate(sampler, batch)  # compiles
                times = [generate(sampler, batch) for _ in range(b.repeats)]
            except jax.errors.JaxRuntimeError as error:
                if batch == 1 or not device.is_out_of_memory(error):
                    raise
                notes.append(f"{batch} sequences do not fit in this device's memory")
                break
            first, whole = np.median(times, axis=0).tolist()
            rate = batch * NEW_TOKENS / whole
            share = decode_bytes(sampler, batch) * NEW_TOKENS / whole / bandwidth
            name = f"{batch} {kind}".strip()
            found = {"samples_s": times, "tokens_per_s": rate}
            found |= {"first_s": first, "bandwidth_share": share}
            results["batch_" + name.replace(" ", "_")] = found
            rows.append([name, f"{1000 * first:.1f}", f"{rate:,.0f}", f"{share:.1%}"])
            if whole > LONG_S:
                break
    headline = f"{results['batch_1']['tokens_per_s']:,.0f} tokens/s at batch 1"
    try:
        compared = compare(b, samplers) if b.nanogpt else {}
    except NanoGPTError as error:
        notes.append(f"nanoGPT: {error}")
        compared = {}
    for name, found in compared.items():
        results[f"nanogpt_{name}"] = found
        notes.append(format_ratios(f"batch 1, {name}: nanoGPT", found))
        headline += f"; {found['ratio']:.1f}x nanoGPT ({name})"
    if b.nanogpt and config.block_size <= NEW_TOKENS:
        notes.append("past block_size, nanoGPT slides by one token, as overflow=slide does")
    if len(samplers) > 1:
        notes.append("bfloat16: only jaxgpt's weights; the rest, and nanoGPT, is float32")
    columns = ["batch", "ms to the first tokens", "tokens/s", "of the bandwidth"]
    return Report(headline, columns, rows, notes, results)


def make_samplers(config: Config) -> dict[str, Sampler]:
    """Return the config's sampler, named "", and on a CPU one with weights in bfloat16.

    On an accelerator it uses one device.
    """
    most_devices = sys.maxsize if device.is_cpu() else 1
    params = jax.jit(partial(model.init_params, config))(jax.random.key(config.seed))
    samplers = {"": Sampler(config, most_devices=most_devices).load(params)}
    if device.is_cpu():
        narrow = Sampler(config.replace(dtype="bfloat16")).load(params)
        if any(p.dtype == jnp.uint32 for p in jax.tree.leaves(narrow.single_params)):  # packed
            samplers["bfloat16"] = narrow
    return samplers


def generate(sampler: Sampler, batch: int, overflow: str = "truncate") -> tuple[float, float]:
    """Generate `NEW_TOKENS`; return the seconds until the first tokens, and until the last."""
    prompts = [np.zeros(1, np.int32)] * batch
    options: Any = {"sampling": SamplingParams(**OPTIONS), "overflow": overflow}
    began = time.perf_counter()
    chunks = sampler.generate(prompts, max_new_tokens=NEW_TOKENS, **options)
    next(chunks)
    first = time.perf_counter() - began
    list(chunks)
    return first, time.perf_counter() - began


def decode_bytes(sampler: Sampler, batch: int) -> float:
    """Return the mean bytes read to decode one token per sequence: weights, keys and values."""
    config = sampler.config
    params = sampler.single_params if batch == 1 else sampler.params
    looked_up = {"pos_embed"} if config.tie_embeddings else {"pos_embed", "embed"}
    read = {name: params[name] for name in params.keys() - looked_up}
    weights = sum(p.nbytes for p in jax.tree.leaves(read))
    graphdef, shapes, _ = model.abstract_model(config)
    if not hasattr(nnx.merge(graphdef, shapes), "init_cache"):
        return weights
    T = config.block_size
    half = math.ceil(T / 2)  # past block_size, a sequence restarts from its last half
    lengths = [n if n <= T else T // 2 + 1 + (n - T - 1) % half for n in range(1, NEW_TOKENS + 1)]
    width = 2 * config.n_layer * config.kv_heads * config.head_dim
    return weights + batch * width * float(np.mean(lengths)) * jnp.dtype(config.dtype).itemsize


def compare(b: Bench, samplers: dict[str, Sampler]) -> dict[str, dict[str, Any]]:
    """Time every sampler and nanoGPT in turn; past block_size, the first in both `overflow`s."""
    nanogpt: Any = b.nanogpt
    sampler = samplers[""]
    runs = {kind or "truncate": partial(generate, s, 1) for kind, s in samplers.items()}
    if sampler.config.block_size <= NEW_TOKENS:
        runs["slide"] = partial(generate, sampler, 1, "slide")
    nanogpt.load(sampler.config, b.dataset.train, jax.device_get(sampler.params), "eager")
    b.say(f"jaxgpt ({', '.join(runs)}) and nanoGPT in turn")
    turns = [lambda run=run: run()[1] for run in runs.values()]
    other = lambda: nanogpt.ask("sample", prompt=[0], tokens=NEW_TOKENS, **OPTIONS)["seconds"]
    for warm_up in (*turns, other):
        warm_up()
    return dict(zip(runs, interleaved(turns, other, b.repeats), strict=True))


def read_bandwidth() -> float:
    """Return the bytes per second at which the device, or all cores together, read an array."""
    if device.is_cpu():
        x = np.ones((min(device.cores(), 32), 1 << 25), np.float32)  # at most 4 GiB
        with ThreadPoolExecutor(len(x)) as pool:
            ms = call_ms(lambda: list(pool.map(np.max, x)))
    else:
        x = jnp.ones(1 << 28, jnp.float32)
        ms = call_ms(partial(jax.jit(jnp.max), x))
    return x.nbytes / min(ms) * 1000


def bench_data(b: Bench) -> Report:
    """Time making batches, from tokens on the device and from tokens on disk."""
    c, mesh, data = b.config, make_mesh(b.config), b.dataset.train
    M = batch_size.num_microbatches(c, mesh)
    shape_UMB = 1, M, batch_size.global_batch_size(c) // M
    rows, results = [], {}
    for name, resident in ("resident", make_resident(data, mesh)), ("read from disk", None):
        keys = {"block_size": c.block_size, "seed": c.seed, "stream": TRAIN, "ahead": 2}
        batches, steps = Batches(data, mesh, shape_UMB, resident=resident, **keys), count()
        make_batch = lambda batches=batches, steps=steps: batches.get(next(steps))
        ms = call_ms(make_batch, b.repeats)
        windows = 1000 * batch_size.global_batch_size(c) / quartiles(ms)["median"]
        tokens = windows * c.block_size
        results[name] = {"samples_ms": ms, "windows_per_s": windows, "tokens_per_s": tokens}
        rows.append([name, f"{windows:,.0f}", f"{tokens:,.0f}"])
    headline = f"{rows[0][2]} tokens/s resident, {rows[1][2]} from disk"
    return Report(headline, ["tokens", "windows/s", "tokens/s"], rows, [], results)


def bench_attention(b: Bench) -> Report:
    """Time every attention back end, forward and backward, at three lengths and equal tokens."""
    tokens = b.config.batch_size * b.config.block_size
    rows, notes, results = [], [], {}
    for backend in ("reference", "cpu", "xla", "cudnn", "flash", "splash"):
        for T in (n * b.config.block_size for n in (1, 2, 4)):
            c = b.config.replace(attention=backend, block_size=T, dropout=0.0, batch_tokens=0)
            B = max(1, tokens // T)
            b.say(f"{backend}, length {T}")
            try:
                device.choose_attention(c)
                ms = call_ms(attention_call(c, B), b.repeats)
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
    headline = f"{best[0]} is the fastest at the config's shape: {best[3]} ms"
    columns = ["back end", "length", "batch", "ms, forward and backward"]
    return Report(headline, columns, rows, notes, results)


def attention_call(c: Config, B: int) -> Callable[[], Any]:
    """Return a call that computes attention and its gradients for B random sequences."""
    shapes = [(B, c.block_size, n, c.head_dim) for n in (c.n_head, c.kv_heads, c.kv_heads)]
    *keys, weight_key = jax.random.split(jax.random.key(0), 4)
    q_BTNH, k_BSKH, v_BSKH = map(partial(jax.random.normal, dtype=c.dtype), keys, shapes)
    weight_BTNH = jax.random.normal(weight_key, shapes[0], c.dtype)

    def loss(q, k, v) -> jax.Array:
        keys = {"causal": c.causal, "window": c.sliding_window, "backend": c.attention}
        out = dot_product_attention(q, k, v, **keys)
        return (out * weight_BTNH).astype(jnp.float32).sum()

    return partial(jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))), q_BTNH, k_BSKH, v_BSKH)
