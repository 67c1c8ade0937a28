"""What the verbs say of a tracking store that they cannot use: one message, exit code 2, and nothing is made."""

import http.server
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import disks
import pytest
import sqlalchemy
from alembic import command
from mlflow import MlflowClient
from mlflow.store.db.utils import _get_alembic_config
from mlflow.store.tracking.dbmodels.initial_models import Base

from mimiclab.cli import main
from mimiclab.errors import UserError
from mimiclab.tracking import runs

Said = Callable[..., str]

EXPERIMENT = """
name: small
data: {scenes: {train: 2, val: 2, size: 64}}
"""
SEARCH = """
extends: small.yaml
name: look
search: {space: {optim.lr: {uniform: [0.1, 0.2]}}}
"""
VERBS = [
    ("train", "small.yaml", "--set", "where.tracking=URI"),
    ("train", "small.yaml", "--seeds", "2", "--set", "where.tracking=URI"),
    ("search", "look.yaml", "--set", "where.tracking=URI"),
    ("compare", "one", "two", "--tracking", "URI"),
    ("predict", "models:/mimiclab@champion", "small.yaml", "--tracking", "URI"),
    ("models", "list", "--tracking", "URI"),
    ("ui", "--tracking", "URI"),
]
every_verb = pytest.mark.parametrize("verb", VERBS, ids=[" ".join(verb[:3]) for verb in VERBS])


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(EXPERIMENT)
    Path("look.yaml").write_text(SEARCH)
    return tmp_path


@pytest.fixture
def said(folder: Path, capsys: pytest.CaptureFixture[str]) -> Said:
    """The only message of a verb on a store; nothing is made in the folder."""

    def run(verb: tuple[str, ...], uri: str) -> str:
        before = sorted(path.name for path in folder.iterdir())
        with pytest.raises(SystemExit) as caught:
            main([word.replace("URI", uri) for word in verb])
        out, err = capsys.readouterr()
        assert (caught.value.code, out) == (2, "")
        assert sorted(path.name for path in folder.iterdir()) == before
        [line] = err.splitlines()
        return line

    return run


@every_verb
def test_no_server(said: Said, verb: tuple[str, ...]) -> None:
    assert said(verb, "http://127.0.0.1:9").startswith(
        "error: where.tracking: http://127.0.0.1:9 does not answer within 5 s ("
    )


class Refusing(http.server.BaseHTTPRequestHandler):
    """Says what MLflow's basic auth says to strangers."""

    def do_GET(self) -> None:
        healthy = self.path == "/health"
        self.send_response(200 if healthy else 401)
        self.end_headers()
        self.wfile.write(b"OK" if healthy else b"You are not authenticated.")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def refusing() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("verb", [*VERBS[:-1], ("ui", "--project", "cells", "--tracking", "URI")], ids=lambda v: v[0])
def test_wrong_credentials(said: Said, refusing: str, verb: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "pa55word")
    message = said(verb, refusing)
    assert message.startswith(f"error: where.tracking: {refusing} answers 401 to the user 'ada'; expected one of its")
    assert "pa55word" not in message


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store as MLflow 2 made it, with a run of that time."""
    path = tmp_path_factory.mktemp("older") / "mlflow.db"
    uri = f"sqlite:///{path}"
    engine = sqlalchemy.create_engine(uri)
    Base.metadata.create_all(engine)
    command.upgrade(_get_alembic_config(uri), "0584bdc529eb")
    with engine.begin() as connection:
        for statement in (
            "INSERT INTO experiments (experiment_id, name, artifact_location, lifecycle_stage) "
            f"VALUES (1, 'mimiclab', '{path.parent}/artifacts', 'active')",
            "INSERT INTO runs (run_uuid, name, experiment_id, user_id, status, lifecycle_stage, start_time) "
            f"VALUES ('{'a' * 32}', 'one', 1, 'ada', 'FINISHED', 'active', 1)",
            f"INSERT INTO latest_metrics (run_uuid, key, value, is_nan, step) VALUES ('{'a' * 32}', 'm', 0.5, 0, 7)",
        ):
            connection.execute(sqlalchemy.text(statement))
    engine.dispose()
    return path


@every_verb
def test_a_store_of_an_older_mlflow(
    said: Said, older: Path, verb: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mimiclab.tracking.client._MIGRATION_S", 0.0)
    before = older.read_bytes()
    message = said(verb, f"sqlite:///{older}")
    assert message.startswith(
        f"error: where.tracking: {older} was made by another version of MLflow: it lacks the table"
    )
    assert message.endswith(f"Copy the file as a backup, then: mlflow db upgrade sqlite:///{older}")
    assert older.read_bytes() == before


@pytest.mark.slow
def test_what_the_message_says_makes_an_older_store_usable(older: Path, tmp_path: Path) -> None:
    copy = tmp_path / "mlflow.db"
    copy.write_bytes(older.read_bytes())
    with pytest.raises(UserError) as error:
        runs.check_tracking(f"sqlite:///{copy}")
    words = str(error.value).partition("then: ")[2].split()
    subprocess.run([sys.executable, "-m", *words], check=True, capture_output=True)
    runs.check_tracking(f"sqlite:///{copy}")
    run = MlflowClient(f"sqlite:///{copy}").get_run("a" * 32)
    assert (run.info.run_name, run.data.metrics) == ("one", {"m": 0.5})


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that has no room for MLflow's empty tables."""
    with disks.small_disk(tmp_path / "small", "400k") as place:
        yield place


def test_a_full_disk_under_a_store_that_is_to_be_made(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    uri = f"sqlite:///{small_disk}/mlflow.db"
    with pytest.raises(
        UserError, match=rf"^where\.tracking: {uri} cannot be used: .*disk.*expected {small_disk}/mlflow"
    ):
        runs.open_run(uri, "cells", "a", "abc", {}, {})
    assert not caplog.records
