"""Names, shapes and initial values of the parameters, and what does not fit them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from refimpl.config import preset
from refimpl.parameters import (
    attention_names,
    check_parameters,
    experts_names,
    head_name,
    init_parameters,
    is_buffer,
    layer_name,
    misfits,
    moe_layers,
    mtp_layer,
    mtp_layers,
    parameter_shapes,
)

TINY = preset("tiny")


def test_init() -> None:
    params = init_parameters(TINY, seed=3)
    assert {n: p.shape for n, p in params.items()} == parameter_shapes(TINY)
    assert {p.dtype for p in params.values()} == {np.dtype(np.float32)}
    assert np.all(params["model.norm.weight"] == 1)
    assert not np.any(params["model.layers.1.mlp.gate.e_score_correction_bias"])
    assert abs(np.std(params["model.layers.1.mlp.experts.gate_proj.weight"]) / 0.006 - 1) < 0.1
    assert np.array_equal(params["lm_head.weight"], init_parameters(TINY, seed=3)["lm_head.weight"])
    assert init_parameters(TINY, dtype=np.float64)["model.norm.weight"].dtype == np.float64


@pytest.mark.parametrize("name", ["tiny", "v3", "v2", "v2-lite", "moonlight-16b"])
def test_lists_of_names_are_parameters(name: str) -> None:
    """Whoever asks for a sublayer's names gets names that the model has; None is what it lacks."""
    config = preset(name)
    shapes = parameter_shapes(config)
    assert list(mtp_layers(config)) == [
        mtp_layer(config, depth) for depth in range(1, config.mtp_depth + 1)
    ]
    for layer in range(config.layers + config.mtp_depth):
        for part in attention_names(config):
            assert part is None or layer_name(layer, part) in shapes
    for layer in [*moe_layers(config), *mtp_layers(config)]:
        for part in experts_names(config):
            assert part is None or layer_name(layer, part) in shapes
    assert head_name(config) in shapes
    assert head_name(replace(config, tied=True)) == "model.embed_tokens.weight"


def test_buffers_are_the_gate_biases() -> None:
    buffers = [name for name in parameter_shapes(TINY) if is_buffer(name)]
    layers = {*moe_layers(TINY), *mtp_layers(TINY)}
    assert buffers == [
        f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in sorted(layers)
    ]


def test_misfits_in_order() -> None:
    params = init_parameters(TINY)
    assert misfits(params, TINY) == []
    del params["lm_head.weight"]
    params |= {"model.norm.weight": np.ones(3), "extra": np.ones(1)}
    assert misfits(params, TINY) == [
        "lm_head.weight is missing",
        "model.norm.weight must have shape (20,), got (3,)",
        "extra is not a parameter of this config",
    ]


def test_one_error_names_a_dozen() -> None:
    with pytest.raises(ValueError, match="params do not fit the config: ") as raised:
        check_parameters({}, TINY)
    named = str(raised.value).removeprefix("params do not fit the config: ").split("; ")
    assert named[:12] == misfits({}, TINY)[:12]
    assert named[12:] == [f"and {len(parameter_shapes(TINY)) - 12} more"]


def test_types_are_the_embedding_s() -> None:
    """But for the gate biases, which may stay in float32."""
    params = init_parameters(TINY, dtype=np.float64)
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    check_parameters(params | {bias: params[bias].astype(np.float32)}, TINY)
    single = params | {"model.norm.weight": np.ones(20, np.float32)}
    with pytest.raises(
        ValueError,
        match=r"model.norm.weight must be float64 like model.embed_tokens.weight, got float32",
    ):
        check_parameters(single, TINY)
