"""Positions, anchors and box coding against plain loops."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mimicdet.anchors import MAX_LOG_SCALE, clip, decode, encode, make_grid

LEVELS = (3, 4, 5, 6)


def pyramid(height: int, width: int) -> list[Tensor]:
    """Maps of the sizes that a backbone's stride-2 convolutions give: halves, rounded up."""
    return [torch.zeros(1, 1, math.ceil(height / 2**level), math.ceil(width / 2**level)) for level in LEVELS]


def random_boxes(num: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(num, 2, generator=generator, dtype=torch.float64) * 200 - 50
    side = torch.rand(num, 2, generator=generator, dtype=torch.float64) * 100 + 5  # growth within the limit
    return torch.cat([corner, corner + side], 1)


@pytest.mark.parametrize("scale", [4.0, 2.5])
def test_grid_lays_levels_then_rows_then_columns(scale: float) -> None:
    grid = make_grid(LEVELS, pyramid(40, 72), scale)
    index = 0
    for number, level in enumerate(LEVELS):
        stride = 2**level
        rows, columns = math.ceil(40 / stride), math.ceil(72 / stride)
        start = index
        assert grid.starts[number] == start
        for y in range(rows):
            for x in range(columns):
                center = ((x + 0.5) * stride, (y + 0.5) * stride)
                half = scale * stride / 2
                assert grid.level[index] == number
                assert grid.level_start[index] == start
                assert grid.level_shape[index].tolist() == [rows, columns]
                assert grid.cell[index].tolist() == [x, y]
                assert grid.stride[index] == stride
                assert tuple(grid.centers[index].tolist()) == center
                expected = [center[0] - half, center[1] - half, center[0] + half, center[1] + half]
                assert grid.anchors[index].tolist() == expected
                index += 1
    assert len(grid.level) == index


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 130), st.integers(1, 130), st.integers(0, 70), st.integers(0, 70))
@example(64, 64, 32, 32)  # cells that begin on the border
def test_inside_are_the_cells_of_the_image_without_padding(height: int, width: int, below: int, right: int) -> None:
    grid = make_grid(LEVELS, pyramid(height + below, width + right), 4)
    inside = grid.inside(height, width)
    own = make_grid(LEVELS, pyramid(height, width), 4)
    assert grid.level[inside].tolist() == own.level.tolist()
    assert grid.cell[inside].tolist() == own.cell.tolist()
    assert torch.equal(grid.anchors[inside], own.anchors)


@pytest.mark.parametrize("std", [(1, 1, 1, 1), (0.1, 0.1, 0.2, 0.2)])
def test_decode_inverts_encode(std: tuple[float, ...]) -> None:
    boxes, anchors = random_boxes(50), random_boxes(50, seed=1)
    assert torch.allclose(decode(encode(boxes, anchors, std), anchors, std), boxes, rtol=0, atol=1e-9)


def test_deltas_are_faster_rcnns() -> None:
    anchor, box = torch.tensor([[10.0, 20.0, 30.0, 60.0]]), torch.tensor([[20.0, 20.0, 60.0, 30.0]])
    shift = [(40 - 20) / 20, (25 - 40) / 40, math.log(40 / 20), math.log(10 / 40)]
    assert encode(box, anchor)[0].tolist() == pytest.approx(shift)
    scaled = [shift[0] / 0.1, shift[1] / 0.1, shift[2] / 0.2, shift[3] / 0.2]
    assert encode(box, anchor, (0.1, 0.1, 0.2, 0.2))[0].tolist() == pytest.approx(scaled)


def test_decode_limits_growth_and_not_shrinking() -> None:
    anchor = torch.tensor([[0.0, 0.0, 16.0, 16.0]]).double()
    grown = decode(torch.tensor([[0.0, 0.0, 50.0, MAX_LOG_SCALE]]).double(), anchor)[0]
    assert (grown[2:] - grown[:2]).tolist() == pytest.approx([1000.0, 1000.0])
    shrunk = decode(torch.tensor([[0.0, 0.0, -MAX_LOG_SCALE, 0.0]]).double(), anchor)[0]
    assert (shrunk[2:] - shrunk[:2]).tolist() == pytest.approx([16 * 16 / 1000, 16.0])


def test_decode_limits_growth_after_the_deviation_is_applied() -> None:
    anchor = torch.tensor([[0.0, 0.0, 16.0, 16.0]]).double()
    deltas = torch.tensor([[0.0, 0.0, MAX_LOG_SCALE + 1, 0.0]]).double()
    box = decode(deltas, anchor, (1, 1, 0.5, 1))[0]
    assert float(box[2] - box[0]) == pytest.approx(16 * math.exp((MAX_LOG_SCALE + 1) / 2))


coordinates = st.floats(-1e5, 1e5, width=32)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(*[coordinates] * 4), min_size=1, max_size=5), st.integers(1, 1500), st.integers(1, 1500))
def test_clipped_boxes_lie_in_the_image_and_have_an_area(
    boxes: list[tuple[float, ...]], height: int, width: int
) -> None:
    x1, y1, x2, y2 = clip(torch.tensor(boxes), torch.tensor(float(height)), torch.tensor(float(width))).unbind(-1)
    assert (x1 >= 0).all()
    assert (y1 >= 0).all()
    assert (x2 <= width).all()
    assert (y2 <= height).all()
    assert (x2 > x1).all()
    assert (y2 > y1).all()


def test_clip_leaves_boxes_in_the_image_alone() -> None:
    boxes = torch.tensor([[0.0, 0.0, 64.0, 48.0], [3.5, 4.5, 10.0, 47.0]])
    assert torch.equal(clip(boxes, *torch.tensor([48.0, 64.0])), boxes)
    over = torch.tensor([[-5.0, 10.0, 70.0, 60.0]])
    assert clip(over, *torch.tensor([48.0, 64.0])).tolist() == [[0.0, 10.0, 64.0, 48.0]]


def test_boxes_of_broken_weights_stay_in_the_image() -> None:
    broken = clip(torch.full((1, 4), torch.nan), *torch.tensor([48.0, 64.0]))
    assert broken.isfinite().all()
