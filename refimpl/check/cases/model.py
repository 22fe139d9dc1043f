"""Cases of the whole model as one op: with its own loss, with GRPO's, and with everything the other
way round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ... import model as reference_model
from ... import ops
from ...array import library
from ...config import CONVENTIONS, Conventions, ModelConfig, preset
from ...model import Route
from ...ops import AnyOp, Op, Ops
from ...parameters import HEAD, is_buffer, parameter_shapes
from .draw import Case, Draw, norm_weight

__all__ = ["model_case", "model_grpo_case", "model_variant"]


def _parameters(
    draw: Draw, config: ModelConfig
) -> tuple[dict[str, np.ndarray], list[str], Callable[[Sequence[Any]], dict[str, Any]]]:
    """All parameters, normal with std 0.15, norms and gate biases off neutral; the names of those
    that get a gradient; and what makes the model's dict of values for those, with the buffers
    beside them."""
    params = {
        name: draw.rng.normal(size=shape) * 0.15
        if not name.endswith("norm.weight")
        else norm_weight(draw, shape[0])
        for name, shape in parameter_shapes(config).items()
    }
    names = [name for name in params if not is_buffer(name)]

    def given(values: Sequence[Any]) -> dict[str, Any]:
        place = library(values[0]).asarray
        buffers = {name: place(x) for name, x in params.items() if is_buffer(name)}
        return dict(zip(names, values, strict=True)) | buffers

    return params, names, given


def model_grpo_case(
    draw: Draw, *, config: ModelConfig, table: Ops, length: int = 9
) -> tuple[Case, list[str], AnyOp]:
    """GRPO through the whole model as one op: hidden states, log-probabilities in blocks, the loss;
    routes replayed.

    The model runs without its own loss, so the MTP module takes no part and its gradients are
    exactly 0. Four outputs, of two questions with rewards that differ, padding, off-policy ratios
    and a reference, V3.2's KL.
    """
    config = replace(config, mtp_depth=1)
    params, names, given = _parameters(draw, config)
    tokens, row = draw.tokens((4, length), config.vocabulary), np.arange(length - 1)
    mask = (row >= 3) & (row < np.array([[length - 1], [length - 2], [length - 3], [length - 1]]))
    advantages = ops.group_advantages(draw.rng.normal(size=(2, 2)) + np.array([[0.5, -0.5]]))
    shift, away = (draw.rng.normal(size=mask.shape) for _ in range(2))

    def log_probs(
        values: Sequence[Any], routes: Any, table: Ops = table
    ) -> tuple[Any, Any, Any, Any]:
        named, place = given(values), library(values[0]).asarray
        output, saved = reference_model.forward(
            named, place(tokens), config, routes=routes, ops=table, with_loss=False
        )
        head, targets = named[HEAD], place(tokens[:, 1:])
        y, lp = table.log_prob.forward(
            output.hidden[:, :-1, :], head, targets=targets, temperature=0.8, block=(5, 60)
        )
        return y, lp, output, saved

    def forward(*values: Any, **choices: Any) -> tuple[Any, Any]:
        y, lp, output, saved = log_probs(values, choices.pop("routes", None))
        place = library(values[0]).asarray
        loss, grpo_saved = table.grpo.forward(
            y,
            advantages=place(advantages),
            mask=place(mask),
            old_log_prob=place(old),
            kl="unbiased",
            kl_weight=0.3,
            reference_log_prob=place(reference),
            clip=(0.2, 0.28),
            off_policy=0.3,
            **{name: place(choice) for name, choice in choices.items()},
        )
        return (loss.loss, loss.unclipped, loss.kept, output.routes), (grpo_saved, lp, saved)

    def backward(dy: Any, kept: Any) -> tuple[Any, ...]:
        grpo_saved, lp, saved = kept
        dh, dw_head = table.log_prob.backward(table.grpo.backward(dy, grpo_saved), lp)
        last = library(dh).concat(
            (dh, 0 * dh[:, :1, :]), axis=1
        )  # the last position predicts nothing
        grads = reference_model.backward(saved, dhidden=last)
        grads[HEAD] = grads[HEAD] + dw_head
        return tuple(grads.values())

    inputs = tuple(params[name] for name in names)
    now = log_probs(inputs, None, ops.REFERENCE)[0]
    old, reference = now - 0.3 * shift, now - 0.5 * away

    def replay(y: Any) -> dict[str, Any]:
        return {"unclipped": y[1], "kept": y[2], "routes": y[3]}

    return Case(inputs, replay=replay), names, Op(forward, backward)


def model_variant(
    config: ModelConfig, conventions: Conventions, mtp_hidden: Any = "raw"
) -> ModelConfig:
    """The config with everything the other way round: V2's gate, no query compression, no shared
    experts, a tied head, raw MTP."""
    conventions = replace(conventions, mtp_hidden=mtp_hidden, mtp_zero_first_embedding=True)
    return replace(
        config,
        q_latent=None,
        gate="softmax",
        group_score="max",
        gate_bias=False,
        normalise_weights=False,
        shared_experts=0,
        dense_layers=0,
        layers=2,
        yarn=None,
        tied=True,
        conventions=conventions,
    )


def model_case(
    draw: Draw,
    *,
    config: ModelConfig | None = None,
    convention: str = "official",
    table: Ops = ops.REFERENCE,
    length: int = 12,
    model: Any = reference_model,
    masked: bool = False,
) -> tuple[Case, list[str], AnyOp]:
    """The whole model as one op: (case, the parameters' names, the pair), routes replayed.

    Its outputs are the loss, the hidden states and the logits, so cotangents come in by all three
    ways: together, or (``masked``) the loss's from its own backward with the default dloss = 1.
    Parameters are normal with std 0.15, norms and gate biases off neutral: at std 0.006 half the
    tensors' differences drown in rounding. ``masked`` pads the first row on the left and packs two
    documents into the second. ``model`` is the module with forward and backward (a planted bug puts
    its own there).
    """
    config = config or replace(preset("tiny"), conventions=CONVENTIONS[convention])
    params, names, given = _parameters(draw, config)
    tokens, options = draw.tokens((2, length), config.vocabulary), {}
    if masked:
        start, cut = 2, length // 2
        row = np.arange(length)
        options = {
            "key_mask": np.stack([row >= start, row >= 0]),
            "segments": np.stack([0 * row, (row >= cut).astype(int)]),
            "positions": np.stack([row - start, row - cut * (row >= cut)]),
        }

    def model_forward(*values: Any, routes: dict[int, Route] | None = None) -> tuple[Any, Any]:
        named, place = given(values), library(values[0]).asarray
        placed = {name: place(x) for name, x in options.items()}
        output, saved = model.forward(
            named, place(tokens), config, routes=routes, ops=table, **placed
        )
        return (
            output.loss,
            output.hidden,
            model.logits(named, output.hidden, table),
            output.routes,
        ), saved

    def model_backward(dy: tuple[Any, Any, Any], saved: Any) -> tuple[Any, ...]:
        if not masked:
            return tuple(model.backward(saved, dloss=dy[0], dhidden=dy[1], dlogits=dy[2]).values())
        of_loss, of_others = (
            model.backward(saved),
            model.backward(saved, dhidden=dy[1], dlogits=dy[2]),
        )
        return tuple(dy[0] * of_loss[name] + of_others[name] for name in of_loss)

    case = Case(tuple(params[name] for name in names), replay=lambda y: {"routes": y[3]})
    return case, names, Op(model_forward, model_backward)
