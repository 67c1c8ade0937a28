"""Refinement module: objectness and a first regression for every anchor, and proposals from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms, nms, sigmoid_focal_loss

from mimicdet.anchors import Grid, encode, full_precision
from mimicdet.assignment import Assignment, assign_anchors
from mimicdet.config import RefinementConfig
from mimicdet.sampling import REFINEMENT, priority, sample


class Refinement(nn.Module):
    """One 3x3 convolution and two 1x1 siblings, shared over all levels. (paper)"""

    def __init__(self, channels: int, config: RefinementConfig) -> None:
        super().__init__()
        width = config.width or channels
        self.conv = nn.Conv2d(channels, width, 3, padding=1)
        self.objectness = nn.Conv2d(width, 1, 1)
        self.deltas = nn.Conv2d(width, 4, 1) if config.regress else None
        for layer in filter(None, (self.conv, self.objectness, self.deltas)):
            nn.init.normal_(layer.weight, std=0.01)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
        if config.loss == "focal":
            # Every anchor counts: start where almost all are background. (Lin et al. 2017, section 3.3)
            assert self.objectness.bias is not None
            nn.init.constant_(self.objectness.bias, prior_bias())

    def forward(self, levels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Map the low-resolution levels, (N, C, H, W) each, to objectness logits (N, P) and deltas (N, P, 4)."""
        objectness, deltas = [], []
        for level in levels:
            hidden = F.relu(self.conv(level))
            # In half precision many of the best objectness values would be equal, and their order the kernel's.
            with _without_autocast(hidden.device.type):
                hidden = full_precision(hidden)
                objectness.append(self.objectness(hidden).flatten(1))
                moved = (
                    hidden.new_zeros(len(hidden), 4, *hidden.shape[2:]) if self.deltas is None else self.deltas(hidden)
                )
                deltas.append(moved.flatten(2).transpose(1, 2))
        return torch.cat(objectness, 1), torch.cat(deltas, 1)


def _without_autocast(device: str) -> AbstractContextManager[object]:
    # Only where there is something to switch off: a traced graph stays free of it, and not all devices know it.
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def prior_bias(prior: float = 0.01) -> float:
    """Logit at which a sigmoid gives `prior`; 0.01 is Lin et al. 2017's for a rare foreground."""
    return -math.log((1 - prior) / prior)


def refinement_losses(
    objectness: Tensor,
    deltas: Tensor,
    grid: Grid,
    candidates: Tensor,
    boxes: Tensor,
    iscrowd: Tensor,
    key: Tensor,
    scale: float,
    config: RefinementConfig,
    over: str = "sampled",
) -> tuple[Tensor, Tensor]:
    """Classification loss and L1 of one image.

    Both are divided by the number of sampled anchors, the L1 by that of positives if `over` says so; with `loss:
    focal` all anchors that are not ignored count, and both are divided by the number of positives.

    Args:
        objectness, deltas: (P,) and (P, 4) of the image.
        grid, candidates, boxes, iscrowd, scale, config: see `assign_anchors`.
        key: scalar int64 that decides the random sample.
        over: what the L1 is divided by, see `ModelConfig.box_loss_over`.
    """
    assignment = assign_anchors(grid, candidates, boxes, iscrowd, scale, config)
    if config.loss == "focal":
        counted = assignment.positive | assignment.negative
        num = int(assignment.positive.sum().clamp(min=1))
        cls_loss = sigmoid_focal_loss(
            objectness[counted], assignment.positive[counted].to(objectness.dtype), reduction="sum"
        )
        hit = assignment.positive.nonzero().flatten()
        return cls_loss / num, _box_loss(deltas, grid, boxes, assignment, hit, config) / num
    chosen = sample(
        assignment.positive,
        assignment.negative,
        config.num_samples,
        config.positive_fraction,
        priority(key, REFINEMENT, grid.name),
    )
    num = max(1, len(chosen))
    target = assignment.positive[chosen]
    cls_loss = (
        F.binary_cross_entropy_with_logits(objectness[chosen], target.to(objectness.dtype), reduction="sum") / num
    )
    hit = chosen[target]
    num = num if over == "sampled" else max(1, len(hit))
    return cls_loss, _box_loss(deltas, grid, boxes, assignment, hit, config) / num


def _box_loss(
    deltas: Tensor, grid: Grid, boxes: Tensor, assignment: Assignment, hit: Tensor, config: RefinementConfig
) -> Tensor:
    if not config.regress:
        return deltas.new_zeros(())
    wanted = encode(boxes[assignment.matched[hit]], grid.anchors[hit], config.box_std)
    return F.l1_loss(deltas[hit], wanted, reduction="sum")


@torch.no_grad()
def propose(objectness: Tensor, refined: Tensor, candidates: Tensor, level: Tensor, config: RefinementConfig) -> Tensor:
    """Positions (R,) of one image's training proposals, best first: NMS over all levels together, or on each.

    Args:
        objectness: (P,) logits.
        refined: (P, 4) refined anchors.
        candidates: (P,) bool, False in padding.
        level: (P,) int64, of each position.
        config: NMS threshold and counts.
    """
    order = top_positions(objectness, candidates, config.pre_nms_topk)
    if config.nms_per_level:
        kept = batched_nms(refined[order], objectness[order], level[order], config.nms_iou)
    else:
        kept = nms(refined[order], objectness[order], config.nms_iou)
    return order[kept[: config.num_proposals]]


def top_positions(objectness: Tensor, candidates: Tensor, num: int) -> Tensor:
    """The at most `num` candidate positions of the highest objectness, best first."""
    positions = candidates.nonzero().flatten()
    return positions[objectness[positions].topk(min(num, len(positions))).indices]
