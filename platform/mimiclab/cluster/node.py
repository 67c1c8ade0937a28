"""One more node of a cluster on loopback, as a process: it and all that it started end together.

`ray start` refuses to join a cluster that keeps to the loopback device, and without that setting Ray listens on every
address of the machine. So the node is made as `ray start` makes it, from Ray's own parameters.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from mimiclab.cluster.state import LocalCluster

_POLL_S = 0.2


def command(
    cluster: LocalCluster,
    name: str,
    *,
    num_cpus: int,
    labels: dict[str, str],
    resources: dict[str, float],
    object_store_bytes: int,
) -> list[str]:
    """The command that starts a node and ends with it; it prints what is known of a failure."""
    parameters = {
        "node_name": name,
        "node_ip_address": cluster.head.rpartition(":")[0],
        "gcs_address": cluster.head,
        # Sockets and logs of its own: nodes that start at the same time would ask for the same names.
        "temp_dir": str(Path(cluster.folder) / name),
        "num_cpus": num_cpus,
        "num_gpus": 0,
        "labels": labels,
        "resources": resources,
        "object_store_memory": object_store_bytes,
        # Any that is free. The default of each is one number, for which the second node would wait 5 s, or end.
        "node_manager_port": 0,
        "dashboard_agent_listen_port": 0,
        "min_worker_port": 0,
        "max_worker_port": 0,
    }
    return [sys.executable, "-P", "-m", __name__, json.dumps(parameters)]


def _main(parameters: dict[str, Any]) -> None:
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    # With a reaper, what the node has started ends even if this process is killed.
    node = Node(RayParams(**parameters), head=False, shutdown_at_exit=True, spawn_reaper=True)
    while not node.dead_processes():
        time.sleep(_POLL_S)
    node.kill_all_processes(check_alive=False, allow_graceful=False)
    os._exit(0)


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
