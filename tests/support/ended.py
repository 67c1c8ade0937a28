"""Runs as training leaves them at their end, made without training."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from mlflow.entities import Metric
from PIL import Image

from mimiclab import checkpoint, runs
from mimiclab.data.coco import CocoDataset, read_coco
from mimiclab.detections import write_detections
from mimiclab.experiment import flatten, identity, load_experiment
from mimiclab.schema import Experiment
from mimiclab.scoring import Detections
from mimiclab.tracking import runs as tracking
from mimiclab.tracking.client import connect

CLASSES = ("disk", "ring")
PROJECT = "mimiclab"


def write_data(root: Path, name: str = "val", num: int = 8, seed: int = 0) -> CocoDataset:
    """Grey images, of 64 by 48, with one or two bright objects in each."""
    rng = np.random.default_rng(seed)
    folder = root / name
    folder.mkdir(parents=True)
    annotations = []
    for number in range(1, num + 1):
        pixels = np.full((48, 64, 3), 60, np.uint8)
        for left in (4, 36)[: 1 + number % 2]:
            x, y, side = left + int(rng.integers(0, 6)), int(rng.integers(2, 20)), int(rng.integers(14, 20))
            category = int(rng.integers(1, 3))
            pixels[y : y + side, x : x + side, category] = 220
            box = {"bbox": [x, y, side, side], "area": side * side}
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "category_id": category, "iscrowd": 0, **box}
            )
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
    content = {
        "images": [{"id": n, "file_name": f"{n:03d}.png", "width": 64, "height": 48} for n in range(1, num + 1)],
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in enumerate(CLASSES, start=1)],
    }
    (root / f"{name}.json").write_text(json.dumps(content))
    return read_coco(root / f"{name}.json", folder)


def experiment(root: Path, name: str, *overrides: str, val: str = "val") -> Experiment:
    """An experiment on `write_data`'s sets below `root`; its runs and records are there as well."""
    split = f"{{annotations: {root}/{val}.json, images: {root}/{val}}}"
    file = root / "x.yaml"
    file.write_text(
        f"name: {name}\ndata: {{train: {split}, val: {split}}}\n"
        f'where: {{storage: {root}/runs, tracking: "sqlite:///{root}/mlflow.db"}}\n'
    )
    return load_experiment(file, overrides).experiment


def detect(dataset: CocoDataset, skill: float, seed: int) -> Detections:
    """Objects with a chance of `skill` to be found well, and as many wrong boxes as lack."""
    rng = np.random.default_rng(seed)
    rows = []
    for record in dataset.images:
        for box, label in zip(record.boxes.astype(float), record.labels, strict=True):
            corner, size = box[:2], box[2:] - box[:2]
            if rng.random() > skill:
                corner = corner + size * rng.uniform(0.5, 1)
            rows.append([record.id, *corner, *size, rng.uniform(0.4, 1), dataset.category_ids[label]])
    return np.array(rows, np.float32).astype(np.float64)


def ended(
    experiment: Experiment,
    metrics: Mapping[str, float],
    detections: Mapping[str, Detections] | None = None,
    content: str = "",
    *,
    step: int = 20,
    tags: Mapping[str, str] | None = None,
) -> runs.Run:
    """A run with its best evaluation at `step`, in its folder and in MLflow, where a later one was half as good."""
    uri, mine = experiment.where.tracking, identity(experiment)
    params = {key: str(value) for key, value in flatten(experiment).items()}
    run_id = tracking.open_run(uri, PROJECT, experiment.name, mine, params, tags or {})
    history = [
        Metric(name, share * value, 0, at)
        for at, share in ((step, 1.0), (step + 5, 0.5))
        for name, value in metrics.items()
    ]
    history += [Metric("best/student/AP", metrics["student/AP"], 0, step + 5), Metric("train/loss", 0.1, 0, step)]
    connect(uri).log_batch(run_id, metrics=history, synchronous=True)
    tracking.end_run(uri, run_id, "FINISHED")
    storage = runs.prepare(experiment, fresh=False)
    run = runs.Run(storage, mine, uri, run_id, CLASSES, "finished")
    run.write()
    best = {"step": step, "metric": "student/AP", "value": metrics["student/AP"]}
    for at, share in ((step, 1.0), (step + 5, 0.5)):
        meta = {
            "step": at,
            "classes": list(CLASSES),
            "best": best,
            "metrics": {name: share * value for name, value in metrics.items()},
            "unsent": [],
            "experiment": experiment.model_dump(mode="json"),
        }
        checkpoint.save(run.checkpoints, {"w": torch.zeros(1)}, {}, meta)
    if detections is not None:
        write_detections(storage, detections, step=step, content=content)
    return run
