"""A notice on loopback drains a node of a real cluster, which is neither the machine's nor that of the other tests."""

import http.server
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

pytestmark = pytest.mark.cluster


class Cluster:
    """The process that has the cluster."""

    def __init__(self, folder: str, environment: dict[str, str]) -> None:
        script = Path(__file__).with_name("two_nodes.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script), folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        told = json.loads(self._line())
        self.address, self.spot = told["address"], told["spot"]

    def draining(self) -> dict[str, int]:
        self._tell("draining")
        found: dict[str, int] = json.loads(self._line())
        return found

    def release(self) -> None:
        self._tell("release")

    def end(self) -> None:
        self.process.communicate(timeout=60)

    def _tell(self, what: str) -> None:
        assert self.process.stdin is not None
        print(what, file=self.process.stdin, flush=True)

    def _line(self) -> str:
        assert self.process.stdout is not None
        return next(line for line in self.process.stdout if line.startswith("{"))


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """Ray's settings: loopback only, a token of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {
        **kept,
        "PYTHONUNBUFFERED": "1",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }


@pytest.fixture(scope="module")
def cluster(environment: dict[str, str]) -> Iterator[Cluster]:
    # Not below pytest's folder: the path of a socket has at most 107 characters.
    folder = tempfile.mkdtemp(prefix="mimiclab-", dir="/tmp")
    found = Cluster(folder, environment)
    yield found
    found.end()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def notice() -> Iterator[dict[str, str]]:
    """What AWS announces; its address is under "server"."""
    announced: dict[str, str] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self.answer(200, "token")

        def do_GET(self) -> None:
            asked = self.headers.get("X-aws-ec2-metadata-token") == "token"
            found = self.path == "/latest/meta-data/spot/instance-action" and "action" in announced
            self.answer((200 if found else 404) if asked else 401, json.dumps(announced) if found else "")

        def answer(self, status: int, text: str) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        announced["server"] = f"http://127.0.0.1:{server.server_port}"
        yield announced
        server.shutdown()


def spot_watch(environment: dict[str, str], *args: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "mimiclab", "spot-watch", *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def finish(process: "subprocess.Popen[str]") -> tuple[int, str]:
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


def test_a_notice_drains_the_node(cluster: Cluster, environment: dict[str, str], notice: dict[str, str]) -> None:
    here = {**environment, "AWS_EC2_METADATA_SERVICE_ENDPOINT": notice["server"]}
    once = ("--once", "--cloud", "aws", "--address", cluster.address)
    deadline = int(time.time()) + 90
    notice.update(action="terminate", time=datetime.fromtimestamp(deadline, UTC).isoformat())

    code, output = finish(spot_watch(here, *once))
    assert code == 2
    assert "2 nodes of Ray run on this machine" in output
    assert cluster.draining() == {}

    code, output = finish(spot_watch(here, *once, "--node-id", cluster.spot))
    assert code == 0, output
    assert f"drained node {cluster.spot}" in output
    assert cluster.draining() == {cluster.spot: deadline * 1000}

    # Ray itself would accept to drain a node that does not exist.
    notice["time"] = "2026-01-01T00:00:00Z"
    code, output = finish(spot_watch(here, *once, "--node-id", "0" * 56))
    assert code == 1
    assert "is not among the 2 nodes" in output
    assert cluster.draining() == {cluster.spot: deadline * 1000}


def test_the_end_of_a_pod_drains_the_node_and_is_waited_for(cluster: Cluster, environment: dict[str, str]) -> None:
    address = ("--address", cluster.address, "--node-id", cluster.spot)
    process = spot_watch(environment, "--cloud", "kubernetes", "--grace-seconds", "30", *address)
    assert process.stdout is not None
    assert any("watching over node" in line for line in process.stdout)
    process.send_signal(signal.SIGTERM)
    asked = time.time()
    assert any("drained node" in line for line in process.stdout)
    took = time.time() - asked

    assert took < 15
    assert cluster.draining() == {cluster.spot: pytest.approx((asked + 30) * 1000, abs=1000)}
    assert process.poll() is None

    cluster.release()  # a drained node without work ends
    code, output = finish(process)
    assert code == 0, output
    assert re.fullmatch(r"\S+ the node is gone\n", output)
    assert time.time() - asked < 30
