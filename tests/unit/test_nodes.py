"""What happens to a node's processes; that Ray notices is in tests/integration/test_nodes.py."""

import contextlib
import dataclasses
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from mimiclab.cluster import local, state
from mimiclab.cluster.nodes import HEAD, Nodes, spawn
from mimiclab.cluster.state import LocalCluster, ProcessId


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)


@pytest.fixture
def start() -> Iterator[Callable[[str], psutil.Process]]:
    """Starts a shell that runs a script, in a session of its own, and ends it."""
    started: list[psutil.Process] = []

    def start(script: str) -> psutil.Process:
        # Everything that ever descends from the shell is in its group.
        started.append(psutil.Popen(["sh", "-c", script], start_new_session=True, stdout=subprocess.DEVNULL))
        return psutil.Process(started[-1].pid)

    yield start
    for process in started:
        subprocess.run(["kill", "-KILL", "--", f"-{process.pid}"], stderr=subprocess.DEVNULL, check=False)
        process.wait()


@pytest.fixture
def cluster(start: Callable[[str], psutil.Process], tmp_path: Path) -> LocalCluster:
    """A head and a node that takes no rest: it starts a child every millisecond."""
    folder = tmp_path / "ray"
    folder.mkdir()
    [head] = state.identify([start("sleep 300 & wait")])
    while len(group(head)) < 2:
        time.sleep(0.01)
    [node] = state.identify([start("sleep 300 & while true; do sleep 300 & sleep 0.001; done")])
    return LocalCluster(
        head="127.0.0.1:1",
        job_server="http://127.0.0.1:2",
        folder=str(folder),
        environment={"RAY_AUTH_MODE": "token"},
        processes=(head,),
        nodes={"node-1": node},
    )


def group(leader: ProcessId) -> list[psutil.Process]:
    """Everything that ever descended from a process that `start` started and still runs."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if state.is_alive(process) and os.getsid(process.pid) == leader.pid:
                found.append(process)
    return found


def test_a_killed_node_leaves_no_process_though_it_goes_on_to_start_some(cluster: LocalCluster) -> None:
    while len(group(cluster.nodes["node-1"])) < 20:
        time.sleep(0.01)

    Nodes(cluster).kill("node-1")

    assert group(cluster.nodes["node-1"]) == []
    assert len(group(cluster.processes[0])) == 2


def test_a_node_that_has_ended_can_be_killed(cluster: LocalCluster) -> None:
    nodes = Nodes(cluster)
    nodes.kill("node-1")

    nodes.kill("node-1")

    assert nodes.processes("node-1") == []


def test_a_process_that_was_given_the_number_of_a_node_is_left_alone(cluster: LocalCluster) -> None:
    node = cluster.nodes["node-1"]
    known = {"node-1": ProcessId(node.pid, node.started - 60)}

    Nodes(dataclasses.replace(cluster, nodes=known)).kill("node-1")

    assert state.find(node) is not None


def test_the_head_is_not_killed(cluster: LocalCluster) -> None:
    with pytest.raises(ValueError, match="the cluster would end with it"):
        Nodes(cluster).kill(HEAD)

    assert len(group(cluster.processes[0])) == 2


def test_a_node_is_not_tied_to_the_cluster_that_starts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ties = ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_OVERRIDE_RESOURCES", "RAY_REDIS_ADDRESS")
    for name in (*ties, "RAY_health_check_period_ms", "PYTHONPATH"):
        monkeypatch.setenv(name, f"of {name}")

    spawn(["env"], tmp_path / "env", {"RAY_OVERRIDE_LABELS": "its own"}).wait()

    found = (tmp_path / "env").read_text().splitlines()
    assert {"RAY_OVERRIDE_LABELS=its own", "PYTHONPATH=of PYTHONPATH"} <= set(found)
    assert "RAY_health_check_period_ms=of RAY_health_check_period_ms" in found
    assert not [line for line in found if line.startswith(ties)]


def test_a_cluster_that_does_not_answer_is_not_waited_for(cluster: LocalCluster) -> None:
    with pytest.raises(ConnectionRefusedError):
        Nodes(cluster).all()


def test_down_ends_all_nodes(cluster: LocalCluster) -> None:
    cluster.write()

    assert local.down(lambda _: None)

    assert state.find(cluster.processes[0]) is None
    assert state.find(cluster.nodes["node-1"]) is None
    assert state.remembered() is None


def test_a_cluster_with_an_owner_stands_beside_the_machines(cluster: LocalCluster) -> None:
    [this] = state.identify([psutil.Process()])
    owned = dataclasses.replace(cluster, name="cluster-a", owner=this)
    owned.write()

    assert state.remembered("cluster-a") == owned
    assert state.running() is None
    assert not local.down(pytest.fail)
    assert state.find(cluster.nodes["node-1"]) is not None


def test_a_cluster_is_found_by_its_address_and_brings_its_settings(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    owned = dataclasses.replace(cluster, name="cluster-a")
    owned.write()
    monkeypatch.setattr(os, "environ", dict(os.environ))

    assert state.running_at("127.0.0.1:3") is None
    assert "RAY_AUTH_MODE" not in os.environ
    assert state.running_at("127.0.0.1:1") == owned
    assert os.environ["RAY_AUTH_MODE"] == "token"


def test_down_ends_a_cluster_whose_owner_has_ended(
    cluster: LocalCluster, start: Callable[[str], psutil.Process]
) -> None:
    [owner] = state.identify([shell := start("sleep 300")])
    dataclasses.replace(cluster, name="cluster-a", owner=owner).write()
    shell.kill()
    shell.wait()
    said: list[str] = []

    assert local.down(said.append)

    assert said[0].startswith("ended ")
    assert "of an abandoned cluster" in said[0]
    assert state.find(cluster.nodes["node-1"]) is None
    assert not Path(cluster.folder).exists()
    assert not local.down(pytest.fail)
