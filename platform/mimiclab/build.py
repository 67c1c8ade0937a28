"""A detector from its experiment, with the weights that the experiment starts from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from mimicdet import MimicDet, ModelConfig
from mimicdet.baselines import Baseline
from mimicdet.interface import Detector
from mimicdet.weights import LoadReport, load_matching
from mimiclab.checkpoint import classes_of
from mimiclab.errors import UserError


def build_detector(
    config: ModelConfig,
    classes: Sequence[str],
    *,
    pretrained: bool = True,
    say: Callable[[str], object] = lambda _: None,
) -> Detector:
    """Build the detector for these classes, with the weights that the experiment starts from.

    A detector that was trained for other classes gives all but the layers that predict them.

    Args:
        config: the `model:` section.
        classes: names, in the order of their labels.
        pretrained: False reads no weights: a run's own are loaded next, and what it started from may be gone.
        say: gets a line for each file of weights: what was loaded, what was not and why.

    Raises:
        UserError: weights cannot be read, or are of another model.
    """
    kind: type[MimicDet] | type[Baseline] = MimicDet if config.detector == "mimicdet" else Baseline
    try:
        # Weights of a whole detector hold its backbone's: that file is not needed then, and may be gone.
        own = replace(config, weights=None)
        detector: Detector = kind(own, len(classes), pretrained=pretrained and config.weights is None)
        if detector.backbone_report is not None:
            say(f"{config.backbone.weights}: {detector.backbone_report}")
        if config.weights is not None and pretrained:
            say(f"{config.weights}: {_load(detector, Path(config.weights), classes)}")
    except ValueError as error:
        raise UserError(f"model: {error}") from error
    return detector


def _load(detector: Detector, weights: Path, classes: Sequence[str]) -> LoadReport:
    trained = classes_of(weights)
    if trained == list(classes):
        return load_matching(detector, weights)
    reason = f"trained for the classes {', '.join(trained)}, the data's are {', '.join(classes)}"
    return load_matching(detector, weights, keep=dict.fromkeys(detector.class_layers, reason))
