"""A trial that is promoted and trained gives the numbers that the search recorded of it, and the search its report."""

import io
import json
from pathlib import Path

import pytest
from mlflow import MlflowClient
from rich.console import Console
from tinyruns import TINY, history, quiet

from mimiclab import runs
from mimiclab.experiment import LoadedExperiment, load_experiment
from mimiclab.search.driver import search
from mimiclab.search.promote import promote
from mimiclab.search.record import RECORD
from mimiclab.search.report import REPORT, TEXT
from mimiclab.search.trials import Trial
from mimiclab.train import train

pytestmark = pytest.mark.cluster

SEARCH = """
name: look
scale: {workers: 1}
search:
  metric: student/AR100
  algorithm: grid
  max_t: 2
  grace_period: 2
  max_concurrent: 1
  space:
    model.inference.max_detections: {choice: [100, 50]}
"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedExperiment:
    root = tmp_path_factory.mktemp("promote")
    (root / "tiny.yaml").write_text(TINY.replace("ROOT", str(root)))
    (root / "look.yaml").write_text("extends: tiny.yaml\n" + SEARCH)
    return load_experiment(root / "look.yaml")


@pytest.fixture(scope="module")
def ranking(loaded: LoadedExperiment, ray_cluster: None) -> list[Trial]:
    return search(loaded, console=quiet())


def test_a_promoted_trial_trains_to_the_same_numbers(
    ranking: list[Trial], loaded: LoadedExperiment, ray_cluster: None
) -> None:
    storage = Path(loaded.experiment.where.storage)
    chosen = ranking[1]
    file = promote("look", chosen.name, output=storage / "again.yaml", storage=str(storage))

    run = train(load_experiment(file).experiment, console=Console(file=io.StringIO()))

    assert run.name == f"look-{chosen.name}-promoted"
    epochs = [json.loads(line) for line in (storage / "look" / RECORD).read_text().splitlines()]
    recorded = [
        (event["step"], event["value"])
        for event in epochs
        if event["event"] == "result" and event["trial"] == chosen.name
    ]
    assert len(recorded) == 2
    assert history(run, "student/AR100") == recorded
    first = runs.find(f"look-{chosen.name}", str(storage))
    assert history(run, "train/loss") == history(first, "train/loss")
    # And the file names the runs that it comes from.
    text = file.read_text()
    assert f"run look-{chosen.name}, identity {first.identity}" in text
    parent = MlflowClient(first.tracking).get_run(first.mlflow_run_id).data.tags["mlflow.parentRunId"]
    assert f"run {first.mlflow_run_id}, of the search {parent}" in text


def test_the_search_leaves_its_report(ranking: list[Trial], loaded: LoadedExperiment) -> None:
    folder = Path(loaded.experiment.where.storage) / "look" / REPORT
    assert "2 finished" in (folder / TEXT).read_text()
    run = runs.find(f"look-{ranking[0].name}", loaded.experiment.where.storage)
    client = MlflowClient(run.tracking)
    parent = client.get_run(run.mlflow_run_id).data.tags["mlflow.parentRunId"]
    artifacts = {Path(file.path).name for file in client.list_artifacts(parent, REPORT)}
    assert artifacts == {path.name for path in folder.iterdir()} >= {TEXT, "curves.png"}
