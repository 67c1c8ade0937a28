"""Packing: the same bytes however it is done, nothing lost, and interrupted it goes on."""

import hashlib
import itertools
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mimiclab.cli import main
from mimiclab.data import pack as pack_module
from mimiclab.data.coco import CocoDataset, read_coco
from mimiclab.data.manifest import INDEX, MANIFEST, Manifest, read_manifest
from mimiclab.data.pack import make_shard, pack, shard_bounds
from mimiclab.data.parallel import bounded, in_threads
from mimiclab.data.shards import read_packed
from mimiclab.errors import UserError
from mimiclab.storage import Storage

NUM_IMAGES = 23


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_module, "SHARD_IMAGES", 5)
    monkeypatch.setattr(pack_module, "ROW_GROUP_IMAGES", 2)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with a small data set: images of several formats and modes, one crowd, one box without area."""
    root = tmp_path / "files"
    (root / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(NUM_IMAGES):
        name = f"sub/{i}.jpg" if i % 3 else f"{i}.png"
        pixels = Image.fromarray(rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8))
        pixels.convert("L" if i == 4 else "RGB").save(root / name)
        images.append({"id": 50 - i, "file_name": name, "width": 30, "height": 20 + i})
        for j in range(i % 4):
            box = [j, 1, 0 if (i, j) == (7, 2) else 5.5, 4]
            annotations.append(
                {"id": len(annotations), "image_id": 50 - i, "category_id": 3 + 2 * (j % 2), "bbox": box}
            )
    annotations[-1]["iscrowd"] = 1
    annotations[-1]["bbox"] = [25, 1, 9, 4]
    categories = [{"id": 5, "name": "dog"}, {"id": 3, "name": "cat"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "instances.json").write_text(json.dumps(content))
    return root


def read(files: Path) -> CocoDataset:
    return read_coco(files / "instances.json", files)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def packed(files: Path, name: str, workers: int = 1) -> dict[str, bytes]:
    target = files.parent / name
    pack(read(files), str(target), run=in_threads(workers))
    return contents(target)


def test_the_result_is_the_same_for_any_number_of_workers(files: Path) -> None:
    alone = packed(files, "alone")
    assert sorted(alone) == [INDEX, MANIFEST, *(f"shard-{i:05d}.parquet" for i in range(5))]
    assert packed(files, "two", workers=2) == alone
    assert packed(files, "many", workers=7) == alone

    def backwards(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        yield from map(function, reversed(list(items)))

    pack(read(files), str(files.parent / "backwards"), run=backwards)
    assert contents(files.parent / "backwards") == alone
    # Nor does it matter where the files are, or when they were written.
    moved = shutil.copytree(files, files.parent / "elsewhere", copy_function=shutil.copy)
    assert packed(moved, "moved") == alone


def test_any_reader_of_parquet_finds_images_untouched_and_annotations(files: Path) -> None:
    packed(files, "set")
    rows = [row for i in range(5) for row in pq.read_table(files.parent / "set" / f"shard-{i:05d}.parquet").to_pylist()]
    records = list(read(files).images)
    assert len(rows) == NUM_IMAGES
    for row, record in zip(rows, records, strict=True):
        encoded = record.path.read_bytes()
        assert row["image"] == encoded
        assert row["sha256"] == hashlib.sha256(encoded).digest()
        assert (row["id"], row["width"], row["height"]) == (record.id, record.width, record.height)
        assert files / row["file_name"] == record.path
        for column, name in (("boxes", "boxes"), ("labels", "labels"), ("iscrowd", "iscrowd"), ("areas", "areas")):
            assert row[column] == getattr(record, name).tolist()
        assert row["annotation_ids"] == record.annotation_ids.tolist()
    file = pq.ParquetFile(files.parent / "set" / "shard-00000.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [2, 2, 1]
    column = file.schema_arrow.get_field_index("image")
    assert file.metadata.row_group(0).column(file.metadata.num_columns - 1).compression == "UNCOMPRESSED"
    assert column == len(file.schema_arrow) - 1


def test_the_manifest_says_what_the_set_holds(files: Path) -> None:
    written = packed(files, "set")
    manifest = read_manifest(Storage(str(files.parent / "set")))
    dataset = read(files)
    assert manifest.classes == ("cat", "dog")
    assert manifest.category_ids == (3, 5)
    assert (manifest.images, manifest.objects, manifest.crowds) == (NUM_IMAGES, len(dataset.columns.labels), 1)
    assert manifest.annotations == "instances.json"
    assert manifest.annotations_sha256 == hashlib.sha256((files / "instances.json").read_bytes()).hexdigest()
    (left_out,) = manifest.left_out
    assert left_out.startswith("annotation 11 of image 43 (sub/7.jpg): bbox [2, 1, 0, 4] has no area")
    assert manifest.notes == ("1 boxes reached over the border and were clipped",)
    assert [shard.images for shard in manifest.shards] == [5, 5, 5, 5, 3]
    for file in (manifest.index, *manifest.shards):
        assert file.bytes == len(written[file.name])
        assert file.sha256 == hashlib.sha256(written[file.name]).hexdigest()
    assert str(files) not in written[MANIFEST].decode()


def test_the_content_hash_follows_images_boxes_and_classes_and_nothing_else(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def content(name: str) -> str:
        return json.loads(packed(files, name)[MANIFEST])["content"]

    before = content("before")
    with monkeypatch.context() as patch:
        patch.setattr(pack_module, "SHARD_IMAGES", 3)
        assert content("other shards") == before
    hashes = {before}
    path = files / "0.png"
    Image.new("RGB", (30, 20)).save(path)
    hashes.add(content("image"))
    value = json.loads((files / "instances.json").read_text())
    value["annotations"][0]["bbox"][0] += 1
    (files / "instances.json").write_text(json.dumps(value))
    hashes.add(content("box"))
    value["categories"][0]["name"] = "wolf"
    (files / "instances.json").write_text(json.dumps(value))
    hashes.add(content("class"))
    assert len(hashes) == 4


def made(function: Callable[[Any], Any], log: list[int], stop_after: int | None = None) -> Any:
    """A runner that notes which shards were made anew, and fails after some."""

    def run(_: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        for task in items:
            if stop_after is not None and task.number >= stop_after:
                raise KeyboardInterrupt
            shard = Path(task.destination) / f"shard-{task.number:05d}.parquet"
            before = shard.stat().st_mtime_ns if shard.exists() else None
            result = function(task)
            if shard.stat().st_mtime_ns != before:
                log.append(task.number)
            yield result

    return run


def test_an_interrupted_packing_goes_on(files: Path) -> None:
    whole = packed(files, "whole")
    target = files.parent / "interrupted"
    log: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        pack(read(files), str(target), run=made(make_shard, log, stop_after=3))
    assert log == [0, 1, 2]
    assert not (target / MANIFEST).exists()
    # What a kill leaves: a shard without a note, half a shard, and a file that was being written.
    (target / "shard-00000.json").unlink()
    half = target / "shard-00001.parquet"
    half.write_bytes(half.read_bytes()[:1000])
    for name in ("shard-00003.parquet", INDEX, MANIFEST):
        (target / f".{name}-99").write_bytes(b"half")
    log.clear()
    pack(read(files), str(target), run=made(make_shard, log))
    assert log == [0, 1, 3, 4]
    assert contents(target) == whole


def test_a_shard_of_the_right_size_but_other_content_is_made_again(files: Path) -> None:
    target = files.parent / "set"
    with pytest.raises(KeyboardInterrupt):
        pack(read(files), str(target), run=made(make_shard, [], stop_after=2))
    path = target / "shard-00001.parquet"
    damaged = bytearray(path.read_bytes())
    damaged[500] ^= 1
    path.write_bytes(damaged)
    log: list[int] = []
    pack(read(files), str(target), run=made(make_shard, log))
    assert log == [1, 2, 3, 4]


def test_images_that_changed_in_between_are_packed_anew(files: Path) -> None:
    target = files.parent / "set"
    with pytest.raises(KeyboardInterrupt):
        pack(read(files), str(target), run=made(make_shard, [], stop_after=3))
    record = read(files).images[6]
    stat = record.path.stat()
    os.utime(record.path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    log: list[int] = []
    pack(read(files), str(target), run=made(make_shard, log))
    assert log == [1, 3, 4]


def test_packing_what_is_packed_changes_nothing(files: Path) -> None:
    target = files.parent / "set"
    packed(files, "set")
    before = {path: path.stat().st_mtime_ns for path in target.iterdir()}
    log: list[int] = []
    manifest = pack(read(files), str(target), run=made(make_shard, log))
    assert log == []
    assert manifest == read_manifest(Storage(str(target)))
    assert {path: path.stat().st_mtime_ns for path in target.iterdir()} == before


def test_a_place_that_holds_something_else_is_left_alone(files: Path) -> None:
    packed(files, "set")
    value = json.loads((files / "instances.json").read_text())
    value["annotations"].pop()
    (files / "instances.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match=r"set/manifest\.json: another data set was packed here, of 23 images"):
        packed(files, "set")
    for name in ("photo.jpg", "folder"):
        other = files.parent / f"other {name}"
        other.mkdir()
        (other / name).mkdir() if name == "folder" else (other / name).touch()
        with pytest.raises(UserError, match=f"{name}: this is no packed data set; expected an empty folder"):
            packed(files, other.name)
        assert [path.name for path in other.iterdir()] == [name]


def test_an_image_that_changed_after_packing_is_another_set(files: Path) -> None:
    packed(files, "set")
    Image.new("RGB", (30, 20)).save(files / "0.png")
    with pytest.raises(UserError, match="another data set was packed here"):
        packed(files, "set")


@pytest.mark.parametrize("flaw", ["text", "cut", "size"])
def test_an_image_that_cannot_be_used_is_an_error_that_names_it(files: Path, flaw: str) -> None:
    path = files / "sub" / "8.jpg"
    if flaw == "size":
        Image.new("RGB", (31, 28)).save(path)
    else:
        path.write_bytes(b"no image" if flaw == "text" else path.read_bytes()[:-400])
    with pytest.raises(UserError, match=r"sub/8\.jpg: (cannot be read as an image|the image is 31 x 28)"):
        packed(files, "set")
    assert not (files.parent / "set" / MANIFEST).exists()


def test_broken_images_are_left_out_on_request_and_said(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("sub/8.jpg", "15.png"):
        (files / name).write_bytes(b"no image")
    target = files.parent / "set"
    command = ["data", "pack", str(files / "instances.json"), str(target), "--images", str(files), "--workers", "2"]
    with pytest.raises(SystemExit) as exit_:
        main(command)
    assert exit_.value.code == 2
    assert "cannot be read as an image: its content is of no known format" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--skip-broken"])
    assert exit_.value.code == 0
    said = capsys.readouterr().out
    for text in ("image 42 (sub/8.jpg): cannot be read", "image 35 (15.png): cannot", "annotation 11 of image 43"):
        assert f"left out: {text}" in said
    assert "21 images" in said
    dataset = read_packed(str(target))
    expected = [record.id for record in read(files).images if record.id not in (42, 35)]
    assert [record.id for record in dataset.images] == expected
    assert len(dataset.left_out) == 3
    for record, original in zip(dataset.images, (r for r in read(files).images if r.id not in (42, 35)), strict=True):
        assert record.encoded() == original.encoded()
        np.testing.assert_array_equal(record.boxes, original.boxes)


def test_a_set_that_left_images_out_is_finished_only_for_who_asks_for_that(files: Path) -> None:
    path, target = files / "15.png", str(files.parent / "set")
    sound = path.read_bytes()
    path.write_bytes(b"no image")
    manifest = pack(read(files), target, run=in_threads(1), skip_broken=True)
    assert pack(read(files), target, run=in_threads(1), skip_broken=True) == manifest
    with pytest.raises(UserError, match=r"15\.png: cannot be read as an image"):
        pack(read(files), target, run=in_threads(1))
    path.write_bytes(sound)
    with pytest.raises(UserError, match="another data set was packed here, of 22 images"):
        pack(read(files), target, run=in_threads(1), skip_broken=True)


def test_annotations_that_change_while_they_are_packed_are_another_set(files: Path) -> None:
    dataset, path = read(files), files / "instances.json"
    before = path.read_bytes()
    value = json.loads(before)
    value["annotations"][0]["bbox"] = [1, 1, 2, 2]

    def run(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        path.write_text(json.dumps(value))
        yield from map(function, items)

    manifest = pack(dataset, str(files.parent / "set"), run=run)
    assert manifest.annotations_sha256 == hashlib.sha256(before).hexdigest()
    with pytest.raises(UserError, match="another data set was packed here"):
        packed(files, "set")


def test_those_who_pack_into_one_folder_at_once_all_get_the_set(files: Path) -> None:
    alone, dataset, target = packed(files, "alone"), read(files), files.parent / "together"
    barrier, runs = threading.Barrier(4), []

    def run(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        runs.append(threading.get_ident())
        with suppress(threading.BrokenBarrierError):
            barrier.wait(0.5)
        yield from map(function, items)

    with ThreadPoolExecutor(4) as pool:
        manifests = list(pool.map(lambda _: pack(dataset, str(target), run=run), range(4)))
    assert len(runs) == 1
    assert manifests == [read_manifest(Storage(str(target)))] * 4
    assert contents(target) == alone


def test_a_note_that_another_process_removes_is_none(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a store nobody waits for the other: who is done first removes all notes."""
    alone, target = packed(files, "alone"), files.parent / "set"

    class Late(Storage):
        def sizes(self) -> dict[str, int | None]:
            return {**super().sizes(), "shard-00002.json": 9}

    with pytest.raises(KeyboardInterrupt):
        pack(read(files), str(target), run=made(make_shard, [], stop_after=3))
    (target / "shard-00002.json").unlink()
    monkeypatch.setattr(pack_module, "Storage", Late)
    pack(read(files), str(target), run=in_threads(1))
    assert contents(target) == alone


def test_a_destination_that_is_a_file_is_named(files: Path) -> None:
    with pytest.raises(UserError, match=r"instances\.json: cannot be written: File exists"):
        pack(read(files), str(files / "instances.json"), run=in_threads(1))


def test_a_set_without_a_sound_image_is_refused(files: Path) -> None:
    for path in (*files.glob("*.png"), *files.glob("sub/*.jpg")):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"instances\.json: none of its images can be decoded"):
        pack(read(files), str(files.parent / "set"), run=in_threads(2), skip_broken=True)


def test_images_that_hold_each_others_bytes_are_found_where_they_are(files: Path) -> None:
    """One image's file ends with the next one's, and two are the same."""
    images = sorted(read(files).images, key=lambda record: record.id)
    for name in ("outer.png", "inner.png", "twin.png"):
        Image.new("RGB", (30, 42)).save(files / name)
    inner = (files / "inner.png").read_bytes()
    # Behind a PNG's end anything may follow; here what looks like a stored image.
    (files / "outer.png").write_bytes(inner + len(inner).to_bytes(4, "little") + inner)
    value = json.loads((files / "instances.json").read_text())
    for number, name in enumerate(("outer.png", "inner.png", "twin.png")):
        value["images"].append({"id": 100 + number, "file_name": name, "width": 30, "height": 42})
    (files / "instances.json").write_text(json.dumps(value))
    packed(files, "set")
    dataset = read_packed(str(files.parent / "set"))
    assert len(dataset.images) == len(images) + 3
    assert [record.encoded() for record in dataset.images] == [record.encoded() for record in read(files).images]
    places = pq.read_table(files.parent / "set" / INDEX, columns=["shard", "offset", "size"]).to_pylist()[-3:]
    spans = sorted((row["shard"], row["offset"], row["offset"] + row["size"]) for row in places)
    assert all(a[0] < b[0] or a[2] <= b[1] for a, b in itertools.pairwise(spans))


def test_shards_are_bounded_in_images_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_module, "SHARD_BYTES", 100)
    assert shard_bounds([1] * 12) == [slice(0, 5), slice(5, 10), slice(10, 12)]
    assert shard_bounds([60, 40, 1, 200, 1]) == [slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 5)]
    assert shard_bounds([500]) == [slice(0, 1)]


def test_only_so_many_shards_are_under_way_at_a_time() -> None:
    submitted, finished = [], []
    with ThreadPoolExecutor(3) as pool:

        def submit(item: int) -> Any:
            submitted.append(item)
            assert len(submitted) - len(finished) <= 3
            return pool.submit(lambda: item)

        for result in bounded(submit, range(20), 3):
            finished.append(result)
    assert sorted(finished) == list(range(20))


def test_a_manifest_is_read_as_it_was_written(files: Path) -> None:
    target = files.parent / "set"
    manifest = pack(read(files), str(target), run=in_threads(1))
    again = read_manifest(Storage(str(target)))
    assert isinstance(again, Manifest)
    assert again == manifest
