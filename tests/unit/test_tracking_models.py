"""A run's detector as a model in MLflow: logged once, registered, fetched, and answering without MimicLab."""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric
from trained import CLASSES, add_checkpoint, draw, make_run, track

from mimiclab.data.transforms import resized_size
from mimiclab.errors import UserError
from mimiclab.predict import predict
from mimiclab.runs import Run
from mimiclab.tracking import models, served, ui
from mimiclab.tracking import runs as tracking
from mimiclab.tracking.models import Version, load, log_model, register, registered

pytestmark = pytest.mark.usefixtures("one_thread")

HISTORY = [("student/AP", 0.25, 1000, 3), ("student/AP", 0.5, 2000, 5), ("teacher/AP", 0.75, 1000, 3)]


def tracked(root: Path) -> Run:
    """A run whose best checkpoint, of step 3, was evaluated."""
    run = track(make_run(root), f"sqlite:///{root}/mlflow.db")
    tracking.log_dataset_input(run.tracking, run.mlflow_run_id, "instances_val", "abc", "/data", "val")
    tracking.log_dataset_input(run.tracking, run.mlflow_run_id, "instances_train", "def", "/data", "train")
    MlflowClient(run.tracking).log_batch(run.mlflow_run_id, metrics=[Metric(*row) for row in HISTORY])
    return run


def logged(run: Run) -> list[Any]:
    client = MlflowClient(run.tracking)
    return list(client.search_logged_models([client.get_run(run.mlflow_run_id).info.experiment_id]))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that is champion."""
    run = tracked(tmp_path_factory.mktemp("storage"))
    register(run, "champion")
    return run


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("images") / "a.png", 150, 100)


def expected(run: Run, image: Path, folder: Path) -> dict[str, list[Any]]:
    """What `mimiclab predict` finds, as a served model answers."""
    found = predict(load(run.tracking, "models:/mimiclab@champion"), [image], folder, min_score=0.2).found[image]
    assert len(found) > 10
    return {
        "boxes": [list(each.box) for each in found],
        "scores": [each.score for each in found],
        "labels": [each.label for each in found],
    }


def assert_same(answer: dict[str, list[Any]], wanted: dict[str, list[Any]]) -> None:
    assert answer.keys() == wanted.keys()
    assert answer["labels"] == wanted["labels"]
    np.testing.assert_allclose(answer["scores"], wanted["scores"], rtol=1e-5)
    np.testing.assert_allclose(answer["boxes"], wanted["boxes"], atol=1e-3)


# ---- logging and registering ----


def test_a_model_shows_the_metrics_of_its_step_on_the_data_they_were_measured_on(run: Run) -> None:
    (model,) = logged(run)

    assert (model.name, model.status, model.source_run_id) == ("tiny", "READY", run.mlflow_run_id)
    assert model.params["detector"] == "mimicdet"
    assert [(row.key, row.value, row.step, row.dataset_name, row.dataset_digest) for row in model.metrics] == [
        ("student/AP", 0.25, 3, "instances_val", "abc")
    ]
    record = MlflowClient(run.tracking).get_run(run.mlflow_run_id)
    assert [(each.model_id, each.step) for each in record.outputs.model_outputs] == [(model.model_id, 3)]


def test_the_runs_own_history_stays_as_it_was(run: Run) -> None:
    client = MlflowClient(run.tracking)

    rows = [
        (row.key, row.value, row.timestamp, row.step)
        for key in ("student/AP", "teacher/AP")
        for row in client.get_metric_history(run.mlflow_run_id, key)
    ]

    assert rows == HISTORY


def test_a_model_holds_no_pickle_and_no_code_but_its_own(run: Run) -> None:
    files = {path.relative_to(folder_of(run)).as_posix() for path in folder_of(run).rglob("*") if path.is_file()}

    code = {name for name in files if name.startswith("code/")}
    assert "code/mimicdet/detector.py" in code
    assert all(name.startswith("code/mimicdet/") and name.endswith(".py") for name in code)
    assert files - code == {
        *("MLmodel", "conda.yaml", "python_env.yaml", "requirements.txt", "served.py"),
        *("input_example.json", "serving_input_example.json"),
        *("artifacts/detector.json", "artifacts/weights.safetensors"),
    }
    requirements = (folder_of(run) / "requirements.txt").read_text().split()
    assert all("==" in line and "+" not in line for line in requirements)
    assert {line.partition("==")[0] for line in requirements} >= {"mlflow", "torch", "torchvision", "safetensors"}
    assert not any(line.startswith(("mimiclab", "ray")) for line in requirements)


def folder_of(run: Run) -> Path:
    return Path(logged(run)[0].artifact_location.removeprefix("file://"))


def test_doing_it_again_changes_nothing(run: Run) -> None:
    before = logged(run)

    assert log_model(run) == before[0].model_id
    assert register(run, "champion") == Version("mimiclab", 1, ("champion",), "tiny", 0.25)

    assert [model.model_id for model in logged(run)] == [model.model_id for model in before]
    assert len(registered(run.tracking)) == 1


def test_what_a_killed_process_began_is_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tracked(tmp_path)

    def die(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(models, "_link_metrics", die)  # after all that is done before it
        with pytest.raises(KeyboardInterrupt):
            log_model(run)
    assert [model.status for model in logged(run)] == ["PENDING"]

    log_model(run)

    assert [model.status for model in logged(run)] == ["READY"]
    assert len(MlflowClient(run.tracking).get_run(run.mlflow_run_id).outputs.model_outputs) == 1


@pytest.mark.slow
def test_better_weights_are_a_new_version_and_take_the_alias(tmp_path: Path) -> None:
    run = tracked(tmp_path)
    register(run, "champion", "shapes")
    add_checkpoint(run, step=5)

    assert register(run, "champion", "shapes") == Version("shapes", 2, ("champion",), "tiny", 0.5)
    assert register(run, "challenger", "other").number == 1

    assert registered(run.tracking) == [
        Version("other", 1, ("challenger",), "tiny", 0.5),
        Version("shapes", 2, ("champion",), "tiny", 0.5),
        Version("shapes", 1, (), "tiny", 0.25),
    ]
    pages = json.loads(MlflowClient(run.tracking).get_logged_model(log_model(run)).tags["mlflow.modelVersions"])
    assert pages == [{"name": "shapes", "version": 2}, {"name": "other", "version": 1}]


@pytest.mark.parametrize("alias", ["latest", "v3", "a b", ""])
def test_an_alias_that_mlflow_does_not_take_is_named(run: Run, alias: str) -> None:
    with pytest.raises(UserError, match=rf"--alias '{alias}': expected letters"):
        register(run, alias)


@pytest.mark.parametrize("name", ["a/b", "a:b", "a@b", "../a"])
def test_a_name_that_mlflow_does_not_take_is_named(run: Run, name: str) -> None:
    with pytest.raises(UserError, match=r"--name .*: expected letters"):
        register(run, "champion", name)


def test_a_run_that_was_deleted_has_no_model(tmp_path: Path) -> None:
    run = tracked(tmp_path)
    MlflowClient(run.tracking).delete_run(run.mlflow_run_id)

    with pytest.raises(UserError, match=rf"run tiny: it was deleted in .*--run-id {run.mlflow_run_id}"):
        register(run, "champion")

    assert registered(run.tracking) == []


def test_a_run_that_its_store_does_not_know_has_no_model(run: Run, tmp_path: Path) -> None:
    stranger = make_run(tmp_path)
    lost = Run(stranger.storage, "", run.tracking, "0" * 32, CLASSES, "finished")

    with pytest.raises(UserError, match=r"run tiny: sqlite:.* has no run 0{32} any more"):
        log_model(lost)


def test_a_run_without_a_checkpoint_has_no_model(tmp_path: Path) -> None:
    run = tracked(tmp_path)
    run.storage.delete_folder("checkpoints")

    with pytest.raises(UserError, match=r"tiny: it has no checkpoint yet"):
        register(run, "champion")


# ---- fetching ----


def test_a_fetched_model_is_the_runs(run: Run, tmp_path: Path, image: Path) -> None:
    weights = run.best().weights()

    for reference in ("models:/mimiclab@champion", "models:/mimiclab/1"):
        model = load(run.tracking, reference)
        assert (model.classes, model.resize.short, model.resize.long) == (CLASSES, 64, 96)
        assert all(value.equal(weights[name]) for name, value in model.detector.state_dict().items())
        assert not model.detector.training


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("models:/nobody@champion", r"no model nobody is registered in sqlite:.*; found mimiclab"),
        ("models:/mimiclab@king", r"mimiclab has no alias king; found champion"),
        ("models:/mimiclab/9", r"mimiclab has no version 9; the newest is 1"),
        ("models:/mimiclab", r"expected models:/NAME@ALIAS or models:/NAME/VERSION"),
    ],
)
def test_a_model_that_is_not_there_is_named(run: Run, reference: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(run.tracking, reference)


def test_a_store_that_is_not_there_is_named_and_not_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no file .*gone\.db"):
        load(f"sqlite:///{tmp_path}/gone.db", "models:/mimiclab@champion")
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9 does not answer"):
        load("http://127.0.0.1:9", "models:/mimiclab@champion")

    assert list(tmp_path.iterdir()) == []


def test_another_programs_model_is_not_loaded(tmp_path: Path) -> None:
    run = tracked(tmp_path)
    client = MlflowClient(run.tracking)
    client.create_registered_model("theirs")
    client.create_model_version("theirs", f"file://{tmp_path}/theirs", run.mlflow_run_id)

    with pytest.raises(UserError, match=r"models:/theirs/1: version 1 of theirs is not MimicLab's"):
        load(run.tracking, "models:/theirs/1")
    assert registered(run.tracking) == [Version("theirs", 1, (), "", None)]


def test_files_that_are_damaged_or_gone_are_named(tmp_path: Path) -> None:
    run = tracked(tmp_path)
    register(run, "champion")
    weights = folder_of(run) / "artifacts" / "weights.safetensors"
    content = weights.read_bytes()

    weights.write_bytes(content[:-4] + b"abcd")
    with pytest.raises(UserError, match=r"champion: .*weights\.safetensors is damaged: it is not what was logged"):
        load(run.tracking, "models:/mimiclab@champion")
    weights.unlink()
    with pytest.raises(UserError, match=r"champion: its files cannot be fetched from .*weights\.safetensors"):
        load(run.tracking, "models:/mimiclab@champion")
    weights.write_bytes(content)
    (weights.parent / "detector.json").write_text('{"format": 9}')
    with pytest.raises(UserError, match=r"champion: detector\.json: found format 9, expected 1"):
        load(run.tracking, "models:/mimiclab@champion")


# ---- answering ----


def test_images_are_resized_as_in_training() -> None:
    rng = np.random.default_rng(0)
    for width, height, short, more in rng.integers(1, 2000, (500, 4)).tolist():
        wanted = resized_size(width, height, short, short + more)
        assert served.resized_size(width, height, short, short + more) == wanted


WITHOUT_MIMICLAB = """
import json, sys
sys.path.append(sys.argv[1])  # `-S` leaves it out, and with it what is installed as editable
sys.modules["mimiclab"] = None
import mlflow
model = mlflow.pyfunc.load_model("models:/mimiclab@champion")
print(json.dumps(model.predict(json.load(sys.stdin), params={"min_score": 0.2})))
import mimicdet
print(mimicdet.__file__)
"""


@pytest.mark.slow
def test_a_model_answers_where_there_is_no_mimiclab_and_no_pickle(run: Run, image: Path, tmp_path: Path) -> None:
    packages = str(Path(np.__file__).parents[1])
    environment = {**os.environ, **serving(run), "PYTHONPATH": ""}

    done = subprocess.run(
        [sys.executable, "-S", "-c", WITHOUT_MIMICLAB, packages],
        input=json.dumps([{"image": base64.b64encode(image.read_bytes()).decode()}] * 2),
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    answer, file = done.stdout.splitlines()
    assert Path(file).is_relative_to(folder_of(run) / "code")
    first, second = json.loads(answer)
    assert first == second
    assert_same(first, expected(run, image, tmp_path))


def serving(run: Run) -> dict[str, str]:
    """What the environment says where a model is served."""
    return {
        "MLFLOW_TRACKING_URI": run.tracking,
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "OMP_NUM_THREADS": "1",
    }


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("no base64!", r"expected the bytes of an image file in base64, found 'no base64!'"),
        (base64.b64encode(b"no image").decode(), r"it is of no known format"),
        ("file:a.png", r"this server reads no files"),
        (["nested"], r"expected a text, found a list"),
    ],
)
def test_what_is_no_image_is_refused(image: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(served.FOLDER, raising=False)

    with pytest.raises(Exception, match=message) as caught:
        served.read_image(image)
    assert caught.value.get_http_status_code() == 400  # type: ignore[attr-defined]


def test_files_are_read_from_the_folder_that_is_allowed_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = draw(tmp_path / "images" / "street" / "a.png", 8, 6)
    outside = draw(tmp_path / "secret.png", 8, 6)
    (tmp_path / "images" / "link.png").symlink_to(outside)
    monkeypatch.setenv(served.FOLDER, str(tmp_path / "images"))

    assert served.read_image("file:street/a.png").shape == (6, 8, 3)
    assert served.read_image(f"file:{inside}").shape == (6, 8, 3)
    for name in ("../secret.png", str(outside), "link.png", "street/../../secret.png", "gone.png", "street"):
        with pytest.raises(Exception, match="there is no such file in MIMICLAB_IMAGES"):
            served.read_image(f"file:{name}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.server
def test_a_model_of_a_tracking_servers_is_registered_once_and_fetched(tmp_path: Path) -> None:
    local = tracked(tmp_path)
    with ui.server(local.tracking, free_port()) as running:
        run = track(local, running.base_url)
        made = [register(run, "champion") for _ in range(2)]
        model = load(run.tracking, "models:/mimiclab@champion")
        with pytest.raises(UserError, match=r"mimiclab has no alias king; found champion"):
            load(run.tracking, "models:/mimiclab@king")

    assert made == [Version("mimiclab", 1, ("champion",), "tiny", 0.25)] * 2
    assert model.classes == CLASSES
    (logged_model,) = logged(local)
    assert json.loads(logged_model.tags["mlflow.modelVersions"]) == [{"name": "mimiclab", "version": 1}]


@pytest.fixture(scope="module")
def address(run: Run) -> Iterator[str]:
    """`mlflow models serve`, until the tests are done."""
    port = free_port()
    scripts = Path(sys.executable).parent
    command = [
        *(sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/mimiclab@champion"),
        *("--env-manager", "local", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
    ]
    environment = {**os.environ, **serving(run), "PATH": f"{scripts}:{os.environ['PATH']}"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 180
        while not answers(f"http://127.0.0.1:{port}/ping"):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # with the server that it started
        process.wait(30)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def post(address: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return dict(json.load(answer))


@pytest.mark.server
def test_a_served_model_finds_what_predict_finds(run: Run, address: str, image: Path, tmp_path: Path) -> None:
    encoded = base64.b64encode(image.read_bytes()).decode()

    answer = post(address, {"inputs": [{"image": encoded}], "params": {"min_score": 0.2}})
    none = post(address, {"inputs": [{"image": encoded}], "params": {"min_score": 1}})

    (found,) = answer["predictions"]
    assert_same(found, expected(run, image, tmp_path))
    assert none == {"predictions": [{"boxes": [], "scores": [], "labels": []}]}


@pytest.mark.server
def test_a_server_reads_no_file_of_its_own(address: str, image: Path) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(address, {"inputs": [{"image": f"file:{image}"}]})
    assert caught.value.code == 400
    assert "this server reads no files" in caught.value.read().decode()
