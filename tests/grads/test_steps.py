"""The gradients that the steps write: the model's own, bit for bit."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refimpl import __version__
from refimpl.check.cases import model_variant
from refimpl.checkpoint.source import MemorySource
from refimpl.config import Conventions
from refimpl.grads import Request, gradient_shapes, write_gradients
from refimpl.grads.lazy import ROWS
from refimpl.grads.steps import steps_to
from refimpl.model import ModelOutput, Route, backward, forward, logits
from refimpl.ops import IMPLEMENTATIONS
from refimpl.parameters import parameter_shapes

from grads.examples import RNG, TINY, TOKENS, read, stream
from random_parameters import random_parameters


def split(gradients: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A model's gradients under a checkpoint's names, the experts one by one."""
    found = {}
    for name, x in gradients.items():
        if ".experts." in name:
            found |= {name.replace(".experts.", f".experts.{e}."): part for e, part in enumerate(x)}
        else:
            found[name] = x
    return found


def expect_equal(
    out: Path, output: ModelOutput, params: dict[str, np.ndarray], gradients: dict[str, Any]
) -> None:
    """Gradients, logits, loss and routes of the model, bit for bit."""
    found, wanted = read(out), split(gradients)
    assert {name.removeprefix("grad/") for name in found if name.startswith("grad/")} == set(wanted)
    wrong = [name for name, x in wanted.items() if not np.array_equal(found[f"grad/{name}"], x)]
    assert not wrong
    assert np.array_equal(found["out/logits"], logits(params, output.hidden))
    assert {n for n in found if "routes" in n} == {f"aux/routes.{layer}" for layer in output.routes}
    for layer, route in output.routes.items():
        assert np.array_equal(found[f"aux/routes.{layer}"], route.indices)
        assert np.array_equal(found[f"aux/load.{layer}"], output.loads[layer])
        assert found[f"aux/weights.{layer}"].shape == route.indices.shape
    if output.loss is not None:
        assert found["out/loss"] == output.loss
        assert found["out/main"] == output.main


UNTIED = replace(TINY, conventions=Conventions(mtp_hidden="raw_first", balance_counts="routed"))
CONFIGS = {
    "tiny": TINY,
    "tied": replace(TINY, tied=True),
    "variant": model_variant(TINY, Conventions()),
    "variant, normed": model_variant(TINY, Conventions(), "normed"),
    "raw first": UNTIED,
    "no dense layer, no group": replace(TINY, dense_layers=0, groups=1, keep_groups=1),
    "dense alone": replace(TINY, dense_layers=3, mtp_depth=0),
    "three modules": replace(TINY, layers=2, mtp_depth=3),
    "larger than a block": replace(TINY, vocabulary=2 * ROWS + 5, mtp_depth=1),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_whole_loss(name: str, tmp_path: Path) -> None:
    """With MTP and balance: the model's loss and gradients, bit for bit."""
    config = CONFIGS[name]
    params = random_parameters(config)
    tokens = RNG.integers(0, config.vocabulary, (2, 12))
    output, saved = forward(params, tokens, config)
    result = stream(
        params,
        config,
        tmp_path / "out",
        tokens,
        mtp=config.mtp_depth > 0,
        balance_alpha=config.balance_weight,
    )
    gradients = backward(saved)
    expect_equal(tmp_path / "out", output, params, gradients)
    assert [result.loss, result.main, result.mtp] == [output.loss, output.main, output.mtp]
    assert result.balance == output.balance
    assert not (tmp_path / "out" / "unfinished").exists()
    for name, x in split(gradients).items():
        size = result.gradients[name]
        assert (size.elements, size.largest) == (x.size, np.abs(x).max())
        np.testing.assert_allclose(size.norm, np.linalg.norm(x), rtol=1e-13)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_default_loss(implementation: str, dtype: Any, tmp_path: Path) -> None:
    """What Hugging Face computes: no MTP, no balance loss, whatever the config says."""
    config, params = (
        replace(TINY, mtp_depth=0, balance_weight=0.0),
        random_parameters(TINY, dtype=dtype),
    )
    plain = {name: params[name] for name in parameter_shapes(config)}
    output, saved = forward(plain, TOKENS, config, ops=IMPLEMENTATIONS[implementation])
    stream(params, TINY, tmp_path / "out", implementation=implementation)
    expect_equal(tmp_path / "out", output, plain, backward(saved))
    found = read(tmp_path / "out")
    z = found["out/logits"].astype(np.float64)
    log_p = z - np.logaddexp.reduce(z, axis=-1, keepdims=True)
    each = -np.take_along_axis(log_p[:, :-1], TOKENS[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(
        found["out/loss_per_token"][:, :-1], each, rtol=0, atol=50 * np.finfo(dtype).eps
    )
    assert not found["out/loss_per_token"][:, -1].any()
    np.testing.assert_allclose(found["out/loss"], each.mean(), rtol=20 * np.finfo(dtype).eps)
    assert {x.dtype for n, x in found.items() if n[:4] in ("grad", "out/")} == {np.dtype(dtype)}


@pytest.mark.parametrize(
    "given",
    [
        {"mtp": True, "balance_alpha": 0.02, "split": "rows=1+1"},
        {"targets": np.where(TOKENS % 3, TOKENS, -100), "mask": TOKENS % 3 != 0},
    ],
    ids=["every loss", "targets"],
)
def test_numba_cpu(given: dict[str, Any], tmp_path: Path) -> None:
    """The reference's numbers in float64 but for rounding, every activation, and units of every
    type."""
    pytest.importorskip("numba")
    params = random_parameters(TINY)
    given |= {"activations": "*", "reruns": 1, "units": ("float64", "float32", "bfloat16")}
    for name in ("reference", "numba_cpu"):
        stream(params, TINY, tmp_path / name, implementation=name, **given)
    wanted, found = read(tmp_path / "reference"), read(tmp_path / "numba_cpu")
    assert wanted.keys() == found.keys()
    for name, x in wanted.items():
        assert found[name].dtype == x.dtype
        if x.dtype.kind == "f":
            assert np.max(np.abs(found[name] - x)) <= 1e-12 * np.max(np.abs(x), initial=1e-3), name
        else:
            assert np.array_equal(found[name], x), name
    index = json.loads((tmp_path / "numba_cpu" / "index.json").read_text())
    assert index["metadata"]["implementation"] == "numba_cpu"
    units = [x["units"] for x in index["tensors"].values() if "units" in x]
    assert all(unit is not None for each in units for unit in each.values())


def test_masks_and_targets(tmp_path: Path) -> None:
    """Loss mask, padding and own targets go where the model puts them."""
    config, params = TINY, random_parameters(TINY)
    given = {
        "mask": (RNG.random(TOKENS.shape) < 0.7) & (np.arange(12) < np.array([[11], [8]])),
        "key_mask": np.arange(12) < np.array([[12], [9]]),
        "targets": RNG.integers(0, 256, TOKENS.shape),
    }
    for number, names in enumerate(
        (["mask"], ["key_mask"], ["mask", "key_mask"], ["targets"], list(given))
    ):
        chosen: Any = {name: given[name] for name in names}
        output, saved = forward(params, TOKENS, config, **chosen)
        stream(
            params,
            config,
            tmp_path / str(number),
            mtp=True,
            balance_alpha=config.balance_weight,
            **chosen,
        )
        expect_equal(tmp_path / str(number), output, params, backward(saved))
        found = read(tmp_path / str(number))
        np.testing.assert_allclose(
            found["out/loss_per_token"].sum() / found["in/mask"].sum(), output.main, rtol=1e-14
        )


def test_documents_and_positions(tmp_path: Path) -> None:
    """Segments and positions go where the model puts them, MTP's too, and are written."""
    params = random_parameters(TINY)
    segments = np.repeat([[1, 2, 4], [1, 1, 2]], 4, axis=1)
    positions = np.arange(12) - np.array([[0] * 4 + [4] * 4 + [8] * 4, [0] * 8 + [8] * 4])
    plain, _ = forward(params, TOKENS, TINY)
    cases: list[dict[str, Any]] = [
        {"segments": segments},
        {"positions": positions},
        {"positions": 3 * np.arange(12), "segments": segments},
    ]
    for number, given in enumerate(cases):
        output, saved = forward(params, TOKENS, TINY, **given)
        out = tmp_path / str(number)
        stream(params, TINY, out, mtp=True, balance_alpha=TINY.balance_weight, **given)
        expect_equal(out, output, params, backward(saved))
        assert output.loss != plain.loss
        found = read(out)
        for name in ("segments", "positions"):
            assert (f"in/{name}" in found) == (name in given)
            if name in given:
                wanted = np.broadcast_to(given[name], TOKENS.shape)
                assert np.array_equal(found[f"in/{name}"], wanted)


def test_the_index(tmp_path: Path) -> None:
    """What the index says of the whole; an array that has two names is stored once."""
    config, params = replace(TINY, mtp_depth=0), random_parameters(TINY)
    routes = forward(params, TOKENS, TINY)[0].routes
    stream(params, TINY, tmp_path / "out", routes=routes, activations="*", balance_alpha=0.5)
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    settings = {**asdict(replace(config, balance_weight=0.5))}
    assert index["metadata"] == json.loads(
        json.dumps(
            {
                "format": 1,
                "kind": "model",
                "refimpl": __version__,
                "numpy": np.__version__,
                "dtype": "float64",
                "implementation": "reference",
                "backend": "numpy",
                "config": settings,
                "checkpoint": None,
                "request": {
                    "mtp": False,
                    "balance_alpha": 0.5,
                    "layers": None,
                    "only": "*",
                    "activations": "*",
                    "mtp_weight": None,
                    "loss": "cross_entropy",
                    "grpo": None,
                    "routes_given": True,
                    "fp8": None,
                    "convention": "official",
                },
                "units": None,
                "split": None,
            }
        )
    )
    same = {n: e["same_as"] for n, e in index["tensors"].items() if "same_as" in e}
    names = [f"cot/model.layers.{layer}" for layer in range(3)]
    assert same == {f"{name}.self_attn": f"{name}.after_attention" for name in names}
    stream(params, TINY, tmp_path / "some", activations="*.self_attn", only="model.norm*")
    some, every = read(tmp_path / "some"), read(tmp_path / "out")
    assert {name for name in some if name.startswith("cot/")} == set(same)
    assert not (tmp_path / "some" / "grad-layer-00000.safetensors").exists()
    assert all(some[f"act/{name[4:]}"].shape == every[name].shape for name in same)


@pytest.mark.parametrize("tied", [False, True])
def test_from_dlogits(tied: bool, tmp_path: Path) -> None:
    """The backward alone: of any loss, from its gradient by the logits."""
    config = replace(TINY, tied=tied, mtp_depth=0)
    params, dlogits = random_parameters(config), RNG.normal(size=(*TOKENS.shape, 256))
    output, saved = forward(params, TOKENS, config, with_loss=False)
    result = stream(params, config, tmp_path / "out", dlogits=dlogits)
    expect_equal(tmp_path / "out", output, params, backward(saved, dlogits=dlogits))
    assert result.loss is None
    assert not (tmp_path / "out" / "out.safetensors").exists()


@pytest.mark.parametrize("counts", ["unbiased", "routed"])
def test_replayed_routes(counts: str, tmp_path: Path) -> None:
    """Other routes than the model's own are followed, in forward and backward, MTP's too; what
    counts as well."""
    config = replace(TINY, conventions=Conventions(balance_counts=counts))
    params = random_parameters(config)
    own, _ = forward(params, TOKENS, config)
    other = {
        layer: np.argsort(RNG.random((*r.indices.shape[:2], 8)))[..., :3]
        for layer, r in own.routes.items()
    }
    for name, routes in {
        "with counts": {layer: Route(x, RNG.permutation(x)) for layer, x in other.items()},
        "without": {layer: Route(x, None) for layer, x in other.items()},
    }.items():
        full = routes
        if name == "without":  # the balance loss then counts what the convention says
            full = {
                layer: Route(x, x if counts == "routed" else None) for layer, x in other.items()
            }
        output, saved = forward(params, TOKENS, config, routes=full)
        assert output.loss != own.loss
        stream(
            params,
            config,
            tmp_path / name,
            mtp=True,
            balance_alpha=config.balance_weight,
            routes=routes,
        )
        expect_equal(tmp_path / name, output, params, backward(saved))


def test_the_backward_replays_the_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where recomputation would choose other experts, the routes of the first forward hold."""
    params, seen = random_parameters(TINY), []
    op = IMPLEMENTATIONS["reference"]["router"]

    def noted(*args: Any, routes: Any = None, **kwargs: Any) -> Any:
        seen.append(routes is not None)
        return op.forward(*args, routes=routes, **kwargs)

    noting = IMPLEMENTATIONS["reference"] | {"router": op._replace(forward=noted)}
    monkeypatch.setitem(IMPLEMENTATIONS, "reference", noting)
    stream(params, TINY, tmp_path / "out", mtp=True)
    assert seen == [False] * 4 + [True] * 4


@pytest.mark.parametrize("layers", [1, 2])
def test_some_layers(layers: int, tmp_path: Path) -> None:
    """The first layers, then final norm and head: the model that a config of so many layers has."""
    whole = replace(TINY, dense_layers=2)
    config = replace(whole, layers=layers, dense_layers=layers, mtp_depth=0, balance_weight=0.0)
    params = random_parameters(whole)
    fewer = {name: params[name] for name in parameter_shapes(config)}
    output, saved = forward(fewer, TOKENS, config)
    stream(params, whole, tmp_path / "out", layers=layers)
    expect_equal(tmp_path / "out", output, fewer, backward(saved))


def test_the_order_of_the_steps() -> None:
    """The forward upwards, then the backward downwards, as far as a gradient that is wanted."""
    forward = [("embedding",), *(("forward", layer) for layer in range(5)), ("head",)]
    backward = [("backward", 4), ("backward", 3), ("norm",)]
    backward += [("backward", 2), ("backward", 1), ("backward", 0), ("lookup",)]
    assert steps_to(TINY, gradient_shapes(TINY)) == forward + backward
    assert steps_to(TINY, ["lm_head.weight"], ["model.layers.1"]) == forward + backward[:5]
    assert steps_to(TINY, ["lm_head.weight"], ["model.norm"]) == forward + backward[:3]
    for name, last in {
        "model.embed_tokens.weight": 7,
        "model.layers.1.mlp.gate.weight": 5,
        "model.norm.weight": 3,
        "lm_head.weight": 2,  # its last part comes from the first MTP module
        "model.layers.4.eh_proj.weight": 1,
    }.items():
        assert steps_to(TINY, [name]) == forward + backward[:last]
    alone = replace(TINY, mtp_depth=0)
    assert steps_to(alone, ["lm_head.weight"])[-1] == ("head",)


@pytest.mark.parametrize(
    ("pattern", "steps"),
    [
        ("model.layers.2.*", 7),
        ("*.experts.5.up_proj.weight", 8),
        ("lm_head.weight", 5),
        ("model.embed*", 10),
    ],
)
def test_only(pattern: str, steps: int, tmp_path: Path) -> None:
    """Some gradients, the same bits; the backward goes no further down than it must."""
    config = replace(TINY, mtp_depth=0)
    params = random_parameters(replace(TINY, mtp_depth=0))
    done = []
    stream(params, config, tmp_path / "all")
    request = Request(TOKENS, only=pattern)
    write_gradients(
        MemorySource(params, config),
        request,
        tmp_path / "some",
        progress=lambda step, number, total: done.append((step, total)),
    )
    every, some = read(tmp_path / "all"), read(tmp_path / "some")
    wanted = {f"grad/{n}" for n in gradient_shapes(config) if Path(n).match(pattern)}
    assert {n for n in some if n.startswith("grad/")} == wanted
    assert all(np.array_equal(every[name], x) for name, x in some.items())
    assert done[-1] == ("done", steps)


def test_activations(tmp_path: Path) -> None:
    """Each is what its name says, by way of the model's saved values."""
    config, params = TINY, random_parameters(TINY)
    output, saved = forward(params, TOKENS, config)
    result = stream(params, config, tmp_path / "out", mtp=True, activations="*", logits=False)
    found = {name[4:]: x for name, x in read(tmp_path / "out").items() if name.startswith("act/")}
    assert set(result.activations) == set(found)
    assert "out/logits" not in read(tmp_path / "out")
    blocks = [*saved.blocks, *(module.block for module in saved.mtp)]
    assert np.array_equal(found["model.embed_tokens"], blocks[0].attention.norm.x)
    assert np.array_equal(found["model.norm"], output.hidden)
    for layer, block in enumerate(blocks):
        name = f"model.layers.{layer}"
        assert np.array_equal(found[f"{name}.after_attention"], block.network.norm.x)
        attended = found[f"{name}.self_attn"]
        assert np.array_equal(block.attention.norm.x + attended, block.network.norm.x)
        if layer:
            assert np.array_equal(found[f"{name}.mlp.gate.scores"], block.network.router.scores)
    inputs = [block.attention.norm.x for block in blocks[1:3]] + [saved.norm.x]
    outputs = inputs + [module.norm.x for module in saved.mtp]
    assert all(np.array_equal(found[f"model.layers.{layer}"], x) for layer, x in enumerate(outputs))
    stream(params, config, tmp_path / "some", activations="*.gate.scores")
    assert sorted(n for n in read(tmp_path / "some") if n.startswith("act/")) == [
        "act/model.layers.1.mlp.gate.scores",
        "act/model.layers.2.mlp.gate.scores",
    ]


def test_cotangents(tmp_path: Path) -> None:
    """Of those between the parts, each makes the gradients of what its activation is made of: the
    table's rows, the norm's weight, and the weights of the last product that joins a layer's
    output."""
    config = replace(TINY, mtp_depth=0, balance_weight=0.0)
    params = random_parameters(config)
    stream(params, config, tmp_path / "out", activations="*")
    found = read(tmp_path / "out")
    cot = {name[4:]: x for name, x in found.items() if name.startswith("cot/")}
    table = np.zeros_like(params["model.embed_tokens.weight"])
    np.add.at(table, TOKENS, cot["model.embed_tokens"])
    np.testing.assert_allclose(table, found["grad/model.embed_tokens.weight"], rtol=0, atol=1e-15)
    scaled = (
        np.sum(cot["model.norm"] * found["act/model.norm"], axis=(0, 1))
        / params["model.norm.weight"]
    )
    np.testing.assert_allclose(scaled, found["grad/model.norm.weight"], rtol=1e-12, atol=1e-14)
    _, saved = forward(params, TOKENS, config)
    for layer in range(config.layers):
        last = (
            saved.blocks[layer].network.ffn
            if layer < config.dense_layers
            else saved.blocks[layer].network.moe.shared
        )
        name = f"model.layers.{layer}.mlp" + (
            "" if layer < config.dense_layers else ".shared_experts"
        )
        hidden = last.down.x.reshape(
            -1, last.down.x.shape[-1]
        )  # what down_proj, whose output joins the layer's, reads
        dy = cot[f"model.layers.{layer}"].reshape(-1, config.width)
        np.testing.assert_allclose(
            dy.T @ hidden, found[f"grad/{name}.down_proj.weight"], rtol=0, atol=1e-15
        )


def test_padding_in_front_alone_asks_for_a_convention() -> None:
    """Padding behind the tokens, or none, leaves the loss the same under all of them."""
    for row, asks in (([0, 0, 1, 1], True), ([1, 1, 0, 0], False), ([1, 1, 1, 1], False)):
        key_mask = np.array([[1, 1, 1, 1], row], bool)
        request = Request(TOKENS[:, :4], key_mask=key_mask)
        assert request.targets_after_padding(TINY) == asks, row


def test_one_position() -> None:
    """It has no next token, but may be given a target."""
    request = Request(TOKENS[:, :1], targets=TOKENS[:, 1:2])
    assert request.batch(request.config(TINY)).targets.tolist() == TOKENS[:, 1:2].tolist()
    with pytest.raises(ValueError, match=r"T of at least 2, got \(2, 1\)"):
        Request(TOKENS[:, :1]).batch(TINY)


@pytest.mark.parametrize("wrong", ["routes", "counted"])
def test_routes_of_a_wrong_shape_are_named(wrong: str) -> None:
    source = MemorySource(random_parameters(TINY), TINY)
    routes = forward(source.params, TOKENS, TINY)[0].routes
    for layer in [*routes]:
        whole = routes.pop(layer).indices
        given = {"routes": whole, "counted": whole} | {wrong: whole[:, 1:]}
        if layer < TINY.layers:
            routes[layer] = Route(given["routes"], given["counted"])
    with pytest.raises(ValueError, match=rf"routes of layer 1 \({wrong}\) must have shape"):
        Request(TOKENS, routes=routes).check(source)


def test_logits_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """24 positions, 5 at a time; the index says in which type and how all was computed."""
    params = random_parameters(TINY)
    monkeypatch.setattr("refimpl.grads.steps.TOKENS", 5)
    stream(params, TINY, tmp_path, only="model.norm.weight", logits=True)
    wanted = logits(params, forward(params, TOKENS, TINY)[0].hidden)
    np.testing.assert_allclose(read(tmp_path)["out/logits"], wanted, rtol=0, atol=1e-13)
    metadata = json.loads((tmp_path / "index.json").read_text())["metadata"]
    assert (metadata["dtype"], metadata["implementation"]) == ("float64", "reference")
