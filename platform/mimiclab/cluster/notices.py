"""What the clouds say about the end of this machine: AWS, GCP and Kubernetes, each in its own protocol."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Literal, Protocol

from mimiclab.cluster.metadata import Answer, MetadataServer, NoAnswerError

Cloud = Literal["aws", "gcp", "kubernetes"]
Kind = Literal["interruption", "rebalance", "maintenance"]

# Both clouds' servers are at the same link-local address. Google's also has a name, metadata.google.internal; without
# it there is no name server to wait for in the few seconds that a notice leaves.
_LINK_LOCAL = "169.254.169.254"
_ANSWER_S = 2.0
_DETECT_S = 1.0
# AWS allows 1 s to 6 h.
_TOKEN_S = 21600
# How far two clocks may differ, given that an HTTP date has whole seconds, before one is taken to be wrong.
_SKEW_S = 2.0


@dataclass(frozen=True)
class Notice:
    """Something that a cloud has announced."""

    what: str
    """A sentence about it, without its time."""
    deadline: float | None = None
    """When it will happen, in seconds since 1970; None where the cloud does not say."""
    drains: bool = True
    """Whether the node has to be drained for it; otherwise it is a warning."""


class Source(Protocol):
    """Where notices come from."""

    def ask(self) -> Iterator[tuple[Kind, Notice | None]]:
        """What is announced now, of each kind that this cloud has; the most urgent kind first.

        Raises:
            NoAnswerError: while iterating; what came before it holds.
        """

    def now(self) -> float:
        """The time, in seconds since 1970, by the clock that the deadlines are of."""


class Aws:
    """Notices for EC2 spot instances, by the instance metadata service, version 2.

    Announced two minutes ahead, on a best-effort basis, and without a deadline before a hibernation; to be asked for
    every 5 s (Amazon EC2 User Guide, "Spot Instance interruption notices"). A recommendation to rebalance says that
    the instance is at an elevated risk of an interruption; many of those instances live on for hours.

    Args:
        drain_on_rebalance: drain for such a recommendation too; it has no deadline.
    """

    def __init__(self, drain_on_rebalance: bool = False) -> None:
        variable = "AWS_EC2_METADATA_SERVICE_ENDPOINT"
        self._server = MetadataServer(variable, os.environ.get(variable) or f"http://{_LINK_LOCAL}")
        self._drain_on_rebalance = drain_on_rebalance
        self._token = ""
        self._renew_at = -math.inf
        self._ahead = 0.0

    def ask(self) -> Iterator[tuple[Kind, Notice | None]]:
        """See Source."""
        yield "interruption", self._interruption()
        yield "rebalance", self._rebalance()

    def now(self) -> float:
        """The time by the server's clock where this machine's is clearly another."""
        return time.time() - self._ahead

    def renew_token(self, seconds: float) -> None:
        """Open a session.

        Raises:
            NoAnswerError: the server gives no token; another cloud's has none to give.
        """
        asked = time.monotonic()
        answer = self._server.ask(
            "/latest/api/token",
            {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_S)},
            seconds=seconds,
            method="PUT",
        )
        if answer.status != 200 or not answer.text or not answer.text.isprintable():
            raise NoAnswerError(f"no session token (status {answer.status})")
        granted = answer.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
        self._token = answer.text
        # Some time before it expires, so that no question is asked with a token that expires on its way.
        self._renew_at = asked + 0.9 * (int(granted) if granted.isdecimal() else _TOKEN_S)

    def _interruption(self) -> Notice | None:
        found = self._item("spot/instance-action")
        if found is None:
            return None
        action = found.get("action")
        if not isinstance(action, str) or not action.isalpha():
            raise NoAnswerError("an instance-action without an action")
        # One that cannot be read is no reason to doubt that the machine will go.
        return Notice(f"AWS will {action} this instance", _seconds(found.get("time")))

    def _rebalance(self) -> Notice | None:
        found = self._item("events/recommendations/rebalance")
        if found is None:
            return None
        return Notice("AWS recommends to replace this instance (rebalance)", drains=self._drain_on_rebalance)

    def _item(self, name: str) -> dict[str, object] | None:
        """An item that is a JSON object; None where there is none."""
        if time.monotonic() >= self._renew_at:
            self.renew_token(_ANSWER_S)
        answer = self._get(name)
        if answer.status == 401:
            self.renew_token(_ANSWER_S)
            answer = self._get(name)
        if answer.status == 404:
            return None
        if answer.status != 200:
            raise NoAnswerError(f"status {answer.status}")
        try:
            found = json.loads(answer.text)
        except ValueError as error:
            raise NoAnswerError(f"no JSON where {name} should be") from error
        if not isinstance(found, dict):
            raise NoAnswerError(f"no JSON object where {name} should be")
        return found

    def _get(self, name: str) -> Answer:
        headers = {"X-aws-ec2-metadata-token": self._token}
        answer = self._server.ask(f"/latest/meta-data/{name}", headers, seconds=_ANSWER_S)
        date = answer.headers.get("Date")
        if date is not None:
            try:
                ahead = time.time() - parsedate_to_datetime(date).timestamp()
            except ValueError:
                return answer
            self._ahead = ahead if abs(ahead) > _SKEW_S else 0.0
        return answer


class Gcp:
    """Notices for Compute Engine's spot and preemptible instances, by the metadata server.

    A preempted instance has 30 s from the notice on; as that has no time, it is taken to be as old as the answer.
    Where the host is to be maintained, one that cannot be moved has 60 s, with a GPU an hour (Compute Engine's
    documentation, "GPU host maintenance events"); 60 s are taken for both.

    Args:
        wait_s: how long a question may wait for its answer to change, once the answer is known.
    """

    _PREEMPTED_S = 30.0
    _MAINTENANCE_S = 60.0

    def __init__(self, wait_s: float = 5.0) -> None:
        host = os.environ.get("GCE_METADATA_HOST") or _LINK_LOCAL
        self._server = MetadataServer("GCE_METADATA_HOST", f"http://{host}")
        self._wait_s = max(1, round(wait_s))
        self._etag: str | None = None
        self._seen: dict[Kind, Notice] = {}

    def ask(self) -> Iterator[tuple[Kind, Notice | None]]:
        """See Source."""
        # Waiting without the tag of a known answer would miss a change that happened before.
        known = f"?wait_for_change=true&last_etag={self._etag}&timeout_sec={self._wait_s}" if self._etag else ""
        answer = self.get(f"preempted{known}", self._wait_s + _ANSWER_S if known else _ANSWER_S)
        preempted = _one_of(answer.text.upper(), ("TRUE", "FALSE")) == "TRUE"
        self._etag = answer.headers.get("ETag")
        yield "interruption", self._remember("interruption", preempted, "GCP preempts this instance", self._PREEMPTED_S)

        events = ("NONE", "MIGRATE_ON_HOST_MAINTENANCE", "TERMINATE_ON_HOST_MAINTENANCE")
        event = _one_of(self.get("maintenance-event", _ANSWER_S).text.upper(), events)
        if event.startswith("MIGRATE"):
            yield "maintenance", Notice("GCP will move this instance to another host", drains=False)
        else:
            what = "GCP will stop this instance to maintain its host"
            ends = event.startswith("TERMINATE")
            yield "maintenance", self._remember("maintenance", ends, what, self._MAINTENANCE_S)

    def now(self) -> float:
        """This machine's time, from which the deadlines are counted."""
        return time.time()

    def get(self, item: str, seconds: float) -> Answer:
        """An item of the instance.

        Raises:
            NoAnswerError: there is no such item, or the server is not Google's.
        """
        path = f"/computeMetadata/v1/instance/{item}"
        answer = self._server.ask(path, {"Metadata-Flavor": "Google"}, seconds=seconds)
        if answer.headers.get("Metadata-Flavor") != "Google":
            raise NoAnswerError("an answer of a server that is not Google's")
        if answer.status != 200:
            raise NoAnswerError(f"status {answer.status}")
        return answer

    def _remember(self, kind: Kind, announced: bool, what: str, seconds: float) -> Notice | None:
        """The same notice, with the same deadline, for as long as it is announced."""
        if announced:
            return self._seen.setdefault(kind, Notice(what, self.now() + seconds))
        self._seen.pop(kind, None)
        return None


class Kubernetes:
    """The end of a pod, which its containers learn by a signal.

    Args:
        asked_at: when that signal came, in seconds since 1970; None before.
        grace_s: how long the pod lives from then on.
    """

    def __init__(self, asked_at: Callable[[], float | None], grace_s: float) -> None:
        self._asked_at = asked_at
        self._grace_s = grace_s

    def ask(self) -> Iterator[tuple[Kind, Notice | None]]:
        """See Source; never NoAnswerError."""
        asked = self._asked_at()
        yield "interruption", None if asked is None else Notice("Kubernetes ends this pod", asked + self._grace_s)

    def now(self) -> float:
        """This machine's time."""
        return time.time()


def detect() -> Cloud | None:
    """Which cloud this is, within about 2 s; None where none says.

    In a pod that is Kubernetes, whatever is below it: what happens to the machine reaches the pod as its end, and the
    machine's metadata is as a rule closed to pods.
    """
    if os.environ.get("KUBERNETES_SERVICE_HOST"):
        return "kubernetes"
    try:
        Aws().renew_token(_DETECT_S)
        return "aws"
    except NoAnswerError:
        pass
    try:
        Gcp().get("preempted", _DETECT_S)
        return "gcp"
    except NoAnswerError:
        return None


def _seconds(text: object) -> float | None:
    """ISO 8601, in UTC where it does not say, as seconds since 1970; None where it is neither."""
    if not isinstance(text, str):
        return None
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return None
    return (found if found.tzinfo is not None else found.replace(tzinfo=UTC)).timestamp()


def _one_of(found: str, expected: tuple[str, ...]) -> str:
    if found not in expected:
        raise NoAnswerError(f"{found[:40]!r} where {' or '.join(expected)} should be")
    return found
