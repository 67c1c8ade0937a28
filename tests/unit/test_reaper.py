"""Runs that dead drivers left as running, in a real store of MLflow."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

from mimiclab.lease import LEASE, Holder, Lease, _pids, last_holder
from mimiclab.reaper import ENDED_TAG, reap
from mimiclab.runs import Run, Status, read
from mimiclab.storage import Storage
from mimiclab.tracking import runs as tracking
from mimiclab.tracking.client import connect
from mimiclab.tracking.protocol import Row
from mimiclab.tracking.writer import _send_rows

DEAD = Holder(
    owner="0" * 16, host="spot-7", pids="another machine", pid=71, started=0.0, since=0.0, heartbeat=1700000000.5
)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture
def make(tmp_path: Path, uri: str) -> Callable[..., Run]:
    """Makes a run that MLflow knows as running."""

    def made(name: str, status: Status = "running", holder: Holder | None = DEAD, tracked: str = uri) -> Run:
        run_id = tracking.open_run(uri, "cells", f"{tmp_path.name}/{name}", "abc", {}, {})
        run = Run(Storage(tmp_path / name), "abc", tracked, run_id, ("a",), status)
        run.write()
        if holder is not None:
            run.storage.write(LEASE, json.dumps(asdict(holder)).encode())
        return run

    return made


def never(text: str) -> None:
    raise AssertionError(text)


def status(run: Run) -> tuple[str, str]:
    """In its folder and in MLflow."""
    found = read(run.storage)
    assert found is not None
    return found.status, connect(run.tracking).get_run(run.mlflow_run_id).info.status


@pytest.mark.slow
def test_a_run_whose_driver_is_dead_was_killed_when_it_was_last_heard_of(make: Callable[..., Run]) -> None:
    run = make("x")
    (corrected,) = reap([run], never)
    assert corrected == replace(run, status="killed")
    assert status(run) == ("killed", "KILLED")
    found = connect(run.tracking).get_run(run.mlflow_run_id)
    assert found.info.end_time == 1700000000500
    assert found.data.tags[ENDED_TAG] == "process 71 on spot-7 died; found out by a later command"
    # What the dead driver knew is for the next one.
    assert last_holder(run.storage) == DEAD
    assert reap([corrected], never) == []


def test_a_killed_process_is_found_dead_at_once(make: Callable[..., Run]) -> None:
    run = make("x", holder=None)
    code = (
        "import sys, time; from mimiclab.lease import Lease; from mimiclab.storage import Storage;"
        "lease = Lease.take(Storage(sys.argv[1]), 'x'); print('took', flush=True); time.sleep(600)"
    )
    driver = subprocess.Popen([sys.executable, "-c", code, run.storage.uri], stdout=subprocess.PIPE, text=True)
    try:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "took\n"
        assert reap([run], never) == []
        assert status(run) == ("running", "RUNNING")
    finally:
        driver.kill()
        driver.communicate()
    holder = last_holder(run.storage)
    assert holder is not None
    assert [each.name for each in reap([run], never)] == ["x"]
    end_time = connect(run.tracking).get_run(run.mlflow_run_id).info.end_time
    assert end_time == int(holder.heartbeat * 1000)


def test_a_run_without_a_lease_ended_with_the_last_that_it_recorded(make: Callable[..., Run]) -> None:
    run = make("x", holder=None)
    _send_rows(connect(run.tracking), run.mlflow_run_id, [Row("a", 0.5, 1900000000750, 7)])
    assert len(reap([run], never)) == 1
    assert connect(run.tracking).get_run(run.mlflow_run_id).info.end_time == 1900000000750


@pytest.mark.parametrize("stored", ["finished", "failed", "killed"])
def test_a_run_that_ended_is_left_alone(make: Callable[..., Run], stored: Status) -> None:
    run = make("x", stored)
    assert reap([run], never) == []
    assert status(run) == (stored, "RUNNING")


def test_a_run_that_another_machine_trains_is_left_alone(make: Callable[..., Run]) -> None:
    run = make("x", holder=replace(DEAD, heartbeat=time.time() - 30))
    assert reap([run], never) == []
    assert status(run) == ("running", "RUNNING")


def test_what_mlflow_knows_better_or_not_at_all_stays(make: Callable[..., Run], tmp_path: Path) -> None:
    ended = make("ended")
    tracking.end_run(ended.tracking, ended.mlflow_run_id, "FAILED", 1600000000.0)
    unknown = replace(make("unknown"), mlflow_run_id="0" * 32)
    gone = make("gone", tracked=f"sqlite:///{tmp_path}/gone.db")
    assert [run.status for run in reap([ended, unknown, gone], never)] == ["killed"] * 3
    info = connect(ended.tracking).get_run(ended.mlflow_run_id).info
    assert (info.status, info.end_time) == ("FAILED", 1600000000000)
    assert not (tmp_path / "gone.db").exists()


@pytest.mark.slow
def test_a_server_that_does_not_answer_stops_nothing_and_is_asked_once(
    make: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as listening:  # it takes connections and never answers
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        runs = [make("a", tracked=address), make("b", tracked=address), make("c")]
        warnings: list[str] = []
        began = time.monotonic()
        assert [run.name for run in reap(runs, warnings.append)] == ["c"]
        assert time.monotonic() - began < 8
    (warning,) = warnings
    assert warning.startswith(f"run a: its driver died, which could not be recorded at {address}: ")
    # The next command tries again.
    assert [run.status for run in map(read, (runs[0].storage, runs[1].storage)) if run] == ["running"] * 2


@pytest.mark.slow
def test_a_folder_that_cannot_be_read_stops_nothing(make: Callable[..., Run]) -> None:
    bad, good = make("bad", holder=None), make("good")
    assert bad.storage.local is not None
    (bad.storage.local / LEASE).mkdir()
    warnings: list[str] = []
    assert [run.name for run in reap([bad, good], warnings.append)] == ["good"]
    assert len(warnings) == 1
    assert "run bad: " in warnings[0]


def test_a_driver_that_starts_while_mlflow_is_asked_keeps_its_run(
    make: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make("x")
    leases = []
    ask = tracking.unfinished_since

    def slowly(uri: str, run_id: str) -> float | None:
        leases.append(Lease.take(run.storage, "x"))
        return ask(uri, run_id)

    monkeypatch.setattr(tracking, "unfinished_since", slowly)
    try:
        assert reap([run], never) == []
        assert status(run) == ("running", "RUNNING")
    finally:
        leases[0].release()


def test_mlflow_is_not_even_loaded_when_there_is_nothing_to_correct(make: Callable[..., Run]) -> None:
    here = psutil.Process()
    mine = replace(DEAD, pid=os.getpid(), started=here.create_time(), pids=_pids())
    runs = [make("a", "finished"), make("b", holder=mine)]
    code = (
        "import sys; from pathlib import Path; from mimiclab.runs import read; from mimiclab.reaper import reap;"
        "assert reap([read(Path(path)) for path in sys.argv[1:]], print) == [];"
        "assert 'mlflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, *(run.storage.uri for run in runs)], check=True)
