"""What training inside of Ray Train costs: the steps of a real run against the bare engine, same threads, in turns.

    python experiments/benchmarks/overhead.py [--experiment experiments/bccd-mobilenet.yaml] [--rounds 12] [--seconds 6]

One run of one worker is trained as `mimiclab train` does it, with everything around it: checkpoints written behind it,
metrics sent to MLflow, notices watched, the driver told of every step. Beside it a process with the engine alone goes
through the same batches. They take turns by the clock, the one that waits stopped by SIGSTOP, Ray included, so that
both meet the same machine; steps that were under way at a stop do not count. Printed are the medians of both and the
median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import torch
from machine import surroundings
from rich.console import Console
from turns import Side, await_steps, follow, seconds_of_steps

from mimiclab.build import build_detector
from mimiclab.data.dataset import training_batches
from mimiclab.data.splits import locate, read_splits
from mimiclab.engine import Engine
from mimiclab.experiment import load_experiment
from mimiclab.schema import Experiment
from mimiclab.train import train

# Neither side is measured before it has done so many steps.
WARM_UP = 8


def main() -> None:
    """Run the benchmark and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--experiment", type=Path, default=Path(__file__).parent.parent / "bccd-mobilenet.yaml")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=6.0, help="of one turn of one side")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mimiclab-overhead-") as folder:
        experiment = load_experiment(
            args.experiment,
            [
                "name=overhead",
                "scale.workers=1",
                "scale.threads=1",
                "optim.epochs=100000",
                "eval.every_epochs=100000",
                f"where.storage={folder}/runs",
                f"where.tracking=sqlite:///{folder}/mlflow.db",
            ],
        ).experiment
        _measure(experiment, args.rounds, args.seconds)


def _measure(experiment: Experiment, rounds: int, seconds: float) -> None:
    here, there = multiprocessing.Pipe()
    bare = multiprocessing.get_context("spawn").Process(target=_bare, args=(experiment.model_dump_json(), there))
    bare.start()
    measured: dict[str, list[list[float]]] = {"in Ray Train": [], "the engine alone": []}

    def take_turns() -> None:
        sides = {}
        try:
            reader = follow(experiment)
            await_steps(reader, WARM_UP)
            for _ in range(WARM_UP):
                here.recv()
            sides["in Ray Train"] = Side.of(psutil.Process(), but=[bare.pid])
            sides["the engine alone"] = Side([psutil.Process(bare.pid)])
            for side in sides.values():
                side.stop()
            seconds_of_steps(reader)
            list(_received(here))
            for number in range(rounds):
                for name in list(sides)[:: 1 if number % 2 else -1]:
                    with sides[name].awake():
                        time.sleep(seconds)
                    found = seconds_of_steps(reader) if name == "in Ray Train" else list(_received(here))
                    measured[name].append(found[1:])  # the first one was under way at the stop
        finally:
            for side in sides.values():
                side.resume()
            os.kill(os.getpid(), signal.SIGTERM)  # as a job is ended: what a shell has put behind it ignores SIGINT

    thread = threading.Thread(target=take_turns, daemon=True)
    thread.start()
    try:
        train(experiment, console=Console(quiet=True))
    except KeyboardInterrupt:
        pass
    finally:
        bare.terminate()
        bare.join()
    _print(measured, experiment)


def _print(measured: dict[str, list[list[float]]], experiment: Experiment) -> None:
    print(
        f"{experiment.model.backbone.name}, {experiment.optim.global_batch} images a step, 1 thread each; "
        f"{surroundings('torch', 'ray')}\n\n"
        "| | median s a step | min | max | steps |\n|---|---|---|---|---|"
    )
    for name, found in measured.items():
        steps = [step for turn in found for step in turn]
        print(f"| {name} | {statistics.median(steps):.4f} | {min(steps):.4f} | {max(steps):.4f} | {len(steps)} |")
    pairs = zip(*measured.values(), strict=True)
    ratios = [statistics.median(ours) / statistics.median(theirs) for ours, theirs in pairs if ours and theirs]
    spread = f"{min(ratios):.4f} | {max(ratios):.4f} | {len(ratios)} rounds"
    print(f"| ratio | {statistics.median(ratios):.4f} | {spread} |")


def _received(connection: Connection) -> Iterator[float]:
    while connection.poll(0.1):
        yield connection.recv()


def _bare(experiment_json: str, connection: Connection) -> None:
    """The same training without anything around it; sends the seconds of every step."""
    torch.set_num_threads(1)
    experiment = Experiment.model_validate_json(experiment_json)
    splits = read_splits(locate(experiment.data))
    torch.manual_seed(experiment.seed)
    batches = training_batches(splits.train, experiment)
    num_steps = batches.order.num_steps(experiment.optim.epochs)
    engine = Engine(
        build_detector(experiment.model, splits.train.classes),
        experiment.optim,
        num_steps=num_steps,
        steps_per_epoch=batches.order.steps_per_epoch,
    )
    asked = time.perf_counter()
    for step in range(num_steps):
        engine.train_step(batches[step])
        now = time.perf_counter()
        connection.send(now - asked)
        asked = now


if __name__ == "__main__":
    main()
