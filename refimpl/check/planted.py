"""Planted bugs: wrong backwards (and forwards) that the checker must catch, each one edit of an op's own source.

A bug is a pair of texts: a piece of the op's file and what a wrong implementation has there. `plant` makes the edited
module; the tests assert that every bug is caught, and ``make bugs`` prints which check catches it. A bug that
forward and backward share is consistent in itself: only an independent implementation can catch it, here the golden
values. ``exposed_by`` says what an input must have to show the bug at all.
"""

from __future__ import annotations

import importlib
import inspect
import types
from typing import NamedTuple

from ..ops import AnyOp, Op

__all__ = ["PLANTED", "Planted", "plant"]


class Planted(NamedTuple):
    op: str  # an op, or "model"
    name: str
    exposed_by: str
    edits: tuple[tuple[str, str], ...]  # (text in the source, once, and the wrong text)
    shared: bool = False  # forward and backward agree on the mistake


def _one(op: str, name: str, exposed_by: str, old: str, new: str, shared: bool = False) -> Planted:
    return Planted(op, name, exposed_by, ((old, new),), shared)


_SUM_N = "(xp.sum(dn * n, axis=-1, keepdims=True) / x.shape[-1])"
PLANTED: tuple[Planted, ...] = (
    _one("linear", "weight gradient over one batch row", "batch ≥ 2", "dy_rows), x_rows)", "dy_rows[:1]), x_rows[:1])"),
    _one("embedding", "= for += on repeated ids", "repeated ids",
         "return scatter_add(rows, xp.reshape(dy, (-1, dy.shape[-1])), saved.shape[0])",
         "dw = xp.zeros((saved.shape[0], dy.shape[-1]), dtype=dy.dtype)\n    dw[rows] = xp.reshape(dy, (-1, dy.shape[-1]))\n    return dw"),
    _one("rms_norm", "no mean term", "random cotangent", f" - n * {_SUM_N}", ""),
    _one("rms_norm", "no mean term, in float64 alone", "a wider type beside float64",
         f" - n * {_SUM_N}", f" - n * {_SUM_N} * (dy.dtype != xp.float64)"),
    _one("rms_norm", "float32 cast inside", "the sharpness bound", "    n = x * r\n",
         "    n = (x * r).astype(xp.float32).astype(x.dtype) if x.dtype == xp.float64 else x * r\n"),
    _one("rms_norm", "sum for mean", "width > 1", " / x.shape[-1])", ")"),
    _one("rms_norm", "dy for dy·w", "weights off 1", "dn = dy * w", "dn = dy"),
    _one("rms_norm", "eps dropped in the backward", "eps not tiny", "    n = x * r\n",
         "    r = 1 / xp.sqrt(xp.sum(x * x, axis=-1, keepdims=True) / x.shape[-1])\n    n = x * r\n"),
    _one("rms_norm", "r² for r", "inputs off unit size", "dx = r * (", "dx = r * r * ("),
    _one("rms_norm", "dw without r", "inputs off unit size", "dy * n, (-1", "dy * x, (-1"),
    _one("rms_norm", "dw zero", "any", "xp.sum(xp.reshape(dy * n,", "0 * xp.sum(xp.reshape(dy * n,"),
    _one("rms_norm", "LayerNorm's mean subtracted too", "width > 1", "dn = dy * w", "dn = dy * w - xp.sum(dy * w, axis=-1, keepdims=True) / x.shape[-1]"),
    _one("rms_norm", "gradient of w not summed over rows", "shape", "xp.sum(xp.reshape(dy * n, (-1, x.shape[-1])), axis=0)", "dy * n"),
    _one("rms_norm", "eps forgotten by both", "golden values", "/ x.shape[-1] + eps)", "/ x.shape[-1])", shared=True),
    _one("swiglu", "derivative of silu without its second term", "any", " + gate * s * (1 - s)", ""),
    _one("swiglu", "gate and up swapped", "gate ≠ up", "return dgate, dup", "return dup, dgate"),
    _one("ffn", "up path missing", "any", "dx_gate + dx_up", "dx_gate"),
    _one("rope", "backward turns the same way", "position > 0", "-saved.sin", "saved.sin"),
    _one("rope", "backward in the other layout", "more than one pair", "-saved.sin, saved.layout",
         "-saved.sin, 'halves' if saved.layout == 'interleaved' else 'interleaved'"),
    _one("rope", "halves for interleaved, both ways", "golden values", "    half = x.shape[-1] // 2\n",
         "    half = x.shape[-1] // 2\n    layout = 'halves'\n", shared=True),
    _one("rope", "position off by one, both ways", "golden values", "turns = xp.astype(xp.reshape(positions,",
         "turns = xp.astype(xp.reshape(positions + 1,", shared=True),
    _one("attention", "no row sum in the softmax's gradient", "any", " - xp.sum(p * dp, axis=-1, keepdims=True)", ""),
    _one("attention", "row sum over the queries", "T > 1", "xp.sum(p * dp, axis=-1", "xp.sum(p * dp, axis=-2"),
    _one("attention", "row mean for row sum", "S > 1", "xp.sum(p * dp, axis=-1", "xp.mean(p * dp, axis=-1"),
    _one("attention", "no scale in dq", "scale off 1", "dq = scale * einsum", "dq = einsum"),
    _one("attention", "scale twice in dk", "scale off 1", "dk = scale * einsum", "dk = scale * scale * einsum"),
    _one("attention", "one head's gradient for a shared key", "shared key head, heads > 1",
         "namespace(dx=dx).sum(dx, axis=2, keepdims=True)", "dx[:, :, :1]"),
    _one("attention", "scale squared, both ways", "golden values", "    scores = scale * einsum",
         "    scale = scale * scale\n    scores = scale * einsum", shared=True),
    _one("flash_attention", "row sum of p·dp forgotten", "any", "(dp - row_sum[:, :, t0:t1, :])", "dp"),
    _one("flash_attention", "p unmasked in the backward", "a mask", "scores = fill(mask, _scores(q_block, k_block, scale), -xp.inf)",
         "scores = _scores(q_block, k_block, scale)"),
    _one("flash_attention", "= for += over query blocks", "several blocks", "dk[:, s0:s1, ...] += ", "dk[:, s0:s1, ...] = "),
    _one("flash_attention", "last key block lost", "several blocks", "for s0, s1 in blocks(s, block, t1 + s - t if causal else None):",
         "for s0, s1 in blocks(s - 1, block, t1 + s - t if causal else None):"),
    _one("mla", "gradient of k_pe from one head", "heads > 1", "xp.sum(dk[..., n:], axis=2)", "dk[:, :, 0, n:]"),
    _one("mla", "mean over heads for k_pe", "heads > 1", "xp.sum(dk[..., n:], axis=2)", "xp.mean(dk[..., n:], axis=2)"),
    _one("mla", "k_pe not rotated back", "position > 0",
         'dk_pe = ops.rope.backward(dlatent[..., c:][:, :, None, :], saved.k_pe)[:, :, 0, :]', "dk_pe = dlatent[..., c:]"),
    _one("mla", "gradient of the cache dropped", "a cotangent for the cache", "dlatent = dlatent + dcache", "dlatent = dlatent"),
    _one("mla", "kv split swapped", "N ≠ V or random weights", "xp.concat((dk[..., :n], dv), axis=-1)", "xp.concat((dv, dk[..., :n]), axis=-1)"),
    _one("mla", "dx misses the kv path", "any", "return dx_q + dx_kv,", "return dx_q,"),
    _one("mla", "dx misses the query path", "any", "return dx_q + dx_kv,", "return dx_kv,"),
    _one("mla_absorbed", "values' gradient missing in the latent", "any", "dk[..., :c] + dvalues", "dk[..., :c]"),
    _one("mla_absorbed", "keys' gradient missing in the latent", "any", "dk[..., :c] + dvalues", "dvalues"),
    _one("router", "normaliser taken as a constant", "normalised weights",
         "(dchosen - xp.sum(dchosen * chosen, axis=-1, keepdims=True) / total) / total", "dchosen / total"),
    _one("router", "normaliser's gradient like a softmax's", "normalised weights",
         "(dchosen - xp.sum(dchosen * chosen, axis=-1, keepdims=True) / total) / total", "chosen * (dchosen - xp.sum(dchosen * chosen, axis=-1, keepdims=True))"),
    _one("router", "routed scale missing", "scale off 1", "dchosen = scale * dweights", "dchosen = dweights"),
    _one("router", "s(1 − s) missing", "sigmoid scores", "dlogits = ds * s * (1 - s)", "dlogits = ds"),
    _one("router", "first slot only", "K ≥ 2", "for k in range(indices.shape[-1]):", "for k in range(1):"),
    _one("router", "balance path missing", "a cotangent for the scores", "ds = zeros(s.shape, s) if dscores is None else dscores", "ds = zeros(s.shape, s)"),
    _one("router", "bias inside σ'", "bias off 0", "    chosen = xp.take_along_axis(scores, indices, axis=-1)\n    total",
         "    scores = scores if bias is None else scores + bias\n    chosen = xp.take_along_axis(scores, indices, axis=-1)\n    total"),
    Planted("router", "routed scale missing, both ways", "golden values",
            (("weights = scale * chosen", "weights = chosen"), ("dchosen = scale * dweights", "dchosen = dweights")), shared=True),
    _one("balance_loss", "normaliser ignored", "sigmoid scores", "(f - mean_f) / total", "f / total"),
    _one("balance_loss", "normaliser missing", "sigmoid scores", "(f - mean_f) / total", "(f - mean_f)"),
    _one("balance_loss", "f without E/K, both ways", "golden values", "counts * e / (top_k * length)", "counts / length", shared=True),
    _one("moe", "gate path missing", "a gradient for the weights", "dweights = xp.sum(", "dweights = 0 * xp.sum("),
    _one("moe", "weight missing", "weights off 1", "doutputs = xp.reshape(weights[..., None] * rows[:, None, :]", "doutputs = xp.reshape((0 * weights[..., None] + 1) * rows[:, None, :]"),
    _one("moe", "slots in dispatch order", "K ≥ 2", "dslots = xp.reshape(take_rows(xp.concat(blocks, axis=0), argsort(order))", "dslots = xp.reshape(take_rows(xp.concat(blocks, axis=0), order)"),
    _one("moe", "last expert lost", "last expert has tokens", "for expert, block, ffn_saved in experts:\n        dx_block, *dw_expert = ffn.backward(dout[block, :], ffn_saved)",
         "for expert, block, ffn_saved in experts:\n        dx_block, *dw_expert = ffn.backward(dout[block, :] * (expert != experts[-1][0]), ffn_saved)"),
    _one("moe", "shared path missing", "shared experts", "dx = dx + dx_shared", "dx = dx"),
    _one("cross_entropy", "normaliser over all tokens, in the backward", "masked targets", "return number(dloss, p) * weight[..., None] *",
         "return number(dloss, p) * (weight[..., None] * xp.mean(xp.astype(weight != 0, p.real.dtype))) *"),
    _one("cross_entropy", "chosen logit only", "any", "(p - cast(xp.astype(chosen, real(p).dtype), p))", "(0 * p - cast(xp.astype(chosen, real(p).dtype), p))"),
    _one("cross_entropy", "masked targets leak", "masked targets", "return number(dloss, p) * weight[..., None] *", "return number(dloss, p) * xp.max(weight) *"),
    _one("log_prob", "temperature missing", "temperature off 1", "* mask)[:, None] / temperature", "* mask)[:, None]"),
    _one("log_prob", "mask missing", "masked targets", "weight = (xp.reshape(dy, (-1,)) * mask)", "weight = xp.reshape(dy, (-1,))"),
    _one("log_prob", "= for += over vocabulary blocks", "several blocks", "dh[m0:m1, :] += xp.matmul", "dh[m0:m1, :] = xp.matmul"),
    _one("head_cross_entropy", "sign", "any", "dlog_p = -number", "dlog_p = number"),
    _one("mtp", "cotangent ignored: an input in its place", "a cotangent that is no input",
         'ops.linear.backward(dy, saved.proj)', 'ops.linear.backward(0 * dy + saved.hnorm.x, saved.proj)'),
    _one("router", "epsilon missing in the backward", "epsilon off 0", "        total = xp.sum(chosen, axis=-1, keepdims=True) + epsilon\n        dchosen",
         "        total = xp.sum(chosen, axis=-1, keepdims=True)\n        dchosen"),
    _one("mtp", "halves swapped", "any", "de, dh = (first, second) if saved", "dh, de = (first, second) if saved"),
    Planted("mtp", "concat swapped, both ways", "golden values",
            (('xp.concat((e, h) if order ==', 'xp.concat((e, h) if order !='),
             ('if saved.order == "embedding_hidden" else', 'if saved.order != "embedding_hidden" else')), shared=True),
    _one("grpo", "A < 0 clipped above too, both ways", "A < 0, ρ above, golden values", "(r < low) | (r > top)", "(r < low) | (r > high)", shared=True),
    _one("grpo", "A > 0 clipped below too, both ways", "A > 0, ρ below, golden values", "xp.where(up, r > high,", "xp.where(up, (r > high) | (r < low),", shared=True),
    _one("grpo", "gradient through the clip", "a clipped token", "dz = -weight * keep * a * fill(flows, rho, 0.0)", "dz = -weight * keep * a * rho"),
    _one("grpo", "ratio missing", "off-policy ratios", "dz = -weight * keep * a * fill(flows, rho, 0.0)", "dz = -weight * keep * a * fill(flows, 0 * rho + 1, 0.0)"),
    _one("grpo", "advantage's sign", "any", "dz = -weight * keep * a * fill", "dz = weight * keep * a * fill"),
    _one("grpo", "KL's sign", "β > 0", "dlog_prob = dlog_prob - _from_level(du", "dlog_prob = dlog_prob + _from_level(du"),
    _one("grpo", "KL dropped", "β > 0", "    if du is not None:\n", "    if False:\n"),
    _one("grpo", "k3 with k1's gradient", "β > 0", "        k = slope - u\n", "        k, slope = slope - u, 0 * u - 1\n"),
    _one("grpo", "k3 with k2's gradient", "β > 0", "        k = slope - u\n", "        k, slope = slope - u, u\n"),
    _one("grpo", "gradient beyond the KL's bounds", "kl_bounds", "fill(inside & flows, slope, 0.0)", "slope"),
    _one("grpo", "unbiased KL without the ratio's gradient", "unbiased KL", "            dz = dz + weight * kl_weight * rho * k", "            dz = dz + 0 * weight * kl_weight * rho * k"),
    _one("grpo", "β missing", "β off 1", "du = weight * kl_weight * slope  # (grpo.7)", "du = weight * slope  # (grpo.7)"),
    _one("grpo", "padding leaks", "padding, whole-output ratios", "    return fill(mask, dx, 0.0)", "    return dx"),
    _one("grpo", "sequence ratio's gradient at its own token alone", "whole-output ratios",
         "        total = xp.sum(dx, axis=1, keepdims=True) / (count if level == \"sequence_mean\" else 1)\n        dx =", "        total = dx\n        dx ="),
    _one("grpo", "dropped outputs keep their gradient", "the off-policy mask", "dz = -weight * keep * a * fill(flows, rho, 0.0)", "dz = -weight * a * fill(unclipped, rho, 0.0)"),
    _one("grpo", "token mean for the mean of means, both ways", "unequal lengths, golden values", '"sequence": n * count,', '"sequence": float(xp.sum(size)) or 1.0,', shared=True),
    _one("grpo", "padded length for the output's, both ways", "unequal lengths, golden values", '"sequence": n * count,', '"sequence": n * float(t),', shared=True),
    _one("grpo", "ε_low above too, both ways", "ε_high ≠ ε_low, golden values", "1 + float(clip[1])", "1 + float(clip[0])", shared=True),
    _one("preference_loss", "sign", "any", "dmargin = -number", "dmargin = number"),
    _one("preference_loss", "probability of the right order for the wrong one", "margins off 0", "sigmoid(-margin)", "sigmoid(margin)"),
    _one("preference_loss", "rejected answer gets no gradient", "any", "return dh, -dh, dw", "return dh, 0 * dh, dw"),
    _one("preference_loss", "mean missing", "N > 1", "sigmoid(-margin) / margin.shape[0]", "sigmoid(-margin)"),
    _one("model", "residual dropped in the backward", "any", "    dx = dx + dx_ffn\n", "    dx = dx_ffn\n"),
    _one("model", "router path missing", "MoE", "        dh = dh + dh_gate\n", ""),
    _one("model", "embedding missing its second user", "MTP",
         '    grads.add("model.embed_tokens.weight", ops.embedding.backward(dembedding, saved.embedding))\n', ""),
    _one("model", "head missing its second user", "MTP", '    dnormed, dw_head = ops.head_cross_entropy.backward(dmtp, saved.head)\n    grads.add(config.head, dw_head)\n',
         '    dnormed, dw_head = ops.head_cross_entropy.backward(dmtp, saved.head)\n'),
    _one("model", "λ missing in the backward", "MTP", "dmtp = dloss * (config.mtp_weight / config.mtp_depth)", "dmtp = dloss"),
    _one("model", "hidden state detached from MTP", "MTP", "            dh = dh + dstate\n", "            pass\n"),
    _one("model", "MTP's hidden state off by one", "MTP", "concat((dread, last), axis=1)", "concat((last, dread), axis=1)"),
    _one("model", "balance loss dropped", "α off 0", 'ops.balance_loss.backward(dloss, saved.balance)', 'ops.balance_loss.backward(0 * dloss, saved.balance)'),
    _one("model", "mscale² missing, both ways", "golden values", " ** -0.5 * yarn_softmax_factor(yarn)", " ** -0.5", shared=True),
    _one("model", "scale from the nope width alone, both ways", "golden values", "scale=(config.nope + config.rope) ** -0.5", "scale=config.nope ** -0.5", shared=True),
)  # fmt: skip


def plant(bug: Planted) -> AnyOp | types.ModuleType:
    """The op's pair with the bug in it; for a bug of the model, the whole edited module.

    ValueError if the text that the bug replaces does not stand exactly once in the source.
    """
    original = importlib.import_module(
        "refimpl.model" if bug.op == "model" else f"refimpl.ops.{bug.op}"
    )
    source = inspect.getsource(original)
    for old, new in bug.edits:
        if source.count(old) != 1:
            raise ValueError(
                f"{bug.op}: {bug.name}: the text to replace stands {source.count(old)} times: {old!r}"
            )
        source = source.replace(old, new)
    module = types.ModuleType(original.__name__)
    module.__dict__["__package__"] = original.__package__
    module.__dict__["__file__"] = f"{original.__name__} with planted bug"
    exec(compile(source, module.__dict__["__file__"], "exec"), module.__dict__)
    if bug.op == "model":
        return module
    return Op(module.__dict__[f"{bug.op}_forward"], module.__dict__[f"{bug.op}_backward"])
