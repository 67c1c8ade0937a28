"""What a training will take, before any machine is rented."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from mimiclab.verbs.options import ExperimentFile, Overrides, Verbose

app = typer.Typer()


@app.command()
def plan(
    experiment: ExperimentFile,
    gpus: Annotated[int, typer.Option(metavar="N", help="Largest number of GPUs; smaller ones too.", min=1, max=10000)],
    images_per_s: Annotated[
        float, typer.Option(help="Measured training speed of one GPU, as train/images_per_s of a run.", min=1e-6)
    ],
    mtbf: Annotated[float, typer.Option(metavar="HOURS", help="Mean life of one machine.", min=1e-3)] = 24.0,
    notice: Annotated[
        float, typer.Option(metavar="SHARE", help="Share of losses announced in time for a checkpoint.", min=0, max=1)
    ] = 0.9,
    replace_minutes: Annotated[float, typer.Option(help="Until another machine takes a lost one's place.", min=0)] = 3,
    zones: Annotated[int, typer.Option(help="Zones that the machines are spread over.", min=1)] = 1,
    burst: Annotated[
        float, typer.Option(metavar="SHARE", help="Share of a zone that goes at once; 0: one machine.", min=0, max=1)
    ] = 0.0,
    elastic: Annotated[bool | None, typer.Option("--elastic/--fixed", help="By default as scale.workers says.")] = None,
    price: Annotated[float, typer.Option(help="Of a spot machine with one GPU, an hour.", min=0)] = 0.0,
    on_demand_price: Annotated[
        float | None, typer.Option(help="Of the same machine on demand, an hour.", min=0)
    ] = None,
    head_price: Annotated[float, typer.Option(help="Of the head, an hour.", min=0)] = 0.0,
    images: Annotated[
        int | None, typer.Option(metavar="N", help="Training images, where they are not here.", min=1)
    ] = None,
    val_images: Annotated[int | None, typer.Option(metavar="N", help="Validation images, likewise.", min=0)] = None,
    eval_images_per_s: Annotated[
        float | None,
        typer.Option(help="What one GPU evaluates, scoring included; by default 3 times --images-per-s.", min=1e-6),
    ] = None,
    loader_images_per_s: Annotated[
        float | None, typer.Option(help="What one GPU's loaders decode; no limit by default.", min=1e-6)
    ] = None,
    store_mb_per_s: Annotated[
        float | None, typer.Option(help="What the data's store gives to all; no limit by default.", min=1e-6)
    ] = None,
    image_kb: Annotated[float, typer.Option(help="Mean size of an encoded image.", min=0.1)] = 160.0,
    checkpoint_s: Annotated[float, typer.Option(help="That a checkpoint holds training up.", min=0)] = 0.5,
    restart_s: Annotated[float, typer.Option(help="From an interruption to the next step, on two.", min=0)] = 60.0,
    exchange_s: Annotated[float, typer.Option(help="Of each step, for gradients.", min=0)] = 0.0,
    seed: Annotated[int, typer.Option(metavar="S", help="Of the simulated losses.", min=0)] = 0,
    overrides: Overrides = None,
    verbose: Verbose = False,
) -> None:
    """Say what a training will take on spot machines: hours, money, goodput; by formula and by simulation."""
    from rich.console import Console

    from mimiclab.experiment import load_experiment
    from mimiclab.plan.fleet import Fleet
    from mimiclab.plan.quote import RUNS, plan_table, quote, sizes
    from mimiclab.plan.training import job_of

    loaded = load_experiment(experiment, overrides or ()).experiment
    job = job_of(
        loaded,
        images=images,
        val_images=val_images,
        images_per_s=images_per_s,
        eval_images_per_s=eval_images_per_s,
        loader_images_per_s=loader_images_per_s,
        store_mb_per_s=store_mb_per_s,
        image_kb=image_kb,
        checkpoint_s=checkpoint_s,
        restart_s=restart_s,
        exchange_s=exchange_s,
    )
    goes_on = loaded.scale.workers.min < loaded.scale.workers.max if elastic is None else elastic
    quotes = [
        quote(
            job, Fleet(n, mtbf * 3600, notice, replace_minutes * 60, min(zones, n), burst), elastic=goes_on, seed=seed
        )
        for n in sizes(min(gpus, job.global_batch))
    ]
    console = Console(soft_wrap=True, markup=False, highlight=False, width=None if sys.stdout.isatty() else 160)
    console.print(f"{loaded.name}: {job.num_steps} steps of {job.global_batch} images, {RUNS} simulated runs a line")
    if images is not None and val_images is None:
        console.print("evaluations are left out: their images are not counted; expected --val-images N")
    if gpus > job.global_batch:
        console.print(f"no more than {job.global_batch} workers: each needs an image of the global batch")
    console.print(plan_table(quotes, price=price, on_demand=on_demand_price, head=head_price))
