"""The columns of a data set, and the images as views of them."""

import json
import pickle
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mimiclab.data.coco import CocoDataset, read_coco
from mimiclab.data.columns import Columns, ImageFiles, Images, names_of
from mimiclab.errors import UserError


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    """Five images in mixed order, the one of id i with i objects; images are not decoded here."""
    root = tmp_path_factory.mktemp("columns")
    images, annotations = [], []
    for image_id in (3, 0, 4, 1, 2):
        name = f"größe/{image_id}.jpg" if image_id == 2 else f"{image_id}.jpg"
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"image %d" % image_id)
        images.append({"id": image_id, "file_name": name, "width": 50 + image_id, "height": 40})
    for number in range(4):
        for image_id in range(number + 1, 5):
            box = [number, image_id, 5, 6]
            annotations.append(
                {"id": 100 + len(annotations), "image_id": image_id, "category_id": 7 + number % 2, "bbox": box}
                | {"iscrowd": number % 2, "area": 9.5}
            )
    categories = [{"id": 7, "name": "a"}, {"id": 8, "name": "b"}]
    path = root / "instances.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return read_coco(path, root)


def assert_equal(columns: Columns, other: Columns) -> None:
    for field in fields(Columns):
        column, expected = getattr(columns, field.name), getattr(other, field.name)
        assert column.dtype == expected.dtype, field.name
        np.testing.assert_array_equal(column, expected, err_msg=field.name)


def test_objects_lie_with_their_image_in_the_order_of_the_file(dataset: CocoDataset) -> None:
    columns = dataset.columns
    assert columns.ids.tolist() == [0, 1, 2, 3, 4]
    assert columns.offsets.tolist() == [0, 0, 1, 3, 6, 10]
    for image_id, record in enumerate(dataset.images):
        assert record.boxes[:, 0].tolist() == list(range(image_id))
        assert (record.boxes[:, 1] == image_id).all()
        assert record.labels.tolist() == [number % 2 for number in range(image_id)]
        assert record.iscrowd.tolist() == [bool(number % 2) for number in range(image_id)]
        assert record.annotation_ids.tolist() == sorted(record.annotation_ids.tolist())
        assert record.areas.tolist() == [9.5] * image_id
        assert (record.width, record.height) == (50 + image_id, 40)
        assert record.encoded() == b"image %d" % image_id
        assert record.where == str(record.path)
    assert dataset.images[2].path.parts[-2:] == ("größe", "2.jpg")


def test_images_are_a_sequence(dataset: CocoDataset) -> None:
    images = dataset.images
    ids = [record.id for record in images]
    assert len(images) == 5
    assert [images[i].id for i in range(-5, 5)] == ids + ids
    assert [record.id for record in images[1:4]] == ids[1:4]
    assert [record.id for record in images[::-2]] == ids[::-2]
    assert images[9:] == ()
    for position in (5, -6):
        with pytest.raises(IndexError):
            images[position]


def test_images_cost_nothing_until_they_are_asked_for() -> None:
    num = 1_000_000
    rng = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(0, 4, num))])
    objects = int(offsets[-1])
    columns = Columns(
        ids=np.arange(num),
        widths=np.full(num, 640, np.int32),
        heights=np.full(num, 480, np.int32),
        names=np.zeros(num, dtype=np.dtypes.StringDType()),
        offsets=offsets,
        boxes=np.zeros((objects, 4), np.float32),
        labels=np.zeros(objects, np.int64),
        iscrowd=np.zeros(objects, np.bool_),
        areas=np.zeros(objects, np.float32),
        annotation_ids=np.arange(objects),
    )
    started = time.process_time()
    images = Images(columns, ImageFiles(Path(), columns.names))
    assert len(images) == num
    assert len(images[num - 1].boxes) == offsets[-1] - offsets[-2]
    assert time.process_time() - started < 0.1


def test_a_part_is_taken_with_its_objects(dataset: CocoDataset) -> None:
    positions = np.array([4, 0, 2])
    part = dataset.columns.take(positions)
    taken = Images(part, replace(dataset.source, names=part.names))
    for record, position in zip(taken, positions.tolist(), strict=True):
        expected = dataset.images[position]
        assert (record.id, record.path, record.encoded()) == (expected.id, expected.path, expected.encoded())
        for name in ("boxes", "labels", "iscrowd", "areas", "annotation_ids"):
            np.testing.assert_array_equal(getattr(record, name), getattr(expected, name))
    assert_equal(dataset.columns.take(np.arange(5)), dataset.columns)
    assert len(dataset.columns.take(np.arange(0)).boxes) == 0


def test_the_digest_tells_any_two_sets_apart(dataset: CocoDataset) -> None:
    columns = dataset.columns
    assert columns.digest() == pickle.loads(pickle.dumps(columns)).digest()

    def changed(name: str, value: Any) -> str:
        column = getattr(columns, name).copy()
        column[-1] = value
        return replace(columns, **{name: column}).digest()

    digests = {
        columns.digest(),
        *(changed(field.name, 77) for field in fields(Columns) if field.name not in ("names", "iscrowd")),
        changed("names", "other"),
        changed("iscrowd", not columns.iscrowd[-1]),
    }
    assert len(digests) == 1 + len(fields(Columns))
    # Where one name ends and the next begins counts, too.
    assert (
        replace(columns, names=names_of(["ab", "c", "", "", ""])).digest()
        != replace(columns, names=names_of(["a", "bc", "", "", ""])).digest()
    )


def test_the_digest_is_the_same_for_all_time(dataset: CocoDataset) -> None:
    # Content hashes in manifests and checkpoints rest on it.
    plain = replace(dataset.columns, names=names_of("abcde"))
    assert plain.digest()[:12] == "f6fb715b52b6"


def test_a_file_that_is_gone_is_named(dataset: CocoDataset) -> None:
    source = ImageFiles(Path("nowhere"), dataset.columns.names)
    with pytest.raises(UserError, match=r"nowhere/1\.jpg: cannot be read as an image: No such file"):
        source.read(1)


@pytest.mark.parametrize("value", [10**400, -(10**400), float("nan")])
def test_numbers_beyond_floats_are_left_out(tmp_path: Path, value: float) -> None:
    (tmp_path / "a.png").touch()
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 9, "height": 9}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, value, 2, 2]},
            {"id": 2, "image_id": 1, "category_id": 1, "bbox": [1, 1, 2, 2], "area": value},
        ],
        "categories": [{"id": 1, "name": "x"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    dataset = read_coco(tmp_path / "a.json", tmp_path)
    (sentence,) = dataset.left_out
    assert "annotation 1 of image 1" in sentence
    assert "not finite" in sentence
    assert dataset.columns.areas.tolist() == [4]


@pytest.mark.parametrize(("key", "value"), [("id", 2**63), ("id", -(2**64)), ("width", 2**31)])
def test_integers_beyond_their_column_are_refused(tmp_path: Path, key: str, value: int) -> None:
    image = {"id": 1, "file_name": "a.png", "width": 9, "height": 9} | {key: value}
    content = {"images": [image], "annotations": [], "categories": [{"id": 1, "name": "x"}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"images\[0\]\.{key} should be"):
        read_coco(tmp_path / "a.json", tmp_path)
