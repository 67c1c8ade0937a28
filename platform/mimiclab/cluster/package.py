"""What a job takes to its cluster: the code that submits it, its experiment, and the versions that it was written for.

Ray would upload the folder the user is in, less what is named as excluded; what nobody thought of (a data set, an
environment, a key) would travel too. So a folder is made with what a job needs and nothing else. Ray unpacks it on
every node and puts it at the head of the module path, so that the code submitted is the code that runs.

A copy stays beside the runs: `jobs resubmit` starts just that again, whatever became of the code here.
"""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path

from mimiclab.cluster import versions
from mimiclab.code import PACKAGES, content_hash, is_left_out, source
from mimiclab.errors import UserError
from mimiclab.experiment import resolved_yaml
from mimiclab.schema import Experiment
from mimiclab.storage import MissingError, Storage

EXPERIMENT = "experiment.yaml"
LIMIT_MB = 100.0

KEPT = ".jobs"
"""Folder of the packages beside the runs; not the name of a run, which begins with a letter or a digit."""

# The oldest that a zip file can say: equal packages are equal files.
_DATE = (1980, 1, 1, 0, 0, 0)


def stage(experiment: Experiment, folder: Path) -> str:
    """Fill an empty folder with a job's package, and say what is in it.

    Raises:
        UserError: it is too large to upload.
    """
    for name in PACKAGES:
        shutil.copytree(
            source(name), folder / name, ignore=lambda _, names: [each for each in names if is_left_out(each)]
        )
    (folder / EXPERIMENT).write_text(resolved_yaml(experiment))
    (folder / versions.FILE).write_text(json.dumps(versions.here()))
    files = sorted((path for path in folder.rglob("*") if path.is_file()), key=_megabytes, reverse=True)
    total = sum(map(_megabytes, files))
    if total > LIMIT_MB:
        raise UserError(
            f"the code to upload has {total:.1f} MB, expected at most {LIMIT_MB:g}; its largest files: "
            + _list(files[:3], folder)
        )
    return f"{len(files)} files, {total:.2f} MB; the largest: {_list(files[:3], folder)}"


def keep(folder: Path, root: Storage) -> str:
    """Keep a staged package beside the runs, and return its name there, which says its content.

    Raises:
        UserError: it cannot be written.
    """
    name = f"{content_hash(folder)}.zip"
    place = root / KEPT
    if name not in place.sizes():
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                file.writestr(zipfile.ZipInfo(str(path.relative_to(folder)), _DATE), path.read_bytes())
        place.write(name, packed.getvalue())
    return name


def restore(name: str, root: Storage, folder: Path) -> None:
    """Fill an empty folder with a package that was kept.

    Raises:
        UserError: it is not there any more, or is not what its name says.
    """
    place = root / KEPT
    try:
        content = place.read(name)
    except MissingError as error:
        raise UserError(f"{place.where(name)}: the package of this job is gone; expected to submit it anew") from error
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as file:
            file.extractall(folder)
    except zipfile.BadZipFile as error:
        raise UserError(f"{place.where(name)}: no package of a job ({error}); expected to submit it anew") from error
    if name != f"{content_hash(folder)}.zip":
        raise UserError(f"{place.where(name)}: it was changed since it was submitted; expected to submit it anew")


def _list(files: Sequence[Path], folder: Path) -> str:
    return ", ".join(f"{path.relative_to(folder)} ({_megabytes(path):.2f} MB)" for path in files)


def _megabytes(path: Path) -> float:
    return path.stat().st_size / 1e6
