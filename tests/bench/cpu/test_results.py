"""The file, the table's lines, and the curves' figures and pictures."""

from __future__ import annotations

import json
from typing import Any
from xml.etree import ElementTree

import pytest

from refimpl.bench.cpu.columns import COLUMNS
from refimpl.bench.cpu.growth import exponent, growth_of
from refimpl.bench.cpu.plot import COLOURS, svg_of
from refimpl.bench.cpu.results import HEAD, Cell, CpuResults, Measured, doubts, lines_of
from refimpl.bench.measure import Times

SVG = "{http://www.w3.org/2000/svg}"


def cell(seconds: float, peak: int | None = 10**6) -> Cell:
    return Cell(Times(seconds, 0.9 * seconds, 1.2 * seconds), 20, peak, 3e-7, "q", 0.5)


def row(name: str, x: int = 0, flops: int = 0, **changed: Any) -> Measured:
    columns = changed.pop("columns", {"reference": cell(2.0), "torch": cell(1.0)})
    return Measured(name, "shape", flops, x, columns, **changed)


def results(*rows: Measured) -> CpuResults:
    return CpuResults("A CPU", 2, [0, 1], "2026-11-28", "abc", {"numpy": "2"}, 1e11, 0.0, [*rows])


def test_ratio_is_against_the_fastest_eager_torch() -> None:
    columns = {"reference": cell(3.0), "hf-eager": cell(4.0), "hf-grouped_mm": cell(2.0)}
    found = row("moe", columns=columns | {"hf-compile": cell(1.0), "jax": cell(0.5)})
    assert (found.best, found.ratio("reference"), found.ratio("hf-compile")) == (2.0, 1.5, 0.5)
    alone = row("moe", columns={"reference": cell(3.0)})
    assert alone.best is alone.ratio("reference") is None


def test_json() -> None:
    found = results(row("attention-512", 512, 10**11), row("swiglu", busy=0.3, notes=("n",)))
    content = json.loads(json.dumps(found.to_json()))
    first, second = content["rows"]
    assert (content["schema"], content["device"], content["threads"]) == (1, "A CPU", 2)
    assert (first["group"], first["floor"], second["floor"]) == ("attention", 1.0, None)
    assert first["columns"]["reference"]["times"] == {"median": 2.0, "low": 1.8, "high": 2.4}
    assert (first["columns"]["reference"]["ratio"], first["columns"]["reference"]["share"]) == (
        2,
        0.5,
    )
    assert doubts(found) == ["swiglu"]
    assert found.group_names == ["attention", "ops"]


def test_rate_is_the_fastest() -> None:
    rows = [row("moe", rate=3e11), row("linear", rate=2e11), row("swiglu")]
    assert results().rate == 1e11
    assert results(*rows).rate == results(*rows).to_json()["rate"] == 3e11
    assert results(rows[2]).rate == 1e11


def test_lines() -> None:
    columns = {"reference": cell(2e-3, None), "torch": cell(1e-3), "jax": cell(5e-4)}
    lines = lines_of(row("attention-512", 512, 10**8, columns=columns), 1e11)
    assert lines[0] == (
        *("reference", "2.00 ms (1.80 ms … 2.40 ms)", "2.00", "50 %"),
        *("–", "3.0e-07", ""),
    )
    assert lines[1][:4] == ("torch *", "1.00 ms (900 µs … 1.20 ms)", "1.00", "100 %")
    assert lines[2][4:] == ("1.00 MB", "3.0e-07", "500 ms")
    assert {len(line) for line in lines} == {len(HEAD)}
    (line,) = lines_of(row("swiglu", columns={"reference": cell(1.0)}), 1e11)
    assert line[2:4] == ("–", "–")


def test_exponents() -> None:
    assert exponent([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2)
    points = (512, 1024, 2048)
    rows = [
        row(
            f"attention-{x}",
            x,
            columns={"reference": cell(1e-9 * x**2, 5 * x), "jax": cell(1.0, None)},
        )
        for x in points
    ]
    found = {(g.column, g.what): g.value for g in growth_of("attention", rows)}
    assert found == {
        ("reference", "time, exponent of positions"): pytest.approx(2),
        ("reference", "memory, exponent of positions"): pytest.approx(1),
        ("jax", "time, exponent of positions"): pytest.approx(0),
    }
    assert growth_of("attention", rows[:2]) == []
    assert growth_of("ops", [row("swiglu")]) == []


def test_growth_of_experts_and_skew() -> None:
    """Of experts less the writing of their gradients."""
    rows = [
        row("experts-8", 8, columns={"numba_cpu": cell(1.0)}, write=0.1),
        row("experts-256", 256, columns={"numba_cpu": cell(4.5)}, write=3.6),
    ]
    (found,) = growth_of("experts", rows)
    assert found.column == "numba_cpu"
    assert found.what.startswith("time, 8 → 256 experts")
    assert found.value == pytest.approx(1.0)
    skew = {"skew-balanced": 2.0, "skew-zipf": 2.2, "skew-one-hot": 3.0}
    rows = [row(name, columns={"flash": cell(x)}) for name, x in skew.items()]
    assert [(g.what, g.value) for g in growth_of("skew", rows)] == [
        ("time, zipf ÷ balanced", pytest.approx(1.1)),
        ("time, one-hot ÷ balanced", 1.5),
    ]
    assert growth_of("skew", rows[1:]) == []


def test_picture() -> None:
    """Two panels with a line per column that has numbers; higher numbers stand higher."""
    rows = [
        row(f"attention-{x}", x, columns={"reference": cell(x / 1000), "torch": cell(1e-3, None)})
        for x in (512, 1024, 8192)
    ]
    picture = ElementTree.fromstring(svg_of("attention", rows, "a < b & c"))
    lines = picture.findall(f"{SVG}polyline")
    assert [x.get("stroke") for x in lines] == [
        COLOURS[n] for n in ("reference", "torch", "reference")
    ]
    heights = [float(point.split(",")[1]) for point in lines[0].get("points", "").split()]
    assert heights == sorted(heights, reverse=True)
    texts = [x.text for x in picture.findall(f"{SVG}text")]
    assert {"a < b & c", "8,192", "reference", "torch", "1 ms", "memory by positions"} <= set(texts)
    assert set(COLOURS) == set(COLUMNS)
