"""Names, shapes and types of the released files; the page that lists them; long lists in short."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from math import prod

import pytest

from refimpl.checkpoint.names import abbreviate, copied_names, stored_tensors
from refimpl.checkpoint.writer import _entries, _scales
from refimpl.config import preset
from refimpl.parameters import parameter_shapes

from support import ROOT

# The tensors of deepseek-ai/DeepSeek-R1's 163 files (V3's are the same), as tools that read their
# headers list them: name, shape, type, how many. Embedding and head are there twice.
RELEASED = """
lm_head.weight 129280×7168 BF16 1
model.embed_tokens.weight 129280×7168 BF16 1
model.layers.#.input_layernorm.weight 7168 BF16 62
model.layers.#.post_attention_layernorm.weight 7168 BF16 62
model.layers.#.self_attn.q_a_proj.weight 1536×7168 F8_E4M3 62
model.layers.#.self_attn.q_a_proj.weight_scale_inv 12×56 F32 62
model.layers.#.self_attn.q_a_layernorm.weight 1536 BF16 62
model.layers.#.self_attn.q_b_proj.weight 24576×1536 F8_E4M3 62
model.layers.#.self_attn.q_b_proj.weight_scale_inv 192×12 F32 62
model.layers.#.self_attn.kv_a_proj_with_mqa.weight 576×7168 F8_E4M3 62
model.layers.#.self_attn.kv_a_proj_with_mqa.weight_scale_inv 5×56 F32 62
model.layers.#.self_attn.kv_a_layernorm.weight 512 BF16 62
model.layers.#.self_attn.kv_b_proj.weight 32768×512 F8_E4M3 62
model.layers.#.self_attn.kv_b_proj.weight_scale_inv 256×4 F32 62
model.layers.#.self_attn.o_proj.weight 7168×16384 F8_E4M3 62
model.layers.#.self_attn.o_proj.weight_scale_inv 56×128 F32 62
model.layers.#.mlp.gate_proj.weight 18432×7168 F8_E4M3 3
model.layers.#.mlp.gate_proj.weight_scale_inv 144×56 F32 3
model.layers.#.mlp.up_proj.weight 18432×7168 F8_E4M3 3
model.layers.#.mlp.up_proj.weight_scale_inv 144×56 F32 3
model.layers.#.mlp.down_proj.weight 7168×18432 F8_E4M3 3
model.layers.#.mlp.down_proj.weight_scale_inv 56×144 F32 3
model.layers.#.mlp.gate.weight 256×7168 BF16 59
model.layers.#.mlp.gate.e_score_correction_bias 256 F32 59
model.layers.#.mlp.experts.#.gate_proj.weight 2048×7168 F8_E4M3 15104
model.layers.#.mlp.experts.#.gate_proj.weight_scale_inv 16×56 F32 15104
model.layers.#.mlp.experts.#.up_proj.weight 2048×7168 F8_E4M3 15104
model.layers.#.mlp.experts.#.up_proj.weight_scale_inv 16×56 F32 15104
model.layers.#.mlp.experts.#.down_proj.weight 7168×2048 F8_E4M3 15104
model.layers.#.mlp.experts.#.down_proj.weight_scale_inv 56×16 F32 15104
model.layers.#.mlp.shared_experts.gate_proj.weight 2048×7168 F8_E4M3 59
model.layers.#.mlp.shared_experts.gate_proj.weight_scale_inv 16×56 F32 59
model.layers.#.mlp.shared_experts.up_proj.weight 2048×7168 F8_E4M3 59
model.layers.#.mlp.shared_experts.up_proj.weight_scale_inv 16×56 F32 59
model.layers.#.mlp.shared_experts.down_proj.weight 7168×2048 F8_E4M3 59
model.layers.#.mlp.shared_experts.down_proj.weight_scale_inv 56×16 F32 59
model.layers.#.eh_proj.weight 7168×14336 BF16 1
model.layers.#.enorm.weight 7168 BF16 1
model.layers.#.hnorm.weight 7168 BF16 1
model.layers.#.embed_tokens.weight 129280×7168 BF16 1
model.layers.#.shared_head.head.weight 129280×7168 BF16 1
model.layers.#.shared_head.norm.weight 7168 BF16 1
model.norm.weight 7168 BF16 1
"""


def test_released_tensors() -> None:
    """Written in FP8, the preset v3 has the names, shapes, types and numbers of the released files,
    all 91,991."""
    released: Counter[tuple[str, ...]] = Counter()
    for line in RELEASED.strip().splitlines():
        *key, count = line.split(" ")
        released[tuple(key)] = int(count)
    entries = list(_entries(preset("v3"), "fp8"))
    entries += [_scales(entry) for entry in entries if entry.dtype == "F8_E4M3"]
    ours = Counter(
        (re.sub(r"\b\d+\b", "#", e.name), "×".join(map(str, e.shape)), e.dtype) for e in entries
    )
    assert ours == released
    assert len(entries) == len({entry.name for entry in entries}) == 91_991
    assert sum(prod(entry.shape) for entry in entries) == 684_531_386_000
    assert sum(entry.spec.bytes for entry in entries) == 688_574_839_360


@pytest.mark.parametrize("name", ["v3", "v2", "v2-lite", "moonlight-16b", "tiny"])
def test_names_are_a_bijection(name: str) -> None:
    """Every parameter is made of tensors of its own, which hold as many numbers; no copy has a
    tensor's name."""
    config = preset(name)
    stored, shapes = stored_tensors(config), parameter_shapes(config)
    assert Counter(
        {
            ours: sum(prod(s) for o, _, s in stored.values() if o == ours)
            for ours in list(shapes)[:40]
        }
    ) == {ours: prod(shape) for ours, shape in list(shapes.items())[:40]}
    assert {ours for ours, _, _ in stored.values()} == set(shapes)
    assert sum(prod(shape) for _, _, shape in stored.values()) == sum(map(prod, shapes.values()))
    assert not stored.keys() & copied_names(config).keys()


def test_abbreviate() -> None:
    """Names that differ in numbers alone are one; other names, other faults stay apart; hundreds
    end in a count."""
    experts = [
        (f"model.layers.3.mlp.experts.{n}.gate_proj.weight", "is missing") for n in range(64)
    ]
    assert (
        abbreviate(experts)
        == "model.layers.3.mlp.experts.0…63.gate_proj.weight (64 tensors) is missing"
    )
    layers = [(f"model.layers.{n}.mlp.gate.weight", "is missing") for n in (4, 2)]
    assert abbreviate(
        [*layers, ("model.norm.weight", "is missing"), ("model.norm.weight", "is round")]
    ) == (
        "model.layers.2…4.mlp.gate.weight (2 tensors) is missing; model.norm.weight is missing; "
        "model.norm.weight is round"
    )
    many = abbreviate((f"name{chr(97 + n)}", "is missing") for n in range(20))
    assert many.endswith("namek is missing; and 9 more like these")
    strange = abbreviate([("a\nb\x00\u2028\ud800\x9b", "is missing")])
    assert strange == r"a?b?\u2028\ud800\x9b is missing"
    assert abbreviate([(300 * "n", "is missing")]) == 200 * "n" + " is missing"


def test_the_page() -> None:
    """derivations/checkpoints.md lists every tensor once, with the shape that the map gives, in
    letters and for V3."""
    page = (ROOT / "derivations" / "checkpoints.md").read_text()
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]+) \| ([^|]+) \| ([^|]+) \|", page, re.M)
    config = preset("v3")
    c = config
    letters = {
        "W": c.vocabulary,
        "D": c.width,
        "H": c.heads,
        "N": c.nope,
        "R": c.rope,
        "V": c.value,
        "A": c.q_latent,
        "C": c.kv_latent,
        "E": c.experts,
        "F": c.dense_hidden,
        "Fe": c.expert_hidden,
        "Fs": c.expert_hidden * c.shared_experts,
    }
    stored = {
        re.sub(r"\b\d+\b", "#", name): shape
        for name, (_, _, shape) in stored_tensors(config).items()
    }
    untouched = replace(config, q_latent=None)
    stored |= {
        re.sub(r"\b\d+\b", "#", name): shape
        for name, (_, _, shape) in stored_tensors(untouched).items()
    }
    copies = {
        re.sub(r"\b\d+\b", "#", name): stored[ours] for name, ours in copied_names(config).items()
    }
    listed: dict[str, tuple[int, ...]] = {}
    for name, shape, numbers, _ in rows:
        name = re.sub(r"\b[LN]\b", "#", name)
        assert name not in listed, name
        written = shape.strip("[] ").split(", ")
        listed[name] = tuple(eval(part.replace("·", "*"), {}, letters) for part in written)
        assert numbers.strip() == "×".join(map(str, listed[name])), name
    assert listed == stored | copies
    quantised = {
        re.sub(r"\b\d+\b", "#", e.name) for e in _entries(config, "fp8") if e.dtype == "F8_E4M3"
    }
    quantised |= {"model.layers.#.self_attn.q_proj.weight"}
    assert {
        re.sub(r"\b[LN]\b", "#", name) for name, _, _, kind in rows if kind.strip() == "FP8"
    } == quantised
