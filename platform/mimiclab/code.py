"""The code that runs, as one number: equal hashes are equal code, submitted or not."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

PACKAGES = ("mimicdet", "mimiclab")
"""What this project consists of, as modules."""

COMMIT_TAG = "mlflow.source.git.commit"
"""Of a run: its commit. MLflow's own, which its tables show as the version."""
DIRTY_TAG = "git.dirty"
"""Of a run: "true" where files had changed since that commit, else "false"."""

_LEFT_OUT = ("__pycache__", "*.pyc", ".*")


def source(package: str) -> Path:
    """The folder of a package's source."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def is_left_out(name: str) -> bool:
    """Whether a file or folder of this name is no part of the code."""
    return any(fnmatch(name, pattern) for pattern in _LEFT_OUT)


def content_hash(folder: Path) -> str:
    """12 hex digits over the names and contents of a folder's files, less byte code and hidden ones."""
    return _digest(_files(folder, folder))


@cache
def running_code() -> str:
    """12 hex digits over the packages that this process runs; the same on every machine that runs the same."""
    return _digest(file for name in PACKAGES for file in _files(source(name), source(name).parent))


def _files(folder: Path, root: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(root)
        if path.is_file() and not any(map(is_left_out, name.parts)):
            yield str(name), path


def _digest(files: Iterable[tuple[str, Path]]) -> str:
    digest = hashlib.sha256()
    for name, path in files:
        digest.update(f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:12]
