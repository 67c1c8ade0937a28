"""Training, and what is done with a trained run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mimiclab.verbs.options import Address, ExperimentFile, Fresh, Overrides, RunName, Storage, Verbose

if TYPE_CHECKING:
    from mimiclab.experiment import LoadedExperiment
    from mimiclab.schema import Experiment

app = typer.Typer()


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
    package = Path(__file__).parent.parent
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
def evaluate(
    run: RunName,
    data: Annotated[
        str | None,
        typer.Option(metavar="ANNOTATIONS|PACKED", help="Score on this data set, not on the run's validation set."),
    ] = None,
    images: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the images of ANNOTATIONS.")] = None,
    storage: Storage = "./runs",
    address: Address = None,
    verbose: Verbose = False,
) -> None:
    """Score a run's best weights on its validation set, both heads."""
    import os

    from rich.console import Console

    from mimiclab import runs
    from mimiclab.summary import evaluate_run

    console = Console(soft_wrap=True, markup=False)
    address = address or os.environ.get("RAY_ADDRESS") or None
    evaluate_run(runs.find(run, storage), console, data, images, address=address, verbose=verbose)


@app.command()
def predict(
    model: Annotated[
        str,
        typer.Argument(
            metavar="RUN|MODEL",
            help="A run by its name, MLflow id, folder or URI; or a registered model, as models:/NAME@ALIAS or "
            "models:/NAME/VERSION.",
        ),
    ],
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE...", help="Image files, or folders that hold some at any depth.")
    ],
    save: Annotated[Path, typer.Option(help="Folder for pictures and detections.json.")] = Path("predictions"),
    min_score: Annotated[float, typer.Option(help="Leave out detections below.", min=0, max=1)] = 0.3,
    coco: Annotated[
        Path | None,
        typer.Option(
            metavar="ANNOTATIONS",
            help="Write coco_results.json too, with this file's ids of images and classes, and all scores.",
        ),
    ] = None,
    storage: Storage = "./runs",
    tracking: Annotated[str, typer.Option(help="MLflow's address, of registered models.")] = "sqlite:///mlflow.db",
    verbose: Verbose = False,
) -> None:
    """Detect objects in images; an image that cannot be read is left out, and the exit code is 1 then."""
    from rich.console import Console

    from mimiclab.summary import predict_and_show

    console = Console(soft_wrap=True, markup=False)
    if not predict_and_show(
        model, images, save, console, min_score=min_score, coco=coco, storage=storage, tracking=tracking
    ):
        raise typer.Exit(1)


@app.command()
def export(
    run: RunName,
    format: Annotated[Literal["onnx", "torch"], typer.Option(help="ONNX, or torch's exported program (.pt2).")],
    output: Annotated[
        Path | None, typer.Option(help="File to write; in the run's folder, or here if that is remote.")
    ] = None,
    storage: Storage = "./runs",
    verbose: Verbose = False,
) -> None:
    """Write a run's deployed detector, with its best weights, as a file for other programs."""
    from mimiclab import runs
    from mimiclab.export import export

    export(runs.find(run, storage), format, output, typer.echo)
