"""Every knob of the detector, one frozen dataclass per part.

Sources are given as in the reading record of the paper (arXiv 2009.11528): (paper) is stated there,
(chosen) is not known from it and therefore an option whose default was picked here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf
from typing import ClassVar, Literal

# Read by pydantic when a schema embeds these classes; this package itself never imports it.
_STRICT: dict[str, object] = {"extra": "forbid"}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_deltas_std(std: tuple[float, ...]) -> None:
    _require(len(std) == 4 and all(0 < each < inf for each in std), f"box_std must be 4 positive numbers, found {std}")


def is_published_name(weights: str) -> bool:
    """Whether `weights` names something that torchvision publishes, as IMAGENET1K_V2, rather than a file."""
    return re.fullmatch(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+", weights) is not None


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """The classification network whose stages C2..C5 feed the pyramid."""

    __pydantic_config__: ClassVar[dict[str, object]] = _STRICT

    name: Literal[
        "resnet18", "resnet34", "resnet50", "resnet101", "resnext101_32x8d", "resnext101_64x4d", "mobilenet_v2"
    ] = "resnet50"
    """(paper: ResNet-50, ResNet-101 and a ResNeXt-101, of which it is not known which one)"""
    weights: str | None = None
    """Path of a file with torchvision's keys (.safetensors, or .pth as torchvision publishes them), or the name
    of weights that torchvision is to download, such as IMAGENET1K_V2; None starts at random."""
    norm: Literal["frozen_bn", "sync_bn", "group_norm"] | None = None
    """frozen_bn keeps the statistics that came with the weights; sync_bn goes on learning them over all GPUs;
    group_norm is for a random start. None chooses by whether there are weights. (chosen)"""
    frozen_stages: int | None = None
    """How many stages keep their weights, the stem being the first. None is 2 with weights (stem and C2, as
    Faster R-CNN) and 0 without. (chosen)"""
    width: int = 64
    """Channels of C2 in ResNet-18, C3 to C5 in proportion; less than 64 only from a random start. (chosen, for
    small machines)"""

    def __post_init__(self) -> None:
        # Resolved here, so that a resolved experiment shows what is used.
        if self.norm is None:
            object.__setattr__(self, "norm", "group_norm" if self.weights is None else "frozen_bn")
        if self.frozen_stages is None:
            object.__setattr__(self, "frozen_stages", 0 if self.weights is None else 2)
        assert self.frozen_stages is not None
        _require(0 <= self.frozen_stages <= 5, f"frozen_stages must be 0 to 5, found {self.frozen_stages}")
        _require(
            self.weights is not None or (self.norm != "frozen_bn" and self.frozen_stages == 0),
            "a backbone without weights starts at random: it needs norm group_norm (or sync_bn) and "
            f"frozen_stages 0, found norm {self.norm} and frozen_stages {self.frozen_stages}",
        )
        _require(
            self.width == 64 or (self.name == "resnet18" and self.weights is None),
            f"width {self.width} is for a resnet18 without weights",
        )
        _require(self.width >= 8 and self.width % 8 == 0, f"width must be a multiple of 8, found {self.width}")


@dataclass(frozen=True, kw_only=True)
class PyramidConfig:
    """Feature pyramid; the student reads P_L where the teacher reads P_{L - stagger}. (paper)"""

    __pydantic_config__: ClassVar[dict[str, object]] = _STRICT

    channels: int = 256
    """(paper)"""
    min_level: int = 3
    """Lowest level that refinement and student read. (paper: 3)"""
    max_level: int = 7
    """Highest level that they read. (paper: 7)"""
    stagger: int = 1
    """Levels between an anchor and where the teacher pools it. (paper: 1; 0 is its ablation)"""
    extra_from: Literal["c5", "p5"] = "p5"
    """Where P6 and P7 start from. (chosen)"""

    def __post_init__(self) -> None:
        _require(self.channels > 0, f"channels must be positive, found {self.channels}")
        _require(self.stagger >= 0, f"stagger must be 0 or more, found {self.stagger}")
        _require(
            self.min_level - self.stagger >= 2,
            f"min_level - stagger must be at least 2 (the lowest level a backbone gives), found "
            f"{self.min_level} - {self.stagger}",
        )
        _require(self.min_level <= 5, f"min_level must be 2 to 5, found {self.min_level}")
        _require(5 <= self.max_level <= 7, f"max_level must be 5, 6 or 7, found {self.max_level}")


@dataclass(frozen=True, kw_only=True)
class AnchorConfig:
    """One square anchor per position (paper) of side `scale` × stride. (chosen)"""

    __pydantic_config__: ClassVar[dict[str, object]] = _STRICT

    scale: float = 4.0

    def __post_init__(self) -> None:
        _require(0 < self.scale < inf, f"scale must be positive, found {self.scale}")


@dataclass(frozen=True, kw_only=True)
class RefinementConfig:
    """Objectness and first regression of every anchor, and the proposals they make."""

    __pydantic_config__: ClassVar[dict[str, object]] = _STRICT

    width: int | None = None
    """Channels of the hidden 3x3 convolution; None is the pyramid's. (chosen)"""
    scale_bounds: tuple[float, ...] | None = None
    """Sides sqrt(area), in pixels, at which ground truth moves to the next level: one bound fewer than levels.
    None is twice each level's anchor, so an anchor of side a answers for sides from a to 2 a. (chosen)"""
    center_ratio: float = 0.3
    """An anchor is positive if its centre lies in the box shrunk to this share per side. (paper: 0.3)"""
    ignore_ratio: float = 0.3
    """Centres between center_ratio and this share are neither positive nor negative; equal means no ring. (chosen)"""
    forced_assignment: bool = True
    """An object whose region holds no anchor's centre is given the closest anchor on its level, rather than none.
    (chosen)"""
    loss: Literal["sampled", "focal"] = "sampled"
    """sampled is binary cross-entropy over `num_samples` anchors; focal is the focal loss (Lin et al. 2017, alpha
    0.25, gamma 2) over all anchors, divided by the number of positives. (chosen)"""
    num_samples: int = 256
    """Anchors per image that the sampled loss looks at. (chosen)"""
    positive_fraction: float = 0.5
    """At most this share of the samples is positive; negatives fill the rest. (chosen)"""
    regress: bool = True
    """False leaves anchors where they are and predicts objectness alone: the ablation of the first regression."""
    box_std: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    """What the deltas are divided by. (chosen)"""
    detach_boxes: bool = True
    """No gradient through the refined boxes into the refinement module. (chosen)"""
    nms_iou: float = 0.8
    num_proposals: int = 2000
    """Proposals per training image after NMS. (paper: 0.8 and 2000)"""
    nms_per_level: bool = False
    """Run the NMS on each level by itself instead of over all together. (chosen)"""
    pre_nms_topk: int = 4000
    """Best anchors by objectness that enter the NMS; bounds its time. (chosen)"""
    loss_weight: float = 1.0
    """(paper: 1)"""

    def __post_init__(self) -> None:
        _require(0 <= self.loss_weight < inf, f"loss_weight must be 0 or more, found {self.loss_weight}")
        _require(
            0 < self.center_ratio <= self.ignore_ratio <= 1,
            f"0 < center_ratio <= ignore_ratio <= 1 is needed, found {self.center_ratio} and {self.ignore_ratio}",
        )
        _require(
            0 < self.positive_fraction <= 1,
            f"positive_fraction must be in (0, 1], found {self.positive_fraction}",
        )
        _require(0 < self.nms_iou <= 1, f"nms_iou must be in (0, 1], found {self.nms_iou}")
        _require(
            min(self.num_samples, self.num_proposals, self.pre_nms_topk) > 0,
            "num_samples, num_proposals and pre_nms_topk must be positive",
        )
        _require(self.width is None or self.width > 0, f"width must be positive or null, found {self.width}")
        _require_deltas_std(self.box_std)
        bounds = self.scale_bounds or ()
        _require(
            all(0 < bound < inf for bound in bounds) and all(low < high for low, high in pairwise(bounds)),
            f"scale_bounds must be positive and rise, found {self.scale_bounds}",
        )


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """S-head: the head that is deployed."""

    __pydantic_config__: ClassVar[dict[str, object]] = _STRICT

    head_width: int = 1024
    """Width of the two hidden 1x1 convolutions; the mimicked regression feature has this width. (paper)"""
    offset_channels: tuple[int, int] = (64, 128)
    """Hidden widths of the micro-network. (paper)"""
    offsets: Literal["learned", "analytic", "analytic_learned", "none"] = "learned"
    """learned is the paper's; analytic spans the refined box; analytic_learned adds a learned residual. (chosen)"""
    offset_init_std: float = 0.0
    """Spread of the micro-network's last weights at the start; 0 starts from a plain convolution. (chosen)"""
    kernel_sizes: tuple[int, ...] = (3, 5)
    """Taps per side from the lowest level up; the last one serves all levels above. (paper: 3, then 5) Each entry
    has a micro-network and a convolution of its own. (chosen)"""
    detach_offsets: bool = True
    """No gradient through the micro-network's input into the refinement module. (chosen)"""
    box_std: tuple[float, float, float, float] = (0.1, 0.1, 0.2, 0.2)
    """What the deltas are divided by. (chosen)"""
    iou_threshold: float = 0.5
    """From this overlap on a refined box is positive. (chosen)"""
    num_samples: int = 128
    """Hard-mined boxes per image. (paper)"""
    mining: Literal["sum", "cls", "random"] = "sum"
    """Loss that ranks boxes for mining: classification + box, or classification alone (chosen); random is the
    control, no mining at all."""
    mining_pool: int | None = None
    """How many proposals, best by objectness, enter the mining; None is all of them. (chosen)"""
    positive_fraction: float | None = None
    """Share of mined boxes kept for positives, each part mined by itself; None mines over all, as the record has it
    (paper) and as measured better on two small sets (experiments/results/sampling.md)."""
    loss_weight: float = 1.0
    """(paper: 1)"""

    def __post_init__(self) -> None:
        _require(0 <= self.loss_weight < inf, f"loss_weight must be 0 or more, found {self.loss_weight}")
        _require(
            len(self.kernel_sizes) > 0 and all(k % 2 == 1 and k >= 3 for k in self.kernel_sizes),
            f"kernel_sizes must be odd, 3 or more, found {self.kernel_sizes}",
        )
        _require(
            min(self.head_width, self.num_samples, *self.offset_channels) > 0,
            "widths and num_samples must be positive",
        )
        _require(0 <= self.offset_init_std < inf, f"offset_init_std must be 0 or more, found {self.offset_init_std}")
        _require(
            self.mining_pool is None or self.mining_pool >= self.num_samples,
            f"mining_pool must hold num_samples {self.num_samples} boxes, found {self.mining_pool}",
        )
        _require(0 < self.iou_threshold < 1, f"iou_threshold must be in (0, 1), found {self.iou_threshold}")
        _require(
            self.positive_fraction is None or 0 < self.positive_fraction <= 1,
            f"positive_fraction must be in (0, 1] or null, found {self.positive_fraction}",
        )
        _require_deltas_std(self.box_std)


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """T-head: the two-stage head of training."""

    __pydantic_config__: ClassVar[dict[str, object]] = _STRICT

    enabled: bool = True
    """False trains the student alone: no second head, no mimicking, no level below the student's lowest."""
    num_rois: int = 128
    """RoIs sampled per image. (paper)"""
    positive_fraction: float = 0.25
    """(paper: 1 : 3)"""
    iou_threshold: float = 0.5
    """From this overlap on a RoI is positive. (chosen)"""
    num_convs: int = 4
    """3x3 convolutions of the regression branch. (paper)"""
    pooled_size: int = 7
    """Cells per side of a pooled RoI. (paper)"""
    sampling_ratio: int = 2
    """RoIAlign's points per side of a cell. (chosen)"""
    box_std: tuple[float, float, float, float] = (0.1, 0.1, 0.2, 0.2)
    """What the deltas are divided by. (chosen)"""
    loss_weight: float = 1.0
    """(paper: 1)"""

    def __post_init__(self) -> None:
        _require(0 <= self.loss_weight < inf, f"loss_weight must be 0 or more, found {self.loss_weight}")
        _require(
            min(self.num_rois, self.pooled_size, self.sampling_ratio) > 0,
            "num_rois, pooled_size and sampling_ratio must be positive",
        )
        _require(self.num_convs >= 0, f"num_convs must be 0 or more, found {self.num_convs}")
        _require(
            0 < self.positive_fraction <= 1,
            f"positive_fraction must be in (0, 1], found {self.positive_fraction}",
        )
        _require(0 < self.iou_threshold < 1, f"iou_threshold must be in (0, 1), found {self.iou_threshold}")
        _require_deltas_std(self.box_std)


@dataclass(frozen=True, kw_only=True)
class MimicConfig:
    """1 - cosine between student and teacher on class logits and on the regression feature. (paper)"""

    __pydantic_config__: ClassVar[dict[str, object]] = _STRICT

    cls_weight: float = 1.0
    """(paper: 1)"""
    reg_weight: float = 1.0
    """(paper: 1)"""
    detach_teacher: bool = True
    """No gradient of the mimic loss into the teacher. (chosen)"""
    num_boxes: int | None = None
    """How many boxes per image are mimicked; None is the teacher's sampled set. (chosen)"""
    warmup_steps: int = 0
    """Over so many steps W both weights rise linearly, by 1 / (W + 1) a step. (chosen)"""
    centered_logits: bool = False
    """Subtract each box's mean logit first: softmax does not see it, a cosine does. (chosen)"""
    reg_positives_only: bool = False
    """Mimic the regression feature of positives only. (chosen)"""
    before_relu: bool = False
    """Mimic the regression feature as it is before its ReLU. (chosen)"""

    def __post_init__(self) -> None:
        _require(
            min(self.cls_weight, self.reg_weight) >= 0 and max(self.cls_weight, self.reg_weight) < inf,
            f"mimic weights must be 0 or more, found {self.cls_weight} and {self.reg_weight}",
        )
        _require(
            self.num_boxes is None or self.num_boxes > 0, f"num_boxes must be positive or null, found {self.num_boxes}"
        )
        _require(self.warmup_steps >= 0, f"warmup_steps must be 0 or more, found {self.warmup_steps}")


@dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    """From scores to detections."""

    __pydantic_config__: ClassVar[dict[str, object]] = _STRICT

    topk: int = 1000
    """Positions, best by objectness, at which the S-head is evaluated. (paper)"""
    score_threshold: float = 0.005
    nms_iou: float = 0.6
    max_detections: int = 100
    """(paper: 0.005, 0.6, 100)"""
    times_objectness: bool = False
    """Multiply the class score by the objectness. (chosen)"""

    def __post_init__(self) -> None:
        _require(min(self.topk, self.max_detections) > 0, "topk and max_detections must be positive")
        _require(0 <= self.score_threshold < 1, f"score_threshold must be in [0, 1), found {self.score_threshold}")
        _require(0 < self.nms_iou <= 1, f"nms_iou must be in (0, 1], found {self.nms_iou}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A detector, whole: MimicDet, or a peer on the same backbone and pyramid."""

    __pydantic_config__: ClassVar[dict[str, object]] = _STRICT

    detector: Literal["mimicdet", "retinanet", "fcos", "faster_rcnn"] = "mimicdet"
    """The others are torchvision's; they read backbone, pyramid, anchors and inference, and none of the rest."""
    weights: str | None = None
    """Path of a whole detector's weights (safetensors, as a run writes them) to start from; read by whoever builds
    the detector for a run, and then the backbone's own weights are not."""
    class_space: Literal["softmax", "sigmoid"] = "softmax"
    """Of both heads: softmax over the classes and background, or a sigmoid for each class. (chosen; the record
    has 81 outputs for one head and 80 for the other)"""
    box_loss_over: Literal["sampled", "positives"] = "sampled"
    """What each L1 loss is divided by: how many boxes were sampled, or how many of them are positive. (chosen)"""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    pyramid: PyramidConfig = field(default_factory=PyramidConfig)
    anchors: AnchorConfig = field(default_factory=AnchorConfig)
    refinement: RefinementConfig = field(default_factory=RefinementConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    mimic: MimicConfig = field(default_factory=MimicConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)

    def __post_init__(self) -> None:
        if self.detector != "mimicdet":
            return
        num_levels = self.pyramid.max_level - self.pyramid.min_level + 1
        bounds = self.refinement.scale_bounds
        _require(
            bounds is None or len(bounds) == num_levels - 1,
            f"refinement.scale_bounds must be {num_levels - 1} for {num_levels} levels, found {bounds}",
        )
        _require(
            len(self.student.kernel_sizes) <= num_levels,
            f"student.kernel_sizes must be at most {num_levels}, one for each level, found {self.student.kernel_sizes}",
        )

    def check_classes(self, num_classes: int) -> None:
        """Make sure that this detector can learn so many classes, without background.

        Raises:
            ValueError: it cannot; the message says why.
        """
        _require(num_classes >= 1, f"num_classes must be at least 1, found {num_classes}")
        if self.detector != "mimicdet" or not self.teacher.enabled:
            return
        reason = "the cosine of two single numbers has no gradient"
        _require(
            self.student.head_width > 1 or self.mimic.reg_weight == 0,
            f"student.head_width 1: {reason}: expected mimic.reg_weight 0 or a wider head",
        )
        if self.mimic.cls_weight == 0:
            return
        reason += ": expected mimic.cls_weight 0 or more classes"
        _require(num_classes > 1 or self.class_space == "softmax", f"class_space sigmoid with one class: {reason}")
        # Two logits less their mean are (a, -a): one number.
        _require(num_classes > 1 or not self.mimic.centered_logits, f"mimic.centered_logits with one class: {reason}")
        _require(
            num_classes > 2 or self.class_space == "softmax" or not self.mimic.centered_logits,
            f"mimic.centered_logits with class_space sigmoid and two classes: {reason}",
        )
