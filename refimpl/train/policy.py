"""One call from sampled outputs, or from pairs of answers, to the gradient of every parameter.

Reinforcement and preferences train the main model alone: MTP modules take no part, so their
parameters are left out (a gradient of zeros would still let weight decay shrink them), and so is
the gate's bias, which `bias_update` moves and which must route as it did while sampling. The head's
own gradient is added here. Letters: N outputs (a row of tokens holds one, behind its prompt) or
pairs, T position, D model, K routed experts of a token, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from ..array import (
    Array,
    cast,
    expect,
    expect_mask,
    expect_that,
    fill,
    integers,
    library,
    namespace,
    number,
    take_rows,
)
from ..config import ModelConfig
from ..model import ModelOutput, Route, backward, forward
from ..ops import REFERENCE, Ops
from ..ops.grpo import loss_divisor
from ..parameters import HEAD, Parameters, head_name, parameter_shapes

__all__ = [
    "GRPOTold",
    "LogProbsSaved",
    "PreferenceTold",
    "grpo_gradients",
    "grpo_normaliser",
    "log_probs",
    "log_probs_backward",
    "main_model",
    "preference_gradients",
    "replay",
    "rewards",
]

Gradients = dict[str, Array]


class LogProbsSaved(NamedTuple):
    """What `log_probs` keeps for `log_probs_backward`."""

    output: ModelOutput  # routes and loads
    model: Any
    log_prob: Any
    head: str  # whose own gradient is added: tied, the embedding's
    ops: Ops


class GRPOTold(NamedTuple):
    """Of a part of a batch: the part's share of the loss, and means over its own tokens."""

    loss: Array  # scalar
    tokens: Array  # scalar: how many count
    clipped: Array  # scalar: the share of them whose ratio is clipped
    kl: Array | None  # scalar: mean k3 to the reference; None without one
    entropy: Array  # scalar: mean −log π of the tokens, an estimate while this policy samples them
    kept: Array  # scalar: the share of outputs that the off-policy mask keeps
    log_prob: Array  # [N, T]: this policy's
    loads: dict[int, Array]  # by MoE layer [E]


class PreferenceTold(NamedTuple):
    """What `preference_gradients` says of its pairs."""

    loss: Array  # scalar: of a part, its share
    accuracy: Array  # scalar: the share of pairs whose chosen answer has the higher reward


def main_model(params: Parameters, config: ModelConfig) -> tuple[dict[str, Array], ModelConfig]:
    """The model without its MTP modules."""
    config = replace(config, mtp_depth=0)
    return {name: params[name] for name in parameter_shapes(config) if name in params}, config


# The policy


def log_probs(
    params: Parameters,
    config: ModelConfig,
    tokens: Array,
    *,
    key_mask: Array | None = None,
    temperature: float = 1.0,
    routes: Mapping[int, Route] | None = None,
    ops: Ops = REFERENCE,
) -> tuple[Array, LogProbsSaved]:
    """log π [N, T] of the token that follows each position of ``tokens`` [N, T]; 0 at the last.

    ``key_mask`` [N, T] is False for padding, on either side; what stands there, or in front of it,
    means nothing. Logits are divided by ``temperature``. ``routes``: choices to replay (`replay`).
    """
    params, config = main_model(params, config)
    output, model = forward(
        params, tokens, config, key_mask=key_mask, routes=routes, ops=ops, with_loss=False
    )
    xp = library(tokens)
    targets = xp.concat((tokens[:, 1:], tokens[:, -1:]), axis=1)
    place = xp.arange(tokens.shape[1], device=tokens.device)
    follows = xp.broadcast_to(place[None, :] < tokens.shape[1] - 1, tokens.shape)
    head = head_name(config)
    y, saved = ops.log_prob.forward(
        output.hidden, params[head], targets=targets, mask=follows, temperature=temperature
    )
    return y, LogProbsSaved(output, model, saved, head, ops)


def log_probs_backward(dlog_prob: Array, saved: LogProbsSaved) -> Gradients:
    """The gradient of every parameter of the main model from ``dlog_prob`` [N, T]."""
    dhidden, dw = saved.ops.log_prob.backward(dlog_prob, saved.log_prob)
    gradients = backward(saved.model, dhidden=dhidden)
    return gradients | {saved.head: gradients[saved.head] + dw}


def grpo_gradients(
    params: Parameters,
    config: ModelConfig,
    tokens: Array,
    *,
    mask: Array,
    advantages: Array,
    old_log_prob: Array | None = None,
    reference_log_prob: Array | None = None,
    key_mask: Array | None = None,
    temperature: float = 1.0,
    routes: Mapping[int, Route] | None = None,
    normaliser: float | None = None,
    settings: Mapping[str, Any] | None = None,
    ops: Ops = REFERENCE,
) -> tuple[GRPOTold, Gradients]:
    """GRPO's loss and its gradients for sampled ``tokens`` [N, T].

    Args:
        mask: [N, T] bool, True where the next token is the output's.
        advantages: [N]. old_log_prob, reference_log_prob: [N, T] as `log_probs` gives them, at the
            same temperature; as in `grpo_forward`.
        key_mask: [N, T] bool. It, temperature and routes are as in `log_probs`.
        normaliser: `grpo_normaliser` of the whole batch, if these outputs are a part of it: then
            losses and gradients of the parts add up to the whole's.
        settings: of `grpo_forward`, such as one of `GRPO_PRESETS`.
    """
    log_prob, saved = log_probs(
        params, config, tokens, key_mask=key_mask, temperature=temperature, routes=routes, ops=ops
    )
    xp = namespace(log_prob=log_prob)
    expect_mask("mask", mask, "(N, T)", tuple(tokens.shape))
    expect_that(
        not bool(xp.any(mask[:, -1])),
        "mask must be False at the last position, which nothing follows",
    )
    output, grpo_saved = ops.grpo.forward(
        log_prob,
        advantages=advantages,
        mask=mask,
        old_log_prob=old_log_prob,
        reference_log_prob=reference_log_prob,
        normaliser=normaliser,
        **(settings or {}),
    )
    dlog_prob = ops.grpo.backward(number(1.0, log_prob), grpo_saved)
    tokens_counted = xp.sum(xp.astype(mask, log_prob.dtype))

    def mean(x: Array) -> Array:
        """Over the tokens that count; what stands elsewhere, NaN included, does not."""
        return xp.sum(fill(mask, x, 0.0)) / xp.where(tokens_counted > 0, tokens_counted, 1.0)

    kl = None
    if reference_log_prob is not None:
        u = fill(mask, xp.astype(reference_log_prob, log_prob.dtype) - log_prob, 0.0)
        kl = mean(xp.expm1(u) - u)
    told = GRPOTold(
        output.loss,
        tokens_counted,
        clipped=mean(xp.astype(~output.unclipped, log_prob.dtype)),
        kl=kl,
        entropy=mean(-log_prob),
        kept=xp.mean(xp.astype(output.kept, log_prob.dtype)),
        log_prob=log_prob,
        loads=saved.output.loads,
    )
    return told, log_probs_backward(dlog_prob, saved)


def grpo_normaliser(mask: Array, settings: Mapping[str, Any] | None = None) -> float:
    """What `grpo_forward` divides by for the whole batch's ``mask`` [N, T]: its tokens, or its
    outputs."""
    given = {"average": "sequence", "empty": "counted"} | dict(settings or {})
    return float(loss_divisor(mask, 1, given["average"], None, given["empty"]))


def replay(recorded: Sequence[Mapping[int, np.ndarray]], key_mask: Array) -> dict[int, Route]:
    """`Generation.routes` of each output as the routes of rows that are padded as ``key_mask``
    [N, T] says.

    A row's routes [prompt + tokens − 1, K] begin at its first token. Its last token and the padding
    were not read while sampling: they get experts 0 … K − 1, which no log-probability of an output
    sees (they do count in a load).
    """
    xp = library(key_mask)
    expect_that(
        len(recorded) == key_mask.shape[0],
        f"recorded must hold the routes of N={key_mask.shape[0]} outputs, got {len(recorded)}",
    )
    first = xp.argmax(xp.astype(key_mask, xp.int8), axis=1)
    starts = integers(first)
    found = {}
    for layer, example in recorded[0].items():
        shape = *key_mask.shape, example.shape[1]
        indices = np.array(np.broadcast_to(np.arange(shape[2]), shape))
        for row, (start, routes) in enumerate(zip(starts, recorded, strict=True)):
            indices[row, start : start + len(routes[layer])] = routes[layer]
        placed = xp.asarray(indices, device=key_mask.device)
        found[layer] = Route(placed, placed)
    return found


# The reward model


def rewards(
    params: Parameters,
    config: ModelConfig,
    tokens: Array,
    w: Array,
    *,
    key_mask: Array | None = None,
    ops: Ops = REFERENCE,
) -> Array:
    """The reward [N] of each row of ``tokens`` [N, T]: h wᵀ at its last token, ``w`` [1, D], in its
    type. ``key_mask`` [N, T] is False for padding."""
    params, config = main_model(params, config)
    hidden = forward(params, tokens, config, key_mask=key_mask, ops=ops, with_loss=False)[0].hidden
    xp = namespace(w=w)
    last = cast(take_last(hidden, last_token(tokens, key_mask)), w)
    return xp.matmul(last, xp.matrix_transpose(w))[:, 0]


def preference_gradients(
    params: Parameters,
    config: ModelConfig,
    chosen: Array,
    rejected: Array,
    w: Array,
    *,
    chosen_key_mask: Array | None = None,
    rejected_key_mask: Array | None = None,
    normaliser: float | None = None,
    ops: Ops = REFERENCE,
) -> tuple[PreferenceTold, Gradients, Array]:
    """The preference loss of pairs ``chosen``, ``rejected`` [N, T], its gradients, and that of the
    reward's head ``w`` [1, D], in whose type the loss is computed.

    ``chosen_key_mask`` and ``rejected_key_mask`` [N, T] are False for padding, on either side. The
    head of the vocabulary takes no part and gets no gradient, but if tied. ``normaliser``: how many
    pairs the whole batch has, if these are a part of it.
    """
    xp = library(chosen)
    expect("rejected", rejected, "(N, T)", tuple(chosen.shape))
    params, config = main_model(params, config)
    pairs = chosen.shape[0]
    tokens = xp.concat((chosen, rejected), axis=0)
    key_mask = None
    if chosen_key_mask is not None or rejected_key_mask is not None:
        every = xp.ones(chosen.shape, dtype=xp.bool, device=chosen.device)
        masks = (chosen_key_mask, rejected_key_mask)
        key_mask = xp.concat([every if mask is None else mask for mask in masks], axis=0)
    output, model = forward(params, tokens, config, key_mask=key_mask, ops=ops, with_loss=False)
    last = last_token(tokens, key_mask)
    h = cast(take_last(output.hidden, last), w)
    loss, saved = ops.preference_loss.forward(h[:pairs, :], h[pairs:, :], w)
    share = pairs / (normaliser or pairs)
    dh_chosen, dh_rejected, dw = ops.preference_loss.backward(share * number(1.0, h), saved)
    dh = xp.concat((dh_chosen, dh_rejected), axis=0)
    place = xp.arange(tokens.shape[1], device=tokens.device)
    dhidden = fill(
        (place[None, :] == last[:, None])[:, :, None],
        xp.broadcast_to(dh[:, None, :], output.hidden.shape),
        0.0,
    )
    gradients = backward(model, dhidden=dhidden)
    gradients.pop(HEAD, None)
    margin = xp.matmul(h[:pairs, :] - h[pairs:, :], xp.matrix_transpose(w))
    accuracy = xp.mean(xp.astype(margin > 0, h.dtype))
    return PreferenceTold(share * loss, accuracy), gradients, dw


def last_token(tokens: Array, key_mask: Array | None) -> Array:
    """The place [N] of the last token of each row that is no padding; ValueError for a row without
    one."""
    xp = library(tokens)
    length = tokens.shape[1]
    if key_mask is None:
        return xp.full(tokens.shape[0], length - 1, device=tokens.device)
    expect_mask("key_mask", key_mask, "(N, T)", tuple(tokens.shape))
    expect_that(
        bool(xp.all(xp.any(key_mask, axis=1))), "each row must hold a token that is no padding"
    )
    return length - 1 - xp.argmax(xp.astype(xp.flip(key_mask, axis=1), xp.int8), axis=1)


def take_last(hidden: Array, last: Array) -> Array:
    """[N, D]: the states [N, T, D] at the places ``last`` [N]."""
    xp, (n, t, d) = library(last), hidden.shape
    rows = xp.arange(n, device=last.device) * t + last
    return take_rows(library(hidden).reshape(hidden, (n * t, d)), rows)
