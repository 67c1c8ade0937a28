"""Jobs, as a person at a shell meets them: a cluster of this machine's own, and every verb a process."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient
from tinyruns import TINY

from mimiclab import runs
from mimiclab.cluster import state

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

LONG = ("--set", "name=long", "--set", "optim.epochs=1000")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the user is: an experiment with relative paths. No cluster is left behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    (tmp_path / "tiny.yaml").write_text(TINY.replace("ROOT", "."))
    yield tmp_path
    mimiclab("cluster", "down")


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "mimiclab", *args]


def mimiclab(*args: str) -> tuple[int, str]:
    done = subprocess.run(command(*args), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)
    return done.returncode, done.stdout


def submit(*args: str) -> list[str]:
    return ["submit", "train", "tiny.yaml", "--set", "scale.workers=1", "--set", "optim.epochs=1", *args]


def read(run: Path) -> runs.Run:
    found = runs.read(run)
    assert found is not None
    return found


def status_in_mlflow(run: runs.Run) -> str:
    return str(MlflowClient(run.tracking).get_run(run.mlflow_run_id).info.status)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def tasks(job_server: str) -> list[str]:
    """The names of the tasks that a cluster has run, as far as it has heard of them: within a second or two."""
    token = (Path.home() / ".ray" / "auth_token").read_text().strip()
    url = f"{job_server}/api/v0/tasks?limit=10000"
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        found = json.load(answer)["data"]["result"]["result"]
    return [task["name"].rpartition(".")[2] for task in found]


def scored(output: str) -> list[str]:
    """What an evaluation prints."""
    lines = output.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("evaluating "))
    return [line for line in lines[start:] if not line.startswith("job ")]


def newest_step(run: Path) -> int:
    return max((int(path.name.removeprefix("step-")) for path in run.glob("checkpoints/step-*")), default=0)


def test_a_training_goes_through_a_cluster(folder: Path) -> None:
    code, output = mimiclab("cluster", "up", "--num-cpus", "2")
    assert code == 0, output
    cluster = state.running()
    assert cluster is not None
    assert cluster.job_server in output
    head = psutil.Process(cluster.processes[0].pid)
    processes = [head, *head.children(recursive=True)]
    listening = {c.laddr.ip for p in processes for c in p.net_connections() if c.status == psutil.CONN_LISTEN}
    assert listening <= {"127.0.0.1", "::ffff:127.0.0.1"}
    code, output = mimiclab("cluster", "up")
    assert code == 2
    assert "already" in output

    # A training is submitted, with a relative path to everything.
    code, output = mimiclab(*submit("--follow"))
    assert code == 0, output
    assert "epoch 1: student AP" in output
    run = read(folder / "runs" / "tiny")
    assert run.status == "finished"
    assert status_in_mlflow(run) == "FINISHED"

    # It is the same run whether it is submitted again or trained here.
    for again in (submit("--follow"), submit()[1:]):
        code, output = mimiclab(*again)
        assert code == 0, output
        assert "complete already" in output

    # It is scored where a worker would be, as it is here.
    code, output = mimiclab("submit", "evaluate", "tiny.yaml", "--follow")
    assert code == 0, output
    wait_until(lambda: "_score_on_node" in tasks(cluster.job_server))
    code, here = mimiclab("evaluate", "tiny")
    assert code == 0, here
    assert scored(output) == scored(here)
    assert tasks(cluster.job_server).count("_score_on_node") == 1

    # What the job finds wrong reaches whoever follows it.
    bad = submit("--follow", "--set", "name=bad", "--set", "where.tracking=sqlite:////no/such/folder/mlflow.db")
    code, output = mimiclab(*bad)
    assert code == 1
    assert "the folder /no/such/folder does not exist" in output.splitlines()[-1]

    # A follower that goes leaves the job.
    long = folder / "runs" / "long"
    with subprocess.Popen(command(*submit(*LONG, "--follow")), stdout=subprocess.PIPE, text=True) as follower:
        wait_until(lambda: newest_step(long) > 3)
        follower.send_signal(signal.SIGINT)
        output, _ = follower.communicate(timeout=120)
    assert follower.returncode == 130
    assert "job long goes on" in output
    assert "Traceback" not in output

    # The code that runs is the code submitted, in the driver and in the worker.
    processes = [head, *head.children(recursive=True)]
    drivers = [p for p in processes if p.cmdline()[1:4] == ["-P", "-m", "mimiclab"]]
    workers = [p for p in processes if "RayTrainWorker" in " ".join(p.cmdline())]
    assert len(drivers) == 1
    assert len(workers) == 1
    for process in drivers + workers:
        first = Path(process.environ()["PYTHONPATH"].split(os.pathsep)[0])
        assert first.is_relative_to(cluster.folder)
        assert (first / "mimiclab" / "cli.py").is_file()

    code, output = mimiclab(*submit(*LONG))
    assert code == 2
    assert "the job name long is in use: job long is RUNNING" in output
    code, output = mimiclab("jobs", "stop", "long")
    assert code == 0, output
    run = read(long)
    assert run.status == "killed"
    assert status_in_mlflow(run) == "KILLED"

    code, output = mimiclab(*submit("--set", "name=wide", "--set", "scale.workers=3"))
    assert code == 2
    assert "3 workers of 1 CPU each need 3, found 2 in the cluster" in output
    assert not (folder / "runs" / "wide").exists()

    code, output = mimiclab("jobs", "list")
    assert [line.split()[:2] for line in output.splitlines()[1:]] == [
        ["long", "STOPPED"],
        ["bad", "FAILED"],
        ["evaluate-tiny", "SUCCEEDED"],
        ["tiny-2", "SUCCEEDED"],
        ["tiny", "SUCCEEDED"],
    ]

    # A job that runs when the cluster ends is stopped in good order as well.
    code, output = mimiclab(*submit(*LONG))
    assert "submitted as job long-2" in output
    wait_until(lambda: read(long).status == "running")
    processes = [head, *head.children(recursive=True)]
    code, output = mimiclab("cluster", "down")
    assert code == 0, output
    assert "stopping job long-2" in output
    assert status_in_mlflow(run) == "KILLED"
    assert [p for p in processes if state.is_alive(p)] == []
    assert not Path(cluster.folder).exists()
    assert state.remembered() is None
