"""Who reaches the job server of a cluster on this machine, and what that lets them do."""

from __future__ import annotations

import socket

from mimiclab.errors import UserError

_EVERYWHERE = "0.0.0.0"
_LOOPBACK = "127.0.0.1"


def check(host: str, *, token: bool) -> None:
    """Make sure that a job server may listen at an address.

    Args:
        host: an address of this machine.
        token: whether it asks for a token.

    Raises:
        UserError: nothing can listen there; or other machines reach it, and it asks nobody for a token.
    """
    try:
        with socket.socket() as probe:
            probe.bind((host, 0))
    except OSError as error:
        raise UserError(
            f"--dashboard-host {host}: nothing can listen there ({error.strerror}); expected an address of this "
            f"machine, as {_LOOPBACK}"
        ) from error
    if not token and not _is_loopback(host):
        raise UserError(
            f"--dashboard-host {host}: without a token, who reaches the job server can run commands here as you; "
            f"expected RAY_AUTH_MODE=token, or {_LOOPBACK}"
        )


def risk(host: str, port: int, *, token: bool) -> str | None:
    """What a person should know who has a job server listen there; None where there is nothing to know."""
    if not _is_loopback(host):
        return (
            f"other machines reach the dashboard and the job server at {host}:{port}. Who has the token of this "
            "cluster can run commands here as you, and the token travels unencrypted. Safer is "
            f"{_LOOPBACK}, and from elsewhere ssh -L {port}:{_LOOPBACK}:{port}"
        )
    if not token:
        return (
            f"without a token, every user of this machine can run commands as you, by the job server at {host}:{port}"
        )
    return None


def own_address(host: str) -> str:
    """Where processes of this machine find what listens at an address."""
    return _LOOPBACK if host == _EVERYWHERE else host


def _is_loopback(host: str) -> bool:
    return socket.gethostbyname(host).startswith("127.")
