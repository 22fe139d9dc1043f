"""Training on many ranks: memory per rank, and bytes sent per rank and step, for a plan and beside
it for DeepSeek-V3's own.

A plan has ``data`` × ``context`` ranks, times ``pipeline``: each data rank has sequences of its
own, each context rank a piece of each of them, each pipeline rank some of the layers. Every
``expert`` of the data × context ranks hold a layer's routed experts between them; all other tensors
of a layer are on each. AdamW's state is sharded over the ranks that hold the same tensor (ZeRO-1).
refimpl itself has no pipeline.

Sources: DeepSeek-V3 (2412.19437) section 3.1 for the cluster, 3.2 for the plan, DualPipe and the
routes of a token, 3.3 for the types, 4.2 for the batch; ZeRO (1910.02054) section 5. Letters:
derivations/README.md.
"""

from __future__ import annotations

import re
from math import prod
from typing import NamedTuple

from .config import ModelConfig
from .count import Figure, Number, Section, check_length, published_as
from .errors import CouldNotRun
from .parameters import is_buffer, is_stacked, moe_layers, parameter_shapes

__all__ = ["SEQUENCES", "Plan", "count_parallel", "read_plan"]

SEQUENCES = 15_360  # of a step of V3's pre-training, behind the ramp
MOST = 10**9  # sequences, and ranks of a kind
PLAN = "data=N,expert=N,context=N,pipeline=N, each at least 1 and 1 by default"


class Plan(NamedTuple):
    """How many ranks share each kind of work."""

    data: int = 1
    expert: int = 1  # of the data · context ranks, which hold all experts between them
    context: int = 1
    pipeline: int = 1

    def __str__(self) -> str:
        named = f"data={self.data},expert={self.expert},context={self.context}"
        return named + f",pipeline={self.pipeline}" * (self.pipeline > 1)


class Bytes(NamedTuple):
    """What a number takes, by what it is."""

    parameter: int
    gradient: int
    master: int
    moment: int  # each of AdamW's two
    dispatched: int  # rows to their expert, and the gradients of its outputs
    combined: int  # its outputs, and the gradients of its rows
    activation: int  # all others


class Nodes(NamedTuple):
    """Machines of several GPUs, which a token's rows reach once and are handed on inside."""

    gpus: int
    most: int  # that a token's experts may lie on


class Scheme(NamedTuple):
    """A plan, and how it is carried out."""

    name: str
    plan: Plan
    size: Bytes
    stages: int = 1  # of a pipeline that a rank holds
    nodes: Nodes | None = None


BFLOAT16 = Bytes(
    parameter=2, gradient=4, master=4, moment=4, dispatched=2, combined=2, activation=2
)
V3_OWN = Scheme(
    "DeepSeek-V3's own",
    Plan(data=128, expert=64, context=1, pipeline=16),
    BFLOAT16._replace(moment=2, dispatched=1),
    stages=2,
    nodes=Nodes(gpus=8, most=4),
)
NO_PIPELINE = "refimpl runs no pipeline; a stage is counted as an equal share of everything."
V3_RANKS = (
    "Published: 2,048 H800s, 16-way pipeline, 64-way expert parallel over 8 nodes; so 128 data "
    "ranks remain. DualPipe gives a rank two of the stages (the report's two copies of the "
    "parameters), and every tensor to twice as many ranks. Which layers a stage has is not "
    "published: this is the mean, and those with the embedding or the head hold more."
)
MEMORY = (
    "bfloat16 parameters; gradients, master weights and moments in float32. (With float32 "
    "parameters: 4 bytes each, no master weights.) Shards are taken as equal. The inputs are what "
    "recomputation keeps. Left out: the gates' biases, batches, and what one block's backward "
    "needs at a time."
)
V3_MEMORY = (
    "Published: gradients and master weights in FP32, moments in bfloat16. Assumed: the weights "
    "that are multiplied in bfloat16 (FP8 would be about half), and every rank with all gradients "
    "of its parameters. Not counted: activations, which depend on the schedule; the moving "
    "average of the parameters, which is on the CPU."
)
SENT = (
    "A row is a token on its way to one expert, or back; tokens and routing are even, so 1 / "
    "expert of the rows stay. Keys and values are MLA's naive ones, of all heads. They visit "
    "every rank of the ring; their gradients go with them, and home. Left out: ids, masks, and "
    "what is one number per token or less. Recomputation sends a second time what a forward "
    "sends."
)
V3_SENT = (
    "Published: dispatch in FP8, combine in bfloat16, forward and backward. A token goes once to "
    "each node of its experts, at most 4 of 8, over InfiniBand, and on to the experts over "
    "NVLink; results come back the same way, added up per node. It is less where a token needs "
    "fewer nodes, or has two experts on one GPU. Assumed: gradients sent in FP32, parameters and "
    "the states between stages in bfloat16. Left out: FP8's scales."
)


def read_plan(text: str) -> Plan:
    """The plan of ``data=2,expert=4``; CouldNotRun says what is wrong."""
    found: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"([^=]*)=([0-9]{1,10})", part)
        if match is None:
            raise CouldNotRun(f"must be {PLAN}; got {part or 'nothing'}", argument="parallel")
        name, size = match[1], int(match[2])
        if name not in Plan._fields or name in found:
            wrong = "twice" if name in found else f"not one of {', '.join(Plan._fields)}"
            raise CouldNotRun(f"{text}: {name} is {wrong}", argument="parallel")
        if not 1 <= size <= MOST:
            raise CouldNotRun(
                f"{text}: {name} must lie in 1…{MOST:,}, got {size:,}", argument="parallel"
            )
        found[name] = size
    return Plan(**found)


def count_parallel(
    config: ModelConfig, plan: Plan, *, sequences: int = SEQUENCES, length: int = 4096
) -> list[Section]:
    """Three tables for a step of ``sequences`` of ``length`` tokens: the ranks, their memory, what
    they send; for V3 each a second time, for its own plan. CouldNotRun if the plan does not fit."""
    check_length(config, length)
    if not 1 <= sequences <= MOST:
        raise CouldNotRun(f"must lie in 1…{MOST:,}, got {sequences:,}", argument="sequences")
    _check(config, plan, length)
    schemes = [Scheme("", plan, BFLOAT16)]
    if published_as(config) == "v3":
        schemes.append(V3_OWN)
    tables: list[tuple[Section, ...]] = []
    for scheme in schemes:
        ranks, share = _ranks(config, scheme, sequences, length)
        memory = _memory(config, scheme, share, length)
        tables.append((ranks, memory, _sent(config, scheme, share)))
    return [table for same in zip(*tables, strict=True) for table in same]


def _check(c: ModelConfig, plan: Plan, length: int) -> None:
    """CouldNotRun unless the plan fits the model and the sequences."""
    experts = c.experts if len(moe_layers(c)) else 1
    for name, most, what in (
        ("expert", experts, "experts of a layer"),
        ("context", length, "tokens of a sequence"),
        ("pipeline", c.layers, "layers"),
    ):
        size = getattr(plan, name)
        if size > most:
            raise CouldNotRun(
                f"{plan}: {name} must be at most the {most:,} {what}, got {size:,}",
                argument="parallel",
            )
    if plan.data * plan.context % plan.expert:
        raise CouldNotRun(
            f"{plan}: expert must divide data × context = {plan.data * plan.context:,}, got "
            f"{plan.expert:,}",
            argument="parallel",
        )


class Share(NamedTuple):
    """What a rank has, on average over the stages of a pipeline."""

    routed: Number  # parameters of its experts
    others: Number  # all its other parameters
    replicas: Number  # ranks that hold an expert
    holders: Number  # ranks that hold another tensor
    sequences: Number  # whole ones, of its data rank
    tokens: Number
    in_blocks: Number  # tokens, once per block
    in_experts: Number  # tokens, once per MoE layer
    rows: Number  # that leave for the expert of another rank


def _section(scheme: Scheme, what: str, unit: str = "") -> Section:
    name = f"{scheme.name}, " if scheme.name else ""
    return Section(f"{what} ({name}{scheme.plan})", unit)


def _ranks(c: ModelConfig, scheme: Scheme, sequences: int, length: int) -> tuple[Section, Share]:
    """How many ranks hold what, and how many tokens they have."""
    plan, stages = scheme.plan, scheme.stages
    table = _section(scheme, "Ranks")
    sizes = {n: prod(shape) for n, shape in parameter_shapes(c).items() if not is_buffer(n)}
    stacked = sum(size for name, size in sizes.items() if is_stacked(name))
    grid = table.add(
        "ranks of a stage" if plan.pipeline > 1 else "ranks", Figure(plan.data) * plan.context
    )
    if plan.pipeline > 1:
        table.add("ranks", Figure(grid) * plan.pipeline)
    holders = table.add("ranks that hold the same tensor", Figure(grid) * stages)
    replicas = table.add("… the same expert", Figure(holders) / plan.expert)
    table.add("parameters of routed experts", stacked)
    table.add("other parameters", sum(sizes.values()) - stacked)
    most = -(-c.experts // plan.expert)
    table.add("experts per layer and rank, at most", most)
    routed = table.add(
        "parameters of experts on a rank",
        Figure(stacked) / c.experts * most * stages / plan.pipeline,
    )
    others = table.add(
        "other parameters on a rank", Figure(sum(sizes.values()) - stacked) * stages / plan.pipeline
    )
    own = table.add("sequences of a data rank", Figure(sequences) / plan.data)
    tokens = table.add("tokens of a rank", Figure(own) * length / plan.context)
    own_part = Figure(own) / plan.context / plan.pipeline
    in_blocks = table.add("tokens × blocks of a rank", _positions(c, c.layers, length) * own_part)
    moe = c.layers - c.dense_layers
    in_experts = table.add("tokens × MoE layers of a rank", _positions(c, moe, length) * own_part)
    rows = table.add(
        "rows for other ranks' experts",
        Figure(in_experts) * c.top_k * (Figure(plan.expert) - 1) / plan.expert,
    )
    if plan.pipeline > 1:
        table.notes.append(V3_RANKS if scheme is V3_OWN else NO_PIPELINE)
    return table, Share(routed, others, replicas, holders, own, tokens, in_blocks, in_experts, rows)


def _positions(c: ModelConfig, layers: int, length: int) -> Figure:
    """Tokens of a sequence in so many layers of the main model, and in the MTP modules; module k
    has k fewer."""
    found = Figure(layers) * length
    for depth in range(1, c.mtp_depth + 1):
        found += length - depth
    return found


def _memory(c: ModelConfig, scheme: Scheme, share: Share, length: int) -> Section:
    """What a rank holds between two steps, and the gradients."""
    memory, size = _section(scheme, "Memory per rank", "B"), scheme.size
    held = Figure(share.routed) + share.others
    shard = Figure(share.routed) / share.replicas + Figure(share.others) / share.holders
    memory.add("parameters", held * size.parameter)
    memory.add("gradients", held * size.gradient)
    memory.add("AdamW: master weights, its shard", shard * size.master)
    memory.add("AdamW: two moments, its shard", shard * 2 * size.moment)
    memory.add_sum("in all", 4)
    if scheme.plan.pipeline == 1:
        inputs = _positions(c, c.layers, length) * c.width * size.activation / scheme.plan.context
        memory.add("apart: block inputs, per sequence", inputs)
    memory.notes.append(V3_MEMORY if scheme is V3_OWN else MEMORY)
    return memory


def _sent(c: ModelConfig, scheme: Scheme, share: Share) -> Section:
    """Bytes that leave a rank in a step."""
    sent = _section(scheme, "Sent per rank and step", "B")
    plan, size = scheme.plan, scheme.size
    shards = {
        "experts'": Figure(share.routed) * (Figure(share.replicas) - 1) / share.replicas,
        "other": Figure(share.others) * (Figure(share.holders) - 1) / share.holders,
    }
    for name, numbers in shards.items():
        sent.add(f"{name} gradients, reduce-scattered", numbers * size.gradient)
    for name, numbers in shards.items():
        sent.add(f"{name} parameters, all-gathered", numbers * size.parameter)
    if scheme.nodes is None:
        there = {"forward and backward": Figure(share.rows)}
    else:
        there = _by_node(c, plan, scheme.nodes, share)
    if plan.expert > 1:
        for name, rows in there.items():
            sent.add(f"dispatched, {name}", Figure(2) * rows * c.width * size.dispatched)
        for name, rows in there.items():
            sent.add(f"combined, {name}", Figure(2) * rows * c.width * size.combined)
    if plan.context > 1:
        _add_ring(sent, c, scheme, share)
    if plan.pipeline > 1:
        crossing = Figure(2) * share.tokens * (Figure(plan.pipeline) - 1) / plan.pipeline
        sent.add("states and gradients to other stages", crossing * c.width * size.activation)
    sent.add_sum("in all", len(sent.lines))
    if scheme.nodes is not None:
        both = Figure(2) * share.rows * c.width * (Figure(size.dispatched) + size.combined)
        sent.add("apart: with a row per expert", both)
    if plan.context > 1:
        wide = Figure(2) * c.kv_latent + c.rope
        hops = Figure(3) * plan.context - 1
        absorbed = Figure(share.in_blocks) * wide * hops * size.activation
        sent.add("apart: ring with MLA absorbed", absorbed)
    sent.notes.append(V3_SENT if scheme is V3_OWN else SENT)
    return sent


def _by_node(c: ModelConfig, plan: Plan, nodes: Nodes, share: Share) -> dict[str, Figure]:
    """Rows that a rank sends by wire, one way, where they go once to a node."""
    many = Figure(plan.expert // nodes.gpus)
    return {
        "InfiniBand, at most": Figure(share.in_experts) * nodes.most * (many - 1) / many,
        "NVLink, at most": Figure(share.in_experts)
        * c.top_k
        * (Figure(nodes.gpus) - 1)
        / nodes.gpus,
    }


def _add_ring(sent: Section, c: ModelConfig, scheme: Scheme, share: Share) -> None:
    """Keys and values to every other rank of a sequence and their gradients home, and the counts
    of the balance loss to each."""
    ring, size = scheme.plan.context, scheme.size.activation
    wide = Figure(c.heads) * (Figure(c.nope) + c.rope + c.value)
    block = Figure(share.in_blocks) * wide
    sent.add("keys and values, forward", block * (Figure(ring) - 1) * size)
    sent.add("the same and gradients, backward", block * 2 * ring * size)
    layers = len(moe_layers(c))
    counts = Figure(share.sequences) * layers * (Figure(c.experts) + 1)
    sent.add("counts of the balance loss", counts * (Figure(ring) - 1) * 8)
