"""Mistakes that the kernels' tests must see, by op, and how they are planted."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import pytest

from refimpl.check.cases import RandomDraw
from refimpl.kernels import SOURCE, compile, host
from refimpl.kernels.compile import STEMS, build
from refimpl.kernels.kept import kept
from refimpl.kernels.numba_cuda import build_numba, kernels_of, numba_versions

from .launches import TABLES, ops_of
from .rule import compare
from .shapes import SHAPES
from ptx import PTXError

FILES = {"attention": "flash_attention"}  # stems that are not the op's name
# op: {name: (what stands there, what a mistake would put)}
PLANTED: dict[str, dict[str, tuple[str, str]]] = {
    "attention": {
        "wait for the keys missing": (
            "cp_async_wait<1>();  // the keys; the values may still be on their way",
            "",
        ),
        "barrier before the keys missing": (
            "cp_async_wait<1>();  // the keys; the values may still be on their way\n"
            "        __syncthreads();",
            "cp_async_wait<1>();",
        ),
        "stale stage: keys fetched too early": (
            "real score[KEYS / 8][4] = {};\n        add_scores<KEY_WIDTH>(score, q_tile + "
            "threadIdx.x / WARP * OWN * stride(KEY_WIDTH), k_tile);\n        __syncthreads();\n"
            "        if (s + KEYS < end) fetch<KEY_WIDTH, KEYS, THREADS>(k_tile, k, of_k, s "
            "+ KEYS);",
            "real score[KEYS / 8][4] = {};\n"
            "        if (s + KEYS < end) fetch<KEY_WIDTH, KEYS, THREADS>(k_tile, k, of_k, s "
            "+ KEYS);\n"
            "        add_scores<KEY_WIDTH>(score, q_tile + threadIdx.x / WARP * OWN * "
            "stride(KEY_WIDTH), k_tile);\n        __syncthreads();",
        ),
        "wait for one group too few": (
            "cp_async_wait<1>();\n        __syncthreads();\n        "
            "add_mixed<VALUE_WIDTH>(numerator",
            "cp_async_wait<2>();\n        __syncthreads();\n        "
            "add_mixed<VALUE_WIDTH>(numerator",
        ),
        "lane address of a tile's row": (
            "a + lane() % 16 * stride(WIDTH) + i + lane() / 16 * 8",
            "a + lane() % 16 * stride(WIDTH) + i + lane() / 8 % 2 * 8",
        ),
        ".trans missing": ("ldmatrix_x4_trans(y, b", "ldmatrix_x4(y, b"),
        "fragments in another order": (
            "mma_m16n8k16(sum[n], x, y[0], y[1]);\n            mma_m16n8k16(sum[n + 1], x, y[2], "
            "y[3]);\n        }\n    }\n#else\n#pragma unroll 1",
            "mma_m16n8k16(sum[n], x, y[0], y[2]);\n            mma_m16n8k16(sum[n + 1], x, y[1], "
            "y[3]);\n        }\n    }\n#else\n#pragma unroll 1",
        ),
        "wrong half of an operand": (
            "{cvt_rn_bf16x2(p[k][1], p[k][0])",
            "{cvt_rn_bf16x2(p[k][0], p[k][1])",
        ),
        "numerator not rescaled": ("numerator[n][i] *= decay[i / 2]", "numerator[n][i] *= 1"),
        "sum not rescaled": ("total[i] *= decay[i];", ""),
        "diagonal hidden": (
            "causal ? position(t) : keys - 1",
            "causal ? position(t) - 1 : keys - 1",
        ),
        "diagonal one too far": ("? s - position(0) : 0", "? s - position(0) - 1 : 0"),
        "last tile of keys left out": (
            "return causal ? position(t < queries ? t : queries) : keys;",
            "return (causal ? position(t < queries ? t : queries) : keys) - 1;",
        ),
        "first queries left out": (
            "int t = mask.first_query(first) / QUERIES * QUERIES;",
            "int t = mask.first_query(first) / QUERIES * QUERIES + QUERIES;",
        ),
        "dropped tail: keys past the end seen": (": keys - 1;", ": keys;"),
        "tail of a row not zero": (
            "cp_async_16(to, from, inside ? 16 : 0);",
            "cp_async_16(to, from, 16);",
        ),
        "a row that sees nothing": ("(any ? largest[i] : 0)", "largest[i]"),
        "a row that sees nothing divides by 0": ("any ? finite(sum) : 1;", "finite(sum);"),
        "overflow gives a clean number": ("any ? finite(sum) : 1;", "any ? sum : 1;"),
        "padding seen": ("(key_mask[s] && segments[s]", "(segments[s]"),
        "segments of the first query": (
            "segments[position(t) < 0 ? 0 : position(t)]",
            "segments[t]",
        ),
        "tile taken for one that all see": (
            "(!causal || s + some_keys - 1 <= position(t))",
            "true",
        ),
        "last head alone in dk": (
            "if (key_heads == heads || h == heads - 1) {\n            store<KEY_WIDTH>(dk, dk_sum, "
            "of_k, own);",
            "{\n            store<KEY_WIDTH>(dk, dk_sum, of_k, own);",
        ),
        "row sums of another head": (
            "const real* own_sum = row_sum + (static_cast<int64>(batch) * heads + h) * queries;",
            "const real* own_sum = row_sum + (static_cast<int64>(batch) * heads + begin) * "
            "queries;",
        ),
        "ds without the scale": ("dp[n][i] = scale * p[n][i] * (dp", "dp[n][i] = p[n][i] * (dp"),
        "do overwritten while it is read": (
            "if (part + SOME == QUERIES) {  // nobody needs this tile of do any more\n"
            "                    __syncthreads();",
            "if (part + SOME == QUERIES) {",
        ),
    },
    "mla_decode": {
        "wait for the tile missing": ("        cp_async_wait<0>();\n", ""),
        "barrier before the tile missing": (
            "        __syncthreads();  // the tile is there, and nobody reads the one before\n",
            "",
        ),
        "wrong stage": (
            "now = k_tile + stage * KEYS * STRIDE;",
            "now = k_tile + (stage ^ 1) * KEYS * STRIDE;",
        ),
        "next tile over the one in use": (
            "fetch<KEYS>(k_tile + (stage ^ 1) * KEYS * STRIDE, cache, s + KEYS",
            "fetch<KEYS>(k_tile + stage * KEYS * STRIDE, cache, s + KEYS",
        ),
        "barrier before the scores are read missing": (
            "put_scores(score, q_tile, now);\n        __syncthreads();",
            "put_scores(score, q_tile, now);",
        ),
        "weights over scores that are still read": (
            "            __syncwarp();  // the weights lie where the row's other threads have read "
            "scores\n",
            "",
        ),
        "barrier before the weights are read missing": (
            "            }\n        }\n        __syncthreads();\n#pragma unroll",
            "            }\n        }\n#pragma unroll",
        ),
        "k-loop one short": ("k < KEYS; k += 16", "k < KEYS - 16; k += 16"),
        "scores' k-loop one short": ("i < KEY_WIDTH; i += 32", "i < KEY_WIDTH - 32; i += 32"),
        "values' columns off": ("v += warp() * COLUMNS;", "v += warp() * COLUMNS + 8;"),
        "numerator not rescaled": ("numerator[g][n][i] *= i < 2 ? upper : lower;", ";"),
        "decay of another row": (
            "upper = decay[g * OWN + row_of(0)], lower = decay[g * OWN + row_of(2)]",
            "upper = decay[row_of(0)], lower = decay[row_of(2)]",
        ),
        "sum not rescaled": ("            total *= factor;\n", ""),
        "mask of another row": ("t = (first + own) / heads", "t = first / heads"),
        "mask of another sequence": (
            "hidden ? key_mask + row : nullptr",
            "hidden ? key_mask : nullptr",
        ),
        "segments of another sequence": (
            "cut ? segments + row : nullptr",
            "cut ? segments : nullptr",
        ),
        "order of positions forgotten": ("causal && at < end ? at : end - 1", "end - 1"),
        "dropped tail: keys past the end seen": (
            "last = own >= ROWS || t >= queries ? -1 : causal && at < end ? at : end - 1",
            "last = at",
        ),
        "last tile of a split left out": ("s < end; s += KEYS", "s + KEYS < end; s += KEYS"),
        "split taken twice": ("begin = blockIdx.y * tiles * KEYS", "begin = 0"),
        "split combined twice": (
            "for (int i = 0; i < splits; i++) {\n            if (totals",
            "for (int j = 0; j <= splits; j++) {\n            const int i = j % splits;\n"
            "            if (totals",
        ),
        "combined without rescaling": (
            "factor = exponential(totals[2 * i] - shift)",
            "factor = real(1)",
        ),
        "one split's shift for all": (
            "if (totals[2 * i + 1] >= 0 && totals[2 * i] > largest) largest",
            "if (i == 0) largest",
        ),
        "split that sees nothing counted": (
            "            if (totals[2 * i + 1] < 0) continue;\n",
            "",
        ),
        "a row that sees nothing": ("to[1] = seen ? total : -1;", "to[1] = total;"),
    },
    "rms_norm": {
        "mean of one element less": (
            "root(finite(block_sum(sum) / width + eps))",
            "root(finite(block_sum(sum) / (width + 1) + eps))",
        ),
        "weight left out of dx": ("dn = dy_row[k][v] * w_row[k][v];", "dn = dy_row[k][v];"),
        "weight left out of the row's mean": (
            "sum += dy_row[k][v] * w_row[k][v] * n;",
            "sum += dy_row[k][v] * n;",
        ),
        "last partial sum lost": ("b < parts; b += LANES", "b < parts - 1; b += LANES"),
        "chunk at the end read whole": (
            "if (wide) {\n#pragma unroll\n        for (int k = 0; k < COUNT; k++, i += step)\n"
            "            if (i < length)",
            "if (wide) {\n#pragma unroll\n        for (int k = 0; k < COUNT; k++, i += step)",
        ),
    },
    "swiglu": {
        "silu without its second term": ("(s.open + g[v] * s.open * s.shut)", "s.open"),
        "e for 2 in float32": ("fabsf(x) * -1.44269504f", "-fabsf(x)"),
        "gate of −x in float32": ("x < 0 ? Gate{rest, half}", "x > 0 ? Gate{rest, half}"),
        "tail read as a whole chunk": (
            "bool wide = left == VECTOR;\n    const Chunk d",
            "bool wide = true;\n    const Chunk d",
        ),
    },
    "rope": {
        "backward turns forward": ("s[v] *= sign;", "s[v] *= 1;"),
        "first angles twice": ("ld_global_v4(row + i + v)", "ld_global_v4(row + i)"),
        "angles of the head": ("head / heads % static_cast", "head % static_cast"),
        "pair of the first head": ("(thread - head * parts) * VECTOR", "thread * VECTOR"),
        "first half turned twice": ("y1[v] = x0[v] * s[v]", "y1[v] = y0[v] * s[v]"),
    },
    "cross_entropy": {
        "maximum not carried": ("total.sum * power(total.largest - from)", "total.sum"),
        "target off by one": ("i + v == row.target", "i + v == row.target + 1"),
        "barrier before the merge missing": ("= own;\n    __syncthreads();", "= own;"),
        "warps' sums not rescaled": (
            "return {largest, warp_sum(own.sum * power(own.largest - base(largest)))};",
            "return {largest, warp_sum(own.sum)};",
        ),
        "logits that are overwritten read as constant": (
            "load_chunks<false>(chunk, logits + row",
            "load_chunks<true>(chunk, logits + row",
        ),
        "row that is overwritten read as constant": ("total_of<false>(z", "total_of<true>(z"),
        "target's logit read when its gradient may stand there": (
            "log_probability(own, total)",
            "log_probability(widen(z[target]), total)",
        ),
        "last batch of a row without gradient": ("(batches - 1) * BATCH", "(batches - 2) * BATCH"),
    },
    "embedding": {
        "second lane dropped": ("lane = 1; lane < LANES", "lane = 2; lane < LANES"),
        "barrier between lanes missing": (
            "    __syncthreads();\n    if (threadIdx.y > 0)",
            "    if (threadIdx.y > 0)",
        ),
        "a run of two ids taken for one": (
            "first_run = (first + run - 1) / run",
            "first_run = first / run",
        ),
        "rows after the last run lost": ("if (whole) add_rows(", "if (false) add_rows("),
        "end of the last id's rows from beyond": (
            "place + 1 < ids ? start[place + 1] : rows",
            "start[place + 1]",
        ),
    },
    "router": {
        "ties to the higher index": ("keys[j * WARP] > best.key", "keys[j * WARP] >= best.key"),
        "scale forgotten in the backward": (
            "scale * dweights[row * top_k + lane]",
            "dweights[row * top_k + lane]",
        ),
        "warp not waited for": (
            "    __syncwarp();  // a lane reads scores below that others wrote\n",
            "",
        ),
        "threads past the end": (
            "    if (row >= rows) return;  // whole warps",
            "    // whole warps",
        ),
    },
    "moe": {
        "weight of another slot": (
            "weight = weights[slot + ahead]",
            "weight = weights[token + ahead]",
        ),
        "gradient from lane 0 alone": (
            "sum = warp_sum(sum);\n    if (lane == 0) dweights",
            "if (lane == 0) dweights",
        ),
        "last of the rows ahead dropped": (
            "ahead < AHEAD; ahead++) {",
            "ahead < AHEAD - 1; ahead++) {",
        ),
    },
    "grouped_linear": {
        "wait for a tile too few": ("cp_async_wait<STAGES - 2>();", "cp_async_wait<STAGES - 1>();"),
        "barrier missing": (
            "__syncthreads();  // this stage is there for all; the one before has been read by all",
            "",
        ),
        "wrong stage": (
            "const storage* stage = tiles + step % STAGES",
            "const storage* stage = tiles + (step + 1) % STAGES",
        ),
        "loop one short": (
            "for (int step = 0; step < steps; step++) {",
            "for (int step = 0; step < steps - 1; step++) {",
        ),
        "stale offset: rows of the expert before": (
            "first = start[expert] +",
            "first = start[expert > 0 ? expert - 1 : 0] +",
        ),
        "hot expert's tile shared": (" + (tile - first_tile[expert]) * ROWS;", ";"),
        "dropped tail: rows of the next expert written": ("row < end && column", "column"),
        "empty expert's dw not zeroed": (
            "const int64 first = start[expert], end = start[expert + 1];",
            "const int64 first = start[expert], end = start[expert + 1];\n"
            "    if (first == end) return;",
        ),
        "weights of another expert": (
            "const int64 own = static_cast<int64>(rows.expert) * outputs * inputs;\n"
            "    const Factor<ROWS, true> a = {x,",
            "const int64 own = 0;\n    const Factor<ROWS, true> a = {x,",
        ),
        "second pair left out": ("steps = pairs * each;", "steps = each;"),
        "terms past the expert's rows": (
            "const Factor<ROWS, false> a = {dy, nullptr, end,",
            "const Factor<ROWS, false> a = {dy, nullptr, end + 1,",
        ),
        ".trans missing": ("ldmatrix_x4_trans(y[n]", "ldmatrix_x4(y[n]"),
        "fragments in another order": (
            "y[n / 2][n % 2 * 2], y[n / 2][n % 2 * 2 + 1]",
            "y[n / 2][n % 2 * 2 + 1], y[n / 2][n % 2 * 2]",
        ),
    },
    "grpo": {
        "clip by the wrong sign": ("a > 0 ? rho > high", "a < 0 ? rho > high"),
        "KL of whole outputs forgotten": ("dz_all - du_all", "dz_all"),
    },
    "adamw": {
        "last thread past the end": ("if (i + k < size) to[", "if (i + k <= size) to["),
        "last thread reads past the end": (
            "places % 16 == 0 && i + EACH <= size",
            "places % 16 == 0",
        ),
        "any place taken for a multiple of 16 bytes": (
            "places % 16 == 0 && i + EACH <= size",
            "i + EACH <= size",
        ),
        "two numbers in the other order": (
            "cvt_rn_bf16x2(value[1], value[0])",
            "cvt_rn_bf16x2(value[0], value[1])",
        ),
        "parameter for its master": (
            "load(value, master, i, size, wide);",
            "for (int k = 0; k < EACH; k++) value[k] = i + k < size ? widen(p[i + k]) : real(0);",
        ),
        "master left as it was": ("    store(master, value, i, size, wide);\n", ""),
        "parameter left as it was": (
            "#if defined(STORAGE_BFLOAT16)\n    if (wide) {",
            "#if false\n    if (wide) {",
        ),
    },
}
# op: {name: (file, what stands there, what a mistake would put)}
PLANTED_IN_NUMBA: dict[str, dict[str, tuple[str, str, str]]] = {
    "attention": {
        "weights read before all are written": (
            "flash_attention",
            "weight[thread]  # (flash_attention.2)\n            cuda.syncthreads()",
            "weight[thread]  # (flash_attention.2)\n            cuda.syncwarp()",
        ),
        "gradients read before all are written": (
            "flash_attention",
            "            slope[thread] = ds\n            cuda.syncthreads()",
            "            slope[thread] = ds\n            cuda.syncwarp()",
        ),
        "gradients written while others are read": (
            "flash_attention",
            "cuda.syncthreads()  # above, for the next queries,",
            "cuda.syncwarp()  #",
        ),
        "numerator not rescaled": ("flash_attention", "            numerator *= decay\n", ""),
        "sum not rescaled": (
            "flash_attention",
            "total * decay + weight[thread]",
            "total + weight[thread]",
        ),
        "diagonal hidden": ("flash_attention", "causal or s <= position", "causal or s < position"),
        "first queries left out": (
            "flash_attention",
            "begin = max(s - offset, 0)",
            "begin = max(s - offset + 1, 0)",
        ),
        "a query that sees nothing": (
            "flash_attention",
            "largest, total = real(0), real(1)",
            "largest, total = real(0), real(0)",
        ),
        "overflow gives a clean number": (
            "flash_attention",
            "total = finite(total)",
            "total += real(0)",
        ),
        "padding seen": ("flash_attention", "shown and key_mask[key] != 0 and", "shown and"),
        "segments of a position before the first": (
            "flash_attention",
            "max(position, 0)",
            "position",
        ),
        "last head alone in dk": (
            "flash_attention",
            "thread] = dk_sum\n                dk_sum = real(0)",
            "thread] = dk_sum\n            dk_sum = real(0)",
        ),
        "row sums of another head": (
            "flash_attention",
            "at = (batch * heads + h) * queries + t\n",
            "at = (batch * heads + head) * queries + t\n",
        ),
        "ds without the scale": (
            "flash_attention",
            "ds = scale * p * (dp - row_sum[at])",
            "ds = p * (dp - row_sum[at])",
        ),
    },
    "cross_entropy": {
        "sums read before all are written": (
            "common",
            "    cuda.syncthreads()  # no thread reads part before all warps have written theirs\n",
            "",
        ),
        "sums written while others are read": (
            "common",
            "    cuda.syncthreads()  # another warp may still read an earlier call's part\n",
            "",
        ),
    },
    "rms_norm": {
        "weight left out of dx": ("rms_norm", "dn = dy[start + i] * w[i]", "dn = dy[start + i]")
    },
    "swiglu": {
        "element past the end": (
            "swiglu",
            "size, cuda.gridsize(1)):\n            y",
            "size + 1, cuda.gridsize(1)):\n            y",
        )
    },
    "rope": {"backward turns forward": ("rope", "real(sign) * sin[angle]", "sin[angle]")},
    "router": {
        "warp not waited for": (
            "router",
            "        cuda.syncwarp()  # a lane reads below what the others wrote above\n",
            "",
        ),
        "ties to the higher index": ("router", "j < i", "j > i"),
    },
    "moe": {"weight of another slot": ("moe", "total += weights[slot]", "total += weights[token]")},
}


def sources() -> dict[str, str]:
    """The files in CUDA C, by stem."""
    return {stem: (SOURCE / f"{stem}.cu").read_text() for stem in STEMS}


def plant(op: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the host side run the kernels of ``op`` with the mistake."""
    old, new = PLANTED[op][name]
    header = (SOURCE / "common.cuh").read_text().replace("#pragma once\n", "")
    planted_in = FILES.get(op, op)
    source = sources()[planted_in].replace('#include "common.cuh"\n', header)
    assert source.count(old) == 1, f"{name}: its place is gone"
    edited = source.replace(old, new)
    real = host.compile_kernel

    def wrong(stem: str, target: str, storage: str, defines: Any = ()) -> compile.Module:
        if stem == planted_in:
            return build(stem, target, storage, compile.constants(storage, defines) + edited)
        return real(stem, target, storage, defines)

    monkeypatch.setattr(host, "compile_kernel", wrong)


def plant_in_numba(op: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `plant`, in Numba CUDA."""
    kernels_of(
        FILES.get(op, op), "float32"
    )  # numba is imported under the shim for NumPy 2.5, not by the source
    file, old, new = PLANTED_IN_NUMBA[op][name]
    texts, planted_in = [], FILES.get(op, op)
    for stem in ("common", planted_in):
        source = (SOURCE / f"{stem}_numba_cuda.py").read_text()
        assert stem != file or source.count(old) == 1, f"{name}: its place is gone"
        module = ModuleType(f"refimpl.kernels.{stem}_numba_cuda")
        module.__package__ = "refimpl.kernels"
        monkeypatch.setitem(sys.modules, module.__name__, module)
        texts.append(source.replace(old, new) if stem == file else source)
        exec(builtins.compile(texts[-1], stem, "exec", dont_inherit=True), vars(module))

    real = host.compile_numba

    @cache
    def wrong(stem: str, kernel: str, target: str, storage: str) -> compile.Module:
        if stem != planted_in:
            return real(stem, kernel, target, storage)
        function = kernels_of(stem, storage)[kernel]
        all_that_enters = "planted", texts, kernel, target, storage
        found = kept(kernel, all_that_enters, numba_versions, lambda: build_numba(function, target))
        return compile.Module(kernel, target, storage, *found)

    monkeypatch.setattr(host, "compile_numba", wrong)


def assert_seen(
    op: str, *more: Callable[[], Any], column: str = "cuda", storage: str = "float64"
) -> None:
    """What is planted fails the rule of `compare`, or one of the tests ``more``, on one of 40
    seeds."""
    for seed in range(40):
        try:
            compare(
                op,
                TABLES[column][op],
                SHAPES[op](RandomDraw(seed)),
                storage,
                seed,
                ops_of(op, column),
            )
            for test in more:
                test()
        except (AssertionError, PTXError):
            return
    pytest.fail("nothing saw it")
