"""Watch for the end of this machine, and drain its node of Ray when it is announced.

Nothing in Ray itself asks the clouds. This process is as small as a process can be (see `drain` for why Ray is not in
it), and no answer of a metadata server ends it. It says one line for each change of what it knows.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Literal

from mimiclab.cluster.drain import NodeError, RayNode
from mimiclab.cluster.metadata import NoAnswerError
from mimiclab.cluster.notices import Aws, Cloud, Gcp, Kind, Kubernetes, Notice, Source, detect
from mimiclab.errors import UserError

# A question that failed is repeated after an interval, two, then four: a notice may leave 30 s in all.
_MAX_BACK_OFF = 4
_RETRY_S = 1.0
_FIND_S = 30.0
# A notice without a deadline is given what Ray Train assumes then.
_UNKNOWN_S = 120.0


class Termination:
    """Whether SIGTERM has come, and when. Made by `termination`."""

    def __init__(self, reader: int, writer: int) -> None:
        self._reader, self._writer = reader, writer
        self._at: float | None = None

    def at(self) -> float | None:
        """When it came, in seconds since 1970; None where it did not."""
        return self._at

    def wait(self, seconds: float) -> None:
        """Wait until it comes, at most for so long."""
        select.select([self._reader], [], [], seconds)

    def catch(self, number: int, frame: FrameType | None) -> None:
        """Note that it has come: a handler."""
        if self._at is None:
            self._at = time.time()
            os.write(self._writer, b"!")


@contextlib.contextmanager
def termination() -> Iterator[Termination]:
    """SIGTERM as something to wait for, and nothing else, within; in the main thread only."""
    # A handler may interrupt the main thread anywhere, also where that holds the lock of a threading.Event.
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    stop = Termination(reader, writer)
    before = signal.signal(signal.SIGTERM, stop.catch)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
        os.close(reader)
        os.close(writer)


@dataclass
class _Drain:
    """The drain for one notice: tried until it is over."""

    notice: Notice
    until: float
    failure: str = ""
    done: bool = False
    over: bool = False


class Watch:
    """What is announced, and what was done about it.

    Args:
        source: of the notices.
        node: what to drain.
        say: gets one line for each change.
    """

    def __init__(self, source: Source, node: RayNode, say: Callable[[str], None]) -> None:
        self._source = source
        self._node = node
        self._say = say
        self._announced: dict[Kind, Notice] = {}
        self._current: _Drain | None = None
        self._node_id: str | None = None
        self._find_at: float | None = None
        self.failures = 0
        """Questions in a row that the source did not answer."""

    @property
    def pending(self) -> bool:
        """Whether there is a drain to be tried again."""
        return self._current is not None and not self._current.over

    @property
    def settled(self) -> bool:
        """Whether the node is drained, or does not have to be."""
        return self._current is None or self._current.done

    def round(self) -> None:
        """Ask the source once and act on it; try again what failed before.

        Raises:
            UserError: it is not clear which node is this machine's.
        """
        if self.pending:
            self._drain()
        try:
            for kind, notice in self._source.ask():
                if self._announced.get(kind) != notice:
                    self._take(kind, notice)
                    self._drain()
        except NoAnswerError as error:
            if self.failures == 0:
                self._say(f"no answer from the metadata server ({error}); asking on")
            self.failures += 1
        else:
            if self.failures:
                self._say("the metadata server answers")
            self.failures = 0
        if self._current is None:
            self._look_for_node()

    def wait_for_end(self) -> None:
        """Where the node was drained, wait until it is gone or its deadline has come."""
        if self._node_id is None or self._current is None or not self._current.done:
            return
        deadline = self._current.until
        left = deadline - self._source.now()
        if left > 0 and self._node.wait_until_gone(self._node_id, left):
            self._say("the node is gone")
            return
        # A head that does not answer says nothing about the node.
        time.sleep(max(0.0, deadline - self._source.now()))
        self._say("the deadline has come")

    def _take(self, kind: Kind, notice: Notice | None) -> None:
        if notice is not None:
            self._announced[kind] = notice
            self._say(f"{notice.what}{self._when(notice)}")
        else:
            before = self._announced.pop(kind)
            drained = self._current is not None and self._current.notice == before and self._current.done
            self._say(f"withdrawn: {before.what}" + ("; the node stays drained until Ray restarts" if drained else ""))

    def _drain(self) -> None:
        drains = [notice for notice in self._announced.values() if notice.drains]
        if not drains:
            self._current = None
            return
        notice = min(drains, key=lambda notice: notice.deadline or float("inf"))
        if self._current is None or self._current.notice != notice:
            unknown = self._source.now() + _UNKNOWN_S
            self._current = _Drain(notice, until=unknown if notice.deadline is None else notice.deadline)
        if not self._current.over:
            self._try(self._current)

    def _try(self, drain: _Drain) -> None:
        try:
            self._node_id = self._node.drain(drain.notice.what, drain.notice.deadline)
        except NodeError as error:
            if drain.failure != str(error):
                drain.failure = str(error)
                self._say(f"the node is not drained: {error}")
            if self._source.now() >= drain.until:
                drain.over = True
                self._say("the deadline has come, and the node is not drained")
        else:
            drain.over = drain.done = True
            self._say(f"drained node {self._node_id}")

    def _look_for_node(self) -> None:
        """Find the node before it matters; that also brings what a drain needs into memory."""
        first = self._find_at is None
        if self._node_id is not None or (self._find_at is not None and time.monotonic() < self._find_at):
            return
        self._find_at = time.monotonic() + _FIND_S
        try:
            self._node_id = self._node.find()
        except NodeError as error:
            if first:
                self._say(f"no node to watch over yet ({error}); looking on")
        else:
            self._say(f"watching over node {self._node_id}")

    def _when(self, notice: Notice) -> str:
        if notice.deadline is None:
            return ""
        left = round(notice.deadline - self._source.now())
        return f", in {left} s" if left >= 0 else f", due {-left} s ago"


def spot_watch(
    cloud: Cloud | Literal["auto"],
    node: RayNode,
    say: Callable[[str], None],
    *,
    interval: float,
    once: bool,
    grace_s: float,
    drain_on_rebalance: bool,
) -> bool:
    """Watch until SIGTERM, which is itself the notice under Kubernetes; in the main thread.

    Elsewhere SIGTERM means one question more and the end, as a machine that is taken away may also be shutting down. A
    drain that failed is tried until its deadline, then too.

    Args:
        cloud: whom to ask; auto finds out.
        node: what to drain.
        say: gets one line for each change.
        interval: seconds from one question to the next.
        once: ask once and end. Under Kubernetes to be called is the notice, as for a hook of a pod that ends.
        grace_s: how long a pod lives from its notice on.
        drain_on_rebalance: also drain when AWS recommends to replace the instance.

    Returns:
        Whether the node is drained or does not have to be; with `once`, False also where the cloud did not answer.

    Raises:
        UserError: the address of a metadata server is none; no cloud was found and `once`; or see RayNode.find.
    """
    with termination() as stop:
        if cloud == "auto":
            found = _find_cloud(stop, say, interval, once)
            if found is None:
                return True
            cloud = found
        source: Source
        if cloud == "aws":
            source = Aws(drain_on_rebalance)
            say(f"asking AWS for notices every {interval:g} s")
        elif cloud == "gcp":
            source = Gcp(interval)
            say("asking GCP for notices")
        else:
            called = time.time()
            source = Kubernetes((lambda: called) if once else stop.at, grace_s)
            if not once:
                say(f"waiting for Kubernetes to end this pod, with {grace_s:g} s of grace")
        watch = Watch(source, node, say)
        while True:
            last = once or stop.at() is not None
            start = time.monotonic()
            watch.round()
            if last and not watch.pending:
                break
            if watch.pending:
                pause = _RETRY_S
            elif watch.failures:
                pause = _back_off(interval, watch.failures)
            else:  # a question to GCP waits for its answer by itself
                pause = max(0.0, interval - (time.monotonic() - start))
            if last:
                time.sleep(pause)
            else:
                stop.wait(pause)
        if cloud == "kubernetes":
            watch.wait_for_end()
        return watch.settled and not (once and watch.failures)


def _find_cloud(stop: Termination, say: Callable[[str], None], interval: float, once: bool) -> Cloud | None:
    """Which cloud this is, however long that takes; None where SIGTERM comes first."""
    tries = 0
    while stop.at() is None:
        cloud = detect()
        if cloud is not None:
            return cloud
        if once:
            raise UserError(
                "--cloud auto: neither the metadata server of AWS nor that of GCP answers, and this is no pod of "
                "Kubernetes; expected one of them"
            )
        if tries == 0:
            say("neither the metadata server of AWS nor that of GCP answers; asking on")
        tries += 1
        stop.wait(_back_off(interval, tries))
    return None


def _back_off(interval: float, failures: int) -> float:
    return interval * min(2.0 ** min(failures - 1, 10), _MAX_BACK_OFF)
