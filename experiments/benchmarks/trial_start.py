"""What a trial of a search waits for before its first training step: with Ray Train, and in its own process.

    python experiments/benchmarks/trial_start.py [--rounds 3] [--trials 4]

Searches of one worker a trial, one trial at a time, take turns on one Ray cluster; each trial trains a small detector
for one epoch on a few scenes. A trial's wait runs from the end of the trial before it (for the first one, from the
moment at which Tune is started) to its first training step, and so holds all that a search pays for a trial besides
training. Printed are medians over trials: of the first of each search, whose process is always a new one, and of the
others.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from unittest.mock import patch

import ray
from machine import surroundings
from rich.console import Console

from mimiclab import runs
from mimiclab.experiment import load_experiment
from mimiclab.progress import PROGRESS
from mimiclab.search import tuning
from mimiclab.search.driver import search
from mimiclab.search.record import Record
from mimiclab.session import ENVIRONMENT
from mimiclab.storage import Storage

EXPERIMENT = """
name: start
data:
  scenes: {root: ROOT/data, train: 14, val: 6, size: 64}
  resize: {short: 64, long: 64}
model:
  backbone: {name: resnet18, width: 16}
  pyramid: {channels: 16, max_level: 5}
  anchors: {scale: 2}
  student: {head_width: 32}
  teacher: {num_rois: 16, num_convs: 1}
optim: {name: adamw, lr: 1e-3, global_batch: 3, epochs: 1}
eval: {num_pictures: 0, teacher_topk: 50}
scale: {workers: 1}
search:
  metric: student/AP
  max_concurrent: 1
  space: {model.mimic.cls_weight: {loguniform: [0.1, 10]}}
where: {storage: ROOT/runs, tracking: "sqlite:///ROOT/mlflow.db"}
"""
FORMS = {"Ray Train": False, "own process": True}


def main() -> None:
    """Run the benchmark and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3, help="searches of each form")
    parser.add_argument("--trials", type=int, default=4, help="of each search")
    args = parser.parse_args()
    waits: dict[str, list[list[float]]] = {name: [] for name in FORMS}
    os.environ.update(ENVIRONMENT)
    ray.init(address="local", log_to_driver=False, logging_level="error")
    with tempfile.TemporaryDirectory(prefix="mimiclab-start-") as folder:
        file = Path(folder) / "start.yaml"
        file.write_text(EXPERIMENT.replace("ROOT", folder))
        for number in range(args.rounds):
            for name in list(FORMS)[:: -1 if number % 2 else 1]:
                with patch.object(tuning, "is_alone", lambda _, name=name: FORMS[name]):
                    waits[name].append(_waits(file, f"{name.replace(' ', '-').lower()}-{number}", args.trials))
    ray.shutdown()
    _print(waits)


def _waits(file: Path, name: str, num_trials: int) -> list[float]:
    """Search once; each trial's seconds."""
    loaded = load_experiment(file, [f"name={name}", f"search.trials={num_trials}"])
    trials = sorted(search(loaded, console=Console(quiet=True)), key=lambda trial: trial.number)
    events = Record(Storage(runs.folder_of(loaded.experiment))).events
    free = [event["time"] for event in events if event["event"] in ("search", "ended")]
    steps = []
    for trial in trials:
        told = map(json.loads, (runs.folder_of(trial.experiment) / PROGRESS).read_text().splitlines())
        steps.append(next(event["time"] for event in told if event["kind"] == "step"))
    return [step - since for since, step in zip(free, steps, strict=False)]


def _print(waits: dict[str, list[list[float]]]) -> None:
    print(
        f"{surroundings('ray', 'torch')}\n\n"
        "| | first trial, s | min | max | later trials, s | min | max | trials |\n|---|---|---|---|---|---|---|---|"
    )
    for name, found in waits.items():
        first, later = [each[0] for each in found], [wait for each in found for wait in each[1:]]
        cells = [f"{figure(each):.1f}" for each in (first, later) for figure in (statistics.median, min, max)]
        print(f"| {name} | {' | '.join(cells)} | {len(first)} + {len(later)} |")


if __name__ == "__main__":
    main()
