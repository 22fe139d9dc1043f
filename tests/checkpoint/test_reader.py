"""A checkpoint is read a piece at a time, no more than was asked for, within the memory of its
arrays."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from refimpl.array import Array
from refimpl.checkpoint import Checkpoint, save_checkpoint, write_random
from refimpl.checkpoint.config_json import ARCHITECTURES
from refimpl.checkpoint.files import content_fingerprint
from refimpl.config import CONVENTIONS
from refimpl.errors import CouldNotRun
from refimpl.parameters import parameter_shapes

from checkpoint.examples import TINY, same
from golden.checkpoint_values import LEFT
from random_parameters import random_parameters

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


def variant(folder: Path, changes: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    """A checkpoint of these tensors, with the left-padded one's config.json changed."""
    folder.mkdir()
    content = json.loads((LEFT / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(content))
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_other_model_types(tmp_path: Path) -> None:
    """The same tensors under each name of the architecture are the same parameters; an indexer's
    are left out."""
    stored = load_file(LEFT / "model.safetensors")
    wanted = Checkpoint.open(LEFT, mtp=False).load()
    indexer = {
        f"model.layers.{layer}.self_attn.indexer.{name}": np.ones((2, 2), np.float32)
        for layer in range(3)
        for name in ("wq_b.weight", "k_norm.bias")
    }
    for kind, more in {
        "kimi_k2": {},
        "glm4_moe_lite": {},
        "deepseek_v32": {"index_topk": 16},
        "glm_moe_dsa": {"index_topk": 16},
    }.items():
        changes = {"model_type": kind, "architectures": [ARCHITECTURES[kind]], **more}
        tensors = stored | (indexer if more else {})
        checkpoint = Checkpoint.open(variant(tmp_path / kind, changes, tensors), mtp=False)
        assert same(checkpoint.load(), wanted)
        assert checkpoint.config.index_topk == more.get("index_topk")
    with pytest.raises(CouldNotRun, match=r"indexer.* is not a tensor of this config"):
        Checkpoint.open(variant(tmp_path / "v3", {}, stored | indexer), mtp=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fused_experts(dtype: str, tmp_path: Path) -> None:
    """All experts of a layer in two tensors, as transformers 5 may save them, are those one by one;
    a piece is read alone."""
    stored = {
        name: x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
        for name, x in load_file(LEFT / "model.safetensors").items()
    }
    wanted = Checkpoint.open(variant(tmp_path / "apart", {}, stored), mtp=False)
    fused = {name: x for name, x in stored.items() if ".experts." not in name}
    for layer in (1, 2):
        experts = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            np.stack([stored[f"{experts}.{expert}.{part}_proj.weight"] for expert in range(8)])
            for part in ("gate", "up", "down")
        )
        fused[f"{experts}.gate_up_proj"] = np.concatenate((gate, up), axis=1)
        fused[f"{experts}.down_proj"] = down
    checkpoint = Checkpoint.open(variant(tmp_path / "fused", {}, fused), mtp=False)
    assert same(checkpoint.load(), wanted.load())
    name = "model.layers.2.mlp.experts.up_proj.weight"
    assert np.array_equal(checkpoint.piece(name, 5), wanted.tensor(name)[5])
    fused["model.layers.1.mlp.experts.down_proj"] = down[:7]
    with pytest.raises(CouldNotRun, match=r"experts\.down_proj is not a tensor of this config"):
        Checkpoint.open(variant(tmp_path / "short", {}, fused), mtp=False)


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


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_bytes(dtype: str, tmp_path: Path) -> None:
    """Those of the tensors in the files, whatever they are read as."""
    write_random(TINY, tmp_path / "a", dtype="float32")
    files = [load_file(path) for path in (tmp_path / "a").glob("*.safetensors")]
    stored = sum(x.nbytes for file in files for x in file.values())
    assert Checkpoint.open(tmp_path / "a", dtype=dtype).bytes == stored


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


def test_fingerprint(tmp_path: Path) -> None:
    """A copy has the same; another number, header, name or config.json another one, in one file and
    in shards."""
    params = random_parameters(TINY)
    for place, shard in (("one", 10**9), ("shards", 20_000)):
        folder = tmp_path / place
        save_checkpoint(params, TINY, folder, shard_bytes=shard)
        found = content_fingerprint(folder)
        copy = shutil.copytree(folder, tmp_path / f"{place} copied")
        os.utime(copy / "config.json", (0, 0))
        assert content_fingerprint(copy) == found
        (copy / "notes.safetensors").write_bytes(b"another file")
        assert content_fingerprint(copy) == found
        files = sorted(file for file in copy.iterdir() if file.name in os.listdir(folder))
        for file in [file for file in files if "index" not in file.name]:
            data = file.read_bytes()
            for changed in (data[:-1] + bytes([data[-1] ^ 1]), data[:9] + b" " + data[10:]):
                file.write_bytes(changed)
                assert content_fingerprint(copy) != found, file
            file.write_bytes(data)
        assert content_fingerprint(copy) == found
    large = tmp_path / "large"
    shutil.copytree(tmp_path / "one", large)
    with (large / "model.safetensors").open("r+b") as file:
        file.truncate(2**34)  # sparse: read whole, it would take minutes
    assert content_fingerprint(large) != found
