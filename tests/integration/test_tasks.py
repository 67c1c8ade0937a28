"""Functions that run as tasks of a cluster."""

import os

import pytest

from mimiclab.cluster.tasks import as_worker, on_cluster
from mimiclab.errors import UserError
from mimiclab.schema import ScaleConfig

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_cluster")]


def own() -> tuple[int, dict[str, float]]:
    import ray

    return os.getpid(), ray.get_runtime_context().get_assigned_resources()


def refuse(what: object) -> None:
    raise UserError(f"found {what}, expected something else")


def fail() -> None:
    raise ZeroDivisionError("a bug")


def test_a_task_has_the_place_of_a_worker() -> None:
    pid, resources = as_worker(own, scale=ScaleConfig(workers=8, threads=2))

    assert pid != os.getpid()
    assert resources == {"CPU": 2.0}


def test_a_mistake_is_the_users_wherever_it_is_found() -> None:
    with pytest.raises(UserError, match=r"^found this, expected something else$"):
        as_worker(refuse, "this", scale=ScaleConfig())
    with pytest.raises(UserError, match=r"^found that, expected something else$"):
        list(on_cluster()(refuse, ["that"]))


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError, match="in fail"):
        as_worker(fail, scale=ScaleConfig())
