"""A search from start to end: everything is checked first, then the trials run, then what they found is written.

<storage>/<search>/
    record.jsonl      what happened, see record.py; from it the same command goes on
    search.yaml       the resolved experiment with its search
    best.yaml         the best trial's experiment, for `mimiclab train`
    report/           see report.py
    tune/             Ray Tune's own record
    .lease.json       who drives it now, see lease.py
<storage>/<search>-trial-00/ ...
                      a run for each trial, see runs.py; -seed-1 and so on of those that repeat it
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console

from mimiclab import runs
from mimiclab.cluster import capacity
from mimiclab.errors import UserError
from mimiclab.experiment import LoadedExperiment, flatten, identity, resolved_yaml
from mimiclab.lease import Lease
from mimiclab.reaper import reap_beside
from mimiclab.schema import Experiment, Workers
from mimiclab.scoring import check_scorer
from mimiclab.search.alone import needs_one_process
from mimiclab.search.budget import unit
from mimiclab.search.course import Course
from mimiclab.search.data import splits_of
from mimiclab.search.earlier import BEST, SEARCH, TUNE, read_record, remove, search_identity, wait_for_drivers
from mimiclab.search.metric import name_of
from mimiclab.search.proposals import check_optuna
from mimiclab.search.record import Record
from mimiclab.search.report import REPORT, TEXT, write_report
from mimiclab.search.results import best_experiment, note, ranking_table, spent_text
from mimiclab.search.trials import Outcome, Plan, Trial, ranked, resources_of, scale_of, with_repeats
from mimiclab.search.watch import SearchView
from mimiclab.session import ray_session, resources_per_worker
from mimiclab.storage import Storage
from mimiclab.tracking import runs as tracking
from mimiclab.tracking import searches
from mimiclab.tracking.writer import MlflowTracker
from mimiclab.train import decode_ahead

# How long each trial's last metrics may take to reach the tracking server, seconds.
_SEND_TIMEOUT_S = 60.0
# A run that was stopped is one that was killed; the tag `trial.outcome` tells why.
_STATUS: dict[Outcome, tuple[runs.Status, searches.Status]] = {
    "finished": ("finished", "FINISHED"),
    "pruned": ("killed", "KILLED"),
    "out of budget": ("killed", "KILLED"),
    "killed": ("killed", "KILLED"),
    "preempted": ("failed", "FAILED"),
    "failed": ("failed", "FAILED"),
}


def search(
    loaded: LoadedExperiment,
    *,
    console: Console,
    address: str | None = None,
    fresh: bool = False,
    verbose: bool = False,
) -> list[Trial]:
    """Search the space of an experiment, print the ranking and write the best trial's experiment.

    A search that was begun before goes on: trials that ended stay as they are, the others from their checkpoints.

    Args:
        loaded: an experiment with a `search:` section.
        console: gets what a person wants to know.
        address: of a Ray cluster; see `ray_session`.
        fresh: remove an earlier search of this name, with its trials, first.
        verbose: let Ray talk.

    Returns:
        The trials, the best first.

    Raises:
        UserError: anything that the user can mend, found before a trial starts wherever possible.
        KeyboardInterrupt: the search and its running trials are recorded as killed; the same command goes on.
    """
    plan = Plan(loaded)
    experiment, config = plan.experiment, plan.config
    if config.algorithm == "optuna":
        check_optuna()
    check_scorer(experiment.eval.scorer)
    trials = plan.trials()
    tracking.check_tracking(experiment.where.tracking)
    uri = tracking.absolute_uri(experiment.where.tracking)
    decode_ahead(splits_of(experiment))  # once for all trials, which find the data made when they run side by side
    folder = runs.storage_of(experiment)
    work = fresh or not Course(plan, trials, read_record(plan, trials, folder), say=lambda _: None).is_over

    with contextlib.ExitStack() as stack:
        parent = course = record = tracker = None
        tell = ThreadPoolExecutor(1, "outcomes")
        status: searches.Status = "FAILED"
        try:
            with _session(experiment, address, verbose=verbose) if work else contextlib.nullcontext():
                lease = stack.enter_context(Lease.take(folder, experiment.name, kind="search"))
                trials = plan.trials()
                if fresh:
                    wait_for_drivers(trials, console)
                    remove(experiment, trials, folder, uri)
                record = read_record(plan, trials, folder)
                view = SearchView(console, record)
                heard = lease.before.heartbeat if lease.before and record.events else None
                course = Course(plan, trials, record, view.say, lambda: _refuse_if_lost(lease), heard)
                reap_beside(experiment, console)
                _write(folder, SEARCH, resolved_yaml(experiment))
                parent = _open_parent(plan, trials, uri)
                tracker = MlflowTracker(uri, parent)
                course.open(_history(plan, tracker), lambda trial: tell.submit(_tell_outcome, trial))
                if not course.is_over:
                    with view:
                        _run(plan, trials, course, folder, parent, console, verbose=verbose)
                elif not course.is_spent:
                    console.print(f"search {experiment.name} is complete; --fresh starts it anew", highlight=False)
            failed = all(trial.outcome in ("failed", "preempted") for trial in trials)
            status = "FAILED" if failed else "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            console.print("stopped; the same command goes on")
            raise
        finally:
            tell.shutdown(cancel_futures=True)
            if tracker is not None:
                tracker.close(_SEND_TIMEOUT_S)
            # Only now, when no trial's process is left that could write another status.
            if parent is not None and course is not None and record is not None and lease.lost is None:
                _settle(trials, course, uri, parent)
                _conclude(plan, ranked(trials, config.mode), course.spent, uri, parent, status, folder, console)
                _report(record, folder, uri, parent, console)
    if status == "FAILED":
        raise UserError(
            f"search {experiment.name}: every trial failed; their tracebacks are in {folder.name}/{TUNE}/*/error.txt"
        )
    return ranked(trials, config.mode)


def num_concurrent(experiment: Experiment, found: Mapping[str, float], num_trials: int) -> int:
    """How many of `num_trials` run at a time on a cluster of these resources.

    Ray knows of one trial's needs at a time only.
    """
    config = experiment.search
    assert config is not None
    fitting = min(int(found.get(kind, 0) // each) for kind, each in resources_of(experiment).items())
    wanted = num_trials if config.max_concurrent == "auto" else min(config.max_concurrent, num_trials)
    return max(1, min(wanted, fitting))


def check_room(experiment: Experiment, found: Mapping[str, float]) -> None:
    """Make sure that a cluster of these resources can ever hold `search.workers_per_trial`.

    Raises:
        UserError: it cannot; the message names what lacks.
    """
    assert experiment.search is not None
    num = experiment.search.workers_per_trial
    for kind, each in resources_per_worker(experiment.scale).items() if num else ():
        assert num is not None
        if num * each > found.get(kind, 0):
            raise UserError(
                f"search.workers_per_trial: {num} workers of {each:g} {kind} each need {num * each:g}, found "
                f"{found.get(kind, 0):g} in the cluster; expected fewer workers per trial or a larger cluster"
            )


@contextlib.contextmanager
def _session(experiment: Experiment, address: str | None, *, verbose: bool) -> Iterator[None]:
    """A connection to a cluster that can hold a trial."""
    assert experiment.search is not None
    scale = experiment.scale
    if experiment.search.workers_per_trial is not None:  # whose own message names what the user wrote
        scale = scale.model_copy(update={"workers": Workers(min=1, max=1)})
    # Where nothing of Ray Train is started there is nothing for it to clean up.
    alone = needs_one_process(scale_of(experiment))
    with ray_session(address, scale, verbose=verbose, state_api=not alone):
        check_room(experiment, capacity.connected())
        yield


def _run(
    plan: Plan,
    trials: Sequence[Trial],
    course: Course,
    folder: Storage,
    parent: str,
    console: Console,
    *,
    verbose: bool,
) -> None:
    """Run what is left of the trials."""
    from mimiclab.search import tuning

    wait_for_drivers([run for run in course.left if run.begun], console)
    waiting = [run for run in with_repeats(trials) if run.outcome == "waiting"]
    concurrent = num_concurrent(plan.experiment, capacity.connected(), len(waiting))
    num = sum(trial.outcome != "waiting" for trial in trials)
    ended = f", {num} of them ended before" if num else ""
    console.print(f"{len(trials)} trials{ended}, {concurrent} at a time", highlight=False)
    scale = scale_of(plan.experiment)
    tuning.run_trials(course, scale, folder, parent=parent, concurrent=concurrent, verbose=verbose)


def _open_parent(plan: Plan, trials: Sequence[Trial], uri: str) -> str:
    """The search's run in MLflow, a new one or that of an earlier driver."""
    experiment = plan.experiment
    params = {key: str(value) for key, value in flatten(experiment).items() if key.startswith("search.")}
    # The terms of a sum are names that a parameter's may not hold.
    params = {key: value for key, value in params.items() if not key.startswith("search.metric")}
    parent = searches.open_search(
        uri,
        experiment.where.project,
        experiment.name,
        search_identity(experiment),
        params={"search.metric": name_of(plan.config.metric), **params},
        note=note(experiment, len(trials)),
    )
    tracking.log_text(uri, parent, resolved_yaml(experiment))
    return parent


def _history(plan: Plan, tracker: MlflowTracker) -> Callable[[int, float], None]:
    """What keeps the history of the best value so far; it is sent from another thread, about once a second."""
    metric = plan.config.metric
    key = searches.best_key(name_of(metric), is_sum=not isinstance(metric, str))
    return lambda step, value: tracker.log_metrics(step, {key: value})


def _refuse_if_lost(lease: Lease) -> None:
    if lease.lost is not None:
        raise UserError(f"{lease.lost} has taken this search, which it may when this driver is not heard of")


def _write(folder: Storage, name: str, text: str) -> None:
    try:
        folder.write(name, text.encode())
    except UserError as error:
        raise UserError(f"where.storage: {error}") from error


def _how_to_train(folder: Storage) -> str:
    if folder.local is None:
        return f"{folder.where(BEST)}; mimiclab train takes a copy of it on this machine"
    file = folder.local / BEST
    return f"mimiclab train {file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file}"


def _settle(trials: Sequence[Trial], course: Course, uri: str, parent: str) -> None:
    """Record how each trial stands, since not all could do it themselves: ASHA kills what it prunes."""
    for trial in with_repeats(trials):
        if not trial.begun or trial.settled:
            continue
        if trial.outcome in ("waiting", "running"):
            trial.outcome = "killed"
        status, mlflow_status = _STATUS[trial.outcome]
        run = runs.read(runs.storage_of(trial.experiment))
        if run is not None and trial.outcome != "finished":
            run = run.with_status(status)
            _send_rest(run)
        run_id = run.mlflow_run_id if run else _open_run(trial.experiment, uri, parent)
        searches.end_trial(uri, run_id, trial.outcome, mlflow_status, trial.values, trial.error)
        course.settle(trial)


def _tell_outcome(trial: Trial) -> None:
    """Have MLflow show how a trial stands while the search goes on; `_settle` has the last word."""
    if (run := runs.read(runs.storage_of(trial.experiment))) is not None:
        tracking.set_tags(run.tracking, run.mlflow_run_id, {searches.OUTCOME_TAG: trial.outcome})


def _open_run(experiment: Experiment, uri: str, parent: str) -> str:
    """The MLflow run of a trial that failed before it had one."""
    params = {key: str(value) for key, value in flatten(experiment).items()}
    tags = {searches.PARENT_TAG: parent}
    return tracking.open_run(uri, experiment.where.project, experiment.name, identity(experiment), params, tags)


def _send_rest(run: runs.Run) -> None:
    """Send what the tracking server had not acknowledged: what the run keeps and what its last checkpoint holds."""
    from mimiclab import checkpoint
    from mimiclab.tracking.protocol import Row

    newest = checkpoint.latest(run.checkpoints, warn=lambda _: None, deep=False)
    rows = [Row(*row) for row in newest.meta["unsent"]] if newest is not None else []
    kept = run.storage / runs.UNSENT_FILES
    if rows or kept.sizes():
        MlflowTracker(run.tracking, run.mlflow_run_id, rows, spool=kept).close(_SEND_TIMEOUT_S)


def _conclude(
    plan: Plan,
    ranking: Sequence[Trial],
    spent: float,
    uri: str,
    parent: str,
    status: searches.Status,
    folder: Storage,
    console: Console,
) -> None:
    """Show and record what the search found so far."""
    from mimiclab.tracking.ui import place_of

    experiment, config = plan.experiment, plan.config
    best = ranking[0] if ranking[0].scores(config.mode) else None
    metrics = {f"spent/{unit(gpu=experiment.scale.gpu)}": spent}
    text = note(experiment, len(ranking), ranking, spent)
    searches.end_search(uri, parent, status, best.name if best else None, metrics, text)
    console.print(ranking_table(ranking, config, f"{experiment.name}, the best first"))
    for trial in with_repeats(ranking):
        if trial.error is not None:
            console.print(f"{trial.name} {trial.outcome}: {trial.error}", highlight=False, markup=False)
    console.print(f"budget:   {spent_text(experiment, spent)}", highlight=False)
    if best is not None:
        text = best_experiment(plan, best, len(ranking))
        _write(folder, BEST, text)
        tracking.log_text(uri, parent, text, BEST)
        console.print(f"best:     {_how_to_train(folder)}", highlight=False)
    console.print(f"MLflow:   {place_of(uri, parent)}", highlight=False)


def _report(record: Record, folder: Storage, uri: str, parent: str, console: Console) -> None:
    """Write the report; it can be made anew from the record at any time."""
    try:
        write_report(record.events, folder, (uri, parent))
    except UserError as error:
        console.print(f"warning: the report: {error}", highlight=False, markup=False)
    else:
        console.print(f"report:   {folder.where(f'{REPORT}/{TEXT}')}", highlight=False)
