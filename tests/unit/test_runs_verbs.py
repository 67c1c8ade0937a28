"""`mimiclab runs list` and `mimiclab runs rm`: what is there, and what goes, on disk and in MLflow."""

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from ended import PROJECT, ended, experiment

from mimiclab import removal, runs
from mimiclab.cli import main
from mimiclab.errors import UserError
from mimiclab.experiment import resolved_yaml
from mimiclab.lease import Lease
from mimiclab.references import SEARCH_FILE, Stores
from mimiclab.runs import EXPERIMENT, RUN, Run
from mimiclab.storage import Storage
from mimiclab.tracking import parents
from mimiclab.tracking import runs as tracking
from mimiclab.tracking.client import connect

Command = Callable[..., tuple[int, str, str]]
METRICS = {"student/AP": 0.5, "student/AP50": 0.75}
TRIALS = ["hunt-trial-00", "hunt-trial-00-seed-1", "hunt-trial-01"]
"""Of a search that repeats what finishes."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty store, which takes MLflow seconds to make."""
    root = tmp_path_factory.mktemp("store")
    connect(f"sqlite:///{root}/mlflow.db").search_experiments()
    return root / "mlflow.db"


@pytest.fixture(autouse=True)
def root(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copy(store, tmp_path / "mlflow.db")
    for name in ("train", "val"):
        (tmp_path / name).mkdir()
    return tmp_path


@pytest.fixture
def mimiclab(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.setenv("COLUMNS", "200")

    def run(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(["runs", *args])
        assert isinstance(caught.value.code, int)
        return caught.value.code, *capsys.readouterr()

    return run


def make(root: Path, name: str, value: float = 0.5, parent: str | None = None) -> Run:
    tags = {} if parent is None else {parents.PARENT_TAG: parent}
    return ended(experiment(root, name), {**METRICS, "student/AP": value}, tags=tags)


def make_group(root: Path, kind: parents.Kind, name: str, *members: str) -> str:
    parent = parents.open_parent(f"sqlite:///{root}/mlflow.db", PROJECT, kind, name, "abc", {}, "")
    for member in members:
        make(root, member, parent=parent)
    return parent


def make_search(root: Path) -> str:
    parent = make_group(root, "search", "hunt", *TRIALS)
    folder = Storage(root / "runs" / "hunt")
    folder.write(SEARCH_FILE, resolved_yaml(experiment(root, "hunt")).encode())
    folder.write("record.jsonl", b"")
    (folder / "tune").write("state", bytes(5000))
    return parent


def stages(root: Path, *run_ids: str) -> list[str]:
    client = connect(f"sqlite:///{root}/mlflow.db")
    return [client.get_run(run_id).info.lifecycle_stage for run_id in run_ids]


def left(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "runs").iterdir())


# ---- list ----


def test_list_says_how_each_run_stands_and_what_it_takes(root: Path, mimiclab: Command) -> None:
    make(root, "good", 0.75)
    poor = make(root, "poor", 0.25).with_status("running")  # and no driver lives
    make_search(root)
    (root / "runs" / "photos").mkdir()
    connect(poor.tracking).delete_run(poor.mlflow_run_id)

    code, out, err = mimiclab("list", "--json")

    assert (code, err) == (0, "")
    items = {item.pop("name"): item for item in json.loads(out)}
    assert list(items) == ["good", "hunt", *TRIALS, "poor"]
    good = items["good"]
    size = sum(file.stat().st_size for file in (root / "runs" / "good").rglob("*") if file.is_file())
    assert (good["status"], good["step"], good["metric"], good["best"]) == ("finished", 25, "student/AP", 0.75)
    assert (good["size"], good["mlflow"]) == (size, "FINISHED")
    assert (items["poor"]["status"], items["poor"]["mlflow"]) == ("stopped", "deleted")
    assert (items["hunt"]["status"], items["hunt"]["step"]) == ("search", None)
    assert items["hunt"]["size"] > 5000


def test_list_is_sorted_as_asked(root: Path, mimiclab: Command) -> None:
    for name, value in (("a", 0.25), ("b", 0.75), ("c", 0.5)):
        make(root, name, value)
    (root / "runs" / "a" / "large").write_bytes(bytes(100_000))

    def order(*args: str) -> list[str]:
        return [item["name"] for item in json.loads(mimiclab("list", "--json", *args)[1])]

    assert order() == ["a", "b", "c"]
    assert order("--sort", "best") == ["b", "c", "a"]
    assert order("--sort", "size") == ["a", "b", "c"]
    title, *lines = mimiclab("list", "--sort", "best")[1].splitlines()
    assert title.startswith(f"{root}/runs: 3 runs and searches, 1")
    assert [line.split()[1] for line in lines if "finished" in line] == ["b", "c", "a"]
    assert "0.750 student/AP" in "".join(lines)


def test_a_run_with_a_driver_is_running(root: Path, mimiclab: Command) -> None:
    run = make(root, "busy")
    with Lease.take(run.storage, "busy"):
        [item] = json.loads(mimiclab("list", "--json")[1])

    assert item["status"] == "running"
    assert item["worked"] is not None


def test_runs_that_mlflow_alone_has_are_listed_when_asked_for(root: Path, mimiclab: Command) -> None:
    make(root, "here")
    shutil.rmtree(make(root, "gone").folder)

    alone = json.loads(mimiclab("list", "--json")[1])
    items = json.loads(mimiclab("list", "--json", "--tracking", "sqlite:///mlflow.db")[1])

    assert [item["name"] for item in alone] == ["here"]
    assert [(item["name"], item["size"] is None, item["best"], item["mlflow"]) for item in items] == [
        ("gone", True, 0.5, "FINISHED"),
        ("here", False, 0.5, "FINISHED"),
    ]
    code, _, err = mimiclab("list", "--tracking", "sqlite:///mlflow.db", "--project", "other")
    assert (code, "has no project 'other'; those it has: Default, mimiclab" in err) == (2, True)


def test_a_store_that_is_gone_hides_no_folder(root: Path, mimiclab: Command) -> None:
    make(root, "here")
    (root / "mlflow.db").unlink()

    code, out, err = mimiclab("list", "--json")

    assert code == 0
    assert [item["mlflow"] for item in json.loads(out)] == [None]
    file = root / "mlflow.db"
    assert err == f"where.tracking: sqlite:///{file}: there is no file {file}; expected one that holds runs\n"
    assert not (root / "mlflow.db").exists()


def test_a_damaged_run_and_one_that_never_began_are_listed(root: Path, mimiclab: Command) -> None:
    (make(root, "damaged").folder / RUN).write_text("{")
    runs.prepare(experiment(root, "early"), fresh=False)

    items = json.loads(mimiclab("list", "--json")[1])

    assert [(item["name"], item["status"]) for item in items] == [("damaged", "damaged"), ("early", "unbegun")]


def test_a_place_without_runs_is_an_empty_list(mimiclab: Command) -> None:
    assert json.loads(mimiclab("list", "--json", "--storage", "nowhere")[1]) == []


# ---- rm ----


def test_rm_frees_the_folder_and_marks_mlflows_run(root: Path, mimiclab: Command) -> None:
    run, other = make(root, "x"), make(root, "y")

    code, out, err = mimiclab("rm", "x", "--yes")

    assert (code, err) == (0, "")
    assert left(root) == ["y"]
    assert stages(root, run.mlflow_run_id, other.mlflow_run_id) == ["deleted", "active"]
    shown, removed, collect = out.splitlines()
    assert shown.startswith("x, ")
    assert shown.endswith(f" in {root}/runs/x, MLflow's run {run.mlflow_run_id}")
    assert removed == f"removed {shown}"
    assert collect.startswith(f"MLflow at {run.tracking} marks 1 run as deleted; to free what it keeps: ")


@pytest.mark.parametrize(("answer", "there"), [("n\n", True), ("", True), ("y\n", False)])
def test_rm_asks_first(
    root: Path, mimiclab: Command, monkeypatch: pytest.MonkeyPatch, answer: str, there: bool
) -> None:
    run = make(root, "x")
    monkeypatch.setattr("sys.stdin", io.StringIO(answer))

    code, out, _ = mimiclab("rm", "x")

    assert "remove these 1, " in out
    assert code == int(there)
    assert run.folder.exists() == there
    assert stages(root, run.mlflow_run_id) == ["active" if there else "deleted"]


def test_rm_can_leave_mlflow_its_record(root: Path, mimiclab: Command) -> None:
    run = make(root, "x")

    assert mimiclab("rm", "x", "--yes", "--files-only")[0] == 0

    assert left(root) == []
    assert stages(root, run.mlflow_run_id) == ["active"]
    # And later the record too, by its name.
    assert mimiclab("rm", "x", "--yes")[0] == 0
    assert stages(root, run.mlflow_run_id) == ["deleted"]


def test_rm_of_a_search_takes_its_trials_and_its_record(root: Path, mimiclab: Command) -> None:
    parent = make_search(root)
    alone = make(root, "hunt-trial-07", parent=parent)  # a trial without a folder
    shutil.rmtree(alone.folder)
    near = make(root, "hunt-trial")
    trials = [runs.find(name).mlflow_run_id for name in TRIALS]

    assert mimiclab("rm", "hunt", "--yes")[0] == 0

    assert left(root) == ["hunt-trial"]
    assert stages(root, parent, *trials, alone.mlflow_run_id) == ["deleted"] * 5
    assert stages(root, near.mlflow_run_id) == ["active"]


def test_rm_of_seeds_takes_their_runs_and_what_they_share(root: Path, mimiclab: Command) -> None:
    parent = make_group(root, "seeds", "many", "many-seed-0", "many-seed-1")

    assert mimiclab("rm", "many", "--yes")[0] == 0

    assert left(root) == []
    assert stages(root, parent) == ["deleted"]


def test_rm_of_one_trial_leaves_the_others(root: Path, mimiclab: Command) -> None:
    parent = make_search(root)
    other = runs.find("hunt-trial-00").mlflow_run_id

    assert mimiclab("rm", "hunt-trial-01", "--yes")[0] == 0

    assert left(root) == ["hunt", *TRIALS[:2]]
    assert stages(root, parent, other) == ["active", "active"]


@pytest.mark.parametrize("busy", ["itself", "hunt"])
@pytest.mark.parametrize("wanted", ["hunt", "hunt-trial-01", "hunt-trial-00-seed-1"])
@pytest.mark.slow
def test_rm_refuses_what_a_driver_is_at_work_on(root: Path, mimiclab: Command, busy: str, wanted: str) -> None:
    parent = make_search(root)
    busy = wanted if busy == "itself" else busy
    with Lease.take(Storage(root / "runs" / busy), busy):
        code, out, err = mimiclab("rm", wanted, "--yes")

    assert (code, out) == (2, "")
    assert "is at work in " in err
    assert err.endswith(f"runs/{busy}; expected it to be stopped first\n")
    assert left(root) == ["hunt", *TRIALS]
    assert stages(root, parent) == ["active"]


@pytest.mark.parametrize("stop", range(1, 13))
def test_rm_that_was_interrupted_is_gone_on_with(root: Path, stop: int, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = make_search(root)
    before = [parent, *(runs.find(name).mlflow_run_id for name in TRIALS)]
    calls = 0

    def counted(method: Callable[[Storage, str], None]) -> Callable[[Storage, str], None]:
        def call(storage: Storage, name: str) -> None:
            nonlocal calls
            calls += 1
            if calls == stop:
                raise KeyboardInterrupt
            method(storage, name)

        return call

    def rm() -> None:
        stores = Stores(None)
        wanted, _ = removal.targets(["hunt"], "./runs", stores, files_only=False)
        removal.remove(wanted, stores, lambda _: None)

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "delete", counted(Storage.delete))
        patch.setattr(Storage, "delete_folder", counted(Storage.delete_folder))
        try:
            rm()
        except KeyboardInterrupt:
            assert left(root)
            rm()
        else:
            assert calls < stop

    assert left(root) == []
    assert stages(root, *before) == ["deleted"] * 4


def test_rm_that_was_stopped_before_the_groups_record_is_gone_on_with(root: Path, mimiclab: Command) -> None:
    parent = make_group(root, "seeds", "many", "many-seed-0")
    assert mimiclab("rm", "many-seed-0", "--yes")[0] == 0

    assert mimiclab("rm", "many", "--yes")[0] == 0

    assert stages(root, parent) == ["deleted"]


def test_rm_clears_a_run_that_never_began(root: Path, mimiclab: Command) -> None:
    runs.prepare(experiment(root, "early"), fresh=False)

    assert mimiclab("rm", "early", "--yes")[0] == 0

    assert left(root) == []


@pytest.mark.parametrize("name", ["photos", "./runs/photos", "runs", ".", "..", ""])
def test_rm_never_removes_what_is_no_run(root: Path, mimiclab: Command, name: str) -> None:
    photo = root / "runs" / "photos" / "me.jpg"
    photo.parent.mkdir(parents=True)
    photo.touch()
    (photo.parent / EXPERIMENT).touch()

    code, _, err = mimiclab("rm", name, "--yes")

    assert code == 2
    assert err.startswith("error: run ")
    assert photo.exists()


def test_rm_of_a_link_removes_the_link_alone(root: Path, mimiclab: Command) -> None:
    run = make(root, "x")
    elsewhere = root / "elsewhere"
    run.checkpoints.local.rename(elsewhere)
    (run.folder / "checkpoints").symlink_to(elsewhere)

    code, _, err = mimiclab("rm", "x", "--yes")

    assert (code, err) == (0, "")
    assert left(root) == []
    assert len(list(elsewhere.iterdir())) == 2


def log_model(run: Run) -> Path:
    """A file of a model of the run, where MLflow keeps it."""
    client = connect(run.tracking)
    project = client.get_run(run.mlflow_run_id).info.experiment_id
    model = client.create_logged_model(project, run.name, source_run_id=run.mlflow_run_id)
    client.log_model_artifacts(model.model_id, str(run.folder))
    return Path(model.artifact_location.removeprefix("file://")) / RUN


def make_version(run: Run, name: str = "detector") -> None:
    client = connect(run.tracking)
    client.create_registered_model(name)
    client.create_model_version(name, f"{run.folder}", run.mlflow_run_id)


@pytest.mark.slow
def test_the_command_that_rm_prints_frees_the_model_and_keeps_a_registered_one(
    root: Path, mimiclab: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone, kept = make(root, "x"), make(root, "y")
    files = [log_model(gone), log_model(kept)]
    make_version(kept)
    assert [file.exists() for file in files] == [True, True]

    code, out, err = mimiclab("rm", "x", "y", "--yes")

    assert (code, err) == (0, "")
    assert "y stays in MLflow: detector version 1 was registered from it\n" in out
    assert left(root) == []
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    command = out.splitlines()[-1].partition("to free what it keeps: ")[2]
    subprocess.run(["sh", "-c", command], check=True)
    assert [file.exists() for file in files] == [False, True]
    assert list(Stores(None).of(kept.tracking).by_ids([gone.mlflow_run_id, kept.mlflow_run_id])) == [kept.mlflow_run_id]


def test_rm_asks_whether_a_registered_run_and_its_search_may_stay_in_mlflow(
    root: Path, mimiclab: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = make_search(root)
    trials = [runs.find(name) for name in TRIALS]
    ids = [parent, *(trial.mlflow_run_id for trial in trials)]
    make_version(trials[0])
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))

    code, out, _ = mimiclab("rm", "hunt")

    assert code == 0
    assert "hunt-trial-00 stays in MLflow: detector version 1 was registered from it\n" in out
    assert "hunt stays in MLflow: hunt-trial-00 does\n" in out
    assert ", but leave 2 in MLflow? [y/N]" in out
    assert left(root) == []
    assert stages(root, *ids) == ["active", "active", "deleted", "deleted"]
    assert mimiclab("rm", "hunt")[1].endswith("hunt stays in MLflow: hunt-trial-00 does\nnothing to remove\n")
    connect(trials[0].tracking).delete_model_version("detector", "1")
    assert mimiclab("rm", "hunt", "--yes")[0] == 0
    assert stages(root, *ids) == ["deleted"] * 4


# ---- names ----


@pytest.mark.parametrize(
    "args", [["runs", "rm", "nobody"], ["runs", "rm", "nobody", "--files-only"], ["compare", "nobody", "x"]]
)
def test_an_unknown_name_without_a_store_is_told_of_as_a_name(
    root: Path, args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "mlflow.db").unlink()

    with pytest.raises(SystemExit) as caught:
        main(args)

    assert caught.value.code == 2
    assert capsys.readouterr().err == (
        f"error: run nobody: there is no such name, id or folder; looked in {root}/runs, and MLflow was not asked: "
        f"there is no {root}/mlflow.db, and --tracking names no other store\n"
    )
    assert not (root / "mlflow.db").exists()


def test_a_name_that_means_two_things_is_refused(root: Path, mimiclab: Command) -> None:
    make(root, "x")
    make(root, "x-seed-0")
    uri = f"sqlite:///{root}/mlflow.db"
    ids = [tracking.open_run(uri, PROJECT, "twice", each, {}, {}) for each in ("abc", "def")]

    _, _, group = mimiclab("rm", "x", "--yes")
    _, _, twice = mimiclab("rm", "twice", "--yes")

    assert group.startswith(f"error: run x: it names a run, {root}/runs/x, and a group of 1 (x-seed-0); expected ")
    assert twice.startswith(f"error: run twice: it means 2 runs of {uri} (")
    assert all(f"{run_id} of mimiclab, 20" in twice for run_id in ids)
    assert left(root) == ["x", "x-seed-0"]
    assert mimiclab("rm", "runs/x", "--yes")[0] == 0
    assert mimiclab("rm", ids[0], "--yes")[0] == 0
    assert left(root) == ["x-seed-0"]
    assert stages(root, *ids) == ["deleted", "active"]


def test_a_forgotten_run_is_found_by_its_id_alone(root: Path, mimiclab: Command) -> None:
    uri = f"sqlite:///{root}/mlflow.db"
    old = tracking.open_run(uri, PROJECT, "x", "abc", {}, {})
    tracking.forget_run(uri, PROJECT, "x", "abc")
    new = tracking.open_run(uri, PROJECT, "x", "abc", {}, {})

    assert mimiclab("rm", "x", "--yes")[0] == 0

    assert stages(root, old, new) == ["active", "deleted"]
    assert mimiclab("rm", old[:8], "--yes")[0] == 0
    assert stages(root, old) == ["deleted"]


def test_a_deleted_run_without_a_folder_is_named(root: Path) -> None:
    run = make(root, "x")
    shutil.rmtree(run.folder)
    connect(run.tracking).delete_run(run.mlflow_run_id)

    with pytest.raises(
        UserError, match=rf"^run x: it was deleted in MLflow at {run.tracking} \(id {run.mlflow_run_id}\)"
    ):
        removal.targets(["x"], "./runs", Stores(None), files_only=False)
