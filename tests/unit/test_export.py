"""A run in, one file for other programs out."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import nn

from mimiclab import checkpoint, runs
from mimiclab.build import build_detector
from mimiclab.errors import UserError
from mimiclab.experiment import identity, load_experiment
from mimiclab.export import check, difference, export, read_metadata
from mimiclab.predict import load_detector
from mimiclab.runs import Run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

EXPERIMENT = """
name: tiny
data:
  scenes: {}
  resize: {short: 64, long: 96}
model:
  backbone: {name: resnet18, width: 8}
  pyramid: {channels: 8, max_level: 5}
  student: {head_width: 8, offset_channels: [4, 4]}
  teacher: {num_convs: 1}
  inference: {topk: 50, score_threshold: 0.3}
"""
CLASSES = ("disk", "großer stern")


def make_run(root: Path, *overrides: str) -> Run:
    """A run with one checkpoint of weights that detect something in anything."""
    file = root / "tiny.yaml"
    file.write_text(EXPERIMENT)
    experiment = load_experiment(file, [f"where.storage={root / 'runs'}", *overrides]).experiment
    folder = runs.prepare(experiment, fresh=False)
    run = Run(folder, identity(experiment), "sqlite:///x.db", "0" * 32, CLASSES, "finished")
    run.write()
    torch.manual_seed(0)
    detector = build_detector(experiment.model, CLASSES)
    for name, parameter in detector.named_parameters():
        if name in ("refinement.objectness.weight", "student.logits.weight", "student.deltas.weight"):
            nn.init.normal_(parameter)
    meta = {"step": 3, "classes": list(CLASSES), "best": None, "experiment": experiment.model_dump(mode="json")}
    checkpoint.save(run.checkpoints, detector.state_dict(), {}, meta)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return make_run(tmp_path_factory.mktemp("storage"))


@pytest.fixture(scope="module")
def onnx_export(run) -> tuple[Path, list[str]]:
    said = []
    return export(run, "onnx", None, said.append), said


@pytest.fixture(scope="module")
def torch_export(run, tmp_path_factory) -> tuple[Path, list[str]]:
    said = []
    file = tmp_path_factory.mktemp("other") / "detector.pt2"
    file.write_text("what was there before")
    return export(run, "torch", file, said.append), said


def assert_says(said: list[str], file: Path) -> None:
    assert said[0] == f"{file}: {file.stat().st_size / 1e6:.1f} MB"
    text = "\n".join(said)
    assert "images (N, 3, H, W) uint8" in text
    assert "boxes (N, 100, 4)" in text
    words = said[-1].split()
    assert said[-1].startswith("check:")
    assert int(words[1]) > 10
    assert "counterpart" not in said[-1]
    assert float(words[words.index("boxes") + 1]) < 1e-3
    assert float(words[words.index("scores") + 1]) < 1e-4


def test_an_onnx_file_lies_in_the_runs_folder_and_detects_what_the_run_does(run, onnx_export):
    file, said = onnx_export

    assert file == run.folder / "tiny.onnx"
    assert_says(said, file)
    image = torch.randint(256, (3, 70, 80), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    session = onnxruntime.InferenceSession(file)
    boxes, scores, labels = (torch.from_numpy(o[0]) for o in session.run(None, {"images": image[None].numpy()}))
    num = int((labels >= 0).sum())
    (wanted,) = load_detector(run, run.experiment())([image])
    found = {"boxes": boxes[:num], "scores": scores[:num], "labels": labels[:num]}
    compared = difference(wanted, found)
    assert compared.num == len(wanted["labels"]) > 10
    assert compared.unmatched == 0
    assert compared.boxes < 1e-3
    assert compared.scores < 1e-4


def test_a_pt2_goes_where_it_is_told_and_replaces_what_was_there(torch_export):
    file, said = torch_export

    assert_says(said, file)
    assert "33 pixels a side or more" in "\n".join(said)


def test_nothing_is_left_beside_the_files(run, onnx_export, torch_export):
    for file, _ in (onnx_export, torch_export):
        assert not [path.name for path in file.parent.iterdir() if file.stem in path.name and path != file]


def test_files_say_what_they_are(run, onnx_export, torch_export):
    for file, _ in (onnx_export, torch_export):
        metadata = read_metadata(file)
        assert json.loads(metadata["classes"]) == list(CLASSES)
        assert json.loads(metadata["image_mean"]) == [0.485, 0.456, 0.406]
        assert metadata["run"] == "tiny"
        assert metadata["step"] == "3"
        assert metadata["mimiclab"] == version("mimiclab")
        assert metadata["score_threshold"] == "0.3"


def test_a_failed_check_leaves_the_old_file_and_nothing_else(run, tmp_path, monkeypatch):
    file = tmp_path / "x.pt2"
    file.write_text("old")
    monkeypatch.setattr(torch.export, "load", lambda *_: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        export(run, "torch", file, print)

    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


# ---- mistakes ----


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_missing_packages_are_named_before_any_work(run, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)

    with pytest.raises(UserError, match=rf"{package} is missing.*pip install mimiclab\[onnx\]"):
        export(run, "onnx", tmp_path / "x.onnx", print)

    assert not list(tmp_path.iterdir())


def test_without_onnxruntime_the_check_is_skipped_and_says_so(run, onnx_export, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)

    said = check(onnx_export[0], "onnx", load_detector(run, run.experiment()), image)

    assert said == "skipped, the package onnxruntime is missing: pip install mimiclab[onnx]"


def test_other_detectors_are_refused(tmp_path):
    run = make_run(tmp_path, "model.detector=retinanet")

    with pytest.raises(UserError, match="run tiny: its detector is retinanet, expected a MimicDet run"):
        export(run, "onnx", None, print)


@pytest.mark.parametrize("place", ["gone/x.onnx", "file/x.onnx", "folder"])
def test_a_place_that_cannot_be_written_is_named(run, tmp_path, place):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()

    with pytest.raises(UserError, match=f"{place}: cannot be written, expected a file in a folder"):
        export(run, "onnx", tmp_path / place, print)


# ---- comparing ----


def found(*rows: tuple[float, float, int]) -> dict[str, torch.Tensor]:
    """Detections of (x, score, label), 10 pixels wide."""
    return {
        "boxes": torch.tensor([[x, 0, x + 10, 10] for x, _, _ in rows]).reshape(-1, 4),
        "scores": torch.tensor([score for _, score, _ in rows]),
        "labels": torch.tensor([label for _, _, label in rows], dtype=torch.int64),
    }


def test_differences_do_not_depend_on_the_order():
    compared = difference(found((0.0, 0.9, 0), (50.0, 0.8, 0)), found((50.5, 0.8, 0), (0.0, 0.75, 0)))

    assert (compared.num, compared.unmatched) == (2, 0)
    assert compared.boxes == 0.5
    assert compared.scores == pytest.approx(0.15)


def test_detections_are_compared_within_their_class():
    compared = difference(found((0.0, 0.9, 0), (9.0, 0.9, 1)), found((9.0, 0.9, 0)))

    assert (compared.num, compared.unmatched, compared.boxes) == (1, 1, 9.0)


def test_nothing_differs_from_nothing():
    compared = difference(found(), found())

    assert (compared.num, compared.unmatched, compared.boxes, compared.scores) == (0, 0, 0.0, 0.0)
