"""The steps of a request, in their order, and what each does.

    ("embedding",)
    ("forward", layer)      each layer, then each MTP module
    ("head",)               forward, and backward to the final hidden states
    ("backward", layer)     each MTP module, the last one first
    ("norm",)               the final norm, backward
    ("backward", layer)     each layer, the last one first
    ("lookup",)             the embedding, backward

A step reads the records of earlier ones. A block's backward runs its forward again, with the routes
that the first one chose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np

from ..array import blocks
from ..batch import Batch
from ..checkpoint.lazy import LazyParameters
from ..checkpoint.names import layer_of
from ..checkpoint.source import Source
from ..checkpoint.tensor_file import Spec
from ..config import ModelConfig
from ..model import (
    Gradients,
    Route,
    Run,
    block_backward,
    block_forward,
    final_norm_backward,
    final_norm_forward,
    head_forward,
    logits,
    mtp_input,
    mtp_module_backward,
    mtp_module_forward,
    mtp_scale,
    ops_for,
)
from ..ops import AnyOp, MLAOutput, Op
from ..ops.linear import LinearSaved
from ..parameters import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    depth_of,
    head_name,
    layer_name,
    module_name,
    mtp_layer,
    mtp_layers,
)
from .cotangents import Calls, activations_of, noting
from .folder import Folder, Step
from .lazy import (
    Rows,
    embedding_backward,
    embedding_forward,
    moe_backward,
    moe_forward,
    moe_postponed,
    sum_in_blocks,
)
from .request import ATTENTION, EMBEDDINGS, HIDDEN, LOG_PROB, Request
from .split import term_gradients

__all__ = ["Steps", "steps_to"]

TOKENS = 256  # whose logits are made at a time

Arrays = dict[str, np.ndarray]


def steps_to(
    config: ModelConfig, gradients: Iterable[str], activations: Iterable[str] = ()
) -> list[Step]:
    """The steps that ``gradients``, and the cotangents of ``activations``, need: the whole forward,
    and the backward as far down as the last of them."""
    main, modules = range(config.layers), mtp_layers(config)
    forward: list[Step] = [("embedding",)]
    forward += [("forward", layer) for layer in (*main, *modules)]
    forward += [("head",)]
    backward: list[Step] = [("backward", layer) for layer in reversed(modules)]
    backward += [("norm",)]
    backward += [("backward", layer) for layer in reversed(main)]
    backward += [("lookup",)]
    writers = {step_of(config, name) for name in gradients}
    writers |= {step_of_cotangent(name) for name in activations}
    while backward and backward[-1] not in writers:
        backward.pop()
    return forward + backward


def step_of(config: ModelConfig, name: str) -> Step:
    """The step that writes the gradient of that name: the last one that adds to it."""
    layer = layer_of(name)
    if layer is not None:
        return "backward", layer
    if name == EMBEDDING:
        return ("lookup",)
    if name == FINAL_NORM:
        return ("norm",)
    return ("backward", mtp_layer(config, 1)) if config.mtp_depth else ("head",)


def step_of_cotangent(name: str) -> Step:
    """The step that writes the cotangent of the activation of that name."""
    layer = layer_of(f"{name}.")
    if layer is not None:
        return "backward", layer
    return ("backward", 0) if name == EMBEDDINGS else ("norm",)


class Steps:
    """One method per kind of step: it writes files to ``folder`` and returns the arrays of the
    step's record. The ops are those of ``kind``, such as `rounded`, of each of the request's."""

    def __init__(
        self,
        source: Source,
        request: Request,
        folder: Folder,
        kind: Callable[[AnyOp], AnyOp] = lambda op: op,
    ) -> None:
        self.source, self.request = source, request
        self.folder, self.records = folder, folder.records
        self.config = config = request.config(source.config)
        self.batch = request.batch(config)
        self.params = LazyParameters(source, config)
        embedding = Op(embedding_forward, embedding_backward)
        ops = request.table() | {"embedding": embedding}
        chosen = ops_for(self.batch, config, ops)
        self.ops, self.kind = chosen | {name: kind(op) for name, op in chosen.items()}, kind
        self.model = Run(self.params, config, self.ops, {}, request.with_loss)

    def run(self, step: Step) -> Arrays:
        """Do a step, by the method of its name."""
        name, *layer = step
        arrays: Arrays = getattr(self, name)(*layer)
        return arrays

    # Forward

    def embedding(self) -> Arrays:
        x, _ = self.ops.embedding.forward(self.params[EMBEDDING], ids=self.batch.tokens)
        self.folder.write_activations("act", "embedding", found={EMBEDDINGS: x})
        return {"x": x}

    def forward(self, layer: int) -> Arrays:
        """One block, of the main model or in an MTP module: its output, and its routes for the
        backward."""
        run, attention = self._run_of(layer, Op(moe_forward, moe_backward)), list[MLAOutput]()
        run = run._replace(ops=run.ops | {"mla": noting(run.ops.mla, attention)})
        depth = depth_of(self.config, layer)
        if depth == 0:
            x, block = block_forward(run, layer, self._input(layer), self.batch)
            record = {"x": x}
        else:
            state, _, saved = mtp_module_forward(run, depth, *self._module_input(depth))
            x, block = saved.norm.x, saved.block
            record = {"x": x, "state": state}
        found = {module_name(layer): x, layer_name(layer, ATTENTION): attention[0].y}
        found |= activations_of(layer, block, self.folder.activations)
        if block.choices is not None:
            record |= self._routing(block)
        self.folder.write_activations("act", "layer", layer, found=found)
        return record

    def head(self) -> Arrays:
        """Logits, the main loss, and the gradients of the hidden states and of the head."""
        run, log_prob = self._run_of_head(), list[np.ndarray]()
        hidden, _ = final_norm_forward(self.model, self._input(self.config.layers))
        self.folder.write_activations("act", "norm", found={HIDDEN: hidden})
        if self.request.logits:
            self._write_logits(run, hidden)
        record: Arrays = {}
        dlogits = self.request.dlogits_as(self.source.dtype, self.config)
        if self.request.grpo is not None:
            record, dhidden, dw = self._policy(run, hidden)
        elif dlogits is None:
            ops = run.ops | {"log_prob": noting(run.ops.log_prob, log_prob)}
            main, saved = head_forward(run._replace(ops=ops), hidden, self.batch)
            dhidden, dw = run.ops.head_cross_entropy.backward(1.0, saved)
            if not log_prob:  # a head that is one with it: once more
                self._log_prob(run._replace(ops=ops), hidden)
            record = {"main": np.asarray(main), "log_prob": log_prob[0]}
        else:
            w = run.params[head_name(self.config)]
            dhidden, dw = run.ops.linear.backward(dlogits, LinearSaved(hidden, w))
        return record | {"dhidden": dhidden} | self._head_gradient(("head",), [dw])

    def _policy(self, run: Run, hidden: np.ndarray) -> tuple[Arrays, np.ndarray, np.ndarray]:
        """GRPO's loss and choices, and the gradients of the hidden states and of the head."""
        given, ops = self.request.grpo, run.ops
        assert given is not None
        log_prob, log_prob_saved = self._log_prob(run, hidden, temperature=given.temperature)
        output, saved = ops.grpo.forward(log_prob, **given.arguments(self.source.dtype))
        dlog_prob = ops.grpo.backward(1.0, saved)
        dhidden, dw = ops.log_prob.backward(dlog_prob, log_prob_saved)
        for kind, x in (("act", log_prob), ("cot", dlog_prob)):
            self.folder.write(f"{kind}-head.safetensors", {f"{kind}/{LOG_PROB}": x})
        choices = {"unclipped": output.unclipped, "kept": output.kept}
        return {"main": np.asarray(output.loss)} | choices, dhidden, dw

    def _log_prob(
        self, run: Run, hidden: np.ndarray, temperature: float = 1.0
    ) -> tuple[np.ndarray, Any]:
        """The log-probability of each target that counts, and what is saved for its backward."""
        return run.ops.log_prob.forward(
            hidden,
            run.params[head_name(self.config)],
            targets=np.where(self.batch.mask, self.batch.targets, 0),
            mask=self.batch.mask,
            temperature=temperature,
        )

    # Backward

    def backward(self, layer: int) -> Arrays:
        """One block: the gradient of its input, from that of its output."""
        if depth_of(self.config, layer):
            return self._backward_module(layer)
        above: Step = ("backward", layer + 1) if layer + 1 < self.config.layers else ("norm",)
        dx = self.records[above].array("dx")
        with self.folder.layer_gradients(layer) as grads:
            run = self._run_of(layer, Op(moe_postponed, partial(moe_backward, write=grads.write)))
            calls = self._calls(run, layer)
            run = run._replace(ops=calls.ops)
            _, saved = block_forward(run, layer, self._input(layer), self.batch)
            dloss = 1.0 if self.request.with_loss else None
            dx = block_backward(run, layer, dx, dloss, saved, grads)
        self.folder.write_activations("cot", "layer", layer, found=calls.cotangents(saved))
        if layer == 0:
            self.folder.write_activations("cot", "embedding", found={EMBEDDINGS: dx})
        return {"dx": dx}

    def _backward_module(self, layer: int) -> Arrays:
        """One MTP module with its head: its loss, and the gradients of the state that it reads, of
        the head and of the rows that it looks up."""
        config, depth = self.config, depth_of(self.config, layer)
        above = self.records[("backward", layer + 1) if depth < config.mtp_depth else ("head",)]
        with self.folder.layer_gradients(layer) as grads:
            run = self._run_of(layer, Op(moe_forward, partial(moe_backward, write=grads.write)))
            calls = self._calls(run, layer)
            run = run._replace(ops=calls.ops)
            state, batch = self._module_input(depth)
            _, normed, saved = mtp_module_forward(run, depth, state, batch)
            loss, head_saved = head_forward(self._run_of_head(), normed, batch)
            dnormed, dw = run.ops.head_cross_entropy.backward(mtp_scale(config), head_saved)
            dstate = above.array("dstate")
            dstate = mtp_module_backward(run, depth, 1.0, dnormed, dstate, saved, grads)
        self.folder.write_activations("cot", "layer", layer, found=calls.cotangents(saved.block))
        rows: Any = grads.sums[EMBEDDING]
        parts = [above.arrays["head"], dw, *([rows] if config.tied else [])]
        record = self._head_gradient(("backward", layer), parts)
        return record | {"dstate": dstate, "loss": np.asarray(loss), **rows._asdict()}

    def norm(self) -> Arrays:
        """The gradients of the final norm's weight and input, from those of what the head and the
        first MTP module read."""
        layers, grads = self.config.layers, Gradients(self.params)
        _, saved = final_norm_forward(self.model, self._input(layers))
        dhidden, dstate = self.records["head",].array("dhidden"), None
        if self.config.mtp_depth:
            dstate = self.records["backward", mtp_layer(self.config, 1)].array("dstate")
        dx, dhidden = final_norm_backward(self.model, dhidden, dstate, saved, grads)
        self.folder.write_gradient("norm", FINAL_NORM, [grads.sums[FINAL_NORM]])
        self.folder.write_activations("cot", "norm", found={HIDDEN: dhidden})
        return {"dx": dx}

    def lookup(self) -> Arrays:
        """The gradient of the embedding table: of all lookups, and of the head if they are tied."""
        parts: list[Any] = []
        if self.config.tied:  # then the sum has the modules' rows, too
            parts.append(self.records[step_of(self.config, HEAD)].arrays["head"])
        else:
            modules = [self.records["backward", n] for n in reversed(mtp_layers(self.config))]
            parts += [Rows(module.array("ids"), module.array("values")) for module in modules]
        dx = self.records["backward", 0].array("dx")
        parts.append(embedding_backward(dx, self.batch.tokens))
        self.folder.write_gradient("embedding", EMBEDDING, parts)
        return {}

    def split(self) -> Arrays:
        """The undivided sums of every term, part by part, and their gradients."""
        split = self.request.split_of(self.config)
        assert split is not None
        params = {name: self.source.tensor(name) for name in self.params}
        ops = ops_for(self.batch, self.config, self.request.table())
        found = term_gradients(params, split, self.config, ops, self.request.grpo)
        for term, each in found.items():
            for part, (_, gradients) in enumerate(each):
                self.folder.write_part(term, part, gradients)
        return {term: np.array([loss for loss, _ in each]) for term, each in found.items()}

    # What the steps share

    def _run_of(self, layer: int, moe: AnyOp) -> Run:
        """The `Run` of one layer."""
        ops = self.ops | {"moe": self.kind(moe)}
        return self.model._replace(ops=ops, routes=self._route(layer))

    def _calls(self, run: Run, layer: int) -> Calls:
        """The `Calls` of one layer's backward."""
        return Calls(run.ops, self.config, layer, self.folder.activations)

    def _route(self, layer: int) -> dict[int, Route]:
        """The choices to replay in a layer: those of its forward once that is done, else the
        request's."""
        done = self.records.get(("forward", layer))
        if done is not None and "indices" in done.arrays:
            return {layer: Route(done.array("indices"), done.array("counted"))}
        given = self.request.routes.get(layer)
        if given is None:
            return {}
        if given.counted is None and self.config.conventions.balance_counts == "routed":
            return {layer: Route(given.indices, given.indices)}
        return {layer: given}

    def _routing(self, block: Any) -> Arrays:
        """The arrays that the record of a block with experts has in addition."""
        route, load, balance = block.choices
        record = {"indices": route.indices, "load": load, "weights": block.network.routed.weights}
        if balance is not None and self.config.balance_weight:
            record |= {"counted": route.counted, "balance": balance}
        return {key: np.asarray(value) for key, value in record.items() if value is not None}

    def _run_of_head(self) -> Run:
        """The `Run` of a head: its weights are the whole tensor, even if they are the embedding
        table."""
        name = head_name(self.config)
        return self.model._replace(params={name: self.source.tensor(name)})

    def _input(self, layer: int) -> np.ndarray:
        """What a layer of the main model reads, or, behind the last layer, the final norm."""
        below: Step = ("forward", layer - 1) if layer else ("embedding",)
        x: np.ndarray = self.records[below].array("x")
        return x

    def _module_input(self, depth: int) -> tuple[np.ndarray, Batch]:
        """The state that MTP module ``depth`` reads, and its batch."""
        if depth == 1:
            x = self._input(self.config.layers)
            hidden, _ = final_norm_forward(self.model, x)
            state = mtp_input(self.config, hidden, x)
        else:
            previous = self.records["forward", mtp_layer(self.config, depth - 1)]
            state = previous.array("state")
        return state, self.batch.at(depth)

    def _write_logits(self, run: Run, hidden: np.ndarray) -> None:
        rows, vocabulary = hidden.reshape(-1, hidden.shape[-1]), self.config.vocabulary
        spec = Spec((*hidden.shape[:2], vocabulary), hidden.dtype)
        with self.folder.writer("logits.safetensors", {"out/logits": spec}) as writer:
            for start, stop in blocks(rows.shape[0], TOKENS):
                z = logits(run.params, rows[start:stop], run.ops)
                writer.write("out/logits", z, start * vocabulary)

    def _head_gradient(self, step: Step, parts: list[Any]) -> Arrays:
        """The sum of the head's gradients up to a step: written if it is the last to add to them,
        else for the step's record."""
        name = head_name(self.config)
        if step == step_of(self.config, HEAD) and not self.config.tied:
            self.folder.write_gradient("head", name, parts)
            return {}
        total = np.empty((self.config.vocabulary, self.config.width), self.source.dtype)
        for start, block in sum_in_blocks(parts, len(total)):
            total[start : start + len(block)] = block
        return {"head": total}
