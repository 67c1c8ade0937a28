"""Two data sets that belong together."""

import json
from pathlib import Path

import pytest
from PIL import Image

from mimiclab.data.splits import locate, read_splits
from mimiclab.errors import UserError
from mimiclab.schema import DataConfig, Resize, Scenes, Split


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make(name: str, categories: dict[int, str], *crowds: bool, box: tuple = (1, 2, 10, 10)) -> Split:
    """A data set of two images with one object per entry of `crowds`, all in the first image."""
    root = Path(name)
    root.mkdir()
    for number in (1, 2):
        Image.new("RGB", (32, 24)).save(root / f"{number}.png")
    content = {
        "images": [{"id": number, "file_name": f"{number}.png", "width": 32, "height": 24} for number in (1, 2)],
        "annotations": [
            {"id": number, "image_id": 1, "category_id": min(categories), "bbox": box, "iscrowd": int(crowd)}
            for number, crowd in enumerate(crowds)
        ],
        "categories": [{"id": number, "name": text} for number, text in categories.items()],
    }
    (root / "instances.json").write_text(json.dumps(content))
    return Split(annotations=f"{name}/instances.json", images=name)


def test_located_data_means_the_same_in_any_folder(tmp_path):
    data = DataConfig(
        train=Split(annotations="t.json", images="../t"), val=Split(annotations="/v.json", images="v"), flip=0.25
    )

    located = locate(data)

    assert located.train == Split(annotations=str(tmp_path / "t.json"), images=str(tmp_path / "../t"))
    assert located.val == Split(annotations="/v.json", images=str(tmp_path / "v"))
    assert located.flip == 0.25


def test_located_scenes_are_a_data_set_like_any_other(tmp_path, monkeypatch):
    data = DataConfig(
        scenes=Scenes(root="drawn", train=3, val=2, size=32, seed=5), resize=Resize(short=32, long=32), flip=0
    )

    located = locate(data)

    monkeypatch.chdir("/")
    splits = read_splits(located)
    assert located.scenes is None
    assert located.resize == data.resize
    assert DataConfig.model_validate_json(located.model_dump_json()) == located
    assert [len(split.images) for split in (splits.train, splits.val)] == [3, 2]
    assert splits.train.annotations.is_relative_to(tmp_path / "drawn")
    assert splits.train.images[0].width == 32


def test_classes_are_compared_by_name_in_order_of_their_ids():
    train = make("train", {1: "cat", 2: "dog"}, False)
    same = make("same", {5: "cat", 9: "dog"}, False)
    swapped = make("swapped", {1: "dog", 2: "cat"}, False)
    fewer = make("fewer", {1: "cat"}, False)

    splits = read_splits(DataConfig(train=train, val=same))

    assert splits.train.classes == splits.val.classes == ("cat", "dog")
    for val, found in ((swapped, "['dog', 'cat']"), (fewer, "['cat']")):
        with pytest.raises(UserError) as caught:
            read_splits(DataConfig(train=train, val=val))
        assert str(caught.value) == (
            f"data.val.annotations: {val.annotations} has the classes {found}, "
            f"expected those of train/instances.json: ['cat', 'dog']"
        )


@pytest.mark.parametrize("key", ["train", "val"])
def test_a_set_without_an_object_is_refused(key):
    sets = {"train": make("full", {1: "cat"}, False), "val": make("other", {1: "cat"}, False, True)}
    read_splits(DataConfig(**sets))
    empty = make("empty", {1: "cat"})
    crowds = make("crowds", {1: "cat"}, True, True)
    outside = make("outside", {1: "cat"}, False, box=(40, 40, 5, 5))

    for bad, more in ((empty, ""), (crowds, ""), (outside, ", 1 annotations left out")):
        with pytest.raises(UserError) as caught:
            read_splits(DataConfig(**{**sets, key: bad}))
        assert str(caught.value) == (
            f"data.{key}.annotations: {bad.annotations} has no object in its 2 images{more}; "
            "expected at least one that is no crowd"
        )
