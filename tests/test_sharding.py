"""Test the mesh, the micro-batches and the errors where sizes do not divide."""

import math
from types import SimpleNamespace

import helpers
import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgpt.config import Config, UserError
from jaxgpt.data.batch_size import global_batch_size, num_microbatches
from jaxgpt.runtime.mesh import AXES, local_mesh, make_mesh
from jaxgpt.sharding import param_sharding, update_sharding

DEVICES = 8  # see conftest.py
SIZES = st.integers(1, 60)


def make_config(**keys) -> Config:
    sizes = {"n_head": 4, "batch_size": 8, "gradient_accumulation_steps": 1, "mesh": ""}
    return helpers.make_config(**sizes | keys)


def refusal(config: Config, devices: list | None = None) -> str:
    with pytest.raises(UserError) as raised:
        make_mesh(config, devices)
    return str(raised.value)


# ---- the mesh --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mesh", "sizes"),
    [
        ("data:2", (2, 1, 1)),
        ("fsdp:4,tensor:2", (1, 4, 2)),
        ("tensor:2,data:2,fsdp:2", (2, 2, 2)),
        ("data:1", (1, 1, 1)),
        ("data:8", (8, 1, 1)),
    ],
)
def test_mesh_has_the_named_sizes_and_size_1_on_other_axes(mesh, sizes):
    made = make_mesh(make_config(mesh=mesh))
    assert tuple(made.shape[axis] for axis in AXES) == sizes
    assert made.axis_names == AXES
    devices = list(made.devices.flat)
    assert len(set(devices)) == len(devices)
    assert devices == jax.devices()[: len(devices)]


@given(SIZES, SIZES)
def test_default_cpu_mesh_uses_the_most_devices_that_divide_the_batch(batch, accumulation):
    total = batch * accumulation
    mesh = make_mesh(make_config(batch_size=batch, gradient_accumulation_steps=accumulation))
    assert mesh.shape["fsdp"] == mesh.shape["tensor"] == 1
    assert mesh.shape["data"] == max(n for n in range(1, DEVICES + 1) if total % n == 0)


def test_default_mesh_is_rejected_if_accelerators_do_not_divide_the_batch():
    """Accelerators are left idle only if the user names a smaller mesh."""
    gpus = [SimpleNamespace(platform="gpu")] * 3
    said = "mesh='': data x fsdp = 3 does not divide sequences per step = 8"
    assert refusal(make_config(), gpus) == f"{said}; expected a divisor of 8"


def test_multi_process_mesh_that_omits_devices_is_rejected():
    """A process without a device in the mesh could not take part."""
    theirs = [SimpleNamespace(platform="cpu", process_index=i // 4) for i in range(8)]
    said = refusal(make_config(mesh="data:2,fsdp:2"), theirs)
    assert said.startswith("mesh='data:2,fsdp:2': uses 2 x 2 = 4 of 8 devices; expected all of ")


def test_mesh_uses_the_given_devices():
    devices = jax.devices()[5:]
    assert list(make_mesh(make_config(mesh="data:2"), devices).devices.flat) == devices[:2]


# (keys, words of the message)
INVALID = [
    ({"mesh": "date:2"}, "unknown axis date; expected data, fsdp, tensor"),
    ({"mesh": "data:2,x:2"}, "unknown axis x; expected data, fsdp, tensor"),
    ({"mesh": "data:2,data:4"}, "names an axis twice; expected each axis at most once"),
    ({"mesh": "data:0"}, "data has size 0; expected at least 1"),
    ({"mesh": "fsdp:0,data:8"}, "fsdp has size 0; expected at least 1"),
    ({"mesh": "data:16"}, "needs 16 devices; expected at most the 8 that JAX finds"),
    (
        {"mesh": "data:4,tensor:4"},
        "needs 4 x 4 = 16 devices; expected at most the 8 that JAX finds",
    ),
    ({"mesh": "data:3"}, "data x fsdp = 3 does not divide sequences per step = 8"),
    (
        {"mesh": "data:2,fsdp:4", "batch_size": 6},
        "data x fsdp = 8 does not divide sequences per step = 6",
    ),
    ({"mesh": "fsdp:3", "batch_size": 9}, "fsdp = 3 does not divide n_embd = 16"),
    ({"mesh": "tensor:8"}, "tensor = 8 does not divide key-value heads = 4"),
    ({"mesh": "tensor:4", "n_kv_head": 2}, "tensor = 4 does not divide key-value heads = 2"),
    ({"mesh": "tensor:2", "mlp_dim": 5}, "tensor = 2 does not divide MLP width = 5"),
    (
        {"mesh": "tensor:3", "n_head": 3, "n_embd": 48},
        "tensor = 3 does not divide rows of the embedding = 128",
    ),
]


@pytest.mark.parametrize(("keys", "problem"), INVALID, ids=[problem for _, problem in INVALID])
def test_invalid_mesh_is_rejected_with_the_arithmetic(keys, problem):
    mesh = keys["mesh"]
    assert refusal(make_config(**keys)).startswith(f"mesh={mesh!r}: {problem}")


# ---- micro-batches ---------------------------------------------------------------------------


@st.composite
def batches(draw) -> tuple[Config, SimpleNamespace]:
    """Draw a config and a mesh whose size divides the sequences of a step."""
    config = make_config(batch_size=draw(SIZES), gradient_accumulation_steps=draw(SIZES))
    total = config.batch_size * config.gradient_accumulation_steps
    divisors = [n for n in range(1, total + 1) if total % n == 0]
    devices = draw(st.sampled_from(divisors))
    fsdp = draw(st.sampled_from([n for n in divisors if devices % n == 0]))
    shape = {"data": devices // fsdp, "fsdp": fsdp, "tensor": draw(SIZES)}
    gpu = SimpleNamespace(platform="gpu")
    return config, SimpleNamespace(
        shape=shape, size=math.prod(shape.values()), devices=np.array([gpu])
    )


@given(batches())
def test_micro_batches_cover_all_sequences_and_are_as_few_as_possible(case):
    config, mesh = case
    total, devices = global_batch_size(config), mesh.shape["data"] * mesh.shape["fsdp"]
    assert total == config.batch_size * config.gradient_accumulation_steps
    count = num_microbatches(config, mesh)
    share, rest = divmod(total, count * devices)
    assert rest == 0
    assert 1 <= share <= config.batch_size
    for fewer in range(1, count):  # fewer micro-batches are not possible
        assert total % (fewer * devices) or total // (fewer * devices) > config.batch_size


@pytest.mark.parametrize(("length", "count"), [(8, 1), (64, 1), (256, 4), (1024, 16), (4096, 32)])
def test_cpu_micro_batches_limit_tokens_per_core(length, count):
    config = make_config(batch_size=64, block_size=length, mesh="data:2")
    assert num_microbatches(config, make_mesh(config)) == count


@given(SIZES, SIZES)
def test_local_mesh_micro_batches_equal_gradient_accumulation_steps(batch, accumulation):
    config = make_config(batch_size=batch, gradient_accumulation_steps=accumulation)
    assert num_microbatches(config, local_mesh()) == accumulation


@given(SIZES, SIZES, SIZES)
def test_batch_tokens_overrides_gradient_accumulation_steps(batch, block, steps):
    keys = {"batch_size": batch, "block_size": block, "batch_tokens": batch * block * steps}
    config = make_config(**keys, gradient_accumulation_steps=7)
    assert global_batch_size(config) * block == config.batch_tokens
    assert global_batch_size(config.replace(batch_tokens=0)) == 7 * batch


# ---- layouts ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axes", "shape", "shard"),
    [
        ("VD", (128, 16), (64, 4)),  # the embedding
        ("TD", (8, 16), (8, 4)),  # learned positions
        ("DCNH", (16, 3, 4, 4), (4, 3, 2, 4)),  # queries, keys and values
        ("DCKH", (16, 2, 2, 4), (4, 2, 1, 4)),  # keys and values of grouped heads
        ("NHD", (4, 4, 16), (2, 4, 4)),  # attention's output
        ("DF", (16, 64), (4, 32)),  # up
        ("FD", (64, 16), (32, 4)),  # down
        ("LFD", (3, 64, 16), (3, 32, 4)),  # down, of all layers together
        ("F", (64,), (32,)),  # the bias of up
        ("CNH", (3, 4, 4), (3, 2, 4)),  # the bias of queries, keys and values
        ("D", (16,), (16,)),  # a norm, or a bias of what goes into the residual stream
        ("LD", (3, 16), (3, 16)),  # those of all layers together
        ("DD", (16, 16), (4, 16)),  # of a model of one's own: an axis of the mesh splits one axis
        ("VF", (128, 64), (64, 64)),
        ("", (), ()),
    ],
)
def test_parameter_shard_shapes_follow_the_mesh_axes(axes, shape, shard):
    mesh = make_mesh(make_config(mesh="fsdp:4,tensor:2"))
    assert param_sharding(mesh, axes).shard_shape(shape) == shard
    whole = make_mesh(make_config(mesh="data:8"))
    assert param_sharding(whole, axes).shard_shape(shape) == shape


@pytest.mark.parametrize(
    ("mesh", "axes", "shape", "shard"),
    [
        ("data:4", "VD", (128, 16), (32, 16)),
        ("data:4", "NHD", (2, 8, 16), (2, 2, 16)),  # two heads cannot be split
        ("data:4", "LDF", (4, 16, 64), (4, 4, 64)),  # layers are never split
        ("data:4", "D", (16,), (4,)),
        ("data:4", "", (), ()),
        ("data:4", "D", (6,), (6,)),  # nothing can be split
        ("data:4", " ", (16,), (4,)),  # an axis without a letter
        ("data:2,fsdp:2", "DF", (16, 64), (4, 64)),  # D is split by fsdp, and then by data
        ("data:2,fsdp:4", "DF", (4, 64), (1, 32)),  # fsdp leaves nothing of D to split
        ("data:2,tensor:2", "DF", (16, 64), (8, 32)),
        ("data:2,fsdp:2,tensor:2", "FD", (64, 16), (16, 8)),
    ],
)
def test_update_splits_the_first_axis_that_data_divides(mesh, axes, shape, shard):
    sharding = update_sharding(make_mesh(make_config(mesh=mesh)), axes, shape)
    assert sharding.shard_shape(shape) == shard
