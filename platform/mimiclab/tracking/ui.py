"""MLflow's pages: their addresses, and a server for the runs of a sqlite store."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import NamedTuple
from urllib.parse import quote

from mimiclab.errors import UserError
from mimiclab.tracking.address import absolute_uri, artifact_folder, check_tracking, sqlite_path
from mimiclab.tracking.client import ENVIRONMENT, connect
from mimiclab.tracking.searches import newest_search

PORTS = range(5000, 5020)
"""Where `serve` looks for a free port."""

_START_TIMEOUT_S = 120
_STOP_TIMEOUT_S = 10


def runs_page(base_url: str, experiment_id: str) -> str:
    """The table of a project's runs, the best student first."""
    # The side bar opens in its mode for language models unless told; sorted by a metric, the trials of a
    # search stand beside the other runs and do not collapse under their parent.
    return (
        f"{base_url.rstrip('/')}/#/experiments/{experiment_id}/runs?workflowType=machine_learning"
        "&orderByKey=metrics.%60student%2FAP%60&orderByAsc=false"
    )


def run_page(base_url: str, experiment_id: str, run_id: str) -> str:
    """The page of one run."""
    return f"{base_url.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}"


def compare_page(base_url: str, experiment_id: str, run_ids: Sequence[str]) -> str:
    """The comparison of several runs of a project."""
    runs, experiments = (quote(json.dumps(ids, separators=(",", ":"))) for ids in (list(run_ids), [experiment_id]))
    return f"{base_url.rstrip('/')}/#/compare-runs?runs={runs}&experiments={experiments}"


def place_of(uri: str, run_id: str) -> str:
    """Where a person finds a run: its page on a server, or the verb that serves a sqlite store and the page there."""
    experiment_id = connect(uri).get_run(run_id).info.experiment_id
    if sqlite_path(uri) is None:
        return run_page(uri, experiment_id, run_id)
    page = run_page(f"http://127.0.0.1:{PORTS[0]}", experiment_id, run_id)
    return f"{page}  (after: mimiclab ui --tracking {uri})"


def serve(uri: str, port: int | None = None, project: str | None = None, say: Callable[[str], None] = print) -> None:
    """Show the runs of a store: print the links to its pages and, for a sqlite store, serve them until Ctrl-C.

    Args:
        uri: The tracking store.
        port: Where to serve a sqlite store on 127.0.0.1; by default the first free one of `PORTS`.
        project: The MLflow experiment to link to; without one, or if it has no runs yet, the start page.
        say: Gets each line for the user.

    Raises:
        UserError: The store cannot be reached, or the port is taken.
    """
    check_tracking(uri)
    database = sqlite_path(uri)
    if database is None:
        _say_links(uri, uri, project, say)
        return
    if not database.exists():
        raise UserError(f"where.tracking: {uri}: there is no file {database}; expected one with runs to show")
    port = free_port() if port is None else port
    with _stopped_by_signals(), server(uri, port, say) as running:
        _say_links(uri, running.base_url, project, say)
        say("Ctrl-C stops the server")
        running.process.wait()
    say("the MLflow server has stopped")


def free_port() -> int:
    """The first port of `PORTS` that nothing listens on.

    Raises:
        UserError: Every one is taken.
    """
    for port in PORTS:
        if _is_free(port):
            return port
    raise UserError(f"ports {PORTS[0]} to {PORTS[-1]} are all in use; expected a free one, or --port")


class Server(NamedTuple):
    """A running MLflow server: where it answers, and the process, which leads a group of its own."""

    base_url: str
    process: "subprocess.Popen[bytes]"


@contextlib.contextmanager
def server(uri: str, port: int, say: Callable[[str], None] = print) -> Iterator[Server]:
    """An MLflow server of a sqlite store on 127.0.0.1, stopped at the end with everything it started.

    Args:
        uri: A sqlite store.
        port: The port to listen on.
        say: Gets a line of progress now and then; a start can take a minute.

    Yields:
        The server, once it answers.

    Raises:
        UserError: The port is in use.
        RuntimeError: The server ended or did not answer within two minutes; with the end of its output.
    """
    if not _is_free(port):
        raise UserError(f"port {port} is in use; expected a free one")
    base_url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            _command(uri, port),
            env={
                **os.environ,
                **ENVIRONMENT,
                "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            },
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group of its own: Ctrl-C is for us, and we end the whole group
        )
        try:
            if not _wait_until_healthy(process, base_url, say):
                output.seek(0)
                tail = output.read().decode(errors="replace")[-2000:]
                raise RuntimeError(f"the MLflow server at {base_url} did not start:\n{tail}")
            yield Server(base_url, process)
        finally:
            _stop(process)


def _command(uri: str, port: int) -> list[str]:
    database = sqlite_path(uri)
    assert database is not None, uri
    return [
        *(sys.executable, "-m", "mlflow", "server"),
        *("--backend-store-uri", absolute_uri(uri)),
        *("--artifacts-destination", artifact_folder(database).as_uri()),
        *("--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
        # The default lets names such as 10.evil.com through, by which a web page could reach the server.
        *("--allowed-hosts", f"127.0.0.1:{port},localhost:{port}"),
    ]


def _wait_until_healthy(process: "subprocess.Popen[bytes]", base_url: str, say: Callable[[str], None]) -> bool:
    start = time.monotonic()
    next_word = 5
    while process.poll() is None and (elapsed := time.monotonic() - start) < _START_TIMEOUT_S:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{base_url}/health", timeout=5):
            return True
        if elapsed > next_word:
            say(f"MLflow's server starts at {base_url} ({elapsed:.0f} s of at most {_START_TIMEOUT_S} s)")
            next_word += 10
        time.sleep(0.2)
    return False


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """End a process that leads its own group, and the group with it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError):  # as a rule nobody is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM leave the block in an orderly way, and quietly."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As servers bind: a port whose last connections linger is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _say_links(uri: str, base_url: str, project: str | None, say: Callable[[str], None]) -> None:
    experiment = connect(uri).get_experiment_by_name(project) if project else None
    say(f"runs: {runs_page(base_url, experiment.experiment_id) if experiment else base_url}")
    search = newest_search(uri, project) if project else None
    if search is not None and search.trials:
        say(f"trials of {search.name}: {compare_page(base_url, search.experiment_id, search.trials)}")
