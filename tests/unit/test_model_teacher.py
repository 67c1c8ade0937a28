"""The T-head: which level a box is pooled from, and the losses that both heads share."""

import math
from typing import Literal

import pytest
import torch
from torch import Tensor
from torchvision.ops import roi_align

from mimicdet.config import ModelConfig, PyramidConfig, StudentConfig, TeacherConfig
from mimicdet.student import HeadOutput
from mimicdet.teacher import Teacher, head_losses

LEVELS = (2, 3, 4)
CHANNELS = 3


def teacher(*, class_space: Literal["softmax", "sigmoid"] = "softmax", **options) -> Teacher:
    torch.manual_seed(0)
    return Teacher(
        ModelConfig(
            class_space=class_space,
            pyramid=PyramidConfig(channels=CHANNELS),
            student=StudentConfig(head_width=6),
            teacher=TeacherConfig(pooled_size=3, **{"num_convs": 1, **options}),
        ),
        4,
    )


def boxes_on_levels() -> tuple[Tensor, Tensor, Tensor]:
    boxes = torch.tensor([[8.0, 8, 40, 24], [0, 0, 64, 48], [20, 4, 30, 40], [3, 3, 4, 4], [16, 16, 48, 32]])
    return boxes, torch.tensor([0, 0, 1, 1, 1]), torch.tensor([4, 2, 2, 3, 4])


def test_boxes_are_evaluated_as_one_by_one() -> None:
    head = teacher()
    pyramid = {level: torch.randn(2, CHANNELS, 48 >> level, 64 >> level) for level in LEVELS}
    boxes, image, level = boxes_on_levels()
    output = head(pyramid, boxes, image, level)
    assert output.logits.shape == (5, 5)
    for i in range(len(boxes)):
        own = pyramid[int(level[i])][image[i]][None]
        pooled = roi_align(own, [boxes[i : i + 1]], 3, 1 / 2 ** int(level[i]), sampling_ratio=2, aligned=True)
        feature = head.reg_hidden(pooled)
        assert torch.allclose(output.feature[i], feature[0], atol=1e-5)
        assert torch.allclose(output.deltas[i], head.deltas(feature.relu())[0], atol=1e-5)
        assert torch.allclose(output.logits[i], head.logits(head.cls_hidden(pooled))[0], atol=1e-5)


def test_boxes_are_pooled_where_they_lie() -> None:
    # Every cell says where its centre is, in pixels; a bin's mean then is the bin's centre.
    head = teacher()
    seen: list[Tensor] = []
    head.cls_hidden.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    pyramid = {}
    for level in LEVELS:
        y = (torch.arange(96 >> level) + 0.5) * 2**level
        x = (torch.arange(128 >> level) + 0.5) * 2**level
        y, x = torch.meshgrid(y, x, indexing="ij")
        pyramid[level] = torch.stack([x, y, torch.full_like(x, level)])[None]
    boxes, _, level = boxes_on_levels()
    boxes = boxes + 16  # off the border, where RoIAlign repeats the outermost cell
    head(pyramid, boxes, torch.zeros(5, dtype=torch.int64), level)
    (pooled,) = seen
    for i, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        for row in range(3):
            for column in range(3):
                center = [x1 + (x2 - x1) * (column + 0.5) / 3, y1 + (y2 - y1) * (row + 0.5) / 3, float(level[i])]
                assert pooled[i, :, row, column].tolist() == pytest.approx(center, abs=1e-3)


@pytest.mark.parametrize("num_convs", [0, 4])
def test_the_regression_branch_has_as_many_convolutions_as_wanted(num_convs: int) -> None:
    convs = [m for m in teacher(num_convs=num_convs).modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convs) == num_convs


@pytest.mark.parametrize(("class_space", "scores"), [("softmax", [0.2] * 5), ("sigmoid", [0.01] * 4)])
def test_scores_start_even_or_rare(class_space: Literal["softmax", "sigmoid"], scores: list[float]) -> None:
    pyramid = {level: 0.1 * torch.randn(2, CHANNELS, 48 >> level, 64 >> level) for level in LEVELS}
    logits = teacher(class_space=class_space)(pyramid, *boxes_on_levels()).logits
    started = logits.softmax(1) if class_space == "softmax" else logits.sigmoid()
    for row in started.tolist():
        assert row == pytest.approx(scores, rel=0.05)


def test_no_boxes_give_empty_answers_with_gradients() -> None:
    head = teacher()
    pyramid = {level: torch.randn(1, CHANNELS, 48 >> level, 64 >> level) for level in LEVELS}
    none = torch.zeros(0, dtype=torch.int64)
    output = head(pyramid, torch.zeros(0, 4), none, none)
    assert output.logits.shape == (0, 5)
    (output.logits.sum() + output.deltas.sum()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())


def test_head_losses_are_cross_entropy_and_l1_of_positives() -> None:
    torch.manual_seed(0)
    logits, deltas, wanted = torch.randn(6, 4), torch.randn(6, 4), torch.randn(6, 4)
    labels = torch.tensor([0, 3, 2, 1, 3, 3])
    wanted[1] = torch.inf  # a negative's target is never read
    cls_loss, box_loss = head_losses(HeadOutput(logits, deltas, torch.zeros(6, 1)), labels, wanted, 3)
    for i in range(6):
        row = logits[i].tolist()
        entropy = math.log(sum(math.exp(v) for v in row)) - row[int(labels[i])]
        assert float(cls_loss[i]) == pytest.approx(entropy, rel=1e-5)
        distance = sum(abs(a - b) for a, b in zip(deltas[i].tolist(), wanted[i].tolist(), strict=True))
        assert float(box_loss[i]) == pytest.approx(0 if labels[i] == 3 else distance, rel=1e-5)


def test_without_a_background_head_losses_are_summed_binary_cross_entropies() -> None:
    torch.manual_seed(0)
    logits, deltas, wanted = torch.randn(6, 3), torch.randn(6, 4), torch.randn(6, 4)
    labels = torch.tensor([0, 3, 2, 1, 3, 3])
    cls_loss, box_loss = head_losses(HeadOutput(logits, deltas, torch.zeros(6, 1)), labels, wanted, 3)
    for i in range(6):
        entropy = 0.0
        for c, logit in enumerate(logits[i].tolist()):
            score = 1 / (1 + math.exp(-logit))
            entropy -= math.log(score) if c == labels[i] else math.log(1 - score)
        assert float(cls_loss[i]) == pytest.approx(entropy, rel=1e-5)
        distance = sum(abs(a - b) for a, b in zip(deltas[i].tolist(), wanted[i].tolist(), strict=True))
        assert float(box_loss[i]) == pytest.approx(0 if labels[i] == 3 else distance, rel=1e-5)


def test_far_logits_of_either_class_space_have_finite_losses_and_gradients() -> None:
    for columns in (3, 4):
        logits = torch.full((4, columns), 500.0)
        logits[:, ::2] = -500
        logits.requires_grad_()
        labels = torch.tensor([0, 1, 2, 3])
        cls_loss, _ = head_losses(
            HeadOutput(logits, torch.zeros(4, 4), torch.zeros(4, 1)), labels, torch.zeros(4, 4), 3
        )
        assert cls_loss.isfinite().all()
        (gradient,) = torch.autograd.grad(cls_loss.sum(), [logits])
        assert gradient.isfinite().all()


def test_negatives_give_the_box_branch_no_gradient() -> None:
    deltas = torch.randn(2, 4, requires_grad=True)
    output = HeadOutput(torch.zeros(2, 3), deltas, torch.zeros(2, 1))
    _, box_loss = head_losses(output, torch.tensor([2, 1]), torch.full((2, 4), 9.0), 2)
    box_loss.sum().backward()
    assert deltas.grad is not None
    assert deltas.grad[0].tolist() == [0, 0, 0, 0]
    assert deltas.grad[1].tolist() == [-1, -1, -1, -1]
