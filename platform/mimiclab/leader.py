"""Rank 0's duties besides training: checkpoints, tracking, notices, and what the driver is told."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mimiclab import checkpoint
from mimiclab.checkpoint import Checkpoint
from mimiclab.data.splits import PARTS, Splits
from mimiclab.detections import write_detections
from mimiclab.engine import Engine
from mimiclab.errors import UserError
from mimiclab.evaluate import Evaluation, preview
from mimiclab.evaluation_report import log_report, png, validation_pictures
from mimiclab.facts import facts
from mimiclab.inbox import Facts, Inbox
from mimiclab.interval import Interval, best_interval
from mimiclab.memory import memory_mb
from mimiclab.preemption import LeavingError, Machines, Notice, draining_nodes, room_for
from mimiclab.runs import CHECKPOINTS, PICTURES, UNSENT, UNSENT_FILES
from mimiclab.saver import Saver
from mimiclab.schema import Experiment
from mimiclab.scoring import Detections
from mimiclab.session import resources_per_worker
from mimiclab.storage import Storage
from mimiclab.tracking.keys import metric_keys
from mimiclab.tracking.protocol import Row, Tracker
from mimiclab.tracking.writer import MlflowTracker

# How long the end of a run waits for the tracking server, seconds; shorter where an error waits to be told.
_CLOSE_TIMEOUT_S = 60.0
_FAILED_CLOSE_TIMEOUT_S = 10.0
# A checkpoint before a machine's end is begun so much earlier than it takes, as far as that is known.
_RESERVE = 2.0
_RESERVE_S = 3.0
# A store that takes longer for one checkpoint is taken to be broken.
_FLUSH_TIMEOUT_S = 1800.0
_FAILED_FLUSH_TIMEOUT_S = 60.0
_PATIENCE_OF_OTHERS = 0.8
# Before anything is measured, `checkpoint.every_steps: auto` is this.
_FIRST_EVERY_STEPS = 50


class Leader:
    """What rank 0 does for the whole run.

    Args:
        experiment: what is trained.
        folder: of the run.
        tracking: MLflow's address.
        mlflow_run_id: of the run.
        inbox: gets what happens.
        splits: the data.
    """

    def __init__(
        self, experiment: Experiment, folder: str, tracking: str, mlflow_run_id: str, inbox: Inbox, splits: Splits
    ) -> None:
        self._experiment = experiment
        self._folder = Storage(folder)
        self._tracking = tracking
        self._mlflow_run_id = mlflow_run_id
        self._inbox = inbox
        self._val = splits.val
        self._classes = splits.train.classes
        self._content = content_of(splits)
        self._best: dict[str, Any] | None = None
        self._best_before: dict[str, Any] | None = None
        self._metrics: dict[str, float] = {}
        self._evaluated = 0
        self._since_best = 0
        self._stopped = False
        self._useful_s = 0.0
        self._step_s = 0.0
        self._saved = 0
        self._interval: Interval | None = None
        self._heeded: Notice | None = None
        self._leaving: LeavingError | None = None
        self._tracker: Tracker
        self._saver: Saver
        self._machines: Machines

    def newest(self) -> Checkpoint | None:
        """The checkpoint to go on from; damaged ones are named and skipped."""
        return checkpoint.latest(self._folder / CHECKPOINTS, warn=self._warn)

    def start(self, engine: Engine, newest: Checkpoint | None, nodes: Sequence[str]) -> None:
        """Take up the record, and tell the driver that an attempt begins.

        Args:
            engine: at the step that the attempt starts from.
            newest: what it was loaded from.
            nodes: ids of the nodes of all ranks, in their order.
        """
        world = len(nodes)
        unsent: Sequence[Row] = ()
        where = "from the start"
        if newest is not None:
            meta = newest.meta
            self._best, self._metrics = meta["best"], meta["metrics"]
            # Checkpoints of earlier versions say less.
            self._evaluated, self._since_best = meta.get("evaluated", newest.step), meta.get("since_best", 0)
            self._stopped, self._useful_s = meta.get("stopped", False), meta.get("useful_s", 0.0)
            unsent = [Row(*row) for row in meta["unsent"]]
            where = f"from step {newest.step}"
        self._saved = engine.step
        before = self._inbox.facts()
        spool = self._folder / UNSENT_FILES
        self._tracker = MlflowTracker(self._tracking, self._mlflow_run_id, unsent, spool=spool)
        self._tracker.set_tags(facts(engine.device))
        keep = self._experiment.checkpoint.keep
        self._saver = Saver(
            self._folder / CHECKPOINTS,
            keep=keep,
            warn=self._warn,
            before=self._unsent,
            written=self._tell_saved,
        )
        self._machines = Machines(draining_nodes, nodes, room=self._room(world, before))
        self._inbox.tell("attempt", step=engine.step, world=world, nodes=list(nodes), useful_s=self._useful_s)
        plural = "s" if world > 1 else ""
        self._say(f"training {where} to step {engine.num_steps} on {world} worker{plural}")
        if newest is None:
            experiment = self._experiment
            found = preview(engine.evaluated, self._val, experiment.data, experiment.eval)
            self._log_pictures(0, found)

    def has_evaluated(self, step: int) -> bool:
        """Whether the weights of a step were evaluated, by this attempt or one before."""
        return self._evaluated >= step

    @property
    def stops_early(self) -> bool:
        """Whether evaluations have not become better for as long as `eval.patience` allows."""
        return self._stopped

    def signal(self, engine: Engine) -> float:
        """Heed a notice, before a step; 1 where all ranks are to leave after that step, else 0."""
        notice = self._machines.notice()
        if notice is not None:
            self.heed(engine)
            left = math.inf if notice.deadline is None else notice.deadline - time.time()
            if notice.deadline is None or left < self._needs_s():
                self._leaving = LeavingError("preemption", f"{_named(notice)} announced to go")
        elif more := self._machines.room():
            self._leaving = LeavingError("growth", f"there is room for {more} more worker{'s' if more > 1 else ''}")
        return 1.0 if self._leaving else 0.0

    def heed(self, engine: Engine) -> None:
        """Make a checkpoint at once where a notice is new; also between two batches of a long evaluation."""
        notice = self._machines.notice()
        if notice is None or notice == self._heeded:
            return
        self._heeded = notice
        in_words = "" if notice.deadline is None else f" in {max(0.0, notice.deadline - time.time()):.0f} s"
        self._inbox.tell("notice", nodes=list(notice.nodes), deadline=notice.deadline, step=engine.step)
        self._say(f"step {engine.step}: {_named(notice)} announced to go{in_words}; saving a checkpoint")
        self.save(engine, notice=True)

    def brace(self, engine: Engine) -> None:
        """Before an evaluation, in which none can leave: make a checkpoint where a machine is to go."""
        if self._machines.notice() is not None:
            self.save(engine, notice=True)

    def leave(self, engine: Engine) -> LeavingError:
        """Save what was done, and wait until it is; the others wait for that. Gives why they leave."""
        assert self._leaving is not None
        patience = min(_FLUSH_TIMEOUT_S, _PATIENCE_OF_OTHERS * self._experiment.scale.collective_timeout_s)
        until = time.monotonic() + patience
        if engine.step != self._saved and self._saver.wait(patience):
            self.save(engine, notice=self._leaving.why == "preemption")
        with contextlib.suppress(UserError):  # warned of by now; the next attempt goes on from the one before
            self._saver.flush(max(0.0, until - time.monotonic()))
        return self._leaving

    def log_step(self, engine: Engine, means: Mapping[str, Tensor], *, seconds: float, waited: float) -> None:
        """Record a step.

        Args:
            engine: after it.
            means: what `Engine.train_step` gave.
            seconds: that it took, with the wait for its images.
            waited: seconds of these that it waited for them.
        """
        self._useful_s += seconds
        self._step_s = seconds if not self._step_s else 0.9 * self._step_s + 0.1 * seconds
        values = dict(zip(means, torch.stack([v.cpu() for v in means.values()]).tolist(), strict=True))
        values["images_per_s"] = self._experiment.optim.global_batch / seconds
        values["data_wait"] = waited / seconds
        values |= memory_mb(engine.device)
        self._tracker.log_metrics(engine.step, {f"train/{name}": value for name, value in values.items()})
        self._inbox.tell(
            "step",
            step=engine.step,
            num_steps=engine.num_steps,
            loss=values["loss"],
            images_per_s=values["images_per_s"],
            seconds=seconds,
            useful_s=self._useful_s,
        )

    def log_evaluation(self, engine: Engine, epoch: int, evaluation: Evaluation, *, seconds: float) -> None:
        """Record an evaluation that took so many seconds; raises a UserError where it does not give `eval.metric`."""
        config = self._experiment.eval
        self._useful_s += seconds
        self._metrics = evaluation.metrics
        self._evaluated = engine.step
        value = evaluation.metrics.get(config.metric)
        if value is None:
            known = ", ".join(sorted(evaluation.metrics))
            raise UserError(f"eval.metric: evaluations do not give {config.metric}; expected one of {known}")
        sign = 1 if config.mode == "max" else -1
        if self._best is None or sign * value > sign * self._best["value"]:
            self._best_before = self._best
            self._best = {"step": engine.step, "metric": config.metric, "value": value}
            self._since_best = 0
        else:
            self._since_best += 1
        self._stopped = config.patience is not None and self._since_best >= config.patience
        values = {**evaluation.metrics, f"best/{config.metric}": self._best["value"], "epoch": float(epoch)}
        keys = metric_keys(values)
        self._tracker.log_metrics(engine.step, {keys[name]: value for name, value in values.items()})
        self._log_pictures(engine.step, evaluation.detections)
        log_report(self._tracker, self._val, evaluation, config.num_pictures)
        if not self._since_best:
            self._keep_detections(engine.step, evaluation.detections)
        self._inbox.tell("evaluation", epoch=epoch, metrics=evaluation.metrics)
        if self._stopped:
            self._say(f"{config.metric} has not become better for {self._since_best} evaluations (eval.patience): done")

    def _keep_detections(self, step: int, detections: Mapping[str, Detections]) -> None:
        """Of the best evaluation: `mimiclab compare` pairs runs by them."""
        try:
            write_detections(self._folder, detections, step=step, content=self._val.columns.digest())
        except UserError as error:
            self._warn(str(error))

    def _log_pictures(self, step: int, detections: Mapping[str, Detections]) -> None:
        pictures = validation_pictures(self._val, detections, self._experiment.eval.num_pictures)
        for name, image in pictures.items():
            self._tracker.log_picture(f"validation/{name}", step, image)
            try:
                (self._folder / PICTURES).write(f"{name}.png", png(image))
            except UserError as error:  # a picture is no reason to end a run
                self._warn(str(error))

    def save_if_due(self, engine: Engine, *, epoch_end: bool) -> None:
        """Make a checkpoint at the end of an epoch, and every so many steps."""
        every = self._experiment.checkpoint.every_steps
        if epoch_end or engine.step - self._saved >= (self._auto_steps() if every == "auto" else self._ahead(every)):
            self.save(engine)

    def save(self, engine: Engine, *, notice: bool = False) -> None:
        """Make a checkpoint; returns as soon as its content is copied."""
        meta = {
            "step": engine.step,
            "classes": list(self._classes),
            "data": self._content,
            "metrics": self._metrics,
            "best": self._best,
            "evaluated": self._evaluated,
            "since_best": self._since_best,
            "stopped": self._stopped,
            "useful_s": self._useful_s,
            "mlflow_run_id": self._mlflow_run_id,
            "experiment": self._experiment.model_dump(mode="json"),
        }
        self._saved = engine.step
        # Also the one before: the best may turn out not to be written.
        keep = [best["step"] for best in (self._best, self._best_before) if best]
        self._saver.snapshot(engine.weights(), engine.state_dict(), meta, steps=keep, notice=notice)

    def finish(self) -> None:
        """Wait until all is saved and sent; what the tracking server does not take waits in the run's folder."""
        self._saver.flush(_FLUSH_TIMEOUT_S)
        left = self._close(_CLOSE_TIMEOUT_S)
        if left:
            self._folder.write(UNSENT, json.dumps(left).encode())
        files = self._tracker.unsent_files()
        if left or files:
            self._warn(
                f"{len(left)} metric values and {files} files (pictures, tables, earlier values) did not reach "
                f"{self._tracking}; they are sent when the same command runs again"
            )

    def abandon(self) -> None:
        """End in the middle, with all that was done so far: a reader of the history looks for what came last."""
        with contextlib.suppress(UserError):  # another error is about to be told
            self._saver.flush(_FAILED_FLUSH_TIMEOUT_S)
        # What is not sent is in the checkpoint, or will be done again.
        self._close(_FAILED_CLOSE_TIMEOUT_S)

    def _close(self, timeout_s: float) -> list[Row]:
        self._machines.close()
        return self._tracker.close(timeout_s)

    def _unsent(self) -> dict[str, Any]:
        self._tracker.keep()
        # Later steps' may be among them: as if the server had taken those before the end.
        return {"unsent": self._tracker.unsent()}

    def _tell_saved(self, step: int) -> None:
        self._inbox.tell("checkpoint", step=step)

    def _say(self, text: str) -> None:
        self._inbox.tell("text", text=text)

    def _warn(self, text: str) -> None:
        self._say(f"warning: {text}")

    def _needs_s(self) -> float:
        """How long before a machine's end all must have stopped: a step, and a checkpoint until it is written."""
        return _RESERVE * (self._step_s + (self._saver.written_s or 0.0)) + _RESERVE_S

    def _ahead(self, every: int) -> int:
        """Steps between checkpoints so that no more than `every` are lost, with one that is being written too."""
        if not self._step_s:
            return every
        return max(1, every - math.ceil((self._saver.written_s or 0.0) / self._step_s))

    def _auto_steps(self) -> int:
        mtbf_minutes = self._experiment.scale.mtbf_minutes
        assert mtbf_minutes is not None  # the schema's promise
        if self._saver.copied_s is None or not self._step_s:
            return _FIRST_EVERY_STEPS
        found = best_interval(
            self._step_s, self._saver.copied_s, 60 * mtbf_minutes, written_s=self._saver.written_s or 0.0
        )
        if self._interval is None or not 0.8 < found.steps / self._interval.steps < 1.25:
            self._interval = found
            self._say(f"checkpoints {found}")
        return self._interval.steps

    def _room(self, world: int, before: Facts) -> Callable[[], int] | None:
        """What asks for room to grow; None where the run has the workers that it wants."""
        scale = self._experiment.scale
        if world >= scale.workers.max or (before.why == "growth" and world <= before.world):
            return None  # or where growing was tried and did not work
        each, labels = resources_per_worker(scale), scale.label_selector
        return lambda: min(room_for(each, labels), scale.workers.max - world)


def content_of(splits: Splits) -> dict[str, str | None]:
    """The content hash of each set."""
    return {part: getattr(splits, part).content for part in PARTS}


def _named(notice: Notice) -> str:
    nodes = ", ".join(node[:8] for node in notice.nodes)
    return f"node{'s' if len(notice.nodes) > 1 else ''} {nodes}"
