"""Run a function, once or over items, as tasks of the Ray cluster that this process is connected to."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

from mimiclab.cluster import capacity
from mimiclab.data.parallel import Runner, bounded
from mimiclab.errors import UserError
from mimiclab.schema import ScaleConfig
from mimiclab.session import task_options

if TYPE_CHECKING:
    import ray

# How long tasks may still end by themselves, seconds.
_GRACE_S = 1.0

Item = TypeVar("Item")
Result = TypeVar("Result")


def on_cluster() -> Runner:
    """Tasks of one CPU each, as many at a time as the cluster has CPUs, or will have where it grows."""
    import ray

    def run(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        task = ray.remote(num_cpus=1)(function)
        references = []

        def submit(item: Item) -> Future[Result]:
            reference = task.remote(item)
            references.append(reference)
            future: Future[Result] = reference.future()
            return future

        at_a_time = max(1, int(capacity.connected().get("CPU", 1)))
        try:
            with _own_errors():
                yield from bounded(submit, items, at_a_time)
        finally:
            cancel_unfinished(references)

    return run


def as_worker(function: Callable[..., Result], *args: object, scale: ScaleConfig) -> Result:
    """What a function returns where a worker would run, with what one asks for.

    Raises:
        UserError: the function raised it.
    """
    import ray

    reference = ray.remote(function).options(**task_options(scale)).remote(*args)
    try:
        with _own_errors():
            answer: Result = ray.get(reference)
            return answer
    finally:
        cancel_unfinished([reference])


def cancel_unfinished(references: list[ray.ObjectRef]) -> None:
    """Cancel the tasks that an error or an interruption has left behind.

    Not those that have ended, or are about to: Ray (2.60) ends the whole process where a cancellation comes while it
    enters a result in its books ("Tried to complete task that was not pending"), and nothing tells when it does.
    """
    import ray

    if not references:
        return
    _, left = ray.wait(references, num_returns=len(references), timeout=_GRACE_S, fetch_local=False)
    for reference in left:
        ray.cancel(reference)


@contextlib.contextmanager
def _own_errors() -> Iterator[None]:
    """A user's mistake comes out of Ray's wrapping, which adds a traceback to its text."""
    from ray.exceptions import RayTaskError

    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise
