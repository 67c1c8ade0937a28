"""What a search tells the person who waits for it: a table that lives on a terminal, plain lines elsewhere."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Iterable

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mimiclab.search.budget import unit
from mimiclab.search.record import Record
from mimiclab.search.story import SearchStory, TrialStory, tell

_PER_SECOND = 2
_BAR = 10
# Lines of a terminal that are not rows: the title and the header, what is waiting, and room to breathe.
_OTHER_LINES = 6
_STYLES = {"running": "bold", "finished": "green", "failed": "red", "preempted": "red"}


class SearchView:
    """Shows how a search stands, from `with` to its end.

    Args:
        console: on a terminal it shows the table, and what else is printed to it above.
        record: of the search; it grows while the table is shown.
    """

    def __init__(self, console: Console, record: Record) -> None:
        self._console = console
        self._record = record
        self._live: Live | None = None
        self._story: SearchStory | None = None
        self._taken = 0

    def __enter__(self) -> SearchView:
        if self._console.is_terminal:
            # Gone at the end, where the ranking is printed.
            self._live = Live(
                console=self._console,
                get_renderable=self._now,
                refresh_per_second=_PER_SECOND,
                transient=True,
            )
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, text: str) -> None:
        """Print a line about an event, where no table shows it."""
        if self._live is None:
            self._console.print(text, highlight=False, markup=False)

    def _now(self) -> Group:
        """Called by a thread of Live, and by whoever prints."""
        events = list(self._record.events)
        if self._story is None or any(event["event"] == "search" for event in events[self._taken :]):
            if not events:
                return Group()
            self._story = tell(events)
        else:
            for event in events[self._taken :]:
                self._story.take(event)
        self._taken = len(events)
        return search_table(self._story, time.time(), self._console.height - _OTHER_LINES)


def search_table(story: SearchStory, now: float, most: int) -> Group:
    """How a search stands: the best so far, a row for each trial that runs, and below the others, the best first.

    Args:
        story: of the search.
        now: the time, seconds since 1970.
        most: rows; trials beyond them, and those that wait, are counted.
    """
    runs = story.runs()
    order = {run.name: place for place, run in enumerate(_by_rank(story))}
    running = [run for run in runs if run.outcome == "running"]
    over = sorted((run for run in runs if run.outcome not in ("running", "waiting")), key=lambda run: order[run.name])
    shown = [*running, *over][: max(1, most)]
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("trial", "where"):
        table.add_column(name, no_wrap=True)
    table.add_column(story.unit, justify="right", no_wrap=True)
    table.add_column("", width=_BAR)
    for name in ("last", "best", "rung"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True, overflow="ellipsis")
    for run in shown:
        best = run.best(story.config.mode)
        table.add_row(
            run.name,
            run.where or "",
            f"{run.t}/{story.max_t}",
            ProgressBar(total=story.max_t, completed=run.t, width=_BAR),
            f"{run.curve[-1].value:.4f}" if run.curve else "",
            f"{best.value:.4f}" if best else "",
            "" if run.rung is None else str(run.rung),
            _state(run, now),
            style=_STYLES.get(run.outcome, "dim"),
        )
    left_out = Counter(run.outcome for run in runs if run not in shown)
    rest = ", ".join(f"{num} {outcome}" for outcome, num in left_out.items())
    return Group(_title(story, now), table, Text(f"not shown: {rest}" if rest else "", style="dim"))


def _title(story: SearchStory, now: float) -> Text:
    counts = Counter(trial.outcome for trial in story.trials.values())
    running, waiting = counts.pop("running", 0), counts.pop("waiting", 0)
    text = f"{story.experiment.name}: {running} running, {waiting} waiting, {counts.total()} over"
    hours = story.account.spent(now)
    budget = story.config.budget
    text += f"; {hours:.2f} {'' if budget is None else f'of {budget:g} '}{unit(gpu=story.experiment.scale.gpu)}"
    best = story.ranked()[0]
    if scores := best.scores(story.config.mode):
        text += f"; {story.metric} {statistics.fmean(scores):.4f} is best so far, {best.name}"
        reached = best.best(story.config.mode)
        text += (
            f" (mean of {len(scores)} seeds)" if len(scores) > 1 else f" at {story.unit} {reached.t if reached else 0}"
        )
    return Text(text, style="bold", overflow="ellipsis", no_wrap=True)


def _by_rank(story: SearchStory) -> Iterable[TrialStory]:
    for trial in story.ranked():
        yield from (trial, *trial.repeats.values())


def _state(run: TrialStory, now: float) -> str:
    if run.since is not None:
        minutes, seconds = divmod(max(0, int(now - run.since)), 60)
        return f"{run.outcome} {minutes}:{seconds:02d}"
    if run.cut:
        return f"{run.outcome} at {run.cut.rung}"
    return f"{run.outcome}: {run.error}" if run.error else run.outcome
