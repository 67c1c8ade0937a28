"""Pascal VOC's folders: `Annotations/*.xml`, `JPEGImages`, and lists of images in `ImageSets/Main/*.txt`.

Format: M. Everingham, J. Winn, "The PASCAL VOC Challenge 2012 Development Kit", 2012, section 8. Its boxes
count pixels from 1 and include the last one: xmin = 1, xmax = 1 is the first column, and in COCO's
coordinates reaches from 0 to 1.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from functools import partial
from pathlib import Path
from typing import Literal

from mimiclab.data.foreign import (
    Box,
    Item,
    Remarks,
    Size,
    Split,
    find_images,
    is_sidecar,
    load_globox,
    parse_box,
    read_classes,
    read_text,
)
from mimiclab.errors import UserError

Difficult = Literal["keep", "ignore", "drop"]
ANNOTATIONS, IMAGES, LISTS = "Annotations", "JPEGImages", Path("ImageSets", "Main")


class VocFolder:
    """A data set of VOC's format.

    Every list is a split; `trainval` is left out where both `train` and `val` are there, and so are the lists of
    single classes. Without lists all images are one split. An image belongs to the XML file of its own name;
    images and XML files of no split are left out, and remarked on.

    Args:
        source: The folder that has `Annotations`.
        images: The folder of images, if not `JPEGImages`.
        classes: File of the class names, if they are not those of the boxes.
        difficult: Whether difficult objects are objects, regions to ignore, or nothing.
        one_based: Whether pixels count from 1, as the format has it.
        remarks: Gets what is odd about the files.

    Raises:
        UserError: a folder, an image or all lists are missing or empty.
    """

    def __init__(
        self,
        source: Path,
        images: Path | None,
        classes: Path | None,
        difficult: Difficult,
        one_based: bool,
        remarks: Remarks,
    ) -> None:
        self._classes_file = classes
        self.classes = read_classes(classes) if classes else None
        self._difficult = difficult
        self._one_based = one_based
        self._remarks = remarks
        self._annotations = source / ANNOTATIONS
        if not self._annotations.is_dir():
            raise UserError(f"{self._annotations}: no such folder, expected the XML files of a VOC data set")
        folder = images or source / IMAGES
        paths = {path.relative_to(folder).with_suffix("").as_posix(): path for path in find_images(folder)}
        lists = self._lists(source / LISTS)
        if lists:
            self.splits = tuple(self._listed(file, names, folder, paths) for file, names in lists.items())
            self._remark_on_unlisted(paths)
        else:
            for name, file in self._files().items():
                if name not in paths:
                    raise UserError(f"{file}: its image is missing, expected {file.stem} in {folder}")
            self.splits = (Split("all", folder, tuple(self._item(name, path) for name, path in paths.items())),)

    def boxes(self, labels: Path, size: Size) -> list[Box]:
        """The objects of an XML file; parts of them, as heads and hands, are no objects."""
        root = _parse(labels)
        self._compare_size(root, labels, size)
        found = []
        for number, node in enumerate(root.findall("object"), 1):
            where = f"{labels}: object {number}"
            difficult = (node.findtext("difficult") or "0").strip()
            if difficult not in ("0", "1"):
                raise UserError(f"{where}: difficult: expected 0 or 1, found {difficult!r}")
            name, (x1, y1, x2, y2) = parse_box(
                where,
                "a name, and a bndbox of finite numbers with xmin <= xmax and ymin <= ymax",
                partial(load_globox().BoundingBox.from_xml, node),
            )
            if not name:
                raise UserError(f"{where}: its name is empty")
            if self.classes and name not in self.classes:
                names = ", ".join(self.classes)
                raise UserError(f"{where}: expected a name of {self._classes_file}: {names}, found {name!r}")
            if self._one_based:
                if min(x1, y1) < 1:
                    self._remarks.add(
                        "boxes start before 1, the first pixel; if these files count from 0, pass --voc-zero-based",
                        where,
                    )
                x1, y1 = x1 - 1, y1 - 1
            if difficult == "0" or self._difficult != "drop":
                ignore = difficult == "1" and self._difficult == "ignore"
                found.append(Box(name, (x1, y1, x2, y2), ignore))
        return found

    def _lists(self, folder: Path) -> dict[Path, list[tuple[int, str]]]:
        """The lists that are splits, as (line, image name)."""
        lists = {}
        for file in sorted(folder.glob("*.txt")):
            if is_sidecar(file):
                continue
            lines = [(number, line.strip()) for number, line in enumerate(read_text(file).splitlines(), 1)]
            lines = [(number, line) for number, line in lines if line]
            if not lines:
                raise UserError(f"{file}: names no image, expected one per line")
            # Lists of a class have -1, 0 or 1 behind every name.
            if not all(len(line.split()) == 2 and line.split()[1] in ("-1", "0", "1") for _, line in lines):
                lists[file] = lines
        names = {file.stem for file in lists}
        return {
            file: lines for file, lines in lists.items() if file.stem != "trainval" or not names >= {"train", "val"}
        }

    def _listed(self, file: Path, names: list[tuple[int, str]], folder: Path, paths: dict[str, Path]) -> Split:
        items = []
        for line, name in names:
            if name not in paths:
                raise UserError(f"{file}:{line}: there is no image {name!r} in {folder}")
            items.append(self._item(name, paths[name]))
        return Split(file.stem, folder, tuple(items))

    def _remark_on_unlisted(self, paths: dict[str, Path]) -> None:
        listed = {item.image for split in self.splits for item in split.items}
        for path in paths.values():
            if path not in listed:
                self._remarks.add("images are in no list and were left out", path)
        for name, file in self._files().items():
            if paths.get(name) not in listed:
                self._remarks.add("XML files are of no listed image and were left out", file)

    def _files(self) -> dict[str, Path]:
        """All XML files by the name of their image."""
        files = (file for file in sorted(self._annotations.rglob("*.xml")) if not is_sidecar(file))
        return {file.relative_to(self._annotations).with_suffix("").as_posix(): file for file in files}

    def _item(self, name: str, image: Path) -> Item:
        labels = self._annotations / f"{name}.xml"
        return Item(image, labels if labels.is_file() else None)

    def _compare_size(self, root: ET.Element, labels: Path, size: Size) -> None:
        stated = tuple((root.findtext(f"size/{key}") or "").strip() for key in ("width", "height"))
        # Many tools leave it out, or write 0.
        if all(text.strip("0") for text in stated) and stated != tuple(map(str, size)):
            self._remarks.add("files state another size than their image's own, which was taken", labels)


def _parse(labels: Path) -> ET.Element:
    try:
        root = ET.parse(labels).getroot()
    except ET.ParseError as error:
        raise UserError(f"{labels}:{error.position[0]}: not XML: {error}") from error
    except (ValueError, LookupError) as error:  # an encoding that is unknown, or not that of the file
        raise UserError(f"{labels}: not XML: {error}") from error
    except OSError as error:
        raise UserError(f"{labels}: cannot be read: {error.strerror}") from error
    if root.tag != "annotation":
        raise UserError(f"{labels}: expected <annotation> on top, found <{root.tag}>")
    return root
