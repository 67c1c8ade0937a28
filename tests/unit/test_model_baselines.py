"""torchvision's detectors stay what they are behind this package's interface, and train and score by the platform."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign, box_iou, roi_align

from mimicdet import ModelConfig
from mimicdet.baselines import Baseline
from mimicdet.config import (
    AnchorConfig,
    BackboneConfig,
    InferenceConfig,
    PyramidConfig,
    StudentConfig,
    TeacherConfig,
)
from mimicdet.interface import Detections
from mimiclab.build import build_detector
from mimiclab.data.coco import read_coco
from mimiclab.engine import Batch, Engine
from mimiclab.evaluate import evaluate
from mimiclab.evaluation_report import validation_pictures
from mimiclab.optim import OptimConfig
from mimiclab.progress import ProgressView
from mimiclab.schema import DataConfig, EvalConfig, Resize, Scenes
from mimiclab.tables import heads_table

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("retinanet", "fcos", "faster_rcnn")
NUM_CLASSES = 3
TINY = ModelConfig(
    backbone=BackboneConfig(name="resnet18", width=8),
    pyramid=PyramidConfig(channels=16, max_level=6),
    anchors=AnchorConfig(scale=2),
    inference=InferenceConfig(score_threshold=0.004, nms_iou=0.7, max_detections=40),
)
# As in the papers: five levels of 256 channels, 32 pixels at P3.
PUBLISHED = replace(TINY, pyramid=PyramidConfig(), anchors=AnchorConfig(scale=4))
LIMITS = {"score_thresh": 0.004, "nms_thresh": 0.7, "detections_per_img": 40}


def baseline(kind: Any, config: ModelConfig = TINY, **sections: Any) -> Baseline:
    """A tiny detector with opinions: scores and boxes that differ from place to place."""
    torch.manual_seed(0)
    model = Baseline(replace(config, detector=kind, **sections), NUM_CLASSES)
    for module in model.net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and module.weight.std() < 0.02:
            nn.init.normal_(module.weight, std=0.03)
    return model.eval()


def images(*sizes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(256, (3, *size), generator=generator, dtype=torch.uint8) for size in sizes]


def targets() -> list[dict[str, Tensor]]:
    return [
        {
            "boxes": torch.tensor([[5.0, 4, 36, 37], [10, 20, 29, 38]]),
            "labels": torch.tensor([0, 2]),
            "key": torch.tensor(5),
        },
        {"boxes": torch.tensor([[2.0, 3, 22, 19]]), "labels": torch.tensor([1]), "key": torch.tensor(2**62)},
    ]


PAIR = ((64, 50), (40, 64))


def assert_same(ours: list[Detections], theirs: list[Detections]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys() == {"boxes", "scores", "labels"}
        assert all(torch.equal(a[name], b[name]) for name in a)


# ---- torchvision's own ----


class _KeepSize(GeneralizedRCNNTransform):  # type: ignore[misc]  # torchvision ships no types
    """torchvision's normalisation and padding; images keep their size in evaluation too."""

    def resize(self, image: Tensor, target: Any = None) -> Any:
        return image, target

    def batch_images(self, images: list[Tensor], size_divisible: int = 32) -> Tensor:
        batch: Tensor = super().batch_images(images, size_divisible)
        return batch.contiguous(memory_format=torch.channels_last)  # as ours: sums are added up in its order


def torchvisions(model: Baseline) -> nn.Module:
    """torchvision's class with its own anchors, assignment and inputs, and the weights of `model`."""
    backbone = model.net.backbone
    net: nn.Module
    if model.config.detector == "retinanet":
        net = RetinaNet(backbone, NUM_CLASSES, **LIMITS)
    elif model.config.detector == "fcos":
        net = FCOS(backbone, NUM_CLASSES, **LIMITS)
    else:
        net = FasterRCNN(
            backbone,
            NUM_CLASSES + 1,
            box_roi_pool=MultiScaleRoIAlign(["2", "3", "4", "5"], 7, 2),
            **{f"box_{name}": value for name, value in LIMITS.items()},
        )
    net.transform = _KeepSize(1, 1, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    net.load_state_dict(model.net.state_dict())
    return net


@pytest.mark.parametrize("kind", KINDS)
def test_losses_at_the_published_anchors_are_those_of_torchvision(kind: str) -> None:
    model = baseline(kind, PUBLISHED)
    first = 1 if kind == "faster_rcnn" else 0
    theirs = [{"boxes": each["boxes"], "labels": each["labels"] + first} for each in targets()]
    net = torchvisions(model).train()
    torch.manual_seed(5 + 2**62)  # both images' keys
    wanted = net([image / 255 for image in images(*PAIR)], theirs)

    terms = model.train().loss_terms(images(*PAIR), targets())

    assert terms.losses.keys() == wanted.keys()
    assert len(wanted) == {"retinanet": 2, "fcos": 3, "faster_rcnn": 4}[kind]
    for name, value in wanted.items():
        assert torch.equal(terms.losses[name], value.expand(2)), name
        assert value.item() > 0
    assert terms.metrics == {}


@pytest.mark.parametrize("kind", KINDS)
def test_detections_at_the_published_anchors_are_those_of_torchvision(kind: str) -> None:
    model = baseline(kind, PUBLISHED)
    wanted = torchvisions(model).eval()([image / 255 for image in images(*PAIR)])

    found = model(images(*PAIR))

    assert all(len(each["scores"]) > 10 for each in wanted)  # the comparison has something to compare
    first = 1 if kind == "faster_rcnn" else 0
    assert_same(found, [{**each, "labels": each["labels"] - first} for each in wanted])
    assert len({label for each in found for label in each["labels"].tolist()}) > 1


# ---- anchors ----


def cell_anchors(model: Baseline) -> list[Tensor]:
    generator = model.net.rpn.anchor_generator if model.first_label else model.net.anchor_generator
    return [cell.double() for cell in generator.cell_anchors]


def sides(model: Baseline) -> list[list[float]]:
    """Of each level: sqrt(area) of its anchors, sorted."""
    return [sorted((cell[:, 2:] - cell[:, :2]).prod(1).sqrt().tolist()) for cell in cell_anchors(model)]


def test_retinanet_has_three_sizes_an_octave_from_the_experiments_anchor_on() -> None:
    for scale, pyramid in ((4.0, PyramidConfig(channels=16)), (2.0, PyramidConfig(channels=16, max_level=5))):
        found = sides(baseline("retinanet", anchors=AnchorConfig(scale=scale), pyramid=pyramid))
        assert len(found) == pyramid.max_level - 2
        for level, here in enumerate(found, start=3):
            wanted = [scale * 2**level * 2 ** (octave / 3) for octave in (0, 0, 0, 1, 1, 1, 2, 2, 2)]
            assert here == pytest.approx(wanted, rel=0.02, abs=1.5)  # torchvision's are of whole pixels


def test_faster_rcnn_has_retinanets_first_sizes_a_level_lower() -> None:
    for pyramid, num_levels in ((PyramidConfig(channels=16), 5), (PyramidConfig(channels=16, max_level=5), 4)):
        found = sides(baseline("faster_rcnn", pyramid=pyramid))
        assert len(found) == num_levels
        for level, here in enumerate(found, start=2):
            assert here == pytest.approx([4 * 2**level] * 3, abs=1)  # scale 2


@pytest.mark.parametrize("kind", ["retinanet", "faster_rcnn"])
def test_anchors_are_twice_as_high_as_wide_square_or_the_reverse(kind: str) -> None:
    cell = cell_anchors(baseline(kind, PUBLISHED))[-1]  # large: rounding is small
    width, height = (cell[:, 2:] - cell[:, :2]).unbind(1)
    assert sorted((height / width).tolist()) == pytest.approx(sorted([0.5, 1, 2] * (len(cell) // 3)), rel=0.02)


def fcos_positives(scale: float, box: list[float]) -> list[tuple[int, float, float]]:
    """Level and centre of every position that FCOS makes responsible for a box in an image of 256 pixels."""
    model = baseline("fcos", anchors=AnchorConfig(scale=scale)).train()
    seen: dict[str, Any] = {}

    def spy(targets: Any, outputs: Any, anchors: list[Tensor], matched: list[Tensor]) -> dict[str, Tensor]:
        seen.update(anchors=anchors[0], positive=matched[0] >= 0)
        return {}

    model.net.head.compute_loss = spy
    model.loss_terms(images((256, 256)), [{"boxes": torch.tensor([box]), "labels": torch.tensor([0])}])
    numbers = torch.cat([torch.full(((256 >> level) ** 2,), level) for level in (3, 4, 5, 6)])
    centres = (seen["anchors"][:, :2] + seen["anchors"][:, 2:]) / 2
    positive = seen["positive"]
    return [
        (level, *centre) for level, centre in zip(numbers[positive].tolist(), centres[positive].tolist(), strict=True)
    ]


@pytest.mark.parametrize("scale", [1.0, 2.0, 2.5, 4.0])
def test_fcos_gives_a_box_to_the_level_of_its_reach_near_its_centre(scale: float) -> None:
    # Centred between positions of no level, so that distances are clear.
    x, y = 131.0, 126.0
    for level in (3, 4, 5):
        reach = 1.3 * scale * 2**level  # a level answers for farthest edges of scale to 2 scale strides
        found = fcos_positives(scale, [x - reach, y - reach, x + reach, y + reach])
        assert found
        assert max(max(abs(cx - x), abs(cy - y)) for _, cx, cy in found) < 1.5 * 2 ** max(at for at, _, _ in found)
        # The reach from a position beside the centre is up to 1.5 strides more.
        assert level in {at for at, _, _ in found}
        for at, cx, cy in found:
            farthest = reach + max(abs(cx - x), abs(cy - y))
            assert at == 3 or farthest > scale * 2**at
            assert at == 6 or farthest < 2 * scale * 2**at


@pytest.mark.parametrize("scale", [1.5, 2.5])
def test_fcos_leaves_no_size_between_two_levels(scale: float) -> None:
    generator = baseline("fcos", anchors=AnchorConfig(scale=scale)).net.anchor_generator
    widths = [float(cell[0, 2] - cell[0, 0]) for cell in generator.cell_anchors]
    assert widths == [scale / 4 * 2**level for level in (3, 4, 5, 6)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [8, 24])
def test_a_pyramid_may_be_narrow(kind: str, channels: int) -> None:
    model = baseline(kind, pyramid=PyramidConfig(channels=channels, max_level=6)).train()
    losses = model.loss_terms(images((64, 64)), targets()[:1]).losses  # P6 is a single position
    assert all(torch.isfinite(value).all() for value in losses.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("lowest", "highest"), [(2, 5), (3, 6), (4, 7), (5, 5)])
def test_any_pyramid_of_the_experiment_trains_and_detects(kind: str, lowest: int, highest: int) -> None:
    pyramid = PyramidConfig(channels=16, min_level=lowest, max_level=highest, stagger=0)
    model = baseline(kind, pyramid=pyramid)
    assert len(model.detect(images(*PAIR))) == 2
    losses = model.train().loss_terms(images(*PAIR), targets()).losses
    assert all(torch.isfinite(value).all() for value in losses.values())
    if kind != "faster_rcnn":
        assert len(cell_anchors(model)) == highest - lowest + 1


def test_rois_are_pooled_at_the_strides_of_their_levels_whatever_the_padding() -> None:
    model = baseline("faster_rcnn")
    seen: list[tuple[Any, Any]] = []
    model.net.roi_heads.box_roi_pool.register_forward_hook(lambda _, given, pooled: seen.append((given, pooled)))
    model.detect(images((40, 64)), pad_to=(128, 128))
    ((features, boxes, _), pooled) = seen[0]
    assert len(boxes[0]) > 10
    # All of them are smaller than the 112 pixels from which P3 is read.
    assert torch.equal(pooled, roi_align(features["2"], boxes, 7, spatial_scale=1 / 4, sampling_ratio=2))


# ---- labels ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("label", range(NUM_CLASSES))
def test_labels_count_from_0_in_detections_and_in_targets(kind: str, label: int) -> None:
    model = baseline(kind)
    bias = {
        "retinanet": lambda net: net.head.classification_head.cls_logits.bias.view(-1, NUM_CLASSES)[:, label],
        "fcos": lambda net: net.head.classification_head.cls_logits.bias[label],
        "faster_rcnn": lambda net: net.roi_heads.box_predictor.cls_score.bias[label + 1],
    }[kind](model.net)
    with torch.no_grad():
        bias += 12
    for found in model.detect(images(*PAIR)):
        assert found["labels"][:10].tolist() == [label] * 10

    def loss(taught: int) -> float:
        answer = [{**each, "labels": torch.full_like(each["labels"], taught)} for each in targets()]
        losses = model.train().loss_terms(images(*PAIR), answer).losses
        return losses["loss_classifier" if kind == "faster_rcnn" else "classification"][0].item()

    assert min(range(NUM_CLASSES), key=loss) == label


# ---- sampling ----


def faster_losses(given: list[dict[str, Tensor]], model: Baseline | None = None) -> dict[str, float]:
    model = baseline("faster_rcnn") if model is None else model
    losses = model.train().loss_terms(images(*PAIR), given).losses
    return {name: value[0].item() for name, value in losses.items()}


def with_keys(*keys: int) -> list[dict[str, Tensor]]:
    return [{**each, "key": torch.tensor(key)} for each, key in zip(targets(), keys, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_keys_decide_and_the_generator_stays_as_it_was(kind: str) -> None:
    model = baseline(kind).train()
    answers = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        answers.append(model.loss_terms(images(*PAIR), targets()).losses)
        assert torch.equal(torch.get_rng_state(), before)
    for name, value in answers[0].items():
        assert torch.equal(value, answers[1][name]), name


def test_every_key_of_a_batch_counts() -> None:
    model = baseline("faster_rcnn")
    first = faster_losses(with_keys(3, 4), model)
    assert faster_losses(with_keys(3, 4), model) == first
    assert faster_losses(with_keys(8, 4), model)["loss_objectness"] != first["loss_objectness"]
    assert faster_losses(with_keys(3, 9), model)["loss_objectness"] != first["loss_objectness"]


def test_keys_may_be_any_64_bits() -> None:
    largest = 2**63 - 1
    assert np.isfinite(list(faster_losses(with_keys(largest, largest)).values())).all()
    assert np.isfinite(list(faster_losses(with_keys(-largest - 1, 1)).values())).all()


def test_without_keys_the_generator_decides() -> None:
    model = baseline("faster_rcnn")
    keyless = [{name: value for name, value in each.items() if name != "key"} for each in targets()]
    torch.manual_seed(1)
    first, second = (faster_losses(keyless, model) for _ in range(2))
    torch.manual_seed(1)
    assert faster_losses(keyless, model) == first
    assert first["loss_objectness"] != second["loss_objectness"]


# ---- conventions ----


@pytest.mark.parametrize("kind", KINDS)
def test_crowds_are_dropped(kind: str) -> None:
    model = baseline(kind).train()
    crowded = targets()
    crowded[0]["iscrowd"] = torch.tensor([False, True])
    crowded[1]["iscrowd"] = torch.tensor([True])
    dropped = [
        {**each, "boxes": each["boxes"][:n], "labels": each["labels"][:n]}
        for each, n in zip(targets(), (1, 0), strict=True)
    ]
    a, b, all_of_them = (model.loss_terms(images(*PAIR), given).losses for given in (crowded, dropped, targets()))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], all_of_them[name]) for name in a)


@pytest.mark.parametrize("kind", KINDS)
def test_images_without_objects_train(kind: str) -> None:
    model = baseline(kind).train()
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "key": torch.tensor(1)}
    losses = model.loss_terms(images(*PAIR), [empty, empty]).losses
    torch.stack([value.sum() for value in losses.values()]).sum().backward()
    assert all(torch.isfinite(value).all() for value in losses.values())
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients)  # of the background's scores


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_normalised_and_padded_to_exactly_what_is_asked(kind: str) -> None:
    model = baseline(kind)
    seen: list[Tensor] = []
    model.net.backbone.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    pair = images(*PAIR)
    model.detect(pair)
    model.detect(pair, pad_to=(96, 64))
    model.train().loss_terms(pair, targets(), pad_to=(72, 100))
    assert [tuple(batch.shape) for batch in seen] == [(2, 3, 64, 64), (2, 3, 96, 64), (2, 3, 72, 100)]
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    for batch in seen:
        for row, image in zip(batch, pair, strict=True):
            height, width = image.shape[1:]
            assert torch.allclose(row[:, :height, :width], (image / 255 - mean) / std)
            assert not row[:, height:].any()
            assert not row[:, :, width:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_padding_by_default_is_padding_to_the_next_32(kind: str) -> None:
    model = baseline(kind)
    small = [image[:, :33, :40] for image in images(*PAIR)]
    assert_same(model(small), model(small, pad_to=(64, 64)))
    (alone,) = model(small[1:], pad_to=(64, 64))
    together = model(small, pad_to=(64, 64))[1]
    assert torch.equal(alone["labels"], together["labels"])
    assert torch.allclose(alone["boxes"], together["boxes"], atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_detections_are_sorted_and_inside_of_their_own_image(kind: str) -> None:
    model = baseline(kind, inference=InferenceConfig(score_threshold=0.0, nms_iou=1.0, max_detections=500))
    small = images((24, 40), (50, 30))
    for image, found in zip(small, model(small, pad_to=(96, 96)), strict=True):
        assert len(found["boxes"]) == len(found["scores"]) == len(found["labels"]) > 50
        assert torch.equal(found["scores"].sort(descending=True).values, found["scores"])
        limits = torch.tensor([image.shape[2], image.shape[1]]).repeat(2)
        assert (found["boxes"] >= 0).all()
        assert (found["boxes"] <= limits).all()
        assert (found["boxes"].max(0).values[2:] > limits[2:] * 0.9).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_experiments_limits_hold(kind: str) -> None:
    model = baseline(kind, inference=InferenceConfig(score_threshold=0.0, nms_iou=1.0, max_detections=500))
    everything = model.detect(images((64, 64)))[0]["scores"]
    middle = float(everything.median())
    few = baseline(kind, inference=InferenceConfig(score_threshold=0.0, max_detections=7))
    assert len(few.detect(images((64, 64)))[0]["scores"]) == 7
    above = baseline(kind, inference=InferenceConfig(score_threshold=middle, nms_iou=1.0, max_detections=500))
    assert 0 < len(above.detect(images((64, 64)))[0]["scores"]) == int((everything > middle).sum())
    apart = baseline(kind, inference=InferenceConfig(score_threshold=0.0, nms_iou=0.1, max_detections=500))
    (found,) = apart.detect(images((64, 64)))
    assert len(found["scores"]) > NUM_CLASSES
    assert most_overlap(found) <= 0.1 < most_overlap(model.detect(images((64, 64)))[0])


def most_overlap(found: Detections) -> float:
    """The largest IoU of two detections of one class."""
    same_class = found["labels"][:, None] == found["labels"]
    return float((box_iou(found["boxes"], found["boxes"]).nan_to_num() * same_class).fill_diagonal_(0).max())


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_and_numbers_from_0_to_1_are_the_same_image(kind: str) -> None:
    model = baseline(kind)
    assert_same(model(images(*PAIR)), model([image / 255 for image in images(*PAIR)]))


@pytest.mark.parametrize("kind", KINDS)
def test_either_answer_may_be_asked_for_in_either_mode(kind: str) -> None:
    model = baseline(kind)
    detections, losses = model.detect(images(*PAIR)), model.loss_terms(images(*PAIR), targets()).losses
    model.train()
    assert_same(model.detect(images(*PAIR)), detections)
    for name, value in model.loss_terms(images(*PAIR), targets()).losses.items():
        assert torch.equal(value, losses[name]), name
        assert value.shape == (2,)
    assert not any(value.requires_grad for found in detections for value in found.values())


def test_losses_of_an_evaluation_leave_running_statistics_alone() -> None:
    model = baseline("retinanet", backbone=replace(TINY.backbone, norm="sync_bn"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.loss_terms(images(*PAIR), targets())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert any("running_mean" in name for name in before)


@pytest.mark.parametrize("kind", KINDS)
def test_there_is_one_head(kind: str) -> None:
    model = baseline(kind)
    heads = model.detect_heads(images(*PAIR), topk=5)
    assert heads.keys() == {"student"}
    assert_same(heads["student"], model.detect(images(*PAIR)))


def test_what_cannot_be_batched_is_refused() -> None:
    model = baseline("fcos")
    with pytest.raises(ValueError, match="empty list"):
        model([])
    with pytest.raises(ValueError, match=r"pad_to \(64, 60\) is smaller"):
        model(images(*PAIR), pad_to=(64, 60))
    with pytest.raises(ValueError, match="training needs targets"):
        model.train()(images(*PAIR))
    with pytest.raises(ValueError, match="found 2 images, 1 targets"):
        model(images(*PAIR), targets()[:1])
    with pytest.raises(ValueError, match="expected a label from 0 to 2, found 3"):
        model(images(*PAIR), [targets()[1], {**targets()[1], "labels": torch.tensor([3])}])


def test_what_cannot_be_built_is_refused_by_its_key() -> None:
    for kind in ("retinanet", "faster_rcnn"):
        with pytest.raises(ValueError, match=r"anchors\.scale 0\.01"):
            baseline(kind, anchors=AnchorConfig(scale=0.01))
    with pytest.raises(ValueError, match="num_classes must be at least 1"):
        Baseline(replace(TINY, detector="fcos"), 0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_backbones_weights_are_read_unless_a_state_replaces_them(kind: Any, tmp_path: Path) -> None:
    backbone = BackboneConfig(name="resnet18", weights=str(tmp_path / "gone.safetensors"))
    config = replace(TINY, detector=kind, backbone=backbone)
    with pytest.raises(ValueError, match=r"gone\.safetensors: no such file"):
        Baseline(config, NUM_CLASSES)
    model = Baseline(config, NUM_CLASSES, pretrained=False)
    names = {name for name, _ in model.named_parameters()}
    assert not any(".bn1." in name for name in names)  # frozen with the weights' statistics: no parameters
    assert model.backbone_report is None
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen
    assert all(name.startswith("net.backbone.backbone.stages.") for name in frozen)


@pytest.mark.parametrize("kind", KINDS)
def test_the_layers_of_the_classes_are_those_that_other_classes_change(kind: Any) -> None:
    state = baseline(kind).state_dict()
    other = Baseline(replace(TINY, detector=kind), NUM_CLASSES + 1).state_dict()
    changed = {name for name, value in other.items() if value.shape != state[name].shape}
    assert changed
    assert changed == {name for name in state if name.startswith(Baseline.class_layers)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_makes_the_same_detector(kind: Any) -> None:
    source, copy = baseline(kind), Baseline(replace(TINY, detector=kind), NUM_CLASSES).eval()
    copy.load_state_dict(source.state_dict())
    assert_same(copy(images(*PAIR)), source(images(*PAIR)))


# ---- one head, by the platform ----

LEARNER = replace(TINY, pyramid=PyramidConfig(channels=32, max_level=6))
ONE_HEAD = {
    **{kind: replace(LEARNER, detector=kind) for kind in KINDS},
    "student only": replace(
        LEARNER,
        student=StudentConfig(head_width=32, offset_channels=(8, 8), num_samples=16),
        teacher=TeacherConfig(enabled=False),
    ),
}


@pytest.mark.parametrize("config", ONE_HEAD.values(), ids=ONE_HEAD.keys())
@pytest.mark.slow
def test_a_detector_with_one_head_trains_and_is_scored_and_shown(config: ModelConfig, tmp_path: Path) -> None:
    pixels = np.full((64, 64, 3), 90, np.uint8)
    pixels[12:44, 16:48] = (230, 60, 20)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    entry = {"id": 1, "image_id": 1, "category_id": 7, "bbox": [16, 12, 32, 32], "area": 1024, "iscrowd": 0}
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 64, "height": 64}],
        "annotations": [entry],
        "categories": [{"id": 3, "name": "disk"}, {"id": 7, "name": "square"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    dataset = read_coco(tmp_path / "a.json", tmp_path)
    torch.manual_seed(0)
    detector = build_detector(config, dataset.classes)
    num_steps = 12
    optim = OptimConfig(lr=5e-4, global_batch=1, warmup_steps=0, schedule="constant", clip_norm=5)
    engine = Engine(detector, optim, num_steps=num_steps, steps_per_epoch=1)
    target = {"boxes": torch.tensor([[16.0, 12, 48, 44]]), "labels": torch.tensor([1]), "key": torch.tensor(3)}
    batch = Batch([torch.from_numpy(pixels).permute(2, 0, 1)], [target], (64, 64), [1])

    losses = [float(engine.train_step(batch)["loss"]) for _ in range(num_steps)]

    assert np.isfinite(losses).all()
    assert np.mean(losses[-3:]) < 0.8 * losses[0]
    data = DataConfig(scenes=Scenes(), resize=Resize(short=64, long=64))
    evaluation = evaluate(detector, dataset, data, EvalConfig(), rank=0, world=1)
    assert evaluation is not None
    assert evaluation.detections.keys() == {"student"}
    assert {name.partition("/")[0] for name in evaluation.metrics} == {"student"}
    shown = io.StringIO()
    console = Console(file=shown, width=100)
    console.print(heads_table(evaluation.metrics, "one"))
    with ProgressView(console) as view:
        view.show({"kind": "evaluation", "epoch": 1, "metrics": evaluation.metrics})
    text = shown.getvalue()
    assert "student" in text
    assert "gap" not in text
    assert "teacher" not in text
    pictures = validation_pictures(dataset, evaluation.detections, 1)
    assert pictures["a"].width < 3 * 320  # ground truth and the one head side by side
