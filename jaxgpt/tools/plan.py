"""What a run would need on hardware that is not here: its training step, compiled ahead of time.

XLA compiles for a GPU or TPU without one, given the extra that brings its compiler. Memory,
kernels and collectives are what the program says; times are a roofline over data sheets.
"""

import dataclasses
import importlib.util
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgpt import model, sharding
from jaxgpt.config import Config, UserError
from jaxgpt.data.tokens import GPT2_VOCAB
from jaxgpt.runtime import device
from jaxgpt.tools.hlo import Collective, Program
from jaxgpt.train_step import abstract_state, make_train_step

GB, GIB = 1e9, 2**30
EFFICIENCY = {"matmuls": 0.7, "memory": 0.8, "links": 0.8}  # of a data sheet's figure: assumed


@dataclass(frozen=True)
class Chip:
    """One device: rates in bytes/s and in one direction, as its maker's data sheet has them."""

    kind: str  # as JAX names it
    memory: float  # bytes
    memory_rate: float
    link_rate: float  # of all its links within a machine, or within a TPU slice
    network_rate: float = 0.0  # its share of the network between machines
    cores: str = ""  # of a GPU, see _target

    @property
    def platform(self) -> str:
        return "gpu" if self.cores else "tpu"


# Links are bidirectional in data sheets: half of that here. GPUs: NVIDIA's data sheets of the SXM
# modules, and of DGX systems for the network (a port of 400 Gb/s a GPU; A100 200). TPUs: Google
# Cloud's pages on v5e, v5p and v6e.
CHIPS = {
    "a100": Chip("NVIDIA A100", 80 * GB, 2.039e12, 300e9, 25e9, "8.0 108 64 167936 1.41 41943040"),
    "h100": Chip("NVIDIA H100", 80 * GB, 3.35e12, 450e9, 50e9, "9.0 132 128 233472 1.98 52428800"),
    "h200": Chip("NVIDIA H200", 141 * GB, 4.8e12, 450e9, 50e9, "9.0 132 128 233472 1.98 52428800"),
    "b200": Chip("NVIDIA B200", 180 * GB, 8e12, 900e9, 50e9, "10.0 148 128 233472 1.965 132644864"),
    "v5e": Chip("TPU v5e", 16 * GIB, 819e9, 200e9),
    "v5p": Chip("TPU v5p", 95 * GIB, 2.765e12, 600e9),
    "v6e": Chip("TPU v6e", 32 * GIB, 1.638e12, 400e9),
}
LIBTPU = {  # ask no network what this machine is; let several processes compile at once
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
TOPOLOGY = "a chip and its shape, as in h100:8, h200:8x8 (machines x GPUs), v5e:4x4, v5p:4x4x4"


@dataclass(frozen=True)
class Topology:
    """Devices that are not here."""

    name: str
    chip: Chip
    devices: list
    machine: int  # devices that its links join; beyond is network


class DoesNotFitError(Exception):
    """XLA gave up: the program needs more memory than the device has."""


@dataclass(frozen=True)
class Plan:
    """What one step of `config` needs of each device; bytes, FLOPs and seconds."""

    config: Config
    topology: Topology
    micro_batches: int
    params: int
    opt_state: int
    temporaries: int
    peak_memory: int
    flops: float
    traffic: int
    kernels: int
    collectives: dict[str, tuple[int, int]]  # kind -> how many, bytes sent
    link_seconds: float

    @property
    def fits(self) -> bool:
        return self.peak_memory <= usable_memory(self.topology.chip)

    @property
    def seconds(self) -> tuple[float, float]:
        """Of a step: if all work overlaps, and if none does."""
        times = *self.busy, self.link_seconds
        return max(times), sum(times)

    @property
    def busy(self) -> tuple[float, float]:
        """Seconds for matmuls, and for memory traffic."""
        chip = self.topology.chip
        compute = self.flops / (device.PEAK_FLOPS[chip.kind] * EFFICIENCY["matmuls"])
        return compute, self.traffic / (chip.memory_rate * EFFICIENCY["memory"])


def find_topology(name: str) -> Topology:
    """The devices that `name` means. Raises `UserError`: no such thing, or no compiler for it."""
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    chip = CHIPS.get(found[1]) if found else None
    shape = [int(size) for size in found[2].split("x")] if found else []
    dims = {"gpu": (1, 2), "tpu": (2, 3)}[chip.platform] if chip else ()
    if not chip or not found or len(shape) not in dims or not all(shape):
        raise UserError(f"topology={name!r}: must be {TOPOLOGY}; chips: {', '.join(CHIPS)}")
    extra, module = {"gpu": ("cuda", "jax_plugins"), "tpu": ("tpu", "libtpu")}[chip.platform]
    if importlib.util.find_spec(module) is None:
        raise UserError(f"topology={name!r}: needs its compiler; pip install 'jaxgpt[{extra}]'")
    try:
        if chip.platform == "gpu":
            machines, cards = [1, *shape][-2:]
            desc = topologies.get_topology_desc(
                platform="cuda", topology=f"1x{machines}x{cards}", target_config=_target(chip)
            )
            return Topology(name, chip, desc.devices, cards)
        for key, value in LIBTPU.items():
            os.environ.setdefault(key, value)
        one = {"chips_per_host_bounds": [1, 1, 1]} if math.prod(shape) == 1 else {}
        desc = topologies.get_topology_desc(platform="tpu", topology_name=name, **one)
        return Topology(name, chip, desc.devices, len(desc.devices))
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        raise UserError(f"topology={name!r}: {str(error).splitlines()[0]}") from error


def _target(chip: Chip) -> str:
    """XLA's description of a GPU, in the text form of its GpuTargetConfigProto.

    The figures are those of the specs that XLA keeps for these cards.
    """
    capability, count, fpus, shared, clock, l2 = chip.cores.split()
    major, minor = capability.split(".")
    return f"""
    gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
      shared_memory_per_block: 49152 shared_memory_per_core: {shared}
      shared_memory_per_block_optin: {int(shared) - 1024} core_count: {count}
      fpus_per_core: {fpus} block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
      block_dim_limit_z: 65535 memory_bandwidth: {int(chip.memory_rate)} l2_cache_size: {l2}
      clock_rate_ghz: {clock} device_memory_size: {int(chip.memory)}
      cuda_compute_capability {{ major: {major} minor: {minor} }}
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
    }}
    platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }}
    device_description_str: "{chip.kind}" """


def resolve(config: Config, chip: Chip) -> tuple[Config, list[str]]:
    """`config` as it would be on this chip, and lines that say what was assumed."""
    config, notes = device.resolve_auto(config, chip.platform)
    if not config.vocab_size:
        meta = Path(config.data_dir, config.dataset, "meta.json")
        known = json.loads(meta.read_text())["vocab_size"] if meta.is_file() else GPT2_VOCAB
        config = config.replace(vocab_size=known)
        if not meta.is_file():
            notes.append(f"vocab_size: {known} assumed, as {meta} is not there")
    return config, notes


def compile_step(config: Config, mesh: Mesh) -> jax.stages.Compiled:
    """The training step of a resolved config for this mesh, with batches read from disk.

    Raises `DoesNotFitError` where XLA finds that the devices have too little memory.
    """
    micro, total = sharding.num_microbatches(config, mesh), sharding.global_batch_size(config)
    place = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
    shape = (1, micro, total // micro, config.block_size + 1)
    windows = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place(None, None, sharding.BATCH))
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=place())
    arguments = abstract_state(config, mesh), windows, count
    return compile_absent(make_train_step(config, mesh).lower(*arguments), mesh)


def compile_absent(lowered: jax.stages.Lowered, mesh: Mesh) -> jax.stages.Compiled:
    """What was lowered for a mesh of devices that are not here. Raises `DoesNotFitError`."""
    gpu = mesh.devices.flat[0].platform == "gpu"
    seconds = jax.config.values["jax_persistent_cache_min_compile_time_secs"]
    try:  # tuning would need the card; a kept program could not be read back without one
        jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)
        return lowered.compile({"xla_gpu_autotune_level": "0"} if gpu else {})
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needs = re.search(r"([\d.]+\w)\)? (?:of|exceeds available HBM) \(?([\d.]+\w)", str(error))
        said = f"needs {needs[1]} of {needs[2]}" if needs else str(error).splitlines()[0]
        raise DoesNotFitError(said) from error
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)


def make_plan(config: Config, topology: Topology) -> Plan:
    """Compiles a resolved config's step and reads off what it needs."""
    mesh = sharding.make_mesh(config, topology.devices)
    compiled = compile_step(config, mesh)
    memory: Any = compiled.memory_analysis()
    program = Program(compiled.as_text() or "")
    params, opt_state = state_bytes(config, mesh)
    kinds: dict[str, tuple[int, int]] = {}
    link_seconds = 0.0
    for c in program.collectives():
        count, total = kinds.get(c.kind, (0, 0))
        kinds[c.kind] = count + c.times, total + c.times * c.bytes
        link_seconds += c.times * _seconds_to_send(c, topology)
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes
    peak += memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    return Plan(
        config=config,
        topology=topology,
        micro_batches=sharding.num_microbatches(config, mesh),
        params=params,
        opt_state=opt_state,
        temporaries=memory.temp_size_in_bytes,
        peak_memory=peak - memory.alias_size_in_bytes,
        flops=_flops(config) / mesh.size,
        traffic=program.traffic(),
        kernels=program.kernels().total(),
        collectives=kinds,
        link_seconds=link_seconds,
    )


def _seconds_to_send(c: Collective, topology: Topology) -> float:
    """By the slower of links and network. Of a machine's members each has a port of its own to the
    network; rings that span machines use all of these, other collectives one a device.
    """
    rate = topology.chip.link_rate
    machines = len({member // topology.machine for member in c.group})
    if machines > 1:
        is_ring = c.kind in ("all-reduce", "all-gather", "reduce-scatter")
        ports = len(c.group) / machines if is_ring else 1
        rate = min(rate, ports * topology.chip.network_rate)
    return c.bytes / (rate * EFFICIENCY["links"])


def state_bytes(config: Config, mesh: Mesh) -> tuple[int, int]:
    """Of the parameters and of the optimizer's state, on one device."""
    state = abstract_state(config, mesh)
    on_one = lambda a: math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize
    total = lambda tree: sum(map(on_one, jax.tree.leaves(tree)))
    return total(state["params"]), total(state["opt_state"])


def _flops(config: Config) -> float:
    """Of a step on all devices: the formula of MFU, and what `remat` computes a second time."""
    tokens = sharding.global_batch_size(config) * config.block_size
    attention = 4 * config.n_layer * config.n_embd * config.block_size  # its forward pass
    once = model.flops_per_token(config)
    again = {"none": 0, "dots": attention, "full": once / 3}[config.remat]
    return tokens * (once + again)


def usable_memory(chip: Chip) -> float:
    """Bytes of a device that JAX gives to arrays: on a GPU three quarters, unless told."""
    share = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75")
    return chip.memory * (float(share) if chip.platform == "gpu" else 15.75 / 16)


def fit(config: Config, topology: Topology, say: Callable[[str], None]) -> Plan:
    """The plan with the least recomputation that fits and then the largest micro-batch.

    Sequences a step stay as they are. Raises `UserError` if no micro-batch fits.
    """
    total = sharding.global_batch_size(config)
    mesh = sharding.make_mesh(config, topology.devices)
    share = total // (mesh.shape["data"] * mesh.shape["fsdp"])
    sizes = [n for n in range(1, share + 1) if share % n == 0]

    def attempt(remat: str, size: int) -> Plan | None:
        keys = {"remat": remat, "batch_size": size, "batch_tokens": 0}
        tried = config.replace(**keys, gradient_accumulation_steps=total // size)
        try:
            plan = make_plan(tried, topology)
            said, fits = f"{plan.peak_memory / GIB:.2f} GiB", plan.fits
        except DoesNotFitError as error:
            plan, said, fits = None, str(error), False
        say(f"remat={remat} batch_size={size}: {said}: {'fits' if fits else 'does not fit'}")
        return plan if fits else None

    for remat in ("none", "dots", "full"):
        best = attempt(remat, sizes[0])
        low, high = 0, len(sizes)  # sizes[low] fits, sizes[high] does not
        while best and high - low > 1:
            middle = (low + high) // 2
            plan = attempt(remat, sizes[middle])
            best, low, high = (plan, middle, high) if plan else (best, low, middle)
        if best:
            return best
    raise UserError(
        f"topology={topology.name!r}: one sequence a device does not fit, whatever is recomputed; "
        "split the state over more devices with --mesh=fsdp:N"
    )


def describe(plan: Plan) -> str:
    """The plan as lines for people."""
    c, topology, mesh = plan.config, plan.topology, plan.config.mesh or "data"
    devices, chip = len(topology.devices), topology.chip
    tokens = sharding.global_batch_size(c) * c.block_size
    wanted = tokens * model.flops_per_token(c) / devices / device.PEAK_FLOPS[chip.kind]
    mfu = [100 * wanted / seconds for seconds in plan.seconds]
    fast, slow = (1000 * seconds for seconds in plan.seconds)
    compute, memory = (1000 * s for s in plan.busy)
    verdict = "fits" if plan.fits else "does not fit"
    lines = [
        f"{devices} x {chip.kind}, mesh {mesh}, {c.dtype}, {c.attention} attention, "
        f"remat={c.remat}, scan_layers={c.scan_layers}",
        f"model: {model.count_params(c) / 1e6:,.1f}M parameters; step: {tokens:,} tokens in "
        f"{plan.micro_batches} micro-batches",
        "per device:",
        f"  parameters        {_size(plan.params)}",
        f"  optimizer state   {_size(plan.opt_state)}",
        f"  temporaries       {_size(plan.temporaries)}  activations, gradients, casts",
        f"  peak memory       {_size(plan.peak_memory)}  of {_size(usable_memory(chip))} that JAX "
        f"may use of {_size(chip.memory)}: {verdict}",
        f"  FLOPs a step      {plan.flops / 1e12:10.1f} T    by formula, recomputation included",
        f"  memory traffic    {_size(plan.traffic)}  a step, what kernels read and write",
        f"  kernels a step    {plan.kernels:10,}",
    ]
    for kind, (count, sent) in sorted(plan.collectives.items()):
        lines.append(f"  {kind:<17} {_size(sent)}  sent a step, in {count:,}")
    shares = ", ".join(f"{what} {100 * x:.0f}%" for what, x in EFFICIENCY.items())
    lines += [
        f"estimate: {fast:,.0f} ms a step if all overlaps, {slow:,.0f} ms if nothing does; MFU "
        f"{mfu[0]:.0f}% to {mfu[1]:.0f}%",
        f"  matmuls {compute:,.0f} ms, memory {memory:,.0f} ms, links "
        f"{1000 * plan.link_seconds:,.0f} ms; assumed, of the data sheet's rates: {shares}",
    ]
    return "\n".join(lines)


def _size(count: float) -> str:
    return f"{count / GIB:10.3f} GiB"


def run(config: Config, topology_name: str, search: bool, say: Callable[[str], None]) -> bool:
    """Prints the plan of a config on a topology; False if it does not fit.

    A config that names no mesh is planned with its state split over all devices, and with what
    `fit` finds, if whole copies of the state do not fit.
    """
    topology = find_topology(topology_name)
    config, notes = resolve(config, topology.chip)
    for note in notes:
        say(note)
    try:
        plan = fit(config, topology, say) if search else make_plan(config, topology)
        if not plan.fits and not config.mesh:  # XLA for GPUs compiles it all the same
            usable = usable_memory(topology.chip)
            raise DoesNotFitError(f"needs {plan.peak_memory / GIB:.2f} of {usable / GIB:.2f} GiB")
    except DoesNotFitError as error:
        params, opt_state = state_bytes(config, sharding.make_mesh(config, topology.devices))
        say(
            f"does not fit: {error}; parameters {params / GIB:.2f} GiB and optimizer state "
            f"{opt_state / GIB:.2f} GiB a device. --fit looks for what would"
        )
        if config.mesh:
            return False
        config, search = config.replace(mesh=f"fsdp:{len(topology.devices)}"), True
        say(f"so with --mesh={config.mesh} --fit:")
        plan = fit(config, topology, say)
    say(describe(plan))
    if search:
        keys = ("mesh", "remat", "batch_size", "gradient_accumulation_steps")
        values = dataclasses.asdict(plan.config)
        say("use: " + " ".join(f"--{key}={values[key]}" for key in keys if values[key]))
    return plan.fits
