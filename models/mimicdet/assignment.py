"""Which ground truth an anchor or a proposal answers for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_iou

from mimicdet.anchors import Grid
from mimicdet.config import RefinementConfig

# A crowd region covers a proposal that lies in it by more than this share of the proposal's own area.
CROWD_COVERAGE = 0.5


@dataclass(frozen=True)
class Assignment:
    """Result for n candidates.

    Attributes:
        matched: (n,) int64, index of the ground truth; meaningful where positive.
        positive: (n,) bool.
        negative: (n,) bool; neither means ignored.
    """

    matched: Tensor
    positive: Tensor
    negative: Tensor


def assign_anchors(
    grid: Grid, candidates: Tensor, boxes: Tensor, iscrowd: Tensor, scale: float, config: RefinementConfig
) -> Assignment:
    """Assign anchors to ground truths by level and centre region.

    A ground truth belongs to the one level whose bounds b satisfy b_low <= sqrt(area) < b_high, the lowest level
    taking all smaller and the highest all larger ones; see `scale_bounds`. On that level an anchor is positive if
    its centre lies in the box shrunk to `center_ratio` per side about its centre; of several boxes the smallest
    wins. With `forced_assignment` a box without any centre in its region takes the nearest anchor of its level.
    Centres in the ring out to `ignore_ratio`, and centres in crowd regions, are ignored unless positive.

    Args:
        grid: P positions.
        candidates: (P,) bool, False in padding.
        boxes: (M, 4) xyxy pixels, crowd regions included.
        iscrowd: (M,) bool.
        scale: anchor side in strides.
        config: ratios.
    """
    num = len(grid.level)
    centers = grid.centers
    if len(boxes) == 0:
        none = torch.zeros_like(candidates)
        return Assignment(matched=centers.new_zeros(num, dtype=torch.int64), positive=none, negative=candidates.clone())

    size = boxes[:, 2:] - boxes[:, :2]
    area = size.prod(1)
    side = area.sqrt()
    level = torch.zeros_like(side, dtype=torch.int64)
    for bound in config.scale_bounds or [scale * 2.0 ** (each + 1) for each in grid.levels[:-1]]:
        level += side >= bound

    distance = (centers[:, None] - (boxes[:, :2] + boxes[:, 2:])[None] / 2).abs()  # (P, M, 2)
    same_level = candidates[:, None] & (grid.level[:, None] == level) & ~iscrowd

    def within(ratio: float) -> Tensor:
        return (distance <= size * (ratio / 2)).all(-1)

    region = within(config.center_ratio) & same_level
    if config.forced_assignment:
        # Euclidean distance, with the candidates of other levels out of reach; argmin takes the first of equals.
        reach = distance.square().sum(-1).masked_fill(~same_level, torch.inf)
        lonely = ~region.any(0) & ~iscrowd & same_level.any(0)
        nearest, own = reach.argmin(0), torch.arange(len(boxes), device=boxes.device)
        region[nearest, own] |= lonely

    claim = area[None].expand(num, -1).masked_fill(~region, torch.inf)
    matched = claim.argmin(1)
    positive = region.any(1)
    ring = (within(config.ignore_ratio) & same_level).any(1)
    crowd = (within(1.0) & iscrowd).any(1)
    return Assignment(matched=matched, positive=positive, negative=candidates & ~positive & ~ring & ~crowd)


def assign_proposals(proposals: Tensor, boxes: Tensor, iscrowd: Tensor, iou_threshold: float) -> Assignment:
    """Assign proposals (n, 4) to the ground truth (M, 4) of the highest IoU, positive from `iou_threshold`.

    Proposals that are not positive and lie mostly in a crowd region are ignored.
    """
    if len(boxes) == 0:
        none = torch.zeros(len(proposals), dtype=torch.bool, device=proposals.device)
        return Assignment(matched=none.long(), positive=none, negative=~none)
    best, matched = box_iou(proposals, boxes).masked_fill(iscrowd, -1).max(1)
    positive = best >= iou_threshold
    covered = _coverage(proposals, boxes).masked_fill(~iscrowd, 0).amax(1) > CROWD_COVERAGE
    return Assignment(matched=matched, positive=positive, negative=~positive & ~covered)


def _coverage(proposals: Tensor, regions: Tensor) -> Tensor:
    """Share (n, M) of each proposal's area that each of the regions covers."""
    low = torch.maximum(proposals[:, None, :2], regions[None, :, :2])
    high = torch.minimum(proposals[:, None, 2:], regions[None, :, 2:])
    area = (proposals[:, 2:] - proposals[:, :2]).prod(1)
    return (high - low).clamp(min=0).prod(-1) / area[:, None]
