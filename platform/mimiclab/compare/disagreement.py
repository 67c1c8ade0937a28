"""The images on which runs disagree most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mimiclab.compare.matches import Matches
from mimiclab.data.columns import Columns


@dataclass(frozen=True)
class Disagreement:
    """What R runs made of one image, counting the detections that a picture would show."""

    position: int
    """Of the image in the data set."""
    num_objects: int
    """To be found in it, crowds aside."""
    num_disputed: int
    """Objects that some runs found and some did not."""
    found: tuple[int, ...]
    """Objects that each run found, at an IoU of 0.5."""
    wrong: tuple[int, ...]
    """Detections of each run that are none of an object's."""


def disagreements(columns: Columns, runs: Sequence[Matches], min_score: float, num: int) -> list[Disagreement]:
    """The images on which runs disagree most, at most `num`, those with more of it first.

    An image counts the objects that some runs found and some did not, and how far apart the runs are in the number of
    their wrong detections.

    Args:
        columns: the data set.
        runs: of the same data set, two or more.
        min_score: detections below it are left out.
        num: how many images.
    """
    owners = np.repeat(np.arange(len(columns)), np.diff(columns.offsets))
    hits = np.stack([(each.found >= min_score) & (each.found >= 0) for each in runs])

    def per_image(chosen: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        return np.bincount(owners[chosen], minlength=len(columns))

    disputed = per_image(np.any(hits, 0) & ~np.all(hits, 0))
    found = np.stack([per_image(hit) for hit in hits])
    wrong = np.stack([_wrong(each, min_score) for each in runs])
    much = disputed + wrong.max(0) - wrong.min(0)
    order = np.argsort(-much, kind="stable")[:num]
    num_objects = per_image(~columns.iscrowd)
    return [
        Disagreement(
            int(image),
            int(num_objects[image]),
            int(disputed[image]),
            tuple(found[:, image].tolist()),
            tuple(wrong[:, image].tolist()),
        )
        for image in order
        if much[image]
    ]


def _wrong(matches: Matches, min_score: float) -> npt.NDArray[np.int64]:
    """(N,) wrong detections at an IoU of 0.5."""
    num = np.zeros(matches.num_images, np.int64)
    for each in matches.classes:
        shown = (each.scores >= min_score) & ~each.right[0] & ~each.ignored[0]
        num += np.bincount(each.images[shown], minlength=matches.num_images)
    return num
