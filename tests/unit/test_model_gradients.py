"""The detector in fp64: analytic gradients against central differences of the losses."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mimicdet import MimicDet, ModelConfig
from mimicdet.config import (
    BackboneConfig,
    MimicConfig,
    PyramidConfig,
    RefinementConfig,
    StudentConfig,
    TeacherConfig,
)

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_CLASSES = 3
TINY = ModelConfig(
    backbone=BackboneConfig(name="resnet18", width=8),
    pyramid=PyramidConfig(channels=8, max_level=5),
    refinement=RefinementConfig(num_samples=16, num_proposals=40, pre_nms_topk=60),
    student=StudentConfig(head_width=8, offset_channels=(4, 4), num_samples=12),
    teacher=TeacherConfig(num_rois=10, num_convs=1, pooled_size=3),
)
SIGMOID_FOCAL: dict[str, Any] = {
    "class_space": "sigmoid",
    "refinement": replace(TINY.refinement, loss="focal", box_std=(0.5, 0.5, 0.4, 0.4)),
}
OPTIONS = pytest.mark.parametrize("sections", [{}, SIGMOID_FOCAL], ids=["default", "sigmoid and focal"])
EPS = 1e-6
PER_PART = 5


def detector(**sections: Any) -> MimicDet:
    """A tiny detector in fp64 whose every layer matters: what starts at or near zero is drawn anew."""
    torch.manual_seed(5)
    model = MimicDet(replace(TINY, **sections), NUM_CLASSES)
    heads = [model.student, model.teacher] if model.teacher else [model.student]
    for layer in (model.refinement.objectness, *(head.logits for head in heads)):
        nn.init.normal_(layer.weight, std=0.5)
        nn.init.zeros_(layer.bias)
    for layer in (model.refinement.deltas, *(head.deltas for head in heads)):
        nn.init.normal_(layer.weight, std=0.1)
    for sampler in model.student.samplers:
        nn.init.normal_(sampler.bias, std=0.5)
        if len(sampler.micro):
            nn.init.normal_(sampler.micro[-1].weight, std=0.5)
    return model.double().train()


def losses(model: MimicDet) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, height, 64, generator=generator, dtype=torch.float64) for height in (64, 40)]
    targets = [
        {"boxes": [[5.0, 4, 36, 37], [20, 18, 52, 50], [40, 8, 44, 13]], "labels": [1, 2, 0]},
        {"boxes": [[28.0, 6, 60, 36], [2, 3, 33, 34]], "labels": [2, 1]},
    ]
    truth = [
        {"boxes": torch.tensor(t["boxes"]), "labels": torch.tensor(t["labels"]), "key": torch.tensor(1000 + i)}
        for i, t in enumerate(targets)
    ]
    return model.loss_terms(images, truth, pad_to=(64, 64)).losses


@OPTIONS
def test_losses_of_a_model_in_fp64_are_fp64(sections: dict[str, Any]) -> None:
    model = detector(**sections)
    answer = losses(model)
    assert {value.dtype for value in answer.values()} == {torch.float64}
    assert all(value.isfinite().all() for value in answer.values())
    # They are those of fp32 up to its precision, and hold more than fp32 does.
    rough = losses(model.float())
    for name, value in answer.items():
        assert torch.allclose(rough[name].double(), value, rtol=1e-4, atol=1e-5), name
    assert any(not torch.equal(value.float().double(), value) for value in answer.values())


def check(model: MimicDet, names: Sequence[str], parts: Sequence[str]) -> None:
    """Compare the gradient of the summed losses at the entries of each part whose gradients are the largest.

    Mined boxes, proposals and signs are choices: they have no gradient, and are the same on both sides of so small a
    step. Where they were not, the two one-sided differences would tell.
    """

    def value() -> Tensor:
        answer = losses(model)
        return torch.stack([answer[name].sum() for name in names]).sum()

    for part in parts:
        parameters = [p for name, p in model.named_parameters() if name.startswith(part)]
        assert parameters, part
        gradients = torch.autograd.grad(value(), parameters)
        # The largest of each parameter in turn, so that weights and biases of all layers of a part take part.
        entries = [(p, g, int(i)) for p, g in zip(parameters, gradients, strict=True) for i in _largest(g)]
        entries.sort(key=lambda entry: -abs(float(entry[1].flatten()[entry[2]])))
        assert len(entries) >= PER_PART, part
        with torch.no_grad():
            here = float(value())
            for parameter, gradient, index in entries[:: max(1, len(entries) // PER_PART)][:PER_PART]:
                entry = parameter.view(-1)[index]
                start = float(entry)
                entry.fill_(start + EPS)
                above = float(value())
                entry.fill_(start - EPS)
                below = float(value())
                entry.fill_(start)
                analytic = float(gradient.flatten()[index])
                assert (above - here) / EPS == pytest.approx((here - below) / EPS, rel=1e-2), part
                assert (above - below) / (2 * EPS) == pytest.approx(analytic, rel=1e-4), part


def _largest(gradient: Tensor) -> list[int]:
    """Up to PER_PART entries of the largest gradients; too small ones drown in the rounding of the losses."""
    best = gradient.abs().flatten().topk(min(PER_PART, gradient.numel()))
    return best.indices[best.values > 1e-4].tolist()


STUDENT = (
    *("samplers.0.micro", "samplers.0.weight", "samplers.0.bias", "samplers.1"),
    *("cls_hidden", "reg_hidden", "logits", "deltas"),
)


@OPTIONS
@pytest.mark.parametrize("offsets", ["learned", "analytic_learned"])
@pytest.mark.slow
def test_the_student_follows_its_own_losses_and_the_mimic_losses(sections: dict[str, Any], offsets: str) -> None:
    # Nothing is detached between these losses and the student's own weights.
    model = detector(student=replace(TINY.student, offsets=offsets), **sections)
    names = ("student_cls", "student_box", "mimic_cls", "mimic_reg")
    check(model, names, [f"student.{part}" for part in STUDENT])


@pytest.mark.parametrize(
    "mimic", [MimicConfig(), MimicConfig(centered_logits=True, before_relu=True, reg_positives_only=True, num_boxes=14)]
)
@pytest.mark.slow
def test_the_student_follows_each_mimic_loss(mimic: MimicConfig) -> None:
    model = detector(mimic=mimic)
    check(model, ["mimic_cls"], ["student.cls_hidden", "student.logits", "student.samplers"])
    check(model, ["mimic_reg"], ["student.reg_hidden", "student.samplers"])


@OPTIONS
def test_the_teacher_follows_its_own_losses(sections: dict[str, Any]) -> None:
    model = detector(**sections)
    parts = ("cls_hidden", "logits", "reg_hidden", "deltas")
    check(model, ["teacher_cls", "teacher_box"], [f"teacher.{part}" for part in parts])


@pytest.mark.slow
def test_the_teacher_follows_the_mimic_losses_unless_detached() -> None:
    model = detector(mimic=MimicConfig(detach_teacher=False))
    check(model, ["mimic_cls", "mimic_reg"], ["teacher.cls_hidden", "teacher.logits", "teacher.reg_hidden"])
    # Levels that only the teacher reads.
    check(model, ["mimic_cls", "mimic_reg"], ["pyramid.output.2", "pyramid.lateral.2"])


@OPTIONS
@pytest.mark.slow
def test_the_refinement_follows_its_own_losses_down_to_the_images(sections: dict[str, Any]) -> None:
    parts = ("refinement.conv", "refinement.objectness", "refinement.deltas", "pyramid.output.3", "backbone.stages.0")
    check(detector(**sections), ["refine_cls", "refine_box"], parts)


@OPTIONS
@pytest.mark.parametrize("offsets", ["learned", "analytic_learned", "none"])
def test_nothing_stops_where_nothing_is_detached(sections: dict[str, Any], offsets: str) -> None:
    # Without the teacher, whose RoIAlign has no gradient for where it pools, all of the detector is differentiable.
    sections = {**sections, "refinement": replace(sections.get("refinement", TINY.refinement), detach_boxes=False)}
    model = detector(
        student=replace(TINY.student, offsets=offsets, detach_offsets=False),
        teacher=replace(TINY.teacher, enabled=False),
        **sections,
    )
    check(
        model,
        ["student_cls", "student_box"],
        ["refinement.conv", "refinement.deltas", "student.samplers", "pyramid.lateral", "backbone.stages.1"],
    )
