"""What is remembered of the cluster that was started on this machine, from one command to the next."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

# The time at which a process started is computed from the clock, which may be set in between.
_CLOCK_S = 2.0


@dataclass(frozen=True)
class ProcessId:
    """A process for good: the system gives the same number to another one day."""

    pid: int
    started: float
    """Seconds since 1970."""


@dataclass(frozen=True)
class LocalCluster:
    """A cluster on this machine."""

    head: str
    """HOST:PORT that drivers and nodes connect to."""
    job_server: str
    """URL that jobs are submitted to; Ray's dashboard is there as well."""
    folder: str
    """Ray's folder of sockets and logs."""
    environment: dict[str, str]
    """Ray's settings that its head was started with, and that whoever connects needs too."""
    processes: tuple[ProcessId, ...]
    """The head first, then what it had started by the time it answered."""

    def write(self) -> None:
        """Remember this cluster."""
        path = state_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".new")
        aside.write_text(json.dumps(asdict(self), indent=1))
        aside.replace(path)

    def running(self) -> list[psutil.Process]:
        """Those of its processes that still run."""
        return [process for process in map(_find, self.processes) if process is not None]


def state_file() -> Path:
    """The file that remembers: below $XDG_STATE_HOME, by default ~/.local/state."""
    home = os.environ.get("XDG_STATE_HOME")
    return (Path(home) if home else Path.home() / ".local" / "state") / "mimiclab" / "cluster.json"


def remembered() -> LocalCluster | None:
    """The cluster that was started last and not ended since, whether or not it still runs."""
    try:
        record = json.loads(state_file().read_text())
    except FileNotFoundError:
        return None
    processes = tuple(ProcessId(**process) for process in record["processes"])
    return LocalCluster(**{**record, "processes": processes})


def running() -> LocalCluster | None:
    """The cluster of this machine, None where none runs."""
    cluster = remembered()
    return cluster if cluster is not None and cluster.running() else None


def running_at(address: str) -> LocalCluster | None:
    """The cluster of this machine where that is its address; this process then has Ray's settings for it.

    To be called before Ray is imported, which reads them once. What the user has set comes first.
    """
    cluster = running()
    if cluster is None or address not in (cluster.head, cluster.job_server):
        return None
    for name, value in cluster.environment.items():
        os.environ.setdefault(name, value)
    return cluster


def forget() -> None:
    """Remember no cluster."""
    state_file().unlink(missing_ok=True)


def identify(processes: Sequence[psutil.Process]) -> tuple[ProcessId, ...]:
    """What to remember of processes."""
    return tuple(ProcessId(process.pid, process.create_time()) for process in processes)


def is_alive(process: psutil.Process) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _find(known: ProcessId) -> psutil.Process | None:
    try:
        process = psutil.Process(known.pid)
        same = abs(process.create_time() - known.started) < _CLOCK_S
    except psutil.NoSuchProcess:
        return None
    return process if same and is_alive(process) else None
