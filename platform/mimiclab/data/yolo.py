"""YOLO's folders: a text file per image, a row per object: class id, centre and size as shares of the image's.

Format: Ultralytics' documentation of detection data sets. The label file of `images/train/a.jpg` is
`labels/train/a.txt`; where no folder is called `images`, it lies beside the image.
"""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path
from typing import Any

from mimiclab.data.foreign import (
    Box,
    Item,
    Remarks,
    Size,
    Split,
    find_images,
    is_image,
    is_sidecar,
    load_globox,
    parse_box,
    read_classes,
    read_text,
    read_yaml,
)
from mimiclab.errors import UserError

CONFIGS, CLASSES = ("data.yaml", "data.yml"), "classes.txt"
_KEYS = ("train", "val", "test")
_NAMES = {"valid": "val", "validation": "val"}


class YoloFolder:
    """A data set of YOLO's format.

    Splits are those of `data.yaml`, as folders or as lists of image files; else the folders in `images`; else all
    images are one split. A `test` of `data.yaml` that is not there is left out, and remarked on.

    Args:
        source: The folder with `data.yaml` or `classes.txt`.
        images: The folder of images, if not `images`; the label files are then below `labels`, or below
            `source` where that is not there, at the same places.
        classes: File of the class names, if neither of those.
        remarks: Gets what is odd about the files.

    Raises:
        UserError: the class names, a folder or an image are missing, or are keypoints.
    """

    def __init__(self, source: Path, images: Path | None, classes: Path | None, remarks: Remarks) -> None:
        # The paths in data.yaml may be absolute.
        source = source.absolute()
        self._source = source
        self._images = images.absolute() if images else None
        self._remarks = remarks
        self._lists: set[Path] = set()
        config = next((source / name for name in CONFIGS if (source / name).is_file()), None)
        content = read_yaml(config) if config else {}
        if "kpt_shape" in content:
            raise UserError(f"{config}: kpt_shape: these labels are keypoints, expected boxes")
        self._classes_file = classes.absolute() if classes else config or source / CLASSES
        self.classes = read_classes(self._classes_file)
        if config and images is None and any(content.get(key) for key in _KEYS):
            places = {key: self._configured(config, content, key) for key in _KEYS if content.get(key)}
        else:
            places = {name: [folder] for name, folder in self._split_folders().items()}
        self.splits = tuple(self._split(name, found) for name, found in places.items() if found)
        self._check_orphans()

    def boxes(self, labels: Path, size: Size) -> list[Box]:
        """The objects of a label file; of a polygon, its box."""
        parser = load_globox().BoundingBox
        found = []
        for line, row in enumerate(read_text(labels).splitlines(), 1):
            where = f"{labels}:{line}"
            fields = row.split()
            if not fields:
                continue
            expected = "a class id and x, y, width, height, or a class id and three or more points"
            # globox does not notice a NaN in a polygon.
            if not all(map(_is_share, fields[1:])):
                raise UserError(f"{where}: expected shares of the image's width and height, 0 to 1, found {row!r:.80}")
            if len(fields) == 5:
                parse = parser.from_yolo_v5
            elif len(fields) >= 7 and len(fields) % 2 == 1:
                parse = parser.from_yolo_seg
                self._remarks.add("rows are polygons, whose boxes were taken", where)
            else:
                raise UserError(f"{where}: expected {expected}, found {len(fields)} values")
            label, corners = parse_box(where, expected, partial(parse, row, image_size=size))
            # Some tools write all numbers as floats.
            label = re.sub(r"\.0*$", "", label)
            if not label.isdecimal() or int(label) >= len(self.classes):
                last = len(self.classes) - 1
                raise UserError(f"{where}: expected a class id of {self._classes_file}, 0 to {last}, found {label!r}")
            found.append(Box(self.classes[int(label)], corners))
        return found

    def _split_folders(self) -> dict[str, Path]:
        base = self._images or self._source / "images"
        if self._images is None and not base.is_dir():
            base = self._source
        folders = {path.name: path for path in sorted(base.iterdir()) if path.is_dir()} if base.is_dir() else {}
        folders = {name: path for name, path in folders.items() if any(map(is_image, path.rglob("*")))}
        for name in _NAMES.keys() & folders:
            folders.setdefault(_NAMES[name], folders[name])
            if folders[_NAMES[name]] != folders[name]:
                raise UserError(f"{base}: has folders {name} and {_NAMES[name]}, expected one of them")
            del folders[name]
        loose = next(filter(is_image, sorted(base.iterdir())), None) if folders else None
        if folders and loose:
            raise UserError(f"{loose}: lies beside the folders {', '.join(folders)}, expected it in one of them")
        return folders or {"all": base}

    def _configured(self, config: Path, content: dict[str, Any], key: str) -> list[Path]:
        """The places of a split, as data.yaml has them: below its `path`, or below its own folder."""
        value = content[key]
        found = []
        for name in value if isinstance(value, list) else [value]:
            if not isinstance(name, str):
                raise UserError(f"{config}: {key}: expected a folder, found {name!r:.80}")
            here = config.parent
            # Roboflow writes "../train/images" for a folder that is beside the file.
            places = [here / str(content.get("path") or "") / name, here / name, here / name.removeprefix("../")]
            place = next((path for path in places if path.is_dir() or (path.is_file() and path.suffix == ".txt")), None)
            if place is not None:
                found.append(place)
            elif key == "test":  # templates name it, whether it was made or not
                self._remarks.add(f"places of {key} in {config} are not there and were left out", places[0])
            else:
                tried = ", ".join(dict.fromkeys(map(str, places)))
                raise UserError(
                    f"{config}: {key}: expected a folder of images or a .txt file of their paths, found none at {tried}"
                )
        return found

    def _listed(self, file: Path) -> list[Path]:
        """The images of a list: their paths are absolute, or start at the list or at the data set."""
        images = []
        for number, line in enumerate(read_text(file).splitlines(), 1):
            name = line.strip()
            if not name:
                continue
            places = [Path(os.path.abspath(base / name)) for base in (file.parent, self._source)]  # noqa: PTH100
            image = next((path for path in places if path.is_file()), None)
            if image is None:
                raise UserError(f"{file}:{number}: there is no image {name!r} in {file.parent} or {self._source}")
            images.append(image)
        return images

    def _split(self, name: str, places: list[Path]) -> Split:
        images: list[Path] = []
        folders = []
        for place in places:
            if place.is_file():
                self._lists.add(place)
                found = self._listed(place)
                folders += [path.parent for path in found]
            else:
                found = list(find_images(place))
                folders.append(place)
            images += found
        if not images:
            raise UserError(f"{', '.join(map(str, places))}: no images, expected those of {name}")
        items = tuple(
            Item(path, labels if labels.is_file() else None) for path in images for labels in [self._file(path)]
        )
        return Split(name, Path(os.path.commonpath(folders)), items)

    def _file(self, image: Path) -> Path:
        """Where the label file of an image is, if there is one."""
        if self._images is not None:
            base = self._source / "labels"
            base = base if base.is_dir() else self._source
            return (base / image.relative_to(self._images)).with_suffix(".txt")
        inside = image.is_relative_to(self._source)
        parts = list((image.relative_to(self._source) if inside else image).parts)
        if "images" in parts[:-1]:
            parts[-2 - parts[-2::-1].index("images")] = "labels"
        return self._source.joinpath(*parts).with_suffix(".txt")

    def _check_orphans(self) -> None:
        expected = {self._file(item.image) for split in self.splits for item in split.items}
        known = expected | self._lists
        for folder in sorted({path.parent for path in expected}):
            for path in sorted(folder.glob("*.txt")):
                if path in known or path.name == CLASSES or path == self._classes_file or is_sidecar(path):
                    continue
                if not _has_rows(path):
                    self._remarks.add("text files hold no boxes and were left alone", path)
                elif self._lists:
                    self._remarks.add("label files are of no listed image and were left out", path)
                else:
                    raise UserError(f"{path}: its image is missing, expected {path.stem} with one of the usual endings")


def _is_share(text: str) -> bool:
    """Whether it is a number from 0 to 1, or as little beyond as rounding and careless drawing leave."""
    try:
        return -0.01 <= float(text) <= 1.01
    except ValueError:
        return False


def _has_rows(path: Path) -> bool:
    """Whether a text file may be of boxes: it is empty, or a line of it starts with five numbers."""
    try:
        rows = [line.split() for line in read_text(path).splitlines() if line.strip()]
    except UserError:
        return False
    return not rows or any(len(row) >= 5 and all(map(_is_number, row[:5])) for row in rows)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
