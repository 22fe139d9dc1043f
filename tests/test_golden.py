"""Every op and the model against golden values, made by torch's autograd from formulas of their own.

The values lie in tests/golden/, with the script that made them; torch is not needed here. An output or a gradient
agrees if its largest error is at most 1e-13 of the golden tensor's largest value.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors import safe_open

import refimpl.ops
from refimpl.config import Conventions, ModelConfig
from refimpl.model import backward, forward, logits
from refimpl.ops import REFERENCE
from refimpl.ops.attention import attention_backward, attention_forward
from refimpl.ops.balance_loss import balance_loss_backward, balance_loss_forward
from refimpl.ops.cross_entropy import cross_entropy_backward, cross_entropy_forward
from refimpl.ops.embedding import embedding_backward, embedding_forward
from refimpl.ops.ffn import ffn_backward, ffn_forward
from refimpl.ops.flash_attention import flash_attention_backward, flash_attention_forward
from refimpl.ops.head_cross_entropy import head_cross_entropy_backward, head_cross_entropy_forward
from refimpl.ops.linear import linear_backward, linear_forward
from refimpl.ops.log_prob import log_prob_backward, log_prob_forward
from refimpl.ops.mla import mla_backward, mla_forward
from refimpl.ops.mla_absorbed import mla_absorbed_backward, mla_absorbed_forward
from refimpl.ops.moe import moe_backward, moe_forward
from refimpl.ops.mtp import mtp_backward, mtp_forward, mtp_pairs
from refimpl.ops.rms_norm import rms_norm_backward, rms_norm_forward
from refimpl.ops.rope import Yarn, rope_backward, rope_forward, rope_frequencies, yarn_mscale, yarn_softmax_factor
from refimpl.ops.router import bias_update, expert_load, router_backward, router_forward
from refimpl.ops.swiglu import swiglu_backward, swiglu_forward
from refimpl.ops.table import Op

GOLDEN = Path(__file__).parent / "golden"
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
    with safe_open(GOLDEN / f"{file}.safetensors", "numpy") as f:
        cases = {
            name: Case(settings, {}, {}, {}, {})
            for name, settings in json.loads(f.metadata()["golden"])["cases"].items()
        }
        for key in f.keys():
            case, prefix, name = key.split("/", 2)
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
    """The largest difference over the largest golden value; above 1 if a shape, type or integer differs."""
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
    assert set(results) == set(golden), f"{file}, {name}: tensors {set(results) ^ set(golden)} on one side alone"
    return {key: error(results[key], golden[key]) for key in golden}


def check(file: str, name: str, results: Tensors) -> None:
    """AssertionError for each tensor of a case that is not within the tolerance."""
    wrong = [
        f"{file}, {name}, {key}: error {value:.2e} of the largest value, at most {TOLERANCE:.0e} allowed"
        for key, value in compare(file, name, results).items()
        if not value <= TOLERANCE
    ]
    assert not wrong, "\n".join(wrong)


def gradients(names: tuple[str, ...], values: Any) -> Tensors:
    """Gradients by name, without those of inputs that were None."""
    values = values if isinstance(values, tuple) else (values,)
    return {f"grad/{name}": value for name, value in zip(names, values, strict=True) if value is not None}


def plain(
    names: tuple[str, ...], output: str, op: tuple[Callable[..., Any], Callable[..., Any]], **more: Any
) -> Callable[[Case], Tensors]:
    """How to run an op with one output, whose inputs, settings and auxiliaries are named as in its signature."""

    def run(case: Case) -> Tensors:
        y, saved = op[0](*case.order(*names), **case.settings, **case.aux, **more)
        return {f"out/{output}": y} | gradients(names, op[1](case.cot[output], saved))

    return run


def rope(case: Case) -> Tensors:
    s = case.settings
    yarn = Yarn(*s["yarn"]) if s["yarn"] else None
    y, saved = rope_forward(case.inputs["x"], layout=s["layout"], factor=s["factor"], **case.aux)
    results = {
        "out/y": y,
        "grad/x": rope_backward(case.cot["y"], saved),
        "out/inv_freq": rope_frequencies(s["width"], s["theta"], yarn),
        "out/softmax_factor": np.float64(yarn_softmax_factor(yarn)),
    }
    if yarn is not None:
        results["out/mscale"] = np.float64(yarn_mscale(yarn.factor, yarn.mscale))
    return results


MLA = ("x", "cache", "w_q_a", "w_q_a_norm", "w_q_b", "w_kv_a", "w_kv_a_norm", "w_kv_b", "w_o")


def mla(op: tuple[Callable[..., Any], Callable[..., Any]], **more: Any) -> Callable[[Case], Tensors]:
    def run(case: Case) -> Tensors:
        output, saved = op[0](*case.order(*MLA), **case.settings, **case.aux, **more)
        grads = op[1]((case.cot["y"], case.cot.get("cache")), saved)
        return {"out/y": output.y, "out/cache": output.cache} | gradients(MLA, grads)

    return run


def router(case: Case) -> Tensors:
    s = case.settings
    if "gamma" in s:
        load = expert_load(case.aux["indices"], s["experts"], case.aux.get("mask"))
        return {"out/load": load, "out/bias": bias_update(case.aux["bias"], load, s["gamma"], centre=s["centre"])}
    output, saved = router_forward(*case.order("x", "w"), **s, **case.aux)
    dweights = case.cot.get("weights", np.zeros_like(output.weights))
    grads = router_backward((dweights, case.cot.get("scores")), saved)
    return {f"out/{key}": value for key, value in output._asdict().items()} | gradients(("x", "w"), grads)


MTP = ("hidden", "embedding", "w_hnorm", "w_enorm", "w_proj")


def mtp(case: Case) -> Tensors:
    if "depth" in case.settings:
        pairs = mtp_pairs(**case.aux, **case.settings)
        return {f"out/{key}": value for key, value in zip(("tokens", "targets", "mask"), pairs, strict=True)}
    return plain(MTP, "h", (mtp_forward, mtp_backward))(case)


def configuration(case: Case) -> ModelConfig:
    """The config that a model case's settings describe."""
    fields = dict(case.settings["config"])
    yarn, conventions = fields.pop("yarn"), fields.pop("conventions")
    return ModelConfig(**fields, yarn=Yarn(*yarn) if yarn else None, conventions=Conventions(**conventions))


def model(ops: dict[str, Op] = REFERENCE) -> Callable[[Case], Tensors]:
    def run(case: Case) -> Tensors:
        params = case.inputs | {key: value for key, value in case.aux.items() if key.startswith("model.")}
        given = {key: value for key, value in case.aux.items() if not key.startswith("model.")}
        output, saved = forward(params, given.pop("tokens"), configuration(case), ops=ops, **given)
        results = {
            "out/loss": output.loss,
            "out/main": output.main,
            "out/hidden": output.hidden,
            "out/logits": logits(params, output.hidden, ops),
        }
        results |= {f"out/mtp.{depth}": value for depth, value in enumerate(output.mtp, 1)}
        results |= {f"out/balance.{layer}": value for layer, value in output.balance.items()}
        results |= {f"out/indices.{layer}": route.indices for layer, route in output.routes.items()}
        results |= {f"out/load.{layer}": value for layer, value in output.loads.items()}
        grads = backward(saved, **{f"d{name}": value for name, value in case.cot.items()})
        return results | {f"grad/{name}": value for name, value in grads.items()}

    return run


FFN = ("x", "w_gate", "w_up", "w_down")
MOE = ("x", "weights", "w_gate", "w_up", "w_down", "w_shared_gate", "w_shared_up", "w_shared_down")
ATTENTION = (attention_forward, attention_backward)
FLASH = (flash_attention_forward, flash_attention_backward)
NAIVE, ABSORBED = (mla_forward, mla_backward), (mla_absorbed_forward, mla_absorbed_backward)
LOG_PROB, HEAD = (log_prob_forward, log_prob_backward), (head_cross_entropy_forward, head_cross_entropy_backward)
WITH_FLASH = REFERENCE | {"attention": Op(*FLASH)}
WITH_ABSORBED = REFERENCE | {"mla": Op(*ABSORBED)}

RUNS: dict[str, tuple[str, Callable[[Case], Tensors]]] = {
    # how an op is run: the file it is compared with, and the function that gives all the file's tensors
    "linear": ("linear", plain(("x", "w"), "y", (linear_forward, linear_backward))),
    "embedding": ("embedding", plain(("w",), "y", (embedding_forward, embedding_backward))),
    "rms_norm": ("rms_norm", plain(("x", "w"), "y", (rms_norm_forward, rms_norm_backward))),
    "swiglu": ("swiglu", plain(("gate", "up"), "y", (swiglu_forward, swiglu_backward))),
    "ffn": ("ffn", plain(FFN, "y", (ffn_forward, ffn_backward))),
    "rope": ("rope", rope),
    "attention": ("attention", plain(("q", "k", "v"), "o", ATTENTION)),
    "flash_attention": ("attention", plain(("q", "k", "v"), "o", FLASH)),
    "flash_attention, block 2": ("attention", plain(("q", "k", "v"), "o", FLASH, block=2)),
    "mla": ("mla", mla(NAIVE)),
    "mla, flash": ("mla", mla(NAIVE, ops=WITH_FLASH)),
    "mla_absorbed": ("mla", mla(ABSORBED)),
    "mla_absorbed, flash": ("mla", mla(ABSORBED, ops=WITH_FLASH)),
    "router": ("router", router),
    "balance_loss": ("balance_loss", plain(("scores",), "loss", (balance_loss_forward, balance_loss_backward))),
    "moe": ("moe", plain(MOE, "y", (moe_forward, moe_backward))),
    "cross_entropy": ("cross_entropy", plain(("logits",), "loss", (cross_entropy_forward, cross_entropy_backward))),
    "log_prob": ("log_prob", plain(("h", "w"), "y", LOG_PROB)),
    "log_prob, block 2 x 3": ("log_prob", plain(("h", "w"), "y", LOG_PROB, block=(2, 3))),
    "head_cross_entropy": ("head_cross_entropy", plain(("h", "w"), "loss", HEAD)),
    "head_cross_entropy, block 3 x 2": ("head_cross_entropy", plain(("h", "w"), "loss", HEAD, block=(3, 2))),
    "mtp": ("mtp", mtp),
    "model": ("model", model()),
    "model, flash": ("model", model(WITH_FLASH)),
    "model, absorbed": ("model", model(WITH_ABSORBED)),
    "model, absorbed and flash": ("model", model(WITH_FLASH | {"mla": Op(*ABSORBED)})),
}


@pytest.mark.parametrize(("way", "name"), [(way, name) for way, (file, _) in RUNS.items() for name in load(file)])
def test_agrees_with_golden(way: str, name: str) -> None:
    """Every output and every gradient."""
    file, run = RUNS[way]
    check(file, name, run(load(file)[name]))


@pytest.mark.parametrize("name", load("model"))
def test_replayed_routes(name: str) -> None:
    """Routes that are replayed agree too, without the biases that chose them."""
    case = load("model")[name]
    biases = {key: value for key, value in case.aux.items() if key.startswith("model.")}
    given = {key: value for key, value in case.aux.items() if key not in biases}
    tokens, config = given.pop("tokens"), configuration(case)
    routes = forward(case.inputs | biases, tokens, config, **given)[0].routes
    unbiased = {key: np.zeros_like(value) for key, value in biases.items()}
    output, _ = forward(case.inputs | unbiased, tokens, config, routes=routes, **given)
    assert error(output.hidden, case.golden["out/hidden"]) <= TOLERANCE


def test_every_op_is_covered() -> None:
    """A stem of refimpl/ops without golden values fails here, and so does a file that no test reads."""
    stems = {path.stem for path in Path(refimpl.ops.__file__).parent.glob("*.py")} - {"__init__", "table"}
    assert stems <= set(RUNS), f"without golden values: {stems - set(RUNS)}"
    assert {file for file, _ in RUNS.values()} == {path.stem for path in GOLDEN.glob("*.safetensors")}


@pytest.mark.parametrize("file", sorted({file for file, _ in RUNS.values()}))
def test_every_output_has_a_gradient(file: str) -> None:
    """A case with cotangents has a gradient, of its shape, for every differentiable input; no cotangent is constant."""
    for name, case in load(file).items():
        assert bool(case.cot) == bool(case.inputs), f"{file}, {name}"
        for key, array in case.inputs.items():
            assert case.golden[f"grad/{key}"].shape == array.shape, f"{file}, {name}, {key}"
        for key, array in case.cot.items():
            assert array.size == 1 or np.ptp(array) > 0, f"{file}, {name}, {key}"


def test_numbers_of_v3() -> None:
    """V3's YaRN: full speed up to pair 10, a fortieth from pair 23 on; the two published softmax corrections."""
    case = load("rope")["v3"]
    assert case.settings["range"] == [10, 23]
    full = 1e4 ** (-np.arange(32) / 32)
    ratio = rope_frequencies(64, 1e4, Yarn()) / full
    np.testing.assert_allclose(ratio[:11], 1, rtol=1e-14)
    np.testing.assert_allclose(ratio[23:], 1 / 40, rtol=1e-14)
    assert np.all(np.diff(ratio[10:24]) < 0)
    assert abs(192**-0.5 * yarn_softmax_factor(Yarn()) - 0.135234) < 5e-7
    assert abs(yarn_softmax_factor(Yarn(mscale=0.707, mscale_all_dim=0.707)) - 1.58963) < 5e-6


@pytest.mark.parametrize("name", load("rope"))
def test_each_frequency(name: str) -> None:
    """Each rotation frequency to its own size: the slowest are too small for the largest one's tolerance."""
    case = load("rope")[name]
    ours, golden = rope(case)["out/inv_freq"], case.golden["out/inv_freq"]
    assert np.max(np.abs(ours / golden - 1)) <= 1e-14


@pytest.mark.parametrize("golden", [np.array([1.0, 4.0]), np.zeros(2)])
@pytest.mark.parametrize("ours", [[1, np.nan], [1, np.inf], [1, 4 + 1e-12], [0.0, 4.0, 0.0], [[1.0, 4.0]], [1, 3]])
def test_comparison_fails(ours: Any, golden: np.ndarray) -> None:
    """NaN, another shape, another type and small errors do not pass."""
    assert not error(np.array(ours), golden) <= TOLERANCE


def changed(case: Case, change: dict[str, Any]) -> Case:
    """A case with other settings, or (for names of auxiliaries) other auxiliaries; None takes one away."""
    aux = case.aux | {key: value for key, value in change.items() if key in case.aux}
    settings = case.settings | {key: value for key, value in change.items() if key not in case.aux}
    return case._replace(settings=settings, aux={key: value for key, value in aux.items() if value is not None})


def another_model(case: Case, change: dict[str, Any]) -> Case:
    """A model case with other conventions or config fields."""
    config = case.settings["config"]
    conventions = {key: value for key, value in change.items() if key in config["conventions"]}
    fields = {key: value for key, value in change.items() if key not in conventions}
    return changed(case, {"config": config | fields | {"conventions": config["conventions"] | conventions}})


MISTAKES: list[tuple[str, str, dict[str, Any], str]] = [
    # how the op is run, the case, what is wrong, and a tensor that must show it
    ("rms_norm", "large_eps", {"eps": 0.0}, "grad/x"),
    ("rope", "interleaved", {"layout": "halves"}, "out/y"),
    ("rope", "interleaved", {"factor": 1.0}, "grad/x"),
    ("rope", "interleaved", {"yarn": None}, "out/inv_freq"),
    ("rope", "halves", {"layout": "interleaved"}, "grad/x"),
    ("attention", "causal", {"scale": 0.37**0.5}, "grad/q"),
    ("attention", "causal", {"causal": False}, "out/o"),
    ("attention", "decode", {"key_mask": None}, "out/o"),
    ("attention", "packed", {"segments": None}, "grad/v"),
    ("flash_attention, block 2", "packed", {"scale": 0.378}, "grad/k"),
    ("mla", "compressed", {"scale": 7**-0.5}, "out/y"),
    ("mla", "compressed", {"layout": "halves"}, "out/cache"),
    ("mla", "cached", {"eps": 1e-6}, "grad/w_q_a"),
    ("mla", "cached", {"factor": 1.0}, "grad/cache"),
    ("mla_absorbed", "cached", {"key_mask": None}, "out/y"),
    ("router", "v3", {"masked_groups": "zero"}, "out/indices"),
    ("router", "v3", {"group_score": "max"}, "out/indices"),
    ("router", "v3", {"bias": None}, "out/indices"),
    ("router", "v3", {"groups": 1, "keep_groups": 1}, "out/indices"),
    ("router", "v3", {"normalise": False}, "grad/w"),
    ("router", "v3", {"score": "softmax"}, "out/scores"),
    ("router", "v3", {"scale": 1.0}, "out/weights"),
    ("router", "v2", {"group_score": "top2"}, "out/indices"),
    ("router", "epsilon", {"epsilon": 0.0}, "grad/x"),
    ("router", "bias_update", {"centre": True}, "out/bias"),
    ("router", "bias_update", {"mask": None}, "out/load"),
    ("balance_loss", "padded", {"mask": None}, "grad/scores"),
    ("balance_loss", "counted", {"counted": None}, "grad/scores"),
    ("cross_entropy", "normalised", {"normaliser": None}, "out/loss"),
    ("head_cross_entropy", "normalised", {"normaliser": 8.0}, "grad/h"),
    ("log_prob", "cool", {"temperature": 1.0}, "grad/w"),
    ("mtp", "embedding_hidden", {"order": "hidden_embedding"}, "grad/w_proj"),
    ("mtp", "hidden_embedding", {"eps": 1e-6}, "out/h"),
    ("mtp", "pairs_2_packed", {"segments": None}, "out/mask"),
]

WRONG_MODELS: list[tuple[str, dict[str, Any], str]] = [
    ("tiny", {"mtp_order": "hidden_embedding"}, "grad/model.layers.3.eh_proj.weight"),
    ("tiny", {"mtp_hidden": "raw"}, "out/mtp.2"),
    ("tiny", {"mtp_normaliser": "valid"}, "out/mtp.2"),
    ("tiny", {"mtp_normaliser": "main"}, "out/mtp.1"),
    ("tiny", {"mtp_zero_first_embedding": True}, "out/mtp.1"),
    ("tiny", {"masked_groups": "zero"}, "out/hidden"),
    ("tiny", {"balance_counts": "routed"}, "grad/model.layers.1.mlp.gate.weight"),
    ("tiny", {"rope_layout": "halves"}, "out/hidden"),
    ("tiny", {"gate_epsilon": 0.1}, "out/hidden"),
    ("tiny", {"latent_eps": "class_default"}, "out/hidden"),
    ("tiny", {"yarn": None}, "out/hidden"),
    ("tiny", {"mtp_weight": 0.1}, "out/loss"),
    ("tiny", {"balance_weight": 0.0}, "grad/model.layers.2.mlp.gate.weight"),
    ("tiny", {"routed_scale": 1.0}, "out/hidden"),
    ("packed", {"key_mask": None}, "out/hidden"),
    ("packed", {"segments": None}, "out/main"),
    ("v2", {"yarn_when": "always"}, "out/hidden"),
    ("v2", {"group_score": "top2"}, "out/indices.1"),
    ("conventions", {"mtp_hidden": "normed"}, "out/mtp.1"),
    ("conventions", {"mtp_order": "embedding_hidden"}, "out/mtp.1"),
    ("conventions", {"mtp_normaliser": "positions"}, "out/mtp.2"),
    ("conventions", {"balance_counts": "unbiased"}, "out/balance.1"),
    ("all_cotangents", {"masked_groups": "-inf"}, "out/hidden"),
    ("all_cotangents", {"mtp_normaliser": "positions"}, "out/mtp.1"),
]


def shows(way: str, name: str, case: Case, tensor: str) -> None:
    """AssertionError unless the mistake in ``case`` moves ``tensor`` far beyond the tolerance."""
    file, run = RUNS[way]
    found = error(run(case)[tensor], load(file)[name].golden[tensor])
    assert not found <= 1e6 * TOLERANCE, f"{way}, {name}: {tensor} hides the mistake, error {found:.2e}"


@pytest.mark.parametrize(("way", "name", "change", "tensor"), MISTAKES)
def test_mistake_shows(way: str, name: str, change: dict[str, Any], tensor: str) -> None:
    """The golden values tell each of these mistakes, made by forward and backward alike, from the truth."""
    shows(way, name, changed(load(RUNS[way][0])[name], change), tensor)


@pytest.mark.parametrize(("name", "change", "tensor"), WRONG_MODELS)
def test_wrong_model_shows(name: str, change: dict[str, Any], tensor: str) -> None:
    """The same for the model's conventions and constants."""
    case = load("model")[name]
    taken = {key: None for key in change if key in case.aux}
    shows("model", name, changed(case, taken) if taken else another_model(case, change), tensor)


def test_losing_a_head_shows() -> None:
    """A shared key's gradient that hears one query head alone."""
    case = load("attention")["shared_head"]
    q, k, v = case.order("q", "k", "v")
    o, saved = attention_forward(q, k, v, **case.settings)
    do = np.where(np.arange(o.shape[2])[:, None] == 0, case.cot["o"], 0)
    assert error(attention_backward(do, saved)[1], case.golden["grad/k"]) > 1e-3
