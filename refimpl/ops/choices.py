"""The choices that have a name, each a Literal: known here alone, for ops, config and commands."""

from __future__ import annotations

from typing import Any, Literal, get_args

__all__ = [
    "Average",
    "BlindQuery",
    "Empty",
    "Estimator",
    "GroupScore",
    "Layout",
    "Level",
    "MTPOrder",
    "MaskedGroups",
    "Ranking",
    "Ratio",
    "Score",
    "expect_choice",
]

Layout = Literal["interleaved", "halves"]
Score = Literal["sigmoid", "softmax"]
GroupScore = Literal["top2", "share", "max"]
BlindQuery = Literal["zero", "mean"]
MaskedGroups = Literal["-inf", "zero"]
Ranking = Literal["scores", "logits"]
MTPOrder = Literal["embedding_hidden", "hidden_embedding"]
Ratio = Literal["token", "sequence", "sequence_mean"]
Average = Literal["sequence", "token", "constant"]
Empty = Literal["counted", "left_out"]
Estimator = Literal["k1", "k2", "k3", "unbiased"]
Level = Literal["token", "sequence"]


def expect_choice(name: str, value: object, choices: Any) -> None:
    """ValueError unless ``value`` is one of the Literal ``choices``."""
    allowed = get_args(choices)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
