"""What the speed benchmarks share: both sides of a comparison, their input, taking turns, and tables.

The peers are torchvision's own detectors on torchvision's own ResNet-50 with FPN, as its builders put them together
from published weights: frozen norms, stem and C2 frozen. Weights are random on both sides. Nothing of the work depends
on them but how many candidates there are, and these are made equal: see `detector` and the two benchmarks.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.resnet import Bottleneck
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from mimicdet import MimicDet, ModelConfig
from mimicdet.config import BackboneConfig, InferenceConfig, TeacherConfig

OURS, ALONE = "MimicDet", "MimicDet, student alone"
PEERS = ("RetinaNet", "FCOS", "Faster R-CNN")
# What may stand behind a detector's name, in this order: the forms in which it is measured.
LAST, COMPILED = ", channels last", ", compiled"
# What is compiled of each detector: the parts without choices that depend on the data.
DENSE_PARTS = {
    OURS: ("backbone", "pyramid", "refinement"),
    ALONE: ("backbone", "pyramid", "refinement"),
    "RetinaNet": ("backbone", "head"),
    "FCOS": ("backbone", "head"),
    "Faster R-CNN": ("backbone", "rpn.head", "roi_heads.box_head"),
}
NUM_CLASSES = 80
NUM_OBJECTS = 8  # COCO has 7.3 in an image
# No random weights give a score above this: no side has candidates for the last NMS.
NO_SCORE = 0.999
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Setting:
    """Where and on what is measured.

    Attributes:
        device: cpu or cuda.
        dtype: of autocast, None without it.
        batch: images.
        height, width: of each image, in pixels.
    """

    device: torch.device
    dtype: torch.dtype | None
    batch: int
    height: int
    width: int

    def autocast(self) -> torch.autocast:
        """A context in which matrix products have this precision."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def images(self) -> list[Tensor]:
        """Random images, float in [0, 1], the same whenever asked."""
        draw = torch.Generator().manual_seed(0)
        return [torch.rand(3, self.height, self.width, generator=draw).to(self.device) for _ in range(self.batch)]

    def targets(self, first_label: int) -> list[dict[str, Tensor]]:
        """Random objects of 16 px to half of the image, the same whenever asked, classes from `first_label`."""
        draw = torch.Generator().manual_seed(1)
        size = torch.tensor([self.width, self.height])
        targets = []
        for number in range(self.batch):
            side = 16 * (size / 32) ** torch.rand(NUM_OBJECTS, 2, generator=draw)
            corner = torch.rand(NUM_OBJECTS, 2, generator=draw) * (size - side)
            labels = torch.randint(NUM_CLASSES, (NUM_OBJECTS,), generator=draw) + first_label
            target = {"boxes": torch.cat([corner, corner + side], 1), "labels": labels, "key": torch.tensor(number)}
            targets.append({name: value.to(self.device) for name, value in target.items()})
        return targets

    def __str__(self) -> str:
        precision = next(name for name, dtype in PRECISIONS.items() if dtype == self.dtype)
        device = "cuda" if self.device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
        return f"ResNet-50, {self.height} x {self.width}, batch {self.batch}, {precision}, {device}"


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Options that both benchmarks have."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=list(PRECISIONS), default="fp32")
    parser.add_argument("--height", type=int, default=800)
    parser.add_argument("--width", type=int, default=1344)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--short", action="store_true", help="480 x 640, 3 rounds, one batch size")
    parser.add_argument("--output", type=Path, help="markdown file that is replaced")
    return parser


def settings(args: argparse.Namespace, batches: Sequence[int]) -> list[Setting]:
    """What is measured, by the options, for each batch size."""
    if args.short:
        args.height, args.width, args.rounds, batches = 480, 640, 3, batches[:1]
    device, dtype = torch.device(args.device), PRECISIONS[args.precision]
    return [Setting(device, dtype, batch, args.height, args.width) for batch in batches]


def forms(name: str, compiled: bool) -> list[str]:
    """The forms in which a detector is measured: peers in both memory formats, MimicDet arranges its own."""
    found = [name, name + LAST] if name in PEERS else [name]
    return [*found, found[-1] + COMPILED] if compiled else found


def name_of(form: str) -> str:
    """The detector of a form."""
    return form.removesuffix(COMPILED).removesuffix(LAST)


def detector(form: str, setting: Setting) -> nn.Module:
    """MimicDet as configured by default, or a peer as torchvision builds it, on the device.

    A score threshold leaves nothing to the last NMS on any side. Before that each detector has its own: MimicDet looks
    at 1000 positions, Faster R-CNN at 1000 proposals, in training at 2000 both.

    Args:
        form: OURS, ALONE or one of PEERS; after it LAST, COMPILED or both.
        setting: size of the images, and the device.
    """
    torch.manual_seed(0)
    name = name_of(form)
    net = _peer(name, setting) if name in PEERS else _ours(name == OURS)
    for block in net.modules():
        if isinstance(block, Bottleneck):
            block.bn3.weight.fill_(0.2)  # frozen norms of random weights let activations grow from block to block
    if LAST in form:
        net = net.to(memory_format=torch.channels_last)
    if form.endswith(COMPILED):
        for part in DENSE_PARTS[name]:
            net.get_submodule(part).compile()
    return net.to(setting.device)


def _ours(teacher: bool) -> nn.Module:
    # Published weights mean frozen norms and stages; they need not be there for that.
    return MimicDet(
        ModelConfig(
            backbone=BackboneConfig(name="resnet50", weights="IMAGENET1K_V2"),
            teacher=TeacherConfig(enabled=teacher),
            inference=InferenceConfig(score_threshold=NO_SCORE),
        ),
        NUM_CLASSES,
        pretrained=False,
    )


def _peer(name: str, setting: Setting) -> nn.Module:
    # The images have their size already.
    size = {
        "min_size": min(setting.height, setting.width),
        "max_size": max(setting.height, setting.width),
        "_skip_resize": True,
    }
    if name == "Faster R-CNN":
        return FasterRCNN(
            resnet_fpn_backbone(backbone_name="resnet50", weights=None),
            NUM_CLASSES + 1,
            box_score_thresh=NO_SCORE,
            box_nms_thresh=0.6,
            **size,
        )
    trunk = resnet_fpn_backbone(
        backbone_name="resnet50", weights=None, returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256)
    )
    return {"RetinaNet": RetinaNet, "FCOS": FCOS}[name](
        trunk, NUM_CLASSES, score_thresh=NO_SCORE, nms_thresh=0.6, detections_per_img=100, **size
    )


def take_turns(sides: Mapping[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each side in each round, by wall clock; sides alternate, every other round in reverse."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            _wait(device)
            started = time.perf_counter()
            sides[name]()
            _wait(device)
            if number:  # the first round warms up
                times[name].append(time.perf_counter() - started)
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def best(times: Mapping[str, Sequence[float]], name: str) -> str:
    """The form of a detector that is fastest, by the median."""
    return min((form for form in times if name_of(form) == name), key=lambda form: statistics.median(times[form]))


def table(times: Mapping[str, Sequence[float]], against: str) -> str:
    """Markdown: median, spread, and the median of what each round's times are to those of `against`."""
    rows = ["| | median s | min | max | ratio | min | max |", "|---|---|---|---|---|---|---|"]
    for name, seconds in times.items():
        ratios = [theirs / ours for theirs, ours in zip(seconds, times[against], strict=True)]
        shown = [f"{figure(seconds):.3f}" for figure in (statistics.median, min, max)]
        shown += (
            ["", "", ""] if name == against else [f"{figure(ratios):.2f}" for figure in (statistics.median, min, max)]
        )
        rows.append(f"| {' | '.join([name, *shown])} |")
    return "\n".join(rows)


def best_forms(times: Mapping[str, Sequence[float]]) -> str:
    """One line: MimicDet against each peer, both by the form that is fastest."""
    ours = best(times, OURS)
    found = []
    for peer in dict.fromkeys(name_of(form) for form in times if name_of(form) in PEERS):
        theirs = best(times, peer)
        ratio = statistics.median(a / b for a, b in zip(times[theirs], times[ours], strict=True))
        found.append(f"{theirs} / {ours}: {ratio:.2f} x")
    return "Best forms, median of the rounds' ratios: " + "; ".join(found) + "."


def report(parts: Sequence[str], output: Path | None) -> None:
    """Print the parts as one markdown text, and write it where a file is given."""
    text = "\n\n".join(parts) + "\n"
    print(text)
    if output is not None:
        output.write_text(text)
