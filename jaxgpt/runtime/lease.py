"""Let one process at a time write to a run in an object store, which has no lock."""

import json
import os
import secrets
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from jaxgpt.config import UserError
from jaxgpt.runtime.bucket import Bucket, StoreError
from jaxgpt.runtime.checkpoint import warn
from jaxgpt.runtime.files import atomic_write

OWNERS = ".owners"  # in a writer's mirror: who has tried to take the lease from this machine
LEASE = ".lease"  # in the bucket
MOST_OWNERS = 100
RENEW_S = 10
LEASE_S = 60  # a lease that is not renewed for so long is free


class Lease:
    """The right to write to a run: an object with its owner, which a thread renews."""

    def __init__(self, bucket: Bucket, mirror: Path):
        self.bucket = bucket
        self.owner = secrets.token_hex(8)
        self._owners = mirror / OWNERS
        self._count = 0
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)

    def __enter__(self) -> "Lease":
        self._take()
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._released.set()
        self._thread.join()
        with suppress(StoreError):
            if self._holder().get("owner") == self.owner:
                self.bucket.delete([LEASE])

    def _take(self) -> None:
        """Create the lease. Raises `UserError` if another process holds and renews it."""
        # Earlier owners on this machine are dead, because they would hold the mirror's lock.
        dead = self._owners.read_text().split() if self._owners.exists() else []
        atomic_write(self._owners, "\n".join([*dead[-MOST_OWNERS:], self.owner]))
        held = self._holder()  # read first, because some stores let `create` replace an object
        while held or not self.bucket.create(LEASE, self._text()):
            held = held or self._holder()
            if held.get("owner") == self.owner:  # created, but the answer was lost
                return
            if held and held.get("owner") not in dead:
                self._wait_until_free(held)
            self.bucket.delete([LEASE])
            held = {}

    def _wait_until_free(self, held: dict[str, Any]) -> None:
        subject, who = self.bucket.subject, self._name(held)
        warn(f"{subject}: {who} held this run; waiting {LEASE_S} s to see whether it still does")
        until = time.monotonic() + LEASE_S
        while time.monotonic() < until:
            time.sleep(RENEW_S / 10)
            now = self._holder()
            if now and now != held:
                raise UserError(
                    f"{subject}: {self._name(now)} is writing to this run; expected an out_dir "
                    "that no other process uses; try another out_dir, or stop that process"
                )

    def check(self) -> None:
        """Raise `UserError` if another process has taken the lease."""
        held = self._holder()
        if held.get("owner") == self.owner:
            return
        problem = f"{self._name(held)} has taken over this run"
        expected = "expected one process that writes to it"
        advice = "try --init_from=auto after the other process has ended"
        raise LeaseLost(f"{self.bucket.subject}: {problem}; {expected}; {advice}")

    def _keep(self) -> None:
        while not self._released.wait(RENEW_S):
            with suppress(StoreError):  # the next try may succeed
                if self._holder().get("owner") != self.owner:
                    return
                self._count += 1
                self.bucket.write(LEASE, self._text())

    def _holder(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self.bucket.read(LEASE) or b"{}"))
        except ValueError:
            return {}

    def _text(self) -> bytes:
        who = {"owner": self.owner, "host": socket.gethostname(), "process": os.getpid()}
        return json.dumps(who | {"renewed": self._count}).encode()

    def _name(self, held: dict[str, Any]) -> str:
        return f"process {held.get('process', '?')} on {held.get('host', 'another machine')}"


class LeaseLost(UserError):
    """Another process has taken the lease of the run."""
