"""Functions that run as tasks of a cluster."""

import os
import time
from pathlib import Path

import pytest
import ray

from mimiclab.cluster.tasks import as_worker, on_cluster
from mimiclab.errors import UserError
from mimiclab.schema import ScaleConfig

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_cluster")]


def own() -> tuple[int, dict[str, float]]:
    return os.getpid(), ray.get_runtime_context().get_assigned_resources()


def refuse(what: object) -> None:
    raise UserError(f"found {what}, expected something else")


def fail() -> None:
    raise ZeroDivisionError("a bug")


def stay_or_refuse(part: tuple[Path, bool]) -> None:
    """Go on for longer than a test may, or refuse once another one does."""
    begun, stay = part
    if stay:
        begun.touch()
    while stay or not begun.exists():
        time.sleep(0.01)
    raise UserError("refused")


@pytest.fixture
def cancelled(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What has been cancelled."""
    references: list[object] = []
    cancel = ray.cancel

    def record(reference: ray.ObjectRef) -> None:
        references.append(reference)
        cancel(reference)

    monkeypatch.setattr(ray, "cancel", record)
    return references


def test_a_task_has_the_place_of_a_worker(cancelled: list[object]) -> None:
    pid, resources = as_worker(own, scale=ScaleConfig(workers=8, threads=2))

    assert pid != os.getpid()
    assert resources == {"CPU": 2.0}
    assert not cancelled


def test_a_mistake_is_the_users_wherever_it_is_found() -> None:
    with pytest.raises(UserError, match=r"^found this, expected something else$"):
        as_worker(refuse, "this", scale=ScaleConfig())
    with pytest.raises(UserError, match=r"^found that, expected something else$"):
        list(on_cluster()(refuse, ["that"]))


def test_a_bug_keeps_its_traceback(cancelled: list[object]) -> None:
    with pytest.raises(ZeroDivisionError, match="in fail"):
        as_worker(fail, scale=ScaleConfig())

    assert not cancelled


def test_an_error_ends_the_tasks_that_go_on_and_leaves_those_alone_that_have_ended(
    cancelled: list[object], tmp_path: Path
) -> None:
    """Ray ends this process, a few times in a hundred, where a task is cancelled as it ends."""
    begun = tmp_path / "begun"

    with pytest.raises(UserError, match="refused"):
        list(on_cluster()(stay_or_refuse, [(begun, True), (begun, False)]))

    (stayed,) = cancelled
    with pytest.raises(ray.exceptions.TaskCancelledError):
        ray.get(stayed, timeout=60)
