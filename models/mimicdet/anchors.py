"""Positions of the low-resolution pyramid, their one square anchor each, and box coding."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

# A side grows at most by this factor per regression, as in Faster R-CNN's public implementations.
MAX_LOG_SCALE = math.log(1000 / 16)


@dataclass(frozen=True)
class Grid:
    """All positions of a pyramid, levels one after the other and rows within a level: P of them.

    Attributes:
        levels: the L of each of the pyramid's levels, lowest first.
        starts: index of each level's first position.
        level: (P,) int64, index into `levels`.
        level_start: (P,) int64, index of the first position of the same level.
        level_shape: (P, 2) int64, height and width of the position's level in cells.
        cell: (P, 2) float, x and y of the position in cells of its level.
        stride: (P,) float, pixels per cell.
        anchors: (P, 4) xyxy pixels.
        name: (P,) int64, a number for level, row and column, whatever the size of the maps.
    """

    levels: tuple[int, ...]
    starts: tuple[int, ...]
    level: Tensor
    level_start: Tensor
    level_shape: Tensor
    cell: Tensor
    stride: Tensor
    anchors: Tensor
    name: Tensor

    @property
    def centers(self) -> Tensor:
        """(P, 2) xy of the anchors' centres in pixels."""
        return (self.cell + 0.5) * self.stride[:, None]

    def inside(self, height: int, width: int) -> Tensor:
        """(P,) bool: cells that begin inside an image of this size, all others lie in padding.

        These are the cells that the image would have without padding, so each level keeps at least one.
        """
        x, y = (self.cell * self.stride[:, None]).unbind(-1)
        return (x < width) & (y < height)


def make_grid(levels: Sequence[int], features: Sequence[Tensor], scale: float) -> Grid:
    """Lay the grid of anchors with side `scale` × stride over feature maps (N, C, H, W), one per level."""
    device = features[0].device
    shapes = [feature.shape[-2:] for feature in features]  # as they are: an export keeps them symbols
    cells = []
    for height, width in shapes:
        y, x = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
        cells.append(torch.stack([x, y], -1).reshape(-1, 2))
    starts = list(accumulate((height * width for height, width in shapes), initial=0))[:-1]

    def fill(of_level: Iterable[float]) -> Tensor:
        # Filled in where it is needed: a GPU would wait for each number that comes from the host.
        return torch.cat(
            [torch.full(each.shape[:1], value, device=device) for each, value in zip(cells, of_level, strict=True)]
        )

    positions = torch.cat(cells)
    (column, row), cell = positions.unbind(1), positions.float()
    stride = fill(2.0**level for level in levels)
    center, half = (cell + 0.5) * stride[:, None], (scale * stride / 2)[:, None]
    return Grid(
        levels=tuple(levels),
        starts=tuple(starts),
        level=fill(range(len(levels))),
        level_start=fill(starts),
        level_shape=torch.stack([fill(height for height, _ in shapes), fill(width for _, width in shapes)], 1),
        cell=cell,
        stride=stride,
        anchors=torch.cat([center - half, center + half], 1),
        name=(fill(levels) << 40) | (row << 20) | column,
    )


def encode(boxes: Tensor, anchors: Tensor, std: Sequence[float] = (1, 1, 1, 1)) -> Tensor:
    """Faster R-CNN deltas (.., 4) that turn anchors into boxes, both (.., 4) xyxy, divided by `std`."""
    size = anchors[..., 2:] - anchors[..., :2]
    center = (anchors[..., 2:] + anchors[..., :2]) / 2
    box_size = boxes[..., 2:] - boxes[..., :2]
    box_center = (boxes[..., 2:] + boxes[..., :2]) / 2
    deltas = torch.cat([(box_center - center) / size, torch.log(box_size / size)], -1)
    return torch.stack([column / each for column, each in zip(deltas.unbind(-1), std, strict=True)], -1)


def decode(deltas: Tensor, anchors: Tensor, std: Sequence[float] = (1, 1, 1, 1)) -> Tensor:
    """Inverse of `encode`; growth is limited to exp(MAX_LOG_SCALE)."""
    deltas = torch.stack([column * each for column, each in zip(deltas.unbind(-1), std, strict=True)], -1)
    size = anchors[..., 2:] - anchors[..., :2]
    center = (anchors[..., 2:] + anchors[..., :2]) / 2 + deltas[..., :2] * size
    half = size * deltas[..., 2:].clamp(max=MAX_LOG_SCALE).exp() / 2
    return torch.cat([center - half, center + half], -1)


def full_precision(x: Tensor) -> Tensor:
    """Leave autocast's half precisions: boxes, offsets and losses are computed in fp32, or fp64 for a fp64 model."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def clip(boxes: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """Clip boxes (.., 4) to images of sides (..); their own sides keep at least 1e-3 px, to be encoded against.

    Of images of more than 4096 px they keep more, as much as their coordinates can tell apart in fp32.
    """
    boxes = boxes.nan_to_num()  # RoIAlign reads out of bounds at NaN; the losses tell that weights are broken
    x = boxes[..., 0::2]
    y = boxes[..., 1::2]
    thin, flat = ((side * 2.0**-22).clamp(min=1e-3) for side in (width, height))
    x1 = x[..., 0].clamp(min=0).minimum((width - thin).to(boxes.dtype))
    y1 = y[..., 0].clamp(min=0).minimum((height - flat).to(boxes.dtype))
    x2 = torch.maximum(x[..., 1].minimum(width.to(boxes.dtype)), x1 + thin)
    y2 = torch.maximum(y[..., 1].minimum(height.to(boxes.dtype)), y1 + flat)
    return torch.stack([x1, y1, x2, y2], -1)
