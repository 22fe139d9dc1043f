"""Who does what is said in refimpl/conventions and on the page that it writes, and nowhere a second
time: two places would differ one day, as four facts did."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support import PACKAGE, ROOT

PEERS = re.compile(
    r"torchtitan|Megatron|vLLM|SGLang|\bTRL\b|\bverl\b|OpenRLHF|TileKernels"
    r"|(?<![\w-])(?:transformers|vllm|sglang|trl|llama\.cpp)#\d"
)
HOME = PACKAGE / "conventions"
PAGE = ROOT / "derivations" / "conventions.md"
REPORTS = {PACKAGE / "check" / "planted.py"}  # the number of a report beside a bug of its kind
ELSEWHERE = [
    *(p for p in PACKAGE.rglob("*.py") if HOME not in p.parents and p not in REPORTS),
    *(path for path in (ROOT / "derivations").glob("*.md") if path != PAGE),
    *(ROOT / "kernels").glob("*.cu*"),
]


@pytest.mark.parametrize("path", ELSEWHERE, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_peer_is_described_elsewhere(path: Path) -> None:
    text = path.read_text()
    if path == ROOT / "derivations" / "README.md":
        text = text.partition("Code that we compared with:")[0]  # the list of sources
    assert not PEERS.findall(text)


def test_home_describes_them() -> None:
    assert len(PEERS.findall(PAGE.read_text())) > 100
