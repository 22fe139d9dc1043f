"""Truths to diagnose against, and ports: whole runs at some type, right or with a planted bug, the
width permuted as another implementation's sums run in another order.

Nothing here computes a part alone: a port is a run of the model from the tokens, watched.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from refimpl.check.cases import CASES, Case, RandomDraw, pair_of
from refimpl.check.planted import Planted, fresh_module, plant_module
from refimpl.checkpoint import Checkpoint, save_checkpoint
from refimpl.config import ModelConfig, preset
from refimpl.grads import Request, gradient_shapes, write_gradients
from refimpl.grads.cotangents import Calls, activations_of
from refimpl.grads.request import EMBEDDINGS, HIDDEN, SCORES
from refimpl.grads.rounded import round_bfloat16, rounded
from refimpl.grads.units import permute, roundoff, width_axes
from refimpl.model import Route
from refimpl.ops import REFERENCE, AnyOp, Op
from refimpl.parameters import is_buffer, layer_name, module_name, parameter_shapes
from refimpl.port.compare import FACTOR
from refimpl.port.diagnose import Diagnosis, diagnose, largest, unit_of
from refimpl.port.orders import shuffled
from refimpl.port.parts import Part, parts_of
from refimpl.port.recompute import SLOTS, head_of, planted_code, stored_gradients
from refimpl.port.truth import Entry, Truth

TYPES = ("float64", "float32", "bfloat16")


def drawn_parameters(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """Weights off every neutral value, as bfloat16 stores them: normal with std 0.15, norms 0.5 to
    1.5, gate biases small."""
    rng = np.random.default_rng(seed)
    params = {}
    for name, shape in parameter_shapes(config).items():
        x = rng.normal(0, 0.15, shape)
        if name.endswith("norm.weight"):
            x = rng.uniform(0.5, 1.5, shape)
        params[name] = round_bfloat16(x.astype(np.float32))
    return params


def model_truth(folder: Path, seed: int, config: ModelConfig | None = None) -> Truth:
    """The truth of a drawn tiny model on drawn tokens, everything in it."""
    config = replace(preset("tiny"), layers=2, mtp_depth=1) if config is None else config
    rng = np.random.default_rng(seed)
    save_checkpoint(drawn_parameters(config, seed), config, folder / "checkpoint", dtype="float32")
    source = Checkpoint.open(folder / "checkpoint", dtype="float64", mtp=True)
    tokens = rng.integers(0, config.vocabulary, (2, 20))
    request = Request(
        tokens,
        mask=np.concatenate([rng.random((2, 19)) < 0.8, np.zeros((2, 1), bool)], axis=1),
        mtp=bool(config.mtp_depth),
        balance_alpha=0.05,
        activations="*",
        units=TYPES,
    )
    write_gradients(source, request, folder / "truth", origin=folder / "checkpoint")
    return Truth.open(folder / "truth")


def first_wrong(truth: Truth, port: Mapping[str, np.ndarray], dtype: str) -> Part | None:
    """The first part with a tensor more than four units off."""
    for part in parts_of(truth):
        for name in part.tensors:
            right = truth.array(name)
            if name not in port or right.dtype.kind != "f":
                continue
            found = port[name].astype(np.float64)
            if found.shape != right.shape:
                return part
            if not largest(found - right) <= FACTOR * unit_of(truth, name, dtype):
                return part
    return None


def diagnosed(truth: Truth, port: Mapping[str, np.ndarray], dtype: str) -> Diagnosis | None:
    """The diagnosis of the first wrong part; None if all are right."""
    part = first_wrong(truth, port, dtype)
    if part is None:
        return None
    return diagnose(truth, part, {n: port[n] for n in part.tensors if n in port}, dtype)


def module_of(code: Planted | None) -> ModuleType:
    """A module of the model with the bug, that may be changed."""
    if code is not None and code.op == "model":
        return plant_module(code)
    module = fresh_module("refimpl.model")
    if code is not None and code.op == "expert_load":
        module.expert_load = planted_code(code).model.expert_load  # type: ignore[attr-defined]
    return module


def model_port(
    truth: Truth, bug: Planted | None, dtype: str, seed: int, ops: Mapping[str, AnyOp] | None = None
) -> dict[str, np.ndarray]:
    """What a port has that computes the run of ``truth`` at ``dtype``, all by the truth's names.
    ``ops``: some of its own, in the place of a bug's."""
    config = truth.config
    assert config is not None
    order = np.random.default_rng([seed, 7]).permutation(config.width)
    checkpoint = Checkpoint.open(
        truth.metadata["checkpoint"]["path"], dtype="float64", conventions=config.conventions
    )
    axes, params = width_axes(parameter_shapes, config), {}
    for name in parameter_shapes(config):
        x = checkpoint.tensor(name)
        if not is_buffer(name):
            x = at_type(permute(x, axes[name], order), dtype)
        params[name] = x
    changed = dict(planted_code(bug).ops) if ops is None else dict(ops)
    table = REFERENCE
    for name, op in changed.items():
        if name == "cross_entropy":
            name, op = "head_cross_entropy", head_of(op)
        table = table | {SLOTS.get(name, name): op}
    if dtype == "bfloat16":
        table = table | {name: rounded(op) for name, op in table.items()}
    watched = Watched(module_of(bug), config, planted_code(bug).router)
    routes = {
        int(name.rpartition(".")[2]): Route(
            truth.array(name).astype(np.int64),
            truth.array(name.replace("routes", "counted")).astype(np.int64),
        )
        for name in truth.entries
        if name.startswith("aux/routes.")
    }
    routes = {n: watched.module.Route(*route) for n, route in routes.items()}
    with np.errstate(all="ignore"):
        found = watched.run(params, truth, table, routes)
    inverse = np.argsort(order)
    return {name: unpermuted(name, np.asarray(x), config, inverse) for name, x in found.items()}


def at_type(x: np.ndarray, dtype: str) -> np.ndarray:
    x = x.astype("float64" if dtype == "float64" else "float32")
    return round_bfloat16(x) if dtype == "bfloat16" else x  # type: ignore[no-any-return]


def unpermuted(name: str, x: np.ndarray, config: ModelConfig, inverse: np.ndarray) -> np.ndarray:
    kind, _, plain = name.partition("/")
    if kind == "grad":
        return permute(x, width_axes(gradient_shapes, config)[plain], inverse)
    if kind in ("act", "cot") and not plain.endswith(SCORES):
        return np.take(x, inverse, axis=-1)
    return x


class Watched:
    """A run of a model's module whose blocks are watched from outside."""

    def __init__(self, module: ModuleType, config: ModelConfig, router: ModuleType) -> None:
        self.module, self.config = module, config
        self.router = router
        self.found: dict[str, Any] = {}
        self.forward, self.backward = module.block_forward, module.block_backward
        module.block_forward, module.block_backward = self.block_forward, self.block_backward
        self.final = module.final_norm_backward
        module.final_norm_backward = self.final_norm_backward

    def block_forward(self, run: Any, layer: int, x: Any, batch: Any) -> Any:
        outputs: list[Any] = []
        mla = run.ops.mla

        def forward(*args: Any, **kwargs: Any) -> Any:
            y, saved = mla.forward(*args, **kwargs)
            outputs.append(y.y)
            return y, saved

        again = run._replace(ops=run.ops | {"mla": Op(forward, mla.backward)})
        y, saved = self.forward(again, layer, x, batch)
        act = activations_of(layer, saved, [])
        self.found |= {f"act/{name}": value for name, value in act.items()}
        self.found[f"act/{module_name(layer)}"] = y
        self.found[f"act/{layer_name(layer, 'self_attn')}"] = outputs[0]
        if hasattr(saved.network, "routed"):
            routed, (route, load, balance) = saved.network.routed, saved.choices
            self.found |= {
                f"act/{layer_name(layer, SCORES)}": routed.scores,
                f"aux/weights.{layer}": routed.weights,
                f"aux/routes.{layer}": route.indices,
                f"aux/counted.{layer}": route.counted,
                f"aux/load.{layer}": load,
                f"out/balance.{layer}": balance,
            }
        return y, saved

    def block_backward(
        self, run: Any, layer: int, dx: Any, dloss: Any, saved: Any, grads: Any
    ) -> Any:
        calls = Calls(run.ops, self.config, layer, [layer_name(layer, SCORES)])
        below = self.backward(run._replace(ops=calls.ops), layer, dx, dloss, saved, grads)
        self.found |= {f"cot/{n}": x for n, x in calls.cotangents(saved).items()}
        self.found[f"cot/{module_name(layer)}"] = dx
        if hasattr(saved.network, "routed"):
            dy, router_saved, _ = calls.call(saved.network.router)
            name = f"cot/{layer_name(layer, SCORES)}"
            self.found[name] = self.router.scores_backward(dy, router_saved)
        if layer == 0:
            self.found[f"cot/{EMBEDDINGS}"] = below
        return below

    def final_norm_backward(self, *args: Any) -> Any:
        dx, dhidden = self.final(*args)
        self.found[f"cot/{HIDDEN}"] = dhidden
        return dx, dhidden

    def run(self, params: Any, truth: Truth, table: Any, routes: Any) -> dict[str, Any]:
        given = {
            n: truth.array(f"in/{n}") for n in ("targets", "mask", "key_mask") if f"in/{n}" in truth
        }
        embed: list[Any] = []
        embedding = table.embedding

        def lookup(*args: Any, **kwargs: Any) -> Any:
            y, saved = embedding.forward(*args, **kwargs)
            embed.append(y)
            return y, saved

        table = table | {"embedding": Op(lookup, embedding.backward)}
        output, saved = self.module.forward(
            params, truth.array("in/tokens"), self.config, routes=routes, ops=table, **given
        )
        logits = self.module.logits(params, output.hidden, table)
        self.found |= {
            f"act/{EMBEDDINGS}": embed[0],
            f"act/{HIDDEN}": output.hidden,
            "out/logits": logits,
            "out/main": output.main,
            "out/loss": output.loss,
        }
        self.found |= {f"out/mtp.{n}": x for n, x in enumerate(output.mtp, 1)}
        grads = self.module.backward(saved)
        return self.found | stored_gradients(grads, parameter_shapes(self.config))


# Cases of one op


class CaseTruth(Truth):
    """The truth of one case of an op, in memory: vectors of one case."""

    def __init__(self, op: str, case: Case, seed: int) -> None:
        self.op, self.case = op, case
        forward, backward = pair_of(op)
        kwargs = dict(case.kwargs)
        if case.replay is not None:
            kwargs |= case.replay(forward(*case.inputs, **kwargs)[0])
        self.kwargs = kwargs
        names = names_of(op)
        inputs = [None if x is None else round_bfloat16(x) for x in case.inputs]
        y, _ = forward(*inputs, **kwargs)
        rng = np.random.default_rng([seed, 3])
        fields = y._asdict() if hasattr(y, "_asdict") else {"y": y}
        cot = {
            name: round_bfloat16(np.asarray(rng.normal(size=np.shape(x))))
            for name, x in fields.items()
            if np.asarray(x).dtype.kind == "f"
        }
        self.arrays = {f"in/{n}": x for n, x in zip(names, inputs, strict=True) if x is not None}
        self.arrays |= {f"cot/{n}": x for n, x in cot.items()}
        arrays = {k: x for k, x in kwargs.items() if isinstance(x, np.ndarray)}
        self.arrays |= {f"aux/{n}": x for n, x in arrays.items()}
        settings = {k: x for k, x in kwargs.items() if k not in arrays and x is not None}
        self.arrays |= case_results(op, forward, backward, self.arrays, settings)
        self.arrays = {f"c/{n}": np.asarray(x) for n, x in self.arrays.items()}
        super().__init__(
            Path(), {"kind": "vectors", "cases": {"c": {"op": op, "settings": settings}}}, {}
        )
        units = self.measured(settings)
        self.entries = {
            name: Entry(
                x.shape,
                str(x.dtype),
                "",
                name,
                float(np.max(np.abs(x), initial=0.0)),
                units.get(name, {}),
            )
            for name, x in self.arrays.items()
        }

    def array(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def measured(self, settings: Mapping[str, Any]) -> dict[str, dict[str, float]]:
        """Units by shuffled reruns."""
        forward, backward = pair_of(self.op)
        plain = {n[2:]: x for n, x in self.arrays.items()}
        found: dict[str, dict[str, float]] = {}
        for dtype in TYPES:
            for seed in range(1, 5):
                again = case_port(self, Op(forward, backward), dtype, 1000 + seed, plain, settings)
                for name, x in again.items():
                    scale = float(np.max(np.abs(self.arrays[name]), initial=0.0))
                    error = float(
                        np.max(np.abs(x.astype(np.float64) - self.arrays[name]), initial=0.0)
                    )
                    unit = found.setdefault(name, {}).get(dtype, 0.0)
                    found[name][dtype] = max(unit, error, roundoff(dtype) * scale)
        return found


def case_truth(op: str, seed: int) -> CaseTruth:
    """The truth of a drawn case."""
    return CaseTruth(op, CASES[op](RandomDraw(seed)), seed)


def names_of(op: str) -> list[str]:
    parameters = inspect.signature(pair_of(op).forward).parameters.values()
    return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]


def case_results(
    op: str, forward: Any, backward: Any, arrays: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """out/ and grad/ of a pair on a case."""
    names = names_of(op)
    aux = {n[4:]: x for n, x in arrays.items() if n.startswith("aux/")}
    y, saved = forward(*[arrays.get(f"in/{n}") for n in names], **settings, **aux)
    fields = y._asdict() if hasattr(y, "_asdict") else {"y": y}
    cot = {n[4:]: x for n, x in arrays.items() if n.startswith("cot/")}
    dy: Any = cot["y"] if not hasattr(y, "_asdict") else tuple(cot[n] for n in fields if n in cot)
    gradients = backward(dy, saved)
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    found = {f"out/{n}": x for n, x in fields.items()}
    return found | {f"grad/{n}": g for n, g in zip(names, gradients, strict=True) if g is not None}


def case_port(
    truth: CaseTruth,
    op: AnyOp,
    dtype: str,
    seed: int,
    plain: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, np.ndarray]:
    """What a port of one op has on the case: with sums in an order of the seed's."""
    plain = plain or {n[2:]: x for n, x in truth.arrays.items()}
    settings = settings if settings is not None else truth.metadata["cases"]["c"]["settings"]
    own = shuffled(seed)
    placed = {
        n: own(at_type(x, dtype)) if x.dtype.kind == "f" else x
        for n, x in plain.items()
        if n.startswith(("in/", "aux/", "cot/"))
    }
    table = REFERENCE
    if dtype == "bfloat16":
        op, table = rounded(op), table | {n: rounded(x) for n, x in table.items()}
    more = (
        {"ops": table} if "ops" in inspect.signature(pair_of(truth.op).forward).parameters else {}
    )
    with np.errstate(all="ignore"):
        found = case_results(truth.op, op.forward, op.backward, placed, {**settings, **more})
    return {f"c/{n}": np.asarray(x) for n, x in found.items()}
