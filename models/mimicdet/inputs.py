"""What a detector accepts, and images as one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mimicdet.interface import Targets

# Mean and deviation of ImageNet's RGB in [0, 1], as torchvision's weights expect.
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
# Batches are padded to a multiple of this, so that P2..P5 divide evenly.
PAD_MULTIPLE = 32
# Sides and area of an image, in pixels. Larger ones are to be resized first: activations grow with the area.
MIN_SIDE, MAX_PIXELS = 2, 8_000_000


def check_images(images: Sequence[Tensor]) -> None:
    """Make sure that a detector can take these images.

    Raises:
        ValueError: there is none, or one of them is not (3, H, W) of a size in the limits, not uint8 or floating,
            or on another device than the first; the message names it by its place in the batch.
    """
    if len(images) == 0:
        raise ValueError("the detector needs at least one image, found an empty list")
    for i, image in enumerate(images):
        shape = tuple(image.shape)
        if image.ndim != 3 or shape[0] != 3:
            raise ValueError(f"image {i}: expected 3 channels as (3, H, W), found {shape}")
        if min(shape[1:]) < MIN_SIDE:
            raise ValueError(f"image {i}: expected sides of {MIN_SIDE} pixels or more, found {shape[1]} x {shape[2]}")
        if shape[1] * shape[2] > MAX_PIXELS:
            raise ValueError(
                f"image {i}: expected at most {MAX_PIXELS / 1e6:g} megapixels, found {shape[1]} x {shape[2]}; "
                "resize it first"
            )
        if image.dtype != torch.uint8 and not image.dtype.is_floating_point:
            raise ValueError(f"image {i}: expected uint8, or floating point in [0, 1], found {image.dtype}")
        if image.device != images[0].device:
            raise ValueError(f"image {i} is on {image.device}, expected {images[0].device} as image 0")


def check_targets(targets: Targets, images: Sequence[Tensor], num_classes: int) -> None:
    """Make sure that a detector of `num_classes` classes can learn from these targets.

    Raises:
        ValueError: there is not one for each image, or one of them lacks a key or holds boxes or labels that mean
            nothing; the message names image and box by their places.
    """
    if len(targets) != len(images):
        raise ValueError(f"every image needs a target, found {len(images)} images, {len(targets)} targets")
    for i, (target, image) in enumerate(zip(targets, images, strict=True)):
        _check_target(target, f"target {i}", int(image.shape[-2]), int(image.shape[-1]), num_classes)


def _check_target(target: Mapping[str, Tensor], name: str, height: int, width: int, num_classes: int) -> None:
    for key in ("boxes", "labels"):
        if key not in target:
            raise ValueError(f"{name}: expected boxes and labels, found {', '.join(target) or 'nothing'}")
    boxes, labels = target["boxes"], target["labels"]
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"{name}: expected boxes (M, 4), found {tuple(boxes.shape)}")
    for key in ("labels", "iscrowd"):
        if key in target and target[key].shape != boxes.shape[:1]:
            raise ValueError(f"{name}: expected {len(boxes)} {key} for as many boxes, found {tuple(target[key].shape)}")
    devices = {key: value.device for key, value in target.items()}
    if len(set(devices.values())) > 1:
        found = ", ".join(f"{key} on {device}" for key, device in devices.items())
        raise ValueError(f"{name}: expected all of it on one device, found {found}")
    x1, y1, x2, y2 = boxes.unbind(1)
    problems = {
        "expected finite numbers": ~boxes.isfinite().all(1),
        "expected x1 < x2 and y1 < y2": (x2 <= x1) | (y2 <= y1),
        f"it lies outside of the image of {height} x {width}": (x2 <= 0) | (y2 <= 0) | (x1 >= width) | (y1 >= height),
    }
    for problem, where in problems.items():
        if where.any():
            index = int(where.nonzero()[0])
            raise ValueError(f"{name}, box {index}: {problem}, found {boxes[index].tolist()}")
    if labels.dtype.is_floating_point or labels.dtype == torch.bool:
        raise ValueError(f"{name}: expected labels of an integer type, found {labels.dtype}")
    wrong = (labels < 0) | (labels >= num_classes)
    if wrong.any():
        index = int(wrong.nonzero()[0])
        raise ValueError(
            f"{name}, box {index}: expected a label from 0 to {num_classes - 1}, found {int(labels[index])}"
        )


def complete(target: Mapping[str, Tensor], like: Tensor) -> dict[str, Tensor]:
    """Fill in what a target may leave out, on the device and in the precision of `like`."""
    full = {name: value.to(like.device) for name, value in target.items()}
    full["boxes"] = full["boxes"].to(like.dtype)
    full["labels"] = full["labels"].long()
    full["iscrowd"] = full.get("iscrowd", torch.zeros_like(full["labels"])).bool()
    if "key" not in full:  # else torch's generator stays as it is
        full["key"] = torch.randint(1 << 62, (), device=like.device)
    return full


def batch_images(images: Sequence[Tensor], pad_to: tuple[int, int] | None, mean: Tensor, std: Tensor) -> Tensor:
    """Normalise images and pad them to one size; padding is zero after normalisation.

    Args:
        images: (3, H, W) each.
        pad_to: (H, W) of the batch; None is the largest sides, rounded up to PAD_MULTIPLE.
        mean, std: (3, 1, 1), of pixels in [0, 1].

    Returns:
        (N, 3, H, W) on the device of `mean`.

    Raises:
        ValueError: `pad_to` is smaller than an image.
    """
    largest = [max(int(image.shape[axis]) for image in images) for axis in (-2, -1)]
    height, width = pad_to or [-(-side // PAD_MULTIPLE) * PAD_MULTIPLE for side in largest]
    if height < largest[0] or width < largest[1]:
        raise ValueError(f"pad_to {(height, width)} is smaller than the largest image, {tuple(largest)}")
    batch = mean.new_zeros(len(images), 3, height, width)
    for row, image in zip(batch, images, strict=True):
        pixels = image.to(mean.device)
        pixels = pixels.to(mean.dtype) / 255 if pixels.dtype == torch.uint8 else pixels
        row[:, : image.shape[-2], : image.shape[-1]] = (pixels - mean) / std
    return batch
