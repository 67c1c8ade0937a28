"""`mimiclab data pack`: what a person sees of it."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mimiclab.data.coco import read_coco
from mimiclab.data.manifest import Manifest
from mimiclab.data.pack import pack
from mimiclab.data.parallel import in_threads
from mimiclab.storage import Storage

# The manifest names all that was left out; of these the terminal shows so many.
MAX_NOTES = 20


def pack_files(
    annotations: Path,
    images: Path,
    destination: str,
    console: Console,
    *,
    address: str | None = None,
    workers: int | None = None,
    skip_broken: bool = False,
    verbose: bool = False,
) -> Manifest:
    """Pack an annotation file and its images, with progress.

    Args:
        annotations: COCO's JSON file.
        images: The folder that its file names are relative to.
        destination: Folder or URI to pack into.
        console: Gets what a person wants to know.
        address: Of a Ray cluster that shares the work; $RAY_ADDRESS, else threads of this process do it. Every node
            has to see the images and, if it is a folder, the destination.
        workers: Threads, where there is no cluster; as many as the machine has CPUs by default.
        skip_broken: Leave images out that cannot be decoded.
        verbose: Let Ray talk.

    Raises:
        UserError: see `pack`.
    """
    dataset = read_coco(annotations.absolute(), images.absolute())
    storage = Storage(destination)
    destination = destination if storage.local is None else str(storage.local)
    columns = (TextColumn("packing"), BarColumn(), MofNCompleteColumn(), TextColumn("images"), TimeRemainingColumn())
    with ExitStack() as stack:
        run = in_threads(workers or os.cpu_count() or 1)
        if address or os.environ.get("RAY_ADDRESS") or _connected():
            from mimiclab.cluster.tasks import on_cluster
            from mimiclab.schema import ScaleConfig
            from mimiclab.session import ray_session

            stack.enter_context(ray_session(address, ScaleConfig(), verbose=verbose))
            run = on_cluster()
        progress = stack.enter_context(Progress(*columns, console=console))
        bar = progress.add_task("", total=len(dataset.images))
        manifest = pack(
            dataset, destination, run=run, skip_broken=skip_broken, done=lambda num: progress.advance(bar, num)
        )
    lines = [*(f"left out: {text}" for text in manifest.left_out), *manifest.notes]
    for text in lines[:MAX_NOTES]:
        console.print(text, highlight=False)
    if len(lines) > MAX_NOTES:
        console.print(f"and {len(lines) - MAX_NOTES} more, see the manifest", highlight=False)
    size = sum(shard.bytes for shard in manifest.shards)
    console.print(
        f"{storage.name}: {manifest.images} images, {manifest.objects} objects, {len(manifest.shards)} shards, "
        f"{size / 1e6:.1f} MB, content {manifest.content[:12]}",
        highlight=False,
    )
    return manifest


def _connected() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())
