"""What can be wrong with a data set, how bad it is, and what one such thing looks like."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any, Literal

_NAMED_AT_MOST = 3

Severity = Literal["error", "warning", "note"]


class Kind(Enum):
    """A kind of finding: its name, severity and title.

    An `error` is what training stops at or leaves out. A `warning` changes what is learned or measured, or hints
    at a mistake. A `note` is worth knowing, and nothing to mend.
    """

    EMPTY = ("empty", "error", "nothing to learn from")
    MALFORMED_IMAGE = ("malformed-image", "error", "image entries of the wrong form")
    MALFORMED_ANNOTATION = ("malformed-annotation", "error", "annotations of the wrong form")
    MALFORMED_CATEGORY = ("malformed-category", "error", "categories of the wrong form")
    DUPLICATE_IMAGE_ID = ("duplicate-image-id", "error", "image ids that are there twice")
    DUPLICATE_CATEGORY_ID = ("duplicate-category-id", "error", "category ids that are there twice")
    DUPLICATE_CATEGORY_NAME = ("duplicate-category-name", "error", "category names that are there twice")
    CLASSES_DIFFER = ("classes-differ", "error", "other classes than the training set")
    NO_SUCH_IMAGE = ("no-such-image", "error", "annotations of unknown images")
    NO_SUCH_CATEGORY = ("no-such-category", "error", "annotations of unknown categories")
    BOX_NOT_FINITE = ("box-not-finite", "error", "boxes with a number that is not finite")
    BOX_NEGATIVE = ("box-negative", "error", "boxes with a negative width or height")
    BOX_NO_AREA = ("box-no-area", "error", "boxes without area")
    BOX_OUTSIDE = ("box-outside", "error", "boxes outside of the image")
    IMAGE_MISSING = ("image-missing", "error", "missing images")
    IMAGE_UNREADABLE = ("image-unreadable", "error", "images that cannot be decoded")
    IMAGE_SIZE = ("image-size", "error", "images of another size than stored")
    LEAK = ("leak", "warning", "validation images that are in the training set")
    DUPLICATE_ANNOTATION_ID = ("duplicate-annotation-id", "warning", "annotation ids that are there twice")
    BOX_OVER_BORDER = ("box-over-border", "warning", "boxes that reach over the border")
    CROWD_FLAG = ("crowd-flag", "warning", "iscrowd that is neither 0 nor 1")
    LISTED_TWICE = ("listed-twice", "warning", "files that are listed twice")
    DUPLICATE_IMAGE = ("duplicate-image", "warning", "files of the same content")
    IMAGE_ROTATED = ("image-rotated", "warning", "images with an EXIF orientation")
    IMAGE_ONE_CHANNEL = ("image-one-channel", "warning", "images of one channel")
    IMAGE_CMYK = ("image-cmyk", "warning", "CMYK images")
    IMAGE_ALPHA = ("image-alpha", "warning", "images with transparency")
    IMAGE_DEEP = ("image-deep", "warning", "images of more than 8 bits a channel")
    UNUSED_CATEGORY = ("unused-category", "warning", "categories without annotations")
    CROWD = ("crowd", "note", "crowd regions")
    NO_OBJECTS = ("no-objects", "note", "images without objects")
    IMAGE_UNLISTED = ("image-unlisted", "note", "image files that are not listed")

    def __init__(self, label: str, severity: Severity, title: str) -> None:
        self.label = label
        self.severity = severity
        self.title = title


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found.

    Attributes:
        kind: What kind of thing it is.
        file: The annotation file.
        message: A sentence that names the place and says what was found.
        image_id: The image's id in the annotation file.
        file_name: The image's file name as it is listed; of an unlisted file, relative to the folder.
        annotation_id: The annotation's id.
        category_id: The category's id.
        position: The place in the annotation file, such as annotations[7], where an id cannot tell it.
    """

    kind: Kind
    file: str
    message: str
    image_id: int | None = None
    file_name: str | None = None
    annotation_id: int | None = None
    category_id: int | None = None
    position: str | None = None

    @property
    def subject(self) -> str:
        """What it is about, in a few characters."""
        if self.annotation_id is not None:
            return f"annotation {self.annotation_id}" + (f" ({self.file_name})" if self.file_name else "")
        if self.file_name is not None:
            return self.file_name
        return self.position or self.message

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON's types, `kind` as its label beside its `severity`."""
        return {**asdict(self), "kind": self.kind.label, "severity": self.kind.severity}


def name_some(values: Iterable[Any]) -> str:
    """The first values by name and the others by number: a and b; a, b and c; a, b, c and 7 more."""
    names = list(map(str, values))
    if len(names) > _NAMED_AT_MOST:
        names[_NAMED_AT_MOST:] = [f"{len(names) - _NAMED_AT_MOST} more"]
    *rest, last = names
    return f"{', '.join(rest)} and {last}" if rest else last
