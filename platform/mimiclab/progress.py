"""What a run tells the person who waits for it.

Rank 0 appends events to a file in the run's folder; the driver follows that file. Ray's own forwarding of
workers' output mixes all processes' noise, and this file also stays behind as the run's log.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

Event = dict[str, Any]

# On a terminal the bar moves with every event; elsewhere a line is printed about so often.
_SECONDS_PER_LINE = 15.0


class ProgressWriter:
    """Appends events, a JSON object per line."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", buffering=1)

    def write(self, kind: str, **fields: Any) -> None:
        """Record an event of a kind with its fields."""
        self._file.write(json.dumps({"kind": kind, "time": time.time(), **fields}) + "\n")


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

    def show(self, event: Mapping[str, Any]) -> None:
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
        else:
            self._console.print(event["text"], highlight=False)

    def _show_step(self, event: Mapping[str, Any]) -> None:
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
