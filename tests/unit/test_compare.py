"""The comparison of runs, on a real store and real folders."""

import io
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ended import PROJECT, detect, ended, experiment, write_data
from PIL import Image
from rich.console import Console

from mimiclab import runs
from mimiclab.cli import main
from mimiclab.compare.entries import Entries, find_entries
from mimiclab.compare.images import Options
from mimiclab.compare.report import Report, report
from mimiclab.compare.table import Table
from mimiclab.data.coco import CocoDataset
from mimiclab.detections import DETECTIONS
from mimiclab.errors import UserError
from mimiclab.evaluate import score
from mimiclab.schema import Experiment
from mimiclab.tracking import parents
from mimiclab.tracking.client import connect

QUICK = Options(num_resamples=50)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs, each better than the last, the third one's rate another; a search of two trials, one repeated."""
    root = tmp_path_factory.mktemp("store")
    connect(f"sqlite:///{root}/mlflow.db").search_experiments()
    shutil.copy(root / "mlflow.db", root / "other.db")
    dataset = write_data(root)
    for name, skill, *overrides in (("one", 0.3), ("two", 0.8), ("three", 1.0, "optim.lr=0.5", "seed=3")):
        evaluated(experiment(root, str(name), *map(str, overrides)), dataset, float(skill))
    uri = f"sqlite:///{root}/mlflow.db"
    parent = parents.open_parent(uri, PROJECT, "search", "hunt", "abc", {}, "")
    for number, skill in enumerate((0.4, 0.9)):
        trial = experiment(root, f"hunt-trial-{number:02d}", f"optim.lr={0.1 + number}")
        evaluated(trial, dataset, skill, {parents.PARENT_TAG: parent})
    repeat = experiment(root, "hunt-trial-01-seed-1", f"optim.lr={0.1 + number}", "seed=1")
    evaluated(repeat, dataset, 0.8, {parents.PARENT_TAG: parent})
    return root


@pytest.fixture(autouse=True)
def here(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)


def evaluated(mine: Experiment, dataset: CocoDataset, skill: float, tags: dict[str, str] | None = None) -> runs.Run:
    """A run with the detections of such skill, and pycocotools' metrics of them."""
    heads = {"student": detect(dataset, skill, 1), "teacher": detect(dataset, 1.0, 2)}
    evaluation = score(dataset, [heads])
    return ended(mine, evaluation.metrics, evaluation.detections, dataset.columns.digest(), tags=tags)


def find(*references: str) -> Entries:
    return find_entries(references, storage="./runs", tracking=None)


def compared(*references: str, options: Options = QUICK, save: Path | None = None) -> Report:
    return report(find(*references), options, save, say=lambda _: None)


def table(found: Report, title: str) -> Table:
    return next(each for each in found.tables if title in each.title)


def shown(found: Report) -> str:
    console = Console(file=io.StringIO(), width=250)
    found.show(console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# ---- tables ----


def test_metrics_are_those_of_the_best_evaluations_with_the_difference_to_the_first() -> None:
    found = table(compared("one", "two"), "best evaluation")

    one, two = (runs.find(name).best().meta["metrics"] for name in ("one", "two"))
    rows = {row[0]: row[1:] for row in found.rows}
    assert found.columns == ("", "one", "two")
    assert found.title == "best evaluation of each run, and the difference to one"
    assert rows["step"] == ("20", "20")
    for name in ("student/AP", "student/AP75", "gap/AP"):
        difference = two[name] - one[name]
        assert difference
        assert rows[name] == (f"{one[name]:.3f}", f"{two[name]:.3f} ({difference:+.3f})")
    assert "student/AP_large" not in rows
    assert rows["teacher/AP"][1].endswith("(+0.000)")


def test_the_parameters_that_differ_are_shown_and_no_others() -> None:
    found = table(compared("one", "three"), "parameters")

    assert found.rows == (("seed", "0", "3"), ("optim.lr", "0.0003", "0.5"))
    assert "no parameter differs" in compared("one", "two").notes


def test_each_class_has_its_difference_with_an_interval() -> None:
    found = table(compared("one", "two"), "each class")

    one, two = (runs.find(name).best().meta["metrics"] for name in ("one", "two"))
    assert [row[0] for row in found.rows] == ["disk", "ring"]
    for name, first, second in found.rows:
        assert first == f"{one[f'student/AP/{name}']:.3f}"
        difference = two[f"student/AP/{name}"] - one[f"student/AP/{name}"]
        start = re.escape(f"{two[f'student/AP/{name}']:.3f} ({difference:+.3f} [")
        assert re.fullmatch(start + r"[+-]\d\.\d{3}, [+-]\d\.\d{3}\]\)", second)


def test_the_difference_in_ap_comes_with_images_resamples_and_a_verdict() -> None:
    found = compared("one", "two", "three")

    one, two = (runs.find(name).best().meta["metrics"]["student/AP"] for name in ("one", "two"))
    assert len(found.findings) == 2
    assert found.findings[0].startswith(
        f"two (step 20) against one (step 20): student/AP difference {two - one:+.3f} [+"
    )
    assert ", 8 images, 50 resamples: better; AP50 +" in found.findings[0]
    assert compared("two", "one").findings[0].split("difference ")[1].startswith(f"{one - two:+.3f} [-")
    assert ": worse; " in compared("two", "one").findings[0]


def test_one_run_against_its_own_detections_is_not_told_apart(root: Path) -> None:
    # "two" again, under another name and identity.
    dataset = write_data(root, "again")
    evaluated(experiment(root, "twin", "seed=9"), dataset, 0.8)

    found = compared("two", "twin")

    assert "difference +0.000 [+0.000, +0.000], 8 images, 50 resamples: not told apart by these images" in shown(found)
    assert not [each for each in found.tables if "disagreement" in each.title]


# ---- images ----


def test_images_of_disagreement_are_named_and_drawn_side_by_side(root: Path, tmp_path: Path) -> None:
    found = compared("one", "three", options=Options(num_images=2, num_resamples=5), save=tmp_path / "deep" / "p")

    rows = table(found, "disagreement").rows
    assert len(rows) == 2
    for row, picture in zip(rows, found.pictures, strict=True):
        name, objects, disputed, one, three = row
        assert picture.name.endswith(f"-{Path(name).stem}.png")
        assert 0 < int(disputed) <= int(objects)
        assert three == f"{objects} found, 0 wrong"
        assert not one.startswith(objects)
        # Ground truth and both runs, at 320 pixels.
        assert Image.open(picture).width == 3 * 320 + 2 * 4
    assert [each.name[:3] for each in found.pictures] == ["01-", "02-"]


def test_a_run_without_detections_is_left_out_and_the_others_are_paired(root: Path) -> None:
    file = root / "runs" / "two" / DETECTIONS
    kept = file.read_bytes()
    file.unlink()
    try:
        found = compared("one", "two", "three")
        first = compared("two", "one")
    finally:
        file.write_bytes(kept)

    assert [line.partition(" (")[0] for line in found.findings] == ["three"]
    reason = (
        "not compared image by image: two keeps no detections, as it was not evaluated yet, or by an earlier version"
    )
    assert [note for note in found.notes if note.startswith(reason)]
    assert first.findings == ()
    assert [note for note in first.notes if note.startswith(reason)]
    assert table(found, "best evaluation").columns == ("", "one", "two", "three")


def test_runs_on_different_validation_sets_are_not_paired(root: Path) -> None:
    dataset = write_data(root, "other", seed=5)
    evaluated(experiment(root, "elsewhere", val="other"), dataset, 0.8)

    found = compared("one", "elsewhere")

    assert found.findings == ()
    assert "not compared image by image: elsewhere was evaluated on another validation set than one" in found.notes
    assert table(found, "best evaluation")


def test_a_validation_set_that_changed_is_not_paired_on(root: Path) -> None:
    file = root / "val.json"
    before = file.read_text()
    content = json.loads(before)
    content["annotations"][0]["bbox"][0] += 1
    try:
        file.write_text(json.dumps(content))
        changed = compared("one", "two")
        file.unlink()
        gone = compared("one", "two")
    finally:
        file.write_text(before)

    start = "not compared image by image: the validation set is needed for it: "
    assert f"{start}{file} is not what it was when one was evaluated" in changed.notes
    assert [note for note in gone.notes if note.startswith(f"{start}{file}: no such ")]
    assert changed.findings == gone.findings == ()


# ---- which runs ----


def test_the_name_of_a_search_stands_for_its_trials_the_best_first() -> None:
    assert [each.label for each in find("hunt").runs] == ["hunt-trial-01", "hunt-trial-00"]
    assert [each.label for each in find("one", "hunt", "one").runs] == ["one", "hunt-trial-01", "hunt-trial-00"]


def test_what_repeats_a_trial_is_compared_where_it_is_named_itself(root: Path) -> None:
    repeat = "hunt-trial-01-seed-1"

    assert [each.label for each in find("hunt-trial-01", repeat).runs] == ["hunt-trial-01", repeat]
    assert [each.label for each in find("hunt", repeat).runs] == ["hunt-trial-01", "hunt-trial-00", repeat]
    in_mlflow = find_entries(["hunt", repeat], storage="nowhere", tracking=None)
    assert {each.label for each in in_mlflow.runs} == {"hunt-trial-00", "hunt-trial-01", repeat}
    assert len(find_entries(["hunt"], storage="nowhere", tracking=None).runs) == 2


def test_ids_and_folders_name_runs_too(root: Path) -> None:
    ids = [runs.find(name).mlflow_run_id for name in ("one", "two")]

    assert [each.label for each in find(ids[0], ids[1][:10], "runs/three", f"{root}/runs/one").runs] == [
        *("one", "two", "three")
    ]


def test_runs_that_mlflow_alone_has_are_compared_by_their_last_evaluations() -> None:
    found = report(find_entries(["two", "three"], storage="nowhere", tracking=None), QUICK, None, say=lambda _: None)

    metrics = table(found, "last evaluation of each run, as MLflow has it")
    best = runs.find("two").best().meta["metrics"]["student/AP"]
    rows = {row[0]: row[1:] for row in metrics.rows}
    assert rows["student/AP"][0] == f"{best / 2:.3f}"
    assert "step" not in rows
    assert not [name for name in rows if name.startswith(("best/", "train/"))]
    assert table(found, "parameters").rows == (("seed", "0", "3"), ("optim.lr", "0.0003", "0.5"))
    assert [note for note in found.notes if "MLflow alone has two" in note]


def test_two_runs_are_needed() -> None:
    with pytest.raises(UserError, match=r"^compare: found 1 run \(one\), expected two or more$"):
        find("one", "runs/one")


def test_a_run_that_was_deleted_in_mlflow_is_named_with_how_to_restore_it() -> None:
    run = runs.find("two")
    client = connect(run.tracking)
    client.delete_run(run.mlflow_run_id)
    try:
        with pytest.raises(UserError) as caught:
            find("one", "two")
    finally:
        client.restore_run(run.mlflow_run_id)

    assert str(caught.value) == (
        f"run two: it was deleted in MLflow at {run.tracking} (id {run.mlflow_run_id}); expected one that is there, or "
        f"this one restored: mlflow runs restore --run-id {run.mlflow_run_id}"
    )


def test_a_run_of_another_store_is_named(root: Path) -> None:
    other = f"sqlite:///{root}/other.db"

    with pytest.raises(UserError, match=r"^run one: MLflow at .*other\.db does not have it \(id [0-9a-f]{32}\)"):
        find_entries(["one", "two"], storage="./runs", tracking=other)


# ---- many runs ----


@pytest.fixture(scope="module")
def crowd(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 runs of one search, in a store and in folders of their own: copies of a real one's rows and files."""
    place = tmp_path_factory.mktemp("crowd")
    dataset = write_data(place)
    first = evaluated(experiment(place, "wide-trial-00", "optim.lr=0.1"), dataset, 0.5)
    database = sqlite3.connect(place / "mlflow.db")
    for number in range(1, 200):
        name, run_id = f"wide-trial-{number:02d}", f"{number:032x}"
        for rows in ("runs", "params", "tags", "metrics", "latest_metrics"):
            columns = [row[1] for row in database.execute(f"PRAGMA table_info({rows})")]
            chosen = ", ".join(f"'{run_id}'" if column == "run_uuid" else column for column in columns)
            database.execute(
                f"INSERT INTO {rows} SELECT {chosen} FROM {rows} WHERE run_uuid = ?", (first.mlflow_run_id,)
            )
        database.execute("UPDATE runs SET name = ? WHERE run_uuid = ?", (name, run_id))
        database.execute("UPDATE params SET value = ? WHERE run_uuid = ? AND key = 'optim.lr'", (str(number), run_id))
        folder = first.folder.with_name(name)
        shutil.copytree(first.folder, folder)
        record = json.loads((folder / runs.RUN).read_text())
        (folder / runs.RUN).write_text(json.dumps({**record, "mlflow_run_id": run_id}))
    database.commit()
    database.close()
    return place


@pytest.mark.slow
def test_two_hundred_runs_are_compared_in_seconds(crowd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(crowd)
    calls = count_searches(monkeypatch)
    find("wide-trial-00", "wide-trial-01")  # what is loaded once

    calls.clear()
    started, cpu = time.perf_counter(), time.process_time()
    found = compared("wide")
    text, markdown = shown(found), found.markdown(Path())
    print(f"{time.perf_counter() - started:.1f} s, {time.process_time() - cpu:.1f} s of CPU")

    assert time.process_time() - cpu < 10
    assert len(calls) <= 2
    assert "200 runs are compared by their metrics alone; up to 5, image by image as well" in found.notes
    assert {name for name in text.split() if name.startswith("wide-trial-")} >= {
        f"wide-trial-{n:02d}" for n in range(200)
    }
    assert "| wide\\-trial" not in markdown
    assert len(table(found, "parameters").rows) == 200
    assert table(found, "parameters").columns == ("run", "optim.lr")


@pytest.mark.slow
def test_two_hundred_names_that_mlflow_alone_has_take_few_calls(crowd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(crowd)
    calls = count_searches(monkeypatch)

    found = find_entries([f"wide-trial-{n:02d}" for n in range(200)], storage="nowhere", tracking=None)

    assert len(found.runs) == 200
    assert len(calls) <= 3


def count_searches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    from mlflow import MlflowClient

    calls: list[str] = []
    search, get = MlflowClient.search_runs, MlflowClient.get_run

    def counted(client: MlflowClient, *args: object, **more: object) -> object:
        calls.append("search")
        return search(client, *args, **more)  # type: ignore[arg-type]

    def got(client: MlflowClient, run_id: str) -> object:
        calls.append("get")
        return get(client, run_id)

    monkeypatch.setattr(MlflowClient, "search_runs", counted)
    monkeypatch.setattr(MlflowClient, "get_run", got)
    return calls


# ---- Markdown, and the command line ----


def test_markdown_holds_tables_findings_and_links_to_pictures(root: Path, tmp_path: Path) -> None:
    found = compared("one", "three", save=tmp_path / "pictures of two")

    text = found.markdown(tmp_path / "notes")

    assert text.startswith("# three against one\n\n- three (step 20) against one (step 20): student/AP difference +")
    assert "\n## parameters that differ\n\n|  | one | three |\n| :-- | --: | --: |\n| seed | 0 | 3 |\n" in text
    links = re.findall(r"!\[.*\]\((.*)\)", text)
    assert len(links) == len(found.pictures) > 0
    assert links[0] == f"../pictures%20of%20two/{found.pictures[0].name}"


def test_what_names_hold_is_no_markdown() -> None:
    text = Table("a*b*", ("", "x|y"), (("[k](l)", "`z`\n\\"),)).to_markdown()

    assert text == "## a\\*b\\*\n\n|  | x\\|y |\n| :-- | --: |\n| \\[k\\](l) | \\`z\\` \\\\ |\n"


@pytest.mark.slow
def test_the_command_line_compares_and_writes_markdown(root: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mimiclab", "compare", "one", "two", "--storage", str(root / "runs")),
            *("--markdown", str(tmp_path / "a" / "b.md"), "--save", str(tmp_path / "a" / "p"), "--resamples", "20"),
        ],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout == f"written: {tmp_path}/a/b.md\n"
    assert done.stderr == "matching the detections of 2 runs on 8 images\n"
    text = (tmp_path / "a" / "b.md").read_text()
    assert "8 images, 20 resamples: better" in text
    for link in re.findall(r"!\[.*\]\((.*)\)", text):
        assert (tmp_path / "a" / link).is_file()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["one", "nobody"], "run nobody: there is no such name, id or folder; looked in ROOT/runs and in MLflow at "),
        (["one", "./data"], "run ROOT/data: it holds no run, expected the folder of a run or a search"),
        (["one"], "compare: found 1 run (one), expected two or more"),
        (["one", "o'neil"], "run o'neil: there is no such name, id or folder"),
        (["one", "two", "--tracking", "http://127.0.0.1:9"], "where.tracking: http://127.0.0.1:9 does not answer"),
        (["one", "two", "--tracking", "sqlite:///no.db"], "where.tracking: sqlite:///no.db: there is no file"),
        (["one", "three", "--markdown", "val.json/x.md"], "val.json/x.md: cannot be written: "),
        (["one", "three", "--save", "val.json"], "val.json/01-"),
    ],
)
def test_a_mistake_is_one_message(
    args: list[str], message: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["compare", *args, "--resamples", "2"])

    assert caught.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: {message.replace('ROOT', str(root))}")
