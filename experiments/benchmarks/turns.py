"""Runs that take turns by the clock: stopped by SIGSTOP and woken, so that all of them meet the same machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import psutil

from mimiclab.progress import PROGRESS, ProgressReader
from mimiclab.runs import folder_of
from mimiclab.schema import Experiment

# Longer than it takes what a worker tells to come to the driver's file.
ARRIVAL_S = 1.0


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Attributes:
        measured: the processes that train.
        carriers: what only takes on what those tell, as Ray's own processes, which use a tenth of a core even where
            workers rest. The driver is not among them.
    """

    measured: Sequence[psutil.Process]
    carriers: Sequence[psutil.Process] = ()

    @classmethod
    def of(cls, driver: psutil.Process, *, but: Sequence[int] = ()) -> Side:
        """What a run's driver has started until now, without the process ids `but`."""
        started = [process for process in driver.children(recursive=True) if process.pid not in but]
        workers = [process for process in started if _is_worker(process)]
        return cls(workers, [process for process in started if process not in workers])

    def stop(self) -> None:
        """Suspend what trains, and what carries its news once they have arrived."""
        _each(psutil.Process.suspend, self.measured)
        time.sleep(ARRIVAL_S)
        _each(psutil.Process.suspend, self.carriers)

    def resume(self) -> None:
        """Let all of it go on."""
        _each(psutil.Process.resume, [*self.carriers, *self.measured])

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Let all of it go on for the time of a turn."""
        self.resume()
        try:
            yield
        finally:
            self.stop()


def _each(act: Callable[[psutil.Process], None], processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # Ray ends some of its own
            act(process)


def _is_worker(process: psutil.Process) -> bool:
    try:
        return "RayTrainWorker" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


def follow(experiment: Experiment) -> ProgressReader:
    """Reads a run's events from its beginning on, or from now."""
    path = folder_of(experiment) / PROGRESS
    while not path.exists():
        time.sleep(0.1)
    return ProgressReader(path)


def await_steps(reader: ProgressReader, num: int) -> None:
    """Wait until a run has done so many steps more."""
    while num > 0:
        num -= sum(event["kind"] == "step" for event in reader.new_events())
        time.sleep(0.1)


def seconds_of_steps(reader: ProgressReader) -> list[float]:
    """Of the steps since the last call."""
    return [event["seconds"] for event in reader.new_events() if event["kind"] == "step"]
