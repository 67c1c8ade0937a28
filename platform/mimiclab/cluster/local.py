"""A cluster on this machine, of one node or several: its processes are its own, and it is ended by their ids."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from mimiclab.cluster import exposure, jobs, state
from mimiclab.cluster.nodes import HEAD, HEAD_LABELS, OBJECT_STORE_BYTES, Node, Nodes, spawn, tree
from mimiclab.cluster.server import connect_local, resources
from mimiclab.cluster.state import LocalCluster
from mimiclab.errors import UserError

_START_TIMEOUT_S = 180.0
_STOP_TIMEOUT_S = 20.0
# More than a job has to record its run, see jobs.py.
_JOBS_TIMEOUT_S = 90.0
_LOOPBACK = "127.0.0.1"


def up(
    num_cpus: int | None,
    say: Callable[[str], None],
    *,
    num_nodes: int = 0,
    cpus_per_node: int = 1,
    owned: bool = False,
    dashboard_host: str = _LOOPBACK,
) -> LocalCluster:
    """Start a cluster, and wait until it takes jobs and Ray knows its nodes.

    Args:
        num_cpus: how many CPUs the head offers; by default as many as the machine has, none where there are nodes.
        say: gets a line of progress now and then; a start takes from 6 s on.
        num_nodes: how many nodes it has beside the head. They are labelled as spot machines, the head as on-demand.
        cpus_per_node: how many CPUs each of them offers.
        owned: it belongs to this process, beside others, and not to the machine, which has one at most. If this
            process ends without ending it, the next `up` or `down` does.
        dashboard_host: the address of this machine that the dashboard and the job server listen on; all else keeps to
            loopback. `say` hears what it means to name another.

    Raises:
        UserError: the machine's runs already, or see `exposure.check`.
        RuntimeError: it ended or takes no jobs within three minutes; with what it lacks and the end of its output.
    """
    token = os.environ.get("RAY_AUTH_MODE", "token") == "token"
    exposure.check(dashboard_host, token=token)
    _sweep(say)
    before = None if owned else state.running()
    if before is not None:
        raise UserError(
            f"a cluster runs on this machine already, at {before.job_server}; expected none (mimiclab cluster down)"
        )
    # Not below $TMPDIR, which may be long: the path of a socket in it has at most 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="mimiclab-", dir="/tmp"))
    head, job_server, client_server, agent, metrics = free_ports(5)
    environment = {
        "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "token"),
        # Made for other systems; here it keeps every port on the loopback device.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }
    if token:
        make_sure_of_token()
    if risk := exposure.risk(dashboard_host, job_server, token=token):
        say(f"warning: {risk}")
    if num_nodes:
        num_cpus = num_cpus or 0
    starter = spawn(
        [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--node-name", HEAD),
            *("--port", str(head), "--dashboard-host", dashboard_host, "--dashboard-port", str(job_server)),
            # Without these, two nodes of a machine ask for the same ports.
            *("--ray-client-server-port", str(client_server), "--dashboard-agent-listen-port", str(agent)),
            *("--min-worker-port", "0", "--max-worker-port", "0"),
            *("--temp-dir", str(folder), "--disable-usage-stats"),
            *("--labels", ",".join(f"{key}={value}" for key, value in HEAD_LABELS.items())),
            *(() if num_cpus is None else ("--num-cpus", str(num_cpus))),
            *(("--object-store-memory", str(OBJECT_STORE_BYTES)) if num_nodes else ()),
        ],
        folder / "head.log",
        {**environment, "AUTOSCALER_METRIC_PORT": str(metrics)},
    )
    [owner] = state.identify([psutil.Process()])
    nodes = Nodes(
        LocalCluster(
            head=f"{_LOOPBACK}:{head}",
            job_server=f"http://{exposure.own_address(dashboard_host)}:{job_server}",
            folder=str(folder),
            environment=environment,
            processes=state.identify([starter]),
            name=folder.name.replace("mimiclab", state.MACHINE) if owned else state.MACHINE,
            owner=owner if owned else None,
        )
    )
    nodes.cluster.write()  # before it answers, so that `down` ends it whatever happens to this command
    try:
        say(f"starting a head at {nodes.cluster.head}, its files in {folder}")
        _wait_for(lambda: _is_silent(head), "its head", starter, nodes.cluster, say)
        nodes.wait_alive(HEAD)  # a node that does not find it there gives up
        started = [nodes.start(num_cpus=cpus_per_node) for _ in range(num_nodes)]
        _wait_for(lambda: _takes_no_jobs(nodes.cluster, agent), "its job server", starter, nodes.cluster, say)
        for name in started:
            nodes.wait_alive(name)
    except BaseException:
        end(nodes.cluster)
        raise
    return nodes.cluster


@contextlib.contextmanager
def owned_cluster(say: Callable[[str], None], *, num_nodes: int, cpus_per_node: int = 1) -> Iterator[Nodes]:
    """A cluster for as long as the context lasts, beside others; see `up`. Its head offers no CPUs.

    To connect, a driver needs `nodes.cluster.environment` before it imports Ray.
    """
    nodes = Nodes(up(0, say, num_nodes=num_nodes, cpus_per_node=cpus_per_node, owned=True))
    try:
        yield nodes
    finally:
        end(nodes.cluster)


def down(say: Callable[[str], None]) -> bool:
    """End the cluster of this machine, its jobs first and as `jobs stop` does; False where there was none."""
    swept = _sweep(say)
    cluster = state.remembered()
    if cluster is None:
        return swept
    if cluster.running():
        _stop_jobs(cluster, say)
    say(f"ended {end(cluster)} processes and removed {cluster.folder}")
    return True


def _stop_jobs(cluster: LocalCluster, say: Callable[[str], None]) -> None:
    """Stop the jobs of a cluster as far as its job server answers, and in a bounded time: they end with it anyway."""
    wrong: list[str] = []

    def stop() -> None:
        try:
            jobs.stop_all(connect_local(cluster), say)
        except Exception as error:  # of Ray's client, of requests, or of what they make of an answer
            wrong.append(str(error))

    # Ray's client waits for an answer for ever.
    thread = threading.Thread(target=stop, daemon=True)
    thread.start()
    thread.join(_JOBS_TIMEOUT_S)
    if thread.is_alive():
        wrong.append(f"not all have ended after {_JOBS_TIMEOUT_S:g} s")
    for reason in wrong:
        say(f"jobs end with the cluster, not in good order: {reason}")


def end(cluster: LocalCluster) -> int:
    """End what is left of a cluster, forget it and remove its folder; return how many processes there were."""
    starters = cluster.starters()
    processes = tree([*cluster.running(), *starters])  # a node that was just starting is not among the former
    # They end the others in good order; as a rule nothing is left after them.
    for some, action in (
        (starters, psutil.Process.terminate),
        (processes, psutil.Process.terminate),
        (processes, psutil.Process.kill),
    ):
        for process in filter(state.is_alive, some):
            with contextlib.suppress(psutil.NoSuchProcess):
                action(process)
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        while any(map(state.is_alive, some)) and time.monotonic() < deadline:
            time.sleep(0.05)
    state.forget(cluster.name)
    shutil.rmtree(cluster.folder, ignore_errors=True)
    return len(processes)


def describe(cluster: LocalCluster) -> list[tuple[str, str]]:
    """What runs and where, as named lines.

    Raises:
        UserError: it does not answer.
    """
    client = connect_local(cluster)
    submitted = jobs.list_jobs(client)
    found = resources(client)
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(cluster.processes[0].started))
    devices = ", ".join(f"{found[kind]:g} {kind}" for kind in ("CPU", "GPU") if found.get(kind))
    return [
        ("job server", f"{cluster.job_server} (Ray's dashboard too)"),
        ("head", cluster.head),
        ("offers", devices),
        ("jobs", f"{sum(not job.is_over for job in submitted)} not ended of {len(submitted)}"),
        ("processes", f"{len(tree(cluster.running()))} since {started}"),
        ("logs", f"{cluster.folder}/session_latest/logs"),
        *((node.name, _describe(node)) for node in Nodes(cluster).all()),
    ]


def make_sure_of_token() -> None:
    """Make the token that Ray's processes and clients of this user share, where there is none yet."""
    path = Path.home() / ".ray" / "auth_token"
    if not path.exists() and not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.write_text(secrets.token_hex(32))


def _describe(node: Node) -> str:
    devices = ", ".join(f"{node.resources.get(kind, 0):g} {kind}" for kind in ("CPU", "GPU"))
    labels = " ".join(f"{key}={value}" for key, value in sorted(node.labels.items()) if key != "ray.io/node-id")
    until = f" until {time.strftime('%H:%M:%S', time.localtime(node.deadline))}" if node.deadline else ""
    return f"{node.state}{until}: " + (node.death or f"{devices}; {labels}")


def _sweep(say: Callable[[str], None]) -> bool:
    """End the clusters whose owner ended without; whether there were any."""
    abandoned = state.abandoned()
    for cluster in abandoned:
        say(f"ended {end(cluster)} processes of an abandoned cluster and removed {cluster.folder}")
    return bool(abandoned)


def _wait_for(
    lacks: Callable[[], str],
    what: str,
    starter: psutil.Process,
    cluster: LocalCluster,
    say: Callable[[str], None],
) -> None:
    start = time.monotonic()
    next_word = 5.0
    reason = "it ended"
    while state.is_alive(starter) and (elapsed := time.monotonic() - start) < _START_TIMEOUT_S:
        reason = lacks()
        if not reason:
            return
        if elapsed > next_word:
            say(f"waiting for {what} ({elapsed:.0f} s of at most {_START_TIMEOUT_S:.0f} s)")
            next_word += 10
        time.sleep(0.1)
    output = (Path(cluster.folder) / "head.log").read_text(errors="replace")[-2000:]
    raise RuntimeError(f"Ray's head at {cluster.head} did not start ({reason}):\n{output}")


def _is_silent(port: int) -> str:
    try:
        socket.create_connection((_LOOPBACK, port), timeout=1).close()
        return ""
    except OSError as error:
        return f"nothing answers at port {port}: {error}"


def _takes_no_jobs(cluster: LocalCluster, agent: int) -> str:
    # The server answers first; then the node is there, and last the agent on it that starts jobs.
    try:
        client = connect_local(cluster)
    except UserError as error:
        return f"{error}: {error.__cause__}"
    return _is_silent(agent) or ("" if "memory" in resources(client) else "it has no node")


def free_ports(num: int) -> list[int]:
    """So many ports of the loopback device that nothing listens on."""
    with contextlib.ExitStack() as stack:
        ports: set[int] = set()
        while len(ports) < num:
            probe = stack.enter_context(socket.socket())
            probe.bind((_LOOPBACK, 0))
            ports.add(int(probe.getsockname()[1]))
        return list(ports)
