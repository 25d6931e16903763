"""Several processes, one run: how they find each other, who does what only one should, who stops.

XLA's collectives do the rest: every process runs the same program on its own devices.
"""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxgpt.config import UserError

HEARTBEAT_S = 30  # a process that is silent for so long is given up, and the rest leave


def init_distributed(
    coordinator: str = "", num_processes: int = 0, process_id: int = -1, device: str = "auto"
) -> None:
    """Connects this process to the others of its run, if it has any; call it before JAX computes.

    Slurm, Open MPI 4, Kubernetes and TPU pods say themselves who takes part; elsewhere every
    process names the coordinator's `host:port`, their number, and its own. `device` is the
    config's. Raises `UserError`.
    """
    # JAX names the TPU here where it has seen one's chips. It then asks the metadata server or
    # the environment for the other hosts; without chips nothing is asked of a network.
    on_tpu = device in ("auto", "tpu") and "tpu" in (jax.config.values["jax_platforms"] or "")
    launched = _launched_with_others()
    if jax.distributed.is_initialized() or not (coordinator or launched or on_tpu):
        return
    if coordinator and not 0 <= process_id < num_processes:
        raise UserError(
            f"process_id={process_id}: with a coordinator, it must be from 0 to num_processes - 1 "
            f"= {num_processes - 1}"
        )
    try:
        jax.distributed.initialize(
            coordinator or None,
            num_processes if coordinator else None,
            process_id if coordinator else None,
            heartbeat_timeout_seconds=HEARTBEAT_S,
        )
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


def _launched_with_others() -> bool:
    """Whether a launcher that JAX knows has started more than this process."""
    env = os.environ
    counts = (env.get(name, "1") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    return any(int(count) > 1 for count in counts) or (
        "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env
    )


@contextmanager
def abort_all_on_error() -> Iterator[None]:
    """Ends this process at once when the run fails in it, or when another process is gone.

    The usual way out would wait for processes that will not answer. They in turn see their next
    collective fail, or miss this one's heartbeat, and leave by the same way.
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
    """Whether this process writes what only one should write."""
    return jax.process_index() == 0


def on_process_0(function: Callable[[], int | None]) -> int:
    """Runs `function` in the first process alone -> its number (None is 0), in every process.

    A `UserError` there is one in every process, so that none waits for the rest in vain.
    """
    if jax.process_count() == 1:
        return function() or 0
    error, failed, value = None, 0, 0
    if is_process_0():
        try:
            value = function() or 0
        except UserError as raised:
            error, failed = raised, 1
    failed, value = multihost_utils.broadcast_one_to_all(np.array([failed, value], np.int32))
    if failed:
        raise error or UserError("the first process could not go on; it has said why")
    return int(value)


class StopSignal:
    """Notes SIGTERM and SIGINT for the loop to see; a second one ends the process at once."""

    signal = 0

    def __enter__(self) -> "StopSignal":
        self._before = {n: signal.signal(n, self._note) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if self.signal:
            os._exit(128 + number)
        self.signal = number
        os.write(2, b"stopping: saves first; the same signal again leaves at once\n")
