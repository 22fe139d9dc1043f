"""Cases of `mtp`: both orders of embedding and hidden state."""

from __future__ import annotations

from .draw import Case, Draw, activations, norm_weight, weight

__all__ = ["REGIMES", "case"]

REGIMES = {"embedding_hidden", "hidden_embedding"}  # that the cases of a run must meet


def case(draw: Draw) -> Case:
    """A drawn case of `mtp`, with the regimes that it meets."""
    b = draw.integer(1, 3)
    t = draw.integer(1, 4)
    d = draw.integer(2, 6)
    order = draw.choice(["embedding_hidden", "hidden_embedding"])
    inputs = (
        draw.rng.normal(size=(b, t, d)),
        activations(draw, b, t, d),
        norm_weight(draw, d),
        norm_weight(draw, d),
        weight(draw, d, 2 * d),
    )
    return Case(inputs, {"eps": draw.choice([0.1, 0.5]), "order": order}, {order})
