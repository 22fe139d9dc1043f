"""A port of RMSNorm and RoPE in C, held against the conformance vectors.

    refimpl vectors vectors --op rms_norm --op rope
    python examples/rms_norm_rope.py vectors mine.npz
    refimpl check mine.npz --against vectors --dtype float64

Replace rms_norm_rope.c by yours.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from refimpl.port import Truth

SOURCE = Path(__file__).with_suffix(".c")
pointer, size, double, integer = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_double, ctypes.c_int
SIGNATURES = {
    "rms_norm_forward": (pointer, pointer, double, size, size, pointer),
    "rms_norm_backward": (pointer, pointer, pointer, double, size, size, pointer, pointer),
    "rope": (pointer, pointer, pointer, double, integer, integer, size, size, size, pointer),
}


def build(source: Path, folder: str) -> ctypes.CDLL:
    library = f"{folder}/port.so"
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", source, "-o", library, "-lm"], check=True)
    loaded = ctypes.CDLL(library)
    for name, arguments in SIGNATURES.items():
        getattr(loaded, name).argtypes = arguments
        getattr(loaded, name).restype = None
    return loaded


def run(truth: Truth, source: Path = SOURCE) -> dict[str, np.ndarray]:
    """What the C functions make of the cases of their ops, under the names of the vectors."""
    mine: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as folder:
        port = build(source, folder)
        for case, told in truth.metadata["cases"].items():
            read = lambda name: np.ascontiguousarray(truth.array(f"{case}/{name}"), float)  # noqa: B023
            if told["op"] == "rms_norm":
                mine |= rms_norm(port, case, told["settings"], read)
            elif told["op"] == "rope":
                mine |= rope(port, case, told["settings"], read)
    return mine


def rms_norm(port, case, settings, read) -> dict[str, np.ndarray]:
    x, w, dy = read("in/x"), read("in/w"), read("cot/y")
    y, dx, dw = np.empty_like(x), np.empty_like(x), np.empty_like(w)
    rows, n, eps = x.size // w.size, w.size, settings["eps"]
    port.rms_norm_forward(x.ctypes.data, w.ctypes.data, eps, rows, n, y.ctypes.data)
    port.rms_norm_backward(
        dy.ctypes.data, x.ctypes.data, w.ctypes.data, eps, rows, n, dx.ctypes.data, dw.ctypes.data
    )
    return {f"{case}/out/y": y, f"{case}/grad/x": dx, f"{case}/grad/w": dw}


def rope(port, case, settings, read) -> dict[str, np.ndarray]:
    x, inv_freq, dy = read("in/x"), read("aux/inv_freq"), read("cot/y")
    b, t, heads, n = x.shape
    positions = np.ascontiguousarray(np.broadcast_to(read("aux/positions"), (b, t)))
    halves, factor = settings["layout"] == "halves", settings["factor"]
    turned = []
    for given, sign in ((x, 1), (dy, -1)):
        y = np.empty_like(given)
        port.rope(
            given.ctypes.data, positions.ctypes.data, inv_freq.ctypes.data, factor, halves, sign,
            b * t, heads, n, y.ctypes.data,
        )  # fmt: skip
        turned.append(y)
    return {f"{case}/out/y": turned[0], f"{case}/grad/x": turned[1]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("vectors", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    np.savez(given.out, **run(Truth.open(given.vectors)))
