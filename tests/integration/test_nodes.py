"""Machines that come and go: one real cluster on loopback for all tests, beside the one of the other files.

Measured on 2 cores with nothing else to do: a head takes 1.4 s until nodes can join and 5.2 s until it takes jobs, with
two nodes at its side all is up after 8.6 s; one more node takes 1.6 s, a drain 1.1 s, the end of everything 2.8 s. Ray
takes a killed node for dead after 15 s (five health checks in 3 s each), and a silent one after 65 s (10 s more each).
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from settings import users_settings

from mimiclab.cluster import local, state
from mimiclab.cluster.nodes import HEAD, Nodes

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]

DRIVER = """
import json, os, sys, time
from pathlib import Path
import ray

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # Ray writes on standard output what it thinks of lost nodes

def answer(found):
    print(json.dumps(found), file=answers, flush=True)

from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

address, folder, *ids = sys.argv[1:]
ray.init(address=address, log_to_driver=False, logging_level="error")

def here():
    return ray.get_runtime_context().get_node_id()

def wait_for(path):
    while not path.exists():
        time.sleep(0.05)

@ray.remote(num_cpus=1)
def meet(others):
    # Ends where as many run at the same time.
    (Path(folder) / f"met-{os.getpid()}").touch()
    while len(list(Path(folder).glob("met-*"))) < others:
        time.sleep(0.05)
    return here()

@ray.remote(num_cpus=0)
def stay():
    Path(folder, "stays-" + here()).write_text(str(os.getpid()))
    wait_for(Path(folder, "go"))
    return here()

@ray.remote(num_cpus=0, resources={"late": 1})
def late():
    return here()

@ray.remote(num_cpus=1)
class Rank:
    def reduce(self, rank, size, port):
        import torch
        from torch import distributed
        distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
        total = torch.tensor([2.0**rank])
        distributed.all_reduce(total)
        return here(), total.item()
"""


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is remembered of clusters is kept apart, and Ray's settings are as the clusters want them."""
    own = {
        "RAY_AUTH_MODE": "token",
        "RAY_health_check_period_ms": "1000",  # five of them make a node dead
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }
    with users_settings(tmp_path_factory.mktemp("state"), own):
        yield


@pytest.fixture(scope="module")
def nodes(settings: None) -> Iterator[Nodes]:
    with local.owned_cluster(lambda _: None, num_nodes=2) as started:
        yield started


def drive(nodes: Nodes, folder: Path, code: str, *ids: str) -> "subprocess.Popen[str]":
    """A driver of that cluster."""
    arguments = [sys.executable, "-c", DRIVER + code, nodes.cluster.head, str(folder), *ids]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)


def result(driver: "subprocess.Popen[str]") -> list[object]:
    output, _ = driver.communicate(timeout=400)
    assert driver.returncode == 0
    found: list[object] = json.loads(output)
    return found


def read_when_there(path: Path) -> str:
    deadline = time.monotonic() + 200
    while not path.exists() or not (text := path.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return text


def test_tasks_run_on_the_nodes_and_not_on_the_head(nodes: Nodes, tmp_path: Path) -> None:
    head, first, second = nodes.all()
    assert [node.name for node in (head, first, second)] == [HEAD, "node-1", "node-2"]
    assert head.labels["ray.io/market-type"] == "on-demand"
    assert first.labels["ray.io/market-type"] == "spot"
    assert "CPU" not in head.resources
    assert first.resources["CPU"] == 1

    found = result(drive(nodes, tmp_path, "answer(ray.get([meet.remote(2) for _ in range(2)]))"))

    assert sorted(found) == sorted([first.id, second.id])


def test_ranks_on_two_nodes_find_each_other(nodes: Nodes, tmp_path: Path) -> None:
    [port] = local.free_ports(1)

    found = result(
        drive(
            nodes,
            tmp_path,
            "ranks = [Rank.options(scheduling_strategy=On(id, soft=False)).remote() for id in ids]\n"
            f"answer(ray.get([rank.reduce.remote(i, 2, {port}) for i, rank in enumerate(ranks)]))",
            *(ids := [nodes.get("node-1").id, nodes.get("node-2").id]),
        )
    )

    assert found == [[ids[0], 3.0], [ids[1], 3.0]]


def test_a_task_that_waits_for_a_node_runs_on_the_one_that_is_added(nodes: Nodes, tmp_path: Path) -> None:
    driver = drive(nodes, tmp_path, "answer([ray.get(late.remote())])")

    added = nodes.add(resources={"late": 1}, labels={"ray.io/market-type": "on-demand"})

    assert added.state == "alive"
    assert added.labels["ray.io/market-type"] == "on-demand"
    assert result(driver) == [added.id]
    nodes.kill(added.name)


def test_what_ran_on_a_killed_node_runs_again_elsewhere(nodes: Nodes, tmp_path: Path) -> None:
    doomed = nodes.add()
    driver = drive(
        nodes,
        tmp_path,
        "answer([ray.get(stay.options(scheduling_strategy=On(ids[0], True)).remote())])",
        doomed.id,
    )
    pid = int(read_when_there(tmp_path / f"stays-{doomed.id}"))
    processes = nodes.processes(doomed.name)
    assert [worker.pid for worker in nodes.workers(doomed.name)] == [pid]
    assert pid in {process.pid for process in processes}

    nodes.kill(doomed.name)

    assert not any(map(state.is_alive, processes))
    assert nodes.get(doomed.name).state == "alive"  # as far as Ray knows
    killed = time.monotonic()
    found = nodes.wait_dead(doomed.name, 120)
    assert time.monotonic() - killed > 3
    assert found.state == "dead"
    assert "health check" in found.death
    (tmp_path / "go").touch()
    [elsewhere] = result(driver)
    assert elsewhere in {nodes.get(name).id for name in (HEAD, "node-1", "node-2")}


def test_a_drained_node_works_until_its_deadline(nodes: Nodes, tmp_path: Path) -> None:
    node = nodes.add()
    driver = drive(
        nodes,
        tmp_path,
        "answer([ray.get(stay.options(scheduling_strategy=On(ids[0], True)).remote())])",
        node.id,
    )
    read_when_there(tmp_path / f"stays-{node.id}")
    asked = time.time()

    deadline = nodes.drain(node.name, 12)

    assert deadline == pytest.approx(asked + 12, abs=2)
    draining = nodes.get(node.name)
    assert draining.state == "draining"
    assert draining.deadline == pytest.approx(deadline, abs=1e-3)
    while time.time() < deadline - 0.2:
        assert nodes.workers(node.name) != []
        time.sleep(0.1)
    dead = nodes.wait_dead(node.name, 120)
    assert dead.death == "spot reclaim"
    assert nodes.processes(node.name) == []
    (tmp_path / "go").touch()
    assert result(driver) != [node.id]


def test_a_drained_node_without_work_ends_at_once(nodes: Nodes) -> None:
    node = nodes.add()

    nodes.drain(node.name, 600)

    assert nodes.wait_dead(node.name, 200).death == "spot reclaim"
    deadline = time.monotonic() + 200
    while nodes.processes(node.name):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def mimiclab(*args: str) -> str:
    command = [sys.executable, "-m", "mimiclab", *args]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, timeout=400
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_the_machines_cluster_is_another_one_and_leaves_nothing(nodes: Nodes) -> None:
    own = {node.id for node in nodes.all()}
    before = set(Path("/dev/shm").iterdir())
    try:
        output = mimiclab("cluster", "up", "--nodes", "1", "--cpus-per-node", "3")
        machines = state.running()
        assert machines is not None
        assert "offers:     3 CPU\n" in output
        assert "node-1:     alive: 3 CPU, 0 GPU; ray.io/market-type=spot\n" in mimiclab("cluster", "status")
        other = Nodes(machines)
        assert [node.name for node in other.all()] == [HEAD, "node-1"]
        assert own.isdisjoint(node.id for node in other.all())
        processes = [*other.processes(HEAD), *other.processes("node-1")]
        listening = {c.laddr.ip for p in processes for c in p.net_connections() if c.status == psutil.CONN_LISTEN}
        assert listening <= {"127.0.0.1", "::ffff:127.0.0.1"}
    finally:
        output = mimiclab("cluster", "down")

    assert not any(map(state.is_alive, processes))
    assert not Path(machines.folder).exists()
    assert set(Path("/dev/shm").iterdir()) <= before
    assert state.remembered() is None
    assert {node.id for node in nodes.all()} == own
    assert nodes.get("node-1").state == "alive"
    assert nodes.processes("node-1") != []


def test_down_ends_what_a_crashed_starter_left(settings: None) -> None:
    script = "from mimiclab.cluster import local\nwith local.owned_cluster(print, num_nodes=1):\n    pass\n"
    before = set(state.state_file().parent.glob("*.json"))
    with subprocess.Popen([sys.executable, "-c", script]) as starter:
        cluster = None
        while cluster is None or not cluster.nodes:
            for path in set(state.state_file().parent.glob("*.json")) - before:
                cluster = state.remembered(path.stem)
        starter.send_signal(signal.SIGKILL)
    left = cluster.running()
    assert left
    assert state.find(cluster.nodes["node-1"]) is not None

    output = mimiclab("cluster", "down")

    assert f"processes of an abandoned cluster and removed {cluster.folder}" in output
    assert not Path(cluster.folder).exists()
    assert state.find(cluster.nodes["node-1"]) is None
    assert not any(map(state.is_alive, left))
    assert set(state.state_file().parent.glob("*.json")) == before


def test_a_node_that_cannot_start_takes_the_new_cluster_with_it(settings: None) -> None:
    before = set(state.state_file().parent.glob("*.json"))
    said: list[str] = []

    with pytest.raises(RuntimeError, match=r"node-1 did not start:\n(.|\n)*must be nonnegative"):
        local.up(0, said.append, num_nodes=1, cpus_per_node=-1, owned=True)

    folder = Path(said[0].rpartition(" ")[2])
    assert folder.name.startswith("mimiclab-")
    assert not folder.exists()
    assert set(state.state_file().parent.glob("*.json")) == before
