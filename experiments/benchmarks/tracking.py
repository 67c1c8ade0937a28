"""What tracking costs a step: the same steps with MLflow's server up, down and slow, and with a tracker in memory.

    python experiments/benchmarks/tracking.py [--rounds 20] [--steps 10] [--experiment experiments/scenes.yaml]

One process trains. In each round every side takes its turn of a few steps, in another order each time, so that all of
them meet the same machine. A step is timed with all that rank 0 logs of it, from asking for its batch to the return of
the tracker. A side's tracker, and its sampling of the machine's load, begin some steps before its turn is measured, so
that it has connected, which real runs do once, and end with it. "down" is a port where nobody answers, "slow" a proxy
on loopback that lets every answer wait for 2 s. Printed are the median step of each side and the median of the rounds'
ratios to memory.
"""

from __future__ import annotations

import argparse
import http.client
import multiprocessing
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import torch
from machine import surroundings

from mimiclab.build import build_detector
from mimiclab.data.dataset import training_batches
from mimiclab.data.splits import locate, read_splits
from mimiclab.engine import Engine
from mimiclab.experiment import load_experiment
from mimiclab.memory import memory_mb
from mimiclab.schema import Experiment
from mimiclab.system import SystemMonitor
from mimiclab.tracking import runs
from mimiclab.tracking.protocol import MemoryTracker, Tracker
from mimiclab.tracking.ui import server
from mimiclab.tracking.writer import MlflowTracker

ANSWER_S = 2.0
WARM_UP = 5
# Of each turn, not measured.
TURN_WARM_UP = 3
CLOSE_S = 10.0
MEMORY, DOWN = "in memory", "down"


def main() -> None:
    """Run the benchmark and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--experiment", type=Path, default=Path(__file__).parent.parent / "scenes.yaml")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=10, help="that are measured of one turn of one side")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="mimiclab-tracking-") as folder:
        overrides = [f"where.storage={folder}/runs", f"where.tracking=sqlite:///{folder}/mlflow.db"]
        experiment = load_experiment(args.experiment, overrides).experiment
        store = experiment.where.tracking
        with server(store, _free_port(), lambda text: print(text, file=sys.stderr)) as running:
            slow = multiprocessing.get_context("spawn").Process(
                target=_delay, args=(running.base_url, port := _free_port()), daemon=True
            )
            slow.start()
            uris = {"up": running.base_url, DOWN: f"http://127.0.0.1:{_free_port()}"}
            uris["slow"] = f"http://127.0.0.1:{port}"
            step = _steps(experiment)
            for _ in range(WARM_UP):
                step(MemoryTracker())
            measured = _measure(step, uris, store, args.rounds, args.steps)
            slow.terminate()
            slow.join()
    _print(measured, experiment)


def _measure(
    step: Callable[[Tracker], float], uris: dict[str, str], store: str, rounds: int, num: int
) -> dict[str, list[list[float]]]:
    sides = [MEMORY, *uris]
    measured: dict[str, list[list[float]]] = {side: [] for side in sides}
    for number in range(rounds):
        turn = number % len(sides)
        for side in sides[turn:] + sides[:turn]:
            if side == MEMORY:
                memory = MemoryTracker()
                taken = [step(memory) for _ in range(TURN_WARM_UP + num)]
            else:
                # A run of its own each time: steps that the server has are not sent again.
                own = runs.open_run(store, "benchmark", f"{side} {number}", "0", {}, {})
                tracker = MlflowTracker(uris[side], own)
                monitor = SystemMonitor.start(uris[side], own, 1.0, torch.device("cpu"))
                step(tracker)
                while side != DOWN and tracker.unsent():  # it connects, which takes seconds with a slow server
                    time.sleep(0.1)
                taken = [step(tracker) for _ in range(TURN_WARM_UP + num)]
                assert monitor is not None
                monitor.close()
                tracker.close(0 if side == DOWN else CLOSE_S)  # nothing of it reaches into the next turn
            measured[side].append(taken[TURN_WARM_UP:])
    return measured


def _steps(experiment: Experiment) -> Callable[[Tracker], float]:
    """A function that trains a step, logs it as rank 0 does, and returns the seconds that both took."""
    splits = read_splits(locate(experiment.data))
    torch.manual_seed(experiment.seed)
    batches = training_batches(splits.train, experiment)
    engine = Engine(
        build_detector(experiment.model, splits.train.classes),
        experiment.optim,
        num_steps=batches.order.num_steps(100_000),
        steps_per_epoch=batches.order.steps_per_epoch,
    )

    def step(tracker: Tracker) -> float:
        asked = time.perf_counter()
        means = engine.train_step(batches[engine.step])
        values = {name: float(value) for name, value in means.items()}
        values |= {"images_per_s": 1.0, "data_wait": 0.0, **memory_mb(engine.device)}
        tracker.log_metrics(engine.step, {f"train/{name}": value for name, value in values.items()})
        return time.perf_counter() - asked

    return step


def _print(measured: dict[str, list[list[float]]], experiment: Experiment) -> None:
    print(
        f"{experiment.model.backbone.name}, {experiment.optim.global_batch} images a step, 1 thread; "
        f"{surroundings('mlflow', 'torch')}\n\n"
        "| tracking | median s a step | min | max | ratio to memory | of the rounds |\n|---|---|---|---|---|---|"
    )
    medians = {side: [statistics.median(turn) for turn in turns] for side, turns in measured.items()}
    for side, turns in measured.items():
        steps = [seconds for turn in turns for seconds in turn]
        ratios = sorted(ours / theirs for ours, theirs in zip(medians[side], medians[MEMORY], strict=True))
        shown = f"{ratios[len(ratios) // 4]:.4f} to {ratios[-1 - len(ratios) // 4]:.4f}"
        print(
            f"| {side} | {statistics.median(steps):.4f} | {min(steps):.4f} | {max(steps):.4f} "
            f"| {statistics.median(ratios):.4f} | middle half {shown} |"
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _delay(base_url: str, port: int) -> None:
    """Answer at a port as the server does, but late."""
    ThreadingHTTPServer(("127.0.0.1", port), _proxy(urlsplit(base_url).netloc)).serve_forever()


def _proxy(target: str) -> type[BaseHTTPRequestHandler]:
    class Proxy(BaseHTTPRequestHandler):
        def _forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
            connection = http.client.HTTPConnection(target)
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
            time.sleep(ANSWER_S)
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.getheader("Content-Type", "application/json"))
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _forward  # noqa: N815 (http.server's names)

        def log_message(self, *_: object) -> None:
            """Nothing: the table is what is printed."""

    return Proxy


if __name__ == "__main__":
    main()
