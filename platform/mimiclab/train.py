"""The driver of a training run: everything is checked first, then Ray Train's workers do the work.

Imports stay light here: Ray ships `_loop` to its controller by this module's name.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from mimicdet.config import is_published_name
from mimiclab import runs
from mimiclab.errors import UserError
from mimiclab.experiment import flatten, identity, resolved_yaml
from mimiclab.progress import ProgressReader, ProgressView
from mimiclab.runs import Run
from mimiclab.schema import DataConfig, Experiment
from mimiclab.session import ray_session, resources_per_worker
from mimiclab.tracking import runs as tracking

if TYPE_CHECKING:
    from ray.train import UserCallback

    from mimiclab.data.splits import Splits

# Sets of up to so many images are decoded before workers start, which takes seconds; in larger ones a damaged
# image stops the run where it is met.
DECODE_AHEAD = 2000

# What is wrong with a data set is named up to so many times for each of its splits.
MAX_NOTES = 20

_POLL_S = 0.3
_SEND_TIMEOUT_S = 60.0
# Ray's own record of a fit; nothing is resumed from it.
_RAY_FOLDER = "ray"
# In the storage folder; not the name of a run, which begins with a letter or a digit.
_DATA_FOLDER = ".data"


def train(
    experiment: Experiment,
    *,
    console: Console,
    address: str | None = None,
    fresh: bool = False,
    verbose: bool = False,
    tags: Mapping[str, str] | None = None,
    callbacks: Sequence[UserCallback] = (),
    splits: Splits | None = None,
) -> Run:
    """Train an experiment to its end, from its last checkpoint where it was begun before.

    Args:
        experiment: what to train.
        console: gets what a person wants to know.
        address: of a Ray cluster; see `ray_session`.
        fresh: remove an earlier run of this name first.
        verbose: let Ray talk.
        tags: more tags of the MLflow run, as the parent that it is shown under.
        callbacks: of Ray Train; they hear of every evaluation.
        splits: what `check` gave for this experiment, or for one that differs in name and seed only.

    Raises:
        UserError: anything that the user can mend, found before a worker starts wherever possible.
        KeyboardInterrupt: the run is recorded as killed; the same command goes on from its last checkpoint.
    """
    from mimiclab.data.coco import content_hash

    if splits is None:
        splits = check(experiment, console, fresh=fresh)
    uri = tracking.absolute_uri(experiment.where.tracking)
    runs.check(experiment, fresh=fresh)
    before = None if fresh else complete(experiment, splits)
    if before is not None:
        _send_rest(before)
        console.print(f"run {experiment.name} is complete already; --fresh starts it anew", highlight=False)
        return before

    located = _located(experiment)
    with ray_session(address, experiment.scale, verbose=verbose):
        # Before an earlier run is removed: packing reads every image.
        data = _packed(located, splits, console)
        # Nothing is made or removed before the cluster has answered and is large enough.
        folder = runs.prepare(experiment, fresh=fresh)
        if fresh:
            tracking.forget_run(uri, experiment.where.project, experiment.name, identity(experiment))
        mlflow_run_id = tracking.open_run(
            uri,
            experiment.where.project,
            experiment.name,
            identity(experiment),
            params={key: str(value) for key, value in flatten(experiment).items()},
            tags={"mimiclab.classes": ", ".join(splits.train.classes), **(tags or {})},
        )
        run = Run(folder, identity(experiment), uri, mlflow_run_id, splits.train.classes, "running")
        status: runs.Status = "failed"
        try:
            run.write()
            tracking.log_text(uri, mlflow_run_id, resolved_yaml(experiment))
            for context, split in (("train", splits.train), ("val", splits.val)):
                name = split.annotations.stem
                tracking.log_dataset_input(uri, mlflow_run_id, name, content_hash(split), split.origin, context)
            job = {
                "experiment": located.model_dump_json(),
                "data": data.model_dump_json(),
                "folder": str(folder),
                "tracking": uri,
                "mlflow_run_id": mlflow_run_id,
            }
            _fit(job, experiment, run, console, callbacks)
            status = "finished"
        except KeyboardInterrupt:
            status = "killed"
            console.print("stopped; the same command goes on from the last checkpoint")
            raise
        finally:
            run = run.with_status(status)
            tracking.end_run(uri, mlflow_run_id, _MLFLOW_STATUS[status])
    return run


def check(experiment: Experiment, console: Console, *, fresh: bool = False) -> Splits:
    """Look for mistakes in what an experiment names, its tracking, data and weights, and say what data there is.

    A run that has a checkpoint, and is not to start anew, does not need the weights that it once started from.

    Raises:
        UserError: one was found.
    """
    from mimiclab import checkpoint
    from mimiclab.build import build_detector
    from mimiclab.data.columns import ImageFiles
    from mimiclab.data.dataset import check_images
    from mimiclab.data.splits import read_splits

    tracking.check_tracking(experiment.where.tracking)
    located = _located(experiment)
    splits = read_splits(located.data)
    _announce(splits, console)
    for split in (splits.train, splits.val):
        # Those of a packed set were decoded when it was packed.
        if isinstance(split.source, ImageFiles) and len(split.images) <= DECODE_AHEAD:
            check_images(split)
    # Built once here, so that weights that do not fit are found before workers start.
    newest = checkpoint.latest(runs.folder_of(experiment) / runs.CHECKPOINTS, warn=lambda _: None)
    build_detector(
        located.model,
        splits.train.classes,
        pretrained=fresh or newest is None,
        say=lambda text: console.print(f"weights: {text}", highlight=False, markup=False),
    )
    return splits


def complete(experiment: Experiment, splits: Splits) -> Run | None:
    """The run of an experiment if it was trained to its end, else None."""
    from mimiclab import checkpoint

    run = runs.read(runs.folder_of(experiment))
    if run is None or run.status != "finished":
        return None
    newest = checkpoint.latest(run.checkpoints, warn=lambda _: None)
    return run if newest is not None and newest.step >= num_steps(experiment, splits) else None


def num_steps(experiment: Experiment, splits: Splits) -> int:
    """How many training steps an experiment takes on its data."""
    from mimiclab.data.order import training_order

    return training_order(splits.train, experiment).num_steps(experiment.optim.epochs)


_MLFLOW_STATUS: Mapping[runs.Status, Any] = {"finished": "FINISHED", "failed": "FAILED", "killed": "KILLED"}


def _loop(job: Mapping[str, Any]) -> None:
    # Loaded here: torch, torchvision and MLflow are for the workers, not for Ray's controller.
    from mimiclab.worker import Job, work

    work(Job(**job))


def _fit(
    job: dict[str, Any], experiment: Experiment, run: Run, console: Console, callbacks: Sequence[UserCallback]
) -> None:
    """Run Ray Train in a thread and show its progress here, where Ctrl-C arrives."""
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    shutil.rmtree(run.folder / _RAY_FOLDER, ignore_errors=True)
    trainer = TorchTrainer(
        _loop,
        train_loop_config=job,
        scaling_config=ScalingConfig(
            num_workers=experiment.scale.workers,
            use_gpu=experiment.scale.gpu,
            resources_per_worker=resources_per_worker(experiment.scale),
        ),
        run_config=RunConfig(
            name=_RAY_FOLDER,
            storage_path=str(run.folder),
            callbacks=list(callbacks),
            failure_config=FailureConfig(max_failures=0),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    failure: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            failure.append(error)

    reader = ProgressReader(run.progress)
    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    with ProgressView(console) as view:
        console.print(f"starting {experiment.scale.workers} workers")
        thread.start()
        while thread.is_alive():
            thread.join(_POLL_S)
            for event in reader.new_events():
                view.show(event)
    if failure:
        raise _cause(failure[0])


def _cause(error: BaseException) -> BaseException:
    """What went wrong, out of Ray's wrapping: a user's mistake on one rank breaks the others' collectives."""
    failures = getattr(error, "worker_failures", {}).values()
    for failure in failures:
        while failure is not None:
            if isinstance(failure, UserError):
                return failure
            failure = failure.__cause__
    return error


def _send_rest(run: Run) -> None:
    """Send the metric values that the tracking server did not take when the run ended."""
    from mimiclab.tracking.protocol import Row
    from mimiclab.tracking.writer import MlflowTracker

    file = run.folder / runs.UNSENT
    if file.exists():
        rows = [Row(*row) for row in json.loads(file.read_text())]
        if not MlflowTracker(run.tracking, run.mlflow_run_id, rows).close(_SEND_TIMEOUT_S):
            file.unlink()


def _located(experiment: Experiment) -> Experiment:
    """The same experiment for a process in any folder of this machine: its data exists, its paths are absolute."""
    from mimiclab.data.splits import locate

    def absolute(path: str | None) -> str | None:
        return path if path is None or is_published_name(path) else str(Path(path).absolute())

    model = experiment.model
    backbone = replace(model.backbone, weights=absolute(model.backbone.weights))
    return experiment.model_copy(
        update={
            "data": locate(experiment.data),
            "model": replace(model, weights=absolute(model.weights), backbone=backbone),
        }
    )


def _packed(located: Experiment, splits: Splits, console: Console) -> DataConfig:
    """The data as workers read it: plain files packed once, next to the runs, where every worker sees them."""
    from mimiclab.data.splits import pack_splits

    folder = runs.folder_of(located).parent / _DATA_FOLDER
    return pack_splits(located.data, splits, folder, lambda text: console.print(text, highlight=False))


def _announce(splits: Splits, console: Console) -> None:
    for name, split in (("train", splits.train), ("val", splits.val)):
        console.print(f"{name}: {len(split.images)} images, {len(split.columns.labels)} boxes", highlight=False)
        lines = [*(f"left out: {text}" for text in split.left_out), *split.notes]
        for text in lines[:MAX_NOTES]:
            console.print(f"  {text}", highlight=False)
        if len(lines) > MAX_NOTES:
            console.print(f"  and {len(lines) - MAX_NOTES} more", highlight=False)
    console.print(f"classes: {', '.join(splits.train.classes)}", highlight=False)
