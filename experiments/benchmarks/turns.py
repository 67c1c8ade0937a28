"""Runs that take turns by the clock: stopped by SIGSTOP and woken, so that all of them meet the same machine."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import psutil

from mimiclab.progress import PROGRESS, ProgressReader
from mimiclab.runs import folder_of
from mimiclab.schema import Experiment

# Longer than it takes what a worker tells to come to the driver's file.
ARRIVAL_S = 1.0


@contextmanager
def awake(processes: Sequence[psutil.Process]) -> Iterator[None]:
    """Let stopped processes go on for the time of a turn; then workers stop first, and what they told arrives."""
    for process in processes:
        process.resume()
    yield
    stop(processes)


def stop(processes: Sequence[psutil.Process]) -> None:
    """Suspend processes, those that only carry what workers tell a little later."""
    carriers = [process for process in processes if not _is_worker(process)]
    for process in processes:
        if process not in carriers:
            process.suspend()
    time.sleep(ARRIVAL_S)
    for process in carriers:
        process.suspend()


def processes_of(driver: psutil.Process) -> list[psutil.Process]:
    """All processes that a run's driver has started: Ray's own take a tenth of a core even where workers rest."""
    return driver.children(recursive=True)


def num_workers(processes: Sequence[psutil.Process]) -> int:
    """How many of them are Ray Train's workers."""
    return sum(map(_is_worker, processes))


def _is_worker(process: psutil.Process) -> bool:
    return "RayTrainWorker" in " ".join(process.cmdline())


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
