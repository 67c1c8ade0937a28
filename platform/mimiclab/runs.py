"""The folder of a run: what it is, how far it came, and its weights.

<storage>/<name>/
    run.json          identity, MLflow run, classes, status
    experiment.yaml   the resolved experiment
    progress.jsonl    what rank 0 has to say, a line an event
    checkpoints/      see checkpoint.py
    pictures/         of the last evaluation
    unsent.json       metric values that the tracking server did not take, if any
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mimiclab.errors import UserError
from mimiclab.experiment import differences, identity, load_experiment, resolved_yaml
from mimiclab.schema import Experiment

if TYPE_CHECKING:
    from mimiclab.checkpoint import Checkpoint

Status = Literal["running", "finished", "failed", "killed"]

RUN, EXPERIMENT, PROGRESS = "run.json", "experiment.yaml", "progress.jsonl"
CHECKPOINTS, PICTURES, UNSENT = "checkpoints", "pictures", "unsent.json"


@dataclass(frozen=True)
class Run:
    """A run as its folder describes it."""

    folder: Path
    identity: str
    tracking: str
    """MLflow's address, absolute."""
    mlflow_run_id: str
    classes: tuple[str, ...]
    status: Status

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / CHECKPOINTS

    @property
    def progress(self) -> Path:
        """File of progress events."""
        return self.folder / PROGRESS

    def with_status(self, status: Status) -> Run:
        """Record how the run stands."""
        run = replace(self, status=status)
        run.write()
        return run

    def write(self) -> None:
        """Write run.json in one step."""
        record = {key: value for key, value in asdict(self).items() if key != "folder"}
        aside = self.folder / f".{RUN}"
        aside.write_text(json.dumps(record, indent=1))
        aside.replace(self.folder / RUN)

    def experiment(self) -> Experiment:
        """The resolved experiment that the run trains."""
        return load_experiment(self.folder / EXPERIMENT).experiment

    def best(self) -> Checkpoint:
        """The checkpoint of the highest student AP; the newest one where none was evaluated.

        Raises:
            UserError: there is no sound checkpoint.
        """
        from mimiclab import checkpoint

        newest = checkpoint.latest(self.checkpoints, warn=lambda _: None)
        if newest is None:
            raise UserError(f"run {self.folder}: it has no checkpoint yet, expected one in {self.checkpoints}")
        best = newest.meta["best"]
        path = self.checkpoints / f"step-{best['step']:08d}" if best else newest.path
        # Removed where a newer best was saved by a checkpoint that is damaged now.
        return checkpoint.load(path) if path.is_dir() else newest

    def located(self) -> Experiment:
        """The experiment with absolute paths, as the workers had it: it holds from any folder."""
        return Experiment.model_validate(self.best().meta["experiment"])


def folder_of(experiment: Experiment) -> Path:
    """Folder of the run that an experiment describes, absolute."""
    storage = experiment.where.storage
    if "://" in storage:
        raise UserError(f"where.storage: {storage} is a URI, expected a folder that all workers can reach")
    return Path(os.path.abspath(storage)) / experiment.name  # noqa: PTH100 (links stay as the user wrote them)


def check(experiment: Experiment, *, fresh: bool) -> None:
    """Make sure that the run may have its folder, without touching it.

    Raises:
        UserError: the folder holds another experiment of that name and is not to start anew, or holds something
            that is no run, or cannot be written.
    """
    folder = folder_of(experiment)
    written = folder / EXPERIMENT
    if not written.is_file():
        # Else --fresh would remove whatever the user keeps under this name.
        if folder.exists() and not (folder.is_dir() and all(p.name.startswith(".") for p in folder.iterdir())):
            raise UserError(
                f"run {folder}: the folder holds something that is no run; expected another name, or the folder removed"
            )
    elif not fresh:
        before = load_experiment(written).experiment
        if identity(before) != identity(experiment):
            changed = "\n  ".join(differences(before, experiment))
            raise UserError(
                f"run {folder}: it was started from another experiment. What changed:\n  {changed}\n"
                "Give the new one another name, or start anew with --fresh, which removes the old one."
            )
    place = next(path for path in (folder, *folder.parents) if path.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise UserError(f"where.storage: {folder} cannot be written: {place} is no folder that you may write to")


def prepare(experiment: Experiment, *, fresh: bool) -> Path:
    """Make the run's folder, or find it again for the same experiment; `fresh` removes what it holds.

    Raises:
        UserError: see `check`.
    """
    check(experiment, fresh=fresh)
    folder = folder_of(experiment)
    try:
        if fresh and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / f".{EXPERIMENT}"
        aside.write_text(resolved_yaml(experiment))
        aside.replace(folder / EXPERIMENT)
        (folder / CHECKPOINTS).mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"where.storage: {folder} cannot be written: {error.strerror}") from error
    return folder


def read(folder: Path) -> Run | None:
    """The run in a folder, None where there is none.

    Raises:
        UserError: its run.json cannot be read.
    """
    try:
        record = json.loads((folder / RUN).read_text())
        return Run(folder=folder, **{**record, "classes": tuple(record["classes"])})
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"run {folder}: {RUN} cannot be read: {error}") from error


def find(reference: str, storage: str = "./runs") -> Run:
    """Find a run by its name, its folder, or its MLflow run id.

    Raises:
        UserError: none or several runs answer to the reference.
    """
    for folder in (Path(reference), Path(storage) / reference):
        run = read(folder.absolute())
        if run is not None:
            return run
    known = [run for run in map(read, sorted(Path(storage).absolute().glob("*/"))) if run is not None]
    matching = [run for run in known if len(reference) >= 6 and run.mlflow_run_id.startswith(reference)]
    if len(matching) > 1:
        names = ", ".join(run.folder.name for run in matching)
        raise UserError(f"run {reference}: several MLflow ids begin so ({names}); expected a longer one, or a name")
    if not matching:
        names = ", ".join(run.folder.name for run in known) or "none"
        raise UserError(f"run {reference}: no such name, id or folder; runs in {storage}: {names}")
    return matching[0]
