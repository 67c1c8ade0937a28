"""Weights from safetensors files: everything fits, or one message says what does not."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mimicdet.backbone import Backbone
from mimicdet.config import BackboneConfig
from mimicdet.weights import load_matching, read_weights


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


@pytest.mark.parametrize("suffix", ["pth", "pt"])
def test_torchs_own_files_are_read(tmp_path: Path, suffix: str) -> None:
    source, target = network(), network()
    torch.save(source.state_dict(), tmp_path / f"net.{suffix}")
    load_matching(target, tmp_path / f"net.{suffix}")
    for key, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], value), key


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    torch.save({"0.weight": Bomb(tmp_path / "ran")}, tmp_path / "bomb.pth")
    with pytest.raises(ValueError, match=r"bomb\.pth: not a file of tensors alone"):
        load_matching(network(), tmp_path / "bomb.pth")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "bomb.pth", weights_only=False)
    assert (tmp_path / "ran").exists()  # it would have


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ([torch.zeros(1)], "a list"),
        ({"model": {"0.weight": torch.zeros(1)}}, "a dict at 'model'"),
        ({"a": torch.zeros(1), "epoch": 3}, "a int at 'epoch'"),
    ],
)
def test_a_file_of_anything_else_than_named_tensors_is_refused(tmp_path: Path, content: object, found: str) -> None:
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=f"other.pth: expected tensors by name, found {found}"):
        read_weights(tmp_path / "other.pth")


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    torch.save(network().state_dict(), tmp_path / "net.pth")
    whole = (tmp_path / "net.pth").read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"text"):
        (tmp_path / "net.pth").write_bytes(content)
        with pytest.raises(ValueError, match=r"net\.pth: not a file of tensors alone"):
            load_matching(network(), tmp_path / "net.pth")


def test_the_report_says_what_was_left_out_and_why(tmp_path: Path) -> None:
    source, target = network(5), network(5)
    tensors = {**source.state_dict(), "fc.weight": torch.zeros(2), "fc.bias": torch.zeros(2)}
    tensors["1.weight"] = torch.zeros(9)  # another shape, of a layer that is kept
    kept = target[1].weight.clone()
    report = load_matching(
        target, save(tmp_path / "a.safetensors", tensors), ignore=("fc.",), keep={"1.weight": "of other classes"}
    )
    assert torch.equal(target[0].weight, source[0].weight)
    assert torch.equal(target[1].weight, kept)
    assert report.kept == {"1.weight": "of other classes"}
    assert set(report.skipped) == {"fc.weight", "fc.bias", "1.weight"}
    assert str(report) == (
        "6 tensors loaded; 1 of the file left out (1.weight): of other classes; "
        "2 of the file left out (fc.bias, fc.weight): no such layer here; 1 not loaded (1.weight): of other classes"
    )


def test_weights_of_another_norm_are_refused(tmp_path: Path) -> None:
    # The scales and shifts of BatchNorm have GroupNorm's names and shapes, and mean nothing to it.
    import torchvision

    path = save(tmp_path / "resnet18.safetensors", torchvision.models.resnet18().state_dict())
    with pytest.raises(ValueError, match="have no place"):
        Backbone(BackboneConfig(name="resnet18", weights=str(path), norm="group_norm", frozen_stages=0))
