"""What a run keeps of its last evaluation, for people: figures, tables and pictures."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from PIL.Image import Image

from mimiclab.analysis import Analysis
from mimiclab.box_errors import KINDS
from mimiclab.data.coco import CocoDataset
from mimiclab.data.dataset import read_record
from mimiclab.evaluate import Evaluation, detections_of, fixed_positions
from mimiclab.figures import SHOWN_IOUS, draw_confusion, draw_errors, draw_precision_recall
from mimiclab.pictures import Panel, side_by_side, words
from mimiclab.scoring import IOU_THRESHOLDS, RECALLS, Detections
from mimiclab.tracking.keys import picture_keys
from mimiclab.tracking.protocol import Table, Tracker

FOLDER = "evaluation"
"""Of the run's artifacts."""
WORST = f"{FOLDER}/worst"


def log_report(tracker: Tracker, dataset: CocoDataset, evaluation: Evaluation, num_worst: int) -> None:
    """Give a tracker all that is kept; it is drawn when the tracker comes to it.

    Args:
        tracker: of the run.
        dataset: that was evaluated on.
        evaluation: of it.
        num_worst: how many pictures of the images with most mistakes there are; those of no such image say so. See
            `Analysis.worst`.
    """
    analyses, classes = evaluation.analyses, dataset.classes
    tracker.log_file(f"{FOLDER}/precision_recall.png", partial(draw_precision_recall, analyses, classes))
    tracker.log_file(f"{FOLDER}/errors.png", partial(draw_errors, analyses))
    tracker.log_file(f"{FOLDER}/confusion.png", partial(draw_confusion, analyses, classes))
    tracker.log_table(f"{FOLDER}/classes.json", classes_table(analyses, classes))
    tracker.log_table(f"{FOLDER}/precision_recall.json", curves_table(analyses, classes))
    tracker.log_table(f"{FOLDER}/errors.json", errors_table(analyses))
    tracker.log_table(f"{FOLDER}/confusion.json", confusion_table(analyses, classes))
    student = analyses["student"]
    worst = student.worst(num_worst)
    tracker.log_table(f"{FOLDER}/worst.json", worst_table(dataset, student, worst))
    shown = {head: evaluation.detections[head] for head in analyses}
    for place, position in enumerate(worst, start=1):
        tracker.log_file(_picture_name(place), partial(_worst_picture, dataset, shown, position))
    # MLflow removes no file: an earlier evaluation's picture would stay among the last one's.
    for place in range(len(worst) + 1, num_worst + 1):
        tracker.log_file(_picture_name(place), _no_picture)


def classes_table(analyses: Mapping[str, Analysis], classes: Sequence[str]) -> Table:
    """Every head and class: AP, how many objects there are, and errors as counted in `Analysis.counts`."""
    rows: list[list[str | float | None]] = []
    for head, analysis in analyses.items():
        precision = analysis.scored.precision
        for index, name in enumerate(classes):
            known = precision[:, :, index] > -1
            aps = [
                float(part[each].mean()) if each.any() else float("nan")
                for part, each in (
                    (precision[:, :, index], known),
                    *((precision[_row(iou), :, index], known[_row(iou)]) for iou in SHOWN_IOUS),
                )
            ]
            counted = [int(analysis.objects[index]), *map(int, analysis.counts[index])]
            rows.append([head, name, *map(_rounded, aps), *counted])
    return Table(("head", "class", "AP", "AP50", "AP75", "objects", *KINDS), rows)


def curves_table(analyses: Mapping[str, Analysis], classes: Sequence[str]) -> Table:
    """Precision at every tenth of recall, of every head, IoU threshold and class, and the mean of the classes."""
    rows: list[list[str | float | None]] = []
    tenths = slice(None, None, 10)
    for head, analysis in analyses.items():
        for iou in SHOWN_IOUS:
            precision = analysis.scored.precision[_row(iou)]
            known = (precision > -1).all(0)
            curves = {"mean": precision[:, known].mean(1)}
            curves |= {name: precision[:, i] for i, name in enumerate(classes) if known[i]}
            for name, curve in curves.items():
                rows.append([head, name, _rounded(curve.mean()), iou, *map(_rounded, curve[tenths])])
    recalls = (f"precision at recall {recall:.1f}" for recall in RECALLS[tenths])
    return Table(("head", "class", "AP", "IoU", *recalls), rows)


def errors_table(analyses: Mapping[str, Analysis]) -> Table:
    """Every head and kind of error: the AP50 that it costs, and how many there are, see `Analysis`."""
    rows: list[list[str | float | None]] = [
        [head, kind, _rounded(analysis.costs[kind]), int(number)]
        for head, analysis in analyses.items()
        for kind, number in zip(KINDS, analysis.counts.sum(0), strict=True)
    ]
    return Table(("head", "error", "AP50 lost", "number"), rows)


def confusion_table(analyses: Mapping[str, Analysis], classes: Sequence[str]) -> Table:
    """What objects of every class were detected as, the most frequent first; see `Analysis.confusion`."""
    names = [*classes, "background"]
    rows: list[list[str | float | None]] = []
    for head, analysis in analyses.items():
        table = analysis.confusion
        totals = table.sum(1)
        found = sorted(np.argwhere(table).tolist(), key=lambda at: -table[at[0], at[1]])
        for truth, label in found:
            number = int(table[truth, label])
            rows.append([head, names[truth], names[label], number, _rounded(number / totals[truth])])
    return Table(("head", "object", "detected as", "number", "share of the object's class"), rows)


def worst_table(dataset: CocoDataset, student: Analysis, worst: Sequence[int]) -> Table:
    """The images at these positions, with the student's F1 on each and where its picture is."""
    f1 = student.f1()
    rows: list[list[str | float | None]] = [
        [
            dataset.images[position].path.name,
            _rounded(f1[position]),
            int(student.found[position]),
            int(student.missed[position]),
            int(student.false[position]),
            _picture_name(place),
        ]
        for place, position in enumerate(worst, start=1)
    ]
    return Table(("image", "F1", "found", "missed", "false", "picture"), rows)


def validation_pictures(dataset: CocoDataset, detections: Mapping[str, Detections], num: int) -> dict[str, Image]:
    """Pictures of `num` fixed images by their `picture_keys`: ground truth and every head side by side."""
    records = [dataset.images[each] for each in fixed_positions(dataset, num)]
    keys = picture_keys({record.id: record.path.stem for record in records})
    return {keys[record.id]: picture_of(dataset, detections, record.position) for record in records}


def picture_of(dataset: CocoDataset, detections: Mapping[str, Detections], position: int, title: str = "") -> Image:
    """Ground truth and every head's detections on one image, side by side; the title goes over the first."""
    record = dataset.images[position]
    panels = [Panel(title or "ground truth", record.boxes, record.labels)]
    for head, rows in detections.items():
        found = detections_of(rows, record.id, dataset.category_ids)
        panels.append(Panel(head, found["boxes"], found["labels"], found["scores"]))
    pixels = read_record(record).permute(1, 2, 0).numpy()
    return side_by_side(pixels, panels, dataset.classes)


def png(image: Image) -> bytes:
    """As a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _worst_picture(dataset: CocoDataset, detections: Mapping[str, Detections], position: int) -> bytes:
    name = dataset.images[position].path.name
    return png(picture_of(dataset, detections, position, f"{name}: ground truth"))


def _no_picture() -> bytes:
    return png(words("no other image of the last evaluation has mistakes"))


def _picture_name(place: int) -> str:
    # By place, so that the next evaluation's take the place of these.
    return f"{WORST}/{place}.png"


def _row(iou: float) -> int:
    return IOU_THRESHOLDS.index(iou)


def _rounded(value: float) -> float | None:
    # JSON has no NaN: there is nothing to say of a class without objects.
    return None if np.isnan(value) else round(float(value), 4)
