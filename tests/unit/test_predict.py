"""Image files in, detections and pictures out."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from trained import CLASSES, draw, make_run

from mimiclab import checkpoint
from mimiclab.data.coco import read_coco
from mimiclab.data.results import CocoIds, read_ids
from mimiclab.deployed import Deployed
from mimiclab.errors import UserError
from mimiclab.evaluate import detect
from mimiclab.predict import find_images, load_deployed, predict
from mimiclab.runs import Run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("storage"))


@pytest.fixture(scope="module")
def model(run: Run) -> Deployed:
    return load_deployed(run)


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    return [draw(tmp_path / "a.png", 150, 100), draw(tmp_path / "b.png", 64, 64), draw(tmp_path / "c.png", 37, 71)]


def write_coco(file: Path, images: list[Path]) -> Path:
    """An annotation file of these images, by name, with ids from 100 and classes from 10 in reverse order."""
    sizes = {path: Image.open(path).size for path in images}
    entries = [
        {"id": number, "file_name": path.name, "width": sizes[path][0], "height": sizes[path][1]}
        for number, path in enumerate(images, start=100)
    ]
    categories = [{"id": 10 + label, "name": name} for label, name in enumerate(CLASSES)]
    file.write_text(json.dumps({"images": entries, "annotations": [], "categories": categories[::-1]}))
    return file


def test_detections_and_pictures_are_written(model: Deployed, images: list[Path], tmp_path: Path) -> None:
    calls = []

    results = predict(model, images, tmp_path / "out" / "deep", min_score=0.0, done=lambda: calls.append(1)).found

    written = json.loads((tmp_path / "out" / "deep" / "detections.json").read_text())
    assert list(written) == [str(path) for path in images]
    assert len(calls) == len(images)
    for path in images:
        width, height = Image.open(path).size
        assert len(results[path]) > 10
        assert written[str(path)] == [
            {"box": list(found.box), "score": found.score, "label": found.label} for found in results[path]
        ]
        for found in results[path]:
            x1, y1, x2, y2 = found.box
            assert 0 <= x1 < x2 <= width
            assert 0 <= y1 < y2 <= height
            assert found.label in CLASSES
            assert 0 < found.score < 1
        # The whole image was looked at, not only the part that the resized one's numbers would reach.
        assert max(found.box[2] for found in results[path]) > 0.9 * width
        assert max(found.box[3] for found in results[path]) > 0.9 * height
    names = sorted(path.name for path in (tmp_path / "out" / "deep").iterdir())
    assert names == ["a.png", "b.png", "c.png", "detections.json"]
    with Image.open(tmp_path / "out" / "deep" / "a.png") as picture:
        assert picture.width == 320
        assert picture.height > 200


def test_detections_are_those_of_an_evaluation(run: Run, model: Deployed, images: list[Path], tmp_path: Path) -> None:
    dataset = read_coco(write_coco(tmp_path / "instances.json", images), tmp_path)
    experiment = run.experiment()
    config = experiment.eval.model_copy(update={"batch_size": 1})

    rows = detect(model.detector, dataset, experiment.data, config, rank=0, world=1)["student"]
    results = predict(model, images, tmp_path / "out", min_score=0.0).found

    for number, path in enumerate(images, start=100):
        own = rows[rows[:, 0] == number]
        expected = np.concatenate([own[:, 1:3], own[:, 1:3] + own[:, 3:5]], 1)
        np.testing.assert_allclose([found.box for found in results[path]], expected, atol=1e-3)
        np.testing.assert_allclose([found.score for found in results[path]], own[:, 5], rtol=1e-5)
        assert [CLASSES.index(found.label) for found in results[path]] == (own[:, 6] - 10).tolist()


def test_what_is_found_in_an_image_depends_on_no_other(model: Deployed, tmp_path: Path) -> None:
    # Two that are padded alike, one that is not; more than a batch in all.
    images = [draw(tmp_path / f"{width}.png", width, 64) for width in (*range(60, 67), *range(120, 126))]

    together = predict(model, images, tmp_path / "out", min_score=0.0).found

    for path in images[::3]:
        alone = predict(model, [path], tmp_path / "alone", min_score=0.0).found[path]
        assert len(alone) > 10
        np.testing.assert_allclose(
            [found.score for found in together[path]], [found.score for found in alone], rtol=1e-5
        )
        np.testing.assert_allclose([found.box for found in together[path]], [found.box for found in alone], atol=1e-3)


def test_min_score_leaves_out_what_is_below(model: Deployed, images: list[Path], tmp_path: Path) -> None:
    every = predict(model, images, tmp_path / "every", min_score=0.0).found[images[0]]
    bound = sorted(found.score for found in every)[len(every) // 2]

    some = predict(model, images, tmp_path / "some", min_score=bound).found[images[0]]

    assert 0 < len(some) < len(every)
    assert some == [found for found in every if found.score >= bound]


def test_images_of_the_same_name_are_all_kept(model: Deployed, tmp_path: Path) -> None:
    images = [
        draw(tmp_path / "x" / "a.png", 64, 64),
        draw(tmp_path / "y" / "a.jpg", 64, 64),
        draw(tmp_path / "z" / "a-2.png", 64, 64),
    ]

    predict(model, images, tmp_path / "out", min_score=0.9)

    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "a-2-2.png",
        "a-2.png",
        "a.png",
        "detections.json",
    ]
    assert len(json.loads((tmp_path / "out" / "detections.json").read_text())) == 3


def test_grey_and_transparent_images_are_read(model: Deployed, tmp_path: Path) -> None:
    images = [draw(tmp_path / f"{mode}.png", 40, 40, mode) for mode in ("L", "RGBA")]

    assert set(predict(model, images, tmp_path / "out", min_score=0.0).found) == set(images)


def test_pictures_never_replace_the_images(model: Deployed, images: list[Path], tmp_path: Path) -> None:
    before = [path.read_bytes() for path in images]

    with pytest.raises(UserError, match=r"the picture of .*a\.png would replace an image there"):
        predict(model, images, tmp_path, min_score=0.0)

    assert [path.read_bytes() for path in images] == before
    assert not (tmp_path / "detections.json").exists()


def test_an_image_that_cannot_be_decoded_is_named_and_left_out(
    model: Deployed, images: list[Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_text("no picture")
    calls: list[int] = []
    said: list[str] = []

    answer = predict(
        model,
        [images[0], broken, images[1]],
        tmp_path / "out",
        min_score=0.0,
        done=lambda: calls.append(1),
        warn=said.append,
    )

    assert list(answer.found) == images[:2]
    assert list(answer.skipped) == [broken]
    assert [line for line in said if "broken.jpg: cannot be read as an image" in line] == said
    assert len(said) == 1
    assert len(calls) == 3
    assert list(json.loads((tmp_path / "out" / "detections.json").read_text())) == [str(path) for path in images[:2]]


def test_who_stops_it_has_whole_files_only(model: Deployed, tmp_path: Path) -> None:
    images = [draw(tmp_path / f"{number}.png", 64, 64) for number in range(12)]
    before = predict(model, images[:1], tmp_path / "out", min_score=0.5)
    calls = []

    def stop() -> None:
        calls.append(1)
        if len(calls) == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict(model, images, tmp_path / "out", min_score=0.0, done=stop)

    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names <= {"detections.json", *(path.name for path in images)}
    for name in names - {"detections.json"}:
        Image.open(tmp_path / "out" / name).load()
    # Of all images or of none: this is still the earlier one.
    assert list(json.loads((tmp_path / "out" / "detections.json").read_text())) == [str(path) for path in before.found]


def test_a_folder_that_cannot_be_made_is_named(model: Deployed, images: list[Path]) -> None:
    with pytest.raises(UserError, match=r"--save .*a\.png: cannot be made: File exists"):
        predict(model, images[1:], images[0], min_score=0.0)


def test_the_weights_that_training_started_from_are_not_needed(tmp_path: Path, images: list[Path]) -> None:
    (tmp_path / "first").mkdir()
    start = make_run(tmp_path / "first")
    weights = start.best().path / checkpoint.WEIGHTS
    run = make_run(tmp_path, f"model.weights={weights}")
    weights.unlink()

    assert predict(load_deployed(run), images[:1], tmp_path / "out", min_score=0.0).found


# ---- COCO's results ----


def test_results_are_what_an_evaluation_scores(run: Run, model: Deployed, images: list[Path], tmp_path: Path) -> None:
    annotations = write_coco(tmp_path / "instances.json", images)
    experiment = run.experiment()
    config = experiment.eval.model_copy(update={"batch_size": 1})
    ids = read_ids(annotations, images, model.classes)

    # Whatever is left out of pictures: a scorer needs it.
    answer = predict(model, images, tmp_path / "out", min_score=1.0, ids=ids)

    assert not any(answer.found.values())
    results = json.loads((tmp_path / "out" / "coco_results.json").read_text())
    rows = detect(model.detector, read_coco(annotations, tmp_path), experiment.data, config, rank=0, world=1)["student"]
    assert len(rows) > 30
    found = [[each["image_id"], *each["bbox"], each["score"], each["category_id"]] for each in results]
    np.testing.assert_allclose(found, rows, rtol=1e-4, atol=1e-3)
    assert {type(each["image_id"]) for each in results} == {int}


def test_ids_are_those_of_the_longest_name_that_a_path_ends_with(tmp_path: Path) -> None:
    file = tmp_path / "instances.json"
    entries = [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "val/a.jpg"}, {"id": 3, "file_name": "b.jpg"}]
    file.write_text(json.dumps({"images": entries, "categories": [{"id": 7, "name": "disk"}]}))

    ids = read_ids(file, [Path("x/a.jpg"), Path("x/val/a.jpg"), Path("val/b.jpg")], ["disk"])

    assert ids == CocoIds({Path("x/a.jpg"): 1, Path("x/val/a.jpg"): 2, Path("val/b.jpg"): 3}, [7])


@pytest.mark.parametrize(
    ("images", "classes", "message"),
    [
        (["x/a.jpg", "x/c.jpg", "d.jpg"], ["disk"], r"2 of 3 images have no entry there, the first is x/c\.jpg"),
        (["x/a.jpg", "y/a.jpg"], ["disk"], r"y/a\.jpg and x/a\.jpg are both its image 1"),
        (["x/a.jpg"], ["disk", "star"], r"no category 'star', which the detector knows; found disk"),
    ],
)
def test_an_annotation_file_of_other_images_or_classes_is_refused(
    tmp_path: Path, images: list[str], classes: list[str], message: str
) -> None:
    file = tmp_path / "instances.json"
    file.write_text(
        json.dumps({"images": [{"id": 1, "file_name": "a.jpg"}], "categories": [{"id": 7, "name": "disk"}]})
    )

    with pytest.raises(UserError, match=message):
        read_ids(file, [Path(image) for image in images], classes)


def test_a_file_that_is_not_cocos_is_named(tmp_path: Path) -> None:
    file = tmp_path / "instances.json"
    file.write_text('{"images": [{"id": 1}], "categories": []}')

    with pytest.raises(UserError, match=r"instances\.json: not COCO's format: expected images with id and file_name"):
        read_ids(file, [Path("a.jpg")], [])


# ---- finding images ----


def test_folders_give_their_images_at_any_depth_and_files_are_taken_as_they_are(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.png", "notes.txt", "c.webp"):
        (tmp_path / name).touch()
    (tmp_path / "deeper" / "down").mkdir(parents=True)
    (tmp_path / "deeper" / "down" / "d.png").touch()

    found = find_images([tmp_path / "notes.txt", tmp_path, tmp_path / "a.png"])

    assert [path.name for path in found] == ["notes.txt", "a.png", "b.JPG", "c.webp", "d.png"]


def test_pictures_of_an_earlier_answer_are_no_images(tmp_path: Path) -> None:
    for name in ("a.png", "predictions/a.png", "predictions/deeper/b.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    predictions = tmp_path / "predictions"

    assert find_images([tmp_path], leave_out=predictions) == [tmp_path / "a.png"]
    # Unless that is what was asked for.
    assert len(find_images([predictions], leave_out=predictions)) == 2
    assert len(find_images([predictions / "deeper"], leave_out=predictions)) == 1


def test_a_path_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"image .*/gone\.png: no such file or folder"):
        find_images([tmp_path, tmp_path / "gone.png"])


def test_a_folder_without_images_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()

    with pytest.raises(UserError, match=r"no images, expected files ending in \.jpg, ") as caught:
        find_images([tmp_path])
    assert str(tmp_path) in str(caught.value)
