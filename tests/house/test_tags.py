"""Tags of equations: defined once in a derivation, cited where they are implemented."""

from __future__ import annotations

import re

import pytest

from support import PACKAGE, ROOT, STEMS

TAG = r"[a-z_]+\.\d+"
OTHER = ("splits", "fp8", "parallel")
IN_KERNELS = {"mla_absorbed.9": "mla_decode.cu"}  # equations that a kernel alone implements


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
    for tag, kernel in IN_KERNELS.items():
        assert f"// ({tag})" in (ROOT / "kernels" / kernel).read_text()
        assert tag not in cited
    assert set(defined) == cited | {tag for tag in IN_KERNELS if tag.startswith(f"{stem}.")}
    assert {tag.split(".")[0] for tag in defined} == {stem}


def test_no_stray_tags() -> None:
    """No file cites a tag of an op that does not exist."""
    for path in PACKAGE.rglob("*.py"):
        for tag in re.findall(rf"# \(({TAG})\)", path.read_text()):
            assert tag.split(".")[0] in [*STEMS, *OTHER], f"{path.name} cites {tag}"


@pytest.mark.parametrize("stem", OTHER)
def test_tags_of_other_pages(stem: str) -> None:
    """Of pages that derive no op: their equations are cited where the package has them."""
    page = (ROOT / "derivations" / f"{stem}.md").read_text()
    code = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    defined = re.findall(rf"\\tag\{{({stem}\.\d+)\}}", page)
    assert sorted(defined) == sorted(set(re.findall(rf"# \(({stem}\.\d+)\)", code)))


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
