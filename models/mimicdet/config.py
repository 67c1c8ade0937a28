"""Every knob of the detector, one frozen dataclass per part.

Sources are given as in the reading record of the paper (arXiv 2009.11528): (paper) is stated there,
(chosen) is not known from it and therefore an option whose default was picked here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

# Read by pydantic when a schema embeds these classes; this package itself never imports it.
_STRICT: dict[str, object] = {"extra": "forbid"}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """The classification network whose stages C2..C5 feed the pyramid."""

    __pydantic_config__: ClassVar[dict[str, object]] = _STRICT

    name: Literal["resnet18", "resnet50", "mobilenet_v2"] = "resnet50"
    weights: str | None = None
    """Path of a safetensors file with torchvision's keys; None starts at random."""
    norm: Literal["frozen_bn", "group_norm"] | None = None
    """frozen_bn keeps the statistics that came with the weights; group_norm is for a random start. None chooses
    by whether there are weights. (chosen)"""
    frozen_stages: int | None = None
    """How many stages keep their weights, the stem being the first. None is 2 with weights (stem and C2, as
    Faster R-CNN) and 0 without. (chosen)"""
    width: int = 64
    """Channels of C2 in ResNet-18, C3 to C5 in proportion; less than 64 only from a random start."""

    def __post_init__(self) -> None:
        # Resolved here, so that a resolved experiment shows what is used.
        if self.norm is None:
            object.__setattr__(self, "norm", "group_norm" if self.weights is None else "frozen_bn")
        if self.frozen_stages is None:
            object.__setattr__(self, "frozen_stages", 0 if self.weights is None else 2)
        assert self.frozen_stages is not None
        _require(0 <= self.frozen_stages <= 5, f"frozen_stages must be 0 to 5, found {self.frozen_stages}")
        _require(
            self.weights is not None or (self.norm == "group_norm" and self.frozen_stages == 0),
            "a backbone without weights starts at random: it needs norm group_norm and "
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
    min_level: int = 3
    max_level: int = 7
    stagger: int = 1
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
        _require(
            max(5, self.min_level) <= self.max_level <= 7,
            f"max_level must be 5, 6 or 7 and not below min_level, found {self.max_level}",
        )


@dataclass(frozen=True, kw_only=True)
class AnchorConfig:
    """One square anchor per position (paper) of side `scale` × stride. (chosen)"""

    __pydantic_config__: ClassVar[dict[str, object]] = _STRICT

    scale: float = 4.0

    def __post_init__(self) -> None:
        _require(self.scale > 0, f"scale must be positive, found {self.scale}")


@dataclass(frozen=True, kw_only=True)
class RefinementConfig:
    """Objectness and first regression of every anchor, and the proposals they make."""

    __pydantic_config__: ClassVar[dict[str, object]] = _STRICT

    center_ratio: float = 0.3
    """An anchor is positive if its centre lies in the box shrunk to this share per side. (paper: 0.3)"""
    ignore_ratio: float = 0.3
    """Centres between center_ratio and this share are neither positive nor negative; equal means no ring. (chosen)"""
    num_samples: int = 256
    positive_fraction: float = 0.5
    """At most this share of the samples is positive; negatives fill the rest. (chosen)"""
    nms_iou: float = 0.8
    num_proposals: int = 2000
    """Proposals per training image after NMS. (paper: 0.8 and 2000)"""
    pre_nms_topk: int = 4000
    """Best anchors by objectness that enter the NMS; bounds its time. (chosen)"""
    loss_weight: float = 1.0

    def __post_init__(self) -> None:
        _require(self.loss_weight >= 0, f"loss_weight must be 0 or more, found {self.loss_weight}")
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
    kernel_sizes: tuple[int, int] = (3, 5)
    """Taps per side on the lowest level and on all others. (paper)"""
    detach_offsets: bool = True
    """No gradient through the micro-network's input into the refinement module. (chosen)"""
    box_std: tuple[float, float, float, float] = (0.1, 0.1, 0.2, 0.2)
    iou_threshold: float = 0.5
    num_samples: int = 128
    """Hard-mined boxes per image. (paper)"""
    mining: Literal["sum", "cls"] = "sum"
    """Loss that ranks boxes for mining: classification + box, or classification alone. (chosen)"""
    positive_fraction: float | None = 0.25
    """Share of mined boxes kept for positives, each part mined by itself; None mines over all. (chosen)"""
    loss_weight: float = 1.0

    def __post_init__(self) -> None:
        _require(self.loss_weight >= 0, f"loss_weight must be 0 or more, found {self.loss_weight}")
        _require(
            all(k % 2 == 1 and k >= 3 for k in self.kernel_sizes),
            f"kernel_sizes must be odd, 3 or more, found {self.kernel_sizes}",
        )
        _require(
            min(self.head_width, self.num_samples, *self.offset_channels) > 0,
            "widths and num_samples must be positive",
        )
        _require(0 < self.iou_threshold < 1, f"iou_threshold must be in (0, 1), found {self.iou_threshold}")
        _require(
            self.positive_fraction is None or 0 < self.positive_fraction <= 1,
            f"positive_fraction must be in (0, 1] or null, found {self.positive_fraction}",
        )
        _require(min(self.box_std) > 0, f"box_std must be positive, found {self.box_std}")


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """T-head: the two-stage head of training."""

    __pydantic_config__: ClassVar[dict[str, object]] = _STRICT

    num_rois: int = 128
    """RoIs sampled per image; also the boxes that are mimicked. (paper)"""
    positive_fraction: float = 0.25
    """(paper: 1 : 3)"""
    iou_threshold: float = 0.5
    """(chosen)"""
    num_convs: int = 4
    """3x3 convolutions of the regression branch. (paper)"""
    pooled_size: int = 7
    sampling_ratio: int = 2
    box_std: tuple[float, float, float, float] = (0.1, 0.1, 0.2, 0.2)
    loss_weight: float = 1.0

    def __post_init__(self) -> None:
        _require(self.loss_weight >= 0, f"loss_weight must be 0 or more, found {self.loss_weight}")
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
        _require(min(self.box_std) > 0, f"box_std must be positive, found {self.box_std}")


@dataclass(frozen=True, kw_only=True)
class MimicConfig:
    """1 - cosine between student and teacher on class logits and on the regression feature. (paper)"""

    __pydantic_config__: ClassVar[dict[str, object]] = _STRICT

    cls_weight: float = 1.0
    reg_weight: float = 1.0
    detach_teacher: bool = True
    """No gradient of the mimic loss into the teacher. (chosen)"""
    centered_logits: bool = False
    """Subtract each box's mean logit first: softmax does not see it, a cosine does. (chosen)"""
    reg_positives_only: bool = False
    """Mimic the regression feature of positives only. (chosen)"""

    def __post_init__(self) -> None:
        _require(min(self.cls_weight, self.reg_weight) >= 0, "mimic weights must be 0 or more")


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
    """MimicDet, whole."""

    __pydantic_config__: ClassVar[dict[str, object]] = _STRICT

    weights: str | None = None
    """Path of a whole detector's weights (safetensors, as a run writes them) to start from."""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    pyramid: PyramidConfig = field(default_factory=PyramidConfig)
    anchors: AnchorConfig = field(default_factory=AnchorConfig)
    refinement: RefinementConfig = field(default_factory=RefinementConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    mimic: MimicConfig = field(default_factory=MimicConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
