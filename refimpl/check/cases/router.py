"""Cases of `router`: both scores, groups and biases that change the choice; routes are replayed."""

from __future__ import annotations

from .draw import Case, Draw, activations, flags, weight

__all__ = ["REGIMES", "case"]

REGIMES = {  # that the cases of a run must meet
    "sigmoid",
    "softmax",
    "grouped",
    "ungrouped",
    "biased",
    "unbiased",
    "negative_bias",
    "normalised",
    "raw",
    "epsilon",
    "one_choice",
    "by_logits",
}


def case(draw: Draw) -> Case:
    """A drawn case of `router`, with the regimes that it meets."""
    b = draw.integer(1, 3)
    t = draw.integer(1, 4)
    d = draw.integer(2, 6)
    groups = draw.choice([1, 2, 4])
    experts = groups * draw.integer(2, 4)
    keep = draw.integer(1, groups)
    top_k = draw.integer(1, min(4, experts // groups * keep))
    bias = draw.choice([None, draw.rng.normal(size=experts), -draw.rng.uniform(0.5, 1.5, experts)])
    score = draw.choice(["sigmoid", "softmax"])
    normalise = draw.choice([True, False])
    kwargs = {
        "top_k": top_k,
        "bias": bias,
        "groups": groups,
        "keep_groups": keep,
        "score": score,
        "normalise": normalise,
        "group_score": draw.choice(["top2", "max"]),
        "scale": draw.choice([0.7, 2.5]),
        "epsilon": draw.choice([0.0, 1e-20, 0.1]),
        "masked_groups": draw.choice(["-inf", "zero"]),
    }
    regimes = {score} | flags(
        grouped=keep < groups,
        ungrouped=keep == groups,
        biased=bias is not None,
        unbiased=bias is None,
        negative_bias=bias is not None and (bias < 0).all(),
        normalised=normalise and top_k > 1,
        raw=not normalise,
        epsilon=normalise and kwargs["epsilon"] > 1e-3,
        one_choice=top_k == 1,
    )
    inputs = (activations(draw, b, t, d), weight(draw, experts, d))
    kwargs["ranking"] = draw.choice(["scores", "logits"])
    regimes |= flags(by_logits=kwargs["ranking"] == "logits" and keep < groups)
    return Case(inputs, kwargs, regimes, lambda y: {"routes": y.indices})
