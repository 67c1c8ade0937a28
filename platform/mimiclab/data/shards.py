"""A packed data set, read back: columns from its index, image bytes from its shards.

Shards hold image bytes without compression, so that each lies in one piece somewhere in the file, and the index
says where. An image is then read by its place, like a file: no row group is decoded for it, and several threads
and processes read the same shard without knowing of each other.
"""

from __future__ import annotations

import hashlib
import io
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mimiclab.data.cache import NodeCache, default_folder
from mimiclab.data.coco import CocoDataset
from mimiclab.data.columns import Columns, names_of, offsets_of
from mimiclab.data.manifest import File, Manifest, read_manifest
from mimiclab.errors import UserError
from mimiclab.storage import Storage

# Per process; every shard of COCO, and well below the usual limit of 1024.
_MAX_OPEN_FILES = 256

ANNOTATIONS = pa.schema(
    [
        ("id", pa.int64()),
        ("file_name", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("boxes", pa.list_(pa.list_(pa.float32(), 4))),
        ("labels", pa.list_(pa.int64())),
        ("iscrowd", pa.list_(pa.bool_())),
        ("areas", pa.list_(pa.float32())),
        ("annotation_ids", pa.list_(pa.int64())),
        ("sha256", pa.binary(32)),
    ]
)
"""What shards and index hold of every image; boxes are xyxy in pixels, labels count from 0."""
SHARD = ANNOTATIONS.append(pa.field("image", pa.binary()))
"""The bytes of the image file besides."""
INDEX = pa.schema(
    [*ANNOTATIONS, pa.field("shard", pa.int32()), pa.field("offset", pa.int64()), pa.field("size", pa.int64())]
)
"""Where these bytes lie besides: number of the shard, offset and size in bytes in its file."""


def annotations_table(columns: Columns, sha256: npt.NDArray[np.uint8]) -> pa.Table:
    """Columns of N images and the hashes of their files (N, 32) as a table of schema `ANNOTATIONS`."""
    offsets = pa.array(columns.offsets.astype(np.int32))

    def per_image(values: pa.Array) -> pa.Array:
        return pa.ListArray.from_arrays(offsets, values)

    arrays = {
        "id": pa.array(columns.ids),
        "file_name": pa.array(columns.names.tolist(), pa.string()),
        "width": pa.array(columns.widths),
        "height": pa.array(columns.heights),
        "boxes": per_image(pa.FixedSizeListArray.from_arrays(pa.array(columns.boxes.ravel()), 4)),
        "labels": per_image(pa.array(columns.labels)),
        "iscrowd": per_image(pa.array(columns.iscrowd)),
        "areas": per_image(pa.array(columns.areas)),
        "annotation_ids": per_image(pa.array(columns.annotation_ids)),
        "sha256": pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(32), len(columns), [None, pa.py_buffer(np.ascontiguousarray(sha256))]
        ),
    }
    return pa.table(arrays, schema=ANNOTATIONS)


@dataclass(frozen=True, eq=False)
class Places:
    """Where the bytes of N images lie: shard (N,) int32, offset and size (N,) int64, sha256 (N, 32) uint8."""

    shard: npt.NDArray[np.int32]
    offset: npt.NDArray[np.int64]
    size: npt.NDArray[np.int64]
    sha256: npt.NDArray[np.uint8]


class PackedImages:
    """The images of a packed data set.

    Args:
        storage: Where the set lies.
        shards: Its shard files.
        places: Where in them each image lies.
        names: The images' file names, for messages.
        cache: Keeps shards on this machine; None reads them where they are, in a folder.
    """

    def __init__(
        self,
        storage: Storage,
        shards: tuple[File, ...],
        places: Places,
        names: npt.NDArray[Any],
        cache: NodeCache | None,
    ) -> None:
        self._storage = storage
        self._shards = shards
        self._places = places
        self._names = names
        self._cache = cache
        self._opened = lru_cache(maxsize=_MAX_OPEN_FILES)(self._open_shard)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_opened"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._opened = lru_cache(maxsize=_MAX_OPEN_FILES)(self._open_shard)

    def read(self, position: int) -> bytes:
        """The bytes of an image file.

        Raises:
            UserError: The shard is missing, or does not hold what the index says.
        """
        places = self._places
        number, size = int(places.shard[position]), int(places.size[position])
        file = self._opened(number)  # held until it was read from: another thread may push it out
        try:
            # By offset, which leaves no position in the file that threads or forked processes could share.
            content = os.pread(file.fileno(), size, int(places.offset[position]))
        except OSError as error:
            raise UserError(f"{self.where(position)}: cannot be read: {error.strerror}") from error
        if hashlib.sha256(content).digest() != places.sha256[position].tobytes():
            what = f"image {self._names[position]} in it is not what the set's index says"
            raise _damaged(self._storage, self._shards[number], self._cache, what)
        return content

    def where(self, position: int) -> str:
        """The image's file name and its shard."""
        shard = self._shards[int(self._places.shard[position])]
        return f"{self._names[position]} in {self._storage.where(shard.name)}"

    def _open_shard(self, number: int) -> io.FileIO:
        return _open(self._storage, self._shards[number], self._cache)


def read_packed(uri: str, cache: Path | None = None, cache_bytes: int | None = None) -> CocoDataset:
    """Open a packed data set; no image is read for it.

    Args:
        uri: A folder, or a URI that pyarrow.fs knows.
        cache: Folder of this machine that shards are copied to before they are read; None reads a set in a folder
            where it is, and keeps shards of a remote store in `default_folder`.
        cache_bytes: Most that the cache holds; see `NodeCache`.

    Raises:
        UserError: There is no such set, it is of another version, or a file of it is missing or damaged.
    """
    storage = Storage(uri)
    manifest = read_manifest(storage)
    check_files(storage, manifest)
    in_place = cache is None and storage.local is not None
    copies = None if in_place else NodeCache(cache or default_folder(), cache_bytes)
    with _open(storage, manifest.index, copies) as file:
        content = file.read()
    if hashlib.sha256(content).hexdigest() != manifest.index.sha256:
        raise _damaged(storage, manifest.index, copies, "it differs from the manifest")
    columns, places = read_index(content)
    return CocoDataset(
        origin=storage.name,
        classes=manifest.classes,
        category_ids=manifest.category_ids,
        columns=columns,
        source=PackedImages(storage, manifest.shards, places, columns.names, copies),
        left_out=tuple(f"{storage.name}: {text}" for text in manifest.left_out),
        notes=tuple(f"{storage.name}: {text}" for text in manifest.notes),
        content=manifest.content,
    )


def check_files(storage: Storage, manifest: Manifest) -> None:
    """Compare the sizes of all files with the manifest.

    Raises:
        UserError: One is missing or of another size.
    """
    sizes = storage.sizes()
    for file in (manifest.index, *manifest.shards):
        if file.name not in sizes:
            raise UserError(f"{storage.where(file.name)}: the manifest lists it, and there is no such file")
        if sizes[file.name] != file.bytes:
            raise UserError(
                f"{storage.where(file.name)}: it has {sizes[file.name]} bytes, the manifest says {file.bytes}; it is "
                "damaged, expected the set to be packed again"
            )


def read_index(content: bytes) -> tuple[Columns, Places]:
    """The columns of an index file, and where the images lie."""
    table = pq.read_table(pa.BufferReader(content), schema=INDEX).combine_chunks()
    column = {name: table.column(name).chunk(0) for name in table.column_names}

    def values(name: str, array: pa.Array | None = None) -> npt.NDArray[Any]:
        flat: npt.NDArray[Any] = (column[name] if array is None else array).to_numpy(zero_copy_only=False)
        return flat

    columns = Columns(
        ids=values("id"),
        widths=values("width"),
        heights=values("height"),
        names=names_of(column["file_name"].to_pylist()),
        offsets=offsets_of(pc.list_value_length(column["labels"]).to_numpy().astype(np.int64)),
        boxes=values("boxes", column["boxes"].flatten().flatten()).reshape(-1, 4),
        labels=values("labels", column["labels"].flatten()),
        iscrowd=values("iscrowd", column["iscrowd"].flatten()),
        areas=values("areas", column["areas"].flatten()),
        annotation_ids=values("annotation_ids", column["annotation_ids"].flatten()),
    )
    hashes = np.frombuffer(b"".join(column["sha256"].to_pylist()), dtype=np.uint8).reshape(-1, 32)
    return columns, Places(values("shard"), values("offset"), values("size"), hashes)


def _damaged(storage: Storage, file: File, cache: NodeCache | None, what: str) -> UserError:
    """The error for a file that holds something else than it should."""
    where = storage.where(file.name)
    if cache is None:
        return UserError(
            f"{where}: {what}; it is damaged or was changed while it was in use, expected the set to be packed again"
        )
    # It was whole when it was fetched.
    return UserError(
        f"{cache.drop(file)}: {what}; this copy of {where} was damaged, and is removed: expected the same command "
        "again, which fetches another"
    )


def _open(storage: Storage, file: File, cache: NodeCache | None) -> io.FileIO:
    if cache is not None:
        return cache.open(storage, file)
    assert storage.local is not None  # what is remote has a cache
    path = storage.local / file.name
    try:
        return io.FileIO(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
