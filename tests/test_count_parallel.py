"""Memory and bytes sent are those of ranks that are gone through one by one; V3's own plan comes
out as published; the arithmetic shown is the arithmetic done."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from itertools import combinations, pairwise, product
from math import prod
from typing import Any

import numpy as np
import pytest

from refimpl.config import ModelConfig, preset
from refimpl.count import Section
from refimpl.count_parallel import Plan, count_parallel, read_plan
from refimpl.errors import CouldNotRun
from refimpl.model import BlockInput, forward
from refimpl.parameters import init_parameters, is_buffer, is_stacked, parameter_shapes

from test_count import evaluated

TINY = preset("tiny")  # 8 experts, 3 chosen; 1 dense and 2 MoE layers, 2 MTP modules
OURS = "(data="
V3 = "(DeepSeek-V3's own"


def figures(tables: list[Section], scheme: str = OURS) -> dict[str, float]:
    """Every line's value by its name, of the tables of one scheme."""
    lines = [line for table in tables if scheme in table.title for line in table.lines]
    values = {line.name: line.value for line in lines}
    assert len(values) == len(lines) - 1  # "in all" of memory and of what is sent
    return values


def ends(count: int, parts: int) -> list[int]:
    return [count * i // parts for i in range(parts + 1)]


def held(config: ModelConfig, plan: Plan, rank: int) -> dict[str, int]:
    """Parameters that a rank has of each tensor."""
    cut = ends(config.experts, plan.expert)
    mine = cut[rank % plan.expert + 1] - cut[rank % plan.expert]
    return {
        name: prod(shape) // config.experts * mine if is_stacked(name) else prod(shape)
        for name, shape in parameter_shapes(config).items()
        if not is_buffer(name)
    }


def of_rank(config: ModelConfig, plan: Plan, rank: int) -> dict[str, float]:
    """Memory of a rank, and what it sends of gradients and parameters, tensor by tensor."""
    ranks = plan.data * plan.context
    found = Counter[str]()
    for name, size in held(config, plan, rank).items():
        sharing = [
            r for r in range(ranks) if not is_stacked(name) or r % plan.expert == rank % plan.expert
        ]
        shard = size / len(sharing)
        found["parameters"] += 2 * size
        found["gradients"] += 4 * size
        found["AdamW: master weights, its shard"] += 4 * shard
        found["AdamW: two moments, its shard"] += 8 * shard
        whose = "experts'" if is_stacked(name) else "other"
        found[f"{whose} gradients, reduce-scattered"] += sum(
            4 * shard for r in sharing if r != rank
        )
        found[f"{whose} parameters, all-gathered"] += sum(2 * shard for r in sharing if r != rank)
    return dict(found)


def traffic(config: ModelConfig, plan: Plan, sequences: int, length: int) -> dict[str, float]:
    """What a rank sends on average, message by message; each token chooses every expert equally,
    and for the experts every rank has as many tokens."""
    c, sent = config, Counter[str]()
    batch, cut = ends(sequences, plan.data), ends(c.experts, plan.expert)
    block = 2 * c.heads * (c.nope + c.rope + c.value)  # bytes of a token's keys and values
    row = 2 * c.width
    layers = [(length, layer >= c.dense_layers) for layer in range(c.layers)]
    layers += [(length - k, True) for k in range(1, c.mtp_depth + 1)]
    for data, piece, (positions, moe) in product(range(plan.data), range(plan.context), layers):
        rank, own = data * plan.context + piece, batch[data + 1] - batch[data]
        pieces = [b - a for a, b in pairwise(ends(positions, plan.context))]
        even = sequences * positions / (plan.data * plan.context)
        for hop in range(plan.context if plan.context > 1 else 0):
            passing = own * pieces[piece - hop] * block
            sent["keys and values, forward"] += passing if hop < plan.context - 1 else 0
            sent["the same and gradients, backward"] += 2 * passing
        if not moe:
            continue
        for other in range(plan.context):
            counts = own * (c.experts + 1) * 8
            sent["counts of the balance loss"] += counts if other != piece else 0
        for expert in range(c.experts):
            share = next(s for s in range(plan.expert) if expert < cut[s + 1])
            rows = even * c.top_k / c.experts if share != rank % plan.expert else 0
            for part in ("dispatched", "combined"):
                sent[f"{part}, forward and backward"] += rows * row  # forward
                sent[f"{part}, forward and backward"] += rows * row  # backward
    ranks = plan.data * plan.context
    return {name: total / ranks for name, total in sent.items()}


@pytest.mark.parametrize(
    "plan",
    [
        Plan(),
        Plan(data=4),
        Plan(data=4, expert=2),
        Plan(data=3, expert=3),
        Plan(context=3),
        Plan(data=2, context=3, expert=6),
        Plan(data=2, context=2, expert=4),
    ],
    ids=str,
)
@pytest.mark.parametrize("change", [{}, {"mtp_depth": 0, "tied": True}])
def test_one_rank_after_the_other(plan: Plan, change: dict[str, Any]) -> None:
    """7 sequences of 11 tokens: the data ranks have unlike numbers, the context ranks unlike
    pieces, 3 or 6 ranks unlike numbers of experts."""
    config = replace(TINY, **change)
    sequences, length = 7, 11
    found = figures(count_parallel(config, plan, sequences=sequences, length=length))
    each = [of_rank(config, plan, rank) for rank in range(plan.data * plan.context)]
    most = max(each, key=lambda one: one["parameters"])
    for name, value in most.items():
        assert found.pop(name) == pytest.approx(value, rel=1e-12), name
    for name, value in traffic(config, plan, sequences, length).items():
        assert found.pop(name, 0) == pytest.approx(value, rel=1e-12), name
    left = {name for name in found if "apart" in name or name == "in all"}
    assert left <= {"in all", "apart: block inputs, per sequence", "apart: ring with MLA absorbed"}


def test_inputs_of_blocks() -> None:
    """Those that `forward` keeps when it recomputes."""
    tokens = np.random.default_rng(0).integers(0, TINY.vocabulary, (1, 11))
    _, saved = forward(init_parameters(TINY), tokens, TINY, recompute=True)

    def inputs(x: Any) -> list[BlockInput]:
        if isinstance(x, BlockInput):
            return [x]
        parts = x.values() if isinstance(x, dict) else x if isinstance(x, (list, tuple)) else ()
        return [found for part in parts for found in inputs(part)]

    blocks = inputs(tuple(saved))
    assert len(blocks) == TINY.layers + TINY.mtp_depth
    numbers = sum(block.x.size for block in blocks)
    found = figures(count_parallel(TINY, Plan(), sequences=7, length=11))
    assert found["apart: block inputs, per sequence"] == 2 * numbers
    halved = figures(count_parallel(TINY, Plan(context=2), sequences=7, length=11))
    assert halved["apart: block inputs, per sequence"] == numbers


def test_absorbed_ring() -> None:
    """One head of keys C + R wide, values C wide; V3's are 37 times narrower than all heads'."""
    c, hops = preset("v3"), 3 * 8 - 1
    found = figures(count_parallel(c, Plan(data=256, context=8)))
    naive = found["keys and values, forward"] + found["the same and gradients, backward"]
    tokens = 60 * (61 * 4096 + 4095) / 8
    assert naive == pytest.approx(tokens * 128 * (192 + 128) * hops * 2, rel=1e-12)
    wanted = tokens * (512 + 64 + 512) * hops * 2
    assert found["apart: ring with MLA absorbed"] == pytest.approx(wanted, rel=1e-12)


def test_plan_of_v3() -> None:
    """2,048 GPUs; the sizes of the tensors as DeepSeek's file has them."""
    c = preset("v3")
    found = figures(count_parallel(c, Plan()), V3)
    assert (found["ranks of a stage"], found["ranks"]) == (128, 2048)
    routed = 59 * 256 * 44_040_192
    others = 671_026_404_352 + 11_610_067_968 - routed
    on_rank = 2 * (routed / 64 + others) / 16  # two stages of 16
    assert found["parameters"] == 2 * on_rank
    assert found["gradients"] == 4 * on_rank
    shard = (routed + others) / 2048  # each number on one rank alone
    assert found["AdamW: master weights, its shard"] == pytest.approx(4 * shard, rel=1e-12)
    assert found["AdamW: two moments, its shard"] == pytest.approx(2 * 2 * shard, rel=1e-12)
    assert found["experts' gradients, reduce-scattered"] == 4 * (2 * routed / 64 / 16) * 3 / 4
    tokens = 15_360 * 4096 / 128
    crossing = sum(1 for stage in range(16) if stage + 1 < 16) / 16  # per rank of a pipeline
    assert found["tokens of a rank"] == tokens
    assert found["states and gradients to other stages"] == 2 * tokens * crossing * 7168 * 2


def test_wires_of_v3() -> None:
    """Four of eight nodes, two experts on each, and eight GPUs per node, gone through one by one
    for a token of node 0 and GPU 0."""
    found = figures(count_parallel(preset("v3"), Plan()), V3)
    chosen = list(combinations(range(8), 4))
    infiniband = sum(node != 0 for nodes in chosen for node in nodes) / len(chosen)
    nvlink = 4 * 2 * sum(gpu != 0 for gpu in range(8)) / 8
    passed = 120 * (58 * 4096 + 4095) / 16
    for wire, rows in {"InfiniBand": infiniband, "NVLink": nvlink}.items():
        for part, size in {"dispatched": 1, "combined": 2}.items():
            value = found[f"{part}, {wire}, at most"]
            assert value == pytest.approx(2 * passed * rows * 7168 * size, rel=1e-12)
    rows = 8 * sum(gpu != 0 for gpu in range(64)) / 64
    wanted = 2 * passed * rows * 7168 * (1 + 2)
    assert found["apart: with a row per expert"] == pytest.approx(wanted, rel=1e-12)


def test_only_v3_has_a_plan_of_its_own() -> None:
    assert len(count_parallel(preset("v3"), Plan())) == 6
    assert len(count_parallel(preset("kimi-k2"), Plan())) == 3
    assert len(count_parallel(replace(preset("v3"), layers=60), Plan())) == 3


def test_a_pipeline_is_an_equal_share() -> None:
    """Of parameters, and of what is sent for experts; every token still passes each stage."""
    whole = figures(count_parallel(TINY, Plan(data=4, expert=2), sequences=8, length=11))
    third = figures(count_parallel(TINY, Plan(4, 2, 1, 3), sequences=8, length=11))
    for name in ("parameters", "gradients", "other parameters, all-gathered"):
        assert third[name] == pytest.approx(whole[name] / 3)
    name = "combined, forward and backward"
    assert third[name] == pytest.approx(whole[name] / 3)
    assert third["tokens of a rank"] == whole["tokens of a rank"] == 22
    assert third["states and gradients to other stages"] == pytest.approx(2 * 22 * 2 / 3 * 20 * 2)
    assert third["ranks"] == 12


@pytest.mark.parametrize("model", ["v3", "tiny", "v2-lite"])
@pytest.mark.parametrize("plan", [Plan(), Plan(6, 3, 2), Plan(4, 8, 2, 3)], ids=str)
@pytest.mark.parametrize("length", [11, 4096])
def test_the_arithmetic_shown_is_the_arithmetic_done(model: str, plan: Plan, length: int) -> None:
    for table in count_parallel(preset(model), plan, sequences=1000, length=length):
        for i, line in enumerate(table.lines):
            if above := re.fullmatch(r"sum of the (\d+) above", line.arithmetic):
                assert line.value == sum(x.value for x in table.lines[i - int(above[1]) : i])
                assert int(above[1]) == i  # from the top
            elif line.arithmetic:
                assert evaluated(line.arithmetic) == pytest.approx(line.value, rel=1e-5), line
        assert all(len(line.name) <= 36 for line in table.lines)  # what its column takes


def test_a_plan_as_text() -> None:
    assert read_plan("data=256,expert=64,context=8,pipeline=2") == Plan(256, 64, 8, 2)
    assert read_plan("context=3") == Plan(context=3)
    for plan in (Plan(), Plan(4, 2, 2), Plan(4, 2, 2, 3)):
        assert read_plan(str(plan)) == plan


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be data=N,expert=N,context=N,pipeline=N, .*; got nothing"),
        ("data", "must be data=N.*; got data"),
        ("data=", "must be data=N.*; got data="),
        ("data=-1", "must be data=N.*; got data=-1"),
        ("data=1.5", "must be data=N.*; got data=1.5"),
        ("data=2,", "must be data=N.*; got nothing"),
        ("data=٣", "must be data=N.*; got data=٣"),
        ("tensor=2", "tensor=2: tensor is not one of data, expert, context, pipeline"),
        ("count=2", "count=2: count is not one of"),
        ("data=2,data=2", "data=2,data=2: data is twice"),
        ("data=0", "data=0: data must lie in 1…1,000,000,000, got 0"),
        ("data=9999999999", "data=9999999999: data must lie in .* got 9,999,999,999"),
    ],
)
def test_bad_text(text: str, message: str) -> None:
    with pytest.raises(CouldNotRun, match=f"^parallel {message}"):
        read_plan(text)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            Plan(data=2, expert=3),
            "expert=3,context=1: expert must divide data × context = 2, got 3",
        ),
        (Plan(data=16, expert=16), "expert must be at most the 8 experts of a layer, got 16"),
        (Plan(context=12), "context must be at most the 11 tokens of a sequence, got 12"),
        (Plan(pipeline=4), "pipeline must be at most the 3 layers, got 4"),
    ],
)
def test_bad_plan(plan: Plan, message: str) -> None:
    with pytest.raises(CouldNotRun, match=f"^parallel data=.*{message}$"):
        count_parallel(TINY, plan, length=11)


def test_bad_sizes() -> None:
    for sequences in (0, -1, 10**10):
        with pytest.raises(CouldNotRun, match=f"^sequences must lie in .* got {sequences:,}$"):
            count_parallel(TINY, Plan(), sequences=sequences)
    with pytest.raises(CouldNotRun, match=r"^length must lie in 3…"):
        count_parallel(TINY, Plan(), length=2)
    dense = replace(TINY, dense_layers=TINY.layers, mtp_depth=0)
    count_parallel(dense, Plan(data=2))
    with pytest.raises(CouldNotRun, match="at most the 1 experts of a layer, got 2"):
        count_parallel(dense, Plan(data=2, expert=2))
