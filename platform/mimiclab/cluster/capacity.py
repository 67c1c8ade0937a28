"""What a cluster can give: what its nodes have, or what it grows to where machines are started as they are needed.

Ray's autoscaler tells nobody how far it may go. So the head's labels do: `mimiclab/max-GPU: "16"` for as many GPUs on
all nodes that there can ever be at a time, `max-CPU` likewise, and Ray's name of a GPU for those of one model, as
`max-L4`. A head without such labels is one of a cluster that stays as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from mimiclab.errors import UserError

PREFIX = "mimiclab/max-"
"""How the labels begin that say what a cluster grows to."""


def capacity(nodes: Iterable[tuple[Mapping[str, float], Mapping[str, str]]]) -> dict[str, float]:
    """The most that a cluster can ever give at a time, as {"CPU": 8, ...}.

    Args:
        nodes: resources and labels of each node that is alive.

    Raises:
        UserError: a label says no number.
    """
    total: Counter[str] = Counter()
    limits: dict[str, float] = {}
    for resources, labels in nodes:
        total.update(resources)
        limits.update(_limits(labels))
    return {kind: max(total[kind], limits.get(kind, 0)) for kind in {*total, *limits}}


def connected() -> dict[str, float]:
    """The capacity of the cluster that this process is connected to."""
    return capacity(_nodes())


def is_one_machine() -> bool:
    """Whether the cluster that this process is connected to is one node, and stays so."""
    labels = [labels for _, labels in _nodes()]
    return len(labels) == 1 and not _limits(labels[0])


def _nodes() -> list[tuple[Mapping[str, float], Mapping[str, str]]]:
    import ray

    return [(node["Resources"], node["Labels"]) for node in ray.nodes() if node["Alive"]]


def _limits(labels: Mapping[str, str]) -> dict[str, float]:
    found = {}
    for label, value in labels.items():
        if label.startswith(PREFIX):
            kind = label.removeprefix(PREFIX)
            if not value.isdecimal():
                raise UserError(f"label {label} of a node: expected a whole number, found {value!r}")
            found[kind if kind in ("CPU", "GPU") else f"accelerator_type:{kind}"] = float(value)
    return found
