"""What a search tries, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from mimiclab.errors import UserError
from mimiclab.experiment import LoadedExperiment, vary
from mimiclab.schema import Experiment
from mimiclab.search.space import draw, grid

DEFAULT_TRIALS = 16
"""Of a random search that does not say."""

Outcome = Literal["waiting", "running", "finished", "pruned", "failed", "killed"]


@dataclass
class Trial:
    """One set of values, and how far training with it came."""

    number: int
    values: dict[str, Any]
    """Of the searched keys."""
    experiment: Experiment
    """What is trained; its name is `<search>-<trial>`, so the same command finds the same runs again."""
    outcome: Outcome = "waiting"
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    """(epoch, value of the searched metric), in order."""
    error: str | None = None
    begun: bool = False
    """Whether it was ever started, by this driver or one before."""
    settled: bool = False
    """Whether MLflow knows of its outcome."""
    in_mlflow: bool = False
    """Whether MLflow has its values as metrics."""

    @property
    def name(self) -> str:
        """Its name within the search."""
        return trial_name(self.number)

    @property
    def epochs(self) -> int:
        """Epochs that it was trained for, up to its last evaluation."""
        return self.evaluations[-1][0] if self.evaluations else 0

    def best(self, mode: str) -> tuple[int, float] | None:
        """Epoch and value of its best evaluation, the earliest of equals; None if it was never evaluated."""
        sign = -1 if mode == "max" else 1
        known = [item for item in self.evaluations if not math.isnan(item[1])]
        return min(known, key=lambda item: sign * item[1], default=None)


def trial_name(number: int) -> str:
    """The name of the trial of this number, from 0."""
    return f"trial-{number:02d}"


def plan(loaded: LoadedExperiment) -> list[Trial]:
    """Draw every trial of an experiment's search; the same file gives the same trials.

    Raises:
        UserError: the file has no `search:` section, or a trial's values do not fit together.
    """
    experiment = loaded.experiment
    if experiment.search is None:
        raise UserError(
            f"{loaded.path}: it has no search: section, expected one such as\n"
            "  search: {trials: 4, space: {model.mimic.cls_weight: {loguniform: [0.1, 10]}}}"
        )
    config = experiment.search
    if config.algorithm == "grid":
        drawn = grid(config.space)[: config.trials]
    else:
        drawn = [draw(config.space, experiment.seed, n) for n in range(config.trials or DEFAULT_TRIALS)]
    shorter = {} if config.max_t is None else {"optim.epochs": config.max_t}
    trials = []
    for number, values in enumerate(drawn):
        try:
            varied = vary(loaded, f"{experiment.name}-{trial_name(number)}", {**values, **shorter})
        except UserError as error:
            shown = ", ".join(f"{key} = {value}" for key, value in values.items())
            raise UserError(f"{loaded.path}: search: {trial_name(number)} with {shown}: {error}") from error
        trials.append(Trial(number, values, varied))
    return trials


def last_epoch(experiment: Experiment) -> int:
    """The epochs of a search's trials that are not pruned."""
    assert experiment.search is not None
    return experiment.search.max_t or experiment.optim.epochs


def ranked(trials: Iterable[Trial], mode: str) -> list[Trial]:
    """The trials with the best first, by the best evaluation of each; those that were never evaluated last."""
    sign = -1 if mode == "max" else 1

    def rank(trial: Trial) -> tuple[bool, float, int]:
        best = trial.best(mode)
        return best is None, sign * best[1] if best else 0.0, trial.number

    return sorted(trials, key=rank)
