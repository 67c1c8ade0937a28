"""Rows on their way to the tracking server, oldest first: a bounded number in memory, older ones in pages of a folder.

A page is written once and read when it is its turn, so that an outage costs neither memory nor checkpoints more the
longer it lasts. What keeps the history exact: pages hold the oldest rows without a gap, those in memory follow, and a
page is removed only when the server has all of it. So a process that goes on from any checkpoint, with the rows that
it carries, sends all pages first: what is in none of them any more, the server has.
"""

import bisect
import json
import logging
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mimiclab.tracking.protocol import Row

if TYPE_CHECKING:
    from mimiclab.storage import Storage

PAGE = "rows"
"""What names of pages begin with; "+" and a number that grows follow."""

_PAGE_ROWS = 10_000
_CALL_ROWS = 1000

_log = logging.getLogger(__name__)


class Backlog:
    """Rows that wait; any thread may add or keep, one takes.

    Args:
        folder: Of the pages; without one all rows stay in memory.
        rows: That a checkpoint carried.
    """

    def __init__(self, folder: "Storage | None", rows: Sequence[Row]) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._keeping = threading.Lock()
        self._waiting = sorted(rows, key=_step)
        self._taken: list[Row] = []
        # None before an earlier process's are known: until then no row may leave, and none get a number.
        self._pages: list[str] | None = None
        self._number = 0
        self._page: list[Row] | None = None
        """What is left of the first page, once it is read."""

    def open(self) -> None:
        """Find the pages that an earlier process has left; before all else that the thread which takes does.

        Raises:
            UserError: The folder cannot be read.
        """
        if self._pages is None:
            names = self._folder.sizes() if self._folder is not None else ()
            pages = sorted(name for name in names if name.startswith(f"{PAGE}+"))
            self._number = int(pages[-1].partition("+")[2]) if pages else 0
            self._pages = pages

    def add(self, rows: Sequence[Row]) -> None:
        """Append rows of one step."""
        with self._lock:
            for row in rows:
                bisect.insort_right(self._waiting, row, key=_step)

    def in_memory(self) -> list[Row]:
        """The rows that the server has not acknowledged and no page holds, in order of steps."""
        with self._lock:
            return self._taken + self._waiting

    def num_pages(self) -> int:
        """How many pages there are."""
        return len(self._pages or ())

    def keep(self) -> None:
        """Put whole pages where the next process finds them; what the folder does not take stays in memory."""
        if self._folder is None:
            return
        with self._keeping:
            while rows := self._full_page():
                name = f"{PAGE}+{self._number + 1:08}"
                try:
                    self._folder.write(name, json.dumps(rows).encode())
                except Exception as error:  # the store's: no later page may be written before this one
                    _log.warning("%s could not be kept: %s", name, error)
                    return
                self._number += 1
                kept = set(map(id, rows))
                with self._lock:  # meanwhile some may have been sent: the page holds them once more, which is no harm
                    self._taken = [row for row in self._taken if id(row) not in kept]
                    self._waiting = [row for row in self._waiting if id(row) not in kept]
                    assert self._pages is not None
                    self._pages.append(name)

    def take(self) -> list[Row]:
        """The oldest rows, as many whole steps as one call holds; the same again until they are `acknowledged`.

        Raises:
            UserError: A page cannot be read; no later row may leave before it.
        """
        while True:
            with self._lock:
                name = self._pages[0] if self._pages else None
                if name is None:
                    if not self._taken:
                        end = end_of_steps(self._waiting, _CALL_ROWS)
                        self._taken = self._waiting[:end]
                        del self._waiting[:end]
                    return list(self._taken)
            if self._page is None:
                self._page = self._read(name)
            if self._page:
                return self._page[: end_of_steps(self._page, _CALL_ROWS)]
            self._drop_page()

    def acknowledged(self, rows: Sequence[Row]) -> None:
        """The server has what `take` gave last."""
        if self._page is None:
            with self._lock:
                self._taken = []
            return
        del self._page[: len(rows)]
        if not self._page:
            name = self._drop_page()
            assert self._folder is not None
            try:
                self._folder.delete(name)
            except Exception as error:  # the next process finds that the server has it all
                _log.warning("%s", error)

    def _full_page(self) -> list[Row]:
        with self._lock:
            if self._pages is None or len(self._taken) + len(self._waiting) < _PAGE_ROWS:
                return []
            rows = self._taken + self._waiting
        return rows[: end_of_steps(rows, _PAGE_ROWS)]

    def _drop_page(self) -> str:
        self._page = None
        with self._lock:
            assert self._pages is not None
            return self._pages.pop(0)

    def _read(self, name: str) -> list[Row]:
        from mimiclab.storage import MissingError

        assert self._folder is not None
        try:
            return [Row(*fields) for fields in json.loads(self._folder.read(name))]
        except (MissingError, ValueError, TypeError) as error:  # nothing that a second try would mend
            _log.warning("%s holds no metric values: %s", name, error)
            return []


def end_of_steps(rows: Sequence[Row], most: int) -> int:
    """How many of the first rows are at most so many without splitting a step; ``rows`` are in order of steps."""
    if len(rows) <= most:
        return len(rows)
    end = bisect.bisect_left(rows, rows[most].step, key=_step)
    return end or most  # an evaluation with hundreds of classes: each series is still whole


def _step(row: Row) -> int:
    return row.step
