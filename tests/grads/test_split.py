"""What a split run makes of each term: the right sum is the whole batch's gradient, and each wrong
rule is what a program with that mistake computes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refimpl.batch import Whole
from refimpl.checkpoint.source import MemorySource
from refimpl.checkpoint.tensor_file import read_tensor_file
from refimpl.config import Conventions, ModelConfig
from refimpl.grads import GRPO, Request, write_gradients
from refimpl.grads.split import Split, TermCounts, rules, split_batch, term_counts, term_gradients
from refimpl.model import backward, forward
from refimpl.splits import counts, run_parts

from drawn_batches import SMALL
from random_parameters import random_parameters

CONFIG = replace(SMALL, mtp_depth=2, conventions=Conventions(mtp_normaliser="valid"))
RNG = np.random.default_rng(0)
ARRAYS: dict[str, Any] = {
    "tokens": RNG.integers(0, 31, (5, 8)),
    "key_mask": np.arange(8) < np.array([[8], [5], [7], [6], [8]]),
}
SPECS = ["micro_batches=2", "rows=1+0+3+1", "positions=3+5,ranks=2"]


def added(
    found: dict[str, list[tuple[float, dict[str, Any]]]], factors: dict[str, list[float]]
) -> tuple[float, dict[str, Any]]:
    """Σ c · (loss, gradient) over terms and parts."""
    weighted = [
        (c, loss, gradients)
        for term, each in factors.items()
        for c, (loss, gradients) in zip(each, found[term], strict=True)
    ]
    names = weighted[0][2]
    total = {name: sum(c * g[name] for c, _, g in weighted) for name in names}
    return sum(c * loss for c, loss, _ in weighted), total


def assert_same(found: tuple[float, dict[str, Any]], wanted: tuple[float, dict[str, Any]]) -> None:
    assert found[0] == pytest.approx(wanted[0], rel=1e-12)
    for name, x in wanted[1].items():
        assert np.max(np.abs(found[1][name] - x)) <= 1e-12 * np.max(np.abs(x)), name


def chosen(split: Split, config: ModelConfig, rule: str, *only: str) -> dict[str, list[float]]:
    """The factors of ``rule`` for the terms ``only``, the right ones for all others."""
    return {
        term: rules(term, count, split.ranks)[rule if term in only else "right"]
        for term, count in term_counts(split, config).items()
    }


@pytest.mark.parametrize("spec", SPECS)
def test_right_sums(spec: str) -> None:
    params = random_parameters(CONFIG)
    split = split_batch(spec, ARRAYS, CONFIG)
    found = term_gradients(params, split, CONFIG)
    output, saved = forward(params, config=CONFIG, **ARRAYS)
    wanted = float(output.loss), backward(saved)
    assert_same(added(found, chosen(split, CONFIG, "right")), wanted)


def test_the_mean_of_means_is_what_separate_runs_average() -> None:
    """Every micro-batch on its own, then the average: a usual training loop's gradient."""
    params = random_parameters(CONFIG)
    split = split_batch("rows=1+3+1", ARRAYS, CONFIG)
    found = term_gradients(params, split, CONFIG)
    alone = [run_parts(params, [part], CONFIG)[0] for part in split.parts]
    loss = sum(float(output.loss) for output, _ in alone) / 3
    gradients = {name: sum(g[name] for _, g in alone) / 3 for name in alone[0][1]}
    rule = "the mean of the parts' means"
    terms = ("main", "mtp.1", "mtp.2", "balance")
    assert_same(added(found, chosen(split, CONFIG, rule, *terms)), (loss, gradients))


def test_ranks_that_divide_by_their_own_counts() -> None:
    """The same on pieces of sequences: what a rank makes of its loss reaches the keys of earlier
    ranks, so that the parts' gradients are those of their losses, whoever holds the tokens."""
    config = replace(CONFIG, balance_weight=0.0)
    params = random_parameters(config)
    split = split_batch("positions=2+3", ARRAYS, config)
    found = term_gradients(params, split, config)
    own = [counts(part, config) for part in split.parts]
    wholes = [Whole(3 * (c.targets or 0), tuple(3 * n for n in c.mtp), 1.0) for c in own]
    ranks = run_parts(params, split.parts, config, whole=wholes, pieces=True)
    loss = sum(float(output.loss) for output, _ in ranks)
    gradients = {name: sum(g[name] for _, g in ranks) for name in ranks[0][1]}
    rule = "the mean of the parts' means"
    assert_same(
        added(found, chosen(split, config, rule, "main", "mtp.1", "mtp.2")), (loss, gradients)
    )


def test_one_piece_s_targets() -> None:
    """The gradient of a piece's sum is that of the whole, uncut, with its targets alone."""
    config = replace(CONFIG, balance_weight=0.0, mtp_depth=0)
    params = random_parameters(config)
    found = term_gradients(params, split_batch("positions=3+5", ARRAYS, config), config)["main"]
    targets = np.roll(ARRAYS["tokens"], -1, axis=1)
    counted = ARRAYS["key_mask"] & np.roll(ARRAYS["key_mask"], -1, axis=1) & (np.arange(8) < 7)
    for piece, (loss, gradients) in zip((range(3), range(3, 5), range(5, 8)), found, strict=True):
        mask = counted & np.isin(np.arange(8), piece)
        output, saved = forward(
            params, config=config, targets=targets, mask=mask, whole=Whole(1.0), **ARRAYS
        )
        assert_same((loss, gradients), (float(output.loss), backward(saved)))


def test_statistics_of_the_micro_batch() -> None:
    """f and P over all tokens of a micro-batch: the balance loss of its rows as one sequence."""
    config = replace(CONFIG, mtp_depth=0, layers=1, dense_layers=0)
    params = random_parameters(config)
    arrays = {"tokens": ARRAYS["tokens"]}
    split = split_batch("micro_batches=2", arrays, config)
    found = term_gradients(params, split, config)
    for part, (loss, _) in zip(split.parts, found["balance_of_part"], strict=True):
        output, _ = forward(params, config=config, **part.arrays)
        scores = 1 / (1 + np.exp(-router_logits(params, part.arrays["tokens"], config)))
        scores = scores.reshape(-1, config.experts)
        chosen = output.routes[0].counted.reshape(-1)
        f = np.bincount(chosen, minlength=config.experts) * config.experts / len(chosen)
        p = np.mean(scores / scores.sum(axis=-1, keepdims=True), axis=0)
        assert loss == pytest.approx(config.balance_weight * np.sum(f * p), rel=1e-12)
    assert sum(x for x, _ in found["balance"]) / 5 != pytest.approx(
        sum(x for x, _ in found["balance_of_part"]) / 2, rel=1e-3
    )


def router_logits(params: Any, tokens: np.ndarray, config: ModelConfig) -> np.ndarray:
    """What the gate of layer 0 reads, by taking the network out of the model."""
    _, saved = forward(params, tokens, config)
    router = saved.blocks[0].network.router
    return np.asarray(router.x @ router.w.T)


def test_pieces_with_statistics_of_their_own() -> None:
    """A rank that counts its own tokens alone, of a sequence that lies on several."""
    params = random_parameters(CONFIG)
    split = split_batch("positions=3", ARRAYS, CONFIG)
    found = term_gradients(params, split, CONFIG)
    right = sum(x for x, _ in found["balance"])
    assert sum(x for x, _ in found["balance_of_part"]) != pytest.approx(right, rel=1e-3)


def test_rules() -> None:
    """Two parts of 1 and 3 counted targets among 4 positions each, two ranks, by hand."""
    count = TermCounts([1.0, 3.0], [4.0, 4.0], [2.0, 4.0])
    found = rules("mtp.1", count, 2)
    assert found == {
        "right": [1 / 4, 1 / 4],
        "the mean of the parts' means": [1 / 2, 1 / 6],
        "the sum of the parts' means (× micro-batches)": [1, 1 / 3],
        "divided by the ranks twice": [1 / 8, 1 / 8],
        "divided by the ranks never": [1 / 2, 1 / 2],
        "left out": [0, 0],
        "every position counted, padding too": [1 / 8, 1 / 8],
        "each part's mean, weighted by its main count": [2 / 6, 4 / 6 / 3],
        "divided by the main loss's count": [1 / 6, 1 / 6],
        "the mean of the parts' sums over their main counts": [1 / 4, 1 / 8],
    }
    assert set(rules("balance", count, 2)) == {*list(found)[:6], list(found)[7]}
    alone = rules("balance_of_part", TermCounts([1.0, 0.0], [4.0, 0.0], [2.0, 0.0]), 2)
    assert alone == {"right": [0, 0], "the statistics of each part alone": [1, 0]}
    assert rules("main", TermCounts([0.0, 2.0], [4.0, 4.0], [0.0, 2.0]), 2)["right"] == [1 / 2] * 2


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("rows=1+1", r"sizes must be at least 0 and add up to B=5, got \[1, 1\]"),
        ("positions=9", r"cuts must lie in 0…T=8"),
        ("micro_batches=6", "micro_batches must lie in 1…B=5, got 6"),
        ("micro_batches=1+1", "micro_batches must lie in 1…B=5, got 1"),
        ("rows=1+4,ranks=0", "ranks must be at least 1, got 0"),
        ("rows", "split must be micro_batches=M"),
        ("rows=", "split must be"),
        ("rows=1+4,ranks", "split must be"),
        ("rows=-1+6", "split must be"),
    ],
)
def test_errors(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_batch(spec, ARRAYS, CONFIG)


def write(folder: Path, **options: Any) -> dict[str, Any]:
    """What `write_gradients` leaves of a split request: index and tensors."""
    params = random_parameters(CONFIG)
    request = Request(ARRAYS["tokens"], key_mask=ARRAYS["key_mask"], **options)
    write_gradients(MemorySource(params, CONFIG), request, folder)
    index = json.loads((folder / "index.json").read_text())
    files = {x["file"] for x in index["tensors"].values()}
    tensors = {n: x for file in files for n, x in read_tensor_file(folder / file)[0].items()}
    return index["metadata"]["split"] | {"tensors": tensors}


GRPO_GIVEN = GRPO.of(
    {
        "mask": (RNG.random((5, 8)) < np.array([[0.9], [0.2], [0.6], [0.9], [0.4]]))
        & (np.arange(1, 9) < np.array([[8], [5], [7], [6], [8]])),  # of what the key mask leaves
        "advantages": RNG.normal(size=5),
        "old_log_prob": -3 + 0.1 * RNG.normal(size=(5, 8)),
        "reference_log_prob": -3 + 0.1 * RNG.normal(size=(5, 8)),
    },
    {"average": "token", "kl_weight": 0.3},
)


@pytest.mark.parametrize(
    "options",
    [
        {"split": "rows=1+3+1", "mtp": True, "balance_alpha": 0.3},
        {"split": "positions=3+5", "mtp": True, "balance_alpha": 0.3},
        {"split": "rows=2+0+3", "grpo": GRPO_GIVEN, "balance_alpha": 0.3},
    ],
    ids=["micro-batches", "pieces", "GRPO"],
)
def test_files_of_a_split(options: dict[str, Any], tmp_path: Path) -> None:
    """The right factors of the index make the written gradients of the written parts."""
    found = write(tmp_path, **options)
    tensors = found["tensors"]
    names = [name for name in tensors if name.startswith("grad/")]
    assert names
    for name in names:
        total = sum(
            c * tensors[f"split/{part}/{term}/{name.removeprefix('grad/')}"]
            for term, by_rule in found["rules"].items()
            for part, c in enumerate(by_rule["right"])
        )
        error = np.max(np.abs(total - tensors[name]))
        assert error <= 1e-12 * np.max(np.abs(tensors[name])), f"{name} is off by {error}"
    loss = sum(
        c * x
        for term, by_rule in found["rules"].items()
        for c, x in zip(by_rule["right"], found["sums"][term], strict=True)
    )
    assert loss == pytest.approx(float(tensors["out/loss"]), rel=1e-12)


def test_grpo_by_outputs() -> None:
    """The other averages divide by outputs, with or without those that have no token."""
    arrays = {"tokens": ARRAYS["tokens"], "mask": GRPO_GIVEN.mask}
    split = split_batch("rows=2+3", arrays, CONFIG)
    tokens = [float(GRPO_GIVEN.mask[rows].sum()) for rows in split.rows]
    assert term_counts(split, CONFIG, GRPO_GIVEN)["grpo"].own == tokens
    mask = GRPO_GIVEN.mask.copy()
    mask[1] = False
    for empty, own in (("counted", [2.0, 3.0]), ("left_out", [1.0, 3.0])):
        given = replace(GRPO_GIVEN, settings={"average": "sequence", "empty": empty})
        split = split_batch("rows=2+3", {**arrays, "mask": mask}, CONFIG)
        assert term_counts(split, CONFIG, given)["grpo"].own == own


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"split": "positions=3", "grpo": GRPO_GIVEN},
            "split must be micro_batches or rows with grpo",
        ),
        ({"split": "rows=5", "dlogits": np.zeros((5, 8, 31))}, "cannot be combined with dlogits"),
        ({"split": "rows=4"}, "sizes must be at least 0"),
    ],
)
def test_requests_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Request(ARRAYS["tokens"], **options).check(
            MemorySource(random_parameters(CONFIG), replace(CONFIG, mtp_depth=0))
        )
