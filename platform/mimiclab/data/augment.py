"""What becomes of a training image: planned from stored sizes and the sample's key, then done to the pixels.

A plan says all there is to say, the final size too, before any image is read: so every rank knows what the
whole global batch is padded to. Carrying one out draws nothing.

Random numbers are counter-based draws from the sample's key, and the functional forms of torchvision's
transforms take them. Its transform classes draw from torch's global generator: that would have to be forked
and seeded for every image, and how much they draw, in which order, is not theirs to promise between versions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from mimicdet.inputs import MIN_BOX_SIDE, MIN_SIDE
from mimiclab.data.order import Order, Slot, Stream, tile_key, uniform
from mimiclab.data.transforms import Box, clip, cut, draw_short, mirror, resize, resized_size
from mimiclab.schema import AugmentConfig, ColorJitter

Size = tuple[int, int]
"""(width, height) in pixels."""


class Color(NamedTuple):
    """Factors of brightness, contrast and saturation; the shift of the hue in turns."""

    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0


@dataclass(frozen=True)
class Tile:
    """What is shown of one image.

    Attributes:
        index: The image's index in the data set.
        crop: The part of the stored image that is used.
        size: What that is resized to.
        window: The part of the resized image that is shown.
        flip: Whether that is mirrored.
        at: (x, y) of its upper left corner in the sample.
    """

    index: int
    crop: Box
    size: Size
    window: Box
    flip: bool
    at: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Plan:
    """A training sample: one tile as large as the sample, or four that fill it without overlap."""

    size: Size
    tiles: tuple[Tile, ...]
    color: Color


@dataclass(frozen=True)
class Augmentation:
    """How samples are planned.

    Attributes:
        short: Bound of the short side after resizing, pixels; of a pair (lowest, highest) each sample draws its own.
        long: Bound of the long side after resizing, pixels.
        flip: Probability of a horizontal flip.
        config: The rest.
    """

    short: int | tuple[int, int]
    long: int
    flip: float
    config: AugmentConfig

    def plan(self, order: Order, slot: Slot, stored: Callable[[int], Size]) -> Plan:
        """Decide everything about a sample; `stored` gives the stored size of the image at an index."""
        color = _draw_color(self.config.color, slot.key)
        # What is switched off draws nothing: every rank plans the whole global batch.
        if self.config.mosaic and uniform(slot.key, Stream.MOSAIC) < self.config.mosaic:
            whole = resized_size(*stored(slot.index), draw_short(self.short, slot.key), self.long)
            return Plan(whole, self._mosaic(order, slot, whole, stored), color)
        tile = self._single(slot, stored(slot.index))
        x1, y1, x2, y2 = tile.window
        return Plan((x2 - x1, y2 - y1), (tile,), color)

    def _single(self, slot: Slot, stored: Size) -> Tile:
        key = slot.key
        crop = self._draw_crop(stored, key)
        target = resized_size(crop[2] - crop[0], crop[3] - crop[1], draw_short(self.short, key), self.long)
        size = target
        if self.config.scale:
            low, high = self.config.scale
            factor = low + uniform(key, Stream.SCALE) * (high - low)
            size = (max(MIN_SIDE, _scaled(target[0], factor)), max(MIN_SIDE, _scaled(target[1], factor)))
        shown = (min(size[0], target[0]), min(size[1], target[1]))
        window = (0, 0, *shown)
        if shown != size:
            window = _place(shown, size, uniform(key, Stream.WINDOW_LEFT), uniform(key, Stream.WINDOW_TOP))
        return Tile(slot.index, crop, size, window, self._draw_flip(key))

    def _mosaic(self, order: Order, slot: Slot, size: Size, stored: Callable[[int], Size]) -> tuple[Tile, ...]:
        """Four images around a drawn centre (Bochkovskiy, Wang and Liao, YOLOv4, arXiv 2004.10934).

        The sample's own image is the first of them. Of each, as much is shown as has its quarter's aspect.
        """
        width, height = size
        x, y = (
            min(max(int(side * (0.25 + 0.5 * uniform(slot.key, stream))), 1), side - 1)
            for side, stream in ((width, Stream.CENTRE_X), (height, Stream.CENTRE_Y))
        )
        tiles = []
        for number, (x1, y1, x2, y2) in enumerate(
            ((0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height))
        ):
            key = tile_key(slot.key, number)
            index = order.companion(slot, uniform(key, Stream.COMPANION)) if number else slot.index
            quarter = (x2 - x1, y2 - y1)
            left, top, right, bottom = self._draw_crop(stored(index), key)
            fitting = _of_aspect(quarter, (right - left, bottom - top))
            part = _place(
                fitting,
                (right - left, bottom - top),
                uniform(key, Stream.WINDOW_LEFT),
                uniform(key, Stream.WINDOW_TOP),
            )
            crop = (left + part[0], top + part[1], left + part[2], top + part[3])
            tiles.append(Tile(index, crop, quarter, (0, 0, *quarter), self._draw_flip(key), (x1, y1)))
        return tuple(tiles)

    def _draw_crop(self, stored: Size, key: int) -> Box:
        if not self.config.crop:
            return (0, 0, *stored)
        low, high = self.config.crop
        size = (
            _scaled(stored[0], low + uniform(key, Stream.CROP_WIDTH) * (high - low)),
            _scaled(stored[1], low + uniform(key, Stream.CROP_HEIGHT) * (high - low)),
        )
        return _place(size, stored, uniform(key, Stream.CROP_LEFT), uniform(key, Stream.CROP_TOP))

    def _draw_flip(self, key: int) -> bool:
        return uniform(key, Stream.FLIP) < self.flip


def _scaled(side: int, factor: float) -> int:
    """A side times a factor to the nearest pixel, halves up, at least 1."""
    return max(1, int(side * factor + 0.5))


def _place(size: Size, within: Size, x: float, y: float) -> Box:
    """A box of a size at a place in a larger one that `x` and `y` in [0, 1) draw, all places alike."""
    left, top = int(x * (within[0] - size[0] + 1)), int(y * (within[1] - size[1] + 1))
    return left, top, left + size[0], top + size[1]


def _of_aspect(aspect: Size, within: Size) -> Size:
    """The largest size of an aspect in another one, to the nearest pixel."""
    (across, down), (width, height) = aspect, within
    if width * down > height * across:
        return max(1, (2 * height * across + down) // (2 * down)), height
    return width, max(1, (2 * width * down + across) // (2 * across))


def _draw_color(config: ColorJitter, key: int) -> Color:
    def draw(reach: float, stream: Stream) -> float:
        return (2 * uniform(key, stream) - 1) * reach if reach else 0.0

    return Color(
        1 + draw(config.brightness, Stream.BRIGHTNESS),
        1 + draw(config.contrast, Stream.CONTRAST),
        1 + draw(config.saturation, Stream.SATURATION),
        draw(config.hue, Stream.HUE),
    )


def carry_out(
    plan: Plan, read: Callable[[int], tuple[Tensor, dict[str, Tensor]]], min_visible: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Make a sample.

    Args:
        plan: What to make.
        read: Gives the stored image (3, H, W) at an index, uint8, and its target: boxes (M, 4) float32 xyxy
            pixels of that image, labels (M,) and iscrowd (M,) bool.
        min_visible: See `show`.

    Returns:
        The image (3, height, width), uint8, and the target of what is to be seen, in its pixels: no box is too
        thin for a detector, nor any storage larger than what it holds.
    """
    parts = [show(tile, *read(tile.index), min_visible) for tile in plan.tiles]
    if len(parts) == 1:
        image, target = parts[0]
    else:
        width, height = plan.size
        image = torch.empty(3, height, width, dtype=torch.uint8)
        for tile, (part, of_part) in zip(plan.tiles, parts, strict=True):
            x, y = tile.at
            image[:, y : y + part.shape[1], x : x + part.shape[2]] = part
            of_part["boxes"] = of_part["boxes"] + of_part["boxes"].new_tensor([x, y, x, y])
        target = {name: torch.cat([of_part[name] for _, of_part in parts]) for name in parts[0][1]}
    # Last of all: each of the steps rounds what it moves.
    thick = (target["boxes"][:, 2:] - target["boxes"][:, :2] >= MIN_BOX_SIDE).all(1)
    if not thick.all():
        target = {name: values[thick] for name, values in target.items()}
    return recolor(image, plan.color), target


def show(tile: Tile, image: Tensor, target: dict[str, Tensor], min_visible: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Cut, resize and mirror an image and its target.

    Where something was cut off, boxes are clipped. An object is dropped when a share below `min_visible` of
    its box is left, or nothing; a crowd region when nothing is left.
    """
    entire = (0, 0, image.shape[2], image.shape[1])
    image, boxes = cut(image, target["boxes"], tile.crop)
    image, boxes = resize(image, boxes, tile.size)
    image, boxes = cut(image, boxes, tile.window)
    if image.untyped_storage().nbytes() > image.numel():  # a part of an image would keep all of it in memory
        image = image.contiguous()
    if tile.flip:
        image, boxes = mirror(image, boxes)
    if tile.crop == entire and tile.window == (0, 0, *tile.size):
        return image, {**target, "boxes": boxes}
    boxes, share = clip(boxes, (image.shape[2], image.shape[1]))
    kept = (boxes[:, 2:] > boxes[:, :2]).all(1) & ((share >= min_visible) | target["iscrowd"])
    return image, {name: values[kept] for name, values in {**target, "boxes": boxes}.items()}


def recolor(image: Tensor, color: Color) -> Tensor:
    """Change brightness, contrast, saturation and hue of a uint8 image (3, H, W), in this order."""
    if color.brightness != 1:
        image = F.adjust_brightness(image, color.brightness)
    if color.contrast != 1:
        image = _adjust_contrast(image, color.contrast)
    if color.saturation != 1:
        image = F.adjust_saturation(image, color.saturation)
    if color.hue != 0:
        image = F.adjust_hue(image, color.hue)
    return image


def _adjust_contrast(image: Tensor, factor: float) -> Tensor:
    # torchvision's takes the mean in floating point, whose last bits depend on the number of threads.
    gray = F.rgb_to_grayscale(image)
    mean = int(gray.sum(dtype=torch.int64)) / gray.numel()
    return image.float().mul_(factor).add_((1 - factor) * mean).clamp_(0, 255).to(torch.uint8)
