"""Images in, detections and pictures out."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mimiclab import checkpoint, runs
from mimiclab.build import build_detector
from mimiclab.data.coco import read_coco
from mimiclab.errors import UserError
from mimiclab.evaluate import detect
from mimiclab.experiment import identity, load_experiment
from mimiclab.predict import find_images, predict
from mimiclab.runs import Run

EXPERIMENT = """
name: tiny
data:
  scenes: {}
  resize: {short: 64, long: 96}
model:
  backbone: {name: resnet18, width: 16}
  pyramid: {channels: 16, max_level: 5}
  anchors: {scale: 2}
  student: {head_width: 32, offset_channels: [8, 8]}
  teacher: {num_rois: 16, num_convs: 1}
"""
CLASSES = ("disk", "star")


def make_run(root: Path, *overrides: str) -> Run:
    """A run with one checkpoint of random weights."""
    file = root / "tiny.yaml"
    file.write_text(EXPERIMENT)
    experiment = load_experiment(file, [f"where.storage={root / 'runs'}", *overrides]).experiment
    folder = runs.prepare(experiment, fresh=False)
    run = Run(folder, identity(experiment), "sqlite:///x.db", "0" * 32, CLASSES, "finished")
    run.write()
    torch.manual_seed(0)
    state = build_detector(experiment.model, CLASSES).state_dict()
    meta = {"step": 3, "classes": list(CLASSES), "best": None, "experiment": experiment.model_dump(mode="json")}
    checkpoint.save(run.checkpoints, state, {}, meta)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return make_run(tmp_path_factory.mktemp("storage"))


def draw(path: Path, width: int, height: int, mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(width)
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode).save(path)
    return path


@pytest.fixture
def images(tmp_path) -> list[Path]:
    return [draw(tmp_path / "a.png", 150, 100), draw(tmp_path / "b.png", 64, 64), draw(tmp_path / "c.png", 37, 71)]


def nothing() -> None:
    pass


def test_detections_and_pictures_are_written(run, images, tmp_path):
    calls = []

    results = predict(run, images, tmp_path / "out" / "deep", min_score=0.0, done=lambda: calls.append(1))

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
    pictures = sorted(path.name for path in (tmp_path / "out" / "deep").glob("*.png"))
    assert pictures == ["a.png", "b.png", "c.png"]
    with Image.open(tmp_path / "out" / "deep" / "a.png") as picture:
        assert picture.width == 320
        assert picture.height > 200


def test_detections_are_those_of_an_evaluation(run, images, tmp_path):
    sizes = {path: Image.open(path).size for path in images}
    entries = [
        {"id": number, "file_name": path.name, "width": sizes[path][0], "height": sizes[path][1]}
        for number, path in enumerate(images)
    ]
    categories = [{"id": 10 + label, "name": name} for label, name in enumerate(CLASSES)]
    file = tmp_path / "instances.json"
    file.write_text(json.dumps({"images": entries, "annotations": [], "categories": categories}))
    experiment = run.experiment()
    detector = build_detector(experiment.model, CLASSES)
    detector.load_state_dict(run.best().weights())
    config = experiment.eval.model_copy(update={"batch_size": 1})

    rows = detect(detector, read_coco(file, tmp_path), experiment.data, config, rank=0, world=1)["student"]
    results = predict(run, images, tmp_path / "out", min_score=0.0, done=nothing)

    for number, path in enumerate(images):
        own = rows[rows[:, 0] == number]
        expected = np.concatenate([own[:, 1:3], own[:, 1:3] + own[:, 3:5]], 1)
        np.testing.assert_allclose([found.box for found in results[path]], expected, atol=1e-3)
        np.testing.assert_allclose([found.score for found in results[path]], own[:, 5], rtol=1e-5)
        assert [CLASSES.index(found.label) for found in results[path]] == (own[:, 6] - 10).tolist()


def test_min_score_leaves_out_what_is_below(run, images, tmp_path):
    every = predict(run, images, tmp_path / "every", min_score=0.0, done=nothing)[images[0]]
    bound = sorted(found.score for found in every)[len(every) // 2]

    some = predict(run, images, tmp_path / "some", min_score=bound, done=nothing)[images[0]]

    assert 0 < len(some) < len(every)
    assert some == [found for found in every if found.score >= bound]


def test_images_of_the_same_name_are_all_kept(run, tmp_path):
    images = [
        draw(tmp_path / "x" / "a.png", 64, 64),
        draw(tmp_path / "y" / "a.jpg", 64, 64),
        draw(tmp_path / "z" / "a-2.png", 64, 64),
    ]

    predict(run, images, tmp_path / "out", min_score=0.9, done=nothing)

    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "a-2-2.png",
        "a-2.png",
        "a.png",
        "detections.json",
    ]
    assert len(json.loads((tmp_path / "out" / "detections.json").read_text())) == 3


def test_grey_and_transparent_images_are_read(run, tmp_path):
    images = [draw(tmp_path / f"{mode}.png", 40, 40, mode) for mode in ("L", "RGBA")]

    assert set(predict(run, images, tmp_path / "out", min_score=0.0, done=nothing)) == set(images)


def test_pictures_never_replace_the_images(run, images, tmp_path):
    before = [path.read_bytes() for path in images]

    with pytest.raises(UserError, match=r"the picture of .*a\.png would replace an image there"):
        predict(run, images, tmp_path, min_score=0.0, done=nothing)

    assert [path.read_bytes() for path in images] == before
    assert not (tmp_path / "detections.json").exists()


def test_an_image_that_cannot_be_decoded_is_named(run, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_text("no picture")

    with pytest.raises(UserError, match=r"broken\.jpg: cannot be read as an image"):
        predict(run, [broken], tmp_path / "out", min_score=0.0, done=nothing)


def test_a_folder_that_cannot_be_made_is_named(run, images):
    with pytest.raises(UserError, match=r"--save .*a\.png: cannot be made: File exists"):
        predict(run, images[1:], images[0], min_score=0.0, done=nothing)


def test_the_weights_that_training_started_from_are_not_needed(tmp_path, images):
    (tmp_path / "first").mkdir()
    start = make_run(tmp_path / "first")
    weights = start.best().path / checkpoint.WEIGHTS
    run = make_run(tmp_path, f"model.weights={weights}")
    weights.unlink()

    assert predict(run, images[:1], tmp_path / "out", min_score=0.0, done=nothing)


# ---- finding images ----


def test_folders_give_their_images_and_files_are_taken_as_they_are(tmp_path):
    for name in ("b.JPG", "a.png", "notes.txt", "c.webp"):
        (tmp_path / name).touch()
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "d.png").touch()

    found = find_images([tmp_path / "notes.txt", tmp_path, tmp_path / "a.png"])

    assert [path.name for path in found] == ["notes.txt", "a.png", "b.JPG", "c.webp"]


def test_a_path_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(UserError, match=r"image .*/gone\.png: no such file or folder"):
        find_images([tmp_path, tmp_path / "gone.png"])


def test_a_folder_without_images_is_named(tmp_path):
    (tmp_path / "notes.txt").touch()

    with pytest.raises(UserError, match=r"no images, expected files ending in \.jpg, ") as caught:
        find_images([tmp_path])
    assert str(tmp_path) in str(caught.value)
