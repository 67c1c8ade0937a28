"""What is remembered of the clusters that were started on this machine, from one command to the next."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

MACHINE = "cluster"
"""Name of the one cluster that commands mean where they are told of no other."""

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
    """The head first, then what it and the other nodes had started by the time they answered."""
    nodes: dict[str, ProcessId] = field(default_factory=dict)
    """The process that started each node beside the head, and ends with it, by the node's name; also of those gone."""
    name: str = MACHINE
    owner: ProcessId | None = None
    """The process that the cluster shall not outlive; None where it runs until `cluster down`."""

    def write(self) -> None:
        """Remember this cluster."""
        path = state_file(self.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".new")
        aside.write_text(json.dumps(asdict(self), indent=1))
        aside.replace(path)

    def running(self) -> list[psutil.Process]:
        """Those of its processes that still run."""
        return _found(self.processes)

    def starters(self) -> list[psutil.Process]:
        """The processes that still run of those that started a node each, the head's first."""
        return _found([*self.processes[:1], *self.nodes.values()])


def state_file(name: str = MACHINE) -> Path:
    """The file that remembers a cluster: below $XDG_STATE_HOME, by default ~/.local/state."""
    home = os.environ.get("XDG_STATE_HOME")
    return (Path(home) if home else Path.home() / ".local" / "state") / "mimiclab" / f"{name}.json"


def remembered(name: str = MACHINE) -> LocalCluster | None:
    """The cluster of that name that was started last and not ended since, whether or not it still runs."""
    try:
        record = json.loads(state_file(name).read_text())
    except FileNotFoundError:
        return None
    owner = record.get("owner")
    return LocalCluster(
        **{
            **record,
            "processes": tuple(ProcessId(**process) for process in record["processes"]),
            "nodes": {node: ProcessId(**process) for node, process in record.get("nodes", {}).items()},
            "owner": None if owner is None else ProcessId(**owner),
        }
    )


def abandoned() -> list[LocalCluster]:
    """The clusters whose owner ended without ending them."""
    return [cluster for cluster in _all() if cluster.owner is not None and find(cluster.owner) is None]


def running() -> LocalCluster | None:
    """The cluster of this machine, None where none runs."""
    cluster = remembered()
    return cluster if cluster is not None and cluster.running() else None


def running_at(address: str) -> LocalCluster | None:
    """The cluster on this machine that has that address; this process then has Ray's settings for it.

    What the user has set comes first.
    """
    for cluster in _all():
        if address in (cluster.head, cluster.job_server) and cluster.running():
            _apply(cluster.environment)
            return cluster
    return None


def forget(name: str = MACHINE) -> None:
    """Remember no cluster of that name."""
    state_file(name).unlink(missing_ok=True)


def identify(processes: Iterable[psutil.Process]) -> tuple[ProcessId, ...]:
    """What to remember of processes."""
    return tuple(ProcessId(process.pid, process.create_time()) for process in processes)


def is_alive(process: psutil.Process) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def find(known: ProcessId) -> psutil.Process | None:
    """A process that was known before; None where it has ended."""
    try:
        process = psutil.Process(known.pid)
        same = abs(process.create_time() - known.started) < _CLOCK_S
    except psutil.NoSuchProcess:
        return None
    return process if same and is_alive(process) else None


def _apply(environment: Mapping[str, str]) -> None:
    """Give this process the settings of Ray that it has no others for."""
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    if "ray" not in sys.modules:
        return
    from ray._raylet import AuthenticationMode, Config, get_authentication_mode  # type: ignore[attr-defined]

    # Ray reads its settings when it is imported. One that was before would send no token, and be refused for ever.
    wanted = os.environ.get("RAY_AUTH_MODE", "").lower() == "token"
    if wanted != (get_authentication_mode() == AuthenticationMode.TOKEN):
        Config.initialize("")


def _found(known: Iterable[ProcessId]) -> list[psutil.Process]:
    return [process for process in map(find, known) if process is not None]


def _all() -> list[LocalCluster]:
    """What is remembered, the cluster of this machine first."""
    names = sorted(path.stem for path in state_file().parent.glob(f"{MACHINE}*.json"))
    return [cluster for cluster in map(remembered, names) if cluster is not None]
