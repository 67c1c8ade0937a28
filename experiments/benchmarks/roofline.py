"""How close MimicDet comes to the machine: its arithmetic a second against what matrices and copies reach there.

    python experiments/benchmarks/roofline.py [--short] [--batch 1] [--rounds 7] [--output FILE]
    python experiments/benchmarks/roofline.py --device cuda --precision bf16 --batch 16 --rounds 30

Multiplications of matrices and convolutions are counted by torch (`FlopCounterMode`, two operations for each
multiplication and addition) and divided by wall-clock time, in turns with one large matrix product, a wide 3 x 3
convolution as the pyramid and the peers' heads have them, and a copy of memory. Work that is not counted, as norms,
sampling and NMS, makes the share smaller.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from inference import inference
from machine import surroundings
from peers import OURS, Setting, arguments, report, settings, take_turns
from torch.utils.flop_counter import FlopCounterMode
from training import training_step

# Large enough for the rate to have come to its end.
MATRIX_SIDE = {"cpu": 4096, "cuda": 16384}
COPIED_BYTES = {"cpu": 2**29, "cuda": 2**32}
MATRIX, CONVOLUTION, COPY = "matrix product", "3 x 3 convolution, 256 channels, 1/8", "copy of memory"
TRAINING, INFERENCE = "training step", "inference"


def main() -> None:
    """Run the benchmark and write what was measured."""
    parser = arguments(__doc__)
    parser.add_argument("--batch", type=int, default=1)
    args = parser.parse_args()
    (setting,) = settings(args, [args.batch])
    sides = {
        MATRIX: _matrix(setting),
        CONVOLUTION: _convolution(setting),
        COPY: _copy(setting),
        TRAINING: training_step(OURS, setting),
        INFERENCE: torch.inference_mode()(inference(OURS, setting)),
    }
    operations = {name: _operations(act) for name, act in sides.items() if name != COPY}
    times = take_turns(sides, args.rounds, setting.device)
    report(
        [
            f"{setting}; {args.rounds} rounds. {surroundings('torch', 'torchvision', device=args.device)}.",
            _table(times, operations),
            f"The copy: {_per_second(times[COPY], 2 * COPIED_BYTES[setting.device.type]) / 1e9:.1f} GB/s, read and "
            "written.",
        ],
        args.output,
    )


def _matrix(setting: Setting) -> Callable[[], object]:
    side = MATRIX_SIDE[setting.device.type]
    left, right = (torch.rand(side, side, device=setting.device, dtype=setting.dtype) for _ in range(2))
    return lambda: left @ right


@torch.inference_mode()
def _convolution(setting: Setting) -> Callable[[], object]:
    layer = torch.nn.Conv2d(256, 256, 3, padding=1).to(setting.device, setting.dtype)
    shape = (setting.batch, 256, setting.height // 8, setting.width // 8)
    features = torch.rand(shape, device=setting.device, dtype=setting.dtype).to(memory_format=torch.channels_last)
    return torch.inference_mode()(lambda: layer(features))


def _copy(setting: Setting) -> Callable[[], object]:
    source = torch.zeros(COPIED_BYTES[setting.device.type], dtype=torch.uint8, device=setting.device)
    target = torch.ones_like(source)
    return lambda: target.copy_(source)


def _operations(act: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        act()
    return counter.get_total_flops()


def _per_second(seconds: list[float], amount: int) -> float:
    return amount / statistics.median(seconds)


def _table(times: dict[str, list[float]], operations: dict[str, int]) -> str:
    rates = {name: _per_second(times[name], operations[name]) for name in operations}
    rows = ["| | GMAC | median s | GMAC/s | of the matrix product | of the convolution |", "|---|---|---|---|---|---|"]
    for name, rate in rates.items():
        shown = [f"{operations[name] / 2e9:.1f}", f"{statistics.median(times[name]):.3f}", f"{rate / 2e9:.1f}"]
        shown += [f"{rate / rates[peak]:.0%}" for peak in (MATRIX, CONVOLUTION)]
        rows.append(f"| {' | '.join([name, *shown])} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
