"""Sizes, resizing, cutting and mirroring of images (uint8, C x H x W) and their boxes (xyxy pixels)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from mimicdet.inputs import MIN_SIDE
from mimiclab.data.order import Stream, uniform

Box = tuple[int, int, int, int]
"""xyxy in whole pixels."""


def draw_short(short: int | tuple[int, int], key: int) -> int:
    """The bound of a sample's short side: as given, or drawn evenly from a range, both ends included.

    `key` alone decides; one bound uses none of its numbers.
    """
    if isinstance(short, int):
        return short
    low, high = short
    return low + int(uniform(key, Stream.SHORT) * (high - low + 1))


def resized_size(width: int, height: int, short: int, long: int) -> tuple[int, int]:
    """The size at which an image is trained on, its aspect kept.

    The scale is the largest at which the short side is at most `short` and the long one at most `long`. The
    side that decides meets its bound exactly; the other is rounded to the nearest pixel, halves up.

    Returns:
        (width, height), each at least what a detector takes, even where that is beyond a bound.
    """
    small, large = min(width, height), max(width, height)
    # In integers: a float scale would turn 800 into 799 now and then.
    numerator, denominator = (short, small) if short * large <= long * small else (long, large)

    def scaled(side: int) -> int:
        return max(MIN_SIDE, (2 * side * numerator + denominator) // (2 * denominator))

    return scaled(width), scaled(height)


def padded_size(sizes: Iterable[tuple[int, int]], divisor: int = 32) -> tuple[int, int]:
    """The (H, W) that holds all images of the given (width, height), each a multiple of `divisor`."""
    widths, heights = zip(*sizes, strict=True)
    return -(-max(heights) // divisor) * divisor, -(-max(widths) // divisor) * divisor


def resize(image: Tensor, boxes: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Resize an image (3, H, W) and its boxes (M, 4) to `size` = (width, height), bilinear with antialias."""
    width, height = size
    # torch 2.15 fails where bytes become a single pixel.
    stored = image.float() if width == height == 1 else image
    resized = F.resize(stored, [height, width], antialias=True)
    if stored is not image:
        resized = resized.round().to(image.dtype)
    # Multiplied before divided: a box that ends at the border still ends exactly there.
    scaled = boxes * boxes.new_tensor([width, height, width, height])
    return resized, scaled / boxes.new_tensor([image.shape[2], image.shape[1]] * 2)


def cut(image: Tensor, boxes: Tensor, box: Box) -> tuple[Tensor, Tensor]:
    """Cut `box` out of an image (3, H, W); its boxes (M, 4) may reach over the border then, or lie outside."""
    x1, y1, x2, y2 = box
    if box == (0, 0, image.shape[2], image.shape[1]):
        return image, boxes
    return image[:, y1:y2, x1:x2], boxes - boxes.new_tensor([x1, y1, x1, y1])


def mirror(image: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Flip an image (3, H, W) and its boxes (M, 4) from left to right."""
    x1, y1, x2, y2 = boxes.unbind(1)
    width = image.shape[2]
    return F.horizontal_flip(image), torch.stack([width - x2, y1, width - x1, y2], dim=1)


def clip(boxes: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Clip boxes (M, 4) to an image of `size` = (width, height).

    Returns:
        The clipped boxes (M, 4), and the share (M,) of each box's area that is left: exactly 1 for a box
        inside of the image, 0 for one outside of it.
    """
    bounds = boxes.new_tensor(size).repeat(2)
    clipped = torch.minimum(boxes.clamp(min=0), bounds)
    return clipped, _area(clipped) / _area(boxes)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
