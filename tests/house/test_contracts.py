"""The house rules that a machine can check: stems, tags, contracts, imports, words that break the
complex step."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import refimpl
from refimpl import ops
from refimpl.check.cases import CASES, REGIMES
from refimpl.ops import REFERENCE

from support import NOT_OPS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "refimpl"
STEMS = sorted(
    path.stem for path in (PACKAGE / "ops").glob("*.py") if path.stem not in ("__init__", "table")
)
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "kernels/README.md",
    *(f"derivations/{x}.md" for x in sorted(NOT_OPS)),
]
TAG = r"[a-z_]+\.\d+"


def test_one_stem_four_places() -> None:
    """Every op has a derivation, a test, cases with regimes, and an exported pair; and none of
    these lacks an op."""
    pages = {path.stem for path in (ROOT / "derivations").glob("*.md")} - NOT_OPS
    tests = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}
    assert set(STEMS) == pages == set(CASES) == set(REGIMES)
    assert set(STEMS) <= tests
    for stem in STEMS:
        assert callable(getattr(ops, f"{stem}_forward"))
        assert callable(getattr(ops, f"{stem}_backward"))


@pytest.mark.parametrize("stem", STEMS)
def test_tags(stem: str) -> None:
    """Every equation tagged in the derivation is cited in the code, and every citation has its
    equation, once."""
    page = (ROOT / "derivations" / f"{stem}.md").read_text()
    defined = re.findall(rf"\\tag\{{({TAG})\}}", page.replace(r"\_", "_"))
    assert not re.search(r"\\tag\{\w*_", page), "GitHub wants the underscore of a tag as \\_"
    code = "".join(
        path.read_text() for path in [PACKAGE / "ops" / f"{stem}.py", PACKAGE / "model.py"]
    )
    cited = {tag for tag in re.findall(rf"# \(({TAG})\)", code) if tag.startswith(f"{stem}.")}
    assert defined, f"{stem}.md tags no equation"
    assert len(defined) == len(set(defined)), f"{stem}.md defines a tag twice"
    assert set(defined) == cited
    assert {tag.split(".")[0] for tag in defined} == {stem}


def test_no_stray_tags() -> None:
    """No file cites a tag of an op that does not exist."""
    for path in PACKAGE.rglob("*.py"):
        for tag in re.findall(rf"# \(({TAG})\)", path.read_text()):
            assert tag.split(".")[0] in STEMS, f"{path.name} cites {tag}"


def test_tags_of_kernels() -> None:
    """A tag cited in a kernel stands in a derivation, and every file of an op cites some."""
    for path in [p for p in (ROOT / "kernels").rglob("*") if p.suffix in (".cu", ".cuh", ".py")]:
        comments = "\n".join(
            re.findall(r"#(.*)" if path.suffix == ".py" else r"//(.*)", path.read_text())
        )
        tags = re.findall(rf"\(({TAG})\)", comments)
        assert tags or not path.stem.startswith(tuple(STEMS)), f"{path.name} cites no tag"
        for tag in tags:
            page = ROOT / "derivations" / f"{tag.split('.')[0]}.md"
            assert page.is_file(), f"{path.name} cites {tag}"
            assert f"\\tag{{{tag}}}" in page.read_text().replace(r"\_", "_"), (
                f"{path.name} cites {tag}"
            )


@pytest.mark.parametrize("stem", STEMS)
def test_contract_of_signatures(stem: str) -> None:
    """Differentiable arguments are positional, the others keyword-only; backward takes (dy,
    saved)."""
    forward = inspect.signature(getattr(ops, f"{stem}_forward")).parameters.values()
    assert {p.kind for p in forward} <= {
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.KEYWORD_ONLY,
    }
    assert all(
        p.default is inspect.Parameter.empty for p in forward if p.kind == p.POSITIONAL_OR_KEYWORD
    )
    backward = list(inspect.signature(getattr(ops, f"{stem}_backward")).parameters)
    assert len(backward) == 2
    assert backward[0].startswith("d")
    assert backward[1] == "saved"


@pytest.mark.parametrize("stem", STEMS)
def test_docstrings(stem: str) -> None:
    """Every op says its source or letters, names its derivation, and documents every public
    function."""
    source = (PACKAGE / "ops" / f"{stem}.py").read_text()
    tree = ast.parse(source)
    head = ast.get_docstring(tree) or ""
    assert f"derivations/{stem}.md" in head
    assert "Letters" in head or stem == "swiglu"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"


@pytest.mark.parametrize(
    "path", [*sorted((PACKAGE / "ops").glob("*.py")), PACKAGE / "model.py"], ids=lambda p: p.stem
)
def test_nothing_that_breaks_the_complex_step(path: Path) -> None:
    """abs, norm, var, std, conj and vdot have no complex derivative; no op imports NumPy for its
    arithmetic."""
    forbidden = re.compile(
        r"\b(abs|fabs|norm|var|std|conj|conjugate|vdot|angle)\(|\.T\b|np\.einsum|xp\.einsum"
    )
    for number, line in enumerate(path.read_text().splitlines(), 1):
        code = line.split("#")[0]
        assert not forbidden.search(code) or '"' in code or "``" in code, (
            f"{path.name}:{number}: {line}"
        )
    if path.stem not in ("rope", "model"):  # frequencies and initial parameters are made in NumPy
        assert "import numpy" not in path.read_text()


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
        "refimpl.kernels.table",
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


def test_reference_stays_small() -> None:
    """config + array + ops + model: about 2,500 lines; mla, moe and router one or two screens
    each."""
    files = [
        PACKAGE / "config.py",
        PACKAGE / "array.py",
        PACKAGE / "model.py",
        *(PACKAGE / "ops").glob("*.py"),
    ]
    assert sum(len(path.read_text().splitlines()) for path in files) <= 2_720
    for name in ("mla", "moe", "router"):
        assert len((PACKAGE / "ops" / f"{name}.py").read_text().splitlines()) <= 165


def test_table_matches_names() -> None:
    for name, pair in REFERENCE.items():
        assert pair.forward is getattr(ops, f"{name}_forward")
        assert pair.backward is getattr(ops, f"{name}_backward")


def test_version_is_in_the_changelog() -> None:
    assert f"## {refimpl.__version__}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_of_documents(document: str) -> None:
    """Every relative link points at something that exists."""
    path = ROOT / document
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), f"{document} links to {target}"
