"""A checkpoint is whole or it is none."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mimiclab import checkpoint
from mimiclab import storage as storage_module
from mimiclab.checkpoint import MANIFEST, META, STATE, WEIGHTS
from mimiclab.errors import UserError
from mimiclab.storage import Storage

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES = ["disk", "größe, schief"]


def weights(value: float) -> dict[str, torch.Tensor]:
    return {
        "matrix": torch.full((3, 4), value).T,  # not contiguous
        "counter": torch.tensor(7),
        "half": torch.tensor([0.1], dtype=torch.float16),
    }


def state(value: float) -> dict:
    return {
        "step": int(value),
        "optimizer": {"state": {0: {"exp_avg": torch.tensor([value])}}, "groups": [{"lr": 0.1}]},
    }


def save(folder: Path, step: int, *, notice: bool = False, **more) -> checkpoint.Checkpoint:
    meta = {"step": step, "classes": CLASSES, "best": None, **more}
    return checkpoint.save(folder, weights(step), state(step), meta, notice=notice)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def warnings() -> list[str]:
    return []


def test_what_was_saved_comes_back(tmp_path):
    save(tmp_path, 50, unsent=[["train/loss", 0.5, 17, 50]])

    newest = checkpoint.latest(tmp_path, warn=pytest.fail)

    assert newest.step == 50
    assert newest.path == tmp_path / "step-00000050"
    assert newest.meta == {"step": 50, "classes": CLASSES, "best": None, "unsent": [["train/loss", 0.5, 17, 50]]}
    for name, tensor in weights(50).items():
        assert torch.equal(newest.weights()[name], tensor)
        assert newest.weights()[name].dtype == tensor.dtype
    assert newest.state() == state(50)
    assert checkpoint.classes_of(newest.path / WEIGHTS) == CLASSES
    assert names(tmp_path) == ["step-00000050"]
    assert names(newest.path) == sorted([WEIGHTS, STATE, META, MANIFEST])


def test_the_newest_is_by_step_not_by_time_or_text(tmp_path):
    for step in (100, 9, 50):
        save(tmp_path, step)

    assert checkpoint.latest(tmp_path, warn=pytest.fail).step == 100


def test_a_place_is_a_path_a_uri_or_a_storage(tmp_path):
    folder = tmp_path / "new one"
    for step, place in enumerate((folder, str(folder), folder.as_uri(), Storage(folder))):
        save(place, step)
        newest = checkpoint.latest(place, warn=pytest.fail)
        assert newest.path == checkpoint.load(newest.path).path == folder / f"step-0000000{step}"
        assert newest.name == str(newest.path)


def test_one_that_a_notice_asked_for_is_one_too(tmp_path):
    save(tmp_path, 10)
    save(tmp_path, 20, notice=True)
    assert checkpoint.latest(tmp_path, warn=pytest.fail).path.name == "step-00000020-notice"
    save(tmp_path, 20)
    assert checkpoint.latest(tmp_path, warn=pytest.fail).path.name == "step-00000020"
    save(tmp_path, 20, notice=True)
    assert checkpoint.latest(tmp_path, warn=pytest.fail).path.name == "step-00000020"


def test_a_step_is_found_whichever_kind_it_is(tmp_path):
    save(tmp_path, 10)
    save(tmp_path, 20, notice=True)
    assert [checkpoint.find(tmp_path, step).step for step in (10, 20)] == [10, 20]
    assert checkpoint.find(tmp_path, 15) is None


def test_weights_are_copied_to_a_file(tmp_path):
    saved = save(tmp_path / "run", 1)

    saved.write_weights(tmp_path / "new" / "w.safetensors")

    assert (tmp_path / "new" / "w.safetensors").read_bytes() == (saved.path / WEIGHTS).read_bytes()
    assert names(tmp_path / "new") == ["w.safetensors"]


@pytest.mark.parametrize("folder", ["", "missing"])
def test_without_checkpoints_there_is_none(tmp_path, folder):
    assert checkpoint.latest(tmp_path / folder, warn=pytest.fail) is None


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "flipped": flip,
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda path: os.truncate(path, 0),
    "gone": Path.unlink,
    "other": lambda path: path.write_text("[]"),
}


@pytest.mark.parametrize("file", [WEIGHTS, STATE, META, MANIFEST])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_one_is_skipped_for_the_one_before_and_named(tmp_path, warnings, damage, file):
    for step in (1, 2, 3):
        save(tmp_path, step)
    DAMAGE[damage](tmp_path / "step-00000003" / file)

    newest = checkpoint.latest(tmp_path, warn=warnings.append)

    assert newest.step == 2
    assert torch.equal(newest.weights()["matrix"], weights(2)["matrix"])
    assert len(warnings) == 1
    assert str(tmp_path / "step-00000003") in warnings[0]


@pytest.mark.parametrize("file", [META, MANIFEST])
@pytest.mark.parametrize("damage", ["truncated", "empty", "gone", "other"])
def test_without_reading_the_large_files_the_small_ones_are_verified(tmp_path, warnings, damage, file):
    for step in (1, 2):
        save(tmp_path, step)
    DAMAGE[damage](tmp_path / "step-00000002" / file)

    assert checkpoint.latest(tmp_path, warn=warnings.append, deep=False).step == 1
    assert len(warnings) == 1


@pytest.mark.parametrize("file", [WEIGHTS, STATE])
@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_after_it_was_found_is_not_used(tmp_path, damage, file):
    save(tmp_path, 1)
    found = [checkpoint.latest(tmp_path, warn=pytest.fail)]
    DAMAGE[damage](tmp_path / "step-00000001" / file)
    found.append(checkpoint.latest(tmp_path, warn=pytest.fail, deep=False))

    for newest in found:
        with pytest.raises(checkpoint.DamagedError, match=f"{newest.path}: {file} (differs|is missing)"):
            newest.weights() if file == WEIGHTS else newest.state()
        if file == WEIGHTS:
            with pytest.raises(checkpoint.DamagedError, match=f"{newest.path}: {file} (differs|is missing)"):
                newest.write_weights(tmp_path / "w")
    assert names(tmp_path) == ["step-00000001"]


def test_a_file_that_cannot_be_read_is_no_reason_to_start_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(storage_module, "_FIRST_PAUSE_S", 0.01)
    save(tmp_path, 1)
    (tmp_path / "step-00000001" / STATE).unlink()
    (tmp_path / "step-00000001" / STATE).mkdir()  # for root, too, this cannot be read

    with pytest.raises(UserError, match=rf"{STATE}: cannot be read, tried 3 times"):
        checkpoint.latest(tmp_path, warn=pytest.fail)


def test_one_that_is_removed_for_a_newer_one_while_it_is_read_is_not_missed(tmp_path, warnings):
    """As by a driver that reads beside a run at work."""
    save(tmp_path, 1)
    (tmp_path / "step-00000001" / MANIFEST).unlink()

    def meanwhile(text: str) -> None:
        warnings.append(text)
        save(tmp_path, 2)

    assert checkpoint.latest(tmp_path, warn=meanwhile).step == 2
    assert len(warnings) == 1


def test_a_folder_without_a_manifest_is_no_checkpoint(tmp_path, warnings):
    save(tmp_path, 1)
    half = tmp_path / "step-00000002"
    half.mkdir()
    shutil.copy(tmp_path / "step-00000001" / WEIGHTS, half)

    assert checkpoint.latest(tmp_path, warn=warnings.append).step == 1
    assert MANIFEST in warnings[0]


def test_when_all_are_damaged_there_is_none_and_each_is_named(tmp_path, warnings):
    for step in (1, 2):
        save(tmp_path, step)
        flip(tmp_path / f"step-0000000{step}" / STATE)

    assert checkpoint.latest(tmp_path, warn=warnings.append) is None
    assert [STATE in text for text in warnings] == [True, True]


@pytest.mark.parametrize("broken", [{"best": {1, 2}}, {"best": object()}])
def test_a_save_that_fails_leaves_nothing(tmp_path, broken):
    save(tmp_path, 1)

    with pytest.raises(TypeError):
        save(tmp_path, 2, **broken)

    assert names(tmp_path) == ["step-00000001"]


def test_a_save_that_fails_leaves_an_earlier_one_of_its_step(tmp_path):
    save(tmp_path, 1, mark="before")

    with pytest.raises(TypeError):
        save(tmp_path, 1, mark=object())

    assert checkpoint.latest(tmp_path, warn=pytest.fail).meta["mark"] == "before"


def test_a_step_that_is_trained_again_replaces_what_is_damaged(tmp_path):
    save(tmp_path, 1)
    flip(tmp_path / "step-00000001" / WEIGHTS)

    save(tmp_path, 1, mark="again")

    assert checkpoint.latest(tmp_path, warn=pytest.fail).meta["mark"] == "again"


def test_loading_runs_no_code(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    saved = checkpoint.save(tmp_path, weights(1), {"step": Harmful()}, {"step": 1, "classes": CLASSES})

    for found in (saved, checkpoint.latest(tmp_path, warn=pytest.fail)):
        with pytest.raises(Exception, match="weights_only"):
            found.state()
    assert not (tmp_path / "ran").exists()


def test_prune_keeps_the_newest_and_the_best(tmp_path):
    for step in range(10, 70, 10):
        save(tmp_path, step)

    checkpoint.prune(tmp_path, newest=60, keep=2, steps=[20])

    assert names(tmp_path) == ["step-00000020", "step-00000050", "step-00000060"]


def test_prune_keeps_notices_in_addition(tmp_path):
    for step in range(10, 70, 10):
        save(tmp_path, step)
        save(tmp_path, step + 1, notice=True)

    checkpoint.prune(tmp_path, newest=61, keep=2, steps=[10, 21])

    ordinary = [f"step-000000{step}" for step in (10, 50, 60)]
    notices = [f"step-000000{step}-notice" for step in (21, 51, 61)]
    assert names(tmp_path) == sorted(ordinary + notices)


def test_what_has_no_manifest_is_not_one_of_those_that_are_kept(tmp_path):
    for step in (10, 20, 30, 40):
        save(tmp_path, step)
    for step in (20, 40):
        (tmp_path / f"step-000000{step}" / MANIFEST).unlink()

    checkpoint.prune(tmp_path, newest=30, keep=2, steps=[20])

    assert names(tmp_path) == ["step-00000010", "step-00000030", "step-00000040"]


def test_prune_keeps_all_where_there_are_fewer(tmp_path):
    save(tmp_path, 10)

    checkpoint.prune(tmp_path, newest=10, keep=3, steps=[])

    assert names(tmp_path) == ["step-00000010"]


def test_a_damaged_later_one_does_not_count_as_one_that_is_kept(tmp_path, warnings):
    save(tmp_path, 50)
    save(tmp_path, 100)
    flip(tmp_path / "step-00000100" / WEIGHTS)
    assert checkpoint.latest(tmp_path, warn=warnings.append).step == 50
    save(tmp_path, 60)  # an evaluation before step 100 comes again

    checkpoint.prune(tmp_path, newest=60, keep=1, steps=[])

    assert checkpoint.latest(tmp_path, warn=warnings.append).step == 60


def test_prune_removes_what_a_killed_process_left(tmp_path):
    save(tmp_path, 10)
    left = tmp_path / ".step-00000010-12345"
    shutil.copytree(tmp_path / "step-00000010", left)
    assert checkpoint.latest(tmp_path, warn=pytest.fail).path.name == "step-00000010"

    checkpoint.prune(tmp_path, newest=10, keep=1, steps=[])

    assert names(tmp_path) == ["step-00000010"]


SAVING = """
import os, pathlib, sys
import torch
from mimiclab import checkpoint
from mimiclab.saver import Saver

torch.set_num_threads(1)
folder = pathlib.Path(sys.argv[1])


def work(asynchronous):
    print("process", os.getpid(), flush=True)
    newest = checkpoint.latest(folder, warn=lambda text: print("warning", text, flush=True))
    saver = Saver(folder, keep=2, warn=lambda text: os.abort())
    step = newest.step if newest else 0
    while True:
        step += 1
        weights, state = {"w": torch.full((1000,), float(step))}, {"step": step}
        meta = {"step": step, "classes": []}
        if asynchronous:
            saver.snapshot(weights, state, meta, notice=step % 3 == 0)
            saver.flush(60)
        else:
            checkpoint.save(folder, weights, state, meta)
            checkpoint.prune(folder, newest=step, keep=2, steps=[])
        os.write(1, b"saved %d\\n" % step)


for line in sys.stdin:
    child = os.fork()  # every import is done, no thread is started
    if child == 0:
        work(line.strip() == "thread")
    os.waitpid(child, 0)
    print("dead", flush=True)
"""


@pytest.fixture(scope="module")
def nursery(tmp_path_factory) -> Iterator[tuple[subprocess.Popen, Path]]:
    """A process that makes others, which save checkpoints in a folder until they are killed."""
    folder = tmp_path_factory.mktemp("killed")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", SAVING, str(folder)], **pipes, bufsize=0) as process:
        yield process, folder
        process.stdin.close()


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_from_the_last_that_was_acknowledged_or_a_newer_one(nursery):
    process, folder = nursery
    moments = random.Random(0)
    acknowledged, in_the_middle = 0, 0
    for i in range(60):
        process.stdin.write(b"thread\n" if i % 2 else b"plain\n")
        child = int(process.stdout.readline().split()[1])
        if moments.random() < 0.8:
            assert process.stdout.readline().startswith(b"saved")
            acknowledged += 1
        time.sleep(moments.random() * 0.01)
        os.kill(child, signal.SIGKILL)
        while (line := process.stdout.readline()) != b"dead\n":
            acknowledged = int(line.split()[1])
        in_the_middle += any(name.startswith(".") for name in names(folder))

        newest = checkpoint.latest(folder, warn=pytest.fail)

        if newest is None:
            assert acknowledged == 0
            continue
        assert acknowledged <= newest.step <= acknowledged + 1
        assert newest.weights()["w"].eq(newest.step).all()
        assert newest.state() == {"step": newest.step}
        acknowledged = newest.step
    assert acknowledged > 30
    assert in_the_middle > 5


def test_weights_that_no_run_wrote_have_no_classes(tmp_path):
    backbone = tmp_path / "backbone.safetensors"
    save_file(weights(1) | {"matrix": torch.zeros(1)}, backbone)
    other = tmp_path / "other.safetensors"
    save_file({"w": torch.zeros(1)}, other, metadata={"classes": "disk, square"})

    for path in (backbone, other):
        with pytest.raises(
            UserError, match=r"no class names in its header, expected the weights\.safetensors of a run"
        ):
            checkpoint.classes_of(path)


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 a zip file, say"])
def test_weights_that_cannot_be_read_are_named(tmp_path, content):
    path = tmp_path / "w.safetensors"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(UserError, match="cannot be read as a safetensors file: ") as caught:
        checkpoint.classes_of(path)
    assert str(path) in str(caught.value)
