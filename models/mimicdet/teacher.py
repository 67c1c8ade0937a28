"""T-head: the two-stage head on the high-resolution pyramid; it exists in training only."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimicdet.anchors import full_precision
from mimicdet.config import ModelConfig
from mimicdet.pooling import pool
from mimicdet.student import HeadOutput, num_logits, start_predictors


class Teacher(nn.Module):
    """RoIAlign, two fully connected layers for the class, convolutions and one for the box. (paper)"""

    def __init__(self, model: ModelConfig, num_classes: int) -> None:
        super().__init__()
        self.config = config = model.teacher
        channels, head_width = model.pyramid.channels, model.student.head_width
        size = channels * config.pooled_size**2
        self.cls_hidden = nn.Sequential(
            nn.Flatten(), nn.Linear(size, head_width), nn.ReLU(), nn.Linear(head_width, head_width), nn.ReLU()
        )
        self.logits = nn.Linear(head_width, num_logits(num_classes, model))
        convs: list[nn.Module] = []
        for _ in range(config.num_convs):
            convs += [nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()]
        self.reg_hidden = nn.Sequential(*convs, nn.Flatten(), nn.Linear(size, head_width))
        self.deltas = nn.Linear(head_width, 4)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)
        start_predictors(self.logits, self.deltas, model)

    def forward(
        self,
        pyramid: Mapping[int, Tensor],
        boxes: Tensor,
        image: Tensor,
        level: Tensor,
        convs: Mapping[int, nn.Conv2d] | None = None,
    ) -> HeadOutput:
        """Evaluate the head on n boxes.

        Args:
            pyramid: {L: (N, C, H_L, W_L)} with every level that a box reads.
            boxes: (n, 4) xyxy pixels.
            image: (n,) int64, which image of the batch.
            level: (n,) int64, the L each box is pooled from: the anchor's own minus the stagger. (paper)
            convs: 3x3 convolutions that levels of the pyramid still have to go through.
        """
        rois = torch.cat([image[:, None].to(boxes.dtype), boxes], 1)
        # By level, and back: how many there are of each is all that the host has to know.
        names = sorted(pyramid)
        order = level.argsort(stable=True)
        sizes = torch.stack([(level == name).sum() for name in names]).tolist()
        pooled = []
        for name, chosen in zip(names, order.split(sizes), strict=True):
            pooled.append(
                pool(
                    pyramid[name],
                    rois[chosen],
                    size=self.config.pooled_size,
                    scale=1 / 2**name,
                    sampling_ratio=self.config.sampling_ratio,
                    conv=convs.get(name) if convs else None,
                )
            )
        x = torch.cat(pooled)[order.argsort()]
        feature = self.reg_hidden(x)
        logits = self.logits(self.cls_hidden(x))
        return HeadOutput(full_precision(logits), full_precision(self.deltas(F.relu(feature))), full_precision(feature))


def head_losses(output: HeadOutput, labels: Tensor, target_deltas: Tensor, background: int) -> tuple[Tensor, Tensor]:
    """Classification loss and L1 (summed over the four coordinates, positives only) of each of n boxes, (n,) each.

    The former is the cross-entropy, or where the logits have no background column the sum over classes of the
    binary cross-entropy.

    Args:
        output: of either head.
        labels: (n,) int64 classes, `background` for negatives.
        target_deltas: (n, 4), read where positive.
        background: index of the background class, which is the number of classes.
    """
    if output.logits.shape[1] > background:
        cls_loss = F.cross_entropy(output.logits, labels, reduction="none")
    else:
        wanted = F.one_hot(labels, background + 1)[:, :background].to(output.logits.dtype)
        cls_loss = F.binary_cross_entropy_with_logits(output.logits, wanted, reduction="none").sum(1)
    box_loss = (output.deltas - target_deltas).abs().sum(1)
    return cls_loss, torch.where(labels == background, torch.zeros_like(box_loss), box_loss)
