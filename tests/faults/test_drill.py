"""The drill itself, with everything real: its cluster, its kills, its two runs; and that it finds what is broken."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient
from tinyruns import TINY

from mimiclab import runs
from mimiclab.data.splits import locate, read_splits
from mimiclab.drill.drill import find, is_reusable, plan
from mimiclab.experiment import LoadedExperiment, load_experiment
from mimiclab.progress import PROGRESS

# Two fits and three restarts: minutes on a machine with nothing else to do.
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

# Steps take a tenth of a second, so that an announced end comes some 40 steps later.
EVENTS = "kill-worker@8,kill-node@16,drain@22:8s"
NUM_STEPS = 80
OVERRIDES = ("optim.epochs=17", "eval.every_epochs=6", "checkpoint.every_steps=10")
SET = [word for override in OVERRIDES for word in ("--set", override)]
EVERY_STEPS = 10


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("drill")
    (root / "tiny.yaml").write_text(TINY.replace("ROOT", str(root)))
    return root


@pytest.fixture(scope="module")
def loaded(root: Path) -> LoadedExperiment:
    return load_experiment(root / "tiny.yaml", OVERRIDES)


def start(root: Path, *args: str) -> "subprocess.Popen[str]":
    """The command, in a session of its own."""
    return mimiclab(root, "drill", "tiny.yaml", *args, *SET)


def mimiclab(root: Path, *args: str) -> "subprocess.Popen[str]":
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.Popen(
        [sys.executable, "-m", "mimiclab", *args],
        cwd=root,
        env={**environment, "XDG_STATE_HOME": str(root / "state"), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def left_over(root: Path, output: str) -> list[str]:
    """What a drill that has ended has left behind: processes of its cluster or runs, files of its cluster."""
    [folder] = {line.rpartition(" ")[2] for line in output.splitlines() if line.startswith("starting a head at ")}
    found = [str(path) for path in (Path(folder), *(root / "state").rglob("*.json")) if path.exists()]
    for process in psutil.process_iter():
        try:
            words = " ".join(process.cmdline())
            if folder in words or (str(root) in process.environ().get("XDG_STATE_HOME", "")):
                found.append(words[:200])
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def output_of(process: "subprocess.Popen[str]", timeout: float = 1500) -> str:
    """What a command prints that ends with 0."""
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def output(root: Path) -> str:
    """What a drill prints that ends with 0."""
    return output_of(start(root, "--events", EVENTS))


def story(root: Path) -> list[dict]:
    return [json.loads(line) for line in (root / "runs" / "tiny-drill" / PROGRESS).read_text().splitlines()]


def test_a_run_that_loses_a_worker_and_two_nodes_ends_as_the_other(root: Path, output: str) -> None:
    record = json.loads((root / "runs" / "tiny-drill" / "drill.json").read_text())

    assert record["holds"] is True
    assert record["num_steps"] == NUM_STEPS
    assert [event["event"] for event in record["events"]] == EVENTS.split(",")
    restarts = [event["restart"] for event in record["events"]]
    assert all(restart is not None for restart in restarts), output
    assert [restart["why"] for restart in restarts] == ["crash", "node lost", "preemption"]
    assert [restart["world"] for restart in restarts] == [2, 2, 2]
    assert all(restart["repeated"] <= EVERY_STEPS for restart in restarts[:2])
    assert restarts[2]["repeated"] <= 1
    for event in record["events"]:
        for part in ("detection_s", "waiting_s", "start_s", "first_step_s"):
            assert 0 <= event[part] < event["down_s"] or event["event"].startswith("drain")
    assert record["weights"] == {"differing": [], "largest": 0.0}
    assert record["history_differences"] == []


def test_the_report_is_printed_and_kept_with_the_run(root: Path, output: str) -> None:
    lines = output.splitlines()
    assert sum(line.startswith("holds   ") for line in lines) == 8
    assert "holes in the MLflow history: 0" in lines
    assert "largest difference of final weights: 0" in lines
    assert "(raylet)" not in output
    for event in EVENTS.split(","):
        assert any(line.startswith(f"! {event}: at step ") for line in lines)
        assert any(line.startswith(f"│ {event} ") for line in lines)
    run = runs.find("tiny-drill", str(root / "runs"))
    artifacts = {file.path for file in MlflowClient(run.tracking).list_artifacts(run.mlflow_run_id, "drill")}
    assert artifacts == {"drill/drill.json", "drill/timeline.png"}
    assert (run.folder / "timeline.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_left_running(root: Path, output: str) -> None:
    assert left_over(root, output) == []


def test_the_undisturbed_run_serves_the_next_drill_of_the_same_experiment_only(
    output: str, loaded: LoadedExperiment
) -> None:
    undisturbed, disturbed = plan(loaded, elastic=True)
    splits = read_splits(locate(undisturbed.data))
    assert is_reusable(undisturbed, splits)
    assert not is_reusable(disturbed, splits)
    shorter, _ = plan(load_experiment(loaded.path, (*OVERRIDES, "optim.epochs=16")), elastic=True)
    smaller, _ = plan(load_experiment(loaded.path, (*OVERRIDES, "scale.workers=1")), elastic=True)
    assert not is_reusable(shorter, splits)
    assert not is_reusable(smaller, splits)
    next(splits.val.annotations.parent.parent.glob("val*/*")).touch()
    assert not is_reusable(undisturbed, read_splits(locate(undisturbed.data)))


def test_a_spoiled_history_and_a_damaged_end_are_found(root: Path, output: str, loaded: LoadedExperiment) -> None:
    undisturbed, disturbed = plan(loaded, elastic=False)
    intact = find(undisturbed, disturbed, 0, story(root), NUM_STEPS, 0.05)
    broken = [check.contract for check in intact.checks() if check.broken]
    assert broken == []

    run = runs.find("tiny-drill", str(root / "runs"))
    MlflowClient(run.tracking).log_metric(run.mlflow_run_id, "train/loss", 1.0, step=3)
    last = run.checkpoints / f"step-{NUM_STEPS:08d}"
    last.delete("weights.safetensors")
    spoiled = find(undisturbed, disturbed, 0, story(root), NUM_STEPS, 0.05)

    assert not spoiled.hold
    [loss] = spoiled.histories
    assert dataclasses.astuple(loss) == ("train/loss", (), (3,), (), (3,))
    broken = [check.contract for check in spoiled.checks() if check.broken]
    assert "history: no step missing, none twice" in broken
    assert "history: the same values" in broken
    assert "the disturbed run is trained to its end" in broken
    assert "weights: the same bits" in broken


@pytest.mark.parametrize("how", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_a_drill_that_is_stopped_takes_everything_with_it(tmp_path: Path, how: signal.Signals) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY.replace("ROOT", str(tmp_path)))
    process = start(tmp_path, "--events", "kill-worker@5")
    assert process.stdout is not None
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            if "training from the start" in line:
                break
        process.send_signal(how)
        lines += process.stdout.readlines()
        process.wait(300)
    finally:
        process.kill()
    output = "".join(lines)
    assert process.returncode != 0
    assert "undisturbed | stopped; the same command goes on" in output
    time.sleep(1)
    assert left_over(tmp_path, output) == []
    run = runs.find("tiny-undisturbed", str(tmp_path / "runs"))
    assert run.status == "killed"


@pytest.mark.long
def test_a_drill_is_a_job_as_well(tmp_path: Path) -> None:
    """Its own cluster is not the one that the job was submitted to, which alone has the job's package."""
    (tmp_path / "tiny.yaml").write_text(TINY.replace("ROOT", str(tmp_path)))

    def run(*args: str) -> str:
        return output_of(mimiclab(tmp_path, *args), timeout=1200)

    try:
        run("cluster", "up", "--num-cpus", "0")
        output = run("submit", "drill", "tiny.yaml", "--events", "kill-worker@3", "--follow", "--set", "optim.epochs=2")
    finally:
        run("cluster", "down")

    assert "undisturbed | training from the start to step 10 on 2 workers" in output
    assert "! kill-worker@3: at step " in output
    assert "holds   weights: the same bits" in output
    assert left_over(tmp_path, output) == []
