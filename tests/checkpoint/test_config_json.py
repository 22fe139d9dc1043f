"""config.json and our configuration: released files, round trips, one line for what is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from refimpl.checkpoint import load_config, read_config
from refimpl.checkpoint.config_json import ARCHITECTURES, config_dict
from refimpl.config import PRESETS, ModelConfig, Yarn, preset
from refimpl.count import count
from refimpl.errors import CouldNotRun

from checkpoint.examples import GLM_JSON, KIMI_JSON, TINY, V2_LITE_JSON, V3_JSON, written


def configs() -> Iterator[ModelConfig]:
    yield from PRESETS.values()
    yield replace(
        TINY, yarn=None, tied=True, shared_experts=0, normalise_weights=False, theta=12345.678
    )
    yield replace(preset("v2"), q_latent=None, yarn=TINY.yarn, dense_layers=60)
    yield replace(preset("v2"), groups=2, keep_groups=1)
    yield replace(TINY, conventions=replace(TINY.conventions, rope_layout="halves"), norm_eps=1 / 3)


@pytest.mark.parametrize("config", list(configs()), ids=range(len(list(configs()))))
@pytest.mark.parametrize("scales", [None, "float32", "ue8m0"])
def test_config_round_trip(config: ModelConfig, scales: str | None, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(config_dict(config, dtype="bfloat16", scales=scales))
    )
    assert read_config(tmp_path / "config.json") == config


@pytest.mark.parametrize(("content", "name"), [(V3_JSON, "v3"), (V2_LITE_JSON, "v2-lite")])
def test_config_json(content: dict[str, Any], name: str, tmp_path: Path) -> None:
    """The released files give the presets, and so the same tables."""
    config = load_config(str(written(tmp_path / "config.json", content)))
    assert config == preset(name)
    assert [table.title for table in count(config)] == [
        table.title for table in count(preset(name))
    ]


def test_config_json_as_transformers_writes_it(tmp_path: Path) -> None:
    """Fields that Hugging Face leaves out or renames; V2's groups; numbers that are null."""
    content = {
        key: value for key, value in V3_JSON.items() if key not in ("rope_theta", "rope_scaling")
    }
    for key in ("scoring_func", "topk_method", "norm_topk_prob", "moe_layer_freq"):
        del content[key]
    content |= {
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
        "aux_loss_alpha": None,
    }
    config = read_config(written(tmp_path / "a.json", content))
    assert config == replace(preset("v3"), theta=5e4, yarn=None)
    yarn = {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 4096}
    config = read_config(written(tmp_path / "b.json", V3_JSON | {"rope_scaling": yarn}))
    assert config.yarn == Yarn(4.0, 4096, 32.0, 1.0, mscale=1.0, mscale_all_dim=0.0)
    groups = {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3}
    config = read_config(written(tmp_path / "c.json", V2_LITE_JSON | groups))
    assert (config.groups, config.keep_groups, config.group_score, config.gate_bias) == (
        8,
        3,
        "max",
        False,
    )
    content = V3_JSON | {"n_shared_experts": None}
    config = read_config(written(tmp_path / "shared.json", content))
    assert config == replace(preset("v3"), shared_experts=0)
    content = {key: value for key, value in V2_LITE_JSON.items() if key != "topk_method"}
    assert read_config(written(tmp_path / "greedy.json", content)) == preset("v2-lite")
    config = read_config(
        written(tmp_path / "d.json", V2_LITE_JSON | {"n_group": None, "topk_group": None})
    )
    assert config == preset("v2-lite")


def test_model_types(tmp_path: Path) -> None:
    """Kimi-K2 and GLM-4.7-Flash as their files describe them; V3.2 is V3 up to index_topk
    tokens."""
    for content, name in ((KIMI_JSON, "kimi-k2"), (GLM_JSON, "glm-4.7-flash")):
        assert read_config(written(tmp_path / "config.json", content)) == preset(name)
    indexed = {"model_type": "deepseek_v32", "index_topk": 2048}
    config = read_config(written(tmp_path / "config.json", V3_JSON | indexed))
    assert config == replace(preset("v3"), index_topk=2048)
    assert (config.context, preset("v3").context) == (2048, 163840)
    with pytest.raises(CouldNotRun, match=r"config\.json can't express index_topk=2048"):
        config_dict(config, dtype="bfloat16")


def test_dense_layers(tmp_path: Path) -> None:
    """As transformers reads them: all layers, if there are more dense ones; else by their types."""

    def read(content: dict[str, Any]) -> int:
        return read_config(written(tmp_path / "config.json", content)).dense_layers

    assert read(V3_JSON | {"first_k_dense_replace": 62}) == 61
    bare = {key: value for key, value in GLM_JSON.items() if key != "first_k_dense_replace"}
    assert read(bare) == 1
    assert read(bare | {"mlp_layer_types": ["dense"] * 3 + ["sparse"] * 44}) == 3
    assert read(GLM_JSON | {"mlp_layer_types": ["dense"] + ["sparse"] * 46}) == 1


def test_nested(tmp_path: Path) -> None:
    """`count` takes the language model of one that also sees; its weights are not read."""
    path = written(tmp_path / "config.json", {"model_type": "kimi_k25", "text_config": KIMI_JSON})
    assert load_config(str(path)) == load_config(str(tmp_path)) == preset("kimi-k2")
    with pytest.raises(CouldNotRun, match="nests the model in text_config"):
        read_config(path)


KINDS = "one of " + ", ".join(ARCHITECTURES)

BAD: list[tuple[Any, str]] = [
    ("{", "is not JSON: "),
    ("", "is not JSON: "),
    ("[" * 100_000, "is not JSON: "),
    ("[]", "the file must be a JSON object, got []"),
    ({}, f"model_type must be {KINDS}, got nothing"),
    (V3_JSON | {"model_type": "llama"}, f'model_type must be {KINDS}, got "llama"'),
    (V3_JSON | {"model_type": ["deepseek_v3"]}, f'model_type must be {KINDS}, got ["deepseek_v3"]'),
    (
        {k: v for k, v in V3_JSON.items() if k != "hidden_size"},
        "hidden_size must be an integer in 1…",
    ),
    (
        {k: v for k, v in V3_JSON.items() if k != "q_lora_rank"},
        "q_lora_rank must be an integer in 1…",
    ),
    (
        V3_JSON | {"hidden_size": "7168"},
        'hidden_size must be an integer in 1…1,000,000,000, got "7168"',
    ),
    (V3_JSON | {"hidden_size": 0}, "hidden_size must be an integer in 1…1,000,000,000, got 0"),
    (
        V3_JSON | {"hidden_size": 7168.0},
        "hidden_size must be an integer in 1…1,000,000,000, got 7168.0",
    ),
    (
        V3_JSON | {"hidden_size": True},
        "hidden_size must be an integer in 1…1,000,000,000, got true",
    ),
    (
        V3_JSON | {"num_hidden_layers": 10**6},
        "num_hidden_layers must be an integer in 1…10,000, got 1000000",
    ),
    (
        V3_JSON | {"n_routed_experts": None},
        "n_routed_experts must be an integer in 1…1,000,000,000, got nothing",
    ),
    (
        V3_JSON | {"num_nextn_predict_layers": -1},
        "num_nextn_predict_layers must be an integer in 0…10,000, got -1",
    ),
    (
        V3_JSON | {"n_group": 7},
        "n_group must divide n_routed_experts=256 and topk_group lie in 1…n_group, got 7 and 4",
    ),
    (
        V3_JSON | {"num_experts_per_tok": 129},
        "num_experts_per_tok must be at most 128, n_routed_experts / n_group × topk_group, got 129",
    ),
    (V3_JSON | {"qk_rope_head_dim": 63}, "qk_rope_head_dim must be even, got 63"),
    (V3_JSON | {"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1, got 0.5"),
    (
        {k: v for k, v in V3_JSON.items() if k != "rope_scaling"}
        | {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "rope_scaling's partial_rotary_factor must be 1, got 0.5",
    ),
    (
        {"model_type": "kimi_k25", "text_config": V3_JSON | {"hidden_size": 0}},
        "text_config's hidden_size must be an integer in 1…1,000,000,000, got 0",
    ),
    (
        GLM_JSON | {"mlp_layer_types": ["sparse", "dense"] + ["sparse"] * 45},
        "mlp_layer_types must be a list of dense layers, then sparse ones",
    ),
    (
        GLM_JSON | {"mlp_layer_types": ["dense"] * 2},
        "num_hidden_layers must be 2, as long as mlp_layer_types, got 47",
    ),
    (
        GLM_JSON | {"mlp_layer_types": ["dense"] * 2 + ["sparse"] * 45},
        "first_k_dense_replace must be 2, as in mlp_layer_types, got 1",
    ),
    (GLM_JSON | {"model_type": "glm_moe_dsa"}, 'architectures must be ["GlmMoeDsaForCausalLM"]'),
    (
        V3_JSON | {"model_type": "deepseek_v32", "index_topk": 8, "rope_interleave": False},
        "rope_interleave must be true, got false",
    ),
    (V3_JSON | {"rope_theta": "big"}, 'rope_theta must be a number of at least 0, got "big"'),
    (
        V3_JSON | {"routed_scaling_factor": -0.5},
        "routed_scaling_factor must be a number of at least 0, got -0.5",
    ),
    (V3_JSON | {"rms_norm_eps": float("nan")}, "rms_norm_eps must be a finite number, got NaN"),
    (V3_JSON | {"rope_scaling": "yarn"}, 'rope_scaling must be an object or null, got "yarn"'),
    (
        V3_JSON | {"rope_scaling": {"type": "linear"}},
        'rope_scaling\'s type must be yarn, got "linear"',
    ),
    (
        V3_JSON | {"rope_scaling": {"type": "yarn", "factor": []}},
        "factor must be a number of at least 0, got []",
    ),
    (
        V3_JSON | {"rope_scaling": {"type": "yarn", "factor": 4}},
        "original_max_position_embeddings must be a number of at least 0, got nothing",
    ),
    (
        V3_JSON | {"rope_scaling": dict(V3_JSON["rope_scaling"]) | {"mscale": None}},
        "rope_scaling's mscale must be given with mscale_all_dim (DeepSeek's code takes 1 for "
        "it, transformers 0), ",
    ),
    *(
        (V3_JSON | {"rope_scaling": dict(V3_JSON["rope_scaling"]) | {key: value}}, f"{key} must ")
        for key, value in (
            ("factor", 5e-324),
            ("beta_fast", 0),
            ("beta_slow", 0),
            ("beta_slow", 5e-324),
            ("mscale", 1e299),
            ("mscale_all_dim", 1e299),
        )
    ),
    (V3_JSON | {"rope_theta": 1}, "theta must be above 1 with YaRN, got 1"),
    (
        V3_JSON | {"topk_method": "best"},
        "topk_method must be one of noaux_tc, group_limited_greedy, greedy, got ",
    ),
    (
        V3_JSON | {"topk_method": {}},
        "topk_method must be one of noaux_tc, group_limited_greedy, greedy, got {}",
    ),
    (
        V3_JSON | {"scoring_func": "softmax"},
        'scoring_func must be sigmoid in deepseek_v3, got "softmax"',
    ),
    (
        V3_JSON | {"scoring_func": ["tanh"]},
        'scoring_func must be sigmoid in deepseek_v3, got ["tanh"]',
    ),
    *(
        ({k: v for k, v in V3_JSON.items() if k != key}, f"{key} must be ")
        for key in ("routed_scaling_factor", "n_group", "topk_group")
    ),
    (
        V2_LITE_JSON | {"routed_scaling_factor": None},
        "routed_scaling_factor must be a number of at least 0, got nothi",
    ),
    (
        V2_LITE_JSON | {"topk_method": "group_limited_greedy", "n_group": None},
        "n_group must be an integer in 1…",
    ),
    (V3_JSON | {"norm_topk_prob": "false"}, 'norm_topk_prob must be true or false, got "false"'),
    (V3_JSON | {"rope_theta": 0}, "rope_theta must be a number of at least 1, got 0"),
    (
        V3_JSON | {"rope_scaling": dict(V3_JSON["rope_scaling"]) | {"factor": 0.5}},  # type: ignore[call-overload]
        "rope_scaling's factor must be a number of at least 1, got 0.5",
    ),
    (V3_JSON | {"attention_bias": True}, "attention_bias must be false, got true"),
    (V3_JSON | {"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false, got 1"),
    (V3_JSON | {"moe_layer_freq": 2}, "moe_layer_freq must be 1, got 2"),
]


@pytest.mark.parametrize(("content", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_config_json(content: Any, message: str, tmp_path: Path) -> None:
    """One line that names the file, the field, what was wanted and what came."""
    path = written(tmp_path / "config.json", content)
    with pytest.raises(CouldNotRun) as raised:
        load_config(str(path))
    assert str(raised.value).startswith(str(path))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_not_text(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(CouldNotRun, match="is not JSON"):
        read_config(path)
