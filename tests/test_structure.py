"""How the code hangs together: who imports whom, what loading costs, what is forbidden."""

import ast
import dataclasses
import functools
import itertools
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import clustering
import experts
import xelm
from xelm.config import RunConfig
from xelm.models.config import ModelConfig, Rope
from xelm.training_config import Budget, DataConfig, OptimizerConfig, RuntimeConfig, TrainConfig

ROOT = Path(__file__).parent.parent
PACKAGES = ("clustering", "experts", "xelm")
CONFIGS = (
    *(Budget, TrainConfig, OptimizerConfig, DataConfig, RuntimeConfig, RunConfig),
    *(ModelConfig, Rope),
)
HEAVY = {"jax", "flax", "optax", "orbax", "grain", "transformers", "matplotlib", "torch", "sklearn"}
# From the ground up: a module imports modules of its own group or of groups above it in this list.
LAYERS = (
    ("clustering.errors", "clustering.codes", "clustering.values"),
    (
        "clustering.files",
        "clustering.hub_files",
        "clustering.engines",
        "clustering.features",
        "clustering.languages",
    ),
    ("clustering.tree", "clustering.distances", "clustering.uriel", "clustering.names"),
    ("clustering.genealogy", "clustering.geography", "clustering.table"),
    ("clustering.lexical", "clustering.internal"),
    ("clustering.documents", "clustering.vectoriser", "clustering.kmeans"),
    ("clustering.identify", "clustering.novelty"),
    ("clustering.pairing", "clustering.agglomerative", "clustering.capacity"),
    ("clustering.figures", "clustering.maps"),
    ("clustering.clustering",),
    ("clustering.grouping", "clustering.control", "clustering.tfidf"),
    ("clustering.typology", "clustering.choice", "clustering.ngrams", "clustering.nested"),
    ("experts",),
    ("xelm.version", "xelm.process", "xelm.progress", "xelm.bounds"),
    ("xelm.settings", "xelm.models"),
    ("xelm.training_config", "xelm.config", "xelm.presets"),
    ("xelm.data",),
    ("xelm.training",),
    ("xelm.inference",),
    ("xelm.evaluation",),
    ("xelm.runs",),
    ("xelm.serving",),
    ("xelm.harness", "xelm.quickstart"),
    ("xelm.lifecycle", "xelm.api", "xelm.tables"),
    ("xelm.commands",),
    ("xelm.cli", "xelm.__main__"),
)
# A plain language-model trainer: of the packages below it knows mistakes, files and language codes.
TRAINER = (
    "xelm.models",
    "xelm.settings",
    "xelm.bounds",
    "xelm.training_config",
    "xelm.config",
    "xelm.presets",
    "xelm.data",
    "xelm.training",
)
TRAINER_MAY_IMPORT = (
    "clustering.errors",
    "clustering.files",
    "clustering.hub_files",
    "clustering.languages",
)
SHIPPED = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
NAMES = [path.relative_to(ROOT).as_posix() for path in SHIPPED]
MODULES = [name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in NAMES]


@functools.cache
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


def part(module: str) -> str:
    """The package of a module: clustering, experts, or one of xelm's."""
    return ".".join(module.split(".")[: 2 if module.startswith("xelm.") else 1])


def test_every_source_file_is_looked_at():
    assert {"xelm/cli.py", "experts/merge.py", "clustering/files.py"} <= set(NAMES)


@functools.cache
def import_graph() -> dict[str, set[str]]:
    """Module -> modules of the three packages that it imports, anywhere in its file: within
    functions and for types as well. A name that is no module belongs to the module it is in."""
    graph: dict[str, set[str]] = {}
    for module, path in zip(MODULES, SHIPPED):
        found = set()
        for name in filter(lambda name: within(name, PACKAGES), imported(path)):
            while name not in MODULES:
                name = name.rpartition(".")[0]
            found.add(name)
        graph[module] = found - {module}
    return graph


def layer(module: str) -> int:
    """Number of the module's layer: that with the longest prefix of its name."""
    places = {prefix: number for number, group in enumerate(LAYERS) for prefix in group}
    while module not in places:
        assert "." in module, "a module has no place in LAYERS"
        module = module.rpartition(".")[0]
    return places[module]


def is_upward(module: str, other: str) -> bool:
    if other in PACKAGES:  # which loads names from all layers when they are first used
        return True
    if within(module, TRAINER) and not within(other, (*TRAINER_MAY_IMPORT, "xelm")):
        return True
    if within(module, ("xelm.inference",)) and within(other, ("xelm.training",)):
        return True
    return layer(other) > layer(module)


def test_imports_point_one_way():
    graph = import_graph()
    found = {
        f"{module} -> {other}"
        for module in graph.keys() - set(PACKAGES)
        for other in graph[module]
        if is_upward(module, other)
    }
    assert found == set()


def test_no_imports_form_a_circle():
    graph = {module: set(others) for module, others in import_graph().items()}
    while free := [module for module, others in graph.items() if not others]:
        graph = {m: others.difference(free) for m, others in graph.items() if m not in free}
    while free := set(graph).difference(*graph.values()):
        graph = {m: others for m, others in graph.items() if m not in free}
    assert {part(module) for module in graph} == set()


def docstrings(path: Path) -> Iterator[str]:
    """Strings that stand alone: of modules, classes and functions, and under fields."""
    for node in ast.walk(tree(path)):
        value = node.value if isinstance(node, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            yield value.value


def test_docstrings_begin_with_a_statement():
    """A first line such as "Of the other side." cannot be read alone."""
    for module, path in zip(MODULES, SHIPPED):
        for text in docstrings(path):
            assert not text.lstrip().startswith("Of "), f"{module}: {text}"


def test_lines_of_pages_can_be_read():
    wide = {
        path.name
        for path in (ROOT / "docs").glob("**/*.md")
        if any(len(line) > 120 for line in path.read_text(encoding="utf-8").splitlines())
    }
    assert wide == set()


CODE = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "torch"}


def test_loading_a_file_of_somebody_elses_runs_no_code():
    found = []
    for path, name in zip(SHIPPED, NAMES):
        found += [(name, module) for module in imported(path) if within(module, CODE)]
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.Call):
                continue
            function = node.func
            if isinstance(function, ast.Name) and function.id in ("eval", "exec", "__import__"):
                found.append((name, f"{function.id}() in line {node.lineno}"))
            for keyword in node.keywords:
                allows = not (isinstance(keyword.value, ast.Constant) and not keyword.value.value)
                if keyword.arg in ("trust_remote_code", "allow_pickle", "shell") and allows:
                    found.append((name, f"{keyword.arg} in line {node.lineno}"))
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
    from xelm.api import Run, open_run
    from xelm.models.checkpoint import load_model, save_model

    assert (xelm.load_model, xelm.save_model, xelm.open_run) == (load_model, save_model, open_run)
    assert xelm.Run is Run
    assert dir(xelm) == sorted(xelm.__all__)
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
    # With what it inherits, as the fields are ordered.
    names = [base.__name__ for base in reversed(config.__mro__) if dataclasses.is_dataclass(base)]
    classes = [node for node in ast.walk(tree(path)) if isinstance(node, ast.ClassDef)]
    bodies = {node.name: node.body for node in classes}
    explained = [
        field.target.id
        for name in names
        for field, text in itertools.pairwise(bodies[name])
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
    # Without it, type checkers of users ignore the annotations.
    assert [name for name in PACKAGES if not (ROOT / name / "py.typed").is_file()] == []


def test_the_version_is_the_one_of_the_distribution():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert xelm.__version__ == project["project"]["version"]


def test_modules_that_the_page_on_architecture_names_exist():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z_/]+/[a-z_]+\.py)`", page))
    for folder, modules in re.findall(r"^- `(\w+)/`: ((?:.+\n)(?:  .+\n)*)", page, re.M):
        named |= {f"{folder}/{name}.py" for name in re.findall(r"`([a-z_]+)`", modules)}
    assert {"training/loop.py", "experts/registry.py", "inference/route.py"} <= named
    missing = [n for n in named if not any((ROOT / part / n).exists() for part in ("", "xelm"))]
    assert missing == []


def test_packages_whose_arrays_are_checked_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (options,) = re.findall(
        r"--jaxtyping-packages=(\S+)", project["tool"]["pytest"]["ini_options"]["addopts"]
    )
    *packages, _ = options.split(",")
    assert [package for package in packages if package not in MODULES] == []
    assert {"xelm.models", "xelm.inference.decoder"} <= set(packages)
