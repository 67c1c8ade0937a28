"""A folder on any file system that pyarrow knows, local or remote: whole files in, whole files out."""

from __future__ import annotations

import contextlib
import copy
import errno
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from pyarrow import fs

from mimiclab.errors import UserError

Result = TypeVar("Result")

# On top of what a store's own client does, which is much for S3's (about thirty connections in 6 s) and nothing for
# a network file system. What fails longer is for the user to see.
_ATTEMPTS = 3
_FIRST_PAUSE_S = 0.5
_CHUNK_BYTES = 8 << 20
# What a few seconds do not mend.
_LASTING = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EEXIST}
_ABSENT = (FileNotFoundError, NotADirectoryError)


class StoreError(UserError):
    """A store did not do what it was asked to; it may the next time."""


class MissingError(UserError):
    """There is no such file; every other error of a read means that nobody knows."""


class Storage:
    """A folder, given by its path or by a URI as `s3://bucket/path`, with options of pyarrow.fs in its query.

    What fails is tried again, with growing pauses, unless trying cannot help. File systems are opened where they are
    first used, in every process anew: their connections do not survive a fork.

    Raises:
        UserError: The URI is none that pyarrow knows.
    """

    def __init__(self, uri: str | Path) -> None:
        self.uri = uri = str(uri)
        self._opened: tuple[int, Any, str] | None = None
        parts = urlsplit(uri) if "://" in uri else None
        if parts is None or parts.scheme == "file":
            self.local: Path | None = Path(unquote(parts.path) if parts else uri).absolute()
            self.name = str(self.local) if parts else uri.rstrip("/")
        else:
            self.local = None
            host = parts.netloc.rpartition("@")[2]  # no credentials in messages
            self.name = urlunsplit((parts.scheme, host, parts.path.rstrip("/"), "", ""))
        self._open()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def __truediv__(self, name: str) -> Storage:
        """A folder in this one, there or not, over the same connections."""
        folder = copy.copy(self)
        folder.name = self.where(name)
        if self.local is not None:
            folder.local = self.local / name
            folder.uri = str(folder.local)
        else:
            parts = urlsplit(self.uri)
            folder.uri = urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}"))
        if self._opened is not None:
            process, system, path = self._opened
            folder._opened = process, system, f"{path}/{name}"
        return folder

    def where(self, name: str) -> str:
        """What messages call a file."""
        return f"{self.name}/{name}"

    def sizes(self) -> dict[str, int | None]:
        """Every file's size in bytes, by name, and None for a folder; empty where there is no such place.

        Raises:
            UserError: It cannot be read.
        """
        system, folder = self._open()
        selector = fs.FileSelector(folder, allow_not_found=True)
        found = _persist(lambda: system.get_file_info(selector), self.name)
        return {info.base_name: info.size for info in found}

    def folders(self) -> list[str]:
        """Names of the folders in this one, in no order; none where there is no such place.

        Raises:
            UserError: It cannot be read.
        """
        return [name for name, size in self.sizes().items() if size is None]

    def read(self, name: str) -> bytes:
        """A whole file.

        Raises:
            MissingError: There is none.
            UserError: It cannot be read.
        """

        def attempt() -> bytes:
            system, folder = self._open()
            with system.open_input_stream(f"{folder}/{name}") as file:
                content: bytes = file.read()
            return content

        return _persist(attempt, self.where(name))

    def sha256(self, name: str) -> str:
        """The checksum of a file, however large, in hex digits.

        Raises:
            MissingError: There is none.
            UserError: It cannot be read.
        """

        def attempt() -> str:
            digest = hashlib.sha256()
            for chunk in self._chunks(name):
                digest.update(chunk)
            return digest.hexdigest()

        return _persist(attempt, self.where(name))

    def download(self, name: str, file: BinaryIO) -> None:
        """Copy a file, however large, into one that is open here.

        Raises:
            MissingError: There is none.
            UserError: It cannot be read.
        """

        def attempt() -> None:
            file.seek(0)
            for chunk in self._chunks(name):
                file.write(chunk)

        _persist(attempt, self.where(name))

    def write(self, name: str, content: bytes | memoryview) -> None:
        """Put a whole file in one step: nobody sees half of it.

        Raises:
            UserError: It cannot be written.
        """

        def attempt() -> None:
            if self.local is None:
                system, folder = self._open()
                with system.open_output_stream(f"{folder}/{name}") as file:
                    file.write(content)
                return
            self.local.mkdir(parents=True, exist_ok=True)
            # Of its own name for every writer: the same file may be written twice at a time.
            aside = self.local / f".{name}-{secrets.token_hex(4)}"
            try:
                _write_through(aside, content)
                aside.replace(self.local / name)
            finally:
                aside.unlink(missing_ok=True)
            _sync(self.local)

        _persist(attempt, self.where(name), "written")

    def write_folder(self, name: str, files: Mapping[str, bytes]) -> None:
        """Put a folder of files, in the place of one of that name: who finds the last file finds them all.

        Local disks show the whole folder at once. Other stores cannot rename: there the last file makes it one.

        Raises:
            UserError: It cannot be written; what has come of it has no last file.
        """
        if self.local is not None:
            target = self.local / name
            _persist(lambda: _rename_into_place(target, files), self.where(name), "written")
            return
        folder = self / name
        folder.delete(list(files)[-1])
        for file, content in files.items():
            folder.write(file, content)

    def delete(self, name: str) -> None:
        """Remove a file; one that is gone already is none to complain about.

        Raises:
            UserError: It cannot be removed.
        """
        system, folder = self._open()
        _persist(lambda: _unless_gone(system.delete_file, f"{folder}/{name}"), self.where(name), "removed")

    def delete_folder(self, name: str) -> None:
        """Remove a folder and all that it holds; one that is gone already is none to complain about.

        Raises:
            UserError: It cannot be removed.
        """
        system, folder = self._open()
        _persist(lambda: _unless_gone(system.delete_dir, f"{folder}/{name}"), self.where(name), "removed")

    def _chunks(self, name: str) -> Iterator[bytes]:
        system, folder = self._open()
        with system.open_input_stream(f"{folder}/{name}") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                yield chunk

    def _open(self) -> tuple[Any, str]:
        if self._opened is None or self._opened[0] != os.getpid():
            try:
                system, folder = fs.LocalFileSystem(), str(self.local)
                if self.local is None:
                    system, folder = fs.FileSystem.from_uri(self.uri)
            except (ValueError, OSError) as error:  # pyarrow's own errors are among these
                raise UserError(f"{self.name}: cannot be opened as a folder or URI: {error}") from error
            self._opened = os.getpid(), system, folder.rstrip("/")
        return self._opened[1:]


Place = Storage | Path | str
"""What names a folder: itself, its path, or its URI."""


def storage_at(place: Place) -> Storage:
    """The folder that a path or URI names.

    Raises:
        UserError: see `Storage`.
    """
    return place if isinstance(place, Storage) else Storage(place)


def _rename_into_place(target: Path, files: Mapping[str, bytes]) -> None:
    """Write a folder under a hidden name and rename it, all of it on the disk before it has its own name."""
    token = secrets.token_hex(4)
    aside, before = (target.with_name(f".{target.name}-{token}{end}") for end in ("", "-before"))
    aside.mkdir(parents=True)
    try:
        for name, content in files.items():
            _write_through(aside / name, content)
        _sync(aside)
        with contextlib.suppress(FileNotFoundError):
            target.rename(before)
        aside.rename(target)
        _sync(target.parent)
        shutil.rmtree(before, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_through(path: Path, content: bytes | memoryview) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unless_gone(remove: Callable[[str], object], path: str) -> None:
    with contextlib.suppress(*_ABSENT):
        remove(path)


def _persist(action: Callable[[], Result], where: str, done: str = "read") -> Result:
    """Try an action several times.

    Args:
        action: What may raise OSError.
        where: What messages call its object.
        done: What messages say it cannot be.

    Raises:
        MissingError: There is nothing to read.
        StoreError: It failed each time, or in a way that lasts.
    """
    pause = _FIRST_PAUSE_S
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return action()
        except _ABSENT as error:
            if done == "read":
                raise MissingError(f"{where}: there is no such file") from error
            raise StoreError(f"{where}: cannot be {done}: {error}") from error
        except OSError as error:
            if error.errno in _LASTING:
                raise StoreError(f"{where}: cannot be {done}: {error}") from error
            if attempt == _ATTEMPTS:
                raise StoreError(f"{where}: cannot be {done}, tried {_ATTEMPTS} times: {error}") from error
        time.sleep(pause)
        pause *= 4
    raise AssertionError("unreachable")
