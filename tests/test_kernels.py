"""The kernels in CUDA C: compiled for every target and type, and executed (under our interpreter of
their PTX, or on the GPU by ``make gpu``) against the float64 reference and finite differences."""

from __future__ import annotations

import builtins
import inspect
import re
import sys
from functools import cache, partial
from itertools import product
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl import ops
from refimpl.array import Array
from refimpl.check import check
from refimpl.check.cases import CASES, Case, RandomDraw, pair_of
from refimpl.check.rules import Pair
from refimpl.config import preset
from refimpl.errors import CouldNotRun
from refimpl.kernels import SOURCE, compile, host
from refimpl.kernels.adamw import adamw
from refimpl.kernels.compile import STEMS, STORAGE, TARGETS, BuildError, build, compile_kernel
from refimpl.kernels.cross_entropy import cross_entropy_in_place
from refimpl.kernels.launch import DeviceLaunch
from refimpl.kernels.moe import combine, permute, weight_gradient
from refimpl.kernels.numba_cuda import (
    NUMBA_STEMS,
    NUMBA_STORAGE,
    build_numba,
    compile_numba,
    kernels_of,
)
from refimpl.kernels.table import COLUMNS, CUDA, NUMBA_CUDA, cuda_table
from refimpl.model import backward, forward, init_parameters
from refimpl.ops import REFERENCE, Op
from refimpl.optimizer import AdamW
from refimpl.text import load_text
from refimpl.verify import KERNELS, Settings, placed

import kernel_support
import pretended_cupy
from kernel_support import (
    DTYPES,
    ON_DEVICE,
    SHAPES,
    TABLE,
    TABLES,
    V3,
    compare,
    make_launch,
    make_table,
    ops_of,
    results,
    rounded,
    strided,
    to_device,
    to_host,
)
from ptx import PTXError
from sass import loads_in_flight, machine_code
from support import FULL, HypothesisDraw

# Most registers of a thread (in any type, for any target) and static shared memory of a block in
# bytes.
BUDGET = {
    "adamw_update": (40, 0),
    "cross_entropy_backward": (40, 0),
    "cross_entropy_forward": (96, 256),
    "cross_entropy_loss": (32, 256),
    "embedding_backward": (64, 4096),
    "embedding_gather": (32, 0),
    "embedding_runs": (56, 4096),
    "grpo_forward": (64, 256),
    "grpo_loss": (32, 256),
    "moe_combine": (48, 0),
    "moe_permute": (40, 0),
    "moe_weight_gradient": (48, 0),
    "rms_norm_backward": (128, 256),
    "rms_norm_forward": (88, 256),
    "rms_norm_weight": (40, 2048),
    "rope_rotate": (64, 0),
    "router_backward": (40, 0),
    "router_forward": (64, 0),
    "swiglu_backward": (48, 0),
    "swiglu_forward": (40, 0),
}
HELD = {
    "float64": 7,
    "float32": 6,
    "bfloat16": 3,
}  # chunks of 16 bytes of an RMSNorm's row that a thread holds
ROUND_NOTHING = ("router", "grpo", "embedding")  # to bfloat16: results are float32, or are copied
EXAMPLES = {"cuda": 40 if FULL else 6, "numba_cuda": 12 if FULL else 3}  # of each op and type
DIFFERENCES = {"cuda": 20 if FULL else 2, "numba_cuda": 5 if FULL else 1}  # of each op
MANY = ("moe", "log_prob")  # launch many kernels
OPS = [("cuda", op) for op in CUDA] + [("numba_cuda", op) for op in NUMBA_CUDA]
TYPES = [("cuda", storage) for storage in STORAGE] + [
    ("numba_cuda", storage) for storage in NUMBA_STORAGE
]
ROUTED = [
    case for case in TYPES if FULL or case != ("numba_cuda", "float64")
]  # many launches of many instructions
LOW = [
    (column, op, storage)
    for column, storage in TYPES
    for c, op in OPS
    if c == column and storage != "float64"
]
# a mixture of experts rounds between its stages, each of which is tested alone
LOW = [case for case in LOW if case[1:] != ("moe", "bfloat16")]
OTHER = [(column, op, "float64") for column, op in OPS if FULL or column != "numba_cuda"] + LOW
WIDE = [
    (column, op, storage) for column, storage in TYPES for c, op in OPS if c == column and op in V3
]
WIDE = [case for case in WIDE if FULL or case[::2] != ("numba_cuda", "float64")]
EXECUTED = ("sm_90", "sm_100")  # the targets whose code is executed
# Of any kernel in Numba CUDA: registers of a thread; shared memory of a block, to which the linker
# adds 1,024 on sm_90.
NUMBA_REGISTERS, NUMBA_SHARED = 80, 2048 + 1024


without_a_device = pytest.mark.skipif(ON_DEVICE, reason="compiling needs no GPU: make test")

# ---- compiling


@without_a_device
@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("stem", STEMS)
def test_compiles_within_budget(stem: str, storage: str) -> None:
    """For all four targets: no spills, no stack, registers and shared memory within the budget."""
    for target in TARGETS:
        module = compile_kernel(stem, target, storage)
        entries = re.findall(r"\.entry (\w+)\(", module.ptx)
        assert set(module.usage) == set(entries) > set()
        assert f".target {target}\n" in module.ptx
        assert module.cubin.read_bytes()[:4] == b"\x7fELF"
        assert "warning" not in module.log
        for kernel, usage in module.usage.items():
            registers, shared = BUDGET[kernel]
            where = f"{kernel} in {storage} for {target}: {usage}"
            assert usage.spills == usage.stack == 0, where
            assert 0 < usage.registers <= registers, where
            assert usage.shared <= shared, where


def _body(ptx: str) -> str:
    """But for what names the target, and names that numba counts up."""
    return re.sub(r"(?m)^(\.target|//).*$|_ZN08NumbaEnv\w+|_cudapy_smem_\d+", "", ptx)


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("stem", STEMS)
def test_what_is_executed_stands_for_all_targets(stem: str, storage: str) -> None:
    """sm_80's and sm_90a's PTX is sm_90's, which these tests execute; so is sm_100's, whose code is
    other."""
    for target in set(TARGETS) - set(EXECUTED):
        assert _body(compile_kernel(stem, target, storage).ptx) == _body(
            compile_kernel(stem, "sm_90", storage).ptx
        )
    if stem in NUMBA_STEMS and storage in (NUMBA_STORAGE if FULL else ("float32",)):
        for kernel in kernels_of(stem, storage):
            codes = [
                _body(compile_numba(stem, kernel, target, storage).ptx)
                for target in ("sm_80", "sm_90", "sm_90a")
            ]
            assert len(set(codes)) == 1, kernel


def test_every_kernel_has_a_budget() -> None:
    text = re.sub(r"__launch_bounds__\([\w, ]+\)", "", "".join(_sources().values()))
    declared = re.findall(r'extern "C" __global__ void\s+(\w+)\(', text)
    assert sorted(declared) == sorted(BUDGET)


@without_a_device
@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("stem", STEMS)
def test_ptx(stem: str, storage: str) -> None:
    """16-byte accesses where rows allow them, past L1 where data is read once, and nothing that
    flushes to zero."""
    code, held, products = (
        compile_kernel(stem, "sm_90", storage).ptx,
        HELD[storage],
        1 if storage == "bfloat16" else 3,
    )
    # loads past L1, loads through it (what is read again soon, or is written in place), stores
    accesses = {
        "rms_norm_forward": (held, held, held),
        "rms_norm_backward": (2 * held, held, held),
        "swiglu_forward": (2, 0, 1),
        "swiglu_backward": (3, 0, 2),
        "rope_rotate": (2, 0, 2),
        "cross_entropy_forward": (4, 0, 0),
        "cross_entropy_backward": (0, 4, 4),
        "embedding_gather": (0, 1, 1),
        "embedding_runs": (4, 0, 0),
        "embedding_backward": (8, 0, 0),
        "moe_permute": (0, 1, 1),
        "moe_combine": (4, 0, 1),
        "moe_weight_gradient": (products, products, 0),
    }
    kinds = ("ld.global.nc.L1::no_allocate.L2::256B.v4.u32", "ld.global.v4.u32", "st.global.v4.u32")
    for part in code.split(".entry ")[1:]:
        kernel = re.split(r"\W", part)[0]
        assert tuple(map(part.count, kinds)) == accesses.get(kernel, (0, 0, 0)), kernel
    assert ("cvt.rn.bf16.f32" in code) == (storage == "bfloat16" and stem not in ROUND_NOTHING)
    assert not re.search(r"\.local|\batom\.|\bred\.", code)
    assert not re.search(r"(add|mul|fma|sub)\.(rn\.)?ftz", code)


@without_a_device
def test_machine_code() -> None:
    """What ptxas made of it: 128-bit loads that prefetch 256 bytes (on sm_80 it makes that 128),
    stores, shuffles."""
    for storage in STORAGE:
        for target in TARGETS:
            code = "".join(machine_code(compile_kernel("rms_norm", target, storage)).values())
            fetched = "LTC128B" if target == "sm_80" else "LTC256B"
            for instruction in (
                f"LDG.E.NA.{fetched}.128.CONSTANT",
                "LDG.E.128",
                "STG.E.128",
                "SHFL.BFLY",
            ):
                assert instruction in code, (
                    f"{instruction} is not in rms_norm for {target}, {storage}"
                )


@pytest.mark.parametrize("storage", STORAGE)
def test_loads_are_on_their_way_at_once(storage: str) -> None:
    """Nothing waits for a chunk before all chunks of the thread's row, or of the rows that it loads
    ahead, are asked for."""
    held = HELD[storage]
    wanted = {
        "rms_norm": {
            "rms_norm_forward": 2 * held,
            "rms_norm_backward": 3 * held,
        },  # x and w; x, dy and w
        "swiglu": {"swiglu_forward": 2, "swiglu_backward": 3},
        "rope": {"rope_rotate": 2},
        "moe": {"moe_combine": 4, "moe_weight_gradient": 2},
        "cross_entropy": {"cross_entropy_forward": 4, "cross_entropy_backward": 4},
        "embedding": {"embedding_runs": 4, "embedding_backward": 4},
    }
    for stem, kernels in wanted.items():
        for target in TARGETS if FULL else ("sm_80", "sm_100"):
            code = machine_code(compile_kernel(stem, target, storage))
            found = {kernel: loads_in_flight(code[kernel]) for kernel in kernels}
            assert found == kernels, f"for {target}"


@without_a_device
@pytest.mark.parametrize("stem", NUMBA_STEMS)
def test_numba_compiles_within_budget(stem: str) -> None:
    """float32 for every target (float64 too in test-full): plain parameters, machine code
    without spills, nothing that calls, flushes to zero or computes in a wider type."""
    for storage in NUMBA_STORAGE if FULL else ("float32",):
        for kernel, function in kernels_of(stem, storage).items():
            for target in TARGETS:
                module = compile_numba(stem, kernel, target, storage)
                where, usage = f"{kernel} in {storage} for {target}", module.usage
                assert list(usage) == re.findall(r"\.entry (\w+)\(", module.ptx) == [kernel], where
                assert f".target {target.rstrip('a')}\n" in module.ptx, where
                assert len(re.findall(r"\.param .*_param_\d+,?\n", module.ptx)) == len(
                    function.__annotations__
                ), where
                assert module.cubin.read_bytes()[:4] == b"\x7fELF", where
                assert usage[kernel].spills == usage[kernel].stack == 0, where
                assert 0 < usage[kernel].registers <= NUMBA_REGISTERS, f"{where}: {usage}"
                assert usage[kernel].shared <= NUMBA_SHARED, f"{where}: {usage}"
                assert not re.search(
                    r"\.local|\batom\.|\bred\.|\bcall|(add|mul|fma|sub)\.(rn\.)?ftz", module.ptx
                ), where
                assert storage == "float64" or ".f64" not in module.ptx, where


def test_numba_has_the_kernels_of_cuda_c() -> None:
    """Under the same names, with as many parameters."""
    for stem in NUMBA_STEMS:
        text = re.sub(r"__launch_bounds__\([\w, ]+\)", "", _sources()[stem])
        declared = re.findall(r'extern "C" __global__ void\s+(\w+)\(([^)]*)\)', text)
        found = {
            name: len(kernel.__annotations__)
            for name, kernel in kernels_of(stem, "float32").items()
        }
        assert found == {name: parameters.count(",") + 1 for name, parameters in declared}


def _sources() -> dict[str, str]:
    return {stem: (SOURCE / f"{stem}.cu").read_text() for stem in STEMS}


# ---- executing


@pytest.mark.parametrize(("column", "op"), OPS)
def test_finite_differences(column: str, op: str) -> None:
    """The float64 kernels themselves, by `refimpl.check`: contract (arrays read-only and strided,
    two calls alike, float32 near float64) and differences to 1e-8."""
    more = (
        ops_of(op, column) if column == "cuda" or FULL else {}
    )  # else experts are the reference's
    for seed in range(1 if op in MANY and not FULL else DIFFERENCES[column]):
        case = CASES[op](RandomDraw(seed))
        if "block" in case.kwargs:
            case.kwargs["block"] = (256, 4096)
        report = check(
            *TABLES[column][op],
            case.inputs,
            case.kwargs | more,
            op=op,
            replay=case.replay,
            seed=seed,
            names=[str(i) for i in range(len(case.inputs))],
            rules=("contract", "differences"),
        )
        assert report.ok, f"{case.kwargs}\n{report}"


@pytest.mark.parametrize(("column", "op"), OPS)
def test_float64_against_the_reference(column: str, op: str) -> None:
    _against_the_reference(column, op, "float64")


@pytest.mark.parametrize(("column", "op", "storage"), LOW)
def test_error_is_that_of_the_reference(column: str, op: str, storage: str) -> None:
    _against_the_reference(column, op, storage)


def _against_the_reference(column: str, op: str, storage: str) -> None:
    @settings(max_examples=EXAMPLES[column])
    @given(st.data())
    def run(data: st.DataObject) -> None:
        draw = HypothesisDraw(data)
        compare(op, TABLES[column][op], SHAPES[op](draw), storage, draw.seed, ops_of(op, column))

    run()


@pytest.mark.parametrize(("column", "op", "storage"), WIDE)
def test_widths_of_v3(column: str, op: str, storage: str) -> None:
    """Rows of 7,168, 18,432 and 129,280 elements, 256 experts."""
    compare(op, TABLES[column][op], V3[op](RandomDraw(0)), storage, 0)


@pytest.mark.skipif(ON_DEVICE, reason="on the GPU its own target is executed")
@pytest.mark.parametrize(("column", "op", "storage"), OTHER)
def test_other_targets(column: str, op: str, storage: str) -> None:
    """The same rule for the code of sm_100."""
    for target in EXECUTED[1:]:
        pair = COLUMNS[column](make_launch(target=target))[op]
        for seed in range(10 if FULL else 2):
            compare(
                op, pair, SHAPES[op](RandomDraw(seed)), storage, seed, ops_of(op, column, target)
            )


@pytest.mark.parametrize("storage", ["float64", "float32"])
@pytest.mark.parametrize(("column", "op"), OPS)
def test_same_bits(column: str, op: str, storage: str) -> None:
    """Twice the same call, and in float64 warps that run in other orders too (in float32 the seed
    draws the errors of the interpreter's approximate functions as well): not one bit differs."""
    case = SHAPES[op](RandomDraw(3))
    kwargs, inputs = (
        rounded(case.kwargs, storage) | ops_of(op, column),
        [rounded(x, storage) for x in case.inputs],
    )
    outputs = Pair(*pair_of(op), rounded(case.kwargs, storage)).outputs(inputs)  # for their shapes
    cotangents = [np.cos(np.arange(y.size) + 1).reshape(y.shape) for y in outputs]
    found = [
        results(make_table(make_launch(seed), column)[op], inputs, kwargs, cotangents)
        for seed in ((0, 1, 2) if storage == "float64" else (0, 0))
    ]
    for others in found[1:]:
        for a, b in zip(found[0], others, strict=True):
            assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("mean", [0.0, 1.0])
@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_a_token_that_stands_everywhere(storage: str, mean: float) -> None:
    """20,000 rows of one id, and some of others: a sum as good as the reference's pairs of pairs,
    also where all terms have one sign."""
    rng = np.random.default_rng(0)
    ids = rng.permutation(np.concatenate([np.full(20_000, 3), rng.integers(0, 6, 300)]))
    compare(
        "embedding",
        TABLE["embedding"],
        Case((rng.normal(size=(6, 40)),), {"ids": ids}),
        storage,
        0,
        mean=mean,
    )


@pytest.mark.skipif(not ON_DEVICE, reason="arrays with gaps are part of test_finite_differences")
@pytest.mark.parametrize(
    ("column", "op", "storage"), [*((column, op, "float64") for column, op in OPS), *LOW]
)
def test_strided_arrays(column: str, op: str, storage: str) -> None:
    """Arrays with gaps on the GPU, inputs, cotangents and all others: the same rule."""
    for seed in range(3):
        pair = placed(COLUMNS[column](make_launch())[op], strided)
        compare(op, pair, SHAPES[op](RandomDraw(seed)), storage, seed, ops_of(op, column))


@pytest.mark.parametrize(("column", "storage"), ROUTED)
def test_router_chooses_exactly_the_same(column: str, storage: str) -> None:
    """Scores full of ties: the ids are those of `select_experts` on the same scores, in every
    grouping; replayed, they give the same bits."""
    rng = np.random.default_rng(0)
    for experts, groups, keep, top_k, group_score, hidden in (
        (8, 1, 1, 3, "max", "-inf"),
        (64, 8, 4, 8, "top2", "-inf"),
        (64, 8, 4, 8, "share", "zero"),
        (33, 3, 2, 6, "top2", "zero"),
        (6, 6, 5, 5, "top2", "-inf"),
        (1, 1, 1, 1, "max", "-inf"),
        (60, 20, 7, 8, "top2", "-inf"),
        (100, 5, 2, 9, "share", "-inf"),
        (40, 2, 2, 32, "top2", "-inf"),
        (48, 4, 1, 6, "share", "-inf"),
    ):
        x = np.eye(5)[rng.integers(0, 5, 6)]
        w, bias = rng.integers(-2, 3, (experts, 5)) / 2.0, rng.integers(-3, 2, experts) / 4.0
        bias = bias.astype(
            kernel_support.WIDE[storage]
        )  # a wider one is added by the host, which then chooses
        for score in ("sigmoid", "softmax"):
            forward = partial(
                TABLES[column]["router"].forward,
                *(rounded(a, storage) for a in (x, w)),
                bias=bias,
                top_k=top_k,
                groups=groups,
                keep_groups=keep,
                group_score=group_score,
                masked_groups=hidden,
                score=score,
            )
            output, _ = forward()
            biased = output.scores + bias
            wanted = ops.select_experts(biased, top_k, groups, keep, group_score, hidden)
            assert np.array_equal(output.indices, wanted), (experts, groups, score)
            if score == "softmax":  # whose sum's order the groups decide
                replayed, _ = forward(routes=output.indices)
                assert [a.tobytes() for a in replayed] == [a.tobytes() for a in output], (
                    experts,
                    groups,
                )


@pytest.mark.parametrize(("column", "storage"), ROUTED)
def test_router_with_scores_that_are_no_numbers(column: str, storage: str) -> None:
    """NaN in scores, bias, whole groups and all of them: the very ids of `select_experts`, where
    NaN comes after every number, the −∞ of a hidden group too; the scores are NaN where the
    reference's are."""
    rng, inf, nan = np.random.default_rng(0), np.inf, np.nan
    for experts, groups, keep, top_k, group_score, hidden in (
        (8, 1, 1, 5, "max", "-inf"),
        (12, 3, 1, 4, "max", "zero"),
        (12, 3, 2, 6, "top2", "-inf"),
        (40, 8, 4, 9, "top2", "-inf"),
    ):
        settings = {
            "top_k": top_k,
            "groups": groups,
            "keep_groups": keep,
            "group_score": group_score,
        }
        first, some = np.arange(experts) < experts // groups, rng.random(experts) < 0.4
        x, w = np.eye(4)[[0, 1, 2]], rng.integers(-2, 3, (experts, 4)) / 2.0
        x[0], bias = nan, rng.integers(-3, 2, experts) / 4.0
        infinite = np.where(rng.random(experts) < 0.5, inf, -inf)
        cases: tuple[tuple[str, Any, Any], ...] = (
            ("sigmoid", some, bias),
            ("sigmoid", first, np.where(some, nan, bias)),
            ("sigmoid", some, np.where(first, infinite, bias)),
            ("sigmoid", ~first, infinite),
            ("softmax", some, bias),
            ("softmax", first & ~first, np.where(some, nan, bias)),
            ("softmax", first & ~first, np.where(~first | some, nan, infinite)),
        )
        for score, strange, of_experts in cases:
            bias_ = of_experts.astype(
                kernel_support.WIDE[storage]
            )  # a wider one would choose on the host
            given = [rounded(a, storage) for a in (x, np.where(strange[:, None], nan, w))]
            with np.errstate(invalid="ignore"):
                found, _ = TABLES[column]["router"].forward(
                    *given, bias=bias_, score=score, masked_groups=hidden, **settings
                )
                biased = found.scores + bias_
                wanted = ops.select_experts(biased, top_k, groups, keep, group_score, hidden)
                exact, _ = ops.router_forward(
                    *(a.astype(np.float64) for a in given), top_k=top_k, score=score, routes=wanted
                )
            assert np.array_equal(found.indices, wanted), (settings, hidden, score, biased)
            assert np.array_equal(np.isnan(found.scores), np.isnan(exact.scores))
            assert np.array_equal(np.isnan(found.weights), np.isnan(exact.weights))


@pytest.mark.parametrize("column", COLUMNS)
def test_router_adds_as_the_reference_does(column: str) -> None:
    """Groups whose 12 best add up to the same but for a rounding: which is kept depends on the
    order of the sum, which is CuPy's own on a device."""
    rng = np.random.default_rng(0)
    group = rng.normal(size=(40, 16))
    logits = np.concatenate([group, group + 1e-7 * rng.normal(size=group.shape)], axis=1).astype(
        np.float32
    )
    kwargs: dict[str, Any] = {"top_k": 12, "groups": 2, "keep_groups": 1, "group_score": "share"}
    output, _ = TABLES[column]["router"].forward(
        np.eye(40, dtype=np.float32), np.ascontiguousarray(logits.T), **kwargs
    )
    wanted = to_host(ops.select_experts(to_device(output.scores), 12, 2, 1, "share"))
    assert np.array_equal(output.indices, wanted)


@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.int64, np.float16])
@pytest.mark.parametrize("column", COLUMNS)
def test_router_with_a_bias_of_another_type(column: str, dtype: type) -> None:
    """Scores of float32 that a bias of 3 makes equal in float32, and not in float64, which integers
    of 32 bits make."""
    logits = 1 + 1e-7 * np.arange(16).reshape(1, 16)
    x, w = np.ones((1, 1), np.float32), np.ascontiguousarray(logits.T.astype(np.float32))
    bias = np.full(16, 3, dtype)
    output, _ = TABLES[column]["router"].forward(x, w, top_k=4, bias=bias)
    assert np.array_equal(output.indices, ops.select_experts(output.scores + bias, 4))


@pytest.mark.parametrize(("column", "storage"), TYPES)
def test_permute_and_combine(column: str, storage: str) -> None:
    """The stages of a mixture of experts alone, in every type: rows move unchanged, sums round
    once."""
    rng, launch = np.random.default_rng(1), make_launch(0, column)
    for tokens, top_k, d in ((1, 1, 1), (5, 2, 33), (4, 3, 40), (3, 9, 16)):
        x, weights = (
            rounded(rng.normal(size=(tokens, d)), storage),
            rng.uniform(0.2, 1.5, (tokens, top_k)),
        )
        weights = weights.astype(kernel_support.WIDE[storage])
        order = rng.permutation(tokens * top_k)
        here = [to_device(a) for a in (x, order, weights)]
        rows = permute(launch, *here[:2], top_k)
        assert np.array_equal(to_host(rows), x[order // top_k])
        exact = (weights.reshape(-1, 1)[order].astype(np.float64)) * x[order // top_k].astype(
            np.float64
        )
        unit = float(kernel_support.ml_dtypes.finfo(DTYPES[storage]).eps)
        scaled = to_host(permute(launch, *here[:2], top_k, here[2]))
        assert np.all(np.abs(scaled.astype(np.float64) - exact) <= unit * np.abs(exact))
        y = to_host(combine(launch, rows, host.place(here[1]), top_k, here[2]))
        exact = weights.astype(np.float64).sum(axis=1, keepdims=True) * x.astype(np.float64)
        sums = (top_k + 1) * np.finfo(weights.dtype).eps
        assert np.all(np.abs(y.astype(np.float64) - exact) <= (unit + sums) * np.abs(exact))


@pytest.mark.parametrize(("column", "storage"), TYPES)
def test_gradient_of_the_experts_weights(column: str, storage: str) -> None:
    """In every type, bfloat16 too, by the rule of `compare`; with more choices than a block has
    warps."""
    rng, launch, wide = (
        np.random.default_rng(2),
        make_launch(0, column),
        kernel_support.WIDE[storage],
    )
    for tokens, top_k, d in ((1, 1, 1), (3, 2, 33), (2, 9, 40), (2, 3, 600)):
        dy, rows = (rounded(rng.normal(size=(n, d)), storage) for n in (tokens, tokens * top_k))
        where = rng.permutation(tokens * top_k)

        def exact_sum(a: Any, b: Any, where: Any = where, top_k: int = top_k) -> Any:
            return np.sum(np.repeat(a, top_k, axis=0) * b[where], axis=-1).reshape(-1, top_k)

        exact, plain = exact_sum(dy.astype(np.float64), rows.astype(np.float64)), 0.0
        for run in range(kernel_support.LUCK):
            moves = [
                bool(run) * kernel_support.HALF_UNIT * rng.uniform(-1, 1, x.shape)
                for x in (dy, rows)
            ]
            low = [
                (x.astype(np.float64) * (1 + m)).astype(np.float32)
                for x, m in zip((dy, rows), moves, strict=True)
            ]
            plain = max(plain, float(np.max(np.abs(exact_sum(*low) - exact))))
        if storage == "float64":
            plain = 64 * float(np.finfo(np.float64).eps) * float(np.max(np.abs(exact)))
        found = to_host(weight_gradient(launch, *(to_device(x) for x in (dy, rows, where)), top_k))
        assert found.dtype == wide
        unit = float(np.finfo(wide).eps) * (np.abs(exact) + np.max(np.abs(exact)))
        assert np.all(np.abs(found - exact) <= 2 * plain + unit), (tokens, top_k, d)


@pytest.mark.parametrize(("column", "storage"), TYPES)
def test_cross_entropy_in_place(column: str, storage: str) -> None:
    """The same bits as the op's gradient, in the memory of the logits."""
    rng = np.random.default_rng(0)
    logits = to_device(rounded(rng.normal(size=(3, 40)), storage))
    pair = COLUMNS[column](make_launch())["cross_entropy"]
    in_place = cross_entropy_in_place(make_launch(0, column))
    before = to_host(logits).tobytes()
    _, saved = pair.forward(logits, targets=to_device(np.array([0, 39, 7])))
    fresh = pair.backward(0.7, saved)
    assert to_host(logits).tobytes() == before
    assert in_place(0.7, saved) is saved.logits
    assert to_host(logits).tobytes() == to_host(fresh).tobytes()


@pytest.mark.parametrize(("column", "storage"), TYPES)
def test_cross_entropy_extremes(column: str, storage: str) -> None:
    """Logits of ±1e4 and −∞, rows with NaN, +∞ or −∞ alone, each of them masked too: finite and NaN
    where the reference is, which multiplies a masked row by 0, and 0 · NaN is NaN."""
    rng, inf, nan = np.random.default_rng(0), np.inf, np.nan
    for width in (5, 40, 4100):
        logits = rng.normal(size=(16, width))
        logits[0, :3], logits[1, 1:], logits[2, -1], logits[3] = (1e4, -1e4, 0), -inf, -inf, -1e4
        for row, strange in enumerate(
            ((nan, 1), (inf, 0), (inf, inf), (-inf, nan), (nan, inf), (1e4, nan)), 4
        ):
            logits[[row, row + 6], -2:] = strange
        logits[15] = -inf
        logits = rounded(logits, storage)
        wide, targets = logits.astype(np.float64), np.where(np.arange(16) % 2, 0, width - 1)
        for mask in (np.arange(16) < 4, np.arange(16) < 10, np.arange(16) % 3 == 0):
            kwargs: dict[str, Any] = {"targets": np.where(mask, targets, -100), "mask": mask}
            with np.errstate(invalid="ignore"):
                wanted, reference = ops.cross_entropy_forward(wide, **kwargs)
                wanted_gradient = ops.cross_entropy_backward(0.7, reference)
                loss, saved = TABLES[column]["cross_entropy"].forward(logits, **kwargs)
                gradient = TABLES[column]["cross_entropy"].backward(0.7, saved)
            np.testing.assert_allclose(loss, wanted, rtol=1e-6)
            np.testing.assert_allclose(
                gradient.astype(np.float64), wanted_gradient, atol=1e-7, rtol=2.0**-8
            )


@pytest.mark.parametrize(("column", "storage"), TYPES)
def test_cross_entropy_where_rows_end(column: str, storage: str) -> None:
    """Rows that fill all blocks of the backward, and rows that end in the last of the chunks that a
    thread has on their way, in every type; logits of −20, beside which a 0 read past the end would
    be the largest. Then more rows than the block that adds up the loss has threads."""
    rng, pair = np.random.default_rng(0), TABLES[column]["cross_entropy"]
    for rows, width in ((2, 4096), (2, 15999), (300, 3)):
        targets = rng.integers(0, width, rows)
        compare(
            "cross_entropy",
            pair,
            Case((rng.normal(-20, size=(rows, width)),), {"targets": targets}),
            storage,
            0,
        )


@pytest.mark.parametrize(("column", "storage"), TYPES)
def test_rope_where_heads_end(column: str, storage: str) -> None:
    """Heads that end in the first half of a thread's pairs, and in the second."""
    rng, pair = np.random.default_rng(0), TABLES[column]["rope"]
    for half in (3, 5, 7, 9, 13):
        for layout in ("interleaved", "halves"):
            kwargs = {
                "positions": np.arange(2),
                "inv_freq": np.logspace(0, -3, half),
                "layout": layout,
            }
            compare("rope", pair, Case((rng.normal(size=(1, 2, 2, 2 * half)),), kwargs), storage, 0)


@pytest.mark.parametrize("storage", STORAGE)
def test_grpo_of_many_outputs(storage: str) -> None:
    """More outputs than the block that adds up the loss has threads."""
    rng, shape = np.random.default_rng(0), (300, 2)
    kwargs = {"advantages": rng.normal(size=300), "mask": rng.random(shape) < 0.8}
    kwargs |= {name: -rng.random(shape) for name in ("old_log_prob", "reference_log_prob")}
    compare("grpo", TABLE["grpo"], Case((-rng.random(shape),), kwargs), storage, 0)


@pytest.mark.parametrize("column", COLUMNS)
def test_log_prob_of_masked_rows(column: str) -> None:
    """A masked row without numbers has log-probability 0, and gradients that are NaN where the
    reference's are."""
    rng = np.random.default_rng(0)
    h, w, dy = rng.normal(size=(4, 3)), rng.normal(size=(6, 3)), rng.normal(size=4)
    h[1] = np.nan
    kwargs = {"targets": np.array([1, -100, 5, 2]), "mask": np.array([True, False, True, True])}
    (wanted, saved), (found, kept) = (
        pair.forward(h, w, **kwargs) for pair in (pair_of("log_prob"), TABLES[column]["log_prob"])
    )
    np.testing.assert_allclose(found, wanted)
    for got, gradient in zip(
        TABLES[column]["log_prob"].backward(dy, kept),
        pair_of("log_prob").backward(dy, saved),
        strict=True,
    ):
        np.testing.assert_allclose(got, gradient)


@pytest.mark.parametrize("storage", STORAGE)
def test_adamw(storage: str) -> None:
    """Three steps as `refimpl.optimizer.AdamW` does them, on one block and on several; bfloat16
    parameters differ by a unit, moments don't."""
    rng, wide = np.random.default_rng(0), kernel_support.WIDE[storage]
    drawn = {
        "w": rounded(rng.normal(size=(41, 13)), storage),
        "norm": rounded(rng.normal(size=3), storage),
    }
    params = {name: to_device(p) for name, p in drawn.items()}
    reference = {name: p.astype(np.float64) for name, p in drawn.items()}
    options: dict[str, Any] = {"decays": lambda name: name == "w", "weight_decay": 0.2}
    ours, theirs = adamw(make_launch())(**options), AdamW(**options)
    for _ in range(3):
        grads = {name: rng.normal(size=p.shape).astype(wide) for name, p in params.items()}
        ours.update(params, {name: to_device(g) for name, g in grads.items()}, 0.01)
        theirs.update(reference, {name: g.astype(np.float64) for name, g in grads.items()}, 0.01)
    tolerance = {"float64": 1e-14, "float32": 1e-6, "bfloat16": 3 * 2**-8}[storage]
    for name, p in params.items():
        assert p.dtype == DTYPES[storage]
        error = np.abs(to_host(p).astype(np.float64) - reference[name])
        assert np.max(error) <= tolerance * np.max(np.abs(reference[name]))
        np.testing.assert_allclose(
            to_host(ours.first[name]),
            theirs.first[name],
            rtol=0,
            atol=1e-6 if wide != np.float64 else 1e-15,
        )
    before, grads = to_host(params["w"]).copy(), {name: to_device(g) for name, g in grads.items()}
    with pytest.raises(ValueError, match=r"w must be a parameter for a gradient of int64"):
        ours.update(params, {"w": to_device(np.ones((41, 13), dtype=np.int64))}, 0.01)
    with pytest.raises(ValueError, match="norm and its gradient must be contiguous"):
        ours.update(
            params, {"w": grads["w"], "norm": to_device(np.ones((3, 2), dtype=wide))[:, 0]}, 0.01
        )
    with pytest.raises(ValueError, match="learning_rate must be a finite number"):
        ours.update(params, grads, float("nan"))
    assert np.array_equal(to_host(params["w"]), before)


@pytest.mark.parametrize("column", COLUMNS)
def test_whole_model(column: str) -> None:
    """Loss and every gradient of the tiny model with all kernels in their places, as with the
    reference."""
    if ON_DEVICE:
        pytest.skip(f"refimpl verify --backend cupy --implementation {column}")
    if column == "numba_cuda" and not FULL:
        pytest.skip("its host side is that of cuda, and each of its ops is tested alone")
    config = preset("tiny")
    params = {name: p.astype(np.float64) for name, p in init_parameters(config, std=0.15).items()}
    tokens = np.frombuffer(b"by hand and checked", dtype=np.uint8)[None, :9].astype(np.int64)
    wanted, wanted_saved = forward(params, tokens, config, ops=REFERENCE)
    found, saved = forward(params, tokens, config, ops=TABLES[column])
    assert abs(float(found.loss) - float(wanted.loss)) <= 1e-13 * float(wanted.loss)
    grads = backward(saved)
    for name, g in backward(wanted_saved).items():
        assert np.max(np.abs(grads[name] - g)) <= 1e-12 * np.max(np.abs(g), initial=1e-3), name


# ---- mistakes must show

PLANTED = {  # name: (op and file, what stands there, what a mistake would put)
    "mean of one element less": (
        "rms_norm",
        "root(block_sum(sum) / width + eps)",
        "root(block_sum(sum) / (width + 1) + eps)",
    ),
    "weight left out of dx": (
        "rms_norm",
        "dn[k][v] = dy_row[k][v] * w_row[k][v];",
        "dn[k][v] = dy_row[k][v];",
    ),
    "last partial sum lost": ("rms_norm", "b < parts; b += LANES", "b < parts - 1; b += LANES"),
    "silu without its second term": ("swiglu", "(s + g[v] * s * (1 - s))", "s"),
    "backward turns forward": ("rope", "sign * sin[angle]", "sin[angle]"),
    "first half turned twice": ("rope", "y1[v] = x0[v] * s[v]", "y1[v] = y0[v] * s[v]"),
    "maximum not carried": (
        "cross_entropy",
        "total.sum * power(total.largest - from)",
        "total.sum",
    ),
    "target off by one": ("cross_entropy", "i + v == target", "i + v == target + 1"),
    "second lane dropped": ("embedding", "lane = 1; lane < LANES", "lane = 2; lane < LANES"),
    "ties to the higher index": (
        "router",
        "keys[j * WARP] > best.key",
        "keys[j * WARP] >= best.key",
    ),
    "scale forgotten in the backward": (
        "router",
        "scale * dweights[row * top_k + lane]",
        "dweights[row * top_k + lane]",
    ),
    "weight of another slot": (
        "moe",
        "weighted ? weights[slot + ahead]",
        "weighted ? weights[token + ahead]",
    ),
    "gradient from lane 0 alone": (
        "moe",
        "sum = warp_sum(sum);\n    if (lane == 0) dweights",
        "if (lane == 0) dweights",
    ),
    "clip by the wrong sign": ("grpo", "a > 0 ? rho > high", "a < 0 ? rho > high"),
    "KL of whole outputs forgotten": ("grpo", "dz_all - du_all", "dz_all"),
    "barrier before the merge missing": (
        "cross_entropy",
        "= total;\n    __syncthreads();",
        "= total;",
    ),
    "logits that are overwritten read as constant": (
        "cross_entropy",
        "load_chunks<false>",
        "load_chunks<true>",
    ),
    "barrier between lanes missing": (
        "embedding",
        "    __syncthreads();\n    if (threadIdx.y > 0)",
        "    if (threadIdx.y > 0)",
    ),
    "a run of two ids taken for one": (
        "embedding",
        "first_run = (first + run - 1) / run",
        "first_run = first / run",
    ),
    "rows after the last run lost": ("embedding", "if (whole) add_rows(", "if (false) add_rows("),
    "last of the rows ahead dropped": (
        "moe",
        "ahead < AHEAD; ahead++) {",
        "ahead < AHEAD - 1; ahead++) {",
    ),
    "chunk at the end read whole": (
        "rms_norm",
        "if (wide) {\n#pragma unroll\n        for (int k = 0; k < COUNT; k++, i += step)\n"
        "            if (i < length)",
        "if (wide) {\n#pragma unroll\n        for (int k = 0; k < COUNT; k++, i += step)",
    ),
    "end of the last id's rows from beyond": (
        "embedding",
        "place + 1 < ids ? start[place + 1] : rows",
        "start[place + 1]",
    ),
    "warp not waited for": (
        "router",
        "    __syncwarp();  // a lane reads scores below that others wrote\n",
        "",
    ),
    "threads past the end": (
        "router",
        "    if (row >= rows) return;  // whole warps",
        "    // whole warps",
    ),
    "last thread past the end": ("adamw", "if (i >= size) return;", "if (i > size) return;"),
    "tail read as a whole chunk": (
        "swiglu",
        "bool wide = left == VECTOR;\n    const Chunk d",
        "bool wide = true;\n    const Chunk d",
    ),
}


@pytest.mark.skipif(ON_DEVICE, reason="one place to plant them is enough")
@pytest.mark.parametrize("name", PLANTED)
def test_planted_mistakes_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op, old, new = PLANTED[name]
    header = (SOURCE / "common.cuh").read_text().replace("#pragma once\n", "")
    source = _sources()[op].replace('#include "common.cuh"\n', header)
    assert source.count(old) == 1, f"{name}: its place is gone"
    edited = "#define STORAGE_FLOAT64 1\n" + source.replace(old, new)
    real = host.compile_kernel

    def wrong(s: str, target: str, storage: str) -> compile.Module:
        return build(s, target, storage, edited) if s == op else real(s, target, storage)

    monkeypatch.setattr(host, "compile_kernel", wrong)
    for seed in range(40):
        try:
            if op == "adamw":
                test_adamw("float64")
            else:
                compare(op, TABLE[op], SHAPES[op](RandomDraw(seed)), "float64", seed, ops_of(op))
            if op == "cross_entropy":
                test_cross_entropy_in_place("cuda", "float64")
            if op == "router":
                test_router_chooses_exactly_the_same("cuda", "float64")
        except (AssertionError, PTXError):
            return
    pytest.fail(f"nothing saw it: {name}")


PLANTED_IN_NUMBA = {  # name: (op, file, what stands there, what a mistake would put)
    "sums read before all are written": (
        "cross_entropy",
        "common",
        "    cuda.syncthreads()  # no thread reads part before all warps have written theirs\n",
        "",
    ),
    "sums written while others are read": (
        "cross_entropy",
        "common",
        "    cuda.syncthreads()  # another warp may still read an earlier call's part\n",
        "",
    ),
    "weight left out of dx": (
        "rms_norm",
        "rms_norm",
        "dn = dy[start + i] * w[i]",
        "dn = dy[start + i]",
    ),
    "element past the end": (
        "swiglu",
        "swiglu",
        "size, cuda.gridsize(1)):\n            y",
        "size + 1, cuda.gridsize(1)):\n            y",
    ),
    "backward turns forward": ("rope", "rope", "real(sign) * sin[angle]", "sin[angle]"),
    "warp not waited for": (
        "router",
        "router",
        "        cuda.syncwarp()  # a lane reads below what the others wrote above\n",
        "",
    ),
    "ties to the higher index": ("router", "router", "j < i", "j > i"),
    "weight of another slot": (
        "moe",
        "moe",
        "weights[slot] if weighted",
        "weights[token] if weighted",
    ),
}


@pytest.mark.skipif(ON_DEVICE, reason="one place to plant them is enough")
@pytest.mark.parametrize("name", PLANTED_IN_NUMBA)
def test_planted_mistakes_in_numba_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op, file, old, new = PLANTED_IN_NUMBA[name]
    for stem in ("common", op):
        source = (SOURCE / f"{stem}_numba_cuda.py").read_text()
        assert stem != file or source.count(old) == 1, f"{name}: its place is gone"
        module = ModuleType(f"refimpl.kernels.{stem}_numba_cuda")
        module.__package__ = "refimpl.kernels"
        monkeypatch.setitem(sys.modules, module.__name__, module)
        edited = source.replace(old, new) if stem == file else source
        exec(builtins.compile(edited, stem, "exec", dont_inherit=True), vars(module))

    @cache
    def wrong(stem: str, kernel: str, target: str, storage: str) -> Any:
        return SimpleNamespace(
            ptx=build_numba(kernels_of(stem, storage)[kernel], target)[0].decode()
        )

    monkeypatch.setattr(host, "compile_numba", wrong)
    for seed in range(40):
        try:
            compare(op, TABLES["numba_cuda"][op], SHAPES[op](RandomDraw(seed)), "float64", seed)
            if op == "router":
                test_router_chooses_exactly_the_same("numba_cuda", "float64")
        except (AssertionError, PTXError):
            return
    pytest.fail(f"nothing saw it: {name}")


# ---- errors


def test_errors() -> None:
    with pytest.raises(TypeError, match=r"x must be float64, float32 or bfloat16, got float16"):
        TABLE["rms_norm"].forward(np.ones((2, 3), np.float16), np.ones(3), eps=0.1)
    with pytest.raises(TypeError, match=r"w must be \w+ float32 like x, got \w+ float64"):
        TABLE["rms_norm"].forward(np.ones((2, 3), np.float32), np.ones(3), eps=0.1)
    with pytest.raises(ValueError, match=r"w must have shape \(D,\)=\(3,\), got \(2,\)"):
        TABLE["rms_norm"].forward(np.ones((2, 3)), np.ones(2), eps=0.1)
    with pytest.raises(ValueError, match=r"x must be at most 7168 wide in float64, got 7169"):
        TABLE["rms_norm"].forward(np.ones((1, 7169)), np.ones(7169), eps=0.1)
    with pytest.raises(ValueError, match=r"top_k must lie in 1…4"):
        TABLE["router"].forward(np.ones((1, 2)), np.ones((4, 2)), top_k=5)
    for experts, groups, top_k in ((66, 33, 1), (1020, 17, 1), (1025, 1, 1), (40, 1, 33)):
        with pytest.raises(
            ValueError,
            match=r"top_k and groups must be at most 32, experts 1024 \(.*got \d+, \d+ and",
        ):
            TABLE["router"].forward(
                np.ones((1, 2)), np.ones((experts, 2)), top_k=top_k, groups=groups
            )
    with pytest.raises(
        ValueError, match="target must be one of sm_80, sm_90, sm_90a, sm_100, got sm_70"
    ):
        compile_kernel("rope", "sm_70", "float32")
    for grid in (2**31, (1, 2**16)):
        with pytest.raises(
            ValueError,
            match="moe_permute can't run on more than 2³¹ − 1 blocks, of 2¹⁶ − 1 in y, got ",
        ):
            host.Kernels(make_launch(), "moe")("moe_permute", "float32", grid, 32)
    for size in (
        2**30,
        2**31,
    ):  # below 2³¹ the last step past a row's end would be a negative number
        with pytest.raises(
            ValueError,
            match="cross_entropy_forward counts in int32, so sizes must be below 2³⁰, got",
        ):
            host.Kernels(make_launch(), "cross_entropy")(
                "cross_entropy_forward", "float32", 1, 512, size
            )


def test_nothing_to_do() -> None:
    """No rows at all: empty results, no launch."""
    y, saved = TABLE["rms_norm"].forward(np.ones((0, 4)), np.ones(4), eps=0.1)
    assert y.shape == (0, 4)
    dx, dw = TABLE["rms_norm"].backward(y, saved)
    assert dx.shape == (0, 4)
    assert np.array_equal(dw, np.zeros(4))
    y, _ = TABLE["embedding"].forward(np.ones((3, 4)), ids=np.zeros((2, 0), int))
    assert y.shape == (2, 0, 4)


@pytest.mark.parametrize(
    ("capability", "target"),
    [
        ("80", "sm_80"),
        ("86", "sm_80"),
        ("89", "sm_80"),
        ("90", "sm_90a"),
        ("100", "sm_100"),
        ("103", "sm_100"),
    ],
)
def test_target_of_a_device(capability: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", _device(capability))
    assert DeviceLaunch().target == target


@pytest.mark.parametrize("capability", ["75", "120"])
def test_no_target_for_a_device(capability: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", _device(capability))
    with pytest.raises(
        CouldNotRun, match=f"kernels are compiled for sm_80, .*, this GPU is sm_{capability}"
    ):
        DeviceLaunch()


def _device(capability: str) -> Any:
    """As much of CuPy as says what GPU there is."""
    runtime = SimpleNamespace(getDeviceCount=lambda: 1, CUDARuntimeError=RuntimeError)
    return SimpleNamespace(
        cuda=SimpleNamespace(
            runtime=runtime, Device=lambda: SimpleNamespace(compute_capability=capability)
        )
    )


def test_a_kernel_is_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of a file's kernels by its name, and started with what CuPy's RawKernel takes."""
    cupy, loaded, started = _device("90"), list[str](), list[Any]()

    def raw_module(*, path: str) -> Any:
        assert type(path) is str
        return SimpleNamespace(get_function=lambda name: loaded.append(name) or start)

    def start(
        grid: tuple[int, ...],
        block: tuple[int, ...],
        arguments: tuple[Any, ...],
        *,
        shared_mem: int,
    ) -> None:
        started.append((grid, block, arguments, shared_mem))

    cupy.RawModule = raw_module
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    launch, module = DeviceLaunch(), compile_kernel("swiglu", "sm_90a", "float32")
    for kernel in ("swiglu_forward", "swiglu_forward", "swiglu_backward"):
        launch(module, kernel, (2,), (32,), [np.int64(1)], shared=16)
    assert loaded == ["swiglu_forward", "swiglu_backward"]
    assert started == [((2,), (32,), (1,), 16)] * 3
    with pytest.raises(TypeError, match="swiglu_forward runs on CuPy arrays, got a NumPy array"):
        launch(module, "swiglu_forward", (2,), (32,), [np.ones(1)])


def test_a_kernel_that_does_not_compile_is_an_error() -> None:
    with pytest.raises(
        BuildError, match=r"(?s)broken.cu does not compile with .*sm_90.*identifier \"nothing\""
    ):
        build("broken", "sm_90", "float32", "__global__ void broken() { nothing(); }")


def test_nothing_is_written_into_shared_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty log is one byte, which NVRTC writes: not into the one b" " that the whole process
    shares."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compile, "OPTIONS", ())
    module = build("one", "sm_90", "float32", 'extern "C" __global__ void one(int* x) { *x = 1; }')
    assert module.log == ""
    assert [bytes([i])[0] for i in range(256)] == list(range(256))
    assert b" " == b"\x20"


def test_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was compiled once is read back; another source, header or option is another entry;
    nothing half-written."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = (
        '#define STORAGE_FLOAT32 1\n#include "common.cuh"\nextern "C" __global__ void '
        "one(real* x) { *x = 1; }"
    )
    first = build("one", "sm_90", "float32", source)
    monkeypatch.setattr(compile, "_run", lambda *_: pytest.fail("compiled again"))
    assert build("one", "sm_90", "float32", source) == first
    monkeypatch.setattr(compile, "_run", lambda *_: (b"ptx", b"cubin", b"log"))
    assert build("one", "sm_80", "float32", source).ptx == "ptx"
    assert build("one", "sm_90", "float32", source + "\n").ptx == "ptx"
    folder = tmp_path / "refimpl" / "kernels"
    assert len(list(folder.iterdir())) == 3
    assert first.cubin.parent.parent == folder
    changed = tmp_path / "source"
    changed.mkdir()
    (changed / "common.cuh").write_text("// another\n")
    monkeypatch.setattr(compile, "SOURCE", changed)
    assert build("one", "sm_90", "float32", source).ptx == "ptx"
    assert len(list(folder.iterdir())) == 4


@pytest.mark.parametrize("name", compile.FILES)
def test_a_spoiled_cache_is_made_again(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file cut short, changed in one bit, empty or gone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    contents = b"ptx", b"cubin", b"log"

    def build_it() -> tuple[bytes, ...]:
        module = compile.kept("one", "sm_90", "float32", "all", lambda: contents)
        return module.ptx.encode(), module.cubin.read_bytes(), module.log.encode()

    build_it()
    (folder,) = (tmp_path / "refimpl" / "kernels").iterdir()
    file = folder / name
    whole = file.read_bytes()
    for spoiled in (whole[:-1], bytes([whole[0] ^ 1]) + whole[1:], b"", None):
        file.unlink()
        if spoiled is not None:
            file.write_bytes(spoiled)
        assert build_it() == contents
        assert file.read_bytes() == whole
        assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("where", ["refimpl", "refimpl/kernels"])
def test_a_cache_that_cannot_be_written(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / where).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / where).write_text("a file")
    with pytest.raises(
        CouldNotRun,
        match=r"^compiled kernels are kept in .*refimpl.kernels, which .* XDG_CACHE_HOME",
    ):
        compile.kept("one", "sm_90", "float32", "all", lambda: (b"ptx", b"cubin", b"log"))
    assert (tmp_path / where).read_text() == "a file"


def test_a_full_disk_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    write = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if self.name == "log":
            raise OSError(28, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(CouldNotRun, match=r"cannot be written \(No space left on device\)"):
        compile.kept("one", "sm_90", "float32", "all", lambda: (b"ptx", b"cubin", b"log"))
    assert list((tmp_path / "refimpl" / "kernels").iterdir()) == []


@pytest.mark.skipif(ON_DEVICE, reason="there is a GPU")
def test_no_gpu_is_one_clear_line() -> None:
    with pytest.raises(CouldNotRun, match=r"^kernels need (a GPU|CuPy)[^\n]*$"):
        DeviceLaunch()
    for backend, message in (
        ("numpy", "^backend must be cupy for the implementation"),
        ("cupy", "needs (a GPU|CuPy)"),
    ):
        for implementation in KERNELS:
            with pytest.raises(CouldNotRun, match=message):
                Settings(load_text(None), implementation=implementation, backend=backend).validate()


def test_no_nvrtc_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(
        CouldNotRun, match=r"^CUDA C needs NVRTC: pip install 'deepseek-refimpl\[kernels\]' [^\n]*$"
    ):
        build("one", "sm_90", "float32", "")


def test_errors_of_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    ones = np.ones((1, 2), DTYPES["bfloat16"])
    with pytest.raises(
        TypeError, match="kernels in Numba CUDA take float64 and float32 arrays, got bfloat16"
    ):
        TABLES["numba_cuda"]["swiglu"].forward(ones, ones)
    with pytest.raises(ValueError, match=r"stem must be one of cross_entropy, moe, .*, got adamw"):
        kernels_of("adamw", "float32")
    with pytest.raises(
        ValueError, match="target must be one of sm_80, sm_90, sm_90a, sm_100, got sm_70"
    ):
        compile_numba("rope", "rope_rotate", "sm_70", "float32")

    def broken(y: Any) -> None:
        y.nothing()

    broken.__annotations__ = {
        "y": kernels_of("swiglu", "float32")["swiglu_forward"].__annotations__["y"]
    }
    with pytest.raises(BuildError, match=r"(?s)^broken does not compile for sm_90:.*nothing"):
        build_numba(broken, "sm_90")
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(
        CouldNotRun,
        match=r"^Numba CUDA needs numba-cuda: pip install 'deepseek-refimpl\[kernels\]' [^\n]*$",
    ):
        kernels_of("rope", "float32")


class PretendedLaunch(kernel_support.InterpreterLaunch):
    """The interpreter under arrays that are dressed as CuPy's."""

    def __call__(
        self, module: Any, kernel: str, grid: Any, block: Any, arguments: Any, *, shared: int = 0
    ) -> None:
        assert not any(type(x) is np.ndarray for x in arguments), (
            f"{kernel} was given a NumPy array"
        )
        given = {
            id(x): pretended_cupy.here(x) for x in arguments
        }  # one object for an array that comes twice
        super().__call__(
            module, kernel, grid, block, [given[id(x)] for x in arguments], shared=shared
        )

    def empty(self, shape: Any, dtype: Any, like: Any) -> Any:
        return pretended_cupy.there(super().empty(shape, dtype, like))


@pytest.mark.skipif(ON_DEVICE, reason="there it is CuPy itself")
@pytest.mark.parametrize("op", CUDA)
def test_host_side_does_nothing_that_cupy_refuses(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", pretended_cupy.Pretended("cupy"))
    table = cuda_table(PretendedLaunch())
    extra = {"ops": table} if ops_of(op) else {}
    compare(
        op, placed(table[op], pretended_cupy.there), SHAPES[op](RandomDraw(1)), "float32", 1, extra
    )


# ---- dense products

PRODUCTS = [
    (a, b, out)
    for a, b, out in (
        ("float64", "float64", "float64"),
        ("float32", "float32", "float32"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("bfloat16", "bfloat16", "float32"),
        ("float32", "bfloat16", "float32"),
    )
]
LYING = {  # how a matrix may lie in memory
    "rows": lambda x: x.copy(),
    "columns": lambda x: x.T.copy().T,
    "rows with gaps": lambda x: strided_rows(x),
    "elements with gaps": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "part of columns": lambda x: strided_rows(x.T).T,
}


def strided_rows(x: np.ndarray) -> np.ndarray:
    return np.concatenate((x, x), axis=1)[:, : x.shape[1]]


def _check_product(
    there: Any, a: np.ndarray, b: np.ndarray, dtype: Any, start: np.ndarray | None = None
) -> None:
    """`host.product` or, with a start, `host.matmul` that adds to it, against float64: each of k
    additions rounds."""
    wide = [x.astype(np.float64) for x in (a, b)]
    exact, most = wide[0] @ wide[1], abs(wide[0]) @ abs(wide[1])
    if start is None:
        found = host.product(there(a), there(b), dtype)
    else:
        exact, most = exact + start, most + abs(start)
        found = there(start.astype(dtype))
        host.matmul(there(a), there(b), found, add=True)
    found = found.get() if hasattr(found, "get") else found
    assert found.dtype == dtype
    assert found.shape == exact.shape
    sums = float(np.finfo(kernel_support.WIDE[np.dtype(dtype).name]).eps)
    bound = (a.shape[1] + 4) * sums * most + (
        2**-8 * abs(exact) if dtype == DTYPES["bfloat16"] else 0
    )
    assert np.all(abs(found.astype(np.float64) - exact) <= bound)


@pytest.mark.skipif(ON_DEVICE, reason="there it is cuBLAS itself")
@pytest.mark.parametrize(("a", "b", "out"), PRODUCTS)
def test_products_as_cublas_defines_them(
    a: str, b: str, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In NumPy, and by a gemmEx on bare addresses: every way that the two may lie in memory, sides
    of 0, 1 and odd."""
    cupy, rng = pretended_cupy.Pretended("cupy"), np.random.default_rng(0)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    for n, k, m in (
        (3, 5, 7),
        (1, 5, 7),
        (3, 1, 7),
        (3, 5, 1),
        (1, 1, 1),
        (8, 16, 24),
        (0, 5, 7),
        (3, 0, 7),
        (3, 5, 0),
    ):
        left, right = (
            rng.normal(size=(n, k)).astype(DTYPES[a]),
            rng.normal(size=(k, m)).astype(DTYPES[b]),
        )
        start = rng.normal(size=(n, m)).astype(DTYPES[out])
        for lay_a in LYING.values():
            for lay_b in LYING.values():
                for there in (lambda x: x, pretended_cupy.there):
                    _check_product(there, lay_a(left), lay_b(right), DTYPES[out])
                    if a == b and out != "bfloat16":
                        _check_product(there, lay_a(left), lay_b(right), DTYPES[out], start)
    calls = cupy.cuda.cublas.calls
    assert {call[:2] for call in calls} == {(0, 0), (0, 1), (1, 0), (1, 1)}  # transposed by flags
    assert cupy.cuda.cublas.mode == 0
    with pytest.raises(
        ValueError,
        match=r"out must be contiguous, \(3, 2\), of the type of a float64 \(3, 4\) and b float32",
    ):
        host.matmul(np.ones((3, 4)), np.ones((4, 2), np.float32), np.ones((3, 2)))


@pytest.mark.skipif(ON_DEVICE, reason="there it is cuBLAS itself")
def test_transposed_products_copy_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The addresses that cuBLAS gets are the arrays' own."""
    cupy = pretended_cupy.Pretended("cupy")
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    seen: list[tuple[int, int]] = []
    real = cupy.cuda.cublas.gemmEx
    monkeypatch.setattr(
        cupy.cuda.cublas, "gemmEx", lambda *x: (seen.append((x[7], x[10])), real(*x))
    )
    a, b = (pretended_cupy.there(np.ones(shape, DTYPES["bfloat16"])) for shape in ((5, 3), (7, 5)))
    host.product(a.T, b.T, np.float32)
    assert seen == [(b.data.ptr, a.data.ptr)]


def test_parts_are_the_number() -> None:
    """Three bfloat16 numbers hold a float32 one to the last bit."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=10_000) * 2.0 ** rng.integers(-80, 80, 10_000)).astype(np.float32)
    found = list(host.parts(x, DTYPES["bfloat16"]))
    assert [part.dtype for part in found] == [DTYPES["bfloat16"]] * 3
    assert np.array_equal(sum(part.astype(np.float64) for part in found), x)
    assert next(host.parts(x, np.dtype(np.float32))) is x


@pytest.mark.skipif(not ON_DEVICE, reason="cuBLAS itself: make gpu")
@pytest.mark.parametrize(("a", "b", "out"), PRODUCTS)
def test_products_on_the_device(a: str, b: str, out: str) -> None:
    rng = np.random.default_rng(0)
    for n, k, m in (
        (3, 5, 7),
        (1, 5, 7),
        (3, 1, 7),
        (3, 5, 1),
        (1, 1, 1),
        (129, 1000, 257),
        (0, 5, 7),
        (3, 0, 7),
    ):
        left, right = (
            rng.normal(size=(n, k)).astype(DTYPES[a]),
            rng.normal(size=(k, m)).astype(DTYPES[b]),
        )
        for there_a in (to_device, strided, lambda x: to_device(np.ascontiguousarray(x.T)).T):
            for there_b in (to_device, lambda x: to_device(np.ascontiguousarray(x.T)).T):

                def there(x: Array) -> Array:
                    return there_a(x) if x is left else there_b(x)  # noqa: B023 (used at once)

                _check_product(there, left, right, DTYPES[out])
        if a == b and out != "bfloat16":
            _check_product(
                to_device, left, right, DTYPES[out], rng.normal(size=(n, m)).astype(DTYPES[out])
            )


@pytest.mark.parametrize("storage", STORAGE)
def test_log_prob_in_blocks(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where products are exact, any block gives the very log-probabilities of the whole; gradients
    within the rule."""
    module, rng = sys.modules["refimpl.kernels.log_prob"], np.random.default_rng(1)
    h, w = (rng.integers(-3, 4, shape) / 4 for shape in ((7, 12), (100, 12)))
    targets = rng.integers(0, 100, 7)
    given = to_device(rounded(h, storage)), to_device(rounded(w, storage))
    found = []
    for least, block in (
        (module.BLOCK, (1, 1)),
        ((1, 1), (1, 100)),
        ((1, 1), (3, 40)),
        ((2, 70), (1, 1)),
        ((1, 1), (7, 9)),
    ):
        monkeypatch.setattr(module, "BLOCK", least)
        case = Case((h, w), {"targets": targets, "block": block, "temperature": 0.7})
        compare("log_prob", TABLE["log_prob"], case, storage, 0)
        y, saved = COLUMNS["cuda"](make_launch())["log_prob"].forward(
            *given, targets=to_device(targets), block=block
        )
        assert saved.block == (max(least[0], block[0]), max(least[1], block[1]))
        found.append(to_host(y).tobytes())
    assert len(set(found)) == 1
    assert module._rows((4096, 16384), 129280) == 512
    assert module._rows((256, 4096), 129280) == 8


def test_readme_of_kernels() -> None:
    """Every kernel is in its table, and the planted mistakes are as many as it says."""
    page = (SOURCE / "README.md").read_text()
    for kernel in BUDGET:
        assert f"`{kernel}`" in page
    assert f"{len(PLANTED)} planted mistakes" in page


def test_signatures_are_the_ops() -> None:
    """Every op of the column takes the arguments of the reference, under the same names and with
    the same defaults."""

    def parameters(function: Any) -> list[tuple[str, Any, Any]]:
        return [
            (p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()
        ]

    for name, make in CUDA.items():
        pair: Op = make(kernel_support.InterpreterLaunch())
        assert parameters(pair.forward) == parameters(REFERENCE[name].forward), name
        assert parameters(pair.backward) == parameters(REFERENCE[name].backward), name
    for make in COLUMNS.values():
        assert set(make(kernel_support.InterpreterLaunch())) == set(REFERENCE)
    assert set(COLUMNS) == set(KERNELS)


def test_what_is_no_number_stays_visible() -> None:
    """As in the reference: NaN and −∞ of a policy without an old one; a row with a logit of +∞."""
    kwargs = {"advantages": np.ones(1), "mask": np.ones((1, 3), bool), "kl_weight": 0.0}
    for strange in (np.nan, -np.inf):
        log_prob = np.array([[-1.0, strange, -2.0]])
        with np.errstate(invalid="ignore"):
            (wanted, saved), (got, kept) = (
                pair.forward(log_prob, **kwargs) for pair in (pair_of("grpo"), TABLE["grpo"])
            )
            np.testing.assert_array_equal(got.loss, wanted.loss)
            np.testing.assert_allclose(
                TABLE["grpo"].backward((1.0,), kept), pair_of("grpo").backward((1.0,), saved)
            )
    logits, targets = np.array([[0.0, np.inf, 1.0]]), np.array([0])
    for column in COLUMNS:
        with np.errstate(invalid="ignore"):
            _, saved = TABLES[column]["cross_entropy"].forward(logits, targets=targets)
            assert np.isnan(TABLES[column]["cross_entropy"].backward(1.0, saved)).all()


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_grpo_of_what_is_no_number(dtype: type) -> None:
    """NaN and infinities of advantages and log-probabilities, at tokens and at padding, in outputs
    without tokens too: NaN, infinities and numbers are where they are in the reference, at all
    levels of ratio and KL."""
    rng, (inf, nan) = np.random.default_rng(0), (np.inf, np.nan)
    strange = [
        (a, b) for a in (nan, inf, -inf, 0.0, 1.0, -1.0) for b in (0.0, nan, inf, -inf, 40.0)
    ]
    n, t = len(strange), 5
    for case, options in enumerate(
        (
            {},
            {"ratio": "sequence", "kl_level": "sequence", "average": "token"},
            {"ratio": "sequence_mean", "kl": "k1"},
            {
                "kl": "unbiased",
                "dual_clip": 3.0,
                "off_policy": 0.1,
                "kl_bounds": (20.0, 10.0),
                "average": "token",
            },
            {"kl_weight": 0.0, "average": "constant", "length": 9},
            {"kl": "k2", "kl_level": "sequence"},
        )
    ):
        given = {
            name: -1 + 0.3 * rng.normal(size=(n, t))
            for name in ("log_prob", "old_log_prob", "reference_log_prob")
        }
        mask = rng.random((n, t)) < 0.6
        mask[:, 0], mask[::7], mask[1::3, 2] = (
            True,
            False,
            case % 2 == 0,
        )  # at 2 stands what is strange
        for i, x in enumerate(given.values()):
            x[i::3, 2] += [b for _, b in strange][i::3]
        advantages = np.array([a for a, _ in strange])
        for rows in (slice(None), ~mask[:, 2] & np.isfinite(advantages), [0], [14], [16]):
            here = {
                name: x[rows].astype(dtype)
                for name, x in (given | {"advantages": advantages}).items()
            } | options
            here["mask"] = mask[rows]
            with np.errstate(all="ignore"):
                _compare_grpo(
                    here,
                    *((1e-12, 1e-14) if dtype is np.float64 else (1e-4, 1e-6)),
                    str((options, rows)),
                )


def _compare_grpo(given: dict[str, Any], rtol: float, atol: float, at: str) -> None:
    """The reference's loss, gradient and choices, those of padding left out."""
    wanted, saved = pair_of("grpo").forward(**given)
    found, kept = TABLE["grpo"].forward(**given)
    gradient, exact = TABLE["grpo"].backward((0.7,), kept), pair_of("grpo").backward((0.7,), saved)
    np.testing.assert_allclose(found.loss, wanted.loss, rtol, atol, err_msg=at)
    np.testing.assert_allclose(gradient, exact, rtol, atol, err_msg=at)
    assert np.array_equal(found.kept, wanted.kept), at
    assert np.array_equal(found.unclipped[given["mask"]], wanted.unclipped[given["mask"]]), at


def test_grpo_on_both_sides_of_every_bound() -> None:
    """Every advantage with ratios in and out of the clip and KL in and out of its bounds, by
    choices made and by replayed ones that contradict them: values and choices are the
    reference's."""
    a, z, u = (
        x.ravel()
        for x in np.meshgrid([-1, -0.5, 0, 0.5, 1], [-2, -0.1, 0.1, 2], [-25, -3, 0.1, 3, 25])
    )
    rng, n = np.random.default_rng(0), len(a)
    log_prob = np.stack([z, np.full(n, 0.1)], axis=1) - 30
    given = {
        "log_prob": log_prob,
        "old_log_prob": np.full((n, 2), -30.0),
        "advantages": a,
        "reference_log_prob": log_prob + np.stack([u, np.zeros(n)], axis=1),
        "mask": np.ones((n, 2), bool),
    }
    kl = [
        (kl, bounds)
        for kl in ("k1", "k2", "k3", "unbiased")
        for bounds in ((20.0, 10.0), (2.0, 1000.0))
    ]
    choices: list[dict[str, Any]] = [
        {},
        {"unclipped": rng.random((n, 2)) < 0.5},
        {"kept": rng.random(n) < 0.5},
    ]
    of_outputs = {"ratio": "sequence", "kl_level": "sequence", "kl_weight": 1.0}
    levels = ({}, of_outputs, {"off_policy": 0.5}, {"dual_clip": 3.0})
    for i, (setting, (estimator, bounds)) in enumerate(product(levels, kl)):
        here = given | {"kl": estimator, "kl_bounds": bounds} | setting | choices[i % 3]
        _compare_grpo(here, 1e-13, 1e-15, str((setting, estimator, bounds, list(choices[i % 3]))))


def test_grpo_multiplies_no_infinity_with_zero() -> None:
    """An output that is dropped, whose ratio overflows, and one without advantage, whose clip has
    no upper end."""
    one = {"old_log_prob": np.full((1, 1), -900.0), "mask": np.ones((1, 1), bool), "kl_weight": 0.0}
    for options in (
        {"advantages": np.array([-1.0]), "kept": np.array([False])},
        {"advantages": np.array([0.0]), "clip": (0.2, np.inf)},
    ):
        for pair in (TABLE["grpo"], pair_of("grpo")):
            with np.errstate(over="ignore"):
                output, saved = pair.forward(np.full((1, 1), -1.0), **one, **options)
                assert (output.loss, pair.backward((1.0,), saved)) == (0, 0)


def test_arguments_that_a_kernel_would_misread() -> None:
    x, one = np.ones((1, 2, 1, 4)), {"positions": np.arange(2), "inv_freq": np.ones(2)}
    _, saved = TABLE["rope"].forward(x, **one)
    with pytest.raises(
        TypeError, match="dy must be of the forward's x, whose arithmetic is float64, got float32"
    ):
        TABLE["rope"].backward(x.astype(np.float32), saved)
    kwargs = {"advantages": np.ones(2), "mask": np.ones((2, 3), bool), "kl_weight": 0.0}
    for pair in (TABLE["grpo"], pair_of("grpo")):
        for choice in (
            {"unclipped": np.ones((2, 1), bool)},
            {"unclipped": np.ones((2, 3), np.int64)},
        ):
            with pytest.raises((TypeError, ValueError), match="unclipped must "):
                pair.forward(-np.ones((2, 3)), **kwargs, **choice)
        with pytest.raises((TypeError, ValueError), match="kept must "):
            pair.forward(-np.ones((2, 3)), **kwargs, kept=np.array([0, 1]))
    x, up, down = np.ones((2, 3)), np.ones((4, 5, 3)), np.ones((4, 3, 5))
    shared = {
        "w_shared_gate": np.ones((7, 3)),
        "w_shared_up": np.ones((7, 3)),
        "w_shared_down": np.ones((3, 7)),
    }
    for change, message in (
        (
            {"w_shared_up": np.ones((7, 2))},
            r"w_shared_up must have shape \(F, D\)=\(7, 3\), got \(7, 2\)",
        ),
        (
            {"w_shared_gate": np.ones((7, 2))},
            r"w_shared_gate must have shape \(F, D\)=\('any', 3\), got \(7, 2\)",
        ),
        (
            {"w_shared_down": np.ones((7, 3))},
            r"w_shared_down must have shape \(D, F\)=\(3, 7\), got \(7, 3\)",
        ),
        ({"w_shared_down": None}, "w_shared_gate, w_shared_up and w_shared_down must all be given"),
        (
            {"indices": np.zeros((2, 1), int)},
            r"weights must have shape \(…, K\)=\(2, 1\), got \(2, 2\)",
        ),
    ):
        given = {"indices": np.array([[0, 1], [0, 1]])} | shared | change
        for column in COLUMNS:
            with pytest.raises(ValueError, match=message):
                TABLES[column]["moe"].forward(x, np.ones((2, 2)), up, up, down, **given)
    bias = np.array([0, 1e-12, 0, 2e-12])  # which float32 scores of 1/2 would lose
    for column in COLUMNS:
        found, _ = TABLES[column]["router"].forward(
            np.zeros((1, 3), np.float32), np.zeros((4, 3), np.float32), top_k=1, bias=bias
        )
        assert found.indices.tolist() == [[3]]
