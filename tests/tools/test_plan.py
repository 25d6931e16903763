"""Test plans without a compiler for other hardware (test_aot.py has the rest)."""

import importlib.util
from dataclasses import replace
from types import SimpleNamespace

import jax
import pytest

from jaxgpt.cli import commands
from jaxgpt.config import Config, UserError
from jaxgpt.data import batch_size
from jaxgpt.runtime import device
from jaxgpt.runtime.mesh import make_mesh
from jaxgpt.tools import plan
from jaxgpt.tools.hlo import Collective
from jaxgpt.tools.plan import CHIPS, EFFICIENCY, DoesNotFitError, Topology
from jaxgpt.train_step import abstract_params

TINY = Config(
    vocab_size=300, block_size=32, n_layer=1, n_head=2, n_embd=64, batch_size=2,
    gradient_accumulation_steps=16, attention="reference", dtype="float32",
)  # fmt: skip
HERE = Topology("here:8", CHIPS["h100"], jax.devices(), 4)  # eight CPU devices, as two machines


@pytest.mark.parametrize(
    "name", ["h100", "h100:0", "h100:2x2x2", "v5e:8", "v5p:2x2x2x2", "x:8", "h100:8 ", ""]
)
def test_unknown_topology_is_rejected(name):
    with pytest.raises(
        UserError, match=r"^topology=.*: unknown chip or shape; expected CHIP:SHAPE .*; try "
    ):
        plan.find_topology(name)


@pytest.mark.parametrize(("name", "extra"), [("h100:8", "cuda"), ("v5e:2x4", "tpu")])
def test_missing_compiler_error_names_the_pip_extra(name, extra, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        commands.run(commands.plan, ["--config", "configs/gpt2.py", f"--topology={name}"])
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"pip install 'jaxgpt[{extra}]'" in error


@pytest.mark.parametrize(
    ("platform", "keys", "attention"),
    [
        ("gpu", {}, "cudnn"),
        ("tpu", {}, "splash"),
        ("gpu", {"dropout": 0.1}, "flash"),
        ("gpu", {"n_embd": 1920}, "flash"),  # heads of 160, wider than cudnn's on an unknown GPU
        ("gpu", {"n_embd": 3600}, "xla"),  # heads of 300
        ("gpu", {"dropout": 0.1, "attention_dropout": False}, "cudnn"),
        ("gpu", {"dtype": "float32"}, "xla"),
        ("tpu", {"block_size": 100}, "xla"),
    ],
)
def test_attention_backend_is_chosen_for_the_target_platform(platform, keys, attention):
    config, _ = device.resolve_auto(Config(vocab_size=300, **keys), platform)
    assert config.attention == attention
    assert config.dtype == keys.get("dtype", "bfloat16")


def test_every_chip_has_a_peak_flops_entry():
    assert all(chip.kind in device.PEAK_FLOPS for chip in CHIPS.values())


@pytest.fixture(scope="module")
def found() -> plan.Plan:
    return plan.make_plan(TINY, HERE)


def test_plan_figures_are_consistent(found):
    """Check state, temporaries, gradient sums and communication time on eight CPU devices."""
    mesh = make_mesh(TINY, HERE.devices)
    one = sum(p.size * 4 for p in jax.tree.leaves(abstract_params(TINY, mesh)))
    assert found.params == one
    assert 2 * one <= found.opt_state <= 2 * one + 16
    assert found.params + found.opt_state + found.temporaries <= found.peak_memory
    assert found.micro_batches == batch_size.num_microbatches(TINY, mesh) == 2
    ring, table = 2 * 7 / 8, 384 * 64 * 4  # the tied table has two gradients
    once = ring * one
    reduced = sum(c.times * c.bytes for c in found.collectives if c.kind == "all-reduce")
    assert once <= reduced <= 2 * (once + ring * table) * 1.01
    sent = sum(c.times * c.bytes for c in found.collectives)
    rate = CHIPS["h100"].network_rate * EFFICIENCY["links"]  # the groups span the machines
    assert found.work_seconds[2] == pytest.approx(sent / rate / 4)  # by four ports each
    assert found.fits
    assert min(found.work_seconds) > 0


def test_rings_use_all_network_ports_of_a_machine_and_pairs_use_one():
    """Devices 0 to 3 and 4 to 7 are two machines; groups lie within a machine or span both."""
    chip = CHIPS["h100"]
    link, network = (rate * EFFICIENCY["links"] for rate in (chip.link_rate, chip.network_rate))
    sends = lambda kind, *group: plan.seconds_to_send(Collective(kind, 1, 10**9, group), HERE)
    assert sends("all-reduce", 0, 1, 2, 3) == pytest.approx(1e9 / link)
    assert sends("all-gather", 0, 4) == pytest.approx(1e9 / network)
    assert sends("reduce-scatter", *range(8)) == pytest.approx(1e9 / (4 * network))
    assert sends("all-to-all", *range(8)) == pytest.approx(1e9 / network)
    assert sends("collective-permute", 0, 1) == pytest.approx(1e9 / link)


def test_fsdp_splits_state_bytes_over_devices():
    whole = plan.state_bytes(TINY, make_mesh(TINY, HERE.devices))
    split = plan.state_bytes(TINY, make_mesh(TINY.replace(mesh="fsdp:8"), HERE.devices))
    assert whole[0] / 8 < split[0] < whole[0] / 6  # norms and biases stay whole


def test_full_recomputation_costs_one_third_more_flops_in_the_blocks():
    flops = [plan.flops_per_step(TINY.replace(remat=remat)) for remat in ("none", "dots", "full")]
    tokens = batch_size.global_batch_size(TINY) * TINY.block_size
    in_blocks = flops[0] - 6 * TINY.vocab_size * TINY.n_embd * tokens
    assert flops[0] < flops[1] < flops[2] == pytest.approx(flops[0] + in_blocks / 3)


@pytest.mark.parametrize(
    ("memory", "want"), [(1000, ("none", 4)), (250, ("none", 1)), (60, ("full", 2)), (10, None)]
)
def test_fit_prefers_least_recomputation_then_largest_batch(memory, want, monkeypatch):
    cost = {"none": 200, "dots": 100, "full": 30}

    def make_plan(config, topology):
        needs = config.batch_size * cost[config.remat]
        if needs > 2 * memory:
            raise DoesNotFitError("too much")
        assert batch_size.global_batch_size(config) == batch_size.global_batch_size(TINY)
        return SimpleNamespace(peak_memory=needs, fits=needs <= memory, config=config)

    monkeypatch.setattr(plan, "make_plan", make_plan)
    if want is None:
        with pytest.raises(UserError, match="does not fit"):
            plan.fit(TINY, HERE, print)
    else:
        best = plan.fit(TINY, HERE, print).config
        assert (best.remat, best.batch_size) == want


def test_breakdown_covers_all_kernels_and_counts_the_flops_of_the_model(found):
    groups = found.breakdown
    assert sum(group.kernels for group in groups.values()) == found.kernels
    assert sum(group.bytes for group in groups.values()) == found.traffic
    matmul_flops = sum(group.flops for group in groups.values())
    assert 0.5 * found.flops < matmul_flops < 2 * found.flops
    text = plan.format_breakdown(found)
    assert all(f"\n{kind} " in text for kind in groups)
    assert "ms per step, MFU" in text.splitlines()[-1]


def test_formatted_plan_names_every_part(found):
    text = plan.format_plan(found)
    for word in ("parameters", "optimizer state", "peak memory", "all-reduce", "MFU", "assumed"):
        assert word in text
    assert "calls, 0 of them asynchronous" in text  # on CPUs


@pytest.mark.parametrize(("mesh", "fits"), [("", True), ("data:1", False)])
@pytest.mark.parametrize("compiles", [False, True])
def test_oversized_state_is_split_by_fsdp_unless_a_mesh_is_given(compiles, mesh, fits, monkeypatch):
    """XLA either fails, or (as for a GPU) compiles a program that does not fit."""

    def make_plan(config, topology):
        if config.mesh != "fsdp:8" and not compiles:
            raise DoesNotFitError("too much")
        fits = config.mesh == "fsdp:8"
        return SimpleNamespace(peak_memory=75 * 2**30, fits=fits, config=config)

    lines = []
    monkeypatch.setattr(plan, "make_plan", make_plan)
    monkeypatch.setattr(plan, "find_topology", lambda name: HERE)
    monkeypatch.setattr(plan, "resolve", lambda config, chip: (config, []))
    monkeypatch.setattr(plan, "format_plan", lambda plan: "a table")
    assert plan.run(TINY.replace(mesh=mesh), "here", False, lines.append) == fits
    problem = "needs 75.00 of 71.20 GiB" if compiles else "too much"
    assert lines[0].startswith(f"does not fit: {problem}") == (fits or not compiles)
    assert ("a table" in lines) == (fits or compiles)
    assert any("use: --mesh=fsdp:8" in line for line in lines) == fits


def test_lever_without_which_the_step_does_not_fit_has_a_line(found, monkeypatch):
    def make_plan(config, topology):
        raise DoesNotFitError("too much")

    monkeypatch.setattr(plan, "make_plan", make_plan)
    lines = []
    plan.compare_levers(found, lines.append)
    assert "normalize            does not fit" in lines
    assert lines[-1] == "XLA's options        does not fit"


@pytest.mark.slow
def test_figures_of_a_mesh_on_a_part_of_the_devices_are_those_of_its_devices(found):
    """A step on four of eight devices has the figures of four devices."""
    part = plan.make_plan(TINY.replace(mesh="data:2,tensor:2"), HERE)
    four = plan.make_plan(
        TINY.replace(mesh="data:2,tensor:2"), replace(HERE, devices=jax.devices()[:4])
    )
    assert plan.format_plan(part) == plan.format_plan(four)
    assert plan.format_plan(part).startswith("4 x ")
    assert plan.format_breakdown(part) == plan.format_breakdown(four)
    # each of two groups has half of the sequences, and all of their embedding
    activation = 32 * 16 * 64 * 4
    memory = part.breakdown["memory"]
    text = plan.format_breakdown(part)
    (line,) = [line for line in text.splitlines() if line.startswith("memory")]
    assert float(line.split()[3]) == pytest.approx(memory.bytes / activation, abs=0.05)


@pytest.mark.slow
def test_levers_compare_the_step_with_the_step_without_each_variant(found):
    """A CPU's variants that a training step uses are in the table, and others are not."""
    lines, table = [], dict(plan.kernels.TABLE)
    plan.compare_levers(found, lines.append)
    assert table == plan.kernels.TABLE
    named = [line.split()[0] for line in lines]
    assert named[:2] == ["without", "nothing"]
    assert {"normalize", "linear_map", "sum_over_devices"} <= set(named)
    assert "max_replicas" not in named  # only sampling uses it
    kernels, traffic = (float(x.replace(",", "")) for x in lines[1].split()[1:3])
    assert (kernels, traffic) == (found.kernels, pytest.approx(found.traffic / 1e9, abs=0.005))
