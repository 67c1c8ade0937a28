"""What a search has spent: the time that its trials ran, by the times in its record, times what they take.

A driver that is killed does not write when its trials stopped. They count up to the last that is known of it: what it
wrote last, or its last heartbeat.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Event = Mapping[str, Any]

_HOUR_S = 3600


class Account:
    """Hours of GPUs, or of processor cores where the trials use no GPUs; `take` every event of the record in order."""

    def __init__(self) -> None:
        self._spent: dict[str, float] = {}
        self._running: dict[str, tuple[float, float]] = {}
        self._last = 0.0

    def take(self, event: Event) -> None:
        """Take note of an event."""
        at, kind = float(event["time"]), event["event"]
        if kind == "search":
            end = max(self._last, min(event.get("heard") or 0.0, at))
            for run in list(self._running):
                self._stop(run, end)
        elif kind in ("started", "resumed"):
            self._stop(run_of(event), at)
            self._running[run_of(event)] = (at, units(event.get("resources") or {}))
        elif kind in ("retried", "ended"):
            self._stop(run_of(event), at)
        self._last = max(self._last, at)

    def spent(self, at: float, run: str | None = None) -> float:
        """Hours up to a moment, in seconds since 1970: of all runs, or of one (see `run_of`)."""
        known = [run] if run is not None else [*self._spent, *(r for r in self._running if r not in self._spent)]
        return sum(self._spent.get(each, 0.0) + self._hours(each, at) for each in known)

    def _stop(self, run: str, at: float) -> None:
        hours = self._hours(run, at)
        if self._running.pop(run, None):
            self._spent[run] = self._spent.get(run, 0.0) + hours

    def _hours(self, run: str, at: float) -> float:
        since, num = self._running.get(run, (at, 0.0))
        return max(0.0, at - since) * num / _HOUR_S


def run_of(event: Event) -> str:
    """The run that an event is of: a trial's name, with the seed of one that repeats it."""
    return f"{event['trial']}-seed-{event['seed']}" if "seed" in event else str(event["trial"])


def units(resources: Mapping[str, float]) -> float:
    """What of a trial's resources is counted: its GPUs where it has any, else its cores."""
    return resources.get("GPU") or resources.get("CPU", 1.0)


def unit(*, gpu: bool) -> str:
    """What is counted, in words."""
    return "GPU-hours" if gpu else "core-hours"
