"""Data sets and detections that are written down in a test, without any file."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mimiclab.data.coco import CocoDataset
from mimiclab.data.columns import Columns, ImageFiles, offsets_of

Box = tuple[int, float, float, float, float]
"""Label, x, y, width, height."""


def truth(
    *images: Sequence[Box],
    classes: int = 3,
    crowds: Sequence[int] = (),
    folder: Path = Path(),
    files: Sequence[str] | None = None,
) -> CocoDataset:
    """A data set of 100 x 100 images with ids 10, 20, ...; category ids 3, 6, ...; `crowds` are objects' positions."""
    num = len(images)
    objects = np.array([box for boxes in images for box in boxes], np.float64).reshape(-1, 5)
    corners = np.concatenate([objects[:, 1:3], objects[:, 1:3] + objects[:, 3:5]], 1)
    names = np.array(files or [f"{i}.png" for i in range(num)], dtype=np.dtypes.StringDType())
    columns = Columns(
        ids=10 * np.arange(1, num + 1),
        widths=np.full(num, 100, np.int32),
        heights=np.full(num, 100, np.int32),
        names=names,
        offsets=offsets_of(np.array([len(boxes) for boxes in images])),
        boxes=corners.astype(np.float32),
        labels=objects[:, 0].astype(np.int64),
        iscrowd=np.isin(np.arange(len(objects)), crowds),
        areas=objects[:, 3:5].prod(1).astype(np.float32),
        annotation_ids=np.arange(len(objects)) + 1,
    )
    names_of_classes = tuple(f"c{label}" for label in range(classes))
    ids = tuple(3 * (label + 1) for label in range(classes))
    return CocoDataset("handmade", names_of_classes, ids, columns, ImageFiles(folder, names))


def rows(*found: tuple[int, Box, float]) -> np.ndarray:
    """Detections (n, 7) of (position of the image, box, score), by image."""
    listed = [
        [10 * (image + 1), *box, score, 3 * (label + 1)] for image, (label, *box), score in sorted(found, key=_image)
    ]
    return np.array(listed, np.float64).reshape(-1, 7)


def _image(found: tuple[int, Box, float]) -> int:
    return found[0]
