"""The detector as a caller sees it: conventions, and detections against loops."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mimicdet import MimicDet, ModelConfig
from mimicdet.anchors import clip, decode, make_grid
from mimicdet.config import (
    BackboneConfig,
    InferenceConfig,
    PyramidConfig,
    RefinementConfig,
    StudentConfig,
    TeacherConfig,
)
from mimicdet.interface import Detections
from mimicdet.student import Features

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_CLASSES = 3
TINY = ModelConfig(
    backbone=BackboneConfig(name="resnet18", width=8),
    pyramid=PyramidConfig(channels=8, max_level=5),
    refinement=RefinementConfig(num_samples=16, num_proposals=40),
    student=StudentConfig(head_width=8, offset_channels=(4, 4), num_samples=12),
    teacher=TeacherConfig(num_rois=10, num_convs=1, pooled_size=3),
    inference=InferenceConfig(topk=30, score_threshold=0.2),
)


def detector(**sections: Any) -> MimicDet:
    """A tiny detector with opinions: scores, boxes and offsets that differ from box to box."""
    torch.manual_seed(0)
    model = MimicDet(replace(TINY, **sections), NUM_CLASSES)
    heads = [model.student, model.teacher] if model.teacher else [model.student]
    for layer in (model.refinement.objectness, *(head.logits for head in heads)):
        nn.init.normal_(layer.weight)
        nn.init.zeros_(layer.bias)
    for layer in (model.refinement.deltas, *(head.deltas for head in heads)):
        nn.init.normal_(layer.weight, std=0.3)
    return model.eval()


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(256, (3, *size), generator=generator, dtype=torch.uint8) for size in ((64, 50), (40, 64))]


def target() -> dict[str, Tensor]:
    return {"boxes": torch.tensor([[5.0, 4, 36, 37]]), "labels": torch.tensor([1])}


def assert_same(ours: list[Detections], theirs: list[Detections]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys() == {"boxes", "scores", "labels"}
        assert all(torch.equal(a[name], b[name]) for name in a)


def iou(a: list[float], b: list[float]) -> float:
    overlap = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return overlap / (sum(areas) - overlap)


# ---- detections ----


@torch.no_grad()
def loop_detections(model: MimicDet, head: str, topk: int) -> list[list[tuple[float, int, list[float]]]]:
    """Score, label and box of each image's detections; the head is evaluated at every position."""
    config, box_std = model.config.inference, getattr(model.config, head).box_std
    batch = torch.zeros(2, 3, 64, 64)
    for i, image in enumerate(images()):
        normalised = (image / 255 - model.mean) / model.std
        batch[i, :, : image.shape[1], : image.shape[2]] = normalised
    pyramid = model.pyramid(model.backbone(batch))
    low = [pyramid[level] for level in (3, 4, 5)]
    grid = make_grid((3, 4, 5), low, model.config.anchors.scale)
    objectness, deltas = model.refinement(low)
    everywhere = torch.arange(len(grid.level))
    answer = []
    for i, image in enumerate(images()):
        height, width = image.shape[1:]
        size = torch.tensor([float(height), float(width)])
        index = torch.full_like(everywhere, i)
        refined = clip(decode(deltas[i], grid.anchors, model.config.refinement.box_std), *size)
        if head == "student":
            output = model.student(Features.pack(low), deltas, grid, index, everywhere)
        else:
            assert model.teacher is not None
            output = model.teacher({level: pyramid[level] for level in (2, 3, 4)}, refined, index, grid.level + 2)
        boxes = clip(decode(output.deltas, refined, box_std), *size).tolist()
        inside = [
            p
            for p in everywhere.tolist()
            if grid.cell[p, 0] * grid.stride[p] < width and grid.cell[p, 1] * grid.stride[p] < height
        ]
        found = []
        for p in sorted(inside, key=lambda p: -float(objectness[i, p]))[:topk]:
            exponents = [math.exp(v) for v in output.logits[p].tolist()]
            for label in range(NUM_CLASSES):
                rest = 1 + exponents[label] if model.config.class_space == "sigmoid" else sum(exponents)
                score = exponents[label] / rest
                if config.times_objectness:
                    score /= 1 + math.exp(-float(objectness[i, p]))
                if score > config.score_threshold:
                    found.append((score, label, boxes[p]))
        kept: list[tuple[float, int, list[float]]] = []
        for score, label, box in sorted(found, key=lambda item: -item[0]):
            if all(label != other or iou(box, b) <= config.nms_iou for _, other, b in kept):
                kept.append((score, label, box))
        answer.append(kept[: config.max_detections])
    return answer


def assert_equals_loops(detections: list[Detections], wanted: list[list[tuple[float, int, list[float]]]]) -> None:
    for found, expected in zip(detections, wanted, strict=True):
        assert found["labels"].tolist() == [label for _, label, _ in expected]
        assert found["scores"].tolist() == pytest.approx([score for score, _, _ in expected], abs=1e-5)
        boxes = torch.tensor([box for _, _, box in expected]).reshape(-1, 4)
        assert torch.allclose(found["boxes"], boxes, atol=1e-3)


OTHER: dict[str, Any] = {
    "class_space": "sigmoid",
    "refinement": replace(TINY.refinement, width=12, box_std=(0.5, 0.4, 0.3, 0.6)),
    "student": replace(TINY.student, offsets="analytic", kernel_sizes=(5, 3, 3), box_std=(0.2, 0.1, 0.3, 0.4)),
    "teacher": replace(TINY.teacher, box_std=(0.3, 0.1, 0.1, 0.2)),
}


@pytest.mark.parametrize(
    "inference",
    [
        InferenceConfig(topk=30, score_threshold=0.2),
        InferenceConfig(topk=1000, score_threshold=0.0, nms_iou=1.0, max_detections=1000),
        InferenceConfig(topk=30, score_threshold=0.1, nms_iou=0.3, max_detections=7, times_objectness=True),
    ],
    ids=["default", "everything", "times objectness"],
)
@pytest.mark.parametrize("sections", [{}, OTHER], ids=["softmax", "sigmoid and other options"])
def test_detections_equal_loops_over_positions(inference: InferenceConfig, sections: dict[str, Any]) -> None:
    model = detector(inference=inference, **sections)
    wanted = loop_detections(model, "student", inference.topk)
    assert all(len(found) >= 5 for found in wanted)  # the comparison has something to compare
    assert_equals_loops(model.detect(images()), wanted)


@pytest.mark.parametrize("sections", [{}, OTHER], ids=["softmax", "sigmoid and other options"])
def test_both_heads_answer_for_the_same_boxes(sections: dict[str, Any]) -> None:
    model = detector(**sections)
    heads = model.detect_heads(images(), topk=12)
    assert heads.keys() == {"student", "teacher", "student_topk"}
    assert_same(heads["student"], model.detect(images()))
    assert_equals_loops(heads["teacher"], loop_detections(model, "teacher", 12))
    assert_equals_loops(heads["student_topk"], loop_detections(model, "student", 12))


def test_without_a_teacher_the_student_is_the_only_head_and_detects_the_same() -> None:
    model, alone = detector(), detector(teacher=replace(TINY.teacher, enabled=False))
    own = alone.state_dict()
    alone.load_state_dict({name: value for name, value in model.state_dict().items() if name in own})
    heads = alone.detect_heads(images(), topk=12)
    assert heads.keys() == {"student"}
    assert_same(heads["student"], model.detect(images()))


def test_sigmoids_start_at_a_rare_foreground() -> None:
    torch.manual_seed(0)
    model = MimicDet(replace(TINY, class_space="sigmoid", inference=InferenceConfig(score_threshold=0.0)), NUM_CLASSES)
    for found in model.eval().detect_heads(images(), topk=12).values():
        assert all(((image["scores"] > 0.008) & (image["scores"] < 0.0125)).all() for image in found)


def test_heads_do_not_depend_on_how_small_the_images_are() -> None:
    # Both numbers exceed the 9 + 4 + 1 positions; a set's other images may well have more.
    assert "student_topk" in detector().detect_heads([images()[0][:, :24, :24]], topk=20)
    assert detector().detect_heads(images(), topk=30).keys() == {"student", "teacher"}


def test_detections_are_sorted_in_the_image_and_at_most_so_many() -> None:
    model = detector(inference=InferenceConfig(score_threshold=0.0, max_detections=9, nms_iou=1.0))
    for image, found in zip(images(), model(images()), strict=True):
        assert len(found["scores"]) == len(found["labels"]) == len(found["boxes"]) == 9
        assert found["scores"].tolist() == sorted(found["scores"].tolist(), reverse=True)
        x1, y1, x2, y2 = found["boxes"].unbind(1)
        height, width = image.shape[1:]
        assert ((x1 >= 0) & (y1 >= 0) & (x2 <= width) & (y2 <= height) & (x2 > x1) & (y2 > y1)).all()
        assert ((found["labels"] >= 0) & (found["labels"] < NUM_CLASSES)).all()


def test_no_score_above_the_threshold_gives_empty_detections() -> None:
    for found in detector(inference=InferenceConfig(score_threshold=0.9999))(images()):
        assert {name: tuple(v.shape) for name, v in found.items()} == {"boxes": (0, 4), "scores": (0,), "labels": (0,)}


def test_inference_runs_neither_the_teacher_nor_the_levels_that_only_it_reads() -> None:
    model = detector()
    ran: set[str] = set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.add(name))
    model(images())
    assert {"pyramid.lateral.3", "pyramid.output.3", "student", "refinement"} <= ran
    assert not [name for name in ran if name.startswith("teacher")]
    assert not ran & {"pyramid.lateral.2", "pyramid.output.2"}
    ran.clear()
    losses = model.train()(images(), [target(), target()])
    assert {"teacher", "pyramid.lateral.2"} <= ran
    assert isinstance(losses, dict)
    losses["teacher_cls"].sum().backward()
    assert model.pyramid.output["2"].weight.grad.abs().sum() > 0


# ---- conventions ----


def test_training_gives_losses_and_evaluation_detections() -> None:
    model = detector()
    detections = model(images(), [target(), target()])
    assert isinstance(detections, list)
    assert not any(v.requires_grad for found in detections for v in found.values())
    losses = model.train()(images(), [target(), target()])
    assert isinstance(losses, dict)
    assert sum(v.sum() for v in losses.values()).requires_grad


def test_bytes_and_numbers_from_0_to_1_are_the_same_image() -> None:
    model = detector()
    assert_same(model(images()), model([image / 255 for image in images()]))


def test_an_image_is_detected_as_in_any_batch_of_the_same_size() -> None:
    model = detector()
    (alone,) = model(images()[1:], pad_to=(64, 64))
    together = model(images(), pad_to=(64, 64))[1]
    assert torch.equal(alone["labels"], together["labels"])
    assert torch.allclose(alone["boxes"], together["boxes"], atol=1e-3)


def test_batches_are_padded_to_multiples_of_32_by_default() -> None:
    model = detector()
    small = [image[:, :33, :40] for image in images()]
    assert_same(model(small), model(small, pad_to=(64, 64)))


def test_what_is_in_the_padding_is_never_detected_nor_trained_on() -> None:
    model = detector(inference=InferenceConfig(topk=1000, score_threshold=0.0, max_detections=1000, nms_iou=1.0))
    (found,) = model([images()[0][:, :24, :24]], pad_to=(96, 96))
    assert len(found["boxes"]) == (9 + 4 + 1) * NUM_CLASSES
    assert float(found["boxes"].max()) <= 24


@pytest.mark.parametrize("training", [True, False])
def test_what_cannot_be_batched_is_refused(training: bool) -> None:
    model = detector().train(training)
    with pytest.raises(ValueError, match="empty list"):
        model([], [])
    for pad_to in ((64, 60), (60, 64)):
        with pytest.raises(ValueError, match=r"pad_to .* smaller than the largest image, \(64, 64\)"):
            model(images(), [target(), target()], pad_to=pad_to)


def test_training_needs_a_target_for_every_image() -> None:
    model = detector().train()
    with pytest.raises(ValueError, match="targets"):
        model(images())
    for wrong in ([target()], [target()] * 3):
        with pytest.raises(ValueError, match="found 2 images"):
            model(images(), wrong)


def test_a_detector_has_at_least_one_class() -> None:
    with pytest.raises(ValueError, match="num_classes"):
        MimicDet(TINY, 0)


@pytest.mark.parametrize("part", ["refinement", "student", "teacher"])
def test_broken_weights_show_in_the_losses_rather_than_as_a_crash(part: str) -> None:
    model = detector()
    with torch.no_grad():
        for parameter in getattr(model, part).parameters():
            parameter.fill_(torch.nan)
    losses = model.train()(images(), [target(), target()])
    assert not torch.stack(list(losses.values())).isfinite().all()
    assert len(model.eval().detect_heads(images(), topk=12)["teacher"]) == 2


def test_weights_travel_as_a_state_dict() -> None:
    source, copy = detector(), MimicDet(TINY, NUM_CLASSES).eval()
    copy.load_state_dict(source.state_dict())
    assert_same(copy(images()), source(images()))


def test_what_the_class_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="detector fcos is a Baseline, expected mimicdet"):
        MimicDet(replace(TINY, detector="fcos"), NUM_CLASSES)
    with pytest.raises(ValueError, match=r"weights w\.safetensors: load a detector's weights with"):
        MimicDet(replace(TINY, weights="w.safetensors"), NUM_CLASSES)
    for dtype in (torch.float16, torch.bfloat16):
        with pytest.raises(ValueError, match=f"the detector's weights are {dtype}, expected fp32"):
            detector().to(dtype).detect(images())


def test_boxes_of_long_images_keep_a_width() -> None:
    boxes = torch.tensor([[20010.0, 0, 20020, 10], [19999.9999, 3, 20000, 3]])
    x1, y1, x2, y2 = clip(boxes, torch.tensor(400.0), torch.tensor(20000.0)).unbind(1)
    assert (x2 > x1).all()
    assert (y2 > y1).all()
    assert (x2 <= 20000).all()
