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
halves = st.integers(0, 2 * PADDED).map(lambda n: n / 2)
sides = st.one_of(st.integers(1, 8), st.integers(1, 2 * PADDED)).map(lambda n: n / 2)
boxes_in_image = st.builds(lambda x, y, w, h: (x, y, x + w, y + h), halves, halves, sides, sides)


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


def own_level(box: Box, scale: float) -> int:
    """Sides [0, 2a) go to the lowest level, whose anchors have side a, then octave by octave, the rest on top."""
    for level in LEVELS[:-1]:
        if area(box) < (2 * scale * 2**level) ** 2:
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
            if candidate and level == own_level(box, scale):
                if in_region(center, box, center_ratio):
                    hits.append(p)
                distance = (center[0] - middle[0]) ** 2 + (center[1] - middle[1]) ** 2
                if distance < best:
                    nearest, best = p, distance
        for p in hits or [nearest]:
            claims[p].append(j)
    answer: list[int | str] = []
    for p, (level, center, candidate) in enumerate(positions):
        ignored = not candidate
        for j, box in enumerate(boxes):
            if crowd[j]:
                ignored |= in_region(center, box, 1)
            else:
                ignored |= level == own_level(box, scale) and in_region(center, box, ignore_ratio)
        if claims[p]:
            answer.append(min(claims[p], key=lambda j: (area(boxes[j]), j)))
        else:
            answer.append("ignored" if ignored else "negative")
    return answer


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.tuples(boxes_in_image, st.sampled_from([False, False, False, True])), max_size=6),
    st.integers(1, PADDED),
    st.integers(1, PADDED),
    st.sampled_from([2.0, 4.0]),
    st.sampled_from([(0.25, 0.25), (0.25, 0.5), (0.5, 1.0), (1.0, 1.0)]),
)
def test_anchors_are_assigned_as_by_hand(
    objects: list[tuple[Box, bool]], height: int, width: int, scale: float, ratios: tuple[float, float]
) -> None:
    setting = {
        "boxes": [box for box, _ in objects],
        "crowd": [crowd for _, crowd in objects],
        "height": height,
        "width": width,
        "scale": scale,
        "center_ratio": ratios[0],
        "ignore_ratio": ratios[1],
    }
    assert assigned(**setting) == expected(**setting)


def test_more_objects_than_positions() -> None:
    generator = torch.Generator().manual_seed(0)
    corners = torch.randint(0, 2 * PADDED - 20, (150, 2), generator=generator) / 2
    sizes = torch.randint(1, 40, (150, 2), generator=generator) / 2
    boxes = [tuple(box) for box in torch.cat([corners, corners + sizes], 1).tolist()]
    setting = {"boxes": boxes, "crowd": [False] * 150, "height": PADDED, "width": PADDED, "scale": 4.0}
    ratios = {"center_ratio": 0.25, "ignore_ratio": 0.25}
    answer = assigned(**setting, **ratios)
    assert answer == expected(**setting, **ratios)
    assert len(answer) == 64 + 16 + 4


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
