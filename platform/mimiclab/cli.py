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
    fresh: Annotated[bool, typer.Option("--fresh", help="Remove the run of this name and start anew.")] = False,
    verbose: Verbose = False,
) -> None:
    """Train an experiment; the same command goes on where it was."""
    from mimiclab.experiment import load_experiment

    _train(load_experiment(experiment, overrides or ()).experiment, address, fresh, verbose)


@app.command()
def demo(overrides: Overrides = None, verbose: Verbose = False) -> None:
    """Generate scenes, train on them from a random start, and show what was learned."""
    from mimiclab.experiment import load_experiment

    file = _shipped_experiment("scenes.yaml")
    _train(load_experiment(file, overrides or ()).experiment, None, False, verbose)


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


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake is one message and exit code 2, a bug keeps its traceback."""
    try:
        app(args)
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
