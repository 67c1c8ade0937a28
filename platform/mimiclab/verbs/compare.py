"""Comparing runs, listing them, and removing them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from mimiclab.verbs.options import Storage, Verbose

app = typer.Typer()
runs_app = typer.Typer(help="List and remove runs.", no_args_is_help=True)

RunNames = Annotated[
    list[str],
    typer.Argument(
        metavar="RUN...", help="Names, MLflow ids, folders or URIs of runs; a search or a group of seeds for its runs."
    ),
]
Tracking = Annotated[
    str | None,
    typer.Option(
        metavar="URI",
        help="MLflow's address; that which each run was tracked at by default, sqlite:///mlflow.db for other names.",
    ),
]


@app.command()
def compare(
    runs: RunNames,
    storage: Storage = "./runs",
    tracking: Tracking = None,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the comparison as Markdown; - prints it instead.")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write pictures of the images that the runs disagree on most.")
    ] = None,
    images: Annotated[int, typer.Option(help="How many such images.", min=0)] = 5,
    min_score: Annotated[float, typer.Option(help="Leave out detections below on these images.", min=0, max=1)] = 0.3,
    resamples: Annotated[int, typer.Option(help="Of the bootstrap over images.", min=1, max=100_000)] = 1000,
    seed: Annotated[int, typer.Option(help="Of the resamples.", min=0)] = 0,
    evaluate: Annotated[
        bool, typer.Option("--evaluate", help="Evaluate runs that keep no detections first, which takes long.")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Compare runs with the first: metrics, parameters, classes, and up to 5 runs image by image."""
    from rich.console import Console

    from mimiclab.compare.entries import find_entries
    from mimiclab.compare.images import Options
    from mimiclab.compare.report import report, write

    console = Console(soft_wrap=True, markup=False)
    options = Options(min_score, images, resamples, seed, evaluate)
    found = report(
        find_entries(runs, storage=storage, tracking=tracking),
        options,
        save,
        say=lambda text: typer.echo(text, err=True),
    )
    if markdown is None:
        found.show(console)
    elif str(markdown) == "-":
        typer.echo(found.markdown(Path()), nl=False)
    else:
        write(markdown, found.markdown(markdown.parent))
        typer.echo(f"written: {markdown}")


@runs_app.command("list")
def runs_list(
    storage: Storage = "./runs",
    tracking: Annotated[
        str | None, typer.Option(metavar="URI", help="MLflow's address; lists the runs that only MLflow has too.")
    ] = None,
    project: Annotated[str, typer.Option(help="MLflow experiment whose runs --tracking lists.")] = "mimiclab",
    sort: Annotated[Literal["name", "best", "size", "age"], typer.Option(help="Order.")] = "name",
    json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
    verbose: Verbose = False,
) -> None:
    """List the runs in a folder: how each stands, how good it is, and what it takes of the disk."""
    from json import dumps

    from rich.console import Console

    from mimiclab import inventory
    from mimiclab.references import Stores, place_of_runs

    items, notes = inventory.take_stock(storage, tracking, project, Stores(tracking))
    items = inventory.in_order(items, sort)
    if json:
        typer.echo(dumps(inventory.to_json(items), indent=1))
    else:
        taken = inventory.in_bytes(sum(item.size or 0 for item in items))
        title = f"{place_of_runs(storage).name}: {len(items)} runs and searches, {taken}"
        Console(soft_wrap=True, markup=False).print(inventory.table(items, title))
    for note in notes:
        typer.echo(note, err=True)


@runs_app.command("rm")
def runs_rm(
    runs: RunNames,
    storage: Storage = "./runs",
    tracking: Tracking = None,
    files_only: Annotated[
        bool, typer.Option("--files-only", help="Leave MLflow's record as it is; free the folders alone.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    verbose: Verbose = False,
) -> None:
    """Remove runs: their folders, and their records in MLflow."""
    from mimiclab import removal
    from mimiclab.inventory import in_bytes
    from mimiclab.references import Stores

    stores = Stores(tracking)
    targets, stays = removal.targets(runs, storage, stores, files_only=files_only)
    for line in (*map(str, targets), *stays):
        typer.echo(line)
    if not targets:
        typer.echo("nothing to remove")
        return
    taken = in_bytes(sum(target.size for target in targets))
    kept = f", but leave {len(stays)} in MLflow" if stays else ""
    if not yes:
        typer.confirm(f"remove these {len(targets)}, {taken}{kept}?", abort=True)
    removal.remove(targets, stores, typer.echo)
