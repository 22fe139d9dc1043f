"""Parameters off neutral, for the tests of whole models."""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.config import ModelConfig
from refimpl.parameters import parameter_shapes


def random_parameters(
    config: ModelConfig, seed: int = 0, std: float = 0.15, dtype: Any = np.float64
) -> dict[str, np.ndarray]:
    """Every parameter off neutral: norms in 0.5 … 1.5, all else normal, the gates' biases too."""
    rng = np.random.default_rng(seed)
    params = {}
    for name, shape in parameter_shapes(config).items():
        is_norm = name.endswith("norm.weight")
        x = rng.uniform(0.5, 1.5, shape) if is_norm else std * rng.normal(size=shape)
        params[name] = x.astype(dtype)
    return params
