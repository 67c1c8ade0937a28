"""Jobs on a cluster: submit, list, watch, stop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mimiclab.verbs.options import ExperimentFile, Fresh, Overrides, Verbose

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

    from mimiclab.cluster.jobs import Verb
    from mimiclab.schema import Experiment

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
JobNameOption = Annotated[str | None, typer.Option("--name", help="Name of the job; the experiment's by default.")]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Show the job's log until it ends.")]
JobName = Annotated[str, typer.Argument(metavar="JOB", help="Name of a job, as `jobs list` shows it.")]


@submit_app.command("train")
def submit_train(
    experiment: ExperimentFile,
    overrides: Overrides = None,
    address: JobServer = None,
    name: JobNameOption = None,
    seeds: Annotated[
        int | None, typer.Option(metavar="N", help="Train N runs, of its seed and those after it.", min=2)
    ] = None,
    fresh: Fresh = False,
    follow: Follow = False,
    verbose: Verbose = False,
) -> None:
    """Train an experiment as a job; submitted again, it goes on where it was."""
    from mimiclab import runs
    from mimiclab.experiment import load_experiment

    loaded = load_experiment(experiment, overrides or ()).experiment
    if seeds is None:
        runs.check(loaded, fresh=fresh)
    _submit("train", loaded, [*_fresh(fresh), *(["--seeds", str(seeds)] if seeds else [])], name, address, follow)


@submit_app.command("search")
def submit_search(
    experiment: ExperimentFile,
    overrides: Overrides = None,
    address: JobServer = None,
    name: JobNameOption = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Remove the search of this name and start anew.")] = False,
    follow: Follow = False,
    verbose: Verbose = False,
) -> None:
    """Search the space of an experiment as a job; submitted again, it goes on where it was."""
    from mimiclab.experiment import load_experiment
    from mimiclab.search.trials import plan

    loaded = load_experiment(experiment, overrides or ())
    plan(loaded)  # says what is wrong with the space
    _submit("search", loaded.experiment, _fresh(fresh), name, address, follow)


@submit_app.command("evaluate")
def submit_evaluate(
    experiment: ExperimentFile,
    overrides: Overrides = None,
    address: JobServer = None,
    name: JobNameOption = None,
    follow: Follow = False,
    verbose: Verbose = False,
) -> None:
    """Score the best weights of an experiment's run as a job."""
    from mimiclab import runs
    from mimiclab.experiment import load_experiment

    loaded = load_experiment(experiment, overrides or ()).experiment
    runs.find(loaded.name, loaded.where.storage)  # says so where there is none
    _submit("evaluate", loaded, [], name, address, follow)


@submit_app.command("drill")
def submit_drill(
    experiment: ExperimentFile,
    events: Annotated[str | None, typer.Option(metavar="KIND@STEP,...", help="As in `mimiclab drill`.")] = None,
    random: Annotated[int | None, typer.Option(metavar="N", help="Draw N events instead.", min=1)] = None,
    seed: Annotated[int, typer.Option(metavar="S", help="Of what is drawn.")] = 0,
    overrides: Overrides = None,
    address: JobServer = None,
    name: JobNameOption = None,
    follow: Follow = False,
    verbose: Verbose = False,
) -> None:
    """Drill an experiment as a job: on nodes of its own, all on the cluster's head."""
    from mimiclab.drill.drill import prepare
    from mimiclab.experiment import load_experiment

    loaded = load_experiment(experiment, overrides or ())
    prepare(loaded, events=events, num_random=random, elastic=False)  # says what is wrong with it
    chosen = ["--random", str(random)] if events is None else ["--events", events]
    _submit("drill", loaded.experiment, [*chosen, "--seed", str(seed)], name, address, follow)


def _fresh(fresh: bool) -> list[str]:
    return ["--fresh"] if fresh else []


def _submit(
    verb: Verb, experiment: Experiment, options: list[str], name: str | None, address: str | None, follow: bool
) -> None:
    from mimiclab.cluster import jobs
    from mimiclab.cluster.server import connect

    client = connect(address)
    _announce(
        client, jobs.submit(client, jobs.Task(verb, experiment, tuple(options)), name=name, say=typer.echo), follow
    )


def _announce(client: JobSubmissionClient, job: str, follow: bool) -> None:
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


@jobs_app.command("resubmit")
def jobs_resubmit(job: JobName, address: JobServer = None, follow: Follow = False, verbose: Verbose = False) -> None:
    """Submit a job that ended once more, with the code and the experiment it had; its run goes on."""
    from mimiclab.cluster import jobs
    from mimiclab.cluster.server import connect

    client = connect(address)
    _announce(client, jobs.resubmit(client, job, say=typer.echo), follow)


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
