"""Batches in order, read ahead by processes or by threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mimiclab.engine import Batch
from mimiclab.errors import UserError

# Batches that every process or thread has ready ahead of the one that is trained on.
_AHEAD = 2


def load(
    batches: Dataset[Batch], steps: Sequence[int], *, processes: int, threads: int = 1, pin: bool = False
) -> Iterator[Batch]:
    """Items of a data set of batches, in the order of `steps`; they are what `batches[step]` gives.

    Args:
        batches: For instance `TrainBatches`.
        steps: The items that are wanted.
        processes: How many read ahead; 0 reads in this process.
        threads: Without processes: how many threads read ahead where there are more than one. Decoding and
            resizing leave Python's lock to others.
        pin: Give images in page-locked memory, which a GPU copies from while it computes.
    """
    if processes:
        loader = DataLoader(
            _Bundles(batches),
            batch_size=None,
            sampler=steps,
            num_workers=processes,
            prefetch_factor=_AHEAD,
            pin_memory=pin,
        )
        return map(_received, loader)
    loaded = (batches[step] for step in steps) if threads == 1 else _in_threads(batches, steps, threads)
    return map(_pinned, loaded) if pin else loaded


def _in_threads(batches: Dataset[Batch], steps: Sequence[int], threads: int) -> Iterator[Batch]:
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[Future[Batch]] = deque()
        try:
            for step in steps:
                ahead.append(pool.submit(batches.__getitem__, step))
                if len(ahead) > threads * _AHEAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _pinned(batch: Batch) -> Batch:
    return Batch([image.pin_memory() for image in batch.images], batch.targets, batch.pad_to, batch.image_ids)


@dataclass(frozen=True)
class _Bundle:
    """A batch as it travels from a process.

    Every tensor that is sent needs a file and a mapping of its own; sent one by one, the five of each image take
    longer than it takes to decode it. So all pixels go in one, and what is small goes as arrays.
    """

    pixels: Tensor
    """uint8, of all images one behind the other."""
    sizes: list[tuple[int, int]]
    """(H, W) of each image."""
    targets: list[dict[str, npt.NDArray[np.generic]]]
    pad_to: tuple[int, int]
    image_ids: list[int]

    @staticmethod
    def of(batch: Batch) -> _Bundle:
        pixels = [image.reshape(-1) for image in batch.images] or [torch.zeros(0, dtype=torch.uint8)]
        targets = [{name: value.numpy() for name, value in target.items()} for target in batch.targets]
        sizes = [(image.shape[1], image.shape[2]) for image in batch.images]
        return _Bundle(torch.cat(pixels), sizes, targets, batch.pad_to, batch.image_ids)

    def pin_memory(self) -> _Bundle:
        """What torch's DataLoader calls."""
        return _Bundle(self.pixels.pin_memory(), self.sizes, self.targets, self.pad_to, self.image_ids)

    def batch(self) -> Batch:
        parts = self.pixels.split([3 * height * width for height, width in self.sizes])
        images = [part.view(3, *size) for part, size in zip(parts, self.sizes, strict=True)]
        targets = [{name: torch.from_numpy(value) for name, value in target.items()} for target in self.targets]
        return Batch(images, targets, self.pad_to, self.image_ids)


class _Bundles(Dataset[_Bundle | UserError]):
    def __init__(self, batches: Dataset[Batch]) -> None:
        self._batches = batches

    def __getitem__(self, step: int) -> _Bundle | UserError:
        try:
            return _Bundle.of(self._batches[step])
        except UserError as error:  # sent as it is: raised here, DataLoader would bury its message in a traceback
            return error


def _received(bundle: _Bundle | UserError) -> Batch:
    if isinstance(bundle, UserError):
        raise bundle
    return bundle.batch()
