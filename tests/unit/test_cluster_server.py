import http.server
import os
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest

from mimiclab.cluster import server, state
from mimiclab.errors import UserError


@pytest.fixture(autouse=True)
def no_cluster(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    for name in server.VARIABLES:
        monkeypatch.setenv(name, "")


@pytest.fixture
def listener():
    """A port that takes connections and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield listening


def port_of(listening):
    return listening.getsockname()[1]


@pytest.fixture
def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return port_of(probe)


@pytest.mark.parametrize("scheme", ["", "http://"])
def test_nothing_at_the_address_is_said_at_once(closed_port, scheme):
    start = time.monotonic()

    with pytest.raises(UserError, match=rf"--address {scheme}127\.0\.0\.1:{closed_port}: no cluster answers there"):
        server.connect(f"{scheme}127.0.0.1:{closed_port}")

    assert time.monotonic() - start < 2


def test_a_silent_port_is_given_up(listener, monkeypatch):
    monkeypatch.setattr(server, "_TIMEOUT_S", 0.3)
    start = time.monotonic()

    with pytest.raises(UserError, match=r"no cluster answers there \(timed out\)"):
        server.connect(f"127.0.0.1:{port_of(listener)}")

    assert time.monotonic() - start < 2


def test_another_web_server_is_no_cluster():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        with pytest.raises(UserError, match="no Ray cluster answers there"):
            server.connect(f"http://127.0.0.1:{web.server_port}")
        web.shutdown()


def test_another_protocol_is_no_job_server(listener):
    def answer():
        connection, _ = listener.accept()
        connection.recv(1000)
        connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
        connection.close()

    threading.Thread(target=answer, daemon=True).start()

    with pytest.raises(UserError, match="no job server"):
        server.connect(f"http://127.0.0.1:{port_of(listener)}")


@pytest.mark.parametrize("address", ["auto", "ray://127.0.0.1:10001", "127.0.0.1", "http://127.0.0.1:port", "host:"])
def test_what_is_no_address_is_refused(address):
    with pytest.raises(UserError, match=rf"--address {address}: no address of a cluster .*; expected"):
        server.connect(address)


def test_the_environment_names_a_cluster_and_the_option_comes_first(closed_port, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{closed_port}")
    with pytest.raises(UserError, match=rf"\$RAY_ADDRESS 127\.0\.0\.1:{closed_port}"):
        server.connect(None)
    with pytest.raises(UserError, match="--address auto"):
        server.connect("auto")


def test_without_any_cluster_the_verb_that_starts_one_is_named():
    with pytest.raises(UserError, match="mimiclab cluster up"):
        server.connect(None)


@pytest.mark.parametrize("first", ["", "import ray; "])
@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.slow
def test_the_token_is_sent_to_the_cluster_of_this_machine_only(ours, first, tmp_path):
    """In a process of its own, with and without Ray in it by then: Ray reads its settings when it is imported."""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("0123456789abcdef" * 4)
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.headers.get("Authorization"))
            self.send_error(401)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{web.server_port}"
        process = state.identify([psutil.Process()])
        environment = {"RAY_AUTH_MODE": "token"}
        job_server = url if ours else "http://127.0.0.1:1"
        state.LocalCluster("127.0.0.1:2", job_server, str(tmp_path), environment, process).write()
        code = f"{first}from mimiclab.cluster.server import connect; connect({url!r})"
        environ = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        done = subprocess.run(
            [sys.executable, "-c", code], env={**environ, "HOME": str(tmp_path)}, capture_output=True, text=True
        )
        web.shutdown()

    assert "UserError" in done.stderr
    assert "takes no jobs without its token" in done.stderr
    assert seen[-1] == ("Bearer " + "0123456789abcdef" * 4 if ours else None)


class Client:
    """The part of a client that says where its server is."""

    def __init__(self, address):
        self.address = address

    def get_address(self):
        return self.address


def test_what_cluster_up_started_is_this_machine(tmp_path):
    process = state.identify([psutil.Process()])
    state.LocalCluster("127.0.0.1:2", "http://127.0.0.1:1", str(tmp_path), {}, process).write()

    assert server.is_this_machine(Client("http://127.0.0.1:1"))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_the_near_end_of_a_tunnel_is_not(listener, host):
    assert not server.is_this_machine(Client(f"http://{host}:{port_of(listener)}"))


def test_nor_is_another_machine():
    assert not server.is_this_machine(Client("http://10.0.0.1:8265"))
