"""The job server of a cluster: which one is meant, and what it says of its cluster."""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import urllib.error
import urllib.request
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import psutil

from mimiclab.cluster import state
from mimiclab.cluster.capacity import Node, capacity
from mimiclab.cluster.state import LocalCluster
from mimiclab.errors import UserError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

_EXPECTED = "expected http://HOST:PORT of its job server, or HOST:PORT of its head"
_TIMEOUT_S = 5.0
_DASHBOARD = "ray/dashboard/dashboard.py"  # the program that the job server is a part of

VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Where Ray's own clients look for a cluster."""


def connect(address: str | None) -> JobSubmissionClient:
    """A client of the job server at `address`, else in the environment, else of the cluster of this machine.

    Raises:
        UserError: there is none, nothing answers there, or it asks for another token.
    """
    for name, value in {"--address": address, **{f"${name}": os.environ.get(name) for name in VARIABLES}}.items():
        if value:
            return _client(name, value)
    local = state.running()
    if local is None:
        raise UserError(
            "no cluster: none was started on this machine; expected one (mimiclab cluster up), or --address "
            "http://HOST:PORT of a job server"
        )
    return connect_local(local)


def connect_local(cluster: LocalCluster) -> JobSubmissionClient:
    """A client of the job server of a cluster of this machine.

    Raises:
        UserError: it does not answer.
    """
    try:
        return _client("cluster of this machine:", cluster.job_server)
    except UserError as error:
        raise UserError(
            f"the cluster of this machine does not answer at {cluster.job_server}; mimiclab cluster down ends what "
            "is left of it"
        ) from error


def nodes(client: JobSubmissionClient) -> list[Node]:
    """The nodes of a cluster that are alive."""
    from ray.util.state import list_nodes

    # Not filtered by Ray: what its filter leaves out of some nodes it takes for answers that were cut off, and raises.
    found = list_nodes(client.get_address(), limit=10_000)
    return [(node.resources_total, node.labels) for node in found if node.state == "ALIVE"]


def resources(client: JobSubmissionClient) -> dict[str, float]:
    """What the nodes of a cluster have in all, or will where it grows, as {"CPU": 8, ...}; see `capacity`."""
    return capacity(nodes(client))


def is_this_machine(client: JobSubmissionClient) -> bool:
    """Whether a job server is on this machine.

    That it is reached at a loopback address does not say so: a tunnel to a cluster elsewhere begins there too.
    """
    address = client.get_address()
    return state.running_at(address) is not None or is_served_here(address)


def is_served_here(url: str) -> bool:
    """Whether what listens at a loopback address is Ray itself, as where a user typed `ray start`, and no tunnel."""
    parts = urlsplit(url)
    if parts.hostname not in ("127.0.0.1", "localhost", "::1"):
        return False
    for each in psutil.net_connections("tcp"):
        # Of another user's process there is no id.
        if each.status == psutil.CONN_LISTEN and each.laddr and each.laddr.port == parts.port and each.pid:
            with contextlib.suppress(psutil.NoSuchProcess):
                return any(word.endswith(_DASHBOARD) for word in psutil.Process(each.pid).cmdline())
    return False


def _client(name: str, address: str) -> JobSubmissionClient:
    # A token is sent to this machine's cluster only; to another one where RAY_AUTH_MODE says so.
    local = state.running_at(address)
    if local is not None:
        address = local.job_server
    url = _probe(name, address)
    # Ray prefers the environment to what its clients are given.
    os.environ["RAY_API_SERVER_ADDRESS"] = url
    from ray.exceptions import AuthenticationError, RayError
    from ray.job_submission import JobSubmissionClient

    for module in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{module}").setLevel(logging.WARNING)
    try:
        return JobSubmissionClient(url)
    except AuthenticationError as error:
        raise UserError(
            f"{name} {address}: it takes no jobs without its token; expected RAY_AUTH_MODE=token in the environment, "
            "and the cluster's token in RAY_AUTH_TOKEN or ~/.ray/auth_token"
        ) from error
    except (RayError, OSError, RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"{name} {address}: no Ray cluster answers there ({error}); {_EXPECTED}") from error


def _probe(name: str, address: str) -> str:
    """The URL of a job server; the address itself where something else answers, as the head of a cluster does.

    Ray's own clients wait for most of a minute where nothing is, and for ever where something is silent.
    """
    url = (address if "://" in address else f"http://{address}").rstrip("/")
    try:
        if urlsplit(url).scheme not in ("http", "https") or urlsplit(url).port is None:
            raise ValueError("neither HOST:PORT nor http://HOST:PORT")
        with urllib.request.urlopen(f"{url}/api/version", timeout=_TIMEOUT_S):
            return url
    except urllib.error.HTTPError:  # it wants a token, or is something else: Ray's client says which
        return url
    except (urllib.error.URLError, TimeoutError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise UserError(f"{name} {address}: no cluster answers there ({reason}); {_EXPECTED}") from error
    except (OSError, http.client.HTTPException) as error:
        if "://" in address:
            raise UserError(f"{name} {address}: what answers there is no job server; {_EXPECTED}") from error
        return address
    except ValueError as error:
        raise UserError(f"{name} {address}: no address of a cluster ({error}); {_EXPECTED}") from error
