"""Workers that are killed, at the worst moments, in one run."""

import random
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
from mlflow import MlflowClient
from tinyruns import NUM_STEPS, assert_same, at_step, history, quiet, said, tiny, when, workers

from mimiclab import runs
from mimiclab.progress import PROGRESS, ProgressReader
from mimiclab.train import train

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_cluster")]


def kill(rank: int) -> None:
    """One of them, by their age: which rank it is does not matter here."""
    sorted(workers(), key=lambda process: process.create_time())[rank].kill()


def kill_in_checkpoint(folder: Path, after_step: int) -> None:
    """Kill all workers while a checkpoint is being written."""
    while True:
        aside = [path for path in folder.glob(".step-*") if int(path.name.split("-")[1]) > after_step]
        if aside:
            for process in workers():
                process.kill()
            return
        time.sleep(0.0005)


def test_a_run_goes_on_over_any_death_of_its_workers_and_ends_with_the_same_bits(
    undisturbed: runs.Run, root: Path
) -> None:
    experiment = tiny(root, "name=killed")
    folder = runs.folder_of(experiment)
    console = quiet()
    step = random.Random().randint(2, 4)
    at_step(folder, step, lambda: kill(1))
    attempts: list[dict] = []

    def ends_an_epoch(event: dict) -> bool:
        # Of an attempt after the first: what is told arrives in batches, and two kills at once would be one death.
        attempts.extend([event] if event["kind"] == "attempt" else [])
        return len(attempts) > 1 and event["kind"] == "step" and event["step"] in (5, 10)

    # They end epochs: what comes now is an evaluation, and no checkpoint was made since the step before. The tenth is
    # for a first kill that comes so late that the fifth is not done again.
    evaluating = when(folder, ends_an_epoch, lambda: kill(0))
    saving = threading.Thread(
        target=lambda: (evaluating.join(), kill_in_checkpoint(folder / runs.CHECKPOINTS, 8)), daemon=True
    )
    saving.start()
    run = train(experiment, console=console)
    saving.join(timeout=10)
    assert not saving.is_alive()
    assert run.status == "finished"
    assert said(console).count("crash: ") >= 3, said(console)
    assert_same(run, undisturbed)
    assert [step for step, _ in history(run, "train/loss")] == list(range(1, NUM_STEPS + 1))

    restarts = history(run, "run/restarts")
    assert [number for number, _ in restarts] == list(range(len(restarts)))
    assert len(restarts) >= 4
    wasted = [value for _, value in history(run, "run/wasted_steps")]
    # Steps this short may go on, up to the next checkpoint, while one takes longer to write than was foreseen.
    assert all(after - before <= 2 * experiment.checkpoint.every_steps for before, after in pairwise(wasted)), wasted
    assert 0 < history(run, "run/goodput")[-1][1] < 1
    tags = MlflowClient(run.tracking).get_run(run.mlflow_run_id).data.tags
    assert tags["restart.1"].startswith("crash: ")
    assert not list((folder / runs.CHECKPOINTS).glob(".step-*"))


@pytest.mark.long
def test_a_loss_that_is_no_number_ends_the_run_at_once(root: Path) -> None:
    """What is certain to happen again is not tried again."""
    experiment = tiny(root, "name=hopeless", "scale.workers=1", "model.mimic.cls_weight=1e38")
    console = quiet()
    with pytest.raises(RuntimeError, match=r"step 1: .* is (nan|inf)"):
        train(experiment, console=console)
    run = runs.read(runs.folder_of(experiment))
    assert run is not None
    assert run.status == "failed"
    assert "crash: " not in said(console)
    assert len(run.ledger["attempts"]) == 1


@pytest.mark.long
def test_a_run_that_crashes_again_and_again_gives_up_and_shows_why(root: Path) -> None:
    """Every attempt is killed as soon as it has begun."""
    experiment = tiny(root, "name=broken", "scale.workers=1", "scale.max_crashes=1", "optim.global_batch=2")
    console = quiet()
    deaths: list[int] = []

    def kill_at_once() -> None:
        path = runs.folder_of(experiment) / PROGRESS
        while not path.exists():
            time.sleep(0.05)
        reader = ProgressReader(path)
        while len(deaths) < 2:
            for event in reader.new_events():
                if event["kind"] == "attempt":
                    for process in workers():
                        process.kill()
                    deaths.append(1)
            time.sleep(0.005)

    killer = threading.Thread(target=kill_at_once, daemon=True)
    killer.start()
    with pytest.raises(RuntimeError, match=r"scale\.max_crashes: 1, and the workers crashed in a row.*rank 0 died"):
        train(experiment, console=console)
    run = runs.read(runs.folder_of(experiment))
    assert run is not None
    assert run.status == "failed"
    assert said(console).count("\ncrash: the process of rank 0 died") == 2
    assert not workers()
