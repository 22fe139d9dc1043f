"""CONTRIBUTING's recipe for an op names every file that an op touches."""

from __future__ import annotations

import re
import subprocess
from fnmatch import fnmatchcase
from pathlib import Path

ROOT = Path(__file__).parents[2]
OP = "rms_norm"  # the example: it has all that an op can have
PROSE = ("derivations/*.md", "docs/notebooks/*.md")  # other pages may speak of the op


def recipe() -> list[str]:
    """The paths in backquotes, patterns among them, with the op in the place of ``<op>``."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    steps = text[text.index("## Add an op") : text.index("## Rules")]
    paths = re.findall(r"`([\w<>*./-]+\.(?:c|cu|json|md|py|safetensors))`", steps)
    return [path.replace("<op>", OP) for path in paths]


def files_of_the_op() -> list[str]:
    """Every tracked file that has the op in its name or in its text."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    files = [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    assert files, f"git ls-files: {listed.stderr}"
    return [x for x in files if OP in x or OP.encode() in (ROOT / x).read_bytes()]


def test_recipe_names_every_file() -> None:
    """Whoever adds an op need not search: what names `rms_norm` is on the list."""
    wanted = [
        file
        for file in files_of_the_op()
        if not any(fnmatchcase(file, pattern) for pattern in PROSE)
        or file == f"derivations/{OP}.md"
    ]
    patterns = recipe()
    missing = [file for file in wanted if not any(fnmatchcase(file, x) for x in patterns)]
    assert missing == [], f"name {OP}, and CONTRIBUTING.md does not name them"


def test_recipe_names_nothing_else() -> None:
    """Every path of the list is that of a file that names the op."""
    files = files_of_the_op()
    stale = [x for x in recipe() if not any(fnmatchcase(file, x) for file in files)]
    assert stale == [], f"stand in CONTRIBUTING.md, and do not name {OP}"
