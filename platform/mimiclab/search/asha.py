"""Asynchronous successive halving (ASHA): which trials go on, decided at each result without waiting for others.

L. Li et al., "A System for Massively Parallel Hyperparameter Tuning", MLSys 2020. A trial is compared when it reaches a
rung: it stops there if its value is below the best 1/reduction_factor of the others there. Ray Tune's ASHAScheduler
leaves it at that, so that whoever comes first is compared with nobody and trains to the end, however bad. Here a trial
is compared again at each of its results until it reaches the next rung, with all who have come to its rung by then. The
best one at the highest rung that was reached is never stopped, so that every search has a trial that finishes.

Each decision says what it was based on, and rungs can be rebuilt by giving the same results again in the same order.
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
    """What the trial's value there was compared with; None where nobody else was there."""
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
        again: compare trials again at each result; False for Ray Tune's decisions, once at each rung.
    """

    def __init__(self, *, max_t: int, grace_period: int, reduction_factor: int, mode: str, again: bool = True) -> None:
        self._max_t = max_t
        self._factor = reduction_factor
        self._again = again
        self._sign = 1 if mode == "max" else -1
        self._rungs: dict[int, dict[str, float]] = {rung: {} for rung in _rungs(max_t, grace_period, reduction_factor)}

    @property
    def rungs(self) -> tuple[int, ...]:
        """In epochs or steps, the first one first."""
        return tuple(self._rungs)

    def decide(self, trial: str, reached: int, value: float) -> Decision:
        """Take a result in, and say whether its trial goes on.

        The trial is compared at the highest rung that it has reached, which is a rung below its epoch or step where
        evaluations skip some, by what it had when it came there. NaN neither stops a trial nor counts for others.
        """
        rungs = [rung for rung in self._rungs if rung <= reached]
        if not self._again:
            rungs = [rung for rung in rungs if trial not in self._rungs[rung]]
        if reached >= self._max_t or not rungs:
            return Decision(go_on=True)
        rung, there = rungs[-1], self._rungs[rungs[-1]]
        there.setdefault(trial, value)
        values = tuple(each for other, each in there.items() if other != trial)
        known = [self._sign * each for each in values if not math.isnan(each)]
        if not known:
            return Decision(True, rung, values)
        cutoff = float(np.percentile(known, (1 - 1 / self._factor) * 100))
        go_on = not self._sign * there[trial] < cutoff
        return Decision(go_on, rung, values, self._sign * cutoff, None if go_on else "rung")


def _rungs(max_t: int, grace_period: int, reduction_factor: int) -> Iterator[int]:
    rung = grace_period
    while rung < max_t:
        yield rung
        rung *= reduction_factor
