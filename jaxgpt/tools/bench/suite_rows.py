"""The rows of `jaxgpt bench --suite=gpu`: what each measures, and the configs that it measures."""

import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, field
from functools import partial
from io import StringIO
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import jax

from jaxgpt import kernels
from jaxgpt.config import Config
from jaxgpt.data.tokens import GPT2_VOCAB, Dataset
from jaxgpt.kernels import TABLE
from jaxgpt.kernels.platform import current_platform
from jaxgpt.runtime import device
from jaxgpt.runtime.metrics import read_metrics
from jaxgpt.runtime.profile import start_trace, stop_trace
from jaxgpt.tools.bench import sampling
from jaxgpt.tools.bench.command import BABY, GPT2, PRESETS, make_data
from jaxgpt.tools.bench.nanogpt import NanoGPT, check_comparable
from jaxgpt.tools.bench.report import Bench, call_ms, interleaved, quartiles
from jaxgpt.tools.bench.trace import read_trace
from jaxgpt.tools.bench.training import PARITY_STEPS, JaxGPT, compare, loss_parity
from jaxgpt.tools.hlo import Program
from jaxgpt.tools.plan import CHIPS, kernel_seconds
from jaxgpt.train import train

Result = tuple[dict[str, float], dict[str, Any]]  # values by unit, and details for JSON

PROFILED_STEPS = 10
LISTED_KERNELS = 60  # of those that took longest
BABY_RUN = {"eval_interval": 250, "eval_iters": 200, "always_save_checkpoint": False}


@dataclass(frozen=True)
class Sizes:
    """The configs that the rows measure, and the number of rounds or samples of each."""

    gpt2: Config
    gpt2_batch12: Config
    gpt2_xl: Config
    baby: Config
    repeats: int = 5


FULL = Sizes(GPT2.replace(batch_size=32), GPT2, PRESETS["gpt2-xl"].replace(batch_size=8), BABY)
SMALL = {"batch_size": 4, "block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 32}
TOY = Sizes(  # a CPU measures every row of these in seconds
    GPT2.replace(**SMALL, vocab_size=512),
    GPT2.replace(**SMALL | {"batch_size": 2}, vocab_size=512),
    GPT2.replace(**SMALL | {"n_layer": 3}, vocab_size=512),
    BABY.replace(**SMALL, max_iters=40, warmup_iters=4),
    repeats=2,
)


@dataclass
class Suite:
    """What the rows of one process share: sizes, folders, nanoGPT's place, and one model."""

    sizes: Sizes
    folder: Path  # for temporary files
    file: Path  # the results; plots are written beside it
    compare_to: str = ""
    torch_python: str = sys.executable
    modes: Sequence[str] = ("eager", "compiled")
    xla_flags: str = ""  # the user's, without those of a row
    model: JaxGPT | None = None
    model_key: Config | None = None

    def prepare(self, config: Config) -> tuple[Config, Dataset]:
        """Return the config for one device of this kind, and data for it."""
        config, dataset = make_data(config, Path(mkdtemp(dir=self.folder)))
        return device.resolve_auto(config.replace(mesh="data:1"))[0], dataset

    def trained(self, config: Config) -> JaxGPT:
        """Return the compiled step of a config; the latest one is kept for the next rows."""
        if self.model is None or self.model_key != config:
            self.free()
            self.model, self.model_key = JaxGPT(*self.prepare(config)), config
        return self.model

    def free(self) -> None:
        """Free the device memory of the model and of compiled programs."""
        self.model = None
        gc.collect()
        jax.clear_caches()


@dataclass(frozen=True)
class Row:
    """A measurement: its name, what it measures, its function, and its process's environment."""

    name: str
    what: str
    measure: Callable[[Suite], Result]
    env: dict[str, str] = field(default_factory=dict)


# ---- measurements ------------------------------------------------------------------------------


def time_steps(suite: Suite, size: str, **keys: Any) -> Result:
    """Time training steps of a config of `Sizes` with these keys."""
    model = suite.trained(getattr(suite.sizes, size).replace(**keys))
    found = model.summary(model.step_ms(model.round_steps(), suite.sizes.repeats))
    values = {"ms per step": found["step_ms"]["median"], "tokens/s": found["tokens_per_s"]}
    if found["mfu"]:
        values["% MFU"] = 100 * found["mfu"]
    values |= {"GB of device memory": found["memory_bytes"] / 1e9}
    return values | {"s to compile": found["compile_s"]}, found


def in_turn(suite: Suite, config: Config, other: Config, word: str, operation: str = "") -> Result:
    """Time steps of two configs in turn, the second without the fast kernel of an operation.

    `word` tells the second's times from the first's.
    """
    default = suite.trained(config)
    with without(operation) if operation else nullcontext():
        changed = JaxGPT(*suite.prepare(other))
    steps = default.round_steps()
    changed.round_steps()
    run, other_run = (lambda m=m: 1000 * m.train(steps)[0] / steps for m in (default, changed))
    keys = "default_ms", "changed_ms"
    (found,) = interleaved([run], other_run, suite.sizes.repeats, keys)
    ms, changed_ms = (quartiles([pair[key] for pair in found["pairs"]])["median"] for key in keys)
    values = {"ms per step by default": ms, f"ms per step {word}": changed_ms}
    values |= {"times as long as by default": found["ratio"]}
    return values, found | {"changed": changed.summary([changed_ms])}


@contextmanager
def without(operation: str) -> Iterator[None]:
    """Trace functions with the general row of an operation in place of this platform's own."""
    jax.clear_caches()
    try:
        with kernels.without(operation, current_platform()):
            yield
    finally:
        jax.clear_caches()


def time_lever(suite: Suite, operation: str) -> Result:
    """Time steps with and without the platform's own row of an operation in turn."""
    size, keys = LEVER_CONFIGS.get(operation, ("gpt2", {}))
    config = getattr(suite.sizes, size).replace(**keys)
    return in_turn(suite, config, config, "without it", operation)


def time_option(suite: Suite, **keys: Any) -> Result:
    """Time steps of GPT-2 with and without these keys in turn."""
    return in_turn(suite, suite.sizes.gpt2, suite.sizes.gpt2.replace(**keys), "with it")


def time_attention(suite: Suite, backend: str) -> Result:
    """Time one layer's attention, forward and backward."""
    config, _ = device.resolve_auto(suite.sizes.gpt2)
    c = config.replace(attention=backend)
    device.choose_attention(c)
    ms = call_ms(sampling.attention_call(c, c.batch_size))
    flops = 7 * c.batch_size * c.n_embd * c.block_size**2  # half of the square, five backward
    median = quartiles(ms)["median"]
    return {"ms": median, "TFLOP/s": flops / median / 1e9}, {"samples_ms": ms}


def time_decoding(suite: Suite, batch: int) -> Result:
    """Time sampling `NEW_TOKENS` tokens per sequence from a prompt of one token."""
    config, _ = device.resolve_auto(suite.sizes.gpt2)
    sampler = sampling.make_samplers(config)[""]
    sampling.generate(sampler, batch)  # compiles
    times = [sampling.generate(sampler, batch) for _ in range(suite.sizes.repeats)]
    first, whole = (quartiles(list(column))["median"] for column in zip(*times, strict=True))
    tokens = batch * sampling.NEW_TOKENS
    read = sampling.decode_bytes(sampler, batch) * sampling.NEW_TOKENS / whole
    values = {"tokens/s": tokens / whole, "ms to the first tokens": 1000 * first}
    share = 100 * read / sampling.read_bandwidth()
    return values | {"% of the memory bandwidth": share}, {"samples_s": times}


def train_baby(suite: Suite) -> Result:
    """Train the baby GPT to its end through the trainer."""
    keys = BABY_RUN | {"out_dir": mkdtemp(dir=suite.folder), "mesh": "data:1"}
    config = suite.sizes.baby.replace(**keys, lr_decay_iters=suite.sizes.baby.max_iters)
    began = time.perf_counter()
    with redirect_stdout(StringIO()):
        code = train(config)
    seconds = time.perf_counter() - began
    if code:
        sys.exit(code)
    rows = read_metrics(Path(config.out_dir, "metrics.jsonl"))
    evaluations = [row for row in rows if row.get("val_loss") is not None]
    best = min(evaluations, key=lambda row: row["val_loss"])
    step_ms = quartiles([row["step_ms"] for row in rows if row.get("step_ms")])["median"]
    values = {"nats, best validation loss": best["val_loss"], "steps to the best": best["step"]}
    return values | {"s in all": seconds, "ms per step": step_ms}, {"metrics": rows}


def versus(suite: Suite, size: str) -> Result:
    """Compare losses with nanoGPT's, then time both sides in turn, eager and compiled.

    The details have the error of a mode that fails, so that the row is measured again.
    """
    suite.free()
    config, dataset = suite.prepare(getattr(suite.sizes, size))
    check_comparable(config)
    nanogpt = NanoGPT(suite.compare_to, suite.torch_python, Path(mkdtemp(dir=suite.folder)))
    plot = suite.file.with_name(f"{suite.file.stem}_{size}.png")
    b = Bench(size, config, dataset, nanogpt, repeats=suite.sizes.repeats, plot=plot)
    try:
        model = JaxGPT(config, dataset)
        parity = loss_parity(b, model, nanogpt)
        values = {f"largest difference of {PARITY_STEPS} losses": parity["largest_difference"]}
        details: dict[str, Any] = {"parity": parity, "nanogpt": nanogpt.versions}
        steps = model.round_steps()
        for mode in suite.modes:
            details[mode] = found = compare(b, model, mode, steps)
            if "error" in found:
                details["error"] = f"nanoGPT {mode}: {found['error']}"
            else:
                ours = quartiles([1000 * p["jaxgpt_s"] / steps for p in found["pairs"]])["median"]
                values |= {f"ms per step ({mode} in turn)": ours}
                values |= {f"ms per step of nanoGPT {mode}": found["step_ms"]["median"]}
                values |= {f"times as fast as nanoGPT {mode}": found["ratio"]}
    finally:
        nanogpt.close()
    return values, details


# ---- profile -----------------------------------------------------------------------------------


def profile_steps(suite: Suite) -> Result:
    """Profile ten steps; return milliseconds per step by kind of kernel, and by the roofline."""
    model = suite.trained(suite.sizes.gpt2)
    steps = model.whole_calls(PROFILED_STEPS)
    model.train(2 * model.U)
    folder = Path(mkdtemp(dir=suite.folder))
    start_trace(folder)
    model.train(steps)
    events = stop_trace(folder)
    program = Program(model.step.as_text() or "")
    by_kind, by_kernel = read_trace(events, program.kinds())
    if not by_kernel:
        raise RuntimeError("the trace has no kernels")
    kind = jax.devices()[0].device_kind
    chip = next((chip for chip in CHIPS.values() if kind.startswith(chip.kind)), CHIPS["h100"])
    roofline = program.breakdown(partial(kernel_seconds, chip))
    ranked = lambda ms_by: sorted(ms_by.items(), key=lambda item: -item[1])
    values = {f"ms per step in {name}": ms / steps for name, ms in ranked(by_kind)}
    for name, group in roofline.items():
        values[f"ms per step in {name} by a roofline of {chip.kind}"] = 1000 * group.seconds
    details = {"roofline": {name: asdict(group) for name, group in roofline.items()}}
    longest = {name: ms / steps for name, ms in ranked(by_kernel)[:LISTED_KERNELS]}
    return values, details | {"ms_by_kernel": longest}


# ---- the rows ----------------------------------------------------------------------------------

# Operations whose general row is compared on another config than GPT-2's, and that config.
LEVER_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gelu_tanh": ("gpt2", {"mlp": "gelu_tanh"}),
    "normalize": ("gpt2", {"bias": True}),  # gains are folded only without biases
    "attention_reference": ("baby", {"attention": "reference"}),
}
LEVERS = [operation for operation, platform in TABLE if platform == "gpu"]
FLAGS = {
    "latency_hiding": {"XLA_FLAGS": "--xla_gpu_enable_latency_hiding_scheduler=true"},
    "command_buffer_off": {"XLA_FLAGS": "--xla_gpu_enable_command_buffer="},
    "O1": {"JAX_OPTIMIZATION_LEVEL": "O1"},
}
SHARED = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # leaves memory to nanoGPT's process
LARGE = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}


def steps_row(name: str, what: str, size: str, env: dict | None = None, **keys: Any) -> Row:
    return Row(name, what, partial(time_steps, size=size, **keys), env or {})


def lever_row(operation: str) -> Row:
    what = f"without the platform's own {operation}, in turn"
    return Row(f"lever_{operation}", what, partial(time_lever, operation=operation))


def decode_row(batch: int) -> Row:
    what = f"sampling from GPT-2 124M, batch {batch}"
    return Row(f"decode_{batch}", what, partial(time_decoding, batch=batch))


def attention_row(backend: str) -> Row:
    what = "32 x 1024, 12 heads of 64, forward and backward"
    return Row(f"attention_{backend}", what, partial(time_attention, backend=backend))


def nanogpt_row(name: str, size: str) -> Row:
    return Row(f"nanogpt_{name}", f"train_{name} and nanoGPT", partial(versus, size=size), SHARED)


def flag_row(name: str) -> Row:
    what = f"train_124m with {' '.join(map('='.join, FLAGS[name].items()))}"
    return steps_row(f"flag_{name}", what, "gpt2", FLAGS[name])


# Rows of one config follow each other, because the compiled step is kept.
ROWS = [
    steps_row("train_124m", "GPT-2 124M, 32 x 1024", "gpt2"),
    *(lever_row(operation) for operation in LEVERS if operation not in LEVER_CONFIGS),
    Row("xla_default", "XLA's own options, in turn", partial(time_option, xla="default")),
    Row(
        "deterministic",
        "kernels of a fixed order, in turn",
        partial(time_option, deterministic=True),
    ),
    Row("muon", "Muon in place of AdamW, in turn", partial(time_option, optimizer="muon")),
    Row(
        "document_mask",
        "attention within documents, in turn",
        partial(time_option, document_mask=True, eot_id=GPT2_VOCAB - 1),
    ),
    Row("profile", "kernels of ten steps of train_124m", profile_steps),
    steps_row("train_124m_batch12", "GPT-2 124M, 12 x 1024", "gpt2_batch12"),
    *(lever_row(operation) for operation in LEVERS if operation in LEVER_CONFIGS),
    steps_row("train_baby", "baby GPT, 64 x 256, dropout 0.2", "baby"),
    steps_row(
        "train_baby_plain_attention",
        "train_baby with attention_dropout=False",
        "baby",
        attention_dropout=False,
    ),
    Row("run_baby", "a whole run of the baby GPT on Shakespeare", train_baby),
    *map(decode_row, (1, 8, 64)),
    *map(attention_row, ("cudnn", "flash", "xla", "reference")),
    nanogpt_row("124m", "gpt2"),
    nanogpt_row("124m_batch12", "gpt2_batch12"),
    steps_row("train_xl", "GPT-2 XL, 8 x 1024", "gpt2_xl", LARGE),
    *map(flag_row, FLAGS),
]
