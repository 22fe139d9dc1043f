"""One stem, four places: every op has its page, its test, its cases; every module has its test."""

from __future__ import annotations

import re
from pathlib import Path

from refimpl import ops
from refimpl.check.cases import CASES, REGIMES

from support import NOT_OPS, PACKAGE, ROOT, STEMS

TESTS = ROOT / "tests"
TESTED_ELSEWHERE = {  # a module, or a folder of them, without a test file: what tests it instead
    "__main__": "every process that tests/support.py starts",
    "bench/cpu/columns": "tests/bench/cpu/test_rows.py",
    "bench/cpu/growth": "tests/bench/cpu/test_results.py",
    "bench/cpu/ours": "tests/bench/cpu/test_problems.py",
    "bench/cpu/plot": "tests/bench/cpu/test_results.py",
    "bench/device": "make gpu; what it hands on, tests/bench on pretended devices",
    "bench/words": "tests/bench/test_results.py, and that of the CPU",
    "check/cases": "tests/ops: each op's property test draws from them and misses no regime",
    "checkpoint/files": "tests/checkpoint/test_malformed.py",
    "checkpoint/source": "tests/grads, from memory, and tests/cli/test_grads.py, from files",
    "cli/inputs": "tests/cli/test_grads.py and test_generate.py: each kind of file",
    "conventions/examples": "tests/conventions/test_traps.py: the numbers of every trap",
    "grads/rounded": "tests/grads/test_units.py: bfloat16's units, and the rounding itself",
    "errors": "an exception, which the tests of messages raise",
    "grads/request": "tests/cli/test_grads.py: what can't be asked for; tests/grads: what can",
    "grads/result": "tests/grads/test_steps.py: the model's loss, routes and loads",
    "parallel/group": "tests/parallel/test_ranks.py, test_launch.py: under MPI",
    "port/foreign": "tests/port/test_functions.py: arrays that know DLPack alone, and what raises",
    "port/table": "tests/cli/test_verify.py: tables and files of somebody's functions",
    "port/vector_cases": "tests/port/test_vectors.py: every case, its bytes and what it excludes",
    "verify": "tests/cli/test_verify.py",
}


TESTED_ELSEWHERE |= {
    f"kernels/cpu/{path.stem}": "tests/kernels/cpu/test_column.py: every op, and the optimizer"
    for path in (PACKAGE / "kernels" / "cpu").glob("[!_]*.py")
    if path.stem not in ("compile", "pool", "stored")
}


def modules() -> dict[str, str]:
    """Each module of the package, as ops/moe, and the test file that it should have."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        folder = path.parent.relative_to(PACKAGE).as_posix()
        if path.stem != "__init__":
            place = Path(folder, f"test_{path.stem}.py")
            found[path.relative_to(PACKAGE).with_suffix("").as_posix()] = place.as_posix()
    return found


def excused(module: str) -> str | None:
    """The entry of TESTED_ELSEWHERE that a module falls under."""
    places = [module, *(parent.as_posix() for parent in Path(module).parents)]
    return next((place for place in places if place in TESTED_ELSEWHERE), None)


def test_one_stem_four_places() -> None:
    """Every op has a derivation, a test, cases with regimes, and an exported pair; and none of
    these lacks an op."""
    pages = {path.stem for path in (ROOT / "derivations").glob("*.md")} - NOT_OPS
    tests = {path.stem.removeprefix("test_") for path in (TESTS / "ops").glob("test_*.py")}
    assert set(STEMS) == pages == set(CASES) == set(REGIMES)
    assert set(STEMS) <= tests
    for stem in STEMS:
        assert callable(getattr(ops, f"{stem}_forward"))
        assert callable(getattr(ops, f"{stem}_backward"))


def test_every_module_has_its_test() -> None:
    """refimpl/<folder>/<stem>.py is tested by tests/<folder>/test_<stem>.py, or by what the list
    above says. A folder's tests may also be one file, tests/test_<folder>.py."""
    for module, place in modules().items():
        whole = TESTS / f"test_{Path(place).parent}.py"
        assert excused(module) or (TESTS / place).exists() or whole.exists(), (
            f"tests/{place} is missing"
        )


def test_no_excuse_is_stale() -> None:
    """Each entry of the list names modules, and none of them has a test file of its own."""
    for entry in TESTED_ELSEWHERE:
        places = [place for module, place in modules().items() if excused(module) == entry]
        assert places, f"refimpl/{entry} does not exist"
        assert not [place for place in places if (TESTS / place).exists()], entry


def test_no_test_twice() -> None:
    """Two tests of one name in a file: the second would hide the first."""
    for path in TESTS.rglob("test_*.py"):
        names = re.findall(r"^def (test_\w+)\(", path.read_text(), re.M)
        assert len(names) == len(set(names)), path.name
