"""Our parameter names and those of a checkpoint's tensors: experts apart, and copies that say
nothing new.

In memory the experts of a layer are stacked [E, …] under ``mlp.experts.gate_proj.weight``; a
checkpoint has one tensor per expert, ``mlp.experts.0.gate_proj.weight``. All other names are the
same. derivations/checkpoints.md has the table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..config import ModelConfig
from ..parameters import (
    EMBEDDING,
    EXPERTS,
    HEAD,
    head_name,
    is_stacked,
    layer_name,
    moe_layers,
    mtp_layers,
    network_names,
    parameter_shapes,
)

__all__ = [
    "FUSED",
    "SCALE",
    "abbreviate",
    "copied_names",
    "fold",
    "fused_names",
    "is_ignorable",
    "is_of_indexer",
    "is_quantised",
    "layer_of",
    "stored_names",
    "stored_tensors",
    "tensor_scales",
]

SCALE = "_scale_inv"  # what an FP8 weight's name has in addition, for its scales
FUSED = ("gate_up_proj", "down_proj")  # a layer's experts, as transformers 5 may save them
OF_TENSOR = ("weight_scale", "input_scale")  # beside FP8 weights with one scale per tensor
MOST_GROUPS = 12  # of names, in one error
NUMBER = re.compile(r"(?<=\.)\d{1,9}(?=\.|$)")  # a part of a name that is one


def stored_names(name: str, shape: tuple[int, ...]) -> list[str]:
    """The checkpoint's tensors that make up our parameter ``name`` of that shape: E of them for a
    layer's experts."""
    if not is_stacked(name):
        return [name]
    before, after = name.split(f".{EXPERTS}.")
    return [f"{before}.{EXPERTS}.{expert}.{after}" for expert in range(shape[0])]


def fused_names(config: ModelConfig) -> dict[str, list[str]]:
    """The tensors that may hold all experts of a layer, gate above up [E, 2F, D], and down
    [E, D, F], each with our parameters that make it up."""
    found = {}
    for layer in moe_layers(config):
        gate, up, down = (layer_name(layer, name) for name in network_names(EXPERTS))
        found[layer_name(layer, f"{EXPERTS}.{FUSED[0]}")] = [gate, up]
        found[layer_name(layer, f"{EXPERTS}.{FUSED[1]}")] = [down]
    return found


def copied_names(config: ModelConfig) -> dict[str, str]:
    """Tensors that a checkpoint may have in addition, each with our parameter that it must
    equal."""
    copies = {HEAD: head_name(config)} if config.tied else {}
    for layer in mtp_layers(config):
        copies[layer_name(layer, "embed_tokens.weight")] = EMBEDDING
        copies[layer_name(layer, "shared_head.head.weight")] = head_name(config)
    return copies


def is_ignorable(name: str) -> bool:
    """True for buffers that old versions of transformers wrote and that the config determines."""
    return name.endswith("rotary_emb.inv_freq")


def is_of_indexer(name: str) -> bool:
    """True for the weights that choose the keys of V3.2's sparse attention."""
    return re.match(r"model\.layers\.\d{1,9}\.self_attn\.indexer\.", name) is not None


def tensor_scales(name: str) -> list[str]:
    """What the scales of an FP8 weight are called where it has one per tensor."""
    return [name.removesuffix("weight") + scale for scale in OF_TENSOR]


def is_quantised(name: str) -> bool:
    """True for the weights that DeepSeek's FP8 checkpoints hold in FP8: the projections of
    attention and networks."""
    return re.search(r"\.(self_attn|mlp)\..*_proj(_with_mqa)?\.weight$", name) is not None


def layer_of(name: str) -> int | None:
    """The layer that a tensor belongs to, or None.

    >>> layer_of("model.layers.12.mlp.gate.weight")
    12
    """
    found = re.match(r"model\.layers\.(\d{1,9})\.", name)
    return int(found[1]) if found else None


def fold(problems: Iterable[tuple[str, str]]) -> list[str]:
    """A line per (tensor, what is said of it): names that differ in their numbers alone are told as
    one."""
    groups: dict[tuple[str, str], list[list[int]]] = {}
    for name, what in problems:
        name = name.encode("ascii", "backslashreplace").decode()[
            :200
        ]  # names come from the file: keep them on one line
        pattern = NUMBER.sub("\0", re.sub(r"[\0-\x1f\x7f]", "?", name))
        groups.setdefault((pattern, what), []).append([int(n) for n in NUMBER.findall(name)])
    told = []
    for (pattern, what), numbers in groups.items():
        for column in zip(*numbers, strict=True):
            least, most = min(column), max(column)
            pattern = pattern.replace("\0", str(least) if least == most else f"{least}…{most}", 1)
        told.append(f"{pattern}{f' ({len(numbers)} tensors)' if len(numbers) > 1 else ''} {what}")
    return told


def abbreviate(problems: Iterable[tuple[str, str]]) -> str:
    """The lines of `fold` as one."""
    told = fold(problems)
    if len(told) > MOST_GROUPS:
        told[MOST_GROUPS - 1 :] = [f"and {len(told) - MOST_GROUPS + 1} more like these"]
    return "; ".join(told)


def stored_tensors(config: ModelConfig) -> dict[str, tuple[str, int | None, tuple[int, ...]]]:
    """Every tensor that a checkpoint of ``config`` has, in the order of the forward.

    Each with our parameter, which of its experts it is (None: the whole), and its shape.
    """
    found: dict[str, tuple[str, int | None, tuple[int, ...]]] = {}
    for name, shape in parameter_shapes(config).items():
        stored = stored_names(name, shape)
        for expert, stored_name in enumerate(stored):
            found[stored_name] = (
                (name, expert, shape[1:]) if stored != [name] else (name, None, shape)
            )
    return found
