"""Every setting that cannot work is refused when it is written down."""

import dataclasses
from typing import Any

import pytest

from mimicdet.config import (
    AnchorConfig,
    BackboneConfig,
    InferenceConfig,
    MimicConfig,
    ModelConfig,
    PyramidConfig,
    RefinementConfig,
    StudentConfig,
    TeacherConfig,
)

INVALID: list[tuple[type, dict[str, Any], str]] = [
    (BackboneConfig, {"norm": "frozen_bn"}, "without weights"),
    (BackboneConfig, {"frozen_stages": 1}, "without weights"),
    (BackboneConfig, {"norm": "sync_bn", "frozen_stages": 1}, "without weights"),
    (BackboneConfig, {"weights": "w", "frozen_stages": 6}, "0 to 5"),
    (BackboneConfig, {"weights": "w", "frozen_stages": -1}, "0 to 5"),
    (BackboneConfig, {"name": "resnet50", "width": 32}, "width 32"),
    (BackboneConfig, {"name": "resnet18", "weights": "w", "width": 32}, "width 32"),
    (BackboneConfig, {"name": "resnet18", "width": 12}, "multiple of 8"),
    (BackboneConfig, {"name": "resnet18", "width": 0}, "multiple of 8"),
    (PyramidConfig, {"channels": 0}, "channels"),
    (PyramidConfig, {"stagger": -1}, "stagger"),
    (PyramidConfig, {"stagger": 2}, "at least 2"),
    (PyramidConfig, {"min_level": 2}, "at least 2"),
    (PyramidConfig, {"max_level": 4}, "max_level"),
    (PyramidConfig, {"max_level": 8}, "max_level"),
    (PyramidConfig, {"min_level": 6}, "min_level"),
    (AnchorConfig, {"scale": 0.0}, "scale"),
    (RefinementConfig, {"center_ratio": 0.0}, "center_ratio"),
    (RefinementConfig, {"center_ratio": 0.5, "ignore_ratio": 0.3}, "center_ratio <= ignore_ratio"),
    (RefinementConfig, {"ignore_ratio": 1.1}, "ignore_ratio <= 1"),
    (RefinementConfig, {"positive_fraction": 0.0}, "positive_fraction"),
    (RefinementConfig, {"positive_fraction": 1.1}, "positive_fraction"),
    (RefinementConfig, {"nms_iou": 0.0}, "nms_iou"),
    (RefinementConfig, {"nms_iou": 1.1}, "nms_iou"),
    (RefinementConfig, {"width": 0}, "width"),
    (RefinementConfig, {"box_std": (1.0, 1.0, 1.0, 0.0)}, "box_std"),
    (RefinementConfig, {"scale_bounds": (64.0, 64.0)}, "rise"),
    (RefinementConfig, {"scale_bounds": (64.0, float("inf"))}, "rise"),
    (RefinementConfig, {"box_std": (1.0, float("nan"), 1.0, 1.0)}, "box_std"),
    (RefinementConfig, {"box_std": (1.0, 1.0)}, "box_std"),
    (StudentConfig, {"box_std": (float("inf"), 1.0, 1.0, 1.0)}, "box_std"),
    (StudentConfig, {"offset_init_std": -0.1}, "offset_init_std"),
    (AnchorConfig, {"scale": float("inf")}, "scale"),
    (MimicConfig, {"cls_weight": float("inf")}, "mimic weights"),
    (RefinementConfig, {"scale_bounds": (0.0, 64.0)}, "positive"),
    (RefinementConfig, {"num_samples": 0}, "num_samples"),
    (RefinementConfig, {"num_proposals": 0}, "num_proposals"),
    (RefinementConfig, {"pre_nms_topk": 0}, "pre_nms_topk"),
    (RefinementConfig, {"loss_weight": -1.0}, "loss_weight"),
    (StudentConfig, {"kernel_sizes": (3, 4)}, "odd"),
    (StudentConfig, {"kernel_sizes": ()}, "odd"),
    (StudentConfig, {"mining_pool": 127}, "mining_pool"),
    (StudentConfig, {"kernel_sizes": (1, 3)}, "3 or more"),
    (StudentConfig, {"head_width": 0}, "positive"),
    (StudentConfig, {"num_samples": 0}, "positive"),
    (StudentConfig, {"offset_channels": (8, 0)}, "positive"),
    (StudentConfig, {"iou_threshold": 0.0}, "iou_threshold"),
    (StudentConfig, {"iou_threshold": 1.0}, "iou_threshold"),
    (StudentConfig, {"positive_fraction": 0.0}, "positive_fraction"),
    (StudentConfig, {"positive_fraction": 1.5}, "positive_fraction"),
    (StudentConfig, {"box_std": (0.1, 0.1, 0.2, 0.0)}, "box_std"),
    (StudentConfig, {"loss_weight": -1.0}, "loss_weight"),
    (TeacherConfig, {"num_rois": 0}, "num_rois"),
    (TeacherConfig, {"pooled_size": 0}, "pooled_size"),
    (TeacherConfig, {"sampling_ratio": 0}, "sampling_ratio"),
    (TeacherConfig, {"num_convs": -1}, "num_convs"),
    (TeacherConfig, {"positive_fraction": 0.0}, "positive_fraction"),
    (TeacherConfig, {"positive_fraction": 2.0}, "positive_fraction"),
    (TeacherConfig, {"iou_threshold": 0.0}, "iou_threshold"),
    (TeacherConfig, {"iou_threshold": 1.0}, "iou_threshold"),
    (TeacherConfig, {"box_std": (0.1, -0.1, 0.2, 0.2)}, "box_std"),
    (TeacherConfig, {"loss_weight": -1.0}, "loss_weight"),
    (MimicConfig, {"cls_weight": -0.1}, "mimic weights"),
    (MimicConfig, {"reg_weight": -0.1}, "mimic weights"),
    (MimicConfig, {"num_boxes": 0}, "num_boxes"),
    (MimicConfig, {"warmup_steps": -1}, "warmup_steps"),
    (ModelConfig, {"refinement": RefinementConfig(scale_bounds=(64.0, 128.0))}, "must be 4 for 5 levels"),
    (ModelConfig, {"student": StudentConfig(kernel_sizes=(3,) * 6)}, "at most 5"),
    (InferenceConfig, {"topk": 0}, "topk"),
    (InferenceConfig, {"max_detections": 0}, "max_detections"),
    (InferenceConfig, {"score_threshold": -0.1}, "score_threshold"),
    (InferenceConfig, {"score_threshold": 1.0}, "score_threshold"),
    (InferenceConfig, {"nms_iou": 0.0}, "nms_iou"),
    (InferenceConfig, {"nms_iou": 1.1}, "nms_iou"),
]


@pytest.mark.parametrize(
    ("section", "values", "message"), INVALID, ids=[f"{s.__name__}-{'-'.join(v)}-{m}" for s, v, m in INVALID]
)
def test_settings_that_cannot_work_are_refused(section: type, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        section(**values)


@pytest.mark.parametrize(
    ("section", "values"),
    [
        (PyramidConfig, {"min_level": 2, "stagger": 0}),
        (PyramidConfig, {"min_level": 4, "stagger": 2, "max_level": 5}),
        (PyramidConfig, {"min_level": 5, "stagger": 0}),
        (RefinementConfig, {"center_ratio": 1.0, "ignore_ratio": 1.0, "nms_iou": 1.0, "positive_fraction": 1.0}),
        (StudentConfig, {"positive_fraction": None, "kernel_sizes": (3,), "mining_pool": 128}),
        (ModelConfig, {"student": StudentConfig(kernel_sizes=(3, 3, 5, 5, 5))}),
        (ModelConfig, {"refinement": RefinementConfig(scale_bounds=(32.0, 64.0, 128.0, 256.0))}),
        (ModelConfig, {"detector": "retinanet", "refinement": RefinementConfig(scale_bounds=(64.0, 128.0))}),
        (TeacherConfig, {"num_convs": 0, "loss_weight": 0.0}),
        (MimicConfig, {"cls_weight": 0.0, "reg_weight": 0.0}),
        (InferenceConfig, {"score_threshold": 0.0, "nms_iou": 1.0}),
    ],
)
def test_the_ends_of_the_ranges_are_allowed(section: type, values: dict[str, Any]) -> None:
    section(**values)


def test_a_backbone_is_normalised_and_frozen_by_whether_it_has_weights() -> None:
    random, published = BackboneConfig(), BackboneConfig(weights="w")
    assert (random.norm, random.frozen_stages) == ("group_norm", 0)
    assert (published.norm, published.frozen_stages) == ("frozen_bn", 2)
    assert BackboneConfig(weights="w", frozen_stages=0).frozen_stages == 0


def test_a_configuration_cannot_be_changed_in_place() -> None:
    config = ModelConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.mimic = MimicConfig()  # type: ignore[misc]


ONE_NUMBER = "the cosine of two single numbers has no gradient"


@pytest.mark.parametrize(
    ("sections", "num_classes", "message"),
    [
        ({}, 0, "num_classes must be at least 1, found 0"),
        ({"class_space": "sigmoid"}, 1, f"class_space sigmoid with one class: {ONE_NUMBER}"),
        ({"student": StudentConfig(head_width=1)}, 5, f"student.head_width 1: {ONE_NUMBER}"),
        ({"mimic": MimicConfig(centered_logits=True)}, 1, f"mimic.centered_logits with one class: {ONE_NUMBER}"),
        (
            {"class_space": "sigmoid", "mimic": MimicConfig(centered_logits=True)},
            2,
            f"mimic.centered_logits with class_space sigmoid and two classes: {ONE_NUMBER}",
        ),
    ],
)
def test_classes_that_cannot_be_mimicked_are_refused(sections: dict[str, Any], num_classes: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**sections).check_classes(num_classes)


@pytest.mark.parametrize(
    ("sections", "num_classes"),
    [
        ({}, 1),
        ({"class_space": "sigmoid"}, 2),
        ({"class_space": "sigmoid", "mimic": MimicConfig(cls_weight=0.0)}, 1),
        ({"class_space": "sigmoid", "teacher": TeacherConfig(enabled=False)}, 1),
        ({"class_space": "sigmoid", "detector": "fcos"}, 1),
        ({"mimic": MimicConfig(centered_logits=True)}, 2),
        ({"class_space": "sigmoid", "mimic": MimicConfig(centered_logits=True)}, 3),
    ],
)
def test_any_other_number_of_classes_is_allowed(sections: dict[str, Any], num_classes: int) -> None:
    ModelConfig(**sections).check_classes(num_classes)
