"""A cluster on this machine, of one node: started in a session of its own, ended by its own processes' ids."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from mimiclab.cluster import jobs, state
from mimiclab.cluster.server import VARIABLES, connect_local, resources
from mimiclab.cluster.state import LocalCluster
from mimiclab.errors import UserError

_START_TIMEOUT_S = 180.0
_STOP_TIMEOUT_S = 20.0
# Ray gives these to its workers.
_WORKER_PORTS = range(10002, 20000)
_LOOPBACK = "127.0.0.1"


def up(num_cpus: int | None, say: Callable[[str], None]) -> LocalCluster:
    """Start a cluster that outlives this command, and wait until it takes jobs.

    Args:
        num_cpus: how many CPUs the node offers; by default as many as the machine has.
        say: gets a line of progress now and then; a start takes 20 s and more.

    Raises:
        UserError: one runs already.
        RuntimeError: it ended or takes no jobs within three minutes; with the end of its output.
    """
    before = state.running()
    if before is not None:
        raise UserError(
            f"a cluster runs on this machine already, at {before.job_server}; expected none (mimiclab cluster down)"
        )
    # Not below $TMPDIR, which may be long: the path of a socket in it has at most 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="mimiclab-", dir="/tmp"))
    head, job_server, client_server, agent = _free_ports(4)
    environment = {
        "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "token"),
        # Made for other systems; here it keeps every port on the loopback device, and the cluster to one node.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }
    if environment["RAY_AUTH_MODE"] == "token":
        make_sure_of_token()
    with (folder / "head.log").open("wb") as output:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
                *("--port", str(head), "--dashboard-host", _LOOPBACK, "--dashboard-port", str(job_server)),
                # Without these, two clusters of a machine ask for the same ports, and the second takes no jobs.
                *("--ray-client-server-port", str(client_server), "--dashboard-agent-listen-port", str(agent)),
                *("--temp-dir", str(folder), "--disable-usage-stats"),
                *(() if num_cpus is None else ("--num-cpus", str(num_cpus))),
            ],
            env={
                **{name: value for name, value in os.environ.items() if name not in VARIABLES},
                **environment,
                # Asked to end, it would wait half a minute for what runs to move to other nodes.
                "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            },
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    leader = psutil.Process(process.pid)
    cluster = LocalCluster(
        head=f"{_LOOPBACK}:{head}",
        job_server=f"http://{_LOOPBACK}:{job_server}",
        folder=str(folder),
        environment=environment,
        processes=state.identify([leader]),
    )
    cluster.write()  # before it answers, so that `down` ends it whatever happens to this command
    try:
        say(f"starting a head at {cluster.head}, its files in {folder}")
        _wait_for_jobs(cluster, agent, process, say)
    except BaseException:
        _end(cluster)
        raise
    processes = state.identify([leader, *leader.children(recursive=True)])
    cluster = LocalCluster(**{**vars(cluster), "processes": processes})
    cluster.write()
    return cluster


def down(say: Callable[[str], None]) -> bool:
    """End the cluster of this machine, its jobs first and as `jobs stop` does; False where there was none."""
    cluster = state.remembered()
    if cluster is None:
        return False
    if cluster.running():
        with contextlib.suppress(UserError):  # one that does not answer is ended all the same
            client = connect_local(cluster)
            for job in jobs.list_jobs(client):
                if not job.is_over:
                    say(f"stopping job {job.id}")
                    jobs.stop(client, job.id)
    num = _end(cluster)
    say(f"ended {num} processes and removed {cluster.folder}")
    return True


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
        ("processes", f"{len(_tree(cluster))} since {started}"),
        ("logs", f"{cluster.folder}/session_latest/logs"),
    ]


def make_sure_of_token() -> None:
    """Make the token that Ray's processes and clients of this user share, where there is none yet."""
    path = Path.home() / ".ray" / "auth_token"
    if not path.exists() and not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.write_text(secrets.token_hex(32))


def _wait_for_jobs(
    cluster: LocalCluster, agent: int, process: subprocess.Popen[bytes], say: Callable[[str], None]
) -> None:
    start = time.monotonic()
    next_word = 5.0
    while process.poll() is None and (elapsed := time.monotonic() - start) < _START_TIMEOUT_S:
        # The server answers first; then the node is there, and last the agent on it that starts jobs.
        with contextlib.suppress(UserError, OSError):
            client = connect_local(cluster)
            socket.create_connection((_LOOPBACK, agent), timeout=1).close()
            if "CPU" in resources(client):
                return
        if elapsed > next_word:
            say(f"waiting for its job server ({elapsed:.0f} s of at most {_START_TIMEOUT_S:.0f} s)")
            next_word += 10
        time.sleep(0.5)
    output = (Path(cluster.folder) / "head.log").read_text(errors="replace")[-2000:]
    raise RuntimeError(f"Ray's head at {cluster.head} did not start:\n{output}")


def _end(cluster: LocalCluster) -> int:
    """End what is left of a cluster, forget it and remove its folder; return how many processes there were."""
    tree = _tree(cluster)
    head = cluster.running()[:1]
    # The head ends the others in good order; as a rule nothing is left after it.
    for processes, end in (
        (head, psutil.Process.terminate),
        (tree, psutil.Process.terminate),
        (tree, psutil.Process.kill),
    ):
        for process in filter(state.is_alive, processes):
            with contextlib.suppress(psutil.NoSuchProcess):
                end(process)
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        while any(map(state.is_alive, processes)) and time.monotonic() < deadline:
            time.sleep(0.05)
    state.forget()
    shutil.rmtree(cluster.folder, ignore_errors=True)
    return len(tree)


def _tree(cluster: LocalCluster) -> set[psutil.Process]:
    tree: set[psutil.Process] = set()
    for process in cluster.running():
        with contextlib.suppress(psutil.NoSuchProcess):
            tree |= {process, *process.children(recursive=True)}
    return tree


def _free_ports(num: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        ports: set[int] = set()
        while len(ports) < num:
            probe = stack.enter_context(socket.socket())
            probe.bind((_LOOPBACK, 0))
            ports |= {int(probe.getsockname()[1])} - set(_WORKER_PORTS)
        return list(ports)
