"""Checkpoints: released names and sizes, round trips bit for bit, FP8 by a formula of its own,
memory, atomicity."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from refimpl.array import Array
from refimpl.checkpoint import Checkpoint, read_config, save_checkpoint, write_random
from refimpl.checkpoint.config_json import config_dict
from refimpl.checkpoint.fp8 import narrow, quantise
from refimpl.checkpoint.names import abbreviate, copied_names, stored_tensors
from refimpl.checkpoint.writer import _entries, _scales
from refimpl.config import CONVENTIONS, PRESETS, ModelConfig, preset
from refimpl.errors import CouldNotRun
from refimpl.model import is_buffer, parameter_shapes

ROOT = Path(__file__).parents[1]
TINY = preset("tiny")

# The tensors of deepseek-ai/DeepSeek-R1's 163 files (V3's are the same), as tools that read their
# headers list them: name, shape, type, how many. Embedding and head are there twice.
RELEASED = """
lm_head.weight 129280×7168 BF16 1
model.embed_tokens.weight 129280×7168 BF16 1
model.layers.#.input_layernorm.weight 7168 BF16 62
model.layers.#.post_attention_layernorm.weight 7168 BF16 62
model.layers.#.self_attn.q_a_proj.weight 1536×7168 F8_E4M3 62
model.layers.#.self_attn.q_a_proj.weight_scale_inv 12×56 F32 62
model.layers.#.self_attn.q_a_layernorm.weight 1536 BF16 62
model.layers.#.self_attn.q_b_proj.weight 24576×1536 F8_E4M3 62
model.layers.#.self_attn.q_b_proj.weight_scale_inv 192×12 F32 62
model.layers.#.self_attn.kv_a_proj_with_mqa.weight 576×7168 F8_E4M3 62
model.layers.#.self_attn.kv_a_proj_with_mqa.weight_scale_inv 5×56 F32 62
model.layers.#.self_attn.kv_a_layernorm.weight 512 BF16 62
model.layers.#.self_attn.kv_b_proj.weight 32768×512 F8_E4M3 62
model.layers.#.self_attn.kv_b_proj.weight_scale_inv 256×4 F32 62
model.layers.#.self_attn.o_proj.weight 7168×16384 F8_E4M3 62
model.layers.#.self_attn.o_proj.weight_scale_inv 56×128 F32 62
model.layers.#.mlp.gate_proj.weight 18432×7168 F8_E4M3 3
model.layers.#.mlp.gate_proj.weight_scale_inv 144×56 F32 3
model.layers.#.mlp.up_proj.weight 18432×7168 F8_E4M3 3
model.layers.#.mlp.up_proj.weight_scale_inv 144×56 F32 3
model.layers.#.mlp.down_proj.weight 7168×18432 F8_E4M3 3
model.layers.#.mlp.down_proj.weight_scale_inv 56×144 F32 3
model.layers.#.mlp.gate.weight 256×7168 BF16 59
model.layers.#.mlp.gate.e_score_correction_bias 256 F32 59
model.layers.#.mlp.experts.#.gate_proj.weight 2048×7168 F8_E4M3 15104
model.layers.#.mlp.experts.#.gate_proj.weight_scale_inv 16×56 F32 15104
model.layers.#.mlp.experts.#.up_proj.weight 2048×7168 F8_E4M3 15104
model.layers.#.mlp.experts.#.up_proj.weight_scale_inv 16×56 F32 15104
model.layers.#.mlp.experts.#.down_proj.weight 7168×2048 F8_E4M3 15104
model.layers.#.mlp.experts.#.down_proj.weight_scale_inv 56×16 F32 15104
model.layers.#.mlp.shared_experts.gate_proj.weight 2048×7168 F8_E4M3 59
model.layers.#.mlp.shared_experts.gate_proj.weight_scale_inv 16×56 F32 59
model.layers.#.mlp.shared_experts.up_proj.weight 2048×7168 F8_E4M3 59
model.layers.#.mlp.shared_experts.up_proj.weight_scale_inv 16×56 F32 59
model.layers.#.mlp.shared_experts.down_proj.weight 7168×2048 F8_E4M3 59
model.layers.#.mlp.shared_experts.down_proj.weight_scale_inv 56×16 F32 59
model.layers.#.eh_proj.weight 7168×14336 BF16 1
model.layers.#.enorm.weight 7168 BF16 1
model.layers.#.hnorm.weight 7168 BF16 1
model.layers.#.embed_tokens.weight 129280×7168 BF16 1
model.layers.#.shared_head.head.weight 129280×7168 BF16 1
model.layers.#.shared_head.norm.weight 7168 BF16 1
model.norm.weight 7168 BF16 1
"""


def random_parameters(
    config: ModelConfig, seed: int = 0, dtype: Any = np.float64
) -> dict[str, Array]:
    """Every parameter random, norms and biases too."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(0.3, 1, shape).astype(np.float32 if is_buffer(name) else dtype)
        for name, shape in parameter_shapes(config).items()
    }


def same(a: dict[str, Array], b: dict[str, Array]) -> bool:
    return list(a) == list(b) and all(
        a[n].dtype == b[n].dtype and a[n].tobytes() == b[n].tobytes() for n in a
    )


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_released_tensors() -> None:
    """Written in FP8, the preset v3 has the names, shapes, types and numbers of the released files,
    all 91,991."""
    released: Counter[tuple[str, ...]] = Counter()
    for line in RELEASED.strip().splitlines():
        *key, count = line.split(" ")
        released[tuple(key)] = int(count)
    entries = list(_entries(preset("v3"), "fp8"))
    entries += [_scales(entry) for entry in entries if entry.dtype == "F8_E4M3"]
    ours = Counter(
        (re.sub(r"\b\d+\b", "#", e.name), "×".join(map(str, e.shape)), e.dtype) for e in entries
    )
    assert ours == released
    assert len(entries) == len({entry.name for entry in entries}) == 91_991
    assert sum(prod(entry.shape) for entry in entries) == 684_531_386_000
    assert sum(entry.spec.bytes for entry in entries) == 688_574_839_360


@pytest.mark.parametrize("name", ["v3", "v2", "v2-lite", "moonlight-16b", "tiny"])
def test_names_are_a_bijection(name: str) -> None:
    """Every parameter is made of tensors of its own, which hold as many numbers; no copy has a
    tensor's name."""
    config = preset(name)
    stored, shapes = stored_tensors(config), parameter_shapes(config)
    assert Counter(
        {
            ours: sum(prod(s) for o, _, s in stored.values() if o == ours)
            for ours in list(shapes)[:40]
        }
    ) == {ours: prod(shape) for ours, shape in list(shapes.items())[:40]}
    assert {ours for ours, _, _ in stored.values()} == set(shapes)
    assert sum(prod(shape) for _, _, shape in stored.values()) == sum(map(prod, shapes.values()))
    assert not stored.keys() & copied_names(config).keys()


@pytest.mark.parametrize("shard_bytes", [1, 9_000, 10**9])
@pytest.mark.parametrize(
    ("dtype", "numpy"),
    [
        ("bfloat16", ml_dtypes.bfloat16),
        ("float16", np.float16),
        ("float32", np.float32),
        ("float64", np.float64),
    ],
)
def test_round_trip(dtype: str, numpy: Any, shard_bytes: int, tmp_path: Path) -> None:
    """Numbers that the stored type holds come back bit for bit; biases in float32 always; the
    config comes back."""
    memory = "float64" if dtype == "float64" else "float32"
    params = {
        name: p if is_buffer(name) else p.astype(numpy).astype(memory)
        for name, p in random_parameters(TINY).items()
    }
    save_checkpoint(params, TINY, tmp_path / "a", dtype=dtype, shard_bytes=shard_bytes)
    checkpoint = Checkpoint.open(tmp_path / "a", dtype=memory)
    assert same(checkpoint.load(), params)
    assert checkpoint.names == list(params)
    assert checkpoint.config == TINY
    assert json.loads((tmp_path / "a" / "config.json").read_text())["torch_dtype"] == dtype
    save_checkpoint(checkpoint.load(), TINY, tmp_path / "b", dtype=dtype, shard_bytes=shard_bytes)
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()
    }


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "fp8", "fp8_ue8m0"])
def test_safetensors_reads_the_files(dtype: str, tmp_path: Path) -> None:
    """The library finds every tensor, aligned, where the index says; a file is no larger than asked
    for."""
    write_random(TINY, tmp_path / "a", dtype=dtype, shard_bytes=25_000)
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "a").glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{n + 1:05}-of-{len(files):05}.safetensors" for n in range(len(files))
    ]
    total, names = 0, set()
    for file in files:
        raw = file.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:start])
        assert start % 8 == 0
        assert header.pop("__metadata__") == {"format": "pt"}
        size = {"F32": 4, "BF16": 2, "F8_E4M3": 1}
        assert all(
            (start + entry["data_offsets"][0]) % size[entry["dtype"]] == 0
            for entry in header.values()
        )
        assert len(raw) - start <= 25_000
        with safe_open(file, "np") as opened:
            assert set(opened.keys()) == set(header)
            assert all(index["weight_map"][name] == file.name for name in header)
        total, names = total + len(raw) - start, names | set(header)
    assert names == set(index["weight_map"])
    assert total == index["metadata"]["total_size"]


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
    sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
    size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


WIDE = replace(
    TINY, width=150, kv_latent=131, dense_hidden=260, layers=2, mtp_depth=0
)  # blocks cut off at the edges


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


@pytest.mark.parametrize("dtype", ["float32", "fp8"])
def test_many_chunks(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Converted a few rows at a time, as large tensors are, the files and what is read of them stay
    the same."""
    config = replace(WIDE, vocabulary=700, mtp_depth=1)
    params = random_parameters(config, dtype=np.float32)
    save_checkpoint(params, config, tmp_path / "a", dtype=dtype)
    whole = Checkpoint.open(tmp_path / "a").load()
    monkeypatch.setattr("refimpl.checkpoint.writer.CHUNK", 1)
    monkeypatch.setattr("refimpl.checkpoint.reader.CHUNK", 1000)
    save_checkpoint(params, config, tmp_path / "b", dtype=dtype)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    checkpoint = Checkpoint.open(tmp_path / "b")
    assert same(checkpoint.load(), whole)
    rows = np.random.default_rng(0).integers(0, 700, (3, 50))
    embedding = whole["model.embed_tokens.weight"]
    assert np.array_equal(checkpoint.piece("model.embed_tokens.weight", rows), embedding[rows])
    raw = bytearray((tmp_path / "b" / "model.safetensors").read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    end = json.loads(raw[8:start])["model.layers.2.embed_tokens.weight"]["data_offsets"][1]
    raw[start + end - 1] ^= 1
    (tmp_path / "b" / "model.safetensors").write_bytes(raw)
    with pytest.raises(CouldNotRun, match=r"model.layers.2.embed_tokens.weight .* row 699 differs"):
        Checkpoint.open(tmp_path / "b")


INDICES = [
    0,
    -1,
    3,
    slice(None),
    slice(1, 5),
    slice(0, 0),
    slice(None, None, -2),
    [3, 1, 1],
    np.array([[0, 2], [5, 4]]),
]


@pytest.mark.parametrize("index", INDICES, ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "fp8"])
def test_piece(index: Any, dtype: str, tmp_path: Path) -> None:
    """The same as indexing the whole tensor, for vectors, matrices and stacked experts."""
    write_random(TINY, tmp_path / "a", dtype=dtype, std=1.0)
    checkpoint = Checkpoint.open(tmp_path / "a")
    for name in checkpoint.names:
        got, wanted = checkpoint.piece(name, index), checkpoint.tensor(name)[index]
        assert got.dtype == wanted.dtype == np.float32
        assert got.shape == wanted.shape
        assert np.array_equal(got, wanted), name


def test_only_what_is_asked_for_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening reads gate biases and copies; an expert is one tensor of the file, rows of the
    embedding these rows."""
    write_random(TINY, tmp_path / "a")
    read: list[tuple[str, int]] = []
    original = Checkpoint._read

    def counted(self: Checkpoint, name: str, rows: Array, out: Array) -> None:
        read.append((name, len(rows)))
        original(self, name, rows, out)

    monkeypatch.setattr(Checkpoint, "_read", counted)
    checkpoint = Checkpoint.open(tmp_path / "a", mtp=False)
    assert {name.split(".")[-1] for name, _ in read} == {"e_score_correction_bias"}
    read.clear()
    checkpoint = Checkpoint.open(tmp_path / "a")
    heads = (
        "lm_head.weight",
        "shared_head.head.weight",
        "embed_tokens.weight",
        "e_score_correction_bias",
    )
    assert all(name.endswith(heads) for name, _ in read)
    read.clear()
    checkpoint.piece("model.layers.2.mlp.experts.up_proj.weight", 6)
    checkpoint.piece("model.embed_tokens.weight", [[7, 7], [200, 3]])
    assert read == [
        ("model.layers.2.mlp.experts.6.up_proj.weight", 9),
        ("model.embed_tokens.weight", 4),
    ]


MEASURE = """
import sys, threading, time
import numpy as np
from refimpl.checkpoint import Checkpoint

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

done, peak = threading.Event(), [0]
def watch():
    while not done.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.0005)
watcher = threading.Thread(target=watch)
watcher.start()
before = anonymous()
params = Checkpoint.open(sys.argv[1]).load()
if sys.argv[2] == "twice":
    params |= {name: p.copy() for name, p in params.items() if "experts" in name}
    other = [p.astype(np.float64) for p in params.values()]
done.set(); watcher.join()
peak[0] = max(peak[0], anonymous())
sizes = [p.nbytes for p in params.values()]
print(peak[0] - before, sum(sizes), max(sizes))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
@pytest.mark.parametrize("dtype", ["bfloat16", "fp8"])
def test_memory_of_loading(dtype: str, tmp_path: Path) -> None:
    """30 million parameters into float32: at most 1.15 × the arrays and the largest of them, mapped
    pages left out."""
    config = replace(TINY, width=512, vocabulary=4096, expert_hidden=640, layers=4, mtp_depth=0)
    write_random(config, tmp_path / "a", dtype=dtype, shard_bytes=2 * 10**7)

    def measure(how: str) -> tuple[float, float]:
        command = [sys.executable, "-c", MEASURE, str(tmp_path / "a"), how]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peak, target, largest = map(int, done.stdout.split())
        assert target > 1.2e8
        return peak, 1.15 * target + largest

    peak, bound = measure("once")
    assert peak <= bound
    if (
        dtype == "bfloat16"
    ):  # the measure sees what it should: the same with a second copy breaks the bound
        peak, bound = measure("twice")
        assert peak > bound


def test_a_killed_save_leaves_nothing_half(tmp_path: Path) -> None:
    """Killed within the second file: the place is still free, and the checkpoint beside it
    whole."""
    write_random(TINY, tmp_path / "old")
    before = files(tmp_path / "old")
    code = (
        "import os, sys; from refimpl.checkpoint import writer; from refimpl.config import preset\n"
        "original, calls = writer._chunks, []\n"
        "def killed(*args, **kwargs):\n"
        "    calls.append(0)\n"
        "    if len(calls) == 60: os.kill(os.getpid(), 9)\n"
        "    return original(*args, **kwargs)\n"
        "writer._chunks = killed\n"
        "writer.write_random(preset('tiny'), sys.argv[1], shard_bytes=20_000)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "new")], capture_output=True, text=True
    )
    assert done.returncode == -9, done.stderr
    left = sorted(path.name for path in tmp_path.iterdir())
    assert len(left) == 2
    assert re.fullmatch(r"new\.[0-9a-f]{16}\.partial", left[0])
    assert left[1] == "old"
    assert files(tmp_path / "old") == before
    assert len(list((tmp_path / left[0]).iterdir())) >= 2
    write_random(TINY, tmp_path / "new")
    assert files(tmp_path / "new") == before


def test_a_failed_save_leaves_nothing(tmp_path: Path) -> None:
    params = random_parameters(TINY, dtype=np.float32)
    params["model.layers.2.mlp.gate.weight"][0, 0] = 1e6
    with pytest.raises(
        CouldNotRun, match=r"model.layers.2.mlp.gate.weight has numbers that F16 can't hold: 1e\+06"
    ):
        save_checkpoint(params, TINY, tmp_path / "a", dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    write_random(TINY, tmp_path / "a")
    before = files(tmp_path)
    for place in ("a", "a/config.json", "a/model.safetensors"):
        with pytest.raises(CouldNotRun, match="exists and is not an empty folder"):
            write_random(TINY, tmp_path / place, seed=1)
    assert files(tmp_path) == before
    (tmp_path / "empty").mkdir()
    write_random(TINY, tmp_path / "empty")
    write_random(TINY, tmp_path / "some" / "new" / "place")
    assert (
        files(tmp_path / "empty")
        == files(tmp_path / "a")
        == files(tmp_path / "some" / "new" / "place")
    )


@pytest.mark.parametrize(
    ("change", "dtype", "message"),
    [
        (
            {"model.norm.weight": np.full(20, 3.4e38)},
            "bfloat16",
            "model.norm.weight has numbers that BF16 can't hold",
        ),
        (
            {"model.norm.weight": np.full(20, 1e39)},
            "float32",
            "model.norm.weight has numbers that F32 can't hold",
        ),
        (
            {"model.layers.1.mlp.gate.e_score_correction_bias": np.full(8, np.nan)},
            "float32",
            "must be finite",
        ),
        ({"model.layers.0.mlp.up_proj.weight": np.full((22, 20), np.inf)}, "fp8", "must be finite"),
        (
            {},
            "int8",
            "dtype must be one of float64, float32, float16, bfloat16, fp8, fp8_ue8m0, got int8",
        ),
    ],
    ids=["bfloat16", "float32", "bias", "fp8", "dtype"],
)
def test_what_can_not_be_saved(
    change: dict[str, Array], dtype: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(CouldNotRun, match=message):
        save_checkpoint(random_parameters(TINY) | change, TINY, tmp_path / "a", dtype=dtype)
    assert list(tmp_path.iterdir()) == []


def test_saving_wrong_parameters(tmp_path: Path) -> None:
    params = random_parameters(TINY) | {"extra": np.zeros(3), "model.norm.weight": np.zeros(19)}
    del params["lm_head.weight"]
    with pytest.raises(
        ValueError,
        match=r"lm_head.weight is missing; model.norm.weight must have shape \(20,\).*extra",
    ):
        save_checkpoint(params, TINY, tmp_path / "a")


def test_infinity_and_nan_survive(tmp_path: Path) -> None:
    """Outside FP8 and biases they are numbers like others: a broken checkpoint stays visibly
    broken."""
    params = random_parameters(TINY, dtype=np.float32)
    params["model.norm.weight"][:3] = np.inf, -np.inf, np.nan
    save_checkpoint(params, TINY, tmp_path / "a", dtype="float16")
    read = Checkpoint.open(tmp_path / "a").tensor("model.norm.weight")
    assert np.array_equal(read[:3], params["model.norm.weight"][:3], equal_nan=True)


def test_made_up_numbers(tmp_path: Path) -> None:
    """The same whatever the type and the shards; other with another seed; norms around 1, biases
    not all alike."""
    write_random(TINY, tmp_path / "a", dtype="float32", std=0.1)
    write_random(TINY, tmp_path / "b", dtype="bfloat16", std=0.1, shard_bytes=5_000)
    write_random(TINY, tmp_path / "c", dtype="float32", std=0.1, seed=1)
    a, b, c = (Checkpoint.open(tmp_path / name).load() for name in "abc")
    for name, x in a.items():
        rounded = x if is_buffer(name) else x.astype(ml_dtypes.bfloat16).astype(np.float32)
        assert np.array_equal(b[name], rounded)
        assert not np.array_equal(c[name], x)
        assert abs(x.mean() - ("norm.weight" in name)) < 0.2
        assert x.std() > 0.02
    experts = a["model.layers.1.mlp.experts.up_proj.weight"]
    assert not np.array_equal(experts[0], experts[1])


def test_mtp_left_out(tmp_path: Path) -> None:
    """mtp=False: the config has no MTP, its tensors are neither missing nor unexpected; the rest is
    the same."""
    write_random(TINY, tmp_path / "a")
    whole, main = Checkpoint.open(tmp_path / "a"), Checkpoint.open(tmp_path / "a", mtp=False)
    assert main.config == replace(TINY, mtp_depth=0)
    assert main.names == list(parameter_shapes(main.config))
    assert same(main.load(), {name: whole.tensor(name) for name in main.names})
    content = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(
        json.dumps(content | {"num_nextn_predict_layers": 0})
    )
    assert same(Checkpoint.open(tmp_path / "a", mtp=False).load(), main.load())
    with pytest.raises(
        CouldNotRun,
        match=r"model.layers.3…4.enorm.weight \(2 tensors\) is not a tensor of this config",
    ):
        Checkpoint.open(tmp_path / "a")


def test_tied_head(tmp_path: Path) -> None:
    """Saved without a head; a head that equals the embedding may be there."""
    config = replace(TINY, tied=True, mtp_depth=1)
    params = random_parameters(config, dtype=np.float32)
    save_checkpoint(params, config, tmp_path / "a", dtype="float32")
    assert same(Checkpoint.open(tmp_path / "a").load(), params)
    with safe_open(tmp_path / "a" / "model.safetensors", "np") as file:
        names = list(file.keys())
    assert "lm_head.weight" not in names
    assert "model.layers.3.shared_head.head.weight" in names
    untied = params | {"lm_head.weight": params["model.embed_tokens.weight"]}
    save_checkpoint(untied, replace(config, tied=False), tmp_path / "b", dtype="float32")
    (tmp_path / "b" / "config.json").write_bytes((tmp_path / "a" / "config.json").read_bytes())
    assert same(Checkpoint.open(tmp_path / "b").load(), params)


def test_conventions(tmp_path: Path) -> None:
    """The caller's, but for the layout of rotated pairs, which is the file's if it is not the usual
    one."""
    halves = replace(TINY, conventions=replace(TINY.conventions, rope_layout="halves"))
    write_random(TINY, tmp_path / "a")
    write_random(halves, tmp_path / "b")
    for conventions in CONVENTIONS.values():
        opened = Checkpoint.open(tmp_path / "a", conventions=conventions).config
        assert opened == replace(TINY, conventions=conventions)
        opened = Checkpoint.open(tmp_path / "b", conventions=conventions).config
        assert opened == replace(TINY, conventions=replace(conventions, rope_layout="halves"))


def configs() -> Iterator[ModelConfig]:
    yield from PRESETS.values()
    yield replace(
        TINY, yarn=None, tied=True, shared_experts=0, normalise_weights=False, theta=12345.678
    )
    yield replace(preset("v2"), q_latent=None, yarn=TINY.yarn, dense_layers=60)
    yield replace(TINY, conventions=replace(TINY.conventions, rope_layout="halves"), norm_eps=1 / 3)


@pytest.mark.parametrize("config", list(configs()), ids=range(8))
@pytest.mark.parametrize("scales", [None, "float32", "ue8m0"])
def test_config_round_trip(config: ModelConfig, scales: str | None, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(config_dict(config, dtype="bfloat16", scales=scales))
    )
    assert read_config(tmp_path / "config.json") == config


@pytest.mark.parametrize(
    "change", [{"gate": "softmax"}, {"group_score": "max"}, {"gate_bias": False}], ids=str
)
def test_config_without_json(change: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CouldNotRun, match=r"no config.json stands for gate="):
        write_random(replace(TINY, **change), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_abbreviate() -> None:
    """Names that differ in numbers alone are one; other names, other faults stay apart; hundreds
    end in a count."""
    experts = [
        (f"model.layers.3.mlp.experts.{n}.gate_proj.weight", "is missing") for n in range(64)
    ]
    assert (
        abbreviate(experts)
        == "model.layers.3.mlp.experts.0…63.gate_proj.weight (64 tensors) is missing"
    )
    layers = [(f"model.layers.{n}.mlp.gate.weight", "is missing") for n in (4, 2)]
    assert abbreviate(
        [*layers, ("model.norm.weight", "is missing"), ("model.norm.weight", "is round")]
    ) == (
        "model.layers.2…4.mlp.gate.weight (2 tensors) is missing; model.norm.weight is missing; "
        "model.norm.weight is round"
    )
    many = abbreviate((f"name{chr(97 + n)}", "is missing") for n in range(20))
    assert many.endswith("namek is missing; and 9 more like these")
    assert "\n" not in abbreviate([("a\nb\x00\u2028\ud800", "is missing")])


def test_the_page() -> None:
    """derivations/checkpoints.md lists every tensor once, with the shape that the map gives, in
    letters and for V3."""
    page = (ROOT / "derivations" / "checkpoints.md").read_text()
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]+) \| ([^|]+) \| ([^|]+) \|", page, re.M)
    config = preset("v3")
    c = config
    letters = {
        "W": c.vocabulary,
        "D": c.width,
        "H": c.heads,
        "N": c.nope,
        "R": c.rope,
        "V": c.value,
        "A": c.q_latent,
        "C": c.kv_latent,
        "E": c.experts,
        "F": c.dense_hidden,
        "Fe": c.expert_hidden,
        "Fs": c.expert_hidden * c.shared_experts,
    }
    stored = {
        re.sub(r"\b\d+\b", "#", name): shape
        for name, (_, _, shape) in stored_tensors(config).items()
    }
    untouched = replace(config, q_latent=None)
    stored |= {
        re.sub(r"\b\d+\b", "#", name): shape
        for name, (_, _, shape) in stored_tensors(untouched).items()
    }
    copies = {
        re.sub(r"\b\d+\b", "#", name): stored[ours] for name, ours in copied_names(config).items()
    }
    listed: dict[str, tuple[int, ...]] = {}
    for name, shape, numbers, _ in rows:
        name = re.sub(r"\b[LN]\b", "#", name)
        assert name not in listed, name
        written = shape.strip("[] ").split(", ")
        listed[name] = tuple(eval(part.replace("·", "*"), {}, letters) for part in written)
        assert numbers.strip() == "×".join(map(str, listed[name])), name
    assert listed == stored | copies
    quantised = {
        re.sub(r"\b\d+\b", "#", e.name) for e in _entries(config, "fp8") if e.dtype == "F8_E4M3"
    }
    quantised |= {"model.layers.#.self_attn.q_proj.weight"}
    assert {
        re.sub(r"\b[LN]\b", "#", name) for name, _, _, kind in rows if kind.strip() == "FP8"
    } == quantised
