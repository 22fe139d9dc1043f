"""A mark for pytest: a function that returns (forward, backward) becomes a test per drawn case.

    @pytest.mark.refimpl("mla", array=torch.from_dlpack, examples=8)
    def test_mla():
        return my_forward, my_backward

The tests are named by the regimes that each case is the first to meet. Arguments are those of
`refimpl.port.check`. Nothing of refimpl is imported until a mark is found.
"""

from __future__ import annotations

from typing import Any

import pytest

__all__ = ["pytest_configure", "pytest_generate_tests", "pytest_pyfunc_call"]

MARK = "refimpl"
EXAMPLE = "refimpl_example"


def pytest_configure(config: pytest.Config) -> None:
    """Describe the mark."""
    config.addinivalue_line(
        "markers",
        "refimpl(op, *, array=None, examples=5, seed=0, types=(...)): the function returns "
        "(forward, backward) of that op; each drawn case is a test",
    )


def arguments(mark: pytest.Mark) -> dict[str, Any]:
    """The mark's arguments by name; TypeError for others."""

    def named(
        op: str,
        *,
        array: Any = None,
        examples: int = 5,
        seed: int = 0,
        types: Any = ("float64", "float32"),
    ) -> dict[str, Any]:
        return {"op": op, "array": array, "examples": examples, "seed": seed, "types": types}

    return named(*mark.args, **mark.kwargs)


@pytest.fixture
def refimpl_example(request: pytest.FixtureRequest) -> Any:
    """The case of the test."""
    return request.param


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test per case of a marked function."""
    mark = metafunc.definition.get_closest_marker(MARK)
    if mark is None:
        return
    from refimpl.errors import CouldNotRun
    from refimpl.port.functions import examples_of

    try:
        given = arguments(mark)
        examples = examples_of(given["op"], given["examples"], given["seed"])
    except (CouldNotRun, TypeError) as error:
        name = metafunc.definition.nodeid
        raise pytest.Collector.CollectError(f"{name}: mark refimpl: {error}") from None
    metafunc.fixturenames.append(EXAMPLE)
    metafunc.parametrize(EXAMPLE, examples, indirect=True, ids=[x.label for x in examples])


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Compare a case of a marked function; other functions are left to pytest."""
    mark = pyfuncitem.get_closest_marker(MARK)
    if mark is None:
        return None
    from refimpl.errors import CouldNotRun
    from refimpl.port.functions import check_case

    given = arguments(mark)
    own = pyfuncitem._fixtureinfo.argnames
    pair = pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in own})
    if not (isinstance(pair, tuple) and len(pair) == 2 and all(map(callable, pair))):
        said = f"{pyfuncitem.originalname} must return (forward, backward), got {pair!r:.60}"
        pytest.fail(said, pytrace=False)
    try:
        example: Any = pyfuncitem.callspec.params[EXAMPLE]
        result = check_case(example, *pair, array=given["array"], types=given["types"])
    except CouldNotRun as error:
        pytest.fail(str(error), pytrace=False)
    if not result.ok:
        pytest.fail(str(result), pytrace=False)
    return True
