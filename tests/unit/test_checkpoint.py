"""A checkpoint is whole or it is none."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mimiclab import checkpoint
from mimiclab.checkpoint import MANIFEST, META, STATE, WEIGHTS
from mimiclab.errors import UserError

CLASSES = ["disk", "größe, schief"]


def weights(value: float) -> dict[str, torch.Tensor]:
    return {
        "matrix": torch.full((3, 4), value).T,  # not contiguous
        "counter": torch.tensor(7),
        "half": torch.tensor([0.1], dtype=torch.float16),
    }


def state(value: float) -> dict:
    return {
        "step": int(value),
        "optimizer": {"state": {0: {"exp_avg": torch.tensor([value])}}, "groups": [{"lr": 0.1}]},
    }


def save(folder: Path, step: int, **more) -> checkpoint.Checkpoint:
    meta = {"step": step, "classes": CLASSES, "best": None, **more}
    return checkpoint.save(folder, weights(step), state(step), meta)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def warnings() -> list[str]:
    return []


def test_what_was_saved_comes_back(tmp_path):
    save(tmp_path, 50, unsent=[["train/loss", 0.5, 17, 50]])

    newest = checkpoint.latest(tmp_path, warn=pytest.fail)

    assert newest.step == 50
    assert newest.path == tmp_path / "step-00000050"
    assert newest.meta == {"step": 50, "classes": CLASSES, "best": None, "unsent": [["train/loss", 0.5, 17, 50]]}
    for name, tensor in weights(50).items():
        assert torch.equal(newest.weights()[name], tensor)
        assert newest.weights()[name].dtype == tensor.dtype
    assert newest.state() == state(50)
    assert checkpoint.classes_of(newest.path / WEIGHTS) == CLASSES
    assert names(tmp_path) == ["step-00000050"]
    assert names(newest.path) == sorted([WEIGHTS, STATE, META, MANIFEST])


def test_the_newest_is_by_step_not_by_time_or_text(tmp_path):
    for step in (100, 9, 50):
        save(tmp_path, step)

    assert checkpoint.latest(tmp_path, warn=pytest.fail).step == 100


@pytest.mark.parametrize("folder", ["", "missing"])
def test_without_checkpoints_there_is_none(tmp_path, folder):
    assert checkpoint.latest(tmp_path / folder, warn=pytest.fail) is None


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "flipped": flip,
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda path: os.truncate(path, 0),
    "gone": Path.unlink,
    "other": lambda path: path.write_text("[]"),
}


@pytest.mark.parametrize("file", [WEIGHTS, STATE, META, MANIFEST])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_one_is_skipped_for_the_one_before_and_named(tmp_path, warnings, damage, file):
    for step in (1, 2, 3):
        save(tmp_path, step)
    DAMAGE[damage](tmp_path / "step-00000003" / file)

    newest = checkpoint.latest(tmp_path, warn=warnings.append)

    assert newest.step == 2
    assert torch.equal(newest.weights()["matrix"], weights(2)["matrix"])
    assert len(warnings) == 1
    assert str(tmp_path / "step-00000003") in warnings[0]


def test_a_folder_without_a_manifest_is_no_checkpoint(tmp_path, warnings):
    save(tmp_path, 1)
    half = tmp_path / "step-00000002"
    half.mkdir()
    shutil.copy(tmp_path / "step-00000001" / WEIGHTS, half)

    assert checkpoint.latest(tmp_path, warn=warnings.append).step == 1
    assert MANIFEST in warnings[0]


def test_when_all_are_damaged_there_is_none_and_each_is_named(tmp_path, warnings):
    for step in (1, 2):
        save(tmp_path, step)
        flip(tmp_path / f"step-0000000{step}" / STATE)

    assert checkpoint.latest(tmp_path, warn=warnings.append) is None
    assert [STATE in text for text in warnings] == [True, True]


@pytest.mark.parametrize("broken", [{"best": {1, 2}}, {"best": object()}])
def test_a_save_that_fails_leaves_nothing(tmp_path, broken):
    save(tmp_path, 1)

    with pytest.raises(TypeError):
        save(tmp_path, 2, **broken)

    assert names(tmp_path) == ["step-00000001"]


def test_a_save_that_fails_leaves_an_earlier_one_of_its_step(tmp_path):
    save(tmp_path, 1, mark="before")

    with pytest.raises(TypeError):
        save(tmp_path, 1, mark=object())

    assert checkpoint.latest(tmp_path, warn=pytest.fail).meta["mark"] == "before"


def test_a_step_that_is_trained_again_replaces_what_is_damaged(tmp_path):
    save(tmp_path, 1)
    flip(tmp_path / "step-00000001" / WEIGHTS)

    save(tmp_path, 1, mark="again")

    assert checkpoint.latest(tmp_path, warn=pytest.fail).meta["mark"] == "again"


def test_loading_runs_no_code(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    saved = checkpoint.save(tmp_path, weights(1), {"step": Harmful()}, {"step": 1, "classes": CLASSES})

    with pytest.raises(Exception, match="weights_only"):
        saved.state()
    assert not (tmp_path / "ran").exists()


def test_prune_keeps_the_newest_and_the_best(tmp_path):
    for step in range(10, 70, 10):
        save(tmp_path, step)

    checkpoint.prune(tmp_path, newest=60, keep=2, steps=[20])

    assert names(tmp_path) == ["step-00000020", "step-00000050", "step-00000060"]


def test_prune_keeps_all_where_there_are_fewer(tmp_path):
    save(tmp_path, 10)

    checkpoint.prune(tmp_path, newest=10, keep=3, steps=[])

    assert names(tmp_path) == ["step-00000010"]


def test_a_damaged_later_one_does_not_count_as_one_that_is_kept(tmp_path, warnings):
    save(tmp_path, 50)
    save(tmp_path, 100)
    flip(tmp_path / "step-00000100" / WEIGHTS)
    assert checkpoint.latest(tmp_path, warn=warnings.append).step == 50
    save(tmp_path, 60)  # an evaluation before step 100 comes again

    checkpoint.prune(tmp_path, newest=60, keep=1, steps=[])

    assert checkpoint.latest(tmp_path, warn=warnings.append).step == 60


def test_prune_removes_what_a_killed_process_left(tmp_path):
    save(tmp_path, 10)
    left = tmp_path / ".step-00000010-12345"
    shutil.copytree(tmp_path / "step-00000010", left)
    assert checkpoint.latest(tmp_path, warn=pytest.fail).path.name == "step-00000010"

    checkpoint.prune(tmp_path, newest=10, keep=1, steps=[])

    assert names(tmp_path) == ["step-00000010"]


def test_weights_that_no_run_wrote_have_no_classes(tmp_path):
    backbone = tmp_path / "backbone.safetensors"
    save_file(weights(1) | {"matrix": torch.zeros(1)}, backbone)
    other = tmp_path / "other.safetensors"
    save_file({"w": torch.zeros(1)}, other, metadata={"classes": "disk, square"})

    for path in (backbone, other):
        with pytest.raises(
            UserError, match=r"no class names in its header, expected the weights\.safetensors of a run"
        ):
            checkpoint.classes_of(path)


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 a zip file, say"])
def test_weights_that_cannot_be_read_are_named(tmp_path, content):
    path = tmp_path / "w.safetensors"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(UserError, match="cannot be read as a safetensors file: ") as caught:
        checkpoint.classes_of(path)
    assert str(path) in str(caught.value)
