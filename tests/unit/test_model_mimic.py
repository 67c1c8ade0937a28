"""The mimic losses against torch's cosine similarity."""

import pytest
import torch
import torch.nn.functional as F

from mimicdet.config import MimicConfig
from mimicdet.mimic import mimic_losses, warmup
from mimicdet.student import HeadOutput


def head(seed: int, num: int = 7) -> HeadOutput:
    generator = torch.Generator().manual_seed(seed)
    return HeadOutput(
        *(torch.randn(num, size, generator=generator).requires_grad_() for size in (5, 4, 16)),
    )


def test_losses_are_one_minus_cosine() -> None:
    student, teacher = head(0), head(1)
    cls_loss, reg_loss = mimic_losses(student, teacher, MimicConfig())
    assert torch.allclose(cls_loss, 1 - F.cosine_similarity(student.logits, teacher.logits), atol=1e-6)
    ours, theirs = F.relu(student.feature), F.relu(teacher.feature)
    assert torch.allclose(reg_loss, 1 - F.cosine_similarity(ours, theirs), atol=1e-6)


def test_features_may_be_mimicked_before_their_relu() -> None:
    student, teacher = head(0), head(1)
    _, loss = mimic_losses(student, teacher, MimicConfig(before_relu=True))
    assert torch.allclose(loss, 1 - F.cosine_similarity(student.feature, teacher.feature), atol=1e-6)


def test_the_weights_rise_linearly_from_the_first_step_on() -> None:
    config = MimicConfig(warmup_steps=3)
    assert [warmup(step, config) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert warmup(0, MimicConfig()) == 1


def test_centred_logits_do_not_see_a_shift() -> None:
    student, teacher = head(0), head(1)
    config = MimicConfig(centered_logits=True)
    cls_loss, _ = mimic_losses(student, teacher, config)
    a, b = (h.logits - h.logits.mean(1, keepdim=True) for h in (student, teacher))
    assert torch.allclose(cls_loss, 1 - F.cosine_similarity(a, b), atol=1e-6)
    shifted = HeadOutput(student.logits + torch.arange(7.0)[:, None], student.deltas, student.feature)
    assert torch.allclose(mimic_losses(shifted, teacher, config)[0], cls_loss, atol=1e-5)
    assert not torch.allclose(mimic_losses(shifted, teacher, MimicConfig())[0], cls_loss, atol=1e-2)


def test_equal_heads_have_no_loss_and_opposite_ones_two() -> None:
    student = head(0)
    opposite = HeadOutput(-student.logits, student.deltas, -student.feature)
    for other, value in ((student, 0.0), (opposite, 2.0)):
        for loss in mimic_losses(student, other, MimicConfig(before_relu=True)):
            assert loss.tolist() == pytest.approx([value] * 7, abs=1e-5)


@pytest.mark.parametrize("detach", [True, False])
def test_the_teacher_is_detached_or_not(detach: bool) -> None:
    student, teacher = head(0), head(1)
    sum(loss.sum() for loss in mimic_losses(student, teacher, MimicConfig(detach_teacher=detach))).backward()
    for ours, theirs in ((student.logits, teacher.logits), (student.feature, teacher.feature)):
        assert ours.grad is not None
        assert (ours.grad.abs().sum(1) > 0).all()
        assert (theirs.grad is None) if detach else bool((theirs.grad.abs().sum(1) > 0).all())
    assert student.deltas.grad is None


def test_rows_of_zeros_have_finite_losses_and_gradients() -> None:
    zeros = HeadOutput(*(torch.zeros(2, size, requires_grad=True) for size in (5, 4, 16)))
    for other in (head(0, 2), HeadOutput(torch.zeros(2, 5), torch.zeros(2, 4), torch.zeros(2, 16))):
        losses = mimic_losses(zeros, other, MimicConfig())
        assert [loss.tolist() for loss in losses] == [[1.0, 1.0], [1.0, 1.0]]
        for gradient in torch.autograd.grad(losses[0].sum() + losses[1].sum(), [zeros.logits, zeros.feature]):
            assert gradient.isfinite().all()


def test_no_boxes_give_an_empty_loss_with_a_gradient() -> None:
    student, teacher = head(0, 0), head(1, 0)
    losses = mimic_losses(student, teacher, MimicConfig())
    assert [loss.shape for loss in losses] == [(0,), (0,)]
    (losses[0].sum() + losses[1].sum()).backward()
    assert student.logits.grad is not None
