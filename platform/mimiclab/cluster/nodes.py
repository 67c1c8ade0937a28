"""The nodes of a cluster on this machine: what Ray knows of them, and what clouds do to machines.

A node stands for a machine: a raylet, its agents and its workers, all descendants of one process. What a killed one
looks like to Ray, and how long everything takes, is measured in tests/integration/test_nodes.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import psutil

from mimiclab.cluster import node as node_process
from mimiclab.cluster import state
from mimiclab.cluster.drain import RayNode
from mimiclab.cluster.server import VARIABLES
from mimiclab.cluster.state import LocalCluster

if TYPE_CHECKING:
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled

HEAD = "head"
"""Name of the node that the cluster cannot lose."""
HEAD_LABELS = {"ray.io/market-type": "on-demand"}
SPOT_LABELS = {"ray.io/market-type": "spot"}
OBJECT_STORE_BYTES = 150_000_000
"""Of each node, where several share a machine. Batches and weights do not pass through it."""

_OF_A_CLUSTER = (
    *VARIABLES,
    *("RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_REDIS_ADDRESS", "RAY_CLOUD_INSTANCE_ID", "RAY_NODE_TYPE_NAME"),
)
_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
_RPC_S = 5.0
_START_TIMEOUT_S = 180.0
_KILL_TIMEOUT_S = 10.0
_POLL_S = 0.1


Found = TypeVar("Found")


@dataclass(frozen=True)
class Node:
    """A node as Ray lists it."""

    name: str
    id: str
    """56 hexadecimal digits."""
    alive: bool
    """Whether Ray takes it for alive; what has just died is, until Ray notices."""
    deadline: float | None
    """When it will be gone, in seconds since 1970, where it drains; 0 where it drains without a deadline."""
    labels: Mapping[str, str]
    resources: Mapping[str, float]
    death: str
    """What Ray says of its end; "" while it lives."""

    @property
    def state(self) -> str:
        """One word: alive, draining or dead."""
        return ("alive" if self.deadline is None else "draining") if self.alive else "dead"


class Nodes:
    """The nodes of a cluster on this machine.

    Args:
        cluster: to be changed by one process at a time.
    """

    def __init__(self, cluster: LocalCluster) -> None:
        self.cluster = cluster
        """What is remembered of it, brought up to date by `start`."""
        self._client: GcsClient | None = None

    def all(self) -> list[Node]:
        """Every node that Ray has seen, in the order of their names' numbers, the head first.

        Raises:
            OSError: the head does not answer.
        """
        client = self._connect()
        from ray.core.generated.gcs_pb2 import GcsNodeInfo

        draining = client.get_draining_nodes(timeout=_RPC_S)
        nodes = [
            Node(
                name=info.node_name,
                id=info.node_id.hex(),
                alive=info.state == GcsNodeInfo.ALIVE,
                deadline=draining[info.node_id.hex()] / 1000 if info.node_id.hex() in draining else None,
                labels=dict(info.labels),
                resources=dict(info.resources_total),
                death=info.death_info.reason_message,
            )
            for info in client.get_all_node_info(timeout=_RPC_S).values()
        ]
        order = [HEAD, *self.cluster.nodes]
        return sorted(nodes, key=lambda node: order.index(node.name) if node.name in order else len(order))

    def get(self, name: str) -> Node:
        """The node of that name.

        Raises:
            KeyError: Ray has not seen it yet.
            OSError: the head does not answer.
        """
        return {node.name: node for node in self.all()}[name]

    def start(
        self,
        *,
        num_cpus: int = 1,
        labels: Mapping[str, str] = SPOT_LABELS,
        resources: Mapping[str, float] | None = None,
    ) -> str:
        """Start a node and return its name, before Ray knows it.

        Args:
            num_cpus: how many CPUs it offers.
            labels: that tasks and workers select nodes by.
            resources: what else it offers, as {"name": amount}.
        """
        name = f"node-{len(self.cluster.nodes) + 1}"
        arguments = node_process.command(
            self.cluster,
            name,
            num_cpus=num_cpus,
            labels=dict(labels),
            resources=dict(resources or {}),
            object_store_bytes=OBJECT_STORE_BYTES,
        )
        process = spawn(arguments, self._log(name), self.cluster.environment)
        [known] = state.identify([process])
        self.cluster = dataclasses.replace(self.cluster, nodes={**self.cluster.nodes, name: known})
        self.cluster.write()
        return name

    def add(
        self,
        *,
        num_cpus: int = 1,
        labels: Mapping[str, str] = SPOT_LABELS,
        resources: Mapping[str, float] | None = None,
    ) -> Node:
        """Start a node and wait until Ray knows it; see `start`.

        Raises:
            RuntimeError: it ended, or Ray does not know it within three minutes; with the end of its output.
        """
        return self.wait_alive(self.start(num_cpus=num_cpus, labels=labels, resources=resources))

    def wait_alive(self, name: str) -> Node:
        """Wait until Ray knows a node that was started.

        Raises:
            RuntimeError: it ended, or Ray does not know it within three minutes; with the end of its output.
        """
        from ray.exceptions import RpcError

        def known() -> Node | None:
            with contextlib.suppress(KeyError, OSError, RpcError):  # a head that starts, on a busy machine
                return self.get(name)
            return None

        found = _wait_for(lambda: known() or not self.processes(name), _START_TIMEOUT_S)
        if not isinstance(found, Node):
            raise RuntimeError(f"{name} did not start:\n{self._log(name).read_text(errors='replace')[-2000:]}")
        processes = {*self.cluster.processes, *state.identify(self.processes(name))}
        head = self.cluster.processes[0]
        self.cluster = dataclasses.replace(self.cluster, processes=(head, *(processes - {head})))
        self.cluster.write()
        return found

    def wait_dead(self, name: str, timeout_s: float) -> Node:
        """Wait until Ray takes a node for dead.

        Raises:
            TimeoutError: it does not within the time.
        """

        def dead() -> Node | None:
            node = self.get(name)
            return None if node.alive else node

        found = _wait_for(dead, timeout_s)
        if found is None:
            raise TimeoutError(f"Ray still takes {name} for alive after {timeout_s:g} s")
        return found

    def processes(self, name: str) -> list[psutil.Process]:
        """All processes of a node that still run."""
        known = self.cluster.processes[0] if name == HEAD else self.cluster.nodes[name]
        starter = state.find(known)
        return [] if starter is None else tree([starter])

    def workers(self, name: str) -> list[psutil.Process]:
        """The processes on a node that run tasks and actors, or wait for some (ray::IDLE)."""
        workers = []
        for process in self.processes(name):
            with contextlib.suppress(psutil.NoSuchProcess):
                title = process.cmdline()[:1]
                if title and title[0].startswith("ray::") and title[0] not in _AGENTS:
                    workers.append(process)
        return workers

    def kill(self, name: str) -> None:
        """End a node as when its machine disappears: all its processes at once, none of them with a last word.

        Who talks to a worker there sees its connection closed and knows at once. Ray goes by its health checks: it
        takes the node for dead after 15 s, five checks in 3 s each (RAY_health_check_period_ms and
        RAY_health_check_failure_threshold in the environment of `up`). A machine that loses its power closes no
        connection, and each check takes its 10 s of RAY_health_check_timeout_ms more: 65 s.

        Raises:
            ValueError: it is the head.
        """
        if name == HEAD:
            raise ValueError("the head cannot be killed: the cluster would end with it; expected another node")
        frozen: set[psutil.Process] = set()
        # A process that is stopped starts no other.
        while more := set(self.processes(name)) - frozen:
            _each(more, psutil.Process.suspend)
            frozen |= more
        _each(frozen, psutil.Process.kill)
        _wait_for(lambda: not any(map(state.is_alive, frozen)), _KILL_TIMEOUT_S)

    def drain(self, name: str, seconds: float) -> float:
        """Announce a node's end to Ray as a cloud does to spot machines, and kill it then.

        A node without work ends at once.

        Returns:
            When it will be killed, in seconds since 1970.

        Raises:
            NodeError: Ray refuses, or does not know it.
        """
        deadline = time.time() + seconds
        RayNode(self.cluster.head, self.get(name).id).drain("spot reclaim", deadline)
        timer = threading.Timer(max(0.0, deadline - time.time()), self.kill, (name,))
        timer.daemon = True
        timer.start()
        return deadline

    def _log(self, name: str) -> Path:
        return Path(self.cluster.folder) / f"{name}.log"

    def _connect(self) -> GcsClient:
        host, _, port = self.cluster.head.rpartition(":")
        # Ray itself would try for most of a minute.
        socket.create_connection((host, int(port)), timeout=_RPC_S).close()
        if self._client is None:
            state.running_at(self.cluster.head)
            from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled

            self._client = GcsClient(address=self.cluster.head)
        return self._client


def spawn(arguments: list[str], log: Path, environment: Mapping[str, str]) -> psutil.Process:
    """Start a node's first process in a session of its own, where a Ctrl-C at this command does not reach it."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            arguments,
            env={
                **without_cluster(os.environ),
                **environment,
                # Ray's dashboard leaves files there when it ends, and so does what it runs.
                "TMPDIR": str(log.parent),
                # Asked to end, it would wait half a minute for what runs to move to other nodes.
                "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            },
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return psutil.Process(process.pid)


def without_cluster(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment less what ties a process to a cluster, for one of another: all that Ray gives a job's driver.

    The driver's package would be looked for at a head that does not have it, and a node would offer what its machine
    was told to. Settings and the path of modules stay.
    """
    return {
        name: value
        for name, value in environment.items()
        if name not in _OF_A_CLUSTER and not name.startswith("RAY_OVERRIDE_")
    }


def tree(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Processes and all their descendants, those that still run."""
    found: set[psutil.Process] = set()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            found |= {process, *process.children(recursive=True)}
    return [process for process in found if state.is_alive(process)]


def _each(processes: set[psutil.Process], action: Callable[[psutil.Process], None]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            action(process)


def _wait_for(condition: Callable[[], Found], timeout_s: float) -> Found:
    """The first result that is true, else the last."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return found
