"""Classification networks as C2..C5."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.ops import FrozenBatchNorm2d

from mimicdet.config import BackboneConfig, is_published_name
from mimicdet.weights import LoadReport, load_matching, load_tensors

C_LEVELS = (2, 3, 4, 5)
# What a classifier is called in torchvision's networks; it has no place in a detector.
CLASSIFIER = ("fc.", "classifier.")


class Backbone(nn.Module):
    """Maps images (N, 3, H, W) to {2: C2, 3: C3, 4: C4, 5: C5}, C_L of stride 2^L.

    Stages, not layers, are the unit of freezing: `stages[0]` is the stem, `stages[i]` ends in C_{i+1}.

    Attributes:
        channels: {L: number of channels of C_L}.
        report: what loading `config.weights` did; None where nothing was loaded.
    """

    def __init__(self, config: BackboneConfig, *, pretrained: bool = True) -> None:
        """Build `config.name`; `pretrained` False leaves `config.weights` unread, for a state that replaces them.

        Raises:
            ValueError: the weights cannot be read, are of another network, or cannot be downloaded.
        """
        super().__init__()
        norm = _NORMS[config.norm or "group_norm"]
        build = _mobilenet if config.name == "mobilenet_v2" else _resnet
        net, stages, channels = build(config, norm)
        self.report: LoadReport | None = None
        if config.weights is not None and pretrained:
            # Under torchvision's own names, before the parts are put into stages.
            self.report = _load(net, config.name, config.weights)
        self.stages = nn.ModuleList(stages)
        _fold_norms(self.stages)
        self.channels = dict(zip(C_LEVELS, channels, strict=True))
        self._num_frozen = config.frozen_stages or 0
        for stage in stages[: self._num_frozen]:
            stage.requires_grad_(False)

    def train(self, mode: bool = True) -> Backbone:
        """Switch to training; frozen stages stay as they are, so that their norms learn no statistics either."""
        super().train(mode)
        for stage in list(self.stages)[: self._num_frozen]:
            stage.eval()
        return self

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


class FoldedNorm(FrozenBatchNorm2d):  # type: ignore[misc]  # torchvision ships no types
    """A FrozenBatchNorm2d whose convolution applies it; passes its input through."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`."""
        return x

    def fold(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias of the convolution with `weight` (C, ..), this norm included."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return weight * scale[:, None, None, None], self.bias - self.running_mean * scale


class NormedConv(nn.Conv2d):
    """A convolution and the frozen norm behind it in one pass over the activations instead of three.

    The weights are scaled anew in each pass, so that they can be trained: a few milliseconds, where the norms of a
    ResNet-50 took a sixteenth of its forward pass on a CPU.
    """

    def __init__(self, conv: nn.Conv2d, norm: FoldedNorm) -> None:
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            conv.groups,
            bias=False,
            device="meta",
        )
        self.weight = conv.weight
        self._norm = (norm,)  # no child: its state keeps torchvision's place and name

    def forward(self, input: Tensor) -> Tensor:
        """Convolve and normalise (N, C, H, W)."""
        weight, bias = self._norm[0].fold(self.weight)
        return F.conv2d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)


def _fold_norms(stages: nn.ModuleList) -> None:
    for parent in stages.modules():
        for (name, conv), (_, norm) in pairwise(list(parent.named_children())):
            if isinstance(norm, FoldedNorm):
                assert isinstance(conv, nn.Conv2d)
                setattr(parent, name, NormedConv(conv, norm))


_NORMS: dict[str, Callable[..., nn.Module]] = {
    "frozen_bn": FoldedNorm,
    "sync_bn": nn.SyncBatchNorm,
    "group_norm": group_norm,
}


def _load(net: nn.Module, name: str, weights: str) -> LoadReport:
    if not is_published_name(weights):
        return load_matching(net, weights, ignore=CLASSIFIER)
    published = torchvision.models.get_model_weights(name)
    known = ", ".join(member.name for member in published)
    if weights not in published.__members__:
        raise ValueError(f"weights {weights}: torchvision publishes no such weights of {name}, expected one of {known}")
    try:
        tensors = published[weights].get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:  # the latter of a download whose hash is wrong
        raise ValueError(f"weights {weights} of {name} cannot be downloaded: {error}") from None
    return load_tensors(net, tensors, f"weights {weights}", ignore=CLASSIFIER)


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
    if config.width != 64:
        net = _NarrowResNet([2, 2, 2, 2], config.width, norm)
    else:
        net = torchvision.models.get_model(config.name, norm_layer=norm)
    expansion = 1 if config.name in ("resnet18", "resnet34") else 4
    channels = [config.width * expansion * scale for scale in (1, 2, 4, 8)]
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
