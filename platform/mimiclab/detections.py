"""What a run's best evaluation detected, kept in the run's folder: runs are compared image by image from it."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mimiclab.errors import UserError
from mimiclab.scoring import Detections
from mimiclab.storage import MissingError, Storage

DETECTIONS = "detections.parquet"
"""The file in a run's folder: a row per detection, `step` and `content` in its metadata."""

_BOX = ("x", "y", "width", "height")
_STEP, _CONTENT = b"mimiclab.step", b"mimiclab.content"


@dataclass(frozen=True)
class KeptDetections:
    """The detections of one evaluation."""

    step: int
    """Of the weights that were evaluated."""
    content: str
    """Hash of the validation set's images' ids and objects, `Columns.digest`; the same packed or not."""
    heads: dict[str, Detections]
    """Each head's detections (n, 7), as `Evaluation.detections`."""


def write_detections(storage: Storage, detections: Mapping[str, Detections], *, step: int, content: str) -> None:
    """Keep the detections of an evaluation in a run's folder, in place of those of an earlier one.

    Boxes and scores are stored as float32, which is what detectors give: nothing is lost.

    Args:
        storage: the run's folder.
        detections: each head's (n, 7).
        step: of the weights that were evaluated.
        content: see `KeptDetections`.

    Raises:
        UserError: the file cannot be written.
    """
    rows = np.concatenate([np.zeros((0, 7)), *detections.values()])
    heads = np.repeat(list(detections), [len(each) for each in detections.values()])
    columns = {
        "head": pa.array(heads.tolist(), pa.string()).dictionary_encode(),
        "image_id": rows[:, 0].astype(np.int64),
        **{name: rows[:, column].astype(np.float32) for column, name in enumerate(_BOX, start=1)},
        "score": rows[:, 5].astype(np.float32),
        "category_id": rows[:, 6].astype(np.int64),
    }
    # Heads that found nothing have no row.
    names = {f"mimiclab.head.{number}": head for number, head in enumerate(detections)}
    metadata: dict[str | bytes, str | bytes] = {_STEP: str(step), _CONTENT: content}
    metadata.update(names)
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), buffer, compression="zstd")
    storage.write(DETECTIONS, buffer.getbuffer())


def read_detections(storage: Storage) -> KeptDetections | None:
    """The detections that a run keeps; None where it was never evaluated, or by a version that kept none.

    Raises:
        UserError: the file cannot be read, or is damaged.
    """
    try:
        content = storage.read(DETECTIONS)
    except MissingError:
        return None
    try:
        table = pq.read_table(pa.BufferReader(content))
        metadata = table.schema.metadata
        names = [value.decode() for key, value in metadata.items() if key.startswith(b"mimiclab.head.")]
        heads = np.asarray(table["head"].to_pylist(), dtype=object)
        columns = [table[name].to_numpy() for name in ("image_id", *_BOX, "score", "category_id")]
        rows = np.stack([column.astype(np.float64) for column in columns], 1)
        return KeptDetections(
            int(metadata[_STEP]), metadata[_CONTENT].decode(), {name: rows[heads == name] for name in names}
        )
    except (pa.ArrowException, KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{storage.where(DETECTIONS)}: found a damaged file ({error}), expected detections") from error
