"""What a run tells the person who waits for it.

The driver shows what its workers tell, see inbox.py, and leaves it in the run's folder as its log.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from mimiclab.errors import UserError
from mimiclab.inbox import Event
from mimiclab.storage import MissingError, Storage

# On a terminal the bar moves with every event; elsewhere a line is printed about so often.
_SECONDS_PER_LINE = 15.0
# How often the log of a run in a bucket, where nothing can be appended, is written anew.
_REMOTE_LOG_S = 30.0

PROGRESS = "progress.jsonl"
"""Name of the file in a run's folder."""


class ProgressLog:
    """The events of a run, a JSON object per line of a file in its folder; those of earlier drivers stay."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._lines: list[str] = []
        self._file: TextIO | None = None
        self._written = time.monotonic()
        if storage.local is not None:
            self._file = (storage.local / PROGRESS).open("a", buffering=1)
        else:
            with contextlib.suppress(MissingError):
                self._lines.append(storage.read(PROGRESS).decode())

    def write(self, event: Event) -> None:
        """Add an event."""
        if self._file is None and event["kind"] == "step":
            return  # all is written anew each time, and MLflow has them
        line = json.dumps(event) + "\n"
        if self._file is not None:
            with contextlib.suppress(OSError):  # as below
                self._file.write(line)
            return
        self._lines.append(line)
        if time.monotonic() - self._written > _REMOTE_LOG_S:
            self._put()

    def close(self) -> None:
        """Write what is left."""
        if self._file is None:
            self._put()
            return
        with contextlib.suppress(OSError):
            self._file.close()

    def _put(self) -> None:
        self._written = time.monotonic()
        try:
            self._storage.write(PROGRESS, "".join(self._lines).encode())
        except UserError:  # a log is no reason to end a run; the next time has it all
            return


class ProgressReader:
    """Follows events from the present end of the file on."""

    def __init__(self, path: Path) -> None:
        path.touch()
        self._file = path.open()
        self._file.seek(0, 2)

    def new_events(self) -> Iterator[Event]:
        """The events that were completed since the last call."""
        while True:
            start = self._file.tell()
            line = self._file.readline()
            if not line.endswith("\n"):  # nothing, or a line that is being written
                self._file.seek(start)
                return
            try:
                event = json.loads(line)
            except ValueError:  # a killed writer's half line, and what the next writer put behind it
                continue
            yield event


class ProgressView:
    """Shows events: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last_line = float("-inf")
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> ProgressView:
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self._console)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, event: Event) -> None:
        """Show one event."""
        kind = event["kind"]
        if kind == "step":
            self._show_step(event)
        elif kind == "evaluation":
            metrics = event["metrics"]
            parts = [
                f"{head} AP {metrics[f'{head}/AP']:.3f} AP50 {metrics[f'{head}/AP50']:.3f}"
                for head in ("student", "teacher")
                if f"{head}/AP" in metrics
            ]
            self._console.print(f"epoch {event['epoch']:g}: {', '.join(parts)}", highlight=False)
        elif kind == "text":
            self.say(event["text"])

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, highlight=False, markup=False)

    def _show_step(self, event: Event) -> None:
        text = (
            f"step {event['step']}/{event['num_steps']}  loss {event['loss']:.3f}  {event['images_per_s']:.1f} images/s"
        )
        if self._bar is not None:
            if self._task is None:
                self._task = self._bar.add_task(text, total=event["num_steps"])
            self._bar.update(self._task, completed=event["step"], description=text)
        elif time.monotonic() - self._last_line >= _SECONDS_PER_LINE or event["step"] == event["num_steps"]:
            self._last_line = time.monotonic()
            self._console.print(text, highlight=False)
