"""Packed data on a store that speaks S3's protocol: moto's server on loopback, and a proxy that makes it fail."""

import contextlib
import json
import re
import socket
import socketserver
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from buckets import bucket_server
from PIL import Image
from torch.utils.data import DataLoader

from mimicdet import ModelConfig
from mimicdet.config import AnchorConfig, BackboneConfig, PyramidConfig, StudentConfig, TeacherConfig
from mimiclab import storage as storage_module
from mimiclab.build import build_detector
from mimiclab.cli import main
from mimiclab.data import pack as pack_module
from mimiclab.data.coco import CocoDataset, read_coco
from mimiclab.data.dataset import TrainBatches
from mimiclab.data.manifest import MANIFEST, read_manifest
from mimiclab.data.order import Order
from mimiclab.data.pack import pack
from mimiclab.data.parallel import in_threads
from mimiclab.data.shards import read_packed
from mimiclab.data.splits import locate, read_splits
from mimiclab.engine import Engine
from mimiclab.errors import UserError
from mimiclab.optim import OptimConfig
from mimiclab.schema import DataConfig, Split
from mimiclab.storage import Storage

pytestmark = pytest.mark.server
NUM_IMAGES = 11
BUCKET = "data"


class Proxy(socketserver.ThreadingTCPServer):
    """Passes bytes on; a connection that reads a key of `failures` is cut, so many times."""

    daemon_threads = True

    def __init__(self, target: tuple[str, int]) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.target = target
        self.failures: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"


class _Connection(socketserver.BaseRequestHandler):
    server: Proxy

    def handle(self) -> None:
        with socket.create_connection(self.server.target) as store:
            answers = threading.Thread(target=self._pass_on, args=(store, self.request), daemon=True)
            answers.start()
            self._pass_on(self.request, store)
            answers.join()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while content := source.recv(1 << 16):
                read = re.match(rb"GET /data/[^? ]*?([^/? ]+)[? ]", content)
                if read:
                    name = read[1].decode()
                    self.server.reads[name] += 1
                    if self.server.failures[name] > 0:
                        self.server.failures[name] -= 1
                        break
                target.sendall(content)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    with bucket_server(BUCKET) as address:
        host, _, port = address.rpartition(":")
        proxy = Proxy((host, int(port)))
        thread = threading.Thread(target=proxy.serve_forever, daemon=True)
        thread.start()
        yield proxy
        proxy.shutdown()
        proxy.server_close()


def uri(proxy: Proxy, name: str) -> str:
    return f"s3://{BUCKET}/{name}?scheme=http&endpoint_override={proxy.address}"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proxy: Proxy) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home cache"))
    monkeypatch.setattr(pack_module, "SHARD_IMAGES", 4)
    proxy.failures.clear()
    proxy.reads.clear()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(NUM_IMAGES):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(root / f"{i}.jpg")
        images.append({"id": i, "file_name": f"{i}.jpg", "width": 64, "height": 64})
        annotations.append({"id": i, "image_id": i, "category_id": 1, "bbox": [5 + i, 6, 30, 30]})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (root / "instances.json").write_text(json.dumps(content))
    return root


def plain(files: Path) -> CocoDataset:
    return read_coco(files / "instances.json", files)


@pytest.fixture(scope="module")
def remote(proxy: Proxy, files: Path) -> str:
    """A packed set on the store, by the command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack_module, "SHARD_IMAGES", 4)
        address = uri(proxy, "sets/one")
        with pytest.raises(SystemExit) as exit_:
            main(["data", "pack", str(files / "instances.json"), address, "--images", str(files)])
        assert exit_.value.code == 0
    return address


def test_what_is_packed_to_a_store_is_what_is_packed_to_a_folder(remote: str, files: Path, tmp_path: Path) -> None:
    pack(plain(files), str(tmp_path / "set"), run=in_threads(1))
    storage = Storage(remote)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "set").iterdir()}
    assert {name: storage.read(name) for name in storage.sizes()} == expected


def test_interrupted_on_a_store_it_goes_on(proxy: Proxy, files: Path, remote: str) -> None:
    address = uri(proxy, "sets/interrupted")
    made = []

    def two(function, items):
        for task in items:
            if len(made) == 2:
                raise KeyboardInterrupt
            made.append(task.number)
            yield function(task)

    with pytest.raises(KeyboardInterrupt):
        pack(plain(files), address, run=two)
    storage = Storage(address)
    assert MANIFEST not in storage.sizes()
    proxy.reads.clear()
    manifest = pack(plain(files), address, run=in_threads(2))
    assert manifest == read_manifest(Storage(remote))
    assert sorted(storage.sizes()) == sorted(Storage(remote).sizes())


@pytest.mark.parametrize("processes", [0, 2])
def test_batches_from_a_store_are_those_of_the_files(remote: str, files: Path, processes: int) -> None:
    def batches(dataset: CocoDataset) -> TrainBatches:
        order = Order(len(dataset.images), 3, seed=0)
        return TrainBatches(dataset, order, short=48, long=64, flip=0.5, rank=0, world=1)

    # With an empty cache, so that the loader's processes fetch what they need.
    dataset = read_packed(remote)
    loader = DataLoader(batches(dataset), batch_size=None, sampler=range(6), num_workers=processes)
    for step, batch in enumerate(loader):
        expected = batches(plain(files))[step]
        assert batch.image_ids == expected.image_ids
        assert all(torch.equal(a, b) for a, b in zip(batch.images, expected.images, strict=True))
        for target, other in zip(batch.targets, expected.targets, strict=True):
            assert all(torch.equal(target[name], other[name]) for name in other)


def test_an_engine_trains_from_a_store(remote: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    split = Split(packed=remote)
    data = locate(DataConfig(train=split, val=split, cache=str(tmp_path / "cache")))
    assert data.train == split
    splits = read_splits(data)
    torch.manual_seed(0)
    model = ModelConfig(
        backbone=BackboneConfig(name="resnet18", width=16),
        pyramid=PyramidConfig(channels=16, max_level=5),
        anchors=AnchorConfig(scale=2),
        student=StudentConfig(head_width=32),
        teacher=TeacherConfig(num_rois=16, num_convs=1),
    )
    detector = build_detector(model, splits.train.classes)
    order = Order(len(splits.train.images), 2, seed=0)
    engine = Engine(detector, OptimConfig(global_batch=2), num_steps=10, steps_per_epoch=order.steps_per_epoch)
    batches = TrainBatches(splits.train, order, short=64, long=64, flip=0.5, rank=0, world=1)
    means = engine.train_step(batches[0])
    assert torch.isfinite(means["loss"])
    assert list((tmp_path / "cache").glob("*.parquet"))


def test_a_shard_is_fetched_once(remote: str, proxy: Proxy) -> None:
    for _ in range(2):
        for record in read_packed(remote).images:
            record.encoded()
    assert [proxy.reads[f"shard-{number:05d}.parquet"] for number in range(3)] == [
        proxy.reads["shard-00000.parquet"]
    ] * 3
    again = Counter(proxy.reads)
    for record in read_packed(remote).images:
        record.encoded()
    assert all(proxy.reads[name] == again[name] for name in again if name.startswith("shard"))


def test_a_read_that_fails_twice_works_then(remote: str, proxy: Proxy, files: Path) -> None:
    proxy.failures["shard-00001.parquet"] = 2
    dataset = read_packed(remote)
    assert dataset.images[5].encoded() == plain(files).images[5].encoded()
    assert proxy.failures["shard-00001.parquet"] == 0


def test_a_read_that_never_works_names_the_key(remote: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "_ATTEMPTS", 1)  # of 6 s each: the client below has a patience of its own
    dataset = read_packed(remote)
    proxy.failures["shard-00001.parquet"] = 10**6
    with pytest.raises(UserError, match=r"s3://data/sets/one/shard-00001\.parquet: cannot be read, tried 1 times: "):
        dataset.images[5].encoded()
    # The error is of that file only.
    assert dataset.images[0].encoded()


def test_what_is_not_there_is_named(proxy: Proxy) -> None:
    with pytest.raises(UserError, match=r"s3://data/none/manifest\.json: there is no such file"):
        read_packed(uri(proxy, "none"))
    with pytest.raises(UserError, match=r"s3://none/x/manifest\.json: there is no such file"):
        read_packed(f"s3://none/x?scheme=http&endpoint_override={proxy.address}")
