"""What happened in a search, an event per line of a file in its folder, from which the next driver goes on.

Every event has `event`, its kind, and `time` in seconds since 1970:

    search    a driver begins: the resolved `experiment` as YAML, without its search; all that was `written`, as YAML
              too, with the `variables` of the environment that it names; the name of the `metric`, what decisions
              depend on (`RULES` and the `budget`), the `trials` with their values, {} where they are still to be
              proposed; `heard`, where a driver before died: when it was last heard of
    started   `trial`, its `values`, `where` its process runs, `resources` that it takes of the cluster
    resumed   `trial`, that was started before; `where`, `resources`
    result    `trial`, `epoch`, `step`, `value` of the metric; `metrics`, where that is a sum: its terms; `where` it was
              computed, if that was told: `10.0.0.7 +2` is rank 0's machine and two more; `last`, true where no
              evaluation of the trial follows
    decision  `trial`, `epoch`, and of `asha.Decision` all: whether the trial goes on, and what stops it (`reason`,
              "rung" or "budget")
    retried   `trial`: its process died, and it is to be run on; `why`, "crash" or "preemption", and `reason`, a line
    ended     `trial`, `outcome` ("finished", "pruned", "out of budget", "preempted" or "failed"), `error`
    settled   `trial`: MLflow knows how it stands

All from `started` on have a `seed` too where they are of one of the runs that a finished trial is repeated by with
other seeds. NaN is written as null. Records of earlier versions lack some of the keys.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from mimiclab.errors import UserError
from mimiclab.search.asha import Decision
from mimiclab.search.budget import run_of
from mimiclab.search.rules import Event, Rules, rungs_of, value_of
from mimiclab.storage import MissingError, Storage

__all__ = ["RECORD", "Event", "Record", "check", "decision_event", "recompute", "rungs_of", "stamped", "value_of"]

RECORD = "record.jsonl"
"""Name of the file in a search's folder."""


class Record:
    """The events so far, and a place for more.

    Args:
        storage: the search's folder; nothing is written before the first new event.

    Raises:
        UserError: it cannot be read, or a line of it is damaged.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        try:
            text = storage.read(RECORD).decode()
        except MissingError:
            text = ""
        whole, newline, torn = text.rpartition("\n")
        self._text = whole + newline
        # Half a line is what a driver was killed in; it had not acted on it.
        self._torn = bool(torn)
        self.events = [self._parse(number, line) for number, line in enumerate(whole.splitlines(), start=1)]

    def add(self, *events: Event) -> None:
        """Write events, which `stamped` has made, through to the disk or the store before anything follows from them.

        Raises:
            UserError: they cannot be written.
        """
        lines = "".join(json.dumps(event, allow_nan=False) + "\n" for event in events)
        if self._storage.local is None or self._torn or not self._text:
            self._text += lines
            self._storage.write(RECORD, self._text.encode())
            self._torn = False
        else:
            try:
                with (self._storage.local / RECORD).open("a") as file:
                    file.write(lines)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise UserError(f"{self._storage.where(RECORD)}: cannot be written: {error}") from error
        self.events += events

    def _parse(self, number: int, line: str) -> Event:
        try:
            event: Event = json.loads(line)
            event["event"], event["time"]
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{self._storage.where(RECORD)}:{number}: found {line[:80]!r}, expected an event; --fresh starts the "
                "search anew"
            ) from None
        return event


def stamped(event: Mapping[str, Any]) -> Event:
    """An event with the present time, just as it will be read again."""
    found: Event = _without_nan({**event, "time": round(time.time(), 3)})
    return found


def decision_event(result: Event, decision: Decision) -> Event:
    """The decision about a trial after a result as an event; equal decisions give equal ones."""
    about = {key: result[key] for key in ("trial", "seed", "epoch") if key in result}
    event: Event = _without_nan({"event": "decision", **about, **asdict(decision), "time": result["time"]})
    return event


def recompute(events: Iterable[Event]) -> Iterator[Event]:
    """Make every decision of a record again, from what is before it alone.

    Yields:
        Events `decision` as they should be in the record, without their time.
    """
    rules = Rules()
    for event in events:
        decision = rules.take(event)
        if decision is not None:
            again = decision_event(event, decision)
            del again["time"]
            yield again


def check(record: Record, where: str) -> None:
    """Make sure that every recorded decision follows from what is before it.

    Args:
        record: of a search.
        where: its name, for the message.

    Raises:
        UserError: one does not.
    """
    recorded = {
        _key(event): {key: value for key, value in event.items() if key != "time"}
        for event in record.events
        if event["event"] == "decision"
    }
    for again in recompute(record.events):
        before = recorded.get(_key(again))
        # Earlier versions did not write what stops a trial: it was always the rung.
        known = before and {"reason": again["reason"], "spent": None, **before}
        # The last one may be missing: half of the last write of a driver that was killed.
        if known != again and (before or record.events[-1]["event"] != "result"):
            raise UserError(
                f"{where}: the decision about {run_of(again)} at epoch {again['epoch']} does not follow from the "
                f"results before it: found {json.dumps(before)}, expected {json.dumps(again)}; --fresh starts the "
                "search anew"
            )


def _key(event: Event) -> tuple[str, int]:
    return run_of(event), event["epoch"]


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value
