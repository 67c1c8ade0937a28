"""RoIAlign, also of a map that is not there yet: of its convolution, computed only where the boxes look."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

# A bin of `pool_convolved` takes as long as two to three cells of a dense convolution (measured on a CPU at 256
# channels, forward and backward): it reads 16 cells for each of nine taps.
CELLS_PER_BIN = 3


def pool(
    features: Tensor, rois: Tensor, size: int, scale: float, sampling_ratio: int, conv: nn.Conv2d | None = None
) -> Tensor:
    """RoIAlign (Mask R-CNN's, aligned) of a map, or of what a 3x3 convolution makes of it.

    On a CPU the latter is left to `pool_convolved` where the boxes have few bins for so large a map. On a GPU, where
    that has not been measured, it is dense.

    Args:
        features: (N, C, H, W).
        rois: (n, 5), index of the image and xyxy pixels.
        size: bins per side.
        scale: cells per pixel.
        sampling_ratio: points per side of a bin.
        conv: 3x3, stride 1, padding 1.

    Returns:
        (n, C, size, size).
    """
    if conv is not None:
        num_cells, num_bins = features.numel() // features.shape[1], len(rois) * size**2
        if features.device.type == "cpu" and CELLS_PER_BIN * num_bins < num_cells:
            return pool_convolved(features, rois, size, scale, sampling_ratio, conv)
        features = conv(features)
    pooled: Tensor = roi_align(features, rois, size, scale, sampling_ratio, aligned=True)
    return pooled


def pool_convolved(
    features: Tensor, rois: Tensor, size: int, scale: float, sampling_ratio: int, conv: nn.Conv2d
) -> Tensor:
    """`pool` with a convolution, for boxes inside of the map.

    RoIAlign is a weighted mean of cells and the convolution a weighted sum of shifted maps: pooling the nine shifted
    maps first gives the same, and leaves a matrix product over the bins. For P2 at 800 x 1344 that is 2.8 GMAC, where
    the dense convolution has 39.6: forward and backward took 0.35 s of a CPU, dense 2.0 s.
    """
    num, channels, height, width = features.shape
    image, (x1, y1, x2, y2) = rois[:, 0].long(), (rois[:, 1:].detach() * scale).unbind(1)
    row, by_row = _reads(y1, y2, size, sampling_ratio, height)
    column, by_column = _reads(x1, x2, size, sampling_ratio, width)
    # (n, size, size, 3, 3, reads, reads): each bin and tap reads a patch of cells.
    row, by_row = row[:, :, None, :, None, :, None], by_row[:, :, None, :, None, :, None]
    column, by_column = column[:, None, :, None, :, None, :], by_column[:, None, :, None, :, None, :]
    cell = (image.view(-1, *[1] * 6) * height + row) * width + column
    weight = by_row * by_column
    table = features.permute(0, 2, 3, 1).reshape(num * height * width, channels)
    cell, weight = (x.flatten(5).flatten(0, 4) for x in (cell, weight))
    bags = F.embedding_bag(cell, table.to(weight.dtype), mode="sum", per_sample_weights=weight)
    taps = conv.weight.permute(0, 2, 3, 1).flatten(1)  # (C, 9 * C)
    pooled = F.linear(bags.view(len(rois) * size**2, taps.shape[1]), taps, conv.bias)
    return pooled.view(len(rois), size, size, taps.shape[0]).permute(0, 3, 1, 2)


def _reads(start: Tensor, end: Tensor, size: int, sampling_ratio: int, length: int) -> tuple[Tensor, Tensor]:
    """Cells that the bins of boxes read along one axis of `length` cells, for each tap: index and weight.

    Args:
        start, end: (n,) in cells.

    Returns:
        (n, size, 3, 2 * sampling_ratio) each; outside of the map, where a convolution pads, the weight is 0.
    """
    num = size * sampling_ratio
    steps = (torch.arange(num, dtype=start.dtype, device=start.device) + 0.5) / num
    # From corners to centres of cells; RoIAlign repeats the outermost cells.
    point = (start[:, None] - 0.5 + (end - start)[:, None] * steps).clamp(0, length - 1)
    low = point.floor()
    share = torch.stack([1 - (point - low), point - low], -1) / sampling_ratio
    corner = torch.stack([low, low + 1], -1).long().clamp(max=length - 1)
    corner, share = (x.unflatten(1, (size, sampling_ratio)).flatten(2)[:, :, None] for x in (corner, share))
    tapped = corner + torch.arange(-1, 2, device=start.device)[:, None]
    return tapped.clamp(0, length - 1), share * ((tapped >= 0) & (tapped < length))
