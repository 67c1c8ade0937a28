"""Where and with what a benchmark was run, as its results have to tell."""

from __future__ import annotations

import math
import os
from datetime import date
from importlib.metadata import version


def surroundings(*packages: str, device: str = "cpu") -> str:
    """One line: the date, versions of Python and of packages, the processor, memory, and GPUs.

    Args:
        packages: installed ones that take part in what is measured.
        device: cpu or cuda.
    """
    # Only now: a benchmark of memory must not bring torch into what it measures.
    import torch

    from mimiclab.facts import facts

    host = facts(torch.device(device))
    versions = [f"Python {host['version.python']}", *(f"{name} {version(name)}" for name in packages)]
    memory = math.ceil(float(host["host.memory_gb"]))
    machine = f"{host['host.cpu']}, {os.cpu_count()} cores, {memory} GB of memory"
    parts = [date.today().isoformat(), ", ".join(versions), machine, *filter(None, [host.get("host.gpus")])]
    return "; ".join(parts)
