"""The rows of the table: problems at sizes, in groups, most of which are curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ...errors import CouldNotRun
from .problems import PROBLEMS, Problem, Sizes

__all__ = ["GROUPS", "ROWS", "TOY_ROWS", "Group", "Row", "select_rows"]


@dataclass(frozen=True)
class Group:
    """Rows that are shown together."""

    title: str
    along: str = ""  # what grows from row to row; empty where the rows are no curve


@dataclass(frozen=True)
class Row:
    """A row of the table: a problem at one size."""

    name: str
    group: str
    problem: str
    sizes: Sizes
    x: int = 0  # the place on the group's curve
    budget: float = 6.0  # seconds of samples, of all columns together
    turns: int = 5  # of each column at least

    @property
    def what(self) -> Problem:
        return PROBLEMS[self.problem]

    @property
    def shape(self) -> str:
        names = [f.name for f in fields(Sizes)]
        values: dict[str, Any] = {name: getattr(self.sizes, name) for name in [*names, "tokens"]}
        return self.what.shape.format(**values)

    @property
    def written(self) -> int:
        """Bytes of the gradients of the experts' weights: time that grows with E, whoever writes
        them."""
        s = self.sizes
        return 12 * s.experts * s.width * s.expert_hidden if self.problem == "moe" else 0


GROUPS = {  # sections of the table, by name
    "step": Group("Training step: forward, backward, AdamW"),
    "ops": Group("Ops: forward and backward"),
    "attention": Group("Attention, causal, by its length", "positions"),
    "experts": Group("Experts, at 8,192 routed rows", "experts"),
    "skew": Group("Routing, 32 experts"),
    "cross-entropy": Group("Cross-entropy from logits", "vocabulary"),
    "head": Group("Output head and cross-entropy", "vocabulary"),
    "tokens": Group("Tokens of a training step at d 128", "tokens"),
}
D512 = Sizes()
D128 = replace(
    D512,
    length=256,
    width=128,
    heads=4,
    q_latent=64,
    kv_latent=32,
    nope=32,
    rope=16,
    value=32,
    hidden=352,
    expert_hidden=64,
    experts=16,
    vocabulary=256,
)
ROUTED = replace(D512, batch=4, shared=0)  # 2,048 tokens, 8,192 rows
OPS = ("rms_norm", "rope", "swiglu", "linear", "embedding", "router", "mla")
SKEWS = ("balanced", "zipf", "one-hot")


def _curve(group: str, problem: str, sizes: Sizes, field: str, points: Sequence[int]) -> list[Row]:
    """A row per point, named after it."""
    rows = []
    for x in points:
        changed: dict[str, Any] = {field: x}
        rows.append(Row(f"{group}-{x}", group, problem, replace(sizes, **changed), x))
    return rows


def _tokens(sizes: Sizes, batches: Sequence[int]) -> list[Row]:
    points = [replace(sizes, batch=batch) for batch in batches]
    return [Row(f"tokens-{s.tokens}", "tokens", "step", s, s.tokens) for s in points]


def _by_name(*rows: Row) -> dict[str, Row]:
    return {row.name: row for row in rows}


ROWS = _by_name(  # rows of the table, by name
    Row("step-d512", "step", "step", D512, budget=45),
    Row("step-d128", "step", "step", D128, budget=15),
    *(Row(op, "ops", op, D512) for op in OPS),
    Row("block", "ops", "block", D512, budget=10),
    Row("moe", "ops", "moe", D512, budget=20),
    Row("adamw", "ops", "adamw", D512),
    *_curve("attention", "attention", replace(D512, batch=1), "length", (512, 1024, 2048)),
    Row("attention-4096", "attention", "attention", replace(D512, batch=1, length=4096), 4096, 30),
    Row("attention-8192", "attention", "attention", replace(D512, batch=1, length=8192), 8192, 20),
    *_curve("experts", "moe", ROUTED, "experts", (8, 16, 32, 64, 128, 256)),
    *(Row(f"skew-{x}", "skew", "moe", replace(ROUTED, routing=x)) for x in SKEWS),
    *_curve("cross-entropy", "cross_entropy", D512, "vocabulary", [2**n for n in range(13, 18)]),
    *_curve(
        "head",
        "head_cross_entropy",
        replace(D512, batch=1),
        "vocabulary",
        [2**n for n in range(13, 18)],
    ),
    *_tokens(D128, (1, 2, 4, 8, 16)),
)
TOY = replace(D128, batch=1, length=8, parameters=1000, vocabulary=64, experts=8)
_TOYS = (
    Row("step-d128", "step", "step", TOY),
    *(Row(op, "ops", op, TOY) for op in (*OPS, "block", "moe", "adamw")),
    *_curve("attention", "attention", TOY, "length", (8, 16, 32)),
    *_curve("experts", "moe", replace(TOY, shared=0), "experts", (4, 8)),
    *(Row(f"skew-{x}", "skew", "moe", replace(TOY, shared=0, routing=x)) for x in SKEWS),
    *_curve("cross-entropy", "cross_entropy", TOY, "vocabulary", (64, 128, 256)),
    *_curve("head", "head_cross_entropy", TOY, "vocabulary", (64, 128, 256)),
    *_tokens(TOY, (1, 2, 4)),
)
TOY_ROWS = _by_name(*(replace(row, budget=0.1, turns=2) for row in _TOYS))
"""The same at sizes that take no time, to try the command."""


def select_rows(names: Sequence[str], toy: bool = False) -> list[Row]:
    """The rows by name, or by their group's; all of them if there are no names. CouldNotRun for a
    name that does not exist."""
    rows = TOY_ROWS if toy else ROWS
    unknown = [name for name in names if name not in rows and name not in GROUPS]
    if unknown:
        known = ", ".join([*GROUPS, *rows])
        raise CouldNotRun(f"unknown row {', '.join(unknown)}; there are {known}")
    return [x for x in rows.values() if x.name in names or x.group in names or not names]
