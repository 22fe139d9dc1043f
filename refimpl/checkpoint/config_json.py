"""A model's config.json, as Hugging Face writes it, and our `ModelConfig`, both ways."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any

from ..config import PRESETS, Conventions, ModelConfig, Yarn
from ..errors import CouldNotRun
from ..files import read_json

__all__ = [
    "config_dict",
    "load_config",
    "read_block_size",
    "read_config",
    "read_object",
    "stop_tokens",
]

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
ROTATED = "partial_rotary_factor"  # how much of the rotated key is rotated: all
ARCHITECTURES = {  # by model_type; all but deepseek_v2 are V3's model
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "kimi_k2": "DeepseekV3ForCausalLM",
    "glm4_moe_lite": "Glm4MoeLiteForCausalLM",
    "deepseek_v32": "DeepseekV32ForCausalLM",
    "glm_moe_dsa": "GlmMoeDsaForCausalLM",
}
INDEXED = ("deepseek_v32", "glm_moe_dsa")  # with an indexer that chooses index_topk keys
NESTED = "text_config"  # where a model that also sees has its language model
OURS = {  # the file's key for a field of ours, in the messages of `ModelConfig`
    **INTEGERS,
    **GROUPS,
    **SCALE,
    **OPTIONAL_INTEGERS,
    **OPTIONAL_FLOATS,
    "theta": "rope_theta",
    "yarn": "rope_scaling",
}
BLOCK = (128, 128)  # of FP8 weights, where the file does not say


def load_config(model: str) -> ModelConfig:
    """The preset called ``model``, or the Hugging Face config.json at that path or in that folder.
    The model may be nested in the file's text_config."""
    if model in PRESETS:
        return PRESETS[model]
    path = Path(model)
    if not os.path.exists(model):  # Path.exists raises for a long name
        raise CouldNotRun(f"{model} is neither a preset ({', '.join(PRESETS)}) nor a file")
    return read_config(path / "config.json" if path.is_dir() else path, nested=True)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds; CouldNotRun if it holds anything else, or a number that is
    not finite."""
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise CouldNotRun(f"{path}: the file must be a JSON object, got {_shown(raw)}")
    for where, value in _infinite("", raw):
        raise CouldNotRun(f"{path}: {where} must be a finite number, got {_shown(value)}")
    return raw


def stop_tokens(folder: Path) -> list[int]:
    """eos_token_id of generation_config.json, else of config.json, as a list; it may be missing."""
    for path in (folder / "generation_config.json", folder / "config.json"):
        found = read_object(path).get("eos_token_id") if os.path.lexists(path) else None
        if found is not None:
            ids = found if isinstance(found, list) else [found]
            if not all(type(token) is int and token >= 0 for token in ids):
                raise CouldNotRun(
                    f"{path}: eos_token_id must be a token id or a list of them, got "
                    f"{str(found)[:40]!r}"
                )
            return ids
    return []


class _Fields:
    """The fields of a config.json; CouldNotRun names the file and the field that is wrong."""

    def __init__(self, path: Path, raw: dict[str, Any], inside: str = "") -> None:
        self.path, self.raw = path, raw
        self.inside = inside  # how messages name the place: nothing, or text_config's

    def get(self, key: str, default: Any = None) -> Any:
        return self.raw.get(key, default)

    def expect(self, holds: bool, key: str, wanted: str, value: Any) -> None:
        if not holds:
            raise CouldNotRun(
                f"{self.path}: {self.inside}{key} must be {wanted}, got {_shown(value)}"
            )

    def integer(self, key: str) -> int:
        """An integer in the range that the field can have."""
        may_be_0 = key in ("first_k_dense_replace", "n_shared_experts", "num_nextn_predict_layers")
        least, most = 0 if may_be_0 else 1, 10_000 if key.endswith("layers") else 10**9
        value: Any = self.get(key)
        holds = type(value) is int and least <= value <= most
        self.expect(holds, key, f"an integer in {least}…{most:,}", value)
        return int(value)

    def number(
        self, key: str, default: float | None = None, *, rope: dict[str, Any] | None = None
    ) -> float:
        """A number of at least 0, of the file or of its ``rope`` scaling."""
        source = self.raw if rope is None else rope
        value: Any = default if source.get(key) is None else source[key]
        shown = key if rope is None else f"rope_scaling's {key}"
        holds = type(value) in (int, float) and 0 <= value < 1e300
        self.expect(holds, shown, "a number of at least 0", value)
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        self.expect(type(value) is bool, key, "true or false", value)
        return bool(value)

    def choice(self, key: str, default: Any, choices: Iterable[str], wanted: str) -> str:
        value = self.get(key, default)
        self.expect(isinstance(value, str) and value in choices, key, wanted, value)
        return str(value)


def read_config(path: Path, *, nested: bool = False) -> ModelConfig:
    """A Hugging Face config.json whose ``model_type`` is one of `ARCHITECTURES`; CouldNotRun names
    the field that is wrong, as the file calls it.

    The conventions are the default ones, but for ``rope_layout``: halves if the file says
    rope_interleave = false. λ of MTP is in no config.json: ``mtp_weight`` is the default.

    Args:
        nested: take the model that the file's text_config describes, if there is one.
    """
    found = _fields(path, nested)
    raw = found.raw
    kind = found.choice("model_type", None, ARCHITECTURES, "one of " + ", ".join(ARCHITECTURES))
    _expect_only(found, kind)
    fields: dict[str, Any] = {
        ours: None if (ours, raw.get(key, 0)) == ("q_latent", None) else found.integer(key)
        for ours, key in INTEGERS.items()
    }
    fields["dense_layers"] = min(fields["dense_layers"], fields["layers"])
    fields |= _selection(found, kind)
    for ours, key in OPTIONAL_INTEGERS.items():
        if raw.get(key) is not None:
            fields[ours] = found.integer(key)
    if kind in INDEXED:
        fields["index_topk"] = found.integer("index_topk")
    fields |= {ours: found.number(key) for ours, key in SCALE.items()}
    for ours, key in OPTIONAL_FLOATS.items():
        if raw.get(key) is not None:
            fields[ours] = found.number(key)
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    found.expect(isinstance(rope, dict), "rope_scaling", "an object or null", rope)
    fields["theta"] = _theta(found, rope)
    fields["yarn"] = _yarn(found, rope)
    fields["tied"] = found.flag("tie_word_embeddings", False)
    fields["normalise_weights"] = found.flag("norm_topk_prob", fields["gate"] == "sigmoid")
    fields["conventions"] = Conventions(
        rope_layout="interleaved" if found.flag("rope_interleave", True) else "halves"
    )
    try:
        return ModelConfig(**fields)
    except ValueError as error:
        told = re.sub(r"\w+", lambda word: OURS.get(word[0], word[0]), str(error))
        raise CouldNotRun(f"{path}: {found.inside}{told}") from error


def _fields(path: Path, nested: bool) -> _Fields:
    """The fields of the model that the file describes, with what newer files leave out."""
    raw, inside = read_object(path), ""
    if raw.get("model_type") not in [*ARCHITECTURES] and isinstance(raw.get(NESTED), dict):
        if not nested:
            stored = {**raw, **raw[NESTED]}.get("quantization_config")
            method = stored.get("quant_method") if isinstance(stored, dict) else None
            told = "" if method is None else f" (quant_method {_shown(method)})"
            raise CouldNotRun(
                f"{path} nests the model in {NESTED} (model_type {_shown(raw.get('model_type'))}): "
                f"its parameters can be counted, but weights of such a file{told} can't be read"
            )
        raw, inside = raw[NESTED], f"{NESTED}'s "
    raw = dict(raw)
    if raw.get("n_shared_experts", 0) is None:
        raw["n_shared_experts"] = 0
    found, key = _Fields(path, raw, inside), "first_k_dense_replace"
    types = raw.get("mlp_layer_types")
    if types is not None:
        dense = types.count("dense") if isinstance(types, list) else 0
        rest = len(types) - dense if isinstance(types, list) else 0
        told = "a list of dense layers, then sparse ones"
        found.expect(types == ["dense"] * dense + ["sparse"] * rest, "mlp_layer_types", told, types)
        layers = raw.get("num_hidden_layers")
        found.expect(
            len(types) == layers,
            "num_hidden_layers",
            f"{len(types)}, as long as mlp_layer_types",
            layers,
        )
        given = raw.setdefault(key, dense)
        same = type(given) is int and min(given, len(types)) == dense
        found.expect(same, key, f"{dense}, as in mlp_layer_types", given)
    elif raw.get("model_type") == "glm4_moe_lite":
        raw.setdefault(key, 1)  # transformers' default
    return found


def _expect_only(found: _Fields, kind: str) -> None:
    """CouldNotRun where a field asks for what this model does not have."""
    architectures = [ARCHITECTURES[kind]]
    wanted, given = json.dumps(architectures), found.get("architectures")
    found.expect(given in (None, architectures), "architectures", wanted, given)
    only = ONLY | {"num_key_value_heads": found.get("num_attention_heads"), ROTATED: 1}
    if kind in INDEXED:
        only["rope_interleave"] = True  # whatever the file says, transformers reads it so
    for key, value in only.items():
        given = found.get(key)
        found.expect(given is None or given == value, key, json.dumps(value), given)


def _selection(found: _Fields, kind: str) -> dict[str, Any]:
    """How experts are scored and chosen: our fields."""
    gate, default = ("softmax", "greedy") if kind == "deepseek_v2" else ("sigmoid", "noaux_tc")
    scores = found.get("scoring_func", gate)
    found.expect(scores == gate, "scoring_func", f"{gate} in {kind}", scores)
    method = found.choice("topk_method", default, SELECTION, "one of " + ", ".join(SELECTION))
    score, bias = SELECTION[method]
    fields: dict[str, Any] = {"gate": gate, "group_score": score, "gate_bias": bias}
    if method != "greedy":
        fields |= {ours: found.integer(key) for ours, key in GROUPS.items()}
    return fields


def _theta(found: _Fields, rope: dict[str, Any]) -> float:
    """The base of the rotations' frequencies, which newer files have in ``rope`` too."""
    key = "rope_theta"
    theta = found.number(key, 1e4, rope=rope if key in rope else None)
    found.expect(theta >= 1, key, "a number of at least 1", theta)
    if key in found.raw:
        same = key not in rope or found.raw[key] == theta
        found.expect(same, key, "that of rope_parameters", found.raw[key])
        found.number(key, 1e4)
    return theta


def _yarn(found: _Fields, rope: dict[str, Any]) -> Yarn | None:
    """What ``rope`` says of YaRN; None without it."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    found.expect(kind in ("default", "yarn"), "rope_scaling's type", "yarn", kind)
    same = rope.get("type", kind) == kind
    found.expect(same, "rope_scaling's type", f"its rope_type, {kind}", rope.get("type"))
    only: dict[str, Any] = {"attention_factor": None, "truncate": True} if kind == "yarn" else {}
    only |= {ROTATED: 1}
    for key, value in only.items():
        given = rope.get(key)
        found.expect(given in (None, value), f"rope_scaling's {key}", _shown(value), given)
    if kind == "default":
        return None
    # transformers has no default for the original length, DeepSeek's code has 4096
    sizes = {}
    for key in ("factor", "original_max_position_embeddings"):
        sizes[key] = found.number(key, rope=rope)
        at_least_1 = sizes[key] >= 1
        found.expect(at_least_1, f"rope_scaling's {key}", "a number of at least 1", sizes[key])
    alone = bool(rope.get("mscale_all_dim")) and rope.get("mscale") is None
    told = "given with mscale_all_dim (DeepSeek's code takes 1 for it, transformers 0)"
    found.expect(not alone, "rope_scaling's mscale", told, None)
    settings = {key: found.number(key, default, rope=rope) for key, default in YARN.items()}
    return Yarn(sizes["factor"], int(sizes["original_max_position_embeddings"]), **settings)


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
    if block is None:
        raise CouldNotRun(
            f"{path}: weight_block_size is null, which stands for one scale per tensor "
            f"(weight_scale): only one per block (weight_scale_inv) can be read"
        )
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
    if config.index_topk is not None:
        raise CouldNotRun(
            f"config.json can't express index_topk={config.index_topk} without indexers' weights"
        )
    kind = "deepseek_v3" if config.gate == "sigmoid" else "deepseek_v2"
    if (config.group_score, config.gate_bias) != (
        ("top2", True) if kind == "deepseek_v3" else ("max", False)
    ):
        raise CouldNotRun(
            f"config.json can't express gate={config.gate!r}, "
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
