"""Runs that are as small as runs can be, and what tests do to them."""

import io
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from mlflow import MlflowClient
from rich.console import Console

from mimiclab import checkpoint, runs
from mimiclab.experiment import load_experiment
from mimiclab.progress import PROGRESS, ProgressReader
from mimiclab.schema import Experiment

TINY = (Path(__file__).parent.parent / "integration" / "tiny.yaml").read_text()
NUM_STEPS = 14
"""Epochs end at 5, 10 and 14."""


def tiny(root: Path, *overrides: str) -> Experiment:
    """The experiment, its data, runs and records below `root`."""
    file = root / "tiny.yaml"
    file.write_text(TINY.replace("ROOT", str(root)))
    return load_experiment(file, overrides).experiment


def quiet() -> Console:
    return Console(file=io.StringIO(), width=300)


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def history(run: runs.Run, key: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in MlflowClient(run.tracking).get_metric_history(run.mlflow_run_id, key)]


def workers(process: psutil.Process | None = None) -> list[psutil.Process]:
    """Ray Train's workers below a process, this one by default."""
    below = (process or psutil.Process()).children(recursive=True)
    found = []
    for each in below:
        try:
            if "RayTrainWorker" in " ".join(each.cmdline()):
                found.append(each)
        except psutil.NoSuchProcess:
            continue
    return found


def at_step(folder: Path, step: int, action: Callable[[], object]) -> threading.Thread:
    """Do something as soon as a run has reported a step."""
    return when(folder, lambda event: event.get("step", 0) >= step and event["kind"] == "step", action)


def when(folder: Path, wanted: Callable[[dict], bool], action: Callable[[], object]) -> threading.Thread:
    """Do something as soon as a run has reported an event."""

    def wait() -> None:
        path = folder / PROGRESS
        while not path.exists():
            time.sleep(0.05)
        reader = ProgressReader(path)
        while not any(wanted(event) for event in reader.new_events()):
            time.sleep(0.01)
        action()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def assert_same(run: runs.Run, expected: runs.Run) -> None:
    """Bit for bit the same weights and optimizer, and the same record."""
    ends = [checkpoint.latest(each.checkpoints, warn=_never) for each in (run, expected)]
    assert ends[0] is not None
    assert ends[1] is not None
    assert ends[0].step == ends[1].step
    weights, others = ends[0].weights(), ends[1].weights()
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    moments, others = (end.state()["optimizer"]["state"] for end in ends)
    for number, values in moments.items():
        assert all(torch.equal(value, others[number][name]) for name, value in values.items())
    for key in ("train/loss", "train/grad_norm", "train/lr", "student/AP", "teacher/AP50", "best/student/AP"):
        assert history(run, key) == history(expected, key), key


def _never(text: str) -> None:
    raise AssertionError(text)
