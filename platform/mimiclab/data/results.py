"""Detections in COCO's results format, which scorers of that data read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimiclab.data.json_file import list_of, parse_json, read_json
from mimiclab.errors import UserError

if TYPE_CHECKING:
    from mimicdet.interface import Detections


@dataclass(frozen=True)
class CocoIds:
    """An annotation file's ids of some images, and of the classes in the order of their labels."""

    images: Mapping[Path, int]
    categories: Sequence[int]

    def results(self, path: Path, found: Detections) -> list[dict[str, Any]]:
        """An image's detections, boxes as [x, y, width, height] in its own pixels."""
        rows = zip(found["boxes"].tolist(), found["scores"].tolist(), found["labels"].tolist(), strict=True)
        return [
            {
                "image_id": self.images[path],
                "category_id": self.categories[label],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": score,
            }
            for (x1, y1, x2, y2), score, label in rows
        ]


def read_ids(annotations: Path, images: Sequence[Path], classes: Sequence[str]) -> CocoIds:
    """Look up image files and classes in an annotation file.

    An image is the entry whose `file_name` is the end of its path: `val/1.jpg`, say, of `data/val/1.jpg`. Of several
    such entries it is the one with the longest name.

    Raises:
        UserError: The file cannot be read or is not COCO's format, or it lacks an image or a class.
    """
    content = parse_json(annotations, read_json(annotations))
    try:
        known = {entry["file_name"]: int(entry["id"]) for entry in list_of(annotations, content, "images")}
        categories = {entry["name"]: int(entry["id"]) for entry in list_of(annotations, content, "categories")}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{annotations}: not COCO's format: expected images with id and file_name, categories with id and name; "
            f"found {type(error).__name__}: {error}"
        ) from error
    lacking = [name for name in classes if name not in categories]
    if lacking:
        raise UserError(
            f"{annotations}: no category {lacking[0]!r}, which the detector knows; found {', '.join(categories)}"
        )
    found = {path: image_id for path in images if (image_id := _id_of(path, known)) is not None}
    unknown = [path for path in images if path not in found]
    if unknown:
        raise UserError(
            f"{annotations}: {len(unknown)} of {len(images)} images have no entry there, the first is {unknown[0]}"
        )
    owners: dict[int, Path] = {}
    for path, image_id in found.items():
        if owners.setdefault(image_id, path) != path:
            raise UserError(
                f"{annotations}: {path} and {owners[image_id]} are both its image {image_id}, expected one of them"
            )
    return CocoIds(found, [categories[name] for name in classes])


def _id_of(path: Path, known: Mapping[str, int]) -> int | None:
    parts = path.absolute().parts
    ends = ("/".join(parts[first:]) for first in range(1, len(parts)))
    return next((known[end] for end in ends if end in known), None)
