"""What every Ray Train worker runs: the loop over global steps."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from PIL.Image import Image
from torch import Tensor

from mimiclab import checkpoint
from mimiclab.build import build_detector
from mimiclab.checkpoint import Checkpoint
from mimiclab.data.coco import CocoDataset
from mimiclab.data.dataset import read_record, training_batches
from mimiclab.data.loader import load
from mimiclab.data.order import Order
from mimiclab.data.splits import PARTS, Splits, read_splits
from mimiclab.engine import Batch, Engine
from mimiclab.errors import UserError
from mimiclab.evaluate import Evaluation, detections_of, evaluate
from mimiclab.pictures import Panel, side_by_side
from mimiclab.progress import ProgressWriter
from mimiclab.runs import CHECKPOINTS, PICTURES, PROGRESS, UNSENT
from mimiclab.schema import DataConfig, Experiment
from mimiclab.tracking.protocol import Row, Tracker, as_key
from mimiclab.tracking.writer import MlflowTracker

# How long the end of a run waits for the tracking server, seconds; shorter where an error waits to be told.
CLOSE_TIMEOUT_S = 60.0
FAILED_CLOSE_TIMEOUT_S = 10.0
PLACEMENT_GROUP = "placement_group"
"""In every report: the hex id of what Ray reserved for the workers."""


@dataclass(frozen=True)
class Job:
    """What the driver hands to every worker; plain values only, so that it travels as a dict."""

    experiment: str
    """The experiment as JSON, its data located and its paths absolute."""
    data: str
    """Its `data:` section as JSON, with packed sets: what workers read."""
    folder: str
    """The run's folder, absolute."""
    tracking: str
    mlflow_run_id: str


def work(job: Job) -> None:
    """Train from the newest checkpoint to the end of the run; called on every rank."""
    experiment = Experiment.model_validate_json(job.experiment)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(experiment.scale.threads)
    device = ray.train.torch.get_device() if experiment.scale.gpu else torch.device("cpu")
    splits = read_splits(DataConfig.model_validate_json(job.data))
    leader = _Leader(job, experiment, splits) if rank == 0 else None
    newest = _agree(leader.newest() if leader else None, world)
    torch.manual_seed(experiment.seed)
    # A machine that goes on with a run needs nothing of what the run once started from.
    detector = build_detector(experiment.model, splits.train.classes, pretrained=newest is None).to(device)
    batches = training_batches(splits.train, experiment, rank=rank, world=world)
    order = batches.order
    engine = Engine(
        detector,
        experiment.optim,
        num_steps=order.num_steps(experiment.optim.epochs),
        steps_per_epoch=order.steps_per_epoch,
    )
    if newest is not None:
        _check_resumable(newest, splits)
        detector.load_state_dict(newest.weights())
        engine.load_state_dict(newest.state())
    if leader:
        leader.start(engine, newest, world)

    # The position in the data is the step: a restart has nothing else to restore.
    loader = load(
        batches,
        range(engine.step, engine.num_steps),
        processes=experiment.data.loader_processes,
        threads=experiment.scale.threads,
        pin=device.type == "cuda",
    )
    try:
        _train_to_end(loader, engine, experiment, splits, order, leader, rank=rank, world=world, device=device)
    except BaseException:
        if leader:  # what happened up to here is what a reader of the history looks for
            leader.close(FAILED_CLOSE_TIMEOUT_S)
        raise
    if leader:
        leader.finish()


def _train_to_end(
    loader: Iterable[Batch],
    engine: Engine,
    experiment: Experiment,
    splits: Splits,
    order: Order,
    leader: _Leader | None,
    *,
    rank: int,
    world: int,
    device: torch.device,
) -> None:
    """Step through the batches; evaluate and save where they are due."""
    epoch_ends = {order.epoch_end_step(epoch): epoch for epoch in range(1, experiment.optim.epochs + 1)}
    every_epochs, every_steps = experiment.eval.every_epochs, experiment.checkpoint.every_steps
    asked = time.perf_counter()
    for batch in loader:
        started = time.perf_counter()
        means = engine.train_step(_to(batch, device))
        now = time.perf_counter()
        if leader:
            leader.log_step(engine, means, seconds=now - asked, waited=started - asked)
        epoch = epoch_ends.get(engine.step)
        if epoch is not None and (epoch % every_epochs == 0 or epoch == experiment.optim.epochs):
            evaluation = evaluate(engine.detector, splits.val, experiment.data, experiment.eval, rank=rank, world=world)
            if leader and evaluation:
                leader.log_evaluation(engine, epoch, evaluation)
                leader.save(engine)
            # A barrier over all ranks, so at evaluations only; it feeds searches, not the checkpoint.
            reached = {"epoch": epoch, "step": engine.step, PLACEMENT_GROUP: _placement_group()}
            ray.train.report({**reached, **(evaluation.metrics if evaluation else {})})
        elif leader and (epoch is not None or engine.step % every_steps == 0):
            leader.save(engine)
        asked = time.perf_counter()


def _placement_group() -> str | None:
    """Hex id of what Ray reserved for the workers; None in local mode."""
    if not ray.is_initialized():
        return None
    group = ray.util.get_current_placement_group()
    return group.id.hex() if group else None


class _Leader:
    """Rank 0's duties: progress, tracking, checkpoints."""

    def __init__(self, job: Job, experiment: Experiment, splits: Splits) -> None:
        self._job = job
        self._experiment = experiment
        self._val = splits.val
        self._classes = splits.train.classes
        self._content = _content(splits)
        self._folder = Path(job.folder) / CHECKPOINTS
        self._progress = ProgressWriter(Path(job.folder) / PROGRESS)
        self._best: dict[str, Any] | None = None
        self._metrics: dict[str, float] = {}
        self._tracker: Tracker

    def newest(self) -> Checkpoint | None:
        return checkpoint.latest(self._folder, warn=lambda text: self._progress.write("text", text=f"warning: {text}"))

    def start(self, engine: Engine, newest: Checkpoint | None, world: int) -> None:
        unsent: Sequence[Row] = ()
        where = "from the start"
        if newest is not None:
            self._best = newest.meta["best"]
            self._metrics = newest.meta["metrics"]
            unsent = [Row(*row) for row in newest.meta["unsent"]]
            where = f"from step {newest.step}"
        self._tracker = MlflowTracker(self._job.tracking, self._job.mlflow_run_id, unsent)
        self._progress.write(
            "text",
            text=f"training {where} to step {engine.num_steps} on {world} worker{'s' if world > 1 else ''}",
        )

    def log_step(self, engine: Engine, means: Mapping[str, Tensor], *, seconds: float, waited: float) -> None:
        values = dict(zip(means, torch.stack([v.cpu() for v in means.values()]).tolist(), strict=True))
        values["images_per_s"] = self._experiment.optim.global_batch / seconds
        values["data_wait"] = waited / seconds
        self._tracker.log_metrics(engine.step, {f"train/{name}": value for name, value in values.items()})
        self._progress.write(
            "step",
            step=engine.step,
            num_steps=engine.num_steps,
            loss=values["loss"],
            images_per_s=values["images_per_s"],
        )

    def log_evaluation(self, engine: Engine, epoch: int, evaluation: Evaluation) -> None:
        self._metrics = evaluation.metrics
        if self._best is None or evaluation.metrics["student/AP"] > self._best["value"]:
            self._best = {
                "step": engine.step,
                "metric": "student/AP",
                "value": evaluation.metrics["student/AP"],
            }
        values = {**evaluation.metrics, "best/student/AP": self._best["value"], "epoch": float(epoch)}
        self._tracker.log_metrics(engine.step, {_key(name): value for name, value in values.items()})
        pictures = Path(self._job.folder) / PICTURES
        pictures.mkdir(exist_ok=True)
        num = self._experiment.eval.num_pictures
        for name, image in validation_pictures(self._val, evaluation, num).items():
            self._tracker.log_picture(f"validation/{as_key(name)}", engine.step, image)
            image.save(pictures / f"{name}.png")
        self._progress.write("evaluation", epoch=epoch, metrics=evaluation.metrics)

    def save(self, engine: Engine) -> None:
        meta = {
            "step": engine.step,
            "classes": list(self._classes),
            "data": self._content,
            "metrics": self._metrics,
            "best": self._best,
            "mlflow_run_id": self._job.mlflow_run_id,
            "unsent": [list(row) for row in self._tracker.unsent()],
            "experiment": self._experiment.model_dump(mode="json"),
        }
        checkpoint.save(self._folder, engine.detector.state_dict(), engine.state_dict(), meta)
        keep = [self._best["step"]] if self._best else []
        checkpoint.prune(self._folder, newest=engine.step, keep=self._experiment.checkpoint.keep, steps=keep)

    def finish(self) -> None:
        best = self._folder / f"step-{self._best['step']:08d}" if self._best else None
        if best is not None:
            self._tracker.log_artifact(best / checkpoint.WEIGHTS, "weights")
        self.close(CLOSE_TIMEOUT_S)

    def close(self, timeout_s: float) -> None:
        """Send what is left; what the server does not take waits in the run's folder."""
        left = self._tracker.close(timeout_s)
        if left:
            (Path(self._job.folder) / UNSENT).write_text(json.dumps(left))
            self._progress.write(
                "text",
                text=f"warning: {len(left)} metric values did not reach {self._job.tracking}; they are sent when "
                "the same command runs again",
            )


def validation_pictures(dataset: CocoDataset, evaluation: Evaluation, num: int) -> dict[str, Image]:
    """Pictures of `num` fixed images, spread over the set: ground truth and every head side by side."""
    pictures = {}
    for index in sorted({int(i) for i in np.linspace(0, len(dataset.images) - 1, num)}) if num else ():
        record = dataset.images[index]
        panels = [Panel("ground truth", record.boxes, record.labels)]
        for head, rows in evaluation.detections.items():
            found = detections_of(rows, record.id, dataset.category_ids)
            panels.append(Panel(head, found["boxes"], found["labels"], found["scores"]))
        pixels = read_record(record).permute(1, 2, 0).numpy()
        pictures[record.path.stem] = side_by_side(pixels, panels, dataset.classes)
    return pictures


def _key(metric: str) -> str:
    """A metric's name as a key of the tracker; a class name in it may hold any character, a slash too."""
    return "/".join(as_key(part) for part in metric.split("/", 2))


def _check_resumable(newest: Checkpoint, splits: Splits) -> None:
    before, now = newest.meta["classes"], list(splits.train.classes)
    if before != now:
        raise UserError(
            f"checkpoint {newest.path} is of the classes {before}, the data now has {now}; "
            "expected the data that the run was started with, or --fresh"
        )
    # Checkpoints of earlier versions do not say.
    for part, content in newest.meta.get("data", {}).items():
        if content != _content(splits)[part]:
            raise UserError(
                f"data.{part}: {getattr(splits, part).origin} is not what checkpoint {newest.path} was trained with, "
                "its annotations or images have changed; expected the data that the run was started with, or --fresh"
            )


def _content(splits: Splits) -> dict[str, str | None]:
    """The content hash of each set."""
    return {part: getattr(splits, part).content for part in PARTS}


def _agree(newest: Checkpoint | None, world: int) -> Checkpoint | None:
    """Rank 0's choice for all: two ranks may see a shared folder at different moments."""
    if world == 1:
        return newest
    choice: list[Checkpoint | None] = [newest]
    dist.broadcast_object_list(choice)
    return choice[0]


def _to(batch: Batch, device: torch.device) -> Batch:
    images = [image.to(device, non_blocking=True) for image in batch.images]
    return Batch(images, batch.targets, batch.pad_to, batch.image_ids)
