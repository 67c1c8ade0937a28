"""Classification networks as C2..C5."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.ops import FrozenBatchNorm2d

from mimicdet.config import BackboneConfig
from mimicdet.weights import load_matching

C_LEVELS = (2, 3, 4, 5)


class Backbone(nn.Module):
    """Maps images (N, 3, H, W) to {2: C2, 3: C3, 4: C4, 5: C5}, C_L of stride 2^L.

    Stages, not layers, are the unit of freezing: `stages[0]` is the stem, `stages[i]` ends in C_{i+1}.
    """

    def __init__(self, config: BackboneConfig, *, pretrained: bool = True) -> None:
        """Build `config.name`; `pretrained` False leaves `config.weights` unread, for a state that replaces them."""
        super().__init__()
        norm = FrozenBatchNorm2d if config.norm == "frozen_bn" else group_norm
        build = _mobilenet if config.name == "mobilenet_v2" else _resnet
        net, stages, channels = build(config, norm)
        if config.weights is not None and pretrained:
            # Under torchvision's own names, before the parts are put into stages.
            load_matching(net, config.weights, ignore=("fc.", "classifier."))
        self.stages = nn.ModuleList(stages)
        self.channels = dict(zip(C_LEVELS, channels, strict=True))
        for stage in stages[: config.frozen_stages]:
            stage.requires_grad_(False)

    def forward(self, images: Tensor) -> dict[int, Tensor]:
        """Compute C2..C5 of images (N, 3, H, W)."""
        x = self.stages[0](images)
        features = {}
        for level, stage in zip(C_LEVELS, list(self.stages)[1:], strict=True):
            x = stage(x)
            features[level] = x
        return features


def group_norm(channels: int) -> nn.GroupNorm:
    """Normalise in groups of 8 channels, at most 32 groups (Wu and He 2018: 32 groups at 256 channels)."""
    return nn.GroupNorm(math.gcd(min(32, max(1, channels // 8)), channels), channels)


class _NarrowResNet(ResNet):  # type: ignore[misc]  # torchvision ships no types
    """torchvision's ResNet of basic blocks with all four stages narrowed to `width` / 64; the stem stays."""

    def __init__(self, layers: Sequence[int], width: int, norm_layer: Callable[..., nn.Module]) -> None:
        self._width = width
        super().__init__(BasicBlock, list(layers), norm_layer=norm_layer)

    def _make_layer(
        self,
        block: type[BasicBlock | Bottleneck],
        planes: int,
        blocks: int,
        stride: int = 1,
        dilate: bool = False,
    ) -> nn.Sequential:
        layer: nn.Sequential = super()._make_layer(block, planes * self._width // 64, blocks, stride, dilate)
        return layer


def _resnet(config: BackboneConfig, norm: Callable[..., nn.Module]) -> tuple[nn.Module, list[nn.Module], list[int]]:
    if config.name == "resnet50":
        net = torchvision.models.resnet50(norm_layer=norm)
        channels = [256, 512, 1024, 2048]
    elif config.width != 64:
        net = _NarrowResNet([2, 2, 2, 2], config.width, norm)
        channels = [config.width * scale for scale in (1, 2, 4, 8)]
    else:
        net = torchvision.models.resnet18(norm_layer=norm)
        channels = [64, 128, 256, 512]
    del net.fc
    stem = nn.Sequential(net.conv1, net.bn1, net.relu)
    # The pooling belongs to C2's stride; it has no weights, so that freezing treats it alike on either side.
    return net, [stem, nn.Sequential(net.maxpool, *net.layer1), net.layer2, net.layer3, net.layer4], channels


def _mobilenet(config: BackboneConfig, norm: Callable[..., nn.Module]) -> tuple[nn.Module, list[nn.Module], list[int]]:
    net = torchvision.models.mobilenet_v2(norm_layer=norm)
    del net.classifier
    blocks = list(net.features)
    # Each stage ends in the linear bottleneck before the next stride; the last 1x1 to 1280 channels only
    # serves the classifier and is left out.
    bounds = (0, 2, 4, 7, 14, 18)
    stages: list[nn.Module] = [nn.Sequential(*blocks[a:b]) for a, b in pairwise(bounds)]
    return net, stages, [24, 32, 96, 320]
