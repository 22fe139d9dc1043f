"""The package as it is installed: wheel and editable, command and data, and no top-level module
called kernels."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points, metadata
from pathlib import Path

import pytest

import refimpl
from refimpl.kernels import SOURCE

from support import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the checkout (setuptools leaves its traces where it builds)."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    names = (
        listed.stdout.split("\n")
        if listed.returncode == 0
        else [str(p.relative_to(ROOT)) for p in ROOT.rglob("*")]
    )
    for name in names:
        source = ROOT / name
        if name and source.is_file() and not name.startswith((".venv", "tests/", "build/")):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes(source.read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(out),
    ]
    subprocess.run(command, cwd=copy, check=True, capture_output=True)
    (path,) = out.glob("*.whl")
    return path


def test_wheel_holds_all_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.name.startswith(f"deepseek_refimpl-{refimpl.__version__}-py3-none-any")
    assert {name.split("/")[0] for name in names} == {
        "refimpl",
        f"deepseek_refimpl-{refimpl.__version__}.dist-info",
    }
    files = [p for p in (ROOT / "refimpl").rglob("*") if p.suffix in (".py", ".toml", ".json")]
    wanted = {str(p.relative_to(ROOT)) for p in files}
    wanted |= {f"refimpl/kernels/src/{p.name}" for p in (ROOT / "kernels").iterdir() if p.is_file()}
    wanted |= {
        f"refimpl/kernels/src/ladder/{p.name}" for p in (ROOT / "kernels" / "ladder").iterdir()
    }
    assert wanted | {"refimpl/py.typed"} <= set(names)


def test_wheel_works(wheel: Path, tmp_path: Path) -> None:
    """Unpacked away from the checkout, it imports, finds its kernel sources, and verifies an op."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import refimpl, refimpl.kernels as k; print(refimpl.__file__); "
        "print(k.SOURCE, (k.SOURCE / 'README.md').is_file()); "
        "from refimpl.cli import main; import sys; "
        "sys.argv = ['refimpl', 'verify', 'linear', '--examples', '1']; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(str(tmp_path / "site"))
    assert lines[1] == f"{tmp_path / 'site' / 'refimpl' / 'kernels' / 'src'} True"
    assert lines[-1].endswith("every gradient holds")


def test_editable_install(tmp_path: Path) -> None:
    """What make installs: refimpl is the checkout's, with its command, wherever Python runs."""
    done = subprocess.run(
        [sys.executable, "-c", "import refimpl; print(refimpl.__file__)"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.stdout.strip() == str(ROOT / "refimpl" / "__init__.py")
    assert metadata("deepseek-refimpl")["Version"] == refimpl.__version__
    (command,) = entry_points(group="console_scripts", name="refimpl")
    assert command.value == "refimpl.cli:main"


def test_kernels_is_no_top_level_module(tmp_path: Path) -> None:
    """Another package owns that name: ours must not shadow it, in an editable install either."""
    code = (
        "import importlib.util as u; s = u.find_spec('kernels'); print(s and "
        "list(s.submodule_search_locations))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert str(ROOT) not in done.stdout
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert SOURCE == ROOT / "kernels"


def test_constraints_fit_the_requirements() -> None:
    """constraints.txt pins name==version and nothing else: no addresses, no files."""
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert (
            not line
            or line.startswith("#")
            or line.replace("-", "").replace("_", "").split("==")[0].isalnum()
        ), line
        assert "://" not in line


def test_kernels_take_no_numpy_that_numba_cuda_was_not_tried_with() -> None:
    """Whatever the ops take: NumPy 2.5 is the last that numba_cuda.py knows how to mend."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "numpy<2.6" in project["optional-dependencies"]["kernels"]


def test_every_package_is_listed() -> None:
    listed = set(
        tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    )
    found = {
        ".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "refimpl").rglob("__init__.py")
    } | {"refimpl.kernels.src"}
    assert listed == found
