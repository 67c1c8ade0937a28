"""Runs that take turns by the clock: stopped by SIGSTOP and woken, so that all of them meet the same machine."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import psutil

from mimiclab.progress import PROGRESS, ProgressReader
from mimiclab.runs import folder_of
from mimiclab.schema import Experiment


@contextmanager
def awake(processes: Sequence[psutil.Process]) -> Iterator[None]:
    """Let stopped processes go on for the time of a turn."""
    for process in processes:
        process.resume()
    yield
    for process in processes:
        process.suspend()


def workers_of(driver: psutil.Process) -> list[psutil.Process]:
    """Ray Train's workers of a run, by the process of its driver."""
    return [p for p in driver.children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]


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
    """Of the steps since the last call, once all of them have arrived."""
    time.sleep(1.0)
    return [event["seconds"] for event in reader.new_events() if event["kind"] == "step"]
