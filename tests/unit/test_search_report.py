"""What a report says of searches that were made up: nothing but their records is read."""

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from madeup import FILE, START, STEPS, MadeUp, effect, rising
from mlflow import MlflowClient
from PIL import Image

from mimiclab.search import figures
from mimiclab.search.cost import costs
from mimiclab.search.importance import MIN_TRIALS, Importance, Unknown, importance
from mimiclab.search.report import REPORT, TEXT, report, write_report
from mimiclab.search.story import SearchStory, tell
from mimiclab.tracking import searches

NAN = math.nan


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> MadeUp:
    """One finishes, two are cut at different rungs, one is NaN, one fails, one runs, six wait."""
    made = MadeUp(tmp_path_factory.mktemp("mixed"))
    made.run(0, rising(0.30))
    made.run(1, rising(0.20))
    made.run(2, lambda epoch: 0.50 if epoch == 1 else 0.01)
    made.start(3)
    made.result(3, 1, NAN)
    made.end(3, "pruned", "the loss is NaN at step 10")
    made.start(4)
    made.end(4, "failed", "weights none.safetensors: no such file")
    made.start(5)
    made.result(5, 1, 0.4)
    return made


@pytest.fixture(scope="module")
def story(mixed: MadeUp) -> SearchStory:
    return tell(mixed.events)


def search(folder: Path, num: int, objective: Any, text: str = FILE, *, epochs: int | None = None) -> MadeUp:
    """A search whose trials run one after the other."""
    made = MadeUp(folder, text, f"search.trials={num}")
    for number, trial in enumerate(made.trials):
        made.run(number, rising(objective(trial.values)), epochs)
    return made


# ---- the story ----


def test_each_trial_is_as_far_as_the_record_tells(story: SearchStory) -> None:
    told = [(trial.name, trial.outcome, trial.t) for trial in list(story.trials.values())[:7]]
    assert told == [
        ("trial-00", "finished", 9),
        ("trial-01", "pruned", 1),
        ("trial-02", "pruned", 3),
        ("trial-03", "pruned", 1),
        ("trial-04", "failed", 0),
        ("trial-05", "running", 1),
        ("trial-06", "waiting", 0),
    ]
    assert [trial.name for trial in story.ranked()[:4]] == ["trial-02", "trial-05", "trial-00", "trial-01"]
    assert story.rungs == (1, 3)
    first = story.trials["trial-00"]
    assert (first.where, first.rung, first.cut) == ("node-1", 3, None)
    assert [point.step for point in first.curve[:2]] == [STEPS, 2 * STEPS]


def test_a_cut_tells_the_rung_and_what_the_value_was_compared_with(story: SearchStory) -> None:
    cuts = {name: trial.cut for name, trial in story.trials.items() if trial.cut}
    assert set(cuts) == {"trial-01", "trial-02"}  # NaN was not compared, it is an error
    second = cuts["trial-01"]
    assert second is not None
    assert (second.rung, second.t, second.cutoff) == (1, 1, pytest.approx(rising(0.30)(1)))
    third = cuts["trial-02"]
    assert third is not None
    assert (third.rung, third.t, third.cutoff) == (3, 3, pytest.approx(rising(0.30)(3)))


def test_a_trial_of_a_driver_that_died_waits_until_it_is_resumed(tmp_path: Path) -> None:
    made = MadeUp(tmp_path)
    made.start(0)
    made.result(0, 1, 0.1)
    assert tell(made.events).trials["trial-00"].outcome == "running"
    made.driver(wait=1000)
    assert tell(made.events).trials["trial-00"].outcome == "waiting"
    made.add("resumed", 0, where="node-2")
    trial = tell(made.events).trials["trial-00"]
    assert (trial.outcome, trial.where, trial.since, trial.t) == ("running", "node-2", made.now, 1)
    made.add("settled", 0)
    assert tell(made.events).trials["trial-00"].outcome == "killed"


def test_a_trial_that_the_budget_stopped_was_not_cut(tmp_path: Path) -> None:
    made = MadeUp(tmp_path, FILE, "search.budget=0.01")
    made.start(0)
    assert not made.result(0, 1, 0.5)
    made.end(0, "out of budget")
    trial = tell(made.events).trials["trial-00"]
    assert (trial.outcome, trial.cut) == ("out of budget", None)


def test_a_record_of_an_earlier_version_is_understood(tmp_path: Path) -> None:
    """It has neither steps nor values, places and resources of trials."""
    made = MadeUp(tmp_path)
    made.run(0, rising(0.3))
    made.run(1, rising(0.2))
    missing = {"started": {"values", "where", "resources"}, "result": {"step"}, "decision": {"reason", "spent"}}
    missing["search"] = {"unit", "budget"}
    old = [{k: v for k, v in event.items() if k not in missing.get(event["event"], ())} for event in made.events]
    story = tell(old)
    assert [trial.outcome for trial in list(story.trials.values())[:2]] == ["finished", "pruned"]
    assert story.trials["trial-01"].cut is not None
    assert [cost.unit for cost in costs(story)] == ["epochs", "core-hours"]


def test_a_search_in_steps_is_told_in_steps(tmp_path: Path) -> None:
    made = MadeUp(tmp_path)
    made.run(0, rising(0.3))
    events = [{**event, "unit": "steps", "max_t": 90} if event["event"] == "search" else event for event in made.events]
    events = [event for event in events if event["event"] != "decision"]
    story = tell(events)
    assert (story.unit, story.max_t, story.trials["trial-00"].t) == ("step", 90, 90)
    assert [cost.unit for cost in costs(story)] == ["steps", "core-hours"]


# ---- what it cost ----


def test_cut_trials_save_what_they_were_not_trained(story: SearchStory) -> None:
    """Nine, one, three, one, none and one epochs; those that an error ended would have had no more."""
    epochs, steps, hours = costs(story)
    assert (epochs.spent, epochs.full) == (15, 15 + 8 + 6 + 8)
    assert (steps.spent, steps.full) == (STEPS * 15, STEPS * 37)
    # A minute an epoch on two cores.
    assert hours.unit == "core-hours"
    assert hours.spent == pytest.approx(2 * 15 / 60, abs=1e-6)
    assert hours.full == pytest.approx(2 * 37 / 60, abs=1e-6)
    assert epochs.share == pytest.approx(15 / 37)


def test_the_time_between_two_drivers_is_neither_spent_nor_extrapolated(tmp_path: Path) -> None:
    made = MadeUp(tmp_path)
    made.start(0)
    made.result(0, 1, 0.1)
    made.result(0, 2, 0.2)
    made.driver(wait=100_000)
    made.add("resumed", 0, resources={"CPU": 2.0})
    made.result(0, 3, 0.3)
    made.result(0, 4, 0.3)
    *_, hours = costs(tell(made.events))
    assert hours.spent == pytest.approx(2 * 4 / 60, abs=1e-6)
    assert hours.full == pytest.approx(2 * 9 / 60, abs=1e-6)


def test_hours_are_not_guessed_where_no_trial_tells_its_pace(tmp_path: Path) -> None:
    made = MadeUp(tmp_path)
    made.start(0)
    made.result(0, 1, 0.1)
    assert [cost.unit for cost in costs(tell(made.events))] == ["epochs", "steps"]


# ---- which keys mattered ----


@pytest.mark.slow
def test_the_key_that_matters_is_found_and_the_other_is_not(tmp_path: Path) -> None:
    noise = random.Random(0)
    events = search(tmp_path, 40, lambda values: effect(values, noise)).events
    found = importance(tell(events))
    assert found == importance(tell(events))
    assert isinstance(found, Importance)
    assert found.keys == ("optim.lr", "model.pyramid.stagger")
    assert found.mean[0] > 0.3 > 0.05 > abs(found.mean[1])
    assert found.r2 > 0.5


@pytest.mark.slow
def test_trials_are_compared_after_the_same_training(tmp_path: Path) -> None:
    """Those that were not cut are far above the others by their last values, which says nothing of their keys."""
    noise = random.Random(1)
    found = importance(tell(search(tmp_path, 30, lambda values: effect(values, noise)).events))
    assert isinstance(found, Importance)
    assert (found.t, found.trials) == (1, 30)


def test_of_a_full_sweep_the_ends_are_compared(tmp_path: Path) -> None:
    noise = random.Random(1)
    text = FILE.replace("reduction_factor: 3", "grace_period: 9")
    found = importance(tell(search(tmp_path, 30, lambda values: effect(values, noise), text).events))
    assert isinstance(found, Importance)
    assert found.t == 9


def test_few_trials_have_no_importance(tmp_path: Path) -> None:
    found = importance(tell(search(tmp_path, MIN_TRIALS - 1, lambda values: effect(values, random.Random(0))).events))
    assert isinstance(found, Unknown)
    assert found.reason.endswith(
        f"it takes {MIN_TRIALS} different trials that ran to their end or were cut; there are 7"
    )


def test_equal_trials_are_not_counted_twice(tmp_path: Path) -> None:
    text = FILE.replace("{loguniform: [1e-4, 1e-2]}", "{choice: [1e-3]}")
    found = importance(tell(search(tmp_path, 12, lambda values: 0.3, text).events))
    assert isinstance(found, Unknown)
    assert "there are 2" in found.reason


def test_noise_has_no_importance(tmp_path: Path) -> None:
    noise = random.Random(3)
    found = importance(tell(search(tmp_path, 20, lambda values: noise.uniform(0.1, 0.3)).events))
    assert isinstance(found, Unknown)
    assert "no better than their mean" in found.reason


def test_equal_values_have_no_importance(tmp_path: Path) -> None:
    found = importance(tell(search(tmp_path, 12, lambda values: 0.0).events))
    assert isinstance(found, Unknown)
    assert found.reason == "all 12 trials had the same value at epoch 9"


# ---- the report ----


def test_the_report_of_a_search_under_way(mixed: MadeUp, story: SearchStory) -> None:
    write_report(mixed.events, mixed.storage)
    folder = mixed.storage.local
    assert folder is not None
    assert {path.name for path in (folder / REPORT).iterdir()} == {TEXT, "curves.png", "keys.png", "parallel.png"}
    text = (folder / REPORT / TEXT).read_text()
    assert "compared at 1 and 3: 1 failed, 1 finished, 3 pruned, 1 running, 6 waiting" in text
    assert "The best is **trial-02** (pruned) with 0.5000: `optim.lr`" in text
    rows = [line.split("|")[2:6] for line in text.splitlines() if line.startswith(("| 1 |", "| 2 |", "| 3 |"))]
    assert [[cell.strip() for cell in row] for row in rows[:3]] == [
        ["trial-02", "pruned", "0.5000", "1"],
        ["trial-05", "running", "0.4000", "1"],
        ["trial-00", "finished", "0.2851", "9"],
    ]
    assert "| epochs | 15 | 37 | 59 % |" in text
    assert "6 trials were never begun" in text
    assert f"| trial-01 | 1 | {rising(0.2)(1):.4f} | {rising(0.3)(1):.4f} |" in text
    assert "Not known: it takes 8 different trials" in text
    assert "- trial-03 (pruned): the loss is NaN at step 10" in text
    assert "- trial-04 (failed): weights none.safetensors: no such file" in text
    assert "One run each" in text
    for name in ("curves.png", "keys.png", "parallel.png"):
        assert f"]({name})" in text


@pytest.mark.slow
def test_the_report_of_a_search_with_importance_shows_it(tmp_path: Path) -> None:
    noise = random.Random(0)
    made = search(tmp_path, 40, lambda values: effect(values, noise))
    write_report(made.events, made.storage)
    assert "importance.png" in (made.storage / REPORT).sizes()
    text = made.storage.read(f"{REPORT}/{TEXT}").decode()
    assert "![importance](importance.png)" in text
    assert "| key | importance | ± |\n|---|---|---|\n| `optim.lr` |" in text
    assert "1 epochs are what each of them had that was cut or finished" in text


def test_several_seeds_give_a_mean_and_its_interval(tmp_path: Path) -> None:
    """Of 0.30, 0.33 and 0.36: t of two degrees of freedom is 4.3027, the standard error 0.03 / sqrt(3)."""
    made = MadeUp(tmp_path, FILE, "search.seeds_per_trial=3")
    made.run(0, lambda epoch: 0.30 * epoch / 9)
    made.run(1, lambda epoch: 0.25 * epoch / 9)
    for seed, best in ((1, 0.33), (2, 0.36)):
        made.start(0, seed=seed)
        made.result(0, 9, best, seed=seed)
        made.end(0, "finished", seed=seed)
    made.start(1, seed=1)
    made.result(1, 9, 0.9, seed=1)  # not over, so it does not count
    story = tell(made.events)
    assert [trial.name for trial in story.ranked()[:2]] == ["trial-00", "trial-01"]
    assert story.trials["trial-00"].scores("max") == (0.30, 0.33, 0.36)
    text = report(story, importance(story))
    half = 4.302653 * 0.03 / math.sqrt(3)
    assert f"| 1 | trial-00 | finished | 0.3300 ± {half:.4f} | 3 |" in text
    assert "| 2 | trial-01 | pruned | 0.0278 | 1 |" in text
    assert "95 % interval" in text
    assert "Repeating trials with other seeds took 0.1 hours more." in text
    epochs, *_ = costs(story)
    assert epochs.spent == 10  # the repetitions are no part of it


def test_a_search_in_which_nothing_was_evaluated_has_a_report_without_figures(tmp_path: Path) -> None:
    made = MadeUp(tmp_path)
    made.start(0)
    made.end(0, "failed", "out of memory")
    write_report(made.events, made.storage)
    assert set((made.storage / REPORT).sizes()) == {TEXT}
    text = made.storage.read(f"{REPORT}/{TEXT}").decode()
    assert "Nothing was evaluated yet." in text
    assert "out of memory" in text


def test_a_report_replaces_the_one_before(tmp_path: Path) -> None:
    made = search(tmp_path, 2, lambda values: 0.3)
    write_report(made.events, made.storage)
    assert made.storage.local is not None
    (made.storage.local / REPORT / "old.png").touch()
    write_report(made.events, made.storage)
    assert "old.png" not in (made.storage / REPORT).sizes()


@pytest.mark.slow
def test_the_files_are_artifacts_of_the_parent(tmp_path: Path, mixed: MadeUp) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    parent = searches.open_search(uri, "cells", "look", "abc", {}, "")
    write_report(mixed.events, mixed.storage, (uri, parent))
    found = {Path(file.path).name for file in MlflowClient(uri).list_artifacts(parent, REPORT)}
    assert found == {TEXT, "curves.png", "keys.png", "parallel.png"}


# ---- figures ----

ALL_KINDS = """
name: kinds
data: {scenes: {}}
optim: {epochs: 9}
search:
  trials: 12
  mode: min
  reduction_factor: 3
  space:
    optim.lr: {loguniform: [1e-4, 1e-2]}
    optim.momentum: {uniform: [0, 0.9]}
    optim.weight_decay: {normal: [0.01, 0.001]}
    optim.warmup_steps: {int: [0, 7]}
    model.student.positive_fraction: {choice: [null, 0.25]}
    model.student.offsets: {choice: [learned, none]}
    model.student.offset_init_std: {when: {model.student.offsets: [learned]}, uniform: [0, 1]}
"""


def drawn(path: Path) -> int:
    """How many colours a picture has."""
    with Image.open(path) as picture:
        return len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0))


@pytest.mark.parametrize("draw", [figures.draw_curves, figures.draw_keys, figures.draw_parallel])
@pytest.mark.slow
def test_every_kind_of_key_is_drawn(tmp_path: Path, draw: Any) -> None:
    made = search(tmp_path, 12, lambda values: values["optim.momentum"], ALL_KINDS)
    draw(tmp_path / "x.png", tell(made.events))
    assert drawn(tmp_path / "x.png") > 50


@pytest.mark.parametrize("draw", [figures.draw_curves, figures.draw_keys, figures.draw_parallel])
@pytest.mark.parametrize("values", [[0.3], [NAN, 0.3], [0.3, NAN]])
@pytest.mark.slow
def test_a_single_trial_is_drawn(tmp_path: Path, draw: Any, values: list[float]) -> None:
    made = MadeUp(tmp_path, FILE, "search.trials=1")
    made.start(0)
    for epoch, value in enumerate(values, start=1):
        made.result(0, epoch, value)
    draw(tmp_path / "x.png", tell(made.events))
    assert drawn(tmp_path / "x.png") > 10


@pytest.mark.slow
def test_a_choice_of_one_value_and_a_key_of_one_panel_are_drawn(tmp_path: Path) -> None:
    text = FILE[: FILE.index("    optim.lr")] + "    optim.name: {choice: [sgd]}\n"
    made = search(tmp_path, 3, lambda values: 0.3, text)
    for draw in (figures.draw_keys, figures.draw_parallel):
        draw(tmp_path / "x.png", tell(made.events))
        assert drawn(tmp_path / "x.png") > 10


def test_a_place_on_an_axis_is_as_the_key_was_drawn() -> None:
    assert figures._place({"loguniform": [0.1, 10]}, 1.0) == pytest.approx(0.5)
    assert figures._place({"uniform": [0, 4]}, 1.0) == pytest.approx(0.25)
    assert figures._place({"normal": [1, 0.5]}, 1.0) == pytest.approx(0.5)
    assert [figures._place({"choice": ["a", None, True]}, value) for value in ("a", None, True)] == [0, 0.5, 1]
    assert [label for _, label in figures._ticks({"loguniform": [0.1, 10]})] == ["0.1", "1", "10"]
    assert [label for _, label in figures._ticks({"int": [0, 3]})] == ["0", "1", "2", "3"]


def test_the_story_begins_with_the_record(story: SearchStory) -> None:
    assert story.heard > START
