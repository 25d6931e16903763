"""Run several processes as one run: connect them, let the first one write, stop them together.

Every process runs the same program on its own devices, and XLA's collectives connect the devices.
"""

import os
import re
import signal
import sys
import threading
import traceback
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgpt.config import UserError

STOPPING = b"stopping: saves a checkpoint first; send the signal again to exit at once\n"
# What Gloo, NCCL and JAX's coordination service say when another process has ended.
LOST_PROCESS = re.compile(
    r"closed by peer|reset by peer|broken pipe|socket closed|remote process exited|another task"
    r"|heartbeat|connection refused|gloo .* failed",
    re.IGNORECASE,
)
HEARTBEAT_S = 30  # the others exit if a process is silent for longer
_max = jax.jit(jnp.max)


def init_distributed(
    coordinator: str = "", num_processes: int = 0, process_id: int = -1, device: str = "auto"
) -> None:
    """Connect this process to the other processes of its run; call this before JAX computes.

    Slurm, Open MPI 4, Kubernetes and TPU pods tell JAX which processes there are. Elsewhere every
    process is given the coordinator's `host:port`, the number of processes, and its own number.
    Raises `UserError`.
    """
    # JAX lists the TPU platform only if it has seen TPU chips, so other hosts make no request.
    on_tpu = device in ("auto", "tpu") and "tpu" in (jax.config.values["jax_platforms"] or "")
    env = os.environ
    counts = [env.get(name, "1") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")]
    on_kubernetes = "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env
    launched = any(int(count) > 1 for count in counts) or on_kubernetes
    if (num_processes > 1 or process_id > 0) and not (coordinator or launched or on_tpu):
        given = f"num_processes={num_processes}" if num_processes else f"process_id={process_id}"
        expected = "expected the host:port of process 0; try --coordinator=HOST:PORT"
        raise UserError(f"{given}: no coordinator; {expected}")
    if jax.distributed.is_initialized() or not (coordinator or launched or on_tpu):
        return
    if coordinator and not 0 <= process_id < num_processes:
        problem = f"no such process of {num_processes}; expected 0 for the first one, and so on"
        advice = "try --num_processes and --process_id"
        raise UserError(f"process_id={process_id}: {problem}; {advice}")
    named: tuple[Any, ...] = (coordinator, num_processes, process_id) if coordinator else ()
    try:
        jax.distributed.initialize(*named, heartbeat_timeout_seconds=HEARTBEAT_S)
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        if not (coordinator or launched) and "must be called before" in reason:
            return  # JAX has started, with the processes that it found
        if coordinator:
            raise UserError(
                f"coordinator={coordinator!r}: cannot be reached ({reason}); "
                "expected the host:port of process 0, the same in every process"
            ) from error
        if launched or not isinstance(error, ValueError):
            raise UserError(
                f"coordinator='': JAX cannot find the other processes of this run ({reason}); "
                "try --coordinator, --num_processes and --process_id"
            ) from error
        # A TPU that no pod's environment describes: this host is alone.


@contextmanager
def abort_all_on_error() -> Iterator[None]:
    """End this process at once if the run fails in it, because a normal exit waits for the others.

    The other processes then fail too: their next collective fails, or they miss the heartbeat.
    """
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1:
            raise
        is_mistake, is_other = isinstance(error, UserError), _is_of_another_process(error)
        if not is_mistake and not is_other:
            traceback.print_exc()
        advice = "" if is_mistake else "; try --init_from=auto to continue from the last checkpoint"
        problem = (str(error) or type(error).__name__).splitlines()[0]
        if is_other:
            problem = f"another process of this run has ended ({problem}); expected all of them"
        text = f"error: process {jax.process_index()}: {problem}{advice}"
        with suppress(OSError):  # stderr may be a closed pipe
            print(text, file=sys.stderr, flush=True)
        os._exit(2 if is_mistake else 1)


def _is_of_another_process(error: Exception) -> bool:
    """Tell whether a collective or JAX's coordination failed because another process has ended."""
    is_jax = isinstance(error, jax.errors.JaxRuntimeError)
    return is_jax and LOST_PROCESS.search(str(error)) is not None


def is_process_0() -> bool:
    """Tell whether this process writes the files that only one process writes."""
    return jax.process_index() == 0


def on_process_0(function: Callable[[], int | None]) -> int:
    """Run `function` in the first process only; return its number (None is 0) in every process.

    A `UserError` in the first process is raised in every process, so that no process hangs.
    """
    if jax.process_count() == 1:
        return function() or 0
    error, value = None, 0
    if is_process_0():
        try:
            value = function() or 0
        except UserError as raised:
            error = raised
    outcome = np.array([error is not None, value], np.int32)
    failed, value = multihost_utils.broadcast_one_to_all(outcome)
    if failed:
        advice = "expected no error; try its log, which names the error"
        raise error or UserError(f"process 0: failed; {advice}")
    return int(value)


def check_same(values: dict[str, Any]) -> None:
    """Raise `UserError` in every process if one of these values differs between processes."""
    if jax.process_count() == 1:
        return
    sums = [zlib.crc32(repr(value).encode()) for value in values.values()]
    of_processes = multihost_utils.process_allgather(np.array(sums, np.uint32))
    for key, sums_of_key in zip(values, np.transpose(of_processes), strict=True):
        if len({*sums_of_key.tolist()}) > 1:
            problem = "the processes of this run have different values"
            raise UserError(f"{key}={values[key]!r}: {problem}; expected the same in all of them")


class StopSignal:
    """A record of SIGTERM or SIGINT for the training loop; a second signal ends the process.

    Outside the main thread, Python allows no handler, so signals have their usual effect.
    """

    received = 0  # the signal that was sent to this process
    agreed = 0  # the signal that all processes have read, so that they stop at the same step

    @property
    def signal(self) -> int:
        """The signal that ends the run, or 0."""
        return self.received if jax.process_count() == 1 else self.agreed

    @property
    def exit_code(self) -> int:
        """The exit code of the run: 128 + n if signal n ends the run, else 0."""
        return 128 + self.signal if self.signal else 0

    def highest(self) -> jax.Array:
        """Start computing the highest signal that any process received, readable by all."""
        mesh = Mesh(np.array(jax.devices()), ("all",))
        own_signal = np.full(1, self.received, np.int32)
        one_each = NamedSharding(mesh, PartitionSpec("all"))
        return _max(jax.make_array_from_callback((mesh.size,), one_each, lambda _: own_signal))

    def __enter__(self) -> "StopSignal":
        is_main = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGTERM, signal.SIGINT) if is_main else ()
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def end_at_once(self, number: int) -> None:
        """Leave without saving, because signal `number` came after the first one."""
        os._exit(128 + number)

    def _note(self, number: int, frame: Any) -> None:
        if self.received:
            self.end_at_once(number)
        self.received = number
        with suppress(OSError):  # stderr may be a closed pipe, because `tee` got Ctrl-C too
            os.write(2, STOPPING)
