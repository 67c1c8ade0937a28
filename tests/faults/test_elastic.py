"""A run that loses a machine, goes on with fewer workers, and becomes more again when a machine comes."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tinyruns import history, tiny

from mimiclab import checkpoint, runs
from mimiclab.build import build_detector
from mimiclab.cluster import local
from mimiclab.cluster.nodes import Nodes
from mimiclab.data.dataset import training_batches
from mimiclab.data.splits import locate, read_splits
from mimiclab.drill.stage import Driver
from mimiclab.engine import Engine
from mimiclab.schema import Experiment

# A run asks for room after a minute; the test ends it, long before its last step, when it has seen what it wants.
pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(1800)]

Start = tuple[int, dict[str, Any], dict[str, torch.Tensor]]
"""What an attempt goes on from: its step, the state of the engine, and the weights."""


class EnoughError(Exception):
    """The run has shown all that it was to show."""


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    """Two nodes beside a head, for one worker each."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with local.owned_cluster(lambda _: None, num_nodes=2) as started:
        yield started


class Stage:
    """Kills a node after a checkpoint, adds one as soon as the run goes on without, and keeps what it went on from."""

    def __init__(self, nodes: Nodes, run: Path) -> None:
        self.events: list[dict[str, Any]] = []
        self.starts: list[Start] = []
        self._nodes = nodes
        self._run = run
        self._killed = False
        self._added = ""

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["kind"] == kind]

    def hear(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        if event["kind"] == "attempt" and event["step"]:
            start = checkpoint.find(self._run / runs.CHECKPOINTS, event["step"])
            assert start is not None
            self.starts.append((start.step, start.state(), start.weights()))
            if event["world"] == 1:
                self._added = self._nodes.start(num_cpus=1)
        elif event["kind"] == "checkpoint" and not self._killed:
            self._killed = True
            self._nodes.kill("node-2")
        elif event["kind"] == "checkpoint" and self._added and not self._nodes.processes(self._added):
            self._added = self._nodes.start(num_cpus=1)  # on a machine that is too busy, Ray had given it up
        elif event["kind"] == "step" and len(self.starts) == 2 and len(self._recorded()) > self.starts[1][0]:
            raise EnoughError

    def _recorded(self) -> list[tuple[int, float]]:
        run = runs.read(self._run)
        assert run is not None
        return history(run, "train/loss")


def next_losses(experiment: Experiment, start: Start) -> dict[str, float]:
    """Of the step after a checkpoint, taken by one process from the images that are due."""
    step, state, weights = start
    splits = read_splits(locate(experiment.data))
    batches = training_batches(splits.train, experiment, rank=0, world=1)
    engine = Engine(
        build_detector(experiment.model, splits.train.classes, pretrained=False),
        experiment.optim,
        num_steps=batches.order.num_steps(experiment.optim.epochs),
        steps_per_epoch=batches.order.steps_per_epoch,
    )
    engine.load_state_dict(state, weights)
    return {name: float(value) for name, value in engine.train_step(batches[step]).items()}


def test_a_run_goes_on_smaller_and_grows_back_at_a_checkpoint(nodes: Nodes, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    experiment = tiny(
        tmp_path,
        "scale.workers={min: 1, max: 2}",
        "optim.epochs=2000",
        "eval.every_epochs=1000",
        "checkpoint={every_steps: 20, keep: 20}",
    )
    folder = runs.folder_of(experiment)
    runs.prepare(experiment, fresh=True)
    stage = Stage(nodes, folder)
    said: list[str] = []
    with contextlib.suppress(EnoughError):
        Driver(experiment, nodes.cluster.head, said.append, verbose=False).run(stage.hear)
    output = "\n".join(said)

    assert [attempt["world"] for attempt in stage.of("attempt")] == [2, 1, 2], output
    assert [failure["why"] for failure in stage.of("failure")] == ["node lost", "growth"], output
    assert "(raylet)" not in output

    # Growth repeats nothing: it begins at the last step of the smaller attempt, which had just been saved.
    (smaller, _, _), (grown, _, _) = stage.starts
    before = stage.events[: stage.events.index(stage.of("attempt")[2])]
    assert smaller < grown == max(event["step"] for event in before if event["kind"] == "step")
    assert grown == max(event["step"] for event in before if event["kind"] == "checkpoint")

    run = runs.read(folder)
    assert run is not None
    assert run.status == "killed"
    for name in ("train/loss", "train/lr"):
        steps = [step for step, _ in history(run, name)]
        assert steps == list(range(1, len(steps) + 1))
        assert len(steps) > grown

    # Whatever the number of workers, a step is of the images that are due.
    for start in stage.starts:
        for name, value in next_losses(experiment, start).items():
            assert dict(history(run, f"train/{name}"))[start[0] + 1] == pytest.approx(value, rel=1e-4), name
