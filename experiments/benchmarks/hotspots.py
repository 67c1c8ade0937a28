"""Where a training step and an inference of MimicDet spend their time, and where they wait for the device.

    python experiments/benchmarks/hotspots.py [--short] [--trace FOLDER] [--output FILE]
    python experiments/benchmarks/hotspots.py --device cuda --precision bf16 --batch 16

The first table of each is by operator, from torch.profiler. The second lists what makes the host wait for a GPU's
results (waits.py), by the line of the package that calls it, on any device.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from machine import surroundings
from peers import OURS, Setting, arguments, detector, report, settings
from torch.autograd.profiler_util import EventList
from torch.profiler import ProfilerActivity, profile
from training import training_step
from waits import Waits, count_waits

NUM_OPERATORS = 20


def main() -> None:
    """Profile both and write the summary."""
    parser = arguments(__doc__)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--trace", type=Path, help="folder for the traces, which are large")
    args = parser.parse_args()
    (setting,) = settings(args, [args.batch])
    parts = [f"{setting}. {surroundings('torch', 'torchvision', device=args.device)}."]
    for name, act in (("Training step", training_step(OURS, setting)), ("Inference", _inference(setting))):
        act()
        with count_waits() as waits:
            act()
        events = _profile(act, setting.device, args.trace and args.trace / f"{name.split()[0].lower()}.json")
        parts += [f"## {name}", _operators(events, setting.device), _waits_table(waits)]
    report(parts, args.output)


def _inference(setting: Setting) -> Callable[[], object]:
    net, images = detector(OURS, setting).eval(), setting.images()

    def detect() -> object:
        with torch.no_grad(), setting.autocast():
            return net(images)

    return detect


def _profile(act: Callable[[], object], device: torch.device, trace: Path | None) -> EventList:
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler:
        act()
    if trace is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(trace))
    return profiler.key_averages()


def _operators(events: EventList, device: torch.device) -> str:
    kind = "device" if device.type == "cuda" else "cpu"
    times = {event.key: (getattr(event, f"self_{kind}_time_total"), event.count) for event in events}
    whole = sum(spent for spent, _ in times.values())
    longest = sorted(times.items(), key=lambda item: -item[1][0])[:NUM_OPERATORS]
    rows = [f"| {key} | {spent / 1e3:.1f} | {spent / whole:.1%} | {num} |" for key, (spent, num) in longest]
    return "\n".join(["| operator | ms itself | share | calls |", "|---|---|---|---|", *rows])


def _waits_table(waits: Waits) -> str:
    rows = [f"| {name} | `{line}` | {num} |" for (name, line), num in sorted(waits.items(), key=lambda item: -item[1])]
    return "\n".join([f"| waits: {waits.total()} | where | times |", "|---|---|---|", *rows])


if __name__ == "__main__":
    main()
