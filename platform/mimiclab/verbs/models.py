"""Registered models: what a trained run becomes for those who use it."""

from __future__ import annotations

from typing import Annotated

import typer

from mimiclab.verbs.options import RunName, Storage, Verbose

app = typer.Typer(help="Models in MLflow's registry.", no_args_is_help=True)


@app.command("register")
def models_register(
    run: RunName,
    alias: Annotated[str, typer.Option(help="What users call the version; it moves here from another.")] = "champion",
    name: Annotated[
        str | None, typer.Option(help="Registered model that gets a version; where.project by default.")
    ] = None,
    storage: Storage = "./runs",
    verbose: Verbose = False,
) -> None:
    """Register a run's best weights as a version of a model; the same ones again only get the alias."""
    from mimiclab import runs
    from mimiclab.summary import register_and_show

    register_and_show(runs.find(run, storage), alias, name, typer.echo)


@app.command("list")
def models_list(
    tracking: Annotated[str, typer.Option(help="MLflow's address.")] = "sqlite:///mlflow.db",
    verbose: Verbose = False,
) -> None:
    """List registered models, their versions and aliases."""
    from rich.console import Console

    from mimiclab.summary import show_models

    show_models(tracking, Console(soft_wrap=True, markup=False))
