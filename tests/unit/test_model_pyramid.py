"""The pyramid against torchvision's FPN, and what it leaves out at inference."""

import pytest
import torch
from torch import Tensor
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from mimicdet.config import PyramidConfig
from mimicdet.pyramid import Pyramid

IN_CHANNELS = {2: 4, 3: 5, 4: 6, 5: 7}


def features(height: int = 64, width: int = 96) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        level: torch.randn(2, channels, -(-height >> level), -(-width >> level), generator=generator).abs()
        for level, channels in IN_CHANNELS.items()
    }


def reads(pyramid: Pyramid, *, lowest: int | None = None) -> set[str]:
    """Names of the convolutions that a forward pass runs."""
    ran: set[str] = set()
    handles = [
        module.register_forward_hook(lambda *_, name=name: ran.add(name))
        for name, module in pyramid.named_modules()
        if name.count(".") == 1
    ]
    pyramid(features(), lowest=lowest)
    for handle in handles:
        handle.remove()
    return ran


@pytest.mark.parametrize("extra_from", ["p5", "c5"])
def test_equals_torchvisions_fpn(extra_from: str) -> None:
    torch.manual_seed(0)
    ours = Pyramid(IN_CHANNELS, PyramidConfig(channels=8, extra_from=extra_from))
    extra = LastLevelP6P7(7 if extra_from == "c5" else 8, 8)
    theirs = FeaturePyramidNetwork(list(IN_CHANNELS.values()), 8, extra_blocks=extra)
    for index, level in enumerate(IN_CHANNELS):
        theirs.inner_blocks[index][0].load_state_dict(ours.lateral[str(level)].state_dict())
        theirs.layer_blocks[index][0].load_state_dict(ours.output[str(level)].state_dict())
    extra.p6.load_state_dict(ours.extra["6"].state_dict())
    extra.p7.load_state_dict(ours.extra["7"].state_dict())
    # An odd size: the coarser map is not half of the finer one.
    levels = features(72, 104)
    expected = theirs({str(level): feature for level, feature in levels.items()})
    answer = ours(levels)
    assert sorted(answer) == [2, 3, 4, 5, 6, 7]
    for level, wanted in zip(sorted(answer), expected.values(), strict=True):
        assert torch.allclose(answer[level], wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "low", "high"),
    [
        (PyramidConfig(), (3, 4, 5, 6, 7), (2, 3, 4, 5, 6)),
        (PyramidConfig(stagger=0), (3, 4, 5, 6, 7), (3, 4, 5, 6, 7)),
        (PyramidConfig(min_level=4, stagger=2, max_level=6), (4, 5, 6), (2, 3, 4)),
        (PyramidConfig(max_level=5), (3, 4, 5), (2, 3, 4)),
    ],
)
def test_the_teachers_levels_lie_the_stagger_below(
    config: PyramidConfig, low: tuple[int, ...], high: tuple[int, ...]
) -> None:
    pyramid = Pyramid(IN_CHANNELS, config)
    assert (pyramid.low_levels, pyramid.high_levels) == (low, high)
    answer = pyramid(features())
    assert {*low, *high} <= answer.keys()
    for level, feature in answer.items():
        assert feature.shape == (2, 256, -(-64 >> level), -(-96 >> level))


def test_levels_of_training_only_are_not_computed_when_not_wanted() -> None:
    pyramid = Pyramid(IN_CHANNELS, PyramidConfig(channels=8))
    everything = {
        *(f"{part}.{level}" for part in ("lateral", "output") for level in (2, 3, 4, 5)),
        "extra.6",
        "extra.7",
    }
    assert reads(pyramid) == everything
    assert reads(pyramid, lowest=3) == everything - {"lateral.2", "output.2"}
    full, short = pyramid(features()), pyramid(features(), lowest=3)
    assert sorted(short) == [3, 4, 5, 6, 7]
    assert all(torch.equal(short[level], full[level]) for level in short)


def test_without_stagger_the_lowest_level_does_not_exist() -> None:
    pyramid = Pyramid(IN_CHANNELS, PyramidConfig(channels=8, stagger=0))
    assert "2" not in pyramid.lateral
    assert "2" not in pyramid.output
