"""README and CONTRIBUTING say what is true: their code runs, their files exist, their figures are
today's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import refimpl
from refimpl.check.cases import CASES
from refimpl.check.planted import PLANTED

from support import NOT_OPS, ROOT

README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


@pytest.mark.parametrize(
    "code", re.findall(r"```python\n(.*?)```", README, re.S), ids=["model", "rms_norm"]
)
def test_code_runs(code: str) -> None:
    exec(compile(code, "README.md", "exec"), {})


def test_first_line() -> None:
    first = "DeepSeek-V3/R1 in NumPy and CuPy: every gradient derived by hand and checked"
    assert README.splitlines()[0] == f"# {first}"


def test_file_tree() -> None:
    """Every name in the annotated tree exists, in the folder it is indented under; every folder of
    ours is in it."""
    tree = CONTRIBUTING.split("## The files")[1].split("```")[1]
    folders: list[Path] = [ROOT]
    named = set()
    for line in tree.strip("\n").splitlines():
        entry, depth = line.strip().split("  ")[0], (len(line) - len(line.lstrip())) // 2
        for name in entry.split(", "):
            path = folders[depth] / name
            assert path.exists(), f"{path.relative_to(ROOT)} is in CONTRIBUTING's tree alone"
            named.add(path.resolve())
            folders[depth + 1 :] = [path]
    for path in (ROOT / "refimpl").iterdir():
        if (
            not path.name.startswith("_")
            and path.suffix in ("", ".py")
            and path.name != "errors.py"
        ):
            assert path.resolve() in named, f"{path.name} is missing in CONTRIBUTING's tree"


def test_first_screen() -> None:
    """Within forty lines: what it is, how to install it, a call, and what proves it."""
    screen = "\n".join(README.splitlines()[:40])
    assert "$ make verify" in screen
    assert "every gradient holds" in screen
    assert "refimpl.backward(saved)" in screen


@pytest.mark.parametrize("document", ["README.md", "derivations/porting.md"])
def test_lines_of_code_that_are_named(document: str) -> None:
    """``refimpl/ops/mla.py:12 (mla.11) has …``: that line has it today."""
    found = re.findall(r"(refimpl/\S+\.py):(\d+) \(\S+\) has (.*?);", (ROOT / document).read_text())
    assert found or document != "README.md"
    for file, line, code in found:
        assert code in (ROOT / file).read_text().splitlines()[int(line) - 1], f"{file}:{line}"


def test_citation() -> None:
    """CITATION.cff has the version and the name that the package has."""
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {refimpl.__version__}\n" in citation
    for field in ("cff-version: 1.2.0", "message:", "title:", "authors:", "license: MIT"):
        assert field in citation


def test_table_has_every_op() -> None:
    for op in CASES:
        code = f"refimpl/ops/{op}.py"
        assert f"[page](derivations/{op}.md) | [yes]({code}) | [yes]({code})" in README


def test_number_of_planted_bugs() -> None:
    assert f"plants {len(PLANTED)} bugs" in (ROOT / "derivations" / "proofs.md").read_text()
    assert f"{len(PLANTED)} planted bugs" in (ROOT / "CHANGELOG.md").read_text()


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for document in (README, CONTRIBUTING):
        for target in re.findall(r"`?\bmake ([a-z-]+)\b", document):
            if target in ("verify", "test", "check", "bugs", "memory", "test-full"):
                assert f"\n{target}:" in makefile


DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "kernels/README.md",
    *(f"derivations/{x}.md" for x in sorted(NOT_OPS)),
]


def test_version_is_in_the_changelog() -> None:
    assert f"## {refimpl.__version__}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_of_documents(document: str) -> None:
    """Every relative link points at something that exists."""
    path = ROOT / document
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), f"{document} links to {target}"


@pytest.mark.parametrize(
    "file",
    [
        *(".ci/run", "Makefile", "pyproject.toml", "tests/gpu.py"),
        *("CONTRIBUTING.md", "README.md", "kernels/README.md"),
        *(p.relative_to(ROOT).as_posix() for p in sorted((ROOT / "derivations").glob("*.md"))),
    ],
)
def test_tests_that_are_named_exist(file: str) -> None:
    """A test that was moved is named where it stands now; tests/ops/test_<op>.py has a test for
    any op."""
    text = (ROOT / file).read_text().replace("<op>", "rms_norm")
    for named in re.findall(r"\btests/[\w/.*-]*[\w*]", text):
        assert any(ROOT.glob(named)), f"{file} names {named}"
