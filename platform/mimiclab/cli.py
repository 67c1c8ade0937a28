"""The command line: each verb a thin call into the module that does the work.

Imports of those modules stay inside the verbs, so that `--help` and completion are instant.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mimiclab.errors import UserError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

    from mimiclab.cluster.state import LocalCluster
    from mimiclab.experiment import LoadedExperiment
    from mimiclab.schema import Experiment

app = typer.Typer(
    help="Train, search and compare object detectors.",
    no_args_is_help=True,
    # A bug shows Python's own traceback.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _set_up_logging(verbose: bool) -> bool:
    logging.basicConfig(format="%(message)s")
    logging.getLogger("mimiclab").setLevel(logging.DEBUG if verbose else logging.INFO)
    return verbose


# What these mean is the same in every verb that takes them.
ExperimentFile = Annotated[Path, typer.Argument(metavar="EXPERIMENT", help="Experiment file (YAML).")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, as in optim.lr=1e-3; may be repeated."),
]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", callback=_set_up_logging, help="Say more about what happens.")
]

Address = Annotated[
    str | None,
    typer.Option(metavar="HOST:PORT", help="Head of a Ray cluster; $RAY_ADDRESS, else this machine."),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Remove the run of this name and start anew.")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="Name, MLflow id or folder of a run.")]
Storage = Annotated[str, typer.Option(help="Folder that holds the runs.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"mimiclab {version('mimiclab')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    pass


@app.command()
def show(experiment: ExperimentFile, overrides: Overrides = None, verbose: Verbose = False) -> None:
    """Show every value of an experiment, and where it was written."""
    from rich.console import Console

    from mimiclab.experiment import load_experiment, render

    Console(soft_wrap=True, markup=False).print(render(load_experiment(experiment, overrides or ())), end="")


@app.command()
def train(
    experiment: ExperimentFile,
    overrides: Overrides = None,
    address: Address = None,
    seeds: Annotated[
        int | None,
        typer.Option(metavar="N", help="Train N runs, of its seed and those after it; show means and 95 % intervals."),
    ] = None,
    fresh: Fresh = False,
    verbose: Verbose = False,
) -> None:
    """Train an experiment; the same command goes on where it was."""
    from mimiclab.experiment import load_experiment

    loaded = load_experiment(experiment, overrides or ())
    if seeds is None:
        _train(loaded.experiment, address, fresh, verbose)
    else:
        _train_seeds(loaded, seeds, address, fresh, verbose)


@app.command()
def demo(overrides: Overrides = None, fresh: Fresh = False, verbose: Verbose = False) -> None:
    """Generate scenes, train on them from a random start, and show what was learned."""
    from mimiclab.experiment import load_experiment

    file = _shipped_experiment("scenes.yaml")
    _train(load_experiment(file, overrides or ()).experiment, None, fresh, verbose)


def _shipped_experiment(name: str) -> Path:
    """An experiment of the checkout, or its copy inside of an installed wheel."""
    package = Path(__file__).parent
    copies = (package.parent.parent / "experiments" / name, package / "experiments" / name)
    return next((path for path in copies if path.is_file()), copies[0])


def _train(experiment: Experiment, address: str | None, fresh: bool, verbose: bool) -> None:
    from rich.console import Console

    from mimiclab.summary import show_result
    from mimiclab.train import train

    console = Console(soft_wrap=True, markup=False)
    run = train(experiment, console=console, address=address, fresh=fresh, verbose=verbose)
    show_result(run, experiment, console)


def _train_seeds(loaded: LoadedExperiment, num: int, address: str | None, fresh: bool, verbose: bool) -> None:
    from rich.console import Console

    from mimiclab.seeds import train_seeds

    console = Console(soft_wrap=True, markup=False)
    train_seeds(loaded, num, console=console, address=address, fresh=fresh, verbose=verbose)


@app.command()
def search(
    experiment: ExperimentFile,
    overrides: Overrides = None,
    address: Address = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Remove the search of this name and start anew.")] = False,
    verbose: Verbose = False,
) -> None:
    """Search the space of an experiment; rank its trials and write the best as an experiment."""
    from rich.console import Console

    from mimiclab.experiment import load_experiment
    from mimiclab.search import driver

    loaded = load_experiment(experiment, overrides or ())
    driver.search(loaded, console=Console(soft_wrap=True, markup=False), address=address, fresh=fresh, verbose=verbose)


@app.command()
def evaluate(run: RunName, storage: Storage = "./runs", verbose: Verbose = False) -> None:
    """Score a run's best weights on its validation set, both heads."""
    from rich.console import Console

    from mimiclab import runs
    from mimiclab.summary import evaluate_run

    evaluate_run(runs.find(run, storage), Console(soft_wrap=True, markup=False))


@app.command()
def predict(
    run: RunName,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files or folders.")],
    save: Annotated[Path, typer.Option(help="Folder for pictures and detections.json.")] = Path("predictions"),
    min_score: Annotated[float, typer.Option(help="Leave out detections below.", min=0, max=1)] = 0.3,
    storage: Storage = "./runs",
    verbose: Verbose = False,
) -> None:
    """Detect objects in images with a run's best weights."""
    from rich.console import Console

    from mimiclab import runs
    from mimiclab.summary import predict_and_show

    predict_and_show(runs.find(run, storage), images, save, min_score, Console(soft_wrap=True, markup=False))


@app.command()
def ui(
    tracking: Annotated[str, typer.Option(help="MLflow's address.")] = "sqlite:///mlflow.db",
    project: Annotated[str, typer.Option(help="MLflow experiment to open.")] = "mimiclab",
    port: Annotated[
        int | None, typer.Option(help="Port; the first free one from 5000 by default.", min=1, max=65535)
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Open MLflow's pages on 127.0.0.1, until Ctrl-C."""
    from mimiclab.tracking.ui import serve

    serve(tracking, port, project)


submit_app = typer.Typer(help="Run a verb as a job on a cluster, with the code that is here.", no_args_is_help=True)
jobs_app = typer.Typer(help="Jobs that were submitted to a cluster.", no_args_is_help=True)
cluster_app = typer.Typer(help="A cluster on this machine.", no_args_is_help=True)
app.add_typer(submit_app, name="submit")
app.add_typer(jobs_app, name="jobs")
app.add_typer(cluster_app, name="cluster")

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


@cluster_app.command("up")
def cluster_up(
    num_cpus: Annotated[
        int | None, typer.Option(help="CPUs that it offers; as many as the machine has by default.", min=1)
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Start a cluster on this machine; it runs until `cluster down`."""
    from mimiclab.cluster import local

    _describe(local.up(num_cpus, typer.echo))


@cluster_app.command("status")
def cluster_status(verbose: Verbose = False) -> None:
    """Say what runs of the cluster on this machine."""
    from mimiclab.cluster import state

    cluster = state.running()
    if cluster is None:
        typer.echo("no cluster runs on this machine; mimiclab cluster up starts one")
    else:
        _describe(cluster)


@cluster_app.command("down")
def cluster_down(verbose: Verbose = False) -> None:
    """End the cluster on this machine, and its jobs."""
    from mimiclab.cluster import local

    if not local.down(typer.echo):
        typer.echo("no cluster runs on this machine")


def _describe(cluster: LocalCluster) -> None:
    from mimiclab.cluster import local

    for name, what in local.describe(cluster):
        typer.echo(f"{name + ':':12}{what}")


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake is one message and exit code 2, a bug keeps its traceback."""
    try:
        app(args)
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
