"""Whether a node sees what a run needs, asked of one: a cluster of a head and a node, with a driver beside it.

Both are on this machine, so a disk that only one of them sees is had by a path that the system gives every process a
meaning of its own for: the folder that it runs in.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from settings import AFTER_UP, users_settings

from mimiclab.cluster import local
from mimiclab.cluster.nodes import Nodes

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]

OWN_DISK = "/proc/self/cwd"
DRIVER = """
import sys
import ray
from mimiclab.cluster import reach
from mimiclab.errors import UserError
from mimiclab.schema import ScaleConfig
from mimiclab.storage import Storage

address, *attempts = sys.argv[1:]
ray.init(address=address, log_to_driver=False, logging_level="error")
spot = ScaleConfig(label_selector={"ray.io/market-type": "spot"})
for root, folder in zip(attempts[::2], attempts[1::2]):
    try:
        reach.check(Storage(root), {"data.val.packed": (folder, "manifest.json")}, spot, print)
        print("seen")
    except UserError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with (
        users_settings(tmp_path_factory.mktemp("state"), AFTER_UP),
        local.owned_cluster(lambda _: None, num_nodes=1) as started,
    ):
        yield started


def test_a_node_says_what_it_does_not_see(nodes: Nodes, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").touch()
    runs = tmp_path / "runs"
    attempts = [(runs, tmp_path), (f"{OWN_DISK}/runs", tmp_path), (runs, OWN_DISK), (runs, "s3://no-such-bucket/x?a=b")]

    done = subprocess.run(
        [sys.executable, "-c", DRIVER, nodes.cluster.head, *(str(place) for pair in attempts for place in pair)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        timeout=600,
    )

    assert done.returncode == 0
    shared, storage, data, bucket = done.stdout.splitlines()
    node = f"node 127.0.0.1 ({nodes.get('node-1').id[:8]}): "
    remedy = ", which the machine of the driver sees, is not there; expected a place that all nodes see"
    assert shared == "seen"
    assert storage.startswith(f"{node}where.storage: {OWN_DISK}/runs/.probe-")
    assert remedy in storage
    assert data.startswith(f"{node}data.val.packed: {OWN_DISK}/manifest.json{remedy}")
    assert bucket.startswith(f"{node}data.val.packed: s3://no-such-bucket/x")
    assert list(runs.iterdir()) == []
