"""MLflow's pages, and what is read from its store."""

from __future__ import annotations

from typing import Annotated

import typer

from mimiclab.verbs.options import Verbose

app = typer.Typer()


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
