"""What a search has spent, what ends it, and what becomes of a run whose process dies."""

import json
import random
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from searches import EPOCHS, Driver, KilledError, objective, outline

from mimiclab.errors import UserError
from mimiclab.search.budget import Account, unit
from mimiclab.search.record import RECORD, Record, recompute
from mimiclab.search.trials import with_repeats
from mimiclab.storage import Storage


class Clock:
    """The time, which stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now

    def go_on(self, hours: float) -> None:
        self.now += 3600 * hours


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "small"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "time", clock)
    return clock


def events_of(folder: Path, *kinds: str) -> list[dict[str, Any]]:
    return [event for event in Record(Storage(folder)).events if event["event"] in kinds]


# What was spent


def spent(*events: Mapping[str, Any], at: float) -> float:
    account = Account()
    for event in events:
        account.take(event)
    return account.spent(3600 * at)


def event(kind: str, hour: float, trial: str = "a", **more: Any) -> dict[str, Any]:
    about = {} if kind == "search" else {"trial": trial}
    return {"event": kind, "time": 3600 * hour, **about, **more}


TWO = {"CPU": 2.0}


def test_runs_that_go_on_count_up_to_now_and_others_to_their_end() -> None:
    begin = event("search", 0), event("started", 0, resources=TWO)

    assert spent(*begin, at=3) == 6
    assert spent(*begin, event("ended", 1), at=3) == 2
    assert spent(*begin, event("retried", 1), event("resumed", 2, resources=TWO), at=3) == 4
    assert spent(*begin, event("started", 2, "b", resources={"CPU": 8, "GPU": 1.0}), at=3) == 7


def test_a_repeat_counts_beside_its_trial() -> None:
    begin = event("search", 0), event("started", 0, resources=TWO), event("started", 1, seed=1, resources=TWO)

    assert spent(*begin, event("ended", 1.5), at=2) == 5
    account = Account()
    for each in begin:
        account.take(each)
    assert (account.spent(3600 * 2, "a"), account.spent(3600 * 2, "a-seed-1")) == (4, 2)


def test_runs_of_a_driver_that_died_count_as_long_as_it_was_heard_of() -> None:
    before = event("search", 0), event("started", 0, resources=TWO), event("result", 1)

    assert spent(*before, event("search", 5), at=6) == 2
    assert spent(*before, event("search", 5, heard=3600 * 1.5), at=6) == 3
    assert spent(*before, event("search", 5, heard=3600 * 9), at=6) == 10  # no later than the next driver's start


def test_a_record_of_an_earlier_version_counts_a_core_for_each_run() -> None:
    assert spent(event("search", 0), event("started", 0), at=2) == 2


def test_gpus_are_counted_where_there_are_any() -> None:
    assert (unit(gpu=True), unit(gpu=False)) == ("GPU-hours", "core-hours")


# What ends a search


def test_a_search_whose_budget_is_spent_stops_each_run_at_its_next_evaluation(folder: Path, clock: Clock) -> None:
    driver = Driver("search.budget=6", "scale.threads=2")
    first, second = driver.begin(), driver.begin()
    clock.go_on(1)
    assert driver.result(first, 1, 0.7)
    clock.go_on(0.5)  # 6 core-hours

    assert driver.course.is_spent
    assert driver.course.next() is None
    assert driver.said[-1] == "6 of 6 core-hours were spent, which ended the search: no trial goes on"
    clock.go_on(0.5)
    assert not driver.result(second, 1, 0.7)
    driver.course.complete(second)
    assert driver.said[-1] == "trial-01  out of budget after epoch 1"
    assert not driver.course.is_over
    assert not driver.result(first, 2, 0.6)
    driver.course.complete(first)

    assert driver.course.is_over
    assert driver.course.spent == pytest.approx(8)
    assert Counter(trial.outcome for trial in driver.trials) == {"out of budget": 2, "waiting": 6}
    decisions = events_of(folder, "decision")
    assert [(d["trial"], d["go_on"], d["reason"], d["spent"]) for d in decisions] == [
        ("trial-00", True, None, None),
        ("trial-01", False, "budget", 8.0),
        ("trial-00", False, "budget", 8.0),
    ]
    # It was compared all the same, and the rung knows of it.
    assert (decisions[1]["rung"], decisions[1]["values"]) == (1, [0.7])


def test_what_is_worse_at_a_rung_is_pruned_though_the_budget_is_spent_too(clock: Clock) -> None:
    driver = Driver("search.budget=1")
    first, second = driver.begin(), driver.begin()
    driver.result(first, 1, 0.5)
    clock.go_on(1)
    driver.result(second, 1, 0.1)
    driver.course.complete(second)

    assert second.outcome == "pruned"


def test_a_run_that_is_done_anyway_is_finished_though_the_budget_is_spent(clock: Clock) -> None:
    driver = Driver("search.budget=1")
    first, second = driver.begin(), driver.begin()
    clock.go_on(2)
    assert driver.result(first, EPOCHS, 0.5)
    driver.course.complete(first)
    assert driver.course.result(second, epoch=2, step=20, metrics={"student/AP": 0.1}, last=True)  # by eval.patience
    driver.course.complete(second)

    assert (first.outcome, second.outcome) == ("finished", "finished")


@pytest.mark.parametrize("seed", range(6))
def test_decisions_for_want_of_budget_follow_from_the_record_over_deaths_of_the_driver(
    folder: Path, clock: Clock, seed: int
) -> None:
    order = random.Random(seed)
    overrides = ("search.budget=4", "search.trials=12", "search.seeds_per_trial=2", "search.algorithm=optuna")
    heard = None
    for _ in range(3):
        with pytest.raises(KilledError):
            Driver(*overrides, heard=heard).run(order, objective, most=8, tick=lambda: clock.go_on(0.05), deaths=0.1)
        heard = clock.now + 5
        clock.go_on(2)  # nobody is there
    driver = Driver(*overrides, heard=heard)
    driver.run(order, objective, tick=lambda: clock.go_on(0.05), deaths=0.1)

    assert driver.course.is_spent
    assert 4 <= driver.course.spent < 4.5
    outcomes = Counter(run.outcome for run in with_repeats(driver.trials))
    assert 0 < outcomes["out of budget"] <= 3
    assert outcomes["running"] == 0
    events = Record(Storage(folder)).events
    decisions = [{k: v for k, v in event.items() if k != "time"} for event in events if event["event"] == "decision"]
    assert decisions == list(recompute(events))
    again = Driver(*overrides)
    assert again.course.is_over
    assert outline(again.trials) == outline(driver.trials)
    assert Record(Storage(folder)).events == events


def test_with_a_larger_budget_a_search_goes_on_where_it_was_ended(folder: Path, clock: Clock) -> None:
    driver = Driver("search.budget=1")
    first = driver.begin()
    clock.go_on(1)
    driver.result(first, 1, 0.5)
    driver.course.complete(first)
    assert driver.course.is_over
    clock.go_on(100)

    more = Driver("search.budget=3")

    assert not more.course.is_over
    first = more.begin()
    assert (first.name, first.epochs) == ("trial-00", 1)
    assert more.said[-1].startswith("trial-00  resumed after epoch 1: ")
    clock.go_on(1)
    assert more.result(first, 1, 0.5)  # what it had told before
    assert more.result(first, 2, 0.6)
    assert more.course.spent == pytest.approx(2)
    clock.go_on(1)
    assert not more.result(first, 3, 0.7)
    more.course.complete(first)
    assert [e["outcome"] for e in events_of(folder, "ended")] == ["out of budget", "out of budget"]
    assert Driver("search.budget=3").course.is_over


def test_no_trial_is_repeated_once_the_budget_is_spent(clock: Clock) -> None:
    driver = Driver("search.budget=1", "search.seeds_per_trial=3", "search.trials=1")
    first = driver.begin()
    driver.result(first, EPOCHS, 0.5)
    driver.course.complete(first)
    second = driver.begin()
    assert second.name == "trial-00-seed-1"
    clock.go_on(1)
    assert not driver.result(second, 1, 0.5)
    driver.course.complete(second)

    assert driver.course.is_over
    assert [run.outcome for run in with_repeats(driver.trials)] == ["finished", "out of budget", "waiting"]


# What becomes of runs whose process dies


def test_a_run_whose_process_dies_is_run_on(folder: Path) -> None:
    driver = Driver()
    first = driver.begin()
    driver.result(first, 1, 0.5)
    driver.course.died(first, "crash", "the process died")

    assert driver.said[-1] == "trial-00  its process died, it is to be run on: the process died"
    again = driver.course.next()
    assert again is first
    driver.course.begin(first)
    told = [(e["event"], e.get("why"), e.get("reason")) for e in events_of(folder, "started", "resumed", "retried")]
    assert told == [("started", None, None), ("retried", "crash", "the process died"), ("resumed", None, None)]


def test_a_run_is_given_up_after_too_many_deaths_without_an_evaluation_between_them() -> None:
    driver = Driver("scale.max_crashes=2")
    for _ in range(2):
        driver.course.died(driver.begin(), "crash", "killed")
    first = driver.begin()
    driver.result(first, 1, 0.5)
    driver.course.died(first, "crash", "killed")
    driver = Driver("scale.max_crashes=2")  # deaths count over those of the driver
    driver.course.died(driver.begin(), "crash", "killed")
    first = driver.begin()
    assert first.name == "trial-00"
    driver.course.died(first, "crash", "killed by 9")

    assert (first.outcome, first.error) == (
        "failed",
        "scale.max_crashes: 2, and its process died 3 times without a new evaluation; the last time: killed by 9",
    )
    assert driver.begin().name == "trial-01"


def test_machines_that_are_taken_count_for_themselves() -> None:
    driver = Driver("scale={max_crashes: 0, max_preemptions: 1}")
    first = driver.begin()
    driver.course.died(first, "preemption", "node 12 is gone")
    first = driver.begin()
    driver.course.died(first, "preemption", "node 34 is gone")

    assert (first.outcome, first.error) == (
        "preempted",
        "scale.max_preemptions: 1, and its process was taken its machine 2 times; the last time: node 34 is gone",
    )
    assert (Driver("scale={max_crashes: 0, max_preemptions: 1}").trials[0].outcome) == "preempted"


def test_any_number_of_machines_may_be_taken_by_default() -> None:
    driver = Driver()
    for _ in range(20):
        driver.course.died(driver.begin(), "preemption", "gone")

    assert driver.trials[0].outcome == "waiting"


def test_a_run_that_dies_when_it_was_to_be_stopped_is_not_run_again() -> None:
    driver = Driver()
    first, second = driver.begin(), driver.begin()
    driver.result(first, 1, 0.5)
    assert not driver.result(second, 1, 0.1)
    driver.course.died(second, "crash", "killed")

    assert second.outcome == "pruned"


# Seeds, the best so far, other versions


def test_what_was_begun_goes_on_first_then_new_trials_then_repeats_of_the_best() -> None:
    driver = Driver("search.trials=3", "search.seeds_per_trial=2")
    runs = [driver.begin() for _ in range(2)]
    for run, value in zip(runs, (0.1, 0.5), strict=True):
        driver.result(run, EPOCHS, value)
        driver.course.complete(run)

    assert [run.name for run in driver.course.left] == ["trial-02", "trial-01-seed-1", "trial-00-seed-1"]
    repeat = driver.course.left[1]
    driver.course.begin(repeat)
    again = Driver("search.trials=3", "search.seeds_per_trial=2")
    assert [run.name for run in again.course.left] == ["trial-01-seed-1", "trial-02", "trial-00-seed-1"]


def test_repeats_are_not_compared_at_rungs() -> None:
    driver = Driver("search.trials=1", "search.seeds_per_trial=2")
    first = driver.begin()
    driver.result(first, EPOCHS, 0.5)
    driver.course.complete(first)
    repeat = driver.begin()

    assert all(driver.result(repeat, epoch, -1.0) for epoch in range(1, EPOCHS + 1))
    decisions = [event for event in driver.record.events if event["event"] == "decision" and "seed" in event]
    assert {(d["seed"], d["rung"], d["go_on"]) for d in decisions} == {(1, None, True)}


def test_seeds_may_be_added_to_a_search_that_was_run_and_not_taken_away() -> None:
    driver = Driver("search.trials=1")
    driver.run(random.Random(0), objective)

    more = Driver("search.trials=1", "search.seeds_per_trial=2")

    assert [run.name for run in more.course.left] == ["trial-00-seed-1"]
    with pytest.raises(UserError, match=r"found 1 seeds_per_trial where 2 were planned before; expected as many or"):
        Driver("search.trials=1")


def test_the_best_value_so_far_is_told_when_it_changes_and_all_of_it_to_the_next_driver() -> None:
    driver = Driver("search.trials=2", "search.seeds_per_trial=2")
    first, second = driver.begin(), driver.begin()
    for run, epoch, value in ((first, 1, 0.2), (second, 1, 0.5), (second, 2, 0.3), (second, EPOCHS, 0.4)):
        driver.result(run, epoch, value)
    assert driver.bests == [(1, 0.2), (2, 0.5)]
    driver.course.complete(second)
    again = Driver("search.trials=2", "search.seeds_per_trial=2")
    assert again.bests == driver.bests
    repeat = again.course.left[1]
    assert repeat.name == "trial-01-seed-1"
    again.course.begin(repeat)
    again.result(repeat, EPOCHS, 0.3)
    again.course.complete(repeat)

    # 5 results and an end before this one; the mean of two seeds is what counts then.
    assert again.bests[2:] == [(7, pytest.approx(0.4))]


def test_trials_in_steps_are_compared_at_the_highest_rung_that_their_step_has_reached() -> None:
    driver = Driver("search.unit=steps", "search.grace_period=12", "search.max_t=85")
    first, second = driver.begin(), driver.begin()
    for epoch in (1, 2, 4):
        driver.result(first, epoch, 0.5)
    assert driver.result(second, 1, 0.1)  # step 10 is below the first rung
    assert not driver.result(second, 2, 0.1)

    decisions = [event for event in driver.record.events if event["event"] == "decision"]
    assert [(d["trial"], d["epoch"], d["rung"]) for d in decisions] == [
        ("trial-00", 1, None),
        ("trial-00", 2, 12),
        ("trial-00", 4, 36),
        ("trial-01", 1, None),
        ("trial-01", 2, 12),
    ]
    assert first.experiment.optim.epochs == 9  # the first whose end reaches step 85


def test_terms_of_a_sum_are_recorded_with_it(folder: Path) -> None:
    driver = Driver("search.metric={student/AP: 1, gap/AP: -0.5}")
    driver.result(driver.begin(), 1, 0.5, **{"gap/AP": 0.2})

    (result,) = events_of(folder, "result")
    assert result["value"] == pytest.approx(0.4)
    assert result["metrics"] == {"student/AP": 0.5, "gap/AP": 0.2}
    assert driver.said[-1] == "trial-00  epoch 1/9, student/AP - 0.5 gap/AP 0.4000"


def test_a_metric_that_is_not_reported_ends_the_search_with_its_name(folder: Path) -> None:
    driver = Driver("search.metric={student/AP: 1, student/latency: -0.5}")

    with pytest.raises(UserError, match=r"evaluations do not report student/latency; did you mean student/latency_ms"):
        driver.result(driver.begin(), 1, 0.5)
    assert events_of(folder, "result") == []


def test_events_say_where_and_with_what(folder: Path) -> None:
    driver = Driver("scale={threads: 2, gpu: true}", "search.workers_per_trial=3")
    run = driver.course.next()
    assert run is not None
    driver.course.begin(run, where="10.0.0.1")
    driver.course.result(run, epoch=1, step=10, metrics={"student/AP": 0.5}, where="10.0.0.2")

    started, result = events_of(folder, "started", "result")
    assert (started["where"], started["resources"]) == ("10.0.0.1", {"CPU": 6, "GPU": 3})
    assert started["values"] == run.values
    assert (result["step"], result["where"]) == (10, "10.0.0.2")


def test_a_record_of_an_earlier_version_is_taken_up(folder: Path) -> None:
    driver = Driver()
    first, second = driver.begin(), driver.begin()
    driver.result(first, 1, 0.5)
    driver.result(second, 1, 0.1)
    driver.course.complete(second)
    new = {"unit", "budget", "step", "where", "resources", "values", "reason", "spent", "last", "again"}
    # Of a decision, `values` are old.
    kept = [
        {key: v for key, v in event.items() if key not in new or (key == "values" and event["event"] == "decision")}
        for event in driver.record.events
    ]
    (folder / RECORD).write_text("".join(json.dumps(event) + "\n" for event in kept))

    again = Driver()

    assert [trial.outcome for trial in again.trials[:3]] == ["waiting", "pruned", "waiting"]
    first, third = again.begin(), again.begin()
    assert (first.name, third.name) == ("trial-00", "trial-02")
    assert again.result(third, 1, 0.9)
    # Those searches compared a trial once.
    assert again.result(first, 2, 0.6)
