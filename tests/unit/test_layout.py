"""The house rules that no type checker sees: who imports whom, and what an import loads."""

import ast
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODELS, PLATFORM = ROOT / "models", ROOT / "platform"
HEAVY = {"ray", "mlflow", "pyarrow", "pydantic"}


def fresh(code: str) -> str:
    """What a new interpreter, started in the project's root, prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def loaded(module: str) -> set[str]:
    """Top-level packages in a new interpreter that imported this module alone."""
    return {name.partition(".")[0] for name in fresh(f"import sys, {module}; print(*sys.modules)").split()}


@pytest.mark.parametrize(
    ("module", "never"),
    [
        ("mimicdet", HEAVY | {"torch"}),
        ("mimicdet.config", HEAVY | {"torch"}),
        ("mimicdet.detector", HEAVY | {"mimiclab"}),
        ("mimiclab.engine", HEAVY),
        # What verbs load that start nothing, and what starts before all checks are done.
        ("mimiclab.cli", HEAVY | {"torch", "numpy"}),
        ("mimiclab.runs", {"torch", "ray", "mlflow"}),
        ("mimiclab.summary", {"ray", "mlflow"}),
        ("mimiclab.predict", {"ray", "mlflow"}),
        ("mimiclab.train", {"torch", "ray", "mlflow"}),
        # These are loaded by Ray's controller too.
        ("mimiclab.fit", {"torch", "ray", "mlflow"}),
        ("mimiclab.restarts", {"torch", "mlflow"}),
    ],
)
@pytest.mark.slow
def test_an_import_loads_no_more_than_it_needs(module: str, never: set[str]) -> None:
    packages = loaded(module)
    assert module.partition(".")[0] in packages
    assert packages & never == set()


def test_platform_is_pythons_own_module() -> None:
    assert Path(fresh("import platform; print(platform.__file__)")).parent == Path(sysconfig.get_path("stdlib"))


def test_folders_that_are_no_packages_have_no_init() -> None:
    assert not (PLATFORM / "__init__.py").exists()
    assert not (MODELS / "__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))


def imports(folder: Path) -> Iterator[tuple[str, str]]:
    """Every import in a folder, in functions and for types too: (file within the folder, dotted name)."""
    files = sorted(folder.rglob("*.py"))
    assert files
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        yield from ((str(file.relative_to(folder)), name) for name in names_imported(file, tree))


def names_imported(file: Path, tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield node.module or ""


def for_types_only(folder: Path) -> set[tuple[str, str]]:
    """Those imports that stand under `if TYPE_CHECKING:`, which load nothing."""
    return {
        (str(file.relative_to(folder)), name)
        for file in folder.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for name in names_imported(file, node)
    }


def importers(folder: Path, *packages: str) -> set[str]:
    return {file for file, name in imports(folder) if name.partition(".")[0] in packages}


def test_the_detector_needs_torch_and_its_companions_only() -> None:
    foreign = {name.partition(".")[0] for _, name in imports(MODELS)} - sys.stdlib_module_names
    assert foreign == {"mimicdet", "torch", "torchvision", "safetensors"}


def test_imports_run_one_way() -> None:
    assert importers(MODELS, "mimiclab", "experiments", "cluster", "tests") == set()
    assert importers(PLATFORM, "experiments", "cluster", "tests") == set()


def test_only_tracking_speaks_to_mlflow() -> None:
    files = importers(PLATFORM, "mlflow")
    assert files
    assert all(file.startswith("mimiclab/tracking/") for file in files), files


@pytest.mark.slow
def test_ray_is_for_what_runs_on_a_cluster() -> None:
    typed = for_types_only(PLATFORM)
    files = {file for file, name in imports(PLATFORM) if name.partition(".")[0] == "ray" and (file, name) not in typed}
    assert files
    modules = {f"mimiclab/{name}.py" for name in ("session", "fit", "inbox", "restarts", "preemption", "worker")}
    packages = ("mimiclab/search/", "mimiclab/cluster/")
    assert {file for file in files if not file.startswith(packages)} <= modules


def test_the_engine_needs_torch_and_the_detector_only() -> None:
    ours = {"mimiclab.optim", "mimiclab.errors"}
    names = {name for file, name in imports(PLATFORM) if file == "mimiclab/engine.py"}
    foreign = {name for name in names if name.partition(".")[0] not in {*sys.stdlib_module_names, "torch", "mimicdet"}}
    assert foreign <= ours
