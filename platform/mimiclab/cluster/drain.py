"""Drain this machine's node of Ray: tell the cluster that the node will go, and when.

Every contact with Ray is a process of its own, `python -m mimiclab.cluster.drain`, for two reasons. Ray's client blocks
for most of a minute where the head does not answer, whatever time-out it is given (40 s for one of 2 s), and a process
can be ended. And one that has imported Ray is of 68 MB, where a watcher without, on every node for as long as the node
lives, is of 35.

What it costs when a notice comes: 0.6 to 0.9 s until the node is listed as draining (2 cores with a load of 4). Ray's
own `ray drain-node` takes 1.8 to 2.1 s, as it imports all of Ray's commands, and believes Ray, which accepts the drain
of a node that does not exist. Both with Ray in the page cache, where looking for the node at the start puts it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from mimiclab.errors import UserError

_RPC_S = 5.0
_CONNECT_S = 2.0
_SETTLE_S = 2.0


class NodeError(Exception):
    """Ray could not be asked, or refused; the message says why. It may be tried again."""


class RayNode:
    """This machine's node of a cluster, as a process that does not import Ray sees it.

    Args:
        address: HOST:PORT of the cluster's head; by default $RAY_ADDRESS, else that of the Ray of this machine.
        node_id: of the node, 56 hexadecimal digits; by default the one node at an address of this machine.
        limit_s: how long Ray may take for anything.

    Raises:
        UserError: one of them cannot be what it should.
    """

    def __init__(self, address: str | None, node_id: str | None, limit_s: float = 15.0) -> None:
        name, address = ("--address", address) if address else ("$RAY_ADDRESS", os.environ.get("RAY_ADDRESS"))
        if address in ("", "auto", "local"):
            address = None
        if address is not None and not re.fullmatch(r"[^/]+:\d{1,5}", address):
            raise UserError(f"{name} {address}: no address of a head; expected HOST:PORT")
        if node_id is not None and not re.fullmatch(r"[0-9a-f]{56}", node_id):
            raise UserError(f"--node-id {node_id}: no id of a node of Ray; expected 56 hexadecimal digits")
        self._which = {"address": address, "node_id": node_id}
        self._limit_s = limit_s

    def find(self) -> str:
        """The id of the node.

        Raises:
            NodeError: no head answers, or none of its nodes is this one.
            UserError: several are.
        """
        return str(self._ask("find", self._limit_s))

    def drain(self, message: str, deadline: float | None) -> str:
        """Drain the node; return its id. A node that is idle ends at once, one drained before gets the new deadline.

        Args:
            message: reason that the cluster shows.
            deadline: when the node will be gone, in seconds since 1970. Others compare it with their clocks.

        Raises:
            NodeError: see `find`; or Ray refuses.
            UserError: see `find`.
        """
        deadline_ms = 0 if deadline is None else round(deadline * 1000)  # as Ray says that there is none
        return str(self._ask("drain", self._limit_s, message=message, deadline_ms=deadline_ms))

    def wait_until_gone(self, node_id: str, seconds: float) -> bool:
        """Wait for the node's end, at most for so long; whether it came."""
        try:
            return bool(self._ask("wait", seconds, node_id=node_id, seconds=seconds))
        except NodeError:
            return False

    def _ask(self, what: str, limit_s: float, **arguments: Any) -> Any:
        request = json.dumps({"what": what, **self._which, **arguments})
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-m", __name__, request],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=limit_s,
            )
        except subprocess.TimeoutExpired as error:
            raise NodeError(f"Ray did not answer within {limit_s:g} s") from error
        if done.returncode != 0:
            end = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise NodeError(f"exit code {done.returncode}: {end[:200]}")
        reply = json.loads(done.stdout.splitlines()[-1])
        if "mistake" in reply:
            raise UserError(reply["mistake"])
        if "failed" in reply:
            raise NodeError(reply["failed"])
        return reply["result"]


def _main(request: str) -> None:
    """What the process does that imports Ray: one JSON object in, one out, as the last line."""
    arguments = json.loads(request)
    verbs: dict[str, Callable[..., Any]] = {"find": _find, "drain": _drain, "wait": _wait}
    what = verbs[arguments.pop("what")]
    try:
        address = arguments.pop("address") or _address_of_this_machine()
        reply = {"result": what(_connect(address), **arguments)}
    except UserError as error:
        reply = {"mistake": str(error)}
    except NodeError as error:
        reply = {"failed": str(error)}
    except Exception as error:
        reply = {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
    print(json.dumps(reply), flush=True)
    # Ray's threads would hold up the end.
    os._exit(0)


def _address_of_this_machine() -> str:
    from ray._private.services import find_gcs_addresses

    # Read from the command lines of the machine's processes.
    found = sorted(find_gcs_addresses())
    if not found:
        raise NodeError("no Ray runs on this machine, and --address names none")
    if len(found) > 1:
        raise UserError(f"nodes of {len(found)} clusters run on this machine ({', '.join(found)}); expected --address")
    return str(found[0])


def _connect(address: str) -> Any:
    from mimiclab.cluster import state

    state.running_at(address)
    host, _, port = address.rpartition(":")
    try:  # Ray itself would try for most of a minute
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise NodeError(f"no head of Ray answers at {address} ({error})") from error
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled

    return GcsClient(address=address)


def _alive(client: Any) -> dict[str, str]:
    """The nodes that live: {id: address}."""
    from ray.core.generated.gcs_pb2 import GcsNodeInfo

    nodes = client.get_all_node_info(timeout=_RPC_S).values()
    return {node.node_id.hex(): node.node_manager_address for node in nodes if node.state == GcsNodeInfo.ALIVE}


def _find(client: Any, node_id: str | None) -> str:
    import psutil

    alive = _alive(client)
    if node_id is not None:
        if node_id not in alive:
            raise NodeError(f"node {node_id} is not among the {len(alive)} nodes of the cluster that live")
        return node_id
    own = {address.address for device in psutil.net_if_addrs().values() for address in device}
    here = sorted(found for found, address in alive.items() if address in own)
    if not here:
        raise NodeError(f"none of the {len(alive)} nodes of the cluster is at an address of this machine")
    if len(here) > 1:
        raise UserError(
            f"{len(here)} nodes of Ray run on this machine ({', '.join(here)}); expected --node-id with one"
        )
    return here[0]


def _drain(client: Any, node_id: str | None, message: str, deadline_ms: int) -> str:
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    found = _find(client, node_id)
    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, refusal = client.drain_node(found, reason, message, deadline_ms, timeout=_RPC_S)
    if not accepted:
        raise NodeError(f"Ray refuses: {refusal}")
    # Ray accepts a drain of any node, one that it does not know too.
    until = time.monotonic() + _SETTLE_S
    while time.monotonic() < until:
        if client.get_draining_nodes(timeout=_RPC_S).get(found) == deadline_ms or found not in _alive(client):
            return found
        time.sleep(0.1)
    raise NodeError("Ray accepted the drain, but does not list the node as draining")


def _wait(client: Any, node_id: str, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with contextlib.suppress(Exception):  # the head may be away for a while, as it may be for ever
            if node_id not in _alive(client):
                return True
        time.sleep(1)
    return False


if __name__ == "__main__":
    _main(sys.argv[1])
