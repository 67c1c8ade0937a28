"""The detector's losses against loops over boxes, and which weights they move."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mimicdet import MimicDet, ModelConfig
from mimicdet.anchors import make_grid
from mimicdet.config import (
    BackboneConfig,
    MimicConfig,
    PyramidConfig,
    RefinementConfig,
    StudentConfig,
    TeacherConfig,
)
from mimicdet.interface import LossTerms
from mimicdet.sampling import TEACHER, priority
from mimicdet.student import Features

Box = list[float]

NUM_CLASSES = 3
SIZE = 64
TINY = ModelConfig(
    backbone=BackboneConfig(name="resnet18", width=8),
    pyramid=PyramidConfig(channels=8, max_level=5),
    refinement=RefinementConfig(num_samples=16, num_proposals=40, pre_nms_topk=60),
    student=StudentConfig(head_width=8, offset_channels=(4, 4), num_samples=12),
    teacher=TeacherConfig(num_rois=10, num_convs=1, pooled_size=3),
)
LOSSES = {
    *("refine_cls", "refine_box", "student_cls", "student_box"),
    *("teacher_cls", "teacher_box", "mimic_cls", "mimic_reg"),
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    # On a busy machine, threads that wait for each other over tiny tensors take fifty times as long.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def detector(config: ModelConfig = TINY, **sections: Any) -> MimicDet:
    """A tiny detector whose every layer matters: what starts at or near zero is drawn anew."""
    torch.manual_seed(5)  # a start in which both images have positives and no teacher row is dead
    model = MimicDet(replace(config, **sections), NUM_CLASSES)
    for layer in (model.refinement.objectness, model.student.logits, model.teacher.logits):
        nn.init.normal_(layer.weight, std=0.5)
    for layer in (model.refinement.deltas, model.student.deltas, model.teacher.deltas):
        nn.init.normal_(layer.weight, std=0.1)
    for sampler in model.student.samplers:
        nn.init.normal_(sampler.bias, std=0.5)
        if len(sampler.micro):
            nn.init.normal_(sampler.micro[-1].weight)
    return model.train()


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(256, (3, h, 64), generator=generator, dtype=torch.uint8) for h in (64, 40, 56)]


def targets() -> list[dict[str, Tensor]]:
    """Two objects near to anchors and one tiny one; a crowd and an object; nothing."""
    objects = [
        ([[5.0, 4, 36, 37], [20, 18, 52, 50], [40, 8, 44, 13]], [1, 2, 0], [False, False, False]),
        ([[0.0, 0, 40, 40], [28, 6, 60, 36]], [0, 2], [True, False]),
        ([], [], []),
    ]
    return [
        {
            "boxes": torch.tensor(boxes).reshape(-1, 4),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "iscrowd": torch.tensor(crowd, dtype=torch.bool),
            "key": torch.tensor(1000 + i),
        }
        for i, (boxes, labels, crowd) in enumerate(objects)
    ]


def terms(model: MimicDet, which: tuple[int, ...] = (0, 1, 2)) -> LossTerms:
    every = images(), targets()
    return model.loss_terms([every[0][i] for i in which], [every[1][i] for i in which], pad_to=(SIZE, SIZE))


# ---- the same losses, box by box ----


def overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def iou(a: Box, b: Box) -> float:
    return overlap(a, b) / (area(a) + area(b) - overlap(a, b))


def encoded(box: Box, anchor: Box, std: tuple[float, ...]) -> Box:
    (w, h), (aw, ah) = ((b[2] - b[0], b[3] - b[1]) for b in (box, anchor))
    shift_x = (box[0] + box[2] - anchor[0] - anchor[2]) / 2 / aw
    shift_y = (box[1] + box[3] - anchor[1] - anchor[3]) / 2 / ah
    return [shift_x / std[0], shift_y / std[1], math.log(w / aw) / std[2], math.log(h / ah) / std[3]]


def refine(anchor: Box, deltas: Box, height: int, width: int) -> Box:
    w, h = anchor[2] - anchor[0], anchor[3] - anchor[1]
    x = (anchor[0] + anchor[2]) / 2 + deltas[0] * w
    y = (anchor[1] + anchor[3]) / 2 + deltas[1] * h
    w, h = w * math.exp(deltas[2]), h * math.exp(deltas[3])
    return [max(0.0, x - w / 2), max(0.0, y - h / 2), min(float(width), x + w / 2), min(float(height), y + h / 2)]


def entropy(logits: list[float], label: int) -> float:
    return math.log(sum(math.exp(v) for v in logits)) - logits[label]


def cosine_loss(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return 1 - dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def centered(row: list[float]) -> list[float]:
    return [v - sum(row) / len(row) for v in row]


def matched(box: Box, target: Mapping[str, Tensor], threshold: float) -> int | str | None:
    """Index of the object that a box answers for, None for background, `ignored` in a crowd."""
    best, best_iou = None, 0.0
    for j, other in enumerate(target["boxes"].tolist()):
        if not target["iscrowd"][j] and iou(box, other) > best_iou:
            best, best_iou = j, iou(box, other)
    if best_iou >= threshold:
        return best
    crowds = target["boxes"][target["iscrowd"]].tolist()
    return "ignored" if any(overlap(box, crowd) / area(box) > 0.5 for crowd in crowds) else None


def mean(values: list[float]) -> float:
    return sum(values) / max(1, len(values))


@torch.no_grad()
def loop_losses(model: MimicDet) -> list[dict[str, float]]:
    """Losses of both heads and of mimicking, image by image; both heads are evaluated at every position."""
    config = model.config
    batch = torch.zeros(3, 3, SIZE, SIZE)
    for i, image in enumerate(images()):
        for channel, (m, s) in enumerate(((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))):
            batch[i, channel, : image.shape[1], : image.shape[2]] = (image[channel] / 255 - m) / s
    pyramid = model.pyramid(model.backbone(batch))
    low = [pyramid[level] for level in (3, 4, 5)]
    grid = make_grid((3, 4, 5), low, config.anchors.scale)
    objectness, deltas = model.refinement(low)
    everywhere = torch.arange(len(grid.level))
    answer = []
    for i, (image, target) in enumerate(zip(images(), targets(), strict=True)):
        height, width = image.shape[1:]
        index = torch.full_like(everywhere, i)
        refined = [
            refine(anchor, delta, height, width)
            for anchor, delta in zip(grid.anchors.tolist(), deltas[i].tolist(), strict=True)
        ]
        student = model.student(Features.pack(low), deltas, grid, index, everywhere)
        high = {level: pyramid[level] for level in (2, 3, 4)}
        teacher = model.teacher(high, torch.tensor(refined), index, grid.level + 2)

        def head_loss(head, p: int, threshold: float, image_boxes=refined, truth=target) -> tuple[float, float]:
            j = matched(image_boxes[p], truth, threshold)
            label = NUM_CLASSES if j is None else int(truth["labels"][j])
            cls_loss = entropy(head.logits[p].tolist(), label)
            if j is None:
                return cls_loss, 0.0
            wanted = encoded(truth["boxes"][j].tolist(), image_boxes[p], (0.1, 0.1, 0.2, 0.2))
            return cls_loss, sum(abs(a - b) for a, b in zip(head.deltas[p].tolist(), wanted, strict=True))

        def split(pool: list[int], threshold: float, image_boxes=refined, truth=target) -> tuple[list[int], list[int]]:
            states = {p: matched(image_boxes[p], truth, threshold) for p in pool}
            positives = [p for p in pool if isinstance(states[p], int)]
            return positives, [p for p in pool if states[p] is None]

        inside = [p for p in range(len(refined)) if grid.cell[p, 1] * grid.stride[p] < height]
        order = sorted(inside, key=lambda p: -float(objectness[i, p]))[: config.refinement.pre_nms_topk]
        proposals: list[int] = []
        for p in order:
            if all(iou(refined[p], refined[q]) <= 0.8 for q in proposals):
                proposals.append(p)
        proposals = proposals[: config.refinement.num_proposals]

        positives, negatives = split(proposals, config.teacher.iou_threshold)
        rank = priority(target["key"], TEACHER, everywhere).tolist()
        rois = sorted(positives, key=lambda p: -rank[p])[: round(config.teacher.num_rois * 0.25)]
        num_positives = len(rois)
        rois += sorted(negatives, key=lambda p: -rank[p])[: config.teacher.num_rois - num_positives]

        positives, negatives = split(proposals, config.student.iou_threshold)
        hardness = {}
        for p in positives + negatives:
            cls_loss, box_loss = head_loss(student, p, config.student.iou_threshold)
            hardness[p] = cls_loss if config.student.mining == "cls" else cls_loss + box_loss
        num, fraction = config.student.num_samples, config.student.positive_fraction
        if fraction is None:
            mined = sorted(hardness, key=lambda p: -hardness[p])[:num]
        else:
            mined = sorted(positives, key=lambda p: -hardness[p])[: round(num * fraction)]
            mined += sorted(negatives, key=lambda p: -hardness[p])[: num - len(mined)]

        student_losses = [head_loss(student, p, config.student.iou_threshold) for p in mined]
        teacher_losses = [head_loss(teacher, p, config.teacher.iou_threshold) for p in rois]
        prepare = centered if config.mimic.centered_logits else list
        mimicked = rois[:num_positives] if config.mimic.reg_positives_only else rois
        answer.append(
            {
                "student_cls": mean([cls_loss for cls_loss, _ in student_losses]),
                "student_box": mean([box_loss for _, box_loss in student_losses]),
                "teacher_cls": mean([cls_loss for cls_loss, _ in teacher_losses]),
                "teacher_box": mean([box_loss for _, box_loss in teacher_losses]),
                "mimic_cls": mean(
                    [cosine_loss(*(prepare(h.logits[p].tolist()) for h in (student, teacher))) for p in rois]
                ),
                "mimic_reg": mean(
                    [cosine_loss(*(h.feature[p].relu().tolist() for h in (student, teacher))) for p in mimicked]
                ),
                "roi_positives": num_positives / len(rois),
                "mined_positives": mean([float(p in positives) for p in mined]),
            }
        )
    return answer


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {
            "student": replace(TINY.student, mining="cls", positive_fraction=None, iou_threshold=0.4),
            "mimic": MimicConfig(centered_logits=True, reg_positives_only=True),
        },
        {"student": replace(TINY.student, positive_fraction=None, offsets="analytic_learned")},
    ],
    ids=["default", "other options", "plain mining"],
)
def test_losses_of_the_heads_equal_loops_over_boxes(sections: dict[str, Any]) -> None:
    model = detector(**sections)
    answer = terms(model)
    values = {**answer.losses, **answer.metrics}
    wanted = loop_losses(model)
    assert sum(image["roi_positives"] > 0 for image in wanted) == 2  # the comparison has something to compare
    for i, image in enumerate(wanted):
        for name, value in image.items():
            assert float(values[name][i].detach()) == pytest.approx(value, rel=1e-4, abs=1e-5), (i, name)


def test_losses_and_metrics_have_one_value_per_image() -> None:
    answer = terms(detector())
    assert answer.losses.keys() == LOSSES
    assert {tuple(v.shape) for v in {**answer.losses, **answer.metrics}.values()} == {(3,)}
    assert all(v.requires_grad for v in answer.losses.values())
    assert not any(v.requires_grad for v in answer.metrics.values())


# ---- what a loss depends on ----


@pytest.mark.parametrize(
    ("sections", "names"),
    [
        ({"refinement": replace(TINY.refinement, loss_weight=4.0)}, {"refine_cls", "refine_box"}),
        ({"student": replace(TINY.student, loss_weight=4.0)}, {"student_cls", "student_box"}),
        ({"teacher": replace(TINY.teacher, loss_weight=4.0)}, {"teacher_cls", "teacher_box"}),
        ({"mimic": MimicConfig(cls_weight=4.0)}, {"mimic_cls"}),
        ({"mimic": MimicConfig(reg_weight=4.0)}, {"mimic_reg"}),
    ],
)
def test_a_weight_scales_the_losses_that_it_names_and_no_other(sections: dict[str, Any], names: set[str]) -> None:
    plain, weighted = terms(detector()), terms(detector(**sections))
    for name, values in plain.losses.items():
        assert torch.equal(weighted.losses[name], values * (4 if name in names else 1)), name
    assert all(torch.equal(weighted.metrics[name], values) for name, values in plain.metrics.items())


@pytest.mark.parametrize("company", [(2, 0), (1, 0, 2), (0, 0)])
def test_losses_of_an_image_do_not_depend_on_its_batch(company: tuple[int, ...]) -> None:
    model = detector()
    alone, together = terms(model, (0,)), terms(model, company)
    for name, values in {**alone.losses, **alone.metrics}.items():
        other = {**together.losses, **together.metrics}[name][company.index(0)]
        assert float(other.detach()) == pytest.approx(float(values[0].detach()), rel=1e-5, abs=1e-6), name


def test_losses_depend_on_the_key_and_not_on_the_global_generator() -> None:
    model = detector()
    first = terms(model)
    torch.manual_seed(123)
    again = terms(model)
    assert all(torch.equal(again.losses[name], first.losses[name]) for name in LOSSES)
    other = [{**target, "key": target["key"] + 1} for target in targets()]
    changed = model.loss_terms(images(), other, pad_to=(SIZE, SIZE)).losses
    assert not torch.equal(changed["refine_cls"], first.losses["refine_cls"])
    assert not torch.equal(changed["teacher_cls"], first.losses["teacher_cls"])
    # Mining draws nothing.
    assert torch.equal(changed["student_cls"], first.losses["student_cls"])


# ---- which weights a loss moves ----

PARTS = ("backbone", "pyramid", "refinement", "student", "teacher")


def parts_moved(model: MimicDet, *names: str) -> set[str]:
    """Parts of the detector that the sum of these losses has a gradient for that is not zero."""
    losses = terms(model).losses
    parameters = dict(model.named_parameters())
    total = torch.stack([losses[name].sum() for name in names]).sum()
    gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    moved = {name for name, g in zip(parameters, gradients, strict=True) if g is not None and g.any()}
    return {part for part in PARTS if any(name.startswith(part + ".") for name in moved)}


SHARED = {"backbone", "pyramid"}


@pytest.mark.parametrize(
    ("losses", "heads"),
    [
        (("refine_cls",), {"refinement"}),
        (("refine_box",), {"refinement"}),
        (("student_cls", "student_box"), {"student"}),
        (("teacher_cls", "teacher_box"), {"teacher"}),
        (("mimic_cls",), {"student"}),
        (("mimic_reg",), {"student"}),
    ],
)
def test_a_loss_moves_its_own_head_and_the_features_only(losses: tuple[str, ...], heads: set[str]) -> None:
    # No gradient reaches the refinement module from what comes after it: its boxes are taken as given.
    assert parts_moved(detector(), *losses) == SHARED | heads


@pytest.mark.parametrize("loss", ["mimic_cls", "mimic_reg"])
def test_mimicking_moves_the_teacher_unless_detached(loss: str) -> None:
    model = detector(mimic=MimicConfig(detach_teacher=False))
    assert parts_moved(model, loss) == SHARED | {"student", "teacher"}


def test_offsets_move_the_refinement_when_not_detached() -> None:
    model = detector(student=replace(TINY.student, detach_offsets=False))
    assert parts_moved(model, "student_cls", "student_box") == SHARED | {"student", "refinement"}


def all_gradients(model: MimicDet, which: tuple[int, ...]) -> dict[str, Tensor | None]:
    torch.stack([v.sum() for v in terms(model, which).losses.values()]).sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "pyramid",
    [
        PyramidConfig(channels=8, max_level=5),
        PyramidConfig(channels=8, max_level=7),  # P6 and P7 are single cells
        PyramidConfig(channels=8, min_level=4, max_level=5),
        PyramidConfig(channels=8, max_level=5, stagger=0),
    ],
)
@pytest.mark.parametrize("which", [(0, 1), (2,)], ids=["objects", "nothing"])
def test_every_parameter_gets_a_finite_gradient(pyramid: PyramidConfig, which: tuple[int, ...]) -> None:
    model = detector(pyramid=pyramid)
    for name, gradient in all_gradients(model, which).items():
        assert gradient is not None, name
        assert gradient.isfinite().all(), name


def test_an_image_full_of_crowd_gives_zeros_with_gradients() -> None:
    model = detector()
    target = {"boxes": torch.tensor([[0.0, 0, 64, 64]]), "labels": torch.tensor([0]), "iscrowd": torch.tensor([True])}
    losses = model.loss_terms(images()[:1], [target]).losses
    assert {name: float(value.detach()) for name, value in losses.items()} == dict.fromkeys(LOSSES, 0.0)
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_an_object_smaller_than_a_cell_is_learned() -> None:
    # 6 px on cells of 8 px and anchors of 16 px: no centre lies in the object, and no anchor overlaps it much.
    torch.manual_seed(0)
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    image[:, 33:39, 17:23] = 255
    target = {"boxes": torch.tensor([[17.0, 33, 23, 39]]), "labels": torch.tensor([2])}
    model = MimicDet(replace(TINY, anchors=replace(TINY.anchors, scale=2.0)), NUM_CLASSES).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    refine_box, positives = [], []
    for step in range(150):
        answer = model.loss_terms([image], [{**target, "key": torch.tensor(step)}])
        optimizer.zero_grad()
        torch.stack(list(answer.losses.values())).sum().backward()
        optimizer.step()
        refine_box.append(float(answer.losses["refine_box"].detach()))
        positives.append([float(answer.metrics[name]) for name in ("mined_positives", "roi_positives")])
    # The nearest anchor learns the object at once; its refined box then is a positive for both heads.
    assert positives[0] == [0, 0]
    assert max(refine_box[-20:]) < refine_box[0] / 2
    assert sum(min(both) > 0 for both in positives[-20:]) >= 10
    for found in model.detect_heads([image], topk=20).values():
        assert int(found[0]["labels"][0]) == 2
