"""A search on a cluster that is nothing but its head, until there is work: Ray's autoscaler, for real.

Its machines are processes on this one, which Ray's fake provider starts and ends as a cloud's would.
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from growing import growing_cluster, kill_machine, machines
from mlflow import MlflowClient
from tinyruns import TINY

from mimiclab import runs
from mimiclab.cluster import state
from mimiclab.cluster.nodes import HEAD, Nodes, tree
from mimiclab.search.record import Record
from mimiclab.storage import Storage

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(1800)]

MAX_NODES = 2
IDLE_S = 20
SEARCH = f"""
search:
  trials: 3
  max_concurrent: {MAX_NODES}
  grace_period: 3
  space: {{model.mimic.cls_weight: {{loguniform: [0.1, 10]}}, model.pyramid.stagger: {{choice: [0, 1]}}}}
"""
TRIALS = ["trial-00", "trial-01", "trial-02"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the user is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    for name, value in {"RAY_AUTH_MODE": "token", "RAY_API_SERVER_ADDRESS": ""}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "find.yaml").write_text(TINY.replace("ROOT", ".").replace("name: tiny", "name: find") + SEARCH)
    return tmp_path


@pytest.fixture
def nodes(folder: Path) -> Iterator[Nodes]:
    with growing_cluster(max_nodes=MAX_NODES, idle_s=IDLE_S) as nodes:
        yield nodes


def attempt(*args: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "mimiclab", *args]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    return done.returncode, done.stdout


def mimiclab(*args: str) -> str:
    code, output = attempt(*args)
    assert code == 0, f"{args}:\n{output}"
    return output


def wait_until(condition: Callable[[], object], timeout_s: float = 900) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def events(folder: Path, kind: str) -> list[dict[str, object]]:
    record = folder / "runs" / "find"
    return [event for event in Record(Storage(record)).events if event["event"] == kind] if record.exists() else []


def alive(nodes: Nodes) -> list[str]:
    return [node.id for node in nodes.all() if node.alive]


def at_work(nodes: Nodes) -> list[psutil.Process]:
    """The machines on which a worker trains."""
    trained = []
    for machine in machines(nodes):
        for process in tree([machine]):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    trained.append(machine)
    return trained


def test_a_search_makes_the_cluster_grow_and_outlives_one_of_its_machines(folder: Path, nodes: Nodes) -> None:
    [head] = nodes.all()
    assert "CPU" not in head.resources
    assert machines(nodes) == []

    code, output = attempt("submit", "search", "find.yaml", "--set", f"scale.workers={MAX_NODES + 1}")
    assert code == 2
    assert f"{MAX_NODES + 1} workers of 1 CPU each need {MAX_NODES + 1}, found {MAX_NODES} in the cluster" in output

    assert "submitted as job search-find" in mimiclab("submit", "search", "find.yaml", "--set", "scale.workers=1")
    wait_until(lambda: len(machines(nodes)) == MAX_NODES)
    wait_until(lambda: events(folder, "result") and at_work(nodes))
    kill_machine(at_work(nodes)[0])

    seen: set[str] = set()

    def ended() -> bool:
        there = [node for node in nodes.all() if node.alive and node.name != HEAD]
        seen.update(node.id for node in there)
        return "RUNNING" not in mimiclab("jobs", "list")

    wait_until(ended)
    assert "SUCCEEDED" in mimiclab("jobs", "list"), mimiclab("jobs", "logs", "search-find")
    assert len(seen) > MAX_NODES  # one took the place of the one that was lost
    outcomes = events(folder, "ended")
    assert sorted(str(event["trial"]) for event in outcomes) == TRIALS
    assert {event["outcome"] for event in outcomes} <= {"finished", "pruned"}, outcomes
    for trial in TRIALS:
        run = runs.read(folder / "runs" / f"find-{trial}")
        assert run is not None
        history = MlflowClient(run.tracking).get_metric_history(run.mlflow_run_id, "train/loss")
        steps = [metric.step for metric in history]
        assert steps == list(range(1, len(steps) + 1))

    wait_until(lambda: alive(nodes) == [head.id], 180)
    wait_until(lambda: machines(nodes) == [], 60)  # a machine is gone from the table a moment before its process
    assert state.is_alive(nodes.processes(HEAD)[0])
