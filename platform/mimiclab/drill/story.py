"""What a run's own events, and what was done to it in between, say about its restarts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mimiclab.drill.chaos import BLOW
from mimiclab.drill.schedule import KILLS, Event


@dataclass
class Restart:
    """The workers of a run stopped, and others went on. Times are seconds since 1970."""

    time: float
    """When the driver heard of it."""
    why: str
    """See `mimiclab.ledger.Kind`."""
    reason: str
    reached: int
    """The last step done; 0 where no workers had begun since the restart before."""
    last_step: float
    """When that was done; when the workers were started, where they did none."""
    processes_started: float | None = None
    attempt: float | None = None
    """When the next workers were ready to train."""
    from_step: int | None = None
    """The step that these went on from."""
    world: int | None = None
    first_step: float | None = None
    """When they had done one."""

    @property
    def repeated(self) -> int:
        """Steps that were done, and done again."""
        return 0 if self.from_step is None else max(0, self.reached - self.from_step)


@dataclass
class Blow:
    """Something that was done to the run, and what came of it."""

    event: Event
    time: float
    step: int
    """The last one that the run had reported."""
    target: str
    done: bool
    """Whether there was something to do it to."""
    noticed: float | None = None
    """When the run said that it knows; of a drain."""
    restart: Restart | None = None
    """What it led to; several may lead to the same. None where the run went on, or ended."""

    @property
    def detection_s(self) -> float | None:
        """Seconds until the run, or for a kill its driver, knew."""
        known = self.restart.time if self.restart is not None else None
        if self.event.kind == "drain":
            known = self.noticed
        return None if known is None else known - self.time

    @property
    def waiting_s(self) -> float | None:
        """Seconds from then on, or from where announced workers had left, until the last new process existed."""
        return self._between("time", "processes_started")

    @property
    def start_s(self) -> float | None:
        """Seconds from there to workers that can train: imports, data, model, checkpoint."""
        return self._between("processes_started", "attempt")

    @property
    def first_step_s(self) -> float | None:
        """Seconds of their first step, the loading of its images included."""
        return self._between("attempt", "first_step")

    @property
    def down_s(self) -> float | None:
        """Seconds without training: from a kill, or from the last step before workers left, to the next step."""
        if self.restart is None or self.restart.first_step is None:
            return None
        stopped = self.time if self.event.kind in KILLS else self.restart.last_step
        return self.restart.first_step - stopped

    def _between(self, start: str, end: str) -> float | None:
        first, last = getattr(self.restart, start, None), getattr(self.restart, end, None)
        return None if first is None or last is None else last - first


@dataclass
class Story:
    """What happened to a run."""

    blows: list[Blow] = field(default_factory=list)
    restarts: list[Restart] = field(default_factory=list)
    steps: list[tuple[float, int]] = field(default_factory=list)
    """(time, step) of each step that was done, in order."""
    worlds: list[int] = field(default_factory=list)
    """How many workers each attempt had."""

    @property
    def unplanned(self) -> list[Restart]:
        """Restarts that nothing in the drill had led to."""
        planned = [blow.restart for blow in self.blows]
        return [restart for restart in self.restarts if not any(restart is other for other in planned)]


def tell(events: Iterable[dict[str, Any]]) -> Story:
    """Make sense of events, those of a run's progress.jsonl and those that `Chaos` puts in between, in their order.

    A kill leads to the next failure that is heard of. So does an announced end where nobody was killed before, for
    workers that leave say so in time; and a new node, where workers left to become more.
    """
    story = Story()
    reached, last, waiting = 0, 0.0, list[Restart]()
    for event in events:
        kind, time = event["kind"], event["time"]
        if kind == BLOW:
            story.blows.append(Blow(event["event"], time, event["step"], event["target"], event["done"]))
        elif kind == "notice":
            for blow in _open(story.blows, ("drain",)):
                blow.noticed = time if blow.noticed is None else blow.noticed
        elif kind == "failure":
            restart = Restart(time, event["why"], event["reason"], reached, last)
            reached = 0
            waiting.append(restart)
            story.restarts.append(restart)
            for blow in _causes(story.blows, event["why"]):
                blow.restart = restart
        elif kind == "attempt":
            story.worlds.append(event["world"])
            if len(story.worlds) > 1 and not waiting:
                waiting.append(Restart(time, "unknown", "the workers ended without a word", reached, last))
                story.restarts += waiting
            for restart in waiting:
                restart.processes_started = event.get("processes_started")
                restart.attempt, restart.from_step, restart.world = time, event["step"], event["world"]
            reached, last = event["step"], time
        elif kind == "step":
            story.steps.append((time, event["step"]))
            old = next((restart for restart in waiting if restart.attempt is None), None)
            if old is not None:  # told before the failure, and heard after it
                old.reached, old.last_step = event["step"], time
                continue
            reached, last = event["step"], time
            for restart in waiting:
                restart.first_step = time
            waiting = []
    return story


def _open(blows: Sequence[Blow], kinds: Sequence[str]) -> Iterator[Blow]:
    return (blow for blow in blows if blow.event.kind in kinds and blow.done and blow.restart is None)


def _causes(blows: Sequence[Blow], why: str) -> list[Blow]:
    if why == "growth":
        return list(_open(blows, ("add-node",)))[:1]
    return list(_open(blows, KILLS)) or list(_open(blows, ("drain",)))
