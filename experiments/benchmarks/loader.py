"""Reading training data: MimicLab's packed sets against torchvision's CocoDetection and pycocotools.

    python experiments/benchmarks/loader.py [--data bccd,scenes,start] [--repeats 5] [--threads 2]

Images per second: both sides decode, resize to the same sizes and give uint8 tensors with boxes and labels, in the
same order, batches of 8, through a DataLoader with the same number of processes; the main process has the same number
of torch's threads, by default one for every CPU. The peer resizes tensors, which is the faster of its two ways. Sides
take turns within one process, data in the page cache; printed are medians with the spread, and the median of the
paired ratios. BCCD is looked for in $MIMICLAB_DATA.

Start-up: the time to the first batch of a packed set the size of COCO (118,000 images, 860,000 objects), against
pycocotools' `COCO(...)` of the same annotations, which reads no image and holds no polygons here.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import surroundings
from PIL import Image
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import CocoDetection
from torchvision.transforms.v2 import functional as F

from mimiclab.data.coco import read_coco
from mimiclab.data.dataset import TrainBatches
from mimiclab.data.loader import load
from mimiclab.data.order import Order
from mimiclab.data.pack import pack
from mimiclab.data.parallel import in_threads
from mimiclab.data.scenes import generate_scenes
from mimiclab.data.shards import read_packed
from mimiclab.data.transforms import resized_size

BATCH = 8
IMAGES_PER_PASS = 600
START_IMAGES, START_OBJECTS = 118_000, 860_000


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", default="bccd,scenes,start", help="which of them")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count() or 1, help="torch's threads in the main process, of both sides"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{surroundings('torch', 'torchvision')}; {args.threads} threads")
    with tempfile.TemporaryDirectory() as folder:
        for name in args.data.split(","):
            {"bccd": _bccd, "scenes": _scenes, "start": _start}[name](Path(folder), args.repeats)


def _bccd(folder: Path, repeats: int) -> None:
    root = Path(os.environ.get("MIMICLAB_DATA", Path(__file__).parents[3] / "shared" / "data")) / "bccd"
    annotations, images = root / "annotations" / "instances_train.json", root / "train"
    _throughput("BCCD, 640 x 480 to 320 x 240", annotations, images, folder / "bccd", (240, 320), repeats)
    _throughput("BCCD, 640 x 480 as it is", annotations, images, folder / "bccd", (480, 640), repeats)


def _scenes(folder: Path, repeats: int) -> None:
    paths = generate_scenes(folder / "scenes", seed=0, num_train=400, num_val=1, size=128)
    _throughput(
        "scenes, 128 x 128", paths.train_annotations, paths.train_images, folder / "scenes-packed", (128, 128), repeats
    )


def _throughput(
    title: str, annotations: Path, images: Path, packed: Path, bounds: tuple[int, int], repeats: int
) -> None:
    plain = read_coco(annotations, images)
    pack(plain, str(packed), run=in_threads(2))
    order = Order(len(plain.images), BATCH, seed=0)
    steps = range(IMAGES_PER_PASS // BATCH)
    short, long = bounds
    label_of = {category_id: label for label, category_id in enumerate(plain.category_ids)}

    def transforms(image: Image.Image, objects: list[dict[str, Any]]) -> tuple[Tensor, dict[str, Tensor]]:
        width, height = resized_size(*image.size, short, long)
        boxes = torch.tensor([item["bbox"] for item in objects], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        target = {
            "boxes": boxes * torch.tensor([width / image.width, height / image.height]).repeat(2),
            "labels": torch.tensor([label_of[item["category_id"]] for item in objects], dtype=torch.int64),
        }
        return F.resize(F.pil_to_tensor(image), [height, width], antialias=True), target

    with contextlib.redirect_stdout(io.StringIO()):
        peer = CocoDetection(str(images), str(annotations), transforms=transforms)

    def theirs(processes: int) -> Iterator[Any]:
        batches = [[slot.index for slot in order.slots(step)] for step in steps]
        return iter(DataLoader(peer, batch_sampler=batches, num_workers=processes, collate_fn=list))

    def ours(processes: int) -> Iterator[Any]:
        # The set is opened anew: nothing that an earlier pass has left in the object counts.
        batches = TrainBatches(read_packed(str(packed)), order, short=short, long=long, flip=0, rank=0, world=1)
        return load(batches, steps, processes=processes, threads=torch.get_num_threads())

    print(f"\n{title}: images per second\n\n| processes | | median | min | max |\n|---|---|---|---|---|")
    for processes in (0, 2):
        sides: dict[str, Callable[[int], Iterator[Any]]] = {"MimicLab": ours, "CocoDetection": theirs}
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for repeat in range(repeats + 1):
            for name in list(sides)[:: 1 if repeat % 2 else -1]:
                rate = _rate(sides[name](processes))
                if repeat:  # the first of each warms up
                    rates[name].append(rate)
        for name, values in rates.items():
            print(f"| {processes} | {name} | {statistics.median(values):.0f} | {min(values):.0f} | {max(values):.0f} |")
        ratios = [ours / theirs for ours, theirs in zip(rates["MimicLab"], rates["CocoDetection"], strict=True)]
        print(f"| {processes} | ratio | {statistics.median(ratios):.2f} | {min(ratios):.2f} | {max(ratios):.2f} |")


def _rate(batches: Iterator[Any]) -> float:
    """Images per second after the first batch, which processes take their time to start for."""
    next(batches)
    started = time.perf_counter()
    num = sum(BATCH for _ in batches)
    return num / (time.perf_counter() - started)


def _start(folder: Path, repeats: int) -> None:
    annotations = _write_large(folder / "large")
    pack(read_coco(annotations, annotations.parent), str(folder / "large-packed"), run=in_threads(2))

    def ours() -> object:
        dataset = read_packed(str(folder / "large-packed"))
        order = Order(len(dataset.images), BATCH, seed=0)
        return TrainBatches(dataset, order, short=48, long=64, flip=0.5, rank=0, world=1)[0]

    def theirs() -> object:
        with contextlib.redirect_stdout(io.StringIO()):
            return COCO(str(annotations))

    times: dict[str, list[float]] = {"MimicLab, first batch": [], "pycocotools, COCO(...)": []}
    for repeat in range(repeats + 1):
        for name, start in zip(times, (ours, theirs), strict=True):
            started = time.perf_counter()
            start()
            if repeat:
                times[name].append(time.perf_counter() - started)
    print(f"\n{START_IMAGES} images, {START_OBJECTS} objects: seconds\n\n| | median | min | max |\n|---|---|---|---|")
    for name, values in times.items():
        print(f"| {name} | {statistics.median(values):.2f} | {min(values):.2f} | {max(values):.2f} |")
    ratios = [ours / theirs for ours, theirs in zip(*times.values(), strict=True)]
    print(f"| ratio | {statistics.median(ratios):.3f} | {min(ratios):.3f} | {max(ratios):.3f} |")


def _write_large(folder: Path) -> Path:
    """Annotations of COCO's size; all images are one small file."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(folder / "000000000139.jpg")
    corners = rng.uniform(0, 30, (START_OBJECTS, 4)).round(2).tolist()
    owners = rng.integers(0, START_IMAGES, START_OBJECTS).tolist()
    content = {
        "images": [
            {"id": number, "file_name": "000000000139.jpg", "width": 64, "height": 48} for number in range(START_IMAGES)
        ],
        "annotations": [
            {
                "id": number,
                "image_id": owner,
                "category_id": 1 + number % 80,
                "bbox": [x, y, 1 + width / 2, 1 + height / 2],
                "area": width * height,
                "iscrowd": 0,
            }
            for number, (owner, (x, y, width, height)) in enumerate(zip(owners, corners, strict=True))
        ],
        "categories": [{"id": 1 + number, "name": f"class {number}"} for number in range(80)],
    }
    path = folder / "instances.json"
    path.write_text(json.dumps(content))
    return path


if __name__ == "__main__":
    main()
