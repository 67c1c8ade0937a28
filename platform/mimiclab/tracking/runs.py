"""One MLflow run per logical run, found again after every restart."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mimiclab.errors import UserError
from mimiclab.tracking import address
from mimiclab.tracking.address import absolute_uri, artifact_folder, sqlite_path
from mimiclab.tracking.client import connect, explained

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

__all__ = [
    "absolute_uri",
    "check_tracking",
    "end_run",
    "forget_run",
    "log_dataset_input",
    "log_file",
    "log_text",
    "open_run",
    "set_tags",
    "started",
    "unfinished_since",
]

NAME_TAG = "mimiclab.run"
IDENTITY_TAG = "mimiclab.identity"
FORGOTTEN_TAG = "mimiclab.forgotten"

NOT_COMPARED = ("name", "where.", "scale.", "checkpoint.", "data.loader_processes", "data.cache")
"""Beginnings of keys that say who, where and how fast rather than what was trained. They may change while a run goes
on, which a parameter in MLflow may not: the experiment that is stored with the run has them as they were last."""

# MLflow's limits.
_MAX_PARAM_LENGTH = 6000
_MAX_TAG_LENGTH = 8000
_MAX_DIGEST_LENGTH = 36


@explained
def check_tracking(uri: str) -> None:
    """Make sure that this user can track runs at this address; a store that is there is opened, none is made.

    Raises:
        UserError: See `mimiclab.tracking.address.check_tracking`; or another version of MLflow made the store, or a
            server does not know the user.
    """
    address.check_tracking(uri)
    path = sqlite_path(uri)
    if path is None or (path.exists() and path.stat().st_size):
        connect(uri).search_experiments(max_results=1)


@explained
def open_run(
    uri: str, project: str, name: str, identity: str, params: Mapping[str, str], tags: Mapping[str, str]
) -> str:
    """Find the run with this name and identity, or start it, and mark it as running.

    Calling it again with the same name and identity returns the same run, the newest if there are several.

    Args:
        uri: The tracking store.
        project: The MLflow experiment that holds the run; made if missing.
        name: The run's name, also shown by MLflow.
        identity: The hash of what the run computes.
        params: The resolved experiment as flat dotted keys; of them, MLflow gets those that say what is trained.
            Values are cut at 6,000 characters. MLflow lets no parameter change, so a reopened run keeps what it has
            and gets only what it lacks.
        tags: More tags of the run, cut at 8,000 characters; a reopened run's are overwritten.

    Returns:
        MLflow's id of the run.

    Raises:
        UserError: The project was deleted in MLflow, or see `mimiclab.tracking.client.refusals_explained`.
    """
    client = connect(uri)
    from mlflow.entities import Param, RunTag

    # MLflow's client leaves those of a new run as they are, which PostgreSQL refuses.
    tags = {key: value[:_MAX_TAG_LENGTH] for key, value in tags.items()}
    experiment_id = _open_project(client, uri, project)
    run = _find_run(client, experiment_id, name, identity)
    if run is None:
        identified = {**tags, NAME_TAG: name, IDENTITY_TAG: identity}
        run = client.create_run(experiment_id, run_name=name, tags=identified)
    else:
        client.log_batch(run.info.run_id, tags=[RunTag(*tag) for tag in tags.items()], synchronous=True)
        client.update_run(run.info.run_id, status="RUNNING")

    run_id = str(run.info.run_id)
    shown = {key: value[:_MAX_PARAM_LENGTH] for key, value in params.items() if _says_what(key)}
    missing = [Param(key, value) for key, value in shown.items() if key not in run.data.params]
    client.log_batch(run_id, params=missing, synchronous=True)
    return run_id


@explained
def forget_run(uri: str, project: str, name: str, identity: str) -> None:
    """Make the next `open_run` start anew. What was recorded stays, tagged as forgotten."""
    client = connect(uri)
    experiment = client.get_experiment_by_name(project)
    while experiment and (run := _find_run(client, experiment.experiment_id, name, identity)):
        client.set_tag(run.info.run_id, FORGOTTEN_TAG, identity)
        client.delete_tag(run.info.run_id, IDENTITY_TAG)


def end_run(
    uri: str, run_id: str, status: Literal["FINISHED", "FAILED", "KILLED"], end_time: float | None = None
) -> None:
    """Mark a run as over. Its history can still be written to, and `open_run` takes it up again.

    Args:
        uri: The tracking store.
        run_id: MLflow's id of the run.
        status: How it ended.
        end_time: When, in seconds since 1970; now if None.
    """
    end_time_ms = None if end_time is None else int(end_time * 1000)
    connect(uri).set_terminated(run_id, status=status, end_time=end_time_ms)


def unfinished_since(uri: str, run_id: str) -> float | None:
    """When a run that is marked as running last recorded something, in seconds since 1970.

    Returns:
        None if it is over, or if the store does not have it (any more).
    """
    path = sqlite_path(uri)
    if path is not None and not path.exists():  # it would be made
        return None
    client = connect(uri)
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    if run.info.status != "RUNNING" or run.info.lifecycle_stage != "active":
        return None
    times = [metric.timestamp for metric in run.to_proto().data.metrics]
    return float(max([run.info.start_time, *times])) / 1000


def started(uri: str, run_id: str) -> float:
    """When a run was first opened, in seconds since 1970."""
    return float(connect(uri).get_run(run_id).info.start_time) / 1000


def set_tags(uri: str, run_id: str, tags: Mapping[str, str]) -> None:
    """Set tags of a run, cut at 8,000 characters, in place of earlier ones of those names."""
    client = connect(uri)
    from mlflow.entities import RunTag

    cut = [RunTag(key, value[:_MAX_TAG_LENGTH]) for key, value in tags.items()]
    client.log_batch(run_id, tags=cut, synchronous=True)


@explained
def log_dataset_input(uri: str, run_id: str, name: str, digest: str, source: str, context: str) -> None:
    """Name a data set that the run reads; the same one again changes nothing.

    Args:
        uri: The tracking store.
        run_id: MLflow's id of the run.
        name: What users call the data set.
        digest: The hash of its content; MLflow keeps 36 characters.
        source: Where it lies.
        context: What it is used for: "train" or "val".
    """
    client = connect(uri)
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.exceptions import MlflowException

    dataset = Dataset(name, digest[:_MAX_DIGEST_LENGTH], "local", json.dumps({"uri": source}))
    inputs = [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])]
    try:
        client.log_inputs(run_id, inputs)
    except MlflowException:
        # MLflow looks whether it knows the data set, then adds it: of runs that start at once, all but one are refused,
        # and find it there the next time.
        client.log_inputs(run_id, inputs)


@explained
def log_text(uri: str, run_id: str, text: str, file: str = "experiment.yaml") -> None:
    """Store a text as an artifact of the run, in place of an earlier one of that name."""
    connect(uri).log_text(run_id, text, file)


@explained
def log_file(uri: str, run_id: str, file: Path, folder: str) -> None:
    """Store a file in a folder of the run's artifacts, in place of an earlier one of that name."""
    connect(uri).log_artifact(run_id, str(file), folder)


def _says_what(key: str) -> bool:
    return not key.startswith(NOT_COMPARED) and key != "search"  # which a search's own run has keys of, all others null


def _open_project(client: "MlflowClient", uri: str, project: str) -> str:
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(project)
    if experiment is None:
        database = sqlite_path(uri)
        try:
            # A server decides where its artifacts go. The default of a sqlite store is a relative path,
            # which every worker would take to be in another folder.
            folder = None if database is None else artifact_folder(database).as_uri()
            return str(client.create_experiment(project, artifact_location=folder))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(project)  # another process was faster
    if experiment.lifecycle_stage == "deleted":
        raise UserError(
            f"where.tracking: {uri}: the MLflow experiment {project!r} was deleted; "
            "expected it to be restored (mlflow experiments restore) or another name"
        )
    return str(experiment.experiment_id)


def _find_run(client: "MlflowClient", experiment_id: str, name: str, identity: str) -> "Run | None":
    # Names are compared here and not in the query: they may hold quotes, which its language cannot express.
    found = client.search_runs([experiment_id], f"tags.`{IDENTITY_TAG}` = '{identity}'")
    return next((run for run in found if run.data.tags.get(NAME_TAG) == name), None)
