"""The choices that have a name, each a Literal: known here alone, for ops, config and commands."""

from __future__ import annotations

from typing import Any, Literal, get_args

from ..array import expect_that

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

Layout = Literal["interleaved", "halves"]  # RoPE's pairs: neighbours, or i and i + R/2
Score = Literal["sigmoid", "softmax"]  # what the router makes of logits
GroupScore = Literal["top2", "share", "max"]  # which of a group's best scores are summed
BlindQuery = Literal["zero", "mean"]  # what a query that sees no key gets: 0, or the mean value
MaskedGroups = Literal["-inf", "zero"]  # the score of experts in groups that were not kept
Ranking = Literal["scores", "logits"]  # what softmax gates are ranked by
MTPOrder = Literal["embedding_hidden", "hidden_embedding"]  # which comes first in what MTP joins
Ratio = Literal["token", "sequence", "sequence_mean"]  # what a ratio of policies is taken of
Average = Literal["sequence", "token", "constant"]  # GRPO's mean over tokens and outputs
Empty = Literal["counted", "left_out"]  # outputs without tokens: counted in the mean, or left out
Estimator = Literal["k1", "k2", "k3", "unbiased"]  # of the KL; unbiased is the ratio times k3
Level = Literal["token", "sequence"]  # of the KL: per token, or of a whole output


def expect_choice(name: str, value: object, choices: Any) -> None:
    """ValueError unless ``value`` is one of the Literal ``choices``."""
    allowed = get_args(choices)
    expect_that(value in allowed, f"{name} must be one of {', '.join(allowed)}, got {value!r}")
