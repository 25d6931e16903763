"""Profile calls on the device: a trace to look at, and a table of the layers and parts.

The trace is jax.profiler's. Its operations get their names from runtime/scopes.py: the compiled
program keeps the layer and part of each instruction, as in blocks/3/attn/qkv.
"""

import gzip
import json
import re
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
from jax import stages

from jaxgpt.config import Config
from jaxgpt.runtime import distributed, storage
from jaxgpt.runtime.files import atomic_write
from jaxgpt.runtime.metrics import Log
from jaxgpt.runtime.step_log import StepLog

FOLDER = "profile"  # in the run directory
TRACES = "plugins"  # the folder in it that jax.profiler writes
WARM_UP_CALLS = 2  # before the first traced call: the first one also allocates and tunes
ROWS = 10  # of the table of operations
PARTS = 20
VIEWER = "https://ui.perfetto.dev"
MOST_EVENTS = 1_000_000  # that JAX writes to a trace; it drops the others

Event = dict[str, Any]  # of a Chrome trace: name, pid, tid, ts and dur in microseconds, args
Labels = Mapping[str, Mapping[str, str]]  # of each program: the label of each instruction


# ---- the layers and parts of a compiled program ------------------------------------------------


_INSTRUCTION = re.compile(r'^ +(?:ROOT )?%?([\w.-]+) = .*?metadata=\{.*?op_name="([^"]*)"', re.M)
_WRAPPER = re.compile(r"\b(?:transpose|jvp|vmap|remat|checkpoint)\(|\)")
_CONTROL = {
    "while",
    "body",
    "cond",
    "closed_call",
    "checkpoint",
    "eval_jaxpr",
    "rematted_computation",
    "shard_map",
}


def program_labels(text: str) -> dict[str, dict[str, str]]:
    """Return the label of each instruction in an optimised XLA program, by the program's name."""
    program = text.removeprefix("HloModule ").partition(",")[0]
    scopes = _INSTRUCTION.findall(text)
    return {program: {symbol(instruction): label_of(scope) for instruction, scope in scopes}}


def live_labels() -> dict[str, dict[str, str]]:
    """Return the labels of all programs that this process has compiled, by the program's name.

    Programs of one name differ in shapes; an instruction whose label they do not share has none.
    """
    found: dict[str, dict[str, str]] = {}
    for executable in jax.local_devices()[0].client.live_executables():
        for module in executable.hlo_modules():
            for program, labels in program_labels(module.to_string()).items():
                known = found.setdefault(program, {})
                for name, label in labels.items():
                    known[name] = label if known.get(name, label) == label else ""
    return found


def symbol(instruction: str) -> str:
    """Return an instruction's name as part of the name of a GPU's kernel."""
    return re.sub(r"\W", "_", instruction)


def label_of(op_name: str) -> str:
    """Return layer, part and direction of an operation from its name in XLA's metadata.

    jit(train_step)/transpose(jvp(blocks/3))/attn/qkv/dot_general is "blocks/3/attn/qkv, backward".
    Without layer and part, the label is the operation, such as dot_general.
    """
    op_name = op_name.partition(";")[0]  # of several that are merged
    path = _WRAPPER.sub("", re.sub(r"\bjit\([^)]*\)", "", op_name)).split("/")
    names = [name for name in path if re.fullmatch(r"\w+", name) and name not in _CONTROL]
    if len(names) < 2:
        return "".join(names)
    is_backward = "transpose(" in op_name or "rematted_computation" in op_name
    return "/".join(names[:-1]) + (", backward" if is_backward else "")


# ---- traces ------------------------------------------------------------------------------------


def start_trace(folder: Path) -> None:
    """Start to trace this process's devices into a folder, and delete its last trace.

    A trace that a failed run has left open is ended first.
    """
    with suppress(RuntimeError):  # there is none
        jax.profiler.stop_trace()
    shutil.rmtree(folder / TRACES, ignore_errors=True)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    options.host_tracer_level = 1
    jax.profiler.start_trace(folder, profiler_options=options)


def stop_trace(folder: Path) -> list[Event]:
    """Stop the trace in this folder, and return its events."""
    jax.profiler.stop_trace()
    file = next((folder / TRACES).rglob("*.trace.json.gz"))
    return json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]


def find_kernels(events: list[Event], on_cpu: Container[str] | None = None) -> list[Event]:
    """Return the events that are kernels, in order of their start.

    They are those on a GPU's streams, or among a TPU's operations. A CPU has neither; its kernels
    are the instructions that it runs, or those of them that are in `on_cpu`.
    """
    named = {
        (e["name"], e["pid"], e.get("tid")): e["args"]["name"]
        for e in events
        if e.get("name") in ("process_name", "thread_name")
    }
    devices = {pid for (_, pid, _), name in named.items() if name.startswith("/device:")}
    threads = {(p, t): name for (_, p, t), name in named.items() if p in devices and t is not None}
    streams = {thread for thread, name in threads.items() if "Stream" in name}
    streams = streams or {thread for thread, name in threads.items() if name == "XLA Ops"}
    on_stream = lambda e: (e["pid"], e["tid"]) in streams
    instruction = lambda e: e.get("args", {}).get("hlo_op")
    runs = lambda e: instruction(e) and (on_cpu is None or instruction(e) in on_cpu)
    is_kernel = on_stream if streams else runs
    return sorted((e for e in events if e.get("ph") == "X" and is_kernel(e)), key=lambda e: e["ts"])


def own_times(kernels: list[Event]) -> list[float]:
    """Return the microseconds of each kernel. Their sum is the time in which any kernel runs.

    Kernels that run at once share that time equally, on several devices or streams. A loop does
    not count while one of the kernels inside it runs.
    """
    bounds = [(k["ts"], 1, i) for i, k in enumerate(kernels) if k["dur"] > 0]
    bounds += [(k["ts"] + k["dur"], 0, i) for i, k in enumerate(kernels) if k["dur"] > 0]
    times = [0.0] * len(kernels)
    running: dict[tuple, list[int]] = {}  # on each thread, the innermost kernel last
    before = 0.0
    for now, starts, i in sorted(bounds):
        for inside in running.values():
            times[inside[-1]] += (now - before) / len(running)
        before = now
        thread = kernels[i]["pid"], kernels[i].get("tid")
        if starts:
            running.setdefault(thread, []).append(i)
        else:
            running[thread].remove(i)
            if not running[thread]:
                del running[thread]
    return times


# ---- the table ---------------------------------------------------------------------------------


def label_kernel(kernel: Event, labels: Labels) -> tuple[str, str]:
    """Return the label of a kernel, and the name of its instruction.

    A kernel in a CUDA graph names neither program nor instruction, but most are named after theirs.
    Such a kernel has a label if the programs with this instruction agree on it.
    """
    args = kernel.get("args", {})
    name = args.get("hlo_op") or kernel["name"]
    program = args.get("hlo_module")
    if program and program not in labels:
        return program.removeprefix("jit_"), name  # such as the program that makes a batch
    programs = [labels[program]] if program else labels.values()
    found = {known[symbol(name)] for known in programs if symbol(name) in known}
    label = found.pop() if len(found) == 1 else ""
    return label or re.sub(r"[._]\d+$", "", name), name


def write_profile(
    folder: Path, events: list[Event], labels: Labels, wall_s: float, count: int, unit: str
) -> tuple[str, Path]:
    """Write profile.txt and trace.json.gz; return the table and the trace's path.

    `count` calls or steps, each a `unit`, took `wall_s` seconds.
    """
    kernels = find_kernels(events)
    times, calls = defaultdict(float), Counter()
    for kernel, us in zip(kernels, own_times(kernels), strict=True):
        label, name = label_kernel(kernel, labels)
        times[label, name] += us / 1000 / count
        calls[label, name] += 1
        kernel["args"] = kernel.get("args", {}) | {"kernel": kernel["name"]}
        kernel["name"] = f"{label} ({name})"
    devices = {(kernel["pid"], kernel["args"].get("device_ordinal")) for kernel in kernels}
    per_unit = {key: number / count / len(devices) for key, number in calls.items()}
    table = make_table(times, per_unit, 1000 * wall_s / count, count, unit)
    if len(events) >= MOST_EVENTS:
        table += "\nThe trace is too long, so times are too small; try a smaller --profile\n"
    for file in (folder / TRACES).rglob("*.trace.json.gz"):
        file.unlink()
    trace = folder / "trace.json.gz"
    atomic_write(trace, gzip.compress(json.dumps({"traceEvents": events}).encode(), 1))
    atomic_write(folder / "profile.txt", table)
    return table, trace


def make_table(
    times: Mapping[tuple[str, str], float],
    calls: Mapping[tuple[str, str], float],
    wall_ms: float,
    count: int,
    unit: str,
) -> str:
    """Return the most expensive operations, and the time by part of the model, all layers together.

    `times` are the milliseconds per unit of each label and instruction.
    """
    parts: dict[str, float] = defaultdict(float)
    for (label, _), ms in times.items():
        parts[re.sub(r"/\d+", "", label).partition(",")[0]] += ms
    parts["no operation runs"] = max(0.0, wall_ms - sum(times.values()))
    most = lambda found, rows: sorted(found.items(), key=lambda item: -item[1])[:rows]
    columns = f"ms per {unit}", "share", f"calls per {unit}"
    cells = lambda ms: f"{ms:{len(columns[0])}.3f}  {100 * ms / wall_ms:4.1f}%  "
    lines = [f"{count} {unit}s, {wall_ms:.3f} ms per {unit}", ""]
    lines.append(f"{columns[0]}  {columns[1]}  {columns[2]}  operation")
    for key, ms in most(times, ROWS):
        lines.append(f"{cells(ms)}{calls[key]:{len(columns[2])}.4g}  {key[0]} ({key[1]})")
    lines += ["", f"{columns[0]}  {columns[1]}  part, all layers together"]
    lines += [cells(ms) + part for part, ms in most(parts, PARTS)]
    return "\n".join(lines) + "\n"


def profile_calls(folder: Path, run: Callable[[], Any], count: int) -> tuple[str, Path]:
    """Trace `run`, which makes `count` calls of programs; return what `write_profile` returns."""
    start_trace(folder)
    began = time.perf_counter()
    run()
    wall_s = time.perf_counter() - began
    return write_profile(folder, stop_trace(folder), live_labels(), wall_s, count, "call")


class Profiler:
    """The profile of `config.profile` training steps, which begins after `WARM_UP_CALLS` calls.

    It ends early at an evaluation, a save, or the end of the run. Process 0 profiles its devices;
    all processes wait for the same calls, because they must read a signal after the same call.
    """

    program: stages.Compiled  # the training step, which names the operations

    def __init__(self, config: Config, log: Log, step_log: StepLog):
        self.log, self.step_log = log, step_log
        self.out_dir = config.out_dir
        self.folder = storage.local(config.out_dir) / FOLDER
        self.steps = config.profile  # 0 after the profile
        if config.profile:  # the cache may hold the program with names from an older version
            jax.config.update("jax_compilation_cache_include_metadata_in_key", True)
        self._calls = 0
        self._first: int | None = None  # the steps before the trace, while there is one

    def before_call(self, step: int) -> None:
        """Start the trace if it is due, when the device has ended the calls before."""
        self._calls += 1
        if not self.steps or self._calls <= WARM_UP_CALLS or self._first is not None:
            return
        self.step_log.flush()
        if distributed.is_process_0():
            start_trace(self.folder)
        self._first = step
        self._began = time.perf_counter()
        self.step_log.stopwatch.resume()  # starting a trace is not step time

    def after_call(self, step: int, *, is_pause: bool) -> None:
        """End the profile at `step` if it has its steps, or if the run does something else next."""
        if self._first is not None and (is_pause or step - self._first >= self.steps):
            self._end(self._first, step)

    def finish(self, step: int) -> None:
        """End the profile at the end of the run, or log that there is none."""
        if self._first is not None:
            self._end(self._first, step)
        elif self.steps:
            calls = f"its first {WARM_UP_CALLS} calls, which are not traced"
            self.log.info(f"profile={self.steps}: the run ended in {calls}; try more --max_iters")

    def _end(self, first: int, step: int) -> None:
        """Wait for the last call, and write the profile of the steps after `first`."""
        self.step_log.flush()
        wall_s = time.perf_counter() - self._began
        if distributed.is_process_0():
            events = stop_trace(self.folder)
            labels = program_labels(self.program.as_text() or "")
            table, trace = write_profile(self.folder, events, labels, wall_s, step - first, "step")
            early = step - first < self.steps
            why = f", because the run pauses before {self.steps}" if early else ""
            self.log.info(f"profile of steps {first + 1} to {step}{why}: {table}")
            place = f"{self.out_dir.rstrip('/')}/{FOLDER}/{trace.name}"
            self.log.info(f"open {place} at {VIEWER} to see every operation of the profile")
        self._first, self.steps = None, 0
        self.step_log.stopwatch.resume()
