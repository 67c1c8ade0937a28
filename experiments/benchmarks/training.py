"""Time and memory of one training step: MimicDet against torchvision's RetinaNet and Faster R-CNN.

    python experiments/benchmarks/training.py [--short] [--batch 1] [--compile] [--output FILE]
    python experiments/benchmarks/training.py --device cuda --precision bf16 --batch 16 --rounds 30

A step is forward, losses, backward and SGD with momentum, fused. The learning rate is 0: the work is the same and the
weights stay as they were drawn, so that every step has as many candidates as the first one. Both detectors with
proposals have 2000 of them, Faster R-CNN samples 512 and MimicDet 128 for the teacher and 128 for the student, as
published. Sides take turns in one process; peers are run in both memory formats, with --compile both sides also with
their dense parts compiled; the fastest form counts, of either side. The student alone, MimicDet without its teacher, is
the control of what the teacher and mimicking add.

Peak memory, uncompiled, is that of a process of its own for each side: resident memory on a CPU, over what it was
before the detector was built; on a GPU what torch had allocated, the detector included.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
from collections.abc import Callable

import torch
from machine import surroundings
from peers import (
    ALONE,
    COMPILED,
    OURS,
    Setting,
    arguments,
    best,
    best_forms,
    detector,
    forms,
    name_of,
    report,
    settings,
    table,
    take_turns,
)
from torch import nn

COMPARED = ("RetinaNet", "Faster R-CNN")
MEMORY_STEPS = 3


def main() -> None:
    """Run the benchmark and write what was measured."""
    parser = arguments(__doc__)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="also with the dense parts compiled, on both sides")
    parser.add_argument("--no-memory", action="store_true", help="measure time alone")
    args = parser.parse_args()
    (setting,) = settings(args, [args.batch])
    names = [form for name in (OURS, ALONE, *COMPARED) for form in forms(name, args.compile)]
    # Before this process's own detectors: there may be no room for more.
    memory = "" if args.no_memory else _memory_table(setting, [form for form in names if not form.endswith(COMPILED)])
    times = take_turns({name: training_step(name, setting) for name in names}, args.rounds, setting.device)
    ours = best(times, OURS)
    ratios = [both / alone for both, alone in zip(times[ours], times[best(times, ALONE)], strict=True)]
    parts = [
        f"Training step: {setting}; {args.rounds} rounds. {surroundings('torch', 'torchvision', device=args.device)}.",
        table(times, ours),
        best_forms(times),
        f"Teacher and mimicking add {statistics.median(ratios) - 1:.0%} to the time of the student alone.",
        memory,
    ]
    report([part for part in parts if part], args.output)


def training_step(form: str, setting: Setting) -> Callable[[], None]:
    """A function that trains a form of a detector by one step."""
    net = detector(form, setting).train()
    images, targets = setting.images(), setting.targets(first_label=int(name_of(form) == "Faster R-CNN"))
    optimizer = torch.optim.SGD(_trainable(net), lr=0.0, momentum=0.9, weight_decay=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with setting.autocast():
            losses = net(images, targets)
            total = torch.stack([loss.mean() for loss in losses.values()]).sum()
        total.backward()
        optimizer.step()

    return step


def _trainable(net: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in net.parameters() if parameter.requires_grad]


def _memory_table(setting: Setting, names: list[str]) -> str:
    peaks = {}
    for name in names:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peaks[name] = pool.apply(_peak, (name, setting, torch.get_num_threads()))
    ours = peaks[OURS]
    rows = [f"| {name} | {peak / 2**20:.0f} | {peak / ours:.2f} |" for name, peak in peaks.items()]
    return "\n".join(["| peak memory of training | MiB | ratio |", "|---|---|---|", *rows])


def _peak(name: str, setting: Setting, threads: int) -> int:
    torch.set_num_threads(threads)
    before = _resident()
    step = training_step(name, setting)
    for _ in range(MEMORY_STEPS):
        step()
    return torch.cuda.max_memory_allocated() if setting.device.type == "cuda" else _resident() - before


def _resident() -> int:
    """Most resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
