"""Time sampling, jaxgpt alone or in turn with nanoGPT."""

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt import model
from jaxgpt.config import Config
from jaxgpt.runtime import device
from jaxgpt.sample import CHUNK, Sampler, SamplingParams
from jaxgpt.tools.bench.report import Bench, Report, call_ms, format_ratios, interleaved, quartiles

NEW_TOKENS = 500
LONG_S = 5.0  # for one sequence; then larger batches are left out
OPTIONS = {"temperature": 0.8, "top_k": 200}


def bench_sampling(b: Bench) -> Report:
    """Time sampling from fresh weights, with prompts of one token each.

    A CPU samples one sequence again with weights in bfloat16, where that differs.
    """
    config, _ = device.resolve_auto(b.config.replace(attention="auto", dropout=0.0))
    samplers, bandwidth = make_samplers(config), read_bandwidth()
    rows, results = [], {"read_bytes_per_s": bandwidth, "new_tokens": NEW_TOKENS}
    for kind, sampler in samplers.items():
        for batch in (1,) if kind else (1, 8, 64):
            b.say(f"{batch} sequences {kind}")
            generate(sampler, batch)  # compiles
            times = [generate(sampler, batch) for _ in range(b.repeats)]
            first, whole = (quartiles(list(x))["median"] for x in zip(*times, strict=True))
            rate = batch * NEW_TOKENS / whole
            share = decode_bytes(sampler, batch) * NEW_TOKENS / whole / bandwidth
            found = {"samples_s": times, "tokens_per_s": rate}
            found |= {"first_s": first, "bandwidth_share": share}
            results["_".join(filter(None, ("batch", str(batch), kind)))] = found
            name = f"{batch} {kind}".strip()
            rows.append([name, f"{1000 * first:.1f}", f"{rate:,.0f}", f"{share:.1%}"])
            if whole > LONG_S:
                break
    notes = [
        f"{NEW_TOKENS} new tokens a sequence; the first ones come as a chunk of {CHUNK}",
        "of the bandwidth: weights and KV cache read for a token, against the "
        f"{bandwidth / 1e9:.1f} GB/s of a large array in memory; a cache may give more",
    ]
    headline = f"{results['batch_1']['tokens_per_s']:,.0f} tokens/s at batch 1"
    for name, found in (compare(b, samplers) if b.nanogpt else {}).items():
        results[f"nanogpt_{name}"] = found
        notes.append(format_ratios(f"batch 1, {name}: nanoGPT", found))
        headline += f"; {found['ratio']:.1f}x nanoGPT ({name})"
    if b.nanogpt and config.block_size <= NEW_TOKENS:
        notes.append("past block_size, nanoGPT slides by a token as overflow=slide does")
    if len(samplers) > 1:
        notes.append("bfloat16: jaxgpt's weights; all else is float32, as nanoGPT is on a CPU")
    columns = ["batch", "ms to the first tokens", "tokens/s", "of the bandwidth"]
    return Report(headline, columns, rows, notes, results)


def make_samplers(config: Config) -> dict[str, Sampler]:
    """Make the config's sampler, named "", and on a CPU one with weights in bfloat16."""
    params = jax.jit(partial(model.init_params, config))(jax.random.key(config.seed))
    samplers = {"": Sampler(config).load(params)}
    if device.is_cpu():
        narrow = Sampler(config.replace(dtype="bfloat16")).load(params)
        if any(p.dtype == jnp.uint32 for p in jax.tree.leaves(narrow.row_params)):  # packed
            samplers["bfloat16"] = narrow
    return samplers


def generate(sampler: Sampler, batch: int, overflow: str = "truncate") -> tuple[float, float]:
    """Time a sampler -> the seconds until its first tokens, and until its last."""
    prompts, params = [np.zeros(1, np.int32)] * batch, SamplingParams(**OPTIONS)
    began = time.perf_counter()
    chunks = sampler.generate(prompts, max_new_tokens=NEW_TOKENS, params=params, overflow=overflow)
    next(chunks)
    first = time.perf_counter() - began
    for _ in chunks:
        pass
    return first, time.perf_counter() - began


def decode_bytes(sampler: Sampler, batch: int) -> float:
    """Count what decoding one token per sequence reads: weights, and the keys and values so far."""
    c, params = sampler.config, sampler.row_params if batch == 1 else sampler.params
    weights = sum(p.nbytes for p in jax.tree.leaves({**params, "pos_embed": None}))
    T = c.block_size
    lengths = [n if n <= T else T // 2 + (n - T) % -(-T // 2) for n in range(1, NEW_TOKENS + 1)]
    width = 2 * c.n_layer * c.kv_heads * c.head_dim
    return weights + batch * width * float(np.mean(lengths)) * jnp.dtype(c.dtype).itemsize


def compare(b: Bench, samplers: dict[str, Sampler]) -> dict[str, dict[str, Any]]:
    """Time every sampler and nanoGPT in turn, the first in both ways past `block_size`."""
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
    """Time reading a large array -> bytes per second of the device, or of all cores together."""
    if device.is_cpu():
        parts = np.ones((device.cores(), 1 << 25), np.float32)
        with ThreadPoolExecutor(len(parts)) as pool:
            ms = call_ms(lambda: list(pool.map(np.max, parts)))
        return parts.nbytes / min(ms) * 1000
    x = jnp.ones(1 << 28, jnp.float32)
    return x.nbytes / min(call_ms(partial(jax.jit(jnp.max), x))) * 1000
