"""What happened in a search, an event per line of a file in its folder, from which the next driver goes on.

Every event has `event`, its kind, and `time` in seconds since 1970:

    search    a driver begins: the `experiment` as YAML, what decisions depend on, the `trials` with their values
    started   `trial`
    resumed   `trial`, begun by an earlier driver
    result    `trial`, `epoch`, `value` of the metric
    decision  `trial`, `epoch`, and of `asha.Decision` all
    ended     `trial`, `outcome` ("finished", "pruned" or "failed"), `error`
    settled   `trial`: MLflow knows how it stands

NaN is written as null.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from mimiclab.errors import UserError
from mimiclab.search.asha import Asha, Decision
from mimiclab.storage import MissingError, Storage

RECORD = "record.jsonl"
"""Name of the file in a search's folder."""

RULES = ("max_t", "grace_period", "reduction_factor", "mode")
"""What decisions depend on besides results: keys of an event `search`."""

Event = dict[str, Any]


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
        """Write events through to the disk or the store before anything follows from them.

        Raises:
            UserError: they cannot be written.
        """
        stamped = [{**event, "time": round(time.time(), 3)} for event in events]
        lines = "".join(json.dumps(_without_nan(event), allow_nan=False) + "\n" for event in stamped)
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
        self.events += stamped

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


def decision_event(trial: str, epoch: int, decision: Decision) -> Event:
    """A decision as an event; equal decisions give equal ones."""
    basis = {**asdict(decision), "values": list(decision.values)}
    event: Event = _without_nan({"event": "decision", "trial": trial, "epoch": epoch, **basis})
    return event


def value_of(result: Event) -> float:
    """The metric's value in an event `result`."""
    return math.nan if result["value"] is None else float(result["value"])


def rungs_of(search: Event) -> Asha:
    """Empty rungs of the search that an event `search` tells of."""
    return Asha(**{name: search[name] for name in RULES})


def recompute(events: Iterable[Event]) -> Iterator[Event]:
    """Make every decision of a record again, from its results alone and in their order.

    Yields:
        Events `decision` as they should be in the record, without their time.
    """
    asha = None
    for event in events:
        if event["event"] == "search":
            asha = asha or rungs_of(event)
        elif event["event"] == "result":
            assert asha is not None  # nothing is recorded before the search
            decision = asha.decide(event["trial"], event["epoch"], value_of(event))
            yield decision_event(event["trial"], event["epoch"], decision)


def check(record: Record, where: str) -> None:
    """Make sure that every recorded decision follows from the results before it.

    Args:
        record: of a search.
        where: its name, for the message.

    Raises:
        UserError: one does not.
    """
    recorded = {
        (event["trial"], event["epoch"]): {key: value for key, value in event.items() if key != "time"}
        for event in record.events
        if event["event"] == "decision"
    }
    for again in recompute(record.events):
        before = recorded.get((again["trial"], again["epoch"]))
        # The last one may be missing: half of the last write of a driver that was killed.
        if before != again and (before or record.events[-1]["event"] != "result"):
            raise UserError(
                f"{where}: the decision about {again['trial']} at epoch {again['epoch']} does not follow from the "
                f"results before it: found {json.dumps(before)}, expected {json.dumps(again)}; --fresh starts the "
                "search anew"
            )


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value
