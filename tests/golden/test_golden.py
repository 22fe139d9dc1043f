"""Every op and the model against golden values, made by torch's autograd from formulas of their
own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refimpl.model import forward
from refimpl.ops import (
    GRPO_PRESETS,
    Yarn,
    attention_backward,
    attention_forward,
    rope_frequencies,
    yarn_softmax_factor,
)

from golden.values import GOLDEN, RUNS, TOLERANCE, Case, check, configuration, error, load
from support import STEMS


@pytest.mark.parametrize(
    ("way", "name"), [(way, name) for way, (file, _) in RUNS.items() for name in load(file)]
)
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
    """A stem of refimpl/ops without golden values fails here, and so does a file that no test
    reads or no script writes."""
    assert set(STEMS) <= set(RUNS), f"without golden values: {set(STEMS) - set(RUNS)}"
    files = {path.stem.removeprefix("golden-") for path in GOLDEN.glob("golden-*.safetensors")}
    assert {file for file, _ in RUNS.values()} == files
    here = Path(__file__).parent
    script = (here / "make_golden.py").read_text()
    for file in files:
        assert (here / f"{file}.py").exists()
        assert f'    "{file}",\n' in script


@pytest.mark.parametrize("file", sorted({file for file, _ in RUNS.values()}))
def test_every_output_has_a_gradient(file: str) -> None:
    """A case with cotangents has a gradient, of its shape, for every differentiable input; no
    cotangent is constant."""
    for name, case in load(file).items():
        assert bool(case.cot) == bool(case.inputs), f"{file}, {name}"
        for key, array in case.inputs.items():
            assert case.golden[f"grad/{key}"].shape == array.shape, f"{file}, {name}, {key}"
        for key, array in case.cot.items():
            assert array.size == 1 or np.ptp(array) > 0, f"{file}, {name}, {key}"


def test_numbers_of_v3() -> None:
    """V3's YaRN: full speed up to pair 10, a fortieth from pair 23 on; the two published softmax
    corrections."""
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
    """Each rotation frequency to its own size: the slowest are too small for the largest one's
    tolerance."""
    case = load("rope")[name]
    ours, golden = RUNS["rope"][1](case)["out/inv_freq"], case.golden["out/inv_freq"]
    assert np.max(np.abs(ours / golden - 1)) <= 1e-14


@pytest.mark.parametrize("golden", [np.array([1.0, 4.0]), np.zeros(2)])
@pytest.mark.parametrize(
    "ours", [[1, np.nan], [1, np.inf], [1, 4 + 1e-12], [0.0, 4.0, 0.0], [[1.0, 4.0]], [1, 3]]
)
def test_comparison_fails(ours: Any, golden: np.ndarray) -> None:
    """NaN, another shape, another type and small errors do not pass."""
    assert not error(np.array(ours), golden) <= TOLERANCE


def changed(case: Case, change: dict[str, Any]) -> Case:
    """A case with other settings, or (for names of auxiliaries) other auxiliaries; None takes one
    away."""
    aux = case.aux | {key: value for key, value in change.items() if key in case.aux}
    settings = case.settings | {key: value for key, value in change.items() if key not in case.aux}
    return case._replace(
        settings=settings, aux={key: value for key, value in aux.items() if value is not None}
    )


def another_model(case: Case, change: dict[str, Any]) -> Case:
    """A model case with other conventions or config fields."""
    config = case.settings["config"]
    conventions = {key: value for key, value in change.items() if key in config["conventions"]}
    fields = {key: value for key, value in change.items() if key not in conventions}
    return changed(
        case, {"config": config | fields | {"conventions": config["conventions"] | conventions}}
    )


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
    ("router", "softmax_logits", {"ranking": "scores"}, "out/indices"),
    ("router", "epsilon", {"epsilon": 0.0}, "grad/x"),
    ("router", "bias_update", {"centre": True}, "out/bias"),
    ("router", "bias_update", {"mask": None}, "out/load"),
    ("balance_loss", "padded", {"mask": None}, "grad/scores"),
    ("balance_loss", "counted", {"counted": None}, "grad/scores"),
    ("cross_entropy", "normalised", {"normaliser": None}, "out/loss"),
    ("head_cross_entropy", "normalised", {"normaliser": 8.0}, "grad/h"),
    ("log_prob", "cool", {"temperature": 1.0}, "grad/w"),
    ("grpo", "deepseekmath", {"average": "token"}, "out/loss"),
    ("grpo", "deepseekmath", {"kl_weight": -0.04}, "grad/log_prob"),
    ("grpo", "deepseekmath", {"kl": "k2"}, "grad/log_prob"),
    ("grpo", "deepseekmath", {"old_log_prob": None}, "out/unclipped"),
    ("grpo", "deepseekmath", {"kl_level": "sequence"}, "grad/log_prob"),
    ("grpo", "r1_print", {"ratio": "sequence_mean"}, "out/loss"),
    ("grpo", "r1_print", {"ratio": "token"}, "grad/log_prob"),
    ("grpo", "r1_print", {"kl_level": "token"}, "out/loss"),
    ("grpo", "r1_clip", {"clip": (0.2, 0.2)}, "out/unclipped"),
    ("grpo", "dapo", {"clip": (0.28, 0.2)}, "out/loss"),
    ("grpo", "dapo", {"clip": (0.2, 0.2)}, "out/loss"),
    ("grpo", "dapo", {"average": "sequence"}, "grad/log_prob"),
    ("grpo", "dapo", {"preset": "deepseekmath", "kl_weight": 0.0}, "out/loss"),
    ("grpo", "dr_grpo", {"length": 3}, "grad/log_prob"),
    ("grpo", "dr_grpo", {"average": "sequence"}, "out/loss"),
    ("grpo", "gspo", {"ratio": "sequence"}, "grad/log_prob"),
    ("grpo", "gspo", {"clip": (4e-4, 3e-4)}, "out/loss"),
    ("grpo", "v3.2", {"off_policy": None}, "out/kept"),
    ("grpo", "v3.2", {"off_policy": None}, "grad/log_prob"),
    ("grpo", "v3.2", {"off_policy": 0.1}, "grad/log_prob"),
    ("grpo", "v3.2", {"kl": "k3"}, "grad/log_prob"),
    ("grpo", "trl_on_policy", {"kl": "k3"}, "grad/log_prob"),
    ("grpo", "trl_delta", {"dual_clip": None}, "out/loss"),
    ("grpo", "trl_unbiased", {"ratio": "token"}, "grad/log_prob"),
    ("grpo", "verl_token_mean", {"dual_clip": None}, "grad/log_prob"),
    ("grpo", "verl_token_mean", {"kl": "k1"}, "out/loss"),
    ("grpo", "verl_token_sum", {"dual_clip": 3.0}, "out/unclipped"),
    ("grpo", "verl_token_sum", {"empty": "counted"}, "out/loss"),
    ("grpo", "verl_in_range", {"empty": "counted"}, "grad/log_prob"),
    ("grpo", "k1_sequence", {"kl_level": "token"}, "grad/log_prob"),
    ("grpo", "sequence_dual_clip", {"off_policy": None}, "out/loss"),
    ("grpo", "on_both_bounds", {"clip": (0.2, 0.2)}, "grad/log_prob"),
    ("grpo", "advantages_ddof_0", {"ddof": 1}, "out/advantages"),
    ("grpo", "advantages_trl", {"ddof": 0}, "out/advantages"),
    ("grpo", "advantages_trl", {"epsilon": 1e-6}, "out/advantages"),
    ("grpo", "advantages_centred", {"scale": True}, "out/advantages"),
    ("grpo", "advantages_alone_1", {"alone": 0.0}, "out/advantages"),
    ("grpo", "advantages_alone_verl", {"alone": 1.0}, "out/advantages"),
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
    ("vllm_megatron", {"mtp_hidden": "normed"}, "out/mtp.2"),
    ("vllm_megatron", {"mtp_hidden": "raw"}, "out/mtp.1"),
    ("vllm_megatron", {"softmax_ranking": "scores"}, "out/indices.0"),
    ("all_cotangents", {"mtp_normaliser": "positions"}, "out/mtp.1"),
]


def shows(way: str, name: str, case: Case, tensor: str) -> None:
    """AssertionError unless the mistake in ``case`` moves ``tensor`` far beyond the tolerance."""
    file, run = RUNS[way]
    found = error(run(case)[tensor], load(file)[name].golden[tensor])
    assert not found <= 1e6 * TOLERANCE, (
        f"{way}, {name}: {tensor} hides the mistake, error {found:.2e}"
    )


@pytest.mark.parametrize(("way", "name", "change", "tensor"), MISTAKES)
def test_mistake_shows(way: str, name: str, change: dict[str, Any], tensor: str) -> None:
    """The golden values tell each of these mistakes, made by forward and backward alike, from the
    truth."""
    shows(way, name, changed(load(RUNS[way][0])[name], change), tensor)


@pytest.mark.parametrize(("name", "change", "tensor"), WRONG_MODELS)
def test_wrong_model_shows(name: str, change: dict[str, Any], tensor: str) -> None:
    """The same for the model's conventions and constants."""
    case = load("model")[name]
    taken = {key: None for key in change if key in case.aux}
    shows("model", name, changed(case, taken) if taken else another_model(case, change), tensor)


@pytest.mark.parametrize(
    "name", [name for name, case in load("grpo").items() if not np.all(case.aux.get("mask", True))]
)
def test_counting_padding_shows(name: str) -> None:
    """GRPO with the mask ignored, in the loss or its gradient (without advantages and divergence
    nothing can show)."""
    case = load("grpo")[name]
    with np.errstate(all="ignore"):
        results = RUNS["grpo"][1](changed(case, {"mask": np.ones_like(case.aux["mask"])}))
    found = [
        error(results[tensor], case.golden[tensor]) for tensor in ("out/loss", "grad/log_prob")
    ]
    assert name == "constant_reward_no_kl" or any(not x <= 1e6 * TOLERANCE for x in found)


@pytest.mark.parametrize("name", ["normal", "one_pair", "width_one", "saturated"])
def test_preferring_the_worse_shows(name: str) -> None:
    """The preference loss with its two answers exchanged."""
    case = load("preference_loss")[name]
    exchanged = {"h_chosen": case.inputs["h_rejected"], "h_rejected": case.inputs["h_chosen"]}
    shows("preference_loss", name, case._replace(inputs=case.inputs | exchanged), "out/loss")


def test_every_grpo_preset_is_covered() -> None:
    """Each named preset has golden values under its own name."""
    assert {case.settings.get("preset") for case in load("grpo").values()} - {None} == set(
        GRPO_PRESETS
    )


def test_grpo_regimes() -> None:
    """The branches that the cases reach: for both signs of the advantage, tokens with and without a
    gradient."""
    for name in GRPO_PRESETS:
        case = load("grpo")[name]
        unclipped = case.golden["out/unclipped"]
        mask = case.aux["mask"]
        a = case.aux["advantages"][:, None]
        for sign in (a > 0, a < 0):
            assert np.any(mask & sign & unclipped), name
            assert np.any(mask & sign & ~unclipped), name
        assert not np.any(case.golden["grad/log_prob"][~mask]), name
        assert np.max(np.abs(case.inputs["log_prob"][~mask])) > 70, name
        assert np.any(np.sum(mask, axis=1) == 0), name
    assert not np.all(load("grpo")["v3.2"].golden["out/kept"])
    for name in ("on_both_bounds", "on_lower_bound", "on_upper_bound"):
        case = load("grpo")[name]
        on = case.inputs["log_prob"] == case.aux["old_log_prob"]
        assert np.any(on), name
        assert np.all(case.golden["out/unclipped"][on]), name


def test_losing_a_head_shows() -> None:
    """A shared key's gradient that hears one query head alone."""
    case = load("attention")["shared_head"]
    q, k, v = case.order("q", "k", "v")
    o, saved = attention_forward(q, k, v, **case.settings)
    do = np.where(np.arange(o.shape[2])[:, None] == 0, case.cot["o"], 0)
    assert error(attention_backward(do, saved)[1], case.golden["grad/k"]) > 1e-3
