"""Jobs on a cluster: submit, list, watch, stop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mimiclab.verbs.options import ExperimentFile, Overrides, Verbose

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

submit_app = typer.Typer(help="Run a verb as a job on a cluster, with the code that is here.", no_args_is_help=True)
jobs_app = typer.Typer(help="Jobs that were submitted to a cluster.", no_args_is_help=True)

JobServer = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="URL",
        help="Job server of a Ray cluster; $RAY_API_SERVER_ADDRESS or $RAY_ADDRESS, else that of `cluster up`.",
    ),
]
JobName = Annotated[str, typer.Argument(metavar="JOB", help="Name of a job, as `jobs list` shows it.")]


@submit_app.command("train")
def submit_train(
    experiment: ExperimentFile,
    overrides: Overrides = None,
    address: JobServer = None,
    name: Annotated[str | None, typer.Option(help="Name of the job; the experiment's by default.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Remove the run of this name and start anew.")] = False,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Show the job's log until it ends.")] = False,
    verbose: Verbose = False,
) -> None:
    """Train an experiment as a job; submitted again, it goes on where it was."""
    from mimiclab.cluster import jobs
    from mimiclab.cluster.server import connect
    from mimiclab.experiment import load_experiment

    loaded = load_experiment(experiment, overrides or ()).experiment
    client = connect(address)
    job = jobs.submit_train(client, loaded, name=name, fresh=fresh, say=typer.echo)
    if follow:
        _follow(client, job)
    else:
        typer.echo(f"its log: mimiclab jobs logs {job} --follow")


@jobs_app.command("list")
def jobs_list(address: JobServer = None, verbose: Verbose = False) -> None:
    """List all jobs of the cluster, the newest first."""
    from mimiclab.cluster import jobs
    from mimiclab.cluster.server import connect

    typer.echo(jobs.table(jobs.list_jobs(connect(address))))


@jobs_app.command("logs")
def jobs_logs(
    job: JobName,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
    address: JobServer = None,
    verbose: Verbose = False,
) -> None:
    """Show what a job has printed."""
    from mimiclab.cluster import jobs
    from mimiclab.cluster.server import connect

    client = connect(address)
    if follow:
        _follow(client, job)
    else:
        typer.echo(jobs.read_log(client, job), nl=False)


@jobs_app.command("stop")
def jobs_stop(job: JobName, address: JobServer = None, verbose: Verbose = False) -> None:
    """Stop a job; submitted again, it goes on from its run's last checkpoint."""
    from mimiclab.cluster import jobs
    from mimiclab.cluster.server import connect

    ended = jobs.stop(connect(address), job)
    typer.echo(f"job {ended.id} has ended: {ended.status}")


def _follow(client: JobSubmissionClient, job: str) -> None:
    """Show a job's log until it ends, and exit as it did."""
    from mimiclab.cluster import jobs

    try:
        ended = jobs.follow(client, job, lambda text: typer.echo(text, nl=False))
    except KeyboardInterrupt:
        typer.echo(f"\njob {job} goes on; mimiclab jobs logs {job} --follow shows it, mimiclab jobs stop {job} ends it")
        raise
    if ended.status != "SUCCEEDED":
        typer.echo(f"job {ended.id} has ended: {ended.status}: {ended.message}", err=True)
        raise typer.Exit(1)
    typer.echo(f"job {ended.id} has ended: {ended.status}")
