"""`jaxgpt plan`: compile a training step for absent hardware, and print what the step needs.

XLA compiles for a GPU or a TPU on any machine that has its compiler (the extra cuda or tpu).
Memory, kernels and collectives are read from the compiled program. Times are a roofline estimate
from the figures of data sheets.
"""

import importlib.util
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgpt import kernels, sharding
from jaxgpt.config import Config, UserError
from jaxgpt.data import batch_size
from jaxgpt.data.tokens import GPT2_VOCAB, read_meta
from jaxgpt.resolve import count_params, flops_per_token
from jaxgpt.runtime import device
from jaxgpt.runtime.mesh import make_mesh
from jaxgpt.tools.hlo import Collective, KernelGroup, Overlap, Program
from jaxgpt.train_step import abstract_state, make_train_step

GB, GIB = 1e9, 2**30
# Assumed fractions of the data sheets' figures that a step reaches.
EFFICIENCY = {"matmuls": 0.7, "memory": 0.8, "links": 0.8}
ATTENTION_EFFICIENCY = {"attention, forward": 0.28, "attention, backward": 0.23}  # cuDNN, H100
LAUNCH_S = 2e-6  # assumed time to start a kernel


@dataclass(frozen=True)
class Chip:
    """The data sheet of a device; rates are bytes/s in one direction."""

    kind: str  # JAX's name for it
    memory: float  # bytes
    memory_rate: float
    link_rate: float  # of all its links within a machine or a TPU slice
    network_rate: float = 0.0  # its share of the network between machines
    cores: str = ""  # GPUs only: figures for `_gpu_description`

    @property
    def platform(self) -> str:
        return "gpu" if self.cores else "tpu"


# Data sheets give the sum of both directions of a link; these are half of it. Sources for GPUs:
# NVIDIA's data sheets of the SXM modules, and of DGX systems for the network (400 Gb/s per GPU;
# A100 200). Their memory is what their drivers report, from the target configs in XLA's source.
# Sources for TPUs: Google Cloud's pages on v5e, v5p and v6e.
CHIPS = {
    "a100": Chip("NVIDIA A100", 85.10e9, 2.039e12, 300e9, 25e9, "8.0 108 64 167936 1.41 41943040"),
    "h100": Chip("NVIDIA H100", 84.94e9, 3.35e12, 450e9, 50e9, "9.0 132 128 233472 1.98 52428800"),
    "h200": Chip("NVIDIA H200", 151.4e9, 4.8e12, 450e9, 50e9, "9.0 132 128 233472 1.98 52428800"),
    "b200": Chip("NVIDIA B200", 191.5e9, 8e12, 900e9, 50e9, "10.0 148 128 233472 1.965 132644864"),
    "v5e": Chip("TPU v5e", 16 * GIB, 819e9, 200e9),
    "v5p": Chip("TPU v5p", 95 * GIB, 2.765e12, 600e9),
    "v6e": Chip("TPU v6e", 32 * GIB, 1.638e12, 400e9),
}
# Settings for libtpu: do not look for a TPU on the network, and let several processes compile.
LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
EXAMPLES = "h100:8, h200:8x8 (machines x GPUs), v5e:4x4 or v5p:4x4x4"


@dataclass(frozen=True)
class Topology:
    """Absent devices of one kind that XLA can compile for."""

    name: str
    chip: Chip
    devices: list
    machine: int  # number of devices per machine; machines are joined by the network


class DoesNotFitError(Exception):
    """The program needs more memory than the device has."""


@dataclass(frozen=True)
class Plan:
    """What one step of `config` needs per device: bytes, FLOPs and seconds."""

    config: Config
    topology: Topology
    params: int
    opt_state: int
    micro_batches: int
    temporaries: int
    peak_memory: int
    flops: float
    traffic: int
    kernels: int
    devices: int  # of the mesh
    batch_shards: int  # devices, or groups of them, that have sequences of their own
    collectives: list[Collective]
    breakdown: dict[str, KernelGroup]
    overlap: dict[str, Overlap]

    @property
    def fits(self) -> bool:
        return self.peak_memory <= usable_memory(self.topology.chip)

    @property
    def work_seconds(self) -> tuple[float, float, float]:
        """Seconds per step for matmuls, for memory traffic, and for the links."""
        chip = self.topology.chip
        compute = self.flops / (device.PEAK_FLOPS[chip.kind] * EFFICIENCY["matmuls"])
        links = sum(c.times * seconds_to_send(c, self.topology) for c in self.collectives)
        return compute, self.traffic / (chip.memory_rate * EFFICIENCY["memory"]), links

    @property
    def kernel_seconds(self) -> float:
        """Seconds per step for all kernels, one after the other."""
        return sum(group.seconds for group in self.breakdown.values())


def find_topology(name: str) -> Topology:
    """Describe the devices of a name such as h100:8 to XLA.

    Raises `UserError` for an unknown chip or shape, and if XLA's compiler for it is missing.
    """
    chip_name, _, sizes = name.partition(":")
    chip = CHIPS.get(chip_name)
    shape = [int(size) for size in sizes.split("x")] if re.fullmatch(r"\d+(x\d+)*", sizes) else []
    dimensions = (1, 2) if chip and chip.platform == "gpu" else (2, 3)
    if not chip or len(shape) not in dimensions or not all(shape):
        expected = f"expected CHIP:SHAPE with a chip of {', '.join(CHIPS)}"
        problem = f"unknown chip or shape; {expected}; try --topology={EXAMPLES}"
        raise UserError(f"topology={name!r}: {problem}")
    extra, module = ("cuda", "jax_plugins") if chip.platform == "gpu" else ("tpu", "libtpu")
    if importlib.util.find_spec(module) is None:
        problem = f"its compiler is missing; expected the extra {extra}"
        raise UserError(f"topology={name!r}: {problem}; try pip install 'jaxgpt[{extra}]'")
    keys: dict[str, Any]
    if chip.platform == "gpu":
        machines, cards = [1, *shape][-2:]
        description = _gpu_description(chip)
        keys = {"topology": f"1x{machines}x{cards}", "target_config": description}
    else:
        cards = math.prod(shape)
        keys = {"topology_name": name}
        if cards == 1:
            keys["chips_per_host_bounds"] = [1, 1, 1]
        for variable, value in LIBTPU.items():
            os.environ.setdefault(variable, value)
    try:
        devices = topologies.get_topology_desc(platform=extra, **keys).devices
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        problem = f"{str(error).splitlines()[0]}; expected a shape that XLA knows"
        raise UserError(f"topology={name!r}: {problem}; try --topology={EXAMPLES}") from error
    return Topology(name, chip, devices, cards)


def _gpu_description(chip: Chip) -> str:
    """Return XLA's GpuTargetConfigProto of a GPU as text, with the figures of XLA's own specs."""
    capability, count, fpus, shared, clock, l2 = chip.cores.split()
    major, minor = capability.split(".")
    return f"""gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
      shared_memory_per_block: 49152 shared_memory_per_core: {shared} core_count: {count}
      shared_memory_per_block_optin: {int(shared) - 1024} fpus_per_core: {fpus}
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      memory_bandwidth: {int(chip.memory_rate)} l2_cache_size: {l2} clock_rate_ghz: {clock}
      device_memory_size: {int(chip.memory)} registers_per_core_limit: 65536
      registers_per_block_limit: 65536
      cuda_compute_capability {{ major: {major} minor: {minor} }} }}
    platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }}
    device_description_str: "{chip.kind}" """


def resolve(config: Config, chip: Chip) -> tuple[Config, list[str]]:
    """Return the config with every `auto` resolved for this chip, and notes on assumptions."""
    capability = chip.cores.partition(" ")[0]
    config, notes = device.resolve_auto(config, chip.platform, capability)
    if config.dtype != "bfloat16":
        note = "the estimated times are those of bfloat16 products, which are faster"
        notes.append(f"dtype={config.dtype}: {note}")
    if config.vocab_size:
        return config, notes
    meta = Path(config.data_dir, config.dataset, "meta.json")
    vocab_size = read_meta(meta.parent).get("vocab_size")
    if not isinstance(vocab_size, int):
        vocab_size = GPT2_VOCAB
        notes.append(f"vocab_size={vocab_size} is assumed, because {meta} does not give it")
    return config.replace(vocab_size=vocab_size), notes


def compile_step(config: Config, mesh: Mesh) -> jax.stages.Compiled:
    """Compile a resolved config's step for batches from disk. Raises `DoesNotFitError`."""
    micro, total = batch_size.num_microbatches(config, mesh), batch_size.global_batch_size(config)
    everywhere = NamedSharding(mesh, PartitionSpec())
    over_batch = NamedSharding(mesh, PartitionSpec(None, None, sharding.BATCH))
    shape_UMBT = (1, micro, total // micro, config.block_size + 1)
    windows_UMBT = jax.ShapeDtypeStruct(shape_UMBT, jnp.int32, sharding=over_batch)
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    step = make_train_step(config, mesh)
    return compile_absent(step.lower(abstract_state(config, mesh), windows_UMBT, count), mesh)


def compile_absent(lowered: jax.stages.Lowered, mesh: Mesh) -> jax.stages.Compiled:
    """Compile for absent devices. Raises `DoesNotFitError` if XLA runs out of their memory."""
    is_gpu = mesh.devices.flat[0].platform == "gpu"
    try:  # without the device, autotuning fails
        with device.no_compilation_cache():
            return lowered.compile({"xla_gpu_autotune_level": "0"} if is_gpu else {})
    except jax.errors.JaxRuntimeError as error:
        if not device.is_out_of_memory(error):
            raise
        needs = re.search(r"([\d.]+\w)\)? (?:of|exceeds available HBM) \(?([\d.]+\w)", str(error))
        said = f"needs {needs[1]} of {needs[2]}" if needs else str(error).splitlines()[0]
        raise DoesNotFitError(said) from error


def make_plan(config: Config, topology: Topology) -> Plan:
    """Compile a resolved config's step and collect what it needs. Raises `DoesNotFitError`."""
    mesh = make_mesh(config, topology.devices)
    compiled = compile_step(config, mesh)
    memory: Any = compiled.memory_analysis()
    program = Program(compiled.as_text() or "")
    inside = memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    arguments = memory.argument_size_in_bytes - memory.alias_size_in_bytes
    return Plan(
        config,
        topology,
        *state_bytes(config, mesh),
        micro_batches=batch_size.num_microbatches(config, mesh),
        temporaries=memory.temp_size_in_bytes,
        peak_memory=inside + arguments + memory.output_size_in_bytes,
        flops=flops_per_step(config) / mesh.size,
        traffic=program.traffic(),
        kernels=program.kernels().total(),
        devices=mesh.size,
        batch_shards=batch_size.batch_shards(mesh),
        collectives=program.collectives(),
        breakdown=program.breakdown(partial(kernel_seconds, topology.chip)),
        overlap=program.overlap(
            partial(kernel_seconds, topology.chip), partial(seconds_to_send, topology=topology)
        ),
    )


def kernel_seconds(chip: Chip, kind: str, flops: float, traffic: int) -> float:
    """Estimate the time of one kernel by a roofline: its launch, and its FLOPs or its bytes."""
    efficiency = ATTENTION_EFFICIENCY.get(kind, EFFICIENCY["matmuls"])
    compute = flops / (device.PEAK_FLOPS[chip.kind] * efficiency)
    return LAUNCH_S + max(compute, traffic / (chip.memory_rate * EFFICIENCY["memory"]))


def seconds_to_send(c: Collective, topology: Topology) -> float:
    """Estimate the time of one collective over the slower of links and network.

    Each device has its own network port. A ring across machines uses the ports of all its members
    in a machine; other collectives use one port.
    """
    rate = topology.chip.link_rate
    machines = len({member // topology.machine for member in c.group})
    if machines > 1:
        is_ring = c.kind in ("all-reduce", "all-gather", "reduce-scatter")
        ports = len(c.group) / machines if is_ring else 1
        rate = min(rate, ports * topology.chip.network_rate)
    return c.bytes / (rate * EFFICIENCY["links"])


def state_bytes(config: Config, mesh: Mesh) -> tuple[int, int]:
    """Return the bytes of parameters and of optimizer state that one device holds."""
    state = abstract_state(config, mesh)
    shard_bytes = lambda a: math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize
    total = lambda tree: sum(map(shard_bytes, jax.tree.leaves(tree)))
    return total(state.params), total(state.opt_state)


def flops_per_step(config: Config) -> float:
    """Return a step's FLOPs on all devices: MFU's formula, and what `remat` computes twice."""
    tokens = batch_size.global_batch_size(config) * config.block_size
    attention = 4 * config.n_layer * config.n_embd * config.block_size  # forward pass, per token
    once = flops_per_token(config)
    head = 6 * config.vocab_size * config.n_embd  # of the output layer, which is never recomputed
    again = {"none": 0, "dots": attention, "full": (once - head) / 3}[config.remat]
    return tokens * (once + again)


def usable_memory(chip: Chip) -> float:
    """Return the bytes of a device that JAX uses for arrays; see `device.start`."""
    fraction = device.memory_fraction() or device.MEMORY_FRACTION
    return chip.memory * (float(fraction) if chip.platform == "gpu" else 15.75 / 16)


def fit(config: Config, topology: Topology, say: Callable[[str], None]) -> Plan:
    """Return the plan with the least recomputation that fits, and then the largest micro-batch.

    The sequences per step stay the same. Raises `UserError` if no micro-batch fits.
    """
    total = batch_size.global_batch_size(config)
    share = total // batch_size.batch_shards(make_mesh(config, topology.devices))
    sizes = [n for n in range(1, share + 1) if share % n == 0]

    def attempt(remat: str, size: int) -> Plan | None:
        keys = {"remat": remat, "batch_size": size, "batch_tokens": 0}
        keys["gradient_accumulation_steps"] = total // size
        try:
            plan = make_plan(config.replace(**keys), topology)
            needs, fits = f"{plan.peak_memory / GIB:.2f} GiB", plan.fits
        except DoesNotFitError as error:
            plan, needs, fits = None, str(error), False
        say(f"remat={remat} batch_size={size}: {needs}: {'fits' if fits else 'does not fit'}")
        return plan if fits else None

    for remat in ("none", "dots", "full"):
        best = attempt(remat, sizes[0])
        low, high = 0, len(sizes)  # sizes[low] fits, sizes[high] does not
        while best and high - low > 1:
            middle = (low + high) // 2
            if plan := attempt(remat, sizes[middle]):
                best, low = plan, middle
            else:
                high = middle
        if best:
            return best
    problem = "one sequence per device does not fit, even with remat=full"
    expected = "expected more devices, or a state that is split over them"
    mesh = f"fsdp:{len(topology.devices)}"
    advice = "" if config.mesh == mesh else f"; try --mesh={mesh}"
    raise UserError(f"topology={topology.name!r}: {problem}; {expected}{advice}")


def format_plan(plan: Plan) -> str:
    """Return the plan as lines of text."""
    c, chip, devices = plan.config, plan.topology.chip, plan.devices
    gib = lambda count: f"{count / GIB:10.3f} GiB"
    tokens = batch_size.global_batch_size(c) * c.block_size
    peak = devices * device.PEAK_FLOPS[chip.kind]
    fast, slow = max(plan.work_seconds), sum(plan.work_seconds)
    fast_mfu, slow_mfu = (tokens * flops_per_token(c) / peak / s for s in (fast, slow))
    compute, memory, links = (1000 * seconds for seconds in plan.work_seconds)
    verdict = "fits" if plan.fits else "does not fit"
    lines = [
        f"{devices} x {chip.kind}, mesh {c.mesh or 'data'}, {c.dtype}, {c.attention} attention, "
        f"remat={c.remat}, scan_layers={c.scan_layers}",
        f"model: {count_params(c) / 1e6:,.1f}M parameters; step: {tokens:,} tokens in "
        f"{plan.micro_batches} micro-batches",
        "per device:",
        f"  parameters        {gib(plan.params)}",
        f"  optimizer state   {gib(plan.opt_state)}",
        f"  temporaries       {gib(plan.temporaries)}  activations, gradients, casts",
        f"  peak memory       {gib(plan.peak_memory)}  of {gib(usable_memory(chip))} that JAX "
        f"may use of {gib(chip.memory)}: {verdict}",
        f"  FLOPs per step    {plan.flops / 1e12:10.1f} T    by formula, recomputation included",
        f"  memory traffic    {gib(plan.traffic)}  per step, read and written by kernels",
        f"  kernels per step  {plan.kernels:10,}",
    ]
    for kind in sorted({c.kind for c in plan.collectives}):
        sent = sum(c.times * c.bytes for c in plan.collectives if c.kind == kind)
        lines.append(f"  {kind:<17} {gib(sent)}  sent per step{_in_calls(plan.overlap.get(kind))}")
    shares = ", ".join(f"{what} {100 * x:.0f}%" for what, x in EFFICIENCY.items())
    lines += [
        f"estimate: {1000 * fast:,.0f} ms per step if all work overlaps, {1000 * slow:,.0f} ms if "
        f"none does; MFU {100 * fast_mfu:.0f}% to {100 * slow_mfu:.0f}%",
        f"  matmuls {compute:,.0f} ms, memory {memory:,.0f} ms, links {links:,.0f} ms; assumed "
        f"fractions of the data sheet's rates: {shares}",
    ]
    return "\n".join(lines)


def _in_calls(overlap: Overlap | None) -> str:
    """Return how often a kind of collective runs, and how much of its time compute hides.

    That is unknown for collectives that are a part of fusions.
    """
    if overlap is None:
        return ""
    calls = f", in {overlap.calls:,} calls, {overlap.asynchronous:,} of them asynchronous"
    hidden = abs(overlap.hidden / overlap.seconds)  # rounding may make it negative
    return f"{calls}; {1000 * overlap.seconds:,.1f} ms, {100 * hidden:.0f}% during compute"


def format_breakdown(plan: Plan) -> str:
    """Return a table of the step's kernels by kind; the times are estimates by a roofline.

    An activation is an array [B, T, D] of the residual stream, of all micro-batches of a device.
    """
    c, chip = plan.config, plan.topology.chip
    tokens = batch_size.global_batch_size(c) * c.block_size
    activation = tokens / plan.batch_shards * c.n_embd * jnp.dtype(c.dtype).itemsize
    per_layer = activation * max(1, c.n_layer)
    columns = ("kernels", "GB", "activations/layer", "TFLOPs", "ms")
    lines = [f"{'kernels by kind':<20} {' '.join(f'{name:>8}' for name in columns)}  bound by"]
    for kind, group in sorted(plan.breakdown.items(), key=lambda item: -item[1].seconds):
        numbers = f"{group.kernels:>8,} {group.bytes / GB:>8.2f} {group.bytes / per_layer:>17.1f}"
        numbers += f" {group.flops / 1e12:>8.3f} {1000 * group.seconds:>8.2f}"
        lines.append(f"{kind:<20} {numbers}  {what_bounds(chip, kind, group)}")
    total = plan.kernel_seconds
    mfu = tokens * flops_per_token(c) / (plan.devices * device.PEAK_FLOPS[chip.kind] * total)
    links = ", without the time of the links" if plan.collectives else ""
    time = f"{1000 * total:,.2f} ms per step, MFU {100 * mfu:.1f}%"
    lines.append(f"one after the other{links}: {time}")
    return "\n".join(lines)


def what_bounds(chip: Chip, kind: str, group: KernelGroup) -> str:
    """Return what takes most of the time of a group's kernels."""
    launches = group.kernels * LAUNCH_S
    compute = kernel_seconds(chip, kind, group.flops, 0) - LAUNCH_S
    memory = kernel_seconds(chip, kind, 0, group.bytes) - LAUNCH_S
    times = {"launches": launches, "compute": compute, "memory": memory}
    return max(times, key=lambda name: times[name])


def compare_levers(plan: Plan, say: Callable[[str], None]) -> None:
    """Compile the step once more per lever without it, and print what each lever saves.

    A lever is an operation that has a variant for the platform, or XLA's options. A line is left
    out if the step does not use the lever.
    """
    platform = plan.topology.devices[0].platform
    row = "{:<20} {:>8} {:>9} {:>14} {:>8} {:>9}".format
    say(row("without", "kernels", "GB", "temporaries GB", "ms", "change ms"))

    def show(name: str, other: Plan) -> None:
        ms, change = (
            1000 * s for s in (other.kernel_seconds, other.kernel_seconds - plan.kernel_seconds)
        )
        sizes = f"{other.traffic / GB:,.2f}", f"{other.temporaries / GB:,.2f}"
        say(row(name, f"{other.kernels:,}", *sizes, f"{ms:,.2f}", f"{change:+,.2f}"))

    def show_without(name: str, config: Config) -> None:
        try:
            other = make_plan(config, plan.topology)
        except DoesNotFitError:
            say(f"{name:<20} does not fit")
            return
        if replace(other, config=plan.config) != plan:
            show(name, other)

    show("nothing", plan)
    for operation in [name for name, where in kernels.TABLE if where == platform]:
        with kernels.without(operation, platform):
            show_without(operation, plan.config)
    if plan.config.xla == "tuned":
        show_without("XLA's options", plan.config.replace(xla="default"))


def run(
    config: Config,
    topology_name: str,
    search: bool,
    say: Callable[[str], None],
    breakdown: bool = False,
    levers: bool = False,
) -> bool:
    """Print a config's plan, and return whether it fits. Raises `UserError`.

    If copies of the whole state do not fit and the config names no mesh, the printed plan is what
    `fit` finds with the state split over all devices.
    """
    topology = find_topology(topology_name)
    config, notes = resolve(config, topology.chip)
    for note in notes:
        say(note)
    try:
        plan = fit(config, topology, say) if search else make_plan(config, topology)
        if not plan.fits and not config.mesh:  # XLA compiles such programs for GPUs
            usable = usable_memory(topology.chip)
            raise DoesNotFitError(f"needs {plan.peak_memory / GIB:.2f} of {usable / GIB:.2f} GiB")
    except DoesNotFitError as error:
        params, opt_state = state_bytes(config, make_mesh(config, topology.devices))
        say(
            f"does not fit: {error}; per device, parameters take {params / GIB:.2f} GiB and "
            f"optimizer state {opt_state / GIB:.2f} GiB; try --search"
        )
        if config.mesh:
            return False
        config, search = config.replace(mesh=f"fsdp:{len(topology.devices)}"), True
        say(f"searching with --mesh={config.mesh}:")
        plan = fit(config, topology, say)
    say(format_plan(plan))
    if breakdown:
        say(format_breakdown(plan))
    if levers:
        compare_levers(plan, say)
    if search:
        keys = "mesh", "remat", "scan_layers", "batch_size", "gradient_accumulation_steps"
        found = [(key, getattr(plan.config, key)) for key in keys]
        say("use: " + " ".join(f"--{key}={value}" for key, value in found if value))
    return plan.fits
