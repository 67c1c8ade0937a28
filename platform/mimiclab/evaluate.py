"""How well every head detects, and how fast the deployed one does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from mimicdet.interface import Detector
from mimiclab.analysis import Analysis, analyse
from mimiclab.data.coco import CocoDataset
from mimiclab.data.columns import ImageRecord
from mimiclab.data.dataset import EvalBatches, scale_boxes
from mimiclab.data.loader import load
from mimiclab.data.transforms import resized_size
from mimiclab.engine import evaluate_pass
from mimiclab.latency import Latency
from mimiclab.schema import DataConfig, EvalConfig, Scorer
from mimiclab.scoring import Detections, Scored, Truth, check_scorer

ANALYSED = ("student", "teacher")
"""The heads whose errors are told apart."""

LATENCY = "student/latency_ms"


@dataclass(frozen=True)
class Evaluation:
    """Of a detector on a data set.

    Attributes:
        metrics: such as `student/AP`, `teacher/AP50`, `student/errors/missed`, see box_errors.py; with a teacher
            `gap/AP`; `LATENCY`, see latency.py, where it was measured.
        detections: each head's, (n, 7).
        analyses: of those of `ANALYSED` that there are.
    """

    metrics: dict[str, float]
    detections: dict[str, Detections]
    analyses: dict[str, Analysis]


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
    """Detect on this rank's share of the images, gather once, score one head here and the next on the next rank.

    Every rank has to call it; all but rank 0 get None. `between` is called after every batch.
    """
    check_scorer(config.scorer)
    latency = Latency(detector)
    share = detect(detector, dataset, data, config, rank=rank, world=world, between=between, latency=latency)
    shares: list[dict[str, Detections] | None] = [share]
    if world > 1:
        shares = [None] * world
        dist.all_gather_object(shares, share)
    detections = _gathered([part for part in shares if part is not None])
    # Scoring holds all ranks up, for minutes of a processor core where there are many images.
    own = _judge(dataset, {head: detections[head] for head in list(detections)[rank::world]}, config.scorer)
    judged = {}
    for number, head in enumerate(detections):
        answer = [own.get(head)]
        if world > 1:
            dist.broadcast_object_list(answer, src=number % world)
        assert answer[0] is not None
        judged[head] = answer[0]
    if rank != 0:
        return None
    evaluation = _evaluation(detections, judged)
    return replace(evaluation, metrics={**evaluation.metrics, LATENCY: latency.milliseconds()})


def detect(
    detector: Detector,
    dataset: CocoDataset,
    data: DataConfig,
    config: EvalConfig,
    *,
    rank: int,
    world: int,
    between: Callable[[], object] = lambda: None,
    latency: Latency | None = None,
) -> dict[str, Detections]:
    """Each head's detections (n, 7) on this rank's share of the images; no head where the share is empty.

    `latency` looks at the batches as they pass.
    """
    batches = _batches(dataset, data, batch_size=config.batch_size, rank=rank, world=world)
    items = load(batches, range(len(batches)), processes=data.loader_processes)
    rows: dict[str, list[Detections]] = {}
    passing = items if latency is None else latency.watch(items)
    for item, heads in enumerate(evaluate_pass(detector, passing, topk=config.teacher_topk)):
        for head, answers in heads.items():
            for record, found in zip(batches.records(item), answers, strict=True):
                rows.setdefault(head, []).append(_rows(record, found, dataset, data))
        between()
    return {head: np.concatenate(parts) for head, parts in rows.items()}


def preview(detector: Detector, dataset: CocoDataset, data: DataConfig, config: EvalConfig) -> dict[str, Detections]:
    """Each head's detections on the images of `fixed_positions` alone, before anything is evaluated."""
    batches = _batches(dataset, data, batch_size=1)
    rows: dict[str, list[Detections]] = {}
    for position in fixed_positions(dataset, config.num_pictures):
        (heads,) = evaluate_pass(detector, [batches[position]], topk=config.teacher_topk)
        for head, (found,) in heads.items():
            rows.setdefault(head, []).append(_rows(dataset.images[position], found, dataset, data))
    return {head: np.concatenate(parts) for head, parts in rows.items()}


def fixed_positions(dataset: CocoDataset, num: int) -> list[int]:
    """`num` positions of a data set, spread over it, always the same."""
    return sorted({int(i) for i in np.linspace(0, len(dataset.images) - 1, num)}) if num else []


def score(
    dataset: CocoDataset, shares: Sequence[Mapping[str, Detections]], scorer: Scorer = "pycocotools"
) -> Evaluation:
    """Metrics of each head from what the ranks detected; the same for any dealing of the images to ranks."""
    detections = _gathered(shares)
    return _evaluation(detections, _judge(dataset, detections, scorer))


def _gathered(shares: Sequence[Mapping[str, Detections]]) -> dict[str, Detections]:
    return {
        head: _by_image(np.concatenate([share[head] for share in shares if head in share]))
        for head in dict.fromkeys(head for share in shares for head in share)
    }


def _judge(
    dataset: CocoDataset, detections: Mapping[str, Detections], scorer: Scorer
) -> dict[str, tuple[Scored, Analysis | None]]:
    """The score of each head, and an analysis of those of `ANALYSED`."""
    if not detections:
        return {}
    truth = Truth(dataset, scorer)
    scored = {head: truth.score(found) for head, found in detections.items()}
    return {
        head: (each, analyse(dataset, detections[head], each) if head in ANALYSED else None)
        for head, each in scored.items()
    }


def _evaluation(detections: dict[str, Detections], judged: Mapping[str, tuple[Scored, Analysis | None]]) -> Evaluation:
    scored = {head: each for head, (each, _) in judged.items()}
    analyses = {head: analysis for head, (_, analysis) in judged.items() if analysis is not None}
    metrics = {f"{head}/{name}": value for head, each in scored.items() for name, value in each.metrics.items()}
    if "teacher" in scored:
        compared = scored.get("student_topk", scored["student"])
        metrics["gap/AP"] = scored["teacher"].metrics["AP"] - compared.metrics["AP"]
    for head, analysis in analyses.items():
        metrics.update((f"{head}/errors/{kind}", cost) for kind, cost in analysis.costs.items())
    return Evaluation(metrics, detections, analyses)


def _batches(dataset: CocoDataset, data: DataConfig, *, batch_size: int, rank: int = 0, world: int = 1) -> EvalBatches:
    resize = data.resize
    return EvalBatches(dataset, short=resize.short, long=resize.long, batch_size=batch_size, rank=rank, world=world)


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
