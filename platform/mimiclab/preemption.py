"""The machines of a run: which of them is about to go, and whether there is room for more of them.

Rank 0 alone asks, in a thread and never within a step; it tells the others by the number that travels with the losses
of each step (`Engine.train_step`). Ray's own way, `ray.train.get_preemption_info`, is a meeting of all ranks through
an actor: 3 to 40 ms of each step in which it is asked.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

# A cloud's notice is 30 s to 2 min ahead.
_EVERY_S = 1.0
_RPC_S = 5.0
_CLOSE_S = 2.0


@dataclass(frozen=True)
class Notice:
    """Some of the run's machines are going to go."""

    nodes: tuple[str, ...]
    """Their ids, sorted."""
    deadline: float | None
    """When the first of them goes, in seconds since 1970; None where that is not known."""


class LeavingError(Exception):
    """Raised by all ranks at the same step, after a checkpoint: the workers are to be started anew elsewhere.

    Ray Train knows no other way to let its workers go that it would not take for the end of the run.
    """

    def __init__(self, why: str, reason: str) -> None:
        super().__init__(reason)
        self.why = why
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.why, self.reason)


class Machines:
    """Watches the nodes of a run in a thread of its own.

    Args:
        draining: gives {node id: deadline in ms since 1970, 0 where there is none} of the nodes that are drained.
        nodes: ids of those that the run's workers are on.
        room: gives how many more workers the cluster has room for; None where the run may not grow.
        room_every_s: how often it is asked.
        every_s: how often `draining` is asked.
    """

    def __init__(
        self,
        draining: Callable[[], Mapping[str, int]],
        nodes: Collection[str],
        *,
        room: Callable[[], int] | None = None,
        room_every_s: float = 60.0,
        every_s: float = _EVERY_S,
    ) -> None:
        self._draining = draining
        self._nodes = frozenset(nodes)
        self._room = room
        self._room_every_s = room_every_s
        self._every_s = every_s
        self._notice: Notice | None = None
        self._num_more = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="machines", daemon=True)
        self._thread.start()

    def notice(self) -> Notice | None:
        """What is announced; asks nobody and costs nothing."""
        return self._notice

    def room(self) -> int:
        """How many more workers there was room for when that was last asked."""
        return self._num_more

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._thread.join(_CLOSE_S)  # it may be waiting for a head that is gone

    def _watch(self) -> None:
        # Not at once: what an attempt that has just ended held comes back bit by bit.
        next_room = time.monotonic() + self._room_every_s
        while not self._closed.wait(self._every_s):
            try:
                self._notice = self._own(self._draining())
                if self._room is not None and time.monotonic() >= next_room:
                    next_room = time.monotonic() + self._room_every_s
                    self._num_more = self._room()
            except Exception:  # the head may be away for a while; what was known still holds
                continue

    def _own(self, draining: Mapping[str, int]) -> Notice | None:
        nodes = sorted(self._nodes & draining.keys())
        if not nodes:
            return None
        deadlines = [draining[node] / 1000 for node in nodes if draining[node]]
        return Notice(tuple(nodes), min(deadlines, default=None))


def draining_nodes() -> Mapping[str, int]:
    """The nodes of this process's cluster that are drained: {id: deadline in ms since 1970, 0 where there is none}."""
    import ray
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled

    client = GcsClient(address=ray.get_runtime_context().gcs_address)
    found: Mapping[str, int] = client.get_draining_nodes(timeout=_RPC_S)
    return found


def room_for(each: Mapping[str, float], labels: Mapping[str, str]) -> int:
    """How many more workers the cluster has room for now.

    Args:
        each: what a worker asks Ray for.
        labels: those that its node must have.
    """
    import ray
    from ray._private.state import available_resources_per_node

    leaving = draining_nodes()
    free = available_resources_per_node()
    num = 0
    for node in ray.nodes():
        if node["Alive"] and node["NodeID"] not in leaving and labels.items() <= (node.get("Labels") or {}).items():
            here = free.get(node["NodeID"], {})
            num += min(int(here.get(kind, 0) // amount) for kind, amount in each.items() if amount)
    return num
