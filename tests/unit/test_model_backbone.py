"""Stages C2..C5 of the classification networks."""

import copy
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from mimicdet.backbone import Backbone, group_norm
from mimicdet.config import BackboneConfig

pytestmark = pytest.mark.usefixtures("one_thread")

CHANNELS = {
    ("resnet18", 64): (64, 128, 256, 512),
    ("resnet18", 16): (16, 32, 64, 128),
    ("resnet50", 64): (256, 512, 1024, 2048),
    ("mobilenet_v2", 64): (24, 32, 96, 320),
}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[nn.Module, Path]]:
    """Networks of torchvision in evaluation mode, with statistics that matter, and their weight files."""
    torch.manual_seed(0)
    answer = {}
    for name in ("resnet18", "mobilenet_v2"):
        net = getattr(torchvision.models, name)().eval()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.5, 0.5)
                nn.init.uniform_(module.running_var, 0.5, 2)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
        path = tmp_path_factory.mktemp("weights") / f"{name}.safetensors"
        save_file(net.state_dict(), path)
        answer[name] = (net, path)
    return answer


@pytest.mark.parametrize(("name", "width"), CHANNELS)
def test_channels_and_strides(name: str, width: int) -> None:
    backbone = Backbone(BackboneConfig(name=name, width=width))
    with torch.no_grad():
        features = backbone(torch.randn(1, 3, 64, 96))
    assert list(features) == [2, 3, 4, 5]
    assert tuple(backbone.channels.values()) == CHANNELS[name, width]
    for level, feature in features.items():
        assert feature.shape == (1, backbone.channels[level], 64 >> level, 96 >> level)


@pytest.mark.parametrize(
    ("name", "num_parameters", "channels"),
    [
        # torchvision's published counts, less the classifier's.
        ("resnet34", 21_797_672 - 513_000, (64, 128, 256, 512)),
        ("resnet101", 44_549_160 - 2_049_000, (256, 512, 1024, 2048)),
        ("resnext101_32x8d", 88_791_336 - 2_049_000, (256, 512, 1024, 2048)),
        ("resnext101_64x4d", 83_455_272 - 2_049_000, (256, 512, 1024, 2048)),
    ],
)
def test_deep_networks(name: str, num_parameters: int, channels: tuple[int, ...]) -> None:
    with torch.device("meta"):
        backbone = Backbone(BackboneConfig(name=name))
        features = backbone(torch.zeros(1, 3, 64, 96))
    assert sum(p.numel() for p in backbone.parameters()) == num_parameters
    assert [f.shape for f in features.values()] == [(1, c, 64 >> i, 96 >> i) for i, c in enumerate(channels, 2)]


def test_statistics_of_frozen_stages_stay(published: dict[str, tuple[nn.Module, Path]]) -> None:
    _, path = published["resnet18"]
    backbone = Backbone(BackboneConfig(name="resnet18", weights=str(path), norm="sync_bn")).train()
    norms = [[m for m in stage.modules() if isinstance(m, nn.SyncBatchNorm)] for stage in backbone.stages]
    assert all(norms)
    assert [{norm.training for norm in stage} for stage in norms] == [{False}, {False}, {True}, {True}, {True}]
    assert not [m for m in backbone.eval().modules() if m.training]


def test_published_weights_are_taken_by_name(
    published: dict[str, tuple[nn.Module, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From torch's cache, as after a first download."""
    net, path = published["resnet18"]
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url
    cached = tmp_path / "hub" / "checkpoints" / url.rpartition("/")[2]
    cached.parent.mkdir(parents=True)
    torch.save(net.state_dict(), cached)
    named = Backbone(BackboneConfig(name="resnet18", weights="IMAGENET1K_V1"))
    local = Backbone(BackboneConfig(name="resnet18", weights=str(path)))
    assert all(torch.equal(a, b) for a, b in zip(named.parameters(), local.parameters(), strict=True))
    assert named.report is not None
    assert set(named.report.skipped.values()) == {"no such layer here", "a counter"}
    assert "fc.weight, fc.bias" in str(named.report)


def test_published_weights_that_cannot_be_had_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for variable in ("https_proxy", "HTTPS_PROXY"):  # nobody listens there
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="weights IMAGENET1K_V1 of resnet18 cannot be downloaded: "):
        Backbone(BackboneConfig(name="resnet18", weights="IMAGENET1K_V1"))
    with pytest.raises(ValueError, match=r"no such weights of resnet18, expected one of IMAGENET1K_V1$"):
        Backbone(BackboneConfig(name="resnet18", weights="IMAGENET1K_V2"))


def test_weights_of_another_network_are_refused(published: dict[str, tuple[nn.Module, Path]]) -> None:
    _, path = published["resnet18"]
    with pytest.raises(ValueError, match=r"resnet18\.safetensors do not fit ResNet: .* keys are missing"):
        Backbone(BackboneConfig(name="resnet34", weights=str(path)))
    with pytest.raises(ValueError, match=r"resnet18\.safetensors do not fit MobileNetV2"):
        Backbone(BackboneConfig(name="mobilenet_v2", weights=str(path)))


def test_a_narrow_resnet_has_a_full_stem_and_narrow_stages() -> None:
    narrow, full = (Backbone(BackboneConfig(name="resnet18", width=width)) for width in (16, 64))
    stem, *stages = narrow.stages
    assert [p.shape for p in stem.parameters()] == [p.shape for p in full.stages[0].parameters()]
    for ours, theirs in zip(stages[1:], list(full.stages)[2:], strict=True):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            # Every layer has a quarter of the channels on both sides.
            assert list(a.shape) == [side if side in (1, 3) else side // 4 for side in b.shape]
    assert narrow.channels == {2: 16, 3: 32, 4: 64, 5: 128}


def test_odd_sizes_are_rounded_up() -> None:
    # Anchors count on it: an image without padding has ceil(side / stride) cells.
    features = Backbone(BackboneConfig(name="resnet18", width=8))(torch.randn(1, 3, 33, 65))
    assert {level: tuple(f.shape[-2:]) for level, f in features.items()} == {
        2: (9, 17),
        3: (5, 9),
        4: (3, 5),
        5: (2, 3),
    }


def test_resnet_computes_what_torchvision_does(published: dict[str, tuple[nn.Module, Path]]) -> None:
    net, path = published["resnet18"]
    features = Backbone(BackboneConfig(name="resnet18", weights=str(path)))(torch.ones(1, 3, 64, 64))
    x = net.maxpool(net.relu(net.bn1(net.conv1(torch.ones(1, 3, 64, 64)))))
    for level, layer in zip((2, 3, 4, 5), (net.layer1, net.layer2, net.layer3, net.layer4), strict=True):
        x = layer(x)
        assert torch.allclose(features[level], x, rtol=1e-3, atol=1e-4)


def test_mobilenet_computes_what_torchvision_does(published: dict[str, tuple[nn.Module, Path]]) -> None:
    net, path = published["mobilenet_v2"]
    image = torch.randn(1, 3, 64, 64)
    features = Backbone(BackboneConfig(name="mobilenet_v2", weights=str(path)))(image)
    x, last = image, {}
    for block in list(net.features)[:-1]:
        x = block(x)
        last[x.shape[-1]] = x  # what remains is each resolution's last block
    for level, feature in features.items():
        assert torch.allclose(feature, last[64 >> level], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
@pytest.mark.parametrize("frozen_stages", [0, 2, 5])
def test_frozen_stages_have_no_gradient(
    published: dict[str, tuple[nn.Module, Path]], name: str, frozen_stages: int
) -> None:
    path = str(published[name][1])
    backbone = Backbone(BackboneConfig(name=name, weights=path, frozen_stages=frozen_stages))
    features = backbone(torch.randn(1, 3, 64, 64))
    if frozen_stages < 5:
        sum(f.sum() for f in features.values()).backward()
    for index, stage in enumerate(backbone.stages):
        for parameter in stage.parameters():
            assert (parameter.grad is not None) == (index >= frozen_stages)
    # Statistics stay as published in training mode, in every stage.
    assert not [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [m for m in backbone.modules() if isinstance(m, FrozenBatchNorm2d)]


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
@pytest.mark.slow
def test_norms_within_their_convolutions_train_as_behind_them(
    name: str, published: dict[str, tuple[nn.Module, Path]]
) -> None:
    net, path = published[name]
    backbone = Backbone(BackboneConfig(name=name, weights=str(path), frozen_stages=0)).double().train()
    theirs = getattr(torchvision.models, name)(norm_layer=FrozenBatchNorm2d).double().train()
    theirs.load_state_dict({key: value for key, value in net.state_dict().items() if "num_batches" not in key})
    nodes = {"resnet18": "layer4", "mobilenet_v2": "features.17"}
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)

    seen: list[Tensor] = []
    theirs.get_submodule(nodes[name]).register_forward_hook(lambda _, __, output: seen.append(output))
    theirs(images)
    found = backbone(images)[5]
    assert torch.allclose(found, seen[0], rtol=1e-9, atol=1e-9)
    for output in (found, seen[0]):
        output.square().mean().backward()
    # In the order in which the networks are run, which both have.
    wanted = {p.shape: [] for p in theirs.parameters()}
    for parameter in theirs.parameters():
        if parameter.grad is not None:
            wanted[parameter.shape].append(parameter.grad)
    for parameter in backbone.parameters():
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, wanted[parameter.shape].pop(0), rtol=1e-7, atol=1e-12)
    assert not any(wanted.values())


def test_a_copy_of_a_backbone_has_norms_of_its_own(published: dict[str, tuple[nn.Module, Path]]) -> None:
    backbone = Backbone(BackboneConfig(name="resnet18", weights=str(published["resnet18"][1])))
    images = torch.randn(1, 3, 64, 64)
    before = backbone(images)[5]
    copied = copy.deepcopy(backbone)
    for norm in copied.modules():
        if isinstance(norm, FrozenBatchNorm2d):
            norm.weight.zero_()
    assert torch.equal(backbone(images)[5], before)
    assert not torch.equal(copied(images)[5], before)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_a_random_start_uses_group_norm_only(name: str) -> None:
    backbone = Backbone(BackboneConfig(name=name))
    assert not [m for m in backbone.modules() if isinstance(m, FrozenBatchNorm2d | nn.BatchNorm2d)]
    assert [m for m in backbone.modules() if isinstance(m, nn.GroupNorm)]


@pytest.mark.parametrize(
    ("channels", "groups"), [(8, 1), (16, 2), (24, 3), (64, 8), (144, 18), (256, 32), (320, 32), (2048, 32)]
)
def test_groups_have_eight_channels_up_to_32_groups(channels: int, groups: int) -> None:
    assert group_norm(channels).num_groups == groups
