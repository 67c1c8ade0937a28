"""A folder anywhere: what is written is whole, and a read that fails is not one that finds nothing."""

import pickle
import resource
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mimiclab import storage as storage_module
from mimiclab.errors import UserError
from mimiclab.storage import MissingError, Storage, storage_at


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "_FIRST_PAUSE_S", 0.01)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder that takes files of 100 kB, and none of 4 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode == 0:
        yield place
        subprocess.run(["umount", str(place)], check=True)
        return
    # Without the right to mount: a limit on the size of files, which fails a write at the same place.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, before[1]))
    yield place
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_path_and_its_uri_name_the_same_folder(tmp_path: Path) -> None:
    folder = tmp_path / "größe, 100 %"
    for place in (folder, str(folder), folder.as_uri(), Storage(folder)):
        storage = storage_at(place)
        assert storage.local == folder
        assert storage.name == str(folder)


def test_a_folder_in_a_folder_is_written_and_listed(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    inner = storage / "a 1" / "b"
    assert inner.sizes() == {}
    inner.write("file", b"12345")
    storage.write("other", b"")
    assert (tmp_path / "a 1" / "b" / "file").read_bytes() == b"12345"
    assert inner.where("file") == f"{tmp_path}/a 1/b/file"
    assert inner.sizes() == {"file": 5}
    assert storage.folders() == ["a 1"]
    assert storage.sizes() == {"a 1": None, "other": 0}
    storage.delete_folder("a 1")
    assert names(tmp_path) == ["other"]
    storage.delete_folder("a 1")  # gone already
    storage.delete("a 1/b/file")


def test_a_folder_of_a_uri_keeps_its_options_and_hides_its_credentials() -> None:
    storage = Storage("s3://me:secret@bucket/a/b?region=eu-west-1&endpoint_override=127.0.0.1:1&scheme=http")
    inner = storage / "ü %"
    assert storage.where("x") == "s3://bucket/a/b/x"
    assert inner.where("x") == "s3://bucket/a/b/ü %/x"
    again = pickle.loads(pickle.dumps(inner))
    assert again.name == inner.name
    assert again.uri == (
        "s3://me:secret@bucket/a/b/%C3%BC%20%25?region=eu-west-1&endpoint_override=127.0.0.1:1&scheme=http"
    )
    assert again._open()[1] == inner._open()[1] == "bucket/a/b/ü %"


def test_what_is_missing_is_not_what_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    storage = Storage(tmp_path)
    for read in (storage.read, storage.sha256):
        with pytest.raises(MissingError, match="nothing: there is no such file"):
            read("nothing")
        with pytest.raises(UserError, match="folder: cannot be read, tried 3 times") as caught:
            read("folder")
        assert not isinstance(caught.value, MissingError)


def test_a_checksum_is_that_of_the_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "_CHUNK_BYTES", 2)
    (tmp_path / "x").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert Storage(tmp_path).sha256("x") == expected


def test_a_folder_takes_the_place_of_one_of_its_name(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "new")
    storage.write_folder("x", {"a": b"1", "b": b"2", "last": b""})
    storage.write_folder("x", {"a": b"3", "last": b""})
    assert names(tmp_path / "new") == ["x"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "new" / "x").iterdir()} == {"a": b"3", "last": b""}


def test_a_full_disk_is_named_and_keeps_what_it_has(small_disk: Path) -> None:
    storage = Storage(small_disk)
    storage.write("file", b"before")
    storage.write_folder("folder", {"a": b"before"})
    large = bytes(4 << 20)
    with pytest.raises(UserError, match=rf"^{small_disk}/file: cannot be written: \[Errno") as caught:
        storage.write("file", large)
    assert not isinstance(caught.value, MissingError)
    with pytest.raises(UserError, match=rf"^{small_disk}/folder: cannot be written: \[Errno"):
        storage.write_folder("folder", {"a": b"after", "b": large})
    assert storage.read("file") == b"before"
    assert (storage / "folder").sizes() == {"a": 6}
    assert names(small_disk) == ["file", "folder"]
    storage.write("file", b"there is room for this")


def test_a_place_that_takes_no_files_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        storage = Storage(place)
        with pytest.raises(UserError, match=f"^{place}/x: cannot be written: "):
            storage.write("x", b"")
        with pytest.raises(UserError, match=f"^{place}/x: cannot be written: "):
            storage.write_folder("x", {"a": b""})
    with pytest.raises(UserError, match=f"^{tmp_path}/file: cannot be removed, tried 3 times: "):
        Storage(tmp_path).delete_folder("file")
    assert names(tmp_path) == ["file"]
