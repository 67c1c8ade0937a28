"""What every worker runs: the loop over global steps."""

from __future__ import annotations

import socket
import time
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mimiclab.build import build_detector
from mimiclab.checkpoint import Checkpoint
from mimiclab.data.dataset import training_batches
from mimiclab.data.loader import load
from mimiclab.data.splits import Splits, read_splits
from mimiclab.engine import Batch, Engine
from mimiclab.errors import UserError
from mimiclab.evaluate import evaluate
from mimiclab.inbox import Inbox
from mimiclab.leader import Leader, content_of
from mimiclab.preemption import LeavingError
from mimiclab.schema import DataConfig, Experiment
from mimiclab.seat import LAST, Seat
from mimiclab.system import SystemMonitor

Value = TypeVar("Value")


@dataclass(frozen=True)
class Job:
    """What the driver hands to every worker; it travels as a dict."""

    experiment: str
    """The experiment as JSON, its data located and its paths absolute."""
    data: str
    """Its `data:` section as JSON, with packed sets: what workers read."""
    folder: str
    """The run's folder, an absolute path or a URI."""
    tracking: str
    mlflow_run_id: str
    inbox: Inbox


def work(job: Job, seat: Seat) -> None:
    """Train from the newest checkpoint to the end of the run; called on every rank."""
    try:
        _Worker(job, seat).run()
    except (UserError, LeavingError):
        raise
    except Exception:
        # Of what a worker raises Ray keeps the traceback to itself until all is over.
        job.inbox.tell("traceback", rank=seat.rank, text=traceback.format_exc())
        raise


class _Worker:
    """One rank, for one attempt."""

    def __init__(self, job: Job, seat: Seat) -> None:
        """Build everything, as the newest checkpoint has it."""
        self.experiment = experiment = Experiment.model_validate_json(job.experiment)
        self.seat, self.rank, self.world = seat, seat.rank, seat.world
        torch.set_num_threads(experiment.scale.threads)
        self.device = torch.device(seat.device)
        self.splits = read_splits(DataConfig.model_validate_json(job.data))
        self.leader: Leader | None = None
        if self.rank == 0:
            self.leader = Leader(experiment, job.folder, job.tracking, job.mlflow_run_id, job.inbox, self.splits)
        # Rank 0's choice for all: two ranks may see a shared folder at different moments.
        newest = self._agree(self.leader.newest() if self.leader else None)
        torch.manual_seed(experiment.seed)
        # A machine that goes on with a run needs nothing of what the run once started from.
        detector = build_detector(experiment.model, self.splits.train.classes, pretrained=newest is None)
        self.batches = training_batches(self.splits.train, experiment, rank=self.rank, world=self.world)
        self.engine = Engine(
            detector.to(self.device),
            experiment.optim,
            num_steps=self.batches.order.num_steps(experiment.optim.epochs),
            steps_per_epoch=self.batches.order.steps_per_epoch,
            micro_batch=experiment.scale.micro_batch,
        )
        if newest is not None:
            _check_resumable(newest, self.splits)
            self.engine.load_state_dict(newest.state(), newest.weights())
        self.before: Mapping[str, Any] = newest.meta if newest else {}
        epochs = range(1, experiment.optim.epochs + 1)
        self.epoch_ends = {self.batches.order.epoch_end_step(epoch): epoch for epoch in epochs}
        places: list[Any] = [(seat.node, socket.gethostname())] * self.world
        if self.world > 1:
            dist.all_gather_object(places, places[0])
        nodes, hosts = zip(*places, strict=True)
        if self.leader:
            self.leader.start(self.engine, newest, nodes)
        self.monitor: SystemMonitor | None = None
        if hosts.index(hosts[self.rank]) == self.rank:  # one for each machine
            every_s = experiment.where.system_metrics_s
            self.monitor = SystemMonitor.start(job.tracking, job.mlflow_run_id, every_s, self.device)

    def run(self) -> None:
        """Train and evaluate to the end."""
        # The position in the data is the step: a restart has nothing else to restore.
        loader = load(
            self.batches,
            range(self.engine.step, self.engine.num_steps),
            processes=self.experiment.data.loader_processes,
            threads=self.experiment.scale.threads,
            pin=self.device.type == "cuda",
        )
        try:
            # The attempt before may have been killed between its last evaluation's checkpoint and the report.
            if (step := self.before.get("evaluated")) in self.epoch_ends:
                self._report(step, self.before["metrics"], last=self.before.get("stopped", False))
            # What a notice saved in an evaluation is still to be evaluated.
            self._evaluate_if_due()
            if not self._stops():
                self._train(loader)
            if self.leader:
                self.leader.finish()
        except BaseException:
            if self.leader:
                self.leader.abandon()
            raise
        finally:
            if self.monitor:
                self.monitor.close()

    def _train(self, loader: Iterable[Batch]) -> None:
        engine, leader = self.engine, self.leader
        signal = leader.signal(engine) if leader else 0.0
        asked = time.perf_counter()
        for batch in loader:
            self.seat.heed()
            started = time.perf_counter()
            means = engine.train_step(_to(batch, self.device), signal)
            now = time.perf_counter()
            if leader:
                leader.log_step(engine, means, seconds=now - asked, waited=started - asked)
            # Before an evaluation, which takes its time and which the next attempt can begin with. Not at the end.
            if engine.signal and engine.step < engine.num_steps:
                # Not before rank 0 has saved all: the first to go has Ray end the others.
                leaving = self._agree(leader.leave(engine) if leader else None)
                assert leaving is not None
                raise leaving
            if self._evaluate_if_due():
                if self._stops():
                    return
            elif leader:
                leader.save_if_due(engine, epoch_end=engine.step in self.epoch_ends)
            signal = leader.signal(engine) if leader else 0.0
            asked = time.perf_counter()

    def _evaluate_if_due(self) -> bool:
        """Evaluate the weights and save where an epoch ends that is to be evaluated; whether that was so."""
        engine, leader, config = self.engine, self.leader, self.experiment.eval
        epoch = self.epoch_ends.get(engine.step)
        if epoch is None or (epoch % config.every_epochs and epoch != self.experiment.optim.epochs):
            return False
        if self._agree(leader.has_evaluated(engine.step) if leader else None):
            return False
        if leader:
            leader.brace(engine)
        started = time.perf_counter()
        evaluation = evaluate(
            engine.evaluated,
            self.splits.val,
            self.experiment.data,
            config,
            rank=self.rank,
            world=self.world,
            between=self._between,
        )
        if leader and evaluation:
            leader.log_evaluation(engine, epoch, evaluation, seconds=time.perf_counter() - started)
            leader.save(engine)
        self._report(engine.step, evaluation.metrics if evaluation else {}, last=bool(leader and leader.stops_early))
        return True

    def _report(self, step: int, metrics: Mapping[str, float], *, last: bool) -> None:
        """Tell of an evaluation. A barrier over all ranks, so at evaluations only; it is for searches."""
        self.seat.report({"epoch": self.epoch_ends[step], "step": step, LAST: last, **metrics})

    def _between(self) -> None:
        """Between two batches of an evaluation, which may be long."""
        self.seat.heed()
        if self.leader:
            self.leader.heed(self.engine)

    def _stops(self) -> bool:
        """Whether training ends before its time."""
        if self.experiment.eval.patience is None:
            return False
        return bool(self._agree(self.leader.stops_early if self.leader else None))

    def _agree(self, value: Value) -> Value:
        """Rank 0's value, on all ranks."""
        if self.world == 1:
            return value
        choice = [value]
        dist.broadcast_object_list(choice)
        return choice[0]


def _check_resumable(newest: Checkpoint, splits: Splits) -> None:
    before, now = newest.meta["classes"], list(splits.train.classes)
    if before != now:
        raise UserError(
            f"checkpoint {newest.name} is of the classes {before}, the data now has {now}; "
            "expected the data that the run was started with, or --fresh"
        )
    # Checkpoints of earlier versions do not say.
    for part, content in newest.meta.get("data", {}).items():
        if content != content_of(splits)[part]:
            raise UserError(
                f"data.{part}: {getattr(splits, part).origin} is not what checkpoint {newest.name} was trained with, "
                "its annotations or images have changed; expected the data that the run was started with, or --fresh"
            )


def _to(batch: Batch, device: torch.device) -> Batch:
    images = [image.to(device, non_blocking=True) for image in batch.images]
    return Batch(images, batch.targets, batch.pad_to, batch.image_ids)
