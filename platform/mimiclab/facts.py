"""What code ran, with which packages, on what machine: tags that let a run be understood, and repeated."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import socket
import subprocess
from importlib import metadata
from pathlib import Path

import psutil
import torch

import mimiclab
from mimiclab.code import COMMIT_TAG, DIRTY_TAG, running_code

_VERSIONS = ("torch", "ray", "mlflow", "mimiclab")
_LOCK = "requirements.lock"
_GIT_TIMEOUT_S = 10


def facts(device: torch.device) -> dict[str, str]:
    """Tags of the code, the packages, this host and its GPUs, where there are any.

    Args:
        device: that the run computes on.
    """
    checkout = Path(mimiclab.__file__).parents[2]
    found = {
        **git_state(checkout),
        "code.hash": running_code(),
        "lock.sha256": lock_hash(checkout),
        "version.python": platform.python_version(),
    }
    for name in _VERSIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):  # a job's own code travels without being installed
            found[f"version.{name}"] = metadata.version(name)
    found |= {
        "host.name": socket.gethostname(),
        "host.cpu": _cpu_model(),
        "host.cores": str(os.cpu_count()),
        "host.memory_gb": f"{psutil.virtual_memory().total / 1e9:.1f}",
        "device": device.type,
    }
    if device.type == "cuda":
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        found["host.gpus"] = ", ".join(names)
    return found


def git_state(checkout: Path) -> dict[str, str]:
    """The commit, and whether files that git knows have changed since; nothing where there is no git or no repository.

    Args:
        checkout: the repository's top folder; one that merely lies inside of a repository is none.
    """
    if not (checkout / ".git").exists():
        return {}
    commit = _git(checkout, "rev-parse", "HEAD")
    changed = _git(checkout, "status", "--porcelain", "--untracked-files=no")
    if commit is None or changed is None:
        return {}
    return {COMMIT_TAG: commit, DIRTY_TAG: str(bool(changed)).lower()}


def lock_hash(checkout: Path) -> str:
    """The sha256 of requirements.lock, or without one of the names and versions of all that is installed."""
    lock = checkout / _LOCK
    if lock.is_file():
        return hashlib.sha256(lock.read_bytes()).hexdigest()
    installed = sorted({f"{each.name}=={each.version}" for each in metadata.distributions()})
    return hashlib.sha256("\n".join(installed).encode()).hexdigest()


def _git(checkout: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(checkout), "--no-optional-locks", *arguments],
            capture_output=True, text=True, timeout=_GIT_TIMEOUT_S, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):  # no git, or a repository that it does not trust
        return None
    return done.stdout.strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # no Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
