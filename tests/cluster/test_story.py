"""The whole story as an operator lives it, every verb a process: search, promote, train, lose machines, go on, deploy.

One cluster of three nodes on loopback, tiny trainings. Nothing is left running at the end.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient
from tinyruns import TINY

from mimiclab import runs
from mimiclab.cluster import state
from mimiclab.cluster.nodes import HEAD, Nodes
from mimiclab.search.record import Record
from mimiclab.storage import Storage

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(3000)]

SEARCH = """
search:
  trials: 3
  grace_period: 1
  space: {model.mimic.cls_weight: {loguniform: [0.1, 10]}, model.pyramid.stagger: {choice: [0, 1]}}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the user is. No cluster is left behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    (tmp_path / "find.yaml").write_text(TINY.replace("ROOT", ".").replace("name: tiny", "name: find") + SEARCH)
    yield tmp_path
    mimiclab("cluster", "down")


def mimiclab(*args: str) -> str:
    command = [sys.executable, "-m", "mimiclab", *args]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900)
    assert done.returncode == 0, f"{args}:\n{done.stdout}"
    return done.stdout


def wait_until(condition: Callable[[], object], timeout_s: float = 600) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def results(folder: Path) -> list[dict[str, object]]:
    return [event for event in Record(Storage(folder / "runs" / "find")).events if event["event"] == "result"]


def newest_step(run: Path) -> int:
    return max((int(path.name.removeprefix("step-")) for path in run.glob("checkpoints/step-*")), default=0)


def has_ended(job: str) -> bool:
    [line] = [line for line in mimiclab("jobs", "list").splitlines() if line.split()[0] == job]
    return line.split()[1] in ("SUCCEEDED", "FAILED", "STOPPED")


def succeeded(job: str) -> bool:
    [line] = [line for line in mimiclab("jobs", "list").splitlines() if line.split()[0] == job]
    return line.split()[1] == "SUCCEEDED"


def test_from_a_cluster_to_a_registered_model(folder: Path) -> None:
    output = mimiclab("cluster", "up", "--nodes", "3")
    assert "offers:     3 CPU\n" in output
    cluster = state.running()
    assert cluster is not None
    nodes = Nodes(cluster)
    processes = [process for name in (HEAD, "node-1", "node-2", "node-3") for process in nodes.processes(name)]

    # A search, in the middle of which a machine is announced to go, and goes.
    trials = ["--set", "scale.workers=1", "--set", "search.max_concurrent=3"]
    assert "submitted as job search-find" in mimiclab("submit", "search", "find.yaml", *trials)
    wait_until(lambda: (folder / "runs" / "find" / "record.jsonl").exists() and results(folder))
    busy = next(name for name in ("node-1", "node-2", "node-3") if nodes.workers(name))
    nodes.drain(busy, 15)
    wait_until(lambda: has_ended("search-find"))
    log = mimiclab("jobs", "logs", "search-find")
    assert succeeded("search-find"), log
    assert nodes.get(busy).state == "dead"
    ended = [event for event in Record(Storage(folder / "runs" / "find")).events if event["event"] == "ended"]
    assert sorted(str(event["trial"]) for event in ended) == ["trial-00", "trial-01", "trial-02"]
    assert {event["outcome"] for event in ended} <= {"finished", "pruned"}

    # What it found is compared, and the best trained again: as a job, which is killed and submitted again.
    best = re.findall(r"^(trial-\d+)", log[log.index("the best first") :], re.MULTILINE)[0]
    assert best in mimiclab("compare", "find")
    mimiclab("search", "promote", "find", "-o", "best.yaml")
    long = ["--set", "name=best", "--set", "optim.epochs=60"]
    mimiclab("submit", "train", "best.yaml", *long)
    run = folder / "runs" / "best"
    wait_until(lambda: newest_step(run) > 4)
    assert "job best has ended: STOPPED" in mimiclab("jobs", "stop", "best")
    stopped_at = newest_step(run)
    assert "submitted as job best-2" in mimiclab("jobs", "resubmit", "best")
    wait_until(lambda: newest_step(run) > stopped_at + 4)
    log = mimiclab("jobs", "logs", "best-2")
    assert f"training from step {stopped_at} to step" in log
    wait_until(lambda: has_ended("best-2"))
    assert succeeded("best-2"), mimiclab("jobs", "logs", "best-2")
    found = runs.read(run)
    assert found is not None
    assert found.status == "finished"
    steps = [m.step for m in MlflowClient(found.tracking).get_metric_history(found.mlflow_run_id, "train/loss")]
    assert steps == list(range(1, len(steps) + 1))

    # It is scored, as a job too, and becomes a model that others use by name.
    assert "AP" in mimiclab("submit", "evaluate", "best.yaml", *long, "--follow")
    assert "champion" in mimiclab("models", "register", "best")
    image = next((folder / "data").rglob("*.png"), None) or next((folder / "data").rglob("*.jpg"))
    mimiclab("predict", "models:/mimiclab@champion", str(image), "--save", "found")
    assert (folder / "found").is_dir()

    mimiclab("cluster", "down")
    assert not any(map(state.is_alive, processes))
    mine = [p for p in psutil.process_iter() if _belongs_to(p, cluster.folder)]
    assert mine == []


def _belongs_to(process: psutil.Process, folder: str) -> bool:
    try:
        return folder in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False
