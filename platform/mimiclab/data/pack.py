"""Pack a COCO data set into Parquet shards, in parallel; interrupted and started again, it goes on.

What a shard holds depends on the order of the images and the sizes of their files only, and every setting of the
writer is fixed: the result is the same, byte for byte, however many workers made it. While a set is being packed a
`shard-00000.json` next to each finished shard says what it was made of, and its checksum.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mimiclab.data.coco import CocoDataset, content_hash
from mimiclab.data.columns import Columns, ImageFiles, ImageRecord, Images
from mimiclab.data.images import check_size, decode
from mimiclab.data.manifest import INDEX, MANIFEST, VERSION, File, Manifest, read_manifest
from mimiclab.data.parallel import Runner
from mimiclab.data.shards import INDEX as INDEX_SCHEMA
from mimiclab.data.shards import SHARD, annotations_table, check_files, read_index
from mimiclab.errors import UserError
from mimiclab.storage import MissingError, Storage

# A shard is built in memory, and is what a machine fetches at a time: about 80 MB of COCO's photographs.
SHARD_IMAGES = 512
SHARD_BYTES = 128 << 20
# What other readers of Parquet decode at a time.
ROW_GROUP_IMAGES = 64

# What names of shards begin with, and of files that a killed process has left half-written.
_OURS = ("shard-", ".shard-", f".{INDEX}-", f".{MANIFEST}-")
_WRITER = {"compression": "none", "use_dictionary": False, "write_statistics": False, "version": "2.6"}


@dataclass(frozen=True, eq=False)
class Task:
    """One shard to make; plain values and arrays, so that it travels to any worker.

    Attributes:
        destination: Folder or URI of the set.
        number: Of the shard, from 0.
        source: The image files.
        columns: Of the shard's images.
        made_of: Hash of all that decides what the shard will hold, the images' bytes by size and time of change.
        skip_broken: Leave images out that cannot be decoded.
    """

    destination: str
    number: int
    source: ImageFiles
    columns: Columns
    made_of: str
    skip_broken: bool


@dataclass(frozen=True)
class Shard:
    """A finished shard.

    Attributes:
        number: From 0.
        file: As the manifest lists it.
        kept: Positions of its images among the task's.
        offsets: Where each one's bytes start in the file.
        sizes: Of each, in bytes.
        sha256: Of each, in hexadecimal.
        broken: A sentence for every image that was left out.
    """

    number: int
    file: File
    kept: list[int]
    offsets: list[int]
    sizes: list[int]
    sha256: list[str]
    broken: list[str]


def pack(
    dataset: CocoDataset,
    destination: str,
    *,
    run: Runner,
    skip_broken: bool = False,
    done: Callable[[int], object] = lambda _: None,
) -> Manifest:
    """Pack a data set of image files.

    Args:
        dataset: What `read_coco` gave.
        destination: A folder, or a URI that pyarrow.fs knows; empty, or of an earlier attempt at the same set.
        run: Makes the shards; see `in_threads`.
        skip_broken: Leave images out that cannot be decoded, and say so in the manifest; else they are an error.
        done: Called with the number of images of every shard that is finished.

    Returns:
        The manifest that was written, or that of an earlier, finished attempt.

    Raises:
        UserError: An image cannot be read, or the destination holds something else or cannot be written.
    """
    storage = Storage(destination)
    assert isinstance(dataset.source, ImageFiles)
    stats = file_stats(dataset.source)
    with _alone(storage):
        finished = _finished(storage, dataset, stats[:, 0], skip_broken)
        if finished is not None:
            done(finished.images)
            return finished
        bounds = shard_bounds(stats[:, 0])
        tasks = [_task(dataset, stats, destination, number, part, skip_broken) for number, part in enumerate(bounds)]
        return _pack(storage, dataset, bounds, tasks, run, done)


@contextmanager
def _alone(storage: Storage) -> Iterator[None]:
    """Wait for others that pack into the same folder: who is done removes what looks like an earlier attempt's."""
    if storage.local is None:
        yield
        return
    try:
        storage.local.mkdir(parents=True, exist_ok=True)
        folder = os.open(storage.local, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{storage.name}: cannot be written: {error.strerror}") from error
    try:
        with suppress(OSError):  # not every network file system can
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(folder, fcntl.LOCK_UN)
        os.close(folder)


def _pack(
    storage: Storage,
    dataset: CocoDataset,
    bounds: list[slice],
    tasks: list[Task],
    run: Runner,
    done: Callable[[int], object],
) -> Manifest:
    shards = []
    for shard in run(make_shard, tasks):
        shards.append(shard)
        done(len(tasks[shard.number].columns))
    shards.sort(key=lambda shard: shard.number)

    columns = dataset.columns.take(
        np.concatenate(
            [part.start + np.array(shard.kept, np.int64) for part, shard in zip(bounds, shards, strict=True)]
        )
    )
    if not len(columns):
        raise UserError(f"{dataset.origin}: none of its images can be decoded")
    index, content = _index(columns, shards, dataset)
    storage.write(INDEX, index)
    left_out = [text.removeprefix(f"{dataset.origin}: ") for text in dataset.left_out]
    manifest = Manifest(
        classes=dataset.classes,
        category_ids=dataset.category_ids,
        images=len(columns),
        objects=len(columns.labels),
        crowds=int(columns.iscrowd.sum()),
        annotations=dataset.annotations.name,
        annotations_sha256=content_hash(dataset),
        content=content,
        left_out=(*left_out, *(text for shard in shards for text in shard.broken)),
        notes=tuple(text.removeprefix(f"{dataset.origin}: ") for text in dataset.notes),
        index=File(INDEX, len(columns), len(index), hashlib.sha256(index).hexdigest()),
        shards=tuple(shard.file for shard in shards),
    )
    manifest.write(storage)
    # What tells how far an attempt came is of no use any more, and of another length for another attempt.
    listed = {MANIFEST, INDEX, *(shard.file.name for shard in shards)}
    for name in storage.sizes().keys() - listed:
        if name.startswith(_OURS):
            storage.delete(name)
    return manifest


def file_stats(source: ImageFiles) -> npt.NDArray[np.int64]:
    """(N, 2): size in bytes and time of the last change, in nanoseconds, of every image file.

    Raises:
        UserError: One is missing.
    """
    stats = np.empty((len(source.names), 2), dtype=np.int64)
    for position in range(len(stats)):
        try:
            stat = Path(source.where(position)).stat()
        except OSError as error:
            raise UserError(f"{source.where(position)}: cannot be read as an image: {error.strerror}") from error
        stats[position] = stat.st_size, stat.st_mtime_ns
    return stats


def shard_bounds(sizes: Sequence[int] | npt.NDArray[np.int64]) -> list[slice]:
    """Which images make up each shard, from the sizes of all files in bytes."""
    bounds, start, filled = [], 0, 0
    for position, size in enumerate(sizes):
        if position > start and (position - start == SHARD_IMAGES or filled + size > SHARD_BYTES):
            bounds.append(slice(start, position))
            start, filled = position, 0
        filled += int(size)
    return [*bounds, slice(start, len(sizes))]


def make_shard(task: Task) -> Shard:
    """Write one shard, unless an earlier attempt has.

    Raises:
        UserError: An image cannot be read, decoded or is not of its stored size, or the shard cannot be written.
    """
    storage = Storage(task.destination)
    name, note = f"shard-{task.number:05d}.parquet", f"shard-{task.number:05d}.json"
    before = _noted(storage, name, note, task.made_of)
    if before is not None:
        return before

    kept, images, broken = [], [], []
    for position, record in enumerate(Images(task.columns, task.source)):
        encoded = record.encoded()
        try:
            _check(record, encoded)
        except UserError as error:
            if not task.skip_broken:
                raise
            # By its name in the annotation file: what is said is the same wherever the folder lies.
            broken.append(str(error).replace(record.where, f"image {record.id} ({task.columns.names[position]})"))
            continue
        kept.append(position)
        images.append(encoded)
    hashes = [hashlib.sha256(encoded).digest() for encoded in images]
    columns = task.columns.take(np.array(kept, dtype=np.int64))
    content = _parquet(columns, hashes, images)
    file = File(name, len(kept), len(content), hashlib.sha256(content).hexdigest())
    shard = Shard(
        task.number,
        file,
        kept,
        offsets=_find(content, images),
        sizes=[len(encoded) for encoded in images],
        sha256=[digest.hex() for digest in hashes],
        broken=broken,
    )
    storage.write(name, content)
    storage.write(note, json.dumps({"made_of": task.made_of, "shard": asdict(shard)}).encode())
    return shard


def _task(
    dataset: CocoDataset, stats: npt.NDArray[np.int64], destination: str, number: int, part: slice, skip_broken: bool
) -> Task:
    assert isinstance(dataset.source, ImageFiles)
    columns = dataset.columns.take(np.arange(part.start, part.stop))
    made_of = hashlib.sha256(
        f"{VERSION} {pa.__version__} {skip_broken} {columns.digest()}".encode() + stats[part].astype("<i8").tobytes()
    )
    source = replace(dataset.source, names=columns.names)
    return Task(destination, number, source, columns, made_of.hexdigest(), skip_broken)


def _check(record: ImageRecord, encoded: bytes) -> None:
    """Decode an image.

    Raises:
        UserError: It cannot be decoded, or is not of its stored size.
    """
    height, width, _ = decode(encoded, record.where).shape
    check_size(width, height, (record.width, record.height), record.where)


def _parquet(columns: Columns, hashes: list[bytes], images: list[bytes]) -> bytes:
    digests = np.frombuffer(b"".join(hashes), dtype=np.uint8).reshape(-1, 32)
    table = annotations_table(columns, digests)
    # All images are in memory here, and once more in the file; row groups one by one keep it at that.
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, SHARD, **_WRITER) as writer:
        for start in range(0, len(images), ROW_GROUP_IMAGES):
            group = pa.array(images[start : start + ROW_GROUP_IMAGES], pa.binary())
            writer.write_table(table.slice(start, len(group)).append_column("image", group))
    return sink.getvalue()


def _find(content: bytes, images: list[bytes]) -> list[int]:
    """Where each image's bytes start in a Parquet file that holds them in order, uncompressed."""
    start, offsets = 0, []
    for encoded in images:
        # Parquet's plain encoding: the size in four bytes, then the bytes. The first match at or behind the end of
        # the image before is taken, and compared as a whole.
        start = content.find(len(encoded).to_bytes(4, "little") + encoded, start)
        if start < 0:
            raise RuntimeError("the Parquet writer did not store an image in one piece")
        offsets.append(start + 4)
        start += 4 + len(encoded)
    return offsets


def _noted(storage: Storage, name: str, note: str, made_of: str) -> Shard | None:
    """The shard that an earlier attempt made of the same images, if it is whole."""
    sizes = storage.sizes()
    if name not in sizes or note not in sizes:
        return None
    try:
        record = json.loads(storage.read(note))
        if record["made_of"] != made_of:
            return None
        shard = Shard(**{**record["shard"], "file": File(**record["shard"]["file"])})
    except (ValueError, KeyError, TypeError, MissingError):  # half-written, or removed by another process that is done
        return None
    if sizes[name] != shard.file.bytes or storage.sha256(name) != shard.file.sha256:
        return None
    return shard


def _index(columns: Columns, shards: list[Shard], dataset: CocoDataset) -> tuple[bytes, str]:
    """The index file's bytes, and the hash of the whole set's content."""
    hashes = np.frombuffer(bytes.fromhex("".join(text for shard in shards for text in shard.sha256)), dtype=np.uint8)
    places: dict[str, tuple[list[int], Any]] = {
        "shard": ([shard.number for shard in shards for _ in shard.kept], pa.int32()),
        "offset": ([offset for shard in shards for offset in shard.offsets], pa.int64()),
        "size": ([size for shard in shards for size in shard.sizes], pa.int64()),
    }
    table = annotations_table(columns, hashes.reshape(-1, 32))
    for name, (values, kind) in places.items():
        table = table.append_column(name, pa.array(values, kind))
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, INDEX_SCHEMA, **{**_WRITER, "compression": "zstd"}) as writer:
        writer.write_table(table)
    classes = json.dumps([dataset.classes, dataset.category_ids])
    content = hashlib.sha256(f"{VERSION} {classes} {columns.digest()}".encode() + hashes.tobytes()).hexdigest()
    return sink.getvalue().to_pybytes(), content


def _finished(
    storage: Storage, dataset: CocoDataset, sizes: npt.NDArray[np.int64], skip_broken: bool
) -> Manifest | None:
    """The manifest, where this very set was packed here before.

    Raises:
        UserError: The destination holds something else, or less than what can be decoded, or an image was left out
            in it that has to be there.
    """
    names = storage.sizes().keys()
    if MANIFEST not in names:
        foreign = sorted(name for name in names if not name.startswith((".", *_OURS)) and name != INDEX)
        if foreign:
            raise UserError(
                f"{storage.where(foreign[0])}: this is no packed data set; expected an empty folder, or one of an "
                "earlier attempt at the same set"
            )
        return None
    manifest = read_manifest(storage)
    check_files(storage, manifest)
    columns, places = read_index(storage.read(INDEX))
    same = manifest.annotations_sha256 == content_hash(dataset)
    if same:
        rows = np.searchsorted(dataset.columns.ids, columns.ids)
        # Of the packed images only the sizes are compared: their bytes would all have to be read.
        same = np.array_equal(sizes[rows], places.size)
        for row in np.delete(np.arange(len(sizes)), rows).tolist():
            record = dataset.images[row]
            try:
                _check(record, record.encoded())
            except UserError:
                if not skip_broken:
                    raise
            else:  # it was mended since
                same = False
    if not same:
        raise UserError(
            f"{storage.where(MANIFEST)}: another data set was packed here, of {manifest.images} images from "
            f"{manifest.annotations}; expected an empty folder, or one of an earlier attempt at the same set"
        )
    return manifest
