"""What the verbs say at their end: tables, and where things are."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from mimiclab.checkpoint import WEIGHTS
from mimiclab.errors import UserError
from mimiclab.runs import PICTURES, Run
from mimiclab.schema import Experiment
from mimiclab.storage import Storage
from mimiclab.tables import heads_table


def show_result(run: Run, experiment: Experiment, console: Console) -> None:
    """The best evaluation of a run, and where its weights, pictures and page are."""
    from mimiclab.tracking.ui import place_of

    best = run.best()
    title = f"{run.name}, best at step {best.step}, {len(run.classes)} classes"
    console.print(heads_table(best.meta["metrics"], title))
    for name, where in (
        ("weights", _shown(best.storage, WEIGHTS)),
        ("pictures", _shown(run.storage, PICTURES)),
        ("MLflow", place_of(run.tracking, run.mlflow_run_id)),
        ("try it", f"mimiclab predict {_reference(run, experiment)} IMAGE..."),
    ):
        console.print(f"{name + ':':10}{where}", highlight=False)


def evaluate_run(run: Run, console: Console) -> None:
    """Score a run's best weights on its validation set and print the table."""
    from mimiclab.data.splits import read_splits
    from mimiclab.evaluate import evaluate
    from mimiclab.predict import load_detector

    experiment = run.located()
    splits = read_splits(experiment.data)
    if splits.val.classes != run.classes:
        raise UserError(
            f"{splits.val.origin} has the classes {list(splits.val.classes)}, "
            f"expected those that run {run.name} was trained for: {list(run.classes)}"
        )
    console.print(f"evaluating {len(splits.val.images)} images of {splits.val.origin}", highlight=False)
    detector = load_detector(run, experiment)
    result = evaluate(detector, splits.val, experiment.data, experiment.eval, rank=0, world=1)
    assert result is not None  # rank 0's
    console.print(heads_table(result.metrics, f"{run.name}, step {run.best().step}"))


def predict_and_show(run: Run, images: Sequence[Path], save: Path, min_score: float, console: Console) -> None:
    """Detect objects in images, with progress, and say what was found."""
    from rich.progress import track

    from mimiclab.predict import find_images, predict

    files = find_images(images)
    started = time.perf_counter()
    steps = iter(track(files, console=console, description="detecting", disable=not console.is_terminal))
    next(steps)  # the bar starts at the first image and moves on when it is done
    results = predict(run, files, save, min_score=min_score, done=lambda: next(steps, None))
    seconds = time.perf_counter() - started
    for path, detections in results.items():
        counts: dict[str, int] = {}
        for detection in detections:
            counts[detection.label] = counts.get(detection.label, 0) + 1
        found = ", ".join(f"{num} {label}" for label, num in sorted(counts.items())) or "nothing"
        console.print(f"{path}: {found}", highlight=False)
    console.print(
        f"{len(files)} images, {len(files) / seconds:.1f} images/s; pictures and detections.json in {save}",
        highlight=False,
    )


def _shown(storage: Storage, name: str) -> str:
    return storage.where(name) if storage.local is None else _short(storage.local / name)


def _short(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _reference(run: Run, experiment: Experiment) -> str:
    """How the run is named on a command line: by name where that finds it, else by folder."""
    if run.storage.local is None:
        return f"{run.name} --storage {shlex.quote(experiment.where.storage)}"
    default = Path("./runs").absolute()
    return run.name if run.folder.parent == default else _short(run.folder)
