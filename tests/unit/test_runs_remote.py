"""Runs in a bucket: moto's server on loopback speaks S3's protocol."""

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from buckets import bucket_server
from PIL import Image
from rich.console import Console

from mimiclab import checkpoint, runs
from mimiclab import storage as storage_module
from mimiclab.build import build_detector
from mimiclab.checkpoint import META
from mimiclab.cli import main
from mimiclab.data.splits import locate, read_splits
from mimiclab.errors import UserError
from mimiclab.experiment import identity, load_experiment
from mimiclab.progress import PROGRESS, ProgressLog
from mimiclab.runs import Run
from mimiclab.schema import Experiment
from mimiclab.search.driver import search
from mimiclab.seeds import plan
from mimiclab.storage import Storage
from mimiclab.summary import show_result
from mimiclab.tracking import runs as tracking

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("one_thread")]
BUCKET = "bucket"
EXPERIMENT = """
name: tiny
data: {scenes: {train: 4, val: 2, size: 64}, resize: {short: 64, long: 64}}
model:
  backbone: {name: resnet18, width: 8}
  pyramid: {channels: 8, max_level: 5}
  student: {head_width: 8, offset_channels: [4, 4]}
  teacher: {num_convs: 1}
search: {trials: 2, space: {optim.lr: {choice: [0.1]}}}
"""
METRICS = {f"student/{name}": 0.5 for name in ("AP", "AP50", "AP75")}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with bucket_server(BUCKET) as address:
        yield address


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(storage_module, "_ATTEMPTS", 1)
    monkeypatch.setenv("RAY_ADDRESS", "no-address")
    Path("tiny.yaml").write_text(EXPERIMENT)


def uri(address: str, name: str, credentials: str = "") -> str:
    return f"s3://{credentials}{BUCKET}/{name}?scheme=http&endpoint_override={address}"


def experiment(storage: str, *overrides: str) -> Experiment:
    return load_experiment("tiny.yaml", [f"where.storage='{storage}'", *overrides]).experiment


def make(storage: str, *, real: bool = False) -> Run:
    """A run with two checkpoints, of which the first is the best; `real` ones can detect, and evaluate on data here."""
    mine = experiment(storage)
    classes, weights, run_id, located = ("disk", "star"), {"w": torch.zeros(1)}, "0123456789" + "0" * 22, mine
    if real:
        located = mine.model_copy(update={"data": locate(mine.data)})
        classes = read_splits(located.data).train.classes
        torch.manual_seed(0)
        weights = build_detector(mine.model, classes).state_dict()
        run_id = tracking.open_run("sqlite:///mlflow.db", "mimiclab", mine.name, identity(mine), {}, {})
    run = Run(runs.prepare(mine, fresh=False), identity(mine), "sqlite:///mlflow.db", run_id, classes, "finished")
    run.write()
    for step in (3, 6):
        meta = {"step": step, "classes": list(classes), "best": {"step": 3, "value": 0.5}, "metrics": METRICS}
        checkpoint.save(run.checkpoints, weights, {}, {**meta, "experiment": located.model_dump(mode="json")})
    return run


def mimiclab(*args: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert isinstance(caught.value.code, int)
    return caught.value.code


# ---- its folder ----


def test_a_run_is_prepared_written_found_and_started_anew(address: str) -> None:
    place = uri(address, "one")
    mine = experiment(place)

    runs.check(mine, fresh=False)
    assert Storage(place).sizes() == {}  # nothing is left of the look
    run = make(place)

    assert run.name == "tiny"
    assert run.storage.name == f"s3://{BUCKET}/one/tiny"
    for found in (runs.find("tiny", place), runs.find(run.storage.uri), runs.find(run.mlflow_run_id[:8], place)):
        assert replace(found, storage=run.storage) == run
        assert found.storage.name == run.storage.name
        assert found.experiment() == mine
        assert found.best().step == 3
    with pytest.raises(UserError, match=r"it was started from another experiment. What changed:\n  optim.lr: "):
        runs.check(experiment(place, "optim.lr=0.5"), fresh=False)
    run.storage.write(".lease.json", b"{}")
    runs.prepare(experiment(place, "optim.lr=0.5"), fresh=True)
    assert sorted(run.storage.sizes()) == [".lease.json", "experiment.yaml"]


def test_an_unknown_run_is_answered_with_those_there_are_and_no_credentials(address: str) -> None:
    make(uri(address, "known"))

    for reference in ("y", "runs/y", "", str(Path.cwd())):
        with pytest.raises(UserError) as caught:
            runs.find(reference, uri(address, "known", "key:secret@"))
        assert str(caught.value) == (f"run {reference}: no such name, id or folder; runs in s3://{BUCKET}/known: tiny")


def test_the_best_checkpoint_is_found_without_fetching_weights(address: str) -> None:
    run = make(uri(address, "light"))
    fetched = []
    read = Storage.read

    class Watched(Storage):
        def read(self, name: str) -> bytes:
            fetched.append(name)
            return read(self, name)

        def sha256(self, name: str) -> str:
            raise AssertionError(name)

    assert replace(run, storage=Watched(run.storage.uri)).best().step == 3
    assert {META} < set(fetched) <= {META, "manifest.json"}


def test_something_that_is_no_run_is_left_alone(address: str) -> None:
    place = Storage(uri(address, "photos"))
    (place / "tiny").write("me.jpg", b"1")

    for fresh in (False, True):
        with pytest.raises(UserError, match=rf"^run s3://{BUCKET}/photos/tiny: the folder holds something that is no"):
            runs.prepare(experiment(place.uri), fresh=fresh)
    assert (place / "tiny").sizes() == {"me.jpg": 1}


def test_a_bucket_that_does_not_exist_is_named(address: str) -> None:
    place = f"s3://nowhere/runs?scheme=http&endpoint_override={address}"

    with pytest.raises(UserError, match=r"^where\.storage: s3://nowhere/runs/\.probe-\w+: cannot be written") as caught:
        runs.check(experiment(place), fresh=False)
    assert "NO_SUCH_BUCKET" in str(caught.value)


def test_a_store_that_does_not_answer_is_named() -> None:
    with pytest.raises(UserError, match=rf"^where\.storage: s3://{BUCKET}/runs/tiny: cannot be read, tried 1 times: "):
        runs.check(experiment(uri("127.0.0.1:1", "runs")), fresh=False)


# ---- its log ----


def test_the_log_goes_on_where_an_earlier_driver_left_it(address: str) -> None:
    place = Storage(uri(address, "logs"))
    events = [{"kind": "text", "time": 1.0, "text": word} for word in ("größe", "later")]

    for event in events:
        log = ProgressLog(place)
        log.write(event)
        log.close()

    assert [json.loads(line) for line in place.read(PROGRESS).decode().splitlines()] == events


# ---- verbs ----


@pytest.fixture(scope="module")
def finished(address: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("finished"))
        Path("tiny.yaml").write_text(EXPERIMENT)
        run = make(uri(address, "verbs"), real=True)
        return replace(run, tracking=f"sqlite:///{Path.cwd()}/mlflow.db")


def test_images_are_predicted(finished: Run, address: str, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (64, 64)).save("a.png")

    assert mimiclab("predict", "tiny", "a.png", "--storage", uri(address, "verbs"), "--save", "out") == 0

    assert "1 images, " in capsys.readouterr().out
    assert sorted(path.name for path in Path("out").iterdir()) == ["a.png", "detections.json"]


@pytest.mark.usefixtures("finished")
def test_a_run_is_evaluated(address: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS")  # with one it is a cluster's to evaluate
    assert mimiclab("evaluate", "tiny", "--storage", uri(address, "verbs")) == 0

    output = capsys.readouterr().out
    assert "evaluating 2 images of " in output
    assert "tiny, step 3\n" in output


@pytest.mark.usefixtures("finished")
def test_an_export_is_for_the_current_folder(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("tiny.pt2").mkdir()  # as nothing else says at once where it would be written

    assert mimiclab("export", "tiny", "--format", "torch", "--storage", uri(address, "verbs")) == 2

    assert capsys.readouterr().err.startswith(f"error: {Path.cwd()}/tiny.pt2: cannot be written, expected a file in a")


def test_the_summary_says_where_all_is_and_shows_no_credentials(finished: Run, address: str) -> None:
    run = runs.find("tiny", uri(address, "verbs", "key:secret@"))
    console = Console(file=io.StringIO(), width=400)

    show_result(replace(run, tracking=finished.tracking), experiment(uri(address, "verbs")), console)

    assert isinstance(console.file, io.StringIO)
    said = console.file.getvalue()
    assert f"weights:  s3://{BUCKET}/verbs/tiny/checkpoints/step-00000003/weights.safetensors\n" in said
    assert f"pictures: s3://{BUCKET}/verbs/tiny/pictures\n" in said
    assert f"try it:   mimiclab predict tiny --storage '{uri(address, 'verbs')}' IMAGE...\n" in said
    assert "secret" not in said


# ---- seeds and searches ----


def test_complete_runs_of_several_seeds_are_averaged(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    place = uri(address, "seeds")
    loaded = load_experiment("tiny.yaml", [f"where.storage='{place}'", "optim={global_batch: 2, epochs: 2}"])
    for each, ap in zip(plan(loaded, 2), (0.3, 0.4), strict=True):
        tracked = tracking.open_run("sqlite:///mlflow.db", "mimiclab", each.name, identity(each), {}, {})
        run = Run(runs.prepare(each, fresh=False), identity(each), "sqlite:///mlflow.db", tracked, ("a",), "finished")
        run.write()
        meta = {"step": 4, "classes": ["a"], "best": None, "metrics": dict.fromkeys(METRICS, ap)}
        checkpoint.save(run.checkpoints, {"w": torch.zeros(1)}, {}, meta)
    args = ("train", "tiny.yaml", "--seeds", "2", "--set", f"where.storage='{place}'", "--set", "optim.global_batch=2")

    assert mimiclab(*args, "--set", "optim.epochs=2") == 0
    assert "│ 0.350 │  0.635 │ 0.300 0.400" in capsys.readouterr().out

    assert mimiclab(*args, "--set", "optim.epochs=1") == 2
    assert f"run s3://{BUCKET}/seeds/tiny-seed-0: it was trained to step 4 already" in capsys.readouterr().err


def test_an_earlier_search_is_found(address: str) -> None:
    place = uri(address, "searches")
    root = Storage(place)
    loaded = load_experiment("tiny.yaml", [f"where.storage='{place}'"])
    console = Console(file=io.StringIO())
    (root / "tiny-trial-01").write("run.json", b"{}")
    for expected in ("tiny-trial-01", "tiny/search.yaml"):
        with pytest.raises(UserError) as caught:
            search(loaded, console=console)
        assert str(caught.value) == (
            f"search tiny: it was run before, s3://{BUCKET}/searches/{expected} exists; expected another name, or "
            "--fresh, which removes its trials and starts anew"
        )
        (root / "tiny").write("search.yaml", b"")
