"""The rules, on texts that want to be rewarded."""

from __future__ import annotations

import time
from math import inf

import pytest

from refimpl.train.rewards import accuracy, formatted, overlong, score, tidiness, total

GOOD = "<think>5+3=8 8+6=14</think><answer>148</answer>"
TABLE = {  # text: (accuracy, format), of the answer 148
    GOOD: (1, 1),
    "<think></think><answer>148</answer>": (1, 1),
    "<think>148</think><answer>147</answer>": (0, 1),
    "<think>a</think><answer></answer>": (0, 1),
    "<think>a</think><answer> 148\n</answer>": (1, 1),
    "<think>a</think><answer>1 48</answer>": (0, 1),
    "<think>a</think><answer>148.</answer>": (0, 1),
    "<think>a</think><answer>+148</answer>": (0, 1),
    "<think>a</think><answer>0148</answer>": (0, 1),
    "<think>a</think><answer>148 147</answer>": (0, 1),
    "<think>a</think><answer>\uff11\uff14\uff18</answer>": (0, 1),
    "<think>a</think><answer>\u0661\u0664\u0668</answer>": (0, 1),
    "<think>a</think><answer>\u00a0148</answer>": (0, 1),
    "<think>a</think><answer>148\u200b</answer>": (0, 1),
    "<think>a</think><answer>148\x00</answer>": (0, 1),
    "": (0, 0),
    "148": (0, 0),
    "<answer>148</answer>": (1, 0),
    "a<answer>148</answer>": (1, 0),
    "<think>a<answer>148</answer></think>": (1, 0),
    "<think>a<answer>148</answer>": (1, 0),
    "<think><answer>148</answer></think><answer>148</answer>": (0, 0),
    GOOD + GOOD: (0, 0),
    GOOD + "<answer>148</answer>": (0, 0),
    "<think>a</think><answer>147</answer><answer>148</answer>": (0, 0),
    "<think>a</think><answer>148</answer></answer>": (0, 0),
    "<think>a</think><answer><answer>148</answer>": (0, 0),
    "<think>a</think></answer>148<answer>": (0, 0),
    "<think>a</think><answer>148": (0, 0),
    "</answer><answer>148": (0, 0),
    "<think>a</think><answer>148</answer": (0, 0),
    "<think>a</think>148</answer>": (0, 0),
    "<think>a</think><Answer>148</Answer>": (0, 0),
    GOOD + " ": (1, 0),
    GOOD + "!": (1, 0),
    GOOD + "<|end|>": (1, 0),
    " " + GOOD: (1, 0),
    "ok" + GOOD: (1, 0),
    "<think>" + GOOD: (1, 0),
    "<think>a</think></think><answer>148</answer>": (1, 0),
    "<think>a</think>" + GOOD: (1, 0),
    "<think>a</think> <answer>148</answer>": (1, 0),
    "<think>a</think>b<answer>148</answer>": (1, 0),
    "<think>a<answer>148</answer></think><answer>": (0, 0),
    "</think><answer>148</answer><think>": (1, 0),
}


@pytest.mark.parametrize("text", TABLE)
def test_rules(text: str) -> None:
    assert (accuracy(text, "148"), formatted(text)) == TABLE[text]
    assert score(text, "148") == {"accuracy": accuracy(text, "148"), "format": formatted(text)}


def test_whatever_was_cut_off_has_no_format() -> None:
    assert score(GOOD, "148", ended=False) == {"accuracy": 1.0, "format": 0.0}


def test_values_are_not_compared() -> None:
    assert accuracy("<answer>007</answer>", "7") == 0
    assert accuracy("<answer>007</answer>", "007") == 1
    assert accuracy("<answer></answer>", "") == 0


@pytest.mark.parametrize("piece", ["<", "<answer>", "<think></think>", "<answer></answer>", "a "])
def test_time_is_linear(piece: str) -> None:
    """Ten million characters in less than a second: rules that are quadratic would take a day."""
    text = "<think>" + piece * (10**7 // len(piece)) + "</think><answer>148</answer>"
    begin = time.process_time()
    score(text, "148")
    tidiness(text)
    assert time.process_time() - begin < 1


def test_overlong() -> None:
    """DAPO's eq. 13, at its corners and in the middle."""
    lengths = (0, 80, 81, 90, 100, 101, 10**6)
    wanted = [0, 0, -0.05, -0.5, -1, -1, -1]
    assert [overlong(length, 100, 20) for length in lengths] == pytest.approx(wanted, abs=0)
    assert overlong(50, 100, 100) == -0.5
    for margin in (0, 101):
        with pytest.raises(ValueError, match=f"margin must lie in 1 … limit=100, got {margin}"):
            overlong(1, 100, margin)


def test_tidiness() -> None:
    assert tidiness(GOOD) == -12
    assert tidiness("<think></think><answer>1</answer>") == 0
    assert tidiness("<answer>1</answer>") == -inf
    assert tidiness(GOOD.replace("8+6", "8+6=14 8+6")) < tidiness(GOOD)


def test_total() -> None:
    assert total({"accuracy": 1.0, "format": 1.0, "overlong": -0.5}) == pytest.approx(0.7)
    assert total({"accuracy": 1.0, "format": 0.5}, {"accuracy": 2.0, "format": 1.0}) == 2.5
    with pytest.raises(KeyError):
        total({"beauty": 1.0})
