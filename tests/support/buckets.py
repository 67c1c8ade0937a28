"""Buckets on loopback: moto's server speaks S3's protocol."""

import contextlib
import http.client
from collections.abc import Iterator

import pytest
from moto.server import ThreadedMotoServer

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_EC2_METADATA_DISABLED": "true"}
"""In the environment of whoever opens a bucket; the server takes any."""


@contextlib.contextmanager
def bucket_server(name: str) -> Iterator[str]:
    """HOST:PORT of a server with an empty bucket of that name; this process has the credentials meanwhile."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    connection = http.client.HTTPConnection(host, port)
    connection.request("PUT", f"/{name}")
    assert connection.getresponse().status == 200
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in CREDENTIALS.items():
            patch.setenv(variable, value)
        yield f"{host}:{port}"
    server.stop()
