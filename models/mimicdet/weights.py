"""Published weights: safetensors in, with a report of what matched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn


@dataclass(frozen=True)
class LoadReport:
    """What a load did: keys loaded, keys the model has and the file has not, keys the file has on top."""

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]


def load_matching(module: nn.Module, path: str | Path, *, ignore: Sequence[str] = ()) -> LoadReport:
    """Load a safetensors file into a module of the same architecture.

    Args:
        module: takes the weights in place.
        path: a safetensors file with the module's own key names.
        ignore: prefixes of keys in the file that have no place here, as a classifier's.

    Raises:
        ValueError: the file cannot be read, lacks keys of the module, or holds other keys or shapes.
    """
    # safetensors is torch's companion for files that run no code; imported here because only files need it.
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise ValueError(f"weights {path}: no such file")
    try:
        tensors = load_file(str(path))
    except SafetensorError as error:
        raise ValueError(f"weights {path}: not a safetensors file ({error})") from None
    own = module.state_dict()
    # Statistics' counters exist in some norms only and change nothing that is computed.
    skip = (*ignore,)
    unused = tuple(k for k in tensors if k not in own and not k.startswith(skip or ("\0",)))
    unused = tuple(k for k in unused if not k.endswith("num_batches_tracked"))
    missing = tuple(k for k in own if k not in tensors)
    wrong = [
        f"{k} is {tuple(tensors[k].shape)}, expected {tuple(own[k].shape)}"
        for k in own
        if k in tensors and tensors[k].shape != own[k].shape
    ]
    found = wrong
    if missing:
        found.append(f"{len(missing)} of {len(own)} keys are missing, the first is {missing[0]}")
    if unused:
        # A deeper network's file holds every key of a shallower one, and BatchNorm's every key of GroupNorm.
        found.append(f"{len(unused)} keys of the file have no place, the first is {unused[0]}")
    if found:
        raise ValueError(f"weights {path} do not fit {type(module).__name__}: {found[0]}")
    module.load_state_dict({k: tensors[k] for k in own})
    return LoadReport(loaded=tuple(own), missing=missing, unused=unused)
