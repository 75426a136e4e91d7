"""The import directions of docs/architecture.md, read from the source: imports point left only.

models  <-  pipeline.stream  <-  pipeline.kafka  <-  pipeline.service  <-  pipeline.cli and pipeline.commands
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

MAY_IMPORT = {
    "models": {"models"},
    "pipeline.errors": set(),
    "pipeline.settings": {"pipeline.errors", "pipeline.settings"},
    "pipeline.stream": {"models", "pipeline.stream"},
    "pipeline.kafka": {"models", "pipeline.stream", "pipeline.settings", "pipeline.errors", "pipeline.kafka"},
    "pipeline.service": {
        "models",
        "pipeline.stream",
        "pipeline.settings",
        "pipeline.errors",
        "pipeline.kafka",
        "pipeline.service",
    },
    "pipeline.commands": {
        "models",
        "pipeline.stream",
        "pipeline.settings",
        "pipeline.errors",
        "pipeline.kafka",
        "pipeline.service",
        "pipeline.commands",
    },
    "pipeline.cli": {"pipeline.errors", "pipeline.commands"},
}
"""Layer -> the layers of ours that it may import."""

TENSORFLOW = {"tensorflow", "keras", "tf_keras"}
THE_WORLD = {"time", "os", "pathlib", "socket", "threading", "subprocess", "random", "asyncio", "logging"}
"""What the pure core has no use for: clock, environment, files, chance."""


@dataclass(frozen=True)
class Import:
    path: Path
    line: int
    module: str
    at_top: bool
    """Runs when the module is imported: not inside a function, not for type checkers only."""

    @property
    def root(self) -> str:
        return self.module.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.path.relative_to(REPOSITORY)}:{self.line} imports {self.module}"


def module_name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> str:
    """The layer a module of ours belongs to; the settings are one, whatever files they are spread over."""
    if module.startswith("pipeline._settings"):
        return "pipeline.settings"
    return next((layer for layer in MAY_IMPORT if module == layer or module.startswith(layer + ".")), module)


def imports_of(path: Path) -> Iterator[Import]:
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]

    def walk(node: ast.AST, at_top: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(path, child.lineno, alias.name, at_top)
            elif isinstance(child, ast.ImportFrom):
                base = package.split(".")[: len(package.split(".")) - child.level + 1] if child.level else []
                module = ".".join([*base, *([child.module] if child.module else [])])
                if module in ("pipeline", "models"):  # from pipeline import cli
                    for alias in child.names:
                        yield Import(path, child.lineno, f"{module}.{alias.name}", at_top)
                else:
                    yield Import(path, child.lineno, module, at_top)
            else:
                inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                for_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
                yield from walk(child, at_top and not inside and not for_types)

    yield from walk(ast.parse(path.read_text()), True)


SOURCES = sorted([*(REPOSITORY / "pipeline").rglob("*.py"), *(REPOSITORY / "models").rglob("*.py")])
IMPORTS = [found for path in SOURCES for found in imports_of(path)]


def complain(found: list[Import]) -> None:
    assert not found, "\n".join(map(str, found))


def test_every_module_belongs_to_a_layer():
    layers = {layer_of(module_name(path)) for path in SOURCES} - {"pipeline"}
    assert layers <= set(MAY_IMPORT)
    assert {"models", "pipeline.stream", "pipeline.kafka", "pipeline.service", "pipeline.commands"} <= layers


@pytest.mark.parametrize("layer", MAY_IMPORT)
def test_imports_point_left_only(layer):
    ours = [i for i in IMPORTS if layer_of(module_name(i.path)) == layer and i.root in ("models", "pipeline")]
    complain([i for i in ours if i.module != "pipeline" and layer_of(i.module) not in MAY_IMPORT[layer]])


def test_only_the_adapters_import_a_kafka_client():
    clients = {"kafka", "confluent_kafka", "aiokafka"}
    complain([i for i in IMPORTS if i.root in clients and layer_of(module_name(i.path)) != "pipeline.kafka"])


def test_only_models_import_tensorflow():
    found = [i for i in IMPORTS if i.root in TENSORFLOW]
    assert found, "nobody imports TensorFlow: this test looks in the wrong place"
    complain([i for i in found if layer_of(module_name(i.path)) != "models"])


def test_no_module_of_the_pipeline_brings_tensorflow_along_before_it_is_called():
    """A module of models/ may import it at its top, if only functions import that module."""
    heavy = {module_name(i.path) for i in IMPORTS if i.at_top and i.root in TENSORFLOW}
    while more := {module_name(i.path) for i in IMPORTS if i.at_top and i.module in heavy} - heavy:
        heavy |= more
    assert heavy
    assert not [module for module in sorted(heavy) if not module.startswith("models.")]


def test_the_core_knows_no_clock_environment_or_file():
    complain([i for i in IMPORTS if i.root in THE_WORLD and layer_of(module_name(i.path)) == "pipeline.stream"])


def test_the_command_line_imports_click_and_the_standard_library_only():
    ours = {"pipeline.errors"}
    top = [i for i in IMPORTS if module_name(i.path) == "pipeline.cli" and i.at_top]
    complain([i for i in top if i.root not in sys.stdlib_module_names and i.root != "click" and i.module not in ours])


def test_commands_import_nothing_heavy_before_they_are_called():
    light = {"click", "pipeline", "rich"} | sys.stdlib_module_names
    top = [i for i in IMPORTS if layer_of(module_name(i.path)) == "pipeline.commands" and i.at_top]
    complain([i for i in top if i.root not in light or layer_of(i.module) in ("pipeline.kafka", "pipeline.service")])


def test_no_pickle_anywhere():
    complain([i for i in IMPORTS if i.root in ("pickle", "cloudpickle", "dill", "joblib", "shelve")])
