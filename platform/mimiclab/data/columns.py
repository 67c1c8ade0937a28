"""A data set's annotations as columns: a few arrays, however many images there are.

An object per image would cost more memory and time than COCO's 118,000 images are worth to a process that is
started for every worker; views of single images are made when they are asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np
import numpy.typing as npt

from mimiclab.errors import UserError


@dataclass(frozen=True, eq=False)
class Columns:
    """The columns of N images with M objects; image i has the objects offsets[i] to offsets[i + 1].

    Attributes:
        ids: (N,) int64, the images' ids in the annotation file, rising.
        widths: (N,) int32, stored width in pixels.
        heights: (N,) int32, stored height in pixels.
        names: (N,) of numpy's StringDType, file names within the folder of images.
        offsets: (N + 1,) int64, from 0 to M.
        boxes: (M, 4) float32, xyxy in pixels, inside of the image.
        labels: (M,) int64, 0-based index into the data set's classes.
        iscrowd: (M,) bool, true for regions that hold a crowd.
        areas: (M,) float32, the annotation's own area in square pixels, or the box's where it has none.
        annotation_ids: (M,) int64, ids in the annotation file.
    """

    ids: npt.NDArray[np.int64]
    widths: npt.NDArray[np.int32]
    heights: npt.NDArray[np.int32]
    names: npt.NDArray[Any]
    offsets: npt.NDArray[np.int64]
    boxes: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    iscrowd: npt.NDArray[np.bool_]
    areas: npt.NDArray[np.float32]
    annotation_ids: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ids)

    def digest(self) -> str:
        """The sha256 of all columns, in hexadecimal; the same on every machine and in every container."""
        sha256 = hashlib.sha256()
        for field in fields(self):
            column = getattr(self, field.name)
            if field.name == "names":
                encoded = [name.encode() for name in column.tolist()]
                sha256.update(np.array([len(name) for name in encoded], dtype="<i8").tobytes())
                sha256.update(b"".join(encoded))
            else:
                sha256.update(np.ascontiguousarray(column, dtype=column.dtype.newbyteorder("<")).tobytes())
        return sha256.hexdigest()

    def take(self, positions: npt.NDArray[np.int64]) -> Columns:
        """The images at these positions, with their objects."""
        counts = np.diff(self.offsets)[positions]
        starts = self.offsets[positions]
        offsets = offsets_of(counts)
        # Where each kept object was: its image's start, and its number within the image.
        objects = np.repeat(starts - offsets[:-1], counts) + np.arange(offsets[-1])
        return Columns(
            self.ids[positions],
            self.widths[positions],
            self.heights[positions],
            self.names[positions],
            offsets,
            self.boxes[objects],
            self.labels[objects],
            self.iscrowd[objects],
            self.areas[objects],
            self.annotation_ids[objects],
        )


def offsets_of(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """(N + 1,) int64, where each image's objects start, from how many each has, (N,)."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def names_of(names: Iterable[str]) -> npt.NDArray[Any]:
    """File names as a column."""
    return np.array(list(names), dtype=np.dtypes.StringDType())


class Source(Protocol):
    """Where the encoded images of a data set lie."""

    def read(self, position: int) -> bytes:
        """The bytes of an image file, by the image's position.

        Raises:
            UserError: It cannot be read, or is not what it was when the data set was opened.
        """

    def where(self, position: int) -> str:
        """What messages call the image."""


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Images as files in a folder."""

    folder: Path
    names: npt.NDArray[Any]

    def read(self, position: int) -> bytes:
        """The bytes of an image file."""
        path = self.folder / str(self.names[position])
        try:
            return path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read as an image: {error.strerror}") from error

    def where(self, position: int) -> str:
        """The path of an image."""
        return str(self.folder / str(self.names[position]))


@dataclass(frozen=True, eq=False)
class ImageRecord:
    """One image and its M objects: a view of the columns.

    Attributes:
        id: The image's id in the annotation file.
        path: Its file; of a packed set, the name that the file had.
        width: Stored width in pixels.
        height: Stored height in pixels.
        boxes: (M, 4) float32, xyxy in pixels, inside of the image.
        labels: (M,) int64, 0-based index into the data set's classes.
        iscrowd: (M,) bool, true for regions that hold a crowd.
        areas: (M,) float32, the annotation's own area in square pixels, or the box's where it has none.
        annotation_ids: (M,) int64, ids in the annotation file.
        position: The image's position in the columns.
        source: What its bytes are read from.
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
    position: int
    source: Source

    @property
    def where(self) -> str:
        """What messages call the image."""
        return self.source.where(self.position)

    def encoded(self) -> bytes:
        """The bytes of the image file.

        Raises:
            UserError: see `Source.read`.
        """
        return self.source.read(self.position)


class Images(Sequence[ImageRecord]):
    """All images of some columns in order, each made when it is asked for."""

    def __init__(self, columns: Columns, source: Source) -> None:
        self._columns = columns
        self._source = source
        self._folder = source.folder if isinstance(source, ImageFiles) else Path()

    def __len__(self) -> int:
        return len(self._columns)

    @overload
    def __getitem__(self, position: int) -> ImageRecord: ...
    @overload
    def __getitem__(self, position: slice) -> tuple[ImageRecord, ...]: ...
    def __getitem__(self, position: int | slice) -> ImageRecord | tuple[ImageRecord, ...]:
        numbers = range(len(self))[position]
        return self._record(numbers) if isinstance(numbers, int) else tuple(self._record(n) for n in numbers)

    def __iter__(self) -> Iterator[ImageRecord]:
        return map(self._record, range(len(self)))

    def _record(self, position: int) -> ImageRecord:
        columns = self._columns
        objects = slice(columns.offsets[position], columns.offsets[position + 1])
        return ImageRecord(
            int(columns.ids[position]),
            self._folder / str(columns.names[position]),
            int(columns.widths[position]),
            int(columns.heights[position]),
            columns.boxes[objects],
            columns.labels[objects],
            columns.iscrowd[objects],
            columns.areas[objects],
            columns.annotation_ids[objects],
            position,
            self._source,
        )
