"""What the verbs say at their end: tables, and where things are."""

from __future__ import annotations

import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from mimiclab.checkpoint import WEIGHTS
from mimiclab.errors import UserError
from mimiclab.runs import PICTURES, Run
from mimiclab.schema import Experiment, Workers
from mimiclab.storage import Storage
from mimiclab.tables import heads_table

if TYPE_CHECKING:
    from mimiclab.data.coco import CocoDataset

# What was found is said for each image of so many, and in sum for more.
_MAX_LINES = 20
# How often progress is said where there is no terminal.
_SECONDS_PER_LINE = 10.0


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


def evaluate_run(
    run: Run,
    console: Console,
    data: str | None = None,
    images: Path | None = None,
    *,
    address: str | None = None,
    verbose: bool = False,
) -> None:
    """Score a run's best weights and print the table.

    Args:
        run: what is scored.
        console: gets the table.
        data: annotation file, or folder or URI of a packed data set; by default the run's validation set.
        images: folder of the images of an annotation file.
        address: of the head of a Ray cluster, where it is scored in the place of one of the run's workers; by default
            in this process.
        verbose: let Ray talk.

    Raises:
        UserError: the data cannot be read, has no object, or has other classes than the run; or see `ray_session`.
    """
    experiment = run.located()
    dataset = _read_data(experiment, data, images)
    if dataset.classes != run.classes:
        raise UserError(
            f"{dataset.origin} has the classes {list(dataset.classes)}, "
            f"expected those that run {run.name} was trained for: {list(run.classes)}"
        )
    console.print(f"evaluating {len(dataset.images)} images of {dataset.origin}", highlight=False)
    if address is None:
        metrics = _score(run, dataset, gpu=torch.cuda.is_available())
    else:
        from mimiclab.cluster.tasks import as_worker
        from mimiclab.session import ray_session

        scale = experiment.scale.model_copy(update={"workers": Workers(min=1, max=1)})
        with ray_session(address, scale, verbose=verbose):
            metrics = as_worker(_score_on_node, run, *_absolute(data, images), scale=scale)
    console.print(heads_table(metrics, f"{run.name}, step {run.best().step}"))


def _absolute(data: str | None, images: Path | None) -> tuple[str | None, Path | None]:
    """The same on a node, where another folder is the current one."""
    where = data if data is None or "://" in data else str(Path(data).absolute())
    return where, images and images.absolute()


def _score_on_node(run: Run, data: str | None, images: Path | None) -> dict[str, float]:
    experiment = run.located()
    torch.set_num_threads(experiment.scale.threads)
    return _score(run, _read_data(experiment, data, images), gpu=experiment.scale.gpu)


def _score(run: Run, dataset: CocoDataset, *, gpu: bool) -> dict[str, float]:
    from mimiclab.evaluate import evaluate
    from mimiclab.predict import load_detector

    experiment = run.located()
    detector = load_detector(run, experiment).to("cuda" if gpu else "cpu")
    result = evaluate(detector, dataset, experiment.data, experiment.eval, rank=0, world=1)
    assert result is not None  # rank 0's
    return result.metrics


def _read_data(experiment: Experiment, data: str | None, images: Path | None) -> CocoDataset:
    from mimiclab.data.coco import read_coco
    from mimiclab.data.shards import read_packed
    from mimiclab.data.splits import read_splits

    if data is None:
        if images is not None:
            raise UserError(f"--images {images}: expected --data with the annotation file that lists them, found none")
        return read_splits(experiment.data).val
    is_file = data.lower().endswith(".json")
    if is_file and images is None:
        raise UserError(f"--data {data}: expected --images with the folder of its images, found none")
    if images is not None and not is_file:
        raise UserError(f"--images {images}: it goes with an annotation file (.json), found --data {data}")
    dataset = read_packed(data) if images is None else read_coco(Path(data), images)
    if dataset.columns.iscrowd.all():
        raise UserError(f"--data {data}: expected at least one object that is no crowd, found none")
    return dataset


def predict_and_show(
    reference: str,
    images: Sequence[Path],
    save: Path,
    console: Console,
    *,
    min_score: float,
    coco: Path | None,
    storage: str,
    tracking: str,
) -> bool:
    """Detect objects in images, with progress, and say what was found.

    Args:
        reference: a run, or a registered model.
        images: files and folders.
        save: folder for what is written.
        console: gets progress and summary.
        min_score: detections below are left out.
        coco: annotation file whose ids results are written with.
        storage: folder or URI that holds runs.
        tracking: MLflow's address, where models are registered.

    Returns:
        Whether every image could be read.
    """
    from mimiclab import runs
    from mimiclab.data.results import read_ids
    from mimiclab.predict import find_images, load_deployed, predict
    from mimiclab.tracking import models

    run = None if reference.startswith(models.SCHEME) else runs.find(reference, storage)
    files = find_images(images, leave_out=save)
    model = models.load(tracking, reference) if run is None else load_deployed(run)
    ids = None if coco is None else read_ids(coco, files, model.classes)
    started = time.perf_counter()
    with _counted(len(files), console) as done:
        answer = predict(
            model,
            files,
            save,
            min_score=min_score,
            ids=ids,
            done=done,
            warn=lambda text: console.print(text, highlight=False),
        )
    seconds = time.perf_counter() - started
    total: Counter[str] = Counter()
    for path, detections in answer.found.items():
        counts = Counter(detection.label for detection in detections)
        total += counts
        if len(files) <= _MAX_LINES:
            console.print(f"{path}: {_spoken(counts)}", highlight=False)
    if len(files) > _MAX_LINES:
        console.print(f"found: {_spoken(total)}", highlight=False)
    skipped = f", {len(answer.skipped)} of them left out" if answer.skipped else ""
    written = "pictures and detections.json" if coco is None else "pictures, detections.json and coco_results.json"
    console.print(
        f"{len(files)} images{skipped}, {len(files) / seconds:.1f} images/s; {written} in {save}", highlight=False
    )
    return not answer.skipped


def _spoken(counts: Counter[str]) -> str:
    return ", ".join(f"{num} {label}" for label, num in sorted(counts.items())) or "nothing"


@contextmanager
def _counted(total: int, console: Console) -> Iterator[Callable[[], None]]:
    """Called after each of `total` images, it moves a bar on a terminal, and says a line now and then elsewhere.

    It may be called from any thread.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if console.is_terminal:
        columns = TextColumn("detecting"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("", total=total)
            yield lambda: progress.advance(task)
        return
    num, started = 0, time.perf_counter()
    said, lock = started, Lock()

    def count() -> None:
        nonlocal num, said
        with lock:
            num += 1
            now = time.perf_counter()
            if num < total and now - said > _SECONDS_PER_LINE:
                said = now
                console.print(f"{num} of {total} images, {num / (now - started):.1f} images/s", highlight=False)

    yield count


def register_and_show(run: Run, alias: str, name: str | None, say: Callable[[str], object]) -> None:
    """Register a run's model, and say how it is used."""
    from mimiclab.tracking import models

    made = models.register(run, alias, name)
    reference = shlex.quote(f"{models.SCHEME}{made.name}@{alias}")
    tracking = shlex.quote(run.tracking)
    say(f"{made.name} version {made.number} is {alias}: run {run.name}, step {run.best().step}")
    say(f"predict: mimiclab predict {reference} IMAGE... --tracking {tracking}")
    # Its command starts uvicorn, which it expects on the path.
    say(
        f"serve:   MLFLOW_TRACKING_URI={tracking} MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false mlflow models serve "
        f"-m {reference} --env-manager local --port 5001   (in the activated environment)"
    )


def show_models(tracking: str, console: Console) -> None:
    """Print a table of registered models."""
    from rich.table import Table

    from mimiclab.tracking import models

    found = models.registered(tracking)
    if not found:
        console.print(f"{tracking}: no model is registered; mimiclab models register RUN does", highlight=False)
        return
    table = Table(*("model", "version", "aliases", "run", "student/AP"))
    for each in found:
        ap = "" if each.ap is None else f"{each.ap:.3f}"
        table.add_row(each.name, str(each.number), ", ".join(each.aliases), each.run, ap)
    console.print(table)


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
