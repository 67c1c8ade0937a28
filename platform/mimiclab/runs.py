"""The folder of a run: what it is, how far it came, and its weights.

<storage>/<name>/
    run.json          identity, MLflow run, classes, status
    experiment.yaml   the resolved experiment
    progress.jsonl    what happened, a line an event
    checkpoints/      see checkpoint.py
    pictures/         of the last evaluation
    detections.parquet  of the best one, see detections.py
    unsent.json       metric values that the tracking server did not take, if any
    unsent/           pictures, files and earlier metric values that it did not take, if any
    .lease.json       who trains it now, see lease.py

<storage> is a folder or any URI that pyarrow.fs knows.
"""

from __future__ import annotations

import json
import os
import secrets
import tempfile
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mimiclab.errors import UserError
from mimiclab.experiment import differences, identity, load_experiment, resolved_yaml
from mimiclab.schema import Experiment
from mimiclab.storage import MissingError, Storage, storage_at

if TYPE_CHECKING:
    from mimiclab.checkpoint import Checkpoint

Status = Literal["running", "finished", "failed", "killed"]

RUN, EXPERIMENT = "run.json", "experiment.yaml"
CHECKPOINTS, PICTURES, UNSENT, UNSENT_FILES = "checkpoints", "pictures", "unsent.json", "unsent"


@dataclass(frozen=True)
class Run:
    """A run as its folder describes it."""

    storage: Storage
    """Its folder, local or remote."""
    identity: str
    tracking: str
    """MLflow's address, absolute."""
    mlflow_run_id: str
    classes: tuple[str, ...]
    status: Status
    ledger: dict[str, Any] = field(default_factory=dict)
    """What its restarts cost, see ledger.py."""
    recorded: bool = False
    """Whether the tracking server knows of its end."""

    @property
    def name(self) -> str:
        """Of the run, and of its folder."""
        return self.storage.name.rpartition("/")[2]

    @property
    def folder(self) -> Path:
        """Its folder on this machine's file system.

        Raises:
            UserError: it is on none.
        """
        return _local(self.storage)

    @property
    def checkpoints(self) -> Storage:
        """Folder of the checkpoints."""
        return self.storage / CHECKPOINTS

    def with_status(self, status: Status) -> Run:
        """Record how the run stands."""
        run = replace(self, status=status, recorded=False)
        run.write()
        return run

    def write(self) -> None:
        """Write run.json in one step."""
        record = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "storage"}
        self.storage.write(RUN, json.dumps(record, indent=1).encode())

    def experiment(self) -> Experiment:
        """The resolved experiment that the run trains."""
        return _written(self.storage)

    def best(self) -> Checkpoint:
        """The checkpoint that is best by `eval.metric`; the newest one where none was evaluated.

        Raises:
            UserError: there is no sound checkpoint.
        """
        from mimiclab import checkpoint

        # Weights are verified where they are read; of a bucket, all would be fetched here for nothing.
        newest = checkpoint.latest(self.checkpoints, warn=lambda _: None, deep=False)
        if newest is None:
            raise UserError(
                f"run {self.storage.name}: it has no checkpoint yet, expected one in {self.checkpoints.name}"
            )
        best = newest.meta["best"]
        # Removed where a newer best was saved by a checkpoint that is damaged now.
        return (best and checkpoint.find(self.checkpoints, best["step"], deep=False)) or newest

    def located(self) -> Experiment:
        """The experiment with absolute paths, as the workers had it: it holds from any folder."""
        return Experiment.model_validate(self.best().meta["experiment"])


def root_of(experiment: Experiment) -> Storage:
    """Folder that holds the run of an experiment beside others, local ones absolute.

    Raises:
        UserError: `where.storage` is a URI that nothing is known of.
    """
    where = experiment.where.storage
    if "://" not in where:
        where = os.path.abspath(where)  # noqa: PTH100 (links stay as the user wrote them)
    try:
        return Storage(where)
    except UserError as error:
        raise UserError(f"where.storage: {error}") from error


def storage_of(experiment: Experiment) -> Storage:
    """Folder of the run that an experiment describes; see `root_of`."""
    return root_of(experiment) / experiment.name


def folder_of(experiment: Experiment) -> Path:
    """Folder of the run that an experiment describes, on this machine's file system.

    Raises:
        UserError: it is on none.
    """
    return _local(storage_of(experiment))


def check(experiment: Experiment, *, fresh: bool) -> None:
    """Make sure that the run may have its folder, without touching it.

    Raises:
        UserError: the folder holds another experiment of that name and is not to start anew, or holds something
            that is no run, or cannot be read or written.
    """
    root = root_of(experiment)
    storage = root / experiment.name
    found = _listed(storage)
    if EXPERIMENT not in found:
        # Else --fresh would remove whatever the user keeps under this name.
        if any(not name.startswith(".") for name in found):
            raise UserError(
                f"run {storage.name}: the folder holds something that is no run; expected another name, or the folder "
                "removed"
            )
    elif not fresh:
        before = _written(storage)
        if identity(before) != identity(experiment):
            changed = "\n  ".join(differences(before, experiment))
            raise UserError(
                f"run {storage.name}: it was started from another experiment. What changed:\n  {changed}\n"
                "Give the new one another name, or start anew with --fresh, which removes the old one."
            )
    if storage.local is None:
        _try_to_write(root)
    else:
        place = next(path for path in (storage.local, *storage.local.parents) if path.exists())
        if not (place.is_dir() and os.access(place, os.W_OK)):
            raise UserError(
                f"where.storage: {storage.name} cannot be written: {place} is no folder that you may write to"
            )


def prepare(experiment: Experiment, *, fresh: bool) -> Storage:
    """Make the run's folder, or find it again for the same experiment; `fresh` removes what it holds.

    Hidden files stay: a run that starts anew is still that of the driver which holds its lease.

    Raises:
        UserError: see `check`.
    """
    check(experiment, fresh=fresh)
    storage = storage_of(experiment)
    try:
        if fresh:
            # What makes the folder a run goes last: what is left of one that was stopped here can be removed again.
            for name, size in sorted(storage.sizes().items(), key=lambda item: item[0] == EXPERIMENT):
                if not name.startswith("."):
                    (storage.delete_folder if size is None else storage.delete)(name)
        storage.write(EXPERIMENT, resolved_yaml(experiment).encode())
    except UserError as error:
        raise UserError(f"where.storage: {error}") from error
    return storage


def read(place: Storage | Path) -> Run | None:
    """The run in a folder, None where there is none.

    Raises:
        UserError: its run.json cannot be read.
    """
    storage = storage_at(place)
    try:
        record = json.loads(storage.read(RUN))
        return Run(storage=storage, **{**record, "classes": tuple(record["classes"])})
    except MissingError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"run {storage.name}: {RUN} cannot be read: {error}") from error


def find(reference: str, storage: str = "./runs") -> Run:
    """Find a run by its name, its folder or that one's URI, or its MLflow run id.

    Args:
        reference: any of these.
        storage: folder, or URI, that holds runs.

    Raises:
        UserError: none or several runs answer to the reference, or the place cannot be read.
    """
    place = Storage(storage if "://" in storage else Path(storage).absolute())
    places = [Storage(reference if "://" in reference else Path(reference).absolute())]
    if reference and "/" not in reference:
        places.append(place / reference)
    for each in places:
        if (run := read(each)) is not None:
            return run
    known = [run for run in (read(place / name) for name in _folders(place)) if run is not None]
    matching = [run for run in known if len(reference) >= 6 and run.mlflow_run_id.startswith(reference)]
    if len(matching) > 1:
        names = ", ".join(run.name for run in matching)
        raise UserError(f"run {reference}: several MLflow ids begin so ({names}); expected a longer one, or a name")
    if not matching:
        names = ", ".join(run.name for run in known) or "none"
        shown = storage if place.local is not None else place.name  # without credentials
        raise UserError(f"run {reference}: no such name, id or folder; runs in {shown}: {names}")
    return matching[0]


def _folders(place: Storage) -> list[str]:
    try:
        return sorted(place.folders())
    except MissingError:  # a file
        return []


def _local(storage: Storage) -> Path:
    if storage.local is None:
        raise UserError(f"run {storage.name}: it is not on this machine's file system, where this would work")
    return storage.local


def _try_to_write(root: Storage) -> None:
    """Whether there is such a bucket, and who may write to it, only the attempt tells."""
    name = f".probe-{secrets.token_hex(4)}"
    try:
        root.write(name, b"")
        root.delete(name)
    except UserError as error:
        raise UserError(f"where.storage: {error}") from error


def _listed(storage: Storage) -> dict[str, int | None]:
    """What is in the folder of a run, or would be."""
    try:
        return storage.sizes()
    except MissingError as error:
        raise UserError(
            f"run {storage.name}: a file has this name; expected another name, or the file removed"
        ) from error
    except UserError as error:
        raise UserError(f"where.storage: {error}") from error


def _written(storage: Storage) -> Experiment:
    """The experiment that was written down for a run."""
    with tempfile.TemporaryDirectory(prefix="mimiclab-") as folder:
        file = Path(folder) / EXPERIMENT
        file.write_bytes(storage.read(EXPERIMENT))
        return load_experiment(file).experiment
