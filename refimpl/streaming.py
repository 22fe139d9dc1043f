"""Every gradient of a model that need not fit into memory: parameters come a layer and an expert at a time, gradients
leave as they are made, and a run that was killed goes on where it was.

The numbers are those of `model.forward` and `model.backward`, whose blocks are run here; three things differ. Each
block is run twice, first for its output and then, with its routes fixed, for its backward. The ops `embedding` and
`moe` of the table read rows and experts when they need them. And the work is a list of steps, each of which reads what
earlier ones left on disk and leaves a record of its own: to resume is to skip the steps that have one.

In the folder, safetensors under the checkpoint's own names (experts one by one), and index.json, written last:

    in.safetensors          in/tokens, in/targets, in/mask (the positions whose target counts), in/key_mask
    logits.safetensors      out/logits [B, T, W]
    out.safetensors         out/loss_per_token [B, T] (0 where none counts), out/loss and its parts out/main, out/mtp.N,
                            out/balance.L
    aux.safetensors         aux/routes.L and aux/weights.L [B, T, K], aux/load.L [E]; aux/counted.L with a balance loss
    act-….safetensors       act/, the activations that were asked for: see ACTIVATIONS
    cot-….safetensors       cot/, the gradients of those among them that are layers' outputs, the embeddings or the
                            final hidden states: what a backward of one layer starts from, and ends with
    grad-layer-….safetensors, grad-embedding, grad-norm, grad-head: grad/ and the parameter's name
    unfinished/             the records, until all is done
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import __version__
from .array import argsort, blocks, expect_ids, scatter_add
from .checkpoint.names import stored_names
from .checkpoint.source import Source
from .checkpoint.tensor_file import Spec, TensorWriter, read_tensor_file, write_tensor_file
from .config import ModelConfig
from .errors import CouldNotRun
from .model import (
    Batch,
    BlockSaved,
    Gradients,
    Route,
    Run,
    block_backward,
    block_forward,
    is_buffer,
    make_batch,
    mtp_module_backward,
    mtp_module_forward,
    parameter_shapes,
)
from .ops import IMPLEMENTATIONS, Op, Ops, expert_load
from .ops.linear import LinearSaved

__all__ = ["ACTIVATIONS", "EMBEDDING", "Request", "Result", "Size", "Stream", "gradient_shapes"]

EMBEDDING = "model.embed_tokens.weight"
ROWS = 4096  # of a table of the vocabulary's length, summed and written at a time
TOKENS = 256  # whose logits are made at a time
PIECE = 2**20  # elements whose size is taken at a time

ACTIVATIONS = {
    "model.embed_tokens": "the embeddings, what layer 0 reads",
    "model.layers.L": "layer L's output, what the next one reads",
    "model.layers.L.self_attn": "attention's output, before it is added to the stream",
    "model.layers.L.after_attention": "the stream with attention's output added, what post_attention_layernorm reads",
    "model.layers.L.mlp.gate.scores": "the router's scores [B, T, E], before bias and selection",
    "model.norm": "the final hidden states, what the head reads",
}
"""act/…: those named like a module are its output, as a forward hook on Hugging Face's module sees it."""


@dataclass(frozen=True)
class Request:
    """What is asked for; arrays as in `model.forward` and `model.backward`."""

    tokens: np.ndarray  # [B, T]
    targets: np.ndarray | None = None  # [B, T]
    mask: np.ndarray | None = None  # [B, T] bool
    key_mask: np.ndarray | None = None  # [B, T] bool
    dlogits: np.ndarray | None = None  # [B, T, W]: the backward of another loss, instead of ours
    routes: Mapping[int, Route] = field(default_factory=dict)  # by layer, to replay
    mtp: bool = False  # with the losses of the MTP modules
    mtp_weight: float | None = None  # λ, by default the config's
    balance_alpha: float = 0.0  # α; 0: no balance loss, as in Hugging Face
    layers: int | None = None  # only so many of the first
    only: str = "*"  # pattern of the gradients to write
    activations: str | None = None  # pattern of the activations to write
    logits: bool = True  # write them
    implementation: str = "reference"

    def config(self, config: ModelConfig) -> ModelConfig:
        """The model that is asked for; ValueError if there is none such."""
        if self.layers is not None and not 1 <= self.layers <= config.layers:
            raise ValueError(f"layers must lie in 1…{config.layers}, got {self.layers}")
        if self.mtp and not config.mtp_depth:
            raise ValueError("mtp asks for a loss of modules that the model does not have")
        if self.mtp and self.layers not in (None, config.layers):
            raise ValueError("layers leaves out what mtp reads: give one of them")
        if self.dlogits is not None and (self.mtp or self.balance_alpha):
            raise ValueError("dlogits is the gradient of another loss: it goes with neither mtp nor balance_alpha")
        layers = config.layers if self.layers is None else self.layers
        return replace(
            config, layers=layers, dense_layers=min(config.dense_layers, layers), balance_weight=self.balance_alpha,
            mtp_depth=config.mtp_depth if self.mtp else 0,
            mtp_weight=config.mtp_weight if self.mtp_weight is None else self.mtp_weight,
        )  # fmt: skip

    def identity(self, source: Source, checkpoint: str) -> dict[str, str]:
        """Each part of the request as a word or a digest: a resumed run must agree in all."""
        parts: dict[str, Any] = {"config": asdict(source.config), "dtype": str(source.dtype), "checkpoint": checkpoint}
        parts |= {"refimpl": __version__, "numpy": np.__version__}
        parts |= {name: getattr(self, name) for name in self.__dataclass_fields__}
        parts["routes"] = {str(layer): digest(route.indices, route.counted) for layer, route in self.routes.items()}
        for name, value in parts.items():
            if isinstance(value, np.ndarray):
                parts[name] = digest(value)
            elif isinstance(value, dict):
                parts[name] = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
        return {name: str(value) for name, value in parts.items()}


class Size(NamedTuple):
    """How large one gradient is."""

    elements: int
    squares: float  # Σ g², in float64
    largest: float  # max |g|

    @property
    def norm(self) -> float:
        return float(np.sqrt(self.squares))


class Result(NamedTuple):
    loss: float | None  # None with dlogits
    main: float | None
    mtp: list[float]  # of each module, before λ
    balance: dict[int, float]  # of each MoE layer, with its α
    loads: dict[int, np.ndarray]  # [E] of each MoE layer
    gradients: dict[str, Size]  # by the checkpoint's names
    activations: list[str]


def gradient_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every gradient's name and shape as a checkpoint has them, the experts one by one."""
    return {
        stored: shape if stored == name else shape[1:]
        for name, shape in parameter_shapes(config).items() if not is_buffer(name)
        for stored in stored_names(name, shape)
    }  # fmt: skip


def expert_name(stacked: str, expert: int) -> str:
    return stacked.replace(".experts.", f".experts.{expert}.")


def digest(*arrays: np.ndarray | None) -> str:
    """Of the arrays' types, shapes and values."""
    hashed = hashlib.sha256()
    for x in arrays:
        hashed.update(b"none" if x is None else f"{x.dtype}{x.shape}".encode() + np.ascontiguousarray(x).tobytes())
    return hashed.hexdigest()


class Pieces:
    """A parameter that is read a piece at a time; an array to those who look at its type and shape alone."""

    device = "cpu"

    def __init__(self, source: Source, name: str, shape: tuple[int, ...]) -> None:
        self.source, self.name, self.shape, self.dtype = source, name, shape, source.dtype

    def __getitem__(self, index: Any) -> np.ndarray:
        return self.source.piece(self.name, index)

    def __array_namespace__(self, api_version: str | None = None) -> Any:
        return np


class LazyParameters(Mapping[str, Any]):
    """The parameters that a block asks for, read when it does and kept by nobody but it."""

    def __init__(self, source: Source, config: ModelConfig) -> None:
        self.source, self.shapes = source, parameter_shapes(config)

    def __getitem__(self, name: str) -> Any:
        shape = self.shapes[name]
        if name == EMBEDDING or ".experts." in name:
            return Pieces(self.source, name, shape)
        return self.source.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class Rows(NamedTuple):
    """The gradient of a lookup: as much as was looked up, not as much as the table."""

    ids: np.ndarray  # [M]
    values: np.ndarray  # [M, D]

    def block(self, start: int, stop: int) -> np.ndarray:
        """Rows start … stop of the table's gradient."""
        inside = (self.ids >= start) & (self.ids < stop)
        return scatter_add(self.ids[inside] - start, self.values[inside], stop - start)  # type: ignore[no-any-return]


def embedding_forward(w: Pieces, *, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`ops.embedding_forward`, reading the rows that are looked up."""
    ids = expect_ids("ids", ids, w.shape[0])
    distinct, place = np.unique(ids, return_inverse=True)
    return w[distinct][place.reshape(ids.shape)], ids


def embedding_backward(dy: np.ndarray, ids: np.ndarray) -> Rows:
    return Rows(ids.reshape(-1), dy.reshape(-1, dy.shape[-1]))


class MoESaved(NamedTuple):
    x: np.ndarray  # [B, T, D]
    weights: np.ndarray  # [B, T, K]
    stacks: tuple[Pieces, ...]  # gate, up and down of the experts
    shared: tuple[np.ndarray | None, ...]
    indices: np.ndarray  # [B, T, K]
    ops: Ops


def moe_op(sink: Callable[[str, np.ndarray | None], None] = lambda name, gradient: None, *, output: bool = True) -> Op:
    """`ops.moe` with one expert's weights in memory at a time; the same numbers.

    The backward runs each expert again and gives the gradient of its weights to ``sink`` (name, gradient or None for
    zeros), so that the layer's are never together. ``output``: False for a forward whose output nobody reads, since
    only the backward is wanted: it is 0, and no expert is run for it.
    """

    def forward(
        x: np.ndarray, weights: np.ndarray, w_gate: Pieces, w_up: Pieces, w_down: Pieces, *shared: np.ndarray | None,
        indices: np.ndarray, ops: Ops,
    ) -> tuple[np.ndarray, MoESaved]:  # fmt: skip
        saved = MoESaved(x, weights, (w_gate, w_up, w_down), shared, indices, ops)
        if not output:
            return np.zeros_like(x), saved
        rows, top_k = x.reshape(-1, x.shape[-1]), indices.shape[-1]
        outputs = np.empty((indices.size, x.shape[-1]), x.dtype)
        for expert, slots in dispatch(indices, w_gate.shape[0]):
            if slots.size:
                outputs[slots] = ops["ffn"].forward(rows[slots // top_k], *experts(saved, expert), ops=ops)[0]
        y = np.sum(weights.reshape(-1, top_k, 1) * outputs.reshape(-1, top_k, x.shape[-1]), axis=1)
        if shared[0] is not None:
            y = y + ops["ffn"].forward(rows, *shared, ops=ops)[0]
        return y.reshape(x.shape), saved

    def backward(dy: np.ndarray, saved: MoESaved) -> tuple[np.ndarray | None, ...]:
        x, weights, stacks, shared, indices, ops = saved
        rows, dy_rows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, x.shape[-1])
        top_k, flat = indices.shape[-1], weights.reshape(-1, 1)
        dweights, dslots = np.empty(indices.size, x.dtype), np.empty((indices.size, x.shape[-1]), x.dtype)
        for expert, slots in dispatch(indices, stacks[0].shape[0]):
            dw: list[np.ndarray | None] = [None, None, None]
            if slots.size:
                token = slots // top_k
                y, ffn_saved = ops["ffn"].forward(rows[token], *experts(saved, expert), ops=ops)
                dweights[slots] = np.sum(dy_rows[token] * y, axis=-1)
                dslots[slots], *dw = ops["ffn"].backward(flat[slots] * dy_rows[token], ffn_saved)
            for stack, gradient in zip(stacks, dw, strict=True):
                sink(expert_name(stack.name, expert), gradient)
        dx = np.sum(dslots.reshape(-1, top_k, x.shape[-1]), axis=1)
        dshared: list[np.ndarray | None] = [None, None, None]
        if shared[0] is not None:
            dx_shared, *dshared = ops["ffn"].backward(dy_rows, ops["ffn"].forward(rows, *shared, ops=ops)[1])
            dx = dx + dx_shared
        return dx.reshape(x.shape), dweights.reshape(weights.shape), None, None, None, *dshared

    return Op(forward, backward)


def dispatch(indices: np.ndarray, count: int) -> Iterator[tuple[int, np.ndarray]]:
    """Each expert, and the slots (token · K + k) that chose it, in their order."""
    order, stop = argsort(indices.reshape(-1)), np.cumsum(expert_load(indices, count))
    for expert in range(count):
        yield expert, order[stop[expert - 1] if expert else 0 : stop[expert]]


def experts(saved: MoESaved, expert: int) -> list[np.ndarray]:
    return [stack[expert] for stack in saved.stacks]


class Sink(Gradients):
    """Where a backward adds its gradients: straight into a file; those of shared tensors are kept."""

    def __init__(self, write: Callable[[str, np.ndarray | None], None]) -> None:
        super().__init__({})
        self.write, self.shared = write, list[tuple[str, Any]]()

    def add(self, name: str, gradient: Any) -> None:
        if name in (EMBEDDING, "lm_head.weight"):
            self.shared.append((name, gradient))
        elif gradient is not None:
            self.write(name, gradient)


class Record:
    """What a step left: arrays, the files it made and the sizes of the gradients in them."""

    def __init__(self, path: Path) -> None:
        self.arrays, metadata = read_tensor_file(path)
        notes = json.loads(metadata["notes"])
        self.files: dict[str, dict[str, Any]] = notes["files"]
        self.sizes = {name: Size(*size) for name, size in notes["sizes"].items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return np.array(self.arrays[name])


class Step(NamedTuple):
    name: str
    run: Callable[[], dict[str, np.ndarray]]  # the arrays of its record
    gradients: tuple[str, ...] = ()  # that it writes
    is_backward: bool = False


class Stream:
    """What ``request`` asks of ``source``; ValueError or TypeError says which part of it is wrong, name first."""

    def __init__(self, source: Source, request: Request) -> None:
        self.source, self.request, self.folder = source, request, Path()
        self.config = config = request.config(source.config)
        self.params = LazyParameters(source, config)
        self.with_loss = request.dlogits is None
        if request.implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, got {request.implementation}"
            )
        self.ops = IMPLEMENTATIONS[request.implementation] | {"embedding": Op(embedding_forward, embedding_backward)}
        if request.tokens.ndim == 2 and request.tokens.shape[1] < (
            2 if self.with_loss and request.targets is None else 1
        ):
            raise ValueError(f"tokens must have shape (B, T) with T of at least 2, got {request.tokens.shape}")
        if request.tokens.size == 0:
            raise ValueError("tokens must not be empty, got none")
        self.batch = make_batch(
            self.params, request.tokens, config, request.targets, request.mask, request.key_mask, None, None,
            self.with_loss,
        )  # fmt: skip
        expect_ids("targets", np.where(self.batch.mask, self.batch.targets, 0), config.vocabulary)
        if request.dlogits is not None and request.dlogits.shape != (*request.tokens.shape, config.vocabulary):
            wanted = (*request.tokens.shape, config.vocabulary)
            raise ValueError(f"dlogits must have shape (B, T, W)={wanted}, got {request.dlogits.shape}")
        if request.dlogits is not None and not np.isfinite(request.dlogits).all():
            raise ValueError("dlogits must be finite, got NaN or infinity")
        if self.with_loss and not self.batch.mask.any():
            raise ValueError("mask and targets must leave at least one target that counts, got none")
        self.modules = range(1, config.mtp_depth + 1)
        self.moe_layers = range(config.dense_layers, config.layers + config.mtp_depth)
        self._check_routes()
        self.wanted = {n: s for n, s in gradient_shapes(config).items() if fnmatchcase(n, request.only)}
        if not self.wanted:
            raise ValueError(f"only must match the name of a gradient, got {request.only}")
        self.activations = [name for name in self._activation_names() if fnmatchcase(name, request.activations or "")]
        if request.activations is not None and not self.activations:
            raise ValueError(
                f"activations must match a name such as {', '.join(ACTIVATIONS)}, got {request.activations}"
            )
        self.files: dict[str, dict[str, Any]] = {}  # of the step at work
        self.sizes: dict[str, Size] = {}
        self.observed: dict[str, np.ndarray] = {}
        self.records: dict[str, Record] = {}

    def write(
        self, folder: Path, *, checkpoint: str = "", force: bool = False,
        progress: Callable[[str, int, int], None] = lambda step, done, total: None,
    ) -> Result:  # fmt: skip
        """Write everything to ``folder``, or the rest of it if a run of the same request was killed there.

        Args:
            checkpoint: what tells the source's contents from others of the same config, for resuming.
            force: replace what such a run left in the folder.
            progress: called with a step's name, how many are done, and how many there are.

        CouldNotRun says why the folder can't be used.
        """
        self.folder = folder
        prepare(folder, self.request.identity(self.source, checkpoint), force)
        self._work(progress)
        result = self._finish()
        shutil.rmtree(self.unfinished)
        return result

    @property
    def unfinished(self) -> Path:
        return self.folder / "unfinished"

    def _check_routes(self) -> None:
        routes, config, (b, t) = self.request.routes, self.config, self.request.tokens.shape
        missing = [layer for layer in self.moe_layers if layer not in routes]
        if routes and missing:
            raise ValueError(f"routes must have every MoE layer of the model, lacks {', '.join(map(str, missing))}")
        for layer in self.moe_layers if routes else ():
            shape = (b, t - max(layer - config.layers + 1, 0), config.top_k)
            for name, x in zip(("routes", "counted"), routes[layer], strict=True):
                if x is not None and x.shape != shape:
                    raise ValueError(
                        f"routes of layer {layer} ({name}) must have shape (B, T, K)={shape}, got {x.shape}"
                    )
                if x is not None:
                    expect_ids(f"routes of layer {layer}", x, config.experts)
            in_order = np.sort(routes[layer].indices, axis=-1)
            if np.any(in_order[..., 1:] == in_order[..., :-1]):
                raise ValueError(f"routes of layer {layer} must name an expert once a token, got one twice")

    def _activation_names(self) -> Iterator[str]:
        for name in ACTIVATIONS:
            if ".L" not in name:
                yield name
                continue
            for layer in self.moe_layers if "gate" in name else range(self.config.layers + self.config.mtp_depth):
                yield name.replace(".L", f".{layer}")

    def steps(self) -> list[Step]:
        """All that is to be done; a backward that leads to no gradient that is wanted is left out."""
        config = self.config
        steps = [Step("embedding", self.embed)]
        steps += [Step(f"forward-{layer:05d}", partial(self.forward, layer)) for layer in range(config.layers)]
        steps += [Step(f"forward-{config.layers + k - 1:05d}", partial(self.forward_mtp, k)) for k in self.modules]
        head = () if config.tied else (config.head,)
        steps.append(Step("head", self.head, () if self.modules else head))
        for k in reversed(self.modules):
            layer = config.layers + k - 1
            names = (*self._of_layer(layer), *(head if k == 1 else ()))
            steps.append(Step(f"backward-{layer:05d}", partial(self.backward_mtp, k), names, True))
        steps.append(Step("norm", self.norm, ("model.norm.weight",), True))
        for layer in reversed(range(config.layers)):
            backward = partial(self.backward, layer)
            steps.append(Step(f"backward-{layer:05d}", backward, self._of_layer(layer), True))
        steps.append(Step("lookup", self.lookup, (EMBEDDING,), True))
        while steps[-1].is_backward and not self.wanted.keys() & set(steps[-1].gradients):
            steps.pop()
        return steps

    def _of_layer(self, layer: int) -> tuple[str, ...]:
        return tuple(name for name in self.wanted if name.startswith(f"model.layers.{layer}."))

    def _work(self, progress: Callable[[str, int, int], None]) -> None:
        """Do the steps that have no record yet."""
        steps = self.steps()
        for i, step in enumerate(steps):
            progress(step.name, i, len(steps))
            path = self.unfinished / f"{step.name}.safetensors"
            if not path.exists():
                self.files, self.sizes = {}, {}
                arrays = step.run()
                notes = {"files": self.files, "sizes": self.sizes}
                write_tensor_file(path, self._temporary(path), arrays, {"notes": json.dumps(notes)})
            self.records[step.name] = Record(path)
        progress("done", len(steps), len(steps))

    # The forward

    def embed(self) -> dict[str, np.ndarray]:
        x, _ = self.ops["embedding"].forward(self.params[EMBEDDING], ids=self.batch.tokens)
        self._write_activations("act-embedding", {"model.embed_tokens": x})
        return {"x": x}

    def forward(self, layer: int) -> dict[str, np.ndarray]:
        run = self._observed(self._run(layer, moe_op()))
        x, saved = block_forward(run, layer, self._input(layer), self.batch)
        return self._forward_record(run, layer, x, saved)

    def forward_mtp(self, depth: int) -> dict[str, np.ndarray]:
        layer = self.config.layers + depth - 1
        run = self._observed(self._run(layer, moe_op()))
        state, _, saved = mtp_module_forward(run, depth, *self._mtp_input(depth))
        record = self._forward_record(run, layer, saved.norm.x, saved.block)
        return record | {"state": state}

    def _forward_record(self, run: Run, layer: int, x: np.ndarray, saved: BlockSaved) -> dict[str, np.ndarray]:
        name, seen = f"model.layers.{layer}", self.observed
        activations = {name: x, f"{name}.after_attention": saved.ffn_norm.x, f"{name}.self_attn": seen["self_attn"]}
        record = {"x": x}
        if layer in run.chosen:
            activations[f"{name}.mlp.gate.scores"] = saved.router.scores
            record |= {"indices": run.chosen[layer].indices, "load": run.loads[layer], "weights": seen["weights"]}
            if run.with_loss and self.config.balance_weight:
                record |= {"counted": run.chosen[layer].counted, "balance": run.balance[layer]}
        self._write_activations(f"act-layer-{layer:05d}", activations)
        return {key: np.asarray(value) for key, value in record.items() if value is not None}

    def head(self) -> dict[str, np.ndarray]:
        """Logits, the main loss, and the gradient of the hidden states."""
        config, ops = self.config, dict(self.ops)
        hidden, _ = self._final_norm()
        self._write_activations("act-norm", {"model.norm": hidden})
        w = self.source.tensor(config.head)
        if self.request.logits:
            shape = (*hidden.shape[:2], config.vocabulary)
            with self._writer("logits.safetensors", {"out/logits": Spec(shape, hidden.dtype)}) as writer:
                rows = hidden.reshape(-1, config.width)
                for start, stop in blocks(rows.shape[0], TOKENS):
                    z, _ = ops["linear"].forward(rows[start:stop], w)
                    writer.write("out/logits", z, start * config.vocabulary)
        record: dict[str, np.ndarray] = {}
        if self.request.dlogits is not None:
            dhidden, dw = ops["linear"].backward(self.request.dlogits.astype(hidden.dtype), LinearSaved(hidden, w))
        else:
            log_prob = ops["log_prob"]

            def noted(*args: Any, **kwargs: Any) -> Any:
                y, saved = log_prob.forward(*args, **kwargs)
                record["log_prob"] = y
                return y, saved

            ops["log_prob"] = Op(noted, log_prob.backward)
            main, saved = self._cross_entropy(hidden, w, self.batch, None, ops)
            dhidden, dw = ops["head_cross_entropy"].backward(1.0, saved)
            record["main"] = np.asarray(main)
        return record | {"dhidden": dhidden} | self._head_gradient([dw], last=not self.modules)

    def _final_norm(self) -> tuple[np.ndarray, Any]:
        x = self._input(self.config.layers)
        return self.ops["rms_norm"].forward(  # type: ignore[no-any-return]
            x, self.source.tensor("model.norm.weight"), eps=self.config.norm_eps
        )

    def _cross_entropy(self, hidden: np.ndarray, w: np.ndarray, batch: Any, normaliser: float | None, ops: Ops) -> Any:
        return ops["head_cross_entropy"].forward(
            hidden, w, targets=batch.targets, mask=batch.mask, normaliser=normaliser, ops=ops
        )

    # The backward

    def backward_mtp(self, depth: int) -> dict[str, np.ndarray]:
        config, layer = self.config, self.config.layers + depth - 1
        w, normaliser = self.source.tensor(config.head), self.batch.mtp_normaliser(config.conventions.mtp_normaliser)
        previous = self.records[f"backward-{layer + 1:05d}" if depth < config.mtp_depth else "head"]
        dstate = previous["dstate"] if "dstate" in previous.arrays else None
        with self._layer_file(layer) as sink:
            run = self._run(layer, moe_op(sink.write))
            state, later = self._mtp_input(depth)
            _, normed, saved = mtp_module_forward(run, depth, state, later)
            loss, head_saved = self._cross_entropy(normed, w, later, normaliser, run.ops)
            dstate = mtp_module_backward(run, depth, 1.0, dstate, saved._replace(head=head_saved), sink)
        rows = next(x for _, x in sink.shared if isinstance(x, Rows))
        parts = [x for name, x in sink.shared if name == config.head]
        record = self._head_gradient([previous.arrays["head"], *parts], last=depth == 1)
        return record | {"dstate": dstate, "loss": np.asarray(loss), **rows._asdict()}

    def norm(self) -> dict[str, np.ndarray]:
        """The gradient of the final norm's input, from the main head and from what the MTP modules read."""
        _, saved = self._final_norm()
        dx, dhidden = np.zeros_like(saved.x), self.records["head"]["dhidden"]
        if self.modules:
            dstate = self.records[f"backward-{self.config.layers:05d}"]["dstate"]
            if self.config.conventions.mtp_hidden == "normed":
                dhidden = dhidden + dstate
            else:
                dx = dx + dstate
        dx_norm, dw = self.ops["rms_norm"].backward(dhidden, saved)
        self._write_gradient("grad-norm", "model.norm.weight", [dw])
        dx = dx + dx_norm
        self._write_activations("cot-norm", {"model.norm": dhidden}, "cot")
        self._write_activations(*self._cotangent(self.config.layers, dx), "cot")
        return {"dx": dx}

    def backward(self, layer: int) -> dict[str, np.ndarray]:
        dx = self.records[f"backward-{layer + 1:05d}" if layer < self.config.layers - 1 else "norm"]["dx"]
        with self._layer_file(layer) as sink:
            run = self._run(layer, moe_op(sink.write, output=False))
            _, saved = block_forward(run, layer, self._input(layer), self.batch)
            dx = block_backward(run, layer, dx, 1.0 if self.with_loss else None, saved, sink)
        self._write_activations(*self._cotangent(layer, dx), "cot")
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
            parts.append(self.records[f"backward-{config.layers:05d}" if self.modules else "head"].arrays["head"])
        else:
            for k in reversed(self.modules):
                record = self.records[f"backward-{config.layers + k - 1:05d}"]
                parts.append(Rows(record["ids"], record["values"]))
        parts.append(embedding_backward(self.records["backward-00000"]["dx"], self.batch.tokens))
        self._write_gradient("grad-embedding", EMBEDDING, parts)
        return {}

    # What the steps share

    def _run(self, layer: int, moe: Op) -> Run:
        """What `model` shares among blocks, for one of them: routes replay those of the request or of the forward."""
        routes = {}
        if (record := self.records.get(f"forward-{layer:05d}")) and "indices" in record.arrays:
            routes[layer] = Route(record["indices"], record["counted"] if "counted" in record.arrays else None)
        elif (route := self.request.routes.get(layer)) is not None:
            routed = self.config.conventions.balance_counts == "routed"
            routes[layer] = Route(route.indices, route.indices if routed and route.counted is None else route.counted)
        return Run(self.params, self.config, self.ops | {"moe": moe}, routes, self.with_loss, {}, {}, {})

    def _observed(self, run: Run) -> Run:
        """The same, noting attention's output and the experts' weights on the way."""
        self.observed, mla, moe = {}, run.ops["mla"], run.ops["moe"]

        def mla_forward(*args: Any, **kwargs: Any) -> Any:
            output, saved = mla.forward(*args, **kwargs)
            self.observed["self_attn"] = output.y
            return output, saved

        def moe_forward(x: np.ndarray, weights: np.ndarray, *args: Any, **kwargs: Any) -> Any:
            self.observed["weights"] = weights
            return moe.forward(x, weights, *args, **kwargs)

        watched = {"mla": Op(mla_forward, mla.backward), "moe": Op(moe_forward, moe.backward)}
        return run._replace(ops={**run.ops, **watched})

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
        return state[:, : later.tokens.shape[1], :], later

    def _head_gradient(self, parts: list[Any], last: bool) -> dict[str, np.ndarray]:
        """Write the head's gradient if no other will be added to it, else keep their sum in the record."""
        name = self.config.head
        if last and not self.config.tied:
            self._write_gradient("grad-head", name, parts)
            return {}
        total = np.empty((self.config.vocabulary, self.config.width), self.source.dtype)
        for start, block in summed(parts, len(total)):
            total[start : start + len(block)] = block
        return {"head": total}

    def _write_gradient(self, file: str, name: str, parts: list[Any]) -> None:
        """A file of one gradient, the sum of ``parts``."""
        if name not in self.wanted:
            return
        shape, size = self.wanted[name], Size(0, 0.0, 0.0)
        with self._writer(f"{file}.safetensors", {f"grad/{name}": Spec(shape, self.source.dtype)}) as writer:
            for start, block in summed(parts, shape[0]):
                writer.write(f"grad/{name}", block, start * (block.size // len(block)))
                size = measure(block, size)
        self.sizes[name] = size

    @contextmanager
    def _layer_file(self, layer: int) -> Iterator[Sink]:
        """A sink for the gradients of one layer."""
        names = self._of_layer(layer)
        if not names:
            yield Sink(lambda name, gradient: None)
            return
        specs = {f"grad/{name}": Spec(self.wanted[name], self.source.dtype) for name in names}
        with self._writer(f"grad-layer-{layer:05d}.safetensors", specs) as writer:

            def write(name: str, gradient: np.ndarray | None) -> None:
                if name not in self.wanted:
                    return
                if gradient is None:
                    writer.zero(f"grad/{name}")
                    self.sizes[name] = Size(specs[f"grad/{name}"].bytes // self.source.dtype.itemsize, 0.0, 0.0)
                else:
                    writer.write(f"grad/{name}", gradient)
                    self.sizes[name] = measure(gradient)

            yield Sink(write)

    def _write_activations(self, file: str, found: Mapping[str, np.ndarray], prefix: str = "act") -> None:
        chosen = {f"{prefix}/{name}": x for name, x in found.items() if name in self.activations}
        if chosen:
            self._write(f"{file}.safetensors", chosen)

    def _write(self, file: str, arrays: Mapping[str, np.ndarray]) -> None:
        with self._writer(file, {name: Spec(x.shape, x.dtype) for name, x in arrays.items()}) as writer:
            for name, x in arrays.items():
                writer.write(name, x)

    def _writer(self, file: str, tensors: Mapping[str, Spec]) -> TensorWriter:
        self.files[file] = {
            name: {"dtype": str(spec.dtype), "shape": spec.shape, "file": file} for name, spec in tensors.items()
        }
        return TensorWriter(self.folder / file, self._temporary(self.folder / file), tensors)

    def _temporary(self, path: Path) -> Path:
        return self.unfinished / f"{path.name}.partial"

    def _finish(self) -> Result:
        """The small files, then the index; the records go."""
        self.files, batch, config = {}, self.batch, self.config
        given = {"tokens": batch.tokens, "targets": batch.targets, "mask": batch.mask, "key_mask": batch.takes_part}
        if not self.with_loss:
            del given["targets"], given["mask"]
        self._write("in.safetensors", {f"in/{name}": np.array(x) for name, x in given.items() if x is not None})
        routed = {layer: self.records[f"forward-{layer:05d}"] for layer in self.moe_layers}
        aux = {
            f"aux/{name}.{layer}": record[key]
            for name, key in {"routes": "indices", "counted": "counted", "weights": "weights", "load": "load"}.items()
            for layer, record in routed.items() if key in record.arrays
        }  # fmt: skip
        if aux:
            self._write("aux.safetensors", aux)
        head, loss, mtp, balance = self.records["head"], None, [], {}
        if self.with_loss:
            loss = main = head["main"]
            mtp = [self.records[f"backward-{config.layers + k - 1:05d}"]["loss"] for k in self.modules]
            for module in mtp:
                loss = loss + config.mtp_weight / config.mtp_depth * module
            balance = {layer: r["balance"] for layer, r in routed.items() if "balance" in r.arrays}
            loss = sum(balance.values(), start=loss)
            out = {"out/loss": loss, "out/main": main, "out/loss_per_token": np.where(batch.mask, -head["log_prob"], 0)}
            out |= {f"out/mtp.{k}": x for k, x in enumerate(mtp, 1)}
            out |= {f"out/balance.{layer}": x for layer, x in balance.items()}
            self._write("out.safetensors", {name: np.asarray(x, self.source.dtype) for name, x in out.items()})
        for record in self.records.values():
            self.files |= record.files
        tensors = {name: entry for file in sorted(self.files) for name, entry in self.files[file].items()}
        about = {"refimpl": __version__, "dtype": str(self.source.dtype), "implementation": self.request.implementation}
        metadata = about | {"config": asdict(config)}
        replace_text(self.folder / "index.json", {"metadata": metadata, "tensors": tensors}, self.unfinished)
        sizes = {name: size for record in self.records.values() for name, size in record.sizes.items()}
        return Result(
            None if loss is None else float(loss), None if loss is None else float(main), [float(x) for x in mtp],
            {layer: float(x) for layer, x in balance.items()}, {layer: r["load"] for layer, r in routed.items()},
            {name: sizes[name] for name in self.wanted if name in sizes}, self.activations,
        )  # fmt: skip


def prepare(folder: Path, identity: dict[str, str], force: bool) -> None:
    """Make the folder, or see that what is in it is this very request, unfinished."""
    unfinished, state = folder / "unfinished", folder / "unfinished" / "request.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = sorted(path.name for path in folder.iterdir())
        strange = [name for name in found if not any(fnmatchcase(name, pattern) for pattern in OURS)]
        if strange:
            raise CouldNotRun(f"{folder} holds other things ({strange[0]}): give a folder of its own")
        if force:
            for path in (folder / "index.json", state):  # first what says that the rest can be used
                path.unlink(missing_ok=True)
            for name in found:
                shutil.rmtree(folder / name) if name == "unfinished" else (folder / name).unlink(missing_ok=True)
        elif "index.json" in found:
            shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed as it removed it
            raise CouldNotRun(f"{folder} holds a finished result: give another folder, or replace it with --force")
        elif state.exists():
            before = json.loads(state.read_text())
            other = [key for key in identity | before if identity.get(key) != before.get(key)]
            if other:
                raise CouldNotRun(
                    f"{folder} holds an unfinished run of another request (other {', '.join(other)}): "
                    "give another folder, or start anew with --force"
                )
            return
        elif set(found) - {"unfinished"}:
            raise CouldNotRun(f"{folder} holds parts of a result: give another folder, or replace them with --force")
        unfinished.mkdir(exist_ok=True)
        replace_text(state, identity, unfinished)
    except OSError as error:
        raise CouldNotRun(f"{folder} can't be written: {error.strerror}") from error


OURS = ("index.json", "unfinished", "in.safetensors", "out.safetensors", "aux.safetensors", "logits.safetensors",
        "act-*.safetensors", "cot-*.safetensors", "grad-*.safetensors")  # fmt: skip


def replace_text(path: Path, content: Any, temporary: Path) -> None:
    partial_file = temporary / f"{path.name}.partial"
    partial_file.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial_file, path)


def summed(parts: list[Any], length: int) -> Iterator[tuple[int, np.ndarray]]:
    """The sum of gradients of one tensor, some rows at a time and in the order of ``parts``."""
    for start, stop in blocks(length, ROWS):
        total: Any = None
        for part in parts:
            block = part.block(start, stop) if isinstance(part, Rows) else part[start:stop]
            total = block if total is None else total + block
        yield start, total


def measure(x: np.ndarray, before: Size = Size(0, 0.0, 0.0)) -> Size:  # noqa: B008
    """The size of ``x``, and of what was before."""
    elements, squares, largest = before
    flat = x.reshape(-1)
    for start, stop in blocks(flat.size, PIECE):
        piece = flat[start:stop].astype(np.float64)
        squares += float(piece @ piece)
        largest = float(np.maximum(largest, np.max(np.abs(piece))))
    return Size(elements + flat.size, squares, largest)
