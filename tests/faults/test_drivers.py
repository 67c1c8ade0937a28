"""Drivers that die, and drivers that meet."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml
from mlflow import MlflowClient
from tinyruns import NUM_STEPS, TINY, assert_same, at_step, history, workers

from mimiclab import runs

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]


def command(verb: str, file: Path) -> list[str]:
    return [sys.executable, "-c", "from mimiclab.cli import main; main()", verb, str(file)]


@pytest.mark.long
def test_the_same_command_goes_on_after_its_driver_was_killed(
    undisturbed: runs.Run, root: Path, tmp_path: Path
) -> None:
    """And while it lives a second one is refused."""
    file = tmp_path / "orphan.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(TINY.replace("ROOT", str(root))) | {"name": "orphan"}))
    folder = root / "runs" / "orphan"
    process = subprocess.Popen(
        command("train", file), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    refused: list[subprocess.CompletedProcess[str]] = []
    children: list[psutil.Process] = []

    def meet_and_kill() -> None:
        parent = psutil.Process(process.pid)
        parent_workers = workers(parent)
        children.extend(parent.children(recursive=True))
        for worker in parent_workers:  # the second driver takes longer to start than the first one to end
            worker.suspend()
        refused.append(subprocess.run(command("train", file), cwd=tmp_path, capture_output=True, text=True))
        process.send_signal(signal.SIGKILL)
        for worker in parent_workers:  # let go, they would train on for the seconds that Ray takes to end them
            worker.kill()

    meeting = at_step(folder, 7, meet_and_kill)
    process.communicate(timeout=900)
    meeting.join(timeout=30)
    assert refused[0].returncode == 2, refused[0].stdout + refused[0].stderr
    assert f"run orphan: process {process.pid} on " in refused[0].stderr
    assert "Traceback" not in refused[0].stderr
    _, alive = psutil.wait_procs(children, timeout=120)  # Ray's agents look now and then whether theirs is there
    assert alive == []
    orphan = runs.read(folder)
    assert orphan is not None
    assert orphan.status == "running"

    done = subprocess.run(command("train", file), cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search("training from step [5-9] to step 14", done.stdout)
    run = runs.read(folder)
    assert run is not None
    assert (run.status, run.mlflow_run_id) == ("finished", orphan.mlflow_run_id)
    assert_same(run, undisturbed)
    assert [step for step, _ in history(run, "train/loss")] == list(range(1, NUM_STEPS + 1))
    assert [value for _, value in history(run, "run/restarts")] == [0, 1]
    assert MlflowClient(run.tracking).get_run(run.mlflow_run_id).data.tags["restart.1"].startswith("driver: ")
    assert not (folder / ".lease.json").exists()
