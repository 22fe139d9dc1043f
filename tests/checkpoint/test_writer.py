"""What is saved comes back bit for bit; a save that fails or is killed leaves nothing half
written."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from refimpl.array import Array
from refimpl.checkpoint import Checkpoint, save_checkpoint, write_random
from refimpl.errors import CouldNotRun
from refimpl.parameters import is_buffer

from checkpoint.examples import TINY, WIDE, files, random_parameters, same


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


@pytest.mark.parametrize(
    "dtype", ["complex128", "complex64", "bool", "int64", "U3", "O", "longdouble"]
)
def test_only_real_floating_point_numbers_are_saved(dtype: str, tmp_path: Path) -> None:
    """Imaginary parts would be dropped, True and "1.0" taken for 1; nothing is written."""
    params = dict(random_parameters(TINY))
    name = next(iter(params))
    params[name] = np.ones(params[name].shape).astype(dtype)
    with pytest.raises(ValueError, match=rf"{name} must be one of float64, .*, got [<a-z]"):
        save_checkpoint(params, TINY, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written(tmp_path: Path) -> None:
    """Where the folder would lie in a file; where no file could hold a tensor."""
    params = random_parameters(TINY)
    (tmp_path / "file").touch()
    with pytest.raises(CouldNotRun, match="file/a can't be written: Not a directory"):
        save_checkpoint(params, TINY, tmp_path / "file" / "a")
    with pytest.raises(CouldNotRun, match="shard_bytes must be at least 1, got 0"):
        save_checkpoint(params, TINY, tmp_path / "a", shard_bytes=0)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_per_tensor(tmp_path: Path) -> None:
    """Where each is larger than a file may be; none is empty."""
    write_random(TINY, tmp_path / "a", dtype="float32", shard_bytes=1)
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == len(index["weight_map"])
    assert {file.name for file in (tmp_path / "a").glob("*.safetensors")} == {
        *index["weight_map"].values()
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


@pytest.mark.parametrize(
    "change", [{"gate": "softmax"}, {"group_score": "max"}, {"gate_bias": False}], ids=str
)
def test_config_without_json(change: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CouldNotRun, match=r"config.json can't express gate="):
        write_random(replace(TINY, **change), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
