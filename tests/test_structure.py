"""How the code hangs together: who imports whom, what loading costs, what is forbidden."""

import ast
import dataclasses
import itertools
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import clustering
import experts
import xelm
from xelm.config import RunConfig, TrainConfig
from xelm.models.config import ModelConfig

ROOT = Path(__file__).parent.parent
PACKAGES = ("clustering", "experts", "xelm")
CONFIGS = (TrainConfig, RunConfig, ModelConfig)
HEAVY = {"jax", "flax", "optax", "orbax", "grain", "transformers", "matplotlib", "torch", "sklearn"}
# A plain language-model trainer: of the package below it knows mistakes, files and language codes.
TRAINER = ("xelm/models", "xelm/data", "xelm/training", "xelm/config.py")
TRAINER_MAY_IMPORT = {"clustering.errors", "clustering.files", "clustering.languages"}

SHIPPED = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
NAMES = [path.relative_to(ROOT).as_posix() for path in SHIPPED]


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(path: Path) -> Iterator[str]:
    """Full names of modules and of what is imported from them, wherever in the file."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, modules: set[str] | tuple[str, ...]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def test_every_source_file_is_looked_at():
    assert {"xelm/cli.py", "experts/merge.py", "clustering/files.py"} <= set(NAMES)


@pytest.mark.parametrize("path", SHIPPED, ids=NAMES)
def test_imports_point_one_way(path):
    name = path.relative_to(ROOT).as_posix()
    ours = [module for module in imported(path) if within(module, PACKAGES)]
    if name.startswith("clustering/"):
        assert [module for module in ours if not within(module, ("clustering",))] == []
    if name.startswith("experts/"):
        assert [module for module in ours if within(module, ("xelm",))] == []
    if name.startswith(TRAINER):
        others = [module for module in ours if not within(module, TRAINER_MAY_IMPORT)]
        above = (
            "clustering",
            "experts",
            "xelm.runs",
            "xelm.inference",
            "xelm.cli",
            "xelm.commands",
        )
        assert [module for module in others if within(module, above)] == []


@pytest.mark.parametrize("path", SHIPPED, ids=NAMES)
def test_loading_a_file_of_somebody_elses_runs_no_code(path):
    found = [
        module
        for module in imported(path)
        if within(module, {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "torch"})
    ]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Name) and function.id in ("eval", "exec", "__import__"):
                found.append(f"{function.id}() in line {node.lineno}")
            for keyword in node.keywords:
                allows = not (isinstance(keyword.value, ast.Constant) and not keyword.value.value)
                if keyword.arg in ("trust_remote_code", "allow_pickle", "shell") and allows:
                    found.append(f"{keyword.arg} in line {node.lineno}")
    assert found == []


@pytest.mark.parametrize(
    "program",
    [
        "import xelm, experts, clustering",
        "import xelm.config, xelm.presets, xelm.models.config, xelm.models.families",
        "from xelm import cli; cli.parser().format_help()",
        "import contextlib\nfrom xelm.cli import main\n"
        "with contextlib.suppress(SystemExit): main(['--help'])",
    ],
    ids=["packages", "configuration", "parser", "help"],
)
def test_nothing_heavy_is_imported_before_it_is_needed(program):
    program += "\nimport sys\nprint(*sys.modules, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert {name.partition(".")[0] for name in done.stderr.split()} & HEAVY == set()


def test_the_names_of_the_package_are_loaded_when_first_used():
    from xelm.models.checkpoint import load_model, save_model
    from xelm.runs.run import open_run

    assert (xelm.load_model, xelm.save_model, xelm.open_run) == (load_model, save_model, open_run)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = xelm.nothing


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_every_field_of_a_configuration_is_read_by_some_code(config):
    read = set()
    for path in SHIPPED:
        module = tree(path)
        # To check a field is not to use it.
        inside = {
            id(node)
            for definition in ast.walk(module)
            if isinstance(definition, ast.FunctionDef) and definition.name == "__post_init__"
            for node in ast.walk(definition)
        }
        read |= {
            node.attr
            for node in ast.walk(module)
            if isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Load)
            and id(node) not in inside
        }
    assert [field.name for field in dataclasses.fields(config) if field.name not in read] == []


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_every_field_of_a_configuration_is_explained(config):
    path = Path(sys.modules[config.__module__].__file__ or "")
    body = next(
        node.body
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ClassDef) and node.name == config.__name__
    )
    explained = [
        field.target.id
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    ]
    assert explained == [field.name for field in dataclasses.fields(config)]


def test_the_three_packages_lie_side_by_side_and_ship_together():
    homes = {Path(package.__file__).parent.parent for package in (clustering, experts, xelm)}
    assert len(homes) == 1
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert sorted(wheel["packages"]) == sorted(PACKAGES)


def test_the_version_is_the_one_of_the_distribution():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert xelm.__version__ == project["project"]["version"]
