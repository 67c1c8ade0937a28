"""The refinement module, its losses and its proposals against plain loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mimicdet.anchors import Grid, make_grid
from mimicdet.config import RefinementConfig
from mimicdet.refinement import Refinement, propose, refinement_losses, top_positions
from mimicdet.sampling import REFINEMENT, priority

LEVELS = (3, 4)
SIZE = 64
NO_CROWD = torch.tensor([False, False])


def make(seed: int = 0) -> tuple[Grid, Tensor, Tensor]:
    grid = make_grid(LEVELS, [torch.zeros(1, 1, SIZE >> level, SIZE >> level) for level in LEVELS], 4)
    generator = torch.Generator().manual_seed(seed)
    num = len(grid.level)
    return grid, torch.randn(num, generator=generator), torch.randn(num, 4, generator=generator)


def losses(boxes: Tensor, crowd: Tensor, *, inside: tuple[int, int] = (SIZE, SIZE), key: int = 3, **options):
    grid, objectness, deltas = make()
    deltas.requires_grad_()
    objectness.requires_grad_()
    answer = refinement_losses(
        objectness,
        deltas,
        grid,
        grid.inside(*inside),
        boxes,
        crowd,
        torch.tensor(key),
        4,
        RefinementConfig(**options),
    )
    return answer, objectness, deltas


def test_positions_are_in_the_grids_order() -> None:
    torch.manual_seed(0)
    module = Refinement(3, RefinementConfig())
    maps = [torch.randn(2, 3, SIZE >> level, SIZE >> level) for level in LEVELS]
    grid = make_grid(LEVELS, maps, 4)
    objectness, deltas = module(maps)
    assert (objectness.shape, deltas.shape) == ((2, 80), (2, 80, 4))
    for p in (0, 9, 63, 64, 70, 79):
        x, y = (int(v) for v in grid.cell[p])
        hidden = F.relu(module.conv(maps[int(grid.level[p])]))
        assert torch.allclose(objectness[:, p], module.objectness(hidden)[:, 0, y, x])
        assert torch.allclose(deltas[:, p], module.deltas(hidden)[:, :, y, x])


# On P3 (anchors of 32 px): the first box holds the centres (28, 28) .. (36, 36), the second is nearest to (60, 4).
BOXES = torch.tensor([[18.0, 18.0, 46.0, 46.0], [59.0, 2.0, 62.0, 9.0]])
POSITIVES = {8 * 3 + 3: 0, 8 * 3 + 4: 0, 8 * 4 + 3: 0, 8 * 4 + 4: 0, 7: 1}


def wanted_deltas(p: int, box: list[float], std: tuple[float, ...]) -> list[float]:
    stride, index, columns = (8, p, SIZE // 8) if p < 64 else (16, p - 64, SIZE // 16)
    center = ((index % columns + 0.5) * stride, (index // columns + 0.5) * stride)
    x1, y1, x2, y2 = box
    side = 4 * stride
    return [
        ((x1 + x2) / 2 - center[0]) / side / std[0],
        ((y1 + y2) / 2 - center[1]) / side / std[1],
        math.log((x2 - x1) / side) / std[2],
        math.log((y2 - y1) / side) / std[3],
    ]


def loop_sums(
    anchors: list[int], objectness: Tensor, deltas: Tensor, std: tuple[float, ...], *, focal: bool = False
) -> tuple[float, float]:
    """Classification and box losses summed over the given anchors."""
    objectness, deltas = objectness.detach(), deltas.detach()
    entropy, distance = 0.0, 0.0
    for p in anchors:
        probability = 1 / (1 + math.exp(-float(objectness[p])))
        right = probability if p in POSITIVES else 1 - probability
        share = (0.25 if p in POSITIVES else 0.75) * (1 - right) ** 2 if focal else 1
        entropy -= share * math.log(right)
        if p in POSITIVES:
            wanted = wanted_deltas(p, BOXES[POSITIVES[p]].tolist(), std)
            distance += sum(abs(float(d) - w) for d, w in zip(deltas[p], wanted, strict=True))
    return entropy, distance


def loop_losses(
    sampled: list[int], objectness: Tensor, deltas: Tensor, std: tuple[float, ...] = (1, 1, 1, 1)
) -> tuple[float, float]:
    entropy, distance = loop_sums(sampled, objectness, deltas, std)
    return entropy / len(sampled), distance / len(sampled)


def values(answer: tuple[Tensor, Tensor]) -> tuple[float, float]:
    return float(answer[0].detach()), float(answer[1].detach())


def test_losses_over_all_anchors() -> None:
    answer, objectness, deltas = losses(BOXES, NO_CROWD, num_samples=200)
    wanted = loop_losses(list(range(80)), objectness, deltas)
    assert values(answer) == pytest.approx(wanted, rel=1e-5)


def test_losses_over_a_sample() -> None:
    answer, objectness, deltas = losses(BOXES, NO_CROWD, num_samples=6, positive_fraction=0.5, key=11)
    names = [
        (level << 40) + (row << 20) + column
        for level, side in ((3, 8), (4, 4))
        for row in range(side)
        for column in range(side)
    ]
    rank = priority(torch.tensor(11), REFINEMENT, torch.tensor(names)).tolist()
    order = sorted(range(80), key=lambda p: -rank[p])
    positives = [p for p in order if p in POSITIVES][:3]
    negatives = [p for p in order if p not in POSITIVES][:3]
    wanted = loop_losses(positives + negatives, objectness, deltas)
    assert values(answer) == pytest.approx(wanted, rel=1e-5)


STD = (0.1, 0.5, 0.2, 4.0)


def test_targets_are_divided_by_their_deviation() -> None:
    answer, objectness, deltas = losses(BOXES, NO_CROWD, num_samples=200, box_std=STD)
    assert values(answer) == pytest.approx(loop_losses(list(range(80)), objectness, deltas, STD), rel=1e-5)


@pytest.mark.parametrize("std", [(1.0, 1.0, 1.0, 1.0), STD])
def test_focal_loss_counts_every_anchor_and_divides_by_the_positives(std: tuple[float, float, float, float]) -> None:
    # num_samples and key are of the other loss.
    answer, objectness, deltas = losses(BOXES, NO_CROWD, loss="focal", num_samples=1, box_std=std)
    entropy, distance = loop_sums(list(range(80)), objectness, deltas, std, focal=True)
    assert values(answer) == pytest.approx((entropy / len(POSITIVES), distance / len(POSITIVES)), rel=1e-5)
    other, _, _ = losses(BOXES, NO_CROWD, loss="focal", key=99, box_std=std)
    assert values(other) == values(answer)


@pytest.mark.parametrize("loss", ["sampled", "focal"])
def test_what_is_neither_positive_nor_negative_is_not_charged(loss: str) -> None:
    # A third box is a crowd over the lower half, without the positives in it; the first box has a ring.
    boxes = torch.cat([BOXES, torch.tensor([[0.0, 32, 64, 64]])])
    crowd = torch.tensor([False, False, True])
    answer, objectness, deltas = losses(boxes, crowd, loss=loss, num_samples=200, ignore_ratio=0.9)
    ring = {8 * y + x for y in (2, 3, 4, 5) for x in (2, 3, 4, 5)}
    hidden = {*range(32, 64), *range(72, 80)}
    counted = [p for p in range(80) if p in POSITIVES or p not in ring | hidden]
    assert 0 < len(counted) < 80 - len(hidden)
    sums = loop_sums(counted, objectness, deltas, (1, 1, 1, 1), focal=loss == "focal")
    num = len(POSITIVES) if loss == "focal" else len(counted)
    assert values(answer) == pytest.approx((sums[0] / num, sums[1] / num), rel=1e-5)
    (answer[0] + answer[1]).backward()
    assert objectness.grad is not None
    assert objectness.grad.nonzero().flatten().tolist() == counted


@pytest.mark.parametrize("seed", range(20))
def test_a_sample_never_holds_what_lies_in_a_crowd_or_in_padding(seed: int) -> None:
    boxes = torch.cat([BOXES, torch.tensor([[0.0, 32, 64, 64]])])
    (cls_loss, _), objectness, _ = losses(
        boxes, torch.tensor([False, False, True]), key=seed, num_samples=16, inside=(SIZE, 40)
    )
    cls_loss.backward()
    assert objectness.grad is not None
    sampled = set(objectness.grad.nonzero().flatten().tolist())
    assert len(sampled) == 16
    grid, _, _ = make()
    for p in sampled - {*POSITIVES, 4}:
        x, y = grid.centers[p].tolist()
        assert x < 40 + float(grid.stride[p]) / 2
        assert y < 32


@pytest.mark.parametrize("loss", ["sampled", "focal"])
def test_more_padding_changes_neither_losses_nor_proposals(loss: str) -> None:
    options = {"loss": loss, "num_samples": 200}
    small, objectness, deltas = make()
    large = make_grid(LEVELS, [torch.zeros(1, 1, 96 >> level, 128 >> level) for level in LEVELS], 4)
    height, width = 56, 40
    # What stands in the padding differs from all that is in the image, and would be seen at once.
    far_objectness, far_deltas = torch.full((len(large.level),), 50.0), torch.full((len(large.level), 4), 9.0)
    places = {(int(lvl), *cell): p for p, (lvl, cell) in enumerate(zip(large.level, large.cell.tolist(), strict=True))}
    moved = [places[int(lvl), *cell] for lvl, cell in zip(small.level, small.cell.tolist(), strict=True)]
    inside = [p for p in range(80) if small.inside(height, width)[p]]
    index = torch.tensor([moved[p] for p in inside])
    far_objectness[index], far_deltas[index] = objectness[inside], deltas[inside]

    config = RefinementConfig(**options)
    answers, proposals = [], []
    for grid, logits, regression in ((small, objectness, deltas), (large, far_objectness, far_deltas)):
        candidates = grid.inside(height, width)
        answer = refinement_losses(logits, regression, grid, candidates, BOXES, NO_CROWD, torch.tensor(0), 4, config)
        answers.append(values(answer))
        proposals.append(propose(logits, grid.anchors + 4 * regression, candidates, grid.level, config).tolist())
    assert answers[1] == pytest.approx(answers[0], rel=1e-6)
    assert proposals[1] == [moved[p] for p in proposals[0]]


def test_only_sampled_anchors_get_a_gradient() -> None:
    (cls_loss, box_loss), objectness, deltas = losses(BOXES, NO_CROWD, num_samples=200, inside=(SIZE, 40))
    (cls_loss + box_loss).backward()
    grid, _, _ = make()
    assert objectness.grad is not None
    assert deltas.grad is not None
    assert torch.equal(objectness.grad != 0, grid.inside(SIZE, 40))
    # The second box lies outside of these 40 columns; it falls to the nearest candidate, (36, 4).
    rows = {*POSITIVES, 4} - {7}
    assert set(deltas.grad.abs().sum(1).nonzero().flatten().tolist()) == rows


@pytest.mark.parametrize("loss", ["sampled", "focal"])
@pytest.mark.parametrize(
    ("boxes", "crowd"),
    [
        (torch.zeros(0, 4), torch.zeros(0, dtype=torch.bool)),
        (torch.tensor([[0.0, 0, 64, 64]]), torch.tensor([True])),
    ],
    ids=["nothing", "a crowd everywhere"],
)
def test_images_without_objects_have_finite_losses_and_gradients(boxes: Tensor, crowd: Tensor, loss: str) -> None:
    (cls_loss, box_loss), objectness, deltas = losses(boxes, crowd, loss=loss)
    assert float(box_loss.detach()) == 0
    assert (float(cls_loss.detach()) > 0) == (len(boxes) == 0)
    (cls_loss + box_loss).backward()
    for gradient in (objectness.grad, deltas.grad):
        assert gradient is not None
        assert gradient.isfinite().all()


def iou(a: list[float], b: list[float]) -> float:
    overlap = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return overlap / (sum(areas) - overlap)


@pytest.mark.parametrize("per_level", [False, True])
@pytest.mark.parametrize(("nms_iou", "num", "pre"), [(0.8, 100, 100), (0.3, 100, 100), (0.3, 5, 100), (0.3, 100, 20)])
def test_proposals_are_greedy_nms_over_all_levels_or_each(nms_iou: float, num: int, pre: int, per_level: bool) -> None:
    grid, objectness, deltas = make()
    refined, candidates = grid.anchors + 4 * deltas, grid.inside(SIZE, 40)
    order = sorted(candidates.nonzero().flatten().tolist(), key=lambda p: -float(objectness[p]))[:pre]
    kept: list[int] = []
    for p in order:
        rivals = [q for q in kept if not per_level or grid.level[q] == grid.level[p]]
        if all(iou(refined[p].tolist(), refined[q].tolist()) <= nms_iou for q in rivals):
            kept.append(p)
    config = RefinementConfig(nms_iou=nms_iou, num_proposals=num, pre_nms_topk=pre, nms_per_level=per_level)
    answer = propose(objectness, refined, candidates, grid.level, config)
    assert answer.tolist() == kept[:num]


def test_equal_boxes_of_two_levels_are_both_proposed_only_where_each_level_has_its_own_nms() -> None:
    grid, objectness, _ = make()
    refined = torch.tensor([[8.0, 8, 40, 40]]).expand(80, 4)
    best = [int(objectness[:64].argmax()), 64 + int(objectness[64:].argmax())]
    best.sort(key=lambda p: -float(objectness[p]))
    for per_level, wanted in ((False, best[:1]), (True, best)):
        config = RefinementConfig(nms_per_level=per_level)
        assert propose(objectness, refined, grid.inside(SIZE, SIZE), grid.level, config).tolist() == wanted


@pytest.mark.parametrize(("width", "channels"), [(None, 3), (7, 7)])
def test_the_hidden_convolution_is_as_wide_as_wanted(width: int | None, channels: int) -> None:
    module = Refinement(3, RefinementConfig(width=width))
    assert (module.conv.in_channels, module.conv.out_channels) == (3, channels)
    objectness, deltas = module([torch.randn(2, 3, 4, 4)])
    assert (objectness.shape, deltas.shape) == ((2, 16), (2, 16, 4))


@pytest.mark.parametrize(("loss", "score"), [("sampled", 0.5), ("focal", 0.01)])
def test_objectness_starts_where_its_loss_wants_it(loss: str, score: float) -> None:
    torch.manual_seed(0)
    objectness, _ = Refinement(3, RefinementConfig(loss=loss))([torch.randn(1, 3, 16, 16)])
    assert objectness.sigmoid().detach().flatten().tolist() == pytest.approx([score] * 256, rel=0.01)


def test_top_positions_are_candidates_best_first() -> None:
    grid, objectness, _ = make()
    candidates = grid.inside(40, SIZE)
    wanted = sorted(candidates.nonzero().flatten().tolist(), key=lambda p: -float(objectness[p]))
    assert top_positions(objectness, candidates, 7).tolist() == wanted[:7]
    assert top_positions(objectness, candidates, 1000).tolist() == wanted


def test_a_sample_does_not_depend_on_padding() -> None:
    """The same anchors of the same image, on a grid that is wider for another image's sake."""
    answers = []
    for width in (SIZE, 2 * SIZE):
        grid = make_grid(LEVELS, [torch.zeros(1, 1, SIZE >> level, width >> level) for level in LEVELS], 4)
        place = torch.sin(grid.level * 100 + grid.cell @ torch.tensor([1.0, 10.0]))
        config = RefinementConfig(num_samples=6)
        candidates = grid.inside(SIZE, SIZE)
        deltas = place[:, None].expand(-1, 4)
        key = torch.tensor(5)
        answers.append(refinement_losses(place, deltas, grid, candidates, BOXES, NO_CROWD, key, 4, config))
    for ours, theirs in zip(*answers, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
