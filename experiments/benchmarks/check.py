"""Speed and memory of `mimiclab data check` on a set of the size and the form of COCO's training set.

    python experiments/benchmarks/check.py [--images 118000 --annotations 860000 --files 1000 --repeats 3]

The annotation file is drawn, with polygons, into a temporary folder (340 MB as it is by default), and so are the
JPEG files, 640 x 480. Annotations a second are parsing and all checks of one file, in a process of its own, with its
peak memory; CPU seconds leave out what else the machine is busy with. Images a second are reading, hashing and
decoding, in threads as the check has them, and one at a time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from machine import surroundings
from PIL import Image

from mimiclab.data.flaws import find_flaws
from mimiclab.data.listing import read_listing
from mimiclab.data.probe import probe_image, probe_images

SIZE = (640, 480)


def main() -> None:
    """Run the benchmark and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=118_000)
    parser.add_argument("--annotations", type=int, default=860_000)
    parser.add_argument("--files", type=int, default=1_000)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mimiclab-check-") as folder:
        _measure_annotations(Path(folder), args.images, args.annotations, args.repeats)
        _measure_images(Path(folder), args.files, args.repeats)


def _measure_annotations(folder: Path, num_images: int, num_annotations: int, repeats: int) -> None:
    path = folder / "instances.json"
    draw_annotations(path, num_images, num_annotations)
    size = path.stat().st_size
    # A process for each: peak memory is that of the process.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        runs = [pool.apply(_check_annotations, (path,)) for _ in range(repeats)]
    wall, cpu, memory = (sorted(values) for values in zip(*runs, strict=True))
    path.unlink()
    print(f"{num_annotations} annotations of {num_images} images, {size / 1e6:.0f} MB:")
    for name, seconds in (("second", wall), ("CPU second", cpu)):
        print(
            f"  annotations a {name}: median {num_annotations / statistics.median(seconds):.0f}, "
            f"{num_annotations / seconds[-1]:.0f} to {num_annotations / seconds[0]:.0f}"
        )
    print(f"  peak memory: {memory[-1] / size:.1f} x the file")


def draw_annotations(path: Path, num_images: int, num_annotations: int) -> None:
    """Write a sound annotation file with COCO's keys, 80 classes and a polygon of 5 to 30 points for each object."""
    draw = random.Random(0)
    width, height = SIZE
    with path.open("w") as file:
        file.write('{"images": [')
        for number in range(num_images):
            name = f"{number:012d}.jpg"
            url = f"http://images.cocodataset.org/train2017/{name}"
            entry = {"license": 4, "file_name": name, "coco_url": url, "height": height, "width": width, "id": number}
            file.write((", " if number else "") + json.dumps(entry))
        file.write('], "annotations": [')
        for number in range(num_annotations):
            w, h = draw.uniform(2, width / 3), draw.uniform(2, height / 3)
            x, y = draw.uniform(0, width - w), draw.uniform(0, height - h)
            points = [(x + draw.random() * w, y + draw.random() * h) for _ in range(draw.choice((5, 8, 12, 18, 30)))]
            entry = {
                "segmentation": [[round(value, 2) for point in points for value in point]],
                "area": round(0.7 * w * h, 4),
                "iscrowd": 0,
                "image_id": draw.randrange(num_images),
                "bbox": [round(value, 2) for value in (x, y, w, h)],
                "category_id": draw.randint(1, 80),
                "id": number,
            }
            file.write((", " if number else "") + json.dumps(entry))
        categories = [{"id": number, "name": f"class {number}"} for number in range(1, 81)]
        file.write('], "categories": ' + json.dumps(categories) + "}")


def _check_annotations(path: Path) -> tuple[float, float, int]:
    before, wall, cpu = _peak(), time.perf_counter(), time.process_time()
    find_flaws(read_listing(path))
    return time.perf_counter() - wall, time.process_time() - cpu, _peak() - before


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _measure_images(folder: Path, num: int, repeats: int) -> None:
    draw = np.random.default_rng(0)
    paths = [folder / f"{number}.jpg" for number in range(num)]
    for path in paths:
        coarse = Image.fromarray(draw.integers(0, 256, (60, 80, 3), dtype=np.uint8)).resize(SIZE)
        noise = draw.integers(-12, 13, (*reversed(SIZE), 3))
        Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8)).save(path, quality=90)
    threads, single = [], []
    for _ in range(repeats):
        started = time.perf_counter()
        probe_images(paths, lambda _: None)
        between = time.perf_counter()
        for path in paths:
            probe_image(path)
        threads.append(between - started)
        single.append(time.perf_counter() - between)
    size = statistics.mean(path.stat().st_size for path in paths)
    print(
        f"{num} JPEG files of {SIZE[0]} x {SIZE[1]}, {size / 1e3:.0f} kB each; {surroundings('pillow')}: "
        f"median {num / statistics.median(threads):.0f} images/s in threads, "
        f"{num / statistics.median(single):.0f} one at a time"
    )


if __name__ == "__main__":
    main()
