"""Test that a mesh changes only rounding, and that XLA uses only the expected collectives.

B sequences per device, G sequences per micro-batch on all devices, T length, D embedding,
V padded vocabulary.
"""

import math
from collections import Counter
from functools import cache
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_trees_close, call_step
from jax.sharding import NamedSharding, PartitionSpec

from jaxgpt import sharding
from jaxgpt.config import Config
from jaxgpt.data import batch_size
from jaxgpt.runtime.checkpoint import Checkpoints
from jaxgpt.runtime.mesh import make_mesh
from jaxgpt.tools import plan
from jaxgpt.tools.hlo import COLLECTIVES, Program, replica_groups
from jaxgpt.train_step import (
    TrainState,
    abstract_state,
    init_state,
    make_eval_step,
    make_train_step,
)

T, D, V, SEQUENCES, STEPS = 12, 40, 384, 16, 4
TINY = Config(
    vocab_size=300, block_size=T, n_layer=1, n_head=4, n_embd=D, mlp_dim=88, dropout=0.2,
    batch_size=1, gradient_accumulation_steps=SEQUENCES, learning_rate=1e-3, warmup_iters=2,
    attention="reference", dtype="float64", mesh="data:1",
)  # fmt: skip
LLAMA = {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "n_kv_head": 2, "bias": False}
LLAMA |= {"tie_embeddings": False, "scan_layers": True, "remat": "full"}
ALL_AXES = "data:2,fsdp:2,tensor:2"
MESHES = "data:2", "data:8", "fsdp:8", "tensor:4", "fsdp:2,tensor:2", ALL_AXES


# ---- equal runs ------------------------------------------------------------------------------


def batch(config: Config, step: int) -> jax.Array:
    """Return the windows of a step, sharded over the mesh, with equal values on every mesh."""
    mesh = make_mesh(config)
    rng, micro = np.random.default_rng(step), batch_size.num_microbatches(config, mesh)
    windows = rng.integers(0, config.vocab_size, (SEQUENCES, T + 1), np.int32)
    windows = windows.reshape(1, micro, SEQUENCES // micro, T + 1)
    place = NamedSharding(mesh, PartitionSpec(None, None, sharding.BATCH))
    return jax.device_put(windows, place)


def take_steps(config: Config, state: TrainState, steps: range) -> tuple[TrainState, list[dict]]:
    train_step, rows = make_train_step(config, make_mesh(config)), []
    for step in steps:
        state, metrics = call_step(train_step, state, batch(config, step))
        rows.append({name: float(value[0]) for name, value in metrics.items()})
    return state, rows


@cache
def run(config: Config) -> tuple[dict, list[dict]]:
    """Return the parameters after some training steps, on the host, and the metrics of each."""
    with jax.enable_x64(config.dtype == "float64"):
        state = init_state(config, make_mesh(config))
        state, rows = take_steps(config, state, range(STEPS))
        return jax.device_get(state.params), rows


def assert_same(ours: tuple[dict, list], theirs: tuple[dict, list], tolerance: float) -> None:
    for got, want in zip(ours[1], theirs[1], strict=True):
        assert got == pytest.approx(want, rel=tolerance, abs=0)
    assert_trees_close(ours[0], theirs[0], tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_training_is_equal_on_every_mesh(mesh):
    """Losses, gradient norms and parameters are equal in float64, with dropout."""
    assert_same(run(TINY.replace(mesh=mesh)), run(TINY), 1e-9)


@pytest.mark.slow
def test_muon_training_is_equal_on_a_mesh():
    config = TINY.replace(optimizer="muon")
    assert_same(run(config.replace(mesh=ALL_AXES)), run(config), 1e-9)


@pytest.mark.slow
def test_float32_training_on_a_mesh_is_equal_up_to_rounding():
    """Biases are off: the gradient of the key bias is only rounding, which AdamW scales up."""
    config = TINY.replace(dtype="float32", bias=False)
    assert_same(run(config.replace(mesh="fsdp:4,tensor:2")), run(config), 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data:4,fsdp:2", ALL_AXES])
def test_llama_like_training_is_equal_on_a_mesh(mesh):
    """The layers are also scanned and recomputed."""
    config = TINY.replace(**LLAMA, n_layer=2)
    assert_same(run(config.replace(mesh=mesh)), run(config), 1e-9)


@pytest.mark.slow
def test_dropout_changes_the_loss_measurably():
    losses = [run(config)[1][0]["loss"] for config in (TINY, TINY.replace(dropout=0.0))]
    assert abs(losses[0] - losses[1]) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp:8", ALL_AXES])
def test_evaluation_is_equal_on_every_mesh(mesh):
    def total(config: Config) -> tuple[float, int]:
        with jax.enable_x64(True):
            mesh = make_mesh(config)
            windows_UMBT = batch(config, 0)[0][:, None]
            eval_step = make_eval_step(config, mesh)
            loss, targets = call_step(eval_step, init_state(config, mesh).params, windows_UMBT)
            return float(loss), int(targets)

    want, targets = total(TINY)
    assert targets == SEQUENCES * T
    assert total(TINY.replace(mesh=mesh)) == pytest.approx((want, targets), rel=1e-12)


@pytest.mark.slow
def test_checkpoint_resumes_on_another_mesh_with_equal_results(tmp_path):
    before = TINY.replace(mesh="fsdp:8")
    with jax.enable_x64(True):
        state = init_state(before, make_mesh(before))
        state, _ = take_steps(before, state, range(STEPS - 1))
        checkpoints = Checkpoints(tmp_path)
        items = {"params": state.params, "opt_state": state.opt_state}
        checkpoints.save(items, {"step": STEPS - 1, "config": before.to_dict()}, best=False)
        checkpoints.wait()
        for mesh in ("data:1", "data:2,fsdp:2,tensor:2"):
            after = TINY.replace(mesh=mesh)
            abstract = abstract_state(after, make_mesh(after))
            wanted = {"params": abstract.params, "opt_state": abstract.opt_state}
            restored = checkpoints.restore(wanted, STEPS - 1)
            state = TrainState(**restored, step=jnp.int32(STEPS - 1))
            state, rows = take_steps(after, state, range(STEPS - 1, STEPS))
            params, whole = run(TINY)
            assert_same((jax.device_get(state.params), rows), (params, whole[-1:]), 1e-9)


# ---- the update split over data --------------------------------------------------------------

SHARDED = list(
    product(
        (
            {},
            {"optimizer": "muon"},
            {"scan_layers": True, "n_layer": 2},
            {"freeze": "blocks/0/attn|ln_f"},
        ),
        ("data:2", "data:4", "data:2,fsdp:2", "data:2,tensor:2"),
    )
)


@pytest.mark.slow
@pytest.mark.parametrize(("keys", "mesh"), SHARDED, ids=str)
def test_shard_optimizer_changes_no_result(keys, mesh):
    """The runs have dropout, clipping and several micro-batches per device."""
    config = TINY.replace(**keys)
    assert_same(run(config.replace(mesh=mesh, shard_optimizer=True)), run(config), 1e-9)


def share(tree: dict) -> float:
    """Return the fraction of a tree's bytes that one device holds."""
    arrays = jax.tree.leaves(tree)
    held = sum(a.addressable_shards[0].data.nbytes for a in arrays)
    return held / sum(a.nbytes for a in arrays)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_shard_optimizer_splits_moments_and_keeps_parameters(optimizer):
    """The shares are those of the initial state and of the state after a step."""
    keys = {"optimizer": optimizer, "dtype": "float32", "shard_optimizer": True}
    for mesh, params, moments in ("data:4", 1, 1 / 4), ("data:2,fsdp:2", 1 / 2, 1 / 4):
        config = TINY.replace(**keys, mesh=mesh)
        state = init_state(config, make_mesh(config))
        for _ in range(2):
            assert share(state.params) == pytest.approx(params, abs=0.02)
            assert share(state.opt_state) == pytest.approx(moments, abs=0.02)
            state, _ = take_steps(config, state, range(1))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_nonfinite_step_changes_no_split_array(optimizer):
    keys = {"optimizer": optimizer, "dtype": "float32", "shard_optimizer": True}
    config = TINY.replace(**keys, mesh="data:4", max_nonfinite_steps=1)
    state, _ = take_steps(config, init_state(config, make_mesh(config)), range(1))
    state.params["ln_f"]["scale"] *= jnp.inf
    before = jax.device_get(state)
    state, rows = take_steps(config, state, range(1))
    assert not np.isfinite(rows[0]["loss"])
    after = jax.device_get(state)
    assert after.step == before.step + 1
    floats = lambda state: [a for a in jax.tree.leaves(state) if a.dtype == np.float32]
    jax.tree.map(np.testing.assert_array_equal, floats(after), floats(before))


@pytest.mark.slow
def test_checkpoint_resumes_with_the_other_shard_optimizer(tmp_path):
    """The restored arrays have the same bits, and the shardings of the new config."""
    for i, (before, after) in enumerate([("data:4", "data:2"), ("data:2", "data:4")]):
        keys = {"dtype": "float32"}
        old = TINY.replace(**keys, mesh=before, shard_optimizer=before == "data:4")
        new = TINY.replace(**keys, mesh=after, shard_optimizer=after == "data:4")
        state, _ = take_steps(old, init_state(old, make_mesh(old)), range(1))
        items = {"params": state.params, "opt_state": state.opt_state}
        checkpoints = Checkpoints(tmp_path / str(i))
        checkpoints.save(items, {"step": 1, "config": old.to_dict()}, best=False)
        checkpoints.wait()
        abstract = abstract_state(new, make_mesh(new))
        wanted = {"params": abstract.params, "opt_state": abstract.opt_state}
        restored = checkpoints.restore(wanted, 1)
        jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, (restored, items)))
        for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(wanted), strict=True):
            assert got.sharding.is_equivalent_to(want.sharding, got.ndim)
        resumed = TrainState(**restored, step=jnp.int32(1))
        _, rows = take_steps(new, resumed, range(1, 2))
        _, want = take_steps(old, state, range(1, 2))
        assert rows[0] == pytest.approx(want[0], rel=1e-5)


# ---- collectives -----------------------------------------------------------------------------


B, MICRO = 2, 2  # for the inspected programs: two micro-batches on every mesh


class Compiled:
    """The program of a float32 training step on a mesh, and the shapes that matter in it."""

    def __init__(self, sizes: str):
        config = TINY.replace(mesh=sizes, dtype="float32")
        mesh = make_mesh(config)
        self.over_batch = mesh.shape["data"] * mesh.shape["fsdp"]
        keys = {"batch_size": B, "gradient_accumulation_steps": MICRO * self.over_batch}
        config = config.replace(**keys)
        assert batch_size.num_microbatches(config, mesh) == MICRO
        self.program = Program(plan.compile_step(config, mesh).as_text() or "")
        params = jax.tree.leaves(abstract_state(config, mesh).params)
        self.whole = Counter(p.shape for p in params)
        self.split = Counter(p.shape for p in params if not p.sharding.is_fully_replicated)
        self.params = sum(math.prod(p.shape) for p in params)

    def moved(self, kind: str) -> Counter:
        """Count the float results of a kind of collective by (shape, devices per group)."""
        found = Counter()
        for op, times in self.program.executed():
            members = replica_groups(op.attributes, self.program.devices).shape[1]
            if op.opcode.removesuffix("-start") == kind and members > 1:
                for element, dims in op.shapes:
                    found[dims, members] += times * element.startswith("f")
        return +found

    def kinds(self) -> set[str]:
        return {kind for kind in COLLECTIVES if self.moved(kind)}


compiled = cache(Compiled)


def test_data_mesh_reduces_gradients_once_per_step_in_one_array():
    """This is for a CPU; on GPUs and TPUs XLA combines the arrays (see test_aot.py)."""
    step = compiled("data:8")
    assert step.kinds() == {"all-reduce"}
    numbers = step.params + 2  # the gradients, the loss and its count
    assert step.moved("all-reduce") == {((numbers,), 8): 1}


def unordered(times: dict[tuple[int, ...], int]) -> Counter:
    """Count shapes in any axis order: a gradient may be summed before a transpose."""
    return Counter(tuple(sorted(shape)) for shape in Counter(times).elements())


@pytest.mark.slow
def test_fsdp_gathers_parameters_once_and_sums_gradients_per_micro_batch():
    """XLA:CPU sums whole gradients and then slices; GPUs and TPUs use reduce-scatter.

    The embedding lookup needs neither, because devices exchange parts of the rows.
    """
    step = compiled("fsdp:4")
    assert step.kinds() == {"all-gather", "all-reduce", "all-to-all"}
    assert step.moved("all-gather") == {(shape, 4): n for shape, n in step.split.items()}
    sums = {shape: n for (shape, _), n in step.moved("all-reduce").items() if shape}
    assert unordered(sums) == unordered({shape: n * MICRO for shape, n in step.whole.items()})
    rows = sum(math.prod(dims) * n for (dims, _), n in step.moved("all-to-all").items())
    assert rows == 2 * MICRO * B * T * D  # there and back


def test_tensor_mesh_sums_activations_twice_per_block_and_direction():
    """The lookup and the output map also sum activations; the loss sums 3 numbers per token."""
    step = compiled("tensor:2")
    assert step.kinds() == {"all-reduce"}
    sums = {shape: n for (shape, _), n in step.moved("all-reduce").items() if shape}
    assert sums == {(B, T, D): MICRO * (4 + 2), (B, T): MICRO * 3}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp:4", "data:2,fsdp:2", ALL_AXES])
def test_no_device_holds_activations_of_the_whole_batch(mesh):
    """An array of all sequences may exist only if it is split over D."""
    step = compiled(mesh)
    G = B * step.over_batch
    arrays = [dims for kind, dims in step.program.arrays() if kind == "f32" and T in dims]
    assert not [dims for dims in arrays if G in dims and math.prod(dims) > B * T * D]
    assert [dims for dims in arrays if dims == (B, T, D)]  # a control


@pytest.mark.parametrize("mesh", ["tensor:2", ALL_AXES])
def test_tensor_mesh_device_holds_no_whole_matrix_or_logits(mesh):
    step = compiled(mesh)
    arrays = {dims for kind, dims in step.program.arrays() if kind == "f32"}
    table = {shape for shape in step.split if shape != (T, D)}  # positions are split by fsdp alone
    assert not arrays & table
    assert not [dims for dims in arrays if dims[-1:] == (V,) and T in dims]
    assert (B, T, V // 2) in arrays
