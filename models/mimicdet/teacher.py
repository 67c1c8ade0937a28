"""T-head: the two-stage head on the high-resolution pyramid; it exists in training only."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from mimicdet.config import TeacherConfig
from mimicdet.student import HeadOutput


class Teacher(nn.Module):
    """RoIAlign, two fully connected layers for the class, convolutions and one for the box. (paper)"""

    def __init__(self, channels: int, head_width: int, num_classes: int, config: TeacherConfig) -> None:
        super().__init__()
        self.config = config
        size = channels * config.pooled_size**2
        self.cls_hidden = nn.Sequential(
            nn.Flatten(), nn.Linear(size, head_width), nn.ReLU(), nn.Linear(head_width, head_width), nn.ReLU()
        )
        self.logits = nn.Linear(head_width, num_classes + 1)
        convs: list[nn.Module] = []
        for _ in range(config.num_convs):
            convs += [nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()]
        self.reg_hidden = nn.Sequential(*convs, nn.Flatten(), nn.Linear(size, head_width), nn.ReLU())
        self.deltas = nn.Linear(head_width, 4)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)
        for predictor, std in ((self.logits, 0.01), (self.deltas, 0.001)):
            nn.init.normal_(predictor.weight, std=std)

    def forward(self, pyramid: Mapping[int, Tensor], boxes: Tensor, image: Tensor, level: Tensor) -> HeadOutput:
        """Evaluate the head on n boxes.

        Args:
            pyramid: {L: (N, C, H_L, W_L)} with every level that a box reads.
            boxes: (n, 4) xyxy pixels.
            image: (n,) int64, which image of the batch.
            level: (n,) int64, the L each box is pooled from: the anchor's own minus the stagger. (paper)
        """
        rois = torch.cat([image[:, None].to(boxes.dtype), boxes], 1)
        pooled, orders = [], []
        for name in sorted(pyramid):
            chosen = (level == name).nonzero().flatten()
            orders.append(chosen)
            pooled.append(
                roi_align(
                    pyramid[name],
                    rois[chosen],
                    output_size=self.config.pooled_size,
                    spatial_scale=1 / 2**name,
                    sampling_ratio=self.config.sampling_ratio,
                    aligned=True,
                )
            )
        x = torch.cat(pooled)[torch.cat(orders).argsort()]
        feature = self.reg_hidden(x)
        logits = self.logits(self.cls_hidden(x))
        return HeadOutput(logits.float(), self.deltas(feature).float(), feature.float())


def head_losses(output: HeadOutput, labels: Tensor, target_deltas: Tensor, background: int) -> tuple[Tensor, Tensor]:
    """Cross-entropy and L1 (summed over the four coordinates, positives only) of each of n boxes, (n,) each.

    Args:
        output: of either head.
        labels: (n,) int64 classes, `background` for negatives.
        target_deltas: (n, 4), read where positive.
        background: index of the background class.
    """
    cls_loss = F.cross_entropy(output.logits, labels, reduction="none")
    box_loss = (output.deltas - target_deltas).abs().sum(1)
    return cls_loss, torch.where(labels == background, torch.zeros_like(box_loss), box_loss)
