"""One request to a cloud's metadata server: bounded in time and size, and never through a proxy."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.message import Message
from urllib.parse import urlsplit

from mimiclab.errors import UserError

_MAX_BYTES = 64 * 1024


class NoAnswerError(Exception):
    """The metadata server gave no answer that means anything; the message says what happened instead."""


@dataclass(frozen=True)
class Answer:
    """What a metadata server answered."""

    status: int
    headers: Message
    text: str


class MetadataServer:
    """A metadata server, named by the URL of its root.

    Args:
        variable: environment variable that names it, for messages.
        url: http://HOST or http://HOST:PORT.

    Raises:
        UserError: that is no such URL.
    """

    def __init__(self, variable: str, url: str) -> None:
        try:
            parts = urlsplit(url)
            if parts.scheme != "http" or not parts.hostname or parts.path.strip("/"):
                raise ValueError("no root of a server")
            self._host, self._port = parts.hostname, parts.port or 80
        except ValueError as error:
            raise UserError(f"${variable}: {url} ({error}); expected http://HOST or http://HOST:PORT") from error

    def ask(self, path: str, headers: Mapping[str, str], *, seconds: float, method: str = "GET") -> Answer:
        """Send one request; the whole of it, from connecting to the last byte, takes at most about `seconds`.

        Raises:
            NoAnswerError: it took longer, broke off, was an error of the server (5xx), or was no HTTP.
        """
        # Unlike urllib, http.client knows nothing of http_proxy.
        connection = http.client.HTTPConnection(self._host, self._port, timeout=seconds)
        start = time.monotonic()
        late = threading.Event()
        try:
            connection.connect()
            # A time-out of a socket starts anew with every byte: an answer that trickles in would last for ever.
            left = max(0.0, seconds - (time.monotonic() - start))
            limit = threading.Timer(left, _break_off, (connection.sock, late))
            limit.daemon = True
            limit.start()
            try:
                connection.request(method, path, headers={**headers, "Connection": "close"})
                response = connection.getresponse()
                body = response.read(_MAX_BYTES + 1)
            finally:
                limit.cancel()
        except (OSError, http.client.HTTPException) as error:
            slow = late.is_set() or isinstance(error, TimeoutError)
            # What a server of another protocol sends is part of the message.
            reason = " ".join(str(error).split())[:100] or type(error).__name__
            raise NoAnswerError(_slow(seconds) if slow else reason) from error
        finally:
            connection.close()
        if late.is_set():
            raise NoAnswerError(_slow(seconds))
        if len(body) > _MAX_BYTES:
            raise NoAnswerError(f"an answer of more than {_MAX_BYTES} bytes")
        if response.status >= 500:
            raise NoAnswerError(f"status {response.status}")
        return Answer(response.status, response.headers, body.decode("utf-8", "replace").strip())


def _slow(seconds: float) -> str:
    return f"no whole answer within {seconds:g} s"


def _break_off(connected: socket.socket, late: threading.Event) -> None:
    late.set()
    with contextlib.suppress(OSError):
        connected.shutdown(socket.SHUT_RDWR)
