"""Sizes and geometry: boxes follow their pixels."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mimiclab.data.order import Stream, sample_key, uniform
from mimiclab.data.transforms import clip, cut, draw_short, mirror, padded_size, resize, resized_size

RED = torch.tensor([200, 10, 20], dtype=torch.uint8)


def picture(width: int, height: int, box: tuple[int, int, int, int]) -> Tensor:
    """A black image with a red rectangle."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    x1, y1, x2, y2 = box
    image[:, y1:y2, x1:x2] = RED[:, None, None]
    return image


@pytest.mark.parametrize(
    ("size", "bounds", "expected"),
    [
        ((640, 480), (240, 320), (320, 240)),
        ((480, 640), (240, 320), (240, 320)),
        ((640, 480), (800, 1333), (1067, 800)),
        ((500, 375), (600, 1000), (800, 600)),
        ((1000, 100), (240, 320), (320, 32)),
        ((3000, 1), (240, 320), (320, 2)),
        ((128, 128), (128, 128), (128, 128)),
    ],
)
def test_resized_size(size: tuple[int, int], bounds: tuple[int, int], expected: tuple[int, int]) -> None:
    assert resized_size(*size, *bounds) == expected


@given(
    width=st.integers(1, 5000),
    height=st.integers(1, 5000),
    short=st.integers(2, 900),
    more=st.integers(0, 900),
)
def test_resized_size_meets_one_bound_and_keeps_the_aspect(width: int, height: int, short: int, more: int) -> None:
    long = short + more
    new_width, new_height = resized_size(width, height, short, long)
    small, large = sorted((new_width, new_height))
    assert small <= short
    assert large <= long
    assert small == short or large == long
    scale = min(short / min(width, height), long / max(width, height))
    assert abs(new_width - max(2, width * scale)) <= 0.501
    assert abs(new_height - max(2, height * scale)) <= 0.501


def test_a_short_side_is_drawn_evenly_from_the_whole_range() -> None:
    keys = [sample_key(0, step, slot) for step in range(500) for slot in range(4)]
    counts = Counter(draw_short((640, 643), key) for key in keys)
    assert counts.keys() == {640, 641, 642, 643}
    assert all(430 <= count <= 570 for count in counts.values())
    # It says nothing about the flip of the same image.
    both = sum(draw_short((640, 643), key) < 642 and uniform(key, Stream.FLIP) < 0.5 for key in keys)
    assert 420 <= both <= 580


def test_a_drawn_short_side_is_the_same_on_every_machine_and_version() -> None:
    # As the order of samples: a run that goes on after an update must go on alike.
    assert [draw_short((640, 800), sample_key(0, step, 0)) for step in range(5)] == [740, 768, 714, 679, 742]


@given(st.integers(0, 2**63 - 1), st.integers(1, 2000))
def test_one_short_side_is_itself(key: int, short: int) -> None:
    assert draw_short(short, key) == draw_short((short, short), key) == short


def test_padded_size_holds_every_image() -> None:
    assert padded_size([(320, 240), (240, 310)]) == (320, 320)
    assert padded_size([(33, 64)]) == (64, 64)
    assert padded_size([(33, 65)], divisor=16) == (80, 48)


def test_a_resized_box_holds_the_same_pixels() -> None:
    image, boxes = resize(picture(40, 20, (8, 4, 24, 16)), torch.tensor([[8.0, 4, 24, 16]]), (80, 60))
    assert image.shape == (3, 60, 80)
    assert image.dtype == torch.uint8
    assert boxes.tolist() == [[16, 12, 48, 48]]
    # Two pixels away from the blurred edge.
    assert (image[:, 14:46, 18:46] == RED[:, None, None]).all()
    outside = image.clone()
    outside[:, 10:50, 14:50] = 0
    assert not outside.any()


def test_a_box_at_the_border_stays_at_the_border() -> None:
    for width, new in ((641, 213), (333, 800), (7, 1333)):
        _, boxes = resize(torch.zeros(3, 5, width, dtype=torch.uint8), torch.tensor([[0.0, 0, width, 5]]), (new, 9))
        assert boxes.tolist() == [[0, 0, new, 9]]


def test_a_flip_moves_the_box_with_its_pixels() -> None:
    image = picture(31, 20, (3, 4, 10, 16))
    flipped, boxes = mirror(image, torch.tensor([[3.0, 4, 10, 16]]))
    x1, y1, x2, y2 = boxes[0].int().tolist()
    assert (x1, y1, x2, y2) == (21, 4, 28, 16)
    assert (flipped[:, y1:y2, x1:x2] == RED[:, None, None]).all()
    flipped[:, y1:y2, x1:x2] = 0
    assert not flipped.any()


def test_a_flip_takes_images_without_boxes() -> None:
    _, boxes = mirror(picture(8, 8, (0, 0, 1, 1)), torch.zeros(0, 4))
    assert boxes.shape == (0, 4)


def test_a_cut_moves_boxes_with_their_pixels_and_leaves_them_whole() -> None:
    part, boxes = cut(picture(31, 20, (3, 4, 10, 16)), torch.tensor([[3.0, 4, 10, 16]]), (5, 2, 25, 12))
    assert boxes.tolist() == [[-2, 2, 5, 14]]
    assert part.shape == (3, 10, 20)
    assert (part[:, 2:, :5] == RED[:, None, None]).all()
    assert not part[:, :2].any()
    assert not part[:, :, 5:].any()


def test_clipping_says_how_much_of_a_box_is_left() -> None:
    boxes = torch.tensor([[-2.0, 2, 5, 14], [1.1, 1.3, 7.7, 9.9], [-9, 0, -3, 5], [25, 3, 30, 8], [-5, -5, 30, 30]])
    clipped, share = clip(boxes, (20, 10))
    assert clipped[0].tolist() == [0, 2, 5, 10]
    assert share[0] == pytest.approx(5 * 8 / (7 * 12))
    assert torch.equal(clipped[1], boxes[1])
    assert share[1] == 1
    assert share[2] == share[3] == 0
    assert clipped[4].tolist() == [0, 0, 20, 10]


@pytest.mark.parametrize("shape", [(2, 2), (1, 5), (9, 3)])
def test_an_image_may_shrink_to_one_pixel(shape: tuple[int, int]) -> None:
    image = torch.arange(3 * shape[0] * shape[1], dtype=torch.uint8).reshape(3, *shape)

    resized, _ = resize(image, torch.zeros(0, 4), (1, 1))

    assert resized.dtype == torch.uint8
    assert torch.allclose(resized.float().flatten(), image.float().mean((1, 2)), atol=1.0)
