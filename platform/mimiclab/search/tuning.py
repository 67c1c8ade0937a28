"""Ray Tune's part of a search: runs the trials, and stops the worse ones early (ASHA)."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import ray
from ray import PlacementGroupID, tune
from ray.tune.error import TuneError
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.util.placement_group import PlacementGroup
from rich.console import Console

from mimiclab.errors import UserError
from mimiclab.schema import Experiment, SearchConfig
from mimiclab.search.results import show
from mimiclab.search.trials import Trial
from mimiclab.storage import Storage
from mimiclab.tracking.searches import PARENT_TAG
from mimiclab.train import train
from mimiclab.worker import PLACEMENT_GROUP

ENVIRONMENT = {
    # MLflow holds the curves; nobody reads Tune's CSV and TensorBoard files.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # The older of Tune's two reporters is the one that can be silenced.
    "RAY_AIR_NEW_OUTPUT": "0",
    # A metric that is not reported is named by `_Watch`, in a user's words.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
}


def run_trials(
    trials: Sequence[Trial],
    config: SearchConfig,
    folder: Storage,
    console: Console,
    *,
    parent: str,
    concurrent: int,
    verbose: bool,
) -> None:
    """Run every trial to its end or until it is pruned, on the cluster that is connected.

    The trials are changed in place, as results arrive. One that fails does not stop the others.

    Args:
        trials: all of one search.
        config: the search.
        folder: of the search; Tune's own record is kept below it.
        console: gets a line for each result.
        parent: MLflow's id of the search's run.
        concurrent: how many trials may run at a time.
        verbose: let Tune print its own tables.

    Raises:
        UserError: the metric is not among what an evaluation reports.
        KeyboardInterrupt: Ctrl-C; the running trials have been stopped.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not verbose:  # a trial's error is told in a line, and its traceback is in Tune's folder
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    epochs = trials[0].experiment.optim.epochs
    trainable = tune.with_parameters(
        _run_trial,
        experiments=[trial.experiment.model_dump_json() for trial in trials],
        parent=parent,
        folder=str(Path.cwd()),
    )
    # Tune sees the trial's driver only: it computes nothing, and stays on the machine where the search was started
    # (the workers' resources are what `concurrent` accounts for).
    here = f"node:{ray.util.get_node_ip_address()}"
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"CPU": 0, here: 0.001}),
        # The values are drawn beforehand: a trial is named by its number, in Tune's record too.
        param_space={"number": tune.grid_search([trial.number for trial in trials])},
        tune_config=tune.TuneConfig(
            metric=config.metric,
            mode=config.mode,
            scheduler=_Asha(epochs, config),
            max_concurrent_trials=concurrent,
            trial_name_creator=lambda trial: trials[trial.config["number"]].name,
            trial_dirname_creator=lambda trial: trials[trial.config["number"]].name,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=folder.uri if folder.local is None else str(folder.local),
            callbacks=[_Watch(trials, config.metric, epochs, console)],
            verbose=2 if verbose else 0,
        ),
    )
    try:
        tuner.fit()
    except TuneError as error:
        if isinstance(error.__context__, UserError):  # ours, out of Tune's wrapping
            raise error.__context__ from None
        raise
    if any(trial.outcome in ("waiting", "running") for trial in trials):  # Tune answers Ctrl-C by returning early
        raise KeyboardInterrupt


def _run_trial(config: Mapping[str, int], *, experiments: Sequence[str], parent: str, folder: str) -> None:
    """Train one trial; Tune runs this in a process of its own, and kills it there when the trial is pruned."""
    os.chdir(folder)  # relative paths mean what they mean where the search was started
    train(
        Experiment.model_validate_json(experiments[config["number"]]),
        console=Console(quiet=True),
        tags={PARENT_TAG: parent},
        callbacks=[TuneReportCallback()],
    )


class _Asha(ASHAScheduler):  # type: ignore[misc]
    """ASHA in epochs; a trial that reaches the last one ends by itself, where Ray's would kill it.

    What training does after its last evaluation (weights to MLflow, the status of the run) is done for the trials
    that matter most.
    """

    def __init__(self, epochs: int, config: SearchConfig) -> None:
        super().__init__(
            time_attr="epoch",
            max_t=epochs,
            grace_period=config.grace_period,
            reduction_factor=config.reduction_factor,
        )
        self._epochs = epochs

    def on_trial_result(self, tune_controller: object, trial: tune.experiment.Trial, result: dict[str, Any]) -> str:
        if result["epoch"] >= self._epochs:
            return str(TrialScheduler.CONTINUE)
        return str(super().on_trial_result(tune_controller, trial, result))


class _Watch(tune.Callback):  # type: ignore[misc]
    """Keeps the trials' record, and prints a line for each event."""

    def __init__(self, trials: Sequence[Trial], metric: str, epochs: int, console: Console) -> None:
        self._trials = trials
        self._metric = metric
        self._epochs = epochs
        self._console = console

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_console": None}  # Tune pickles what it is given, and a console cannot be

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: object) -> None:
        own = self._own(trial)
        own.outcome = "running"
        values = ", ".join(f"{key} {show(value)}" for key, value in own.values.items())
        self._say(own, f"started: {values}")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: object
    ) -> None:
        own = self._own(trial)
        if self._metric not in result:
            raise UserError(_unknown_metric(self._metric, result))
        own.evaluations.append((result["epoch"], result[self._metric]))
        self._say(own, f"epoch {own.epochs}/{self._epochs}, {self._metric} {result[self._metric]:.4f}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: object) -> None:
        own = self._own(trial)
        own.outcome = "finished" if own.epochs >= self._epochs else "pruned"
        if own.outcome == "pruned":
            _give_back(trial.last_result)
        self._say(own, own.outcome if own.outcome == "finished" else f"pruned after epoch {own.epochs}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: object) -> None:
        own = self._own(trial)
        own.outcome = "failed"
        own.error = _reason(trial)
        self._say(own, f"failed: {own.error}")

    def _own(self, trial: Any) -> Trial:
        return self._trials[int(trial.config["number"])]

    def _say(self, trial: Trial, text: str) -> None:
        self._console.print(f"{trial.name}  {text}", highlight=False, markup=False)


def _give_back(result: Mapping[str, Any]) -> None:
    """Free what a trial's workers had reserved: Tune kills their controller, which would have done it."""
    if group := result.get(PLACEMENT_GROUP):
        ray.util.remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(group)))


def _unknown_metric(metric: str, result: Mapping[str, Any]) -> str:
    known = sorted(name for name in result if name.startswith(("student", "teacher", "gap")))
    nearest = get_close_matches(metric, known, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"expected one of {', '.join(known)}"
    return f"search.metric: evaluations do not report {metric}; {hint}"


def _reason(trial: Any) -> str:
    """Why a trial failed: a mistake of the user's in its own words, of a bug the last line of its traceback."""
    if trial.pickled_error_file is None:  # Tune's own trouble, as when a process could not be started
        return Path(trial.error_file).read_text().strip().splitlines()[-1]
    with Path(trial.pickled_error_file).open("rb") as file:
        error = pickle.load(file)
    cause = getattr(error, "cause", error)
    return str(cause) if isinstance(cause, UserError) else str(error).strip().splitlines()[-1]
