"""Time of inference: MimicDet's deployed path against torchvision's RetinaNet, FCOS and Faster R-CNN.

    python experiments/benchmarks/inference.py [--short] [--compile] [--output FILE]
    python experiments/benchmarks/inference.py --device cuda --precision bf16 --rounds 50 --compile

Batches of 1 and of 8 images, from pixels to detections. A threshold that no score reaches leaves no candidate to the
last NMS of any side: the figures are those of the networks and of choosing where to look, which is 1000 positions for
MimicDet and 1000 proposals for Faster R-CNN. Sides take turns in one process; peers are run in both memory formats,
and with --compile both sides also with their dense parts compiled; the fastest form counts, of either side.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from machine import surroundings
from peers import (
    OURS,
    PEERS,
    Setting,
    arguments,
    best,
    best_forms,
    detector,
    forms,
    report,
    settings,
    table,
    take_turns,
)


def main() -> None:
    """Run the benchmark and write what was measured."""
    parser = arguments(__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--compile", action="store_true", help="also with the dense parts compiled, on both sides")
    args = parser.parse_args()
    names = [form for name in (OURS, *PEERS) for form in forms(name, args.compile)]
    parts = []
    for setting in settings(args, args.batch):
        torch.compiler.reset()  # or a second batch size would be compiled for any
        with torch.inference_mode():
            times = take_turns({name: inference(name, setting) for name in names}, args.rounds, setting.device)
        parts += [f"Inference: {setting}; {args.rounds} rounds.", table(times, best(times, OURS)), best_forms(times)]
    report([f"{surroundings('torch', 'torchvision', device=args.device)}.", *parts], args.output)


def inference(form: str, setting: Setting) -> Callable[[], object]:
    """A function that runs a form of a detector once."""
    net = detector(form, setting).eval()
    images = setting.images()

    def detect() -> object:
        with setting.autocast():
            return net(images)

    return detect


if __name__ == "__main__":
    main()
