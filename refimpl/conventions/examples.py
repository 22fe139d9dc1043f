"""The number that each convention changes, on small fixed examples: a function a trap, from choice
to number.

Model examples run the preset ``tiny`` in float64 on one text, with parameters off their neutral
values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np

from ..array import Array
from ..batch import make_batch
from ..config import ModelConfig, Yarn, preset
from ..fp8 import LARGEST, Recipe, linear_backward, linear_forward, quantised
from ..grads.split import TermCounts, rules, split_batch, term_counts, term_gradient
from ..model import ModelOutput, Run, backward, forward, logits, mtp_module_forward
from ..ops import (
    GRPO_PRESETS,
    REFERENCE,
    Op,
    Ops,
    balance_loss_forward,
    bias_update,
    group_advantages,
    grpo_backward,
    grpo_forward,
    mla_forward,
    moe_forward,
    mtp_backward,
    rms_norm_forward,
    rope_frequencies,
    router_forward,
    yarn_softmax_factor,
)
from ..parameters import (
    EMBEDDING,
    FINAL_NORM,
    GATE,
    HEAD,
    MTP_NORM,
    is_buffer,
    layer_name,
    mtp_layer,
    parameter_shapes,
)

MEANS = "the mean of the parts' means"
SUM = "the sum of the parts' means (× micro-batches)"
TWICE = "divided by the ranks twice"
WEIGHTED = "each part's mean, weighted by its main count"
Numbers = dict[str, float]  # choice → the number it gives, our default first
TEXT = b"A reference is right, or it is nothing: "  # 2 rows of 20 tokens
TINY = preset("tiny")


@cache
def parameters(bias: float = 0.0) -> dict[str, Array]:
    """Normal with std 0.15; norms about 1; gate biases of std 0.15 about ``bias``."""
    rng = np.random.default_rng(20241226)  # the day of the V3 report
    centre = {True: bias, False: 0.0}
    return {
        name: 0.15 * rng.normal(size=shape)
        + (1.0 if name.endswith("norm.weight") else centre[is_buffer(name)])
        for name, shape in parameter_shapes(TINY).items()
    }


def text() -> Array:
    """[2, 20]: the text's bytes."""
    return np.frombuffer(TEXT, np.uint8).astype(int).reshape(2, -1)


def run(config: ModelConfig = TINY, *, bias: float = 0.0, ops: Ops = REFERENCE) -> ModelOutput:
    """The model on the text."""
    tokens = text()
    params = {name: parameters(bias)[name] for name in parameter_shapes(config)}
    return forward(params, tokens, config, ops=ops)[0]


def convention(**fields: Any) -> ModelConfig:
    return replace(TINY, conventions=replace(TINY.conventions, **fields))


def by_convention(
    name: str, choices: tuple[Any, ...], number: Callable[[ModelConfig], float]
) -> Numbers:
    return {str(choice): number(convention(**{name: choice})) for choice in choices}


def first_mtp(config: ModelConfig) -> float:
    return float(run(config).mtp[0])


def main(config: ModelConfig = TINY, **how: Any) -> float:
    return float(run(config, **how).main)  # type: ignore[arg-type]


def mtp_order() -> Numbers:
    return by_convention("mtp_order", ("embedding_hidden", "hidden_embedding"), first_mtp)


def mtp_hidden() -> Numbers:
    return by_convention(
        "mtp_hidden", ("normed", "raw", "raw_first", "normed_first"), lambda c: float(run(c).mtp[1])
    )


def mtp_normaliser() -> Numbers:
    return by_convention("mtp_normaliser", ("positions", "valid", "main"), first_mtp)


def mtp_zero_first_embedding() -> Numbers:
    return by_convention("mtp_zero_first_embedding", (False, True), first_mtp)


def masked_groups() -> Numbers:
    return by_convention("masked_groups", ("-inf", "zero"), lambda c: main(c, bias=-1.0))


def without_norms(*args: Any, ops: Ops, **how: Any) -> Any:
    """MLA as the papers' equations have it: no norm of the latents."""
    identity = Op(lambda x, w, *, eps: (x, None), lambda dy, saved: (dy, None))
    return mla_forward(*args, ops=ops | {"rms_norm": identity}, **how)


def latent_norms() -> Numbers:
    bare = REFERENCE | {"mla": REFERENCE["mla"]._replace(forward=without_norms)}
    return {"normed": main(), "not normed": main(ops=bare)}


def yarn_when() -> Numbers:
    short = replace(TINY, max_positions=16)
    return {
        when: main(replace(short, conventions=replace(short.conventions, yarn_when=when)))
        for when in ("beyond_original", "always")
    }


def mscale() -> Numbers:
    return {
        f"mscale_all_dim {m:g}": 192**-0.5
        * yarn_softmax_factor(Yarn(factor=40, mscale=m, mscale_all_dim=m))
        for m in (1.0, 0.707, 0.0)
    }


def mscale_default() -> Numbers:
    """V3's, and Megatron's default, which scales the rotated part of the scores alone."""
    yarn = {"factor": 4.0, "original": 16, "beta_fast": 4.0, "beta_slow": 1.0, "mscale": 1.0}
    return {
        f"mscale_all_dim {m:g}": main(replace(TINY, yarn=Yarn(**yarn, mscale_all_dim=m)))  # type: ignore[arg-type]
        for m in (1.0, 0.0)
    }


def yarn_factor() -> Numbers:
    yarn = Yarn(
        factor=4.0, original=16, beta_fast=4.0, beta_slow=1.0, mscale=0.5, mscale_all_dim=0.0
    )
    return by_convention("yarn_factor", ("ratio", "if_both"), lambda c: main(replace(c, yarn=yarn)))


def softmax_normalise() -> Numbers:
    return by_convention(
        "softmax_normalise",
        ("scaled", "unscaled", "ignored"),
        lambda c: main(replace(c, gate="softmax")),
    )


def balance_counts() -> Numbers:
    return by_convention(
        "balance_counts", ("unbiased", "routed"), lambda c: float(sum(run(c).balance.values()))
    )


def padded_balance() -> Numbers:
    """Sequences of 11, 7 and 4 tokens: each divided by the squares of its own length, or of the
    mean of the three."""
    rng = np.random.default_rng(0)
    scores, lengths = rng.uniform(size=(3, 11, 8)), np.array([11, 7, 4])
    each = [
        float(balance_loss_forward(scores[i : i + 1, :length], alpha=1.0, top_k=2)[0])
        for i, length in enumerate(lengths)
    ]
    return {
        "own length": float(np.mean(each)),
        "mean length": float(np.mean(each * (lengths / lengths.mean()) ** 2)),
    }


def bias_centre() -> Numbers:
    load = np.array([9, 1, 1, 1])
    return {
        str(c): float(bias_update(np.zeros(4), load, 0.001, centre=c)[0]) for c in (False, True)
    }


def bfloat16(x: Array) -> Array:
    """The nearest bfloat16 of float32 numbers, ties to even, as float32."""
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def gate_precision() -> Numbers:
    rng = np.random.default_rng(0)
    x, w = (
        rng.normal(size=(1024, 64)).astype(np.float32),
        0.1 * rng.normal(size=(64, 64)).astype(np.float32),
    )

    def experts(round_: Callable[[Array], Array], sigmoid: bool = False) -> Array:
        gate = round_(round_(x) @ round_(w).T)
        scores = round_(1 / (1 + np.exp(-gate))) if sigmoid else gate
        return np.sort(np.argsort(-scores, axis=-1, kind="stable")[:, :8])

    exact = experts(lambda a: a.astype(np.float64))
    return {
        name: float(100 * (chosen != exact).any(axis=1).mean())
        for name, chosen in {
            "float32": experts(lambda a: a),
            "bfloat16": experts(bfloat16),
            "scores too": experts(bfloat16, True),
        }.items()
    }


def gate_bias() -> Numbers:
    lost = replace(TINY, gate_bias=False, group_score="max")
    return {
        "top2, with bias": main(),
        "share, with bias": main(replace(TINY, group_score="share")),
        "max, bias lost": main(lost),
    }


def only_shared(x: Array, weights: Array, *experts: Array, **how: Any) -> Any:
    """What is left of the mixture of experts if the routed branch does not run."""
    return moe_forward(x, 0 * weights, *experts, **how)


def routed_branch() -> Numbers:
    return {
        "routed and shared": main(),
        "shared alone": main(
            ops=REFERENCE | {"moe": REFERENCE["moe"]._replace(forward=only_shared)}
        ),
    }


def gate_epsilon() -> Numbers:
    """Weights if the chosen scores underflow to 0."""
    x, w = np.ones((1, 1)), np.full((2, 1), -800.0)
    with np.errstate(invalid="ignore"):
        return {
            f"{e:g}": float(router_forward(x, w, top_k=1, epsilon=e)[0].weights[0, 0])
            for e in (0.0, 1e-20)
        }


def weight_scale_inv() -> Numbers:
    largest = (
        0.05  # of a tile of weights; the file holds 448 there, and weight_scale_inv = 0.05 / 448
    )
    scale = largest / 448
    return {"multiply": 448 * scale, "divide": 448 / scale}


def active_parameters() -> Numbers:
    from ..count import count

    sections = count(preset("v3"), length=4096)
    (lines,) = (s.lines for s in sections if s.title.startswith("Active parameters"))
    figures = {line.name: line.value / 1e9 for line in lines}
    return {
        "with the head": figures["… + head"],
        "with head and embedding": figures["… + head + embedding"],
    }


def mtp_tail() -> Numbers:
    """The balance loss of MTP module 1 over the T − 1 positions that have a token to read, or over
    T, the last of which reads token 0."""
    config, tokens = TINY, text()
    run_ = Run(parameters(), config, REFERENCE)
    hidden = forward(parameters(), tokens, config)[0].hidden
    batch = make_batch(parameters()[EMBEDDING], tokens, config)
    short, cut = batch.at(1), np.zeros((2, 1), int)
    long = batch._replace(
        tokens=np.concatenate((short.tokens, cut), axis=1),
        targets=np.concatenate((short.targets, cut), axis=1),
        mask=np.concatenate((short.mask, cut > 0), axis=1),
    )
    losses = {}
    for name, depth in {"T − k": short, "T": long}.items():
        _, _, saved = mtp_module_forward(run_, 1, hidden, depth)
        losses[name] = float(saved.block.choices.balance)
    return losses


def largest(gradient: Array) -> float:
    return float(np.max(np.abs(gradient)))


@cache
def detached_gradients() -> dict[str, dict[str, Array]]:
    """All gradients, by what the MTP losses do not reach."""
    met: list[int] = []

    def without_state(every: bool) -> Ops:
        """`mtp` whose state is a constant in every module, or in the first alone."""

        def cut(dy: Array, saved: Any) -> Any:
            dstate, *others = mtp_backward(dy, saved)
            met.append(1)
            is_first = len(met) % TINY.mtp_depth == 0  # the last that a backward meets
            return (0 * dstate if every or is_first else dstate, *others)

        return REFERENCE | {"mtp": REFERENCE["mtp"]._replace(backward=cut)}

    def gradients(config: ModelConfig, ops: Ops = REFERENCE) -> dict[str, Array]:
        given = {name: parameters()[name] for name in parameter_shapes(config)}
        return backward(forward(given, text(), config, ops=ops)[1])

    trunk = gradients(TINY, without_state(every=False))
    return {
        "nothing": gradients(TINY),
        "heads": trunk | gradients(replace(TINY, mtp_depth=0)),
        "trunk": trunk,
        "every depth": gradients(TINY, without_state(every=True)),
    }


def mtp_detach(name: str) -> Numbers:
    """The largest gradient of a tensor."""
    return {
        choice: float(np.max(np.abs(grads[name]))) for choice, grads in detached_gradients().items()
    }


def mtp_detach_norm() -> Numbers:
    return mtp_detach(FINAL_NORM)


def mtp_detach_head() -> Numbers:
    return mtp_detach(HEAD)


def mtp_detach_module() -> Numbers:
    return mtp_detach(layer_name(mtp_layer(TINY, 1), MTP_NORM))


def empty_outputs() -> Numbers:
    """Four outputs, the last with all tokens masked."""
    mask = LENGTHS & (np.arange(4) < 3)[:, None]
    return {empty: grpo(mask=mask, empty=empty) for empty in ("counted", "left_out")}


def left_padding() -> Numbers:
    """The second row is padded on the left; its first real token is a target, or is not, and what
    predicts it gives 0 or the mean of all values in attention."""
    real = np.arange(20) >= np.array([[0], [6]])
    given = {name: parameters()[name] for name in parameter_shapes(replace(TINY, mtp_depth=0))}

    def main_loss(**fields: Any) -> float:
        config = replace(convention(**fields), mtp_depth=0)
        return float(np.asarray(forward(given, text(), config, key_mask=real)[0].main))

    return {
        "left out": main_loss(),
        "counted": main_loss(target_after_padding=True),
        "counted, mean": main_loss(target_after_padding=True, blind_query="mean"),
    }


def rope_layout() -> Numbers:
    return by_convention("rope_layout", ("interleaved", "halves"), main)


def biased_weights() -> Numbers:
    """The chosen experts' weights from their scores, or from what they were chosen by."""

    def biased(x: Array, w: Array, *, bias: Array, scale: float, **how: Any) -> Any:
        y, saved = router_forward(x, w, bias=bias, scale=scale, **how)
        chosen = np.take_along_axis(y.scores + bias, y.indices, axis=-1)
        return y._replace(weights=scale * chosen / chosen.sum(axis=-1, keepdims=True)), saved

    wrong = REFERENCE | {"router": REFERENCE["router"]._replace(forward=biased)}
    return {"scores": main(), "biased scores": main(ops=wrong)}


def softmax_ranking() -> Numbers:
    """Gates ten times as steep, so that scores are not nearly linear in logits."""
    steep = {name: 10 * p if name.endswith(GATE) else p for name, p in parameters().items()}

    def loss(config: ModelConfig) -> float:
        config = replace(config, gate="softmax", gate_bias=False, normalise_weights=False)
        given = {name: steep[name] for name in parameter_shapes(config)}
        return float(forward(given, text(), config)[0].main)  # type: ignore[arg-type]

    return by_convention("softmax_ranking", ("scores", "logits"), loss)


def vespo_weight() -> Numbers:
    """One output of four tokens, each a tenth likelier than before: its ratio as the product and as
    the root of the product."""
    log_ratio = np.full(4, 0.1)
    return {"product": float(np.exp(log_ratio.sum())), "root": float(np.exp(log_ratio.mean()))}


def log_ratio_bound() -> Numbers:
    """One token with A = −1 that is e¹² times likelier than when it was sampled."""

    def loss(most: float) -> float:
        z = np.full((1, 1), min(12.0, most))
        how: dict[str, Any] = {"advantages": np.array([-1.0]), "mask": z > 0, "kl_weight": 0.0}
        return float(grpo_forward(z - 20, old_log_prob=0 * z - 20, **how)[0].loss)

    return {"none": loss(np.inf), "±10": loss(10.0)}


def delta() -> Numbers:
    """One token with A = 1 and ρ = 1.15: a bound of 1.1 on ρ where A < 0, and on ρ everywhere."""
    z = np.full((1, 1), np.log(1.15))
    how: dict[str, Any] = {"advantages": np.ones(1), "mask": z > 0, "kl_weight": 0.0}
    ours = grpo_forward(z - 2, old_log_prob=0 * z - 2, dual_clip=1.1, **how)[0].loss
    return {"dual_clip 1.1": float(ours), "δ 1.1": -min(1.15, 1.1)}


LOG_PROB = -np.array(
    [[0.5, 1.25, 0.75, 2.0], [1.5, 0.25, 1.0, 0.5], [0.75, 0.5, 0.0, 0.0], [1.0, 2.5, 0.25, 0.0]]
)
OLD = LOG_PROB - np.array(
    [[0.3, -0.4, 0.1, 0.6], [0.5, 0.2, -0.1, 0.3], [-0.5, 0.1, 0, 0], [0.4, -0.2, 0.1, 0]]
)
REFERENCE_LOG_PROB = LOG_PROB - np.array(
    [[0.2, -0.3, 0.4, 0.1], [-0.6, 0.2, 0.1, 0.3], [0.5, -0.4, 0, 0], [0.1] * 4]
)
LENGTHS = np.arange(4) < np.array([[4], [4], [2], [3]])
REWARDS = np.array([[1.0, 0.0, 0.0, 1.0]])


def grpo(**how: Any) -> float:
    """The loss of four outputs of one question."""
    given: dict[str, Any] = {
        "mask": LENGTHS,
        "old_log_prob": OLD,
        "reference_log_prob": REFERENCE_LOG_PROB,
    }
    given |= {"advantages": group_advantages(REWARDS), "length": 4}
    return float(grpo_forward(LOG_PROB, **(given | how))[0].loss)


def grpo_level() -> Numbers:
    presets = {
        name: grpo(**GRPO_PRESETS[name]) for name in ("deepseekmath", "r1_print", "dapo", "gspo")
    }
    presets["dr_grpo"] = grpo(
        advantages=group_advantages(REWARDS, scale=False), **GRPO_PRESETS["dr_grpo"]
    )
    return presets | {"verl": grpo(average="token", dual_clip=3.0, kl_weight=0.0)}


def advantage_std() -> Numbers:
    def best(**how: Any) -> float:
        return float(group_advantages(REWARDS, **how)[0])

    return {
        "ddof 1": best(),
        "ddof 0": best(ddof=0),
        "TRL": best(epsilon=1e-4),
        "verl": best(epsilon=1e-6),
    }


def group_of_one() -> Numbers:
    return {
        name: float(group_advantages(np.array([[1.0]]), alone=alone)[0])
        for name, alone in {"alone 0": 0.0, "verl": 1 / (1 + 1e-6)}.items()
    }


def kl_gradient() -> Numbers:
    """One token that the reference finds e^3 times likelier; its pull towards the reference, −dKL/d
    ln π."""

    def pull(**how: Any) -> float:
        one = np.full((1, 1), -4.0)
        given: dict[str, Any] = {"mask": one < 0, "reference_log_prob": one + 3, "kl_weight": 1.0}
        return -float(
            grpo_backward((1.0,), grpo_forward(one, advantages=np.zeros(1), **given, **how)[1])[
                0, 0
            ]
        )

    return {
        "k3": pull(),
        "k3, verl's bounds": pull(kl_bounds=(20.0, 10.0)),
        "unbiased": pull(kl="unbiased"),
    }


def clip_width() -> Numbers:
    return {"ε 0.2": grpo(kl_weight=0.0), "ε 10": grpo(kl_weight=0.0, clip=(10, 10))}


def rotation() -> Numbers:
    still = Op(lambda x, **how: (x, None), lambda dy, saved: dy)
    bare = REFERENCE | {"mla": REFERENCE["mla"]._replace(forward=without_norms)}
    return {
        "RoPE and latent norms": main(),
        "no RoPE": main(ops=REFERENCE | {"rope": still}),
        "neither": main(ops=bare | {"rope": still}),
    }


def latent_eps() -> Numbers:
    """Moonlight's eps, with latents as small as at initialisation, where eps counts."""
    rng = np.random.default_rng(0)
    latent = 0.006 * rng.normal(size=(1, 512))
    return {
        name: float(np.sqrt(np.mean(rms_norm_forward(latent, np.ones(512), eps=eps)[0] ** 2)))
        for name, eps in {"config": 1e-5, "class_default": 1e-6}.items()
    }


def late_angles() -> Numbers:
    """The largest error of cos(t·θ_i) if angles are float32, V3's frequencies."""
    v3 = preset("v3")
    inv_freq = rope_frequencies(v3.rope, v3.theta, v3.yarn)
    narrow = inv_freq.astype(np.float32)

    def error(t: int) -> float:
        angle = (np.float32(t) * narrow).astype(np.float64)
        return float(np.max(np.abs(np.cos(t * inv_freq) - np.cos(angle))))

    return {f"position {t}": error(t) for t in (100, 32_000, 163_000)}


def hidden_float32() -> Numbers:
    """The largest relative change of a logit if norms and gate cast to float32 inside a model in
    float64."""

    def norm(x: Array, w: Array, *, eps: float) -> Any:
        y, saved = rms_norm_forward(x.astype(np.float32), w.astype(np.float32), eps=eps)
        return y.astype(np.float64), saved

    def gate(x: Array, w: Array, **how: Any) -> Any:
        y, saved = router_forward(x.astype(np.float32), w.astype(np.float32), **how)
        return y._replace(
            weights=y.weights.astype(np.float64), scores=y.scores.astype(np.float64)
        ), saved

    cast = REFERENCE | {
        "rms_norm": REFERENCE["rms_norm"]._replace(forward=norm),
        "router": REFERENCE["router"]._replace(forward=gate),
    }
    exact, rounded = (logits(parameters(), run(ops=ops).hidden) for ops in (REFERENCE, cast))
    return {
        "float64": 0.0,
        "float32 inside": float(np.max(np.abs(rounded - exact)) / np.max(np.abs(exact))),
    }


UNEVEN = np.arange(20) < np.array([[20], [3]])  # the real tokens of the text's two rows


def in_parts(term: str, *wrong: str, **fields: Any) -> Numbers:
    """One term of the loss of the text's rows, a micro-batch and a rank each, by rule."""
    config, arrays = convention(**fields), {"tokens": text(), "key_mask": UNEVEN}
    split = split_batch("micro_batches=2", arrays, config)
    sums = term_gradient(parameters(), split, config, REFERENCE, term)
    found = rules(term, term_counts(split, config)[term], split.ranks)
    return {
        rule: sum(c * loss for c, (loss, _) in zip(found[rule], sums, strict=True))
        for rule in ("right", *wrong)
    }


def main_in_parts() -> Numbers:
    return in_parts("main", MEANS, SUM, TWICE, "every position counted, padding too")


def mtp_in_parts() -> Numbers:
    by_main = "divided by the main loss's count"
    return in_parts("mtp.1", MEANS, WEIGHTED, by_main, mtp_normaliser="valid")


def balance_in_parts() -> Numbers:
    return in_parts("balance", WEIGHTED, SUM, TWICE)


def statistics_of_part() -> Numbers:
    """The text's two rows in one micro-batch: f counted over each, or over both."""
    split = split_batch("rows=2", {"tokens": text()}, TINY)
    each, both = (
        term_gradient(parameters(), split, TINY, REFERENCE, term)[0][0]
        for term in ("balance", "balance_of_part")
    )
    return {"each sequence's": each / 2, "the micro-batch's": both}


def grpo_in_parts(rows: list[int], average: Any, *wrong: str) -> Numbers:
    """The loss of four outputs in micro-batches of these ``rows``, by rule."""
    parts = np.split(np.arange(4), np.cumsum(rows)[:-1])
    advantages = group_advantages(REWARDS)
    sums = [
        float(
            grpo_forward(
                LOG_PROB[part],
                advantages=advantages[part],
                mask=LENGTHS[part],
                old_log_prob=OLD[part],
                reference_log_prob=REFERENCE_LOG_PROB[part],
                average=average,
                normaliser=1.0,
            )[0].loss
        )
        for part in parts
    ]
    tokens, outputs = [float(LENGTHS[part].sum()) for part in parts], [float(n) for n in rows]
    own = tokens if average == "token" else outputs
    found = rules("grpo", TermCounts(own, [4.0 * n for n in rows], own), len(rows))
    return {
        rule: sum(c * x for c, x in zip(found[rule], sums, strict=True))
        for rule in ("right", *wrong)
    }


def token_mean_in_parts() -> Numbers:
    """Divided by the micro-batches twice, it is what two ranks make of it: the same number."""
    return grpo_in_parts([2, 2], "token", MEANS, TWICE, SUM)


def output_mean_in_parts() -> Numbers:
    return grpo_in_parts([1, 3], "sequence", MEANS, SUM)


# FP8

FORMS = (Recipe(), Recipe(scale="ue8m0"))


def fp8_floor() -> Numbers:
    """What a tile of zeros is quantised to: x / scale, scale = max(largest, floor) / 448."""
    with np.errstate(invalid="ignore"):
        return {
            f"floor {floor:g}": float(
                quantised(np.zeros((1, 128)), (1, 128), Recipe(floor)).numbers[0, 0]
            )
            for floor in (1e-4, 1e-12, 0.0)
        }


def fp8_small_gradient() -> Numbers:
    """The error of a tile of 128 numbers of std 1e-11, over their root mean square."""
    x = 1e-11 * np.random.default_rng(0).normal(size=(1, 128)).astype(np.float32)
    return {
        f"floor {floor:g}": relative(quantised(x, (1, 128), Recipe(floor)).values(), x)
        for floor in (1e-4, 1e-12)
    }


def relative(x: Array, exact: Array) -> float:
    return float(np.linalg.norm(x - exact) / np.linalg.norm(exact))


def fp8_largest() -> Numbers:
    """A tile's largest number, 1.9, as it is read again: its scale as it is, the next power of two
    above, that below, and as OCP's MX format has it, 2^⌊log2 1.9⌋ / 2^8."""
    x = np.full((1, 128), 1.9, np.float32)
    scale = 1.9 / LARGEST
    down, mx = 2.0 ** np.floor(np.log2(scale)), 2.0**-8
    found = {recipe.scale: float(quantised(x, (1, 128), recipe).values()[0, 0]) for recipe in FORMS}
    return found | {"rounded down": LARGEST * down, "OCP's MX": LARGEST * mx}


def fp8_scale_error() -> Numbers:
    """Of 128 × 128 normal numbers, the error over their root mean square."""
    x = np.random.default_rng(0).normal(size=(128, 128)).astype(np.float32)
    return {recipe.scale: relative(quantised(x, (1, 128), recipe).values(), x) for recipe in FORMS}


def fp8_sums() -> Numbers:
    """The largest error, in per cent, of 32 × 32 products of 4,096 positive terms each, against the
    exact ones of the same quantised numbers."""
    a, b = np.random.default_rng(0).uniform(0, 1, (2, 32, 4096)).astype(np.float32)
    rounded = (quantised(a, (1, 128)).values(), quantised(b, (128, 128)).values())
    exact = np.matmul(rounded[0].astype(np.float64), rounded[1].astype(np.float64).T)
    recipes = {
        "float32": Recipe(),
        "14 bits, each 128 terms": Recipe(bits=14),
        "14 bits throughout": Recipe(bits=14, promote=0),
    }
    return {
        name: 100 * float(np.max(np.abs(linear_forward(a, b, recipe)[0] / exact - 1)))
        for name, recipe in recipes.items()
    }


def fp8_weight_input() -> Numbers:
    """The error of a weight's gradient over 256 tokens, over its root mean square."""
    rng = np.random.default_rng(0)
    x, w, dy = (
        rng.normal(size=shape).astype(np.float32) for shape in ((256, 128), (128, 128), (256, 128))
    )
    exact = dy.T.astype(np.float64) @ x
    found: Numbers = {}
    for recipe in (Recipe(), Recipe(weight_input="exact")):
        _, saved = linear_forward(x, w, recipe)
        found[recipe.weight_input] = relative(linear_backward(dy, saved)[1], exact)
    return found
