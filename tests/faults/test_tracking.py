"""An MLflow server that hangs, dies and comes back while a run goes on, and a store whose disk is full."""

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from itertools import pairwise
from pathlib import Path

import disks
import pytest
from mlflow import MlflowClient
from tinyruns import at_step, history, quiet, said, tiny

from mimiclab import runs
from mimiclab.cli import main
from mimiclab.errors import UserError
from mimiclab.progress import PROGRESS
from mimiclab.tracking.ui import server
from mimiclab.train import train

pytestmark = [pytest.mark.cluster, pytest.mark.server, pytest.mark.usefixtures("ray_cluster")]

LAST = 38


class Server:
    """MLflow's server over one store, which may be started again."""

    def __init__(self, store: Path) -> None:
        self._store = store
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = int(probe.getsockname()[1])
        self.uri = f"http://127.0.0.1:{self._port}"
        self._stack = ExitStack()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = self._stack.enter_context(server(f"sqlite:///{self._store}", self._port)).process

    def send(self, number: int) -> None:
        """A signal to all its processes."""
        if self._process is not None:
            os.killpg(self._process.pid, number)

    def end(self) -> None:
        self.send(signal.SIGKILL)
        self._stack.close()
        self._process = None


@pytest.fixture
def mlflow_server(tmp_path: Path) -> Iterator[Server]:
    mlflow_server = Server(tmp_path / "mlflow.db")
    yield mlflow_server
    mlflow_server.end()


def test_training_neither_waits_for_the_server_nor_loses_anything_to_it(
    root: Path, tmp_path: Path, mlflow_server: Server
) -> None:
    overrides = (
        f"where.tracking={mlflow_server.uri}",
        f"where.storage={tmp_path}",
        "optim.epochs=8",
        "scale.workers=1",
    )
    experiment = tiny(root, *overrides)
    with pytest.raises(UserError, match=r"where\.tracking: http://127\.0\.0\.1:\d+ does not answer"):
        train(experiment, console=quiet())
    assert not runs.folder_of(experiment).exists()

    mlflow_server.start()
    folder = runs.folder_of(experiment)
    at_step(folder, 8, lambda: mlflow_server.send(signal.SIGSTOP))
    at_step(folder, 30, mlflow_server.end)
    console = quiet()
    run = train(experiment, console=console)
    assert run.status == "finished"
    assert "did not take the end of the run" in said(console)
    events = [line for line in (folder / PROGRESS).read_text().splitlines() if '"kind": "step"' in line]
    times = [float(line.split('"time": ')[1].split(",")[0]) for line in events]
    assert len(times) == LAST
    assert max(after - before for before, after in pairwise(times)) < 8  # a call to a server that hangs takes 10 s

    mlflow_server.start()
    assert MlflowClient(mlflow_server.uri).get_run(run.mlflow_run_id).info.status == "RUNNING"
    console = quiet()
    train(experiment, console=console)
    assert "complete already" in said(console)
    assert MlflowClient(mlflow_server.uri).get_run(run.mlflow_run_id).info.status == "FINISHED"
    assert [step for step, _ in history(run, "train/loss")] == list(range(1, LAST + 1))
    assert [step for step, _ in history(run, "student/AP")] == [5, 10, 14, 19, 24, 28, 33, 38]
    client = MlflowClient(mlflow_server.uri)
    pictures = [file.path.split("+") for file in client.list_artifacts(run.mlflow_run_id, "images")]
    assert {int(parts[2]) for parts in pictures} == {0, 5, 10, 14, 19, 24, 28, 33, 38}
    assert {"evaluation/errors.png", "evaluation/worst.json"} <= {
        file.path for file in client.list_artifacts(run.mlflow_run_id, "evaluation")
    }
    assert not list((folder / runs.UNSENT_FILES).glob("*"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that is soon full."""
    with disks.small_disk(tmp_path / "small", "8m") as place:
        yield place


def fill(file: Path) -> None:
    """Leave no room on a file's disk."""
    with file.open("wb", buffering=0) as opened, suppress(OSError):
        while opened.write(bytes(4096)) == 4096:
            pass


def on(store: Path, tmp_path: Path) -> tuple[str, ...]:
    """What has an experiment tracked there."""
    tracking = f"where.tracking=sqlite:///{store}"
    return (tracking, f"where.storage={tmp_path}/runs", "optim.epochs=8", "scale.workers=1")


def test_a_full_disk_under_a_store_is_one_message_before_a_worker_starts(
    root: Path, tmp_path: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = small_disk / "mlflow.db"
    overrides = on(store, tmp_path)
    folder = runs.folder_of(tiny(root, *overrides))
    fill(small_disk / "filler")
    with pytest.raises(SystemExit) as caught:
        main(["train", str(root / "tiny.yaml"), *(word for each in overrides for word in ("--set", each))])
    assert caught.value.code == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line]
    assert line.startswith(f"error: where.tracking: sqlite:///{store} cannot be used: ")
    assert line.endswith("on a disk with room")
    assert not (folder / PROGRESS).exists()


@pytest.mark.long
def test_a_disk_that_fills_up_under_a_store_costs_no_record(root: Path, tmp_path: Path, small_disk: Path) -> None:
    experiment = tiny(root, *on(small_disk / "mlflow.db", tmp_path))
    filler = small_disk / "filler"
    at_step(runs.folder_of(experiment), 8, lambda: fill(filler))
    console = quiet()
    run = train(experiment, console=console)
    assert run.status == "finished"
    assert "did not take the end of the run" in said(console)
    assert history(run, "train/loss")[-1][0] < LAST

    filler.unlink()
    train(experiment, console=quiet())
    assert [step for step, _ in history(run, "train/loss")] == list(range(1, LAST + 1))
    client = MlflowClient(run.tracking)
    assert client.get_run(run.mlflow_run_id).info.status == "FINISHED"
    pictures = client.list_artifacts(run.mlflow_run_id, "images")
    assert {int(file.path.split("+")[2]) for file in pictures} == {0, 5, 10, 14, 19, 24, 28, 33, 38}
