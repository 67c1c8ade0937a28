"""Jobs: a verb that runs on a cluster, with the code and the experiment that were submitted.

On this machine a job runs in the folder that it was submitted from. So a relative path means what it means to
`mimiclab train` at the same place, and both go on with the same run. A cluster elsewhere is given no relative paths.
"""

from __future__ import annotations

import asyncio
import os
import platform
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mimicdet.config import is_published_name
from mimiclab import runs
from mimiclab.cluster import package, versions
from mimiclab.cluster.server import is_this_machine, nodes
from mimiclab.errors import UserError
from mimiclab.experiment import flatten
from mimiclab.schema import PATH_KEYS, Experiment
from mimiclab.session import ENVIRONMENT, check_resources
from mimiclab.storage import Storage

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

Verb = Literal["train", "search", "evaluate", "drill"]

_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
_POLL_S = 0.5
_AGENT_TIMEOUT_S = 60.0
# A stopped job records its run before it is killed; Ray's own 3 s are short on a busy machine.
_ENVIRONMENT = {**ENVIRONMENT, "RAY_JOB_STOP_WAIT_TIME_S": "30"}


@dataclass(frozen=True)
class Job:
    """A submitted job as its cluster knows it."""

    id: str
    """The name, with the number of the attempt from the second on."""
    name: str
    run: str
    """Folder of the run or the search that it works at."""
    status: str
    message: str
    """The last words of a failed job, else what Ray says of it."""
    started: float
    ended: float | None
    """Seconds since 1970."""

    @property
    def is_over(self) -> bool:
        """Whether it ended, in whatever way."""
        return self.status in _ENDED


@dataclass(frozen=True)
class Task:
    """What a job is to do."""

    verb: Verb
    experiment: Experiment
    options: tuple[str, ...] = ()
    """More arguments of the verb, as `--fresh`."""

    @property
    def run(self) -> str:
        """Where its run, or its search, is; two jobs never work at the same."""
        return runs.storage_of(self.experiment).name


def submit(client: JobSubmissionClient, task: Task, *, name: str | None, say: Callable[[str], None]) -> str:
    """Submit a verb on an experiment and return the job's id.

    Args:
        client: of the cluster's job server.
        task: what is to be done. The caller has checked what the verb itself would refuse.
        name: of the job; by default the experiment's, and for what is no training the verb before it.
        say: gets a line for the user.

    Raises:
        UserError: before anything is uploaded: the cluster is too small or has other versions, it is elsewhere and a
            path is relative, the name is in use, the package is too large.
    """
    experiment = task.experiment
    here = is_this_machine(client)
    if not here:
        _refuse_relative_paths(experiment, client.get_address())
    default = experiment.name if task.verb == "train" else f"{task.verb}-{experiment.name}"[:100]
    name = default if name is None else check_name(name)
    check_versions(client)
    if task.verb in ("train", "search"):
        check_resources(nodes(client), experiment.scale)
    job_id = next_id(name, task.run, list_jobs(client))
    root = runs.root_of(experiment)
    with tempfile.TemporaryDirectory() as folder:
        say(f"uploading {package.stage(experiment, Path(folder))}")
        kept = package.keep(Path(folder), root)
        # On another machine, its image says which Python, and what comes with it.
        command = entrypoint(task, python=sys.executable) if here else entrypoint(task, python="python", compare=True)
        metadata = {"job_name": name, "run": task.run, "root": root.uri, "package": kept}
        _submit(client, job_id, Path(folder), command, metadata)
    say(f"submitted as job {job_id} to {client.get_address()}")
    return job_id


def resubmit(client: JobSubmissionClient, job_id: str, *, say: Callable[[str], None]) -> str:
    """Submit a job that has ended once more, with the code and the experiment that it had, and return the new id.

    The run's name stays, so what it had done it goes on from.

    Raises:
        UserError: there is no such job, it has not ended, another works at its run, or its package is gone.
    """
    job = find(client, job_id)
    details = client.get_job_info(job_id)
    metadata = dict(details.metadata or {})
    if "package" not in metadata:
        raise UserError(f"job {job_id}: it was not submitted by mimiclab; expected one that was")
    check_versions(client)
    again = next_id(job.name, job.run, list_jobs(client))
    with tempfile.TemporaryDirectory() as folder:
        package.restore(metadata["package"], Storage(metadata["root"]), Path(folder))
        # What was to start anew has started; it goes on.
        _submit(client, again, Path(folder), details.entrypoint.replace(" --fresh", ""), metadata)
    say(f"submitted as job {again} to {client.get_address()}, with the code and the experiment of {job_id}")
    return again


def check_versions(client: JobSubmissionClient) -> None:
    """Make sure that the cluster has this Python and this Ray: what is pickled here has to be read there.

    Raises:
        UserError: it has others.
    """
    import ray

    found = client._do_request("GET", "/api/v0/cluster_metadata").json()["data"]
    here = {"Python": platform.python_version(), "ray": ray.__version__}
    there = {"Python": str(found["pythonVersion"]), "ray": str(found["rayVersion"])}
    # Byte code and pickles of one minor version of Python are read by that one.
    equal = here["Python"].split(".")[:2] == there["Python"].split(".")[:2] and here["ray"] == there["ray"]
    if not equal:
        raise UserError(
            f"the cluster at {client.get_address()} runs {_versions(there)}, here is {_versions(here)}; expected the "
            "same ray and the same Python up to its second number: submit from an environment like the cluster's"
        )


def _versions(versions: Mapping[str, str]) -> str:
    return " and ".join(f"{name} {version}" for name, version in versions.items())


def _submit(client: JobSubmissionClient, job_id: str, folder: Path, command: str, metadata: dict[str, str]) -> None:
    runtime_env = {
        "working_dir": str(folder),
        "env_vars": {name: os.environ.get(name, value) for name, value in _ENVIRONMENT.items()},
    }
    deadline = time.monotonic() + _AGENT_TIMEOUT_S
    while True:
        try:
            client.submit_job(entrypoint=command, submission_id=job_id, runtime_env=runtime_env, metadata=metadata)
            return
        except RuntimeError as error:
            # A cluster that has just started, on a busy machine, answers before it can start a job.
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(_POLL_S)


def check_name(name: str) -> str:
    """The name of a job, which may be what the name of an experiment may be.

    Raises:
        UserError: it is something else.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise UserError(f"--name: expected 1 to 100 letters, digits, '.', '_' or '-', found {name!r}")
    return name


def next_id(name: str, run: str, jobs: Sequence[Job]) -> str:
    """The id of a new job: its name, or where that is taken by jobs that ended, the name with a number.

    Raises:
        UserError: a job of this name, or of this run, has not ended.
    """
    for job in jobs:
        if not job.is_over and (job.name == name or job.run == run):
            use = f"the job name {name} is in use" if job.name == name else f"the run {run} is being worked at"
            raise UserError(
                f"{use}: job {job.id} is {job.status}; expected another name, or that one to end "
                f"(mimiclab jobs stop {job.id})"
            )
    taken = {job.id for job in jobs}
    job_id, attempt = name, 1
    while job_id in taken:
        attempt += 1
        job_id = f"{name}-{attempt}"
    return job_id


def entrypoint(task: Task, *, python: str, compare: bool = False) -> str:
    """The shell command of a job, to be run in the folder of its package.

    Args:
        task: what is to be done.
        python: the program that does it.
        compare: it ends at once where it lacks a package that this environment has.
    """
    # -P: the folder that the job runs in is not searched for modules, only the package is.
    module = [python, "-P", "-m"]
    command = [*module, "mimiclab", task.verb, *task.options]
    if task.verb == "evaluate":  # of a run, which says itself what it is an experiment of
        command += [task.experiment.name, "--storage", task.experiment.where.storage]
    joined = shlex.join(command)
    file = "" if task.verb == "evaluate" else package.EXPERIMENT
    first = f"{shlex.join([*module, versions.__name__, versions.FILE])} && " if compare else ""
    if relative_paths(task.experiment):
        return f"{first}cd {shlex.quote(str(Path.cwd()))} && exec {joined}" + (f' "$OLDPWD/{file}"' if file else "")
    return f"{first}exec {joined} {file}".rstrip()


def list_jobs(client: JobSubmissionClient) -> list[Job]:
    """All jobs of a cluster, the newest first."""
    # A driver that connects by itself is listed as well, without the id of a submission.
    found = [_job(details) for details in client.list_jobs() if details.submission_id]
    return sorted(found, key=lambda job: job.started, reverse=True)


def find(client: JobSubmissionClient, job_id: str) -> Job:
    """One job of a cluster.

    Raises:
        UserError: there is no such job.
    """
    jobs = list_jobs(client)
    for job in jobs:
        if job.id == job_id:
            return job
    known = ", ".join(job.id for job in jobs) or "none"
    raise UserError(f"job {job_id}: there is no such job at {client.get_address()}; jobs there: {known}")


def read_log(client: JobSubmissionClient, job_id: str) -> str:
    """What a job has printed so far.

    Raises:
        UserError: there is no such job.
    """
    return str(client.get_job_logs(find(client, job_id).id))


def follow(client: JobSubmissionClient, job_id: str, write: Callable[[str], object]) -> Job:
    """Pass on what a job prints, from its beginning, until it ends; return how it ended.

    Raises:
        UserError: there is no such job, or its cluster went away.
    """
    job = find(client, job_id)

    async def stream() -> None:
        async for text in client.tail_job_logs(job_id):
            write(text)

    try:
        asyncio.run(stream())
        return _wait_for_end(client, job)
    except (OSError, RuntimeError) as error:
        raise UserError(f"job {job_id}: its cluster went away while the job was followed ({error})") from error


def stop(client: JobSubmissionClient, job_id: str) -> Job:
    """Stop a job as Ctrl-C would, and wait until it has ended: its run is recorded as killed and can go on.

    Raises:
        UserError: there is no such job, or it ended before.
    """
    job = find(client, job_id)
    if job.is_over:
        raise UserError(f"job {job_id}: it ended before, {job.status}; expected one that runs")
    client.stop_job(job_id)
    return _wait_for_end(client, job)


def stop_all(client: JobSubmissionClient, say: Callable[[str], object]) -> None:
    """Stop every job that has not ended, all at a time, and wait for those that the cluster agreed to stop."""
    stopping: set[str] = set()
    for job in list_jobs(client):
        if not job.is_over:
            say(f"stopping job {job.id}")
            try:
                client.stop_job(job.id)
                stopping.add(job.id)
            except (OSError, RuntimeError) as error:
                say(f"job {job.id} cannot be stopped: {error}")
    while any(job.id in stopping and not job.is_over for job in list_jobs(client)):
        time.sleep(_POLL_S)


def table(jobs: Sequence[Job]) -> str:
    """Jobs for people, a line each."""
    rows = [("JOB", "STATUS", "STARTED", "DURATION", "MESSAGE")]
    for job in jobs:
        started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job.started))
        duration = timedelta(seconds=round((job.ended or time.time()) - job.started))
        rows.append((job.id, job.status, started, str(duration), job.message))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _wait_for_end(client: JobSubmissionClient, job: Job) -> Job:
    while not job.is_over:
        time.sleep(_POLL_S)
        job = find(client, job.id)
    return job


def _job(details: Any) -> Job:
    metadata = details.metadata or {}
    lines = (details.message or "").strip().splitlines() or [""]
    return Job(
        id=details.submission_id,
        name=metadata.get("job_name", details.submission_id),
        run=metadata.get("run", ""),
        status=str(details.status.value),
        message=lines[-1],
        started=(details.start_time or 0) / 1000,
        ended=details.end_time / 1000 if details.end_time else None,
    )


def relative_paths(experiment: Experiment) -> dict[str, str]:
    """The paths of an experiment that mean a place below the folder it is used in, by their keys."""
    values = flatten(experiment)
    paths = {key: str(values[key]) for key in PATH_KEYS if values.get(key) is not None}
    return {key: path for key, path in paths.items() if _is_relative(path.removeprefix("sqlite:///"))}


def _is_relative(path: str) -> bool:
    return "://" not in path and not Path(path).is_absolute() and not is_published_name(path)


def _refuse_relative_paths(experiment: Experiment, address: str) -> None:
    if found := relative_paths(experiment):
        raise UserError(
            f"{', '.join(f'{key}: {path}' for key, path in found.items())}: relative to a folder of this machine, and "
            f"the cluster at {address} is on others; expected absolute paths, on a disk that its nodes share, or URIs"
        )
