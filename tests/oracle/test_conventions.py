"""What refimpl.conventions says that transformers does, where the comparison of whole models does
not show it: its own code runs here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra oracle")
pytest.importorskip("transformers", reason="needs the extra oracle")

from refimpl.model import forward, logits

from golden.checkpoint_values import read_checkpoint
from oracle.hugging_face import build, build_mtp, float64
from oracle.test_hugging_face import SMALL

TOKENS = np.random.default_rng(5).integers(0, SMALL["vocab_size"], (2, 9))


def test_labels_of_mtp_raise() -> None:
    """Row 3: the loss starts as None, and the first module's is added to it."""
    model = build("v3", SMALL, 3)
    modules = build_mtp(model, 1, 4)
    ids = torch.tensor(TOKENS)
    state = model.model(ids, use_cache=False).last_hidden_state
    given: dict[str, Any] = {"attention_mask": None, "mtp_cache": None}
    given["position_ids"] = torch.arange(8)[None]
    modules(ids[:, 1:], state[:, :-1], **given)
    with pytest.raises(TypeError, match="NoneType"):
        modules(ids[:, 1:], state[:, :-1], labels=ids[:, 1:], **given)


def test_float64_is_not(tmp_path: Path) -> None:
    """Row 22: a model in float64 differs by more than float64's rounding, by less than float32's at
    early positions, and by much more at late ones, through its angles alone."""
    model = build("v3", SMALL | {"max_position_embeddings": 200_000}, 3, tmp_path)
    config, params = read_checkpoint(tmp_path)
    worst = {}
    for start in (0, 32_000, 163_000):
        positions = torch.arange(start, start + 9)[None].expand(2, 9)
        with torch.no_grad():
            theirs = model(torch.tensor(TOKENS), position_ids=positions, use_cache=False).logits
        ours = logits(
            params,
            forward(params, TOKENS, config, positions=positions.numpy(), with_loss=False)[0].hidden,
        )
        worst[start] = float(np.max(np.abs(theirs.numpy() - ours)) / np.max(np.abs(ours)))
    assert 1e-12 < worst[0] < 1e-5, worst
    assert worst[0] < worst[32_000] < worst[163_000] < 1e-2, worst
    assert worst[163_000] > 10 * worst[0], worst


def test_left_padding_counts_the_first_token(tmp_path: Path) -> None:
    """Row 26: with −100 on padding alone the first real token counts, and the loss is one in
    `eager` and another in `sdpa`; with −100 on it too, both have ours, which leaves it out."""
    real = np.arange(9) >= np.array([[0], [3]])
    positions = np.maximum(np.cumsum(real, axis=1) - 1, 0)
    given = {"attention_mask": torch.tensor(real), "position_ids": torch.tensor(positions)}

    def loss(counts: np.ndarray, attention: str) -> float:
        labels = torch.tensor(np.where(counts, TOKENS, -100))
        with float64(), torch.no_grad():
            model = build("v3", SMALL, 3, attention=attention)
            return float(model(torch.tensor(TOKENS), labels=labels, use_cache=False, **given).loss)

    with float64():
        build("v3", SMALL, 3, tmp_path)
    config, params = read_checkpoint(tmp_path)
    config = replace(config, balance_weight=0.0, mtp_depth=0)

    def ours(**fields: Any) -> float:
        other = replace(config, conventions=replace(config.conventions, **fields))
        output, _ = forward(params, TOKENS, other, key_mask=real, positions=positions)
        return float(output.main)

    without = ours(target_after_padding=False)
    eager, sdpa = loss(real, "eager"), loss(real, "sdpa")
    left_out = [loss(real & np.roll(real, 1, axis=1), how) for how in ("eager", "sdpa")]
    np.testing.assert_allclose(left_out, without, rtol=1e-12)
    assert ours(target_after_padding=True, blind_query="mean") == pytest.approx(eager, rel=1e-12)
    assert ours(target_after_padding=True, blind_query="zero") == pytest.approx(sdpa, rel=1e-12)
    assert len({round(value, 4) for value in (eager, sdpa, without)}) == 3
