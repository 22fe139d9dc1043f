"""RMSNorm, cross-entropy and attention from the naive kernel to the present one: what each step
costs, by our interpreter's count.

``python tests/ladder.py`` prints the tables of kernels/README.md. There are no times: those need a
GPU.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple
from unittest.mock import patch

import ml_dtypes
import numpy as np

from refimpl.array import Array
from refimpl.kernels import SOURCE
from refimpl.kernels.compile import Module, build, compile_kernel, constants
from refimpl.kernels.cross_entropy import cross_entropy
from refimpl.kernels.flash_attention import SIZES, Sizes, attention, tiles
from refimpl.kernels.host import cover, numbers, ready
from refimpl.kernels.launch import Launch
from refimpl.kernels.rms_norm import rms_norm
from refimpl.ops import Op
from refimpl.ops.attention import visible
from refimpl.ops.cross_entropy import token_weights

import ptx

THREADS = 64  # of a block, but for the last steps, which choose for themselves
TARGET = "sm_90"


class Step(NamedTuple):
    name: str  # of the file in kernels/ladder, or in kernels/ for the last
    change: str
    buys: str  # what it should buy


RMS_NORM = (
    Step("ladder/rms_norm_1_naive", "a thread a row; dw by a thread a column", "–"),
    Step(
        "ladder/rms_norm_2_block_a_row",
        "a block a row",
        "a warp's access covers whole sectors, not one in each of 32 rows; a block's threads "
        "share a row",
    ),
    Step(
        "ladder/rms_norm_3_chunks",
        "16 bytes an access",
        "an eighth of the accesses and of their addresses",
    ),
    Step(
        "rms_norm",
        "the row in registers, its loads all asked for at once; dw by partial sums; loads past L1",
        "x read once, not twice, by the forward; x and dy once, not three times, by the "
        "backward; one wait a row",
    ),
)
CROSS_ENTROPY = (
    Step(
        "ladder/cross_entropy_1_naive",
        "maximum, sum, probabilities: three passes; these are kept",
        "–",
    ),
    Step(
        "ladder/cross_entropy_2_recompute",
        "the backward computes the probabilities again",
        "an array of the logits' size, in float32, is neither held, written nor read",
    ),
    Step(
        "ladder/cross_entropy_3_online",
        "maximum and sum in one pass",
        "the forward reads the logits once; costs a third exponential for each",
    ),
    Step(
        "cross_entropy",
        "16 bytes an access, four of a thread on their way at once; one rescaling for 32 "
        "logits; one division a thread",
        "an eighth of the accesses to logits, a 32nd of the third exponentials and of the "
        "divisions",
    ),
)
ATTENTION = (
    Step(
        "ladder/flash_attention_1_naive",
        "a thread an element of each product; the matrices of probabilities and of their gradients "
        "are held",
        "–",
    ),
    Step(
        "ladder/flash_attention_2_online",
        "tiles of keys and values in shared memory; online softmax; the backward computes the "
        "probabilities again",
        "no matrix is held, written or read; a row of the other side is read once for 64 rows of "
        "a block; hidden tiles are left out",
    ),
    Step(
        "flash_attention",
        "mma.sync on tensor cores, fed by ldmatrix; tiles by cp.async, 16 bytes at a time, while "
        "earlier ones are multiplied",
        "4,096 multiplications and additions in an instruction of a warp, where the step before "
        "has 32; nobody waits for a tile that is on its way",
    ),
)


def _module(
    step: str, launch: Launch, storage: str, defines: tuple[tuple[str, int], ...] = ()
) -> Module:
    source = constants(storage, defines) + (SOURCE / f"{step}.cu").read_text()
    return build(step.split("/")[-1], launch.target, storage, source)


def _run(launch: Launch, module: Module, kernel: str, blocks: int, *arguments: Any) -> None:
    typed = [np.int32(x) if isinstance(x, int) else x for x in arguments]
    launch(module, kernel, (blocks,), (THREADS,), typed)


def rms_norm_step(launch: Launch, step: str) -> Op:
    """The op by one step's kernels."""
    if step == "rms_norm":
        return rms_norm(launch)

    def forward(x: Array, w: Array, *, eps: float) -> tuple[Array, Any]:
        n = numbers(x=x, w=w)
        width = x.shape[-1]
        x = ready(x)
        w = ready(w)
        rows = x.size // width
        module = _module(step, launch, n.storage)
        y, r = launch.empty(x.shape, x.dtype, x), launch.empty((rows,), n.real, x)
        blocks = cover(rows, THREADS) if step.endswith("naive") else rows
        _run(
            launch,
            module,
            "rms_norm_forward",
            blocks,
            y,
            r,
            x,
            w,
            np.int64(rows),
            width,
            n.scalar(eps),
        )
        return y, (x, w, r)

    def backward(dy: Array, saved: Any) -> tuple[Array, Array]:
        x, w, r = saved
        n, dy = numbers(dy=dy), ready(dy)
        width = dy.shape[-1]
        rows, module = r.shape[0], _module(step, launch, n.storage)
        dx, dw = launch.empty(x.shape, x.dtype, x), launch.empty((width,), n.real, x)
        blocks = cover(rows, THREADS) if step.endswith("naive") else rows
        _run(launch, module, "rms_norm_backward", blocks, dx, dy, x, w, r, np.int64(rows), width)
        columns = cover(width, THREADS * (n.vector if step.endswith("chunks") else 1))
        _run(launch, module, "rms_norm_weight", columns, dw, dy, x, r, np.int64(rows), width)
        return dx, dw

    return Op(forward, backward)


def cross_entropy_step(launch: Launch, step: str) -> Op:
    """The op by one step's kernels; the loss of the rows' numbers by NumPy."""
    if step == "cross_entropy":
        return cross_entropy(launch)

    def forward(
        logits: Array, *, targets: Array, mask: Array | None = None, normaliser: float | None = None
    ) -> tuple[Array, Any]:
        n = numbers(logits=logits)
        vocabulary = logits.shape[-1]
        logits = ready(logits)
        targets, weight = token_weights(
            n.xp.zeros((1,), dtype=n.real), targets, mask, normaliser, vocabulary
        )
        targets, weight = ready(targets.reshape(-1)), ready(weight.reshape(-1))
        shapes = [logits.shape] if step.endswith("naive") else [targets.shape] * 2
        *kept, chosen = (launch.empty(shape, n.real, logits) for shape in (*shapes, targets.shape))
        module = _module(step, launch, n.storage)
        _run(
            launch,
            module,
            "cross_entropy_forward",
            targets.size,
            *kept,
            chosen,
            logits,
            targets,
            vocabulary,
        )
        loss = -n.xp.sum(n.xp.where(weight != 0, weight * chosen, n.scalar(0)))
        return loss, (logits, kept, targets, weight)

    def backward(dloss: Any, saved: Any) -> Array:
        logits, kept, targets, weight = saved
        n, read = numbers(logits=logits), [] if step.endswith("naive") else [logits]
        out, module = (
            launch.empty(logits.shape, logits.dtype, logits),
            _module(step, launch, n.storage),
        )
        dloss = n.xp.asarray(dloss, dtype=n.real).reshape(1)
        _run(
            launch,
            module,
            "cross_entropy_backward",
            targets.size,
            out,
            *read,
            *kept,
            targets,
            weight,
            dloss,
            logits.shape[-1],
        )
        return out

    return Op(forward, backward)


def attention_step(launch: Launch, step: str, sizes: Sizes = SIZES) -> Op:
    """The op by one step's kernels. Those of the second are launched by the host side of the last,
    whose arguments they have."""
    last = attention(launch, sizes)
    if step == "flash_attention":
        return last
    if step.endswith("naive"):
        return _naive_attention(launch, step)

    @contextmanager
    def in_its_place() -> Iterator[None]:
        def compile_step(_: str, target: str, storage: str, defines: Any) -> Module:
            return _module(step, launch, storage, defines)

        with patch("refimpl.kernels.host.compile_kernel", compile_step):
            yield

    def forward(q: Array, k: Array, v: Array, **given: Any) -> tuple[Array, Any]:
        with in_its_place():
            return last.forward(q, k, v, **given)  # type: ignore[no-any-return]

    def backward(do: Array, saved: Any) -> Any:
        with in_its_place():
            return last.backward(do, saved)

    return Op(forward, backward)


def _naive_attention(launch: Launch, step: str) -> Op:
    """With what each query sees as a matrix [B, T, S] too, made by NumPy."""

    def run(kernel: str, threads: int, storage: str, *arguments: Any) -> None:
        _run(launch, _module(step, launch, storage), kernel, cover(threads, THREADS), *arguments)

    def forward(
        q: Array,
        k: Array,
        v: Array,
        *,
        scale: float,
        causal: bool = True,
        key_mask: Array | None = None,
        segments: Array | None = None,
    ) -> tuple[Array, Any]:
        n = numbers(q=q, k=k, v=v)
        q = ready(q)
        k = ready(k)
        v = ready(v)
        b, t, h, x = q.shape
        s = k.shape[1]
        places = np.empty((b, t)), np.empty((b, s))  # it asks for no more than their lengths
        shown = visible((0, t), (0, s), *places, causal, key_mask, segments)[:, 0]
        shown = np.ascontiguousarray(np.broadcast_to(shown, (b, t, s)), dtype=np.uint8)
        p = launch.empty((b, h, t, s), n.real, q)
        o = launch.empty((b, t, h, v.shape[3]), q.dtype, q)
        sizes = t, s, h
        wide = np.int64(p.size), *sizes, k.shape[2], x
        run("attention_products", p.size, n.storage, p, q, k, *wide)
        rows, factor = np.int64(b * h * t), n.scalar(scale)
        run("attention_softmax", rows, n.storage, p, shown, rows, *sizes, factor)
        mixed = np.int64(o.size), *sizes, v.shape[2], v.shape[3]
        run("attention_mix_keys", o.size, n.storage, o, p, v, *mixed)
        return o, (q, k, v, p, factor)

    def backward(do: Array, saved: Any) -> tuple[Array, ...]:
        q, k, v, p, factor = saved
        n, do = numbers(do=do), ready(do)
        b, h, t, s = p.shape
        sizes, rows = (t, s, h), np.int64(b * h * t)
        ds = launch.empty(p.shape, p.dtype, p)
        dq, dk, dv = (launch.empty(x.shape, x.dtype, x) for x in (q, k, v))
        wide = np.int64(p.size), *sizes, v.shape[2], v.shape[3]
        run("attention_products", p.size, n.storage, ds, do, v, *wide)
        run("attention_softmax_backward", rows, n.storage, ds, p, rows, s, factor)
        for kernel, out, weights, x, heads in (
            ("attention_mix_keys", dq, ds, k, k.shape[2]),
            ("attention_mix_queries", dk, ds, q, k.shape[2]),
            ("attention_mix_queries", dv, p, do, v.shape[2]),
        ):
            more = np.int64(out.size), *sizes, heads, out.shape[3]
            run(kernel, out.size, n.storage, out, weights, x, *more)
        return dq, dk, dv

    return Op(forward, backward)


# ---- counting


class CountingLaunch:
    """Executes under the interpreter and keeps the reports, sectors counted."""

    target = TARGET

    def __init__(self) -> None:
        self.reports: list[tuple[str, ptx.Report]] = []
        self.made = 0  # bytes of arrays

    def __call__(
        self,
        module: Module,
        kernel: str,
        grid: Sequence[int],
        block: Sequence[int],
        arguments: Sequence[Any],
        *,
        shared: int = 0,
    ) -> None:
        self.reports.append(
            (
                kernel,
                ptx.run(
                    module.ptx,
                    kernel,
                    grid,
                    block,
                    arguments,
                    shared=shared,
                    races=False,  # the tests of each step look for them
                    sectors=True,
                ),
            )
        )

    def empty(self, shape: tuple[int, ...], dtype: Any, like: Any) -> Any:
        x = np.empty(shape, dtype)
        self.made += x.nbytes
        return x


@dataclass(frozen=True)
class Cost:
    """Of an element, forward and backward together."""

    instructions: float
    accesses: float  # loads and stores of global memory, by threads
    asked: float  # bytes that they ask for
    exponentials: float
    sectors: float  # bytes of the 32-byte sectors that warps' accesses touch
    made: float  # bytes of the arrays that kernels write, results included

    @classmethod
    def of(cls, launch: CountingLaunch, elements: int) -> Cost:
        reports = [report for _, report in launch.reports]

        def total(number: Callable[[ptx.Report], int]) -> float:
            return sum(map(number, reports)) / elements

        access = re.compile(r"(ld|st)\.(volatile\.)?global")
        return cls(
            total(lambda r: r.instructions),
            total(
                lambda r: sum(
                    count for opcode, count in r.histogram.items() if access.match(opcode)
                )
            ),
            total(lambda r: r.read["global"] + r.written["global"]),
            total(
                lambda r: sum(
                    count for opcode, count in r.histogram.items() if opcode.startswith("ex2")
                )
            ),
            total(lambda r: 32 * r.sectors),
            launch.made / elements,
        )


ROWS = 32
WIDTH = 1024
VOCABULARY = 16384


@cache
def rms_norm_cost(step: str) -> Cost:
    rng, launch = np.random.default_rng(0), CountingLaunch()
    x, dy = (rng.normal(size=(ROWS, WIDTH)).astype(ml_dtypes.bfloat16) for _ in range(2))
    pair = rms_norm_step(launch, step)
    _, saved = pair.forward(x, np.ones(WIDTH, ml_dtypes.bfloat16), eps=1e-6)
    with patch("refimpl.kernels.rms_norm.PARTS", ROWS // 16):  # 16 rows a block, as at 4,096 rows
        pair.backward(dy, saved)
    return Cost.of(launch, x.size)


@cache
def cross_entropy_cost(step: str) -> Cost:
    rng = np.random.default_rng(0)
    launch = CountingLaunch()
    rows = 2
    logits = rng.normal(size=(rows, VOCABULARY)).astype(ml_dtypes.bfloat16)
    pair = cross_entropy_step(launch, step)
    _, saved = pair.forward(logits, targets=rng.integers(0, VOCABULARY, rows))
    pair.backward(1.0, saved)
    return Cost.of(launch, logits.size)


LENGTH = 128  # of attention's sequence, one head, causal
ATTENTION_WIDTH = 32


@cache
def attention_cost(step: str) -> Cost:
    """A pair of a query and a key, be it seen or not."""
    rng, launch = np.random.default_rng(0), CountingLaunch()
    shape = (1, LENGTH, 1, ATTENTION_WIDTH)
    q, k, v, do = (rng.normal(size=shape).astype(ml_dtypes.bfloat16) for _ in range(4))
    pair = attention_step(launch, step)
    _, saved = pair.forward(q, k, v, scale=ATTENTION_WIDTH**-0.5)
    pair.backward(do, saved)
    return Cost.of(launch, LENGTH * LENGTH)


HEAD = (
    "step",
    "what changed",
    "what it should buy",
    "instructions",
    "accesses",
    "bytes asked for",
    "bytes of sectors",
    "exponentials",
    "bytes of arrays made",
    "most registers",
    "time",
)


def table(steps: Sequence[Step], cost: Callable[[str], Cost]) -> str:
    """A line a step; counts are of one element, forward and backward together."""
    lines = [f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
    for number, step in enumerate(steps, 1):
        c, name = cost(step.name), step.name.split("/")[-1]
        shape = tiles("bfloat16", ATTENTION_WIDTH, ATTENTION_WIDTH)
        defines = shape.defines if "attention" in step.name else ()
        module = _module(step.name, CountingLaunch(), "bfloat16", defines)
        registers = max(usage.registers for usage in module.usage.values())
        counts = [
            f"{x:.2f}"
            for x in (c.instructions, c.accesses, c.asked, c.sectors, c.exponentials, c.made)
        ]
        cells = [
            f"{number} [{name}.cu]({step.name}.cu)",
            step.change,
            step.buys,
            *counts,
            str(registers),
            "not measured",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def report_of(step: str) -> str:
    """One launch's report, whole: the forward of RMSNorm in bfloat16, to show how it is read."""
    launch = CountingLaunch()
    x = np.ones((ROWS, WIDTH), ml_dtypes.bfloat16)
    rms_norm_step(launch, step).forward(x, np.ones(WIDTH, ml_dtypes.bfloat16), eps=1e-6)
    ((kernel, report),) = launch.reports
    usage = compile_kernel("rms_norm", TARGET, "bfloat16").usage[kernel]
    lines = [
        f"{kernel}: {report.instructions} instructions, {report.barriers} barriers, "
        f"{usage.registers} registers"
    ]
    for what, counter in (("read", report.read), ("written", report.written)):
        lines.append(
            f"bytes {what}: "
            + ", ".join(f"{space} {count}" for space, count in sorted(counter.items()))
        )
    lines.append(f"sectors of global memory: {report.sectors}")
    lines += [f"{count:>9} {opcode}" for opcode, count in report.histogram.most_common(8)]
    return "\n".join(lines) + "\n"


def render() -> str:
    """What kernels/README.md holds."""
    return "\n".join(
        (
            f"RMSNorm, forward and backward, {ROWS} rows of {WIDTH} in bfloat16; counts an "
            "element:\n",
            table(RMS_NORM, rms_norm_cost),
            f"Cross-entropy, forward and backward, 2 rows of {VOCABULARY} logits in bfloat16; "
            "counts a logit:\n",
            table(CROSS_ENTROPY, cross_entropy_cost),
            f"Attention, forward and backward, {LENGTH} queries and keys of one head, causal, "
            f"widths {ATTENTION_WIDTH}, in bfloat16; counts a pair of query and key:\n",
            table(ATTENTION, attention_cost),
            "The report of one launch, `rms_norm_forward` on the same rows:\n",
            f"```\n{report_of('rms_norm')}```\n",
        )
    )


if __name__ == "__main__":
    print(render(), end="")
