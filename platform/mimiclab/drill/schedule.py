"""What happens to a run in a drill, and when."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from mimiclab.errors import UserError

Kind = Literal["kill-worker", "kill-node", "kill-driver", "drain", "add-node"]

KILLS: tuple[Kind, ...] = ("kill-worker", "kill-node", "kill-driver")
"""What comes without a notice."""
_TAKES_NODE: tuple[Kind, ...] = ("kill-node", "drain")

_EVENT = re.compile(r"(?P<kind>[a-z-]+)@(?P<step>\d{1,9})(?::(?P<seconds>\d{1,4}(?:\.\d{1,3})?)s)?")
_EXPECTED = (
    f"expected KIND@STEP, as kill-worker@20, with one of {', '.join(get_args(Kind))}; "
    "drain with the length of its notice, as drain@70:20s"
)
# Of a drain that is drawn; two minutes are usual, and a drill is to end some day.
_NOTICE_S = 20.0


@dataclass(frozen=True)
class Event:
    """Something that is done to a run; `str` gives it as it is written."""

    kind: Kind
    step: int
    """It is done when the run has reported this step."""
    notice_s: float | None = None
    """How long before its end the node's end is announced; of a drain only."""

    def __str__(self) -> str:
        return f"{self.kind}@{self.step}" + ("" if self.notice_s is None else f":{self.notice_s:g}s")


def parse(text: str) -> list[Event]:
    """Read events as `kill-worker@20,drain@70:20s`; they are given in the order of their steps.

    Raises:
        UserError: one of them is none; the message names it.
    """
    return sorted((_parse(part.strip()) for part in text.split(",")), key=lambda event: event.step)


def check(events: Sequence[Event], num_steps: int, num_nodes: int, *, elastic: bool) -> None:
    """Make sure that events can happen to a run.

    Args:
        events: in the order of their steps.
        num_steps: that the run takes.
        num_nodes: that it starts with.
        elastic: nodes that are lost are not replaced.

    Raises:
        UserError: one of them cannot; the message names it.
    """
    nodes = num_nodes
    for event in events:
        if not 1 <= event.step <= num_steps:
            raise UserError(f"--events: {event}: expected a step from 1 to {num_steps}, the last one of the run")
        nodes += _change(event.kind, elastic=elastic)
        if nodes < 1:
            raise UserError(
                f"--events: {event}: with --elastic no node would be left; expected fewer losses, more workers, or an "
                "add-node before it"
            )


def draw(num: int, seed: int, num_steps: int, num_nodes: int, *, elastic: bool) -> list[Event]:
    """Draw events, one in each of `num` equal parts of a run; the same arguments draw the same ones.

    Args:
        num: how many.
        seed: of the drawing.
        num_steps: that the run takes.
        num_nodes: that it starts with.
        elastic: nodes that are lost are not replaced; nodes are added only then, and one is always left.

    Raises:
        UserError: the run has fewer steps than that before its last one.
    """
    before_last = num_steps - 1
    if num > before_last:
        raise UserError(f"--random: found {num}, expected at most one event for each of {before_last} steps")
    rng = random.Random(seed)
    nodes, events = num_nodes, list[Event]()
    for part in range(num):
        step = rng.randint(1 + part * before_last // num, (part + 1) * before_last // num)
        possible: list[Kind] = ["kill-worker", "kill-driver"]
        if not elastic or nodes > 1:
            possible += _TAKES_NODE
        if elastic and nodes < num_nodes:
            possible.append("add-node")
        kind = rng.choice(possible)
        nodes += _change(kind, elastic=elastic)
        events.append(Event(kind, step, _NOTICE_S if kind == "drain" else None))
    return events


def _change(kind: Kind, *, elastic: bool) -> int:
    """How many nodes there are more after an event."""
    if kind == "add-node":
        return 1
    return -1 if elastic and kind in _TAKES_NODE else 0


def _parse(text: str) -> Event:
    match = _EVENT.fullmatch(text)
    if match is None or match["kind"] not in get_args(Kind):
        raise UserError(f"--events: found {text!r}, {_EXPECTED}")
    kind, notice_s = match["kind"], None if match["seconds"] is None else float(match["seconds"])
    if (kind == "drain") != (notice_s is not None) or notice_s == 0:
        raise UserError(f"--events: found {text!r}, {_EXPECTED}")
    return Event(kind, int(match["step"]), notice_s)  # type: ignore[arg-type]  # one of them, see above
