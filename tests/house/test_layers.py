"""The package's imports run downwards: no cycle between modules, and no module imports a higher
layer. Imports inside functions count; the face (refimpl/__init__.py) imports its names lazily."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import refimpl

PACKAGE = Path(refimpl.__file__).parent
LAYERS = (  # from the bottom; what stands in one row does not import one another
    {"refimpl", "errors", "array"},
    {"ops", "files"},
    {"fp8"},
    {"config", "text", "tokenizer"},
    {"parameters", "batch"},
    {"optimizer"},
    {"model", "checkpoint", "kernels", "count"},
    {"memory", "count_parallel"},
    {"check", "generate", "splits", "bench"},
    {"parallel"},
    {"grads"},
    {"stored"},
    {"verify", "conventions"},
    {"port"},
    {"train"},
    {"cli"},
    {"__main__"},
)
LAYER = {name: height for height, names in enumerate(LAYERS) for name in names}


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in PACKAGE.rglob("*.py")}


def imports(module: str) -> set[str]:
    """The modules of the package that a module imports, a package's names traced to their file."""
    path, found = MODULES[module], set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package.split(".")[: len(package.split(".")) - node.level + 1]
            source = ".".join([*base, *([node.module] if node.module else [])])
        elif isinstance(node, ast.ImportFrom) and node.module:
            source = node.module
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in MODULES}
            continue
        else:
            continue
        if source in MODULES:
            names = [f"{source}.{alias.name}" for alias in node.names]
            found |= {name if name in MODULES else source for name in names}
    return found - {module}


def layer_of(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def test_every_module_has_a_layer() -> None:
    assert {layer_of(module) for module in MODULES} == set(LAYER)


def test_no_import_runs_up() -> None:
    for module in MODULES.keys() - {"refimpl"}:
        own = layer_of(module)
        for other in map(layer_of, imports(module)):
            assert other == own or LAYER[other] < LAYER[own], f"{module} imports {other}"


def test_no_cycle() -> None:
    """`static_order` raises and names the cycle."""
    graph = {module: imports(module) for module in MODULES.keys() - {"refimpl"}}
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)


def test_the_core_stands_alone() -> None:
    """Ops, model and checker import none of the services around them."""
    core = {"refimpl", "errors", "array", "ops", "config", "parameters", "batch", "model", "check"}
    for module in MODULES:
        if layer_of(module) in core - {"refimpl"}:
            assert set(map(layer_of, imports(module))) <= core, module
