"""What both heads stand on: the pyramid, its positions, and the refined boxes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mimicdet.anchors import Grid
from mimicdet.student import Features


@dataclass(frozen=True)
class Shared:
    """The part of a forward pass before the heads, for N images and P positions.

    Attributes:
        pyramid: {L: (N, C, H_L, W_L)}.
        features: the low-resolution levels, packed.
        grid: the positions of the low-resolution levels.
        candidates: (N, P) bool, False in padding.
        objectness: (N, P) logits.
        deltas: (N, P, 4) first regression.
        refined: (N, P, 4) xyxy pixels, the anchors after the first regression, clipped to their images.
        sizes: (N, 2) float, height and width of each image without padding.
    """

    pyramid: dict[int, Tensor]
    features: Features
    grid: Grid
    candidates: Tensor
    objectness: Tensor
    deltas: Tensor
    refined: Tensor
    sizes: Tensor
