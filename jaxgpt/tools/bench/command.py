"""`jaxgpt bench`: timed training, sampling, data and attention, alone or in turn with nanoGPT.

B batch, T length, S key length, N heads, K KV heads, H head width; M micro-batches of a step.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from jaxgpt import model, sharding
from jaxgpt.attention import attend
from jaxgpt.config import Config, UserError
from jaxgpt.data.batches import Batches, make_resident
from jaxgpt.data.prepare import find_dataset
from jaxgpt.data.tokens import SPLITS, Dataset, TokenSplit, is_prepared
from jaxgpt.runtime import device
from jaxgpt.runtime.config_file import load_config_file
from jaxgpt.sample import CHUNK, Sampler, SamplingParams
from jaxgpt.tools.bench.nanogpt import (
    NanoGPT,
    NanoGPTError,
    check_comparable,
    format_ratios,
    interleaved,
)
from jaxgpt.tools.bench.training import Bench, Report, quartiles, train
from jaxgpt.train import TRAIN

NEW_TOKENS = 500
LONG_S = 5.0  # for one sequence; then larger batches are left out
MOST_TOKENS = 1 << 24  # of a dataset that a benchmark looks at

BABY = Config(
    dataset="shakespeare_char",
    gradient_accumulation_steps=1,
    batch_size=64,
    block_size=256,
    n_layer=6,
    n_head=6,
    n_embd=384,
    dropout=0.2,
    bias=False,
    mlp="gelu",
    learning_rate=1e-3,
    max_iters=5000,
    min_lr=1e-4,
    beta2=0.99,
    warmup_iters=100,
)
LAPTOP = {"batch_size": 12, "block_size": 64, "n_layer": 4, "n_head": 4, "n_embd": 128}
GPT2 = Config(vocab_size=50_304, gradient_accumulation_steps=1, bias=False, mlp="gelu")
PRESETS = {
    "cpu": BABY.replace(**LAPTOP, dropout=0.0, max_iters=2000),  # nanoGPT's README
    "baby": BABY,
    "gpt2": GPT2,
    "gpt2-xl": GPT2.replace(batch_size=4, n_layer=48, n_head=25, n_embd=1600),
}


# ---- sampling, data, attention -----------------------------------------------------------------


def sample(b: Bench) -> Report:
    """Sampling from fresh weights, a prompt of one token each.

    A CPU samples one sequence again with weights in bfloat16, where that differs.
    """
    config, _ = device.resolve_auto(b.config.replace(attention="auto", dropout=0.0))
    params = jax.jit(partial(model.init, config))(jax.random.key(config.seed))
    samplers, bandwidth = {"": Sampler(config).load(params)}, read_bandwidth()
    if device.is_cpu():
        narrow = Sampler(config.replace(dtype="bfloat16")).load(params)
        is_packed = any(p.dtype == jnp.uint32 for p in jax.tree.leaves(narrow.row_params))
        samplers |= {"bfloat16": narrow} if is_packed else {}
    rows, results = [], {"read_bytes_per_s": bandwidth, "new_tokens": NEW_TOKENS}
    for kind, sampler in samplers.items():
        for batch in (1,) if kind else (1, 8, 64):
            b.say(f"{batch} sequences {kind}")
            generate(sampler, batch)  # compiles
            times = [generate(sampler, batch) for _ in range(b.pairs)]
            first, whole = (quartiles(list(x))["median"] for x in zip(*times, strict=True))
            share = decode_bytes(sampler, batch) * NEW_TOKENS / whole / bandwidth
            found = {"samples_s": times, "tokens_per_s": batch * NEW_TOKENS / whole}
            found |= {"first_s": first, "bandwidth_share": share}
            results["_".join(filter(None, ("batch", str(batch), kind)))] = found
            cells = f"{1000 * first:.1f}", f"{found['tokens_per_s']:,.0f}", f"{share:.1%}"
            rows.append([f"{batch} {kind}".strip(), *cells])
            if whole > LONG_S:
                break
    notes = [
        f"{NEW_TOKENS} new tokens a sequence; the first ones come as a chunk of {CHUNK}",
        "of the bandwidth: weights and KV cache read for a token, against the "
        f"{bandwidth / 1e9:.1f} GB/s of a large array in memory; a cache may give more",
    ]
    headline = f"{results['batch_1']['tokens_per_s']:,.0f} tokens/s at batch 1"
    for name, found in (sample_against(b, samplers) if b.nanogpt else {}).items():
        results[f"nanogpt_{name}"] = found
        notes.append(format_ratios(f"batch 1, {name}: nanoGPT", found))
        headline += f"; {found['ratio']:.1f}x nanoGPT ({name})"
    if b.nanogpt and config.block_size <= NEW_TOKENS:
        notes.append("past block_size, nanoGPT slides by a token as context=exact does")
    if len(samplers) > 1:
        notes.append("bfloat16: jaxgpt's weights; all else is float32, as nanoGPT is on a CPU")
    columns = ["batch", "ms to the first tokens", "tokens/s", "of the bandwidth"]
    return Report(headline, columns, rows, notes, results)


def generate(sampler: Sampler, batch: int, context: str = "halve") -> tuple[float, float]:
    """Seconds until the first tokens, and until the last."""
    prompts, knobs = [np.zeros(1, np.int32)] * batch, SamplingParams(temperature=0.8, top_k=200)
    began = time.perf_counter()
    chunks = sampler.generate(prompts, max_new_tokens=NEW_TOKENS, knobs=knobs, context=context)
    next(chunks)
    first = time.perf_counter() - began
    for _ in chunks:
        pass
    return first, time.perf_counter() - began


def decode_bytes(sampler: Sampler, batch: int) -> float:
    """What decoding a token for each sequence must read: weights, and keys and values so far."""
    c, params = sampler.config, sampler.row_params if batch == 1 else sampler.params
    weights = sum(p.nbytes for p in jax.tree.leaves({**params, "pos_embed": None}))
    T = c.block_size
    lengths = [n if n <= T else T // 2 + (n - T) % -(-T // 2) for n in range(1, NEW_TOKENS + 1)]
    width = 2 * c.n_layer * c.kv_heads * c.head_dim
    return weights + batch * width * float(np.mean(lengths)) * jnp.dtype(c.dtype).itemsize


def sample_against(b: Bench, samplers: dict[str, Sampler]) -> dict[str, dict[str, Any]]:
    """Every sampler and nanoGPT in turn, the first in both ways past `block_size`: by name."""
    nanogpt: Any = b.nanogpt
    ours = {kind or "halve": partial(generate, sampler, 1) for kind, sampler in samplers.items()}
    sampler = samplers[""]
    if sampler.config.block_size <= NEW_TOKENS:
        ours["exact"] = partial(generate, sampler, 1, "exact")
    nanogpt.load(sampler.config, b.dataset.train, jax.device_get(sampler.params), "eager")
    options = {"prompt": [0], "tokens": NEW_TOKENS, "temperature": 0.8, "top_k": 200}
    b.say(f"jaxgpt ({', '.join(ours)}) and nanoGPT in turn")
    sides = [lambda run=run: run()[1] for run in ours.values()]
    theirs = lambda: nanogpt.ask("sample", **options)["seconds"]
    for warm_up in (*sides, theirs):
        warm_up()
    return dict(zip(ours, interleaved(sides, theirs, b.pairs), strict=True))


def data(b: Bench) -> Report:
    """Batches alone: drawn, placed on the device, gathered."""
    c, mesh, tokens = b.config, sharding.make_mesh(b.config), b.dataset.train
    M = sharding.num_microbatches(c, mesh)
    shape = 1, M, sharding.global_batch_size(c) // M
    rows, results = [], {}
    for name, resident in ("resident", make_resident(tokens, mesh)), ("read from disk", None):
        batches = Batches(
            tokens, mesh, shape, block_size=c.block_size, seed=c.seed, stream=TRAIN,
            resident=resident, ahead=2,
        )  # fmt: skip
        steps = count()
        ms = call_ms(lambda batches=batches, steps=steps: batches.get(next(steps)))
        per_s = 1000 * shape[1] * shape[2] / quartiles(ms)["median"]
        results[name] = {"samples_ms": ms, "windows_per_s": per_s}
        results[name]["tokens_per_s"] = per_s * c.block_size
        rows.append([name, f"{per_s:,.0f}", f"{per_s * c.block_size:,.0f}"])
    headline = f"{rows[0][2]} tokens/s resident, {rows[1][2]} from disk"
    return Report(headline, ["tokens", "windows/s", "tokens/s"], rows, [], results)


def attention(b: Bench) -> Report:
    """Every back end that this device can run, forward and backward, tokens a batch held fixed."""
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
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(B, c.block_size, n, c.head_dim) for n in (c.n_head, c.kv_heads, c.kv_heads)]
    q_BTNH, k_BSKH, v_BSKH = (
        jax.random.normal(key, shape, c.dtype) for key, shape in zip(keys, shapes, strict=False)
    )
    weight_BTNH = jax.random.normal(keys[3], shapes[0], c.dtype)

    def loss(q, k, v) -> jax.Array:
        out = attend(q, k, v, causal=c.causal, window=c.sliding_window, backend=c.attention)
        return (out * weight_BTNH).astype(jnp.float32).sum()

    return partial(jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))), q_BTNH, k_BSKH, v_BSKH)


def call_ms(call: Callable[[], Any], rounds: int = 7) -> list[float]:
    """Milliseconds a call, once a round of about a tenth of a second; the first ones warm up."""

    def some(count: int) -> float:
        began = time.perf_counter()
        jax.block_until_ready([call() for _ in range(count)])
        return (time.perf_counter() - began) / count

    some(1)
    count = max(1, int(0.1 / some(2)))
    return [1000 * some(count) for _ in range(rounds)]


def read_bandwidth() -> float:
    """Bytes a second at which the device, or all cores together, read a large array."""
    if device.is_cpu():
        parts = np.ones((device.cores(), 1 << 25), np.float32)
        with ThreadPoolExecutor(len(parts)) as pool:
            ms = call_ms(lambda: list(pool.map(np.max, parts)))
        return parts.nbytes / min(ms) * 1000
    x = jnp.ones(1 << 28, jnp.float32)
    return x.nbytes / min(call_ms(partial(jax.jit(jnp.max), x))) * 1000


# ---- the command -------------------------------------------------------------------------------

WHAT = {"train": train, "sample": sample, "data": data, "attention": attention}


def bench(
    *,
    config: str,
    preset: str,
    vs: str,
    torch_python: str,
    compile: str,
    what: str,
    pairs: int,
    json_file: str,
    plot: str,
) -> None:
    """Runs what `jaxgpt bench` was asked for (see `cli.BenchArgs`) and prints it.

    With `vs` both processes live at once, so JAX takes device memory as it needs it, instead of
    most of it at the start. The compilation cache is off: compile times are those of a first run.
    """
    for file in filter(None, (json_file, plot)):
        if not Path(file).parent.is_dir():
            raise UserError(f"{file}: there is no folder {Path(file).parent}")
    load = os.getloadavg()[0]
    if vs:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    name, c = choose(config, preset, single=bool(vs))
    if device.is_cpu() and preset not in ("", "cpu"):
        if what == "train" and preset.startswith("gpt2"):
            raise UserError(
                f"--preset={preset}: needs an accelerator; for a CPU there is --preset=cpu"
            )
        print(f"preset {preset} at a CPU: this takes long; --preset=cpu does not", file=sys.stderr)
    if vs:
        check_comparable(c)
    image = plot or (str(Path(json_file).with_suffix(".png")) if json_file else "bench.png")
    with TemporaryDirectory() as temporary, Console(stderr=True).status("starting") as status:
        c, dataset = make_data(c, Path(temporary))
        nanogpt = None
        if vs:
            nanogpt = NanoGPT(vs, torch_python or sys.executable, Path(temporary))
        say = lambda text: status.update(text)
        modes = ("eager", "compiled") if compile == "both" else (compile,)
        b = Bench(name, c, dataset, nanogpt, modes, pairs, Path(image), say)
        try:
            report = WHAT[what](b)
        except NanoGPTError as error:
            raise UserError(f"--vs {vs}: {error}") from error
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise UserError(f"batch_size={c.batch_size}: does not fit on this device") from error
        finally:
            if nanogpt:
                nanogpt.close()
    everything = {"what": what, "preset": name, "config": c.to_dict(), "data": dataset.source}
    everything |= about() | {"nanogpt": nanogpt and nanogpt.versions, "results": report.results}
    everything["load_before"] = load
    if load > 0.3 * (os.cpu_count() or 1):
        report.notes.append(f"load average before the start: {load:.1f}; others used this machine")
    if json_file:
        Path(json_file).write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    show(report, everything)


def choose(file: str, preset: str, *, single: bool) -> tuple[str, Config]:
    """Starts JAX -> what is benchmarked, and its config for this device.

    `single` keeps to one accelerator, as nanoGPT does without torchrun. Raises `UserError`.
    """
    if file and preset:
        raise UserError(f"--preset={preset}: name a preset or a config file, not both")
    variants = load_config_file(file) if file else {}
    c = variants.get("config", Config())
    device.start(c.device, float64=c.dtype == "float64")
    jax.config.update("jax_enable_compilation_cache", False)
    if file:
        c = variants.get("cpu_config", c) if device.is_cpu() and c.use_cpu_variant else c
    else:
        preset = preset or ("cpu" if device.is_cpu() else "gpt2")
        c = PRESETS[preset]
    if single and not device.is_cpu():
        c = c.replace(mesh="data:1")
    return file or preset, device.resolve_auto(c)[0]


def make_data(c: Config, folder: Path) -> tuple[Config, Dataset]:
    """TokenSplit for both sides, as files in `folder`, and the config with their vocabulary.

    They are the dataset's first ones if it is prepared; else made up, out of 500 phrases that
    follow each other at random, so that there is something to learn.
    """
    place = Path(c.data_dir, c.dataset)
    if is_prepared(place):
        found = find_dataset(c, c.block_size)
        ids = {
            s: t.read(0, min(len(t), MOST_TOKENS))
            for s, t in zip(SPLITS, (found.train, found.val), strict=True)
        }
        vocab, source = found.vocab_size, found.source
    else:
        vocab, source, rng = c.vocab_size or 65, "synthetic", np.random.default_rng(0)
        phrases = rng.integers(0, vocab, (500, 16), np.uint32)
        ids = {s: phrases[rng.integers(0, 500, 1 << 17)].ravel() for s in SPLITS}
    vocab = max(vocab, c.vocab_size)
    dtype = "uint16" if vocab <= 2**16 else "uint32"
    for split in SPLITS:
        ids[split].astype(dtype).tofile(folder / f"{split}.bin")
    train, val = (TokenSplit([folder / f"{split}.bin"], dtype, vocab) for split in SPLITS)
    return c.replace(vocab_size=vocab), Dataset(train, val, vocab, None, source, {})


def about() -> dict[str, Any]:
    """The hardware, the versions, and the commit that this is."""
    info, root, git = Path("/proc/cpuinfo"), Path(__file__).parent.parent, shutil.which("git")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    commit = ""
    if git and (root / ".git").exists():
        describe = [git, "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
        commit = subprocess.run(
            describe, capture_output=True, text=True, check=False
        ).stdout.strip()
    kind = jax.devices()[0].device_kind
    versions = {p: version(p) for p in ("jax", "jaxlib", "flax", "optax", "numpy")}
    return {
        "hardware": {
            "device": kind,
            "devices": 1 if device.is_cpu() else jax.device_count(),
            "cpu": names[0] if names else platform.processor(),
            "cores": os.cpu_count(),
            "memory_bytes": device.memory_bytes(),
        },
        "versions": versions | {"python": platform.python_version()},
        "commit": commit or None,
        "time": time.time(),
    }


def show(report: Report, about: dict[str, Any]) -> None:
    """The headline first, then the table, then what else there is to know."""
    console = Console(highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = 120
    on, versions = about["hardware"], about["versions"]
    chip = on["device"] if on["device"] != "cpu" else f"{on['cpu']}, {on['cores']} cores"
    theirs = f", torch {about['nanogpt']['torch']}" if about["nanogpt"] else ""
    console.print(
        f"{about['what']}, {about['preset']}: {report.headline}", style="bold", markup=False
    )
    console.print(
        f"{chip}; jax {versions['jax']}{theirs}; {about['config']['dtype']}, "
        f"{about['config']['attention']} attention; data: {about['data']}",
        markup=False,
    )
    table = Table(*report.columns)
    for row in report.rows:
        table.add_row(*row)
    console.print(table)
    for note in report.notes:
        console.print(note, markup=False)
