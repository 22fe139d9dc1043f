"""One call to every gradient: finite differences through the whole model, parts of a batch, what
sampling recorded, and the mistakes that are usually made by hand."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import array_api_strict as strict
import numpy as np
import pytest

from refimpl.check.cases import model_variant
from refimpl.config import ModelConfig, preset
from refimpl.generate import Generation, generate
from refimpl.model import Route, forward, logits
from refimpl.ops import GRPO_PRESETS, REFERENCE, Op, group_advantages
from refimpl.parameters import EMBEDDING, HEAD, is_buffer, parameter_shapes
from refimpl.train import policy
from refimpl.train.policy import (
    grpo_gradients,
    grpo_normaliser,
    log_probs,
    log_probs_backward,
    main_model,
    preference_gradients,
    replay,
    rewards,
)

import pretended_cupy
from random_parameters import random_parameters

TINY = preset("tiny")
CONFIGS = {
    "untied": TINY,
    "tied": replace(TINY, tied=True),
    "variant": model_variant(TINY, TINY.conventions),
}
Arrays = dict[str, Any]
LOSSES = GRPO_PRESETS | {
    "dr_grpo": GRPO_PRESETS["dr_grpo"] | {"length": 7},
    "v3.2": GRPO_PRESETS["v3.2"] | {"off_policy": 0.3},
    "left_out": {"empty": "left_out", "kl": "k2", "dual_clip": 2.0},
}


def samples(config: ModelConfig, left: bool = False) -> tuple[dict[str, np.ndarray], Arrays]:
    """Parameters, and six outputs of three questions with prompts of 2 and of 3 tokens, one output
    empty; off-policy, with a reference; routes of the very policy, which are replayed."""
    rng, params = np.random.default_rng(3), random_parameters(config)
    prompts, lengths = np.array([2, 2, 3, 3, 2, 2]), np.array([9, 6, 5, 3, 8, 9])
    width = 9
    row = np.arange(width)
    key_mask = row < lengths[:, None]
    mask = (row >= prompts[:, None] - 1) & (row < lengths[:, None] - 1)
    tokens = np.where(key_mask, rng.integers(0, config.vocabulary, key_mask.shape), 0)
    if left:
        for x in (tokens, key_mask, mask):
            for place, n in enumerate(lengths):
                x[place] = np.roll(x[place], width - n)
    now, saved = log_probs(params, config, tokens, key_mask=key_mask, temperature=0.8)
    old, reference = (now + size * rng.normal(size=now.shape) for size in (0.3, 0.5))
    advantages = group_advantages(rng.normal(size=(3, 2)) + np.array([[0.5, -0.5]]))
    return params, {
        "tokens": tokens,
        "mask": mask,
        "advantages": advantages,
        "old_log_prob": old,
        "reference_log_prob": reference,
        "key_mask": key_mask,
        "routes": saved.output.routes,
        "temperature": 0.8,
    }


def differences(
    params: dict[str, np.ndarray],
    gradients: dict[str, np.ndarray],
    loss: Callable[[dict[str, np.ndarray]], float],
    directions: int = 3,
) -> float:
    """The largest relative error of derivatives in random directions of length 1; the difference
    is of fourth order, and right ones measured at most 2.5e-10."""
    rng, h = np.random.default_rng(11), 2e-3
    worst = 0.0
    for _ in range(directions):
        way = {name: rng.normal(size=g.shape) for name, g in gradients.items()}
        length = np.sqrt(sum(np.sum(x * x) for x in way.values()))
        way = {name: x / length for name, x in way.items()}
        wanted = sum(float(np.sum(g * way[name])) for name, g in gradients.items())

        def at(h: float, way: dict[str, np.ndarray] = way) -> float:
            return loss(params | {name: params[name] + h * x for name, x in way.items()})

        found = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
        worst = max(worst, abs(found - wanted) / abs(wanted))
    return worst


def largest_difference(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """Of two sets of gradients, by the largest number of each tensor."""
    assert list(a) == list(b)
    return max(
        float(np.max(np.abs(a[name] - b[name])) / (np.max(np.abs(b[name])) or 1.0)) for name in a
    )


def of_the_loss(config: ModelConfig, given: Arrays, **options: Any) -> Callable[[Any], float]:
    """The loss from the logits of one forward, with no code of `policy` but `main_model`; what is
    clipped and dropped at first is replayed."""
    choices: Arrays = {}

    def loss(params: dict[str, np.ndarray]) -> float:
        own, small = main_model(params, config)
        forwarded = {name: given[name] for name in ("key_mask", "routes")}
        hidden = forward(own, given["tokens"], small, with_loss=False, **forwarded)[0].hidden
        z = logits(own, hidden) / given["temperature"]
        z = z - z.max(axis=-1, keepdims=True)
        each = z - np.log(np.sum(np.exp(z), axis=-1, keepdims=True))
        rows, places = np.indices(given["tokens"][:, 1:].shape)
        log_prob = np.zeros(given["tokens"].shape)
        log_prob[:, :-1] = each[rows, places, given["tokens"][:, 1:]]
        names = ("mask", "advantages", "old_log_prob", "reference_log_prob")
        arrays = {name: given[name] for name in names}
        output, _ = REFERENCE.grpo.forward(log_prob, **arrays, **choices, **options)
        choices.update(unclipped=output.unclipped, kept=output.kept)
        return float(output.loss)

    return loss


# GRPO


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_of_the_whole_model(name: str) -> None:
    """Finite differences in random directions of all parameters at once."""
    config = CONFIGS[name]
    for left in (False, True):
        params, given = samples(config, left)
        told, gradients = grpo_gradients(params, config, **given)
        loss = of_the_loss(config, given)
        assert abs(told.loss - loss(params)) <= 1e-13 * abs(told.loss)
        assert differences(params, gradients, loss) <= 1e-8


@pytest.mark.parametrize("variant", LOSSES)
def test_every_variant(variant: str) -> None:
    """Its gradient, and parts of the batch that add up to the whole, loss and gradients."""
    settings = LOSSES[variant]
    params, given = samples(TINY)
    told, gradients = grpo_gradients(params, TINY, **given, settings=settings)
    loss = of_the_loss(TINY, given, **settings)
    assert abs(told.loss - loss(params)) <= 1e-13 * abs(told.loss)
    assert differences(params, gradients, loss, directions=1) <= 1e-8
    normaliser = grpo_normaliser(given["mask"], settings)
    total, sums = 0.0, {name: np.zeros_like(g) for name, g in gradients.items()}
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        cut = {name: x[part] for name, x in given.items() if isinstance(x, np.ndarray)}
        routes = {
            layer: Route(r.indices[part], r.counted[part]) for layer, r in given["routes"].items()
        }
        some, more = grpo_gradients(
            params,
            TINY,
            **(given | cut | {"routes": routes}),
            settings=settings,
            normaliser=normaliser,
        )
        total += some.loss
        sums = {name: sums[name] + g for name, g in more.items()}
    assert abs(total - told.loss) <= 1e-13 * abs(told.loss)
    assert largest_difference(sums, gradients) <= 1e-12


def test_what_has_a_gradient() -> None:
    """The main model's parameters in its order, whatever there is of MTP; no gate bias."""
    for config in CONFIGS.values():
        params, given = samples(config)
        _, gradients = grpo_gradients(params, config, **given)
        small = parameter_shapes(replace(config, mtp_depth=0))
        assert list(gradients) == [name for name in small if not is_buffer(name)]
        assert len(small) < len(params) or not config.mtp_depth
        assert (HEAD in gradients) == (not config.tied)
        assert all(np.any(g) for g in gradients.values())
        alone, small_config = main_model(params, config)
        _, again = grpo_gradients(alone, small_config, **given)
        assert largest_difference(again, gradients) == 0


def test_what_is_told() -> None:
    """By the formulas, over the tokens that count."""
    params, given = samples(TINY)
    told, _ = grpo_gradients(params, TINY, **given, settings=LOSSES["v3.2"])
    options = {name: given[name] for name in ("key_mask", "routes", "temperature")}
    now, saved = log_probs(params, TINY, given["tokens"], **options)
    mask, a = given["mask"], given["advantages"][:, None]
    assert told.tokens == mask.sum() == 26
    rho = np.exp(now - given["old_log_prob"])
    clipped = np.where(a > 0, rho > 1.2, rho < 0.8)
    assert told.clipped == np.mean(clipped[mask])
    assert 0 < told.clipped < 1
    u = given["reference_log_prob"] - now
    np.testing.assert_allclose(told.kl, np.mean((np.exp(u) - 1 - u)[mask]), rtol=1e-13)
    np.testing.assert_allclose(told.entropy, -np.mean(now[mask]), rtol=1e-13)
    drift = np.sum(np.where(mask, given["old_log_prob"] - now, 0), axis=1)
    drift = drift / np.maximum(mask.sum(axis=1), 1)
    assert told.kept == np.mean((given["advantages"] >= 0) | (drift <= 0.3))
    assert {layer: load.sum() for layer, load in told.loads.items()} == {
        layer: given["key_mask"].sum() * TINY.top_k for layer in saved.output.loads
    }
    broken = given | {
        name: np.where(mask, given[name], np.nan) for name in ("old_log_prob", "reference_log_prob")
    }
    again, _ = grpo_gradients(params, TINY, **broken, settings=LOSSES["v3.2"])
    assert again[:6] == told[:6]
    none, _ = grpo_gradients(
        params, TINY, given["tokens"], mask=mask, advantages=a[:, 0], settings={"kl_weight": 0.0}
    )
    assert none.kl is None
    assert (none.clipped, none.kept) == (0, 1)


@pytest.mark.parametrize("left", [False, True])
def test_padding_means_nothing(left: bool) -> None:
    """Other tokens there, and rows alone without padding, give the same; the last position 0."""
    params, given = samples(TINY, left)
    tokens, key_mask = given["tokens"], given["key_mask"]
    now, _ = log_probs(params, TINY, tokens, key_mask=key_mask)
    other, _ = log_probs(params, TINY, np.where(key_mask, tokens, 77), key_mask=key_mask)
    for row, real in enumerate(key_mask):
        alone, _ = log_probs(params, TINY, tokens[row, real][None])
        assert alone[0, -1] == 0
        for found in (now, other):
            np.testing.assert_allclose(found[row, real][:-1], alone[0, :-1], rtol=1e-12)
    assert not now[:, -1].any()


# Mistakes that are usually made by hand


def test_the_head_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its own gradient, tied or not, the differences see it."""
    for config in CONFIGS.values():
        params, given = samples(config)
        with monkeypatch.context() as planted:
            planted.setattr(
                policy,
                "log_probs_backward",
                lambda dy, saved: policy.backward(
                    saved.model, dhidden=saved.ops.log_prob.backward(dy, saved.log_prob)[0]
                ),
            )
            _, gradients = grpo_gradients(params, config, **given)
        loss = of_the_loss(config, given)
        loss(params)
        assert differences(params, gradients, loss, directions=1) > 1e-2


def test_shift_and_mask_are_seen() -> None:
    """Log-probabilities of the token that stands at the position, and a mask that has the prompt's
    last token but one or lacks the output's first, give other numbers."""
    params, given = samples(TINY)
    told, gradients = grpo_gradients(params, TINY, **given)
    mask = given["mask"]
    earlier = np.concatenate((mask[:, 1:], mask[:, -1:]), axis=1)
    later = np.concatenate((mask[:, :1], mask[:, :-1]), axis=1)
    later[:, -1] = False
    for wrong in (earlier, later):
        other, more = grpo_gradients(params, TINY, **given | {"mask": wrong})
        assert abs(other.loss - told.loss) > 1e-3 * abs(told.loss)
        assert largest_difference(more, gradients) > 1e-2
    op = REFERENCE.log_prob

    def unshifted(h: Any, w: Any, *, targets: Any, **options: Any) -> Any:
        return op.forward(h, w, targets=given["tokens"], **options)

    table = REFERENCE | {"log_prob": Op(unshifted, op.backward)}
    other, _ = grpo_gradients(params, TINY, **given, ops=table)
    assert abs(other.loss - of_the_loss(TINY, given)(params)) > 1e-3 * abs(told.loss)


# What sampling recorded


def rollout(params: Any, config: ModelConfig) -> tuple[list[list[int]], list[Generation]]:
    prompts = [[5, 6], [9, 8, 7, 6, 5], [40, 41, 42]]
    options: Any = {"max_tokens": 12, "temperature": 0.7, "stop": range(0, 256, 9), "top_p": 0.95}
    found = generate(params, config, prompts, group=3, record=True, **options)
    return [prompt for prompt in prompts for _ in range(3)], found


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_sampling_and_training_agree(name: str, left: bool) -> None:
    """The log-probabilities that `generate` recorded are those of the training pass, and its routes
    are accepted and give the same ones, forward and backward."""
    config = CONFIGS[name]
    params = random_parameters(config, std=0.3)
    prompts, found = rollout(params, config)
    rows = [[*prompt, *one.tokens] for prompt, one in zip(prompts, found, strict=True)]
    width = max(map(len, rows))
    tokens = np.zeros((len(rows), width), int)
    key_mask, mask = (np.zeros((len(rows), width), bool) for _ in range(2))
    recorded = np.zeros((len(rows), width))
    for row, (prompt, one) in enumerate(zip(prompts, found, strict=True)):
        start = width - len(rows[row]) if left else 0
        tokens[row, start : start + len(rows[row])] = rows[row]
        key_mask[row, start : start + len(rows[row])] = True
        output = slice(start + len(prompt) - 1, start + len(rows[row]) - 1)
        mask[row, output] = True
        recorded[row, output] = one.log_probs
    assert len({len(row) for row in rows}) > 3
    free, saved = log_probs(params, config, tokens, key_mask=key_mask, temperature=0.7)
    routes = replay([one.routes for one in found], key_mask)
    again, kept = log_probs(
        params, config, tokens, key_mask=key_mask, temperature=0.7, routes=routes
    )
    assert np.max(np.abs(free - recorded)[mask]) <= 1e-10
    assert np.max(np.abs(again - free)[mask]) <= 1e-10
    read = key_mask.copy()
    for row, real in enumerate(key_mask):
        read[row, np.flatnonzero(real)[-1]] = False
    assert list(routes) == list(saved.output.routes)
    for layer, route in saved.output.routes.items():
        assert np.array_equal(np.sort(routes[layer].indices[read]), np.sort(route.indices[read]))
    dlog_prob = np.where(mask, np.random.default_rng(0).normal(size=mask.shape), 0)
    assert (
        largest_difference(
            log_probs_backward(dlog_prob, kept), log_probs_backward(dlog_prob, saved)
        )
        <= 1e-10
    )
    told, _ = grpo_gradients(
        params,
        config,
        tokens,
        mask=mask,
        advantages=np.ones(len(rows)),
        old_log_prob=recorded,
        key_mask=key_mask,
        temperature=0.7,
        routes=routes,
        settings={"kl_weight": 0.0},
    )
    assert told.clipped == 0
    assert abs(told.loss + 1) <= 1e-10
    one_moved = {layer: np.roll(x, 1, axis=0) for layer, x in found[0].routes.items()}
    moved = replay([one_moved, *(one.routes for one in found[1:])], key_mask)
    other, _ = log_probs(params, config, tokens, key_mask=key_mask, temperature=0.7, routes=moved)
    assert np.max(np.abs(other - free)[0][mask[0]]) > 1e-6


# The reward model


def pairs(config: ModelConfig) -> tuple[dict[str, np.ndarray], Arrays, np.ndarray]:
    """Parameters, pairs padded on the right and on the left, and the reward's head."""
    rng = np.random.default_rng(5)
    row, ends = np.arange(8), np.array([[8], [5], [6], [3]])
    given = {
        "chosen": rng.integers(0, config.vocabulary, (4, 8)),
        "rejected": rng.integers(0, config.vocabulary, (4, 8)),
        "chosen_key_mask": row < ends,
        "rejected_key_mask": row >= 8 - ends[::-1],
    }
    return random_parameters(config), given, rng.normal(size=(1, config.width))


@pytest.mark.parametrize("name", CONFIGS)
def test_preferences(name: str) -> None:
    """Loss and share by the formula from rows without padding; differences of all parameters and
    of the reward's head; parts that add up; no gradient for a head that takes no part."""
    config = CONFIGS[name]
    params, given, w = pairs(config)
    routes_of = {}

    def reward(own: dict[str, np.ndarray], w: np.ndarray, kind: str) -> np.ndarray:
        found = []
        for row, real in zip(given[kind], given[f"{kind}_key_mask"], strict=True):
            small, small_config = main_model(own, config)
            output, _ = forward(
                small,
                row[real][None],
                small_config,
                with_loss=False,
                routes=routes_of.get((kind, len(found))),
            )
            routes_of.setdefault((kind, len(found)), output.routes)
            found.append(output.hidden[0, -1] @ w[0])
        return np.array(found)

    def loss(own: dict[str, np.ndarray], w: np.ndarray = w) -> float:
        margin = reward(own, w, "chosen") - reward(own, w, "rejected")
        return float(np.mean(np.log1p(np.exp(-margin))))

    told, gradients, dw = preference_gradients(params, config, **given, w=w)
    assert abs(told.loss - loss(params)) <= 1e-12 * told.loss
    for kind in ("chosen", "rejected"):
        scored = rewards(params, config, given[kind], w, key_mask=given[f"{kind}_key_mask"])
        np.testing.assert_allclose(scored, reward(params, w, kind), rtol=1e-11)
    margin = reward(params, w, "chosen") - reward(params, w, "rejected")
    assert told.accuracy == np.mean(margin > 0)
    assert differences(params, gradients, loss) <= 1e-8
    assert differences({"w": w}, {"w": dw}, lambda moved: loss(params, moved["w"])) <= 1e-8
    small = parameter_shapes(replace(config, mtp_depth=0))
    assert list(gradients) == [name for name in small if not is_buffer(name) and name != HEAD]
    assert EMBEDDING in gradients
    sums, total = {name: 0 * g for name, g in gradients.items()}, 0.0
    sum_dw = 0 * dw
    for part in (slice(0, 1), slice(1, 4)):
        cut = {name: x[part] for name, x in given.items()}
        some, more, some_dw = preference_gradients(params, config, **cut, w=w, normaliser=4)
        total += some.loss
        sum_dw = sum_dw + some_dw
        sums = {name: sums[name] + g for name, g in more.items()}
    assert abs(total - told.loss) <= 1e-13 * told.loss
    assert largest_difference(sums | {"w": sum_dw}, gradients | {"w": dw}) <= 1e-12


def test_preferences_without_padding() -> None:
    """None stands for rows that are full."""
    params, given, w = pairs(TINY)
    tokens = given["chosen"], given["rejected"]
    full = np.ones((4, 8), bool)
    told, gradients, dw = preference_gradients(params, TINY, *tokens, w)
    for one in ({"chosen_key_mask": full}, {"chosen_key_mask": full, "rejected_key_mask": full}):
        again, more, more_dw = preference_gradients(params, TINY, *tokens, w, **one)
        assert again == told
        assert largest_difference(more | {"w": more_dw}, gradients | {"w": dw}) == 0


# Libraries, types, errors


@pytest.mark.parametrize("library", ["array_api_strict", "cupy"])
def test_other_libraries(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", pretended_cupy.Pretended("cupy"))
    place: Any = strict.asarray if library == "array_api_strict" else pretended_cupy.there
    host: Any = np.asarray if library == "array_api_strict" else pretended_cupy.here

    def there(x: Any) -> Any:
        if isinstance(x, np.ndarray):
            return place(x)
        if isinstance(x, Route):
            return Route(*map(there, x))
        return {name: there(y) for name, y in x.items()} if isinstance(x, dict) else x

    def back(gradients: dict[str, Any]) -> dict[str, np.ndarray]:
        return {name: host(g) for name, g in gradients.items()}

    params, given = samples(TINY)
    for settings in (LOSSES["v3.2"], LOSSES["dapo"]):
        told, gradients = grpo_gradients(params, TINY, **given, settings=settings)
        other, more = grpo_gradients(there(params), TINY, **there(given), settings=settings)
        for name in ("loss", "tokens", "clipped", "kl", "entropy", "kept"):
            a, b = float(getattr(other, name)), float(getattr(told, name))
            assert abs(a - b) <= 1e-13 * abs(b), name
        assert largest_difference(back(more), gradients) <= 1e-12
        parts = grpo_normaliser(given["mask"], settings)
        assert parts == grpo_normaliser(there(given["mask"]), settings)
    params, pair, w = pairs(TINY)
    _, gradients, dw = preference_gradients(params, TINY, **pair, w=w)
    _, more, more_dw = preference_gradients(there(params), TINY, **there(pair), w=there(w))
    assert largest_difference(back(more | {"w": more_dw}), gradients | {"w": dw}) <= 1e-12
    _, found = rollout(params, TINY)
    mask = np.ones((9, 20), bool)
    recorded = [one.routes for one in found]
    for layer, route in replay(recorded, there(mask)).items():
        assert np.array_equal(host(route.indices), replay(recorded, mask)[layer].indices)


@pytest.mark.parametrize("implementation", ["reference", "numba_cpu"])
def test_float32_stays(implementation: str) -> None:
    """With float64 log-probabilities as `generate` gives them; near the float64 result."""
    if implementation == "numba_cpu":
        pytest.importorskip("numba")
    from refimpl.kernels.columns import on_cpu

    params, given = samples(TINY)
    _, wanted = grpo_gradients(params, TINY, **given)
    single = {name: p.astype(np.float32) for name, p in params.items()}
    told, gradients = grpo_gradients(single, TINY, **given, ops=on_cpu(implementation))
    assert told.loss.dtype == told.kl.dtype == told.entropy.dtype == np.float32
    assert {g.dtype for g in gradients.values()} == {np.dtype(np.float32)}
    assert largest_difference(gradients, wanted) <= 1e-4


def test_errors() -> None:
    params, given = samples(TINY)
    wrong = given["mask"].copy()
    wrong[0, -1] = True
    with pytest.raises(ValueError, match="mask must be False at the last position"):
        grpo_gradients(params, TINY, **given | {"mask": wrong})
    with pytest.raises(TypeError, match="mask must be bool"):
        grpo_gradients(params, TINY, **given | {"mask": given["mask"].astype(int)})
    with pytest.raises(ValueError, match=r"recorded must hold the routes of N=6 outputs, got 1"):
        replay([{}], given["key_mask"])
    with pytest.raises(ValueError, match=f"{HEAD} is missing"):
        log_probs({n: p for n, p in params.items() if n != HEAD}, TINY, given["tokens"])
    params, pair, w = pairs(TINY)
    with pytest.raises(ValueError, match=r"rejected must have shape \(N, T\)=\(4, 8\)"):
        preference_gradients(params, TINY, pair["chosen"], pair["rejected"][:, 1:], w)
    with pytest.raises(ValueError, match="each row must hold a token that is no padding"):
        rewards(params, TINY, pair["chosen"], w, key_mask=np.zeros((4, 8), bool))
