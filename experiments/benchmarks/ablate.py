"""Compare settings of one experiment over seeds: each is trained alone, on this process's threads, and scored once.

    python experiments/benchmarks/ablate.py experiments/scenes.yaml --seeds 3 --results scenes.jsonl \\
        --set optim.epochs=6 --variant quota --variant plain:model.student.positive_fraction=null

A variant is a name, and after a colon its overrides, joined by semicolons; the first one is what the others are
compared with, seed by seed. Every run adds a line to the results, and what stands there is not run again, so that
the command can be stopped at any time and goes on where it was. Seeds come first: each has all variants before the
next begins. Ends with a table of means and of paired differences with 95 % intervals (Student's t).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mimiclab.build import build_detector
from mimiclab.data.dataset import training_batches
from mimiclab.data.splits import locate, read_splits
from mimiclab.engine import Engine
from mimiclab.evaluate import evaluate
from mimiclab.experiment import load_experiment
from mimiclab.schema import Experiment
from mimiclab.seeds import Statistic


@dataclass(frozen=True)
class Variant:
    """A name, and what it changes of the experiment."""

    name: str
    overrides: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Variant:
        """Read `name` or `name:key=value;key=value`."""
        name, _, overrides = text.partition(":")
        return cls(name, tuple(word for word in overrides.split(";") if word))


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("experiment", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], dest="common")
    parser.add_argument("--variant", action="append", required=True, type=Variant.parse, dest="variants")
    parser.add_argument("--metric", action="append", default=[], help="student/AP, student/AP50 and teacher/AP if none")
    args = parser.parse_args()
    metrics = args.metric or ["student/AP", "student/AP50", "teacher/AP"]

    done = _read(args.results)
    for seed in range(args.seeds):
        for variant in args.variants:
            if (variant.name, seed) not in done:
                loaded = load_experiment(args.experiment, [*args.common, *variant.overrides, f"seed={seed}"])
                row = {"variant": variant.name, "seed": seed, "overrides": [*args.common, *variant.overrides]}
                row |= train_and_score(loaded.experiment)
                with args.results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                done[variant.name, seed] = row["metrics"]
                print(f"{variant.name}, seed {seed}: student AP {row['metrics']['student/AP']:.3f}", flush=True)
    print(table([v.name for v in args.variants], range(args.seeds), done, metrics))


def train_and_score(experiment: Experiment) -> dict[str, object]:
    """Train in this process and score the last weights: metrics, and the minutes that training took."""
    torch.set_num_threads(experiment.scale.threads)
    splits = read_splits(locate(experiment.data))
    torch.manual_seed(experiment.seed)
    detector = build_detector(experiment.model, splits.train.classes)
    batches = training_batches(splits.train, experiment)
    num_steps = batches.order.num_steps(experiment.optim.epochs)
    engine = Engine(
        detector,
        experiment.optim,
        num_steps=num_steps,
        steps_per_epoch=batches.order.steps_per_epoch,
    )
    started = time.perf_counter()
    sums: dict[str, float] = {}
    for step in range(num_steps):
        means = engine.train_step(batches[step])
        if step >= num_steps * 3 // 4:
            for name, value in means.items():
                sums[name] = sums.get(name, 0.0) + float(value) / (num_steps - num_steps * 3 // 4)
    minutes = (time.perf_counter() - started) / 60
    evaluation = evaluate(detector, splits.val, experiment.data, experiment.eval, rank=0, world=1)
    assert evaluation is not None
    return {"metrics": evaluation.metrics, "last_quarter": sums, "minutes": round(minutes, 2)}


def table(
    names: Sequence[str], seeds: Sequence[int], done: dict[tuple[str, int], dict[str, float]], metrics: Sequence[str]
) -> str:
    """Markdown: a row per variant, with mean ± half-width of each metric and of its difference to the first."""
    rows = ["| | " + " | ".join(f"{m} | Δ {m}" for m in metrics) + " |", "|---" * (1 + 2 * len(metrics)) + "|"]
    for name in names:
        cells = [name]
        for metric in metrics:
            values = [done[name, seed].get(metric) for seed in seeds]
            first = [done[names[0], seed].get(metric) for seed in seeds]
            if None in values or None in first:
                cells += ["-", "-"]
                continue
            cells.append(_shown(values))
            cells.append("" if name == names[0] else _shown([a - b for a, b in zip(values, first, strict=True)], "+"))
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _shown(values: Sequence[float], sign: str = "") -> str:
    statistic = Statistic("", tuple(values))
    return f"{statistic.mean:{sign}.3f}" + (f" ± {statistic.half_width:.3f}" if len(values) > 1 else "")


def _read(path: Path) -> dict[tuple[str, int], dict[str, float]]:
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {(row["variant"], row["seed"]): row["metrics"] for row in rows}


if __name__ == "__main__":
    main()
