"""A plan for people: what a training takes on fleets of growing size, with and without losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich.table import Table

from mimiclab.plan.expected import expected_s
from mimiclab.plan.fleet import Fleet
from mimiclab.plan.job import Job
from mimiclab.plan.simulate import Outcome, average, best_every_s, simulate

RUNS = 20
"""Simulated runs that an average is over."""
_HOUR = 3600.0


@dataclass(frozen=True)
class Quote:
    """One line of a plan."""

    workers: int
    step_s: float
    limit: str
    """What a step waits for: compute, loader or store."""
    calm: Outcome
    """The run where no machine goes."""
    spot: Outcome
    """The mean of simulated runs."""
    expected_s: float
    """Seconds by the closed formula, for losses one by one."""
    every_steps: int
    """Steps between checkpoints."""

    def cost(self, outcome: Outcome, price: float, head: float) -> float:
        """Money for machines at `price` and a head at `head` an hour."""
        return (outcome.machine_s * price + outcome.total_s * head) / _HOUR


def sizes(most: int) -> list[int]:
    """1, 2, 4, ... up to `most`, which is the last."""
    return [*(2**k for k in range(most.bit_length()) if 2**k < most), most]


def quote(job: Job, fleet: Fleet, *, elastic: bool, seed: int = 0, runs: int = RUNS) -> Quote:
    """Simulate a job on a fleet `runs` times, and once on one that loses nothing."""
    every = best_every_s(job, fleet)
    seeds = range(seed, seed + runs)
    limits = job.limits(fleet.workers)
    return Quote(
        workers=fleet.workers,
        step_s=job.step_s(fleet.workers),
        limit=max(limits, key=lambda part: limits[part]),
        calm=simulate(job, replace(fleet, mtbf_s=math.inf), every_s=every),
        spot=average([simulate(job, fleet, every_s=every, elastic=elastic, seed=each) for each in seeds]),
        expected_s=expected_s(job, fleet, every),
        every_steps=max(1, round(every / job.step_s(fleet.workers))),
    )


def plan_table(quotes: Sequence[Quote], *, price: float, on_demand: float | None, head: float) -> Table:
    """A line for each size; money where a price is known."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    columns = ["GPUs", "step", "limited by", "hours", "on spot", "formula", "losses", "goodput", "wasted GPU h"]
    columns.append("checkpoint every")
    for column in columns:
        table.add_column(column, justify="left" if column == "limited by" else "right")
    if price:
        table.add_column("spot $", justify="right")
    if on_demand:
        table.add_column("on-demand $", justify="right")
    for each in quotes:
        cells = [
            str(each.workers),
            f"{each.step_s:.3g} s",
            each.limit,
            f"{each.calm.total_s / _HOUR:.2f}",
            f"{each.spot.total_s / _HOUR:.2f}" if each.spot.done else "never",
            f"{each.expected_s / _HOUR:.2f}" if math.isfinite(each.expected_s) else "never",
            str(each.spot.losses),
            f"{each.spot.goodput:.3f}",
            f"{(each.spot.machine_s - each.calm.machine_s) / _HOUR:.2f}",
            f"{each.every_steps} steps",
        ]
        if price:
            cells.append(f"{each.cost(each.spot, price, head):.2f}")
        if on_demand:
            cells.append(f"{each.cost(each.calm, on_demand, head):.2f}")
        table.add_row(*cells)
    return table
