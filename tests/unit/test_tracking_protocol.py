import json
import subprocess
import sys
import time

import pytest
from PIL import Image

from mimiclab.tracking.protocol import (
    MemoryTracker,
    Row,
    Table,
    Tracker,
    is_measured,
    make_rows,
)


def test_nothing_heavy_is_loaded_before_it_is_needed() -> None:
    modules = ", ".join(f"mimiclab.tracking.{name}" for name in ("protocol", "writer", "runs", "ui"))
    code = f"import sys, {modules}; print({{'mlflow', 'numpy', 'requests'}} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_rows_carry_the_time_and_survive_json() -> None:
    before = time.time_ns() // 1_000_000
    rows = make_rows(3, {"train/loss": 0.1, "student/AP": float("inf")})
    assert [(row.key, row.value, row.step) for row in rows] == [
        ("train/loss", 0.1, 3),
        ("student/AP", float("inf"), 3),
    ]
    assert before <= rows[0].timestamp_ms <= time.time_ns() // 1_000_000
    assert [Row(*fields) for fields in json.loads(json.dumps(rows))] == rows


@pytest.mark.parametrize("key", ["", "a b(c)", "/a", "a//b", "../a", "a/", "a" * 251])
def test_a_key_that_mlflow_would_refuse_is_refused_at_once(key: str) -> None:
    with pytest.raises(ValueError, match="metric key"):
        make_rows(0, {key: 1.0})


def test_a_step_may_have_many_metrics_but_not_be_negative() -> None:
    assert len(make_rows(0, {f"m{i}": 0.0 for i in range(2500)})) == 2500
    with pytest.raises(ValueError, match="step is -1"):
        make_rows(-1, {"a": 0.0})


def test_memory_keeps_one_point_per_step_and_the_first_picture() -> None:
    tracker = MemoryTracker()
    as_tracker: Tracker = tracker
    for step in (1, 2, 3, 2, 3, 4):
        as_tracker.log_metrics(step, {"loss": step / 10})
    as_tracker.log_metrics(2, {"student/AP": 0.5})
    assert tracker.history("loss") == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]
    assert tracker.history("student/AP") == [(2, 0.5)]
    as_tracker.log_picture("val/a", 0, Image.new("RGB", (1, 1), "red"))
    as_tracker.log_picture("val/a", 0, Image.new("RGB", (1, 1), "blue"))
    assert tracker.pictures["val/a", 0].getpixel((0, 0)) == (255, 0, 0)
    assert as_tracker.unsent() == as_tracker.close(0) == []
    with pytest.raises(ValueError, match="picture key"):
        as_tracker.log_picture("val+a", 0, Image.new("RGB", (1, 1)))


def test_what_is_measured_is_told_apart_from_what_is_computed() -> None:
    measured = ("train/images_per_s", "train/memory_mb", "student/latency_ms", "run/restarts", "system/a/cpu")
    computed = ("train/loss", "student/AP", "student/errors/missed", "train/lr", "epoch")
    assert all(is_measured(key) for key in measured)
    assert not any(is_measured(key) for key in computed)


def test_a_table_is_json_that_every_reader_takes() -> None:
    tracker = MemoryTracker()
    tracker.log_table("a/b.json", Table(("class", "AP"), [("cell", 0.5), ("none", None)]))
    tracker.set_tags({"a": "b"})
    assert json.loads(tracker.files["a/b.json"]) == {
        "columns": ["class", "AP"],
        "data": [["cell", 0.5], ["none", None]],
    }
    assert tracker.tags == {"a": "b"}
    for name in ("/a.png", "../a.png", "a~b.png", "größe.png"):
        with pytest.raises(ValueError, match="file name"):
            tracker.log_file(name, b"")
