"""Torch's side of `refimpl bench --gpu`: the same work on the same inputs, eager and compiled. Not
part of the package.

Loaded by its path from refimpl/bench/run.py where torch is installed. Each baseline is what someone
who is after speed writes with torch's own functions: its fused RMSNorm, cross-entropy and AdamW
where it has one, and of its attentions the fastest.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._functorch.config
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

VERSION = torch.__version__
EPS = 1e-6
TOP_K = 8
ROTATED = 64
GROUPS = 8
KEEP_GROUPS = 4
SCALE = 2.5
CLIP, KL_WEIGHT = 0.2, 0.04

Call = Callable[[], object]
Transform = Callable[[Callable[..., Any]], Callable[..., Any]]


def rms_norm(x: Any, w: Any) -> Any:
    return functional.rms_norm(x, (x.shape[-1],), w, EPS)


def rope(x: Any, cos: Any, sin: Any) -> Any:
    """Interleaved pairs; x [1, T, H, R], cos and sin [T, R / 2]."""
    pairs = x.float().unflatten(-1, (-1, 2))
    c, s = cos[None, :, None, :], sin[None, :, None, :]
    a, b = pairs[..., 0], pairs[..., 1]
    return torch.stack((a * c - b * s, a * s + b * c), dim=-1).flatten(-2).to(x.dtype)


def swiglu(gate: Any, up: Any) -> Any:
    return functional.silu(gate) * up


def padded_attention(q: Any, k: Any, v: Any) -> Any:
    """[1, T, H, width] each. Values as wide as keys, with zeros: else flash attention is not taken,
    and the square is made."""
    width = v.shape[-1]
    v = functional.pad(v, (0, k.shape[-1] - width))
    turned = (x.transpose(1, 2) for x in (q, k, v))
    o = functional.scaled_dot_product_attention(*turned, is_causal=True)
    return o[..., :width].transpose(1, 2)


def cudnn_attention(q: Any, k: Any, v: Any) -> Any:
    """cuDNN's, which takes the widths as they are."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        turned = (x.transpose(1, 2) for x in (q, k, v))
        return functional.scaled_dot_product_attention(*turned, is_causal=True).transpose(1, 2)


def decode(q: Any, cache: Any) -> Any:
    """q [B, 1, H, C + R], cache [B, T, 1, C + R], the first C of which are the values: two products
    for all heads of a sequence."""
    width = cache.shape[-1] - ROTATED
    keys = cache[:, :, 0]
    p = (q[:, 0] * keys.shape[-1] ** -0.5 @ keys.mT).softmax(-1)  # no pass over the scores to scale
    return (p @ keys[..., :width])[:, None]


def sdpa_decode(q: Any, cache: Any) -> Any:
    """The same by torch's attention."""
    keys = cache.transpose(1, 2)
    turned = q.transpose(1, 2), keys, keys
    o = functional.scaled_dot_product_attention(*turned, enable_gqa=True)
    return o[..., :-ROTATED].transpose(1, 2)


def gate(logits: Any, bias: Any) -> Any:
    scores = logits.sigmoid()
    grouped = (scores + bias).unflatten(-1, (GROUPS, -1))
    best = grouped.topk(2, dim=-1).values.sum(-1).topk(KEEP_GROUPS, dim=-1, sorted=False).indices
    keep = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter_(-1, best, True)
    chosen = (
        grouped.masked_fill(~keep[..., None], float("-inf")).flatten(-2).topk(TOP_K, dim=-1).indices
    )
    weights = scores.gather(-1, chosen)
    return SCALE * weights / weights.sum(-1, keepdim=True), chosen


def permute(x: Any, order: Any) -> Any:
    return x.index_select(0, order // TOP_K)


def combine(rows: Any, where: Any, weights: Any) -> Any:
    own = rows.index_select(0, where).unflatten(0, (-1, TOP_K))
    return (own * weights[..., None]).sum(1).to(rows.dtype)


def experts(
    x: Any, weights: Any, w_gate: Any, w_up: Any, w_down: Any, order: Any, where: Any, start: Any
) -> Any:
    """All experts' products by grouped_mm, and the weighted sums by one product, which holds no
    float32 row of each slot. order: the slot of each row; where: its inverse."""
    stop = start[1:].int()
    rows = x.index_select(0, order // weights.shape[1])
    gate, up = (functional.grouped_mm(rows, w.mT, offs=stop) for w in (w_gate, w_up))
    out = functional.grouped_mm(swiglu(gate, up), w_down.mT, offs=stop)
    own = out.index_select(0, where).unflatten(0, weights.shape)
    return torch.bmm(weights[:, None].to(x.dtype), own)[:, 0]


def cross_entropy(logits: Any, targets: Any) -> Any:
    return functional.cross_entropy(logits, targets)


def head(h: Any, w: Any, targets: Any) -> Any:
    return functional.cross_entropy(functional.linear(h, w), targets)


def grpo(log_prob: Any, old: Any, reference: Any, advantages: Any) -> Any:
    ratio, a = (log_prob - old).exp(), advantages[:, None]
    objective = torch.minimum(ratio * a, ratio.clamp(1 - CLIP, 1 + CLIP) * a)
    u = reference - log_prob
    return -(objective - KL_WEIGHT * (torch.expm1(u) - u)).mean(1).mean()


def adamw(p: Any, g: Any, m: Any, v: Any) -> None:
    """The third step, say: the corrections are constants."""
    m.lerp_(g, 0.1)
    v.lerp_(g * g, 0.05)
    p.mul_(1 - 1e-3 * 0.1).sub_(1e-3 * (m / 0.271) / ((v / 0.142625).sqrt() + 1e-8))


def forward_of(function: Callable[..., Any]) -> Callable[..., Call]:
    def prepare(transform: Transform, *inputs: Any) -> Call:
        changed = transform(function)

        def call() -> object:
            with torch.no_grad():
                return changed(*inputs)

        return call

    return prepare


def backward_of(function: Callable[..., Any], differentiable: int) -> Callable[..., Call]:
    """The last input is the cotangent of the one output."""

    def prepare(transform: Transform, *inputs: Any) -> Call:
        *given, dy = inputs
        for x in given[:differentiable]:
            x.requires_grad_(True)
        y = transform(function)(*given)
        return lambda: torch.autograd.grad(y, given[:differentiable], dy, retain_graph=True)

    return prepare


def both_of(function: Callable[..., Any], differentiable: int = 1) -> Callable[..., Call]:
    """Forward and backward of a scalar, in the first inputs."""

    def prepare(transform: Transform, *inputs: Any) -> Call:
        changed, given = transform(function), inputs[:differentiable]
        for x in given:
            x.requires_grad_(True)
        return lambda: torch.autograd.grad(changed(*inputs), given)

    return prepare


def fastest(*several: Callable[..., Call]) -> Callable[..., Call]:
    """Of several ways the one that takes the least time on these inputs; one that this machine
    can't go is left out, unless it is the last."""

    def prepare(transform: Transform, *inputs: Any) -> Call:
        taken = dict[Call, float]()
        for i, way in enumerate(several):
            try:
                call = way(transform, *inputs)
                for _ in range(2):  # the first is a warm-up
                    started = time.perf_counter()
                    call()
                    if torch.cuda.is_available():
                        torch.cuda.synchronize()
                    taken[call] = time.perf_counter() - started
            except RuntimeError:
                if not taken and i + 1 == len(several):
                    raise
        return min(taken, key=lambda call: taken[call])

    return prepare


def experts_step(transform: Transform, *inputs: Any) -> Call:
    """y, and the gradients of x and of all weights."""
    *given, dy = inputs
    changed = transform(experts)
    for x in given[:5]:
        x.requires_grad_(True)

    def call() -> object:
        y = changed(*given)
        return y.detach(), *torch.autograd.grad(y, given[:5], dy)

    return call


def rope_backward(transform: Transform, dy: Any, cos: Any, sin: Any) -> Call:
    return backward_of(rope, 1)(transform, torch.empty_like(dy).normal_(), cos, sin, dy)


def adamw_step(transform: Transform, p: Any, g: Any) -> Call:
    if transform is not eager:
        m, v = torch.zeros_like(p), torch.zeros_like(p)
        return forward_of(adamw)(transform, p, g, m, v)
    p = p.requires_grad_(True)
    p.grad = g
    return torch.optim.AdamW(
        [p], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True, capturable=True
    ).step


def eager(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


ATTENTION = {
    "forward": fastest(forward_of(cudnn_attention), forward_of(padded_attention)),
    "backward": fastest(backward_of(cudnn_attention, 3), backward_of(padded_attention, 3)),
}
DECODE = fastest(forward_of(sdpa_decode), forward_of(decode))
BASELINES: dict[str, Callable[..., Call]] = {
    "RMSNorm forward": forward_of(rms_norm),
    "RMSNorm backward": backward_of(rms_norm, 2),
    "RoPE forward": forward_of(rope),
    "RoPE backward": rope_backward,
    "SwiGLU forward": forward_of(swiglu),
    "SwiGLU backward": backward_of(swiglu, 2),
    **{f"attention {way}, {n}k": call for n in (1, 4, 16, 32) for way, call in ATTENTION.items()},
    **{f"MLA decode, {h} heads, {n}k": DECODE for h in (16, 128) for n in (1, 4, 16, 64)},
    "gate top-k": forward_of(gate),
    "MoE permute": forward_of(permute),
    "MoE combine": forward_of(combine),
    **{f"MoE layer, {n} experts, balanced": experts_step for n in (8, 64, 256)},
    **{f"MoE layer, 64 experts, {loads}": experts_step for loads in ("Zipf", "one hot")},
    "CE forward + backward in place": both_of(cross_entropy),
    "head + CE": both_of(head, 2),
    "GRPO from log-probabilities": both_of(grpo),
    "AdamW step": adamw_step,
}
"""By the rows' names: from a transform (`eager`, torch.compile) and the inputs, the call that is
timed."""

NOT_COMPILED = tuple(x for x in BASELINES if x.startswith(("attention", "MLA", "MoE layer")))
"""Rows whose time is one of torch's own kernels, which torch.compile calls too, or, of experts, in
most part several."""


class TorchDevice:
    """`refimpl.bench.measure.Device` by torch: a stream, its graphs, its events, its allocator's
    own peak. `refimpl.bench.measure.measure` warms the clocks that compiling let go cold, as for
    ours."""

    def __init__(self) -> None:
        torch._functorch.config.donated_buffer = (
            False  # a compiled backward is called more than once here
        )
        torch.compiler.reset()
        torch.cuda.empty_cache()
        self.stream = torch.cuda.Stream()

    def baseline(self, name: str, arrays: Sequence[Any], compiled: bool) -> Call:
        """The call, made twice already: compiling and allocating are over."""
        tensors = [tensor(x) for x in arrays]
        with torch.cuda.stream(self.stream):
            call = BASELINES[name](torch.compile if compiled else eager, *tensors)
            for _ in range(2):
                call()
        self.stream.synchronize()
        return call

    def capture(self, calls: Sequence[Call]) -> Call:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            for call in calls:
                call()
        return graph.replay

    def seconds(self, call: Call) -> float:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self.stream):
            before.record()
            call()
            after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1e3

    def free(self) -> None:
        """Leave the memory to others: CuPy's next row needs it."""
        gc.collect()
        torch.cuda.empty_cache()

    def peak(self, call: Call) -> int:
        self.stream.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        with torch.cuda.stream(self.stream):
            call()
        self.stream.synchronize()
        return int(torch.cuda.max_memory_allocated() - start)


def tensor(x: Any) -> Any:
    """A tensor on the memory of a CuPy array; bfloat16 by way of int16, which DLPack has in every
    version."""
    if str(x.dtype) == "bfloat16":
        return torch.from_dlpack(x.view("int16")).view(torch.bfloat16)
    return torch.from_dlpack(x)
