"""How training grows from one worker to two: images a second of both runs, in turns, against twice the one's.

    python experiments/benchmarks/scaling.py [--experiment experiments/bccd-mobilenet.yaml] [--images 2] [--rounds 10]

Both runs are trained as `mimiclab train` does it, side by side, each worker with one thread and as many images a step
as the file's `optim.global_batch`: twice the workers, twice the images. One run, but for its driver, is stopped by
SIGSTOP while the other has its turn, Ray included; steps that were under way at a stop do not count. Printed are the
medians of both and the median of the rounds' efficiencies: seconds of a step of one worker by those of two.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import signal
import statistics
import tempfile
import time
from pathlib import Path

import psutil
from machine import surroundings
from rich.console import Console
from turns import Side, await_steps, follow, seconds_of_steps

from mimiclab.experiment import load_experiment
from mimiclab.schema import Experiment
from mimiclab.train import train

WARM_UP = 8
WORKERS = (1, 2)


def main() -> None:
    """Run the benchmark and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--experiment", type=Path, default=Path(__file__).parent.parent / "bccd-mobilenet.yaml")
    parser.add_argument("--images", type=int, help="a step of each worker; the file's global_batch where not given")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=8.0, help="of one turn of one run")
    args = parser.parse_args()
    share = args.images or load_experiment(args.experiment).experiment.optim.global_batch
    with tempfile.TemporaryDirectory(prefix="mimiclab-scaling-") as folder:
        runs = {workers: _load(args.experiment, workers, share, folder) for workers in WORKERS}
        _print(_measure(runs, args.rounds, args.seconds), share, args.rounds)


def _load(file: Path, workers: int, share: int, folder: str) -> Experiment:
    overrides = [
        f"name=scaling-{workers}",
        f"scale.workers={workers}",
        "scale.threads=1",
        f"optim.global_batch={workers * share}",
        "optim.epochs=100000",
        "eval.every_epochs=100000",
        "checkpoint.every_steps=100000",
        f"where.storage={folder}/runs",
        f"where.tracking=sqlite:///{folder}/mlflow-{workers}.db",
    ]
    return load_experiment(file, overrides).experiment


def _measure(runs: dict[int, Experiment], rounds: int, seconds: float) -> dict[int, list[list[float]]]:
    """Seconds of the steps of each turn, by the number of workers."""
    drivers = {}
    sides = {}
    readers = {}
    measured: dict[int, list[list[float]]] = {workers: [] for workers in runs}
    try:
        for workers, experiment in runs.items():
            driver = multiprocessing.get_context("spawn").Process(target=_train, args=(experiment.model_dump_json(),))
            driver.start()
            drivers[workers] = driver
            readers[workers] = follow(experiment)
            await_steps(readers[workers], WARM_UP)
            sides[workers] = Side.of(psutil.Process(driver.pid))
            assert len(sides[workers].measured) == workers
            sides[workers].stop()
        for number in range(rounds):
            for workers in WORKERS[:: 1 if number % 2 else -1]:
                seconds_of_steps(readers[workers])
                with sides[workers].awake():
                    time.sleep(seconds)
                measured[workers].append(seconds_of_steps(readers[workers])[1:])  # the first was under way at the stop
    finally:
        for side in sides.values():
            side.resume()
        for driver in drivers.values():
            os.kill(driver.pid, signal.SIGTERM)  # as a job is ended: what a shell has put behind it ignores SIGINT
        for driver in drivers.values():
            driver.join()
    return measured


def _train(experiment_json: str) -> None:
    try:
        train(Experiment.model_validate_json(experiment_json), console=Console(quiet=True))
    except KeyboardInterrupt:
        return


def _print(measured: dict[int, list[list[float]]], share: int, rounds: int) -> None:
    print(
        f"{share} images a step and worker, 1 thread each; "
        f"{surroundings('torch', 'ray')}\n\n| workers | median s a step | images a second | min | max | steps |\n"
        "|---|---|---|---|---|---|"
    )
    for workers, turns in measured.items():
        steps = list(itertools.chain(*turns))
        middle = statistics.median(steps)
        print(
            f"| {workers} | {middle:.4f} | {workers * share / middle:.1f} | {min(steps):.4f} | {max(steps):.4f} | "
            f"{len(steps)} |"
        )
    one, two = (measured[workers] for workers in WORKERS)
    kept = [statistics.median(a) / statistics.median(b) for a, b in zip(one, two, strict=True) if a and b]
    print(
        f"\nEfficiency: {statistics.median(kept):.3f}, from {min(kept):.3f} to {max(kept):.3f} in {len(kept)} of "
        f"{rounds} rounds."
    )


if __name__ == "__main__":
    main()
