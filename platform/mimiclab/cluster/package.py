"""What a job takes to its cluster: the code that submits it, and its experiment.

Ray would upload the folder the user is in, less what is named as excluded; what nobody thought of (a data set, an
environment, a key) would travel too. So a folder is made with what a job needs and nothing else. Ray unpacks it on
every node and puts it at the head of the module path, so that the code submitted is the code that runs.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Sequence
from pathlib import Path

from mimiclab.errors import UserError
from mimiclab.experiment import resolved_yaml
from mimiclab.schema import Experiment

MODULES = ("mimicdet", "mimiclab")
EXPERIMENT = "experiment.yaml"
LIMIT_MB = 100.0

_LEFT_OUT = ("__pycache__", "*.pyc", ".*")


def stage(experiment: Experiment, folder: Path) -> str:
    """Fill an empty folder with a job's package, and say what is in it.

    Raises:
        UserError: it is too large to upload.
    """
    for name in MODULES:
        shutil.copytree(_source(name), folder / name, ignore=shutil.ignore_patterns(*_LEFT_OUT))
    (folder / EXPERIMENT).write_text(resolved_yaml(experiment))
    files = sorted((path for path in folder.rglob("*") if path.is_file()), key=_megabytes, reverse=True)
    total = sum(map(_megabytes, files))
    if total > LIMIT_MB:
        raise UserError(
            f"the code to upload has {total:.1f} MB, expected at most {LIMIT_MB:g}; its largest files: "
            + _list(files[:3], folder)
        )
    return f"{len(files)} files, {total:.2f} MB; the largest: {_list(files[:3], folder)}"


def _list(files: Sequence[Path], folder: Path) -> str:
    return ", ".join(f"{path.relative_to(folder)} ({_megabytes(path):.2f} MB)" for path in files)


def _megabytes(path: Path) -> float:
    return path.stat().st_size / 1e6


def _source(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent
