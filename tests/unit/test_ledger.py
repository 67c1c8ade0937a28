"""What restarts cost: a ledger against a run whose every step is counted."""

import io
import json
import random
from pathlib import Path

import pytest
from rich.console import Console

from mimiclab.ledger import GOODPUT, RECOVERY, RESTARTS, WASTED, Ledger
from mimiclab.tracking import runs
from mimiclab.tracking.client import connect
from mimiclab.tracking.protocol import Row
from mimiclab.tracking.writer import MlflowTracker


def told() -> Ledger:
    """Ten steps of a second each; a preemption, a crash before the first step, the driver's death, and the end."""
    ledger = Ledger()
    ledger.start_session(1000.0)
    ledger.start_attempt(1005.0, world_size=4, from_step=0, useful_s=0.0)
    for step in range(1, 6):
        ledger.reached(1005.0 + step, step, float(step))
    ledger.failed(1011.0, "preemption", "spot-7 was taken")
    ledger.failed(1012.0, "crash", "connection reset by peer")  # of its companions
    ledger.start_attempt(1020.0, world_size=3, from_step=4, useful_s=4.0)
    ledger.failed(1021.0, "crash", "out of memory")
    ledger.start_attempt(1030.0, world_size=3, from_step=4, useful_s=4.0)
    for step in range(5, 9):
        ledger.reached(1027.0 + step, step, float(step))
    # The driver was heard of at 1040 and killed; another one begins much later.
    ledger.start_session(5000.0, heard=1040.0)
    ledger.start_attempt(5010.0, world_size=4, from_step=5, useful_s=5.0)
    for step in range(6, 11):
        ledger.reached(5006.0 + step, step, float(step))
    ledger.end_session(5020.0)
    return ledger


def of(ledger: Ledger, key: str) -> list[tuple[int, float]]:
    return [(row.step, row.value) for row in ledger.rows() if row.key == key]


def test_the_restarts_of_a_run_and_what_they_cost() -> None:
    ledger = told()
    restarts = ledger.restarts()
    assert [(r.number, r.failure.kind, r.failure.time) for r in restarts] == [
        (1, "preemption", 1011.0),
        (2, "crash", 1021.0),
        (3, "driver", 1040.0),
    ]
    assert [(r.world_size, r.from_step, r.wasted_steps) for r in restarts] == [(3, 4, 1), (3, 4, 0), (4, 5, 3)]
    # The first one's next step is one of the second's; nobody waited between 1040 and 5000.
    assert [r.recovery_s for r in restarts] == [21.0, 11.0, 12.0]
    assert ledger.wasted_steps == 4
    assert ledger.goodput == 10 / (40 + 20)
    assert ledger.tags() == {
        "restart.1": "preemption: spot-7 was taken",
        "restart.2": "crash: out of memory",
        "restart.3": "driver: its driver died",
    }


def test_every_restart_is_one_point_of_each_metric() -> None:
    ledger = told()
    assert of(ledger, RESTARTS) == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0)]
    assert of(ledger, WASTED) == [(0, 0.0), (1, 1.0), (2, 1.0), (3, 4.0)]
    assert of(ledger, RECOVERY) == [(1, 21.0), (2, 11.0), (3, 12.0)]
    assert of(ledger, GOODPUT) == [(0, 5 / 11), (1, 4 / 21), (2, 8 / 40), (3, 10 / 60)]
    times = {(row.key, row.step): row.timestamp_ms for row in ledger.rows()}
    assert times[RESTARTS, 2] == 1030_000
    assert times[RECOVERY, 1] == times[RECOVERY, 2] == 1032_000
    assert times[GOODPUT, 3] == 5020_000


def test_a_run_without_a_restart_has_its_goodput() -> None:
    ledger = Ledger()
    ledger.start_session(0.0)
    assert ledger.goodput is None
    ledger.start_attempt(5.0, world_size=1, from_step=0, useful_s=0.0)
    ledger.reached(15.0, 1, 10.0)
    assert ledger.goodput == 10 / 15
    assert of(ledger, GOODPUT) == []
    ledger.end_session(20.0)
    assert ledger.goodput == 0.5
    assert of(ledger, RESTARTS) == of(ledger, WASTED) == [(0, 0.0)]
    assert of(ledger, GOODPUT) == [(0, 0.5)]
    assert ledger.restarts() == []
    assert ledger.tags() == {}


def test_a_run_that_is_stopped_or_continued_after_its_end_is_restarted() -> None:
    ledger = Ledger()
    for start in (0.0, 100.0):
        ledger.start_session(start)
        ledger.start_attempt(start + 1, world_size=1, from_step=int(start / 10), useful_s=start / 10)
        ledger.reached(start + 11, int(start / 10) + 10, start / 10 + 10)
        before = ledger.rows()
        ledger.end_session(start + 12)
    (restart,) = ledger.restarts()
    assert (restart.failure.kind, restart.failure.time, restart.wasted_steps) == ("driver", 12.0, 0)
    assert restart.failure.reason == "the run was started again"
    assert restart.recovery_s == 11.0
    assert of(ledger, GOODPUT) == [(0, 10 / 12), (1, 20 / 24)]
    assert set(before) <= set(ledger.rows())


def test_a_failure_that_nobody_told_is_a_crash_after_the_last_step() -> None:
    ledger = Ledger()
    ledger.start_session(0.0)
    ledger.start_attempt(1.0, world_size=2, from_step=0, useful_s=0.0)
    ledger.reached(2.0, 1, 1.0)
    ledger.start_attempt(9.0, world_size=2, from_step=0, useful_s=0.0)
    (restart,) = ledger.restarts()
    assert (restart.failure.kind, restart.failure.time, restart.wasted_steps, restart.recovery_s) == (
        "crash",
        2.0,
        1,
        None,
    )


@pytest.mark.parametrize("seed", range(20))
def test_a_random_run_is_accounted_for_step_by_step(seed: int) -> None:
    rng = random.Random(seed)
    ledger = Ledger()
    now, driven, session = rng.uniform(0, 100), 0.0, 0.0
    done: list[int] = []  # every step that was ever done, in order
    took: dict[int, float] = {}  # seconds of the last time that it was done
    saved, failures, rows = 0, 0, []
    ledger.start_session(now)
    session = now
    while saved < 60:
        now += rng.uniform(0.5, 5)
        ledger.start_attempt(now, world_size=2, from_step=saved, useful_s=sum(took[s] for s in range(1, saved + 1)))
        step, fails_at = saved, saved + rng.randrange(30)
        while step < min(fails_at, 60):
            step += 1
            took[step] = rng.uniform(0.1, 1)
            now += took[step]
            done.append(step)
            ledger.reached(now, step, sum(took[s] for s in range(1, step + 1)))
            if step % 7 == 0 or step == 60:
                saved = step
        # As it is stored and read again at any time; what was a row stays one.
        ledger = Ledger.from_record(json.loads(json.dumps(ledger.to_record())))
        assert set(rows) <= set(ledger.rows())
        rows = ledger.rows()
        if saved == 60:
            break
        failures += 1
        now += rng.uniform(0, 2)
        if rng.random() < 0.3:
            driven += now - session
            session = now + 1000
            ledger.start_session(session, heard=now)
            now = session
        else:
            ledger.failed(now, rng.choice(["preemption", "crash", "growth"]), "x")
    ledger.end_session(now)
    driven += now - session
    assert len(ledger.restarts()) == failures
    assert ledger.wasted_steps == len(done) - 60
    assert ledger.goodput == pytest.approx(sum(took.values()) / driven)
    assert of(ledger, GOODPUT)[-1] == (failures, pytest.approx(ledger.goodput))
    assert [number for number, _ in of(ledger, RECOVERY)] == list(range(1, failures + 1))


def test_a_record_holds_everything() -> None:
    ledger = told()
    assert Ledger.from_record(json.loads(json.dumps(ledger.to_record()))) == ledger
    assert Ledger.from_record(json.loads(json.dumps(Ledger().to_record()))) == Ledger.from_record({}) == Ledger()
    with pytest.raises((KeyError, TypeError)):
        Ledger.from_record({"sessions": [{"begin": 0}], "attempts": []})


def test_people_read_a_row_per_restart() -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(told().table())
    lines = console.export_text().splitlines()
    assert lines[0].strip() == "3 restarts, 4 steps repeated, goodput 16.7 %"
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    assert cells[0][1:] == ["", "started", "4", "0", "", ""]
    assert cells[1][1:] == ["11.0 s", "preemption: spot-7 was taken", "3", "4", "1", "21.0 s"]
    assert cells[3][1:] == ["40.0 s", "driver: its driver died", "4", "5", "3", "12.0 s"]


@pytest.mark.slow
def test_mlflow_has_each_point_once_however_often_it_is_sent(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    run_id = runs.open_run(uri, "cells", "x", "abc", {}, {})
    ledger = told()
    early = [row for row in ledger.rows() if row.step < 2]
    for rows in (early, ledger.rows()):
        assert MlflowTracker(uri, run_id, rows).close(30) == []
    client = connect(uri)
    for key in (RESTARTS, WASTED, RECOVERY, GOODPUT):
        points = [Row(key, p.value, p.timestamp, p.step) for p in client.get_metric_history(run_id, key)]
        assert points == [row for row in ledger.rows() if row.key == key]
