"""AP over resampled images is what pycocotools gives for real copies of them."""

import contextlib
import io
import json
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mimiclab.compare.bootstrap import Floats, _needed, paired, precisions, resamples
from mimiclab.compare.disagreement import disagreements
from mimiclab.compare.matches import ClassMatches, Matches, match
from mimiclab.data.coco import CocoDataset, coco_ground_truth, read_coco
from mimiclab.scoring import Detections

CLASSES = {3: "red", 7: "green", 20: "blue", 21: "never"}
NUM_IMAGES = 9


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    """Objects of three of four classes, crowds among them; one class is in two images only, one image is empty."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(3)
    Image.new("RGB", (120, 100)).save(root / "same.png")
    images = [
        {"id": int(number), "file_name": "same.png", "width": 120, "height": 100}
        for number in rng.permutation(50)[:NUM_IMAGES]
    ]
    annotations = []
    for position, image in enumerate(images[:-1]):
        for _ in range(5):
            x, y, w, h = (int(value) for value in rng.integers([0, 0, 6, 6], [60, 40, 60, 60]))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": int(rng.choice([3, 7, 20] if position < 2 else [3, 20])),
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": int(rng.random() < 0.2),
                }
            )
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in CLASSES.items()],
    }
    (root / "instances.json").write_text(json.dumps(content))
    return read_coco(root / "instances.json", root)


def detect(dataset: CocoDataset, noise: float, seed: int) -> Detections:
    """Noisy boxes near the objects, some twice, and some anywhere; no two have the same score."""
    rng = np.random.default_rng(seed)
    rows = []
    for annotation in coco_ground_truth(dataset)["annotations"]:
        for _ in range(rng.integers(0, 3)):
            box = np.array(annotation["bbox"]) * (1 + rng.normal(0, noise, 4))
            rows.append([annotation["image_id"], *box, 0, annotation["category_id"]])
    for image in dataset.columns.ids:
        for _ in range(4):
            box = rng.integers([0, 0, 6, 6], [60, 40, 60, 60])
            rows.append([image, *box, 0, rng.choice(list(CLASSES))])
    detections = np.array(rows, dtype=np.float64)
    detections[:, 5] = rng.permutation(len(rows)) / len(rows)
    return detections[np.argsort(detections[:, 0], kind="stable")]


@pytest.fixture(scope="module")
def found(dataset: CocoDataset) -> Detections:
    return detect(dataset, 0.08, 1)


def by_copies(dataset: CocoDataset, detections: Detections, counts: list[int]) -> Floats:
    """(C, T) average precisions by pycocotools, on a data set with each image as often as counted; NaN for none."""
    truth = coco_ground_truth(dataset)
    images, annotations, results = [], [], []
    for image, count in zip(truth["images"], counts, strict=True):
        for _ in range(count):
            number = len(images) + 1
            images.append({**image, "id": number})
            for annotation in truth["annotations"]:
                if annotation["image_id"] == image["id"]:
                    annotations.append({**annotation, "id": len(annotations) + 1, "image_id": number})
            for row in detections[detections[:, 0] == image["id"]]:
                entry = {"image_id": number, "bbox": row[1:5].tolist(), "score": row[5], "category_id": int(row[6])}
                results.append(entry)
    coco = COCO()
    coco.dataset = {**truth, "images": images, "annotations": annotations}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        scorer = COCOeval(coco, coco.loadRes(results), "bbox")
        scorer.evaluate()
        scorer.accumulate()
    precision = scorer.eval["precision"][:, :, :, 0, -1]
    return np.where(precision[:, 0] < 0, np.nan, precision.mean(1)).T


# ---- average precision ----


def test_of_all_images_it_is_that_of_pycocotools(dataset: CocoDataset, found: Detections) -> None:
    answer = precisions(match(dataset, found), np.ones((1, NUM_IMAGES), np.int32))

    expected = by_copies(dataset, found, [1] * NUM_IMAGES)
    assert np.isnan(expected[3]).all()
    assert 0.05 < np.nanmin(expected.mean(1)) < np.nanmax(expected.mean(1)) < 0.95
    np.testing.assert_allclose(answer[0], expected, atol=1e-12, rtol=0)


def test_of_resampled_images_it_is_that_of_pycocotools_on_copies(dataset: CocoDataset, found: Detections) -> None:
    weights = np.concatenate(list(resamples(NUM_IMAGES, 10, seed=4)))
    # A class or all objects may be gone, and an image be there many times.
    weights = np.concatenate([weights, np.eye(NUM_IMAGES, dtype=np.int32)[:2] * 7])

    answer = precisions(match(dataset, found), weights)

    expected = np.stack([by_copies(dataset, found, row.tolist()) for row in weights])
    assert np.isnan(expected[:, 1]).any()
    assert not np.isnan(expected[:, 1]).all()
    np.testing.assert_allclose(answer, expected, atol=1e-12, rtol=0)


def test_a_recall_is_reached_where_the_share_as_a_double_reaches_it() -> None:
    totals = np.arange(1, 400)

    needed = _needed(totals)

    # 7 of 100 reach 0.07, although 0.07 * 100 is more than 7.
    assert needed[99, 7] == 7
    for total, row in zip(totals, needed, strict=True):
        shares = np.arange(total + 1) / total
        np.testing.assert_array_equal(row, np.searchsorted(shares, np.linspace(0, 1, 101)))


def test_nothing_found_has_a_precision_of_0(dataset: CocoDataset) -> None:
    answer = precisions(match(dataset, np.zeros((0, 7))), np.ones((1, NUM_IMAGES), np.int32))

    assert (answer[0, :3] == 0).all()
    assert np.isnan(answer[0, 3]).all()


@pytest.mark.parametrize("chunk", [1, 50, 1 << 22])
def test_it_is_the_same_in_parts_of_any_size(
    dataset: CocoDataset, found: Detections, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    matches = match(dataset, found)
    weights = np.concatenate(list(resamples(NUM_IMAGES, 20, seed=0)))
    expected = precisions(matches, weights)

    monkeypatch.setattr("mimiclab.compare.bootstrap._CHUNK", chunk)

    np.testing.assert_array_equal(precisions(matches, weights), expected)
    np.testing.assert_array_equal(np.concatenate(list(resamples(NUM_IMAGES, 20, seed=0))), weights)


# ---- the interval ----


def test_each_resample_has_as_many_images_as_there_are() -> None:
    weights = np.concatenate(list(resamples(7, 500, seed=1)))

    assert weights.shape == (500, 7)
    assert (weights.sum(1) == 7).all()
    assert weights.mean(0) == pytest.approx(np.ones(7), abs=0.15)


def test_differences_and_intervals_are_those_of_the_resamples(dataset: CocoDataset, found: Detections) -> None:
    better = detect(dataset, 0.01, 1)

    [answer] = paired(match(dataset, found), [match(dataset, better)], dataset.classes, num=12, seed=5)

    whole = [by_copies(dataset, rows, [1] * NUM_IMAGES) for rows in (found, better)]
    drawn = np.concatenate(list(resamples(NUM_IMAGES, 12, seed=5)))
    runs = [np.stack([by_copies(dataset, rows, row.tolist()) for row in drawn]) for rows in (found, better)]
    for name, part in {"AP": np.s_[..., :], "AP50": np.s_[..., :1], "AP75": np.s_[..., 5:6]}.items():
        values = [np.nanmean(each[part], axis=(-2, -1)) for each in (*whole, *runs)]
        low, high = np.quantile(values[3] - values[2], [0.025, 0.975])
        difference = answer.metrics[name]
        assert (difference.value, difference.low, difference.high) == pytest.approx((values[1] - values[0], low, high))
    reds = [each[..., 0, :].mean(-1) for each in (*whole, *runs)]
    assert answer.metrics["AP/red"].value == pytest.approx(reds[1] - reds[0])
    assert answer.metrics["AP/red"].high == pytest.approx(np.quantile(reds[3] - reds[2], 0.975))
    assert answer.metrics.keys() == {"AP", "AP50", "AP75", "AP/red", "AP/green", "AP/blue"}
    assert (answer.num_images, answer.num_resamples) == (NUM_IMAGES, 12)


def test_a_run_does_not_differ_from_itself_in_any_resample(dataset: CocoDataset, found: Detections) -> None:
    matches = match(dataset, found)

    [answer] = paired(matches, [matches], dataset.classes, num=50)

    assert {(each.value, each.low, each.high) for each in answer.metrics.values()} == {(0, 0, 0)}


def test_every_run_is_paired_as_it_would_be_alone(dataset: CocoDataset, found: Detections) -> None:
    first, second, third = (match(dataset, each) for each in (found, detect(dataset, 0.01, 1), detect(dataset, 0.2, 2)))

    together = paired(first, [second, third], dataset.classes, num=30, seed=2)

    assert together[1] == paired(first, [third], dataset.classes, num=30, seed=2)[0]
    assert together[0] != together[1]


def test_another_seed_is_another_interval_of_the_same_difference(dataset: CocoDataset, found: Detections) -> None:
    pair = match(dataset, found), match(dataset, detect(dataset, 0.03, 1))

    [one], [again], [other] = (paired(pair[0], [pair[1]], dataset.classes, num=30, seed=seed) for seed in (0, 0, 1))

    assert one == again
    assert one.metrics["AP"].value == other.metrics["AP"].value
    assert one.metrics["AP"].low != other.metrics["AP"].low


def made_up(num_images: int, num_classes: int, rng: np.random.Generator) -> Matches:
    """100 detections in every image."""
    classes = []
    for _ in range(num_classes):
        num = num_images * 100 // num_classes
        right = rng.random((10, num)) < 0.05
        objects = rng.poisson(7 / num_classes, num_images)
        images = rng.integers(0, num_images, num).astype(np.int32)
        classes.append(ClassMatches(images, np.sort(rng.random(num))[::-1], right, ~right & False, objects))
    return Matches(tuple(classes), np.zeros(0))


def test_a_thousand_resamples_of_80_images_take_about_a_second() -> None:
    rng = np.random.default_rng(0)
    first, second = made_up(80, 3, rng), made_up(80, 3, rng)

    started = time.process_time()
    paired(first, [second], ["a", "b", "c"], num=1000)

    assert time.process_time() - started < 5  # about 1 where nothing else runs


# ---- where runs disagree ----


def test_images_are_ranked_by_what_only_some_runs_found_and_by_wrong_detections(tmp_path: Path) -> None:
    Image.new("RGB", (100, 100)).save(tmp_path / "x.png")
    content = {
        "images": [{"id": n, "file_name": "x.png", "width": 100, "height": 100} for n in (1, 2, 3, 4)],
        "annotations": [
            {"id": n, "image_id": image, "category_id": 1, "bbox": [left, 0, 20, 20], "area": 400, "iscrowd": crowd}
            for n, (image, left, crowd) in enumerate([(1, 0, 0), (1, 50, 0), (2, 0, 0), (3, 0, 0), (3, 50, 1)], start=1)
        ],
        "categories": [{"id": 1, "name": "disk"}],
    }
    (tmp_path / "x.json").write_text(json.dumps(content))
    dataset = read_coco(tmp_path / "x.json", tmp_path)

    def run(*boxes: tuple[int, int, float]) -> Matches:
        return match(dataset, np.array([[image, left, 0, 20, 20, score, 1] for image, left, score in boxes], float))

    # In image 1 each finds another object; in 2 both find the object, the second with a score that is not shown;
    # in 3 the second has two wrong ones, and both lie on the crowd; in 4 both are wrong.
    first = run((1, 0, 0.9), (2, 0, 0.9), (3, 0, 0.9), (3, 50, 0.9), (4, 0, 0.9))
    second = run(
        (1, 50, 0.9), (2, 0, 0.2), (3, 0, 0.9), (3, 50, 0.8), (3, 75, 0.5), (3, 78, 0.4), (3, 77, 0.6), (4, 9, 0.9)
    )

    ranked = disagreements(dataset.columns, [first, second], 0.3, 10)

    said = [(int(dataset.columns.ids[e.position]), e.num_objects, e.num_disputed, e.found, e.wrong) for e in ranked]
    assert said == [
        (3, 1, 0, (1, 1), (0, 3)),
        (1, 2, 2, (1, 1), (0, 0)),
        (2, 1, 1, (1, 0), (0, 0)),
    ]
    assert disagreements(dataset.columns, [first, second], 0.3, 1) == ranked[:1]
    assert [e.found for e in disagreements(dataset.columns, [first, second], 0.1, 10)][-1] == (1, 1)
