"""The verbs of a trained run and of registered models, as a user calls them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from trained import CLASSES, draw, make_run, track

from mimiclab import summary
from mimiclab.cli import main
from mimiclab.runs import Run

pytestmark = pytest.mark.usefixtures("one_thread")

Mimiclab = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("storage")
    return track(make_run(root), f"sqlite:///{root}/mlflow.db")


@pytest.fixture(autouse=True)
def folder(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to(run.folder.parent)
    draw(tmp_path / "street" / "a.png", 150, 100)
    draw(tmp_path / "street" / "deep" / "b.png", 64, 64)


@pytest.fixture
def mimiclab(capsys: pytest.CaptureFixture[str]) -> Mimiclab:
    def call(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(args)
        assert isinstance(caught.value.code, int)
        return caught.value.code, *capsys.readouterr()

    return call


def test_a_registered_model_predicts_as_its_run(run: Run, mimiclab: Mimiclab) -> None:
    tracking = ("--tracking", run.tracking)

    code, out, _ = mimiclab("models", "register", "tiny", "--name", "shapes")
    assert code == 0
    assert out.startswith("shapes version 1 is champion: run tiny, step 3\n")
    assert f"mimiclab predict models:/shapes@champion IMAGE... --tracking {run.tracking}\n" in out
    assert "mlflow models serve -m models:/shapes@champion " in out
    assert [
        line.split()[1::2] for line in mimiclab("models", "list", *tracking)[1].splitlines() if "shapes" in line
    ] == [["shapes", "1", "champion", "tiny", "│"]]
    assert mimiclab("predict", "tiny", "street", "--save", "x", "--min-score", "0.2")[0] == 0
    assert (
        mimiclab("predict", "models:/shapes@champion", "street", "--save", "y", "--min-score", "0.2", *tracking)[0] == 0
    )

    written = [json.loads(Path(name, "detections.json").read_text()) for name in ("x", "y")]
    assert written[0] == written[1]
    assert list(written[0]) == ["street/a.png", "street/deep/b.png"]
    assert all(len(found) > 10 for found in written[0].values())


def test_a_store_without_models_says_so(run: Run, mimiclab: Mimiclab, tmp_path: Path) -> None:
    other = track(run, f"sqlite:///{tmp_path}/other.db").tracking
    run.write()  # as it was

    assert mimiclab("models", "list", "--tracking", other) == (
        0,
        f"{other}: no model is registered; mimiclab models register RUN does\n",
        "",
    )


def test_an_image_that_cannot_be_read_is_left_out_and_the_exit_code_says_so(mimiclab: Mimiclab) -> None:
    Path("street/broken.jpg").write_text("no picture")

    code, out, err = mimiclab("predict", "tiny", "street", "--save", "out")

    first, *middle, last = out.splitlines()
    assert (code, err) == (1, "")
    assert first.startswith("left out: street/broken.jpg: cannot be read as an image")
    assert [line.partition(":")[0] for line in middle] == ["street/a.png", "street/deep/b.png"]
    assert last.startswith("3 images, 1 of them left out, ")
    assert last.endswith(" images/s; pictures and detections.json in out")


def test_of_many_images_the_sum_is_said_and_how_far_it_is(mimiclab: Mimiclab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summary, "_SECONDS_PER_LINE", 0.0)
    for number in range(20):
        draw(Path(f"street/{number}.png"), 32, 32)

    code, out, _ = mimiclab("predict", "tiny", "street", "--min-score", "0.2")

    lines = out.splitlines()
    assert code == 0
    assert lines[0].startswith("1 of 22 images, ")
    assert lines[20].startswith("21 of 22 images, ")
    assert lines[21].startswith("found: ")
    assert lines[22].startswith("22 images, ")
    assert len(lines) == 23


def write_coco(classes: tuple[str, ...], boxes: int = 1) -> None:
    image = {"id": 1, "file_name": "a.png", "width": 150, "height": 100}
    objects = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 50, 50], "area": 2500, "iscrowd": 0}]
    categories = [{"id": number, "name": name} for number, name in enumerate(classes, start=1)]
    Path("new.json").write_text(
        json.dumps({"images": [image], "annotations": objects[:boxes], "categories": categories})
    )


def test_results_for_a_scorer_have_the_ids_of_an_annotation_file(mimiclab: Mimiclab) -> None:
    write_coco(CLASSES)

    code, out, _ = mimiclab("predict", "tiny", "street/a.png", "--coco", "new.json", "--save", "out")

    assert code == 0
    assert out.endswith("pictures, detections.json and coco_results.json in out\n")
    assert {each["image_id"] for each in json.loads(Path("out/coco_results.json").read_text())} == {1}
    code, _, err = mimiclab("predict", "tiny", "street", "--coco", "new.json", "--save", "never")
    assert code == 2
    assert err == "error: new.json: 1 of 2 images have no entry there, the first is street/deep/b.png\n"
    assert not Path("never").exists()


def test_a_run_is_evaluated_on_other_data(mimiclab: Mimiclab) -> None:
    write_coco(CLASSES)

    code, out, _ = mimiclab("evaluate", "tiny", "--data", "new.json", "--images", "street")

    assert code == 0
    assert out.startswith("evaluating 1 images of new.json\n")
    assert "AP50" in out


def test_other_data_has_to_be_whole_and_of_the_same_classes(mimiclab: Mimiclab) -> None:
    write_coco(("disk", "moon"))
    mistakes = {
        ("--data", "new.json", "--images", "street"): "expected those that run tiny was trained for: ['disk', 'star']",
        ("--data", "new.json"): "--data new.json: expected --images with the folder of its images, found none",
        ("--images", "street"): "--images street: expected --data with the annotation file that lists them, found none",
        ("--data", "street", "--images", "street"): "it goes with an annotation file (.json), found --data street",
    }
    for options, message in mistakes.items():
        code, _, err = mimiclab("evaluate", "tiny", *options)
        assert code == 2
        assert err.endswith(f"{message}\n")
    write_coco(CLASSES, boxes=0)
    assert mimiclab("evaluate", "tiny", "--data", "new.json", "--images", "street")[2] == (
        "error: --data new.json: expected at least one object that is no crowd, found none\n"
    )
