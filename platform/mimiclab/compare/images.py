"""The part of a comparison that looks at single images: what of it can be done for given runs, and doing it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mimiclab.compare.bootstrap import Paired, paired
from mimiclab.compare.disagreement import Disagreement, disagreements
from mimiclab.compare.entries import Entry
from mimiclab.compare.matches import match
from mimiclab.data.coco import CocoDataset
from mimiclab.detections import KeptDetections, read_detections, write_detections
from mimiclab.errors import UserError

MAX_RUNS = 5
"""More runs are compared by their metrics alone."""

HEAD = "student"
"""What is deployed."""


@dataclass(frozen=True)
class Options:
    """How images are looked at."""

    min_score: float = 0.3
    """Detections below are not shown, and count for no disagreement."""
    num_images: int = 5
    """How many images of disagreement are named."""
    num_resamples: int = 1000
    """Of the bootstrap."""
    seed: int = 0
    """Of the resamples."""
    evaluate: bool = False
    """Evaluate the runs that keep no detections, which takes as long as `mimiclab evaluate`."""


@dataclass(frozen=True, eq=False)
class ByImage:
    """Runs on the same images."""

    runs: tuple[Entry, ...] = ()
    """Those that could be paired, the first run first; empty where none could be."""
    kept: tuple[KeptDetections, ...] = ()
    """Of each of them."""
    paired: tuple[Paired, ...] = ()
    """Each but the first against it."""
    disagreements: tuple[Disagreement, ...] = ()
    dataset: CocoDataset | None = None
    left_out: list[str] = field(default_factory=list)
    """Why this part, or a run, is left out; one sentence each."""


def by_image(entries: Sequence[Entry], options: Options, say: Callable[[str], object]) -> ByImage:
    """Compare runs image by image with the first, as far as their folders have what that needs.

    Args:
        entries: of the comparison.
        options: how.
        say: gets a line before what takes long.
    """
    left_out: list[str] = []
    nothing = ByImage(left_out=left_out)
    if len(entries) > MAX_RUNS:
        left_out.append(
            f"{len(entries)} runs are compared by their metrics alone; up to {MAX_RUNS}, image by image as well"
        )
        return nothing
    runs, kept = [], []
    for entry in entries:
        try:
            runs.append(entry)
            kept.append(_kept(entry, options, say))
        except UserError as error:
            runs.pop()
            left_out.append(f"not compared image by image: {error}")
            if entry is entries[0]:
                return nothing
    for entry, each in list(zip(runs, kept, strict=True))[1:]:
        if each.content != kept[0].content:
            left_out.append(
                f"not compared image by image: {entry.label} was evaluated on another validation set than "
                f"{entries[0].label}"
            )
            runs.remove(entry)
            kept.remove(each)
    if len(runs) < 2:
        return nothing
    try:
        dataset = _validation_set(runs[0])
        if dataset.columns.digest() != kept[0].content:
            raise UserError(f"{dataset.origin} is not what it was when {runs[0].label} was evaluated")
    except UserError as error:
        left_out.append(f"not compared image by image: the validation set is needed for it: {error}")
        return nothing
    say(f"matching the detections of {len(runs)} runs on {len(dataset.images)} images")
    matches = [match(dataset, each.heads[HEAD]) for each in kept]
    return ByImage(
        tuple(runs),
        tuple(kept),
        tuple(paired(matches[0], matches[1:], dataset.classes, num=options.num_resamples, seed=options.seed)),
        tuple(disagreements(dataset.columns, matches, options.min_score, options.num_images)),
        dataset,
        left_out,
    )


def save_pictures(images: ByImage, folder: Path, min_score: float) -> list[Path]:
    """Draw each image of disagreement with the truth and every run side by side; the first is that of most.

    Raises:
        UserError: an image cannot be read, or a picture not be written.
    """
    from mimiclab.data.dataset import read_record
    from mimiclab.evaluate import detections_of
    from mimiclab.pictures import Panel, side_by_side

    dataset = images.dataset
    written: list[Path] = []
    for rank, each in enumerate(images.disagreements, start=1):
        assert dataset is not None
        record = dataset.images[each.position]
        panels = [Panel("ground truth", record.boxes, record.labels)]
        for entry, kept in zip(images.runs, images.kept, strict=True):
            found = detections_of(kept.heads[HEAD], record.id, dataset.category_ids)
            panels.append(Panel(entry.label, found["boxes"], found["labels"], found["scores"]))
        pixels = read_record(record).permute(1, 2, 0).numpy()
        path = folder / f"{rank:02d}-{record.path.stem}.png"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            side_by_side(pixels, panels, dataset.classes, min_score).save(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
        written.append(path)
    return written


def _kept(entry: Entry, options: Options, say: Callable[[str], object]) -> KeptDetections:
    if entry.run is None:
        raise UserError(f"MLflow alone has {entry.label}, and its detections are in its folder")
    kept = read_detections(entry.run.storage)
    if kept is None and options.evaluate:
        kept = _evaluate(entry, say)
    if kept is None:
        raise UserError(
            f"{entry.label} keeps no detections, as it was not evaluated yet, or by an earlier version; --evaluate "
            "makes them"
        )
    if HEAD not in kept.heads:
        raise UserError(f"{entry.label} has no detections of the {HEAD}")
    return kept


def _evaluate(entry: Entry, say: Callable[[str], object]) -> KeptDetections:
    """Do what training does at a best evaluation, with the best weights."""
    from mimiclab.evaluate import evaluate
    from mimiclab.predict import load_detector

    run = entry.run
    assert run is not None
    experiment, dataset, step = run.located(), _validation_set(entry), run.best().step
    say(f"evaluating {entry.label}, step {step}, on {len(dataset.images)} images")
    result = evaluate(load_detector(run, experiment), dataset, experiment.data, experiment.eval, rank=0, world=1)
    assert result is not None  # rank 0's
    kept = KeptDetections(step, dataset.columns.digest(), result.detections)
    write_detections(run.storage, kept.heads, step=step, content=kept.content)
    return kept


def _validation_set(entry: Entry) -> CocoDataset:
    from mimiclab.data.splits import read_splits

    assert entry.run is not None
    data = entry.run.located().data
    # The training set may be large, and is of no use here.
    return read_splits(data.model_copy(update={"train": data.val})).val
