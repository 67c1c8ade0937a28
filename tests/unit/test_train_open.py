"""A run is opened in MLflow before its workers start: the same one again, or with a word on why not."""

from pathlib import Path

import pytest
from tinyruns import quiet, said, tiny

from mimiclab.tracking import runs as tracking
from mimiclab.tracking.client import connect
from mimiclab.train import _open, check


@pytest.mark.slow
def test_a_run_whose_history_was_deleted_goes_on_in_a_new_one_and_says_so(tmp_path: Path) -> None:
    experiment = tiny(tmp_path)
    uri = tracking.absolute_uri(experiment.where.tracking)
    splits = check(experiment, quiet())
    console = quiet()

    first, again = (_open(experiment, splits, uri, console, fresh=False, tags={}) for _ in range(2))
    assert again.mlflow_run_id == first.mlflow_run_id
    assert said(console) == ""

    connect(uri).delete_run(first.mlflow_run_id)
    third = _open(experiment, splits, uri, console, fresh=False, tags={})
    assert third.mlflow_run_id != first.mlflow_run_id
    assert f"mlflow runs restore --run-id {first.mlflow_run_id} brings it back" in said(console)

    # One that starts anew leaves its history behind on purpose.
    console = quiet()
    _open(experiment, splits, uri, console, fresh=True, tags={})
    assert said(console) == ""
