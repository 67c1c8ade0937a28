"""Searching, and what is done with what was found."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperGroup

from mimiclab.verbs.options import Address, ExperimentFile, Overrides, Storage, Verbose

if TYPE_CHECKING:
    from typer._click import Context, HelpFormatter

_DEFAULT = "run"


class _SearchGroup(TyperGroup):
    """`search EXPERIMENT` means `search run EXPERIMENT`; a file of a command's name is written ./NAME."""

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        if not args or args[0] not in {*self.commands, *ctx.help_option_names}:
            args = [_DEFAULT, *args]
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Context, formatter: HelpFormatter) -> None:
        shown = copy.copy(self)
        shown.params = [*self.commands[_DEFAULT].params]
        super(_SearchGroup, shown).format_help(ctx, formatter)


app = typer.Typer()
search = typer.Typer(cls=_SearchGroup, subcommand_metavar="| COMMAND [ARGS]...")
app.add_typer(search, name="search")

SearchName = Annotated[str, typer.Argument(metavar="SEARCH", help="Name, folder or URI of a search.")]


@search.callback()
def _search() -> None:
    """Search the space of an experiment; rank its trials and write the best as an experiment."""


@search.command(_DEFAULT)
def run(
    experiment: ExperimentFile,
    overrides: Overrides = None,
    address: Address = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Remove the search of this name and start anew.")] = False,
    verbose: Verbose = False,
) -> None:
    """Search the space of an experiment: what `mimiclab search EXPERIMENT` does."""
    from rich.console import Console

    from mimiclab.experiment import load_experiment
    from mimiclab.search import driver

    loaded = load_experiment(experiment, overrides or ())
    driver.search(loaded, console=Console(soft_wrap=True, markup=False), address=address, fresh=fresh, verbose=verbose)


@search.command()
def report(name: SearchName, storage: Storage = "./runs", verbose: Verbose = False) -> None:
    """Write the report of a search anew from its record, also while it runs."""
    from mimiclab.search.find import find
    from mimiclab.search.report import REPORT, TEXT, write_report

    folder, record = find(name, storage)
    write_report(record.events, folder)
    typer.echo((folder / REPORT).where(TEXT))


@search.command()
def promote(
    name: SearchName,
    trial: Annotated[
        str | None, typer.Argument(metavar="[TRIAL]", help="As trial-03 or 3; the best by default.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; <search>-<trial>.yaml here by default.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
    storage: Storage = "./runs",
    verbose: Verbose = False,
) -> None:
    """Write a trial as an experiment file that gives its numbers again."""
    from mimiclab.search.promote import promote

    file = promote(name, trial, output=output, storage=storage, overwrite=overwrite)
    typer.echo(f"mimiclab train {file}")
