"""The record of a search, and how a search goes on from it: nothing but files, no cluster."""

import io
import json
import math
import os
import random
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console
from searches import EPOCHS, Driver, KilledError, objective, outline

from mimiclab import runs
from mimiclab.engine import NonFiniteLossError
from mimiclab.errors import NoRetryError, UserError
from mimiclab.experiment import identity, load_experiment
from mimiclab.lease import LEASE, Lease
from mimiclab.search.budget import run_of
from mimiclab.search.course import Course
from mimiclab.search.earlier import BEST, SEARCH, TUNE, remove, search_identity, wait_for_drivers
from mimiclab.search.record import RECORD, Record, recompute, stamped
from mimiclab.search.story import tell
from mimiclab.search.trials import Plan, plan, with_repeats
from mimiclab.storage import Storage
from mimiclab.tracking import runs as tracking


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "small"


KINDS = {
    "random": (),
    "in steps": ("search.unit=steps", "search.grace_period=10"),
    "several seeds": ("search.seeds_per_trial=3",),
    "optuna": ("search.algorithm=optuna",),
    "a sum": ("search.metric={student/AP: 1, student/latency_ms: -0.5}",),
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", KINDS)
def test_a_search_that_is_killed_again_and_again_accounts_for_every_trial_once(
    folder: Path, kind: str, seed: int
) -> None:
    order = random.Random(seed)
    for _ in range(4):
        with pytest.raises(KilledError):
            Driver(*KINDS[kind]).run(order, objective, most=order.randrange(6), deaths=0.1)
    driver = Driver(*KINDS[kind])
    driver.run(order, objective, deaths=0.1)

    events = Record(Storage(folder)).events
    done = {run.name: run for run in with_repeats(driver.trials) if run.outcome != "waiting"}
    for event in ("started", "ended"):
        assert sorted(run_of(e) for e in events if e["event"] == event) == sorted(done)
    results = [(run_of(event), event["epoch"]) for event in events if event["event"] == "result"]
    assert len(results) == len(set(results))
    assert {run.outcome for run in done.values()} == {"finished", "pruned"}
    decisions = [{k: v for k, v in event.items() if k != "time"} for event in events if event["event"] == "decision"]
    assert len(decisions) == len(results)
    assert decisions == list(recompute(events))
    stopped = {run_of(decision) for decision in decisions if not decision["go_on"]}
    assert stopped == {name for name, run in done.items() if run.outcome == "pruned"}
    assert {decision["reason"] for decision in decisions} == {None, "rung"}
    # What repeats a trial is that of the finished ones, all of it, to its end.
    finished = [trial for trial in driver.trials if trial.outcome == "finished"]
    repeats = [run for trial in finished for run in trial.repeats]
    assert {name for name in done if "seed" in name} == {run.name for run in repeats}
    assert all(run.outcome == "finished" and run.epochs == EPOCHS for run in repeats)
    # And once more: nothing is left, nothing is written, all is as it was.
    again = Driver(*KINDS[kind])
    assert again.course.is_over
    assert outline(again.trials) == outline(driver.trials)
    assert again.bests == driver.bests
    assert Record(Storage(folder)).events == events


def test_an_evaluation_that_is_told_again_changes_nothing(folder: Path) -> None:
    driver = Driver()
    first, second = driver.trials[:2]
    driver.course.begin(first)
    driver.course.begin(second)
    assert driver.result(first, 1, 0.5)
    assert not driver.result(second, 1, 0.1)
    before = (folder / RECORD).read_text()

    assert driver.result(first, 1, 0.7)
    assert not driver.result(second, 1, 0.7)

    assert (folder / RECORD).read_text() == before
    assert first.evaluations == [(1, 0.5)]


def test_rungs_are_those_of_the_record_after_a_restart() -> None:
    driver = Driver()
    driver.course.begin(driver.trials[0])
    driver.result(driver.trials[0], 1, 0.5)
    again = Driver()
    other = again.trials[1]
    again.course.begin(other)

    assert not again.result(other, 1, 0.4)
    assert again.said[-2:] == [
        f"trial-01  started: optim.lr {other.values['optim.lr']}, model.pyramid.stagger "
        f"{other.values['model.pyramid.stagger']}",
        "trial-01  epoch 1/9, student/AP 0.4000",
    ]


def test_a_decision_holds_though_the_driver_died_before_it_took_effect(folder: Path) -> None:
    driver = Driver()
    for trial, value in zip(driver.trials[:2], (0.5, 0.1), strict=True):
        driver.course.begin(trial)
        driver.result(trial, 1, value)
    again = Driver()

    assert [trial.outcome for trial in again.trials[:3]] == ["waiting", "pruned", "waiting"]
    assert again.said == ["trial-01  pruned after epoch 1"]
    assert [trial.begun for trial in again.trials[:3]] == [True, True, False]
    again.course.begin(again.trials[0])
    assert again.said[-1].startswith("trial-00  resumed after epoch 1: optim.lr ")


@pytest.mark.parametrize("lost", [1, 40, "decision"])
def test_half_of_the_last_write_is_made_up_for(folder: Path, lost: int | str) -> None:
    driver = Driver()
    for trial, value in zip(driver.trials[:2], (0.5, 0.1), strict=True):
        driver.course.begin(trial)
        driver.result(trial, 1, value)
    text = (folder / RECORD).read_text()
    cut = len(text.splitlines(keepends=True)[-1]) if lost == "decision" else int(lost)
    (folder / RECORD).write_text(text[:-cut])

    again = Driver()

    assert again.trials[1].outcome == "pruned"
    decisions = [event for event in Record(Storage(folder)).events if event["event"] == "decision"]
    assert [(event["trial"], event["go_on"]) for event in decisions] == [("trial-00", True), ("trial-01", False)]


def test_nan_is_null_in_the_record_and_comes_back(folder: Path) -> None:
    driver = Driver()
    driver.course.begin(driver.trials[0])
    driver.course.begin(driver.trials[1])
    assert driver.result(driver.trials[0], 1, math.nan)
    assert driver.result(driver.trials[1], 1, 0.5)

    assert "NaN" not in (folder / RECORD).read_text()
    assert math.isnan(Driver().trials[0].evaluations[0][1])


def test_ended_trials_stay_as_they_are_and_more_may_be_added() -> None:
    driver = Driver()
    driver.run(random.Random(0), lambda run, epoch: 1 - run.number / 10)
    for trial in driver.trials:
        driver.course.settle(trial)

    more = Driver("search.trials=10", "search.max_concurrent=2")

    assert outline(more.trials[:8]) == outline(driver.trials)
    assert all(trial.settled for trial in more.trials[:8])
    assert [trial.name for trial in more.course.left] == ["trial-08", "trial-09"]


def test_a_failed_trial_is_not_run_again_and_keeps_its_error() -> None:
    driver = Driver()
    driver.course.begin(driver.trials[0])
    driver.course.end(driver.trials[0], "failed", "no such file")

    again = Driver()

    assert driver.said[-1] == "trial-00  failed: no such file"
    assert (again.trials[0].outcome, again.trials[0].error) == ("failed", "no such file")
    assert again.trials[0] not in again.course.left


def test_what_was_settled_before_a_trial_went_on_is_to_be_settled_again() -> None:
    driver = Driver()
    driver.course.begin(driver.trials[0])
    driver.course.settle(driver.trials[0])
    again = Driver()
    assert again.trials[0].settled
    again.course.begin(again.trials[0])

    assert not again.trials[0].settled


def test_whoever_wants_to_know_hears_which_trials_begin_and_end() -> None:
    driver = Driver("search.grace_period=9")
    first, second = driver.begin(), driver.begin()
    for epoch in range(1, EPOCHS + 1):
        driver.result(first, epoch, 0.1)
    driver.course.complete(first)
    driver.course.end(second, "failed", "no such file")

    assert driver.changes == [
        ("trial-00", "running"),
        ("trial-01", "running"),
        ("trial-00", "finished"),
        ("trial-01", "failed"),
    ]


WEIGHTS = """
name: small
data: {scenes: {}}
model: {backbone: {weights: a.pth}}
search: {algorithm: grid, space: {model.backbone.weights: {choice: [a.pth, null]}}}
"""


def test_a_search_over_what_defaults_follow_from_goes_on() -> None:
    """Without weights the norm is another one, and the experiment as resolved names it."""
    driver = Driver(file=WEIGHTS)
    driver.begin()

    again = Driver(file=WEIGHTS)

    assert [trial.experiment.model.backbone.norm for trial in again.trials] == ["frozen_bn", "group_norm"]
    assert tell(again.record.events).trials["trial-00"].outcome == "waiting"


def test_a_driver_that_lost_the_search_writes_nothing(folder: Path) -> None:
    Driver()
    before = (folder / RECORD).read_text()
    loaded = load_experiment("x.yaml")

    def refuse() -> None:
        raise UserError("another has it")

    with pytest.raises(UserError, match="another has it"):
        Course(Plan(loaded), plan(loaded), Record(Storage(folder)), print, allowed=refuse).open()
    assert (folder / RECORD).read_text() == before


def refusal(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        Driver(*overrides)
    return str(caught.value)


def test_a_changed_search_is_refused_with_the_difference() -> None:
    Driver()

    assert refusal("optim.lr=1e-2", "search.metric=gap/AP", "search.space.seed={int: [0, 3]}").splitlines() == [
        "search small: it was started from another experiment. What changed:",
        "  optim.lr: 0.0003 -> 0.01",
        '  search.metric: "student/AP" -> "gap/AP"',
        "  search.space.seed.int: nothing -> [0, 3]",
        "Give the new one another name, or start anew with --fresh, which removes the old one and its trials.",
    ]


def test_fewer_trials_than_before_are_refused() -> None:
    Driver()

    assert "found 3 trials where 8 were planned before; expected as many or more" in refusal("search.trials=3")


def test_values_that_are_drawn_otherwise_are_refused(folder: Path) -> None:
    driver = Driver()
    value = driver.trials[2].values["optim.lr"]
    (folder / RECORD).write_text((folder / RECORD).read_text().replace(str(value), "0.5"))

    assert f"What changed:\n  trial-02: optim.lr: 0.5 -> {value}\n" in refusal()


def test_a_decision_that_does_not_follow_from_the_results_is_named(folder: Path) -> None:
    driver = Driver()
    for trial, value in zip(driver.trials[:2], (0.5, 0.1), strict=True):
        driver.course.begin(trial)
        driver.result(trial, 1, value)
    file = folder / RECORD
    file.write_text(file.read_text().replace('"step": 10, "value": 0.5', '"step": 10, "value": 0.05'))

    message = refusal()
    assert "the decision about trial-01 at epoch 1 does not follow from the results before it: found " in message
    assert '"values": [0.5], "cutoff": 0.5, "reason": "rung", "spent": null}, expected' in message


def test_a_damaged_line_is_named(folder: Path) -> None:
    Driver()
    with (folder / RECORD).open("a") as file:
        file.write('{"event": "sta\n')

    assert refusal().endswith(
        f'{RECORD}:2: found \'{{"event": "sta\', expected an event; --fresh starts the search anew'
    )


def test_a_folder_of_something_else_is_refused(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "experiment.yaml").write_text("")

    assert refusal() == f"search small: {folder} holds something that is no search; expected another name"


def test_a_trial_that_the_search_did_not_make_is_refused(folder: Path) -> None:
    Driver()
    folder.with_name("small-trial-03").mkdir()

    assert refusal() == (
        f"search small: it was run before, {folder}-trial-03 exists; expected another name, or --fresh, which removes "
        "its trials and starts anew"
    )


@pytest.mark.slow
def test_a_search_that_starts_anew_leaves_nothing_of_an_earlier_one(folder: Path) -> None:
    driver = Driver("search.trials=3")
    loaded = load_experiment("x.yaml", ["search.trials=2"])
    uri, project = f"sqlite:///{folder.parent}/mlflow.db", loaded.experiment.where.project

    def open_all() -> list[str]:
        known = {trial.experiment.name: identity(trial.experiment) for trial in driver.trials}
        known["small"] = search_identity(loaded.experiment)
        return [tracking.open_run(uri, project, name, each, {}, {}) for name, each in known.items()]

    before = open_all()
    for trial, run_id in zip(driver.trials, before, strict=False):
        run = runs.Run(runs.storage_of(trial.experiment), identity(trial.experiment), uri, run_id, (), "killed")
        run.write()
    for name in ("small-trial-00-notes", "large-trial-00"):
        folder.with_name(name).mkdir()
    (folder / LEASE).write_text("{}")
    for name in (SEARCH, BEST):
        (folder / name).write_text("")
    (folder / TUNE).mkdir()

    remove(loaded.experiment, plan(loaded), Storage(folder), uri)

    assert [file.name for file in folder.iterdir()] == [LEASE]
    assert {file.name for file in folder.parent.iterdir() if file.is_dir()} >= {
        "small-trial-00-notes",
        "large-trial-00",
    }
    assert not [file for file in folder.parent.glob("small-trial-*") if not file.name.endswith("notes")]
    assert set(open_all()).isdisjoint(before)


@pytest.mark.slow
def test_the_processes_of_a_killed_driver_are_waited_for(folder: Path) -> None:
    driver = Driver("search.trials=2")
    lease = Lease.take(runs.storage_of(driver.trials[1].experiment), "small-trial-01")
    timer = threading.Timer(1.0, lease.release)
    timer.start()
    console = Console(file=io.StringIO(), width=200)
    start = time.monotonic()

    wait_for_drivers(driver.trials, console)

    assert 1.0 <= time.monotonic() - start < 10
    assert isinstance(console.file, io.StringIO)
    assert f"trial-01: waiting for process {os.getpid()} on " in console.file.getvalue()
    timer.join()


def test_processes_that_do_not_end_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver("search.trials=1")
    monkeypatch.setattr("mimiclab.search.earlier._PATIENCE_S", 0.0)
    with (
        Lease.take(runs.storage_of(driver.trials[0].experiment), "small-trial-00"),
        pytest.raises(UserError, match=rf"^trial-00: process {os.getpid()} on .* still trains it"),
    ):
        wait_for_drivers(driver.trials, Console(file=io.StringIO()))


def test_a_record_is_kept_where_nothing_can_be_appended() -> None:
    storage = Storage("mock:///small")  # in memory
    storage._open()[0].create_dir("small")
    record = Record(storage)
    record.add(stamped({"event": "started", "trial": "trial-00"}))
    record.add(stamped({"event": "resumed", "trial": "trial-00"}))

    assert [event["event"] for event in Record(storage).events] == ["started", "resumed"]
    lines = storage.read(RECORD).decode().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["started", "resumed"]


def test_a_loss_that_becomes_nan_prunes_its_trial_and_other_errors_fail_it() -> None:
    from mimiclab.search.tuning import judge

    assert judge(NonFiniteLossError("step 2: loss nan")) == ("pruned", "step 2: loss nan")
    assert judge(NoRetryError("scale.max_crashes: 3")) == ("failed", "scale.max_crashes: 3")
    assert judge(UserError("first\nsecond")) == ("failed", "first\nsecond")
    assert judge(KeyError("Traceback\n  x\nRuntimeError: y\n")) == ("failed", "'Traceback\\n  x\\nRuntimeError: y\\n'")
