"""Host side of the kernels: where their sources are, in a checkout and in an installed wheel
alike."""

from pathlib import Path

__all__ = ["SOURCE"]

_here = Path(__file__).parent
SOURCE = _here / "src" if (_here / "src").is_dir() else _here.parents[1] / "kernels"
"""The folder with the device code: inside the package in a wheel, ``kernels/`` in a checkout."""
__path__.append(
    str(SOURCE)
)  # so kernels/rms_norm_numba_cuda.py is the module refimpl.kernels.rms_norm_numba_cuda
