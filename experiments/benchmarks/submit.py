"""Where the time goes from `mimiclab submit train` to the first training step, on a cluster of this machine.

    python experiments/benchmarks/submit.py [--experiment experiments/scenes.yaml] [--jobs 3]

A cluster of one node is started in a folder of its own. Trainings are submitted to it one after the other and stopped
at their first step; before them one that is not counted, which draws the scenes and warms the machine's caches.
Printed are medians and spread of each part, and what was uploaded.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import psutil
from machine import surroundings

from mimiclab.inbox import Event
from mimiclab.progress import PROGRESS

PARTS = (
    "`submit`: read the experiment, check, pack, upload",
    "Ray starts the job's process",
    "that imports, checks data and weights, and opens the run",
    "a worker starts and builds the detector",
    "the first step",
)


def main() -> None:
    """Run the benchmark and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--experiment", type=Path, default=Path(__file__).parent.parent / "scenes.yaml")
    parser.add_argument("--jobs", type=int, default=3)
    args = parser.parse_args()
    experiment = args.experiment.absolute()
    with tempfile.TemporaryDirectory(prefix="mimiclab-submit-") as folder:
        os.chdir(folder)
        os.environ["XDG_STATE_HOME"] = f"{folder}/state"
        _mimiclab("cluster", "up")
        try:
            found = [_submit(experiment, f"job-{number}") for number in range(args.jobs + 1)][1:]
        finally:
            _mimiclab("cluster", "down")
    print(
        f"{surroundings('torch', 'ray')}; {args.jobs} jobs; uploaded: {found[-1][1]}\n\n"
        "| part | median s | min | max |\n|---|---|---|---|"
    )
    rows = {part: [times[number] for times, _ in found] for number, part in enumerate(PARTS)}
    rows["all"] = [sum(times) for times, _ in found]
    for part, seconds in rows.items():
        print(f"| {part} | {statistics.median(seconds):.1f} | {min(seconds):.1f} | {max(seconds):.1f} |")


def _mimiclab(*args: str) -> str:
    done = subprocess.run([sys.executable, "-m", "mimiclab", *args], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"mimiclab {' '.join(args)}:\n{done.stdout}{done.stderr}")
    return done.stdout


def _submit(experiment: Path, name: str) -> tuple[list[float], str]:
    """Seconds of each part, and what was said to be uploaded."""
    run = Path("runs") / name
    began = time.time()
    output = _mimiclab("submit", "train", str(experiment), "--set", f"name={name}", "--set", "scale.workers=1")
    times = [began, time.time()]
    times.append(_await(_started))
    times.append(_await(lambda: _written(run / "run.json")))
    times.append(_await(lambda: _time_of(run, "attempt")))
    times.append(_await(lambda: _time_of(run, "step")))
    _mimiclab("jobs", "stop", name)
    [uploaded] = re.findall("^uploading (.*)$", output, re.MULTILINE)
    # Ray may start the job before the command that submitted it has ended.
    return [max(later - earlier, 0.0) for earlier, later in pairwise(times)], uploaded


def _await(moment: Callable[[], float | None]) -> float:
    deadline = time.monotonic() + 300
    while (found := moment()) is None:
        if time.monotonic() > deadline:
            sys.exit("a job did not start in five minutes; see mimiclab jobs logs")
        time.sleep(0.02)
    return found


def _started() -> float | None:
    """When the process of the only job did."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "train" in words and "-P" in words and "bash" not in words[0]:
            return float(process.create_time())
    return None


def _written(file: Path) -> float | None:
    return file.stat().st_mtime if file.exists() else None


def _time_of(run: Path, kind: str) -> float | None:
    if not (run / PROGRESS).exists():
        return None
    events: list[Event] = [json.loads(line) for line in (run / PROGRESS).read_text().splitlines()]
    return next((float(event["time"]) for event in events if event["kind"] == kind), None)


if __name__ == "__main__":
    main()
