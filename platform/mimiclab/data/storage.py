"""A folder on any file system that pyarrow knows, local or remote: whole files in, whole files out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import unquote, urlsplit, urlunsplit

from pyarrow import fs

from mimiclab.errors import UserError

Result = TypeVar("Result")

# On top of what a store's own client does, which is much for S3's (about thirty connections in 6 s) and nothing for
# a network file system. What fails longer is for the user to see.
_ATTEMPTS = 3
_FIRST_PAUSE_S = 0.5
_CHUNK_BYTES = 8 << 20


class Storage:
    """A folder, given by its path or by a URI as `s3://bucket/path`, with options of pyarrow.fs in its query.

    Reading is tried again when it fails, with growing pauses. File systems are opened where they are first used,
    in every process anew: their connections do not survive a fork.

    Raises:
        UserError: The URI is none that pyarrow knows.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
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

    def where(self, name: str) -> str:
        """What messages call a file."""
        return f"{self.name}/{name}"

    def sizes(self) -> dict[str, int | None]:
        """Every file's size in bytes, by name, and None for a folder; empty where there is no such place."""
        system, folder = self._open()
        selector = fs.FileSelector(folder, allow_not_found=True)
        found = _persist(lambda: system.get_file_info(selector), self.name)
        return {info.base_name: info.size for info in found}

    def read(self, name: str) -> bytes:
        """A whole file.

        Raises:
            UserError: It is missing, or cannot be read.
        """

        def attempt() -> bytes:
            system, folder = self._open()
            with system.open_input_stream(f"{folder}/{name}") as file:
                content: bytes = file.read()
            return content

        return _persist(attempt, self.where(name))

    def download(self, name: str, file: BinaryIO) -> None:
        """Copy a file, however large, into one that is open here.

        Raises:
            UserError: It is missing, or cannot be read.
        """

        def attempt() -> None:
            file.seek(0)
            system, folder = self._open()
            with system.open_input_stream(f"{folder}/{name}") as stream:
                while chunk := stream.read(_CHUNK_BYTES):
                    file.write(chunk)

        _persist(attempt, self.where(name))

    def write(self, name: str, content: bytes | memoryview) -> None:
        """Put a whole file in one step: nobody sees half of it.

        Raises:
            UserError: It cannot be written.
        """
        try:
            if self.local is not None:
                self.local.mkdir(parents=True, exist_ok=True)
                # Of its own name for every process: the same file may be written twice at a time.
                aside = self.local / f".{name}-{os.getpid()}"
                aside.write_bytes(content)
                aside.replace(self.local / name)
                return
            system, folder = self._open()
            with system.open_output_stream(f"{folder}/{name}") as file:
                file.write(content)
        except OSError as error:
            raise UserError(f"{self.where(name)}: cannot be written: {error}") from error

    def delete(self, name: str) -> None:
        """Remove a file; one that is gone already is none to complain about."""
        system, folder = self._open()
        try:
            system.delete_file(f"{folder}/{name}")
        except FileNotFoundError:
            return
        except OSError as error:
            raise UserError(f"{self.where(name)}: cannot be removed: {error}") from error

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


def _persist(action: Callable[[], Result], where: str) -> Result:
    """Try an action several times.

    Raises:
        UserError: It failed each time, or found nothing there.
    """
    pause = _FIRST_PAUSE_S
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return action()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UserError(f"{where}: there is no such file") from error
        except PermissionError as error:
            raise UserError(f"{where}: cannot be read: {error}") from error
        except OSError as error:
            if attempt == _ATTEMPTS:
                raise UserError(f"{where}: cannot be read, tried {_ATTEMPTS} times: {error}") from error
        time.sleep(pause)
        pause *= 4
    raise AssertionError("unreachable")
