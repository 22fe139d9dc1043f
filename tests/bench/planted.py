"""Mistakes that the benchmark's own checks must see, for each of its rows: what is done wrong at
the launch of one kernel. The kernels' tests have mistakes in the kernels themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from refimpl.kernels.launch import ForwardedLaunch

Arguments = list[Any]
Run = Callable[[Arguments], None]


class Mistake(NamedTuple):
    kernel: str
    launch: Callable[[Run, Arguments], None]  # makes the launch, or something like it


class PlantedLaunch(ForwardedLaunch):
    """Launches right, until a mistake is set."""

    mistake: Mistake | None = None

    def __call__(
        self, module: Any, kernel: str, grid: Any, block: Any, arguments: Sequence[Any], **more: Any
    ) -> None:
        def run(given: Arguments) -> None:
            self.launch(module, kernel, grid, block, given, **more)

        if self.mistake is not None and self.mistake.kernel == kernel:
            self.mistake.launch(run, [*arguments])
        else:
            run([*arguments])


def given(kernel: str, place: int, wrong: Callable[[Any], Any]) -> Mistake:
    """Another argument: ``wrong`` of the right one, in its type."""

    def launch(run: Run, arguments: Arguments) -> None:
        right = arguments[place]
        arguments[place] = np.asarray(wrong(right)).astype(right.dtype)
        if not isinstance(right, np.ndarray):
            arguments[place] = arguments[place][()]
        run(arguments)

    return Mistake(kernel, launch)


def found(kernel: str, place: int, wrong: Callable[..., Any]) -> Mistake:
    """Another result: ``wrong`` of all arguments instead of what the kernel wrote."""

    def launch(run: Run, arguments: Arguments) -> None:
        run(arguments)
        result = arguments[place]
        result[...] = np.asarray(wrong(*arguments)).reshape(result.shape).astype(result.dtype)

    return Mistake(kernel, launch)


def zero_row(kernel: str, place: int = 0) -> Mistake:
    return found(kernel, place, lambda *x: np.concatenate((0 * x[place][:1], x[place][1:])))


def scaled(kernel: str, place: int = 0, by: float = 1.02) -> Mistake:
    return found(kernel, place, lambda *x: by * x[place].astype(np.float64))


def rolled(kernel: str, place: int = 0, axis: int = 0) -> Mistake:
    return found(kernel, place, lambda *x: np.roll(x[place], 1, axis=axis))


def changed(x: np.ndarray, index: Any, value: Any) -> np.ndarray:
    copy = x.copy()
    copy[index] = value
    return copy


def wide(*arrays: np.ndarray) -> list[np.ndarray]:
    return [x.astype(np.float64) for x in arrays]


def norm_without_eps(y: Any, r: Any, x: Any, w: Any, *_: Any) -> np.ndarray:
    x, w = wide(x, w)
    return w * x / np.sqrt((x * x).mean(axis=-1, keepdims=True))


def norm_without_weight(y: Any, r: Any, x: Any, *_: Any) -> np.ndarray:
    return x.astype(np.float64) * r.reshape(-1, 1)


def dx_without_the_mean(dx: Any, part: Any, dy: Any, x: Any, w: Any, r: Any, *_: Any) -> Any:
    dy, w = wide(dy, w)
    return dy * w * r.reshape(-1, 1)


def forgets_the_mean(run: Run, arguments: Arguments) -> None:
    arguments[1][...] = 0
    run(arguments)


def silu_without_its_second_term(dgate: Any, dup: Any, dy: Any, gate: Any, up: Any, *_: Any) -> Any:
    dy, gate, up = wide(dy, gate, up)
    return dy * up / (1 + np.exp(-gate))


NORM = {
    "eps left out": found("rms_norm_forward", 0, norm_without_eps),
    "weight left out": found("rms_norm_forward", 0, norm_without_weight),
    "a row of zeros": zero_row("rms_norm_forward"),
    "two per cent more": scaled("rms_norm_forward"),
    "dx without the mean": found("rms_norm_backward", 0, dx_without_the_mean),
    "a row of dx zero": zero_row("rms_norm_backward"),
    "rows of dx of their neighbours": rolled("rms_norm_backward"),
    "first part of dw lost": given("rms_norm_weight", 1, lambda part: changed(part, 0, 0)),
    "1e-5 more of dw": scaled("rms_norm_weight", by=1 + 1e-5),
}
ROPE = {
    "turned back by the forward": given("rope_rotate", 9, lambda sign: -abs(sign)),
    "turned on by the backward": given("rope_rotate", 9, abs),
    "turned the other way": given("rope_rotate", 9, lambda sign: -sign),
    "the other layout": given("rope_rotate", 8, lambda interleaved: 1 - interleaved),
    "angles of the next position": given("rope_rotate", 2, lambda cos: np.roll(cos, 1, axis=0)),
    "sine of one position zero": given("rope_rotate", 3, lambda sin: changed(sin, 1, 0)),
    "a head of zeros": found("rope_rotate", 0, lambda y, *_: changed(y, (0, 0, 0), 0)),
}
SWIGLU = {
    "gate and up exchanged": Mistake(
        "swiglu_forward", lambda run, x: run([x[0], x[2], x[1], *x[3:]])
    ),
    "a row of zeros": zero_row("swiglu_forward"),
    "silu without its second term": found("swiglu_backward", 0, silu_without_its_second_term),
    "gradients exchanged": Mistake("swiglu_backward", lambda run, x: run([x[1], x[0], *x[2:]])),
    "two per cent more of dup": scaled("swiglu_backward", 1),
}
SOFTMAX = {  # of the head
    "no softmax in the gradient": given("cross_entropy_backward", 3, lambda total: np.inf * total),
    "sums of the next row": given("cross_entropy_backward", 3, lambda total: np.roll(total, 1)),
    "probabilities two per cent less": given(
        "cross_entropy_backward", 3, lambda total: 1.02 * total
    ),
    "the target's 1 left out": given("cross_entropy_backward", 4, lambda target: 0 * target - 1),
    "targets of the next row": given(
        "cross_entropy_backward", 4, lambda target: np.roll(target, 1)
    ),
    "a token left out": given("cross_entropy_backward", 5, lambda weight: changed(weight, 0, 0)),
    "a loss left out": found("cross_entropy_forward", 2, lambda *x: changed(x[2], 0, 0)),
}


def at_targets(z: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return np.arange(z.shape[-1]) == targets[:, None]


IN_PLACE = {
    "no softmax in the gradient": found(
        "cross_entropy_in_place",
        0,
        lambda z, _, targets, weight, *x: -weight[:, None] * at_targets(z, targets),
    ),
    "probabilities two per cent less": found(
        "cross_entropy_in_place",
        0,
        lambda z, _, targets, *x: z.astype(np.float64) * np.where(at_targets(z, targets), 1, 0.98),
    ),
    "the target's 1 left out": found(
        "cross_entropy_in_place",
        0,
        lambda z, _, targets, weight, *x: (
            z.astype(np.float64) + weight[:, None] * at_targets(z, targets)
        ),
    ),
    "targets of the next row": given(
        "cross_entropy_in_place", 2, lambda target: np.roll(target, 1)
    ),
    "a token left out": given("cross_entropy_in_place", 3, lambda weight: changed(weight, 0, 0)),
    "a loss left out": found("cross_entropy_in_place", 1, lambda *x: changed(x[1], 0, 0)),
    "a row of zeros": zero_row("cross_entropy_in_place"),
    "rows of their neighbours": rolled("cross_entropy_in_place"),
    "1e-5 more of the loss": scaled("cross_entropy_loss", by=1 + 1e-5),
    "a token left out of the loss": given(
        "cross_entropy_loss", 2, lambda weight: changed(weight, 0, 0)
    ),
}
ATTENTION = {
    "every key seen": given("flash_attention_forward", 15, lambda causal: 0 * causal),
    "scale ten per cent more": given("flash_attention_forward", 14, lambda scale: 1.1 * scale),
    "values of the key before": given("flash_attention_forward", 4, lambda v: np.roll(v, 1, 1)),
    "keys of the other head": given("flash_attention_forward", 3, lambda k: np.roll(k, 1, 2)),
    "five per cent more": scaled("flash_attention_forward", by=1.05),
    "a query of zeros": found(
        "flash_attention_forward", 0, lambda o, *_: changed(o, (0, -1, 0), 0)
    ),
    "row sums of the query before": given(
        "flash_attention_backward_queries", 6, lambda x: np.roll(x, 1, axis=-1)
    ),
    "no row sums": given("flash_attention_backward_keys", 7, lambda row_sum: 0 * row_sum),
    "log-sum-exps of the query before": given(
        "flash_attention_backward_keys", 6, lambda lse: np.roll(lse, 1, axis=-1)
    ),
    "every query sees the key": given("flash_attention_backward_keys", 18, lambda x: 0 * x),
    "five per cent more of dq": scaled("flash_attention_backward_queries", by=1.05),
    "five per cent more of dk": scaled("flash_attention_backward_keys", by=1.05),
    "five per cent more of dv": scaled("flash_attention_backward_keys", 1, by=1.05),
    "a key of dv zero": found(
        "flash_attention_backward_keys", 1, lambda dk, dv, *_: changed(dv, (0, -1, 0), 0)
    ),
}
DECODE = {
    "scale a half more": given("mla_decode_split", 12, lambda scale: 1.5 * scale),
    "cache of another sequence": given("mla_decode_split", 3, lambda cache: np.roll(cache, 1, 0)),
    "q of another head": given("mla_decode_split", 2, lambda q: np.roll(q, 1, 2)),
    "last token left out": given("mla_decode_split", 8, lambda keys: keys - 1),
    "a split left out": given("mla_decode_combine", 3, lambda splits: splits - 1),
    "totals of another row": given(
        "mla_decode_combine", 2, lambda x: np.roll(x.reshape(4, -1), 1, 0).reshape(x.shape)
    ),
    "five per cent more": scaled("mla_decode_combine", by=1.05),
    "a row of zeros": found("mla_decode_combine", 0, lambda o, *_: changed(o, (1, 0, 1), 0)),
}
GATE = {
    "bias left out": given("router_forward", 4, lambda bias: 0 * bias),
    "all groups kept": Mistake("router_forward", lambda run, x: run([*x[:9], x[8], *x[10:]])),
    "not normalised": given("router_forward", 13, lambda normalise: 0 * normalise),
    "scale 1e-5 more": given("router_forward", 14, lambda scale: (1 + 1e-5) * scale),
    "slots of the weights permuted": rolled("router_forward", 1, axis=1),
    "slots of the ids permuted": rolled("router_forward", 2, axis=1),
    "a row of weights zero": zero_row("router_forward", 1),
    "scores 1e-5 more": scaled("router_forward", by=1 + 1e-5),
}
PERMUTE = {
    "slots permuted": given("moe_permute", 2, lambda order: np.roll(order, 1)),
    "two slots exchanged": given(
        "moe_permute", 2, lambda order: changed(order, [0, -1], order[[-1, 0]])
    ),
    "a row of zeros": zero_row("moe_permute"),
    "two per cent more": scaled("moe_permute"),
}
COMBINE = {
    "weights left out": given("moe_combine", 3, lambda weights: 0 * weights + 1),
    "weights of the next slot": given("moe_combine", 3, lambda w: np.roll(w, 1, axis=1)),
    "a slot left out": given("moe_combine", 3, lambda weights: changed(weights, (0, 0), 0)),
    "slots permuted": given("moe_combine", 2, lambda place: np.roll(place, 1)),
    "a row of zeros": zero_row("moe_combine"),
    "two per cent more": scaled("moe_combine"),
}
EXPERTS = {
    "weights of the expert before": given("grouped_linear_forward", 2, lambda w: np.roll(w, 1, 0)),
    "rows of the expert before": given(
        "grouped_linear_forward", 3, lambda start: np.maximum(start - 1, 0)
    ),
    "five per cent more": scaled("grouped_linear_forward", by=1.05),
    "up's part of dx left out": given("grouped_linear_input", 10, lambda pairs: 1),
    "a row of dx left out": zero_row("grouped_linear_input"),
    "rows exchanged in dw": given("grouped_linear_weight", 1, lambda dy: np.roll(dy, 1, 0)),
    "a row left out of dw": given("grouped_linear_weight", 2, lambda x: changed(x, 0, 0)),
    "five per cent more of dw": scaled("grouped_linear_weight", by=1.05),
    "an expert's dw zero": found(
        "grouped_linear_weight", 0, lambda dw, *_: changed(dw, np.abs(dw).sum((1, 2)).argmax(), 0)
    ),
    "slots permuted": given("moe_permute", 2, lambda place: np.roll(place, 1)),
    "weights left out": given("moe_combine", 3, lambda weights: 0 * weights + 1),
    "gradients of weights exchanged": rolled("moe_combine_backward", 1, axis=0),
    "dy of the next token": given("moe_combine_backward", 2, lambda dy: np.roll(dy, 1, 0)),
}
GRPO = {
    "KL left out": given("grpo_forward", 20, lambda weight: 0 * weight),
    "never clipped above": given("grpo_forward", 18, lambda high: np.inf * high),
    "never clipped below": given("grpo_forward", 17, lambda low: 0 * low),
    "old and reference exchanged": Mistake(
        "grpo_forward", lambda run, x: run([*x[:5], x[6], x[5], *x[7:]])
    ),
    "advantages of the next output": given("grpo_forward", 8, lambda a: np.roll(a, 1)),
    "a row of zeros": zero_row("grpo_forward", 1),
    "1e-5 more": scaled("grpo_forward", 1, by=1 + 1e-5),
    "an output left out of the loss": given("grpo_loss", 1, lambda part: changed(part, 0, 0)),
}
ADAMW = {
    "first correction left out": given("adamw_update", 7, lambda correct: 1),
    "second correction left out": given("adamw_update", 8, lambda correct: 1),
    "epsilon left out": given("adamw_update", 9, lambda epsilon: 0),
    "decay left out": given("adamw_update", 10, lambda decay: 0),
    "rates exchanged": Mistake("adamw_update", lambda run, x: run([*x[:5], x[6], x[5], *x[7:]])),
    "learning rate a thousandth more": given("adamw_update", 11, lambda rate: 1.001 * rate),
    "mean of the gradients forgotten": Mistake("adamw_update", forgets_the_mean),
    "first rate 2e-5 more": given("adamw_update", 5, lambda rest: (1 + 2e-5) * rest),
    "second rate 2e-5 more": given("adamw_update", 6, lambda rest: (1 + 2e-5) * rest),
    "last element left out": given("adamw_update", 4, lambda size: size - 1),
}
PLANTED: dict[str, dict[str, Mistake]] = {
    "RMSNorm forward": NORM,
    "RMSNorm backward": NORM,
    "RoPE forward": ROPE,
    "RoPE backward": ROPE,
    "SwiGLU forward": SWIGLU,
    "SwiGLU backward": SWIGLU,
    "attention forward, 1k": ATTENTION,
    "attention backward, 1k": ATTENTION,
    "MLA decode, 16 heads, 1k": DECODE,
    "gate top-k": GATE,
    "MoE permute": PERMUTE,
    "MoE combine": COMBINE,
    "MoE layer, 8 experts, balanced": EXPERTS,
    "MoE layer, 64 experts, Zipf": EXPERTS,
    "MoE layer, 64 experts, one hot": EXPERTS,
    "CE forward + backward in place": IN_PLACE,
    "head + CE": SOFTMAX,
    "GRPO from log-probabilities": GRPO,
    "AdamW step": ADAMW,
}
"""By row and by what is done wrong."""
