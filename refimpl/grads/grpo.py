"""GRPO's loss in the place of the cross-entropy: what it needs beside the tokens.

Letters: B outputs (a row of tokens holds one, behind its prompt), T position.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..array import expect, expect_mask
from ..ops import GRPO_PRESETS, grpo_forward

__all__ = ["GRPO", "SETTINGS"]

ARRAYS = ("advantages", "mask", "old_log_prob", "reference_log_prob", "unclipped", "kept")
SETTINGS = {
    name: p.default
    for name, p in inspect.signature(grpo_forward).parameters.items()
    if p.kind is p.KEYWORD_ONLY and name not in (*ARRAYS, "normaliser")
}
"""The settings of `grpo_forward` and their defaults: DeepSeekMath's."""


@dataclass(frozen=True)
class GRPO:
    """Constants of the loss. A position counts where it predicts a token of an output; its
    log-probability is that of this token."""

    mask: np.ndarray  # [B, T] bool
    advantages: np.ndarray  # [B]
    old_log_prob: np.ndarray | None = None  # [B, T]; None: this very policy sampled
    reference_log_prob: np.ndarray | None = None  # [B, T], for the KL
    temperature: float = 1.0  # divides the logits
    settings: Mapping[str, Any] = field(default_factory=dict)  # of `SETTINGS`
    unclipped: np.ndarray | None = None  # [B, T] bool and
    kept: np.ndarray | None = None  # [B] bool: choices to replay

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray | None], settings: Mapping[str, Any]) -> GRPO:
        """From the arrays by name, and settings, among which may be ``temperature`` and ``preset``,
        a name of `GRPO_PRESETS` whose settings hold unless given."""
        given = dict(settings)
        temperature, preset = given.pop("temperature", 1.0), given.pop("preset", "deepseekmath")
        if not isinstance(preset, str) or preset not in GRPO_PRESETS:
            raise ValueError(
                f"preset must be one of {', '.join(GRPO_PRESETS)}, got {json.dumps(preset)}"
            )
        given = GRPO_PRESETS[preset] | given
        if strange := [name for name in given if name not in SETTINGS]:
            raise ValueError(
                f"{strange[0]} must be one of preset, temperature, {', '.join(SETTINGS)}"
            )
        given = {name: tuple(x) if isinstance(x, list) else x for name, x in given.items()}
        return cls(**arrays, temperature=temperature, settings=given)  # type: ignore[arg-type]

    def check(self, shape: tuple[int, ...]) -> None:
        """ValueError unless everything fits tokens of that shape [B, T]."""
        try:
            if not (isinstance(self.temperature, int | float) and 0 < self.temperature < np.inf):
                raise ValueError(f"temperature must be above 0 and finite, got {self.temperature}")
            expect_mask("mask", self.mask, "(B, T)", shape)
            expect("advantages", self.advantages, "(B,)", shape[:1])
            for name in ("old_log_prob", "reference_log_prob"):
                if (x := getattr(self, name)) is not None:
                    expect(name, x, "(B, T)", shape)
            with np.errstate(all="ignore"):
                grpo_forward(np.zeros(shape), **self.arguments(np.dtype(np.float64)))
            for name, x in self.inputs(np.dtype(np.float64)).items():
                if x is not None and not np.isfinite(x).all():
                    raise ValueError(f"{name} must be finite, got NaN or infinity")
        except (TypeError, ValueError, LookupError, OverflowError) as error:
            raise ValueError(f"grpo can't be computed: {error}") from error

    def inputs(self, dtype: np.dtype[Any]) -> dict[str, np.ndarray | None]:
        """The given numbers in the type to compute in, 0 where no token counts."""
        hidden = {"old_log_prob": self.old_log_prob, "reference_log_prob": self.reference_log_prob}
        given = {
            name: None if x is None else np.where(self.mask, x, 0) for name, x in hidden.items()
        }
        with np.errstate(over="ignore", invalid="ignore"):
            every = {"advantages": self.advantages} | given
            return {name: None if x is None else x.astype(dtype) for name, x in every.items()}

    def arguments(self, dtype: np.dtype[Any]) -> dict[str, Any]:
        """All keyword arguments of `grpo_forward`."""
        choices = {"mask": self.mask, "unclipped": self.unclipped, "kept": self.kept}
        return self.inputs(dtype) | choices | dict(self.settings)

    @property
    def told(self) -> dict[str, Any]:
        """All settings, defaults included, as JSON has them."""
        return {"temperature": self.temperature} | SETTINGS | dict(self.settings)
