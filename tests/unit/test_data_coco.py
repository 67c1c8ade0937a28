"""Reading annotation files: what is kept, what is reported, what is refused."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mimiclab.data.coco import CocoDataset, coco_ground_truth, content_hash, read_coco
from mimiclab.data.json_file import parse_json
from mimiclab.errors import UserError

DATA = Path(os.environ.get("MIMICLAB_DATA", Path(__file__).parents[3] / "shared" / "data"))


def annotation(bbox: list[float], **keys: Any) -> dict[str, Any]:
    return {"id": 7, "image_id": 1, "category_id": 3, "bbox": bbox, **keys}


def content(*annotations: dict[str, Any]) -> dict[str, Any]:
    return {
        "images": [
            {"id": 5, "file_name": "b.png", "width": 20, "height": 10},
            {"id": 1, "file_name": "a.png", "width": 40, "height": 30},
        ],
        "annotations": list(annotations),
        "categories": [{"id": 9, "name": "dog"}, {"id": 3, "name": "cat"}],
    }


def read(folder: Path, value: Any) -> CocoDataset:
    images = folder / "images"
    images.mkdir(exist_ok=True)
    Image.new("RGB", (40, 30)).save(images / "a.png")
    Image.new("RGB", (20, 10)).save(images / "b.png")
    path = folder / "instances.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return read_coco(path, images)


def test_images_and_classes_come_in_order_of_id(tmp_path: Path) -> None:
    dataset = read(
        tmp_path,
        content(
            annotation([1, 2, 10, 5], category_id=9, area=33, iscrowd=1, id=70),
            annotation([0, 0, 4, 2.5], id=71),
        ),
    )
    assert dataset.classes == ("cat", "dog")
    assert dataset.category_ids == (3, 9)
    first, second = dataset.images
    assert (first.id, first.path.name, first.width, first.height) == (1, "a.png", 40, 30)
    np.testing.assert_array_equal(first.boxes, np.array([[1, 2, 11, 7], [0, 0, 4, 2.5]], dtype=np.float32))
    assert first.boxes.dtype == np.float32
    assert first.labels.tolist() == [1, 0]
    assert first.labels.dtype == np.int64
    assert first.iscrowd.tolist() == [True, False]
    assert first.areas.tolist() == [33, 10]
    assert first.annotation_ids.tolist() == [70, 71]
    assert second.id == 5
    assert second.boxes.shape == (0, 4)
    assert dataset.left_out == dataset.notes == ()


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"bbox": [1, 1, 0, 5]}, "has no area"),
        ({"bbox": [1, 1, -3, 5]}, "negative width or height"),
        ({"bbox": [1, float("nan"), 3, 5]}, "not finite"),
        ({"bbox": [1, 1, float("inf"), 5]}, "not finite"),
        ({"bbox": [40, 1, 3, 5]}, "outside of the image, which is 40 x 30"),
        ({"bbox": [-9, 1, 3, 5]}, "outside of the image, which is 40 x 30"),
        ({"category_id": 4}, "there is no category 4"),
        ({"image_id": 2}, "there is no such image"),
    ],
)
def test_an_annotation_that_cannot_be_used_is_left_out_and_named(
    tmp_path: Path, keys: dict[str, Any], reason: str
) -> None:
    dataset = read(tmp_path, content(annotation([1, 1, 2, 2], id=1), annotation([1, 1, 2, 2]) | keys))
    (sentence,) = dataset.left_out
    image = keys.get("image_id", 1)
    assert f"instances.json: annotation 7 of image {image}" in sentence
    assert reason in sentence
    assert dataset.images[0].annotation_ids.tolist() == [1]


def test_boxes_over_the_border_are_clipped_and_counted(tmp_path: Path) -> None:
    dataset = read(tmp_path, content(annotation([-5, 25, 10, 10], area=100), annotation([35, 0, 5, 30], area=150)))
    record = dataset.images[0]
    assert record.boxes.tolist() == [[0, 25, 5, 30], [35, 0, 40, 30]]
    assert record.areas.tolist() == [25, 150]
    (note,) = dataset.notes
    assert "1 boxes reached over the border" in note
    assert dataset.left_out == ()


def _without(value: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: item for name, item in value.items() if name != key}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{oops", "not JSON"),
        ("[]", "expected an object on top, found a list"),
        (_without(content(), "images"), "the file has no key 'images'"),
        (_without(content(), "annotations"), "the file has no key 'annotations'"),
        (_without(content(), "categories"), "the file has no key 'categories'"),
        (content() | {"annotations": {}}, "annotations should be a list, found an object"),
        (content() | {"images": []}, "images is empty"),
        (content() | {"categories": []}, "categories is empty"),
        (content() | {"images": content()["images"] * 2}, "image id 5 is there twice: b.png and b.png"),
        (content() | {"categories": content()["categories"] * 2}, "category id 9 is there twice"),
        (content() | {"categories": [{"id": 1, "name": "x"}, {"id": 2, "name": "x"}]}, "name 'x' is there"),
        (content() | {"images": ["a.png"]}, r"images\[0\] should be an object, found a text"),
        (content({"id": 1}), r"annotations\[0\] has no key 'image_id'"),
        (content(annotation([1, 2, 3])), r"annotations\[0\].bbox should be four numbers, found \[1, 2, 3\]"),
        (content(annotation([1, 2, 3, 4], image_id="1")), "image_id should be an integer, found a text"),
        (
            content() | {"images": [{"id": 1, "file_name": "a.png", "width": 0, "height": 3}]},
            "width should be 1",
        ),
    ],
)
def test_what_is_not_coco_is_refused_by_name(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path, value)
    assert str(tmp_path / "instances.json") in str(error.value)


def test_a_missing_file_and_a_missing_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.json: no such annotation file"):
        read_coco(tmp_path / "none.json", tmp_path)
    read(tmp_path, content())
    with pytest.raises(UserError, match="nowhere: no such folder of images"):
        read_coco(tmp_path / "instances.json", tmp_path / "nowhere")


@pytest.mark.parametrize(("part", "key"), [("images", "file_name"), ("categories", "name")])
def test_a_name_that_is_not_unicode_is_refused(tmp_path: Path, part: str, key: str) -> None:
    """As Python writes a file's name that is in another encoding; such a file can be there."""
    value = content(annotation([1, 1, 2, 2]))
    value[part][1][key] = "caf\udce9.png"
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "caf\udce9.png").touch()
    with pytest.raises(UserError, match=rf"{part}\[1\]\.{key} should be whole characters, found 'caf\\udce9\.png'"):
        read(tmp_path, value)


def test_missing_images_are_counted_and_the_first_few_named(tmp_path: Path) -> None:
    value = content()
    value["images"] += [{"id": 10 + i, "file_name": f"gone{i}.png", "width": 4, "height": 4} for i in range(5)]
    with pytest.raises(UserError, match=r"5 of 7 images .* missing: gone0\.png, gone1\.png, gone2\.png, \.\.\."):
        read(tmp_path, value)


def test_content_hash_is_of_the_file_that_was_read(tmp_path: Path) -> None:
    dataset = read(tmp_path, content())
    before = hashlib.sha256(dataset.annotations.read_bytes()).hexdigest()
    changed = read(tmp_path, content(annotation([1, 1, 2, 2])))
    assert changed.annotations == dataset.annotations
    assert content_hash(dataset) == before
    assert content_hash(changed) == hashlib.sha256(dataset.annotations.read_bytes()).hexdigest() != before


def test_of_the_tree_only_what_the_format_needs_is_kept(tmp_path: Path) -> None:
    value = content(annotation([1, 1, 2, 2], segmentation=[[1.5, 2, 3, 4]], iscrowd=0, area=4))
    encoded = json.dumps({**value, "info": {"year": 2017}}).encode()
    del value["annotations"][0]["segmentation"]
    assert parse_json(tmp_path, encoded) == value


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("[1.5]", "[NaN]"),
        ("[1.5]", "[1e999]"),
        ('"note"', r'"half \ud83d"'),
        ("{", "\ufeff{"),
    ],
)
def test_json_that_only_the_standard_module_takes_is_read_like_the_rest(
    tmp_path: Path, before: str, after: str
) -> None:
    text = json.dumps(content(annotation([1, 1, 2, 2], segmentation=[[1.5]], note="note")))
    assert before in text
    other = text.replace(before, after, 1)
    with pytest.raises(msgspec.DecodeError):
        msgspec.json.decode(other)
    assert read(tmp_path, other).columns.digest() == read(tmp_path, text).columns.digest()


def test_perfect_detections_score_one_against_the_ground_truth(tmp_path: Path) -> None:
    # Annotation ids 0 and shared ones are what pycocotools stumbles over.
    dataset = read(
        tmp_path,
        content(
            annotation([1, 1, 9, 9], id=0),
            annotation([20, 1, 9, 9], id=0),
            annotation([0, 0, 5, 5], id=1, image_id=5, category_id=9),
        ),
    )
    truth = COCO()
    truth.dataset = coco_ground_truth(dataset)
    truth.createIndex()
    detections = truth.loadRes(
        [
            {key: item[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9}
            for item in truth.dataset["annotations"]
        ]
    )
    evaluation = COCOeval(truth, detections, "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1.0)
    assert {item["id"] for item in truth.dataset["categories"]} == {3, 9}
    assert {item["image_id"] for item in truth.dataset["annotations"]} == {1, 5}


@pytest.mark.parametrize(
    ("split", "num_images", "num_boxes", "flawed"), [("train", 205, 2804, 2288), ("val", 87, 1137, 887)]
)
def test_blood_cells_are_read_but_for_one_box_without_area(
    split: str, num_images: int, num_boxes: int, flawed: int
) -> None:
    if not (DATA / "bccd").is_dir():
        pytest.skip(f"needs the bccd data set in {DATA} (set MIMICLAB_DATA)")
    dataset = read_coco(DATA / "bccd" / "annotations" / f"instances_{split}.json", DATA / "bccd" / split)
    assert dataset.classes == ("RBC", "WBC", "Platelets")
    assert len(dataset.images) == num_images
    assert sum(len(record.boxes) for record in dataset.images) == num_boxes
    (sentence,) = dataset.left_out
    assert f"annotation {flawed} of image" in sentence
    assert "has no area" in sentence


def test_reading_needs_no_torch() -> None:
    code = "import sys, mimiclab.data.coco, mimiclab.data.order, mimiclab.data.scenes;assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
