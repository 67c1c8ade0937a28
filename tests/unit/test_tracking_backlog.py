"""Rows that wait: in order, bounded in memory, and exact whatever dies when."""

import logging
import random
from pathlib import Path

import pytest

from mimiclab.errors import UserError
from mimiclab.storage import Storage
from mimiclab.tracking import backlog
from mimiclab.tracking.backlog import Backlog, end_of_steps
from mimiclab.tracking.protocol import Row, make_rows

SERIES = ("train/loss", "train/lr", "student/AP")


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backlog, "_PAGE_ROWS", 20)
    monkeypatch.setattr(backlog, "_CALL_ROWS", 8)


def rows(first: int, last: int) -> list[Row]:
    return [row for step in range(first, last + 1) for row in make_rows(step, {"a": step / 10, "b": 0.0})]


def opened(folder: Path, carried: list[Row] | None = None) -> Backlog:
    found = Backlog(Storage(folder), carried or [])
    found.open()
    return found


def drained(waiting: Backlog) -> list[Row]:
    found = []
    while taken := waiting.take():
        found += taken
        waiting.acknowledged(taken)
    return found


def test_a_step_is_never_split_over_two_calls() -> None:
    many = [Row(f"m{i}", 0.0, 0, step) for step in range(4) for i in range(300)]
    assert end_of_steps(many[:900], 1000) == 900
    assert end_of_steps(many, 1000) == 900
    assert end_of_steps([Row(f"m{i}", 0.0, 0, 5) for i in range(1500)], 1000) == 1000

    logged = rows(1, 10)
    waiting = Backlog(None, logged)
    waiting.open()
    assert waiting.take() == logged[:8]
    assert waiting.take() == logged[:8], "the same rows until they are acknowledged"
    assert waiting.in_memory() == logged


def test_old_rows_leave_memory_once_and_come_back_in_order(tmp_path: Path) -> None:
    logged, waiting = rows(1, 55), opened(tmp_path)
    written: dict[str, int] = {}
    for first in range(0, len(logged), 10):
        waiting.add(logged[first : first + 10])
        waiting.keep()
        assert len(waiting.in_memory()) < 20
        for path in tmp_path.iterdir():
            assert written.setdefault(path.name, path.stat().st_mtime_ns) == path.stat().st_mtime_ns
    assert waiting.num_pages() == len(written) == 5
    assert waiting.in_memory() == logged[100:]

    assert drained(waiting) == logged
    assert waiting.num_pages() == 0
    assert not list(tmp_path.iterdir())


def test_rows_in_flight_when_they_are_kept_are_neither_lost_nor_overtaken(tmp_path: Path) -> None:
    logged, waiting = rows(1, 15), opened(tmp_path)
    waiting.add(logged)
    first = waiting.take()
    waiting.keep()  # all of it, the rows in flight too
    assert waiting.in_memory() == logged[20:]
    assert waiting.take() == first  # the call failed
    waiting.acknowledged(first)
    assert drained(waiting) == logged[8:]

    waiting.add(logged)
    first = waiting.take()
    waiting.keep()
    waiting.acknowledged(waiting.take())
    assert drained(waiting) == logged[8:]


@pytest.mark.slow
def test_no_row_leaves_before_an_earlier_one_that_cannot_be_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logged, waiting = rows(1, 25), opened(tmp_path)
    waiting.add(logged)
    waiting.keep()
    page, aside = tmp_path / "rows+00000001", tmp_path / "aside"
    page.rename(aside)
    page.mkdir()  # what cannot be read, and may be the next time
    with pytest.raises(UserError, match="cannot be read"):
        waiting.take()
    page.rmdir()
    aside.rename(page)
    assert waiting.take() == logged[:8]

    again = opened(tmp_path, waiting.in_memory())
    page.write_text("[[1")
    assert drained(again) == logged[20:], "what is damaged holds up no others"
    assert "rows+00000001 holds no metric values" in caplog.text


def test_what_the_folder_does_not_take_stays_in_memory_in_order(tmp_path: Path) -> None:
    logged, waiting = rows(1, 30), opened(tmp_path / "file" / "unsent")
    (tmp_path / "file").write_text("")
    waiting.add(logged)
    waiting.keep()
    assert waiting.in_memory() == logged
    (tmp_path / "file").unlink()
    waiting.keep()
    assert waiting.num_pages() == 3
    assert drained(waiting) == logged


@pytest.mark.parametrize("seed", range(30))
def test_the_history_is_exact_whatever_dies_when(tmp_path: Path, seed: int, caplog: pytest.LogCaptureFixture) -> None:
    """A run that logs, keeps, saves, sends and dies at random goes on from one of its last checkpoints."""
    caplog.set_level(logging.CRITICAL)
    chance = random.Random(seed)
    server: dict[str, list[int]] = {key: [] for key in SERIES}
    waiting, step = opened(tmp_path), 0
    checkpoints: list[tuple[int, list[Row]]] = [(0, [])]

    def send(num: float) -> None:
        while num > 0 and (taken := waiting.take()):
            for row in taken:
                if row.step > (server[row.key] or [0])[-1]:  # as the writer does
                    server[row.key].append(row.step)
            num -= 1
            if chance.random() < 0.1:
                return  # and the answer is lost
            waiting.acknowledged(taken)

    while step < 300:
        step += 1
        waiting.add(make_rows(step, {"train/loss": 0.0, "train/lr": 0.0}))
        if step % 5 == 0:
            waiting.add(make_rows(step, {"student/AP": 0.0}))
        action = chance.random()
        if action < 0.15:
            waiting.keep()
        elif action < 0.3:
            waiting.keep()
            checkpoints.append((step, waiting.in_memory()))
        elif action < 0.4:
            send(chance.randrange(1, 6))
        elif action < 0.43:
            step, carried = chance.choice(checkpoints[-2:])
            checkpoints = [each for each in checkpoints if each[0] <= step]
            waiting = opened(tmp_path, carried)
    while waiting.take():
        send(float("inf"))
    assert server == {"train/loss": [*range(1, 301)], "train/lr": [*range(1, 301)], "student/AP": [*range(5, 301, 5)]}
    assert not list(tmp_path.iterdir())
