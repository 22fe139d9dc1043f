"""A model's config.json, as Hugging Face writes it, and our `ModelConfig`."""

from __future__ import annotations

import json
from math import isfinite
from pathlib import Path
from typing import Any

from ..config import PRESETS, ModelConfig, Yarn
from ..errors import CouldNotRun

__all__ = ["load_config", "read_config"]

INTEGERS = {
    "vocabulary": "vocab_size", "width": "hidden_size", "layers": "num_hidden_layers",
    "dense_layers": "first_k_dense_replace", "heads": "num_attention_heads", "q_latent": "q_lora_rank",
    "kv_latent": "kv_lora_rank", "nope": "qk_nope_head_dim", "rope": "qk_rope_head_dim", "value": "v_head_dim",
    "dense_hidden": "intermediate_size", "expert_hidden": "moe_intermediate_size", "experts": "n_routed_experts",
    "shared_experts": "n_shared_experts", "top_k": "num_experts_per_tok",
}  # fmt: skip
OPTIONAL_INTEGERS = {
    "groups": "n_group", "keep_groups": "topk_group", "mtp_depth": "num_nextn_predict_layers",
    "max_positions": "max_position_embeddings",
}  # fmt: skip
FLOATS = {"routed_scale": "routed_scaling_factor", "norm_eps": "rms_norm_eps", "balance_weight": "aux_loss_alpha"}
YARN = {"factor": 40.0, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}  # HF's defaults
SELECTION = {"noaux_tc": ("top2", True), "group_limited_greedy": ("max", False), "greedy": ("max", False)}
ONLY = {"attention_bias": False, "hidden_act": "silu", "moe_layer_freq": 1}


def load_config(model: str) -> ModelConfig:
    """The preset called ``model``, or the Hugging Face config.json at that path."""
    if model not in PRESETS and not Path(model).exists():
        raise CouldNotRun(f"{model} is no preset ({', '.join(PRESETS)}) and no file")
    return PRESETS[model] if model in PRESETS else read_config(Path(model))


def read_config(path: Path) -> ModelConfig:
    """A Hugging Face config.json of ``deepseek_v2`` or ``deepseek_v3``; CouldNotRun names the field that is wrong."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CouldNotRun(f"{path} can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CouldNotRun(f"{path} is not JSON: {error}") from error

    def expect(holds: bool, key: str, wanted: str, value: Any) -> None:
        if not holds:
            shown = "nothing" if value is None else json.dumps(value)[:40]
            raise CouldNotRun(f"{path}: {key} must be {wanted}, got {shown}")

    def integer(key: str) -> int | None:
        least = int(key not in ("first_k_dense_replace", "n_shared_experts", "num_nextn_predict_layers"))
        value, most = raw.get(key), 10_000 if key.endswith("layers") else 10**9
        expect(type(value) is int and least <= value <= most, key, f"an integer in {least}…{most:,}", value)
        return value  # type: ignore[no-any-return]

    def number(source: dict[str, Any], key: str, default: float) -> float:
        value = default if source.get(key) is None else source[key]
        expect(type(value) in (int, float) and isfinite(value) and value >= 0, key, "a number of at least 0", value)
        return float(value)

    expect(isinstance(raw, dict), "the file", "a JSON object", raw)
    kind = raw.get("model_type")
    expect(kind in ("deepseek_v2", "deepseek_v3"), "model_type", "deepseek_v2 or deepseek_v3", kind)
    for key, wanted in ONLY.items():
        expect(raw.get(key, wanted) == wanted, key, json.dumps(wanted), raw.get(key))
    fields: dict[str, Any] = {
        ours: None if (ours, raw.get(key, 0)) == ("q_latent", None) else integer(key) for ours, key in INTEGERS.items()
    }
    fields |= {ours: integer(key) for ours, key in OPTIONAL_INTEGERS.items() if raw.get(key) is not None}
    fields |= {ours: number(raw, key, getattr(PRESETS["v3"], ours)) for ours, key in FLOATS.items() if key in raw}
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    expect(isinstance(rope, dict), "rope_scaling", "an object or null", rope)
    fields["theta"] = number(raw if "rope_theta" in raw else rope, "rope_theta", 1e4)
    turned = rope.get("type", rope.get("rope_type", "default"))
    expect(turned in ("default", "yarn"), "rope_scaling's type", "yarn", turned)
    if turned == "yarn":
        original = number(rope, "original_max_position_embeddings", 4096)
        fields["yarn"] = Yarn(original=int(original), **{key: number(rope, key, n) for key, n in YARN.items()})
    method = raw.get("topk_method", "noaux_tc" if kind == "deepseek_v3" else "greedy")
    expect(isinstance(method, str) and method in SELECTION, "topk_method", "one of " + ", ".join(SELECTION), method)
    fields["group_score"], fields["gate_bias"] = SELECTION[method]
    fields |= {"groups": 1, "keep_groups": 1} if method == "greedy" else {}
    fields["gate"] = raw.get("scoring_func", "sigmoid" if kind == "deepseek_v3" else "softmax")
    fields["tied"] = raw.get("tie_word_embeddings", False)
    expect(type(fields["tied"]) is bool, "tie_word_embeddings", "true or false", fields["tied"])
    fields["normalise_weights"] = bool(raw.get("norm_topk_prob", kind == "deepseek_v3"))
    try:
        return ModelConfig(**fields)
    except ValueError as error:
        raise CouldNotRun(f"{path}: {error}") from error
