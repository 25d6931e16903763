"""Build the mesh of devices that the key `mesh` describes, and check that it fits the config."""

import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from jaxgpt.config import Config, UserError
from jaxgpt.data.batch_size import global_batch_size

AXES = ("data", "fsdp", "tensor")


def make_mesh(config: Config, devices: list | None = None) -> Mesh:
    """Return the mesh of `config.mesh`; by default every device is on `data`.

    Virtual CPU devices are only a way to use more cores, so by default as many are taken as the
    batch can be split over. Raises `UserError` with the sizes that do not divide.
    """
    devices = devices or jax.devices()
    sizes = parse_mesh(config.mesh)
    if not config.mesh:
        sizes["data"] = len(devices)
        while devices[0].platform == "cpu" and global_batch_size(config) % sizes["data"]:
            sizes["data"] -= 1
    count = math.prod(sizes.values())
    _check_count(config, sizes, devices)
    _check_divides(config, sizes)
    try:
        return jax.make_mesh(
            tuple(sizes.values()), AXES, (AxisType.Auto,) * len(AXES), devices=devices[:count]
        )
    except NotImplementedError as error:  # the links of a TPU do not allow every shape
        message = str(error).splitlines()[0]
        raise UserError(f"mesh={config.mesh!r}: {message}; try other sizes") from error


def parse_mesh(text: str) -> dict[str, int]:
    """Return the size of each axis for a text such as data:2,fsdp:4; axes not named have size 1."""
    sizes: dict[str, int] = dict.fromkeys(AXES, 1)
    entries = [part.split(":") for part in text.split(",")] if text else []
    for axis, size in entries:
        if axis not in AXES:
            raise UserError(f"mesh={text!r}: unknown axis {axis}; expected {', '.join(AXES)}")
        if not int(size):
            raise UserError(f"mesh={text!r}: {axis} has size 0; expected at least 1")
        sizes[axis] = int(size)
    if len(entries) > len(dict(entries)):
        raise UserError(f"mesh={text!r}: names an axis twice; expected each axis at most once")
    return sizes


def _check_count(config: Config, sizes: dict[str, int], devices: list) -> None:
    count = math.prod(sizes.values())
    product = " x ".join(str(size) for size in sizes.values() if size > 1)
    product = f"{product} = {count}" if " x " in product else str(count)
    if count > len(devices):
        raise UserError(
            f"mesh={config.mesh!r}: needs {product} devices; expected at most the {len(devices)} "
            "that JAX finds"
        )
    if count < len(devices) and len({device.process_index for device in devices}) > 1:
        raise UserError(
            f"mesh={config.mesh!r}: uses {product} of {len(devices)} devices; expected all of "
            "them, because the run has several processes"
        )


def _check_divides(config: Config, sizes: dict[str, int]) -> None:
    data, fsdp, tensor = sizes.values()
    requirements = [
        ("data x fsdp", data * fsdp, "sequences per step", global_batch_size(config)),
        ("fsdp", fsdp, "n_embd", config.n_embd),
        ("tensor", tensor, "key-value heads", config.kv_heads),
        ("tensor", tensor, "MLP width", config.mlp_hidden_dim),
        ("tensor", tensor, "rows of the embedding", config.padded_vocab_size),
    ]
    for axis, size, what, total in requirements:
        if total % size:
            raise UserError(
                f"mesh={config.mesh!r}: {axis} = {size} does not divide {what} = {total}; "
                f"expected a divisor of {total}"
            )


def local_mesh(count: int = 1) -> Mesh:
    """Return a mesh of this process's first devices, all of them on `data`."""
    devices = np.array(jax.local_devices()[:count]).reshape(count, 1, 1)
    return Mesh(devices, AXES, (AxisType.Auto,) * len(AXES))
