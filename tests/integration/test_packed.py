"""Packed data on a real cluster: packing as Ray tasks, and training from it."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from tinyruns import TINY, quiet

from mimiclab import checkpoint, runs
from mimiclab.data import pack as pack_module
from mimiclab.data.packing import pack_files
from mimiclab.data.scenes import ScenesPaths, generate_scenes
from mimiclab.errors import UserError
from mimiclab.experiment import load_experiment
from mimiclab.schema import Experiment
from mimiclab.train import train

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_cluster")]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> ScenesPaths:
    return generate_scenes(tmp_path_factory.mktemp("scenes"), seed=0, num_train=14, num_val=6, size=64)


def test_tasks_of_a_cluster_make_the_same_set_as_threads(
    scenes: ScenesPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack_module, "SHARD_IMAGES", 4)
    source = (scenes.train_annotations, scenes.train_images)
    pack_files(*source, str(tmp_path / "by tasks"), quiet())
    assert len(list((tmp_path / "by tasks").glob("shard-*.parquet"))) == 4
    monkeypatch.setattr("mimiclab.data.packing._connected", lambda: False)
    pack_files(*source, str(tmp_path / "by threads"), quiet(), workers=2)
    assert contents(tmp_path / "by tasks") == contents(tmp_path / "by threads")


def test_an_image_that_a_task_cannot_decode_is_named(scenes: ScenesPaths, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 9, "height": 9}],
        "annotations": [],
        "categories": [{"id": 1, "name": "x"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        pack_files(tmp_path / "a.json", tmp_path, str(tmp_path / "set"), quiet())
    expected = f"{tmp_path}/a.png: cannot be read as an image: its content is of no known format"
    assert str(error.value) == expected


def experiment(root: Path, name: str, data: dict[str, object], epochs: int = 1) -> Experiment:
    text = TINY.replace("ROOT", str(root)).replace(
        "scenes: {root: " + str(root) + "/data, train: 14, val: 6, size: 64}",
        f"train: {json.dumps(data['train'])}\n  val: {json.dumps(data['val'])}",
    )
    (root / "tiny.yaml").write_text(text)
    overrides = (f"name={name}", f"optim.epochs={epochs}", "optim.schedule=constant", "scale.workers=1")
    return load_experiment(root / "tiny.yaml", overrides).experiment


def test_packed_data_trains_the_same_weights_and_may_not_change_under_a_run(
    scenes: ScenesPaths, tmp_path: Path
) -> None:
    parts = {
        "train": (scenes.train_annotations, scenes.train_images),
        "val": (scenes.val_annotations, scenes.val_images),
    }
    plain = {part: {"annotations": str(file), "images": str(folder)} for part, (file, folder) in parts.items()}
    packed = {part: {"packed": str(tmp_path / part)} for part in parts}
    for part, (file, folder) in parts.items():
        pack_files(file, folder, str(tmp_path / part), quiet())

    by_files = train(experiment(tmp_path, "files", plain), console=quiet())
    by_shards = train(experiment(tmp_path, "shards", packed), console=quiet())
    ends = [checkpoint.latest(run.checkpoints, warn=pytest.fail) for run in (by_files, by_shards)]
    assert ends[0] is not None
    assert ends[1] is not None
    expected, weights = ends[0].weights(), ends[1].weights()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert ends[0].meta["data"] == ends[1].meta["data"]
    assert by_shards.experiment().data.train.packed == str(tmp_path / "train")

    image = sorted(scenes.val_images.iterdir())[2]
    Image.new("RGB", (64, 64)).save(image)
    with pytest.raises(UserError, match=r"data\.val: .* is not what checkpoint .*step-00000005 was trained with"):
        train(experiment(tmp_path, "files", plain, epochs=2), console=quiet())
    # The packed copy is not touched by that.
    train(experiment(tmp_path, "shards", packed, epochs=2), console=quiet())
    run = runs.read(by_shards.folder)
    assert run is not None
    assert run.status == "finished"
