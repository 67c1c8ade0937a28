"""Checkpoints on a store that speaks S3's protocol: moto's server on loopback, which refuses when told to."""

import http.client
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from mimiclab import checkpoint
from mimiclab import storage as storage_module
from mimiclab.checkpoint import MANIFEST, META, STATE, WEIGHTS
from mimiclab.errors import UserError
from mimiclab.saver import MAX_FAILURES, Saver
from mimiclab.storage import MissingError, Storage

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("one_thread")]
BUCKET = "runs"
Request = tuple[str, str]


@dataclass
class Store:
    """The server's address, what it was asked, and what it answers before the store does."""

    address: str = ""
    requests: list[Request] = field(default_factory=list)
    refuses: Callable[[Request], object] = lambda _: False

    def folder(self, name: str) -> Storage:
        return Storage(f"s3://{BUCKET}/{name}?scheme=http&endpoint_override={self.address}")


@pytest.fixture(scope="module")
def running() -> Iterator[Store]:
    names = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_EC2_METADATA_DISABLED": "true"}
    store, inner = Store(), DomainDispatcherApplication(create_backend_app)

    def application(environ: dict, start_response: Callable) -> Iterable[bytes]:
        request = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        store.requests.append(request)
        if store.refuses(request):
            start_response("403 Forbidden", [("Content-Length", "0")])
            return [b""]
        return inner(environ, start_response)

    server = make_server("127.0.0.1", 0, application, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    store.address = f"127.0.0.1:{server.server_port}"
    connection = http.client.HTTPConnection(store.address)
    connection.request("PUT", f"/{BUCKET}")
    assert connection.getresponse().status == 200
    with pytest.MonkeyPatch.context() as patch:
        for name, value in names.items():
            patch.setenv(name, value)
        yield store
    server.shutdown()
    server.server_close()


@pytest.fixture
def store(running: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setattr(storage_module, "_FIRST_PAUSE_S", 0.01)
    running.requests.clear()
    yield running
    running.refuses = lambda _: False


@pytest.fixture
def warnings() -> list[str]:
    return []


def save(folder: Storage, step: int, *, notice: bool = False, **more: object) -> checkpoint.Checkpoint:
    weights, state = {"w": torch.full((3,), float(step))}, {"step": step}
    return checkpoint.save(folder, weights, state, {"step": step, "classes": ["a"], **more}, notice=notice)


def test_what_was_saved_comes_back(store: Store, tmp_path: Path) -> None:
    folder = store.folder("one/checkpoints")
    assert checkpoint.latest(folder, warn=pytest.fail) is None
    for step in (9, 100, 50):
        save(folder, step, notice=step == 50)

    for place in (folder, folder.uri):
        newest = checkpoint.latest(place, warn=pytest.fail)
        assert newest.step == 100
        assert newest.name == f"s3://{BUCKET}/one/checkpoints/step-00000100"
        assert newest.weights()["w"].eq(100).all()
        assert newest.state() == {"step": 100}
        newest.write_weights(tmp_path / "w.safetensors")
        assert checkpoint.classes_of(tmp_path / "w.safetensors") == ["a"]
        with pytest.raises(UserError, match="lies on no local disk"):
            _ = newest.path
    assert checkpoint.find(folder, 50).name.endswith("-notice")


def test_a_driver_does_not_read_the_large_files(store: Store) -> None:
    folder = store.folder("driver")
    save(folder, 1)
    store.requests.clear()
    assert checkpoint.latest(folder, warn=pytest.fail, deep=False).step == 1
    read = {path.rpartition("/")[2] for method, path in store.requests if method == "GET"}
    assert {META, MANIFEST} <= read
    assert not {WEIGHTS, STATE} & read


@pytest.mark.parametrize("file", [WEIGHTS, STATE, META, MANIFEST])
@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_a_damaged_one_is_skipped_for_the_one_before_and_named(
    store: Store, warnings: list[str], damage: str, file: str
) -> None:
    folder = store.folder(f"damaged-{damage}-{file}")
    for step in (1, 2):
        save(folder, step)
    place = folder / "step-00000002"
    place.write(file, place.read(file)[:-1]) if damage == "changed" else place.delete(file)

    assert checkpoint.latest(folder, warn=warnings.append).step == 1
    assert len(warnings) == 1
    assert warnings[0].startswith(f"checkpoint {place.name}: {file} ")


def test_old_ones_are_removed(store: Store) -> None:
    folder = store.folder("prune")
    for step in range(1, 5):
        save(folder, step)
        save(folder, 10 * step, notice=True)
    (folder / "step-00000003").delete(MANIFEST)
    checkpoint.prune(folder, newest=30, keep=2, steps=[1])
    assert sorted(folder.folders()) == [
        *(f"step-{step:08d}" for step in (1, 2, 4)),
        *(f"step-{step:08d}-notice" for step in (20, 30, 40)),
    ]


def test_an_upload_that_ends_before_the_manifest_is_no_checkpoint(store: Store, warnings: list[str]) -> None:
    folder = store.folder("interrupted")
    save(folder, 1)
    store.refuses = lambda request: request[0] != "HEAD" and request[1].endswith(MANIFEST)
    with pytest.raises(UserError, match=f"step-00000002/{MANIFEST}: cannot be written, tried 3 times: .*ACCESS_DENIED"):
        save(folder, 2)
    store.refuses = lambda _: False
    assert sorted((folder / "step-00000002").sizes()) == sorted([WEIGHTS, STATE, META])

    assert checkpoint.latest(folder, warn=warnings.append).step == 1
    assert len(warnings) == 1
    assert f"step-00000002: {MANIFEST} is missing" in warnings[0]
    save(folder, 2)
    assert checkpoint.latest(folder, warn=pytest.fail).step == 2


def test_a_step_that_is_written_again_is_none_until_it_is_whole(store: Store, warnings: list[str]) -> None:
    folder = store.folder("again")
    save(folder, 1, mark="before")
    store.refuses = lambda request: request[0] in ("PUT", "POST") and request[1].endswith(META)
    with pytest.raises(UserError):
        save(folder, 1, mark="again")
    store.refuses = lambda _: False
    assert checkpoint.latest(folder, warn=warnings.append) is None
    save(folder, 1, mark="again")
    assert checkpoint.latest(folder, warn=pytest.fail).meta["mark"] == "again"


KILLED = """
import sys, torch
from mimiclab import checkpoint

for step in range(1, 100):
    meta = {"step": step, "classes": []}
    checkpoint.save(sys.argv[1], {"w": torch.full((3,), float(step))}, {"step": step}, meta)
    print(step, flush=True)
"""


def test_a_process_killed_in_an_upload_loses_that_one_only(store: Store, warnings: list[str]) -> None:
    folder = store.folder("killed")

    def kill(request: Request) -> bool:
        if request[0] in ("PUT", "POST") and request[1].endswith(f"step-00000003/{STATE}"):
            process.send_signal(signal.SIGKILL)
            return True
        return False

    store.refuses = kill
    arguments = [sys.executable, "-c", KILLED, folder.uri]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        acknowledged = process.stdout.read().split()
    assert acknowledged == [b"1", b"2"]

    newest = checkpoint.latest(folder, warn=warnings.append)
    assert newest.step == 2
    assert newest.weights()["w"].eq(2).all()
    assert len(warnings) == 1


def test_a_store_that_refuses_is_told_and_then_ends_the_run(store: Store, warnings: list[str]) -> None:
    folder = store.folder("refused")
    store.refuses = lambda request: request[0] in ("PUT", "POST")
    saver = Saver(folder, keep=1, warn=warnings.append)

    def snapshot(step: int) -> None:
        saver.snapshot({"w": torch.zeros(1)}, {}, {"step": step, "classes": []})

    for step in range(MAX_FAILURES):
        snapshot(step)
    with pytest.raises(UserError, match=f"^checkpoint s3://{BUCKET}/refused: the last 3 could not be written "):
        snapshot(9)
    assert [f"checkpoint of step {step} failed: {folder.name}/step" in warnings[step] for step in range(3)] == [
        True
    ] * 3


def test_what_cannot_be_removed_is_told_and_the_checkpoint_counts(store: Store, warnings: list[str]) -> None:
    folder = store.folder("kept")
    save(folder, 1)
    store.refuses = lambda request: request[0] == "DELETE" and "step-00000001" in request[1]
    saver = Saver(folder, keep=1, warn=warnings.append)
    saver.snapshot({"w": torch.zeros(1)}, {}, {"step": 2, "classes": []})
    saver.flush(60)
    assert checkpoint.latest(folder, warn=pytest.fail).step == 2
    assert len(warnings) == 1
    assert warnings[0].startswith(f"old checkpoints stay: {folder.name}/step-00000001/{MANIFEST}: cannot be removed")


def test_a_store_that_refuses_to_be_read_is_no_reason_to_start_anew(store: Store) -> None:
    folder = store.folder("unreadable")
    save(folder, 1)
    for refused in ("", MANIFEST, META, WEIGHTS):
        store.refuses = lambda request, refused=refused: request[1].endswith(refused)
        with pytest.raises(UserError, match="cannot be read, tried 3 times") as caught:
            checkpoint.latest(folder, warn=pytest.fail)
        assert not isinstance(caught.value, MissingError | checkpoint.DamagedError)


def test_a_store_that_is_gone_is_no_reason_to_start_anew(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "_ATTEMPTS", 1)  # of 6 s each: the client has a patience of its own
    gone = Storage(f"s3://{BUCKET}/gone?scheme=http&endpoint_override=127.0.0.1:1")
    with pytest.raises(UserError, match=f"^s3://{BUCKET}/gone: cannot be read, tried 1 times: .*NETWORK_CONNECTION"):
        checkpoint.latest(gone, warn=pytest.fail)
