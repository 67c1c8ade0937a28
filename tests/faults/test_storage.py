"""Storage that is full, refuses, loses or damages what it was given."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import disks
import pytest
from tinyruns import NUM_STEPS, assert_same, history, quiet, said, tiny

from mimiclab import checkpoint, runs
from mimiclab.errors import UserError
from mimiclab.train import train

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for the first checkpoints only."""
    with disks.small_disk(tmp_path / "small", "35m") as place:
        yield place


def test_a_full_disk_ends_the_run_in_words_and_with_room_it_goes_on(
    undisturbed: runs.Run, root: Path, small_disk: Path
) -> None:
    experiment = tiny(root, f"where.storage={small_disk}", "checkpoint.every_steps=1", "checkpoint.keep=50")
    console = quiet()
    with pytest.raises(UserError, match="No space left") as failure:
        train(experiment, console=console)
    assert str(small_disk) in str(failure.value)
    assert said(console).count("warning: checkpoint of step") >= 2
    stopped = checkpoint.latest(runs.storage_of(experiment) / runs.CHECKPOINTS, warn=pytest.fail)
    assert stopped is not None
    assert 0 < stopped.step < NUM_STEPS

    subprocess.run(["mount", "-o", "remount,size=400m", small_disk], check=True)
    console = quiet()
    run = train(experiment, console=console)
    assert f"from step {stopped.step}" in said(console)
    assert_same(run, undisturbed)


@pytest.mark.long
def test_a_truncated_checkpoint_is_passed_over_loudly(undisturbed: runs.Run, root: Path, tmp_path: Path) -> None:
    """A copy of a finished run is given one more epoch, with its newest checkpoint cut in half."""
    shutil.copytree(undisturbed.folder, tmp_path / "tiny")
    newest = sorted((tmp_path / "tiny" / runs.CHECKPOINTS).glob("step-*"))[-1]
    weights = newest / checkpoint.WEIGHTS
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    experiment = tiny(
        root, f"where.storage={tmp_path}", f"where.tracking=sqlite:///{tmp_path}/mlflow.db", "optim.epochs=4"
    )
    console = quiet()
    run = train(experiment, console=console)
    assert f"{newest}: {checkpoint.WEIGHTS} differs from its manifest" in said(console).replace("\n", "")
    assert re.search("training from step 1[123] to step 19", said(console))
    assert run.status == "finished"
    assert [step for step, _ in history(run, "train/loss")][-1] == 19
