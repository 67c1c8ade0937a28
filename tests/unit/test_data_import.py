"""Importing VOC's and YOLO's formats: the same boxes come out, and what is not sound is named."""

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import yaml
from globox import BoundingBox
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from mimiclab.data.coco import CocoDataset, read_coco
from mimiclab.data.foreign import INSTALL
from mimiclab.data.importing import import_dataset
from mimiclab.data.scenes import CLASSES, generate_scenes
from mimiclab.errors import UserError

WIDTH, HEIGHT = 80, 50
Corners = tuple[float, float, float, float]
Objects = Sequence[tuple[str, Corners]]


def run(source: Path, target: Path, **options: Any) -> str:
    """Import; what was printed."""
    out = StringIO()
    import_dataset(source, target, console=Console(file=out, soft_wrap=True, markup=False), **options)
    return out.getvalue()


def refusal(source: Path, target: Path, **options: Any) -> str:
    """The message that an import ends with; it leaves nothing behind."""
    before = sorted(target.parent.rglob("*"))
    with pytest.raises(UserError) as error:
        run(source, target, **options)
    assert sorted(target.parent.rglob("*")) == before
    return str(error.value)


def picture(path: Path, size: tuple[int, int] = (WIDTH, HEIGHT), **save: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path, **save)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def xml(objects: Objects, size: tuple[int, int] | None = (WIDTH, HEIGHT), first: float = 1, extra: str = "") -> str:
    """An XML file of objects with COCO's corners, whose pixels count from `first` and include the last."""
    root = ET.Element("annotation")
    if size:
        stated = ET.SubElement(root, "size")
        ET.SubElement(stated, "width").text, ET.SubElement(stated, "height").text = map(str, size)
    for name, (x1, y1, x2, y2) in objects:
        node = ET.SubElement(root, "object")
        ET.SubElement(node, "name").text = name
        box = ET.SubElement(node, "bndbox")
        for key, value in zip(("xmin", "ymin", "xmax", "ymax"), (x1 + first, y1 + first, x2, y2), strict=True):
            ET.SubElement(box, key).text = repr(float(value))
        node.extend(ET.fromstring(f"<extra>{extra}</extra>"))
    return ET.tostring(root, encoding="unicode")


def rows(objects: Objects, names: Sequence[str], size: tuple[int, int] = (WIDTH, HEIGHT)) -> str:
    """A label file with all digits."""
    width, height = size
    return "".join(
        f"{names.index(name)} {(x1 + x2) / 2 / width!r} {(y1 + y2) / 2 / height!r} "
        f"{(x2 - x1) / width!r} {(y2 - y1) / height!r}\n"
        for name, (x1, y1, x2, y2) in objects
    )


def voc(folder: Path, **splits: dict[str, str | None]) -> Path:
    """A VOC folder of XML texts by split and image."""
    for split, texts in splits.items():
        write(folder / "ImageSets" / "Main" / f"{split}.txt", "".join(f"{name}\n" for name in texts))
        for name, text in texts.items():
            picture(folder / "JPEGImages" / f"{name}.jpg")
            if text is not None:
                write(folder / "Annotations" / f"{name}.xml", text)
    return folder


def yolo(folder: Path, names: Sequence[str] = ("cat", "dog"), **splits: dict[str, str | None]) -> Path:
    """A YOLO folder of label texts by split and image."""
    write(folder / "classes.txt", "\n".join(names) + "\n")
    for split, texts in splits.items():
        for name, text in texts.items():
            picture(folder / "images" / split / f"{name}.jpg")
            if text is not None:
                write(folder / "labels" / split / f"{name}.txt", text)
    return folder


def boxes_of(dataset: CocoDataset) -> dict[str, list[tuple[str, list[float], bool]]]:
    return {
        record.path.stem: [
            (dataset.classes[label], np.round(box, 4).tolist(), crowd)
            for label, box, crowd in zip(
                record.labels.tolist(), record.boxes.tolist(), record.iscrowd.tolist(), strict=True
            )
        ]
        for record in dataset.images
    }


CAT = ("cat", (10.0, 5.0, 30.0, 25.0))
DOG = ("dog", (0.0, 0.0, 80.0, 50.0))
CAT_ROW = "0 0.25 0.3 0.25 0.4\n"


# What comes out


def test_pixels_of_voc_count_from_one_and_include_the_last(tmp_path: Path) -> None:
    text = (
        "<annotation><object><name>dog</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>80</xmax><ymax>50</ymax>"
        "</bndbox></object><object><name>cat</name><bndbox><xmin>7</xmin><ymin>9</ymin><xmax>7</xmax><ymax>9</ymax>"
        "</bndbox><part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox>"
        "</part></object></annotation>"
    )
    source = voc(tmp_path / "voc", train={"a": text})
    run(source, tmp_path / "out")
    found = boxes_of(read_coco(tmp_path / "out" / "train.json", source / "JPEGImages"))
    assert found == {"a": [("dog", [0, 0, 80, 50], False), ("cat", [6, 8, 7, 9], False)]}


def test_pixels_that_count_from_zero_are_taken_as_they_are_and_reported_otherwise(tmp_path: Path) -> None:
    source = voc(tmp_path / "voc", train={"a": xml([DOG, CAT], first=0)})
    assert "before 1" not in run(source, tmp_path / "zero", voc_one_based=False)
    found = boxes_of(read_coco(tmp_path / "zero" / "train.json", source / "JPEGImages"))
    assert found == {"a": [("dog", [0, 0, 80, 50], False), ("cat", [10, 5, 30, 25], False)]}
    said = run(source, tmp_path / "one")
    assert (
        f"1 boxes start before 1, the first pixel; if these files count from 0, pass --voc-zero-based: {source}" in said
    )


@pytest.mark.parametrize(
    ("difficult", "expected"),
    [
        ("keep", [("cat", [10, 5, 30, 25], False)]),
        ("ignore", [("cat", [10, 5, 30, 25], True)]),
        ("drop", []),
    ],
)
def test_difficult_objects_are_objects_or_regions_to_ignore_or_nothing(
    tmp_path: Path, difficult: str, expected: list[Any]
) -> None:
    hard, easy = (xml([CAT], extra=f"<difficult>{flag}</difficult><truncated>1</truncated>") for flag in (1, 0))
    source = voc(tmp_path / "voc", train={"hard": hard, "easy": easy})
    said = run(source, tmp_path / "out", difficult=difficult)
    found = boxes_of(read_coco(tmp_path / "out" / "train.json", source / "JPEGImages"))
    assert found == {"hard": expected, "easy": [("cat", [10, 5, 30, 25], False)]}
    assert ("1 of them to ignore" in said) == (difficult == "ignore")


def test_difficult_objects_are_ignored_unless_asked_for(tmp_path: Path) -> None:
    source = voc(tmp_path / "voc", train={"a": xml([CAT], extra="<difficult>1</difficult>")})
    run(source, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "train.json").read_text())["annotations"][0]["iscrowd"] == 1


def test_vocs_lists_are_the_splits_but_not_trainval_and_those_of_classes(tmp_path: Path) -> None:
    source = voc(tmp_path / "voc", train={"b": xml([CAT])}, val={"a": xml([DOG])}, test={"c": None})
    write(source / "ImageSets" / "Main" / "trainval.txt", "a\nb\n")
    write(source / "ImageSets" / "Main" / "cat_train.txt", "b  1\na -1\n")
    said = run(source, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["test.json", "train.json", "val.json"]
    assert "1 images of test have no file of boxes and were kept as background" in said
    test, train, val = (read_coco(path, source / "JPEGImages") for path in sorted((tmp_path / "out").iterdir()))
    assert test.classes == train.classes == val.classes == ("cat", "dog")
    assert [boxes_of(test), list(boxes_of(train)), list(boxes_of(val))] == [{"c": []}, ["b"], ["a"]]


def test_trainval_is_a_split_where_train_or_val_is_missing(tmp_path: Path) -> None:
    source = voc(tmp_path / "voc", val={"a": xml([DOG])}, trainval={"b": xml([CAT]), "a": xml([DOG])})
    assert "a.jpg: is in trainval and again in val" in refusal(source, tmp_path / "out")
    (source / "ImageSets" / "Main" / "val.txt").unlink()
    run(source, tmp_path / "out")
    dataset = read_coco(tmp_path / "out" / "trainval.json", source / "JPEGImages")
    assert list(boxes_of(dataset)) == ["b", "a"]


def test_images_and_xml_files_of_no_list_are_left_out_and_reported(tmp_path: Path) -> None:
    source = voc(tmp_path / "voc", train={"a": xml([CAT])}, val={"b": xml([DOG]), "c": None})
    write(source / "ImageSets" / "Main" / "val.txt", "b\n")
    write(source / "ImageSets" / "Main" / "trainval.txt", "a\nb\nd\n")
    write(source / "Annotations" / "gone.xml", xml([CAT]))
    picture(source / "JPEGImages" / "d.jpg")
    write(source / "Annotations" / "d.xml", xml([CAT]))
    said = run(source, tmp_path / "out")
    images, files = source / "JPEGImages", source / "Annotations"
    assert f"2 images are in no list and were left out: {images / 'c.jpg'}, {images / 'd.jpg'}\n" in said
    expected = f"{files / 'd.xml'}, {files / 'gone.xml'}"
    assert f"2 XML files are of no listed image and were left out: {expected}\n" in said


@pytest.mark.parametrize("format", ["voc", "yolo"])
def test_sidecars_of_macos_are_no_part_of_a_set(tmp_path: Path, format: str) -> None:
    if format == "voc":
        source = voc(tmp_path / "set", all={"a": xml([CAT])})
    else:
        source = yolo(tmp_path / "set", all={"a": CAT_ROW})
    for path in [path for path in source.rglob("*") if path.is_file()]:
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7\xff")
    assert "1 images, 1 boxes" in run(source, tmp_path / "out")
    if format == "voc":
        (source / "ImageSets" / "Main" / "all.txt").unlink()
        assert "1 images, 1 boxes" in run(source, tmp_path / "unlisted")


def test_without_lists_all_images_are_one_split(tmp_path: Path) -> None:
    source = voc(tmp_path / "voc", train={"b": xml([CAT]), "a": None})
    (source / "ImageSets" / "Main" / "train.txt").unlink()
    said = run(source, tmp_path / "out")
    assert list(boxes_of(read_coco(tmp_path / "out" / "all.json", source / "JPEGImages"))) == ["a", "b"]
    assert "# all: {annotations: " in said


def test_given_classes_decide_the_order_of_labels(tmp_path: Path) -> None:
    source = voc(tmp_path / "voc", train={"a": xml([CAT, DOG])})
    write(tmp_path / "names.txt", "dog\nfox\ncat\n")
    run(source, tmp_path / "out", classes=tmp_path / "names.txt")
    dataset = read_coco(tmp_path / "out" / "train.json", source / "JPEGImages")
    assert dataset.classes == ("dog", "fox", "cat")
    assert dataset.images[0].labels.tolist() == [2, 0]


def test_sizes_are_those_of_the_images_and_a_difference_is_reported(tmp_path: Path) -> None:
    texts = {"a": xml([CAT], size=(81, HEIGHT)), "b": xml([CAT], size=(0, 0)), "c": xml([CAT], size=None)}
    source = voc(tmp_path / "voc", train=texts)
    said = run(source, tmp_path / "out")
    records = read_coco(tmp_path / "out" / "train.json", source / "JPEGImages").images
    assert {(record.width, record.height) for record in records} == {(WIDTH, HEIGHT)}
    note = "1 files state another size than their image's own, which was taken: "
    assert note + str(source / "Annotations" / "a.xml") + "\n" in said


def test_rows_of_yolo_are_shares_of_the_image_and_unlabelled_images_are_background(tmp_path: Path) -> None:
    source = yolo(
        tmp_path / "yolo", train={"a": f"{CAT_ROW}\n1 0.500000 0.500000 1 1\n", "b": None, "c": ""}, val={"a": CAT_ROW}
    )
    said = run(source, tmp_path / "out")
    train = read_coco(tmp_path / "out" / "train.json", source / "images" / "train")
    val = read_coco(tmp_path / "out" / "val.json", source / "images" / "val")
    expected = [("cat", [10, 5, 30, 25], False), ("dog", [0, 0, 80, 50], False)]
    assert boxes_of(train) == {"a": expected, "b": [], "c": []}
    assert boxes_of(val) == {"a": expected[:1]}
    assert "1 images of train have no file of boxes and were kept as background" in said


def test_a_polygon_of_yolo_becomes_its_box_and_is_reported(tmp_path: Path) -> None:
    source = yolo(tmp_path / "yolo", train={"a": CAT_ROW + "1 0.5 0.2 0.1 0.6 0.3 0.8\n"})
    said = run(source, tmp_path / "out")
    found = boxes_of(read_coco(tmp_path / "out" / "train.json", source / "images" / "train"))
    assert found["a"][1] == ("dog", [8, 10, 40, 40], False)
    assert f"1 rows are polygons, whose boxes were taken: {source / 'labels' / 'train' / 'a.txt'}:2\n" in said


@pytest.mark.parametrize("names", [["cat", "dog"], {1: "dog", 0: "cat"}])
@pytest.mark.parametrize("prefix", ["", "../"])
def test_data_yaml_names_classes_and_splits(tmp_path: Path, names: Any, prefix: str) -> None:
    source = tmp_path / "yolo"
    for split in ("train", "valid"):
        picture(source / split / "images" / f"{split}.jpg")
        write(source / split / "labels" / f"{split}.txt", CAT_ROW)
    config = {"train": f"{prefix}train/images", "val": [f"{prefix}valid/images"], "names": names}
    write(source / "data.yaml", yaml.safe_dump(config))
    said = run(source, tmp_path / "out")
    for split, folder in (("train", "train"), ("val", "valid")):
        dataset = read_coco(tmp_path / "out" / f"{split}.json", source / folder / "images")
        assert dataset.classes == ("cat", "dog")
        assert boxes_of(dataset) == {folder: [("cat", [10, 5, 30, 25], False)]}
    assert str(source / "valid" / "images") in said


def test_a_test_split_that_is_not_there_is_left_out_and_reported(tmp_path: Path) -> None:
    source = yolo(tmp_path / "yolo", train={"a": CAT_ROW}, val={"b": CAT_ROW})
    config = {"names": ["cat"], "train": "images/train", "val": "images/val", "test": "images/test"}
    write(source / "data.yaml", yaml.safe_dump(config))
    said = run(source, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train.json", "val.json"]
    missing = source / "images" / "test"
    assert f"1 places of test in {source / 'data.yaml'} are not there and were left out: {missing}\n" in said


@pytest.mark.parametrize("base", ["./", "", "{source}/"])
def test_lists_of_images_are_splits(tmp_path: Path, base: str) -> None:
    source = yolo(tmp_path / "yolo", all={"a": CAT_ROW, "b": CAT_ROW * 2, "c": CAT_ROW, "d": None})
    base = base.format(source=source)
    write(source / "train.txt", f"{base}images/all/b.jpg\n\n{base}images/all/d.jpg\n")
    write(source / "lists" / "val.txt", f"{base}images/all/a.jpg\n")
    write(source / "data.yaml", "{names: [cat], train: train.txt, val: lists/val.txt}")
    said = run(source, tmp_path / "out")
    cat = ("cat", [10, 5, 30, 25], False)
    images = source / "images" / "all"
    assert boxes_of(read_coco(tmp_path / "out" / "train.json", images)) == {"b": [cat, cat], "d": []}
    assert boxes_of(read_coco(tmp_path / "out" / "val.json", images)) == {"a": [cat]}
    left = source / "labels" / "all" / "c.txt"
    assert f"1 label files are of no listed image and were left out: {left}\n" in said
    write(source / "train.txt", "images/all/b.jpg\nimages/all/e.jpg\n")
    assert f"{source / 'train.txt'}:2: there is no image 'images/all/e.jpg' in " in refusal(source, tmp_path / "new")


def test_text_files_without_boxes_may_lie_beside_labels(tmp_path: Path) -> None:
    source = yolo(tmp_path / "yolo", train={"a": CAT_ROW})
    notes = source / "labels" / "train" / "README.txt"
    notes.write_bytes("Drawn in 2 weeks by J\xfcrgen.\n1 2 3\n".encode("latin-1"))
    write(source / "labels" / "train" / "notes.txt", "3 of 5 are cats\n")
    said = run(source, tmp_path / "out")
    assert f"2 text files hold no boxes and were left alone: {notes}, {notes.with_name('notes.txt')}\n" in said
    for text in ("", "a note\n" + CAT_ROW):
        write(notes, text)
        assert f"{notes}: its image is missing" in refusal(source, tmp_path / "new")


def test_a_class_id_may_be_written_as_a_float(tmp_path: Path) -> None:
    source = yolo(tmp_path / "yolo", train={"a": "1.0 0.25 0.3 0.25 0.4\n0. 0.25 0.3 0.25 0.4\n"})
    run(source, tmp_path / "out")
    found = boxes_of(read_coco(tmp_path / "out" / "train.json", source / "images" / "train"))
    assert [name for name, *_ in found["a"]] == ["dog", "cat"]


@pytest.mark.parametrize(("images", "labels"), [("images", "labels"), (".", ".")])
def test_flat_yolo_folders_are_one_split(tmp_path: Path, images: str, labels: str) -> None:
    source = tmp_path / "yolo"
    picture(source / images / "a.jpg")
    write(source / labels / "a.txt", CAT_ROW)
    write(source / "classes.txt", "cat\n")
    run(source, tmp_path / "out")
    found = boxes_of(read_coco(tmp_path / "out" / "all.json", source / images))
    assert found == {"a": [("cat", [10, 5, 30, 25], False)]}


def test_a_folder_valid_is_the_split_val_unless_there_is_one(tmp_path: Path) -> None:
    source = yolo(tmp_path / "yolo", train={"a": CAT_ROW}, valid={"b": CAT_ROW})
    said = run(source, tmp_path / "out")
    assert f"  val: {{annotations: {tmp_path / 'out' / 'val.json'}, images: {source / 'images' / 'valid'}}}\n" in said
    yolo(source, val={"c": CAT_ROW})
    assert "has folders valid and val, expected one of them" in refusal(source, tmp_path / "new")


@pytest.mark.parametrize("format", ["voc", "yolo"])
def test_paths_may_be_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    monkeypatch.chdir(tmp_path)
    if format == "voc":
        voc(Path("set"), train={"a": xml([CAT])})
    else:
        yolo(Path("set"), train={"a": CAT_ROW})
        write(Path("set", "data.yaml"), yaml.safe_dump({"names": ["cat"], "train": ["images/train"]}))
    data = yaml.safe_load(run(Path("set"), Path("out")).partition("in the experiment file:\n")[2])["data"]["train"]
    assert Path(data["annotations"]) == tmp_path / "out" / "train.json"
    found = boxes_of(read_coco(Path(data["annotations"]), Path(data["images"])))
    assert found == {"a": [("cat", [10, 5, 30, 25], False)]}


def test_images_may_be_elsewhere(tmp_path: Path) -> None:
    source = yolo(tmp_path / "yolo", train={"a": CAT_ROW}, val={"b": CAT_ROW})
    (source / "images").rename(tmp_path / "photos")
    run(source, tmp_path / "out", images=tmp_path / "photos")
    found = boxes_of(read_coco(tmp_path / "out" / "val.json", tmp_path / "photos" / "val"))
    assert found == {"b": [("cat", [10, 5, 30, 25], False)]}


def test_printed_lines_are_the_data_section_of_an_experiment(tmp_path: Path) -> None:
    source = yolo(tmp_path / "a, b: c", train={"a": CAT_ROW}, val={"b": CAT_ROW}, test={"c": CAT_ROW})
    said = run(source, tmp_path / "out")
    data = yaml.safe_load(said.partition("in the experiment file:\n")[2])["data"]
    assert list(data) == ["train", "val"]
    for split, stem in (("train", "a"), ("val", "b")):
        dataset = read_coco(Path(data[split]["annotations"]), Path(data[split]["images"]))
        assert list(boxes_of(dataset)) == [stem]
    assert f"{tmp_path / 'out' / 'test.json'}: 1 images, 1 boxes\n" in said


# Round trips

NAMES = ("ant", "bee", "cow")


@st.composite
def objects(draw: st.DrawFn, least: float) -> list[tuple[str, Corners]]:
    def span(side: int) -> tuple[float, float]:
        low = draw(st.floats(0, side - least))
        return low, draw(st.floats(low + least, side))

    found: list[tuple[str, Corners]] = []
    for name in draw(st.lists(st.sampled_from(NAMES), max_size=4)):
        (x1, x2), (y1, y2) = span(WIDTH), span(HEIGHT)
        found.append((name, (x1, y1, x2, y2)))
    return found


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for name in ("a", "b"):
        picture(folder / "train" / f"{name}.png")
    return folder


# In VOC's coordinates the smallest box is a pixel: its first and last one are the same.
@pytest.mark.parametrize(("format", "least"), [("voc", 1), ("yolo", 0.005)])
@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_every_box_and_label_survives_a_round_trip(
    photos: Path, format: str, least: float, data: st.DataObject
) -> None:
    first, second = data.draw(objects(least)), data.draw(objects(least))
    with TemporaryDirectory() as folder:
        source, target = Path(folder, "source"), Path(folder, "out")
        write(Path(folder, "names.txt"), "\n".join(NAMES))
        for name, found in (("a", first), ("b", second)):
            if format == "voc":
                write(source / "Annotations" / "train" / f"{name}.xml", xml(found))
            else:
                write(source / "labels" / "train" / f"{name}.txt", rows(found, NAMES))
        run(source, target, images=photos, classes=Path(folder, "names.txt"))
        split, images = ("all", photos) if format == "voc" else ("train", photos / "train")
        dataset = read_coco(target / f"{split}.json", images)
    assert dataset.classes == NAMES
    assert dataset.left_out == ()
    assert [record.path.name for record in dataset.images] == ["a.png", "b.png"]
    for record, wanted in zip(dataset.images, (first, second), strict=True):
        assert [NAMES[label] for label in record.labels] == [name for name, _ in wanted]
        expected = np.array([corners for _, corners in wanted]).reshape(-1, 4)
        np.testing.assert_allclose(record.boxes, expected, rtol=0, atol=1e-3)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, CocoDataset]:
    paths = generate_scenes(tmp_path_factory.mktemp("scenes"), seed=3, num_train=13, num_val=4, size=64)
    return {
        "train": read_coco(paths.train_annotations, paths.train_images),
        "val": read_coco(paths.val_annotations, paths.val_images),
    }


def same(ours: CocoDataset, theirs: CocoDataset) -> None:
    assert ours.classes == tuple(theirs.classes)
    assert [record.path.read_bytes() for record in ours.images] == [r.path.read_bytes() for r in theirs.images]
    for record, other in zip(ours.images, theirs.images, strict=True):
        assert (record.width, record.height) == (other.width, other.height)
        assert record.labels.tolist() == other.labels.tolist()
        assert not record.iscrowd.any()
        np.testing.assert_allclose(record.boxes, other.boxes, rtol=0, atol=1e-3)


def test_scenes_come_back_from_voc_as_they_were(scenes: dict[str, CocoDataset], tmp_path: Path) -> None:
    source = tmp_path / "VOC2012"
    for split, dataset in scenes.items():
        names = [f"{split}-{record.id:03d}" for record in dataset.images]
        write(source / "ImageSets" / "Main" / f"{split}.txt", "\n".join(names))
        for name, record in zip(names, dataset.images, strict=True):
            (source / "JPEGImages").mkdir(exist_ok=True)
            (source / "JPEGImages" / f"{name}.png").symlink_to(record.path)
            root = ET.Element("annotation")
            for label, (x1, y1, x2, y2) in zip(record.labels, record.boxes.tolist(), strict=True):
                box = BoundingBox(label=CLASSES[label], xmin=x1 + 1, ymin=y1 + 1, xmax=x2, ymax=y2)
                root.append(box.to_xml())
            write(source / "Annotations" / f"{name}.xml", ET.tostring(root, encoding="unicode"))
    write(tmp_path / "names.txt", "\n".join(CLASSES))
    run(source, tmp_path / "out", classes=tmp_path / "names.txt")
    for split, dataset in scenes.items():
        same(read_coco(tmp_path / "out" / f"{split}.json", source / "JPEGImages"), dataset)


def test_scenes_come_back_from_yolo_as_they_were(scenes: dict[str, CocoDataset], tmp_path: Path) -> None:
    source = tmp_path / "yolo"
    write(source / "data.yaml", yaml.safe_dump({"names": dict(enumerate(CLASSES))}))
    (source / "images").mkdir()
    number = {name: index for index, name in enumerate(CLASSES)}
    num_background = 0
    for split, dataset in scenes.items():
        (source / "images" / split).symlink_to(dataset.images[0].path.parent)
        for record in dataset.images:
            num_background += not len(record.boxes)
            if not len(record.boxes):
                continue
            text = "\n".join(
                BoundingBox(label=CLASSES[label], xmin=x1, ymin=y1, xmax=x2, ymax=y2).to_yolo_v5(
                    image_size=(record.width, record.height), label_to_id=number
                )
                for label, (x1, y1, x2, y2) in zip(record.labels, record.boxes.tolist(), strict=True)
            )
            write(source / "labels" / split / f"{record.path.stem}.txt", text)
    said = run(source, tmp_path / "out")
    assert num_background > 0
    assert f"{num_background} images of train have no file of boxes" in said
    for split, dataset in scenes.items():
        same(read_coco(tmp_path / "out" / f"{split}.json", source / "images" / split), dataset)


# What is refused


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<annotation>\n<object></annotation>", "a.xml:2: not XML: mismatched tag"),
        ("<object/>", "a.xml: expected <annotation> on top, found <object>"),
        (xml([("cat", (5, 5, float("nan"), 9))]), "a.xml: object 1: expected a name, and a bndbox of finite numbers"),
        (xml([("cat", (5, 5, float("inf"), 9))]), "found a box from (6.0, 6.0) to (inf, 9.0)"),
        (xml([CAT, ("cat", (9, 5, 3, 8))]), "a.xml: object 2: expected a name"),
        (xml([(" ", (1, 1, 2, 2))]), "a.xml: object 1: its name is empty"),
        (xml([CAT], extra="<difficult>yes</difficult>"), "a.xml: object 1: difficult: expected 0 or 1, found 'yes'"),
        (
            "<annotation><object><name>cat</name></object></annotation>",
            "a.xml: object 1: expected a name, and a bndbox",
        ),
        ('<?xml version="1.0" encoding="nowhere"?><annotation/>', "a.xml: not XML: unknown encoding"),
        ("<annotation/>", "none of its files has an object"),
    ],
)
def test_xml_that_is_not_sound_is_refused_by_file_and_object(tmp_path: Path, text: str, expected: str) -> None:
    source = voc(tmp_path / "voc", train={"a": text})
    assert expected in refusal(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("2 0.5 0.5 0.1 0.1", "expected a class id of {classes}, 0 to 1, found '2'"),
        ("-1 0.5 0.5 0.1 0.1", "0 to 1, found '-1'"),
        ("0.5 0.5 0.5 0.1 0.1", "0 to 1, found '0.5'"),
        ("1.01 0.5 0.5 0.1 0.1", "0 to 1, found '1.01'"),
        ("cat 0.5 0.5 0.1 0.1", "0 to 1, found 'cat'"),
        ("0 0.5 0.5 0.1", "found 4 values"),
        ("0 0.5 0.5 0.1 0.1 0.9", "found 6 values"),
        ("0 0.5 0.5 0.1 0.1 0.9 0.2 0.4", "found 8 values"),
        ("0 0.5 0.5 0.1 nan", "expected shares of the image's width and height, 0 to 1, found '0 0.5 0.5 0.1 nan'"),
        ("0 0.5 0.5 inf 0.1", "expected shares"),
        ("0 0.1 0.1 nan 0.5 0.3 0.3", "expected shares"),
        ("0 0.5 0.5 0.1 x", "expected shares"),
        ("0 40 25 20 10", "expected shares"),
        ("0 0.5 0.5 -0.005 0.1", "expected a class id and x, y, width, height"),
    ],
)
def test_a_row_that_is_not_sound_is_refused_by_file_and_line(tmp_path: Path, row: str, expected: str) -> None:
    source = yolo(tmp_path / "yolo", train={"a": f"{CAT_ROW}\n{row}\n"})
    message = refusal(source, tmp_path / "out")
    assert message.startswith(f"{source / 'labels' / 'train' / 'a.txt'}:3: ")
    assert expected.format(classes=source / "classes.txt") in message


def test_missing_and_unreadable_images_are_refused_by_name(tmp_path: Path) -> None:
    source = voc(tmp_path / "voc", train={"a": xml([CAT])})
    write(source / "ImageSets" / "Main" / "train.txt", "a\n\nb\n")
    assert "train.txt:3: there is no image 'b' in " in refusal(source, tmp_path / "out")
    write(source / "ImageSets" / "Main" / "train.txt", "a\n")
    write(source / "JPEGImages" / "a.jpg", "no picture")
    assert "a.jpg: cannot be read as an image" in refusal(source, tmp_path / "out")
    (source / "ImageSets" / "Main" / "train.txt").unlink()
    (source / "JPEGImages" / "a.jpg").unlink()
    assert "a.xml: its image is missing" in refusal(source, tmp_path / "out")

    other = yolo(tmp_path / "yolo", train={"a": CAT_ROW, "b": CAT_ROW})
    (other / "images" / "train" / "b.jpg").unlink()
    assert f"{other / 'labels' / 'train' / 'b.txt'}: its image is missing" in refusal(other, tmp_path / "out")
    (other / "images" / "train" / "b.jpg").symlink_to(tmp_path / "nowhere.jpg")
    assert "b.jpg: cannot be read as an image" in refusal(other, tmp_path / "out")


def test_an_image_in_two_splits_is_refused(tmp_path: Path) -> None:
    source = voc(tmp_path / "voc", train={"a": xml([CAT])}, val={"a": xml([CAT])})
    assert "a.jpg: is in train and again in val, expected it once" in refusal(source, tmp_path / "out")
    other = yolo(tmp_path / "yolo", train={"a": CAT_ROW})
    write(other / "data.yaml", yaml.safe_dump({"names": ["cat"], "train": "images/train", "val": "images/train"}))
    assert "a.jpg: is in train and again in val" in refusal(other, tmp_path / "out")


def test_two_images_that_would_share_boxes_are_refused(tmp_path: Path) -> None:
    source = yolo(tmp_path / "yolo", train={"a": CAT_ROW})
    picture(source / "images" / "train" / "a.png")
    assert "a.png: would share its boxes with a.jpg" in refusal(source, tmp_path / "out")


def test_an_image_that_asks_to_be_turned_is_refused_unless_told_how_to_take_it(tmp_path: Path) -> None:
    source = yolo(tmp_path / "yolo", train={"a": CAT_ROW})
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(source / "images" / "train" / "a.jpg", exif=exif)
    assert "a.jpg: its EXIF orientation is 6" in refusal(source, tmp_path / "out")
    run(source, tmp_path / "out", ignore_exif=True)
    found = boxes_of(read_coco(tmp_path / "out" / "train.json", source / "images" / "train"))
    assert found == {"a": [("cat", [10, 5, 30, 25], False)]}


def test_a_folder_of_no_known_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "found neither; --format chooses" in refusal(tmp_path / "empty", tmp_path / "out")
    both = yolo(voc(tmp_path / "both", train={"a": xml([CAT])}), train={"a": CAT_ROW})
    assert "found both; --format chooses" in refusal(both, tmp_path / "out")
    assert "train.json" in run(both, tmp_path / "out", format="yolo")
    assert "nowhere: no such folder" in refusal(tmp_path / "nowhere", tmp_path / "new")


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("classes.txt", "", "expected class names, each once and none empty, found []"),
        ("classes.txt", "cat\n\ndog\n", "each once and none empty"),
        ("classes.txt", "cat\ncat\n", "each once and none empty"),
        ("data.yaml", "names: {0: cat, 2: dog}", "names: expected the ids 0 to 1, found [0, 2]"),
        ("data.yaml", "nc: 2", "names: expected a list of class names, found None"),
        ("data.yaml", "[", "data.yaml: not YAML"),
        ("data.yaml", "- cat", "data.yaml: expected a mapping on top"),
        (
            "data.yaml",
            "{names: [cat], train: images/nowhere}",
            "data.yaml: train: expected a folder of images or a .txt file of their paths, found none",
        ),
        ("data.yaml", "{names: [cat], kpt_shape: [17, 3]}", "data.yaml: kpt_shape: these labels are keypoints"),
    ],
)
def test_class_files_that_are_not_sound_are_refused(tmp_path: Path, name: str, text: str, expected: str) -> None:
    source = yolo(tmp_path / "yolo", train={"a": CAT_ROW})
    write(source / name, text)
    assert expected in refusal(source, tmp_path / "out")


def test_a_class_that_is_not_in_the_given_list_is_refused(tmp_path: Path) -> None:
    source = voc(tmp_path / "voc", train={"a": xml([CAT, DOG])})
    write(tmp_path / "names.txt", "cat\n")
    message = refusal(source, tmp_path / "out", classes=tmp_path / "names.txt")
    assert f"a.xml: object 2: expected a name of {tmp_path / 'names.txt'}: cat, found 'dog'" in message


def test_images_without_any_file_of_boxes_are_refused(tmp_path: Path) -> None:
    source = yolo(tmp_path / "yolo", train={"a": None})
    assert "none of its 1 images has a file of boxes" in refusal(source, tmp_path / "out")


# What is written


def test_only_an_earlier_import_is_overwritten(tmp_path: Path) -> None:
    source = yolo(tmp_path / "yolo", train={"a": CAT_ROW}, val={"b": CAT_ROW})
    target = tmp_path / "new" / "out"
    run(source, target)
    (target / "old.json").write_text("{}")
    assert "is not empty, expected a new folder; --overwrite" in refusal(source, target)
    run(source, target, overwrite=True)
    assert sorted(path.name for path in target.iterdir()) == ["train.json", "val.json"]
    assert [path.name for path in target.parent.iterdir()] == ["out"]

    (target / "thesis.tex").write_text("years")
    assert "thesis.tex: is not of an import" in refusal(source, target, overwrite=True)
    assert "is there and no folder" in refusal(source, target / "thesis.tex", overwrite=True)
    (tmp_path / "empty").mkdir()
    run(source, tmp_path / "empty")
    assert (tmp_path / "empty" / "val.json").is_file()


def test_what_was_there_stays_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = yolo(tmp_path / "yolo", train={"a": CAT_ROW})
    run(source, tmp_path / "out")
    before = (tmp_path / "out" / "train.json").read_bytes()
    rename = Path.rename

    def interrupted(path: Path, target: Path) -> Path:
        if path.name == "made":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "out", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "yolo"]
    assert (tmp_path / "out" / "train.json").read_bytes() == before


def test_a_missing_package_is_said_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "globox", None)
    message = refusal(tmp_path / "nowhere", tmp_path / "out")
    assert message == f"the package globox is missing, expected it from: {INSTALL}"


@pytest.mark.slow
def test_the_verb_imports_and_its_mistakes_end_with_exit_code_2(tmp_path: Path) -> None:
    source = voc(tmp_path / "voc", train={"a": xml([CAT], first=0, extra="<difficult>1</difficult>")})
    command = [sys.executable, "-m", "mimiclab", "data", "import", str(source), str(tmp_path / "out")]
    options = ["--format", "voc", "--difficult", "keep", "--voc-zero-based", "--ignore-exif"]
    environment = os.environ | {"PYTHONOPTIMIZE": "1"}
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "train: {annotations: " in done.stdout
    found = boxes_of(read_coco(tmp_path / "out" / "train.json", source / "JPEGImages"))
    assert found == {"a": [("cat", [10, 5, 30, 25], False)]}
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr.startswith(f"error: {tmp_path / 'out'}: is not empty")
