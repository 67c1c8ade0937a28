"""What a node is asked to look for, and what it says of it."""

from pathlib import Path

import pytest

from mimiclab.cluster.reach import files_of, missing
from mimiclab.experiment import load_experiment


def test_what_is_there_is_not_missed(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").touch()

    for folder in (str(tmp_path), f"{tmp_path}/", f"file://{tmp_path}"):
        assert missing({"data.train.packed": (folder, "manifest.json")}) is None


@pytest.mark.parametrize("folder", ["there", "not-there"])
def test_what_is_missing_is_named_by_its_key_and_path(tmp_path: Path, folder: str) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "seen").touch()

    wrong = missing({"model.weights": (str(tmp_path), "seen"), "data.val.packed": (f"{tmp_path}/{folder}", "x.json")})

    assert wrong == f"data.val.packed: {tmp_path}/{folder}/x.json, which the machine of the driver sees, is not there"


def test_a_place_that_cannot_be_opened_is_named_by_its_key() -> None:
    wrong = missing({"data.val.packed": ("ftp://host/data", "manifest.json")})

    assert wrong is not None
    assert wrong.startswith("data.val.packed: ftp://host/data: cannot be opened")


def test_workers_read_packed_sets_and_files_of_weights(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("""
name: x
data: {train: {packed: "s3://bucket/train?region=x"}, val: {packed: /data/val}}
model: {backbone: {weights: /weights/resnet50.safetensors}}
""")

    assert files_of(load_experiment(file).experiment) == {
        "data.train.packed": ("s3://bucket/train?region=x", "manifest.json"),
        "data.val.packed": ("/data/val", "manifest.json"),
        "model.backbone.weights": ("/weights", "resnet50.safetensors"),
    }
    published = load_experiment(file, ["model.backbone.weights=IMAGENET1K_V1"]).experiment
    assert files_of(published).keys() == {"data.train.packed", "data.val.packed"}
    going_on = load_experiment(file).experiment
    assert files_of(going_on, pretrained=False).keys() == {"data.train.packed", "data.val.packed"}
