"""Which images make up a global step, and the random key of each: a pure function of (seed, step, slot).

Nothing here has a state that a restart could lose, and nothing knows how many workers there are. A
worker asks for the whole global batch and takes its slice of it.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from math import fsum
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from mimiclab.data.coco import CocoDataset
    from mimiclab.schema import Experiment

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


class Stream(IntEnum):
    """Streams of a sample's random numbers: one per use, so that adding a use changes no other draw."""

    FLIP = 1
    SHORT = 2
    CROP_WIDTH = 3
    CROP_HEIGHT = 4
    CROP_LEFT = 5
    CROP_TOP = 6
    SCALE = 7
    WINDOW_LEFT = 8
    WINDOW_TOP = 9
    BRIGHTNESS = 10
    CONTRAST = 11
    SATURATION = 12
    HUE = 13
    MOSAIC = 14
    CENTRE_X = 15
    CENTRE_Y = 16
    TILE = 17
    COMPANION = 18


# Streams of an epoch's random numbers, likewise.
_SAMPLES, _BLOCKS, _REPEATS = range(3)


def _mix(value: int) -> int:
    """The finaliser of splitmix64: a bijection of 64-bit integers in which every bit reaches every other."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _hash(*values: int) -> int:
    state = 0
    for value in values:
        state = _mix((state + _GOLDEN + _mix((value + _GOLDEN) & _MASK)) & _MASK)
    return state


def sample_key(seed: int, step: int, slot: int) -> int:
    """The key that everything random about one sample is drawn from.

    Args:
        seed: The run's seed.
        step: Global step, from 0.
        slot: Place in the global batch, from 0.

    Returns:
        An integer in [0, 2**63), so that it fits a signed 64-bit tensor.
    """
    return _hash(seed, step, slot) >> 1


def tile_key(key: int, tile: int) -> int:
    """The key of one of the images that a sample with `key` is put together from."""
    return _hash(key, Stream.TILE, tile) >> 1


def uniform(key: int, stream: int) -> float:
    """A number in [0, 1) for one use (`stream`) of a sample's key."""
    return (_hash(key, stream) >> 11) * 2.0**-53


def _bits(seed: int, epoch: int, stream: int, num: int) -> npt.NDArray[np.uint64]:
    """Random 64-bit integers (num,) for one use of an epoch."""
    # NumPy guarantees the raw output of its bit generators from version to version, but not that of
    # Generator.permutation; hence a sort by them.
    return np.random.Philox(key=[seed & _MASK, epoch], counter=[0, 0, 0, stream]).random_raw(num)


@dataclass(frozen=True)
class Slot:
    """One place of a global batch.

    Attributes:
        index: The image's index in the data set.
        epoch: From 0.
        position: Place in the epoch, from 0.
        key: What everything random about the sample is drawn from.
    """

    index: int
    epoch: int
    position: int
    key: int


@dataclass(frozen=True, eq=False)
class Order:
    """The endless sequence of training samples.

    Every epoch is one permutation of all images. Epochs run on into each other: a batch may hold the end
    of one and the start of the next, and no image is dropped. Three options change how an epoch is made:

    * `block`: packed images lie in shards, and a full permutation jumps to another one with every image. Blocks
      of `block` consecutive images are permuted instead, and images only within each window of `window`
      blocks that follow each other then: at any time that many blocks are being read. An image's place in the
      epoch is as random as before; what is less random is which images come close to it: those of its own
      block are fewer than `window` * `block` samples away in every epoch (before the other options), and
      about num_images / (`window` * `block`) times as likely to share its batch as in a full permutation.
    * `portrait`: full batches of an epoch show only images that are taller than wide, or only others. A batch
      is formed when its last image comes up in the shuffled sequence, so that fewer than 2 * `global_batch`
      images wait for company at any time. Mixed are the batches that hold the end of one epoch and the start
      of the next, and at most one more at an epoch's end, of what is left of both kinds. Every image is still
      there once per epoch.
    * `repeats`: an image is shown as often per epoch as its factor says; the fraction is drawn anew for each
      epoch and image. The lengths of epochs differ a little then.

    Attributes:
        num_images: Size of the data set.
        global_batch: Images per step over all workers.
        seed: The run's seed.
        block: Consecutive images that are read together; None is a full permutation.
        window: Blocks that are mixed with each other.
        portrait: (num_images,) bool, which images are taller than wide; None groups nothing.
        repeats: (num_images,) float64, 1 or more; None shows every image once.
    """

    num_images: int
    global_batch: int
    seed: int
    block: int | None = None
    window: int = 8
    portrait: npt.NDArray[np.bool_] | None = None
    repeats: npt.NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        for name in ("num_images", "global_batch", "block", "window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} of an order must be 1 or more, found {value}")
        for name in ("portrait", "repeats"):
            array = getattr(self, name)
            if array is not None and array.shape != (self.num_images,):
                raise ValueError(
                    f"{name} of an order must have a value for each of {self.num_images} images, found {array.shape}"
                )
        if self.repeats is not None and not (np.isfinite(self.repeats) & (self.repeats >= 1)).all():
            raise ValueError(f"repeats of an order must be finite and 1 or more, found {self.repeats}")

    def slots(self, step: int) -> list[Slot]:
        """The whole global batch of `step` (from 0), in order."""
        result = []
        for slot in range(self.global_batch):
            epoch, position = self._locate(step * self.global_batch + slot)
            index = int(_epoch(self, epoch)[position])
            result.append(Slot(index, epoch, position, sample_key(self.seed, step, slot)))
        return result

    def companion(self, slot: Slot, draw: float) -> int:
        """The index of another sample of the slot's epoch, for a `draw` in [0, 1); it may be the slot's own.

        Any of the epoch; with `block`, one of the `window` * `block` places around the slot, whose blocks are
        being read anyway.
        """
        samples = _epoch(self, slot.epoch)
        reach = len(samples) if self.block is None else min(len(samples), self.window * self.block)
        first = min(max(slot.position - reach // 2, 0), len(samples) - reach)
        return int(samples[first + int(draw * reach)])

    @property
    def steps_per_epoch(self) -> float:
        """Steps that an epoch takes; with `repeats`, on average over all seeds."""
        num_samples = self.num_images if self.repeats is None else fsum(self.repeats)
        return num_samples / self.global_batch

    def num_steps(self, epochs: int) -> int:
        """Steps after which `epochs` epochs were shown whole."""
        return -(-self._start(epochs) // self.global_batch)

    def epoch_end_step(self, epoch: int) -> int:
        """Number of steps done when epoch `epoch` (from 1) is complete."""
        return self.num_steps(epoch)

    def _start(self, epoch: int) -> int:
        """Samples before an epoch (from 0)."""
        if self.repeats is None:
            return epoch * self.num_images
        return _starts(self, 1 << epoch.bit_length())[epoch]

    def _locate(self, sample: int) -> tuple[int, int]:
        """Epoch and place in it of a sample of the endless sequence."""
        if self.repeats is None:
            return divmod(sample, self.num_images)
        num_epochs = 16
        while (starts := _starts(self, num_epochs))[-1] <= sample:
            num_epochs *= 2
        epoch = bisect_right(starts, sample) - 1
        return epoch, sample - starts[epoch]


def _times(order: Order, epoch: int) -> npt.NDArray[np.int64]:
    """How often an epoch shows each image, (num_images,)."""
    assert order.repeats is not None
    whole = np.floor(order.repeats)
    draws = (_bits(order.seed, epoch, _REPEATS, order.num_images) >> np.uint64(11)) * 2.0**-53
    times: npt.NDArray[np.int64] = (whole + (draws < order.repeats - whole)).astype(np.int64)
    return times


@lru_cache(maxsize=8)
def _starts(order: Order, num_epochs: int) -> tuple[int, ...]:
    """Samples before each of the first `num_epochs` epochs and before the one that follows them."""
    lengths = [int(_times(order, epoch).sum()) for epoch in range(num_epochs)]
    return (0, *np.cumsum(lengths).tolist())


@lru_cache(maxsize=4)  # a batch looks at one epoch, at most at a few that follow each other
def _epoch(order: Order, epoch: int) -> npt.NDArray[np.int64]:
    """The samples of an epoch, as indices of images."""
    samples = np.arange(order.num_images)
    if order.repeats is not None:
        samples = np.repeat(samples, _times(order, epoch))
    bits = _bits(order.seed, epoch, _SAMPLES, len(samples))
    if order.block is None:
        samples = samples[np.argsort(bits, kind="stable")]
    else:
        num_blocks = -(-order.num_images // order.block)
        place = np.argsort(np.argsort(_bits(order.seed, epoch, _BLOCKS, num_blocks), kind="stable"))
        samples = samples[np.lexsort((bits, place[samples // order.block] // order.window))]
    if order.portrait is not None:
        # What completes the batch that the epoch before has begun.
        head = -order._start(epoch) % order.global_batch
        samples[head:] = _grouped(samples[head:], order.portrait, order.global_batch)
    return samples


def _grouped(samples: npt.NDArray[np.int64], portrait: npt.NDArray[np.bool_], size: int) -> npt.NDArray[np.int64]:
    """The same samples in groups of `size` of one kind, each where its last one was; what is left over last."""
    groups, rest = [], []
    for kind in (False, True):
        places = np.flatnonzero(portrait[samples] == kind)
        whole = len(places) // size * size
        groups.append(places[:whole].reshape(-1, size))
        rest.append(places[whole:])
    formed = np.concatenate(groups)
    formed = formed[np.argsort(formed[:, -1])]
    order: npt.NDArray[np.int64] = np.concatenate([formed.ravel(), *rest])
    return samples[order]


def repeat_factors(
    num_images: int, images: npt.NDArray[np.int64], labels: npt.NDArray[np.int64], threshold: float
) -> npt.NDArray[np.float64]:
    """How often an epoch should show each image, so that rare classes are seen more often.

    From the LVIS paper (Gupta, Dollar and Girshick, CVPR 2019): with f(c) the share of images that hold class
    c, a class has the factor r(c) = max(1, sqrt(threshold / f(c))), an image the largest of its classes'.

    Args:
        num_images: Size of the data set.
        images: (M,) the image that each object is in.
        labels: (M,) the class of each object.
        threshold: Share of images below which a class counts as rare, in (0, 1].

    Returns:
        (num_images,), 1 or more; 1 where there is no object.
    """
    held = np.unique(np.stack([images, labels]), axis=1)
    num_holding = np.bincount(held[1])
    factors = np.ones(num_images)
    np.maximum.at(factors, held[0], np.sqrt(threshold * num_images / num_holding[held[1]]))
    return factors


def training_order(dataset: CocoDataset, experiment: Experiment) -> Order:
    """The order in which an experiment shows its training set. Crowd regions make no class less rare."""
    config, columns = experiment.data.order, dataset.columns
    portrait, repeats = None, None
    if config.group_by_aspect:
        portrait = columns.heights > columns.widths
    if config.repeat_threshold is not None:
        objects = ~columns.iscrowd
        images = np.repeat(np.arange(len(columns)), np.diff(columns.offsets))
        repeats = repeat_factors(len(columns), images[objects], columns.labels[objects], config.repeat_threshold)
    return Order(
        len(columns),
        experiment.optim.global_batch,
        experiment.seed,
        block=config.block,
        window=config.window,
        portrait=portrait,
        repeats=repeats,
    )


def rank_slice(global_batch: int, rank: int, world: int) -> slice:
    """The contiguous part of the global batch that is `rank`'s: sizes differ by at most one and may be 0."""
    return slice(rank * global_batch // world, (rank + 1) * global_batch // world)
