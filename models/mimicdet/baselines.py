"""torchvision's RetinaNet, FCOS and Faster R-CNN on this package's backbone, behind the same interface.

Heads, assignment, sampling and losses are torchvision's; inputs, backbone, pyramid, anchor scale and the limits of
post-processing are the experiment's, so that a table compares detectors and nothing else.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSHead, FCOSRegressionHead
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

from mimicdet.backbone import Backbone, group_norm
from mimicdet.config import ModelConfig
from mimicdet.inputs import IMAGE_MEAN, IMAGE_STD, batch_images, check_images, check_targets
from mimicdet.interface import Detections, Detector, LossTerms, Targets
from mimicdet.pyramid import Pyramid

# Height to width of the anchors of RetinaNet and of Faster R-CNN's proposals.
ASPECT_RATIOS = (0.5, 1.0, 2.0)
# Levels that Faster R-CNN pools from. (Lin et al. 2017)
ROI_LEVELS = (2, 3, 4, 5)


class Baseline(Detector):
    """A torchvision detector as a `Detector`; its one head is called `student`, since it is what is deployed.

    Images and targets are MimicDet's. torchvision knows no regions to ignore: boxes with `iscrowd` are dropped, and
    what they cover is background. The `key`s of a batch together decide what is sampled for it.
    """

    class_layers = ("net.head.classification_head.cls_logits.", "net.roi_heads.box_predictor.")

    def __init__(self, config: ModelConfig, num_classes: int, *, pretrained: bool = True) -> None:
        """Build `config.detector` for classes 0..num_classes - 1.

        Args:
            config: its backbone, pyramid, anchors and inference are used.
            num_classes: without background.
            pretrained: read the backbone's weights; False where a whole state is loaded next.

        Raises:
            ValueError: the detector cannot be built so; the message names the key.
        """
        super().__init__()
        config.check_classes(num_classes)
        self.config = config
        self.num_classes = num_classes
        # torchvision's second stage counts classes from 1, behind the background.
        self.first_label = 1 if config.detector == "faster_rcnn" else 0
        self.net = _BUILDERS[config.detector](config, num_classes, pretrained)
        self.backbone_report = self._features.backbone.report
        self.inputs = _Inputs()
        self.net.transform = self.inputs

    def loss_terms(
        self, images: Sequence[Tensor], targets: Targets, *, pad_to: tuple[int, int] | None = None
    ) -> LossTerms:
        """torchvision's losses; they are means over the images given here, so each image gets the same number."""
        check_images(images)
        check_targets(targets, images, self.num_classes, self.inputs.mean.dtype)
        prepared = [self._prepare(target) for target in targets]
        with _seeded(_seed(targets), self.inputs.mean.device):
            losses: dict[str, Tensor] = self._run(images, prepared, pad_to)
        return LossTerms({name: value.expand(len(images)) for name, value in losses.items()}, {})

    @torch.no_grad()
    def detect(self, images: Sequence[Tensor], *, pad_to: tuple[int, int] | None = None) -> list[Detections]:
        """Detections: dicts of boxes (D, 4) xyxy pixels, scores (D,), labels (D,), best first."""
        check_images(images)
        found: list[Detections] = self._run(images, None, pad_to)
        return [{**each, "labels": each["labels"] - self.first_label} for each in found]

    def detect_heads(
        self, images: Sequence[Tensor], *, topk: int, pad_to: tuple[int, int] | None = None
    ) -> dict[str, list[Detections]]:
        """Detections of the one head; there is none of training only that `topk` would be for."""
        return {"student": self.detect(images, pad_to=pad_to)}

    def _run(
        self, images: Sequence[Tensor], targets: list[dict[str, Tensor]] | None, pad_to: tuple[int, int] | None
    ) -> Any:
        # torchvision answers by its mode; the backbone keeps the caller's, which its norms go by.
        self.net.train(targets is not None)
        self._features.train(self.training)
        self.inputs.pad_to = pad_to
        return self.net(list(images), targets)

    @property
    def _features(self) -> _Features:
        features = self.net.get_submodule("backbone")
        assert isinstance(features, _Features)
        return features

    def _prepare(self, target: Mapping[str, Tensor]) -> dict[str, Tensor]:
        like = self.inputs.mean
        boxes, labels = target["boxes"].to(like), target["labels"].to(like.device).long()
        if "iscrowd" in target:
            kept = ~target["iscrowd"].to(like.device).bool()
            boxes, labels = boxes[kept], labels[kept]
        return {"boxes": boxes, "labels": labels + self.first_label}


def _seed(targets: Targets) -> int:
    keys = [int(target["key"]) for target in targets if "key" in target]
    # As in MimicDet, the generator decides where no key does.
    return sum(keys) % (1 << 63) if len(keys) == len(targets) else int(torch.randint(1 << 62, ()))


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the generators that torchvision samples from, and put them back."""
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(gpus):
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:
            torch.cuda.default_generators[gpu.index].manual_seed(seed)
        yield


class _Inputs(nn.Module):
    """Stands where torchvision resizes: images and boxes keep their size, batches are made as for MimicDet."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.pad_to: tuple[int, int] | None = None
        self.register_buffer("mean", torch.tensor(IMAGE_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGE_STD)[:, None, None], persistent=False)

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[ImageList, list[dict[str, Tensor]] | None]:
        batch = batch_images(images, self.pad_to, self.mean, self.std)
        return ImageList(batch, [(int(image.shape[-2]), int(image.shape[-1])) for image in images]), targets

    def postprocess(self, detections: list[Detections], *_sizes: object) -> list[Detections]:
        return detections


class _Features(nn.Module):
    """Backbone and pyramid as torchvision's detectors take them: P_lowest..P_highest by the name of their level."""

    def __init__(self, config: ModelConfig, lowest: int, highest: int, pretrained: bool) -> None:
        super().__init__()
        self.backbone = Backbone(config.backbone, pretrained=pretrained)
        levels = replace(config.pyramid, min_level=lowest, max_level=highest, stagger=0)
        self.pyramid = Pyramid(self.backbone.channels, levels)
        self.out_channels = config.pyramid.channels

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        pyramid = self.pyramid(self.backbone(images))
        return OrderedDict((str(level), pyramid[level]) for level in sorted(pyramid))


def _retinanet(config: ModelConfig, num_classes: int, pretrained: bool) -> nn.Module:
    lowest, highest = config.pyramid.min_level, config.pyramid.max_level
    # Three sizes an octave, in whole pixels as torchvision has them. (Lin et al. 2017: 32 at P3, scale 4)
    sizes = [
        tuple(int(config.anchors.scale * 2**level * 2 ** (octave / 3)) for octave in range(3))
        for level in range(lowest, highest + 1)
    ]
    net: nn.Module = RetinaNet(
        _Features(config, lowest, highest, pretrained),
        num_classes,
        anchor_generator=_anchors(config, sizes, ASPECT_RATIOS),
        **_limits(config),
    )
    return net


def _fcos(config: ModelConfig, num_classes: int, pretrained: bool) -> nn.Module:
    lowest, highest = config.pyramid.min_level, config.pyramid.max_level
    channels = config.pyramid.channels
    # torchvision's own branches normalise in 32 groups whatever the width; these do at the published 256 channels,
    # and keep 8 channels in a group of narrower pyramids.
    head = FCOSHead(channels, 1, num_classes, num_convs=0)
    head.classification_head = FCOSClassificationHead(channels, 1, num_classes, norm_layer=group_norm)
    head.regression_head = FCOSRegressionHead(channels, 1, norm_layer=group_norm)
    # torchvision's one "anchor" of side s is a position that answers for boxes whose farthest edge is 4 s to 8 s
    # away. The paper (Tian et al. 2019) has s = stride, where others' anchors are 4 strides: scale 4.
    shrink = config.anchors.scale / 4
    sides = [shrink * 2**level for level in range(lowest, highest + 1)]
    anchors = AnchorGenerator(tuple((side,) for side in sides), ((1.0,),) * len(sides))
    # torchvision rounds to even sides, which would leave what lies between the ranges of two levels to nobody.
    anchors.cell_anchors = [torch.tensor([[-side, -side, side, side]]) / 2 for side in sides]
    net: nn.Module = FCOS(
        _Features(config, lowest, highest, pretrained),
        num_classes,
        anchor_generator=anchors,
        head=head,
        # In units of s; the paper's 1.5 strides whatever the scale, as less than half a stride can hold no position.
        center_sampling_radius=1.5 / shrink,
        **_limits(config),
    )
    return net


def _faster_rcnn(config: ModelConfig, num_classes: int, pretrained: bool) -> nn.Module:
    # One level below the others', and its anchors twice as many strides wide: 32 at P2 to 512 at P6 for scale 4, as
    # published (Lin et al. 2017), and the same sides as RetinaNet's at P3 to P7.
    highest = max(ROI_LEVELS[-1], config.pyramid.max_level - 1)
    levels = range(ROI_LEVELS[0], highest + 1)
    pool = MultiScaleRoIAlign([str(level) for level in ROI_LEVELS], output_size=7, sampling_ratio=2)
    # torchvision would guess the strides once, from the first batch's images without their padding.
    pool.scales = [2.0**-level for level in ROI_LEVELS]
    pool.map_levels = initLevelMapper(ROI_LEVELS[0], ROI_LEVELS[-1])
    net: nn.Module = FasterRCNN(
        _Features(config, ROI_LEVELS[0], highest, pretrained),
        num_classes + 1,
        rpn_anchor_generator=_anchors(
            config, [(2 * config.anchors.scale * 2**level,) for level in levels], ASPECT_RATIOS
        ),
        box_roi_pool=pool,
        **{f"box_{name}": value for name, value in _limits(config).items()},
    )
    return net


_BUILDERS: dict[str, Callable[[ModelConfig, int, bool], nn.Module]] = {
    "retinanet": _retinanet,
    "fcos": _fcos,
    "faster_rcnn": _faster_rcnn,
}


def _anchors(config: ModelConfig, sizes: Sequence[tuple[float, ...]], ratios: tuple[float, ...]) -> AnchorGenerator:
    """Anchors of these sides sqrt(area) in pixels, a tuple for each level, in these shapes."""
    anchors = AnchorGenerator(tuple(sizes), (ratios,) * len(sizes))
    if any(bool((cell[:, 2:] <= cell[:, :2]).any()) for cell in anchors.cell_anchors):
        raise ValueError(f"anchors.scale {config.anchors.scale} makes anchors of no pixels, expected a larger one")
    return anchors


def _limits(config: ModelConfig) -> dict[str, float]:
    """Post-processing by the experiment, the same for all detectors that are compared."""
    inference = config.inference
    return {
        "score_thresh": inference.score_threshold,
        "nms_thresh": inference.nms_iou,
        "detections_per_img": inference.max_detections,
    }
