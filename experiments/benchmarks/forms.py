"""What each faster form of MimicDet buys: with all of them, and with one taken back at a time.

    python experiments/benchmarks/forms.py [--short] [--output FILE]

A training step and an inference, in one process, in turns. The forms compute the same, which tests hold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from inference import inference
from machine import surroundings
from peers import OURS, Setting, arguments, report, settings, table, take_turns
from torch import Tensor
from torchvision.ops import FrozenBatchNorm2d
from training import training_step

from mimicdet import backbone, detector, pooling

ALL = "as it is"


def _channels_first(*args: Any) -> Tensor:
    return _BATCH_IMAGES(*args).contiguous()


_BATCH_IMAGES = detector.batch_images
TAKEN_BACK: dict[str, Callable[[], Any]] = {
    ALL: lambda: mock.patch.object(pooling, "CELLS_PER_BIN", pooling.CELLS_PER_BIN),
    "P2's convolution everywhere": lambda: mock.patch.object(pooling, "CELLS_PER_BIN", float("inf")),
    "frozen norms by themselves": lambda: mock.patch.dict(backbone._NORMS, {"frozen_bn": FrozenBatchNorm2d}),
    "images channels first": lambda: mock.patch.object(detector, "batch_images", _channels_first),
}


def main() -> None:
    """Run the benchmark and write what was measured."""
    parser = arguments(__doc__)
    parser.add_argument("--batch", type=int, default=1)
    args = parser.parse_args()
    (setting,) = settings(args, [args.batch])
    parts = [f"{setting}; {args.rounds} rounds. {surroundings('torch', 'torchvision', device=args.device)}."]
    trained = take_turns(
        {name: _form(name, training_step, setting) for name in TAKEN_BACK}, args.rounds, setting.device
    )
    parts += ["Training step:", table(trained, ALL)]
    with torch.inference_mode():
        # The teacher's level is not there.
        names = [name for name in TAKEN_BACK if not name.startswith("P2")]
        found = take_turns({name: _form(name, inference, setting) for name in names}, args.rounds, setting.device)
    parts += ["Inference:", table(found, ALL)]
    report(parts, args.output)


def _form(name: str, make: Callable[[str, Setting], Callable[[], object]], setting: Setting) -> Callable[[], object]:
    """What `make` gives for MimicDet, built and run with one form taken back."""
    with TAKEN_BACK[name]():
        act = make(OURS, setting)

    def run() -> None:
        with TAKEN_BACK[name]():
            act()

    return run


if __name__ == "__main__":
    main()
