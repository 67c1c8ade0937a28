"""COCO metrics of every head, by pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from mimicdet.interface import Detector
from mimiclab.data.coco import CocoDataset, coco_ground_truth
from mimiclab.data.columns import ImageRecord
from mimiclab.data.dataset import EvalBatches, scale_boxes
from mimiclab.data.loader import load
from mimiclab.data.transforms import resized_size
from mimiclab.engine import evaluate_pass
from mimiclab.schema import DataConfig, EvalConfig

# pycocotools' summary, in its order.
SUMMARY = (
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large"),
)

# One detection: image id, x, y, width, height in the image's own pixels, score, category id.
Detections = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Evaluation:
    """Metrics such as `student/AP`, `teacher/AP50`, with a teacher `gap/AP`; each head's detections (n, 7)."""

    metrics: dict[str, float]
    detections: dict[str, Detections]


def evaluate(
    detector: Detector,
    dataset: CocoDataset,
    data: DataConfig,
    config: EvalConfig,
    *,
    rank: int,
    world: int,
    between: Callable[[], object] = lambda: None,
) -> Evaluation | None:
    """Detect on this rank's share of the images, gather once, score on rank 0.

    Every rank has to call it; all but rank 0 get None. `between` is called after every batch.
    """
    share = detect(detector, dataset, data, config, rank=rank, world=world, between=between)
    shares: list[dict[str, Detections] | None] = [share]
    if world > 1:
        shares = [None] * world
        dist.all_gather_object(shares, share)
    return score(dataset, [part for part in shares if part is not None]) if rank == 0 else None


def detect(
    detector: Detector,
    dataset: CocoDataset,
    data: DataConfig,
    config: EvalConfig,
    *,
    rank: int,
    world: int,
    between: Callable[[], object] = lambda: None,
) -> dict[str, Detections]:
    """Each head's detections (n, 7) on this rank's share of the images; no head where the share is empty."""
    batches = EvalBatches(
        dataset,
        short=data.resize.short,
        long=data.resize.long,
        batch_size=config.batch_size,
        rank=rank,
        world=world,
    )
    items = load(batches, range(len(batches)), processes=data.loader_processes)
    rows: dict[str, list[Detections]] = {}
    for item, heads in enumerate(evaluate_pass(detector, items, topk=config.teacher_topk)):
        for head, answers in heads.items():
            for record, found in zip(batches.records(item), answers, strict=True):
                rows.setdefault(head, []).append(_rows(record, found, dataset, data))
        between()
    return {head: np.concatenate(parts) for head, parts in rows.items()}


def score(dataset: CocoDataset, shares: Sequence[Mapping[str, Detections]]) -> Evaluation:
    """Metrics of each head from what the ranks detected; the same for any dealing of the images to ranks."""
    detections = {
        head: _by_image(np.concatenate([share[head] for share in shares if head in share]))
        for head in dict.fromkeys(head for share in shares for head in share)
    }
    scores = {head: coco_metrics(dataset, found) for head, found in detections.items()}
    metrics = {f"{head}/{name}": value for head, values in scores.items() for name, value in values.items()}
    if "teacher" in scores:
        metrics["gap/AP"] = scores["teacher"]["AP"] - scores.get("student_topk", scores["student"])["AP"]
    return Evaluation(metrics, detections)


def coco_metrics(dataset: CocoDataset, detections: Detections) -> dict[str, float]:
    """AP and AR in [0, 1] as pycocotools gives them, and AP per class as `AP/<class>`.

    What pycocotools answers with -1, a size or a class of which the data has no object, is left out.
    """
    # pycocotools prints as it goes; imported here, since it pulls in matplotlib.
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = coco_ground_truth(dataset)
        truth.createIndex()
        found = COCO()
        found.dataset = {
            "images": truth.dataset["images"],
            "categories": truth.dataset["categories"],
            "annotations": [
                {
                    "id": number,
                    "image_id": int(row[0]),
                    "bbox": row[1:5].tolist(),
                    "area": float(row[3] * row[4]),
                    "score": float(row[5]),
                    "category_id": int(row[6]),
                    "iscrowd": 0,
                }
                for number, row in enumerate(detections, start=1)
            ],
        }
        found.createIndex()
        scorer = COCOeval(truth, found, "bbox")
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    metrics = {name: float(value) for name, value in zip(SUMMARY, scorer.stats, strict=True)}
    # (IoU thresholds, recalls, classes, areas, detections): all areas, the most detections.
    precision = scorer.eval["precision"][:, :, :, 0, -1]
    for index, name in enumerate(dataset.classes):
        known = precision[:, :, index]
        known = known[known > -1]
        metrics[f"AP/{name}"] = float(known.mean()) if known.size else -1.0
    return {name: value for name, value in metrics.items() if value >= 0}


def _rows(record: ImageRecord, found: Mapping[str, Tensor], dataset: CocoDataset, data: DataConfig) -> Detections:
    size = resized_size(record.width, record.height, data.resize.short, data.resize.long)
    boxes = scale_boxes(found["boxes"].float().cpu(), record, size)
    xywh = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).double()
    category = torch.tensor(dataset.category_ids, dtype=torch.float64)[found["labels"].cpu()]
    image = torch.full_like(category, record.id)
    rows = torch.cat([image[:, None], xywh, found["scores"].cpu().double()[:, None], category[:, None]], 1)
    return rows.numpy()


def _by_image(rows: Detections) -> Detections:
    # pycocotools breaks ties of score by order: the order must not depend on the number of workers.
    return rows[np.argsort(rows[:, 0], kind="stable")]


def detections_of(rows: Detections, image_id: int, category_ids: Sequence[int]) -> dict[str, npt.NDArray[np.float64]]:
    """One image's detections: boxes (D, 4) xyxy in its own pixels, scores (D,), labels (D,) from 0."""
    own = rows[rows[:, 0] == image_id]
    boxes = np.concatenate([own[:, 1:3], own[:, 1:3] + own[:, 3:5]], 1)
    labels = np.searchsorted(np.asarray(category_ids), own[:, 6])
    return {"boxes": boxes, "scores": own[:, 5], "labels": labels}
