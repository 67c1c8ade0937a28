"""Ray's fake provider of machines, each with a disk of its own: loaded by the autoscaler of `growing_cluster`.

Ray's has all of them share the head's folder, in which a node that joins replaces what the others are running.
"""

import os
from pathlib import Path
from typing import Any

import psutil
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider
from ray.autoscaler.tags import (
    NODE_KIND_WORKER,
    STATUS_UP_TO_DATE,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

from mimiclab.cluster import node
from mimiclab.cluster.nodes import OBJECT_STORE_BYTES, spawn, tree
from mimiclab.cluster.state import LocalCluster

NODE_ID = "RAY_OVERRIDE_NODE_ID_FOR_TESTING"


class Machines(FakeMultiNodeProvider):  # type: ignore[misc]
    """Starts and ends a process for each machine, from which all else on it descends."""

    def _create_node_with_resources_and_labels(
        self, node_config: object, tags: dict[str, str], count: int, resources: dict[str, Any], labels: dict[str, str]
    ) -> None:
        with self.lock:
            machine = self._next_hex_node_id()
            folder = Path(os.environ["TMPDIR"])
            name = f"node-{machine.lstrip('f').lstrip('0')}"
            command = node.command(
                LocalCluster(self._gcs_address, "", str(folder), {}, ()),
                name,
                num_cpus=resources["CPU"],
                labels=labels,
                resources={},
                object_store_bytes=OBJECT_STORE_BYTES,
            )
            known_as = {NODE_ID: machine, "RAY_CLOUD_INSTANCE_ID": machine}
            known_as["RAY_NODE_TYPE_NAME"] = tags[TAG_RAY_USER_NODE_TYPE]
            standing = {TAG_RAY_NODE_KIND: NODE_KIND_WORKER, TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE}
            self._nodes[machine] = {
                "tags": {**tags, **standing, TAG_RAY_NODE_NAME: machine},
                "machine": spawn(command, folder / f"{name}.log", known_as),
            }

    def _terminate_node(self, node: dict[str, Any]) -> None:
        processes = tree([node["machine"]])
        for process in processes:
            process.kill()
        psutil.wait_procs(processes, timeout=10)
