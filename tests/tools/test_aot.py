"""Test the compiled training step for hardware that is not present, and for the CPU.

With the extra `cuda` or `tpu` XLA compiles for an H100 or a TPU on any machine. The tests check
the structure of the real step, but no times and nothing that matmul tuning would change.
"""

import math
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import ROOT
from jax.sharding import NamedSharding, PartitionSpec

from jaxgpt import model, sample, sharding
from jaxgpt.config import Config, UserError
from jaxgpt.runtime.config_file import load_config_file
from jaxgpt.runtime.mesh import make_mesh
from jaxgpt.tools import plan
from jaxgpt.tools.hlo import CUBLAS, KernelGroup, Op, Program
from jaxgpt.train_step import abstract_state, cast_params

B, T, N, V, MICRO = 12, 1024, 12, 50304, 2


@dataclass
class Step:
    """A compiled step with its program and memory analysis."""

    config: Config
    program: Program
    memory: Any
    leaves: int  # arrays of the state
    state_bytes: int


def compile_for(devices: list, config: Config) -> Step:
    mesh = make_mesh(config, devices)
    compiled = plan.compile_step(config, mesh)
    state = jax.tree.leaves(abstract_state(config, mesh))
    size = sum(plan.state_bytes(config, mesh))
    text = compiled.as_text() or ""
    return Step(config, Program(text), compiled.memory_analysis(), len(state), size)


@cache
def compiled(topology: str, layers: int, mesh: str = "") -> Step:
    """Compile GPT-2's step with two micro-batches per device; skip if the compiler is missing."""
    over_batch = len(find(topology).devices) // (2 if "tensor:2" in mesh else 1)
    return absent_step(topology, MICRO * over_batch, n_layer=layers, mesh=mesh)


def gpt2(**keys) -> Config:
    return load_config_file(str(ROOT / "configs" / "gpt2.py"))["config"].replace(**keys)


def absent_step(topology: str, accumulation: int = 1, **keys) -> Step:
    """Compile GPT-2's step with these keys; skip the test if the compiler is missing."""
    there = find(topology)
    config = gpt2(gradient_accumulation_steps=accumulation, **keys)
    config, _ = plan.resolve(config, there.chip)
    with optimized():
        return compile_for(there.devices, config)


def find(topology: str) -> plan.Topology:
    try:
        return plan.find_topology(topology)
    except UserError as error:
        pytest.skip(str(error))


@contextmanager
def optimized():
    """Turn on XLA's optimisations, as users have them; conftest.py turns them off."""
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", True)


BABY = {"block_size": 256, "n_embd": 384, "n_head": 6, "vocab_size": 65}
ONE = [
    pytest.param("h100:1", 12, marks=pytest.mark.slow),
    ("v5e:1x1", 2),
]
EIGHT = [("h100:8", 2), ("v5e:2x4", 2)]
aot = pytest.mark.aot
on_all = pytest.mark.parametrize(("topology", "layers"), ONE + EIGHT)
on_eight = pytest.mark.parametrize(("topology", "layers"), EIGHT)


@aot
@on_all
def test_attention_compiles_to_flash_kernels_forward_and_backward(topology, layers):
    calls, runs = Counter(), layers * MICRO
    for op, times in compiled(topology, layers).program.executed():
        calls[op.target] += times
    if topology.startswith("h100"):
        assert calls["__cudnn$fmhaSoftmax"] == calls["__cudnn$fmhaSoftmaxBackward"] == runs
    else:
        assert calls["tpu_custom_call"] == 3 * runs  # forward; backward for q; for k and v


@aot
@pytest.mark.parametrize("mesh", ["fsdp:8", "data:2,fsdp:2,tensor:2"])
@pytest.mark.parametrize("topology", ["h100:8", "v5e:2x4"])
def test_flash_kernels_process_only_local_sequences_and_heads(topology, mesh):
    step = compiled(topology, 1, mesh)
    flash = [
        (op, times)
        for op, times in step.program.executed()
        if "fmha" in op.target or op.target == "tpu_custom_call"
    ]
    assert sum(times for _, times in flash) == (2 if topology == "h100:8" else 3) * MICRO
    heads = N // 2 if "tensor:2" in mesh else N
    for op, _ in flash:
        wide = [dims for kind, dims in op.shapes if kind == "bf16"]
        assert {math.prod(dims) for dims in wide} == {B * T * heads * 64}


@aot
@on_all
def test_no_float32_logits_or_full_attention_weights_are_materialised(topology, layers):
    arrays = compiled(topology, layers).program.arrays()
    assert not [a for a in arrays if a[0] == "f32" and math.prod(a[1]) >= B * T * V]
    assert not [a for a in arrays if a[1].count(T) > 1 and math.prod(a[1]) >= B * N * T * T]
    assert [a for a in arrays if a[0] == "bf16" and math.prod(a[1]) == B * T * V]  # a control


@aot
@on_all
def test_weights_are_cast_outside_the_micro_batch_loop(topology, layers):
    """No kernel in the loop over micro-batches casts a float32 weight to bfloat16."""
    program = compiled(topology, layers).program
    casts = {name: count_casts(program, name) for name in program.execution_counts}
    loops = [name for name, times in program.execution_counts.items() if times == MICRO]
    assert loops
    assert not any(casts[name] for name in loops)
    assert casts[program.entry] >= 4 * layers


def count_casts(program: Program, name: str) -> int:
    """Count the kernels that read a large float32 array and return its bfloat16 cast."""
    ops = program.computations[name]

    def is_cast(op: Op) -> bool:
        halves = {math.prod(dims) for kind, dims in op.shapes if kind == "bf16"}
        wides = [ops[o].shapes for o in op.operands if o in ops and op.is_kernel]
        read = {math.prod(dims) for s in wides if len(s) == 1 for kind, dims in s if kind == "f32"}
        return bool({size for size in halves & read if size >= 768 * 768 and size % (B * T * 768)})

    return sum(map(is_cast, ops.values()))


@aot
def test_gpu_reads_logits_once_for_the_loss_and_its_gradient():
    program = compiled("h100:1", 2).program
    readers = [
        op
        for name in program.execution_counts
        for op in program.computations[name].values()
        if op.is_kernel and not is_product(program, op)
        if any(size_of(program, name, o) == ("bf16", B * T * V) for o in op.operands)
    ]
    assert len(readers) == 1


def is_product(program: Program, op: Op) -> bool:
    fused = program.computations[op.called[0]].values() if op.called else [op]
    return any(o.opcode == "dot" or o.target.startswith(CUBLAS) for o in fused)


def size_of(program: Program, computation: str, name: str) -> tuple[str, int]:
    op = program.computations[computation].get(name)
    kind, dims = op.shapes[0] if op and op.shapes else ("", ())
    return kind, math.prod(dims)


@aot
def test_gpu_norms_materialise_no_float32_residual_stream():
    arrays = compiled("h100:1", 2).program.arrays()
    assert not [a for a in arrays if a[0] == "f32" and math.prod(a[1]) == B * T * 768]
    assert [a for a in arrays if a[0] == "bf16" and math.prod(a[1]) == B * T * 768]  # a control


@aot
def test_tanh_gelu_has_no_more_gpu_memory_traffic_than_erf_gelu():
    erf, tanh = (absent_step("h100:1", n_layer=1, mlp=mlp) for mlp in ("gelu", "gelu_tanh"))
    assert tanh.program.traffic() < 1.001 * erf.program.traffic()


@aot
@pytest.mark.parametrize(("batch", "keys"), [(32, {}), (48, BABY)], ids=["GPT-2", "the baby GPT"])
def test_gpu_residual_stream_never_has_the_batch_axis_innermost(batch, keys):
    """From 32 sequences on, XLA's default choice is to put the batch innermost."""
    step = absent_step("h100:1", n_layer=1, batch_size=batch, **keys)
    shapes = {dims for _, dims in step.program.arrays() if len(dims) > 1}
    stream = batch * step.config.block_size * step.config.n_embd
    last = {dims[-1] for dims in shapes if math.prod(dims) == stream}
    assert last
    assert batch not in last


@aot
@pytest.mark.parametrize("keys", [{"dropout": 0.2}, {"document_mask": True, "eot_id": 0}], ids=str)
def test_gpu_attention_with_dropout_or_documents_makes_no_array_of_two_lengths(keys):
    for attention, makes_weights in {"auto": False, "reference": True}.items():
        step = absent_step("h100:1", **BABY, n_layer=1, attention=attention, **keys)
        made = [dims for _, dims in step.program.arrays() if dims.count(256) == 2]
        assert bool(made) == makes_weights


@aot
@on_eight
def test_gradients_are_all_reduced_once_per_step(topology, layers):
    """All-reduces run once per step; they sum the gradients and the tied table's gradient."""
    step = compiled(topology, layers)
    reduces = step.program.collectives()
    assert {c.kind for c in reduces} == {"all-reduce"}
    assert {c.times for c in reduces} == {1}
    params = step.state_bytes // 3
    most = 2 * (params + 4 * V * 768) * 7 / 8
    assert 0.4 * most < sum(c.bytes for c in reduces) < 1.01 * most


@aot
@pytest.mark.parametrize(
    ("topology", "layers", "reduced"), [("h100:8", 2, 0.001), ("v5e:2x4", 1, 0.1)]
)
def test_shard_optimizer_scatters_gradients_and_gathers_parameters_once(topology, layers, reduced):
    """A TPU all-reduces one kernel of each block, because D is the last axis of its gradient.

    `reduced` bounds the bytes of all-reduces as a part of those of the reduce-scatters.
    """
    step = absent_step(topology, MICRO * 8, n_layer=layers, shard_optimizer=True)
    assert_donated(step)
    found = step.program.collectives()
    assert {c.times for c in found} == {1}
    sent = Counter()
    for c in found:
        sent[c.kind] += c.bytes
    params = 0.8 * step.state_bytes  # the moments' shares are a quarter of the parameters
    once = params * 7 / 8
    assert 0.85 * once < sent["reduce-scatter"] < 1.02 * once
    assert 0.95 * once < sent["all-gather"] < 1.02 * once
    assert sent["all-reduce"] < reduced * once


@aot
@pytest.mark.parametrize("topology", ["h100:1", "h100:8"])
def test_muon_multiplies_all_matrices_of_a_shape_at_once_and_each_device_its_share(topology):
    """Two layers have eight matrices of D x D, for query, key, value and output, and four of D x F.

    An iteration of Newton-Schulz on matrices I x J multiplies I x J x I, I x I x I and I x I x J.
    """
    adamw = products(compiled(topology, 2))
    devices = len(find(topology).devices)
    muon = products(absent_step(topology, MICRO * devices, n_layer=2, optimizer="muon"))
    D, F = 768, 3072
    iterations = 5
    flops = 0
    for matrices, J in ((8, D), (4, F)):
        per_device = math.ceil(matrices / devices)
        flops += iterations * per_device * (4 * D * D * J + 2 * D**3)
    assert muon.flops - adamw.flops == pytest.approx(flops, rel=1e-6)
    assert muon.kernels - adamw.kernels == iterations * 3 * 2


def products(step: Step) -> KernelGroup:
    return step.program.breakdown(lambda *_: 0.0)["matmuls"]


@aot
@on_all
def test_train_state_is_updated_in_place_on_accelerators(topology, layers):
    assert_donated(compiled(topology, layers))


@aot
@pytest.mark.slow
def test_gpt2_on_an_h100_stays_below_memory_kernel_and_traffic_bounds():
    """The bounds are a tenth above the current figures, with two micro-batches."""
    step = compiled("h100:1", 12)
    assert step.memory.temp_size_in_bytes < 6.5e9
    assert step.program.kernels().total() < 1170
    assert step.program.traffic() < 72e9


@aot
def test_gpu_neither_splits_nor_concatenates_query_key_and_value():
    """Each part has a product of its own, so no array has the size of all three together."""
    sizes = {}
    for batch in (8, 32):
        arrays = absent_step("h100:1", n_layer=1, batch_size=batch).program.arrays()
        fused = batch * T * 3 * N * 64
        sizes[batch] = [a for a in arrays if a[0] == "bf16" and math.prod(a[1]) == fused]
    assert sizes[8]  # a control: a small batch has the fused product
    assert not sizes[32]


@aot
@pytest.mark.parametrize("topology", ["h100:1", "h100:8"])
@pytest.mark.parametrize("is_exact", [False, True])
def test_deterministic_gpu_step_has_no_scatter_that_adds_in_any_order(topology, is_exact):
    """A scatter to distinct places adds nothing twice. XLA applies the option to cuDNN itself."""
    program = absent_step(topology, 8, n_layer=1, deterministic=is_exact).program
    ops = [op for name in program.computations for op in program.computations[name].values()]
    scatters = [op for op in ops if op.opcode == "scatter"]
    assert scatters
    assert all("unique_indices=true" in op.attributes for op in scatters) == is_exact


@aot
def test_default_xla_options_multiply_by_triton_and_tuned_ones_by_cublas():
    targets = {}
    for xla in ("tuned", "default"):
        step = absent_step("h100:1", n_layer=1, xla=xla)
        targets[xla] = {op.target for op, _ in step.program.executed() if op.is_kernel}
    assert "__cublas$lt$matmul" in targets["tuned"]
    assert "__cublas$lt$matmul" not in targets["default"]


@aot
def test_most_of_the_gradient_sums_on_gpus_hide_behind_compute():
    """One micro-batch of 32 sequences per GPU, as in docs/performance.md; 2 of GPT-2's layers."""
    there = find("h100:8")
    found = absent_step("h100:8", 8, n_layer=2, batch_size=32).program.overlap(
        partial(plan.kernel_seconds, there.chip), partial(plan.seconds_to_send, topology=there)
    )
    reduces = found["all-reduce"]
    assert reduces.asynchronous == reduces.calls
    assert reduces.hidden > 0.4 * reduces.seconds


@aot
def test_decoding_a_token_rewrites_no_cache_and_launches_few_kernels():
    layers = 2
    chunk = decoding("h100:1", layers)
    past = N, T + sample.CHUNK, 64
    names = [name for name, times in chunk.execution_counts.items() if times == sample.CHUNK]
    loop = [op for name in names for op in chunk.computations[name].values() if op.is_kernel]
    assert past in [dims for _, dims in chunk.arrays()]  # a control
    assert past not in [dims for op in loop for _, dims in op.shapes]
    assert 10 * layers < len(loop) < 11 * layers + 25


def decoding(topology: str, layers: int) -> Program:
    """Compile a chunk of one sequence, in GPT-2's shape."""
    there, params = find(topology), sample.SamplingParams(temperature=0.8, top_k=200)
    config, _ = plan.resolve(gpt2(n_layer=layers, vocab_size=50257), there.chip)
    mesh = make_mesh(config, there.devices)
    graphdef, _, _ = model.abstract_model(config)

    def arguments() -> tuple:
        weights = cast_params(model.init_params(config, jax.random.key(0)), config.dtype)
        state = sample.initial_state([np.zeros(1, np.int32)], params, 0, config, T)
        state, past = sample.prefill(nnx.merge(graphdef, weights), state, 2)
        return weights, state, past, jnp.ones(1, bool)

    def decode(weights: dict, state: sample.DecodeState, past: list, active_B: jax.Array):
        network = nnx.merge(graphdef, weights)
        return sample.decode_chunk(network, state, past, active_B, params, T)

    everywhere = NamedSharding(mesh, PartitionSpec())
    place = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere)
    traced = sharding.use_mesh(mesh)(arguments), sharding.use_mesh(mesh)(decode)
    with optimized():
        shapes = jax.tree.map(place, jax.eval_shape(traced[0]))
        lowered = jax.jit(traced[1], donate_argnums=(1, 2)).lower(*shapes)
        return Program(plan.compile_absent(lowered, mesh).as_text() or "")


def assert_donated(step: Step) -> None:
    assert step.program.header.count("-alias)") == step.leaves
    assert step.memory.alias_size_in_bytes >= step.state_bytes


# ---- on the CPU ------------------------------------------------------------------------------

TINY = Config(
    vocab_size=300, block_size=32, n_layer=2, n_head=2, n_embd=64, batch_size=8,
    gradient_accumulation_steps=16, attention="reference", dtype="float32",
)  # fmt: skip


@cache
def on_cpu(mesh: str) -> Step:
    return compile_for(jax.devices(), TINY.replace(mesh=mesh))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data:1", "data:8", "fsdp:8", "data:2,fsdp:2,tensor:2"])
def test_train_state_is_updated_in_place_on_a_cpu(mesh):
    assert_donated(on_cpu(mesh))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data:8", "fsdp:8", "data:2,fsdp:4"])
def test_no_device_holds_mlp_activations_beyond_the_local_batch(mesh):
    """The MLP's hidden layer [B, T, 4D] holds the 8 sequences of a device and no more."""
    share = 8 * 32 * 4 * 64
    sizes = {math.prod(dims) for _, dims in on_cpu(mesh).program.arrays() if {256, 32} <= {*dims}}
    assert share in sizes
    assert max(sizes) <= share
