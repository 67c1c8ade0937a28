"""What says that a packed data set is whole, and what it holds.

DST/
    manifest.json          written last; a folder without it holds no data set
    index.parquet          a row per image: all but its bytes, and where in which shard these lie
    shard-00000.parquet    a row per image: the bytes of its file as they were, and its annotations
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from mimiclab.errors import UserError
from mimiclab.storage import Storage

MANIFEST, INDEX = "manifest.json", "index.parquet"
FORMAT, VERSION = "mimiclab-packed", 1


@dataclass(frozen=True)
class File:
    """A file of a packed data set."""

    name: str
    images: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a packed data set holds.

    Attributes:
        classes: Class names in order of category id.
        category_ids: Of every class.
        images: Number of images.
        objects: Number of objects, crowd regions among them.
        crowds: Number of crowd regions.
        annotations: Name of the annotation file that was packed.
        annotations_sha256: Of that file's bytes.
        content: Hash of classes, annotations and image bytes: equal sets have equal ones, however they were packed.
        left_out: A sentence for everything that was not packed.
        notes: Sentences on what was mended.
        index: The index file.
        shards: The shard files, in order.
    """

    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    images: int
    objects: int
    crowds: int
    annotations: str
    annotations_sha256: str
    content: str
    left_out: tuple[str, ...]
    notes: tuple[str, ...]
    index: File
    shards: tuple[File, ...]

    def write(self, storage: Storage) -> None:
        """Put it into the folder that it describes."""
        record = {"format": FORMAT, "version": VERSION, **asdict(self)}
        storage.write(MANIFEST, (json.dumps(record, indent=1) + "\n").encode())


def read_manifest(storage: Storage) -> Manifest:
    """The manifest of a packed data set.

    Raises:
        UserError: There is none, or none that this version reads.
    """
    where = storage.where(MANIFEST)
    if MANIFEST not in storage.sizes():
        raise UserError(
            f"{where}: there is no such file, expected a data set that `mimiclab data pack` has finished, in a place "
            "that every machine of the cluster sees"
        )
    try:
        record = json.loads(storage.read(MANIFEST))
    except ValueError as error:
        raise UserError(f"{where}: not JSON: {error}") from error
    if not isinstance(record, dict) or record.pop("format", None) != FORMAT:
        raise UserError(f"{where}: not the manifest of a packed data set, expected one of `mimiclab data pack`")
    version = record.pop("version", None)
    if version != VERSION:
        raise UserError(
            f"{where}: its schema version is {version!r}, this MimicLab reads version {VERSION}; expected the set to "
            "be packed again"
        )
    try:
        return _manifest(record)
    except (TypeError, KeyError) as error:
        raise UserError(f"{where}: it is damaged ({error}), expected the set to be packed again") from error


def _manifest(record: dict[str, Any]) -> Manifest:
    for key in ("classes", "category_ids", "left_out", "notes"):
        record[key] = tuple(record[key])
    record["index"] = File(**record["index"])
    record["shards"] = tuple(File(**shard) for shard in record["shards"])
    return Manifest(**record)
