"""The command line: the verbs of `mimiclab.verbs` put together, and what becomes of a user's mistake."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from mimiclab.errors import UserError
from mimiclab.verbs import cluster, compare, data, jobs, models, plan, search, tracking, training

app = typer.Typer(
    help="Train, search and compare object detectors.",
    no_args_is_help=True,
    # A bug shows Python's own traceback.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verbs in (training, search, compare, tracking, cluster, plan):
    app.add_typer(verbs.app)
app.add_typer(data.app, name="data")
app.add_typer(models.app, name="models")
app.add_typer(jobs.submit_app, name="submit")
app.add_typer(jobs.jobs_app, name="jobs")
app.add_typer(compare.runs_app, name="runs")


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


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake is one message and exit code 2, a bug keeps its traceback."""
    try:
        app(args)
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
