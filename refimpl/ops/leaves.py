"""Tables of implementations: for each op's name the pair of functions that does it.

Composite ops (`ffn`, `mla`, `mla_absorbed`, `moe`, `head_cross_entropy`, `mtp`) and the model find
the ops that they are made of in such a table, so a faster implementation plugs in by name and no op
or model is touched:

    ops = REFERENCE | {"attention": Op(flash_attention_forward, flash_attention_backward)}
    mla_forward(..., ops=ops)

The ops themselves never choose. `LEAVES` are the ops made of no others; `refimpl.ops.REFERENCE`
adds the composites.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, NamedTuple, NoReturn, Self, TypeVar

from .attention import attention_backward, attention_forward
from .balance_loss import balance_loss_backward, balance_loss_forward
from .cross_entropy import cross_entropy_backward, cross_entropy_forward
from .embedding import embedding_backward, embedding_forward
from .grpo import grpo_backward, grpo_forward
from .linear import linear_backward, linear_forward
from .log_prob import log_prob_backward, log_prob_forward
from .preference_loss import preference_loss_backward, preference_loss_forward
from .rms_norm import rms_norm_backward, rms_norm_forward
from .rope import rope_backward, rope_forward
from .router import router_backward, router_forward
from .swiglu import swiglu_backward, swiglu_forward

__all__ = ["LEAVES", "AnyOp", "Leaves", "Op", "Table", "expect_table"]

Forward = TypeVar("Forward", bound=Callable[..., Any])
Backward = TypeVar("Backward", bound=Callable[..., Any])


class Op(NamedTuple, Generic[Forward, Backward]):
    """The two functions of an op."""

    forward: Forward  # (differentiable…, *, not differentiable…) -> (y, saved)
    backward: Backward  # (dy, saved) -> gradients, one per positional argument of forward


AnyOp = Op[Any, Any]  # an op of any signature


class Table(Mapping[str, AnyOp]):
    """Ops by name, frozen: ``table.linear`` is ``table["linear"]``; ``table | {name: Op(f, b)}`` is
    a table with some of them replaced. A subclass lists its ops as class attributes."""

    label = "Table"  # the name that help() and errors show

    def __init__(self, **replaced: AnyOp) -> None:
        for name, op in replaced.items():
            if name not in self:
                raise ValueError(f"{name!r} must be one of {', '.join(self)}")
            if not isinstance(op, Op):
                raise TypeError(f"{name} must be an Op(forward, backward), got {type(op).__name__}")
        vars(self).update(replaced)

    def __or__(self, replaced: Mapping[str, AnyOp]) -> Self:
        return type(self)(**vars(self) | dict(replaced))

    def __getitem__(self, name: str) -> AnyOp:
        op = getattr(self, name, None)
        if not isinstance(op, Op):
            raise KeyError(name)
        return op

    def __iter__(self) -> Iterator[str]:
        for part in reversed(type(self).__mro__):
            yield from (name for name, op in vars(part).items() if isinstance(op, Op))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"a table is frozen: write table | {{{name!r}: …}}")

    def __repr__(self) -> str:
        changed = [name for name, op in vars(self).items() if op != getattr(type(self), name)]
        shown = ", ".join(f"{name!r}: …" for name in changed)
        return f"{self.label} | {{{shown}}}" if changed else self.label


def expect_table(ops: object, kind: type[Table]) -> None:
    """TypeError unless ``ops`` is a table with all that ``kind`` has."""
    if isinstance(ops, kind):
        return
    if not (isinstance(ops, Table) and {*kind()} <= {*ops}):
        raise TypeError(
            f"ops must be {kind.label} or a larger table, {kind.label} | {{name: Op(…)}}, got "
            f"{ops if isinstance(ops, Table) else type(ops).__name__}"
        )


class Leaves(Table):
    """The ops made of no others."""

    label = "LEAVES"
    linear = Op(linear_forward, linear_backward)
    embedding = Op(embedding_forward, embedding_backward)
    rms_norm = Op(rms_norm_forward, rms_norm_backward)
    swiglu = Op(swiglu_forward, swiglu_backward)
    rope = Op(rope_forward, rope_backward)
    attention = Op(attention_forward, attention_backward)
    router = Op(router_forward, router_backward)
    balance_loss = Op(balance_loss_forward, balance_loss_backward)
    cross_entropy = Op(cross_entropy_forward, cross_entropy_backward)
    log_prob = Op(log_prob_forward, log_prob_backward)
    grpo = Op(grpo_forward, grpo_backward)
    preference_loss = Op(preference_loss_forward, preference_loss_backward)


LEAVES = Leaves()  # the leaf ops of this package
