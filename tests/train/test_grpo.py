"""GRPO: gradients by hand, in parts and in minibatches; rewards and advantages; and it learns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from refimpl.errors import CouldNotRun
from refimpl.model import backward, forward
from refimpl.ops import GRPO_PRESETS, REFERENCE, group_advantages
from refimpl.parameters import head_name, is_buffer, module_name
from refimpl.train import grpo, step
from refimpl.train.grpo import GRPO, Batch, GRPOSettings, averaged
from refimpl.train.policy import main_model
from refimpl.train.rollout import Samples
from refimpl.train.run import Guard
from refimpl.train.step import NotTaken, State
from refimpl.train.tasks import Problem, draw, make, sloppy

from small_stage import COMMON, CONFIG, MACHINE, begin, far, same

SMALL: dict[str, Any] = COMMON | {
    "questions": 2,
    "group": 4,
    "max_tokens": 6,
    "problems": 4,
    "warmup_steps": 0,
}
VARIANTS: dict[str, dict[str, Any]] = {name: {} for name in GRPO_PRESETS}
VARIANTS["v3.2"] = {"off_policy": 0.01}
Params = dict[str, np.ndarray]


def stage(**changed: Any) -> GRPO:
    return GRPO(GRPOSettings(**SMALL | changed), MACHINE, begin())


def drawn(made: GRPO) -> tuple[State, Batch]:
    """A state whose reference is another model, and its first outputs with advantages."""
    rng, state = np.random.default_rng(5), made.start()
    other = {name: x + 0.02 * rng.normal(size=x.shape) for name, x in state.extra.items()}
    state = state._replace(extra=other)
    samples = made.sample(state, draw("add2", 0, 0, made.settings.questions))
    advantages = rng.normal(size=len(samples.tokens))
    return state, Batch(samples, advantages, *made.constants(state, samples))


def moved(state: State) -> State:
    """Off the policy that sampled."""
    rng = np.random.default_rng(6)
    params = {name: x + 0.01 * rng.normal(size=x.shape) for name, x in state.params.items()}
    return state._replace(params=params)


def by_hand(params: Params, batch: Batch, mask: np.ndarray, given: dict[str, Any]) -> Any:
    """Six calls of the reference's ops, and the head's own gradient."""
    own, config = main_model(params, CONFIG)
    tokens, head = batch.samples.tokens, head_name(CONFIG)
    output, saved = forward(own, tokens, config, key_mask=batch.samples.key_mask, with_loss=False)
    log_prob, of_log_prob = REFERENCE.log_prob.forward(
        output.hidden, own[head], targets=np.roll(tokens, -1, axis=1), temperature=0.8
    )
    loss, of_loss = REFERENCE.grpo.forward(
        log_prob,
        advantages=batch.advantages,
        mask=mask,
        reference_log_prob=batch.reference,
        **given,
    )
    dhidden, dhead = REFERENCE.log_prob.backward(REFERENCE.grpo.backward(1.0, of_loss), of_log_prob)
    grads = backward(saved, dhidden=dhidden)
    return loss, grads | {head: grads[head] + dhead}, log_prob


@pytest.mark.parametrize("minibatches", [1, 2])
def test_gradients_by_hand(minibatches: int) -> None:
    """With one update a step the ratios are 1 whatever the policy; with more they are to the policy
    that sampled. What is told: KL by k3, and the share of tokens that is clipped."""
    made = stage(temperature=0.8, kl_weight=0.1, minibatches=minibatches)
    state, batch = drawn(made)
    state = moved(state)
    found, grads = made.gradients(state, batch)
    old = None if minibatches == 1 else batch.old
    mask = batch.samples.mask
    loss, wanted, log_prob = by_hand(
        state.params, batch, mask, {"old_log_prob": old, "kl_weight": 0.1}
    )
    assert far(grads, wanted) <= 1e-12
    assert abs(found["loss"] - float(loss.loss)) <= 1e-13
    u = (batch.reference - log_prob)[mask]
    assert abs(averaged([found | {"norm": 0.0}])["kl"] - np.mean(np.exp(u) - u - 1)) <= 1e-13
    clipped = np.mean(~loss.unclipped[mask])
    assert found["clipped"] / found["tokens"] == pytest.approx(clipped, abs=1e-15)
    assert (clipped > 0) == (minibatches == 2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_number_of_rows(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every variant: a forward of 3 rows at a time gives the loss, what is told and the
    gradients of all 8 at once; outputs that were cut off are left out."""
    options = {"variant": variant, "loss": VARIANTS[variant], "minibatches": 2, "kl_weight": 0.05}
    whole = stage(**options, overlong="filter")
    parts = stage(**options, overlong="filter", rows=3)
    state, batch = drawn(whole)
    ended = [row % 3 > 0 for row in range(8)]
    batch = batch._replace(samples=batch.samples._replace(ended=ended))
    for each in zip(
        whole.constants(state, batch.samples), parts.constants(state, batch.samples), strict=True
    ):
        assert np.max(np.abs(each[0] - each[1])[batch.samples.mask]) <= 1e-12
    state = moved(state)
    told, grads = whole.gradients(state, batch)
    found, sums = parts.gradients(state, batch)
    assert far(sums, grads) <= 1e-12
    assert found == pytest.approx(told, rel=1e-12, abs=1e-14)
    assert told["tokens"] == batch.samples.mask[ended].sum() < batch.samples.mask.sum()
    assert any(np.any(g != 0) for g in grads.values())
    monkeypatch.setattr(step, "PART", 3 * batch.samples.mask.shape[1])
    assert [len(rows) for rows in whole.parts(batch.samples.mask)] == [3, 3, 2]


def test_variants_differ() -> None:
    """Their losses, from the same outputs; dr_grpo's advantages are not divided."""
    state, batch = drawn(stage(minibatches=2))
    state = moved(state)
    losses = {
        round(
            stage(variant=x, minibatches=2, loss=VARIANTS[x]).gradients(state, batch)[0]["loss"], 9
        )
        for x in GRPO_PRESETS
        if x != "v3.2"  # KL apart it is deepseekmath's, where nothing drifts
    }
    assert len(losses) == len(GRPO_PRESETS) - 1
    rewards = np.array([1.0, 0, 0, 0, 1, 1, 0, 0])
    centred = rewards - np.repeat(rewards.reshape(2, 4).mean(axis=1), 4)
    assert np.array_equal(stage(variant="dr_grpo").advantages(rewards, 0), centred)
    scaled = np.asarray(group_advantages(rewards.reshape(2, 4)))
    assert np.array_equal(stage().advantages(rewards, 0), scaled)


def test_settings_of_the_loss() -> None:
    """The variant's, then β, then the table; Dr. GRPO's length is that of the longest output."""
    assert stage(loss={"clip": [0.1, 0.3]}).settings.loss_settings == {
        "kl_weight": 0.0,
        "clip": (0.1, 0.3),
    }
    found = stage(variant="dr_grpo", kl_weight=0.2).settings.loss_settings
    assert found == {"average": "constant", "kl_weight": 0.2, "length": 6}
    assert stage(loss={"average": "constant", "length": 9}).settings.loss_settings["length"] == 9


def test_a_step_leaves() -> None:
    """MTP modules, gates' biases and the reference as they were; everything else moves. The
    reference is a copy, and becomes the policy when it is time."""
    made = stage(reference_every=2, learning_rate=0.01)
    state = made.start()
    before = {name: x.copy() for name, x in state.params.items()}
    main, _ = main_model(before, CONFIG)
    monkey = Guard(3.0, [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "score", parity)
        for step in range(2):
            state, _ = made.step(state, monkey)
            wanted = main if step == 0 else main_model(state.params, CONFIG)[0]
            assert same({k.removeprefix("reference/"): x for k, x in state.extra.items()}, wanted)
    modules = module_name(CONFIG.layers)
    for name, x in before.items():
        stays = is_buffer(name) or name.startswith(modules)
        assert np.array_equal(state.params[name], x) == stays, name
    assert all(
        x is not state.params.get(k.removeprefix("reference/")) for k, x in state.extra.items()
    )
    assert (state.step, state.position) == (2, 4)


def parity(text: str, answer: str, *, ended: bool) -> dict[str, float]:
    """A rule that half of all first bytes obey: they are ASCII."""
    return {"accuracy": float(text[:1].isascii() and text != ""), "format": 0.0}


def test_minibatches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each output is in one of them; the first is on the policy that sampled. A later one that
    can't be taken leaves the state as it was, to the bit."""
    monkeypatch.setattr(grpo, "score", parity)
    made = stage(minibatches=4, learning_rate=0.05, group=8)
    seen: list[Any] = []
    original = GRPO.gradients

    def watched(self: GRPO, state: State, batch: Batch) -> Any:
        told, grads = original(self, state, batch)
        seen.append((batch.samples.tokens, told))
        if len(seen) == broken:
            grads[head_name(CONFIG)] = grads[head_name(CONFIG)] * np.nan
        return told, grads

    monkeypatch.setattr(GRPO, "gradients", watched)
    state, broken = made.start(), 0
    before = {name: x.copy() for name, x in state.params.items()}
    after, told = made.step(state, Guard(3.0, []))
    everything = made.sample(state, draw("add2", 0, 0, 2)).tokens
    rows = np.concatenate([tokens for tokens, _ in seen])
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, everything.tolist()))
    assert seen[0][1]["clipped"] == 0
    assert seen[-1][1]["clipped"] > 0
    counted = sum(x["tokens"] for _, x in seen)
    assert told["clipped"] == sum(x["clipped"] for _, x in seen) / counted
    assert after.moments.step == 4
    seen, broken = [], 3
    with pytest.raises(NotTaken, match=r"the gradient of lm_head\.weight is not finite"):
        made.step(state, Guard(3.0, []))
    assert same(state.params, before)
    after_again, _ = stage(minibatches=4, learning_rate=0.05, group=8).step(state, Guard(3.0, []))
    assert same(after_again.params, after.params)


def test_the_guard_sees_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the minibatches' losses, once per step, as the metrics have it, which a resumed run
    reads."""
    monkeypatch.setattr(grpo, "score", parity)
    heard: list[float] = []
    made = stage(minibatches=2, learning_rate=0.05)
    _, told = made.step(made.start(), heard.append)  # type: ignore[arg-type]
    assert heard == [told["loss"]]


def given(texts: list[str], ended: list[bool], lengths: list[int]) -> Samples:
    nothing = np.zeros((len(texts), 1))
    return Samples(nothing, nothing, nothing, nothing, [], texts, ended, np.array(lengths))


def outputs(problems: list[Problem]) -> Samples:
    a, b = problems
    texts = [a.solution, sloppy(a), b.solution, a.solution, b.solution, "", b.untidy, "12"]
    return given(
        texts, [True, True, True, False, True, True, True, True], [20, 18, 19, 24, 22, 1, 30, 24]
    )


def test_rewards() -> None:
    """The parts by rule and their weighted sum, each output by its own question's answer."""
    problems = [make("add2", 1234), make("add2", 5678)]
    found = stage(accuracy=2.0, format=0.5).rewards(outputs(problems), problems)
    assert found["accuracy"].tolist() == [1, 1, 0, 1, 1, 0, 1, 0]
    assert found["format"].tolist() == [1, 0, 1, 0, 1, 0, 1, 0]
    assert found["reward"].tolist() == [2.5, 2, 0.5, 2, 2.5, 0, 2.5, 0]


def test_overlong() -> None:
    """DAPO's penalty in the last quarter of 24 tokens; as a filter it changes no reward."""
    problems = [make("add2", 1234), make("add2", 5678)]
    plain = stage(max_tokens=24, overlong="filter").rewards(outputs(problems), problems)
    found = stage(max_tokens=24, overlong="penalty").rewards(outputs(problems), problems)
    assert found["overlong"] == pytest.approx([-2 / 6, 0, -1 / 6, -1, -4 / 6, 0, -1, -1])
    assert found["reward"] == pytest.approx(plain["reward"] + found["overlong"])
    assert "overlong" not in plain


def test_permuted() -> None:
    """Each group keeps its rewards, in another order; other orders at other steps."""
    made, plain = stage(permuted=True), stage()
    rewards = np.arange(8.0) ** 2
    wanted = plain.advantages(rewards, 0).reshape(2, 4)
    found = [made.advantages(rewards, step).reshape(2, 4) for step in range(4)]
    for x in found:
        assert np.max(np.abs(np.sort(x, axis=1) - np.sort(wanted, axis=1))) <= 1e-15
    assert len({x.tobytes() for x in [wanted, *found]}) > 3
    assert np.array_equal(made.advantages(rewards, 2).reshape(2, 4), found[2])


def test_what_a_step_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entropy and lengths of the outputs; sampling agrees with the training pass; kinds in turn;
    other outputs at each step; the rate warms up."""
    monkeypatch.setattr(grpo, "score", parity)
    asked: list[tuple[str, int]] = []

    def watched(kind: str, seed: int, number: int, count: int) -> list[Problem]:
        asked.append((kind, number))
        return draw(kind, seed, number, count)

    monkeypatch.setattr(grpo, "draw", watched)
    options: dict[str, Any] = {
        "kinds": ("add2", "sort4"),
        "temperature": 0.7,
        "top_p": 0.9,
        "replay_routes": True,
        "warmup_steps": 4,
        "learning_rate": 0.4,
    }
    made, several = stage(**options), stage(**options, minibatches=2)
    state = made.start()
    samples = made.sample(state, draw("add2", 0, 0, 2))
    assert made.constants(state, samples)[0] is None
    old, reference = several.constants(state, samples)
    assert old is not None
    assert np.max(np.abs(old - reference)[samples.mask]) <= 1e-12
    both = [x.step(state, Guard(3.0, []))[1] for x in (several, made)]
    for told in both:  # of the policy that sampled, however far the updates took it
        assert told["entropy"] == pytest.approx(-samples.log_prob[samples.mask].mean(), rel=1e-12)
        assert told["sampling_difference"] <= 1e-12
        assert told["length"] == samples.lengths.mean()
    assert told["learning_rate"] == 0.1
    assert (told["clipped"], told["kept"]) == (0.0, 1.0)
    assert told["kl"] <= 1e-15
    fresh = stage(kinds=("add2", "sort4"), learning_rate=0.0)
    _, told = fresh.step(fresh.start()._replace(step=1), Guard(3.0, []))
    assert asked == [("add2", 0), ("add2", 0), ("sort4", 1)]
    again = stage().sample(stage().start()._replace(step=1), draw("add2", 0, 0, 2))
    first = stage().sample(stage().start(), draw("add2", 0, 0, 2))
    assert again.texts != first.texts


def test_replayed_routes_are_the_policys() -> None:
    """The reference chooses its experts itself: it is the model that the KL is to."""
    state, batch = drawn(stage())
    found = [
        stage(replay_routes=replayed, minibatches=2).constants(moved(state), batch.samples)
        for replayed in (True, False)
    ]
    (old, reference), (own, again) = found
    assert old is not None
    assert own is not None
    assert np.array_equal(reference, again)
    assert np.max(np.abs(old - own)[batch.samples.mask]) > 1e-6


def test_it_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bandit: one token, right if it is ASCII. From chance, half of all, to nearly always."""
    monkeypatch.setattr(grpo, "score", parity)
    made = stage(max_tokens=1, questions=4, group=8, learning_rate=0.03)
    state, guard = made.start(), Guard(3.0, [])
    told = []
    for _ in range(20):
        state, metrics = made.step(state, guard)
        told.append(metrics["accuracy"])
    assert np.mean(told[:2]) < 0.7
    assert np.mean(told[-3:]) > 0.95


def test_permuted_rewards_teach_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpo, "score", parity)
    made = stage(max_tokens=1, questions=4, group=8, learning_rate=0.03, permuted=True)
    state, guard = made.start(), Guard(3.0, [])
    told = []
    for _ in range(20):
        state, metrics = made.step(state, guard)
        told.append(metrics["accuracy"])
    assert np.mean(told[-3:]) < 0.8


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"group": 1}, "group must be at least 2, got 1"),
        ({"questions": 10**6}, "questions must be at most 43,690, so that .*, got 1000000"),
        ({"minibatches": 3}, "minibatches must divide questions × group = 8, got 3"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0.0"),
        ({"model": 0.5}, "model must be 0 without a reward_model, got 0.5"),
        ({"variant": "ppo"}, "variant must be one of deepseekmath"),
        ({"overlong": "cut"}, "overlong must be one of kept, penalty, filter, got 'cut'"),
        ({"loss": {"clop": 1}}, "loss has no setting clop; there are clip, "),
        ({"loss": {"clip": [-1, 0]}}, "impossible loss: clip must be two numbers"),
        ({"loss": {"normaliser": 1.0}}, "loss has no setting normaliser; there are "),
        ({"loss": {"kept": [True]}}, "loss has no setting kept; there are "),
    ],
)
def test_settings_that_cannot_be(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(CouldNotRun, match=said):
        stage(**changed)
