"""Checkpoints are written while training goes on, and what fails is told."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mimiclab import checkpoint, saver
from mimiclab.errors import UserError
from mimiclab.saver import Saver

pytestmark = pytest.mark.usefixtures("one_thread")


class Training:
    """A model and an optimizer with moments, as an engine keeps them."""

    def __init__(self, device: str = "cpu") -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2)).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1, fused=True)
        self.num = 0

    def step(self) -> None:
        images = torch.randn(2, 3, 3, 3).to(next(self.model.parameters()).device)
        self.optimizer.zero_grad()
        self.model(images).square().sum().backward()
        self.optimizer.step()
        self.num += 1

    def weights(self) -> dict[str, Tensor]:
        return self.model.state_dict()

    def state(self) -> dict[str, object]:
        return {"step": self.num, "optimizer": self.optimizer.state_dict(), "more": [{"a": (self.optimizer, 1)[1:]}]}

    def meta(self) -> dict[str, object]:
        return {"step": self.num, "classes": ["a"], "rows": [[1, 2.5]]}

    def save_with(self, target: Saver, **more: object) -> None:
        target.snapshot(self.weights(), self.state(), self.meta(), **more)


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Nothing is written before it is set."""
    opened, save = threading.Event(), checkpoint.save

    def later(*args, **more):
        assert opened.wait(60)
        return save(*args, **more)

    monkeypatch.setattr(checkpoint, "save", later)
    yield opened
    opened.set()


def flat(value: object) -> Iterator[object]:
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            yield key
            yield from flat(value[key])
    elif isinstance(value, list | tuple):
        for each in value:
            yield from flat(each)
    else:
        yield value.cpu().tolist() if isinstance(value, Tensor) else value


def newest(folder: Path) -> checkpoint.Checkpoint:
    found = checkpoint.latest(folder, warn=pytest.fail)
    assert found is not None
    return found


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)
def test_what_training_does_next_changes_nothing(tmp_path: Path, gate: threading.Event, device: str) -> None:
    training = Training(device)
    for _ in range(3):
        training.step()
    expected = [list(flat(each)) for each in (training.weights(), training.state(), training.meta())]
    target = Saver(tmp_path, keep=3, warn=pytest.fail)
    meta = training.meta()
    target.snapshot(training.weights(), training.state(), meta)
    meta["rows"][0].append("later")
    meta["step"] = 7
    for _ in range(2):
        training.step()
    training.optimizer.param_groups[0]["lr"] = 0.7
    gate.set()
    target.flush(60)

    found = newest(tmp_path)
    assert [list(flat(each)) for each in (found.weights(), found.state(), found.meta)] == expected
    assert list(flat(training.weights())) != expected[0]


def test_a_snapshot_returns_before_it_is_written_and_the_next_waits_for_it(
    tmp_path: Path, gate: threading.Event
) -> None:
    training, target = Training(), Saver(tmp_path, keep=3, warn=pytest.fail)
    assert (target.copied_s, target.written_s) == (None, None)
    assert target.wait(0)
    training.save_with(target)
    assert checkpoint.latest(tmp_path, warn=pytest.fail) is None
    assert target.written_s is None
    assert not target.wait(0.01)
    training.step()
    threading.Timer(0.3, gate.set).start()
    started = time.perf_counter()
    training.save_with(target)
    blocked_s = time.perf_counter() - started
    assert newest(tmp_path).step == 0  # at most one is under way
    assert blocked_s > 0.2
    assert 0 < target.copied_s < blocked_s - 0.2  # what the wait took is no part of it
    assert target.written_s > 0.2
    target.flush(60)
    assert target.wait(0)
    assert newest(tmp_path).step == 1
    assert 0 < target.written_s < 0.2 + blocked_s


def test_a_flush_waits_no_longer_than_it_may(tmp_path: Path, gate: threading.Event) -> None:
    training, target = Training(), Saver(tmp_path, keep=3, warn=pytest.fail)
    target.flush(0.01)  # there is nothing to write
    training.save_with(target)
    with pytest.raises(UserError, match=rf"^checkpoint {tmp_path}: step 0 is not written after 0\.05 s$"):
        target.flush(0.05)
    gate.set()
    target.flush(60)
    assert newest(tmp_path).step == 0


def test_a_notice_saves_no_step_that_is_saved(tmp_path: Path, gate: threading.Event) -> None:
    training, target = Training(), Saver(tmp_path, keep=3, warn=pytest.fail)
    training.save_with(target, notice=True)
    training.save_with(target, notice=True)  # under way
    gate.set()
    target.flush(60)
    training.save_with(target, notice=True)  # written
    target.flush(60)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000000-notice"]
    training.save_with(target)  # its weights were evaluated since, for one
    target.flush(60)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000000", "step-00000000-notice"]
    training.step()
    training.save_with(target)
    training.save_with(target, notice=True)
    target.flush(60)
    assert sorted(path.name for path in tmp_path.iterdir())[2:] == ["step-00000001"]


def test_old_ones_are_removed(tmp_path: Path) -> None:
    training, target = Training(), Saver(tmp_path, keep=2, warn=pytest.fail)
    for step in range(8):
        training.save_with(target, notice=step % 3 == 1, steps=[2])
        training.step()
    target.flush(60)
    target._thread.join()
    kept = ["step-00000002", "step-00000004-notice", "step-00000005", "step-00000006", "step-00000007-notice"]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept


def blocked(folder: Path) -> tuple[Path, Callable[[], None]]:
    """A place that takes nothing, root's files neither, and what mends it."""
    (folder / "file").write_text("")
    return folder / "file" / "run", (folder / "file").unlink


def test_a_failure_is_told_and_training_goes_on(tmp_path: Path, warnings: list[str]) -> None:
    place, mend = blocked(tmp_path)
    training, target = Training(), Saver(place, keep=3, warn=warnings.append)
    for num in (1, 2):
        training.save_with(target)
        with pytest.raises(UserError, match=f"^{place}/step-0000000{num - 1}: cannot be written: .*Not a directory"):
            target.flush(60)
        training.step()
        assert len(warnings) == num
    assert warnings[1].startswith(f"checkpoint of step 1 failed: {place}/step-00000001: cannot be written: ")
    assert target.written_s is None
    mend()
    training.save_with(target)
    target.flush(60)
    assert newest(place).step == 2
    assert len(warnings) == 2


def test_a_step_that_failed_may_be_saved_again(tmp_path: Path, warnings: list[str]) -> None:
    place, mend = blocked(tmp_path)
    training, target = Training(), Saver(place, keep=3, warn=warnings.append)
    training.save_with(target)
    with pytest.raises(UserError):
        target.flush(60)
    mend()
    training.save_with(target, notice=True)
    target.flush(60)
    assert newest(place).step == 0


def test_after_three_failures_in_a_row_the_run_is_told_where(tmp_path: Path, warnings: list[str]) -> None:
    place, mend = blocked(tmp_path)
    training, target = Training(), Saver(place, keep=3, warn=warnings.append)

    def save() -> None:
        training.save_with(target)
        training.step()

    save()
    save()
    with pytest.raises(UserError):
        target.flush(60)
    mend()
    save()
    target.flush(60)  # a success in between: they are counted anew
    (tmp_path / "file").rename(tmp_path / "away")
    (tmp_path / "file").write_text("")
    for _ in range(saver.MAX_FAILURES):
        save()
    for call in (save, lambda: target.flush(60)):
        with pytest.raises(UserError, match=f"^checkpoint {place}: the last 3 could not be written .*Not a directory"):
            call()
    assert len(warnings) == 2 + saver.MAX_FAILURES


def test_a_mistake_in_the_program_is_no_failure_of_the_storage(tmp_path: Path) -> None:
    training, target = Training(), Saver(tmp_path, keep=3, warn=pytest.fail)
    with pytest.raises(TypeError, match="JSON"):
        target.snapshot({}, {}, {**training.meta(), "more": object()})
    assert checkpoint.latest(tmp_path, warn=pytest.fail) is None
    target.snapshot({}, {"f": lambda: None}, training.meta())
    for call in (lambda: target.flush(60), lambda: training.save_with(target)):
        with pytest.raises(AttributeError, match="local object"):
            call()


def test_what_a_checkpoint_takes_for_granted_is_made_to_last_before_it(tmp_path: Path, warnings: list[str]) -> None:
    seen: list[list[str]] = []

    def before() -> dict[str, object]:
        seen.append([path.name for path in tmp_path.iterdir()])
        return {"unsent": [1, 2]}

    target = Saver(tmp_path, keep=2, warn=warnings.append, before=before)
    training = Training()
    training.step()
    training.save_with(target)
    target.flush(60)

    assert seen == [[]]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("step-")] == ["step-00000001"]
    assert newest(tmp_path).meta == {**training.meta(), "unsent": [1, 2]}
