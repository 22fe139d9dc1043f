"""Relations that need no catalogue, each on numbers that have it to float32's rounding."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from refimpl.model import mtp_scale
from refimpl.port.hints import factors_of, hints_of
from refimpl.port.truth import Truth

from port.examples import Example
from port.test_recompute import part_of
from port.truths import model_port

Change = Callable[[np.ndarray], np.ndarray]


@pytest.fixture(scope="module")
def truth(example: Example) -> Truth:
    return Truth.open(example.truth)


def hints(truth: Truth, part: str, changes: dict[str, Change]) -> str:
    """The hints on a right port, of whose tensors those that end so are changed."""
    which, port = part_of(truth, part), model_port(truth, None, "float32", 3)
    held = {name: port[name] for name in which.tensors if name in port}
    for end, change in changes.items():
        names = [name for name in held if name.endswith(end)]
        assert names, end
        held |= {name: change(held[name]) for name in names}
    return "\n".join(hints_of(truth, which, held, "float32"))


def heads_zero(x: np.ndarray) -> np.ndarray:
    """The second of three heads of kv_b left at zero."""
    return np.where(np.arange(len(x)) // (len(x) // 3) == 1, 0, x.T).T


def halves(x: np.ndarray) -> np.ndarray:
    """kv_a's four rotated rows, evens first."""
    return np.concatenate([x[:-4], x[-4::2], x[-3::2]])


def swapped(x: np.ndarray) -> np.ndarray:
    """Key rows and value rows of three heads, 5 and 6 wide."""
    heads = x.reshape(3, 11, -1)
    return np.concatenate([heads[:, 5:], heads[:, :5]], axis=1).reshape(x.shape)


ATTENTION, NETWORK = "layer 1, attention, backward", "layer 1, network, backward"
KV_A, KV_B = "kv_a_proj_with_mqa.weight", "kv_b_proj.weight"


@pytest.mark.parametrize(
    ("part", "end", "change", "wanted"),
    [
        (ATTENTION, "o_proj.weight", lambda x: -x, "the sign is wrong: "),
        (ATTENTION, "o_proj.weight", lambda x: 0 * x, "0 throughout: "),
        (ATTENTION, "o_proj.weight", lambda x: 1e-30 * x, "0 throughout: "),
        (ATTENTION, "o_proj.weight", lambda x: x / 0, "not finite: "),
        (ATTENTION, KV_B, heads_zero, "head 1: 0, the other 2 ok"),
        (ATTENTION, KV_A, halves, "rotated rows as halves instead of interleaved"),
        (ATTENTION, KV_B, swapped, "key and value rows changed places in each head"),
        (NETWORK, "gate.weight", lambda x: 2.5 * x, "a factor of 2.5, as from the routed scale"),
        (NETWORK, "gate.weight", lambda x: x * 11, "as from 11 (micro-batches or ranks)"),
        (NETWORK, "gate.weight", lambda x: 1.2345 * x, "which no number of this run gives"),
        ("layer 3, mtp, backward", "shared_head.norm.weight", lambda x: x / 0.3, "1/λ = 3.3"),
        ("layer 3, mtp, backward", "eh_proj.weight", lambda x: np.roll(x, 20, 1),
         "embedding's and hidden state's columns changed places"),
    ],
)  # fmt: skip
def test_one_relation(truth: Truth, part: str, end: str, change: Change, wanted: str) -> None:
    if end == "eh_proj.weight":  # of the second part of that name
        which = [p for p in _parts(truth) if p.name == part][-1]
        port = model_port(truth, None, "float32", 3)
        held = {n: change(port[n]) if n.endswith(end) else port[n] for n in which.tensors}
        said = "\n".join(hints_of(truth, which, held, "float32"))
    else:
        with np.errstate(all="ignore"):
            said = hints(truth, part, {end: change})
    assert wanted in said, said


def _parts(truth: Truth) -> list:  # type: ignore[type-arg]
    from refimpl.port.parts import parts_of

    return parts_of(truth)


def test_gate_and_up_changed_places(truth: Truth) -> None:
    part, port = part_of(truth, "layer 0, network, backward"), model_port(truth, None, "float32", 3)
    held = {name: port[name] for name in part.tensors}
    gate, up = (next(n for n in held if f".{x}_proj" in n) for x in ("gate", "up"))
    held[gate], held[up] = held[up], held[gate]
    said = "\n".join(hints_of(truth, part, held, "float32"))
    assert f"the tensor is that of .up_proj.weight: {gate}" in said


def test_transposed(truth: Truth) -> None:
    """Where the shape does not tell it: a square tensor."""
    part = part_of(truth, "layer 0, network, backward")
    name = next(n for n in part.tensors if "down" in n)
    square = truth.array(name)[:20, :20]
    entry = truth.entries[name]
    truth.entries[name] = entry._replace(shape=(20, 20))
    kept = truth.array
    try:
        truth.array = lambda n: square if n == name else kept(n)  # type: ignore[method-assign]
        assert hints_of(truth, part, {name: square.T}, "float32")[0].startswith("transposed: ")
    finally:
        truth.array = kept  # type: ignore[method-assign]
        truth.entries[name] = entry


@pytest.mark.parametrize(
    ("part", "alpha", "told"),
    [
        ("head, backward", "mtp", "differs by exactly the MTP part"),
        (NETWORK, "balance", "differs by exactly the balance loss's part"),
        (NETWORK, "shared", "differs by exactly the shared experts' part"),
    ],
)
def test_what_is_missing(truth: Truth, part: str, alpha: str, told: str) -> None:
    from refimpl.port.recompute import recompute

    which = part_of(truth, part)
    held = recompute(truth, which, None, "float32", 2, without=alpha)
    held = {name: held[name] for name in which.tensors if name in held}
    assert told in "\n".join(hints_of(truth, which, held, "float32"))


def test_right_numbers_have_no_hints(truth: Truth) -> None:
    for part in (ATTENTION, NETWORK, "layer 1, gate, forward"):
        assert hints(truth, part, {}) == ""


def test_the_run_s_own_numbers(truth: Truth) -> None:
    found = factors_of(truth)
    assert truth.config is not None
    assert found["the routed scale = 2.5"] == 2.5
    assert found["1/the routed scale = 0.4"] == 0.4
    assert mtp_scale(truth.config) in found.values()
    assert found["B·T = 18"] == 18
    assert found["N counted = 16"] == 16
    assert 0 not in found.values()
    assert 1 not in found.values()
