"""Arguments and options that mean the same in every verb that takes them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer


def _set_up_logging(verbose: bool) -> bool:
    logging.basicConfig(format="%(message)s")
    logging.getLogger("mimiclab").setLevel(logging.DEBUG if verbose else logging.INFO)
    return verbose


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
RunName = Annotated[str, typer.Argument(metavar="RUN", help="Name, MLflow id, folder or URI of a run.")]
Storage = Annotated[str, typer.Option(help="Folder or URI that holds the runs.")]
