"""A run is its folder: found again by its experiment, refused to another one."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from mimiclab import checkpoint, runs
from mimiclab.errors import UserError
from mimiclab.experiment import identity, load_experiment
from mimiclab.runs import Run
from mimiclab.schema import Experiment

ID = "0123456789abcdef0123456789abcdef"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text("name: x\ndata: {scenes: {}}\n")


def experiment(*overrides: str) -> Experiment:
    return load_experiment("x.yaml", overrides).experiment


def make(name: str, mlflow_run_id: str = ID, storage: str = "./runs") -> Run:
    mine = experiment(f"name={name}", f"where.storage={storage}")
    run = Run(runs.prepare(mine, fresh=False), identity(mine), "sqlite:///x.db", mlflow_run_id, ("a", "b"), "running")
    run.write()
    return run


def said_of(run: Run | None) -> dict:
    """All that a run says, with its folder by name: two that look at the same folder are not the same object."""
    assert run is not None
    return {**vars(run), "storage": run.storage.name}


def save(run: Run, step: int, best: int | None) -> None:
    meta = {"step": step, "classes": ["a"], "best": None if best is None else {"step": best, "value": 0.5}}
    checkpoint.save(run.checkpoints, {"w": torch.tensor([float(step)])}, {}, meta)


# ---- the folder ----


def test_prepare_makes_the_folder_with_the_resolved_experiment(tmp_path):
    made = runs.prepare(experiment("optim.lr=0.5"), fresh=False)

    assert made.local == tmp_path / "runs" / "x"
    assert load_experiment(made.local / "experiment.yaml").experiment == experiment("optim.lr=0.5")
    assert list(made.sizes()) == ["experiment.yaml"]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["optim.epochs=40"],
        ["scale.workers=4", "scale.gpu=true"],
        ["where.tracking=http://server:5000", "where.project=other"],
    ],
)
def test_the_same_run_is_found_again(overrides):
    made = runs.prepare(experiment(), fresh=False)
    made.write("kept", b"")

    again = experiment(*overrides)

    assert runs.prepare(again, fresh=False).local == made.local
    assert "kept" in made.sizes()
    assert load_experiment(made.local / "experiment.yaml").experiment == again


def test_another_experiment_under_the_name_is_refused_with_what_changed(tmp_path):
    made = runs.prepare(experiment(), fresh=False)
    before = made.read("experiment.yaml")

    for act in (runs.check, runs.prepare):
        with pytest.raises(UserError) as caught:
            act(experiment("optim.lr=0.5", "optim.epochs=99", "model.pyramid.stagger=0"), fresh=False)

        first, *changed = str(caught.value).splitlines()
        assert str(tmp_path / "runs" / "x") in first
        assert changed == [
            "  model.pyramid.stagger: 1 -> 0",
            "  optim.lr: 0.0003 -> 0.5",
            "Give the new one another name, or start anew with --fresh, which removes the old one.",
        ]
    assert made.read("experiment.yaml") == before


def test_fresh_removes_what_was_there():
    made = runs.prepare(experiment(), fresh=False)
    (made / "checkpoints" / "step-00000001").write("weights", b"")
    made.write("progress.jsonl", b"")

    runs.check(experiment("optim.lr=0.5"), fresh=True)
    assert (made / "checkpoints").folders() == ["step-00000001"]
    runs.prepare(experiment("optim.lr=0.5"), fresh=True)

    assert list(made.sizes()) == ["experiment.yaml"]
    assert load_experiment(made.local / "experiment.yaml").experiment == experiment("optim.lr=0.5")


def test_fresh_leaves_the_lease_of_the_driver_that_starts_anew():
    made = runs.prepare(experiment(), fresh=False)
    made.write(".lease.json", b"{}")

    runs.prepare(experiment(), fresh=True)

    assert sorted(made.sizes()) == [".lease.json", "experiment.yaml"]


def test_fresh_is_no_matter_where_nothing_is():
    assert list(runs.prepare(experiment(), fresh=True).sizes()) == ["experiment.yaml"]


@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_that_is_no_run_is_left_alone(fresh):
    photo = Path("photos/x/me.jpg")
    photo.parent.mkdir(parents=True)
    photo.touch()

    with pytest.raises(UserError, match=r"photos/x: the folder holds something that is no run"):
        runs.prepare(experiment("where.storage=photos"), fresh=fresh)
    assert photo.exists()
    assert list(photo.parent.iterdir()) == [photo]


def test_a_folder_that_a_killed_start_left_is_no_hindrance():
    Path("runs/x").mkdir(parents=True)
    Path("runs/x/.experiment.yaml").write_text("na")

    assert "experiment.yaml" in runs.prepare(experiment(), fresh=False).sizes()


def test_a_storage_that_cannot_be_written_is_named(tmp_path):
    Path("file").touch()

    with pytest.raises(UserError) as caught:
        runs.check(experiment("where.storage=file/deep"), fresh=False)
    assert str(caught.value) == (
        f"where.storage: {tmp_path}/file/deep/x cannot be written: {tmp_path}/file is no folder that you may write to"
    )


def test_a_folder_that_is_a_file_is_named(tmp_path):
    Path("runs").mkdir()
    Path("runs/x").write_text("mine")

    for fresh in (False, True):
        with pytest.raises(UserError) as caught:
            runs.prepare(experiment(), fresh=fresh)
        assert str(caught.value) == (
            f"run {tmp_path}/runs/x: a file has this name; expected another name, or the file removed"
        )
    assert Path("runs/x").read_text() == "mine"


def test_a_storage_that_does_not_exist_yet_is_made_by_prepare_alone():
    mine = experiment("where.storage=not/yet")

    runs.check(mine, fresh=False)
    assert not Path("not").exists()
    runs.prepare(mine, fresh=False)
    assert Path("not/yet/x/experiment.yaml").is_file()


@pytest.mark.parametrize("uri", ["ftp://host/runs", "s3://bucket/runs?nonsense=1"])
def test_a_uri_of_no_known_kind_is_named(uri):
    with pytest.raises(UserError, match=rf"^where\.storage: {uri.partition('?')[0]}: cannot be opened as a folder or"):
        runs.check(experiment(f"where.storage={uri}"), fresh=False)


def test_what_needs_a_folder_says_so_of_a_run_in_a_bucket():
    mine = experiment("where.storage='s3://bucket/runs?region=eu-west-1'")

    assert runs.storage_of(mine).name == "s3://bucket/runs/x"
    with pytest.raises(UserError, match=r"^run s3://bucket/runs/x: it is not on this machine's file system"):
        runs.folder_of(mine)


# ---- run.json ----


def test_a_run_reads_back_as_written():
    run = make("x")

    ended = run.with_status("finished")

    assert ended.status == "finished"
    assert said_of(runs.read(run.folder)) == said_of(runs.read(run.storage)) == said_of(ended)
    assert run.experiment() == experiment()


def test_a_run_keeps_the_account_of_its_restarts():
    run = dataclasses.replace(make("x"), ledger={"attempts": [{"step": 3}]})
    run.write()

    assert runs.read(run.folder).ledger == run.ledger


def test_a_run_of_before_there_were_such_accounts_is_read():
    run = make("x")
    record = json.loads(run.storage.read("run.json"))
    del record["ledger"]
    run.storage.write("run.json", json.dumps(record).encode())

    assert runs.read(run.folder).ledger == {}


def test_a_run_is_named_as_its_folder():
    assert make("x").name == make("x").folder.name == "x"


def test_a_folder_without_run_json_is_no_run(tmp_path):
    Path("file").touch()

    assert runs.read(tmp_path) is None
    assert runs.read(tmp_path / "missing") is None
    assert runs.read(tmp_path / "file") is None


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"classes": [], "more": 1}', "\0\0\0\0"])
def test_a_broken_run_json_is_named(content):
    run = make("x")
    (run.folder / "run.json").write_text(content)

    with pytest.raises(UserError, match=r"runs/x: run\.json cannot be read: "):
        runs.read(run.folder)


# ---- finding one ----


@pytest.mark.parametrize("reference", ["x", "runs/x", "./runs/x/", ID, ID[:6]])
def test_a_run_is_found_by_name_folder_and_id(reference):
    make("other", ID[::-1])
    run = make("x")

    assert said_of(runs.find(reference)) == said_of(run)


def test_a_run_is_found_in_another_storage_and_by_its_absolute_path(tmp_path):
    run = make("x", storage="elsewhere")

    assert said_of(runs.find("x", "elsewhere")) == said_of(run)
    assert said_of(runs.find(str(tmp_path / "elsewhere" / "x"))) == said_of(run)
    with pytest.raises(UserError, match="no such name"):
        runs.find("x")


def test_an_unknown_run_is_answered_with_those_there_are():
    make("x")
    make("b-2")
    Path("runs/data").mkdir()

    with pytest.raises(UserError) as caught:
        runs.find("y")

    assert str(caught.value) == "run y: no such name, id or folder; runs in ./runs: b-2, x"


def test_without_runs_the_answer_says_so():
    with pytest.raises(UserError, match=r"no such name, id or folder; runs in nowhere: none$"):
        runs.find("x", "nowhere")


def test_an_id_needs_six_characters_and_has_to_be_the_only_one():
    make("a", ID)
    make("b", ID[:8] + "f" * 24)

    with pytest.raises(UserError, match="no such name"):
        runs.find(ID[:5])
    with pytest.raises(UserError, match=r"several MLflow ids begin so \(a, b\)"):
        runs.find(ID[:8])
    assert runs.find(ID[:9]).folder.name == "a"


def test_a_file_is_no_run():
    make("x")

    with pytest.raises(UserError, match="no such name, id or folder"):
        runs.find("runs/x/run.json")


# ---- its weights ----


def test_best_is_the_checkpoint_of_the_best_evaluation():
    run = make("x")
    for step, best in ((10, None), (20, 20), (30, 20)):
        save(run, step, best)

    assert run.best().step == 20


def test_best_is_the_newest_where_it_is_the_best_or_none_was_evaluated():
    run = make("x")
    save(run, 10, None)
    assert run.best().step == 10
    save(run, 20, 20)
    assert run.best().step == 20


def test_a_run_without_checkpoints_has_no_best():
    run = make("x")

    with pytest.raises(UserError, match=r"runs/x: it has no checkpoint yet, expected one in .*runs/x/checkpoints"):
        run.best()


def test_a_damaged_best_is_named():
    run = make("x")
    for step in (10, 20):
        save(run, step, 10)
    (run.checkpoints / "step-00000010").write("manifest.json", b"{}")

    with pytest.raises(UserError, match=r"step-00000010: manifest\.json is damaged"):
        run.best()


def test_damaged_weights_are_named_when_they_are_read():
    run = make("x")
    save(run, 10, 10)
    (run.checkpoints / "step-00000010").write("weights.safetensors", b"")

    with pytest.raises(UserError, match=r"step-00000010: weights\.safetensors differs from its manifest"):
        run.best().weights()
