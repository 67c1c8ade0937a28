"""Time of inference: MimicDet's deployed path against torchvision's RetinaNet, FCOS and Faster R-CNN.

    python experiments/benchmarks/inference.py [--short] [--compile] [--output FILE]
    python experiments/benchmarks/inference.py --device cuda --precision bf16 --rounds 50 --compile

Batches of 1 and of 8 images, from pixels to detections. A threshold that no score reaches leaves no candidate to the
last NMS of any side: the figures are those of the networks and of choosing where to look, which is 1000 positions for
MimicDet and 1000 proposals for Faster R-CNN. Sides take turns in one process; peers are run in both memory formats,
and with --compile also with backbone and heads compiled, as is MimicDet; the fastest form counts, of either side.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from peers import (
    OURS,
    PEERS,
    Setting,
    arguments,
    best_forms,
    detector,
    report,
    settings,
    surroundings,
    table,
    take_turns,
)
from torch import nn

LAST, COMPILED = ", channels last", ", compiled"
# What is compiled of each detector, where it is there: the parts without choices that depend on the data.
DENSE_PARTS = ("backbone", "pyramid", "refinement", "head", "rpn.head", "roi_heads.box_head")


def main() -> None:
    """Run the benchmark and write what was measured."""
    parser = arguments(__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    ours, forms = [OURS], ["", LAST]
    if args.compile:
        ours, forms = [OURS, OURS + COMPILED], [*forms, LAST + COMPILED]
    parts = []
    for setting in settings(args, args.batch):
        names = ours + [peer + form for peer in PEERS for form in forms]
        with torch.inference_mode():
            times = take_turns({name: inference(name, setting) for name in names}, args.rounds, setting.device)
        against = min(ours, key=lambda name: sorted(times[name])[len(times[name]) // 2])
        parts += [f"Inference: {setting}; {args.rounds} rounds.", table(times, against), best_forms(times, against)]
    report([f"{surroundings(setting.device)}.", *parts], args.output)


def inference(name: str, setting: Setting) -> Callable[[], object]:
    """A function that runs `name` once; it may end in LAST, COMPILED or both."""
    plain = name.removesuffix(COMPILED)
    peer = plain.removesuffix(LAST)
    net = detector(peer, setting, channels_last=peer != plain).eval()
    if plain != name:
        _compile(net)
    images = setting.images()

    def detect() -> object:
        with setting.autocast():
            return net(images)

    return detect


def _compile(net: nn.Module) -> None:
    for part in DENSE_PARTS:
        try:
            net.get_submodule(part).compile()
        except AttributeError:  # another detector's
            continue


if __name__ == "__main__":
    main()
