"""Asynchronous successive halving (ASHA): which trials go on, decided at each result without waiting for others.

L. Li et al., "A System for Massively Parallel Hyperparameter Tuning", MLSys 2020. A trial is compared when it reaches a
rung: it stops there if its value is below the best 1/reduction_factor of those that were there before it. The decisions
are those of Ray Tune's ASHAScheduler with one bracket; unlike that, each says what it was based on, and rungs can be
rebuilt by giving the same results again in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class Decision:
    """Whether a trial goes on, and why."""

    go_on: bool
    rung: int | None = None
    """Epochs or steps of the rung at which the trial was compared; None where it was at none."""
    values: tuple[float, ...] = ()
    """What other trials had there, in the order of their arrival."""
    cutoff: float | None = None
    """What the trial's value was compared with; None where nobody was there before it."""
    reason: Literal["rung", "budget"] | None = None
    """What stops it: that it is among the worse ones at the rung, or that the search's budget is spent."""
    spent: float | None = None
    """GPU- or core-hours of the search so far, where the budget stops it."""


class Asha:
    """The rungs of one search.

    Args:
        max_t: the last epoch, or step, of a trial; one that reaches it ends by itself.
        grace_period: epochs, or steps, up to the first rung.
        reduction_factor: each rung is so many times as far as the one before; about one in so many goes on.
        mode: "max" or "min", which values are the better ones.
    """

    def __init__(self, *, max_t: int, grace_period: int, reduction_factor: int, mode: str) -> None:
        self._max_t = max_t
        self._factor = reduction_factor
        self._sign = 1 if mode == "max" else -1
        self._rungs: dict[int, dict[str, float]] = {rung: {} for rung in _rungs(max_t, grace_period, reduction_factor)}

    @property
    def rungs(self) -> tuple[int, ...]:
        """In epochs or steps, the first one first."""
        return tuple(self._rungs)

    def decide(self, trial: str, reached: int, value: float) -> Decision:
        """Take a result in, and say whether its trial goes on.

        The trial is compared at the highest rung that it has reached and was not compared at before, which is a rung
        below its epoch or step where evaluations skip some. NaN neither stops a trial nor counts for others.
        """
        if reached >= self._max_t:
            return Decision(go_on=True)
        rung = next((r for r in reversed(self._rungs) if reached >= r and trial not in self._rungs[r]), None)
        if rung is None:
            return Decision(go_on=True)
        values = tuple(self._rungs[rung].values())
        self._rungs[rung][trial] = value
        known = [self._sign * each for each in values if not math.isnan(each)]
        if not known:
            return Decision(True, rung, values)
        cutoff = float(np.percentile(known, (1 - 1 / self._factor) * 100))
        go_on = not self._sign * value < cutoff
        return Decision(go_on, rung, values, self._sign * cutoff, None if go_on else "rung")


def _rungs(max_t: int, grace_period: int, reduction_factor: int) -> Iterator[int]:
    rung = grace_period
    while rung < max_t:
        yield rung
        rung *= reduction_factor
