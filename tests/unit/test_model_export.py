"""The exported files against the detector that they were made from."""

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from mimicdet import MimicDet, ModelConfig
from mimicdet.baselines import Baseline
from mimicdet.config import (
    BackboneConfig,
    InferenceConfig,
    PyramidConfig,
    StudentConfig,
    TeacherConfig,
)
from mimicdet.export import METADATA_FILE, Deployed, export_onnx, export_torch, min_exported_side
from mimicdet.interface import Detections

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(autouse=True, scope="module")
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


NUM_CLASSES = 3
LIMIT = 100
METADATA = {"classes": json.dumps(["a", "b", "ü"]), "run": "x"}
Run = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


def detector(
    backbone: BackboneConfig | None = None,
    *,
    levels: tuple[int, int] = (3, 5),
    student: dict[str, Any] | None = None,
    **changes: Any,
) -> MimicDet:
    """A tiny detector with opinions: scores, boxes and offsets that differ from box to box."""
    inference = {"topk": 80, "score_threshold": 0.3, "nms_iou": 0.5, "max_detections": LIMIT}
    inference |= {key: changes.pop(key) for key in list(changes) if key in InferenceConfig.__annotations__}
    sections: dict[str, Any] = {
        "backbone": backbone or BackboneConfig(name="resnet18", width=8),
        "pyramid": PyramidConfig(channels=8, min_level=levels[0], max_level=levels[1]),
        "student": StudentConfig(head_width=8, offset_channels=(4, 4), **(student or {})),
        "teacher": TeacherConfig(num_convs=1, pooled_size=3),
        "inference": InferenceConfig(**inference),
    }
    torch.manual_seed(0)
    model = MimicDet(ModelConfig(**sections, **changes), NUM_CLASSES)
    layers = [(model.refinement.objectness, 1.0), (model.student.logits, 1.0)]
    layers += [(model.refinement.deltas, 0.3), (model.student.deltas, 0.3)]
    layers += [(sampler.micro[-1], 0.3) for sampler in model.student.samplers if len(sampler.micro)]
    for layer, std in layers:
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)
    return model.eval()


def photos(num: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(height)
    return torch.randint(256, (num, 3, height, width), generator=generator, dtype=torch.uint8)


def rows(outputs: tuple[Tensor, Tensor, Tensor]) -> list[Detections]:
    """Outputs without their unused rows, which are checked to be empty, all of them last."""
    found = []
    for boxes, scores, labels in zip(*outputs, strict=True):
        assert (boxes.shape, scores.shape, labels.shape) == ((LIMIT, 4), (LIMIT,), (LIMIT,))
        assert labels.dtype == torch.int64
        num = int((labels >= 0).sum())
        assert (labels[num:] == -1).all()
        assert (scores[num:] == 0).all()
        assert (boxes[num:] == 0).all()
        assert (scores[:num].diff() <= 0).all()
        found.append({"boxes": boxes[:num], "scores": scores[:num], "labels": labels[:num]})
    return found


def assert_equal(found: list[Detections], wanted: list[Detections]) -> None:
    """The same detections up to rounding, which may swap those of almost the same score."""
    for ours, theirs in zip(found, wanted, strict=True):
        assert len(ours["scores"]) == len(theirs["scores"])
        if len(ours["scores"]) == 0:
            continue
        distance = (ours["boxes"][:, None] - theirs["boxes"]).abs().amax(-1)
        distance[ours["labels"][:, None] != theirs["labels"]] = torch.inf
        closest, match = distance.min(1)
        assert sorted(match.tolist()) == list(range(len(match)))
        assert float(closest.max()) < 3e-3  # pixels: the layouts that convolutions run in add up in other orders
        assert torch.allclose(ours["scores"], theirs["scores"][match], rtol=0, atol=1e-4)


def assert_worth_comparing(model: MimicDet, image: Tensor) -> None:
    """There are many detections, of several classes, fewer than the limit, and NMS had something to remove."""
    limits = model.config.inference
    lenient = copy.copy(model)
    lenient.config = replace(model.config, inference=replace(limits, nms_iou=1.0, max_detections=1000))
    (found,), (everything,) = model.detect([image]), lenient.detect([image])
    assert 8 <= len(found["scores"]) < LIMIT
    assert len(found["scores"]) <= len(everything["scores"]) - 8
    overlap = box_iou(found["boxes"], found["boxes"])
    assert (overlap[found["labels"][:, None] != found["labels"]] > limits.nms_iou).any()  # which NMS has to leave


def compare(model: MimicDet, run: Run) -> None:
    for num, height, width in ((1, 128, 160), (3, 96, 224), (2, 77, 101)):
        images = photos(num, height, width)
        assert_equal(rows(run(images)), model.detect(list(images)))
    assert_worth_comparing(model, photos(1, 128, 160)[0])


def by_onnxruntime(file: Path) -> Run:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        outputs = session.run(["boxes", "scores", "labels"], {"images": images.numpy()})
        boxes, scores, labels = (torch.from_numpy(np.asarray(output)) for output in outputs)
        return boxes, scores, labels

    return run


# ---- what is exported ----


@pytest.mark.parametrize("offsets", ["learned", "analytic", "analytic_learned", "none"])
@pytest.mark.parametrize("class_space", ["softmax", "sigmoid"])
@pytest.mark.parametrize("times_objectness", [False, True])
def test_the_deployed_path_detects_what_the_detector_does(
    offsets: str, class_space: str, times_objectness: bool
) -> None:
    threshold = {"softmax": 0.3, "sigmoid": 0.6}[class_space] * (0.6 if times_objectness else 1)
    model = detector(
        student={"offsets": offsets},
        class_space=class_space,
        times_objectness=times_objectness,
        score_threshold=threshold,
    )
    compare(model, Deployed(model))


def test_the_best_are_kept_where_there_are_too_many() -> None:
    model = detector(score_threshold=0.0, nms_iou=0.9, max_detections=LIMIT)
    images = photos(2, 96, 128)
    found = rows(Deployed(model)(images))
    assert [len(each["scores"]) for each in found] == [LIMIT, LIMIT]
    assert_equal(found, model.detect(list(images)))


def test_an_image_of_fewer_positions_than_are_looked_at() -> None:
    # Without NMS, which would hide a position that is taken twice.
    model = detector(topk=1000, score_threshold=0.1, nms_iou=1.0)
    images = photos(2, 24, 24)
    found = rows(Deployed(model)(images))
    for ours, theirs in zip(found, model.detect(list(images)), strict=True):
        assert 1 <= len(theirs["scores"]) <= (9 + 4 + 1) * NUM_CLASSES
        assert ours["labels"].tolist() == theirs["labels"].tolist()
        assert torch.allclose(ours["boxes"], theirs["boxes"], atol=1e-3)


def test_more_detections_allowed_than_there_can_be() -> None:
    model = detector(topk=4, score_threshold=0.0)
    images = photos(2, 64, 64)
    found = rows(Deployed(model)(images))
    assert all(1 <= len(each["scores"]) <= 4 * NUM_CLASSES for each in found)
    assert_equal(found, model.detect(list(images)))


def test_what_only_the_teacher_needs_stays_behind_and_the_model_stays_whole() -> None:
    model = detector()
    names = set(model.state_dict())
    deployed = set(Deployed(model).state_dict())
    assert names == set(model.state_dict())
    assert {name for name in names - deployed if not name.startswith("teacher.")} == {
        f"pyramid.{part}.2.{kind}" for part in ("lateral", "output") for kind in ("weight", "bias")
    }


def test_other_detectors_and_precisions_are_refused() -> None:
    config = ModelConfig(
        detector="retinanet",
        backbone=BackboneConfig(name="resnet18", width=8),
        pyramid=PyramidConfig(channels=8),
    )
    with pytest.raises(ValueError, match="found a Baseline, expected a MimicDet"):
        Deployed(Baseline(config, NUM_CLASSES))
    with pytest.raises(ValueError, match=r"found torch\.float16, expected torch\.float32"):
        Deployed(detector().half())


# ---- ONNX ----


def with_every_option() -> MimicDet:
    return detector(
        BackboneConfig(name="mobilenet_v2"),
        levels=(4, 5),
        student={"offsets": "analytic_learned"},
        class_space="sigmoid",
        times_objectness=True,
        score_threshold=0.25,
    )


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file: Path = tmp_path_factory.mktemp("onnx") / "x.onnx"
    export_onnx(with_every_option(), file, METADATA)
    return file


def test_onnx_detects_what_the_detector_does(onnx_file: Path) -> None:
    compare(with_every_option(), by_onnxruntime(onnx_file))


def test_onnx_takes_the_smallest_images(onnx_file: Path) -> None:
    model, images = with_every_option(), photos(2, 2, 40)
    assert_equal(rows(by_onnxruntime(onnx_file)(images)), model.detect(list(images)))


def test_onnx_is_sound_and_of_standard_operators_alone(onnx_file: Path) -> None:
    model = onnx.load(onnx_file)
    onnx.checker.check_model(model, full_check=True)
    assert {entry.domain for entry in model.opset_import} == {""}
    assert {node.domain for node in model.graph.node} == {""}
    assert len(model.functions) == 0
    kinds = {node.op_type for node in model.graph.node}
    assert "NonMaxSuppression" in kinds
    assert not kinds & {"Loop", "Scan", "If", "SequenceEmpty"}  # nothing goes box by box


def test_onnx_says_what_goes_in_and_what_comes_out(onnx_file: Path) -> None:
    graph = onnx.load(onnx_file).graph

    def shape(value: onnx.ValueInfoProto) -> list[str | int]:
        return [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]

    assert {value.name: shape(value) for value in graph.input} == {"images": ["batch", 3, "height", "width"]}
    assert {value.name: shape(value) for value in graph.output} == {
        "boxes": ["batch", LIMIT, 4],
        "scores": ["batch", LIMIT],
        "labels": ["batch", LIMIT],
    }


def test_onnx_carries_the_metadata_and_no_paths(onnx_file: Path) -> None:
    assert {entry.key: entry.value for entry in onnx.load(onnx_file).metadata_props} == METADATA
    assert str(Path(__file__).parents[2]).encode() not in onnx_file.read_bytes()


# ---- torch ----


@pytest.fixture(scope="module")
def torch_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file: Path = tmp_path_factory.mktemp("torch") / "x.pt2"
    export_torch(detector(), file, METADATA)
    return file


@pytest.fixture(scope="module")
def loaded(torch_file: Path) -> tuple[nn.Module, str]:
    extra = {METADATA_FILE: ""}
    program = torch.export.load(torch_file, extra_files=extra)
    return program.module(), extra[METADATA_FILE]


def test_pt2_detects_what_the_detector_does(loaded: tuple[nn.Module, str]) -> None:
    compare(detector(), loaded[0])


def test_pt2_finds_nothing_where_there_is_nothing(loaded: tuple[nn.Module, str]) -> None:
    undecided = copy.deepcopy(loaded[0])
    for parameter in undecided.parameters():
        parameter.zero_()
    for found in rows(undecided(photos(2, 64, 64))):
        assert len(found["scores"]) == 0


def test_pt2_takes_sides_from_the_smallest_it_names(loaded: tuple[nn.Module, str]) -> None:
    assert min_exported_side(detector().config.pyramid) == 33
    images = photos(1, 33, 33)
    assert_equal(rows(loaded[0](images)), detector().detect(list(images)))
    with pytest.raises(AssertionError, match=">= 33"):
        loaded[0](photos(1, 32, 64))


def test_pt2_with_all_levels_takes_sides_above_the_stride_of_the_highest(tmp_path: Path) -> None:
    model = detector(levels=(3, 7))
    export_torch(model, tmp_path / "x.pt2", METADATA)
    program = torch.export.load(tmp_path / "x.pt2").module()
    assert min_exported_side(model.config.pyramid) == 129
    for num, height, width in ((1, 129, 129), (2, 200, 160), (1, 97 * 4, 640)):
        images = photos(num, height, width)
        assert_equal(rows(program(images)), model.detect(list(images)))
    with pytest.raises(AssertionError, match=">= 129"):
        program(photos(1, 128, 160))


def test_pt2_carries_the_metadata_and_no_paths(torch_file: Path, loaded: tuple[nn.Module, str]) -> None:
    assert json.loads(loaded[1]) == METADATA
    assert str(Path(__file__).parents[2]).encode() not in torch_file.read_bytes()
