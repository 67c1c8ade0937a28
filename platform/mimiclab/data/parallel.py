"""Run a function over items in parallel, with only so many in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import Protocol, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Runner(Protocol):
    """Runs a function over items and yields what it gives, in any order."""

    def __call__(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Start; the first error ends it and is raised."""


def in_threads(workers: int) -> Runner:
    """Threads of this process: for work that leaves Python's lock to others, as decoding and hashing do."""

    def run(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        with ThreadPoolExecutor(workers) as pool:
            try:
                yield from bounded(lambda item: pool.submit(function, item), items, workers)
            finally:
                pool.shutdown(cancel_futures=True)

    return run


def bounded(submit: Callable[[Item], Future[Result]], items: Iterable[Item], at_a_time: int) -> Iterator[Result]:
    """Submit items so that at most `at_a_time` are under way; yield results as they come."""
    waiting = iter(items)
    running: set[Future[Result]] = set()
    while True:
        running |= {submit(item) for item in islice(waiting, at_a_time - len(running))}
        if not running:
            return
        ready, running = wait(running, return_when=FIRST_COMPLETED)
        for future in ready:
            yield future.result()
