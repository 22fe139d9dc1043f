"""DeepSeek-V3 and its training in torch, gradients by autograd: written from the papers' equations,
for the preset `tiny`, and sharing no code with ours but the numbers of the configuration.

Numbers of equations are DeepSeek-V3's (2412.19437). Where it is silent, this follows DeepSeek's
published inference code and weights: norms of both latents, groups ranked by their two best biased
scores, the other groups out of the choice, rotated pairs side by side, the bounds of YaRN's ramp
rounded, the embedding before the state in MTP, which reads normed states. Padding and packed
documents are no part of the papers: a token sees, and predicts, what is real and of its document.
Letters: B batch, T and S positions, D width, H heads, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor, log, pi
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import one_hot, silu

from refimpl.config import ModelConfig

torch.set_num_threads(1)


class Batch(NamedTuple):
    tokens: Any  # [B, T]
    real: Any  # [B, T] bool, False for padding
    document: Any  # [B, T]


class Sample(NamedTuple):
    """Outputs of GRPO with their constants; position t predicts token t + 1."""

    tokens: Any  # [B, T]
    real: Any  # [B, T] bool, False for padding
    counts: Any  # [B, T] bool: the next token is one of the output's
    advantages: Any  # [B]
    old: Any  # [B, T]: log-probabilities of the policy that sampled
    reference: Any  # [B, T]


class Told(NamedTuple):
    """What the layers with experts add, in their order."""

    balance: dict[int, Any]  # by layer, its loss
    loads: dict[int, Any]  # by layer [E]: tokens of each expert


def norm(x: Any, weight: Any, eps: float) -> Any:
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def swiglu(x: Any, gate: Any, up: Any, down: Any) -> Any:
    """Of weights [E, …] on x [1, T, D], each expert's."""
    return (silu(x @ gate.mT) * (x @ up.mT)) @ down.mT


def temperature(factor: float, mscale: float) -> float:
    return 0.1 * mscale * log(factor) + 1  # YaRN (2309.00071) section 3.4


class Model:
    def __init__(self, config: ModelConfig, params: dict[str, np.ndarray]) -> None:
        self.c, self.w = config, {name: torch.tensor(p) for name, p in params.items()}
        self.biases = {name: w for name, w in self.w.items() if name.endswith("correction_bias")}
        self.learnt = {n: w.requires_grad_() for n, w in self.w.items() if n not in self.biases}

    def of(self, layer: int, *names: str) -> list[Any]:
        return [self.w[f"model.layers.{layer}.{name}"] for name in names]

    def rotate(self, x: Any) -> Any:
        """x [B, T, …, R]: pairs as complex numbers, turned by YaRN's angles (its section 3.2)."""
        c, yarn = self.c, self.c.yarn
        pair = torch.arange(c.rope // 2, dtype=torch.float64)
        theta = c.theta ** (-2 * pair / c.rope)
        low, high = (  # the pairs that turn so often within the original context
            c.rope * log(yarn.original / (2 * pi * turns)) / (2 * log(c.theta))
            for turns in (yarn.beta_fast, yarn.beta_slow)
        )
        low, high = max(floor(low), 0), min(ceil(high), c.rope - 1)
        gamma = 1 - ((pair - low) / (high - low)).clamp(0, 1)
        theta = (1 - gamma) * theta / yarn.factor + gamma * theta
        size = temperature(yarn.factor, yarn.mscale) / temperature(yarn.factor, yarn.mscale_all_dim)
        angle = torch.arange(x.shape[1])[:, None] * theta  # [T, R/2]
        turn = torch.polar(torch.full_like(angle, size), angle)
        turn = turn.view(x.shape[1], *[1] * (x.ndim - 3), -1)
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)

    def attention(self, layer: int, x: Any, sees: Any) -> Any:
        """MLA, eq. 1–11; ``sees`` [B, T, S]. A token that sees nothing gets 0."""
        c, eps = self.c, self.c.norm_eps
        names = "q_a_proj q_a_layernorm q_b_proj kv_a_proj_with_mqa kv_a_layernorm kv_b_proj o_proj"
        w_dq, w_q_norm, w_uq, w_dkv, w_kv_norm, w_ukv, w_o = self.of(
            layer, *(f"self_attn.{name}.weight" for name in names.split())
        )
        q = (norm(x @ w_dq.mT, w_q_norm, eps) @ w_uq.mT).unflatten(-1, (c.heads, -1))
        q, q_rope = q.split([c.nope, c.rope], -1)
        latent, k_rope = (x @ w_dkv.mT).split([c.kv_latent, c.rope], -1)
        kv = (norm(latent, w_kv_norm, eps) @ w_ukv.mT).unflatten(-1, (c.heads, -1))
        k, v = kv.split([c.nope, c.value], -1)
        scores = torch.einsum("bthn,bshn->bhts", q, k)
        scores = scores + torch.einsum("bthr,bsr->bhts", self.rotate(q_rope), self.rotate(k_rope))
        scores = scores * temperature(c.yarn.factor, c.yarn.mscale_all_dim) ** 2
        scores = scores / (c.nope + c.rope) ** 0.5
        sees = sees[:, None]
        p = scores.masked_fill(~sees, -1e300).softmax(-1) * sees
        return torch.einsum("bhts,bshv->bthv", p, v).flatten(-2) @ w_o.mT

    def experts(self, layer: int, x: Any, takes_part: Any) -> tuple[Any, Any, Any]:
        """Eq. 12–20: output, balance loss and load, of the tokens that ``takes_part`` [B, T]."""
        c = self.c
        w_gate, bias = self.of(layer, "mlp.gate.weight", "mlp.gate.e_score_correction_bias")
        s = (x @ w_gate.mT).sigmoid()  # eq. 15
        groups = (s + bias).detach().unflatten(-1, (c.groups, -1))
        kept = groups.topk(2, -1)[0].sum(-1).topk(c.keep_groups, -1)[1]
        hidden = one_hot(kept, c.groups).sum(-2) == 0
        biased = groups.masked_fill(hidden[..., None], -torch.inf).flatten(-2)
        chosen = one_hot(biased.topk(c.top_k, -1)[1], c.experts).sum(-2)  # [B, T, E], eq. 16
        g = s * chosen
        g = c.routed_scale * g / g.sum(-1, keepdim=True)  # eq. 13
        routed, shared = (
            self.of(layer, *(f"mlp.{of}.{part}_proj.weight" for part in ("gate", "up", "down")))
            for of in ("experts", "shared_experts")
        )
        y = (g.mT[..., None] * swiglu(x[:, None], *routed)).sum(1) + swiglu(x, *shared)
        counts = takes_part[..., None]
        length = takes_part.double().sum(-1, keepdim=True).clamp(min=1)  # of each sequence
        best = one_hot(s.detach().topk(c.top_k, -1)[1], c.experts).sum(-2)
        f = c.experts / (c.top_k * length) * (best * counts).sum(1)  # eq. 18
        p = (s / s.sum(-1, keepdim=True) * counts).sum(1) / length  # eq. 19, 20
        balance = c.balance_weight * (f * p).sum(-1).mean()  # eq. 17, mean over sequences
        return y, balance, (chosen * counts).sum((0, 1))

    def block(self, layer: int, x: Any, takes_part: Any, document: Any, told: Told) -> Any:
        """A layer; ``told`` gets its balance loss and load."""
        t = x.shape[1]
        sees = torch.ones(t, t, dtype=torch.bool).tril() & takes_part[:, None]
        sees = sees & (document[:, :, None] == document[:, None])
        before, behind = self.of(layer, "input_layernorm.weight", "post_attention_layernorm.weight")
        x = x + self.attention(layer, norm(x, before, self.c.norm_eps), sees)
        h = norm(x, behind, self.c.norm_eps)
        if layer < self.c.dense_layers:
            names = (f"mlp.{part}_proj.weight" for part in ("gate", "up", "down"))
            return x + swiglu(h, *self.of(layer, *names))
        y, told.balance[layer], told.loads[layer] = self.experts(layer, h, takes_part)
        return x + y

    def hidden(self, batch: Batch, told: Told) -> Any:
        """The main model's states [B, T, D], after the last norm."""
        x = self.w["model.embed_tokens.weight"][batch.tokens]
        for layer in range(self.c.layers):
            x = self.block(layer, x, batch.real, batch.document, told)
        return norm(x, self.w["model.norm.weight"], self.c.norm_eps)

    def log_probs(self, h: Any, tokens: Any) -> Any:
        """Of each token [B, T] after state h [B, T, D]."""
        logits = h @ self.w["lm_head.weight"].mT
        return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]

    def loss(self, batch: Batch) -> tuple[Any, dict[int, Any]]:
        """Cross-entropy, MTP (eq. 21–25) and balance loss; and the loads."""
        tokens, real, document = batch
        c, told = self.c, Told({}, {})
        loss = 0
        h = self.hidden(batch, told)
        for k in range(c.mtp_depth + 1):  # depth 0 is the main model: it predicts token i + 1
            if k:
                layer, n = c.layers + k - 1, tokens.shape[1] - k
                takes_part = real[:, :n] & real[:, k:] & (document[:, :n] == document[:, k:])
                names = ("hnorm.weight", "enorm.weight", "eh_proj.weight")
                w_h, w_e, projection = self.of(layer, *names)
                e = norm(self.w["model.embed_tokens.weight"][tokens[:, k:]], w_e, c.norm_eps)
                h = torch.cat((e, norm(h[:, :n], w_h, c.norm_eps)), -1) @ projection.mT  # eq. 21
                h = self.block(layer, h, takes_part, document[:, :n], told)  # eq. 22
                h = norm(h, *self.of(layer, "shared_head.norm.weight"), c.norm_eps)
            n = tokens.shape[1] - k - 1
            predicts = real[:, :n] & real[:, k:-1] & real[:, k + 1 :]
            predicts = predicts & (document[:, :n] == document[:, k + 1 :])  # and all between
            each = -self.log_probs(h[:, :n], tokens[:, k + 1 :])  # eq. 23, 24
            total = (each * predicts).sum()
            # eq. 24 divides by T, not by the T − k terms: by all tokens that are no padding
            divisor = (real if k else predicts).double().sum()
            loss = loss + (c.mtp_weight / c.mtp_depth if k else 1) * total / divisor  # eq. 25
        return loss + sum(told.balance.values()), told.loads

    def grpo(self, sample: Sample, clip: float, beta: float) -> Any:
        """DeepSeekMath (2402.03300) eq. 3 and 4: outputs weigh alike, and in each its tokens."""
        batch = Batch(sample.tokens, sample.real, torch.zeros_like(sample.tokens))
        h = self.hidden(batch, Told({}, {}))
        now = self.log_probs(h, sample.tokens.roll(-1, 1))
        ratio, a = (now - sample.old).exp(), sample.advantages[:, None]
        surrogate = torch.minimum(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a)
        away = sample.reference - now
        objective = surrogate - beta * (away.exp() - away - 1)
        each = (objective * sample.counts).sum(1) / sample.counts.sum(1)
        return -each.mean()

    @torch.no_grad()
    def clip(self, most: float) -> float:
        """All gradients by one factor, so that their norm is at most ``most``; the norm before."""
        grads = [w.grad for w in self.learnt.values() if w.grad is not None]
        size = torch.cat([g.flatten() for g in grads]).norm()
        for g in grads:
            g *= (most / size).clamp(max=1)
        return float(size)

    @torch.no_grad()
    def move_biases(self, loads: dict[int, Any], gamma: float) -> None:
        """Section 2.1.2: down where the load is above the mean, up where it is below."""
        for layer, load in loads.items():
            (bias,) = self.of(layer, "mlp.gate.e_score_correction_bias")
            load = load.double()
            bias += gamma * (load.mean() - load).sign()

    def arrays(self) -> dict[str, np.ndarray]:
        return {name: w.detach().numpy() for name, w in self.w.items()}


Trained = tuple[
    Sequence[float], Sequence[float], dict[str, np.ndarray]
]  # losses, norms, parameters


def as_torch(record: Any) -> Any:
    """Of a NamedTuple of NumPy arrays."""
    return type(record)(*map(torch.tensor, record))


def adamw(model: Model, decay: float) -> Any:
    return torch.optim.AdamW(model.learnt.values(), betas=(0.9, 0.95), eps=1e-8, weight_decay=decay)


def step(model: Model, optimizer: Any, loss: Any, rate: float, most: float) -> tuple[float, float]:
    """Loss and norm of the gradients, before they are clipped."""
    optimizer.zero_grad()
    loss.backward()
    size = model.clip(most)
    optimizer.param_groups[0]["lr"] = rate
    optimizer.step()
    return float(loss.detach()), size


def train(
    config: ModelConfig,
    params: dict[str, np.ndarray],
    batches: Sequence[Batch],
    rates: Sequence[float],
    *,
    most: float,
    decay: float,
    gamma: float,
) -> Trained:
    """A step on each batch."""
    model = Model(config, params)
    optimizer, told = adamw(model, decay), []
    for batch, rate in zip(batches, rates, strict=True):
        loss, loads = model.loss(as_torch(batch))
        told.append(step(model, optimizer, loss, rate, most))
        model.move_biases(loads, gamma)
    losses, norms = zip(*told, strict=True)
    return losses, norms, model.arrays()


def train_grpo(
    config: ModelConfig,
    params: dict[str, np.ndarray],
    samples: Sequence[Sample],
    rates: Sequence[float],
    *,
    most: float,
    decay: float,
    clip: float,
    beta: float,
) -> Trained:
    """A step on each sample; MTP modules get no gradient, so that AdamW leaves them out."""
    model = Model(config, params)
    optimizer, told = adamw(model, decay), []
    for sample, rate in zip(samples, rates, strict=True):
        loss = model.grpo(as_torch(sample), clip, beta)
        told.append(step(model, optimizer, loss, rate, most))
    losses, norms = zip(*told, strict=True)
    return losses, norms, model.arrays()
