"""Run a function over items as tasks of the Ray cluster that this process is connected to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import TypeVar

from mimiclab.cluster import capacity
from mimiclab.data.parallel import Runner, bounded
from mimiclab.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


def on_cluster() -> Runner:
    """Tasks of one CPU each, as many at a time as the cluster has CPUs, or will have where it grows."""
    import ray
    from ray.exceptions import RayTaskError

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
            yield from bounded(submit, items, at_a_time)
        except RayTaskError as error:
            if isinstance(error.cause, UserError):  # out of Ray's wrapping, which adds a traceback to its text
                raise error.cause from None
            raise
        finally:
            for reference in references:  # those that an error has left behind; finished ones do not mind
                ray.cancel(reference)

    return run
