"""The detector's losses against loops over boxes, and which weights they move."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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
from mimicdet.sampling import REFINEMENT, STUDENT, TEACHER, priority
from mimicdet.student import HeadOutput

pytestmark = pytest.mark.usefixtures("one_thread")

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
STUDENT_LOSSES = {"refine_cls", "refine_box", "student_cls", "student_box"}
LOSSES = STUDENT_LOSSES | {"teacher_cls", "teacher_box", "mimic_cls", "mimic_reg"}
# No option as it is by default.
OTHER: dict[str, Any] = {
    "class_space": "sigmoid",
    "refinement": replace(
        TINY.refinement,
        width=12,
        scale_bounds=(40.0, 48.0),
        ignore_ratio=0.5,
        forced_assignment=False,
        loss="focal",
        box_std=(0.5, 0.4, 0.3, 0.6),
        detach_boxes=False,
        nms_per_level=True,
        nms_iou=0.7,
    ),
    "student": replace(
        TINY.student,
        offsets="analytic_learned",
        kernel_sizes=(3, 5, 3),
        detach_offsets=False,
        box_std=(0.2, 0.1, 0.3, 0.4),
        iou_threshold=0.4,
        mining="random",
        mining_pool=20,
    ),
    "teacher": replace(TINY.teacher, box_std=(0.1, 0.2, 0.3, 0.2), iou_threshold=0.45),
    "mimic": MimicConfig(
        num_boxes=14,
        warmup_steps=3,
        detach_teacher=False,
        centered_logits=True,
        reg_positives_only=True,
        before_relu=True,
    ),
}


def detector(config: ModelConfig = TINY, **sections: Any) -> MimicDet:
    """A tiny detector whose every layer matters: what starts at or near zero is drawn anew."""
    torch.manual_seed(5)  # a start in which both images have positives and no teacher row is dead
    model = MimicDet(replace(config, **sections), NUM_CLASSES)
    heads = [model.student, model.teacher] if model.teacher else [model.student]
    for layer in (model.refinement.objectness, *(head.logits for head in heads)):
        nn.init.normal_(layer.weight, std=0.5)
        nn.init.zeros_(layer.bias)
    for layer in filter(None, (model.refinement.deltas, *(head.deltas for head in heads))):
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


def encoded(box: Box, anchor: Box, std: Sequence[float]) -> Box:
    (w, h), (aw, ah) = ((b[2] - b[0], b[3] - b[1]) for b in (box, anchor))
    shift_x = (box[0] + box[2] - anchor[0] - anchor[2]) / 2 / aw
    shift_y = (box[1] + box[3] - anchor[1] - anchor[3]) / 2 / ah
    return [shift_x / std[0], shift_y / std[1], math.log(w / aw) / std[2], math.log(h / ah) / std[3]]


def decoded(anchor: Box, deltas: Box, std: Sequence[float]) -> Box:
    w, h = anchor[2] - anchor[0], anchor[3] - anchor[1]
    x = (anchor[0] + anchor[2]) / 2 + deltas[0] * std[0] * w
    y = (anchor[1] + anchor[3]) / 2 + deltas[1] * std[1] * h
    w, h = w * math.exp(deltas[2] * std[2]), h * math.exp(deltas[3] * std[3])
    return [x - w / 2, y - h / 2, x + w / 2, y + h / 2]


def clipped(box: Box, height: int, width: int) -> Box:
    return [max(0.0, box[0]), max(0.0, box[1]), min(float(width), box[2]), min(float(height), box[3])]


def sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


def entropy(logits: list[float], label: int) -> float:
    if len(logits) == NUM_CLASSES:  # a sigmoid for each class
        return -sum(math.log(sigmoid(v if c == label else -v)) for c, v in enumerate(logits))
    return math.log(sum(math.exp(v) for v in logits)) - logits[label]


def cosine_loss(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    norms = [math.sqrt(sum(x * x for x in row) + 1e-12) for row in (a, b)]  # of dead rows as well
    return 1 - dot / (norms[0] * norms[1])


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


@dataclass(frozen=True)
class Scene:
    """One image at every position of the padded pyramid, in plain numbers."""

    level: list[int]
    anchors: list[Box]
    inside: list[int]
    objectness: list[float]
    deltas: list[Box]
    refined: list[Box]
    student: HeadOutput
    teacher: HeadOutput | None
    target: Mapping[str, Tensor]


@torch.no_grad()
def scenes(
    model: MimicDet, pictures: Sequence[Tensor] | None = None, truth: Sequence[Mapping[str, Tensor]] | None = None
) -> list[Scene]:
    """Every image, by default those above; the student's answers are those of its dense mode."""
    pictures, truth = pictures or images(), truth or targets()
    config = model.config
    batch = model.mean.new_zeros(len(pictures), 3, SIZE, SIZE)
    for i, image in enumerate(pictures):
        for channel, (m, s) in enumerate(((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))):
            batch[i, channel, : image.shape[1], : image.shape[2]] = (image[channel].to(batch.dtype) / 255 - m) / s
    pyramid = model.pyramid(model.backbone(batch))
    levels = range(config.pyramid.min_level, config.pyramid.max_level + 1)
    low = [pyramid[level] for level in levels]
    objectness, deltas = model.refinement(low)
    student = model.student.dense(low, deltas, make_grid(levels, low, config.anchors.scale))

    level_of, anchors, corners = [], [], []
    for level, features in zip(levels, low, strict=True):
        stride, half = 2**level, config.anchors.scale * 2**level / 2
        for row in range(features.shape[2]):
            for column in range(features.shape[3]):
                x, y = (column + 0.5) * stride, (row + 0.5) * stride
                level_of.append(level)
                corners.append((column * stride, row * stride))
                anchors.append([x - half, y - half, x + half, y + half])
    num = len(anchors)
    answer = []
    for i, (image, target) in enumerate(zip(pictures, truth, strict=True)):
        height, width = image.shape[1:]
        rows = zip(anchors, deltas[i].tolist(), strict=True)
        refined = [clipped(decoded(anchor, delta, config.refinement.box_std), height, width) for anchor, delta in rows]
        teacher = None
        if model.teacher is not None:
            pooled_from = torch.tensor(level_of) - config.pyramid.stagger
            high = {level: pyramid[level] for level in sorted(set(pooled_from.tolist()))}
            teacher = model.teacher(high, batch.new_tensor(refined), torch.full((num,), i), pooled_from)
        answer.append(
            Scene(
                level=level_of,
                anchors=anchors,
                inside=[p for p, (x, y) in enumerate(corners) if x < width and y < height],
                objectness=objectness[i].tolist(),
                deltas=deltas[i].tolist(),
                refined=refined,
                student=HeadOutput(*(v.split(num)[i] for v in (student.logits, student.deltas, student.feature))),
                teacher=teacher,
                target=target,
            )
        )
    return answer


def draw(positives: list[int], negatives: list[int], num: int, fraction: float, rank: Sequence[float]) -> list[int]:
    """Those of the highest rank: positives up to their share, then negatives."""
    chosen = sorted(positives, key=lambda p: -rank[p])[: max(1, round(num * fraction))]
    return chosen + sorted(negatives, key=lambda p: -rank[p])[: num - len(chosen)]


def random_rank(scene: Scene, stream: int) -> list[int]:
    """Priorities of all positions, each named by its level, row and column alone."""
    names = []
    for level, (x1, y1, x2, y2) in zip(scene.level, scene.anchors, strict=True):
        column, row = ((low + high) / 2 // 2**level for low, high in ((x1, x2), (y1, y2)))
        names.append((level << 40) + (int(row) << 20) + int(column))
    return priority(scene.target["key"], stream, torch.tensor(names)).tolist()


def loop_anchors(scene: Scene, config: ModelConfig) -> tuple[dict[int, int], list[int]]:
    """Object of each positive anchor, and the negatives."""
    levels = sorted(set(scene.level))
    bounds = config.refinement.scale_bounds or [2 * config.anchors.scale * 2**level for level in levels[:-1]]
    claims: dict[int, int] = {}
    ignored: set[int] = set()
    every = list(zip(scene.target["boxes"].tolist(), scene.target["iscrowd"].tolist(), strict=True))
    # The smallest has the last word, and of equals the first.
    for j, (box, crowd) in sorted(enumerate(every), key=lambda item: (-area(item[1][0]), -item[0])):
        own = levels[sum(math.sqrt(area(box)) >= bound for bound in bounds)]
        hits, distances = [], {}
        for p in scene.inside:
            x1, y1, x2, y2 = scene.anchors[p]
            dx, dy = abs(x1 + x2 - box[0] - box[2]) / 2, abs(y1 + y2 - box[1] - box[3]) / 2

            def within(ratio: float, dx: float = dx, dy: float = dy, box: Box = box) -> bool:
                return dx <= ratio * (box[2] - box[0]) / 2 and dy <= ratio * (box[3] - box[1]) / 2

            if crowd:
                ignored |= {p} if within(1) else set()
            elif scene.level[p] == own:
                distances[p] = dx**2 + dy**2
                hits += [p] if within(config.refinement.center_ratio) else []
                ignored |= {p} if within(config.refinement.ignore_ratio) else set()
        if not crowd and not hits and config.refinement.forced_assignment:
            hits = [min(distances, key=lambda p: distances[p])]
        claims |= dict.fromkeys(hits, j)
    return claims, [p for p in scene.inside if p not in claims and p not in ignored]


def loop_refinement(scene: Scene, config: ModelConfig) -> dict[str, float]:
    """Losses of the refinement module."""
    claims, negatives = loop_anchors(scene, config)
    refinement = config.refinement
    focal = refinement.loss == "focal"
    counted = [*claims, *negatives]
    if not focal:
        rank = random_rank(scene, REFINEMENT)
        counted = draw(list(claims), negatives, refinement.num_samples, refinement.positive_fraction, rank)
    cls_loss, box_loss = 0.0, 0.0
    for p in counted:
        right = sigmoid(scene.objectness[p] if p in claims else -scene.objectness[p])
        cls_loss -= math.log(right) * ((0.25 if p in claims else 0.75) * (1 - right) ** 2 if focal else 1)
        if p in claims:
            wanted = encoded(scene.target["boxes"][claims[p]].tolist(), scene.anchors[p], refinement.box_std)
            box_loss += sum(abs(a - b) for a, b in zip(scene.deltas[p], wanted, strict=True))
    num = max(1, len(claims) if focal else len(counted))
    return {name: refinement.loss_weight * v / num for name, v in (("refine_cls", cls_loss), ("refine_box", box_loss))}


def loop_proposals(scene: Scene, config: ModelConfig) -> list[int]:
    refinement = config.refinement
    proposals: list[int] = []
    for p in sorted(scene.inside, key=lambda p: -scene.objectness[p])[: refinement.pre_nms_topk]:
        rivals = [q for q in proposals if not refinement.nms_per_level or scene.level[q] == scene.level[p]]
        if all(iou(scene.refined[p], scene.refined[q]) <= refinement.nms_iou for q in rivals):
            proposals.append(p)
    return proposals[: refinement.num_proposals]


def head_loss(scene: Scene, head: HeadOutput, p: int, config: StudentConfig | TeacherConfig) -> tuple[float, float]:
    """Classification and box loss of a head at one position."""
    j = matched(scene.refined[p], scene.target, config.iou_threshold)
    if not isinstance(j, int):
        return entropy(head.logits[p].tolist(), NUM_CLASSES), 0.0
    wanted = encoded(scene.target["boxes"][j].tolist(), scene.refined[p], config.box_std)
    distance = sum(abs(a - b) for a, b in zip(head.deltas[p].tolist(), wanted, strict=True))
    return entropy(head.logits[p].tolist(), int(scene.target["labels"][j])), distance


def split(scene: Scene, pool: list[int], threshold: float) -> tuple[list[int], list[int]]:
    """Positives and negatives."""
    states = {p: matched(scene.refined[p], scene.target, threshold) for p in pool}
    return [p for p in pool if isinstance(states[p], int)], [p for p in pool if states[p] is None]


def loop_mined(scene: Scene, config: ModelConfig) -> tuple[list[int], list[int]]:
    """Positions that the student is trained on, and the positives among them."""
    student = config.student
    positives, negatives = split(scene, loop_proposals(scene, config)[: student.mining_pool], student.iou_threshold)
    rank: list[float] = [0.0] * len(scene.anchors)
    for p in positives + negatives:
        cls_loss, box_loss = head_loss(scene, scene.student, p, student)
        rank[p] = cls_loss if student.mining == "cls" else cls_loss + box_loss
    if student.mining == "random":
        rank = [float(v) for v in random_rank(scene, STUDENT)]
    if student.positive_fraction is None:
        mined = sorted(positives + negatives, key=lambda p: -rank[p])[: student.num_samples]
    else:
        mined = draw(positives, negatives, student.num_samples, student.positive_fraction, rank)
    return mined, [p for p in mined if p in positives]


def loop_rois(scene: Scene, config: ModelConfig, num: int) -> tuple[list[int], list[int]]:
    """Positions that the teacher looks at where it wants `num`, and the positives among them."""
    positives, negatives = split(scene, loop_proposals(scene, config), config.teacher.iou_threshold)
    rois = draw(positives, negatives, num, config.teacher.positive_fraction, random_rank(scene, TEACHER))
    return rois, [p for p in rois if p in positives]


def loop_losses(scene: Scene, config: ModelConfig, rise: float = 1) -> dict[str, float]:
    """Losses and metrics of one image; `rise` is what mimicking has been warmed up to."""
    mined, mined_positives = loop_mined(scene, config)
    losses = [head_loss(scene, scene.student, p, config.student) for p in mined]
    answer = loop_refinement(scene, config) | {
        "student_cls": mean([cls_loss for cls_loss, _ in losses]),
        "student_box": mean([box_loss for _, box_loss in losses]),
        "mined_positives": mean([float(p in mined_positives) for p in mined]),
    }
    teacher = scene.teacher
    if teacher is None:
        return answer
    rois, positives = loop_rois(scene, config, config.teacher.num_rois)
    mimicked, shown = loop_rois(scene, config, config.mimic.num_boxes or config.teacher.num_rois)
    losses = [head_loss(scene, teacher, p, config.teacher) for p in rois]
    logits, features = {}, {}
    for p in mimicked:
        pair = [head.logits[p].tolist() for head in (scene.student, teacher)]
        logits[p] = cosine_loss(*(centered(row) if config.mimic.centered_logits else row for row in pair))
        pair = [head.feature[p].tolist() for head in (scene.student, teacher)]
        features[p] = cosine_loss(*(row if config.mimic.before_relu else [max(0.0, v) for v in row] for row in pair))
    return answer | {
        "teacher_cls": mean([cls_loss for cls_loss, _ in losses]),
        "teacher_box": mean([box_loss for _, box_loss in losses]),
        "mimic_cls": rise * mean(list(logits.values())),
        "mimic_reg": rise * mean([features[p] for p in (shown if config.mimic.reg_positives_only else mimicked)]),
        "cosine_cls": mean([1 - loss for loss in logits.values()]),
        "cosine_reg": mean([1 - loss for loss in features.values()]),
        "roi_positives": mean([float(p in positives) for p in rois]),
    }


@pytest.mark.parametrize(
    "sections",
    [
        pytest.param({}, id="default"),
        pytest.param(
            {"student": replace(TINY.student, mining="cls", positive_fraction=None)}, id="plain mining by class"
        ),
        pytest.param({"student": replace(TINY.student, positive_fraction=None, offsets="none")}, id="plain mining"),
        pytest.param({"student": replace(TINY.student, mining="random")}, id="mining at random"),
        pytest.param({"student": replace(TINY.student, mining_pool=16)}, id="mining pool"),
        pytest.param({"student": replace(TINY.student, kernel_sizes=(5,))}, id="one kernel"),
        pytest.param(
            {
                "student": replace(TINY.student, kernel_sizes=(3, 5, 3, 7, 3), iou_threshold=0.4),
                "pyramid": PyramidConfig(channels=8, max_level=7),
            },
            id="five kernels",
        ),
        pytest.param({"pyramid": PyramidConfig(channels=8, max_level=5, stagger=0)}, id="no stagger"),
        pytest.param({"class_space": "sigmoid"}, id="sigmoid"),
        pytest.param({"refinement": replace(TINY.refinement, box_std=(0.1, 0.4, 0.3, 0.6))}, id="refinement box_std"),
        pytest.param({"refinement": replace(TINY.refinement, loss="focal", width=5)}, id="focal"),
        pytest.param({"refinement": replace(TINY.refinement, nms_per_level=True, nms_iou=0.4)}, id="nms on each level"),
        pytest.param(
            {"refinement": replace(TINY.refinement, scale_bounds=(20.0, 32.0), forced_assignment=False)},
            id="other ranges, not forced",
        ),
        pytest.param({"mimic": MimicConfig(num_boxes=6)}, id="fewer mimicked than learned"),
        pytest.param({"mimic": MimicConfig(num_boxes=18)}, id="more mimicked than learned"),
        pytest.param({"mimic": MimicConfig(centered_logits=True, reg_positives_only=True)}, id="mimic options"),
        pytest.param({"mimic": MimicConfig(before_relu=True)}, id="before ReLU"),
        pytest.param({"teacher": replace(TINY.teacher, enabled=False)}, id="no teacher"),
        pytest.param(OTHER, id="all other options"),
        pytest.param(OTHER | {"teacher": replace(TINY.teacher, enabled=False)}, id="all other options, no teacher"),
    ],
)
def test_losses_of_every_part_equal_loops_over_boxes(sections: dict[str, Any]) -> None:
    model = detector(**sections)
    answer = terms(model)
    values = {**answer.losses, **answer.metrics}
    wanted = [loop_losses(scene, model.config) for scene in scenes(model)]
    # The comparison has something to compare.
    for name in values.keys() & {"roi_positives", "mined_positives"}:
        assert any(image[name] > 0 for image in wanted), name
    for i, image in enumerate(wanted):
        assert image.keys() == values.keys()
        for name, value in image.items():
            assert float(values[name][i].detach()) == pytest.approx(value, rel=1e-4, abs=1e-5), (i, name)


# Few of them would answer for a box if all were drawn alike: some are as large as anchors.
some_sides = st.one_of(st.integers(1, 2 * SIZE).map(lambda n: n / 2), st.integers(50, 80).map(lambda n: n / 2))
some_objects = st.lists(
    st.tuples(
        st.tuples(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True), some_sides, some_sides),
        st.integers(0, NUM_CLASSES - 1),
        st.sampled_from([False, False, False, True]),
    ),
    max_size=6,
)
some_images = st.tuples(st.integers(2, SIZE), st.integers(2, SIZE), some_objects, st.integers(0, 2**62))


@pytest.mark.parametrize("sections", [{}, OTHER], ids=["default", "all other options"])
@settings(deadline=None, max_examples=25, derandomize=True)
@given(some=st.lists(some_images, min_size=1, max_size=3))
@pytest.mark.slow
def test_losses_of_any_images_equal_loops_over_boxes(
    sections: dict[str, Any], some: list[tuple[int, int, list[tuple[Box, int, bool]], int]]
) -> None:
    # Ratios that halve and quarter: borders of regions, on which centres lie, are exact in fp32.
    refinement = replace(sections.get("refinement", TINY.refinement), center_ratio=0.25, ignore_ratio=0.5)
    model = detector(**{**sections, "refinement": refinement}).double()
    pictures, truth = [], []
    for height, width, objects, key in some:
        generator = torch.Generator().manual_seed(key)
        pictures.append(torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8))
        boxes = []
        for (x, y, w, h), _, _ in objects:
            left, top = math.floor(2 * x * width) / 2, math.floor(2 * y * height) / 2
            boxes.append([left, top, left + w, top + h])
        truth.append(
            {
                "boxes": torch.tensor(boxes).reshape(-1, 4),
                "labels": torch.tensor([label for _, label, _ in objects], dtype=torch.int64),
                "iscrowd": torch.tensor([crowd for _, _, crowd in objects], dtype=torch.bool),
                "key": torch.tensor(key),
            }
        )
    answer = model.loss_terms(pictures, truth, pad_to=(SIZE, SIZE))
    values = {**answer.losses, **answer.metrics}
    for i, scene in enumerate(scenes(model, pictures, truth)):
        for name, value in loop_losses(scene, model.config).items():
            assert float(values[name][i].detach()) == pytest.approx(value, rel=1e-4, abs=1e-5), (i, name)


def test_losses_and_metrics_have_one_value_per_image() -> None:
    answer = terms(detector())
    assert answer.losses.keys() == LOSSES
    assert {tuple(v.shape) for v in {**answer.losses, **answer.metrics}.values()} == {(3,)}
    assert all(v.requires_grad for v in answer.losses.values())
    assert not any(v.requires_grad for v in answer.metrics.values())


# ---- which boxes the heads look at ----


def looked_at(model: MimicDet, truth: Sequence[Mapping[str, Tensor]]) -> list[tuple[set[int], set[int]]]:
    """Positions in each image that the student is trained on, and those that the teacher sees."""
    asked: list[list[tuple[int, int]]] = []
    seen: list[int] = []
    hooks = [
        model.student.register_forward_hook(
            lambda _, args, __: asked.append(list(zip(args[3].tolist(), args[4].tolist(), strict=True)))
        )
    ]
    if model.teacher is not None:
        hooks.append(model.teacher.register_forward_hook(lambda _, args, __: seen.append(len(args[1]))))
    model.loss_terms(images(), truth, pad_to=(SIZE, SIZE))
    for hook in hooks:
        hook.remove()
    # The student ranks all proposals first; what it imitates follows what it is trained on.
    num_mined = len(asked[-1]) - sum(seen)
    parts = asked[-1][:num_mined], asked[-1][num_mined:]
    assert all(len(set(part)) == len(part) for part in parts)
    return [tuple({p for i, p in part if i == image} for part in parts) for image in range(3)]


@pytest.mark.parametrize("sections", [{}, OTHER], ids=["default", "all other options"])
def test_the_heads_look_at_the_boxes_that_loops_choose(sections: dict[str, Any]) -> None:
    model = detector(**sections)
    num_rois = max(model.config.teacher.num_rois, model.config.mimic.num_boxes or 0)
    for (mined, rois), scene in zip(looked_at(model, targets()), scenes(model), strict=True):
        assert mined == set(loop_mined(scene, model.config)[0])
        assert rois == set(loop_rois(scene, model.config, num_rois)[0])
        assert min(len(mined), len(rois)) > 4


@pytest.mark.parametrize("sections", [{}, OTHER], ids=["default", "all other options"])
def test_neither_head_sees_padding_or_negatives_in_a_crowd(sections: dict[str, Any]) -> None:
    # As many boxes as there are: what may be looked at, is.
    options = {"student": TINY.student, "teacher": TINY.teacher, "mimic": MimicConfig(), **sections}
    options["student"] = replace(options["student"], num_samples=100, mining_pool=None)
    options["teacher"] = replace(options["teacher"], num_rois=100)
    options["mimic"] = replace(options["mimic"], num_boxes=100)
    model = detector(**options)
    crowd = {"boxes": torch.tensor([[0.0, 0, 64, 33]]), "labels": torch.tensor([0]), "iscrowd": torch.tensor([True])}
    truth = [{key: torch.cat([target[key], crowd[key]]) for key in crowd} for target in targets()]
    truth = [{**part, "key": target["key"]} for part, target in zip(truth, targets(), strict=True)]
    num_hidden, num_padded = 0, 0
    for (mined, rois), scene, target in zip(looked_at(model, truth), scenes(model), truth, strict=True):
        proposals = loop_proposals(scene, model.config)
        assert mined | rois <= set(proposals) <= set(scene.inside)
        num_padded += len(scene.anchors) - len(scene.inside)
        for positions, head in ((mined, model.config.student), (rois, model.config.teacher)):
            states = {p: matched(scene.refined[p], target, head.iou_threshold) for p in proposals}
            num_hidden += list(states.values()).count("ignored")
            assert {p for p in positions if states[p] is None} == {p for p in proposals if states[p] is None}
            assert "ignored" not in {states[p] for p in positions}
    assert min(num_hidden, num_padded) > 10


@pytest.mark.parametrize("std", [(1.0, 1.0, 1.0, 1.0), (0.5, 0.4, 0.3, 0.6)])
def test_the_students_taps_span_the_boxes_that_were_refined(std: tuple[float, float, float, float]) -> None:
    model = detector(
        refinement=replace(TINY.refinement, box_std=std), student=replace(TINY.student, offsets="analytic")
    )
    scene = scenes(model)[0]
    grid = make_grid((3, 4, 5), [torch.zeros(1, 1, SIZE >> level, SIZE >> level) for level in (3, 4, 5)], 4)
    everywhere = torch.arange(len(scene.anchors))
    for sampler in model.student.samplers:
        points = sampler.points(torch.tensor(scene.deltas), grid, everywhere)
        for p, taps in enumerate(points):
            box = decoded(scene.anchors[p], scene.deltas[p], std)
            # From a cell's corner to its centre is half a cell; the first tap is the upper left, the last the lower
            # right one.
            corners = [side / 2 ** scene.level[p] - 0.5 for side in (box[1], box[0], box[3], box[2])]
            assert torch.cat([taps[0], taps[-1]]).tolist() == pytest.approx(corners, abs=1e-4)


def test_mining_at_random_depends_on_the_key_alone() -> None:
    sections = {
        "student": replace(TINY.student, mining="random"),
        "teacher": replace(TINY.teacher, enabled=False),
    }
    model = detector(**sections)
    before = looked_at(model, targets())
    torch.manual_seed(123)
    for parameter in model.student.parameters():
        nn.init.normal_(parameter)
    assert looked_at(model, targets()) == before
    after = looked_at(model, [{**target, "key": target["key"] + 1} for target in targets()])
    assert all(a != b for a, b in zip(after, before, strict=True))
    # It is not the sample of the teacher, nor that of the refinement module.
    for (mined, _), scene in zip(before, scenes(model), strict=True):
        positives, negatives = split(scene, loop_proposals(scene, model.config), 0.5)
        for stream in (REFINEMENT, TEACHER):
            assert mined != set(draw(positives, negatives, 12, 0.25, random_rank(scene, stream)))


def test_the_mining_pool_holds_the_best_by_objectness() -> None:
    whole, pooled = detector(), detector(student=replace(TINY.student, mining_pool=16))
    every = zip(looked_at(whole, targets()), looked_at(pooled, targets()), scenes(pooled), strict=True)
    for (anywhere, rois), (mined, same_rois), scene in every:
        pool = loop_proposals(scene, pooled.config)[:16]
        assert mined <= set(pool)
        assert not anywhere <= set(pool)
        assert min(scene.objectness[p] for p in pool) >= max(
            scene.objectness[p] for p in loop_proposals(scene, pooled.config)[16:]
        )
        assert same_rois == rois  # the teacher's are drawn from all proposals


@pytest.mark.parametrize("num_boxes", [1, 6, 10, 18, 1000])
def test_what_is_mimicked_changes_nothing_of_what_the_teacher_learns(num_boxes: int) -> None:
    plain, other = detector(), detector(mimic=MimicConfig(num_boxes=num_boxes))
    before, after = terms(plain), terms(other)
    for name in LOSSES - {"mimic_cls", "mimic_reg"}:
        assert torch.allclose(after.losses[name], before.losses[name], rtol=1e-5, atol=1e-6), name
    for name in ("roi_positives", "mined_positives"):
        assert torch.equal(after.metrics[name], before.metrics[name])
    for (_, few), (_, many) in zip(looked_at(plain, targets()), looked_at(other, targets()), strict=True):
        assert few <= many
        assert (few == many) == (num_boxes <= 10)
    moved = parts_gradients(plain, "teacher_cls", "teacher_box"), parts_gradients(other, "teacher_cls", "teacher_box")
    for name, gradient in moved[0].items():
        assert torch.allclose(moved[1][name], gradient, rtol=1e-4, atol=1e-5), name


# ---- without a teacher ----


def test_without_a_teacher_the_student_learns_the_same() -> None:
    model, alone = detector(), detector(teacher=replace(TINY.teacher, enabled=False))
    own = alone.state_dict()
    left = {name for name in model.state_dict() if name not in own}
    assert left == {
        name for name in model.state_dict() if name.startswith(("teacher.", "pyramid.lateral.2.", "pyramid.output.2."))
    }
    alone.load_state_dict({name: value for name, value in model.state_dict().items() if name in own})
    with_teacher, without = terms(model), terms(alone)
    assert without.losses.keys() == STUDENT_LOSSES
    assert without.metrics.keys() == {"mined_positives"}
    for name in ("refine_cls", "refine_box"):
        assert torch.equal(without.losses[name], with_teacher.losses[name])
    for name in ("student_cls", "student_box"):
        assert torch.allclose(without.losses[name], with_teacher.losses[name], rtol=1e-5)
    # So do the gradients of what both have.
    theirs = parts_gradients(model, *STUDENT_LOSSES)
    for name, gradient in parts_gradients(alone, *STUDENT_LOSSES).items():
        assert torch.allclose(gradient, theirs[name], rtol=1e-4, atol=1e-5), name


def test_without_a_teacher_nothing_of_a_lower_level_is_computed() -> None:
    model = detector(teacher=replace(TINY.teacher, enabled=False))
    assert model.pyramid.lowest == 3
    assert set(model.pyramid.lateral) == set(model.pyramid.output) == {"3", "4", "5"}
    shapes: list[set[int]] = []
    model.pyramid.register_forward_hook(lambda _, __, output: shapes.append(set(output)))
    terms(model)
    assert shapes == [{3, 4, 5}]


# ---- warm-up ----


@pytest.mark.parametrize("sections", [{"mimic": MimicConfig(warmup_steps=3, cls_weight=2.0)}, OTHER])
def test_mimicking_is_warmed_up_by_the_step_and_nothing_else_is(sections: dict[str, Any]) -> None:
    model = detector(**sections)
    whole = terms(model)
    for step, rise in ((0, 0.25), (2, 0.75), (3, 1), (1, 0.5), (1000, 1)):
        model.at_step(step)
        answer = terms(model)
        for name, values in whole.losses.items():
            wanted = values * rise if name in ("mimic_cls", "mimic_reg") else values
            assert torch.allclose(answer.losses[name], wanted, rtol=1e-6), (name, step)
        assert all(torch.equal(answer.metrics[name], values) for name, values in whole.metrics.items())


def test_without_warm_up_a_step_changes_nothing() -> None:
    model = detector()
    before = terms(model).losses
    model.at_step(0)
    assert all(torch.equal(values, before[name]) for name, values in terms(model).losses.items())


# ---- what a loss depends on ----


@pytest.mark.parametrize(
    ("section", "weight", "names"),
    [
        ("refinement", "loss_weight", {"refine_cls", "refine_box"}),
        ("student", "loss_weight", {"student_cls", "student_box"}),
        ("teacher", "loss_weight", {"teacher_cls", "teacher_box"}),
        ("mimic", "cls_weight", {"mimic_cls"}),
        ("mimic", "reg_weight", {"mimic_reg"}),
    ],
)
@pytest.mark.parametrize("factor", [0.0, 4.0])
@pytest.mark.parametrize("sections", [{}, OTHER], ids=["default", "all other options"])
def test_a_weight_scales_the_losses_that_it_names_and_no_other(
    sections: dict[str, Any], section: str, weight: str, names: set[str], factor: float
) -> None:
    other = sections | {section: replace(sections.get(section, getattr(TINY, section)), **{weight: factor})}
    plain, weighted = terms(detector(**sections)), terms(detector(**other))
    assert all(float(plain.losses[name].detach().abs().sum()) > 0 for name in names)
    for name, values in plain.losses.items():
        assert torch.equal(weighted.losses[name], values * (factor if name in names else 1)), name
    assert all(torch.equal(weighted.metrics[name], values) for name, values in plain.metrics.items())


@pytest.mark.parametrize("company", [(2, 0), (1, 0, 2), (0, 0)])
@pytest.mark.parametrize("sections", [{}, OTHER], ids=["default", "all other options"])
def test_losses_of_an_image_do_not_depend_on_its_batch(company: tuple[int, ...], sections: dict[str, Any]) -> None:
    model = detector(**sections)
    alone, together = terms(model, (0,)), terms(model, company)
    for name, values in {**alone.losses, **alone.metrics}.items():
        other = {**together.losses, **together.metrics}[name][company.index(0)]
        assert float(other.detach()) == pytest.approx(float(values[0].detach()), rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("sections", [{}, OTHER], ids=["default", "all other options"])
def test_an_image_has_the_very_same_losses_in_any_company_of_the_same_size(sections: dict[str, Any]) -> None:
    # Kernels may sum in another order for more images, and those of the heads for more boxes; the refinement module
    # sees maps of one shape.
    model = detector(**sections)
    one, other = terms(model, (0, 1)), terms(model, (0, 2))
    for name in ("refine_cls", "refine_box"):
        assert torch.equal(one.losses[name][0], other.losses[name][0]), name
    again = terms(model, (0, 1))
    assert all(torch.equal(values, again.losses[name]) for name, values in one.losses.items())


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


def parts_gradients(model: MimicDet, *names: str) -> dict[str, Tensor]:
    """Gradient of the sum of these losses for every parameter."""
    losses = terms(model).losses
    parameters = dict(model.named_parameters())
    total = torch.stack([losses[name].sum() for name in names]).sum()
    gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True)
    }


def parts_moved(model: MimicDet, *names: str) -> set[str]:
    """Parts of the detector that the sum of these losses has a gradient for that is not zero."""
    moved = {name for name, gradient in parts_gradients(model, *names).items() if gradient.any()}
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


@pytest.mark.parametrize("detach", [True, False])
def test_mimicking_reaches_the_pyramid_through_the_student_only_unless_not_detached(detach: bool) -> None:
    # P2 and C2's place in the pyramid are read by the teacher alone.
    model = detector(mimic=MimicConfig(detach_teacher=detach))
    gradients = parts_gradients(model, "mimic_cls", "mimic_reg")
    read_by_teacher = [name for name in gradients if name.startswith(("pyramid.lateral.2.", "pyramid.output.2."))]
    assert len(read_by_teacher) == 4
    for name in read_by_teacher:
        assert bool(gradients[name].any()) != detach, name
    # Detached is as if the teacher's answers were numbers from elsewhere.
    assert model.teacher is not None
    model.teacher.register_forward_hook(
        lambda _, __, output: HeadOutput(output.logits.detach(), output.deltas, output.feature.detach())
    )
    given = parts_gradients(model, "mimic_cls", "mimic_reg")
    assert all(torch.equal(given[name], gradient) for name, gradient in gradients.items()) == detach


@pytest.mark.parametrize("loss", ["student_cls", "student_box", "teacher_cls", "teacher_box", "mimic_cls", "mimic_reg"])
@pytest.mark.parametrize("detach", [True, False])
def test_boxes_carry_gradients_into_the_refinement_only_when_not_detached(loss: str, detach: bool) -> None:
    # Without offsets the boxes are the only way. Of the losses, only those of boxes are differentiable in them:
    # RoIAlign has no gradient for where it pools.
    model = detector(
        refinement=replace(TINY.refinement, detach_boxes=detach), student=replace(TINY.student, offsets="none")
    )
    gradients = parts_gradients(model, loss)
    moved = {name for name, gradient in gradients.items() if name.startswith("refinement.") and gradient.any()}
    if detach or not loss.endswith("_box"):
        assert not moved
    else:
        assert moved == {f"refinement.{layer}.{kind}" for layer in ("conv", "deltas") for kind in ("weight", "bias")}


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
@pytest.mark.parametrize("teacher", [True, False])
def test_every_parameter_gets_a_finite_gradient(pyramid: PyramidConfig, which: tuple[int, ...], teacher: bool) -> None:
    model = detector(pyramid=pyramid, teacher=replace(TINY.teacher, enabled=teacher))
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


CROWDED = torch.rand(200, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([28.0, 12, 20, 20])


@pytest.mark.parametrize(
    ("boxes", "size"),
    [
        pytest.param([], (64, 64), id="nothing"),
        pytest.param([[17.0, 33, 20, 35.5]], (64, 64), id="smaller than a stride"),
        pytest.param([[20.0, 20, 20.01, 20.02]], (64, 64), id="smaller than a pixel"),
        pytest.param(
            torch.cat([CROWDED[:, :2], CROWDED[:, :2] + CROWDED[:, 2:] + 0.5], 1).tolist(),
            (16, 32),
            id="200 objects on eight cells",
        ),
        pytest.param([[0.0, 0, 64, 50], [0, 30, 10, 50], [54, 0, 64, 9]], (50, 64), id="on the border"),
        pytest.param([[-20.0, 10, 20, 40], [40, -8, 90, 24], [-99, -99, 99, 99]], (50, 64), id="over the border"),
        pytest.param([[0.0, 0, 2, 3]], (3, 2), id="the smallest image"),
        pytest.param([[5.0, 5, 37, 37]] * 3, (64, 64), id="one box three times"),
    ],
)
@pytest.mark.parametrize(
    "sections",
    [{}, OTHER, {"teacher": replace(TINY.teacher, enabled=False)}],
    ids=["default", "all other options", "no teacher"],
)
def test_hard_images_are_learned_from(boxes: list[Box], size: tuple[int, int], sections: dict[str, Any]) -> None:
    model = detector(**sections)
    target = {"boxes": torch.tensor(boxes).reshape(-1, 4), "labels": torch.arange(len(boxes)) % NUM_CLASSES}
    image = torch.rand(3, *size, generator=torch.Generator().manual_seed(0))
    losses = model.loss_terms([image], [{**target, "key": torch.tensor(0)}]).losses
    assert all(value.isfinite().all() for value in losses.values()), losses
    torch.stack(list(losses.values())).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
    for part in ("backbone", "pyramid", "refinement", "student"):
        assert any(g.any() for name, g in gradients.items() if g is not None and name.startswith(part)), part


@pytest.mark.slow
def test_an_object_smaller_than_a_cell_is_learned() -> None:
    # 6 px on cells of 8 px and anchors of 16 px: no centre lies in the object, and no anchor overlaps it much.
    torch.manual_seed(1)
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    image[:, 33:39, 17:23] = 255
    target = {"boxes": torch.tensor([[17.0, 33, 23, 39]]), "labels": torch.tensor([2])}
    model = MimicDet(replace(TINY, anchors=replace(TINY.anchors, scale=2.0)), NUM_CLASSES).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    refine_box, positives = [], []
    for step in range(200):
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


def test_box_losses_may_be_divided_by_the_positives() -> None:
    plain, other = terms(detector()), terms(detector(box_loss_over="positives"))
    for name, share, num in (("student_box", "mined_positives", 12), ("teacher_box", "roi_positives", 10)):
        for i in (0, 1):
            positives = float(plain.metrics[share][i])
            assert positives * num >= 1
            assert float(other.losses[name][i]) == pytest.approx(float(plain.losses[name][i]) / positives, rel=1e-5)
        assert float(other.losses[name][2]) == 0  # nothing is positive
    assert all(
        torch.equal(other.losses[name], plain.losses[name]) for name in plain.losses if not name.endswith("_box")
    )


def test_without_a_first_regression_boxes_are_the_anchors() -> None:
    model = detector(refinement=replace(TINY.refinement, regress=False))
    assert not [name for name, _ in model.named_parameters() if name.startswith("refinement.deltas")]
    for scene in scenes(model):
        for p in scene.inside:
            x1, y1, x2, _ = scene.anchors[p]
            assert scene.refined[p] == pytest.approx(
                [max(x1, 0), max(y1, 0), min(x2, 64), scene.refined[p][3]], abs=1e-3
            )
    answer = terms(model)
    assert answer.losses["refine_box"].tolist() == [0, 0, 0]
    assert all(values.isfinite().all() for values in answer.losses.values())
    assert len(model.eval().detect(images())) == 3


def test_images_without_boxes_to_mimic_do_not_count_as_alike() -> None:
    crowd = [{**target, "iscrowd": torch.ones_like(target["iscrowd"])} for target in targets()]
    crowd[0]["boxes"] = torch.tensor([[0.0, 0, 64, 64]] * 3)
    metrics = detector().loss_terms(images(), crowd, pad_to=(SIZE, SIZE)).metrics
    assert float(metrics["cosine_cls"][0]) == float(metrics["cosine_reg"][0]) == 0
