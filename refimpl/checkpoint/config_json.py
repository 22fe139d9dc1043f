"""A model's config.json, as Hugging Face writes it, and our `ModelConfig`, both ways."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any

from ..config import PRESETS, Conventions, ModelConfig, Yarn
from ..errors import CouldNotRun
from ..files import read_json

__all__ = ["config_dict", "load_config", "read_block_size", "read_config", "read_object"]

INTEGERS = {
    "vocabulary": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "dense_layers": "first_k_dense_replace",
    "heads": "num_attention_heads",
    "q_latent": "q_lora_rank",
    "kv_latent": "kv_lora_rank",
    "nope": "qk_nope_head_dim",
    "rope": "qk_rope_head_dim",
    "value": "v_head_dim",
    "dense_hidden": "intermediate_size",
    "expert_hidden": "moe_intermediate_size",
    "experts": "n_routed_experts",
    "shared_experts": "n_shared_experts",
    "top_k": "num_experts_per_tok",
}
GROUPS = {
    "groups": "n_group",
    "keep_groups": "topk_group",
}  # models differ: no default is right for all
SCALE = {"routed_scale": "routed_scaling_factor"}  # here, too
OPTIONAL_INTEGERS = {
    "mtp_depth": "num_nextn_predict_layers",
    "max_positions": "max_position_embeddings",
}
OPTIONAL_FLOATS = {"norm_eps": "rms_norm_eps", "balance_weight": "aux_loss_alpha"}
YARN = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}  # HF's defaults
SELECTION = {
    "noaux_tc": ("top2", True),
    "group_limited_greedy": ("max", False),
    "greedy": ("max", False),
}
ONLY = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "moe_layer_freq": 1}
ARCHITECTURES = {"deepseek_v2": "DeepseekV2ForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM"}
BLOCK = (128, 128)  # of FP8 weights, where the file does not say


def load_config(model: str) -> ModelConfig:
    """The preset called ``model``, or the Hugging Face config.json at that path."""
    if model not in PRESETS and not Path(model).exists():
        raise CouldNotRun(f"{model} is no preset ({', '.join(PRESETS)}) and no file")
    return PRESETS[model] if model in PRESETS else read_config(Path(model))


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds; CouldNotRun if it holds anything else, or a number that is
    not finite."""
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise CouldNotRun(f"{path}: the file must be a JSON object, got {_shown(raw)}")
    for where, value in _infinite("", raw):
        raise CouldNotRun(f"{path}: {where} must be a finite number, got {_shown(value)}")
    return raw


def read_config(path: Path) -> ModelConfig:
    """A Hugging Face config.json of ``deepseek_v2`` or ``deepseek_v3``; CouldNotRun names the field
    that is wrong.

    The conventions are the default ones, but for ``rope_layout``: halves if the file says
    rope_interleave = false. λ of MTP is in no config.json: ``mtp_weight`` is the default.
    """
    raw = read_object(path)

    def expect(holds: bool, key: str, wanted: str, value: Any) -> None:
        if not holds:
            raise CouldNotRun(f"{path}: {key} must be {wanted}, got {_shown(value)}")

    def integer(key: str) -> int | None:
        least = int(
            key not in ("first_k_dense_replace", "n_shared_experts", "num_nextn_predict_layers")
        )
        value, most = raw.get(key), 10_000 if key.endswith("layers") else 10**9
        expect(
            type(value) is int and least <= value <= most,
            key,
            f"an integer in {least}…{most:,}",
            value,
        )
        return value

    def number(source: dict[str, Any], key: str, default: float | None) -> float:
        value: Any = default if source.get(key) is None else source[key]
        key = key if source is raw else f"rope_scaling's {key}"
        expect(
            type(value) in (int, float) and 0 <= value < 1e300, key, "a number of at least 0", value
        )
        return float(value)

    def flag(key: str, default: bool) -> bool:
        value = raw.get(key, default)
        expect(type(value) is bool, key, "true or false", value)
        return bool(value)

    kind = raw.get("model_type")
    expect(
        isinstance(kind, str) and kind in ARCHITECTURES,
        "model_type",
        "deepseek_v2 or deepseek_v3",
        kind,
    )
    assert isinstance(kind, str)
    wanted = [ARCHITECTURES[kind]]
    expect(
        raw.get("architectures") in (None, wanted),
        "architectures",
        json.dumps(wanted),
        raw.get("architectures"),
    )
    for key, only in (ONLY | {"num_key_value_heads": raw.get("num_attention_heads")}).items():
        expect(raw.get(key) is None or raw[key] == only, key, json.dumps(only), raw.get(key))
    raw = raw | ({"n_shared_experts": 0} if raw.get("n_shared_experts", 0) is None else {})
    fields: dict[str, Any] = {
        ours: None if (ours, raw.get(key, 0)) == ("q_latent", None) else integer(key)
        for ours, key in INTEGERS.items()
    }
    method = raw.get("topk_method", "noaux_tc" if kind == "deepseek_v3" else "greedy")
    expect(
        isinstance(method, str) and method in SELECTION,
        "topk_method",
        "one of " + ", ".join(SELECTION),
        method,
    )
    fields["group_score"], fields["gate_bias"] = SELECTION[method]
    fields |= {ours: integer(key) for ours, key in GROUPS.items() if method != "greedy"}
    fields |= {
        ours: integer(key) for ours, key in OPTIONAL_INTEGERS.items() if raw.get(key) is not None
    }
    fields |= {ours: number(raw, key, None) for ours, key in SCALE.items()}
    fields |= {
        ours: number(raw, key, None)
        for ours, key in OPTIONAL_FLOATS.items()
        if raw.get(key) is not None
    }
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    expect(isinstance(rope, dict), "rope_scaling", "an object or null", rope)
    fields["theta"] = number(rope if "rope_theta" in rope else raw, "rope_theta", 1e4)
    expect(fields["theta"] >= 1, "rope_theta", "a number of at least 1", fields["theta"])
    if "rope_theta" in raw:
        same = raw["rope_theta"] == fields["theta"]
        expect(
            same or "rope_theta" not in rope,
            "rope_theta",
            "that of rope_parameters",
            raw["rope_theta"],
        )
        number(raw, "rope_theta", 1e4)
    turned = rope.get("rope_type", rope.get("type", "default"))
    expect(turned in ("default", "yarn"), "rope_scaling's type", "yarn", turned)
    expect(
        rope.get("type", turned) == turned,
        "rope_scaling's type",
        f"its rope_type, {turned}",
        rope.get("type"),
    )
    if turned == "yarn":
        for key, only in {
            "attention_factor": None,
            "truncate": True,
            "partial_rotary_factor": 1,
        }.items():
            expect(
                rope.get(key) in (None, only), f"rope_scaling's {key}", _shown(only), rope.get(key)
            )
        factor = number(rope, "factor", None)
        expect(factor >= 1, "rope_scaling's factor", "a number of at least 1", factor)
        original = number(
            rope, "original_max_position_embeddings", None
        )  # DeepSeek's code has 4096, transformers not
        expect(
            original >= 1,
            "rope_scaling's original_max_position_embeddings",
            "a number of at least 1",
            original,
        )
        alone = bool(rope.get("mscale_all_dim")) and rope.get("mscale") is None
        told = "given with mscale_all_dim (DeepSeek's code takes 1 for it, transformers 0)"
        expect(not alone, "rope_scaling's mscale", told, None)
        settings = {key: number(rope, key, default) for key, default in YARN.items()}
        fields["yarn"] = Yarn(factor, int(original), **settings)
    fields["gate"] = "sigmoid" if kind == "deepseek_v3" else "softmax"
    scores = raw.get("scoring_func", fields["gate"])
    expect(scores == fields["gate"], "scoring_func", f"{fields['gate']} in {kind}", scores)
    fields["tied"] = flag("tie_word_embeddings", False)
    fields["normalise_weights"] = flag("norm_topk_prob", kind == "deepseek_v3")
    fields["conventions"] = Conventions(
        rope_layout="interleaved" if flag("rope_interleave", True) else "halves"
    )
    try:
        return ModelConfig(**fields)
    except ValueError as error:
        raise CouldNotRun(f"{path}: {error}") from error


def read_block_size(path: Path) -> tuple[int, int]:
    """The block of FP8 weights that has one scale, (rows, columns); CouldNotRun for another
    quantisation."""
    quantisation = read_object(path).get("quantization_config")
    if quantisation is None:
        return BLOCK
    if not isinstance(quantisation, dict):
        raise CouldNotRun(
            f"{path}: quantization_config must be an object or null, got {_shown(quantisation)}"
        )
    for key, wanted in {"quant_method": "fp8", "fmt": "e4m3"}.items():
        if quantisation.get(key, wanted) != wanted:
            raise CouldNotRun(
                f"{path}: quantization_config's {key} must be {wanted}, got "
                f"{_shown(quantisation[key])}"
            )
    block = quantisation.get("weight_block_size", list(BLOCK))
    if not (
        isinstance(block, list)
        and len(block) == 2
        and all(type(n) is int and n >= 1 for n in block)
    ):
        raise CouldNotRun(
            f"{path}: weight_block_size must be two integers of at least 1, got {_shown(block)}"
        )
    return block[0], block[1]


def config_dict(config: ModelConfig, *, dtype: str, scales: str | None = None) -> dict[str, Any]:
    """What `read_config` reads back as ``config``, and transformers 4 and 5 read as the same model.

    ``dtype`` is the name of the type of the tensors that are not quantised; ``scales``, "float32"
    or "ue8m0", says that the others are FP8. CouldNotRun if no config.json can say what the config
    says. λ of MTP and the conventions, except for the layout of the rotated pairs, are lost.
    """
    kind = "deepseek_v3" if config.gate == "sigmoid" else "deepseek_v2"
    if (config.group_score, config.gate_bias) != (
        ("top2", True) if kind == "deepseek_v3" else ("max", False)
    ):
        raise CouldNotRun(
            f"no config.json stands for gate={config.gate!r}, "
            f"group_score={config.group_score!r}, gate_bias={config.gate_bias}: deepseek_v3 is "
            "sigmoid, top2, True and deepseek_v2 softmax, max, False"
        )
    method = (
        "noaux_tc"
        if kind == "deepseek_v3"
        else "group_limited_greedy"
        if config.groups > 1
        else "greedy"
    )
    content: dict[str, Any] = {"architectures": [ARCHITECTURES[kind]], "model_type": kind}
    content |= {
        key: getattr(config, ours) for ours, key in (INTEGERS | GROUPS | OPTIONAL_INTEGERS).items()
    }
    content |= {
        key: float(getattr(config, ours)) for ours, key in (SCALE | OPTIONAL_FLOATS).items()
    }
    content |= ONLY | {
        "num_key_value_heads": config.heads,
        "topk_method": method,
        "scoring_func": config.gate,
        "norm_topk_prob": config.normalise_weights,
        "tie_word_embeddings": config.tied,
        "rope_theta": float(config.theta),
        "rope_scaling": None,
        "rope_interleave": config.conventions.rope_layout == "interleaved",
        "torch_dtype": dtype,
    }
    if config.yarn is not None:  # older transformers read type, newer ones rope_type
        settings = config.yarn._asdict()
        original = settings.pop("original")
        kinds = {"type": "yarn", "rope_type": "yarn", "original_max_position_embeddings": original}
        content["rope_scaling"] = kinds | settings
    if scales is not None:
        quantisation = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
        content["quantization_config"] = quantisation | {"weight_block_size": list(BLOCK)}
        if scales == "ue8m0":
            content["quantization_config"]["scale_fmt"] = "ue8m0"
    return content


def with_layout(conventions: Conventions, file: Conventions) -> Conventions:
    """The conventions, with the layout of the rotated pairs that the file has."""
    return (
        replace(conventions, rope_layout="halves") if file.rope_layout == "halves" else conventions
    )


def _shown(value: Any) -> str:
    return "nothing" if value is None else json.dumps(value, ensure_ascii=True)[:40]


def _infinite(where: str, value: Any) -> Iterator[tuple[str, float]]:
    """Every number in a JSON value that is not finite, with its place."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _infinite(f"{where}.{key}".lstrip("."), inner)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _infinite(f"{where}[{index}]", inner)
    elif isinstance(value, float) and not isfinite(value):
        yield where, value
