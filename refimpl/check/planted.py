"""Planted bugs: wrong backwards (and forwards) that the checker must catch, each an edit of an op's
own source.

An edit is a pair of pieces of Python: what the op computes, and what a wrong implementation
computes there. A piece is one expression, or whole statements; nothing in the new one deletes.
`plant` makes the edited module.

Pieces are compared as syntax trees. Layout (lines, spaces, quotes, comments, brackets without a
meaning) therefore plays no part, nor does the place within the module, and an edit fails only if
the same thing is computed in other words. It then says so: the old piece must stand exactly once.
Where it stands more often, ``within`` names the function that is meant. To adapt an edit, copy the
new words from the source. (Tags of equations are no anchor: most bugs change one of several terms
of a tagged statement, and need its words all the same.)

The tests assert that every bug is caught, and ``make bugs`` prints which check catches it. A bug
that forward and backward share is consistent in itself: only an independent implementation can
catch it, here the golden values. ``exposed_by`` says what an input must have to show the bug at
all.
"""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import sys
import types
from typing import Any, NamedTuple

from ..ops import AnyOp, Op

__all__ = ["PLANTED", "PLANTED_IN_FP8", "Planted", "plant"]


class Planted(NamedTuple):
    """A mistake: edits of an op's source, and which rule sees it."""

    op: str  # an op, a function that is no pair (of `FUNCTIONS`), "model" or "fp8"
    name: str
    exposed_by: str
    edits: tuple[tuple[str, str], ...]  # (old, new): expressions or statements
    shared: bool = False  # forward and backward agree on the mistake
    within: str = ""  # the only function to edit, if the old piece stands in others too
    module: str = ""  # the module to edit, if not the op's own: one that the op's imports from
    of_checker: bool = False  # right but for one number type: it tests the checker, not a port


def _one(
    op: str,
    name: str,
    exposed_by: str,
    old: str,
    new: str,
    *,
    shared: bool = False,
    within: str = "",
    module: str = "",
    of_checker: bool = False,
) -> Planted:
    return Planted(op, name, exposed_by, ((old, new),), shared, within, module, of_checker)


FUNCTIONS = {  # what has no pair of its own, and its module: judged by golden values alone
    "expert_load": "refimpl.ops.router",
    "bias_update": "refimpl.ops.router",
}

OTHERS = {"model": "refimpl.model", "fp8": "refimpl.fp8"}  # that are no op


PLANTED: tuple[Planted, ...] = (
    _one("linear", "weight gradient over one batch row", "batch ≥ 2",
         "xp.matmul(xp.matrix_transpose(dy_rows), x_rows)",
         "xp.matmul(xp.matrix_transpose(dy_rows[:1]), x_rows[:1])"),
    _one("embedding", "= for += on repeated ids", "repeated ids",
         "return scatter_add(rows, xp.reshape(dy, (-1, dy.shape[-1])), saved.shape[0])",
         "dw = xp.zeros((saved.shape[0], dy.shape[-1]), dtype=dy.dtype)\n"
         "dw[rows] = xp.reshape(dy, (-1, dy.shape[-1]))\nreturn dw"),
    _one("rms_norm", "no mean term", "random cotangent",
         "dn - n * (xp.sum(dn * n, axis=-1, keepdims=True) / x.shape[-1])", "dn"),
    _one("rms_norm", "no mean term, in float64 alone", "a wider type beside float64",
         "n * (xp.sum(dn * n, axis=-1, keepdims=True) / x.shape[-1])",
         "n * (xp.sum(dn * n, axis=-1, keepdims=True) / x.shape[-1]) * (dy.dtype != xp.float64)",
         of_checker=True),
    _one("rms_norm", "float32 cast inside", "the sharpness bound",
         "n = x * r",
         "n = (x * r).astype(xp.float32).astype(x.dtype) if x.dtype == xp.float64 else x * r",
         of_checker=True),
    _one("rms_norm", "sum for mean", "width > 1",
         "xp.sum(dn * n, axis=-1, keepdims=True) / x.shape[-1]",
         "xp.sum(dn * n, axis=-1, keepdims=True)"),
    _one("rms_norm", "dy for dy·w", "weights off 1", "dy * w", "dy"),
    _one("rms_norm", "eps dropped in the backward", "eps not tiny",
         "n = x * r",
         "r = 1 / xp.sqrt(xp.sum(x * x, axis=-1, keepdims=True) / x.shape[-1])\nn = x * r"),
    _one("rms_norm", "r² for r", "inputs off unit size",
         "r * (dn - n * (xp.sum(dn * n, axis=-1, keepdims=True) / x.shape[-1]))",
         "r * r * (dn - n * (xp.sum(dn * n, axis=-1, keepdims=True) / x.shape[-1]))"),
    _one("rms_norm", "dw without r", "inputs off unit size", "dy * n", "dy * x"),
    _one("rms_norm", "dw zero", "any",
         "xp.sum(xp.reshape(dy * n, (-1, x.shape[-1])), axis=0)",
         "0 * xp.sum(xp.reshape(dy * n, (-1, x.shape[-1])), axis=0)"),
    _one("rms_norm", "LayerNorm's mean subtracted too", "width > 1",
         "dy * w", "dy * w - xp.sum(dy * w, axis=-1, keepdims=True) / x.shape[-1]"),
    _one("rms_norm", "gradient of w not summed over rows", "shape",
         "xp.sum(xp.reshape(dy * n, (-1, x.shape[-1])), axis=0)", "dy * n"),
    _one("rms_norm", "eps forgotten by both", "golden values",
         "finite(mean + eps)",
         "finite(mean)", shared=True),
    _one("swiglu", "derivative of silu without its second term", "any",
         "s + gate * s * (1 - s)", "s"),
    _one("swiglu", "gate and up swapped", "gate ≠ up", "return dgate, dup", "return dup, dgate"),
    _one("ffn", "up path missing", "any", "dx_gate + dx_up", "dx_gate"),
    _one("rope", "backward turns the same way", "position > 0", "-saved.sin", "saved.sin"),
    _one("rope", "backward in the other layout", "more than one pair",
         "saved.layout", "'halves' if saved.layout == 'interleaved' else 'interleaved'"),
    _one("rope", "halves for interleaved, both ways", "golden values",
         "half = x.shape[-1] // 2", "half = x.shape[-1] // 2\nlayout = 'halves'", shared=True),
    _one("rope", "position off by one, both ways", "golden values",
         "xp.reshape(positions, (-1, x.shape[1], 1, 1))",
         "xp.reshape(positions + 1, (-1, x.shape[1], 1, 1))", shared=True),
    _one("attention", "no row sum in the softmax's gradient", "any",
         "dp - xp.sum(part * dp, axis=-1, keepdims=True)", "dp"),
    _one("attention", "row sum over the queries", "T > 1",
         "xp.sum(part * dp, axis=-1, keepdims=True)",
         "xp.sum(part * dp, axis=-2, keepdims=True)"),
    _one("attention", "row mean for row sum", "S > 1",
         "xp.sum(part * dp, axis=-1, keepdims=True)",
         "xp.mean(part * dp, axis=-1, keepdims=True)"),
    _one("attention", "no scale in dq", "scale off 1",
         "scale * einsum('bhts,bshx->bthx', ds, keys[seen])",
         "einsum('bhts,bshx->bthx', ds, keys[seen])"),
    _one("attention", "scale twice in dk", "scale off 1",
         "einsum('bhts,bthx->bshx', ds, scaled[queries])",
         "scale * einsum('bhts,bthx->bshx', ds, scaled[queries])"),
    _one("attention", "one head's gradient for a shared key", "shared key head, heads > 1",
         "namespace(dx=dx).sum(dx, axis=2, keepdims=True)", "dx[:, :, :1]"),
    _one("attention", "scale squared, both ways", "golden values",
         "float(scale)", "float(scale) ** 2", shared=True),
    _one("flash_attention", "row sum of p·dp forgotten", "any",
         "dp - row_sum[:, :, t0:t1, :]", "dp"),
    _one("flash_attention", "p unmasked in the backward", "a mask",
         "fill(mask, scores, -xp.inf) - lse[:, :, t0:t1, :]", "scores - lse[:, :, t0:t1, :]"),
    _one("flash_attention", "= for += over query blocks", "several blocks",
         "add_to(dk, seen, sum_heads(einsum('bhts,bthx->bshx', ds, q[queries]), k))",
         "put(dk, seen, sum_heads(einsum('bhts,bthx->bshx', ds, q[queries]), k))"),
    _one("flash_attention", "last key block lost", "several blocks",
         "blocks(s, block, t1 + s - t if causal else None)",
         "blocks(s - 1, block, t1 + s - t if causal else None)"),
    _one("mla", "gradient of k_pe from one head", "heads > 1",
         "sum_along(dk[..., n:], axis=2)", "dk[:, :, 0, n:]"),
    _one("mla", "mean over heads for k_pe", "heads > 1",
         "sum_along(dk[..., n:], axis=2)", "xp.mean(dk[..., n:], axis=2)"),
    _one("mla", "gradient of k_pe halved", "any",
         "sum_along(dk[..., n:], axis=2)", "sum_along(dk[..., n:], axis=2) / 2"),
    _one("mla", "per-head slices on the wrong axis", "heads > 1",
         "xp.reshape(dkv, (*dkv.shape[:2], -1))",
         "xp.reshape(xp.matrix_transpose(dkv), (*dkv.shape[:2], -1))"),
    _one("mla", "dq from an unrotated k", "position > 0",
         "dq, dk, dv = ops.attention.backward(\n"
         "    xp.reshape(do, (*do.shape[:2], -1, v)), saved.attention)",
         "k, new = saved.attention.k, dout.shape[1]\n"
         "k_pe = ops.rope.backward(k[:, -new:, :1, n:], saved.project.k_pe)\n"
         "k_pe = xp.concat((k[:, :-new, :1, n:], k_pe), axis=1)\n"
         "k_pe = xp.broadcast_to(k_pe, (*k.shape[:3], k_pe.shape[3]))\n"
         "do = xp.reshape(do, (*do.shape[:2], -1, v))\n"
         "_, dk, dv = ops.attention.backward(do, saved.attention)\n"
         "unrotated = saved.attention._replace(k=xp.concat((k[..., :n], k_pe), axis=-1))\n"
         "dq = ops.attention.backward(do, unrotated)[0]"),
    _one("mla", "k_pe not rotated back", "position > 0",
         "ops.rope.backward(dlatent[..., c:][:, :, None, :], saved.k_pe)[:, :, 0, :]",
         "dlatent[..., c:]"),
    _one("mla", "gradient of the cache dropped", "a cotangent for the cache",
         "dlatent + dcache", "dlatent"),
    _one("mla", "kv split swapped", "N ≠ V or random weights",
         "(dk[..., :n], dv)", "(dv, dk[..., :n])"),
    _one("mla", "dx misses the kv path", "any", "dx_q + dx_kv", "dx_q"),
    _one("mla", "dx misses the query path", "any", "dx_q + dx_kv", "dx_kv"),
    _one("mla_absorbed", "values' gradient missing in the latent", "any",
         "dk[..., :c] + dvalues", "dk[..., :c]"),
    _one("mla_absorbed", "keys' gradient missing in the latent", "any",
         "dk[..., :c] + dvalues", "dvalues"),
    _one("router", "normaliser taken as a constant", "normalised weights",
         "(dchosen - mean) / total", "dchosen / total"),
    _one("router", "normaliser's gradient like a softmax's", "normalised weights",
         "(dchosen - mean) / total",
         "chosen * (dchosen - xp.sum(dchosen * chosen, axis=-1, keepdims=True))"),
    _one("router", "routed scale missing", "scale off 1", "saved.scale * dweights", "dweights"),
    _one("router", "s(1 − s) missing", "sigmoid scores", "ds * s * (1 - s)", "ds"),
    _one("router", "first slot only", "K ≥ 2", "range(indices.shape[-1])", "range(1)"),
    _one("router", "balance path missing", "a cotangent for the scores",
         "zeros(s.shape, s) if dscores is None else dscores", "zeros(s.shape, s)"),
    _one("router", "bias inside σ'", "bias off 0",
         "chosen = xp.take_along_axis(scores, indices, axis=-1)",
         "scores = scores if bias is None else scores + bias\n"
         "chosen = xp.take_along_axis(scores, indices, axis=-1)"),
    Planted("router", "routed scale missing, both ways", "golden values",
            (("scale * chosen", "chosen"),
             ("saved.scale * dweights", "dweights")), shared=True),
    _one("router", "softmax's gradient from zeroed probabilities", "softmax scores, K < E",
         "dlogits = s * (ds - xp.sum(ds * s, axis=-1, keepdims=True))",
         "expert = xp.arange(s.shape[-1])[:, None]\n"
         "chosen = xp.any(expert == saved.indices[..., None, :], axis=-1)\n"
         "s = xp.where(chosen, s, 0 * s)\n"
         "dlogits = s * (ds - xp.sum(ds * s, axis=-1, keepdims=True))"),
    _one("router", "mean over tokens in the gate", "tokens > 1",
         "dw = xp.matmul(xp.matrix_transpose(rows), xp.reshape(x, (-1, x.shape[-1])))",
         "dw = xp.matmul(xp.matrix_transpose(rows), xp.reshape(x, (-1, x.shape[-1])))\n"
         "dw = dw / rows.shape[0]"),
    Planted("router", "weights not normalised, both ways",  # pytorch/torchtitan#1448
            "normalised weights, golden values",
            (("xp.sum(chosen, axis=-1, keepdims=True) + epsilon if normalise else 1", "1"),
             ("RouterSaved(x, w, scores, indices, score, normalise, scale, epsilon)",
              "RouterSaved(x, w, scores, indices, score, False, scale, epsilon)")), shared=True),
    _one("expert_load", "load counted twice", "golden values",
         "stop - xp.searchsorted(in_order, expert, side='left')",
         "2 * (stop - xp.searchsorted(in_order, expert, side='left'))", shared=True),
    _one("bias_update", "bias moved by shares", "golden values",
         "xp.sign(xp.mean(load) - load)", "(xp.mean(load) - load) / xp.sum(load)", shared=True),
    _one("balance_loss", "gradient times the tokens",  # NVIDIA-NeMo/Automodel#1408
         "B T > 1",
         "number(dloss, scores) * weight * (f - mean_f) / total",
         "number(dloss, scores) * weight * (f - mean_f) / total * scores[:, :, 0].size"),
    _one("balance_loss", "normaliser ignored", "sigmoid scores", "f - mean_f", "f"),
    _one("balance_loss", "normaliser missing", "sigmoid scores",
         "number(dloss, scores) * weight * (f - mean_f) / total",
         "number(dloss, scores) * weight * (f - mean_f)"),
    _one("balance_loss", "f without E/K, both ways", "golden values",
         "counts * e / (top_k * length)", "counts / length", shared=True),
    _one("moe", "gate path missing", "a gradient for the weights",
         "xp.sum(rows[:, None, :] * outputs, axis=-1)",
         "0 * xp.sum(rows[:, None, :] * outputs, axis=-1)"),
    _one("moe", "weight missing", "weights off 1",
         "weights[..., None] * rows[:, None, :]",
         "(0 * weights[..., None] + 1) * rows[:, None, :]"),
    _one("moe", "slots in dispatch order", "K ≥ 2",
         "argsort(order)", "order", within="moe_backward"),
    _one("moe", "last expert lost", "last expert has tokens",
         "dout[rows, :]", "dout[rows, :] * (expert != experts[-1].expert)"),
    _one("moe", "shared path missing", "shared experts", "dx + dx_shared", "dx"),
    _one("moe", "dw of the shared experts times K", "shared experts, K ≥ 2",
         "dx_shared, *dshared = ops.ffn.backward(rows, shared)",
         "dx_shared, *dshared = ops.ffn.backward(rows, shared)\n"
         "dshared = [top_k * dw_shared for dw_shared in dshared]"),
    _one("cross_entropy", "normaliser over all tokens, in the backward", "masked targets",
         "weight[..., None]", "weight[..., None] * xp.mean(xp.astype(weight != 0, p.real.dtype))"),
    _one("cross_entropy", "chosen logit only", "any",
         "(p - cast(chosen, p))", "(0 * p - cast(chosen, p))"),
    _one("cross_entropy", "masked targets leak", "masked targets",
         "weight[..., None]", "xp.max(weight)"),
    _one("log_prob", "temperature missing", "temperature off 1",
         "(xp.reshape(dy, (-1,)) * mask)[:, None] / temperature",
         "(xp.reshape(dy, (-1,)) * mask)[:, None]"),
    Planted("log_prob", "temperature missing, both ways",  # huggingface/trl#3029
            "temperature off 1, golden values",
            (("temperature = float(temperature)", "temperature = 1.0"),), shared=True),
    _one("log_prob", "mask missing", "masked targets",
         "xp.reshape(dy, (-1,)) * mask", "xp.reshape(dy, (-1,))"),
    _one("log_prob", "= for += over vocabulary blocks", "several blocks",
         "add_to(dh, (slice(m0, m1), ...), xp.matmul(dz, w[w0:w1, :]))",
         "put(dh, (slice(m0, m1), ...), xp.matmul(dz, w[w0:w1, :]))"),
    _one("head_cross_entropy", "sign", "any",
         "-number(dloss, saved.weight)", "number(dloss, saved.weight)"),
    _one("mtp", "cotangent ignored: an input in its place", "a cotangent that is no input",
         "ops.linear.backward(dy, saved.proj)",
         "ops.linear.backward(0 * dy + saved.hnorm.x, saved.proj)"),
    _one("router", "epsilon missing in the backward", "epsilon off 0",
         "total = xp.sum(chosen, axis=-1, keepdims=True) + saved.epsilon",
         "total = xp.sum(chosen, axis=-1, keepdims=True)"),
    _one("mtp", "halves swapped", "any",
         "de, dh = (first, second) if saved.order == 'embedding_hidden' else (second, first)",
         "dh, de = (first, second) if saved.order == 'embedding_hidden' else (second, first)"),
    Planted("mtp", "concat swapped, both ways", "golden values",
            (("order == 'embedding_hidden'", "order != 'embedding_hidden'"),
             ("saved.order == 'embedding_hidden'", "saved.order != 'embedding_hidden'")),
            shared=True),
    _one("grpo", "A < 0 clipped above too, both ways", "A < 0, ρ above, golden values",
         "rho > top", "rho > high", shared=True),
    _one("grpo", "A > 0 clipped below too, both ways", "A > 0, ρ below, golden values",
         "rho > high", "(rho > high) | (rho < low)", shared=True),
    _one("grpo", "gradient through the clip", "a clipped token",
         "-weight * keep * a * fill(flows, rho, 0.0)", "-weight * keep * a * rho"),
    _one("grpo", "ratio missing", "off-policy ratios",
         "-weight * keep * a * fill(flows, rho, 0.0)",
         "-weight * keep * a * fill(flows, 0 * rho + 1, 0.0)"),
    _one("grpo", "advantage's sign", "any",
         "-weight * keep * a * fill(flows, rho, 0.0)", "weight * keep * a * fill(flows, rho, 0.0)"),
    _one("grpo", "KL's sign", "β > 0",
         "dlog_prob - _from_level(du, mask, count, kl_level)",
         "dlog_prob + _from_level(du, mask, count, kl_level)"),
    _one("grpo", "KL dropped", "β > 0", "du is not None", "False"),
    _one("grpo", "k3 with k1's gradient", "β > 0",
         "k = slope - u", "k, slope = slope - u, 0 * u - 1"),
    _one("grpo", "k3 with k2's gradient", "β > 0", "k = slope - u", "k, slope = slope - u, u"),
    _one("grpo", "gradient beyond the KL's bounds", "kl_bounds",
         "fill(inside & flows, slope, 0.0)", "slope"),
    _one("grpo", "unbiased KL without the ratio's gradient", "unbiased KL",
         "weight * kl_weight * rho * k", "0 * weight * kl_weight * rho * k"),
    _one("grpo", "β missing", "β off 1", "weight * kl_weight * slope", "weight * slope"),
    _one("grpo", "padding leaks", "padding, whole-output ratios", "fill(mask, dx, 0.0)", "dx"),
    _one("grpo", "sequence ratio's gradient at its own token alone", "whole-output ratios",
         "xp.sum(dx, axis=1, keepdims=True) / (count if level == 'sequence_mean' else 1)", "dx"),
    _one("grpo", "dropped outputs keep their gradient", "the off-policy mask",
         "-weight * keep * a * fill(flows, rho, 0.0)", "-weight * a * fill(unclipped, rho, 0.0)"),
    _one("grpo", "token mean for the mean of means, both ways", "unequal lengths, golden values",
         "average == 'token'", "average != 'constant'", shared=True),
    _one("grpo", "padded length for the output's, both ways", "unequal lengths, golden values",
         "n * count", "n * float(mask.shape[1])", shared=True),
    _one("grpo", "ε_low above too, both ways", "ε_high ≠ ε_low, golden values",
         "float(clip[1])", "float(clip[0])", shared=True),
    _one("preference_loss", "sign", "any", "-number(dloss, margin)", "number(dloss, margin)"),
    _one("preference_loss", "probability of the right order for the wrong one", "margins off 0",
         "sigmoid(-margin)", "sigmoid(margin)"),
    _one("preference_loss", "rejected answer gets no gradient", "any",
         "return dh, -dh, dw", "return dh, 0 * dh, dw"),
    _one("preference_loss", "mean missing", "N > 1",
         "-number(dloss, margin) * sigmoid(-margin) / margin.shape[0]",
         "-number(dloss, margin) * sigmoid(-margin)"),
    _one("model", "residual dropped in the backward", "any", "dx + dx_network", "dx_network"),
    _one("model", "router path missing", "MoE", "dh = dh + dh_gate", ""),
    _one("model", "embedding missing its second user", "MTP",
         "grads.add(EMBEDDING, ops.embedding.backward(dembedding, saved.embedding))", ""),
    _one("model", "head missing its second user", "MTP",
         "dnormed, dw = ops.head_cross_entropy.backward(dmtp, saved.mtp_heads[depth - 1])\n"
         "grads.add(head, dw)",
         "dnormed, _ = ops.head_cross_entropy.backward(dmtp, saved.mtp_heads[depth - 1])"),
    _one("model", "λ missing in the backward", "MTP",
         "dloss * mtp_scale(config)", "dloss"),
    _one("model", "hidden state detached from MTP", "MTP", "dh = dh + dstate", "pass"),
    _one("model", "MTP's hidden state off by one", "MTP", "(dread, last)", "(last, dread)"),
    _one("model", "balance loss dropped", "α off 0",
         "run.ops.balance_loss.backward(dloss, saved.balance_loss)",
         "run.ops.balance_loss.backward(0 * dloss, saved.balance_loss)"),
    _one("model", "mscale² missing, both ways", "golden values",
         "(config.nope + config.rope) ** -0.5 * yarn_softmax_factor(yarn)",
         "(config.nope + config.rope) ** -0.5", shared=True),
    _one("model", "softmax scale from mscale, not mscale_all_dim, both ways",
         "mscale ≠ mscale_all_dim, golden values",  # NVIDIA/Megatron-LM#1429
         "yarn_softmax_factor(yarn)",
         "yarn_softmax_factor(yarn and yarn._replace(mscale_all_dim=yarn.mscale))", shared=True),
    _one("model", "scale from the nope width alone, both ways", "golden values",
         "(config.nope + config.rope) ** -0.5", "config.nope ** -0.5", shared=True),
)  # fmt: skip


PLANTED_IN_FP8: tuple[Planted, ...] = (
    Planted("fp8", "no promotion", "a sum of more than 128 terms",
            (("tensor_core(a.numbers[:, here], b.numbers[:, here], recipe.bits)",
              "tensor_core(a.numbers[:, here], b.numbers[:, here], recipe.bits or 14)"),
             ("added(np.stack((part, found), axis=-1), recipe.bits)",
              "added(np.stack((part, found), axis=-1), recipe.bits or 14)"),
             ("recipe.promote and (first + TILE) % recipe.promote == 0", "False"))),
    _one("fp8", "one scale per tensor", "more than one tile",
         "scale = scales(x, tile, most, recipe.floor, power_of_two=power_of_two)",
         "scale = scales(x, tile, most, recipe.floor, power_of_two=power_of_two)\n"
         "scale = np.full_like(scale, np.max(scale))"),
    _one("fp8", "re-tiling left out", "more than one token",
         "dy_tiled, x_tiled = (quantised(side.T, (1, TILE), recipe) for side in (rows, kept(x)))\n"
         "dw = product(dy_tiled, x_tiled, recipe)",
         "dw = quantised(rows, (1, TILE), recipe).values().T @ kept(x)"),
    _one("fp8", "scale inverted", "any",
         "found * of_a[:, i, None] * of_b[None, :, i]",
         "found / of_a[:, i, None] / of_b[None, :, i]"),
    _one("fp8", "UE8M0 rounded down", "scales that are powers of two",
         "np.ceil(np.log2(found.astype(np.float64)))",
         "np.floor(np.log2(found.astype(np.float64)))"),
)  # fmt: skip
"""Of V3's FP8 training, whose gradient is not its forward's: no check of the ops can judge them."""


def plant(bug: Planted) -> AnyOp | types.ModuleType:
    """The op's pair with the bug in it; for a bug of `OTHERS` or `FUNCTIONS`, the whole
    edited module.

    ValueError unless each piece that the bug replaces stands exactly once in the source.
    """
    module = plant_module(bug)
    if bug.op in OTHERS or bug.op in FUNCTIONS:
        return module
    return Op(getattr(module, f"{bug.op}_forward"), getattr(module, f"{bug.op}_backward"))


def plant_module(bug: Planted) -> types.ModuleType:
    """The module of the bug's op, with the bug in it or in what it imports."""
    own = home(bug.op)
    name = bug.module or own
    module = _execute(name, edited(_source(name), bug))
    if name == own:
        return module
    original = sys.modules[name]
    sys.modules[name] = module  # the op's own module, executed anew, imports from it
    try:
        return fresh_module(own)
    finally:
        sys.modules[name] = original


def fresh_module(name: str) -> types.ModuleType:
    """A copy of a module of the package, without a bug, that may be changed."""
    return _execute(name, ast.parse(_source(name)))


def home(op: str) -> str:
    """The module in which an op, a function or the model stands."""
    return OTHERS.get(op) or FUNCTIONS.get(op, f"refimpl.ops.{op}")


def edited(source: str, bug: Planted) -> ast.Module:
    """The syntax tree of ``source`` with the bug's edits."""
    tree = ast.parse(source)
    scopes: list[ast.AST] = [tree]
    if bug.within:
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        scopes = [function for function in functions if function.name == bug.within]
    for old, new in bug.edits:
        edit = _Edit(old, new)
        for scope in scopes:
            edit.visit(scope)
        if edit.places != 1:
            raise ValueError(
                f"{bug.op}: {bug.name}: the code to replace must stand once in "
                f"{bug.within or bug.module or bug.op}, stands {edit.places} times: {old!r}"
            )
    return ast.fix_missing_locations(tree)


class _Edit(ast.NodeTransformer):
    """Replaces one piece of code by another wherever it stands, and counts the places."""

    def __init__(self, old: str, new: str) -> None:
        self.places = 0
        before, after = ast.parse(old).body, ast.parse(new).body
        self.of_expressions = all(
            len(body) == 1 and isinstance(body[0], ast.Expr) for body in (before, after)
        )
        self.old = [ast.dump(_bare(x) if self.of_expressions else x) for x in before]
        self.new: list[Any] = [_bare(x) if self.of_expressions else x for x in after]

    def visit(self, node: ast.AST) -> Any:
        self.generic_visit(node)
        if not self.of_expressions:
            for _, body in ast.iter_fields(node):
                if isinstance(body, list) and body and isinstance(body[0], ast.stmt):
                    self._replace_statements(body)
        elif isinstance(node, ast.expr) and ast.dump(node) == self.old[0]:
            self.places += 1
            return copy.deepcopy(self.new[0])
        return node

    def _replace_statements(self, body: list[ast.stmt]) -> None:
        dumps = [ast.dump(statement) for statement in body]
        for start in reversed(range(len(body) - len(self.old) + 1)):
            end = start + len(self.old)
            if dumps[start:end] == self.old:
                self.places += 1
                body[start:end] = copy.deepcopy(self.new)
        if not body:
            body.append(ast.Pass())


def _bare(statement: ast.stmt) -> ast.AST:
    """The expression that a statement consists of."""
    return statement.value if isinstance(statement, ast.Expr) else statement


def _source(name: str) -> str:
    return inspect.getsource(importlib.import_module(name))


def _execute(name: str, tree: ast.Module) -> types.ModuleType:
    """A module of that name and package, made from the syntax tree."""
    module = types.ModuleType(name)
    module.__package__ = name.rpartition(".")[0]
    module.__file__ = f"{name} with planted bug"
    exec(compile(tree, module.__file__, "exec"), module.__dict__)
    return module
