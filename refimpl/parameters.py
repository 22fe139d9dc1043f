"""The model's parameters: names, shapes, initial values, and whether given ones fit a config.

Parameters are a flat dict under the Hugging Face names, weights [out, in], the experts of a layer
stacked [E, …]; MTP module k is layer ``layers + k − 1``, and shares embedding and head with the
main model. This is the only place that spells a tensor's name or knows which layer a module is.
Letters are the dimension key of derivations/README.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .array import Array, expect_that
from .config import ModelConfig

__all__ = [
    "EMBEDDING",
    "FINAL_NORM",
    "HEAD",
    "Parameters",
    "check_parameters",
    "depth_of",
    "head_name",
    "init_parameters",
    "is_buffer",
    "is_stacked",
    "layer_name",
    "misfits",
    "module_name",
    "mtp_layer",
    "parameter_shapes",
]

Parameters = Mapping[str, Array]  # by name, a weight as [out, in]
Shapes = dict[str, tuple[int, ...]]

# names of the tensors that belong to no layer, as in Hugging Face's files
EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"  # before the head
HEAD = "lm_head.weight"  # the output head's
# In a layer:
ATTENTION_NORM = "input_layernorm.weight"
NETWORK_NORM = "post_attention_layernorm.weight"
GATE = "mlp.gate.weight"
GATE_BIAS = "mlp.gate.e_score_correction_bias"
DENSE = "mlp"
EXPERTS, SHARED = "mlp.experts", "mlp.shared_experts"
MTP_PROJECTION = "eh_proj.weight"
MTP = ("hnorm.weight", "enorm.weight", MTP_PROJECTION)  # in the order of `mtp_forward`
MTP_NORM = "shared_head.norm.weight"
MOST_MISFITS = 12  # that one error names


def layer_name(layer: int | str, part: str) -> str:
    """The full name of a layer's tensor, ``model.layers.3.mlp.gate.weight``."""
    return f"model.layers.{layer}.{part}"


def module_name(layer: int | str) -> str:
    """The name of a layer itself, ``model.layers.3``."""
    return layer_name(layer, "").removesuffix(".")


def mtp_layer(config: ModelConfig, depth: int) -> int:
    """The layer whose names MTP module ``depth`` (from 1) has."""
    return config.layers + depth - 1


def depth_of(config: ModelConfig, layer: int) -> int:
    """Of which MTP module a layer is, from 1; 0 for the main model's."""
    return max(layer - config.layers + 1, 0)


def mtp_layers(config: ModelConfig) -> range:
    """The layers of all MTP modules, in order."""
    return range(config.layers, config.layers + config.mtp_depth)


def moe_layers(config: ModelConfig) -> range:
    """The layers with a mixture of experts: all behind the dense ones, MTP modules included."""
    return range(config.dense_layers, config.layers + config.mtp_depth)


def head_name(config: ModelConfig) -> str:
    """The output head's weights, which may be the embedding table."""
    return EMBEDDING if config.tied else HEAD


def is_buffer(name: str) -> bool:
    """True for the gate's selection bias, which `bias_update` moves and no gradient does."""
    return name.endswith(GATE_BIAS)


def is_stacked(name: str) -> bool:
    """True for the weights of the routed experts, which are stacked [E, …]."""
    return f".{EXPERTS}." in name


def attention_shapes(config: ModelConfig) -> Shapes:
    """MLA's weights in a layer, in the order of `mla_forward`."""
    c = config
    queries = c.heads * (c.nope + c.rope)
    shapes: Shapes = {"self_attn.q_proj.weight": (queries, c.width)}
    if c.q_latent is not None:
        shapes = {
            "self_attn.q_a_proj.weight": (c.q_latent, c.width),
            "self_attn.q_a_layernorm.weight": (c.q_latent,),
            "self_attn.q_b_proj.weight": (queries, c.q_latent),
        }
    return shapes | {
        "self_attn.kv_a_proj_with_mqa.weight": (c.kv_latent + c.rope, c.width),
        "self_attn.kv_a_layernorm.weight": (c.kv_latent,),
        "self_attn.kv_b_proj.weight": (c.heads * (c.nope + c.value), c.kv_latent),
        "self_attn.o_proj.weight": (c.width, c.heads * c.value),
    }


def attention_names(config: ModelConfig) -> list[str | None]:
    """The same as the arguments of `mla_forward`: None where there is no query compression."""
    names = list(attention_shapes(config))
    return [None, None, *names] if config.q_latent is None else [*names]


def network_names(prefix: str) -> list[str]:
    """The three weights of a network, in the order of `ffn_forward`."""
    return [f"{prefix}.{part}_proj.weight" for part in ("gate", "up", "down")]


def dense_names() -> list[str]:
    """The weights of a dense block's network."""
    return network_names(DENSE)


def network_shapes(prefix: str, width: int, hidden: int, *stack: int) -> Shapes:
    """Those weights' shapes, ``stack`` in front."""
    gate, up, down = network_names(prefix)
    return {
        gate: (*stack, hidden, width),
        up: (*stack, hidden, width),
        down: (*stack, width, hidden),
    }


def experts_names(config: ModelConfig) -> list[str | None]:
    """The weights of routed and shared experts, in the order of `moe_forward`; None without."""
    shared = network_names(SHARED) if config.shared_experts else [None] * 3
    return [*network_names(EXPERTS), *shared]


def block_shapes(config: ModelConfig, layer: int) -> Shapes:
    """Everything in a block: attention, then a dense network or a gate and its experts."""
    c = config
    shapes = {ATTENTION_NORM: (c.width,), **attention_shapes(c), NETWORK_NORM: (c.width,)}
    if layer < c.dense_layers:
        return shapes | network_shapes(DENSE, c.width, c.dense_hidden)
    shapes[GATE] = (c.experts, c.width)
    if c.gate_bias:
        shapes[GATE_BIAS] = (c.experts,)
    shapes |= network_shapes(EXPERTS, c.width, c.expert_hidden, c.experts)
    if c.shared_experts:
        shapes |= network_shapes(SHARED, c.width, c.expert_hidden * c.shared_experts)
    return shapes


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor's name and shape, in the order of the forward. The gate's bias is a buffer: it
    gets no gradient.

    >>> from refimpl.config import preset
    >>> parameter_shapes(preset("v3"))["model.layers.3.mlp.gate.weight"]
    (256, 7168)
    """
    d = config.width
    shapes: Shapes = {EMBEDDING: (config.vocabulary, d)}
    for layer in range(config.layers):
        shapes |= _named(layer, block_shapes(config, layer))
    shapes[FINAL_NORM] = (d,)
    if not config.tied:
        shapes[HEAD] = (config.vocabulary, d)
    hnorm, enorm, proj = MTP
    for layer in mtp_layers(config):
        joined = {enorm: (d,), hnorm: (d,), proj: (d, 2 * d)}
        shapes |= _named(layer, joined | block_shapes(config, layer) | {MTP_NORM: (d,)})
    return shapes


def _named(layer: int, shapes: Shapes) -> Shapes:
    return {layer_name(layer, part): shape for part, shape in shapes.items()}


def init_parameters(
    config: ModelConfig, *, seed: int = 0, std: float = 0.006, dtype: Any = "float32"
) -> dict[str, Array]:
    """Random NumPy parameters of the type ``dtype``, drawn by ``seed``: normal with ``std`` (0.006,
    V3 section 4.2), norms 1, gate biases 0."""
    import numpy as np

    rng = np.random.default_rng(seed)
    params = {}
    for name, shape in parameter_shapes(config).items():
        if "norm.weight" in name:
            x = np.ones(shape)
        elif is_buffer(name):
            x = np.zeros(shape)
        else:
            x = rng.normal(0, std, shape)
        params[name] = x.astype(dtype)
    return params


def misfits(params: Parameters, config: ModelConfig) -> list[str]:
    """What is missing, misshapen, or not a parameter of the config; a dozen, and how many more."""
    wanted = parameter_shapes(config)
    wrong = [f"{name} is missing" for name in wanted if name not in params]
    for name, shape in wanted.items():
        if name in params and tuple(params[name].shape) != shape:
            wrong.append(f"{name} must have shape {shape}, got {tuple(params[name].shape)}")
    wrong += [f"{name} is not a parameter of this config" for name in params if name not in wanted]
    return _a_dozen(wrong)


def check_parameters(params: Parameters, config: ModelConfig) -> None:
    """ValueError names what `misfits` finds, or else the tensors whose type is not the
    embedding's."""
    wrong = misfits(params, config)
    if not wrong:
        dtype = params[EMBEDDING].dtype
        wrong = _a_dozen(
            [
                f"{name} must be {dtype} like {EMBEDDING}, got {p.dtype}"
                for name, p in params.items()
                if not is_buffer(name) and p.dtype != dtype
            ]
        )
    expect_that(not wrong, "params do not fit the config: " + "; ".join(wrong))


def _a_dozen(wrong: list[str]) -> list[str]:
    """The first of them, and how many more there are."""
    if len(wrong) <= MOST_MISFITS:
        return wrong
    return [*wrong[:MOST_MISFITS], f"and {len(wrong) - MOST_MISFITS} more"]
