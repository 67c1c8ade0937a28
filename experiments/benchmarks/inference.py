"""Time of one inference: MimicDet's deployed path against torchvision's RetinaNet, same backbone and image.

    python experiments/benchmarks/inference.py [--height 480 --width 640 --repeats 5]

Weights are random, which is fine for time as long as both sides post-process alike: thresholds are set so that no
candidate passes on either, and the figure is that of the networks. Sides take turns within one process; printed
are medians with the spread and the median of the paired ratios.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
import torchvision
from torch import Tensor

from mimicdet import MimicDet, ModelConfig
from mimicdet.config import BackboneConfig, InferenceConfig

NUM_CLASSES = 80


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    torch.manual_seed(0)
    image = torch.rand(3, args.height, args.width)
    sides = {"MimicDet": _mimicdet(), "RetinaNet": _retinanet(min(image.shape[1:]), max(image.shape[1:]))}
    times = _take_turns(sides, image, args.repeats)

    print(
        f"ResNet-50, {args.height} x {args.width}, batch 1, fp32, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, {platform.machine()}"
    )
    print("| | median s | min | max |\n|---|---|---|---|")
    for name, values in times.items():
        print(f"| {name} | {statistics.median(values):.3f} | {min(values):.3f} | {max(values):.3f} |")
    ratios = [theirs / ours for ours, theirs in zip(times["MimicDet"], times["RetinaNet"], strict=True)]
    print(f"RetinaNet / MimicDet: {statistics.median(ratios):.2f} x (median of {len(ratios)} pairs)")


def _mimicdet() -> Callable[[Tensor], object]:
    config = ModelConfig(backbone=BackboneConfig(name="resnet50"), inference=InferenceConfig(score_threshold=0.999))
    model = MimicDet(config, NUM_CLASSES).eval()
    # A random start has GroupNorm where the peer has the cheaper BatchNorm: the ratio errs against MimicDet.
    return lambda image: model.detect([image])


def _retinanet(short: int, long: int) -> Callable[[Tensor], object]:
    model = torchvision.models.detection.retinanet_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=NUM_CLASSES,
        min_size=short,
        max_size=long,
        score_thresh=0.999,
    ).eval()

    def detect(image: Tensor) -> object:
        with torch.no_grad():
            return model([image])

    return detect


def _take_turns(sides: dict[str, Callable[[Tensor], object]], image: Tensor, repeats: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, detect in sides.items():
            started = time.perf_counter()
            detect(image)
            if repeat:  # the first of each warms up
                times[name].append(time.perf_counter() - started)
    return times


if __name__ == "__main__":
    main()
