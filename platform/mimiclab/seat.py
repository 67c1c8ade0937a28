"""Where a worker sits: what the loop over steps has to know of what started it, be that Ray Train or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

LAST = "last"
"""In every report: whether it is the last one before the planned end, by `eval.patience`."""


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Seat:
    """One worker's."""

    rank: int
    world: int
    """How many workers there are."""
    device: str
    """As torch names it."""
    node: str
    """Ray's id of the node."""
    report: Callable[[Mapping[str, Any]], object]
    """Called on all ranks after each evaluation; of rank 0 it holds the metrics. May wait until somebody has looked at
    them."""
    heed: Callable[[], object] = _nothing
    """Called before each step, and between the batches of an evaluation; raises where training is to stop at once."""
