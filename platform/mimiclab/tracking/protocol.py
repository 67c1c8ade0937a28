"""What a training run tells a tracker, without saying which tracker it is."""

import json
import posixpath
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from PIL import Image

# What MLflow accepts as names; checked when logged, where the traceback still shows the mistake.
_METRIC_KEY = re.compile(r"[\w.\- :/]{1,250}")
_PICTURE_KEY = re.compile(r"[a-zA-Z0-9_\-./ ]{1,150}")
_FILE_NAME = _PICTURE_KEY


class Row(NamedTuple):
    """One value of one metric. ``json.dumps`` writes it as a list; ``Row(*fields)`` reads it back."""

    key: str
    value: float
    timestamp_ms: int
    step: int


class Table(NamedTuple):
    """Rows of values by column. MLflow compares runs by the first column of numbers."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | None]]

    def as_json(self) -> bytes:
        """As MLflow's pages read it."""
        return json.dumps({"columns": list(self.columns), "data": [list(row) for row in self.rows]}).encode()


Content = bytes | Callable[[], bytes]
"""Of a file: as it is, or made when it is its turn to be sent, away from training's thread."""

_MEASURED = ("images_per_s", "data_wait", "memory_mb", "gpu_memory_mb", "latency_ms")


def is_measured(key: str) -> bool:
    """Whether a series is of times and machines, which no two runs share, rather than of what was computed."""
    return key.startswith(("run/", "system/")) or key.rpartition("/")[2] in _MEASURED


class Tracker(Protocol):
    """The record of one logical run, across its restarts. Every method may be called from any thread.

    Keys name a series, with slashes for groups (``train/loss``). The steps of one series grow: a row at a
    step that its series has already reached is dropped, which is what keeps a resumed history exact.
    """

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Record the values of one step. Never blocks; rows that belong together go in one call.

        Raises:
            ValueError: The step is negative, or a key cannot be used.
        """
        ...

    def log_picture(self, key: str, step: int, image: Image.Image) -> None:
        """Record a picture of a step; the image may be changed afterwards."""
        ...

    def log_file(self, name: str, content: Content) -> None:
        """Store a file with the run, in place of an earlier one of that name; `name` may have folders in it."""
        ...

    def log_table(self, name: str, table: Table) -> None:
        """Store a table with the run, as `log_file` does; `name` ends with .json."""
        ...

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run, in place of earlier ones of those names."""
        ...

    def unsent(self) -> list[Row]:
        """The rows that the server has not acknowledged and `keep` did not put away, in order of steps.

        A checkpoint carries them.
        """
        ...

    def close(self, timeout_s: float) -> list[Row]:
        """Send what is left for at most ``timeout_s`` seconds and return what is `unsent` then."""
        ...

    def unsent_files(self) -> int:
        """How many files the server does not have: pictures, figures, tables, and what `keep` made of rows."""
        ...

    def keep(self) -> None:
        """Put what the server does not have where the next process finds it; waits for that.

        All but the newest rows, which are not worth a file. May be called from any thread.
        """
        ...


def make_rows(step: int, values: Mapping[str, float]) -> list[Row]:
    """The rows of one step, stamped with the present time.

    NaN and infinities are kept: a loss that diverged is part of the history. (MLflow stores NaN as
    such, infinities as the largest double.)

    Raises:
        ValueError: The step is negative, or a key cannot be used.
    """
    if step < 0:
        raise ValueError(f"step is {step}; expected >= 0")
    for key in values:
        if not _METRIC_KEY.fullmatch(key) or not _is_plain_path(key):
            raise ValueError(f"metric key {key!r}; expected letters, digits and any of '_-.: /'")
    now = time.time_ns() // 1_000_000
    return [Row(key, float(value), now, step) for key, value in values.items()]


def check_picture(key: str, step: int) -> None:
    """Refuse what MLflow would refuse later, in its own thread.

    Raises:
        ValueError: The step is negative or the key cannot be used.
    """
    if step < 0:
        raise ValueError(f"step is {step}; expected >= 0")
    if not _PICTURE_KEY.fullmatch(key) or not _is_plain_path(key):
        raise ValueError(f"picture key {key!r}; expected ASCII letters, digits and any of '_-. /'")


def check_file(name: str) -> None:
    """Refuse a name that does not do for a file everywhere.

    Raises:
        ValueError: It cannot be used.
    """
    if not _FILE_NAME.fullmatch(name) or not _is_plain_path(name):
        raise ValueError(f"file name {name!r}; expected ASCII letters, digits and any of '_-. /'")


def _is_plain_path(key: str) -> bool:
    return posixpath.normpath(key) == key and not key.startswith(("/", "."))


class MemoryTracker:
    """Keeps everything in memory: for runs that nobody looks at, and for tests of what is logged.

    Attributes:
        rows: The history, as a server would hold it.
        pictures: Images by (key, step).
        files: The content of each by its name, tables as JSON.
        tags: The run's.
    """

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.pictures: dict[tuple[str, int], Image.Image] = {}
        self.files: dict[str, bytes] = {}
        self.tags: dict[str, str] = {}
        self._last: dict[str, int] = {}
        self._lock = threading.Lock()

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker.log_metrics`."""
        rows = make_rows(step, values)
        with self._lock:
            self.rows += (row for row in rows if row.step > self._last.get(row.key, -1))
            self._last.update((row.key, max(row.step, self._last.get(row.key, -1))) for row in rows)

    def log_picture(self, key: str, step: int, image: Image.Image) -> None:
        """See `Tracker.log_picture`."""
        check_picture(key, step)
        self.pictures.setdefault((key, step), image.copy())

    def log_file(self, name: str, content: Content) -> None:
        """See `Tracker.log_file`."""
        check_file(name)
        self.files[name] = content if isinstance(content, bytes) else content()

    def log_table(self, name: str, table: Table) -> None:
        """See `Tracker.log_table`."""
        self.log_file(name, table.as_json())

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """See `Tracker.set_tags`."""
        self.tags.update(tags)

    def unsent(self) -> list[Row]:
        """Nothing: memory acknowledges at once."""
        return []

    def close(self, timeout_s: float) -> list[Row]:
        """Nothing is left to send."""
        return []

    def unsent_files(self) -> int:
        """None."""
        return 0

    def keep(self) -> None:
        """Nothing: all that there is is here."""

    def history(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of one series, in order."""
        return [(row.step, row.value) for row in self.rows if row.key == key]
