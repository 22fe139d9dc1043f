"""One safetensors file, written a piece at a time and read back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from refimpl.checkpoint.tensor_file import Spec, read_tensor_file, tensor_writer, write_tensor_file
from refimpl.errors import CouldNotRun

RNG = np.random.default_rng(5)


def test_tensor_files(tmp_path: Path) -> None:
    """Written in any order and piece by piece, safetensors reads it; what is missing is an error
    and leaves nothing."""
    path, beside = tmp_path / "x.safetensors", tmp_path / "beside"
    beside.mkdir()
    a, b = RNG.normal(size=(5, 3)), RNG.integers(0, 9, (4,))
    specs = {
        "b": Spec(b.shape, b.dtype),
        "a": Spec(a.shape, a.dtype),
        "zero": Spec((2, 2), np.dtype("float32")),
    }
    with tensor_writer(path, specs, {"notes": "n"}, beside) as writer:
        writer.write("a", a[3:], 9)
        writer.zero("zero")
        writer.write("b", b)
        writer.write("a", np.asfortranarray(a[:3]))
        assert not path.exists()
        assert [p.suffix for p in beside.iterdir()] == [".partial"]
    assert list(beside.iterdir()) == []
    found, wanted = load_file(path), {"a": a, "b": b, "zero": np.zeros((2, 2), np.float32)}
    ours, metadata = read_tensor_file(path)
    assert metadata == {"notes": "n"}
    for name, x in wanted.items():
        assert np.array_equal(found[name], x)
        assert np.array_equal(ours[name], x)
        assert found[name].dtype == ours[name].dtype == x.dtype
    with (
        pytest.raises(RuntimeError, match=r"y.safetensors lacks values of a"),
        tensor_writer(tmp_path / "y.safetensors", {"a": specs["a"]}) as writer,
    ):
        writer.write("a", a[1:])
    with (
        pytest.raises(ValueError, match="a must be Spec"),
        tensor_writer(path, {"a": specs["a"]}) as writer,
    ):
        writer.write("a", a.astype(np.float32))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["beside", "x.safetensors"]
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
            CouldNotRun, match=r"x.safetensors is (cut off or )?not a safetensors file"
        ):
            read_tensor_file(path)
    write_tensor_file(path, {"empty": np.zeros((0, 3)), "scalar": np.array(2.5)})
    assert read_tensor_file(path)[0]["scalar"] == 2.5


def test_header_of_a_size_that_no_model_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.safetensors"
    write_tensor_file(path, {"a": np.ones(3)})
    size = int.from_bytes(path.read_bytes()[:8], "little")
    for most, fits in ((size, True), (size - 1, False)):
        monkeypatch.setattr("refimpl.checkpoint.tensor_file.LARGEST_TEXT", most)
        if fits:
            read_tensor_file(path)
        else:
            with pytest.raises(CouldNotRun, match=f"header must have at most {most} bytes"):
                read_tensor_file(path)
