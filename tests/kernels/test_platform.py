"""Test the target platform of a trace, and the effect of the mesh on a trace."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import make_config
from jax.sharding import PartitionSpec

from jaxgpt import kernels
from jaxgpt.kernels import ANY, TABLE
from jaxgpt.kernels import platform as platform_module
from jaxgpt.kernels.platform import (
    current_platform,
    is_partitioned,
    platform_of,
    target_platform,
)
from jaxgpt.runtime.mesh import make_mesh
from jaxgpt.sharding import BATCH, constrain, constrain_batch, use_mesh


def test_target_platform_nests_and_defaults_to_the_jax_backend():
    assert current_platform() == "cpu"
    with target_platform("gpu"):
        assert current_platform() == "gpu"
        with pytest.raises(RuntimeError), target_platform("tpu"):  # noqa: PT012
            assert current_platform() == "tpu"
            raise RuntimeError
        assert current_platform() == "gpu"
    assert current_platform() == "cpu"


@pytest.mark.parametrize(
    ("device", "platform"),
    [
        ({"platform": "cpu"}, "cpu"),
        ({"platform": "tpu"}, "tpu"),
        ({"platform": "gpu", "compute_capability": "gfx942"}, "gpu"),  # another maker's
        ({"platform": "gpu", "compute_capability": "9.0"}, "gpu"),
        ({"platform": "gpu", "compute_capability": "12.0"}, "gpu"),
        ({"platform": "gpu", "compute_capability": "7.5"}, "gpu without triton"),
    ],
    ids=str,
)
def test_gpus_that_cannot_run_triton_have_a_platform_of_their_own(device, platform, monkeypatch):
    assert platform_of(SimpleNamespace(**device)) == platform
    monkeypatch.setattr(platform_module, "has_triton", lambda: False)
    other = "gpu without triton" if device["platform"] == "gpu" else platform
    assert platform_of(SimpleNamespace(**device)) == other


@pytest.mark.parametrize(
    ("platform", "row"),
    [("cpu", "cpu"), ("gpu", "gpu"), ("tpu", "tpu"), ("gpu without triton", ANY)],
)
def test_kernel_call_uses_the_table_row_of_the_target_platform(platform, row, monkeypatch):
    taken = []
    for key in [key for key in TABLE if key[0] == "normalize"]:
        spy = lambda x, scale_D, centered, key=key: taken.append(key[1]) or x
        monkeypatch.setitem(TABLE, key, spy)
    with target_platform(platform):
        jax.make_jaxpr(lambda x: kernels.normalize(x, x, centered=True))(jnp.ones(3))
    assert taken == [row]


@pytest.mark.parametrize(
    ("mesh", "is_split"), [("data:1", False), ("data:2", True), ("tensor:2", True)]
)
def test_use_mesh_sets_platform_and_adds_constraints_only_if_partitioned(mesh, is_split):
    mesh = make_mesh(make_config(mesh=mesh))
    seen = []

    def function(x: jax.Array) -> jax.Array:
        seen.append((current_platform(), is_partitioned()))
        return constrain(constrain_batch(x), None, "tensor")

    with target_platform("tpu"):
        text = str(jax.make_jaxpr(use_mesh(mesh)(function))(jnp.ones((4, 8))))
    assert seen == [("cpu", is_split)]
    assert text.count("sharding_constraint") == 2 * is_split
    assert not is_partitioned()


def test_constraints_are_skipped_inside_shard_map():
    mesh = make_mesh(make_config(mesh="data:2"))
    seen = []

    def local(x: jax.Array) -> jax.Array:
        seen.append(is_partitioned())
        return constrain(x, BATCH)

    spec = PartitionSpec(BATCH)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    x = np.arange(4.0, dtype=np.float32)
    np.testing.assert_array_equal(jax.jit(use_mesh(mesh)(mapped))(x), x)
    assert seen == [False]
