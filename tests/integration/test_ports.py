"""What listens where, on a machine with a cluster and MLflow's pages, and what it lets somebody do without the token.

The table of cluster/README.md is held to it: for a cluster of this machine, which keeps to loopback, and for a head
that is started as those of the clouds are.
"""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import yaml
from settings import AFTER_UP, users_settings
from tinyruns import TINY

from mimiclab.cluster import local, state
from mimiclab.cluster.nodes import HEAD, Nodes, spawn, tree
from mimiclab.cluster.server import is_served_here
from mimiclab.cluster.state import LocalCluster
from mimiclab.tracking import runs as tracking

pytestmark = [pytest.mark.cluster, pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(900)]

CLUSTER = Path(__file__).parents[2] / "cluster"
LOOPBACK = {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
# Ray's processes by the names that the table has for them.
PROCESSES = {
    "gcs_server": "head (GCS)",
    "dashboard/dashboard.py": "dashboard and job server",
    "ray.util.client.server": "Ray client",
    "autoscaler/": "autoscaler's metrics",
    "raylet": "raylet",
    "ray::DashboardAgent": "node's agents",
    "ray::RuntimeEnvAgent": "node's agents",
    "ray::RayTrainWorker": "training",
    "ray::": "workers and drivers",
    "mimiclab train": "workers and drivers",
}


class Socket(NamedTuple):
    """What listens."""

    process: str
    host: str
    port: int


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is remembered of clusters is kept apart, and Ray's settings are a user's."""
    with users_settings(tmp_path_factory.mktemp("state"), AFTER_UP):
        yield


@pytest.fixture(scope="module")
def nodes(settings: None) -> Iterator[Nodes]:
    try:
        mimiclab("cluster", "up", "--nodes", "2")
        cluster = state.running()
        assert cluster is not None
        yield Nodes(cluster)
    finally:
        mimiclab("cluster", "down")


def mimiclab(*args: str) -> str:
    command = [sys.executable, "-m", "mimiclab", *args]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=400)
    assert done.returncode == 0, done.stdout
    return done.stdout


def listening(processes: list[psutil.Process]) -> list[Socket]:
    """Every port of TCP and UDP at which processes hear others."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            # Of some a title of its own is all there is.
            command = " ".join(process.cmdline()) or process.name()
            name = next((title for part, title in PROCESSES.items() if part in command), command)
            for each in process.net_connections(kind="inet"):
                if each.status == psutil.CONN_LISTEN or (each.type == socket.SOCK_DGRAM and not each.raddr):
                    found.append(Socket(name, each.laddr.ip, each.laddr.port))
    return found


def answer(url: str, token: str | None = None) -> int:
    """The status that a request is answered with."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def shows_pages(each: Socket) -> bool:
    """Whether a port shows something to who has no token."""
    host = each.host.removeprefix("::ffff:")
    try:
        return answer(f"http://{'127.0.0.1' if host in ('0.0.0.0', '::') else host}:{each.port}/metrics") == 200
    except (OSError, http.client.HTTPException):  # it speaks gRPC
        return False


def table() -> dict[str, dict[str, str]]:
    """The table of cluster/README.md: its rows by what listens, each by its columns."""
    text = (CLUSTER / "README.md").read_text()
    lines = text[text.index("## What listens where") :].split("\n\n")[1].splitlines()
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_cluster_of_this_machine_is_reached_from_nowhere_else(nodes: Nodes, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY.replace("ROOT", str(tmp_path)))
    mimiclab("submit", "train", str(tmp_path / "tiny.yaml"), "--set", "optim.epochs=1000")
    wait_until(lambda: list((tmp_path / "runs" / "tiny" / "checkpoints").glob("step-*")))
    processes = [process for name in (HEAD, "node-1", "node-2") for process in nodes.processes(name)]

    found = listening(processes)

    mimiclab("jobs", "stop", "tiny")
    where = {what: row["`mimiclab cluster up`"] for what, row in table().items()}
    assert {each.process for each in found} == set(PROCESSES.values())
    beyond = {each.process for each in found if each.host not in LOOPBACK}
    assert beyond == {what for what in PROCESSES.values() if "loopback" not in where[what]}
    job_server = int(nodes.cluster.job_server.rpartition(":")[2])
    assert Socket("dashboard and job server", "127.0.0.1", job_server) in found


def test_the_job_server_refuses_who_has_no_token(nodes: Nodes) -> None:
    server = nodes.cluster.job_server
    token = (Path.home() / ".ray" / "auth_token").read_text().strip()

    for path in ("/api/jobs/", "/api/v0/nodes", "/api/version"):
        assert answer(server + path) == 401
        assert answer(server + path, token="0" * 64) == 403
        assert answer(server + path, token=token) == 200
    job = urllib.request.Request(
        f"{server}/api/jobs/", json.dumps({"entrypoint": "true"}).encode(), {"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(job, timeout=20)


def test_the_head_refuses_who_has_no_token(nodes: Nodes) -> None:
    connect = f"import ray; ray.init(address={nodes.cluster.head!r}, logging_level='error'); print('connected')"

    def attempt(token: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-c", connect],
            env={**os.environ, "RAY_AUTH_TOKEN": token},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=200,
        )

    refused = attempt("0" * 64)
    assert "connected" not in refused.stdout
    assert "InvalidAuthToken" in refused.stdout or "authentication" in refused.stdout.lower()
    assert "connected" in attempt((Path.home() / ".ray" / "auth_token").read_text().strip()).stdout


def test_the_pages_of_mlflow_are_reached_from_nowhere_else(settings: None, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracking.open_run(uri, "mimiclab", "one", "abc", {}, {})
    command = [sys.executable, "-m", "mimiclab", "ui", "--tracking", uri]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pages:
        try:
            assert pages.stdout is not None
            link = next(line for line in pages.stdout if "http://" in line and "starts" not in line)
            port = int(re.search(r"http://127\.0\.0\.1:(\d+)", link)[1])  # type: ignore[index]
            found = listening(tree([psutil.Process(pages.pid)]))
            assert port in {each.port for each in found}
            assert {each.host for each in found} <= LOOPBACK
            request = urllib.request.Request(f"http://127.0.0.1:{port}/", headers={"Host": "lab.example.org"})
            with pytest.raises(urllib.error.HTTPError, match="403"):  # a page of that name, which points here
                urllib.request.urlopen(request, timeout=20)
        finally:
            pages.send_signal(signal.SIGINT)
            pages.wait(60)


def test_a_dashboard_for_others_comes_with_a_warning_and_brings_nothing_else_along(settings: None) -> None:
    said: list[str] = []
    cluster = local.up(0, said.append, owned=True, dashboard_host="0.0.0.0")
    try:
        port = int(cluster.job_server.rpartition(":")[2])
        [warning] = [line for line in said if line.startswith("warning: ")]
        assert f"other machines reach the dashboard and the job server at 0.0.0.0:{port}" in warning
        assert "can run commands here as you" in warning
        found = listening(Nodes(cluster).processes(HEAD))
        assert [each for each in found if each.host not in LOOPBACK] == [
            Socket("dashboard and job server", "0.0.0.0", port)
        ]
        assert answer(f"{cluster.job_server}/api/jobs/") == 401
    finally:
        local.end(cluster)


def test_a_head_of_a_cloud_listens_where_the_table_says(settings: None) -> None:
    head, dashboard, client, objects, metrics = local.free_ports(5)
    folder = Path(tempfile.mkdtemp(prefix="mimiclab-", dir="/tmp"))
    commands = yaml.safe_load((CLUSTER / "aws-spot.yaml").read_text())["head_start_ray_commands"]
    [start] = [line for line in commands if "ray start --head" in line]
    [host] = re.findall(r"--dashboard-host=(\S+)", start)
    starter = spawn(
        [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
            *("--port", str(head), "--object-manager-port", str(objects), "--ray-client-server-port", str(client)),
            *("--dashboard-host", host, "--dashboard-port", str(dashboard), "--temp-dir", str(folder)),
            *("--num-cpus", "0", "--object-store-memory", "100000000"),
        ],
        folder / "head.log",
        {"AUTOSCALER_METRIC_PORT": str(metrics), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"},
    )
    cluster = LocalCluster(
        f"127.0.0.1:{head}",
        f"http://{host}:{dashboard}",
        str(folder),
        {},
        state.identify([starter]),
        name="as-in-a-cloud",
    )
    rows = table()
    expected = {what: rows[what]["`ray up`"] for what in set(PROCESSES.values()) - {"workers and drivers", "training"}}
    try:
        deadline = time.monotonic() + 200
        found: set[Socket] = set()
        while {each.process for each in found} != expected.keys():
            assert time.monotonic() < deadline, found
            time.sleep(1)
            found = set(listening(tree([starter])))
        beyond = {each for each in found if each.host not in LOOPBACK}
        assert {each.process for each in beyond} == {
            what for what, where in expected.items() if "loopback" not in where
        }
        shown = {each.process for each in beyond if shows_pages(each)}
        assert shown == {what for what in expected if "numbers" in rows[what]["protected by"]}
        # Nobody remembers this head. That it is here shows all the same, and not at the near end of a tunnel.
        assert is_served_here(cluster.job_server)
        with socket.create_server(("127.0.0.1", 0)) as tunnel:
            assert not is_served_here(f"http://127.0.0.1:{tunnel.getsockname()[1]}")
    finally:
        local.end(cluster)
