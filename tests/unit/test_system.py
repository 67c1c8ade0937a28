"""How busy a machine is, as a run records it."""

import mmap
import socket
import time
from pathlib import Path

import pytest
import torch

from mimiclab.memory import memory_mb
from mimiclab.system import Sampler, SystemMonitor
from mimiclab.tracking import runs
from mimiclab.tracking.client import connect
from mimiclab.tracking.keys import as_key
from mimiclab.tracking.protocol import MemoryTracker

CPU = torch.device("cpu")


def wait_for_rows(tracker: MemoryTracker, num: int) -> None:
    deadline = time.monotonic() + 30
    while len(tracker.rows) < num:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_sample_is_of_this_machine() -> None:
    sampler = Sampler(CPU)
    sum(range(3_000_000))
    sample = sampler.sample()
    assert 0 < sample["system_memory_usage_percentage"] < 100
    assert 0 <= sample["cpu_utilization_percentage"] <= 100
    assert sample["disk_available_megabytes"] > 0
    assert sample.get("network_receive_megabytes", 0) >= 0
    assert not [name for name in sample if name.startswith("gpu_0_utilization") and not torch.cuda.is_available()]


@pytest.mark.slow
def test_samples_come_by_the_second_of_the_run_until_it_is_closed() -> None:
    tracker = MemoryTracker()
    asked = []

    def since() -> float:
        asked.append(1)
        if len(asked) < 3:
            raise ConnectionError("the server is away")
        return time.time() - 1000

    monitor = SystemMonitor(tracker, since, 0.05, CPU)
    wait_for_rows(tracker, 5)
    sum(range(3_000_000))  # somebody is busy
    wait_for_rows(tracker, len(tracker.rows) + 20)
    monitor.close()
    assert max(row.value for row in tracker.rows if row.key.endswith("cpu_utilization_percentage")) > 0
    num = len(tracker.rows)
    time.sleep(0.2)
    assert len(tracker.rows) == num
    assert len(asked) == 3
    assert {row.key.rpartition("/")[0] for row in tracker.rows} == {f"system/{as_key(socket.gethostname())}"}
    assert all(1000 <= row.step < 1100 for row in tracker.rows)


@pytest.mark.slow
def test_a_monitor_writes_to_mlflow_and_is_off_where_none_is_wanted(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    run_id = runs.open_run(uri, "cells", "a", "abc", {}, {})
    assert SystemMonitor.start(uri, run_id, None, CPU) is None
    # The store's file is on another machine: it would be made here, and nobody would look at it.
    assert SystemMonitor.start(f"sqlite:///{tmp_path}/gone.db", run_id, 10, CPU) is None
    assert not (tmp_path / "gone.db").exists()

    monitor = SystemMonitor.start(uri, run_id, 0.1, CPU)
    assert monitor is not None
    deadline = time.monotonic() + 30
    while not (found := connect(uri).get_run(run_id).data.metrics) and time.monotonic() < deadline:
        time.sleep(0.2)
    monitor.close()
    assert f"system/{as_key(socket.gethostname())}/cpu_utilization_percentage" in found


def test_the_memory_of_this_process_is_resident_memory() -> None:
    before = memory_mb(CPU)
    # Of the system's own: a tensor may lie where earlier tests have left room in the process.
    with mmap.mmap(-1, 160_000_000) as held:
        for page in range(0, len(held), mmap.PAGESIZE):
            held[page] = 1
        after = memory_mb(CPU)
    assert before.keys() == {"memory_mb"}
    assert 140 < after["memory_mb"] - before["memory_mb"] < 400
