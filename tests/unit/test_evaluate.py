"""Metrics are pycocotools', whatever the scale of the images and the number of workers."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mimicdet import MimicDet, ModelConfig
from mimicdet.config import AnchorConfig, BackboneConfig, PyramidConfig, StudentConfig, TeacherConfig
from mimicdet.interface import Detector
from mimiclab.data.coco import CocoDataset, read_coco
from mimiclab.data.dataset import EvalBatches
from mimiclab.evaluate import LATENCY, detect, detections_of, evaluate, fixed_positions, preview, score
from mimiclab.latency import Latency
from mimiclab.schema import DataConfig, EvalConfig, Resize, Scenes
from mimiclab.scoring import SUMMARY, Truth

CLASSES = {3: "red", 7: "green", 20: "blue"}
SIZES = [(64, 48), (48, 64), (64, 64), (32, 64), (64, 32), (24, 64), (64, 48)]


def write(root: Path, images: list, annotations: list, categories: dict[int, str] = CLASSES) -> CocoDataset:
    """A data set of these entries; images that hold nothing are black."""
    for image in images:
        if not (root / image["file_name"]).exists():
            Image.new("RGB", (image["width"], image["height"])).save(root / image["file_name"])
    content = {
        "images": images,
        "annotations": [{"id": number, "iscrowd": 0, **a} for number, a in enumerate(annotations, start=1)],
        "categories": [{"id": number, "name": name} for number, name in categories.items()],
    }
    (root / "instances.json").write_text(json.dumps(content))
    return read_coco(root / "instances.json", root)


def image(number: int, width: int, height: int) -> dict:
    return {"id": number, "file_name": f"{number}.png", "width": width, "height": height}


@pytest.fixture(scope="module")
def painted(tmp_path_factory) -> CocoDataset:
    """Up to three rectangles in an image, each of the one primary colour that is its class, on even pixels."""
    root = tmp_path_factory.mktemp("painted")
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for index, (width, height) in enumerate(SIZES):
        number = 90 - 10 * index  # ids fall, file order is not id order
        pixels = np.zeros((height, width, 3), np.uint8)
        for channel, category in enumerate(CLASSES):
            if (index + channel) % 4 == 0:
                continue
            x, y = 2 * rng.integers(0, [width // 4, height // 4])
            w, h = 2 * rng.integers(4, [(width - x) // 2 + 1, (height - y) // 2 + 1])
            pixels[y : y + h, x : x + w, channel] = 255
            box = [int(value) for value in (x, y, w, h)]
            annotations.append({"image_id": number, "category_id": category, "bbox": box, "area": box[2] * box[3]})
        Image.fromarray(pixels).save(root / f"{number}.png")
        images.append(image(number, width, height))
    return write(root, images, annotations)


def coco_metrics(dataset: CocoDataset, rows: np.ndarray) -> dict[str, float]:
    return Truth(dataset).score(rows).metrics


class ColourDetector(Detector):
    """Answers the bounding box of each primary colour, and boxes that are wrong as often as `mistakes` says.

    The student sees blue as green where `mistakes` is above 0.
    """

    def __init__(self, mistakes: int = 0) -> None:
        super().__init__()
        self.mistakes = mistakes
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.detected: list[int] = []

    def loss_terms(self, images, targets, *, pad_to=None):
        raise NotImplementedError

    def detect(self, images, *, pad_to=None):
        self.detected.append(len(images))
        return [self._detect(image) for image in images]

    def detect_heads(self, images, *, topk, pad_to=None):
        teacher = [self._detect(image) for image in images]
        student = [dict(found) for found in teacher]
        for found in student:
            if self.mistakes:
                found["labels"] = found["labels"].clamp(max=1)
        return {"student": student, "teacher": teacher}

    def _detect(self, image):
        boxes, labels = [], []
        for label in range(3):
            rows, columns = (image[label] > 127).nonzero(as_tuple=True)
            if len(rows):
                boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
                labels.append(label)
        for _ in range(self.mistakes if image.shape[1] > image.shape[2] else 0):
            boxes.append([0, 0, image.shape[2], image.shape[1]])
            labels.append(0)
        # All of one score: the order of ties shows in the metrics.
        return {
            "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            "scores": torch.full((len(boxes),), 0.5),
            "labels": torch.tensor(labels, dtype=torch.int64),
        }


def data(short: int, long: int) -> DataConfig:
    return DataConfig(scenes=Scenes(), resize=Resize(short=short, long=long))


# ---- the metric ----


@pytest.fixture
def random_case(tmp_path) -> tuple[CocoDataset, np.ndarray]:
    """Small and medium objects of two of three classes, crowds among them, and noisy detections of all three."""
    rng = np.random.default_rng(5)
    images = [image(number, 120, 100) for number in (12, 4, 7, 30, 25, 18)]
    annotations, rows = [], []
    for entry in images[:-1]:  # the last image is empty, but not of detections
        for _ in range(6):
            x, y, w, h = (int(value) for value in rng.integers([0, 0, 6, 6], [60, 40, 60, 60]))
            category = int(rng.choice([3, 20]))
            annotations.append(
                {
                    "image_id": entry["id"],
                    "category_id": category,
                    "bbox": [x, y, w, h],
                    "area": 2 * w * h // 3,
                    "iscrowd": int(rng.random() < 0.25),
                }
            )
            for _ in range(rng.integers(0, 3)):
                noise = rng.normal(0, 0.06, 4) * [w, h, w, h]
                rows.append([entry["id"], *(np.array([x, y, w, h]) + noise), rng.random(), category])
    for _ in range(25):
        box = rng.integers([0, 0, 6, 6], [60, 40, 60, 60])
        rows.append([rng.choice([entry["id"] for entry in images]), *box, rng.random(), rng.choice(list(CLASSES))])
    return write(tmp_path, images, annotations), np.array(rows)


def by_files(annotations: Path, rows: np.ndarray, categories: list[int] | None = None) -> list[float]:
    """pycocotools' summary by its own path: an annotation file and a result file."""
    keys = ("image_id", "bbox", "score", "category_id")
    results = [dict(zip(keys, (int(r[0]), r[1:5].tolist(), r[5], int(r[6])), strict=True)) for r in rows]
    file = annotations.with_name("results.json")
    file.write_text(json.dumps(results))
    truth = COCO(str(annotations))
    scorer = COCOeval(truth, truth.loadRes(str(file)), "bbox")
    if categories is not None:
        scorer.params.catIds = categories
    scorer.evaluate()
    scorer.accumulate()
    scorer.summarize()
    return scorer.stats.tolist()


def test_metrics_are_those_of_pycocotools_by_its_own_files(random_case):
    dataset, rows = random_case

    metrics = coco_metrics(dataset, rows)

    expected = dict(zip(SUMMARY, by_files(dataset.annotations, rows), strict=True))
    for category, name in CLASSES.items():
        expected[f"AP/{name}"] = by_files(dataset.annotations, rows, [category])[0]
    assert expected["AP_large"] == expected["AR_large"] == expected["AP/green"] == -1
    assert 0.05 < expected["AP"] < 0.95
    assert any(record.iscrowd.any() for record in dataset.images)
    assert metrics == pytest.approx({name: value for name, value in expected.items() if value >= 0}, abs=1e-12)


def test_what_the_data_has_no_object_of_is_left_out(random_case):
    metrics = coco_metrics(*random_case)

    assert not {"AP_large", "AR_large", "AP/green"} & metrics.keys()
    assert {"AP", "AP_small", "AP_medium", "AR_small", "AR_medium", "AP/red", "AP/blue"} < metrics.keys()
    assert min(metrics.values()) >= 0


def truth_as_rows(dataset: CocoDataset) -> np.ndarray:
    return np.array(
        [
            [record.id, box[0], box[1], box[2] - box[0], box[3] - box[1], 0.5, dataset.category_ids[label]]
            for record in dataset.images
            for box, label in zip(record.boxes, record.labels, strict=True)
        ]
    )


def test_perfect_detections_score_1(painted):
    metrics = coco_metrics(painted, truth_as_rows(painted))

    assert metrics["AP"] == metrics["AP75"] == metrics["AR100"] == pytest.approx(1)
    assert [metrics[f"AP/{name}"] for name in CLASSES.values()] == pytest.approx([1, 1, 1])


def test_no_detections_score_0(painted):
    metrics = coco_metrics(painted, np.zeros((0, 7)))

    assert {"AP", "AR1", "AP/red"} < metrics.keys()
    assert set(metrics.values()) == {0.0}


def test_the_right_boxes_of_the_wrong_class_score_0(painted):
    rows = truth_as_rows(painted)
    rows[:, 6] = np.roll(list(CLASSES), 1)[np.searchsorted(list(CLASSES), rows[:, 6])]
    present = {(row[0], row[6]) for row in truth_as_rows(painted)}
    wrong = np.array([row for row in rows if (row[0], row[6]) not in present])

    assert coco_metrics(painted, wrong)["AP"] == 0


# ---- a whole evaluation ----


@pytest.mark.parametrize(("short", "long"), [(64, 64), (128, 128), (32, 32), (96, 128)])
def test_boxes_come_back_in_the_image_s_own_pixels(painted, short, long):
    evaluation = evaluate(ColourDetector(), painted, data(short, long), EvalConfig(batch_size=2), rank=0, world=1)

    assert len({record.width / record.height for record in painted.images}) == 6
    tolerance = 1e-4 if (short, long) != (96, 128) else 1.0  # sides that are no multiple are rounded to pixels
    np.testing.assert_allclose(evaluation.detections["student"], truth_as_rows(painted), atol=tolerance)
    if tolerance < 1:
        assert evaluation.metrics["student/AP"] == pytest.approx(1)
        assert evaluation.metrics["teacher/AP"] == pytest.approx(1)
        assert evaluation.metrics["gap/AP"] == pytest.approx(0)


def test_heads_are_scored_by_themselves(painted):
    metrics = evaluate(
        ColourDetector(mistakes=1), painted, data(64, 64), EvalConfig(batch_size=2), rank=0, world=1
    ).metrics

    assert metrics["student/AP/blue"] == 0
    assert metrics["teacher/AP/blue"] == pytest.approx(1)
    assert 0 < metrics["student/AP"] < metrics["teacher/AP"] < 1
    assert metrics["gap/AP"] == metrics["teacher/AP"] - metrics["student/AP"]


def without_latency(metrics: dict[str, float]) -> dict[str, float]:
    assert metrics[LATENCY] > 0
    return {name: value for name, value in metrics.items() if name != LATENCY}


@pytest.mark.parametrize("world", [2, 3, 5])
def test_any_dealing_of_the_images_to_workers_scores_the_same(painted, world):
    detector, config = ColourDetector(mistakes=3), EvalConfig(batch_size=2)
    alone = evaluate(detector, painted, data(64, 64), config, rank=0, world=1)

    shares = [detect(detector, painted, data(64, 64), config, rank=rank, world=world) for rank in range(world)]
    together = score(painted, shares)

    assert (world == 5) == (shares[-1] == {})  # four batches: the fifth worker has none
    assert together.metrics == without_latency(alone.metrics)
    assert together.detections.keys() == alone.detections.keys()
    for head, rows in alone.detections.items():
        np.testing.assert_array_equal(together.detections[head], rows)


def test_a_detector_answers_the_same_on_any_number_of_workers(painted):
    torch.manual_seed(0)
    detector = MimicDet(
        ModelConfig(
            backbone=BackboneConfig(name="resnet18", width=16),
            pyramid=PyramidConfig(channels=16, max_level=5),
            anchors=AnchorConfig(scale=2),
            student=StudentConfig(head_width=32, offset_channels=(8, 8)),
            teacher=TeacherConfig(num_rois=16, num_convs=1),
        ),
        len(CLASSES),
    )
    config = EvalConfig(batch_size=2, teacher_topk=10)
    alone = evaluate(detector, painted, data(64, 64), config, rank=0, world=1)

    shares = [detect(detector, painted, data(64, 64), config, rank=rank, world=3) for rank in range(3)]
    together = score(painted, shares)

    assert set(alone.detections) == {"student", "teacher", "student_topk"}
    assert all(len(rows) for rows in alone.detections.values())
    assert together.metrics == without_latency(alone.metrics)
    gap = alone.metrics["teacher/AP"] - alone.metrics["student_topk/AP"]  # on the same boxes
    assert alone.metrics["gap/AP"] == gap
    for head, rows in alone.detections.items():
        np.testing.assert_array_equal(together.detections[head], rows)


def test_detections_of_one_image_are_its_own(painted):
    rows = truth_as_rows(painted)
    for record in painted.images:
        found = detections_of(rows, record.id, painted.category_ids)
        np.testing.assert_array_equal(found["boxes"], record.boxes)
        np.testing.assert_array_equal(found["labels"], record.labels)
        assert found["scores"].tolist() == [0.5] * len(record.labels)
    assert detections_of(rows, 12345, painted.category_ids)["boxes"].shape == (0, 4)


def test_latency_is_that_of_single_images_and_of_few_batches(painted):
    detector = ColourDetector()

    metrics = evaluate(detector, painted, data(64, 64), EvalConfig(batch_size=2), rank=0, world=1).metrics

    assert detector.detected == [1] * (1 + 4)  # a warm-up, and the first image of each of four batches
    assert 0 < metrics[LATENCY] < 1000
    timed = Latency(detector)
    batch = EvalBatches(painted, short=64, long=64, batch_size=2)[0]
    detector.detected.clear()
    assert len(list(timed.watch([batch] * 50))) == 50
    assert len(detector.detected) == 1 + 32


def test_a_slow_detector_has_its_latency(painted):
    class Slow(ColourDetector):
        def detect(self, images, *, pad_to=None):
            time.sleep(0.05)
            return super().detect(images, pad_to=pad_to)

    metrics = evaluate(Slow(), painted, data(64, 64), EvalConfig(batch_size=4), rank=0, world=1).metrics

    assert 50 <= metrics[LATENCY] < 500


def test_a_preview_shows_what_an_evaluation_would(painted):
    config = EvalConfig(batch_size=1, num_pictures=3)
    whole = evaluate(ColourDetector(), painted, data(64, 64), config, rank=0, world=1).detections

    found = preview(ColourDetector(), painted, data(64, 64), config)

    ids = [painted.images[position].id for position in fixed_positions(painted, 3)]
    assert len(ids) == 3
    for head in ("student", "teacher"):
        expected = whole[head][np.isin(whole[head][:, 0], ids)]
        np.testing.assert_array_equal(found[head], expected)
    assert preview(ColourDetector(), painted, data(64, 64), EvalConfig(num_pictures=0)) == {}
