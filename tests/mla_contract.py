"""What both forms of MLA promise: their range of validity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


@np.errstate(all="ignore")
def check_range_of_validity(
    forward: Callable[..., Any], backward: Callable[..., Any], wide: dict[str, Any]
) -> None:
    """Where a latent's squares overflow its norm is NaN, and so is every output that sees it;
    tiny latents end in eps, and float32 is right."""
    floats = [
        n for n, v in wide.items() if str(getattr(v, "dtype", "")) == "float64" and n != "inv_freq"
    ]
    given = wide | {name: wide[name].astype(np.float32) for name in floats}
    for scale in (1e20, 1e30):
        output, saved = forward(**given | {"x": np.float32(scale) * given["x"]})
        assert np.isnan(output.y).all()
        gradients = backward((np.ones_like(output.y), None), saved)
        assert all(np.isnan(g).all() for g in gradients if g is not None)
    y, right = (forward(**g | {"x": 1e-10 * g["x"]})[0].y for g in (given, wide))
    np.testing.assert_allclose(y, right, rtol=0, atol=1e-5 * np.abs(right).max())
