"""A trial in its own process: the same training as with Ray Train, and what is told of it."""

import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tinyruns import NUM_STEPS, assert_same, history, quiet, tiny

from mimiclab import runs
from mimiclab.errors import NoRetryError
from mimiclab.schema import ScaleConfig, Workers
from mimiclab.search.alone import fit_alone, is_alone
from mimiclab.seat import LAST
from mimiclab.train import train

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_cluster")]

Report = Callable[[Mapping[str, Any]], object]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trial")


@pytest.fixture(scope="module")
def with_ray_train(root: Path, ray_cluster: None) -> runs.Run:
    return train(tiny(root, "scale.workers=1"), console=quiet())


def alone(
    root: Path, *overrides: str, report: Report = lambda _: None, stop: threading.Event | None = None
) -> runs.Run:
    experiment = tiny(root, "scale.workers=1", *overrides)
    return train(experiment, console=quiet(), fit=partial(fit_alone, report=report, stop=stop or threading.Event()))


def test_it_computes_the_same_whatever_the_process_did_before(root: Path, with_ray_train: runs.Run) -> None:
    alone(root, "name=before", "seed=1", "optim.epochs=1", "model.pyramid.stagger=0")
    told: list[Mapping[str, Any]] = []

    run = alone(root, "name=alone", report=told.append)

    assert_same(run, with_ray_train)
    assert [(each["epoch"], each["step"], each[LAST]) for each in told] == [
        (1, 5, False),
        (2, 10, False),
        (3, 14, False),
    ]
    assert [(each["step"], each["student/AP"]) for each in told] == history(run, "student/AP")


def test_a_worker_that_crashes_goes_on_and_tells_its_last_evaluation_again(
    root: Path, with_ray_train: runs.Run
) -> None:
    """The second evaluation was saved, and has not been heard of."""
    told: list[int] = []

    def report(metrics: Mapping[str, Any]) -> None:
        told.append(metrics["epoch"])
        if told == [1, 2]:
            raise RuntimeError("not heard")

    run = alone(root, "name=crashed", report=report)

    assert told == [1, 2, 2, 3]
    assert_same(run, with_ray_train)
    assert [step for step, _ in history(run, "train/loss")] == list(range(1, NUM_STEPS + 1))
    assert [value for _, value in history(run, "run/restarts")] == [0, 1]


def test_a_worker_that_always_crashes_ends_the_run(root: Path) -> None:
    told: list[int] = []

    def report(metrics: Mapping[str, Any]) -> None:
        told.append(metrics["epoch"])
        raise RuntimeError("never heard")

    with pytest.raises(NoRetryError, match=r"scale.max_crashes: 1, and .* 2 times; the last time: .*never heard"):
        alone(root, "name=hopeless", "scale.max_crashes=1", report=report)

    assert told == [1, 1]
    run = runs.read(root / "runs" / "hopeless")
    assert run is not None
    assert run.status == "failed"


def test_a_trial_that_is_stopped_keeps_all_that_it_did_and_can_go_on(root: Path, with_ray_train: runs.Run) -> None:
    stop = threading.Event()

    with pytest.raises(KeyboardInterrupt):
        alone(root, "name=stopped", report=lambda _: stop.set(), stop=stop)

    run = runs.read(root / "runs" / "stopped")
    assert run is not None
    assert run.status == "killed"
    assert [step for step, _ in history(run, "train/loss")] == [1, 2, 3, 4, 5]
    assert [step for step, _ in history(run, "student/AP")] == [5]
    assert_same(alone(root, "name=stopped"), with_ray_train)


def test_the_evaluation_that_ends_a_trial_by_patience_says_so(root: Path) -> None:
    told: list[tuple[int, bool]] = []

    run = alone(
        root, "name=patient", "optim.lr=1e-30", "eval.patience=1", report=lambda m: told.append((m["epoch"], m[LAST]))
    )

    assert run.status == "finished"
    assert told == [(1, False), (2, True)]


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (ScaleConfig(), True),
        (ScaleConfig(workers=Workers(min=1, max=2)), False),
        (ScaleConfig(label_selector={"ray.io/market-type": "spot"}), False),
        (ScaleConfig(accelerator_type="A10G"), False),
    ],
    ids=["one worker", "room to grow", "labels", "an accelerator"],
)
def test_one_worker_that_may_be_anywhere_needs_no_other_process(scale: ScaleConfig, expected: bool) -> None:
    assert is_alone(scale) is expected
