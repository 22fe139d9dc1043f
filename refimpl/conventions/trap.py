"""The record of one disagreement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from .examples import Numbers

__all__ = ["WHO", "Trap"]

WHO = ("DeepSeek", "paper", "HF", "Megatron", "torchtitan", "TRL", "verl")
"""DeepSeek: its published code and weights. HF: transformers. Others, such as vLLM, follow by their
own names."""


@dataclass(frozen=True)
class Trap:
    """One disagreement."""

    title: str
    question: str
    who: dict[
        str, str
    ]  # what each implementation does, with its source; those without such a part are left out
    field: str  # where ours is chosen
    default: str
    tell: str  # how an implementation's choice shows from outside
    measures: tuple[
        tuple[str, Callable[[], Numbers]], ...
    ]  # what the numbers are, and what computes them
    checkpoint: bool = (
        False  # shows on files of a certain format alone, not in the model's arithmetic
    )

    @cached_property
    def measured(self) -> dict[str, Numbers]:
        """The number of each choice, by what it is; computed once."""
        return {measure: example() for measure, example in self.measures}

    @property
    def absent(self) -> list[str]:
        """Those of `WHO` that have no such part."""
        return [name for name in WHO if name not in self.who]
