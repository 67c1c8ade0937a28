"""Refinement module: objectness and a first regression for every anchor, and proposals from them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import nms

from mimicdet.anchors import Grid, encode
from mimicdet.assignment import assign_anchors
from mimicdet.config import RefinementConfig
from mimicdet.sampling import REFINEMENT, priority, sample


class Refinement(nn.Module):
    """One 3x3 convolution and two 1x1 siblings, shared over all levels. (paper)"""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.objectness = nn.Conv2d(channels, 1, 1)
        self.deltas = nn.Conv2d(channels, 4, 1)
        for layer in (self.conv, self.objectness, self.deltas):
            nn.init.normal_(layer.weight, std=0.01)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def forward(self, levels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Map the low-resolution levels, (N, C, H, W) each, to objectness logits (N, P) and deltas (N, P, 4)."""
        objectness, deltas = [], []
        for level in levels:
            hidden = F.relu(self.conv(level))
            objectness.append(self.objectness(hidden).flatten(1))
            deltas.append(self.deltas(hidden).flatten(2).transpose(1, 2))
        return torch.cat(objectness, 1).float(), torch.cat(deltas, 1).float()


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
) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy and L1 of one image, each divided by the number of sampled anchors.

    Args:
        objectness, deltas: (P,) and (P, 4) of the image.
        grid, candidates, boxes, iscrowd, scale, config: see `assign_anchors`.
        key: scalar int64 that decides the random sample.
    """
    assignment = assign_anchors(grid, candidates, boxes, iscrowd, scale, config)
    positions = torch.arange(len(objectness), device=objectness.device)
    chosen = sample(
        assignment.positive,
        assignment.negative,
        config.num_samples,
        config.positive_fraction,
        priority(key, REFINEMENT, positions),
    )
    num = max(1, len(chosen))
    target = assignment.positive[chosen]
    cls_loss = F.binary_cross_entropy_with_logits(objectness[chosen], target.float(), reduction="sum") / num
    hit = chosen[target]
    wanted = encode(boxes[assignment.matched[hit]], grid.anchors[hit])
    return cls_loss, F.l1_loss(deltas[hit], wanted, reduction="sum") / num


def propose(objectness: Tensor, refined: Tensor, candidates: Tensor, config: RefinementConfig) -> Tensor:
    """Positions (R,) of one image's training proposals: NMS over all levels together, best first.

    Args:
        objectness: (P,) logits.
        refined: (P, 4) refined anchors.
        candidates: (P,) bool, False in padding.
        config: NMS threshold and counts.
    """
    order = top_positions(objectness, candidates, config.pre_nms_topk)
    kept = nms(refined[order], objectness[order], config.nms_iou)[: config.num_proposals]
    return order[kept]


def top_positions(objectness: Tensor, candidates: Tensor, num: int) -> Tensor:
    """The at most `num` candidate positions of the highest objectness, best first."""
    positions = candidates.nonzero().flatten()
    return positions[objectness[positions].topk(min(num, len(positions))).indices]
