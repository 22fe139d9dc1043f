"""The model, of the ops' formulas."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from refimpl.config import Conventions, ModelConfig, preset
from refimpl.parameters import parameter_shapes

from golden.balance_loss import balance_loss
from golden.case import Case
from golden.cross_entropy import cross_entropy
from golden.embedding import embedding
from golden.ffn import ffn
from golden.linear import linear
from golden.mla import mla
from golden.moe import moe
from golden.mtp import mtp, mtp_pairs
from golden.rms_norm import rms_norm
from golden.rope import frequencies, mscale
from golden.router import count, router


def takes_part(key_mask: Tensor | None, segments: Tensor | None, depth: int) -> Tensor | None:
    """Module ``depth`` leaves out a position if it or the token it reads is padding or of another
    document."""
    given = key_mask if key_mask is not None else segments
    if given is None:
        return None
    batch, length = given.shape
    part = torch.zeros(batch, length - depth, dtype=torch.bool)
    for b in range(batch):
        for i in range(length - depth):
            real = key_mask is None or (bool(key_mask[b, i]) and bool(key_mask[b, i + depth]))
            part[b, i] = real and (
                segments is None or int(segments[b, i]) == int(segments[b, i + depth])
            )
    return part


class Model:
    """DeepSeek-V3 (2412.19437) section 2 over a dict of parameters: hidden states, every loss,
    routes and loads."""

    def __init__(self, w: dict[str, Tensor], config: ModelConfig) -> None:
        self.w = w
        self.config = config
        self.conventions = config.conventions
        yarn = config.yarn
        if (
            self.conventions.yarn_when != "always"
            and yarn is not None
            and config.max_positions <= yarn.original
        ):
            yarn = None
        self.inv_freq = frequencies(config.rope, config.theta, yarn)
        self.scale = (config.nope + config.rope) ** -0.5
        self.factor = 1.0
        if yarn is not None:
            self.scale *= mscale(yarn.factor, yarn.mscale_all_dim) ** 2
            self.factor = mscale(yarn.factor, yarn.mscale) / mscale(
                yarn.factor, yarn.mscale_all_dim
            )
        self.balance: dict[int, Tensor] = {}
        self.indices: dict[int, Tensor] = {}
        self.loads: dict[int, Tensor] = {}

    def norm(self, x: Tensor, name: str) -> Tensor:
        return rms_norm(x, self.w[name], self.config.norm_eps)

    def experts(self, layer: int, x: Tensor, key_mask: Tensor | None) -> Tensor:
        """Section 2.1.2: gate, experts, and the layer's balance loss on the side."""
        c = self.config
        w = self.w
        at = f"model.layers.{layer}.mlp."
        weights, scores, indices = router(
            x,
            w[at + "gate.weight"],
            top_k=c.top_k,
            bias=w.get(at + "gate.e_score_correction_bias"),
            groups=c.groups,
            keep_groups=c.keep_groups,
            group_score=c.group_score,
            score=c.gate,
            normalise=c.normalise_weights,
            scale=c.routed_scale,
            epsilon=self.conventions.gate_epsilon,
            masked_groups=self.conventions.masked_groups,
            ranking=self.conventions.softmax_ranking if c.gate == "softmax" else "scores",
        )
        counted = indices if self.conventions.balance_counts == "routed" else None
        self.balance[layer] = balance_loss(scores, c.balance_weight, c.top_k, counted, key_mask)
        self.indices[layer], self.loads[layer] = indices, count(indices, c.experts, key_mask)
        names = {f"w_{part}": f"experts.{part}_proj.weight" for part in ("gate", "up", "down")}
        if c.shared_experts:
            names |= {
                f"w_shared_{part}": f"shared_experts.{part}_proj.weight"
                for part in ("gate", "up", "down")
            }
        return moe(x, weights, {name: w[at + key] for name, key in names.items()}, indices)

    def block(
        self, layer: int, x: Tensor, positions: Tensor, key_mask: Any, segments: Any
    ) -> Tensor:
        c, at = self.config, f"model.layers.{layer}."
        names = {
            "w_q_a": "q_a_proj",
            "w_q_a_norm": "q_a_layernorm",
            "w_q_b": "q_b_proj" if c.q_latent is not None else "q_proj",
            "w_kv_a": "kv_a_proj_with_mqa",
            "w_kv_a_norm": "kv_a_layernorm",
            "w_kv_b": "kv_b_proj",
            "w_o": "o_proj",
        }
        if c.q_latent is None:
            del names["w_q_a"], names["w_q_a_norm"]
        y, _ = mla(
            self.norm(x, at + "input_layernorm.weight"),
            None,
            {name: self.w[f"{at}self_attn.{key}.weight"] for name, key in names.items()},
            heads=c.heads,
            scale=self.scale,
            eps=c.norm_eps if self.conventions.latent_eps == "config" else 1e-6,
            positions=positions,
            inv_freq=self.inv_freq,
            layout=self.conventions.rope_layout,
            factor=self.factor,
            key_mask=key_mask,
            segments=segments,
        )
        x = x + y
        z = self.norm(x, at + "post_attention_layernorm.weight")
        if layer < c.dense_layers:
            return x + ffn(
                z, *(self.w[f"{at}mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
            )
        return x + self.experts(layer, z, key_mask)

    def __call__(
        self,
        tokens: Tensor,
        positions: Tensor,
        targets: Tensor,
        mask: Tensor,
        key_mask: Any = None,
        segments: Any = None,
    ) -> dict[str, Tensor]:
        c = self.config
        table = self.w["model.embed_tokens.weight"]
        head = self.w["lm_head.weight"]
        x = embedding(table, tokens)
        for layer in range(c.layers):
            x = self.block(layer, x, positions, key_mask, segments)
        hidden = self.norm(x, "model.norm.weight")
        logits = linear(hidden, head)
        main = cross_entropy(logits, targets, mask)

        state = hidden if self.conventions.mtp_hidden in ("normed", "normed_first") else x
        depth_losses = []
        for depth in range(1, c.mtp_depth + 1):
            layer, length = c.layers + depth - 1, tokens.shape[1] - depth
            at = f"model.layers.{layer}."
            read, predicted, counts = mtp_pairs(tokens, targets, mask, depth, segments)
            embedded = embedding(table, read)
            if self.conventions.mtp_zero_first_embedding:
                embedded = torch.where(positions[:, :length, None] == 0, 0.0, embedded)
            norms = (
                self.w[at + "hnorm.weight"],
                self.w[at + "enorm.weight"],
                self.w[at + "eh_proj.weight"],
            )
            joined = mtp(
                state[:, :length], embedded, *norms, c.norm_eps, self.conventions.mtp_order
            )
            keys = takes_part(key_mask, segments, depth)
            documents = None if segments is None else segments[:, :length]
            if keys is not None:
                counts = counts & keys
            raw = self.block(layer, joined, positions[:, :length], keys, documents)
            normed = self.norm(raw, at + "shared_head.norm.weight")
            real = tokens.numel() if key_mask is None else int(key_mask.sum())
            divisor = {"positions": real, "valid": int(counts.sum()), "main": int(mask.sum())}
            normaliser = float(divisor[self.conventions.mtp_normaliser])
            depth_losses.append(cross_entropy(linear(normed, head), predicted, counts, normaliser))
            state = raw if self.conventions.mtp_hidden in ("raw", "normed_first") else normed
        loss = main + sum(self.balance.values())
        if depth_losses:
            loss = loss + c.mtp_weight / c.mtp_depth * sum(depth_losses)
        outputs = {"loss": loss, "main": main, "hidden": hidden, "logits": logits}
        outputs |= {f"mtp.{k}": value for k, value in enumerate(depth_losses, 1)}
        outputs |= {f"balance.{layer}": value for layer, value in self.balance.items()}
        outputs |= {f"indices.{layer}": value for layer, value in self.indices.items()}
        return outputs | {f"load.{layer}": value for layer, value in self.loads.items()}


def model_parameters(case: Case, config: ModelConfig, gate: float) -> dict[str, Tensor]:
    """Normal weights, the gates' of std ``gate``; norms, and biases that make most biased scores
    negative, off their neutral values."""
    w = {}
    for name, shape in parameter_shapes(config).items():
        if name.endswith("e_score_correction_bias"):
            bias = (-0.65 + 0.15 * case.rng.standard_normal(shape)).astype(np.float16)
            w[name] = case.aux(name, bias).to(torch.float64)
        else:
            mean, std = (0.8, 0.3) if len(shape) == 1 else (0.0, 0.15)
            if name.endswith("gate.weight"):
                std = gate
            w[name] = case.input(name, *shape, std=std, mean=mean)
    return w


def following(
    tokens: Tensor, key_mask: Tensor | None, segments: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Default targets and mask: the next token, if it exists, both are no padding, and both are of
    one document."""
    batch, length = tokens.shape
    targets, mask = torch.zeros_like(tokens), torch.zeros(batch, length, dtype=torch.bool)
    for b in range(batch):
        for t in range(length - 1):
            targets[b, t] = tokens[b, t + 1]
            real = key_mask is None or bool(key_mask[b, t] & key_mask[b, t + 1])
            mask[b, t] = real and (segments is None or bool(segments[b, t] == segments[b, t + 1]))
    return targets, mask


SMALL = dict(  # noqa: C408 (reads as the arguments it becomes)
    vocabulary=13, width=8, layers=2, dense_layers=1, heads=2, q_latent=9, kv_latent=7, nope=3,
    rope=4, value=5, dense_hidden=11, expert_hidden=3, experts=6, groups=3, keep_groups=2,
    shared_experts=2,
)  # fmt: skip


def cases() -> Iterable[Case]:
    tiny = preset("tiny")
    small = replace(tiny, **SMALL)
    v2 = replace(
        small,
        q_latent=None,
        gate="softmax",
        group_score="max",
        gate_bias=False,
        normalise_weights=False,
        mtp_depth=0,
        max_positions=16,
        balance_weight=0.7,
    )
    other = Conventions(
        mtp_order="hidden_embedding",
        mtp_hidden="raw",
        mtp_normaliser="valid",
        balance_counts="routed",
        rope_layout="halves",
        latent_eps="class_default",
        yarn_when="always",
        gate_epsilon=0.2,
    )
    third = Conventions(mtp_normaliser="main", mtp_zero_first_embedding=True, masked_groups="zero")
    one_layer = replace(small, layers=1, dense_layers=0, mtp_depth=1, shared_experts=0)
    # name, config, what the forward is given, outputs with a cotangent
    settings: tuple[tuple[str, ModelConfig, str, tuple[str, ...]], ...] = (
        ("tiny", replace(tiny, vocabulary=23, width=12, expert_hidden=3), "", ("loss",)),
        ("packed", small, "key_mask segments positions", ("loss",)),
        ("v2", v2, "", ("loss",)),
        (
            "conventions",
            replace(small, conventions=other, max_positions=16, balance_weight=0.4),
            "targets",
            ("loss",),
        ),
        (
            "all_cotangents",
            replace(one_layer, conventions=third),
            "targets mask positions",
            ("loss", "logits", "hidden"),
        ),
        ("logits_alone", replace(one_layer, mtp_depth=0), "key_mask offset", ("logits",)),
        (
            "vllm_megatron",  # vLLM's chain of hidden states, Megatron's softmax gate
            replace(
                one_layer,
                mtp_depth=2,
                gate="softmax",
                gate_bias=False,
                conventions=Conventions(mtp_hidden="normed_first", softmax_ranking="logits"),
            ),
            "",
            ("loss",),
        ),
        (
            "left_padded",
            replace(one_layer, conventions=Conventions(mtp_normaliser="valid")),
            "left",
            ("loss",),
        ),
    )
    for name, config, given, cotangents in settings:
        gives = given.split()
        case = Case(f"model/{name}", storage=np.float16, config=asdict(config))
        w = model_parameters(case, config, 1.0 if name == "vllm_megatron" else 0.15)
        length = 9
        values = case.rng.integers(0, config.vocabulary, (2, length))
        values[0, 5] = values[1, 2] = values[0, 1]
        tokens = case.aux("tokens", values)
        key_mask = segments = None
        positions = torch.arange(length).expand(2, length)
        if "key_mask" in gives:
            key_mask = case.aux("key_mask", [[True] * 6 + [False] * 3, [True] * 8 + [False]])
        if "left" in gives:
            key_mask = case.aux("key_mask", [[True] * 9, [False] * 2 + [True] * 7])
        if "segments" in gives:
            segments = case.aux("segments", [[0] * 3 + [1] * 6, [5] * 5 + [2] * 4])
        if "positions" in gives:
            positions = case.aux(
                "positions", [[0, 1, 2, 0, 1, 2, 3, 4, 5], [40, 41, 42, 43, 44, 7, 8, 9, 10]]
            )
        if "offset" in gives:
            positions = case.aux("positions", np.arange(length) + 11).expand(2, length)
        targets, mask = following(tokens, key_mask, segments)
        if (
            "targets" in gives
        ):  # the token after the last one is known, so every position has a target
            after = case.rng.integers(0, config.vocabulary, (2, 1))
            targets = case.aux("targets", np.concatenate([values[:, 1:], after], 1))
            mask = torch.ones_like(targets, dtype=torch.bool)
        if "mask" in gives:
            mask = case.aux("mask", case.rng.random((2, length)) < 0.6)
        outputs = Model(w, config)(tokens, positions, targets, mask, key_mask, segments)
        yield case.finish([key for key in outputs if key not in cotangents], **outputs)
