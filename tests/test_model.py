"""The whole model: its gradient under every convention, its ways in and out, its masks, and the
table of ops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from refimpl.batch import Whole
from refimpl.check import MODEL_FD_TOLERANCE, MODEL_VALIDITY, RULES, check
from refimpl.check.cases import RandomDraw, model_case
from refimpl.config import CONVENTIONS, Conventions, ModelConfig, preset
from refimpl.model import BlockInput, backward, forward, logits
from refimpl.ops import (
    IMPLEMENTATIONS,
    REFERENCE,
    Op,
    cross_entropy_backward,
    cross_entropy_forward,
    log_prob_backward,
    log_prob_forward,
)
from refimpl.parameters import init_parameters, is_buffer, parameter_shapes

from random_parameters import random_parameters
from support import FULL

SMALL = replace(preset("tiny"), vocabulary=31, width=9, q_latent=5, heads=2, layers=2, mtp_depth=1)
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 31, (2, 9))


def largest_error(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """The largest difference of any tensor, over its largest value in ``b``."""
    assert list(a) == list(b)
    return max(np.max(np.abs(a[n] - b[n])) / max(np.max(np.abs(b[n])), 1e-300) for n in b)


def protocol(
    config: ModelConfig,
    convention: str = "official",
    implementation: str = "reference",
    seed: int = 0,
    rules: Sequence[str] = RULES,
) -> None:
    """The whole protocol on the model's loss, tensor by tensor."""
    case, names, pair = model_case(
        RandomDraw(seed),
        config=config,
        convention=convention,
        table=IMPLEMENTATIONS[implementation],
        length=7,
    )
    report = check(
        *pair,
        case.inputs,
        replay=case.replay,
        op="model",
        names=names,
        difference_tolerance=MODEL_FD_TOLERANCE,
        validity=MODEL_VALIDITY,
        seed=seed,
        rules=rules,
    )
    assert report.ok, str(report)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_protocol(implementation: str) -> None:
    protocol(SMALL, implementation=implementation)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_protocol_of_conventions(convention: str) -> None:
    protocol(replace(SMALL, layers=1, dense_layers=0, mtp_depth=2), convention)


def test_protocol_of_v2() -> None:
    """No query compression, softmax gate, no normalisation, no bias, no MTP."""
    protocol(
        replace(
            SMALL,
            q_latent=None,
            gate="softmax",
            group_score="max",
            gate_bias=False,
            normalise_weights=False,
            mtp_depth=0,
        )
    )


@pytest.mark.parametrize("seed", range(6 if FULL else 1))
def test_protocol_of_tiny(seed: int) -> None:
    """With differences too in make verify and in make test-full."""
    protocol(preset("tiny"), seed=seed, rules=RULES if FULL else ("contract", "noise"))


OTHER = [
    {"mtp_order": "hidden_embedding"},
    {"mtp_hidden": "raw"},
    {"mtp_hidden": "raw_first"},
    {"mtp_hidden": "normed_first"},
    {"mtp_normaliser": "valid"},
    {"mtp_normaliser": "main"},
    {"mtp_zero_first_embedding": True},
    {"masked_groups": "zero"},
    {"balance_counts": "routed"},
    {"gate_epsilon": 0.1},
    {"latent_eps": "class_default"},
    {"rope_layout": "halves"},
]


@pytest.mark.parametrize("change", OTHER, ids=lambda c: "=".join(map(str, *c.items())))
def test_every_convention_changes_the_loss_and_keeps_its_gradient(change: dict[str, Any]) -> None:
    """Each field of the record moves the loss; the directional derivative over all parameters
    follows it."""
    config = replace(SMALL, mtp_depth=2, conventions=Conventions(**change))
    params = random_parameters(config)
    for name in params:
        if is_buffer(name):
            params[name] = params[name] - 1.5  # negative: masking with 0 or -inf differs
    default, _ = forward(params, TOKENS, replace(config, conventions=Conventions()))
    output, saved = forward(params, TOKENS, config)
    assert abs(output.loss - default.loss) > 1e-9
    grads = backward(saved)
    direction = {n: np.random.default_rng(1).normal(size=g.shape) for n, g in grads.items()}
    slope = sum(np.sum(g * direction[n]) for n, g in grads.items())

    def loss(h: float) -> Any:
        moved = {n: p + h * direction[n] if n in direction else p for n, p in params.items()}
        return forward(moved, TOKENS, config, routes=output.routes)[0].loss

    h = 1e-4
    difference = (8 * (loss(h) - loss(-h)) - (loss(2 * h) - loss(-2 * h))) / (12 * h)
    assert abs(difference - slope) <= 1e-8 * abs(slope)


def test_normed_first_is_normed_for_one_module_and_raw_for_the_later_ones() -> None:
    """Module 1 reads what it reads under `normed`; the state that module 2 reads is none of the
    other chains'."""
    config = replace(SMALL, mtp_depth=2)
    params = random_parameters(config)
    losses = {
        chain: forward(params, TOKENS, replace(config, conventions=Conventions(mtp_hidden=chain)))[
            0
        ].mtp
        for chain in ("normed", "raw", "raw_first", "normed_first")
    }
    assert losses["normed_first"][0] == losses["normed"][0] != losses["raw"][0]
    assert len({float(mtp[1]) for mtp in losses.values()}) == 4


def test_softmax_ranking_is_the_softmax_gates_alone() -> None:
    """It moves the routes of a softmax gate with groups; a sigmoid gate does not know it."""
    params = random_parameters(SMALL, std=1.0)
    logits_ranked = Conventions(softmax_ranking="logits")
    for gate, same in (("sigmoid", True), ("softmax", False)):
        config = replace(SMALL, gate=gate)
        routes = [
            forward(params, TOKENS, replace(config, conventions=c))[0].routes
            for c in (Conventions(), logits_ranked)
        ]
        equal = [np.array_equal(routes[0][i].indices, routes[1][i].indices) for i in routes[0]]
        assert all(equal) == same


def test_a_gradient_for_every_parameter() -> None:
    params = random_parameters(SMALL)
    _, saved = forward(params, TOKENS, SMALL)
    grads = backward(saved)
    assert list(grads) == [name for name in parameter_shapes(SMALL) if not is_buffer(name)]
    assert all(
        grads[n].shape == params[n].shape and grads[n].dtype == params[n].dtype for n in grads
    )
    assert all(np.any(g) for g in grads.values())


def test_from_dlogits() -> None:
    """The main loss by way of whole logits gives the gradients that the fused head gives."""
    config = replace(SMALL, mtp_depth=0, balance_weight=0.0)
    params = random_parameters(config)
    output, saved = forward(params, TOKENS, config)
    z = logits(params, output.hidden)
    targets = np.concatenate([TOKENS[:, 1:], TOKENS[:, -1:]], axis=1)
    mask = np.arange(9) < 8
    loss, ce = cross_entropy_forward(z, targets=targets, mask=np.broadcast_to(mask, targets.shape))
    assert abs(loss - output.main) <= 1e-14 * abs(loss)
    fused, whole = backward(saved), backward(saved, dlogits=cross_entropy_backward(1.0, ce))
    assert largest_error(whole, fused) <= 1e-13


def test_from_dhidden() -> None:
    """log_prob's gradient of the hidden states, and of the head, is all that another loss needs
    (GRPO's way)."""
    config = replace(SMALL, mtp_depth=0, balance_weight=0.0)
    params = random_parameters(config)
    output, saved = forward(params, TOKENS, config, with_loss=False)
    assert output.loss is None
    targets, weight = np.roll(TOKENS, -1, axis=1), RNG.normal(size=TOKENS.shape)
    _, lp = log_prob_forward(
        output.hidden, params["lm_head.weight"], targets=targets, temperature=0.7
    )
    dh, dw = log_prob_backward(weight, lp)
    grads = backward(saved, dhidden=dh)
    grads["lm_head.weight"] = grads["lm_head.weight"] + dw
    z = logits(params, output.hidden)
    p = np.exp(z / 0.7 - np.logaddexp.reduce(z / 0.7, axis=-1, keepdims=True))
    dz = weight[..., None] * (np.eye(31)[targets] - p) / 0.7
    assert largest_error(grads, backward(saved, dlogits=dz)) <= 1e-13


def test_gradients_add_up() -> None:
    """dloss, dlogits and dhidden given together are the sum of each alone; the backward is linear
    in them."""
    params = random_parameters(SMALL)
    output, saved = forward(params, TOKENS, SMALL)
    dz, dh = RNG.normal(size=(2, 9, 31)), RNG.normal(size=output.hidden.shape)
    parts = [backward(saved, dloss=0.3), backward(saved, dlogits=dz), backward(saved, dhidden=dh)]
    summed = {n: parts[0][n] + parts[1][n] + parts[2][n] for n in parts[0]}
    assert largest_error(backward(saved, dloss=0.3, dlogits=dz, dhidden=dh), summed) <= 1e-13
    assert (
        largest_error(backward(saved, dloss=0.6), {n: 2 * g for n, g in parts[0].items()}) <= 1e-15
    )


@pytest.mark.parametrize("implementation", ["flash", "absorbed"])
def test_implementations_plug_in_by_name(implementation: str) -> None:
    params = random_parameters(SMALL)
    a, a_saved = forward(params, TOKENS, SMALL)
    b, b_saved = forward(params, TOKENS, SMALL, ops=IMPLEMENTATIONS[implementation])
    assert abs(a.loss - b.loss) <= 1e-14 * abs(a.loss)
    assert largest_error(backward(b_saved), backward(a_saved)) <= 1e-12


OTHERS = {
    "cross_entropy",
    "grpo",
    "preference_loss",
}  # of whole logits, of log-probabilities, of two hidden states


def test_every_op_of_the_table_is_used() -> None:
    """A counter in each entry: forward and backward call all of the table but the losses that start
    elsewhere."""
    calls: dict[str, set[str]] = {}

    def counted(name: str, pair: Op) -> Op:
        def note(which: str, function: Any) -> Any:
            def run(*args: Any, **kwargs: Any) -> Any:
                calls.setdefault(name, set()).add(which)
                return function(*args, **kwargs)

            return run

        return Op(note("forward", pair.forward), note("backward", pair.backward))

    _, saved = forward(
        random_parameters(SMALL),
        TOKENS,
        SMALL,
        ops=REFERENCE | {n: counted(n, pair) for n, pair in REFERENCE.items()},
    )
    backward(saved)
    assert calls == {name: {"forward", "backward"} for name in REFERENCE if name not in OTHERS}


def test_replayed_routes_are_bitwise_the_same() -> None:
    params = random_parameters(SMALL)
    first, saved = forward(params, TOKENS, SMALL)
    again, saved_again = forward(params, TOKENS, SMALL, routes=first.routes)
    assert again.loss == first.loss
    assert all(
        np.array_equal(a, b)
        for a, b in zip(backward(saved).values(), backward(saved_again).values(), strict=True)
    )


RECOMPUTED = {  # changes of SMALL, arguments of forward and of backward
    "loss": ({}, {}, {}),
    "padding": ({}, {"key_mask": np.arange(9) >= np.array([[0], [3]])}, {}),
    "documents": ({}, {"segments": np.repeat([[0, 1, 2], [0, 0, 1]], 3, axis=1)}, {}),
    "two raw modules": ({"mtp_depth": 2, "mtp_hidden": "raw"}, {}, {"dloss": 0.5}),
    "blind queries": (
        {"blind_query": "mean"},
        {"key_mask": np.arange(9) >= np.array([[0], [3]])},
        {},
    ),
    "a part": ({}, {"follow": 2, "whole": Whole(20.0, (18.0,), 3.0)}, {}),
    "dense": ({"dense_layers": 2, "mtp_depth": 0}, {}, {}),
    "flash": ({}, {"ops": IMPLEMENTATIONS["flash"]}, {}),
    "absorbed": ({}, {"ops": IMPLEMENTATIONS["absorbed"]}, {}),
    "no loss": ({}, {"with_loss": False}, {"dhidden": np.ones((2, 9, 9))}),
}


@pytest.mark.parametrize("name", RECOMPUTED)
def test_recomputed_blocks_change_no_bit(name: str) -> None:
    """Outputs and gradients are bit for bit those of saved activations, and nothing but a block's
    input, its batch and its choices is kept."""
    changes, given, cotangents = RECOMPUTED[name]
    conventions = {key: value for key, value in changes.items() if hasattr(Conventions, key)}
    config = replace(
        SMALL,
        conventions=replace(SMALL.conventions, **conventions),
        **{key: value for key, value in changes.items() if key not in conventions},
    )
    params = random_parameters(config)
    wanted, kept = forward(params, TOKENS, config, **given)
    output, saved = forward(params, TOKENS, config, **given, recompute=True)
    for a, b in zip(arrays_of(output), arrays_of(wanted), strict=True):
        np.testing.assert_array_equal(a, b)
    blocks = [*saved.blocks, *(module.block for module in saved.mtp)]
    assert {type(block) for block in blocks} == {BlockInput}
    grads, exact = backward(saved, **cotangents), backward(kept, **cotangents)
    assert list(grads) == list(exact)
    for key in exact:
        np.testing.assert_array_equal(grads[key], exact[key], err_msg=key)


def arrays_of(x: Any) -> list[np.ndarray]:
    """Every array in nested tuples, lists and dicts, in their order."""
    if isinstance(x, dict):
        x = list(x.values())
    if isinstance(x, tuple | list):
        return [array for part in x for array in arrays_of(part)]
    return [] if x is None else [np.asarray(x)]


def test_recomputed_blocks_replay_their_routes() -> None:
    """A router that chooses differently at every call is replayed: the gradients are those of the
    routes that the output tells, and loads are counted once."""
    rng = np.random.default_rng(1)

    def restless(x: np.ndarray, w: np.ndarray, *, routes: Any, top_k: int, **settings: Any) -> Any:
        if routes is None:
            order = rng.random((*x.shape[:2], w.shape[0])).argsort(axis=-1)
            routes = order[..., :top_k]
        return REFERENCE.router.forward(x, w, routes=routes, top_k=top_k, **settings)

    config, params = SMALL, random_parameters(SMALL)
    ops = REFERENCE | {"router": Op(restless, REFERENCE.router.backward)}
    output, saved = forward(params, TOKENS, config, ops=ops, recompute=True)
    wanted, kept = forward(params, TOKENS, config, routes=output.routes)
    assert output.loss == wanted.loss
    for layer, load in wanted.loads.items():
        np.testing.assert_array_equal(output.loads[layer], load)
    grads, exact = backward(saved), backward(kept)
    assert all(np.array_equal(grads[key], exact[key]) for key in exact)


def test_loads_count_every_choice() -> None:
    output, _ = forward(random_parameters(SMALL), TOKENS, SMALL)
    assert {layer: int(load.sum()) for layer, load in output.loads.items()} == {
        1: 2 * 9 * 3,
        2: 2 * 8 * 3,
    }


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side: str) -> None:
    """Losses and all gradients of a padded sequence are those of the sequence alone (each its own
    mean)."""
    config = replace(SMALL, mtp_depth=2, conventions=Conventions(mtp_normaliser="valid"))
    params, tokens = random_parameters(config), TOKENS[:1, :7]
    pad = ((0, 0), (3, 0) if side == "left" else (0, 3))
    key_mask = np.pad(np.ones((1, 7), dtype=bool), pad)
    positions = np.pad(np.arange(7)[None], pad)
    a, a_saved = forward(params, tokens, config)
    b, b_saved = forward(
        params, np.pad(tokens, pad), config, key_mask=key_mask, positions=positions
    )
    for x, y in zip([a.loss, a.main, *a.mtp], [b.loss, b.main, *b.mtp], strict=True):
        assert abs(x - y) <= 1e-14 * abs(x)
    assert {n: x.tolist() for n, x in a.loads.items()} == {
        n: x.tolist() for n, x in b.loads.items()
    }
    assert largest_error(backward(b_saved), backward(a_saved)) <= 1e-12


def test_packed_documents_are_separate() -> None:
    """Two documents in one row, with segments and restarted positions, give the states of the two
    alone."""
    params = random_parameters(SMALL)
    segments, positions = np.array([[0] * 4 + [1] * 5]), np.array([[*range(4), *range(5)]])
    packed, _ = forward(params, TOKENS[:1], SMALL, segments=segments, positions=positions)
    first, _ = forward(params, TOKENS[:1, :4], SMALL)
    second, _ = forward(params, TOKENS[:1, 4:], SMALL)
    np.testing.assert_allclose(packed.hidden[:, :4], first.hidden, rtol=0, atol=1e-13)
    np.testing.assert_allclose(packed.hidden[:, 4:], second.hidden, rtol=0, atol=1e-13)
    assert abs(packed.main * 7 - (first.main * 3 + second.main * 4)) <= 1e-12


def test_float32_stays_float32() -> None:
    params = {n: p.astype(np.float32) for n, p in random_parameters(SMALL).items()}
    output, saved = forward(params, TOKENS, SMALL)
    assert output.hidden.dtype == output.loss.dtype == np.float32
    assert {g.dtype for g in backward(saved).values()} == {np.dtype(np.float32)}


def test_a_step_downhill_lowers_the_loss() -> None:
    params = init_parameters(SMALL, seed=1, std=0.05, dtype=np.float64)
    output, saved = forward(params, TOKENS, SMALL)
    grads = backward(saved)
    moved = {n: p - 0.05 * grads[n] if n in grads else p for n, p in params.items()}
    assert forward(moved, TOKENS, SMALL)[0].loss < output.loss - 0.01


def test_errors() -> None:
    params = random_parameters(SMALL)
    with pytest.raises(
        ValueError,
        match=r"lm_head.weight is missing.*model.norm.weight must have shape \(9,\), got \(3,\)",
    ):
        forward(
            {
                n: p[:3] if n == "model.norm.weight" else p
                for n, p in params.items()
                if "lm_head" not in n
            },
            TOKENS,
            SMALL,
        )
    with pytest.raises(ValueError, match="extra is not a parameter of this config"):
        forward(params | {"extra": np.ones(1)}, TOKENS, SMALL)
    with pytest.raises(ValueError, match=r"tokens must have shape \(B, T\)=.*, got \(14,\)"):
        forward(params, np.zeros(14, int), SMALL)
    with pytest.raises(ValueError, match="tokens must lie in 0…30, got 31…31"):
        forward(params, np.full((1, 4), 31), SMALL)
    with pytest.raises(
        ValueError, match=r"tokens must have shape \(B, T\) with T > mtp_depth=1, got \(2, 1\)"
    ):
        forward(params, TOKENS[:, :1], SMALL)
    output, saved = forward(params, TOKENS, SMALL, with_loss=False)
    with pytest.raises(ValueError, match=r"dhidden must have shape \(B, T, D\)=\(2, "):
        backward(saved, dhidden=output.hidden[:, :1])
    with pytest.raises(ValueError, match="dloss needs a forward with with_loss=True"):
        backward(saved, dloss=1.0)
    with pytest.raises(ValueError, match="dloss needs a forward with with_loss=True"):
        backward(saved)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@np.errstate(all="ignore")
def test_an_overflow_is_seen(implementation: str) -> None:
    """Embeddings × 1e20: float64 has a loss, float32, where their squares overflow, NaN, and no
    loss of a model whose norms gave zeros."""
    params = random_parameters(SMALL)
    params["model.embed_tokens.weight"] = 1e20 * params["model.embed_tokens.weight"]
    settings: dict[str, Any] = {"ops": IMPLEMENTATIONS[implementation]}
    right, _ = forward(params, TOKENS, SMALL, **settings)
    assert np.isfinite(right.loss)
    narrow = {name: p.astype(np.float32) for name, p in params.items()}
    found, saved = forward(narrow, TOKENS, SMALL, **settings)
    assert np.isnan(found.loss)
    unseen = [name for name, g in backward(saved).items() if not np.isnan(g).any()]
    assert unseen == []
