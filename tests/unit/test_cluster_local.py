import contextlib
import dataclasses
import http.server
import json
import subprocess
import threading
import time
from pathlib import Path

import psutil
import pytest

from mimiclab.cluster import local, state
from mimiclab.errors import UserError


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", "")


@pytest.fixture
def family():
    """A process with a child that would survive it."""
    parent = psutil.Popen(["sh", "-c", "sleep 300 & wait"], start_new_session=True)
    while not (children := parent.children()):
        time.sleep(0.01)
    yield [psutil.Process(parent.pid), *children]
    for process in [parent, *children]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    parent.wait()


@pytest.fixture
def cluster(family, tmp_path):
    """A cluster whose head takes no jobs."""
    folder = tmp_path / "ray"
    folder.mkdir()
    return state.LocalCluster(
        "127.0.0.1:1",
        "http://127.0.0.1:2",
        str(folder),
        {"RAY_AUTH_MODE": "token"},
        processes=state.identify(family[:1]),
    )


def test_a_cluster_is_remembered(cluster):
    cluster.write()

    assert state.remembered() == cluster
    assert state.running() == cluster


def test_down_ends_what_was_started_and_forgets_it(cluster, family, tmp_path):
    cluster.write()
    said = []

    assert local.down(said.append)

    assert not any(map(state.is_alive, family))
    assert said[0].startswith(
        "jobs end with the cluster, not in good order: the cluster of this machine does not answer"
    )
    assert said[1:] == [f"ended 2 processes and removed {tmp_path / 'ray'}"]
    assert state.remembered() is None
    assert not (tmp_path / "ray").exists()


@pytest.fixture
def job_server():
    """Starts a job server that answers each path with a status and a body, others with 500; None never answers."""
    with contextlib.ExitStack() as stack:
        silence = threading.Event()
        stack.callback(silence.set)

        def start(answers):
            class Handler(http.server.BaseHTTPRequestHandler):
                def do_GET(self):
                    answer = answers.get(self.path, "no such thing")
                    if answer is None:
                        silence.wait()
                    self.send_response(500 if isinstance(answer, str) else 200)
                    self.end_headers()
                    self.wfile.write(json.dumps(answer).encode())

                def do_POST(self):
                    self.do_GET()

                def log_message(self, *_):
                    pass

            web = stack.enter_context(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
            web.daemon_threads = True
            threading.Thread(target=web.serve_forever, daemon=True).start()
            stack.callback(web.shutdown)
            return f"http://127.0.0.1:{web.server_port}"

        yield start


VERSION = {"/api/version": {"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": ""}}


def job(name, status="RUNNING"):
    return {"type": "SUBMISSION", "submission_id": name, "status": status, "entrypoint": "true"}


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ({}, ["does not answer at"]),
        (VERSION, ["not in good order: Request failed with status code 500"]),
        ({**VERSION, "/api/jobs/": {"jobs": []}}, ["not in good order: "]),
        (
            {**VERSION, "/api/jobs/": [job("a"), job("b"), job("c", "FAILED")], "/api/jobs/b/stop": {"stopped": True}},
            [
                "stopping job b",
                "stopping job a",
                "job a cannot be stopped: Request failed with status code 500",
                "not all have ended",
            ],
        ),
        ({**VERSION, "/api/jobs/": None}, ["not all have ended after 3 s"]),
    ],
    ids=["nothing", "no list", "another list", "one stop", "silence"],
)
@pytest.mark.slow
def test_down_ends_a_cluster_whose_job_server_does_not_answer_as_it_should(
    cluster, family, job_server, monkeypatch, answers, said
):
    monkeypatch.setattr(local, "_JOBS_TIMEOUT_S", 3.0)
    dataclasses.replace(cluster, job_server=job_server(answers)).write()
    lines = []

    assert local.down(lines.append)

    assert not any(map(state.is_alive, family))
    assert state.remembered() is None
    *lines, last = lines
    assert last.startswith("ended 2 processes")
    assert len(lines) == len(said)
    assert all(any(words in line for line in lines) for words in said), lines


def test_down_leaves_a_process_alone_that_was_given_the_same_number(cluster, family):
    pid, started = cluster.processes[0].pid, cluster.processes[0].started
    dataclasses.replace(cluster, processes=(state.ProcessId(pid, started - 60),)).write()
    said = []

    assert state.running() is None
    assert local.down(said.append)

    assert all(map(state.is_alive, family))
    assert said[0].startswith("ended 0 processes")


@pytest.mark.slow
def test_a_node_that_was_just_starting_and_does_not_hear_is_ended_too(cluster, monkeypatch):
    monkeypatch.setattr(local, "_STOP_TIMEOUT_S", 0.5)
    script = "trap '' TERM; echo deaf; while :; do sleep 0.1; done"
    node = psutil.Popen(["sh", "-c", script], start_new_session=True, stdout=subprocess.PIPE)
    node.stdout.readline()
    dataclasses.replace(cluster, nodes={"node-1": state.identify([node])[0]}).write()

    assert local.down(lambda _: None)

    assert not state.is_alive(node)
    node.communicate()


def test_what_the_head_left_behind_is_ended_too(cluster, family):
    dataclasses.replace(cluster, processes=state.identify(family)).write()
    family[0].kill()
    psutil.wait_procs(family[:1])

    assert local.down(lambda _: None)

    assert not state.is_alive(family[1])


def test_a_process_that_ended_is_not_running_though_nobody_waited_for_it(cluster, family):
    cluster.write()
    with subprocess.Popen(["true"]) as ended:
        while psutil.Process(ended.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        dataclasses.replace(cluster, processes=state.identify([psutil.Process(ended.pid)])).write()

        assert state.running() is None


def test_a_second_cluster_is_refused(cluster):
    cluster.write()

    with pytest.raises(UserError, match=r"runs on this machine already, at http://127\.0\.0\.1:2"):
        local.up(None, pytest.fail)


def test_down_without_a_cluster():
    assert not local.down(pytest.fail)


def test_a_token_is_made_once_and_for_this_user_only(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / ".ray" / "auth_token"

    local.make_sure_of_token()
    first = path.read_text()
    local.make_sure_of_token()

    assert path.read_text() == first
    assert len(first) == 64
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_start_that_is_interrupted_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    heads = []

    def interrupt(_):
        cluster = state.running()
        assert cluster is not None
        heads.extend([cluster, *cluster.running()])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        local.up(1, interrupt)

    cluster, head = heads
    assert not state.is_alive(head)
    assert state.remembered() is None
    assert not Path(cluster.folder).exists()
