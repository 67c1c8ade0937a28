"""A search whose driver is killed, with all that it has started, at moments that nobody chose."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient
from tinyruns import TINY

from mimiclab.progress import PROGRESS
from mimiclab.search.record import RECORD, Record, recompute
from mimiclab.storage import Storage

pytestmark = [pytest.mark.cluster, pytest.mark.long]

SEARCH = """
extends: tiny.yaml
name: killed
optim: {epochs: 6}
scale: {workers: 1}
search:
  metric: student/AR100
  trials: 4
  max_concurrent: 1
  space: {model.inference.max_detections: {choice: [100, 3, 1]}}
"""
EPOCH_ENDS = [5, 10, 14, 19, 24, 28]
NUM_KILLS = 3
SEED = 20


def start(root: Path) -> subprocess.Popen[str]:
    with (root / "output.txt").open("a") as output:
        return subprocess.Popen(
            [sys.executable, "-c", "from mimiclab.cli import main; main()", "search", "killed.yaml"],
            cwd=root,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def steps_done(root: Path) -> int:
    """Of all trials together."""
    found = 0
    for file in root.glob(f"runs/killed-trial-*/{PROGRESS}"):
        found += max((int(step) for step in re.findall(r'"kind": "step".*?"step": (\d+)', file.read_text())), default=0)
    return found


def drivers(root: Path) -> int:
    """How many have begun."""
    file = root / "runs" / "killed" / RECORD
    return file.read_text().count('{"event": "search"') if file.exists() else 0


def kill_all(process: subprocess.Popen[str]) -> None:
    """End the command and its process group; what is in none of its own sees that and ends by itself."""
    below = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(below, timeout=120)
    assert alive == []


def test_a_search_that_is_killed_three_times_comes_to_the_same_end(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY.replace("ROOT", str(tmp_path)))
    (tmp_path / "killed.yaml").write_text(SEARCH)
    # Nobody knows beforehand how far trials are trained: each at least for an epoch.
    moments = sorted(random.Random(SEED).sample(range(1, 4 * EPOCH_ENDS[0] + EPOCH_ENDS[-1]), NUM_KILLS))
    killed = 0
    for moment in moments:
        process = start(tmp_path)
        while process.poll() is None and (steps_done(tmp_path) < moment or drivers(tmp_path) <= killed):
            time.sleep(0.02)
        if process.poll() is None:
            kill_all(process)
            killed += 1
    process = start(tmp_path)
    assert process.wait(timeout=400) == 0, (tmp_path / "output.txt").read_text()
    assert killed == NUM_KILLS

    folder = tmp_path / "runs" / "killed"
    events = Record(Storage(folder)).events
    names = [f"trial-{number:02d}" for number in range(4)]
    ended = {event["trial"]: event["outcome"] for event in events if event["event"] == "ended"}
    assert sorted(event["trial"] for event in events if event["event"] == "ended") == names
    assert set(ended.values()) <= {"finished", "pruned"}
    assert "finished" in ended.values()
    decisions = [{k: v for k, v in event.items() if k != "time"} for event in events if event["event"] == "decision"]
    assert decisions == list(recompute(events))
    assert len({(each["trial"], each["epoch"]) for each in decisions}) == len(decisions)

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    found = client.search_runs([client.get_experiment_by_name("mimiclab").experiment_id])
    assert sorted(run.info.run_name for run in found) == ["killed", *(f"killed-{name}" for name in names)]
    for run in found:
        if run.info.run_name == "killed":
            assert run.info.status == "FINISHED"
            continue
        name = run.info.run_name.removeprefix("killed-")
        assert run.data.tags["trial.outcome"] == ended[name]
        last = max(event["epoch"] for event in events if event["event"] == "result" and event["trial"] == name)
        history = {key: client.get_metric_history(run.info.run_id, key) for key in ("train/loss", "student/AR100")}
        steps = {key: [metric.step for metric in metrics] for key, metrics in history.items()}
        assert steps["train/loss"] == list(range(1, EPOCH_ENDS[last - 1] + 1)), name
        assert steps["student/AR100"] == EPOCH_ENDS[:last], name
        told = [event["value"] for event in events if event["event"] == "result" and event["trial"] == name]
        assert told == [metric.value for metric in history["student/AR100"]]
    assert drivers(tmp_path) == NUM_KILLS + 1
