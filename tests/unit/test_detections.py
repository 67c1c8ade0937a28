"""Detections come back from a run's folder as they were, whatever they were."""

from pathlib import Path

import numpy as np
import pytest
from ended import detect, write_data

from mimiclab.data.pack import pack
from mimiclab.data.parallel import in_threads
from mimiclab.data.shards import read_packed
from mimiclab.detections import DETECTIONS, read_detections, write_detections
from mimiclab.errors import UserError
from mimiclab.storage import Storage


def test_they_are_read_back_bit_for_bit_in_their_order(tmp_path: Path) -> None:
    dataset = write_data(tmp_path)
    heads = {"student": detect(dataset, 0.5, 1), "none": np.zeros((0, 7)), "teacher": detect(dataset, 0.9, 2)}
    heads["student"][3, 0] = 2**53 - 1  # an image id that float32 does not hold

    write_detections(Storage(tmp_path), heads, step=7, content="abc")
    kept = read_detections(Storage(tmp_path))

    assert kept is not None
    assert (kept.step, kept.content) == (7, "abc")
    assert list(kept.heads) == list(heads)
    for name, rows in heads.items():
        np.testing.assert_array_equal(kept.heads[name], rows)


def test_a_better_evaluation_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    for step in (5, 9):
        write_detections(Storage(tmp_path), {"student": np.full((step, 7), 1.0)}, step=step, content="abc")

    kept = read_detections(Storage(tmp_path))

    assert kept is not None
    assert kept.step == len(kept.heads["student"]) == 9


def test_a_run_that_was_never_evaluated_keeps_none(tmp_path: Path) -> None:
    assert read_detections(Storage(tmp_path / "missing")) is None


@pytest.mark.parametrize("damage", [lambda content: content[:-40], lambda _: b"", lambda _: b"PAR1 no, text PAR1"])
def test_a_damaged_file_is_named(tmp_path: Path, damage) -> None:
    write_detections(Storage(tmp_path), {"student": np.ones((3, 7))}, step=1, content="abc")
    file = tmp_path / DETECTIONS
    file.write_bytes(damage(file.read_bytes()))

    with pytest.raises(UserError, match=r"detections\.parquet: found a damaged file .*, expected detections$"):
        read_detections(Storage(tmp_path))


def test_another_parquet_file_is_no_detections(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"a": [1]}), tmp_path / DETECTIONS)

    with pytest.raises(UserError, match="found a damaged file"):
        read_detections(Storage(tmp_path))


def test_a_set_of_images_is_known_by_the_same_hash_packed_or_not(tmp_path: Path) -> None:
    dataset = write_data(tmp_path)
    pack(dataset, str(tmp_path / "packed"), run=in_threads(1))

    assert read_packed(str(tmp_path / "packed")).columns.digest() == dataset.columns.digest()
    assert write_data(tmp_path, "other", seed=1).columns.digest() != dataset.columns.digest()
