"""pycocotools' scorer, without what it does in vain: detections of a class of which their image has no object."""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools.cocoeval import COCOeval

Pair = tuple[int, int]


class PairScorer(COCOeval):  # type: ignore[misc]
    """`COCOeval` of boxes by class, with the same answers.

    Of many classes, most of what is detected on an image is of those that it does not show. Nothing is to be matched
    there; pycocotools sorts and compares all the same, once for each range of areas: with 80 classes a third of its
    time (experiments/results/evaluation.md).
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._plain: dict[Pair, tuple[list[int], list[float], Any]] = {}

    def computeIoU(self, imgId: int, catId: int) -> Any:  # noqa: N802, N803  pycocotools calls it by this name
        """IoU (D, G) of an image's detections and objects of a class."""
        return super().computeIoU(imgId, catId) if self._gts[imgId, catId] else []

    def evaluateImg(self, imgId: int, catId: int, aRng: list[float], maxDet: int) -> dict[str, Any] | None:  # noqa: N802, N803
        """One entry of `evalImgs`."""
        if self._gts[imgId, catId] or not self._dts[imgId, catId]:
            found: dict[str, Any] | None = super().evaluateImg(imgId, catId, aRng, maxDet)
            return found
        ids, scores, areas = self._sorted((imgId, catId), maxDet)
        shape = len(self.params.iouThrs), len(ids)
        outside = (areas < aRng[0]) | (areas > aRng[1])
        return {
            "image_id": imgId,
            "category_id": catId,
            "aRng": aRng,
            "maxDet": maxDet,
            "dtIds": ids,
            "gtIds": [],
            "dtMatches": np.zeros(shape),
            "gtMatches": np.zeros((shape[0], 0)),
            "dtScores": scores,
            "gtIgnore": np.zeros(0),
            "dtIgnore": outside[None].repeat(shape[0], axis=0),
        }

    def _sorted(self, pair: Pair, most: int) -> tuple[list[int], list[float], Any]:
        """Ids, scores and areas of the best detections; the order is kept for the ranges of areas that follow."""
        if pair not in self._plain:
            best = sorted(self._dts[pair], key=lambda each: -each["score"])[:most]
            self._plain[pair] = (
                [each["id"] for each in best],
                [each["score"] for each in best],
                np.array([each["area"] for each in best]),
            )
        return self._plain[pair]
