"""A run played through: work, checkpoints, losses, waits and restarts, one after the other."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from mimiclab.interval import best_interval
from mimiclab.plan.fleet import Fleet
from mimiclab.plan.job import Job

# A run that is interrupted faster than it can start makes no headway: nobody waits longer than this for it.
_MAX_LOSSES = 200_000


@dataclass(frozen=True)
class Outcome:
    """Where the time of a run went, in seconds of the clock."""

    useful_s: float
    """Work that counted."""
    repeated_s: float
    """Work that was done again."""
    checkpoint_s: float
    restart_s: float
    """From machines being there to the first step."""
    waiting_s: float
    """For machines."""
    machine_s: float
    """Paid time of all machines together."""
    losses: int
    done: bool = True
    """Whether the run came to its end; else no headway was made."""

    @property
    def total_s(self) -> float:
        """From the submission to the end."""
        return self.useful_s + self.repeated_s + self.checkpoint_s + self.restart_s + self.waiting_s

    @property
    def goodput(self) -> float:
        """Useful time over total time."""
        return self.useful_s / self.total_s


def best_every_s(job: Job, fleet: Fleet) -> float:
    """Seconds of work from one checkpoint to the next by Daly's estimate, for losses that are not announced."""
    rate = (1 - fleet.notice_share) / fleet.mtbi_s
    step = job.step_s(fleet.workers)
    if not rate or not job.checkpoint_s:
        return job.work_s(fleet.workers) if not rate else step
    return best_interval(step, job.checkpoint_s, 1 / rate).steps * step


def simulate(job: Job, fleet: Fleet, *, every_s: float | None = None, elastic: bool = False, seed: int = 0) -> Outcome:
    """Play a run through, once.

    The run starts on all machines. It saves a checkpoint after every `every_s` seconds of work. A loss that is
    announced costs a checkpoint, one that is not the work since the last; then the run waits for the machines to be
    replaced and starts again, or where it is elastic goes on at once with those that are left, and starts once more
    when they are back.

    Args:
        job: what is trained.
        fleet: on what.
        every_s: seconds of work on all machines between checkpoints; by default `best_every_s`.
        elastic: whether the run goes on with fewer machines.
        seed: of the losses.
    """
    rng = np.random.default_rng(seed)
    losses = fleet.losses(rng)
    every = best_every_s(job, fleet) if every_s is None else every_s
    full = fleet.workers
    left = job.work_s(full)
    spent: dict[str, Any] = dict.fromkeys(
        ("useful_s", "repeated_s", "checkpoint_s", "restart_s", "waiting_s", "machine_s"), 0.0
    )
    workers, back = full, math.inf  # back: seconds until the machines that are gone are replaced
    unsaved = 0.0  # seconds of work on all machines since the last checkpoint
    count = 0

    def spend(kind: str, seconds: float, machines: int) -> None:
        spent[kind] += seconds
        spent["machine_s"] += seconds * machines

    spend("restart_s", job.restart(full), full)
    until_loss, taken, announced = next(losses)
    while left > 1e-9:
        slower = job.step_s(workers) / job.step_s(full)
        # Up to the next checkpoint, the end, the next loss or the return of machines, whichever comes first.
        due = min(every - unsaved, left) * slower
        ahead = min(due, until_loss, back)
        spend("useful_s", ahead, workers)
        done = ahead / slower
        left, unsaved = left - done, unsaved + done
        until_loss, back = until_loss - ahead, back - ahead
        if ahead == due and left > 1e-9:
            spend("checkpoint_s", job.checkpoint_s, workers)
            until_loss, back = until_loss - job.checkpoint_s, back - job.checkpoint_s
            unsaved = 0.0
        if left <= 1e-9:
            break
        if back <= 0:  # growth waits for a checkpoint, which it brings about
            spend("checkpoint_s", job.checkpoint_s, workers)
            workers, back, unsaved = full, math.inf, 0.0
            spend("restart_s", job.restart(full), full)
            until_loss -= job.checkpoint_s + job.restart(full)
        if until_loss > 0:
            continue
        count += 1
        if count > _MAX_LOSSES:
            return Outcome(**spent, losses=count, done=False)
        if announced:
            spend("checkpoint_s", job.checkpoint_s, workers)
        else:
            lost = unsaved * slower
            spent["useful_s"] -= lost
            spent["repeated_s"] += lost
            left += unsaved
        unsaved = 0.0
        gone = min(taken, workers)
        wait = float(rng.exponential(fleet.replace_s)) if fleet.replace_s else 0.0
        if elastic and workers > gone:
            workers, back = workers - gone, min(back, wait) if math.isinf(back) else max(back, wait)
            spend("restart_s", job.restart(workers), workers)
        else:
            spend("waiting_s", wait, workers - gone)
            workers, back = full, math.inf
            spend("restart_s", job.restart(full), full)
        until_loss, taken, announced = next(losses)
    return Outcome(**spent, losses=count)


def average(outcomes: list[Outcome]) -> Outcome:
    """The mean of every part, over runs that differ by their losses only."""
    means: dict[str, Any] = {
        each.name: float(np.mean([getattr(outcome, each.name) for outcome in outcomes]))
        for each in fields(Outcome)
        if each.name not in ("losses", "done")
    }
    losses = round(float(np.mean([outcome.losses for outcome in outcomes])))
    return Outcome(**means, losses=losses, done=all(outcome.done for outcome in outcomes))
