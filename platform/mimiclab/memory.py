"""How much memory this process uses."""

from __future__ import annotations

import psutil
import torch

_PROCESS = psutil.Process()


def memory_mb(device: torch.device) -> dict[str, float]:
    """Resident memory as `memory_mb`; with a GPU the most that tensors have held on it as `gpu_memory_mb`.

    Both are read from books that the system and torch keep anyway: nothing waits for the device. MB are 10^6 bytes.
    """
    found = {"memory_mb": _PROCESS.memory_info().rss / 1e6}
    if device.type == "cuda":
        found["gpu_memory_mb"] = torch.cuda.max_memory_allocated(device) / 1e6
    return found
