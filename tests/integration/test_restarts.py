"""What the controller makes of failures, with a real cluster's nodes and a real inbox."""

import time
from collections.abc import Iterator

import pytest
import ray
from ray.exceptions import ActorDiedError
from ray.train import RunConfig, ScalingConfig
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.context import TrainRunContext

from mimiclab import restarts as module
from mimiclab.errors import NoRetryError, UserError
from mimiclab.inbox import Inbox
from mimiclab.preemption import LeavingError, room_for
from mimiclab.restarts import Restarts, diagnose
from mimiclab.schema import ScaleConfig
from mimiclab.session import resources_per_worker
from mimiclab.storage import StoreError

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_cluster")]

PEER_CLOSED = RuntimeError("Connection closed by peer [127.0.0.1]:1234")
CONTEXT = TrainRunContext(RunConfig(), None, ScalingConfig(num_workers=2), None, None)
DIED = WorkerHealthCheckFailedError("A worker health check failed.", ActorDiedError())


@pytest.fixture
def inbox() -> Iterator[Inbox]:
    inbox = Inbox.open()
    yield inbox
    inbox.close()


@pytest.fixture(scope="module")
def node(ray_cluster: None) -> str:
    return str(ray.get_runtime_context().get_node_id())


def events(inbox: Inbox, num: int) -> list[dict]:
    found: list[dict] = []
    deadline = time.monotonic() + 10
    while len(found) < num and time.monotonic() < deadline:
        found += inbox.take()
    return found


def test_an_inbox_keeps_order_and_remembers_what_the_next_attempt_needs(inbox: Inbox) -> None:
    inbox.tell("attempt", step=4, nodes=["a", "b"])
    inbox.tell("step", step=5)
    inbox.tell("step", step=6)
    inbox.tell("failure", why="growth", reason="room")
    assert [(event["kind"], event.get("step")) for event in events(inbox, 4)] == [
        ("attempt", 4),
        ("step", 5),
        ("step", 6),
        ("failure", None),
    ]
    assert inbox.take() == []
    facts = inbox.facts()
    assert (facts.reached, facts.saved, facts.nodes, facts.world, facts.why) == (6, 4, (), 2, "growth")


@pytest.mark.parametrize("error", [UserError("x.json: broken"), NoRetryError("loss is nan")])
@pytest.mark.parametrize("wrapped", [False, True])
def test_what_no_attempt_gets_around_ends_the_run(inbox: Inbox, error: Exception, wrapped: bool) -> None:
    raised = error
    if wrapped:
        raised = RuntimeError("in a loader")
        raised.__cause__ = error
    restarts = Restarts(inbox, max_crashes=3, max_preemptions=None)
    with pytest.raises(type(error), match=str(error)):
        restarts.after_exception(CONTEXT, {0: PEER_CLOSED, 1: raised})


def test_the_end_of_a_process_is_a_crash_and_told_rather_than_what_followed(node: str) -> None:
    failure = diagnose({0: PEER_CLOSED, 1: DIED}, (node, node))
    assert (failure.why, failure.reason) == ("crash", "the process of rank 1 died")
    failure = diagnose({1: ValueError("first line\nlast line")}, (node,))
    assert (failure.why, failure.reason) == ("crash", "rank 1: ValueError: last line")


def test_a_node_that_is_gone_is_not_a_crash(node: str) -> None:
    gone = "0" * 56
    failure = diagnose({0: PEER_CLOSED}, (node, gone))
    assert (failure.why, failure.reason) == ("node lost", "a machine is gone without a notice (node 00000000)")


def test_workers_that_left_say_why_themselves(node: str) -> None:
    for why in ("preemption", "growth"):
        failure = diagnose({0: LeavingError(why, "as was agreed"), 1: PEER_CLOSED}, (node,))
        assert (failure.why, failure.reason) == (why, "as was agreed")


def test_a_death_that_ray_knows_to_be_a_preemption_is_one(node: str) -> None:
    taken = WorkerHealthCheckFailedError("A worker health check failed.", ActorDiedError())
    taken.health_check_failure._preempted = True
    assert diagnose({0: PEER_CLOSED, 1: taken}, (node,)).why == "preemption"


def test_crashes_in_a_row_are_counted_and_paused_after(
    inbox: Inbox, node: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FIRST_PAUSE_S", 5.0)
    restarts = Restarts(inbox, max_crashes=2, max_preemptions=None)
    inbox.tell("attempt", step=0, nodes=[node])
    restarts.after_exception(CONTEXT, {0: LeavingError("growth", "room")})  # connects, which takes a moment
    started = time.monotonic()
    restarts.after_exception(CONTEXT, {0: DIED})
    first = time.monotonic() - started
    restarts.after_exception(CONTEXT, {0: DIED})
    assert time.monotonic() - started - first > 4.9
    assert first < 4.9
    with pytest.raises(NoRetryError, match=r"scale\.max_crashes: 2.*3 times.*rank 0 died"):
        restarts.after_exception(CONTEXT, {0: DIED})


def test_a_checkpoint_in_between_starts_the_count_anew(inbox: Inbox, node: str) -> None:
    restarts = Restarts(inbox, max_crashes=1, max_preemptions=None)
    inbox.tell("attempt", step=0, nodes=[node])
    restarts.after_exception(CONTEXT, {0: DIED})
    for step in (10, 20, 30):
        inbox.tell("checkpoint", step=step)
        restarts.after_exception(CONTEXT, {0: DIED})
    with pytest.raises(NoRetryError, match="max_crashes"):
        restarts.after_exception(CONTEXT, {0: DIED})


def test_a_crash_before_an_attempt_has_begun_is_not_blamed_on_machines_of_the_one_before(inbox: Inbox) -> None:
    restarts = Restarts(inbox, max_crashes=1, max_preemptions=None)
    inbox.tell("attempt", step=0, nodes=["0" * 56])
    restarts.after_exception(CONTEXT, {0: PEER_CLOSED})
    restarts.after_exception(CONTEXT, {0: ImportError("no module")})
    with pytest.raises(NoRetryError, match=r"max_crashes.*no module"):
        restarts.after_exception(CONTEXT, {0: ImportError("no module")})


def test_a_store_that_failed_may_work_the_next_time(inbox: Inbox, node: str) -> None:
    inbox.tell("attempt", step=0, nodes=[node])
    Restarts(inbox, max_crashes=1, max_preemptions=None).after_exception(
        CONTEXT, {0: StoreError("bucket: cannot be read")}
    )


def test_preemptions_have_a_budget_of_their_own_and_growth_none(inbox: Inbox, node: str) -> None:
    restarts = Restarts(inbox, max_crashes=0, max_preemptions=2)
    inbox.tell("attempt", step=0, nodes=[node])
    for _ in range(3):
        restarts.after_exception(CONTEXT, {0: LeavingError("growth", "room")})
    for _ in range(2):
        restarts.after_exception(CONTEXT, {0: LeavingError("preemption", "announced")})
    with pytest.raises(NoRetryError, match=r"scale\.max_preemptions: 2.*3 times.*announced"):
        restarts.after_exception(CONTEXT, {0: LeavingError("preemption", "announced")})
    told = [(event["why"], event["reason"]) for event in events(inbox, 7) if event["kind"] == "failure"]
    assert told == [("growth", "room")] * 3 + [("preemption", "announced")] * 3


def test_there_is_room_on_nodes_that_have_all_that_a_worker_asks_for() -> None:
    scale = ScaleConfig()
    assert room_for(resources_per_worker(scale), {}) > 0
    assert room_for(resources_per_worker(scale), {"ray.io/market-type": "spot"}) == 0
    assert room_for(resources_per_worker(scale.model_copy(update={"accelerator_type": "A10G"})), {}) == 0
