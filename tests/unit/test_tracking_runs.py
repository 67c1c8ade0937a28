"""Runs and their history in a sqlite store, as MLflow keeps them."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException
from PIL import Image

from mimiclab.errors import UserError
from mimiclab.experiment import flatten, load_experiment
from mimiclab.storage import Storage
from mimiclab.tracking import runs, writer
from mimiclab.tracking.address import read_sqlite
from mimiclab.tracking.client import connect
from mimiclab.tracking.keys import metric_keys, picture_keys
from mimiclab.tracking.protocol import Row, Table
from mimiclab.tracking.writer import MlflowTracker, _known_pictures, _send_rows


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('a folder')}/mlflow.db"


@pytest.fixture
def run_id(uri: str, request: pytest.FixtureRequest) -> str:
    return runs.open_run(uri, "cells", request.node.name, "abc", {}, {})


def points(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in connect(uri).get_metric_history(run_id, key)]


def artifacts(uri: str, run_id: str) -> Path:
    return Path(uri.removeprefix("sqlite:///")).parent / "mlflow-artifacts" / run_id / "artifacts"


def wait_for(condition: Callable[[], bool], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def train(tracker: MlflowTracker, first: int, last: int) -> None:
    for step in range(first, last + 1):
        tracker.log_metrics(step, {"train/loss": 1 / step, "train/lr": 0.1})
        if step % 5 == 0:
            tracker.log_metrics(step, {"student/AP": step / 100})


@pytest.mark.slow
def test_the_same_command_finds_its_run_and_another_identity_does_not(uri: str) -> None:
    client = connect(uri)
    many = {f"model.part{i}": "x" * 7000 for i in range(150)}
    first = runs.open_run(uri, "cells", 'o\'neil "1"', "abc", many, {"note": "a", "classes": "x" * 9000})
    run = client.get_run(first)
    assert run.data.tags["classes"] == "x" * 8000
    assert run.info.run_name == 'o\'neil "1"'
    assert run.info.status == "RUNNING"
    assert len(run.data.params) == 150
    assert run.data.params["model.part7"] == "x" * 6000

    runs.end_run(uri, first, "FAILED")
    assert client.get_run(first).info.status == "FAILED"
    # MLflow lets no parameter change.
    again = {"model.part7": "y", "data.flip": "True"}
    assert runs.open_run(uri, "cells", 'o\'neil "1"', "abc", again, {"note": "b"}) == first
    run = client.get_run(first)
    assert run.info.status == "RUNNING"
    assert run.data.params["model.part7"] == "x" * 6000
    assert run.data.params["data.flip"] == "True"
    assert run.data.tags["note"] == "b"

    others = {
        runs.open_run(uri, "cells", 'o\'neil "1"', "def", {}, {}),
        runs.open_run(uri, "cells", "other", "abc", {}, {}),
        runs.open_run(uri, "scenes", 'o\'neil "1"', "abc", {}, {}),
    }
    assert len(others | {first}) == 4


def test_parameters_say_what_is_trained_and_not_who_where_and_how_fast(uri: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("name: x\ndata: {scenes: {}}\n")
    params = {key: str(value) for key, value in flatten(load_experiment(tmp_path / "x.yaml").experiment).items()}
    shown = connect(uri).get_run(runs.open_run(uri, "cells", "params", "abc", params, {})).data.params
    sections = {key.split(".")[0] for key in shown}
    assert sections == {"seed", "data", "model", "optim", "eval"}
    assert {"seed", "optim.lr", "optim.epochs", "data.flip", "eval.metric"} <= shown.keys()
    assert not {"data.loader_processes", "data.cache_gb"} & shown.keys()

    parent = runs.open_run(uri, "cells", "params of a search", "abc", {"search.metric": "student/AP"}, {})
    assert connect(uri).get_run(parent).data.params == {"search.metric": "student/AP"}


def test_a_forgotten_run_is_kept_but_not_found_again(uri: str) -> None:
    runs.forget_run(uri, "no such project", "fresh", "abc")
    first = runs.open_run(uri, "cells", "fresh", "abc", {"a": "1"}, {})
    runs.forget_run(uri, "cells", "fresh", "abc")
    second = runs.open_run(uri, "cells", "fresh", "abc", {"a": "2"}, {})
    assert second != first
    assert runs.open_run(uri, "cells", "fresh", "abc", {}, {}) == second
    forgotten = connect(uri).get_run(first)
    assert forgotten.data.tags["mimiclab.forgotten"] == "abc"
    assert forgotten.info.lifecycle_stage == "active"


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_a_run_ends_with_its_status(uri: str, run_id: str, status: str) -> None:
    runs.end_run(uri, run_id, status)  # type: ignore[arg-type]
    info = connect(uri).get_run(run_id).info
    assert info.status == status
    assert info.end_time is not None


def test_a_run_ends_when_it_is_told_to_have_ended(uri: str, run_id: str) -> None:
    runs.end_run(uri, run_id, "KILLED", 1700000000.25)
    assert connect(uri).get_run(run_id).info.end_time == 1700000000250


def test_a_run_is_unfinished_since_it_last_recorded_something(uri: str, run_id: str, tmp_path: Path) -> None:
    started = connect(uri).get_run(run_id).info.start_time / 1000
    assert runs.unfinished_since(uri, run_id) == started
    _send_rows(connect(uri), run_id, [Row(key, 0.5, 1900000000250, 1) for key in "ab"])
    _send_rows(connect(uri), run_id, [Row("a", 0.5, 1900000000750, 2)])
    assert runs.unfinished_since(uri, run_id) == 1900000000.75

    runs.end_run(uri, run_id, "FINISHED")
    assert runs.unfinished_since(uri, run_id) is None
    assert runs.unfinished_since(uri, "0" * 32) is None
    deleted = runs.open_run(uri, "cells", "deleted", "abc", {}, {})
    connect(uri).delete_run(deleted)
    assert runs.unfinished_since(uri, deleted) is None

    assert runs.unfinished_since(f"sqlite:///{tmp_path}/gone.db", run_id) is None
    assert not (tmp_path / "gone.db").exists()
    with pytest.raises(MlflowException):
        runs.unfinished_since("http://127.0.0.1:9", run_id)  # nobody answers there, so nobody knows


def test_tags_are_set_and_replaced(uri: str, run_id: str) -> None:
    runs.set_tags(uri, run_id, {"restart.1": "crash: x", "restart.2": "driver: y"})
    runs.set_tags(uri, run_id, {"restart.2": "driver: z"})
    tags = connect(uri).get_run(run_id).data.tags
    assert (tags["restart.1"], tags["restart.2"]) == ("crash: x", "driver: z")


def test_a_deleted_project_is_named(uri: str) -> None:
    runs.open_run(uri, "gone", "a", "abc", {}, {})
    client = connect(uri)
    client.delete_experiment(client.get_experiment_by_name("gone").experiment_id)
    with pytest.raises(UserError, match="MLflow experiment 'gone' was deleted"):
        runs.open_run(uri, "gone", "a", "abc", {}, {})


@pytest.mark.slow
def test_a_run_that_was_deleted_is_named_with_how_to_restore_it(uri: str) -> None:
    run_id = runs.open_run(uri, "cells", "deleted while it runs", "abc", {}, {})
    tracker = MlflowTracker(uri, run_id)
    connect(uri).delete_run(run_id)
    found = f"has the run {run_id} as deleted; expected it restored: mlflow runs restore --run-id {run_id}"
    with pytest.raises(UserError, match=found):
        runs.log_dataset_input(uri, run_id, "bccd", "0" * 64, "/data/train.json", "train")
    tracker.log_metrics(1, {"train/loss": 1.0})
    assert len(tracker.close(2)) == 1


def test_inputs_and_texts_are_stored_once_next_to_the_database(uri: str, run_id: str) -> None:
    for _ in range(2):
        runs.log_dataset_input(uri, run_id, "bccd", "0" * 64, "/data/train.json", "train")
        runs.log_text(uri, run_id, "name: größe")
    client = connect(uri)
    (dataset,) = client.get_run(run_id).inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("bccd", "0" * 36)
    assert json.loads(dataset.dataset.source) == {"uri": "/data/train.json"}
    assert [(tag.key, tag.value) for tag in dataset.tags] == [("mlflow.data.context", "train")]

    stored = artifacts(uri, run_id)
    assert (stored / "experiment.yaml").read_text() == "name: größe"


def test_runs_that_start_at_once_name_the_same_data_set(uri: str) -> None:
    run_ids = [runs.open_run(uri, "cells", f"at-once-{number}", "abc", {}, {}) for number in range(4)]
    together = threading.Barrier(len(run_ids))

    def name_sets(run_id: str) -> None:
        for number in range(8):
            together.wait(timeout=60)
            runs.log_dataset_input(uri, run_id, "shared", f"{number:036}", "/data/train.json", "train")

    with ThreadPoolExecutor(len(run_ids)) as threads:
        list(threads.map(name_sets, run_ids))
    for run_id in run_ids:
        assert len(connect(uri).get_run(run_id).inputs.dataset_inputs) == 8


def test_a_file_takes_the_place_of_an_earlier_one_and_is_made_when_it_is_sent(
    uri: str, run_id: str, caplog: pytest.LogCaptureFixture
) -> None:
    made: list[str] = []

    def make() -> bytes:
        made.append(threading.current_thread().name)
        return b"new"

    def broken() -> bytes:
        raise UserError("4.png: cannot be read")

    tracker = MlflowTracker(uri, run_id)
    for content in (b"old", b"older", make):
        tracker.log_file("evaluation/worst/1.png", content)
    tracker.log_file("top.txt", b"top")
    tracker.log_file("evaluation/worst/2.png", broken)
    assert tracker.close(30) == []
    assert tracker.unsent_files() == 0
    assert made == ["mlflow-writer"]
    assert (artifacts(uri, run_id) / "evaluation" / "worst" / "1.png").read_bytes() == b"new"
    assert (artifacts(uri, run_id) / "top.txt").read_bytes() == b"top"
    assert "evaluation/worst/2.png could not be made (4.png: cannot be read)" in caplog.text


def test_tables_are_named_to_mlflow_s_pages(uri: str, run_id: str) -> None:
    for name in ("a/errors.json", "a/classes.json"):  # by two processes
        tracker = MlflowTracker(uri, run_id)
        for _ in range(2):
            tracker.log_table(name, Table(("class", "AP"), [["cell", 0.5], ["none", None]]))
        tracker.log_table("a/worst.json", Table(("image",), []))
        assert tracker.close(30) == []
    client = connect(uri)
    tag = json.loads(client.get_run(run_id).data.tags["mlflow.loggedArtifacts"])
    assert sorted(each["path"] for each in tag) == ["a/classes.json", "a/errors.json", "a/worst.json"]
    assert {each["type"] for each in tag} == {"table"}
    content = json.loads((artifacts(uri, run_id) / "a" / "errors.json").read_text())
    assert content == {"columns": ["class", "AP"], "data": [["cell", 0.5], ["none", None]]}


def test_tags_wait_for_the_server_and_the_last_value_counts(uri: str, run_id: str) -> None:
    tracker = MlflowTracker(uri, run_id)
    tracker.set_tags({"host.cpu": "a", "device": "cpu"})
    tracker.set_tags({"host.cpu": "b"})
    assert tracker.close(30) == []
    tags = connect(uri).get_run(run_id).data.tags
    assert (tags["host.cpu"], tags["device"]) == ("b", "cpu")


@pytest.mark.slow
def test_what_the_server_does_not_take_waits_in_the_run_s_folder(uri: str, run_id: str, tmp_path: Path) -> None:
    spool = Storage(tmp_path / "unsent")
    tracker = MlflowTracker("http://127.0.0.1:9", run_id, spool=spool)  # nobody answers there
    tracker.log_picture("val/a b", 3, Image.new("RGB", (32, 24), "red"))
    tracker.log_file("evaluation/a.png", b"old")
    wait_for(lambda: len(spool.sizes()) == 2)  # before the end: the process may be killed
    tracker.log_file("evaluation/a.png", lambda: b"new")
    tracker.log_table("evaluation/b.json", Table(("a",), [[1]]))
    tracker.close(0.1)
    assert tracker.unsent_files() == 3
    assert len(spool.sizes()) == 3

    tracker = MlflowTracker(uri, run_id, spool=spool)
    assert tracker.close(30) == []
    assert tracker.unsent_files() == 0
    assert spool.sizes() == {}
    assert (artifacts(uri, run_id) / "evaluation" / "a.png").read_bytes() == b"new"
    assert json.loads((artifacts(uri, run_id) / "evaluation" / "b.json").read_text())["data"] == [[1]]
    assert "b.json" in connect(uri).get_run(run_id).data.tags["mlflow.loggedArtifacts"]
    (picture,) = (f.path for f in connect(uri).list_artifacts(run_id, "images") if f.path.endswith(".png"))
    assert picture.startswith("images/val~a b+step+3+")


def test_a_file_in_the_folder_that_was_not_kept_there_holds_up_none_that_was(
    uri: str, run_id: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spool = Storage(tmp_path / "unsent")
    before = MlflowTracker("http://127.0.0.1:9", run_id, spool=spool)
    before.log_file("z.txt", b"z")
    before.close(0.1)
    spool.write("picture+a+1+2", b"no picture")
    spool.write("a note", b"of a person")
    tracker = MlflowTracker(uri, run_id, spool=spool)
    assert tracker.close(30) == []
    assert (artifacts(uri, run_id) / "z.txt").read_bytes() == b"z"
    assert set(spool.sizes()) == {"picture+a+1+2", "a note"}
    assert "picture a of step 1 could not be made (cannot identify image file" in caplog.text
    assert "a note: " in caplog.text


def test_what_is_kept_outlives_the_process_and_is_gone_once_it_is_sent(uri: str, run_id: str, tmp_path: Path) -> None:
    spool = Storage(tmp_path / "unsent")
    made = []
    tracker = MlflowTracker(uri, run_id, spool=spool)
    tracker.log_picture("val/1", 5, Image.new("RGB", (32, 24), "red"))
    tracker.log_file("a.txt", lambda: made.append("a") or b"a")
    tracker.keep()  # before the writer's first round
    assert len(spool.sizes()) == 2

    assert tracker.close(30) == []
    assert spool.sizes() == {}
    assert (artifacts(uri, run_id) / "a.txt").read_bytes() == b"a"
    assert made == ["a"]
    tracker.keep()
    assert spool.sizes() == {}


def test_a_file_made_anew_takes_the_place_of_one_that_waits_in_the_folder(
    uri: str, run_id: str, tmp_path: Path
) -> None:
    spool = Storage(tmp_path / "unsent")
    before = MlflowTracker("http://127.0.0.1:9", run_id, spool=spool)
    before.log_file("a.txt", b"old")
    before.close(0.1)
    tracker = MlflowTracker(uri, run_id, spool=spool)
    tracker.log_file("a.txt", b"new")
    assert tracker.close(30) == []
    assert (artifacts(uri, run_id) / "a.txt").read_bytes() == b"new"
    assert spool.sizes() == {}


@pytest.mark.slow
def test_a_store_is_made_without_chatter_or_files_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    code = (
        "from mimiclab.tracking import runs;"
        f"run = runs.open_run('sqlite:///{tmp_path}/new.db', 'p', 'n', 'i', {{'a': '1'}}, {{}});"
        f"runs.end_run('sqlite:///{tmp_path}/new.db', run, 'FINISHED')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "elsewhere", capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    assert "INFO" not in done.stderr
    assert not list((tmp_path / "elsewhere").iterdir())


def test_the_history_is_exact_after_a_crash_and_a_resume_from_an_older_checkpoint(uri: str, run_id: str) -> None:
    tracker = MlflowTracker(uri, run_id)
    train(tracker, 1, 10)
    in_checkpoint = json.dumps(tracker.unsent())
    train(tracker, 11, 13)
    assert tracker.close(30) == []  # the server has steps that the checkpoint does not know of
    before = connect(uri).get_metric_history(run_id, "train/loss")

    resend = [Row(*fields) for fields in json.loads(in_checkpoint)]
    assert {row.step for row in resend} <= set(range(1, 11))
    tracker = MlflowTracker(uri, run_id, resend)
    train(tracker, 11, 20)
    assert tracker.close(30) == tracker.unsent() == []
    assert points(uri, run_id, "train/loss") == [(step, 1 / step) for step in range(1, 21)]
    assert points(uri, run_id, "train/lr") == [(step, 0.1) for step in range(1, 21)]
    assert points(uri, run_id, "student/AP") == [(step, step / 100) for step in (5, 10, 15, 20)]
    assert connect(uri).get_metric_history(run_id, "train/loss")[:13] == before


@pytest.mark.slow
def test_rows_of_a_killed_process_arrive_from_its_checkpoint(uri: str, run_id: str, tmp_path: Path) -> None:
    code = (  # on port 9 nobody answers
        "import json, os, pathlib, sys; from mimiclab.tracking.writer import MlflowTracker;"
        f"tracker = MlflowTracker('http://127.0.0.1:9', {run_id!r});"
        "[tracker.log_metrics(step, {'train/loss': 1 / step}) for step in range(1, 11)];"
        f"pathlib.Path({str(tmp_path / 'rows.json')!r}).write_text(json.dumps(tracker.unsent()));"
        "os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    resend = [Row(*fields) for fields in json.loads((tmp_path / "rows.json").read_text())]
    tracker = MlflowTracker(uri, run_id, resend)
    tracker.log_metrics(11, {"train/loss": 1 / 11})
    assert len(resend) == 10
    assert tracker.close(30) == []
    assert points(uri, run_id, "train/loss") == [(step, 1 / step) for step in range(1, 12)]
    times = [point.timestamp for point in connect(uri).get_metric_history(run_id, "train/loss")]
    assert times[:10] == [row.timestamp_ms for row in resend], "stamped when logged, not when sent"


@pytest.mark.slow
def test_a_long_outage_leaves_memory_and_arrives_in_another_process(uri: str, run_id: str, tmp_path: Path) -> None:
    code = (  # killed with 1,000 steps of a run that nobody took: most in pages, the newest in a checkpoint
        "import json, os, pathlib; from PIL import Image; from mimiclab.storage import Storage;"
        "from mimiclab.tracking import backlog; from mimiclab.tracking.writer import MlflowTracker;"
        "backlog._PAGE_ROWS = 150;"
        f"spool = Storage({str(tmp_path / 'unsent')!r});"
        f"tracker = MlflowTracker('http://127.0.0.1:9', {run_id!r}, spool=spool);"
        "tracker._backlog.open();"
        "[(tracker.log_metrics(step, {'train/loss': 1 / step, 'train/lr': 0.1}), step % 70 or tracker.keep())"
        " for step in range(1, 1001)];"
        "tracker.log_picture('val/1', 9, Image.new('RGB', (32, 24), 'red'));"
        "tracker.keep();"
        "assert not [item for item in tracker._items.values() if isinstance(item.content, Image.Image)];"
        f"pathlib.Path({str(tmp_path / 'rows.json')!r}).write_text(json.dumps(tracker.unsent()));"
        "os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    spool = Storage(tmp_path / "unsent")
    resend = [Row(*fields) for fields in json.loads((tmp_path / "rows.json").read_text())]
    assert len(resend) < 150
    assert len(spool.sizes()) == 1 + (2000 - len(resend)) // 150

    tracker = MlflowTracker(uri, run_id, resend, spool=spool)
    train(tracker, 950, 1010)  # from an older checkpoint than it might
    assert tracker.close(60) == []
    assert tracker.unsent_files() == 0
    assert spool.sizes() == {}
    assert points(uri, run_id, "train/loss") == [(step, 1 / step) for step in range(1, 1011)]
    assert points(uri, run_id, "train/lr") == [(step, 0.1) for step in range(1, 1011)]
    client = connect(uri)
    (picture,) = (file.path for file in client.list_artifacts(run_id, "images") if file.path.endswith(".png"))
    with Image.open(client.download_artifacts(run_id, picture)) as image:
        assert image.getpixel((0, 0)) == (255, 0, 0)


def test_mlflow_stores_an_identical_row_once(uri: str, run_id: str) -> None:
    # The writer relies on it when the answer to a call was lost.
    rows = [Row("a", value, 1700000000000, 1) for value in (0.1, float("inf"))]
    rows += [Row("b", float("nan"), 1700000000000, step) for step in (1, 2)]
    client = connect(uri)
    for _ in range(2):
        _send_rows(client, run_id, rows)
    _send_rows(client, run_id, [*rows, Row("b", 3.0, 1700000000000, 3)])
    assert len(points(uri, run_id, "a")) == 2
    assert [step for step, _ in points(uri, run_id, "b")] == [1, 2, 3]


def test_many_threads_and_more_rows_than_one_call_holds(uri: str, run_id: str) -> None:
    tracker = MlflowTracker(uri, run_id)

    def log(part: int) -> None:
        for step in range(10):
            tracker.log_metrics(step, {f"{part}/{i}": float(step) for i in range(75)})

    threads = [threading.Thread(target=log, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tracker.close(60) == []
    for key in ("0/0", "3/74"):
        assert points(uri, run_id, key) == [(step, float(step)) for step in range(10)]
    assert len(connect(uri).get_run(run_id).data.metrics) == 300
    with pytest.raises(RuntimeError, match="closed"):
        tracker.log_metrics(11, {"a": 0.0})


@pytest.mark.parametrize("calls", [0, 1, 2])
@pytest.mark.slow
def test_a_step_of_many_metrics_arrives_whole_and_once_also_after_a_restart_in_its_middle(
    uri: str, run_id: str, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    values = {f"student/AP/{i}": float(i) for i in range(2500)}
    left = iter([True] * calls)

    def send_or_die(client: object, run_id: str, rows: list[Row]) -> None:
        if next(left, None) is None:
            raise ConnectionError("the machine is gone")
        _send_rows(client, run_id, rows)

    with monkeypatch.context() as patched:
        patched.setattr(writer, "_send_rows", send_or_die)
        tracker = MlflowTracker(uri, run_id)
        tracker.log_metrics(10, values)
        in_checkpoint = json.dumps(tracker.unsent())
        assert len(tracker.close(3)) == 2500 - 1000 * calls
    assert len(connect(uri).get_run(run_id).data.metrics) == 1000 * calls

    tracker = MlflowTracker(uri, run_id, [Row(*fields) for fields in json.loads(in_checkpoint)])
    tracker.log_metrics(10, values)  # evaluated again
    tracker.log_metrics(11, values)
    assert tracker.close(60) == []
    stored = read_sqlite(Path(uri.removeprefix("sqlite:///")), "SELECT run_uuid, key, value, step FROM metrics")
    found = [(row[1], row[2], row[3]) for row in stored if row[0] == run_id]
    assert sorted(found) == sorted((key, value, step) for key, value in values.items() for step in (10, 11))


def test_a_picture_of_a_repeated_step_is_not_stored_again(uri: str, run_id: str) -> None:
    for colour in ("red", "blue"):
        tracker = MlflowTracker(uri, run_id)
        tracker.log_picture("val/a b", 0, Image.new("RGBA", (32, 24), colour))
        tracker.log_picture("val/a b", 0, Image.new("RGB", (32, 24), colour))
        assert tracker.close(30) == []
    client = connect(uri)
    (picture,) = (file.path for file in client.list_artifacts(run_id, "images") if file.path.endswith(".png"))
    with Image.open(client.download_artifacts(run_id, picture)) as image:
        assert image.size == (32, 24)
        assert image.getpixel((0, 0)) == (255, 0, 0)


def test_names_of_any_language_and_length_arrive_under_keys_of_their_own(uri: str, run_id: str) -> None:
    names = ("猫", "狗", "Größe", "Grüße", "a(b", "a[b", "x" * 300, "x" * 301)
    metrics, pictures = metric_keys(f"student/AP/{name}" for name in names), picture_keys(dict(enumerate(names)))
    tracker = MlflowTracker(uri, run_id)
    tracker.log_metrics(1, {key: number / 10 for number, key in enumerate(metrics.values())})
    for key in pictures.values():
        tracker.log_picture(f"validation/{key}", 1, Image.new("RGB", (32, 24), "red"))
    assert tracker.close(30) == []
    stored = connect(uri).get_run(run_id).data.metrics
    assert [stored[key] for key in metrics.values()] == [number / 10 for number in range(len(names))]
    assert stored["student/AP/猫"] == 0.0
    known = _known_pictures(connect(uri), run_id)
    assert known == {(f"validation/{key}", 1) for key in pictures.values()}


@pytest.mark.slow
def test_without_a_server_the_rows_are_kept_and_nobody_waits() -> None:
    tracker = MlflowTracker("http://127.0.0.1:9", "0" * 32, [Row("train/loss", 1.0, 5, 1)])
    took = []
    for step in range(2, 200):
        start = time.perf_counter()
        tracker.log_metrics(step, {"train/loss": 1 / step})
        took.append(time.perf_counter() - start)
    assert sorted(took)[int(0.95 * len(took))] < 0.005
    assert max(took) < 0.25
    start = time.monotonic()
    left = tracker.close(2)
    assert time.monotonic() - start < 4
    assert [row.step for row in left] == list(range(1, 200))
    assert left[0] == Row("train/loss", 1.0, 5, 1)
