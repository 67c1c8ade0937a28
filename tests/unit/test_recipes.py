"""The recipes for COCO at their real size: what each changes, how many weights it has, what an image costs.

Nothing is computed: on the meta device tensors have shapes and no values, and multiplications are counted.
"""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import TypeVar

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mimicdet import MimicDet
from mimicdet.config import is_published_name
from mimicdet.shared import Shared
from mimicdet.student import HeadOutput
from mimiclab.experiment import differences, load_experiment
from mimiclab.schema import Experiment

pytestmark = pytest.mark.usefixtures("one_thread")

T = TypeVar("T")

COCO = Path(__file__).parents[2] / "experiments" / "coco"
BASE = "r50-1x"
LONGER = {
    "data.resize.train_short: null -> [640, 800]",
    "optim.milestones: [8, 11] -> [16, 22]",
}
# Of every file: the one that it extends, and what it changes there besides its name.
CHANGES: dict[str, tuple[str, set[str]]] = {
    "r101-2x": (BASE, {'model.backbone.name: "resnet50" -> "resnet101"', *LONGER}),
    "x101-64x4d-2x": ("r101-2x", {'model.backbone.name: "resnet101" -> "resnext101_64x4d"'}),
    "mimic-none": (BASE, {"model.mimic.cls_weight: 1.0 -> 0.0", "model.mimic.reg_weight: 1.0 -> 0.0"}),
    "mimic-cls-only": (BASE, {"model.mimic.reg_weight: 1.0 -> 0.0"}),
    "mimic-reg-only": (BASE, {"model.mimic.cls_weight: 1.0 -> 0.0"}),
    "student-only": (BASE, {"model.teacher.enabled: true -> false"}),
    "stagger-0": (BASE, {"model.pyramid.stagger: 1 -> 0"}),
    "teacher-attached": (BASE, {"model.mimic.detach_teacher: true -> false"}),
    "mimic-centered-logits": (BASE, {"model.mimic.centered_logits: false -> true"}),
    "mimic-reg-positives": (BASE, {"model.mimic.reg_positives_only: false -> true"}),
    "offsets-analytic": (BASE, {'model.student.offsets: "learned" -> "analytic"'}),
    "offsets-analytic-learned": (BASE, {'model.student.offsets: "learned" -> "analytic_learned"'}),
    "offsets-none": (BASE, {'model.student.offsets: "learned" -> "none"'}),
    "kernel-3": (BASE, {"model.student.kernel_sizes: [3, 5] -> [3, 3]"}),
    "mining-quota": (BASE, {"model.student.positive_fraction: null -> 0.25"}),
    "mining-cls": (BASE, {'model.student.mining: "sum" -> "cls"'}),
    "mining-random": (BASE, {'model.student.mining: "sum" -> "random"'}),
    "mining-quota-random": ("mining-quota", {'model.student.mining: "sum" -> "random"'}),
    "student-iou-06": (BASE, {"model.student.iou_threshold: 0.5 -> 0.6"}),
    "teacher-iou-06": (BASE, {"model.teacher.iou_threshold: 0.5 -> 0.6"}),
    "class-space-sigmoid": (BASE, {'model.class_space: "softmax" -> "sigmoid"'}),
    "anchor-scale-8": (BASE, {"model.anchors.scale: 4.0 -> 8.0"}),
    "ignore-ring-05": (BASE, {"model.refinement.ignore_ratio: 0.3 -> 0.5"}),
    "refine-focal": (BASE, {'model.refinement.loss: "sampled" -> "focal"'}),
    "refine-none": (BASE, {"model.refinement.regress: true -> false"}),
    "extra-from-c5": (BASE, {'model.pyramid.extra_from: "p5" -> "c5"'}),
}
RECIPES = [BASE, *CHANGES]
SCHEDULES = {BASE: 12, "r101-2x": 24, "x101-64x4d-2x": 24}

NUM_CLASSES = 80
SIZE = (800, 1344)  # what an image of 800 x 1333 is padded to
LEVELS = {2: (200, 336), 3: (100, 168), 4: (50, 84), 5: (25, 42), 6: (13, 21), 7: (7, 11)}


def path_of(recipe: str) -> Path:
    return COCO / ("" if recipe in SCHEDULES else "ablations") / f"{recipe}.yaml"


@cache
def load(recipe: str) -> Experiment:
    return load_experiment(path_of(recipe), environ={"MIMICLAB_DATA": "/data"}).experiment


@cache
def build(recipe: str) -> MimicDet:
    with torch.device("meta"):
        return MimicDet(load(recipe).model, NUM_CLASSES, pretrained=False).eval()


def gmac(compute: Callable[[], T]) -> tuple[T, float]:
    """What is computed, and 1e9 multiply-adds of its convolutions and matrix products."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        result = compute()
    return result, counter.get_total_flops() / 2e9


# ---- what the files say ----


def test_every_file_is_known_here() -> None:
    assert set(COCO.rglob("*.yaml")) == {path_of(recipe) for recipe in RECIPES}


@pytest.mark.parametrize("recipe", CHANGES)
def test_a_recipe_changes_what_it_claims_and_nothing_else(recipe: str) -> None:
    base, changes = CHANGES[recipe]
    assert set(differences(load(base), load(recipe))) == {f'name: "coco-{base}" -> "coco-{recipe}"', *changes}
    # No part of a run's identity, yet of a fair comparison.
    assert load(recipe).scale == load(BASE).scale
    assert load(recipe).optim.epochs == SCHEDULES.get(recipe, 12)


@pytest.mark.parametrize("recipe", CHANGES)
def test_the_table_names_the_file_that_is_extended(recipe: str) -> None:
    text = path_of(recipe).read_text()
    extends = next(line.removeprefix("extends: ") for line in text.splitlines() if line.startswith("extends: "))
    assert (path_of(recipe).parent / extends).resolve() == path_of(CHANGES[recipe][0])
    assert text.startswith("# ")


@pytest.mark.parametrize("recipe", SCHEDULES)
def test_the_weights_are_published_for_the_backbone(recipe: str) -> None:
    backbone = load(recipe).model.backbone
    assert backbone.weights is not None
    assert is_published_name(backbone.weights)
    assert backbone.weights in torchvision.models.get_model_weights(backbone.name).__members__
    assert (backbone.norm, backbone.frozen_stages) == ("frozen_bn", 2)


def test_the_base_is_the_recipe_on_record() -> None:
    experiment = load(BASE)
    resize, optim = experiment.data.resize, experiment.optim
    assert (resize.short, resize.long, resize.train_short, experiment.data.flip) == (800, 1333, None, 0.5)
    assert (optim.name, optim.momentum, optim.weight_decay, optim.lr) == ("sgd", 0.9, 1e-4, 0.02)
    assert (optim.global_batch, optim.warmup_steps, optim.milestones) == (16, 500, (8, 11))
    student, teacher, mimic = experiment.model.student, experiment.model.teacher, experiment.model.mimic
    # The highest loss of all, without a quota, is the one default of the detector that is not what is on record.
    assert (student.offsets, student.kernel_sizes, student.positive_fraction) == ("learned", (3, 5), None)
    assert (student.num_samples, teacher.num_rois, teacher.positive_fraction) == (128, 128, 0.25)
    assert (mimic.cls_weight, mimic.reg_weight) == (1.0, 1.0)


# ---- how many weights ----


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def conv(channels: int, out: int, kernel: int = 1) -> int:
    """Weights and biases of a convolution; with a kernel of 1 also of a fully connected layer."""
    return channels * out * kernel**2 + out


def backbone_weights(name: str) -> int:
    """Convolutions of torchvision's network: frozen norms have no parameters, and the classifier is left out."""
    with torch.device("meta"):
        net = torchvision.models.get_model(name)
    return sum(parameter.numel() for parameter in net.parameters() if parameter.ndim == 4)


P2 = conv(256, 256) + conv(256, 256, 3)
PYRAMID = sum(conv(c, 256) + conv(256, 256, 3) for c in (256, 512, 1024, 2048)) + 2 * conv(256, 256, 3)
REFINEMENT = conv(256, 256, 3) + conv(256, 1) + conv(256, 4)
POOLED = 7 * 7 * 256
TEACHER = (
    (conv(POOLED, 1024) + conv(1024, 1024) + conv(1024, 81))  # class
    + (4 * conv(256, 256, 3) + conv(POOLED, 1024) + conv(1024, 4))  # box
)


def micro(kernel: int) -> int:
    return conv(4, 64) + conv(64, 128) + conv(128, 2 * kernel**2)


STUDENT = sum(micro(k) + conv(256, 256, k) for k in (3, 5)) + 2 * conv(256, 1024) + conv(1024, 81) + conv(1024, 4)
# Of those that have other weights than what they extend.
MORE_WEIGHTS = {
    "r101-2x": backbone_weights("resnet101") - backbone_weights("resnet50"),
    "x101-64x4d-2x": backbone_weights("resnext101_64x4d") - backbone_weights("resnet101"),
    "student-only": -TEACHER - P2,
    "stagger-0": -P2,
    "offsets-analytic": -micro(3) - micro(5),
    "offsets-none": -micro(3) - micro(5),
    "kernel-3": micro(3) + conv(256, 256, 3) - micro(5) - conv(256, 256, 5),
    "class-space-sigmoid": -2 * conv(1024, 1),
    "refine-none": -conv(256, 4),
    "extra-from-c5": conv(2048, 256, 3) - conv(256, 256, 3),
}


def test_the_base_has_the_weights_that_its_layers_add_up_to() -> None:
    model = build(BASE)
    assert model.teacher is not None
    assert count(model.backbone) == backbone_weights("resnet50") == 23_454_912
    assert count(model.pyramid) == PYRAMID
    assert count(model.refinement) == REFINEMENT
    assert count(model.student) == STUDENT
    assert count(model.teacher) == TEACHER
    assert count(model) == backbone_weights("resnet50") + PYRAMID + REFINEMENT + STUDENT + TEACHER


@pytest.mark.parametrize("recipe", CHANGES)
def test_a_recipe_has_no_other_weights_than_its_change_brings(recipe: str) -> None:
    base, _ = CHANGES[recipe]
    assert count(build(recipe)) - count(build(base)) == MORE_WEIGHTS.get(recipe, 0)


def test_the_student_alone_has_neither_a_teacher_nor_a_level_for_it() -> None:
    model = build("student-only")
    assert model.teacher is None
    assert not [name for name, _ in model.named_parameters() if name.startswith("teacher")]
    assert set(model.pyramid.lateral) == set(model.pyramid.output) == {"3", "4", "5"}


# ---- what an image costs ----


def image() -> Tensor:
    return torch.empty(1, 3, *SIZE, device="meta")


def share(model: MimicDet, lowest: int) -> tuple[Shared, float]:
    """Backbone, pyramid from level `lowest` and refinement of one image, and their cost."""
    return gmac(lambda: model.share(image(), [SIZE], lowest=lowest))


def student_gmac(model: MimicDet, shared: Shared, num: int) -> float:
    """At most what the S-head costs at `num` positions: as if all of them were on the levels of the dearest kernel.

    Its own choice by level needs values, which meta tensors do not have. Not counted: the bilinear gather, 4
    multiply-adds per tap and channel, 0.03 GMAC for 1000 positions of 25 taps.
    """
    index, deltas = torch.zeros(num, dtype=torch.int64, device="meta"), torch.zeros(num, 4, device="meta")

    def evaluate(sampler: nn.Module) -> HeadOutput:
        return model.student.predict(sampler(shared.features, deltas, shared.grid, index, index))

    return max(gmac(partial(evaluate, sampler))[1] for sampler in model.student.samplers)


@cache
def deployed_gmac(recipe: str) -> float:
    """What finding the objects of one image costs, at most, less the NMS."""
    model = build(recipe)
    shared, cost = share(model, lowest=3)
    return cost + student_gmac(model, shared, model.config.inference.topk)


def on_the_page(part: str) -> float:
    """GMAC that the table of experiments/coco/README.md gives for a part."""
    rows = [line.strip("| ").split(" | ") for line in (COCO / "README.md").read_text().splitlines()]
    (value,) = (row[1] for row in rows if len(row) == 2 and row[0].strip("*").startswith(part))
    return float(value.strip("*"))


@pytest.mark.parametrize("recipe", SCHEDULES)
def test_levels_have_the_shapes_of_their_strides(recipe: str) -> None:
    shared, _ = share(build(recipe), lowest=3)
    assert {level: tuple(map.shape) for level, map in shared.pyramid.items()} == {
        level: (1, 256, *shape) for level, shape in LEVELS.items() if level > 2
    }
    assert shared.objectness.shape == (1, sum(h * w for level, (h, w) in LEVELS.items() if level > 2)) == (1, 22_400)
    shared, _ = share(build(recipe), lowest=2)
    assert {level: tuple(map.shape[2:]) for level, map in shared.pyramid.items()} == LEVELS


def test_the_deployed_path_costs_what_the_layers_say(record_testsuite_property: Callable[[str, object], None]) -> None:
    model = build(BASE)
    features, backbone = gmac(lambda: model.backbone(image()))
    pyramid, to_p3 = gmac(lambda: model.pyramid(features, lowest=3))
    _, refinement = gmac(lambda: model.refinement([pyramid[level] for level in model.pyramid.low_levels]))
    shared, together = share(model, lowest=3)
    student = student_gmac(model, shared, 1000)

    assert together == pytest.approx(backbone + to_p3 + refinement)
    assert backbone + to_p3 == pytest.approx(105, rel=0.01)
    # Biases are no multiplications.
    assert refinement == pytest.approx(22_400 * (9 * 256 * 256 + 256 * 5) / 1e9)
    head = 25 * 256 * 256 + 4 * 64 + 64 * 128 + 128 * 50 + 2 * 256 * 1024 + 1024 * (81 + 4)
    assert student == pytest.approx(1000 * head / 1e9)
    assert student <= 2.3
    assert together + student == pytest.approx(deployed_gmac(BASE))
    assert deployed_gmac(BASE) <= 125
    parts = {"ResNet-50": backbone, "pyramid": to_p3, "refinement": refinement, "S-head": student}
    for name, cost in {**parts, "deployed": deployed_gmac(BASE)}.items():
        record_testsuite_property(f"GMAC of {name}", round(cost, 2))
        assert on_the_page(name) == round(cost, 1)


def test_a_retinanet_on_the_same_pyramid_costs_twice_as_much(
    record_testsuite_property: Callable[[str, object], None],
) -> None:
    # torchvision's head: 9 anchors, 91 classes.
    with torch.device("meta"):
        head = torchvision.models.detection.retinanet.RetinaNetHead(256, 9, 91)
    shared, _ = share(build(BASE), lowest=3)
    _, whole = gmac(lambda: head([shared.pyramid[level] for level in range(3, 8)]))
    model = build(BASE)
    _, trunk = gmac(lambda: model.pyramid(model.backbone(image()), lowest=3))
    record_testsuite_property("GMAC of RetinaNet", round(whole + trunk, 1))
    assert on_the_page("RetinaNet") == round(whole + trunk, 1) == pytest.approx(254, rel=0.01)
    assert deployed_gmac(BASE) < 0.5 * (whole + trunk)


def test_what_training_adds_costs_what_the_layers_say(record_testsuite_property: Callable[[str, object], None]) -> None:
    model = build(BASE)
    teacher = model.teacher
    assert teacher is not None
    _, low = share(model, lowest=3)
    _, high = share(model, lowest=2)
    assert high - low == pytest.approx(200 * 336 * (256 * 256 + 9 * 256 * 256) / 1e9)
    assert high - low == pytest.approx(44, rel=0.01)

    # Behind RoIAlign, whose way to the levels needs values.
    pooled = torch.empty(128, 256, 7, 7, device="meta")
    _, cls = gmac(lambda: teacher.logits(teacher.cls_hidden(pooled)))
    _, box = gmac(lambda: teacher.deltas(teacher.reg_hidden(pooled)))
    by_class = POOLED * 1024 + 1024 * 1024 + 1024 * 81
    by_box = 4 * 49 * 9 * 256 * 256 + POOLED * 1024 + 1024 * 4
    assert cls + box == pytest.approx(128 * (by_class + by_box) / 1e9)
    assert cls + box == pytest.approx(18, rel=0.02)
    assert on_the_page("training only: P2") == round(high - low, 1)
    assert on_the_page("training only: T-head") == round(cls + box, 1)
    record_testsuite_property("GMAC of P2", round(high - low, 2))
    record_testsuite_property("GMAC of T-head at 128", round(cls + box, 2))


# What changes the deployed network; all else is for training.
DEPLOYED = {
    "r101-2x",
    "x101-64x4d-2x",
    "offsets-analytic",
    "offsets-none",
    "kernel-3",
    "class-space-sigmoid",
    "refine-none",
    "extra-from-c5",
}


@pytest.mark.parametrize("recipe", CHANGES)
def test_only_changes_of_the_deployed_network_change_its_cost(recipe: str) -> None:
    base, _ = CHANGES[recipe]
    assert (deployed_gmac(recipe) != deployed_gmac(base)) == (recipe in DEPLOYED)
    assert deployed_gmac(recipe) <= 125 or "x101" in recipe or "r101" in recipe


@pytest.mark.parametrize(("recipe", "published"), [("r101-2x", 7.801), ("x101-64x4d-2x", 15.46)])
def test_deeper_backbones_cost_as_much_more_as_classifiers_do(recipe: str, published: float) -> None:
    """torchvision publishes multiply-adds at 224 x 224, with a classifier of 2 million."""
    (height, width), more = SIZE, deployed_gmac(recipe) - deployed_gmac(BASE)
    assert more == pytest.approx((published - 4.089) * height * width / 224**2, rel=0.01)


def test_the_level_of_the_teacher_is_computed_for_training_alone() -> None:
    model = build(BASE)
    seen: list[str] = []
    for name in ("lateral", "output"):
        layers = getattr(model.pyramid, name)
        layers["2"].register_forward_hook(lambda *_, name=name: seen.append(name))
    shared, _ = share(model, lowest=model.pyramid.low_levels[0])
    assert seen == []
    assert 2 not in shared.pyramid
    share(model, lowest=model.pyramid.lowest)
    assert sorted(seen) == ["lateral", "output"]


@pytest.mark.slow
def test_detecting_runs_neither_the_teacher_nor_its_level() -> None:
    # On values, at the real width, of a small image.
    model = MimicDet(load(BASE).model, NUM_CLASSES, pretrained=False).eval()
    seen: list[str] = []
    assert model.teacher is not None
    parts = {"lateral": model.pyramid.lateral["2"], "output": model.pyramid.output["2"], "teacher": model.teacher}
    for name, part in parts.items():
        part.register_forward_hook(lambda *_, name=name: seen.append(name))
    model([torch.rand(3, 64, 64)])
    assert seen == []
    # All 86 boxes: for a few, P2's convolution is computed where they look, past the module.
    model.detect_heads([torch.rand(3, 64, 64)], topk=86)
    assert sorted(seen) == ["lateral", "output", "teacher"]
