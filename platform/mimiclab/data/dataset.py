"""Batches for training, addressed by global step, and for evaluation, every image once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from mimiclab.data.coco import CocoDataset, ImageRecord
from mimiclab.data.order import Order, rank_slice, sample_key
from mimiclab.data.transforms import augment, draw_short, padded_size, resize, resized_size
from mimiclab.engine import Batch
from mimiclab.errors import UserError


def read_image(path: Path) -> Tensor:
    """Decode an image file to RGB: uint8 (3, H, W), in its stored orientation, as COCO's boxes are.

    Raises:
        UserError: The file cannot be read or decoded.
    """
    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))
    # What Pillow raises for a damaged file depends on its format.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read as an image: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def check_images(dataset: CocoDataset) -> None:
    """Decode every image, in threads.

    Raises:
        UserError: one cannot be decoded, or is not of its stored size.
    """
    with ThreadPoolExecutor() as threads:
        for _ in threads.map(_read_record, dataset.images):
            pass


def scale_boxes(boxes: Tensor, record: ImageRecord, size: tuple[int, int]) -> Tensor:
    """Take boxes (D, 4) from an image resized to `size` = (width, height) back to the record's own pixels."""
    original = boxes.new_tensor([record.width, record.height]).repeat(2)
    return boxes * original / boxes.new_tensor(size).repeat(2)


class TrainBatches(Dataset[Batch]):
    """Item n is this rank's part of global step n.

    It is the same whatever was loaded before, so it goes into
    `DataLoader(batches, batch_size=None, sampler=range(start, stop), num_workers=k)` for any start.

    Args:
        dataset: The training set.
        order: Which images make up a step.
        short: Bound of the short side after resizing, pixels; of a pair (lowest, highest) each sample draws its own.
        long: Bound of the long side after resizing, pixels.
        flip: Probability of a horizontal flip.
        rank: This worker's rank.
        world: Number of workers.
    """

    def __init__(
        self,
        dataset: CocoDataset,
        order: Order,
        *,
        short: int | tuple[int, int],
        long: int,
        flip: float,
        rank: int,
        world: int,
    ) -> None:
        if order.num_images != len(dataset.images):
            raise ValueError(f"the order is of {order.num_images} images, the data set has {len(dataset.images)}")
        self.dataset = dataset
        self.order = order
        self.short = short
        self.long = long
        self.flip = flip
        self.rank = rank
        self.world = world

    def __getitem__(self, step: int) -> Batch:
        slots = self.order.slots(step)
        records = [self.dataset.images[slot.index] for slot in slots]
        # Padding shows in the activations at the border and in normalisation: all ranks pad alike, to what
        # the whole global batch needs, which stored sizes and keys tell without reading the others' images.
        sizes = [
            resized_size(record.width, record.height, draw_short(self.short, slot.key), self.long)
            for slot, record in zip(slots, records, strict=True)
        ]
        images, targets, image_ids = [], [], []
        mine = rank_slice(self.order.global_batch, self.rank, self.world)
        for slot, record, size in zip(slots[mine], records[mine], sizes[mine], strict=True):
            image, target = _load(record, size, slot.key)
            image, target["boxes"] = augment(image, target["boxes"], slot.key, self.flip)
            images.append(image)
            targets.append(target)
            image_ids.append(record.id)
        return Batch(images, targets, padded_size(sizes), image_ids)


class EvalBatches(Dataset[Batch]):
    """Item i is this rank's i-th batch of unaugmented images; over all ranks every image is there once.

    Batches are cut from the whole data set and then dealt out, so that what an image is padded to does not
    depend on the number of workers. Ranks may have different numbers of batches.

    Args:
        dataset: The set to evaluate on.
        short: Bound of the short side after resizing, pixels.
        long: Bound of the long side after resizing, pixels.
        batch_size: Images in a batch; the last one may have fewer.
        rank: This worker's rank.
        world: Number of workers.
    """

    def __init__(
        self, dataset: CocoDataset, *, short: int, long: int, batch_size: int, rank: int = 0, world: int = 1
    ) -> None:
        self.dataset = dataset
        self.short = short
        self.long = long
        self.batch_size = batch_size
        self._starts = range(rank * batch_size, len(dataset.images), world * batch_size)

    def __len__(self) -> int:
        return len(self._starts)

    def records(self, item: int) -> tuple[ImageRecord, ...]:
        """The images of a batch, in order."""
        start = self._starts[item]
        return self.dataset.images[start : start + self.batch_size]

    def __getitem__(self, item: int) -> Batch:
        records = self.records(item)
        sizes = [resized_size(record.width, record.height, self.short, self.long) for record in records]
        first = self._starts[item]
        # A loss that samples draws the same for an image in every evaluation.
        loaded = [
            _load(record, size, sample_key(0, 0, first + position))
            for position, (record, size) in enumerate(zip(records, sizes, strict=True))
        ]
        images = [image for image, _ in loaded]
        targets = [target for _, target in loaded]
        return Batch(images, targets, padded_size(sizes), [record.id for record in records])


def _read_record(record: ImageRecord) -> Tensor:
    image = read_image(record.path)
    height, width = image.shape[1:]
    if (width, height) != (record.width, record.height):
        raise UserError(
            f"{record.path}: the image is {width} x {height}, its annotation file says {record.width} x {record.height}"
        )
    return image


def _load(record: ImageRecord, size: tuple[int, int], key: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Read and resize one image; its target, with boxes in the resized image's pixels."""
    image = _read_record(record)
    image, boxes = resize(image, torch.tensor(record.boxes), size)
    target = {
        "boxes": boxes,
        "labels": torch.tensor(record.labels),
        "iscrowd": torch.tensor(record.iscrowd),
        "key": torch.tensor(key, dtype=torch.int64),
    }
    return image, target
