"""FP8 by a formula of its own, and every rounding to the nearest number."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from refimpl.array import Array
from refimpl.checkpoint import Checkpoint, save_checkpoint, write_random
from refimpl.checkpoint.fp8 import dequantise, quantise
from refimpl.fp8 import narrow
from refimpl.parameters import is_buffer

from checkpoint.examples import WIDE, random_parameters


def nearest(x: float, dtype: Any) -> float:
    """The number of a narrow type that is nearest to ``x``, ties to the even bit pattern: a search
    in all of them."""
    bits = np.arange(256 ** np.dtype(dtype).itemsize, dtype=f"u{np.dtype(dtype).itemsize}")
    with np.errstate(invalid="ignore"):  # NaN
        values = bits.view(dtype).astype(np.float64)
        distance = np.where(np.isfinite(values), np.abs(values - x), np.inf)
    best = np.flatnonzero(distance == distance.min())
    even = [i for i in best if bits[i] % 2 == 0]
    return float(values[even[0] if len(best) > 1 else best[0]])


@pytest.mark.parametrize(
    "dtype", [ml_dtypes.bfloat16, np.float16, ml_dtypes.float8_e4m3fn], ids=lambda d: d.__name__
)
@pytest.mark.parametrize("start", [np.float32, np.float64], ids=lambda d: d.__name__)
def test_rounding(dtype: Any, start: Any) -> None:
    """Ties, and numbers just beside a tie, which a step through float32 would round twice."""
    rng = np.random.default_rng(0)
    bits = (
        rng.integers(1, 120, 30).astype("u1")
        if np.dtype(dtype).itemsize == 1
        else rng.integers(1, 31_000, 30)
    )
    bits = bits.astype(f"u{np.dtype(dtype).itemsize}")
    low, high = (
        bits.view(dtype).astype(np.float64),
        (bits + 1).astype(bits.dtype).view(dtype).astype(np.float64),
    )
    tie = (low + high) / 2
    beside = [
        tie,
        tie * (1 + 2.0**-22),
        tie * (1 - 2.0**-22),
        tie * (1 + 2.0**-50),
        tie * (1 - 2.0**-50),
    ]
    x = np.concatenate([rng.normal(size=20), *beside, -tie, -beside[3]]).astype(start)
    assert narrow(x, dtype).astype(np.float64).tolist() == [nearest(float(v), dtype) for v in x]


def test_rounding_twice_would_show() -> None:
    """What ml_dtypes does with float64 by itself is not the nearest number: the test above can
    fail."""
    x = np.array([1 + 2.0**-8 + 2.0**-40])
    assert x.astype(ml_dtypes.bfloat16) == 1
    assert narrow(x, ml_dtypes.bfloat16) == nearest(float(x[0]), ml_dtypes.bfloat16) == 1 + 2.0**-7


def e4m3(byte: int) -> float:
    """The number an E4M3 byte stands for: sign, four bits of exponent with bias 7, three of
    mantissa."""
    sign = byte >> 7
    exponent = byte >> 3 & 15
    mantissa = byte & 7
    size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


def with_fp8(
    folder: Path, names: list[str], scale_dtype: str, block: tuple[int, int]
) -> list[Array]:
    """Replace weights of a bfloat16 checkpoint by random FP8 bytes and scales; what they are, by
    loops over them."""
    rng = np.random.default_rng(0)
    path = folder / "model.safetensors"
    with safe_open(path, "np") as file:
        stored = {key: file.get_tensor(key) for key in list(file.keys())}
    meant = []
    for name in names:
        rows, columns = stored[name].shape
        weight = rng.integers(0, 256, (rows, columns)).astype(np.uint8)
        weight[weight & 127 == 127] = 0  # NaN
        scales = -(-rows // block[0]), -(-columns // block[1])
        if scale_dtype == "F8_E8M0":
            exponent = rng.integers(100, 140, scales).astype(np.uint8)
            stored_scale, factor = (
                exponent.view(ml_dtypes.float8_e8m0fnu),
                2.0 ** (exponent.astype(np.float64) - 127),
            )
        else:
            stored_scale = factor = rng.uniform(1e-4, 1, scales).astype(np.float32)
        stored |= {name: weight.view(ml_dtypes.float8_e4m3fn), name + "_scale_inv": stored_scale}
        product = np.empty((rows, columns))
        for i, j in np.ndindex(rows, columns):
            product[i, j] = e4m3(int(weight[i, j])) * float(factor[i // block[0], j // block[1]])
        meant.append(product)
    save_file(stored, path)
    return meant


@pytest.mark.parametrize("scale_dtype", ["F32", "F8_E8M0"])
@pytest.mark.parametrize("block", [None, (128, 128), (64, 32), (1, 7)])
def test_fp8_by_another_formula(
    scale_dtype: str, block: tuple[int, int] | None, tmp_path: Path
) -> None:
    """number × scale of its block, in float64 exactly and in float32 rounded once; whole, rows, and
    one expert."""
    folder = tmp_path / "a"
    write_random(WIDE, folder)
    if block is not None:
        content = json.loads((folder / "config.json").read_text())
        quantisation = {"quant_method": "fp8", "weight_block_size": list(block)}
        (folder / "config.json").write_text(
            json.dumps(content | {"quantization_config": quantisation})
        )
    names = ["model.layers.0.mlp.gate_proj.weight", "model.layers.1.mlp.experts.5.down_proj.weight"]
    dense, expert = with_fp8(folder, names, scale_dtype, block or (128, 128))
    checkpoint = Checkpoint.open(folder, dtype="float64")
    assert np.array_equal(checkpoint.tensor("model.layers.0.mlp.gate_proj.weight"), dense)
    assert np.array_equal(
        checkpoint.piece("model.layers.0.mlp.gate_proj.weight", [259, 0, 130]), dense[[259, 0, 130]]
    )
    assert np.array_equal(
        checkpoint.piece("model.layers.1.mlp.experts.down_proj.weight", 5), expert
    )
    single = Checkpoint.open(folder).tensor("model.layers.0.mlp.gate_proj.weight")
    assert np.array_equal(single, dense.astype(np.float32))


@pytest.mark.parametrize("ue8m0", [False, True])
def test_quantise(ue8m0: bool) -> None:
    """One scale a block, from its largest number; every number the nearest E4M3 number times it."""
    weight = np.random.default_rng(0).normal(size=(130, 140))
    weight[:128, :128] *= 1e-9  # below the floor of 1e-4
    numbers, scale = quantise(weight, (128, 128), ue8m0=ue8m0)
    assert scale.shape == (2, 2)
    assert scale.dtype == np.float32
    for i, j in np.ndindex(scale.shape):
        rows, columns = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
        part = weight[rows, columns]
        wanted = np.float32(max(np.abs(part).max(), 1e-4)) / np.float32(448)
        if ue8m0:
            assert scale[i, j] / 2 < wanted <= scale[i, j]
            assert np.frexp(scale[i, j])[0] == 0.5
        else:
            assert scale[i, j] == wanted
        got = numbers[rows, columns].astype(np.float64)
        some = [
            (0, 0),
            (1, 1),
            (part.shape[0] - 1, part.shape[1] - 1),
            np.unravel_index(np.abs(part).argmax(), part.shape),
        ]
        for place in some:
            ratio = np.clip(part[place] / float(scale[i, j]), -448, 448)
            assert got[place] == nearest(ratio, ml_dtypes.float8_e4m3fn)


@pytest.mark.parametrize("dtype", ["fp8", "fp8_ue8m0"])
def test_fp8_written_and_read(dtype: str, tmp_path: Path) -> None:
    """Within half a step of E4M3, 1/16 of the number or 2⁻¹⁰ scales; the rest is bfloat16; the
    config says so."""
    params = random_parameters(WIDE, dtype=np.float32)
    save_checkpoint(params, WIDE, tmp_path / "a", dtype=dtype)
    read = Checkpoint.open(tmp_path / "a").load()
    for name, p in params.items():
        if is_buffer(name):
            assert np.array_equal(read[name], p)
        elif "_proj" in name:
            largest = np.abs(p).max() / 448 * 2
            assert (
                np.abs(read[name] - p)
                <= np.maximum(np.abs(p) / 16, largest * 2.0**-10) * (1 + 1e-6)
            ).all(), name
            assert not np.array_equal(read[name], p.astype(ml_dtypes.bfloat16).astype(np.float32))
        else:
            assert np.array_equal(read[name], p.astype(ml_dtypes.bfloat16).astype(np.float32)), name
    quantisation = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    assert quantisation["weight_block_size"] == [128, 128]
    assert quantisation.get("scale_fmt") == ("ue8m0" if dtype == "fp8_ue8m0" else None)


def test_blocks_wider_than_the_weight() -> None:
    """A block of config.json may have any size: the numbers are those of one that just fits, and so
    is the memory."""
    weight = np.arange(6.0).reshape(2, 3).astype(np.float32)
    scale = np.array([[2.0], [3.0]], np.float32)
    wide = np.empty((2, 3))
    fits = np.empty((2, 3))
    rows = np.arange(2)
    tracemalloc.start()
    dequantise(weight, scale, (1, 10**8), rows, wide)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    dequantise(weight, scale, (1, 3), rows, fits)
    assert np.array_equal(wide, fits)
    assert peak < 10**5
