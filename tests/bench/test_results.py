"""Files of results, and the table made of them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from refimpl.bench.results import Results, file_name, line_of, read_results, render, shape_of
from refimpl.bench.rows import ROWS
from refimpl.errors import CouldNotRun
from refimpl.kernels import SOURCE

from bench.examples import results
from bench.sizes import V3


def test_derived_numbers() -> None:
    (row,) = results().rows
    assert row.floor(3.0e12, 8e14) == pytest.approx(39.15e-6, rel=1e-4)
    assert row.share(3.0e12, 8e14) == pytest.approx(0.783, rel=1e-3)
    assert replace(row, flops=8 * 10**11).floor(3.0e12, 8e14) == 1e-3
    assert row.target(3.0e12, 8e14) == pytest.approx(45e-6, rel=1e-3)
    assert row.reached(3.0e12, 8e14) == pytest.approx(0.9, rel=1e-3)
    assert row.target(1.5e12, 8e14) == pytest.approx(90e-6, rel=1e-3)  # half as fast a card
    assert row.reached(1.5e12, 8e14) == pytest.approx(1.8, rel=1e-3)
    without = replace(row, asked=None)
    assert without.target(3.0e12, 8e14) is without.reached(3.0e12, 8e14) is None
    assert row.ratio == pytest.approx(1.25)  # against the faster of the two
    assert replace(row, compiled=None).ratio == pytest.approx(0.25)
    assert replace(row, compiled=None, eager=None).ratio is None


def test_worst_of_the_errors() -> None:
    (row,) = results().rows
    assert (row.error, row.wrong) == (0.32, "")
    wrong = replace(row, errors={"y": 0.9, "dx": 3.25, "dw": float("inf"), "dz": float("nan")})
    assert wrong.wrong == "dx 3.25 times, dw inf times, dz nan times"
    assert math.isnan(wrong.error)


def test_json_round_trip(tmp_path: Path) -> None:
    """What is written is read back; what a hand changed is refused."""
    found = results()
    content = json.loads(json.dumps(found.to_json()))
    assert Results.from_json(content) == found
    assert content["rows"][0]["share"] == pytest.approx(0.783, rel=1e-3)
    for change in (
        lambda c: c["rows"][0].update(share=0.99),
        lambda c: c["rows"][0].update(reached=1.2),
        lambda c: c["rows"][0].update(error=0.1),
        lambda c: c.update(schema=0),
        lambda c: c.pop("commit"),
        lambda c: c["rows"][0]["ours"].pop("low"),
        lambda c: c.update(more=1),
        lambda c: c.update(copy=0.0),
        lambda c: c["rows"][0].pop("notes"),
    ):
        wrong = json.loads(json.dumps(found.to_json()))
        change(wrong)
        with pytest.raises(ValueError, match="results must"):
            Results.from_json(wrong)
    with pytest.raises(ValueError, match="results must have the fields"):
        Results.from_json([])


def leaves(x: Any) -> Iterator[tuple[Any, Any]]:
    """Every value inside, as what holds it and its key."""
    for key in list(x) if isinstance(x, dict) else range(len(x)):
        yield x, key
        if isinstance(x[key], dict | list):
            yield from leaves(x[key])


def test_wrong_types_are_refused() -> None:
    """Each value in turn replaced by one of another type, or one that nobody can have measured."""
    sound = json.dumps(results().to_json())
    tried = 0
    for number in range(len(list(leaves(json.loads(sound))))):
        for value in (-1, "x", [1], {"a": 1}, True, [], 1e999, None, 10**400, {}):
            content = json.loads(sound)
            inside, key = list(leaves(content))[number]
            if type(inside[key]) is type(value):
                continue
            inside[key] = value
            if key in ("eager", "compiled", "eager_peak", "compiled_peak", "notes", "versions"):
                if value in (None, [], {}) and value is not False:
                    continue  # as of a run without
            with pytest.raises(ValueError, match="results must"):
                pytest.fail(f"{key} {value}: {Results.from_json(content)}")
            tried += 1
    assert tried > 250


def test_files(tmp_path: Path) -> None:
    """The latest of each device; a name or a content that is not ours is named."""
    assert (
        file_name("NVIDIA H100 80GB HBM3", "2026-11-30") == "nvidia-h100-80gb-hbm3-2026-11-30.json"
    )
    assert read_results(tmp_path) == []
    for found in (results(), results(date="2026-12-01", peak=1), results("Other")):
        (tmp_path / file_name(found.device, found.date)).write_text(json.dumps(found.to_json()))
    assert read_results(tmp_path) == [results(date="2026-12-01", peak=1), results("Other")]
    (tmp_path / "x.json").write_text(json.dumps(results().to_json()))
    with pytest.raises(ValueError, match=r"x.json: must be called fake-gpu-2-2026-11-30.json"):
        read_results(tmp_path)
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(CouldNotRun, match=r"x\.json is not JSON: "):
        read_results(tmp_path)


def test_table() -> None:
    nothing = render([])
    files, rows = nothing.split("\n\n")
    lines = [line for line in rows.splitlines() if line.startswith("| [")]
    assert len(lines) == len(ROWS)
    assert all("| not measured yet | – | – |" in line for line in lines)
    assert "| 4096 × 7168 | bfloat16 | 4TD = 117 MB |" in lines[0]
    assert {line.count("|") for line in rows.splitlines()} == {16}
    assert {line.count("|") for line in files.splitlines()} == {5}
    kernels = [
        *SOURCE.glob("*.cu"),
        *(path for path in SOURCE.glob("*_numba_cuda.py") if "common" not in path.name),
    ]
    assert sorted(re.findall(r"\]\((.*?)\)", files)) == sorted(path.name for path in kernels)
    assert (
        "| [rms_norm.cu](rms_norm.cu) | sm_80, sm_90, sm_90a, sm_100, sm_120 | float64, float32, "
        "bfloat16 | not yet |" in files
    )
    assert (
        "| [moe_numba_cuda.py](moe_numba_cuda.py) | sm_80, sm_90, sm_90a, sm_100, sm_120 | "
        "float64, float32 | no row |" in files
    )
    some = render([results(), results("Other", compiled=None, eager=None, eager_peak=None)])
    assert (
        "| Fake GPU (2) | 50.0 µs (49.0 µs … 52.0 µs) | 39.1 µs | 78 % | 45.0 µs | 90 % | 200 "
        "µs (190 µs … 210 µs) | 40.0 µs (40.0 µs … 41.0 µs) | 1.25 | 58.7 MB / 1.00 GB / – | 0.32 |"
    ) in some
    assert (
        "| Other | 50.0 µs (49.0 µs … 52.0 µs) | 39.1 µs | 78 % | 45.0 µs | 90 % | – | – | – "
        "| 58.7 MB / – / – | 0.32 |" in some
    )
    assert some.count("not measured yet") == len(ROWS) - 1
    on_both = "RMSNorm forward in bfloat16 on Fake GPU (2), RMSNorm forward in bfloat16 on Other"
    assert f"| float64, float32, bfloat16 | {on_both} |" in some
    assert (
        "Fake GPU (2): its own copy 3.00 TB/s, its bfloat16 product 800 TFLOP/s, driver "
        "580.1, CuPy 14.2" in some
    )
    assert "RMSNorm forward: a note." in some


def test_line() -> None:
    found = results(compiled=None)
    assert line_of(found.rows[0], found) == (
        "RMSNorm forward 4096 × 7168 bfloat16: 50.0 µs (49.0 µs … 52.0 µs), floor 39.1 µs "
        "(4TD), 78 % of it; target 45.0 µs, 90 % of it; torch 200 µs (190 µs … 210 µs); 0.25 x the "
        "best; memory 58.7 MB / 1.00 GB / –; error 0.32 of what is allowed (y); a note"
    )
    found = results(compiled=None, eager=None, asked=None, errors={"y": 0.5, "dx": 0.75})
    assert line_of(found.rows[0], found) == (
        "RMSNorm forward 4096 × 7168 bfloat16: 50.0 µs (49.0 µs … 52.0 µs), floor 39.1 µs "
        "(4TD), 78 % of it; memory 58.7 MB / 1.00 GB / –; error 0.75 of what is allowed (dx); "
        "a note"
    )


def test_shapes_in_words() -> None:
    shapes = {name: shape_of(row, V3) for name, row in ROWS.items()}
    assert shapes["gate top-k"] == "4096 × 256 / 8 / 4 / 8"
    assert shapes["CE forward + backward in place"] == "4096 × 129280"
    assert shapes["AdamW step"] == str(2**28)
