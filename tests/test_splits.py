"""A batch in parts: the sums over the parts are the whole batch's loss, gradients and loads."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.batch import Whole
from refimpl.config import ModelConfig
from refimpl.model import backward, forward
from refimpl.ops import (
    GRPO_PRESETS,
    REFERENCE,
    Op,
    bias_update,
    grpo_backward,
    grpo_forward,
    log_prob_backward,
    log_prob_forward,
)
from refimpl.ops.balance_loss import count_choices
from refimpl.ops.choices import Average, Empty
from refimpl.parameters import HEAD
from refimpl.splits import (
    Exchange,
    Part,
    by_positions,
    by_rows,
    exchanging,
    filled,
    run_parts,
    side_by_side,
    whole_of,
)

from drawn_batches import SMALL, cut_rows, cuts, drawn
from random_parameters import random_parameters
from support import FULL, ROOT

TOLERANCE = 1e-12  # of the largest value; seen: 3e-14


def assert_sums(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, x in wanted.items():
        error = np.max(np.abs(found[name] - x))
        assert error <= TOLERANCE * np.max(np.abs(x)), f"{name} is off by {error}"


def summed(parts: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    return {name: sum(part[name] for part in parts) for name in parts[0]}


@settings(max_examples=200 if FULL else 40)
@given(st.data())
def test_sums_of_parts_are_the_whole(data: st.DataObject) -> None:
    """Uneven and empty parts, padding, packing, pieces of sequences, MTP depth 0 to 2."""
    config, arrays, _ = drawn(data)
    params = random_parameters(config)
    output, saved = forward(params, config=config, **arrays)
    pieces = data.draw(st.booleans())
    rows, length = arrays["tokens"].shape
    if pieces:
        parts = by_positions(arrays, cuts(data, length), config)
    else:
        parts = by_rows(arrays, cut_rows(data, rows))
    each = run_parts(params, parts, config, pieces=pieces)
    losses = {"loss": output.loss, "main": output.main, **output.balance}
    losses |= {f"mtp {i}": x for i, x in enumerate(output.mtp)}
    found = [
        {
            "loss": o.loss,
            "main": o.main,
            **o.balance,
            **{f"mtp {i}": x for i, x in enumerate(o.mtp)},
        }
        for o, _ in each
    ]
    assert_sums(summed(found), losses)
    assert_sums(summed([gradients for _, gradients in each]), backward(saved))
    for layer, load in output.loads.items():
        assert np.array_equal(sum(o.loads[layer] for o, _ in each), load)


def test_counts_are_given_instead_of_exchanged() -> None:
    """The balance loss of pieces from each sequence's counts and length, known beforehand."""
    config = replace(SMALL, mtp_depth=0, layers=1, dense_layers=0)
    params = random_parameters(config)
    tokens = np.random.default_rng(0).integers(0, 31, (2, 7))
    output, _ = forward(params, tokens, config)
    parts = by_positions({"tokens": tokens}, [3], config)
    counts, length = count_choices(
        output.routes[0].counted, config.experts, np.ones((2, 7, 1), bool)
    )
    whole = whole_of(parts, config)._replace(cut={0: (counts, length)})

    def without_counting(part: Part, exchange: Exchange) -> Any:
        ops = exchanging(REFERENCE, exchange) | {"balance_loss": REFERENCE.balance_loss}
        return forward(
            params, config=config, whole=whole, follow=part.follow, ops=ops, **part.arrays
        )

    each = side_by_side([partial(without_counting, part) for part in parts])
    balance = sum(float(o.balance[0]) for o, _ in each)
    assert balance == pytest.approx(float(output.balance[0]), rel=TOLERANCE)
    blind = whole._replace(cut={})
    wrong = side_by_side([partial(balance_of, params, config, blind, part) for part in parts])
    assert sum(wrong) != pytest.approx(float(output.balance[0]), rel=1e-3)


def balance_of(
    params: Any, config: ModelConfig, whole: Whole, part: Part, exchange: Exchange
) -> float:
    """The balance loss of a piece that counts its own choices alone."""
    ops = exchanging(REFERENCE, exchange) | {"balance_loss": REFERENCE.balance_loss}
    output, _ = forward(
        params, config=config, whole=whole, follow=part.follow, ops=ops, **part.arrays
    )
    return float(output.balance[0])


def rollouts(rng: np.random.Generator, n: int, length: int) -> dict[str, Any]:
    mask = np.arange(length) < rng.integers(0, length + 1, (n, 1))
    mask[0] = True
    return {
        "advantages": rng.normal(size=n),
        "mask": mask,
        "old_log_prob": -3 + 0.1 * rng.normal(size=(n, length)),
        "reference_log_prob": -3 + 0.1 * rng.normal(size=(n, length)),
    }


@pytest.mark.parametrize("average", get_args(Average))
@pytest.mark.parametrize("empty", get_args(Empty))
@pytest.mark.parametrize("preset_name", sorted(GRPO_PRESETS))
def test_grpo_in_parts(average: Any, empty: Any, preset_name: str) -> None:
    """Micro-batches of outputs, one of them empty; each knows how many tokens or outputs there
    are."""
    rng = np.random.default_rng(1)
    n, length = 5, 4
    given = rollouts(rng, n, length)
    now = -3 + 0.1 * rng.normal(size=(n, length))
    options = {**GRPO_PRESETS[preset_name], "average": average, "empty": empty, "length": 9}
    output, saved = grpo_forward(now, **given, **options)
    counted = given["mask"].any(axis=1) if empty == "left_out" else np.ones(n, bool)
    whole = float(given["mask"].sum() if average == "token" else counted.sum())
    loss, gradient = 0.0, []
    for rows in (slice(0, 1), slice(1, 4), slice(4, 5)):
        one = {name: x[rows] for name, x in given.items()}
        part, part_saved = grpo_forward(now[rows], **one, **options, normaliser=whole)
        loss += float(part.loss)
        gradient.append(grpo_backward(1.0, part_saved))
    assert loss == pytest.approx(float(output.loss), rel=TOLERANCE)
    assert_sums({"": np.concatenate(gradient)}, {"": grpo_backward(1.0, saved)})


@pytest.mark.parametrize("cuts", [[3], [0, 2, 6]])
def test_grpo_on_pieces_of_outputs(cuts: list[int]) -> None:
    """The pieces' log-probabilities are gathered, since ratios and lengths are of whole outputs;
    each piece gets its own part of the gradient back."""
    config = replace(SMALL, mtp_depth=0, balance_weight=0.0)
    params, rng = random_parameters(config), np.random.default_rng(2)
    tokens, targets = rng.integers(0, 31, (2, 2, 6))
    given = rollouts(rng, 2, 6)
    settings: dict[str, Any] = {"ratio": "sequence_mean", "average": "sequence"}

    def run(part: Part, gather: Any, rank: int, ops: Any) -> tuple[float, dict[str, Any]]:
        part = filled(part, 0)
        arrays = {name: x for name, x in part.arrays.items() if name not in ("targets", "mask")}
        output, saved = forward(params, config=config, with_loss=False, ops=ops, **arrays)
        log_prob, kept = log_prob_forward(
            output.hidden, params[HEAD], targets=part.arrays["targets"], temperature=0.7
        )
        pieces = gather(log_prob[:, : part_length(part)])
        grpo, grpo_saved = grpo_forward(np.concatenate(pieces, axis=1), **given, **settings)
        ends = np.cumsum([x.shape[1] for x in pieces])
        dlog_prob = np.zeros_like(log_prob)
        own = slice(ends[rank] - pieces[rank].shape[1], ends[rank])
        dlog_prob[:, : pieces[rank].shape[1]] = grpo_backward(1.0, grpo_saved)[:, own]
        dhidden, dw = log_prob_backward(dlog_prob, kept)
        gradients = backward(saved, dhidden=dhidden)
        return float(grpo.loss), gradients | {HEAD: gradients[HEAD] + dw}

    def part_length(part: Part) -> int:
        real = part.arrays.get("key_mask")
        return part.arrays["tokens"].shape[1] if real is None else int(real[0].sum())

    arrays = {"tokens": tokens, "targets": targets, "mask": given["mask"]}
    loss, gradients = run(Part(arrays, 0), lambda x: [x], 0, REFERENCE)

    def piece(part: Part, exchange: Exchange) -> Any:
        return run(part, exchange.gather, exchange.rank, exchanging(REFERENCE, exchange))

    parts = by_positions(arrays, cuts, config)
    each = side_by_side([partial(piece, part) for part in parts])
    assert all(x == pytest.approx(loss, rel=TOLERANCE) for x, _ in each)
    assert_sums(summed([g for _, g in each]), gradients)


def test_biases_move_once_per_batch() -> None:
    """By the whole batch's loads; the sum of what the parts' own loads would do is another step."""
    config = replace(SMALL, mtp_depth=0)
    params = random_parameters(config)
    tokens = np.random.default_rng(3).integers(0, 31, (4, 5))
    whole = forward(params, tokens, config)[0].loads[1]
    parts = by_rows({"tokens": tokens}, [1, 3])
    loads = [output.loads[1] for output, _ in run_parts(params, parts, config)]
    bias = np.zeros(config.experts)
    step = bias_update(bias, whole, 0.001)
    assert np.array_equal(bias_update(bias, sum(loads), 0.001), step)
    assert not np.array_equal(sum(bias_update(bias, load, 0.001) for load in loads), step)


def test_positions_of_every_row() -> None:
    """[T] stands for all rows, in parts as in a batch."""
    config = replace(SMALL, mtp_depth=0)
    params = random_parameters(config)
    arrays = {
        "tokens": np.random.default_rng(5).integers(0, 31, (3, 6)),
        "positions": np.arange(6) + 4,
    }
    output, _ = forward(params, config=config, **arrays)
    for parts, pieces in (
        (by_rows(arrays, [1, 2]), False),
        (by_positions(arrays, [2], config), True),
    ):
        each = run_parts(params, parts, config, pieces=pieces)
        assert sum(float(o.loss) for o, _ in each) == pytest.approx(float(output.loss), rel=1e-12)


@pytest.mark.parametrize(
    ("arrays", "cut", "message"),
    [
        (
            {},
            lambda a: by_rows(a, [1, 2]),
            r"sizes must be at least 0 and add up to B=2, got \[1, 2\]",
        ),
        ({}, lambda a: by_rows(a, [3, -1]), r"sizes must be .* got \[3, -1\]"),
        ({}, lambda a: by_positions(a, [5], SMALL), r"cuts must lie in 0…T=4, in order, got \[5\]"),
        ({}, lambda a: by_positions(a, [2, 1], SMALL), r"cuts must .* got \[2, 1\]"),
    ],
)
def test_errors(arrays: dict[str, Any], cut: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cut({"tokens": np.zeros((2, 4), int), **arrays})


def test_a_failing_piece_fails_the_run() -> None:
    """Its own error is raised; the others do not wait for ever."""

    def fail(exchange: Exchange) -> None:
        if exchange.rank == 1:
            raise RuntimeError("piece 1")
        exchange.gather(0)

    with pytest.raises(RuntimeError, match="piece 1"):
        side_by_side([fail, fail, fail])


def test_a_wrong_ring_shows() -> None:
    """Keys' gradients that are not sent back, and keys of later pieces."""
    config = replace(SMALL, mtp_depth=0)
    params = random_parameters(config)
    tokens = np.random.default_rng(4).integers(0, 31, (2, 6))
    _, saved = forward(params, tokens, config)
    parts = by_positions({"tokens": tokens}, [2, 4], config)
    whole = whole_of(parts, config)

    def keeps_gradients(part: Part, exchange: Exchange) -> dict[str, Any]:
        right = exchanging(REFERENCE, exchange)

        def lost(do: Any, saved: Any) -> Any:
            dq, *rest = right.attention.backward(do, saved)
            own = [x if exchange.rank == 2 else 0 * x for x in rest]
            return dq, *own

        ops = right | {"attention": Op(right.attention.forward, lost)}
        _, kept = forward(
            params, config=config, whole=whole, follow=part.follow, ops=ops, **part.arrays
        )
        return backward(kept)

    wrong = summed(side_by_side([partial(keeps_gradients, part) for part in parts]))
    with pytest.raises(AssertionError, match="is off by"):
        assert_sums(wrong, backward(saved))


def test_the_page_s_numbers() -> None:
    """Its code asserts every number of its table."""
    page = (ROOT / "derivations" / "splits.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    exec(compile(code, "splits.md", "exec"), {})
