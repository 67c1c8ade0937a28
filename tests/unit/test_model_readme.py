"""The detector's page tells the truth: its example runs, its links lead somewhere, and no file is missing from it."""

import re
from pathlib import Path

import pytest

MODELS = Path(__file__).parents[2] / "models"
README = (MODELS / "README.md").read_text()


@pytest.mark.slow
def test_the_example_runs() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, object] = {}
    exec(example, names)
    assert len(names["detections"]) == 2  # type: ignore[arg-type]


def test_links_lead_to_files() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("https://")]
    assert links
    assert not [link for link in links if not (MODELS / link).is_file()]


def test_every_module_is_explained() -> None:
    modules = {str(file.relative_to(MODELS)) for file in (MODELS / "mimicdet").glob("*.py")} - {"mimicdet/__init__.py"}
    assert modules <= set(re.findall(r"\]\(([^)]+)\)", README))
