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
# Sides of a box, in pixels: the logarithm of a thinner one's share of an anchor is no longer finite in fp32.
MIN_BOX_SIDE = 1e-6
# What is read of a target; other keys, as torchvision's datasets add them, are left alone.
TARGET_KEYS = ("boxes", "labels", "iscrowd", "key")


def check_images(images: Sequence[Tensor]) -> None:
    """Make sure that a detector can take these images.

    Raises:
        ValueError: there is none, or one of them is not (3, H, W) of a size in the limits, not uint8 or floating,
            or on another device than the first; the message names it by its place in the batch.
    """
    if len(images) == 0:
        raise ValueError("the detector needs at least one image, found an empty list")
    for i, image in enumerate(images):
        if not isinstance(image, Tensor):
            raise ValueError(f"image {i}: expected a tensor, found {type(image).__name__}")
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


def check_targets(targets: Targets, images: Sequence[Tensor], num_classes: int, dtype: torch.dtype) -> None:
    """Make sure that a detector of `num_classes` classes, which computes in `dtype`, can learn from these targets.

    Raises:
        ValueError: there is not one for each image, or one of them lacks a key or holds boxes or labels that mean
            nothing; the message names image and box by their places.
    """
    if len(targets) != len(images):
        raise ValueError(f"every image needs a target, found {len(images)} images, {len(targets)} targets")
    for i, (target, image) in enumerate(zip(targets, images, strict=True)):
        _check_target(target, f"target {i}", image.shape[-2:], num_classes, dtype)


def _check_target(
    target: Mapping[str, Tensor], name: str, size: torch.Size, num_classes: int, dtype: torch.dtype
) -> None:
    height, width = size
    if not isinstance(target, Mapping):
        raise ValueError(f"{name}: expected boxes and labels by name, found {type(target).__name__}")
    for key in ("boxes", "labels"):
        if key not in target:
            raise ValueError(f"{name}: expected boxes and labels, found {', '.join(target) or 'nothing'}")
    known = {key: target[key] for key in TARGET_KEYS if key in target}
    for key, value in known.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name}: expected {key} as a tensor, found {type(value).__name__}")
    boxes, labels = known["boxes"], known["labels"]
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"{name}: expected boxes (M, 4), found {tuple(boxes.shape)}")
    for key in ("labels", "iscrowd"):
        if key in known and known[key].shape != boxes.shape[:1]:
            raise ValueError(f"{name}: expected {len(boxes)} {key} for as many boxes, found {tuple(known[key].shape)}")
    if "key" in known and (known["key"].ndim or not _is_integer(known["key"])):
        found = f"{known['key'].dtype} of shape {tuple(known['key'].shape)}"
        raise ValueError(f"{name}: expected key as an integer scalar, found {found}")
    devices = {key: value.device for key, value in known.items()}
    if len(set(devices.values())) > 1:
        found = ", ".join(f"{key} on {device}" for key, device in devices.items())
        raise ValueError(f"{name}: expected all of it on one device, found {found}")
    if boxes.is_complex() or labels.is_complex():
        raise ValueError(f"{name}: expected real numbers, found {boxes.dtype} boxes and {labels.dtype} labels")
    # As the losses will see them: what is thin or large in fp64 may have no width, or no end, in fp32.
    x1, y1, x2, y2 = boxes.to(dtype).unbind(1)
    problems = {
        "expected finite numbers": ~boxes.to(dtype).isfinite().all(1),
        "expected x1 < x2 and y1 < y2": (x2 - x1 < MIN_BOX_SIDE) | (y2 - y1 < MIN_BOX_SIDE),
        f"it lies outside of the image of {height} x {width}": (x2 <= 0) | (y2 <= 0) | (x1 >= width) | (y1 >= height),
    }
    for problem, where in problems.items():
        if where.any():
            index = int(where.nonzero()[0])
            raise ValueError(f"{name}, box {index}: {problem}, found {boxes[index].tolist()}")
    if not _is_integer(labels):
        raise ValueError(f"{name}: expected labels of an integer type, found {labels.dtype}")
    wrong = (labels < 0) | (labels >= num_classes)
    if wrong.any():
        index = int(wrong.nonzero()[0])
        raise ValueError(
            f"{name}, box {index}: expected a label from 0 to {num_classes - 1}, found {int(labels[index])}"
        )


def _is_integer(values: Tensor) -> bool:
    return not (values.dtype.is_floating_point or values.dtype.is_complex or values.dtype == torch.bool)


def complete(target: Mapping[str, Tensor], like: Tensor) -> dict[str, Tensor]:
    """Fill in what a target may leave out, on the device and in the precision of `like`."""
    full = {name: target[name].to(like.device) for name in TARGET_KEYS if name in target}
    full["boxes"] = full["boxes"].to(like.dtype)
    full["labels"] = full["labels"].long()
    full["iscrowd"] = full.get("iscrowd", torch.zeros_like(full["labels"])).bool()
    # Where there is a key, torch's generator stays as it is.
    full["key"] = full["key"].long() if "key" in full else torch.randint(1 << 62, (), device=like.device)
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
    if mean.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"the detector's weights are {mean.dtype}, expected fp32 (or fp64); use autocast for speed")
    largest = [max(int(image.shape[axis]) for image in images) for axis in (-2, -1)]
    height, width = pad_to or [-(-side // PAD_MULTIPLE) * PAD_MULTIPLE for side in largest]
    if height < largest[0] or width < largest[1]:
        raise ValueError(f"pad_to {(height, width)} is smaller than the largest image, {tuple(largest)}")
    # Channels last, which convolutions keep up: on a CPU they are a sixth faster so, forward.
    batch = mean.new_zeros(len(images), 3, height, width).contiguous(memory_format=torch.channels_last)
    for row, image in zip(batch, images, strict=True):
        pixels = image.to(mean.device)
        pixels = pixels.to(mean.dtype) / 255 if pixels.dtype == torch.uint8 else pixels
        row[:, : image.shape[-2], : image.shape[-1]] = (pixels - mean) / std
    return batch
