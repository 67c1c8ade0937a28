"""Every scorer says what pycocotools says, box by box, where most classes are on few images."""

import contextlib
import io
import sys

import numpy as np
import pytest
from handmade import Box, rows, truth
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mimiclab.data.coco import CocoDataset, coco_ground_truth
from mimiclab.errors import UserError
from mimiclab.pairs import PairScorer
from mimiclab.scoring import SUMMARY, Truth

CLASSES = 6


@pytest.fixture(scope="module")
def case() -> tuple[CocoDataset, np.ndarray]:
    """Objects of two classes an image, crowds among them; detections of all, with ties, and 130 of one class on one."""
    rng = np.random.default_rng(3)
    objects: list[list[Box]] = []
    found: list[tuple[int, Box, float]] = []
    for image in range(12):
        boxes = [_box(rng, int(label)) for label in rng.choice(CLASSES, 2, replace=False) for _ in range(3)]
        objects.append(boxes)
        near = [(label, *(np.array(xywh) + rng.normal(0, 3, 4)).clip(2, 90)) for label, *xywh in boxes * 2]
        anywhere = [_box(rng, int(label)) for label in rng.integers(CLASSES, size=20)]
        found += [(image, box, round(float(rng.random()), 1)) for box in [*near, *anywhere]]
    found += [(4, _box(rng, 5), float(rng.random())) for _ in range(130)]
    return truth(*objects, classes=CLASSES, crowds=(1, 7, 30)), rows(*found)


def _box(rng: np.random.Generator, label: int) -> Box:
    x, y, width, height = rng.uniform([0, 0, 5, 5], [40, 40, 60, 60])
    return label, float(x), float(y), float(width), float(height)


def evaluated(kind: type[COCOeval], dataset: CocoDataset, detections: np.ndarray) -> COCOeval:
    with contextlib.redirect_stdout(io.StringIO()):
        objects = COCO()
        objects.dataset = coco_ground_truth(dataset)
        objects.createIndex()
        scorer = kind(objects, objects.loadRes(detections), "bbox")
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return scorer


def test_pairs_without_objects_are_answered_as_pycocotools_does(case: tuple[CocoDataset, np.ndarray]) -> None:
    ours, theirs = (evaluated(kind, *case) for kind in (PairScorer, COCOeval))

    assert [each is None for each in ours.evalImgs] == [each is None for each in theirs.evalImgs]
    answered = [pair for pair in zip(ours.evalImgs, theirs.evalImgs, strict=True) if pair[0] is not None]
    assert sum(not own["gtIds"] for own, _ in answered) > len(answered) / 2
    for own, expected in answered:
        assert own.keys() == expected.keys()
        for key, value in expected.items():
            np.testing.assert_array_equal(own[key], value, err_msg=key)
    for key in ("precision", "recall", "scores"):
        np.testing.assert_array_equal(ours.eval[key], theirs.eval[key])
    assert ours.stats.tolist() == theirs.stats.tolist()


def test_the_faster_scorer_gives_the_same_numbers_and_matches(case: tuple[CocoDataset, np.ndarray]) -> None:
    dataset, detections = case
    expected = Truth(dataset).score(detections)
    found = Truth(dataset, "faster-coco-eval").score(detections)

    assert set(SUMMARY) - {"AP_large", "AR_large"} < expected.metrics.keys()
    assert 0.05 < expected.metrics["AP"] < 0.95
    assert found.metrics == pytest.approx(expected.metrics, abs=1e-12)
    np.testing.assert_allclose(found.precision, expected.precision, atol=1e-12)
    np.testing.assert_array_equal(found.matched, expected.matched)
    np.testing.assert_array_equal(found.counted, expected.counted)
    assert not found.counted.all()


def test_a_scorer_that_is_not_installed_is_named(
    case: tuple[CocoDataset, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(UserError, match=r"eval\.scorer: .*expected mimiclab\[fast-eval\]"):
        Truth(case[0], "faster-coco-eval")
