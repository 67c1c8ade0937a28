import dataclasses
import platform
import subprocess
from pathlib import Path

import pytest

from mimiclab.cluster import jobs
from mimiclab.cluster.jobs import Job, Task
from mimiclab.errors import UserError
from mimiclab.experiment import load_experiment


def job(id, status, name=None, run="/runs/other"):
    return Job(id, name or id, run, status, message="", started=0, ended=None)


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ([], "tiny"),
        ([job("other", "RUNNING")], "tiny"),
        ([job("tiny", "SUCCEEDED")], "tiny-2"),
        ([job("tiny", "FAILED"), job("tiny-2", "STOPPED", "tiny")], "tiny-3"),
        ([job("tiny", "STOPPED"), job("tiny-2", "RUNNING")], "tiny-3"),  # a job of another name
    ],
)
def test_attempts_are_numbered(before, expected):
    assert jobs.next_id("tiny", "/runs/tiny", before) == expected


@pytest.mark.parametrize("status", ["PENDING", "RUNNING"])
def test_a_name_in_use_is_refused(status):
    before = [job("tiny-2", status, "tiny"), job("tiny", "FAILED")]

    with pytest.raises(UserError, match=rf"the job name tiny is in use: job tiny-2 is {status}"):
        jobs.next_id("tiny", "/runs/tiny", before)


def test_two_jobs_never_train_the_same_run():
    before = [job("night", "RUNNING", run="/runs/tiny")]

    with pytest.raises(UserError, match="the run /runs/tiny is being worked at: job night is RUNNING"):
        jobs.next_id("tiny", "/runs/tiny", before)


def test_the_table_has_a_line_for_a_job():
    ended = Job("tiny-2", "tiny", "/runs/tiny", "FAILED", "error: no such file", started=1000.0, ended=4661.4)
    running = dataclasses.replace(ended, id="a-longer-name", status="RUNNING", message="", ended=None)

    lines = jobs.table([running, ended]).splitlines()

    assert len(lines) == 3
    assert lines[2].split()[:2] == ["tiny-2", "FAILED"]
    assert lines[2].split(maxsplit=5)[4:] == ["1:01:01", "error: no such file"]
    assert len({line.index(word) for line, word in zip(lines, ("STATUS", "RUNNING", "FAILED"), strict=True)}) == 1


@pytest.fixture
def python(tmp_path):
    """Stands where Python would: says where it is run and with what."""
    script = tmp_path / "a python"
    script.write_text('#!/bin/sh\necho "$PWD"\nprintf "%s\\n" "$@"\n')
    script.chmod(0o755)
    return script


@pytest.fixture
def run_entrypoint(tmp_path, monkeypatch, python):
    """Submit from one folder, run in the package's."""
    here, package = tmp_path / "it's here", tmp_path / "package"
    here.mkdir()
    package.mkdir()
    monkeypatch.chdir(here)
    Path("x.yaml").write_text("name: small\ndata: {scenes: {root: /data}}\nwhere: {storage: /runs}\n")

    def run(*overrides, verb="train", options=(), compare=False):
        experiment = load_experiment("x.yaml", overrides).experiment
        command = jobs.entrypoint(Task(verb, experiment, options), python=str(python), compare=compare)
        out = subprocess.check_output(command, shell=True, cwd=package, text=True)
        return [line.replace(str(tmp_path), "") for line in out.splitlines()]

    return run


TRAIN = ["-P", "-m", "mimiclab", "train"]


@pytest.mark.parametrize(
    "relative",
    ["where.storage=./runs", "where.tracking=sqlite:///mlflow.db", "model.backbone.weights=a.safetensors"],
)
def test_a_job_with_relative_paths_runs_where_it_was_submitted(run_entrypoint, relative):
    done = run_entrypoint("where.tracking=sqlite:////mlflow.db", relative)

    assert done == ["/it's here", *TRAIN, "/package/experiment.yaml"]


@pytest.mark.parametrize("tracking", ["sqlite:////mlflow.db", "http://mlflow:5000"])
def test_a_job_with_absolute_paths_runs_on_any_machine(run_entrypoint, tracking):
    done = run_entrypoint(f"where.tracking={tracking}", options=("--fresh",))

    assert done == ["/package", *TRAIN, "--fresh", "experiment.yaml"]


@pytest.mark.parametrize(
    ("verb", "options"),
    [("search", ()), ("drill", ("--events", "drain@7:20s,kill-node@9")), ("train", ("--seeds", "3"))],
)
def test_every_verb_gets_its_options_and_the_experiment(run_entrypoint, verb, options):
    done = run_entrypoint("where.tracking=http://mlflow:5000", verb=verb, options=options)

    assert done == ["/package", "-P", "-m", "mimiclab", verb, *options, "experiment.yaml"]


def test_an_evaluation_is_of_the_run(run_entrypoint):
    done = run_entrypoint("where.tracking=http://mlflow:5000", verb="evaluate")
    near = run_entrypoint("where.storage=./my runs", verb="evaluate")

    assert done == ["/package", "-P", "-m", "mimiclab", "evaluate", "small", "--storage", "/runs"]
    assert near == ["/it's here", "-P", "-m", "mimiclab", "evaluate", "small", "--storage", "./my runs"]


def test_another_environment_is_looked_at_first(run_entrypoint):
    look = ["/package", "-P", "-m", "mimiclab.cluster.versions", "versions.json"]

    done = run_entrypoint("where.tracking=http://mlflow:5000", compare=True)
    near = run_entrypoint("where.tracking=sqlite:///mlflow.db", compare=True)

    assert done == [*look, "/package", *TRAIN, "experiment.yaml"]
    assert near == [*look, "/it's here", *TRAIN, "/package/experiment.yaml"]


class Server:
    """The part of a job server that says what it runs."""

    def __init__(self, python, ray):
        self.data = {"pythonVersion": python, "rayVersion": ray}

    def get_address(self):
        return "http://cluster:8265"

    def _do_request(self, *_):
        return self

    def json(self):
        return {"data": self.data}


def test_another_python_or_ray_is_refused():
    import ray

    minor = ".".join(platform.python_version_tuple()[:2])
    jobs.check_versions(Server(f"{minor}.99", ray.__version__))
    with pytest.raises(UserError, match=r"http://cluster:8265 runs Python 3\.9\.1 and ray .*, here is Python 3\."):
        jobs.check_versions(Server("3.9.1", ray.__version__))
    with pytest.raises(UserError, match=r"ray 2\.1\.0, here is .*; expected the same ray"):
        jobs.check_versions(Server(f"{minor}.1", "2.1.0"))


@pytest.mark.parametrize("name", ["", "a b", "../x", "-x", "x" * 101])
def test_a_name_that_could_be_something_else_is_refused(name):
    with pytest.raises(UserError, match="--name: expected"):
        jobs.check_name(name)


def test_a_cluster_elsewhere_is_given_no_relative_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text(
        "name: small\ndata: {train: {packed: 's3://bucket/train'}, val: {packed: val}}\n"
        "model: {backbone: {weights: IMAGENET1K_V1}}\nwhere: {storage: 's3://bucket/runs'}\n"
    )
    task = Task("train", load_experiment("x.yaml").experiment)

    with pytest.raises(UserError) as caught:
        jobs.submit(Server("3.11.7", "2.60.0"), task, name=None, say=pytest.fail)

    assert str(caught.value) == (
        "data.val.packed: val, where.tracking: sqlite:///mlflow.db: relative to a folder of this machine, and the "
        "cluster at http://cluster:8265 is on others; expected absolute paths, on a disk that its nodes share, or URIs"
    )
    absolute = load_experiment("x.yaml", ["where.tracking=http://mlflow:5000", f"data.val.packed={tmp_path}/val"])
    assert jobs.relative_paths(absolute.experiment) == {}
