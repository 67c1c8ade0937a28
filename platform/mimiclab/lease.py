"""One driver per run: a record in the run's folder says who trains it, and is kept fresh while that driver lives.

A driver on this machine is alive if its process is. One on another machine is alive if its record is younger than
`STALE_S`: a heartbeat rewrites it. Clocks of machines that share a folder are taken to agree within half a minute, as
any time service keeps them; were they further apart, a driver might be taken for dead while it lives.

Of two drivers that start at the same moment one wins. In a local folder a file lock makes looking and writing one act.
Other stores have none that pyarrow.fs offers: there a driver writes its record, waits, and has the lease if the record
is still its own. That leaves a window: who stalls for longer than `SETTLE_S` between looking and writing overwrites a
driver that has begun. As every driver looks at the record before it renews it, one of the two then stops at its next
heartbeat.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path

import psutil

from mimiclab.cluster.state import ProcessId, find
from mimiclab.errors import UserError
from mimiclab.storage import MissingError, Storage

LEASE, LOCK = ".lease.json", ".lease.lock"
"""Files of a run's folder: the record, and what is locked while it is looked at and written. Hidden, as they stay where
they are when the driver that holds the lease empties the folder."""

STALE_S = 60.0
"""Age of a record at which a driver on another machine counts as dead: three heartbeats were missed, or one was and the
clocks are half a minute apart."""

# A write to an object store costs money, one to a disk nothing.
HEARTBEAT_S = 5.0
REMOTE_HEARTBEAT_S = 15.0
RETRY_S = 1.0
# Stores answer within a second when nothing is wrong; drivers start once in hours.
SETTLE_S = 3.0

_STOP_S = 10.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Holder:
    """The driver that holds a run's lease, or held it last. Times are seconds since 1970."""

    owner: str
    """Of this driver only, at random."""
    host: str
    pids: str
    """Names the space in which `pid` means something: a machine since its last start, or a container in it."""
    pid: int
    started: float
    """When that process started: the system gives its number to another one day."""
    since: float
    """When it took the lease."""
    heartbeat: float
    step: int = 0
    """The last step that it knew of at the heartbeat."""
    seconds: float = 0.0
    """Useful seconds of training that it knew of."""

    def is_alive(self) -> bool:
        """Whether it still holds the lease, as far as can be told from here."""
        if self.pids == _pids():
            return find(ProcessId(self.pid, self.started)) is not None
        return time.time() - self.heartbeat <= STALE_S

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def last_holder(storage: Storage) -> Holder | None:
    """Who holds the lease of the run in a folder, or held it last; None where that was given back, or never taken.

    Raises:
        UserError: the folder cannot be read.
    """
    try:
        return Holder(**json.loads(storage.read(LEASE)))
    except MissingError:
        return None
    except (ValueError, TypeError):
        # Records are written in one step. What breaks one is the end of the machine, and so of its driver; one that
        # does live finds the record of another at its next heartbeat.
        return None


class Lease:
    """The right to train a run, from `take` to `release`; as a context it is released at the end.

    Attributes:
        before: who held it last and did not give it back: a driver that died.
        lost: who has it instead, once another driver has taken it. This one must stop.
    """

    def __init__(self, storage: Storage, mine: Holder, before: Holder | None) -> None:
        self.before = before
        self.lost: Holder | None = None
        self._storage = storage
        self._mine = mine
        self._facts = (0, 0.0)
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    @classmethod
    def take(cls, storage: Storage, name: str, *, kind: str = "run") -> Lease:
        """Become the driver of a run, and stay it until the lease is released.

        Args:
            storage: the run's folder; made if missing.
            name: of the run, for messages.
            kind: what it is, likewise: a run, or a search.

        Raises:
            UserError: another driver that is alive has it, or the folder cannot be written.
        """
        mine = _this_process()
        try:
            if storage.local is not None:
                storage.local.mkdir(parents=True, exist_ok=True)
            with _alone(storage) as alone:
                before = last_holder(storage)
                if before is not None and before.is_alive():
                    raise UserError(_refusal(f"{kind} {name}", before, storage))
                _write(storage, mine)
        except OSError as error:
            raise UserError(f"{storage.where(LEASE)}: cannot be written: {error}") from error
        if not alone:
            time.sleep(SETTLE_S)
            winner = last_holder(storage)
            if winner is not None and winner.owner != mine.owner:
                raise UserError(_refusal(f"{kind} {name}", winner, storage))
        return cls(storage, mine, before)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def note(self, step: int, seconds: float) -> None:
        """Let the next heartbeat say how far the run is: the last step, and useful seconds so far."""
        self._facts = step, seconds

    def release(self) -> None:
        """Give the lease back. Where that fails nobody is stopped by it: this process ends."""
        self._released.set()
        self._thread.join(_STOP_S)
        try:
            with _alone(self._storage):
                found = last_holder(self._storage)
                if found is not None and found.owner == self._mine.owner:
                    self._storage.delete(LEASE)
        except (UserError, OSError) as error:
            _log.warning("%s", error)

    def _keep(self) -> None:
        period = HEARTBEAT_S if self._storage.local is not None else REMOTE_HEARTBEAT_S
        failing = False
        while not self._released.wait(min(period, RETRY_S) if failing else period):
            try:
                other = self._beat()
            except Exception as error:  # whatever a store raises: the run must not end by it
                if not failing:
                    _log.warning("%s cannot be renewed (%s); it is tried again", self._storage.where(LEASE), error)
                failing = True
                continue
            failing = False
            if other is not None:
                self.lost = other
                return

    def _beat(self) -> Holder | None:
        """Renew the record; who has the lease if that is another."""
        with _alone(self._storage):
            found = last_holder(self._storage)
            if found is not None and found.owner != self._mine.owner:
                return found
            step, seconds = self._facts
            _write(self._storage, replace(self._mine, heartbeat=time.time(), step=step, seconds=seconds))
        return None


@contextlib.contextmanager
def _alone(storage: Storage) -> Iterator[bool]:
    """Shut other drivers out, and say whether that was possible."""
    if storage.local is None:
        yield False
        return
    with (storage.local / LOCK).open("a") as file:
        locked = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX)  # its end with the process, however that ends
        except OSError:  # some network file systems have no locks
            locked = False
        yield locked


def _write(storage: Storage, holder: Holder) -> None:
    storage.write(LEASE, json.dumps(asdict(holder), indent=1).encode())


def _this_process() -> Holder:
    now = time.time()
    started = psutil.Process().create_time()
    return Holder(secrets.token_hex(8), socket.gethostname(), _pids(), os.getpid(), started, since=now, heartbeat=now)


def _pids() -> str:
    # Not the host's name: machines may share one, and so may containers with numbers of their own.
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115
    except OSError:  # not Linux
        return socket.gethostname()


def _refusal(name: str, other: Holder, storage: Storage) -> str:
    age = max(0.0, time.time() - other.heartbeat)
    if other.pids == _pids():
        advice = f"stop that one first (kill -INT {other.pid})"
    else:
        advice = (
            f"stop that one first. If its machine is gone, the same command goes on {STALE_S:.0f} s after it was last "
            f"heard of, or at once when {storage.where(LEASE)} is removed"
        )
    return (
        f"{name}: {other} drives it since {_clock(other.since)}, last heard of {age:.0f} s ago; "
        f"expected no other driver: {advice}"
    )


def _clock(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().isoformat(sep=" ", timespec="seconds")
