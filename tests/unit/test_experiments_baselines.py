"""Baselines and controls differ from what they are compared with in what they claim, and in nothing else."""

from pathlib import Path

import pytest

from mimiclab.experiment import differences, load_experiment
from mimiclab.schema import Experiment

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
BASES = {"scenes": "scenes", "bccd": "bccd-mobilenet"}
CHANGES = {
    "retinanet": {'model.detector: "mimicdet" -> "retinanet"'},
    "fcos": {'model.detector: "mimicdet" -> "fcos"'},
    "faster-rcnn": {'model.detector: "mimicdet" -> "faster_rcnn"'},
    "student-only": {"model.teacher.enabled: true -> false"},
    "no-mimic": {"model.mimic.cls_weight: 1.0 -> 0.0", "model.mimic.reg_weight: 1.0 -> 0.0"},
}


def load(path: Path, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    monkeypatch.setenv("MIMICLAB_DATA", "/data")
    monkeypatch.setenv("MIMICLAB_WEIGHTS", "/weights")
    return load_experiment(path).experiment


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("data", BASES)
def test_an_experiment_differs_from_its_base_by_its_claim_alone(
    data: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load(EXPERIMENTS / f"{BASES[data]}.yaml", monkeypatch)
    experiment = load(EXPERIMENTS / "baselines" / f"{data}-{what}.yaml", monkeypatch)

    assert set(differences(base, experiment)) == {f'name: "{BASES[data]}" -> "{data}-{what}"', *CHANGES[what]}
    # How long a run is and how it is run are no part of its identity, yet of a fair comparison.
    assert (experiment.optim, experiment.scale) == (base.optim, base.scale)


def test_every_experiment_of_the_folder_makes_a_claim() -> None:
    found = {path.name for path in (EXPERIMENTS / "baselines").iterdir()}
    assert found == {f"{data}-{what}.yaml" for data in BASES for what in CHANGES}
