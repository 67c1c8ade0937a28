"""Sizes, resizing and augmentation of images (uint8, C x H x W) and their boxes (xyxy pixels)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from mimiclab.data.order import FLIP, SHORT, uniform


def draw_short(short: int | tuple[int, int], key: int) -> int:
    """The bound of a sample's short side: as given, or drawn evenly from a range, both ends included.

    `key` alone decides; one bound uses none of its numbers.
    """
    if isinstance(short, int):
        return short
    low, high = short
    return low + int(uniform(key, SHORT) * (high - low + 1))


def resized_size(width: int, height: int, short: int, long: int) -> tuple[int, int]:
    """The size at which an image is trained on, its aspect kept.

    The scale is the largest at which the short side is at most `short` and the long one at most `long`. The
    side that decides meets its bound exactly; the other is rounded to the nearest pixel, halves up.

    Returns:
        (width, height), each at least 1.
    """
    small, large = min(width, height), max(width, height)
    # In integers: a float scale would turn 800 into 799 now and then.
    numerator, denominator = (short, small) if short * large <= long * small else (long, large)

    def scaled(side: int) -> int:
        return max(1, (2 * side * numerator + denominator) // (2 * denominator))

    return scaled(width), scaled(height)


def padded_size(sizes: Iterable[tuple[int, int]], divisor: int = 32) -> tuple[int, int]:
    """The (H, W) that holds all images of the given (width, height), each a multiple of `divisor`."""
    widths, heights = zip(*sizes, strict=True)
    return -(-max(heights) // divisor) * divisor, -(-max(widths) // divisor) * divisor


def resize(image: Tensor, boxes: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Resize an image (3, H, W) and its boxes (M, 4) to `size` = (width, height), bilinear with antialias."""
    width, height = size
    resized = F.resize(image, [height, width], antialias=True)
    # Multiplied before divided: a box that ends at the border still ends exactly there.
    scaled = boxes * boxes.new_tensor([width, height, width, height])
    return resized, scaled / boxes.new_tensor([image.shape[2], image.shape[1]]).repeat(2)


def augment(image: Tensor, boxes: Tensor, key: int, flip: float = 0.5) -> tuple[Tensor, Tensor]:
    """Mirror an image (3, H, W) and its boxes (M, 4) with probability `flip`; `key` alone decides."""
    if uniform(key, FLIP) >= flip:
        return image, boxes
    x1, y1, x2, y2 = boxes.unbind(1)
    width = image.shape[2]
    return F.horizontal_flip(image), torch.stack([width - x2, y1, width - x1, y2], dim=1)
