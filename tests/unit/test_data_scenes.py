"""The synthetic set: deterministic, sound, and as described."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mimiclab.data import scenes
from mimiclab.data.coco import read_coco
from mimiclab.data.scenes import CLASSES, ScenesPaths, generate_scenes, render_scene
from mimiclab.errors import UserError


def generate(root: Path, seed: int = 0, num_train: int = 14, num_val: int = 13, size: int = 64) -> ScenesPaths:
    return generate_scenes(root, seed=seed, num_train=num_train, num_val=num_val, size=size)


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def hashes(folder: Path) -> set[str]:
    return {hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_images(tmp_path: Path) -> None:
    first = generate(tmp_path / "a")
    generate(tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    other = generate(tmp_path / "c", seed=1)
    assert not hashes(first.train_images) & hashes(other.train_images)


def test_a_version_never_changes_what_it_draws(tmp_path: Path) -> None:
    # Fails where a change to the generator needs a new version, and where NumPy or Pillow draw differently. Of
    # images the pixels are compared: how small their bytes get is up to the zlib that Pillow comes with.
    paths = generate(tmp_path, seed=7, num_train=6, num_val=3)
    digest = hashlib.sha256(paths.train_annotations.read_bytes() + paths.val_annotations.read_bytes())
    for path in (*sorted(paths.train_images.iterdir()), *sorted(paths.val_images.iterdir())):
        with Image.open(path) as image:
            digest.update(np.asarray(image).tobytes())
    assert (scenes._VERSION, digest.hexdigest()[:16]) == (1, "44c63a5da847cdbb")


def test_training_and_validation_images_are_disjoint(tmp_path: Path) -> None:
    paths = generate(tmp_path)
    train, val = hashes(paths.train_images), hashes(paths.val_images)
    assert (len(train), len(val)) == (14, 13)
    assert not train & val


def test_the_set_is_read_without_complaint(tmp_path: Path) -> None:
    paths = generate(tmp_path, num_train=48)
    for annotations, images, num_images in (
        (paths.train_annotations, paths.train_images, 48),
        (paths.val_annotations, paths.val_images, 13),
    ):
        dataset = read_coco(annotations, images)
        assert dataset.classes == CLASSES
        assert dataset.left_out == dataset.notes == ()
        assert len(dataset.images) == num_images
        assert sum(len(record.boxes) == 0 for record in dataset.images) == num_images // 12
        assert all((record.areas > 0).all() for record in dataset.images)
    labels = Counter(
        label for record in read_coco(paths.train_annotations, paths.train_images).images for label in record.labels
    )
    assert set(labels) == {0, 1, 2, 3}


def test_boxes_are_tight_around_the_drawn_shapes() -> None:
    checked = 0
    for index in range(60):
        _, objects = render_scene(0, 0, index, 128)
        for item in objects:
            box = np.array(item.box)
            drawn = extent(item.coverage > 0)
            # No covered pixel lies outside ...
            assert (drawn[:2] > box[:2] - 1).all()
            assert (drawn[2:] < box[2:] + 1).all()
            assert ((box >= 0) & (box <= 128)).all()
            # ... and, but for shapes that the border cuts, the box reaches no whole pixel further.
            if ((box > 0) & (box < 128)).all():
                assert (np.abs(box - drawn) < 1).all()
                checked += 1
    assert checked > 100


def extent(mask: np.ndarray) -> np.ndarray:
    """The box (xyxy) of what is true in a mask (H, W)."""
    rows, columns = np.nonzero(mask)
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


def test_the_box_is_where_the_pixels_change() -> None:
    rng = np.random.Generator(np.random.Philox(0))
    for name in CLASSES:
        outline = scenes._object_outline(rng, name)
        shape = scenes._rasterise(outline, 30.0, np.array([50.2, 60.7]), 128)
        canvas = np.full((128, 128, 3), 128, dtype=np.float32)
        scenes._paint(rng, canvas, shape.coverage)
        drawn = extent((canvas != 128).any(axis=2))
        x1, y1, x2, y2 = shape.box
        assert (np.abs(np.array(shape.box) - drawn) < 1).all()
        assert max(x2 - x1, y2 - y1) == pytest.approx(30, abs=0.5)
        assert ((x1 + x2) / 2, (y1 + y2) / 2) == pytest.approx((50.2, 60.7), abs=0.3)


def test_every_object_stays_visible() -> None:
    # Later objects cover earlier ones; distractors are not in the list, so this is a bound from one side.
    overlaps = 0
    for index in range(60):
        _, objects = render_scene(0, 0, index, 128)
        for position, item in enumerate(objects):
            seen = item.coverage.copy()
            for later in objects[position + 1 :]:
                seen *= 1 - later.coverage
            overlaps += bool(seen.sum() < 0.95 * item.coverage.sum())
            assert seen.sum() >= 0.4 * item.full_area
    assert overlaps > 10


@pytest.mark.slow
def test_sizes_and_numbers_are_as_described() -> None:
    drawn = [render_scene(0, 0, index, 128)[1] for index in range(240)]
    assert sum(not objects for objects in drawn) == 20
    assert {len(objects) for objects in drawn} == set(range(7))
    sides = np.array([max(x2 - x1, y2 - y1) for objects in drawn for x1, y1, x2, y2 in (o.box for o in objects)])
    assert sides.max() > 90
    assert 0.04 < (sides < 13).mean() < 0.2
    assert 0.6 < ((sides >= 13) & (sides <= 60.5)).mean() < 0.9
    labels = Counter(item.label for objects in drawn for item in objects)
    assert min(labels.values()) > 0.8 * max(labels.values())


def test_an_image_depends_on_no_other(tmp_path: Path) -> None:
    small = generate(tmp_path, num_train=3)
    large = generate(tmp_path, num_train=6)
    for name in ("000001.png", "000003.png"):
        assert (small.train_images / name).read_bytes() == (large.train_images / name).read_bytes()


def test_a_complete_set_is_left_alone(tmp_path: Path) -> None:
    paths = generate(tmp_path)
    before = paths.train_annotations.stat()
    assert generate(tmp_path) == paths
    assert paths.train_annotations.stat() == before


def test_an_interruption_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = scenes.render_scene

    def interrupted(seed: int, stream: int, index: int, size: int):  # type: ignore[no-untyped-def]
        if stream == 1 and index == 5:
            raise KeyboardInterrupt
        return real(seed, stream, index, size)

    with monkeypatch.context() as patch:
        patch.setattr(scenes, "render_scene", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate(tmp_path)
    assert list(tmp_path.iterdir()) == []
    paths = generate(tmp_path)
    assert len(json.loads(paths.val_annotations.read_text())["images"]) == 13


def test_what_is_no_complete_set_is_not_touched(tmp_path: Path) -> None:
    paths = generate(tmp_path)
    marker = paths.train_images.parent / "complete.json"
    marker.unlink()
    with pytest.raises(UserError, match="expected a complete set of scenes"):
        generate(tmp_path)
    assert paths.train_annotations.is_file()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"seed": -1}, "seed must be 0 or more, found -1"),
        ({"num_train": 0}, "num_train must be 1 or more"),
        ({"num_val": 0}, "num_val must be 1 or more"),
        ({"size": 16}, "size must be 32 or more"),
    ],
)
def test_arguments_out_of_range_are_refused(tmp_path: Path, keys: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate(tmp_path, **keys)
    assert list(tmp_path.iterdir()) == []


def test_a_root_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file.*cannot write the scenes there"):
        generate(tmp_path / "file")
