"""Settings: every type, from a file, from overrides and options; what is refused; the round trip
through TOML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl.errors import CouldNotRun
from refimpl.train.settings import (
    NAMES,
    check_types,
    expect_setting,
    make_settings,
    possible,
    read_tables,
    to_toml,
    toml_value,
)
from refimpl.train.stages import STAGES

from support import FULL


@dataclass(frozen=True)
class Settings:
    steps: int = 10
    rate: float = 0.5
    name: str = ""
    tidy: bool = False
    kinds: tuple[str, ...] = ("add2",)
    factors: tuple[int, ...] = ()
    range: tuple[float, ...] = ()
    model: Mapping[str, Any] = field(default_factory=dict)
    loss: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_types(self)


def made(*overrides: str, tables: dict[str, Any] | None = None, **options: Any) -> Settings:
    return make_settings(Settings, "sft", tables or {}, overrides, options)


OVERRIDES = {
    "steps=20": Settings(steps=20),
    "steps = 20": Settings(steps=20),
    "rate=1": Settings(rate=1.0),
    "rate=1e-3": Settings(rate=1e-3),
    "name=word": Settings(name="word"),
    "name=runs/base-1": Settings(name="runs/base-1"),
    'name="1"': Settings(name="1"),
    "name=": Settings(name=""),
    "name=a = b": Settings(name="a = b"),
    "name=1\ny = 2": Settings(name="1\ny = 2"),  # TOML of two names is not one value
    "tidy=true": Settings(tidy=True),
    "kinds=['add2', 'base']": Settings(kinds=("add2", "base")),
    "factors=[]": Settings(factors=()),
    "factors=[4, 16]": Settings(factors=(4, 16)),
    "range=[0, 1.5]": Settings(range=(0.0, 1.5)),
    "model={width = 32, gate = 'softmax'}": Settings(model={"width": 32, "gate": "softmax"}),
    "model.width=32": Settings(model={"width": 32}),
    "loss.clip.low=0.1": Settings(loss={"clip": {"low": 0.1}}),
    "loss.clip=[0.8, 1.2]": Settings(loss={"clip": [0.8, 1.2]}),
}


@pytest.mark.parametrize("override", OVERRIDES)
def test_overrides(override: str) -> None:
    found = made(override)
    assert found == OVERRIDES[override]
    assert [type(x) for x in vars(found).values()] == [type(x) for x in vars(Settings()).values()]
    assert all(type(x) is float for x in (found.rate, *found.range))


def test_order() -> None:
    """The file, then overrides in their order, then options; what a file gave stays as it was."""
    tables = {"sft": {"steps": 1, "rate": 2, "model": {"width": 8, "heads": 2}}}
    found = made("steps=3", "steps=4", "model.width=32", tables=tables, name="x")
    assert found == Settings(4, 2.0, "x", model={"width": 32, "heads": 2})
    assert tables == {"sft": {"steps": 1, "rate": 2, "model": {"width": 8, "heads": 2}}}
    assert made("steps=3", steps=5).steps == 5


WRONG = {
    "step=3": "sft has no setting step; there are factors, kinds, loss, model, name, range, rate, "
    "steps, tidy",
    "steps=1.5": "steps must be an integer, got 1.5",
    "steps=true": "steps must be an integer, got True",
    "steps=many": "steps must be an integer, got 'many'",
    "steps=[1]": "steps must be an integer, got [1]",
    "steps={a = 1}": "steps must be an integer, got {'a': 1}",
    "rate=fast": "rate must be a number, got 'fast'",
    "rate=false": "rate must be a number, got False",
    "rate=nan": "rate must be finite, got nan",
    "rate=-inf": "rate must be finite, got -inf",
    "range=[0, inf]": "range must be finite, got inf",
    "loss.a=nan": "loss.a must be finite, got nan",
    "loss.a.b=[1, [inf]]": "loss.a.b must be finite, got inf",
    "loss.a=1979-05-27": "loss.a must be a number, text, list or table, got "
    "datetime.date(1979, 5, 27)",
    "name=3": "name must be a text, got 3",
    "name=\udc80": r"name must be Unicode, got '\udc80'",
    "loss.\udc80=1": r"loss must be Unicode, got '\udc80'",
    "tidy=1": "tidy must be true or false, got 1",
    "kinds=add2": "kinds must be a list whose entries are each a text, got 'add2'",
    "kinds=[1]": "kinds must be a list whose entries are each a text, got (1,)",
    "factors=[1.5]": "factors must be a list whose entries are each an integer, got (1.5,)",
    "model=mini": "model must be a table, got 'mini'",
    "steps": "set_ must be name=value, got 'steps'",
    "=3": "set_ must be name=value, got '=3'",
    "steps.x=3": "steps must be an integer, got {'x': 3}",
}


@pytest.mark.parametrize("override", WRONG)
def test_refused(override: str) -> None:
    with pytest.raises(CouldNotRun) as error:
        made(override)
    assert str(error.value) == WRONG[override]


def test_too_large() -> None:
    """An integer that no float holds, and lists that nest without end."""
    with pytest.raises(CouldNotRun, match="rate must be a number, got 1000"):
        made("rate=1" + 400 * "0")
    with pytest.raises(CouldNotRun, match="kinds must be a list"):
        made("kinds=" + 10_000 * "[")
    with pytest.raises(CouldNotRun, match="name a table's entry"):
        made("steps.x=3", tables={"steps": 1})


def test_files(tmp_path: Path) -> None:
    """A table per stage, of which others are left alone; or the settings of one stage, whose tables
    are not taken for stages; never both."""
    path = tmp_path / "settings.toml"
    path.write_text("[sft]\nsteps = 3\n[sft.loss]\na = 1\n[grpo]\nquestions = 4\n")
    assert made(tables=read_tables(path)) == Settings(3, loss={"a": 1})
    assert make_settings(Settings, "distil", read_tables(path)) == Settings()
    path.write_text("steps = 3\n[loss]\na = 1\n")
    assert made(tables=read_tables(path)) == Settings(3, loss={"a": 1})
    path.write_text("[pretrain]\nsteps = 3\n")
    with pytest.raises(CouldNotRun, match=r"^sft has no setting pretrain; there are factors"):
        made(tables=read_tables(path))
    for text in ("steps = 3\n[sft]\nrate = 1\n", "[sft]\nrate = 1\n[pretrain]\n", "sft = 3\n"):
        path.write_text(text)
        with pytest.raises(CouldNotRun, match="a table per stage must hold nothing else, got"):
            made(tables=read_tables(path))
    assert read_tables(None) == {}


def test_names() -> None:
    assert set(NAMES) == set(STAGES)


@pytest.mark.parametrize(
    ("content", "why"),
    [(b"steps = ", "is not TOML"), (b"x = " + 5000 * b"[", "is not TOML"), (b"\xff", "UTF-8")],
)
def test_unreadable(tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "settings.toml"
    path.write_bytes(content)
    with pytest.raises(CouldNotRun, match=why):
        read_tables(path)
    with pytest.raises(CouldNotRun, match="can't be read: No such file"):
        read_tables(tmp_path / "other.toml")


NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = st.recursive(
    st.integers(-(2**63), 2**63) | NUMBERS | TEXTS | st.booleans(),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(TEXTS, x, max_size=3),
    max_leaves=6,
)


@hypothesis.settings(max_examples=500 if FULL else 40)
@given(
    st.builds(
        Settings,
        st.integers(),
        NUMBERS,
        TEXTS,
        st.booleans(),
        st.lists(TEXTS, max_size=3).map(tuple),
        st.lists(st.integers(), max_size=3).map(tuple),
        st.lists(NUMBERS, max_size=3).map(tuple),
        st.dictionaries(TEXTS, VALUES, max_size=3),
        st.dictionaries(TEXTS, VALUES, max_size=3),
    )
)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, settings: Settings) -> None:
    """What is written beside a result makes the same settings, to the last bit, whatever they are;
    a text per line, so that two files can be compared by line."""
    path = tmp_path_factory.getbasetemp() / "round_trip.toml"
    path.write_bytes(to_toml({"sft": settings}).encode())
    assert made(tables=read_tables(path)) == settings
    assert to_toml({"sft": made(tables=read_tables(path))}) == to_toml({"sft": settings})
    assert len(path.read_bytes().split(b"\n")) == 2 + len(vars(settings))


def test_written() -> None:
    """Tables in the order of their names: the same settings are the same text."""
    assert toml_value({"b": (1, 0.1), "a c": {}}) == '{ "a c" = {}, b = [1, 0.1] }'
    assert toml_value("\x7f\n\u00e9\U0001f600") == '"\\u007f\\n\u00e9\U0001f600"'


@pytest.mark.parametrize("stage", STAGES)
def test_stages(stage: str, tmp_path: Path) -> None:
    """The defaults of every stage are of their types, and go through a file."""
    kind = STAGES[stage].settings
    path = tmp_path / "settings.toml"
    path.write_text(to_toml({stage: kind()}))
    assert make_settings(kind, stage, read_tables(path)) == kind()


def test_helpers() -> None:
    expect_setting(True, "steps", "be even", 3)
    with pytest.raises(CouldNotRun, match=r"^steps must be even, got 3$"):
        expect_setting(False, "steps", "be even", 3)
    with pytest.raises(CouldNotRun, match=r"^impossible settings: top_k must"), possible():
        raise ValueError("top_k must be at most 4, got 99")
