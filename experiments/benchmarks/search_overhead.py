"""What a search costs beside its trials: many of them with a made-up objective, through the code that searches use.

    python experiments/benchmarks/search_overhead.py [--trials 200] [--epochs 9] [--algorithm random] [--concurrent 2]

Ray Tune, the course of the search with its rungs, and its record are the real ones; in the place of training stands a
formula, which costs nothing. Printed are the seconds that our part of it takes for each trial and for each result,
written through to the disk as always, and the seconds of all, most of which are Tune's.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from machine import surroundings
from ray import tune

from mimiclab.experiment import load_experiment
from mimiclab.schema import Experiment
from mimiclab.search.course import Course, Ending
from mimiclab.search.record import Record, check
from mimiclab.search.trials import Plan, Trial
from mimiclab.search.tuning import tune_trials
from mimiclab.session import ray_session
from mimiclab.storage import Storage

FILE = """
name: overhead
data: {scenes: {}}
optim: {epochs: EPOCHS, lr: 1e-3}
search:
  algorithm: ALGORITHM
  trials: TRIALS
  reduction_factor: 3
  space:
    optim.lr: {loguniform: [1e-4, 1e-1]}
    model.pyramid.stagger: {choice: [0, 1]}
"""


class Formula(tune.Trainable):  # type: ignore[misc]
    """Stands for a trial: better where the learning rate is near 0.003, and with every epoch."""

    def setup(self, config: Mapping[str, Any]) -> None:
        """Take up a trial."""
        self._experiment = Experiment.model_validate_json(config["experiment"])
        self._epoch = 0

    def step(self) -> dict[str, Any]:
        """An evaluation."""
        self._epoch += 1
        away = abs(math.log10(self._experiment.optim.lr / 0.003))
        value = (1 - math.exp(-self._epoch / 3)) / (1 + away)
        return {
            "epoch": self._epoch,
            "step": 10 * self._epoch,
            "student/AP": value,
            "done": self._epoch == self._experiment.optim.epochs,
        }

    def reset_config(self, new_config: Mapping[str, Any]) -> bool:
        """Go over to another trial."""
        self.setup(new_config)
        return True


class TimedCourse(Course):
    """A course that keeps the seconds of each call that Tune waits for."""

    seconds: dict[str, list[float]]

    def next(self) -> Trial | None:
        """See `Course.next`; calls that give nothing count as asked in vain."""
        started = time.perf_counter()
        run = super().next()
        self.seconds["next" if run else "next, in vain"].append(time.perf_counter() - started)
        return run

    def begin(self, run: Trial, where: str | None = None, resources: Mapping[str, float] | None = None) -> None:
        """See `Course.begin`."""
        started = time.perf_counter()
        super().begin(run, where, resources)
        self.seconds["begin"].append(time.perf_counter() - started)

    def result(self, run: Trial, **more: Any) -> bool:
        """See `Course.result`."""
        started = time.perf_counter()
        goes_on = super().result(run, **more)
        self.seconds["result"].append(time.perf_counter() - started)
        return goes_on

    def end(self, run: Trial, outcome: Ending, error: str | None = None) -> None:
        """See `Course.end`."""
        started = time.perf_counter()
        super().end(run, outcome, error)
        self.seconds["end"].append(time.perf_counter() - started)


def main() -> None:
    """Run the benchmark and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--algorithm", choices=["random", "optuna"], default="random")
    parser.add_argument("--concurrent", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mimiclab-overhead-") as name:
        file = Path(name) / "overhead.yaml"
        text = FILE.replace("EPOCHS", str(args.epochs)).replace("TRIALS", str(args.trials))
        file.write_text(text.replace("ALGORITHM", args.algorithm))
        plan = Plan(load_experiment(file))
        trials = plan.trials()
        folder = Storage(Path(name) / "overhead")
        record = Record(folder)
        course = TimedCourse(plan, trials, record, say=lambda _: None)
        course.seconds = defaultdict(list)
        with ray_session(None, plan.experiment.scale, verbose=False):
            course.open()
            started = time.perf_counter()
            tune_trials(course, Formula, {"CPU": 0}, folder, concurrent=args.concurrent, reuse_actors=True)
            total_s = time.perf_counter() - started
        check(record, "search overhead")
    _print(course, trials, total_s, args.algorithm)


def _print(course: TimedCourse, trials: list[Trial], total_s: float, algorithm: str) -> None:
    outcomes = ", ".join(f"{num} {outcome}" for outcome, num in Counter(trial.outcome for trial in trials).items())
    ours_s = sum(sum(seconds) for seconds in course.seconds.values())
    print(
        f"{len(trials)} trials ({algorithm}): {outcomes}; {surroundings('ray')}; load "
        f"{os.getloadavg()[0]:.1f}\n\n"
        "| call | number | median ms | max ms | s in all |\n|---|---|---|---|---|"
    )
    for name, seconds in course.seconds.items():
        median_ms, max_ms = 1e3 * statistics.median(seconds), 1e3 * max(seconds)
        print(f"| {name} | {len(seconds)} | {median_ms:.2f} | {max_ms:.1f} | {sum(seconds):.2f} |")
    print(
        f"\nOurs: {1e3 * ours_s / len(trials):.1f} ms a trial, {100 * ours_s / total_s:.1f} % of the "
        f"{total_s / len(trials):.2f} s that a trial takes in all, {total_s:.0f} s together."
    )


if __name__ == "__main__":
    main()
