"""An annotation file in COCO's format as columns of numbers, whatever is wrong with single entries."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mimiclab.data.findings import Finding, Kind
from mimiclab.data.json_file import float_of, kind_of, list_of, parse_json, read_json, without_collector


@dataclass(frozen=True, eq=False)
class Listing:
    """The N images, C categories and A annotations of a file that have ids and, of annotations, a box of numbers.

    Attributes:
        path: The annotation file.
        num_images: Of the file, those that are not among the N included.
        num_annotations: Of the file, those that are not among the A included.
        image_ids: (N,) int64.
        file_names: N names; None where the entry has no text there.
        image_sizes: (N, 2) float64, stored width and height; NaN where the entry has none.
        category_ids: (C,) int64.
        category_names: C names; None where the entry has no text there.
        annotation_ids: (A,) int64.
        annotation_image_ids: (A,) int64.
        annotation_category_ids: (A,) int64.
        boxes: (A, 4) float64, x, y, width and height as they are written.
        iscrowd: (A,) bool.
        findings: What kept entries out, or a value out of its entry.
    """

    path: Path
    num_images: int
    num_annotations: int
    image_ids: npt.NDArray[np.int64]
    file_names: list[str | None]
    image_sizes: npt.NDArray[np.float64]
    category_ids: npt.NDArray[np.int64]
    category_names: list[str | None]
    annotation_ids: npt.NDArray[np.int64]
    annotation_image_ids: npt.NDArray[np.int64]
    annotation_category_ids: npt.NDArray[np.int64]
    boxes: npt.NDArray[np.float64]
    iscrowd: npt.NDArray[np.bool_]
    findings: list[Finding]


def read_listing(path: Path) -> Listing:
    """Read an annotation file.

    Raises:
        UserError: It cannot be read, parsing it would need more memory than there is, it is not JSON, or it has
            no lists `images`, `annotations` and `categories`.
    """
    with without_collector():
        content = parse_json(path, read_json(path))
        images, categories, annotations = (
            list_of(path, content, key) for key in ("images", "categories", "annotations")
        )
        image, image_findings = _sound_columns(path, "images", images, _IMAGE_RULES)
        category, category_findings = _sound_columns(path, "categories", categories, _CATEGORY_RULES)
        annotation, annotation_findings = _sound_columns(path, "annotations", annotations, _ANNOTATION_RULES)
        sizes = [[_size(width), _size(height)] for width, height in zip(image["width"], image["height"], strict=True)]
        return Listing(
            path=path,
            num_images=len(images),
            num_annotations=len(annotations),
            image_ids=np.array(image["id"], dtype=np.int64),
            file_names=[_text(name) for name in image["file_name"]],
            image_sizes=np.array(sizes, dtype=np.float64).reshape(-1, 2),
            category_ids=np.array(category["id"], dtype=np.int64),
            category_names=[_text(name) for name in category["name"]],
            annotation_ids=np.array(annotation["id"], dtype=np.int64),
            annotation_image_ids=np.array(annotation["image_id"], dtype=np.int64),
            annotation_category_ids=np.array(annotation["category_id"], dtype=np.int64),
            boxes=_boxes(annotation["bbox"]),
            iscrowd=np.array([bool(value) for value in annotation["iscrowd"]], dtype=np.bool_),
            findings=[*image_findings, *category_findings, *annotation_findings],
        )


@dataclass(frozen=True)
class _Rule:
    """What one key of an entry should be; an entry that breaks a needed one is left out.

    `all_sound` looks at a whole column at C's speed, which is several times faster than one `sound` after the other.
    """

    key: str
    sound: Callable[[Any], bool]
    all_sound: Callable[[list[Any]], bool]
    expected: str
    needed: bool = True
    default: Any = None


# By exact type, which is fast and what JSON gives: true and false would pass as integers.


def _is_id(value: Any) -> bool:
    return type(value) is int and _LEAST_ID <= value <= _MOST_ID


def _are_ids(values: list[Any]) -> bool:
    return _are(int, values) and min(values, default=0) >= _LEAST_ID and max(values, default=0) <= _MOST_ID


def _is_length(value: Any) -> bool:
    return type(value) is int and 1 <= value <= _MOST_LENGTH


def _are_lengths(values: list[Any]) -> bool:
    return _are(int, values) and min(values, default=1) >= 1 and max(values, default=1) <= _MOST_LENGTH


def _is_name(value: Any) -> bool:
    return type(value) is str and value != ""


def _are_names(values: list[Any]) -> bool:
    return _are(str, values) and all(values)


def _is_box(value: Any) -> bool:
    return type(value) is list and len(value) == 4 and _NUMBERS.issuperset(map(type, value))


def _are_boxes(values: list[Any]) -> bool:
    return (
        _are(list, values)
        and {4}.issuperset(map(len, values))
        and _NUMBERS.issuperset(map(type, chain.from_iterable(values)))
    )


def _is_flag(value: Any) -> bool:
    return value in (0, 1)


def _are_flags(values: list[Any]) -> bool:
    return _are(int, values) and {0, 1}.issuperset(values)


def _are(kind: type, values: list[Any]) -> bool:
    return {kind}.issuperset(map(type, values))


_NUMBERS = frozenset((int, float))
# Training keeps ids in 64 bits, and lengths in 32.
_LEAST_ID, _MOST_ID = -(1 << 63), (1 << 63) - 1
_MOST_LENGTH = (1 << 31) - 1
_ID = "an integer of 64 bits"
_IMAGE_RULES = (
    _Rule("id", _is_id, _are_ids, _ID),
    _Rule("file_name", _is_name, _are_names, "a text", needed=False),
    _Rule("width", _is_length, _are_lengths, "an integer, 1 or more", needed=False),
    _Rule("height", _is_length, _are_lengths, "an integer, 1 or more", needed=False),
)
_CATEGORY_RULES = (_Rule("id", _is_id, _are_ids, _ID), _Rule("name", _is_name, _are_names, "a text", needed=False))
_ANNOTATION_RULES = (
    *(_Rule(key, _is_id, _are_ids, _ID) for key in ("id", "image_id", "category_id")),
    _Rule("bbox", _is_box, _are_boxes, "four numbers"),
    _Rule("iscrowd", _is_flag, _are_flags, "0 or 1", needed=False, default=0),
)


_Columns = dict[str, list[Any]]
_KINDS = {
    "images": (Kind.MALFORMED_IMAGE, "image_id"),
    "annotations": (Kind.MALFORMED_ANNOTATION, "annotation_id"),
    "categories": (Kind.MALFORMED_CATEGORY, "category_id"),
}


def _sound_columns(path: Path, name: str, entries: list[Any], rules: Sequence[_Rule]) -> tuple[_Columns, list[Finding]]:
    """The values of the entries that keep all needed rules, a list for each key; and what breaks a rule."""
    findings = []

    def report(position: int, found: str, key: str = "") -> None:
        kind, id_field = _KINDS[name]
        entry = entries[position] if type(entries[position]) is dict else {}
        ids = {id_field: entry["id"]} if _is_id(entry.get("id")) else {}
        where = f"{name}[{position}]"
        message = f"{path}: {where}{key and '.' + key} {found}"
        kind = Kind.CROWD_FLAG if key == "iscrowd" else kind
        file_name = _text(entry.get("file_name")) if name == "images" else None
        findings.append(Finding(kind, str(path), message, file_name=file_name, position=where, **ids))

    no_objects = {position for position, entry in enumerate(entries) if type(entry) is not dict}
    for position in sorted(no_objects):
        report(position, f"should be an object, found {kind_of(entries[position])}")
    left_out = set(no_objects)
    objects = [{} if position in no_objects else entry for position, entry in enumerate(entries)]
    columns: _Columns = {}
    for rule in rules:
        column = columns[rule.key] = [entry.get(rule.key, rule.default) for entry in objects]
        if rule.all_sound(column):
            continue
        for position, value in enumerate(column):
            if rule.sound(value) or position in no_objects:
                continue
            missing = rule.key not in objects[position]
            report(
                position, "is missing" if missing else f"should be {rule.expected}, found {kind_of(value)}", rule.key
            )
            if rule.needed:
                left_out.add(position)
    if left_out:
        columns = {
            key: [value for position, value in enumerate(column) if position not in left_out]
            for key, column in columns.items()
        }
    return columns, findings


def _boxes(boxes: list[list[float]]) -> npt.NDArray[np.float64]:
    try:
        flat = np.fromiter(chain.from_iterable(boxes), dtype=np.float64, count=4 * len(boxes))
    except OverflowError:  # an integer beyond float64
        flat = np.array([float_of(number) for number in chain.from_iterable(boxes)], dtype=np.float64)
    return flat.reshape(-1, 4)


def _size(value: Any) -> float:
    return float(value) if _is_length(value) else math.nan


def _text(value: Any) -> str | None:
    return value if _is_name(value) else None
