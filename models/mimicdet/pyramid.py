"""Feature pyramid with a low-resolution set for the student and a high-resolution set for the teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from mimicdet.config import PyramidConfig


class Pyramid(nn.Module):
    """FPN (Lin et al. 2017) from P_{min_level - stagger} to P_{max_level}; P6 and P7 as in RetinaNet.

    `low_levels` are read by refinement and student, `high_levels`, `stagger` below, by the teacher. What lies
    under the low levels is needed in training only and computed only when asked for.
    """

    def __init__(self, in_channels: Mapping[int, int], config: PyramidConfig) -> None:
        super().__init__()
        self.config = config
        self.low_levels = tuple(range(config.min_level, config.max_level + 1))
        self.high_levels = tuple(level - config.stagger for level in self.low_levels)
        self.lowest = self.high_levels[0]
        # Read at the teacher's boxes only.
        self.boxes_only = tuple(level for level in self.high_levels if level < self.low_levels[0])
        channels = config.channels
        from_backbone = range(min(self.lowest, 5), 6)
        self.lateral = nn.ModuleDict({str(i): nn.Conv2d(in_channels[i], channels, 1) for i in from_backbone})
        self.output = nn.ModuleDict({str(i): nn.Conv2d(channels, channels, 3, padding=1) for i in from_backbone})
        source = in_channels[5] if config.extra_from == "c5" else channels
        self.extra = nn.ModuleDict(
            {
                str(level): nn.Conv2d(source if level == 6 else channels, channels, 3, stride=2, padding=1)
                for level in range(6, config.max_level + 1)
            }
        )
        for conv in self.modules():
            if isinstance(conv, nn.Conv2d):
                nn.init.kaiming_uniform_(conv.weight, a=1)
                assert conv.bias is not None
                nn.init.zeros_(conv.bias)

    def forward(
        self, features: Mapping[int, Tensor], *, lowest: int | None = None, unfinished: Sequence[int] = ()
    ) -> dict[int, Tensor]:
        """Compute P_lowest..P_max.

        Args:
            features: C2..C5, (N, C_L, H_L, W_L) each.
            lowest: the lowest level wanted; the pyramid's own lowest by default.
            unfinished: levels below P5 that are returned as they are before their `output` convolution.

        Returns:
            {L: (N, channels, H_L, W_L)}.
        """
        lowest = self.lowest if lowest is None else lowest
        inner = self.lateral["5"](features[5])
        pyramid = {5: self.output["5"](inner)}
        for level in range(4, lowest - 1, -1):
            lateral = self.lateral[str(level)](features[level])
            inner = lateral + F.interpolate(inner, size=lateral.shape[-2:], mode="nearest")
            pyramid[level] = inner if level in unfinished else self.output[str(level)](inner)
        source = features[5] if self.config.extra_from == "c5" else pyramid[5]
        for level in range(6, self.config.max_level + 1):
            pyramid[level] = self.extra[str(level)](source if level == 6 else F.relu(pyramid[6]))
        return pyramid
