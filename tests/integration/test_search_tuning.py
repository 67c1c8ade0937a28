"""Ray Tune runs what the course of a search gives it, over deaths of processes too; a formula stands for training."""

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import tune
from searches import Driver

from mimiclab import runs
from mimiclab.errors import PreemptedError, UserError
from mimiclab.schema import Experiment
from mimiclab.search.record import Record, check
from mimiclab.search.tuning import tune_trials
from mimiclab.storage import Storage

pytestmark = pytest.mark.cluster

EPOCHS = 9


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_cluster: None) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def trainable(folder: Path) -> Any:
    """The first trial's process dies in its fourth epoch, once; the second one's always; machines of the third go."""

    # Within: processes of Ray's get a copy, since they do not find this file's imports.
    def train(config: Mapping[str, Any]) -> None:
        name = config["name"]
        experiment = Experiment.model_validate_json(config["experiment"])
        saved = folder / f"{name}.saved"
        first = int(saved.read_text()) if saved.exists() else 1
        for epoch in range(first, experiment.optim.epochs + 1):
            if name == "trial-01" or (name == "trial-00" and epoch == 4 and first == 1):
                saved.write_text(str(epoch))
                os.kill(os.getpid(), signal.SIGKILL)
            if name == "trial-02":
                raise PreemptedError("scale.max_preemptions: 0")
            tune.report({"epoch": epoch, "step": 10 * epoch, "student/AP": experiment.optim.lr * epoch})

    return train


def run(driver: Driver, folder: Path, concurrent: int) -> None:
    place = runs.storage_of(driver.plan.experiment)
    tune_trials(driver.course, trainable(folder), {"CPU": 0}, place, concurrent=concurrent)


def test_a_search_by_optuna_with_several_seeds_over_deaths_of_processes(folder: Path) -> None:
    overrides = ("search.algorithm=optuna", "search.trials=4", "search.seeds_per_trial=2", "scale.max_crashes=1")
    driver = Driver(*overrides)
    run(driver, folder, concurrent=2)

    first, second, third, fourth = driver.trials
    assert (first.outcome, first.evaluations[-1][0]) == ("finished", EPOCHS)
    assert second.outcome == "failed"
    assert second.error is not None
    assert second.error.startswith("scale.max_crashes: 1, and its process died 2 times without a new evaluation; the ")
    assert (third.outcome, third.error) == ("preempted", "scale.max_preemptions: 0")
    assert fourth.outcome in ("finished", "pruned")
    assert [repeat.outcome for repeat in first.repeats] == ["finished"]
    events = driver.record.events
    about = [event["event"] for event in events if event.get("trial") == "trial-00" and "seed" not in event]
    assert [kind for kind in about if kind not in ("result", "decision")] == ["started", "retried", "resumed", "ended"]
    assert {event["where"] for event in events if event["event"] == "started"} == {ray.util.get_node_ip_address()}
    check(Record(Storage(folder / "runs" / "small")), "small")
    assert Driver(*overrides).course.is_over


def test_a_budget_that_is_spent_ends_a_search(folder: Path) -> None:
    driver = Driver("name=frugal", "search.budget=1e-9", "search.grace_period=9")
    run(driver, folder, concurrent=1)

    assert [trial.outcome for trial in driver.trials] == ["out of budget"] + 7 * ["waiting"]
    assert driver.trials[0].epochs == 1


def test_a_space_in_which_nothing_fits_ends_a_search(folder: Path) -> None:
    space = "search.space={model.pyramid.stagger: {choice: [1]}, model.pyramid.min_level: {choice: [2]}}"
    driver = Driver("name=unfit", "search.algorithm=optuna", "search.trials=2", "model.pyramid.stagger=0", space)
    with pytest.raises(UserError, match=r"search.space: 50 proposals in a row do not fit together"):
        run(driver, folder, concurrent=1)
