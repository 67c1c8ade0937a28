"""A search as its record knows it: nothing but files. Ray and training are left out."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mimiclab import runs
from mimiclab.data.order import Order
from mimiclab.experiment import load_experiment
from mimiclab.search.course import Course
from mimiclab.search.earlier import read_record
from mimiclab.search.trials import Plan, Trial, with_repeats

FILE = """
name: small
data: {scenes: {}}
optim: {epochs: 9}
search:
  trials: 8
  reduction_factor: 3
  space: {optim.lr: {loguniform: [1e-4, 1e-2]}, model.pyramid.stagger: {choice: [0, 1]}}
"""
EPOCHS = 9
STEPS_PER_EPOCH = 10

Objective = Callable[[Trial, int], float]


class KilledError(Exception):
    """The driver's death."""


class Driver:
    """A driver of the search in the current folder, in which each run tells of an evaluation after each epoch.

    Args:
        overrides: of the file.
        heard: when the driver before was last heard of.
        file: another one.
    """

    def __init__(self, *overrides: str, heard: float | None = None, file: str = FILE) -> None:
        Path("x.yaml").write_text(file)
        loaded = load_experiment("x.yaml", overrides)
        self.plan = Plan(loaded, lambda experiment: Order(STEPS_PER_EPOCH, 1, experiment.seed))
        self.trials = self.plan.trials()
        self.said: list[str] = []
        self.bests: list[tuple[int, float]] = []
        self.changes: list[tuple[str, str]] = []
        self.record = read_record(self.plan, self.trials, runs.storage_of(loaded.experiment))
        self.course = Course(self.plan, self.trials, self.record, self.said.append, heard=heard)
        self.course.open(
            lambda step, value: self.bests.append((step, value)),
            lambda run: self.changes.append((run.name, run.outcome)),
        )

    def begin(self) -> Trial:
        """Begin what is to be run next."""
        run = self.course.next()
        assert run is not None
        self.course.begin(run)
        return run

    def result(self, run: Trial, epoch: int, value: float, **more: Any) -> bool:
        """An evaluation, as workers tell it."""
        metrics: Mapping[str, float] = {"student/AP": value, "student/latency_ms": 0.1, **more}
        return self.course.result(run, epoch=epoch, step=STEPS_PER_EPOCH * epoch, metrics=metrics)

    def run(
        self,
        order: random.Random,
        objective: Objective,
        *,
        concurrent: int = 3,
        most: int = 10**6,
        deaths: float = 0.0,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        """Run all that is left, side by side.

        Args:
            order: of what happens.
            objective: gives the value of a run at an epoch.
            concurrent: how many run at a time.
            most: after so many evaluations the driver dies.
            deaths: how often, of all evaluations, the process of a run dies.
            tick: called before each evaluation.
        """
        running = list[Trial]()
        reached = {}
        while not self.course.is_over:
            while len(running) < concurrent and (run := self.course.next()):
                self.course.begin(run)
                # Its own checkpoint may be older than what the search has heard, or newer.
                reached[run.name] = max(0, run.epochs + order.choice([-1, 0, 1]) if run.epochs else 0)
                running.append(run)
            if most <= 0:
                raise KilledError
            most -= 1
            tick()
            run = order.choice(running)
            if order.random() < deaths:
                running.remove(run)
                self.course.died(run, "crash", "killed")
                continue
            reached[run.name] = epoch = min(reached[run.name] + 1, EPOCHS)
            if not self.result(run, epoch, objective(run, epoch)) or epoch == EPOCHS:
                self.course.complete(run)
                running.remove(run)


def objective(run: Trial, epoch: int) -> float:
    """Some trials are better than others, and all become better; with other seeds a little worse."""
    return math.sin(run.number * 2.3) * epoch / 10 - 0.01 * (run.seed or 0)


def outline(trials: list[Trial]) -> list[Any]:
    """All that can be said of trials."""
    return [(run.name, run.values, run.outcome, run.evaluations, run.error) for run in with_repeats(trials)]
