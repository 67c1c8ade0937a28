"""Workers that are killed, at the worst moments, in one run."""

import random
import threading
import time
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient
from tinyruns import NUM_STEPS, assert_same, at_step, history, quiet, said, tiny, when, workers

from mimiclab import runs
from mimiclab.train import train

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_cluster")]


def kill(rank: int) -> None:
    """Processes of one start are numbered by their ranks, as a rule; for these tests any of them will do."""
    sorted(workers(), key=lambda process: process.create_time())[rank].kill()


def kill_in_checkpoint(folder: Path, after_step: int) -> None:
    """Kill rank 0's process, and with it the other, while a checkpoint is being written."""
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
    # The fifth step ends an epoch: what comes now is an evaluation, and no checkpoint was made since the fourth.
    evaluating = when(folder, lambda event: event["kind"] == "step" and event["step"] == 5, lambda: kill(0))
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
    assert all(after - before <= experiment.checkpoint.every_steps for before, after in pairwise(wasted))
    assert 0 < history(run, "run/goodput")[-1][1] < 1
    tags = MlflowClient(run.tracking).get_run(run.mlflow_run_id).data.tags
    assert tags["restart.1"].startswith("crash: ")
    assert not list((folder / runs.CHECKPOINTS).glob(".step-*"))


def test_a_run_that_crashes_again_and_again_gives_up_and_shows_why(root: Path, tmp_path: Path) -> None:
    """The optimizer of its checkpoint is broken: no attempt gets further."""
    experiment = tiny(root, "name=hopeless", "scale.workers=1", "scale.max_crashes=1", "model.mimic.cls_weight=1e38")
    console = quiet()
    with pytest.raises(RuntimeError, match=r"step 1: .* is (nan|inf)"):
        train(experiment, console=console)
    run = runs.read(runs.folder_of(experiment))
    assert run is not None
    assert run.status == "failed"
    # What is certain to happen again is not tried again.
    assert "started again" not in said(console)
    assert not [process for process in psutil.Process().children(recursive=True) if process in workers()]
