"""Names and layouts: each known one gives back our tensors; the example maps cover every name of a
V3-shaped model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from refimpl.checkpoint.names import stored_tensors
from refimpl.config import ModelConfig, preset
from refimpl.errors import CouldNotRun
from refimpl.grads import gradient_shapes
from refimpl.port.names import find, known_layout, read_layout
from refimpl.port.theirs import open_theirs

from support import ROOT

Arrays = dict[str, np.ndarray]
V3 = replace(  # as in V3: queries compressed, untied
    preset("tiny"),
    layers=4,
    dense_layers=2,
    mtp_depth=1,
    experts=4,
    shared_experts=1,
    groups=1,
    keep_groups=1,
)
LITE = replace(V3, q_latent=None, mtp_depth=0)


def gradients(config: ModelConfig) -> Arrays:
    """A number of its own for every number of every gradient."""
    found, start = {}, 0
    for name, shape in gradient_shapes(config).items():
        size = int(np.prod(shape))
        found[name] = np.arange(start, start + size, dtype=np.float64).reshape(shape)
        start += size
    return found


def fused(ours: Arrays) -> Arrays:
    """Hugging Face's version 5: a layer's experts in two tensors."""
    found = {name: x for name, x in ours.items() if ".experts." not in name}
    for name in ours:
        if ".experts.0.gate_proj" in name:
            begin = name.split(".0.gate_proj")[0]
            one = [
                np.concatenate([ours[f"{begin}.{e}.{part}_proj.weight"] for part in ("gate", "up")])
                for e in range(4)
            ]
            found[f"{begin}.gate_up_proj"] = np.stack(one)
            down = [ours[f"{begin}.{e}.down_proj.weight"] for e in range(4)]
            found[f"{begin}.down_proj"] = np.stack(down)
    return found


def stacked(ours: Arrays) -> Arrays:
    """As our model has them in memory."""
    found = {name: x for name, x in ours.items() if ".experts." not in name}
    for name in ours:
        if ".experts.0." in name:
            every = [ours[name.replace(".experts.0.", f".experts.{e}.")] for e in range(4)]
            found[name.replace(".experts.0.", ".experts.")] = np.stack(every)
    return found


def deepseek(ours: Arrays) -> Arrays:
    """As inference/convert.py of DeepSeek-V3 renames them."""
    words = {
        "embed_tokens": "embed",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "q_proj": "wq",
        "q_a_proj": "wq_a",
        "q_a_layernorm": "q_norm",
        "q_b_proj": "wq_b",
        "kv_a_proj_with_mqa": "wkv_a",
        "kv_a_layernorm": "kv_norm",
        "kv_b_proj": "wkv_b",
        "o_proj": "wo",
        "gate_proj": "w1",
        "down_proj": "w2",
        "up_proj": "w3",
        "lm_head": "head",
        "self_attn": "attn",
        "mlp": "ffn",
    }
    return {
        ".".join(words.get(x, x) for x in name.removeprefix("model.").split(".")): x
        for name, x in ours.items()
    }


def torchtitan(ours: Arrays) -> Arrays:
    """As the adapter of its state dicts pairs them."""
    found = {}
    for name, x in stacked(ours).items():
        theirs = next(iter(deepseek({name: x})))
        for old, new in (("embed", "tok_embeddings"), ("head", "lm_head")):
            theirs = f"{new}.weight" if theirs == f"{old}.weight" else theirs
        theirs = theirs.replace(".attn_norm.", ".attention_norm.").replace(".attn.", ".attention.")
        dense = ".ffn.w" in theirs
        theirs = theirs.replace(".ffn.", ".feed_forward." if dense else ".moe.")
        theirs = theirs.replace(".moe.gate.", ".moe.router.gate.")
        theirs = theirs.removesuffix(".weight") if ".moe.experts." in theirs else theirs
        found[theirs] = x
    return found


def megatron(ours: Arrays, config: ModelConfig) -> Arrays:
    """As its modules are called, with Transformer Engine's fused norms."""
    attention = {
        "input_layernorm.weight": "input_layernorm.weight",
        "self_attn.q_proj.weight": "self_attention.linear_q_proj.weight",
        "self_attn.q_a_proj.weight": "self_attention.linear_q_down_proj.weight",
        "self_attn.q_a_layernorm.weight": "self_attention.linear_q_up_proj.layer_norm_weight",
        "self_attn.q_b_proj.weight": "self_attention.linear_q_up_proj.weight",
        "self_attn.kv_a_proj_with_mqa.weight": "self_attention.linear_kv_down_proj.weight",
        "self_attn.kv_a_layernorm.weight": "self_attention.linear_kv_up_proj.layer_norm_weight",
        "self_attn.kv_b_proj.weight": "self_attention.linear_kv_up_proj.weight",
        "self_attn.o_proj.weight": "self_attention.linear_proj.weight",
        "mlp.gate.weight": "mlp.router.weight",
    }
    found = {
        "embedding.word_embeddings.weight": ours["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": ours["model.norm.weight"],
        "output_layer.weight": ours["lm_head.weight"],
    }
    for layer in range(config.layers + config.mtp_depth):
        mine = f"model.layers.{layer}."
        part = {n.removeprefix(mine): x for n, x in ours.items() if n.startswith(mine)}
        begin, depth = f"decoder.layers.{layer}.", layer - config.layers
        if depth >= 0:
            begin = f"mtp.layers.{depth}.transformer_layer."
            for name in ("enorm", "hnorm", "eh_proj"):
                found[f"mtp.layers.{depth}.{name}.weight"] = part[f"{name}.weight"]
            last = part["shared_head.norm.weight"]
            found[f"mtp.layers.{depth}.final_layernorm.weight"] = last
        found |= {begin + theirs: part[name] for name, theirs in attention.items() if name in part}
        norm = "mlp.linear_fc1.layer_norm_weight" if layer < config.dense_layers else ""
        found[begin + (norm or "pre_mlp_layernorm.weight")] = part[
            "post_attention_layernorm.weight"
        ]
        networks = {"mlp": ("mlp.linear_fc1.weight", "mlp.linear_fc2.weight")}
        if layer >= config.dense_layers:
            shared = (
                "mlp.shared_experts.linear_fc1.weight",
                "mlp.shared_experts.linear_fc2.weight",
            )
            networks = {"mlp.shared_experts": shared}
            for e in range(config.experts):
                fc = tuple(f"mlp.experts.linear_fc{n}.weight{e}" for n in (1, 2))
                networks[f"mlp.experts.{e}"] = (fc[0], fc[1])
        for prefix, (first, second) in networks.items():
            halves = [part[f"{prefix}.{x}_proj.weight"] for x in ("gate", "up")]
            found[begin + first] = np.concatenate(halves)
            found[begin + second] = part[f"{prefix}.down_proj.weight"]
    return found


def expect_all(
    path: Path, ours: Arrays, config: ModelConfig, map_file: Path | None = None
) -> set[str]:
    """Every gradient is found once and is ours; the keys that were used."""
    theirs, known = open_theirs(path), known_layout()
    given = None if map_file is None else read_layout(map_file)
    used = set()
    for name, x in ours.items():
        places = find(f"grad/{name}", theirs, config, known, given)
        assert len(places) == 1, (name, places)
        assert places[0].shape == x.shape
        np.testing.assert_array_equal(places[0].array(), x, err_msg=name)
        used.update(places[0].keys)
    return used


@pytest.mark.parametrize("config", [V3, LITE], ids=["v3", "lite"])
@pytest.mark.parametrize("prefix", ["", "grad/"])
@pytest.mark.parametrize("layout", [dict, stacked, fused, deepseek])
def test_known_layouts(
    tmp_path: Path, config: ModelConfig, prefix: str, layout: Callable[[Arrays], Arrays]
) -> None:
    config = replace(config, mtp_depth=0)
    ours = gradients(config)
    theirs = {prefix + name: x for name, x in layout(ours).items()}
    save_file(theirs, tmp_path / "a.safetensors")
    assert expect_all(tmp_path / "a.safetensors", ours, config) == theirs.keys()


def test_the_map_of_torchtitan(tmp_path: Path) -> None:
    for config in (replace(V3, mtp_depth=0), LITE):
        ours = gradients(config)
        theirs = torchtitan(ours)
        save_file(theirs, tmp_path / "a.safetensors")
        given = ROOT / "examples" / "torchtitan.toml"
        assert expect_all(tmp_path / "a.safetensors", ours, config, given) == theirs.keys()


def test_the_map_of_megatron(tmp_path: Path) -> None:
    for config in (V3, LITE):
        ours = gradients(config)
        theirs = megatron(ours, config)
        save_file(theirs, tmp_path / "a.safetensors")
        given = ROOT / "examples" / "megatron.toml"
        assert expect_all(tmp_path / "a.safetensors", ours, config, given) == theirs.keys()


@pytest.mark.parametrize("name", ["megatron", "torchtitan"])
def test_maps_name_our_tensors_alone(name: str) -> None:
    """Every line of the examples is that of a tensor of some model."""
    every = {n for config in (V3, LITE) for n in stored_tensors(config)}
    patterns = set()
    for n in every:
        words = n.split(".")
        for i, word in enumerate(words):
            if word.isdigit():
                words[i] = "{E}" if words[i - 1] == "experts" else "{L}"
        patterns.add(f"grad/{'.'.join(words)}")
    assert set(read_layout(ROOT / "examples" / f"{name}.toml")) <= patterns


GATE_UP = "model.layers.{L}.mlp.gate_proj.weight"
KV_B = "model.layers.{L}.self_attn.kv_b_proj.weight"
OUT = "model.layers.{L}.self_attn.o_proj.weight"


def test_pieces_of_ranks(tmp_path: Path) -> None:
    """Two ranks, each with a file: split by rows, by columns, and gate above up on each."""
    ours = gradients(V3)
    rows, columns = ours[KV_B.format(L=1)], ours[OUT.format(L=1)]
    gate, up = (ours[f"model.layers.1.mlp.{x}_proj.weight"] for x in ("gate", "up"))
    for r in range(2):
        half = len(gate) // 2
        own = slice(r * half, (r + 1) * half)
        save_file(
            {
                "a.1": np.ascontiguousarray(np.array_split(rows, [22])[r].T),
                "grad/b.1": np.ascontiguousarray(columns[:, r * 9 : (r + 1) * 9]),
                "c.1": np.concatenate([gate[own], up[own]]),
            },
            tmp_path / f"rank{1 - r}.safetensors",
        )
    (tmp_path / "map.toml").write_text(
        f"""
"{KV_B}" = {{ theirs = "rank{{R}}.safetensors:a.{{L}}", ranks = [1, 0], transpose = true }}
"{OUT}" = {{ theirs = "rank{{R}}.safetensors:b.{{L}}", ranks = [1, 0], split = 1 }}
"{GATE_UP}" = {{ theirs = "rank{{R}}.safetensors:c.{{L}}", ranks = [1, 0], part = [0, 2] }}
"""
    )
    chosen = {n.format(L=1): ours[n.format(L=1)] for n in (KV_B, OUT, GATE_UP)}
    assert len(expect_all(tmp_path, chosen, V3, tmp_path / "map.toml")) == 6


def test_experts_of_ranks(tmp_path: Path) -> None:
    """Two experts per rank."""
    ours = gradients(V3)
    names = [f"model.layers.2.mlp.experts.{e}.down_proj.weight" for e in range(4)]
    for r in range(2):
        own = {f"w{e}": ours[names[2 * r + e]] for e in range(2)}
        save_file(own, tmp_path / f"rank{r}.safetensors")
    (tmp_path / "map.toml").write_text(
        '"model.layers.2.mlp.experts.{E}.down_proj.weight" = '
        '{ theirs = "rank{R}.safetensors:w{E}", local_experts = 2 }'
    )
    expect_all(tmp_path, {name: ours[name] for name in names}, V3, tmp_path / "map.toml")


def test_rotated_rows_in_halves(tmp_path: Path) -> None:
    """Of every head's queries and of the shared key: pair n is rows n and R/2 + n."""
    config = replace(V3, rope=6)  # with 4 the way back would be the way there
    ours = gradients(config)
    names = [f"model.layers.0.self_attn.{x}.weight" for x in ("q_b_proj", "kv_a_proj_with_mqa")]
    q, kv = (ours[name] for name in names)
    heads = q.reshape(config.heads, config.nope + config.rope, -1)
    order = [*range(config.nope), *(config.nope + n for n in (0, 2, 4, 1, 3, 5))]
    last = config.kv_latent
    theirs = {
        "q": heads[:, order].reshape(q.shape),
        "kv": kv[[*range(last), *(last + n for n in (0, 2, 4, 1, 3, 5))]],
    }
    save_file(theirs, tmp_path / "a.safetensors")
    (tmp_path / "map.toml").write_text(
        "\n".join(
            f'"{name}" = {{ theirs = "{key}", rotated = "halves" }}'
            for name, key in zip(names, theirs, strict=True)
        )
    )
    chosen = {name: ours[name] for name in names}
    expect_all(tmp_path / "a.safetensors", chosen, config, tmp_path / "map.toml")


def test_the_given_map_comes_first(tmp_path: Path) -> None:
    """Also where the name is one that is known: here both mean the same tensor, transposed."""
    name = "model.layers.0.self_attn.o_proj.weight"
    x = gradients(V3)[name]
    save_file({name: np.ascontiguousarray(x.T)}, tmp_path / "a.safetensors")
    (tmp_path / "map.toml").write_text(f'"{OUT}" = {{ theirs = "{OUT}", transpose = true }}')
    expect_all(tmp_path / "a.safetensors", {name: x}, V3, tmp_path / "map.toml")


def test_names_of_activations(tmp_path: Path) -> None:
    save_file({"act/blocks.1.out": np.ones(3), "h": np.zeros(3)}, tmp_path / "a.safetensors")
    (tmp_path / "map.toml").write_text(
        '"act/model.layers.{L}" = "blocks.{L}.out"\n"act/model.norm" = "h"'
    )
    theirs, given = open_theirs(tmp_path / "a.safetensors"), read_layout(tmp_path / "map.toml")
    (found,) = find("act/model.layers.1", theirs, V3, known_layout(), given)
    assert found.array().tolist() == [1, 1, 1]
    (found,) = find("act/model.norm", theirs, V3, known_layout(), given)
    assert found.array().tolist() == [0, 0, 0]
    assert find("grad/model.norm", theirs, V3, known_layout(), given) == []


def test_pieces_that_do_not_fit(tmp_path: Path) -> None:
    name = "model.layers.2.mlp.experts.3.gate_proj.weight"
    for x, line in (
        (np.zeros((2, 18, 20)), r"has no expert 3, its shape is \(2, 18, 20\)"),
        (np.zeros((4, 3, 20)), r"can't be cut into 2 parts, its shape is \(3, 20\)"),
    ):
        save_file({"model.layers.2.mlp.experts.gate_up_proj": x}, tmp_path / "a.safetensors")
        (found,) = find(f"grad/{name}", open_theirs(tmp_path / "a.safetensors"), V3, known_layout())
        with pytest.raises(ValueError, match=line):
            print(found.shape)


E = '"model.layers.{L}.mlp.experts.{E}.up_proj.weight" = '


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("x", "is not TOML"),
        ("", "must have lines ours = theirs"),
        ('"a.{X}" = "b"', "may hold {L} and {E}, got {X}"),
        ('"a" = "b.{X}"', "theirs may hold {L}, {E}, {M} and {R}, got {X}"),
        ('"a" = 7', 'must be "theirs"'),
        ('"a" = { transpose = true }', 'must be "theirs"'),
        ('"a" = { theirs = "b", turn = 1 }', "must have keys among"),
        ('"a" = { theirs = "b", transpose = 1 }', "transpose must be true or false"),
        ('"a" = { theirs = "b", part = 1 }', "part must be [i, n]"),
        ('"a" = { theirs = "b", part = [2, 2] }', "part must be [i, n]"),
        ('"a" = { theirs = "b", part = [0, "x"] }', "part must be [i, n]"),
        ('"a" = { theirs = "b", split = 3 }', "split must be numbers"),
        ('"a" = { theirs = "b{R}" }', "{R} needs ranks"),
        ('"a" = { theirs = "b", ranks = 2 }', "and they need {R}"),
        ('"a" = { theirs = "b{R}", ranks = 0 }', "ranks must be"),
        ('"a" = { theirs = "b{R}", ranks = [] }', "ranks must be"),
        ('"a" = { theirs = "b{R}", ranks = 99999999 }', "ranks must be"),
        ('"a" = { theirs = "b{R}", ranks = ["x"] }', "ranks must be"),
        ('"a" = "b.{E}"', "{E} on the right needs {E} on the left"),
        (E + '{ theirs = "b", index = 0 }', 'index must be "{E}"'),
        (E + '{ theirs = "b", rotated = "pairs" }', 'rotated "halves"'),
        (E + '{ theirs = "b{R}", local_experts = -1 }', "local_experts"),
    ],
)
def test_a_map_that_is_wrong(tmp_path: Path, text: str, line: str) -> None:
    (tmp_path / "map.toml").write_text(text)
    with pytest.raises(CouldNotRun) as caught:
        read_layout(tmp_path / "map.toml")
    assert line in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "map.toml"))


def test_a_map_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CouldNotRun, match=r"no.toml can't be read"):
        read_layout(tmp_path / "no.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff")
    with pytest.raises(CouldNotRun, match="must be UTF-8"):
        read_layout(tmp_path / "bytes.toml")
