"""Augmentation: sizes are known before any image is read, and boxes follow their pixels."""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from mimicdet.inputs import check_images, check_targets
from mimiclab.data.augment import Augmentation, Color, Plan, Tile, carry_out, recolor, show
from mimiclab.data.order import Order, Slot, Stream, sample_key, uniform
from mimiclab.data.transforms import resized_size
from mimiclab.schema import AugmentConfig, ColorJitter

# (width, height), and whole-pixel boxes that do not overlap; some lie at the border.
SIZES = [(96, 64), (50, 80), (120, 60), (64, 64), (33, 100)]
BOXES = [
    [(0, 0, 30, 20), (40, 10, 70, 50), (80, 30, 96, 64)],
    [(5, 5, 45, 30), (0, 40, 20, 80), (30, 50, 50, 70)],
    [(0, 10, 120, 25), (10, 30, 50, 60), (90, 40, 110, 60)],
    [(8, 8, 56, 56)],
    [(0, 0, 33, 40), (3, 60, 30, 95)],
]
# Each label's colour is told by which channels are on.
COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
ORDER = Order(len(SIZES), 4, seed=5)
COLOR = ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
LARGE = AugmentConfig(crop=(0.3, 1), scale=(0.3, 2), mosaic=0.5, min_visible=0.3)
CONFIGS = {
    "none": AugmentConfig(),
    "crop": AugmentConfig(crop=(0.3, 0.9)),
    "scale": AugmentConfig(scale=(0.4, 2)),
    "mosaic": AugmentConfig(mosaic=1),
    "all": LARGE,
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def read(index: int) -> tuple[Tensor, dict[str, Tensor]]:
    """A black image in which every object's box is filled with the colour of its label; label 2 is a crowd."""
    width, height = SIZES[index]
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for label, (x1, y1, x2, y2) in enumerate(BOXES[index]):
        image[:, y1:y2, x1:x2] = torch.tensor(COLOURS[label], dtype=torch.uint8)[:, None, None]
    labels = torch.arange(len(BOXES[index]))
    return image, {"boxes": torch.tensor(BOXES[index], dtype=torch.float32), "labels": labels, "iscrowd": labels == 2}


def slots(num_steps: int = 15) -> list[Slot]:
    return [slot for step in range(num_steps) for slot in ORDER.slots(step)]


def plan(config: AugmentConfig, slot: Slot, *, short: int | tuple[int, int] = (40, 90), flip: float = 0.5) -> Plan:
    return Augmentation(short, 110, flip, config).plan(ORDER, slot, SIZES.__getitem__)


def extent(mask: Tensor) -> tuple[int, int, int, int]:
    """The box of what is true in a mask (H, W)."""
    rows, columns = mask.nonzero().unbind(1)
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def assert_boxes_are_where_their_colours_are(image: Tensor, target: dict[str, Tensor], tolerance: float) -> None:
    height, width = image.shape[1:]
    assert (target["boxes"] >= 0).all()
    assert (target["boxes"] <= torch.tensor([width, height]).repeat(2)).all()
    assert target["iscrowd"].tolist() == (target["labels"] == 2).tolist()
    for box, label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
        if min(box[2] - box[0], box[3] - box[1]) < 2:
            continue  # less than two pixels may be blurred away
        assert extent(image[label] > 127) == pytest.approx(box, abs=tolerance)


def tiles(made: Plan, image: Tensor, target: dict[str, Tensor]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """The parts that a sample is made of, each with the boxes in it, in its own pixels."""
    num_boxes = 0
    centres = (target["boxes"][:, :2] + target["boxes"][:, 2:]) / 2
    for tile in made.tiles:
        x, y = tile.at
        width, height = tile.window[2] - tile.window[0], tile.window[3] - tile.window[1]
        inside = ((centres > torch.tensor([x, y])) & (centres < torch.tensor([x + width, y + height]))).all(1)
        part = {name: values[inside] for name, values in target.items()}
        part["boxes"] = part["boxes"] - torch.tensor([x, y, x, y])
        num_boxes += int(inside.sum())
        yield image[:, y : y + height, x : x + width], part
    assert num_boxes == len(target["boxes"])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_boxes_follow_their_pixels(config: AugmentConfig) -> None:
    num_boxes = 0
    for slot in slots():
        made = plan(config, slot)
        image, target = carry_out(made, read, config.min_visible)
        assert image.shape == (3, made.size[1], made.size[0])
        assert image.dtype == torch.uint8
        for part, of_part in tiles(made, image, target):
            assert_boxes_are_where_their_colours_are(part, of_part, tolerance=1)
        num_boxes += len(target["boxes"])
    assert num_boxes > 60


def test_a_crop_without_resizing_is_exact_and_drops_what_is_hardly_visible() -> None:
    config = AugmentConfig(crop=(0.3, 1))
    kinds = set[tuple[str, bool]]()
    for slot in slots():
        augmentation = Augmentation(1, 1, 0.5, config)
        crop = augmentation.plan(ORDER, slot, SIZES.__getitem__).tiles[0].crop
        size = (crop[2] - crop[0], crop[3] - crop[1])
        for flip in (False, True):
            entire, _ = read(slot.index)
            image, target = show(Tile(slot.index, crop, size, (0, 0, *size), flip), *read(slot.index), 0.4)
            assert_boxes_are_where_their_colours_are(image, target, tolerance=0)
            for label in range(len(BOXES[slot.index])):
                left, whole = int((image[label] > 0).sum()), int((entire[label] > 0).sum())
                kept = label in target["labels"]
                assert kept == (left > 0 if label == 2 else left / whole >= 0.4)
                kinds.add(("gone" if left == 0 else "cut" if left < whole else "whole", kept))
    assert kinds == {("cut", True), ("cut", False), ("gone", False), ("whole", True)}


def test_a_tile_is_cut_first_then_resized_then_cut_to_its_window_then_mirrored() -> None:
    image = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    target = {"boxes": torch.tensor([[20.0, 10, 30, 25]]), "labels": torch.zeros(1), "iscrowd": torch.tensor([False])}
    shown, seen = show(Tile(0, (4, 8, 44, 28), (80, 40), (10, 5, 60, 40), flip=True), image, target, 0)
    resized = F.resize(image[:, 8:28, 4:44], [40, 80], antialias=True)
    assert torch.equal(shown, resized[:, 5:40, 10:60].flip(2))
    # x: (20 - 4) * 2 - 10 = 22 and 42 from the left, 50 - 42 and 50 - 22 in the mirror. y: (10 - 8) * 2 - 5 < 0.
    assert seen["boxes"].tolist() == [[8, 0, 28, 29]]


def test_boxes_too_thin_for_the_detector_are_dropped_where_nothing_is_cut_off_too() -> None:
    boxes = torch.tensor([[3.0, 3.0, 3.0, 9.0], [0.0, 0.0, 4.0, 4.0], [2.0, 3.0, 9.0, 3.000001]])
    target = {"boxes": boxes, "labels": torch.tensor([0, 1, 2]), "iscrowd": torch.tensor([False, False, True])}
    whole = Plan((10, 5), (Tile(0, (0, 0, 20, 10), (10, 5), (0, 0, 10, 5), False),), Color())
    _, seen = carry_out(whole, lambda _: (torch.zeros(3, 10, 20, dtype=torch.uint8), target), 1)
    assert seen["boxes"].tolist() == [[0.0, 0.0, 2.0, 2.0]]
    assert seen["labels"].tolist() == [1]
    assert seen["iscrowd"].tolist() == [False]


@st.composite
def stored(draw: st.DrawFn) -> tuple[tuple[int, int], list[list[float]]]:
    """A size, and boxes in it that are as thin as they may be, or up to all of it."""
    # At 9000 pixels, resizing takes the thinnest below what the detector takes.
    size = draw(st.tuples(st.integers(1, 400) | st.just(9000), st.integers(1, 60)))
    boxes = []
    for _ in range(draw(st.integers(0, 4))):
        low, high = [], []
        for side in size:
            length = draw(st.sampled_from([1.5e-3, 2e-3, 0.3]) | st.floats(2e-3, side))
            low.append(draw(st.sampled_from([0.0, side - length]) | st.floats(0, side - length)))
            high.append(min(low[-1] + length, side))
        boxes.append([*low, *high])
    return size, boxes


@settings(deadline=None)
@given(
    images=st.lists(stored(), min_size=5, max_size=5),
    step=st.integers(0, 50),
    short=st.sampled_from([2, 3]) | st.integers(2, 60),
    config=st.sampled_from(list(CONFIGS.values())),
)
@pytest.mark.slow
def test_the_detector_takes_whatever_comes_out(
    images: list[tuple[tuple[int, int], list[list[float]]]], step: int, short: int, config: AugmentConfig
) -> None:
    def read(index: int) -> tuple[Tensor, dict[str, Tensor]]:
        (width, height), boxes = images[index]
        labels = torch.zeros(len(boxes), dtype=torch.int64)
        target = {"boxes": torch.tensor(boxes).reshape(-1, 4), "labels": labels, "iscrowd": labels == 1}
        return torch.zeros(3, height, width, dtype=torch.uint8), target

    augmentation = Augmentation(short, 2 * short, 0.5, config)
    plans = [augmentation.plan(ORDER, slot, lambda index: images[index][0]) for slot in ORDER.slots(step)]
    batch, targets = zip(*(carry_out(each, read, 0) for each in plans), strict=True)
    assert [tuple(image.shape) for image in batch] == [(3, each.size[1], each.size[0]) for each in plans]
    check_images(batch)
    check_targets(targets, batch, num_classes=1, dtype=torch.float32)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_sample_keeps_no_more_memory_than_its_own_pixels(config: AugmentConfig) -> None:
    for slot in slots(5):
        for flip in (0, 1):
            # Whole-pixel crops of the stored size are not resized, and so are views of the stored image.
            made = plan(config, slot, flip=flip)
            (x1, y1, x2, y2), *_ = (tile.crop for tile in made.tiles)
            unresized = replace(made.tiles[0], size=(x2 - x1, y2 - y1), window=(0, 0, x2 - x1, y2 - y1), at=(0, 0))
            for each in (made, Plan((x2 - x1, y2 - y1), (unresized,), Color())):
                image, _ = carry_out(each, read, 0)
                assert image.is_contiguous()
                assert image.untyped_storage().nbytes() == image.numel()


def test_an_image_without_objects_takes_every_augmentation() -> None:
    def empty(index: int) -> tuple[Tensor, dict[str, Tensor]]:
        image, target = read(index)
        return image, {name: values[:0] for name, values in target.items()}

    for slot in slots(4):
        _, target = carry_out(plan(LARGE, slot), empty, 0.3)
        assert target["boxes"].shape == (0, 4)
        assert target["labels"].shape == target["iscrowd"].shape == (0,)


def test_four_tiles_fill_a_mosaic_without_overlap() -> None:
    others = Counter[int]()
    for slot in slots():
        made = plan(CONFIGS["mosaic"], slot, short=50)
        assert made.size == resized_size(*SIZES[slot.index], 50, 110)
        covered = torch.zeros(made.size[1], made.size[0], dtype=torch.int64)
        for tile in made.tiles:
            x, y = tile.at
            covered[y : y + tile.size[1], x : x + tile.size[0]] += 1
            width, height = tile.crop[2] - tile.crop[0], tile.crop[3] - tile.crop[1]
            # The aspect is kept to half a pixel of the stored image, and one side is used whole.
            assert abs(width - height * tile.size[0] / tile.size[1]) <= 0.5001 * max(1, tile.size[0] / tile.size[1])
            assert width == SIZES[tile.index][0] or height == SIZES[tile.index][1]
        assert (covered == 1).all()
        assert made.tiles[0].index == slot.index
        others.update(tile.index for tile in made.tiles[1:])
        centre = made.tiles[3].at
        assert all(0.25 * side - 1 <= at <= 0.75 * side for at, side in zip(centre, made.size, strict=True))
    assert set(others) == set(range(len(SIZES)))


@settings(deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), min_size=5, max_size=5),
    step=st.integers(0, 50),
    short=st.sampled_from([1, 2]) | st.integers(1, 900),
    config=st.sampled_from(list(CONFIGS.values())),
)
def test_any_stored_size_can_be_planned(
    sizes: list[tuple[int, int]], step: int, short: int, config: AugmentConfig
) -> None:
    for slot in ORDER.slots(step):
        made = Augmentation(short, 2 * short, 0.5, config).plan(ORDER, slot, sizes.__getitem__)
        assert max(made.size) <= max(2, 2 * short)
        assert min(made.size) >= 2
        for tile in made.tiles:
            x1, y1, x2, y2 = tile.crop
            assert 0 <= x1 < x2 <= sizes[tile.index][0]
            assert 0 <= y1 < y2 <= sizes[tile.index][1]
            left, top, right, bottom = tile.window
            assert 0 <= left < right <= tile.size[0]
            assert 0 <= top < bottom <= tile.size[1]
            assert tile.at[0] + right - left <= made.size[0]
            assert tile.at[1] + bottom - top <= made.size[1]


def test_scale_jitter_scales_evenly_and_never_exceeds_the_size_without_it() -> None:
    # A square of 64 that is trained on at 100.
    made = [plan(CONFIGS["scale"], Slot(3, 0, 0, sample_key(0, step, 0)), short=100) for step in range(400)]
    factors = [each.tiles[0].size[0] / 100 for each in made]
    assert 0.4 <= min(factors) < 0.45
    assert 1.95 < max(factors) <= 2
    assert sum(factor < 1.2 for factor in factors) == pytest.approx(200, abs=30)
    assert all(each.size[0] == each.size[1] == round(100 * min(1, f)) for each, f in zip(made, factors, strict=True))
    lefts = [each.tiles[0].window[0] / (each.tiles[0].size[0] - 100) for each in made if each.tiles[0].size[0] > 150]
    assert min(lefts) < 0.05
    assert max(lefts) > 0.95


def test_crops_keep_their_share_of_each_side_and_lie_anywhere() -> None:
    config = AugmentConfig(crop=(0.5, 1))
    made = [plan(config, Slot(2, 0, 0, sample_key(0, step, 0))).tiles[0].crop for step in range(400)]
    widths = [(x2 - x1) / 120 for x1, _, x2, _ in made]
    heights = [(y2 - y1) / 60 for _, y1, _, y2 in made]
    for shares in (widths, heights):
        assert 0.49 < min(shares) < 0.52
        assert 0.98 < max(shares) <= 1
    assert abs(np.corrcoef(widths, heights)[0, 1]) < 0.15
    assert len({x1 for x1, *_ in made}) > 40
    assert len({y1 for _, y1, *_ in made}) > 20


@pytest.mark.parametrize(("probability", "expected"), [(0.0, 0), (0.5, 200), (1.0, 400)])
def test_the_share_of_flips_and_of_mosaics_is_the_probability(probability: float, expected: int) -> None:
    made = [
        plan(AugmentConfig(mosaic=probability), Slot(0, 0, 0, sample_key(1, step, 0)), flip=probability)
        for step in range(400)
    ]
    slack = 40 if 0 < expected < 400 else 0
    assert sum(each.tiles[0].flip for each in made) == pytest.approx(expected, abs=slack)
    assert sum(len(each.tiles) == 4 for each in made) == pytest.approx(expected, abs=slack)


def test_a_plan_is_the_same_on_every_machine_and_version() -> None:
    # As the order of samples: a run that goes on after an update must go on alike.
    slot = ORDER.slots(2)[1]
    config = AugmentConfig(crop=(0.3, 1), scale=(0.3, 2))
    assert plan(config, slot).tiles == (Tile(3, (3, 8, 44, 43), (145, 124), (1, 30, 96, 111), flip=True),)
    assert plan(CONFIGS["mosaic"], slot).tiles == (
        Tile(3, (0, 0, 64, 64), (53, 53), (0, 0, 53, 53), flip=False),
        Tile(3, (11, 0, 45, 64), (28, 53), (0, 0, 28, 53), flip=True, at=(53, 0)),
        Tile(1, (0, 4, 50, 30), (53, 28), (0, 0, 53, 28), flip=True, at=(0, 53)),
        Tile(1, (0, 26, 50, 76), (28, 28), (0, 0, 28, 28), flip=False, at=(53, 53)),
    )
    color = (1.1063222625270694, 1.2554107879044147, 1.1743120378060399, 0.03649726865082042)
    assert plan(AugmentConfig(color=COLOR), slot).color == color


def test_flips_and_sizes_are_those_that_the_key_gave_before_there_was_more() -> None:
    for slot in slots():
        assert plan(AugmentConfig(), slot).tiles[0].flip == (uniform(slot.key, Stream.FLIP) < 0.5)
        assert plan(CONFIGS["crop"], slot).tiles[0].flip == (uniform(slot.key, Stream.FLIP) < 0.5)


def test_no_global_generator_is_touched_or_listened_to() -> None:
    config = LARGE.model_copy(update={"color": COLOR})
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = (torch.get_rng_state(), np.random.get_state()[1], random.getstate())
        results.append([carry_out(plan(config, slot), read, 0.3) for slot in slots(5)])
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (np.random.get_state()[1] == before[1]).all()
        assert random.getstate() == before[2]
    for (image, target), (same, same_target) in zip(*results, strict=True):
        assert torch.equal(image, same)
        assert all(torch.equal(target[name], same_target[name]) for name in target)


def test_colours_are_drawn_evenly_within_their_range_and_apart() -> None:
    config = AugmentConfig(color=COLOR)
    drawn = np.array([plan(config, Slot(0, 0, 0, sample_key(0, step, 0))).color for step in range(500)])
    for values, middle, reach in zip(drawn.T, (1, 1, 1, 0), (0.4, 0.4, 0.4, 0.1), strict=True):
        assert abs(values - middle).max() <= reach
        assert values.min() < middle - 0.97 * reach
        assert values.max() > middle + 0.97 * reach
        assert values.mean() == pytest.approx(middle, abs=0.1 * reach)
    assert (np.abs(np.corrcoef(drawn.T) - np.eye(4)) < 0.15).all()


def test_colours_change_as_in_torchvision_and_only_where_they_should() -> None:
    image = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(recolor(image, Color()), image)
    assert torch.equal(recolor(image, Color(brightness=1.3)), F.adjust_brightness(image, 1.3))
    assert torch.equal(recolor(image, Color(saturation=0.4)), F.adjust_saturation(image, 0.4))
    assert torch.equal(recolor(image, Color(hue=-0.2)), F.adjust_hue(image, -0.2))
    for factor in (0.0, 0.6, 1.7):
        ours, theirs = recolor(image, Color(contrast=factor)), F.adjust_contrast(image, factor)
        assert (ours.int() - theirs.int()).abs().max() <= 1
    both = recolor(image, Color(brightness=0.5, saturation=0.5))
    assert torch.equal(both, F.adjust_saturation(F.adjust_brightness(image, 0.5), 0.5))


# Images whose mean in floating point is a little less than the true one, on one thread or on two.
@pytest.mark.parametrize(("num_threads", "seed", "width"), [(1, 1, 500), (2, 5, 617)])
def test_contrast_does_not_depend_on_the_number_of_threads(num_threads: int, seed: int, width: int) -> None:
    torch.set_num_threads(num_threads)
    levels = F.rgb_to_grayscale(torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)).flatten()
    half = torch.randint(1, 251, (640, width), generator=torch.Generator().manual_seed(seed))
    other = torch.tensor([int((levels == 250 - levels[value]).nonzero()[0]) for value in range(251)])[half]
    image = torch.cat([half, other], dim=1).to(torch.uint8).expand(3, -1, -1)
    # The mean gray is 125 exactly; what is less is cut to 124.
    assert recolor(image, Color(contrast=0)).unique().tolist() == [125]
