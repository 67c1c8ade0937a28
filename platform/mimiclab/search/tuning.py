"""Ray Tune's part of a search: it runs the trials; what becomes of them `Course` decides."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray import PlacementGroupID, tune
from ray.exceptions import RayActorError
from ray.tune.error import TuneError
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.util.placement_group import PlacementGroup

from mimiclab.cluster.capacity import is_one_machine
from mimiclab.errors import NoRetryError, PreemptedError, UserError
from mimiclab.fit import PLACEMENT_GROUP, WHERE
from mimiclab.restarts import last_line
from mimiclab.schema import ScaleConfig
from mimiclab.search.alone import is_alone
from mimiclab.search.course import Course, Ending
from mimiclab.search.trial import TrialAlone, run_trial
from mimiclab.search.trials import Trial
from mimiclab.seat import LAST
from mimiclab.session import resources_per_worker
from mimiclab.storage import Storage

ENVIRONMENT = {
    # MLflow holds the curves; nobody reads Tune's CSV and TensorBoard files.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # The older of Tune's two reporters is the one that can be silenced.
    "RAY_AIR_NEW_OUTPUT": "0",
    # A metric that is not reported is named by the course, in a user's words.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
}


def run_trials(
    course: Course, scale: ScaleConfig, folder: Storage, *, parent: str, concurrent: int, verbose: bool
) -> None:
    """Run every trial that is left to its end or until it is stopped, on the cluster that is connected.

    One that fails does not stop the others.

    Args:
        course: of the search; it gives the trials, and hears of all that happens.
        scale: of each trial.
        folder: of the search; Tune keeps tracebacks below it.
        parent: MLflow's id of the search's run.
        concurrent: how many trials may run at a time.
        verbose: let Tune print its own tables.

    Raises:
        UserError: the metric is not among what an evaluation reports, or nothing more can be recorded.
        KeyboardInterrupt: Ctrl-C; the running trials have been stopped.
    """
    alone = is_alone(scale)
    trainable = tune.with_parameters(TrialAlone if alone else run_trial, parent=parent, folder=str(Path.cwd()))
    # With Ray Train, Tune sees the trial's driver only: it computes nothing, and stays on the machine where the search
    # was started (the workers' resources are what `concurrent` accounts for).
    needs = resources_per_worker(scale) if alone else {"CPU": 0}
    # The next trial finds all loaded, which is most of what the first one waits for.
    tune_trials(course, trainable, needs, folder, concurrent=concurrent, reuse_actors=alone, verbose=verbose)


def tune_trials(
    course: Course,
    trainable: Any,
    needs: Mapping[str, float],
    folder: Storage,
    *,
    concurrent: int,
    reuse_actors: bool = False,
    verbose: bool = False,
) -> None:
    """Have Tune run what the course gives, whatever a trial does.

    Args:
        course: of the search.
        trainable: gets a config of a run's `name` and its `experiment` as JSON; reports `epoch`, `step` and metrics.
        needs: what its process takes, on this machine.
        folder: of the search.
        concurrent: how many trials may run at a time.
        reuse_actors: let a process run one trial after the other.
        verbose: let Tune print its own tables.

    Raises:
        UserError, KeyboardInterrupt: see `run_trials`.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not verbose:  # a trial's error is told in a line, and its traceback is in Tune's folder
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    address = ray.util.get_node_ip_address()
    given = _Given(course)
    tuner = tune.Tuner(
        tune.with_resources(trainable, _here(needs, address)),
        tune_config=tune.TuneConfig(
            num_samples=-1,
            search_alg=_Queue(given),
            scheduler=_Decisions(given),
            max_concurrent_trials=concurrent,
            reuse_actors=reuse_actors,
            trial_name_creator=lambda trial: trial.config["name"],
            trial_dirname_creator=lambda trial: trial.config["name"],
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=folder.uri if folder.local is None else str(folder.local),
            callbacks=[_Watch(given, address if is_one_machine() else None)],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # trials keep their own
            verbose=2 if verbose else 0,
        ),
    )
    try:
        tuner.fit()
    except TuneError as error:
        if isinstance(error.__context__, UserError):  # ours, out of Tune's wrapping
            raise error.__context__ from None
        raise
    if not course.is_over:  # Tune answers Ctrl-C by returning early
        raise KeyboardInterrupt


@dataclass
class _Given:
    """The course, and what of it Tune was given so far, by name."""

    course: Course
    runs: dict[str, Trial] = field(default_factory=dict)

    def of(self, trial: Any) -> Trial:
        """The run of a trial of Tune's."""
        return self.runs[trial.config["name"]]

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        # Tune pickles what it is given, for a restart of its own, which is not used.
        return _nothing, ()


def _nothing() -> None:
    pass


class _Queue(Searcher):  # type: ignore[misc]
    """Gives Tune the runs of the course, each when there is room for it."""

    def __init__(self, given: _Given) -> None:
        super().__init__()
        self._given = given

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        run = self._given.course.next()
        if run is None:
            # One that is running may be put back, or be repeated with other seeds.
            return str(Searcher.FINISHED) if self._given.course.is_over else None
        self._given.runs[run.name] = run
        return {"name": run.name, "experiment": run.experiment.model_dump_json()}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        pass

    def save(self, checkpoint_path: str) -> None:
        pass

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        pass

    def restore(self, checkpoint_path: str) -> None:
        pass


class _Decisions(FIFOScheduler):  # type: ignore[misc]
    """Hands results to the course of the search, and its decisions to Tune.

    A trial that reaches the last epoch ends by itself, where Ray's ASHA would kill it: what training does after its
    last evaluation (weights to MLflow, the status of the run) is done for the trials that matter most.
    """

    def __init__(self, given: _Given) -> None:
        super().__init__()
        self._given = given

    def on_trial_result(self, tune_controller: object, trial: tune.experiment.Trial, result: dict[str, Any]) -> str:
        if "epoch" not in result:  # Tune's word that a trial ended that was never evaluated
            return str(TrialScheduler.CONTINUE)
        goes_on = self._given.course.result(
            self._given.of(trial),
            epoch=result["epoch"],
            step=result.get("step"),
            metrics=result,
            last=bool(result.get(LAST)),
            where=_machines(result),
        )
        return str(TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP)


class _Watch(tune.Callback):  # type: ignore[misc]
    """Tells the course of the search which trials begin and end.

    Args:
        given: the runs.
        address: of the machine that they run on, where there is but one.
    """

    def __init__(self, given: _Given, address: str | None) -> None:
        self._given = given
        self._address = address

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: object) -> None:
        self._given.course.begin(self._given.of(trial), where=self._address)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: object) -> None:
        run = self._given.of(trial)
        self._given.course.complete(run)
        if run.outcome != "finished":
            _give_back(trial.last_result)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: object) -> None:
        run, error = self._given.of(trial), _error_of(trial)
        if isinstance(error, RayActorError | TuneError):
            _give_back(trial.last_result)
            taken = isinstance(error, RayActorError) and error.preempted
            self._given.course.died(run, "preemption" if taken else "crash", last_line(error))
        else:
            self._given.course.end(run, *judge(error))


def _here(needs: Mapping[str, float], address: str) -> tune.PlacementGroupFactory:
    """A trial's process on the node where the search was started; several nodes may share its address."""
    node = ray.get_runtime_context().get_node_id()
    # By the label alone it would ask for nothing, where a trial's driver needs no processor.
    bundle = {**needs, f"node:{address}": 0.001}
    return tune.PlacementGroupFactory([bundle], bundle_label_selector=[{"ray.io/node-id": node}])


def _machines(result: Mapping[str, Any]) -> str | None:
    """The address of rank 0's machine, and how many more its workers are on: `10.0.0.7 +2`; None of a trial alone."""
    if (group := _group_of(result)) is None:
        return None
    nodes = {*ray.util.placement_group_table(group).get("bundles_to_node_id", {}).values()}
    return f"{result[WHERE]} +{len(nodes) - 1}" if len(nodes) > 1 else str(result[WHERE])


def _group_of(result: Mapping[str, Any] | None) -> PlacementGroup | None:
    """What Ray reserved for the workers that told a result."""
    group = (result or {}).get(PLACEMENT_GROUP)
    return PlacementGroup(PlacementGroupID.from_hex(group)) if group else None


def _give_back(result: Mapping[str, Any] | None) -> None:
    """Free what a trial's workers had reserved: Tune kills their controller, which would have done it."""
    if group := _group_of(result):
        ray.util.remove_placement_group(group)


def _error_of(trial: Any) -> Exception:
    """What ended a trial of Tune's."""
    error: Exception
    if trial.pickled_error_file is None:  # Tune's own trouble, as when a process could not be started
        error = TuneError(Path(trial.error_file).read_text())
    else:
        with Path(trial.pickled_error_file).open("rb") as file:
            error = pickle.load(file)
        error = getattr(error, "cause", error)
    return error


def judge(error: BaseException) -> tuple[Ending, str]:
    """What to call the end of a trial by an error, and why: a user's mistake in its own words, a bug's last line.

    Values with which the loss becomes NaN are bad ones, which is what a search wants to know: such a trial is pruned.
    """
    if isinstance(error, PreemptedError):
        return "preempted", str(error)
    if isinstance(error, NoRetryError):
        from mimiclab.engine import NonFiniteLossError

        return "pruned" if isinstance(error, NonFiniteLossError) else "failed", str(error)
    return "failed", str(error) if isinstance(error, UserError) else last_line(error)
