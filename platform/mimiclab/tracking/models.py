"""Models in MLflow: the detector of a run as it is deployed, registered under a name, and fetched again.

A model is made of files that run nothing when they are read, weights as safetensors and what they are as JSON, and
of the source that answers requests: `served.py` and `mimicdet`. MLflow runs that source where a model is served; who
fetches a model with `load` reads the two files of data only.
"""

import contextlib
import hashlib
import json
import logging
import re
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from mimiclab.errors import UserError
from mimiclab.runs import Run
from mimiclab.tracking.address import check_tracking, sqlite_path
from mimiclab.tracking.client import connect, refusals_explained

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities import Run as MlflowRun
    from mlflow.entities.model_registry import ModelVersion

    from mimiclab.deployed import Deployed

SCHEME = "models:/"
WEIGHTS_TAG = "mimiclab.weights"
"""Of a model: the SHA-256 of its weights, by which it is known again."""
RUN_TAG = "mimiclab.run"
"""Of a model: the name of its run."""
MODEL_TAG = "mimiclab.model"
"""Of a registered version: MLflow's id of its model, which not every store keeps by itself."""

# What `served.py` imports, and MLflow, which runs it.
_PACKAGES = ("mlflow", "torch", "torchvision", "safetensors", "numpy", "pandas", "pillow", "pydantic")
_NAME = re.compile(r"\w[\w .-]*")
_ALIAS = re.compile(r"(?!latest$|v\d+$)[\w-]+", re.IGNORECASE)
_REFERENCE = re.compile(r"models:/([^/:@]+)(?:@([\w-]+)|/([0-9]+))")
# The deployed head's, of all classes together.
_METRIC = re.compile(r"student/\w+")


class Version(NamedTuple):
    """A version of a registered model.

    Attributes:
        name: Of the registered model.
        number: From 1.
        aliases: That point to it.
        run: Name of the run that it came from; empty where MimicLab did not make it.
        ap: student/AP on that run's validation set, where it is known.
    """

    name: str
    number: int
    aliases: tuple[str, ...]
    run: str
    ap: float | None


def log_model(run: Run) -> str:
    """Log a run's best weights as a model of the run, with their metrics; the same weights are logged once.

    Returns:
        MLflow's id of the model.

    Raises:
        UserError: The run has no sound checkpoint, or was deleted in MLflow.
    """
    best = run.best()
    client = connect(run.tracking)
    from mlflow.entities import LoggedModelOutput

    from mimiclab.checkpoint import WEIGHTS
    from mimiclab.deployed import describe

    record = _record_of(client, run)
    digest = best.hashes[WEIGHTS]
    model = _logged(client, record, digest)
    if model is not None and model.status == "READY":
        return str(model.model_id)
    config = describe(run)
    if model is None:
        model = client.create_logged_model(
            record.info.experiment_id,
            name=re.sub(r"[/:.%\"']", "_", run.name),  # what MLflow takes
            source_run_id=run.mlflow_run_id,
            tags={WEIGHTS_TAG: digest, RUN_TAG: run.name},
            params={
                "step": str(best.step),
                "detector": config["model"]["detector"],
                "backbone": config["model"]["backbone"]["name"],
                "classes": str(len(run.classes)),
            },
            model_type="detector",
        )
    # It is ready when it is whole: until then the next attempt goes on with it.
    with TemporaryDirectory(prefix="mimiclab-") as folder:
        best.write_weights(Path(folder) / WEIGHTS)
        client.log_model_artifacts(model.model_id, str(_saved(Path(folder), config, model)))
    outputs = record.outputs.model_outputs if record.outputs else []
    if model.model_id not in [output.model_id for output in outputs]:
        client.log_outputs(run.mlflow_run_id, [LoggedModelOutput(model.model_id, best.step)])
    _link_metrics(client, record, best.step, model.model_id)
    client.finalize_logged_model(model.model_id, "READY")
    return str(model.model_id)


def register(run: Run, alias: str, name: str | None = None) -> Version:
    """Make a run's model a version of a registered model, unless it is one, and point an alias to it.

    Args:
        run: Its best weights are meant; see `log_model`.
        alias: Moves here from the version that has it.
        name: Of the registered model; by default the project, as MLflow's experiment is called.

    Raises:
        UserError: See `log_model`; or there is no such store, or no such name or alias is possible.
    """
    name = name or run.experiment().where.project
    if not _NAME.fullmatch(name):
        raise UserError(
            f"--name {name!r}: expected letters, digits, spaces and any of '_-.', as {SCHEME} names a model"
        )
    if not _ALIAS.fullmatch(alias):
        raise UserError(
            f"--alias {alias!r}: expected letters, digits, '_' and '-', and neither 'latest' nor a version as 'v3', "
            "which MLflow keeps for itself"
        )
    client = _open(run.tracking)
    with refusals_explained(run.tracking):
        number = _registered(client, run, log_model(run), name)
        client.set_registered_model_alias(name, alias, number)
    return next(each for each in registered(run.tracking) if (each.name, each.number) == (name, number))


def registered(uri: str) -> list[Version]:
    """Every version of every registered model, by name, the newest first.

    Raises:
        UserError: The store does not answer.
    """
    client = _open(uri)
    with refusals_explained(uri):
        # Of the model: a search for versions leaves their aliases out.
        aliases = {model.name: model.aliases for model in _pages(client.search_registered_models)}
        found = []
        for each in _pages(client.search_model_versions):
            number = int(each.version)
            own = sorted(alias for alias, pointed in aliases.get(each.name, {}).items() if int(pointed) == number)
            model = _model_of(client, each)
            metrics = {metric.key: metric.value for metric in model.metrics or ()} if model else {}
            run = model.tags[RUN_TAG] if model else ""
            found.append(Version(each.name, number, tuple(own), run, metrics.get("student/AP")))
    return sorted(found, key=lambda each: (each.name, -each.number))


def load(uri: str, reference: str) -> "Deployed":
    """Fetch a registered model of MimicLab's; nothing that it holds is run.

    Args:
        uri: The tracking store.
        reference: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

    Raises:
        UserError: The store does not answer, there is no such model, alias or version, it is another program's, or
            its files are gone, damaged or of another MimicLab.
    """
    parts = _REFERENCE.fullmatch(reference)
    if parts is None:
        raise UserError(f"{reference}: expected {SCHEME}NAME@ALIAS or {SCHEME}NAME/VERSION")
    client = _open(uri)
    import mlflow.artifacts
    from mlflow.exceptions import MlflowException

    from mimiclab import deployed
    from mimiclab.checkpoint import WEIGHTS

    with refusals_explained(uri):
        found = _version(client, uri, reference, *parts.groups())
        model = _model_of(client, found)
    if model is None:
        raise UserError(
            f"{reference}: version {found.version} of {found.name} is not MimicLab's; expected one that "
            "`mimiclab models register` made"
        )
    with TemporaryDirectory(prefix="mimiclab-") as folder:
        artifacts = f"{model.artifact_location}/artifacts"
        try:
            place = mlflow.artifacts.download_artifacts(artifacts, dst_path=folder, tracking_uri=client.tracking_uri)
            weights = (Path(place) / WEIGHTS).read_bytes()
        except (MlflowException, OSError) as error:
            raise UserError(f"{reference}: its files cannot be fetched from {artifacts}: {_line(error)}") from error
        if hashlib.sha256(weights).hexdigest() != model.tags[WEIGHTS_TAG]:
            raise UserError(f"{reference}: {artifacts}/{WEIGHTS} is damaged: it is not what was logged")
        del weights
        try:
            return deployed.read(Path(place))
        except UserError as error:
            raise UserError(f"{reference}: {error}") from error


def _open(uri: str) -> "MlflowClient":
    """A client of a store that exists: a sqlite file that is missing would be made."""
    check_tracking(uri)
    database = sqlite_path(uri)
    if database is not None and not database.exists():
        raise UserError(f"where.tracking: {uri}: there is no file {database}; expected one with runs in it")
    return connect(uri)


def _record_of(client: "MlflowClient", run: Run) -> "MlflowRun":
    """What MLflow has of a run."""
    from mlflow.exceptions import MlflowException

    try:
        record = client.get_run(run.mlflow_run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise UserError(
            f"run {run.name}: {run.tracking} has no run {run.mlflow_run_id} any more; expected the store that it was "
            "tracked in"
        ) from error
    if record.info.lifecycle_stage != "active":
        raise UserError(
            f"run {run.name}: it was deleted in {run.tracking}; expected it to be restored "
            f"(mlflow runs restore --run-id {run.mlflow_run_id})"
        )
    return record


def _logged(client: "MlflowClient", record: "MlflowRun", digest: str) -> "LoggedModel | None":
    """The model of these weights that a run has, whole or begun."""
    found = client.search_logged_models(
        [record.info.experiment_id],
        filter_string=f"source_run_id = '{record.info.run_id}' AND tags.`{WEIGHTS_TAG}` = '{digest}'",
    )
    return min(found, key=lambda model: model.status != "READY", default=None)


def _saved(folder: Path, config: Mapping[str, Any], model: "LoggedModel") -> Path:
    """Write a model in MLflow's form, of the weights that are in the folder; a folder in this one."""
    import mlflow.pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array

    import mimicdet
    from mimiclab.checkpoint import WEIGHTS
    from mimiclab.deployed import CONFIG

    (folder / CONFIG).write_text(json.dumps(config, indent=1))
    signature = ModelSignature(
        inputs=Schema([ColSpec(DataType.string, "image")]),
        outputs=Schema(
            [
                ColSpec(Array(Array(DataType.double)), "boxes"),
                ColSpec(Array(DataType.double), "scores"),
                ColSpec(Array(DataType.string), "labels"),
            ]
        ),
        params=ParamSchema([ParamSpec("min_score", DataType.double, config["min_score"])]),
    )
    with _quiet():
        mlflow.pyfunc.save_model(
            folder / "model",
            python_model=str(Path(__file__).with_name("served.py")),
            artifacts={"config": str(folder / CONFIG), "weights": str(folder / WEIGHTS)},
            code_paths=[str(Path(mimicdet.__file__).parent)],
            signature=signature,
            input_example=[{"image": _example()}],
            pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in _PACKAGES],
            mlflow_model=Model(
                artifact_path=model.artifact_location,
                model_uuid=model.model_id,
                run_id=model.source_run_id,
                model_id=model.model_id,
            ),
        )
    return folder / "model"


def _example() -> str:
    """A small image, as a request has it."""
    from PIL import Image

    encoded = BytesIO()
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(encoded, "PNG")
    return b64encode(encoded.getvalue()).decode()


def _link_metrics(client: "MlflowClient", record: "MlflowRun", step: int, model_id: str) -> None:
    """Show the run's metrics of a step as the model's, on the data set that they were measured on.

    They are the run's own rows, time and all: MLflow writes them to the run again, where they are the same.
    """
    from mlflow.entities import Metric

    data = [
        each.dataset
        for each in record.inputs.dataset_inputs
        if ("mlflow.data.context", "val") in [(tag.key, tag.value) for tag in each.tags]
    ]
    name, digest = (data[0].name, data[0].digest) if data else (None, None)
    rows = [
        Metric(row.key, row.value, row.timestamp, row.step, model_id, name, digest, record.info.run_id)
        for key in record.data.metrics
        if _METRIC.fullmatch(key)
        for row in client.get_metric_history(record.info.run_id, key)
        if row.step == step
    ]
    client.log_batch(record.info.run_id, metrics=rows, synchronous=True)


def _registered(client: "MlflowClient", run: Run, model_id: str, name: str) -> int:
    """The version of a registered model that this model is, made unless it is there."""
    from mlflow.exceptions import MlflowException

    versions = _pages(client.search_model_versions, filter_string=f"run_id = '{run.mlflow_run_id}'")
    known = next((each for each in versions if each.name == name and each.tags.get(MODEL_TAG) == model_id), None)
    if known is None:
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        model = client.get_logged_model(model_id)
        known = client.create_model_version(
            # By its place, not as models:/ID: that is looked for in the store of the environment, whatever this one is.
            name,
            model.artifact_location,
            run.mlflow_run_id,
            tags={MODEL_TAG: model_id},
            model_id=model_id,
        )
        _show_version(client, model, known)
    return int(known.version)


def _show_version(client: "MlflowClient", model: "LoggedModel", found: "ModelVersion") -> None:
    """Have the model's page lead to its registered version, as a server does by itself."""
    from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

    shown = {"name": found.name, "version": int(found.version)}
    others = json.loads(client.get_logged_model(model.model_id).tags.get(MLFLOW_MODEL_VERSIONS, "[]"))
    if shown not in others:
        client.set_logged_model_tags(model.model_id, {MLFLOW_MODEL_VERSIONS: json.dumps([*others, shown])})


def _version(
    client: "MlflowClient", uri: str, reference: str, name: str, alias: str | None, number: str | None
) -> "ModelVersion":
    from mlflow.exceptions import MlflowException

    try:
        if alias is not None:
            return client.get_model_version_by_alias(name, alias)
        return client.get_model_version(name, number)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
    models = {model.name: model.aliases for model in _pages(client.search_registered_models)}
    if name not in models:
        raise UserError(f"{reference}: no model {name} is registered in {uri}; found {', '.join(models) or 'none'}")
    if alias is not None:
        raise UserError(f"{reference}: {name} has no alias {alias}; found {', '.join(models[name]) or 'none'}")
    newest = max((each.number for each in registered(uri) if each.name == name), default=0)
    raise UserError(f"{reference}: {name} has no version {number}; the newest is {newest}")


def _model_of(client: "MlflowClient", found: "ModelVersion") -> "LoggedModel | None":
    """The model of a registered version; None where MimicLab did not make it, or it was deleted since."""
    from mlflow.exceptions import MlflowException

    if MODEL_TAG not in found.tags:
        return None
    try:
        model = client.get_logged_model(found.tags[MODEL_TAG])
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return model if {WEIGHTS_TAG, RUN_TAG} <= model.tags.keys() else None


def _pages(search: Callable[..., Any], **query: Any) -> Iterator[Any]:
    """Everything that a search finds."""
    token = None
    while True:
        page = search(page_token=token, **query)
        yield from page
        token = page.token
        if not token:
            return


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what MLflow says about every model that is saved."""
    logger = logging.getLogger("mlflow")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
