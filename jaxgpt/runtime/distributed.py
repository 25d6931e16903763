"""Several processes, one run: finding each other, what only the first does, stopping together.

Every process runs the same program on its own devices; XLA's collectives do the rest.
"""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgpt.config import UserError

HEARTBEAT_S = 30  # a process that is silent for longer is given up, and the others exit
_max = jax.jit(jnp.max)


def init_distributed(
    coordinator: str = "", num_processes: int = 0, process_id: int = -1, device: str = "auto"
) -> None:
    """Connect this process to the others of its run, if any; call it before JAX computes.

    Slurm, Open MPI 4, Kubernetes and TPU pods say who takes part. Elsewhere every process names
    the coordinator's `host:port`, the number of processes, and its own. Raises `UserError`.
    """
    # JAX lists the TPU platform only where it has seen TPU chips: elsewhere no network is asked.
    on_tpu = device in ("auto", "tpu") and "tpu" in (jax.config.values["jax_platforms"] or "")
    env = os.environ
    counts = [env.get(name, "1") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")]
    on_kubernetes = "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env
    launched = any(int(count) > 1 for count in counts) or on_kubernetes
    if jax.distributed.is_initialized() or not (coordinator or launched or on_tpu):
        return
    if coordinator and not 0 <= process_id < num_processes:
        raise UserError(
            f"process_id={process_id}: with a coordinator, it must be from 0 to num_processes - 1 "
            f"= {num_processes - 1}"
        )
    named: tuple[Any, ...] = (coordinator, num_processes, process_id) if coordinator else ()
    try:
        jax.distributed.initialize(*named, heartbeat_timeout_seconds=HEARTBEAT_S)
    except (RuntimeError, ValueError, OSError) as error:
        said = str(error).splitlines()[0]
        if coordinator:
            raise UserError(f"coordinator={coordinator!r}: {said}") from error
        if launched or not isinstance(error, ValueError):
            raise UserError(
                f"coordinator='': JAX cannot find this run's other processes ({said}); "
                "give --coordinator, --num_processes and --process_id"
            ) from error
        # a TPU that no pod's environment describes: this host is all there is


@contextmanager
def abort_all_on_error() -> Iterator[None]:
    """End this process at once when the run fails in it: a normal exit would wait for the others.

    Those see their next collective fail, or miss this heartbeat, which fails the run in them too.
    """
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1:
            raise
        expected = isinstance(error, UserError)
        if not expected:
            traceback.print_exc()
        advice = "" if expected else "; go on from the last checkpoint with --init_from=auto"
        text = f"process {jax.process_index()}: {str(error).splitlines()[0]}{advice}"
        print(f"error: {text}", file=sys.stderr, flush=True)
        os._exit(2 if expected else 1)


def is_process_0() -> bool:
    """Tell whether this process writes what only one should write."""
    return jax.process_index() == 0


def on_process_0(function: Callable[[], int | None]) -> int:
    """Run `function` in the first process only; return its number (None is 0) in every process.

    A `UserError` in the first process is raised in every process, so that none waits in vain.
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
        raise error or UserError("process 0 failed; see its log")
    return int(value)


class StopSignal:
    """Notes SIGTERM and SIGINT for the loop to see; a second one ends the process at once."""

    received = 0  # the signal that this process was sent
    agreed = 0  # the signal that all processes have read, so that they stop at the same step

    @property
    def signal(self) -> int:
        """The signal that ends the run, or 0."""
        return self.received if jax.process_count() == 1 else self.agreed

    @property
    def exit_code(self) -> int:
        """0, or 128 + n if signal n ends the run."""
        return 128 + self.signal if self.signal else 0

    def highest(self) -> jax.Array:
        """Start to find the highest signal that any process was sent; all can read the result."""
        mesh, mine = Mesh(np.array(jax.devices()), ("all",)), np.full(1, self.received, np.int32)
        one_each = NamedSharding(mesh, PartitionSpec("all"))
        return _max(jax.make_array_from_callback((mesh.size,), one_each, lambda _: mine))

    def __enter__(self) -> "StopSignal":
        self._before = {n: signal.signal(n, self._note) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if self.received:
            os._exit(128 + number)
        self.received = number
        os.write(2, b"stopping: saves first; the same signal again leaves at once\n")
