"""A connection to Ray: a cluster that is there, or one made on this machine for the time of a verb."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mimiclab.cluster import capacity
from mimiclab.cluster.capacity import Node
from mimiclab.cluster.state import running_at
from mimiclab.errors import UserError
from mimiclab.schema import ScaleConfig

ENVIRONMENT = {
    # The loop reports at evaluations only; a report waits for one poll.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Relative paths of an experiment mean the same on a worker as where the command ran.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # One process fewer: rank 0 asks for notices itself, see preemption.py.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # How long workers wait for a node that has just died, and that Ray still counts, before it looks again.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5",
    # Started by `uv run`, every node would build an environment of its own.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Ray's settings; what the user has set in the environment comes first."""

_SAID_ALREADY = "A worker died or was killed|has been marked dead because"
"""What Ray prints of dead workers and nodes, in paragraphs, whatever `log_to_driver` is; a run says it in a line."""

_CONNECT_TIMEOUT_S = 5.0
# Of nodes that differ; a cluster may have hundreds.
_MAX_LISTED = 10


@contextlib.contextmanager
def ray_session(address: str | None, scale: ScaleConfig, *, verbose: bool, state_api: bool = False) -> Iterator[None]:
    """Connect to the cluster at `address` (or $RAY_ADDRESS), else start one on this machine and stop it again.

    A connection that exists already is used and left alone.

    Args:
        address: of the head node.
        scale: what has to fit.
        verbose: let Ray talk.
        state_api: a cluster made here also has Ray's dashboard, on loopback, which takes seconds to start. What
            cleans up after a trial that was stopped asks it; without, the trial's CPUs are never given back.

    Raises:
        UserError: no cluster answers at the address, or the cluster cannot ever hold `scale`.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not verbose:
        os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", _SAID_ALREADY)
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        running_at(address)
        _check_answers(address)
    import ray

    owned = not ray.is_initialized()
    if owned:
        level = "info" if verbose else "error"
        try:
            if address:
                ray.init(address=address, log_to_driver=verbose, logging_level=level)
            else:
                ray.init(address="local", include_dashboard=state_api, log_to_driver=verbose, logging_level=level)
        except (ConnectionError, TimeoutError, ValueError, RuntimeError) as error:
            if not address:
                raise
            raise UserError(
                f"--address {address}: no Ray cluster answers there ({error}); expected HOST:PORT of a head node"
            ) from error
    try:
        check_resources(capacity.connected_nodes(), scale)
        with _sigterm_as_ctrl_c() if owned else contextlib.nullcontext():
            yield
    finally:
        if owned:
            ray.shutdown()


def _check_answers(address: str) -> None:
    # Ray itself tries for minutes. Addresses without a port ("auto", a client's URL) are left to it.
    host, _, port = address.rpartition(":")
    if not port.isdigit() or "/" in host:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"--address {address}: no Ray cluster answers there ({error}); expected HOST:PORT of a head node"
        ) from error


@contextlib.contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """A job is stopped by SIGTERM, which ends a process at once: its run would be recorded as running for ever."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def resources_per_worker(scale: ScaleConfig) -> dict[str, float]:
    """What one worker asks Ray for."""
    asked: dict[str, float] = {"CPU": scale.threads}
    if scale.gpu:
        asked["GPU"] = 1
    if scale.accelerator_type:
        # A node with such a GPU offers 1 of it, and Ray has each worker ask for so little of that.
        asked[f"accelerator_type:{scale.accelerator_type}"] = 0.001
    return asked


def task_options(scale: ScaleConfig) -> dict[str, Any]:
    """Ray's options of a task that has one worker's place: what it asks for, on a node where workers may be."""
    each = resources_per_worker(scale)
    return {
        "num_cpus": each.pop("CPU"),
        "num_gpus": each.pop("GPU", 0),
        "resources": each or None,
        "label_selector": scale.label_selector or None,
    }


def check_resources(nodes: Sequence[Node], scale: ScaleConfig) -> None:
    """Make sure that a cluster of these nodes can ever hold `scale`.

    Where machines are started as they are needed, only the sums are known.

    Raises:
        UserError: it cannot; the message names what lacks.
    """
    each, found = resources_per_worker(scale), capacity.capacity(nodes)
    for kind, amount in each.items():
        if scale.workers.min * amount > found.get(kind, 0):
            raise UserError(
                f"scale: {scale.workers.min} workers of {amount:g} {kind} each need {scale.workers.min * amount:g}, "
                f"found {found.get(kind, 0):g} in the cluster; expected fewer workers"
                + (", fewer threads" if kind == "CPU" else "")
                + " or a larger cluster"
            )
    if not capacity.grows(nodes):
        _check_placement(nodes, each, scale)


def _check_placement(nodes: Sequence[Node], each: Mapping[str, float], scale: ScaleConfig) -> None:
    """Make sure that the nodes that are there hold the workers: each takes all that it asks for from one node."""
    wanted = scale.label_selector
    chosen = capacity.labelled(nodes, wanted) if wanted else nodes
    if not chosen:
        there = sorted({f"{key}: {labels.get(key, 'none')}" for key in wanted for _, labels in nodes})
        raise UserError(
            f"scale.label_selector: no node of the cluster has {', '.join(f'{k}: {v}' for k, v in wanted.items())}; "
            f"found {', '.join(there[:_MAX_LISTED])}; expected labels that its nodes have"
        )
    room = capacity.room(chosen, each)
    num = {"STRICT_PACK": max(room), "STRICT_SPREAD": sum(map(bool, room))}.get(scale.placement, sum(room))
    if num < scale.workers.min:
        offers = Counter(_spoken({kind: offer.get(kind, 0) for kind in each}) for offer, _ in chosen)
        listed = ", ".join(f"{count} with {offer}" for offer, count in offers.most_common(_MAX_LISTED))
        raise UserError(
            f"scale: {scale.workers.min} workers of {_spoken(each)} each, placed by {scale.placement}, found room for "
            f"{num} of them in the cluster: nodes that may take them are {listed}; expected fewer workers, fewer "
            "threads or larger nodes"
        )


def _spoken(resources: Mapping[str, float]) -> str:
    return " and ".join(f"{amount:g} {kind}" for kind, amount in resources.items())
