"""Our roundings to FP8 beside torch's casts."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from refimpl.fp8 import narrow

torch = pytest.importorskip("torch", reason="torch is not installed: make oracle")


def test_casts_are_torchs() -> None:
    """A million float32 numbers of all sizes, ties, subnormals, zeros and NaN: E4M3 and E5M2, bit
    for bit; clipped before, since a cast beyond the largest saturates in one library alone."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 10**6, np.uint32)
    x = bits.view(np.float32)
    x[: 2**16] = (np.arange(2**16, dtype=np.uint32) << 16).view(np.float32)  # ties of few bits
    sizes = rng.normal(size=500_000) * 2.0 ** rng.integers(-12, 9, 500_000)
    x[500_000:] = sizes.astype(np.float32)
    for ours, theirs, largest in (
        (ml_dtypes.float8_e4m3fn, torch.float8_e4m3fn, 448.0),
        (ml_dtypes.float8_e5m2, torch.float8_e5m2, 57344.0),
    ):
        clipped = np.clip(x, -largest, largest)
        found = narrow(clipped, ours).astype(np.float32)
        wanted = torch.from_numpy(clipped).to(theirs).float().numpy()
        np.testing.assert_array_equal(found, wanted)
        assert np.isnan(wanted).any()
