"""Where the processes of a run tell its driver what happens: an actor beside the driver.

Workers come and go, and may share no file system with the driver; Ray's own forwarding of their output mixes in all
processes' noise. What is told costs the one who tells it no waiting. A driver whose only worker is a thread of its own
process needs no actor.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

Event = dict[str, Any]
"""`kind`, `time` in seconds since 1970, and what belongs to the kind."""

# Far more than a driver that listens leaves unread; one that is stopped in a debugger must not fill the memory.
_MAX_UNREAD = 100_000


@dataclass(frozen=True)
class Facts:
    """What the next attempt of a run, and who decides about it, has to know of those before."""

    reached: int = 0
    """The last step that was done by any of them."""
    saved: int = 0
    """The step of the newest checkpoint."""
    nodes: tuple[str, ...] = ()
    """Ids of the nodes that the workers at work run on, in the order of ranks; none before they have begun."""
    world: int = 0
    """How many the latest of them were."""
    why: str | None = None
    """What ended the latest that has ended, as `restarts.Why`."""


class _Inbox:
    """The actor, or what a lock makes safe for threads."""

    def __init__(self) -> None:
        self._unread: deque[Event] = deque(maxlen=_MAX_UNREAD)
        self._facts: dict[str, Any] = {}
        self._workers: list[Any] = []

    def put(self, event: Event) -> None:
        """Take an event, and remember of it what `Facts` holds."""
        self._unread.append(event)
        if event["kind"] == "step":
            self._facts["reached"] = max(self._facts.get("reached", 0), event["step"])
        elif event["kind"] == "attempt":
            self._facts |= {"saved": event["step"], "nodes": tuple(event["nodes"]), "world": len(event["nodes"])}
        elif event["kind"] == "checkpoint":
            self._facts["saved"] = event["step"]
        elif event["kind"] == "failure":
            # The next attempt may fail before it can say where it is.
            self._facts |= {"why": event["why"], "nodes": ()}

    def take(self) -> list[Event]:
        """Give the events that nobody has taken yet, in the order of their arrival."""
        events = list(self._unread)
        self._unread.clear()
        return events

    def facts(self) -> Facts:
        """Give what is known."""
        return Facts(**self._facts)

    def enlist(self, worker: list[Any]) -> None:
        """Take the handle of a worker, in a list: by itself Ray would resolve it."""
        self._workers += worker

    def workers(self) -> list[Any]:
        """Give all handles."""
        return self._workers


class Inbox:
    """A handle on the actor, which travels to other processes of the cluster."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    @staticmethod
    def open() -> Inbox:
        """Start one on this machine; it ends with the driver."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        return Inbox(ray.remote(num_cpus=0, scheduling_strategy=here)(_Inbox).remote())

    def tell(self, kind: str, **fields: Any) -> None:
        """Put in an event, with the present time; does not wait for it to arrive."""
        self._actor.put.remote({"kind": kind, "time": time.time(), **fields})

    def take(self) -> list[Event]:
        """What has arrived since the last call, in order."""
        import ray

        events: list[Event] = ray.get(self._actor.take.remote())
        return events

    def facts(self, timeout_s: float = 30.0) -> Facts:
        """What is known of the attempts so far."""
        import ray

        facts: Facts = ray.get(self._actor.facts.remote(), timeout=timeout_s)
        return facts

    def enlist(self) -> None:
        """Let `close` end the worker that calls this."""
        import ray

        self._actor.enlist.remote([ray.get_runtime_context().current_actor])

    def close(self) -> None:
        """End the workers that still are at work, and the actor; what it holds is lost.

        Without it there is nobody to tell, and no attempt begins any more.
        """
        import ray

        workers = ray.get(self._actor.workers.remote())
        ray.kill(self._actor)
        for worker in workers:
            ray.kill(worker)


class LocalInbox(Inbox):
    """The same for a driver and a worker in one process."""

    def __init__(self) -> None:
        self._box = _Inbox()
        self._lock = threading.Lock()

    def tell(self, kind: str, **fields: Any) -> None:
        """Put in an event, with the present time."""
        with self._lock:
            self._box.put({"kind": kind, "time": time.time(), **fields})

    def take(self) -> list[Event]:
        """What has arrived since the last call, in order."""
        with self._lock:
            return self._box.take()

    def facts(self, timeout_s: float = 30.0) -> Facts:
        """What is known of the attempts so far."""
        with self._lock:
            return self._box.facts()

    def close(self) -> None:
        """Nothing: the worker is no process to end."""
