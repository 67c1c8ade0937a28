"""The workers of a run, from its driver's side: Ray Train starts them, and starts them again when they fail; here is
what listens to them.

Imports stay light here: Ray ships `_loop` to its controller by this module's name.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from mimiclab.errors import NoRetryError, UserError
from mimiclab.inbox import Event, Inbox
from mimiclab.schema import Experiment, ScaleConfig
from mimiclab.seat import Seat
from mimiclab.session import resources_per_worker
from mimiclab.storage import Storage

if TYPE_CHECKING:
    from ray.train import UserCallback

    from mimiclab.restarts import Restarts

_POLL_S = 0.3
# How long workers may take to start before a person is told what they may be waiting for.
_PATIENCE_S = 60.0
_NEVER_S = 1e9
# Ray's own record of a fit; nothing is resumed from it.
RAY_FOLDER = "ray"

PLACEMENT_GROUP, WHERE = "placement_group", "where"
"""In every report to a callback: the hex id of what Ray reserved for the workers, and the address of rank 0's node."""

Fit = Callable[[Experiment, Mapping[str, Any], Storage], Generator[Event, None, None]]
"""Runs workers to the end of training, as `fit` does."""


def fit(
    experiment: Experiment, job: Mapping[str, Any], storage: Storage, callbacks: Sequence[UserCallback] = ()
) -> Generator[Event, None, None]:
    """Run workers to the end of training, over their failures, and yield what they tell.

    Ray Train works in a thread: the caller's is where Ctrl-C arrives.

    Args:
        experiment: what is trained.
        job: all of `mimiclab.worker.Job` but the inbox.
        storage: the run's folder.
        callbacks: of Ray Train.

    Yields:
        Every event of the workers; "text" while there is no room for them for long; a "tick" a few times a second.

    Raises:
        UserError: a worker met something that the user can mend.
        NoRetryError: training cannot go on.
        Exception: whatever else made Ray Train give up.
    """
    inbox = Inbox.open()
    waiting = _Waiting(experiment.scale)
    run = partial(_fit_over_starts, experiment, {**job, "inbox": inbox}, storage, inbox, callbacks)
    try:
        for event in follow(run, inbox):
            waiting.hear(event)
            yield event
            if event["kind"] == "tick" and (text := waiting.text()):
                yield {"kind": "text", "time": time.time(), "text": text}
    finally:
        # Also where the caller stops listening: nobody may write into the run after that.
        inbox.close()


def follow(run: Callable[[], None], inbox: Inbox) -> Generator[Event, None, None]:
    """Run workers in a thread, and yield what they tell until they have ended, and a "tick" a few times a second.

    Raises:
        BaseException: what `run` raised, out of Ray's wrapping.
    """
    failure: list[BaseException] = []

    def target() -> None:
        try:
            run()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=target, name="fit", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_POLL_S)
        yield from inbox.take()
        yield {"kind": "tick", "time": time.time()}
    yield from inbox.take()
    if failure:
        raise _cause(failure[0])


def _fit_over_starts(
    experiment: Experiment, job: Mapping[str, Any], storage: Storage, inbox: Inbox, callbacks: Sequence[UserCallback]
) -> None:
    """Run Ray Train, again where it gives up because workers failed while they started, which it does at once."""
    from ray.exceptions import RayActorError, RayTaskError
    from ray.train import ControllerError

    from mimiclab.restarts import Failure, last_line

    restarts = restarts_of(experiment, inbox)
    while True:
        storage.delete_folder(RAY_FOLDER)
        try:
            _trainer(experiment, job, storage, inbox, callbacks).fit()
            return
        except ControllerError as error:
            inner = error.controller_failure
            if isinstance(inner, UserError | NoRetryError) or not isinstance(inner, RayActorError | RayTaskError):
                raise
            restarts.count(Failure("crash", f"a worker failed while it started: {last_line(inner)}"), inbox.facts())


def _trainer(
    experiment: Experiment, job: Mapping[str, Any], storage: Storage, inbox: Inbox, callbacks: Sequence[UserCallback]
) -> Any:
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    scale = experiment.scale
    workers = scale.workers
    return TorchTrainer(
        _loop,
        train_loop_config={"job": dict(job), "gpu": scale.gpu},
        torch_config=TorchConfig(timeout_s=round(scale.collective_timeout_s) or 1),
        scaling_config=ScalingConfig(
            num_workers=workers.max if workers.min == workers.max else (workers.min, workers.max),
            use_gpu=scale.gpu,
            resources_per_worker=resources_per_worker(scale),
            placement_strategy=scale.placement,
            label_selector=scale.label_selector or None,
            accelerator_type=scale.accelerator_type,
            # Ray would end workers in the middle of their work to start more; they leave by themselves, see Leader.
            elastic_resize_monitor_interval_s=_NEVER_S,
        ),
        run_config=RunConfig(
            name=RAY_FOLDER,
            storage_path=storage.uri if storage.local is None else str(storage.local),
            callbacks=[restarts_of(experiment, inbox), *callbacks],
            # Started again for ever: `Restarts` decides.
            failure_config=FailureConfig(max_failures=-1, max_preemption_failures=-1, controller_failure_limit=-1),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )


def restarts_of(experiment: Experiment, inbox: Inbox) -> Restarts:
    """What counts the failures of an experiment's workers."""
    from mimiclab.restarts import Restarts

    scale = experiment.scale
    return Restarts(inbox, max_crashes=scale.max_crashes, max_preemptions=scale.max_preemptions)


def _loop(config: Mapping[str, Any]) -> None:
    # Loaded here: torch, torchvision and MLflow are for the workers, not for Ray's controller.
    import ray
    import ray.train
    from ray.train.torch import get_device

    from mimiclab.worker import Job, work

    job = Job(**config["job"])
    job.inbox.enlist()
    context = ray.train.get_context()
    group = ray.util.get_current_placement_group()
    place = {PLACEMENT_GROUP: group.id.hex() if group else None, WHERE: ray.util.get_node_ip_address()}
    seat = Seat(
        rank=context.get_world_rank(),
        world=context.get_world_size(),
        device=str(get_device()) if config["gpu"] else "cpu",
        node=ray.get_runtime_context().get_node_id(),
        report=lambda metrics: ray.train.report({**metrics, **place}),
    )
    work(job, seat)


class _Waiting:
    """Knows when workers do not start for long."""

    def __init__(self, scale: ScaleConfig) -> None:
        self._scale = scale
        self._since: float | None = time.monotonic()
        self._next_s = _PATIENCE_S

    def hear(self, event: Event) -> None:
        """Take note of an event."""
        if event["kind"] == "attempt":
            self._since = None
        elif event["kind"] == "failure":
            self._since, self._next_s = time.monotonic(), _PATIENCE_S

    def text(self) -> str | None:
        """What to tell a person, each time that the wait has doubled."""
        if self._since is None or (waited := time.monotonic() - self._since) < self._next_s:
            return None
        import ray

        self._next_s *= 2
        free, each = ray.available_resources(), resources_per_worker(self._scale)
        needs = ", ".join(f"{amount:g} {kind}" for kind, amount in each.items())
        left = ", ".join(f"{free.get(kind, 0):g} {kind}" for kind in each)
        return f"no worker at work for {waited:.0f} s; wanted: {self._scale.workers} of {needs} each, free: {left}"


def _cause(error: BaseException) -> BaseException:
    """What went wrong, out of Ray's wrapping."""
    inner = getattr(error, "controller_failure", error)
    return inner if isinstance(inner, UserError | NoRetryError) else error
