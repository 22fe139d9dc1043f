"""Mistakes that the catalogue does not have, as edits like its own: none may be given a name.

They were written once, before any was diagnosed, and nothing in the diagnosis was made to fit them.
"""

from __future__ import annotations

from refimpl.check.planted import Planted

__all__ = ["OUTSIDE"]


def _one(op: str, name: str, old: str, new: str, within: str = "") -> Planted:
    return Planted(op, name, "outside", ((old, new),), within=within)


OUTSIDE: tuple[Planted, ...] = (
    _one("linear", "input's gradient by the weights' absolute values",
         "xp.matmul(dy, w)", "xp.matmul(dy, xp.abs(w))"),
    _one("linear", "last row of tokens left out of dw",
         "xp.matmul(xp.matrix_transpose(dy_rows), x_rows)",
         "xp.matmul(xp.matrix_transpose(dy_rows[:-1]), x_rows[:-1])"),
    _one("rms_norm", "mean term half",
         "n * (xp.sum(dn * n, axis=-1, keepdims=True) / x.shape[-1])",
         "n * (xp.sum(dn * n, axis=-1, keepdims=True) / (2 * x.shape[-1]))"),
    _one("rms_norm", "mean over one entry less",
         "xp.sum(dn * n, axis=-1, keepdims=True) / x.shape[-1]",
         "xp.sum(dn * n, axis=-1, keepdims=True) / (x.shape[-1] - 1)"),
    _one("rms_norm", "dw of the squared normalised rows", "dy * n", "dy * n * n"),
    _one("rms_norm", "weight one too large in the backward", "dy * w", "dy * (w + 1)"),
    _one("swiglu", "silu's derivative with 1 + s", "s + gate * s * (1 - s)",
         "s + gate * s * (1 + s)"),
    _one("swiglu", "dup by the gate without its sigmoid", "dy * gate * s", "dy * gate"),
    _one("ffn", "paths subtracted", "dx_gate + dx_up", "dx_gate - dx_up"),
    _one("rope", "backward by half the angle's sine", "-saved.sin", "-saved.sin / 2"),
    _one("rope", "cosine's sign in the backward", "saved.cos", "-saved.cos"),
    _one("attention", "row sum of dp alone", "xp.sum(part * dp, axis=-1, keepdims=True)",
         "xp.sum(dp, axis=-1, keepdims=True)"),
    _one("attention", "probabilities squared in ds",
         "part * (dp - xp.sum(part * dp, axis=-1, keepdims=True))",
         "part * part * (dp - xp.sum(part * dp, axis=-1, keepdims=True))"),
    _one("attention", "dv through the sharpened probabilities",
         'einsum("bhts,bthv->bshv", part, do[queries])',
         'einsum("bhts,bthv->bshv", part * part, do[queries])'),
    _one("attention", "dq and dk exchanged scales by a third",
         'einsum("bhts,bthx->bshx", ds, scaled[queries])',
         'einsum("bhts,bthx->bshx", ds, scaled[queries]) / 3'),
    _one("mla", "last head left out of k_pe's gradient",
         "sum_along(dk[..., n:], axis=2)", "xp.sum(dk[:, :, :-1, n:], axis=2)"),
    _one("mla", "first head twice in k_pe's gradient",
         "sum_along(dk[..., n:], axis=2)", "sum_along(dk[..., n:], axis=2) + dk[:, :, 0, n:]"),
    _one("mla", "kv path twice", "dx_q + dx_kv", "dx_q + 2 * dx_kv"),
    _one("mla", "heads of dkv reversed", "(dk[..., :n], dv)",
         "(dk[:, :, ::-1, :n], dv[:, :, ::-1, :])"),
    _one("mla", "k_pe rotated on instead of back",
         "ops.rope.backward(dlatent[..., c:][:, :, None, :], saved.k_pe)[:, :, 0, :]",
         "2 * dlatent[..., c:] - ops.rope.backward(\n"
         "    dlatent[..., c:][:, :, None, :], saved.k_pe)[:, :, 0, :]"),
    _one("router", "s² for s(1 − s)", "ds * s * (1 - s)", "ds * s * s"),
    _one("router", "mean with the sign of a sum",
         "(dchosen - mean) / total", "(dchosen + mean) / total"),
    _one("router", "total squared", "(dchosen - mean) / total",
         "(dchosen - mean) / (total * total)"),
    _one("router", "first slot left out", "range(indices.shape[-1])",
         "range(1, indices.shape[-1])"),  # the last would, for K = 2, be the catalogue's
    _one("balance_loss", "mean with the other sign", "f - mean_f", "f + mean_f"),
    _one("moe", "weights squared on the way back",
         "weights[..., None] * rows[:, None, :]",
         "weights[..., None] * weights[..., None] * rows[:, None, :]"),
    _one("moe", "first expert twice", "dout[rows, :]",
         "dout[rows, :] * (1 + (expert == experts[0].expert))"),
    _one("moe", "shared experts' path halved", "dx + dx_shared", "dx + dx_shared / 2"),
    _one("head_cross_entropy", "gradient without masking's weight, squared",
         "-number(dloss, saved.weight) * saved.weight",
         "-number(dloss, saved.weight) * saved.weight * saved.weight"),
    _one("log_prob", "probabilities squared", "(cast(is_target, p) - p)",
         "xp.where(is_target, 1 - p, -p * p)"),
    _one("mtp", "embedding's gradient through the other norm",
         "ops.rms_norm.backward(de, saved.enorm)", "ops.rms_norm.backward(de, saved.hnorm)"),
    _one("grpo", "ratio squared", "-weight * keep * a * fill(flows, rho, 0.0)",
         "-weight * keep * a * fill(flows, rho * rho, 0.0)"),
    _one("preference_loss", "sigmoid squared", "sigmoid(-margin)",
         "sigmoid(-margin) * sigmoid(-margin)"),
    _one("model", "network's path twice", "dx + dx_network", "dx + 2 * dx_network"),
    _one("model", "gate's path subtracted", "dh = dh + dh_gate", "dh = dh - dh_gate"),
    _one("model", "λ squared in the backward", "dloss * mtp_scale(config)",
         "dloss * mtp_scale(config) * mtp_scale(config)"),
    _one("model", "balance loss with the other sign",
         "run.ops.balance_loss.backward(dloss, saved.balance_loss)",
         "run.ops.balance_loss.backward(-dloss, saved.balance_loss)"),
)  # fmt: skip
