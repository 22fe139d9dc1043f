"""Every op and the model against golden values, made by torch's autograd from formulas of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import refimpl.ops
from refimpl.model import forward
from refimpl.ops import Yarn, attention_backward, attention_forward, rope_frequencies, yarn_softmax_factor

from golden_values import GOLDEN, RUNS, TOLERANCE, Case, check, configuration, error, load


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
    ours, golden = RUNS["rope"][1](case)["out/inv_freq"], case.golden["out/inv_freq"]
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
