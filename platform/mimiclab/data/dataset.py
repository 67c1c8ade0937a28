"""Batches for training, addressed by global step, and for evaluation, every image once."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mimiclab.data.augment import Augmentation, Plan, carry_out
from mimiclab.data.coco import CocoDataset
from mimiclab.data.columns import ImageRecord
from mimiclab.data.images import check_size, decode
from mimiclab.data.order import Order, Slot, rank_slice, sample_key, training_order
from mimiclab.data.transforms import padded_size, resize, resized_size
from mimiclab.engine import Batch
from mimiclab.errors import UserError
from mimiclab.schema import AugmentConfig, Experiment


def read_image(path: Path) -> Tensor:
    """Decode an image file to RGB: uint8 (3, H, W), in its stored orientation, as COCO's boxes are.

    Raises:
        UserError: The file cannot be read or decoded.
    """
    try:
        encoded = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read as an image: {error.strerror}") from error
    return _as_tensor(decode(encoded, str(path)))


def check_images(dataset: CocoDataset) -> None:
    """Decode every image, in threads.

    Raises:
        UserError: one cannot be decoded, or is not of its stored size.
    """

    def check(record: ImageRecord) -> None:  # gives nothing back: what is decoded would wait for its turn in memory
        read_record(record)

    with ThreadPoolExecutor() as threads:
        for _ in threads.map(check, dataset.images):
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
        augment: What else is done to images; None is nothing.
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
        augment: AugmentConfig | None = None,
    ) -> None:
        if order.num_images != len(dataset.images):
            raise ValueError(f"the order is of {order.num_images} images, the data set has {len(dataset.images)}")
        self.dataset = dataset
        self.order = order
        self.augmentation = Augmentation(short, long, flip, augment or AugmentConfig())
        self.rank = rank
        self.world = world

    def plans(self, step: int) -> list[Plan]:
        """What the whole global batch of `step` is made of, in order; no image is read for it."""
        return self._plans(self.order.slots(step))

    def _plans(self, slots: Sequence[Slot]) -> list[Plan]:
        return [self.augmentation.plan(self.order, slot, self._stored_size) for slot in slots]

    def __getitem__(self, step: int) -> Batch:
        slots = self.order.slots(step)
        plans = self._plans(slots)
        images, targets, image_ids = [], [], []
        mine = rank_slice(self.order.global_batch, self.rank, self.world)
        for slot, plan in zip(slots[mine], plans[mine], strict=True):
            image, target = carry_out(plan, self._read, self.augmentation.config.min_visible)
            images.append(image)
            targets.append({**target, "key": torch.tensor(slot.key, dtype=torch.int64)})
            image_ids.append(self.dataset.images[slot.index].id)
        # Padding shows in the activations at the border and in normalisation: all ranks pad alike, to what
        # the whole global batch needs, which plans tell without reading the others' images.
        return Batch(images, targets, padded_size([plan.size for plan in plans]), image_ids)

    def _stored_size(self, index: int) -> tuple[int, int]:
        columns = self.dataset.columns
        return int(columns.widths[index]), int(columns.heights[index])

    def _read(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        record = self.dataset.images[index]
        target = {
            "boxes": torch.tensor(record.boxes),
            "labels": torch.tensor(record.labels),
            "iscrowd": torch.tensor(record.iscrowd),
        }
        return read_record(record), target


def training_batches(dataset: CocoDataset, experiment: Experiment, *, rank: int = 0, world: int = 1) -> TrainBatches:
    """A rank's part of what an experiment shows of its training set."""
    data = experiment.data
    return TrainBatches(
        dataset,
        training_order(dataset, experiment),
        short=data.resize.train_short or data.resize.short,
        long=data.resize.long,
        flip=data.flip,
        rank=rank,
        world=world,
        augment=data.augment,
    )


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


def read_record(record: ImageRecord) -> Tensor:
    """Decode a data set's image to RGB: uint8 (3, H, W), in its stored orientation.

    Raises:
        UserError: It cannot be read or decoded, or is not of its stored size.
    """
    pixels = decode(record.encoded(), record.where)
    height, width, _ = pixels.shape
    check_size(width, height, (record.width, record.height), record.where)
    return _as_tensor(pixels)


def _as_tensor(pixels: npt.NDArray[np.uint8]) -> Tensor:
    # Left as it lies in memory, three bytes a pixel: resizing takes it so, and copies what it gives anyway.
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _load(record: ImageRecord, size: tuple[int, int], key: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Read and resize one image; its target, with boxes in the resized image's pixels."""
    image = read_record(record)
    image, boxes = resize(image, torch.tensor(record.boxes), size)
    target = {
        "boxes": boxes,
        "labels": torch.tensor(record.labels),
        "iscrowd": torch.tensor(record.iscrowd),
        "key": torch.tensor(key, dtype=torch.int64),
    }
    return image, target
