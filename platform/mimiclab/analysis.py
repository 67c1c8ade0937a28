"""How one head fails: which errors, what is taken for what, and on which images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mimiclab.box_errors import KINDS, above, costs, find_errors
from mimiclab.data.coco import CocoDataset
from mimiclab.pictures import MIN_SCORE
from mimiclab.scoring import Detections, Scored, match_any_class


@dataclass(frozen=True, eq=False)
class Analysis:
    """Of a head, over N images and C classes. What is counted are detections of a score of `MIN_SCORE` or more.

    Attributes:
        scored: the metrics.
        costs: AP50 that each kind of `KINDS` costs, over detections of all scores; see box_errors.py.
        counts: (C, kinds) errors by class.
        objects: (C,) that each class has, crowds left out.
        confusion: (C + 1, C + 1) by class of the object and of the detection: what is right, and at IoU 0.5 or more
            what is wrong with the objects that are left, whatever their class. The last row is of detections
            without an object, the last column of objects without a detection.
        found: (N,) objects of an image that a detection of their class is right for.
        false: (N,) detections of an image that are wrong.
        missed: (N,) objects of an image that no detection is right for.
    """

    scored: Scored
    costs: dict[str, float]
    counts: npt.NDArray[np.int64]
    objects: npt.NDArray[np.int64]
    confusion: npt.NDArray[np.int64]
    found: npt.NDArray[np.int64]
    false: npt.NDArray[np.int64]
    missed: npt.NDArray[np.int64]

    def f1(self) -> npt.NDArray[np.float64]:
        """(N,) each image's F1, 2 found / (2 found + false + missed); 1 where nothing was to be found or is."""
        total = 2 * self.found + self.false + self.missed
        return np.where(total > 0, 2 * self.found / np.maximum(total, 1), 1.0)

    def worst(self, num: int) -> list[int]:
        """Positions of at most `num` images with mistakes, by F1, those with more mistakes first among equals."""
        mistakes = self.false + self.missed
        order = np.lexsort((-mistakes, self.f1()))
        return [int(image) for image in order[mistakes[order] > 0][:num]]


def analyse(dataset: CocoDataset, detections: Detections, scored: Scored) -> Analysis:
    """Look into what a head found.

    Args:
        dataset: the truth.
        detections: (D, 7), by image as the data set is.
        scored: of these.
    """
    columns, num_classes = dataset.columns, len(dataset.classes)
    errors = find_errors(columns, dataset.category_ids, detections, scored)
    shown = detections[:, 5] >= MIN_SCORE
    objects = np.flatnonzero(~columns.iscrowd)
    image_of = np.repeat(np.arange(len(columns)), np.diff(columns.offsets))
    right = scored.right & shown
    images = np.searchsorted(columns.ids, detections[:, 0])

    def by_image(positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return np.bincount(positions, minlength=len(columns))

    found = by_image(images[right])
    return Analysis(
        scored=scored,
        costs=dict(zip(KINDS, costs(errors, columns, detections, scored, num_classes), strict=True)),
        counts=above(errors, columns, scored, detections, MIN_SCORE).counts(columns, num_classes),
        objects=np.bincount(columns.labels[objects], minlength=num_classes),
        confusion=_confusion(dataset, detections, scored, errors.labels, shown),
        found=found,
        false=by_image(images[scored.counted & shown & ~right]),
        missed=by_image(image_of[objects]) - found,
    )


def _confusion(
    dataset: CocoDataset,
    detections: Detections,
    scored: Scored,
    labels: npt.NDArray[np.int64],
    shown: npt.NDArray[np.bool_],
) -> npt.NDArray[np.int64]:
    columns, side = dataset.columns, len(dataset.classes) + 1
    right = np.flatnonzero(scored.right & shown)
    wrong = np.flatnonzero(scored.counted & shown & ~scored.right)
    free = np.ones(len(columns.labels), bool)
    free[scored.matched[right]] = False
    matched, counted = match_any_class(dataset, free, detections[wrong])
    free[matched[matched >= 0]] = False
    truth = np.append(columns.labels, side - 1)  # what is matched with -1 is the background's
    unseen = columns.labels[free & ~columns.iscrowd]
    places = [
        labels[right] * side + labels[right],
        truth[matched[counted]] * side + labels[wrong[counted]],
        unseen * side + side - 1,
    ]
    return np.bincount(np.concatenate(places), minlength=side * side).reshape(side, side)
