"""What a person sees of a search while it runs: a table on a terminal, lines elsewhere."""

import io
import math
import time
from pathlib import Path

import pytest
from madeup import FILE, MadeUp, rising
from rich.console import Console

from mimiclab.search.story import SearchStory, tell
from mimiclab.search.watch import SearchView, search_table


def rows(story: SearchStory, now: float, most: int = 20) -> list[list[str]]:
    """The printed lines, at double blanks."""
    console = Console(file=io.StringIO(), width=160)
    console.print(search_table(story, now, most))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().rstrip().splitlines()
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeUp:
    """Two that ran to an end, one failed, one runs, eight wait."""
    made = MadeUp(tmp_path_factory.mktemp("watch"))
    made.run(0, rising(0.30))
    made.run(1, rising(0.20))
    made.start(2)
    made.end(2, "failed", "no such file")
    made.start(3)
    made.result(3, 1, 0.2)
    return made


def test_the_table_shows_what_runs_first_and_then_the_best(made: MadeUp) -> None:
    title, head, *table, rest = rows(tell(made.events), made.now + 65)
    assert title == [
        "look: 1 running, 8 waiting, 3 over; 0.40 core-hours; student/AP 0.2851 is best so far, trial-00 at epoch 9"
    ]
    assert head == ["trial", "where", "epoch", "last", "best", "rung", "state"]
    assert [[cell for cell in row if not set(cell) & set("━╸╺")] for row in table] == [
        ["trial-03", "node-1", "1/9", "0.2000", "0.2000", "1", "running 2:05"],
        ["trial-00", "node-1", "9/9", "0.2851", "0.2851", "3", "finished"],
        ["trial-01", "node-1", "1/9", "0.0567", "0.0567", "1", "pruned at 1"],
        ["trial-02", "node-1", "0/9", "failed: no such file"],
    ]
    assert rest == ["not shown: 8 waiting"]


def test_what_has_no_room_is_counted(made: MadeUp) -> None:
    *_, last, rest = rows(tell(made.events), made.now, most=2)
    assert last[0] == "trial-00"
    assert rest == ["not shown: 1 pruned, 1 failed, 8 waiting"]


def test_the_best_so_far_is_named_after_several_seeds_by_its_mean(tmp_path: Path) -> None:
    made = MadeUp(tmp_path, FILE, "search.seeds_per_trial=2")
    made.run(0, lambda epoch: 0.3)
    made.start(0, seed=1)
    made.result(0, 9, 0.1, seed=1)
    table = rows(tell(made.events), made.now)
    assert [row[0] for row in table[2:4]] == ["trial-00-seed-1", "trial-00"]
    assert "student/AP 0.3000 is best so far, trial-00" in table[0][0]
    made.end(0, "finished", seed=1)
    assert "student/AP 0.2000 is best so far, trial-00 (mean of 2 seeds)" in rows(tell(made.events), made.now)[0][0]


def test_a_trial_that_goes_on_is_nowhere_until_that_is_told(made: MadeUp) -> None:
    story = tell(made.events)
    story.take({"event": "retried", "trial": "trial-03", "time": made.now})
    story.take({"event": "resumed", "trial": "trial-03", "where": None, "time": made.now})
    assert rows(story, made.now)[2][:2] == ["trial-03", "1/9"]
    story.take({"event": "result", "trial": "trial-03", "epoch": 2, "value": 0.2, "where": "node-2", "time": made.now})
    assert rows(story, made.now)[2][:2] == ["trial-03", "node-2"]


def test_a_search_that_has_a_budget_tells_how_much_is_left_of_it(tmp_path: Path) -> None:
    made = MadeUp(tmp_path, FILE, "search.budget=2")
    made.start(0)
    made.result(0, 1, math.nan, wait=900)
    assert rows(tell(made.events), made.now)[0][0] == "look: 1 running, 11 waiting, 0 over; 0.50 of 2 core-hours"


def console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), width=100, height=30, force_terminal=terminal)


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_terminal_shows_the_table_and_no_lines(made: MadeUp) -> None:
    terminal = console(terminal=True)
    with SearchView(terminal, made.write()) as view:
        view.say("trial-03  epoch 1/9, student/AP 0.2000")
        terminal.print("12 trials, 1 at a time", highlight=False)
    shown = said(terminal)
    assert "running" in shown
    assert "0.2851" in shown
    assert "12 trials, 1 at a time" in shown
    assert "epoch 1/9, student/AP" not in shown


def wait_until_said(terminal: Console, text: str, after: int = 0) -> None:
    deadline = time.monotonic() + 30
    while text not in said(terminal)[after:]:
        assert time.monotonic() < deadline, said(terminal)
        time.sleep(0.02)


@pytest.mark.slow
def test_the_table_follows_the_record(tmp_path: Path) -> None:
    made = MadeUp(tmp_path)
    terminal, record = console(terminal=True), made.write()
    with SearchView(terminal, record):
        wait_until_said(terminal, "0 running, 12 waiting")
        made.start(0)
        made.result(0, 1, 0.2345)
        record.add(*made.events[len(record.events) :])
        wait_until_said(terminal, "1 running, 11 waiting")
        wait_until_said(terminal, "0.2345")
        before = len(said(terminal))
        made.driver()
        record.add(*made.events[len(record.events) :])
        wait_until_said(terminal, "12 waiting, 0 over", before)
        wait_until_said(terminal, "0.2345 is best so far", before)


def test_lines_are_printed_where_there_is_no_terminal(made: MadeUp) -> None:
    plain = console(terminal=False)
    with SearchView(plain, made.write()) as view:
        view.say("trial-03  epoch 1/9, student/AP 0.2000 [bold]")
    assert said(plain) == "trial-03  epoch 1/9, student/AP 0.2000 [bold]\n"


def test_a_record_that_nothing_was_written_to_shows_nothing(tmp_path: Path) -> None:
    made = MadeUp(tmp_path)
    made.events.clear()
    terminal = console(terminal=True)
    with SearchView(terminal, made.write()):
        terminal.print("waiting for the cluster")
    assert "waiting for the cluster" in said(terminal)
