"""A search from start to end: everything is checked first, then the trials run, then what they found is written.

<storage>/<search>/
    record.jsonl      what happened, see record.py; from it the same command goes on
    search.yaml       the resolved experiment with its search
    best.yaml         the best trial's experiment, for `mimiclab train`
    tune/             Ray Tune's own record
    .lease.json       who drives it now, see lease.py
<storage>/<search>-trial-00/ ...
                      a run for each trial, see runs.py
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from mimiclab import runs
from mimiclab.errors import UserError
from mimiclab.experiment import LoadedExperiment, flatten, identity, resolved_yaml
from mimiclab.lease import Lease
from mimiclab.schema import Experiment
from mimiclab.search.course import Course
from mimiclab.search.earlier import BEST, SEARCH, TUNE, read_record, remove, search_identity, wait_for_drivers
from mimiclab.search.results import best_experiment, note, ranking_table
from mimiclab.search.trials import Outcome, Trial, plan, ranked
from mimiclab.session import ray_session, resources_per_worker
from mimiclab.storage import Storage
from mimiclab.tracking import runs as tracking
from mimiclab.tracking import searches

# How long each trial's last metrics may take to reach the tracking server, seconds.
_SEND_TIMEOUT_S = 60.0
# A run that ASHA stopped is one that was killed; the tag `trial.outcome` tells the two apart.
_STATUS: dict[Outcome, tuple[runs.Status, searches.Status]] = {
    "finished": ("finished", "FINISHED"),
    "pruned": ("killed", "KILLED"),
    "killed": ("killed", "KILLED"),
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
    from mimiclab.data.splits import locate, read_splits

    experiment = loaded.experiment
    trials = plan(loaded)
    config = experiment.search
    assert config is not None  # plan needs it too
    tracking.check_tracking(experiment.where.tracking)
    uri = tracking.absolute_uri(experiment.where.tracking)
    # Trials that run side by side find their data made.
    read_splits(locate(experiment.data))
    folder = runs.storage_of(experiment)
    work = True
    if not fresh:
        ended = {e["trial"] for e in read_record(experiment, trials, folder).events if e["event"] == "ended"}
        work = len(ended) < len(trials)
    session = ray_session(address, experiment.scale, verbose=verbose, state_api=True)

    with contextlib.ExitStack() as leases:
        parent = course = None
        status: searches.Status = "FAILED"
        try:
            with session if work else contextlib.nullcontext():
                lease = leases.enter_context(Lease.take(folder, experiment.name))
                if fresh:
                    wait_for_drivers(trials, console)
                    remove(experiment, trials, folder, uri)
                course = Course(
                    experiment,
                    trials,
                    read_record(experiment, trials, folder),
                    say=lambda text: console.print(text, highlight=False, markup=False),
                    allowed=lambda: _refuse_if_lost(lease),
                )
                _write(folder, SEARCH, resolved_yaml(experiment))
                parent = _open_parent(experiment, trials, uri)
                if course.left:
                    _run(experiment, trials, course, folder, parent, console, verbose=verbose)
                else:
                    console.print(f"search {experiment.name} is complete; --fresh starts it anew", highlight=False)
            status = "FAILED" if all(trial.outcome == "failed" for trial in trials) else "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            console.print("stopped; the same command goes on")
            raise
        finally:
            # Only now, when no trial's process is left that could write another status.
            if parent is not None and course is not None and lease.lost is None:
                _settle(trials, course, uri, parent)
                _conclude(experiment, ranked(trials, config.mode), uri, parent, status, folder, console)
    if status == "FAILED":
        raise UserError(
            f"search {experiment.name}: every trial failed; their tracebacks are in {folder.name}/{TUNE}/*/error.txt"
        )
    return ranked(trials, config.mode)


def num_concurrent(experiment: Experiment, found: Mapping[str, float], num_trials: int) -> int:
    """How many of `num_trials` run at a time on a cluster of these resources.

    Ray knows of one trial's needs at a time only.
    """
    config, scale = experiment.search, experiment.scale
    assert config is not None
    needed = resources_per_worker(scale)
    fitting = min(int(found.get(kind, 0) // (scale.workers.max * each)) for kind, each in needed.items())
    wanted = num_trials if config.max_concurrent == "auto" else min(config.max_concurrent, num_trials)
    return max(1, min(wanted, fitting))


def _run(
    experiment: Experiment,
    trials: Sequence[Trial],
    course: Course,
    folder: Storage,
    parent: str,
    console: Console,
    *,
    verbose: bool,
) -> None:
    """Run what is left of the trials."""
    import ray

    from mimiclab.search import tuning

    assert experiment.search is not None
    left = course.left
    wait_for_drivers([trial for trial in left if trial.begun], console)
    concurrent = num_concurrent(experiment, ray.cluster_resources(), len(left))
    ended = f", {len(trials) - len(left)} of them ended before" if len(left) < len(trials) else ""
    console.print(f"{len(trials)} trials{ended}, {concurrent} at a time", highlight=False)
    tuning.run_trials(trials, course, experiment.search, folder, parent=parent, concurrent=concurrent, verbose=verbose)


def _open_parent(experiment: Experiment, trials: Sequence[Trial], uri: str) -> str:
    """The search's run in MLflow, a new one or that of an earlier driver."""
    parent = searches.open_search(
        uri,
        experiment.where.project,
        experiment.name,
        search_identity(experiment),
        params={key: str(value) for key, value in flatten(experiment).items() if key.startswith("search.")},
        note=note(experiment, len(trials)),
    )
    tracking.log_text(uri, parent, resolved_yaml(experiment))
    return parent


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
    for trial in trials:
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
        values = {} if trial.in_mlflow else trial.values
        searches.end_trial(uri, run_id, trial.outcome, mlflow_status, values, trial.error)
        course.settle(trial)


def _open_run(experiment: Experiment, uri: str, parent: str) -> str:
    """The MLflow run of a trial that failed before it had one."""
    params = {key: str(value) for key, value in flatten(experiment).items()}
    tags = {searches.PARENT_TAG: parent}
    return tracking.open_run(uri, experiment.where.project, experiment.name, identity(experiment), params, tags)


def _send_rest(run: runs.Run) -> None:
    """Send the metrics that the last checkpoint holds and that the tracking server had not acknowledged."""
    from mimiclab import checkpoint
    from mimiclab.tracking.protocol import Row
    from mimiclab.tracking.writer import MlflowTracker

    newest = checkpoint.latest(run.checkpoints, warn=lambda _: None, deep=False)
    if newest is not None and newest.meta["unsent"]:
        rows = [Row(*row) for row in newest.meta["unsent"]]
        MlflowTracker(run.tracking, run.mlflow_run_id, rows).close(_SEND_TIMEOUT_S)


def _conclude(
    experiment: Experiment,
    ranking: Sequence[Trial],
    uri: str,
    parent: str,
    status: searches.Status,
    folder: Storage,
    console: Console,
) -> None:
    """Show and record what the search found so far."""
    from mimiclab.tracking.ui import place_of

    config = experiment.search
    assert config is not None
    best = ranking[0].best(config.mode)
    found = (ranking[0].name, config.metric, best[1]) if best else None
    searches.end_search(uri, parent, status, found, note(experiment, len(ranking), ranking))
    console.print(ranking_table(ranking, config, f"{experiment.name}, the best first"))
    for trial in ranking:
        if trial.error is not None:
            console.print(f"{trial.name} {trial.outcome}: {trial.error}", highlight=False, markup=False)
    if best is not None:
        text = best_experiment(experiment, ranking[0], len(ranking))
        _write(folder, BEST, text)
        tracking.log_text(uri, parent, text, BEST)
        console.print(f"best:     {_how_to_train(folder)}", highlight=False)
    console.print(f"MLflow:   {place_of(uri, parent)}", highlight=False)
