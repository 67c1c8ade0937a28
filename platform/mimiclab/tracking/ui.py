"""MLflow's pages of a store: links to those that are worth opening, and a server for the runs of a sqlite file."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, NamedTuple

from mimiclab.errors import UserError
from mimiclab.tracking import views
from mimiclab.tracking.address import absolute_uri, artifact_folder, check_tracking, sqlite_path
from mimiclab.tracking.client import ENVIRONMENT, connect, refusals_explained
from mimiclab.tracking.pages import charts_of, compare_page, run_page, runs_page, shared_view_page
from mimiclab.tracking.parents import KIND_TAG, PARENT_TAG
from mimiclab.tracking.runs import FORGOTTEN_TAG
from mimiclab.tracking.searches import newest_search

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PORTS = range(5000, 5020)
"""Where `serve` looks for a free port."""

_NUM_BEST = 5
_MAX_RUNS = 200  # that the columns of a view are chosen by

_START_TIMEOUT_S = 120
_STOP_TIMEOUT_S = 10
_LINES_SHOWN = 10


def place_of(uri: str, run_id: str) -> str:
    """Where a person finds a run: its page on a server, or the verb that serves a sqlite store and the page there.

    Of a store that does not say now, its address: at the end of a command that has done its work nothing else is told.
    """
    try:
        experiment_id = connect(uri).get_run(run_id).info.experiment_id
    except Exception:  # MLflow's, of HTTP or of SQL
        return f"{uri}, which does not say now where the run {run_id} is"
    if sqlite_path(uri) is None:
        return run_page(uri, experiment_id, run_id)
    page = run_page(f"http://127.0.0.1:{PORTS[0]}", experiment_id, run_id)
    return f"{page}  (after: mimiclab ui --tracking {uri})"


def serve(uri: str, port: int | None = None, project: str | None = None, say: Callable[[str], None] = print) -> None:
    """Show the runs of a store: print the links to its pages and, for a sqlite store, serve them until Ctrl-C.

    Args:
        uri: The tracking store.
        port: Where to serve a sqlite store on 127.0.0.1; by default the first free one of `PORTS`.
        project: The MLflow experiment to link to; without one, the start page.
        say: Gets each line for the user.

    Raises:
        UserError: The store cannot be reached or read, or the port is taken.
    """
    check_tracking(uri)
    database = sqlite_path(uri)
    if database is None:
        _say_links(uri, uri, project, say)
        return
    if not database.exists():
        raise UserError(f"where.tracking: {uri}: there is no file {database}; expected one with runs to show")
    port = free_port() if port is None else _free(port)
    connect(uri)  # what is wrong with the store is said before a server takes its time to start
    with _stopped_by_signals(), server(uri, port, say) as running:
        # The server also reaches what others have stored through a server of theirs.
        _say_links(running.base_url, running.base_url, project, say)
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
        UserError: The port is in use; or the server ended or did not answer within two minutes, with the end of its
            output.
    """
    base_url = f"http://127.0.0.1:{_free(port)}"
    _bypass_proxies()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            _command(uri, port),
            env={
                **os.environ,
                **ENVIRONMENT,
                "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
                "MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE": "false",
                "MLFLOW_ENABLE_REMOTE_ASSISTANT": "false",
                # Whoever can log a model could run code where it is loaded.
                "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
            },
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group of its own: Ctrl-C is for us, and we end the whole group
        )
        try:
            if not _wait_until_healthy(process, base_url, say):
                code = process.poll()
                found = f"did not answer within {_START_TIMEOUT_S} s" if code is None else f"ended with code {code}"
                output.seek(0)
                last = output.read().decode(errors="replace").splitlines()[-_LINES_SHOWN:]
                raise UserError(
                    f"where.tracking: {uri}: its MLflow server {found}; expected it to answer at {base_url}. It said "
                    "last:\n" + "\n".join(last)
                )
            yield Server(base_url, process)
        finally:
            _stop(process)


def _bypass_proxies() -> None:
    """Have what this process, and MLflow in it, asks of 127.0.0.1 go there, whatever proxy the environment names."""
    known = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    if known != "*":
        os.environ["no_proxy"] = f"{known},127.0.0.1".lstrip(",")


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


def _free(port: int) -> int:
    if not _is_free(port):
        raise UserError(f"port {port} is in use; expected a free one")
    return port


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
    if project is None:
        say(f"MLflow: {base_url}")
        return
    client = connect(uri)
    with refusals_explained(uri):
        experiment = client.get_experiment_by_name(project)
        links = _links(client, uri, base_url, project, experiment.experiment_id) if experiment else {}
        if not links:
            others = sorted(each.name for each in client.search_experiments() if each.name not in (project, "Default"))
            there = f"; there are {', '.join(others)} (--project)" if others else ""
            say(f"no runs in the project {project} yet{there}")
            links = {"MLflow": base_url}
    for name, link in links.items():
        say(f"{name}: {link}")


def _links(client: "MlflowClient", uri: str, base_url: str, project: str, experiment_id: str) -> dict[str, str]:
    """Links by what they lead to; to nothing of which there is nothing to see."""
    newest = _search(client, experiment_id, "attributes.start_time DESC")
    if not newest:
        return {}
    runs = _search(client, experiment_id, *_BEST_FIRST)
    links = _view_links(client, base_url, experiment_id, "leaderboard", "leaderboard", runs, _LISTED)

    best = _evaluated(runs)[:_NUM_BEST]
    if len(best) > 1:
        name = f"best {len(best)}"
        chosen = ", ".join(f"'{run.info.run_id}'" for run in best)
        query = f"attributes.run_id IN ({chosen})"
        links[name] = _view_links(client, base_url, experiment_id, "best", name, best, query)["charts"]

    search = newest_search(uri, project)
    if search is not None and search.trials:
        parent = client.get_run(search.trials[0]).data.tags[PARENT_TAG]
        query = f"tags.`{PARENT_TAG}` = '{parent}' AND {_LISTED}"
        trials = _evaluated(_search(client, experiment_id, *_BEST_FIRST, query=query))
        name = f"trials of {search.name}"
        if len(trials) > 1:
            links[name] = _view_links(client, base_url, experiment_id, "search", name, trials, query)["charts"]

    # A search or the like is shown by its children.
    single = [run for run in newest if KIND_TAG not in run.data.tags] or newest
    running = [run for run in single if run.info.status == "RUNNING"]
    current = (running or single)[0]
    what = "running" if running else "newest"
    links[f"{what} run, {current.info.run_name}"] = run_page(base_url, experiment_id, current.info.run_id)
    return links


# What --fresh discarded is not.
_LISTED = f"tags.`{FORGOTTEN_TAG}` IS NULL"
_BEST_FIRST = (f"metrics.`{views.METRIC}` DESC", "attributes.start_time DESC")


def _search(client: "MlflowClient", experiment_id: str, *order: str, query: str = _LISTED) -> "list[Run]":
    return list(client.search_runs([experiment_id], query, order_by=list(order), max_results=_MAX_RUNS))


def _evaluated(runs: "list[Run]") -> "list[Run]":
    return [run for run in runs if views.METRIC in run.data.metrics]


def _view_links(
    client: "MlflowClient",
    base_url: str,
    experiment_id: str,
    key: str,
    name: str,
    runs: "list[Run]",
    query: str,
) -> dict[str, str]:
    """Links to a view, which is written first, as a table (under its name) and as charts."""
    from mlflow.exceptions import MlflowException

    try:
        views.share(client, experiment_id, key, name, runs, query)
    except MlflowException as error:
        if error.get_http_status_code() != 403:
            raise
        # Who may only read gets MLflow's own pages.
        table = runs_page(base_url, experiment_id, query)
        ids = [run.info.run_id for run in runs]
        charts = charts_of(table) if query == _LISTED else compare_page(base_url, experiment_id, ids)
    else:
        table = shared_view_page(base_url, experiment_id, key)
        charts = charts_of(table)
    return {name: table, "charts": charts}
