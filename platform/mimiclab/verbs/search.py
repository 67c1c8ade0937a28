"""Searching, and what is done with what was found."""

from __future__ import annotations

from typing import Annotated

import typer

from mimiclab.verbs.options import Address, ExperimentFile, Overrides, Verbose

app = typer.Typer()


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
