"""Assignment against loops over every anchor, proposal and box."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mimicdet.anchors import make_grid
from mimicdet.assignment import Assignment, assign_anchors, assign_proposals
from mimicdet.config import RefinementConfig

LEVELS = (3, 4, 5)
PADDED = 64
Box = tuple[float, float, float, float]

# Half-integer corners and ratios that are powers of two: every comparison below is exact in fp32 as well, so
# centres that lie on a border are part of what is compared.
# Sides on the bounds between levels, of scales 2 and 4 and of BOUNDS, and products of sides whose root is one.
BOUNDS = (16.0, 40.0)
halves = st.integers(-PADDED // 2, 2 * PADDED).map(lambda n: n / 2)
sides = st.one_of(
    st.integers(1, 8).map(lambda n: n / 2),
    st.integers(1, 2 * PADDED).map(lambda n: n / 2),
    st.sampled_from([16.0, 32.0, 40.0, 64.0, 128.0]),
)
sizes = st.one_of(st.tuples(sides, sides), sides.map(lambda n: (n, n)), sides.map(lambda n: (n / 2, 2 * n)))
some_boxes = st.builds(lambda x, y, size: (x, y, x + size[0], y + size[1]), halves, halves, sizes)


def states(assignment: Assignment) -> list[int | str]:
    """Per candidate: the ground truth's index, `negative` or `ignored`."""
    assert not (assignment.positive & assignment.negative).any()
    rows = zip(assignment.matched.tolist(), assignment.positive.tolist(), assignment.negative.tolist(), strict=True)
    return [matched if positive else "negative" if negative else "ignored" for matched, positive, negative in rows]


def assigned(
    boxes: list[Box], crowd: list[bool], *, height: int = PADDED, width: int = PADDED, scale: float = 4.0, **ratios
) -> list[int | str]:
    maps = [torch.zeros(1, 1, PADDED >> level, PADDED >> level) for level in LEVELS]
    grid = make_grid(LEVELS, maps, scale)
    return states(
        assign_anchors(
            grid,
            grid.inside(height, width),
            torch.tensor(boxes).reshape(-1, 4),
            torch.tensor(crowd, dtype=torch.bool),
            scale,
            RefinementConfig(**ratios),
        )
    )


def in_region(center: tuple[float, float], box: Box, ratio: float) -> bool:
    x1, y1, x2, y2 = box
    return (
        abs(center[0] - (x1 + x2) / 2) <= (x2 - x1) * ratio / 2
        and abs(center[1] - (y1 + y2) / 2) <= (y2 - y1) * ratio / 2
    )


def area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def own_level(box: Box, scale: float, bounds: tuple[float, ...] | None) -> int:
    """The lowest level whose bound the box stays below; by default bounds are twice the anchors' sides."""
    for index, level in enumerate(LEVELS[:-1]):
        if area(box) < (bounds[index] if bounds else 2 * scale * 2**level) ** 2:
            return level
    return LEVELS[-1]


def expected(
    boxes: list[Box],
    crowd: list[bool],
    *,
    height: int,
    width: int,
    scale: float,
    center_ratio: float,
    ignore_ratio: float,
    scale_bounds: tuple[float, ...] | None = None,
    forced_assignment: bool = True,
) -> list[int | str]:
    positions = []
    for level in LEVELS:
        stride = 2**level
        for y in range(PADDED // stride):
            for x in range(PADDED // stride):
                candidate = x * stride < width and y * stride < height
                positions.append((level, ((x + 0.5) * stride, (y + 0.5) * stride), candidate))
    claims: list[list[int]] = [[] for _ in positions]
    for j, box in enumerate(boxes):
        if crowd[j]:
            continue
        middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        hits, nearest, best = [], -1, math.inf
        for p, (level, center, candidate) in enumerate(positions):
            if candidate and level == own_level(box, scale, scale_bounds):
                if in_region(center, box, center_ratio):
                    hits.append(p)
                distance = (center[0] - middle[0]) ** 2 + (center[1] - middle[1]) ** 2
                if distance < best:
                    nearest, best = p, distance
        for p in hits or [nearest] * forced_assignment:
            claims[p].append(j)
    answer: list[int | str] = []
    for p, (level, center, candidate) in enumerate(positions):
        ignored = not candidate
        for j, box in enumerate(boxes):
            if crowd[j]:
                ignored |= in_region(center, box, 1)
            else:
                ignored |= level == own_level(box, scale, scale_bounds) and in_region(center, box, ignore_ratio)
        if claims[p]:
            answer.append(min(claims[p], key=lambda j: (area(boxes[j]), j)))
        else:
            answer.append("ignored" if ignored else "negative")
    return answer


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.tuples(some_boxes, st.sampled_from([False, False, False, True])), max_size=6),
    st.integers(1, PADDED),
    st.integers(1, PADDED),
    st.sampled_from([2.0, 4.0]),
    st.sampled_from([(0.25, 0.25), (0.25, 0.5), (0.5, 1.0), (1.0, 1.0)]),
    st.sampled_from([None, BOUNDS]),
    st.booleans(),
)
def test_anchors_are_assigned_as_by_hand(
    objects: list[tuple[Box, bool]],
    height: int,
    width: int,
    scale: float,
    ratios: tuple[float, float],
    bounds: tuple[float, ...] | None,
    forced: bool,
) -> None:
    setting = {
        "boxes": [box for box, _ in objects],
        "crowd": [crowd for _, crowd in objects],
        "height": height,
        "width": width,
        "scale": scale,
        "center_ratio": ratios[0],
        "ignore_ratio": ratios[1],
        "scale_bounds": bounds,
        "forced_assignment": forced,
    }
    assert assigned(**setting) == expected(**setting)


@pytest.mark.parametrize("forced", [True, False])
@pytest.mark.parametrize(("height", "width", "candidates"), [(PADDED, PADDED, 64 + 16 + 4), (16, 32, 8 + 2 + 1)])
def test_more_objects_than_positions(height: int, width: int, candidates: int, forced: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(200, 2, generator=generator) * torch.tensor([width - 4, height - 4])
    corners = (2 * corners).floor() / 2
    boxes = torch.cat([corners, corners + torch.randint(1, 40, (200, 2), generator=generator) / 2], 1).tolist()
    setting = {
        "boxes": [tuple(box) for box in boxes],
        "crowd": [False] * 200,
        "height": height,
        "width": width,
        "scale": 4.0,
        "center_ratio": 0.25,
        "ignore_ratio": 0.25,
        "forced_assignment": forced,
    }
    answer = assigned(**setting)
    assert answer == expected(**setting)
    assert len(answer) - answer.count("ignored") == candidates
    if forced and candidates == 11:
        # All boxes are of the lowest level, and so many of them leave none of its eight cells free.
        assert sum(isinstance(state, int) for state in answer) == 8


def test_region_is_shrunk_per_side() -> None:
    # 40 px wide and 20 high about (32, 32): 0.3 leaves 12 x 6, and the P3 centres 28 and 36 lie 4 px off.
    wide = assigned([(12.0, 22.0, 52.0, 42.0)], [False])
    assert 0 in wide
    centers = [(8 * (p % 8) + 4, 8 * (p // 8) + 4) for p in range(64) if wide[p] == 0]
    # Within 6 px in x but not within 3 px in y: only the nearest anchor, the first of four equals, is left.
    assert centers == [(28, 28)]
    tall = assigned([(12.0, 18.0, 52.0, 46.0)], [False])
    assert [p for p in range(64) if tall[p] == 0] == [8 * y + x for y in (3, 4) for x in (3, 4)]


def test_scale_ranges_are_half_open() -> None:
    def levels(side: float) -> set[int]:
        answer = assigned([(0.0, 0.0, side, side)], [False])
        return {0 if p < 64 else 1 if p < 80 else 2 for p, state in enumerate(answer) if state == 0}

    assert levels(0.5) == levels(63.5) == {0}
    assert levels(64) == {1}
    assert levels(127.5) == {1}
    assert levels(128) == levels(1000) == {2}


def test_scale_bounds_replace_the_scale_ranges_and_are_half_open_too() -> None:
    def levels(width: float, height: float) -> set[int]:
        answer = assigned([(0.0, 0.0, width, height)], [False], scale_bounds=BOUNDS)
        return {0 if p < 64 else 1 if p < 80 else 2 for p, state in enumerate(answer) if state == 0}

    assert levels(0.5, 0.5) == levels(15.5, 16) == levels(8, 31.5) == {0}
    assert levels(16, 16) == levels(8, 32) == levels(64, 4) == levels(39.5, 40) == {1}
    assert levels(40, 40) == levels(20, 80) == levels(1000, 1000) == {2}


def test_without_forced_assignment_a_box_that_holds_no_centre_is_not_learned() -> None:
    # 4 px about (32, 32), four cells' common corner: its nearest centre is 4 px off.
    box = (30.0, 30.0, 34.0, 34.0)
    assert assigned([box], [False]).count(0) == 1
    assert set(assigned([box], [False], forced_assignment=False)) == {"negative"}
    # Nor does it take a cell from a box that holds its centre.
    other = (8.0, 8.0, 48.0, 48.0)  # holds (28, 28) alone
    assert assigned([box, other], [False] * 2)[8 * 3 + 3] == 0
    free = assigned([box, other], [False] * 2, forced_assignment=False)
    assert (free[8 * 3 + 3], free.count(0), free.count(1)) == (1, 0, 1)


@pytest.mark.parametrize("forced", [True, False])
def test_the_ring_of_a_box_is_ignored_and_ends_with_its_own_level(forced: bool) -> None:
    # 32 px about the centre (28, 28): 0.25 leaves that centre alone, 0.5 its eight neighbours, on their border.
    answer = assigned(
        [(12.0, 12.0, 44.0, 44.0)], [False], center_ratio=0.25, ignore_ratio=0.5, forced_assignment=forced
    )
    assert [p for p, state in enumerate(answer) if state == 0] == [8 * 3 + 3]
    ring = [8 * y + x for y in (2, 3, 4) for x in (2, 3, 4) if (y, x) != (3, 3)]
    assert [p for p, state in enumerate(answer) if state == "ignored"] == ring
    # A box that is not learned keeps its ring: what it would show is not background.
    tiny = assigned([(27.0, 27.0, 33.0, 33.0)], [False], center_ratio=0.25, ignore_ratio=1.0, forced_assignment=forced)
    assert [p for p, state in enumerate(tiny) if state != "negative"] == [8 * 3 + 3]
    assert tiny[8 * 3 + 3] == (0 if forced else "ignored")


def test_boxes_over_the_border_are_assigned_by_what_is_annotated() -> None:
    # The middle of the first lies at (2, 32), outside of all shrunk columns but the first; clipped, it is narrower.
    over, clipped = (-14.0, 12.0, 18.0, 52.0), (0.0, 12.0, 18.0, 52.0)
    for box in (over, clipped, (0.0, 0.0, 64.0, 64.0), (-64.0, -64.0, 128.0, 128.0), (60.0, 60.0, 64.0, 64.0)):
        setting = {"boxes": [box], "crowd": [False], "scale": 4.0, "center_ratio": 0.25, "ignore_ratio": 0.5}
        for height, width in ((64, 64), (61, 64), (64, 57)):
            setting |= {"height": height, "width": width}
            answer = assigned(**setting)
            assert answer == expected(**setting)
            assert 0 in answer
    assert assigned([over], [False]) != assigned([clipped], [False])


def test_the_smallest_box_wins_and_the_larger_keeps_the_rest() -> None:
    large, small = (0.0, 0.0, 60.0, 60.0), (24.0, 24.0, 40.0, 40.0)
    answer = assigned([large, small], [False, False], center_ratio=1.0, ignore_ratio=1.0)
    assert [p for p in range(64) if answer[p] == 1] == [8 * y + x for y in (3, 4) for x in (3, 4)]
    assert answer[0] == 0


def test_without_objects_all_candidates_are_negative() -> None:
    answer = assigned([], [], height=8, width=16)
    assert answer.count("negative") == 2 + 1 + 1
    assert answer.count("ignored") == len(answer) - 4


def test_an_image_of_crowd_only_has_no_positive_and_no_negative_in_it() -> None:
    answer = assigned([(0.0, 0.0, 64.0, 32.0)], [True])
    assert answer[:32] == ["ignored"] * 32
    assert answer[32:64] == ["negative"] * 32


def test_random_boxes_at_the_papers_shrink() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        corners = torch.rand(5, 2, generator=generator) * 50
        boxes = torch.cat([corners, corners + torch.rand(5, 2, generator=generator) * 100 + 1], 1)
        setting = {
            "boxes": [tuple(box) for box in boxes.tolist()],
            "crowd": [False, False, False, False, True],
            "height": 50,
            "width": 60,
            "scale": 2.0,
            "center_ratio": 0.3,
            "ignore_ratio": 0.5,
        }
        assert assigned(**setting) == expected(**setting)


# ---- proposals ----


def overlap(a: Box, b: Box) -> float:
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def iou(a: Box, b: Box) -> float:
    return overlap(a, b) / (area(a) + area(b) - overlap(a, b))


small = st.builds(
    lambda x, y, w, h: (float(x), float(y), float(x + w), float(y + h)),
    *(st.integers(0, 8), st.integers(0, 8), st.integers(1, 8), st.integers(1, 8)),
)


def as_tensor(boxes: list[Box]) -> Tensor:
    return torch.tensor(boxes).reshape(-1, 4)


@settings(deadline=None, max_examples=80)
@given(
    st.lists(small, max_size=6),
    st.lists(st.tuples(small, st.booleans()), max_size=4),
    st.sampled_from([0.5, 0.25]),
)
def test_proposals_are_assigned_as_by_hand(
    proposals: list[Box], objects: list[tuple[Box, bool]], threshold: float
) -> None:
    crowd = torch.tensor([c for _, c in objects], dtype=torch.bool)
    answer = states(assign_proposals(as_tensor(proposals), as_tensor([b for b, _ in objects]), crowd, threshold))
    assert len(answer) == len(proposals)
    for proposal, state in zip(proposals, answer, strict=True):
        ious = {j: iou(proposal, box) for j, (box, is_crowd) in enumerate(objects) if not is_crowd}
        covers = [overlap(proposal, box) / area(proposal) for box, is_crowd in objects if is_crowd]
        if max(ious.values(), default=0) >= threshold:
            assert isinstance(state, int)
            assert ious[state] == pytest.approx(max(ious.values()))
        else:
            assert state == ("ignored" if max(covers, default=0) > 0.5 else "negative")


def test_crowd_hides_negatives_and_no_positives() -> None:
    proposals = as_tensor([(0, 0, 10, 10), (20, 20, 30, 30), (38, 20, 48, 30)])
    boxes = as_tensor([(15, 15, 45, 45), (0, 0, 10, 9)])
    answer = states(assign_proposals(proposals, boxes, torch.tensor([True, False]), 0.5))
    assert answer == [1, "ignored", "ignored"]  # 7 of 10 columns of the last one lie in the region
    answer = states(
        assign_proposals(proposals, as_tensor([(15, 15, 43, 45), (0, 0, 10, 9)]), torch.tensor([True, False]), 0.5)
    )
    assert answer == [1, "ignored", "negative"]  # exactly half is not mostly


def test_crowd_is_never_matched() -> None:
    box = as_tensor([(0, 0, 10, 10)])
    assert states(assign_proposals(box, box, torch.tensor([True]), 0.5)) == ["ignored"]
    assert states(assign_proposals(box, box, torch.tensor([False]), 0.5)) == [0]
