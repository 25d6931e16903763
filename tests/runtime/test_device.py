"""Test how JAX is started, and which XLA options the training step gets."""

import os
import platform
import resource
import subprocess
import sys
from glob import glob
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from helpers import CHILD_ENV, make_config, refusal

from jaxgpt import resolve
from jaxgpt.config import Config
from jaxgpt.data.tokens import Dataset
from jaxgpt.kernels import ANY, TABLE
from jaxgpt.runtime import device
from jaxgpt.runtime.mesh import make_mesh

TUNED, DEFAULT = Config(vocab_size=300), Config(vocab_size=300, xla="default")


def fake_mesh(platform: str, size: int = 1) -> SimpleNamespace:
    one = SimpleNamespace(platform=platform, process_index=0)
    return SimpleNamespace(devices=SimpleNamespace(flat=[one] * size), size=size)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
@pytest.mark.parametrize(
    ("start", "own", "is_kept"),
    [
        ("device.start('cpu')", {}, True),
        ("", {}, False),
        ("device.start('cpu')", {"MALLOC_ARENA_MAX": "8"}, False),  # the user's own settings
    ],
)
def test_a_cpu_keeps_freed_memory_unless_the_user_says_otherwise(start, own, is_kept):
    """If freed memory is not kept, the system clears 100 MB of pages in each call."""
    code = f"""
import resource
import jax
import jax.numpy as jnp
from jaxgpt.runtime import device
{start}
x = jnp.ones((5000, 5000))
call = jax.jit(lambda x: x[::-1] * 3)
faults = []
for _ in range(50):
    call(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[-11])
"""
    command, env = [sys.executable, "-c", code], CHILD_ENV | own
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    pages = 10 * 5000 * 5000 * 4 / resource.getpagesize()  # in ten calls
    assert (int(done.stdout) < pages / 2) == is_kept


@pytest.fixture
def knows_all(monkeypatch):
    """Let XLA know every option, without a compiler for GPUs."""
    monkeypatch.setattr(device, "known_options", lambda device, options: dict(options))
    monkeypatch.delenv("XLA_FLAGS", raising=False)


def test_training_step_has_no_xla_options_on_a_cpu():
    assert device.compiler_options(TUNED, make_mesh(TUNED)) == {}


def test_start_in_a_process_that_has_started_jax_keeps_its_devices(monkeypatch):
    devices, platforms = jax.devices(), jax.config.values["jax_platforms"]
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)  # start would ask for one per core
    device.start("cpu")
    assert jax.devices() == devices
    said = "device='gpu': JAX has started on a cpu in this process; expected cpu, or a new process"
    assert refusal(device.start, "gpu") == said
    assert jax.config.values["jax_platforms"] in ("cpu", platforms)


@pytest.mark.skipif(bool(glob("/dev/nvidia*")), reason="there is an NVIDIA GPU")
def test_missing_device_is_rejected_and_another_can_then_be_started():
    code = """
from jaxgpt.config import UserError
from jaxgpt.runtime import device
for name in "cuda", "gpu", "tpu", "auto":
    try:
        device.start(name)
        print("started")
    except UserError as error:
        print(error)
"""
    env = {key: value for key, value in CHILD_ENV.items() if key != "JAX_PLATFORMS"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    *refused, last = done.stdout.splitlines()
    assert last == "started"
    for line, name in zip(refused, ("cuda", "gpu", "tpu"), strict=True):
        assert line.startswith(f"device={name!r}: JAX cannot use it (")
        assert line.endswith("); try --device=auto")


@pytest.mark.parametrize(("platform", "size"), [("gpu", 1), ("gpu", 8), ("tpu", 4)])
@pytest.mark.usefixtures("knows_all")
def test_tuned_options_are_those_of_the_table(platform, size):
    kind = {("gpu", 1): "one GPU", ("gpu", 8): "several GPUs", ("tpu", 4): "TPU"}[platform, size]
    found = device.compiler_options(TUNED, fake_mesh(platform, size))
    assert found == {option.name: option.value for option in device.XLA_OPTIONS[kind]}
    assert device.compiler_options(DEFAULT, fake_mesh(platform, size)) == {}


@pytest.mark.parametrize(("platform", "has_option"), [("gpu", True), ("tpu", False)])
@pytest.mark.usefixtures("knows_all")
def test_deterministic_adds_one_option_on_gpus_alone(platform, has_option):
    found = device.compiler_options(DEFAULT.replace(deterministic=True), fake_mesh(platform))
    assert found == ({"xla_gpu_exclude_nondeterministic_ops": True} if has_option else {})


@pytest.mark.parametrize("variable", ["XLA_FLAGS", "LIBTPU_INIT_ARGS"])
@pytest.mark.usefixtures("knows_all")
def test_options_of_the_user_are_kept(variable, monkeypatch):
    name = "xla_gpu_enable_triton_gemm"
    monkeypatch.setenv(variable, f"--{name}_int=true")
    assert name in device.compiler_options(TUNED, fake_mesh("gpu"))
    for value in ("", "=true"):
        monkeypatch.setenv(variable, f"--xla_other=1 --{name}{value}")
        assert name not in device.compiler_options(TUNED, fake_mesh("gpu"))


def test_options_that_xla_does_not_know_are_left_out():
    options = ("xla_cpu_enable_fast_math", False), ("xla_unknown_option", "1")
    assert device.known_options(jax.devices()[0], options) == dict(options[:1])
    assert device.known_options(jax.devices()[0], options[:1]) == dict(options[:1])


def test_every_xla_option_has_a_reason_and_a_source():
    for options in (*device.XLA_OPTIONS.values(), [device.DETERMINISTIC]):
        assert len({option.name for option in options}) == len(options)
        assert all(option.reason and option.source for option in options)


@pytest.mark.parametrize("variable", device.MEMORY_VARIABLES)
def test_start_reserves_nine_tenths_of_a_gpu_unless_the_user_says_otherwise(variable, monkeypatch):
    default = device.MEMORY_VARIABLES[-1]
    for name in device.MEMORY_VARIABLES:
        monkeypatch.setenv(name, "")
    device.start("cpu")
    assert os.environ[default] == device.memory_fraction() == "0.9"
    monkeypatch.setenv(default, "")
    monkeypatch.setenv(variable, "0.5")
    device.start("cpu")
    assert device.memory_fraction() == "0.5"
    assert os.environ[default] == ("0.5" if variable == default else "")


# ---- attention -------------------------------------------------------------------------------


def test_self_test_accepts_every_back_end_that_a_cpu_runs():
    for backend in "cpu", "xla", "flash":
        assert device.self_test(make_config(attention="auto"), backend) == ""


def fails(*args):
    raise RuntimeError("no such kernel\nin this driver")


WRONG = {
    "zeros": (lambda q, *_: 0 * q, "its result differs from the reference"),
    "nan": (lambda q, *_: np.nan * q, "its result differs from the reference"),
    "an error": (fails, "RuntimeError: no such kernel"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_self_test_finds_an_attention_that_is_wrong_or_fails(kind, monkeypatch):
    function, said = WRONG[kind]
    monkeypatch.setitem(TABLE, ("attention_flash", ANY), function)
    assert device.self_test(make_config(attention="auto"), "flash") == said


@pytest.mark.parametrize(
    ("broken", "dropout", "chosen"),
    [
        ((), 0.0, "cudnn"),
        (("cudnn",), 0.0, "flash"),
        (("cudnn", "flash"), 0.0, "xla"),
        (("flash",), 0.1, "reference"),  # cudnn has no dropout
    ],
)
def test_back_ends_that_fail_their_test_are_passed_over_with_a_note(
    broken, dropout, chosen, monkeypatch
):
    monkeypatch.setattr(device, "self_test", lambda c, name: "is broken" * (name in broken))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    config = make_config(attention="auto", dtype="bfloat16", dropout=dropout)
    backend, notes = device.choose_attention(config)
    assert backend == chosen
    said = [f"uses {chosen}, because {broken[-1]} failed its test: is broken"] if broken else []
    assert notes == [f"attention='auto': {line}" for line in said]


# ---- what a device can do --------------------------------------------------------------------


def set_kind(monkeypatch, kind: str) -> None:
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind=kind)])


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("NVIDIA A10G", 70), ("NVIDIA A10", 125), ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 80GB HBM3", 989.4), ("TPU v5 lite", 197), ("TPU v5", 459),
    ],
)  # fmt: skip
def test_peak_flops_are_those_of_the_longest_name_that_fits(kind, teraflops, monkeypatch):
    set_kind(monkeypatch, kind)
    assert device.peak_flops() == teraflops * 1e12
    config = make_config(dtype="bfloat16")
    rate = resolve.peak_tokens_per_s(config, fake_mesh("gpu", 8))
    assert rate == 8 * teraflops * 1e12 / resolve.flops_per_token(config)


@pytest.mark.parametrize(("kind", "dtype"), [("cpu", "bfloat16"), ("NVIDIA H200", "float32")])
def test_peak_is_unknown_for_other_devices_and_dtypes(kind, dtype, monkeypatch):
    set_kind(monkeypatch, kind)
    assert resolve.peak_tokens_per_s(make_config(dtype=dtype), fake_mesh("gpu")) is None


def dataset_of(tokens: int) -> Dataset:
    split = np.zeros(tokens // 2, np.uint16)
    return Dataset(split, split, 31, None, "", {})


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, 10),
        ({"steps_per_call": 3}, 3),
        ({"n_layer": 8, "n_embd": 512, "n_head": 4, "block_size": 256}, 1),  # more than 1e10 FLOPs
        ({"data_on_device": "never"}, 1),
        ({"data_on_device": "always"}, 10),
    ],
    ids=str,
)
def test_steps_per_call_are_ten_for_fast_steps_on_resident_data(keys, expected):
    assert resolve.steps_per_call(make_config(**keys), dataset_of(1000)) == expected


@pytest.mark.parametrize(("memory", "fits"), [(16_000, True), (15_999, False), (None, True)])
def test_data_is_kept_on_a_device_if_it_takes_an_eighth_of_the_memory(memory, fits, monkeypatch):
    monkeypatch.setattr(device, "memory_bytes", lambda: memory)
    assert device.fits_on_device(make_config(), dataset_of(1000)) == fits
