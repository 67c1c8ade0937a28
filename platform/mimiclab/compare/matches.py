"""Which detections pycocotools counts as right, image by image: what AP over any choice of images follows from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mimiclab.data.coco import CocoDataset
from mimiclab.scoring import IOU_THRESHOLDS, Detections, Truth


@dataclass(frozen=True, eq=False)
class ClassMatches:
    """The D detections of one class in N images, the best score first; equal scores in order of images.

    Attributes:
        images: (D,) position of the image of each.
        scores: (D,) falling.
        right: (T, D) whether it found an object, at each IoU threshold.
        ignored: (T, D) whether it counts neither as right nor as wrong: it lies on a crowd.
        objects: (N,) how many objects are to be found in each image.
    """

    images: npt.NDArray[np.int32]
    scores: npt.NDArray[np.float64]
    right: npt.NDArray[np.bool_]
    ignored: npt.NDArray[np.bool_]
    objects: npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Matches:
    """The detections of one head against N images with M objects.

    Attributes:
        classes: Of each class of the data set, in its order.
        found: (M,) the score of the detection that found each object at an IoU of 0.5; -1 where none did.
    """

    classes: tuple[ClassMatches, ...]
    found: npt.NDArray[np.float64]

    @property
    def num_images(self) -> int:
        """N."""
        return len(self.classes[0].objects)


def match(dataset: CocoDataset, detections: Detections) -> Matches:
    """Match detections (n, 7) with the objects of a data set, by pycocotools, over objects of all sizes.

    This takes about as long as scoring them; everything after it is arithmetic.
    """
    found = Truth(dataset).answers(detections)
    num = len(dataset.columns)
    scores = np.full(len(dataset.columns.boxes), -1.0)
    classes = []
    for index in range(len(dataset.classes)):
        # In order of image ids, which is that of the columns.
        answers = found[index * num : (index + 1) * num]
        classes.append(_of_class(answers))
        for answer in filter(None, answers):
            by_id = dict(zip(answer["dtIds"], answer["dtScores"], strict=True))
            for number, by, ignored in zip(answer["gtIds"], answer["gtMatches"][0], answer["gtIgnore"], strict=True):
                if by and not ignored:
                    scores[number - 1] = by_id[int(by)]
    return Matches(tuple(classes), scores)


def _of_class(answers: list[dict[str, npt.NDArray[np.float64]] | None]) -> ClassMatches:
    known = [(position, answer) for position, answer in enumerate(answers) if answer is not None]
    objects = np.zeros(len(answers), np.int64)
    for position, answer in known:
        objects[position] = np.count_nonzero(np.asarray(answer["gtIgnore"]) == 0)
    empty = np.zeros((len(IOU_THRESHOLDS), 0), bool)
    images = np.repeat([position for position, _ in known], [len(answer["dtScores"]) for _, answer in known])
    scores = np.concatenate([np.zeros(0), *(answer["dtScores"] for _, answer in known)])
    ignored = np.concatenate([empty, *(np.asarray(answer["dtIgnore"], bool) for _, answer in known)], 1)
    matched = np.concatenate([empty, *(answer["dtMatches"] > 0 for _, answer in known)], 1)
    # As pycocotools sorts them.
    order = np.argsort(-scores, kind="stable")
    return ClassMatches(
        images[order].astype(np.int32), scores[order], (matched & ~ignored)[:, order], ignored[:, order], objects
    )
