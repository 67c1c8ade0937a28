"""Show how far a long piece of work is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_SECONDS_PER_LINE = 15.0


@contextmanager
def watch(console: Console, title: str, total: int | None = None) -> Iterator[Callable[[int], object]]:
    """Show a bar on a terminal, a line now and then elsewhere; the bar goes when the work is done.

    Args:
        console: Where to.
        title: What is done.
        total: How many there are to do; None where nobody can tell.

    Yields:
        A function that takes how many more are done.
    """
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(title, total=total)
            yield lambda num: bar.advance(task, num)
        return
    done, last_line = 0, time.monotonic()

    def advance(num: int) -> None:
        nonlocal done, last_line
        done += num
        if time.monotonic() - last_line >= _SECONDS_PER_LINE:
            last_line = time.monotonic()
            console.print(f"{title}: {done} of {total}", highlight=False)

    yield advance
