"""Weights from safetensors files: everything fits, or one message says what does not."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mimicdet.backbone import Backbone
from mimicdet.config import BackboneConfig
from mimicdet.weights import load_matching


def network(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width))


def save(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, path)
    return path


def test_round_trip_is_exact(tmp_path: Path) -> None:
    source, target = network(), network()
    load_matching(target, save(tmp_path / "a.safetensors", source.state_dict()))
    for key, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], value), key


def test_ignored_keys_may_be_there(tmp_path: Path) -> None:
    source, target = network(), network()
    path = save(tmp_path / "a.safetensors", {**source.state_dict(), "fc.weight": torch.zeros(2)})
    load_matching(target, path, ignore=("fc.",))
    assert torch.equal(target[0].weight, source[0].weight)


def state_without(key: str) -> dict[str, Tensor]:
    state = network().state_dict()
    del state[key]
    return state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (state_without("0.weight"), r"keys are missing, the first is 0\.weight"),
        (network(5).state_dict(), r"0\.weight is \(5, 3, 3, 3\), expected \(4, 3, 3, 3\)"),
        ({**network().state_dict(), "2.weight": torch.zeros(1)}, r"have no place, the first is 2\.weight"),
    ],
    ids=["missing key", "wrong shape", "key on top"],
)
def test_what_does_not_fit_is_refused_and_nothing_is_loaded(
    tmp_path: Path, state: dict[str, Tensor], message: str
) -> None:
    path = save(tmp_path / "other.safetensors", state)
    target = network()
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(ValueError, match=message) as error:
        load_matching(target, path)
    assert str(path) in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())


def test_other_files_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "weights.safetensors"
    text.write_text("not weights at all, although long enough to hold a header")
    for path, message in (
        (text, "not a safetensors file"),
        (tmp_path / "absent", "no such file"),
        (tmp_path, "no such file"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            load_matching(network(), path)
        assert str(path) in str(error.value)


def test_weights_of_another_norm_are_refused(tmp_path: Path) -> None:
    # The scales and shifts of BatchNorm have GroupNorm's names and shapes, and mean nothing to it.
    import torchvision

    path = save(tmp_path / "resnet18.safetensors", torchvision.models.resnet18().state_dict())
    with pytest.raises(ValueError, match="have no place"):
        Backbone(BackboneConfig(name="resnet18", weights=str(path), norm="group_norm", frozen_stages=0))
