"""A cluster of two nodes on loopback, for one test: run as a process, told on its standard input what to do.

Prints {"address", "spot"} when it is up, the second being the id of the node that an actor keeps busy: Ray ends an idle
node as soon as it is drained. Then for each line read: `draining` prints {node id: deadline in ms}, `release` ends the
actor. The end of the input ends the cluster.
"""

import json
import sys

import ray
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster

cluster = Cluster(
    initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "temp_dir": sys.argv[1]}
)
spot = cluster.add_node(num_cpus=1, resources={"spot": 1}).node_id
try:
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")

    @ray.remote(resources={"spot": 1}, num_cpus=0)
    class Busy:
        def here(self) -> str:
            return ray.get_runtime_context().get_node_id()

    busy = Busy.remote()
    assert ray.get(busy.here.remote()) == spot
    client = GcsClient(address=cluster.address)
    print(json.dumps({"address": cluster.address, "spot": spot}), flush=True)
    for line in sys.stdin:
        if line.strip() == "release":
            ray.kill(busy)
        else:
            print(json.dumps(client.get_draining_nodes(timeout=5)), flush=True)
finally:
    ray.shutdown()
    cluster.shutdown()
