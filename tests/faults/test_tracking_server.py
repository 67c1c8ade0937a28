"""A team's tracking server, set up as docs/tracking-server.md says: PostgreSQL, a bucket, users with passwords."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import boto3
import numpy as np
import pytest
from buckets import CREDENTIALS, bucket_server
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.server import get_app_client
from PIL import Image
from trained import make_run, track

from mimiclab.cli import main
from mimiclab.errors import UserError
from mimiclab.runs import Run
from mimiclab.tracking import models, runs
from mimiclab.tracking.client import ENVIRONMENT, connect
from mimiclab.tracking.protocol import Table
from mimiclab.tracking.records import Store
from mimiclab.tracking.writer import MlflowTracker

pytestmark = [pytest.mark.server, pytest.mark.long, pytest.mark.usefixtures("one_thread")]

Asks = Callable[..., None]

DOCUMENT = (Path(__file__).parents[2] / "docs" / "tracking-server.md").read_text()
BUCKET = "team"
STEPS = range(1, 41)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Postgres:
    """A database server of its own, on loopback and on a socket in its folder."""

    def __init__(self, binaries: Path, folder: Path) -> None:
        self._binaries, self._folder = binaries, folder
        self.port = free_port()
        # It refuses to run as root.
        self._as: dict[str, object] = {}
        if os.geteuid() == 0:
            shutil.chown(folder, "postgres", "postgres")
            self._as = {"user": "postgres", "group": "postgres", "extra_groups": ()}

    @contextmanager
    def running(self) -> Iterator["Postgres"]:
        data = self._folder / "data"
        self._own("initdb", "-D", data, "-U", "postgres", "-A", "scram-sha-256", "--auth-local=trust", "--no-sync")
        listens = ["-p", str(self.port), "-k", self._folder, "-h", "127.0.0.1", "-c", "fsync=off"]
        with (self._folder / "log").open("wb") as log:
            command = [self._binaries / "postgres", "-D", data, *listens]
            self._process = process = subprocess.Popen(command, stdout=log, stderr=log, **self._as)  # type: ignore[call-overload]
        try:
            deadline = time.monotonic() + 60
            while subprocess.run([self._binaries / "pg_isready", *self._here], capture_output=True).returncode:
                assert process.poll() is None, (self._folder / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.1)
            yield self
        finally:
            self.stop()

    def stop(self) -> None:
        self._process.send_signal(signal.SIGINT)  # ends connections, and then itself
        self._process.wait(60)

    def as_owner(self, sql: str) -> None:
        self._own("psql", *self._here, "-U", "postgres", "-q", "-v", "ON_ERROR_STOP=1", said=sql)

    def _own(self, name: str, *args: str | Path, said: str = "") -> None:
        command = [self._binaries / name, *args]
        done = subprocess.run(command, input=said, text=True, capture_output=True, **self._as)  # type: ignore[call-overload]
        assert done.returncode == 0, done.stderr

    def tool(self, name: str, *args: str | Path, password_file: Path) -> None:
        """Run pg_dump or pg_restore as MLflow's user."""
        command = [self._binaries / name, "-h", "127.0.0.1", "-p", str(self.port), "-U", "mlflow", *args]
        subprocess.run(command, check=True, env={**os.environ, "PGPASSFILE": str(password_file)})

    def uri(self, database: str) -> str:
        return f"postgresql+psycopg2://mlflow@127.0.0.1:{self.port}/{database}"

    @property
    def _here(self) -> tuple[str, ...]:
        return ("-h", str(self._folder), "-p", str(self.port))


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[4]))
    if not found:
        pytest.skip("there is no PostgreSQL; Debian has it: apt-get install postgresql")
    # Not below pytest's own folder, which another user may not enter.
    with (
        tempfile.TemporaryDirectory(prefix="mimiclab-postgres-") as folder,
        Postgres(found[-1].parent, Path(folder)).running() as running,
    ):
        yield running


@dataclass(frozen=True)
class Team:
    """The server, what it stands on, and who may use it."""

    uri: str
    postgres: Postgres
    password_file: Path
    bucket: str
    passwords: Mapping[str, str]
    moved: Run

    def stored(self) -> list[str]:
        """What the bucket holds."""
        store = boto3.client("s3", endpoint_url=self.bucket, aws_access_key_id="key", aws_secret_access_key="secret")
        return [each["Key"] for each in store.list_objects_v2(Bucket=BUCKET)["Contents"]]


@pytest.fixture(scope="module")
def team(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    """A server on which somebody's sqlite store was moved before its first start."""
    root = tmp_path_factory.mktemp("team")
    secret = secrets.token_hex(16)
    postgres.as_owner(
        f"CREATE ROLE mlflow LOGIN PASSWORD '{secret}';\n"
        + "".join(f"CREATE DATABASE {name} OWNER mlflow;\n" for name in ("mlflow", "mlflow_auth", "restored"))
    )
    password_file = root / "pgpass"
    password_file.touch(0o600)
    password_file.write_text(f"127.0.0.1:{postgres.port}:*:mlflow:{secret}\n")
    (root / "basic_auth.ini").write_text(
        DOCUMENT.partition("```ini\n")[2].partition("```")[0].replace("127.0.0.1:5432", f"127.0.0.1:{postgres.port}")
    )
    passwords = {name: secrets.token_hex(16) for name in ("admin", "ada", "bob")}
    port = free_port()
    with bucket_server(BUCKET) as address, pytest.MonkeyPatch.context() as patch:
        bucket = f"http://{address}"
        moved = move(root, postgres, password_file, bucket)
        for name in CREDENTIALS:  # the server's alone: what users send goes through it
            patch.delenv(name)
        environment = {
            **os.environ,
            **ENVIRONMENT,
            **CREDENTIALS,
            "PGPASSFILE": str(password_file),
            "MLFLOW_BACKEND_STORE_URI": postgres.uri("mlflow"),
            "MLFLOW_SERVE_ARTIFACTS": "true",
            "MLFLOW_ARTIFACTS_DESTINATION": f"s3://{BUCKET}/mlflow",
            "MLFLOW_S3_ENDPOINT_URL": bucket,
            "MLFLOW_AUTH_CONFIG_PATH": str(root / "basic_auth.ini"),
            "MLFLOW_AUTH_ADMIN_PASSWORD": passwords["admin"],
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(16),
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        }
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--workers", "1"),
            *("--host", "127.0.0.1", "--port", str(port), "--allowed-hosts", f"127.0.0.1:{port}"),
        ]
        log = root / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
        try:
            uri = f"http://127.0.0.1:{port}"
            wait_until_healthy(uri, process, log)
            patch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
            patch.setenv("MLFLOW_TRACKING_PASSWORD", passwords["admin"])
            for name in ("ada", "bob"):
                get_app_client("basic-auth", uri).create_user(name, passwords[name])
            yield Team(uri, postgres, password_file, bucket, passwords, moved)
            assert not [word for word in (*passwords.values(), secret) if word in log.read_text()]
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


def move(root: Path, postgres: Postgres, password_file: Path, bucket: str) -> Run:
    """A store in a sqlite file, with a run and its model, put where the server will look."""
    run = track(make_run(root), f"sqlite:///{root}/mlflow.db")
    MlflowClient(run.tracking).log_batch(run.mlflow_run_id, metrics=[Metric("student/AP", 0.5, 1000, 3)])
    models.register(run, "champion")
    environment = {**os.environ, **ENVIRONMENT, "PGPASSFILE": str(password_file)}
    (root / "move.py").write_text(DOCUMENT.partition("```python\n")[2].partition("```")[0])
    for command in (
        ["-m", "mlflow", "db", "upgrade", postgres.uri("mlflow")],
        [str(root / "move.py"), run.tracking, postgres.uri("mlflow")],
    ):
        subprocess.run([sys.executable, *command], env=environment, check=True, capture_output=True)
    store = boto3.client("s3", endpoint_url=bucket)
    folder = root / "mlflow-artifacts"
    for path in folder.rglob("*"):
        if path.is_file():
            store.upload_file(str(path), BUCKET, f"mlflow/{path.relative_to(folder)}")
    shutil.rmtree(folder)
    return run


def wait_until_healthy(uri: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + 180
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        with suppress(OSError), urllib.request.urlopen(f"{uri}/health", timeout=5):
            return
        time.sleep(0.2)


@pytest.fixture(autouse=True)
def asks(team: Team, monkeypatch: pytest.MonkeyPatch) -> Asks:
    """Chooses who asks; ada to begin with."""

    def become(name: str, password: str | None = None) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", name)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", team.passwords[name] if password is None else password)

    become("ada")
    return become


@pytest.fixture(scope="module")
def run(team: Team, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of ada's that the server has all of."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
        patch.setenv("MLFLOW_TRACKING_PASSWORD", team.passwords["ada"])
        run = track(make_run(tmp_path_factory.mktemp("runs"), "name=shared"), team.uri)
        tracker = MlflowTracker(team.uri, run.mlflow_run_id)
        for step in STEPS:
            tracker.log_metrics(step, {"train/loss": 1 / step, "train/grad_norm": float("inf" if step == 5 else "nan")})
        tracker.log_metrics(3, {"student/AP": 0.25})
        tracker.log_picture("validation/1", 0, Image.new("RGB", (32, 32), "red"))
        tracker.log_table("evaluation/classes.json", Table(("class", "AP"), [["disk", 0.25]]))
        tracker.set_tags({"host.cpu": "some"})
        assert tracker.close(120) == []
    assert tracker.unsent_files() == 0
    return run


def history(client: MlflowClient, run: Run, key: str) -> list[tuple[int, float, int]]:
    return [(each.step, each.value, each.timestamp) for each in client.get_metric_history(run.mlflow_run_id, key)]


def test_a_run_is_in_the_database_and_its_files_are_in_the_bucket(team: Team, run: Run) -> None:
    version = models.register(run, "challenger", "shapes")

    client = connect(team.uri)
    assert [(step, value) for step, value, _ in history(client, run, "train/loss")] == [(s, 1 / s) for s in STEPS]
    names = {key.removeprefix("mlflow/") for key in team.stored()}
    assert f"{run.mlflow_run_id}/artifacts/evaluation/classes.json" in names
    assert [name for name in names if name.startswith(f"{run.mlflow_run_id}/artifacts/images/validation~1+step+0+")]
    model = client.get_logged_model(models.log_model(run)).model_id
    assert f"models/{model}/artifacts/artifacts/weights.safetensors" in names
    assert (version.number, version.run, version.ap) == (1, "shared", 0.25)
    loaded = models.load(team.uri, "models:/shapes@challenger")
    weights = run.best().weights()
    assert all(value.equal(weights[name]) for name, value in loaded.detector.state_dict().items())


def test_what_was_in_a_sqlite_file_is_there_and_can_be_added_to(team: Team) -> None:
    client = connect(team.uri)
    record = client.get_run(team.moved.mlflow_run_id)
    assert (record.info.run_name, record.data.metrics) == ("tiny", {"student/AP": 0.5})
    assert record.info.artifact_uri == f"mlflow-artifacts:/{team.moved.mlflow_run_id}/artifacts"
    assert models.load(team.uri, "models:/mimiclab@champion").classes == team.moved.classes

    again = runs.open_run(team.uri, "shapes", "tiny", team.moved.identity, {}, {})
    assert again == team.moved.mlflow_run_id
    runs.log_text(team.uri, again, "name: tiny")
    assert f"mlflow/{again}/artifacts/experiment.yaml" in team.stored()
    assert runs.open_run(team.uri, "new", "a", "abc", {}, {"mimiclab.classes": "class, " * 2000})


VERBS = [
    ("train", "x.yaml", "--set", "where.tracking=URI"),
    ("compare", "one", "two", "--tracking", "URI"),
    ("models", "list", "--tracking", "URI"),
    ("ui", "--tracking", "URI"),
]


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb[0])
@pytest.mark.parametrize(("name", "found"), [("ada", "the user 'ada'"), ("", "a request without a user")])
def test_who_is_not_known_is_told_so(
    team: Team,
    asks: Asks,
    verb: Sequence[str],
    name: str,
    found: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asks(name, "wrong" if name else "")
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text("name: x\ndata: {scenes: {}}\n")
    with pytest.raises(SystemExit) as caught:
        main([word.replace("URI", team.uri) for word in verb])
    [line] = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2
    assert line.startswith(f"error: where.tracking: {team.uri} answers 401 to {found}; expected one of its users")


def test_who_may_not_delete_is_told_so(team: Team, run: Run, asks: Asks) -> None:
    asks("bob")
    store = Store(team.uri)
    assert store.by_ids([run.mlflow_run_id])[run.mlflow_run_id].name == "shared"
    with pytest.raises(UserError, match=r"answers 403 to the user 'bob': Permission denied; expected a user who may"):
        store.delete(run.mlflow_run_id)


def test_a_restored_dump_has_the_same_runs(
    team: Team, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dump = tmp_path / "mlflow.dump"
    keys = {"password_file": team.password_file}
    team.postgres.tool("pg_dump", "--format=custom", f"--file={dump}", "mlflow", **keys)
    team.postgres.tool("pg_restore", "--no-owner", "--exit-on-error", "--dbname=restored", dump, **keys)

    monkeypatch.setenv("PGPASSFILE", str(team.password_file))
    restored = team.postgres.uri("restored")
    subprocess.run([sys.executable, "-m", "mlflow", "db", "upgrade", restored], check=True, capture_output=True)
    before, after = connect(team.uri), MlflowClient(restored)
    for each in (run, team.moved):
        ours, theirs = before.get_run(each.mlflow_run_id), after.get_run(each.mlflow_run_id)
        assert dict(ours.info) == dict(theirs.info)
        assert (ours.data.params, ours.data.tags) == (theirs.data.params, theirs.data.tags)
        assert ours.data.metrics.keys() == theirs.data.metrics.keys()
        for key in ours.data.metrics:
            np.testing.assert_equal(history(before, each, key), history(after, each, key))
    assert after.get_model_version_by_alias("mimiclab", "champion").run_id == team.moved.mlflow_run_id


def test_a_server_without_its_database_is_one_message(team: Team) -> None:
    """The last one: nothing comes after it."""
    team.postgres.stop()
    with pytest.raises(
        UserError, match=rf"^where\.tracking: {team.uri} answers 50\d.*; expected a server that reaches"
    ):
        runs.check_tracking(team.uri)
