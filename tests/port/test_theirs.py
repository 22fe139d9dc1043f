"""A port's files: what is read, and what is refused."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from refimpl.errors import CouldNotRun
from refimpl.port.theirs import open_theirs

X = np.arange(6.0).reshape(2, 3)


def test_a_file_of_each_kind(tmp_path: Path) -> None:
    save_file({"x": X, "y": X.astype(ml_dtypes.bfloat16)}, tmp_path / "a.safetensors")
    np.savez(tmp_path / "b.npz", x=X, **{"act/y": X.astype(np.int32)})
    np.savez_compressed(tmp_path / "c.npz", x=X)
    for file, types in (
        ("a.safetensors", {"x": "float64", "y": "bfloat16"}),
        ("b.npz", {"x": "float64", "act/y": "int32"}),
        ("c.npz", {"x": "float64"}),
    ):
        theirs = open_theirs(tmp_path / file)
        bare = {key: x for key, x in theirs.tensors.items() if ":" not in key}
        assert {key: x.dtype for key, x in bare.items()} == types
        for x in bare.values():
            assert x.shape == (2, 3)
            np.testing.assert_array_equal(x.array().astype(np.float64), X)
        np.testing.assert_array_equal(theirs.tensors[f"{file}:x"].array(), X)


def test_a_folder_of_shards(tmp_path: Path) -> None:
    save_file({"x": X, "both": X}, tmp_path / "a.safetensors")
    save_file({"y": X, "both": 2 * X}, tmp_path / "b.safetensors")
    (tmp_path / "config.json").write_text("{}")
    theirs = open_theirs(tmp_path)
    assert theirs.shared == {"both": ["a.safetensors", "b.safetensors"]}
    assert theirs.tensors["x"].path == tmp_path / "a.safetensors"
    np.testing.assert_array_equal(theirs.tensors["b.safetensors:both"].array(), 2 * X)


def test_what_torch_adds_to_a_name(tmp_path: Path) -> None:
    save_file({"module.x": X, "grad/_orig_mod.layers.module.y": X}, tmp_path / "a.safetensors")
    bare = {key for key in open_theirs(tmp_path / "a.safetensors").tensors if ":" not in key}
    assert bare == {"x", "grad/layers.y"}


def refused(path: Path) -> str:
    with pytest.raises(CouldNotRun) as caught:
        open_theirs(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.bin", "a.pkl", "a.ckpt"])
def test_a_pickle_is_not_opened(tmp_path: Path, name: str) -> None:
    """Nor what says how to save something else left out."""
    (tmp_path / name).write_bytes(pickle.dumps(X))
    assert "reading one can run anything: save safetensors instead" in refused(tmp_path / name)
    assert f"({name} is a pickle: save safetensors instead" in refused(tmp_path)


def test_a_pickle_under_another_name(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(pickle.dumps(X) + bytes(99))
    assert "a pickle" in refused(tmp_path / "a.safetensors")
    np.savez(tmp_path / "b.npz", x=np.array([{}]))  # an array of objects
    assert "Python objects" in refused(tmp_path / "b.npz")


def test_an_archive_that_is_not_sound(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f8", "fortran_order": False, "shape": (2**40,)}
    )
    for content, line in (
        ({"x.npy": header.getvalue()}, "is not as long as its header says"),
        ({"x.npy": b"x"}, "not a sound .npz file"),
        ({"x.txt": b"x"}, "x.txt must be an array"),
    ):
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in content.items():
                archive.writestr(name, data)
        assert line in refused(path)
    path.write_bytes(b"PK")
    assert "not a sound .npz file" in refused(path)
    np.savez(path, x=X)
    theirs = open_theirs(path)
    path.write_bytes(path.read_bytes().replace(X.tobytes(), bytes(48)))
    with pytest.raises(CouldNotRun, match="CRC-32"):
        theirs.tensors["x"].array()


def test_what_is_no_file_of_tensors(tmp_path: Path) -> None:
    assert "holds no .safetensors and no .npz file" in refused(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    assert "must be a .safetensors or a .npz file" in refused(tmp_path / "a.txt")
    assert "can't be read: No such file" in refused(tmp_path / "no.npz")
    save_file({}, tmp_path / "empty.safetensors")
    assert "holds no tensor" in refused(tmp_path / "empty.safetensors")


def test_a_wrapper_s_name_beside_the_plain_one(tmp_path: Path) -> None:
    """Which of the two is meant, nobody knows."""
    save_file({"x": np.zeros(2), "module.x": np.ones(2)}, tmp_path / "a.safetensors")
    theirs = open_theirs(tmp_path / "a.safetensors")
    assert theirs.shared == {"x": ["a.safetensors as module.x", "a.safetensors as x"]}
