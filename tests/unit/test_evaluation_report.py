"""What a run keeps of an evaluation: tables that can be checked by hand, figures that are drawn, the worst images."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from handmade import Box, rows, truth
from PIL import Image

from mimiclab.data.coco import CocoDataset
from mimiclab.evaluate import Evaluation, score
from mimiclab.evaluation_report import curves_table, log_report, validation_pictures
from mimiclab.scoring import Truth
from mimiclab.tracking.protocol import MemoryTracker, check_picture

RED: Box = (0, 10, 10, 40, 40)
BLUE: Box = (1, 10, 10, 40, 40)
FAR: Box = (0, 60, 60, 30, 30)
LOW = 0.29
"""A score that is too low to be looked at."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    """Five images; 1.png holds a crowd besides, 4.png nothing."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(5):
        Image.new("RGB", (100, 100), (40, 40 * number, 90)).save(folder / f"{number}.png")
    return truth([RED, FAR], [RED, (0, 60, 0, 39, 39)], [BLUE], [RED, BLUE], [], crowds=[3], folder=folder)


@pytest.fixture(scope="module")
def evaluation(dataset: CocoDataset) -> Evaluation:
    student = rows(
        (0, RED, 0.9),  # and FAR is missed
        (1, RED, 0.9),
        (1, (0, 65, 5, 20, 20), 0.8),  # in the crowd: neither right nor wrong
        (2, (2, *BLUE[1:]), 0.7),  # as c2
        (2, FAR, 0.6),
        (3, RED, LOW),  # not looked at: both objects of the image are missed
    )
    teacher = rows((0, RED, 0.9), (0, FAR, 0.9), (1, RED, 0.9), (2, BLUE, 0.9), (3, RED, 0.8), (3, BLUE, 0.8))
    return score(dataset, [{"student": student, "student_topk": student, "teacher": teacher}])


@pytest.fixture(scope="module")
def tracker(dataset: CocoDataset, evaluation: Evaluation) -> MemoryTracker:
    memory = MemoryTracker()
    log_report(memory, dataset, evaluation, num_worst=2)
    return memory


def table(tracker: MemoryTracker, name: str) -> list[dict]:
    content = json.loads(tracker.files[f"evaluation/{name}.json"])
    return [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]


# ---- counts ----


def test_the_heads_of_the_experiment_are_analysed(evaluation: Evaluation) -> None:
    assert evaluation.analyses.keys() == {"student", "teacher"}
    errors = {name: value for name, value in evaluation.metrics.items() if "/errors/" in name}
    assert len(errors) == 2 * 6
    assert errors["student/errors/missed"] > 0
    assert {value for name, value in errors.items() if name.startswith("teacher")} == {0.0}


def test_objects_are_confused_with_what_was_detected_in_their_place(evaluation: Evaluation) -> None:
    student = evaluation.analyses["student"].confusion
    expected = np.zeros((4, 4), int)
    expected[0, 0] = 2  # two RED; of the other two, and of FAR, one each is not seen
    expected[0, 3] = 2
    expected[1, 2] = 1
    expected[1, 3] = 1
    expected[3, 0] = 1  # FAR on 2.png
    np.testing.assert_array_equal(student, expected)
    np.testing.assert_array_equal(evaluation.analyses["teacher"].confusion, np.diag([4, 2, 0, 0]))


def test_images_are_rated_by_f1_and_the_worst_come_first(evaluation: Evaluation) -> None:
    student = evaluation.analyses["student"]
    assert student.f1() == pytest.approx([2 / 3, 1, 0, 0, 1])
    assert (student.found.tolist(), student.missed.tolist()) == ([1, 1, 0, 0, 0], [1, 0, 1, 2, 0])
    assert student.false.tolist() == [0, 0, 2, 0, 0]
    # Image 2 has three mistakes, image 3 two; what is perfect is not among the worst.
    assert student.worst(9) == [2, 3, 0]
    assert evaluation.analyses["teacher"].worst(9) == []


def confused_by_loops(dataset: CocoDataset, found: np.ndarray) -> np.ndarray:
    """Best first, a detection takes the free object of its class that it overlaps most, by half or more; those left
    without then take, of the objects that are left, one of any class."""
    columns, num = dataset.columns, len(dataset.classes)
    counts = np.zeros((num + 1, num + 1), int)
    for position, image in enumerate(columns.ids):
        free = list(range(columns.offsets[position], columns.offsets[position + 1]))
        own = found[found[:, 0] == image]
        left = list(own[np.argsort(-own[:, 5], kind="stable")])
        for any_class in (False, True):
            for row in list(left):
                label = dataset.category_ids.index(int(row[6]))
                overlaps = {
                    n: overlap(row[1:5], columns.boxes[n]) for n in free if any_class or columns.labels[n] == label
                }
                best = max(overlaps, key=lambda n: overlaps[n], default=None)
                if best is not None and overlaps[best] >= 0.5:
                    counts[columns.labels[best], label] += 1
                    free.remove(best)
                    left = [other for other in left if other is not row]
        for row in left:
            counts[num, dataset.category_ids.index(int(row[6]))] += 1
        for n in free:
            counts[columns.labels[n], num] += 1
    return counts


def overlap(xywh: np.ndarray, xyxy: np.ndarray) -> float:
    corner = np.minimum(xywh[:2] + xywh[2:], xyxy[2:]) - np.maximum(xywh[:2], xyxy[:2])
    common = float(np.prod(np.maximum(corner, 0)))
    return common / (xywh[2] * xywh[3] + float(np.prod(xyxy[2:] - xyxy[:2])) - common)


def test_the_confusion_of_many_boxes_is_that_of_loops() -> None:
    rng = np.random.default_rng(3)

    def box() -> Box:
        return (int(rng.integers(3)), *(float(v) for v in (*rng.integers(0, 50, 2), *rng.integers(10, 45, 2))))

    images = [[box() for _ in range(rng.integers(0, 5))] for _ in range(30)]
    dataset = truth(*images)
    found = rows(
        *((i, (int(rng.integers(3)), *(np.array(b[1:]) + rng.normal(0, 3, 4))), 0.3 + 0.7 * float(rng.random()))
          for i, boxes in enumerate(images) for b in boxes for _ in range(rng.integers(0, 3))),
        *((i, box(), 0.3 + 0.7 * float(rng.random())) for i in range(30)),
    )  # fmt: skip

    confusion = score(dataset, [{"student": found}]).analyses["student"].confusion

    np.testing.assert_array_equal(confusion, confused_by_loops(dataset, found))
    assert (confusion[:3, :3] > 0).all()


# ---- tables ----


def test_the_tables_say_what_was_counted(tracker: MemoryTracker, evaluation: Evaluation) -> None:
    (row,) = (r for r in table(tracker, "classes") if (r["head"], r["class"]) == ("student", "c0"))
    assert (row["objects"], row["missed"], row["background"]) == (4, 2, 1)
    assert row["AP"] == round(evaluation.metrics["student/AP/c0"], 4)
    (absent,) = (r for r in table(tracker, "classes") if (r["head"], r["class"]) == ("student", "c2"))
    assert absent["AP"] is None
    assert absent["wrong_class"] == 1

    missed = next(r for r in table(tracker, "errors") if (r["head"], r["error"]) == ("student", "missed"))
    assert missed["number"] == 3
    assert missed["AP50 lost"] == round(evaluation.metrics["student/errors/missed"], 4)

    confused = next(r for r in table(tracker, "confusion") if r["detected as"] == "c2")
    assert (confused["head"], confused["object"], confused["number"]) == ("student", "c1", 1)
    assert confused["share of the object's class"] == 0.5


def test_the_first_numbers_of_a_table_are_what_runs_are_compared_by(tracker: MemoryTracker) -> None:
    firsts = {}
    for name in ("classes", "precision_recall", "errors", "worst"):
        row = table(tracker, name)[0]
        firsts[name] = next(column for column, value in row.items() if not isinstance(value, str))
    assert firsts == {"classes": "AP", "precision_recall": "AP", "errors": "AP50 lost", "worst": "F1"}


def test_curves_are_pycocotools_and_their_mean_is_the_ap(dataset: CocoDataset, evaluation: Evaluation) -> None:
    curves = {(r[0], r[1], r[3]): r for r in curves_table(evaluation.analyses, dataset.classes).rows}
    for head in ("student", "teacher"):
        scored = Truth(dataset).score(evaluation.detections[head])
        assert curves[head, "mean", 0.5][2] == pytest.approx(scored.metrics["AP50"], abs=1e-4)
        assert curves[head, "mean", 0.75][2] == pytest.approx(scored.metrics["AP75"], abs=1e-4)
        assert curves[head, "c0", 0.5][4:] == [round(float(p), 4) for p in scored.precision[0, ::10, 0]]
    assert not [name for _, name, _ in curves if name == "c2"]


def test_the_worst_images_are_named_rated_and_shown(tracker: MemoryTracker) -> None:
    worst = table(tracker, "worst")
    rated = [(row["image"], row["F1"], row["missed"], row["false"]) for row in worst]
    assert rated == [("2.png", 0, 1, 2), ("3.png", 0, 2, 0)]
    for row, colour in zip(worst, ((40, 80, 90), (40, 120, 90)), strict=True):
        picture = Image.open(io.BytesIO(tracker.files[row["picture"]]))
        assert picture.width == 3 * 320 + 2 * 4  # ground truth, student, teacher
        assert picture.getpixel((300, 320)) == colour
    assert not [name for name in tracker.files if name.endswith("worst/3.png")]


@pytest.mark.slow
def test_no_picture_of_an_earlier_evaluation_stays_among_the_worst(dataset: CocoDataset) -> None:
    tracker = MemoryTracker()
    log_report(tracker, dataset, score(dataset, [{"student": rows()}]), num_worst=4)
    before = [tracker.files[f"evaluation/worst/{place}.png"] for place in range(1, 5)]
    found = rows((0, RED, 0.9), (0, FAR, 0.9), (1, RED, 0.9), (2, BLUE, 0.9))
    log_report(tracker, dataset, score(dataset, [{"student": found}]), num_worst=4)

    assert [row["picture"] for row in table(tracker, "worst")] == ["evaluation/worst/1.png"]
    others = [tracker.files[f"evaluation/worst/{place}.png"] for place in range(2, 5)]
    assert len(set(others)) == 1
    assert others[0] not in before
    with Image.open(io.BytesIO(others[0])) as picture:
        assert len(picture.getcolors()) > 2, "it says why it is empty"


def test_images_of_like_or_long_names_have_pictures_of_their_own(tmp_path: Path) -> None:
    files = ("cam1/000001.png", "cam2/000001.png", "猫.png", "狗.png", f"{'y' * 140}.png", "fine-1.png")
    for number, file in enumerate(files):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        Image.new("RGB", (100, 100), (40, 40 * number, 90)).save(tmp_path / file)
    dataset = truth(*[[RED]] * len(files), folder=tmp_path, files=files)

    pictures = validation_pictures(dataset, {"student": rows()}, len(files))

    colours = [picture.getpixel((300, 320)) for picture in pictures.values()]
    assert colours == [(40, 40 * number, 90) for number in range(len(files))]
    for name in pictures:
        check_picture(f"validation/{name}", 0)
    assert list(pictures)[-1] == "fine-1"
    assert list(validation_pictures(dataset, {}, 2)) == ["000001", "fine-1"]


# ---- figures ----


@pytest.mark.parametrize("name", ["precision_recall", "errors", "confusion"])
def test_figures_are_drawn(tracker: MemoryTracker, name: str) -> None:
    with Image.open(io.BytesIO(tracker.files[f"evaluation/{name}.png"])) as figure:
        pixels = np.asarray(figure.convert("RGB")).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) > 50
    assert (pixels == 255).all(1).mean() > 0.4


@pytest.mark.slow
def test_one_head_many_classes_and_nothing_found_are_drawn_too(tmp_path: Path) -> None:
    for num_classes, found in ((1, []), (30, [(0, RED, 0.9)])):
        dataset = truth([RED], classes=num_classes, folder=tmp_path)
        Image.new("RGB", (100, 100)).save(tmp_path / "0.png")
        evaluation = score(dataset, [{"student": rows(*found)}])
        tracker = MemoryTracker()

        log_report(tracker, dataset, evaluation, num_worst=8)

        assert len([name for name in tracker.files if name.endswith(".png")]) == 3 + 8
