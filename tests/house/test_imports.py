"""What may be imported: no autograd anywhere, NumPy alone for the core."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from support import PACKAGE, ROOT


def test_no_autograd() -> None:
    """torch, JAX and other autograd are not even named in an import of the package or the
    kernels."""
    banned = {"torch", "jax", "tensorflow", "autograd", "mlx", "tinygrad"}
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not banned & {name.split(".")[0] for name in names}, path


@pytest.mark.parametrize(
    "module",
    [
        "refimpl",
        "refimpl.ops",
        "refimpl.model",
        "refimpl.check",
        "refimpl.check.cases",
        "refimpl.kernels.columns",
    ],
)
def test_imports_need_numpy_alone(module: str) -> None:
    code = (
        f"import sys; import {module}; print(*sorted({{m.split('.')[0] for m in sys.modules}} "
        "& {'typer', 'rich', 'cupy', 'cuda', 'numba', 'torch', 'safetensors', 'ml_dtypes', "
        "'hypothesis', 'pytest', 'scipy'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
