"""What is wrong with detections, in kinds, and how much AP each kind costs.

The kinds and the way to weigh them are those of TIDE (D. Bolya, S. Foley, J. Hays, J. Hoffman, "TIDE: A General Toolbox
for Identifying Object Detection Errors", ECCV 2020, sections 2.2 and 2.3). Right is what pycocotools matches at IoU
0.5. Of a detection that is wrong, the first of these is what it is:

* badly_placed: its best IoU with an object of its class is between 0.1 and 0.5.
* wrong_class: its IoU with an object of another class is 0.5 or more.
* duplicate: its IoU with an object of its class is 0.5 or more, and that object has a better detection.
* background: its IoU with every object is 0.1 or less.
* both: what is left, wrong in class and in place.

An object that is not found is missed, unless a detection of it is wrong_class or badly_placed: it is seen then, and
mending that detection would find it. Crowds are no objects here, and what is matched with them is not wrong.

What a kind costs is the AP at IoU 0.5 that mending it alone would gain: a class or place is put right, which makes the
best such detection of an object not found yet right, and every other one go; wrong detections of the other kinds go;
missed objects are no longer asked for. Kinds hide each other, so the costs do not add up to what lacks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mimiclab.data.columns import Columns
from mimiclab.scoring import RECALLS, Detections, Scored

KINDS = ("missed", "duplicate", "wrong_class", "badly_placed", "both", "background")
"""In the order of all tables."""
_MISSED, _DUPLICATE, _WRONG_CLASS, _BADLY_PLACED, _BOTH, _BACKGROUND = range(len(KINDS))
NONE = -1
"""In place of a kind: right, or does not count."""

_FOREGROUND = 0.5
_BACKGROUND_IOU = 0.1


@dataclass(frozen=True, eq=False)
class BoxErrors:
    """Of D detections and M objects.

    Attributes:
        kind: (D,) index into `KINDS`, or `NONE`.
        meant: (D,) the object that a detection of the wrong class or place is of; -1 for others.
        missed: (M,) bool.
        labels: (D,) class of each detection, from 0.
    """

    kind: npt.NDArray[np.int64]
    meant: npt.NDArray[np.int64]
    missed: npt.NDArray[np.bool_]
    labels: npt.NDArray[np.int64]

    def counts(self, columns: Columns, num_classes: int) -> npt.NDArray[np.int64]:
        """(C, kinds) how many of each there are by class: of the object where it is missed, else of the detection."""
        wrong = self.kind != NONE
        places = np.concatenate(
            [self.labels[wrong] * len(KINDS) + self.kind[wrong], columns.labels[self.missed] * len(KINDS) + _MISSED]
        )
        return np.bincount(places, minlength=num_classes * len(KINDS)).reshape(num_classes, len(KINDS))


def find_errors(columns: Columns, category_ids: tuple[int, ...], detections: Detections, scored: Scored) -> BoxErrors:
    """Tell the kinds of all errors.

    Args:
        columns: the truth.
        category_ids: of its classes, rising.
        detections: (D, 7), by image as the columns are.
        scored: of these.
    """
    from pycocotools import mask

    labels = np.searchsorted(np.asarray(category_ids), detections[:, 6])
    kind = np.full(len(detections), NONE, np.int64)
    meant = np.full(len(detections), -1, np.int64)
    wrong = scored.counted & (scored.matched < 0)
    kind[wrong] = _BACKGROUND
    boxes = columns.boxes.astype(np.float64)
    boxes[:, 2:] -= boxes[:, :2]
    ends = np.searchsorted(detections[:, 0], columns.ids, side="right")
    starts = np.searchsorted(detections[:, 0], columns.ids, side="left")
    for image in np.flatnonzero((starts < ends) & (np.diff(columns.offsets) > 0)).tolist():
        rows = starts[image] + np.flatnonzero(wrong[starts[image] : ends[image]])
        objects = columns.offsets[image] + np.flatnonzero(
            ~columns.iscrowd[columns.offsets[image] : columns.offsets[image + 1]]
        )
        if rows.size and objects.size:
            iou = np.asarray(mask.iou(detections[rows, 1:5], boxes[objects], [0] * len(objects)))
            same = labels[rows][:, None] == columns.labels[objects]
            kind[rows], number = _kinds(iou, same)
            meant[rows] = np.where(number >= 0, objects[number], -1)
    return BoxErrors(kind, meant, _missed(columns, scored, kind, meant), labels)


def above(errors: BoxErrors, columns: Columns, scored: Scored, detections: Detections, score: float) -> BoxErrors:
    """The errors if detections below a score were never made.

    pycocotools serves the best scores first: whether the others are there changes nothing for them.
    """
    kept = detections[:, 5] >= score
    kind, meant = np.where(kept, errors.kind, NONE), np.where(kept, errors.meant, -1)
    return BoxErrors(kind, meant, _missed(columns, scored, kind, meant, kept), errors.labels)


def costs(errors: BoxErrors, columns: Columns, detections: Detections, scored: Scored, num_classes: int) -> list[float]:
    """AP50 that mending each of `KINDS` alone would gain, in [0, 1]; as in TIDE a loss, by rounding, counts as 0."""
    objects = np.bincount(columns.labels[~columns.iscrowd], minlength=num_classes)
    scores, right = detections[:, 5], scored.right
    before = _mean_ap50(scores, errors.labels, right, scored.counted, objects)

    gains = []
    for number, name in enumerate(KINDS):
        labels = errors.labels
        if name == "missed":
            missed = np.bincount(columns.labels[errors.missed], minlength=num_classes)
            after = _mean_ap50(scores, labels, right, scored.counted, objects, asked=objects - missed)
        else:
            of_kind = errors.kind == number
            mended = of_kind & _best_of_unfound(errors.meant, of_kind, scores, scored)
            if name == "wrong_class":
                labels = np.where(mended, columns.labels[errors.meant], labels)
            after = _mean_ap50(scores, labels, right | mended, scored.counted & ~(of_kind & ~mended), objects)
        gains.append(max(0.0, after - before))
    return gains


def _kinds(iou: npt.NDArray[np.float64], same: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.int64], ...]:
    """Kind (n,) of wrong detections from their IoU (n, m) with all objects, and the object that is meant, or -1."""
    own, other = np.where(same, iou, 0.0), np.where(same, 0.0, iou)
    best_own, best_other = own.max(1), other.max(1)
    badly_placed = (best_own >= _BACKGROUND_IOU) & (best_own < _FOREGROUND)
    tests = (
        (badly_placed, _BADLY_PLACED),
        (best_other >= _FOREGROUND, _WRONG_CLASS),
        (best_own >= _FOREGROUND, _DUPLICATE),
        (iou.max(1) <= _BACKGROUND_IOU, _BACKGROUND),
    )
    kind = np.select([test for test, _ in tests], [number for _, number in tests], _BOTH)
    meant = np.where(kind == _BADLY_PLACED, own.argmax(1), np.where(kind == _WRONG_CLASS, other.argmax(1), -1))
    return kind, meant


def _missed(
    columns: Columns,
    scored: Scored,
    kind: npt.NDArray[np.int64],
    meant: npt.NDArray[np.int64],
    kept: npt.NDArray[np.bool_] | None = None,
) -> npt.NDArray[np.bool_]:
    right = scored.right if kept is None else scored.right & kept
    missed: npt.NDArray[np.bool_] = ~columns.iscrowd
    missed[scored.matched[right]] = False
    missed[meant[(kind == _WRONG_CLASS) | (kind == _BADLY_PLACED)]] = False
    return missed


def _best_of_unfound(
    meant: npt.NDArray[np.int64], of_kind: npt.NDArray[np.bool_], scores: npt.NDArray[np.float64], scored: Scored
) -> npt.NDArray[np.bool_]:
    """(D,) whether a detection is the best of its kind of an object that none is right for."""
    best = np.zeros(len(meant), bool)
    rows = np.flatnonzero(of_kind & (meant >= 0))
    rows = rows[~np.isin(meant[rows], scored.matched[scored.right])]
    rows = rows[np.argsort(-scores[rows], kind="stable")]
    _, first = np.unique(meant[rows], return_index=True)
    best[rows[first]] = True
    return best


def _mean_ap50(
    scores: npt.NDArray[np.float64],
    labels: npt.NDArray[np.int64],
    right: npt.NDArray[np.bool_],
    counted: npt.NDArray[np.bool_],
    objects: npt.NDArray[np.int64],
    asked: npt.NDArray[np.int64] | None = None,
) -> float:
    """pycocotools' AP50, a mean over the classes that have objects.

    Args:
        scores: (D,).
        labels: (D,) class.
        right: (D,) bool, true positives.
        counted: (D,) bool; others are passed over.
        objects: (C,) of each class.
        asked: (C,) how many of these are to be found; a class of which none is left is perfect.
    """
    asked = objects if asked is None else asked
    order = np.flatnonzero(counted)
    order = order[np.lexsort((-scores[order], labels[order]))]
    ends = np.searchsorted(labels[order], np.arange(len(objects) + 1))
    found = right[order]
    aps = []
    for label in np.flatnonzero(objects).tolist():
        hits = np.cumsum(found[ends[label] : ends[label + 1]])
        if asked[label] == 0:
            aps.append(1.0)
            continue
        precision = hits / np.arange(1, len(hits) + 1)
        precision = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
        aps.append(float(precision[np.searchsorted(hits / asked[label], RECALLS)].mean()))
    return float(np.mean(aps)) if aps else 0.0
