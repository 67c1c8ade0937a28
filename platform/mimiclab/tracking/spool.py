"""Pictures and files on their way to the tracking server, and where they are kept while it does not take them."""

import io
import logging
import threading
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from PIL import Image

from mimiclab.errors import UserError
from mimiclab.tracking.protocol import Content

if TYPE_CHECKING:
    from mimiclab.storage import Storage

_log = logging.getLogger(__name__)

# Two threads may want the same figure.
_making = threading.Lock()


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture of a step."""

    key: str
    step: int
    image: Image.Image
    timestamp_ms: int

    @property
    def id(self) -> str:
        """What it is stored as: no slash, and "+" between its parts, which no key may hold."""
        return f"picture+{_flat(self.key)}+{self.step}+{self.timestamp_ms}"

    def read(self) -> bytes:
        """As PNG."""
        buffer = io.BytesIO()
        self.image.save(buffer, "PNG")
        return buffer.getvalue()


@dataclass(frozen=True, eq=False)
class File:
    """A file by its name among the run's artifacts."""

    name: str
    content: Content
    is_table: bool = False

    @property
    def id(self) -> str:
        """What it is stored as."""
        return f"{'table' if self.is_table else 'file'}+{_flat(self.name)}"

    def read(self) -> bytes:
        """Its content, made once where it has to be."""
        with _making:
            return self._made

    @cached_property
    def _made(self) -> bytes:
        return self.content if isinstance(self.content, bytes) else self.content()


Item = Picture | File


class Spool:
    """A folder of items, one file each; without a folder nothing is kept. What it cannot do it warns of."""

    def __init__(self, folder: "Storage | None") -> None:
        self._folder = folder
        self._kept: dict[str, Item | None] = {}

    def items(self) -> list[Item]:
        """What an earlier process has left."""
        if self._folder is None:
            return []
        try:
            names = sorted(name for name in self._folder.sizes() if not name.startswith("."))
        except UserError as error:
            _log.warning("%s", error)
            return []
        found: list[Item] = []
        for name in names:
            try:
                item = _parsed(name, self._folder.read(name))
            except (UserError, OSError, ValueError, SyntaxError) as error:  # the last three: nothing that was kept here
                _log.warning("%s: %s", name, error)
                continue
            self._kept[name] = item
            found.append(item)
        return found

    def add(self, item: Item) -> None:
        """Keep an item, in place of an earlier one of its id."""
        if self._folder is None or self._kept.get(item.id) is item:
            return
        try:
            self._folder.write(item.id, item.read())
            self._kept[item.id] = item
        except Exception as error:  # the store's, or a picture that cannot be drawn
            _log.warning("%s could not be kept: %s", item.id, error)

    def remove(self, item: Item) -> None:
        """Keep nothing of this id."""
        if self._folder is None or item.id not in self._kept:
            return
        try:
            self._folder.delete(item.id)
            del self._kept[item.id]
        except UserError as error:
            _log.warning("%s", error)


def _parsed(stored: str, content: bytes) -> Item:
    kind, name, *rest = stored.split("+")
    if kind == "picture":
        step, timestamp_ms = map(int, rest)
        return Picture(name.replace("~", "/"), step, Image.open(io.BytesIO(content)).convert("RGB"), timestamp_ms)
    return File(name.replace("~", "/"), content, is_table=kind == "table")


def _flat(name: str) -> str:
    return name.replace("/", "~")
