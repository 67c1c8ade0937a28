"""A run's only worker as a thread of its driver's process: nothing is started, and nothing is imported twice."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Mapping
from typing import Any

from mimiclab.cluster.capacity import is_one_machine
from mimiclab.errors import NoRetryError, UserError
from mimiclab.fit import follow, restarts_of
from mimiclab.inbox import Event, LocalInbox
from mimiclab.schema import Experiment, ScaleConfig
from mimiclab.seat import Seat
from mimiclab.storage import Storage, StoreError


def needs_one_process(scale: ScaleConfig) -> bool:
    """Whether runs of this scale have one worker, which may be on any machine."""
    return scale.workers.max == 1 and not scale.label_selector and scale.accelerator_type is None


def is_alone(scale: ScaleConfig) -> bool:
    """Whether runs of this scale, on the cluster that is connected, need no process but their driver's.

    On more than one machine drivers stay where the search was started, and workers go where there is room.
    """
    return needs_one_process(scale) and is_one_machine()


def fit_alone(
    experiment: Experiment,
    job: Mapping[str, Any],
    storage: Storage,
    *,
    report: Callable[[Mapping[str, Any]], object],
    stop: threading.Event,
) -> Generator[Event, None, None]:
    """Run one worker to the end of training, over its failures, and yield what it tells; like `mimiclab.fit.fit`.

    A worker that crashes is begun again here. One that takes the process with it is begun again by who started that.

    Args:
        experiment: what is trained.
        job: all of `mimiclab.worker.Job` but the inbox.
        storage: the run's folder.
        report: gets every evaluation, in the worker's thread.
        stop: set by anyone to end training after the step that is under way.

    Raises:
        KeyboardInterrupt: training was stopped.
        UserError: the worker met something that the user can mend.
        NoRetryError: training cannot go on.
    """
    inbox = LocalInbox()
    ended = threading.Event()

    def heed() -> None:
        if stop.is_set():
            raise KeyboardInterrupt("stopped by the search")

    def tell(metrics: Mapping[str, Any]) -> None:
        report(metrics)
        heed()

    def run() -> None:
        import ray

        from mimiclab.restarts import diagnose
        from mimiclab.worker import Job, work

        restarts = restarts_of(experiment, inbox)
        node = ray.get_runtime_context().get_node_id()
        device = "cuda:0" if experiment.scale.gpu else "cpu"
        seat = Seat(rank=0, world=1, device=device, node=node, report=tell, heed=heed)
        try:
            while True:
                try:
                    return work(Job(**job, inbox=inbox), seat)
                except Exception as error:
                    if isinstance(error, NoRetryError | UserError) and not isinstance(error, StoreError):
                        raise
                    restarts.count(diagnose({0: error}, ()), inbox.facts())
        finally:
            ended.set()

    try:
        yield from follow(run, inbox)
    finally:
        # Also where the caller stops listening: nobody may write into the run after that.
        stop.set()
        ended.wait()
