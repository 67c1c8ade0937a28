"""The clouds' notices, from a server on loopback that speaks as the metadata servers of AWS and of Google do."""

import http.server
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from email.utils import formatdate
from urllib.parse import parse_qs, urlsplit

import pytest

from mimiclab.cluster import notices, spot_watch
from mimiclab.cluster.drain import NodeError, RayNode
from mimiclab.cluster.notices import Aws, Gcp, Kubernetes, detect
from mimiclab.cluster.spot_watch import Watch
from mimiclab.errors import UserError

NODE = "ab" * 28
AWS, GCP = "AWS_EC2_METADATA_SERVICE_ENDPOINT", "GCE_METADATA_HOST"


class Metadata(http.server.ThreadingHTTPServer):
    """What both clouds' servers know, and how they may fail."""

    daemon_threads = True

    def __init__(self, speaks: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.speaks = speaks
        self.changed = threading.Condition()
        self.items = {"preempted": "FALSE", "maintenance-event": "NONE"} if speaks == "gcp" else {}
        self.token_s = 3600.0
        self.tokens: dict[str, float] = {}
        self.date = 0.0
        self.fault: Callable[[Handler], None] | None = None
        self.fault_at = ""
        self.log: list[tuple[str, str, int]] = []

    def put(self, item: str, value: object | None) -> None:
        with self.changed:
            if value is None:
                self.items.pop(item, None)
            else:
                self.items[item] = value if isinstance(value, str) else json.dumps(value)
            self.changed.notify_all()

    def questions(self) -> list[str]:
        return [path for method, path, _ in self.log if method == "GET"]

    def handle_error(self, request: object, address: object) -> None:
        """A client that went away is no news."""


class Handler(http.server.BaseHTTPRequestHandler):
    server: Metadata

    def do_PUT(self) -> None:
        wanted = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
        if self.server.speaks != "aws":
            self.answer(405)
        elif self.path != "/latest/api/token" or not wanted.isdecimal() or not 1 <= int(wanted) <= 21600:
            self.answer(400)
        elif not self.fail():
            token = f"token-{len(self.server.tokens)}=="
            self.server.tokens[token] = time.monotonic() + self.server.token_s
            self.answer(200, token, {"X-aws-ec2-metadata-token-ttl-seconds": f"{self.server.token_s:.0f}"})

    def do_GET(self) -> None:
        if self.fail():
            return
        if self.server.speaks == "aws":
            expires = self.server.tokens.get(self.headers.get("X-aws-ec2-metadata-token", ""), 0)
            if time.monotonic() >= expires:
                self.answer(401)
            else:
                self.answer_item(self.path.removeprefix("/latest/meta-data/"), {})
            return
        google = {"Metadata-Flavor": "Google", "Server": "Metadata Server for VM"}
        if self.headers.get("Metadata-Flavor") != "Google":
            self.answer(403, "", google)
            return
        url = urlsplit(self.path)
        item = url.path.removeprefix("/computeMetadata/v1/instance/")
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        if query.get("wait_for_change") == "true":
            before = query.get("last_etag", self.etag(item))
            with self.server.changed:
                self.server.changed.wait_for(lambda: self.etag(item) != before, float(query["timeout_sec"]))
        self.answer_item(item, {**google, "ETag": self.etag(item)})

    def etag(self, item: str) -> str:
        return f"{self.server.items.get(item, '').encode().hex():0>16}"

    def fail(self) -> bool:
        fault = self.server.fault if self.server.fault_at in self.path else None
        if fault is not None:
            self.server.log.append((self.command, self.path, 0))
            fault(self)
        return fault is not None

    def answer_item(self, item: str, headers: dict[str, str]) -> None:
        found = self.server.items.get(item)
        self.answer(404 if found is None else 200, found or "", headers)

    def answer(self, status: int, text: str = "", headers: dict[str, str] | None = None) -> None:
        self.server.log.append((self.command, self.path, status))
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(text))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    def date_time_string(self, timestamp: float | None = None) -> str:
        return formatdate(time.time() + self.server.date, usegmt=True)

    def log_message(self, format: str, *args: object) -> None:
        pass


class Node(RayNode):
    """A node that notes how it is drained, after having refused a number of times."""

    def __init__(self, refuse: int = 0) -> None:
        super().__init__(None, None)
        self.refuse = refuse
        self.drains: list[float | None] = []
        self.asked = 0

    def find(self) -> str:
        return NODE

    def drain(self, message: str, deadline: float | None) -> str:
        self.asked += 1
        if self.asked <= self.refuse:
            raise NodeError("not now")
        self.drains.append(deadline)
        return NODE


@pytest.fixture(autouse=True)
def _no_cloud(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine is, nothing but the server on loopback is asked, and no cluster but one that is named."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        closed = f"127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.setenv(AWS, f"http://{closed}")
    monkeypatch.setenv(GCP, closed)
    monkeypatch.setenv("RAY_ADDRESS", closed)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://{closed}")
    monkeypatch.setattr(notices, "_ANSWER_S", 0.5)


def serve(speaks: str) -> Iterator[Metadata]:
    with Metadata(speaks) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[Metadata]:
    for server in serve("aws"):
        monkeypatch.setenv(AWS, f"http://127.0.0.1:{server.server_port}/")
        yield server


@pytest.fixture
def gcp(monkeypatch: pytest.MonkeyPatch) -> Iterator[Metadata]:
    for server in serve("gcp"):
        monkeypatch.setenv(GCP, f"127.0.0.1:{server.server_port}")
        yield server


ACTION, REBALANCE = "spot/instance-action", "events/recommendations/rebalance"


def iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def announce(server: Metadata, seconds: float = 120, action: str = "terminate") -> float:
    deadline = float(int(time.time() + seconds))
    server.put(ACTION, {"action": action, "time": iso(deadline)})
    return deadline


class Rounds:
    """A watch and what came of it."""

    def __init__(self, source: notices.Source, refuse: int = 0) -> None:
        self.lines: list[str] = []
        self.node = Node(refuse)
        self.watch = Watch(source, self.node, self.lines.append)

    def __call__(self, num: int = 1) -> list[str]:
        """Go round; return the new lines."""
        before = len(self.lines)
        for _ in range(num):
            self.watch.round()
        return self.lines[before:]


# AWS


def test_without_a_notice_one_session_serves_all_questions(aws: Metadata) -> None:
    rounds = Rounds(Aws())

    assert rounds(3) == [f"watching over node {NODE}"]

    assert rounds.node.drains == []
    assert [method for method, _, _ in aws.log] == ["PUT"] + ["GET"] * 6
    assert {status for method, _, status in aws.log if method == "GET"} == {404}


@pytest.mark.parametrize("action", ["terminate", "stop", "hibernate"])
def test_a_notice_drains_the_node_once_with_its_deadline(aws: Metadata, action: str) -> None:
    deadline = announce(aws, action=action)
    rounds = Rounds(Aws())

    lines = rounds(3)

    assert rounds.node.drains == [deadline]
    assert re.fullmatch(rf"AWS will {action} this instance, in 1(19|20) s", lines[0])
    assert lines[1:] == [f"drained node {NODE}"]


def test_a_notice_that_changes_drains_again(aws: Metadata) -> None:
    rounds = Rounds(Aws())
    first = announce(aws, 120)
    rounds()
    second = announce(aws, 90)
    rounds()

    assert rounds.node.drains == [first, second]
    assert not any("withdrawn" in line for line in rounds.lines)


def test_a_notice_that_is_withdrawn_is_reported_and_may_come_back(aws: Metadata) -> None:
    rounds = Rounds(Aws())
    deadline = announce(aws)
    rounds()
    aws.put(ACTION, None)

    assert rounds(2) == ["withdrawn: AWS will terminate this instance; the node stays drained until Ray restarts"]

    aws.put(ACTION, {"action": "terminate", "time": iso(deadline)})
    rounds()
    assert rounds.node.drains == [deadline, deadline]


def test_a_deadline_that_has_passed_drains_all_the_same(aws: Metadata) -> None:
    deadline = announce(aws, -60)
    rounds = Rounds(Aws())

    lines = rounds()

    assert rounds.node.drains == [deadline]
    assert re.search(r"due 6\d s ago", lines[0])


@pytest.mark.parametrize("notice", [{"action": "terminate"}, {"action": "terminate", "time": "soon"}])
def test_a_notice_of_no_readable_time_drains_without_a_deadline(aws: Metadata, notice: dict[str, str]) -> None:
    aws.put(ACTION, notice)
    rounds = Rounds(Aws())

    assert rounds() == ["AWS will terminate this instance", f"drained node {NODE}"]
    assert rounds.node.drains == [None]


def test_a_time_of_another_zone_is_understood(aws: Metadata) -> None:
    aws.put(ACTION, {"action": "stop", "time": "2026-11-22T12:00:00+02:00"})
    rounds = Rounds(Aws())
    rounds()
    assert rounds.node.drains == [datetime(2026, 11, 22, 10, tzinfo=UTC).timestamp()]


def test_a_recommendation_is_a_warning(aws: Metadata) -> None:
    aws.put(REBALANCE, {"noticeTime": iso(time.time())})
    rounds = Rounds(Aws())

    assert rounds(2)[0] == "AWS recommends to replace this instance (rebalance)"
    assert rounds.node.drains == []
    assert rounds.watch.settled


def test_a_recommendation_drains_if_asked_to_and_a_notice_then_sets_the_deadline(aws: Metadata) -> None:
    aws.put(REBALANCE, {"noticeTime": iso(time.time())})
    rounds = Rounds(Aws(drain_on_rebalance=True))
    rounds(2)
    deadline = announce(aws)
    rounds(2)
    assert rounds.node.drains == [None, deadline]


def test_a_session_is_renewed_before_it_expires(aws: Metadata, monkeypatch: pytest.MonkeyPatch) -> None:
    now, later_s = time.monotonic, 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now() + later_s)  # the server's clock too
    source = Aws()
    for later_s in (0.0, 0.85 * aws.token_s, 0.95 * aws.token_s, 1.8 * aws.token_s, 1.9 * aws.token_s):  # noqa: B007
        list(source.ask())

    assert len(aws.tokens) == 3
    assert 401 not in {status for _, _, status in aws.log}


def test_a_session_that_is_refused_is_renewed_at_once(aws: Metadata) -> None:
    rounds = Rounds(Aws())
    rounds()
    aws.tokens.clear()
    deadline = announce(aws)
    rounds()

    assert rounds.node.drains == [deadline]
    assert [status for _, path, status in aws.log if path.endswith("action")] == [404, 401, 200]


def test_a_clock_that_is_ahead_takes_no_time_from_the_notice(aws: Metadata) -> None:
    aws.date = -600  # by its clock it is ten minutes earlier than by ours
    deadline = announce(aws, -600 + 120)
    rounds = Rounds(Aws(), refuse=1)

    lines = rounds(2)

    assert re.search(r"in 1(18|19|20|21) s", lines[0])
    assert lines[1:] == ["the node is not drained: not now", f"drained node {NODE}"]
    assert rounds.node.drains == [deadline]


# Failures


def silence(handler: Handler) -> None:
    time.sleep(1.5)


def trickle(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    for _ in range(15):
        time.sleep(0.1)
        handler.wfile.write(b"{")


def trickle_without_length(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.0 404 Not Found\r\n\r\n")
    for _ in range(15):
        time.sleep(0.1)
        handler.wfile.write(b" ")


def break_off(handler: Handler) -> None:
    handler.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"action": ')


def another_protocol(handler: Handler) -> None:
    handler.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n")


def flood(handler: Handler) -> None:
    handler.answer(200, " " * 100_000)


FAULTS: list[Callable[[Handler], None]] = [
    silence,
    trickle,
    trickle_without_length,
    break_off,
    another_protocol,
    flood,
    lambda handler: handler.answer(500),
    lambda handler: handler.answer(503, "{}"),
    lambda handler: handler.answer(403),
    lambda handler: handler.answer(302, "", {"Location": "/elsewhere"}),
    lambda handler: handler.answer(200, "<html>"),
    lambda handler: handler.answer(200, '{"action": "term'),
    lambda handler: handler.answer(200, "[]"),
    lambda handler: handler.answer(200, '{"time": "2026-11-22T12:00:00Z"}'),
    lambda handler: handler.answer(200, '{"action": "a\\nb"}'),
    lambda handler: None,
]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.slow
def test_a_question_without_an_answer_is_said_once_and_survived(
    aws: Metadata, fault: Callable[[Handler], None]
) -> None:
    rounds = Rounds(Aws())
    rounds()
    aws.fault, aws.fault_at = fault, ACTION
    start = time.monotonic()
    lines = rounds(2)

    assert time.monotonic() - start < 1.4
    assert len(lines) == 1
    assert re.fullmatch(r"no answer from the metadata server \(.+\); asking on", lines[0])
    assert rounds.watch.failures == 2
    assert rounds.node.drains == []

    aws.fault = None
    deadline = announce(aws)
    assert rounds()[-1] == "the metadata server answers"
    assert rounds.node.drains == [deadline]


def test_an_answer_in_pieces_is_put_together(aws: Metadata) -> None:
    deadline = float(int(time.time()) + 120)
    text = json.dumps({"action": "terminate", "time": iso(deadline)}).encode()

    def pieces(handler: Handler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for byte in text:
            handler.wfile.write(b"1\r\n%c\r\n" % byte)
            time.sleep(0.002)
        handler.wfile.write(b"0\r\n\r\n")

    aws.fault, aws.fault_at = pieces, ACTION
    rounds = Rounds(Aws())
    rounds()
    assert rounds.node.drains == [deadline]


def test_a_server_that_is_not_there_is_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = Rounds(Aws())

    lines = rounds(3)

    assert "Connection refused" in lines[0]
    assert lines[1:] == [f"watching over node {NODE}"]


def test_what_is_less_urgent_may_fail_without_hiding_a_notice(aws: Metadata) -> None:
    aws.fault, aws.fault_at = FAULTS[6], REBALANCE
    deadline = announce(aws)
    rounds = Rounds(Aws())
    rounds(2)
    assert rounds.node.drains == [deadline]


def test_a_notice_that_is_known_holds_while_the_server_is_away(aws: Metadata) -> None:
    rounds = Rounds(Aws(), refuse=2)
    deadline = announce(aws)
    rounds()
    aws.fault = FAULTS[6]
    rounds(3)
    assert rounds.node.drains == [deadline]
    assert rounds.node.asked == 3


@pytest.mark.slow
def test_a_drain_that_fails_is_tried_until_the_deadline(aws: Metadata) -> None:
    announce(aws, 2)
    rounds = Rounds(Aws(), refuse=1000)
    rounds(2)
    assert rounds.watch.pending

    time.sleep(2)
    rounds(3)

    assert rounds.lines[1:] == [
        "the node is not drained: not now",
        "the deadline has come, and the node is not drained",
    ]
    assert rounds.node.asked == 3
    assert not rounds.watch.pending
    assert not rounds.watch.settled


def test_questions_back_off_to_a_limit() -> None:
    assert [spot_watch._back_off(5, failures) for failures in (1, 2, 3, 4, 5000)] == [5, 10, 20, 20, 20]


# GCP


@pytest.mark.slow
def test_a_preempted_instance_has_thirty_seconds(gcp: Metadata) -> None:
    rounds = Rounds(Gcp(1))
    rounds()
    gcp.put("preempted", "TRUE")
    lines = rounds(2)

    assert lines == ["GCP preempts this instance, in 30 s", f"drained node {NODE}"]
    assert rounds.node.drains == [pytest.approx(time.time() + 30, abs=5)]


def test_a_change_ends_the_wait_for_it(gcp: Metadata) -> None:
    rounds = Rounds(Gcp(5))
    rounds()
    threading.Timer(0.3, gcp.put, ("preempted", "TRUE")).start()
    start = time.monotonic()
    rounds()

    assert rounds.node.drains
    assert 0.2 < time.monotonic() - start < 1.5


def test_a_change_between_two_questions_is_not_waited_for(gcp: Metadata) -> None:
    rounds = Rounds(Gcp(5))
    rounds()
    gcp.put("preempted", "TRUE")
    start = time.monotonic()
    rounds()

    assert rounds.node.drains
    assert time.monotonic() - start < 1


@pytest.mark.slow
def test_a_wait_without_a_change_is_no_failure(gcp: Metadata) -> None:
    rounds = Rounds(Gcp(1))  # longer than a plain question may take
    assert rounds(2) == [f"watching over node {NODE}"]
    assert "timeout_sec=1" in gcp.questions()[2]


@pytest.mark.slow
def test_maintenance_that_stops_the_instance_drains_it_and_a_move_does_not(gcp: Metadata) -> None:
    rounds = Rounds(Gcp(1))
    gcp.put("maintenance-event", "MIGRATE_ON_HOST_MAINTENANCE")
    assert rounds()[0] == "GCP will move this instance to another host"
    assert rounds.node.drains == []

    gcp.put("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")
    assert rounds()[0] == "GCP will stop this instance to maintain its host, in 60 s"
    assert rounds.node.drains == [pytest.approx(time.time() + 60, abs=5)]

    gcp.put("preempted", "TRUE")  # the nearer deadline holds
    rounds()
    assert rounds.node.drains[1:] == [pytest.approx(time.time() + 30, abs=5)]


def test_an_answer_that_is_not_googles_is_none(gcp: Metadata) -> None:
    def captive_portal(handler: Handler) -> None:
        handler.answer(200, "TRUE")

    gcp.fault = captive_portal
    rounds = Rounds(Gcp(1))
    assert "not Google's" in rounds()[0]
    assert rounds.node.drains == []


@pytest.mark.parametrize("value", ["", "TRU", "<html>"])
def test_an_answer_that_says_neither_is_none(gcp: Metadata, value: str) -> None:
    gcp.put("preempted", value)
    rounds = Rounds(Gcp(1))
    assert "where TRUE or FALSE should be" in rounds()[0]
    assert rounds.node.drains == []


# Kubernetes, and which cloud it is


def test_the_end_of_a_pod_has_what_is_left_of_its_grace() -> None:
    asked: list[float | None] = [None]
    rounds = Rounds(Kubernetes(lambda: asked[0], 25))
    rounds()
    assert rounds.node.drains == []

    asked[0] = time.time() - 5
    assert rounds()[0] == "Kubernetes ends this pod, in 20 s"
    assert rounds.node.drains == [asked[0] + 25]


def test_each_cloud_is_told_from_the_others(aws: Metadata, monkeypatch: pytest.MonkeyPatch) -> None:
    assert detect() == "aws"
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert detect() == "kubernetes"


def test_google_is_told_from_aws_which_has_the_same_address(gcp: Metadata, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(AWS, f"http://127.0.0.1:{gcp.server_port}")
    assert detect() == "gcp"


def test_aws_has_the_same_address_as_google(aws: Metadata, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(GCP, f"127.0.0.1:{aws.server_port}")
    assert detect() == "aws"


def test_a_machine_of_no_cloud_is_none() -> None:
    assert detect() is None


# The node, without a cluster: tests/integration has one


@pytest.mark.parametrize("address", ["ray://127.0.0.1:10001", "http://127.0.0.1:8265", "head", "head:port"])
def test_what_is_no_address_of_a_head_is_refused(address: str) -> None:
    with pytest.raises(UserError, match=rf"--address {address}: .*expected HOST:PORT"):
        RayNode(address, None)


def test_what_is_no_id_of_a_node_is_refused() -> None:
    with pytest.raises(UserError, match=r"--node-id 12: .*56 hexadecimal digits"):
        RayNode(None, "12")


def test_a_head_that_is_not_there_is_said_soon() -> None:
    start = time.monotonic()
    with pytest.raises(NodeError, match=r"no head of Ray answers at 127\.0\.0\.1:\d+ .*refused"):
        RayNode(None, None).find()
    assert time.monotonic() - start < 5


@pytest.mark.slow
def test_a_head_that_does_not_answer_is_given_up() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        start = time.monotonic()
        with pytest.raises(NodeError, match="Ray did not answer within 2 s"):
            RayNode(f"127.0.0.1:{silent.getsockname()[1]}", NODE, limit_s=2).drain("", None)
        assert time.monotonic() - start < 5


# The command


def command(*args: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "mimiclab", "spot-watch", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )


def finish(process: "subprocess.Popen[str]") -> tuple[int, str]:
    output, _ = process.communicate(timeout=30)
    return process.returncode, output


def test_once_asks_once(aws: Metadata) -> None:
    code, output = finish(command("--once"))

    assert code == 0, output
    assert len(aws.questions()) == 2
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ asking AWS", output)


def test_once_fails_where_no_cloud_answers() -> None:
    code, output = finish(command("--once"))
    assert code == 2
    assert "error: --cloud auto: neither" in output

    code, output = finish(command("--once", "--cloud", "gcp"))
    assert code == 1
    assert "no answer from the metadata server" in output


def test_sigterm_ends_a_watch_after_one_question_more(aws: Metadata) -> None:
    process = command("--cloud", "aws", "--interval", "30")
    assert process.stdout is not None
    for line in process.stdout:
        if "no node to watch over" in line:
            break
    before = len(aws.questions())
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)

    assert code == 0, output
    assert output == ""
    assert len(aws.questions()) == before + 2


@pytest.mark.slow
def test_sigterm_is_the_notice_of_kubernetes() -> None:
    process = command("--cloud", "kubernetes", "--grace-seconds", "2")
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    start = time.monotonic()
    code, output = finish(process)

    assert code == 1
    assert "Kubernetes ends this pod, in 2 s" in output
    assert "the deadline has come, and the node is not drained" in output
    assert time.monotonic() - start > 1.5


@pytest.mark.slow
def test_the_hook_of_a_pod_that_ends_needs_no_signal() -> None:
    code, output = finish(command("--cloud", "kubernetes", "--once", "--grace-seconds", "1"))

    assert code == 1
    assert "Kubernetes ends this pod, in 1 s" in output
    assert "the node is not drained: no head of Ray answers" in output


def test_a_watch_does_without_ray() -> None:
    code = "import sys, mimiclab.cli, mimiclab.cluster.spot_watch; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {name.partition(".")[0] for name in done.stdout.split()} & {"ray", "torch", "pydantic", "numpy"} == set()
