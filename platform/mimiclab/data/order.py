"""Which images make up a global step, and the random key of each: a pure function of (seed, step, slot).

Nothing here has a state that a restart could lose, and nothing knows how many workers there are. A
worker asks for the whole global batch and takes its slice of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15

# Streams of a sample's random numbers: one per use, so that adding a use changes no other draw.
FLIP = 1
SHORT = 2


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


def uniform(key: int, stream: int) -> float:
    """A number in [0, 1) for one use (`stream`) of a sample's key."""
    return (_hash(key, stream) >> 11) * 2.0**-53


@lru_cache(maxsize=4)  # a batch looks at one epoch, at most at a few that follow each other
def _permutation(seed: int, epoch: int, num_images: int) -> npt.NDArray[np.int64]:
    # NumPy guarantees the raw output of its bit generators from version to version, but not that of
    # Generator.permutation; hence the sort.
    bits = np.random.Philox(key=[seed & _MASK, epoch]).random_raw(num_images)
    return np.argsort(bits, kind="stable")


@dataclass(frozen=True)
class Slot:
    """One place of a global batch: the image's index in the data set, its epoch (from 0), its random key."""

    index: int
    epoch: int
    key: int


@dataclass(frozen=True)
class Order:
    """The endless sequence of training samples.

    Every epoch is one permutation of all images. Epochs run on into each other: a batch may hold the end
    of one and the start of the next, and no image is dropped.
    """

    num_images: int
    global_batch: int
    seed: int

    def __post_init__(self) -> None:
        if self.num_images < 1 or self.global_batch < 1:
            raise ValueError(f"num_images and global_batch must be 1 or more, found {self}")

    def slots(self, step: int) -> list[Slot]:
        """The whole global batch of `step` (from 0), in order."""
        result = []
        for slot in range(self.global_batch):
            epoch, position = divmod(step * self.global_batch + slot, self.num_images)
            index = int(_permutation(self.seed, epoch, self.num_images)[position])
            result.append(Slot(index, epoch, sample_key(self.seed, step, slot)))
        return result

    def num_steps(self, epochs: int) -> int:
        """Steps after which every image was seen at least `epochs` times."""
        return -(-self.num_images * epochs // self.global_batch)

    def epoch_end_step(self, epoch: int) -> int:
        """Number of steps done when epoch `epoch` (from 1) is complete."""
        return self.num_steps(epoch)


def rank_slice(global_batch: int, rank: int, world: int) -> slice:
    """The contiguous part of the global batch that is `rank`'s: sizes differ by at most one and may be 0."""
    return slice(rank * global_batch // world, (rank + 1) * global_batch // world)
