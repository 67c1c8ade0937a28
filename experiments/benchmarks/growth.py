"""How training on COCO grows from 1 to 64 GPUs, on paper: step, data, checkpoints and evaluation.

    python experiments/benchmarks/growth.py [--images-per-s 10] [--gbit 10] [--scorer-s 48] [--output FILE]

Nothing is measured here. What the model needs is counted from `experiments/coco/r50-1x.yaml`, what scoring takes is
from experiments/results/evaluation.md, all else is an option. Each GPU is a machine of its own and gets as many images
a step as with 8 GPUs in the recipe, two; the global batch grows with them, and the learning rate has to follow.

    compute     images of a GPU / rate, times 1 + spread * E[largest of G standard normals]: all wait for the slowest
    exchange    a ring's 2 (G - 1) / G of the gradients over the network; beside the backward pass, two thirds of the
                compute, but for the last bucket of 25 MB that DDP sends
    data        images of a GPU / rate of its loader processes; images of all / rate of the store; both beside compute
    checkpoint  weights and momentum copied to the host, as often as pays (Daly 2006) where a machine lives for a day
    evaluation  images / (G * rate), then scoring, for which all GPUs wait: one head on each rank, on a processor core
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

from mimicdet import MimicDet
from mimiclab.experiment import load_experiment
from mimiclab.interval import best_interval

RECIPE = Path(__file__).parents[1] / "coco" / "r50-1x.yaml"
SIZES = (1, 2, 4, 8, 16, 32, 64)
# COCO 2017: images, classes; heads that an evaluation scores: student, teacher, and the student on the teacher's boxes.
NUM_TRAIN, NUM_VAL, NUM_CLASSES, NUM_HEADS = 118_287, 5_000, 80, 3
IMAGES_PER_GPU = 2
BUCKET = 25e6
DAY_S = 24 * 3600.0


@dataclass(frozen=True)
class Growth:
    """What one training takes on a number of GPUs; all but `hours` and `efficiency` in seconds."""

    gpus: int
    compute: float
    exchange: float
    """What of it is not hidden behind the backward pass."""
    data: float
    step: float
    checkpoint_share: float
    """Of the time of training."""
    evaluation: float
    scoring: float
    hours: float
    efficiency: float
    """Hours of one GPU / (GPUs * hours)."""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images-per-s", type=float, default=10.0, help="training, of one GPU")
    parser.add_argument("--eval-images-per-s", type=float, default=30.0, help="both heads, of one GPU")
    parser.add_argument("--spread", type=float, default=0.05, help="standard deviation of a step over its mean")
    parser.add_argument("--gbit", type=float, default=10.0, help="network of a machine, gigabits a second each way")
    parser.add_argument("--loader-images-per-s", type=float, default=100.0, help="of the loader processes of one GPU")
    parser.add_argument("--store-images-per-s", type=float, default=12_500.0, help="for all; 2 GB/s of 160 kB each")
    parser.add_argument("--copy-gb-per-s", type=float, default=5.0, help="from a GPU to its host")
    parser.add_argument("--scorer-s", type=float, default=48.0, help="scoring and analysis of one head")
    parser.add_argument("--output", type=Path, help="file for the Markdown; it is printed anyway")
    args = parser.parse_args()
    config = load_experiment(RECIPE, environ={"MIMICLAB_DATA": "."}).experiment
    model = MimicDet(config.model, NUM_CLASSES, pretrained=False)
    num_bytes = 4 * sum(each.numel() for each in model.parameters() if each.requires_grad)
    first = grow(1, num_bytes, config.optim.epochs, args)
    rows = [grow(gpus, num_bytes, config.optim.epochs, args, first.hours) for gpus in SIZES]
    text = "\n".join([f"Gradients: {num_bytes / 1e6:.0f} MB.", "", *table(rows)]) + "\n"
    print(text)
    if args.output:
        args.output.write_text(text)


def grow(gpus: int, num_bytes: int, epochs: int, args: argparse.Namespace, alone: float | None = None) -> Growth:
    """Work out one row.

    Args:
        gpus: how many.
        num_bytes: of the gradients.
        epochs: of the training, each with an evaluation.
        args: the rates.
        alone: hours of one GPU.
    """
    calm = IMAGES_PER_GPU / args.images_per_s
    compute = calm * (1 + args.spread * largest_of(gpus))
    network = args.gbit * 1e9 / 8
    ring = 2 * (gpus - 1) / gpus / network
    exchange = ring * BUCKET + max(0.0, ring * (num_bytes - BUCKET) - 2 / 3 * calm)
    data = max(IMAGES_PER_GPU / args.loader_images_per_s, IMAGES_PER_GPU * gpus / args.store_images_per_s)
    step = max(compute + exchange, data)
    interval = best_interval(step, 2 * num_bytes / (args.copy_gb_per_s * 1e9), DAY_S / gpus)
    evaluation, scoring = NUM_VAL / (gpus * args.eval_images_per_s), math.ceil(NUM_HEADS / gpus) * args.scorer_s
    training = math.ceil(NUM_TRAIN / (IMAGES_PER_GPU * gpus)) * step / (1 - interval.loss)
    hours = epochs * (training + evaluation + scoring) / 3600
    efficiency = (alone or hours) / (gpus * hours)
    return Growth(gpus, compute, exchange, data, step, interval.loss, evaluation, scoring, hours, efficiency)


def largest_of(num: int) -> float:
    """Expected largest of so many standard normals (Blom 1958: the quantile at (num - 3/8) / (num + 1/4))."""
    return 0.0 if num == 1 else NormalDist().inv_cdf((num - 0.375) / (num + 0.25))


def table(rows: list[Growth]) -> list[str]:
    """Markdown, a line for each number of GPUs."""
    lines = [
        "| GPUs | compute, ms | exchange, ms | data, ms | step, ms | checkpoints | evaluation, s | scoring, s | hours "
        "| efficiency |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        times = [f"{1000 * each:.0f}" for each in (row.compute, row.exchange, row.data, row.step)]
        cells = [*times, f"{row.checkpoint_share:.2%}", f"{row.evaluation:.0f}", f"{row.scoring:.0f}"]
        lines.append(f"| {row.gpus} | {' | '.join(cells)} | {row.hours:.2f} | {row.efficiency:.2f} |")
    return lines


if __name__ == "__main__":
    main()
