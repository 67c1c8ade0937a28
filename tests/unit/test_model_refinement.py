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


def loop_losses(sampled: list[int], objectness: Tensor, deltas: Tensor) -> tuple[float, float]:
    objectness, deltas = objectness.detach(), deltas.detach()
    entropy, distance = 0.0, 0.0
    for p in sampled:
        logit, stride = float(objectness[p]), 8 if p < 64 else 16
        index = p if p < 64 else p - 64
        columns = SIZE // stride
        center = ((index % columns + 0.5) * stride, (index // columns + 0.5) * stride)
        probability = 1 / (1 + math.exp(-logit))
        entropy -= math.log(probability if p in POSITIVES else 1 - probability)
        if p in POSITIVES:
            x1, y1, x2, y2 = BOXES[POSITIVES[p]].tolist()
            side = 4 * stride
            wanted = [
                ((x1 + x2) / 2 - center[0]) / side,
                ((y1 + y2) / 2 - center[1]) / side,
                math.log((x2 - x1) / side),
                math.log((y2 - y1) / side),
            ]
            distance += sum(abs(float(d) - w) for d, w in zip(deltas[p], wanted, strict=True))
    return entropy / len(sampled), distance / len(sampled)


def test_losses_over_all_anchors() -> None:
    (cls_loss, box_loss), objectness, deltas = losses(BOXES, NO_CROWD, num_samples=200)
    wanted = loop_losses(list(range(80)), objectness, deltas)
    assert (float(cls_loss.detach()), float(box_loss.detach())) == pytest.approx(wanted, rel=1e-5)


def test_losses_over_a_sample() -> None:
    (cls_loss, box_loss), objectness, deltas = losses(BOXES, NO_CROWD, num_samples=6, positive_fraction=0.5, key=11)
    rank = priority(torch.tensor(11), REFINEMENT, torch.arange(80)).tolist()
    order = sorted(range(80), key=lambda p: -rank[p])
    positives = [p for p in order if p in POSITIVES][:3]
    negatives = [p for p in order if p not in POSITIVES][:3]
    wanted = loop_losses(positives + negatives, objectness, deltas)
    assert (float(cls_loss.detach()), float(box_loss.detach())) == pytest.approx(wanted, rel=1e-5)


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


@pytest.mark.parametrize(
    ("boxes", "crowd"),
    [
        (torch.zeros(0, 4), torch.zeros(0, dtype=torch.bool)),
        (torch.tensor([[0.0, 0, 64, 64]]), torch.tensor([True])),
    ],
    ids=["nothing", "a crowd everywhere"],
)
def test_images_without_objects_have_finite_losses_and_gradients(boxes: Tensor, crowd: Tensor) -> None:
    (cls_loss, box_loss), objectness, deltas = losses(boxes, crowd)
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


@pytest.mark.parametrize(("nms_iou", "num", "pre"), [(0.8, 100, 100), (0.3, 100, 100), (0.3, 5, 100), (0.3, 100, 20)])
def test_proposals_are_greedy_nms_over_all_levels(nms_iou: float, num: int, pre: int) -> None:
    grid, objectness, deltas = make()
    refined, candidates = grid.anchors + 4 * deltas, grid.inside(SIZE, 40)
    order = sorted(candidates.nonzero().flatten().tolist(), key=lambda p: -float(objectness[p]))[:pre]
    kept: list[int] = []
    for p in order:
        if all(iou(refined[p].tolist(), refined[q].tolist()) <= nms_iou for q in kept):
            kept.append(p)
    config = RefinementConfig(nms_iou=nms_iou, num_proposals=num, pre_nms_topk=pre)
    answer = propose(objectness, refined, candidates, grid.level, config)
    assert answer.tolist() == kept[:num]


def test_top_positions_are_candidates_best_first() -> None:
    grid, objectness, _ = make()
    candidates = grid.inside(40, SIZE)
    wanted = sorted(candidates.nonzero().flatten().tolist(), key=lambda p: -float(objectness[p]))
    assert top_positions(objectness, candidates, 7).tolist() == wanted[:7]
    assert top_positions(objectness, candidates, 1000).tolist() == wanted
