"""One training step in one place: forward and backward over the parts of a batch, clipping, AdamW,
and the bias update of every gate.

A part is given the counts of the whole batch, so the sum of the parts' gradients is the whole's,
however it is cut (derivations/splits.md). A step that would spoil the parameters is not taken:
`NotTaken` says which tensor is not finite. Sources: DeepSeek-V3 (2412.19437) sections 2.1.2, 2.2
and 4.2; the load's violation is that of Wang et al. (2408.15664).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from typing import Any, NamedTuple

import numpy as np

from ..array import Array, library
from ..config import ModelConfig
from ..model import ModelOutput, backward, forward
from ..optimizer import AdamW, Moments, clip_global_norm, update_gate_biases
from ..parallel.ranks import Ranks
from ..splits import Part, by_rows, filled, whole_of
from .machine import Machine

__all__ = [
    "NotTaken",
    "State",
    "Told",
    "add_gradients",
    "apply_gradients",
    "copied",
    "loss_gradients",
    "max_violation",
    "not_finite",
    "part_size",
    "train_step",
]

PART = 32_768  # tokens of a forward, if no number of rows is given


class State(NamedTuple):
    """All that a run's next step depends on, beside its settings."""

    params: dict[str, Array]
    moments: Moments
    step: int = 0  # steps taken
    tokens: int = 0  # so far: read, padding included; of GRPO sampled, of pairs without padding
    position: int = 0  # rows, or problems, drawn
    extra: Mapping[str, Array] = {}  # a stage's own: a reward head, a reference model


class Told(NamedTuple):
    """One step's losses, each of the whole batch, before the step."""

    loss: float
    main: float
    mtp: list[float]
    balance: float
    loads: dict[int, Array]  # [E] by layer: tokens per expert
    norm: float = 0.0  # of all gradients together, before clipping


class NotTaken(Exception):
    """A step that was not taken: the state is as before it. The message says why."""


def train_step(
    state: State,
    arrays: Mapping[str, Any],
    config: ModelConfig,
    machine: Machine,
    optimizer: AdamW,
    *,
    learning_rate: float,
    max_norm: float = 1.0,
    gamma: float = 1e-3,
    rows: int | None = None,
    expect: Callable[[float], None] = lambda loss: None,
) -> tuple[State, Told]:
    """The state after one step on a batch, and what happened. Parameters and moments change in
    place.

    Args:
        arrays: of `forward`, NumPy: tokens [B, T], and as given targets, mask, key_mask, segments.
        gamma: the speed of the gates' biases. rows: how many rows a forward reads at a time
            (`part_size`).
        expect: called with the loss before anything changes; it may raise `NotTaken`.
    """
    given = {name: x for name, x in arrays.items() if x is not None}
    told, grads = loss_gradients(state.params, given, config, machine, rows=rows)
    expect(told.loss)
    moments, norm = apply_gradients(
        state.params,
        grads,
        state.moments,
        optimizer,
        learning_rate,
        max_norm,
        loss=told.loss,
        ranks=machine.ranks,
    )
    update_gate_biases(state.params, told.loads, gamma, config)
    state = state._replace(
        moments=moments,
        step=state.step + 1,
        tokens=state.tokens + given["tokens"].size,
        position=state.position + len(given["tokens"]),
    )
    return state, told._replace(norm=norm)


def loss_gradients(
    params: Mapping[str, Array],
    arrays: Mapping[str, np.ndarray],
    config: ModelConfig,
    machine: Machine,
    *,
    rows: int | None = None,
    parts: Sequence[Part] | None = None,
) -> tuple[Told, dict[str, Array]]:
    """The losses of a batch and a gradient for every parameter, summed over parts of ``rows``.

    With ``machine.ranks``, ``params`` are what this rank holds, the losses those of the whole
    batch, and of each gradient this rank has its slice alone, flat. ``parts``: other parts of the
    batch for this rank than those that its place in the grid gives it.
    """
    batch, length = arrays["tokens"].shape
    size, ranks = min(part_size(rows, length), batch), machine.ranks
    ops = machine.ops
    if ranks is None:
        rest = [batch % size] if batch % size else []
        parts = by_rows(dict(arrays), [size] * (batch // size) + rest)
        whole = whole_of(parts, config) if len(parts) > 1 else None
    else:
        if parts is None:
            parts = ranks.grid.parts(ranks.rank, arrays, config, rows=size)
        whole = ranks.whole(parts, config)
        params, ops = ranks.held(params, config), ranks.ops(ops, config)
    outputs, grads = [], dict[str, Array]()
    for part in parts:
        placed, follow = filled(part, config.mtp_depth)[:2]
        placed = {name: machine.place(x) for name, x in placed.items()}
        output, saved = forward(
            params, config=config, whole=whole, follow=follow, ops=ops, **placed
        )
        grads = add_gradients(grads, backward(saved))
        outputs.append(output)
    told = told_of(outputs)
    if ranks is None:
        return told, grads
    return together(ranks.world.gather(told)), ranks.reduced(grads)


def part_size(rows: int | None, length: int) -> int:
    """How many rows of ``length`` tokens a forward reads at a time: ``rows``, or if that is None or
    0 as many as have `PART` tokens, which bounds the memory of a step whatever its batch."""
    return rows or max(PART // length, 1)


def told_of(outputs: Sequence[ModelOutput]) -> Told:
    """The sums over the parts of a batch."""
    return together([_told(output) for output in outputs])


def _told(output: ModelOutput) -> Told:
    return Told(
        loss=float(output.loss),  # type: ignore[arg-type]
        main=float(output.main),  # type: ignore[arg-type]
        mtp=[float(x) for x in output.mtp],
        balance=float(sum(float(x) for x in output.balance.values())),
        loads=output.loads,
    )


def together(each: Sequence[Told]) -> Told:
    """The sums of what parts, or ranks, tell."""
    return Told(
        loss=sum(x.loss for x in each),
        main=sum(x.main for x in each),
        mtp=[sum(module) for module in zip(*(x.mtp for x in each), strict=True)],
        balance=sum(x.balance for x in each),
        loads={layer: sum(x.loads[layer] for x in each) for layer in each[0].loads},
    )


def add_gradients(sums: dict[str, Array], more: dict[str, Array]) -> dict[str, Array]:
    """The sums with another part's gradients added."""
    return sums | {name: sums[name] + g if name in sums else g for name, g in more.items()}


def apply_gradients(
    params: dict[str, Array],
    grads: dict[str, Array],
    moments: Moments,
    optimizer: AdamW,
    learning_rate: float,
    max_norm: float,
    *,
    loss: float = 0.0,
    ranks: Ranks | None = None,
) -> tuple[Moments, float]:
    """Clip and take AdamW's step, in place: the moments, and the norm before. With ``ranks``,
    gradients and moments are this rank's slices.

    `NotTaken`, before parameters and moments change, if ``loss`` or a gradient is not finite: the
    message names the first tensor that is not, a parameter rather than a gradient.
    """
    norm = (clip_global_norm if ranks is None else ranks.clip)(grads, max_norm)
    if not (isfinite(loss) and isfinite(norm)):
        named = {name: params[name] for name in grads}
        named |= {f"the gradient of {name}": g for name, g in grads.items()}
        wrong = not_finite(named)
        if ranks is not None:
            found = filter(None, ranks.world.gather(wrong))
            wrong = min(found, key=list(named).index, default=None)
        told = f"{wrong} is not finite" if wrong else f"the norm of the gradients {norm:.4g}"
        raise NotTaken(f"the loss is {loss:.4g}, and {told}")
    if ranks is not None:
        return ranks.step(params, grads, moments, optimizer, learning_rate), norm
    return optimizer.update(params, grads, moments, learning_rate), norm


def not_finite(tensors: Mapping[str, Array]) -> str | None:
    """The name of the first tensor that holds NaN or infinity."""
    for name, x in tensors.items():
        if not bool(library(x).all(library(x).isfinite(x))):
            return name
    return None


def copied(state: State) -> State:
    """A state whose parameters and moments no step on the other reaches."""
    held = ({name: x.copy() for name, x in m.items()} for m in state.moments[1:])
    return state._replace(
        params={name: x.copy() for name, x in state.params.items()},
        moments=Moments(state.moments.step, *held),
    )


def max_violation(load: Array) -> float:
    """How far the fullest expert is above the mean, as a share of it: max / mean − 1 of ``load``
    [E]."""
    total = int(load.sum())
    return int(load.max()) * len(load) / total - 1 if total else 0.0
