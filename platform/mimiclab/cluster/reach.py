"""Whether a node sees what a run needs of its disks and stores: asked before workers start, by a task on a node.

Workers would fail one after the other, each with a message of its own, and a path that means another disk on every
machine would not be noticed until a checkpoint is looked for.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from pathlib import Path

from mimicdet.config import is_published_name
from mimiclab.cluster.tasks import cancel_unfinished
from mimiclab.data.manifest import MANIFEST
from mimiclab.errors import UserError
from mimiclab.schema import Experiment, ScaleConfig
from mimiclab.session import resources_per_worker, task_options
from mimiclab.storage import Storage

# How long a node may be waited for before a person is told.
_PATIENCE_S = 60.0


Files = Mapping[str, tuple[str, str]]
"""Folder, as a path or URI, and name of each file, by the key of the experiment that it belongs to."""


def check(root: Storage, files: Files, scale: ScaleConfig, say: Callable[[str], object]) -> None:
    """Make sure that a node which workers may run on sees what this machine sees.

    Args:
        root: where runs are stored.
        files: what workers read.
        scale: which nodes are meant, and what there has to be room for: the question waits for it as a worker would.
        say: gets a line where that takes long.

    Raises:
        UserError: it does not; the message names the node, the key and the path.
    """
    name = f".probe-{secrets.token_hex(4)}"
    try:
        root.write(name, b"")
        try:
            wrong = _ask({"where.storage": (root.uri, name), **files}, scale, say)
        finally:
            root.delete(name)
    except UserError as error:
        raise UserError(f"where.storage: {error}") from error
    if wrong is not None:
        raise UserError(f"{wrong}; expected a place that all nodes see, as a shared disk or a bucket")


def files_of(experiment: Experiment, *, pretrained: bool = True) -> Files:
    """What workers read of an experiment whose paths are absolute and whose data is packed.

    Args:
        experiment: that is going to be trained.
        pretrained: it starts from weights that it names, not from a checkpoint.
    """
    found = {}
    for part in ("train", "val"):
        split = getattr(experiment.data, part)
        if split is not None and split.packed is not None:
            found[f"data.{part}.packed"] = (split.packed, MANIFEST)
    model = experiment.model
    for key, weights in {"model.weights": model.weights, "model.backbone.weights": model.backbone.weights}.items():
        if pretrained and weights is not None and not is_published_name(weights):
            found[key] = (str(Path(weights).parent), Path(weights).name)
    return found


def missing(files: Files) -> str | None:
    """The first of the files that this machine does not see, as a message; None where it sees all."""
    for key, (folder, name) in files.items():
        try:
            place = Storage(folder)
            if name not in place.sizes():
                return f"{key}: {place.where(name)}, which the machine of the driver sees, is not there"
        except UserError as error:
            return f"{key}: {error}"
    return None


def _missing_here(files: Files) -> str | None:
    import ray

    wrong = missing(files)
    node = f"{ray.util.get_node_ip_address()} ({ray.get_runtime_context().get_node_id()[:8]})"
    return None if wrong is None else f"node {node}: {wrong}"


def _ask(files: Files, scale: ScaleConfig, say: Callable[[str], object]) -> str | None:
    """Have a node look."""
    import ray

    # Not on the head by preference, because the driver is there.
    task = ray.remote(_missing_here).options(**task_options(scale), scheduling_strategy="SPREAD")
    reference = task.remote(dict(files))
    try:
        while not ray.wait([reference], timeout=_PATIENCE_S)[0]:
            wanted = ", ".join(f"{amount:g} {kind}" for kind, amount in resources_per_worker(scale).items())
            say(f"waiting for a node with {wanted} to look whether it sees the run's data and storage")
        found: str | None = ray.get(reference)
        return found
    finally:
        cancel_unfinished([reference])
