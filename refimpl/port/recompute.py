"""One part of a run again, alone, from what the truth holds (inputs, cotangents, choices) and the
weights of the checkpoint: clean, or with a planted bug; in float64, float32 or bfloat16.

The parts of a layer are computed together, its block from the stream that it reads to the stream
that it hands on, and back from the gradient of what it hands on. All that lies above the blocks
(final norm, head, loss, MTP modules) is computed together, too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, lru_cache
from math import inf, prod
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from .. import model as reference_model
from ..batch import Batch, make_batch
from ..check.cases import CASES, pair_of
from ..check.planted import FUNCTIONS, Planted, fresh_module, plant_module
from ..checkpoint.names import stored_names
from ..checkpoint.tensor_file import one_line
from ..config import ModelConfig
from ..errors import CouldNotRun
from ..grads.cotangents import Calls, activations_of, noting
from ..grads.request import EMBEDDINGS, HIDDEN, INNER, SCORES
from ..grads.rounded import round_bfloat16, rounded
from ..memory import available_memory
from ..ops import IMPLEMENTATIONS, REFERENCE, AnyOp, Op, Ops
from ..parameters import (
    EMBEDDING,
    FINAL_NORM,
    MTP,
    MTP_NORM,
    block_shapes,
    depth_of,
    head_name,
    layer_name,
    module_name,
    mtp_layer,
    mtp_layers,
    parameter_shapes,
)
from .orders import shuffled
from .parts import Part
from .truth import Truth

__all__ = ["BLOCK", "MOST_BYTES", "Setting", "planted_code", "recompute"]

MOST_BYTES = 2**33  # of the weights of one block in float64: beyond, nothing is computed again
TIMES = 5  # so much memory as its weights take a block: 22.7 GB at 4.6 GB
Arrays = dict[str, np.ndarray]
BLOCK = ("attention", "gate", "network")  # the kinds of parts of one block
WITHOUT = ("mtp", "balance", "shared")  # what can be left out of a run


class Code(NamedTuple):
    """An implementation, right or with a bug."""

    model: ModuleType
    ops: Mapping[str, AnyOp]  # those that differ from the run's
    router: ModuleType


@cache
def planted_code(bug: Planted | None) -> Code:
    """The code with the bug in it, made once for each bug."""
    router = fresh_module("refimpl.ops.router")
    if bug is None:
        return Code(reference_model, {}, router)
    if bug.op == "model":
        return Code(plant_module(bug), {}, router)
    if bug.op in FUNCTIONS:
        module = fresh_module("refimpl.model")
        if hasattr(module, bug.op):
            setattr(module, bug.op, getattr(plant_module(bug), bug.op))
        return Code(module, {}, router)
    if bug.op == "router":
        router = plant_module(bug)
        pair = Op(router.router_forward, router.router_backward)
        return Code(reference_model, {"router": pair}, router)
    module = plant_module(bug)
    pair = Op(getattr(module, f"{bug.op}_forward"), getattr(module, f"{bug.op}_backward"))
    return Code(reference_model, {bug.op: pair}, router)


class Setting(NamedTuple):
    """How to compute: the code, the type, the order of sums, and what is left out."""

    code: Code
    dtype: str = "float64"
    seed: int = 0
    without: str = ""  # of `WITHOUT`
    ops: Ops | None = None  # instead of those of the truth's implementation
    most_bytes: float = inf  # of the weights, where less than `most_bytes` may be computed again

    @property
    def number_type(self) -> str:
        return "float64" if self.dtype == "float64" else "float32"

    def placing(self) -> Callable[[Any], Any]:
        """A function that brings an array into the type, and into the order of sums."""
        own = shuffled(self.seed)

        def place(x: Any) -> Any:
            if x is None or x.dtype.kind != "f":
                return x
            with np.errstate(over="ignore"):
                x = np.asarray(x, self.number_type)
            return own(round_bfloat16(x) if self.dtype == "bfloat16" else x)

        return place

    def table(self, implementation: str) -> Ops:
        """The ops of the run, with the code's in their place, each rounded in bfloat16. A kernel's
        are the reference's, which can sum in other orders."""
        ops: Ops = self.ops or IMPLEMENTATIONS.get(implementation, REFERENCE)
        for name, op in self.code.ops.items():
            if name == "cross_entropy":
                name, op = "head_cross_entropy", head_of(op)
            ops = ops | {SLOTS.get(name, name): op}
        if self.dtype == "bfloat16":
            ops = ops | {name: rounded(op) for name, op in ops.items()}
        return ops


SLOTS = {"flash_attention": "attention", "mla_absorbed": "mla"}  # that another op may take


def head_of(cross_entropy: AnyOp) -> AnyOp:
    """`head_cross_entropy`, made of this cross-entropy of whole logits."""

    def forward(h: Any, w: Any, *, ops: Ops, block: Any = None, **given: Any) -> tuple[Any, Any]:
        logits, linear_saved = ops.linear.forward(h, w)
        loss, saved = cross_entropy.forward(logits, **given)
        return loss, (linear_saved, saved, ops)

    def backward(dloss: Any, saved: Any) -> Any:
        linear_saved, loss_saved, ops = saved
        return ops.linear.backward(cross_entropy.backward(dloss, loss_saved), linear_saved)

    return Op(forward, backward)


def recompute(
    truth: Truth,
    part: Part,
    bug: Planted | None,
    dtype: str = "float64",
    seed: int = 0,
    without: str = "",
) -> Arrays:
    """The tensors of ``part``, and others that are made with them, by name.

    Args:
        bug: planted in the code; None: clean.
        dtype: float64, float32, or bfloat16 (values of bfloat16 in float32 arrays).
        seed: of the order of sums; 0: NumPy's.
        without: "mtp", "balance" or "shared": the run without that loss or those experts.

    CouldNotRun if the truth lacks an input or does not fit together, or its checkpoint is gone,
    another one, or too large. Whatever a bug raises goes through.
    """
    setting = Setting(planted_code(bug), dtype, seed, without)
    try:
        with np.errstate(all="ignore"):
            found = made_with(setting, truth, part)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        if bug is not None:
            raise
        why = one_line(f"{type(error).__name__} {error}")
        raise CouldNotRun(
            f"{part.name} of {truth.folder} can't be computed again: {why}"
        ) from error
    return {name: np.asarray(x) for name, x in found.items()}


def made_with(setting: Setting, truth: Truth, part: Part) -> Arrays:
    """The tensors of ``part`` and those made with them, whatever the code raises."""
    if part.case:
        return case_of(truth, part.case, setting)
    if part.kind in BLOCK:
        assert part.layer is not None
        return block_of(truth, part.layer, setting, backward=part.backward)
    if part.kind == "embedding":
        return embedding_of(truth, setting, backward=part.backward)
    return above_of(truth, setting, backward=part.backward)


# What a run needs


class Inputs:
    """What the truth hands to one run, in the run's type."""

    def __init__(self, truth: Truth, setting: Setting) -> None:
        self.truth, self.setting = truth, setting
        self.place = setting.placing()
        assert truth.config is not None
        self.config = left_out(truth.config, setting.without)
        self.loss = truth.metadata["request"]["loss"]
        self.batch = batch_of(truth)
        ops = setting.table(truth.metadata["implementation"])
        self.ops = reference_model.ops_for(self.batch, self.config, ops)

    def tensor(self, name: str) -> Any:
        """A tensor of the truth; CouldNotRun names it if it is not there."""
        return self.place(stored(self.truth, name))

    def run(self, names: list[str], layer: int | None = None) -> Any:
        """The `Run` with these weights, and with the choices of a layer."""
        model = self.setting.code.model
        shapes = parameter_shapes(self.config)
        total = sum(8 * prod(shapes[name]) for name in names)
        if total > (most := min(most_bytes(), self.setting.most_bytes)):
            raise CouldNotRun(
                f"the weights of this part take {total / 2**30:.1f} GiB in float64, and at most "
                f"{most / 2**30:.1f} can be computed again here"
            )
        params = {name: self.place(weight(self.truth, name)) for name in names}
        routes = {}
        if layer is not None and layer >= self.config.dense_layers:
            indices = stored(self.truth, f"aux/routes.{layer}").astype(np.int64)
            counted = f"aux/counted.{layer}"
            given = stored(self.truth, counted).astype(np.int64) if counted in self.truth else None
            if given is None and self.config.conventions.balance_counts == "routed":
                given = indices
            routes = {layer: model.Route(indices, given)}
        return model.Run(params, self.config, self.ops, routes, self.with_loss)

    @property
    def with_loss(self) -> bool:
        return bool(self.loss != "dlogits")

    def stream(self, layer: int) -> Any:
        """What a layer of the main model reads, or, behind the last, the final norm."""
        return self.tensor(f"act/{module_name(layer - 1) if layer else EMBEDDINGS}")

    def state(self, depth: int) -> Any:
        """What MTP module ``depth`` reads of the depth before it, made by the right code."""
        config, before = self.config, mtp_layer(self.config, depth - 1)
        if depth == 1:
            x = self.stream(config.layers)
            return self.tensor(f"act/{HIDDEN}") if config.mtp_starts_normed else x
        x = self.tensor(f"act/{module_name(before)}")
        if config.mtp_hands_on_raw:
            return x
        norm = self.place(weight(self.truth, layer_name(before, MTP_NORM)))
        return self.clean.rms_norm.forward(x, norm, eps=config.norm_eps)[0]

    @property
    def clean(self) -> Ops:
        """The ops without the bug."""
        right = self.setting._replace(code=planted_code(None))
        return right.table(self.truth.metadata["implementation"])


@cache
def free_bytes() -> float:
    """The memory that was free when a part was first computed again."""
    found = available_memory()
    return inf if found is None else found


def most_bytes() -> float:
    """How many bytes of weights a part may have to be computed again."""
    return min(MOST_BYTES, free_bytes() / TIMES)


def left_out(config: ModelConfig, what: str) -> ModelConfig:
    """The config of the run without one of its parts."""
    changed: dict[str, dict[str, Any]] = {
        "": {},
        "mtp": {"mtp_weight": 0.0},
        "balance": {"balance_weight": 0.0},
        "shared": {"shared_experts": 0},
    }
    return replace(config, **changed[what])


def stored(truth: Truth, name: str) -> np.ndarray:
    """A tensor of the truth; CouldNotRun names it if it is not there."""
    if name not in truth:
        raise CouldNotRun(f"{truth.folder} has no {name}: write it again with all activations")
    return truth.array(name)


@lru_cache(maxsize=64)
def weight(truth: Truth, name: str) -> np.ndarray:
    """A weight of the checkpoint in float64."""
    x: np.ndarray = opened(truth).tensor(name)
    return x


@lru_cache(maxsize=2)
def opened(truth: Truth) -> Any:
    """The checkpoint, opened once."""
    return truth.checkpoint("float64")


@lru_cache(maxsize=8)
def batch_of(truth: Truth) -> Batch:
    """The main model's batch."""
    assert truth.config is not None
    names = ("targets", "mask", "key_mask", "segments", "positions")
    given: dict[str, Any] = {
        name: truth.array(f"in/{name}") for name in names if f"in/{name}" in truth
    }
    if "in/grpo_mask" in truth:
        given["mask"] = truth.array("in/grpo_mask")
    return make_batch(
        np.empty(0), stored(truth, "in/tokens"), truth.config, with_loss="targets" in given, **given
    )


# Blocks


def block_of(truth: Truth, layer: int, setting: Setting, *, backward: bool) -> Arrays:
    """All tensors of one block."""
    given = Inputs(truth, setting)
    config, code = given.config, setting.code
    depth = depth_of(config, layer)
    # the inputs come before the weights, which are larger: where one lacks, nothing is read in vain
    reads = given.state(depth) if depth else given.stream(layer)
    dy = given.tensor(f"cot/{module_name(layer)}") if backward else None
    names = [layer_name(layer, name) for name in block_shapes(config, layer)]
    if depth:
        names += [EMBEDDING, *(layer_name(layer, name) for name in (*MTP, MTP_NORM))]
    run = given.run(names, layer)
    inner = [name.replace(".L.", f".{layer}.") for name in INNER]
    calls = Calls(run.ops, config, layer, [layer_name(layer, SCORES), *inner])
    outputs: list[Any] = []
    run = run._replace(ops=calls.ops | {"mla": noting(calls.ops["mla"], outputs)})
    if depth:
        _, _, module = code.model.mtp_module_forward(run, depth, reads, given.batch.at(depth))
        y, block = module.norm.x, module.block
    else:
        y, block = code.model.block_forward(run, layer, reads, given.batch)
    found = {f"act/{module_name(layer)}": y, f"act/{layer_name(layer, 'self_attn')}": outputs[0].y}
    found |= {f"act/{name}": x for name, x in inside_of(layer, block, inner).items()}
    if layer >= config.dense_layers:
        found |= gate_of(layer, block)
    if not backward:
        return found
    grads = code.model.Gradients(run.params)
    dloss = 1.0 if given.with_loss else None
    dx = code.model.block_backward(run, layer, dy, dloss, block, grads)
    found |= {f"cot/{name}": x for name, x in cotangents_of(calls, block, code).items()}
    if not depth:
        found[f"cot/{module_name(layer - 1) if layer else EMBEDDINGS}"] = dx
    return found | stored_gradients(grads.sums, parameter_shapes(config))


def inside_of(layer: int, block: Any, inner: list[str]) -> Arrays:
    """The activations of a block by name; those inside attention if this one keeps them."""
    kept = hasattr(block.attention.mla, "kv_b") and hasattr(block.attention.mla.attention, "p")
    found = activations_of(layer, block, inner if kept else [])
    if hasattr(block.network, "routed"):
        found[layer_name(layer, SCORES)] = block.network.routed.scores
    return found


def gate_of(layer: int, block: Any) -> Arrays:
    """What the gate of a layer chose."""
    route, load, balance = block.choices
    found = {
        "weights": block.network.routed.weights,
        "routes": route.indices,
        "counted": route.counted,
        "load": load,
    }
    chosen = {f"aux/{name}.{layer}": x for name, x in found.items() if x is not None}
    return chosen if balance is None else chosen | {f"out/balance.{layer}": balance}


def cotangents_of(calls: Calls, block: Any, code: Code) -> Arrays:
    """The cotangents of a block's activations by name; the scores' by the code's own gate."""
    try:
        found = calls.cotangents(block)
    except (AttributeError, StopIteration):  # another attention, or a bug that leaves out a step
        calls.inside = False  # what stands inside is then unknown
        found = calls.cotangents(block)
    if hasattr(block.network, "routed"):
        dy, saved, _ = calls.call(block.network.router)
        found[layer_name(calls.layer, SCORES)] = code.router.scores_backward(dy, saved)
    return found


def stored_gradients(sums: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
    """Gradients under the checkpoint's names, experts one by one."""
    found: Arrays = {}
    for name, gradient in sums.items():
        names = stored_names(name, shapes[name])
        if names == [name]:
            found[f"grad/{name}"] = gradient
        else:
            found |= {f"grad/{one}": gradient[i] for i, one in enumerate(names)}
    return found


# Embedding


def embedding_of(truth: Truth, setting: Setting, *, backward: bool) -> Arrays:
    given = Inputs(truth, setting)
    dy = given.tensor(f"cot/{EMBEDDINGS}") if backward else None
    run = given.run([EMBEDDING])
    x, saved = run.ops.embedding.forward(run.params[EMBEDDING], ids=given.batch.tokens)
    if not backward:
        return {f"act/{EMBEDDINGS}": x}
    gradient = run.ops.embedding.backward(dy, saved)
    if given.config.mtp_depth or given.config.tied:  # its other users
        above = above_of(truth, setting, backward=True)
        gradient = gradient + above.get(f"grad/{EMBEDDING}", 0)
    return {f"grad/{EMBEDDING}": gradient}


# Above the blocks


def above_of(truth: Truth, setting: Setting, *, backward: bool) -> Arrays:
    """All tensors of what lies above the blocks: final norm, head, loss, MTP modules."""
    given = Inputs(truth, setting)
    config, model = given.config, setting.code.model
    last, head = module_name(config.layers - 1), head_name(config)
    shapes = parameter_shapes(config)
    modules = [f"{module_name(layer)}." for layer in mtp_layers(config)]
    names = [
        n for n in shapes if n in (EMBEDDING, FINAL_NORM, head) or n.startswith(tuple(modules))
    ]
    if not modules and not config.tied:
        names.remove(EMBEDDING)
    reads = given.stream(config.layers)
    run = given.run(names)
    for layer in mtp_layers(config):
        run = run._replace(routes=run.routes | given.run([], layer).routes)
    calls: dict[str, list[Any]] = {"rms_norm": [], "moe": []}
    run = run._replace(ops=run.ops | {n: noting_dy(run.ops[n], calls[n]) for n in calls})
    hidden, norm = model.final_norm_forward(run, reads)
    found: Arrays = {
        f"act/{HIDDEN}": hidden,
        "out/logits": model.logits(run.params, hidden, run.ops),
    }
    hidden = given.tensor(f"act/{HIDDEN}") if f"act/{HIDDEN}" in truth else hidden
    if given.loss != "cross_entropy":
        return found | other_loss(given, run, hidden, norm, calls["rms_norm"])
    main, head_saved = model.head_forward(run, hidden, given.batch)
    found |= {"out/main": main, "out/loss_per_token": per_token(given, run, hidden)}
    passes: list[Any] = []
    heads: list[Any] = []
    losses: list[Any] = []
    for depth, layer in enumerate(mtp_layers(config), 1):
        later = given.batch.at(depth)
        _, normed, module = model.mtp_module_forward(run, depth, given.state(depth), later)
        loss, saved = model.head_forward(run, normed, later)
        passes.append(module)
        heads.append(saved)
        losses.append(loss)
        found |= {f"out/mtp.{depth}": loss, f"act/{module_name(layer)}": module.norm.x}
    balance = {n: given.tensor(n) for n in truth.entries if n.startswith("out/balance.")}
    found["out/loss"] = model.total_loss(config, main, losses, balance)
    if not backward:
        return found
    saved = model.ModelSaved(run, None, [], norm, hidden, head_saved, passes, heads)
    grads = model.Gradients(run.params)
    dx = model.above_backward(saved, 1.0, None, None, grads)
    found |= {f"cot/{HIDDEN}": calls["rms_norm"][-1], f"cot/{last}": dx}
    for layer, dy in zip(reversed(mtp_layers(config)), calls["moe"], strict=True):
        found[f"cot/{module_name(layer)}"] = dy
    return found | stored_gradients(grads.sums, shapes)


def noting_dy(op: AnyOp, cotangents: list[Any]) -> AnyOp:
    """``op``, whose backward also appends what it is given to ``cotangents``."""

    def backward(dy: Any, saved: Any) -> Any:
        cotangents.append(dy)
        return op.backward(dy, saved)

    return Op(op.forward, backward)


def per_token(given: Inputs, run: Any, hidden: Any) -> np.ndarray:
    """The loss of each token of the main model [B, T], 0 where none counts."""
    head, batch = run.params[head_name(given.config)], given.batch
    targets = np.where(batch.mask, batch.targets, 0)
    log_prob, _ = run.ops.log_prob.forward(hidden, head, targets=targets)
    return np.where(batch.mask, -np.asarray(log_prob), 0)


def other_loss(given: Inputs, run: Any, hidden: Any, norm: Any, dys: list[Any]) -> Arrays:
    """GRPO's loss, or the gradient of another loss's logits, down to the last block's output."""
    config, batch = given.config, given.batch
    model = given.setting.code.model
    head, found = head_name(config), {}
    grads = model.Gradients(run.params)
    if given.loss == "grpo":
        settings = dict(given.truth.metadata["request"]["grpo"])
        log_prob, saved = run.ops.log_prob.forward(
            hidden,
            run.params[head],
            targets=np.where(batch.mask, batch.targets, 0),
            mask=batch.mask,
            temperature=settings.pop("temperature"),
        )
        arrays = {
            name: given.tensor(f"in/{name}")
            for name in ("advantages", "old_log_prob", "reference_log_prob")
            if f"in/{name}" in given.truth
        }
        choices = {name: stored(given.truth, f"aux/{name}") for name in ("unclipped", "kept")}
        settings = {name: tuple(x) if isinstance(x, list) else x for name, x in settings.items()}
        output, grpo_saved = run.ops.grpo.forward(
            log_prob, mask=batch.mask, **arrays, **choices, **settings
        )
        dlog_prob = run.ops.grpo.backward(1.0, grpo_saved)
        dhidden, dw = run.ops.log_prob.backward(dlog_prob, saved)
        found = {"act/log_prob": log_prob, "cot/log_prob": dlog_prob}
        balance = {n: given.tensor(n) for n in given.truth.entries if n.startswith("out/balance.")}
        total = model.total_loss(config, output.loss, [], balance)
        found |= {"out/loss": total, "out/main": output.loss}
    else:
        if "in/dlogits" not in given.truth:
            raise CouldNotRun(
                f"the head can't be computed again: {given.truth.folder} does not hold the dlogits "
                "that it was made from"
            )
        _, linear_saved = run.ops.linear.forward(hidden, run.params[head])
        dhidden, dw = run.ops.linear.backward(given.tensor("in/dlogits"), linear_saved)
    grads.add(head, dw)
    dx, _ = model.final_norm_backward(run, dhidden, None, norm, grads)
    found |= {f"cot/{HIDDEN}": dys[-1], f"cot/{module_name(config.layers - 1)}": dx}
    return found | stored_gradients(grads.sums, parameter_shapes(config))


# Cases of conformance vectors


def case_of(truth: Truth, case: str, setting: Setting) -> Arrays:
    """Outputs and gradients of one case."""
    told = truth.metadata["cases"][case]
    place, name = setting.placing(), told["op"]
    if name not in CASES:
        raise CouldNotRun(f"{name} has no pair of forward and backward that could have a bug")
    right = pair_of(name)
    table = setting.table("reference")
    op = setting.code.ops.get(name, right)
    if setting.dtype == "bfloat16":
        op = rounded(op)
    parameters = inspect.signature(right.forward).parameters.values()
    order = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    given = {x.removeprefix(f"{case}/"): x for x in truth.entries if x.startswith(f"{case}/")}
    inputs = [place(truth.array(given[f"in/{x}"])) if f"in/{x}" in given else None for x in order]
    aux = {x[4:]: place(truth.array(full)) for x, full in given.items() if x.startswith("aux/")}
    settings = {k: tuple(x) if isinstance(x, list) else x for k, x in told["settings"].items()}
    if "ops" in inspect.signature(right.forward).parameters:
        settings["ops"] = table
    y, saved = op.forward(*inputs, **settings, **aux)
    plain = [x[4:] for x in given if x.startswith("out/")]
    outputs = y._asdict() if hasattr(y, "_asdict") else {plain[0]: y}
    found = {f"{case}/out/{x}": value for x, value in outputs.items() if value is not None}
    cot = {x[4:]: place(truth.array(full)) for x, full in given.items() if x.startswith("cot/")}
    if not cot:
        return found
    dy: Any = (
        tuple(cot.get(x) for x in outputs) if hasattr(y, "_asdict") else next(iter(cot.values()))
    )
    if name == "router":
        weights = cot.get("weights", np.zeros_like(outputs["weights"]))
        dy = (weights, cot.get("scores"))
    elif name == "grpo":
        dy = (cot["loss"],)
    gradients = op.backward(dy, saved)
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    named = zip(order, gradients, strict=True)
    return found | {f"{case}/grad/{x}": g for x, g in named if g is not None}
