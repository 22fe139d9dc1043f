"""Rewards by rule, from a completion's text: DeepSeek-R1's (2501.12948, section 2.2.2), a penalty
of long outputs, and which of two right answers is the tidier.

R1-Zero is trained with two rules and no learned reward. Its accuracy reward asks for the final
answer in a given form, so that a rule can compare it; its format reward asks for the thinking
between <think> and </think>, as its template (table 1) does, which also has the answer between
<answer> and </answer>. `accuracy` and `formatted` define the two exactly. The time of every rule is
linear in the text.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import inf

from .vocabulary import TAGS

__all__ = ["accuracy", "formatted", "overlong", "score", "tidiness", "total"]

THINK, THOUGHT, ANSWER, ANSWERED = TAGS[1:]
SPACE = " \t\r\n"
WEIGHTS = {"accuracy": 1.0, "format": 0.2, "overlong": 1.0}


def accuracy(text: str, answer: str) -> float:
    """1 if the text has one <answer>, behind it one </answer>, and between them exactly ``answer``,
    spaces, tabs and line ends around it left out; else 0.

    Characters are compared, not values: 007 is not 7. The rest of the text does not matter, the
    think block neither: whether the answer stands at its place is `formatted`'s question, and since
    there is one answer, nothing is gained by putting it elsewhere.
    """
    if text.count(ANSWER) != 1 or text.count(ANSWERED) != 1:
        return 0.0
    inside, closed, _ = text.partition(ANSWER)[2].partition(ANSWERED)
    return float(bool(closed) and inside.strip(SPACE) == answer != "")


def formatted(text: str, ended: bool = True) -> float:
    """1 if the whole text is <think>…</think><answer>…</answer>, with none of the four tags inside
    a block and nothing around or between the blocks, not even a space; else 0. A block may be
    empty.

    ``ended``: whether the end token came before the limit of tokens; a text that was cut off has
    format 0, wherever it was cut.
    """
    whole = text.startswith(THINK) and THOUGHT + ANSWER in text and text.endswith(ANSWERED)
    once = all(text.count(tag) == 1 for tag in (THINK, THOUGHT, ANSWER, ANSWERED))
    return float(ended and whole and once)


def overlong(length: int, limit: int, margin: int) -> float:
    """DAPO's soft penalty (2503.14476, eq. 13) of a completion of ``length`` tokens: 0 up to
    limit − margin, from there on linear down to −1 at ``limit``, and −1 beyond.

    Our margin is their L_cache, our limit their L_max. Their filter, the other way to treat what
    was cut off, is no reward: it leaves the completion out of the loss's mask. ValueError unless
    0 < margin ≤ limit.
    """
    if not 0 < margin <= limit:
        raise ValueError(f"margin must lie in 1 … limit={limit}, got {margin}")
    return max(min((limit - margin - length) / margin, 0.0), -1.0)


def tidiness(text: str) -> float:
    """Minus the number of characters in the think block; −∞ if the format is wrong. Of two right
    answers to one problem, the one with the larger number is the tidier."""
    return -float(text.index(THOUGHT) - len(THINK)) if formatted(text) else -inf


def score(text: str, answer: str, *, ended: bool = True) -> dict[str, float]:
    """R1's two rules by name."""
    return {"accuracy": accuracy(text, answer), "format": formatted(text, ended)}


def total(parts: Mapping[str, float], weights: Mapping[str, float] = WEIGHTS) -> float:
    """The reward: the sum of the parts, each times its weight. A part without a weight is a
    KeyError."""
    return sum(weights[name] * value for name, value in parts.items())
