"""What a search tries, and what came of it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from string import Template
from typing import TYPE_CHECKING, Any, Literal

from mimiclab.errors import UserError
from mimiclab.experiment import LoadedExperiment, vary
from mimiclab.layers import dump
from mimiclab.schema import PATH_KEYS, Experiment, ScaleConfig, SearchConfig, Workers
from mimiclab.search.data import order_of
from mimiclab.search.space import draw, grid
from mimiclab.session import resources_per_worker

if TYPE_CHECKING:
    from mimiclab.data.order import Order

DEFAULT_TRIALS = 16
"""Of a search that does not say and is no grid."""

Outcome = Literal["waiting", "running", "finished", "pruned", "out of budget", "preempted", "failed", "killed"]


@dataclass
class Trial:
    """One set of values, and how far training with it came; or a run that repeats it with another seed."""

    number: int
    values: dict[str, Any]
    """Of the searched keys; none yet where they are proposed when the trial starts."""
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
    seed: int | None = None
    """Of a run that repeats a trial; None of the trial itself."""
    repeats: list[Trial] = field(default_factory=list)
    """The same with the seeds that follow, once it has finished."""

    @property
    def name(self) -> str:
        """Its name within the search."""
        return trial_name(self.number, self.seed)

    @property
    def key(self) -> dict[str, Any]:
        """What names it in an event of the record."""
        return {"trial": trial_name(self.number), **({} if self.seed is None else {"seed": self.seed})}

    @property
    def epochs(self) -> int:
        """Epochs that it was trained for, up to its last evaluation."""
        return self.evaluations[-1][0] if self.evaluations else 0

    def best(self, mode: str) -> tuple[int, float] | None:
        """Epoch and value of its best evaluation, the earliest of equals; None if it was never evaluated."""
        sign = -1 if mode == "max" else 1
        known = [item for item in self.evaluations if not math.isnan(item[1])]
        return min(known, key=lambda item: sign * item[1], default=None)

    def scores(self, mode: str) -> tuple[float, ...]:
        """What it ranks by, by the mean: its best value, and that of each repeat that has finished."""
        runs = [self, *(repeat for repeat in self.repeats if repeat.outcome == "finished")]
        return tuple(best[1] for run in runs if (best := run.best(mode)) is not None)


class Plan:
    """Makes the trials of a search.

    Args:
        loaded: an experiment with a `search:` section.
        order_of: the order in which an experiment shows its data; called where steps are counted.

    Raises:
        UserError: the file has no `search:` section, or trials of that many steps cannot be.
    """

    def __init__(self, loaded: LoadedExperiment, order_of: Callable[[Experiment], Order] = order_of) -> None:
        if loaded.experiment.search is None:
            raise UserError(
                f"{loaded.path}: it has no search: section, expected one such as\n"
                "  search: {trials: 4, space: {model.mimic.cls_weight: {loguniform: [0.1, 10]}}}"
            )
        self.experiment = loaded.experiment
        self.config: SearchConfig = loaded.experiment.search
        self._loaded = loaded
        self._order_of = order_of
        epochs = loaded.experiment.optim.epochs
        if self.config.unit == "epochs":
            self.max_t = self.config.max_t or epochs
            """The last epoch, or step, of a trial that is not pruned."""
        else:
            self._last_epoch(loaded.experiment)
            self.max_t = self.config.max_t or order_of(loaded.experiment).num_steps(epochs)

    @property
    def written(self) -> str:
        """The search's experiment as it was written, in one file, before anything was filled in."""
        return dump(self._loaded.tree)

    @property
    def variables(self) -> dict[str, str]:
        """What was written names these of the environment."""
        environ = self._loaded.environ
        return {name: environ[name] for name in Template(self.written).get_identifiers() if name in environ}

    def file_of(self, trial: Trial, name: str) -> str:
        """A trial's experiment under another name as a file: in full, but for `$VARIABLES` and `~` in what was written.

        Trained with the same variables it gives the trial's numbers again.
        """
        tree = trial.experiment.model_copy(update={"name": name}).model_dump(mode="json")
        for key in PATH_KEYS:
            *parents, last = key.split(".")
            section, written = _at(tree, parents), _at(self._loaded.tree, parents)
            if path := section.get(last):
                section[last] = trial.values.get(key) or written.get(last) or path.replace("$", "$$")
        return dump(tree)

    def trials(self) -> list[Trial]:
        """Every trial, with its values where they are drawn beforehand; the same file gives the same trials.

        Raises:
            UserError: a trial's values do not fit together.
        """
        config, seed = self.config, self._loaded.experiment.seed
        drawn: list[dict[str, Any]]
        if config.algorithm == "grid":
            drawn = grid(config.space)[: config.trials]
        else:
            numbers = range(config.trials or DEFAULT_TRIALS)
            drawn = [draw(config.space, seed, n) if config.algorithm == "random" else {} for n in numbers]
        trials = [Trial(number, {}, self._loaded.experiment) for number in range(len(drawn))]
        for trial, values in zip(trials, drawn, strict=True):
            try:
                self.fill(trial, values)
            except UserError as error:
                shown = ", ".join(f"{key} = {value}" for key, value in values.items())
                raise UserError(f"{self._loaded.path}: search: {trial.name} with {shown}: {error}") from error
        return trials

    def fill(self, trial: Trial, values: Mapping[str, Any]) -> None:
        """Give a trial its values, and what follows from them.

        Raises:
            UserError: the values do not fit together.
        """
        experiment = self._vary(trial.name, values)
        first = experiment.seed + 1
        repeats = []
        for seed in range(first, first + self.config.seeds_per_trial - 1):
            again = self._vary(trial_name(trial.number, seed), {**values, "seed": seed})
            repeats.append(Trial(trial.number, dict(values), again, seed=seed))
        trial.values, trial.experiment, trial.repeats = dict(values), experiment, repeats

    def _vary(self, name: str, values: Mapping[str, Any]) -> Experiment:
        config, loaded = self.config, self._loaded
        keys = {**values}
        if config.workers_per_trial is not None:
            keys["scale.workers"] = config.workers_per_trial
        if config.max_t is not None:
            epochs = config.max_t if config.unit == "epochs" else self._last_epoch(vary(loaded, name, keys))
            keys["optim.epochs"] = epochs
        return vary(loaded, f"{loaded.experiment.name}-{name}", keys)

    def _last_epoch(self, experiment: Experiment) -> int:
        """The first epoch whose end reaches `search.max_t` steps."""
        order, epochs = self._order_of(experiment), experiment.optim.epochs
        for key in ("max_t", "grace_period"):
            found, most = getattr(self.config, key), order.num_steps(epochs)
            if found is not None and found > most:
                raise UserError(
                    f"search.{key} must not be above the steps of optim.epochs, found search.{key} {found} and "
                    f"{most} steps in {epochs} epochs"
                )
        return next(epoch for epoch in range(1, epochs + 1) if order.epoch_end_step(epoch) >= (self.config.max_t or 0))


def _at(tree: dict[str, Any], parents: Iterable[str]) -> dict[str, Any]:
    """A section of a tree; an empty one where there is none."""
    for parent in parents:
        tree = tree.get(parent) or {}
    return tree


def plan(loaded: LoadedExperiment) -> list[Trial]:
    """The trials of a search, see `Plan`."""
    return Plan(loaded).trials()


def with_repeats(trials: Iterable[Trial]) -> list[Trial]:
    """The trials, and after each the runs that repeat it, or would."""
    return [run for trial in trials for run in (trial, *trial.repeats)]


def trial_name(number: int, seed: int | None = None) -> str:
    """The name of the trial of this number, from 0, or of the run that repeats it with a seed."""
    return f"trial-{number:02d}" + ("" if seed is None else f"-seed-{seed}")


def scale_of(experiment: Experiment) -> ScaleConfig:
    """How large each trial of a search is."""
    assert experiment.search is not None
    scale, num = experiment.scale, experiment.search.workers_per_trial
    return scale if num is None else scale.model_copy(update={"workers": Workers(min=num, max=num)})


def resources_of(experiment: Experiment) -> dict[str, float]:
    """What each trial of a search takes of the cluster, with as many workers as it may have."""
    scale = scale_of(experiment)
    return {kind: scale.workers.max * each for kind, each in resources_per_worker(scale).items()}


def ranked(trials: Iterable[Trial], mode: str) -> list[Trial]:
    """The trials with the best first, by the mean of their `scores`; those that were never evaluated last."""
    sign = -1 if mode == "max" else 1

    def rank(trial: Trial) -> tuple[bool, float, int]:
        scores = trial.scores(mode)
        return not scores, sign * statistics.fmean(scores) if scores else 0.0, trial.number

    return sorted(trials, key=rank)
