"""How many objects there are of each class and size, and how many of them are too small for the anchors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mimicdet.config import ModelConfig
from mimiclab.data.flaws import Objects
from mimiclab.data.listing import Listing
from mimiclab.schema import Experiment, Resize

# Sides sqrt(area) in pixels; 32 and 96 are where COCO's metric parts small from medium from large.
SIDES = (0, 8, 16, 32, 64, 96, 128, 256, 512)


@dataclass(frozen=True)
class Reach:
    """The smallest anchor of an experiment, and the smallest box that it can catch.

    An anchor of side a has at best IoU w h / a² with a box of w × h that fits into it, which is 0.5 or more from
    sqrt(w h) = a / sqrt(2) on. A smaller box still gets anchors, by the centre region of the assignment, but each
    starts below the IoU of 0.5 that a detection needs to count; its first regression has to close the gap.

    Attributes:
        anchor: Side a of the smallest anchor in pixels of the resized image, scale × 2^min_level.
        resize: The experiment's bounds; of multi-scale training `short` counts, which evaluation uses.
    """

    anchor: float
    resize: Resize

    @property
    def least(self) -> float:
        """The side sqrt(w h) in pixels of the resized image below which no box reaches an IoU of 0.5."""
        return self.anchor / math.sqrt(2)

    def scales(self, sizes: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """What the resize multiplies sqrt(area) by, for stored sizes (N, 2); NaN where the size is unknown."""
        from mimiclab.data.transforms import resized_size  # brings torch along

        unique, inverse = np.unique(np.nan_to_num(sizes).astype(np.int64), axis=0, return_inverse=True)
        scales = [
            math.sqrt(math.prod(resized_size(width, height, self.resize.short, self.resize.long)) / (width * height))
            if width and height
            else math.nan
            for width, height in unique.tolist()
        ]
        return np.array(scales)[inverse.ravel()]


def reach(experiment: Experiment) -> Reach | None:
    """The reach of an experiment's anchors; None where the detector has none (FCOS)."""
    side = _smallest_anchor(experiment.model)
    return None if side is None else Reach(side, experiment.data.resize)


def _smallest_anchor(model: ModelConfig) -> float | None:
    if model.detector == "fcos":
        return None
    if model.detector == "faster_rcnn":  # always starts at P2, with anchors of twice as many strides
        return 2 * model.anchors.scale * 2**2
    return model.anchors.scale * 2.0**model.pyramid.min_level


def measure(listing: Listing, objects: Objects, reach: Reach | None) -> list[dict[str, Any]]:
    """Count the objects of every class, crowd regions left out.

    Returns:
        A dict per category: `id`, `name`, `objects`, `images` (that hold one), `crowds`, `sizes` (objects whose
        side sqrt(area), in pixels as stored, is at least each of `SIDES` and below the next) and, with a reach,
        `too_small` (objects that no anchor can catch).
    """
    # Of category ids that are there twice the second one has none.
    num = len(listing.category_ids)
    kept = ~objects.iscrowd
    category, image = objects.category_rows[kept], objects.image_rows[kept]
    side = np.sqrt(objects.sides[kept].prod(1))
    bins = np.searchsorted(SIDES, side, side="right") - 1
    sizes = np.bincount(category * len(SIDES) + bins, minlength=num * len(SIDES)).reshape(num, len(SIDES))
    pairs = np.unique(category * len(listing.image_ids) + image) if num else category
    images = np.bincount(pairs // max(1, len(listing.image_ids)), minlength=num)
    crowds = np.bincount(objects.category_rows[objects.iscrowd], minlength=num)
    rows: list[dict[str, Any]] = [
        {
            "id": int(listing.category_ids[row]),
            "name": listing.category_names[row],
            "objects": int(sizes[row].sum()),
            "images": int(images[row]),
            "crowds": int(crowds[row]),
            "sizes": sizes[row].tolist(),
        }
        for row in range(num)
    ]
    if reach is not None:
        missed = side * reach.scales(listing.image_sizes)[image] < reach.least
        for row, too_small in zip(rows, np.bincount(category[missed], minlength=num).tolist(), strict=True):
            row["too_small"] = too_small
    return rows
