"""Where a training step and an inference of MimicDet spend their time, and where they wait for the device.

    python experiments/benchmarks/hotspots.py [--short] [--trace FOLDER] [--output FILE]
    python experiments/benchmarks/hotspots.py --device cuda --precision bf16 --batch 16

The first table of each is by operator, from torch.profiler. The second lists what makes the host wait for a GPU's
results: operators whose outcome Python or an output's shape needs, and numbers that are made on the host and copied
(`lift_fresh` is torch's name for them). They are counted on any device, by the line of the package that calls them.
Moves between devices, as of images and targets, are not among them.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from machine import surroundings
from peers import OURS, Setting, arguments, detector, report, settings
from torch import Tensor
from torch.autograd.profiler_util import EventList
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from training import training_step

import mimicdet

# Operators that copy a number to the host, or whose output is as long as the data says.
WAITS = (
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
    "lift_fresh",
    "masked_select",
    "nms",
    "nonzero",
    "unique_dim",
)
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


Waits = Counter[tuple[str, str]]


class _Operators(TorchDispatchMode):
    """Counts the operators of WAITS, and lookups by a mask, by the line of the package that calls them."""

    def __init__(self, counted: Waits) -> None:
        super().__init__()
        self.counted = counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = (
            [index for index in args[1] if index is not None] if name in ("index", "index_put", "index_put_") else []
        )
        if name in WAITS or any(isinstance(mask, Tensor) and mask.dtype == torch.bool for mask in masks):
            self.counted[name, _caller()] += 1
        return func(*args, **(kwargs or {}))


class _Lists(TorchFunctionMode):
    """Counts calls of `tolist`, which is no operator."""

    def __init__(self, counted: Waits) -> None:
        super().__init__()
        self.counted = counted

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.tolist:
            self.counted["tolist", _caller()] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def count_waits() -> Iterator[Waits]:
    """Count, by operator and calling line, what waits for a GPU's results."""
    counted: Waits = Counter()
    with _Operators(counted), _Lists(counted):
        yield counted


def _caller() -> str:
    package = str(Path(mimicdet.__file__).parent)
    for frame in reversed(traceback.extract_stack()):
        if frame.filename.startswith(package):
            return f"{Path(frame.filename).name}: {frame.line}"
    return "outside of mimicdet"


def _waits_table(waits: Waits) -> str:
    rows = [f"| {name} | `{line}` | {num} |" for (name, line), num in sorted(waits.items(), key=lambda item: -item[1])]
    return "\n".join([f"| waits: {waits.total()} | where | times |", "|---|---|---|", *rows])


if __name__ == "__main__":
    main()
