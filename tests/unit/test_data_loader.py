"""Reading ahead changes nothing but when a batch is made."""

import threading
import time

import pytest
import torch
from torch.utils.data import Dataset

from mimiclab.data.loader import load
from mimiclab.engine import Batch
from mimiclab.errors import UserError

NUM_STEPS = 9


class Numbers(Dataset[Batch]):
    """Batches of images of mixed sizes and layouts; step 4 has none, and a step of `broken` cannot be read."""

    def __init__(self, broken: int | None = None, seconds: float = 0.0) -> None:
        self.broken = broken
        self.seconds = seconds
        self.made: list[int] = []

    def __getitem__(self, step: int) -> Batch:
        self.made.append(step)
        time.sleep(self.seconds * (step % 2))
        if step == self.broken:
            raise UserError(f"image {step}: broken")
        generator = torch.Generator().manual_seed(step)
        images, targets = [], []
        for number in range(0 if step == 4 else 1 + step % 3):
            pixels = torch.randint(0, 256, (5 + step, 7 + number, 3), dtype=torch.uint8, generator=generator)
            images.append(pixels.permute(2, 0, 1) if step % 2 else pixels.permute(2, 0, 1).contiguous())
            targets.append(
                {
                    "boxes": torch.rand(number, 4, generator=generator),
                    "labels": torch.arange(number),
                    "iscrowd": torch.arange(number) % 2 == 0,
                    "key": torch.tensor(2**62 + step, dtype=torch.int64),
                }
            )
        return Batch(images, targets, (32, 64 + step), [10 * step + number for number in range(len(images))])


WAYS = [{"processes": 0}, {"processes": 0, "threads": 3}, {"processes": 1}, {"processes": 2}]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("start", [0, 5])
def test_batches_come_in_order_and_as_they_are(way: dict[str, int], start: int) -> None:
    loaded = list(load(Numbers(seconds=0.01), range(start, NUM_STEPS), **way))
    assert len(loaded) == NUM_STEPS - start
    for step, batch in zip(range(start, NUM_STEPS), loaded, strict=True):
        expected = Numbers()[step]
        assert (batch.pad_to, batch.image_ids) == (expected.pad_to, expected.image_ids)
        for image, other in zip(batch.images, expected.images, strict=True):
            assert image.dtype == torch.uint8
            assert torch.equal(image, other)
        for target, wanted in zip(batch.targets, expected.targets, strict=True):
            assert list(target) == list(wanted)
            for name in wanted:
                assert target[name].dtype == wanted[name].dtype
                assert torch.equal(target[name], wanted[name])


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_what_cannot_be_read_ends_it_there(way: dict[str, int]) -> None:
    loader = load(Numbers(broken=3), range(NUM_STEPS), **way)
    assert [next(loader).pad_to for _ in range(3)] == [(32, 64), (32, 65), (32, 66)]
    with pytest.raises(UserError, match=r"^image 3: broken$"):
        next(loader)


@pytest.mark.slow
def test_threads_read_ahead_and_no_further_than_they_should() -> None:
    numbers = Numbers()
    loader = load(numbers, range(1000), processes=0, threads=2)
    next(loader)
    deadline = time.monotonic() + 5
    while len(numbers.made) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert sorted(numbers.made) == list(range(5))
    loader.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]


def test_without_processes_and_threads_nothing_is_read_before_it_is_asked_for() -> None:
    numbers = Numbers()
    loader = load(numbers, range(5), processes=0)
    next(loader)
    assert numbers.made == [0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_pinned_batches_are_the_same(way: dict[str, int]) -> None:
    for step, batch in enumerate(load(Numbers(), range(NUM_STEPS), pin=True, **way)):
        assert all(image.is_pinned() for image in batch.images)
        assert all(torch.equal(a, b) for a, b in zip(batch.images, Numbers()[step].images, strict=True))
