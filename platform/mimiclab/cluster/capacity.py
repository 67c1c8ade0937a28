"""What a cluster can give: what its nodes have, or what it grows to where machines are started as they are needed.

Ray's autoscaler tells nobody how far it may go. So the head's labels do: `mimiclab/max-GPU: "16"` for as many GPUs on
all nodes that there can ever be at a time, `max-CPU` likewise, and Ray's name of a GPU for those of one model, as
`max-L4`. A head without such labels is one of a cluster that stays as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from mimiclab.errors import UserError

Node = tuple[Mapping[str, float], Mapping[str, str]]
"""What a node that is alive offers, as {"CPU": 8, ...}, and its labels."""

PREFIX = "mimiclab/max-"
"""How the labels begin that say what a cluster grows to."""


def capacity(nodes: Iterable[Node]) -> dict[str, float]:
    """The most that a cluster can ever give at a time, as {"CPU": 8, ...}.

    Raises:
        UserError: a label says no number.
    """
    total: Counter[str] = Counter()
    limits: dict[str, float] = {}
    for resources, labels in nodes:
        total.update(resources)
        limits.update(_limits(labels))
    return {kind: max(total[kind], limits.get(kind, 0)) for kind in {*total, *limits}}


def grows(nodes: Iterable[Node]) -> bool:
    """Whether there will be more nodes than these where they are needed."""
    return any(_limits(labels) for _, labels in nodes)


def room(nodes: Iterable[Node], each: Mapping[str, float]) -> list[int]:
    """How many workers that ask for `each` every node has room for, while it does nothing else."""
    return [min(int(offer.get(kind, 0) // amount) for kind, amount in each.items()) for offer, _ in nodes]


def labelled(nodes: Iterable[Node], selector: Mapping[str, str]) -> list[Node]:
    """The nodes on which Ray starts what asks for these labels."""
    from ray._raylet import node_labels_match_selector  # type: ignore[attr-defined]  # compiled

    return [node for node in nodes if node_labels_match_selector(dict(node[1]), dict(selector))]


def connected() -> dict[str, float]:
    """The capacity of the cluster that this process is connected to."""
    return capacity(connected_nodes())


def is_one_machine() -> bool:
    """Whether the cluster that this process is connected to is one node, and stays so."""
    nodes = connected_nodes()
    return len(nodes) == 1 and not grows(nodes)


def connected_nodes() -> list[Node]:
    """The nodes of the cluster that this process is connected to."""
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
