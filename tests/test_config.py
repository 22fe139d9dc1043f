"""The presets' numbers, against published counts; conventions and configs that make no sense are
refused."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace
from math import e, prod
from typing import Any

import pytest

from refimpl.config import CONVENTIONS, PRESETS, Conventions, Yarn, preset
from refimpl.parameters import is_buffer, parameter_shapes


def count(name: str, part: str = "") -> int:
    """Parameters of a preset's main model (buffers left out) whose names contain ``part``."""
    config = preset(name)
    modules = tuple(
        f"model.layers.{layer}." for layer in range(config.layers, config.layers + config.mtp_depth)
    )
    return sum(
        prod(shape)
        for tensor, shape in parameter_shapes(config).items()
        if not is_buffer(tensor) and part in tensor and not tensor.startswith(modules)
    )


def test_v3_has_the_published_size() -> None:
    """671,026,404,352 parameters, and 256 biases in each of 58 layers (DeepSeek-V3, 2412.19437,
    section 4.2: 671B)."""
    assert count("v3") == 671_026_404_352
    assert count("v3", "layers.0.self_attn") == 187_107_328
    assert count("v3", "layers.0.mlp") == 396_361_728
    assert count("v3", "layers.3.mlp") == 11_320_164_352
    assert count("v3", "embed_tokens") == count("v3", "lm_head") == 926_679_040
    shapes = parameter_shapes(preset("v3"))
    biases = [
        prod(shape) for name, shape in shapes.items() if is_buffer(name) and ".61." not in name
    ]
    assert sum(biases) == 14_848


def test_mtp_module_of_v3() -> None:
    """11.610B parameters of its own, 11.507B without the projection: the "11.5B" of the weights'
    README."""
    shapes = parameter_shapes(preset("v3"))
    module = {
        name: prod(shape)
        for name, shape in shapes.items()
        if ".layers.61." in name and not is_buffer(name)
    }
    assert round(sum(module.values()) / 1e9, 3) == 11.610
    assert (
        round((sum(module.values()) - module["model.layers.61.eh_proj.weight"]) / 1e9, 3) == 11.507
    )


def test_the_smaller_presets() -> None:
    assert round(count("v2-lite") / 1e9, 3) == 15.706
    assert round(count("moonlight-16b") / 1e9, 3) == 15.960


def test_cache_of_v3() -> None:
    """70,272 bytes a token in bfloat16: 576 numbers a layer."""
    config = preset("v3")
    assert (config.kv_latent + config.rope) * 2 * config.layers == 70_272


def test_tiny_is_odd_everywhere() -> None:
    """Widths that could be mistaken for one another differ, and no constant is neutral."""
    c = preset("tiny")
    assert (
        len({c.width, c.q_latent, c.kv_latent, c.nope, c.rope, c.value, c.heads, c.dense_hidden})
        == 8
    )
    assert c.mtp_depth == 2
    assert 1 < c.keep_groups < c.groups
    assert c.active_yarn is not None
    assert c.routed_scale != 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope": 3}, "rope must be even, got 3"),
        ({"width": 0}, "width must be an integer of at least 1, got 0"),
        ({"layers": 2.0}, "layers must be an integer"),
        ({"dense_layers": 9}, "dense_layers must be at most layers=3, got 9"),
        ({"groups": 3}, "groups must divide experts=8"),
        ({"keep_groups": 5}, "keep_groups lie in"),
        ({"top_k": 5}, "top_k must be at most 4, experts / groups × keep_groups, got 5"),
        ({"norm_eps": -1e-6}, "norm_eps must be a finite number of at least 0.0, got -1e-06"),
        ({"theta": "big"}, "theta must be a finite number of at least 1.0, got 'big'"),
        ({"theta": float("inf")}, "theta must be a finite number of at least 1.0, got inf"),
        ({"norm_eps": float("inf")}, "norm_eps must be a finite number of at least 0.0, got inf"),
        ({"balance_weight": float("nan")}, "balance_weight must be a finite number of at least"),
        ({"theta": 1.0}, "theta must be above 1 with YaRN, got 1"),
        ({"yarn": Yarn(factor=0.0)}, "yarn.factor must be a finite number above 0, got 0.0"),
        ({"yarn": Yarn(beta_slow=5e-324)}, "yarn.beta_slow must be a finite number above 0, got 5"),
        ({"yarn": Yarn(mscale=1e299)}, "yarn.mscale must make .* fit float32, got 1e"),
        ({"gate": "tanh"}, "gate must be one of sigmoid, softmax, got 'tanh'"),
        ({"group_score": "mean"}, "group_score must be one of top2, share, max, got 'mean'"),
    ],
)
def test_bad_configs(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(preset("tiny"), **change)


@pytest.mark.parametrize(
    "field", [f.name for f in fields(Conventions) if isinstance(f.default, str)]
)
def test_bad_conventions(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be one of .* got 'other'"):
        Conventions(**{field: "other"})


def test_records_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        preset("tiny").width = 3  # type: ignore[misc]


def test_unknown_preset() -> None:
    with pytest.raises(
        ValueError,
        match=r"preset must be one of tiny, mini, v3, .*, kimi-k2, glm-4.7-flash, got 'v4'",
    ):
        preset("v4")


def test_yarn_when() -> None:
    """A model trained no further than the original context uses YaRN only under Hugging Face's
    convention."""
    short = replace(preset("v3"), max_positions=4096)
    assert short.active_yarn is None
    assert replace(short, conventions=CONVENTIONS["hf"]).active_yarn == PRESETS["v3"].yarn


def test_yarn_factor() -> None:
    """Hugging Face takes the ratio of the two mscales only if neither is 0; released models have a
    ratio of 1."""
    hf, official = CONVENTIONS["hf"], CONVENTIONS["official"]

    def factor(mscale: float, mscale_all_dim: float, conventions: Conventions) -> float:
        yarn = Yarn(
            factor=e**10, mscale=mscale, mscale_all_dim=mscale_all_dim
        )  # ln of the factor is 10
        return replace(preset("v3"), yarn=yarn, conventions=conventions).rope_factor

    assert [factor(1, 1, c) for c in (official, hf)] == [1, 1]
    assert [factor(0.5, 0.25, c) for c in (official, hf)] == pytest.approx([1.2, 1.2])
    assert [factor(0.5, 0, c) for c in (official, hf)] == pytest.approx([1.5, 2])
    assert [factor(0, 0.25, c) for c in (official, hf)] == pytest.approx([0.8, 2])
    assert replace(preset("v3"), yarn=None).rope_factor == 1


def test_weight_rule() -> None:
    """What norm_topk_prob does to a softmax gate differs; to a sigmoid gate it does the same
    everywhere."""
    for rule, wanted in {
        "scaled": (True, 16.0),
        "unscaled": (True, 1.0),
        "ignored": (False, 16.0),
    }.items():
        conventions = Conventions(softmax_normalise=rule)
        assert replace(preset("v2"), conventions=conventions).weight_rule == (False, 16.0)
        assert (
            replace(preset("v2"), conventions=conventions, normalise_weights=True).weight_rule
            == wanted
        )
        assert replace(preset("v3"), conventions=conventions).weight_rule == (True, 2.5)


def test_latent_eps() -> None:
    moonlight = preset("moonlight-16b")
    assert moonlight.latent_eps == 1e-5
    assert replace(moonlight, conventions=CONVENTIONS["hf"]).latent_eps == 1e-6
