"""What data sets of other formats have in common on their way to COCO's: splits, images, boxes and remarks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml
from PIL import ExifTags, Image

from mimiclab.data.limits import IMAGE_SUFFIXES
from mimiclab.errors import UserError

INSTALL = "pip install mimiclab[formats]"
_NAMED_AT_MOST = 3

Corners = tuple[float, float, float, float]
Size = tuple[int, int]


@dataclass(frozen=True)
class Box:
    """One object: x1, y1, x2, y2 in pixels; pixel i reaches from i to i + 1, as in COCO's format."""

    name: str
    corners: Corners
    ignore: bool = False


@dataclass(frozen=True)
class Item:
    """An image and the file of its boxes; an image without such a file is background."""

    image: Path
    labels: Path | None


@dataclass(frozen=True)
class Split:
    """Part of a data set; `folder` holds all of its images, at any depth."""

    name: str
    folder: Path
    items: tuple[Item, ...]


class ForeignSet(Protocol):
    """A data set of another format."""

    @property
    def splits(self) -> tuple[Split, ...]:
        """All splits, each with an image or more."""
        ...

    @property
    def classes(self) -> tuple[str, ...] | None:
        """In the order of labels; None where nothing but the boxes names them."""
        ...

    def boxes(self, labels: Path, size: Size) -> list[Box]:
        """Read a file of boxes that are of an image of (width, height).

        Raises:
            UserError: the file is not sound.
        """
        ...


class Remarks:
    """What a user should know of, counted by kind, the first few of each by name."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}

    def add(self, kind: str, name: object) -> None:
        """Count one more of a kind, which is the end of a sentence that starts with a number."""
        self._names.setdefault(kind, []).append(str(name))

    def lines(self) -> list[str]:
        """A line for every kind."""
        return [
            f"{len(names)} {kind}: {', '.join(names[:_NAMED_AT_MOST])}{', ...' if len(names) > _NAMED_AT_MOST else ''}"
            for kind, names in self._names.items()
        ]


def load_globox() -> Any:
    """The package that parses single objects of other formats.

    Raises:
        UserError: it is not installed.
    """
    try:
        import globox
    except ImportError as error:
        raise UserError(f"the package {error.name} is missing, expected it from: {INSTALL}") from error
    return globox


def parse_box(where: str, expected: str, parse: Callable[[], Any]) -> tuple[str, Corners]:
    """Name and corners of what globox parses.

    Raises:
        UserError: `where`, if it cannot be parsed, is not finite, or has its corners in the wrong order.
    """
    try:
        box = parse()
    except (load_globox().ParsingError, ValueError, AssertionError) as error:
        raise UserError(f"{where}: expected {expected}: {error}") from error
    x1, y1, x2, y2 = box.ltrb
    # globox asserts the order, which `python -O` leaves out, and lets infinity pass.
    if not all(map(math.isfinite, box.ltrb)) or x1 > x2 or y1 > y2:
        raise UserError(f"{where}: expected {expected}, found a box from ({x1}, {y1}) to ({x2}, {y2})")
    return box.label.strip(), (x1, y1, x2, y2)


def is_image(path: Path) -> bool:
    """Whether a file's name is like an image's."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not is_sidecar(path)


def is_sidecar(path: Path) -> bool:
    """Whether it is what macOS writes beside a file on a disk that cannot hold its attributes: `._name`."""
    return path.name.startswith("._")


def find_images(folder: Path) -> Iterator[Path]:
    """Image files in a folder, at any depth, in order of their paths.

    Raises:
        UserError: there is no such folder, or it has images that differ in nothing but the ending.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of images")
    stems: dict[Path, Path] = {}
    for path in sorted(folder.rglob("*")):
        if is_image(path):
            other = stems.setdefault(path.with_suffix(""), path)
            if other != path:
                raise UserError(f"{path}: would share its boxes with {other.name}, expected one image of that name")
            yield path


def image_size(path: Path, ignore_exif: bool) -> Size:
    """Width and height as stored, from the file's header.

    Raises:
        UserError: the header cannot be read, or it asks for the image to be turned: whether boxes were
            drawn before or after that cannot be told.
    """
    try:
        with Image.open(path) as image:
            # For the EXIF of a PNG that has none in front, Pillow would decode the pixels.
            exif = image.getexif() if image.format != "PNG" or "exif" in image.info else {}
            orientation = exif.get(ExifTags.Base.Orientation, 1)
            size = image.size
    # What Pillow raises for a damaged file depends on its format.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read as an image: {error}") from error
    if orientation in range(2, 9) and not ignore_exif:
        raise UserError(
            f"{path}: its EXIF orientation is {orientation}, so that boxes may be of the turned picture, expected an "
            "upright image; store it upright, or pass --ignore-exif if boxes are of the pixels as stored"
        )
    return size


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text in UTF-8: {error}") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file with a mapping on top.

    Raises:
        UserError: it is none.
    """
    try:
        content = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping on top, found {content!r:.80}")
    return content


def read_classes(path: Path) -> tuple[str, ...]:
    """Class names in order: one per line of a text file, or `names` of a YAML file, a list or a mapping from 0 on.

    Raises:
        UserError: the file has no names, or one is empty or there twice.
    """
    if path.suffix in (".yaml", ".yml"):
        names = read_yaml(path).get("names")
        if isinstance(names, dict):
            if set(names) != set(range(len(names))):
                raise UserError(f"{path}: names: expected the ids 0 to {len(names) - 1}, found {list(names)!r:.80}")
            names = [names[index] for index in range(len(names))]
        if not isinstance(names, list):
            raise UserError(f"{path}: names: expected a list of class names, found {names!r:.80}")
    else:
        names = read_text(path).rstrip().splitlines()
    classes = tuple(str(name).strip() for name in names)
    if not all(classes) or len(set(classes)) < len(classes) or not classes:
        raise UserError(f"{path}: expected class names, each once and none empty, found {list(classes)!r:.200}")
    return classes
