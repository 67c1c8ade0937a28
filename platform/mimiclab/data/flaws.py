"""What is wrong with the entries of one annotation file, by the file alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mimiclab.data.findings import Finding, Kind, name_some
from mimiclab.data.limits import MIN_BOX_SIDE
from mimiclab.data.listing import Listing

# COCO writes two decimals: the end of a box, a sum of two such numbers, is off by up to this much, in pixels.
_ROUNDING = 0.01

_Rows = npt.NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class Objects:
    """The annotations that training can use, crowd regions included: K of them.

    Attributes:
        image_rows: (K,) rows of `Listing.image_ids`.
        category_rows: (K,) rows of `Listing.category_ids`.
        sides: (K, 2) float64, width and height in pixels, of the part inside of the image.
        iscrowd: (K,) bool.
    """

    image_rows: _Rows
    category_rows: _Rows
    sides: npt.NDArray[np.float64]
    iscrowd: npt.NDArray[np.bool_]


def find_flaws(listing: Listing) -> tuple[list[Finding], Objects]:
    """Check ids, references and boxes.

    An annotation is left out here by the same rules as in training; of images and categories that share an id
    the first one counts.

    Returns:
        What was found, and the objects that are left.
    """
    image_rows = _look_up(listing.annotation_image_ids, listing.image_ids)
    category_rows = _look_up(listing.annotation_category_ids, listing.category_ids)
    flaws, sides = _box_flaws(listing, image_rows)
    usable = (image_rows >= 0) & (category_rows >= 0)
    for kind, rows in flaws.items():
        if kind.severity == "error":
            usable[rows] = False
    objects = Objects(image_rows[usable], category_rows[usable], sides[usable], listing.iscrowd[usable])

    findings = [*_duplicates(listing), *_references(listing, image_rows, category_rows)]
    for kind, rows in flaws.items():
        findings += _box_findings(listing, kind, rows, image_rows[rows])
    findings += [
        _annotation(listing, Kind.CROWD, row, int(image_rows[row]), "is a crowd region")
        for row in np.flatnonzero(usable & listing.iscrowd).tolist()
    ]
    findings += _unused(listing, category_rows, objects)
    return findings, objects


def repeats(values: npt.NDArray[np.int64]) -> Iterator[list[int]]:
    """The rows of every value that is there more than once, in order."""
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.diff(values[order])) + 1
    ends = np.append(starts, len(values))
    starts = np.insert(starts, 0, 0)
    for group in np.flatnonzero(ends - starts > 1).tolist():
        yield order[starts[group] : ends[group]].tolist()


def _look_up(wanted: npt.NDArray[np.int64], ids: npt.NDArray[np.int64]) -> _Rows:
    """The first row of each wanted id in `ids`, -1 where there is none."""
    if not len(ids):
        return np.full(len(wanted), -1, dtype=np.intp)
    order = np.argsort(ids, kind="stable")
    place = np.searchsorted(ids[order], wanted)
    rows = order[place.clip(max=len(ids) - 1)]
    return np.where(ids[rows] == wanted, rows, -1)


def _box_flaws(listing: Listing, image_rows: _Rows) -> tuple[dict[Kind, _Rows], npt.NDArray[np.float64]]:
    """Rows of annotations by what is wrong with their box, and (A, 2) width and height inside of the image."""
    sizes = _image_sizes(listing, image_rows)
    with np.errstate(invalid="ignore", over="ignore"):
        low, length = listing.boxes[:, :2], listing.boxes[:, 2:]
        end = low + length
        inside = np.maximum(low, 0), np.fmin(end, sizes)
        finite = np.isfinite(listing.boxes).all(1)
        negative = finite & (length < 0).any(1)
        flat = finite & ~negative & (length == 0).any(1)
        known = finite & ~negative & ~flat & ~np.isnan(sizes).any(1)
        outside = known & ((low >= sizes) | (end <= 0)).any(1)
        # In float32, as training stores it: a sliver may not survive the rounding.
        thin = (inside[1].astype(np.float32) - inside[0].astype(np.float32) < MIN_BOX_SIDE).any(1)
        flat |= known & ~outside & thin
        over = known & ~outside & ~flat & ((low < -_ROUNDING) | (end > sizes + _ROUNDING)).any(1)
        masks = {
            Kind.BOX_NOT_FINITE: ~finite,
            Kind.BOX_NEGATIVE: negative,
            Kind.BOX_NO_AREA: flat,
            Kind.BOX_OUTSIDE: outside,
            Kind.BOX_OVER_BORDER: over,
        }
        return {kind: np.flatnonzero(mask) for kind, mask in masks.items()}, inside[1] - inside[0]


_FOUND = {
    Kind.BOX_NOT_FINITE: "holds a number that is not finite",
    Kind.BOX_NEGATIVE: "has a negative width or height",
    Kind.BOX_NO_AREA: f"has no area: a side of less than {MIN_BOX_SIDE:g} pixels inside of the image",
    Kind.BOX_OUTSIDE: "lies outside of the image, which is {:g} x {:g}",
    Kind.BOX_OVER_BORDER: "reaches over the border of the image, which is {:g} x {:g}",
}


def _box_findings(listing: Listing, kind: Kind, rows: _Rows, image_rows: _Rows) -> Iterator[Finding]:
    boxes, sizes = listing.boxes[rows].tolist(), _image_sizes(listing, image_rows).tolist()
    for row, image_row, numbers, size in zip(rows.tolist(), image_rows.tolist(), boxes, sizes, strict=True):
        box = "[" + ", ".join(f"{number:.12g}" for number in numbers) + "]"
        yield _annotation(listing, kind, row, image_row, f"bbox {box} {_FOUND[kind].format(*size)}")


def _image_sizes(listing: Listing, image_rows: _Rows) -> npt.NDArray[np.float64]:
    """Width and height (K, 2); NaN, and so no flaw, of unknown images, whose row is -1."""
    sizes: npt.NDArray[np.float64] = np.vstack([listing.image_sizes, [np.nan, np.nan]])[image_rows]
    return sizes


def _annotation(listing: Listing, kind: Kind, row: int, image_row: int, found: str) -> Finding:
    annotation_id, image_id = int(listing.annotation_ids[row]), int(listing.annotation_image_ids[row])
    file_name = listing.file_names[image_row] if image_row >= 0 else None
    name = f" ({file_name})" if file_name else ""
    return Finding(
        kind,
        str(listing.path),
        f"{listing.path}: annotation {annotation_id} of image {image_id}{name}: {found}",
        image_id=image_id,
        file_name=file_name,
        annotation_id=annotation_id,
        category_id=int(listing.annotation_category_ids[row]),
    )


def _references(listing: Listing, image_rows: _Rows, category_rows: _Rows) -> Iterator[Finding]:
    for row in np.flatnonzero(image_rows < 0).tolist():
        yield _annotation(listing, Kind.NO_SUCH_IMAGE, row, int(image_rows[row]), "there is no such image")
    for row in np.flatnonzero(category_rows < 0).tolist():
        found = f"there is no category {listing.annotation_category_ids[row]}"
        yield _annotation(listing, Kind.NO_SUCH_CATEGORY, row, int(image_rows[row]), found)


def _duplicates(listing: Listing) -> Iterator[Finding]:
    file = str(listing.path)
    for rows in repeats(listing.image_ids):
        image_id, names = int(listing.image_ids[rows[0]]), name_some(listing.file_names[row] for row in rows)
        message = f"{file}: image id {image_id} is there {_times(rows)}: {names}"
        yield Finding(Kind.DUPLICATE_IMAGE_ID, file, message, image_id=image_id, file_name=listing.file_names[rows[0]])
    for rows in repeats(listing.category_ids):
        category_id, names = int(listing.category_ids[rows[0]]), name_some(listing.category_names[row] for row in rows)
        message = f"{file}: category id {category_id} is there {_times(rows)}: {names}"
        yield Finding(Kind.DUPLICATE_CATEGORY_ID, file, message, category_id=category_id)
    for name, rows in _repeated_texts(listing.category_names):
        ids = name_some(listing.category_ids[rows].tolist())
        message = f"{file}: category name {name!r} is there {_times(rows)}: ids {ids}"
        category_id = int(listing.category_ids[rows[0]])
        yield Finding(Kind.DUPLICATE_CATEGORY_NAME, file, message, category_id=category_id)
    for rows in repeats(listing.annotation_ids):
        annotation_id = int(listing.annotation_ids[rows[0]])
        images = name_some(listing.annotation_image_ids[rows].tolist())
        message = f"{file}: annotation id {annotation_id} is there {_times(rows)}: of images {images}"
        yield Finding(Kind.DUPLICATE_ANNOTATION_ID, file, message, annotation_id=annotation_id)
    for name, rows in _repeated_texts(listing.file_names):
        image_ids = listing.image_ids[rows].tolist()
        message = f"{file}: {name} is listed {_times(rows)}: as images {name_some(image_ids)}"
        yield Finding(Kind.LISTED_TWICE, file, message, image_id=image_ids[0], file_name=name)


def _unused(listing: Listing, category_rows: _Rows, objects: Objects) -> Iterator[Finding]:
    file = str(listing.path)
    for row in _without(listing.category_ids, category_rows):
        category_id = int(listing.category_ids[row])
        message = f"{file}: category {category_id} ({listing.category_names[row]}) has no annotation"
        yield Finding(Kind.UNUSED_CATEGORY, file, message, category_id=category_id)
    for row in _without(listing.image_ids, objects.image_rows[~objects.iscrowd]):
        image_id, name = int(listing.image_ids[row]), listing.file_names[row]
        message = f"{file}: image {image_id} ({name}) has no objects"
        yield Finding(Kind.NO_OBJECTS, file, message, image_id=image_id, file_name=name)
    for key, num in (
        ("images", len(listing.image_ids)),
        ("categories", len(listing.category_ids)),
        ("objects", int((~objects.iscrowd).sum())),
    ):
        if not num:
            yield Finding(Kind.EMPTY, file, f"{file}: there are no {key} that can be used, expected at least one")


def _without(ids: npt.NDArray[np.int64], used: _Rows) -> list[int]:
    """The rows that nothing uses; of an id that is there twice the first one stands for all."""
    unused = _look_up(ids, ids) == np.arange(len(ids))
    unused[used[used >= 0]] = False
    rows: list[int] = np.flatnonzero(unused).tolist()
    return rows


def _repeated_texts(texts: list[str | None]) -> Iterator[tuple[str, list[int]]]:
    if len(set(texts)) == len(texts):
        return
    rows_of: dict[str, list[int]] = {}
    for row, text in enumerate(texts):
        if text is not None:
            rows_of.setdefault(text, []).append(row)
    yield from ((text, rows) for text, rows in rows_of.items() if len(rows) > 1)


def _times(rows: list[int]) -> str:
    return "twice" if len(rows) == 2 else f"{len(rows)} times"
