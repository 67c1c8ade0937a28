"""What becomes of a run when its workers fail: why they did, and whether they are started again.

Ray counts in its own way: workers that leave in good order because their machine is announced to go look to it like a
crash. So it is told to start them again for ever, and this decides; it runs in Ray Train's controller and so imports
nothing heavy.
"""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ray.exceptions import RayActorError
from ray.train import UserCallback

from mimiclab.errors import NoRetryError, PreemptedError, UserError
from mimiclab.inbox import Facts, Inbox
from mimiclab.preemption import LeavingError, draining_nodes
from mimiclab.storage import StoreError

Why = Literal["preemption", "node lost", "crash", "growth"]

_FIRST_PAUSE_S = 2.0
_MAX_PAUSE_S = 60.0
_CONNECT_S = 2.0
# Ray takes a node for dead after 15 to 65 s (see nodes.py), a drained one from its deadline on.
_LONGEST_DEATH_S = 300.0
_LOOK_S = 0.5


@dataclass(frozen=True)
class Failure:
    """Why workers stopped."""

    why: Why
    reason: str
    """A line for people."""


class Restarts(UserCallback):  # type: ignore[misc]
    """Counts preemptions and crashes, each against its own budget.

    Args:
        inbox: gets an event for every failure.
        max_crashes: in a row, without a new checkpoint between them.
        max_preemptions: None for any number. A node that is gone without a notice counts as one.
    """

    def __init__(self, inbox: Inbox, *, max_crashes: int, max_preemptions: int | None) -> None:
        self._inbox = inbox
        self._max = {"crash": max_crashes, "preemption": max_preemptions}
        self._num = {"crash": 0, "preemption": 0}
        self._saved = -1

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, BaseException]) -> None:
        """Called by Ray once for each failure of the workers.

        Raises:
            UserError: a mistake that no attempt will get around; as all that is raised here, it ends the run.
            NoRetryError: see there; or a budget is used up.
        """
        for error in _causes(worker_exceptions):
            if isinstance(error, NoRetryError) or (isinstance(error, UserError) and not isinstance(error, StoreError)):
                raise error
        facts = self._inbox.facts()
        self.count(diagnose(worker_exceptions, facts.nodes), facts)
        if run_context.scaling_config.elasticity_enabled:
            _replan(run_context.run_id, facts.nodes)

    def count(self, failure: Failure, facts: Facts) -> None:
        """Tell of a failure and count it; after crashes in a row, wait.

        Raises:
            NoRetryError: a budget is used up; a PreemptedError where that is the one of preemptions.
        """
        self._inbox.tell("failure", why=failure.why, reason=failure.reason)
        if failure.why == "growth":
            return
        kind = "crash" if failure.why == "crash" else "preemption"
        if facts.saved > self._saved:
            self._num["crash"] = 0
        self._saved = facts.saved
        self._num[kind] += 1
        limit = self._max[kind]
        if limit is not None and self._num[kind] > limit:
            what = "crashed in a row, without a new checkpoint" if kind == "crash" else "were taken their machines"
            raise (NoRetryError if kind == "crash" else PreemptedError)(
                f"scale.max_{'crashes' if kind == 'crash' else 'preemptions'}: {limit}, and the workers {what} "
                f"{self._num[kind]} times; the last time: {failure.reason}"
            )
        if kind == "crash" and self._num[kind] > 1:
            time.sleep(min(_FIRST_PAUSE_S * 2 ** (self._num[kind] - 2), _MAX_PAUSE_S))


def diagnose(worker_exceptions: Mapping[int, BaseException], nodes: tuple[str, ...]) -> Failure:
    """Find out why workers stopped.

    When one goes, the others fail with it as their connections break: what happened to the machines tells more than
    the first exception.

    Args:
        worker_exceptions: by rank.
        nodes: ids of the nodes that they ran on.
    """
    errors = list(_causes(worker_exceptions))
    for error in errors:
        if isinstance(error, LeavingError):
            return Failure("growth" if error.why == "growth" else "preemption", error.reason)
    drained = sorted(set(nodes) & draining_nodes().keys())
    if drained or any(isinstance(error, RayActorError) and error.preempted for error in errors):
        return Failure("preemption", f"a machine was taken before its deadline{_named(drained)}")
    lost = sorted(_lost(nodes))
    if lost:
        return Failure("node lost", f"a machine is gone without a notice{_named(lost)}")
    return Failure("crash", _summary(worker_exceptions))


def _causes(worker_exceptions: Mapping[int, BaseException]) -> Iterator[BaseException]:
    """Every exception, and those inside of it."""
    for outer in worker_exceptions.values():
        error: Any = outer
        while error is not None:
            yield error
            error = getattr(error, "health_check_failure", None) or error.__cause__


def _lost(nodes: tuple[str, ...]) -> Iterator[str]:
    """Those of the nodes that are dead, or that Ray will find dead soon: it takes seconds to notice."""
    import ray

    known = {node["NodeID"]: node for node in ray.nodes()}
    for node_id in nodes:
        node = known.get(node_id)
        if node is None or not node["Alive"]:
            yield node_id
            continue
        try:
            socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), _CONNECT_S).close()
        except OSError:
            yield node_id


def _replan(run_id: str, nodes: tuple[str, ...]) -> None:
    """Have Ray look at the cluster's nodes now, and again whenever it has found one of the run's own to be dead.

    The number of workers of an elastic run is that which fits on the nodes that Ray has set aside for it. By itself
    Ray looks every 20 s which nodes there are: until then it waits for workers on one that it knows to be dead, or
    does without one that is new.
    """
    import ray
    from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as ray_module

    coordinator = ray_module.get_or_create_autoscaling_coordinator()

    def look() -> None:
        coordinator.get_reserved_resources.remote(f"train-{run_id}", recompute=True)

    def look_at_deaths() -> None:
        going = set(nodes) & {*draining_nodes(), *_lost(nodes)}
        deadline = time.monotonic() + _LONGEST_DEATH_S
        while going and time.monotonic() < deadline:
            alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
            if going - alive:
                look()
            going &= alive
            time.sleep(_LOOK_S)

    look()  # before the controller asks for the number, which comes next
    threading.Thread(target=look_at_deaths, daemon=True).start()


def _named(nodes: list[str]) -> str:
    return f" (node {', '.join(node[:8] for node in nodes)})" if nodes else ""


def _summary(worker_exceptions: Mapping[int, BaseException]) -> str:
    """The failure that says most: of a worker that is dead, else the first; its last line."""
    dead = [rank for rank, error in worker_exceptions.items() if hasattr(error, "health_check_failure")]
    if dead:
        return f"the process of rank {min(dead)} died"
    rank = min(worker_exceptions)
    return f"rank {rank}: {type(worker_exceptions[rank]).__name__}: {last_line(worker_exceptions[rank])}"


_EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Exit|Interrupt): ")


def last_line(error: BaseException) -> str:
    """What happened, of an exception whose text may hold a traceback: that one's last exception, else the last line."""
    lines = str(error).strip().splitlines() or [""]
    return next((line for line in reversed(lines) if _EXCEPTION.match(line)), lines[-1])[:300]
