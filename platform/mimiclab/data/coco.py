"""Read an annotation file in COCO's format; keep what is sound, say what was left out and why."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mimiclab.errors import UserError

_NAMED_AT_MOST = 3


@dataclass(frozen=True, eq=False)
class ImageRecord:
    """One image and its M objects.

    Attributes:
        id: The image's id in the annotation file.
        path: The image file.
        width: Stored width in pixels.
        height: Stored height in pixels.
        boxes: (M, 4) float32, xyxy in pixels, inside of the image.
        labels: (M,) int64, 0-based index into the data set's classes.
        iscrowd: (M,) bool, true for regions that hold a crowd.
        areas: (M,) float32, the annotation's own area in square pixels, or the box's where it has none.
        annotation_ids: (M,) int64, ids in the annotation file.
    """

    id: int
    path: Path
    width: int
    height: int
    boxes: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    iscrowd: npt.NDArray[np.bool_]
    areas: npt.NDArray[np.float32]
    annotation_ids: npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class CocoDataset:
    """A detection data set.

    Attributes:
        annotations: The file it was read from.
        classes: Class names in order of category id; a label is an index into them.
        category_ids: The file's category id of every class.
        images: All images by id, those without objects too.
        left_out: One sentence for every annotation that could not be used.
        notes: Sentences on what was mended.
    """

    annotations: Path
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    images: tuple[ImageRecord, ...]
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def read_coco(annotations: Path, images: Path) -> CocoDataset:
    """Read and check a data set in COCO's detection format.

    Boxes that reach over the border are clipped to the image. Annotations without a sound box are left
    out, and `left_out` names each.

    Args:
        annotations: The JSON file.
        images: The folder that its `file_name`s are relative to.

    Raises:
        UserError: A file or folder is missing, the file is not COCO's format, ids are not unique, or the
            file has no images or no categories.
    """
    content = _load(annotations)
    names = _read_categories(annotations, content)
    category_ids = tuple(sorted(names))
    classes = tuple(names[category_id] for category_id in category_ids)
    entries = _read_images(annotations, content)
    paths = _find_images(annotations, images, entries)

    label_of = {category_id: label for label, category_id in enumerate(category_ids)}
    objects: dict[int, list[_Object]] = {image_id: [] for image_id in entries}
    left_out = []
    num_clipped = 0
    for position, annotation in enumerate(_list(annotations, content, "annotations")):
        where = f"annotations[{position}]"
        annotation_id = _integer(annotations, annotation, "id", where)
        image_id = _integer(annotations, annotation, "image_id", where)
        category_id = _integer(annotations, annotation, "category_id", where)
        box = _box(annotations, annotation, where)
        reason = None
        if image_id not in entries:
            reason = "there is no such image"
        elif category_id not in label_of:
            reason = f"there is no category {category_id}"
        else:
            width, height = entries[image_id].width, entries[image_id].height
            reason = _flaw(box, width, height)
        if reason:
            name = f" ({entries[image_id].file_name})" if image_id in entries else ""
            left_out.append(f"{annotations}: annotation {annotation_id} of image {image_id}{name}: {reason}")
            continue
        x, y, box_width, box_height = box
        corners = (max(x, 0.0), max(y, 0.0), min(x + box_width, width), min(y + box_height, height))
        clipped = corners != (x, y, x + box_width, y + box_height)
        num_clipped += clipped
        box_area = (corners[2] - corners[0]) * (corners[3] - corners[1])
        area = annotation.get("area")
        if not _is_number(area) or not math.isfinite(area) or area <= 0:
            area = box_area
        elif clipped:
            area = min(area, box_area)
        crowd = bool(annotation.get("iscrowd", 0))
        objects[image_id].append(_Object(corners, label_of[category_id], crowd, area, annotation_id))

    notes = (f"{annotations}: {num_clipped} boxes reached over the border and were clipped",) if num_clipped else ()
    records = tuple(_record(entries[image_id], paths[image_id], objects[image_id]) for image_id in sorted(entries))
    return CocoDataset(annotations, classes, category_ids, records, tuple(left_out), notes)


def content_hash(dataset: CocoDataset) -> str:
    """The sha256 of the annotation file's bytes, in hexadecimal."""
    with dataset.annotations.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def coco_ground_truth(dataset: CocoDataset) -> dict[str, Any]:
    """The cleaned data set as pycocotools takes it, with the file's own image and category ids.

    Annotations are numbered anew from 1: pycocotools takes a match with id 0 for no match, and loses one
    of two annotations that share an id.
    """
    annotations: list[dict[str, Any]] = []
    for record in dataset.images:
        for box, label, crowd, area in zip(
            record.boxes.tolist(),
            record.labels.tolist(),
            record.iscrowd.tolist(),
            record.areas.tolist(),
            strict=True,
        ):
            x1, y1, x2, y2 = box
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": record.id,
                    "category_id": dataset.category_ids[label],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": area,
                    "iscrowd": int(crowd),
                }
            )
    return {
        "info": {},
        "images": [
            {"id": record.id, "file_name": record.path.name, "width": record.width, "height": record.height}
            for record in dataset.images
        ],
        "annotations": annotations,
        "categories": [
            {"id": category_id, "name": name}
            for category_id, name in zip(dataset.category_ids, dataset.classes, strict=True)
        ],
    }


@dataclass(frozen=True)
class _Entry:
    """One element of the file's `images`."""

    id: int
    file_name: str
    width: int
    height: int


@dataclass(frozen=True)
class _Object:
    """One sound annotation, its corners inside of the image."""

    corners: tuple[float, float, float, float]
    label: int
    crowd: bool
    area: float
    annotation_id: int


def _record(entry: _Entry, path: Path, objects: list[_Object]) -> ImageRecord:
    return ImageRecord(
        entry.id,
        path,
        entry.width,
        entry.height,
        boxes=np.array([item.corners for item in objects], dtype=np.float32).reshape(-1, 4),
        labels=np.array([item.label for item in objects], dtype=np.int64),
        iscrowd=np.array([item.crowd for item in objects], dtype=np.bool_),
        areas=np.array([item.area for item in objects], dtype=np.float32),
        annotation_ids=np.array([item.annotation_id for item in objects], dtype=np.int64),
    )


def _flaw(box: list[float], width: int, height: int) -> str | None:
    """Why a bbox (x, y, width, height) cannot be used; None if it can."""
    x, y, box_width, box_height = box
    if not all(math.isfinite(value) for value in box):
        return f"bbox {box} holds a number that is not finite"
    if box_width < 0 or box_height < 0:
        return f"bbox {box} has a negative width or height"
    if box_width == 0 or box_height == 0:
        return f"bbox {box} has no area"
    # In float32, as it is stored: a sliver may not survive the rounding.
    left, top, right, bottom = np.array(
        [max(x, 0.0), max(y, 0.0), min(x + box_width, width), min(y + box_height, height)], dtype=np.float32
    )
    if left >= right or top >= bottom:
        return f"bbox {box} lies outside of the image, which is {width} x {height}"
    return None


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such annotation file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read as an annotation file: {error.strerror}") from error
    except ValueError as error:  # JSON's and Unicode's errors are both ValueErrors
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not COCO's format: expected an object on top, found {_kind(content)}")
    return content


def _read_categories(path: Path, content: dict[str, Any]) -> dict[int, str]:
    names: dict[int, str] = {}
    for position, category in enumerate(_list(path, content, "categories")):
        where = f"categories[{position}]"
        category_id = _integer(path, category, "id", where)
        name = _string(path, category, "name", where)
        if category_id in names:
            raise UserError(f"{path}: category id {category_id} is there twice: {names[category_id]} and {name}")
        if name in names.values():
            raise UserError(f"{path}: category name {name!r} is there twice, expected one id for each name")
        names[category_id] = name
    if not names:
        raise UserError(f"{path}: categories is empty, expected at least one")
    return names


def _read_images(path: Path, content: dict[str, Any]) -> dict[int, _Entry]:
    entries: dict[int, _Entry] = {}
    for position, image in enumerate(_list(path, content, "images")):
        where = f"images[{position}]"
        entry = _Entry(
            id=_integer(path, image, "id", where),
            file_name=_string(path, image, "file_name", where),
            width=_integer(path, image, "width", where, least=1),
            height=_integer(path, image, "height", where, least=1),
        )
        if entry.id in entries:
            names = f"{entries[entry.id].file_name} and {entry.file_name}"
            raise UserError(f"{path}: image id {entry.id} is there twice: {names}")
        entries[entry.id] = entry
    if not entries:
        raise UserError(f"{path}: images is empty, expected at least one")
    return entries


def _find_images(annotations: Path, folder: Path, entries: dict[int, _Entry]) -> dict[int, Path]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of images (for {annotations})")
    paths = {entry.id: folder / entry.file_name for entry in entries.values()}
    missing = [entry.file_name for entry in entries.values() if not paths[entry.id].is_file()]
    if missing:
        names = ", ".join(missing[:_NAMED_AT_MOST]) + (", ..." if len(missing) > _NAMED_AT_MOST else "")
        count = f"{len(missing)} of {len(entries)}"
        raise UserError(f"{folder}: {count} images that {annotations} lists are missing: {names}")
    return paths


# One checked look-up per type. `where` is the place in the file, for the message.


def _get(path: Path, item: Any, key: str, where: str) -> Any:
    if not isinstance(item, dict):
        raise UserError(f"{path}: not COCO's format: {where} should be an object, found {_kind(item)}")
    if key not in item:
        raise UserError(f"{path}: not COCO's format: {where} has no key {key!r}")
    return item[key]


def _list(path: Path, content: dict[str, Any], key: str) -> list[Any]:
    value = _get(path, content, key, "the file")
    if not isinstance(value, list):
        raise UserError(f"{path}: not COCO's format: {key} should be a list, found {_kind(value)}")
    return value


def _integer(path: Path, item: Any, key: str, where: str, least: int | None = None) -> int:
    value = _get(path, item, key, where)
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"{path}: not COCO's format: {where}.{key} should be an integer, found {_kind(value)}")
    if least is not None and value < least:
        raise UserError(f"{path}: {where}.{key} should be {least} or more, found {value}")
    return value


def _string(path: Path, item: Any, key: str, where: str) -> str:
    value = _get(path, item, key, where)
    if not isinstance(value, str) or not value:
        raise UserError(f"{path}: not COCO's format: {where}.{key} should be a text, found {_kind(value)}")
    return value


def _box(path: Path, item: Any, where: str) -> list[float]:
    value = _get(path, item, "bbox", where)
    if not isinstance(value, list) or len(value) != 4 or not all(_is_number(number) for number in value):
        raise UserError(f"{path}: not COCO's format: {where}.bbox should be four numbers, found {value!r:.80}")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", type(None): "null"}
    return names.get(type(value), f"{value!r:.80}")
