"""Two seeds of an experiment on a real Ray cluster and a real MLflow store."""

import io
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from rich.console import Console
from tinyruns import TINY

from mimiclab import checkpoint, runs
from mimiclab.experiment import load_experiment
from mimiclab.seeds import train_seeds


def train_two(root: Path) -> list[str]:
    """Run the command with two seeds; the lines that it prints."""
    (root / "tiny.yaml").write_text(TINY.replace("ROOT", str(root)))
    loaded = load_experiment(root / "tiny.yaml", ["scale.workers=1", "optim.epochs=1", "seed=3"])
    console = Console(file=io.StringIO(), width=200)
    train_seeds(loaded, 2, console=console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def table_in(lines: list[str]) -> list[str]:
    return lines[lines.index(next(line for line in lines if "last evaluation of each run" in line)) :]


@pytest.mark.cluster
@pytest.mark.usefixtures("ray_cluster")
def test_two_seeds_are_two_runs_under_a_parent_with_their_mean(tmp_path: Path) -> None:
    lines = train_two(tmp_path)

    names = ["tiny-seed-3", "tiny-seed-4"]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [".data", *names]
    children = [runs.find(name, str(tmp_path / "runs")) for name in names]
    ends = [checkpoint.latest(run.checkpoints, warn=pytest.fail) for run in children]
    first, second = (end.weights() for end in ends if end is not None)
    assert any(not torch.equal(first[name], second[name]) for name in first)

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    project = [client.get_experiment_by_name("mimiclab").experiment_id]
    (parent,) = client.search_runs(project, "attributes.run_name = 'tiny'")
    assert (parent.info.status, parent.data.tags["mimiclab.kind"]) == ("FINISHED", "seeds")
    found = client.search_runs(project, f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert {run.info.run_id for run in found} == {run.mlflow_run_id for run in children}
    for metric in ("student/AP", "student/AP50", "teacher/AP75", "gap/AP"):
        a, b = (run.data.metrics[metric] for run in found)
        assert parent.data.metrics[f"mean/{metric}"] == pytest.approx((a + b) / 2)
        # Two values: s / sqrt 2 is half of their distance.
        assert parent.data.metrics[f"interval/{metric}"] == pytest.approx(12.7062 * abs(a - b) / 2, rel=1e-4)

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*")}
    again = train_two(tmp_path)
    assert table_in(again) == table_in(lines)
    assert not any("starting" in line for line in again)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*")} == before
    assert len(client.get_metric_history(parent.info.run_id, "mean/student/AP")) == 1
    assert client.get_run(parent.info.run_id).info.status == "FINISHED"
