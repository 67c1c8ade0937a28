"""Reading packed data: the same batches as from the files, and every damage named."""

import errno
import fcntl
import io
import json
import os
import pickle
import resource
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as F

from mimiclab import storage as storage_module
from mimiclab.data import pack as pack_module
from mimiclab.data.cache import NodeCache, default_folder, locked
from mimiclab.data.coco import CocoDataset, coco_ground_truth, content_hash, read_coco
from mimiclab.data.dataset import EvalBatches, TrainBatches, check_images
from mimiclab.data.manifest import INDEX, MANIFEST, File, read_manifest
from mimiclab.data.order import Order, Stream, sample_key, uniform
from mimiclab.data.pack import pack
from mimiclab.data.parallel import in_threads
from mimiclab.data.shards import read_packed
from mimiclab.data.splits import locate, pack_splits, read_splits
from mimiclab.data.transforms import padded_size, resized_size
from mimiclab.errors import UserError
from mimiclab.experiment import differences, identity, load_experiment
from mimiclab.schema import DataConfig, Split
from mimiclab.storage import Storage

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_IMAGES = 17
SHORT, LONG = 32, 48


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home cache"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of several formats, modes and sizes, photographs as JPEG among them, one rotated by EXIF."""
    root = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(1)
    images, annotations = [], []
    for i in range(NUM_IMAGES):
        width, height = 30 + 7 * (i % 5), 70 - 3 * i
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        image = image.convert(("RGB", "L", "CMYK", "RGB")[i % 4])
        name = f"{i}.jpg" if i % 4 == 2 or i % 2 else f"{i}.png"
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(root / name, **({"exif": exif} if i == 3 else {}))
        images.append({"id": 100 + i, "file_name": name, "width": width, "height": height})
        for j in range(i % 4):
            box = [j + 0.1, j / 3, 5 + i / 7, 9.9]
            annotations.append({"id": len(annotations), "image_id": 100 + i, "category_id": 1 + j % 2, "bbox": box})
            annotations[-1]["iscrowd"] = int(i == 7)
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "instances.json").write_text(json.dumps(content))
    return root


def read(files: Path) -> CocoDataset:
    return read_coco(files / "instances.json", files)


@pytest.fixture
def folder(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, packed into three shards."""
    monkeypatch.setattr(pack_module, "SHARD_IMAGES", 7)
    pack(read(files), str(tmp_path / "set"), run=in_threads(2))
    return tmp_path / "set"


def train_batches(dataset: CocoDataset) -> TrainBatches:
    order = Order(len(dataset.images), 4, seed=5)
    return TrainBatches(dataset, order, short=SHORT, long=LONG, flip=0.5, rank=0, world=1)


Sample = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def as_before_packing(files: Path, index: int, key: int | None) -> Sample:
    """How a sample was read before there was packed data, from the file itself: pixels, boxes, labels, crowds."""
    content = json.loads((files / "instances.json").read_text())
    image = sorted(content["images"], key=lambda item: item["id"])[index]
    objects = [item for item in content["annotations"] if item["image_id"] == image["id"]]
    with Image.open(files / image["file_name"]) as file:
        pixels = torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1).contiguous()
    boxes = torch.tensor([item["bbox"] for item in objects], dtype=torch.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    boxes = boxes.float()
    height, width = pixels.shape[1:]
    new_width, new_height = resized_size(width, height, SHORT, LONG)
    pixels = F.resize(pixels, [new_height, new_width], antialias=True)
    boxes = boxes * torch.tensor([new_width, new_height]).float().repeat(2) / torch.tensor([width, height]).repeat(2)
    if key is not None and uniform(key, Stream.FLIP) < 0.5:
        pixels = F.horizontal_flip(pixels)
        x1, y1, x2, y2 = boxes.unbind(1)
        boxes = torch.stack([new_width - x2, y1, new_width - x1, y2], dim=1)
    labels = torch.tensor([item["category_id"] - 1 for item in objects], dtype=torch.int64)
    return pixels, boxes, labels, torch.tensor([bool(item["iscrowd"]) for item in objects], dtype=torch.bool)


@pytest.mark.parametrize("processes", [0, 2])
def test_training_batches_are_bit_for_bit_those_of_the_files(files: Path, folder: Path, processes: int) -> None:
    packed = train_batches(read_packed(str(folder)))
    slots_of = packed.order.slots
    loader = DataLoader(packed, batch_size=None, sampler=range(1, 9), num_workers=processes)
    flipped = 0
    for step, batch in zip(range(1, 9), loader, strict=True):
        expected = [as_before_packing(files, slot.index, slot.key) for slot in slots_of(step)]
        for image, target, (pixels, boxes, labels, crowds) in zip(batch.images, batch.targets, expected, strict=True):
            assert torch.equal(image, pixels)
            assert torch.equal(target["boxes"], boxes)
            assert torch.equal(target["labels"], labels)
            assert torch.equal(target["iscrowd"], crowds)
        assert [int(target["key"]) for target in batch.targets] == [slot.key for slot in slots_of(step)]
        assert batch.image_ids == [100 + slot.index for slot in slots_of(step)]
        assert batch.pad_to == padded_size((image.shape[2], image.shape[1]) for image in batch.images)
        flipped += sum(uniform(slot.key, Stream.FLIP) < 0.5 for slot in slots_of(step))
        plain = train_batches(read(files))[step]
        assert all(torch.equal(a, b) for a, b in zip(plain.images, batch.images, strict=True))
    assert 5 < flipped < 27


def test_evaluation_batches_are_bit_for_bit_those_of_the_files(files: Path, folder: Path) -> None:
    batches = EvalBatches(read_packed(str(folder)), short=SHORT, long=LONG, batch_size=5)
    seen = 0
    for item in range(len(batches)):
        for image, target in zip(batches[item].images, batches[item].targets, strict=True):
            pixels, boxes, labels, crowds = as_before_packing(files, seen, None)
            assert torch.equal(image, pixels)
            assert torch.equal(target["boxes"], boxes)
            assert torch.equal(target["labels"], labels)
            assert torch.equal(target["iscrowd"], crowds)
            assert int(target["key"]) == sample_key(0, 0, seen)
            seen += 1
    assert seen == NUM_IMAGES


def test_a_packed_set_is_the_set_that_was_packed(files: Path, folder: Path) -> None:
    plain, packed = read(files), read_packed(str(folder))
    assert packed.columns.digest() == plain.columns.digest()
    assert (packed.classes, packed.category_ids) == (plain.classes, plain.category_ids)
    assert coco_ground_truth(packed) == coco_ground_truth(plain)
    assert content_hash(packed) == packed.content == read_manifest(Storage(str(folder))).content
    check_images(packed)


def test_opening_reads_no_shard(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for shard in folder.glob("shard-*"):
        shard.write_bytes(b"\0" * shard.stat().st_size)
    dataset = read_packed(str(folder))
    assert len(dataset.images) == NUM_IMAGES
    with pytest.raises(UserError):
        dataset.images[0].encoded()


def test_it_travels_to_other_processes_and_threads(files: Path, folder: Path) -> None:
    dataset = read_packed(str(folder))
    dataset.images[0].encoded()
    again = pickle.loads(pickle.dumps(dataset))
    expected = [record.encoded() for record in read(files).images]
    assert [record.encoded() for record in again.images] == expected
    with ThreadPoolExecutor(8) as pool:
        positions = [position % NUM_IMAGES for position in range(400)]
        assert list(pool.map(dataset.source.read, positions)) == [expected[position] for position in positions]


def damaged(path: Path, content: bytes | None) -> str:
    path.unlink() if content is None else path.write_bytes(content)
    return str(path)


def test_damage_that_shows_is_named_before_training_starts(folder: Path) -> None:
    shard, index, manifest = folder / "shard-00001.parquet", folder / INDEX, folder / MANIFEST
    sound = {path: path.read_bytes() for path in (shard, index, manifest)}
    record = json.loads(sound[manifest])

    def changed(**keys: object) -> bytes:
        return json.dumps({**record, **keys}).encode()

    cases = [
        (shard, None, "the manifest lists it, and there is no such file"),
        (shard, sound[shard][: len(sound[shard]) // 2], f"the manifest says {len(sound[shard])}"),
        (index, None, "the manifest lists it, and there is no such file"),
        (index, sound[index][:-1], "it is damaged"),
        (index, sound[index][:-1] + b"\0", "it differs from the manifest"),
        (manifest, None, "expected a data set that `mimiclab data pack` has finished"),
        (manifest, sound[manifest][:100], "not JSON"),
        (manifest, b"[]", "not the manifest of a packed data set"),
        (manifest, changed(format="other"), "not the manifest of a packed data set"),
        (manifest, changed(version=2), "its schema version is 2, this MimicLab reads version 1"),
        (manifest, changed(shards=[{"name": "x"}]), "it is damaged"),
        (manifest, changed(surplus=1), "it is damaged"),
    ]
    for path, content, message in cases:
        damaged(path, content)
        with pytest.raises(UserError) as error:
            read_packed(str(folder))
        assert str(error.value).startswith(f"{path}: "), message
        assert message in str(error.value)
        path.write_bytes(sound[path])
    assert len(read_packed(str(folder)).images) == NUM_IMAGES


def test_damage_that_only_reading_shows_is_named(folder: Path) -> None:
    dataset = read_packed(str(folder))
    path = folder / "shard-00001.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    read_packed(str(folder))
    with pytest.raises(
        UserError, match=r"shard-00001\.parquet: image \d+\.(jpg|png) in it is not what the set's index"
    ):
        [record.encoded() for record in dataset.images]


def test_a_disk_that_fails_is_named_with_the_image(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pread(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    dataset = read_packed(str(folder))
    monkeypatch.setattr("os.pread", pread)
    with pytest.raises(UserError, match=r"9\.jpg in .*/shard-00001\.parquet: cannot be read: Input/output error"):
        dataset.images[9].encoded()


def test_a_set_that_is_packed_anew_under_a_reader_is_named(
    files: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = read_packed(str(folder))
    for path in folder.iterdir():
        path.unlink()
    value = json.loads((files / "instances.json").read_text())
    value["images"] = value["images"][::-1][:12]
    (files / "fewer.json").write_text(json.dumps(value))
    pack(read_coco(files / "fewer.json", files), str(folder), run=in_threads(1))
    with pytest.raises(UserError, match="expected the set to be packed again"):
        dataset.images[0].encoded()
    with pytest.raises(UserError, match=r"shard-00002\.parquet: cannot be read: No such file"):
        dataset.images[16].encoded()


def test_what_is_no_packed_set_is_named(tmp_path: Path) -> None:
    for uri in (str(tmp_path), str(tmp_path / "none")):
        with pytest.raises(UserError, match=rf"{uri}/manifest\.json: there is no such file, expected a data set that"):
            read_packed(uri)
    with pytest.raises(UserError, match="abc://bucket/x: cannot be opened as a folder or URI"):
        read_packed("abc://bucket/x")


def test_a_folder_may_be_given_as_a_uri(folder: Path) -> None:
    dataset = read_packed(folder.as_uri())
    assert dataset.origin == str(folder)
    assert dataset.images[0].encoded()
    assert not default_folder().exists()


def test_where_copies_are_kept_is_not_part_of_what_a_run_is(folder: Path, tmp_path: Path) -> None:
    text = f"name: x\ndata: {{train: {{packed: {folder}}}, val: {{packed: {folder}}}}}\n"
    (tmp_path / "x.yaml").write_text(text)
    overrides = ("data.cache=/elsewhere", "data.cache_gb=5")
    here, there = (load_experiment(tmp_path / "x.yaml", keys).experiment for keys in ((), overrides))
    assert there.data.cache_gb == 5
    assert identity(here) == identity(there)
    moved = load_experiment(tmp_path / "x.yaml", ("data.train.packed=/moved",)).experiment
    assert identity(here) != identity(moved)
    assert differences(here, moved) == [f'data.train.packed: "{folder}" -> "/moved"']


class Counting(Storage):
    """A storage that counts what is fetched from it."""

    fetched: list[str]

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.fetched = []

    def download(self, name, file) -> None:
        self.fetched.append(name)
        super().download(name, file)


class Failing(Storage):
    """A storage whose reads fail so many times, each after some bytes; then they work."""

    def __init__(self, uri: str, failures: int) -> None:
        super().__init__(uri)
        self.failures = failures

    def _open(self):
        system, folder = super()._open()
        return SimpleNamespace(get_file_info=system.get_file_info, open_input_stream=self._stream(system)), folder

    def _stream(self, system):
        def open_input_stream(path):
            stream = system.open_input_stream(path)
            if self.failures:
                self.failures -= 1
                stream = io.BytesIO(stream.read(700))
                read, stream.read = stream.read, lambda *_: read(500) or self._fail()
            return stream

        return open_input_stream

    def _fail(self):
        raise OSError("connection lost")


def test_a_read_that_fails_twice_is_whole_then(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "_FIRST_PAUSE_S", 0.01)
    storage, cache = Failing(str(folder), failures=2), NodeCache(tmp_path / "cache")
    shard = read_manifest(Storage(str(folder))).shards[1]
    with cache.open(storage, shard) as file:
        assert file.read() == (folder / shard.name).read_bytes()
    assert storage.failures == 0
    storage.failures = 99
    with pytest.raises(UserError, match=r"shard-00002\.parquet: cannot be read, tried 3 times: connection lost"):
        cache.open(storage, read_manifest(Storage(str(folder))).shards[2])
    assert storage.failures == 96
    storage.failures = 0
    with pytest.raises(UserError, match="nothing: there is no such file"):
        storage.read("nothing")


def test_a_machine_fetches_every_file_once(folder: Path, tmp_path: Path) -> None:
    storage, cache = Counting(str(folder)), NodeCache(tmp_path / "cache")
    shards = read_manifest(storage).shards
    barrier = threading.Barrier(8)

    def fetch(number: int) -> bytes:
        barrier.wait()
        with cache.open(storage, shards[number % 2]) as file:
            return file.read()

    with ThreadPoolExecutor(8) as pool:
        contents = list(pool.map(fetch, range(8)))
    assert contents == [(folder / shards[number % 2].name).read_bytes() for number in range(8)]
    assert sorted(storage.fetched) == [shards[0].name, shards[1].name]


def test_a_cache_keeps_what_was_asked_for_last(folder: Path, tmp_path: Path) -> None:
    storage = Counting(str(folder))
    a, b, c = read_manifest(storage).shards
    cache = NodeCache(tmp_path / "cache", max_bytes=a.bytes + b.bytes + c.bytes - 1)
    opened = {shard: cache.open(storage, shard) for shard in (a, b)}
    cache.open(storage, a).close()
    cache.open(storage, c).close()  # removes b, which nobody asked for since
    assert {path.stem for path in cache.folder.glob("[!.]*")} == {a.sha256, c.sha256}
    assert opened[b].read() == (folder / b.name).read_bytes()
    assert storage.fetched == [a.name, b.name, c.name]
    NodeCache(tmp_path / "tiny", max_bytes=1).open(storage, a).close()
    assert {path.stem for path in (tmp_path / "tiny").glob("[!.]*")} == {a.sha256}


def test_a_copy_that_differs_from_the_manifest_is_not_kept(folder: Path, tmp_path: Path) -> None:
    storage, cache = Storage(str(folder)), NodeCache(tmp_path / "cache")
    shard = read_manifest(storage).shards[1]
    path = folder / shard.name
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=r"shard-00001\.parquet: its checksum is \w+, the set's manifest says"):
        cache.open(storage, shard)
    assert not list(cache.folder.glob("*.parquet*"))
    assert not list(cache.folder.glob(".*part"))


def test_half_a_copy_is_fetched_again(folder: Path, tmp_path: Path) -> None:
    expected = [record.encoded() for record in read_packed(str(folder)).images]
    for _ in range(2):
        dataset = read_packed(str(folder), cache=tmp_path / "cache")
        assert [record.encoded() for record in dataset.images] == expected
        for path in (tmp_path / "cache").glob("*.parquet"):
            path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize("name", [INDEX, "shard-00001.parquet"])
def test_a_copy_that_was_damaged_is_named_and_replaced(folder: Path, tmp_path: Path, name: str) -> None:
    def every() -> list[bytes]:
        return [record.encoded() for record in read_packed(str(folder), cache=tmp_path / "cache").images]

    expected = every()
    manifest = read_manifest(Storage(str(folder)))
    (file,) = (file for file in (manifest.index, *manifest.shards) if file.name == name)
    copy = tmp_path / "cache" / f"{file.sha256}.parquet"
    content = bytearray(copy.read_bytes())
    content[len(content) // 3] ^= 1
    copy.write_bytes(content)
    with pytest.raises(UserError, match=rf"^{copy}: .* this copy of {folder / name} was damaged, and is removed"):
        every()
    assert every() == expected


def test_a_cache_too_small_for_those_who_share_it_serves_them_all(folder: Path, tmp_path: Path) -> None:
    storage = Storage(str(folder))
    shards = read_manifest(storage).shards
    expected = [(folder / shard.name).read_bytes() for shard in shards]

    def ask(first: int) -> bool:
        cache = NodeCache(tmp_path / "cache", max_bytes=1)
        for number in range(first, first + 60):
            with cache.open(storage, shards[number % 3]) as file:
                if file.read() != expected[number % 3]:
                    return False
        return True

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(ask, range(6)))


def test_another_user_s_copy_is_used_though_its_time_cannot_be_set(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, cache = Counting(str(folder)), NodeCache(tmp_path / "cache")
    shard = read_manifest(storage).shards[0]
    cache.open(storage, shard).close()

    def utime(*_: object, **__: object) -> None:  # tests may run as root, who may set any file's
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr("os.utime", utime)
    with cache.open(storage, shard) as file:
        assert file.read() == (folder / shard.name).read_bytes()
    assert storage.fetched == [shard.name]


def test_a_process_that_was_forked_meanwhile_does_not_keep_a_lock(tmp_path: Path) -> None:
    with locked(tmp_path / "lock"):
        child = os.fork()
        if child == 0:
            signal.pause()
    try:
        with (tmp_path / "lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_cache_without_room_is_named(folder: Path, tmp_path: Path) -> None:
    cache = NodeCache(tmp_path / "cache")
    shard = read_manifest(Storage(str(folder))).shards[0]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (shard.bytes // 2, before[1]))
    try:
        with pytest.raises(
            UserError, match=rf"data\.cache: {cache.folder} cannot keep a copy of {folder / shard.name}"
        ):
            cache.open(Storage(str(folder)), shard)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with cache.open(Storage(str(folder)), shard) as file:
        assert file.read() == (folder / shard.name).read_bytes()


def test_a_cache_that_cannot_be_written_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=rf"data\.cache: {tmp_path}/file/cache cannot keep a copy of"):
        NodeCache(tmp_path / "file" / "cache").open(Storage(str(folder)), File("x", 0, 0, "0"))


def test_an_experiment_reads_packed_data_through_a_cache(files: Path, folder: Path, tmp_path: Path) -> None:
    split = Split(packed=str(folder))
    data = locate(DataConfig(train=split, val=split, cache=str(tmp_path / "cache")))
    splits = read_splits(DataConfig.model_validate_json(data.model_dump_json()))
    assert [record.encoded() for record in splits.train.images] == [record.encoded() for record in read(files).images]
    assert len(list((tmp_path / "cache").glob("*.parquet"))) == 4
    assert pack_splits(data, splits, tmp_path / "storage", pytest.fail) == data


def test_plain_files_are_packed_once_until_they_change(files: Path, tmp_path: Path) -> None:
    split = Split(annotations=str(files / "instances.json"), images=str(files))
    data = DataConfig(train=split, val=split)
    splits, said = read_splits(data), []
    packed = pack_splits(data, splits, tmp_path / "storage", said.append)
    assert packed.train == packed.val
    assert packed.train is not None
    assert packed.train.packed is not None
    assert len(said) == 1
    assert f"packing {NUM_IMAGES} images of {files}/instances.json into {packed.train.packed}" in said
    read_again = read_splits(packed)
    assert read_again.train.columns.digest() == splits.train.columns.digest()
    assert pack_splits(data, splits, tmp_path / "storage", pytest.fail) == packed
    image = files / "0.png"
    before = image.read_bytes()
    Image.new("RGB", (30, 70)).save(image)
    changed = pack_splits(data, read_splits(data), tmp_path / "storage", said.append)
    image.write_bytes(before)
    assert changed.train != packed.train
    assert read_splits(changed).train.content != read_again.train.content


def test_trials_that_start_together_pack_once(files: Path, tmp_path: Path) -> None:
    split = Split(annotations=str(files / "instances.json"), images=str(files))
    data = DataConfig(train=split, val=split)
    splits, said = read_splits(data), []
    with ThreadPoolExecutor(4) as pool:
        packed = {
            result.model_dump_json()
            for result in pool.map(lambda _: pack_splits(data, splits, tmp_path / "storage", said.append), range(4))
        }
    assert len(packed) == len(said) == 1
    assert len(list((tmp_path / "storage").glob("*/manifest.json"))) == 1


def test_a_storage_that_cannot_hold_packed_data_is_named(files: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    split = Split(annotations=str(files / "instances.json"), images=str(files))
    data = DataConfig(train=split, val=split)
    with pytest.raises(UserError, match=rf"{tmp_path}/file/x: packed data cannot be written there: "):
        pack_splits(data, read_splits(data), tmp_path / "file" / "x", pytest.fail)


def test_data_is_either_packed_or_files(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"either packed, or annotations and images, must be given; found annotations"):
        Split(packed="x", annotations="y")
    with pytest.raises(ValueError, match=r"images\n.*Field required"):
        Split(annotations="y")
    with pytest.raises(ValueError, match=r"(?s)annotations\n.*images\n"):
        Split()
    assert Split(packed="x").model_dump() == {"packed": "x"}
    assert Split(annotations="x", images="y").model_dump() == {"annotations": "x", "images": "y"}


def test_what_is_wrong_with_a_packed_set_is_said_by_its_key(tmp_path: Path, files: Path, folder: Path) -> None:
    value = json.loads((files / "instances.json").read_text())
    (tmp_path / "empty.json").write_text(json.dumps({**value, "annotations": []}))
    pack(read_coco(tmp_path / "empty.json", files), str(tmp_path / "empty"), run=in_threads(1))
    sound = Split(packed=str(folder))
    with pytest.raises(UserError, match=r"data\.val\.packed: .*/empty has no object in its 17 images; expected"):
        read_splits(DataConfig(train=sound, val=Split(packed=str(tmp_path / "empty"))))
