"""Ray Tune's part of a search: it runs the trials; what becomes of them `Course` decides."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import ray
from ray import PlacementGroupID, tune
from ray.tune.error import TuneError
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.util.placement_group import PlacementGroup

from mimiclab.errors import NoRetryError, UserError
from mimiclab.schema import SearchConfig
from mimiclab.search.course import Course
from mimiclab.search.trial import run_trial
from mimiclab.search.trials import Trial
from mimiclab.storage import Storage
from mimiclab.worker import PLACEMENT_GROUP

ENVIRONMENT = {
    # MLflow holds the curves; nobody reads Tune's CSV and TensorBoard files.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # The older of Tune's two reporters is the one that can be silenced.
    "RAY_AIR_NEW_OUTPUT": "0",
    # A metric that is not reported is named by `_Decisions`, in a user's words.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
}


def run_trials(
    trials: Sequence[Trial],
    course: Course,
    config: SearchConfig,
    folder: Storage,
    *,
    parent: str,
    concurrent: int,
    verbose: bool,
) -> None:
    """Run every trial that is left to its end or until it is pruned, on the cluster that is connected.

    One that fails does not stop the others.

    Args:
        trials: all of one search.
        course: of these trials; it hears of all that happens.
        config: the search.
        folder: of the search; Tune keeps tracebacks below it.
        parent: MLflow's id of the search's run.
        concurrent: how many trials may run at a time.
        verbose: let Tune print its own tables.

    Raises:
        UserError: the metric is not among what an evaluation reports, or nothing more can be recorded.
        KeyboardInterrupt: Ctrl-C; the running trials have been stopped.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not verbose:  # a trial's error is told in a line, and its traceback is in Tune's folder
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    trainable = tune.with_parameters(
        run_trial,
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
        param_space={"number": tune.grid_search([trial.number for trial in course.left])},
        tune_config=tune.TuneConfig(
            metric=config.metric,
            mode=config.mode,
            scheduler=_Decisions(trials, course, config.metric),
            max_concurrent_trials=concurrent,
            trial_name_creator=lambda trial: trials[trial.config["number"]].name,
            trial_dirname_creator=lambda trial: trials[trial.config["number"]].name,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=folder.uri if folder.local is None else str(folder.local),
            callbacks=[_Watch(trials, course)],
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


class _Decisions(FIFOScheduler):  # type: ignore[misc]
    """Hands results to the course of the search, and its decisions to Tune.

    A trial that reaches the last epoch ends by itself, where Ray's ASHA would kill it: what training does after its
    last evaluation (weights to MLflow, the status of the run) is done for the trials that matter most.
    """

    def __init__(self, trials: Sequence[Trial], course: Course, metric: str) -> None:
        super().__init__()
        self._trials = trials
        self._course = course
        self._name = metric

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles what it is given, for a restart of its own, which is not used

    def on_trial_result(self, tune_controller: object, trial: tune.experiment.Trial, result: dict[str, Any]) -> str:
        if "epoch" not in result:  # Tune's word that a trial ended that was never evaluated
            return str(TrialScheduler.CONTINUE)
        if self._name not in result:
            raise UserError(_unknown_metric(self._name, result))
        own = self._trials[trial.config["number"]]
        goes_on = self._course.result(own, result["epoch"], result[self._name])
        return str(TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP)


class _Watch(tune.Callback):  # type: ignore[misc]
    """Tells the course of the search which trials begin and end."""

    def __init__(self, trials: Sequence[Trial], course: Course) -> None:
        self._trials = trials
        self._course = course

    def __getstate__(self) -> dict[str, Any]:
        return {}  # as above

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: object) -> None:
        self._course.begin(self._own(trial))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: object) -> None:
        own = self._own(trial)
        self._course.complete(own)
        if own.outcome == "pruned":
            _give_back(trial.last_result)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: object) -> None:
        outcome, reason = _outcome(trial)
        self._course.end(self._own(trial), outcome, reason)

    def _own(self, trial: Any) -> Trial:
        return self._trials[int(trial.config["number"])]


def _give_back(result: Mapping[str, Any]) -> None:
    """Free what a trial's workers had reserved: Tune kills their controller, which would have done it."""
    if group := result.get(PLACEMENT_GROUP):
        ray.util.remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(group)))


def _unknown_metric(metric: str, result: Mapping[str, Any]) -> str:
    known = sorted(name for name in result if name.startswith(("student", "teacher", "gap")))
    nearest = get_close_matches(metric, known, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"expected one of {', '.join(known)}"
    return f"search.metric: evaluations do not report {metric}; {hint}"


def _outcome(trial: Any) -> tuple[Literal["pruned", "failed"], str]:
    """What to call the end of a trial by an error, and why: a user's mistake in its own words, a bug's last line."""
    if trial.pickled_error_file is None:  # Tune's own trouble, as when a process could not be started
        return "failed", Path(trial.error_file).read_text().strip().splitlines()[-1]
    with Path(trial.pickled_error_file).open("rb") as file:
        error = pickle.load(file)
    return judge(getattr(error, "cause", error))


def judge(error: BaseException) -> tuple[Literal["pruned", "failed"], str]:
    """What to call the end of a trial by an error, and why.

    Values with which the loss becomes NaN are bad ones, which is what a search wants to know: such a trial is pruned.
    """
    if isinstance(error, NoRetryError):
        from mimiclab.engine import NonFiniteLossError

        return "pruned" if isinstance(error, NonFiniteLossError) else "failed", str(error)
    return "failed", str(error) if isinstance(error, UserError) else str(error).strip().splitlines()[-1]
