"""The main job on a real Ray cluster and a real MLflow store. Every fit starts processes for most of a minute,
so few fits show much each."""

import json
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from mlflow import MlflowClient
from tinyruns import NUM_STEPS, TINY, at_step, history, quiet, said, tiny, workers

from mimiclab import checkpoint, runs
from mimiclab import train as train_module
from mimiclab.build import build_detector
from mimiclab.data.dataset import TrainBatches
from mimiclab.data.order import Order
from mimiclab.data.splits import locate, read_splits
from mimiclab.detections import read_detections
from mimiclab.engine import Engine
from mimiclab.errors import UserError
from mimiclab.evaluate import evaluate, score
from mimiclab.predict import load_detector
from mimiclab.tracking.keys import as_key, metric_keys
from mimiclab.tracking.protocol import is_measured
from mimiclab.train import train

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("train")


@pytest.fixture(scope="session")
def finished(root: Path, ray_cluster: None) -> runs.Run:
    """A run of two workers from start to end."""
    return train(tiny(root), console=quiet())


def pictures(run: runs.Run) -> list[tuple[str, int]]:
    """Key and step of each that MLflow holds."""
    files = MlflowClient(run.tracking).list_artifacts(run.mlflow_run_id, "images")
    names = [file.path.split("+") for file in files if file.path.endswith(".png")]
    return sorted((name[0], int(name[2])) for name in names)


def test_every_step_is_in_mlflow_once(finished: runs.Run) -> None:
    losses = history(finished, "train/loss")
    assert [step for step, _ in losses] == list(range(1, NUM_STEPS + 1))
    assert [step for step, _ in history(finished, "student/AP")] == [5, 10, 14]
    assert losses[-1][1] < losses[0][1]


def test_mlflow_holds_what_a_reader_needs(finished: runs.Run) -> None:
    client = MlflowClient(finished.tracking)
    run = client.get_run(finished.mlflow_run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["model.mimic.cls_weight"] == "1.0"
    assert [(d.dataset.name, d.tags[0].value) for d in run.inputs.dataset_inputs] == [
        ("instances_train", "train"),
        ("instances_val", "val"),
    ]
    artifacts = {file.path for file in client.list_artifacts(finished.mlflow_run_id)}
    assert {"experiment.yaml", "images", "evaluation"} <= artifacts
    [model] = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{finished.mlflow_run_id}'")
    assert model.status == "READY"
    assert {m.key: m.value for m in model.metrics}["student/AP"] == max(v for _, v in history(finished, "student/AP"))
    logged = pictures(finished)
    assert len(logged) == 2 * 4
    assert {step for _, step in logged} == {0, 5, 10, 14}  # from before the first step on
    assert len(list((finished.folder / runs.PICTURES).glob("*.png"))) == 2


def test_mlflow_holds_what_an_evaluation_found(finished: runs.Run) -> None:
    client = MlflowClient(finished.tracking)
    held = {file.path for file in client.list_artifacts(finished.mlflow_run_id, "evaluation")}
    names = ("precision_recall.png", "precision_recall.json", "confusion.png", "confusion.json", "errors.png")
    names += ("errors.json", "classes.json", "worst.json", "worst")
    assert held == {f"evaluation/{name}" for name in names}
    for key in ("student/errors/missed", "teacher/errors/background", "student/latency_ms"):
        assert [step for step, _ in history(finished, key)] == [5, 10, 14], key
    last = client.get_run(finished.mlflow_run_id).data.metrics
    table = json.loads(Path(client.download_artifacts(finished.mlflow_run_id, "evaluation/classes.json")).read_text())
    aps = {(row[0], row[1]): row[2] for row in table["data"]}
    for name in finished.classes:
        assert aps["student", name] == pytest.approx(last[f"student/AP/{name}"], abs=1e-4)
    assert not list((finished.folder / runs.UNSENT_FILES).glob("*"))


def test_mlflow_holds_what_ran_where(finished: runs.Run) -> None:
    run = MlflowClient(finished.tracking).get_run(finished.mlflow_run_id)
    assert run.data.tags["version.torch"]
    assert run.data.tags["host.cpu"]
    assert len(run.data.tags["lock.sha256"]) == 64
    assert run.data.metrics["train/memory_mb"] > 100
    assert -1 <= run.data.metrics["train/cosine_reg"] <= 1
    # More than these a run of few seconds need not have.
    assert {name.rpartition("/")[0] for name in run.data.metrics if name.startswith("system/")} <= {
        f"system/{as_key(socket.gethostname())}"
    }


def test_two_workers_take_the_steps_of_one(finished: runs.Run, root: Path) -> None:
    """The losses that Ray's workers logged are those of a plain loop over the same order, up to rounding."""
    experiment = tiny(root)
    splits = read_splits(locate(experiment.data))
    torch.manual_seed(experiment.seed)
    order = Order(len(splits.train.images), experiment.optim.global_batch, experiment.seed)
    engine = Engine(
        build_detector(experiment.model, splits.train.classes),
        experiment.optim,
        num_steps=NUM_STEPS,
        steps_per_epoch=len(splits.train.images) / experiment.optim.global_batch,
    )
    batches = TrainBatches(splits.train, order, short=(56, 64), long=64, flip=experiment.data.flip, rank=0, world=1)
    for step in range(3):
        means = engine.train_step(batches[step])
        for name, value in means.items():
            assert history(finished, f"train/{name}")[step] == (step + 1, pytest.approx(float(value), rel=1e-4))


def test_the_logged_ap_is_that_of_the_saved_weights(finished: runs.Run, root: Path) -> None:
    experiment = tiny(root)
    best = finished.best()
    detector = load_detector(finished, finished.experiment())
    again = evaluate(
        detector, read_splits(locate(experiment.data)).val, experiment.data, experiment.eval, rank=0, world=1
    )
    assert again is not None
    logged = dict(history(finished, "student/AP"))
    assert logged[best.step] == max(logged.values())
    expected = {name: value for name, value in best.meta["metrics"].items() if not is_measured(name)}
    assert {name: again.metrics[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert again.metrics["student/AP"] == pytest.approx(logged[best.step], abs=1e-6)


def test_the_store_has_what_pycocotools_gives_for_the_kept_detections(finished: runs.Run, root: Path) -> None:
    best, kept = finished.best(), read_detections(finished.storage)
    assert kept is not None
    assert kept.step == best.step
    again = score(read_splits(locate(tiny(root).data)).val, [kept.heads]).metrics
    assert {"student/AP", "teacher/AP50", "gap/AP", "student/errors/missed"} <= again.keys()
    assert {f"student/AP/{name}" for name in finished.classes} <= again.keys()
    client = MlflowClient(finished.tracking)
    rows = {name: client.get_metric_history(finished.mlflow_run_id, key) for name, key in metric_keys(again).items()}
    stored = {name: [row.value for row in found if row.step == best.step] for name, found in rows.items()}
    assert stored == {name: [pytest.approx(value, abs=1e-9)] for name, value in again.items()}
    assert {name: best.meta["metrics"][name] for name in again} == pytest.approx(again, abs=1e-9)


def test_a_detector_of_one_head_goes_the_same_way(root: Path) -> None:
    console = quiet()
    overrides = ("name=peer", "model.detector=faster_rcnn", "optim.epochs=1", "scale.workers=1")
    run = train(tiny(root, *overrides), console=console)
    assert [step for step, _ in history(run, "train/loss_rpn_box_reg")] == [1, 2, 3, 4, 5]
    assert len(history(run, "student/AP")) == 1
    metrics = MlflowClient(run.tracking).get_run(run.mlflow_run_id).data.metrics
    assert not [name for name in metrics if name.startswith(("teacher", "gap"))]
    assert "epoch 1: student AP" in said(console)
    assert "teacher" not in said(console)
    assert len(list((run.folder / runs.PICTURES).glob("*.png"))) == 2


def test_a_complete_run_says_so(finished: runs.Run, root: Path) -> None:
    console = quiet()
    assert train(tiny(root), console=console).mlflow_run_id == finished.mlflow_run_id
    assert "complete already" in said(console)
    assert "starting" not in said(console)


def test_a_changed_file_under_the_same_name_is_refused(finished: runs.Run, root: Path) -> None:
    with pytest.raises(UserError, match=r"optim\.lr: 0\.001 -> 0\.002"):
        train(tiny(root, "optim.lr=2e-3"), console=quiet())


def test_a_run_survives_the_death_of_a_worker_with_the_same_weights(finished: runs.Run, root: Path) -> None:
    """A worker is killed by SIGKILL between checkpoints; the run ends bit for bit where `finished` did."""
    experiment = tiny(root, "name=killed")
    console = quiet()
    killer = at_step(runs.folder_of(experiment), 7, lambda: workers()[-1].kill())
    resumed = train(experiment, console=console)
    killer.join(timeout=10)
    # Of the dead worker, or of the other one whose connection broke, whichever Ray hears of first.
    assert "\ncrash: " in said(console)
    assert re.search("training from step [5-9] to step 14 on 2 workers", said(console))
    assert [step for step, _ in history(resumed, "run/restarts")] == [0, 1]
    assert MlflowClient(resumed.tracking).get_run(resumed.mlflow_run_id).data.tags["restart.1"].startswith("crash: ")

    ends = [checkpoint.latest(run.checkpoints, warn=pytest.fail) for run in (finished, resumed)]
    assert ends[0] is not None
    assert ends[1] is not None
    expected, weights = ends[0].weights(), ends[1].weights()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    for key in (
        "train/loss",
        "train/grad_norm",
        "train/cosine_reg",
        "student/AP",
        "teacher/AP50",
        "student/errors/missed",
    ):
        assert history(resumed, key) == history(finished, key)
    assert pictures(resumed) == pictures(finished)


def test_a_damaged_image_met_by_a_worker_is_named(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_module, "DECODE_AHEAD", 0)
    experiment = tiny(root, "name=damaged", f"data.scenes.root={tmp_path}", "scale.workers=1")
    located = locate(experiment.data)
    assert located.train is not None
    image = sorted(Path(located.train.images).iterdir())[3]
    image.write_bytes(image.read_bytes()[:200])
    with pytest.raises(UserError, match=image.name):
        train(experiment, console=quiet())


def test_ctrl_c_stops_cleanly(root: Path, tmp_path: Path) -> None:
    """The command line on a cluster of its own: exit code 130, the run recorded as killed, no process left."""
    file = tmp_path / "long.yaml"
    content = yaml.safe_load(TINY.replace("ROOT", str(root)))
    content |= {"name": "interrupted", "scale": {"workers": 1}}
    content["optim"]["epochs"] = 1000
    file.write_text(yaml.safe_dump(content))
    folder = root / "runs" / "interrupted"
    command = [sys.executable, "-c", "from mimiclab.cli import main; main()", "train", str(file)]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    children: list[psutil.Process] = []

    def interrupt() -> None:
        children.extend(psutil.Process(process.pid).children(recursive=True))
        process.send_signal(signal.SIGINT)

    at_step(folder, 3, interrupt)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 130, output
    assert "same command" in output
    assert "Traceback" not in output
    run = runs.read(folder)
    assert run is not None
    assert run.status == "killed"
    assert MlflowClient(run.tracking).get_run(run.mlflow_run_id).info.status == "KILLED"
    _, alive = psutil.wait_procs(children, timeout=20)
    assert alive == []
