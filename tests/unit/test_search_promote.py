"""Searches found by their names, and their trials as experiments; the command line of both."""

import os
from pathlib import Path

import pytest
from madeup import FILE, MadeUp, rising

from mimiclab.cli import main
from mimiclab.errors import UserError
from mimiclab.experiment import load_experiment, resolved_yaml
from mimiclab.search.find import find
from mimiclab.search.promote import promote
from mimiclab.search.record import RECORD

PATHS = """
name: look
seed: 7
data:
  train: {annotations: $DATA/train.json, images: here/images}
  val: {annotations: $DATA/val.json, images: ~/images}
model: {backbone: {weights: $WEIGHTS/a.pth}}
optim: {epochs: 9}
scale: {workers: 1}
where: {storage: ./runs, project: cells}
search:
  trials: 12
  max_t: 6
  workers_per_trial: 2
  reduction_factor: 3
  space:
    optim.lr: {loguniform: [1e-4, 1e-2]}
    model.pyramid.stagger: {choice: [0, 1]}
"""

SEARCH = """
search:
  algorithm: grid
  space: {model.backbone.weights: {choice: [null, $WEIGHTS/b$$.pth]}}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATA", "/data/$x")
    monkeypatch.setenv("WEIGHTS", "/weights")
    return tmp_path


@pytest.fixture
def made(folder: Path) -> MadeUp:
    """The second of three is the best; the third failed."""
    made = MadeUp(folder, PATHS)
    made.run(0, rising(0.20))
    made.run(1, rising(0.31))
    made.start(2)
    made.end(2, "failed", "no such file")
    made.write()
    return made


def mistake(*args: str | None, **more: object) -> str:
    with pytest.raises(UserError) as caught:
        promote(*args, **more)  # type: ignore[arg-type]
    return str(caught.value)


def test_the_best_trial_is_promoted_as_it_was_trained(made: MadeUp, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {name: os.environ[name] for name in ("DATA", "WEIGHTS")}
    for name in variables:  # those that the search was begun with count
        monkeypatch.delenv(name)
    file = promote("look")
    assert file == Path("look-trial-01.yaml")
    experiment, trained = load_experiment(file, environ=variables).experiment, made.trials[1].experiment
    assert experiment.name == "look-trial-01-promoted"
    assert experiment == trained.model_copy(update={"name": experiment.name})
    assert (experiment.optim.epochs, experiment.seed, experiment.scale.workers.max) == (6, 7, 2)
    assert experiment.search is None
    assert experiment.data.train is not None
    assert experiment.data.train.annotations == "/data/$x/train.json"
    assert experiment.data.train.images == "here/images"
    assert experiment.where.storage == "./runs"


def test_variables_stay_as_they_were_written(made: MadeUp) -> None:
    lines = [line.strip() for line in promote("look").read_text().splitlines()]
    assert "annotations: $DATA/train.json" in lines
    assert "images: ~/images" in lines
    assert "weights: $WEIGHTS/a.pth" in lines
    assert not any("/data/" in line for line in lines)


def test_a_record_of_an_earlier_version_has_its_variables_filled_in(folder: Path) -> None:
    made = MadeUp(folder, PATHS)
    first = made.events[0]
    del first["written"], first["variables"]
    first["experiment"] = resolved_yaml(load_experiment("look.yaml").experiment)
    made.run(0, rising(0.2))
    made.write()
    assert load_experiment(promote("look"), environ={}).experiment == made.trials[0].experiment.model_copy(
        update={"name": "look-trial-00-promoted"}
    )


@pytest.mark.parametrize("number", [0, 1])
def test_defaults_that_follow_from_what_is_searched_are_those_of_the_trial(folder: Path, number: int) -> None:
    """With weights a backbone's norm is another one than without."""
    text = FILE[: FILE.index("search:")] + "model: {backbone: {weights: $WEIGHTS/a$$b.pth}}\n" + SEARCH
    made = MadeUp(folder, text)
    for trial in (0, 1):
        made.run(trial, rising(0.2))
    made.write()
    file = promote("look", str(number))
    trained = made.trials[number].experiment
    assert trained.model.backbone.norm == ["group_norm", "frozen_bn"][number]
    assert load_experiment(file).experiment.model == trained.model
    assert ("weights: $WEIGHTS/b$$.pth" in file.read_text()) == bool(number)


def test_a_promoted_trial_says_where_it_comes_from(made: MadeUp, folder: Path) -> None:
    lines = promote("look").read_text().splitlines()
    value = rising(0.31)(6)
    assert lines[:4] == [
        f"# trial-01 of the search look (finished, place 1 of 12): student/AP {value!r} at epoch 6",
        "# What the search chose:",
        f"#   optim.lr: {made.trials[1].values['optim.lr']}",
        f"#   model.pyramid.stagger: {made.trials[1].values['model.pyramid.stagger']}",
    ]
    digest = made.storage.sha256(RECORD)
    assert lines[5] == f"#   {folder / 'runs' / 'look' / RECORD}, {len(made.events)} events, sha256 {digest}"
    assert not lines[6].startswith("#")  # nothing is known of a run whose folder is gone


@pytest.mark.parametrize("wanted", ["0", "00", "trial-00"])
def test_a_trial_is_named_or_numbered(made: MadeUp, wanted: str) -> None:
    assert promote("look", wanted) == Path("look-trial-00.yaml")
    trained = made.trials[0].experiment
    assert load_experiment("look-trial-00.yaml").experiment.optim.lr == trained.optim.lr


def test_a_search_is_known_by_its_name_its_folder_and_its_uri(made: MadeUp, folder: Path) -> None:
    expected = len(made.events)
    for reference in ("look", "runs/look", str(folder / "runs" / "look"), f"file://{folder}/runs/look"):
        place, record = find(reference)
        assert place.local == folder / "runs" / "look"
        assert len(record.events) == expected
    os.chdir("/")
    assert find("look", str(folder / "runs"))[0].local == folder / "runs" / "look"


def test_what_is_there_is_not_overwritten_unasked(made: MadeUp) -> None:
    Path("mine.yaml").write_text("mine")
    message = "mine.yaml: it exists; expected another --output, or --overwrite"
    assert mistake("look", output=Path("mine.yaml")) == message
    assert Path("mine.yaml").read_text() == "mine"
    promote("look", output=Path("mine.yaml"), overwrite=True)
    assert load_experiment("mine.yaml").experiment.name == "look-trial-01-promoted"


def test_mistakes_are_named(made: MadeUp) -> None:
    (Path("runs") / "other").mkdir()
    assert mistake("lokk") == "search lokk: no such name, folder or URI; searches in ./runs: look"
    assert mistake("other") == "search other: no such name, folder or URI; searches in ./runs: look"
    assert mistake("look", storage="nowhere") == ("search look: no such name, folder or URI; searches in nowhere: none")
    assert mistake("look", "12") == "search look: found no trial 12, expected one of trial-00 to trial-11"
    assert mistake("look", "best") == "search look: found no trial best, expected one of trial-00 to trial-11"
    assert mistake("look", "2") == (
        "search look: trial-02 was never evaluated, it is failed: no such file; expected a trial with a result"
    )
    assert mistake("look", "3") == (
        "search look: trial-03 was never evaluated, it is waiting; expected a trial with a result"
    )
    assert mistake("look", output=Path("no/such/folder.yaml")).startswith("no/such/folder.yaml: cannot be written: No")


def test_a_search_without_results_has_nothing_to_promote(folder: Path) -> None:
    made = MadeUp(folder, FILE)
    made.write()
    assert mistake("look") == "search look: no trial was evaluated yet, expected one to promote"


# ---- the command line ----


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(args)
    return caught.value.code, *capsys.readouterr()


def test_the_verbs_beside_a_search(made: MadeUp, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "search", "promote", "look", "0", "-o", "x.yaml") == (0, "mimiclab train x.yaml\n", "")
    assert run(capsys, "search", "promote", "look", "0", "-o", "x.yaml")[0] == 2
    assert run(capsys, "search", "promote", "look", "-o", "x.yaml", "--overwrite")[0] == 0
    code, out, err = run(capsys, "search", "report", "look")
    assert (code, err) == (0, "")
    assert Path(out.strip()).read_text().startswith("# look\n")


def test_what_is_no_verb_is_an_experiment(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("plain.yaml").write_text("name: plain\ndata: {scenes: {}}\n")
    message = "error: plain.yaml: it has no search: section, expected one such as\n"
    for args in (["plain.yaml"], ["run", "plain.yaml"], ["--fresh", "plain.yaml"], ["plain.yaml", "--fresh"]):
        code, out, err = run(capsys, "search", *args)
        assert (code, out) == (2, "")
        assert err.startswith(message)
    Path("promote").write_text("name: plain\ndata: {scenes: {}}\n")
    assert "it has no search: section" in run(capsys, "search", "./promote")[2]


def test_the_help_of_a_search_tells_its_options_and_the_verbs_beside_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    code, out, _ = run(capsys, "search", "--help")
    assert code == 0
    for text in ("EXPERIMENT", "--fresh", "--set", "--address", "promote", "report"):
        assert text in out
    assert "COMMAND" not in run(capsys, "search", "x.yaml", "--help")[1]
    assert run(capsys, "search")[0] == 2
