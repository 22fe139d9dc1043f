"""What a user sees, and the traps that look so: the index to begin at when two implementations
disagree."""

from __future__ import annotations

from .traps import TRAPS

__all__ = ["SYMPTOMS", "rows"]

SYMPTOMS: dict[str, tuple[str, ...]] = {  # what one sees, and the rows that could be its cause
    "Logits are right at position 0 and wrong later": (
        "RoPE's layout",
        "YaRN's mscale",
        "When YaRN applies",
        "MLA as it is taught",
    ),
    "Logits are right for a while and drift at late positions": (
        "When YaRN applies",
        "float64 that is not",
    ),
    "Logits are wrong at every position": (
        "The latents' norms",
        "MLA as it is taught",
        "FP8's scales",
        "The bias in the weights",
    ),
    "A few tokens are wrong, most agree": (
        "Hidden groups",
        "The gate's precision",
        "The gate's switches",
        "What a softmax gate ranks",
        "float64 that is not",
    ),
    "Right with random weights, wrong with released ones": (
        "MTP's order",
        "RoPE's layout",
        "The bias in the weights",
        "The latent norms' eps",
        "FP8's scales",
    ),
    "Right with released weights, wrong with random ones": (
        "Hidden groups",
        "The gate's switches",
        "The latent norms' eps",
    ),
    "NaN": ("The gate's precision", "FP8's floor", "k3 and its bounds"),
    "Gradients in FP8 differ by more than two orders of sums do": (
        "FP8's form of scale",
        "FP8's sums",
        "FP8's input of the weight's gradient",
        "FP8's floor",
    ),
    "Right in one batch, wrong with padding": (
        "Left padding",
        "The balance loss's counts",
        "MTP's normaliser",
        "The main loss in parts",
        "Outputs with all tokens masked",
    ),
    "Right in one micro-batch or on one rank, wrong in several": (
        "The main loss in parts",
        "MTP's count in parts",
        "The balance loss in parts",
        "GRPO's average in parts",
    ),
    "Gradients are off by the number of micro-batches or ranks": (
        "The balance loss in parts",
        "GRPO's average in parts",
        "The main loss in parts",
    ),
    "The loss is off by a constant factor": (
        "MTP's normaliser",
        "GRPO's level",
        "Outputs with all tokens masked",
        "The advantage's deviation",
    ),
    "The loss agrees, gradients do not": (
        "What MTP's gradient reaches",
        "MTP's tail",
        "k3 and its bounds",
        "The balance loss's counts",
        "The routed experts that don't run",
    ),
    "The main loss agrees, the MTP losses do not": (
        "MTP's order",
        "MTP's hidden state",
        "MTP's normaliser",
        "MTP's count in parts",
        "MTP at position 0",
    ),
    "The first draft is accepted as often as elsewhere, later ones are not": (
        "MTP's hidden state",
        "MTP at position 0",
    ),
    "Only the gates' gradients differ": (
        "The balance loss's counts",
        "MTP's tail",
        "The gate's switches",
    ),
    "Some gradients are zero": (
        "The routed experts that don't run",
        "What MTP's gradient reaches",
        "k3 and its bounds",
        "The clip's width",
        "FP8's floor",
    ),
    "Expert loads or biases drift apart over steps": (
        "The bias's update",
        "MTP's tail",
        "The gate's precision",
    ),
    "An error of 1e-7 or of 1e-3 does not shrink in float64": ("float64 that is not",),
    "Rewards and outputs agree, the policy's loss does not": (
        "GRPO's level",
        "The advantage's deviation",
        "k3 and its bounds",
        "The clip's width",
        "Outputs with all tokens masked",
    ),
    "Parameter counts differ": ("Active parameters",),
}


def rows(symptom: str) -> list[int]:
    """The numbers of the traps that look so, likeliest first."""
    titles = [trap.title for trap in TRAPS]
    return [titles.index(title) + 1 for title in SYMPTOMS[symptom]]
