"""The mark: a test per case, named by regime, failing with the report's lines."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest_plugins = ["pytester"]

RIGHT = """
import pytest
from refimpl.ops import rms_norm_backward, rms_norm_forward, mla_forward, mla_backward

@pytest.fixture
def pair():
    return rms_norm_forward, rms_norm_backward

@pytest.mark.refimpl("rms_norm", examples=2)
def test_norm(pair):
    return pair

class TestAll:
    @pytest.mark.refimpl("rms_norm", examples=1, types=["float32"])
    def test_wrong(self, pair):
        return pair[0], lambda dy, saved: (rms_norm_backward(dy, saved)[0], 0 * saved.w)

def test_plain():
    pass
"""


@pytest.fixture
def here(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A folder of tests with the plugin alone, whether it is installed or not."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makeini("[pytest]\naddopts = -p refimpl.port.pytest_plugin --strict-markers\n")
    return pytester


def test_a_test_per_case(here: pytest.Pytester) -> None:
    here.makepyfile(RIGHT)
    done = here.runpytest("-v", "--color=no")
    out = done.stdout.str()
    assert "::test_norm[many+one_row+" in out or "::test_norm[many" in out, out
    found = done.parseoutcomes()
    assert found["passed"] >= 4
    assert found["failed"] >= 3
    assert "grad/w" in out
    assert "your numbers are those of the planted bug 'dw zero' of rms_norm" in out
    assert "Traceback" not in out
    assert "pytest_plugin.py" not in out
    assert here.runpytest("-q", "-k", "one_row").parseoutcomes()["passed"] >= 1


@pytest.mark.parametrize(
    ("mark", "body", "line"),
    [
        ('"nothing"', "return 1, 2", "mark refimpl: unknown op nothing; there are linear"),
        ('"mla", arrays=1', "return 1, 2", "mark refimpl: .*unexpected keyword argument 'arrays'"),
        ("", "return 1, 2", "mark refimpl: .*missing 1 required positional argument: 'op'"),
        ('"mla"', "return 1, 2", r"test_it must return \(forward, backward\), got \(1, 2\)"),
        ('"mla"', "pass", r"test_it must return \(forward, backward\), got None"),
        ('"mla", types=["int8"]', "return max, min", "types must be among float64, float32"),
    ],
)
def test_what_is_wrong_is_one_line(here: pytest.Pytester, mark: str, body: str, line: str) -> None:
    here.makepyfile(f"import pytest\n\n@pytest.mark.refimpl({mark})\ndef test_it():\n    {body}\n")
    done = here.runpytest("--color=no")
    assert done.ret != 0
    done.stdout.re_match_lines([f".*{line}.*"])
    assert "Traceback" not in done.stdout.str()


def test_nothing_is_imported_without_a_mark(here: pytest.Pytester) -> None:
    """Of refimpl the plugin alone, and not NumPy."""
    here.makepyfile("def test_plain():\n    pass\n")
    code = (
        "import pytest, sys; assert pytest.main(['-q']) == 0; "
        "print(sorted(x for x in sys.modules if x.startswith(('refimpl', 'numpy.'))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=here.path
    )
    last = done.stdout.splitlines()[-1]
    assert last == "['refimpl', 'refimpl.port', 'refimpl.port.pytest_plugin']", done.stdout
