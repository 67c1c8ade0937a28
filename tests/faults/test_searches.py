"""Searches whose driver is killed, with all that it has started, or that lose a machine, at any moment."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient
from settings import users_settings
from tinyruns import TINY

from mimiclab.cluster import local
from mimiclab.cluster.nodes import Nodes
from mimiclab.progress import PROGRESS
from mimiclab.search.record import RECORD, Record, recompute
from mimiclab.storage import Storage

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(1200)]

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


def start(root: Path, *args: str) -> subprocess.Popen[str]:
    with (root / "output.txt").open("a") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "mimiclab", "search", *args],
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
        process = start(tmp_path, "killed.yaml")
        while process.poll() is None and (steps_done(tmp_path) < moment or drivers(tmp_path) <= killed):
            time.sleep(0.02)
        if process.poll() is None:
            kill_all(process)
            killed += 1
    process = start(tmp_path, "killed.yaml")
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


SPREAD = """
extends: tiny.yaml
name: spread
optim: {epochs: 1}
scale: {workers: 2, placement: SPREAD}
search:
  metric: student/AR100
  trials: 1
  space: {model.inference.max_detections: {choice: [100]}}
"""
LOSING = """
extends: tiny.yaml
name: losing
optim: {epochs: 6}
scale: {workers: 1, max_crashes: 0}
search:
  metric: student/AR100
  algorithm: grid
  grace_period: 6
  space: {model.inference.max_detections: {choice: [100, 99]}}
"""


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """Two nodes beside a head, for one worker each."""
    with (
        users_settings(tmp_path_factory.mktemp("state")),
        local.owned_cluster(lambda _: None, num_nodes=2) as started,
    ):
        yield started


def search_on(nodes: Nodes, root: Path, text: str) -> subprocess.Popen[str]:
    (root / "tiny.yaml").write_text(TINY.replace("ROOT", str(root)))
    (root / "search.yaml").write_text(text)
    return start(root, "search.yaml", "--address", nodes.cluster.head)


def test_where_a_trial_of_several_workers_runs_counts_their_machines(nodes: Nodes, tmp_path: Path) -> None:
    process = search_on(nodes, tmp_path, SPREAD)
    assert process.wait(timeout=400) == 0, (tmp_path / "output.txt").read_text()
    events = Record(Storage(tmp_path / "runs" / "spread")).events
    head = nodes.cluster.head.partition(":")[0]
    assert [event["where"] for event in events if event["event"] == "started"] == [None]
    assert [event["where"] for event in events if event["event"] == "result"] == [f"{head} +1"]


def test_a_trial_whose_machine_is_lost_goes_on_at_another_one(nodes: Nodes, tmp_path: Path) -> None:
    """No crash is allowed: a machine that is lost is none."""
    names = ["losing-trial-00", "losing-trial-01"]
    process = search_on(nodes, tmp_path, LOSING)
    files = [tmp_path / "runs" / name / PROGRESS for name in names]
    while process.poll() is None and not all(
        file.exists() and '"kind": "checkpoint"' in file.read_text() for file in files
    ):
        time.sleep(0.02)
    # What drives the trials is none of a node's that may go.
    titles = {worker.cmdline()[0] for name in ("node-1", "node-2") for worker in nodes.workers(name)}
    assert {title for title in titles if title != "ray::IDLE"} == {"ray::RayTrainWorker"}
    nodes.kill("node-2")
    assert process.wait(timeout=600) == 0, (tmp_path / "output.txt").read_text()

    events = Record(Storage(tmp_path / "runs" / "losing")).events
    told = sorted((event["trial"], event["event"]) for event in events if event["event"] in ("started", "ended"))
    assert told == [(f"trial-0{n}", kind) for n in range(2) for kind in ("ended", "started")]
    assert {event["outcome"] for event in events if event["event"] == "ended"} == {"finished"}
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    found = client.search_runs([client.get_experiment_by_name("mimiclab").experiment_id])
    trials = {run.info.run_name: run for run in found if run.info.run_name in names}
    assert {run.data.tags["trial.outcome"] for run in trials.values()} == {"finished"}
    lost = [run.data.tags[tag] for run in trials.values() for tag in run.data.tags if tag.startswith("restart.")]
    assert len(lost) == 1
    assert lost[0].startswith("node lost: ")
    for run in trials.values():
        steps = [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")]
        assert steps == list(range(1, EPOCH_ENDS[-1] + 1))
