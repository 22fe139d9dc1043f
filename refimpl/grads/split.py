"""How a batch may be split over micro-batches, ranks and pieces of sequences, each part's gradient
by the term of the loss that it belongs to, and the wrong ways of adding them up.

Every gradient of a split run is Σ c · G: G the gradient of one part's undivided sum of one term,
`term_gradients`; c what its count makes of it. Right and wrong runs differ in c alone, `rules`, but
for the balance loss, whose statistics may be those of the wrong set of tokens. Derivation:
derivations/splits.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from ..batch import Whole
from ..config import ModelConfig
from ..model import backward, forward
from ..ops import REFERENCE, AnyOp, Op, Ops
from ..parameters import head_name, is_buffer
from ..splits import Part, by_positions, by_rows, counts, run_parts
from .grpo import GRPO

__all__ = [
    "SPEC",
    "Split",
    "TermCounts",
    "rules",
    "split_batch",
    "term_counts",
    "term_gradient",
    "term_gradients",
]

# how a split is written
SPEC = "micro_batches=M, or rows=2+3+1, or positions=8+16, each with ,ranks=R"
LEAVES_OUT = 1e300  # a count that makes a term vanish
BALANCE, OF_PART = "balance", "balance_of_part"
POLICY = "grpo"


class Split(NamedTuple):
    """A batch in parts: which rows, or which pieces of sequences."""

    parts: list[Part]
    rows: list[np.ndarray]  # of the batch, in each part
    pieces: bool  # of sequences, not micro-batches of rows
    ranks: int


class TermCounts(NamedTuple):
    """What the sum of a term is divided by, per part."""

    own: list[float]  # that count in the part
    positions: list[float]  # all of the part's, padding and what does not count included
    main: list[float]  # that count in the part's main loss


def split_batch(spec: str, arrays: dict[str, Any], config: ModelConfig) -> Split:
    """The parts that ``spec`` asks for, as in `SPEC`; ValueError if it is not so or does not fit
    the batch."""
    found = re.fullmatch(
        r"(micro_batches|rows|positions)=([0-9]{1,9}(?:\+[0-9]{1,9})*)(?:,ranks=([0-9]{1,6}))?",
        spec,
    )
    if found is None:
        raise ValueError(f"split must be {SPEC}, got {spec!r}")
    kind, numbers = found[1], [int(n) for n in found[2].split("+")]
    rows = np.arange(len(arrays["tokens"]))
    if kind == "positions":
        parts = by_positions(arrays, numbers, config)
    elif kind == "rows":
        parts = by_rows(arrays, numbers)
    else:
        many = numbers[0]
        if len(numbers) > 1 or not 1 <= many <= len(rows):
            raise ValueError(f"split: micro_batches must lie in 1…B={len(rows)}, got {found[2]}")
        numbers = [len(x) for x in np.array_split(rows, many)]
        parts = by_rows(arrays, numbers)
    ranks = int(found[3] or len(parts))
    if ranks < 1:
        raise ValueError(f"split: ranks must be at least 1, got {ranks}")
    pieces = kind == "positions"
    held = [rows] * len(parts) if pieces else np.split(rows, np.cumsum(numbers)[:-1])
    return Split(parts, held, pieces, ranks)


def terms(config: ModelConfig, grpo: GRPO | None = None) -> list[str]:
    """The terms of a model's loss, the balance loss in two ways."""
    if grpo is not None:
        return [POLICY, *([BALANCE, OF_PART] if config.balance_weight else [])]
    mtp = [f"mtp.{depth}" for depth in range(1, config.mtp_depth + 1)]
    return ["main", *mtp, *([BALANCE, OF_PART] if config.balance_weight else [])]


def term_counts(
    split: Split, config: ModelConfig, grpo: GRPO | None = None
) -> dict[str, TermCounts]:
    """The counts of each term, in whose sums over the parts the right divisors consist."""
    each = [counts(part, config) for part in split.parts]
    main = [whole.targets or 0.0 for whole in each]
    sizes = [part.arrays["tokens"].shape for part in split.parts]
    positions = [
        float(rows * (length - part.follow))
        for (rows, length), part in zip(sizes, split.parts, strict=True)
    ]
    found = {"main": TermCounts(main, positions, main)}
    if grpo is not None:
        found = {POLICY: _policy_counts(split, grpo, positions)}
    for depth in range(1, config.mtp_depth + 1):
        own = [whole.mtp[depth - 1] for whole in each]
        found[f"mtp.{depth}"] = TermCounts(own, positions, main)
    if config.balance_weight:
        sequences = [whole.sequences or 0.0 for whole in each]
        found[BALANCE] = TermCounts(sequences, positions, main)
        found[OF_PART] = TermCounts([float(n > 0) for n in positions], positions, main)
    return found


def _policy_counts(split: Split, grpo: GRPO, positions: list[float]) -> TermCounts:
    """Tokens or outputs, whichever the average is over."""
    masks = [part.arrays["mask"] for part in split.parts]
    if grpo.told["average"] == "token":
        own = [float(mask.sum()) for mask in masks]
        return TermCounts(own, positions, own)
    counted = [mask.any(axis=1) | (grpo.told["empty"] == "counted") for mask in masks]
    outputs = [float(rows.sum()) for rows in counted]
    return TermCounts(outputs, outputs, outputs)


def rules(term: str, count: TermCounts, ranks: int) -> dict[str, list[float]]:
    """What each part's sum of a term is multiplied by, by the name of the rule; the right one is
    ``right``."""
    whole, parts = float(sum(count.own)), len(count.own)
    nothing = [0.0] * parts
    if term == OF_PART:
        share = 1 / whole if whole else 0.0
        alone = [share if n else 0.0 for n in count.own]
        return {"right": nothing, "the statistics of each part alone": alone}
    means = [1 / n if n else 0.0 for n in count.own]
    share = 1 / whole if whole else 0.0
    found = {
        "right": [share] * parts,
        "the mean of the parts' means": [mean / parts for mean in means],
        "the sum of the parts' means (× micro-batches)": means,
        "divided by the ranks twice": [share / ranks] * parts,
        "divided by the ranks never": [share * ranks] * parts,
        "left out": nothing,
    }
    if count.positions != count.own and term != BALANCE:
        found["every position counted, padding too"] = [1 / sum(count.positions)] * parts
    if (term.startswith("mtp.") or term in (BALANCE, OF_PART)) and sum(count.main) > 0:
        found["each part's mean, weighted by its main count"] = [
            mean * n / sum(count.main) for mean, n in zip(means, count.main, strict=True)
        ]
    if term.startswith("mtp.") and sum(count.main) > 0:
        found["divided by the main loss's count"] = [1 / sum(count.main)] * parts
        found["the mean of the parts' sums over their main counts"] = [
            1 / n / parts if n else 0.0 for n in count.main
        ]
    return found


def term_gradients(
    params: Mapping[str, Any],
    split: Split,
    config: ModelConfig,
    ops: Ops = REFERENCE,
    grpo: GRPO | None = None,
) -> dict[str, list[tuple[float, dict[str, Any]]]]:
    """Of each term and part the undivided sum and its gradient, λ and α included."""
    found = {}
    for term in terms(config, grpo):
        if term == POLICY:
            assert grpo is not None
            found[term] = [
                policy_gradient(params, part, rows, config, ops, grpo)
                for part, rows in zip(split.parts, split.rows, strict=True)
            ]
            continue
        found[term] = term_gradient(params, split, config, ops, term)
    return found


def term_gradient(
    params: Mapping[str, Any], split: Split, config: ModelConfig, ops: Ops, term: str
) -> list[tuple[float, dict[str, Any]]]:
    """One term's undivided sum over each part, and its gradient. That of a piece reaches the keys
    of earlier ones, so each piece's comes from a run of all, in which no other counts."""
    parts, balanced = split.parts, term in (BALANCE, OF_PART)
    depths = range(1, config.mtp_depth + 1)
    mtp = tuple(1.0 if term == f"mtp.{depth}" else LEAVES_OUT for depth in depths)
    counted = Whole(1.0 if term == "main" else LEAVES_OUT, mtp, 1.0)
    left_out = Whole(LEAVES_OUT, (LEAVES_OUT,) * config.mtp_depth, LEAVES_OUT)

    def run(whole: list[Whole]) -> list[tuple[float, dict[str, Any]]]:
        each = run_parts(
            params,
            parts,
            config if balanced else replace(config, balance_weight=0.0),
            whole=whole,
            pieces=split.pieces,
            ops=ops | {"balance_loss": of_part(ops)} if term == OF_PART else ops,
            exchange_balance=term != OF_PART,
        )
        return [(float(output.loss or 0.0), gradients) for output, gradients in each]

    if not split.pieces:
        return run([counted] * len(parts))
    found = []
    for own in range(len(parts)):
        each = run([counted if n == own else left_out for n in range(len(parts))])
        total = {name: sum(gradients[name] for _, gradients in each) for name in each[0][1]}
        found.append((each[own][0], total))
    return found


def policy_gradient(
    params: Mapping[str, Any],
    part: Part,
    rows: np.ndarray,
    config: ModelConfig,
    ops: Ops,
    grpo: GRPO,
) -> tuple[float, dict[str, Any]]:
    """GRPO's undivided sum over the outputs of a part, and its gradient."""
    given = {name: x for name, x in part.arrays.items() if name not in ("mask", "targets")}
    if not len(rows):
        return 0.0, {name: np.zeros_like(p) for name, p in params.items() if not is_buffer(name)}
    output, saved = forward(params, config=config, with_loss=False, ops=ops, **given)
    targets, mask = part.arrays["targets"], part.arrays["mask"]
    head = head_name(config)
    log_prob, log_prob_saved = ops.log_prob.forward(
        output.hidden, params[head], targets=targets, mask=mask, temperature=grpo.temperature
    )
    arguments: dict[str, Any] = {
        name: x[rows] if isinstance(x, np.ndarray) else x
        for name, x in grpo.arguments(log_prob.dtype).items()
    }
    loss, policy_saved = ops.grpo.forward(log_prob, **arguments | {"normaliser": 1.0})
    dhidden, dw = ops.log_prob.backward(ops.grpo.backward(1.0, policy_saved), log_prob_saved)
    gradients = backward(saved, dhidden=dhidden)
    return float(loss.loss), gradients | {head: gradients[head] + dw}


def of_part(ops: Ops) -> AnyOp:
    """The balance loss with the statistics of all tokens of the part at once."""

    def forward(scores: Any, *, counted: Any, mask: Any, **settings: Any) -> Any:
        settings |= {"cut": None}
        scores_of_all, counted, mask = (
            None if x is None else x.reshape(1, -1, *x.shape[2:]) for x in (scores, counted, mask)
        )
        loss, saved = ops.balance_loss.forward(
            scores_of_all, counted=counted, mask=mask, **settings
        )
        return loss, (saved, scores.shape)

    def backward(dloss: Any, saved: Any) -> Any:
        inner, shape = saved
        return ops.balance_loss.backward(dloss, inner).reshape(shape)

    return Op(forward, backward)
