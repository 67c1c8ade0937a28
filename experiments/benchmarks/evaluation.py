"""What scoring an evaluation costs: ours against pycocotools alone, on the same synthetic detections, in turns.

    python experiments/benchmarks/evaluation.py [--images 5000] [--classes 80] [--rounds 3] [--output FILE]

The sides start from the same arrays: COCO's metrics alone by pycocotools, used as its demo uses it; an evaluation's
score, which adds each class's AP and what every detection was matched with; and the score with the analysis of errors
that an evaluation logs, by each `eval.scorer`. All metrics are compared with pycocotools'. No side uses threads;
seconds are CPU time. Peak memory is that of a process of each side's own, which holds the data too.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import multiprocessing.connection
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from machine import surroundings

from mimiclab.analysis import analyse
from mimiclab.data.coco import CocoDataset, coco_ground_truth
from mimiclab.data.columns import Columns, ImageFiles
from mimiclab.schema import Scorer
from mimiclab.scoring import SUMMARY, Detections, Truth

# Of COCO's val2017: 36,781 objects on 5,000 images, and 1.2 % of them crowds.
OBJECTS_PER_IMAGE, CROWDS = 7.36, 0.012
DETECTIONS_PER_IMAGE = 100
PEER = "pycocotools alone"


def main() -> None:
    """Run the benchmark and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="file for the Markdown; it is printed anyway")
    args = parser.parse_args()
    dataset, detections = synthetic(args.images, args.classes)
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    metrics: dict[str, dict[str, float]] = {}
    for number in range(args.rounds):
        for name in list(SIDES)[:: 1 if number % 2 else -1]:
            started = time.process_time()
            metrics[name] = SIDES[name](dataset, detections)
            seconds[name].append(time.process_time() - started)
    memory = {name: _memory_mb(name, args.images, args.classes) for name in SIDES}
    text = "\n".join(_table(args, len(detections), seconds, metrics, memory)) + "\n"
    print(text)
    if args.output:
        args.output.write_text(text)


def synthetic(num_images: int, num_classes: int) -> tuple[CocoDataset, Detections]:
    """A data set like COCO's in number and size of its objects, and a detector's answers: 100 boxes an image.

    Most objects are found once or twice, some as another class; the other boxes are anywhere, with low scores.
    """
    rng = np.random.default_rng(0)
    counts = rng.poisson(OBJECTS_PER_IMAGE, num_images)
    total = int(counts.sum())
    offsets = np.concatenate([[0], np.cumsum(counts)])
    side = np.array([640.0, 480.0])
    size = np.clip(np.exp(rng.normal(4.0, 1.0, (total, 2))), 4, side * 0.9)
    corner = rng.uniform(0, 1, (total, 2)) * (side - size)
    boxes = np.concatenate([corner, corner + size], 1).astype(np.float32)
    labels = rng.integers(num_classes, size=total)
    columns = Columns(
        ids=np.arange(1, num_images + 1),
        widths=np.full(num_images, 640, np.int32),
        heights=np.full(num_images, 480, np.int32),
        names=np.array([f"{number}.jpg" for number in range(num_images)], dtype=np.dtypes.StringDType()),
        offsets=offsets,
        boxes=boxes,
        labels=labels,
        iscrowd=rng.uniform(size=total) < CROWDS,
        areas=(size[:, 0] * size[:, 1] * rng.uniform(0.4, 0.9, total)).astype(np.float32),
        annotation_ids=np.arange(1, total + 1),
    )
    category_ids = tuple(range(1, num_classes + 1))
    dataset = CocoDataset(
        "synthetic",
        tuple(f"class {each}" for each in category_ids),
        category_ids,
        columns,
        ImageFiles(Path(), columns.names),
    )
    rows = [_answers(rng, dataset, image, side) for image in range(num_images)]
    return dataset, np.concatenate(rows)


def _answers(
    rng: np.random.Generator, dataset: CocoDataset, image: int, side: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """(100, 7) of one image, the best first."""
    columns, num_classes = dataset.columns, len(dataset.classes)
    objects = np.arange(columns.offsets[image], columns.offsets[image + 1])
    found = rng.choice(objects, size=min(2 * len(objects), DETECTIONS_PER_IMAGE)) if len(objects) else objects
    truth = columns.boxes[found].astype(np.float64)
    xywh = np.concatenate([truth[:, :2], truth[:, 2:] - truth[:, :2]], 1)
    xywh[:, :2] += xywh[:, 2:] * rng.normal(0, 0.1, (len(found), 2))
    xywh[:, 2:] *= np.exp(rng.normal(0, 0.15, (len(found), 2)))
    right = rng.uniform(size=len(found)) < 0.85
    labels = np.where(right, columns.labels[found], rng.integers(num_classes, size=len(found)))
    rest = DETECTIONS_PER_IMAGE - len(found)
    size = np.exp(rng.normal(4.0, 1.0, (rest, 2)))
    xywh = np.concatenate([xywh, np.concatenate([rng.uniform(0, 1, (rest, 2)) * side, size], 1)])
    labels = np.concatenate([labels, rng.integers(num_classes, size=rest)])
    scores = np.concatenate([rng.beta(3, 2, len(found)), rng.beta(1, 8, rest)]).astype(np.float32)
    order = np.argsort(-scores, kind="stable")
    rows = np.concatenate([np.full((DETECTIONS_PER_IMAGE, 1), columns.ids[image]), xywh, scores[:, None]], 1)
    return np.concatenate([rows, np.asarray(dataset.category_ids)[labels][:, None]], 1)[order]


def _pycocotools(dataset: CocoDataset, detections: Detections) -> dict[str, float]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = coco_ground_truth(dataset)
        truth.createIndex()
        scorer = COCOeval(truth, truth.loadRes(detections), "bbox")
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return dict(zip(SUMMARY, scorer.stats.tolist(), strict=True))


def _scored(dataset: CocoDataset, detections: Detections) -> dict[str, float]:
    return Truth(dataset).score(detections).metrics


def _analysed(scorer: Scorer, dataset: CocoDataset, detections: Detections) -> dict[str, float]:
    scored = Truth(dataset, scorer).score(detections)
    analyse(dataset, detections, scored)
    return scored.metrics


SIDES: dict[str, Callable[[CocoDataset, Detections], dict[str, float]]] = {
    PEER: _pycocotools,
    "score": _scored,
    "score and analysis": partial(_analysed, "pycocotools"),
    "the same, `eval.scorer: faster-coco-eval`": partial(_analysed, "faster-coco-eval"),
}


def _memory_mb(name: str, num_images: int, num_classes: int) -> float:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_peak, args=(name, num_images, num_classes, there))
    process.start()
    found: float = here.recv()
    process.join()
    return found


def _peak(name: str, num_images: int, num_classes: int, connection: multiprocessing.connection.Connection) -> None:
    dataset, detections = synthetic(num_images, num_classes)
    SIDES[name](dataset, detections)
    # Of this program alone; getrusage's maximum begins with that of the process that started it.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    connection.send(int(status["VmHWM"].split()[0]) / 1024)


def _table(
    args: argparse.Namespace,
    num: int,
    seconds: dict[str, list[float]],
    metrics: dict[str, dict[str, float]],
    memory: dict[str, float],
) -> Iterator[str]:
    yield "# Scoring an evaluation\n"
    yield f"Command: `python experiments/benchmarks/evaluation.py {shlex.join(sys.argv[1:])}`"
    yield (
        f"{args.images:,} images, {args.classes} classes, {num:,} detections. "
        f"{surroundings('pycocotools', 'faster-coco-eval', 'numpy')}. Ratios are medians of {args.rounds} rounds.\n"
    )
    yield f"| | median CPU s | min | max | to {PEER} | peak MB | largest difference of a metric |"
    yield "|---|---|---|---|---|---|---|"
    for name, found in seconds.items():
        ratio = statistics.median(own / peer for own, peer in zip(found, seconds[PEER], strict=True))
        off = max(abs(metrics[name].get(key, -1.0) - value) for key, value in metrics[PEER].items())
        yield (
            f"| {name} | {statistics.median(found):.1f} | {min(found):.1f} | {max(found):.1f} | {ratio:.2f} | "
            f"{memory[name]:.0f} | {off:.1e} |"
        )


if __name__ == "__main__":
    main()
