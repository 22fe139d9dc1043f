"""How the ops and the model are run on the golden cases of tests/golden/, and compared with their
values.

The values were made by torch's autograd from formulas of their own (make_golden.py); torch is not
needed here. An output or a gradient agrees if its largest error is at most 1e-13 of the golden
tensor's largest value.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open

import refimpl.model
from refimpl.config import Conventions, ModelConfig
from refimpl.ops import (
    GRPO_PRESETS,
    IMPLEMENTATIONS,
    REFERENCE,
    Op,
    Ops,
    Yarn,
    bias_update,
    expert_load,
    group_advantages,
    mtp_pairs,
    rope_frequencies,
    yarn_mscale,
    yarn_softmax_factor,
)
from refimpl.optimizer import AdamW, Moments, clip_global_norm

GOLDEN = Path(refimpl.__file__).parent / "port" / "small"  # they are in the wheel, too
TOLERANCE = 1e-13
ZERO = 1e-15  # what is allowed where the golden tensor is zero throughout

Tensors = dict[str, Any]


class Case(NamedTuple):
    """One case of a file: scalar settings, and tensors by prefix."""

    settings: dict[str, Any]
    inputs: Tensors
    aux: Tensors
    cot: Tensors
    golden: Tensors  # out/NAME and grad/NAME

    def order(self, *names: str) -> list[Any]:
        """The differentiable inputs of these names, None where the case has none."""
        return [self.inputs.get(name) for name in names]


@cache
def load(file: str) -> dict[str, Case]:
    """Every case of a file; the model's float16 inputs become float64."""
    with safe_open(GOLDEN / f"golden-{file}.safetensors", "numpy") as f:
        cases = {
            name: Case(settings, {}, {}, {}, {})
            for name, settings in json.loads(f.metadata()["golden"])["cases"].items()
        }
        for key in f.keys():  # noqa: SIM118
            case, prefix, name = key.removeprefix(f"golden-{file}-").split("/", 2)
            array = f.get_tensor(key)
            if array.dtype.kind == "f":
                array = array.astype(np.float64)
            array.flags.writeable = False
            where = {"in": cases[case].inputs, "aux": cases[case].aux, "cot": cases[case].cot}
            if prefix in where:
                where[prefix][name] = array
            else:
                cases[case].golden[f"{prefix}/{name}"] = array
    return cases


def error(ours: Any, golden: np.ndarray) -> float:
    """The largest difference over the largest golden value; above 1 if a shape, type or integer
    differs."""
    ours = np.asarray(ours)
    if ours.shape != golden.shape or (golden.dtype.kind == "f" and ours.dtype != golden.dtype):
        return float("inf")
    if golden.dtype.kind != "f":
        return 0.0 if np.array_equal(ours, golden) else float("inf")
    if not golden.size:
        return 0.0
    worst, largest = float(np.max(np.abs(ours - golden))), float(np.max(np.abs(golden)))
    return worst / largest if largest else worst / ZERO * TOLERANCE


def compare(file: str, name: str, results: Tensors) -> dict[str, float]:
    """The error of every golden tensor; AssertionError names those that are missing."""
    golden = load(file)[name].golden
    assert set(results) == set(golden), (
        f"{file}, {name}: tensors {set(results) ^ set(golden)} on one side alone"
    )
    return {key: error(results[key], golden[key]) for key in golden}


def check(file: str, name: str, results: Tensors) -> None:
    """AssertionError for each tensor of a case that is not within the tolerance."""
    wrong = [
        f"{file}, {name}, {key}: error {value:.2e} of the largest value, at most "
        f"{TOLERANCE:.0e} allowed"
        for key, value in compare(file, name, results).items()
        if not value <= TOLERANCE
    ]
    assert not wrong, "\n".join(wrong)


def gradients(names: str, values: Any) -> Tensors:
    """Gradients by name, without those of inputs that were None."""
    values = values if isinstance(values, tuple) else (values,)
    return {
        f"grad/{name}": value
        for name, value in zip(names.split(), values, strict=True)
        if value is not None
    }


Run = Callable[[Case], Tensors]


def plain(names: str, output: str = "y") -> Callable[..., Run]:
    """How to run an op with one output, whose inputs, settings and auxiliaries are named as in its
    signature."""

    def way(op: Op, **more: Any) -> Run:
        def run(case: Case) -> Tensors:
            y, saved = op.forward(*case.order(*names.split()), **case.settings, **case.aux, **more)
            return {f"out/{output}": y} | gradients(names, op.backward(case.cot[output], saved))

        return run

    return way


def rope(op: Op) -> Run:
    def run(case: Case) -> Tensors:
        s = case.settings
        yarn = Yarn(*s["yarn"]) if s["yarn"] else None
        y, saved = op.forward(case.inputs["x"], layout=s["layout"], factor=s["factor"], **case.aux)
        results = {
            "out/y": y,
            "grad/x": op.backward(case.cot["y"], saved),
            "out/inv_freq": rope_frequencies(s["width"], s["theta"], yarn),
            "out/softmax_factor": np.float64(yarn_softmax_factor(yarn)),
        }
        if yarn is not None:
            results["out/mscale"] = np.float64(yarn_mscale(yarn.factor, yarn.mscale))
        return results

    return run


def mla(op: Op, **more: Any) -> Run:
    def run(case: Case) -> Tensors:
        names = "x cache w_q_a w_q_a_norm w_q_b w_kv_a w_kv_a_norm w_kv_b w_o"
        output, saved = op.forward(*case.order(*names.split()), **case.settings, **case.aux, **more)
        grads = op.backward((case.cot["y"], case.cot.get("cache")), saved)
        return {"out/y": output.y, "out/cache": output.cache} | gradients(names, grads)

    return run


def router(op: Op, load: Any = expert_load, update: Any = bias_update) -> Run:
    """``load`` and ``update``: what stands in the place of `expert_load` and `bias_update`."""

    def run(case: Case) -> Tensors:
        s = case.settings
        if "gamma" in s:
            counted = load(case.aux["indices"], s["experts"], case.aux.get("mask"))
            return {
                "out/load": counted,
                "out/bias": update(case.aux["bias"], counted, s["gamma"], centre=s["centre"]),
            }
        output, saved = op.forward(*case.order("x", "w"), **s, **case.aux)
        dweights = case.cot.get("weights", np.zeros_like(output.weights))
        grads = op.backward((dweights, case.cot.get("scores")), saved)
        return {f"out/{key}": value for key, value in output._asdict().items()} | gradients(
            "x w", grads
        )

    return run


def grpo(op: Op) -> Run:
    """The choice of branch is compared where it matters: at tokens whose advantage is not 0."""

    def run(case: Case) -> Tensors:
        settings = {
            key: value for key, value in case.settings.items() if key not in ("source", "preset")
        }
        if "rewards" in case.aux:
            return {"out/advantages": group_advantages(**case.aux, **settings)}
        settings = GRPO_PRESETS[case.settings.get("preset", "deepseekmath")] | settings
        output, saved = op.forward(case.inputs["log_prob"], **settings, **case.aux)
        matters = case.aux["mask"] & (case.aux["advantages"] != 0)[:, None]
        results = {
            "out/loss": output.loss,
            "out/unclipped": output.unclipped & matters,
            "out/kept": output.kept,
        }
        return results | gradients("log_prob", op.backward((case.cot["loss"],), saved))

    return run


def mtp(op: Op) -> Run:
    def run(case: Case) -> Tensors:
        if "depth" in case.settings:
            *pairs, _ = mtp_pairs(**case.aux, **case.settings)
            return {
                f"out/{key}": value
                for key, value in zip(("tokens", "targets", "mask"), pairs, strict=True)
            }
        return plain("hidden embedding w_hnorm w_enorm w_proj", "h")(op)(case)

    return run


def configuration(case: Case) -> ModelConfig:
    """The config that a model case's settings describe."""
    fields = dict(case.settings["config"])
    yarn, conventions = fields.pop("yarn"), fields.pop("conventions")
    return ModelConfig(
        **fields, yarn=Yarn(*yarn) if yarn else None, conventions=Conventions(**conventions)
    )


def model(ops: Ops = REFERENCE, module: Any = refimpl.model) -> Run:
    def run(case: Case) -> Tensors:
        params = case.inputs | {
            key: value for key, value in case.aux.items() if key.startswith("model.")
        }
        given = {key: value for key, value in case.aux.items() if not key.startswith("model.")}
        output, saved = module.forward(
            params, given.pop("tokens"), configuration(case), ops=ops, **given
        )
        results = {
            "out/loss": output.loss,
            "out/main": output.main,
            "out/hidden": output.hidden,
            "out/logits": module.logits(params, output.hidden, ops),
        }
        results |= {f"out/mtp.{depth}": value for depth, value in enumerate(output.mtp, 1)}
        results |= {f"out/balance.{layer}": value for layer, value in output.balance.items()}
        results |= {f"out/indices.{layer}": route.indices for layer, route in output.routes.items()}
        results |= {f"out/load.{layer}": value for layer, value in output.loads.items()}
        grads = module.backward(saved, **{f"d{name}": value for name, value in case.cot.items()})
        return results | {f"grad/{name}": value for name, value in grads.items()}

    return run


WAYS: Mapping[str, tuple[str, Callable[..., Run]]] = {
    # op: the file it is compared with, and how its pair is run to give all the file's tensors
    "linear": ("linear", plain("x w")),
    "embedding": ("embedding", plain("w")),
    "rms_norm": ("rms_norm", plain("x w")),
    "swiglu": ("swiglu", plain("gate up")),
    "ffn": ("ffn", plain("x w_gate w_up w_down")),
    "rope": ("rope", rope),
    "attention": ("attention", plain("q k v", "o")),
    "flash_attention": ("attention", plain("q k v", "o")),
    "mla": ("mla", mla),
    "mla_absorbed": ("mla", mla),
    "router": ("router", router),
    "balance_loss": ("balance_loss", plain("scores", "loss")),
    "moe": ("moe", plain("x weights w_gate w_up w_down w_shared_gate w_shared_up w_shared_down")),
    "cross_entropy": ("cross_entropy", plain("logits", "loss")),
    "log_prob": ("log_prob", plain("h w")),
    "head_cross_entropy": ("head_cross_entropy", plain("h w", "loss")),
    "preference_loss": ("preference_loss", plain("h_chosen h_rejected w", "loss")),
    "grpo": ("grpo", grpo),
    "mtp": ("mtp", mtp),
}


def pair(op: str) -> Op:
    """The op's own forward and backward."""
    return Op(getattr(refimpl.ops, f"{op}_forward"), getattr(refimpl.ops, f"{op}_backward"))


def optimizer(case: Case) -> Tensors:
    """Clip and step as torch does, whose clipping adds 1e-6 to the norm."""
    settings = dict(case.settings)
    max_norm = settings.pop("max_norm")
    params = {name: case.aux[f"start.{name}"].copy() for name in ("a", "b")}
    adam, moments = AdamW(**settings), Moments()
    norms = []
    for step, rate in enumerate(case.aux["rates"]):
        grads = {name: case.aux[f"grad{step}.{name}"].copy() for name in params}
        norms.append(clip_global_norm(grads, max_norm, epsilon=1e-6))
        moments = adam.update(params, grads, moments, float(rate))
    return {"out/norms": np.array(norms)} | {f"out/{name}": p for name, p in params.items()}


FLASH, ABSORBED = IMPLEMENTATIONS["flash"], IMPLEMENTATIONS["absorbed"]
RUNS: dict[str, tuple[str, Run]] = {
    op: (file, way(pair(op))) for op, (file, way) in WAYS.items()
} | {
    "flash_attention, block 2": (
        "attention",
        plain("q k v", "o")(pair("flash_attention"), block=2),
    ),
    "mla, flash": ("mla", mla(pair("mla"), ops=FLASH)),
    "mla_absorbed, flash": ("mla", mla(pair("mla_absorbed"), ops=FLASH)),
    "log_prob, block 2 x 3": ("log_prob", plain("h w")(pair("log_prob"), block=(2, 3))),
    "head_cross_entropy, block 3 x 2": (
        "head_cross_entropy",
        plain("h w", "loss")(pair("head_cross_entropy"), block=(3, 2)),
    ),
    "optimizer": ("optimizer", optimizer),
    "model": ("model", model()),
    "model, flash": ("model", model(FLASH)),
    "model, absorbed": ("model", model(ABSORBED)),
    "model, absorbed and flash": ("model", model(FLASH | {"mla": ABSORBED.mla})),
}
