"""One head's detections against the truth: COCO's metrics, and what each box was matched with, by pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mimiclab.data.coco import CocoDataset, coco_ground_truth
from mimiclab.errors import UserError
from mimiclab.schema import Scorer

if TYPE_CHECKING:
    from pycocotools.coco import COCO

    from mimiclab.pairs import PairScorer

# pycocotools' summary, in its order.
SUMMARY = (
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large"),
)
IOU_THRESHOLDS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
"""Of the first axis of `Scored.precision`."""
RECALLS = np.linspace(0, 1, 101)
"""Of its second axis."""

# One detection: image id, x, y, width, height in the image's own pixels, score, category id.
Detections = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Scored:
    """How D detections of one head did.

    Attributes:
        metrics: AP and AR in [0, 1] as pycocotools gives them, and AP per class as `AP/<class>`; without those that
            it answers with -1, of a size or a class of which the data has no object.
        precision: (10, 101, C) by IoU threshold, recall and class, of boxes of all sizes; -1 where a class has no
            object.
        matched: (D,) at IoU 0.5, what a detection was matched with: an object's position in the data set's columns,
            -1 for none.
        counted: (D,) bool, false for what counts neither as right nor as wrong: matched with a crowd, or beyond the
            100 best of its image and class.
    """

    metrics: dict[str, float]
    precision: npt.NDArray[np.float64]
    matched: npt.NDArray[np.int64]
    counted: npt.NDArray[np.bool_]

    @property
    def right(self) -> npt.NDArray[np.bool_]:
        """(D,) bool, the true positives at IoU 0.5."""
        return self.counted & (self.matched >= 0)


def check_scorer(scorer: Scorer) -> None:
    """Make sure that a scorer is there.

    Raises:
        UserError: it is not.
    """
    if scorer == "faster-coco-eval" and find_spec("faster_coco_eval") is None:
        raise UserError(
            "eval.scorer: faster-coco-eval is not installed; expected mimiclab[fast-eval], or pycocotools, which "
            "gives the same numbers"
        )


class Truth:
    """A data set's objects as pycocotools holds them, made once for all heads; no image is read.

    Args:
        dataset: the objects.
        scorer: what computes the metrics; what each detection was matched with comes from pycocotools in any case.

    Raises:
        UserError: the scorer is not installed.
    """

    def __init__(self, dataset: CocoDataset, scorer: Scorer = "pycocotools") -> None:
        self.dataset = dataset
        check_scorer(scorer)
        self.scorer = scorer
        self._coco = _indexed(coco_ground_truth(dataset))

    def score(self, detections: Detections) -> Scored:
        """COCO's metrics of detections (D, 7), as pycocotools gives them."""
        with _silent():
            scorer = matcher = _scorer(self._coco, detections)
            if self.scorer == "faster-coco-eval":
                scorer = _faster_scorer(self._coco.dataset, detections)
                _match_only(matcher)
                matcher.evaluate()
            scorer.evaluate()
            scorer.accumulate()
            scorer.summarize()
        # faster-coco-eval adds metrics of its own after pycocotools'.
        metrics = {name: float(value) for name, value in zip(SUMMARY, scorer.stats[: len(SUMMARY)], strict=True)}
        # (IoU thresholds, recalls, classes, areas, detections): all areas, the most detections.
        precision = scorer.eval["precision"][:, :, :, 0, -1]
        for index, name in enumerate(self.dataset.classes):
            known = precision[:, :, index]
            known = known[known > -1]
            metrics[f"AP/{name}"] = float(known.mean()) if known.size else -1.0
        kept = {name: value for name, value in metrics.items() if value >= 0}
        return Scored(kept, precision, *_matches(matcher, len(detections)))

    def answers(self, detections: Detections) -> list[dict[str, Any] | None]:
        """What pycocotools says of each image of each class, for detections (D, 7) and objects of all sizes.

        Its `evalImgs`: images in order of their ids, class after class; None where an image has nothing of a class.
        """
        with _silent():
            scorer = _scorer(self._coco, detections)
            scorer.params.areaRng = scorer.params.areaRng[:1]
            scorer.params.maxDets = scorer.params.maxDets[-1:]
            scorer.evaluate()
        found: list[dict[str, Any] | None] = scorer.evalImgs
        return found


def match_any_class(
    dataset: CocoDataset, free: npt.NDArray[np.bool_], detections: Detections
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """`Scored.matched` and `Scored.counted` as if all classes were one.

    Args:
        dataset: the truth.
        free: (M,) bool, the objects that may be matched.
        detections: (D, 7).
    """
    content = coco_ground_truth(dataset)
    # Each keeps its id, by which it is known again.
    content["annotations"] = [
        {**each, "category_id": 1} for each, is_free in zip(content["annotations"], free, strict=True) if is_free
    ]
    content["categories"] = [{"id": 1, "name": "object"}]
    classless = detections.copy()
    classless[:, 6] = 1
    with _silent():
        scorer = _scorer(_indexed(content), classless)
        _match_only(scorer)
        scorer.evaluate()
    return _matches(scorer, len(detections))


def _scorer(truth: COCO, detections: Detections) -> PairScorer:
    # Imported where it is used, since it pulls in matplotlib.
    from mimiclab.pairs import PairScorer

    content = {key: truth.dataset[key] for key in ("images", "categories")}
    return PairScorer(truth, _indexed({**content, "annotations": _results(detections)}), "bbox")


def _faster_scorer(truth: dict[str, Any], detections: Detections) -> Any:
    from faster_coco_eval import COCO, COCOeval_faster

    content = {key: truth[key] for key in ("images", "categories")}
    found = COCO({**content, "annotations": _results(detections)})
    return COCOeval_faster(COCO(truth), found, "bbox", print_function=lambda *_: None)


def _match_only(scorer: PairScorer) -> None:
    """Let a scorer look at the first IoU threshold and at objects of all sizes, and at nothing else."""
    scorer.params.iouThrs = np.array(IOU_THRESHOLDS[:1])
    scorer.params.areaRng = scorer.params.areaRng[:1]


def _results(detections: Detections) -> list[dict[str, Any]]:
    """Detections as pycocotools keeps them, with ids from 1."""
    return [
        {
            "id": number,
            "image_id": int(image),
            "bbox": box,
            "area": box[2] * box[3],
            "score": score,
            "category_id": int(category),
            "iscrowd": 0,
        }
        for number, (image, *box, score, category) in enumerate(detections.tolist(), start=1)
    ]


def _indexed(content: dict[str, Any]) -> COCO:
    # Imported where it is used, since it pulls in matplotlib.
    from pycocotools.coco import COCO

    coco = COCO()
    coco.dataset = content
    with _silent():
        coco.createIndex()
    return coco


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep to itself what pycocotools prints as it goes."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _matches(scorer: PairScorer, num: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """(num,) object and whether it counts, at the first IoU threshold and of all areas, by pycocotools' ids from 1."""
    matched = np.full(num, -1, np.int64)
    counted = np.zeros(num, bool)
    num_images, num_areas = len(scorer.params.imgIds), len(scorer.params.areaRng)
    for start in range(0, len(scorer.evalImgs), num_images * num_areas):
        each = [answer for answer in scorer.evalImgs[start : start + num_images] if answer is not None]
        if not each:
            continue
        rows = np.concatenate([answer["dtIds"] for answer in each]).astype(np.int64) - 1
        matched[rows] = np.concatenate([answer["dtMatches"][0] for answer in each]).astype(np.int64) - 1
        counted[rows] = ~np.concatenate([answer["dtIgnore"][0] for answer in each]).astype(bool)
    return matched, counted
