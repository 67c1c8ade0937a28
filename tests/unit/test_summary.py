"""What `train` says at its end; of a run in a bucket, see test_runs_remote.py."""

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from mimiclab import checkpoint, runs
from mimiclab.experiment import identity, load_experiment
from mimiclab.runs import Run
from mimiclab.summary import show_result
from mimiclab.tracking import runs as tracking

METRICS = {f"student/{name}": 0.5 for name in ("AP", "AP50", "AP75")}


def summary(storage: str) -> list[str]:
    """The lines below the table, of a run whose first checkpoint of two is the best."""
    Path("x.yaml").write_text("name: x\ndata: {scenes: {}}\n")
    experiment = load_experiment("x.yaml", [f"where.storage={storage}"]).experiment
    uri, mine = tracking.absolute_uri("sqlite:///mlflow.db"), identity(experiment)
    run_id = tracking.open_run(uri, "mimiclab", "x", mine, {}, {})
    run = Run(runs.prepare(experiment, fresh=False), mine, uri, run_id, ("disk",), "finished")
    for step in (3, 6):
        meta = {"step": step, "classes": ["disk"], "best": {"step": 3, "value": 0.5}, "metrics": METRICS}
        checkpoint.save(run.checkpoints, {"w": torch.zeros(1)}, {}, meta)
    console = Console(file=io.StringIO(), width=400)
    show_result(run, experiment, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()[-4:]


@pytest.mark.slow
def test_a_run_in_the_usual_place_goes_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    weights, pictures, mlflow, try_it = summary("./runs")

    assert weights == "weights:  runs/x/checkpoints/step-00000003/weights.safetensors"
    assert pictures == "pictures: runs/x/pictures"
    assert mlflow.endswith(f"(after: mimiclab ui --tracking sqlite:///{tmp_path}/mlflow.db)")
    assert try_it == "try it:   mimiclab predict x IMAGE..."


@pytest.mark.slow
def test_a_run_elsewhere_goes_by_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    weights, _, _, try_it = summary(f"{tmp_path}/there")

    assert weights == f"weights:  {tmp_path}/there/x/checkpoints/step-00000003/weights.safetensors"
    assert try_it == f"try it:   mimiclab predict {tmp_path}/there/x IMAGE..."
