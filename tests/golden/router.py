"""The router, a token at a time, and the update of its biases."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from golden.case import SMALLEST_GAP, Case
from golden.linear import linear


def best(values: Sequence[float], k: int) -> list[int]:
    """The k largest, best first, of equals the lower index. ValueError if rounding could decide."""
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    for first, second in pairwise(order[: k + 1]):
        gap = values[first] - values[second]
        if 0 < gap < SMALLEST_GAP:
            raise ValueError(f"a choice hangs on a difference of {gap}: take another seed")
    return order[:k]


def select(
    biased: Sequence[float],
    top_k: int,
    groups: int,
    keep_groups: int,
    group_score: str,
    masked_groups: str,
) -> list[int]:
    """One token's experts: DeepSeek-V3 eq. 14 with DeepSeek-V2 (2405.04434) section 2.2.2's limit
    on groups."""
    size = len(biased) // groups
    members = [range(g * size, (g + 1) * size) for g in range(groups)]
    taken = 2 if group_score == "top2" else 1
    kept = best(
        [sum(sorted((biased[i] for i in m), reverse=True)[:taken]) for m in members], keep_groups
    )
    hidden = -math.inf if masked_groups == "-inf" else 0.0
    return best([biased[i] if i // size in kept else hidden for i in range(len(biased))], top_k)


def router(
    x: Tensor,
    w: Tensor,
    *,
    top_k: int,
    bias: Tensor | None = None,
    groups: int = 1,
    keep_groups: int = 1,
    group_score: str = "top2",
    score: str = "sigmoid",
    normalise: bool = True,
    scale: float = 1.0,
    epsilon: float = 0.0,
    masked_groups: str = "-inf",
    ranking: str = "scores",
    routes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """DeepSeek-V3 eq. 13-16, or V2's softmax gate: (weights, unbiased scores, indices), a token at
    a time."""
    z = linear(x, w)
    scores = torch.sigmoid(z) if score == "sigmoid" else torch.softmax(z, -1)
    ranked = (scores if ranking == "scores" else z).flatten(0, -2)
    rows, flat_routes = (
        scores.flatten(0, -2),
        None if routes is None else routes.flatten(0, -2).tolist(),
    )
    weights, indices = [], []
    for m in range(len(rows)):
        if flat_routes is None:
            biased = (ranked[m] if bias is None else ranked[m] + bias).tolist()
            chosen = select(biased, top_k, groups, keep_groups, group_score, masked_groups)
        else:
            chosen = flat_routes[m]
        s = torch.stack([rows[m, i] for i in chosen])
        weights.append(scale * s / (s.sum() + epsilon) if normalise else scale * s)
        indices.append(chosen)
    lead = x.shape[:-1]
    return torch.stack(weights).unflatten(0, lead), scores, torch.tensor(indices).unflatten(0, lead)


def repeated(case: Case, batch: int, length: int, width: int) -> np.ndarray:
    """Random tokens, two of them alike."""
    x = case.rng.standard_normal((batch, length, width))
    x[0, -1] = x[1, 0] = x[0, 0]
    return x


def cases() -> Iterable[Case]:
    v3 = {"top_k": 3, "groups": 4, "keep_groups": 2, "scale": 2.5}
    v2 = {
        "groups": 3,
        "keep_groups": 2,
        "group_score": "max",
        "score": "softmax",
        "normalise": False,
    }
    settings: tuple[tuple[str, int, dict[str, Any]], ...] = (
        ("v3", 8, v3 | {"group_score": "top2", "score": "sigmoid", "normalise": True}),
        ("v3_zero", 8, v3 | {"masked_groups": "zero"}),
        ("v3_scores_alone", 8, v3),
        ("v2", 9, v2 | {"top_k": 4, "scale": 1.7}),
        ("softmax_normalised", 7, {"top_k": 2, "score": "softmax", "epsilon": 0.1, "scale": 0.6}),
        ("softmax_logits", 8, v3 | {"score": "softmax", "ranking": "logits"}),
        ("epsilon", 8, v3 | {"epsilon": 0.2}),
        ("one_choice", 5, {"top_k": 1, "normalise": True, "epsilon": 0.3}),
        ("ties", 8, v3),
        ("routes", 8, v3),
    )
    for name, experts, options in settings:
        case = Case(f"router/{name}", **options)
        x = case.input("x", values=repeated(case, 2, 5, 6))
        gate = case.rng.standard_normal((experts, 6)) * (0.3 if name == "v2" else 0.7)
        given: dict[str, Any] = {}
        if name == "ties":
            gate[[1, 2, 5, 6, 7]] = (
                0  # score 1/2 exactly, in groups of (one, two, one, two) such experts
            )
        w = case.input("w", values=gate)
        if name == "ties":
            given["bias"] = case.aux("bias", np.full(experts, -0.75))
        elif name != "v2" and name != "one_choice":
            # Almost every biased score is negative, and expert 4 is never chosen.
            bias = -0.9 + 0.3 * case.rng.standard_normal(experts)
            bias[4] = -30.0 if experts == 8 else -0.2
            given["bias"] = case.aux("bias", bias)
        if name == "routes":
            wild = [
                [case.rng.permutation(experts)[: options["top_k"]] for _ in range(5)]
                for _ in range(2)
            ]
            given["routes"] = case.aux("routes", wild)
        weights, scores, indices = router(x, w, **options, **given)
        if name == "v3":
            other = router(x, w, **options, **given, masked_groups="zero")[2]
            if (other == indices).all() or 4 in indices or len(indices.unique()) < 6:
                raise ValueError(
                    "zeros for -inf must change the choice, and all experts but 4 be in use"
                )
        if name == "softmax_logits":
            if (router(x, w, **(options | {"ranking": "scores"}), **given)[2] == indices).all():
                raise ValueError("the ranking must change the choice")
        if name == "v2":
            for mistake in ({"groups": 1, "keep_groups": 1}, {"group_score": "top2"}):
                if (router(x, w, **(options | mistake))[2] == indices).all():
                    raise ValueError(f"{mistake} must change the choice")
        left_out = {"v3_scores_alone": ("weights",), "epsilon": ("scores",)}.get(name, ())
        yield case.finish(left_out, weights=weights, scores=scores, indices=indices)
    yield from bias_update_cases()


def count(indices: Tensor, experts: int, mask: Tensor | None = None) -> Tensor:
    """How many tokens chose each expert."""
    load = torch.zeros(experts, dtype=torch.int64)
    for m, chosen in enumerate(indices.flatten(0, -2).tolist()):
        for i in chosen:
            load[i] += int(mask is None or bool(mask.flatten()[m]))
    return load


def bias_update_cases() -> Iterable[Case]:
    """DeepSeek-V3 section 2.1.2: gamma up below the mean load, down above it, and 0 at it."""
    choices = [[[0, 1], [0, 3], [0, 1], [4, 1]], [[3, 0], [1, 0], [1, 0], [1, 2]]]
    mask = [[True, True, True, True], [True, True, True, False]]
    for centre in (False, True):
        case = Case(
            f"router/bias_update{'_centred' if centre else ''}",
            gamma=0.013,
            centre=centre,
            experts=7,
        )
        bias = case.aux("bias", case.rng.standard_normal(7))
        load = count(case.aux("indices", choices), 7, case.aux("mask", mask))
        mean = load.sum().item() / 7
        step = torch.tensor(
            [0.013 * ((n < mean) - (n > mean)) for n in load.tolist()], dtype=torch.float64
        )
        yield case.finish(load=load, bias=bias + step - (step.sum() / 7 if centre else 0))
    case = Case("router/bias_update_at_mean", gamma=0.5, centre=False, experts=4)
    bias = case.aux("bias", case.rng.standard_normal(4))
    load = count(case.aux("indices", [[0, 1], [0, 2]]), 4)  # mean 1: two experts sit on it
    yield case.finish(load=load, bias=bias + torch.tensor([-0.5, 0.0, 0.0, 0.5]))
