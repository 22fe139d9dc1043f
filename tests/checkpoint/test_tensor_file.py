"""One safetensors file, written a piece at a time and read back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from refimpl.checkpoint.tensor_file import Spec, TensorWriter, read_tensor_file, write_tensor_file
from refimpl.errors import CouldNotRun

RNG = np.random.default_rng(5)


def test_tensor_files(tmp_path: Path) -> None:
    """Written in any order and piece by piece, safetensors reads it; what is missing is an error
    and leaves nothing."""
    path, beside = tmp_path / "x.safetensors", tmp_path / "beside"
    a, b = RNG.normal(size=(5, 3)), RNG.integers(0, 9, (4,))
    specs = {
        "b": Spec(b.shape, b.dtype),
        "a": Spec(a.shape, a.dtype),
        "zero": Spec((2, 2), np.dtype("float32")),
    }
    with TensorWriter(path, beside, specs, {"notes": "n"}) as writer:
        writer.write("a", a[3:], 9)
        writer.zero("zero")
        writer.write("b", b)
        writer.write("a", np.asfortranarray(a[:3]))
        assert not path.exists()
    assert not beside.exists()
    found, wanted = load_file(path), {"a": a, "b": b, "zero": np.zeros((2, 2), np.float32)}
    ours, metadata = read_tensor_file(path)
    assert metadata == {"notes": "n"}
    for name, x in wanted.items():
        assert np.array_equal(found[name], x)
        assert np.array_equal(ours[name], x)
        assert found[name].dtype == ours[name].dtype == x.dtype
    with (
        pytest.raises(RuntimeError, match=r"y.safetensors lacks values of a"),
        TensorWriter(tmp_path / "y.safetensors", beside, {"a": specs["a"]}) as writer,
    ):
        writer.write("a", a[1:])
    with (
        pytest.raises(ValueError, match="a must be Spec"),
        TensorWriter(path, beside, {"a": specs["a"]}) as writer,
    ):
        writer.write("a", a.astype(np.float32))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.safetensors"]
    data = path.read_bytes()
    for broken in (
        b"",
        data[:5],
        data[:40],
        data[:-1],
        data + b"x",
        b"\xff" * 100,
        data.replace(b'"shape"', b'"shave"'),
    ):
        path.write_bytes(broken)
        with pytest.raises(
            CouldNotRun, match=r"x.safetensors is (cut off or )?no safetensors file"
        ):
            read_tensor_file(path)
    write_tensor_file(path, beside, {"empty": np.zeros((0, 3)), "scalar": np.array(2.5)})
    assert read_tensor_file(path)[0]["scalar"] == 2.5
