"""A search from start to end: everything is checked first, then the trials run, then what they found is written.

<storage>/<search>/
    search.yaml       the resolved experiment with its search
    best.yaml         the best trial's experiment, for `mimiclab train`
    tune/             Ray Tune's own record
<storage>/<search>-trial-00/ ...
                      a run for each trial, see runs.py
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from mimiclab import runs
from mimiclab.errors import UserError
from mimiclab.experiment import LoadedExperiment, flatten, identity, resolved_yaml
from mimiclab.schema import Experiment
from mimiclab.search.results import best_experiment, note, ranking_table
from mimiclab.search.trials import Outcome, Trial, plan, ranked
from mimiclab.session import ray_session, resources_per_worker
from mimiclab.storage import Storage
from mimiclab.tracking import runs as tracking
from mimiclab.tracking import searches

SEARCH, BEST, TUNE = "search.yaml", "best.yaml", "tune"

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
        KeyboardInterrupt: the search and its running trials are recorded as killed.
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
    if not fresh:
        _refuse_earlier(experiment, trials, folder)

    parent = None
    status: searches.Status = "FAILED"
    try:
        with ray_session(address, experiment.scale, verbose=verbose, state_api=True):
            import ray

            from mimiclab.search import tuning

            if fresh:
                _remove(experiment, trials, folder, uri)
            _write(folder, SEARCH, resolved_yaml(experiment))
            parent = searches.open_search(
                uri,
                experiment.where.project,
                experiment.name,
                _identity(experiment),
                params={key: str(value) for key, value in flatten(experiment).items() if key.startswith("search.")},
                note=note(experiment),
            )
            tracking.log_text(uri, parent, resolved_yaml(experiment))
            concurrent = num_concurrent(experiment, ray.cluster_resources())
            console.print(f"{config.trials} trials, {concurrent} at a time", highlight=False)
            tuning.run_trials(trials, config, folder, console, parent=parent, concurrent=concurrent, verbose=verbose)
        status = "FAILED" if all(trial.outcome == "failed" for trial in trials) else "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        console.print("stopped; --fresh starts the search anew")
        raise
    finally:
        # Only now, when no trial's process is left that could write another status.
        if parent is not None:
            _settle(trials, uri, parent)
            _conclude(experiment, ranked(trials, config.mode), uri, parent, status, folder, console)
    if status == "FAILED":
        raise UserError(
            f"search {experiment.name}: every trial failed; their tracebacks are in {folder.name}/{TUNE}/*/error.txt"
        )
    return ranked(trials, config.mode)


def num_concurrent(experiment: Experiment, found: Mapping[str, float]) -> int:
    """How many trials run at a time on a cluster of these resources; Ray knows of one trial's needs at a time only."""
    config, scale = experiment.search, experiment.scale
    assert config is not None
    needed = resources_per_worker(scale)
    fitting = min(int(found.get(kind, 0) // (scale.workers.max * each)) for kind, each in needed.items())
    wanted = config.trials if config.max_concurrent == "auto" else min(config.max_concurrent, config.trials)
    return max(1, min(wanted, fitting))


def _refuse_earlier(experiment: Experiment, trials: Sequence[Trial], folder: Storage) -> None:
    root = runs.root_of(experiment)
    try:
        found = [folder.where(SEARCH)] if SEARCH in folder.sizes() else []
        names = root.folders()
    except UserError as error:
        raise UserError(f"where.storage: {error}") from error
    found += [root.where(trial.experiment.name) for trial in trials if trial.experiment.name in names]
    if found:
        raise UserError(
            f"search {experiment.name}: it was run before, {found[0]} exists; expected another name, "
            "or --fresh, which removes its trials and starts anew"
        )


def _remove(experiment: Experiment, trials: Sequence[Trial], folder: Storage, uri: str) -> None:
    """Remove an earlier search of this name with its trials; what MLflow has of it stays there as history."""
    root = runs.root_of(experiment)
    try:
        folder.delete(BEST)
        folder.delete_folder(TUNE)
        for trial in trials:
            root.delete_folder(trial.experiment.name)
    except UserError as error:
        raise UserError(f"where.storage: {error}") from error
    project = experiment.where.project
    tracking.forget_run(uri, project, experiment.name, _identity(experiment))
    for trial in trials:
        tracking.forget_run(uri, project, trial.experiment.name, identity(trial.experiment))


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


def _identity(experiment: Experiment) -> str:
    """Hash what a search finds: 12 hex digits over what a run is, its epochs, and the search less its size."""
    free = ("search.trials", "search.max_concurrent")
    leaves = {
        key: value
        for key, value in flatten(experiment).items()
        if key.startswith(("search.", "optim.epochs")) and key not in free
    }
    text = json.dumps([identity(experiment), leaves], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _settle(trials: Sequence[Trial], uri: str, parent: str) -> None:
    """Record how each trial ended, since not all could do it themselves: ASHA kills what it prunes."""
    for trial in trials:
        if trial.outcome == "waiting":
            continue
        if trial.outcome == "running":
            trial.outcome = "killed"
        status, mlflow_status = _STATUS[trial.outcome]
        run = runs.read(runs.storage_of(trial.experiment))
        if run is not None and trial.outcome != "finished":
            run = run.with_status(status)
            _send_rest(run)
        run_id = run.mlflow_run_id if run else _open_run(trial.experiment, uri, parent)
        searches.end_trial(uri, run_id, trial.outcome, mlflow_status, trial.values, trial.error)


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
    searches.end_search(uri, parent, status, found, note(experiment, ranking))
    console.print(ranking_table(ranking, config, f"{experiment.name}, the best first"))
    for trial in ranking:
        if trial.error is not None:
            console.print(f"{trial.name} failed: {trial.error}", highlight=False, markup=False)
    if best is not None:
        text = best_experiment(experiment, ranking[0], len(ranking))
        _write(folder, BEST, text)
        tracking.log_text(uri, parent, text, BEST)
        console.print(f"best:     {_how_to_train(folder)}", highlight=False)
    console.print(f"MLflow:   {place_of(uri, parent)}", highlight=False)
