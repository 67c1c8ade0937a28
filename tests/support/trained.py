"""A run as training leaves it, with weights that nobody trained; and images to look for objects in."""

import functools
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image

from mimiclab import checkpoint, runs
from mimiclab.build import build_detector
from mimiclab.experiment import identity, load_experiment
from mimiclab.runs import Run
from mimiclab.tracking import runs as tracking
from mimiclab.tracking.address import sqlite_path
from mimiclab.tracking.client import connect

EXPERIMENT = """
name: tiny
data:
  scenes: {}
  resize: {short: 64, long: 96}
model:
  backbone: {name: resnet18, width: 16}
  pyramid: {channels: 16, max_level: 5}
  anchors: {scale: 2}
  student: {head_width: 32, offset_channels: [8, 8]}
  teacher: {num_rois: 16, num_convs: 1}
"""
CLASSES = ("disk", "star")


def make_run(root: Path, *overrides: str) -> Run:
    """A run with one checkpoint of random weights; MLflow knows nothing of it."""
    file = root / "tiny.yaml"
    file.write_text(EXPERIMENT)
    experiment = load_experiment(file, [f"where.storage={root / 'runs'}", *overrides]).experiment
    folder = runs.prepare(experiment, fresh=False)
    run = Run(folder, identity(experiment), "sqlite:///x.db", "0" * 32, CLASSES, "finished")
    run.write()
    add_checkpoint(run, step=3)
    return run


def add_checkpoint(run: Run, *, step: int) -> None:
    """The newest checkpoint of a run, of other weights than those before, and the best one."""
    experiment = run.experiment()
    torch.manual_seed(step)
    state = build_detector(experiment.model, CLASSES, pretrained=False).state_dict()
    meta = {"step": step, "classes": list(CLASSES), "best": None, "experiment": experiment.model_dump(mode="json")}
    checkpoint.save(run.checkpoints, state, {}, meta)


def track(run: Run, uri: str) -> Run:
    """The same run, known to MLflow."""
    uri = tracking.absolute_uri(uri)
    database = sqlite_path(uri)
    if database is not None and not database.exists():
        database.write_bytes(_empty_store())
    mlflow_run_id = tracking.open_run(uri, "shapes", run.name, run.identity, params={}, tags={})
    run = replace(run, tracking=uri, mlflow_run_id=mlflow_run_id)
    run.write()
    return run


@functools.cache
def _empty_store() -> bytes:
    """A sqlite file with MLflow's tables; to make them takes seconds."""
    with TemporaryDirectory() as folder:
        connect(f"sqlite:///{folder}/mlflow.db").search_experiments()
        return (Path(folder) / "mlflow.db").read_bytes()


def draw(path: Path, width: int, height: int, mode: str = "RGB") -> Path:
    """An image of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(width)
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode).save(path)
    return path
