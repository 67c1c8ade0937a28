"""A search and its trials in a sqlite store."""

import pytest

from mimiclab.tracking import runs, searches
from mimiclab.tracking.client import connect
from mimiclab.tracking.searches import PARENT_TAG


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('searches')}/mlflow.db"


def open_search(uri: str, name: str, num_trials: int) -> tuple[str, list[str]]:
    parent = searches.open_search(uri, "cells", name, "abc", {"search.trials": str(num_trials)}, "Looks for *lr*.")
    tags = {PARENT_TAG: parent}
    return parent, [runs.open_run(uri, "cells", f"{name}-{i}", "abc", {}, tags) for i in range(num_trials)]


@pytest.mark.slow
def test_the_newest_search_is_the_one_to_compare(uri: str) -> None:
    assert searches.newest_search(uri, "cells") is None
    runs.open_run(uri, "cells", "plain", "abc", {}, {})
    assert searches.newest_search(uri, "cells") is None

    open_search(uri, "first", 2)
    _, trials = open_search(uri, "second", 3)
    runs.open_run(uri, "cells", "plain again", "abc", {}, {})

    found = searches.newest_search(uri, "cells")
    assert found is not None
    assert (found.name, found.trials) == ("second", trials)
    assert searches.newest_search(uri, "others") is None


def test_the_end_of_a_trial_is_told_in_full(uri: str) -> None:
    _, (trial, other) = open_search(uri, "ended", 2)
    values = {"optim.lr": 0.1, "seed": 3, "model.mimic.detach_teacher": True, "optim.name": "sgd", "x": None}

    searches.end_trial(uri, trial, "pruned", "KILLED", values, None)
    searches.end_trial(uri, other, "failed", "FAILED", {}, "out of memory")

    run, failed = (connect(uri).get_run(run_id) for run_id in (trial, other))
    assert (run.info.status, failed.info.status) == ("KILLED", "FAILED")
    assert run.data.metrics == {"optim.lr": 0.1, "seed": 3}
    assert (run.data.tags["trial.outcome"], failed.data.tags["trial.outcome"]) == ("pruned", "failed")
    assert "trial.error" not in run.data.tags
    assert failed.data.tags["trial.error"] == "out of memory"


@pytest.mark.parametrize(
    ("metric", "is_sum", "key"),
    [
        ("gap/AP", False, "best/gap/AP"),
        ("student/AP/50 % / &", False, "best/student/AP/50 _ _ _"),
        ("student/AP - 0.5 gap/AP + 2 x", True, "best/student_AP - 0.5 gap_AP plus 2 x"),
    ],
)
def test_the_best_value_has_a_key_that_mlflow_takes(uri: str, metric: str, is_sum: bool, key: str) -> None:
    parent, _ = open_search(uri, key, 0)
    assert searches.best_key(metric, is_sum=is_sum) == key

    connect(uri).log_metric(parent, key, 0.5)

    assert connect(uri).get_run(parent).data.metrics == {key: 0.5}


def test_the_end_of_a_trial_that_is_told_again_logs_no_value_again(uri: str) -> None:
    _, (trial,) = open_search(uri, "again", 1)
    searches.end_trial(uri, trial, "killed", "KILLED", {"optim.lr": 0.1, "seed": 3}, "by Ctrl-C")
    searches.end_trial(uri, trial, "finished", "FINISHED", {"optim.lr": 0.1, "seed": 3}, None)

    client = connect(uri)
    assert [len(client.get_metric_history(trial, key)) for key in ("optim.lr", "seed")] == [1, 1]
    run = client.get_run(trial)
    assert (run.info.status, run.data.tags["trial.outcome"]) == ("FINISHED", "finished")
    assert "trial.error" not in run.data.tags


def test_the_end_of_a_search_tells_the_best_trial(uri: str) -> None:
    parent, _ = open_search(uri, "done", 0)
    assert connect(uri).get_run(parent).data.tags["mlflow.note.content"] == "Looks for *lr*."

    searches.end_search(uri, parent, "FINISHED", "trial-03", {"spent/core-hours": 0.5}, "Found *lr*.")

    run = connect(uri).get_run(parent)
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {"spent/core-hours": 0.5}
    assert run.data.tags["search.best_trial"] == "trial-03"
    assert run.data.tags["mlflow.note.content"] == "Found *lr*."


def test_a_search_in_which_nothing_was_evaluated_has_no_best_trial(uri: str) -> None:
    parent, _ = open_search(uri, "empty", 0)

    searches.end_search(uri, parent, "KILLED", None, {}, "")

    run = connect(uri).get_run(parent)
    assert run.info.status == "KILLED"
    assert "search.best_trial" not in run.data.tags
    assert run.data.metrics == {}
