"""What a machine keeps of remote data sets: each file fetched once, whoever on the machine asks."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mimiclab.data.manifest import File
from mimiclab.errors import UserError
from mimiclab.storage import Storage


def default_folder() -> Path:
    """Where a machine keeps its files unless an experiment says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mimiclab" / "shards"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock that is the file at `path`; others, in this process too, wait for it."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:  # closing is not enough: a process that was forked meanwhile has the file open, too
            fcntl.flock(file, fcntl.LOCK_UN)


@dataclass(frozen=True)
class NodeCache:
    """A folder of this machine that holds files by their checksum, so that equal ones are there once.

    Attributes:
        folder: Made when missing.
        max_bytes: Beyond it the files that were fetched or asked for longest ago are removed; None keeps all. The
            newest is always kept, and a file that is removed stays readable for those who have it open.
    """

    folder: Path
    max_bytes: int | None = None

    def open(self, storage: Storage, file: File) -> io.FileIO:
        """The local copy of a file; the first who asks fetches it, and all others wait for it.

        Raises:
            UserError: It cannot be read or written, or is not what its set's manifest says.
        """
        try:
            copy = self._kept(file)
            if copy is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                with locked(self.folder / f".{file.sha256}.lock"):
                    copy = self._kept(file) or self._fetch(storage, file)
            now = time.time_ns()  # the kernel's own stamp is milliseconds coarse
            with contextlib.suppress(PermissionError):  # another user's copy is as good
                os.utime(copy.fileno(), ns=(now, now))
        except OSError as error:
            raise UserError(
                f"data.cache: {self.folder} cannot keep a copy of {storage.where(file.name)}: {error}"
            ) from error
        return copy

    def drop(self, file: File) -> Path:
        """Remove a copy whose content turned out to be damaged; returns where it was."""
        target = self._target(file)
        with contextlib.suppress(OSError):
            target.unlink()
        return target

    def _target(self, file: File) -> Path:
        return self.folder / f"{file.sha256}{Path(file.name).suffix}"

    def _kept(self, file: File) -> io.FileIO | None:
        """The copy if there is one, and not the half that a power cut may leave."""
        try:
            copy = io.FileIO(self._target(file))
        except FileNotFoundError:
            return None
        if os.fstat(copy.fileno()).st_size == file.bytes:
            return copy
        copy.close()
        return None

    def _fetch(self, storage: Storage, file: File) -> io.FileIO:
        # The lock is held: there is one writer, who replaces what a killed one has left.
        target = self._target(file)
        aside = target.with_name(f".{target.name}.part")
        try:
            with aside.open("w+b") as copy:
                # A full disk shows here, and not as a file that cannot be read.
                os.posix_fallocate(copy.fileno(), 0, file.bytes)
                storage.download(file.name, copy)
                copy.seek(0)
                found = hashlib.file_digest(copy, "sha256").hexdigest()
            if found != file.sha256:
                raise UserError(
                    f"{storage.where(file.name)}: its checksum is {found}, the set's manifest says {file.sha256}; it "
                    "is damaged or was changed, expected the set to be packed again"
                )
            opened = io.FileIO(aside)  # before others see it: they may remove it to make room for theirs
            aside.replace(target)
        finally:
            aside.unlink(missing_ok=True)
        self._make_room(target)
        return opened

    def _make_room(self, newest: Path) -> None:
        if self.max_bytes is None:
            return
        stats = []
        for path in self.folder.iterdir():
            if not path.name.startswith("."):
                try:
                    stats.append((path.stat(), path))
                except FileNotFoundError:  # another process makes room, too
                    continue
        total = sum(stat.st_size for stat, _ in stats)
        for stat, path in sorted(stats, key=lambda item: item[0].st_mtime_ns):
            if total <= self.max_bytes:
                break
            if path != newest:
                path.unlink(missing_ok=True)
                total -= stat.st_size
