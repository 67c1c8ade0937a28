"""The driver of a training run: everything is checked first, then workers do the work, and here the books are kept."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from mimicdet.config import is_published_name
from mimiclab import runs
from mimiclab.books import Books
from mimiclab.cluster import reach
from mimiclab.cluster.capacity import is_one_machine
from mimiclab.errors import UserError
from mimiclab.experiment import flatten, identity, resolved_yaml
from mimiclab.fit import Fit, fit
from mimiclab.lease import Lease
from mimiclab.ledger import Ledger
from mimiclab.reaper import reap_beside
from mimiclab.runs import Run
from mimiclab.schema import DataConfig, Experiment
from mimiclab.session import ray_session
from mimiclab.storage import MissingError
from mimiclab.tracking import runs as tracking
from mimiclab.tracking.parents import PARENT_TAG

if TYPE_CHECKING:
    from mimiclab.data.splits import Splits

# Sets of up to so many images are decoded before workers start, which takes seconds; in larger ones a damaged
# image stops the run where it is met.
DECODE_AHEAD = 2000

# What is wrong with a data set is named up to so many times for each of its splits.
MAX_NOTES = 20

_SEND_TIMEOUT_S = 60.0
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
    splits: Splits | None = None,
    fit: Fit = fit,
) -> Run:
    """Train an experiment to its end, from its last checkpoint where it was begun before.

    Args:
        experiment: what to train.
        console: gets what a person wants to know.
        address: of a Ray cluster; see `ray_session`.
        fresh: remove an earlier run of this name first.
        verbose: let Ray talk.
        tags: more tags of the MLflow run, as the parent that it is shown under.
        splits: what `check` gave for this experiment, or for one that differs in name and seed only.
        fit: runs the workers; Ray Train does it by default.

    Raises:
        UserError: anything that the user can mend, found before a worker starts wherever possible.
        KeyboardInterrupt: the run is recorded as killed; the same command goes on from its last checkpoint.
    """
    runs.check(experiment, fresh=fresh)
    if splits is None:
        splits = check(experiment, console, fresh=fresh)
    uri = tracking.absolute_uri(experiment.where.tracking)
    before = None if fresh else complete(experiment, splits)
    if before is not None:
        if not before.recorded:
            _conclude(before, Ledger.from_record(before.ledger), console)
        console.print(f"run {experiment.name} is complete already; --fresh starts it anew", highlight=False)
        return before

    with ray_session(address, experiment.scale, verbose=verbose):
        # Before an earlier run is removed: packing reads every image. Nothing is made or removed before the cluster
        # has answered and is large enough.
        located = _located(experiment)
        data = _packed(located, splits, console)
        _check_reach(located.model_copy(update={"data": data}), console, fresh=fresh)
        job = {"experiment": located.model_dump_json(), "data": data.model_dump_json()}
        with Lease.take(runs.storage_of(experiment), experiment.name) as lease:
            if PARENT_TAG not in (tags or {}):  # who starts many runs has done so
                reap_beside(experiment, console)
            run = _open(experiment, splits, uri, console, fresh=fresh, tags=tags or {})
            return _train(run, experiment, job, lease, console, fit)


def _open(
    experiment: Experiment, splits: Splits, uri: str, console: Console, *, fresh: bool, tags: Mapping[str, str]
) -> Run:
    """Make a run, here and in MLflow, or find it again."""
    from mimiclab.data.coco import content_hash

    known = identity(experiment)
    if fresh:  # first: a run that was removed must not be found again
        tracking.forget_run(uri, experiment.where.project, experiment.name, known)
    storage = runs.prepare(experiment, fresh=fresh)
    before = runs.read(storage)
    mlflow_run_id = tracking.open_run(
        uri,
        experiment.where.project,
        experiment.name,
        known,
        params={key: str(value) for key, value in flatten(experiment).items()},
        tags={"mimiclab.classes": ", ".join(splits.train.classes), **tags},
    )
    if before is not None and before.tracking == uri and before.mlflow_run_id != mlflow_run_id:
        console.print(
            f"warning: MLflow's run {before.mlflow_run_id}, which has this run's history so far, was deleted: the rest "
            f"goes to a new one. mlflow runs restore --run-id {before.mlflow_run_id} brings it back",
            highlight=False,
            markup=False,
        )
    ledger = before.ledger if before else {}
    run = Run(storage, known, uri, mlflow_run_id, splits.train.classes, "running", ledger)
    run.write()
    tracking.log_text(uri, mlflow_run_id, resolved_yaml(experiment))
    for context, split in (("train", splits.train), ("val", splits.val)):
        name = split.annotations.stem
        tracking.log_dataset_input(uri, mlflow_run_id, name, content_hash(split), split.origin, context)
    return run


def _train(
    run: Run,
    experiment: Experiment,
    job: Mapping[str, Any],
    lease: Lease,
    console: Console,
    fit: Fit,
) -> Run:
    """Have workers train, keep the books of it, and record how it ended."""
    ledger = Ledger.from_record(run.ledger)
    place = {"folder": run.storage.uri, "tracking": run.tracking, "mlflow_run_id": run.mlflow_run_id}
    status: runs.Status = "failed"
    try:
        with Books(ledger, lease, run, console) as books:
            console.print(f"starting {experiment.scale.workers} workers", highlight=False)
            # Closed before anything is concluded: workers may write until then.
            with contextlib.closing(fit(experiment, {**job, **place}, run.storage)) as events:
                for event in events:
                    books.enter(event)
        status = "finished"
    except KeyboardInterrupt:
        status = "killed"
        console.print("stopped; the same command goes on from the last checkpoint")
        raise
    finally:
        if lease.lost is None:
            run = replace(run, ledger=ledger.to_record(), status=status)
            _conclude(run, ledger, console)
    return run


def check(experiment: Experiment, console: Console, *, fresh: bool = False) -> Splits:
    """Look for mistakes in what an experiment names, its tracking, data and weights, and say what data there is.

    A run that has a checkpoint, and is not to start anew, does not need the weights that it once started from.

    Raises:
        UserError: one was found.
    """
    from mimiclab import checkpoint
    from mimiclab.build import build_detector
    from mimiclab.data.splits import read_splits
    from mimiclab.scoring import check_scorer

    check_scorer(experiment.eval.scorer)
    tracking.check_tracking(experiment.where.tracking)
    located = _located(experiment)
    splits = read_splits(located.data)
    _announce(splits, console)
    decode_ahead(splits)
    # Built once here, so that weights that do not fit are found before workers start.
    newest = checkpoint.latest(runs.storage_of(experiment) / runs.CHECKPOINTS, warn=lambda _: None, deep=False)
    build_detector(
        located.model,
        splits.train.classes,
        pretrained=fresh or newest is None,
        say=lambda text: console.print(f"weights: {text}", highlight=False, markup=False),
    )
    return splits


def decode_ahead(splits: Splits) -> None:
    """Decode every image of small sets, see `DECODE_AHEAD`.

    Raises:
        UserError: one is damaged.
    """
    from mimiclab.data.columns import ImageFiles
    from mimiclab.data.dataset import check_images

    for split in (splits.train, splits.val):
        # Those of a packed set were decoded when it was packed.
        if isinstance(split.source, ImageFiles) and len(split.images) <= DECODE_AHEAD:
            check_images(split)


def _check_reach(located: Experiment, console: Console, *, fresh: bool) -> None:
    """Make sure that nodes see the data, the weights where they are needed, and the storage."""
    if is_one_machine():
        return
    from mimiclab import checkpoint

    newest = checkpoint.latest(runs.storage_of(located) / runs.CHECKPOINTS, warn=lambda _: None, deep=False)
    files = reach.files_of(located, pretrained=fresh or newest is None)
    reach.check(runs.root_of(located), files, located.scale, lambda text: console.print(text, highlight=False))


def complete(experiment: Experiment, splits: Splits) -> Run | None:
    """The run of an experiment if it was trained to its end, else None."""
    from mimiclab import checkpoint

    run = runs.read(runs.storage_of(experiment))
    if run is None or run.status != "finished":
        return None
    newest = checkpoint.latest(run.checkpoints, warn=lambda _: None, deep=False)
    if newest is None:
        return None
    return run if newest.meta.get("stopped") or newest.step >= num_steps(experiment, splits) else None


def num_steps(experiment: Experiment, splits: Splits) -> int:
    """How many training steps an experiment takes on its data."""
    from mimiclab.data.order import training_order

    return training_order(splits.train, experiment).num_steps(experiment.optim.epochs)


def _conclude(run: Run, ledger: Ledger, console: Console) -> None:
    """Write down how the run stands, and tell the tracking server; either may be away just now."""
    from mimiclab.tracking.protocol import Row
    from mimiclab.tracking.writer import MlflowTracker

    def warn(text: str) -> None:
        console.print(f"warning: {text}", highlight=False, markup=False)

    status: Mapping[runs.Status, Any] = {"finished": "FINISHED", "failed": "FAILED", "killed": "KILLED"}
    try:
        run.with_status(run.status)
        rows = ledger.rows()
        with contextlib.suppress(MissingError):
            rows += [Row(*row) for row in json.loads(run.storage.read(runs.UNSENT))]
        tracker = MlflowTracker(run.tracking, run.mlflow_run_id, rows, spool=run.storage / runs.UNSENT_FILES)
        left = tracker.close(_SEND_TIMEOUT_S)
        if left or tracker.unsent_files():
            raise ConnectionError(f"{len(left)} metric values and {tracker.unsent_files()} files did not reach it")
        run.storage.delete(runs.UNSENT)
        tracking.set_tags(run.tracking, run.mlflow_run_id, ledger.tags())
        tracking.end_run(run.tracking, run.mlflow_run_id, status[run.status])
        if run.status == "finished":
            _log_model(run, warn)
        replace(run, recorded=True).write()
    except UserError as error:
        warn(str(error))
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        warn(f"{run.tracking} did not take the end of the run ({reason}); the same command tells it again")


def _log_model(run: Run, warn: Callable[[str], None]) -> None:
    """Keep the best weights with the run in MLflow, as a model."""
    from mimiclab.tracking.models import log_model

    try:
        log_model(run)
    except UserError as error:  # a run whose best checkpoint is damaged has come to its end all the same
        warn(str(error))


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

    folder = runs.root_of(located) / _DATA_FOLDER
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
