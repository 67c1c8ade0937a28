"""Read an annotation file in COCO's format; keep what is sound, say what was left out and why."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mimiclab.data.columns import Columns, ImageFiles, Images, Source, names_of, offsets_of
from mimiclab.data.json_file import float_of, kind_of, list_of, parse_json, read_json, without_collector
from mimiclab.data.limits import MIN_BOX_SIDE
from mimiclab.errors import UserError

_NAMED_AT_MOST = 3


# Ids are stored as 64-bit integers.
_MAX_ID = 2**63 - 1
_MAX_SIDE = 2**31 - 1


@dataclass(frozen=True, eq=False)
class CocoDataset:
    """A detection data set.

    Attributes:
        origin: What it was read from, as messages call it: an annotation file, or a packed set's folder or URI.
        classes: Class names in order of category id; a label is an index into them.
        category_ids: The file's category id of every class.
        columns: All images by id, those without objects too, and their objects.
        source: What the images' bytes are read from.
        left_out: One sentence for every annotation that could not be used.
        notes: Sentences on what was mended.
        content: Hash of all that the set holds, images too; None where nobody has read them all.
        annotations_sha256: Hash of the annotation file that was read; None of a packed set.
    """

    origin: str
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    columns: Columns
    source: Source
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    content: str | None = None
    annotations_sha256: str | None = None

    @property
    def images(self) -> Images:
        """All images in order, each made when it is asked for."""
        return Images(self.columns, self.source)

    @property
    def annotations(self) -> Path:
        """The annotation file that it was read from."""
        return Path(self.origin)


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
    with without_collector():
        encoded = read_json(annotations)
        # Of the bytes that are parsed: by the time that somebody asks, the file may be another one.
        sha256 = hashlib.sha256(encoded).hexdigest()
        content = parse_json(annotations, encoded)
        del encoded
        return _read(annotations, images, content, sha256)


def _read(annotations: Path, images: Path, content: dict[str, Any], sha256: str) -> CocoDataset:
    category_names = _read_categories(annotations, content)
    category_ids = tuple(sorted(category_names))
    entries = _read_images(annotations, content)
    _find_images(annotations, images, entries)
    entries.sort(key=lambda entry: entry.id)
    raw = _read_annotations(annotations, content, entries, category_ids)
    names = names_of(entry.file_name for entry in entries)
    columns, flawed, num_clipped = _columns(entries, names, raw)

    listed = content["annotations"]
    left_out = []
    for position in flawed.tolist():
        image_id, image = raw.image_ids[position], raw.images[position]
        name = f" ({entries[image].file_name})" if image >= 0 else ""
        if image < 0:
            reason = "there is no such image"
        elif raw.labels[position] < 0:
            reason = f"there is no category {listed[position]['category_id']}"
        else:
            reason = _flaw(listed[position]["bbox"], entries[image].width, entries[image].height)
        left_out.append(f"{annotations}: annotation {raw.ids[position]} of image {image_id}{name}: {reason}")
    notes = (f"{annotations}: {num_clipped} boxes reached over the border and were clipped",) if num_clipped else ()
    classes = tuple(category_names[category_id] for category_id in category_ids)
    source = ImageFiles(images, names)
    return CocoDataset(
        str(annotations),
        classes,
        category_ids,
        columns,
        source,
        tuple(left_out),
        notes,
        annotations_sha256=sha256,
    )


def content_hash(dataset: CocoDataset) -> str:
    """The sha256 in hexadecimal: of a packed set's content, else of the annotation file as it was read."""
    sha256 = dataset.content or dataset.annotations_sha256
    assert sha256 is not None
    return sha256


def coco_ground_truth(dataset: CocoDataset) -> dict[str, Any]:
    """The cleaned data set as pycocotools takes it, with the file's own image and category ids.

    Annotations are numbered anew from 1: pycocotools takes a match with id 0 for no match, and loses one
    of two annotations that share an id.
    """
    stored = dataset.columns
    xywh = stored.boxes.astype(np.float64)
    xywh[:, 2:] -= xywh[:, :2]
    objects = zip(
        np.repeat(stored.ids, np.diff(stored.offsets)).tolist(),
        np.asarray(dataset.category_ids, dtype=np.int64)[stored.labels].tolist(),
        xywh.tolist(),
        stored.areas.tolist(),
        stored.iscrowd.tolist(),
        strict=True,
    )
    images = zip(
        stored.ids.tolist(), stored.names.tolist(), stored.widths.tolist(), stored.heights.tolist(), strict=True
    )
    return {
        "info": {},
        "images": [
            {"id": image_id, "file_name": Path(name).name, "width": width, "height": height}
            for image_id, name, width, height in images
        ],
        "annotations": [
            {
                "id": number,
                "image_id": image_id,
                "category_id": category_id,
                "bbox": box,
                "area": area,
                "iscrowd": int(crowd),
            }
            for number, (image_id, category_id, box, area, crowd) in enumerate(objects, start=1)
        ],
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


class _Raw(NamedTuple):
    """The A annotations of a file as columns, before any is left out."""

    ids: list[int]
    image_ids: list[int]
    images: npt.NDArray[np.int64]
    """(A,) position of the image by id, -1 where there is none."""
    labels: npt.NDArray[np.int64]
    """(A,) -1 where there is no such category."""
    boxes: npt.NDArray[np.float64]
    """(A, 4) x, y, width, height."""
    areas: npt.NDArray[np.float64]
    """(A,) as given; NaN where there is no number."""
    crowds: npt.NDArray[np.bool_]


def _read_annotations(
    path: Path, content: dict[str, Any], entries: list[_Entry], category_ids: tuple[int, ...]
) -> _Raw:
    image_of = {entry.id: position for position, entry in enumerate(entries)}
    label_of = {category_id: label for label, category_id in enumerate(category_ids)}
    ids, image_ids, images, labels, boxes, areas, crowds = [], [], [], [], [], [], []
    for position, annotation in enumerate(list_of(path, content, "annotations")):
        where = f"annotations[{position}]"
        ids.append(_integer(path, annotation, "id", where))
        image_id = _integer(path, annotation, "image_id", where)
        image_ids.append(image_id)
        images.append(image_of.get(image_id, -1))
        labels.append(label_of.get(_integer(path, annotation, "category_id", where), -1))
        boxes.append(_box(path, annotation, where))
        area = annotation.get("area")
        areas.append(float_of(area) if _is_number(area) else math.nan)
        crowds.append(bool(annotation.get("iscrowd", 0)))
    return _Raw(
        ids,
        image_ids,
        np.array(images, dtype=np.int64),
        np.array(labels, dtype=np.int64),
        np.array(boxes, dtype=np.float64).reshape(-1, 4),
        np.array(areas, dtype=np.float64),
        np.array(crowds, dtype=np.bool_),
    )


def _columns(entries: list[_Entry], names: npt.NDArray[Any], raw: _Raw) -> tuple[Columns, npt.NDArray[np.int64], int]:
    """The columns of the sound annotations, the positions of the others, and how many boxes were clipped."""
    widths = np.array([entry.width for entry in entries], dtype=np.int32)
    heights = np.array([entry.height for entry in entries], dtype=np.int32)
    bounds = np.stack([widths, heights], 1)[raw.images].astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is left out
        far = raw.boxes[:, :2] + raw.boxes[:, 2:]
        corners = np.concatenate([np.maximum(raw.boxes[:, :2], 0), np.minimum(far, bounds)], 1)
        # In float32, as it is stored: a sliver may not survive the rounding.
        stored = corners.astype(np.float32)
        sound = (raw.images >= 0) & (raw.labels >= 0) & np.isfinite(raw.boxes).all(1)
        sound &= (raw.boxes[:, 2:] > 0).all(1) & (stored[:, 2:] - stored[:, :2] >= MIN_BOX_SIDE).all(1)
        clipped = (corners != np.concatenate([raw.boxes[:, :2], far], 1)).any(1)
        box_areas = (corners[:, 2:] - corners[:, :2]).prod(1)
        given = np.isfinite(raw.areas) & (raw.areas > 0)
    areas = np.where(given, np.where(clipped, np.minimum(raw.areas, box_areas), raw.areas), box_areas)

    kept = np.flatnonzero(sound)
    kept = kept[np.argsort(raw.images[kept], kind="stable")]
    columns = Columns(
        ids=np.array([entry.id for entry in entries], dtype=np.int64),
        widths=widths,
        heights=heights,
        names=names,
        offsets=offsets_of(np.bincount(raw.images[kept], minlength=len(entries))),
        boxes=stored[kept],
        labels=raw.labels[kept],
        iscrowd=raw.crowds[kept],
        areas=areas[kept].astype(np.float32),
        annotation_ids=np.array(raw.ids, dtype=np.int64)[kept],
    )
    return columns, np.flatnonzero(~sound), int((sound & clipped).sum())


def _flaw(box: list[float], width: int, height: int) -> str:
    """Why a bbox (x, y, width, height) of a known image cannot be used."""
    if not all(math.isfinite(float_of(value)) for value in box):
        return f"bbox {box} holds a number that is not finite"
    if box[2] < 0 or box[3] < 0:
        return f"bbox {box} has a negative width or height"
    if box[2] == 0 or box[3] == 0:
        return f"bbox {box} has no area"
    x, y, right, bottom = max(box[0], 0), max(box[1], 0), min(box[0] + box[2], width), min(box[1] + box[3], height)
    if x < right and y < bottom:
        return f"bbox {box} has no area: less than {MIN_BOX_SIDE} px of a side lie in the image, {width} x {height}"
    return f"bbox {box} lies outside of the image, which is {width} x {height}"


def _read_categories(path: Path, content: dict[str, Any]) -> dict[int, str]:
    names: dict[int, str] = {}
    for position, category in enumerate(list_of(path, content, "categories")):
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


def _read_images(path: Path, content: dict[str, Any]) -> list[_Entry]:
    entries: dict[int, _Entry] = {}
    for position, image in enumerate(list_of(path, content, "images")):
        where = f"images[{position}]"
        entry = _Entry(
            id=_integer(path, image, "id", where),
            file_name=_string(path, image, "file_name", where),
            width=_integer(path, image, "width", where, least=1, most=_MAX_SIDE),
            height=_integer(path, image, "height", where, least=1, most=_MAX_SIDE),
        )
        if entry.id in entries:
            names = f"{entries[entry.id].file_name} and {entry.file_name}"
            raise UserError(f"{path}: image id {entry.id} is there twice: {names}")
        entries[entry.id] = entry
    if not entries:
        raise UserError(f"{path}: images is empty, expected at least one")
    return list(entries.values())


def _find_images(annotations: Path, folder: Path, entries: list[_Entry]) -> None:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of images (for {annotations})")
    missing = [entry.file_name for entry in entries if not (folder / entry.file_name).is_file()]
    if missing:
        names = ", ".join(missing[:_NAMED_AT_MOST]) + (", ..." if len(missing) > _NAMED_AT_MOST else "")
        count = f"{len(missing)} of {len(entries)}"
        raise UserError(f"{folder}: {count} images that {annotations} lists are missing: {names}")


# One checked look-up per type. `where` is the place in the file, for the message.


def _get(path: Path, item: Any, key: str, where: str) -> Any:
    if not isinstance(item, dict):
        raise UserError(f"{path}: not COCO's format: {where} should be an object, found {kind_of(item)}")
    if key not in item:
        raise UserError(f"{path}: not COCO's format: {where} has no key {key!r}")
    return item[key]


def _integer(path: Path, item: Any, key: str, where: str, least: int | None = None, most: int = _MAX_ID) -> int:
    value = _get(path, item, key, where)
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"{path}: not COCO's format: {where}.{key} should be an integer, found {kind_of(value)}")
    if least is not None and value < least:
        raise UserError(f"{path}: {where}.{key} should be {least} or more, found {value}")
    if abs(value) > most:
        raise UserError(f"{path}: {where}.{key} should be {most} or less, found {value!r:.80}")
    return value


def _string(path: Path, item: Any, key: str, where: str) -> str:
    value = _get(path, item, key, where)
    if not isinstance(value, str) or not value:
        raise UserError(f"{path}: not COCO's format: {where}.{key} should be a text, found {kind_of(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        # JSON can hold half of a pair, as Python writes a file's name that is not UTF-8; nothing else can store it.
        raise UserError(f"{path}: {where}.{key} should be whole characters, found {value!r}") from None
    return value


def _box(path: Path, item: Any, where: str) -> tuple[float, ...]:
    value = _get(path, item, "bbox", where)
    if not isinstance(value, list) or len(value) != 4 or not all(_is_number(number) for number in value):
        raise UserError(f"{path}: not COCO's format: {where}.bbox should be four numbers, found {value!r:.80}")
    return tuple(map(float_of, value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
