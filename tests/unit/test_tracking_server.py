"""A real MLflow server on a loopback port that goes away in the middle of a run and comes back."""

import contextlib
import http.server
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
from PIL import Image

from mimiclab.errors import UserError
from mimiclab.tracking import pages, runs, ui
from mimiclab.tracking.client import connect
from mimiclab.tracking.writer import MlflowTracker

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def train(tracker: MlflowTracker, first: int, last: int) -> list[float]:
    """Log steps as training would and return the seconds that each call took."""
    took = []
    for step in range(first, last + 1):
        start = time.perf_counter()
        tracker.log_metrics(step, {"train/loss": 1 / step, "train/lr": 0.1})
        took.append(time.perf_counter() - start)
        time.sleep(0.05)
    return took


def wait_until_sent(tracker: MlflowTracker, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while tracker.unsent():
        assert time.monotonic() < deadline, f"{len(tracker.unsent())} rows are still unsent"
        time.sleep(0.1)


def start_ui(uri: str, port: int) -> "subprocess.Popen[str]":
    """What `mimiclab ui` does, in a process of its own."""
    code = f"from mimiclab.tracking.ui import serve; serve({uri!r}, {port}, 'cells')"
    return subprocess.Popen([sys.executable, "-u", "-c", code], stdout=subprocess.PIPE, text=True)


def read_until(process: "subprocess.Popen[str]", words: str) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if words in line:
            return line
    raise AssertionError(f"the process ended without saying {words!r}")


def status_of(url: str, host: str) -> int:
    request = urllib.request.Request(url, headers={"Host": host})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_nothing_is_missing_and_nothing_twice_after_an_outage(
    tmp_path: Path, free_port: int, caplog: pytest.LogCaptureFixture
) -> None:
    store = f"sqlite:///{tmp_path}/mlflow.db"
    uri = f"http://127.0.0.1:{free_port}"
    took = []
    with ui.server(store, free_port) as running:
        runs.check_tracking(uri)
        with pytest.raises(UserError, match=f"port {free_port} is in use"), ui.server(store, free_port):
            pass
        run_id = runs.open_run(uri, "cells", "night", "abc", {"optim.lr": "0.1"}, {})
        tracker = MlflowTracker(uri, run_id)
        took += train(tracker, 1, 20)
        wait_until_sent(tracker, 30)

        os.killpg(running.process.pid, signal.SIGKILL)
        running.process.wait()
        took += train(tracker, 21, 60)
        tracker.log_picture("val/first", 60, Image.new("RGB", (32, 32), "red"))
        time.sleep(2)
        assert {row.step for row in tracker.unsent()} == set(range(21, 61))
        assert "what is logged is kept" in caplog.text
        with pytest.raises(UserError, match=r"where\.tracking.*does not answer"):
            runs.check_tracking(uri)

    show = start_ui(store, free_port)
    try:
        link = read_until(show, "leaderboard: ")
        experiment_id = connect(store).get_experiment_by_name("cells").experiment_id
        assert link.strip() == f"leaderboard: {pages.shared_view_page(uri, experiment_id, 'leaderboard')}"

        took += train(tracker, 61, 80)
        tracker.log_metrics(80, {"student/AP": float("inf"), "teacher/AP": float("nan")})
        assert tracker.close(60) == []
        client = connect(uri)
        for key in ("train/loss", "train/lr"):
            history = client.get_metric_history(run_id, key)
            assert [point.step for point in history] == list(range(1, 81)), key
        values = client.get_run(run_id).data.metrics
        assert values["student/AP"] == sys.float_info.max
        assert values["teacher/AP"] != values["teacher/AP"]

        (picture,) = (f.path for f in client.list_artifacts(run_id, "images") if f.path.endswith(".png"))
        assert Path(client.download_artifacts(run_id, picture, str(tmp_path))).stat().st_size > 0
        assert (tmp_path / "mlflow-artifacts").is_dir()

        runs.end_run(uri, run_id, "FINISHED")
        search = f"{uri}/api/2.0/mlflow/experiments/get?experiment_id={experiment_id}"
        assert status_of(search, f"127.0.0.1:{free_port}") == 200
        assert status_of(search, f"10.evil.com:{free_port}") == 403
    finally:
        show.send_signal(signal.SIGINT)
        assert show.wait(30) == 0
    with pytest.raises(UserError, match="does not answer"):
        runs.check_tracking(uri)

    # A machine that is busy may pause a process; a call that waits for the server takes seconds.
    assert sorted(took)[int(0.95 * len(took))] < 0.005
    assert max(took) < 0.25


class RefusingProxy(http.server.BaseHTTPRequestHandler):
    """As a company's: it goes out to the world, and not to what its users call 127.0.0.1."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_error(403)

    def do_POST(self) -> None:
        self.do_GET()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What a proxy was asked that the environment names."""
    RefusingProxy.asked.clear()
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), RefusingProxy) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{listening.server_port}")
        yield RefusingProxy.asked
        listening.shutdown()


def test_a_proxy_is_not_asked_for_the_server(tmp_path: Path, free_port: int, proxy: list[str]) -> None:
    store = f"sqlite:///{tmp_path}/mlflow.db"
    runs.open_run(store, "cells", "night", "abc", {}, {})

    show = start_ui(store, free_port)
    try:
        read_until(show, "leaderboard: ")
    finally:
        show.send_signal(signal.SIGINT)
        assert show.wait(30) == 0
    assert proxy == []


def test_a_server_that_does_not_start_is_told_of_with_what_it_said(tmp_path: Path, free_port: int) -> None:
    path = tmp_path / "mlflow.db"
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE alembic_version (version_num TEXT)")
        connection.execute("INSERT INTO alembic_version VALUES ('0123456789ab')")

    with pytest.raises(UserError) as caught, ui.server(f"sqlite:///{path}", free_port):
        pass

    first, *said = str(caught.value).splitlines()
    assert first == (
        f"where.tracking: sqlite:///{path}: its MLflow server ended with code 1; expected it to answer at "
        f"http://127.0.0.1:{free_port}. It said last:"
    )
    assert len(said) <= 10
    assert "0123456789ab" in "\n".join(said)


WRITER = """
import sys
from mimiclab.tracking.protocol import Table
from mimiclab.tracking.runs import open_run
from mimiclab.tracking.writer import MlflowTracker

uri, name = sys.argv[1:]
run_id = open_run(uri, "cells", f"trial {name}", name, {"optim.lr": name}, {})
tracker = MlflowTracker(uri, run_id)
for step in range(1, 201):
    tracker.log_metrics(step, {f"train/{i}": step + i / 10 for i in range(20)})
tracker.log_table("evaluation/errors.json", Table(("trial",), [[name]]))
left = tracker.close(120)
assert not left and not tracker.unsent_files(), (len(left), tracker.unsent_files())
print(run_id)
"""


@pytest.mark.slow
def test_eight_processes_that_log_at_once_lose_nothing(tmp_path: Path, free_port: int) -> None:
    uri = f"http://127.0.0.1:{free_port}"
    with ui.server(f"sqlite:///{tmp_path}/mlflow.db", free_port):
        processes = [
            subprocess.Popen([sys.executable, "-c", WRITER, uri, str(number)], stdout=subprocess.PIPE, text=True)
            for number in range(8)
        ]
        run_ids = [process.communicate(timeout=300)[0].strip() for process in processes]
        assert [process.returncode for process in processes] == [0] * 8

        client = connect(uri)
        for number, run_id in enumerate(run_ids):
            for i in (0, 7, 19):
                history = client.get_metric_history(run_id, f"train/{i}")
                assert [(row.step, row.value) for row in history] == [(s, s + i / 10) for s in range(1, 201)], run_id
            assert len(client.get_run(run_id).data.metrics) == 20
            table = client.download_artifacts(run_id, "evaluation/errors.json", str(tmp_path))
            assert json.loads(Path(table).read_text())["data"] == [[str(number)]]
