"""Goodput of one training on up to 1,024 spot machines, simulated: losses one by one or by zone, fixed or elastic.

    python experiments/benchmarks/scale.py

writes docs/plan.png and prints the table of experiments/results/plan.md. Nothing is measured here: what a step, a
checkpoint and a restart take are stated below, and `mimiclab plan` takes yours.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from mimiclab.plan.fleet import Fleet
from mimiclab.plan.job import Job
from mimiclab.plan.quote import Quote, quote, sizes

# 12 epochs of 1.7 million images, 1024 a step; 20 images a second and GPU, a store of 2 GB/s with 160 kB an image.
JOB = Job(
    num_steps=19_922,
    global_batch=1024,
    images_per_s=20.0,
    store_images_per_s=12_500.0,
    checkpoint_s=0.5,
    restart_s=60.0,
)
DAY = 24 * 3600.0
TRACES = {
    "one by one": Fleet(workers=1, mtbf_s=DAY, notice_share=0.5),
    "20 % of a zone at once": Fleet(workers=1, mtbf_s=DAY, notice_share=0.5, zones=3, burst=0.2),
}


def quotes(trace: Fleet, *, elastic: bool, most: int = 1024, runs: int = 20) -> list[Quote]:
    """One line for each size of a fleet."""
    fleets = [replace(trace, workers=num, zones=min(trace.zones, num)) for num in sizes(most)]
    return [quote(JOB, fleet, elastic=elastic, runs=runs) for fleet in fleets]


def draw(found: dict[str, list[Quote]], file: Path) -> None:
    """Goodput and hours against the size of the fleet."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for number, (name, line) in enumerate(found.items()):
        workers = [each.workers for each in line]
        style = {"color": f"C{number // 2}", "linestyle": "--" if number % 2 else "-", "label": name}
        left.plot(workers, [each.spot.goodput for each in line], **style)
        right.plot(workers, [each.spot.total_s / 3600 for each in line], **style)
    calm = next(iter(found.values()))
    right.plot([q.workers for q in calm], [q.calm.total_s / 3600 for q in calm], color="0.6", label="nothing lost")
    left.set(xscale="log", ylim=(0, 1.02), xlabel="GPUs", ylabel="goodput")
    right.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="hours")
    right.legend(fontsize=7, frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)


def main() -> None:
    """Simulate, print the table and draw the figure."""
    found = {
        f"{name}, {'elastic' if elastic else 'fixed'}": quotes(trace, elastic=elastic)
        for name, trace in TRACES.items()
        for elastic in (False, True)
    }
    print(f"| GPUs | limit | nothing lost | {' | '.join(found)} |")
    print("|---" * (len(found) + 3) + "|")
    for line in zip(*found.values(), strict=True):
        cells = [f"{each.spot.total_s / 3600:.2f} h, {each.spot.goodput:.2f}" for each in line]
        print(f"| {line[0].workers} | {line[0].limit} | {line[0].calm.total_s / 3600:.2f} h | {' | '.join(cells)} |")
    file = Path(__file__).parents[2] / "docs" / "plan.png"
    draw(found, file)
    print(f"figure: {file.name}", file=sys.stderr)


if __name__ == "__main__":
    main()
