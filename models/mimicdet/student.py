"""S-head: the deployed head, evaluated at chosen positions only.

No output needs more than the pyramid near its own position and the deltas that refinement gave there. So the
deformable convolution reads the K taps of the n boxes in question and multiplies them by its weights once, and the
head's cost follows the number of boxes that training or inference looks at rather than the size of the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from mimicdet.anchors import Grid, decode, full_precision
from mimicdet.config import ModelConfig, StudentConfig
from mimicdet.refinement import prior_bias


@dataclass(frozen=True)
class HeadOutput:
    """A head's answer for n boxes.

    Attributes:
        logits: (n, C + 1) class logits, background last; (n, C) in the class space `sigmoid`.
        deltas: (n, 4) second regression, from the refined box, divided by the head's `box_std`.
        feature: (n, F) regression feature before its ReLU; mimicking takes it after the ReLU or before.
    """

    logits: Tensor
    deltas: Tensor
    feature: Tensor

    def split(self, sizes: Sequence[int]) -> list[HeadOutput]:
        """Cut into consecutive parts of the given numbers of boxes."""
        parts = zip(
            self.logits.split(list(sizes)),
            self.deltas.split(list(sizes)),
            self.feature.split(list(sizes)),
            strict=True,
        )
        return [HeadOutput(*part) for part in parts]


@dataclass(frozen=True)
class Features:
    """The low-resolution pyramid as one table, so that a gather over all levels is one operation.

    Attributes:
        table: (N * P, C) rows ordered by image, level, row, column.
        num_positions: P.
    """

    table: Tensor
    num_positions: int

    @classmethod
    def pack(cls, levels: Sequence[Tensor]) -> Features:
        """Pack levels (N, C, H, W), lowest first."""
        rows = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], 1)
        return cls(table=rows.flatten(0, 1), num_positions=rows.shape[1])


class Student(nn.Module):
    """Micro-network, deformable convolution, two 1x1 siblings and two predictors. (paper)"""

    def __init__(self, model: ModelConfig, num_classes: int) -> None:
        super().__init__()
        self.config = config = model.student
        channels = model.pyramid.channels
        # A (micro-network, convolution) pair for each entry; the last serves all levels above. (chosen)
        self.samplers = nn.ModuleList(
            [AdaptiveConv(channels, k, config, model.refinement.box_std) for k in config.kernel_sizes]
        )
        self.cls_hidden = nn.Linear(channels, config.head_width)
        self.reg_hidden = nn.Linear(channels, config.head_width)
        self.logits = nn.Linear(config.head_width, num_logits(num_classes, model))
        self.deltas = nn.Linear(config.head_width, 4)
        for hidden in (self.cls_hidden, self.reg_hidden):
            nn.init.kaiming_normal_(hidden.weight, nonlinearity="relu")
            nn.init.zeros_(hidden.bias)
        start_predictors(self.logits, self.deltas, model)

    def forward(
        self, features: Features, refine_deltas: Tensor, grid: Grid, image: Tensor, position: Tensor
    ) -> HeadOutput:
        """Evaluate the head at n chosen positions.

        Args:
            features: the packed low-resolution pyramid.
            refine_deltas: (N, P, 4) output of the refinement module.
            grid: P positions.
            image: (n,) int64, which image of the batch.
            position: (n,) int64, which position of that image.
        """
        deltas = refine_deltas[image, position]
        if self.config.detach_offsets:
            deltas = deltas.detach()
        which = grid.level[position].clamp(max=len(self.samplers) - 1)
        parts, outputs = [], []
        for index, sampler in enumerate(self.samplers):
            chosen = (which == index).nonzero().flatten()
            parts.append(chosen)
            outputs.append(sampler(features, deltas[chosen], grid, image[chosen], position[chosen]))
        sampled = outputs[0].new_empty(position.shape[0], outputs[0].shape[1])
        for chosen, output in zip(parts, outputs, strict=True):
            sampled[chosen] = output
        return self.predict(sampled)

    def dense(self, levels: Sequence[Tensor], refine_deltas: Tensor, grid: Grid) -> HeadOutput:
        """Evaluate the head at every position by `torchvision.ops.deform_conv2d`, as the paper draws it.

        Kept for checking: `forward` at all positions gives the same.

        Args:
            levels: the low-resolution levels, (N, C, H, W) each.
            refine_deltas: (N, P, 4).
            grid: P positions.

        Returns:
            N * P answers, ordered by image, then position.
        """
        if self.config.detach_offsets:
            refine_deltas = refine_deltas.detach()
        sampled = []
        for index, (level, start) in enumerate(zip(levels, grid.starts, strict=True)):
            sampler = self.samplers[min(index, len(self.samplers) - 1)]
            assert isinstance(sampler, AdaptiveConv)
            height, width = level.shape[-2:]
            position = torch.arange(start, start + height * width, device=level.device)
            plain = grid.cell[position].flip(1)[:, None] + sampler.taps
            offsets = torch.stack([sampler.points(d, grid, position) - plain for d in refine_deltas[:, position]])
            offsets = offsets.flatten(2).transpose(1, 2).unflatten(2, (height, width)).to(level.dtype)
            padding = sampler.kernel_size // 2
            mapped = deform_conv2d(level, offsets.contiguous(), sampler.weight, sampler.bias, padding=padding)
            sampled.append(mapped.flatten(2).transpose(1, 2))
        return self.predict(torch.cat(sampled, 1).flatten(0, 1))

    def predict(self, sampled: Tensor) -> HeadOutput:
        """Predict from what the adaptive convolutions read for n boxes, (n, channels)."""
        hidden = F.relu(sampled)
        feature = self.reg_hidden(hidden)
        logits = self.logits(F.relu(self.cls_hidden(hidden)))
        return HeadOutput(full_precision(logits), full_precision(self.deltas(F.relu(feature))), full_precision(feature))


def num_logits(num_classes: int, model: ModelConfig) -> int:
    """Class logits of a box: softmax has one more, for the background."""
    return num_classes + (model.class_space == "softmax")


def start_predictors(logits: nn.Linear, deltas: nn.Linear, model: ModelConfig) -> None:
    """Start a head's predictors with the small weights of Faster R-CNN; sigmoids start at a rare foreground."""
    for predictor, std in ((logits, 0.01), (deltas, 0.001)):
        nn.init.normal_(predictor.weight, std=std)
        nn.init.zeros_(predictor.bias)
    if model.class_space == "sigmoid":
        nn.init.constant_(logits.bias, prior_bias())


class AdaptiveConv(nn.Module):
    """k x k convolution whose taps are placed by each position's own refinement output."""

    def __init__(
        self, channels: int, kernel_size: int, config: StudentConfig, refine_std: tuple[float, float, float, float]
    ) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.refine_std = refine_std
        self.offsets = config.offsets
        num_taps = kernel_size**2
        first, second = config.offset_channels
        self.micro = nn.Sequential()
        if self.offsets in ("learned", "analytic_learned"):
            last = nn.Linear(second, 2 * num_taps)
            # From zero, training starts from a plain convolution or from the analytic grid.
            nn.init.zeros_(last.weight)
            if config.offset_init_std > 0:
                nn.init.normal_(last.weight, std=config.offset_init_std)
            nn.init.zeros_(last.bias)
            self.micro = nn.Sequential(nn.Linear(4, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), last)
        conv = nn.Conv2d(channels, channels, kernel_size)
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        self.weight = conv.weight
        self.bias = nn.Parameter(torch.zeros(channels))
        reach = (kernel_size - 1) // 2
        steps = torch.arange(-reach, reach + 1.0)
        taps = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1).reshape(-1, 2)
        self.register_buffer("taps", taps, persistent=False)  # (K, 2) y, x
        self.taps: Tensor

    def forward(self, features: Features, deltas: Tensor, grid: Grid, image: Tensor, position: Tensor) -> Tensor:
        """Return (n, C) at positions (n,) of images (n,), whose refinement deltas are (n, 4)."""
        points = self.points(deltas, grid, position)
        start = grid.level_start[position] + image * features.num_positions
        taps = gather_bilinear(features.table, points, grid.level_shape[position], start)  # (n, K, C)
        weight = self.weight.permute(2, 3, 1, 0).flatten(0, 2)  # (K * C_in, C_out)
        return torch.addmm(self.bias, taps.flatten(1).to(weight.dtype), weight)

    def points(self, deltas: Tensor, grid: Grid, position: Tensor) -> Tensor:
        """Where the taps of n positions lie: (n, K, 2) y and x in cells of the position's level."""
        if self.offsets in ("analytic", "analytic_learned"):
            # A grid that spans the refined box: tap r lies at centre + r × side / (k - 1).
            box = decode(deltas, grid.anchors[position], self.refine_std) / grid.stride[position, None]
            center = (box[:, :2] + box[:, 2:]) / 2 - 0.5
            pitch = (box[:, 2:] - box[:, :2]) / (self.kernel_size - 1)
            points = center.flip(1)[:, None] + self.taps * pitch.flip(1)[:, None]
        else:
            points = grid.cell[position].flip(1)[:, None] + self.taps
        if len(self.micro):
            # torchvision's order of offsets: y and x of one tap after the other.
            points = points + full_precision(self.micro(deltas)).unflatten(1, (-1, 2))
        return points


def gather_bilinear(table: Tensor, points: Tensor, shape: Tensor, start: Tensor) -> Tensor:
    """Read a packed pyramid at fractional points; outside of a level's map there are zeros.

    Works in cells rather than in normalised coordinates, whose rounding moves points across integers where the
    gradient jumps, and in fp32.

    Args:
        table: (T, C), rows of all maps.
        points: (n, K, 2) y and x in cells.
        shape: (n, 2) height and width of the map that each of the n reads.
        start: (n,) index of that map's first row.

    Returns:
        (n, K, C).
    """
    low = points.detach().floor()
    rows, weights = [], []
    for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
        corner = torch.stack([low[..., 0] + dy, low[..., 1] + dx], -1)
        # 1 - |distance| written without abs: its gradient is one-sided at integers, as deform_conv2d's is.
        weight = ((points - low) if dy else (1 - (points - low)))[..., 0] * (
            (points - low) if dx else (1 - (points - low))
        )[..., 1]
        inside = ((corner >= 0) & (corner < shape[:, None])).all(-1)
        # Points that are not a number keep their weight, so that the loss tells, and read any row.
        cell = torch.minimum(corner.nan_to_num().clamp(min=0), (shape[:, None] - 1).to(corner.dtype)).long()
        rows.append(start[:, None] + cell[..., 0] * shape[:, None, 1] + cell[..., 1])
        weights.append(weight * inside)
    if torch.onnx.is_in_onnx_export():  # ONNX has no bags: they would become a loop, one step for each
        corners = [table[row] * weight[..., None] for row, weight in zip(rows, weights, strict=True)]
        return corners[0] + corners[1] + corners[2] + corners[3]
    row, weight = torch.stack(rows, -1), torch.stack(weights, -1)  # (n, K, 4)
    # A weighted bag of four rows: the corners are never laid out in memory.
    gathered = F.embedding_bag(
        row.flatten(0, 1), table.to(weight.dtype), mode="sum", per_sample_weights=weight.flatten(0, 1)
    )
    return gathered.view(*row.shape[:2], table.shape[1])  # not -1: there may be no points
