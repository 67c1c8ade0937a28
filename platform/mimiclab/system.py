"""How busy a machine is while it trains: CPU, memory, disk, network and GPUs, in MLflow's page of system metrics."""

from __future__ import annotations

import importlib
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch

from mimiclab.tracking.address import sqlite_path
from mimiclab.tracking.keys import as_key
from mimiclab.tracking.protocol import Tracker
from mimiclab.tracking.runs import started
from mimiclab.tracking.writer import MlflowTracker

_CLOSE_TIMEOUT_S = 1.0
_MB = 1e6


class SystemMonitor:
    """Logs samples of this machine from a thread of its own, until it is closed.

    They are no part of a run's exact history: what the server has not taken by the end is lost. A step is a second
    since the run began, over all its restarts.

    Args:
        tracker: gets the samples, and is closed at the end; of nobody else.
        since: gives when the run began, in seconds since 1970; asked again later where it raises.
        every_s: seconds from one sample to the next.
        device: that this process computes on.
    """

    def __init__(self, tracker: Tracker, since: Callable[[], float], every_s: float, device: torch.device) -> None:
        self._tracker = tracker
        self._since = since
        self._every_s = every_s
        self._prefix = f"system/{as_key(socket.gethostname())}/"
        self._device = device
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="system-monitor", daemon=True)
        self._thread.start()

    @classmethod
    def start(cls, uri: str, run_id: str, every_s: float | None, device: torch.device) -> SystemMonitor | None:
        """One for a run in MLflow; None where none is wanted, or this machine does not have the store's file."""
        path = sqlite_path(uri)
        if every_s is None or (path is not None and not path.exists()):
            return None
        return cls(MlflowTracker(uri, run_id), lambda: started(uri, run_id), every_s, device)

    def close(self) -> None:
        """Stop; what is left is sent at once, or not at all."""
        self._closing.set()
        self._thread.join(_CLOSE_TIMEOUT_S)
        self._tracker.close(_CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        since: float | None = None
        sampler = Sampler(self._device)
        while not self._closing.wait(self._every_s):
            try:
                since = self._since() if since is None else since
                step = max(0, int(time.time() - since))
                sample = sampler.sample()
                self._tracker.log_metrics(step, {f"{self._prefix}{name}": value for name, value in sample.items()})
            except Exception:  # the server is away, a disk is gone: there may be more to say next time
                continue


class Sampler:
    """Reads this machine's books; metrics are named as MLflow names its own. For the thread that makes it.

    Args:
        device: whose memory is read where nothing tells of all GPUs, which the package nvidia-ml-py does.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._nvml = _nvml()
        self._network = psutil.net_io_counters()
        psutil.cpu_percent()  # a share of the time since this thread's call before

    def sample(self) -> dict[str, float]:
        """How things stand; CPU use is since the last sample, traffic since the first."""
        memory, disk, network = psutil.virtual_memory(), psutil.disk_usage("/"), psutil.net_io_counters()
        found = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / _MB,
            "system_memory_usage_percentage": memory.percent,
            "disk_usage_percentage": disk.percent,
            "disk_available_megabytes": disk.free / _MB,
        }
        if network and self._network:  # a machine without a network has none
            found["network_receive_megabytes"] = (network.bytes_recv - self._network.bytes_recv) / _MB
            found["network_transmit_megabytes"] = (network.bytes_sent - self._network.bytes_sent) / _MB
        if self._nvml is not None:
            for index in range(self._nvml.nvmlDeviceGetCount()):
                gpu = self._nvml.nvmlDeviceGetHandleByIndex(index)
                held = self._nvml.nvmlDeviceGetMemoryInfo(gpu)
                found |= _memory_of(index, held.used, held.total)
                busy = self._nvml.nvmlDeviceGetUtilizationRates(gpu).gpu
                found[f"gpu_{index}_utilization_percentage"] = float(busy)
        elif self._device.type == "cuda":
            # Of other GPUs torch would ask only by taking memory on them.
            free, total = torch.cuda.mem_get_info(self._device)
            found |= _memory_of(self._device.index or 0, total - free, total)
        return found


def _memory_of(index: int, used: int, total: int) -> dict[str, float]:
    return {
        f"gpu_{index}_memory_usage_megabytes": used / _MB,
        f"gpu_{index}_memory_usage_percentage": 100 * used / total,
    }


def _nvml() -> Any:
    """NVIDIA's management library, ready for use; None where there is none, or no driver."""
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
    except Exception:  # of the library's own kind, which only the library knows
        return None
    return nvml
