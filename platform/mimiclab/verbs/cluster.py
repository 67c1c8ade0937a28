"""A cluster on this machine, its nodes, and what becomes of a run when they go."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mimiclab.verbs.options import ExperimentFile, Overrides, Verbose

if TYPE_CHECKING:
    from mimiclab.cluster.state import LocalCluster

app = typer.Typer()
cluster_app = typer.Typer(help="A cluster on this machine.", no_args_is_help=True)
app.add_typer(cluster_app, name="cluster")


@cluster_app.command("up")
def cluster_up(
    num_cpus: Annotated[
        int | None,
        typer.Option(
            help="CPUs that its head offers; by default as many as the machine has, none with --nodes.", min=0
        ),
    ] = None,
    nodes: Annotated[
        int, typer.Option(metavar="N", help="Nodes beside the head, labelled as spot machines.", min=0)
    ] = 0,
    cpus_per_node: Annotated[
        int, typer.Option(metavar="K", help="CPUs that each of them offers, whatever the machine has.", min=1)
    ] = 1,
    dashboard_host: Annotated[
        str,
        typer.Option(metavar="ADDRESS", help="Where the dashboard and the job server listen; others reach them there."),
    ] = "127.0.0.1",
    verbose: Verbose = False,
) -> None:
    """Start a cluster on this machine; it runs until `cluster down`."""
    from mimiclab.cluster import local

    _describe(
        local.up(num_cpus, typer.echo, num_nodes=nodes, cpus_per_node=cpus_per_node, dashboard_host=dashboard_host)
    )


@cluster_app.command("status")
def cluster_status(verbose: Verbose = False) -> None:
    """Say what runs of the cluster on this machine."""
    from mimiclab.cluster import state

    cluster = state.running()
    if cluster is None:
        typer.echo("no cluster runs on this machine; mimiclab cluster up starts one")
    else:
        _describe(cluster)


@cluster_app.command("down")
def cluster_down(verbose: Verbose = False) -> None:
    """End the cluster on this machine, and its jobs."""
    from mimiclab.cluster import local

    if not local.down(typer.echo):
        typer.echo("no cluster runs on this machine")


def _describe(cluster: LocalCluster) -> None:
    from mimiclab.cluster import local

    for name, what in local.describe(cluster):
        typer.echo(f"{name + ':':12}{what}")


@app.command()
def drill(
    experiment: ExperimentFile,
    events: Annotated[
        str | None,
        typer.Option(
            metavar="KIND@STEP,...",
            help="What happens when, as kill-worker@20,kill-node@45,drain@70:20s,add-node@90,kill-driver@95.",
        ),
    ] = None,
    random: Annotated[int | None, typer.Option(metavar="N", help="Draw N events instead.", min=1)] = None,
    seed: Annotated[int, typer.Option(metavar="S", help="Of what is drawn: events, and whom they hit.")] = 0,
    elastic: Annotated[
        bool, typer.Option("--elastic", help="Go on with fewer workers where a node is lost; no node takes its place.")
    ] = False,
    tolerance: Annotated[
        float, typer.Option(help="Largest difference of AP where the number of workers changed.", min=0)
    ] = 0.05,
    fresh: Annotated[bool, typer.Option("--fresh", help="Train the undisturbed run anew, too.")] = False,
    overrides: Overrides = None,
    verbose: Verbose = False,
) -> None:
    """Train on a cluster of its own, once undisturbed and once losing machines; exit with 1 if it matters."""
    from rich.console import Console

    from mimiclab.drill.drill import drill
    from mimiclab.experiment import load_experiment

    # Its table is wide; without a terminal, rich takes 80 columns for all there are.
    console = Console(soft_wrap=True, markup=False, width=None if sys.stdout.isatty() else 140)
    findings = drill(
        load_experiment(experiment, overrides or ()),
        events=events,
        num_random=random,
        seed=seed,
        elastic=elastic,
        tolerance=tolerance,
        fresh=fresh,
        console=console,
        verbose=verbose,
    )
    if not findings.hold:
        raise typer.Exit(1)


@app.command("spot-watch")
def spot_watch(
    cloud: Annotated[Literal["aws", "gcp", "kubernetes", "auto"], typer.Option(help="Whom to ask.")] = "auto",
    address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Head of the cluster; $RAY_ADDRESS, else this machine's.")
    ] = None,
    node_id: Annotated[
        str | None, typer.Option(metavar="ID", help="Node of Ray to drain; the one on this machine by default.")
    ] = None,
    interval: Annotated[float, typer.Option(help="Seconds between questions.", min=0.1, max=60)] = 5,
    once: Annotated[bool, typer.Option("--once", help="Ask once and end; as a pod's preStop hook, drain.")] = False,
    grace_seconds: Annotated[
        float, typer.Option(help="Kubernetes: what is left from SIGTERM on, as the pod's grace period says.", min=0)
    ] = 25,
    drain_on_rebalance: Annotated[
        bool, typer.Option("--drain-on-rebalance", help="AWS: drain for a rebalance recommendation too.")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Drain this machine's node of Ray when its cloud announces the machine's end; runs until SIGTERM."""
    from datetime import UTC, datetime

    from mimiclab.cluster.drain import RayNode
    from mimiclab.cluster.spot_watch import spot_watch

    if not spot_watch(
        cloud,
        RayNode(address, node_id),
        lambda line: typer.echo(f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {line}"),
        interval=interval,
        once=once,
        grace_s=grace_seconds,
        drain_on_rebalance=drain_on_rebalance,
    ):
        raise typer.Exit(1)
