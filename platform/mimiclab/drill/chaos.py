"""Takes machines and processes from a run, at the steps that the run reports."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import psutil

from mimiclab.cluster.drain import NodeError
from mimiclab.drill.schedule import Event

if TYPE_CHECKING:
    from mimiclab.cluster.nodes import Node, Nodes

BLOW = "blow"
"""Kind of the events that are put among those of the run when something was done to it."""

# What Ray calls the processes of ranks.
_RANK = "ray::RayTrainWorker"
_TRIES = 3


class Chaos:
    """Does to a run what was planned.

    Args:
        events: in the order of their steps.
        nodes: of the run's cluster, a worker on each.
        cpus_per_node: what a new node offers.
        replace: whether a node that is lost is replaced at once, one that is announced to go at the announcement.
        kill_driver: ends the driver; False where it had ended by itself.
        seed: of the choice of ranks and nodes.
        say: gets a line for people whenever something is done.

    Attributes:
        story: what the run told, as it came, with what was done to it in between: events of kind "blow" with
            `event`, `target`, the last `step`, and whether it was `done`; their `time` is taken before. To an
            "attempt" is added when the last of its processes began to exist, as `processes_started`, None where that
            could not be seen.
    """

    def __init__(
        self,
        events: Sequence[Event],
        nodes: Nodes,
        *,
        cpus_per_node: int,
        replace: bool,
        kill_driver: Callable[[], bool],
        seed: int,
        say: Callable[[str], object],
    ) -> None:
        self.story: list[dict[str, Any]] = []
        self._left = list(events)
        self._nodes = nodes
        self._cpus_per_node = cpus_per_node
        self._replace = replace
        self._kill_driver = kill_driver
        self._rng = random.Random(seed)
        self._say = say
        self._ranks: list[str] = []

    def hear(self, event: dict[str, Any]) -> None:
        """Take note of an event of the run, and do what is due."""
        if event["kind"] == "attempt":
            self._ranks = event["nodes"]
            event = {**event, "processes_started": self._processes_started()}
        self.story.append(event)
        if event["kind"] == "step":
            while self._left and self._left[0].step <= event["step"]:
                self._strike(self._left.pop(0), event["step"])

    def _strike(self, event: Event, step: int) -> None:
        # By name, and not in the order of Ray: the same seed takes the same ones.
        places = {node.name: node for node in sorted(self._nodes.all(), key=lambda node: node.name)}
        started = time.time()
        try:
            target, done = self._do(event, places), True
        except LookupError as error:  # what it needs is gone, as at the end of a run
            target, done = str(error), False
        self._say(f"{event}: at step {step}, {target}")
        blow = {"kind": BLOW, "time": started, "event": event, "step": step, "target": target, "done": done}
        self.story.append(blow)
        if event.kind == "kill-driver" and done:  # what its workers see of it nobody can tell any more
            self.story.append({"kind": "failure", "time": started, "why": "driver", "reason": "the driver was killed"})

    def _do(self, event: Event, places: dict[str, Node]) -> str:
        if event.kind == "add-node":
            return f"added {self._nodes.start(num_cpus=self._cpus_per_node)}"
        if event.kind == "kill-driver":
            if not self._kill_driver():
                raise LookupError("found no driver")
            return "killed the driver"
        if event.kind == "kill-worker":
            return self._kill_worker(places)
        at_work = [node for node in places.values() if node.id in self._ranks and node.state == "alive"]
        at_work = [node for node in at_work if self._nodes.processes(node.name)]
        if not at_work:
            raise LookupError("found no node with a worker")
        name = self._rng.choice(at_work).name
        if event.kind == "drain":
            assert event.notice_s is not None  # by parse
            self._drain(name, event.notice_s)
            done = f"announced the end of {name}"
        else:
            self._nodes.kill(name)
            done = f"killed {name}"
        if self._replace:
            done += f", {self._nodes.start(num_cpus=self._cpus_per_node)} takes its place"
        return done

    def _kill_worker(self, places: dict[str, Node]) -> str:
        rank = self._rng.randrange(len(self._ranks))
        names = [node.name for node in places.values() if node.id == self._ranks[rank]]
        for name in names:
            for process in self._rank_processes(name):
                process.send_signal(signal.SIGKILL)
                return f"killed the process of rank {rank} on {name}"
        raise LookupError(f"found no process of rank {rank}")

    def _drain(self, name: str, seconds: float) -> None:
        for tries in range(_TRIES):
            try:
                self._nodes.drain(name, seconds)
            except NodeError:  # on a busy machine Ray may not answer in time
                if tries == _TRIES - 1:
                    raise
            else:
                return

    def _rank_processes(self, name: str) -> list[psutil.Process]:
        found = []
        for process in self._nodes.workers(name):
            try:
                if process.cmdline()[0].startswith(_RANK):
                    found.append(process)
            except (psutil.NoSuchProcess, IndexError):
                continue
        return found

    def _processes_started(self) -> float | None:
        starts = [
            start_time(process)
            for node in self._nodes.all()
            if node.id in self._ranks
            for process in self._rank_processes(node.name)
        ]
        return max(starts, default=None)


def start_time(process: psutil.Process) -> float:
    """When a process began to exist, seconds since 1970, to a hundredth.

    psutil counts from the whole second in which the system started, so that its own answer is up to a second early.
    """
    since_boot = process.create_time() - psutil.boot_time()
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + since_boot
