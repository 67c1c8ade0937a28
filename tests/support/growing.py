"""A cluster on this machine that starts its nodes as they are needed, by Ray's own autoscaler."""

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from mimiclab.cluster import local, state
from mimiclab.cluster import node as node_process
from mimiclab.cluster.nodes import HEAD, HEAD_LABELS, OBJECT_STORE_BYTES, SPOT_LABELS, Nodes, spawn, tree
from mimiclab.cluster.state import LocalCluster

_PROVIDER = "machines.Machines"
_HEAD_TYPE = "ray.head.default"  # as the provider has it
_HEAD_ID = "f" * 51 + "00000"
_NODE_ID = "RAY_OVERRIDE_NODE_ID_FOR_TESTING"
# Nothing is copied to a machine, or run there, before it joins.
_LISTS = (
    *("cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands", "setup_commands"),
    *("head_setup_commands", "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands"),
)


@contextlib.contextmanager
def growing_cluster(*, max_nodes: int, idle_s: float) -> Iterator[Nodes]:
    """A head without CPUs, at whose side the autoscaler starts up to `max_nodes` spot machines of 1 CPU each.

    It is this machine's cluster for as long as the context lasts. All that it starts descends from its first process.

    Args:
        max_nodes: beside the head.
        idle_s: how long a node has nothing to do before it is ended.
    """
    folder = Path(tempfile.mkdtemp(prefix="mimiclab-", dir="/tmp"))
    head, job_server, client_server, agent, metrics = local.free_ports(5)
    address = f"127.0.0.1:{head}"
    file = folder / "cluster.yaml"
    file.write_text(json.dumps(_config(address, max_nodes=max_nodes, idle_s=idle_s)))
    local.make_sure_of_token()
    environment = {"RAY_AUTH_MODE": "token", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    labels = {**HEAD_LABELS, "mimiclab/max-CPU": str(max_nodes)}
    starter = spawn(
        [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--node-name", HEAD),
            *("--port", str(head), "--dashboard-host", "127.0.0.1", "--dashboard-port", str(job_server)),
            *("--ray-client-server-port", str(client_server), "--dashboard-agent-listen-port", str(agent)),
            *("--min-worker-port", "0", "--max-worker-port", "0"),
            *("--temp-dir", str(folder), "--disable-usage-stats", "--num-cpus", "0"),
            *("--object-store-memory", str(OBJECT_STORE_BYTES), "--autoscaling-config", str(file)),
            *("--labels", ",".join(f"{key}={value}" for key, value in labels.items())),
        ],
        folder / "head.log",
        {
            **environment,
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": _HEAD_ID,
            _NODE_ID: _HEAD_ID,
            # For the provider of machines.
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]).strip(
                os.pathsep
            ),
            "RAY_health_check_period_ms": "1000",  # five of them make a node dead
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "AUTOSCALER_METRIC_PORT": str(metrics),
        },
    )
    cluster = LocalCluster(
        address, f"http://127.0.0.1:{job_server}", str(folder), environment, state.identify([starter])
    )
    cluster.write()
    nodes = Nodes(cluster)
    try:
        local._wait_for(lambda: local._is_silent(head), "its head", starter, cluster, print)
        nodes.wait_alive(HEAD)
        local._wait_for(lambda: local._takes_no_jobs(cluster, agent), "its job server", starter, cluster, print)
        yield nodes
    finally:
        local.end(cluster)


def machines(nodes: Nodes) -> list[psutil.Process]:
    """The first process of each machine that the autoscaler has started and that runs."""
    found = []
    for process in nodes.processes(HEAD):
        with contextlib.suppress(psutil.NoSuchProcess):
            if node_process.__name__ in process.cmdline():
                found.append(process)
    return found


def kill_machine(machine: psutil.Process) -> None:
    """End all processes of a machine at once."""
    for process in tree([machine]):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _config(address: str, *, max_nodes: int, idle_s: float) -> dict[str, object]:
    spot = {"CPU": 1, "object_store_memory": OBJECT_STORE_BYTES}
    return {
        **{key: {} for key in ("auth", "file_mounts")},
        **{key: [] for key in _LISTS},
        "file_mounts_sync_continuously": False,
        "cluster_name": "growing",
        "max_workers": max_nodes,
        "idle_timeout_minutes": idle_s / 60,
        "provider": {
            # Not the type `fake_multinode`: a file that belongs to it is not among those that are installed.
            "type": "external",
            "module": _PROVIDER,
            "head_node_id": _HEAD_ID,
            # Without it, nodes join whatever listens on 6379.
            "gcs_address": address,
            "launch_multiple": True,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "head_node_type": _HEAD_TYPE,
        "available_node_types": {
            _HEAD_TYPE: {"node_config": {}, "resources": {"CPU": 0}, "labels": HEAD_LABELS, "max_workers": 0},
            "spot": {
                "node_config": {},
                "resources": spot,
                "labels": SPOT_LABELS,
                "min_workers": 0,
                "max_workers": max_nodes,
            },
        },
    }
