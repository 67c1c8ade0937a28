import http.server
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from mimiclab.errors import UserError
from mimiclab.tracking import ui
from mimiclab.tracking.address import absolute_uri, check_tracking


def test_a_relative_sqlite_address_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    absolute = absolute_uri("sqlite:///runs/../mlflow.db")
    assert absolute == f"sqlite:///{tmp_path}/mlflow.db"
    assert absolute.startswith("sqlite:////")
    assert absolute_uri(absolute) == absolute
    assert absolute_uri("http://head:5000/") == "http://head:5000/"


def test_a_store_that_can_be_made_is_accepted(tmp_path: Path) -> None:
    check_tracking(f"sqlite:///{tmp_path}/mlflow.db")
    assert not list(tmp_path.iterdir()), "checking leaves nothing behind"


@pytest.mark.parametrize(
    ("uri", "found"),
    [
        ("mlflow.db", "'mlflow.db' is no tracking address"),
        ("postgres://db/runs", "'postgres://db/runs' is no tracking address"),
        ("http://[::1", "'http://[::1' is no tracking address (Invalid IPv6 URL)"),
        ("sqlite:///", "names no file"),
        ("sqlite:////", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("sqlite:////no/such/folder/mlflow.db", "the folder /no/such/folder does not exist"),
        ("http://", "does not answer within 5 s"),
        ("http://no-such-host.invalid:5000", "does not answer within 5 s"),
    ],
)
def test_a_wrong_address_is_named_with_what_was_expected(uri: str, found: str) -> None:
    with pytest.raises(UserError) as error:
        check_tracking(uri)
    message = str(error.value)
    assert message.startswith("where.tracking: ")
    assert uri in message
    assert found in message
    assert "expected" in message


@pytest.mark.parametrize("scheme", ["http", "https", "postgresql"])
def test_a_password_in_the_address_is_refused_and_not_repeated(scheme: str) -> None:
    with pytest.raises(UserError, match=r"found credentials in the address.*expected them in MLFLOW_TRACKING") as error:
        check_tracking(f"{scheme}://ada:pa55word@127.0.0.1:9")
    assert "pa55word" not in str(error.value)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("name: an experiment file by mistake")
    with pytest.raises(UserError, match="is no sqlite file"):
        check_tracking(f"sqlite:///{tmp_path}/mlflow.db")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=f"{tmp_path} cannot be written"):
        check_tracking(f"sqlite:///{tmp_path}/mlflow.db")


def test_an_address_that_accepts_but_never_answers_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        with pytest.raises(UserError, match=r"does not answer within 0\.5 s"):
            check_tracking(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.5)
        assert time.monotonic() - start < 3


def test_another_server_than_mlflow_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    handler = http.server.SimpleHTTPRequestHandler
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as other:
        thread = threading.Thread(target=other.serve_forever, daemon=True)
        thread.start()
        uri = f"http://127.0.0.1:{other.server_port}"
        try:
            with pytest.raises(UserError, match="answers 404 File not found at /health"):
                check_tracking(uri)
            (tmp_path / "health").write_text("hello")
            with pytest.raises(UserError, match="answers 'hello' at /health"):
                check_tracking(uri)
            (tmp_path / "health").write_text("OK")
            check_tracking(uri)
        finally:
            other.shutdown()


def test_serve_asks_for_a_store_and_a_port_that_can_be_used(tmp_path: Path) -> None:
    database = tmp_path / "mlflow.db"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"there is no file {database}"):
            ui.serve(f"sqlite:///{database}", port)
        database.touch()
        with pytest.raises(UserError, match=f"port {port} is in use"):
            ui.serve(f"sqlite:///{database}", port)


def test_the_first_port_that_is_free_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        first, second = taken.getsockname()[1], free.getsockname()[1]
        free.close()
        monkeypatch.setattr(ui, "PORTS", (first, second))
        assert ui.free_port() == second
        monkeypatch.setattr(ui, "PORTS", (first, first))
        with pytest.raises(UserError, match=f"ports {first} to {first} are all in use"):
            ui.free_port()
