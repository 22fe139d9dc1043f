"""The published figures come out, the arithmetic shown is the arithmetic done, and the FLOPs are
those that run."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refimpl.checkpoint import read_config
from refimpl.config import PRESETS, ModelConfig, preset
from refimpl.count import Figure, Line, Section, count
from refimpl.errors import CouldNotRun
from refimpl.model import backward, forward
from refimpl.ops import IMPLEMENTATIONS
from refimpl.parameters import init_parameters, is_buffer, parameter_shapes

from checkpoint.examples import V3_JSON


def section(model: str | ModelConfig, title: str, length: int = 4096) -> Section:
    """The table whose title begins so."""
    config = preset(model) if isinstance(model, str) else model
    (found,) = (s for s in count(config, length=length) if s.title.startswith(title))
    return found


def figure(model: str | ModelConfig, title: str, line: str, length: int = 4096) -> float:
    """The value of the first line of that name."""
    return next(x.value for x in section(model, title, length).lines if x.name == line)


ATTENTION = "Parameters of one attention"
FFN = "Parameters of one feed"
MAIN = "Parameters of the main"
MTP = "Parameters of multi"
ACTIVE = "Active"
CACHE = "KV cache of a token"
CLAIM = 'KV cache: the "93.3 %"'
FORWARD = "Forward"
BACKWARD = "Backward"
TRAINING = "Training"


@pytest.mark.parametrize(
    ("model", "title", "line", "value"),
    [
        ("v3", ATTENTION, "one attention", 187_107_328),
        ("v3", FFN, "dense FFN: gate, up, down", 396_361_728),
        ("v3", FFN, "one expert: gate, up, down", 44_040_192),
        ("v3", FFN, "gate (router)", 1_835_008),
        ("v3", FFN, "MoE layer: routed + shared, gate", 11_320_164_352),
        ("v3", MAIN, "embedding", 926_679_040),
        ("v3", MAIN, "output head", 926_679_040),
        ("v3", MAIN, "main model", 671_026_404_352),
        ("v3", MAIN, "apart: gate biases (buffers)", 14_848),
        ("v3", CACHE, "MLA, a layer: latent + rotated key", 576),
        ("v3", CACHE, "MHA, a layer: keys N, values V wide", 2 * 128 * 128),
        ("v3", CACHE, "MLA", 70_272),
        ("v3", CLAIM, "DeepSeek-67B: GQA, 16 bits a number", 389_120),
        ("v3", CLAIM, "V2: MLA, 6 bits", 25_920),
        ("v3", TRAINING, "pre-training, 14.8 × 10¹² tokens", 2_664_000),
        ("v3", TRAINING, "context extension, published", 119_000),
        ("v3", TRAINING, "post-training, published", 5_000),
        ("v3", TRAINING, "in all", 2_788_000),
        ("v3", TRAINING, "pre-training, at $2 an hour", 5_328_000),
        ("v3", TRAINING, "context extension, at $2 an hour", 238_000),
        ("v3", TRAINING, "post-training, at $2 an hour", 10_000),
        ("v3", TRAINING, "in all, at $2 an hour", 5_576_000),
    ],
)
def test_exact_figures(model: str, title: str, line: str, value: int) -> None:
    """Counts of the DeepSeek-V3 report, exactly."""
    found = figure(model, title, line)
    assert found == value
    assert isinstance(found, int)


@pytest.mark.parametrize(
    ("model", "title", "line", "printed"),
    [
        ("v3", MTP, "unique to MTP", "11.610B"),
        ("v3", MTP, "… without eh_proj", "11.507B"),
        ("v3", MTP, "… with copies of embedding and head", "13.46B"),
        ("v3", MTP, "whole file: main, MTP, biases", "684.49B"),
        ("v3", ACTIVE, "layers", "35.70B"),
        ("v3", ACTIVE, "… + head", "36.63B"),
        ("v3", ACTIVE, "… + head + embedding", "37.55B"),
        ("v3", ACTIVE, "an MTP module with both, no eh_proj", "2.4B"),  # README_WEIGHTS
        ("v2-lite", MAIN, "main model", "15.706B"),
        ("v2-lite", ACTIVE, "… + head", "2.45B"),  # "without embedding"
        ("v2", MAIN, "main model", "235.74B"),
        ("v2", ACTIVE, "… + head + embedding", "21.4B"),
        ("moonlight-16b", MAIN, "main model", "15.960B"),
        ("moonlight-16b", MAIN, "… without embedding and head", "15.29B"),  # Moonlight's own table
        ("moonlight-16b", ACTIVE, "layers", "2.24B"),
        (
            "v3",
            BACKWARD,
            "apart: both, main, no recomputation",
            "250B",
        ),  # GFLOPs a token, 2505.09343 table 2
        ("v2", BACKWARD, "apart: both, main, no recomputation", "155B"),
    ],
)
def test_rounded_figures(model: str, title: str, line: str, printed: str) -> None:
    """What reports and model cards print, at the precision that they print."""
    places = len(printed.rstrip("B").partition(".")[2])
    assert f"{figure(model, title, line) / 1e9:.{places}f}B" == printed


def test_files_in_fp8() -> None:
    """Kimi-K2's released file has 1,026,470,731,056 numbers in 1,029,173,256,720 bytes, by its
    index and headers as published: ours, and 56 rotary frequencies of two bytes per layer."""
    assert figure("v3", MTP, "… with them") == 684_531_386_000
    config = preset("kimi-k2")
    scales = figure(config, MAIN, "apart: scales of its FP8 weights")
    assert (scales, figure(config, MAIN, "… with them")) == (62_495_192, 1_026_470_727_640)
    assert 1_026_470_727_640 + config.layers * 56 == 1_026_470_731_056
    sizes = {name: prod(shape) for name, shape in parameter_shapes(config).items()}
    assert sum(sizes.values()) + scales == 1_026_470_727_640
    biases = sum(n for name, n in sizes.items() if is_buffer(name))
    fp8 = sum(n for name, n in sizes.items() if "_proj" in name)  # experts, networks, attention
    others = sum(sizes.values()) - biases - fp8 + config.layers * 56
    assert fp8 + 2 * others + 4 * (biases + scales) == 1_029_173_256_720
    for other in (preset("glm-4.7-flash"), replace(config, experts=256)):
        assert not any("FP8" in line.name for s in count(other) for line in s.lines)


def test_cache_savings() -> None:
    """98.24 % against MHA; 93.34 % of V2 at 6 bits against 67B at 16, of which 82.2 % (V3: 81.9 %)
    are MLA's."""
    assert round(figure("v3", CACHE, "saved against MHA"), 2) == 98.24
    lines = section("v3", CLAIM).lines
    saved = {
        lines[i - 1].name: round(line.value, 2)
        for i, line in enumerate(lines)
        if line.name == "saved"
    }
    assert saved == {"V2: MLA, 6 bits": 93.34, "V2: MLA, 16 bits": 82.24, "V3: MLA, 16 bits": 81.94}
    assert [line.name for line in section("v2", CLAIM).lines if line.name.startswith("V3")] == []


def test_training_figures() -> None:
    assert (
        round(figure("v3", TRAINING, "days for them on 2,048 H800s"), 1) == 3.7
    )  # the V3 report's
    assert (
        round(figure("v2", TRAINING, "hours saved against DeepSeek-67B"), 1) == 42.5
    )  # the V2 report's
    rate = figure("v3", TRAINING, "implied: rate of a GPU")
    assert rate == pytest.approx(250.457382912e9 * 14.8e12 / (2_664_000 * 3600) / 1e12)
    assert figure("v3", TRAINING, "implied: of its dense BF16 peak") == pytest.approx(rate / 9.894)
    for model in ("v2-lite", "moonlight-16b"):
        assert "no GPU-hours" in section(model, TRAINING).notes[-1]
    assert not [s for s in count(preset("tiny")) if s.title == TRAINING]


@pytest.mark.parametrize("name", PRESETS)
def test_totals_are_those_of_the_tensors(name: str) -> None:
    """The lines add up to what `parameter_shapes` holds, whatever the model has or lacks."""
    cases = [
        preset(name),
        replace(preset(name), dense_layers=0),
        replace(preset(name), mtp_depth=0, shared_experts=0),
    ]
    for config in [*cases, replace(preset(name), dense_layers=preset(name).layers)]:
        sizes = {key: prod(shape) for key, shape in parameter_shapes(config).items()}
        modules = tuple(f"model.layers.{config.layers + k}." for k in range(config.mtp_depth))
        unique = sum(
            n
            for key, n in sizes.items()
            if modules and key.startswith(modules) and not is_buffer(key)
        )
        total = sum(n for key, n in sizes.items() if not is_buffer(key)) - unique
        assert figure(config, MAIN, "main model") == total
        routed = sum(
            n
            for key, n in sizes.items()
            if ".experts." in key and not key.startswith(modules or "none")
        )
        active = figure(config, ACTIVE, "… + head + embedding")
        assert active == total - routed + routed * config.top_k // config.experts
        if modules:
            assert figure(config, MTP, "unique to MTP") == unique
            copies = 2 * config.mtp_depth * sizes["lm_head.weight"]
            assert (
                figure(config, MTP, "whole file: main, MTP, biases") == sum(sizes.values()) + copies
            )


def evaluated(arithmetic: str) -> float:
    """The value of a line's arithmetic, read as Python."""
    assert re.fullmatch(r"[\d.,e+ ×−/()]+", arithmetic)
    return float(eval(arithmetic.replace(",", "").replace("×", "*").replace("−", "-")))


@pytest.mark.parametrize("length", [3, 4096])
@pytest.mark.parametrize("name", PRESETS)
def test_the_arithmetic_shown_is_the_arithmetic_done(name: str, length: int) -> None:
    """Every line's arithmetic, evaluated from its text, gives its value; every sum is that of the
    lines above."""
    for table in count(preset(name), length=length):
        for i, line in enumerate(table.lines):
            if above := re.fullmatch(r"sum of the (\d+) above", line.arithmetic):
                assert line.value == sum(x.value for x in table.lines[i - int(above[1]) : i])
            elif line.arithmetic:
                assert evaluated(line.arithmetic) == pytest.approx(line.value, rel=1e-5), line


def test_figures_put_parentheses_where_they_must() -> None:
    two = Figure(2)
    cases = {
        (two * 3 + 1) * 7168: "(2 × 3 + 1) × 7,168",
        two - (two + 3): "2 − (2 + 3)",
        two / (two * 5): "2 / (2 × 5)",
        two * (two - 1) / 4: "2 × (2 − 1) / 4",
        (two + 1) / 2: "(2 + 1) / 2",
        two - two * 3: "2 − 2 × 3",
        two * (two / 4): "2 × 2 / 4",
        two * 0.5: "2 × 0.5",
    }
    for shown, text in cases.items():
        assert shown.text == text
        assert evaluated(text) == shown.value
    assert (two * 1).text == (Figure(1) * 2).text == (two / 1).text == "2"
    assert [Figure(x).text for x in (1234.5678, 1234567.8)] == ["1,234.57", "1,234,568"]
    assert isinstance((two * 4 / 2).value, int)


def test_lines_as_text() -> None:
    assert (Line("", "", 671_026_404_352, "").text, Line("", "", 671_026_404_352, "").short) == (
        "671,026,404,352",
        "671.026B",
    )
    assert (Line("", "", 5_576_000, "$").text, Line("", "", 5_576_000, "$").short) == (
        "$5,576,000",
        "$5.576M",
    )
    assert (Line("", "", 98.2421875, "%").text, Line("", "", 98.2421875, "%").short) == (
        "98.24 %",
        "",
    )
    assert (
        Line("", "", 83_485_794_304, "FLOP").text,
        Line("", "", 83_485_794_304, "FLOP").short,
    ) == ("83,485,794,304 FLOP", "83.486G")
    assert Line("", "", 6_961_724_416, "B").short == "6.962G"  # bytes, not billions
    assert Line("", "", 37 * 10**23, "FLOP").text == "3.7000e+24 FLOP"


@pytest.fixture
def multiplied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """FLOPs of every ``numpy.matmul`` from now on: 2 for each entry of the result and summed
    index."""
    flops: list[int] = []
    matmul = np.matmul

    def counting(a: Any, b: Any) -> Any:
        y = matmul(a, b)
        flops.append(2 * y.size * a.shape[-1])
        return y

    monkeypatch.setattr(np, "matmul", counting)
    return flops


@pytest.mark.parametrize("implementation", ["reference", "flash", "absorbed"])
@pytest.mark.parametrize(
    "change", [{}, {"mtp_depth": 0}, {"q_latent": None, "shared_experts": 0, "dense_layers": 0}]
)
@pytest.mark.parametrize("length", [5, 13])
def test_flops_are_those_that_run(
    length: int, change: dict[str, Any], implementation: str, multiplied: list[int]
) -> None:
    """The tiny model's matrix products, forward and backward, against the count: exactly, per
    sequence.

    The code multiplies hidden pairs too (and masks them), so those are added here, by counting them
    one by one. Its fused head multiplies once more in the backward; attention does so only where it
    keeps no probabilities.
    """
    c = replace(preset("tiny"), **change)
    absorbed, flash = implementation == "absorbed", implementation == "flash"
    once, again = c.nope + c.rope + c.value, c.nope + c.rope
    if absorbed:
        once = 2 * c.kv_latent + c.rope
    lengths = [length] * c.layers + [length - k for k in range(1, c.mtp_depth + 1)]
    hidden = sum(q < k for n in lengths for q in range(n) for k in range(n))
    seen = sum(q >= k for n in lengths for q in range(n) for k in range(n))
    total = "with MTP" if c.mtp_depth else "main model"

    params = init_parameters(c, std=0.1, dtype="float64")
    tokens = np.random.default_rng(0).integers(0, c.vocabulary, (1, length))
    _, saved = forward(params, tokens, c, ops=IMPLEMENTATIONS[implementation])
    ran = sum(multiplied)
    counted = length * figure(c, FORWARD, total, length)
    if absorbed:  # the modules' share too, which has no line of its own
        counted += 2 * c.heads * seen * (once - (c.nope + c.rope + c.value))
    assert ran == pytest.approx(counted + 2 * c.heads * hidden * once, rel=1e-12)

    multiplied.clear()
    backward(saved)
    head = (
        2 * c.width * c.vocabulary * (length + sum(length - k for k in range(1, c.mtp_depth + 1)))
    )
    if flash:
        counted = length * figure(c, BACKWARD, total, length)
        hidden_work = 2 * c.heads * hidden * (2 * once + again)
    else:
        counted, hidden_work = 2 * counted, 2 * c.heads * hidden * 2 * once
    assert sum(multiplied) == pytest.approx(counted + hidden_work + head, rel=1e-12)


def test_absorbed_line() -> None:
    """The absorbed form's pairs, counted one by one."""
    c, length = preset("tiny"), 7
    pairs = sum(q >= k for q in range(length) for k in range(length))
    wanted = 2 * c.layers * c.heads * (2 * c.kv_latent + c.rope) * pairs / length
    assert figure(c, FORWARD, "apart: attention, absorbed", length) == wanted
    naive = figure(c, FORWARD, "attention, naive: q·k, p·v", length)
    assert figure(c, FORWARD, "apart: absorbed over naive", length) == pytest.approx(wanted / naive)


def test_recomputation_is_half_a_forward_at_equal_widths() -> None:
    """Attention's backward is 2.5 × its forward where q, k and v are equally wide, 2.6 × in V3."""
    names = "attention, naive: q·k, p·v", "attention, naive, q·k recomputed"
    equal = replace(preset("v3"), nope=64, rope=64, value=128)
    for config, ratio in ((equal, 2.5), (preset("v3"), 2.6)):
        assert figure(config, BACKWARD, names[1]) / figure(config, FORWARD, names[0]) == ratio


@pytest.mark.parametrize("length", [-1, 0, 2, 10**10])
def test_bad_length(length: int) -> None:
    with pytest.raises(CouldNotRun, match=f"^length must lie in 3…1,000,000,000, got {length:,}"):
        count(preset("tiny"), length=length)


def test_tied_head_counts_once(tmp_path: Path) -> None:
    (file := tmp_path / "config.json").write_text(
        json.dumps(V3_JSON | {"tie_word_embeddings": True})
    )
    config = read_config(file)
    assert (
        figure(config, "Parameters of the main model", "main model")
        == 671_026_404_352 - 926_679_040
    )
    shapes = parameter_shapes(config)
    assert "lm_head.weight" not in shapes
    assert set(parameter_shapes(preset("v3"))) - set(shapes) == {"lm_head.weight"}
