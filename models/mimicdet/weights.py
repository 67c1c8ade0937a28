"""Published weights: files in, without running what is in them, and a report of what matched."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LoadReport:
    """What a load did.

    Attributes:
        loaded: keys of the module that were set.
        skipped: keys of the file that were not used, with the reason.
        kept: keys of the module that keep the values they had, with the reason.
    """

    loaded: tuple[str, ...]
    skipped: Mapping[str, str]
    kept: Mapping[str, str]

    def __str__(self) -> str:
        """One sentence for a person: how many tensors matched, and which were left out and why."""
        parts = [f"{len(self.loaded)} tensors loaded"]
        for verb, keys in (("of the file left out", self.skipped), ("not loaded", self.kept)):
            for reason in dict.fromkeys(keys.values()):
                names = [key for key in keys if keys[key] == reason]
                parts.append(f"{len(names)} {verb} ({_few(names)}): {reason}")
        return "; ".join(parts)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a file of named tensors: safetensors, or a state dict in `.pth` as torchvision publishes them.

    Raises:
        ValueError: there is no such file, or it holds anything else than named tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"weights {path}: no such file")
    if path.suffix in (".pth", ".pt"):
        try:
            # weights_only: a pickle runs what it holds; this reads tensors and refuses the rest.
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError) as error:
            reason = str(error).strip().splitlines()
            raise ValueError(
                f"weights {path}: not a file of tensors alone ({reason[0] if reason else type(error).__name__})"
            ) from None
        if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
            raise ValueError(f"weights {path}: expected tensors by name, found {_describe(tensors)}")
        return tensors
    # safetensors is torch's companion for files that run no code; imported here because only files need it.
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        loaded: dict[str, Tensor] = load_file(str(path))
    except SafetensorError as error:
        raise ValueError(f"weights {path}: not a safetensors file ({error})") from None
    return loaded


def load_matching(
    module: nn.Module, path: str | Path, *, ignore: Sequence[str] = (), keep: Mapping[str, str] | None = None
) -> LoadReport:
    """Load a file into a module of the same architecture; see `load_tensors`."""
    return load_tensors(module, read_weights(path), f"weights {path}", ignore=ignore, keep=keep)


def load_tensors(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    source: str,
    *,
    ignore: Sequence[str] = (),
    keep: Mapping[str, str] | None = None,
) -> LoadReport:
    """Load named tensors into a module of the same architecture, all or nothing.

    Args:
        module: takes the weights in place.
        tensors: by the module's own key names.
        source: what messages call them.
        ignore: prefixes of keys among the tensors that have no place here, as a classifier's.
        keep: prefixes of the module's keys that keep their values, with the reason.

    Raises:
        ValueError: keys of the module are missing, or there are other keys or shapes.
    """
    keep = keep or {}
    own = module.state_dict()
    kept = {key: reason for key in own for prefix, reason in keep.items() if key.startswith(prefix)}
    wanted = [key for key in own if key not in kept]
    skipped = {}
    for key in tensors:
        if key in own:
            if key in kept:
                skipped[key] = kept[key]
        elif key.startswith((*ignore, "\0")):
            skipped[key] = "no such layer here"
        elif key.endswith("num_batches_tracked"):
            # A counter that some norms have and others do not; nothing that is computed depends on it.
            skipped[key] = "a counter"
        elif key.startswith((*keep, "\0")):
            skipped[key] = next(reason for prefix, reason in keep.items() if key.startswith(prefix))
    missing = [key for key in wanted if key not in tensors]
    unknown = [key for key in tensors if key not in own and key not in skipped]
    wrong = [key for key in wanted if key in tensors and tensors[key].shape != own[key].shape]
    problem = None
    if wrong:
        key = wrong[0]
        problem = f"{key} is {tuple(tensors[key].shape)}, expected {tuple(own[key].shape)}"
    elif missing:
        problem = f"{len(missing)} of {len(own)} keys are missing, the first is {missing[0]}"
    elif unknown:
        # A deeper network's file holds every key of a shallower one, and BatchNorm's every key of GroupNorm.
        problem = f"{len(unknown)} keys of the file have no place, the first is {unknown[0]}"
    if problem:
        raise ValueError(f"{source} do not fit {type(module).__name__}: {problem}")
    module.load_state_dict({key: tensors[key] if key not in kept else own[key] for key in own})
    return LoadReport(tuple(wanted), skipped, kept)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _describe(value: object) -> str:
    if not isinstance(value, dict):
        return f"a {type(value).__name__}"
    key, other = next((k, v) for k, v in value.items() if not isinstance(v, Tensor))
    return f"a {type(other).__name__} at {key!r}"
