"""Pictures and files on their way to the tracking server, and where they are kept while it does not take them."""

import io
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from PIL import Image

from mimiclab.errors import UserError
from mimiclab.tracking.backlog import PAGE
from mimiclab.tracking.protocol import Content

if TYPE_CHECKING:
    from mimiclab.storage import Storage

_log = logging.getLogger(__name__)

# Two threads may want the same figure.
_making = threading.Lock()


@dataclass(eq=False)
class Picture:
    """A picture of a step: as it was drawn, until it is kept."""

    key: str
    step: int
    content: Image.Image | Callable[[], bytes]
    timestamp_ms: int
    is_kept: bool = False

    @property
    def id(self) -> str:
        """What it is stored as: no slash, and "+" between its parts, which no key may hold."""
        return f"picture+{_flat(self.key)}+{self.step}+{self.timestamp_ms}"

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"picture {self.key} of step {self.step}"

    def image(self) -> Image.Image:
        """As pixels; from the folder, where it is kept."""
        content = self.content
        return content if isinstance(content, Image.Image) else Image.open(io.BytesIO(content())).convert("RGB")

    def read(self) -> bytes:
        """As PNG."""
        buffer = io.BytesIO()
        self.image().save(buffer, "PNG")
        return buffer.getvalue()


@dataclass(eq=False)
class File:
    """A file by its name among the run's artifacts."""

    name: str
    content: Content
    is_table: bool = False
    is_kept: bool = False

    @property
    def id(self) -> str:
        """What it is stored as."""
        return f"{'table' if self.is_table else 'file'}+{_flat(self.name)}"

    def read(self) -> bytes:
        """Its content, made once where it has to be; from the folder, where it is kept."""
        with _making:
            content = self.content if isinstance(self.content, bytes) else self.content()
            if not self.is_kept:
                self.content = content
            return content


Item = Picture | File


class Spool:
    """A folder of items, one file each; without a folder nothing is kept. What it cannot do it warns of.

    An item that is kept leaves memory: an outage may last for days.
    """

    def __init__(self, folder: "Storage | None") -> None:
        self._folder = folder
        self._kept: set[str] = set()
        self._changing = threading.Lock()

    def items(self) -> list[Item]:
        """What an earlier process has left; read when it is sent."""
        if self._folder is None:
            return []
        try:
            names = sorted(name for name in self._folder.sizes() if not name.startswith((".", f"{PAGE}+")))
        except UserError as error:
            _log.warning("%s", error)
            return []
        found: list[Item] = []
        for name in names:
            try:
                found.append(_parsed(name, partial(self._folder.read, name)))
            except ValueError as error:  # nothing that was kept here
                _log.warning("%s: %s", name, error)
            else:
                self._kept.add(name)
        return found

    def add(self, item: Item) -> None:
        """Keep an item, in place of an earlier one of its id."""
        if self._folder is None or item.is_kept:
            return
        try:
            content = item.read()
            with self._changing:
                self._folder.write(item.id, content)
                self._kept.add(item.id)
        except Exception as error:  # the store's, or a picture that cannot be drawn
            _log.warning("%s could not be kept: %s", item.id, error)
            return
        with _making:
            item.is_kept, item.content = True, partial(self._folder.read, item.id)

    def remove(self, item: Item, waits: Callable[[], bool]) -> None:
        """Keep nothing of this id, unless an item of it, by now a newer one, `waits`."""
        with self._changing:
            if self._folder is None or item.id not in self._kept or waits():
                return
            try:
                self._folder.delete(item.id)
                self._kept.discard(item.id)
            except UserError as error:
                _log.warning("%s", error)


def _parsed(stored: str, read: Callable[[], bytes]) -> Item:
    kind, name, *rest = stored.split("+")
    if kind == "picture":
        step, timestamp_ms = map(int, rest)
        return Picture(name.replace("~", "/"), step, read, timestamp_ms, is_kept=True)
    return File(name.replace("~", "/"), read, is_table=kind == "table", is_kept=True)


def _flat(name: str) -> str:
    return name.replace("/", "~")
