"""The record of one disagreement, and of what is said about who."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from .examples import Numbers

__all__ = ["HOW", "VERSIONS", "WHO", "Statement", "Trap", "read", "run", "told"]

WHO = ("DeepSeek", "paper", "HF", "Megatron", "torchtitan", "TRL", "verl")
"""DeepSeek: its published code and weights. HF: transformers. Others, such as vLLM, follow by their
own names."""

VERSIONS = {
    "DeepSeek": "DeepSeek-V3 9b4e978",
    "DeepSeek-V2.5": "its config.json",
    "paper": "the reports",
    "HF": "transformers 5.24.0",
    "Megatron": "Megatron-LM d98e8a6",
    "torchtitan": "torchtitan b5bcd76",
    "TRL": "TRL 1.16.0",
    "verl": "verl 0.9.1",
    "OpenRLHF": "OpenRLHF 3c3be62",
    "SGLang": "SGLang 0.5.23",
    "vLLM": "vLLM 03356f8",
    "TileKernels": "TileKernels 36d9e45",
    "DeepGEMM": "DeepGEMM 54e2261",
    "TransformerEngine": "TransformerEngine d0067d0",
    "torchao": "torchao 0598012",
    "Automodel": "NeMo Automodel",
    "ms-swift": "ms-swift",
    "teaching code": "LLMs-from-scratch, July 2026",
}
"""The version that a statement is about, unless it names its own."""

How = Literal["run", "read", "told"]
HOW = {  # how a statement is known, in words
    "run": "its own code was executed beside ours, in this version: by the test that is named, or "
    "once, before this was written",
    "read": "its source was read, in this version, and not executed",
    "told": "second-hand: an issue, a report or its documentation says so",
}


@dataclass(frozen=True)
class Statement:
    """What somebody does, and how that is known."""

    text: str
    how: How
    at: str = ""  # the version, if it is not that of `VERSIONS`
    test: str = ""  # the test that runs the peer's code and asserts the statement, FILE::NAME

    def version(self, name: str) -> str:
        """The version of ``name`` that the statement is about; the teller's own where told."""
        return self.at or ("as told" if self.how == "told" else VERSIONS[name])

    def source(self, name: str) -> str:
        """How it is known, and of which version."""
        return "told" if self.version(name) == "as told" else f"{self.how}, {self.version(name)}"


def read(text: str, at: str = "") -> Statement:
    """A statement known from the source, ``at`` a file and line."""
    return Statement(text, "read", at)


def run(text: str, at: str = "", test: str = "") -> Statement:
    """A statement known from an execution beside ours, by ``test`` where there is one."""
    return Statement(text, "run", at, test)


def told(text: str, at: str = "") -> Statement:
    """A statement that is second-hand."""
    return Statement(text, "told", at)


@dataclass(frozen=True)
class Trap:
    """One disagreement."""

    title: str
    question: str
    who: dict[str, Statement]  # by implementation; those without such a part are left out
    field: str  # where ours is chosen
    default: str
    tell: str  # how an implementation's choice shows from outside
    measures: tuple[
        tuple[str, Callable[[], Numbers]], ...
    ]  # what the numbers are, and what computes them
    words: str = ""  # by which it is found, besides those of title, question and field
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

    def is_about(self, word: str) -> bool:
        """Whether a word, or a part of one, stands in what is said about ours."""
        said = (self.title, self.question, self.field, self.words)
        return word.lower() in " ".join(said).lower()
