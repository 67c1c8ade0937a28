"""A detector starts from the weights that its experiment names, or says why it cannot."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mimicdet import ModelConfig
from mimicdet.config import BackboneConfig, PyramidConfig, StudentConfig, TeacherConfig
from mimiclab import checkpoint
from mimiclab.build import build_detector
from mimiclab.errors import UserError

TINY = ModelConfig(
    backbone=BackboneConfig(name="resnet18", width=16),
    pyramid=PyramidConfig(channels=16, max_level=5),
    student=StudentConfig(head_width=32, offset_channels=(8, 8)),
    teacher=TeacherConfig(num_rois=16, num_convs=1),
)


@pytest.fixture
def trained(tmp_path) -> tuple[dict[str, torch.Tensor], Path]:
    """A detector's state, and the file that a run wrote of it."""
    torch.manual_seed(1)
    state = build_detector(TINY, ["cat", "dog"]).state_dict()
    saved = checkpoint.save(tmp_path, state, {}, {"step": 1, "classes": ["cat", "dog"]})
    return state, saved.path / checkpoint.WEIGHTS


def test_without_weights_the_seed_decides():
    torch.manual_seed(3)
    one = build_detector(TINY, ["cat", "dog"])
    torch.manual_seed(3)
    other = build_detector(TINY, ["cat", "dog"])

    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_weights_of_a_run_are_where_the_next_one_starts(trained):
    state, path = trained
    torch.manual_seed(2)

    detector = build_detector(replace(TINY, weights=str(path)), ["cat", "dog"])

    for name, tensor in detector.state_dict().items():
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("classes", [["cat"], ["dog", "cat"], ["cat", "dog", "cow"]])
def test_a_detector_of_other_classes_gives_all_but_its_class_layers(trained, classes):
    state, path = trained
    torch.manual_seed(2)
    said = []

    detector = build_detector(replace(TINY, weights=str(path)), classes, say=said.append)

    torch.manual_seed(2)
    random = build_detector(TINY, classes).state_dict()
    new = {name for name, tensor in detector.state_dict().items() if torch.equal(tensor, random[name])}
    for name, tensor in detector.state_dict().items():
        if name.startswith(("student.logits.", "teacher.logits.")):
            assert torch.equal(tensor, random[name]), name
        else:
            assert torch.equal(tensor, state[name]), name
    assert {"student.logits.weight", "teacher.logits.weight"} <= new
    (line,) = said
    assert line.startswith(f"{path}: {len(state) - 4} tensors loaded; ")
    assert line.endswith(
        "4 not loaded (student.logits.weight, student.logits.bias, teacher.logits.weight, ...): trained for the "
        f"classes cat, dog, the data's are {', '.join(classes)}"
    )


def test_the_same_classes_take_everything_and_say_so(trained):
    state, path = trained
    said = []
    build_detector(replace(TINY, weights=str(path)), ["cat", "dog"], say=said.append)
    assert said == [f"{path}: {len(state)} tensors loaded"]


def test_the_backbone_s_file_is_not_needed_beside_a_detector_s(trained):
    state, path = trained
    backbone = BackboneConfig(name="resnet18", width=16)
    gone = replace(TINY, weights=str(path), backbone=backbone)
    object.__setattr__(backbone, "weights", "/gone/resnet18.pth")

    detector = build_detector(gone, ["cat", "dog"])

    assert all(torch.equal(tensor, state[name]) for name, tensor in detector.state_dict().items())


def test_weights_of_another_model_are_refused_with_what_does_not_fit(trained):
    _, path = trained
    wider = replace(TINY, weights=str(path), pyramid=replace(TINY.pyramid, channels=24))

    with pytest.raises(UserError, match=r"^model: weights .*weights\.safetensors do not fit MimicDet: .* expected \("):
        build_detector(wider, ["cat", "dog"])


def test_a_backbone_s_weights_are_no_detector_s(tmp_path):
    path = tmp_path / "resnet18.safetensors"
    save_file({"conv1.weight": torch.zeros(1)}, path)

    with pytest.raises(UserError, match=r"resnet18\.safetensors: no class names"):
        build_detector(replace(TINY, weights=str(path)), ["cat"])


def test_missing_weights_are_named():
    with pytest.raises(UserError, match=r"weights /no/w\.safetensors: cannot be read"):
        build_detector(replace(TINY, weights="/no/w.safetensors"), ["cat"])
    backbone = BackboneConfig(name="resnet18", weights="/no/b.safetensors")
    with pytest.raises(UserError, match=r"^model: weights /no/b\.safetensors: no such file"):
        build_detector(replace(TINY, backbone=backbone), ["cat"])
