"""One driver per run, with real processes that are killed, race and lose their storage."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest
from buckets import bucket_server

from mimiclab import lease as module
from mimiclab.errors import UserError
from mimiclab.lease import LEASE, Holder, Lease, last_holder
from mimiclab.storage import Storage

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")

# Takes leases in folders that it is told, one per line, and keeps them.
DRIVER = """
import sys, time
from mimiclab import lease
from mimiclab.errors import UserError
from mimiclab.storage import Storage
lease.SETTLE_S, lease.HEARTBEAT_S, lease.REMOTE_HEARTBEAT_S = 0.5, 0.2, 0.2
kept = []
print("ready", flush=True)
for line in sys.stdin:
    start, folder = line.split()
    time.sleep(max(0.0, float(start) - time.time()))
    try:
        kept.append(lease.Lease.take(Storage(folder), "x"))
        print("took", flush=True)
    except UserError as error:
        print("refused", error, flush=True)
"""


class Driver:
    """Another process that takes leases."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, folder: str | Path, at: float = 0.0) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{at} {folder}\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def start() -> Iterator[Callable[[], Driver]]:
    drivers: list[Driver] = []

    def started() -> Driver:
        drivers.append(Driver())
        return drivers[-1]

    yield started
    for driver in drivers:
        driver.end()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(module, "RETRY_S", 0.1)


def write(storage: Storage, **changes: object) -> Holder:
    """Leave the record of a driver that took its lease a while ago, by default this process."""
    now = time.time()
    record = Holder(
        owner="0" * 16,
        host="spot-7",
        pids=module._pids(),
        pid=os.getpid(),
        started=psutil.Process().create_time(),
        since=now - 600,
        heartbeat=now - 10,
    )
    record = replace(record, **changes)  # type: ignore[arg-type]
    storage.write(LEASE, json.dumps(asdict(record)).encode())
    return record


def until(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


def test_a_lease_is_there_until_it_is_released(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "runs" / "x")
    with Lease.take(storage, "x") as lease:
        assert lease.before is None
        holder = last_holder(storage)
        assert holder is not None
        assert holder.pid == os.getpid()
        assert holder.is_alive()
        with pytest.raises(UserError, match=r"^run x: process \d+ on "):
            Lease.take(storage, "x")
    assert last_holder(storage) is None
    with Lease.take(storage, "x") as lease:
        assert lease.before is None


def test_a_second_driver_is_refused_by_name_and_takes_over_when_the_first_is_killed(
    tmp_path: Path, start: Callable[[], Driver]
) -> None:
    first = start()
    assert first.answer() == "ready"
    first.ask(tmp_path)
    assert first.answer() == "took"
    pid = first.process.pid
    with pytest.raises(UserError) as refusal:
        Lease.take(Storage(tmp_path), "scenes")
    message = str(refusal.value)
    assert message.startswith(f"run scenes: process {pid} on ")
    assert f"since {time.strftime('%Y-%m-%d')}" in message
    assert "last heard of 0 s ago" in message
    assert f"kill -INT {pid}" in message

    first.process.kill()
    # Not waited for: it stays as a zombie, whose number is not free.
    until(lambda: psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    began = time.monotonic()
    with Lease.take(Storage(tmp_path), "scenes") as lease:
        assert time.monotonic() - began < 1
        assert lease.before is not None
        assert lease.before.pid == pid


@pytest.mark.slow
def test_of_two_drivers_at_the_same_moment_one_wins(tmp_path: Path, start: Callable[[], Driver]) -> None:
    drivers = start(), start()
    assert [driver.answer() for driver in drivers] == ["ready", "ready"]
    for attempt in range(20):
        at = time.time() + 0.05
        for driver in drivers:
            driver.ask(tmp_path / str(attempt), at)
        answers = sorted(driver.answer().split()[0] for driver in drivers)
        assert answers == ["refused", "took"], f"attempt {attempt}"


def test_another_process_of_the_same_number_does_not_hold_the_lease(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    before = write(storage, started=psutil.Process().create_time() - 1000, heartbeat=time.time(), step=70, seconds=9.5)
    with Lease.take(storage, "x") as lease:
        assert lease.before == before


def test_a_driver_on_this_machine_holds_its_lease_however_long_it_was_not_heard_of(tmp_path: Path) -> None:
    write(Storage(tmp_path), heartbeat=time.time() - 1e5)
    with pytest.raises(UserError, match="last heard of 100000 s ago"):
        Lease.take(Storage(tmp_path), "x")


@pytest.mark.parametrize("age", [-20.0, 10.0, 55.0])
def test_a_driver_elsewhere_holds_its_lease_while_it_is_heard_of(tmp_path: Path, age: float) -> None:
    # By its number and start it would be this very process.
    write(Storage(tmp_path), pids="another machine", heartbeat=time.time() - age)
    with pytest.raises(
        UserError, match=rf"on spot-7 .*last heard of {max(0, age):.0f} s ago.* 60 s after.*\.lease\.json"
    ):
        Lease.take(Storage(tmp_path), "x")


def test_a_driver_elsewhere_is_dead_when_it_was_not_heard_of_for_long(tmp_path: Path) -> None:
    # Its number means nothing here.
    write(Storage(tmp_path), pids="another machine", heartbeat=time.time() - 61)
    with Lease.take(Storage(tmp_path), "x") as lease:
        assert lease.before is not None
        assert lease.before.host == "spot-7"


def test_a_driver_whose_lease_was_taken_knows_by_whom_and_leaves_it(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    lease = Lease.take(storage, "x")
    other = write(storage, pids="another machine", heartbeat=time.time())
    until(lambda: lease.lost is not None)
    assert lease.lost == other
    lease.release()
    assert last_holder(storage) == other


def test_a_heartbeat_says_how_far_the_run_is(tmp_path: Path) -> None:
    storage = Storage(tmp_path)

    def heard() -> Holder:
        holder = last_holder(storage)
        assert holder is not None
        return holder

    with Lease.take(storage, "x") as lease:
        first = heard()
        lease.note(70, 31.5)
        until(lambda: heard().step == 70)
        assert heard().seconds == 31.5
        assert heard().heartbeat > first.heartbeat
        assert replace(heard(), heartbeat=0, step=0, seconds=0) == replace(first, heartbeat=0)


@pytest.mark.slow
def test_a_storage_that_fails_for_seconds_does_not_end_a_lease(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, away = tmp_path / "run", tmp_path / "away"
    storage = Storage(folder)
    lease = Lease.take(storage, "x")
    folder.rename(away)
    folder.write_text("what is no folder can be written by nobody, root included")
    time.sleep(3)
    folder.unlink()
    away.rename(folder)
    back = time.time()
    until(lambda: (holder := last_holder(storage)) is not None and holder.heartbeat > back)
    assert lease.lost is None
    assert len([record for record in caplog.records if "cannot be renewed" in record.message]) == 1
    lease.release()
    assert last_holder(storage) is None


def test_a_folder_that_is_gone_is_not_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    lease = Lease.take(Storage(folder), "x")
    folder.rename(tmp_path / "removed")
    time.sleep(0.5)
    lease.release()
    assert not folder.exists()


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"owner": "a'])
def test_a_damaged_record_is_nobodys_and_is_mended(tmp_path: Path, content: bytes) -> None:
    storage = Storage(tmp_path)
    storage.write(LEASE, content)
    with Lease.take(storage, "x"):
        storage.write(LEASE, content)
        until(lambda: last_holder(storage) is not None)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/x/\.lease\.json: cannot be written"):
        Lease.take(Storage(tmp_path / "file" / "x"), "x")


def test_a_lease_ends_with_its_process_and_keeps_none_alive(tmp_path: Path) -> None:
    code = (
        "import sys; from mimiclab.lease import Lease; from mimiclab.storage import Storage;"
        "Lease.take(Storage(sys.argv[1]), 'x')"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=20)
    holder = last_holder(Storage(tmp_path))
    assert holder is not None
    assert not holder.is_alive()


# ---- on a store that speaks S3's protocol ----


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A URI's beginning and its options, of a bucket on a loopback server; `{}` is the folder's name."""
    with bucket_server("leases") as address:
        yield f"s3://leases/{{}}?scheme=http&endpoint_override={address}"


@pytest.mark.server
def test_on_a_store_one_of_two_drivers_wins_too(bucket: str, start: Callable[[], Driver]) -> None:
    drivers = start(), start()
    assert [driver.answer() for driver in drivers] == ["ready", "ready"]
    for attempt in range(5):
        at = time.time() + 0.05
        for driver in drivers:
            driver.ask(bucket.format(attempt), at)
        answers = sorted(driver.answer().split()[0] for driver in drivers)
        assert answers == ["refused", "took"], f"attempt {attempt}"
    storage = Storage(bucket.format(0))
    first = last_holder(storage)
    assert first is not None
    until(lambda: (holder := last_holder(storage)) is not None and holder.heartbeat > first.heartbeat)
    with pytest.raises(UserError, match=f"process {first.pid} on "):
        Lease.take(storage, "x")


@pytest.mark.server
def test_on_a_store_who_is_overwritten_by_a_late_driver_stops(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SETTLE_S", 0.2)
    monkeypatch.setattr(module, "REMOTE_HEARTBEAT_S", 0.2)
    storage = Storage(bucket.format("late"))
    lease = Lease.take(storage, "x")
    late = write(storage, owner="1" * 16)
    until(lambda: lease.lost == late)
    lease.release()
    assert last_holder(storage) == late


@pytest.mark.server
def test_on_a_store_a_dead_drivers_lease_is_taken_and_given_back(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SETTLE_S", 0.2)
    storage = Storage(bucket.format("dead"))
    before = write(storage, pids="another machine", heartbeat=time.time() - 90)
    with Lease.take(storage, "x") as lease:
        assert lease.before == before
    assert last_holder(storage) is None
