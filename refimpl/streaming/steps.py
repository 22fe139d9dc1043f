"""The steps: embedding, blocks, MTP modules and head forward, then all of them backward. Each reads
the records of earlier ones, writes files, and gives the arrays of its own record."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..array import blocks
from ..batch import Batch
from ..checkpoint.tensor_file import Spec
from ..model import (
    BlockSaved,
    ExpertsSublayerSaved,
    Route,
    Run,
    block_backward,
    block_forward,
    mtp_module_backward,
    mtp_module_forward,
    mtp_scale,
)
from ..ops import AnyOp, Op, Ops
from ..ops.linear import LinearSaved
from ..parameters import head_name, mtp_layer
from .folder import Folder
from .pieces import EMBEDDING, Rows, embedding_backward, moe_op, summed
from .request import Plan

__all__ = ["Steps"]

TOKENS = 256  # whose logits are made at a time


class Steps:
    """What ``plan`` asks for, a step a method: (layer or MTP depth) -> the arrays of the step's
    record."""

    def __init__(self, plan: Plan, folder: Folder) -> None:
        self.plan, self.folder, self.records = plan, folder, folder.records
        self.source, self.config, self.params, self.ops = (
            plan.source,
            plan.config,
            plan.params,
            plan.ops,
        )
        self.batch, self.with_loss, self.modules = plan.batch, plan.with_loss, plan.modules

    # The forward

    def embed(self) -> dict[str, np.ndarray]:
        x, _ = self.ops.embedding.forward(self.params[EMBEDDING], ids=self.batch.tokens)
        self.folder.write_activations("act-embedding", {"model.embed_tokens": x})
        return {"x": x}

    def forward(self, layer: int) -> dict[str, np.ndarray]:
        run = self._run(layer, moe_op())
        x, saved = block_forward(run, layer, self._input(layer), self.batch)
        return self._forward_record(layer, x, saved)

    def forward_mtp(self, depth: int) -> dict[str, np.ndarray]:
        layer = mtp_layer(self.config, depth)
        run = self._run(layer, moe_op())
        state, _, saved = mtp_module_forward(run, depth, *self._mtp_input(depth))
        return self._forward_record(layer, saved.norm.x, saved.block) | {"state": state}

    def _forward_record(
        self, layer: int, x: np.ndarray, saved: BlockSaved
    ) -> dict[str, np.ndarray]:
        name, network = f"model.layers.{layer}", saved.network
        activations = {
            name: x,
            f"{name}.after_attention": network.norm.x,
            f"{name}.self_attn": saved.attention.y,
        }
        record: dict[str, Any] = {"x": x}
        if isinstance(network, ExpertsSublayerSaved):
            activations[f"{name}.mlp.gate.scores"] = network.routed.scores
            record |= {
                "indices": network.route.indices,
                "load": network.load,
                "weights": network.routed.weights,
            }
            if network.balance is not None and self.config.balance_weight:
                record |= {"counted": network.route.counted, "balance": network.balance}
        self.folder.write_activations(f"act-layer-{layer:05d}", activations)
        return {key: np.asarray(value) for key, value in record.items() if value is not None}

    def head(self) -> dict[str, np.ndarray]:
        """Logits, the main loss, and the gradient of the hidden states."""
        config, ops = self.config, self.ops
        hidden, _ = self._final_norm()
        self.folder.write_activations("act-norm", {"model.norm": hidden})
        w = self.source.tensor(head_name(config))
        if self.plan.request.logits:
            shape = (*hidden.shape[:2], config.vocabulary)
            with self.folder.writer(
                "logits.safetensors", {"out/logits": Spec(shape, hidden.dtype)}
            ) as writer:
                rows = hidden.reshape(-1, config.width)
                for start, stop in blocks(rows.shape[0], TOKENS):
                    z, _ = ops.linear.forward(rows[start:stop], w)
                    writer.write("out/logits", z, start * config.vocabulary)
        record: dict[str, np.ndarray] = {}
        if self.plan.dlogits is not None:
            dhidden, dw = ops.linear.backward(self.plan.dlogits, LinearSaved(hidden, w))
        else:
            log_prob = ops.log_prob

            def noted(*args: Any, **kwargs: Any) -> Any:
                y, saved = log_prob.forward(*args, **kwargs)
                record["log_prob"] = y
                return y, saved

            ops = ops | {"log_prob": Op(noted, log_prob.backward)}
            main, saved = self._cross_entropy(hidden, w, self.batch, None, ops)
            dhidden, dw = ops.head_cross_entropy.backward(1.0, saved)
            record["main"] = np.asarray(main)
        return record | {"dhidden": dhidden} | self._head_gradient([dw], last=not self.modules)

    def _final_norm(self) -> tuple[np.ndarray, Any]:
        x = self._input(self.config.layers)
        return self.ops.rms_norm.forward(
            x, self.source.tensor("model.norm.weight"), eps=self.config.norm_eps
        )

    def _cross_entropy(
        self, hidden: np.ndarray, w: np.ndarray, batch: Any, normaliser: float | None, ops: Ops
    ) -> Any:
        return ops.head_cross_entropy.forward(
            hidden, w, targets=batch.targets, mask=batch.mask, normaliser=normaliser, ops=ops
        )

    # The backward

    def backward_mtp(self, depth: int) -> dict[str, np.ndarray]:
        config, layer = self.config, mtp_layer(self.config, depth)
        w, normaliser = (
            self.source.tensor(head_name(config)),
            self.batch.mtp_normaliser(config.conventions.mtp_normaliser),
        )
        previous = self.records[f"backward-{layer + 1:05d}" if depth < config.mtp_depth else "head"]
        dstate = previous["dstate"] if "dstate" in previous.arrays else None
        with self.folder.layer_file(layer) as sink:
            run = self._run(layer, moe_op(sink.write))
            state, later = self._mtp_input(depth)
            _, normed, saved = mtp_module_forward(run, depth, state, later)
            loss, head_saved = self._cross_entropy(normed, w, later, normaliser, run.ops)
            dnormed, dw = run.ops.head_cross_entropy.backward(mtp_scale(config), head_saved)
            sink.add(head_name(config), dw)
            dstate = mtp_module_backward(run, depth, 1.0, dnormed, dstate, saved, sink)
        rows = next(x for _, x in sink.shared if isinstance(x, Rows))
        parts = [x for name, x in sink.shared if name == head_name(config)]
        record = self._head_gradient([previous.arrays["head"], *parts], last=depth == 1)
        return record | {"dstate": dstate, "loss": np.asarray(loss), **rows._asdict()}

    def norm(self) -> dict[str, np.ndarray]:
        """The gradient of the final norm's input, from the main head and from what the MTP modules
        read."""
        _, saved = self._final_norm()
        dx, dhidden = np.zeros_like(saved.x), self.records["head"]["dhidden"]
        if self.modules:
            dstate = self.records[f"backward-{self.config.layers:05d}"]["dstate"]
            if self.config.conventions.mtp_hidden == "normed":
                dhidden = dhidden + dstate
            else:
                dx = dx + dstate
        dx_norm, dw = self.ops.rms_norm.backward(dhidden, saved)
        self.folder.write_gradient("grad-norm", "model.norm.weight", [dw])
        dx = dx + dx_norm
        self.folder.write_activations("cot-norm", {"model.norm": dhidden}, "cot")
        self.folder.write_activations(*self._cotangent(self.config.layers, dx), "cot")
        return {"dx": dx}

    def backward(self, layer: int) -> dict[str, np.ndarray]:
        dx = self.records[
            f"backward-{layer + 1:05d}" if layer < self.config.layers - 1 else "norm"
        ]["dx"]
        with self.folder.layer_file(layer) as sink:
            run = self._run(layer, moe_op(sink.write, output=False))
            _, saved = block_forward(run, layer, self._input(layer), self.batch)
            dx = block_backward(run, layer, dx, 1.0 if self.with_loss else None, saved, sink)
        self.folder.write_activations(*self._cotangent(layer, dx), "cot")
        return {"dx": dx}

    def _cotangent(self, layer: int, dx: np.ndarray) -> tuple[str, dict[str, np.ndarray]]:
        """File and name of the gradient of what ``layer`` reads."""
        if layer == 0:
            return "cot-embedding", {"model.embed_tokens": dx}
        return f"cot-layer-{layer - 1:05d}", {f"model.layers.{layer - 1}": dx}

    def lookup(self) -> dict[str, np.ndarray]:
        """The embedding's gradient, with the head's if they are tied."""
        config, parts = self.config, list[Any]()
        if config.tied:
            parts.append(
                self.records[f"backward-{config.layers:05d}" if self.modules else "head"].arrays[
                    "head"
                ]
            )
        else:
            for k in reversed(self.modules):
                record = self.records[f"backward-{config.layers + k - 1:05d}"]
                parts.append(Rows(record["ids"], record["values"]))
        parts.append(embedding_backward(self.records["backward-00000"]["dx"], self.batch.tokens))
        self.folder.write_gradient("grad-embedding", EMBEDDING, parts)
        return {}

    # What the steps share

    def _run(self, layer: int, moe: AnyOp) -> Run:
        """What `model` shares among blocks, for one of them: routes replay those of the request or
        of the forward."""
        routes = {}
        if (record := self.records.get(f"forward-{layer:05d}")) and "indices" in record.arrays:
            routes[layer] = Route(
                record["indices"], record["counted"] if "counted" in record.arrays else None
            )
        elif (route := self.plan.request.routes.get(layer)) is not None:
            routed = self.config.conventions.balance_counts == "routed"
            routes[layer] = Route(
                route.indices, route.indices if routed and route.counted is None else route.counted
            )
        return Run(self.params, self.config, self.ops | {"moe": moe}, routes, self.with_loss)

    def _input(self, layer: int) -> np.ndarray:
        return self.records[f"forward-{layer - 1:05d}" if layer else "embedding"]["x"]

    def _mtp_input(self, depth: int) -> tuple[np.ndarray, Batch]:
        """What module ``depth`` reads: the previous state, cut, and its batch."""
        later = self.batch.at(depth)
        if depth > 1:
            state = self.records[f"forward-{self.config.layers + depth - 2:05d}"]["state"]
        else:
            normed = self.config.conventions.mtp_hidden == "normed"
            state = self._final_norm()[0] if normed else self._input(self.config.layers)
        return state, later

    def _head_gradient(self, parts: list[Any], last: bool) -> dict[str, np.ndarray]:
        """Write the head's gradient if no other will be added to it, else keep their sum in the
        record."""
        name = head_name(self.config)
        if last and not self.config.tied:
            self.folder.write_gradient("grad-head", name, parts)
            return {}
        total = np.empty((self.config.vocabulary, self.config.width), self.source.dtype)
        for start, block in summed(parts, len(total)):
            total[start : start + len(block)] = block
        return {"head": total}
